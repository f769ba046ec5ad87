"""What proves the methods of chapter 02 right: identities, closed forms and well-kept libraries, a test a claim.

linreg: L(w) = ||Xw - y||^2 / (2N), Gaussian X, float64. MLP: 64-32-10 on the 8 by 8 digits. Orderings hold on the mean over the
seeds named in the test, with the sizes, noise and steps that stand there.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn.utils import prune as reference

from cmlib.core.apply import apply_weight, attach, attached, latent, plan_of, weighted, with_plain_weights
from cmlib.core.packed import Masked
from cmlib.core.planner import gather
from cmlib.core.select import select
from cmlib.core.training import Hook
from cmlib.lab.train import evaluate, fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build
from cmlib.methods import prune as methods

F64 = torch.float64
SGD = partial(torch.optim.SGD, momentum=0.0)

MUTATIONS = [
    ("random_pruning", "cmlib/methods/prune.py", "manual_seed(seed)).to(w)", "manual_seed(seed)).to(w) * w.abs()",
     "large weights are likelier to stay"),
    ("magnitude_pruning_han", "cmlib/methods/prune.py", "return w.abs()\n", "return w\n", "negative weights count as small"),
    ("optimal_brain_damage", "cmlib/methods/prune.py", "0.5 * hess_diag * w**2", "0.5 * hess_diag * w.abs()", "the square is missing"),
    ("optimal_brain_surgeon", "cmlib/methods/prune.py", "cost = (w**2 / (2 * inverse.diagonal()))", "cost = (w**2 * inverse.diagonal() / 2)",
     "times the inverse's diagonal, which divides"),
    ("optimal_brain_surgeon", "cmlib/methods/prune.py", "w -= column * (w[q] / pivot)", "w += column * (w[q] / pivot)",
     "the others move the wrong way"),
    ("layerwise_obs", "cmlib/methods/prune.py", "rows**2 / (2 * inverse.diagonal(dim1=1, dim2=2)[:, None])",
     "rows**2 * h.diagonal(dim1=1, dim2=2)[:, None] / 2", "the Hessian's diagonal and not the inverse's: what OBD takes"),
    ("layerwise_obs", "cmlib/methods/prune.py", "keep * (w + torch.zeros_like(w)", "keep * (w - torch.zeros_like(w)",
     "what stays moves the wrong way"),
    ("snip", "cmlib/methods/prune.py", "s = (w * grad).abs()", "s = grad.abs()", "the derivative for the weight and not for its gate"),
    ("l1_weight_regularization", "cmlib/methods/prune.py", "soft_threshold(w, lr * lam)", "soft_threshold(w, lam)", "the threshold forgets the rate"),
    ("dynamic_network_surgery", "cmlib/methods/prune.py", "(w.abs() >= high) | (mask & (w.abs() >= low))",
     "(w.abs() >= low) | (mask & (w.abs() >= high))", "the two thresholds change places"),
    ("sparse_variational_dropout", "cmlib/methods/prune.py", "-1.87320 - 1.48695 * log_alpha", "-1.87320 + 1.48695 * log_alpha",
     "the sign of the slope in the KL"),
    ("sparse_variational_dropout", "cmlib/methods/prune.py", "log_sigma2 - (w**2 + 1e-16).log()", "log_sigma2 - (w.abs() + 1e-16).log()",
     "the square is missing in alpha"),
    ("l0_hard_concrete", "cmlib/methods/prune.py", "torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta))",
     "torch.sigmoid(log_alpha + beta * math.log(-gamma / zeta))", "the wrong sign in the chance that a gate is open"),
]  # fmt: skip


def linreg(n=60, d=6, *, seed=0, noise=0.1, true=None, mix=0.0):
    """X (n, d) with columns correlated by ``mix``, y (n, 1) = X true + noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=F64) + mix * torch.randn(n, 1, generator=draw, dtype=F64)
    true = torch.randn(d, 1, generator=draw, dtype=F64) if true is None else true
    return x, x @ true + noise * torch.randn(n, true.shape[1], generator=draw, dtype=F64)


def half_mse(z, y):
    """Half the mean over examples of the squared error, summed over outputs (each an independent regression)."""
    return (z - y).square().sum(1).mean() / 2


def line(w):
    """A dense layer without bias that computes X w; w (d, outputs)."""
    layer = nn.Linear(*w.shape, bias=False).double().eval()
    with torch.no_grad():
        layer.weight.copy_(w.T)
    return nn.Sequential(layer)


def optimum(x, y):
    return torch.linalg.lstsq(x, y).solution


def loss_of(x, y, w):
    return half_mse(x @ w.reshape(-1, 1), y).item()


def hessian_of(x):
    return x.T @ x / len(x)


# optimal brain damage


@pytest.mark.parametrize("mix", [0.0, 1.5])
def test_obd_1_the_diagonal_is_exact_on_linreg(mix):
    x, y = linreg(mix=mix)
    model = line(torch.randn(6, 1, dtype=F64))
    h = gather(model, weighted(model), "hess_diag", (x, y), half_mse)["0"]
    whole = torch.autograd.functional.hessian(lambda w: half_mse(x @ w[:, None], y), torch.zeros(6, dtype=F64))
    assert torch.allclose(h[0], hessian_of(x).diagonal(), rtol=0, atol=1e-12)
    assert torch.allclose(h[0], whole.diagonal(), rtol=0, atol=1e-12)


def test_obd_2_with_orthogonal_columns_any_deletion_costs_the_sum_of_its_saliencies():
    x, y = linreg()
    x = torch.linalg.qr(x).Q * torch.arange(1, 7, dtype=F64)
    w = optimum(x, y)
    model = line(w)
    s = methods.optimal_brain_damage(w.flatten(), gather(model, weighted(model), "hess_diag", (x, y), half_mse)["0"][0])
    for kept in itertools.product([0.0, 1.0], repeat=6):
        kept = torch.tensor(kept, dtype=F64)
        rise = loss_of(x, y, w.flatten() * kept) - loss_of(x, y, w)
        assert abs(rise - (s * (1 - kept)).sum()) < 1e-10


def test_obd_3_a_hessian_of_ones_ranks_by_magnitude():
    w = torch.randn(12, 10)
    mask = select(methods.optimal_brain_damage(w, torch.ones_like(w)), 0.3)
    pruner = reference.L1Unstructured(amount=0.7)
    assert torch.equal(mask, pruner.compute_mask(w, torch.ones_like(w)).bool())


def test_obd_4_deletes_the_large_weight_that_does_not_matter_first_and_magnitude_last():
    x, _ = linreg(n=400, d=8, seed=1)
    x[:, 3] *= 0.01
    true = torch.tensor([1.0, -1.1, 0.9, 5.0, -0.95, 1.05, 1.0, -0.9], dtype=F64)[:, None]
    y = x @ true
    model = line(optimum(x, y))
    saliency = plan(model, "optimal_brain_damage", data=(x, y), loss=half_mse, keep=7 / 8)["0"].mask
    assert saliency.flatten().tolist() == [True] * 3 + [False] + [True] * 4
    magnitude = plan(model, "magnitude_pruning_han", keep=1 / 8)["0"].mask
    assert magnitude.flatten().tolist() == [False] * 3 + [True] + [False] * 4
    s = methods.optimal_brain_damage(true.flatten(), hessian_of(x).diagonal())
    assert s[3] == pytest.approx(0.00125, rel=0.2) and s[0] == pytest.approx(0.5, rel=0.2)


