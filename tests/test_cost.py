"""Counting against torch's own counter and against arithmetic done by hand; the notebook's convolution against torch's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from cmlib.lab import cost
from cmlib.lab.zoo import build

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "01_why_compress.ipynb"

LAYERS = {
    "plain": (nn.Conv2d(3, 8, 3), (2, 3, 11, 9)),
    "stride and padding": (nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), (1, 3, 13, 12)),
    "grouped": (nn.Conv2d(8, 12, 3, groups=4), (2, 8, 9, 9)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (1, 6, 10, 10)),
    "depthwise, two filters a channel": (nn.Conv2d(6, 12, 3, groups=6), (1, 6, 10, 10)),
    "dilated": (nn.Conv2d(4, 5, 3, dilation=2), (1, 4, 12, 12)),
    "oblong": (nn.Conv2d(4, 5, (1, 7), stride=(2, 1)), (1, 4, 12, 12)),
    "pointwise": (nn.Conv2d(7, 9, 1), (3, 7, 5, 5)),
    "one axis": (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 15)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5)),
    "dense": (nn.Linear(30, 20), (4, 30)),
    "dense over a sequence": (nn.Linear(30, 20, bias=False), (4, 7, 30)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_counts_as_torch_counts(name):
    layer, shape = LAYERS[name]
    model, x = nn.Sequential(layer), torch.rand(shape)
    rows = cost.layer_costs(model, x)
    assert len(rows) == 1
    row = rows.iloc[0]
    assert row.multiply_adds == cost.multiply_adds(model, x) > 0
    assert row.parameters == sum(p.numel() for p in layer.parameters())
    assert row.weight_bytes == 4 * row.parameters
    assert row.in_bytes == 4 * x.numel()
    assert row.out_bytes == 4 * layer(x).numel()
    assert row.output == tuple(layer(x).shape)


@pytest.mark.parametrize("name, kind", [("plain", "conv"), ("grouped", "grouped"), ("depthwise", "depthwise"), ("dense", "dense")])
def test_kinds(name, kind):
    layer, shape = LAYERS[name]
    assert cost.layer_costs(nn.Sequential(layer), torch.rand(shape)).kind[0] == kind


@pytest.mark.parametrize(
    "make, parameters, millions",
    [("alexnet", 61_100_840, 714.188480), ("vgg16", 138_357_544, 15_470.264320), ("resnet50", 25_557_032, 4_089.184256)],
)
def test_the_three_famous_networks(make, parameters, millions):
    with torch.device("meta"):
        model, x = getattr(torchvision.models, make)(), torch.empty(1, 3, 224, 224)
    rows = cost.layer_costs(model, x)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    assert rows.parameters.sum() + norms == parameters
    assert rows.multiply_adds.sum() == cost.multiply_adds(model, x) == round(millions * 1e6)


@pytest.mark.parametrize("net", ["lenet300", "lenet5", "resnet"])
def test_the_kits_networks_and_batches(net):
    model = build(net, "mnist")
    one, many = (cost.layer_costs(model, torch.rand(n, 1, 28, 28)) for n in (1, 8))
    assert one.multiply_adds.sum() == cost.multiply_adds(model, torch.rand(1, 1, 28, 28))
    assert (many.multiply_adds == 8 * one.multiply_adds).all()
    assert (many.weight_bytes == one.weight_bytes).all()
    assert (many.intensity > one.intensity).all()


def test_intensity_by_hand():
    row = cost.layer_costs(nn.Sequential(nn.Linear(800, 500)), torch.rand(1, 800)).iloc[0]
    assert row.intensity == pytest.approx(2 * 800 * 500 / (4 * (800 * 500 + 500 + 800 + 500)), rel=1e-12)
    row = cost.layer_costs(nn.Sequential(nn.Conv2d(1, 20, 5)), torch.rand(2, 1, 28, 28)).iloc[0]
    by_hand = 2 * (2 * 20 * 25 * 24 * 24) / (4 * (20 * 25 + 20 + 2 * 28 * 28 + 2 * 20 * 24 * 24))
    assert row.intensity == pytest.approx(by_hand, rel=1e-12)


def test_a_weight_used_twice_is_stored_once_and_read_twice():
    shared = nn.Linear(6, 6)
    rows = cost.layer_costs(nn.Sequential(shared, nn.ReLU(), shared), torch.rand(1, 6))
    assert list(rows.parameters) == [42, 0]
    assert list(rows.weight_bytes) == [168, 168]
    assert list(rows.multiply_adds) == [36, 36]


def test_counting_leaves_the_model_as_it_was():
    model = build("cnn", "digits").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost.layer_costs(model, torch.rand(4, 1, 8, 8))
    cost.multiply_adds(model, torch.rand(4, 1, 8, 8))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_energy_by_hand():
    rows = cost.layer_costs(nn.Sequential(nn.Linear(100, 50, bias=False)), torch.rand(1, 100))
    found = cost.energy(rows).iloc[0]
    assert found.arithmetic == pytest.approx(5000 * 4.6e-6)
    assert found.weights == pytest.approx(5000 * 640e-6)
    assert found.activations == pytest.approx(150 * 5e-6)
    small = cost.energy(rows, "int8", weights="SRAM").iloc[0]
    assert small.arithmetic == pytest.approx(5000 * 0.3e-6)
    assert small.weights == pytest.approx(5000 / 4 * 5e-6)
    assert small.activations == pytest.approx(150 / 4 * 5e-6)


def test_roof():
    roof = cost.Roof(gflops=100, memory=20, cache=50)
    assert roof.ridge() == 5 and roof.ridge("cache") == 2
    assert np.allclose(roof.attainable([0.5, 5, 40]), [10, 100, 100])
    assert roof.attainable(0.5, "cache") == 25


def test_peak_is_within_what_machines_do():
    roof = cost.peak(side=256, megabytes=16, cache_megabytes=0.5, repeats=5)
    assert 0.01 < roof.gflops < 1e5 and 0.01 < roof.memory < 1e4 and 0.01 < roof.cache < 1e5


def test_milliseconds_measures_and_takes_turns():
    import time

    order = []
    times = cost.milliseconds(lambda: order.append("a"), lambda: (order.append("b"), time.sleep(0.01)), repeats=6, warmup=1)
    assert times.shape == (2, 6)
    assert order == ["a", "b"] * 7
    assert np.median(times[0]) < 10 <= times[1].min()
    assert cost.milliseconds(lambda: time.sleep(0.02), repeats=500, seconds=0.05).shape == (1, 5)


def test_layer_times_has_a_row_a_layer():
    model, x = build("lenet5", "mnist"), torch.rand(1, 1, 28, 28)
    times = cost.layer_times(model, x, repeats=5)
    assert list(times.layer) == list(cost.layer_costs(model, x).layer) == ["conv1", "conv2", "fc1", "fc2"]
    assert (times.low <= times.ms).all() and (times.ms <= times.high).all() and (times.low > 0).all()


@pytest.fixture(scope="module")
def by_hand():
    """The notebook's own functions, from the cells that define them."""
    space = {"torch": torch, "F": F}
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if "by_hand" in c["metadata"].get("tags", [])]
    assert len(cells) == 2
    for cell in cells:
        exec("".join(cell["source"]), space)
    return space


@pytest.mark.parametrize("channels, filters, k, stride", [(1, 20, 5, 1), (3, 4, 3, 1), (2, 5, 3, 2), (3, 2, 1, 1), (2, 3, 4, 3)])
def test_the_notebooks_convolution_and_im2col(by_hand, channels, filters, k, stride):
    torch.manual_seed(0)
    x, w = torch.rand(channels, 12, 11, dtype=torch.float64), torch.randn(filters, channels, k, k, dtype=torch.float64)
    truth = F.conv2d(x[None], w, stride=stride)[0]
    assert torch.allclose(by_hand["convolution"](x, w, stride), truth, atol=1e-12)
    columns = by_hand["im2col"](x, k, stride)
    assert torch.equal(columns, F.unfold(x[None], k, stride=stride)[0])
    assert torch.allclose((w.flatten(1) @ columns).view_as(truth), truth, atol=1e-12)
