"""What proves the one-bit, ternary and few-bit methods of chapter 04 right: identities, brute force and closed forms, a test a claim.

A claim that does not hold stands here with its counter-example.
"""

import itertools
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import nn

from cmlib.core import bitwise
from cmlib.core.apply import attach, attached, latent, plan_of, weighted
from cmlib.core.codes import Codes
from cmlib.core.method import call
from cmlib.core.sites import site_of
from cmlib.core.training import Hook
from cmlib.core.wrapped import Sited
from cmlib.lab.nets import BiReal, bireal, signed
from cmlib.lab.train import evaluate, fit
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build
from cmlib.methods import catalog
from cmlib.methods import quantize as methods

F64 = torch.float64
KEYS = [k for k, m in catalog().items() if vars(methods).get(k) is m]
SGD = partial(torch.optim.SGD, momentum=0.0)
SEEDS = range(5)

MUTATIONS = [
    ("binaryconnect", "cmlib/methods/quantize.py", "unit * (2 * torch.rand_like(w) - 1)", "unit * (torch.rand_like(w) - 0.5)",
     "the sigmoid twice as steep"),
    ("binaryconnect", "cmlib/methods/quantize.py", "reach = clip * (glorot(w) if", "reach = (glorot(w) if", "the clip is not heard"),
    ("bnn", "cmlib/methods/quantize.py", "inside(-ste_clip, ste_clip)", "inside(-math.inf, math.inf)", "the straight-through line has no ends"),
    ("xnor_net", "cmlib/methods/quantize.py", "slope = 1 / rows.shape[1] + scale *", "slope = 1 + scale *", "1 / n is missing in the gradient"),
    ("xnor_net", "cmlib/methods/quantize.py", "rows.abs().mean(1, keepdim=True).detach()\n    slope",
     "rows.abs().mean().expand(len(rows), 1).detach()\n    slope", "one scale for the layer, not one a filter"),
    ("bi_real_net", "cmlib/methods/quantize.py", "(rows * scale * (rows.abs() <= 1))", "(rows * (rows.abs() <= 1))",
     "the gradient does not know the size of the weight"),
    ("bi_real_net", "cmlib/methods/quantize.py", "(2 - 2 * x.abs()).clamp(min=0)", "(1 - x.abs()).clamp(min=0)", "half of ApproxSign's slope"),
    ("ternary_weight_networks", "cmlib/methods/quantize.py", "/ kept.sum(1, keepdim=True).clamp(min=1)", "/ size.shape[1]",
     "the mean is over all weights, those at 0 too"),
    ("trained_ternary_quantization", "cmlib/methods/quantize.py", "torch.stack([w_n, torch.ones_like(w_n), w_p]).detach()",
     "torch.stack([w_p, torch.ones_like(w_n), w_n]).detach()", "gradients with the other zone's scale"),
    ("dorefa_net", "cmlib/methods/quantize.py", "soft = t / torch.where(top > 0, top, 1)", "soft = t", "tanh is not divided by its maximum"),
    ("dorefa_net", "cmlib/methods/quantize.py", "(steps * unit + torch.rand_like(g) - 0.5).round()", "(steps * unit).round()",
     "gradients are rounded without noise"),
]  # fmt: skip


def codes(key, w, training=False, state=None, **knobs):
    """What the leaf itself gives for a weight; any knob, also beyond its slider."""
    return call(catalog()[key].fn, {"w": w, "training": training}, {**knobs, "state": state})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def signs(*shape, seed=0):
    return 2.0 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() - 1


def sign(x):
    """With sign(0) = +1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x)


def quantized(layer, key, **knobs):
    """A copy of a layer in training, with the method's weight and rounding of inputs."""
    method, layer = catalog()[key], deepcopy(layer).double().train()
    knobs = method.bind(knobs)
    given = call(method.acts, {}, knobs) if method.acts else None
    packed = call(method.fn, {"w": layer.weight.detach(), "training": False}, {**knobs, "state": None})
    attach(layer, packed if given is None else Sited(packed, given), method, knobs)
    return layer


def dense(w):
    """A dense layer without bias of weight w (outputs, inputs)."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False).double()
    layer.weight.data = w.clone()
    return layer


def convolution(w, **how):
    layer = nn.Conv2d(w.shape[1], w.shape[0], tuple(w.shape[2:]), bias=False, **how).double()
    layer.weight.data = w.clone()
    return layer


def weight_gradient(key, w, g, **knobs):
    """The gradient that the latent weight gets where the weight computed with gets g."""
    w = w.clone().requires_grad_(True)
    packed = codes(key, w, training=True, **knobs)
    return torch.autograd.grad((packed.through(packed.values) * g).sum(), w)[0]


def input_gradient(key, x, **knobs):
    """The derivative that stands for that of the inputs' rounding at x."""
    x = x.clone().requires_grad_(True)
    given = call(catalog()[key].acts, {}, catalog()[key].bind(knobs))
    return torch.autograd.grad(given(x).sum(), x)[0]


def nothing(out, target):
    """A loss whose gradient to the output is the target itself."""
    return (out * target).sum()


def descend(model, x, y, lr, loss, steps=1, optimizer=SGD, hooks=()):
    fit(model, (x, y), epochs=steps, batch=len(x), lr=lr, optimizer=optimizer, schedule="constant", loss=loss, hooks=hooks, keep_best=False)
    return latent(model[0]).detach()


# BinaryConnect


def half_square(out, y):
    return (out - y).square().sum() / 2