# optimal brain surgeon


def surgeon_by_hand(w, h, deletions):
    """OBS as the paper writes it: delete the cheapest, correct the others, take its row and column out of the inverse."""
    w, left, order, costs = w.clone(), list(range(len(w))), [], []
    for _ in range(deletions):
        inverse = torch.linalg.inv(h[left][:, left])
        cost = w[left] ** 2 / (2 * inverse.diagonal())
        q = int(cost.argmin())
        step = -(w[left[q]] / inverse[q, q]) * inverse[:, q]
        w[left] += step
        w[left[q]] = 0.0
        costs.append(cost[q].item())
        order.append(left.pop(q))
    return w, order, costs


def test_obs_1_each_deletion_costs_what_is_predicted_and_zeroes_its_weight():
    x, y = linreg(mix=1.0)
    w, h = optimum(x, y).flatten(), hessian_of(x)
    predicted = w**2 / (2 * torch.linalg.inv(h).diagonal())
    for q in range(6):
        moved = methods.corrected(w[None], (torch.arange(6) != q)[None], h)[0]
        assert moved[q] == 0.0
        assert abs(loss_of(x, y, moved) - loss_of(x, y, w) - predicted[q]) < 1e-10
    costs = methods.optimal_brain_surgeon(w, x, damping=0.0)
    assert costs.argmin() == predicted.argmin() and abs(costs.min() - predicted.min()) < 1e-10


@pytest.mark.parametrize("d", [6, 30])
def test_obs_2_successive_deletions_end_at_least_squares_on_the_columns_left(d):
    x, y = linreg(n=120, d=d, mix=1.0)
    w = optimum(x, y).flatten()
    costs = methods.optimal_brain_surgeon(w, x, damping=0.0)
    for k in range(1, d):
        mask = select(costs[None], (d - k) / d)
        moved = methods.corrected(w[None], mask, hessian_of(x))[0]
        left = mask[0].numpy()
        expected = np.linalg.lstsq(x.numpy()[:, left], y.numpy()[:, 0], rcond=None)[0]
        assert np.abs(moved.numpy()[left] - expected).max() < 1e-8
        assert (moved[~mask[0]] == 0).all()


def test_obs_2_the_order_and_the_weights_are_those_of_the_paper_step_by_step():
    x, y = linreg(n=120, d=20, mix=1.0)
    w, h = optimum(x, y).flatten(), hessian_of(x)
    _, order, paid = surgeon_by_hand(w, h, 20)
    costs = methods.optimal_brain_surgeon(w, x, damping=0.0)
    assert costs.argsort().tolist() == order
    assert torch.allclose(costs[order], torch.tensor(paid, dtype=F64).cummax(0).values, rtol=1e-8)
    half = surgeon_by_hand(w, h, 10)[0]
    assert torch.allclose(methods.corrected(w[None], half[None] != 0, h)[0], half, rtol=0, atol=1e-8)


def test_obs_2_through_the_plan_with_the_smallest_damping():
    x, y = linreg(n=120, d=8, mix=1.0)
    model = line(optimum(x, y))
    packed = plan(model, "optimal_brain_surgeon", data=(x, y), loss=half_mse, keep=0.5, damping=1e-10)["0"]
    left = packed.mask[0].numpy()
    expected = np.linalg.lstsq(x.numpy()[:, left], y.numpy()[:, 0], rcond=None)[0]
    assert np.abs(packed.dense()[0, packed.mask[0]].numpy() - expected).max() < 1e-8


def test_obs_3_never_costs_more_than_obd_and_equally_much_only_without_off_diagonal_entries():
    x, y = linreg(mix=1.0)
    w, h = optimum(x, y).flatten(), hessian_of(x)
    assert (w**2 / (2 * torch.linalg.inv(h).diagonal()) < methods.optimal_brain_damage(w, h.diagonal())).all()
    h = torch.tensor([[2.0, 0, 0], [0, 2, 1], [0, 1, 2]], dtype=F64)  # not diagonal, and yet equal for q = 0
    w = torch.ones(3, dtype=F64)
    obs, obd = w**2 / (2 * torch.linalg.inv(h).diagonal()), methods.optimal_brain_damage(w, h.diagonal())
    assert abs(obs[0] - obd[0]) < 1e-14 and (obs[1:] < obd[1:] - 0.1).all()


@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_obs_4_the_recursion_gives_the_inverse(damping):
    rows = linreg(mix=1.0)[0]
    direct = torch.linalg.inv(damping * torch.eye(6, dtype=F64) + sum(torch.outer(r, r) for r in rows) / len(rows))
    for inverse in (methods.recursive_inverse(rows, damping), torch.linalg.inv(methods.hessian(rows, damping))):
        assert (inverse - direct).norm() / direct.norm() < 1e-8


def test_obs_5_with_a_diagonal_hessian_nothing_else_moves_and_it_is_obd():
    x, y = linreg()
    x = torch.linalg.qr(x).Q * torch.arange(1, 7, dtype=F64)
    w = optimum(x, y).flatten()
    for q in range(6):
        mask = (torch.arange(6) != q)[None]
        assert torch.allclose(methods.corrected(w[None], mask, hessian_of(x))[0], w * mask[0], rtol=0, atol=1e-12)
    costs = methods.optimal_brain_surgeon(w, x, damping=0.0)
    saliencies = methods.optimal_brain_damage(w, hessian_of(x).diagonal())
    assert torch.allclose(costs, saliencies, rtol=0, atol=1e-12)


def test_obs_6_above_some_4000_weights_it_says_what_to_use_instead(digits):
    big = nn.Sequential(nn.Flatten(), nn.Linear(64, 80)).eval()
    with pytest.raises(ValueError, match=r"5,120 covered weights.*4,000.*layerwise_obs"):
        plan(big, "optimal_brain_surgeon", data=digits)


# layer-wise optimal brain surgeon


def inputs_of(model, x):
    """What each weighted layer of an MLP is given, by name."""
    seen = {}
    handles = [m.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, i[0].detach())) for n, m in weighted(model).items()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def layer_error(y, w, pruned):
    """E without the half: mean over examples of the squared change of the pre-activations."""
    return (y @ (pruned - w).T).square().sum(1).mean().item()


def test_lobs_1_the_layer_hessian_is_the_second_moment_of_its_inputs_for_every_output(mlp, digits64):
    x, labels = digits64[0][:200], digits64[1][:200]
    gram = gather(mlp, weighted(mlp), "acts_gram", (x, labels))
    for name, y in inputs_of(mlp, x).items():
        assert torch.allclose(gram[name][0], y.T @ y / len(y), rtol=0, atol=1e-12)
        w = mlp.get_submodule(name).weight.detach()[:3]
        half_error = lambda v, y=y, w=w: (y @ (v - w).T).square().sum(1).mean() / 2  # noqa: E731
        whole = torch.autograd.functional.hessian(half_error, w.clone())
        for unit in range(3):
            assert torch.allclose(whole[unit, :, unit], gram[name][0], rtol=0, atol=1e-12)


