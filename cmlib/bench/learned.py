"""Chapters 02 and 03: what the panel's retrain button makes of each method that learns its mask, LeNet-5 on MNIST; runs are kept.

``explore`` shows them beside the path. The knobs are those at which so little training shows what the method does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..core.apply import plan_of
from ..lab import runs
from ..lab.data import load_data
from ..lab.train import evaluate, fit
from ..lab.verbs import compress
from ..lab.zoo import RECIPES, card, load_net
from .atlas import held
from .structures import PARTS, trained
from .tables import heading, line

NET, DATA = "lenet5", "mnist"
SETTINGS: dict[str, dict[str, Any]] = {
    "l1_weight_regularization": {"lam": 0.6}, "dynamic_network_surgery": {"c": 1.0}, "sparse_variational_dropout": {"threshold": 3.0},
    "variational_dropout_lrt": {"keep": 0.5}, "learning_compression": {"keep": 0.1}, "frequency_domain_pruning": {"keep": 0.2},
    "energy_constrained_projection": {"budget": 0.3}, "structured_sparsity_learning": {"lambda_g": 2.0}, "soft_filter_pruning": {"keep": 0.7},
    "admm_weight_pruning": {"keep": 0.1}, "learning_number_of_neurons": {"lam": 0.3}, "less_is_more_compact_cnn": {"lam": 2.0},
    "structured_probabilistic_pruning": {"keep": 0.5, "every": 10}, "sparse_structure_selection": {"gamma": 0.8},
    "l0_hard_concrete": {"lam": 1.0, "start": 0.35, "epochs": 3}, "l1_mask_structured_pruning": {"lam": 0.1, "epochs": 3},
    "vibnet": {"gamma": 0.002, "sigma": 0.6}, "global_dynamic_pruning": {"keep": 0.6}, "sensitivity_driven_regularization": {"lam": 0.05},
}  # fmt: skip


def learned() -> Iterator[str]:
    """Weights left, bytes and accuracy of every method at its knobs, one seed."""
    yield from heading(
        "LeNet-5 on MNIST, masks learned as the panel's retrain button has them learned; one seed",
        "method", "knobs", "epochs", "weights left, untrained", "trained", "bytes of the weights", "validation, untrained", "trained", "test",
        "seconds",
    )  # fmt: skip
    for key in SETTINGS:
        runs.stored(given(key), partial(_run, given(key)))
    found = runs.of([given(key) for key in SETTINGS])
    for r in found.itertuples():
        scores = [f"{100 * score:.2f} %" for score in (r.before, r.validation, r.test)]
        knobs = ", ".join(f"{name}={value}" for name, value in r.knobs.items())
        left = [f"{share:.1%}" for share in (r.started, r.left)]
        yield line(f"`{r.method}`", knobs, str(r.epochs), *left, f"{r.bytes:,}", *scores, f"{r.seconds:.0f}")
    yield f"\n{trained(found)}"


def given(key: str, seed: int = 0) -> dict[str, Any]:
    """What a run's result depends on."""
    knobs, training = dict(SETTINGS[key]), {name: RECIPES[NET][name] for name in ("lr", "batch")}
    here = {"kind": "learned", "method": key, "network": NET, "data": DATA, "seed": seed, "epochs": knobs.pop("epochs", 1), **training}
    return {**here, "knobs": knobs, "checkpoint": card(NET, DATA, seed)["sha256"][:12]}


def _run(how: dict[str, Any]) -> dict[str, Any]:
    data = load_data(DATA)
    model = compress(load_net(NET, DATA, how["seed"]), how["method"], data=data, **how["knobs"])
    before, started = evaluate(model, data), _left(model)
    fit(model, data, epochs=how["epochs"], lr=how["lr"], batch=how["batch"], keep_best=False)
    scores = {part: evaluate(model, data, part=part) for part in PARTS}
    return {"before": before, "started": started, "left": _left(model), "bytes": held(model), **scores}


def _left(model: Any) -> float:
    plan = plan_of(model).values()
    return sum(p.kept for p in plan) / sum(p.values.numel() for p in plan)
