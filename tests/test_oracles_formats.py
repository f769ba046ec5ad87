"""What proves the methods of ``methods/formats.py`` right: torch's own small floats, formats counted out by hand, exact whole numbers.

A claim that does not hold stands here with its counter-example.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cmlib.core.codes import GRIDS
from cmlib.core.method import call
from cmlib.core.rounding import Floating, round_float
from cmlib.core.training import attached_hooks
from cmlib.lab.verbs import compress
from cmlib.methods import catalog
from cmlib.methods import formats as methods

F64 = torch.float64

MUTATIONS = [
    ("flexpoint", "cmlib/methods/formats.py", "greatest = 2 ** (mantissa_bits - 1) - 1", "greatest = 2**mantissa_bits - 1", "the sign has no bit"),
    ("flexpoint", "cmlib/methods/formats.py", "(history.max() + 3 * history.std(correction=0))", "(history.max() + history.std(correction=0))",
     "one deviation, not three"),
    ("flexpoint", "cmlib/methods/formats.py", "if most <= reach else 2 * reach.reshape(1)",
     "if most <= reach else torch.cat([history, 2 * reach.reshape(1)])", "what was before an overflow is remembered"),
    ("fp8_training", "cmlib/methods/formats.py", "round_float(g * loss_scale, 5, mantissa_bits) / loss_scale", "round_float(g, 5, mantissa_bits)",
     "small gradients are not scaled up first"),
    ("fp8_training", "cmlib/methods/formats.py", "round_float(w, 6, 9, update_rounding)", "round_float(w, 6, 9)",
     "steps below half a unit are lost"),
    ("dettmers_8bit", "cmlib/core/codes.py", "(torch.arange(1 << n, dtype=params.dtype) + 0.5) / (1 << n)",
     "torch.arange(1 << n, dtype=params.dtype) / (1 << n)", "levels at the start of their interval, not in its middle"),
]  # fmt: skip


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes(key, w, **knobs):
    return call(catalog()[key].fn, {"w": w}, knobs)


# Flexpoint


@pytest.mark.parametrize("bits", [6, 8, 16])
def test_a_flex_tensor_is_right_to_half_a_step_and_as_fine_as_can_be(bits):
    for scale in (1e-3, 0.7, 1.0, 300.0):
        w = scale * normal(40, 5)
        packed = codes("flexpoint", w, mantissa_bits=bits, exponent_bits=5)
        step, half = packed.params[0].tolist()
        assert math.frexp(step)[0] == 0.5 and (packed.dense() - w).abs().max() <= step / 2
        assert w.abs().max() <= step * (half - 1) and (w.abs().max() > step / 2 * (half - 1) or step == 2.0**-23)
        assert torch.equal(codes("flexpoint", packed.dense(), mantissa_bits=bits, exponent_bits=5).dense(), packed.dense())


def test_products_of_flex_tensors_are_whole_numbers_with_the_exponents_added():
    a, b = codes("flexpoint", normal(20, 30)), codes("flexpoint", 7 * normal(30, 10, seed=1))
    m1, m2 = ((p.index - 32768).reshape(p.values.shape).numpy() for p in (a, b))
    exact = torch.from_numpy(m1 @ m2).double() * (a.params[0, 0] * b.params[0, 0])
    assert torch.equal(exact, a.dense() @ b.dense()) and np.abs(m1).max() > 2**13


def follow(series, **knobs):
    """(reach, state) of the inputs' grid for each of a series of tensors, before each comes."""
    acts, state, found = catalog()["flexpoint"].acts, None, []
    for x in series:
        given = call(acts, {"x": x}, {**knobs, "state": state})
        found.append(float(given.scale) * (given.count / 2 - 1))
        state = given.state
    return found


