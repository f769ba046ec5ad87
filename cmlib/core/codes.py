"""Weights as small whole numbers and the few numbers that say what each stands for.

A weight tensor is cut into groups of equal size, in the order in which it lies in memory; every group has its own levels. ``Codes`` holds the
number of each weight's level; ``SparseCodes`` the same for the weights that pruning left; ``Sum`` several packed values added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage
from .packed import Arrays, Masked, Packed, State, Streams, Whole, Widths, vectors_meta, vectors_of

MOST = 1 << 16  # levels
SHORTEST = 8  # run of weights that share a scale


def linear(params: Tensor, count: int) -> Tensor:
    """Evenly spaced levels: scale (i - zero); where only the scale is stored, zero lies in their middle."""
    zero = params[:, 1:2] if params.shape[1] == 2 else (count - 1) / 2
    return params[:, :1] * (torch.arange(count, dtype=params.dtype, device=params.device) - zero)


def powers(params: Tensor, count: int) -> Tensor:
    """0 and powers of two of either sign: 2^e with e falling by ones from the exponent that is stored; negative ones first."""
    half = (count - 1) // 2
    sizes = torch.exp2(params[:, :1] - torch.arange(half, dtype=params.dtype, device=params.device))
    return torch.cat([-sizes, torch.zeros_like(params[:, :1]), sizes.flip(1)], 1)


def basis(params: Tensor, count: int) -> Tensor:
    """Sums of basis numbers v_j with signs: the bits of the level's number, lowest first, say where the sign is plus."""
    bits = torch.arange(count, device=params.device)[:, None] >> torch.arange(params.shape[1], device=params.device) & 1
    return params @ (2 * bits.T - 1).to(params.dtype)


def floats(params: Tensor, count: int) -> Tensor:
    """All numbers of a small floating-point format, whose bits of exponent and mantissa are stored; negative ones first (IEEE 754, no infinity)."""
    exponent, mantissa = params[:, :1], params[:, 1:]
    code = torch.arange((count + 1) // 2, dtype=params.dtype, device=params.device)
    e, m = (code / torch.exp2(mantissa)).floor(), code % torch.exp2(mantissa)
    sizes = (m + torch.exp2(mantissa) * (e > 0)) * torch.exp2(e.clamp(min=1) - (torch.exp2(exponent - 1) - 1) - mantissa)
    return torch.cat([-sizes.flip(1), sizes[:, 1:]], 1)


def tree(params: Tensor, count: int) -> Tensor:
    """Dettmers' dynamic tree times the greatest magnitude, which is stored: 10^-z (0.1 + 0.9 (j + 1/2) / 2^n), and 0 and 1, for n = b - 2 - z bits.

    A code of b bits is a sign, z zeros, a one and n bits j. One of the two codes without a one is 0, the other 1.
    """
    last = (count - 1).bit_length() - 2
    sizes = torch.cat([0.1 ** (last - n) * (0.1 + 0.9 * (torch.arange(1 << n, dtype=params.dtype) + 0.5) / (1 << n)) for n in range(last + 1)])
    unit = torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes, sizes.new_ones(1)]).to(params)
    return params[:, :1] * unit


def table(params: Tensor, count: int) -> Tensor:
    """The levels themselves: numbers (groups, count), or vectors of d weights (groups, count, d)."""
    return params


GRIDS: dict[str, Callable[[Tensor, int], Tensor]] = {f.__name__: f for f in (linear, powers, basis, floats, tree, table)}


