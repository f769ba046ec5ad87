"""The notebooks' pictures: each gives a Figure, draws what it was given, and writes nothing smaller than 12 points."""

import numpy as np
import pytest
import torch
from figures import readable

from cmlib.view import plots

SEEDS = [[0.9, 0.5, 0.1], [0.8, 0.6, 0.2]]
PICTURES = {
    "weight_histogram": lambda: plots.weight_histogram(torch.linspace(-1, 1, 500), cut=0.2, title="w"),
    "curves": lambda: plots.curves({"one": ((0.5, 0.1, 0.01), SEEDS), "two": ((0.5, 0.1, 0.01), [0.9, 0.5, 0.1])}, title="c", floor=0.1),
    "curves over epochs": lambda: plots.curves({"one": ([1, 2, 3], SEEDS)}, x="epochs", shares=False),
    "dots": lambda: plots.dots({"a": [0.1, 0.2], "control": [0.15]}, marked=["control"]),
    "pixel_maps": lambda: plots.pixel_maps({"a": np.eye(4), "b": torch.ones(4, 4)}, units=["x", "y"]),
    "stacked": lambda: plots.stacked({"dense": {"values": 8, "places": 0}, "csr": {"values": 2, "places": 1}}, x="bytes"),
    "class_change": lambda: plots.class_change([0.9, 0.9], [0.5, 0.8], "01"),
    "points": lambda: plots.points({"p": [(10, 0.1, "a"), (10, 0.1, "b")], "q": [(50, 2, "c")]}, x="x", y="y", ticks=(10, 50), floor=0),
}


@pytest.mark.parametrize("name", PICTURES)
def test_readable(name):
    figure = PICTURES[name]()
    readable(figure)


@pytest.mark.parametrize("name", [n for n in PICTURES if n not in ("pixel_maps",)])
def test_axes_are_labelled(name):
    assert all(ax.get_xlabel() for ax in PICTURES[name]().axes)


def test_a_band_goes_from_the_lowest_seed_to_the_highest():
    band = plots.curves({"one": ((0.5, 0.1, 0.01), SEEDS)}).axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 0.1
    assert band[:, 1].max() == 0.9


def test_shares_run_from_much_kept_to_little():
    left, right = plots.curves({"one": ((0.5, 0.1, 0.01), SEEDS)}).axes[0].get_xlim()
    assert left > right


def test_names_of_points_do_not_hide_one_another():
    figure = PICTURES["points"]()
    figure.draw_without_rendering()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_published_rows_have_a_source_and_were_seen():
    table = plots.published("LeNet-300-100")
    assert len(table) >= 5
    assert table.source.str.len().min() > 10
    assert set(table.confidence) <= {"seen", "abstract"}
    assert (table.weights_ratio >= 1).all()


def test_hollow_dots_are_those_marked_and_the_axis_says_what_they_are():
    (ax,) = plots.dots({"a": [0.1, 0.2, 0.9], "c": [0.15]}, marked=["c"], marks="not cut").axes
    assert ax.get_xlabel().endswith("(dot: a seed, bar: their mean, hollow: not cut)")
    assert [line.get_fillstyle() for line in ax.lines[::2]] == ["full", "none"]
    assert list(ax.lines[1].get_xdata()) == pytest.approx([0.4, 0.4])
    assert "hollow" not in plots.dots({"a": [0.1]}).axes[0].get_xlabel()


def test_a_name_stays_within_the_picture():
    figure, ax = plots.canvas()
    ax.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    low = (0.5, 0.01, "low")
    x, y = ax.transData.transform(low[:2])
    taken = [(x - 30, y), (x + 30, y), (x + 30, y + 22)]  # left, right and above to the right
    beside = [tuple(ax.transData.inverted().transform(spot)) for spot in taken]
    plots._name_points(figure, ax, [(low, plots.DARK)], beside)
    box = ax.texts[0].get_window_extent()
    assert ax.bbox.y0 <= box.y0 and box.y0 > y