def test_autoflex_wastes_few_bits_and_overflows_at_most_once():
    still = [normal(200, seed=s) for s in range(400)]
    reach = follow(still, mantissa_bits=16)
    most = [x.abs().max().item() for x in still]
    over = [m > r for m, r in zip(most[1:], reach[1:], strict=True)]
    wasted = [math.log2(r / m) for m, r in zip(most[1:], reach[1:], strict=True)]
    # the check's bound of 2 bits holds for less headroom; with 2 and three deviations one to three bits are spare
    assert sum(over) == 0 and 1 < np.mean(wasted) < 3
    wasted = [math.log2(r / m) for m, r in zip(most[1:], follow(still, mantissa_bits=16, autoflex_headroom=1.0)[1:], strict=True)]
    assert np.mean(wasted) < 2
    jump = [torch.full((4,), v, dtype=F64) for v in [1.0] * 20 + [4.0] * 20]
    over = [x.max().item() > r for x, r in zip(jump, follow(jump, mantissa_bits=16), strict=True)]
    assert sum(over) == 1 and over[20]


def test_autoflex_expects_three_deviations_more_than_the_largest():
    assert methods.predicted(torch.tensor([1.0, 3.0]), 2.0) == 2 * (3 + 3 * 1)


def test_autoflex_remembers_no_more_than_it_is_told():
    acts, state = catalog()["flexpoint"].acts, None
    for value in range(1, 9):
        state = call(acts, {"x": torch.tensor([1 + value / 100])}, {"history_length": 4, "state": state}).state
    assert torch.allclose(state["history"], torch.tensor([1.05, 1.06, 1.07, 1.08]))


def test_autoflex_forgets_what_was_before_an_overflow():
    acts, state = catalog()["flexpoint"].acts, None
    for value in (1.0, 1.1, 1.2, 90.0):
        given = call(acts, {"x": torch.tensor([value])}, {"state": state})
        state = given.state
    reach = given.scale.item() * (2**15 - 1)
    assert reach < 90 and state["history"].tolist() == [pytest.approx(2 * reach)]


def test_what_is_far_below_the_largest_is_lost():
    w = torch.tensor([1.0, 2.0**-14, 2.0**-16, -(2.0**-17)], dtype=F64)
    assert codes("flexpoint", w).dense().tolist() == [1.0, 2.0**-14, 0.0, 0.0]


def test_flex_errors_are_gradients_to_half_a_step_of_their_own():
    for scale in (1e-9, 1.0, 1e6):
        g = scale * normal(30, 8)
        step = 2.0 ** math.floor(math.log2(g.abs().max().item() / 127)) * 2
        found = call(catalog()["flexpoint"].errors, {"g": g}, {"mantissa_bits": 8})
        assert (found - g).abs().max() <= step / 2 and found.unique().numel() > 50
    assert call(catalog()["flexpoint"].errors, {"g": torch.zeros(3)}, {}).tolist() == [0, 0, 0]


# 8-bit floating point


def every_half():
    """All finite numbers of 16 bits."""
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    return x[x.isfinite()]


@pytest.mark.parametrize(("exponent", "mantissa", "kind"), [(5, 2, torch.float8_e5m2), (5, 10, torch.float16), (8, 7, torch.bfloat16)])
def test_small_floats_are_torchs_and_saturate(exponent, mantissa, kind):
    x = torch.cat([every_half(), normal(30_000).float().double(), 1e-4 * normal(30_000, seed=1).float().double()])
    cast = x.float().to(kind).double()
    found = round_float(x, exponent, mantissa)
    assert torch.equal(found[cast.isfinite()], cast[cast.isfinite()])
    most = torch.finfo(kind).max
    assert (found[~cast.isfinite()].abs() == most).all() and round_float(torch.tensor([1e9, -1e39], dtype=F64), 5, 2).tolist() == [57344, -57344]


def test_the_levels_of_eight_bit_floats_are_all_that_torch_has():
    packed = codes("fp8_training", normal(5, 4))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).double()
    assert torch.equal(packed.levels[0], every[every.isfinite()].unique()) and packed.width == 8
    w = torch.cat([every_half(), normal(1000)])
    assert torch.equal(codes("fp8_training", w).dense(), round_float(w, 5, 2))


