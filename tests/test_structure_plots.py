"""The pictures of structures draw what the tables say: every artist's data against the numbers it was given."""

import numpy as np
import pandas as pd
import pytest
import torch
from figures import readable
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch

from cmlib.core.bake import bake
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build
from cmlib.view import structures
from cmlib.view.plots import AMBER, BLUE

SCAN = pd.DataFrame({
    "layer": ["conv1"] * 3 + ["fc1"] * 3, "keep": [0.5, 0.9, 0.1] * 2,
    "accuracy": [0.8, 0.95, 0.3, 0.9, 0.96, 0.6], "drop": [0.16, 0.01, 0.66, 0.06, 0.0, 0.36],
})  # fmt: skip
RUNS = pd.DataFrame([
    {"method": name, "seed": seed, "share": share, "accuracy": share * worth + 0.01 * seed}
    for name, worth in (("magnitude", 0.9), ("random", 0.7)) for share in (0.5, 0.1, 0.2) for seed in (0, 1, 2)
])  # fmt: skip
PUBLISHED = pd.DataFrame({"method": ["Li 2017", "He 2017"], "share": [0.36, 0.35], "accuracy": [0.6, 0.6]})
TIMES = pd.DataFrame(
    {"keep": [0.5, 1.0, 0.25], "ms": [3.0, 4.0, 2.5], "low": [2.8, 3.9, 2.4], "high": [3.3, 4.4, 2.6], "multiply_adds": [0.25, 1, 0.06]}
)
WEIGHT, ROWS = torch.linspace(-1, 1, 20 * 2 * 3 * 5).reshape(20, 2, 3, 5), torch.arange(20) % 3 > 0


def pruned(net, keep=0.5):
    model = build(net, "mnist")
    return model, bake(compress(model, "magnitude_pruning_han", unit="filter", keep=keep))


PICTURES = {
    "sensitivity_plot": lambda: structures.sensitivity_plot(SCAN, title="t"),
    "removal_diagram, shortcuts": lambda: structures.removal_diagram(*pruned("resnet")),
    "removal_diagram, dense": lambda: structures.removal_diagram(*pruned("lenet300")),
    "pareto": lambda: structures.pareto(RUNS, PUBLISHED),
    "pareto, ratios": lambda: structures.pareto(RUNS.assign(ratio=1 / RUNS.share), label="fewer parameters"),
    "filter_grid": lambda: structures.filter_grid(WEIGHT, ROWS, title="conv1"),
    "latency_steps": lambda: structures.latency_steps(TIMES),
}


@pytest.mark.parametrize("name", PICTURES)
def test_readable_and_labelled(name):
    figure = PICTURES[name]()
    readable(figure)
    assert figure.axes[0].get_xlabel()
    assert figure.axes[0].get_ylabel() or "removal" in name


def line(ax, name):
    """(xs, ys) of the line with this label."""
    found = next(a for a in ax.lines if a.get_label() == name)
    return np.array(found.get_xdata(), float), np.array(found.get_ydata(), float)


def band(ax, number):
    """{x: (low, high)} of a band."""
    points = ax.collections[number].get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


def names_beside(ax):
    return {t.get_text() for t in ax.texts}


def test_sensitivity_draws_each_layers_lines_from_the_dense_network_on():
    ax = structures.sensitivity_plot(SCAN).axes[0]
    for name, lines in SCAN.groupby("layer"):
        xs, ys = line(ax, name)
        assert list(xs) == [1, 0.9, 0.5, 0.1]
        assert ys[0] == pytest.approx(0.96)
        assert list(ys[1:]) == list(lines.sort_values("keep", ascending=False).accuracy)
    assert line(ax, "nothing pruned")[1] == pytest.approx([0.96, 0.96])
    assert names_beside(ax) == {"conv1", "fc1", "nothing pruned"}
    assert ax.get_xlim() == (1, 0.1)
    assert len({a.get_color() for a in ax.lines}) == 3


def bars(ax, filled):
    """Widths by height of the layers' bars that are filled, or outlines."""
    drawn = [p for c in ax.containers for p in c if p.get_width() > 0 and (p.get_facecolor()[3] > 0) == filled]
    return {round(p.get_y() + p.get_height() / 2): p.get_width() for p in drawn}


@pytest.mark.parametrize("net", ["lenet300", "lenet5", "resnet"])
def test_removal_draws_the_channels_of_every_layer_before_and_after(net):
    model, small = pruned(net)
    figure = structures.removal_diagram(model, small)
    ax = figure.axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == [n for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1]
    for filled, network in ((True, small), (False, model)):
        assert bars(ax, filled) == {i: len(network.get_submodule(n).weight) for i, n in enumerate(names)}
    assert ax.texts[0].get_text() == f"{len(small.get_submodule(names[0]).weight)} of {len(model.get_submodule(names[0]).weight)}"
    assert ax.texts[-1].get_text() == "all 10"
    colours = {to_hex(p.get_facecolor()).upper() for p in ax.containers[0]}
    assert colours == ({AMBER} if net == "lenet300" else {AMBER, BLUE})


def test_removal_joins_the_layers_that_shortcuts_tie():
    ax = structures.removal_diagram(*pruned("resnet")).axes[0]
    names = [t.get_text() for t in ax.get_yticklabels()]
    ends = [tuple(names[round(y)] for y in p.get_path().vertices[[0, -1], 1]) for p in ax.patches if isinstance(p, PathPatch)]
    assert ends == [
        ("block1.conv2", "block1.shortcut.conv"), ("block2.conv2", "block2.shortcut.conv"), ("block2.shortcut.conv", "block3.conv2"),
    ]  # fmt: skip
    assert not [p for p in structures.removal_diagram(*pruned("lenet5")).axes[0].patches if isinstance(p, PathPatch)]


