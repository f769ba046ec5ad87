"""What proves the methods right whose structures go while they train: identities, closed forms and well-kept libraries, a test a claim.

linreg, ``learner`` and ``descend`` are those of test_oracles_structures. A claim that does not hold stands here with its counter-example.
"""

import math
from functools import partial

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from sklearn.linear_model import Lasso
from test_oracles_structures import SGD, constants, critical, descend, half_mse, labelled, learner, linreg, two_convolutions
from torch import nn

from cmlib.core.apply import attach, latent, plan_of, with_plain_weights
from cmlib.core.bake import bake
from cmlib.core.packed import Masked
from cmlib.core.select import select, to_units
from cmlib.core.training import penalty
from cmlib.lab.files import load, save
from cmlib.lab.nets import Residual
from cmlib.lab.train import ADAMW, evaluate, fit
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import catalog, structures, structures_learned, structures_scales
from cmlib.methods.prune import soft_threshold

LEARNED, SCALES = "cmlib/methods/structures_learned.py", "cmlib/methods/structures_scales.py"
MUTATIONS = [
    ("learning_number_of_neurons", LEARNED, "(1 - alpha) * t * math.sqrt(w[0].numel())", "(1 - alpha) * t", "large neurons are not pressed harder"),
    ("learning_number_of_neurons", LEARNED, "soft_threshold(w, alpha * t)", "soft_threshold(w, t)", "alpha does not share the penalty out"),
    ("group_wise_brain_damage", LEARNED, "0.5 * h * w**2", "0.5 * h * w", "w is not squared"),
    ("group_wise_brain_damage", "cmlib/core/select.py", "return s.sum(0)", "return s[0]", "a shape's score is its first filter's"),
    ("less_is_more_compact_cnn", LEARNED, "t = lr * every", "t = lr", "the steps between are not made up for"),
    ("less_is_more_compact_cnn", LEARNED, "(u * (s - t).clamp(min=0) @ v)", "(u * (s - t) @ v)", "singular values fall below zero"),
    ("sparse_structure_selection", SCALES, "velocity = soft - before + mu", "velocity = soft - z + mu", "the velocity starts at the wrong point"),
    ("sparse_structure_selection", SCALES, "velocity, lr * gamma, mu)", "velocity, gamma, mu)", "the threshold lacks the step's length"),
    ("vibnet", SCALES, "torch.log1p(_signal(", "torch.log(_signal(", "no one in the logarithm"),
    ("vibnet", SCALES, "(log_variance / 2).exp() * noise", "log_variance.exp() * noise", "the variance for the standard deviation"),
    ("l1_mask_structured_pruning", SCALES, '(_each(state["m"], w) * w).detach()', '(_each(state["m"], w) + 0 * w).detach()', "the mask alone"),
    ("l1_mask_structured_pruning", SCALES, "soft_threshold(m, lr * lam)", "soft_threshold(m, lam)", "the threshold lacks the step's length"),
    ("ista_channel_pruning", SCALES, "weight[:, places.flatten()] /= alpha", "weight[:, places.flatten()] *= alpha", "both move the same way"),
    ("ista_channel_pruning", SCALES, "start + len(more)] -= more", "start + len(more)] += more", "the constant has the wrong sign"),
    ("structured_probabilistic_pruning", LEARNED, "torch.rand_like(p) >= p", "torch.rand_like(p) < p", "kept with the probability of going"),
    ("structured_probabilistic_pruning", LEARNED, "2 * u * rate - rate *", "u * rate - rate *", "the fall is not symmetric about its centre"),
]  # fmt: skip
F64 = torch.float64
SEEDS = range(5)
stirred = partial(networks.stirred, dtype=F64)


def between(layer):
    """What is attached to a layer."""
    return layer.parametrizations.weight[0]