def test_lobs_2_one_deletion_changes_the_layer_error_by_twice_its_score():
    y, _ = linreg(mix=1.0)
    w = torch.randn(3, 6, dtype=F64)
    gram = (y.T @ y / len(y))[None]
    scores = methods.layerwise_obs(w, gram, damping=0.0)
    for row, q in itertools.product(range(3), range(6)):
        mask = torch.ones_like(w, dtype=torch.bool)
        mask[row, q] = False
        assert abs(layer_error(y, w, methods.layerwise_obs.repair(w, gram, mask, damping=0.0)) - 2 * scores[row, q]) < 1e-10


def test_lobs_3_greedy_on_one_output_is_obs_on_linreg():
    x, y = linreg(n=120, d=12, mix=1.0)
    w = optimum(x, y)
    gram = hessian_of(x)[None]
    greedy = methods.layerwise_obs(w.T, gram, order="greedy", damping=0.0)
    assert torch.allclose(greedy[0], methods.optimal_brain_surgeon(w.flatten(), x, damping=0.0), rtol=1e-8)
    mask = select(greedy, 0.4)
    surgeon = methods.optimal_brain_surgeon.repair(w.flatten(), x, mask[0], damping=0.0)
    assert torch.allclose(methods.layerwise_obs.repair(w.T, gram, mask, damping=0.0)[0], surgeon, rtol=0, atol=1e-9)


@pytest.mark.parametrize("keep", [0.8, 0.5, 0.2, 0.05])
def test_lobs_4_the_output_error_is_bounded_by_the_layers_errors(mlp, digits64, keep):
    data = digits64[0][:300], digits64[1][:300]
    made = plan(mlp, "layerwise_obs", data=data, keep=keep)
    copy = compress(mlp, "layerwise_obs", data=data, keep=keep)
    errors = {n: layer_error(y, mlp.get_submodule(n).weight.detach(), made[n].dense()) for n, y in inputs_of(mlp, data[0]).items()}
    change = (predict(copy, data[0]) - predict(mlp, data[0])).norm().item() / math.sqrt(300)
    bound = made["fc2"].dense().norm().item() * math.sqrt(errors["fc1"]) + math.sqrt(errors["fc2"])
    assert 0 < change <= bound


@pytest.mark.parametrize("order", ["one_shot", "greedy"])
def test_lobs_5_beats_magnitude_on_every_layer_at_80_percent(digits64, order):
    data = digits64[0][:300], digits64[1][:300]
    for seed in range(5):
        model = build("mlp", "digits", seed).double()
        ours = plan(model, "layerwise_obs", data=data, keep=0.2, order=order)
        theirs = plan(model, "magnitude_pruning_han", keep=0.2)
        for name, y in inputs_of(model, data[0]).items():
            w = model.get_submodule(name).weight.detach()
            assert layer_error(y, w, ours[name].dense()) < layer_error(y, w, theirs[name].dense())


def test_lobs_dead_inputs_do_not_break_it(digits64):
    """Three pixels of the digits are always 0: without damping their second moment has no inverse."""
    model = build("mlp", "digits").double()
    gram = gather(model, weighted(model), "acts_gram", digits64)["fc1"]
    assert (gram[0].diagonal() == 0).sum() >= 3
    made = plan(model, "layerwise_obs", data=digits64, keep=0.5, damping=1e-10)["fc1"]
    assert torch.isfinite(made.dense()).all() and not made.mask[:, gram[0].diagonal() == 0].any()


# magnitude pruning


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.11])
def test_han_1_masks_are_those_of_torch(mlp, keep):
    copy = build("mlp", "digits").double()
    ours = plan(mlp, "magnitude_pruning_han", keep=keep)
    for name, layer in weighted(copy).items():
        reference.l1_unstructured(layer, "weight", amount=1 - keep)
        assert torch.equal(ours[name].mask, layer.weight_mask.bool())
    copy = build("mlp", "digits").double()
    ours = plan(mlp, "magnitude_pruning_han", keep=keep, scope="network")
    reference.global_unstructured([(m, "weight") for m in weighted(copy).values()], reference.L1Unstructured, amount=1 - keep)
    for name, layer in weighted(copy).items():
        assert torch.equal(ours[name].mask, layer.weight_mask.bool())


@pytest.mark.parametrize("power", [1, 2])
def test_han_1_rows_are_those_of_torch(power):
    conv = nn.Conv2d(3, 16, 3)
    mask = select(conv.weight.detach().abs() ** power, 0.25, unit="filter")
    reference.ln_structured(conv, "weight", amount=0.75, n=power, dim=0)
    assert torch.equal(mask, conv.weight_mask.bool())


def test_han_1_the_papers_threshold_is_q_times_the_layers_deviation(mlp):
    w = mlp.fc1.weight.detach()
    cut = float(0.8 * w.std())
    assert torch.equal(plan(mlp, "magnitude_pruning_han", where="fc1", threshold=cut)["fc1"].mask, w.abs() >= cut)


def test_random_is_uniform_and_a_seed_is_a_draw(mlp):
    draws = torch.stack([plan(mlp, "random_pruning", where="fc1", keep=0.3, seed=s)["fc1"].mask for s in range(200)])
    assert (draws.flatten(1).sum(1) == 2048 - round(0.7 * 2048)).all()
    share = draws.double().mean(0)  # 200 draws of 0.3: standard error 0.032
    assert (share - 0.3).abs().max() < 5 * 0.0324 and (share - 0.3).abs().mean() < 0.0324
    assert not torch.equal(draws[0], draws[1])


def test_han_2_keeping_all_is_the_dense_network_bit_for_bit(mlp, digits64):
    copy = compress(mlp, "magnitude_pruning_han", keep=1.0)
    assert torch.equal(predict(copy, digits64[0]), predict(mlp, digits64[0]))


@pytest.mark.parametrize("rule", [partial(torch.optim.SGD, momentum=0.9), torch.optim.Adam, torch.optim.AdamW])
def test_han_2_pruned_weights_are_exactly_zero_after_any_step(digits, rule):
    copy = compress(build("mlp", "digits"), "magnitude_pruning_han", keep=0.1)
    before = {n: p.mask for n, p in plan_of(copy).items()}
    fit(copy, digits, epochs=3, lr=1e-2, weight_decay=0.1, optimizer=rule)
    for name, mask in before.items():
        weight = copy.get_submodule(name).weight
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()


