"""Layer by layer: the scan against compress and evaluate, totals against arithmetic done by hand, batch norm against its definition."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from cmlib.core.bake import bake
from cmlib.core.method import score
from cmlib.lab import ratios
from cmlib.lab.cost import layer_costs
from cmlib.lab.data import load_data
from cmlib.lab.train import evaluate, predict
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build, load_net

MAGNITUDE = "magnitude_pruning_han"
TIED = "block2.conv2, block2.shortcut.conv, block3.conv2"


@pytest.fixture(scope="module")
def some():
    """600 of MNIST's validation images, with labels."""
    images, labels = load_data("mnist").validation
    return images[:600], labels[:600]


@pytest.fixture(scope="module")
def lenet5():
    return load_net("lenet5", "mnist")


@pytest.fixture(scope="module")
def resnet():
    return load_net("resnet", "mnist")


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def copied(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


# the scan


@pytest.mark.parametrize("name", ["lenet5", "resnet"])
def test_with_every_filter_kept_the_accuracy_is_the_dense_one_exactly(name, some, request):
    model = request.getfixturevalue(name)
    table = ratios.sensitivity(model, MAGNITUDE, some, keeps=(1.0,))
    assert (table.accuracy == evaluate(model, some)).all()
    assert (table["drop"] == 0).all()
    assert (table.kept == table.channels).all()


@pytest.mark.parametrize("name, layer, where", [("lenet5", "conv2", "conv2"), ("lenet5", "fc1", "fc1"), ("resnet", "block2.conv2", TIED)])
def test_a_layers_entry_is_the_accuracy_of_the_model_with_that_layer_alone_compressed(name, layer, where, some, request):
    model = request.getfixturevalue(name)
    table = ratios.sensitivity(model, MAGNITUDE, some, keeps=(0.6, 0.2)).set_index(["layer", "keep"])
    for keep in (0.6, 0.2):
        alone = compress(model, MAGNITUDE, where=where, unit="filter", keep=keep)
        assert table.accuracy[layer, keep] == evaluate(alone, some)
        assert table["drop"][layer, keep] == evaluate(model, some) - evaluate(alone, some)
        assert table.kept[layer, keep] == round(keep * table.channels[layer, keep])
    assert table.accuracy.nunique() > 3  # the layers are told apart


def test_tied_layers_have_one_line_under_the_first_ones_name(resnet, some):
    layers = ratios.Layers(resnet, MAGNITUDE).makers
    assert layers["block2.conv2"] == TIED.split(", ")
    assert list(layers) == ["conv", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "block3.conv1"]
    table = ratios.sensitivity(resnet, MAGNITUDE, some, keeps=(0.5,), where="block2*")
    assert list(table.layer) == ["block2.conv1", "block2.conv2"]


def test_weights_can_be_scanned_too(lenet5, some):
    table = ratios.sensitivity(lenet5, MAGNITUDE, some, keeps=(0.05,), unit="weight").set_index("layer")
    assert list(table.index) == ["conv1", "conv2", "fc1", "fc2"]
    assert table.accuracy["conv1"] == evaluate(compress(lenet5, MAGNITUDE, where="conv1", keep=0.05), some)


def test_a_pruned_model_is_scanned_from_where_it_stands(lenet5, some):
    pruned = compress(lenet5, MAGNITUDE, unit="filter", keep=0.5)
    table = ratios.sensitivity(pruned, MAGNITUDE, some, keeps=(1.0, 0.25), where="conv2")
    assert table.accuracy[0] == evaluate(pruned, some)
    assert table.accuracy[1] == evaluate(compress(pruned, MAGNITUDE, where="conv2", unit="filter", keep=0.25), some)


def test_the_original_stays_bit_for_bit(resnet, some):
    before, mode = copied(resnet), resnet.training
    table = ratios.sensitivity(resnet, MAGNITUDE, some, keeps=(0.5, 0.1))
    ratios.compress_each(resnet, MAGNITUDE, {"conv": 0.5})
    for rule in ratios.RULES:
        ratios.solve(resnet, MAGNITUDE, target=0.5, rule=rule, table=table)
    ratios.recalibrate(resnet, some, batches=1)
    assert unchanged(resnet, before)
    assert resnet.training == mode


# a keep for each layer


@pytest.mark.parametrize("name", ["lenet5", "resnet"])
def test_one_keep_for_all_is_compress(name, request):
    model = request.getfixturevalue(name)
    keeps = dict.fromkeys(ratios.Layers(model, MAGNITUDE).makers, 0.4)
    x = torch.rand(4, 1, 28, 28)
    each, all_at_once = ratios.compress_each(model, MAGNITUDE, keeps), compress(model, MAGNITUDE, unit="filter", keep=0.4)
    assert torch.equal(predict(each, x), predict(all_at_once, x))
    assert not torch.allclose(predict(each, x), predict(model, x))


def test_each_layer_keeps_its_own_share_and_the_rest_is_dense(lenet5):
    small = bake(ratios.compress_each(lenet5, MAGNITUDE, {"conv1": 0.5, "fc1": 0.1}))
    assert [small.conv1.out_channels, small.conv2.out_channels, small.fc1.out_features] == [10, 50, 50]


@score("a test", chapter="00", rebuild=lambda rows, next_w: 2 * next_w)
def doubling(w, next_w):
    """Scores by magnitude and doubles what reads the channels."""
    return w.abs()


def test_what_a_method_rebuilds_in_the_next_layer_meets_the_next_layers_own_mask(lenet5, some):
    each = ratios.compress_each(lenet5, doubling, {"conv1": 0.5, "conv2": 0.4}, some)
    for first, later in (("conv1", "conv2"), ("conv2", "conv1")):
        again = ratios.compress_each(lenet5, doubling, {n: {"conv1": 0.5, "conv2": 0.4}[n] for n in (first, later)}, some)
        assert torch.equal(again.conv2.weight, each.conv2.weight)
    rows = each.conv2.weight.flatten(1).any(1)
    assert rows.sum() == 20
    assert torch.equal(each.conv2.weight[rows], 2 * lenet5.conv2.weight[rows])
    assert torch.equal(each.fc1.weight, 2 * lenet5.fc1.weight)
    assert (each.conv2.bias[~rows] == 0).all()


# one total ratio


def lenet5_cost(c1, c2, f, cost):
    """LeNet-5's cost by its widths, by hand."""
    if cost == "parameters":
        return 26 * c1 + (25 * c1 + 1) * c2 + (16 * c2 + 1) * f + 10 * f + 10
    return 25 * c1 * 24**2 + 25 * c1 * c2 * 8**2 + 16 * c2 * f + 10 * f


@pytest.fixture(scope="module")
def lenet5_table(lenet5, some):
    return ratios.sensitivity(lenet5, MAGNITUDE, some)


@pytest.mark.parametrize("target", [0.7, 0.3, 0.15])
@pytest.mark.parametrize("cost", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("rule", ratios.RULES)
def test_the_target_is_reached_within_a_filter_a_layer(rule, cost, target, lenet5, lenet5_table):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*would keep none")
        found = ratios.solve(lenet5, MAGNITUDE, target=target, cost=cost, rule=rule, table=lenet5_table)
    dense = lenet5_cost(20, 50, 500, cost)
    widths = [len(getattr(found.baked, n).weight) for n in ("conv1", "conv2", "fc1")]
    more = [min(w + 1, full) for w, full in zip(widths, (20, 50, 500))]
    assert found.reached == lenet5_cost(*widths, cost) / dense <= target < lenet5_cost(*more, cost) / dense
    assert list(found.keeps.values()) == [w / full for w, full in zip(widths, (20, 50, 500))]
    if rule == "uniform":  # one keep rounds to all three widths
        assert max((w - 0.5) / n for w, n in zip(widths, (20, 50, 500))) <= min((w + 0.5) / n for w, n in zip(widths, (20, 50, 500)))


@pytest.mark.parametrize("cost", ["parameters", "multiply_adds"])
def test_a_network_with_shortcuts_too(cost, resnet):
    found = ratios.solve(resnet, MAGNITUDE, target=0.4, cost=cost)
    x = torch.zeros(1, 1, 28, 28)
    count = (lambda m: sum(v.numel() for v in m.parameters())) if cost == "parameters" else lambda m: layer_costs(m, x).multiply_adds.sum()
    assert found.reached == pytest.approx(count(found.baked) / count(resnet), rel=1e-12)
    assert 0.37 < found.reached <= 0.4
    assert torch.allclose(predict(found.compressed, x + 0.3), predict(found.baked, x + 0.3), rtol=1e-4, atol=1e-4)


def test_one_filter_always_stays_and_nobody_is_warned_for_it(lenet5):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = ratios.solve(lenet5, MAGNITUDE, target=0.001)
        table = ratios.latency_scan(lenet5, MAGNITUDE, keeps=(1.0, 0.001), rounds=5, threads=1)
    assert found.keeps["conv1"] == 1 / 20
    assert 0 < table.multiply_adds[1] < 0.02


def test_the_network_rule_takes_the_filters_that_score_least_anywhere(lenet5):
    found = ratios.solve(lenet5, MAGNITUDE, target=0.6, rule="network")
    masses = {n: getattr(lenet5, n).weight.detach().abs().flatten(1).sum(1) for n in ("conv1", "conv2", "fc1")}
    kept = {n: getattr(found.compressed, n).weight.flatten(1).any(1) for n in masses}
    worst_kept = min(masses[n][kept[n]].min() for n in masses if kept[n].sum() > 1)
    assert all((masses[n][~kept[n]] <= worst_kept).all() for n in masses)


def test_the_sensitivity_rule_tolerates_one_drop_in_every_layer():
    table = pd.DataFrame({
        "layer": ["a"] * 3 + ["b"] * 3, "keep": [0.8, 0.5, 0.2] * 2,
        "accuracy": [0.9, 0.8, 0.5, 0.9, 0.9, 0.7], "drop": [0.0, 0.1, 0.4, 0.0, 0.0, 0.2],
    })  # fmt: skip
    found = ratios.tolerated(table, 0.1)
    assert found["a"] == pytest.approx(0.5, abs=0.005)
    assert found["b"] == pytest.approx(0.35, abs=0.005)  # half way from 0 at 0.5 to 0.2 at 0.2
    assert ratios.tolerated(table, 0.0) == {"a": 1.0, "b": 1.0}
    assert ratios.tolerated(table, 9.0) == {"a": 0.2, "b": 0.2}
    assert ratios.tolerated(table[::-1], 0.1) == found


def test_a_drop_that_rises_again_is_read_as_its_highest():
    table = pd.DataFrame({"layer": "a", "keep": [0.75, 0.5, 0.25], "accuracy": [0.5, 0.8, 0.3], "drop": [0.4, 0.1, 0.6]})
    assert ratios.tolerated(table, 0.2)["a"] == pytest.approx(0.875, abs=0.005)
    assert ratios.tolerated(table, 0.45)["a"] == pytest.approx(0.4375, abs=0.005)


def test_the_sensitivity_rule_scans_by_itself_as_with_a_table(lenet5, some, lenet5_table):
    scanned = ratios.solve(lenet5, MAGNITUDE, some, target=0.3, rule="sensitivity")
    given = ratios.solve(lenet5, MAGNITUDE, target=0.3, rule="sensitivity", table=lenet5_table)
    assert scanned.keeps == given.keeps


def test_the_sensitivity_rule_spares_what_hurts():
    """So it is on Fashion-MNIST with shortcuts (0.43, not 0.23). On LeNet-5, whose layers are alike, one keep for all does better."""
    images, labels = load_data("fashion_mnist").validation
    model, some = load_net("resnet", "fashion_mnist"), (images[:600], labels[:600])
    table = ratios.sensitivity(model, MAGNITUDE, some)
    guided = ratios.solve(model, MAGNITUDE, target=0.5, rule="sensitivity", table=table)
    uniform = ratios.solve(model, MAGNITUDE, target=0.5)
    half = table[table.keep == 0.5].set_index("layer")["drop"]
    assert guided.keeps[half.idxmax()] > uniform.keeps[half.idxmax()]
    assert guided.keeps[half.idxmin()] < uniform.keeps[half.idxmin()]
    assert evaluate(guided.baked, some) > evaluate(uniform.baked, some) + 0.05


def test_latency_is_measured_at_most_eight_times_and_told_as_measured(resnet, monkeypatch):
    calls = []
    real = ratios.latency
    monkeypatch.setattr(ratios, "latency", lambda *a: calls.append(real(*a)) or calls[-1])
    found = ratios.solve(resnet, MAGNITUDE, target=0.7, cost="latency", batch=32, rounds=7, threads=1)
    assert len(calls) <= 8
    assert found.reached == 1 / calls[-1].ratio["small"]
    assert found.low <= calls[-1].ms["small"] / calls[-1].ms["dense"] <= found.high
    assert list(found.trials.share) == [1 / c.ratio["small"] for c in calls[:-1]]
    assert found.reached < 1


def test_latency_is_solved_where_it_falls_with_the_multiply_adds(resnet, monkeypatch):
    """With a clock that counts one nanosecond a weight, the answer is that of the parameters, as near as six halvings come."""

    def clock(models, *rest):
        ms = pd.Series({n: ratios.parameters(m) / 1e6 for n, m in models.items()})
        return pd.DataFrame({"ms": ms, "low": ms, "high": ms, "ratio": ms["dense"] / ms})

    monkeypatch.setattr(ratios, "latency", clock)
    found = ratios.solve(resnet, MAGNITUDE, target=0.5, cost="latency")
    assert 0.45 < found.reached <= 0.5
    assert found.reached == pytest.approx(ratios.parameters(found.baked) / ratios.parameters(resnet), rel=1e-12)


def test_a_larger_network_is_not_believed_to_be_faster_than_a_smaller_one():
    assert ratios._largest([(0.0, 0.2), (0.5, 0.6), (0.75, 0.4), (0.25, 0.3)], 0.5) == 0.25


def test_the_latency_scan_measures_the_networks_it_names(resnet):
    table = ratios.latency_scan(resnet, MAGNITUDE, keeps=(1.0, 0.5), batch=16, rounds=5, threads=1)
    assert list(table.keep) == [1.0, 0.5]
    assert ((table.low <= table.ms) & (table.ms <= table.high)).all()
    x, half = torch.zeros(1, 1, 28, 28), bake(compress(resnet, MAGNITUDE, unit="filter", keep=0.5))
    assert list(table.multiply_adds) == [1.0, layer_costs(half, x).multiply_adds.sum() / layer_costs(resnet, x).multiply_adds.sum()]


# batch norm


def normed(x, axes, unbiased=False):
    return x.mean(axes), x.var(axes, unbiased=unbiased)


def test_the_statistics_are_those_computed_by_hand():
    net = (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5))
        .double()
        .eval()
    )
    nn.init.uniform_(net[1].weight)
    nn.init.uniform_(net[1].bias)
    net[1].running_mean += 3
    net[1].num_batches_tracked += 7
    x = torch.rand(35, 2, 6, 6, dtype=torch.float64)
    now = ratios.recalibrate(net, (x, torch.zeros(35)), batches=9, batch=10)
    firsts, seconds = [], []
    for part in x[:30].split(10):  # the last five would be a short batch
        z = net[0](part).detach()
        mean, var = normed(z, (0, 2, 3))
        firsts.append(torch.stack(normed(z, (0, 2, 3), unbiased=True)))
        z = (z - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * net[1].weight[:, None, None] + net[1].bias[:, None, None]
        z = z.clamp(min=0).flatten(1) @ net[4].weight.T + net[4].bias
        seconds.append(torch.stack(normed(z.detach(), 0, unbiased=True)))
    for norm, expected in ((now[1], firsts), (now[5], seconds)):
        mean, var = torch.stack(expected).mean(0)
        assert torch.allclose(norm.running_mean, mean, rtol=1e-12, atol=1e-14)
        assert torch.allclose(norm.running_var, var, rtol=1e-12, atol=1e-14)
    assert now[1].momentum == 0.3


@pytest.mark.parametrize("stage", ["dense", "masked", "baked"])
def test_nothing_but_the_statistics_changes(stage, resnet, some):
    model = {"dense": lambda m: m, "masked": lambda m: m, "baked": bake}[stage](
        resnet if stage == "dense" else compress(resnet, MAGNITUDE, unit="filter", keep=0.6)
    )
    before = copied(model)
    now = ratios.recalibrate(model, some, batches=2, batch=100)
    assert unchanged(model, before)
    moved = {n for n, v in now.state_dict().items() if not torch.equal(v, before[n])}
    assert moved
    assert all(n.endswith(("running_mean", "running_var", "num_batches_tracked")) for n in moved)
    assert [m.training for m in now.modules()] == [m.training for m in model.modules()]


def test_masked_and_baked_networks_recalibrate_alike(resnet, some):
    masked = compress(resnet, MAGNITUDE, unit="filter", keep=0.6)
    one, other = (ratios.recalibrate(m, some, batches=2) for m in (masked, bake(masked)))
    assert torch.allclose(predict(one, some[0]), predict(other, some[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_pruned_network_with_its_own_statistics_is_better(seed, some):
    small = bake(compress(load_net("resnet", "mnist", seed), MAGNITUDE, unit="filter", keep=0.7))
    train = load_data("mnist").train
    assert evaluate(ratios.recalibrate(small, train, batches=8), some) > evaluate(small, some) + 0.1


# errors


def test_what_is_wrong_is_said_with_what_mends_it(resnet, lenet5, some, lenet5_table):
    with pytest.raises(ValueError, match=r"'block3.conv2'; it goes with block2.conv2"):
        ratios.compress_each(resnet, MAGNITUDE, {"block3.conv2": 0.5})
    with pytest.raises(ValueError, match=r"did you mean 'conv1'"):
        ratios.compress_each(lenet5, MAGNITUDE, {"conv11": 0.5})
    with pytest.raises(ValueError, match=r"keep=1.5 is not allowed"):
        ratios.compress_each(lenet5, MAGNITUDE, {"conv1": 1.5})
    with pytest.raises(ValueError, match=r"no knob 'kep'"):
        ratios.sensitivity(lenet5, MAGNITUDE, some, kep=0.5)
    with pytest.raises(ValueError, match=r"makes its masks itself"):
        ratios.sensitivity(lenet5, "l0_hard_concrete", some)
    with pytest.raises(ValueError, match=r"no batch norm .* retrain it"):
        ratios.recalibrate(lenet5, some)
    with pytest.raises(ValueError, match=r"batches >= 1 .* batches=0"):
        ratios.recalibrate(resnet, some, batches=0)
    for target in (0, 1.2, float("nan")):
        with pytest.raises(ValueError, match=r"target=.* above 0 and at most 1"):
            ratios.solve(lenet5, MAGNITUDE, target=target)
    with pytest.raises(ValueError, match=r"cost='parameter' .*did you mean 'parameters'"):
        ratios.solve(lenet5, MAGNITUDE, target=0.5, cost="parameter")
    with pytest.raises(ValueError, match=r"rule='greedy' .* uniform, network, sensitivity"):
        ratios.solve(lenet5, MAGNITUDE, target=0.5, rule="greedy")
    with pytest.raises(ValueError, match=r"keep=0.5 cannot be given"):
        ratios.solve(lenet5, MAGNITUDE, target=0.5, keep=0.5)
    with pytest.raises(ValueError, match=r"target=0.0001 is out of reach: with rule='uniform' at least 0.0\d+ of the parameters"):
        ratios.solve(resnet, MAGNITUDE, target=0.0001)
    with pytest.raises(ValueError, match=r"needs data=load_data"):
        ratios.solve(lenet5, MAGNITUDE, target=0.5, rule="sensitivity")
    with pytest.raises(ValueError, match=r"no line for conv1"):
        ratios.solve(lenet5, MAGNITUDE, target=0.5, rule="sensitivity", table=lenet5_table[lenet5_table.layer != "conv1"])


def test_the_networks_output_is_told_not_to_have_filters_that_can_go():
    with pytest.raises(ValueError, match="output"):
        ratios.sensitivity(build("linear", "digits"), MAGNITUDE, load_data("digits"))


def test_a_ratio_of_one_keeps_everything(lenet5):
    found = ratios.solve(lenet5, MAGNITUDE, target=1)
    assert set(found.keeps.values()) == {1.0}
    assert found.reached == 1
    assert np.isclose(found.trials.setting.max(), 1, atol=1e-4)
