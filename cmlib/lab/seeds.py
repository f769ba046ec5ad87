"""What a few seeds say of a difference."""

from __future__ import annotations

from collections.abc import Sequence

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
