"""Weights whose kernels are kept as coefficients of the orthonormal discrete cosine transform (DCT-II), each axis beyond the second transformed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .packed import Masked


def dct_matrix(n: int) -> Tensor:
    """C_ux = sqrt((2 - [u = 0]) / n) cos(pi (2 x + 1) u / (2 n)), float64: orthonormal, row u of frequency u."""
    u, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    c = (2 / n) ** 0.5 * torch.cos(math.pi * (2 * x + 1) * u / (2 * n))
    c[0] /= 2**0.5
    return c


def _transformed(w: Tensor, inverse: bool) -> Tensor:
    for axis in range(2, w.dim()):
        if w.shape[axis] > 1:  # the transform of one number is that number
            c = dct_matrix(w.shape[axis]).to(w)
            w = torch.movedim(torch.movedim(w, axis, -1) @ (c if inverse else c.T), -1, axis)
    return w


def dct(w: Tensor) -> Tensor:
    """The coefficients of each kernel of a weight (out, in, ...); a weight without kernels is its own coefficients."""
    return _transformed(w, inverse=False)


def idct(coefficients: Tensor) -> Tensor:
    """The weight of its coefficients."""
    return _transformed(coefficients, inverse=True)


@dataclass(frozen=True, eq=False)
class Spectral(Masked):
    """DCT coefficients of which some are removed: ``values`` and ``mask`` are of coefficients, ``dense()`` is the weight."""

    def through(self, w: Tensor) -> Tensor:
        return idct(super().through(w))

    def in_weights(self) -> Masked:
        dense = self.dense()
        return Masked(dense, torch.ones_like(self.mask), vectors=self.vectors)

    def meta(self) -> dict[str, Any]:
        return {**super().meta(), "type": "spectral"}
