"""The pictures that the notebooks share, each a short function that returns the Figure.

The colours are Okabe and Ito's, which stay apart for colour-blind eyes; lines also differ by marker, and are named beside where they end.
``show`` puts a picture and its text twin on the page. Importing this module puts matplotlib into the kit's look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from ..lab.seeds import compare as compare  # notebooks say plots.compare, beside plots.say
from ..lab.seeds import verdicts as verdicts

BLUE, VERMILLION, AMBER, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
DARK, GREY, PALE = "#333333", "#767676", "#D9D9D9"
COLOURS = (BLUE, VERMILLION, GREEN, AMBER, DARK, PURPLE, SKY)
MARKERS = "osD^vPX"
LOOK = {
    "font.size": 13, "axes.titlesize": 14, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.titlelocation": "left", "legend.frameon": False,
    "lines.linewidth": 2.2, "lines.markersize": 7, "figure.dpi": 110, "figure.constrained_layout.use": True, "hatch.linewidth": 0.6,
}  # fmt: skip
plt.rcParams.update(LOOK)


def canvas(columns: int = 1, *, width: float = 8.5, height: float = 3.8, **settings: Any) -> tuple[Figure, Any]:
    """(figure, axes) side by side in the kit's look; the page shows the figure where it is asked to, not by itself."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), **settings)
    plt.close(figure)
    return figure, axes


def show(figure: Figure, text: str) -> None:
    """The picture, then what it says in words: its text twin, for whoever cannot see it."""
    display(figure)
    say(f"*In words:* {text}")


def say(text: str) -> None:
    """Measured figures in running text (Markdown)."""
    display(Markdown(text))


def percent(axis: Axis) -> None:
    """Write an axis of shares as percent."""
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g} %"))


def log_axis(ax: Axes, which: str, ticks: Sequence[float], text: str = "{:g}") -> None:
    """A logarithmic axis ("x" or "y") with these ticks alone, each written as ``text``."""
    ax.set(**{f"{which}scale": "log", f"{which}ticks": ticks, f"{which}ticklabels": [text.format(t) for t in ticks]})
    getattr(ax, f"{which}axis").set_minor_locator(NullLocator())


def share_axis(ax: Axes, shares: Sequence[float], label: str = "weights kept") -> None:
    """A logarithmic axis that holds ``shares``, the largest at the left: compression grows to the right."""
    ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if min(shares) * 0.99 <= t <= max(shares) * 1.01]
    log_axis(ax, "x", ticks)
    ax.set_xticklabels([f"{100 * t:g} %" for t in ticks])
    ax.invert_xaxis()
    ax.set_xlabel(f"{label} (log scale)")


def weight_histogram(w: Any, cut: float | None = None, *, title: str = "", reach: float | None = None) -> Figure:
    """How often each weight value occurs (log count), and between which values the weights go."""
    values = np.asarray(w).ravel()
    reach = reach or float(np.quantile(np.abs(values), 0.9995))
    figure, ax = canvas(height=3.4)
    edges = np.linspace(-reach, reach, 122)
    ax.hist(values, edges, color=BLUE, label="stays" if cut else None)
    if cut:
        ax.hist(values[np.abs(values) < cut], edges, color=PALE, hatch="///", edgecolor=GREY, linewidth=0, label="goes")
        for x in (-cut, cut):
            ax.axvline(x, color=VERMILLION, linewidth=1.8, linestyle="--", label=f"threshold ±{cut:.3f}" if x > 0 else None)
        ax.legend(loc="upper right")
    ax.set(yscale="log", xlabel="weight value (no unit)", ylabel="weights per bin", title=title)
    return figure


