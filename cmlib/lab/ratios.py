"""How much of each layer to keep: what a layer's filters are worth, a keep for every layer, and one total ratio shared out among the layers.

A layer here is a group of layers whose channels stand or fall together (``core.channels``); it goes by the name of its first maker. ``share`` is
always what is left over what there was, in (0, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.apply import Plan, attach_plan, substituted, with_plain_weights
from ..core.bake import bake
from ..core.channels import example_of
from ..core.inputs import pair_of, sample
from ..core.knobs import nearest
from ..core.method import Method
from ..core.packed import Masked
from ..core.planner import Planner
from ..methods import find
from . import train
from .cost import multiply_adds
from .data import Data
from .measure import latency

KEEPS = (0.9, 0.7, 0.5, 0.3, 0.1)
COSTS, RULES = ("parameters", "multiply_adds", "latency"), ("uniform", "network", "sensitivity")
STEPS = 22  # halvings where the cost is counted: finer than one filter, also where a layer loses nothing and only TIE tells its keeps apart
TIMED = 6  # halvings where it is measured; with the smallest network's and the chosen one's, eight measurements
TIE = 1e-3  # drop of accuracy that a whole layer counts as, so that of layers that lose nothing all give alike


class Layers:
    """A model's layers, each with its own planner, for plans in which every layer has a keep of its own."""

    def __init__(self, model: nn.Module, method: Method | str, data: Any = None, where: str = "*", **knobs: Any) -> None:
        self.model, self.method, self.data = model, find(method), data
        if not self.method.selects:
            raise ValueError(f"{self.method.key} makes its masks itself, so no keep can be given it; take one that scores, as magnitude_pruning_han")
        self.knobs = {"unit": "filter"} | knobs
        self.method.bind(self.knobs)
        self.whole = Planner(model, self.method, where=where, data=data)
        self.makers = self._makers()
        self._planners: dict[str, Planner] = {}

    def _makers(self) -> dict[str, list[str]]:
        """{layer: the covered layers tied to it, itself among them}, in the model's order."""
        if self.knobs["unit"] != "filter":
            return {n: [n] for n in self.whole.layers}
        return {g.first: [n for n in g.makers if n in self.whole.layers] for g in self.whole.structure.groups}

    def count(self, name: str) -> int:
        """How many filters the layer has."""
        return len(self.model.get_submodule(name).weight)

    def plan(self, keeps: dict[str, float]) -> Plan:
        """The plan in which each layer of ``keeps`` keeps its own share and all others stay dense."""
        found: Plan = {}
        for name, keep in keeps.items():
            for n, packed in self._planner(name)(**self.knobs, keep=keep).items():
                found[n] = _both(found[n], packed, self._planner(name).model.get_submodule(n).weight.detach()) if n in found else packed
        return found

    def _planner(self, name: str) -> Planner:
        if name not in self.makers:
            tied = next((first for first, makers in self.makers.items() if name in makers), None)
            mend = f"it goes with {tied}, whose keep is asked for" if tied else f"the layers are {', '.join(self.makers)}{nearest(name, self.makers)}"
            raise ValueError(f"no layer of its own to keep a share of: {name!r}; {mend}")
        if name not in self._planners:
            self._planners[name] = Planner(self.model, self.method, where=", ".join(self.makers[name]), data=self.data)
        return self._planners[name]

    def compressed(self, plan: Plan) -> nn.Module:
        """A copy of the model with the plan attached."""
        return attach_plan(deepcopy(self.model), plan, self.method, self.method.bind(self.knobs))


def _both(a: Masked, b: Masked, w: Tensor) -> Masked:
    """What two plans say of one layer of weight ``w``: what either removes is gone, what either rewrites is rewritten."""
    return replace(a, values=torch.where(b.values == w, a.values, b.values), mask=a.mask & b.mask, vectors=a.vectors or b.vectors)


def compress_each(model: nn.Module, method: Method | str, keeps: dict[str, float], data: Any = None, **knobs: Any) -> nn.Module:
    """A copy of ``model`` in which each layer of ``keeps`` {layer: share of its filters that stay} is compressed, the others dense.

    With one keep for all layers it is ``compress(model, method, unit="filter", keep=...)``. ValueError names a layer that is not there, or is tied
    to another.
    """
    layers = Layers(model, method, data, **knobs)
    return layers.compressed(layers.plan(keeps))


