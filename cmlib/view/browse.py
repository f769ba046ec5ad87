"""The catalogue as a table that one can search, or grouped as the survey groups it, and what this installation has."""

from __future__ import annotations

import html
import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch

from ..core.method import Method
from ..lab.zoo import SEEDS, SHIPPED, checkpoint
from ..methods import catalog
from ..methods.coincide import COINCIDENCES
from .survey import group, place

PACKAGES = ("torch", "torchvision", "numpy", "jupyterlab", "ipywidgets", "anywidget", "safetensors", "nbval", "voila")


COLUMNS = ("key", "name", "chapter", "group", "kind", "knobs", "asks for", "what sets it apart", "the same as", "paper")


def methods_table(chapter: str | None = None, text: str = "") -> pd.DataFrame:
    """One row a method: its key, name, the survey's group, kind, knobs, what it asks for, a sentence of its docstring, where it is another, paper.

    Those of one chapter, or with ``text`` anywhere in the row.
    """
    table = pd.DataFrame([_row(m) for m in catalog().values() if chapter in (None, m.chapter)], columns=COLUMNS)
    hits = [text.lower() in " ".join(row).lower() for row in table.itertuples(index=False)]
    return table.loc[hits].set_index("key")


def _row(m: Method) -> list[str]:
    needs = [a for a in m.asks if a != "training"] + (["acts_in for inputs"] if m.reads_inputs else [])
    return [m.key, m.title, m.chapter, group(m), m.kind, ", ".join(m.knobs), ", ".join(needs), sentence(m), coincides(m.key), m.paper]


def sentence(method: Method, least: int = 80) -> str:
    """What sets a method apart: its docstring's first sentence, or two where the first has fewer than ``least`` letters; citations left out."""
    _, _, body = (method.__doc__ or "").partition("\n\n")
    text = re.sub(r" \([Ss]urvey \d{3}(?:[^()]|\(\d\))*\)", "", " ".join(body.split()))
    first, *more = re.split(r"(?<=[^.]\.) (?=[A-Za-z`])", text)
    return " ".join([first, *more[: len(first) < least]])


def call_of(key: str, knobs: dict[str, Any]) -> str:
    """A call as one writes it: ``hwgq(a_bits=32)``."""
    return f"{key}({', '.join(f'{name}={value!r}' for name, value in knobs.items())})"


def coincides(key: str) -> str:
    """At which knobs a method is another one, and which others become it."""
    own = [f"{call_of(c.key, c.knobs)} is {call_of(c.other, c.others)}: {c.limit}" for c in COINCIDENCES if c.key == key]
    come = list(dict.fromkeys(c.key for c in COINCIDENCES if c.other == key))
    return "; ".join(own + ([f"a limit of {', '.join(come)}"] if come else []))


class Families:
    """A table of methods in the survey's groups, as the page shows it and as plain text."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.groups = sorted(table.groupby("group", sort=False), key=lambda found: place(found[0]))

    def __repr__(self) -> str:
        lines = []
        for name, rows in self.groups:
            lines.append(f"{name} ({len(rows)})")
            for r in rows.reset_index().to_dict("records"):
                same = f" [{r['the same as']}]" if r["the same as"] else ""
                lines.append(f"  {r['key']} ({r['kind']}): {r['what sets it apart']}{same} {r['paper']}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = ("method", "what sets it apart", "knobs; what it asks for", "source")
        top = "".join(f"<th scope='col' style='text-align:left'>{head}</th>" for head in heads)
        body = "".join(
            f"<tr><th colspan='{len(heads)}' scope='rowgroup' style='text-align:left'>{html.escape(name)}</th></tr>"
            + "".join(map(_html_row, rows.reset_index().to_dict("records")))
            for name, rows in self.groups
        )
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _html_row(r: dict[str, str]) -> str:
    told = {name: html.escape(text) for name, text in r.items()}
    said = re.sub(r"``(.*?)``", r"<code>\1</code>", told["what sets it apart"])
    same = f"<br><em>The same:</em> {told['the same as']}." if r["the same as"] else ""
    how = f"<br><em>How:</em> {html.escape(catalog()[r['key']].no_plan)}." if catalog()[r["key"]].no_plan else ""
    asks = f"; <em>{told['asks for']}</em>" if r["asks for"] else ""
    cells = (f"<code>{r['key']}</code><br>{told['name']} · {r['kind']}", said + same + how, told["knobs"] + asks, told["paper"])
    return "<tr>" + "".join(f"<td style='text-align:left;vertical-align:top'>{cell}</td>" for cell in cells) + "</tr>"


def families(chapter: str) -> Families:
    """A chapter's methods in the survey's groups: what sets each apart, where it is the same as another, and how it is called if not by its key."""
    return Families(methods_table(chapter))


def browse() -> widgets.Widget:
    """The catalogue with a search box and a choice of chapter."""
    search = widgets.Text(description="search", placeholder="a name, a knob, an author", continuous_update=True)
    chapters = widgets.Dropdown(description="chapter", options=[("all", ""), *((c, c) for c in sorted({m.chapter for m in catalog().values()}))])
    shown = widgets.HTML()

    def update(_: object = None) -> None:
        table = methods_table(chapters.value or None, search.value)
        count = f"<p role='status'>{len(table)} of {len(catalog())} methods</p>"
        shown.value = count + Families(table)._repr_html_()

    for control in (search, chapters):
        control.observe(update, "value")
    update()
    return widgets.VBox([widgets.HBox([search, chapters]), shown])


def installed() -> pd.DataFrame:
    """What this installation has: versions, threads, accelerator, trained networks, browser for the browser tests."""
    rows = [("Python", platform.python_version()), *((name, _version(name)) for name in PACKAGES)]
    rows.append(("threads", str(torch.get_num_threads())))
    rows.append(("accelerator", torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none (nothing here needs one)"))
    there = sum(checkpoint(net, data, seed).is_file() for net, data in SHIPPED for seed in SEEDS)
    rows.append(("trained networks", f"{there} of {len(SHIPPED) * len(SEEDS)}"))
    rows.append(("Chromium, for the browser tests", shutil.which("chromium") or shutil.which("google-chrome") or "not found (optional)"))
    return pd.DataFrame([(n, html.escape(v)) for n, v in rows], columns=["part", "found"]).set_index("part")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
