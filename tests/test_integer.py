"""Whole-number networks against plain Python integers, numpy loops, ONNX Runtime's integer operators and the float path."""

from dataclasses import replace

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmlib.core.inputs import as_input
from cmlib.lab import integer
from cmlib.lab.data import load_data
from cmlib.lab.integer import IntegerError, Layer, Sum, integer_network
from cmlib.lab.ranges import affine, weight_affine
from cmlib.lab.train import evaluate, predict
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build, load_net

LIMIT = 2**31
F64 = torch.float64


@pytest.fixture(scope="module", autouse=True)
def _read_once():
    """What is slow only the first time is done before a test is timed."""
    for name in ("mnist", "fashion_mnist", "digits"):
        load_data(name)
    with _NoFloats():
        torch.zeros(1, dtype=torch.int64)


def high_product(a, b):
    """gemmlowp/fixedpoint.h, SaturatingRoundingDoublingHighMul, in Python's own integers (C divides toward zero)."""
    if a == b == -LIMIT:
        return LIMIT - 1
    nudged = a * b + (1 << 30 if a * b >= 0 else 1 - (1 << 30))
    return nudged // LIMIT if nudged >= 0 else -(-nudged // LIMIT)


def divided(x, n):
    """gemmlowp/fixedpoint.h, RoundingDivideByPOT."""
    mask = (1 << n) - 1
    return (x >> n) + ((x & mask) > (mask >> 1) + (x < 0))


def rescaled(x, m0, n):
    return divided(high_product(int(x), int(m0)), int(n))


