"""A panel of chapter 03 in a real JupyterLab: filters go, and so do the operations."""

from cmlib.bench import browser

from .conftest import Panel, kernel, notebook

START = "import torch\ntorch.set_num_threads(1)\nfrom cmlib import *"
SHOWN = 'panel = explore("lasso_channel_pruning", net="resnet", data="fashion_mnist", keep=0.9)\npanel'


def test_filters_go_for_real_under_the_hand(tmp_path):
    notebook(tmp_path / "filters.ipynb", START, SHOWN)
    with browser.lab(tmp_path, "filters.ipynb") as page:
        browser.run_all(page)
        panel = Panel(page)
        panel.rested()
        before = panel.table()
        moved = panel.press("knob-keep", *["PageDown"] * 4)
        panel.rested()
        after = panel.table()
        assert moved["accuracy"] != before["accuracy, exact"][1]
        assert after["multiply-adds"] != before["multiply-adds"] and after["multiply-adds"][2] != "1.0×"
        assert after["file, filters taken out"][1] != after["file on disk"][1]
        small = kernel(page, "sum(p.numel() for p in bake(panel.model()).parameters())")
        assert small < kernel(page, "sum(p.numel() for p in panel.net.parameters())")
        assert "Filters go whole." in panel.root.inner_text()
