"""The tables of the bench, one function a table; each yields the lines of its markdown as they are measured."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.utils.prune as torch_prune

from ..core.apply import plan_of
from ..core.inputs import as_input
from ..core.schedule import Schedule, Stage
from ..lab.data import load_data
from ..lab.files import save
from ..lab.measure import sparse_crossover
from ..lab.train import evaluate, fit, prune_and_train
from ..lab.verbs import plan
from ..lab.zoo import SEEDS, SHIPPED, card, load_net, recipe
from ..view.live import Live
from . import browser

ROOT = Path(__file__).resolve().parents[2]


HAN = (  # network, schedule, what differs from the recipe that the network was trained by
    ("lenet300", (Stage(0.5, 3), Stage(0.3, 3), Stage(0.2, 3), Stage(0.13, 4), Stage(0.083, 50)), {"lr": 4e-3, "weight_decay": 0.1}),
    ("lenet5", (Stage(0.5, 2), Stage(0.3, 2), Stage(0.15, 3), Stage(0.083, 18)), {"lr": 3e-3, "weight_decay": 0.1}),
)


def heading(title: str, *columns: str) -> Iterator[str]:
    yield f"\n**{title}**\n"
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)


def percent(shares: pd.Series) -> str:
    """Mean and standard deviation over the seeds, in percent; of one seed its value alone."""
    return f"{100 * shares.mean():.2f} " + (f"± {100 * shares.std():.2f} %" if len(shares) > 1 else "%")


def line(*cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def spread(values: list[float], unit: str = "ms", scale: float = 1.0) -> str:
    """Median and 90th percentile."""
    if not values:
        return "not measured"
    ordered = sorted(v * scale for v in values)
    return f"{statistics.median(ordered):.0f} / {ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]:.0f} {unit} (n = {len(ordered)})"


def timed(work: Callable[[], Any], count: int = 20) -> list[float]:
    """Seconds of each of ``count`` calls, after one that is not counted."""
    work()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def importing() -> Iterator[str]:
    """Seconds that cmlib's names cost beyond torch."""
    code = "import torch, time; t = time.perf_counter(); import cmlib; {}; print(time.perf_counter() - t)"
    names = "[getattr(cmlib, n) for n in ('compress', 'plan', 'fit', 'evaluate', 'save', 'load', 'load_data', 'load_net', 'catalog', 'measure')]"
    yield from heading("Importing, seconds beyond torch's own, median of 5", "what", "seconds", "bound")
    for what, uses in (("`import cmlib`", "0"), ("and every verb but `explore`", names), ("and `explore`", names + ", cmlib.explore")):
        runs = [
            float(subprocess.run([sys.executable, "-c", code.format(uses)], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
            for _ in range(5)
        ]
        yield line(what, f"{statistics.median(runs):.2f}", "0.5" if uses == "0" else "")


def exact() -> Iterator[str]:
    """Exact accuracy on all 5,000 validation images, beside the plain way."""
    net, data = load_net("lenet5", "mnist"), load_data("mnist")
    live = Live(net, data)
    keeps = [0.02 + 0.04 * i for i in range(20)]
    plans = [{n: p.dense() for n, p in plan(net, "magnitude_pruning_han", keep=k).items()} for k in keeps]
    dense_only = [{n: w for n, w in p.items() if n.startswith("fc")} for p in plans]
    yield from heading("From weights to an accuracy, LeNet-5 on MNIST, 5,000 validation images, 20 moves", "what", "median / 90th", "bound")
    position = iter(range(10**6))
    yield line(
        "the plain way: copy, `torch.nn.utils.prune`, batches of 250",
        spread(timed(lambda: _plainly(net, data, keeps[next(position) % 20])), scale=1e3),
        "",
    )
    yield line("exact, all layers pruned", spread(timed(lambda: live.accuracy(plans[next(position) % 20])), scale=1e3), "280 ms")
    yield line("exact, only dense layers pruned", spread(timed(lambda: live.accuracy(dense_only[next(position) % 20])), scale=1e3), "60 ms")
    yield line("first estimate, at most ±2 points", spread(timed(lambda: _estimate(live, plans[next(position) % 20])), scale=1e3), "150 ms")


def _plainly(net: torch.nn.Module, data: Any, keep: float) -> float:
    copy = deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in copy.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch_prune.l1_unstructured(module, "weight", amount=1 - keep)
    images, labels = data.validation
    with torch.no_grad():
        hits = sum(int((copy(as_input(x)).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return hits / len(labels)


def _estimate(live: Live, weights: dict[str, torch.Tensor]) -> None:
    for estimate, _ in live.estimates(weights):
        if estimate is not None:
            return


PANEL = """from cmlib import explore
explore("magnitude_pruning_han", net="lenet5", data="mnist", where="{where}", layer="fc1", keep=0.1)"""
PLAIN = """%matplotlib inline
import torch, matplotlib.pyplot as plt
from ipywidgets import interact, FloatSlider
from cmlib import load_net
w = load_net("lenet5", "mnist").fc1.weight.detach()
@interact(keep=FloatSlider(0.1, min=0.01, max=1, step=0.005))
def show(keep):
    cut = w.abs().flatten().kthvalue(max(1, round((1 - keep) * w.numel())))[0]
    figure, (a, b) = plt.subplots(1, 2, figsize=(8, 3))
    a.hist(w.flatten().numpy(), 81); a.axvline(cut); a.axvline(-cut)
    b.imshow(w.abs() > cut, aspect="auto"); plt.show()"""


def notebook(folder: Path, *cells: str) -> str:
    """A notebook of these cells in ``folder``; its name."""
    import nbformat  # its schemas take a second to import: whoever only draws stored runs does without

    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    nbformat.write(made, folder / "bench.ipynb")
    return "bench.ipynb"


def slider() -> Iterator[str]:
    """Key press to changed picture, estimate and exact figure, in JupyterLab in Chromium."""
    yield from heading(
        "Slider in JupyterLab in Chromium, key press to drawn, 20 moves 300 ms apart or as said, LeNet-5 on MNIST",
        "what",
        "median / 90th",
        "bound of each",
    )
    if browser.chromium() is None:
        yield line("Chromium is not installed: left out", "", "")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield line("the plain way: `interact` + pyplot, no accuracy", spread(_plain_moves(Path(folder))), "")
        for where, what in (("*", "all layers pruned"), ("fc*", "dense layers pruned")):
            with browser.lab(Path(folder), notebook(Path(folder), PANEL.format(where=where))) as page:
                browser.run_all(page)
                panel = page.locator('[data-role="panel"]').first
                panel.wait_for(timeout=30_000)
                page.wait_for_timeout(2_000)
                found = browser.moves(page, panel)
                spaced = browser.moves(page, panel, count=20, gap=1.2)
                held = browser.hold(page, panel)
            yield line(f"changed mask and histogram, {what}", spread(found["seq"]), "60 / 100 ms")
            yield line(f"accuracy estimate, {what}, moves 1.2 s apart", spread(spaced["estimate"]), "150 ms median")
            yield line(f"exact accuracy, {what}, moves 1.2 s apart", spread(spaced["exact"]), "of its arithmetic: the table above")
            yield line(
                f"held down at {held['rate']:.0f} a second, {what}: pictures shown of 40; last position shown",
                f"{held['shown']}; {'yes' if held['last'] else 'NO'}",
                "yes",
            )


CODES = """from cmlib import explore
explore("{method}", net="lenet5", data="mnist", layer="fc1", {start})"""


def bits() -> Iterator[str]:
    """The same for the sliders of two quantizers: bits of evenly spaced levels, and the size of a k-means codebook."""
    yield from heading(
        "Slider over bits in JupyterLab in Chromium, key press to drawn, all layers of LeNet-5 on MNIST", "what", "median / 90th", "bound of each"
    )
    if browser.chromium() is None:
        yield line("Chromium is not installed: left out", "", "")
        return
    for method, knob, start, count in (("integer_only_quantization", "bits", "bits=8, a_bits=32", 6), ("vq_gong", "k", "k=64", 20)):
        with tempfile.TemporaryDirectory() as folder:
            page_of = browser.lab(Path(folder), notebook(Path(folder), CODES.format(method=method, start=start)))
            with page_of as page:
                browser.run_all(page)
                panel = page.locator('[data-role="panel"]').first
                panel.wait_for(timeout=30_000)
                page.wait_for_timeout(2_000)
                found = browser.moves(page, panel, knob=f"knob-{knob}", count=count, gap=1.2)
        yield line(f"changed histogram and levels, `{knob}` of {method}, moves 1.2 s apart", spread(found["seq"]), "60 ms")
        yield line(f"accuracy estimate, `{knob}` of {method}", spread(found["estimate"]), "150 ms")


def _plain_moves(folder: Path) -> list[float]:
    with browser.lab(folder, notebook(folder, PLAIN)) as page:
        browser.run_all(page)
        page.wait_for_timeout(1_000)
        return browser.plain_moves(page)


def han() -> Iterator[str]:
    """Han et al.'s claim on MNIST: twelve times fewer weights, no accuracy lost; three seeds, the dense net trained on beside."""
    title = "Han et al. 2015 on MNIST: at least 12x fewer weights, three seeds, mean ± standard deviation; dense control with the same extra epochs"
    yield from heading(
        title,
        "network",
        "fewer weights",
        "smaller file",
        "validation, pruned",
        "validation, dense",
        "difference, points",
        "test, pruned",
        "test, dense",
        "seconds a run",
    )
    for net, schedule, changes in HAN:
        runs = [_han(net, seed, schedule, changes) for seed in SEEDS]
        mean = {k: statistics.mean(r[k] for r in runs) for k in runs[0]}
        cells = [f"{100 * mean[k]:.2f} ± {100 * statistics.stdev(r[k] for r in runs):.2f} %" for k in ("pruned", "dense", "test", "dense_test")]
        gap = 100 * (mean["pruned"] - mean["dense"])
        yield line(
            net, f"{mean['fewer']:.1f}×", f"{mean['smaller']:.1f}×", *cells[:2], f"{gap:+.2f}", *cells[2:], f"{max(r['seconds'] for r in runs):.0f}"
        )


def _han(net: str, seed: int, schedule: Schedule, changes: dict[str, float]) -> dict[str, float]:
    data, dense = load_data("mnist"), load_net(net, "mnist", seed)
    training = {**recipe(net, "mnist"), **changes}
    del training["epochs"]
    start = time.perf_counter()
    pruned, _ = prune_and_train(dense, "magnitude_pruning_han", data, schedule, knobs={"scope": "network"}, seed=seed, **training)
    seconds = time.perf_counter() - start
    control = deepcopy(dense)
    for number, stage in enumerate(schedule):
        fit(control, data, epochs=stage.epochs, seed=seed + 1000 * number, **training)
    kept = plan_of(pruned)
    total, left = (sum(f(p) for p in kept.values()) for f in (lambda p: p.mask.numel(), lambda p: p.kept))
    with tempfile.TemporaryDirectory() as folder:
        bytes_dense, bytes_pruned = save(dense, Path(folder) / "dense.cml"), save(pruned, Path(folder) / "pruned.cml")
    scores = {
        "pruned": evaluate(pruned, data),
        "dense": evaluate(control, data),
        "test": evaluate(pruned, data, part="test"),
        "dense_test": evaluate(control, data, part="test"),
    }
    return {"fewer": total / left, "smaller": bytes_dense / bytes_pruned, "seconds": seconds, **scores}


def zoo() -> Iterator[str]:
    """The accuracies of what ships, from the checkpoints' cards."""
    yield from heading("Trained networks that ship, three seeds, mean (lowest to highest)", "network", "data", "validation", "test", "seconds a run")
    for net, data in SHIPPED:
        cards = [card(net, data, s) for s in SEEDS]
        cells = [
            f"{100 * statistics.mean(v):.2f} % ({100 * min(v):.2f} to {100 * max(v):.2f})"
            for v in ([c[k] for c in cards] for k in ("validation_accuracy", "test_accuracy"))
        ]
        yield line(net, data, *cells, f"{statistics.median(c['seconds'] for c in cards):.0f}")


def sparse() -> Iterator[str]:
    """Where sparse products start to beat dense ones."""
    yield from heading("Sparse against dense products, 500 × 800, median", "format", "batch", "share kept", "dense, ms", "sparse, ms", "times faster")
    for format, block in (("CSR", None), ("BSR, blocks of 4 × 4", 4)):
        for row in sparse_crossover(block=block).itertuples():
            yield line(format, row.batch, row.keep, f"{row.dense_ms:.3f}", f"{row.sparse_ms:.3f}", f"{row.speedup:.2f}")


def notebooks() -> Iterator[str]:
    """Seconds of each notebook through nbval, cold."""
    yield from heading("Each notebook through nbval, cold", "notebook", "seconds", "bound")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-cell-timeout=120", str(path)],
            capture_output=True,
            cwd=ROOT,
        )
        yield line(path.name, f"{time.perf_counter() - start:.0f}" + ("" if done.returncode == 0 else " FAILED"), "60")
