"""The bench of scoring: each method beside the bound of what it asks for, refusals in its own words, greedy L-OBS layer by layer."""

import pytest
import torch

from cmlib.bench import scoring
from cmlib.lab.data import load_data
from cmlib.lab.verbs import plan
from cmlib.lab.zoo import load_net
from cmlib.methods import find


@pytest.mark.parametrize("key, bound", [("magnitude_pruning_han", "1"), ("snip", "1"), ("layerwise_obs", "10"), ("lasso_channel_pruning", "30")])
def test_seconds_stand_beside_the_bound_of_the_evidence(key, bound, digits):
    net = load_net("cnn", "digits")
    seconds, found = scoring._seconds(net, find(key), digits, list(find(key).asks))
    assert 0 <= float(seconds) < 30 and found == bound


def test_a_method_that_refuses_the_network_says_why():
    said, bound = scoring._seconds(load_net("lenet300", "mnist"), find("network_slimming"), load_data("mnist"), ["bn_gamma"])
    assert said.startswith("not applicable: network_slimming asks for bn_gamma") and bound == ""


def test_greedy_layer_by_layer_is_greedy_and_says_how_far_it_is(digits, capsys):
    net = load_net("cnn", "digits")
    assert scoring.greedy(net, digits) > 0
    assert "layer 1 of 3" in (said := capsys.readouterr().err) and "layer 3 of 3" in said
    whole = plan(net, "layerwise_obs", data=digits, order="greedy", keep=0.3)
    for name, packed in whole.items():
        one = plan(net, "layerwise_obs", where=name, data=digits, order="greedy", keep=0.3)
        assert one.keys() == {name} and torch.equal(one[name].dense(), packed.dense())
