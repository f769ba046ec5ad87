"""Products by counting bits: 64 signs, or 64 bits of a code, to a machine word; xor or and, then population count.

Bits are packed along the axis that is summed over; what fills the last word is 0 in both operands, so that it counts for nothing. Matrices are
written as in a dense layer: a (rows, n) against b (outputs, n) gives (rows, outputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHED = 1 << 15  # entries of the product that are worked on at once: they stay in the processor's cache


def words(bits: np.ndarray) -> np.ndarray:
    """Booleans (..., n) as uint64 words (..., ceil(n / 64))."""
    return _whole_words(np.packbits(bits, axis=-1))


def _whole_words(octets: np.ndarray) -> np.ndarray:
    """Bytes (..., n) as words (..., ceil(n / 8)), filled up with zeros."""
    n = octets.shape[-1]
    filled = np.zeros((*octets.shape[:-1], -(-n // 8) * 8), np.uint8)
    filled[..., :n] = octets
    return filled.view(np.uint64)


def counts(a: np.ndarray, b: np.ndarray, combine: Callable = np.bitwise_and) -> np.ndarray:
    """popcount(combine(row of a, row of b)) for words a (rows, w) and b (outputs, w): int32 (rows, outputs)."""
    found, columns = np.zeros((len(a), len(b)), np.int32), np.ascontiguousarray(b.T)
    step = max(1, CACHED // max(1, len(b)))
    for start in range(0, len(a), step):
        part, out = a[start : start + step], found[start : start + step]
        for i, column in enumerate(columns):
            out += np.bitwise_count(combine(part[:, i, None], column))
    return found


def _bits(x: Tensor) -> np.ndarray:
    """Where the sign is +1, with sign(0) = +1."""
    return (x.detach() >= 0).cpu().numpy()


def xnor_dot(a: Tensor, b: Tensor) -> Tensor:
    """sign(a) sign(b)^T for a (rows, n) and b (outputs, n), exact: n - 2 popcount(a xor b), int32 (Courbariaux et al. 2016, BNN)."""
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"rows of a have {a.shape[-1]} entries and those of b {b.shape[-1]}; a product needs as many")
    return torch.from_numpy(a.shape[-1] - 2 * counts(words(_bits(a)), words(_bits(b)), np.bitwise_xor))


@dataclass(frozen=True, eq=False)
class Signs:
    """The signs of a weight (out, in) or (out, in, height, width), packed once: ``words`` (out, w), at most 7 idle bits a place and 63 a row."""

    words: np.ndarray
    shape: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        """How many signs an output is a sum over."""
        return int(np.prod(self.shape[1:]))


def pack_signs(w: Tensor) -> Signs:
    """A weight's signs, channels last, as ``xnor_linear`` and ``xnor_conv2d`` read them."""
    octets = np.packbits(np.moveaxis(_bits(w), 1, -1), axis=-1)
    return Signs(_whole_words(octets.reshape(len(w), -1)), tuple(w.shape))


def xnor_linear(x: Tensor, w: Signs) -> Tensor:
    """sign(x) sign(w)^T for x (rows, in), exact, int32 (rows, out)."""
    if x.shape[1:] != w.shape[1:]:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a dense weight of shape {w.shape}")
    return torch.from_numpy(w.fan_in - 2 * counts(words(_bits(x)), w.words, np.bitwise_xor))


def xnor_conv2d(x: Tensor, w: Signs, *, stride: int = 1, padding: int = 0, fill: int = -1) -> Tensor:
    """The convolution of sign(x) (N, C, H, W) with sign(w) (out, C, h, w), exact, int32 (N, out, H', W').

    A sign cannot be 0, so the ``padding`` pixels around each map are -1 or +1 as ``fill`` says; ``padding=0`` takes the valid positions only.
    """
    if fill not in (-1, 1):
        raise ValueError(f"fill={fill!r} is not allowed: a sign is -1 or 1; padding=0 takes the valid positions only")
    if x.dim() != 4 or len(w.shape) != 4 or x.shape[1] != w.shape[1]:
        raise ValueError(f"an input of shape {tuple(x.shape)} does not fit a convolution's weight of shape {w.shape}")
    edge = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    maps = np.pad(np.moveaxis(_bits(x), 1, -1), edge, constant_values=fill > 0)
    octets = np.packbits(maps, axis=-1)  # packed before windows are cut: an eighth of the bytes to move
    windows = np.lib.stride_tricks.sliding_window_view(octets, w.shape[2:], axis=(1, 2))[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)
    n, height, width = windows.shape[:3]
    product = w.fan_in - 2 * counts(_whole_words(windows.reshape(n * height * width, -1)), w.words, np.bitwise_xor)
    return torch.from_numpy(product).reshape(n, height, width, -1).permute(0, 3, 1, 2)


