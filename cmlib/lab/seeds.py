"""What a few seeds say of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit


def difference(a: Sequence[float] | pd.Series, b: Sequence[float] | pd.Series, *, level: float = 0.95) -> tuple[float, float]:
    """(mean of ``a`` less ``b``, half of its confidence interval), seed by seed: Student's t of the paired differences.

    Two series are paired by their index, two sequences by their order. The half is infinite where fewer than two seeds are in both.
    ValueError where two sequences are not equally long.
    """
    if not _indexed(a, b) and len(a) != len(b):
        raise ValueError(f"a has {len(a)} seeds, b {len(b)}: give both the same seeds, or series with the seeds as their index")
    both = pd.concat([pd.Series(a, dtype=float), pd.Series(b, dtype=float)], axis=1, join="inner")
    change = both.iloc[:, 0] - both.iloc[:, 1]
    if len(change) < 2:
        return float(change.mean()), float("inf")
    return float(change.mean()), float(stdtrit(len(change) - 1, (1 + level) / 2) * change.std() / np.sqrt(len(change)))


def _indexed(*values: Any) -> bool:
    return all(isinstance(v, pd.Series) for v in values)
