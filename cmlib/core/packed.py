"""What a method returns for a weight: final dataclasses that answer three questions.

``dense()``   the weight that it stands for, in evaluation.
``bits()``    what storing it truly costs: values, indices, tables, each array padded to whole bytes.
``arrays()``  what goes to disk.

Error and ratio columns, files, pictures, training and the laws all derive from these three. ``through(w)`` is the same weight
with ``w`` in place of its own latent values: what a training forward sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage

State = dict[str, Any]


def laid_like(t: Tensor, w: Tensor) -> Tensor:
    """``t`` in the memory layout of ``w``: a convolution runs a third slower in the wrong one, and rounds differently."""
    return t if t.stride() == w.stride() else torch.empty_strided(w.shape, w.stride(), dtype=t.dtype, device=t.device).copy_(t)


@dataclass(frozen=True, eq=False)
class Masked:
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

    def dense(self) -> Tensor:
        return self.through(self.values)

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

    def arrays(self) -> dict[str, np.ndarray]:
        return self._encoded()[0]

    def meta(self) -> dict[str, Any]:
        """What the file's header says of this tensor."""
        return {"type": "masked", "storage": self.format(), "shape": list(self.mask.shape), **self._vectors(), **self._encoded()[1]}

    def _vectors(self) -> dict[str, Any]:
        return {"vectors": [list(v) for v in self.vectors]} if self.vectors else {}

    def _encoded(self) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        values = self.dense().detach().cpu().contiguous().numpy()
        return storage.encode(values, self.mask.cpu().numpy(), self.format())

    @classmethod
    def decode(cls, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> Masked:
        values, mask = storage.decode(arrays, meta["storage"], tuple(meta["shape"]), meta.get("k", 0))
        return cls(
            torch.from_numpy(values.copy()), torch.from_numpy(mask), meta["storage"], vectors=tuple((n, i) for n, i in meta.get("vectors", ()))
        )

    def frozen(self) -> Masked:
        """The same with nothing left to learn: a copy, detached, without state."""
        return replace(self, values=self.values.detach().clone(), mask=self.mask.detach().clone(), straight=False, state={})


Packed = Masked  # later chapters add Codes, Factors, Operator and Coded
TYPES = {"masked": Masked}  # the name in a file's header -> the dataclass
