"""The panel in Voila, and in the notebook of chapter 02 run from its top down to there (which also makes README's picture)."""

import os
from pathlib import Path

import nbformat

from cmlib.bench import browser

from .conftest import Panel, notebook, voila

ROOT = Path(__file__).resolve().parents[2]


def test_voila_shows_the_live_panel(tmp_path):
    notebook(tmp_path / "panel.ipynb", "from cmlib import *", 'explore("magnitude_pruning_han", net="mlp", data="digits", keep=0.2)')
    with voila(tmp_path, "panel.ipynb") as address, browser.page(1920, 1080) as page:
        page.goto(address, wait_until="domcontentloaded")
        found = Panel(page)
        start = found.rested()
        moved = found.press("knob-keep", "PageDown")
        assert moved["seq"] > start["seq"] and moved["bytes"] != start["bytes"] and moved["error"] == ""
        assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth + 1")


def test_the_notebook_of_chapter_02_runs_to_its_panel_which_answers(tmp_path):
    book = nbformat.read(ROOT / "notebooks/02_pruning_weights.ipynb", as_version=4)
    last = next(i for i, cell in enumerate(book.cells) if cell.source.startswith("cmlib.explore("))
    book.cells = book.cells[: last + 1]  # the rest is nbval's to run
    nbformat.write(book, tmp_path / "chapter02.ipynb")
    with browser.lab(tmp_path, "chapter02.ipynb", width=1500, height=1300) as page:
        browser.run_all(page)
        panel = Panel(page)
        panel.root.scroll_into_view_if_needed()
        if panel.part("predict").is_visible():
            panel.part("lock").press("Enter")
            panel.wait("panel => panel.querySelector('[data-role=reveal]').textContent.includes('measured')")
        before = panel.rested()
        after = panel.press("knob-keep", "PageDown", "ArrowLeft")
        assert (after["accuracy"], after["bytes"]) != (before["accuracy"], before["bytes"]) and after["error"] == ""
        if target := os.environ.get("CMLIB_SCREENSHOT"):
            for keep in ("0.4", "0.2", "0.1", "0.07", "0.05"):
                panel.type("exact-keep", keep)
            panel.root.screenshot(path=target)
