"""Folding, ranges of real layers, simulated codes and corrected biases against identities and torch's own."""

from dataclasses import replace
from functools import partial

import networks
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.fx.experimental import optimization

from cmlib.core.channels import UntraceableError
from cmlib.core.inputs import as_input, sample
from cmlib.lab import calibrate
from cmlib.lab.ranges import RULES, affine, weight_affine
from cmlib.lab.train import evaluate, predict
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build, load_net

F64 = torch.float64
stirred = partial(networks.stirred, dtype=F64)


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


NETS = {
    "cnn": (lambda: build("cnn", "digits"), (1, 8, 8)),
    "residual": (lambda: build("resnet", "mnist"), (1, 28, 28)),
    "resnet18": (lambda: torchvision.models.resnet18(), (3, 32, 32)),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_says_the_same(name):
    make, shape = NETS[name]
    model, x = stirred(make()), torch.rand(2, *shape, dtype=F64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded = calibrate.fold_batch_norm(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(folded(x), expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(folded.float()(x.float()), expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert torch.allclose(optimization.fuse(model)(x), expected, rtol=1e-10, atol=1e-10)  # torch's own, for comparison
    assert not norms(folded) and norms(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_folding_makes_of_the_numbers():
    model = stirred(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()))
    folded, norm = calibrate.fold_batch_norm(model), model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(folded[0].weight, model[0].weight * scale[:, None], rtol=1e-12)
    assert torch.allclose(folded[0].bias, (model[0].bias - norm.running_mean) * scale + norm.bias, rtol=1e-12)
    assert isinstance(folded[1], nn.Identity)


class Twice(nn.Module):
    """A convolution whose output is also added, or which is used again behind a second norm."""

    def __init__(self, again):
        super().__init__()
        self.conv, self.bn, self.other, self.again = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), again

    def forward(self, x):
        y = self.conv(x)
        return self.other(self.conv(self.bn(y))) if self.again else self.bn(y) + y


@pytest.mark.parametrize("again", [True, False])
def test_a_norm_stays_where_folding_would_change_another_path(again):
    model, x = stirred(Twice(again)), torch.rand(3, 2, 4, 4, dtype=F64)
    folded = calibrate.fold_batch_norm(model)
    assert norms(folded) == norms(model)
    assert torch.equal(folded(x), model(x))


def test_a_norm_stays_that_has_nothing_to_fold_into_or_no_statistics():
    x = torch.rand(6, 2, 5, 5, dtype=F64)
    for model in (
        nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
        nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
    ):
        model = model.double().eval()
        folded = calibrate.fold_batch_norm(model)
        assert norms(folded) == norms(model) and torch.equal(folded(x), model(x))


def test_a_compressed_network_is_folded_as_it_computes():
    small = compress(build("cnn", "digits"), "magnitude_pruning_han", keep=0.3)
    x = torch.rand(4, 1, 8, 8)
    folded = calibrate.fold_batch_norm(small)
    assert torch.allclose(folded(x), small(x), atol=1e-6) and folded.conv2.weight.eq(0).sum() >= 0.6 * folded.conv2.weight.numel()


def test_a_path_that_depends_on_numbers_cannot_be_followed():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UntraceableError, match=r"torch.fx cannot follow the forward pass of Sequential"):
        calibrate.fold_batch_norm(nn.Sequential(nn.Linear(2, 2), Branch()))


def test_input_ranges_are_read_from_training_images_in_one_pass(digits):
    model = calibrate.fold_batch_norm(load_net("cnn", "digits"))
    found = calibrate.input_ranges(model, digits, samples=200)
    x = as_input(sample(digits, 200)[0])
    inside = {"conv1": x, "conv2": F.relu(model.conv1(x))}
    inside["fc"] = F.relu(model.conv2(inside["conv2"])).mean((2, 3))
    assert list(found) == list(inside)
    for name, values in inside.items():
        assert found[name] == pytest.approx((values.min().item(), values.max().item()), abs=1e-6)
    calls = []
    model.conv1.register_forward_pre_hook(lambda m, i: calls.append(len(i[0])))
    others = replace(digits, validation=(digits.validation[0] * 0, digits.validation[1]), test=(digits.test[0] * 0, digits.test[1]))
    assert calibrate.input_ranges(model, others, samples=200) == found and sum(calls) == 200
    assert not model.conv2._forward_pre_hooks


def test_ranges_of_a_layer_are_its_rule_on_its_histogram(digits):
    model = load_net("mlp", "digits")
    seen = calibrate.histograms(model, digits, samples=300)
    for how in RULES:
        assert calibrate.input_ranges(model, digits, how, bits=4, samples=300) == {n: RULES[how](h, 4) for n, h in seen.items()}


def test_calibration_sets_that_say_nothing_are_refused(digits):
    model = load_net("mlp", "digits")
    images, labels = digits.train
    with pytest.raises(ValueError, match="and some; got 0 images"):
        calibrate.input_ranges(model, (images[:0], labels[:0]))
    with pytest.raises(ValueError, match="fc1 meets nothing but 0 on the calibration images"):
        calibrate.input_ranges(model, (images[:50] * 0, labels[:50]))
    with pytest.raises(ValueError, match="the images hold numbers that are NaN or infinite"):
        calibrate.input_ranges(model, (torch.full((5, 1, 8, 8), torch.inf), labels[:5]))
    with pytest.raises(ValueError, match="no range can be read off for fc2: it meets values that are not finite"):
        calibrate.input_ranges(model, (torch.full((5, 1, 8, 8), torch.finfo().max), labels[:5]))
    with pytest.raises(ValueError, match="samples=0"):
        calibrate.input_ranges(model, digits, samples=0)
    with pytest.raises(ValueError, match=r"how='entropi' is not known \(did you mean 'entropy'\?\); the rules are minmax"):
        calibrate.input_ranges(model, digits, "entropi")
    with pytest.raises(ValueError, match="bits=17 is not allowed: a whole number from 1 to 16"):
        calibrate.input_ranges(model, digits, bits=17)
    assert not model.fc1._forward_pre_hooks


def test_sixteen_bits_are_close_to_float(digits):
    model = load_net("mlp", "digits")
    x = digits.validation[0]
    net = calibrate.simulated(model, calibrate.input_ranges(model, digits, samples=1500), bits=16)
    assert (predict(net, x) - predict(model, x)).abs().max() < 1e-3 * predict(model, x).abs().max()


def test_simulated_layers_compute_with_codes_and_the_original_is_untouched(digits):
    model = load_net("mlp", "digits")
    before, x = model.fc1.weight.clone(), as_input(digits.validation[0][:20])
    ranges = {"fc2": (-0.2, 4.0)}  # fc1 is left as it is
    net = calibrate.simulated(model, ranges, bits=3, per="filter")
    a = weight_affine(model.fc2.weight, 3, "filter")
    inside = affine(-0.2, 4.0, 3).rounded(F.relu(model.fc1(x.flatten(1))))
    assert torch.equal(net(x), F.linear(inside, a.rounded(model.fc2.weight), model.fc2.bias))
    assert torch.equal(model.fc1.weight, before) and not model.fc2._forward_pre_hooks and torch.equal(net.fc1.weight, before)


def test_a_layer_that_cannot_be_quantized_is_named(digits):
    model = load_net("mlp", "digits")
    with torch.no_grad():
        model.fc2.weight.zero_()
    with pytest.raises(ValueError, match="layer fc2 cannot be quantized: its weights are all zero"):
        calibrate.simulated(model, calibrate.input_ranges(model, digits))


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_corrected_biases_leave_no_shift(net, digits):
    model = calibrate.fold_batch_norm(load_net(net, "digits")).double()
    low = calibrate.simulated(model, calibrate.input_ranges(model, digits), bits=3)
    corrected = calibrate.bias_correction(model, low, digits, samples=300)
    images = sample(digits, 300)[0]
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    dense, before, after = (calibrate._output_means(m, images, names) for m in (model, low, corrected))
    for name in names:
        assert (after[name] - dense[name]).abs().max() < 1e-10 < (before[name] - dense[name]).abs().max()
        assert torch.equal(corrected.get_submodule(name).weight, low.get_submodule(name).weight)


def test_a_planted_shift_is_taken_off_the_bias_exactly():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    other = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    shift = torch.tensor([[0.5], [-1.0], [0.0]], dtype=F64).expand(3, 4)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight + shift)
    x = torch.rand(40, 4, dtype=F64)
    corrected = calibrate.bias_correction(model, other, (x, torch.zeros(40, dtype=torch.int64)))
    assert torch.allclose(corrected[0].bias, -(shift @ x.mean(0)), atol=1e-12) and other[0].bias is None


def test_bias_correction_wins_accuracy_back(digits):
    model = calibrate.fold_batch_norm(load_net("cnn", "digits"))
    low = calibrate.simulated(model, calibrate.input_ranges(model, digits), bits=3)
    assert evaluate(calibrate.bias_correction(model, low, digits), digits) > evaluate(low, digits) + 0.05


def test_bias_correction_needs_the_same_layers(digits):
    with pytest.raises(ValueError, match="different layers, conv1, conv2, fc and fc1, fc2"):
        calibrate.bias_correction(load_net("mlp", "digits"), load_net("cnn", "digits"), digits)


def test_the_comparison_has_a_row_a_setting(digits):
    model = load_net("cnn", "digits")
    table = calibrate.compared(model, digits, bits=(8, 3), how=("minmax", "mse"))
    assert list(table.columns) == ["how", "bits", "per", "accuracy"] and len(table) == 8
    folded = calibrate.fold_batch_norm(model)
    for row in table.itertuples():
        net = calibrate.simulated(folded, calibrate.input_ranges(folded, digits, row.how, bits=row.bits), bits=row.bits, per=row.per)
        assert row.accuracy == evaluate(net, digits)
    assert table.accuracy[table.bits == 8].min() > evaluate(model, digits) - 0.01 > table.accuracy[table.bits == 3].max() - 0.01
    better = calibrate.compared(model, digits, bits=(3,), how=("minmax",), corrected=True)
    assert better.accuracy.mean() > table.accuracy[(table.bits == 3) & (table.how == "minmax")].mean()