@dataclass(frozen=True, eq=False)
class Codes(Whole):
    """A weight of which each entry (or run of d entries) is one of ``count`` levels of its group.

    ``index``   (groups, codes of a group) int64, the level of each entry.
    ``params``  (groups, p): what ``GRIDS[grid]`` makes the levels of; (groups, count, d) for a table of vectors.
    ``values``  the latent weight, to which a straight-through gradient goes where ``straight``: its derivative to the method's own latent
                weight is the method's choice.
    ``columns`` the groups are runs of columns of the weight matrix (out, rest) rather than of rows.
    ``axes``    the groups lie one after another not in the weight but in ``weight.permute(axes)``; all of its axes, or none for the weight itself.
                With ``columns`` too, those are of the matrix (all axes but the last, the last).

    ``params`` have their true gradient.
    """

    values: Tensor
    index: Tensor
    params: Tensor
    count: int
    grid: str = "linear"
    columns: bool = False
    straight: bool = True
    state: State = field(default_factory=dict)
    vectors: tuple[tuple[str, int], ...] = ()
    axes: tuple[int, ...] = ()

    @property
    def levels(self) -> Tensor:
        """What each code of each group stands for, (groups, count) or (groups, count, d)."""
        return GRIDS[self.grid](self.params, self.count)

    @property
    def width(self) -> int:
        """Bits of a code."""
        return (self.count - 1).bit_length()

    def rounded(self) -> Tensor:
        """The weight that the codes stand for; differentiable in ``params``."""
        levels = self.levels
        group = torch.arange(len(levels), device=levels.device)[:, None]
        entries = levels[group, self.index] if levels.dim() == 3 else levels.gather(1, self.index)
        if self.columns:  # (column groups, rows, d) -> (rows, column groups, d)
            rows = self.values.numel() // self.values.shape[self.axes[-1]] if self.axes else len(self.values)
            entries = entries.reshape(len(levels), rows, -1).transpose(0, 1)
        if self.axes:
            back = sorted(range(len(self.axes)), key=self.axes.__getitem__)
            return entries.reshape([self.values.shape[a] for a in self.axes]).permute(back).contiguous()
        return entries.reshape(self.values.shape)

    def through(self, w: Tensor) -> Tensor:
        rounded = self.rounded()
        return rounded + (w - w.detach()) if self.straight and torch.is_grad_enabled() else rounded

    def bits(self) -> int:
        return 8 * (-(-self.index.numel() * self.width // 8) + self.params.nbytes)

    def format(self) -> str:
        return f"{self.width}-bit codes"

    def parts(self) -> tuple[Arrays, Streams]:
        return {"params": self.params.detach().cpu().numpy()}, {"codes": (self.index.flatten().cpu().numpy(), self.width)}

    def meta(self) -> dict[str, Any]:
        shapes = {"shape": list(self.values.shape), "params": list(self.params.shape), "codes": self.index.shape[1], "axes": list(self.axes)}
        return {"type": "codes", "grid": self.grid, "count": self.count, "columns": self.columns, **shapes, **vectors_meta(self.vectors)}

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        groups, codes, total, d = meta["params"][0], meta["codes"], math.prod(meta["shape"]), _dimension(meta)
        storage.need(1 <= meta["count"] <= MOST, f"{meta['count']} levels are not between 1 and {MOST:,}")
        most = 4 * total + MOST  # levels are worked out group by group, and must not take more memory than a few weights of this shape
        storage.need(groups * meta["count"] * d <= most, f"{groups:,} groups of {meta['count']:,} levels are too many for {total:,} weights")
        storage.need(groups * codes * d == total, f"{groups} groups of {codes} codes of {d} weights are not a weight of {total:,}")
        return {"codes": ((meta["count"] - 1).bit_length(), groups * codes)}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Codes:
        count, grid, shape = meta["count"], meta["grid"], tuple(meta["params"])
        storage.need(grid in GRIDS, f"the grid {grid!r} is not known; known are {', '.join(GRIDS)}")
        storage.need(_fits(grid, shape, count), f"{list(shape)} numbers do not make {count} levels of a {grid} grid")
        storage.need(plain["params"].size == math.prod(shape), f"the levels are made of {math.prod(shape)} numbers, not {plain['params'].size}")
        codes = streams["codes"].astype(np.int64).reshape(shape[0], -1)
        storage.need(codes.size == 0 or codes.max() < count, f"a code is not below {count}")
        params = torch.from_numpy(plain["params"].copy()).reshape(shape)
        values, axes = torch.empty(tuple(meta["shape"]), dtype=params.dtype), tuple(meta.get("axes", ()))
        storage.need(not axes or sorted(axes) == list(range(values.dim())), f"{list(axes)} are not the axes of a weight of {values.dim()}")
        found = cls(values, torch.from_numpy(codes), params, count, grid, bool(meta["columns"]), straight=False, vectors=vectors_of(meta), axes=axes)
        storage.need(bool(found.levels.isfinite().all()), "a level is not finite")
        return replace(found, values=found.rounded())

    def frozen(self) -> Codes:
        params = self.params.detach().clone()
        return replace(self, values=self.rounded().detach(), index=self.index.clone(), params=params, straight=False, state={})


def _dimension(meta: dict[str, Any]) -> int:
    """How many weights a code stands for."""
    return meta["params"][2] if len(meta["params"]) == 3 else 1


def _fits(grid: str, shape: tuple[int, ...], count: int) -> bool:
    """Whether params of this shape make ``count`` levels."""
    if grid == "table":
        return len(shape) in (2, 3) and shape[1] == count
    fits = {"linear": lambda p: p in (1, 2), "powers": lambda p: p == 1 and count % 2 == 1, "basis": lambda p: p < 17 and 1 << p == count,
            "floats": lambda p: p == 2 and count % 2 == 1, "tree": lambda p: p == 1 and count in (1 << b for b in range(2, 17))}  # fmt: skip
    return len(shape) == 2 and fits[grid](shape[1])


def nearest_level(w: Tensor, levels: Tensor) -> Tensor:
    """The number of the level nearest to each entry: w (groups, n), levels (groups, count) in any order; halfway, the higher level."""
    rising, order = levels.sort(1)
    middles = (rising[:, 1:] + rising[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(middles.contiguous(), w.contiguous(), right=True))


def sign_term(left: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """The multiple of a sign, with sign(0) = +1, that is nearest to ``left`` along ``dim``: (its size, the mean magnitude; the sign)."""
    return left.abs().mean(dim, keepdim=True), torch.where(left >= 0, 1.0, -1.0).to(left)


def grouped(w: Tensor, per: str) -> Tensor:
    """The weight as (groups, entries): one group for the ``tensor``, one for each ``filter`` (row), or runs of at most 32 (``group``) within a row.

    The run is the longest that divides the row evenly. ValueError where that is below 8, as the scales would then outweigh the codes.
    """
    if per == "tensor":
        return w.reshape(1, -1)
    if w.dim() < 2:
        raise ValueError(f"per={per!r} needs whole rows, but of a pruned layer only single weights are left; use per='tensor'")
    row = w[0].numel()
    run = row if per == "filter" else max(d for d in range(1, min(row, 32) + 1) if row % d == 0)
    if run < min(row, SHORTEST):
        raise ValueError(f"per='group' cuts rows into equal runs of 8 to 32 weights, which {row} weights do not allow; use per='filter'")
    return w.reshape(-1, run)


@dataclass(frozen=True, eq=False)
class SparseCodes(Packed):
    """A pruned weight whose surviving entries are codes (or a sum, or plain values): ``codes``, those where ``mask``, in order, as one vector.

    Where they sit is stored as a bitmap or, in ``gap_bits`` bits each, as the number of removed weights before each; the highest number says
    that as many weights are skipped and none stands there. Without ``gap_bits`` the smallest is taken.
    """

    values: Tensor
    mask: Tensor
    codes: Codes | Sum | Masked
    gap_bits: int | None = None
    state: State = field(default_factory=dict)
    vectors: tuple[tuple[str, int], ...] = ()

    def through(self, w: Tensor) -> Tensor:
        return torch.zeros_like(w).masked_scatter(self.mask, self.codes.through(self.codes.values).to(w.dtype))

    @property
    def width(self) -> int:
        return self.codes.width

    @cached_property
    def _gaps(self) -> tuple[str, np.ndarray, int]:
        """The cheapest way to say where the weights sit, or the one asked for: (name of the stream, its numbers, bits of each)."""
        if self.gap_bits is not None:
            return "gaps", storage.with_escapes(self.places, self.gap_bits), self.gap_bits
        found = [("gaps", storage.with_escapes(self.places, k), k) for k in range(2, 9)]
        return min([*found, ("bitmap", self.mask.flatten().cpu().numpy().astype(np.uint8), 1)], key=lambda one: len(one[1]) * one[2])

    def format(self) -> str:
        return f"{self.codes.format()} + {'bitmap' if self._gaps[0] == 'bitmap' else f'{self._gaps[2]}-bit gaps'}"

    def parts(self) -> tuple[Arrays, Streams]:
        plain, streams = self.codes.parts()
        name, numbers, k = self._gaps
        return plain, {**streams, name: (numbers, k)}

    def bits(self) -> int:
        _, numbers, k = self._gaps
        return self.codes.bits() + 8 * -(-len(numbers) * k // 8)

    def meta(self) -> dict[str, Any]:
        name, numbers, k = self._gaps
        where = {"places": name, "k": k, "entries": len(numbers)}
        return {"type": "sparse codes", "shape": list(self.mask.shape), "codes": self.codes.meta(), **where, **vectors_meta(self.vectors)}

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        total, (kept,) = math.prod(meta["shape"]), meta["codes"]["shape"]
        storage.need(meta["places"] in ("gaps", "bitmap"), f"places are gaps or a bitmap, not {meta['places']!r}")
        storage.need(kept <= meta["entries"] <= total and 1 <= meta["k"] <= 16, "the places do not fit the shape")
        storage.need(meta["codes"]["type"] in KEPT, f"what is kept is one of {', '.join(KEPT)}, not {meta['codes']['type']!r}")
        return {**KEPT[meta["codes"]["type"]].widths(plain, meta["codes"]), meta["places"]: (meta["k"], meta["entries"])}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> SparseCodes:
        streams = dict(streams)
        k, numbers, total = meta["k"], streams.pop(meta["places"]), math.prod(meta["shape"])
        codes = KEPT[meta["codes"]["type"]].rebuild(plain, streams, meta["codes"])
        bitmap = meta["places"] == "bitmap"
        places = np.flatnonzero(numbers) if bitmap else storage.without_escapes(numbers, k)
        storage.need(len(places) == codes.kept and (not len(places) or places[-1] < total), "the places do not fit the codes")
        storage.need(not bitmap or (k == 1 and len(numbers) == total), "the bitmap does not fit the shape")
        mask = torch.zeros(total, dtype=torch.bool)
        mask[torch.from_numpy(places)] = True
        mask = mask.reshape(tuple(meta["shape"]))
        values = torch.zeros(mask.shape, dtype=codes.values.dtype).masked_scatter(mask, codes.values)
        return cls(values, mask, codes, None if bitmap else k, vectors=vectors_of(meta))

    def frozen(self) -> SparseCodes:
        return replace(self, values=self.dense().detach(), mask=self.mask.clone(), codes=self.codes.frozen(), state={})


@dataclass(frozen=True, eq=False)
class Sum(Whole):
    """A weight that is the sum of several packed values of its shape, each with latent values of its own."""

    values: Tensor
    terms: tuple[Packed, ...]
    state: State = field(default_factory=dict)
    vectors: tuple[tuple[str, int], ...] = ()

    def through(self, w: Tensor) -> Tensor:
        return sum(p.through(p.values) for p in self.terms)

    def format(self) -> str:
        return " + ".join(p.format() for p in self.terms)

    def bits(self) -> int:
        return sum(p.bits() for p in self.terms)

    def parts(self) -> tuple[Arrays, Streams]:
        plain: Arrays = {}
        streams: Streams = {}
        for i, term in enumerate(self.terms):
            a, s = term.parts()
            plain |= {f"{i}.{n}": v for n, v in a.items()}
            streams |= {f"{i}.{n}": v for n, v in s.items()}
        return plain, streams

    def meta(self) -> dict[str, Any]:
        return {"type": "sum", "shape": list(self.values.shape), "terms": [p.meta() for p in self.terms], **vectors_meta(self.vectors)}

    @classmethod
    def widths(cls, plain: Arrays, meta: dict[str, Any]) -> Widths:
        storage.need(0 < len(meta["terms"]) <= 8, f"a sum of {len(meta['terms'])} terms; 1 to 8 are allowed")
        storage.need(all(m["shape"] == meta["shape"] for m in meta["terms"]), "the terms of a sum are not of its shape")
        found = [(i, TERMS[m["type"]].widths(_under(i, plain), m)) for i, m in enumerate(meta["terms"])]
        return {f"{i}.{n}": w for i, widths in found for n, w in widths.items()}

    @classmethod
    def rebuild(cls, plain: Arrays, streams: Arrays, meta: dict[str, Any]) -> Sum:
        terms = tuple(TERMS[m["type"]].rebuild(_under(i, plain), _under(i, streams), m) for i, m in enumerate(meta["terms"]))
        return cls(sum(p.dense() for p in terms), terms, vectors=vectors_of(meta))

    def frozen(self) -> Sum:
        terms = tuple(p.frozen() for p in self.terms)
        return replace(self, values=sum(p.dense() for p in terms), terms=terms, state={})


def _under(i: int, arrays: Arrays) -> Arrays:
    start = f"{i}."
    return {n.removeprefix(start): a for n, a in arrays.items() if n.startswith(start)}


TERMS: dict[str, type[Packed]] = {"masked": Masked, "codes": Codes, "sparse codes": SparseCodes}  # of a sum
KEPT: dict[str, type[Packed]] = {**TERMS, "sum": Sum}  # of what pruning left
