"""Pictures of numbers in few bits: what the bits say, where the levels lie, what stands for a derivative. Each function returns the Figure."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from .plots import AMBER, BLUE, COLOURS, DARK, GREY, MARKERS, PALE, VERMILLION, canvas, curves, percent

Fields = Sequence[tuple[str, str]]  # what a run of bits says, and the bits


def stack(*heights: float, width: float = 8.5, **settings: Any) -> tuple[Figure, Any]:
    """(figure, axes) one above another, of these heights in inches, in the kit's look."""
    figure, axes = plt.subplots(len(heights), 1, figsize=(width, sum(heights)), height_ratios=heights, **settings)
    plt.close(figure)
    return figure, axes


def float32_fields(x: float) -> Fields:
    """The 32 bits of a number as IEEE 754 has them: sign, exponent, fraction."""
    bits = f"{struct.unpack('>I', struct.pack('>f', x))[0]:032b}"
    return [("sign", bits[0]), ("exponent", bits[1:9]), ("fraction", bits[9:])]


def bit_rows(rows: Mapping[str, Fields], *, title: str = "") -> Figure:
    """A row of boxes a number, one box a bit; the same kind of field has one colour, and letters, everywhere."""
    figure, ax = canvas(height=0.9 + 0.5 * len(rows))
    kinds = list(dict.fromkeys(kind for fields in rows.values() for kind, _ in fields))
    looks = dict(zip(kinds, ({"facecolor": VERMILLION}, {"facecolor": AMBER}, {"facecolor": PALE}, {"facecolor": BLUE})))
    for y, fields in enumerate(rows.values()):
        bits = [(kind, bit) for kind, run in fields for bit in run]
        for x, (kind, bit) in enumerate(bits):
            ax.add_patch(Rectangle((x, y - 0.4), 1, 0.8, edgecolor="white", linewidth=1.5, **looks[kind]))
            light = "white" if kind in ("sign", "code") else DARK
            ax.text(x + 0.5, y, bit, ha="center", va="center", fontsize=12, color=light, family="monospace")
    for kind, look in looks.items():
        ax.add_patch(Rectangle((0, 0), 0, 0, label=kind, **look))
    ax.set_yticks(range(len(rows)), list(rows))
    longest = max(sum(len(bits) for _, bits in fields) for fields in rows.values())
    ax.set(xlim=(0, longest), ylim=(len(rows) - 0.4, -0.6), xlabel="bits of the number", title=title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.legend(loc="lower right", ncols=2)
    return figure


def levels_histogram(w: Any, levels: Mapping[str, Sequence[float]], *, title: str = "", reach: float | None = None) -> Figure:
    """How often each weight value occurs (log count); below it, a row a quantizer, a stroke where one of its levels lies."""
    values = np.asarray(w).ravel()
    reach = reach or 1.05 * max(float(np.quantile(np.abs(values), 0.9995)), max(float(np.abs(v).max()) for v in levels.values()))
    figure, (top, rows) = stack(2.6, 0.75 + 0.36 * len(levels), sharex=True)
    top.hist(values, np.linspace(-reach, reach, 122), color=PALE, edgecolor=GREY, linewidth=0.4)
    top.set(yscale="log", ylabel="weights per bin", title=title)
    for row, (name, colour) in enumerate(zip(levels, cycle(COLOURS))):
        at = np.asarray(levels[name], float)
        rows.vlines(at, row - 0.33, row + 0.33, color=colour, linewidth=2.4)
    rows.set_yticks(range(len(levels)), list(levels))
    rows.set(ylim=(len(levels) - 0.5, -0.5), xlim=(-reach, reach), xlabel="weight value (no unit); each stroke is a level")
    rows.tick_params(axis="y", length=0)
    return figure


def bits_axis(ax: Axes, bits: Sequence[int], label: str = "bits a weight") -> None:
    """An x axis of whole bits that fall to the right, as compression grows; shares on the y axis as percent."""
    ax.set_xticks(sorted(set(bits)))
    ax.set(xlim=(max(bits) + 0.15, min(bits) - 0.15), xlabel=label)
    percent(ax.yaxis)


def by_bits(series: Mapping[str, tuple[Sequence[int], Any]], *, title: str = "", floor: float | None = 0.1, height: float = 4.4) -> Figure:
    """Accuracy against bits, lines {name: (bits, ys)} with ys (points,) or (seeds, points): the mean, and a band from lowest seed to highest."""
    figure = curves(series, title=title, shares=False, floor=floor, height=height)
    bits_axis(figure.axes[0], [b for xs, _ in series.values() for b in xs])
    return figure


def weight_pictures(versions: Mapping[str, Any], count: int = 10, *, title: str = "") -> Figure:
    """The first filters of one convolution, a row a version {name: weight (out, in, h, w)}, first input channel, on one scale."""
    found = {name: np.asarray(getattr(w, "detach", lambda w=w: w)())[:count, 0] for name, w in versions.items()}
    reach = max(float(np.abs(w).max()) for w in found.values()) or 1.0
    figure, ax = canvas(height=0.9 + 0.8 * len(found))
    for y, w in enumerate(found.values()):
        for x, picture in enumerate(w):
            drawn = ax.imshow(picture, cmap="PuOr", vmin=-reach, vmax=reach, extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
    bar = figure.colorbar(drawn, ax=ax, shrink=0.9, aspect=14, pad=0.02)
    bar.set_label("weight value")
    bar.outline.set_visible(False)
    ax.set_yticks([y + 0.5 for y in range(len(found))], list(found))
    ax.set_xticks([x + 0.5 for x in range(count)], range(count))
    ax.set(xlim=(0, count), ylim=(len(found), 0), xlabel="filter", title=title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


Line = Callable[[np.ndarray], Any]


def stand_ins(pairs: Mapping[str, tuple[Line, Line]], truth: Line, *, name: str = "what is computed", reach: float = 2.0) -> Figure:
    """A column a stand-in (f, slope): above, what the forward pass computes and the f whose derivative is taken; below, that derivative."""
    x = np.linspace(-reach, reach, 801)
    figure, axes = plt.subplots(2, len(pairs), figsize=(max(8.5, 2.6 * len(pairs)), 4.6), sharex=True, sharey="row", squeeze=False)
    plt.close(figure)
    for (above, below), (title, (f, slope)) in zip(axes.T, pairs.items()):
        above.plot(x, np.asarray(truth(x)), color=DARK, linewidth=1.6, label=name)
        above.plot(x, np.asarray(f(x)), color=BLUE, linestyle="--", label="its stand-in")
        below.fill_between(x, np.asarray(slope(x), float), color=VERMILLION, alpha=0.35, linewidth=0)
        below.plot(x, np.asarray(slope(x), float), color=VERMILLION, linewidth=1.6, label="derivative taken")
        above.set_title(title, fontsize=12)
        below.set_xlabel("x")
    axes[0, 0].set_ylabel("value")
    axes[1, 0].set_ylabel("derivative")
    handles = [*axes[0, 0].get_legend_handles_labels()[0], axes[1, 0].lines[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def flow(rows: Mapping[str, Sequence[tuple[str, bool]]], shortcuts: Mapping[str, tuple[int, int]] | None = None, *, title: str = "") -> Figure:
    """A chain of boxes a row, {name: [(text, whether what leaves it is one bit)]}; an arc from box i to box j for ``shortcuts`` {name: (i, j)}."""
    figure, ax = canvas(height=1.1 + 0.95 * len(rows))
    for y, (name, boxes) in enumerate(rows.items()):
        for x, (text, one_bit) in enumerate(boxes):
            colour, style = (AMBER, ":") if one_bit else (BLUE, "-")
            ax.add_patch(Rectangle((x + 0.04, y - 0.3), 0.76, 0.6, linewidth=2, edgecolor=colour, facecolor="#FCE8C3" if one_bit else "white"))
            ax.text(x + 0.42, y, text, ha="center", va="center", fontsize=12)
            if x + 1 < len(boxes):
                _arrow(ax, (x + 0.8, y), (x + 1.04, y), color=colour, linestyle=style)
        if shortcuts and name in shortcuts:
            i, j = shortcuts[name]
            _arrow(ax, (i + 0.42, y + 0.3), (j + 0.42, y + 0.3), color=BLUE, connectionstyle="arc3,rad=0.1")
    for colour, style, label in ((BLUE, "-", "real numbers"), (AMBER, ":", "one bit each")):
        ax.plot([], [], color=colour, linestyle=style, linewidth=3, label=label)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set(xlim=(0, max(map(len, rows.values()))), ylim=(len(rows) - 0.2, -0.4), xticks=[], title=title)
    ax.set_xlabel("from a layer's inputs to the next layer's")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, linewidth=2, shrinkA=0, shrinkB=0, **style))


def clipped_ranges(centers: Any, counts: Any, tops: Mapping[str, float], *, title: str = "", x: str = "value of an input") -> Figure:
    """How often inputs of each size were seen (log count), and above which value each calibration rule clips."""
    centers, counts = np.asarray(centers), np.asarray(counts)
    seen = np.flatnonzero(counts)
    low, high = centers[seen[0]], centers[seen[-1]]
    edges = np.linspace(min(low, 0.0), high, 90)
    figure, ax = canvas(height=4.2)
    ax.hist(centers, edges, weights=counts, color=PALE, edgecolor=GREY, linewidth=0.4)
    for (name, top), colour, style in zip(tops.items(), cycle((VERMILLION, BLUE, DARK, AMBER)), cycle(("--", "-", ":", "-."))):
        ax.axvline(top, color=colour, linestyle=style, linewidth=2.4, label=f"{name}: up to {top:.2f}")
    ax.set(yscale="log", xlabel=x, ylabel="inputs per bin", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def calibration_plot(table: pd.DataFrame, *, title: str = "", height: float = 4.8) -> Figure:
    """Accuracy against bits (columns how, per, bits, accuracy): a colour a rule; one scale a tensor is dashed, one a filter solid."""
    figure, ax = canvas(height=height)
    for how, colour, marker in zip(table.how.unique(), cycle(COLOURS), cycle(MARKERS)):
        for per, style in (("filter", "-"), ("tensor", "--")):
            lines = table[(table.how == how) & (table.per == per)].groupby("bits").accuracy.mean()
            ax.plot(lines.index, lines, style, color=colour, marker=marker, fillstyle="full" if per == "filter" else "none")
        ax.plot([], [], "-", color=colour, marker=marker, label=how)
    for per, style in (("one scale a filter", "-"), ("one scale a layer", "--")):
        ax.plot([], [], style, color=DARK, label=per)
    bits_axis(ax, list(table.bits), "bits of weights and inputs")
    ax.set(ylabel="accuracy on validation images", title=title)
    ax.legend(loc="lower left")
    return figure


def bits_plan(table: pd.DataFrame, chosen: Mapping[str, int], *, title: str = "") -> Figure:
    """Points lost with one layer alone in few bits (a table of ``bit_sensitivity``), darker where more; a frame around what was chosen."""
    lost = 100 * table.pivot(index="layer", columns="bits", values="drop").loc[list(dict.fromkeys(table.layer))]
    lost = lost[sorted(lost, reverse=True)]
    figure, ax = canvas(height=1.4 + 0.42 * len(lost))
    top = max(float(lost.to_numpy().max()), 1e-9)
    ax.imshow(lost, cmap="Greys", vmin=0, vmax=1.3 * top, aspect="auto")
    for y, (layer, row) in enumerate(lost.iterrows()):
        for x, (bits, points) in enumerate(row.items()):
            ax.text(x, y, f"{points:.1f}", ha="center", va="center", fontsize=12, color="white" if points > 0.8 * top else DARK)
            if chosen.get(layer) == bits:
                ax.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, edgecolor=VERMILLION, linewidth=3))
    ax.set_xticks(range(lost.shape[1]), list(lost))
    ax.set_yticks(range(len(lost)), list(lost.index))
    ax.set(xlabel="bits of this layer, all others as they were (frame: chosen)", ylabel="layer", title=title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def code_use(shares: Sequence[float], lengths: Sequence[int], fixed: int, *, title: str = "") -> Figure:
    """How often each code occurs, and above it the bits that a Huffman code spends on it; dotted: the bits of a code of fixed length."""
    figure, (top, ax) = stack(1.7, 2.6, sharex=True)
    at = np.arange(len(shares))
    ax.bar(at, shares, color=BLUE)
    percent(ax.yaxis)
    ax.set(xlabel="code (number of the level)", ylabel="share of weights")
    ax.set_xticks(at)
    top.bar(at, lengths, color=PALE, edgecolor=GREY, hatch="///")
    top.axhline(fixed, color=VERMILLION, linestyle=":", label=f"{fixed} bits, whatever the code")
    for x, bits in zip(at, lengths):
        top.annotate(f"{bits}", (x, bits), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=12)
    top.set(ylabel="bits", title=title, ylim=(0, 1.7 * max(*lengths, fixed)))
    top.legend(loc="upper center")
    return figure
