"""What proves the methods of chapter 03 right: identities, closed forms and well-kept libraries, a test a claim.

linreg: L(W) = ||X W^T - Y||^2 / (2 N), Gaussian X, float64. Orderings hold on the mean over five seeds, with the sizes and steps that stand there.
A claim that does not hold stands here with its counter-example.
"""

import itertools
import math
from functools import partial

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from scipy.optimize import minimize
from scipy.stats import spearmanr
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn.utils import prune as reference

from cmlib.core import channel_evidence
from cmlib.core.apply import attach, attached, latent, plan_of, weighted, with_plain_weights
from cmlib.core.bake import bake
from cmlib.core.planner import gather
from cmlib.core.select import select
from cmlib.core.training import Hook, attached_hooks, penalty
from cmlib.lab.cost import layer_costs
from cmlib.lab.data import load_data
from cmlib.lab.in_order import prune_in_order, rebuild_in_order
from cmlib.lab.nets import Residual
from cmlib.lab.train import evaluate, fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import catalog
from cmlib.methods import structures as methods

F64 = torch.float64
SGD = partial(torch.optim.SGD, momentum=0.0)
KEYS = [k for k, m in catalog().items() if m.chapter == "03" and vars(methods).get(k) is m]
SEEDS = range(5)

MUTATIONS = [
    ("structured_sparsity_learning", "cmlib/methods/structures.py", "w * (1 - t / norms).clamp(min=0)", "w.sign() * (w.abs() - t).clamp(min=0)",
     "each weight shrinks on its own: the lasso, without groups"),
    ("l1_norm_filter_pruning", "cmlib/methods/structures.py", "return w.flatten(1).norm(p, dim=1)", "return w.flatten(1).sum(1)",
     "the absolute value is missing"),
    ("soft_filter_pruning", "cmlib/methods/structures.py", "torch.where(strongest(w, keep, p), w, 0.0) if epoch_ends else w",
     "torch.where(strongest(w, keep, p), w, 0.0)", "filters are zeroed at every step: none can grow again"),
    ("network_trimming_apoz", "cmlib/methods/structures.py", "return 1 - zeros\n", "return zeros\n", "the silent ones stay"),
    ("network_slimming", "cmlib/methods/structures.py", "return bn_gamma.abs().mean(0)", "return bn_gamma.mean(0)",
     "a negative scale counts as small"),
    ("network_slimming", "cmlib/methods/structures.py", "lam * gamma.detach().sign()", "lam * gamma.detach()",
     "the penalty's square: scales shrink, and never vanish"),
    ("thinet", "cmlib/methods/structures.py", "(2 * with_removed + gram.diagonal())", "gram.diagonal()",
     "each channel alone: what cancels is not heard"),
    ("lasso_channel_pruning", "cmlib/methods/structures.py",
     "(w / torch.linalg.vector_norm(w, dim=(0, 2)).clamp(min=torch.finfo(w.dtype).tiny)[:, None]).flatten(1)", "w.flatten(1)",
     "the parts of the next weight are not made of norm 1"),
    ("taylor_pruning", "cmlib/methods/structures.py", "flow / flow.norm()", "flow / flow.sum()", "divided by the sum and not by the L2 norm"),
    ("taylor_pruning", "cmlib/core/channel_evidence.py", "sum(p).abs().sum(0) / len(x)", "sum(p).sum(0).abs() / len(x)",
     "the absolute value of the mean over examples: they cancel"),
    ("admm_weight_pruning", "cmlib/methods/structures.py", 'u * (state["rho"] / higher)', 'u * (higher / state["rho"])',
     "the dual is rescaled the wrong way"),
    ("admm_weight_pruning", "cmlib/methods/structures.py", 'min(state["rho"] * growth, max(HIGHEST, state["rho"]))', 'state["rho"] * growth',
     "rho grows without end"),
]  # fmt: skip


def linreg(n=60, d=6, outputs=1, *, seed=0, noise=0.1):
    """X (n, d), Y (n, outputs) = X times something + noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=F64)
    true = torch.randn(d, outputs, generator=draw, dtype=F64)
    return x, x @ true + noise * torch.randn(n, outputs, generator=draw, dtype=F64)


def half_mse(z, y):
    return (z - y).square().sum(1).mean() / 2


def learner(key, w, **knobs):
    """A dense layer without bias, of weight w (outputs, d), from which the method learns."""
    layer, method = nn.Linear(w.shape[1], w.shape[0], bias=False).double(), catalog()[key]
    with torch.no_grad():
        layer.weight.copy_(w)
    attach(layer, method(layer.weight.detach(), **knobs), method, method.bind(knobs))
    return nn.Sequential(layer)


def descend(model, x, y, steps=500, lr=0.3):
    """Full-batch gradient descent with what the method adds; the weight that it ends at."""
    fit(model, (x, y), epochs=steps, batch=len(x), lr=lr, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    return model.eval()[0].weight.detach()


stirred = partial(networks.stirred, dtype=F64)


def two_convolutions(padding=1, seed=0):
    """Convolution (6), batch norm, ReLU, convolution (4), and its inputs."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=padding, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=padding), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    return stirred(net), torch.rand(7, 2, 8, 8, dtype=F64)


def labelled(x):
    return x, torch.arange(len(x)) % 3


def silenced(net, rows, parts=("weight", "bias")):
    """Zero filters ``rows`` of layer 0 and ``parts`` of the batch norm behind them, in place."""
    with torch.no_grad():
        net[0].weight[rows] = 0
        for part in parts:
            getattr(net[1], part)[rows] = 0
    return net


def without(net, rows):
    """``two_convolutions`` with the channels ``rows`` of its first layer cut out by hand."""
    stay = [i for i in range(6) if i not in rows]
    small = nn.Sequential(nn.Conv2d(2, len(stay), 3, padding=net[0].padding, bias=False), nn.BatchNorm2d(len(stay)), net[2],
                          nn.Conv2d(len(stay), 4, 3, padding=net[3].padding), *net[4:]).double().eval()  # fmt: skip
    with torch.no_grad():
        small[0].weight.copy_(net[0].weight[stay])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(small[1], name).copy_(getattr(net[1], name)[stay])
        small[3].weight.copy_(net[3].weight[:, stay])
        small[3].bias.copy_(net[3].bias)
    return small


def constants(net, rows):
    """What channels ``rows`` of layer 0 say when their filters are zero: relu(beta - gamma mu / sigma)."""
    norm = net[1]
    return (norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt())[rows].relu().detach()


def folded(net, rows):
    """The channels ``rows`` cut out, what they always say put into the next bias."""
    small = without(net, rows)
    with torch.no_grad():
        small[3].bias += net[3].weight[:, rows].sum((2, 3)) @ constants(net, rows)
    return small


# structured sparsity learning


