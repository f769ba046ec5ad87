"""What a layer's inputs are rounded to: the rounding, its gradient, where it stands, and what a file keeps of it."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmlib import coded, compress, evaluate, fit, load, load_net, measure, save
from cmlib.core.apply import plan_of, with_plain_weights
from cmlib.core.codes import Codes
from cmlib.core.knobs import WideBits
from cmlib.core.method import quantizer
from cmlib.core.packed import State
from cmlib.core.rounding import INPUTS, Affine, Steps
from cmlib.core.sites import inputs_at, site_of, spread_of
from cmlib.core.wrapped import Sited
from cmlib.lab.files import FileError


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STEPS = Steps(torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([-2.0, -0.5, 0.5, 3.0]))


def test_steps_are_what_their_thresholds_say_and_a_threshold_belongs_above():
    x = torch.tensor([-9.0, -1.0, -0.5, 0.0, 1.9, 2.0, 9.0])
    assert STEPS(x).tolist() == [-2, -0.5, -0.5, 0.5, 0.5, 3, 3]


def test_affine_is_torchs_own_fake_quantization():
    x = 3 * drawn(20_000)
    for count, scale, zero in ((256, 0.03, 128.0), (16, 0.4, 5.0), (4, 1.0, 0.0)):
        found = Affine(torch.tensor(scale), torch.tensor(zero), count)(x)
        assert torch.equal(found, torch.fake_quantize_per_tensor_affine(x, scale, int(zero), 0, count - 1))


def test_gradient_passes_between_the_outer_levels_and_by_the_slope_that_is_given():
    x = torch.tensor([-3.0, -2.0, 0.1, 3.0, 3.1], requires_grad=True)
    STEPS(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]
    other = x.detach().clone().requires_grad_()
    Steps(STEPS.thresholds, STEPS.levels, slope=lambda v: v.abs())(other).sum().backward()
    assert torch.equal(other.grad, other.detach().abs())
    third = torch.tensor([-0.6, -0.4, 0.0, 2.4, 2.6], requires_grad=True)
    Affine(torch.tensor(1.0), torch.tensor(0.0), 3)(third).sum().backward()
    assert third.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "given", [STEPS, Steps(torch.zeros(1), torch.tensor([-1.0, 1.0]), spread=True), Affine(torch.tensor(0.1), torch.tensor(3.0), 16)]
)
def test_an_input_comes_back_from_disk(given):
    arrays, meta = given.arrays(), json.loads(json.dumps(given.meta()))
    back = INPUTS[meta["type"]].decode({n: np.frombuffer(a.tobytes(), a.dtype) for n, a in arrays.items()}, meta)
    x = 2 * drawn(1000)
    assert torch.equal(back(x), given(x)) and back.spread == given.spread


BROKEN = [
    (STEPS, "levels", np.array([1.0, np.nan, 2.0, 3.0], np.float32)),
    (STEPS, "levels", np.zeros(3, np.float32)),
    (STEPS, "thresholds", np.array([2.0, 1.0, 0.0], np.float32)),
    (Affine(torch.tensor(0.1), torch.tensor(3.0), 16), "affine", np.array([0.0, 1.0], np.float32)),
    (Affine(torch.tensor(0.1), torch.tensor(3.0), 16), "affine", np.array([np.inf, 1.0], np.float32)),
]


@pytest.mark.parametrize("given, name, array", BROKEN)
def test_a_spoilt_input_is_a_value_error(given, name, array):
    with pytest.raises(ValueError):
        type(given).decode({**given.arrays(), name: array}, given.meta())


@quantizer("a test", chapter="00")
def without(w):
    """Weights to the signs of themselves, inputs left alone."""
    return Codes(w, (w >= 0).long().reshape(1, -1), w.new_full((1, 1), 0.2), 2)


def _moving(x, training, *, a_bits: WideBits = 2, state: State | None = None):
    if a_bits == 32:
        return None
    top = x.abs().max()
    top = 0.9 * state["top"] + 0.1 * top if state and training else top
    return Affine(2 * top / (2**a_bits - 1), torch.tensor(2.0 ** (a_bits - 1)), 2**a_bits, state={"top": top})


def _coarse(g, *, g_bits: WideBits = 32):
    return g if g_bits == 32 else g.sign() * 1e-3


@quantizer("a test", chapter="00", acts=_moving, errors=_coarse)
def moving(w):
    """Signs, inputs in a range that follows them, gradients of one size."""
    return Codes(w, (w >= 0).long().reshape(1, -1), w.detach().abs().mean().reshape(1, 1) * 2, 2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)).eval()


def images(n=60):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, (x.mean((1, 2, 3)) * 300).long() % 3


def test_the_image_is_left_as_it_is_and_every_other_input_is_rounded():
    model = compress(net(), moving, data=images())
    assert {n: isinstance(p, Sited) for n, p in plan_of(model).items()} == {"0": False, "2": True, "4": True}
    seen = {}
    for name in ("0", "2", "4"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, n=name: seen.update({n: i[0]}))
    model(images()[0])
    assert {n: len(x.unique()) <= 4 for n, x in seen.items()} == {"0": False, "2": True, "4": True}


def test_32_bits_leave_inputs_alone_and_need_no_data():
    assert not any(isinstance(p, Sited) for p in plan_of(compress(net(), moving, a_bits=32)).values())
    assert not any(isinstance(p, Sited) for p in plan_of(compress(net(), without)).values())


def test_ranges_follow_the_inputs_in_training_and_stand_still_in_evaluation():
    model = compress(net(), moving, data=images())
    first = site_of(model[2]).input.scale.clone()
    model(10 * images()[0])
    assert torch.equal(site_of(model[2]).input.scale, first)
    model.train()(10 * images()[0])
    assert site_of(model[2]).input.scale > first
    before = [p.clone() for p in model.parameters()]
    fit(model.eval(), images(), epochs=1, lr=1e-2)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_gradients_are_rounded_in_training_alone():
    x, y = images()
    model = compress(net(), moving, data=(x, y), g_bits=2).train()
    F.cross_entropy(model(x), y).backward()
    found = model[4].bias.grad  # the sum over 60 images of gradients of one size
    assert torch.allclose(found / 1e-3, (found / 1e-3).round(), atol=1e-3) and found.abs().max() <= 0.0601
    inputs_left = compress(net(), moving, a_bits=32, g_bits=2).train()
    F.cross_entropy(inputs_left(x), y).backward()
    assert torch.allclose(inputs_left[4].bias.grad / 1e-3, (inputs_left[4].bias.grad / 1e-3).round(), atol=1e-3)
    assert not any(isinstance(p, Sited) for p in plan_of(inputs_left).values())
    assert all(site_of(m) is None for m in with_plain_weights(inputs_left).modules()) and deepcopy(inputs_left).double() is not None
    plain = compress(net(), moving, data=(x, y)).train()
    F.cross_entropy(plain(x), y).backward()
    assert not torch.allclose(plain[4].bias.grad / 1e-3, (plain[4].bias.grad / 1e-3).round(), atol=1e-3)


def test_a_file_keeps_the_rounding_of_inputs(tmp_path):
    model = compress(net(), moving, data=images())
    save(model, tmp_path / "sited.safetensors")
    back = load(tmp_path / "sited.safetensors", into=net())
    assert torch.equal(back(images()[0]), model(images()[0]))
    assert torch.equal(with_plain_weights(model)(images()[0]), model(images()[0]))
    assert evaluate(back, images()) == evaluate(model, images())
    assert measure(model, data=images()).activation_bits == 2


def test_a_copy_has_sites_of_its_own_and_compressing_again_takes_the_old_ones_away():
    model = compress(net(), moving, data=images())
    twin = deepcopy(model).train()
    twin(10 * images()[0])
    assert site_of(twin[2]).input.scale > site_of(model[2]).input.scale
    again = compress(model, moving, data=images(), a_bits=8)
    assert site_of(again[2]).input.count == 256 and len(again[2]._forward_pre_hooks) == 1
    kept = compress(model, without)
    assert site_of(kept[2]).input.count == 4, "a method that says nothing of inputs leaves their rounding"
    assert site_of(compress(model, "magnitude_pruning_han", keep=0.5)[2]).input.count == 4


def test_inputs_at_is_the_rounding_for_the_length_of_a_block():
    model = compress(net(), moving, data=images())
    plan, plain = plan_of(model), net()
    with torch.no_grad():
        for name, packed in plan.items():
            plain.get_submodule(name).weight.copy_(packed.dense())
        outside = plain(images()[0])
        with inputs_at(plain, {n: p.input for n, p in plan.items() if isinstance(p, Sited)}):
            assert torch.equal(plain(images()[0]), model(images()[0]))
        assert torch.equal(plain(images()[0]), outside) and not plain[2]._forward_pre_hooks


def test_spread_is_the_mean_size_of_what_an_output_sees():
    x, layer = drawn(2, 3, 9, 9), nn.Conv2d(3, 5, 3, stride=2, padding=1)
    ones = torch.ones(1, 3, 3, 3) / 27
    assert torch.allclose(spread_of(layer, x), F.conv2d(x.abs(), ones, stride=2, padding=1), atol=1e-6)
    assert torch.allclose(spread_of(nn.Linear(7, 2), drawn(4, 7)), drawn(4, 7).abs().mean(1, keepdim=True))


def test_spread_scales_what_the_signs_give():
    x = drawn(4, 144)
    layer = nn.Linear(144, 3)
    model = nn.Sequential(layer)
    with inputs_at(model, {"0": Steps(torch.zeros(1), torch.tensor([-1.0, 1.0]), spread=True)}):
        found = model(x)
    signs = torch.where(x >= 0, 1.0, -1.0)
    assert torch.allclose(found, F.linear(signs, layer.weight) * x.abs().mean(1, keepdim=True) + layer.bias, atol=1e-6)


@pytest.mark.parametrize("levels", [[-1.0, 1.0], [0.0, 0.5, 2.0]])
def test_rounded_inputs_keep_their_layout(levels):
    levels = torch.tensor(levels)
    given, x = Steps((levels[1:] + levels[:-1]) / 2, levels), torch.randn(5, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    found = given(x)
    nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
    assert torch.equal(found, nearest) and found.is_contiguous(memory_format=torch.channels_last)
    assert given(given.thresholds)[0] == levels[1]  # a threshold belongs to what lies above


def test_a_state_dict_holds_the_rounding_so_that_the_best_state_comes_back_whole():
    x, y = images()
    model = compress(net(), moving, data=(x, y)).train()
    before, held = model.eval()(x), deepcopy(model.state_dict())
    model.train()(10 * x)
    assert not torch.equal(model.eval()(x), before)
    model.load_state_dict(held)
    assert torch.equal(model(x), before) and site_of(model[2]).input.state["top"] == held["2.input_site.state_top"]


def test_the_best_epoch_is_what_fit_leaves(digits):
    model = compress(load_net("mlp", "digits"), "integer_only_quantization", data=digits, a_bits=2, ema_decay=0.0)

    def spoil(row):
        with torch.no_grad():
            model.fc1.parametrizations.weight.original.mul_(-3 if row["epoch"] == 1 else 1)

    done = fit(model, digits, epochs=2, lr=1e-4, progress=spoil)
    assert done.best_epoch == 1 and done.rows[1]["accuracy"] < done.best_accuracy == evaluate(model, digits)


def test_what_a_method_remembers_of_inputs_moves_with_the_model():
    x, y = images()
    for method in ("lq_nets", moving):
        model = compress(net(), method, data=(x, y)).double().train()
        model(x.double()).sum().backward()
        assert all(t.dtype == torch.float64 for t in site_of(model[2]).input.state.values() if t.is_floating_point())


def test_an_entropy_code_does_not_lose_the_rounding():
    model = coded(compress(net(), moving, data=images()))
    assert site_of(compress(model, "magnitude_pruning_han", keep=0.5)[2]).input.count == 4


@pytest.mark.parametrize(
    "how", [{}, {"padding": "same"}, {"dilation": 2}, {"groups": 2}, {"stride": 2, "padding": 1}, {"groups": 4, "kernel_size": (3, 1)}], ids=str
)
def test_the_spread_is_the_mean_of_what_each_output_sees(how):
    layer = nn.Conv2d(4, 8, **{"kernel_size": 3, **how}, bias=False)
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        layer.weight.fill_(1 / layer.weight[0].numel())
        assert torch.allclose(spread_of(layer, x).expand(2, 8, -1, -1), layer(x.abs()), atol=1e-6)


def test_plain_weights_with_rounded_inputs_are_not_saved(tmp_path):
    model = with_plain_weights(compress(net(), moving, data=images()))
    with pytest.raises(FileError, match=r"2, 4 rounds its inputs but has plain weights"):
        save(model, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