def test_han_3_dead_units_leave_without_a_trace():
    torch.manual_seed(1)
    first, second = nn.Linear(6, 10).double(), nn.Linear(10, 4).double()
    w_in, b_in, w_out, b_out = (t.detach().clone() for t in (first.weight, first.bias, second.weight, second.bias))
    w_in[[1, 4, 7]] = 0
    b_in[1], b_in[4], b_in[7] = 0.0, 0.7, -0.3  # nothing, a constant, a constant that the ReLU cuts off
    w_out[:, 2] = 0
    dead = methods.dead_units(w_in, w_out)
    assert dead.nonzero().flatten().tolist() == [1, 2, 4, 7]
    x = torch.randn(50, 6, dtype=F64)
    small = methods.without_units(dead, w_in, b_in, w_out, b_out)
    assert small[0].shape == (6, 6) and small[2].shape == (4, 6)
    run = lambda a, b, c, d: F.linear(F.linear(x, a, b).relu(), c, d)  # noqa: E731
    assert torch.allclose(run(*small), run(w_in, b_in, w_out, b_out), rtol=0, atol=1e-12)


def test_han_3_a_units_constant_goes_into_the_next_bias():
    w_in, b_in = torch.zeros(1, 3, dtype=F64), torch.tensor([0.5], dtype=F64)
    w_out, b_out = torch.tensor([[2.0]], dtype=F64), torch.tensor([1.0], dtype=F64)
    small = methods.without_units(methods.dead_units(w_in, w_out), w_in, b_in, w_out, b_out)
    assert small[0].shape == (0, 3) and small[3].item() == 2.0


def test_han_4_a_quarter_of_the_connections_halves_the_dropout():
    assert methods.retraining_dropout(0.5, 1000, 250) == 0.25
    assert methods.retraining_dropout(0.3, 7, 7) == pytest.approx(0.3)


class Crowd:
    """The digits MLP, ``seeds`` of them trained side by side as stacked tensors, float32."""

    def __init__(self, data, seeds):
        nets = [build("mlp", "digits", s) for s in range(seeds)]
        self.start = {n: torch.stack([dict(m.named_parameters())[n].detach() for m in nets]) for n in dict(nets[0].named_parameters())}
        self.data = data
        self.x, self.y = data.train[0].float().flatten(1) / 255, data.train[1]

    @staticmethod
    def logits(p, masks, x):
        h = torch.baddbmm(p["fc1.bias"][:, None], x, (p["fc1.weight"] * masks["fc1"]).mT).relu()
        return torch.baddbmm(p["fc2.bias"][:, None], h, (p["fc2.weight"] * masks["fc2"]).mT)

    def train(self, start, masks, steps, lr=1e-2, batch=32):
        p = {n: t.clone().requires_grad_() for n, t in start.items()}
        rule, draw = torch.optim.Adam(p.values(), lr=lr, fused=True), torch.Generator().manual_seed(0)
        many = len(start["fc1.bias"])
        for _ in range(steps):
            rows = torch.randint(0, len(self.y), (many, batch), generator=draw)
            rule.zero_grad()
            F.cross_entropy(self.logits(p, masks, self.x[rows]).flatten(0, 1), self.y[rows].flatten()).mul(many).backward()
            rule.step()
        return {n: t.detach() for n, t in p.items()}

    def masks(self, p, keep):
        many = range(len(p["fc1.bias"]))
        return {n: torch.stack([select(methods.magnitude_pruning_han(p[n + ".weight"][i]), keep) for i in many]) for n in ("fc1", "fc2")}

    def accuracy(self, p, masks):
        images, labels = self.data.validation
        x = (images.float().flatten(1) / 255).expand(len(p["fc1.bias"]), -1, -1)
        return (self.logits(p, masks, x).argmax(2) == labels).double().mean().item()


def test_han_5_iterative_beats_one_shot_beats_no_retraining_and_kept_weights_beat_new_ones(digits):
    """Mean over 10 seeds, 1,221 training images, no noise: 600 steps of Adam at 0.01, 95 % of each layer gone, 900 more in each branch."""
    crowd = Crowd(digits, 10)
    full = crowd.masks(crowd.start, 1.0)
    trained = crowd.train(crowd.start, full, 600)
    once = crowd.masks(trained, 0.05)
    cut = crowd.accuracy(trained, once)
    retrained = crowd.accuracy(crowd.train(trained, once, 900), once)
    restarted = crowd.accuracy(crowd.train(crowd.start, once, 900), once)
    p, masks = trained, full
    for round_ in (1, 2, 3):
        masks = crowd.masks({n: t * masks[n[:3]] if "weight" in n else t for n, t in p.items()}, 0.05 ** (round_ / 3))
        p = crowd.train(p, masks, 300)
    iterated = crowd.accuracy(p, masks)
    assert crowd.accuracy(trained, full) > 0.9
    assert cut + 0.1 < retrained < iterated
    assert restarted < retrained


# L1


def lasso(x, y, lam, steps=400, start=None):
    """The method through ``fit``: full-batch gradient descent at 1/L, then the proximal step."""
    model = line(torch.zeros(x.shape[1], y.shape[1], dtype=F64) if start is None else start)
    copy = compress(model, "l1_weight_regularization", lam=lam)
    lr = 1 / torch.linalg.eigvalsh(hessian_of(x)).max().item()
    fit(copy, (x, y), epochs=steps, batch=len(x), lr=lr, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    return copy[0].weight.detach().T


@pytest.mark.parametrize("lam", [0.01, 0.1, 0.5])
def test_l1_1_equals_scikit_learn(lam):
    x, y = linreg(n=80, d=8, mix=0.5)
    expected = Lasso(alpha=lam, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy()[:, 0]).coef_
    assert np.abs(lasso(x, y, lam).numpy()[:, 0] - expected).max() < 1e-6


def test_l1_2_from_the_largest_correlation_on_all_is_zero_and_just_below_one_weight_is_not():
    x, y = linreg(n=80, d=8)
    highest = (x.T @ y).abs().max().item() / len(x)
    assert (lasso(x, y, highest * (1 + 1e-12), 200) == 0).all()
    assert int((lasso(x, y, 0.999 * highest, 200) != 0).sum()) == 1


def test_l1_3_orthonormal_design_has_a_closed_form():
    x, y = linreg(n=80, d=8)
    x = torch.linalg.qr(x).Q * math.sqrt(len(x))
    expected = methods.soft_threshold(x.T @ y / len(x), 0.4)
    assert 0 < (expected == 0).sum() < 8
    assert torch.allclose(lasso(x, y, 0.4, 50), expected, rtol=0, atol=1e-12)


def test_l1_4_the_proximal_step_gives_zeros_and_the_subgradient_none(digits):
    """Digits MLP, 6 epochs of SGD at 0.05, lam 1e-2, weights on pixels that are always 0 left out: 5 seeds, and each of them."""
    live = (digits.train[0].flatten(1).amax(0) > 0)[None].expand(32, -1)
    train = partial(fit, data=digits.train, epochs=6, lr=0.05, optimizer=SGD, schedule="constant", keep_best=False)

    for seed in range(5):
        smooth, sparse, cut = (compress(build("mlp", "digits", seed), "l1_weight_regularization", lam=1e-2, **knobs)
                               for knobs in ({"solver": "subgradient"}, {}, {"solver": "subgradient", "threshold_after": 1e-3}))  # fmt: skip
        for model in (smooth, sparse, cut):
            train(model)
        assert int((smooth.fc1.weight[live] == 0).sum() + (smooth.fc2.weight == 0).sum()) == 0
        assert (sparse.fc1.weight[live] == 0).double().mean() > 0.2
        trained, left = smooth.fc1.weight.detach(), cut.eval().fc1.weight.detach()  # the threshold waits until training is over
        assert torch.equal(left, torch.where(trained.abs() > 1e-3, trained, 0.0)) and (left[live] == 0).any()


def test_l1_5_without_penalty_it_is_ordinary_training_step_for_step(digits):
    plain, copy = build("mlp", "digits"), build("mlp", "digits")
    for layer in weighted(copy).values():
        attach(layer, methods.l1_weight_regularization(layer.weight.detach(), False, lam=0.0), methods.l1_weight_regularization, {"lam": 0.0})
    runs = [fit(m, digits.train, epochs=2, lr=1e-2, optimizer=SGD, keep_best=False) for m in (plain, copy)]
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]
    assert torch.equal(plain.fc1.weight, copy.fc1.weight)