def set_state(layer, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(between(layer), name).copy_(torch.as_tensor(value, dtype=F64))


def chain(seed=0):
    """Dense 4-6-3 with biases, without batch norm; inputs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), torch.randn(8, 4, dtype=F64)


def attached_to(net, key, x, where="0", **knobs):
    return compress(net, key, where=where, data=labelled(x), **knobs)


# learning the number of neurons


def sparse_group_cost(v, w, t, alpha):
    return 0.5 * ((v - w) ** 2).sum() + t * ((1 - alpha) * np.sqrt(len(w)) * np.sqrt((v**2).sum()) + alpha * np.abs(v).sum())


def test_learning_number_of_neurons_1_the_step_is_the_proximal_one_and_its_reverse_is_not():
    """100 draws: nothing that scipy finds costs less; group first and then the soft threshold costs more nearly always."""
    draw, reverse_worse = torch.Generator().manual_seed(0), 0
    for _ in range(100):
        w, (lam, alpha) = torch.randn(1, 5, generator=draw, dtype=F64), torch.rand(2, generator=draw, dtype=F64).tolist()
        lr = 0.7
        v = structures_learned._sparse_group_step(w, lr, lam=lam, alpha=alpha)
        other = soft_threshold(structures.group_soft_threshold(w, (1 - alpha) * lr * lam * math.sqrt(5), "filter"), alpha * lr * lam)
        cost = partial(sparse_group_cost, w=w[0].numpy(), t=lr * lam, alpha=alpha)
        assert cost(v[0].numpy()) <= minimize(cost, w[0].numpy()).fun + 1e-9
        reverse_worse += cost(other[0].numpy()) > cost(v[0].numpy()) + 1e-9
    assert reverse_worse > 80


def test_learning_number_of_neurons_2_its_ends_are_the_lasso_and_the_group_lasso():
    w = torch.randn(5, 3, 3, 3, dtype=F64)
    step = partial(structures_learned._sparse_group_step, w, 0.5)
    assert torch.equal(step(lam=0.3, alpha=1.0), soft_threshold(w, 0.15))
    group = structures.group_soft_threshold(w, 0.5 * 0.3 * math.sqrt(27), "filter")
    assert torch.allclose(step(lam=0.3, alpha=0.0), group, rtol=0, atol=1e-15)
    assert torch.equal(step(lam=0.0, alpha=0.5), w)


def teacher_and_students(lam, steps=1000, lr=0.1):
    """Five teachers of 5 ReLU neurons, students of 30 side by side, full-batch gradient descent: (survivors, test errors), a number a seed."""
    draw = torch.Generator().manual_seed(0)
    seeds, d = len(SEEDS), 8
    x, fresh = torch.randn(2, seeds, 200, d, generator=draw, dtype=F64)
    w_t, a_t = torch.randn(seeds, d, 5, generator=draw, dtype=F64), torch.randn(seeds, 5, 1, generator=draw, dtype=F64).sign()
    y, y_fresh = ((z @ w_t).relu() @ a_t for z in (x, fresh))
    w, a = 0.5 * torch.randn(seeds, 30, d, generator=draw, dtype=F64), 0.3 * torch.randn(seeds, 30, 1, generator=draw, dtype=F64)
    for _ in range(steps):
        h = x @ w.mT
        error = (h.relu() @ a - y) / x.shape[1]
        back = (error @ a.mT) * (h > 0)
        a = a - lr * h.relu().mT @ error
        w = structures_learned._sparse_group_step((w - lr * back.mT @ x).flatten(0, 1), lr, lam=lam, alpha=0.0).reshape(w.shape)
    return w.any(2).sum(1), ((fresh @ w.mT).relu() @ a - y_fresh).square().mean((1, 2))


def test_learning_number_of_neurons_3_fewer_neurons_survive_a_larger_penalty_and_about_as_many_as_the_teacher_has_a_good_one():
    found = [teacher_and_students(lam) for lam in (0.0, 0.003, 0.01, 0.03)]
    alive = [survivors.double().mean().item() for survivors, _ in found]
    assert alive[0] == 30 and alive == sorted(alive, reverse=True) and alive[-1] < alive[1] < 30
    good = [errors.mean() <= 2 * found[0][1].mean() and 5 <= mean <= 12 for (_, errors), mean in zip(found, alive, strict=True)]
    assert any(good)


# group-wise brain damage


def test_group_wise_brain_damage_1_dropping_columns_of_both_matrices_is_the_masked_convolution():
    torch.manual_seed(0)
    net, x = two_convolutions()
    packed = plan(net, "group_wise_brain_damage", where="3", data=labelled(x), keep=0.3)["3"]
    stays = packed.mask[0].flatten()
    assert int(stays.sum()) == 54 - round(0.7 * 54)
    a = torch.rand(2, 6, 7, 7, dtype=F64)
    small = net[3].weight.flatten(1)[:, stays] @ F.unfold(a, 3, padding=1)[:, stays]  # the multiply-adds fall with the columns
    expected = F.conv2d(a, packed.dense(), padding=1)
    assert torch.allclose(small.reshape(expected.shape), expected, rtol=0, atol=1e-10)


def test_group_wise_brain_damage_2_the_mask_is_the_same_for_all_filters_and_another_for_each_channel():
    net, x = two_convolutions()
    for saliency in ("obd", "norm"):
        mask = plan(net, "group_wise_brain_damage", where="3", data=labelled(x), saliency=saliency, keep=0.5)["3"].mask
        assert torch.equal(mask, mask[:1].expand_as(mask))
        assert len({tuple(m.flatten().tolist()) for m in mask[0]}) > 1


def test_group_wise_brain_damage_3_its_group_lasso_is_structured_sparsity_learning_by_shape():
    """What the group lasso has brought to zero is what the ranking by norm takes first, and a mask on top of it stays inside."""
    net, x = two_convolutions()
    norms = structures.group_norms(net[3].weight, "shape")
    with torch.no_grad():
        net[3].weight.copy_(structures.group_soft_threshold(net[3].weight, norms.flatten().sort().values[26:28].mean().item(), "shape"))
    learned = compress(net, "structured_sparsity_learning", where="3", data=labelled(x), group="shape")
    ranked = plan(net, "group_wise_brain_damage", where="3", data=labelled(x), saliency="norm", keep=0.5)["3"]
    assert torch.equal(plan_of(learned)["3"].mask, ranked.mask)
    further = plan_of(compress(learned, "group_wise_brain_damage", where="3", data=labelled(x), keep=0.25))["3"]
    assert not (further.mask & ~ranked.mask).any() and further.kept == 4 * 14


def test_group_wise_brain_damage_4_of_a_1x1_convolution_it_takes_input_channels():
    s = torch.rand(5, 8, 1, 1, dtype=F64)
    assert torch.equal(select(s, 0.4, unit="shape"), select(s, 0.4, unit="channel"))
    assert torch.equal(select(s[..., 0, 0], 0.4, unit="shape"), select(s[..., 0, 0], 0.4, unit="channel"))


def test_group_wise_brain_damage_5_a_groups_saliency_is_the_quadratic_form():
    k, h = torch.randn(4, 3, 2, 2, dtype=F64), torch.rand(4, 3, 2, 2, dtype=F64)
    found = to_units(structures_learned.group_wise_brain_damage(k, h), "shape")
    for s in range(3):
        for i in range(2):
            for j in range(2):
                group = k[:, s, i, j]
                assert found[s, i, j].item() == pytest.approx((group @ torch.diag(h[:, s, i, j]) @ group / 2).item(), abs=1e-14)


# less is more


def test_less_is_more_compact_cnn_1_its_group_step_is_that_of_structured_sparsity():
    w = torch.randn(6, 4, 3, 3, dtype=F64)
    step = partial(structures_learned._less_is_more_step, w, 0.1, rank=0.0)
    for every in (1, 5):
        assert torch.equal(step(5, lam=2.0, every=every), structures.group_soft_threshold(w, 0.1 * every * 2.0, "filter"))
    assert step(4, lam=2.0, every=5) is w


def test_less_is_more_compact_cnn_2_singular_values_give_way_as_the_nuclear_norm_wants():
    """P minimises ||P - W||^2 / 2 + t ||P||_*: W - P = t G, the largest singular value of G at most 1, <G, P> = ||P||_*; 40 draws."""
    draw, some = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        w, t = torch.randn(4, 3, generator=draw, dtype=F64), 2.5 * torch.rand((), generator=draw, dtype=F64).item()
        p = structures_learned.singular_value_threshold(w, t)
        assert torch.linalg.matrix_norm(w - p, 2) <= t * (1 + 1e-12)
        assert ((w - p) * p).sum().item() == pytest.approx(t * torch.linalg.matrix_norm(p, "nuc").item(), abs=1e-12)
        some += 0 < torch.linalg.matrix_rank(p, atol=1e-9) < 3
    assert some > 10


def test_less_is_more_compact_cnn_3_at_the_solution_the_optimality_conditions_hold():
    x, y = linreg(outputs=5, noise=1.0)
    y = y * torch.tensor([3.0, 0.1, 2.0, 0.2, 1.0], dtype=F64)
    lam = 0.3 * critical(x, y, "filter")
    w = descend(learner("less_is_more_compact_cnn", torch.randn(5, 6, dtype=F64), lam=lam), x, y, steps=400, lr=0.4)
    slope = (w @ x.T - y.T) @ x / len(x)
    zero = ~w.any(1)
    assert 0 < zero.sum() < 5 and (slope[zero].norm(dim=1) <= lam * (1 + 1e-9)).all()
    assert (slope + lam * w / w.norm(dim=1, keepdim=True).clamp(min=1e-300))[~zero].abs().max() < 1e-6


def test_less_is_more_compact_cnn_3_between_proximal_steps_zero_neurons_are_not_zero():
    x, y = linreg(outputs=5, noise=1.0)
    start, lam = torch.randn(5, 6, dtype=F64), 0.5 * critical(x, y, "filter")
    for steps, alive in ((200, False), (201, True)):
        w = descend(learner("less_is_more_compact_cnn", start, lam=lam, every=4), x, y, steps=steps, lr=0.1)
        assert bool(w.any(1).all()) is alive


def test_less_is_more_compact_cnn_3_with_the_nuclear_norm_alone_they_hold_too():
    x, y = linreg(outputs=5, noise=1.0)
    model = learner("less_is_more_compact_cnn", torch.randn(5, 6, dtype=F64), lam=1e-7, rank=0.8)
    w = descend(model, x, y, steps=400, lr=0.3)
    slope = -(w @ x.T - y.T) @ x / len(x)
    assert torch.linalg.matrix_norm(slope, 2) <= 0.8 + 1e-6
    assert (slope * w).sum().item() == pytest.approx(0.8 * torch.linalg.matrix_norm(w, "nuc").item(), abs=1e-5)
    assert torch.linalg.matrix_rank(w, atol=1e-9) < 5


def test_less_is_more_compact_cnn_4_without_penalties_it_is_gradient_descent():
    w = torch.randn(6, 4, dtype=F64)
    assert torch.equal(structures_learned._less_is_more_step(w, 0.1, 3, lam=0.0, rank=0.0, every=1), w)


def test_less_is_more_compact_cnn_5_neurons_at_zero_leave_both_layers():
    net, x = two_convolutions()
    with torch.no_grad():
        net[0].weight[[1, 4]] = 0
    masked = attached_to(net, "less_is_more_compact_cnn", x)
    small = bake(masked, labelled(x))
    assert small[0].weight.shape[0] == 4 and small[3].weight.shape[1] == 4
    assert torch.allclose(small(x), masked(x), rtol=0, atol=1e-10)


# the gain of a channel


GAINED = {"sparse_structure_selection": "scale", "vibnet": "mean", "l1_mask_structured_pruning": "m"}


@pytest.mark.parametrize("key, name", GAINED.items())
@pytest.mark.parametrize("normed", [True, False])
def test_a_gain_multiplies_what_a_channel_says_behind_batch_norm_or_weight_and_bias(key, name, normed, tmp_path):
    """In training and outside of it, baked, saved, and kept when another method takes the layer over."""
    net, x = two_convolutions() if normed else chain()
    gain = torch.tensor([0.3, -1.0, 2.0, 1.0, 0.5, 1.5], dtype=F64)
    copy = attached_to(net, key, x)
    assert torch.equal(copy.eval()(x), net.eval()(x))
    set_state(copy[0], **{name: gain}, **({"log_variance": torch.full((6,), -80.0)} if key == "vibnet" else {}))
    expected = with_plain_weights(net)
    owner = expected[1] if normed else expected[0]
    with torch.no_grad():
        owner.weight *= gain.reshape(-1, *[1] * (owner.weight.dim() - 1))
        owner.bias *= gain
    for training in (False, True):
        assert torch.allclose(copy.train(training)(x), expected.train(training)(x), rtol=0, atol=1e-12)
    for m in (copy, expected):
        m.eval()
        if normed:
            m[1].running_mean.copy_(net[1].running_mean)
            m[1].running_var.copy_(net[1].running_var)
    said = expected(x)
    save(copy, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors", into=with_plain_weights(net)).eval()
    other = compress(copy.train(), "magnitude_pruning_han", data=labelled(x), keep=1.0).eval()
    for same in (copy.eval(), with_plain_weights(copy), bake(copy, labelled(x)), again, other):
        assert torch.allclose(same(x), said, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key, name", GAINED.items())
@pytest.mark.parametrize("normed", [True, False])
def test_the_gradient_of_a_gain_is_the_sum_over_what_it_multiplies(key, name, normed):
    """dL/dm = sum W dL/dW_eff, with the bias; behind batch norm gamma dL/dgamma + beta dL/dbeta."""
    net, x = two_convolutions() if normed else chain()
    copy = attached_to(net, key, x).eval()
    F.cross_entropy(copy(x), labelled(x)[1]).backward()
    F.cross_entropy(net(x), labelled(x)[1]).backward()
    owner = net[1] if normed else net[0]
    expected = (owner.weight * owner.weight.grad).flatten(1).sum(1) if not normed else owner.weight * owner.weight.grad
    expected = expected + owner.bias * owner.bias.grad
    assert torch.allclose(getattr(between(copy[0]), name).grad, expected, rtol=0, atol=1e-14)
    assert torch.allclose(latent(copy[0]).grad, net[0].weight.grad, rtol=0, atol=1e-14)  # at a gain of one the weight learns as ever


# sparse structure selection


def test_sparse_structure_selection_1_without_momentum_it_is_ista_step_by_step():
    x, y = linreg(d=8)
    lam, lr = 0.3, 0.2
    scale, velocity, ista = torch.ones(8, dtype=F64), torch.zeros(8, dtype=F64), torch.ones(8, dtype=F64)
    slope = lambda v: x.T @ (x @ v - y[:, 0]) / len(x)  # noqa: E731
    for _ in range(50):
        scale, velocity = structures_scales.accelerated_step(scale - lr * slope(scale), scale, velocity, lr * lam, 0.0)
        ista = soft_threshold(ista - lr * slope(ista), lr * lam)
        assert torch.equal(scale, ista)


def selector(x, **knobs):
    """y = sum of the scaled inputs: a layer of identity weights whose channels have scales, and a sum; nothing else learns."""
    d = x.shape[1]
    net = nn.Sequential(nn.Linear(d, d, bias=False), nn.Linear(d, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(d))
        net[1].weight.fill_(1.0)
    copy = attached_to(net, "sparse_structure_selection", x, **knobs)
    latent(copy[0]).requires_grad_(False)
    copy[1].weight.requires_grad_(False)
    return copy


def test_sparse_structure_selection_2_in_training_it_ends_at_the_lasso():
    x, y = linreg(d=8)
    lam = 0.4
    model = selector(x, gamma=lam)
    fit(model, (x, y), epochs=500, batch=len(x), lr=0.05, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    expected = Lasso(alpha=lam, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y[:, 0]).coef_
    found = between(model[0]).scale.detach().numpy()
    assert np.abs(found - expected).max() < 1e-6
    assert (found == 0).tolist() == (expected == 0).tolist() and 0 < (found == 0).sum() < 8
    assert torch.equal(plan_of(model)["0"].rows, between(model[0]).scale != 0)


def test_sparse_structure_selection_2_momentum_takes_the_papers_steps():
    """l_t = S(z) + mu v_t, v_t = S(z) - l_(t-1) + mu v_(t-1), followed for 20 steps of training."""
    x, y = linreg(d=8)
    model = selector(x, gamma=0.4, mu=0.7)
    fit(model, (x, y), epochs=20, batch=len(x), lr=0.1, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    l, v = torch.ones(8, dtype=F64), torch.zeros(8, dtype=F64)  # noqa: E741
    for _ in range(20):
        z = l - 0.1 * x.T @ (x @ l - y[:, 0]) / len(x)
        s = z.sign() * (z.abs() - 0.04).clamp(min=0)
        v = s - l + 0.7 * v
        l = s + 0.7 * v  # noqa: E741
    assert torch.allclose(between(model[0]).scale, l, rtol=0, atol=1e-12)


def test_sparse_structure_selection_3_a_block_of_scale_zero_is_its_shortcut():
    torch.manual_seed(0)
    net = stirred(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), Residual(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    image = torch.rand(6, 1, 6, 6, dtype=F64)
    copy = attached_to(net, "sparse_structure_selection", image, where="2.conv2", structure="block").eval()
    x = torch.rand(3, 8, 6, 6, dtype=F64)
    assert between(copy[2].conv2).scale.shape == (1,) and torch.equal(copy[2](x), net[2](x))
    set_state(copy[2].conv2, scale=[0.5])
    half = F.relu(0.5 * net[2].bn2(net[2].conv2(F.relu(net[2].bn1(net[2].conv1(x))))) + x)
    assert torch.allclose(copy[2](x), half, rtol=0, atol=1e-12)
    set_state(copy[2].conv2, scale=[0.0])
    assert torch.equal(copy[2](x), x) and not plan_of(copy)["2.conv2"].rows.any()
    assert torch.equal(with_plain_weights(copy)[2](x), x)


def test_sparse_structure_selection_4_with_no_penalty_and_scales_of_one_it_is_the_network():
    net, x = two_convolutions()
    assert torch.equal(attached_to(net, "sparse_structure_selection", x, where="0, 3").eval()(x), net(x))


# VIBNet


def test_vibnet_1_its_penalty_is_twice_the_least_divergence():
    """min over xi of KL(N(mu, s^2) || N(0, xi)) = log(1 + mu^2 / s^2) / 2, at xi = mu^2 + s^2."""
    for mu, s in ((0.3, 0.7), (1.0, 0.1), (-2.0, 0.5)):
        kl = lambda xi, mu=mu, s=s: 0.5 * (math.log(xi / s**2) + (s**2 + mu**2) / xi - 1)  # noqa: E731
        best = minimize_scalar(kl, bounds=(1e-6, 50), method="bounded", options={"xatol": 1e-10})
        packed = Masked(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool),
                        state={"mean": torch.tensor([mu], dtype=F64), "log_variance": torch.tensor([2 * math.log(s)], dtype=F64)})  # fmt: skip
        assert best.fun == pytest.approx(structures_scales._information(packed, gamma=1.0).item() / 2, abs=1e-8)
        assert best.x == pytest.approx(mu**2 + s**2, rel=1e-4)


def test_vibnet_2_the_penaltys_slope_is_the_closed_form():
    net, x = chain()
    copy = attached_to(net, "vibnet", x, gamma=0.3, sigma=0.4)
    mu = torch.linspace(-2, 2, 6, dtype=F64)
    set_state(copy[0], mean=mu)
    penalty(copy.train(), 8, 0.0).backward()
    assert torch.allclose(between(copy[0]).mean.grad, 0.3 * 2 * mu / (mu**2 + 0.16), rtol=0, atol=1e-12)


def test_vibnet_3_what_says_nothing_of_the_answer_drowns_in_noise():
    """8 useful inputs and 32 of noise, one layer of identity weights: mean over five draws of who stays."""
    useful, useless = [], []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 40, generator=draw, dtype=F64)
        y = x[:, :8] @ torch.ones(8, 1, dtype=F64) + 0.1 * torch.randn(400, 1, generator=draw, dtype=F64)
        net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 1)).double()
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(40))
        copy = compress(net, "vibnet", where="0", data=(x, torch.zeros(400, dtype=torch.int64)), gamma=0.03)
        latent(copy[0]).requires_grad_(False)
        fit(copy, (x, y), epochs=15, batch=50, lr=0.05, loss=half_mse, keep_best=False, seed=seed)
        stays = plan_of(copy)["0"].rows.double()
        useful.append(stays[:8].mean().item())
        useless.append(stays[8:].mean().item())
    assert np.mean(useful) == 1.0 and np.mean(useless) < 0.1


def test_vibnet_4_without_noise_it_is_the_network():
    net, x = two_convolutions()
    copy = attached_to(net, "vibnet", x)
    assert torch.equal(copy.eval()(x), net(x))
    set_state(copy[0], log_variance=torch.full((6,), -torch.inf))
    assert torch.equal(copy.train()(x), net.train()(x))


def test_vibnet_5_the_mean_over_draws_is_the_mean_and_their_spread_sigma():
    """One factor a channel, the same for weight and bias; 1,500 draws, five standard errors."""
    net, x = chain()
    copy = attached_to(net, "vibnet", x, sigma=0.3)
    mu = torch.linspace(-1, 1, 6, dtype=F64)
    set_state(copy[0], mean=mu)
    copy.train()
    with torch.no_grad():
        says, draws = net[0](x[:2]), torch.stack([copy[0](x[:2]) for _ in range(1500)])
    z = draws / says
    assert torch.allclose(z[:, 0], z[:, 1], rtol=0, atol=1e-9)
    assert ((z[:, 0].mean(0) - mu).abs() < 5 * 0.3 / 1500**0.5).all() and ((z[:, 0].std(0) - 0.3).abs() < 5 * 0.3 / 3000**0.5).all()
    assert torch.equal(copy.eval()[0](x).detach(), copy.eval()[0](x).detach())


# L1 masks


def test_l1_mask_structured_pruning_3_training_with_masks_of_one_leaves_the_weights_slope_alone():
    net, x = chain()
    copy = attached_to(net, "l1_mask_structured_pruning", x, lam=0.7).train()
    extra = penalty(copy, 8, 0.0)
    extra.backward()
    assert extra.item() == pytest.approx(0.7 * 6) and torch.equal(between(copy[0]).m.grad, torch.full((6,), 0.7, dtype=F64))
    assert latent(copy[0]).grad is None


def test_l1_mask_structured_pruning_4_weight_decay_makes_it_a_penalty_of_the_product():
    """min over m W = v of lam |m| + mu / 2 ||W||^2 = 3/2 (lam^2 mu)^(1/3) ||v||^(2/3)."""
    draw = torch.Generator().manual_seed(0)
    for lam, mu in ((0.1, 0.5), (1.0, 0.01), (2.0, 3.0)):
        v = torch.randn(7, generator=draw, dtype=F64)

        def cost(log_m, v=v, lam=lam, mu=mu):
            m = math.exp(log_m)
            packed = Masked(v[None], v[None] != 0, state={"m": torch.tensor([m], dtype=F64)})
            return structures_scales._l1_of_masks(packed, lam=lam, solver="subgradient").item() + mu / 2 * (v / m).square().sum().item()

        found = minimize_scalar(cost, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9}).fun
        assert found == pytest.approx(1.5 * (lam**2 * mu) ** (1 / 3) * v.norm().item() ** (2 / 3), rel=1e-7)


@pytest.mark.parametrize("solver", ["proximal", "subgradient"])
def test_l1_mask_structured_pruning_5_only_the_proximal_step_reaches_zero(solver):
    """linreg of 5 outputs, two of which are noise."""
    x, y = linreg(outputs=5)
    y = y * torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], dtype=F64)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(5))
    copy = attached_to(net, "l1_mask_structured_pruning", x, lam=0.05, solver=solver)
    copy[1].weight.requires_grad_(False)
    fit(copy, (x, y), epochs=300, batch=len(x), lr=0.1, optimizer=SGD, schedule="constant", loss=half_mse, keep_best=False)
    m = between(copy[0]).m.detach()
    assert (m == 0).tolist() == ([False, True, False, True, False] if solver == "proximal" else [False] * 5)
    if solver == "proximal":
        assert plan_of(copy)["0"].rows.tolist() == [True, False, True, False, True]
    else:
        assert m[[1, 3]].abs().max() < 0.01  # it goes to and fro around zero by lr lam


def test_l1_mask_structured_pruning_the_product_is_judged_since_mask_and_weight_share_their_scale():
    w = torch.randn(4, 5, dtype=F64)
    w[2] *= 1e-6
    m = torch.tensor([1.0, 1e-5, 1.0, 3.0], dtype=F64)
    judged = lambda m, w: structures_scales.l1_mask_structured_pruning(w, state={"m": nn.Parameter(m)}, threshold=1e-4).mask  # noqa: E731
    assert judged(m, w).any(1).tolist() == [True, False, False, True]
    for c in (1e-3, 1e3):
        assert torch.equal(judged(c * m, w / c), judged(m, w))


# ISTA on batch norm's scale


@pytest.mark.parametrize("alpha", [0.01, 0.5, 3.0])
def test_ista_channel_pruning_1_rescaling_leaves_the_outputs(alpha):
    net, x = two_convolutions()
    found = structures_scales.rescaled(net, alpha, labelled(x))
    assert torch.allclose(found(x), net(x), rtol=0, atol=1e-10)
    assert torch.allclose(found[1].weight, alpha * net[1].weight) and torch.allclose(found[3].weight, net[3].weight / alpha)
    residual, x = stirred(build("resnet", "mnist")), torch.rand(3, 1, 28, 28, dtype=F64)
    assert torch.allclose(structures_scales.rescaled(residual, alpha)(x), residual(x), rtol=0, atol=1e-9)


def dead_channels(net, rows=(1, 4)):
    with torch.no_grad():
        net[1].weight[list(rows)] = 0
        net[1].bias[list(rows)] = torch.tensor([0.4, 0.7], dtype=F64)
    return list(rows)


@pytest.mark.parametrize("padding", [0, 1])
def test_ista_channel_pruning_2_absorbing_what_a_channel_always_says_is_exact_but_at_padded_borders(padding):
    net, x = two_convolutions(padding)
    rows = dead_channels(net)
    found = structures_scales.absorbed(net, labelled(x))
    sums = net[3].weight[:, rows].sum((2, 3)) @ constants(net, rows)
    assert torch.allclose(found[3].bias, net[3].bias + sums, rtol=0, atol=1e-12) and not found[1].bias[rows].any()
    before, after = net[:4](x), found[:4](x)
    inner = slice(1, -1) if padding else slice(None)
    assert torch.allclose(before[..., inner, inner], after[..., inner, inner], rtol=0, atol=1e-10)
    assert bool((before - after).abs().max() > 1e-3) is bool(padding)
    small = bake(compress(found, "ista_channel_pruning", where="0", data=labelled(x), threshold=1e-12), labelled(x))
    assert small[0].out_channels == 4 and torch.allclose(small(x), found(x), rtol=0, atol=1e-10)
    careless = bake(compress(net, "ista_channel_pruning", where="0", data=labelled(x), threshold=1e-12), labelled(x))
    assert (careless(x) - net(x)).abs().max() > 1e-3  # beta is not 0: without absorption another function


@pytest.mark.parametrize("follows", ["norm", "neither"])
def test_ista_channel_pruning_2_the_constant_goes_off_the_next_mean_or_into_a_new_bias(follows):
    net, x = two_convolutions(0)
    net[3].bias = None
    net[4] = nn.Sequential(nn.BatchNorm2d(4).double().eval(), nn.ReLU()) if follows == "norm" else nn.ReLU()
    stirred(net)
    dead_channels(net)
    found = structures_scales.absorbed(net, labelled(x))
    assert torch.allclose(found(x), net(x), rtol=0, atol=1e-10) and (found[3].bias is None) is (follows == "norm")


def test_ista_channel_pruning_3_proximal_steps_reach_zero_and_subgradients_do_not(digits):
    zeros = {}
    for name, hook in (("ista", structures_scales.ista(0.15)), ("slimming", structures.slimming(0.15))):
        net = load_net("cnn", "digits")
        fit(net, digits, epochs=4, batch=32, lr=0.1, optimizer=SGD, hooks=[hook], keep_best=False)
        zeros[name] = sum(int((g == 0).sum()) for g in structures.scales(net).values())
    assert zeros["ista"] > 0 and zeros["slimming"] == 0


def test_ista_channel_pruning_4_a_channels_cost_is_the_closed_form():
    """(k k c_in + k' k' c_out' + its map) over the image, 8 by 8."""
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 5, padding=2), nn.BatchNorm2d(4), nn.ReLU(),
                        nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(108, 2))  # fmt: skip
    found = structures_scales.channel_costs(net, (torch.rand(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64)))
    assert found == pytest.approx({"1": (9 * 2 + 25 * 4 + 36) / 64, "4": (25 * 6 + 1 * 3 + 36) / 64})
    rule = torch.optim.SGD(net.parameters(), lr=0.1)
    structures_scales.ista(0.2, {"1": 2.0}).after(net, rule)
    assert torch.allclose(net[1].weight, torch.full((6,), 1 - 0.1 * 0.2 * 2)) and torch.equal(net[4].weight, torch.ones(4))