def added_conv2d(x: Tensor, w: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """BWN's convolution by additions alone: alpha (sum of x where w >= 0, minus sum where w < 0), alpha = mean |w| of the filter.

    x (N, C, H, W), w (out, C, h, w), padding with zeros (Rastegari et al. 2016, XNOR-Net, section 3.1).
    """
    columns = F.unfold(x, w.shape[2:], padding=padding, stride=stride)
    sums = [columns[:, plus].sum(1) - columns[:, ~plus].sum(1) for plus in w.flatten(1) >= 0]
    height = (x.shape[2] + 2 * padding - w.shape[2]) // stride + 1
    return torch.stack(sums, 1).unflatten(2, (height, -1)) * w.abs().mean((1, 2, 3))[:, None, None]


def planes(codes: np.ndarray, bits: int) -> np.ndarray:
    """The bits of unsigned ``codes`` (rows, n), lowest first, as words (bits, rows, w). ValueError for a code that needs more bits."""
    if codes.size and not (codes.min() >= 0 and codes.max() < 1 << bits):
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit {bits} unsigned bits: 0 to {(1 << bits) - 1}")
    return words((codes >> np.arange(bits)[:, None, None] & 1).astype(bool))


def bitplane_dot(a: np.ndarray, b: np.ndarray, a_bits: int, b_bits: int) -> np.ndarray:
    """a b^T for unsigned codes a (rows, n) and b (outputs, n): sum over i, j of 2^(i+j) popcount(a_i and b_j), int64 (DoReFa-Net, section 2.1)."""
    a_planes, b_planes = planes(a, a_bits), planes(b, b_bits)
    return sum(counts(p, q).astype(np.int64) << (i + j) for i, p in enumerate(a_planes) for j, q in enumerate(b_planes))


def signed_basis_dot(a: np.ndarray, b: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The product of sum_i u_i a_i with sum_j v_j b_j where a bit stands for -1 or +1: u_i v_j (n - 2 popcount(a_i xor b_j)).

    a (bits, rows, n) and b (bits, outputs, n) booleans, u (bits,), v (bits,) or (bits, outputs) for a basis a channel; float64 (rows, outputs).
    """
    return _by_basis(a, b, u, v, lambda p, q: a.shape[-1] - 2 * counts(p, q, np.bitwise_xor))


def unsigned_basis_dot(a: np.ndarray, b: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same where a bit of the activations ``a`` stands for 0 or 1 and one of the weights ``b`` for -1 or +1, as LQ-Nets has them.

    u_i v_j (2 popcount(a_i and b_j) - popcount(a_i)).
    """
    return _by_basis(a, b, u, v, lambda p, q: 2 * counts(p, q) - np.bitwise_count(p).sum(-1, dtype=np.int32)[:, None])


def _by_basis(a: np.ndarray, b: np.ndarray, u: np.ndarray, v: np.ndarray, dot: Callable) -> np.ndarray:
    a_planes, b_planes = words(a), words(b)
    return sum(u[i] * v[j] * dot(p, q) for i, p in enumerate(a_planes) for j, q in enumerate(b_planes))


def sign_thresholds(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Batch norm and sign as one comparison a channel: (tau, direction), float64, for ``above``.

    gamma (x - mean) / sqrt(var + eps) + beta >= 0 is x >= tau for gamma > 0 and x <= tau for gamma < 0, tau = mean - beta sqrt(var + eps) / gamma;
    for gamma = 0 it is the sign of beta, which a tau of -inf or +inf says (Umuroglu et al. 2017, FINN, section 4.2.2).
    """
    std = (norm.running_var.double() + norm.eps).sqrt()
    gamma, beta = (t.detach().double() if t is not None else torch.full_like(std, x) for t, x in ((norm.weight, 1.0), (norm.bias, 0.0)))
    constant = torch.where(beta >= 0, -torch.inf, torch.inf).double()
    tau = torch.where(gamma == 0, constant, norm.running_mean.double() - beta * std / gamma)
    return tau, torch.where(gamma < 0, -1.0, 1.0).double()


def above(x: Tensor, tau: Tensor, direction: Tensor) -> Tensor:
    """Where x (N, C, ...) is on the +1 side of its channel's threshold."""
    shape = (-1, *[1] * (x.dim() - 2))
    return direction.reshape(shape) * x >= (direction * tau).reshape(shape)
