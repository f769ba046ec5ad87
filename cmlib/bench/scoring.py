"""Chapters 02 and 03: how long it takes from a trained residual net to its first plan, evidence and scores included, beside the bounds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..core.apply import weighted
from ..core.method import Method
from ..core.planner import Planner
from ..lab.data import load_data
from ..lab.zoo import load_net
from ..methods import catalog, find
from .tables import heading, line, timed

NET, DATA = "resnet", "fashion_mnist"
SECONDS = {
    "next_acts_in": "30",
    "acts_gram": "10",
    "hess_diag": "",
    "quality": "10",
}  # by evidence; 1 s for scores from weights or one gradient batch
GREEDY = "180"


def scoring() -> Iterator[str]:
    """Seconds from the network to the first plan, method by method."""
    net, data = load_net(NET, DATA), load_data(DATA)
    total = sum(layer.weight.numel() for layer in weighted(net).values())
    title = f"Scoring the residual net ({total:,} weights) on Fashion-MNIST: from the network to its first plan, evidence of 512 images, median of 3"
    yield from heading(title, "method", "asks for", "seconds", "bound")
    for method in (m for m in catalog().values() if m.chapter in ("02", "03") and not m.no_plan):
        asks = [a for a in method.asks if a not in ("w", "training")]
        yield line(f"`{method.key}`", ", ".join(asks) or "the weight alone", *_seconds(net, method, data, asks))
    yield line("`layerwise_obs`, order = greedy", "acts_gram", f"{greedy(net, data):.0f} (once)", GREEDY)


def _seconds(net: nn.Module, method: Method, data: Any, asks: list[str]) -> tuple[str, str]:
    """The median and its bound; of a method that refuses the network, its reason."""
    try:
        found = timed(lambda: Planner(net, method, data=data)(), 3)
    except ValueError as error:
        return f"not applicable: {error}", ""
    return f"{statistics.median(found):.2f}", next((SECONDS[a] for a in asks if a in SECONDS), "1")


def greedy(net: nn.Module, data: Any) -> float:
    """Seconds of L-OBS deleting one weight after the other; a layer at a time, which changes nothing for it and shows how far it is."""
    start, layers = time.perf_counter(), list(weighted(net))
    for number, name in enumerate(layers, 1):
        print(f"\r  L-OBS, greedy: layer {number} of {len(layers)}, {time.perf_counter() - start:.0f} s  ", end="", file=sys.stderr, flush=True)
        Planner(net, find("layerwise_obs"), where=name, data=data)(order="greedy")
    print(file=sys.stderr)
    return time.perf_counter() - start