def test_ssl_1_the_proximal_step_meets_its_optimality_conditions():
    """v minimises ||v - w||^2 / 2 + t ||v||: v - w + t v / ||v|| = 0, or v = 0 and ||w|| <= t; 600 draws."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(600):
        w, t = torch.randn(1, 4, generator=draw, dtype=F64), 3 * torch.rand((), generator=draw, dtype=F64).item()
        v = methods.group_soft_threshold(w, t, "filter")
        slope = v - w + t * v / v.norm() if v.any() else (w.norm() - t).clamp(min=0)
        assert slope.abs().max() < 1e-12


def test_ssl_1_a_numerical_minimiser_finds_nothing_better_but_misses_the_point():
    """The check's 1e-6 is missed by scipy's default, most of all when it starts at 0, where the cost has its kink."""
    draw, misses = torch.Generator().manual_seed(1), 0
    for _ in range(100):
        w, t = torch.randn(4, generator=draw, dtype=F64), 3 * torch.rand((), generator=draw, dtype=F64).item()
        v, w = methods.group_soft_threshold(w[None], t, "filter")[0].numpy(), w.numpy()
        cost = lambda v, w=w, t=t: 0.5 * ((v - w) ** 2).sum() + t * np.sqrt((v**2).sum())  # noqa: E731
        found = minimize(cost, np.zeros(4)).x
        assert cost(v) <= cost(found) + 1e-12
        misses += np.abs(v - found).max() > 1e-6
    assert misses > 10


def test_ssl_2_groups_of_one_weight_are_the_lasso():
    x, y = linreg(d=8)
    for lam in (0.05, 0.5):
        w = descend(learner("structured_sparsity_learning", torch.randn(1, 8, dtype=F64), group="shape", lambda_g=lam), x, y, steps=200)
        expected = Lasso(alpha=lam, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y[:, 0]).coef_
        assert np.abs(w[0].numpy() - expected).max() < 1e-6
        assert (w[0].numpy() == 0).tolist() == (expected == 0).tolist()


def critical(x, y, group):
    """The lambda_g from which on all groups are zero: the largest ||gradient_g|| at w = 0."""
    return methods.group_norms(-(y.T @ x) / len(x), group).max().item()


@pytest.mark.parametrize("group", ["filter", "shape", "depth"])
def test_ssl_3_all_goes_exactly_from_the_critical_penalty_on(group):
    x, y = linreg(outputs=3)
    for factor, empty in ((1.01, True), (0.99, False)):
        model = learner("structured_sparsity_learning", torch.randn(3, 6, dtype=F64), group=group, lambda_g=factor * critical(x, y, group))
        assert bool((descend(model, x, y, 400) == 0).all()) is empty


@pytest.mark.parametrize("group", ["filter", "channel", "shape"])
def test_ssl_4_at_the_solution_the_optimality_conditions_hold(group):
    x, y = linreg(outputs=5, noise=1.0)
    y = y * torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0], dtype=F64)
    x = x * torch.tensor([1.0, 0.3, 1.0, 0.4, 1.0, 0.5], dtype=F64)
    lam = 0.3 * critical(x, y, group)
    w = descend(learner("structured_sparsity_learning", torch.randn(5, 6, dtype=F64), group=group, lambda_g=lam), x, y, steps=900, lr=0.4)
    slope = (w @ x.T - y.T) @ x / len(x)
    zero = (methods.group_norms(w, group) == 0).flatten()
    assert 0 < zero.sum() < len(zero)
    assert (methods.group_norms(slope, group).flatten()[zero] <= lam * (1 + 1e-9)).all()
    rest = slope + lam * w / methods.group_norms(w, group).clamp(min=1e-300)
    assert methods.group_norms(rest, group).flatten()[~zero].max() < 1e-6


def test_ssl_4_the_subgradient_has_the_same_solution_but_no_exact_zeros():
    x, y = linreg(outputs=5)
    lam = 0.5 * critical(x, y, "filter")
    start = torch.randn(5, 6, dtype=F64)
    exact = descend(learner("structured_sparsity_learning", start, lambda_g=lam), x, y)
    model = learner("structured_sparsity_learning", start, lambda_g=lam, solver="subgradient")
    near = descend(model, x, y, steps=700, lr=0.1)
    gone = (exact == 0).all(1)
    assert gone.any() and (near != 0).all() and (near - exact).abs().max() < 0.1  # it goes to and fro around 0 by lr lambda_g
    dead = learner("structured_sparsity_learning", torch.zeros(2, 3, dtype=F64), lambda_g=1.0, solver="subgradient")
    penalty(dead.train(), 1, 0.0).backward()
    assert (latent(dead[0]).grad == 0).all()  # a zero group's gradient is 0, not 0 / 0
    swept = methods.structured_sparsity_learning(near, lambda_g=lam, threshold_after=0.2)
    assert torch.equal(swept.dense() == 0, exact == 0)


def test_ssl_5_zero_filters_and_what_belongs_to_them_leave_no_trace():
    net, x = two_convolutions()
    with torch.no_grad():
        t = methods.group_norms(net[0].weight, "filter").median().item()
        net[0].weight.copy_(methods.group_soft_threshold(net[0].weight, t, "filter"))
    masked = compress(net, "structured_sparsity_learning", where="0", data=labelled(x))
    small = bake(masked, labelled(x))
    assert small[0].out_channels == 3 and torch.allclose(small(x), masked(x), rtol=0, atol=1e-10)


def test_ssl_5_zero_channels_need_no_folding():
    net, x = two_convolutions()
    with torch.no_grad():
        norms = methods.group_norms(net[3].weight, "channel").flatten()
        net[3].weight.copy_(methods.group_soft_threshold(net[3].weight, norms.median().item(), "channel"))
    gone = (net[3].weight == 0).all(0).flatten(1).all(1).nonzero().flatten().tolist()
    assert len(gone) == 3 and torch.allclose(without(net, gone)(x), net(x), rtol=0, atol=1e-10)


def test_ssl_5_a_zero_filter_behind_a_batch_norm_still_says_a_constant_and_folding_it_misses_at_padded_borders():
    """The claim holds after folding where nothing is padded; a padded border reads 0 there and not the constant."""
    rows = [1, 4]
    for padding in (0, 1):
        net, x = two_convolutions(padding)
        net[1].bias.data[rows] = 0.4
        with torch.no_grad():
            net[0].weight[rows] = 0
            before, after = net[:4](x), folded(net, rows)[:4](x)
        inner = slice(1, -1) if padding else slice(None)
        assert torch.allclose(before[..., inner, inner], after[..., inner, inner], rtol=0, atol=1e-10)
        assert bool((before - after).abs().max() > 1e-3) is bool(padding)


def test_ssl_6_a_zero_shape_is_a_column_of_both_matrices():
    torch.manual_seed(0)
    w, x = torch.randn(5, 3, 3, 3, dtype=F64), torch.randn(2, 3, 7, 7, dtype=F64)
    w = methods.group_soft_threshold(w, methods.group_norms(w, "shape").median().item(), "shape")
    stay = w.flatten(1).any(0)
    assert 0 < stay.sum() < 27
    product = w.flatten(1)[:, stay] @ F.unfold(x, 3)[:, stay]
    assert torch.allclose(product.reshape(2, 5, 5, 5), F.conv2d(x, w), rtol=0, atol=1e-12)
    packed = methods.structured_sparsity_learning(w, group="shape")
    assert torch.equal(packed.mask.flatten(1), stay.expand(5, 27))


def test_ssl_7_a_block_without_its_last_layer_is_its_shortcut():
    torch.manual_seed(0)
    net = stirred(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    with torch.no_grad():
        net[2].conv2.weight.zero_()
    x = torch.rand(3, 8, 6, 6, dtype=F64)
    copy = compress(net, "structured_sparsity_learning", where="2.conv2", group="depth", data=labelled(torch.rand(6, 1, 6, 6, dtype=F64)))
    assert torch.equal(copy.eval()[2](x), x)
    assert (net[2](x) - x).abs().max() > 0.05  # batch norm says something of its own
    assert not torch.equal(copy[2](-x), -x)  # the ReLU behind the sum wants x >= 0


# filter norms


def importance(how, net, layer, x):
    """Torch-Pruning's scores of all filters of a layer."""
    graph = torch_pruning.DependencyGraph().build_dependency(net, x)
    with torch.enable_grad():
        return how(graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, list(range(layer.out_channels))))


def lowest(scores, count):
    return set(scores.argsort()[:count].tolist())


@pytest.mark.parametrize("p", [1, 2])
def test_l1_norm_1_removes_what_torch_and_torch_pruning_remove(p):
    """5 of 16, 20 nets; Torch-Pruning reduces and normalises by default, and then mostly picks another set."""
    others = 0
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(32, 4))
        data = torch.rand(4, 3, 6, 6), torch.arange(4)
        gone = set((~plan(net, "l1_norm_filter_pruning", where="0", data=data, p=p, keep=11 / 16)["0"].rows).nonzero().flatten().tolist())
        masked = reference.LnStructured(5, n=p, dim=0).compute_mask(net[0].weight, torch.ones_like(net[0].weight))
        assert gone == set((masked.flatten(1).amax(1) == 0).nonzero().flatten().tolist())
        single = torch_pruning.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
        assert gone == lowest(importance(single, net, net[0], data[0]), 5)
        others += gone != lowest(importance(torch_pruning.importance.MagnitudeImportance(p=p), net, net[0], data[0]), 5)
    assert others > 10
    assert reference.LnStructured(0.3, n=p, dim=0).compute_mask(torch.rand(16, 4), torch.ones(16, 4)).eq(0).all(1).sum() == 5  # rounds 4.8