@pytest.mark.parametrize("lr", [0.01, 0.2, 5.0])
def test_binaryconnect_one_step_by_hand(lr):
    w, x, y = torch.tensor([[0.3, -0.6]], dtype=F64), torch.tensor([[1.0, 2.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64)
    gradient = (1.0 - 2.0 - 0.5) * x  # at w_b = (1, -1)
    found = descend(nn.Sequential(quantized(dense(w), "binaryconnect", lr_scale_by_init="off")), x, y, lr, half_square)
    assert torch.allclose(found, (w - lr * gradient).clamp(-1, 1), rtol=0, atol=1e-15)
    c = (1.5 / (2 + 1)) ** 0.5  # with the authors' scale the step is lr / c, in units of which the latent weight is held
    found = descend(nn.Sequential(quantized(dense(c * w), "binaryconnect")), x, y, lr, half_square)
    assert torch.allclose(found / c, (w - lr / c * gradient).clamp(-1, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, eps=1e-30)], ids=["sgd", "adam"])
def test_binaryconnect_scaled_latents_are_scaled_steps_under_any_optimizer(optimizer):
    x, w = normal(20, 4), normal(3, 4, seed=2).clamp(-1, 1)
    y, c, lr, steps = x @ (1.5 * normal(4, 3, seed=3)), methods.glorot(w), 0.02, 20
    found = descend(nn.Sequential(quantized(dense(c * w), "binaryconnect")), x, y, lr, half_square, steps, optimizer) / c
    rule = optimizer([w.requires_grad_(True)], lr=lr / c)
    for _ in range(steps):
        binary = sign(w.detach()).requires_grad_(True)
        (w.grad,) = torch.autograd.grad(half_square(x @ binary.T, y), binary)
        rule.step()
        w.data.clamp_(-1, 1)
    assert torch.allclose(found, w, rtol=0, atol=1e-12)
    assert (found.abs() == 1).any() and (found.abs() < 1).any()


def test_binaryconnect_scale_is_glorots():
    assert methods.glorot(torch.empty(50, 20, 5, 5)) == (1.5 / (20 * 25 + 50 * 25)) ** 0.5
    assert methods.glorot(torch.empty(10, 500)) == (1.5 / 510) ** 0.5


@pytest.mark.parametrize("unit", [1.0, 0.2])
def test_binaryconnect_draws_follow_the_hard_sigmoid(unit):
    w = torch.tensor([-1.7, -1.0, -0.8, -0.25, 0.0, 0.1, 0.6, 1.0, 1.3], dtype=F64)
    wide = (unit * w).expand(100_000, 9)
    if unit == 1.0:
        drawn = codes("binaryconnect", wide, training=True, mode="stochastic", lr_scale_by_init="off").rounded()
    else:
        drawn = codes("binaryconnect", wide * methods.glorot(wide) / unit, training=True, mode="stochastic", lr_scale_by_init="on").rounded()
    expected = w.clamp(-1, 1)
    error = ((1 - expected**2) / len(wide)).sqrt()
    assert ((drawn.mean(0) - expected).abs() <= 4 * error).all()
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(codes("binaryconnect", wide[:1], mode="stochastic").rounded()[0], sign(w))  # none is drawn in evaluation


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_binaryconnect_weights_are_plus_or_minus_one_and_zero_is_plus(mode):
    w = torch.tensor([[0.0, -0.0, 0.4, -1e-30, -3.0]])
    assert codes("binaryconnect", w).rounded().tolist() == [[1, 1, 1, -1, -1]]
    layer = quantized(dense(normal(3, 4)), "binaryconnect", mode=mode)
    for _ in range(3):
        assert set(layer.weight.unique().tolist()) == {-1.0, 1.0}


NAIVE = Hook(after=lambda model, rule: [latent(layer).data.copy_(sign(latent(layer).data)) for _, layer, _ in attached(model)])


def test_binaryconnect_latent_weights_gather_small_steps():
    x = torch.tensor([[1.0]], dtype=F64)
    start = partial(quantized, dense(torch.tensor([[0.4]], dtype=F64)), "binaryconnect", lr_scale_by_init="off")
    gathered = descend(nn.Sequential(start()), x, 0.05 * x, 1.0, nothing, steps=10)
    assert gathered.item() == pytest.approx(-0.1, abs=1e-12)
    assert descend(nn.Sequential(start()), x, 0.05 * x, 1.0, nothing, steps=10, hooks=[NAIVE]).item() == 1.0


def test_binaryconnect_latent_weights_train_and_overwritten_ones_do_not(digits):
    """The order of the training losses on the digits MLP, on each of five seeds."""
    for seed in SEEDS:
        losses = []
        for hooks in ([], [NAIVE]):
            model = compress(build("mlp", "digits", seed), "binaryconnect", lr_scale_by_init="off")
            losses.append(fit(model, digits, epochs=2, lr=0.03, batch=64, seed=seed, hooks=hooks, keep_best=False).rows[-1]["loss"])
        assert losses[0] < losses[1]


def test_binaryconnect_does_not_gather_beyond_the_clip():
    x = torch.tensor([[1.0]], dtype=F64)
    model = nn.Sequential(quantized(dense(torch.tensor([[0.9]], dtype=F64)), "binaryconnect", lr_scale_by_init="off"))
    assert descend(model, x, -x, 1.0, nothing, steps=10).item() == 1.0
    assert descend(model, x, 1.25 * x, 1.0, nothing, steps=1).item() == -0.25  # one step back is enough
    for scaled, unit in (("off", 1.0), ("on", 0.75**0.5)):  # Glorot's reach of a layer from 1 to 1
        tight = nn.Sequential(quantized(dense(torch.tensor([[0.4]], dtype=F64)), "binaryconnect", clip=0.5, lr_scale_by_init=scaled))
        assert descend(tight, x, -x, 1.0, nothing, steps=10).item() == pytest.approx(0.5 * unit, abs=1e-12)


# BNN


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 65, 100])
def test_bnn_layer_is_the_packed_product(n):
    x, layer = normal(11, n), quantized(dense(normal(5, n, seed=1)), "bnn")
    assert torch.equal(layer(x).long(), bitwise.xnor_dot(x, latent(layer)).long())
    x, layer = normal(2, 3, 7, 6), quantized(convolution(normal(4, 3, 3, 3, seed=1)), "bnn")
    assert torch.equal(layer(x).long(), bitwise.xnor_conv2d(x, bitwise.pack_signs(latent(layer))).long())


