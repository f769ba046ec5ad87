"""Chapters 02 and 03: LeNet-5 on MNIST pruned by every method of their first modules, all with the same little training.

Runs are kept, one a method and seed.

A method that gives scores prunes once and trains (three seeds). One that learns its mask learns for the first half of the epochs and trains what it
left for the second (one seed: its steps cost up to four times as much).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..core.apply import attach_plan, plan_of, weighted, with_plain_weights
from ..core.bake import bake
from ..core.inputs import sample
from ..core.method import Method, call
from ..core.planner import Planner
from ..lab import runs
from ..lab.data import load_data
from ..lab.train import evaluate, fit
from ..lab.verbs import plan
from ..lab.zoo import SEEDS, card, load_net, recipe
from ..methods import find, prune, structures
from ..view.plots import published
from .structures import trained
from .tables import heading, line, percent

NET, DATA, DENSE = "lenet5", "mnist", "the dense net"
SHARES = (0.25, 0.08, 0.03, 0.01)
IMAGES, EPOCHS = 8_000, 2
TRAINING = {"batch": 32, "lr": 4e-3, "weight_decay": 0.0}
SGD = partial(torch.optim.SGD, momentum=0.9)  # what the proximal steps are made for
LEARNING: dict[str, dict[str, Any]] = {  # where a method learns by other settings than it is trained by afterwards
    "l1_weight_regularization": {"optimizer": SGD, "lr": 0.02}, "structured_sparsity_learning": {"optimizer": SGD, "lr": 0.02},
    "l0_hard_concrete": {"lr": 0.01},
}  # fmt: skip
POINTS: dict[str, list[dict[str, Any]]] = {  # knobs in place of a share, for methods that cannot be told one
    "l1_weight_regularization": [{"lam": v} for v in (0.01, 0.02, 0.05, 0.08)],
    "dynamic_network_surgery": [{"c": v} for v in (0.5, 1.0, 2.0, 4.0)],
    "sparse_variational_dropout": [{"threshold": v, "log_sigma2": -5.0} for v in (3.0, 1.5, 0.0, -1.0)],
    "l0_hard_concrete": [{"lam": v, "start": 0.5} for v in (0.5, 1.0, 3.0, 10.0)],
    "structured_sparsity_learning": [{"lambda_g": v} for v in (0.3, 0.5, 0.75, 1.0)],
}


def curves() -> Iterator[str]:
    """Validation error at four places of each method's curve."""
    layers, refusals = reach()
    for key in (DENSE, *layers):
        for seed in seeds(key):
            run(key, seed)
    yield from heading(
        f"LeNet-5 on MNIST by the methods of prune and structures: how many times fewer weights, and validation error after {EPOCHS} epochs of "
        f"{IMAGES:,} images; mean ± standard deviation of three seeds, one seed where the mask is learned",
        "method", "layers", *(f"point {i}" for i in range(1, len(SHARES) + 1)),
    )  # fmt: skip
    for key, lines in table().groupby("key", sort=False):
        cells = [f"{ratio:.1f}×: {percent(1 - point.accuracy)}" for ratio, point in lines.groupby("ratio")]
        yield line(key, ", ".join(layers.get(key, ())), *cells, *[""] * (len(SHARES) - len(cells)))
    for key, why in refusals.items():
        yield line(key, "none", f"not applicable: {why}", *[""] * (len(SHARES) - 1))
    yield f"\n{trained(runs.table('curves'))}"


def methods() -> list[str]:
    """The keys of the modules ``prune`` and ``structures``, in their order."""
    return [m.key for module in (prune, structures) for m in vars(module).values() if isinstance(m, Method)]


def seeds(key: str) -> tuple[int, ...]:
    """The seeds of a method's runs."""
    return SEEDS if key == DENSE or find(key).selects else SEEDS[:1]


def reach() -> tuple[dict[str, list[str]], dict[str, str]]:
    """{method: the layers that it has something to say of}, and {method: what it says itself} of those that LeNet-5 has nothing for."""
    net, data, layers, refusals = load_net(NET, DATA), load_data(DATA), {}, {}
    for key in methods():
        try:
            planner = Planner(net, find(key), data=data)
            found = [n for g in planner.structure.groups for n in g.makers] if whole_filters(find(key)) else planner.layers
            layers[key] = [n for n in planner.layers if n in found]
        except ValueError as error:
            refusals[key] = str(error)
    return layers, refusals


def table() -> pd.DataFrame:
    """The stored runs, a line a run and point: key, method (its short name), family, seed, point, ratio (fewer weights, mean over the seeds), before
    (accuracy before the last training) and accuracy, both in [0, 1] on the validation part."""
    made = runs.table("curves").set_index("method").sort_values("seed")
    made = made.loc[[key for key in (DENSE, *methods()) if key in made.index]].explode("points")
    found = pd.DataFrame(list(made.points)).assign(key=made.index, seed=list(made.seed))
    mean = found.groupby(["key", "point"]).ratio.transform("mean")
    return found.assign(method=found.key.map(short), family=found.key.map(family), ratio=mean)


