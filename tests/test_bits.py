"""Bits for each layer: the scan of layers and the choice under a budget."""

import itertools

import pandas as pd
import pytest
import torch

from cmlib import compress, evaluate, load_data, load_net
from cmlib.core.apply import plan_of
from cmlib.lab.bits import bit_sensitivity, bits_within, compress_bits

METHOD = "integer_only_quantization"


@pytest.fixture(scope="module")
def digits():
    return load_net("mlp", "digits"), load_data("digits")


@pytest.fixture(scope="module")
def table(digits):
    return bit_sensitivity(digits[0], METHOD, digits[1], bits=(8, 4, 2), a_bits=32)


def test_a_line_is_the_accuracy_with_that_layer_alone_quantized(digits, table):
    net, data = digits
    assert set(table.layer) == {"fc1", "fc2"} and len(table) == 6
    for line in table.itertuples():
        alone = compress(net, METHOD, where=line.layer, bits=line.bits, a_bits=32, data=data)
        assert line.accuracy == evaluate(alone, data) and line.bytes == plan_of(alone)[line.layer].bits() // 8
        assert line.drop == pytest.approx(evaluate(net, data) - line.accuracy)


def scan(losses):
    rows = [{"layer": n, "bits": b, "bytes": 100 * b * size, "drop": d} for n, size, found in losses for b, d in found.items()]
    return pd.DataFrame(rows).assign(accuracy=0.9)


TABLE = scan([("a", 1, {8: 0.0, 4: 0.01, 2: 0.3}), ("b", 5, {8: 0.0, 4: 0.002, 2: 0.02}), ("c", 2, {8: -0.01, 4: 0.05, 2: 0.06})])


@pytest.mark.parametrize("budget", [1600, 2000, 2600, 3000, 4000, 6400])
def test_the_choice_is_the_best_of_all(budget):
    lines = [list(g.itertuples()) for _, g in TABLE.groupby("layer", sort=False)]
    every = [(sum(max(r.drop, 0) for r in c), sum(r.bytes for r in c)) for c in itertools.product(*lines)]
    best = min(drop for drop, size in every if size <= budget)
    found = bits_within(TABLE, budget)
    assert found.bytes <= budget and found.drop == pytest.approx(best, abs=1e-12)
    assert found.bytes == min(size for drop, size in every if size <= budget and drop <= best + 1e-12)


def test_a_budget_below_the_fewest_bits_is_refused_with_what_they_take():
    with pytest.raises(ValueError, match=r"budget=1,599 bytes is too small.*1,600"):
        bits_within(TABLE, 1599)


def test_each_layer_gets_its_own_bits_and_keeps_them_in_training(digits):
    net, data = digits
    small = compress_bits(net, METHOD, {"fc1": 3, "fc2": 6}, data=data, a_bits=32)
    small.train()(torch.rand(4, 1, 8, 8)).sum().backward()
    plan = plan_of(small)
    assert {n: p.width for n, p in plan.items()} == {"fc1": 3, "fc2": 6}
    assert all(len(p.dense().unique()) <= 1 << p.width for p in plan.values())


def test_what_cannot_be_is_named(digits):
    with pytest.raises(ValueError, match=r"magnitude_pruning_han has no knob 'bits'"):
        bit_sensitivity(digits[0], "magnitude_pruning_han", digits[1])
    with pytest.raises(ValueError, match=r"no layer 'fc9'.*fc"):
        compress_bits(digits[0], METHOD, {"fc9": 3})
