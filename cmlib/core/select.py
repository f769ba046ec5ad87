"""From scores to masks: what a unit is, which units compete with one another, and how many stay.

A unit is what is removed whole: a single weight, a row of the weight matrix (an output neuron), a filter (a row with all that belongs to its
channel: see ``channels``), an input channel, a shape (a column of the weight matrix: the same place in all filters), a 2-D kernel, a block, or n
weights of every m. Its score is the sum of its weights' scores, or what the method says of it where the method scores filters. ``scope`` says whether
units compete within their layer or across the whole network. The same numbers always give the same mask, and masks are nested in ``keep``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .knobs import Keep, Pick, Threshold

Units = Annotated[str, Pick("weight", "row", "filter", "channel", "shape", "kernel", "block:4x4", "block:8x8", "2:4", "1:4", "4:8")]
Scope = Annotated[str, Pick("layer", "network")]
Storage = Annotated[str, Pick("auto", "dense", "bitmap", "csr", "relative")]
Scores = dict[str, Tensor]
Masks = dict[str, Tensor]


def selection(*, keep: Keep = 0.1, threshold: Threshold = None, unit: Units = "weight", scope: Scope = "layer", storage: Storage = "auto") -> None:
    """The knobs of selection, which every score has: ``keep`` (share of units that stay) or ``threshold`` (score below which they go)."""


def removed(total: int, keep: float) -> int:
    """How many of ``total`` units go: round((1 - keep) * total), as in torch.nn.utils.prune."""
    return round((1 - keep) * total)


def _order(flat: Tensor) -> Tensor:
    """Rank of each entry, 0 for the highest score; of equal scores the lower index ranks first, so it stays.

    A stable argsort takes three times as long as NumPy's plain one and, where there are ties, a second sort that puts them in order.
    """
    exact = flat if flat.dtype in (torch.float32, torch.float64) else flat.double()
    scores = exact.detach().cpu().numpy()
    order = np.argsort(-scores)
    ranked = scores[order]
    apart = ranked[1:] != ranked[:-1]
    if not apart.all():
        group_and_index = np.r_[0, apart.cumsum()] << 32 | order
        group_and_index.sort()
        order = group_and_index & 0xFFFFFFFF
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return torch.from_numpy(rank).to(flat.device)


def _kernels(s: Tensor) -> Tensor:
    return s.flatten(2).sum(2) if s.dim() > 2 else s


def _blocks(s: Tensor, height: int, width: int) -> Tensor:
    """Sums over blocks of the weight matrix (out, rest); the last blocks may be smaller."""
    m = s.flatten(1)
    m = F.pad(m, (0, -m.shape[1] % width, 0, -m.shape[0] % height))
    return m.unflatten(1, (-1, width)).unflatten(0, (-1, height)).sum((1, 3))


def to_units(s: Tensor, unit: str, shape: torch.Size | None = None) -> Tensor:
    """Scores of units from scores that broadcast to a weight of ``shape`` (their own, if not given)."""
    shape = shape or s.shape
    if unit in ("row", "filter"):
        return s.flatten() if s.numel() == shape[0] else s.expand(shape).flatten(1).sum(1)
    s = s.expand(shape)
    if unit == "channel":
        return s.transpose(0, 1).flatten(1).sum(1)
    if unit == "shape":
        return s.sum(0)
    if unit == "kernel":
        return _kernels(s)
    if unit.startswith("block:"):
        return _blocks(s, *_pair(unit))
    return s


def to_weights(kept: Tensor, unit: str, shape: torch.Size) -> Tensor:
    """A mask of weights from a mask of units."""
    if unit.startswith("block:"):
        height, width = _pair(unit)
        rows, columns = shape[0], shape.numel() // shape[0]
        return kept.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns].reshape(shape)
    if unit == "channel":
        return kept.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    if unit == "shape":
        return kept.expand(shape)
    return kept.reshape(*kept.shape, *[1] * (len(shape) - kept.dim())).expand(shape)


def _pair(unit: str) -> tuple[int, int]:
    first, second = re.findall(r"\d+", unit)
    return int(first), int(second)


def is_n_of_m(unit: str) -> bool:
    return re.fullmatch(r"\d+:\d+", unit) is not None


def n_of_m(s: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n best of every m weights along each row; a short last group keeps its n best too."""
    rows = s.flatten(1)
    groups = F.pad(rows, (0, -rows.shape[1] % m), value=-torch.inf).unflatten(1, (-1, m))
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(1)[:, : rows.shape[1]].reshape(s.shape)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Units put in order once; every ``keep`` and ``threshold`` is then a comparison."""

    scores: Scores  # each broadcasts to its weight
    shapes: dict[str, torch.Size]  # of the weights
    unit: str
    scope: str
    ranks: dict[str, Tensor]  # of units; across the network where that is the scope
    total: dict[str, int]  # how many units compete in each layer's scope

    def at(self, keep: float) -> Masks:
        """Masks that keep ``keep`` of the units of each scope."""
        if is_n_of_m(self.unit):
            return {name: n_of_m(s.expand(self.shapes[name]), *_pair(self.unit)) for name, s in self.scores.items()}
        return self._masks(lambda name: self.ranks[name] < self.total[name] - removed(self.total[name], keep))

    def above(self, threshold: float) -> Masks:
        """Masks of the units whose score is at least ``threshold``."""
        return self._masks(lambda name: to_units(self.scores[name], self.unit, self.shapes[name]) >= threshold)

    def _masks(self, kept: Callable[[str], Tensor]) -> Masks:
        return {name: to_weights(kept(name), self.unit, shape) for name, shape in self.shapes.items()}


def rank(scores: Scores, unit: str = "weight", scope: str = "layer", shapes: dict[str, torch.Size] | None = None) -> Ranking:
    """Put the units of ``scores`` ({layer: tensor that broadcasts to its weight of ``shapes``}, or of its weight's shape) in order."""
    shapes = shapes or {name: s.shape for name, s in scores.items()}
    if is_n_of_m(unit):
        return Ranking(scores, shapes, unit, scope, {}, {})
    units = {name: to_units(s, unit, shapes[name]) for name, s in scores.items()}
    if scope == "network":
        flat = _order(torch.cat([u.flatten() for u in units.values()]))
        parts = flat.split([u.numel() for u in units.values()])
        ranks = {name: part.reshape(u.shape) for (name, u), part in zip(units.items(), parts, strict=True)}
        return Ranking(scores, shapes, unit, scope, ranks, dict.fromkeys(units, len(flat)))
    ranks = {name: _order(u.flatten()).reshape(u.shape) for name, u in units.items()}
    return Ranking(scores, shapes, unit, scope, ranks, {name: u.numel() for name, u in units.items()})


def highest(score: Tensor, count: int) -> Tensor:
    """The mask of the ``count`` highest numbers of a tensor; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    flat = score.flatten()
    least = flat.kthvalue(len(flat) - count + 1).values
    above, ties = flat > least, flat == least
    return (above | (ties & (ties.cumsum(0) <= count - above.sum()))).reshape(score.shape)


def select(scores: Scores | Tensor, keep: float = 0.1, *, threshold: float | None = None, unit: str = "weight", scope: str = "layer"):
    """Masks for ``scores`` ({layer: tensor}, or one tensor): ``keep`` of the units stay, or those at or above ``threshold``."""
    if isinstance(scores, Tensor):
        return select({"": scores}, keep, threshold=threshold, unit=unit, scope=scope)[""]
    ranking = rank(scores, unit, scope)
    return ranking.at(keep) if threshold is None else ranking.above(threshold)