def test_pareto_draws_means_and_the_whole_spread_and_published_points_hollow():
    ax = structures.pareto(RUNS, PUBLISHED).axes[0]
    for number, (name, runs) in enumerate(RUNS.groupby("method")):
        over = runs.groupby("share").accuracy
        xs, ys = line(ax, name)
        assert list(xs) == [0.5, 0.2, 0.1]
        assert ys == pytest.approx(over.mean()[::-1].to_numpy())
        assert band(ax, number) == {x: (over.min()[x], over.max()[x]) for x in xs}
    xs, ys = line(ax, "published, on networks of their own")
    assert list(xs) == list(PUBLISHED.share)
    assert list(ys) == list(PUBLISHED.accuracy)
    assert ax.lines[-1].get_fillstyle() == "none"
    assert names_beside(ax) == {"magnitude", "random", *PUBLISHED.method}
    left, right = ax.get_xlim()
    assert left > right


def test_names_of_published_points_do_not_hide_one_another():
    figure = structures.pareto(RUNS, PUBLISHED)
    figure.draw_without_rendering()
    one, other = (t.get_window_extent() for t in figure.axes[0].texts if t.get_text() in set(PUBLISHED.method))
    assert not one.overlaps(other)


def test_pareto_of_ratios_grows_to_the_right():
    ax = structures.pareto(RUNS.assign(ratio=1 / RUNS.share), label="fewer parameters").axes[0]
    assert list(line(ax, "random")[0]) == [2, 5, 10]
    left, right = ax.get_xlim()
    assert left < right
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2×", "5×", "10×"]


def test_every_filter_stands_in_its_place_and_those_gone_are_crossed():
    ax = structures.filter_grid(WEIGHT, ROWS, ncols=8).axes[0]
    assert len(ax.images) == 20
    for i, image in enumerate(ax.images):
        assert np.array_equal(np.asarray(image.get_array()), WEIGHT[i, 0].numpy())
        left, right, low, high = image.get_extent()
        assert (int(left), int(right)) == (i % 8, i % 8)
        assert int(high / 0.6) == int(low / 0.6) == i // 8  # three pixels high, five wide
        assert image.cmap.name == ("PuOr" if ROWS[i] else "Greys")
    assert {(-im.norm.vmin, im.norm.vmax) for im in ax.images} == {(WEIGHT[:, 0].abs().max().item(),) * 2}
    gone = [i for i in range(20) if not ROWS[i]]
    assert [int(a.get_xdata().mean() if hasattr(a.get_xdata(), "mean") else np.mean(a.get_xdata())) for a in ax.lines] == [
        i % 8 for i in gone for _ in "xx"
    ]
    assert [int(np.mean(a.get_ydata()) / 0.6) for a in ax.lines] == [i // 8 for i in gone for _ in "xx"]
    slopes = [np.sign(np.diff(a.get_xdata()) * np.diff(a.get_ydata()))[0] for a in ax.lines]
    assert all(a != b for a, b in zip(slopes[::2], slopes[1::2]))
    assert ax.get_xlabel() == "13 of 20 filters stay; crossed: gone"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "8", "16"]


@pytest.mark.parametrize("rows", [torch.zeros(20), torch.ones(20)])
def test_all_or_none_gone(rows):
    figure = structures.filter_grid(WEIGHT, rows)
    figure.draw_without_rendering()
    assert len(figure.axes[0].lines) == 2 * int((rows == 0).sum())


def test_latency_draws_medians_quartiles_and_what_would_be_in_proportion():
    ax = structures.latency_steps(TIMES).axes[0]
    xs, ys = line(ax, "measured")
    assert list(xs) == [1, 0.5, 0.25]
    assert list(ys) == [4, 3, 2.5]
    assert band(ax, 0) == {1: (3.9, 4.4), 0.5: (2.8, 3.3), 0.25: (2.4, 2.6)}
    assert list(line(ax, "like the filters")[1]) == [4, 2, 1]
    assert line(ax, "like the multiply-adds")[1] == pytest.approx([4, 1, 0.24])
    assert names_beside(ax) == {"measured", "like the filters", "like the multiply-adds"}
    assert ax.get_ylim()[0] == 0
    assert names_beside(structures.latency_steps(TIMES.drop(columns="multiply_adds")).axes[0]) == {"measured", "like the filters"}


def test_what_is_wrong_is_said_with_what_mends_it():
    with pytest.raises(ValueError, match=r"no column 'drop', only layer, keep, accuracy; sensitivity\(...\) gives one"):
        structures.sensitivity_plot(SCAN.drop(columns="drop"))
    with pytest.raises(ValueError, match=r"no line to draw; latency_scan"):
        structures.latency_steps(TIMES[:0])
    with pytest.raises(ValueError, match=r"no column 'seed'"):
        structures.pareto(RUNS.drop(columns="seed"))
    with pytest.raises(ValueError, match=r"published figures with method, accuracy and ratio"):
        structures.pareto(RUNS.assign(ratio=1 / RUNS.share), PUBLISHED)
    with pytest.raises(ValueError, match=r"needs a weight .* got \[20, 5\] and \[20\]"):
        structures.filter_grid(torch.zeros(20, 5), ROWS)
    with pytest.raises(ValueError, match=r"got \[20, 2, 3, 5\] and \[19\]"):
        structures.filter_grid(WEIGHT, ROWS[:19])
    with pytest.raises(ValueError, match="baked must be model with channels removed"):
        structures.removal_diagram(build("lenet5", "mnist"), build("lenet300", "mnist"))
    with pytest.raises(ValueError, match="baked must be model with channels removed"):
        structures.removal_diagram(*pruned("lenet5")[::-1])
