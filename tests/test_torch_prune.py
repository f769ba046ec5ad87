"""Masks are those of ``torch.nn.utils.prune`` wherever both say the same thing: which units, how many of them, in which order.

Equal scores at the cut are the one place where they part: torch has no rule there (its topk gives what its sort happens to leave), the lower index
stays here. What torch has no name for (kernels, blocks, n of m, filters that go with their batch norm) is compared with sorting by hand in
``test_select``.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as reference

from cmlib.core.apply import plan_of, weighted, with_plain_weights
from cmlib.core.planner import Planner
from cmlib.core.select import select
from cmlib.lab.data import load_data
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import catalog, find

KEEPS = [0.001, 0.1, 1 / 3, 0.5, 0.77, 0.999, 1.0]
NETS = pytest.mark.parametrize("net, data", [("lenet300", "mnist"), ("lenet5", "mnist"), ("resnet", "fashion_mnist")])
NORMS = pytest.mark.parametrize("norm", [1, 2])
Masks = dict[str, torch.Tensor]


def plain(net: nn.Module) -> nn.Module:
    """A copy whose convolutions lie in memory row by row: torch's pruning refuses any other layout."""
    return with_plain_weights(net).to(memory_format=torch.contiguous_format)


def theirs(net: nn.Module, how, **settings) -> Masks:
    """{layer: mask} that a function of torch makes, layer by layer."""
    copy = plain(net)
    for layer in weighted(copy).values():
        how(layer, "weight", **settings)
    return masks_in(copy)


def masks_in(net: nn.Module) -> Masks:
    return {name: layer.weight_mask.bool() for name, layer in weighted(net).items()}


def ours(net: nn.Module, method: str, **knobs) -> Masks:
    return {name: packed.mask for name, packed in plan(net, method, **knobs).items()}


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@NETS
def test_single_weights_of_trained_networks(net, data):
    model = load_net(net, data)
    for keep in KEEPS:
        assert same(ours(model, "magnitude_pruning_han", keep=keep), theirs(model, reference.l1_unstructured, amount=1 - keep)), keep


@NETS
def test_across_the_network(net, data):
    model = load_net(net, data)
    for keep in KEEPS:
        copy = plain(model)
        reference.global_unstructured([(m, "weight") for m in weighted(copy).values()], reference.L1Unstructured, amount=1 - keep)
        assert same(ours(model, "magnitude_pruning_han", keep=keep, scope="network"), masks_in(copy)), keep


@NORMS
@NETS
def test_rows_by_norm(net, data, norm):
    model = load_net(net, data).double()
    for keep in KEEPS:
        found = ours(model, "l1_norm_filter_pruning", unit="row", p=norm, keep=keep)
        assert same(found, theirs(model, reference.ln_structured, n=norm, dim=0, amount=1 - keep)), keep


@NORMS
@NETS
def test_input_channels_by_norm(net, data, norm):
    model = load_net(net, data).double()
    for keep in KEEPS:
        found = {n: select(m.weight.detach().abs() ** norm, keep, unit="channel") for n, m in weighted(model).items()}
        assert same(found, theirs(model, reference.ln_structured, n=norm, dim=1, amount=1 - keep)), keep
        assert norm == 2 or same(found, ours(model, "magnitude_pruning_han", unit="channel", keep=keep)), keep


@pytest.mark.parametrize("unit, dim", [("weight", None), ("row", 0), ("channel", 1)])
def test_random_pruning_removes_as_many_of_each_unit(unit, dim):
    model = build("lenet5", "mnist")
    random = reference.random_unstructured if dim is None else reference.random_structured
    for keep in KEEPS:
        found = ours(model, "random_pruning", unit=unit, keep=keep)
        expected = theirs(model, random, amount=1 - keep, **({} if dim is None else {"dim": dim}))
        for name, mask in found.items():
            assert mask.sum() == expected[name].sum() and (dim is None or len(mask.transpose(0, dim).flatten(1).unique(dim=1).T) == 1), (name, keep)