def test_sums_stall_unless_they_are_taken_in_chunks():
    ones = torch.ones(4096)
    assert methods.chunked_sum(ones, 4096) == methods.chunked_sum(ones, 1) == 1024  # round to even: 1024 + 1 is 1024
    assert methods.chunked_sum(ones.repeat(16), 64) == 65536
    x = torch.rand(20, 4096, generator=torch.Generator().manual_seed(0))
    error = {c: ((methods.chunked_sum(x, c) - x.sum(1)) / x.sum(1)).abs().mean().item() for c in (1, 8, 64, 512, 4096)}
    assert error[1] == error[4096] and 0.4 < error[1] < 0.6 and max(error[c] for c in (8, 64, 512)) < 0.005


def test_rounding_by_chance_keeps_the_mean_and_small_steps():
    draws = 200_000
    x = torch.tensor([1.0 + 2**-12, -3.3, 5e-9, 0.0], dtype=F64).expand(draws, 4)
    found = round_float(x, 6, 9, "stochastic")
    assert ((found.mean(0) - x[0]).abs() <= 4 * found.std(0) / draws**0.5).all() and found[:, :3].std(0).min() > 0
    w, steps, many = torch.ones(500), 10_000, torch.full((500,), 2.0**-12)
    assert torch.equal(round_float(torch.ones(3) + 2.0**-12, 6, 9), torch.ones(3))  # for ever: nearest loses every step
    for _ in range(steps):
        w = round_float(w + many, 6, 9, "stochastic")
    assert (w.mean() - 1 - steps * 2.0**-12).abs() <= 4 * w.std() / 500**0.5


def test_fp8_training_keeps_weights_of_sixteen_bits():
    torch.manual_seed(0)
    copy = compress(nn.Sequential(nn.Linear(6, 4)).double(), "fp8_training", update_rounding="nearest").train()
    w = copy[0].parametrizations.weight.original
    was = w.detach().clone()
    (hook,) = attached_hooks(copy)
    hook.after(copy, torch.optim.SGD(copy.parameters(), lr=0.1))
    assert torch.equal(w, round_float(was, 6, 9)) and not torch.equal(w, was)


def test_fp8_training_gathers_steps_below_half_a_unit_by_chance_only():
    torch.manual_seed(0)
    up = {}
    for rounding in ("stochastic", "nearest"):
        copy = compress(nn.Sequential(nn.Linear(100, 100)).double(), "fp8_training", update_rounding=rounding).train()
        w = copy[0].parametrizations.weight.original
        w.data.fill_(1 + 0.25 * 2**-9)
        (hook,) = attached_hooks(copy)
        hook.after(copy, torch.optim.SGD(copy.parameters(), lr=0.1))
        assert ((w == 1) | (w == 1 + 2**-9)).all()
        up[rounding] = (w > 1).double().mean().item()
    assert abs(up["stochastic"] - 0.25) < 5 * (0.25 * 0.75 / 10_000) ** 0.5 and up["nearest"] == 0


def test_fp8_errors_are_scaled_first():
    g = torch.tensor([1e-6, 3.3e-7, -2.0], dtype=F64)  # the least of (1, 5, 2) is 2^-16
    found = call(catalog()["fp8_training"].errors, {"g": g}, {"loss_scale": 1024.0})
    assert torch.equal(found, (g * 1024).float().to(torch.float8_e5m2).double() / 1024) and found.all()
    assert not call(catalog()["fp8_training"].errors, {"g": g}, {"loss_scale": 1.0})[:2].any()


def test_fp8_inputs_are_stored_as_a_format():
    given = call(catalog()["fp8_training"].acts, {}, {})
    x = normal(50).requires_grad_(True)
    assert torch.equal(given(x), x.detach().float().to(torch.float8_e5m2).double()) and given.count == 247
    assert torch.equal(torch.autograd.grad((given(x) ** 2).sum(), x)[0], 2 * given(x).detach())
    back = Floating.decode(given.arrays(), given.meta())
    assert torch.equal(back(x.detach()), given(x.detach()))
    with pytest.raises(ValueError, match="an exponent has 2 to 8 bits"):
        Floating.decode({"floating": np.array([99.0, 2.0])}, given.meta())


# The dynamic tree