@pytest.mark.parametrize("net, shape", [("cnn", (1, 8, 8)), ("lenet5", (1, 28, 28)), ("resnet", (1, 28, 28))])
def test_l1_norm_2_the_small_network_says_what_the_masked_one_says(net, shape):
    model, x = stirred(build(net, "digits" if net == "cnn" else "mnist")), torch.rand(6, *shape, dtype=F64)
    masked = compress(model, "l1_norm_filter_pruning", keep=0.4)
    small = bake(masked)
    assert sum(p.numel() for p in small.parameters()) < 0.35 * sum(p.numel() for p in model.parameters())
    assert torch.allclose(small(x), masked(x), rtol=0, atol=1e-10)


def test_l1_norm_2_zeroing_by_hand_needs_the_batch_norms_scale_too():
    """In evaluation a zero filter still says beta - gamma mu / sigma: zeroing beta alone, as the check has it, is off."""
    net, x = two_convolutions()
    rows = (~plan(net, "l1_norm_filter_pruning", where="0", data=labelled(x))["0"].rows).nonzero().flatten().tolist()
    small = bake(compress(net, "l1_norm_filter_pruning", where="0", data=labelled(x)), labelled(x))
    net[1].running_mean[rows] = -3.0
    assert torch.allclose(silenced(net, rows)(x), small(x), rtol=0, atol=1e-10)
    net, x = two_convolutions()
    net[1].running_mean[rows] = -3.0
    assert (silenced(net, rows, ("bias",))(x) - small(x)).abs().max() > 0.05


def test_l1_norm_3_this_layer_and_the_next_get_cheaper_by_the_share_removed():
    model = build("cnn", "digits")
    small = bake(compress(model, "l1_norm_filter_pruning", where="conv1", keep=0.25))
    before, after = (layer_costs(m, torch.zeros(1, 1, 8, 8)).set_index("layer")["multiply_adds"] for m in (model, small))
    assert after["conv1"] == 0.25 * before["conv1"] and after["conv2"] == 0.25 * before["conv2"] and after["fc"] == before["fc"]


@pytest.mark.parametrize("p", [1, 2])
def test_l1_norm_4_greedy_counts_only_channels_that_an_earlier_layer_still_makes(p):
    """conv2 keeps the filters of largest norm over the channels that conv1 still makes; in some nets others than the independent ones."""
    others = 0
    for seed in range(10):
        net = stirred(build("cnn", "digits", seed))
        small = prune_in_order(net, "l1_norm_filter_pruning", {"conv1": 0.5, "conv2": 0.5}, p=p)
        first, independent = (plan(net, "l1_norm_filter_pruning", p=p, keep=0.5)[n].rows for n in ("conv1", "conv2"))
        w = net.conv2.weight.detach()
        rows = w[:, first].flatten(1).norm(p, dim=1).argsort(descending=True)[:8].sort().values
        assert torch.equal(small.conv1.weight, net.conv1.weight[first]) and torch.equal(small.conv2.weight, w[rows][:, first])
        assert torch.equal(small.bn2.running_mean, net.bn2.running_mean[rows]) and torch.equal(small.fc.weight, net.fc.weight[:, rows])
        others += rows.tolist() != independent.nonzero().flatten().tolist()
    assert others > 2


def test_l1_norm_4_greedy_is_independent_until_an_earlier_layer_lost_channels():
    net, x = stirred(build("lenet5", "mnist")), torch.rand(5, 1, 28, 28, dtype=F64)
    one = prune_in_order(net, "l1_norm_filter_pruning", {"conv2": 0.3})
    assert torch.allclose(one(x), compress(net, "l1_norm_filter_pruning", where="conv2", keep=0.3)(x), rtol=0, atol=1e-12)
    assert torch.equal(prune_in_order(net, "l1_norm_filter_pruning", {"conv1": 1.0, "fc1": 1.0})(x), net(x))


def test_l1_norm_5_keeping_all_changes_nothing():
    model, x = stirred(build("cnn", "digits")), torch.rand(4, 1, 8, 8, dtype=F64)
    whole = compress(model, "l1_norm_filter_pruning", keep=1.0)
    assert torch.equal(whole(x), model(x)) and torch.equal(bake(whole)(x), model(x))


# soft filter pruning


def l2_smallest(w, count):
    masked = reference.LnStructured(count, n=2, dim=0).compute_mask(w, torch.ones_like(w))
    return masked.flatten(1).amax(1) == 0


def softly(model, data, epochs=1, keep=0.7, **how):
    """A copy trained with soft filter pruning, and fc1's weight just before its last projection."""
    copy, seen = compress(model, "soft_filter_pruning", keep=keep), []
    fit(copy, data, epochs=epochs, hooks=[Hook(after=lambda m, _: seen.append(latent(m.fc1).detach().clone()))], keep_best=False, **how)
    return copy, seen[-1]


def test_sfp_1_exactly_the_floor_of_filters_is_zero_after_an_epoch(digits64):
    copy, before = softly(load_net("mlp", "digits").double(), digits64)
    zero = ~latent(copy.fc1).detach().any(1)
    assert zero.sum() == math.floor(32 * 0.3) == 9
    assert torch.equal(zero, l2_smallest(before, 9)) and torch.equal(~plan_of(copy)["fc1"].rows, zero)
    for n, keep, gone in ((16, 0.7, 4), (10, 0.9, 1), (10, 0.7, 3), (20, 0.35, 13), (7, 0.001, 6)):  # 16 x 0.3 = 4.8, which ln_structured rounds to 5
        assert (~methods.strongest(torch.randn(n, 3), keep, 2)).all(1).sum() == gone
    assert copy.fc2.weight.any(1).all() and "fc2" not in plan_of(copy)  # the classes stay


def test_sfp_2_a_zeroed_filter_moves_by_its_gradient_and_a_hard_one_stays(digits64):
    x, y = digits64
    model = load_net("mlp", "digits").double()
    copy, _ = softly(model, digits64)
    with torch.no_grad():
        copy.fc1.parametrizations.bias.original.fill_(0.1)
    zero = ~latent(copy.fc1).detach().any(1)
    hard = compress(model, "l1_norm_filter_pruning", p=2, keep=23 / 32).train()
    gone = ~plan_of(hard)["fc1"].rows
    for m, rows in ((copy.train(), zero), (hard, gone)):
        rule = torch.optim.SGD(m.parameters(), lr=0.1)
        rule.zero_grad()
        F.cross_entropy(m(x), y).backward()
        grad = latent(m.fc1).grad[rows].clone()
        rule.step()
        after = m.fc1.weight.detach()[rows]
        assert torch.allclose(after, -0.1 * grad, rtol=0, atol=1e-15) and (grad.any(1).all() if m is copy else not after.any())


def test_sfp_2_behind_a_negative_shift_a_zero_filter_is_dead_for_good():
    """The catalogue's note has batch norm rescue it; with beta = -0.1 the gradients of w, gamma and beta are all exactly 0."""
    for beta, alive in ((-0.1, False), (0.1, True)):
        net, x = two_convolutions()
        net.train()
        with torch.no_grad():
            net[0].weight[[1, 4]] = 0
            net[1].bias.fill_(beta)
        F.cross_entropy(net(x), labelled(x)[1]).backward()
        found = [p.grad[[1, 4]].abs().max().item() for p in (net[0].weight, net[1].weight, net[1].bias)]
        assert (found[0] > 0) is alive and (found[2] > 0) is alive and found[1] == 0


def normed(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))


