"""What a few seeds say of a difference, against scipy's own interval and by repeated drawing."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cmlib.lab.seeds import difference
from cmlib.view.plots import compare

A, B = [0.91, 0.93, 0.92, 0.95], [0.90, 0.91, 0.92, 0.92]


def test_the_interval_is_scipys():
    low, high = stats.ttest_rel(A, B).confidence_interval(0.95)
    mean, half = difference(A, B)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-12)


def test_nineteen_in_twenty_intervals_hold_the_truth():
    draw = np.random.default_rng(0)
    found = [difference(a, b) for a, b in draw.normal(size=(2000, 2, 3)) + np.array([[0.5], [0.0]])]
    assert np.mean([abs(mean - 0.5) <= half for mean, half in found]) == pytest.approx(0.95, abs=0.015)


def test_series_are_paired_by_seed():
    one, other = pd.Series([0.9, 0.8, 0.7], [0, 1, 2]), pd.Series([0.6, 0.7, 0.1], [1, 0, 5])
    assert difference(one, other) == pytest.approx((0.2, 0), abs=1e-12)


def test_one_seed_decides_nothing():
    assert difference([0.9], [0.1])[1] == float("inf")
    assert compare("a", "b", {"a": [0.9], "b": [0.1]}) == "a − b: +80.0 points, one seed (**inconclusive**)"


def test_seeds_missing_on_one_side_are_refused():
    with pytest.raises(ValueError, match="a has 3 seeds, b 2"):
        difference([1, 2, 3], [1, 2])


def test_one_sign_is_not_yet_a_verdict():
    assert "inconclusive" in compare("a", "b", {"a": [0.91, 0.92, 0.96], "b": [0.90, 0.90, 0.90]})
    assert compare("a", "b", {"a": [0.92, 0.921, 0.919], "b": [0.90, 0.90, 0.90]}) == "a − b: +2.0 ± 0.2 points"
