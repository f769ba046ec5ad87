"""The pictures of few bits draw what they are given: every artist's data against the numbers, nothing smaller than 12 points."""

import struct

import numpy as np
import pandas as pd
import pytest
import torch
from figures import readable
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch, Rectangle

from cmlib.view import quantize
from cmlib.view.plots import AMBER, BLUE, VERMILLION

W = torch.linspace(-1, 1, 2000) ** 3
FIELDS = {"32 bits": quantize.float32_fields(0.1), "3 bits": [("code", "101")]}
LEVELS = {"2 bits": [-1.0, -0.25, 0.5, 1.0], "1 bit": np.array([-0.5, 0.5])}
SEEDS = [[0.9, 0.8, 0.3], [0.9, 0.7, 0.5]]
FILTERS = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
PAIRS = {"clip": (lambda x: np.clip(x, -1, 1), lambda x: np.abs(x) <= 1), "identity": (lambda x: x, lambda x: torch.ones(len(x)))}
CHAINS = {"BWN": [("inputs", False), ("times", False)], "Bi-Real": [("inputs", False), ("sign", True), ("times", False)]}
TOPS = {"minmax": 4.0, "mse": 1.5}
CENTERS, COUNTS = np.arange(-9.5, 10) / 2, np.where(np.arange(20) < 8, 0, 10.0)
TABLE = pd.DataFrame([
    {"how": how, "per": per, "bits": bits, "accuracy": 0.1 * bits + 0.01 * (per == "filter") + 0.001 * (how == "mse")}
    for how in ("minmax", "mse") for per in ("tensor", "filter") for bits in (3, 6, 4)
])  # fmt: skip
SCAN = pd.DataFrame([
    {"layer": layer, "bits": bits, "bytes": 9, "accuracy": 0.9, "drop": drop}
    for layer, drops in (("fc2", (0.0, 0.05)), ("conv1", (-0.01, 0.2))) for bits, drop in zip((8, 2), drops)
])  # fmt: skip
PICTURES = {
    "bit_rows": lambda: quantize.bit_rows(FIELDS, title="t"),
    "levels_histogram": lambda: quantize.levels_histogram(W, LEVELS),
    "by_bits": lambda: quantize.by_bits({"a": ((8, 4, 1), SEEDS), "b": ((8, 2), [0.9, 0.5])}),
    "weight_pictures": lambda: quantize.weight_pictures({"32 bits": FILTERS, "1 bit": FILTERS.sign()}, count=3),
    "stand_ins": lambda: quantize.stand_ins(PAIRS, np.sign, name="sign"),
    "flow": lambda: quantize.flow(CHAINS, {"Bi-Real": (0, 2)}),
    "clipped_ranges": lambda: quantize.clipped_ranges(CENTERS, COUNTS, TOPS),
    "calibration_plot": lambda: quantize.calibration_plot(TABLE),
    "bits_plan": lambda: quantize.bits_plan(SCAN, {"fc2": 8, "conv1": 2}),
    "code_use": lambda: quantize.code_use([0.7, 0.2, 0.1], [1, 2, 2], 2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_readable_and_labelled(name):
    figure = PICTURES[name]()
    readable(figure)
    assert all(ax.get_xlabel() for ax in figure.axes if not ax.get_shared_x_axes().get_siblings(ax)[1:] and ax.get_label() != "<colorbar>")
    assert any(ax.get_xlabel() for ax in figure.axes)


def texts(ax):
    return [t.get_text() for t in ax.texts]


@pytest.mark.parametrize("x", [0.1, -3.5, 0.0, 2.0**-130])
def test_the_fields_of_a_float_are_its_bits(x):
    fields = quantize.float32_fields(x)
    assert [len(bits) for _, bits in fields] == [1, 8, 23]
    word = int("".join(bits for _, bits in fields), 2)
    assert struct.unpack(">f", struct.pack(">I", word))[0] == np.float32(x)


def test_a_box_a_bit_in_the_colour_of_its_field():
    ax = PICTURES["bit_rows"]().axes[0]
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and p.get_width() == 1]
    assert "".join(texts(ax)) == "".join(bits for _, bits in FIELDS["32 bits"]) + "101"
    assert [to_hex(b.get_facecolor()).upper() for b in boxes[:2]] == [VERMILLION, AMBER]
    assert {to_hex(b.get_facecolor()).upper() for b in boxes[32:]} == {BLUE}
    assert [t.get_text() for t in ax.get_yticklabels()] == list(FIELDS)


def test_strokes_lie_at_the_levels_below_every_weight():
    top, rows = PICTURES["levels_histogram"]().axes
    strokes = [np.array([s[0, 0] for s in c.get_segments()]) for c in rows.collections]
    for stroke, levels in zip(strokes, LEVELS.values(), strict=True):
        np.testing.assert_array_equal(stroke, levels)
    assert sum(p.get_height() for p in top.patches) == len(W)
    low, high = rows.get_xlim()
    assert low < -1 and high > 1 and top.get_xlim() == (low, high)


def test_a_reach_cuts_the_picture_not_the_rows():
    _, rows = quantize.levels_histogram(W, LEVELS, reach=0.6).axes
    assert rows.get_xlim() == (-0.6, 0.6)
    assert len(rows.collections[0].get_segments()) == 4


def test_bits_fall_to_the_right_and_the_band_holds_all_seeds():
    ax = PICTURES["by_bits"]().axes[0]
    left, right = ax.get_xlim()
    assert left > 8 > 1 > right
    assert sorted(ax.get_xticks()) == [1, 2, 4, 8]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.mean(SEEDS, 0))
    ends = ax.collections[0].get_paths()[0].vertices
    assert {ends[ends[:, 0] == 1, 1].min(), ends[ends[:, 0] == 1, 1].max()} == {0.3, 0.5}


