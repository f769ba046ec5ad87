"""Han et al.'s rules for retraining on the kit's own networks, with the code of notebook 02 itself."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import cmlib
from cmlib.core.apply import plan_of
from cmlib.methods.prune import dead_units, retraining_dropout

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "02_pruning_weights.ipynb"


def function(name, space):
    """The notebook's function of that name: its cell runs in ``space``."""
    cells = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    (cell,) = [source for source in cells if f"def {name}(" in source]
    exec(cell[cell.index(f"def {name}(") :], space)
    return space[name]


@pytest.fixture(scope="module")
def lenet300():
    return cmlib.load_net("lenet300", "mnist", seed=0)


@pytest.fixture(scope="module")
def images():
    return cmlib.load_data("mnist").validation[0][:300]


@pytest.mark.parametrize("cut, frozen", [("fc", "conv"), ("conv", "fc")])
def test_frozen_layers_stay_and_cut_weights_stay_zero(cut, frozen):
    images, labels = cmlib.load_data("mnist").train
    few = images[:256], labels[:256]
    model = cmlib.compress(cmlib.load_net("lenet5", "mnist", seed=0), "magnitude_pruning_han", where=f"{cut}*", keep=0.1)
    trained = []  # the notebook trains a copy and gives its accuracy and seconds
    space = {"deepcopy": lambda m: trained.append(deepcopy(m)) or trained[-1], "cmlib": cmlib, "fewer": few}
    accuracy, seconds = function("retrained", space)(model, frozen, seed=0)
    assert 0 <= accuracy <= 1 and seconds > 0
    before, after = dict(model.named_parameters()), dict(trained[0].named_parameters())
    assert len(before) == 8
    for name, p in after.items():
        assert torch.equal(p, before[name]) == name.startswith(frozen), name
    masks = {n: p.mask for n, p in plan_of(model).items()}
    for name, packed in plan_of(trained[0]).items():
        assert name.startswith(cut) and torch.equal(packed.mask, masks[name]) and (packed.dense()[~packed.mask] == 0).all()


def without_dead(model):
    names = {"nn": nn, "torch": torch, "dead_units": dead_units, "without_units": cmlib.methods.prune.without_units}
    return function("without_dead", names)(model)


@pytest.mark.parametrize("keep", [0.02, 0.005])
def test_dead_neurons_leave_and_no_answer_changes(lenet300, images, keep):
    model = cmlib.compress(lenet300, "magnitude_pruning_han", keep=keep, scope="network")
    small = without_dead(model)
    w1, w2, w3 = (small[i].weight.detach() for i in (1, 3, 5))
    assert not dead_units(w1, w2).any() and not dead_units(w2, w3).any()
    assert len(w1) < 300 and len(w2) < 100
    assert torch.allclose(cmlib.predict(small, images), cmlib.predict(model, images), rtol=0, atol=1e-4)
    living = sum(int((w != 0).sum()) for w in (w1, w2, w3))
    assert living <= sum(p.kept for p in plan_of(model).values())


def test_one_removal_leaves_another_dead(lenet300, images):
    model = deepcopy(lenet300)
    with torch.no_grad():
        model.fc1.weight[7] = 0  # nothing comes into unit 7 of fc1 ...
        model.fc2.weight[5] = 0
        model.fc2.weight[5, 7] = 1.0  # ... and unit 5 of fc2 listens to it alone
    small = without_dead(model)
    assert [small[i].out_features for i in (1, 3, 5)] == [299, 99, 10]
    assert torch.allclose(cmlib.predict(small, images), cmlib.predict(model, images), rtol=0, atol=1e-4)


def test_a_network_without_dead_neurons_stays_as_it_is(lenet300):
    small = without_dead(lenet300)
    assert all(torch.equal(small[i].weight, layer.weight) for i, layer in zip((1, 3, 5), (lenet300.fc1, lenet300.fc2, lenet300.fc3), strict=True))


def test_dropout_falls_with_the_root_of_the_connections(lenet300, images):
    model = cmlib.compress(lenet300, "magnitude_pruning_han", keep=0.1)
    plan = plan_of(model).values()
    rate = retraining_dropout(0.5, sum(p.mask.numel() for p in plan), sum(p.kept for p in plan))
    assert rate == pytest.approx(0.5 * 0.1**0.5, rel=1e-4)
    dropped = function("set_dropout", {"nn": nn, "cmlib": cmlib})(deepcopy(model), rate)
    assert [m.p for m in dropped.modules() if isinstance(m, nn.Dropout)] == [rate, rate]
    assert torch.equal(cmlib.predict(dropped, images), cmlib.predict(model, images))  # silent in evaluation
    dropped.train()
    hidden = dropped.relu1(torch.ones(100, 300))
    assert (hidden == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