def changes(model, data, **how):
    """How many filters go or come back between the ends of ten epochs of training, half of them zero at each."""
    copy, sets = compress(model, "soft_filter_pruning", data=(data.train[0].float() / 255, data.train[1]), keep=0.5), []
    layer = next(layer for _, layer, _ in attached(copy))
    fit(copy, data, epochs=10, batch=64, lr=0.1, optimizer=SGD, progress=lambda _: sets.append(~latent(layer).detach().any(1)), **how)
    assert all(s.sum() == len(s) // 2 for s in sets)
    return [int((a != b).sum()) for a, b in itertools.pairwise(sets)]


def test_sfp_3_the_zero_set_changes_while_training_and_settles_late(digits):
    """64-24-10 with batch norm on digits, SGD at 0.1, one-cycle; the first and the last four of nine changes, mean of five seeds."""
    found = np.mean([changes(normed(seed), digits, seed=seed) for seed in SEEDS], axis=0)
    assert found[:4].sum() > 20 and found[-4:].sum() < 0.2 * found[:4].sum()


def test_sfp_3_without_batch_norm_no_filter_comes_back(digits):
    """What makes a zero filter catch up within an epoch is the gradient that batch norm blows up; the plain MLP keeps its first choice."""
    assert sum(sum(changes(build("mlp", "digits", seed), digits, seed=seed)) for seed in range(3)) == 0


def test_sfp_4_removing_nothing_is_ordinary_training(digits):
    dense = build("mlp", "digits")
    copy = compress(dense, "soft_filter_pruning", keep=1.0)
    runs = [fit(m, digits, epochs=2) for m in (copy, dense)]
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]
    assert torch.equal(copy.fc1.weight, dense.fc1.weight)


def test_sfp_5_the_network_without_the_zero_filters_says_the_same(digits):
    copy = compress(load_net("cnn", "digits").double(), "soft_filter_pruning", keep=0.5)
    fit(copy, digits, epochs=1)
    small, x = bake(copy), digits.validation[0][:50]
    assert small.conv1.out_channels == 4 and small.conv2.out_channels == 8
    assert torch.allclose(predict(small, x), predict(copy, x), rtol=0, atol=1e-10)
    left = with_plain_weights(compress(copy, "magnitude_pruning_han", where="fc", keep=1.0))
    with torch.no_grad():  # the batch norms as they were in training: what is removed with the filters did say something
        for name in ("bn1", "bn2"):
            for part in ("weight", "bias"):
                getattr(left.get_submodule(name), part).copy_(copy.get_submodule(name).parametrizations[part].original)
    assert (predict(left, x) - predict(small, x)).abs().max() > 0.5


def test_sfp_6_one_epoch_from_a_trained_network_is_l2_pruning_of_what_that_epoch_left(digits64):
    model = load_net("mlp", "digits").double()
    copy, before = softly(model, digits64, lr=0.03)
    twin = with_plain_weights(copy)
    with torch.no_grad():
        twin.fc1.weight.copy_(before)
    by_norm = plan(twin, "l1_norm_filter_pruning", where="fc1", p=2, keep=23 / 32)["fc1"]
    assert torch.equal(by_norm.dense(), copy.eval().fc1.weight)
    assert not torch.equal(by_norm.rows, ~l2_smallest(model.fc1.weight.detach(), 9))  # not of the weights before it


# network trimming


def shares(net, data, name="0"):
    return gather(net, {name: net.get_submodule(name)}, "zeros", data, samples=len(data[0]))[name]


def test_apoz_1_a_silent_channel_has_apoz_1_and_is_not_missed_and_a_loud_one_has_0():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double().eval()
    x = torch.randn(50, 1, 8, 8, dtype=F64)
    with torch.no_grad():
        net[0].bias[2], net[0].bias[4] = -1e6, 1e6
    found = shares(net, labelled(x))
    assert found[2] == 1 and found[4] == 0 and ((found > 0) & (found < 1)).sum() == 3
    copy = compress(net, "network_trimming_apoz", data=labelled(x), keep=0.8)
    assert plan_of(copy)["0"].rows.tolist() == [True, True, False, True, True]
    small = bake(copy, labelled(x))
    assert small[0].out_channels == 4 and ((small(x) - net(x)).abs() / net(x).abs().max()).max() < 1e-12


def test_apoz_1_a_batch_norm_that_learned_its_statistics_swallows_the_bias():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5, momentum=1.0), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()
    x = torch.randn(50, 1, 8, 8, dtype=F64)
    with torch.no_grad():
        net[0].bias[2] = -1e6
        net.train()(x)
        assert 0.3 < shares(net.eval(), labelled(x))[2] < 0.7
        net[1].bias[2] = -1e6
        assert shares(net, labelled(x))[2] == 1


def test_apoz_2_batches_count_exactly_as_one_pass(monkeypatch):
    net, x = two_convolutions()
    x = torch.randn(50, 2, 8, 8, dtype=F64)
    whole = (net[:3](x) == 0).double().transpose(0, 1).flatten(1)
    for chunk in (1, 7, 32, 50):
        monkeypatch.setattr(channel_evidence, "CHUNK", chunk)
        assert torch.equal(shares(net, labelled(x)), whole.sum(1) / whole.shape[1])


def test_apoz_3_symmetric_pre_activations_are_zero_half_the_time():
    """Independent samples, a dense layer of orthonormal rows on N(0, 1): 0.5 within 3 standard errors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q)
    x = torch.randn(20_000, 8, dtype=F64)
    assert (shares(net, labelled(x)) - 0.5).abs().max() < 3 * 0.5 / math.sqrt(len(x))


def test_apoz_4_scaling_a_channel_up_changes_its_norm_and_not_its_apoz():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4)).double()
    x = torch.randn(30, 1, 8, 8, dtype=F64)
    before, norms = shares(net, labelled(x)), methods.l1_norm_filter_pruning(net[0].weight.detach())
    with torch.no_grad():
        for part in (net[0].weight, net[0].bias):
            part[norms.argmin()] *= 100
    assert torch.equal(shares(net, labelled(x)), before)
    assert methods.l1_norm_filter_pruning(net[0].weight.detach()).argmax() == norms.argmin()


def test_apoz_the_papers_rule_is_a_threshold():
    net, x = two_convolutions()
    x = torch.randn(50, 2, 8, 8, dtype=F64)
    found = shares(net, labelled(x))
    for stds in (0.0, 0.5, 1.0):
        threshold = methods.apoz_threshold(found, stds)
        assert threshold == pytest.approx(1 - np.mean(found.numpy()) - stds * np.std(found.numpy()), abs=1e-12)
        rows = plan(net, "network_trimming_apoz", where="0", data=labelled(x), threshold=threshold)["0"].rows
        assert torch.equal(~rows, found > found.mean() + stds * found.std(correction=0))


# network slimming


def test_slimming_1_a_scales_gradient_gains_the_penaltys(digits64):
    pair = digits64[0][:100], digits64[1][:100]
    model = load_net("cnn", "digits").double()
    with torch.no_grad():
        model.bn1.weight[3] *= -1
    grads = []
    keep = Hook(gradients=lambda m, _: grads.append({n: p.grad.clone() for n, p in m.named_parameters()}))
    once = partial(fit, data=pair, epochs=1, batch=100, lr=0.0, keep_best=False)
    once(build_like(model), hooks=[keep])
    once(build_like(model), hooks=[methods.slimming(0.3), keep])
    for name, plain in grads[0].items():
        gamma = dict(model.named_parameters())[name].detach()
        pull = 0.3 * gamma.sign() if name in ("bn1.weight", "bn2.weight") else 0.0
        assert torch.allclose(grads[1][name], plain + pull, rtol=0, atol=1e-12)


def build_like(model):
    copy = build("cnn", "digits").double()
    copy.load_state_dict(model.state_dict())
    return copy


def test_slimming_1_scales_that_are_held_with_their_filters_are_pulled_too(digits64):
    plain, copy = (compress(load_net("cnn", "digits").double(), "network_slimming", data=digits64, keep=0.5) for _ in range(2))
    once = partial(
        fit, data=(digits64[0][:100], digits64[1][:100]), epochs=1, batch=100, lr=1e-3, optimizer=SGD, schedule="constant", keep_best=False
    )
    once(plain)
    once(copy, hooks=[methods.slimming(10.0)])
    moved = latent(copy.bn1).detach() - latent(plain.bn1).detach()
    assert torch.allclose(moved, -1e-2 * latent(plain.bn1).detach().sign(), rtol=0, atol=1e-12)
    rows = plan_of(copy)["conv1"].rows
    assert (copy.bn1.weight[~rows] == 0).all() and (copy.bn1.weight[rows] != 0).all()


def random_scales(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 15, 3), nn.BatchNorm2d(15), nn.ReLU(), nn.Flatten(),
                        nn.Linear(15 * 16, 4))  # fmt: skip
    for norm, size in ((net[1], 1.0), (net[4], 0.6)):
        norm.weight.data = size * torch.randn(len(norm.weight))
    return net.eval(), labelled(torch.rand(6, 1, 8, 8))


def test_slimming_2_keeps_what_a_global_percentile_and_torch_pruning_keep():
    """12 of 24 go. Torch-Pruning without its normalizer (by default it divides by the layer's mean and keeps others)."""
    others = 0
    for seed in range(10):
        net, data = random_scales(seed)
        made = plan(net, "network_slimming", data=data, keep=0.5)
        gamma = torch.cat([net[1].weight, net[4].weight]).detach().abs()
        rows = torch.cat([made["0"].rows, made["3"].rows])
        assert rows.sum() == 12 and torch.equal(rows, gamma >= gamma.sort().values[12])
        authors = gamma.gt(gamma.sort().values[int(24 * 0.5)])  # their percentile removes one channel more
        assert authors.sum() == 11 and (rows & ~authors).sum() == 1 and not (authors & ~rows).any()
        for normalizer, same in ((None, True), ("mean", False)):
            how = torch_pruning.importance.BNScaleImportance(normalizer=normalizer)
            scores = torch.cat([importance(how, net, layer, data[0]) for layer in (net[0], net[3])])
            kept = ~torch.isin(torch.arange(24), scores.argsort()[:12])
            if same:
                assert torch.equal(kept, rows)
            else:
                others += not torch.equal(kept, rows)
    assert others > 5


def test_slimming_3_a_channel_without_scale_and_shift_leaves_no_trace():
    net, x = two_convolutions()
    with torch.no_grad():
        net[1].weight[[0, 5]] = net[1].bias[[0, 5]] = 0
    copy = compress(net, "network_slimming", data=labelled(x), keep=4 / 6)
    assert plan_of(copy)["0"].rows.tolist() == [False, True, True, True, True, False]
    small = bake(copy, labelled(x))
    assert small[0].out_channels == 4 and torch.allclose(small(x), net(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 1])
def test_slimming_3_with_a_shift_it_must_be_folded_and_padding_spoils_that_at_the_border(padding):
    """The check says that removal fails wherever beta != 0: a negative one is behind the ReLU and leaves no trace at all."""
    for beta in (0.5, -0.5):
        net, x = two_convolutions(padding)
        with torch.no_grad():
            net[1].weight[[0, 5]], net[1].bias[[0, 5]] = 0.0, beta
            whole, cut, put = (m[:4](x) for m in (net, without(net, [0, 5]), folded(net, [0, 5])))
        inner = slice(1, -1) if padding else slice(None)
        assert torch.allclose(put[..., inner, inner], whole[..., inner, inner], rtol=0, atol=1e-10)
        assert bool((cut - whole).abs().max() > 1e-2) is (beta > 0)
        assert bool((put - whole).abs().max() > 1e-2) is (beta > 0 and padding == 1)


def test_slimming_4_without_a_penalty_it_is_ordinary_training(digits):
    plain, hooked = normed(0), normed(0)
    runs = [fit(plain, digits, epochs=2), fit(hooked, digits, epochs=2, hooks=[methods.slimming(0.0)])]
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), hooked.parameters(), strict=True))