def sensitivity(model: nn.Module, method: Method | str, data: Data | train.Pair, *, keeps: Sequence[float] = KEEPS, where: str = "*",
                part: str = "validation", batch: int = 250, **knobs: Any) -> pd.DataFrame:  # fmt: skip
    """What each layer's filters are worth: accuracy with that layer alone pruned, not retrained (Li et al. 2017, section 3.2 and figure 2b).

    A line a layer and keep: layer, keep (asked), channels (of the layer), kept (of these), accuracy in [0, 1] on ``part``, drop (from the model as
    given; below 0 where pruning helped). ``unit="weight"`` scans weights instead (Han et al. 2015, figure 6). The model is not changed.
    """
    layers, plain = Layers(model, method, data, where, **knobs), with_plain_weights(model)
    images, labels = pair_of(data, part)
    dense = _accuracy(plain, {}, images, labels, batch)
    rows = []
    for name in layers.makers:
        for keep in keeps:
            plan = layers.plan({name: keep})
            accuracy = _accuracy(plain, substituted(plain, plan), images, labels, batch)
            kept = {"channels": layers.count(name), "kept": int(plan[name].rows.sum())}
            rows.append({"layer": name, "keep": float(keep), **kept, "accuracy": accuracy, "drop": dense - accuracy})
    return pd.DataFrame(rows)


def _accuracy(plain: nn.Module, changed: dict[str, Tensor], images: Tensor, labels: Tensor, batch: int) -> float:
    """Accuracy in [0, 1] with the parameters of ``changed`` in place of the model's own."""
    with train.evaluating(plain):
        answers = [functional_call(plain, changed, (x,)).argmax(1).cpu() for x in train.batches(images, batch, plain)]
    return (torch.cat(answers) == labels.cpu()).double().mean().item()


def tolerated(table: pd.DataFrame, drop: float) -> dict[str, float]:
    """{layer: the smallest keep at which its accuracy falls by ``drop`` at most}, read off a table of ``sensitivity`` between its lines.

    Accuracy is taken to fall as filters go (the drop at a keep is the largest at that keep or above), starting from none at keep 1.
    """
    return {name: float(np.interp(drop, *_fall(lines))) for name, lines in table.groupby("layer", sort=False)}


def _fall(lines: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """A layer's drops, strictly rising from 0, and the keeps, falling from 1, at which they are reached."""
    lines = lines[lines.keep < 1].sort_values("keep", ascending=False)
    keeps, drops = np.r_[1.0, lines.keep], np.maximum.accumulate(np.r_[0.0, lines["drop"]])
    return drops + TIE * (1 - keeps), keeps


@dataclass(frozen=True, eq=False)
class Solution:
    """A total ratio shared out: what each layer keeps, the networks that came of it, and what was reached.

    ``keeps``      {layer: share of its channels that stay}, as they really are after rounding to whole channels.
    ``compressed`` the masked copy, for retraining; ``baked`` the small network.
    ``reached``    the baked network's cost over the dense one's: counted, or for latency measured afresh once the choice was made, so that it may
                   lie above ``target``; ``low`` and ``high`` are then the quartiles of the baked network's time over the dense median.
    ``trials``     what was tried, in order: setting (1 keeps all, 0 the least), share.
    """

    keeps: dict[str, float]
    compressed: nn.Module = field(repr=False)
    baked: nn.Module = field(repr=False)
    cost: str
    target: float
    reached: float
    low: float | None = None
    high: float | None = None
    trials: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)