def papers() -> pd.DataFrame:
    """What papers reached: method, family, ratio (fewer weights), accuracy in [0, 1] on the test part, on networks of their own, source."""
    found = published("LeNet-5")
    return found.assign(family=found.key.map(family), ratio=found.weights_ratio, accuracy=1 - found.error_pct / 100)


def short(key: str) -> str:
    """A method's abbreviation, where its title has one, or the title as far as it is a name."""
    title = key if key == DENSE else find(key).title
    return title.rpartition("(")[2].rstrip(")") if title.endswith(")") else title.partition(" with ")[0]


def family(key: str) -> str:
    """Who judges what, in the picture's words; the dense net has none."""
    if key == DENSE:
        return ""
    if find(key).learns:
        return "Masks learned while training"
    return "Scores of whole filters" if whole_filters(find(key)) else "Scores of single weights"


def given(key: str, seed: int) -> dict[str, Any]:
    """What a run's result depends on."""
    here = {"kind": "curves", "method": key, "seed": seed, "net": NET, "data": DATA, "checkpoint": card(NET, DATA, seed)["sha256"][:12]}
    learning = {k: v if k != "optimizer" else "SGD, momentum 0.9" for k, v in LEARNING.get(key, {}).items()}
    return {**here, "images": IMAGES, "epochs": EPOCHS, "training": TRAINING, "learning": learning, "knobs": knobs_of(key, seed)}


def knobs_of(key: str, seed: int) -> list[dict[str, Any]]:
    """The knobs of each place; ``keep`` stands for the share of all weights."""
    more = {"random_pruning": {"seed": seed}, "admm_weight_pruning": {"every": 20}, DENSE: {}}
    shares = (1.0,) if key == DENSE else SHARES
    return POINTS.get(key, [{"keep": share, **more.get(key, {})} for share in shares])


def run(key: str, seed: int) -> dict[str, Any]:
    """One method's curve with one seed; read if it was done before."""
    return runs.stored(given(key, seed), partial(_run, key, seed))


def _run(key: str, seed: int) -> dict[str, Any]:
    data, dense = load_data(DATA), load_net(NET, DATA, seed)
    return {"points": [{"point": i, **_place(key, seed, knobs, dense, data)} for i, knobs in enumerate(knobs_of(key, seed))]}


def _place(key: str, seed: int, knobs: dict[str, Any], dense: nn.Module, data: Any) -> dict[str, float]:
    part = replace(data, train=sample(data, IMAGES))
    how = {**recipe(NET, DATA), **TRAINING, "epochs": EPOCHS}
    model = deepcopy(dense) if key == DENSE else pruned(dense, find(key), knobs, data)
    if key != DENSE and find(key).learns:
        how["epochs"] //= 2
        model = learned(model, part, seed=seed, **{**how, **LEARNING.get(key, {})})
    before = evaluate(model, data)
    after = fit(model, part, **how, seed=seed + 1000).best_accuracy
    return {"ratio": weights(dense) / weights(model), "before": before, "accuracy": after}


def learned(model: nn.Module, data: Any, **how: Any) -> nn.Module:
    """A copy of what is left once the attached methods have learned their masks, which stay; ``how`` goes to ``fit``."""
    fit(model, data, keep_best=False, **how)
    return attach_plan(with_plain_weights(model), plan_of(model))


def pruned(dense: nn.Module, method: Method, knobs: dict[str, Any], data: Any) -> nn.Module:
    """A copy of ``dense`` with the method attached, as ``pruner`` does it."""
    return pruner(dense, method, data)(knobs)


def pruner(dense: nn.Module, method: Method, data: Any) -> Callable[[dict[str, Any]], nn.Module]:
    """A function of knobs that gives a copy of ``dense`` with the method attached; what the method asks for is gathered once.

    A ``keep`` among the knobs is shared out: whole filters keep its square root in every layer (weights go with their inputs too), weights in each
    layer what pruning by magnitude across the whole network leaves it.
    """
    planner = cache(partial(Planner, dense, method, data=data))

    def shared(knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        if "keep" not in knobs or whole_filters(method):
            return {"*": {**knobs, **({"keep": knobs["keep"] ** 0.5} if "keep" in knobs else {})}}
        left = plan(dense, "magnitude_pruning_han", keep=knobs["keep"], scope="network")
        return {name: {**knobs, "keep": max(packed.kept / packed.mask.numel(), 0.001)} for name, packed in left.items()}

    def made(knobs: dict[str, Any]) -> nn.Module:
        model = deepcopy(dense)
        for where, given in shared(knobs).items():
            attach_plan(model, planner(where=where)(**given), method, method.bind(given))
        return model

    return made


def whole_filters(method: Method) -> bool:
    """Whether a method removes filters whole by default."""
    if method.selects:
        return method.knobs["unit"].default == "filter"
    return method.filters is not None and call(method.filters, {}, method.bind({}))


def weights(model: nn.Module) -> int:
    """How many weights are left once filters that are gone are taken out: those that are not zero."""
    return sum(int((layer.weight != 0).sum()) for layer in weighted(bake(model)).values())