def test_slimming_4_the_more_penalty_the_more_scales_vanish(digits):
    """64-24-10 with batch norm, 8 epochs of SGD at 1, one-cycle; the share of |gamma| < 0.01, mean of five seeds. At small penalties it is none."""
    share = []
    for lam in (0.001, 0.03, 0.1):
        nets = [normed(seed) for seed in SEEDS]
        for seed, net in enumerate(nets):
            fit(net, digits, epochs=8, lr=1.0, batch=64, optimizer=SGD, seed=seed, keep_best=False, hooks=[methods.slimming(lam)])
        share.append(np.mean([(net[2].weight.abs() < 0.01).double().mean().item() for net in nets]))
    assert share[0] <= share[1] <= share[2] and share[0] < 0.02 and share[2] > 0.2


def test_slimming_5_no_layer_becomes_empty():
    net, data = random_scales(0)
    with torch.no_grad():
        net[4].weight *= 1e-3
    with pytest.warns(UserWarning, match="would keep none of its 15 channels; its best one stays"):
        made = plan(net, "network_slimming", data=data, keep=0.3)
    assert made["3"].rows.nonzero().flatten().tolist() == [net[4].weight.abs().argmax().item()]


# ThiNet


def contributions(n=60, c=8, seed=0, dtype=F64):
    """What ReLU channels add: correlated, some cancelling."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, generator=draw, dtype=dtype).relu() * torch.randn(c, generator=draw, dtype=dtype)
    return x + 0.3 * torch.randn(n, 1, generator=draw, dtype=dtype)


def energy(x, subset):
    return x[:, list(subset)].sum(1).square().sum().item()


def test_thinet_1_the_contributions_add_up_to_the_next_layers_output():
    """A kernel as large as its map has one output position, so the samples are the images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 6), nn.Flatten(), nn.Linear(7, 3)).double()
    data = labelled(torch.rand(40, 1, 8, 8, dtype=F64))
    found = {n: gather(net, {"0": net[0]}, n, data)["0"] for n in ("next_acts_in", "next_w")}
    x = methods.contributions(**found)
    drawn = torch.randint(7, (40,), generator=torch.Generator().manual_seed(0))
    true = (net[:3](data[0])[:, :, 0, 0] - net[2].bias)[torch.arange(40), drawn]
    assert x.shape == (40, 5) and torch.allclose(x.sum(1), true, rtol=0, atol=1e-6)


def test_thinet_2_greedy_lies_between_the_best_subset_and_the_average_one():
    """20 problems of 8 channels, 4 to remove. That it is no worse than the average is an ordering on these, no theorem (next test)."""
    for seed in range(20):
        x = contributions(seed=seed)
        greedy = energy(x, (methods.removal_order(x) < 4).nonzero().flatten())
        every = [energy(x, s) for s in itertools.combinations(range(8), 4)]
        assert min(every) <= greedy * (1 + 1e-12) and greedy <= np.mean(every)
        orthogonal = torch.linalg.qr(x).Q * x.norm(dim=0)
        greedy = energy(orthogonal, (methods.removal_order(orthogonal) < 4).nonzero().flatten())
        assert greedy == pytest.approx(min(energy(orthogonal, s) for s in itertools.combinations(range(8), 4)), abs=1e-10)


def test_thinet_2_greedy_can_be_worse_than_a_random_subset():
    """Contributions (1, 0), (0, 1.1), (0, -1.1), two to remove: greedy takes the small one first and then cannot cancel."""
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.1, -1.1]], dtype=F64)
    greedy = energy(x, (methods.removal_order(x) < 2).nonzero().flatten())
    every = [energy(x, s) for s in itertools.combinations(range(3), 2)]
    assert greedy == pytest.approx(2.21) and np.mean(every) == pytest.approx(1.4733, abs=1e-4) and min(every) == 0


def test_thinet_3_a_channel_that_adds_nothing_goes_first_and_free():
    torch.manual_seed(0)
    acts, w = torch.rand(50, 6, 9, dtype=F64), torch.randn(4, 6, 9, dtype=F64)
    w[:, 4] = 0
    assert methods.thinet(acts, w).argmin() == 4 and energy(methods.contributions(acts, w), [4]) == 0


def test_thinet_4_the_scales_are_least_squares_and_never_worse_than_ones():
    torch.manual_seed(0)
    rows = torch.tensor([True, False, True, True, False, True])
    for _ in range(20):
        acts, w = torch.rand(50, 6, 9, dtype=F64), torch.randn(4, 6, 9, dtype=F64)
        x = methods.contributions(acts, w).numpy()
        new = methods.thinet.rebuild(rows, acts, w, rescale="on")
        scale = np.linalg.lstsq(x[:, rows], x.sum(1), rcond=None)[0]
        assert torch.allclose(new[:, rows], w[:, rows] * torch.from_numpy(scale)[None, :, None], rtol=0, atol=1e-10) and not new[:, ~rows].any()
        error = lambda a, x=x: ((x.sum(1) - x[:, rows] @ a) ** 2).sum()  # noqa: E731
        assert error(scale) <= error(np.ones(4))
        assert torch.equal(methods.thinet.rebuild(rows, acts, w, rescale="off"), w * rows[:, None])


