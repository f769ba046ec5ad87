"""What a few seeds say of a difference, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit


def difference(a: Sequence[float] | pd.Series, b: Sequence[float] | pd.Series) -> tuple[float, float]:
    """(mean of ``a`` less ``b``, half of its 95 % confidence interval): Student's t of the differences seed by seed.

    Two series are paired by their index, what only one of them has left out; two sequences by their order. One pair's half is infinite.
    ValueError where a series meets a sequence, two sequences are not equally long, or no seed is in both.
    """
    if isinstance(a, pd.Series) != isinstance(b, pd.Series):
        raise ValueError("a series and a plain sequence cannot be paired: give two series with the seeds as their index, or two sequences")
    if not isinstance(a, pd.Series) and len(a) != len(b):
        raise ValueError(f"a has {len(a)} seeds, b {len(b)}: give both the same seeds, or series with the seeds as their index")
    both = pd.concat([pd.Series(a, dtype=float), pd.Series(b, dtype=float)], axis=1).dropna()
    change = both.iloc[:, 0] - both.iloc[:, 1]
    if change.empty:
        raise ValueError("no seed is in both a and b")
    half = stdtrit(len(change) - 1, 0.975) * change.std() / np.sqrt(len(change)) if len(change) > 1 else float("inf")
    return float(change.mean()), float(half)


def compare(a: str, b: str, values: Mapping[str, Any]) -> str:
    """Two rows of ``values`` (accuracies, seed by seed) in points: mean difference ± half its 95 % interval, inconclusive where that holds 0."""
    return _compared(a, b, values)[0]


def verdicts(pairs: Sequence[tuple[str, str]], values: Mapping[str, Any]) -> str:
    """``compare`` for those of the ``pairs`` that are told apart, and how many are not."""
    found = [_compared(a, b, values) for a, b in pairs]
    told = [said for said, apart in found if apart]
    count = len(pairs) - len(told)
    rest = f"{'the other ' if told else ''}{count} comparison{'s' * (count > 1)} inconclusive"
    return "; ".join(told + [rest] * bool(count))


def _compared(a: str, b: str, values: Mapping[str, Any]) -> tuple[str, bool]:
    """(the difference in words, whether it is told apart from 0); digits are added until the rounded figures say what the verdict says."""
    mean, half = (100 * v for v in difference(values[a], values[b]))
    told = abs(mean) > max(half, 1e-9)
    if half < 1e-9:
        return f"{a} − {b}: {_signed(mean, 1)} points in every seed", told
    digits = next((d for d in (1, 2, 3) if (round(abs(mean), d) > round(half, d)) == told), 3)
    spread = f" ± {half:.{digits}f} points" if np.isfinite(half) else " points, one seed"
    return f"{a} − {b}: {_signed(mean, digits)}{spread}" + ("" if told else " (**inconclusive**)"), told


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