def test_ista_channel_pruning_5_at_rho_0_it_is_plain_training(digits):
    nets = [build("cnn", "digits") for _ in range(2)]
    fit(nets[0], digits, epochs=1, optimizer=SGD, lr=0.1)
    fit(nets[1], digits, epochs=1, optimizer=SGD, lr=0.1, hooks=[structures_scales.ista(0.0)])
    assert all(torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in nets), strict=True))


# structured probabilistic pruning


def test_structured_probabilistic_pruning_1_the_increments_are_the_papers():
    """D(0) = A, D(N) = u A at N = -ln u / a, zero at the share that goes, falling, centre-symmetric about N."""
    ranks = torch.arange(100, dtype=F64)
    for u in (0.25, 0.5, 1.0):
        d = structures_learned.increments(ranks, 50, 0.05, u)
        a = (math.log(2) - math.log(u)) / 50
        assert d[0].item() == pytest.approx(0.05) and d[50] == 0 and (d.diff() < 0).all() and (d[:50] > 0).all() and (d[51:] < 0).all()
        turn = -math.log(u) / a
        for r in range(math.floor(2 * turn) + 1):
            formula = 0.05 * math.exp(-a * r) if r <= turn else 2 * u * 0.05 - 0.05 * math.exp(-a * (2 * turn - r))
            assert d[r].item() == pytest.approx(formula, abs=1e-16)
    assert (-math.log(0.25) / ((math.log(2) - math.log(0.25)) / 50)) == pytest.approx(100 / 3)
    shuffled = torch.randperm(100).double()
    assert torch.equal(structures_learned.increments(shuffled, 50, 0.05, 0.25), structures_learned.increments(ranks, 50, 0.05, 0.25)[shuffled.long()])