def test_bnn_padding_of_zeros_is_a_third_value_and_of_signs_is_not():
    """A convolution pads after its inputs were rounded: with 0, which no sign is. A border of zeros before it has sign +1."""
    x, w = normal(2, 3, 6, 6), normal(4, 3, 3, 3, seed=1)
    packed = bitwise.xnor_conv2d(x, bitwise.pack_signs(w), padding=1, fill=1)
    inside, before = quantized(convolution(w, padding=1), "bnn"), nn.Sequential(nn.ZeroPad2d(1), quantized(convolution(w), "bnn"))
    assert torch.equal(before(x).long(), packed.long())
    assert not torch.equal(inside(x).long(), packed.long()) and torch.equal(inside(x)[..., 1:-1, 1:-1].long(), packed[..., 1:-1, 1:-1].long())


def test_bnn_straight_through_line_by_table():
    x = torch.tensor([-2.0, -1.0 - 1e-9, -1.0, -0.3, 0.0, 0.7, 1.0, 1.0 + 1e-9, 9.0], dtype=F64)
    assert input_gradient("bnn", x).tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert input_gradient("bnn", x, ste_clip=3.0).tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0]
    bound = torch.tensor([1.0], dtype=F64, requires_grad=True)
    F.hardtanh(bound).backward()
    assert bound.grad.item() == 0  # why it is not hardtanh: weights at the clip would stay there
    assert weight_gradient("bnn", torch.tensor([[-1.0, 1.0]], dtype=F64), torch.tensor([[2.0, 3.0]], dtype=F64)).tolist() == [[2, 3]]


def test_bnn_weights_are_clipped_after_each_step():
    x = torch.tensor([[1.0]], dtype=F64)
    model = nn.Sequential(quantized(dense(torch.tensor([[0.9]], dtype=F64)), "bnn"))
    assert descend(model, x, -x, 1.0, nothing, steps=3).item() == 1.0
    assert descend(model, x, 0.5 * x, 1.0, nothing).item() == 0.5


def test_bnn_batch_norm_and_sign_are_one_threshold_a_channel():
    norm = nn.BatchNorm1d(6, eps=0.0).double().eval()
    norm.weight.data = torch.tensor([2.0, -2.0, 0.5, -0.5, 0.0, 0.0], dtype=F64)
    norm.bias.data = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.3, -0.3], dtype=F64)
    norm.running_mean[:], norm.running_var[:] = 3.0, 4.0
    x = torch.arange(-20.0, 21.0, dtype=F64)[:, None].expand(-1, 6)  # what sums of signs are; 3 and others lie on thresholds
    bits = quantized(dense(torch.eye(6, dtype=F64)), "bnn").input_site(norm(x)) > 0
    tau, direction = bitwise.sign_thresholds(norm)
    assert torch.equal(bitwise.above(x, tau, direction), bits)
    strict = torch.where(direction > 0, x >= tau, x < tau)
    assert not torch.equal(strict, bits)  # for gamma < 0 it is x <= tau
    assert bits[:, 4].all() and not bits[:, 5].any()  # gamma = 0: a constant


def test_bnn_shift_based_batch_norm():
    x = torch.tensor([0.0, 1.0, -1.0, 3.0, -5.0, 0.3, 1e-3, -6.0], dtype=F64)
    assert methods.ap2(x).tolist() == [0, 1, -1, 4, -4, 0.25, 2**-10, -8]
    for x in (normal(500, 7), torch.rand(500, 7, dtype=F64), normal(500, 7, seed=1).exp(), normal(500, 7).sign()):
        x = 3 * x + 2
        y, variance = methods.shift_batch_norm(x, torch.ones(7, dtype=F64), torch.zeros(7, dtype=F64))
        ratio = variance / x.var(0, correction=0)
        assert (ratio > 0.5**0.5 - 1e-9).all() and (ratio < 2**0.5 + 1e-9).all()  # each factor is within sqrt(2)
        assert y.mean(0).abs().max() < 1e-9 and (y.std(0) > 0.5).all() and (y.std(0) < 2).all()
        powers = (y / (x - x.mean(0)))[0].log2()
        assert torch.allclose(powers, powers.round(), rtol=0, atol=1e-9)


def test_bnn_trains_better_where_gradients_beyond_the_clip_are_cancelled(digits):
    """The order of the training losses on the digits MLP, on each of three seeds; with a clip of 3 hardly any gradient is cancelled."""
    for seed in range(3):
        models = [compress(signed(build("mlp", "digits", seed)), "bnn", ste_clip=clip) for clip in (1.0, 3.0)]
        losses = [fit(m, digits, epochs=2, lr=0.03, batch=64, seed=seed, keep_best=False).rows[-1]["loss"] for m in models]
        assert losses[0] < losses[1]


