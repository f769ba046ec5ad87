"""What is put around a packed value: the rounding of the layer's inputs, the places that it works out, an entropy code; all types of a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import entropy, storage
from .codes import TERMS, SparseCodes, Sum
from .packed import Arrays, Packed, Streams, Widths
from .rounding import INPUTS, Input
from .spectral import Spectral

CODERS = ("huffman", "ans")
GAP_BITS = range(3, 9)


class Around(Packed):
    """A packed value around another one, ``inner``: what it does not change is the inner one's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def values(self) -> Tensor:
        return self.inner.values

    @property
    def state(self) -> dict[str, Any]:
        return self.inner.state

    @property
    def vectors(self) -> tuple[tuple[str, int], ...]:
        return self.inner.vectors

    def at(self, w: Tensor) -> Packed:
        return replace(self, inner=self.inner.at(w))

    def through(self, w: Tensor) -> Tensor:
        return self.inner.through(w)

    def frozen(self) -> Packed:
        return replace(self, inner=self.inner.frozen())

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        storage.need(meta["inner"]["shape"] == meta["shape"], "the shapes inside and outside differ")
        return TYPES[meta["inner"]["type"]].widths(plain, meta["inner"])


@dataclass(frozen=True, eq=False)
class Sited(Around):
    """A weight whose layer also rounds its inputs: ``input`` is stored beside it."""

    inner: Packed
    input: Input

    def parts(self) -> tuple[Arrays, Streams]:
        plain, streams = self.inner.parts()
        return {**plain, **{f"input.{n}": a for n, a in self.input.arrays().items()}}, streams

    def bits(self) -> int:
        return self.inner.bits() + 8 * sum(a.nbytes for a in self.input.arrays().values())

    def meta(self) -> dict[str, Any]:
        inner = self.inner.meta()
        return {"type": "sited", "shape": inner["shape"], "inner": inner, "input": self.input.meta()}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Sited:
        own = {n.removeprefix("input."): a for n, a in plain.items() if n.startswith("input.")}
        rest = {n: a for n, a in plain.items() if not n.startswith("input.")}
        given = INPUTS[meta["input"]["type"]].decode(own, meta["input"])
        return cls(TYPES[meta["inner"]["type"]].rebuild(rest, streams, meta["inner"]), given)


@dataclass(frozen=True, eq=False)
class Perforated(Around):
    """The weight of a convolution that works out its output at ``computed`` (H, W), bool, alone (``core.perforate``): a bitmap beside the weight."""

    inner: Packed
    computed: Tensor

    def parts(self) -> tuple[Arrays, Streams]:
        plain, streams = self.inner.parts()
        return {**plain, "computed": np.packbits(self.computed.cpu().numpy())}, streams

    def bits(self) -> int:
        return self.inner.bits() + 8 * -(-self.computed.numel() // 8)

    def meta(self) -> dict[str, Any]:
        inner = self.inner.meta()
        return {"type": "perforated", "shape": inner["shape"], "inner": inner, "map": list(self.computed.shape)}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Perforated:
        height, width = meta["map"]
        storage.need(len(meta["shape"]) == 4 and len(plain["computed"]) == -(-height * width // 8), "the places do not fit a map of a convolution")
        computed = np.unpackbits(plain["computed"], count=height * width).astype(bool).reshape(height, width)
        storage.need(bool(computed.any()), "no place of the map is worked out")
        rest = {n: a for n, a in plain.items() if n != "computed"}
        return cls(TYPES[meta["inner"]["type"]].rebuild(rest, streams, meta["inner"]), torch.from_numpy(computed))


def around(packed: Packed, given: Input | None = None, computed: Tensor | None = None) -> Packed:
    """The packed value with the rounding of its layer's inputs and the places of its output put around it, where there are any."""
    packed = packed if given is None else Sited(packed, given)
    return packed if computed is None else Perforated(packed, computed)


def within(packed: Packed) -> Packed:
    """What stands for the weight alone, entropy code and all."""
    return within(packed.inner) if isinstance(packed, (Sited, Perforated)) else packed


@dataclass(frozen=True, eq=False)
class Coded(Around):
    """A packed value whose streams of small numbers are written in an entropy code: ``huffman`` or ``ans``."""

    inner: Packed
    coder: str = "huffman"

    def _encoded(self) -> tuple[Arrays, dict[str, Any]]:
        plain, codes = self.inner.parts()[0], {}
        for name, (numbers, k) in self._told():
            arrays, codes[name] = entropy.encode(numbers, k, self.coder)
            plain |= {f"{name}.{n}": a for n, a in arrays.items()}
        return plain, codes

    def _told(self) -> list[tuple[str, tuple[np.ndarray, int]]]:
        """The inner value's streams, without those of no bits, which tell nothing."""
        return [(name, stream) for name, stream in self.inner.parts()[1].items() if stream[1]]

    def parts(self) -> tuple[Arrays, Streams]:
        return self._encoded()[0], {}

    def bits(self) -> int:
        plain = sum(a.nbytes for a in self.inner.parts()[0].values())
        return 8 * (plain + sum(entropy.nbytes(numbers, k, self.coder) for _, (numbers, k) in self._told()))

    def meta(self) -> dict[str, Any]:
        inner = self.inner.meta()
        return {"type": "coded", "shape": inner["shape"], "coder": self.coder, "inner": inner, "streams": self._encoded()[1]}

    def format(self) -> str:
        return f"{self.inner.format()}, {self.coder}"

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        return {}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Coded:
        inner, kind = meta["inner"], TYPES[meta["inner"]["type"]]
        storage.need(inner["shape"] == meta["shape"] and inner["type"] != "coded", "a coded value holds one plain value of its own shape")
        found: dict[str, np.ndarray] = {}
        for name, (k, count) in kind.widths(plain, inner).items():
            own = {n.removeprefix(f"{name}."): a for n, a in plain.items() if n.startswith(f"{name}.")}
            found[name] = entropy.decode(own, meta["streams"][name], k, count, meta["coder"]) if k else np.zeros(count, np.int64)
        rest = {n: a for n, a in plain.items() if not any(n.startswith(f"{name}.") for name in found)}
        return cls(kind.rebuild(rest, found, inner), meta["coder"])


def entropy_coded(packed: Packed, coder: str = "huffman") -> Coded:
    """``packed`` in an entropy code; of sparse codes the width of the gaps is the one that makes it smallest then."""
    if isinstance(packed, Coded):
        return entropy_coded(packed.inner, coder)
    if isinstance(packed, (Sited, Perforated)):
        return Coded(replace(packed, inner=entropy_coded(packed.inner, coder).inner), coder)
    tried = [packed, *(replace(packed, gap_bits=k) for k in GAP_BITS)] if isinstance(packed, SparseCodes) else [packed]
    return min((Coded(p, coder) for p in tried), key=Coded.bits)


TYPES: dict[str, type[Packed]] = {
    **TERMS, "spectral": Spectral, "sum": Sum, "sited": Sited, "perforated": Perforated, "coded": Coded
}  # the name in a file's header  # fmt: skip
