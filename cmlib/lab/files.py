"""A compressed model as one file whose length is what the model costs.

The file is a safetensors container (a JSON header, then the arrays, nothing executable), readable by any safetensors reader:

    8 bytes      length n of the header, little-endian
    n bytes      the header, JSON padded with spaces: {array: {"dtype", "shape", "data_offsets"}, "__metadata__": {"cmlib": text}}
    the rest     the arrays end to end, with no gap

``text`` is JSON too, with sorted keys: ``format`` (1), ``net`` (network, data set and seed of one of the kit's networks, or null),
``layers`` ({layer: what its packed value says of itself: type, storage, shape, ...}), ``widths`` ({module: its numbers of channels} where
channels were removed for real) and ``sha256`` (over this JSON without that field
and, sorted by name, every array's name, dtype, shape and bytes). The packed arrays of a layer are called ``layer.weight|values``,
``layer.weight|bitmap`` and so on; all other state (biases, batch norm, weights of layers that are not compressed) has its plain name
and is stored dense, once where two names share it.

A file is checked whole before anything is touched: it loads bit for bit as it was saved, or ``FileError`` says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.apply import Plan, attach_plan, attached, held, plan_of, weighted, with_gains
from ..core.bake import narrowed, widths
from ..core.packed import Packed
from ..core.perforate import places_of
from ..core.sites import input_of
from ..core.wrapped import TYPES
from .zoo import build, write

FORMAT = 1
PLACES = {"bitmap", "gaps", "columns", "starts", "computed"}  # in the names of arrays that say where weights lie, or what is worked out
Tensors = dict[str, Tensor]


class FileError(ValueError):
    """A file of a model is missing, cut, altered, not ours, or does not fit the network; the message says which."""


def save(model: nn.Module, path: str | Path) -> int:
    """Write ``model`` with whatever is attached to it, and return the file's length in bytes. The model is not changed.

    The file is written aside and renamed, so that it is whole or not there. Raises ``FileError`` where it cannot be written.
    """
    with _about(path, "saved"):
        plan = plan_of(model)
        plain = {n: m for n, m in weighted(model).items() if n not in plan}
        for what, lost in {"rounds its inputs": input_of, "leaves out places": places_of}.items():
            found = [n for n, m in plain.items() if lost(m) is not None]
            _need(not found, f"{_some(found)} {what} but has plain weights, of which a file holds no such thing; save the compressed model")
        raw = _encoded(model, plan)
        write(Path(path), raw)
    return len(raw)


def length(model: nn.Module, plan: Plan) -> int:
    """How many bytes ``save`` would write for a plain ``model`` with ``plan`` attached, header and all."""
    return len(_encoded(model, plan))


def _encoded(model: nn.Module, plan: Plan) -> bytes:
    learned = {f"{n}.{p}": with_gains(owner, p) for n, owner, p in held(model)}
    tensors = {n: learned.get(n, t).detach().cpu().contiguous().clone() for n, t in _state(model, plan).items()}
    for layer, packed in plan.items():
        tensors |= {f"{layer}.weight|{n}": torch.from_numpy(a) for n, a in packed.arrays().items()}
    header = {"format": FORMAT, "net": _source(model, plan), "layers": {layer: p.meta() for layer, p in plan.items()}}
    header["widths"] = getattr(model, "widths", {})
    header["sha256"] = _digest(header, tensors)
    return safetensors.torch.save(tensors, {"cmlib": _dump(header)})


def load(path: str | Path, into: nn.Module | None = None) -> nn.Module:
    """The model in a file, compressed as it was saved: in one of the kit's networks, built anew, in evaluation mode.

    Any other network's numbers go into ``into``, a fresh module of the same layers, which is itself changed and returned; its mode, device and
    memory layout stay.
    Raises ``FileError`` for whatever is wrong with the file, and then ``into`` is unchanged.
    """
    if not (into is None or isinstance(into, nn.Module)):
        raise TypeError(f"into= is a fresh module to fill; got {type(into).__name__}")
    with _about(path, "loaded"):
        header, tensors = _read(path)
        target = into if into is not None else _build(header["net"])
        narrow = _narrow(target, header.get("widths", {}))
        plan, state = _fit(narrow, header["layers"], tensors)
    if narrow is not target:
        narrowed(target, header["widths"])
    attach_plan(target, plan)
    with torch.no_grad():
        for name, tensor in _state(target, plan).items():
            tensor.copy_(state[name])
    if header["net"] is not None:
        target.source = header["net"]
    return target


def sizes(path: str | Path) -> dict[str, Any]:
    """Where a file's bytes are: ``file`` = ``header`` + ``arrays``, ``arrays`` = the sum of ``layers`` + ``rest``.

    ``layers`` is {compressed layer: bytes of its packed weight}; ``indices`` is the part of these bytes that says where weights lie
    rather than what they are. Raises ``FileError`` for whatever is wrong with the file.
    """
    with _about(path, "read"):
        header, tensors = _read(path)
        total = Path(path).stat().st_size
    layers = {layer: sum(t.nbytes for t in _arrays(layer, tensors).values()) for layer in header["layers"]}
    places = sum(t.nbytes for layer in layers for n, t in _arrays(layer, tensors).items() if PLACES.intersection(n.split(".")))
    held = sum(t.nbytes for t in tensors.values())
    return {"file": total, "header": total - held, "arrays": held, "layers": layers, "rest": held - sum(layers.values()), "indices": places}


@contextmanager
def _about(path: str | Path, done: str) -> Iterator[None]:
    """Whatever goes wrong inside, a FileError tells of the file: a file may be malformed in more ways than there are checks."""
    try:
        yield
    except Exception as error:
        raise FileError(f"{path} cannot be {done}: {error or type(error).__name__}") from error


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise FileError(problem)


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _digest(header: dict[str, Any], tensors: Tensors) -> str:
    found = hashlib.sha256(_dump({k: v for k, v in header.items() if k != "sha256"}).encode())
    for name, t in sorted(tensors.items()):
        found.update(f"\n{name}\n{t.dtype}\n{list(t.shape)}\n".encode())
        if t.numel():  # an empty array may have strides that cannot be viewed as bytes
            found.update(t.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _state(model: nn.Module, packed: Iterable[str] = ()) -> Tensors:
    """All state but the weights of the ``packed`` layers, live, each tensor once under its first name."""
    again = {n for n, _ in model.named_modules(remove_duplicate=False)} - {n for n, _ in model.named_modules()}
    weights, behind = {f"{n}.weight" for n in packed}, {f"{n}.parametrizations.weight" for n in packed}
    plain = {f"{n}.parametrizations.{p}.original": f"{n}.{p}" for n, _, p in held(model)}
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = plain.get(name, name)
        owner = name.rpartition(".")[0]
        if (
            owner.endswith("input_site")
            or name in weights
            or owner in behind
            or owner in again
            or any(owner.startswith(b + ".") for b in behind | again)
        ):
            continue
        _need(isinstance(tensor, Tensor) and not name.endswith("_extra_state"), f"its state {name} is not a plain tensor")
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def _source(model: nn.Module, plan: Plan) -> dict[str, Any] | None:
    """How the kit builds this network, where it still has the layers that it was built with."""
    source = getattr(model, "source", None)
    if not (isinstance(source, dict) and set(source) == {"net", "data", "seed"}):
        return None
    fresh, narrower = _skeleton(source["net"], source["data"]), getattr(model, "widths", {})
    fresh = narrowed(deepcopy(fresh), narrower) if narrower else fresh
    same = _kinds(_state(fresh, plan)) == _kinds(_state(model, plan))
    same &= all(n in weighted(fresh) and fresh.get_submodule(n).weight.shape == p.dense().shape for n, p in plan.items())
    return dict(source) if same else None


@cache
def _skeleton(net: str, data: str) -> nn.Module:
    """A network of the kit without numbers; a panel asks for it at every move."""
    with torch.device("meta"):
        return build(net, data)


def _kinds(tensors: Tensors) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}


def _read(path: str | Path) -> tuple[dict[str, Any], Tensors]:
    """The cmlib header and the arrays of a file that is exactly as it was written."""
    raw = Path(path).read_bytes()
    _need(len(raw) >= 8, f"it is not a model's file: it has {len(raw)} bytes")
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")].rstrip(b" ")
    tensors = safetensors.torch.load(raw)  # checks lengths, offsets and dtypes against one another
    outer = json.loads(text)
    inner = outer.get("__metadata__", {}).get("cmlib")
    _need(inner is not None, "it is a safetensors file, but not a model saved by the kit (no 'cmlib' in its metadata)")
    header = json.loads(inner, parse_constant=lambda word: _need(False, f"its header holds {word}"))
    _need(isinstance(header, dict) and isinstance(header.get("layers"), dict) and "net" in header, "its header lacks net or layers")
    _need(header.get("format") == FORMAT, f"it has format {header.get('format')!r}; this version of the kit reads format {FORMAT}")
    as_written = json.dumps(outer, separators=(",", ":"), ensure_ascii=False).encode() == text and _dump(header) == inner
    _need(as_written and header.get("sha256") == _digest(header, tensors), "it is altered: its content and its sha256 differ")
    _check_numbers(header)
    return header, tensors


def _check_numbers(value: Any) -> None:
    """Every number in a header counts something."""
    for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(v)
    if isinstance(value, (int, float)):
        _need(0 <= value < 2**63, f"its header holds the number {value}")


def _build(net: Any) -> nn.Module:
    _need(net is not None, "it holds a network that is not one of the kit's; build a fresh one and pass it as into=")
    known = isinstance(net, dict) and set(net) == {"net", "data", "seed"} and isinstance(net["seed"], int)
    _need(known, f"its header names no network: {net!r}")
    return build(**net)


def _narrow(target: nn.Module, asked: Any) -> nn.Module:
    """``target``, or where channels were removed a copy of it as narrow as the file says; what it says is held against ``target`` first."""
    if not asked:
        return target
    here = widths(target)
    fits = isinstance(asked, dict) and all(
        n in here and isinstance(w, dict) and w.keys() == here[n].keys() and all(isinstance(v, int) and 1 <= v <= here[n][k] for k, v in w.items())
        for n, w in asked.items()
    )
    _need(fits, "it was saved with channels removed that the network does not have")
    return narrowed(deepcopy(target), asked)


def _arrays(layer: str, tensors: Tensors) -> Tensors:
    start = f"{layer}.weight|"
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def _fit(target: nn.Module, layers: dict[str, Any], tensors: Tensors) -> tuple[Plan, Tensors]:
    """(plan, the other state) for ``target``, everything decoded and of the right names, shapes and dtypes."""
    _need(next(attached(target), None) is None, "into= already has a compressed layer; build a fresh module")
    here = weighted(target)
    _need(set(layers) <= set(here), f"the network has no layer {_some(set(layers) - set(here))} to compress")
    plan = {n: _unpack(n, meta, _arrays(n, tensors), here[n].weight) for n, meta in layers.items()}
    for name, packed in plan.items():
        _check_vectors(target, name, packed)
    state = {n: t for n, t in tensors.items() if not any(n.startswith(f"{layer}.weight|") for layer in layers)}
    found, wanted = _kinds(state), _kinds(_state(target, plan))
    _need(not wanted.keys() - found.keys(), f"it lacks {_some(wanted.keys() - found.keys())}, which the network has")
    _need(not found.keys() - wanted.keys(), f"it holds {_some(found.keys() - wanted.keys())}, which the network lacks")
    unlike = [f"{n} {_kind(found[n])} where the network has {_kind(wanted[n])}" for n in sorted(found) if found[n] != wanted[n]]
    _need(not unlike, "it does not fit: it holds " + "; ".join(unlike[:3]))
    return plan, state


def _unpack(layer: str, meta: Any, arrays: Tensors, weight: Tensor) -> Packed:
    """One layer's packed value; what it claims is held against the network's own weight before anything is decoded."""
    _need(isinstance(meta, dict) and isinstance(meta.get("type"), str), f"layer {layer} does not say what it is")
    _need(meta["type"] in TYPES, f"layer {layer} is of type {meta['type']!r}; known are {', '.join(TYPES)}")
    shape = list(weight.shape)
    _need(meta.get("shape") == shape, f"layer {layer} claims the shape {meta.get('shape')} where the network has {shape}")
    held = sum(t.nbytes for t in arrays.values())
    _need(held <= 4 * weight.nbytes + 65_536, f"layer {layer} takes {held:,} bytes for a weight of {weight.nbytes:,}")
    try:
        packed = TYPES[meta["type"]].decode({n: t.numpy() for n, t in arrays.items()}, meta)
        again = packed.arrays().keys()
    except ValueError as error:
        raise FileError(f"layer {layer} cannot be decoded: {error}") from error
    except Exception as error:  # a number where a text should be, an entry that is not there
        raise FileError(f"layer {layer} cannot be decoded: its header lacks an entry, or has one of another kind ({error!r})") from error
    _need(again == arrays.keys(), f"layer {layer} holds {_some(again ^ arrays.keys())} against its storage format")
    found = tuple(packed.dense().shape), packed.dense().dtype
    _need(found == (tuple(weight.shape), weight.dtype), f"layer {layer} holds {_kind(found)} where the network has {weight.dtype}")
    return packed


def _check_vectors(target: nn.Module, layer: str, packed: Packed) -> None:
    """Whether the vectors that a layer says go with its rows are there, and long enough."""
    known = dict(target.named_parameters())
    for name, start in packed.vectors:
        fits = name in known and known[name].dim() == 1 and start + len(packed.rows) <= len(known[name])
        _need(fits, f"layer {layer} says that {name} goes with its rows, which the network does not have like that")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _kind(kind: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{kind[1]} {list(kind[0])}".removeprefix("torch.")