def test_thinet_5_keeping_all_changes_nothing():
    net, x = two_convolutions()
    copy = compress(net, "thinet", data=labelled(x), keep=1.0)
    assert torch.allclose(copy(x), net(x), rtol=0, atol=1e-10)


def test_thinet_6_the_incremental_order_is_the_one_found_by_computing_every_error_anew():
    for seed in range(10):
        x, removed = contributions(c=10, seed=seed), []
        while len(removed) < 10:
            removed.append(min(set(range(10)) - set(removed), key=lambda c: energy(x, [*removed, c])))
        assert methods.removal_order(x).argsort().tolist() == removed


# channel pruning by the lasso


def layer_pair(seed=0, samples=300, c=6, k=3, outputs=5):
    """What a next layer reads and its weight: (samples, channels, k), (outputs, channels, k)."""
    draw = torch.Generator().manual_seed(seed)
    acts = (torch.randn(samples, c, k, generator=draw, dtype=F64) + 0.5 * torch.randn(samples, 1, 1, generator=draw, dtype=F64)).relu()
    return acts, torch.randn(outputs, c, k, generator=draw, dtype=F64)


def output(acts, w):
    return torch.einsum("sck,ock->so", acts, w)


def regressors(acts, w):
    """vec(X_i W_i^T) with ||W_i||_F = 1 as columns, and vec(Y)."""
    unit = w / torch.linalg.vector_norm(w, dim=(0, 2)).clamp(min=1e-300)[:, None]
    return torch.einsum("sck,ock->soc", acts, unit).flatten(0, 1), output(acts, w).flatten()


def mse(acts, w, y):
    return (output(acts, w) - y).square().mean().item()


@pytest.mark.parametrize("own", [True, False], ids=["what the layer makes", "another target"])
def test_cp_1_the_coefficients_are_sklearns(own):
    """The paper divides by N, sklearn by the N outputs rows of the stacked regression: alpha = lambda / outputs."""
    for seed in range(3):
        acts, w = layer_pair(seed)
        z, y = regressors(acts, w)
        other = () if own else (y.reshape(len(acts), -1) + torch.randn(len(acts), len(w), dtype=F64),)
        y = y if own else other[0].flatten()
        gram, target = methods.lasso_problem(acts, w, *other)
        assert torch.allclose(gram, z.T @ z / len(acts), rtol=0, atol=1e-10) and torch.allclose(target, z.T @ y / len(acts), rtol=0, atol=1e-10)
        for share in (0.5, 0.05, 0.001):
            lam = share * target.abs().max().item()
            expected = Lasso(alpha=lam / w.shape[0], fit_intercept=False, tol=1e-10, max_iter=100_000).fit(z, y).coef_
            found = methods.coordinate_descent(gram, target, torch.tensor([lam], dtype=F64), 100_000, 1e-12)[:, 0]
            assert np.abs(found.numpy() - expected).max() < 1e-6
            assert np.abs(methods.lasso(z, y, lam / w.shape[0]).numpy() - expected).max() < 1e-6


def test_cp_1_channels_come_in_as_along_sklearns_path():
    """Bisecting lambda for every c': sklearn's c' non-zero channels are the c' that stay here (doubling it would pass some c' by)."""
    for seed in range(3):
        acts, w = layer_pair(seed, c=8)
        z, y = (t.numpy() for t in regressors(acts, w))
        score = methods.lasso_channel_pruning(acts, w).numpy()
        support = lambda a, z=z, y=y: np.flatnonzero(Lasso(alpha=a, fit_intercept=False, tol=1e-8, max_iter=10_000).fit(z, y).coef_)  # noqa: E731
        for count in range(1, 8):
            low, high = 1e-6, np.abs(z.T @ y).max() / len(z)
            for _ in range(40):
                middle = math.sqrt(low * high)
                found = support(middle)
                if len(found) == count:
                    break
                low, high = (middle, high) if len(found) > count else (low, middle)
            assert set(found) == set((-score).argsort()[:count])


def test_cp_2_the_refitted_weight_is_least_squares_and_never_worse():
    acts, w = layer_pair()
    y = output(acts, w)
    for rows in map(torch.tensor, ([True] * 3 + [False] * 3, [False, True] * 3)):
        new = methods.lasso_channel_pruning.rebuild(rows, acts, w)
        expected = np.linalg.lstsq(acts[:, rows].flatten(1).numpy(), y.numpy(), rcond=None)[0]
        assert np.abs(new[:, rows].flatten(1).T.numpy() - expected).max() < 1e-6 and not new[:, ~rows].any()
        beta = torch.rand(6, dtype=F64) * rows
        assert mse(acts, new, y) <= min(mse(acts, w * rows[:, None], y), mse(acts, w * beta[:, None], y))


def test_cp_3_channels_that_the_next_layer_does_not_read_go():
    """Planted by W_i = 0. (Planting them in Y, with other W_i, is another problem, which the lasso need not solve.)"""
    for seed in range(20):
        acts, w = layer_pair(seed)
        gone = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:3]
        w[:, gone] = 0
        rows = select(methods.lasso_channel_pruning(acts, w)[:, None], 0.5)[:, 0]
        assert not rows[gone].any() and rows.sum() == 3
        assert mse(acts, methods.lasso_channel_pruning.rebuild(rows, acts, w), output(acts, w)) < 1e-10


def test_cp_4_keeping_all_changes_nothing():
    acts, w = layer_pair()
    new = methods.lasso_channel_pruning.rebuild(torch.ones(6, dtype=torch.bool), acts, w)
    assert torch.allclose(new, w, rtol=0, atol=1e-10) and mse(acts, new, output(acts, w)) < 1e-20
    acts[:, 3] = 2 * acts[:, 1]  # where X leaves W' open, W itself stays
    assert torch.allclose(methods.lasso_channel_pruning.rebuild(torch.ones(6, dtype=torch.bool), acts, w), w, rtol=0, atol=1e-6)


def test_cp_5_of_proportional_contributions_one_is_enough_and_the_norm_does_not_see_it():
    for seed in range(10):
        acts, w = layer_pair(seed)
        acts[:, 3:], w[:, 3:] = 2 * acts[:, :3], 0.7 * w[:, :3]
        w[:, [0, 3]] *= 3  # the norm would keep both of this pair
        y = output(acts, w)
        rows = select(methods.lasso_channel_pruning(acts, w)[:, None], 0.5)[:, 0]
        assert mse(acts, methods.lasso_channel_pruning.rebuild(rows, acts, w), y) < 1e-10 * y.square().mean()
        by_norm = select(w.abs().sum((0, 2))[:, None], 0.5)[:, 0]
        assert mse(acts, methods.lasso_channel_pruning.rebuild(by_norm, acts, w), y) > 1e-3 * y.square().mean()


def test_cp_5_dependent_maps_with_other_weights_are_not_enough():
    """X dependent alone: channel 3's map is channel 0's, but its weight is its own, so the lasso may keep both and lose another."""
    lost = 0
    for seed in range(20):
        acts, w = layer_pair(seed)
        acts[:, 3:] = acts[:, :3]
        rows = select(methods.lasso_channel_pruning(acts, w)[:, None], 0.5)[:, 0]
        y = output(acts, w)
        lost += mse(acts, methods.lasso_channel_pruning.rebuild(rows, acts, w), y) > 1e-6 * y.square().mean()
    assert 0 < lost < 20


