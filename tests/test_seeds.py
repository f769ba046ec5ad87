"""What a few seeds say of a difference, against scipy's own interval and by repeated drawing."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cmlib.lab.seeds import compare, difference, verdicts

A, B = [0.91, 0.93, 0.92, 0.95], [0.90, 0.91, 0.92, 0.92]


def test_the_interval_is_scipys():
    low, high = stats.ttest_rel(A, B).confidence_interval(0.95)
    mean, half = difference(A, B)
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-12)


def test_nineteen_in_twenty_intervals_hold_the_truth():
    draw = np.random.default_rng(0)
    found = [difference(a, b) for a, b in draw.normal(size=(2000, 2, 3)) + np.array([[0.5], [0.0]])]
    assert np.mean([abs(mean - 0.5) <= half for mean, half in found]) == pytest.approx(0.95, abs=0.015)


def test_series_are_paired_by_seed_and_what_only_one_has_is_left_out():
    one, other = pd.Series([0.9, 0.8, 0.7, 0.3], [0, 1, 2, 7]), pd.Series([0.6, 0.75, 0.1, float("nan")], [1, 0, 5, 2])
    assert difference(one, other) == pytest.approx(difference([0.9, 0.8], [0.75, 0.6]), abs=1e-12)


def test_one_seed_decides_nothing():
    assert difference([0.9], [0.1])[1] == float("inf")
    assert compare("a", "b", {"a": [0.9], "b": [0.1]}) == "a − b: +80.0 points, one seed (**inconclusive**)"


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        ([1, 2, 3], [1, 2], "a has 3 seeds, b 2"),
        (pd.Series([1.0], [0]), [1.0], "cannot be paired"),
        (pd.Series([1.0], [0]), pd.Series([1.0], [1]), "no seed is in both"),
        ([], [], "no seed is in both"),
    ],
)
def test_what_cannot_be_paired_is_refused(a, b, why):
    with pytest.raises(ValueError, match=why):
        difference(a, b)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([0.92, 0.921, 0.919], [0.90, 0.90, 0.90], "+2.0 ± 0.2 points"),
        ([0.90, 0.90, 0.90], [0.92, 0.921, 0.919], "−2.0 ± 0.2 points"),  # a loss is a verdict, too
        ([0.91, 0.92, 0.96], [0.90, 0.90, 0.90], "+3.0 ± 6.6 points (**inconclusive**)"),  # one sign is not yet one
        ([0.91, 0.92, 0.93], [0.90, 0.90, 0.90], "+2.0 ± 2.5 points (**inconclusive**)"),
        ([0.006, 0.010, 0.014], [0, 0, 0], "+1.00 ± 0.99 points"),  # rounded further they would touch
        ([0.9, 0.8], [0.9, 0.8], "+0.0 points in every seed"),
    ],
)
def test_the_verdict_is_the_intervals(a, b, said):
    assert compare("a", "b", {"a": a, "b": b}) == f"a − b: {said}"


def test_verdicts_are_those_that_are_told_apart_and_a_count_of_the_rest():
    values = {"a": [0.92, 0.921, 0.919], "b": [0.90, 0.90, 0.90], "c": [0.80, 0.91, 0.99]}
    assert verdicts([("a", "b"), ("a", "c"), ("b", "c")], values) == "a − b: +2.0 ± 0.2 points; the other 2 comparisons inconclusive"
    assert verdicts([("a", "b")], values) == "a − b: +2.0 ± 0.2 points"
    assert verdicts([("a", "c")], values) == "1 comparison inconclusive"
    assert verdicts([("a", "a"), ("a", "b")], values).endswith("; the other 1 comparison inconclusive")  # the same in every seed
    named = {"inconclusive": values["a"], "b": values["b"]}
    assert verdicts([("inconclusive", "b")], named) == "inconclusive − b: +2.0 ± 0.2 points"
