"""The catalogue as a table that one can search, and what this installation has."""

from __future__ import annotations

import html
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import ipywidgets as widgets
import pandas as pd
import torch

from ..core.method import Method
from ..lab.zoo import SEEDS, SHIPPED, checkpoint
from ..methods import catalog

PACKAGES = ("torch", "torchvision", "numpy", "jupyterlab", "ipywidgets", "anywidget", "safetensors", "nbval", "voila")


def methods_table(chapter: str | None = None, text: str = "") -> pd.DataFrame:
    """One row a method: its key, name, kind, knobs, what it asks for, paper; those of one chapter, or with ``text`` anywhere in the row."""
    rows = [_row(m) for m in catalog().values() if chapter in (None, m.chapter)]
    table = pd.DataFrame(rows, columns=["key", "name", "chapter", "kind", "knobs", "asks for", "paper"])
    hits = [text.lower() in " ".join(row).lower() for row in table.itertuples(index=False)]
    return table.loc[hits].set_index("key")


def _row(m: Method) -> list[str]:
    needs = [a for a in m.asks if a != "training"] + (["acts_in for inputs"] if m.reads_inputs else [])
    return [m.key, m.title, m.chapter, m.kind, ", ".join(m.knobs), ", ".join(needs), m.paper]


def browse() -> widgets.Widget:
    """The catalogue with a search box and a choice of chapter."""
    search = widgets.Text(description="search", placeholder="a name, a knob, an author", continuous_update=True)
    chapters = widgets.Dropdown(description="chapter", options=[("all", ""), *((c, c) for c in sorted({m.chapter for m in catalog().values()}))])
    shown = widgets.HTML()

    def update(_: object = None) -> None:
        table = methods_table(chapters.value or None, search.value)
        count = f"<p role='status'>{len(table)} of {len(catalog())} methods</p>"
        shown.value = count + table.reset_index().to_html(border=0, index=False, justify="left")

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
