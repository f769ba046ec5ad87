"""Pictures of networks from which whole filters went: what each layer is worth, what left it, what it bought. Each function returns the Figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from torch import nn

from ..core.apply import weighted
from ..core.apply import with_plain_weights as plain
from ..core.channels import example_of, groups
from ..core.planner import type_name
from .plots import (
    AMBER,
    BLUE,
    COLOURS,
    DARK,
    GREY,
    MARKERS,
    PALE,
    VERMILLION,
    _beside,
    _name_ends,
    _name_points,
    canvas,
    log_axis,
    percent,
    share_axis,
)


def _needs(table: pd.DataFrame, columns: Iterable[str], whence: str) -> None:
    """ValueError where a table lacks a column or has no line."""
    if missing := [c for c in columns if c not in table]:
        raise ValueError(f"the table has no column {missing[0]!r}, only {', '.join(map(str, table.columns))}; {whence} gives one")
    if table.empty:
        raise ValueError(f"the table has no line to draw; {whence} gives one")


def sensitivity_plot(table: pd.DataFrame, *, title: str = "", height: float = 5.0) -> Figure:
    """Accuracy against the share of one layer's filters that stays, a line a layer (a table of ``cmlib.sensitivity``); dotted: nothing pruned."""
    _needs(table, ("layer", "keep", "accuracy", "drop"), "sensitivity(...)")
    figure, ax = canvas(height=height)
    dense, ends = float((table.accuracy + table["drop"]).iloc[0]), []
    for (name, lines), colour, marker in zip(table.groupby("layer", sort=False), cycle(COLOURS), cycle(MARKERS)):
        lines = lines[lines.keep < 1].sort_values("keep", ascending=False)
        ax.plot([1.0, *lines.keep], [dense, *lines.accuracy], color=colour, marker=marker, label=name, clip_on=False)
        ends.append(([dense, *lines.accuracy][-1], name, colour))
    ax.axhline(dense, color=GREY, linewidth=1.2, linestyle=":", label="nothing pruned")
    _beside(ax, 1, dense, "nothing pruned", GREY)
    ax.set(
        xlim=(1, min(0.9, table.keep.min())),
        xlabel="filters of the layer that stay (all other layers dense)",
        ylabel="accuracy, not retrained",
        title=title,
    )
    percent(ax.xaxis)
    percent(ax.yaxis)
    _name_ends(ax, ends)
    return figure


