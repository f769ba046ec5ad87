"""Laws: what every method must keep, each a short plain function over a method that raises AssertionError with a sentence.

The same text is a unit test over the whole catalogue, the check of an exercise, and a demonstration in a notebook. ``laws_of(method)``
lists those that bind a method; ``exemption(law, method)`` is the reason why it cannot meet one, or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .apply import Plan, weighted
from .inputs import Pair
from .knobs import knobs_of
from .method import Method, call
from .packed import Packed
from .planner import Planner
from .select import Masks, is_n_of_m, removed, selection, to_units, to_weights
from .storage import FORMATS
from .wrapped import TYPES

Law = Callable[[Method], None]
UNITS = knobs_of(selection)["unit"].span.choices
KEEPS = (0.9, 0.5, 0.13)


def subject(seed: int = 0) -> tuple[nn.Module, Pair]:
    """What the laws are tried on: a float64 network of two convolutions, a batch norm and a dense layer (318 weights), and 40 images with labels."""
    draw = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model, (torch.rand(40, 1, 6, 6, generator=draw, dtype=torch.float64), torch.randint(0, 3, (40,), generator=draw))


def finite(method: Method) -> None:
    """Scores have their weight's shape (or broadcast to it) and are finite, as is the packed weight, at the corners of the own knobs."""
    planner = _planner(method)
    for knobs in _corners(method):
        try:
            scores = planner.ranking(**method.bind(knobs)).scores if method.selects else {}
        except RuntimeError as error:
            raise AssertionError(f"{method.key}{knobs}: the score does not broadcast to its weight ({error})") from error
        for what, values in (("scores", scores), ("weights", _dense(planner(**knobs)))):
            for name, v in values.items():
                assert torch.isfinite(v).all(), f"{method.key}{knobs}: layer {name} has {what} that are NaN or infinite"


def permutation(method: Method) -> None:
    """Permuting a layer's filters (and the next layer's inputs with them) permutes scores, masks and weights, and changes nothing else."""
    model, data = subject()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    before = Planner(deepcopy(model), method, data=data)
    with torch.no_grad():
        for vector in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            vector.copy_(vector[order])
        model[3].weight.copy_(model[3].weight[:, order])
    after = Planner(model, method, data=data)
    for what, was, now in _views(method, before, after):
        for name, value in was.items():
            value = value[order] if name == "0" else value[:, order] if name == "3" else value
            assert torch.allclose(now[name].double(), value.double(), rtol=1e-6, atol=1e-12), (
                f"{method.key}: with the filters of layer 0 permuted, the {what} of layer {name} are not the permuted ones"
            )


def count(method: Method) -> None:
    """Exactly round((1 - keep) n) of the n units of each scope go, whole units only; n:m keeps n of every m along each row.

    Of filters the network's outputs stay, and one in each layer.
    """
    planner = _planner(method)
    for unit, scope, keep in _selections(method):
        masks = _masks(planner, method, unit, scope, keep)
        if unit == "filter":
            masks = {g.first: masks[g.first] for g in planner.structure.groups}
        where = f"{method.key}(keep={keep}, unit={unit!r}, scope={scope!r})"
        if is_n_of_m(unit):
            _n_of_m(masks, unit, where)
            continue
        units = {name: to_units(m.double(), unit) > 0 for name, m in masks.items()}
        for name, m in masks.items():
            assert torch.equal(to_weights(units[name], unit, m.shape), m), f"{where}: layer {name} keeps a part of a unit"
        scopes = [[u] for u in units.values()] if scope == "layer" else [list(units.values())]
        for group in scopes:
            total, kept = sum(u.numel() for u in group), sum(int(u.sum()) for u in group)
            asked, spared = total - removed(total, keep), sum(int(u.sum()) == 1 for u in group) if unit == "filter" else 0
            assert asked <= kept <= asked + spared, f"{where}: {kept} of {total} units stay; {asked} should"


