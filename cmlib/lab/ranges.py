"""The ranges that codes of few bits cover: from a ``Histogram`` of the values by one of ``RULES``, and from a range scale and zero point."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..core import rounding
from ..core.knobs import nearest
from ..core.rounding import Affine

BINS = 4096  # of a histogram, half of them on either side of zero
FEWEST = 128  # bins that entropy calibration keeps at least
PER = ("tensor", "filter")
TINY = torch.finfo(torch.float32).tiny
Range = tuple[float, float]


def known_bits(bits: int) -> int:
    """The number itself. ValueError outside 1 to 16."""
    if not (isinstance(bits, int) and 1 <= bits <= 16):
        raise ValueError(f"bits={bits!r} is not allowed: a whole number from 1 to 16")
    return bits


def affine(lo: float | Tensor, hi: float | Tensor, bits: int = 8) -> Affine:
    """``core.rounding.affine`` of a range, for codes of ``bits`` bits.

    Where lo and hi are tensors, one of each an entry. ValueError for a range that is not finite, upside down, or zero alone.
    """
    lo, hi = (torch.as_tensor(t, dtype=torch.float32) for t in (lo, hi))
    if not (torch.isfinite(lo) & torch.isfinite(hi) & (lo <= hi)).all():
        raise ValueError(f"a range from {lo.tolist()} to {hi.tolist()} is not one: finite numbers, the lower first")
    if not (torch.maximum(hi, -lo) / 2 ** known_bits(bits) > TINY).all():
        raise ValueError("a range from 0 to 0 has no scale: every number in it is 0 (or too small for float32)")
    return rounding.affine(lo, hi, 2**bits)


def weight_affine(w: Tensor, bits: int = 8, per: str = "tensor") -> Affine:
    """Scale and zero point of a weight's own range, of the whole tensor or of each filter (``per``).

    A filter of zeros among others takes any scale. ValueError for a weight that is all zero or not finite.
    """
    if per not in PER:
        raise ValueError(f"per={per!r} is not allowed: one of {', '.join(PER)}")
    if not w.isfinite().all() or not w.any():
        raise ValueError("its weights are all zero, so they have no scale" if w.isfinite().all() else "it has weights that are not finite")
    lo, hi = torch.aminmax(w.detach().flatten(1), dim=1) if per == "filter" else torch.aminmax(w.detach())
    if per == "filter":
        lo, hi = (t.reshape(-1, *[1] * (w.dim() - 1)) for t in (lo, torch.where((lo == 0) & (hi == 0), 1.0, hi)))
    return affine(lo, hi, bits)


@dataclass(eq=False)
class Histogram:
    """How often values of each size were seen, in BINS equal bins from -reach to reach; ``add`` doubles ``reach`` where a value lies outside."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    reach: float = 2.0**-40
    lo: float = math.inf
    hi: float = -math.inf

    def add(self, x: Tensor) -> None:
        """Count the values of a tensor. ValueError where one is not finite."""
        low, high = (t.item() for t in x.aminmax())
        if not math.isfinite(high - low):
            raise ValueError("it meets values that are not finite")
        self.lo, self.hi = min(self.lo, low), max(self.hi, high)
        while max(-low, high) > self.reach:
            merged = self.counts.reshape(-1, 2).sum(1)  # zero lies between two bins, so pairs never straddle it
            self.counts, self.reach = np.pad(merged, BINS // 4), 2 * self.reach
        self.counts += torch.histc(x.double(), BINS, -self.reach, self.reach).cpu().numpy()

    @property
    def centers(self) -> np.ndarray:
        return (np.arange(BINS) + 0.5 - BINS / 2) * self.width

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * self.reach / BINS

    def magnitudes(self) -> np.ndarray:
        """Counts of |x| in bins of the same width from 0 on, up to the last that is not empty."""
        both = self.counts[BINS // 2 :] + self.counts[BINS // 2 - 1 :: -1]
        return both[: np.flatnonzero(both)[-1] + 1]

    def within(self, threshold: float) -> Range:
        """Zero, and what was seen of -threshold to threshold."""
        return max(min(self.lo, 0.0), -float(threshold)), min(max(self.hi, 0.0), float(threshold))


Rule = Callable[[Histogram, int], Range]


def minmax(h: Histogram, bits: int) -> Range:
    """Everything that was seen."""
    return h.lo, h.hi


def percentile(h: Histogram, bits: int, *, share: float) -> Range:
    """The smallest |x| that ``share`` of the values do not exceed, to within a bin, on both sides of zero."""
    seen = h.magnitudes().cumsum()
    return h.within((np.searchsorted(seen, share * seen[-1]) + 1) * h.width)


def squared_error(h: Histogram, bits: int) -> Range:
    """The range within which codes of ``bits`` bits and back lose least of the values, clipped ones included: mean squared error, 100 tried."""
    top = max(-h.lo, h.hi)
    x = torch.from_numpy(h.centers)

    def lost(share: float) -> float:
        return float(h.counts @ (affine(*h.within(share * top), bits).rounded(x) - x).square().numpy())

    return h.within(min(np.arange(100, 0, -1) / 100, key=lost) * top)


def entropy(h: Histogram, bits: int) -> Range:
    """TensorRT's entropy calibration: the threshold on |x| whose codes tell least apart from the values (Migacz 2017, 8-bit inference with TensorRT).

    For each number i of bins kept, P is the counts with all that lies outside in the last bin, Q the counts inside merged into one bin a level and
    spread evenly over those of their bins that are not empty; the i of the least KL(P || Q) wins. A level on each side where values have both signs.
    """
    counts, levels = h.magnitudes(), 2 ** (bits - (h.lo < 0 < h.hi))
    start = max(levels, FEWEST)
    if len(counts) <= start:
        return minmax(h, bits)
    counts[0] = counts[1]  # zero is exact at every scale: the many zeros behind a ReLU must not decide it
    best = min(range(len(counts), start - 1, -1), key=lambda i: divergence(counts, i, levels))
    return h.within((best + 0.5) * h.width)


def divergence(counts: np.ndarray, kept: int, levels: int) -> float:
    """KL(P || Q) of ``entropy`` in nats where the first ``kept`` bins stay; infinite where Q has nothing for some of P."""
    inside = counts[:kept]
    p = inside.copy()
    p[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    share = np.bincount(level, inside, levels) / np.maximum(np.bincount(level, inside > 0, levels), 1)
    q = np.where(inside > 0, share[level], 0.0)
    p, q = p[p > 0], q[p > 0]
    return float((p * np.log(p * q.sum() / (q * p.sum()))).sum() / p.sum()) if (q > 0).all() else math.inf


RULES: dict[str, Rule] = {
    "minmax": minmax,
    "percentile 99.99": partial(percentile, share=0.9999),
    "percentile 99.9": partial(percentile, share=0.999),
    "entropy": entropy,
    "mse": squared_error,
}


def rule(how: str) -> Rule:
    """The rule of that name. ValueError for a name that is none."""
    if how not in RULES:
        raise ValueError(f"how={how!r} is not known{nearest(how, RULES)}; the rules are {', '.join(RULES)}")
    return RULES[how]


def counted(found: dict[str, Histogram], name: str, x: Tensor) -> None:
    """Add a tensor to the histogram of that name."""
    try:
        found.setdefault(name, Histogram()).add(x)
    except ValueError as error:
        raise ValueError(f"no range can be read off for {name}: {error}") from error


def varied(found: dict[str, Histogram]) -> dict[str, Histogram]:
    """The histograms, each of more than one value. ValueError else."""
    for name, h in found.items():
        if h.lo == h.hi:
            raise ValueError(f"{name} meets nothing but {h.lo:g} on the calibration images, so no range can be read off; give images that differ")
    return found