def test_cp_6_the_second_layer_is_better_fitted_to_the_original_outputs():
    """Three dense layers 12-10-10-4 with ReLUs, half of both hidden layers gone, one after the other; error of the network's output on new inputs."""
    ratio = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        first, second, third = torch.randn(10, 12, dtype=F64), torch.randn(10, 10, dtype=F64), torch.randn(4, 10, dtype=F64)
        x, fresh = torch.randn(2, 400, 12, dtype=F64)
        hidden = (x @ first.T).relu()
        keep = select(methods.lasso_channel_pruning(hidden[:, :, None], second[:, :, None])[:, None], 0.5)[:, 0]
        new_second = methods.lasso_channel_pruning.rebuild(keep, hidden[:, :, None], second[:, :, None])[:, :, 0]
        whole, pruned = (hidden @ second.T).relu(), (hidden @ new_second.T).relu()
        stay = select(methods.lasso_channel_pruning(pruned[:, :, None], third[:, :, None])[:, None], 0.5)[:, 0]
        errors = []
        for target in (whole @ third.T, pruned @ third.T):  # the original Y, and the pruned network's own
            w = torch.linalg.lstsq(pruned[:, stay], target).solution
            found = ((fresh @ first.T).relu() @ new_second.T).relu()[:, stay] @ w
            errors.append((found - ((fresh @ first.T).relu() @ second.T).relu() @ third.T).square().mean().item())
        ratio.append(errors[0] / errors[1])
    assert np.mean(ratio) < 1


def test_cp_6_a_whole_network_is_better_fitted_to_the_original_outputs_too(digits):
    """Both fitted layer after layer: the three CNNs on digits that ship, 3 of 8 and 6 of 16 filters kept; squared error of the outputs on the
    validation images, the one over the other, mean."""
    ratio = []
    for seed in range(3):
        net, keeps = load_net("cnn", "digits", seed), {"conv1": 0.4, "conv2": 0.4}
        own, original = prune_in_order(net, "lasso_channel_pruning", keeps, digits), rebuild_in_order(net, keeps, digits)
        own, original, true = (predict(m, digits.validation[0]) for m in (own, original, net))
        ratio.append(((original - true).square().mean() / (own - true).square().mean()).item())
    assert np.mean(ratio) < 0.95


# Taylor expansion


def test_taylor_1_is_the_gradient_at_a_gate_of_each_example(digits64):
    """Positions M times mean of |mean over positions of z dC/dz| is the mean of |dC/dg|; one gate for all examples is another number."""
    x, y = digits64[0][:60], digits64[1][:60]
    net = stirred(build("cnn", "digits"))
    found = gather(net, {"conv1": net.conv1}, "flow", (x, y))["conv1"]
    gates = torch.ones(60, 8, dtype=F64, requires_grad=True)
    z = net.relu1(net.bn1(net.conv1(x)))
    cost = F.cross_entropy(net[3:](z * gates[:, :, None, None]), y, reduction="sum")
    slopes = torch.autograd.grad(cost, gates)[0]
    assert torch.allclose(found * z[0, 0].numel(), slopes.abs().mean(0), rtol=0, atol=1e-12)
    assert (slopes.mean(0).abs() < 0.8 * slopes.abs().mean(0)).any()


def test_taylor_2_is_exact_where_the_cost_is_linear():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(180, 1)).double()
    x, y = torch.randn(20, 1, 8, 8, dtype=F64), torch.zeros(20, dtype=torch.int64)
    total = lambda z, _: z.sum() / len(z)  # noqa: E731
    found = gather(net, {"0": net[0]}, "flow", (x, y), total)["0"]
    z = net[0](x).detach()
    for c in range(5):
        without_c = z * (torch.arange(5) != c)[:, None, None]
        change = (net[1:](without_c) - net[1:](z))[:, 0]
        assert found[c].item() * 36 == pytest.approx(change.abs().mean().item(), rel=1e-10)


def test_taylor_3_ranks_like_leaving_each_map_out_better_than_norm_and_apoz(digits):
    """CNN on digits, 6 epochs, the rise of the loss when one of its 8 + 16 maps goes; Spearman within layers, mean of five seeds."""
    ranks = {"taylor_pruning": [], "l1_norm_filter_pruning": [], "network_trimming_apoz": []}
    for seed in SEEDS:
        net = build("cnn", "digits", seed)
        fit(net, digits, epochs=6, lr=1e-2, seed=seed)
        x, y = digits.train[0][:400].float() / 255, digits.train[1][:400]
        for name, norm, rest in (("conv1", 1, 2), ("conv2", 4, 5)):
            with torch.no_grad():
                maps = net[: norm + 1](x)
                loss = lambda m, n=net, r=rest, y=y: F.cross_entropy(n[r:](m), y).item()  # noqa: E731
                count = maps.shape[1]
                oracle = [abs(loss(maps * (torch.arange(count) != c)[:, None, None]) - loss(maps)) for c in range(count)]
            layer, w = {name: net.get_submodule(name)}, net.get_submodule(name).weight.detach()
            scores = {
                "taylor_pruning": methods.taylor_pruning(gather(net, layer, "flow", (x, y))[name]),
                "l1_norm_filter_pruning": methods.l1_norm_filter_pruning(w, p=2),
                "network_trimming_apoz": methods.network_trimming_apoz(gather(net, layer, "zeros", (x, y))[name]),
            }
            for key, s in scores.items():
                ranks[key].append(spearmanr(s.numpy(), oracle).statistic)
    mean = {k: np.mean(v) for k, v in ranks.items()}
    assert mean["taylor_pruning"] > mean["l1_norm_filter_pruning"] and mean["taylor_pruning"] > mean["network_trimming_apoz"]