def nested(method: Method) -> None:
    """What stays at a smaller ``keep`` stays at a larger one."""
    planner = _planner(method)
    for unit, scope, keep in _selections(method):
        smaller = "1:4" if unit == "2:4" else unit  # n:m has no other keep than n
        inner, outer = _masks(planner, method, smaller, scope, 0.6 * keep), _masks(planner, method, unit, scope, keep)
        for name in outer:
            extra = int((inner[name] & ~outer[name]).sum())
            assert extra == 0, f"{method.key}(unit={unit!r}, scope={scope!r}): layer {name} keeps {extra} weights at a smaller keep only"


def ties(method: Method) -> None:
    """The same network gives the same masks, and of equal scores in one layer the lower index stays."""
    model, data = subject()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.25 * p.sign())
    first, second = Planner(model, method, data=data), Planner(model, method, data=data)
    masks = _masks(first, method, "weight", "layer", 0.5)
    for name, again in _masks(second, method, "weight", "layer", 0.5).items():
        assert torch.equal(masks[name], again), f"{method.key}: asked twice, it gives two masks of layer {name}"
    scores = _scores(first, method) if method.selects else {n: p.values.abs() for n, p in first().items()}
    for name, s in scores.items():
        m = masks[name].flatten()
        for value in s.unique():
            kept = m[s.flatten() == value]
            assert kept[: int(kept.sum())].all(), f"{method.key}: of equal scores in layer {name} a higher index stays and a lower one goes"


def shape(method: Method) -> None:
    """The plan has a packed value for every covered layer, of its weight's shape and number type.

    A method that learns which filters go leaves the network's outputs alone.
    """
    model, _ = subject()
    layers = list(weighted(model))
    for knobs, plan in _plans(method):
        wanted = layers[:-1] if method.filters and call(method.filters, {}, method.bind(knobs)) else layers
        assert list(plan) == wanted, f"{method.key}{knobs}: the plan covers {list(plan)}, not {wanted}"
        for name, packed in plan.items():
            w, dense = model.get_submodule(name).weight, packed.dense()
            assert dense.shape == w.shape, f"{method.key}{knobs}: layer {name} is {tuple(w.shape)}, its packed weight {tuple(dense.shape)}"
            assert dense.dtype == w.dtype, f"{method.key}{knobs}: layer {name} holds {w.dtype}, its packed weight {dense.dtype}"


def round_trip(method: Method) -> None:
    """Written to arrays and a JSON header, and read back, a packed value is the same bit for bit."""
    for where, packed in _packed(method):
        back = _read_back(packed)
        assert _same(back.dense(), packed.dense()), f"{where}: the weight read back is not the one written"
        if hasattr(packed, "mask"):
            lost = (back.mask != packed.mask) & (packed.dense() != 0)  # a weight that is kept and happens to be 0 may come back as removed
            assert not lost.any(), f"{where}: the mask read back is not the one written"


def bits(method: Method) -> None:
    """``bits()`` is what the arrays hold, to the byte."""
    for where, packed in _packed(method):
        held = 8 * sum(a.nbytes for a in packed.arrays().values())
        assert packed.bits() == held, f"{where}: bits() says {packed.bits():,}, its arrays hold {held:,}"


def projection(method: Method) -> None:
    """Encoding what was decoded changes nothing, and packing the packed weight again leaves it as it is."""
    for where, packed in _packed(method):
        fixed = packed.frozen()
        assert _same(fixed.through(fixed.dense()), fixed.dense()), f"{where}: packing the packed weight again changes it"
        again = _read_back(packed).arrays()
        for name, array in packed.arrays().items():
            assert array.tobytes() == again[name].tobytes(), f"{where}: array {name!r} differs when what was read is written again"


SCORES: tuple[Law, ...] = (finite, permutation)
SELECTION: tuple[Law, ...] = (count, nested, ties)
PACKED: tuple[Law, ...] = (shape, round_trip, bits, projection)


