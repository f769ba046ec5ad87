"""What proves the methods of ``methods/discrete.py`` right: the best by sorting, moments of explicit draws, finite differences.

A claim that does not hold stands here with its counter-example.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib.core.apply import latent, plan_of
from cmlib.core.method import call
from cmlib.core.training import attached_hooks, penalty
from cmlib.lab.stages import turn
from cmlib.lab.train import fit
from cmlib.lab.verbs import compress
from cmlib.methods import catalog
from cmlib.methods import discrete as methods
from cmlib.methods.quantize import best_support

F64 = torch.float64

MUTATIONS = [
    ("admm_low_bit", "cmlib/methods/discrete.py", "(v * q).sum() / q.square().sum()", "(v * q).sum() / q.abs().sum()",
     "least squares without the square"),
    ("lr_net", "cmlib/methods/discrete.py", 'state["scale"] ** 2 * (some - mean.square())', 'state["scale"] ** 2 * some',
     "E w^2 in place of the variance"),
    ("relaxed_quantization", "cmlib/methods/discrete.py", "- count / 2 - 0.5)", "- count / 2)", "cells begin at their levels, not half a step below"),
    ("slq", "cmlib/methods/discrete.py", '"large_loss_first": -loss, "small_loss_first": loss', '"large_loss_first": loss, "small_loss_first": -loss',
     "the two orders change places"),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def codes(key, w, training=False, state=None, **knobs):
    return call(catalog()[key].fn, {"w": w, "training": training}, {**knobs, "state": state})


# ADMM


def error(v, alpha, index, levels):
    return (v - alpha * levels[index]).square().sum()


@pytest.mark.parametrize("name", methods.CODE_SETS)
def test_alternation_never_raises_the_error_and_ends_at_nearest_codes(name):
    levels, fell = torch.tensor(methods.CODE_SETS[name], dtype=F64), 0
    for seed in range(20):
        v = normal(200, seed=seed)
        found = [error(v, *methods.scaled_set(v, levels, passes=n), levels) for n in range(1, 8)]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(found))
        fell += found[-1] < found[0]
        alpha, index = methods.scaled_set(v, levels, passes=50)
        assert torch.equal((v[:, None] - alpha * levels).abs().argmin(1), index)
        assert torch.allclose(alpha, (v * levels[index]).sum() / levels[index].square().sum())
    assert fell > 10 or name == "{+-1}"


def test_one_pass_of_signs_is_the_binary_weight_network():
    w = normal(5, 20)
    found = codes("admm_low_bit", w, code_set="{+-1}").dense()
    assert torch.allclose(found, w.abs().mean() * w.sign(), rtol=1e-12)


def ternary_ratio(v):
    """The error of alternation over the least there is."""
    levels = torch.tensor([-1.0, 0, 1], dtype=F64)
    kept = best_support(v.abs()[None])[0]
    best = (v.square().sum() - v.abs()[kept].sum().square() / kept.sum()).item()
    return error(v, *methods.scaled_set(v, levels), levels).item() / best


def test_three_levels_are_nearly_the_best_of_normal_weights_but_not_of_heavy_tails():
    ratios = [ternary_ratio(normal(300, seed=s)) for s in range(100)]
    assert min(ratios) >= 1 - 1e-12 and max(ratios) < 1.05
    draw = torch.distributions.StudentT(torch.tensor(3.0, dtype=F64))
    torch.manual_seed(0)
    heavy = [ternary_ratio(draw.sample((300,))) for _ in range(300)]
    assert min(heavy) >= 1 - 1e-12 and max(heavy) > 1.05  # "within 5 %" is a fact of normal weights


@pytest.mark.parametrize("name", methods.CODE_SETS)
def test_the_last_weights_are_powers_of_two_times_one_scale(name):
    w = normal(30, 20)
    packed = codes("admm_low_bit", w, code_set=name)
    size = packed.dense().abs()
    ratio = size[size > 0] / size[size > 0].min()
    assert packed.dense().unique().numel() <= len(methods.CODE_SETS[name]) and torch.allclose(ratio.log2(), ratio.log2().round(), atol=1e-9)


def test_admm_beats_the_rounded_optimum_on_average():
    """Linear regression, each w the exact minimum of the loss and the quadratic: what is left is worth more than the optimum rounded."""
    found = []
    for seed in range(20):
        x, target = normal(60, 20, seed=seed) @ (torch.eye(20, dtype=F64) + 0.3 * normal(20, 20, seed=100 + seed)), normal(20, seed=200 + seed)
        gram = x.T @ x
        rho = gram.diagonal().mean()
        state, w = codes("admm_low_bit", target).state, target
        rounded = state["g"]
        for _ in range(100):
            w = torch.linalg.solve(gram + rho * torch.eye(20), gram @ target + rho * (state["g"] - state["u"]))
            state = codes("admm_low_bit", w, training=True, state=state, steps_per_iteration=1).state
        found.append([(x @ (g - target)).square().mean().item() for g in (state["g"], rounded)])
    ours, theirs = torch.tensor(found).mean(0)
    assert ours < 0.95 * theirs


def test_admms_split_by_hand():
    w = normal(6, 5)
    state = {"g": None, "u": torch.zeros_like(w), "steps": 0}
    state = codes("admm_low_bit", w, state=None).state
    for step in range(1, 7):
        w = w + 0.1 * normal(6, 5, seed=step)
        old = state
        packed = codes("admm_low_bit", w, training=True, state=state, steps_per_iteration=3)
        state = packed.state
        assert torch.equal(packed.dense(), w)
        if step % 3:
            assert torch.equal(state["u"], old["u"]) and torch.equal(state["g"], old["g"])
        else:
            levels = torch.tensor([-1.0, 0, 1], dtype=F64)
            alpha, index = methods.scaled_set(w + old["u"], levels)
            assert torch.equal(state["g"], alpha * levels[index]) and torch.allclose(state["u"], old["u"] + w - state["g"])
    given = w.clone().requires_grad_(True)
    out = catalog()["admm_low_bit"].training.penalty(codes("admm_low_bit", given, state=state), rho=0.3)
    assert torch.allclose(torch.autograd.grad(out, given)[0], 0.3 * (w - state["g"] + state["u"]))


# LR-nets


def chances(shape, seed=0):
    return {"scale": torch.tensor(0.7, dtype=F64), "a": normal(*shape, seed=seed), "b": normal(*shape, seed=seed + 1)}


def drawn(state, count):
    """Explicit ternary weights."""
    some = torch.rand(count, *state["a"].shape, dtype=F64) >= torch.sigmoid(state["a"])
    plus = torch.rand(count, *state["a"].shape, dtype=F64) < torch.sigmoid(state["b"])
    return state["scale"] * some * (2.0 * plus - 1)


def test_moments_are_those_of_explicit_draws():
    torch.manual_seed(0)
    state = chances((6,))
    w = drawn(state, 100_000)
    mean, variance = methods.moments(state)
    assert ((w.mean(0) - mean).abs() <= 4 * w.std(0) / 100_000**0.5).all() and torch.allclose(w.var(0), variance, rtol=0.03)
    p, q = torch.sigmoid(state["a"]), torch.sigmoid(state["b"])
    assert torch.allclose(mean, 0.7 * (1 - p) * (2 * q - 1)) and torch.allclose(variance, 0.49 * (1 - p) - mean.square())
    binary = {n: v for n, v in state.items() if n != "a"}
    assert torch.allclose(methods.moments(binary)[1], 0.49 * 4 * q * (1 - q))


def test_outputs_are_drawn_with_the_mean_and_spread_of_explicit_weights():
    torch.manual_seed(0)
    x, layer = normal(3, 10).expand(3, 10), nn.Linear(10, 2, bias=False).double()
    copy = compress(nn.Sequential(layer), "lr_net").train()
    state = plan_of(copy) and copy[0].parametrizations.weight[0].content()
    w = drawn({n: v.detach() for n, v in state.items()}, 40_000)
    with torch.no_grad():
        many = copy(x.repeat(40_000, 1)).reshape(40_000, 3, 2)
    z = torch.einsum("nk,sok->sno", x, w)
    assert torch.allclose(many.mean(0), z.mean(0), atol=0.03) and torch.allclose(many.std(0), z.std(0), rtol=0.03)


def test_sums_of_discrete_weights_come_nearer_to_normal_as_the_fan_in_grows():
    torch.manual_seed(0)
    far = []
    for n in (4, 40, 400):
        state = {n: v * 0.3 for n, v in chances((n,)).items()}
        z, (mean, variance) = drawn(state, 20_000).sum(1).sort().values, methods.moments(state)
        normal_share = torch.special.ndtr((z - mean.sum()) / variance.sum().sqrt())
        far.append((normal_share - (torch.arange(20_000) + 0.5) / 20_000).abs().max().item())
    assert far[0] > 1.5 * far[1] > 2 * far[2]


def test_pathwise_gradients_are_exact_for_a_square_and_not_for_a_bend():
    """The normal law has the right mean and variance and no more: E z^2 is exact, E relu(z) of few inputs is not, however many are drawn."""

    def gradients(f, n, count=40_001):
        x, state = normal(n, seed=7), {n: v.requires_grad_(n != "scale") for n, v in chances((n,)).items()}
        mean, variance = methods.moments(state)
        m, v = (mean * x).sum(), (variance * x.square()).sum()
        eps = torch.special.ndtri((torch.arange(count, dtype=F64) + 0.5) / count)  # every quantile once: no noise of draws
        path = torch.autograd.grad(f(m + v.sqrt() * eps).mean(), [state["a"], state["b"]])
        some, plus = torch.sigmoid(-state["a"]), torch.sigmoid(state["b"])
        total = 0.0
        for t in itertools.product((-1, 0, 1), repeat=n):
            p = torch.stack([{-1: s * (1 - q), 0: 1 - s, 1: s * q}[k] for k, s, q in zip(t, some, plus, strict=True)]).prod()
            total = total + p * f(0.7 * (x * torch.tensor(t)).sum())
        return torch.cat(path), torch.cat(torch.autograd.grad(total, [state["a"], state["b"]]))

    path, exact = gradients(torch.square, 4)
    assert torch.allclose(path, exact, rtol=1e-3, atol=1e-3)
    path, exact = gradients(torch.relu, 2)
    assert (path - exact).norm() > 0.1 * exact.norm()


def test_certain_chances_are_the_discrete_network():
    torch.manual_seed(0)
    copy = compress(nn.Sequential(nn.Linear(8, 3)).double(), "lr_net").train()
    (between,) = copy[0].parametrizations.weight
    with torch.no_grad():
        between.a.copy_(60 * between.a.sign())
        between.b.copy_(60 * between.b.sign())
    x = normal(5, 8)
    trained = copy(x).detach()
    assert torch.allclose(trained, copy.eval()(x), atol=1e-5)  # variance is not below 1e-12
    scale = between.scale
    assert torch.equal(copy[0].weight, scale * (between.a < 0) * between.b.sign())


def test_the_start_has_the_float_weight_as_its_mean_where_it_can():
    w = normal(40, 30)
    scale = w.square().mean().sqrt()
    mean, _ = methods.moments(codes("lr_net", w).state)
    free = (w / scale).abs() <= 0.9 * 0.05 / (1 - 0.9 * 0.9)  # where |w| / (0.05 + 0.9 |w|) is not above 0.9
    assert free.sum() > 200 and torch.allclose(mean[free], w[free], rtol=1e-9)
    assert (mean[~free].abs() < w[~free].abs()).all() and torch.equal(mean.sign(), w.sign())
    for levels, count in (("ternary", 3), ("binary", 2)):
        found = codes("lr_net", w, levels=levels).dense().unique().detach()
        assert torch.allclose(found, torch.linspace(-1, 1, count, dtype=F64) * scale)


def test_lr_net_decay_and_training(digits64):
    torch.manual_seed(0)
    copy = compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), "lr_net", prob_decay=0.01)
    (between,) = copy[1].parametrizations.weight
    assert torch.allclose(penalty(copy, 10, 0.0), 0.01 * (between.a.square().sum() + between.b.square().sum()))
    before = between.b.detach().clone()
    fit(copy, digits64, epochs=1)
    assert not torch.equal(between.b, before) and plan_of(copy)["1"].dense().unique().numel() == 3
    assert not attached_hooks(copy)


# Relaxed quantization


def levels_of(step, count):
    return step * (torch.arange(count) - count / 2).double()


def test_chances_add_up_to_what_the_ends_leave():
    x, step, sigma = 2 * normal(50), torch.tensor(0.5, dtype=F64), torch.tensor(0.3, dtype=F64)
    found, g = methods.chances_of_levels(x, step, sigma, 8), levels_of(0.5, 8)
    raw = torch.sigmoid((g + step / 2 - x[:, None]) / sigma) - torch.sigmoid((g - step / 2 - x[:, None]) / sigma)
    ends = torch.sigmoid((g[-1] + step / 2 - x) / sigma) - torch.sigmoid((g[0] - step / 2 - x) / sigma)
    assert torch.allclose(raw.sum(1), ends) and torch.allclose(found, raw / ends[:, None]) and torch.allclose(found.sum(1), torch.ones(50, dtype=F64))


def test_without_noise_all_falls_on_the_nearest_level():
    x, step = 2 * torch.rand(200, dtype=F64, generator=torch.Generator().manual_seed(0)) - 1, torch.tensor(0.25, dtype=F64)
    found = methods.chances_of_levels(x, step, torch.tensor(1e-7, dtype=F64), 16)
    nearest = (x[:, None] - levels_of(0.25, 16)).abs().argmin(1)
    assert torch.allclose(found, F.one_hot(nearest, 16).double(), atol=1e-6)


def test_chances_are_how_often_noisy_numbers_are_rounded_so():
    torch.manual_seed(0)
    step, sigma = torch.tensor(1.0, dtype=F64), torch.tensor(0.6, dtype=F64)
    for x in (0.2, 1.4, 3.1):
        u = torch.rand(200_000, dtype=F64)
        index = ((x + sigma * (u / (1 - u)).log()) + 4).round()
        index = index[(index >= 0) & (index < 8)].long()  # off the grid is not counted
        share = torch.bincount(index, minlength=8) / len(index)
        wanted = methods.chances_of_levels(torch.tensor([x], dtype=F64), step, sigma, 8)[0]
        assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / len(index)).sqrt() + 1e-9).all()


def gumbel(*shape):
    return -torch.empty(*shape, dtype=F64).exponential_().log()


def test_draws_turn_to_one_level_as_the_temperature_falls_and_to_the_mean_as_it_rises():
    torch.manual_seed(0)
    chance = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=F64)
    z = methods.concrete(chance.expand(100_000, 4), 1e-4, gumbel(100_000, 4))
    share = z.mean(0)
    assert (z.amax(1) > 0.99).double().mean() > 0.99 and ((share - chance).abs() <= 4 * (chance * (1 - chance) / 1e5).sqrt() + 1e-4).all()
    assert torch.allclose(methods.concrete(chance, 1e6, gumbel(4)), torch.full((4,), 0.25, dtype=F64), atol=1e-4)


def test_relaxed_gradients_are_finite_differences_under_fixed_noise():
    noise = gumbel(6, 8)

    def out(x, step, sigma):
        return methods.concrete(methods.chances_of_levels(x, step, sigma, 8), 0.7, noise) @ (step * (torch.arange(8) - 4.0).double())

    given = [t.requires_grad_(True) for t in (normal(6), torch.tensor(0.6, dtype=F64), torch.tensor(0.3, dtype=F64))]
    assert torch.autograd.gradcheck(out, given)


def test_dithering_is_nearly_unbiased_inside_and_not_near_the_ends():
    step, g = torch.tensor(1.0, dtype=F64), levels_of(1.0, 16)

    def bias(x, sigma):
        return (methods.chances_of_levels(x, step, torch.tensor(sigma, dtype=F64), 16) @ g - x).abs().max()

    middle = torch.linspace(-1, 0, 41, dtype=F64)
    assert bias(middle, 0.5) < 0.005 and bias(middle, 1.0) < 0.005
    assert bias(torch.tensor([4.3], dtype=F64), 1.0) > 0.1 and bias(torch.tensor([0.0], dtype=F64), 2.0) > 0.05  # what the ends cut off is missed


def test_relaxed_weights_train_all_three_and_end_on_the_grid(digits64):
    w = normal(5, 4)
    start = codes("relaxed_quantization", w, bits=3)
    step = w.abs().max() / 3
    expected = ((w / step).round().clamp(-4, 3) * step).reshape(w.shape)
    assert torch.allclose(start.dense(), expected) and start.count == 8
    torch.manual_seed(0)
    hard = codes("relaxed_quantization", w, training=True, state=start.state, bits=3, hard_forward="on").dense()
    assert ((hard[..., None] - step * (torch.arange(8) - 4)).abs().amin(-1) < 1e-9).all() and not torch.allclose(hard, expected)
    copy = compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), "relaxed_quantization")
    (between,) = copy[1].parametrizations.weight
    was = [t.detach().clone() for t in (latent(copy[1]), between.step, between.sigma)]
    assert math.isclose((between.sigma - between.step).exp().item(), 1 / 3)
    fit(copy, digits64, epochs=1)
    assert not any(torch.equal(a, b) for a, b in zip(was, (latent(copy[1]), between.step, between.sigma), strict=True))


# SLQ


def test_slq_at_once_is_the_scalar_codebook_and_with_a_level_a_weight_the_identity():
    w = normal(30, 20)
    for bits in (2, 4):
        found = codes("slq", w, bits=bits).dense()
        assert torch.allclose(found, catalog()["vq_gong"](w, k=1 << bits).dense().detach(), rtol=1e-12) and found.unique().numel() == 1 << bits
    assert torch.allclose(codes("slq", w[:2, :8], bits=4).dense(), w[:2, :8], rtol=1e-12)


def test_slq_takes_the_clusters_of_largest_error_first():
    w = torch.tensor([0.0, 0.01, 1.0, 1.1, 2.0, 2.4, 5.0, 5.02], dtype=F64)
    for order, kept in (("large_loss_first", [2.2, 2.2]), ("small_loss_first", [0.005, 0.005])):
        first = codes("slq", w, bits=2, portion=0.25, partition_order=order)
        frozen = first.state["frozen"]
        assert (
            frozen.sum() == 2
            and torch.allclose(first.dense()[frozen], torch.tensor(kept, dtype=F64))
            and torch.equal(first.dense()[~frozen], w[~frozen])
        )
    chosen = codes("slq", w, bits=2, portion=0.5, partition_order="random").state["frozen"]
    assert chosen.sum() == 4 and not torch.equal(chosen, codes("slq", w, bits=2, portion=0.5).state["frozen"])


def trained_by_stages(seed, digits64, stages):
    torch.manual_seed(seed)
    x, y = digits64[0][:300], digits64[1][:300]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    fit(model, (x, y), epochs=10, lr=0.02, seed=seed, keep_best=False)
    seen = []
    model = compress(model, "slq", bits=2, portion=stages[0])
    for portion in stages:
        plan = plan_of(fit_and_return(turn(model, portion=portion), (x, y), 0 if portion == 1 else 10, seed))
        (between,) = model[1].parametrizations.weight
        seen.append((plan["1"].dense().flatten(), between.frozen.clone()))
    return F.cross_entropy(model.eval()(x), y).item(), seen


def fit_and_return(model, pair, epochs, seed):
    fit(model, pair, epochs=epochs, lr=0.02, seed=seed, keep_best=False)
    if not epochs:
        model.train()(pair[0])  # the portion is taken on a training forward
    return model.eval()


def test_slq_frozen_weights_stay_and_the_others_make_up_for_them(digits64):
    ours, at_once = [], []
    for seed in range(3):
        loss, seen = trained_by_stages(seed, digits64, (0.25, 0.5, 0.75, 1.0))
        for (was, frozen), (now, more) in itertools.pairwise(seen):
            assert torch.equal(was[frozen], now[frozen]) and (more | ~frozen).all() and not torch.equal(was[~frozen], now[~frozen])
        assert seen[-1][1].all() and seen[-1][0].unique().numel() <= 4
        ours.append(loss)
        at_once.append(trained_by_stages(seed, digits64, (1.0,))[0])
    assert sum(ours) < 0.9 * sum(at_once)