# XNOR-Net and BWN


@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_xnor_scale_and_signs_are_the_nearest(n):
    w = normal(3, n)
    found = ((w - codes("xnor_net", w).rounded()) ** 2).sum(1)
    assert torch.allclose(found, (w**2).sum(1) - w.abs().sum(1) ** 2 / n, rtol=0, atol=1e-12)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=F64)
    best = ((w**2).sum(1, keepdim=True) - (w @ every.T) ** 2 / n).min(1).values  # the best alpha of each choice of signs
    assert torch.allclose(found, best, rtol=0, atol=1e-12)


def test_xnor_with_scales_of_one_is_bnn():
    w, x = normal(4, 3, 3, 3), normal(2, 3, 8, 8, seed=1)
    w /= w.abs().mean((1, 2, 3), keepdim=True)
    binary = quantized(convolution(w), "bnn")(x)
    assert torch.allclose(quantized(convolution(w), "xnor_net", use_K_map="off")(x), binary, rtol=0, atol=1e-12)
    x = x / x.abs()  # then K is 1
    assert torch.allclose(quantized(convolution(w), "xnor_net")(x), quantized(convolution(w), "bnn")(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1])
def test_xnor_is_the_real_convolution_of_scaled_signs(padding):
    """At the interior positions; at the border zeros are padded, which K counts as inputs: there it is not."""
    layer = convolution(signs(5, 4, 3, 3) * torch.rand(5, 1, 1, 1).double(), padding=padding)
    x = 0.7 * signs(2, 4, 7, 7, seed=1)
    real, found = layer(x), quantized(layer, "xnor_net")(x)
    inside = slice(padding, 7 - padding) if padding else slice(None)
    assert torch.allclose(found[..., inside, inside], real[..., inside, inside], rtol=0, atol=1e-12)
    assert torch.allclose(found, real, rtol=0, atol=1e-12) == (padding == 0)


def test_bwn_needs_additions_only():
    x, layer = normal(2, 3, 9, 8), convolution(normal(4, 3, 3, 3, seed=1), stride=2, padding=1)
    found = quantized(layer, "xnor_net", mode="bwn")
    assert site_of(found) is None
    assert torch.allclose(found(x), bitwise.added_conv2d(x, layer.weight.detach(), stride=2, padding=1), rtol=0, atol=1e-12)


def test_xnor_gradient_is_the_papers_not_the_true_derivative():
    w, g = 1.5 * normal(3, 8), normal(3, 8, seed=1)
    alpha = w.abs().mean(1, keepdim=True)
    inside = alpha * (w.abs() <= 1)
    assert torch.allclose(weight_gradient("xnor_net", w, g), g * (1 / 8 + inside), rtol=0, atol=1e-14)
    latents = w.clone().requires_grad_(True)
    straight = sign(w) + inside / alpha * (latents - w)  # sign(w) with the clipped straight-through line
    (true,) = torch.autograd.grad((latents.abs().mean(1, keepdim=True) * straight * g).sum(), latents)
    assert torch.allclose(true, g * inside + sign(w) / 8 * (g * sign(w)).sum(1, keepdim=True), rtol=0, atol=1e-14)
    assert not torch.allclose(true, weight_gradient("xnor_net", w, g), atol=0.01)
    assert weight_gradient("xnor_net", torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)).tolist() == [[1.5, 1.5]]  # the bound learns


def test_xnor_scales_are_stored_one_a_filter():
    packed = codes("xnor_net", torch.randn(50, 20, 5, 5))
    assert packed.params.shape == (50, 1) and packed.bits() == 25_000 + 50 * 32


# Bi-Real net


def approx_sign(x):
    return np.where(np.abs(x) > 1, np.sign(x), np.where(x < 0, 2 * x + x**2, 2 * x - x**2))


def test_approx_sign_and_its_derivative():
    assert approx_sign(np.array([-1.0, 0.0, 1.0])).tolist() == [-1, 0, 1]
    x = torch.linspace(-1.5, 1.5, 1001, dtype=F64)
    difference = (approx_sign(x.numpy() + 1e-6) - approx_sign(x.numpy() - 1e-6)) / 2e-6
    found = input_gradient("bi_real_net", x).numpy()
    assert np.allclose(found, difference, rtol=0, atol=2e-6)
    assert np.abs(approx_sign(x.numpy()[1:]) - approx_sign(x.numpy()[:-1])).max() <= 2 * 0.003 + 1e-9  # no jump


def test_approx_sign_lies_closer_to_sign_than_the_clip():
    for ste, stand_in, distance in (("approxsign", approx_sign, 2 / 3), ("identity_clip", lambda x: x, 1.0)):
        jump = quad(lambda x, ste=ste: input_gradient("bi_real_net", torch.tensor([x], dtype=F64), ste=ste).item(), -1, 1, points=[0])[0]
        assert jump == pytest.approx(2, abs=1e-12)  # as that of sign
        assert 2 * quad(lambda x, f=stand_in: 1 - f(x), 0, 1)[0] == pytest.approx(distance, abs=1e-12)


def test_bi_real_block_without_its_convolution_is_the_identity():
    block, x = BiReal(4, 4).double().eval(), normal(2, 4, 6, 6)
    block.conv.weight.data.zero_()
    made = nn.Sequential(nn.Conv2d(4, 4, 1), block).double().eval()  # the first layer reads the image, whose values stay
    zeroed = partial(compress, made, "bi_real_net", where="1.conv")
    assert torch.equal(zeroed()[1](x), x)
    assert (zeroed(magnitude_aware="off")[1](x) - x).abs().max() > 1  # a plain sign of zero weights is +1 everywhere
    block.bn.bias.data[:] = 0.5
    assert torch.allclose(zeroed()[1](x), x + 0.5)  # and a batch norm that has learned adds its own


