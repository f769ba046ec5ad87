"""Chapter 03: one residual net made faster by each way of judging a filter, beside its controls, and LeNet-5 as sparse as it goes; runs are kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..core.apply import plan_of, with_plain_weights
from ..core.inputs import as_input
from ..core.schedule import Stage
from ..lab import runs
from ..lab.cost import multiply_adds
from ..lab.data import load_data
from ..lab.files import length
from ..lab.measure import latency
from ..lab.ratios import solve
from ..lab.seeds import compare
from ..lab.train import evaluate, fit, prune_and_train
from ..lab.zoo import RECIPES, SEEDS, card, load_net, recipe
from .tables import heading, line

NET, DATA = "resnet", "fashion_mnist"
SHARE = 0.25  # of the dense network's multiply-adds
EPOCHS = 6  # of training after pruning; the small net from scratch has as many as the others had in all
ALL = EPOCHS + RECIPES[NET]["epochs"]
METHODS = ("l1_norm_filter_pruning", "network_slimming", "lasso_channel_pruning", "taylor_pruning")  # one of each way of judging a filter
PARTS = ("validation", "test")
CONTROLS = ("torch-pruning, magnitude", "the same small net from scratch", "the dense net")


def structures() -> Iterator[str]:
    """Accuracy and latency at one share of the multiply-adds, three seeds."""
    for seed in SEEDS:
        for name in (*METHODS, *CONTROLS):
            run(name, seed)
    found = runs.of([given(name, seed) for seed in SEEDS for name in (*METHODS, *CONTROLS)])
    yield from heading(
        f"Residual net on Fashion-MNIST at {SHARE:.0%} of its multiply-adds, {EPOCHS} more epochs (in all {ALL} for every network), three seeds, "
        "mean ± standard deviation",
        "method", "multiply-adds left", "before training", "validation", "difference to dense, points", "test", "faster, batch 64", "faster, batch 1",
    )  # fmt: skip
    dense = found[found.method == CONTROLS[-1]].validation.mean()
    for name in (*METHODS, *CONTROLS):
        lines = found[found.method == name]
        cells = [f"{100 * lines[k].mean():.2f} ± {100 * lines[k].std():.2f} %" for k in ("before", "validation", "test")]
        times = [_faster(name, batch) for batch in (64, 1)]
        yield line(name, f"{lines.multiply_adds.mean():.1%}", *cells[:2], f"{100 * (lines.validation.mean() - dense):+.2f}", cells[2], *times)
    values = {name: lines.set_index("seed").validation for name, lines in found.groupby("method")}
    yield "\nAgainst torch-pruning's own pruner, in points of validation accuracy (± half of the 95 % interval):\n"
    yield from (f"- {compare(name, CONTROLS[0], values)}" for name in METHODS)
    yield f"\n{trained(found)} Times are of the machine named last."


def trained(found: pd.DataFrame) -> str:
    """Where and when stored runs were made."""
    return f"Trained on {'; '.join(found.machine.unique())}, {found.date.min()} to {found.date.max()}."


SPARSEST = {"network": "lenet5", "method": "magnitude_pruning_han", "scope": "network", "lr": 3e-3, "weight_decay": 0.1,
            "schedule": [[0.3, 1], [0.1, 2], [0.05, 3], [0.03, 4], [0.02, 5], [0.0142, 22]]}  # fmt: skip


def sparsest() -> Iterator[str]:
    """LeNet-5 with seventy times fewer weights, three seeds."""
    found = [sparsest_run(seed) for seed in SEEDS]
    yield from heading(
        "LeNet-5 on MNIST: at least 70× fewer weights by iterated magnitude pruning with weight decay, three seeds, mean ± standard deviation",
        "fewer weights", "validation error", "test error", "bound of test error", "file, kB", "seconds a run",
    )  # fmt: skip
    made = runs.of([_sparsest_recipe(seed) for seed in SEEDS])
    cells = ["{:.2f} ± {:.2f} %".format(*(100 * f(1 - r[part] for r in found) for f in (statistics.mean, statistics.stdev))) for part in PARTS]
    fewer, size = min(r["fewer"] for r in found), statistics.mean(r["file_bytes"] for r in found) / 1e3
    yield line(f"{fewer:.1f}×", *cells, "0.80 %", f"{size:.1f}", f"{made.seconds.max():.0f}")
    yield f"\n{trained(made)}"


def sparsest_run(seed: int) -> dict[str, Any]:
    return runs.stored(_sparsest_recipe(seed), partial(_sparsest, seed))


def _sparsest_recipe(seed: int) -> dict[str, Any]:
    return {"kind": "sparsest", **SPARSEST, "seed": seed, **before(SPARSEST["network"], "mnist", seed)}


def _sparsest(seed: int) -> dict[str, Any]:
    net, data = SPARSEST["network"], load_data("mnist")
    training = {**recipe(net, "mnist"), "lr": SPARSEST["lr"], "weight_decay": SPARSEST["weight_decay"]}
    del training["epochs"]
    schedule, knobs = tuple(Stage(*s) for s in SPARSEST["schedule"]), {"scope": SPARSEST["scope"]}
    model, _ = prune_and_train(load_net(net, "mnist", seed), SPARSEST["method"], data, schedule, knobs=knobs, seed=seed, **training)
    plan = plan_of(model)
    fewer = sum(p.mask.numel() for p in plan.values()) / sum(p.kept for p in plan.values())
    return {"fewer": fewer, "file_bytes": length(with_plain_weights(model), plan), **{part: evaluate(model, data, part=part) for part in PARTS}}


def run(name: str, seed: int) -> dict[str, Any]:
    """One network pruned, trained and judged; read if it was done before."""
    return runs.stored(given(name, seed), partial(_run, name, seed))


def given(name: str, seed: int) -> dict[str, Any]:
    """What a run's result depends on."""
    here = {"kind": "structures", "method": name, "net": NET, "data": DATA, "seed": seed, "share": SHARE, "epochs": EPOCHS, "all_epochs": ALL}
    return {**here, **before(NET, DATA, seed)}