def removal_diagram(model: nn.Module, baked: nn.Module, data: Any = None, *, title: str = "") -> Figure:
    """The layers in order, the input at the top: a bar's outline is a layer's channels in ``model``, its filling those left in ``baked``.

    Arcs join layers whose channels go together, since a shortcut adds them to one another. ``data`` as for ``bake``: the kit's networks
    need none. ValueError where the two are not the same network.
    """
    before, after = ({n: len(m.weight) for n, m in weighted(net).items()} for net in (model, baked))
    if before.keys() != after.keys() or any(after[n] > before[n] for n in before):
        raise ValueError(
            f"baked must be model with channels removed: layers {', '.join(before)}; got {', '.join(after)}, or more channels than before"
        )
    names, layers = list(before), weighted(model)
    colours = {n: AMBER if type_name(layers[n]) == "Linear" else BLUE for n in names}
    figure, ax = canvas(height=1.3 + 0.42 * len(names))
    ax.barh(names, [after[n] for n in names], height=0.62, color=[colours[n] for n in names])
    ax.barh(names, [before[n] for n in names], height=0.62, facecolor="none", edgecolor=DARK, linewidth=1.4)
    for row, n in enumerate(names):
        text = f"{after[n]} of {before[n]}" if after[n] < before[n] else f"all {before[n]}"
        ax.annotate(text, (before[n], row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=12)
    tied = [[names.index(n) for n in g.makers] for g in groups(plain(model), example_of(model, data)) if len(g.makers) > 1]
    _arcs(ax, tied, 1.25 * max(before.values()), 0.12 * max(before.values()))
    for colour, kind in ((BLUE, "convolution"), (AMBER, "dense layer")):
        if colour in colours.values():
            ax.barh([0], [0], color=colour, label=f"{kind}: channels that stay")
    ax.barh([0], [0], facecolor="none", edgecolor=DARK, linewidth=1.4, label="channels before")
    if tied:
        ax.plot([], [], color=VERMILLION, label="tied: their channels go together")
    ax.set_xticks([t for t in ax.get_xticks() if t <= max(before.values())])
    ax.set(xlim=(0, (1.5 if tied else 1.2) * max(before.values())), ylim=(len(names) - 0.4, -0.6), xlabel="output channels", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _arcs(ax: Axes, tied: Sequence[Sequence[int]], x: float, bulge: float) -> None:
    """Arcs to the right of ``x`` between successive rows of each group, wider the farther they span."""
    for rows in tied:
        for a, b in pairwise(rows):
            out = x + bulge * (1 + (b - a) / 2)
            ax.add_patch(PathPatch(Path([(x, a), (out, (a + b) / 2), (x, b)], [Path.MOVETO, Path.CURVE3, Path.CURVE3]), edgecolor=VERMILLION,
                                   facecolor="none", linewidth=2.2))  # fmt: skip
        ax.plot([x] * len(rows), rows, "o", color=VERMILLION)


def pareto(runs: pd.DataFrame, published: pd.DataFrame | None = None, *, label: str = "parameters that stay", title: str = "") -> Figure:
    """Accuracy against what is left, a line a method: the mean over seeds, and a band from the lowest seed to the highest.

    ``runs`` has a line a run: method, seed, accuracy, and share (of the cost that is left) or ratio (dense over now). ``published`` has method
    (the label), accuracy, and the same share or ratio: hollow markers, measured by others on their networks.
    """
    x = "ratio" if "ratio" in runs else "share"
    _needs(runs, ("method", x, "accuracy", "seed"), "a line a run with method, seed, accuracy and share or ratio")
    figure, ax = canvas(height=4.8)
    ends = []
    colours = dict(zip(runs.method.unique(), cycle(COLOURS)))
    for (name, lines), marker in zip(runs.groupby("method", sort=False), cycle(MARKERS)):
        over = lines.groupby(x).accuracy.agg(["mean", "min", "max"])
        over = over if x == "ratio" else over[::-1]
        ax.plot(over.index, over["mean"], color=colours[name], marker=marker, label=name)
        ax.fill_between(over.index, over["min"], over["max"], color=colours[name], alpha=0.18, linewidth=0)
        ends.append((over["mean"].iloc[-1], name, colours[name]))
    shown = runs if published is None else pd.concat([runs, published])
    _ratio_axis(ax, shown[x], x, label)
    percent(ax.yaxis)
    ax.set(ylabel="accuracy", title=title)
    if published is not None:
        _needs(published, ("method", x, "accuracy"), f"published figures with method, accuracy and {x}")
        found = [(row[x], row.accuracy, row.method) for _, row in published.iterrows()]
        where = [p[0] for p in found], [p[1] for p in found]
        hollow = ax.plot(
            *where, "o", color=DARK, fillstyle="none", markersize=10, markeredgewidth=2, zorder=3, label="published, on networks of their own"
        )
        ax.legend(handles=hollow, loc="lower left")
        ax.margins(0.08)
    _name_ends(ax, ends)
    if published is not None:
        named = len(ax.texts)
        _name_points(figure, ax, [(p, DARK) for p in found])
        for text in ax.texts[named:]:
            text.set(path_effects=[withStroke(linewidth=4, foreground="white")], zorder=4)
    return figure


def error_curves(runs: pd.DataFrame, published: pd.DataFrame, *, dense: float | None = None, title: str = "") -> Figure:
    """Error (log scale) against how many times fewer weights are left, an axes a family, all methods in each: its own in colour, the others pale.

    ``runs`` has a line a run: family, method, seed, ratio, accuracy; lines are means over seeds, bands go from the lowest seed to the highest.
    ``published`` has family, method, ratio, accuracy: hollow markers, named in their family. Dotted: the accuracy ``dense``.
    """
    _needs(runs, ("family", "method", "seed", "ratio", "accuracy"), "a line a run with family, method, seed, ratio and accuracy")
    _needs(published, ("family", "method", "ratio", "accuracy"), "published figures with family, method, ratio and accuracy")
    families = list(runs.family.unique())
    figure, axes = plt.subplots(len(families), 1, figsize=(8.5, 0.6 + 3.5 * len(families)), sharex=True, sharey=True, squeeze=False)
    plt.close(figure)
    for ax, family in zip(axes[:, 0], families):
        ax.set(yscale="log", ylabel="error")
        for _, lines in runs.groupby("method"):
            over = lines.groupby("ratio").accuracy.mean()
            ax.plot(over.index, 1 - over, color=PALE, linewidth=1.2, zorder=0)
        shared = ax.plot(published.ratio, 1 - published.accuracy, "o", color=GREY, fillstyle="none", label="published, on networks of their own")
        if dense is not None:
            shared.append(ax.axhline(1 - dense, color=GREY, linewidth=1.2, linestyle=":", label="dense, trained as long"))
        ax.set_title(family)
    _ratio_axis(axes[-1, 0], pd.concat([runs.ratio, published.ratio]), "ratio", "fewer weights")
    least = 1 - max(runs.accuracy.max(), published.accuracy.max())
    axes[0, 0].set_ylim(bottom=max(least, 1e-4) / 1.7)  # room for names below the best
    for ax, family in zip(axes[:, 0], families):
        _family(figure, ax, runs[runs.family == family], published.assign(named=published.family == family))
    axes[0, 0].legend(handles=shared, loc="upper left")
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _family(figure: Figure, ax: Axes, runs: pd.DataFrame, published: pd.DataFrame) -> None:
    """A family's methods in colour, with their bands and names, and its published points (those to be ``named``) by name."""
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9) if ax.get_ylim()[0] < t < ax.get_ylim()[1]]
    log_axis(ax, "y", ticks)
    percent(ax.yaxis)
    ends, others = [], [(row.ratio, 1 - row.accuracy) for row in published[~published.named].itertuples()]
    for (name, lines), colour, marker in zip(runs.groupby("method", sort=False), cycle(COLOURS), cycle(MARKERS)):
        over = 1 - lines.groupby("ratio").accuracy.agg(["mean", "max", "min"])
        ax.plot(over.index, over["mean"], color=colour, marker=marker, label=name)
        ax.fill_between(over.index, over["max"], over["min"], color=colour, alpha=0.18, linewidth=0)
        ends.append((over["mean"].iloc[-1], name, colour))
        others += zip(over.index, over["mean"])
    _name_ends(ax, ends, 0.085)
    named = [((row.ratio, 1 - row.accuracy, row.method), DARK) for row in published[published.named].itertuples()]
    _name_points(figure, ax, named, others)


