"""What a network costs: parameters, multiply-adds, memory traffic and energy counted; time and the machine's roof measured.

A multiply-add is one product and the addition that takes it up: one operation here, two FLOPs for those who count both.
Bytes count each number once: a layer reads its weights and its input and writes its output. Real traffic is never less,
and is more where the caches are too small. Counting works on the meta device too, where tensors have shapes and no data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .train import evaluating

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)

# Energy of one operation or access in picojoules, 45 nm at 0.9 V: M. Horowitz, "Computing's energy problem (and what we can
# do about it)", ISSCC 2014, figure 1.1.9. He gives memory per 64 bits (8 KB cache 10 pJ, DRAM 1.3 to 2.6 nJ); per 32 bits, with
# DRAM at its lower end, as in Han et al. 2015, "Learning both weights and connections", table 1. Published, not measured here.
ENERGY_PJ = {
    "int8 add": 0.03, "int8 mult": 0.2, "int32 add": 0.1, "int32 mult": 3.1,
    "fp16 add": 0.4, "fp16 mult": 1.1, "fp32 add": 0.9, "fp32 mult": 3.7,
    "SRAM": 5.0, "DRAM": 640.0,
}  # fmt: skip

# number format -> (bits, the product, the sum that takes it up)
FORMATS = {"fp32": (32, "fp32 mult", "fp32 add"), "fp16": (16, "fp16 mult", "fp16 add"), "int8": (8, "int8 mult", "int32 add")}


def multiply_adds(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one forward pass by torch's own counter, which sees every matrix product and convolution and counts 2 each."""
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2


def layer_costs(model: nn.Module, example: Tensor) -> pd.DataFrame:
    """One row a convolution or dense layer, in the order of execution, for one forward pass of ``example`` (a batch).

    Columns: layer, kind, output (shape), parameters (weight and bias; 0 where a weight was counted in a row before),
    multiply_adds, weight_bytes, in_bytes, out_bytes, intensity (FLOPs a byte: 2 multiply_adds over the three byte columns).
    Layers are found by forward hooks: what a model computes without a layer object has no row (``multiply_adds`` counts it).
    """
    rows: list[dict] = []
    counted: set[int] = set()

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        weight, new = layer.weight, [p for p in layer.parameters() if id(p) not in counted]
        counted.update(map(id, new))
        each = x if getattr(layer, "transposed", False) else y  # a transposed one spreads every input over a window
        row = {
            "layer": name, "kind": _kind(layer), "output": tuple(y.shape), "parameters": sum(p.numel() for p in new),
            "multiply_adds": each.numel() * weight[0].numel(),
            "weight_bytes": _bytes(weight) + (_bytes(layer.bias) if layer.bias is not None else 0),
            "in_bytes": _bytes(x), "out_bytes": _bytes(y),
        }  # fmt: skip
        traffic = row["weight_bytes"] + row["in_bytes"] + row["out_bytes"]
        rows.append(row | {"intensity": 2 * row["multiply_adds"] / traffic})

    _watch(model, example, note)
    return pd.DataFrame(rows)


def _watch(model: nn.Module, example: Tensor, note: Callable[[str, nn.Module, Tensor, Tensor], None]) -> None:
    """One forward pass in which ``note(name, layer, input, output)`` is told of each convolution and dense layer."""
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    handles = [m.register_forward_hook(lambda m, x, y, name=name: note(name, m, x[0], y)) for name, m in named]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "dense"
    if layer.groups == 1:
        return "conv"
    return "depthwise" if layer.groups == layer.in_channels else "grouped"


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def energy(costs: pd.DataFrame, number: str = "fp32", weights: str = "DRAM", activations: str = "SRAM") -> pd.DataFrame:
    """Microjoules a layer by the published constants: columns layer, arithmetic, weights, activations.

    ``costs`` is ``layer_costs`` of a float32 model; ``number`` (fp32, fp16, int8) sets both the price of a multiply-add and the
    bits moved; ``weights`` and ``activations`` name the memory (DRAM, SRAM) that each is fetched from, once a forward pass.
    """
    bits, product, total = FORMATS[number]
    words = bits / 32 / 4  # 32-bit words moved for each byte of float32
    micro = 1e-6  # picojoules to microjoules
    moved = costs["in_bytes"] + costs["out_bytes"]
    return pd.DataFrame({
        "layer": costs["layer"],
        "arithmetic": costs["multiply_adds"] * (ENERGY_PJ[product] + ENERGY_PJ[total]) * micro,
        "weights": costs["weight_bytes"] * words * ENERGY_PJ[weights] * micro,
        "activations": moved * words * ENERGY_PJ[activations] * micro,
    })  # fmt: skip


def milliseconds(*calls: Callable[[], object], repeats: int = 50, warmup: int = 3, seconds: float = 1.0) -> np.ndarray:
    """Times of each call, array (calls, repeats), after ``warmup`` rounds; the calls take turns, so that a slow moment of the
    machine meets them all. Fewer repeats (5 at least) where the whole would take longer than ``seconds``."""
    for _ in range(warmup):
        for call in calls:
            call()
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < repeats and (len(rounds) < 5 or time.perf_counter() - started < seconds):
        rounds.append([_once(call) for call in calls])
    return np.array(rounds).T


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3


def layer_times(model: nn.Module, example: Tensor, repeats: int = 50) -> pd.DataFrame:
    """Measured milliseconds of each convolution and dense layer alone, on the input that reaches it: layer, ms, low, high
    (median and quartiles)."""
    seen: list[tuple[str, nn.Module, Tensor]] = []
    _watch(model, example, lambda name, layer, x, y: seen.append((name, layer, x)))
    with evaluating(model):
        times = milliseconds(*(lambda layer=layer, x=x: layer(x) for _, layer, x in seen), repeats=repeats)
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
    return pd.DataFrame({"layer": [name for name, _, _ in seen], "ms": middle, "low": low, "high": high})


@dataclass(frozen=True)
class Roof:
    """A machine's limits: ``gflops`` (GFLOP/s), and GB/s from main ``memory`` and from the ``cache``."""

    gflops: float
    memory: float
    cache: float

    def attainable(self, intensity, where: str = "memory"):
        """GFLOP/s at most, at ``intensity`` FLOPs a byte, with the data in ``where`` (Williams et al. 2009, Roofline)."""
        return np.minimum(self.gflops, np.asarray(intensity) * getattr(self, where))

    def ridge(self, where: str = "memory") -> float:
        """FLOPs a byte from which on arithmetic, not ``where``, is the limit."""
        return self.gflops / getattr(self, where)


def peak(side: int = 1024, megabytes: float = 128.0, cache_megabytes: float = 1.0, repeats: int = 11) -> Roof:
    """This machine's roof in float32 with torch's current threads, each number the median of ``repeats`` after a warm-up.

    Arithmetic: a product of two ``side`` by ``side`` matrices. Bandwidths: copying a block (read plus written bytes) far larger
    than the caches, and one that stays in them.
    """
    a, b = torch.rand(side, side), torch.rand(side, side)
    product = float(np.median(milliseconds(lambda: torch.mm(a, b), repeats=repeats)))
    return Roof(2e-6 * side**3 / product, _copy(megabytes, repeats), _copy(cache_megabytes, 5 * repeats))


def _copy(megabytes: float, repeats: int) -> float:
    source = torch.rand(int(megabytes * 2**20 / 4))
    target = torch.empty_like(source)
    return 2e-6 * _bytes(source) / float(np.median(milliseconds(lambda: target.copy_(source), repeats=repeats)))