# dynamic network surgery


@pytest.mark.parametrize(
    "size, before, after",
    [(0.1, True, False), (0.1, False, False), (0.19, True, False), (0.2, True, True), (0.2, False, False), (0.25, True, True),
     (0.25, False, False), (0.3, True, True), (0.3, False, True), (0.9, False, True), (0.9, True, True)],
)  # fmt: skip
@pytest.mark.parametrize("sign", [1, -1])
def test_dns_1_the_rule_with_its_band(size, before, after, sign):
    assert methods.surgery(torch.tensor([sign * size]), torch.tensor([before]), 0.2, 0.3).item() is after


def test_dns_1_thresholds_come_from_the_layer_and_stay():
    w = torch.randn(20, 30, dtype=F64)
    state = methods.dynamic_network_surgery(w, False, c=0.5, margin=0.2).state
    assert state["low"] == pytest.approx((w.abs().mean() + 0.5 * w.abs().std()).item(), rel=1e-12)
    assert state["high"] - state["low"] == pytest.approx(0.2 * w.abs().std().item(), rel=1e-9)
    later = methods.dynamic_network_surgery(3 * w, True, c=0.5, margin=0.2, decay=0.0, state=state).state
    assert (later["low"], later["high"], later["step"]) == (state["low"], state["high"], 1)


def test_dns_1_the_mask_is_looked_at_with_falling_probability():
    w = torch.ones(1)
    looked = []
    for _ in range(400):
        state = {"mask": torch.zeros(1, dtype=torch.bool), "low": 0.2, "high": 0.3, "step": 30}
        looked.append(methods.dynamic_network_surgery(w, True, decay=0.1, state=state).mask.item())
    assert np.mean(looked) == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 400))  # 1 / (1 + 0.1 * 30)


def with_surgery(w, mask, low, high, decay=0.0):
    model = line(w)
    state = {"mask": mask, "low": low, "high": high, "step": 0}
    method = methods.dynamic_network_surgery
    attach(model[0], method(w.T, False, state=state), method, {"decay": decay})
    return model


def test_dns_2_masked_weights_move_by_the_gradient_at_the_masked_weight():
    x, y = linreg()
    w, mask = torch.randn(6, 1, dtype=F64), torch.tensor([[True, False, True, False, True, True]])
    model = with_surgery(w, mask, 0.0, 1e9).train()
    rule = torch.optim.SGD(model.parameters(), lr=0.05)
    half_mse(model(x), y).backward()
    rule.step()
    masked = (w.T * mask).requires_grad_()
    expected = torch.autograd.grad(half_mse(x @ masked.T, y), masked)[0]
    assert torch.allclose(latent(model[0]).detach(), w.T - 0.05 * expected, rtol=0, atol=1e-14)
    assert (expected[~mask].abs() > 1e-3).all()
    killed = w.T.clone().requires_grad_()
    assert (torch.autograd.grad(half_mse(x @ (killed * mask).T, y), killed)[0][~mask] == 0).all()


