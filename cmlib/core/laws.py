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

from .apply import Plan, attach_plan, weighted
from .codes import Codes, SparseCodes, Sum
from .inputs import Pair
from .knobs import knobs_of
from .method import Method, call
from .packed import Masked, Packed
from .planner import Planner
from .select import Masks, is_n_of_m, removed, selection, to_units, to_weights
from .storage import FORMATS
from .wrapped import CODERS, TYPES, entropy_coded

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


def few_levels(method: Method) -> None:
    """Each group of weights takes no more values than it has levels, and a code is as wide as its levels need."""
    for where, packed in _packed(method, stored=False):
        for codes in _codes(packed):
            wide, counted = codes.levels.shape[1], 1 << codes.width
            assert codes.count <= wide and (codes.count <= 1 or counted // 2 < codes.count <= counted), f"{where}: {codes.count} levels of {wide}"
            assert int(codes.index.max()) < codes.count and int(codes.index.min()) >= 0, f"{where}: a code lies outside its levels"


def idempotent(method: Method) -> None:
    """The weight that the codes stand for, quantized again, is the same weight."""
    model, data = subject()
    for knobs in _corners(method):
        once = Planner(model, method, data=data)(**knobs)
        twice = deepcopy(model)
        with torch.no_grad():
            for name, packed in once.items():
                twice.get_submodule(name).weight.copy_(packed.dense())
        for name, packed in Planner(twice, method, data=data)(**knobs).items():
            was = once[name].dense()
            assert torch.allclose(packed.dense(), was, rtol=1e-6, atol=1e-9), f"{method.key}{knobs}: layer {name} moves when it is quantized again"


def degenerate(method: Method) -> None:
    """Weights that are all equal, all zero, or a single one give finite weights."""
    for value in (0.0, 0.5, -0.5):
        for shape in ((4, 6), (1, 1)):
            layer = nn.Sequential(nn.Flatten(), nn.Linear(shape[1], shape[0], bias=False)).double()
            nn.init.constant_(layer[1].weight, value)
            x = torch.linspace(0, 1, 8 * shape[1], dtype=torch.float64).reshape(8, 1, 1, shape[1])
            for knobs in _corners(method):
                for packed in Planner(layer, method, data=(x, torch.zeros(8, dtype=torch.int64)))(**knobs).values():
                    assert torch.isfinite(packed.dense()).all(), f"{method.key}{knobs}: weights that are all {value} give NaN or infinite ones"


def trains(method: Method) -> None:
    """In a training forward the weight is the one that the codes stand for, and a finite gradient reaches something that learns."""
    model, (x, y) = subject()
    attach_plan(model, Planner(model, method, data=(x, y))(), method, method.bind({}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
    found = {n: p.grad for n, p in model.named_parameters() if "weight" in n and "parametrizations" in n and p.grad is not None}
    for name, g in found.items():
        assert torch.isfinite(g).all(), f"{method.key}: the gradient of {name} is NaN or infinite"
    assert any(bool((g != 0).any()) for g in found.values()), f"{method.key}: no gradient reaches what the quantizer learns"


SCORES: tuple[Law, ...] = (finite, permutation)
SELECTION: tuple[Law, ...] = (count, nested, ties)
PACKED: tuple[Law, ...] = (shape, round_trip, bits, projection)
QUANTIZERS: tuple[Law, ...] = (few_levels, idempotent, degenerate, trains)


def laws_of(method: Method) -> tuple[Law, ...]:
    """The laws that bind a method: those of selection only where ``keep`` is one of its knobs, none where it makes no plan."""
    if method.no_plan:
        return ()
    return (*SCORES, *(SELECTION if "keep" in method.knobs else ()), *PACKED, *(QUANTIZERS if method.kind == "quantizer" else ()))


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
    """Plans at the defaults and at the ends: of ``keep`` where there is one, of a quantizer's own knobs."""
    planner = _planner(method)
    corners = _corners(method) if method.kind == "quantizer" else [{}, *({"keep": k} for k in (1.0, 0.5, 0.001) if "keep" in method.knobs)]
    for knobs in corners:
        yield knobs, planner(**knobs)


def _packed(method: Method, stored: bool = True) -> Iterator[tuple[str, Packed]]:
    """Every packed value of ``_plans`` in every storage format and entropy code that it has; a quantizer's also for layers that were pruned."""
    for knobs, plan in _plans(method):
        for name, packed in plan.items():
            for p in _stored(packed) if stored else [packed]:
                yield f"{method.key}{knobs}, layer {name}, {p.format()}", p
    if method.kind == "quantizer":
        for name, packed in _pruned_first(method).items():
            for p in _stored(packed) if stored else [packed]:
                yield f"{method.key} of what pruning left, layer {name}, {p.format()}", p


def _stored(packed: Packed) -> list[Packed]:
    if isinstance(packed, Masked):
        return [replace(packed, storage=f) for f in (*FORMATS, "auto")]
    return [packed, *(entropy_coded(packed, coder) for coder in CODERS)]


def _pruned_first(method: Method) -> Plan:
    """The quantizer's plan for a network of whose weights every third is gone; empty where it needs whole rows."""
    model, data = subject()
    masks = {n: (torch.arange(m.weight.numel()) % 3 > 0).reshape(m.weight.shape) for n, m in weighted(model).items()}
    attach_plan(model, {n: Masked(m.weight.detach().clone(), masks[n]) for n, m in weighted(model).items()})
    try:
        return Planner(model, method, data=data)()
    except ValueError as error:
        assert "per='tensor'" in str(error), f"{method.key} cannot quantize what pruning left, and does not say how it could: {error}"
        return {}


def _codes(packed: Packed) -> list[Codes]:
    """The codes inside a packed value."""
    inner = getattr(packed, "inner", None) or (packed.codes if isinstance(packed, SparseCodes) else None)
    if inner is not None:
        return _codes(inner)
    return [c for term in packed.terms for c in _codes(term)] if isinstance(packed, Sum) else [packed] if isinstance(packed, Codes) else []


def _read_back(packed: Packed) -> Packed:
    """As a file would give it: plain bytes for the arrays, JSON for the header."""
    arrays = {name: np.frombuffer(a.tobytes(), a.dtype) for name, a in packed.arrays().items()}
    meta = json.loads(json.dumps(packed.meta()))
    return TYPES[meta["type"]].decode(arrays, meta)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, signs of zero and number type included."""
    return a.dtype == b.dtype and a.detach().numpy().tobytes() == b.detach().contiguous().numpy().tobytes()