def test_bi_real_without_its_three_changes_is_bnn():
    block, x = BiReal(4, 4).double().train(), normal(6, 4, 5, 5)
    block.conv.weight.data.clamp_(-1, 1)
    made = nn.Sequential(nn.Conv2d(4, 4, 1), block).double().train()
    plain = compress(made, "bi_real_net", where="1.conv", ste="identity_clip", magnitude_aware="off")[1]
    binary = compress(made, "bnn", where="1.conv")[1]
    found, gradients = [], []
    for one, shortcut in ((plain, 1.0), (binary, 0.0)):
        seen = x.clone().requires_grad_(True)
        y = one.bn(one.conv(one.pad(seen)))
        found.append(one(x) - x if shortcut else y)
        gradients.append(torch.autograd.grad((y * normal(*y.shape, seed=3)).sum(), [seen, latent(one.conv)]))
    assert torch.allclose(*found, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients))
    other = compress(made, "xnor_net", where="1.conv")[1]
    assert not torch.allclose(other.conv(other.pad(x)), binary.conv(binary.pad(x)), atol=0.1)  # XNOR-Net still has alpha and K


def test_bi_real_weight_gradient_knows_the_magnitude():
    w, g = 1.2 * normal(3, 10), normal(3, 10, seed=1)
    scale = w.abs().mean(1, keepdim=True)
    assert torch.allclose(weight_gradient("bi_real_net", w, g), g * scale * (w.abs() <= 1), rtol=0, atol=1e-14)
    assert torch.equal(weight_gradient("bi_real_net", w, g, magnitude_aware="off"), g * (w.abs() <= 1))
    assert torch.allclose(codes("bi_real_net", w).rounded(), scale * sign(w), rtol=0, atol=1e-15)


def test_bi_real_shortcut_lets_more_values_through():
    """A sum of 3 x 3 x 4 signs has 37 values at most; with the sum before it added, the squares of that."""
    net = nn.Sequential(convolution(signs(4, 4, 3, 3), padding=1), BiReal(4, 4)).double().eval()
    net[1].bn.eps = 0.0
    block = compress(net, "bi_real_net", where="1.conv", magnitude_aware="off")[1]
    x = net[0](signs(20, 4, 12, 12, seed=1)) * 2**-10  # such sums themselves, on a scale of their own
    alone, added = block.bn(block.conv(block.pad(x))), block(x)
    assert len(x.unique()) <= 37 + 36 and len(alone.unique()) <= 37
    assert 10 * len(alone.unique()) < len(added.unique()) <= len(x.unique()) * len(alone.unique())


def test_bireal_network_has_a_shortcut_around_each_one_bit_convolution(digits):
    x = digits.train[0][:40].double() / 255
    net = bireal((1, 8, 8)).double()
    model = compress(net, "bi_real_net", where="block*, !*shortcut*")
    assert list(plan_of(model)) == [f"block{i}.conv" for i in range(1, 7)]
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in build("resnet", "mnist").parameters())
    model.train()(x).logsumexp(1).sum().backward()
    assert all((latent(model.get_submodule(n)).grad != 0).any() for n in plan_of(model))


# ternary weights


def ternary_error(w, **knobs):
    return ((w - codes("ternary_weight_networks", w, **knobs).rounded()) ** 2).sum()


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_exact_ternary_is_the_best_of_all(n):
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=n)), dtype=F64)
    size = every.abs().sum(1).clamp(min=1)
    for w in (normal(n), signs(n) * 0.5, torch.rand(n, dtype=F64), torch.linspace(-1, 1, n, dtype=F64)):
        best = ((w**2).sum() - (every @ w) ** 2 / size).min()
        found = ternary_error(w, exact_delta="on")
        sums = w.abs().sort(descending=True).values.cumsum(0)
        assert found.item() == pytest.approx(best.item(), abs=1e-12)
        assert found.item() == pytest.approx(((w**2).sum() - (sums**2 / torch.arange(1, n + 1)).max()).item(), abs=1e-12)


LAWS = {"uniform": lambda n: 2 * torch.rand(n, dtype=F64) - 1, "gauss": lambda n: torch.randn(n, dtype=F64),
        "laplace": lambda n: torch.distributions.Laplace(torch.zeros((), dtype=F64), 1.0).sample((n,))}  # fmt: skip


@pytest.mark.parametrize("law, optimum", [("uniform", 2 / 3), ("gauss", 0.767)])
def test_best_threshold_of_two_laws(law, optimum):
    w = LAWS[law](1_000_000)
    kept = codes("ternary_weight_networks", w, exact_delta="on").index[0] != 1
    delta = w[kept].abs().min() / w.abs().mean()
    assert delta.item() == pytest.approx(optimum, rel=0.01)
    if law == "gauss":
        assert w[kept].abs().min().item() == pytest.approx(0.612, rel=0.01)  # in standard deviations; 0.75 mean |w| in the paper is of 0.6


@pytest.mark.parametrize("law, most", [("uniform", 1.005), ("gauss", 1.01), ("laplace", 1.08)])
def test_rule_of_thumb_costs_little(law, most):
    w = LAWS[law](100_000)
    ratio = ternary_error(w) / ternary_error(w, exact_delta="on")
    assert 1 < ratio <= most
    assert law != "laplace" or ratio > 1.06  # so not within 2 % of any law


