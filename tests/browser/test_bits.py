"""A panel of chapter 04 in a real JupyterLab: bits go, and levels, table and file go with them."""

import pytest

from cmlib.bench import browser

from .conftest import Panel, kernel, notebook
from .test_panel import OUTSIDE

START = "import torch\ntorch.set_num_threads(1)\nfrom cmlib import *"
RUN = '{"knobs": {"bits": 2}, "training": "3 epochs", "bytes": 70_000, "accuracy": 0.97}'
SHOWN = f'panel = explore("dorefa_net", net="lenet300", data="mnist", bits=6, a_bits=8, stored=[{RUN}])\npanel'
DRAWN = """(panel) => [...panel.querySelectorAll('.pnl-histogram path')].map(path => path.getAttribute('d') ?? '').join('|')"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    notebook(folder / "bits.ipynb", START, SHOWN)
    with browser.lab(folder, "bits.ipynb") as found:
        browser.run_all(found)
        yield found


@pytest.fixture
def panel(page):
    found = Panel(page)
    found.rested()
    return found


def layers(panel):
    """The text twin's figures of each layer."""
    rows = panel.root.locator(".pnl-twin table").nth(1).locator("tr")
    return rows.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")


def test_fewer_bits_under_the_hand(page, panel):
    before, levels, drawing = panel.table(), layers(panel), panel.root.evaluate(DRAWN)
    assert before["levels"][1] == "64" and before["bits an activation"][:2] == ["32", "8"]
    moved = panel.press("knob-bits", *["ArrowLeft"] * 4)
    after = panel.table()
    assert after["levels"][1] == "4" and after["bits a covered weight"][1] == kernel(page, "f'{panel.state.weight_bits:.2f}'") != "6.00"
    assert after["file on disk"][1] == moved["bytes"] == kernel(page, "dict((c[0], c[2]) for c in panel.cells(panel.state))['file on disk']")
    assert after["file on disk"][1] != before["file on disk"][1]
    exact = kernel(page, "panel.state.accuracy")
    assert moved["accuracy"] == f"{100 * exact:.2f} %" == after["accuracy, exact"][1] != before["accuracy, exact"][1]
    assert exact == kernel(page, "evaluate(panel.model(), panel.data)") and "bits=2" in moved["line"]
    assert layers(panel)[0] == ["layer", "bits a weight as stored"] and layers(panel) != levels
    assert panel.root.evaluate(DRAWN) != drawing and moved["error"] == ""


def test_a_stick_stands_at_each_level(page, panel):
    panel.type("exact-bits", "3")
    sticks = panel.root.locator(".pnl-histogram").first.locator("path").nth(3).get_attribute("d")
    assert sticks.count("M") == 8 == kernel(page, "panel.state.plan['fc1'].count")
    label = panel.root.locator(".pnl-histogram svg").first.get_attribute("aria-label")
    assert "8 levels" in label and kernel(page, "f'{int((panel.state.plan[\"fc1\"].index == 4).sum()):,}'") in label
    steps = panel.root.locator(".pnl-stairs")
    assert steps.count() == 1 and "mean squared error" in steps.inner_text()  # fc1 reads the image
    seq = panel.figures()["seq"]
    panel.part("layer").select_option(label="fc2")
    panel.rested(seq)
    assert steps.count() == 2 and "fc2 reads" in steps.last.inner_text() and "256 levels" in steps.last.inner_text()
    panel.part("layer").select_option(label="fc1")
    panel.rested(seq + 1)


def test_rounded_inputs_count(page, panel):
    before, after = panel.figures(), panel.type("exact-a_bits", "1")
    assert after["accuracy"] != before["accuracy"] and kernel(page, "evaluate(panel.model(), panel.data) == panel.state.accuracy")
    free = panel.type("exact-a_bits", "32")
    assert "bits an activation" not in panel.table() and free["accuracy"] != after["accuracy"]


def test_a_stored_run_is_marked_as_stored(panel):
    panel.type("exact-bits", "2")
    assert "Stored run at bits = 2. 97.00 % of the validation images after 3 epochs, 70 kB." in panel.part("notes").inner_text()
    assert "stored runs" in panel.part("plot").text_content()
    panel.type("exact-bits", "3")
    assert "Stored run at bits = 2, not at these knobs." in panel.part("notes").inner_text()  # the only one is told wherever the hand is


@pytest.mark.parametrize("width", [480, 700, 1800])
def test_nothing_is_cut_off(page, panel, width):
    panel.part("layer").select_option(label="fc2")
    panel.root.evaluate("(node, width) => { node.closest('.pnl-room').style.width = `${width}px`; }", width)
    page.wait_for_timeout(300)
    assert panel.root.evaluate(OUTSIDE) == [] and panel.root.evaluate("node => node.scrollWidth <= node.clientWidth + 1")
    panel.root.evaluate("node => { node.closest('.pnl-room').style.width = ''; }")