def test_structured_probabilistic_pruning_1_the_formulas_own_zero_is_off_by_rounding():
    """The check's D(R Nc) = 0 does not hold in float64: it is some 1e-18, which one group would collect; here it is set to 0."""
    a = (math.log(2) - math.log(0.25)) / 50
    turn = -math.log(0.25) / a
    assert 0 < abs(2 * 0.25 * 0.05 - 0.05 * math.exp(-a * (2 * turn - 50))) < 1e-16


def test_structured_probabilistic_pruning_2_a_column_is_there_with_probability_1_minus_p():
    p = torch.linspace(0, 1, 6, dtype=F64).reshape(1, 6)
    state = {"p": p, "norms": torch.zeros(1, 6, dtype=F64), "step": 0}
    w = torch.randn(3, 6, dtype=F64)
    masks = torch.stack([structures_learned.structured_probabilistic_pruning(w, True, every=500, state=state).mask for _ in range(10_000)])
    assert torch.equal(masks, masks[:, :1].expand_as(masks))
    rate = masks[:, 0].double().mean(0)
    assert ((rate - (1 - p[0])).abs() < 0.02).all() and rate[0] == 1 and rate[-1] == 0


def follow(w, state, steps, **knobs):
    for _ in range(steps):
        state = structures_learned.structured_probabilistic_pruning(w, True, every=1, state=state, **knobs).state
        assert ((state["p"] >= 0) & (state["p"] <= 1)).all()
    return state