def test_taylor_4_summed_over_the_batch_it_is_the_weights_form_and_torch_prunings():
    """Euler: sum over a filter of w dL/dw = sum over batch and positions of z dL/dz of its own output, bias-free; before the ReLU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    x, y = labelled(torch.randn(12, 2, 8, 8, dtype=F64))
    z = net[0](x)
    z.retain_grad()
    F.cross_entropy(net[1:](z), y).backward()
    w = net[0].weight
    by_weight, by_map = (w * w.grad).sum((1, 2, 3)), (z * z.grad).sum((0, 2, 3))
    assert torch.allclose(by_weight, by_map, rtol=0, atol=1e-14)
    how = partial(torch_pruning.importance.TaylorImportance, group_reduction="first", normalizer=None)
    theirs = importance(how(multivariable=True), net, net[0], x)
    assert torch.allclose(theirs.double(), by_map.detach().abs(), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(importance(how(multivariable=False), net, net[0], x).double(), by_map.detach().abs(), rtol=0.1)


def test_taylor_layers_are_compared_after_normalising():
    flow = torch.rand(7, dtype=F64)
    assert methods.taylor_pruning(flow).norm().item() == pytest.approx(1) and torch.equal(methods.taylor_pruning(flow, normalise="off"), flow)
    assert torch.equal(methods.taylor_pruning(torch.zeros(4)), torch.zeros(4))


# ADMM


SETS = {  # the groups of flat indices that a constraint counts, for a weight of shape (2, 3, 1, 2)
    "weight": [[i] for i in range(12)],
    "filter": [list(range(6 * n, 6 * n + 6)) for n in range(2)],
    "channel": [[6 * n + 2 * c + k for n in range(2) for k in range(2)] for c in range(3)],
    "shape": [[j, 6 + j] for j in range(6)],
}


@pytest.mark.parametrize("constraint", SETS)
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 1.0])
def test_admm_1_the_projection_is_the_nearest_point_of_the_set(constraint, keep):
    groups = SETS[constraint]
    count = max(1, len(groups) - round((1 - keep) * len(groups)))
    for seed in range(3):
        w = torch.randn(2, 3, 1, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)
        found = methods.nearest(w, keep, constraint)
        best = None
        for chosen in itertools.combinations(groups, count):
            stays = torch.zeros(12, dtype=torch.bool)
            stays[[i for g in chosen for i in g]] = True
            point = torch.where(stays.reshape(w.shape), w, 0.0)
            if best is None or (point - w).norm() < (best - w).norm():
                best = point
        assert torch.equal(found, best)


def stepping(w, **knobs):
    """An ADMM layer whose Z and U stand still."""
    model = learner("admm_weight_pruning", w, every=0, **knobs)
    between = model[0].parametrizations.weight[0]
    between.z.copy_(torch.randn_like(w))
    between.u.copy_(torch.randn_like(w))
    return model, between.z.clone(), between.u.clone()


def test_admm_2_the_step_in_w_is_the_closed_form():
    """Full-batch gradient descent; in mini-batches it stalls at their noise."""
    x, y = linreg()
    model, z, u = stepping(torch.randn(1, 6, dtype=F64), rho=0.5)
    fit(model, (x, y), epochs=300, batch=60, lr=0.3, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    h = x.T @ x / 60 + 0.5 * torch.eye(6, dtype=F64)
    expected = torch.linalg.solve(h, x.T @ y / 60 + 0.5 * (z - u).T).T
    assert (latent(model[0]) - expected).abs().max() < 1e-10
    model, *_ = stepping(torch.randn(1, 6, dtype=F64), rho=0.5)
    assert (expected - latent(model[0])).abs().max() > 0.1


def test_admm_3_with_soft_thresholding_for_the_projection_it_ends_at_the_lasso(monkeypatch):
    """rho = 1, 120 iterations, the step in W solved from the penalty that the method states: the signs of U are right."""
    x, y = linreg(d=8)
    lam = 0.4
    monkeypatch.setattr(methods, "nearest", lambda v, keep, constraint: v.sign() * (v.abs() - lam).clamp(min=0))
    w, state = torch.zeros(1, 8, dtype=F64), None
    h, target = x.T @ x / 60 + torch.eye(8, dtype=F64), (x.T @ y / 60).T
    for _ in range(120):
        packed = methods.admm_weight_pruning(w, True, rho=1.0, growth=1.0, every=1, state=state)
        state = packed.state
        v = torch.zeros(1, 8, dtype=F64, requires_grad=True)
        pull = methods.admm_weight_pruning.training.penalty(type(packed)(v, packed.mask, state=state))
        pulled = torch.autograd.grad(pull, v)[0]  # rho (0 - Z + U), so that W solves (H + rho) W = target - pulled
        w = torch.linalg.solve(h, (target - pulled).T).T
    expected = Lasso(alpha=lam, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y[:, 0]).coef_
    assert np.abs(w[0].numpy() - expected).max() < 1e-6 and np.abs(state["z"][0].numpy() - expected).max() < 1e-6


def gap(model):
    """||W - Z|| / ||W|| over all layers, Z the projection."""
    pairs = [(latent(layer).detach(), a) for _, layer, a in attached(model)]
    apart = sum((w - a.packed(w).dense()).square().sum() for w, a in pairs)
    return (apart / sum(w.square().sum() for w, _ in pairs)).sqrt().item()


@pytest.fixture(scope="module")
def trained(digits):
    """Five MLPs trained on digits."""
    found = [build("mlp", "digits", seed) for seed in SEEDS]
    for seed, net in enumerate(found):
        fit(net, digits, epochs=10, lr=1e-2, seed=seed)
    return found


ADMM = {"epochs": 12, "lr": 0.1, "batch": 64, "optimizer": partial(torch.optim.SGD, momentum=0.9), "keep_best": False}


def test_admm_4_w_comes_near_z_where_rho_grows_and_the_mask_is_exact(digits, trained):
    """MLP on digits, 90 % gone, 12 epochs of SGD at 0.1, momentum 0.9, 12 updates, rho 1e-3 x 2.2^k. The check's 1 % at constant rho is far off."""
    for growth, near in ((2.2, True), (1.0, False)):
        copy = compress(trained[0], "admm_weight_pruning", keep=0.1, growth=growth, every=17)
        fit(copy, digits, **ADMM)
        for packed in plan_of(copy).values():
            assert packed.kept == packed.mask.numel() - round(0.9 * packed.mask.numel())
        assert (gap(copy) < 0.05) is near and (gap(copy) > 0.5) is not near


def test_admm_5_with_nothing_to_remove_z_is_w_and_u_is_zero(digits, trained):
    copy = compress(trained[0], "admm_weight_pruning", keep=1.0, every=1)
    between = copy.fc1.parametrizations.weight[0]
    assert torch.equal(between.z, latent(copy.fc1)) and not between.u.any()
    fit(copy, digits, epochs=1)
    assert not between.u.any() and between.rest["step"] == len(digits.train[1]) // 128 + 1


def test_admm_6_pruning_after_admm_loses_less_than_pruning_the_dense_network(digits, trained):
    """MLP on digits, 95 % gone and nothing retrained; the dense ones had the same extra epochs; mean of five seeds."""
    found = []
    for seed, net in enumerate(trained):
        copy, control = compress(net, "admm_weight_pruning", keep=0.05, every=17), build("mlp", "digits", seed)
        control.load_state_dict(net.state_dict())
        for model in (copy, control):
            fit(model, digits, seed=seed, **ADMM)
        found.append([evaluate(copy, digits), evaluate(compress(control, "magnitude_pruning_han", keep=0.05), digits)])
    admm, dense = np.mean(found, axis=0)
    assert admm > dense + 0.05


def test_admm_the_dual_is_rescaled_with_rho_and_a_step_counts_once(digits64):
    w = torch.randn(3, 4, dtype=F64)
    state = {"z": torch.zeros_like(w), "u": torch.ones_like(w), "rho": 0.1, "step": 0}
    after = methods.admm_weight_pruning(w, True, keep=0.5, growth=2.0, every=1, state=state).state
    z = methods.nearest(w + 1, 0.5)
    assert torch.equal(after["z"], z) and torch.allclose(0.2 * after["u"], 0.1 * (1 + w - z), rtol=0, atol=1e-15) and after["rho"] == 0.2
    for rho in (0.6, 1.0, 3.0):  # it grows to 1, and one that is higher stays
        top = methods.admm_weight_pruning(w, True, keep=0.5, growth=2.0, every=1, state={**state, "rho": rho}).state
        assert top["rho"] == max(1, rho) and torch.allclose(top["rho"] * top["u"], rho * (1 + w - z), rtol=0, atol=1e-14)
    copy = compress(load_net("mlp", "digits").double(), "admm_weight_pruning", every=3)
    fit(copy, digits64, epochs=1, batch=200, keep_best=False)  # the penalty looks at the state and does not move it
    assert [a.rest["step"] for _, _, a in attached(copy)] == [-(-len(digits64[1]) // 200)] * 2


# all nine on the residual network


@pytest.fixture(scope="module")
def fashion():
    return load_data("fashion_mnist")


@pytest.mark.parametrize("key", KEYS)
def test_every_method_shrinks_the_residual_network_and_the_small_one_says_the_same(key, fashion):
    model = load_net("resnet", "fashion_mnist")
    if key == "structured_sparsity_learning":
        with torch.no_grad():  # as if learned: the weaker half of the filters at zero
            for layer in weighted(model).values():
                if layer is not model.fc:
                    norms = methods.group_norms(layer.weight, "filter")
                    layer.weight *= norms > norms.median()
    knobs = {"constraint": "filter"} if key == "admm_weight_pruning" else {}
    copy = compress(model, key, data=fashion, **knobs, **({"keep": 0.5} if "keep" in catalog()[key].knobs else {}))
    small = bake(copy)
    x = fashion.validation[0][:64]
    masked, baked_ = predict(copy, x), predict(small, x)
    assert (masked - baked_).abs().max() <= 1e-5 * masked.abs().max()
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())


def test_the_nine_are_there():
    assert len(KEYS) == 9


@pytest.mark.parametrize("key, knobs", [("structured_sparsity_learning", {"lambda_g": 0.1}), ("soft_filter_pruning", {}),
                                        ("admm_weight_pruning", {"constraint": "filter", "keep": 0.5})])  # fmt: skip
def test_what_learns_which_filters_go_leaves_batch_norm_alone_while_it_trains(key, knobs, digits):
    copy = compress(load_net("cnn", "digits"), key, **knobs)
    if key == "structured_sparsity_learning":
        with torch.no_grad():
            latent(copy.conv1)[2:4] = 0
    gone = ~plan_of(copy)["conv1"].rows
    assert gone.any() and (copy.eval().bn1.weight[gone] == 0).all() and (copy.bn1.bias[gone] == 0).all()
    assert (copy.train().bn1.weight[gone] != 0).all()
    assert attached_hooks(copy) or key == "admm_weight_pruning"