def _ratio_axis(ax: Axes, values: pd.Series, kind: str, label: str) -> None:
    """A logarithmic axis on which compression grows to the right, of shares or of ratios."""
    if kind == "share":
        return share_axis(ax, list(values), label)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500) if values.min() / 1.01 <= t <= values.max() * 1.01]
    log_axis(ax, "x", ticks, "{:g}×")
    ax.set_xlabel(f"{label} (log scale)")


def filter_grid(weight: Any, rows: Any, ncols: int = 16, *, title: str = "") -> Figure:
    """What each filter of a convolution makes of its first input channel, in order; those that ``rows`` (out,) says are gone are grey and crossed.

    ``weight`` (out, in, height, width); one colour scale for all, 0 in its middle.
    """
    w, stays = np.asarray(getattr(weight, "detach", lambda: weight)()), np.asarray(rows, bool)
    if w.ndim != 4 or stays.shape != w.shape[:1]:
        raise ValueError(f"filter_grid needs a weight (out, in, height, width) and rows (out,); got {list(w.shape)} and {list(stays.shape)}")
    lines, side = -(-len(w) // ncols), w.shape[2] / w.shape[3]
    ncols, reach = min(ncols, len(w)), float(np.abs(w[:, 0]).max()) or 1.0
    figure, ax = canvas(width=8.5, height=1.0 + 7.4 / max(ncols, 8) * side * lines)
    for i, picture in enumerate(w[:, 0]):
        x, y = i % ncols, i // ncols * side
        box = (x + 0.05, x + 0.95, y + 0.95 * side, y + 0.05 * side)
        drawn = ax.imshow(picture, cmap="PuOr" if stays[i] else "Greys", vmin=-reach, vmax=reach, extent=box, alpha=1.0 if stays[i] else 0.3)
        if stays[i]:
            ax.add_patch(plt.Rectangle((box[0], box[3]), 0.9, 0.9 * side, fill=False, edgecolor=GREY, linewidth=0.8))
            kept = drawn
        else:
            ax.plot(box[:2], box[2:], color=DARK, linewidth=1.6)
            ax.plot(box[:2], box[3:1:-1], color=DARK, linewidth=1.6)
    if stays.any():
        bar = figure.colorbar(kept, ax=ax, shrink=0.9, aspect=12, pad=0.02)
        bar.set_label("weight value")
        bar.outline.set_visible(False)
    ax.set_yticks([side * (r + 0.5) for r in range(lines)], [str(r * ncols) for r in range(lines)])
    ax.set(xlim=(0, max(ncols, 1)), ylim=(lines * side, 0), xticks=[], ylabel="filter")
    ax.set_xlabel(f"{stays.sum()} of {len(w)} filters stay; crossed: gone")
    ax.set_title(title)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def latency_steps(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Measured milliseconds against the share of filters kept: median, quartiles as a band (a table of ``latency_scan``).

    Dashed: the time of the largest keep in proportion to the filters, and, where the table has their share, to the multiply-adds.
    """
    _needs(table, ("keep", "ms", "low", "high"), "latency_scan(...)")
    table = table.sort_values("keep", ascending=False)
    figure, ax = canvas(height=4.8)
    ax.plot(table.keep, table.ms, color=BLUE, marker="o", label="measured", clip_on=False)
    ax.fill_between(table.keep, table.low, table.high, color=BLUE, alpha=0.22, linewidth=0)
    full = table.iloc[0]
    ideals = {"like the filters": table.keep / full.keep}
    if "multiply_adds" in table:
        ideals["like the multiply-adds"] = table.multiply_adds / full.multiply_adds
    ends = [(table.ms.iloc[-1], "measured", BLUE)]
    for (name, share), colour in zip(ideals.items(), (GREY, VERMILLION)):
        ax.plot(table.keep, full.ms * share, color=colour, linestyle="--", label=name)
        ends.append((full.ms * share.iloc[-1], name, colour))
    ax.set(xlim=(full.keep, table.keep.min()), xlabel="filters that stay in every layer", ylabel="milliseconds of a forward pass", title=title)
    ax.set_ylim(bottom=0)
    percent(ax.xaxis)
    _name_ends(ax, ends)
    return figure