def test_structured_probabilistic_pruning_3_fixed_ranks_end_at_one_shot_pruning_by_norm():
    """20 columns, half of which go; the one next to the middle, of the smallest increment, takes longest."""
    w = torch.randn(4, 5, 2, 2, dtype=F64)
    state = follow(w, None, 400, rate=0.2)
    p, norms = state["p"].flatten(), w.abs().sum(0).flatten()
    assert torch.equal(p == 1, norms < norms.sort().values[10]) and ((p == 0) | (p == 1)).all()
    ended = structures_learned.structured_probabilistic_pruning(w, state=state)
    once = select(w.abs(), 0.5, unit="shape")
    assert torch.equal(ended.mask, once) and torch.equal(structures_learned.structured_probabilistic_pruning(w).mask, once)


def test_structured_probabilistic_pruning_4_a_column_recovers_when_it_comes_to_matter():
    w = torch.tensor([[0.1, 0.2, 0.3, 1.0, 2.0, 3.0]], dtype=F64)
    state = follow(w, None, 400, rate=0.2)
    assert state["p"].flatten().tolist() == [1, 1, 1, 0, 0, 0]
    swapped = w[:, [5, 1, 2, 3, 4, 0]]
    half = follow(swapped, state, 2, rate=0.2)["p"].flatten()
    assert half[0] < 1 and half[5] > 0
    assert follow(swapped, state, 400, rate=0.2)["p"].flatten().tolist() == [0, 1, 1, 0, 0, 1]