def test_dns_3_splices_a_needed_weight_back_and_a_hard_mask_cannot():
    """5 seeds; N = 100, noise 0.01, three of eight weights needed, one of them cut at the start; 300 full-batch steps at 0.1."""
    true = torch.tensor([1.0, -0.8, 0.6, 0, 0, 0, 0, 0], dtype=F64)[:, None]
    train = partial(fit, epochs=300, batch=100, lr=0.1, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    for seed in range(5):
        x, y = linreg(n=100, d=8, true=true, noise=0.01, seed=seed)
        mask = torch.tensor([[False, True, True, False, False, True, False, False]])
        start = torch.where(mask, 0.5, 0.05).double().T
        dynamic, hard = with_surgery(start, mask, 0.2, 0.3), line(start)
        attach(hard[0], Masked(start.T, mask))
        train(dynamic, (x, y))
        train(hard, (x, y))
        right = torch.zeros(8, 1, dtype=F64)
        right[:3] = optimum(x[:, :3], y)
        assert plan_of(dynamic)["0"].mask.flatten().tolist() == [True] * 3 + [False] * 5
        assert loss_of(x, y, dynamic[0].weight.detach()) == pytest.approx(loss_of(x, y, right), abs=1e-10)
        assert loss_of(x, y, hard[0].weight.detach()) > 0.3


def test_dns_4_without_thresholds_it_is_the_dense_network(mlp, digits64):
    copy = compress(mlp, "dynamic_network_surgery", c=0.0, margin=0.0)
    assert all(p.mask.all() for p in plan_of(copy).values())
    assert torch.equal(predict(copy, digits64[0]), predict(mlp, digits64[0]))


def test_dns_4_with_the_mask_and_its_gradients_held_it_is_hans():
    x, y = linreg(n=100, d=8)
    w = torch.randn(8, 1, dtype=F64)
    low = w.abs().median().item()
    han = compress(line(w), "magnitude_pruning_han", threshold=low)
    dns = with_surgery(w, torch.ones(1, 8, dtype=torch.bool), low, low, decay=1e30)  # looks at step 0 only

    def held(model, rule):
        for _, layer, a in attached(model):
            latent(layer).grad *= a.mask

    train = partial(fit, data=(x, y), epochs=40, batch=25, lr=0.05, optimizer=SGD, loss=half_mse, keep_best=False)
    train(han)
    train(dns, hooks=[Hook(gradients=held)])
    assert torch.equal(dns[0].weight, han[0].weight) and 0 < int((han[0].weight == 0).sum()) < 8


# SNIP


def test_snip_1_is_the_gradient_at_a_gate_on_each_weight_and_sums_to_one(mlp, digits64):
    x, labels = digits64[0][:100], digits64[1][:100]
    gates = {n + ".weight": torch.ones_like(m.weight, requires_grad=True) for n, m in weighted(mlp).items()}
    gated = {n: p.detach() * gates.get(n, 1) for n, p in mlp.named_parameters()}
    F.cross_entropy(torch.func.functional_call(mlp, gated, x), labels).backward()
    g = gather(mlp, weighted(mlp), "grad", (x, labels))
    for name, layer in weighted(mlp).items():
        assert torch.allclose(layer.weight.detach() * g[name], gates[name + ".weight"].grad, rtol=0, atol=1e-12)
    w, flat = (torch.cat([t.flatten() for t in ts]) for ts in ([m.weight.detach() for m in weighted(mlp).values()], g.values()))
    s = methods.snip(w, flat)
    assert s.sum().item() == pytest.approx(1, abs=1e-12)
    at_gates = torch.cat([t.grad.abs().flatten() for t in gates.values()])
    assert torch.allclose(s, at_gates / at_gates.sum(), rtol=0, atol=1e-12)


def test_snip_2_is_the_limit_of_closing_a_gate_a_little(mlp, digits64):
    x, labels = digits64[0][:100], digits64[1][:100]
    w = mlp.fc2.weight.detach()
    g = w * gather(mlp, weighted(mlp), "grad", (x, labels))["fc2"]
    loss = lambda v: F.cross_entropy(torch.func.functional_call(mlp, {"fc2.weight": v}, x), labels).item()  # noqa: E731
    for index in [divmod(int(i), 32) for i in g.abs().flatten().argsort()[[-1, -50, -100]]]:
        slopes = []
        for delta in (1e-3, 1e-5):
            closed = w.clone()
            closed[index] *= 1 - delta
            slopes.append(abs((loss(w) - loss(closed)) / delta - g[index].item()))
        assert slopes[1] < 1e-6 and slopes[1] < slopes[0]


def test_snip_3_keeping_all_is_dense_training(digits):
    dense = build("mlp", "digits")
    runs = [fit(m, digits, epochs=2) for m in (compress(dense, "snip", data=digits, keep=1.0), dense)]
    assert [r["loss"] for r in runs[0].rows] == [r["loss"] for r in runs[1].rows]


def test_snip_4_dead_pixels_score_zero_and_go_first(digits):
    """Where black is 0 at the network's input; random and magnitude do not see them."""
    images = digits.train[0].flatten(1)
    dead = images.amax(0) == 0
    assert dead.sum() >= 3
    model = build("mlp", "digits")
    every = len(images)
    g = gather(model, weighted(model), "grad", digits, samples=every)["fc1"]
    assert (methods.snip(model.fc1.weight.detach(), g)[:, dead] == 0).all()
    masks = {
        m: plan(model, m, where="fc1", data=digits, samples=every, keep=0.8)["fc1"].mask for m in ("snip", "random_pruning", "magnitude_pruning_han")
    }
    assert not masks["snip"][:, dead].any()
    assert masks["random_pruning"][:, dead].double().mean() > 0.6
    assert masks["magnitude_pruning_han"][:, dead].double().mean() > 0.6


def test_snip_4_on_standardized_images_dead_pixels_are_no_longer_zero_nor_first(digits):
    """Subtract the mean of all pixels and divide by their deviation, and black is a constant input that the loss answers to.

    The catalogue has them score highest then; over 5 seeds of this network they score less than the others in the mean, and far from 0.
    """
    images, labels = digits.train
    x = (images.double() - images.double().mean()) / images.double().std()
    dead = images.flatten(1).amax(0) == 0
    ratio = []
    for seed in range(5):
        model = build("mlp", "digits", seed).double()
        s = methods.snip(model.fc1.weight.detach(), gather(model, weighted(model), "grad", (x, labels), samples=len(x))["fc1"])
        ratio.append((s[:, dead].mean() / s[:, ~dead].mean()).item())
        assert select(s, 0.2)[:, dead].any()
    assert 0.3 < np.mean(ratio) < 1


def test_snip_5_gradients_are_summed_over_batches_before_the_absolute_value(mlp, digits64):
    x, labels = digits64[0][:900], digits64[1][:900]  # the provider takes 256 at a time
    g = gather(mlp, weighted(mlp), "grad", (x, labels), samples=900)["fc1"]
    whole = torch.autograd.grad(F.cross_entropy(mlp(x), labels), mlp.fc1.weight)[0]
    assert torch.allclose(g, whole, rtol=0, atol=1e-12)
    each = [torch.autograd.grad(F.cross_entropy(mlp(a), b), mlp.fc1.weight)[0].abs() for a, b in zip(x.split(256), labels.split(256), strict=True)]
    assert not torch.allclose(g.abs(), sum(each) / len(each), rtol=0, atol=1e-4)


# sparse variational dropout


def test_svd_1_the_approximation_is_the_kl():
    """Monte Carlo of -log(alpha)/2 + E log|1 + sqrt(alpha) eps|; its constant is the limit E log|eps| = -(gamma + log 2)/2."""
    log_alpha = torch.linspace(-8, 8, 33, dtype=F64)
    eps = torch.randn(300_000, dtype=F64)
    root = (log_alpha / 2).exp()
    sampled = torch.stack([(torch.cat([1 + r * eps, 1 - r * eps]).abs().log()).mean() for r in root]) - log_alpha / 2
    constant = -(0.5772156649 + math.log(2)) / 2
    assert (methods.kl_log_uniform(log_alpha) - (sampled - constant)).abs().max() < 0.02


def test_svd_2_the_kl_falls_with_alpha_to_zero():
    kl = methods.kl_log_uniform(torch.linspace(-20, 40, 6001, dtype=F64))
    assert (kl.diff() < 0).all() and 0 <= kl[-1] < 1e-12
    k1, k2, k3, la = 0.63576, 1.87320, 1.48695, torch.linspace(-8, 8, 100, dtype=F64)  # the paper's own line
    paper = k1 * torch.sigmoid(k2 + k3 * la) - 0.5 * torch.log1p((-la).exp()) - k1
    assert torch.allclose(methods.kl_log_uniform(la), -paper, rtol=0, atol=1e-12)


def noisy(layer, log_sigma2):
    model = nn.Sequential(layer.double())
    copy = compress(model, "sparse_variational_dropout", log_sigma2=log_sigma2).train()
    return copy[0]


@pytest.mark.parametrize(
    "layer, x",
    [(nn.Linear(5, 3), torch.rand(1, 5)), (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), torch.rand(1, 4, 5, 5))],
    ids=["dense", "grouped convolution"],
)
def test_svd_3_noise_at_the_pre_activations_has_the_weights_mean_and_variance(layer, x):
    """Additive, theta + sigma eps, and multiplicative, theta (1 + sqrt(alpha) eps), alike: sigma^2 = alpha theta^2."""
    x, many, layer = x.double(), 40_000, noisy(layer, -3.0)
    theta, bias = latent(layer).detach(), layer.bias.detach()
    sigma2 = torch.full_like(theta, math.exp(-3.0))
    with torch.no_grad():
        out = layer(x.expand(many, *x.shape[1:]))
        mean = apply_weight(layer, x, theta)[0] + bias.reshape(-1, *[1] * (out.dim() - 2))
        var = apply_weight(layer, x**2, sigma2)[0]
    assert ((out.mean(0) - mean).abs() < 4.5 * (var / many).sqrt()).all()
    assert (out.var(0) / var - 1).abs().max() < 0.04
    drawn = [theta + sigma2.sqrt() * torch.randn_like(theta) for _ in range(3000)]
    alpha = methods.log_alpha(theta, sigma2.log()).exp()
    spread = [theta * (1 + alpha.sqrt() * torch.randn_like(theta)) for _ in range(3000)]
    for weights in (drawn, spread):
        outs = torch.stack([apply_weight(layer, x, w)[0] for w in weights])
        assert (outs.var(0) / var - 1).abs().mean() < 0.05