def before(net: str, data: str, seed: int) -> dict[str, Any]:
    """The network that a run starts from, and the settings of its training."""
    return {"checkpoint": card(net, data, seed)["sha256"][:12], "training": {k: v for k, v in RECIPES[net].items() if k != "epochs"}}


def _run(name: str, seed: int) -> dict[str, Any]:
    data, model = load_data(DATA), small(name, seed)
    before = evaluate(model, data)
    fit(model, data, **{**recipe(NET, DATA), "epochs": ALL if name == CONTROLS[1] else EPOCHS}, seed=seed)
    scores = {part: evaluate(model, data, part=part) for part in PARTS}
    one = as_input(data.validation[0][:1], model)
    left = multiply_adds(model, one) / multiply_adds(load_net(NET, DATA, seed), one)
    return {"before": before, **scores, "multiply_adds": left, "parameters": sum(p.numel() for p in model.parameters())}


def small(name: str, seed: int) -> nn.Module:
    """The network that ``name`` makes of the trained one, before it is trained further."""
    dense, data = load_net(NET, DATA, seed), load_data(DATA)
    if name == CONTROLS[2]:
        return dense
    if name == CONTROLS[1]:
        return untrained(small(METHODS[0], seed), seed)
    if name == CONTROLS[0]:
        return by_torch_pruning(dense, as_input(data.validation[0][:1], dense))
    return solve(dense, name, data, target=SHARE, cost="multiply_adds").baked


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """The same architecture with fresh weights."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


def by_torch_pruning(dense: nn.Module, example: torch.Tensor) -> nn.Module:
    """torch-pruning's own magnitude pruner at its defaults, its ratio bisected to the same share of multiply-adds."""
    whole, low, high = multiply_adds(dense, example), 0.0, 0.95
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if multiply_adds(_torch_pruned(dense, example, middle), example) <= SHARE * whole else (middle, high)
    return _torch_pruned(dense, example, high)


def _torch_pruned(dense: nn.Module, example: torch.Tensor, ratio: float) -> nn.Module:
    import torch_pruning

    model = deepcopy(dense)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.BasePruner(model, example, importance, pruning_ratio=ratio, ignored_layers=[model.fc]).step()
    return model.to(memory_format=torch.channels_last)


def _faster(name: str, batch: int) -> str:
    """Median over the seeds of the dense network's time over the small one's, interleaved, two threads."""
    ratios = []
    for seed in SEEDS:
        dense = load_net(NET, DATA, seed)
        x = as_input(load_data(DATA).validation[0][:batch], dense).contiguous(memory_format=torch.channels_last)
        ratios.append(float(latency({"dense": dense, "small": small(name, seed)}, x, rounds=60).loc["small", "ratio"]))
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"
