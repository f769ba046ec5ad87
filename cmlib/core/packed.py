"""What a method returns for a weight: dataclasses that answer three questions.

``dense()``   the weight that it stands for, in evaluation.
``bits()``    what storing it truly costs: values, indices, tables, each array padded to whole bytes.
``arrays()``  what goes to disk.

Error and ratio columns, files, pictures, training and the laws all derive from these three. ``through(w)`` is the same weight
with ``w`` in place of its own latent values: what a training forward sees.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage

State = dict[str, Any]
Arrays = dict[str, np.ndarray]
Streams = dict[str, tuple[np.ndarray, int]]  # of small unsigned numbers: (the numbers, the bits of each)
Widths = dict[str, tuple[int, int]]  # of streams: (bits of each number, how many there are)


def laid_like(t: Tensor, w: Tensor) -> Tensor:
    """``t`` in the memory layout of ``w``: a convolution runs a third slower in the wrong one, and rounds differently."""
    return t if t.stride() == w.stride() else torch.empty_strided(w.shape, w.stride(), dtype=t.dtype, device=t.device).copy_(t)


class Packed(ABC):
    """What every packed value answers; a kind of its own says how with ``through``, ``parts``, ``meta``, ``widths``, ``rebuild`` and ``frozen``.

    On disk a value is plain arrays and streams of small numbers, each packed to its bits; ``Coded`` writes the streams shorter.
    """

    values: Tensor
    state: State
    vectors: tuple[tuple[str, int], ...] = ()

    @abstractmethod
    def through(self, w: Tensor) -> Tensor:
        """The weight that the layer computes with, ``w`` in place of the latent values."""

    def at(self, w: Tensor) -> Packed:
        """The same with ``w`` as latent values, where these are the weights that stay; codes alone have none."""
        return self

    def in_weights(self) -> Packed:
        """The same as weights and a mask of weights, for whatever compresses it further."""
        return self

    @abstractmethod
    def parts(self) -> tuple[Arrays, Streams]:
        """What goes to disk: (plain arrays, streams)."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """What the file's header says of this tensor: its ``type`` in ``TYPES``, its ``shape``, and what ``rebuild`` needs."""

    @classmethod
    @abstractmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        """The streams that belong to a header; ValueError where it asks for more numbers than a weight of its shape can have."""

    @classmethod
    @abstractmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Packed:
        """The value of plain arrays, the numbers of the streams, and a header. ValueError where they do not fit one another."""

    @abstractmethod
    def frozen(self) -> Packed:
        """The same with nothing left to learn: a copy, detached, without state."""

    @cached_property
    def places(self) -> np.ndarray:
        """The flat indices of the weights that stay, rising."""
        return np.flatnonzero(self.mask.cpu().numpy())

    @property
    def rows(self) -> Tensor:
        """Which outputs still have a weight, (out,)."""
        return self.mask.flatten(1).any(1)

    @property
    def kept(self) -> int:
        """How many weights stay."""
        return len(self.places)

    def dense(self) -> Tensor:
        return self.through(self.values)

    def arrays(self) -> Arrays:
        plain, streams = self.parts()
        return plain | {name: storage.pack_bits(numbers, k) for name, (numbers, k) in streams.items()}

    def bits(self) -> int:
        return 8 * sum(a.nbytes for a in self.arrays().values())

    @classmethod
    def decode(cls, arrays: Arrays, meta: dict[str, Any]) -> Packed:
        """The value of what ``arrays`` and ``meta`` gave. ValueError where they do not fit one another."""
        widths = cls.widths(arrays, meta)
        for name, (k, count) in widths.items():
            storage.need(name in arrays and len(arrays[name]) == -(-count * k // 8), f"the stream {name!r} is not {count:,} numbers of {k} bits")
        numbers = {name: storage.unpack_bits(arrays[name], k, count) for name, (k, count) in widths.items()}
        return cls.rebuild({n: a for n, a in arrays.items() if n not in widths}, numbers, meta)


class Whole(Packed):
    """A packed value from which no weight is removed."""

    @property
    def mask(self) -> Tensor:
        return torch.ones(self.values.shape, dtype=torch.bool, device=self.values.device)

    @property
    def kept(self) -> int:
        return self.values.numel()


@dataclass(frozen=True, eq=False)
class Masked(Packed):
    """Weights of which some are removed: ``values`` where ``mask``, zero elsewhere.

    ``storage`` is dense, bitmap, csr, relative, or auto for the smallest. ``straight`` lets the gradient reach removed weights as if they
    were there (the straight-through line), so that they can come back. ``state`` is what the method learns or remembers. ``vectors`` are
    parameters whose entries belong to the rows and go with them (bias, batch norm): (name, where the rows begin in it).
    """

    values: Tensor
    mask: Tensor
    storage: str = "auto"
    straight: bool = False
    state: State = field(default_factory=dict)
    vectors: tuple[tuple[str, int], ...] = ()

    def through(self, w: Tensor) -> Tensor:
        kept = torch.where(self.mask, w, torch.zeros((), dtype=w.dtype, device=w.device))
        kept = laid_like(kept, w)
        return w + (kept - w).detach() if self.straight and torch.is_grad_enabled() else kept

    def at(self, w: Tensor) -> Masked:
        return replace(self, values=w)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return storage.nbytes(self.places, tuple(self.mask.shape), self.values.element_size())

    def sizes(self) -> dict[str, int]:
        """Bytes in each storage format."""
        return self._sizes

    def format(self) -> str:
        """The storage format in use: as asked, or the smallest."""
        return min(sizes := self.sizes(), key=sizes.__getitem__) if self.storage == "auto" else self.storage

    def bits(self) -> int:
        return 8 * self.sizes()[self.format()]

    def parts(self) -> tuple[Arrays, Streams]:
        plain, k = self._encoded()
        packed = {name: k for name, k in (("bitmap", 1), ("gaps", k)) if name in plain}
        counts = {"bitmap": self.mask.numel(), "gaps": len(plain["values"])}
        return {n: a for n, a in plain.items() if n not in packed}, {n: (storage.unpack_bits(plain[n], k, counts[n]), k) for n, k in packed.items()}

    def arrays(self) -> Arrays:
        return self._encoded()[0]

    def meta(self) -> dict[str, Any]:
        k = {"k": self._encoded()[1]} if self.format() == "relative" else {}
        return {"type": "masked", "storage": self.format(), "shape": list(self.mask.shape), **vectors_meta(self.vectors), **k}

    def _encoded(self) -> tuple[Arrays, int]:
        values = Masked.through(self, self.values).detach().cpu().contiguous().numpy()
        arrays, more = storage.encode(values, self.mask.cpu().numpy(), self.format())
        return arrays, more.get("k", 0)

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        found = {"bitmap": {"bitmap": (1, math.prod(meta["shape"]))}, "relative": {"gaps": (meta.get("k", 0), len(plain["values"]))}}
        return found.get(meta["storage"], {})

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Masked:
        return cls.decode({**plain, **{n: storage.pack_bits(a, {"bitmap": 1, "gaps": meta.get("k", 0)}[n]) for n, a in streams.items()}}, meta)

    @classmethod
    def decode(cls, arrays: Arrays, meta: dict[str, Any]) -> Masked:
        values, mask = storage.decode(arrays, meta["storage"], tuple(meta["shape"]), meta.get("k", 0))
        return cls(torch.from_numpy(values.copy()), torch.from_numpy(mask), meta["storage"], vectors=vectors_of(meta))

    def frozen(self) -> Masked:
        """The same with nothing left to learn: a copy, detached, without state."""
        return replace(self, values=self.values.detach().clone(), mask=self.mask.detach().clone(), straight=False, state={})


def vectors_meta(vectors: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """What a header says of the vectors that go with the rows; nothing where there are none."""
    return {"vectors": [list(v) for v in vectors]} if vectors else {}


def vectors_of(meta: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    return tuple((name, start) for name, start in meta.get("vectors", ()))
