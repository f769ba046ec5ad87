"""Deep Compression's three stages from what is there: prune, share values, code. File against file, three seeds; runs are kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

from ..core.apply import plan_of, with_plain_weights
from ..core.schedule import Stage
from ..lab import runs
from ..lab.data import load_data
from ..lab.files import length
from ..lab.train import evaluate, fit, prune_and_train
from ..lab.verbs import coded, compress
from ..lab.zoo import SEEDS, load_net, recipe
from .structures import PARTS, before, trained
from .tables import heading, line

DATA = "mnist"
RECIPE = {
    "lenet300": {"lr": 3e-3, "weight_decay": 0.1, "scope": "network", "schedule": [[0.3, 2], [0.15, 3], [0.08, 4], [0.05, 12]], "k": 16, "tuned": 2},
    "lenet5": {"lr": 3e-3, "weight_decay": 0.1, "scope": "network", "schedule": [[0.3, 1], [0.1, 2], [0.05, 3], [0.03, 8]], "k": 16, "tuned": 2},
}  # fmt: skip
ASKED = {"lenet300": (40, 0.0160), "lenet5": (39, 0.0080)}  # times smaller, test error (Han, Mao & Dally 2016, table 1: 40x at 1.58 %, 39x at 0.74 %)
STAGES = ("pruned", "shared values", "Huffman", "ANS")


def deep() -> Iterator[str]:
    """LeNet-300-100 and LeNet-5 pruned, quantized and coded."""
    yield from heading(
        "Deep Compression on MNIST (prune, k-means codebook of 16 values, entropy code), three seeds: files against the dense network's file",
        "network", "weights left", "pruned", "shared values", "and Huffman", "and ANS", "validation error", "test error", "asked", "seconds a run",
    )  # fmt: skip
    for net, (times, error) in ASKED.items():
        found = [run(net, seed) for seed in SEEDS]
        made = runs.of([given(net, seed) for seed in SEEDS])
        sizes = [f"{statistics.mean(r['dense'] / r[stage] for r in found):.1f}× ({statistics.mean(r[stage] for r in found) / 1e3:.1f} kB)"
                 for stage in STAGES]  # fmt: skip
        errors = ["{:.2f} ± {:.2f} %".format(*(100 * f(1 - r[part] for r in found) for f in (statistics.mean, statistics.stdev))) for part in PARTS]
        left = statistics.mean(r["left"] for r in found)
        yield line(net, f"{left:.1%}", *sizes, *errors, f"{times}× at {100 * error:.2f} %", f"{made.seconds.max():.0f}")
    yield f"\n{trained(made)}"


def run(net: str, seed: int) -> dict[str, Any]:
    return runs.stored(given(net, seed), partial(_run, net, seed))


def given(net: str, seed: int) -> dict[str, Any]:
    return {"kind": "deep", "network": net, "seed": seed, **RECIPE[net], **before(net, DATA, seed)}


def _run(net: str, seed: int) -> dict[str, Any]:
    asked, data, dense = RECIPE[net], load_data(DATA), load_net(net, DATA, seed)
    training = {**recipe(net, DATA), "lr": asked["lr"], "weight_decay": asked["weight_decay"]}
    del training["epochs"]
    schedule, knobs = tuple(Stage(*s) for s in asked["schedule"]), {"scope": asked["scope"]}
    pruned, _ = prune_and_train(dense, "magnitude_pruning_han", data, schedule, knobs=knobs, seed=seed, **training)
    shared = compress(pruned, "vq_gong", k=asked["k"])
    fit(shared, data, epochs=asked["tuned"], lr=1e-3, augment=training["augment"], seed=seed)
    plans = dict(zip(STAGES, (plan_of(m) for m in (pruned, shared, coded(shared), coded(shared, "ans"))), strict=True))
    sizes = {name: length(with_plain_weights(shared), plan) for name, plan in plans.items()}
    weights = [p for p in plans["pruned"].values()]
    left = sum(p.kept for p in weights) / sum(p.mask.numel() for p in weights)
    accuracy = {part: evaluate(shared, data, part=part) for part in PARTS}
    return {**sizes, "dense": length(dense, {}), "left": left, "before": evaluate(pruned, data), **accuracy}