def solve(model: nn.Module, method: Method | str, data: Any = None, *, target: float, cost: str = "parameters", rule: str = "uniform",
          where: str = "*", table: pd.DataFrame | None = None, keeps: Sequence[float] = KEEPS, batch: int = 1, rounds: int = 30,
          threads: int = 2, **knobs: Any) -> Solution:  # fmt: skip
    """Filters pruned so that at most ``target`` of the network's ``cost`` is left, the largest such network that ``rule`` can make.

    ``cost``: parameters, multiply_adds, or latency (``rounds`` forward passes of ``batch`` images, the dense network taking turns; at most 8
    measurements, which noise and the kernels' steps make coarse). ``rule``: one keep for all layers (``uniform``), all filters competing with one
    another (``network``), or one tolerated drop of accuracy for all layers (``sensitivity``, from ``table`` or a scan of ``keeps`` on ``data``).
    ValueError where the rule cannot make the network that small, with the least that it can.
    """
    _check(target, cost, rule, knobs)
    layers = Layers(model, method, data, where, **knobs)
    make, share = _family(layers, rule, table, keeps, data), _meter(model, data, cost, batch, rounds, threads)
    trials: list[tuple[float, float]] = []
    counted: dict[tuple, float] = {}  # by the filters that stay, which a count depends on alone: late halvings come to the same ones again

    def tried(setting: float) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*would keep none")  # the search goes to the ends; what is handed out warns
            plan = make(setting)
            stay = tuple((n, *packed.rows.tolist()) for n, packed in plan.items())
            left = counted[stay] if stay in counted else share(bake(layers.compressed(plan), data))[0]
        if cost != "latency":
            counted[stay] = left
        trials.append((setting, left))
        return left

    if (least := tried(0.0)) > target:
        mend = (
            "with more images a batch the layers' arithmetic counts for more" if cost == "latency" else "cover more with where=, or scan lower keeps"
        )
        raise ValueError(f"target={target:g} is out of reach: with rule={rule!r} at least {least:.4f} of the {cost} is left; ask for more, or {mend}")
    _bisect(tried, target, TIMED if cost == "latency" else STEPS)
    plan = make(_largest(trials, target))
    compressed = layers.compressed(plan)
    small = bake(compressed, data)
    reached, low, high = share(small)
    kept = {n: plan[n].rows.double().mean().item() if n in plan else 1.0 for n in layers.makers}
    return Solution(kept, compressed, small, cost, target, reached, low, high, pd.DataFrame(trials, columns=["setting", "share"]))


def latency_scan(model: nn.Module, method: Method | str, data: Any = None, *, keeps: Sequence[float] = (1.0, *KEEPS), where: str = "*",
                 batch: int = 1, rounds: int = 30, threads: int = 2, **knobs: Any) -> pd.DataFrame:  # fmt: skip
    """Measured time of the baked network with one keep for all layers, every network taking turns with the others.

    A line a keep: keep, ms (median of a forward pass of ``batch`` images), low, high (quartiles), multiply_adds (share of the dense network's).
    """
    layers, share = Layers(model, method, data, where, **knobs), _meter(model, data, "multiply_adds")
    small = {k: bake(layers.compressed(layers.plan(_at_least_one(layers, dict.fromkeys(layers.makers, k)))), data) for k in keeps}
    times = latency(small, _images(model, data, batch), rounds, threads)[["ms", "low", "high"]]
    return times.rename_axis("keep").reset_index().assign(multiply_adds=[share(m)[0] for m in small.values()])


