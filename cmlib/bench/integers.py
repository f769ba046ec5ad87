"""Chapter 04: integers that run. int8 by ONNX Runtime and by the kit's own whole numbers beside float32; products of signs by population count."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.bitwise import pack_signs, xnor_conv2d, xnor_linear
from ..core.inputs import as_input
from ..lab.cost import milliseconds
from ..lab.data import Data, load_data
from ..lab.engines import Engine, to_int8, to_onnx
from ..lab.integer import IntegerNet, integer_network
from ..lab.measure import threads_at
from ..lab.ranges import PER
from ..lab.train import evaluate
from ..lab.zoo import SEEDS, checkpoint, load_net
from .tables import heading, line

NETS = (("lenet5", "mnist"), ("resnet", "fashion_mnist"))
BATCHES = (1, 64)
ROUNDS = 100
THREADS = 1  # with more, the waiting threads of one engine take the other's turn
WHOLE = "whole numbers written out, torch int32"
FLOATS = ("PyTorch, float32", "ONNX Runtime, float32")


def int8() -> Iterator[str]:
    """Bytes, accuracy and time of each network in int8, three seeds."""
    for net, name in NETS:
        runs = [_run(net, load_data(name), seed) for seed in SEEDS]
        yield from heading(
            f"{net} on {name} in int8, three seeds, mean ± standard deviation; times on one thread, median of the seeds' ratios (least to most)",
            "what runs", "bytes", "smaller than the float32 ONNX file", "validation", "difference to float32, points",
            *(f"batch {b}: {what}" for b in BATCHES for what in ("ms", f"faster than {FLOATS[0]}", f"faster than {FLOATS[1]}")),
        )  # fmt: skip
        for what in runs[0]:
            yield _line(what, runs)


def _run(net: str, data: Data, seed: int) -> dict[str, dict[str, Any]]:
    """{what runs: its bytes, accuracy and milliseconds a round at each batch} of one trained network."""
    model = load_net(net, data.name, seed)
    with tempfile.TemporaryDirectory() as folder, threads_at(THREADS):
        path = Path(folder) / "float.onnx"
        to_onnx(model, path, as_input(data.train[0][:1], model))
        models: dict[str, Any] = {FLOATS[0]: model, FLOATS[1]: Engine(path, THREADS)}
        for per in PER:
            low = Path(folder) / f"{per}.onnx"
            to_int8(path, low, data, per=per)
            models[f"ONNX Runtime, int8, a scale a {per}"] = Engine(low, THREADS)
        whole = integer_network(model, data)
        models[WHOLE] = whole
        held = {FLOATS[0]: checkpoint(net, data.name, seed).stat().st_size} | {k: m.bytes for k, m in models.items() if k != FLOATS[0]}
        right = {k: m.evaluate(data) if m is whole else evaluate(m, data) for k, m in models.items()}
        times = [_times(models.values(), whole, data.validation[0][:batch]) for batch in BATCHES]
    return {k: {"bytes": held[k], "accuracy": right[k], "ms": [t[i] for t in times]} for i, k in enumerate(models)}


def _times(models: Iterable[nn.Module], whole: IntegerNet, images: Tensor) -> np.ndarray:
    """Milliseconds (models, rounds), the models taking turns; the whole numbers take the images as they are."""
    x = as_input(images).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return milliseconds(*(partial(m, images if m is whole else x) for m in models), repeats=ROUNDS, seconds=20)


def _line(what: str, runs: list[dict[str, dict[str, Any]]]) -> str:
    mine, torch_runs, onnx_runs = ([run[k] for run in runs] for k in (what, *FLOATS))
    points = [100 * r["accuracy"] for r in mine]
    moved = [100 * (r["accuracy"] - d["accuracy"]) for r, d in zip(mine, torch_runs)]
    smaller = f"{statistics.mean(d['bytes'] / r['bytes'] for r, d in zip(mine, onnx_runs)):.2f}×"
    cells = [f"{statistics.mean(r['bytes'] for r in mine):,.0f}", smaller if what != WHOLE else "in memory; has no file"]
    cells += [
        f"{statistics.mean(points):.2f} ± {statistics.stdev(points):.2f} %",
        f"{statistics.mean(moved):+.2f} ({min(moved):+.2f} to {max(moved):+.2f})",
    ]
    for i in range(len(BATCHES)):
        cells.append(f"{statistics.median(float(np.median(r['ms'][i])) for r in mine):.3f}")
        cells += [_faster([float(np.median(d["ms"][i] / r["ms"][i])) for r, d in zip(mine, dense)]) for dense in (torch_runs, onnx_runs)]
    return line(what, *cells)


def _faster(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"


SHAPES = {  # inputs and weights
    "LeNet-5's fc1, batch 1": ((1, 800), (500, 800)),
    "LeNet-5's fc1, batch 64": ((64, 800), (500, 800)),
    "4,096 to 4,096, batch 1": ((1, 4096), (4096, 4096)),
    "4,096 to 4,096, batch 64": ((64, 4096), (4096, 4096)),
    "LeNet-5's conv2, batch 64": ((64, 20, 12, 12), (50, 20, 5, 5)),
    "64 to 64, 3 × 3 on 14 × 14, batch 16": ((16, 64, 14, 14), (64, 64, 3, 3)),
    "256 to 256, 3 × 3 on 14 × 14, batch 1": ((1, 256, 14, 14), (256, 256, 3, 3)),
}


def xnor() -> Iterator[str]:
    """Products of signs by xor and population count, in numpy, beside torch's float32 product, checked to be equal."""
    yield from heading(
        "Products of signs by population count (numpy, inputs packed on the way, weights before) beside torch's float32, one thread, valid positions",
        "what", "float32, ms", "packed signs, ms", "faster", "bytes of the weights", "equal",
    )  # fmt: skip
    for what, (of_x, of_w) in SHAPES.items():
        draw = torch.Generator().manual_seed(0)
        x, w = torch.randn(of_x, generator=draw), torch.randn(of_w, generator=draw)
        packed, dense, signs = pack_signs(w), *((F.conv2d, xnor_conv2d) if w.dim() == 4 else (F.linear, xnor_linear))
        with threads_at(THREADS), torch.inference_mode():
            same = torch.equal(dense(x.sign().double(), w.sign().double()), signs(x, packed).double())
            times = milliseconds(partial(dense, x, w), partial(signs, x, packed), repeats=ROUNDS, seconds=5)
        low, middle, high = np.quantile(times[0] / times[1], (0.25, 0.5, 0.75))
        float_ms, packed_ms = np.median(times, axis=1)
        held = f"{w.nbytes:,} to {packed.words.nbytes:,}"
        yield line(what, f"{float_ms:.3f}", f"{packed_ms:.3f}", f"{middle:.2f}× ({low:.2f} to {high:.2f})", held, "yes" if same else "NO")