def test_structured_probabilistic_pruning_5_where_nothing_is_to_go_nothing_ever_goes():
    w = torch.randn(4, 10, dtype=F64)
    state = follow(w, None, 50, keep=1.0)
    assert not state["p"].any() and structures_learned.structured_probabilistic_pruning(w, True, keep=1.0, state=state).mask.all()
    assert not structures_learned.increments(torch.rand(10), 0, 0.05, 0.25).any()
    assert not structures_learned.increments(torch.rand(10, dtype=F64), 5, 0.0, 0.25).any()


def test_structured_probabilistic_pruning_what_is_masked_is_kept_and_ranks_move_only_every_so_many_steps(digits):
    copy = compress(load_net("mlp", "digits"), "structured_probabilistic_pruning", every=5, rate=0.2)
    dead = (latent(copy.fc1) == 0).sum()
    fit(copy, digits, epochs=3, lr=0.05, optimizer=SGD, keep_best=False)
    a = between(copy.fc1)
    assert a.rest["step"] == 3 * -(-len(digits.train[1]) // 128) and 0 < a.p.max() <= 1 and (latent(copy.fc1) == 0).sum() == dead
    w = torch.randn(2, 6, dtype=F64)
    state = {"p": torch.zeros(1, 6, dtype=F64), "norms": torch.zeros(1, 6, dtype=F64), "step": 3}
    once = structures_learned.structured_probabilistic_pruning(w, True, every=5, state=state).state
    twice = structures_learned.structured_probabilistic_pruning(2 * w, True, every=5, state=once).state
    assert not once["p"].any() and torch.equal(once["norms"], w.abs().sum(0, keepdim=True)) and twice["p"].any() and not twice["norms"].any()


# all of them on a network with batch norm


TRAINED = {  # the network, the method's knobs; the group lasso never reaches zero where batch norm undoes the weight's scale
    "learning_number_of_neurons": ("mlp", {"lam": 0.02}, {}),
    "less_is_more_compact_cnn": ("mlp", {"lam": 0.2}, {}),
    "sparse_structure_selection": ("cnn", {"gamma": 0.3, "mu": 0.0}, {}),
    "vibnet": ("cnn", {"gamma": 0.03}, {"optimizer": ADAMW, "lr": 0.02}),
    "l1_mask_structured_pruning": ("cnn", {"lam": 0.3, "solver": "proximal"}, {}),
    "structured_probabilistic_pruning": ("cnn", {"every": 4, "rate": 0.2, "keep": 0.8}, {}),
}


@pytest.mark.parametrize("key", TRAINED)
def test_each_trains_structures_away_and_the_small_network_says_the_same(key, digits, tmp_path):
    """Four epochs on the digits, SGD at 0.1 or AdamW: some go, most digits are still told, and baked and saved the outputs stay."""
    net, knobs, training = TRAINED[key]
    copy = compress(load_net(net, "digits"), key, data=digits, **knobs)
    fit(copy, digits, **{"epochs": 4, "batch": 32, "lr": 0.1, "optimizer": SGD, "keep_best": False} | training)
    x = digits.validation[0][:64].float() / 255
    said, axis = copy.eval()(x).detach(), 0 if key == "structured_probabilistic_pruning" else 1
    gone = sum(int((~p.mask.flatten(1).any(axis)).sum()) for p in plan_of(copy).values())
    assert gone > 0 and evaluate(copy, digits) > 0.75
    small = bake(copy)
    if axis:
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in load_net(net, "digits").parameters())
    save(copy, tmp_path / "a.safetensors")
    for same in (small, load(tmp_path / "a.safetensors")):
        assert torch.allclose(same(x), said, rtol=0, atol=1e-4)


@pytest.mark.parametrize("key", [k for k in TRAINED if k != "structured_probabilistic_pruning"])
def test_half_precision_and_one_neuron_are_fine(key):
    for w in (torch.randn(3, 2).half(), torch.randn(1, 1), torch.randn(4, 6).t()):
        layer = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w.dtype)
        layer.weight.data = w
        method = catalog()[key]
        packed = method(layer.weight.detach(), **method.bind({}))
        attach(layer, packed, method, method.bind({}))
        assert packed.dense().dtype == w.dtype and torch.isfinite(layer(torch.ones(2, w.shape[1], dtype=w.dtype))).all()