RELEVANT, IRRELEVANT, NOISE = 4, 12, 0.5


def planted(seed=0, outputs=6, n=200):
    """``outputs`` regressions side by side, each a draw of its own: four inputs matter, twelve do not; X^T X / N = I."""
    true = torch.zeros(RELEVANT + IRRELEVANT, outputs, dtype=F64)
    true[:RELEVANT] = torch.tensor([1.0, -1.5, 2.0, -1.0], dtype=F64)[:, None]
    x, _ = linreg(n=n, d=RELEVANT + IRRELEVANT, seed=seed)
    x = torch.linalg.qr(x).Q * math.sqrt(n)
    noise = NOISE * torch.randn(n, outputs, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x, x @ true + noise


def gaussian_nll(z, y):
    return half_mse(z, y) / NOISE**2


def variational(x, y, steps=1000, **knobs):
    copy = compress(line(optimum(x, y)), "sparse_variational_dropout", log_sigma2=-6.0, **knobs)
    fit(copy, (x, y), epochs=steps, batch=len(x), lr=0.05, optimizer=torch.optim.Adam, loss=gaussian_nll, keep_best=False)
    a = copy[0].parametrizations.weight[0]
    return copy, methods.log_alpha(latent(copy[0]).detach(), a.log_sigma2.detach())


def test_svd_4_planted_irrelevant_inputs_become_noise():
    """Six regressions, N = 200, noise 0.5 uncorrelated with the irrelevant inputs, 1,000 full-batch steps of Adam at 0.05."""
    x, y = planted()
    idle = x[:, RELEVANT:]
    y = y - idle @ optimum(idle, y)
    copy, log_alpha = variational(x, y)
    assert (log_alpha[:, :RELEVANT] < 0).all()
    assert (log_alpha[:, RELEVANT:] > 3).all()
    assert torch.equal(plan_of(copy)["0"].mask, log_alpha < 3)


def test_svd_4_an_irrelevant_input_that_chance_correlates_stays():
    """The claim without that care fails, and not for want of training: z = (least squares) / (its standard error) decides.

    With X^T X / N = I each weight is alone: z^2 ((t - 1)^2 + alpha t^2) / 2 + KL(alpha), best at t = 1 / (1 + alpha). From z of
    about 1 on the best log alpha is below 3, so that some 3 in 10 irrelevant inputs stay.
    """
    log_alpha = torch.linspace(-12, 14, 2601, dtype=F64)
    cost = lambda z: z**2 / 2 * torch.sigmoid(log_alpha) + methods.kl_log_uniform(log_alpha)  # noqa: E731
    best = {z: log_alpha[cost(z).argmin()].item() for z in (0.5, 0.95, 1.15, 1.5, 3.0)}
    assert best[0.5] > 10 and best[0.95] > 3 and best[1.15] < 3 and best[1.5] < 3 and best[3.0] < 0
    x, y = planted()
    z = optimum(x, y).T[:, RELEVANT:].abs() / (NOISE / math.sqrt(len(x)))
    found = variational(x, y)[1]
    assert (found[:, :RELEVANT] < 0).all()
    gone = found[:, RELEVANT:] > 3
    assert gone[z < 0.7].all() and not gone[z > 1.3].any()
    assert 0.5 < gone.double().mean() < 0.8


def test_svd_5_an_infinite_threshold_keeps_all_and_the_test_output_is_theta():
    w = torch.randn(4, 6, dtype=F64)
    state = {"log_sigma2": torch.full_like(w, 5.0)}
    packed = methods.sparse_variational_dropout(w, False, threshold=math.inf, state=state)
    assert packed.mask.all() and torch.equal(packed.dense(), w)
    model = line(w.T)
    attach(model[0], packed, methods.sparse_variational_dropout, {"threshold": math.inf})
    x = torch.randn(7, 6, dtype=F64)
    assert torch.equal(model.eval()(x), F.linear(x, w))
    assert not torch.equal(model.train()(x), F.linear(x, w))


def test_svd_5_without_the_kl_little_goes():
    _, log_alpha = variational(*planted(), kl_weight=0.0)
    assert (log_alpha > 3).double().mean() < 0.1


def test_svd_6_data_twice_over_does_not_make_it_sparser():
    """The KL is divided by N: twice the data is twice the evidence. Six regressions, as above, 600 steps."""
    x, y = planted(seed=3)
    once, twice = variational(x, y, 600)[1], variational(torch.cat([x, x]), torch.cat([y, y]), 600)[1]
    assert (twice > 3).double().mean() <= (once > 3).double().mean()


def test_svd_6_the_penalty_is_the_kl_over_the_number_of_examples_warmed_up():
    w = torch.randn(3, 4, dtype=F64)
    packed = methods.sparse_variational_dropout(w, True, log_sigma2=-4.0)
    kl = methods.kl_log_uniform(-4.0 - (w**2).log()).sum()
    term = partial(methods.sparse_variational_dropout.training.penalty, packed, 50, kl_weight=0.5, warmup=0.2)
    for progress, share in [(0.0, 0.0), (0.1, 0.5), (0.2, 1.0), (0.9, 1.0)]:
        assert term(progress).item() == pytest.approx(0.5 * share * kl.item() / 50, rel=1e-6)


# L0


BETA = 2 / 3


def test_l0_1_the_gate_is_open_as_often_as_the_formula_says():
    u = torch.rand(1_000_000, dtype=F64)
    for log_alpha in (-4.0, -2.0, 0.0, 2.0, 4.0):
        a = torch.tensor(log_alpha, dtype=F64)
        p = methods.open_probability(a, BETA).item()
        share = (methods.hard_concrete(a, u, BETA) > 0).double().mean().item()
        assert abs(share - p) < 3 * math.sqrt(p * (1 - p) / len(u))


def test_l0_2_gates_are_exactly_0_and_exactly_1_and_unstretched_ones_never():
    u = torch.rand(100_000, dtype=F64)
    z = methods.hard_concrete(torch.zeros((), dtype=F64), u, BETA)
    assert (z == 0).double().mean() > 0.1 and (z == 1).double().mean() > 0.1
    plain = methods.hard_concrete(torch.zeros((), dtype=F64), u, BETA, gamma=0.0, zeta=1.0)
    assert ((plain > 0) & (plain < 1)).all()


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_l0_3_the_pathwise_gradient_is_the_finite_difference_on_the_same_draws(log_alpha):
    u = torch.rand(1_000_000, dtype=F64)
    mean = lambda a: (methods.hard_concrete(a, u, BETA) - 0.3).square().mean()  # noqa: E731
    a = torch.tensor(log_alpha, dtype=F64, requires_grad=True)
    mean(a).backward()
    h = 1e-5
    difference = (mean(a.detach() + h) - mean(a.detach() - h)).item() / (2 * h)
    assert a.grad.item() == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("lam, start", [(0.3, 1.0), (3.0, -1.0)])
def test_l0_4_one_weight_ends_at_the_cost_that_a_grid_finds(lam, start):
    """J = lam P(z != 0) + E (1 - z)^2, y = theta = 1: its optimum lies at infinity, so J is compared; 8 starts, 800 steps of Adam."""
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000

    def cost(a, draws):
        return lam * methods.open_probability(a, BETA) + (1 - methods.hard_concrete(a[:, None], draws, BETA)).square().mean(1)

    best = cost(torch.linspace(-12, 12, 193, dtype=F64), u).min().item()
    a = (start + torch.linspace(-0.4, 0.4, 8, dtype=F64)).requires_grad_()
    rule = torch.optim.Adam([a], lr=0.05, fused=True)
    for _ in range(800):
        rule.zero_grad()
        cost(a, torch.rand(8, 256, dtype=F64)).sum().backward()
        rule.step()
    assert (cost(a.detach(), u) - best).abs().max() < 0.01


def test_l0_4_from_the_wrong_side_it_can_stay_in_the_other_basin():
    """Why the start matters: far to the left the gate is closed on every draw, and the gradient is nothing."""
    a = torch.tensor([-20.0], dtype=F64, requires_grad=True)
    u = torch.rand(100_000, dtype=F64)
    (0.3 * methods.open_probability(a, BETA) + (1 - methods.hard_concrete(a, u, BETA)).square().mean()).sum().backward()
    assert a.grad.abs().item() < 1e-6


def test_l0_5_open_gates_are_the_dense_network():
    w, x = torch.randn(4, 6, dtype=F64), torch.randn(9, 6, dtype=F64)
    model, state = line(w.T), {"log_alpha": torch.full((4, 6), 60.0, dtype=F64)}
    attach(model[0], methods.l0_hard_concrete(w, False, state=state), methods.l0_hard_concrete, {"lam": 0.0, "beta": BETA})
    assert torch.equal(model.train()(x), F.linear(x, w)) and torch.equal(model.eval()(x), F.linear(x, w))


def test_l0_5_a_huge_penalty_closes_every_gate():
    x, y = planted()
    w = optimum(x, y)
    model = line(w)
    attach(model[0], methods.l0_hard_concrete(w.T, False), methods.l0_hard_concrete, {"lam": 1e5, "beta": BETA})
    fit(model, (x, y), epochs=80, batch=len(x), lr=0.1, optimizer=torch.optim.Adam, schedule="constant", loss=half_mse, keep_best=False)
    assert (model.eval()[0].weight == 0).all()


def test_l0_5_between_the_two_it_finds_the_planted_support():
    """Six regressions, N = 200, noise 0.5, lam = 10 (over N), 400 full-batch steps of Adam at 0.05."""
    x, y = planted()
    copy = compress(line(optimum(x, y)), "l0_hard_concrete", lam=10.0)
    fit(copy, (x, y), epochs=400, batch=len(x), lr=0.05, optimizer=torch.optim.Adam, loss=gaussian_nll, keep_best=False)
    mask = plan_of(copy)["0"].mask
    assert mask[:, :RELEVANT].all() and mask[:, RELEVANT:].double().mean() < 0.1


def test_l0_6_as_beta_falls_gates_become_coins():
    u = torch.rand(1_000_000, dtype=F64)
    for log_alpha in (-1.0, 0.0, 2.0):
        p = 1 / (1 + math.exp(-log_alpha))
        z = methods.hard_concrete(torch.tensor(log_alpha, dtype=F64), u, 0.01)
        assert ((z > 0) & (z < 1)).double().mean() < 0.02
        assert abs((z == 1).double().mean().item() - p) < 0.01
        assert methods.open_probability(torch.tensor(log_alpha, dtype=F64), 1e-9).item() == pytest.approx(p, abs=1e-8)


def test_l0_the_penalty_is_the_expected_number_of_open_gates_over_the_examples():
    w = torch.randn(3, 4, dtype=F64)
    packed = methods.l0_hard_concrete(w, True, start=0.5)
    assert methods.open_probability(packed.state["log_alpha"], BETA).mean().item() == pytest.approx(0.5, abs=1e-3)
    term = methods.l0_hard_concrete.training.penalty(packed, 50, lam=0.7, beta=BETA).item()
    assert term == pytest.approx(0.7 / 50 * 12 * 0.5, rel=2e-3)


def test_l0_at_test_the_gate_has_no_noise_and_the_copy_computes_with_the_plan(mlp):
    made, copy = plan(mlp, "l0_hard_concrete"), compress(mlp, "l0_hard_concrete")
    for name, packed in made.items():
        assert torch.equal(copy.get_submodule(name).weight, packed.dense())
        assert torch.equal(with_plain_weights(copy).get_submodule(name).weight, packed.dense())
    first, second = (copy.train().fc1.weight.detach().clone() for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("group", "gates", "axis"), [("weight", (6, 5), None), ("input_neuron", (1, 5), 0), ("filter", (6, 1), 1)])
def test_l0_a_group_shares_its_gate_and_counts_as_many_weights(group, gates, axis):
    """The expected norm sums over weights, so at the same gate probability every grouping pays the same; a closed gate empties its whole group."""
    w, knobs = torch.randn(6, 5), {"group": group, "gamma": -0.3, "zeta": 1.2}
    packed = methods.l0_hard_concrete(w, True, start=0.5, **knobs)
    assert packed.state["log_alpha"].shape == gates
    term = methods.l0_hard_concrete.training.penalty(packed, 50, lam=0.7, beta=BETA, gamma=-0.3, zeta=1.2).item()
    assert term == pytest.approx(0.7 / 50 * 30 * 0.5, rel=2e-3)
    state = {"log_alpha": torch.full(gates, 9.0)}
    state["log_alpha"].flatten()[1] = -9.0
    expected = torch.ones(6, 5, dtype=torch.bool)
    expected[(0, 1) if axis is None else (slice(None), 1) if axis == 0 else (1, slice(None))] = False
    made = methods.l0_hard_concrete(w, False, state=state, **knobs)
    assert torch.equal(made.mask, expected) and torch.equal(made.dense(), torch.where(expected, w, 0.0))


def test_every_method_is_better_than_random_where_it_should_be(digits):
    """Digits MLP trained, 3 seeds, 70 % of the weights gone and nothing retrained: each score's mean accuracy against random's."""
    from cmlib.lab.zoo import load_net

    def mean(method, **knobs):
        return np.mean([evaluate(compress(load_net("mlp", "digits", s), method, data=digits, keep=0.3, **knobs), digits) for s in range(3)])

    floor = mean("random_pruning")
    for method in ("magnitude_pruning_han", "optimal_brain_damage", "layerwise_obs", "snip"):
        assert mean(method) > floor + 0.1, method
