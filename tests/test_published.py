"""Published layer densities on real definitions: counts against arithmetic done by hand, bytes against the arrays that a file holds."""

import math
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from cmlib.core.storage import FORMATS, encode
from cmlib.lab.nets import lenet5, lenet300
from cmlib.lab.published import TABLES, applied, in_megabytes, published_layers, random_places

ALEXNET = [64 * 3 * 121, 192 * 64 * 25, 384 * 192 * 9, 256 * 384 * 9, 256 * 256 * 9, 4096 * 9216, 4096 * 4096, 1000 * 4096]
CHANNELS = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
VGG16 = [9 * i * o for i, o in zip(CHANNELS[:-1], CHANNELS[1:], strict=True)] + [4096 * 25088, 4096 * 4096, 1000 * 4096]
MAKERS = {"AlexNet": torchvision.models.alexnet, "VGG-16": torchvision.models.vgg16}
NETWORKS = ("LeNet-300-100", "LeNet-5", "AlexNet", "VGG-16")


@pytest.fixture(scope="module")
def big():
    """The paper's densities on torchvision's definitions, which take no memory."""
    with torch.device("meta"):
        return {name: applied(make(), published_layers("han_2015", name).density[:-1]) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name, counts, total", [("AlexNet", ALEXNET, 61_090_496), ("VGG-16", VGG16, 138_344_128)])
def test_weights_are_counted_as_by_hand(big, name, counts, total):
    table = big[name]
    assert table.weights.tolist() == counts and table.weights.sum() == total
    assert table.kept.tolist() == [round(c * d) for c, d in zip(counts, table.density, strict=True)]


@pytest.mark.parametrize("name, claim, kept, times", [("AlexNet", 6.7e6, 6_845_416, 9), ("VGG-16", 10.3e6, 10_532_393, 13)])
def test_what_is_kept_is_within_3_percent_of_the_papers_total(big, name, claim, kept, times):
    table, paper = big[name], published_layers("han_2015", name).iloc[-1]
    assert table.kept.sum() == kept and paper.kept == claim and paper.layer == "total"
    assert abs(kept / claim - 1) < 0.03
    assert round(table.weights.sum() / kept) == times


def test_torchvisions_alexnet_is_not_quite_the_papers(big):
    paper = published_layers("han_2015", "AlexNet")[:-1]
    unlike = [n for n, printed, counted in zip(paper.layer, paper.weights, big["AlexNet"].weights, strict=True) if abs(counted / printed - 1) > 0.1]
    assert unlike == ["conv1", "conv3", "conv4", "conv5"]  # the variant in one tower
    vgg = published_layers("han_2015", "VGG-16")[:-1]
    assert all(abs(c / p - 1) < 0.2 for c, p in zip(big["VGG-16"].weights, vgg.weights, strict=True))  # 2.36 million are printed as 2M


@pytest.mark.parametrize("name, make, kept", [("LeNet-300-100", lenet300, 18_816 + 2_700 + 260), ("LeNet-5", lenet5, 330 + 3_000 + 32_000 + 950)])
def test_the_papers_small_networks_are_the_kits(name, make, kept):
    paper = published_layers("han_2015", name)
    table = applied(make(), paper.density[:-1])
    assert table.kept.sum() == kept
    assert kept == pytest.approx(paper.kept.iloc[-1], rel=0.03)
    assert np.allclose(table.weights, paper.weights[:-1], rtol=0.03)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_row_has_a_density_and_a_source(name):
    table = published_layers("han_2015", name)
    assert table.density.between(0.01, 0.9).all() and (table.weights > 0).all() and (table.kept > 0).all()
    assert table.source.str.contains("arXiv:1506.02626").all() and table.layer.is_unique
    total = table.iloc[-1]
    assert total.kept / total.weights == pytest.approx(total.density, abs=0.006)


def test_bytes_are_those_of_the_arrays_of_a_file():
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(300, 70), nn.Linear(70, 10))
    densities, rng = [0.5, 0.03, 1.0], np.random.default_rng(0)
    table = applied(net, densities)
    for row, layer, density in zip(table.itertuples(), (net[0], net[2], net[3]), densities, strict=True):
        shape, total = tuple(layer.weight.shape), layer.weight.numel()
        mask = np.zeros(total, bool)
        mask[random_places(total, round(density * total), rng)] = True  # the same draw
        for form in FORMATS:
            arrays, _ = encode(np.ones(shape, np.float32), mask.reshape(shape), form)
            assert getattr(row, form) == sum(a.nbytes for a in arrays.values()), (row.layer, form)


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_of_the_large_networks_follow_the_formulas(big, name):
    with torch.device("meta"):
        shapes = [tuple(m.weight.shape) for m in MAKERS[name]().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for row, shape in zip(big[name].itertuples(), shapes, strict=True):
        n, kept, columns = row.weights, row.kept, math.prod(shape[1:])
        assert row.dense == 4 * n and row.bitmap == math.ceil(n / 8) + 4 * kept
        assert row.csr == (shape[0] + 1) * (1 if kept < 2**8 else 2 if kept < 2**16 else 4) + kept * (4 + (1 if columns < 2**8 else 2))
        assert row.relative == pytest.approx(relative(kept, kept / n), rel=0.01 if n < 1e5 else 2e-3)


def relative(kept, density):
    """Expected bytes of k-bit gaps at random places: a gap of g takes floor(g / 2^k) fillers, sum over j of (1 - density)^(j 2^k)."""
    fillers = {k: (1 - density) ** 2**k / (1 - (1 - density) ** 2**k) for k in range(1, 17)}
    return min(kept * (1 + more) * (4 + k / 8) for k, more in fillers.items())


def test_megabytes_add_up(big):
    for table in big.values():
        found = in_megabytes(table)
        assert list(found) == list(FORMATS) and found["dense"]["places"] == pytest.approx(0, abs=1e-9)
        for form, parts in found.items():
            assert sum(parts.values()) == pytest.approx(table[form].sum() / 1e6)
            assert parts["values"] == pytest.approx(4e-6 * (table.weights if form == "dense" else table.kept).sum())
    vgg = in_megabytes(big["VGG-16"])
    assert 11 < vgg["dense"]["values"] / sum(vgg["relative"].values()) < 13  # 13 times fewer weights are not 13 times fewer bytes


@pytest.mark.parametrize("total, kept", [(1, 0), (1, 1), (10, 10), (10, 9), (1000, 1), (1000, 0), (50_000, 25_000), (1_000_000, 1_234)])
def test_random_places_rise_and_are_as_many_as_asked(total, kept):
    found = random_places(total, kept, np.random.default_rng(3))
    assert len(found) == kept and (np.diff(found) > 0).all()
    assert kept == 0 or (found[0] >= 0 and found[-1] < total)


@pytest.mark.parametrize("kept", [-1, 11])
def test_more_places_than_there_are_cannot_be_drawn(kept):
    with pytest.raises(ValueError, match=rf"{kept} of 10 places cannot be drawn"):
        random_places(10, kept, np.random.default_rng(0))


@pytest.mark.parametrize("total, kept", [(6, 2), (6, 4)])
def test_every_choice_of_places_is_equally_likely(total, kept):
    rng, draws = np.random.default_rng(0), 6_000
    counts: dict[tuple, int] = {}
    for _ in range(draws):
        found = tuple(random_places(total, kept, rng))
        counts[found] = counts.get(found, 0) + 1
    expected = draws / math.comb(total, kept)
    assert len(counts) == math.comb(total, kept)
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 36  # chi-squared with 14 degrees of freedom: p = 0.001


def test_the_same_seed_gives_the_same_bytes():
    tables = [applied(lenet5(), [0.5, 0.1, 0.1, 0.2], seed=seed) for seed in (0, 0, 1)]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_what_is_not_there_is_answered_with_what_there_is():
    with pytest.raises(ValueError, match=r"han_2015 has no network 'ResNet-50'; it has LeNet-300-100, LeNet-5, AlexNet, VGG-16"):
        published_layers("han_2015", "ResNet-50")
    for paper in ("han_2016", "", "../lab/published/han_2015"):
        with pytest.raises(ValueError, match=r"no published layers of .*; there are those of han_2015"):
            published_layers(paper, "AlexNet")


def test_densities_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"3 densities for 4 layers: conv1, conv2, fc1, fc2"):
        applied(lenet5(), [0.5, 0.5, 0.5])
    for wrong in (1.2, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"a density is a share in \[0, 1\]; got {wrong}"):
            applied(lenet5(), [0.5, wrong, 0.5, 0.5])


def test_the_tables_ship_with_the_package():
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["cmlib"]
    files = [f"lab/published/{p.name}" for p in TABLES.glob("*.csv")]
    assert files and all(any(fnmatch(f, p) for p in patterns) for f in files)
