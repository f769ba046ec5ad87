"""Layer after layer: what is fitted in the network that the earlier layers left, and what cannot be. What the papers claim of it stands with their
methods, in ``test_oracles_structures``.
"""

import numpy as np
import pytest
import torch

from cmlib.core.planner import gather
from cmlib.core.select import select
from cmlib.lab.in_order import prune_in_order, rebuild_in_order
from cmlib.lab.train import predict
from cmlib.lab.zoo import load_net
from cmlib.methods import structures as methods

L1, CP = "l1_norm_filter_pruning", "lasso_channel_pruning"
HALF = {"conv1": 0.5, "conv2": 0.5}


def test_layers_that_a_shortcut_ties_go_together():
    net = load_net("resnet", "fashion_mnist")
    small = prune_in_order(net, L1, {"block1.conv2": 0.5, "conv": 0.5, "block1.conv1": 0.25})
    assert [small.conv.out_channels, small.block1.conv1.out_channels, small.block1.shortcut.conv.out_channels] == [8, 8, 16]


def test_the_next_layer_is_fitted_to_what_the_original_made_of_its_own_inputs(digits64):
    """By numpy's least squares of the original's outputs on the pruned network's inputs, at the same places of the same images."""
    net = load_net("cnn", "digits").double()
    small = rebuild_in_order(net, HALF, digits64, samples=300)
    layer = lambda model: {"conv2": model.conv2}  # noqa: E731
    x, w = (gather(net, layer(net), what, digits64, samples=300)["conv2"].flatten(1) for what in ("next_acts_in", "next_w"))
    reads = gather(small, layer(small), "next_acts_in", digits64, samples=300)["conv2"].flatten(1)
    expected = np.linalg.lstsq(reads.numpy(), (x @ w.T).numpy(), rcond=None)[0]
    assert small.conv1.out_channels == 4 and small.conv2.out_channels == 8 and small.fc.in_features == 8
    assert np.abs(small.fc.weight.detach().numpy() - expected.T).max() < 1e-6


def test_channels_are_chosen_for_what_the_original_made_too(digits64):
    net = load_net("cnn", "digits").double()
    first, both = (rebuild_in_order(net, keeps, digits64) for keeps in ({"conv1": 0.5}, HALF))
    y = torch.einsum("sck,ock->so", *(gather(net, {"conv2": net.conv2}, what, digits64)["conv2"] for what in ("next_acts_in", "next_w")))
    reads = [gather(first, {"conv2": first.conv2}, what, digits64)["conv2"] for what in ("next_acts_in", "next_w")]
    rows, own = (select(methods.entry_points(*methods.lasso_problem(*reads, *target))[:, None], 0.5)[:, 0] for target in ([y], []))
    assert torch.equal(both.conv2.weight, first.conv2.weight[rows]) and not torch.equal(rows, own)


def test_with_all_channels_kept_it_says_what_the_original_says(digits64):
    net = load_net("cnn", "digits").double()
    small = rebuild_in_order(net, {"conv2": 1.0, "conv1": 1.0}, digits64)
    assert torch.allclose(predict(small, digits64[0][:50]), predict(net, digits64[0][:50]), rtol=0, atol=1e-6)


def test_what_is_wrong_is_said(digits):
    net = load_net("cnn", "digits")
    with pytest.raises(ValueError, match=r"no layer 'conv3' \(did you mean 'conv"):
        prune_in_order(net, L1, {"conv3": 0.5})
    with pytest.raises(ValueError, match=r"next_acts_in .* which none of block1.conv2 has"):
        rebuild_in_order(load_net("resnet", "mnist"), {"block1.conv2": 0.5}, (torch.rand(20, 1, 28, 28), torch.arange(20) % 10))
