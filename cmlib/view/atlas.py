"""The atlas: the survey's tree of methods, drawn and listed as ``catalog()`` has it, and every method at equal bytes.

A method's chapter is the first line of its module's docstring, its place in the survey and its paper are its own, its family is the survey's group;
its oracle is the test file that speaks of it most. Nothing is typed here.
"""

from __future__ import annotations

import html
import inspect
import re
import sys
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..core.method import Method
from ..methods import catalog
from .plots import BLUE, COLOURS, DARK, GREY, MARKERS, PALE, VERMILLION, canvas, log_axis
from .survey import group, place, section

ROOT = Path(__file__).resolve().parents[2]
EDGE = 0.6  # fewest bits that the picture tells apart
SEARCH = "https://scholar.google.com/scholar?q="  # where a paper is found by its authors and title
ROWS = 36  # of the tree's longest column
Tree = dict[str, dict[str, list[Method]]]


def chapter(method: Method) -> str:
    """The heading, "Chapter 04, quantization", of the module that a method lives in. ValueError where its docstring does not begin so."""
    first = (sys.modules[method.fn.__module__].__doc__ or "").split("\n")[0]
    found = re.fullmatch(r"(Chapter \d\d, [\w ]+): (.+)\.", first)
    if not found:
        raise ValueError(f"{method.fn.__module__} must begin 'Chapter NN, its name: what it holds.'; it begins {first!r}")
    return found[1]


def branches() -> Tree:
    """The catalogue as a tree: {chapter: {the survey's group: its methods}}, in the order of the chapters and of the survey."""
    tree: Tree = {}
    for method in sorted(catalog().values(), key=lambda m: (chapter(m), place(group(m)))):
        tree.setdefault(chapter(method), {}).setdefault(group(method), []).append(method)
    return tree


def oracle(method: Method) -> str:
    """The test file that proves the method: the one that speaks of it most. Empty where none does, as with methods of one's own."""
    path = max(_words(), key=lambda path: _words()[path][method.key], default=None)
    return str(path.relative_to(ROOT)) if path and _words()[path][method.key] else ""


@cache
def _words() -> dict[Path, Counter[str]]:
    """How often each oracle file says each word."""
    return {path: Counter(re.findall(r"\w+", path.read_text())) for path in sorted((ROOT / "tests").glob("test_oracles_*.py"))}


def leaves(panels: Mapping[str, tuple[str, str]]) -> pd.DataFrame:
    """A line a method: chapter, family, key, name, kind, survey, paper, file, line, oracle, call.

    ``panels`` are {key: (network, data)} of those that a panel can show; of the others ``call`` says what to do instead.
    """
    lines = []
    for chapter, groups in branches().items():
        for family, methods in groups.items():
            for m in methods:
                file = str(Path(inspect.getsourcefile(m.fn)).relative_to(ROOT))
                here = {"chapter": chapter, "family": family, "key": m.key, "name": m.title, "kind": m.kind, "survey": section(m), "paper": m.paper}
                call = 'explore("{}", net="{}", data="{}")'.format(m.key, *panels[m.key]) if m.key in panels else m.no_plan
                lines.append({**here, "file": file, "line": inspect.getsourcelines(m.fn)[1], "oracle": oracle(m), "call": call})
    return pd.DataFrame(lines)


def linked(table: pd.DataFrame, up: str = "..") -> str:
    """The leaves as an HTML table that leads to their code, a search for their paper and their test; ``up`` is the way to the project's folder."""
    heads = ("method", "what it is", "kind", "survey", "paper", "proved by", "panel")
    rows = []
    for (chapter, family), lines in table.groupby(["chapter", "family"], sort=False):
        rows.append(f"<tr><th colspan='{len(heads)}' scope='rowgroup' style='text-align:left'>{html.escape(f'{chapter}: {family}')}</th></tr>")
        for r in lines.itertuples():
            code = f"<a href='{up}/{r.file}#L{r.line}'>{r.key}</a>"
            proof = f"<a href='{up}/{r.oracle}'>{Path(r.oracle).name}</a>" if r.oracle else ""
            cells = (
                code,
                html.escape(r.name),
                r.kind,
                r.survey,
                f"<a href='{SEARCH}{quote_plus(r.paper)}'>{html.escape(r.paper)}</a>",
                proof,
                f"<code>{html.escape(r.call)}</code>",
            )
            rows.append("<tr>" + "".join(f"<td style='text-align:left'>{c}</td>" for c in cells) + "</tr>")
    top = "".join(f"<th scope='col' style='text-align:left'>{h}</th>" for h in heads)
    return f"<div style='max-height:44em;overflow:auto'><table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def outline(table: pd.DataFrame) -> str:
    """The leaves as plain text, a line each under its chapter and family."""
    lines = []
    for chapter, groups in table.groupby("chapter", sort=False):
        lines.append(f"{chapter}: {len(groups)} methods")
        for family, found in groups.groupby("family", sort=False):
            lines.append(f"  {family}")
            lines += [f"    {r.key} ({r.kind}): {r.file}:{r.line}; {r.oracle or 'no oracle'}; {r.call}" for r in found.itertuples()]
    return "\n".join(lines)