def test_ternary_ends_are_binary_and_nothing():
    w = normal(6, 10)
    binary = codes("xnor_net", w).rounded()
    assert torch.allclose(codes("ternary_weight_networks", w, delta_factor=0.0, per="filter").rounded(), binary, rtol=0, atol=1e-15)
    nothing = codes("ternary_weight_networks", w, delta_factor=100.0)
    assert not nothing.rounded().any() and nothing.params.item() == 0
    assert not codes("ternary_weight_networks", signs(2, 4), delta_factor=1.0).rounded().any()  # what lies on the threshold goes
    w[0, 0] = 0  # an exact zero is 0 here, and a sign there
    assert codes("ternary_weight_networks", w, delta_factor=0.0).rounded()[0, 0] == 0 and codes("xnor_net", w).rounded()[0, 0] > 0


def test_ternary_error_is_below_binary_for_the_best_threshold_only():
    binary = lambda w: ((w - codes("dorefa_net", w, bits=1).rounded()) ** 2).sum()  # noqa: E731
    for seed in range(200):
        w = normal(9, seed=seed)
        assert ternary_error(w, exact_delta="on") <= binary(w) + 1e-12
    w = torch.tensor([1.0, 1.0, 1.0, 0.6], dtype=F64)
    assert ternary_error(w).item() == pytest.approx(0.36) and binary(w).item() == pytest.approx(0.12)


def test_ternary_scale_is_the_mean_of_what_stays_and_the_gradient_is_straight():
    w = torch.tensor([[2.0, -4.0, 0.1, 0.2], [0.1, 0.1, 0.1, -0.6]], dtype=F64)
    assert codes("ternary_weight_networks", w, per="filter").rounded().tolist() == [[3, -3, 0, 0], [0, 0, 0, -0.6]]
    assert codes("ternary_weight_networks", w).rounded().tolist() == [[3, -3, 0, 0], [0, 0, 0, 0]]
    g = normal(2, 4)
    assert torch.equal(weight_gradient("ternary_weight_networks", w, g), g)


def test_ternary_takes_two_bits():
    packed = codes("ternary_weight_networks", torch.randn(500, 800))
    assert packed.bits() == 2 * 400_000 + 32


# trained ternary


def test_trained_ternary_scale_gradients_are_finite_differences():
    w, x, target = normal(3, 8), normal(20, 8, seed=1), normal(20, 3, seed=2)

    def loss(w_p, w_n):
        packed = codes("trained_ternary_quantization", w, state={"w_p": w_p, "w_n": w_n}, threshold_t=0.3)
        return (x @ packed.through(packed.values).T - target).square().mean() + packed.rounded().pow(3).sum()

    scales = [nn.Parameter(torch.tensor(v, dtype=F64)) for v in (0.8, 1.3)]
    found = torch.autograd.grad(loss(*scales), scales)
    for i, g in enumerate(found):
        up, down = ([s.detach() + step * (i == j) for j, s in enumerate(scales)] for step in (1e-6, -1e-6))
        assert g.item() == pytest.approx(((loss(*up) - loss(*down)) / 2e-6).item(), rel=1e-7)


def test_trained_ternary_gradients_by_table():
    w = torch.tensor([[0.9, 0.3, 0.05, 0.0, -0.05, -0.5, -1.0]], dtype=F64)
    layer = quantized(dense(w), "trained_ternary_quantization", threshold_t=0.1)
    (held,) = layer.parametrizations.weight
    held.w_p.data, held.w_n.data = torch.tensor(3.0, dtype=F64), torch.tensor(5.0, dtype=F64)
    assert layer.weight.tolist() == [[3, 3, 0, 0, 0, -5, -5]]
    g = torch.arange(1.0, 8.0, dtype=F64)[None]
    (layer.weight * g).sum().backward()
    assert latent(layer).grad.tolist() == [[3 * 1, 3 * 2, 3, 4, 5, 5 * 6, 5 * 7]]
    assert held.w_p.grad.item() == 1 + 2 and held.w_n.grad.item() == -(6 + 7)


def test_trained_ternary_with_frozen_scales_is_ternary():
    w = normal(6, 20)
    ternary = codes("ternary_weight_networks", w)
    alpha, t = ternary.params.flatten()[0], 0.7 * w.abs().mean() / w.abs().max()
    found = codes("trained_ternary_quantization", w, threshold_t=t, state={"w_p": alpha, "w_n": alpha})
    assert torch.equal(found.rounded(), ternary.rounded()) and torch.equal(found.index, ternary.index)


def test_trained_ternary_scales_reach_least_squares():
    w, x = normal(1, 12), normal(60, 12, seed=1)
    delta = 0.2 * w.abs().max()
    columns = torch.stack([x[:, w[0] > delta].sum(1), -x[:, w[0] < -delta].sum(1)], 1)
    y = columns @ torch.tensor([[0.8], [1.3]], dtype=F64) + normal(60, 1, seed=2)
    layer = quantized(dense(w), "trained_ternary_quantization", threshold_t=0.2)
    (held,) = layer.parametrizations.weight
    rule = torch.optim.LBFGS([held.w_p, held.w_n], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-15)

    def loss():
        rule.zero_grad()
        value = F.mse_loss(layer(x), y)
        value.backward()
        return value

    rule.step(loss)
    best = torch.linalg.lstsq(columns, y).solution.flatten()
    assert torch.allclose(torch.stack([held.w_p, held.w_n]), best, rtol=0, atol=1e-9)