def test_rounding_is_gemmlowps():
    draw = np.random.default_rng(0)
    a = np.concatenate([draw.integers(-LIMIT, LIMIT, 2000), draw.integers(-300, 300, 1000), [-LIMIT, LIMIT - 1, 0, 1, -1]])
    b = np.concatenate([draw.integers(LIMIT // 2, LIMIT, len(a) - 2), [LIMIT // 2, LIMIT - 1]])
    found = integer.high_product(torch.from_numpy(a).int(), torch.from_numpy(b).int())
    assert found.tolist() == [high_product(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    for n in (0, 1, 2, 7, 30, 31):
        ties = np.concatenate([a, ((1 << n) // 2) * np.array([-3, -1, 1, 3])])
        assert integer.shifted(torch.from_numpy(ties), torch.tensor(n, dtype=torch.uint8)).tolist() == [divided(int(x), n) for x in ties]


def test_multipliers_in_fixed_point():
    m = torch.cat([torch.rand(1000, dtype=F64), torch.tensor([0.5, 0.25, 1e-9, 1 - 1e-12, 0.5 - 1e-13], dtype=F64)])
    m0, n = integer.fixed_point(m)
    assert m0.dtype == torch.int32 and (m0 >= 2**30).all()
    allowed = torch.where(m < 1 - 2**-32, 2.0**-32, 2.0**-31)  # above, the nearest would be 2^31, which is no int32
    assert ((m0.double() / 2**31 / 2.0 ** n.double() - m).abs() <= allowed * 2.0 ** -n.double()).all()
    for bad in (0.0, 1.0, 1.5, -0.25, torch.nan):
        with pytest.raises(IntegerError, match="not below 1"):
            integer.fixed_point(torch.tensor([0.5, bad], dtype=F64))


def sums_by_hand(layer, q):
    """sum (q1 - Z1)(q2 - Z2) + bias in int64, positions one by one."""
    x = q.numpy().astype(np.int64) - int(layer.zero_in)
    w = layer.codes.numpy().astype(np.int64) - layer.zero.numpy().astype(np.int64)
    bias = layer.bias.numpy().astype(np.int64)
    if w.ndim == 2:
        return np.einsum("nk,ok->no", x, w) + bias
    (sy, sx), (py, px), k = layer.how["stride"], layer.how["padding"], w.shape[2]
    x = np.pad(x, ((0, 0), (0, 0), (py, py), (px, px)))
    height, width = (x.shape[2] - k) // sy + 1, (x.shape[3] - k) // sx + 1
    out = np.zeros((len(x), len(w), height, width), np.int64)
    for i in range(height):
        for j in range(width):
            out[:, :, i, j] = np.einsum("ncyx,ocyx->no", x[:, :, i * sy : i * sy + k, j * sx : j * sx + k], w)
    return out + bias.reshape(-1, 1, 1)


def per_filter(numbers, like):
    shape = (1, -1, *[1] * (like.ndim - 2))
    return np.broadcast_to(numbers.numpy().astype(object).reshape(shape), like.shape)


def step_by_hand(step, inputs):
    """A step's codes in Python integers."""
    if isinstance(step, Layer):
        total = sums_by_hand(step, inputs[0])
        codes = np.vectorize(rescaled, otypes=[object])(total, per_filter(step.m0, total), per_filter(step.n, total))
    elif isinstance(step, Sum):
        moved = []
        for i, q in enumerate(inputs):
            x = (q.numpy().astype(np.int64) - int(step.zeros[i])) << 20
            moved.append(np.vectorize(rescaled, otypes=[object])(x, int(step.m0[i]), int(step.n[i])))
        codes = np.vectorize(rescaled, otypes=[object])(moved[0] + moved[1], int(step.m0[2]), int(step.n[2]))
    elif isinstance(step, integer.Mean):
        x = inputs[0].numpy().astype(np.int64)
        return torch.from_numpy(np.floor(x.mean((2, 3), keepdims=True) + 0.5).astype(np.uint8))
    elif isinstance(step, nn.MaxPool2d):
        x, k = inputs[0].numpy(), step.kernel_size
        return torch.from_numpy(x.reshape(*x.shape[:2], x.shape[2] // k, k, x.shape[3] // k, k).max((3, 5)))
    elif isinstance(step, integer.Clamp):
        return torch.from_numpy(np.maximum(inputs[0].numpy(), int(step.zero)))
    else:
        assert isinstance(step, (nn.Flatten, nn.Identity))
        return inputs[0].flatten(1) if isinstance(step, nn.Flatten) else inputs[0]
    return torch.from_numpy(np.clip(codes + int(step.zero_out), 0, step.top).astype(np.uint8))


def by_hand(net, images):
    values = [images]
    for step, wires in zip(net.steps, net.wires, strict=True):
        values.append(step_by_hand(step, [values[i] for i in wires]))
    return values[-1]


@pytest.mark.parametrize(
    "net, data, images, bits, per",
    [
        ("linear", "digits", 200, 8, "tensor"), ("mlp", "digits", 200, 8, "tensor"), ("mlp", "digits", 200, 3, "filter"),
        ("cnn", "digits", 100, 8, "tensor"), ("cnn", "digits", 100, 5, "filter"), ("lenet300", "mnist", 100, 8, "filter"),
        ("lenet5", "mnist", 5, 8, "tensor"), ("lenet5", "mnist", 5, 8, "filter"),
        ("resnet", "fashion_mnist", 2, 8, "tensor"), ("resnet", "fashion_mnist", 2, 6, "filter"),
    ],
)  # fmt: skip
def test_every_network_equals_the_integer_reference_bit_for_bit(net, data, images, bits, per):
    data = load_data(data)
    made = integer_network(load_net(net, data.name), data, bits=bits, per=per, samples=64)
    x = data.validation[0][:images]
    found = made(x)
    assert found.dtype == torch.uint8 and found.max() > found.min()
    assert torch.equal(found, by_hand(made, x))


class _NoFloats(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            assert not (isinstance(t, torch.Tensor) and t.is_floating_point()), op
        return out


@pytest.mark.parametrize("net, data", [("lenet5", "mnist"), ("resnet", "fashion_mnist"), ("cnn", "digits")])
def test_no_float_stands_between_the_images_and_the_answer(net, data):
    data = load_data(data)
    made = integer_network(load_net(net, data.name), data, samples=64)
    assert not any(t.is_floating_point() for t in [*made.parameters(), *made.buffers()])
    with _NoFloats():
        made(data.validation[0][:3]).argmax(1)


def random_layer(seed, conv=False, wide=1.0):
    """(the float layer, its integer form, ranges of its input and output, codes to feed it)."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 4, 3, stride=1 + seed % 2, padding=seed % 3) if conv else nn.Linear(30, 7)
    into = affine(-torch.rand(1, generator=draw).item(), 0.1 + 3 * torch.rand(1, generator=draw).item(), 8)
    codes = torch.randint(0, 256, (6, 3, 7, 7) if conv else (6, 30), generator=draw).to(torch.uint8)
    with torch.no_grad():
        y = layer(into.dequantize(codes))
    out = affine(wide * y.min().item(), wide * y.max().item(), 8)
    weight = weight_affine(layer.weight, 8, "filter" if seed % 2 else "tensor")
    return layer, Layer(layer, weight, into, out), (weight, into, out), codes


def test_the_integer_path_is_the_fake_quantized_float_path_to_one_code():
    moved = 0
    for seed in range(320):
        layer, whole, (weight, into, out), codes = random_layer(seed, conv=seed % 4 == 0, wide=0.7)
        x, w = into.dequantize(codes), weight.rounded(layer.weight.detach())
        y = F.conv2d(x, w, layer.bias, **whole.how) if seed % 4 == 0 else F.linear(x, w, layer.bias)
        difference = (whole(codes).int() - out.quantize(y.detach())).abs()
        assert difference.max() <= 1
        moved += int((difference > 0).sum())
    assert 0 < moved < 500  # of 58,000 codes: only where a value lies on the line between two


def test_with_a_real_multiplier_only_ties_differ_and_fixed_point_adds_a_rounding():
    for seed in range(60):
        _, whole, (weight, into, out), codes = random_layer(seed)
        s1, s2, s3 = (a.scale.double() for a in (into, weight, out))
        m = (s1 * s2 / s3).reshape(-1)
        real = whole.sums(codes).double() * m
        x, w = (codes.double() - into.zero) * s1, (whole.codes.double() - weight.zero) * s2
        fake = F.linear(x, w, whole.bias * (s1 * s2).reshape(-1)) / s3  # what the fake-quantized layer computes, in steps of its output
        from_tie = (real - real.floor() - 0.5).abs()
        assert torch.equal(real.round()[from_tie > 1e-9], fake.round()[from_tie > 1e-9])
        sure = from_tie > 2.0 ** -(whole.n.double() + 1) + 1e-6  # the product is rounded once before the shift rounds it again
        expected = (real.round() + out.zero).clamp(0, 255)
        assert torch.equal(whole(codes).double()[sure], expected[sure]) and sure.double().mean() > 0.9


def test_the_expanded_sum_is_the_direct_one():
    for seed in range(20):
        _, whole, _, codes = random_layer(seed)
        q1, q2 = codes.long(), whole.codes.long()
        z1, z2, n = int(whole.zero_in), whole.zero.long().flatten(), q1.shape[1]
        expanded = n * z1 * z2 - z1 * q2.sum(1) - z2 * q1.sum(1, keepdim=True) + q1 @ q2.T
        assert torch.equal(expanded + whole.bias, whole.sums(codes).long())


def onnx_sums(op, q, w, zero_in, zero, **attributes):
    """The same sums by ONNX Runtime's integer operators."""
    names = ["q", "w", "zq", "zw"]
    arrays = [q, w, np.array(zero_in, np.uint8), zero]
    inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, a.shape) for n, a in zip(names, arrays, strict=True)]
    node = helper.make_node(op, names, ["y"], **attributes)
    graph = helper.make_graph([node], "sums", inputs, [helper.make_tensor_value_info("y", TensorProto.INT32, [None] * q.ndim)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, arrays, strict=True)))[0]


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_onnx_runtimes(seed):
    _, dense, _, q = random_layer(seed)
    found = onnx_sums("MatMulInteger", q.numpy(), dense.codes.numpy().T.copy(), dense.zero_in.numpy(), dense.zero.numpy().reshape(-1))
    assert np.array_equal(found + dense.bias.numpy(), dense.sums(q).numpy())
    if seed % 2 == 0:  # ConvInteger there knows one zero point
        _, conv, _, q = random_layer(seed, conv=True)
        how = {"strides": conv.how["stride"], "pads": conv.how["padding"] * 2}
        found = onnx_sums("ConvInteger", q.numpy(), conv.codes.numpy(), conv.zero_in.numpy(), conv.zero.numpy(), **how)
        assert np.array_equal(found + conv.bias.numpy()[:, None, None], conv.sums(q).numpy())


def test_padding_is_the_code_of_zero():
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    into, out = affine(-1.0, 1.0), affine(-9.0, 9.0)
    whole = Layer(layer, weight_affine(layer.weight), into, out)
    q = torch.full((1, 1, 3, 3), 255, dtype=torch.uint8)
    real = F.conv2d(into.dequantize(q), layer.weight, padding=1)
    assert (out.dequantize(whole(q)) - real).abs().max() <= 0.51 * out.scale


def test_a_sum_of_two_scales_is_right_to_one_code():
    q = torch.arange(256).to(torch.uint8)
    for a, b, out in (((-1, 3), (-0.01, 0.02), (-1, 3)), ((0, 2), (-5, 5), (0, 4)), ((-1, 1), (-1, 1), (-2, 2))):
        a, b, out = affine(*a), affine(*b), affine(*out)
        x, y = torch.meshgrid(q, q, indexing="ij")
        real = (a.dequantize(x).double() + b.dequantize(y).double()) / out.scale.double() + int(out.zero)
        found = Sum(a, b, out)(x, y).double()
        assert (found - real.clamp(0, 255)).abs().max() <= 0.5 + 1e-3


def test_the_mean_rounds_halves_upward():
    q = torch.tensor([[[[0, 1], [1, 0]], [[255, 255], [255, 255]], [[1, 0], [0, 0]], [[1, 1], [1, 0]]]], dtype=torch.uint8)
    assert integer.Mean()(q).flatten().tolist() == [1, 255, 0, 1]


@pytest.mark.parametrize(
    "inputs, bias, fits", [(33_025, 0, True), (33_026, 0, False), (33_025, 33_022, True), (33_025, 33_023, False), (9, torch.inf, False)]
)
def test_no_sum_leaves_32_bits_and_one_that_could_is_refused(inputs, bias, fits):
    layer, one = nn.Linear(inputs, 1), affine(0.0, 1.0)  # every code 255, zero points 0: sums up to inputs x 255 x 255 + bias
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(bias / 255**2)
    if not fits:
        with pytest.raises(IntegerError, match="beyond 32 bits"):
            Layer(layer, weight_affine(layer.weight), one, affine(0.0, 4e4))
    else:
        whole = Layer(layer, weight_affine(layer.weight), one, affine(0.0, 4e4))
        assert whole.sums(torch.full((1, inputs), 255, dtype=torch.uint8)).item() == inputs * 255**2 + bias < LIMIT


def test_integers_are_as_accurate_as_floats_at_eight_bits(digits):
    for net in ("linear", "mlp", "cnn"):
        dense = evaluate(load_net(net, "digits"), digits)
        eight, three = (integer_network(load_net(net, "digits"), digits, bits=b).evaluate(digits) for b in (8, 2))
        assert abs(eight - dense) <= 0.01 and three < dense - 0.02


def test_the_answer_stands_for_logits(digits):
    model = load_net("mlp", "digits")
    made, x = integer_network(model, digits), digits.validation[0]
    logits = made.out.dequantize(made(x))
    with torch.no_grad():
        real = model(as_input(x))
    assert (logits - real).abs().max() < 0.03 * (real.max() - real.min())


def test_more_filters_scales_are_more_accurate_where_filters_differ(digits):
    model = build("cnn", "digits")
    model = networks.stirred(model)
    with torch.no_grad():
        model.conv2.weight.mul_(torch.logspace(-1, 1, 16)[:, None, None, None])
        reference = model(as_input(digits.validation[0]))

    def error(per):
        made = integer_network(model, digits, bits=6, per=per)
        return (made.out.dequantize(made(digits.validation[0])) - reference).square().mean()

    assert error("filter") < error("tensor")


def test_bytes_are_what_is_held():
    data = load_data("mnist")
    made = integer_network(load_net("lenet5", "mnist"), data, samples=64)
    weights, biases, layers = 430_500, 580, 4
    per_layer = 3  # zero points of the weights, the input and the output, a byte each
    multipliers = layers * (4 + 1)  # int32 and the shift
    assert made.bytes == weights + 4 * biases + layers * per_layer + multipliers
    by_filter = integer_network(load_net("lenet5", "mnist"), data, per="filter", samples=64)
    assert by_filter.bytes == weights + 4 * biases + layers * 2 + biases * (1 + 4 + 1)


def test_a_relu_behind_a_folded_norm_is_the_clamp():
    data = load_data("fashion_mnist")
    made = integer_network(load_net("resnet", "fashion_mnist"), data, samples=64)
    layers = [s for s in made.steps if isinstance(s, (Layer, Sum))]
    behind_relu = [s for s in layers if int(s.zero_out) == 0]
    assert len(behind_relu) == 1 + 3 + 3 and len(layers) == 10 + 3  # conv, conv1 and the sum of each block
    assert not any(isinstance(s, integer.Clamp) for s in made.steps)


def test_a_relu_elsewhere_clamps_at_the_code_of_zero(digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)).eval()
    made, x = integer_network(model, digits), digits.validation[0][:50]
    assert [type(s) for s in made.steps] == [Layer, nn.MaxPool2d, integer.Clamp, nn.Flatten, Layer]
    assert torch.equal(made(x), by_hand(made, x))
    with torch.no_grad():
        assert (made.out.dequantize(made(x)) - model(as_input(x))).abs().max() < 0.1


def test_a_pruned_network_runs_in_integers(digits):
    small = compress(load_net("mlp", "digits"), "magnitude_pruning_han", keep=0.3)
    made = integer_network(small, digits)
    kept = [(s.codes != s.zero).float().mean() for s in made.steps if isinstance(s, Layer)]
    assert max(kept) <= 0.31 and abs(made.evaluate(digits) - evaluate(small, digits)) <= 0.01


class Functional(nn.Module):
    """A network whose path is written with functions."""

    def __init__(self, step):
        super().__init__()
        self.conv, self.fc, self.step = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 10), step

    def forward(self, x):
        return self.step(self, torch.relu(self.conv(x)))


def test_functions_are_followed_as_layers_are(digits):
    model = Functional(lambda net, y: net.fc(torch.flatten(y + F.relu(y), 1))).eval()
    made, x = integer_network(model, digits), digits.validation[0][:40]
    assert torch.equal(made(x), by_hand(made, x))
    with torch.no_grad():
        assert (made.out.dequantize(made(x)) - model(as_input(x))).abs().max() < 0.05


def conv_then(*rest, **how):
    return nn.Sequential(nn.Conv2d(1, 2, 3, **how), *rest)


BAD = {
    r"1 \(Sigmoid\) has no form in whole numbers here; there are AdaptiveAvgPool2d, Conv2d": conv_then(nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 10)),
    r"0 \(BatchNorm2d\)": nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)),
    r"view \(view\)": Functional(lambda net, y: net.fc(y.view(-1, 144))),
    r"log_softmax \(log_softmax\)": Functional(lambda net, y: F.log_softmax(net.fc(torch.flatten(y, 1)), 1)),
    "add has no form in whole numbers: it adds something else": Functional(lambda net, y: net.fc(torch.flatten(y + 1.0, 1))),
    "add has no form in whole numbers: it adds": Functional(lambda net, y: net.fc(torch.flatten(torch.add(y, y, alpha=2), 1))),
    "flatten has no form in whole numbers: only torch.flatten": Functional(lambda net, y: net.fc(torch.flatten(torch.flatten(y, 2), 1))),
    "0 has no form in whole numbers: it pads with 'reflect'": conv_then(nn.Flatten(), nn.Linear(128, 10), padding=1, padding_mode="reflect"),
    "1 has no form in whole numbers: it gives maps of 2": conv_then(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 10)),
    "not that of its last step alone": Functional(lambda net, y: (net.fc(torch.flatten(y, 1)), y)),
}


@pytest.mark.parametrize("said", BAD)
def test_what_has_no_integer_form_is_named(said, digits):
    with pytest.raises(IntegerError, match=said):
        integer_network(BAD[said].eval(), digits, samples=32)


def test_bad_input_is_named(digits):
    model = load_net("mlp", "digits")
    for knobs, said in (({"bits": 9}, "bits=9"), ({"bits": 1}, "bits=1"), ({"per": "row"}, "per='row'"), ({"how": "max"}, "how='max'")):
        with pytest.raises(ValueError, match=said):
            integer_network(model, digits, **knobs)
    images, labels = digits.train
    with pytest.raises(ValueError, match="uint8 images"):
        integer_network(model, (as_input(images), labels))
    with pytest.raises(ValueError, match="the network meets nothing but 0 on the calibration images"):
        integer_network(model, (images[:20] * 0, labels[:20]))
    with torch.no_grad():
        model.fc2.weight.zero_()
    with pytest.raises(IntegerError, match="fc2 has no form in whole numbers: its weights are all zero"):
        integer_network(model, digits)
    with pytest.raises(TypeError, match="takes uint8 images"):
        integer_network(load_net("mlp", "digits"), digits)(as_input(images[:2]))


def test_ranges_come_from_training_images_only(digits):
    model = load_net("mlp", "digits")
    blind = replace(digits, validation=(digits.validation[0] * 0, digits.validation[1]), test=(digits.test[0] * 0, digits.test[1]))
    a, b = integer_network(model, digits), integer_network(model, blind)
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))


def test_a_network_whose_inputs_are_rounded_already_is_refused(digits):
    model = compress(load_net("mlp", "digits"), "dorefa_net", bits=4, a_bits=2)
    with pytest.raises(IntegerError, match="fc2 rounds its inputs already"):
        integer_network(model, digits)


@pytest.mark.parametrize("per", ["tensor", "filter"])
def test_a_filter_of_next_to_nothing_leaves_its_bias(digits, per):
    model = load_net("cnn", "digits")
    with torch.no_grad():
        model.conv2.weight[0] *= 1e-9
        model.bn2.reset_running_stats()
        model.conv2.bias[0] = 1.0
    made = integer_network(model, digits, per=per)
    answers = made.predict(digits.validation[0]).argmax(1)
    assert (answers == predict(model, digits.validation[0]).argmax(1)).double().mean() > 0.9