@pytest.mark.parametrize("key", [k for k, m in catalog().items() if m.selects and m.knobs["unit"].default == "weight"])
def test_any_score_is_an_importance_of_theirs(key):
    """torch takes scores from outside: those of every method that judges single weights give the same masks there."""
    model, where = load_net("mlp", "digits").double(), "fc2"  # fc1 sees pixels that are always black: scores of 0, ties
    planner = Planner(model, find(key), where=where, data=load_data("digits"), samples=128)
    scores = planner.ranking(**find(key).bind({})).scores[where]
    copy = plain(model)
    reference.l1_unstructured(copy.fc2, "weight", amount=0.7, importance_scores=scores)
    assert torch.equal(copy.fc2.weight_mask.bool(), planner(keep=1 - 0.7)[where].mask)


def test_pruned_again_the_counts_add_up():
    """torch's amount is of what is left, keep is of all: 400 weights, then 300 more, is keep = 1 - 700 / n."""
    model = build("mlp", "digits").double()
    copy = plain(model)
    for name, layer in weighted(copy).items():
        n = layer.weight.numel()
        one, other = n // 5, n // 7
        reference.l1_unstructured(layer, "weight", amount=one)
        once = compress(model, "magnitude_pruning_han", where=name, keep=1 - one / n)
        assert torch.equal(plan_of(once)[name].mask, layer.weight_mask.bool())
        reference.l1_unstructured(layer, "weight", amount=other)
        assert torch.equal(ours(once, "magnitude_pruning_han", where=name, keep=1 - (one + other) / n)[name], layer.weight_mask.bool())


def test_the_masked_network_computes_what_theirs_computes():
    model, x = plain(build("lenet5", "mnist")), torch.rand(8, 1, 28, 28)  # the same layout for both: another rounds otherwise
    copy, masked = plain(model), compress(model, "magnitude_pruning_han", keep=0.2)
    for name, mask in ours(masked, "magnitude_pruning_han", keep=0.2).items():
        reference.custom_from_mask(copy.get_submodule(name), "weight", mask)
    assert torch.equal(copy(x), masked(x))
    for layer in weighted(copy).values():
        reference.remove(layer, "weight")
    assert same({n: m.weight for n, m in weighted(copy).items()}, {n: m.weight for n, m in weighted(with_plain_weights(masked)).items()})


# ties


def test_of_equal_weights_only_those_at_the_cut_may_differ_and_as_many_of_each_size_stay():
    w = torch.randint(-4, 5, (40, 25), generator=torch.Generator().manual_seed(0)).double()
    differ = 0
    for keep in KEEPS:
        here = select(w.abs(), keep)
        there = reference.L1Unstructured(1 - keep).compute_mask(w, torch.ones_like(w)).bool()
        assert torch.equal(w.abs()[here].sort().values, w.abs()[there].sort().values), keep
        assert w.abs()[here != there].unique().numel() <= 1, keep
        differ += not torch.equal(here, there)
    assert differ > 3


def test_of_equal_weights_torch_removes_what_its_sort_leaves_and_is_not_nested():
    """A hundred equal weights: of two to go torch takes neither that it took of one; here the last ones go, and more go beside the same."""
    gone = {}
    for count in (1, 2):
        mask = reference.L1Unstructured(count).compute_mask(torch.ones(100), torch.ones(100))
        gone[count] = set((mask == 0).nonzero().flatten().tolist())
        assert (~select(torch.ones(100), 1 - count / 100)).nonzero().flatten().tolist() == list(range(100 - count, 100))
    assert not gone[1] <= gone[2]


def test_of_equal_rows_torch_keeps_others_than_of_equal_weights():
    rows = reference.LnStructured(1, n=1, dim=0).compute_mask(torch.ones(8, 3), torch.ones(8, 3))
    weights = reference.L1Unstructured(1).compute_mask(torch.ones(8), torch.ones(8))
    assert (rows[:, 0] == 0).nonzero().item() != (weights == 0).nonzero().item()
    assert (~select(torch.ones(8, 3), 7 / 8, unit="row")[:, 0]).nonzero().item() == 7