def _check(target: float, cost: str, rule: str, knobs: dict[str, Any]) -> None:
    if not 0 < target <= 1:
        raise ValueError(f"target={target!r} is not allowed: it is the share of the cost that is left, above 0 and at most 1")
    for name, value, allowed in (("cost", cost, COSTS), ("rule", rule, RULES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not allowed: {name} is one of {', '.join(allowed)}{nearest(value, allowed)}")
    if own := [k for k in ("keep", "threshold", "unit", "scope") if k in knobs]:
        raise ValueError(f"{own[0]}={knobs[own[0]]!r} cannot be given: solve finds how many filters stay; say target=, cost= and rule= instead")


def _family(layers: Layers, rule: str, table: pd.DataFrame | None, keeps: Sequence[float], data: Any) -> Callable[[float], Plan]:
    """Plans by a setting from 0 (the least) to 1 (all stays), each one's filters among those of every higher setting."""
    if rule == "network":
        return lambda setting: layers.whole(**layers.knobs, scope="network", keep=max(setting, 0.001))
    if rule == "uniform":
        return lambda setting: layers.plan(_at_least_one(layers, dict.fromkeys(layers.makers, setting)))
    if table is None and data is None:
        raise ValueError("rule='sensitivity' needs data=load_data(...) to scan the layers with, or table=sensitivity(...)")
    if table is None:
        table = sensitivity(layers.model, layers.method, data, keeps=keeps, where=", ".join(layers.whole.layers), **layers.knobs)
    if missing := [n for n in layers.makers if n not in set(table.layer)]:
        raise ValueError(f"table has no line for {missing[0]}; its layers are {', '.join(table.layer.unique())}: scan with the same where=")
    worst = max(_fall(lines)[0][-1] for _, lines in table.groupby("layer"))
    return lambda setting: layers.plan(
        _at_least_one(layers, {n: k for n, k in tolerated(table, (1 - setting) * worst).items() if n in layers.makers})
    )


def _at_least_one(layers: Layers, keeps: dict[str, float]) -> dict[str, float]:
    return {n: max(keep, 1 / layers.count(n), 0.001) for n, keep in keeps.items()}


def _meter(model: nn.Module, data: Any, cost: str, batch: int = 1, rounds: int = 30, threads: int = 2) -> Callable[[nn.Module], tuple]:
    """What tells (share of the dense network's cost, its lower and upper quartile where it is measured) of a small network."""
    dense = bake(model, data)
    if cost == "latency":
        x = _images(model, data, batch)
        return lambda small: _timed(latency({"dense": dense, "small": small}, x, rounds, threads))
    example = example_of(model, data)
    count = parameters if cost == "parameters" else lambda m: multiply_adds(m, example)
    whole = count(dense)
    return lambda small: (count(small) / whole, None, None)


def _images(model: nn.Module, data: Any, batch: int) -> Tensor:
    """``batch`` random images of the model's shape, laid as it is fastest with."""
    example = example_of(model, data)
    return next(iter(train.batches(torch.rand(batch, *example.shape[1:]).to(example), batch, model)))


def parameters(model: nn.Module) -> int:
    """How many numbers the model has, biases and batch norm included."""
    return sum(p.numel() for p in model.parameters())


def _timed(times: pd.DataFrame) -> tuple[float, float, float]:
    small, dense = times.loc["small"], times.loc["dense"]
    return float(1 / small.ratio), float(small.low / dense.ms), float(small.high / dense.ms)


def _bisect(share: Callable[[float], float], target: float, steps: int) -> None:
    """Try settings between 0, which meets the target, and 1, ``steps`` halvings."""
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= target else (low, middle)


def _largest(trials: list[tuple[float, float]], target: float) -> float:
    """The largest setting tried that meets the target, where a larger network is taken to be no faster than any smaller one."""
    settings, shares = np.array(sorted(trials)).T
    return float(settings[np.maximum.accumulate(shares) <= target].max())


def recalibrate(model: nn.Module, data: Data | train.Pair, *, batches: int = 40, batch: int = 250) -> nn.Module:
    """A copy of ``model`` whose batch norms have the means and variances of the network as it now is, and nothing else changed.

    Pruning moves the statistics that the dense network's batch norms remember. Each batch norm's are measured anew on ``batches`` times ``batch``
    images of the training part, a stratified sample, as the plain mean over batches of the batch's mean and unbiased variance (momentum=None), each
    layer seeing what batch norms that work on batches let through. ValueError where no batch norm keeps statistics.
    """
    copy = deepcopy(model)
    norms = [m for m in copy.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise ValueError("the model has no batch norm with running statistics to recalibrate; retrain it with fit(...) instead")
    if batches < 1 or batch < 2:
        raise ValueError(f"recalibrate needs batches >= 1 and batch >= 2; got batches={batches}, batch={batch}")
    images, _ = sample(data, batches * batch)
    images = images[: max(batch, len(images) // batch * batch)]  # a last short batch would weigh as much as a whole one
    momenta = [m.momentum for m in norms]
    with train.evaluating(copy):
        for m in norms:
            m.reset_running_stats()
            m.momentum, m.training = None, True
        for x in train.batches(images, batch, copy):
            copy(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return copy