def test_trained_ternary_storage_and_sparsity():
    w = torch.randn(500, 800)
    packed = codes("trained_ternary_quantization", w)
    assert packed.bits() == 2 * w.numel() + 3 * 32  # two floats, and the level 0
    assert (packed.rounded() == 0).sum() == (w.abs() <= 0.05 * w.abs().max()).sum()
    for share in (0.0, 0.25, 0.9):
        found = codes("trained_ternary_quantization", w, target_sparsity=share)
        assert (found.rounded() == 0).float().mean().item() == pytest.approx(share, abs=1e-5)


def test_trained_ternary_zones_cannot_swap():
    w = normal(2, 6)
    state = {"w_p": nn.Parameter(torch.tensor(-0.5, dtype=F64)), "w_n": nn.Parameter(torch.tensor(-0.1, dtype=F64))}
    found = codes("trained_ternary_quantization", w, state=state).rounded()
    assert (found * w >= 0).all()


def test_trained_ternary_scales_learn_in_the_network_and_go_to_its_plan(digits):
    model = compress(build("mlp", "digits"), "trained_ternary_quantization")
    before = {n: p.params.clone() for n, p in plan_of(model).items()}
    fit(model, digits, epochs=1, lr=0.01)
    after = {n: p.params for n, p in plan_of(model).items()}
    assert all((before[n][0, [0, 2]] != after[n][0, [0, 2]]).all() and after[n][0, 1] == 0 for n in before)
    assert all((model.get_submodule(n).weight.unique()[:, None] == after[n]).any(1).all() for n in after)


# DoReFa-Net


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_levels(bits):
    w = normal(40, 50)
    packed = codes("dorefa_net", w, bits=bits)
    (levels,) = packed.levels
    assert len(levels.unique()) == 2**bits and torch.equal(levels, -levels.flip(0))
    reach = w.abs().mean() if bits == 1 else 1.0
    assert levels.abs().max().item() == pytest.approx(float(reach), abs=1e-15)
    assert (packed.rounded()[..., None] - levels).abs().min(-1).values.max() == 0 and packed.width == bits
    if bits > 1:
        assert torch.allclose(packed.rounded(), 2 * ((2**bits - 1) * (w.tanh() / w.tanh().abs().max() / 2 + 0.5)).round() / (2**bits - 1) - 1)


def test_dorefa_tensors_use_fewer_levels_and_have_no_zero():
    """'Exactly 2^k values' is true of the grid; in the thin tails of a Gaussian some levels go unused."""
    assert len(codes("dorefa_net", 0.05 * normal(20_480), bits=8).rounded().unique()) < 256
    zero = torch.tensor([0.0, 1.0], dtype=F64)
    assert codes("dorefa_net", zero, bits=2).rounded()[0].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("bits, a_bits", [(2, 1), (3, 2), (8, 8)])
def test_dorefa_product_is_made_of_bit_planes(bits, a_bits):
    w, x = normal(4, 21), torch.rand(6, 21, dtype=F64) * 1.4 - 0.2
    layer = quantized(dense(w), "dorefa_net", bits=bits, a_bits=a_bits)
    steps, a_steps = 2**bits - 1, 2**a_bits - 1
    a = (layer.input_site(x) * a_steps).round().long().numpy()
    b = plan_of(nn.Sequential(layer))["0"].index.reshape(4, 21).numpy()
    whole = bitwise.bitplane_dot(a, b, a_bits, bits)
    assert (whole == a @ b.T).all()
    truth = (2 * whole / steps - a.sum(1, keepdims=True)) / a_steps  # a level is 2 b / (2^k - 1) - 1
    assert np.allclose(layer(x).detach().numpy(), truth, rtol=0, atol=1e-6)  # the inputs' levels are float32


def rounded_errors(g, bits):
    return catalog()["dorefa_net"].errors(g, g_bits=bits)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_gradients_are_right_on_average(bits):
    g = torch.tensor([0.9, -0.31, 0.02, 0.0, -0.6, 0.45], dtype=F64)
    drawn = rounded_errors(g.expand(100_000, 6), bits)
    assert torch.allclose(drawn[:, 0], g[0], rtol=0, atol=1e-12)  # the largest is met exactly
    error = drawn.std(0)[1:] / len(drawn) ** 0.5
    assert ((drawn.mean(0) - g)[1:].abs() <= 4 * error).all()
    assert len(drawn.unique()) <= 2**bits * 2
    plain = 2 * 0.9 * (((2**bits - 1) * (g / 1.8 + 0.5)).round() / (2**bits - 1) - 0.5)
    assert (plain - g)[1:].abs().max() > 20 * error.max()  # without the noise: biased


def test_dorefa_gradients_are_scaled_by_image():
    g = torch.stack([normal(3, 4, 4), 1000 * normal(3, 4, 4, seed=1), torch.zeros(3, 4, 4, dtype=F64)])
    found = rounded_errors(g, 3)
    assert torch.allclose(found.abs().amax((1, 2, 3)), g.abs().amax((1, 2, 3))) and not found[2].any()
    assert all(len(one.unique()) <= 8 for one in found)
    assert torch.equal(rounded_errors(g, 32), g)


def test_dorefa_gradients_reach_the_layer_rounded():
    layer, x = quantized(dense(normal(3, 5)), "dorefa_net", g_bits=2), torch.rand(1, 5, dtype=F64).requires_grad_(True)
    w = layer.weight.detach()
    (layer(x) * torch.tensor([[0.9, -0.9, 0.1]], dtype=F64)).sum().backward()
    expected = [torch.tensor([[0.9, -0.9, e]], dtype=F64) @ w for e in (0.3, -0.3)]
    assert any(torch.allclose(x.grad, e, rtol=0, atol=1e-12) for e in expected)