def test_versions_of_filters_share_one_scale():
    ax, bar = PICTURES["weight_pictures"]().axes
    assert len(ax.images) == 6
    np.testing.assert_array_equal(ax.images[1].get_array(), FILTERS[1, 0].numpy())
    np.testing.assert_array_equal(ax.images[4].get_array(), FILTERS[1, 0].sign().numpy())
    reach = FILTERS[:3, 0].abs().max().clamp(min=1).item()
    assert {im.get_clim() for im in ax.images} == {(-reach, reach)}
    assert bar.get_ylabel() == "weight value"


def test_stand_ins_are_drawn_with_their_derivatives():
    axes = np.reshape(PICTURES["stand_ins"]().axes, (2, 2))
    for (above, below), (name, (f, slope)) in zip(axes.T, PAIRS.items()):
        truth, stand_in = above.lines
        x = truth.get_xdata()
        assert above.get_title(loc="left") == name
        np.testing.assert_array_equal(truth.get_ydata(), np.sign(x))
        np.testing.assert_array_equal(stand_in.get_ydata(), f(x))
        np.testing.assert_array_equal(below.lines[0].get_ydata(), np.asarray(slope(x), float))


def test_boxes_arrows_and_the_shortcut():
    ax = PICTURES["flow"]().axes[0]
    boxes = [p for p in ax.patches if isinstance(p, Rectangle)]
    arrows = [p for p in ax.patches if isinstance(p, FancyArrowPatch)]
    assert texts(ax) == [text for chain in CHAINS.values() for text, _ in chain]
    assert [to_hex(b.get_edgecolor()).upper() for b in boxes] == [BLUE, BLUE, BLUE, AMBER, BLUE]
    assert len(arrows) == 1 + 2 + 1
    (x0, y0), (x1, y1) = arrows[-1]._posA_posB
    assert (int(x0), int(x1), y0) == (0, 2, y1)


def test_each_rule_clips_where_it_says():
    figure = PICTURES["clipped_ranges"]()
    (ax,) = figure.axes
    assert [line.get_xdata()[0] for line in ax.lines] == list(TOPS.values())
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["minmax: up to 4.00", "mse: up to 1.50"]
    assert sum(p.get_height() for p in ax.patches) == COUNTS.sum()


def test_calibration_draws_a_line_a_rule_and_scale():
    ax = PICTURES["calibration_plot"]().axes[0]
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    assert [line.get_linestyle() for line in drawn] == ["-", "--", "-", "--"]
    np.testing.assert_array_equal(drawn[0].get_xdata(), [3, 4, 6])
    np.testing.assert_allclose(drawn[0].get_ydata(), [0.31, 0.41, 0.61])
    np.testing.assert_allclose(drawn[3].get_ydata(), [0.301, 0.401, 0.601])


def test_the_plan_frames_what_was_chosen():
    ax = PICTURES["bits_plan"]().axes[0]
    assert texts(ax) == ["0.0", "5.0", "-1.0", "20.0"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["8", "2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["fc2", "conv1"]
    frames = [(p.get_x() + 0.46, p.get_y() + 0.44) for p in ax.patches]
    np.testing.assert_allclose(frames, [(0, 0), (1, 1)], atol=1e-9)


def test_code_lengths_stand_above_the_shares():
    top, ax = PICTURES["code_use"]().axes
    assert [p.get_height() for p in ax.patches] == [0.7, 0.2, 0.1]
    assert [p.get_height() for p in top.patches] == [1, 2, 2]
    assert texts(top) == ["1", "2", "2"]
    assert set(top.lines[0].get_ydata()) == {2}
