"""Chapter 03: towards twice the speed, two sets of widths beside the dense control; runs are kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..core.apply import weighted
from ..core.bake import bake
from ..core.inputs import as_input
from ..lab import runs
from ..lab.cost import multiply_adds
from ..lab.data import load_data
from ..lab.measure import latency
from ..lab.ratios import compress_each
from ..lab.seeds import difference
from ..lab.train import evaluate, fit
from ..lab.zoo import RECIPES, SEEDS, load_net, recipe
from .structures import DATA, NET, PARTS, before, trained
from .tables import heading, line

METHOD = "taylor_pruning"
EPOCHS = 12  # of training after pruning, for the dense network too
LONGER = 36  # whether patience closes the gap
LAYERS = ("conv", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block3.conv1")
HALF = f"{METHOD}, half"
WIDTHS = {METHOD: (8, 16, 16, 48, 64, 48), HALF: (8, 16, 16, 32, 32, 32)}  # filters that stay, layer by layer
DENSE = "the dense net"
TIMES, POINTS = 2.0, 0.5  # what is asked for


def twice() -> Iterator[str]:
    """Accuracy and speed, three seeds; then the accuracy after a longer training of both."""
    found = {name: [run(name, seed) for seed in SEEDS] for name in (*WIDTHS, DENSE)}
    yield from accuracies(found, EPOCHS)
    dense = statistics.mean(r["validation"] for r in found[DENSE])
    yield from speeds([name for name, results in found.items() if dense - statistics.mean(r["validation"] for r in results) <= POINTS / 100])
    yield from accuracies({name: [run(name, seed, LONGER) for seed in SEEDS] for name in (HALF, DENSE)}, LONGER)


def accuracies(found: dict[str, list[dict[str, Any]]], epochs: int) -> Iterator[str]:
    """What each network became, beside the dense one after as many epochs."""
    yield from heading(
        f"Residual net on Fashion-MNIST towards twice the speed, {epochs} more epochs (in all {epochs + RECIPES[NET]['epochs']}), "
        "three seeds, mean ± standard deviation (of a difference: half of its 95 % interval)",
        "network", "filters", "multiply-adds left", "parameters left", "validation", "to dense, points", "test", "to dense, points",
    )  # fmt: skip
    for name, results in found.items():
        left = [f"{statistics.mean(r[k] for r in results):.1%}" for k in ("multiply_adds", "parameters")]
        cells = ["/".join(map(str, filters(name).values())), *left]
        for part in PARTS:
            scores, dense = ([100 * r[part] for r in of] for of in (results, found[DENSE]))
            lost, half = difference(scores, dense)
            cells += [f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} %", "" if name == DENSE else f"{lost:+.2f} ± {half:.2f}"]
        yield line(name, *cells)
    yield f"\n{trained(runs.of([given(name, seed, epochs) for name in found for seed in SEEDS]))}"


def speeds(close: list[str]) -> Iterator[str]:
    """How many times faster than the dense net, on this machine and on those that measured it before; ``close`` lost few enough points."""
    for name in (*WIDTHS, DENSE):
        runs.stored(timing(name, runs.machine()), partial(_speeds, name))
    table = runs.table("twice_speed")
    yield from heading("The same networks: times faster than the dense net, three measurements in turns with it, median (lowest to highest)",
                       "network", "machine", "batch 64", "batch 1", "first layer alone, batch 64")  # fmt: skip
    for row in table.sort_values(["machine", "network"]).itertuples():
        yield line(row.network, row.machine, *map(_middle, (row.batch_64, row.batch_1, row.first_layer)))
    twice_as_fast = table[[statistics.median(s) >= TIMES for s in table.batch_64]]
    both = twice_as_fast[twice_as_fast.network.isin(close)]
    yield f"\nAsked: {TIMES} times as fast at batch 64 with at most {POINTS} points lost on validation. Both at once:\n"
    for where in sorted(set(table.machine)):
        yield f"- {where}: {', '.join(both.network[both.machine == where]) or 'reached by none'}"


def timing(name: str, machine: str) -> dict[str, Any]:
    """What a measured speed depends on."""
    return {"kind": "twice_speed", "network": name, "filters": filters(name), "net": NET, "data": DATA, "machine": machine}


def _speeds(name: str) -> dict[str, Any]:
    model, dense = small(name, 0), load_net(NET, DATA)
    return {"batch_64": faster(model, dense, 64), "batch_1": faster(model, dense, 1), "first_layer": faster(model.conv, dense.conv, 64)}


def _middle(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"


def run(name: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """One network made, trained and judged; read if it was done before."""
    return runs.stored(given(name, seed, epochs), partial(_run, name, seed, epochs))


def given(name: str, seed: int, epochs: int = EPOCHS) -> dict[str, Any]:
    """What a run's result depends on."""
    widths = {} if name == DENSE else {"widths": filters(name), "method": METHOD}
    return {"kind": "twice", "network": name, "net": NET, "data": DATA, "seed": seed, "epochs": epochs, **widths, **before(NET, DATA, seed)}


def filters(name: str) -> dict[str, int]:
    """How many filters a network has in each layer, or group of layers, by the name of its first."""
    layers = weighted(load_net(NET, DATA))
    return dict(zip(LAYERS, WIDTHS.get(name) or (len(layers[n].weight) for n in LAYERS), strict=True))


def _run(name: str, seed: int, epochs: int) -> dict[str, Any]:
    data, model = load_data(DATA), small(name, seed)
    untrained_yet = evaluate(model, data)
    fit(model, data, **{**recipe(NET, DATA), "epochs": epochs}, seed=seed)
    return {"before": untrained_yet, **{part: evaluate(model, data, part=part) for part in PARTS}, **_left(model, seed)}


def _left(model: nn.Module, seed: int) -> dict[str, float]:
    dense = load_net(NET, DATA, seed)
    one = as_input(load_data(DATA).validation[0][:1], dense)
    counts = [(multiply_adds(m, one), sum(p.numel() for p in m.parameters())) for m in (model, dense)]
    return dict(zip(("multiply_adds", "parameters"), (a / b for a, b in zip(*counts, strict=True)), strict=True))


def small(name: str, seed: int) -> nn.Module:
    """The network that ``name`` makes of the trained one, before it is trained further."""
    dense, data = load_net(NET, DATA, seed), load_data(DATA)
    whole = filters(DENSE)
    keeps = {n: w / whole[n] for n, w in filters(name).items() if w < whole[n]}
    return dense if name == DENSE else bake(compress_each(dense, METHOD, keeps, data=data), data)


def faster(model: nn.Module, dense: nn.Module, batch: int) -> list[float]:
    """How many times faster than the dense one, three measurements in turns with it, two threads."""
    x = as_input(load_data(DATA).validation[0][:batch], dense).contiguous(memory_format=torch.channels_last)
    return [float(latency({"dense": dense, "small": model}, x, rounds=60).loc["small", "ratio"]) for _ in range(3)]