def test_dorefa_inputs():
    acts = catalog()["dorefa_net"].acts
    x = torch.tensor([-0.5, 0.0, 0.16, 0.17, 0.5, 0.9, 1.0, 7.0], dtype=F64)
    assert torch.allclose(acts(a_bits=2)(x), torch.tensor([0, 0, 0, 1, 2, 3, 3, 3], dtype=F64) / 3, rtol=0, atol=1e-7)
    assert input_gradient("dorefa_net", x, a_bits=2).tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    inside = torch.rand(1000, dtype=F64)
    assert (acts(a_bits=16)(inside) - inside).abs().max() < 1e-5
    assert acts(a_bits=32) is None  # exact also outside [0, 1], where fewer bits clamp


def test_dorefa_one_bit_is_bwn_with_a_scale_a_layer():
    w = normal(6, 9)
    whole = codes("dorefa_net", w, bits=1).rounded()
    assert torch.allclose(whole, codes("xnor_net", w.reshape(1, -1)).rounded().reshape(6, 9), rtol=0, atol=1e-15)
    assert not torch.allclose(whole, codes("xnor_net", w).rounded(), atol=0.01)
    g = normal(6, 9, seed=1)
    assert torch.equal(weight_gradient("dorefa_net", w, g, bits=1), g)


class RoundingIgnored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def test_dorefa_gradient_goes_through_tanh_and_its_maximum():
    w, g = normal(5, 7), normal(5, 7, seed=1)
    latents = w.clone().requires_grad_(True)
    t = latents.tanh()
    (2 * RoundingIgnored.apply(7 * (t / (2 * t.abs().max()) + 0.5)) / 7 - 1).backward(g)
    found = weight_gradient("dorefa_net", w, g, bits=3)
    assert torch.allclose(found, latents.grad, rtol=0, atol=1e-14)
    held = g * (1 - w.tanh() ** 2) / w.tanh().abs().max()  # with the maximum held fixed
    differs = (found - held).abs() > 1e-12
    assert differs.sum() == 1 and differs.flatten()[w.abs().argmax()]


# all of them


def settings(method):
    """The defaults, and each knob at its ends."""
    return [{}, *({n: v} for n, k in method.knobs.items() for v in k.span.points(2))]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("w", [torch.zeros(3, 4), torch.full((3, 4), -0.2), torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(5), torch.ones(1),
                               1e30 * torch.ones(2, 3, 2, 2), 1e-30 * torch.ones(2, 2)])  # fmt: skip
def test_weights_without_spread_are_finite_and_the_same_each_time(key, w):
    for knobs in settings(catalog()[key]):
        if w.dim() < 2 and knobs.get("per", "tensor") != "tensor":
            continue
        found, again = (codes(key, w, **catalog()[key].bind(knobs)).rounded() for _ in range(2))
        assert torch.isfinite(found).all() and torch.equal(found, again)
        latents = w.clone().requires_grad_(True)
        packed = codes(key, latents, training=True, **catalog()[key].bind(knobs))
        packed.through(packed.values).sum().backward()
        assert torch.isfinite(latents.grad).all() and isinstance(packed, Codes) and torch.isfinite(packed.levels).all()


@pytest.mark.parametrize("key", KEYS)
def test_after_pruning_the_weights_that_stay_are_codes_and_train(key, digits):
    model = compress(build("mlp", "digits"), "magnitude_pruning_han", keep=0.3)
    model = compress(model, key)
    masks = {n: p.mask for n, p in plan_of(model).items()}
    fit(model, digits, epochs=1, lr=1e-3)
    for n, p in plan_of(model).items():
        assert torch.equal(p.mask, masks[n]) and not p.dense()[~p.mask].any() and len(p.dense()[p.mask].unique()) <= p.codes.count


@pytest.mark.parametrize("net, data", [("lenet300", "mnist"), ("lenet5", "mnist"), ("mlp", "digits"), ("cnn", "digits")])
def test_signed_networks_read_both_signs(net, data):
    model = build(net, data)
    other, before, read = signed(model), weighted(model), []
    after = weighted(other)
    assert list(after) == list(before) and all(torch.equal(after[n].weight, before[n].weight) for n in before)
    assert not any(isinstance(m, nn.ReLU) for m in other.modules()) and all(after[n].weight is not before[n].weight for n in before)
    for layer in list(after.values())[1:]:
        layer.register_forward_pre_hook(lambda _, x: read.append(x[0]))
    logits = other.train()(torch.rand(64, *model.input_shape))
    assert len(read) == len(before) - 1 and logits.mean(0).abs().max() < 1e-5
    for x in read:
        assert x.mean().abs() < 0.05 and 0.2 < (x > 0).float().mean() < 0.8
    with pytest.raises(ValueError, match="chain"):
        signed(build("resnet", "mnist"))


def test_one_bit_network_learns_with_signed_inputs_and_not_after_relu(digits):
    """After a ReLU every sign is +1, so that the classes depend on nothing."""
    accuracies = []
    for model in (build("mlp", "digits"), signed(build("mlp", "digits"))):
        model = compress(model, "bnn")
        fit(model, digits, epochs=4, lr=0.03, batch=32)
        accuracies.append(evaluate(model, digits))
    assert accuracies[0] < 0.25 and accuracies[1] > 0.8