def curves(series: Mapping[str, tuple[Sequence[float], Any]], *, x: str = "", y: str = "accuracy on validation images", title: str = "",
           shares: bool = True, floor: float | None = None, height: float = 4.4, floor_label: str = "chance") -> Figure:  # fmt: skip
    """Lines {name: (xs, ys)}, ys of shape (points,) or (seeds, points): the mean, and a band from the lowest seed to the highest."""
    figure, ax = canvas(height=height)
    ends = []
    for (name, (xs, ys)), colour, marker in zip(series.items(), cycle(COLOURS), cycle(MARKERS)):
        ys = np.atleast_2d(np.asarray(ys, float))
        ax.plot(xs, ys.mean(0), color=colour, marker=marker)
        ax.fill_between(xs, ys.min(0), ys.max(0), color=colour, alpha=0.18, linewidth=0)
        ends.append((ys.mean(0)[-1], name, colour))
    if shares:
        share_axis(ax, [x for xs, _ in series.values() for x in xs])
        percent(ax.yaxis)
    else:
        ax.set_xlabel(x)
    if floor is not None:
        ax.axhline(floor, color=GREY, linewidth=1.2, linestyle=":")
        _beside(ax, 0, floor, floor_label, GREY, (4, 9))
    ax.set(ylabel=y, title=title)
    _name_ends(ax, ends)
    return figure


def _beside(ax: Axes, x: float, y: float, text: str, colour: str = DARK, shift: tuple[float, float] = (6, 0), **style: Any) -> None:
    """Text at height ``y`` of the data, at ``x`` from the left (0) to the right (1) end of the axes."""
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
    ax.annotate(text, (x, y), xytext=shift, va="center", color=colour, fontsize=12, **where, **style)


def _name_ends(ax: Axes, ends: list[tuple[float, str, str]], gap: float = 0.068) -> None:
    """Each line's name beside its last point, pushed apart by ``gap`` of the axes' height where names would lie on one another."""
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.array(ax.get_ylim()))
    last = -np.inf
    for y, name, colour in sorted(ends):
        last = max(float(scale.transform(np.array([y]))[0]), last + gap * (high - low))
        _beside(ax, 1, float(scale.inverted().transform(np.array([last]))[0]), name, colour, fontweight="bold")


def dots(groups: Mapping[str, Sequence[float]], *, x: str = "accuracy on validation images", title: str = "", marked: Sequence[str] = (),
         marks: str = "control") -> Figure:  # fmt: skip
    """One row a group: a dot a seed, a bar at their mean; the groups in ``marked`` are hollow, which the axis says means ``marks``."""
    figure, ax = canvas(height=1.2 + 0.46 * len(groups))
    for row, (name, values) in enumerate(groups.items()):
        colour = GREY if name in marked else BLUE
        ax.plot(values, [row] * len(values), "o", color=colour, fillstyle="none" if name in marked else "full", markersize=9, alpha=0.85)
        ax.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=DARK, linewidth=2.5)
        _beside(ax, 1, row, f"{100 * np.mean(values):.1f} %")
    hollow = f", hollow: {marks}" if any(name in marked for name in groups) else ""
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set(ylim=(len(groups) - 0.4, -0.6), xlabel=f"{x} (dot: a seed, bar: their mean{hollow})", title=title)
    percent(ax.xaxis)
    ax.grid(axis="x", color=PALE, linewidth=0.8)
    ax.set_axisbelow(True)
    return figure


def pixel_maps(maps: Mapping[str, Any], *, units: Sequence[str] = (), palette: str = "cividis") -> Figure:
    """Pictures of one size side by side, each with its own scale; ``units`` name the scales."""
    figure, axes = canvas(len(maps), width=3.4 * len(maps), height=3.5, squeeze=False)
    for ax, (title, picture), unit in zip(axes[0], maps.items(), [*units, *[""] * len(maps)]):
        drawn = ax.imshow(np.asarray(picture), cmap=palette)
        bar = figure.colorbar(drawn, ax=ax, shrink=0.8, aspect=16, pad=0.03)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        ax.set_title(title, fontsize=12, loc="center")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure


def stacked(rows: Mapping[str, Mapping[str, float]], *, x: str, title: str = "", digits: int = 0) -> Figure:
    """A bar a row, made of named parts; the total stands at its end."""
    figure, ax = canvas(height=1.4 + 0.45 * len(rows))
    parts = list(dict.fromkeys(p for row in rows.values() for p in row))
    colours = dict(zip(parts, (BLUE, AMBER, PALE, GREEN)))
    ends = np.zeros(len(rows))
    for part in parts:
        sizes = np.array([row.get(part, 0) for row in rows.values()])
        hatch = "///" if colours[part] == AMBER else None
        ax.barh(range(len(rows)), sizes, left=ends, color=colours[part], edgecolor="white", height=0.62, hatch=hatch, label=part)
        ends = ends + sizes
    for i, end in enumerate(ends):
        ax.annotate(f"{end:,.{digits}f}", (end, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=12)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.set(xlabel=x, title=title)
    ax.legend(loc="lower right")
    return figure


def class_change(before: Sequence[float], after: Sequence[float], classes: Sequence[str], *, title: str = "") -> Figure:
    """Accuracy of each class before and after, the one that lost most at the top; a dashed line at the mean after."""
    order = np.argsort(np.asarray(after) - np.asarray(before))
    figure, ax = canvas(height=1.2 + 0.34 * len(classes))
    for row, c in enumerate(order):
        ax.plot([before[c], after[c]], [row, row], color=PALE, linewidth=5, zorder=1)
    ax.plot(np.asarray(before)[order], range(len(order)), "o", color=GREY, fillstyle="none", label="before", markersize=9)
    ax.plot(np.asarray(after)[order], range(len(order)), "D", color=VERMILLION, label="after", markersize=8)
    ax.axvline(float(np.mean(after)), color=DARK, linestyle="--", linewidth=1.4, label="mean after")
    ax.set_yticks(range(len(order)), [str(classes[c]) for c in order])
    ax.invert_yaxis()
    percent(ax.xaxis)
    ax.set(xlabel="accuracy on the class's validation images", ylabel="class", title=title)
    ax.legend(loc="lower left", ncols=1)
    return figure


Named = Sequence[tuple[float, float, str]]


def points(groups: Mapping[str, Named], *, x: str, y: str, title: str = "", ticks: Sequence[float] = (), floor: float | None = None) -> Figure:
    """Named points {group: [(x, y, name)]}, each group of its own shape; ``ticks`` make the x axis logarithmic."""
    figure, ax = canvas(height=4.8)
    for (group, found), colour, marker in zip(groups.items(), cycle(COLOURS), cycle(MARKERS)):
        ax.plot([p[0] for p in found], [p[1] for p in found], marker, color=colour, markersize=10, label=group, linestyle="none")
    if ticks:
        log_axis(ax, "x", ticks, "{:g}×")
    if floor is not None:
        ax.axhline(floor, color=GREY, linewidth=1.2, linestyle=":")
    ax.margins(0.12)
    ax.set(xlabel=x, ylabel=y, title=title)
    ax.legend(loc="upper left")
    _name_points(figure, ax, [(p, colour) for found, colour in zip(groups.values(), cycle(COLOURS)) for p in found])
    return figure


AROUND = ((10, 0, "left"), (-10, 0, "right"), (6, 13, "left"), (6, -13, "left"), (-6, 13, "right"), (-6, -13, "right"), (0, 24, "center"))


def _name_points(figure: Figure, ax: Axes, found: list[tuple[tuple[float, float, str], str]], others: Sequence[tuple[float, float]] = ()) -> None:
    """Each point's name at the first place around it where it hides no other name or point, ``others`` included, which have no name."""
    figure.draw_without_rendering()
    spots = [Bbox.from_bounds(*(ax.transData.transform(p[:2]) - 8), 16, 16) for p in [*(p for p, _ in found), *others]]
    taken: list[Bbox] = []
    for i, ((x, y, name), colour) in enumerate(found):
        for *shift, side in AROUND:
            text = ax.annotate(name, (x, y), xytext=shift, textcoords="offset points", color=colour, fontsize=12, ha=side, va="center")
            box = text.get_window_extent()
            free = ax.bbox.x0 <= box.x0 and ax.bbox.y0 <= box.y0 and not any(box.overlaps(other) for other in taken + spots[:i] + spots[i + 1 :])
            if free or side == "center":
                break
            text.remove()
        taken.append(box)


def published(model: str) -> pd.DataFrame:
    """Published figures for a network, each with its source, whether read there (``seen``) or in an abstract."""
    table = pd.read_csv(Path(__file__).with_name("published.csv"))
    return table[table.model == model].reset_index(drop=True)