def tree(title: str = "") -> Figure:
    """The catalogue's tree in one picture: chapters across the top, families below them, each method a leaf whose mark says its kind."""
    chapters = branches()
    columns = [(chapter, part, number) for chapter, groups in chapters.items() for number, part in enumerate(_dealt(groups))]
    kinds = dict(zip(dict.fromkeys(m.kind for m in catalog().values()), zip(COLOURS, MARKERS)))
    rows = max(_height(part) for _, part, _ in columns)
    figure, ax = canvas(width=4.45 * len(columns), height=0.285 * (rows + 4.5))
    ax.set(xlim=(0, len(columns)), ylim=(rows + 3.2, -1.9), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    starts = [x for x, (_, _, number) in enumerate(columns) if not number]
    ax.plot([starts[0] + 0.02, starts[-1] + 0.02], [-1.1] * 2, color=GREY)
    for x, (chapter, part, number) in enumerate(columns):
        heading = chapter.removeprefix("Chapter ").replace(",", " ·")
        heading = f"{heading.split()[0]} · continued" if number else heading
        ax.plot([x + 0.02] * 2, [-1.1 if not number else 0.6, _families(ax, x, part, kinds)], color=GREY, zorder=0)
        ax.text(x + 0.035, 0, heading, fontsize=18, fontweight="bold", color=DARK, va="center")
    for kind, (colour, marker) in kinds.items():
        ax.plot([], [], marker, color=colour, markersize=10, label=kind)
    ax.legend(loc="lower center", ncols=len(kinds), fontsize=15, borderaxespad=0)
    ax.set_title(title or f"{len(catalog())} methods", fontsize=18)
    return figure


def _height(groups: Mapping[str, list[Method]]) -> float:
    return 0.9 + sum(1.5 + len(methods) for methods in groups.values())


def _dealt(groups: dict[str, list[Method]]) -> list[dict[str, list[Method]]]:
    """The families in as few columns as ``ROWS`` allows, about equally long."""
    goal, parts = _height(groups) / np.ceil(_height(groups) / ROWS), [{}]
    for name, methods in groups.items():
        if parts[-1] and _height(parts[-1] | {name: methods}) > goal + 2:
            parts.append({})
        parts[-1][name] = methods
    return parts


def _families(ax: Axes, x: float, groups: Mapping[str, list[Method]], kinds: Mapping[str, tuple[str, str]]) -> float:
    """Draw a column's families and leaves; returns how far down the last family stands."""
    y = last = 0.9
    for name, methods in groups.items():
        y, last = y + 1.5, y + 0.4
        ax.plot([x + 0.02, x + 0.05], [last] * 2, color=GREY, zorder=0)
        ax.text(x + 0.06, last, name.lstrip("0123456789.() "), fontsize=13, fontweight="bold", color=BLUE, va="center")
        ax.plot([x + 0.075] * 2, [last + 0.5, y + len(methods) - 1], color=PALE, zorder=0)
        for m in methods:
            colour, marker = kinds[m.kind]
            ax.plot([x + 0.075, x + 0.105], [y, y], color=PALE, zorder=0)
            ax.plot(x + 0.11, y, marker, color=colour, markersize=8)
            ax.text(x + 0.135, y, m.key, fontsize=14, color=DARK, va="center")
            y += 1
    return last


def at_equal_bytes(found: pd.DataFrame, goal: float, control: str, *, title: str = "") -> Figure:
    """One row a method, in the table's order: the bits that a weight takes, and the error on the test part, a mark a seed and a bar at their mean.

    ``found`` has a line a run: key, chapter, bits, test, remark. ``goal`` bits are dashed; the error of ``control`` is dashed too. Hollow marks are
    rows with a remark.
    """
    keys = list(dict.fromkeys(found.key))
    looks = dict(zip(sorted({c for c in found.chapter if c}), zip(COLOURS, MARKERS))) | {"": (DARK, "P")}
    figure, axes = canvas(2, width=12, height=1.8 + 0.262 * len(keys), sharey=True, width_ratios=(1, 2.2))
    for row, (_, lines) in enumerate(found.groupby("key", sort=False)):
        colour, marker = looks[lines.chapter.iloc[0]]
        style = {"color": colour, "fillstyle": "none" if lines.remark.iloc[0] else "full", "linestyle": "none", "alpha": 0.9}
        axes[0].plot(lines.bits.clip(lower=EDGE), [row] * len(lines), marker, **style)
        axes[1].plot(100 * (1 - lines.test), [row] * len(lines), marker, **style)
        axes[1].plot([100 * (1 - lines.test.mean())] * 2, [row - 0.36, row + 0.36], color=DARK, linewidth=2)
    axes[0].axvline(goal, color=VERMILLION, linestyle="--", linewidth=1.4)
    axes[1].axvline(100 * (1 - found[found.key == control].test.mean()), color=DARK, linestyle="--", linewidth=1.4)
    log_axis(axes[0], "x", (1, 2, 4, 8, 16, 32))
    log_axis(axes[1], "x", (0.5, 1, 2, 5, 10, 20, 50, 90))
    axes[0].set(xlabel="bits a weight (left edge: or fewer)", xlim=(0.95 * EDGE, 40), ylim=(len(keys) - 0.4, -0.6))
    axes[1].set(xlabel="test error, % (mark: a seed; bar: their mean)")
    axes[0].set_yticks(range(len(keys)), keys)
    for ax in axes:
        ax.grid(color=PALE, linewidth=0.7)
        ax.set_axisbelow(True)
    for chapter, (colour, marker) in looks.items():
        axes[1].plot([], [], marker, color=colour, linestyle="none", label=f"chapter {chapter}" if chapter else control)
    axes[1].plot([], [], "o", color=GREY, fillstyle="none", linestyle="none", label="with a remark in the table")
    figure.legend(handles=axes[1].get_legend_handles_labels()[0], loc="outside lower center", ncols=len(looks) + 1)
    figure.suptitle(title, fontsize=14, x=0.02, ha="left")
    return figure
