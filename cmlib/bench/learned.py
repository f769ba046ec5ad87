"""Chapters 02 and 03: what the panel's retrain button makes of each method that learns its mask, LeNet-5 on MNIST; runs are kept.

``explore`` shows them beside the path. The knobs were tried by hand, on validation images, until so little training showed what a method does.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from ..core.apply import plan_of, weighted
from ..core.inputs import sample
from ..lab import runs
from ..lab.data import load_data
from ..lab.train import evaluate, fit
from ..lab.verbs import compress
from ..lab.zoo import RECIPES, card, load_net
from .curves import DATA, DENSE, NET
from .structures import PARTS, trained
from .tables import heading, line

KNOBS: dict[str, dict[str, Any]] = {
    DENSE: {},
    "l1_weight_regularization": {"lam": 0.6}, "dynamic_network_surgery": {"c": 1.0}, "sparse_variational_dropout": {"threshold": 3.0},
    "l0_hard_concrete": {"lam": 0.3, "start": 0.6}, "variational_dropout_lrt": {"keep": 0.5}, "learning_compression": {"keep": 0.3},
    "frequency_domain_pruning": {"keep": 0.2}, "energy_constrained_projection": {"budget": 0.3}, "structured_sparsity_learning": {"lambda_g": 2.0},
    "soft_filter_pruning": {"keep": 0.7}, "admm_weight_pruning": {"keep": 0.1}, "learning_number_of_neurons": {"lam": 0.3},
    "less_is_more_compact_cnn": {"lam": 2.5}, "structured_probabilistic_pruning": {"keep": 0.5, "every": 10},
    "sparse_structure_selection": {"gamma": 0.8}, "vibnet": {"gamma": 0.002, "sigma": 0.6}, "l1_mask_structured_pruning": {"lam": 0.1},
    "global_dynamic_pruning": {"keep": 0.6}, "sensitivity_driven_regularization": {"lam": 0.05},
}  # fmt: skip
IMAGES = {"sensitivity_driven_regularization": 3_000}  # a gradient an output and step: of all images an epoch takes some twenty minutes
EPOCHS = {"l0_hard_concrete": 10, "l1_mask_structured_pruning": 3}  # one for all others


def learned() -> Iterator[str]:
    """Weights left, bytes and accuracy of every method at its knobs, and of the dense network trained alike; one seed."""
    yield from heading(
        "LeNet-5 on MNIST, masks learned as the panel's retrain button has them learned; one seed, knobs tried by hand on the validation part",
        "method", "knobs", "epochs", "weights left, untrained", "trained", "bytes of the weights", "validation, untrained", "trained", "test",
        "seconds",
    )  # fmt: skip
    for key in KNOBS:
        run(key)
    found = runs.of([given(key) for key in KNOBS])
    for r in found.itertuples():
        scores = [f"{100 * score:.2f} %" for score in (r.before, r.validation, r.test)]
        knobs = ", ".join(f"{name}={value}" for name, value in r.knobs.items())
        left = [f"{share:.1%}" for share in (r.started, r.left)]
        epochs = f"{r.epochs} of {IMAGES[r.method]:,} images" if r.method in IMAGES else str(r.epochs)
        yield line(f"`{r.method}`", knobs, epochs, *left, f"{r.bytes:,}", *scores, f"{r.seconds:.0f}")
    yield f"\n{trained(found)}"


def run(key: str) -> dict[str, Any]:
    """One method trained; read if it was done before."""
    return runs.stored(given(key), partial(_run, given(key)))


def given(key: str) -> dict[str, Any]:
    """What a run's result depends on."""
    training = {"epochs": EPOCHS.get(key, 1), **{name: RECIPES[NET][name] for name in ("lr", "batch")}}
    here = {"kind": "learned", "method": key, "network": NET, "data": DATA, "seed": 0, "training": training, "epochs": training["epochs"]}
    here |= {"images": IMAGES[key]} if key in IMAGES else {}
    return {**here, "knobs": KNOBS[key], "checkpoint": card(NET, DATA)["sha256"][:12]}


def _run(how: dict[str, Any]) -> dict[str, Any]:
    data, dense = load_data(DATA), load_net(NET, DATA)
    model = deepcopy(dense) if how["method"] == DENSE else compress(dense, how["method"], data=data, **how["knobs"])
    before, started = evaluate(model, data), _left(model)
    fit(model, replace(data, train=sample(data, how["images"])) if "images" in how else data, **how["training"], keep_best=False)
    plan = plan_of(model)
    size = sum(plan[name].bits() // 8 if name in plan else layer.weight.nbytes for name, layer in weighted(model).items())
    return {"before": before, "started": started, "left": _left(model), "bytes": size, **{part: evaluate(model, data, part=part) for part in PARTS}}


def _left(model: Any) -> float:
    plan = plan_of(model).values()
    return sum(p.kept for p in plan) / sum(p.values.numel() for p in plan) if plan else 1.0
