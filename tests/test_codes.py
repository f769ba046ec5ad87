"""Weights as codes: what they stand for, what they cost, how they are stored, and what training sees of them."""

import json
import tracemalloc
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cmlib import coded, compress, fit, load, load_net, measure, save
from cmlib.core import storage
from cmlib.core.apply import attach_plan, plan_of, substituted, with_plain_weights
from cmlib.core.codes import Codes, SparseCodes, Sum, grouped, nearest_level
from cmlib.core.inputs import as_input
from cmlib.core.knobs import Bits, Per, Pick
from cmlib.core.method import quantizer
from cmlib.core.packed import Masked
from cmlib.core.wrapped import CODERS, TYPES, entropy_coded
from cmlib.lab.files import sizes
from cmlib.methods import catalog


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(w, params, grid, count, **how):
    """``w`` rounded to the nearest level of each group."""
    found = Codes(w, torch.zeros(len(params), w.numel() // len(params), dtype=torch.int64), params, count, grid, **how)
    return replace(found, index=nearest_level(w.reshape(len(params), -1), found.levels))


@quantizer("a test", chapter="00")
def uniform(w, *, bits: Bits = 4, per: Per = "tensor"):
    """Evenly spaced levels around zero."""
    g = grouped(w, per)
    scale = g.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / ((2**bits - 1) / 2)
    index = (g / scale + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1).long()
    return Codes(w, index, scale.detach(), 2**bits)


LEVELS = [
    ("linear", [[0.5]], 4, [-0.75, -0.25, 0.25, 0.75]),
    ("linear", [[0.5]], 2, [-0.25, 0.25]),
    ("linear", [[0.5]], 3, [-0.5, 0, 0.5]),
    ("linear", [[0.5, 1.0]], 4, [-0.5, 0, 0.5, 1]),
    ("powers", [[-1.0]], 7, [-0.5, -0.25, -0.125, 0, 0.125, 0.25, 0.5]),
    ("basis", [[0.5, 2.0]], 4, [-2.5, -1.5, 1.5, 2.5]),
    ("table", [[3.0, 1.0, 2.0]], 3, [3, 1, 2]),
]


@pytest.mark.parametrize("grid, params, count, levels", LEVELS)
def test_levels_of_each_grid(grid, params, count, levels):
    params = torch.tensor(params, dtype=torch.float64)
    found = Codes(torch.zeros(1, count), torch.arange(count)[None], params, count, grid)
    assert found.levels[0].tolist() == levels
    assert found.dense().flatten().tolist() == levels
    assert found.width == int(np.ceil(np.log2(count)))


def test_every_group_has_its_own_levels():
    w = drawn(4, 3, 2)
    found = codes(w, torch.tensor([[1.0], [0.5], [0.25], [2.0]], dtype=torch.float64), "linear", 4)
    for row, step in enumerate((1.0, 0.5, 0.25, 2.0)):
        assert set((found.dense()[row] / step).flatten().tolist()) <= {-1.5, -0.5, 0.5, 1.5}


@pytest.mark.parametrize("columns", [False, True])
def test_vectors_of_a_codebook_lie_along_the_rows(columns):
    w, d = torch.arange(24.0).reshape(4, 6), 3
    if columns:  # a codebook for each run of three columns, in which each row's run stands
        params = torch.stack([w[:, :3], w[:, 3:]])
        index = torch.arange(4).expand(2, 4)
    else:
        params, index = w.reshape(1, 8, d), torch.arange(8)[None]
    found = Codes(w, index, params, params.shape[1], "table", columns)
    assert torch.equal(found.dense(), w)


def test_grouped_runs_divide_the_rows():
    w = drawn(5, 4, 25)
    assert grouped(w, "tensor").shape == (1, 500) and grouped(w, "filter").shape == (5, 100)
    assert grouped(w, "group").shape == (20, 25) and torch.equal(grouped(w, "group").reshape(w.shape), w)
    with pytest.raises(ValueError, match=r"per='filter' needs whole rows.*per='tensor'"):
        grouped(w.flatten(), "filter")


def test_nearest_level_is_the_argmin_for_levels_in_any_order():
    w, levels = drawn(3, 500), drawn(3, 7, seed=1)
    best = (w[:, :, None] - levels[:, None]).abs().argmin(2)
    assert torch.equal(nearest_level(w, levels), best)


def values_of_every_type():
    w, mask = drawn(6, 10), drawn(6, 10, seed=2) > 0.3
    step = torch.tensor([[0.3]], dtype=torch.float64)
    vector = codes(w[mask], step, "linear", 16)
    yield "codes", codes(w, step, "linear", 16)
    yield "five levels", codes(w, step, "linear", 5)
    yield "one level", Codes(w, torch.zeros(1, 60, dtype=torch.int64), step, 1, "table")
    yield "columns", Codes(w, torch.arange(12).reshape(2, 6) % 4, drawn(2, 4, 5), 4, "table", columns=True)
    yield "sparse codes", SparseCodes(w, mask, vector)
    yield "sparse codes, 2-bit gaps", SparseCodes(w, mask, vector, 2)
    yield "sum", Sum(w, (codes(w, step, "linear", 4), Masked(w, mask, "bitmap")))


EVERY = dict(values_of_every_type())


@pytest.mark.parametrize("name", EVERY)
def test_what_is_written_is_what_is_counted_and_comes_back(name):
    packed = EVERY[name]
    arrays, meta = packed.arrays(), json.loads(json.dumps(packed.meta()))
    assert packed.bits() == 8 * sum(a.nbytes for a in arrays.values())
    back = TYPES[meta["type"]].decode({n: np.frombuffer(a.tobytes(), a.dtype) for n, a in arrays.items()}, meta)
    assert torch.equal(back.dense(), packed.dense()) and torch.equal(back.mask, packed.mask)
    assert back.frozen().bits() == packed.bits()


def test_three_bits_take_three_bits():
    w = drawn(100, 80)
    packed = codes(w, torch.tensor([[0.5]], dtype=torch.float64), "linear", 8)
    assert packed.bits() == 3 * 8000 + 64  # the scale is a float64 here


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gaps_with_escapes_are_their_own_inverse(k):
    for places in ([], [0], [7], [0, 1, 2], [3, 40, 41, 200], list(range(0, 300, 7))):
        numbers = storage.with_escapes(np.array(places, np.int64), k)
        assert storage.without_escapes(numbers, k).tolist() == places
        assert numbers.max(initial=0) < 1 << k


def test_sparse_codes_take_the_cheapest_way_to_say_where_weights_sit():
    w = drawn(50, 100)
    few, many = w.abs() > 2, w.abs() > 0.3
    step = torch.tensor([[0.5]], dtype=torch.float64)
    assert "gaps" in SparseCodes(w, few, codes(w[few], step, "linear", 4)).format()
    assert "bitmap" in SparseCodes(w, many, codes(w[many], step, "linear", 4)).format()
    sizes = [SparseCodes(w, few, codes(w[few], step, "linear", 4), k).bits() for k in range(2, 9)]
    assert SparseCodes(w, few, codes(w[few], step, "linear", 4)).bits() == min(sizes)


BROKEN = [
    ("a code beyond the levels", "codes", lambda a, m: a["codes"].__setitem__(slice(None), 255), {"count": 5}),
    ("too few codes", "codes", lambda a, m: a.update(codes=a["codes"][:-1]), {}),
    ("more codes than weights", "codes", lambda a, m: m.update(codes=61), {}),
    ("a million levels", "codes", lambda a, m: m.update(count=1_000_000), {}),
    ("a grid that nobody knows", "codes", lambda a, m: m.update(grid="eval"), {}),
    ("a level that is not finite", "codes", lambda a, m: a["params"].fill(np.nan), {}),
    ("params of another size", "codes", lambda a, m: a.update(params=np.zeros(3)), {}),
    ("entries beyond the shape", "sparse codes, 2-bit gaps", lambda a, m: m.update(entries=10**12), {}),
    ("places beyond the shape", "sparse codes, 2-bit gaps", lambda a, m: a["gaps"].fill(0xAA), {}),
    ("terms of another shape", "sum", lambda a, m: m["terms"][0].update(shape=[10, 6]), {}),
]


@pytest.mark.parametrize("what, name, spoil, more", BROKEN, ids=[b[0] for b in BROKEN])
def test_a_spoilt_file_is_a_value_error(what, name, spoil, more):
    packed = EVERY["five levels" if more else name]
    arrays, meta = {n: a.copy() for n, a in packed.arrays().items()}, json.loads(json.dumps(packed.meta()))
    spoil(arrays, meta)
    with pytest.raises(ValueError):
        TYPES[meta["type"]].decode(arrays, meta)


def test_params_have_their_true_gradient_and_values_the_straight_one():
    w, params = drawn(2, 8).requires_grad_(), drawn(2, 4, seed=1).requires_grad_()
    index = torch.arange(16).reshape(2, 8) % 4
    g = drawn(2, 8, seed=3)
    (Codes(w, index, params, 4, "table").through(w) * g).sum().backward()
    assert torch.equal(w.grad, g)
    for group in range(2):
        for level in range(4):
            assert params.grad[group, level] == pytest.approx(g[group][index[group] == level].sum().item(), abs=1e-12)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def images(n=60):
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 8, 8, generator=draw)
    return x, (x.mean((1, 2, 3)) * 300).long() % 3


def test_a_three_bit_network_loads_to_bit_equal_outputs_and_its_file_is_what_bits_says(tmp_path):
    model = compress(net(), uniform, bits=3)
    written = save(model, tmp_path / "three.safetensors")
    back = load(tmp_path / "three.safetensors", into=net())
    assert torch.equal(back(images()[0]), model(images()[0]))
    plan = plan_of(model)
    biases = sum(p.nbytes for n, p in net().named_parameters() if "bias" in n)
    header = written - sum(p.bits() for p in plan.values()) // 8 - biases
    row = measure(model)
    assert row.header_bytes == header and row.weight_bits == pytest.approx(sum(p.bits() for p in plan.values()) / sum(p.kept for p in plan.values()))


def test_training_goes_through_the_codes_to_the_latent_weight():
    model = compress(net(), uniform, bits=2)
    before = model[3].parametrizations.weight.original.detach().clone()
    run = fit(model, images(), epochs=3, lr=1e-2)
    assert not torch.equal(before, model[3].parametrizations.weight.original)
    assert len(model[3].weight.unique()) <= 4 and run.rows[-1]["loss"] < run.rows[0]["loss"]


def test_codes_of_what_pruning_left_stay_where_they_are(tmp_path):
    pruned = compress(net(), "magnitude_pruning_han", keep=0.25)
    model = compress(pruned, uniform, bits=3)
    gone = {n: ~p.mask for n, p in plan_of(pruned).items()}
    fit(model, images(), epochs=2, lr=1e-2)
    for name, packed in plan_of(model).items():
        assert isinstance(packed, SparseCodes) and (packed.dense()[gone[name]] == 0).all()
        assert len(packed.dense()[~gone[name]].unique()) <= 8
    save(model, tmp_path / "both.safetensors")
    assert torch.equal(load(tmp_path / "both.safetensors", into=net())(images()[0]), model.eval()(images()[0]))


def test_a_layer_of_which_nothing_is_left_stays_empty():
    pruned = attach_plan(net(), {"3": Masked(torch.zeros(12, 144), torch.zeros(12, 144, dtype=torch.bool))})
    plan = plan_of(compress(pruned, uniform, bits=3))
    assert plan["3"].kept == 0 and plan["0"].kept == 36


def test_the_original_is_untouched_and_a_copy_is_its_own():
    model = net()
    before = deepcopy(model.state_dict())
    small = compress(model, uniform, bits=2)
    twin = deepcopy(small)
    fit(twin, images(), epochs=1, lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(small(images()[0]), with_plain_weights(small)(images()[0]))
    assert not torch.equal(small(images()[0]), twin(images()[0]))


def test_the_plan_says_what_the_panel_computes_with():
    plan = plan_of(compress(net(), uniform, bits=3))
    weights = substituted(net(), plan)
    out = torch.func.functional_call(net(), weights, (images()[0],))
    assert torch.equal(out, compress(net(), uniform, bits=3)(images()[0]))


def test_a_model_in_double_precision_takes_its_codes_along():
    model = compress(net(), uniform, bits=3)
    loaded = attach_plan(net(), plan_of(model)).double()
    assert loaded[3].weight.dtype == torch.float64
    assert torch.allclose(loaded(images()[0].double()), model(images()[0]).double(), atol=1e-6)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_outside_the_knob_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits=.* is not allowed: bits is a whole number from 1 to 8"):
        compress(net(), uniform, bits=bits)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("name", EVERY)
def test_an_entropy_code_changes_nothing_but_the_bytes(name, coder):
    packed = entropy_coded(EVERY[name], coder)
    arrays, meta = packed.arrays(), json.loads(json.dumps(packed.meta()))
    assert packed.bits() == 8 * sum(a.nbytes for a in arrays.values())
    back = TYPES[meta["type"]].decode({n: np.frombuffer(a.tobytes(), a.dtype) for n, a in arrays.items()}, meta)
    assert torch.equal(back.dense(), EVERY[name].dense()) and type(back.inner) is type(EVERY[name])


@pytest.mark.parametrize("coder", CODERS)
def test_a_coded_file_is_smaller_and_the_same_network(coder, tmp_path):
    pruned = compress(load_net("lenet300", "mnist"), "magnitude_pruning_han", keep=0.1)
    plain = compress(pruned, uniform, bits=5)
    small = coded(plain, coder)
    length = {name: save(m, tmp_path / name) for name, m in (("pruned", pruned), ("plain", plain), ("coded", small))}
    assert length["coded"] < 0.9 * length["plain"] < 0.4 * length["pruned"]
    x = torch.rand(9, 1, 28, 28)
    assert torch.equal(load(tmp_path / "coded")(x), plain(x)) and torch.equal(small(x), plain(x))
    found = sizes(tmp_path / "coded")
    assert found["file"] == length["coded"] == found["header"] + found["arrays"] and 0 < found["indices"] < sum(found["layers"].values())


def test_coded_says_what_it_can_do():
    with pytest.raises(ValueError, match=r"coder='zip' is not allowed: coder is one of huffman, ans"):
        coded(compress(net(), uniform), "zip")
    with pytest.raises(ValueError, match="nothing is attached"):
        coded(net())


@pytest.mark.parametrize("grid", ["linear", "powers", "basis"])
def test_levels_that_a_small_file_would_make_many_of_are_refused_before_they_are_made(grid):
    meta = {"type": "codes", "grid": grid, "count": 65_536, "columns": False, "shape": [2048], "params": [2048, 1], "codes": 1}
    arrays = {"params": np.zeros((2048, 1), np.float32), "codes": np.zeros(4096, np.uint8)}
    tracemalloc.start()
    with pytest.raises(ValueError, match="2,048 groups of 65,536 levels are too many for 2,048 weights"):
        Codes.decode(arrays, meta)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_level_beyond_what_a_float_holds_is_refused():
    packed = Codes(torch.ones(4), torch.zeros(1, 4, dtype=torch.long), torch.tensor([[1000.0]]), 5, "powers")
    with pytest.raises(ValueError, match="a level is not finite"):
        Codes.decode(packed.arrays(), packed.meta())


def test_rows_without_a_run_to_share_a_scale_are_refused():
    assert grouped(torch.ones(4, 66), "group").shape == (12, 22) and grouped(torch.ones(4, 5), "group").shape == (4, 5)
    with pytest.raises(ValueError, match="37 weights do not allow; use per='filter'"):
        grouped(torch.ones(10, 37), "group")


QUANTIZERS = [m for m in catalog().values() if m.kind == "quantizer"]
CHOICES = [(m, {n: v}) for m in QUANTIZERS for n, k in m.knobs.items() if isinstance(k.span, Pick) for v in k.span.choices] + [
    (m, {}) for m in QUANTIZERS
]


@pytest.mark.parametrize(("method", "knobs"), CHOICES, ids=[f"{m.key}-{k}" for m, k in CHOICES])
def test_every_quantizer_after_pruning_is_saved_and_trains(method, knobs, tmp_path, digits):
    pruned = compress(load_net("mlp", "digits"), "magnitude_pruning_han", keep=0.3)
    try:
        model = compress(pruned, method, data=digits, **knobs)
    except ValueError as error:
        assert "single weights are left" in str(error)  # filters and groups need whole rows
        return
    masks = {n: p.mask for n, p in plan_of(model).items()}
    fit(model, digits, epochs=1, lr=1e-3)
    for again in (model, coded(model)):
        save(again, tmp_path / "model")
        back = load(tmp_path / "model")
        x = as_input(digits.validation[0])
        assert torch.equal(back(x), again.eval()(x))
        assert all(torch.equal(p.mask, masks[n]) and not p.dense()[~masks[n]].any() for n, p in plan_of(back).items())


def test_a_sum_whose_terms_claim_another_shape_is_refused_before_anything_is_decoded():
    packed = entropy_coded(plan_of(compress(load_net("mlp", "digits"), "inq", bits=5, portion=0.5))["fc1"], "ans")
    arrays, meta = packed.arrays(), packed.meta()
    meta["inner"]["terms"][1]["shape"] = [65_537, 64]
    tracemalloc.start()
    with pytest.raises(ValueError, match="the terms of a sum are not of its shape"):
        type(packed).decode(arrays, meta)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_groups_may_lie_along_any_axes():
    w = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    axes = (2, 3, 0, 1)
    rows = w.permute(axes).reshape(10, -1)
    scale = rows.abs().mean(1, keepdim=True)
    packed = Codes(w, (rows >= 0).long(), 2 * scale, 2, axes=axes)
    assert torch.allclose(packed.dense(), scale.reshape(2, 5)[None, None] * torch.where(w >= 0, 1.0, -1.0))
    back = Codes.decode(packed.arrays(), packed.meta())
    assert torch.equal(back.dense(), packed.dense())
    with pytest.raises(ValueError, match=r"\[0, 0, 1, 2\] are not the axes of a weight of 4"):
        Codes.decode(packed.arrays(), {**packed.meta(), "axes": [0, 0, 1, 2]})
