"""The curves of LeNet-5: every method is run or says why not, at the same shares, and what is drawn is what was stored."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from cmlib.bench import curves
from cmlib.core.apply import attached, plan_of, weighted
from cmlib.core.bake import bake
from cmlib.lab import runs
from cmlib.lab.data import load_data
from cmlib.lab.zoo import load_net
from cmlib.methods import find
from cmlib.view import structures


@pytest.fixture(scope="module")
def mnist():
    return load_data("mnist")


@pytest.fixture(scope="module")
def lenet():
    return load_net("lenet5", "mnist")


def kept(model):
    return {name: packed.kept for name, packed in plan_of(model).items()}


@pytest.mark.parametrize("key", ["random_pruning", "snip", "admm_weight_pruning"])
def test_weights_stay_as_many_in_each_layer_as_by_magnitude_across_the_network(key, lenet, mnist):
    (knobs,) = [k for k in curves.knobs_of(key, 0) if k["keep"] == 0.03]
    sizes = torch.cat([layer.weight.detach().abs().flatten() for layer in weighted(lenet).values()])
    cut = sizes.sort(descending=True).values[round(0.03 * len(sizes)) - 1]
    expected = {name: int((layer.weight.abs() >= cut).sum()) for name, layer in weighted(lenet).items()}
    assert kept(curves.pruned(lenet, find(key), knobs, mnist)) == expected


def test_whole_filters_keep_the_root_of_the_share_and_are_counted_with_their_inputs(lenet, mnist):
    model = curves.pruned(lenet, find("l1_norm_filter_pruning"), {"keep": 0.25}, mnist)
    assert curves.weights(model) == 25 * 10 + 250 * 25 + 16 * 25 * 250 + 250 * 10
    assert curves.weights(model) == sum(layer.weight.numel() for layer in weighted(bake(model)).values())
    assert curves.weights(lenet) == 430_500


def test_methods_say_themselves_which_layers_they_judge_and_what_is_missing(monkeypatch):
    keys = ["magnitude_pruning_han", "l1_norm_filter_pruning", "network_trimming_apoz", "optimal_brain_surgeon", "network_slimming"]
    monkeypatch.setattr(curves, "methods", lambda: keys)
    layers, refusals = curves.reach()
    every = ["conv1", "conv2", "fc1", "fc2"]
    assert layers == {keys[0]: every, keys[1]: every[:3], keys[2]: ["fc1"]}  # the outputs stay; a ReLU is behind fc1 alone
    assert list(refusals) == keys[3:]
    assert "430,500 covered weights" in refusals["optimal_brain_surgeon"] and "bn_gamma" in refusals["network_slimming"]


@pytest.mark.parametrize("key", ["magnitude_pruning_han", "soft_filter_pruning"])
def test_a_curve_is_run_once_and_who_learns_has_no_more_epochs(key, monkeypatch, tmp_path, mnist):
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    few = replace(mnist, validation=tuple(t[:100] for t in mnist.validation))
    for name, value in {"IMAGES": 64, "SHARES": (0.25, 0.04), "load_data": lambda _: few}.items():
        monkeypatch.setattr(curves, name, value)
    trained, whole = [], curves.fit

    def noting(model, *a, **how):
        trained.append((how["epochs"], any(between.method is not None for _, _, between in attached(model))))
        return whole(model, *a, **how)

    monkeypatch.setattr(curves, "fit", noting)
    found = [curves.run(key, 0) for _ in range(2)]
    assert found[0] == found[1]  # the second was read
    assert trained == 2 * ([(1, True), (1, False)] if find(key).learns else [(2, False)])
    assert [p["ratio"] for p in found[0]["points"]] == pytest.approx([4, 25], rel=0.05)
    assert all(0 < p["before"] <= 1 and 0 < p["accuracy"] <= 1 for p in found[0]["points"])


def test_the_stored_curves_are_whole():
    found, shipped = curves.table(), runs.table("curves")
    assert set(found.key) == {curves.DENSE, *curves.methods()} - {"optimal_brain_surgeon", "network_slimming"}
    for key, lines in found.groupby("key"):
        assert set(lines.seed) == set(curves.seeds(key)) and (lines.groupby("seed").size() == len(curves.knobs_of(key, 0))).all()
        assert not lines[["ratio", "before", "accuracy"]].isna().any(axis=None)
    assert len(shipped) == found.groupby(["key", "seed"]).ngroups
    assert runs.of([curves.given(r.method, r.seed) for r in shipped.itertuples()]).machine.str.contains("torch").all()


def test_points_of_one_setting_share_the_mean_of_their_ratios():
    found = curves.table()
    assert (found.groupby(["key", "point"]).ratio.nunique() == 1).all()
    stored = runs.table("curves")
    one = stored[stored.method == "taylor_pruning"].points
    assert found[(found.key == "taylor_pruning") & (found.point == 2)].ratio.iloc[0] == pytest.approx(np.mean([p[2]["ratio"] for p in one]))


def test_names_are_short_and_families_three():
    found = curves.table()
    assert {"DNS", "L-OBS", "L0 regularization", "Magnitude pruning", "CP"} <= set(found.method) and found.method.str.len().max() <= 30
    assert set(found.family) - {""} == {"Scores of single weights", "Masks learned while training", "Scores of whole filters"}
    assert found.groupby("family").method.nunique().max() <= 7  # as many as there are colours


def test_papers_have_a_source_and_a_family():
    found = curves.papers()
    assert len(found) >= 8 and found.source.str.len().min() > 10 and set(found.confidence) == {"seen"}
    assert {("DNS", 108.0), ("ADMM", 71.2), ("Sparse VD", 280.0)} <= set(zip(found.method, found.ratio))
    assert found.accuracy.between(0.97, 1).all() and set(found.family) <= set(curves.table().family)


# the picture

RUNS = pd.DataFrame([
    {"family": f, "method": m, "seed": seed, "ratio": ratio, "accuracy": 1 - 0.004 * ratio * worth - 0.001 * seed}
    for f, m, worth in (("A", "one", 1.0), ("A", "two", 0.5), ("B", "three", 0.25)) for seed in (0, 1, 2) for ratio in (4, 25, 100)
])  # fmt: skip
PAPERS = pd.DataFrame({"family": ["A", "B", "B"], "method": ["x", "y", "z"], "ratio": [100, 105, 10.0], "accuracy": [0.99, 0.991, 0.98]})


def lines_of(ax):
    return {a.get_label(): (np.array(a.get_xdata(), float), np.array(a.get_ydata(), float)) for a in ax.lines if not a.get_label().startswith("_")}


def test_each_family_is_named_and_coloured_in_its_own_axes_and_pale_in_the_others():
    figure = structures.error_curves(RUNS, PAPERS, dense=0.995, title="t")
    figure.draw_without_rendering()
    assert [ax.get_title("left") for ax in figure.axes] == ["A", "B"]
    for ax, own in zip(figure.axes, ({"one", "two"}, {"three"})):
        found = lines_of(ax)
        assert own <= set(found) and not ({"one", "two", "three"} - own) & set(found)
        for name in own:
            mean = RUNS[RUNS.method == name].groupby("ratio").accuracy.mean()
            assert list(found[name][0]) == [4, 25, 100] and found[name][1] == pytest.approx(1 - mean.to_numpy())
        assert found["dense, trained as long"][1] == pytest.approx([0.005, 0.005])
        assert found["published, on networks of their own"][1] == pytest.approx(1 - PAPERS.accuracy.to_numpy())
        assert sum(a.get_label().startswith("_") for a in ax.lines) == 3  # every method, pale
        named = {t.get_text() for t in ax.texts}
        assert named == own | set(PAPERS[PAPERS.family == ax.get_title("left")].method)
        assert ax.get_yscale() == ax.get_xscale() == "log"


def test_bands_go_from_the_lowest_seed_to_the_highest():
    ax = structures.error_curves(RUNS, PAPERS).axes[0]
    vertices = ax.collections[0].get_paths()[0].vertices
    here = vertices[vertices[:, 0] == 25, 1]
    errors = 1 - RUNS[(RUNS.method == "one") & (RUNS.ratio == 25)].accuracy
    assert (here.min(), here.max()) == pytest.approx((errors.min(), errors.max()))


@pytest.mark.parametrize("least", [0.004, 0.0])
def test_there_is_room_for_names_below_the_best(least):
    papers = PAPERS.assign(accuracy=[0.99, 0.991, 1 - least])
    bottom, _ = structures.error_curves(RUNS, papers).axes[0].get_ylim()
    assert 0 < bottom <= max(least, 1e-4) / 1.6


def test_it_is_readable():
    figure = structures.error_curves(RUNS, PAPERS, dense=0.995)
    figure.draw_without_rendering()
    assert not [t.get_text() for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and t.get_fontsize() < 12]
    for ax in figure.axes:
        boxes = [t.get_window_extent() for t in ax.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert figure.axes[-1].get_xlabel() and all(ax.get_ylabel() for ax in figure.axes)
    with pytest.raises(ValueError, match=r"no column 'family'"):
        structures.error_curves(RUNS.drop(columns="family"), PAPERS)