def by_hand(byte):
    """What eight bits stand for, read from the left: a sign, zeros, a one, a fraction."""
    text = f"{byte:08b}"
    rest = text[1:].lstrip("0")
    if not rest:
        return 0.0 if text[0] == "0" else 1.0
    zeros, fraction = 7 - len(rest), rest[1:]
    n = len(fraction)
    size = 10.0**-zeros * (0.1 + 0.9 * ((int(fraction, 2) if n else 0) + 0.5) / 2**n)
    return -size if text[0] == "1" else size


def levels():
    return GRIDS["tree"](torch.ones(1, 1, dtype=F64), 256)[0]


def test_the_tree_is_the_one_that_its_bits_spell():
    assert torch.allclose(levels(), torch.tensor(sorted(map(by_hand, range(256))), dtype=F64), rtol=1e-12)
    assert levels().unique().numel() == 256 and levels().max() == 1 and -1 < levels().min() < -0.99 and (levels() == 0).sum() == 1


def test_the_tree_is_the_map_of_bitsandbytes():
    """Its create_dynamic_map in three lines: the middles of 2^i + 1 even boundaries from 0.1 to 1, times 10^(i - 6), both signs, 0 and 1."""
    edges = [np.linspace(0.1, 1, 2**i + 1) for i in range(7)]
    half = np.concatenate([10.0 ** (i - 6) * (e[1:] + e[:-1]) / 2 for i, e in enumerate(edges)])
    assert np.allclose(levels().numpy(), np.sort(np.concatenate([-half, half, [0, 1]])), rtol=1e-12)


@pytest.mark.parametrize("datatype", ["dynamic_tree", "linear8"])
def test_numbers_go_to_the_nearest_level_and_stay(datatype):
    w = normal(6, 50) * normal(6, 50, seed=1).exp() ** 3
    packed = codes("dettmers_8bit", w, datatype=datatype, per="filter")
    rows = torch.cat([(row[:, None] - table).abs().min(1).values[None] for row, table in zip(w, packed.levels, strict=True)])
    assert torch.allclose((packed.dense() - w).abs(), rows, rtol=1e-12) and torch.allclose(packed.levels.amax(1), w.abs().amax(1))
    again, *_ = methods.eight_bits(packed.levels, datatype, "filter")
    assert torch.equal(again, torch.arange(packed.count).expand(6, -1))


def test_the_tree_is_relatively_right_over_powers_of_ten_and_even_levels_on_even_numbers():
    g = 10 ** (-6 * torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=F64)) * normal(4000).sign()
    even = 2 * torch.rand(4000, generator=torch.Generator().manual_seed(1), dtype=F64) - 1
    tree, line = ([codes("dettmers_8bit", x, datatype=d).dense() for x in (g, even)] for d in ("dynamic_tree", "linear8"))
    assert ((tree[0] - g).abs() / g.abs()).mean() < 0.2 < 0.5 < ((line[0] - g).abs() / g.abs()).mean()
    assert (line[1] - even).abs().mean() < 0.8 * (tree[1] - even).abs().mean()


def test_two_workers_that_send_eight_bits_learn_what_one_learns(digits64):
    x, y = digits64[0][:200].flatten(1), digits64[1][:200]

    def run(parts, send):
        w = torch.zeros(10, 64, dtype=F64, requires_grad=True)
        for _ in range(60):
            loss = [nn.functional.cross_entropy(x[p] @ w.T, y[p]) for p in parts]
            g = sum(send(torch.autograd.grad(one, w)[0]) for one in loss) / len(parts)
            w = (w - 0.3 * g).detach().requires_grad_(True)
        return nn.functional.cross_entropy(x @ w.T, y).item(), w

    halves = [slice(0, 100), slice(100, 200)]
    alone, both = run([slice(0, 200)], lambda g: g), run(halves, lambda g: g)
    assert torch.allclose(alone[1], both[1], rtol=1e-9, atol=1e-12)
    sent = run(halves, lambda g: call(catalog()["dettmers_8bit"].errors, {"g": g}, {}))
    assert sent[0] == pytest.approx(both[0], rel=0.02) and not torch.equal(sent[1], both[1])
    g = normal(8, 9)
    assert call(catalog()["dettmers_8bit"].errors, {"g": g}, {"compress_errors": "off"}) is g
    assert not call(catalog()["dettmers_8bit"].errors, {"g": 0 * g}, {}).any()
