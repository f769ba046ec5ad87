"""What proves the methods of ``methods/fewbits.py`` right: means over many draws, whole numbers, gradients by hand.

A claim that does not hold stands here with its counter-example.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib.core.apply import attach, latent, plan_of
from cmlib.core.method import call
from cmlib.core.packed import Masked
from cmlib.core.sites import Site, attach_site
from cmlib.core.training import attached_hooks
from cmlib.core.wrapped import Sited
from cmlib.lab.cost import multiply_adds
from cmlib.lab.stages import turn
from cmlib.lab.train import fit
from cmlib.lab.verbs import compress
from cmlib.methods import catalog
from cmlib.methods import fewbits as methods

F64 = torch.float64
CONV = nn.Conv2d(3, 4, 3, padding=1)
DENSE = nn.Linear(12, 5)

MUTATIONS = [
    ("few_multiplications", "cmlib/methods/fewbits.py", "else 0.5) * gap < size - below", "else 0.5) * gap > size - below",
     "down with the chance of up"),
    ("few_multiplications", "cmlib/methods/fewbits.py", "taken = rows.abs() > (", "taken = rows > (", "negative weights become 0"),
    ("wrpn", "cmlib/methods/fewbits.py", "reach_of(w, lr_scale_by_init), 2 ** (bits - 1) - 1", "reach_of(w, lr_scale_by_init), 2**bits - 1",
     "the sign's bit is counted as a level's"),
    ("wage", "cmlib/methods/fewbits.py", "math.sqrt(fan_in / 6)", "math.sqrt(6 / fan_in)", "the shift falls with the fan in"),
    ("wage", "cmlib/methods/fewbits.py", "/ layer_shift(g, bits) / lr", "/ lr", "the step is not divided by alpha"),
    ("wage", "cmlib/methods/fewbits.py", "return in_units(w * alpha, g_bits) * 2.0 ** (1 - g_bits) / alpha",
     "return in_units(w, g_bits) * 2.0 ** (1 - g_bits)", "the latent weight is not in units of alpha"),
    ("syq", "cmlib/methods/fewbits.py", '"row": (2, 0, 1, 3)', '"row": (3, 0, 1, 2)', "a scale for each column of the kernel, not for each row"),
    ("value_aware_quantization", "cmlib/methods/fewbits.py", "highest(x.abs().flatten(),", "highest(x.flatten(),",
     "the largest, not those of largest magnitude"),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def codes(key, w, training=False, state=None, **knobs):
    return call(catalog()[key].fn, {"w": w, "training": training}, {**knobs, "state": state})


def attached(layer, key, **knobs):
    """A copy of a layer in training with all that the method puts about it."""
    method, layer = catalog()[key], deepcopy(layer).double().train()
    knobs = method.bind(knobs)
    packed = call(method.fn, {"w": layer.weight.detach(), "training": False}, {**knobs, "state": None})
    given = call(method.acts, {"x": torch.rand(9)}, knobs) if method.acts else None
    attach(layer, packed if given is None else Sited(packed, given), method, knobs)
    return layer


def pass_back(layer, x, g):
    """(output, gradient to x, gradient to the weight that the layer computes with, through what is kept)."""
    x = x.clone().requires_grad_(True)
    out = layer(x)
    return out.detach(), *torch.autograd.grad((out * g).sum(), [x, latent(layer) if hasattr(layer, "parametrizations") else layer.weight])


# Few multiplications


def test_ternary_draws_have_the_weight_as_their_mean():
    torch.manual_seed(0)
    w, draws = torch.tensor([-1.0, -0.7, -0.2, 0.0, 0.1, 0.5, 0.9, 1.0], dtype=F64), 100_000
    for unit, switch in ((1.0, "off"), (methods.glorot(torch.empty(draws, 8)), "on")):
        found = codes("few_multiplications", unit * w.expand(draws, 8), training=True, connect="ternary", lr_scale_by_init=switch).dense()
        assert set(found.unique().tolist()) == {-1.0, 0.0, 1.0}
        assert ((found.mean(0) - w).abs() <= 4 * found.std(0) / draws**0.5).all()
        assert torch.allclose(found.var(0), w.abs() - w.square(), atol=0.01)
    assert codes("few_multiplications", w[None], lr_scale_by_init="off").dense().tolist() == [[-1, -1, 0, 0, 0, 0, 1, 1]]


def test_binary_connect_is_the_stochastic_one():
    w = normal(30, 20)
    found = []
    for key, knobs in (("few_multiplications", {"connect": "binary"}), ("binaryconnect", {"mode": "stochastic"})):
        torch.manual_seed(0)
        packed = codes(key, w, training=True, **knobs)
        found.append(packed.dense())
    assert torch.equal(*found) and not torch.equal(found[0], w.sign())


def test_powers_of_two_by_chance_keep_the_mean():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 2.0**-6, -0.1, 0.3, -0.75, 1.0, 5.5, 16.0, 40.0], dtype=F64)
    found = methods.power_of_two(x.expand(100_000, 9), -4, 4)
    size = found[found != 0].abs()
    assert torch.equal(size.log2(), size.log2().round()) and size.min() == 2.0**-4 and size.max() == 16
    assert ((found.mean(0) - x.clamp(max=16)).abs() <= 4 * found.std(0) / 100_000**0.5 + 1e-15).all()
    assert set(found[:, 4].unique().tolist()) == {-1.0, -0.5}
    assert methods.power_of_two(x, -4, 4, "nearest").tolist() == [0, 0, -0.125, 0.25, -0.5, 1, 4, 16, 16]  # biased, as 0.3 shows
    delta = normal(9)
    _, exponent = torch.frexp(size[:9])
    assert torch.equal(torch.ldexp(delta, exponent - 1), delta * size[:9])


@pytest.mark.parametrize(("layer", "shape"), [(CONV, (2, 3, 5, 5)), (DENSE, (6, 12)), (DENSE, (2, 3, 12))])
def test_only_the_weights_gradient_sees_shifted_inputs(layer, shape):
    x = normal(*shape)
    g = normal(*layer.double()(x).shape, seed=1)
    one = attached(layer, "few_multiplications", rounding="nearest")
    weight = one.weight.detach()
    plain = deepcopy(layer).double()
    plain.weight.data = weight.clone()
    out, down, dw = pass_back(one, x, g)
    exact = pass_back(plain, x, g)
    expected = pass_back(plain, methods.power_of_two(x, -4, 4, "nearest"), g)[2]
    assert torch.allclose(dw, expected, rtol=1e-12) and not torch.allclose(dw, exact[2], rtol=1e-2)
    assert F.cosine_similarity(dw.flatten(), exact[2].flatten(), dim=0) > 0.9
    off = attached(layer, "few_multiplications", quantized_backprop="off", connect="ternary")
    torch.manual_seed(0)
    assert one.training and torch.equal(torch.autograd.grad((off(x) * 0 + g).sum(), latent(off), allow_unused=True)[0], torch.zeros_like(weight))
    assert out.shape == exact[0].shape and down.shape == exact[1].shape


def test_what_is_kept_stays_closed_where_a_layer_fails():
    layer = attached(DENSE, "few_multiplications")
    with pytest.raises(RuntimeError):
        layer(torch.rand(3, 7, dtype=F64))
    x = normal(4, 3).requires_grad_(True)
    w = normal(3, 2, seed=1).requires_grad_(True)
    assert layer.input_site.keeping is None
    assert torch.allclose(torch.autograd.grad((x @ w).sum(), w)[0], x.detach().sum(0)[:, None].expand(3, 2), rtol=1e-14)


# WRPN


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_wrpn_has_an_odd_number_of_levels_from_end_to_end(bits):
    w = torch.linspace(-1.5, 1.5, 5001, dtype=F64).requires_grad_(True)
    packed = codes("wrpn", w[None], bits=bits, lr_scale_by_init="off")
    steps = 2 ** (bits - 1) - 1
    found = packed.dense()[0].detach()
    assert torch.allclose(found, (steps * w.detach().clamp(-1, 1)).round() / steps, rtol=1e-12) and found.unique().numel() == 2**bits - 1
    (slope,) = torch.autograd.grad(packed.through(packed.values).sum(), w)
    assert torch.equal(slope, (w.detach().abs() <= 1).double())
    scaled = codes("wrpn", methods.glorot(torch.empty(1, 5001)) * w.detach()[None], bits=bits)
    assert torch.allclose(scaled.dense()[0], found * methods.glorot(torch.empty(1, 5001)), rtol=1e-9)


def test_wrpn_inputs_and_what_width_costs():
    method = catalog()["wrpn"]
    given = call(method.acts, {}, method.bind({}))
    x = torch.linspace(-0.5, 1.5, 1001, dtype=F64).requires_grad_(True)
    assert given.count == 16 and (given(x) - x.clamp(0, 1)).abs().max() <= 0.5 / 15 + 1e-7
    assert torch.allclose(given(x).unique(), torch.arange(16, dtype=F64) / 15, atol=1e-7)
    assert torch.equal(torch.autograd.grad(given(x).sum(), x)[0], ((x >= 0) & (x <= 1)).double())
    nets = [nn.Sequential(nn.Conv2d(4 * m, 4 * m, 3, padding=1, bias=False)) for m in (1, 2)]
    counted = [multiply_adds(net, torch.rand(1, 4 * m, 8, 8)) for net, m in zip(nets, (1, 2), strict=True)]
    assert counted[1] * 2 * 4 / (counted[0] * 32 * 32) == 2**2 * 2 * 4 / 1024


# WAGE


def test_wage_grids_are_symmetric_whole_multiples():
    x = torch.linspace(-2, 2, 4001, dtype=F64)
    for bits in (2, 4, 8):
        q = methods.in_units(x, bits)
        assert torch.equal(q, q.round()) and torch.equal(q, -q.flip(0)) and q.max() == 2 ** (bits - 1) - 1
        assert torch.equal(methods.in_units(q * 2.0 ** (1 - bits), bits), q)
    assert set((methods.in_units(x, 2) / 2).unique().tolist()) == {-0.5, 0, 0.5}
    size = normal(1000).exp()
    assert (methods.ap2(size) / size <= 2**0.5 + 1e-12).all() and (size / methods.ap2(size) <= 2**0.5 + 1e-12).all()


def test_wage_weights_are_the_papers_divided_by_alpha():
    w = 0.05 * normal(8, 3, 5, 5)
    fan_in, sigma = 75, 0.5
    limit, least = (6 / fan_in) ** 0.5, 1.5 * sigma
    alpha = max(2.0 ** round(torch.log2(torch.tensor(least / limit)).item()), 1)
    expected = ((alpha * w) / sigma).round().clamp(-1, 1) * sigma / alpha
    assert alpha == 2 and torch.equal(codes("wage", w).dense(), expected)
    assert methods.layer_shift(torch.empty(3, 4), 8) == 1
    given = call(catalog()["wage"].acts, {}, {"a_bits": 3})
    assert given(torch.linspace(-2, 2, 500)).unique().tolist() == [i / 4 for i in range(-3, 4)]


def test_wage_steps_are_whole_numbers_with_the_right_mean():
    torch.manual_seed(0)
    g, lr = normal(6), 0.3
    wide = g.expand(100_000, 6)
    for eta in (1.0, 4.0):
        steps = methods._integer_steps(wide, lr, bits=2, g_bits=8, eta=eta) * lr * methods.layer_shift(wide, 2)
        reach = methods.ap2(g.abs().max())
        assert torch.allclose(steps * 128, (steps * 128).round(), atol=1e-9)
        assert ((steps.mean(0) - eta * g / reach / 128).abs() <= 4 * steps.std(0) / 100_000**0.5 + 1e-12).all()


def test_wage_steps_and_what_they_are_added_to_are_divided_by_alpha():
    g, w = normal(8, 75), normal(8, 75, seed=1) / 8
    steps = []
    for shape, alpha in (((8, 75), 2), ((40, 15), 1)):  # fan in 75 and 15
        torch.manual_seed(0)
        assert methods.layer_shift(g.reshape(shape), 2) == alpha
        steps.append(alpha * methods._integer_steps(g.reshape(shape), 0.3, bits=2, g_bits=8, eta=4.0).reshape(8, 75))
        held = methods._on_the_grid(w.reshape(shape), bits=2, g_bits=8).reshape(8, 75)
        assert torch.equal(held, (alpha * 128 * w).round().clamp(-127, 127) / (alpha * 128))
    assert torch.equal(*steps) and steps[0].any()


def test_wage_does_not_ask_how_large_gradients_are():
    def step(g, **knobs):
        torch.manual_seed(0)
        return methods._integer_steps(g, 0.1, bits=2, g_bits=8, eta=1.0)

    g = normal(5, 4)
    assert torch.equal(step(g), step(1024 * g)) and not torch.equal(step(g), step(1.7 * g))
    errors = catalog()["wage"].errors
    assert torch.equal(call(errors, {"g": 2.0**-20 * g}, {}), 2.0**-20 * call(errors, {"g": g}, {}))
    reach = methods.ap2(g.abs().max())
    assert torch.allclose(call(errors, {"g": g}, {}), reach * (g / reach * 128).round().clamp(-127, 127) / 128)
    assert not call(errors, {"g": 0 * g}, {}).any()


def test_wage_weights_stay_on_the_grid_and_learn(digits64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    copy = compress(model, "wage", eta=1.0)
    alpha, before = methods.layer_shift(model[1].weight, 2), latent(copy[1]).detach().clone()
    fit(copy, digits64, epochs=1, lr=0.05, optimizer=lambda p, lr, **_: torch.optim.SGD(p, lr=lr), keep_best=False)
    units = latent(copy[1]).detach() * alpha * 128
    assert torch.allclose(units, units.round(), atol=1e-9) and units.abs().max() <= 127 and not torch.equal(latent(copy[1]), before)


def test_wage_moves_by_its_step_whatever_the_rate():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 3, bias=False)).double()
    x, g = normal(5, 7), normal(5, 3, seed=1)
    moved = []
    for lr in (0.01, 1.0):
        copy = compress(model, "wage").train()
        rule = torch.optim.SGD(copy.parameters(), lr=lr)
        (hook,) = attached_hooks(copy)
        hook.after(copy, rule)
        was = latent(copy[0]).detach().clone()
        (copy(x) * g).sum().backward()
        torch.manual_seed(1)
        hook.gradients(copy, rule)
        rule.step()
        hook.after(copy, rule)
        moved.append(latent(copy[0]).detach() - was)
    assert torch.allclose(*moved, atol=1e-12) and moved[0].abs().max() >= 1 / 128


def test_wage_of_many_bits_is_descent_with_shifted_gradients():
    torch.manual_seed(0)
    x = normal(60, 10)
    y = x @ (0.3 * normal(10, 4, seed=1))
    model = nn.Sequential(nn.Linear(10, 4, bias=False)).double()
    w, alpha, eta = model[0].weight.detach().clone(), methods.layer_shift(model[0].weight, 8), 300.0
    curve = []
    copy = compress(model, "wage", bits=8, g_bits=16, e_bits=16).train()
    copy[0].parametrizations.weight[0].knobs["eta"] = eta  # beyond the slider: a step is eta 2^-15
    rule = torch.optim.SGD(copy.parameters(), lr=1.0)
    (hook,) = attached_hooks(copy)
    for _ in range(60):
        rule.zero_grad()
        ours = (copy(x) - y).square().mean()
        ours.backward()
        hook.gradients(copy, rule)
        rule.step()
        hook.after(copy, rule)
        g = 2 * (x @ w.T - y).T @ x / y.numel()
        curve.append((ours.item(), (x @ w.T - y).square().mean().item()))
        w = w - eta * g / methods.ap2(g.abs().max()) * 2.0**-15 / alpha
    assert curve[-1][1] < 0.5 * curve[0][1] and all(abs(a - b) < 0.02 * b + 1e-3 for a, b in curve)


# SYQ


@pytest.mark.parametrize("bits", [1, 2])
def test_syq_scales_are_learned_by_their_true_gradient(bits):
    w, g = normal(4, 3, 3, 3), normal(4, 3, 3, 3, seed=1)
    for name, count in (("pixel", 9), ("row", 3), ("layer", 1)):
        state = codes("syq", w, bits=bits, granularity=name).state
        assert state["alpha"].numel() == count

        def loss(alpha, w=w, name=name):
            packed = codes("syq", w, bits=bits, granularity=name, state={"alpha": alpha})
            return (packed.through(packed.values) * g).sum()

        assert torch.autograd.gradcheck(loss, state["alpha"].detach().clone().requires_grad_(True))
        latent_w = w.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(loss(state["alpha"], latent_w), latent_w)
        scale = state["alpha"].detach().reshape({"pixel": (1, 1, 3, 3), "row": (1, 1, 3, 1), "layer": (1, 1, 1, 1)}[name])
        assert torch.allclose(found, scale * g, rtol=1e-12)


def test_syq_multiplies_once_for_each_place_of_the_kernel():
    w, x = normal(4, 3, 3, 3), normal(2, 3, 8, 8, seed=1)
    packed = codes("syq", w, granularity="pixel")
    dense, alpha = packed.dense().detach(), packed.params.detach()
    q = (packed.index - 1).reshape(3, 3, 4, 3).double()
    parts = [alpha[3 * i + j] * F.conv2d(x[:, :, i : i + 6, j : j + 6], q[i, j][:, :, None, None]) for i in range(3) for j in range(3)]
    assert len(parts) == alpha.numel() == 9 and torch.allclose(F.conv2d(x, dense), sum(parts), atol=1e-10)
    assert torch.equal(q.permute(2, 3, 0, 1), torch.where(w.abs() > 0.05 * w.abs().max(), w.sign(), 0.0))


def test_syq_starts_at_the_best_scales_and_finer_groups_err_less():
    w = normal(4, 3, 3, 3) * torch.arange(1, 4)[:, None]
    error = {}
    for name, axes in (("pixel", (0, 1)), ("row", (0, 1, 3)), ("layer", (0, 1, 2, 3))):
        found = codes("syq", w, bits=1, granularity=name).dense().detach()
        assert torch.allclose(found, w.sign() * w.abs().mean(axes, keepdim=True), rtol=1e-12)
        error[name] = (found - w).square().sum()
    assert error["pixel"] < error["row"] < error["layer"]
    layer = codes("syq", w, granularity="layer").dense().detach()
    ttq = catalog()["trained_ternary_quantization"](w).dense().detach()
    assert torch.equal(layer.sign(), ttq.sign()) and layer.abs().unique().numel() == 2


def test_syq_inputs_are_unsigned_fixed_point():
    for top, unit in ((3.2, 4 / 16), (0.4, 0.5 / 16)):
        x = torch.linspace(0, top, 200, dtype=F64)
        given = call(catalog()["syq"].acts, {"x": x}, {"a_bits": 4})
        assert torch.equal(given(x), (x / unit).round().clamp(max=15) * unit) and given(torch.tensor([-1.0, 99.0])).tolist() == [0, 15 * unit]


# V-Quant


def test_the_largest_stay_and_the_rest_is_right_to_half_a_step():
    w = normal(20, 10)
    for percent, large in ((0.0, 0), (2.0, 4), (7.5, 15)):
        found = codes("value_aware_quantization", w, large_ratio_percent=percent, low_bits=3).dense()
        top = w.abs().flatten().sort(descending=True).values
        kept = w.abs() >= (top[large - 1] if large else 99)
        rest = w[~kept]
        assert kept.sum() == large and torch.equal(found[kept], w[kept])
        assert (found - w)[~kept].abs().max() <= (rest.max() - rest.min()) / 7 / 2 * (1 + 1e-9) and found[~kept].unique().numel() <= 8
    assert torch.equal(codes("value_aware_quantization", w, large_ratio_percent=100.0).dense(), w)


def test_the_gradient_of_a_split_weight_goes_straight_through():
    w, g = normal(20, 10).requires_grad_(True), normal(20, 10, seed=1)
    packed = codes("value_aware_quantization", w)
    assert torch.equal(torch.autograd.grad((packed.through(packed.values) * g).sum(), w)[0], g)


def test_a_few_large_ones_help_where_tails_are_heavy():
    heavy = normal(100, 50) / normal(100, 50, seed=1).abs().clamp(min=0.05)
    even = torch.rand(100, 50, generator=torch.Generator().manual_seed(0), dtype=F64)

    def error(w, percent):
        return (codes("value_aware_quantization", w, large_ratio_percent=percent).dense() - w).square().mean()

    assert error(heavy, 2.0) < 0.5 * error(heavy, 0.0) and error(even, 2.0) > 0.9 * error(even, 0.0)


@pytest.mark.parametrize(("layer", "shape"), [(CONV, (2, 3, 5, 5)), (DENSE, (6, 12))])
def test_quantized_back_propagation_changes_the_weights_gradient_alone(layer, shape):
    plain = deepcopy(layer).double()
    x = normal(*shape).clamp(min=0)
    g = normal(*plain(x).shape, seed=1)
    exact, found = (pass_back(one, x, g) for one in (plain, attached(layer, "value_aware_quantization", use="saved_activations")))
    assert torch.equal(found[0], exact[0]) and torch.equal(found[1], exact[1]) and not torch.allclose(found[2], exact[2], rtol=1e-3)
    method = catalog()["value_aware_quantization"]
    kept = call(method.saves, {"x": x}, method.bind({}))
    assert torch.allclose(found[2], pass_back(plain, kept, g)[2], rtol=1e-12) and (kept - x).abs().max() > 0
    attach_site(plain, Site(None, method, {"low_bits": 16, "use": "both", "large_ratio_percent": 2.0}))
    fine = pass_back(plain.train(), x, g)[2]
    assert torch.allclose(fine, exact[2], rtol=1e-3, atol=1e-4) and not torch.equal(fine, exact[2])
    assert call(method.saves, {"x": x}, {"use": "weights"}) is x


def test_v_quant_costs_its_codes_and_a_sparse_list():
    w = normal(100, 100).float()
    packed = codes("value_aware_quantization", w)
    rest, large = packed.terms
    assert rest.bits() == 3 * 10_000 + 64 and isinstance(large, Masked) and large.kept == 200
    assert 200 * 32 < large.bits() < 200 * (32 + 14 + 2) and packed.bits() == rest.bits() + large.bits()
    again = compress(nn.Sequential(nn.Linear(20, 5)), "magnitude_pruning_han", keep=0.5)
    pruned = plan_of(compress(again, "value_aware_quantization", large_ratio_percent=10.0))["0"]
    assert pruned.kept == 50 and pruned.dense().count_nonzero() <= 50 and len(pruned.codes.terms) == 2


@pytest.mark.parametrize(("key", "knob"), [("few_multiplications", {"min_exponent": -2}), ("value_aware_quantization", {"low_bits": 4})])
def test_knobs_of_what_is_kept_are_not_turned_afterwards(key, knob):
    with pytest.raises(ValueError, match="is a knob of inputs or gradients"):
        turn(compress(nn.Sequential(nn.Linear(6, 4)), key), **knob)