def laws_of(method: Method) -> tuple[Law, ...]:
    """The laws that bind a method: those of selection only where ``keep`` is one of its knobs."""
    return (*SCORES, *(SELECTION if "keep" in method.knobs else ()), *PACKED)


def exemption(law: Law, method: Method) -> str:
    """Why the method need not keep the law; empty where it must."""
    return method.exempt.get(law.__name__, "")


def _planner(method: Method) -> Planner:
    model, data = subject()
    return Planner(model, method, data=data)


def _corners(method: Method) -> Iterator[dict[str, Any]]:
    """The defaults, then each of the method's own knobs at its ends."""
    yield {}
    for name, knob in method.own_knobs.items():
        yield from ({name: value} for value in knob.span.points(2))


def _selections(method: Method) -> Iterator[tuple[str, str, float]]:
    """(unit, scope, keep) over all that selection offers; single weights of a layer for a method that makes its own mask."""
    units, scopes = (UNITS, ("layer", "network")) if method.selects else (("weight",), ("layer",))
    return ((unit, scope, keep) for unit in units for scope in scopes for keep in KEEPS)


def _masks(planner: Planner, method: Method, unit: str, scope: str, keep: float) -> Masks:
    chosen = {"unit": unit, "scope": scope} if method.selects else {}
    return {name: packed.mask for name, packed in planner(keep=keep, **chosen).items()}


def _n_of_m(masks: Masks, unit: str, where: str) -> None:
    n, m = map(int, unit.split(":"))
    for name, mask in masks.items():
        for group in mask.flatten(1).split(m, dim=1):
            assert (group.sum(1) == min(n, group.shape[1])).all(), f"{where}: a group of layer {name} keeps other than {n} of {m}"


def _views(method: Method, before: Planner, after: Planner) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """What a permutation must carry along: (its name, before, after)."""
    if method.selects:
        yield "scores", *(_scores(p, method) for p in (before, after))
    plans = [p(**({"keep": 0.5} if "keep" in method.knobs else {})) for p in (before, after)]
    yield "masks", *({n: packed.mask for n, packed in plan.items() if hasattr(packed, "mask")} for plan in plans)
    yield "weights", *map(_dense, plans)


def _scores(planner: Planner, method: Method) -> dict[str, Tensor]:
    """What each weight is worth, in its shape."""
    return {n: s.expand(planner.weights[n].shape) for n, s in planner.ranking(**method.bind({"unit": "weight"})).scores.items()}


def _dense(plan: Plan) -> dict[str, Tensor]:
    return {name: packed.dense().detach() for name, packed in plan.items()}


def _plans(method: Method) -> Iterator[tuple[dict[str, Any], Plan]]:
    """Plans at the defaults and, where there is ``keep``, at both of its ends and between."""
    planner = _planner(method)
    for knobs in [{}, *({"keep": k} for k in (1.0, 0.5, 0.001) if "keep" in method.knobs)]:
        yield knobs, planner(**knobs)


def _packed(method: Method) -> Iterator[tuple[str, Packed]]:
    """Every packed value of ``_plans`` in every storage format that it has."""
    for knobs, plan in _plans(method):
        for name, packed in plan.items():
            stored = [replace(packed, storage=f) for f in (*FORMATS, "auto")] if hasattr(packed, "storage") else [packed]
            for p in stored:
                yield f"{method.key}{knobs}, layer {name}, storage {getattr(p, 'storage', '')!r}", p


def _read_back(packed: Packed) -> Packed:
    """As a file would give it: plain bytes for the arrays, JSON for the header."""
    arrays = {name: np.frombuffer(a.tobytes(), a.dtype) for name, a in packed.arrays().items()}
    meta = json.loads(json.dumps(packed.meta()))
    return TYPES[meta["type"]].decode(arrays, meta)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, signs of zero and number type included."""
    return a.dtype == b.dtype and a.detach().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()
