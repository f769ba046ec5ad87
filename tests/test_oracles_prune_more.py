"""What proves the further methods of chapter 02 right: identities, closed forms, whole enumerations and well-kept libraries, a test a claim.

Networks are float64; the digits MLP is 64-32-10. Orderings hold on the mean over the seeds named in the test, with the sizes that stand there.
"""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import nn

from cmlib.core.apply import weighted
from cmlib.core.bake import bake
from cmlib.core.planner import Planner, gather
from cmlib.core.select import select
from cmlib.lab.train import fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import prune_neurons as neurons
from tests.networks import stirred

F64 = torch.float64


def two_layers(inputs, units, outputs, seed=0):
    """A dense network with one hidden ReLU layer, float64; draws of a normal distribution."""
    model = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, outputs)).double().eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=F64))
    return model


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# data-free parameter pruning


def twins(seed=0, noise=0.0):
    """A 6-8-3 network whose neuron 5 is made as neuron 2 is (up to noise), with outgoing weights of its own."""
    model = two_layers(6, 8, 3, seed)
    with torch.no_grad():
        model[0].weight[5] = model[0].weight[2] + noise * normal(6, seed=seed + 100)
        model[0].bias[5] = model[0].bias[2] + noise * normal(1, seed=seed + 200)[0]
    return model, normal(40, 6, seed=seed + 300)


def test_dfp_1_exact_twins_cost_nothing_and_are_merged():
    for seed in range(10):
        model, x = twins(seed)
        rows, a = (gather(model, weighted(model), e, (x, x[:, 0]))["0"] for e in ("filter_rows", "next_w"))
        gone, into, saliency = neurons.merging(rows, a)[0]
        assert {gone, into} == {2, 5} and saliency == 0.0
        assert neurons.data_free_pruning(rows, a).argmin() == gone
        copy = compress(model, "data_free_pruning", where="0", data=(x, x[:, 0]), keep=7 / 8)
        assert (copy(x) - model(x)).abs().max() < 1e-12
        assert bake(copy, (x, x[:, 0]))[0].out_features == 7
        silent = two_layers(6, 8, 3)
        silent.load_state_dict(model.state_dict())
        with torch.no_grad():
            silent[2].weight[:, gone] = 0.0
        assert (silent(x) - model(x)).abs().max() > 1e-3  # without a_i += a_j


def test_dfp_1_a_bias_of_its_own_makes_no_twin():
    """The note's toy: ||W_i - W_j|| without the bias takes these for twins, and merging them changes what the network says."""
    model, x = twins()
    with torch.no_grad():
        model[0].bias[5] += 1.0
    rows = gather(model, weighted(model), "filter_rows", (x, x[:, 0]))["0"]
    a = gather(model, weighted(model), "next_w", (x, x[:, 0]))["0"]
    assert torch.equal(rows, torch.cat([model[0].weight, model[0].bias[:, None]], 1))
    assert min(s for _, _, s in neurons.merging(rows, a)) > 0.01
    assert neurons.merging(rows[:, :-1], a)[0][2] == 0.0


def test_dfp_1_behind_a_batch_norm_twins_are_what_it_makes_equal():
    """Filter 3 is three times filter 1; a batch norm scaled by a third, with its own mean, makes their maps equal."""
    model = stirred(build("cnn", "digits"), dtype=F64)
    x = torch.rand(30, 1, 8, 8, dtype=F64)
    conv, norm = model.conv1, model.bn1
    with torch.no_grad():
        conv.weight[3] = 3 * conv.weight[1]
        if conv.bias is not None:
            conv.bias[3] = 3 * conv.bias[1]
        norm.running_mean[3], norm.weight[3], norm.bias[3] = 3 * norm.running_mean[1], norm.weight[1], norm.bias[1]
        norm.running_var[3] = 9 * (norm.running_var[1] + norm.eps) - norm.eps
    copy = compress(model, "data_free_pruning", where="conv1", keep=7 / 8)
    assert (copy(x) - model(x)).abs().max() < 1e-12
    first = neurons.merging(*(gather(model, {"conv1": conv}, e, None)["conv1"] for e in ("filter_rows", "next_w")))[0]
    assert set(first[:2]) == {1, 3} and first[2] < 1e-24


def test_dfp_2_one_merge_changes_the_output_by_no_more_than_its_saliency_times_the_input():
    model, x = two_layers(6, 8, 1), normal(50, 6, seed=7)
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
    a, before = model[2].weight.detach()[0], model(x).detach()[:, 0]
    sizes = x.square().sum(1) + 1
    for i, j in itertools.permutations(range(8), 2):
        maps = F.relu(model[0](x)).detach()
        after = before - a[j] * maps[:, j] + a[j] * maps[:, i]
        assert ((after - before).square() <= a[j] ** 2 * (rows[i] - rows[j]).square().sum() * sizes + 1e-12).all()
    _, _, saliency = neurons.merging(rows, model[2].weight.detach()[:, :, None])[0]
    expected = [a[j] ** 2 * (rows[i] - rows[j]).square().sum() for i, j in itertools.permutations(range(8), 2)]
    assert saliency == pytest.approx(min(expected).item(), rel=1e-12)


def test_dfp_the_one_that_goes_pays_with_its_own_outgoing_weights():
    rows, a = normal(2, 4), torch.tensor([[3.0, 1.0], [4.0, -1.0]], dtype=F64)[:, :, None]
    (gone, into, saliency), apart = neurons.merging(rows, a)[0], (rows[0] - rows[1]).square().sum().item()
    assert (gone, into) == (1, 0) and saliency == pytest.approx(1.0 * apart)
    gone, _, saliency = neurons.merging(rows, a.flip(1))[0]
    assert gone == 0 and saliency == pytest.approx(1.0 * apart)


def test_dfp_three_alike_are_merged_in_turn_and_saliencies_never_fall():
    model, x = twins()
    with torch.no_grad():
        model[0].weight[7], model[0].bias[7] = model[0].weight[2], model[0].bias[2]
    copy = compress(model, "data_free_pruning", where="0", data=(x, x[:, 0]), keep=6 / 8)
    assert (copy(x) - model(x)).abs().max() < 1e-12
    rows, a = (gather(model, weighted(model), e, (x, x[:, 0]))["0"] for e in ("filter_rows", "next_w"))
    order, scores = [j for j, _, _ in neurons.merging(rows, a)], neurons.data_free_pruning(rows, a)
    assert (scores[order].diff() > 0).all()
    below = compress(model, "data_free_pruning", where="0", data=(x, x[:, 0]), threshold=1e-9)
    assert (below(x) - model(x)).abs().max() < 1e-12 and bake(below, (x, x[:, 0]))[0].out_features == 6


def test_dfp_the_next_saliency_counts_what_was_taken_over():
    """Neuron 1 has taken 0's outgoing weights when 1 and 2 are compared: 0 and 1 are alike, 2 apart and loud."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 1.0]], dtype=F64)
    a = torch.tensor([[2.0, 2.5, 9.0], [1.0, -0.5, 9.0]], dtype=F64)[:, :, None]
    (first, into, _), (second, _, saliency) = neurons.merging(rows, a)
    assert {first, into} == {0, 1} and second == into
    assert saliency == pytest.approx((4.5**2 + 0.5**2) / 2 * 5)


def test_dfp_filter_rows_are_the_convolution_with_its_batch_norm():
    model, x = stirred(build("cnn", "digits"), dtype=F64), torch.rand(5, 1, 8, 8, dtype=F64)
    rows = gather(model, weighted(model), "filter_rows", None)["conv1"]
    folded = F.conv2d(x, rows[:, :-1].reshape(model.conv1.weight.shape), rows[:, -1], model.conv1.stride, model.conv1.padding)
    assert torch.allclose(folded, model.bn1(model.conv1(x)), rtol=0, atol=1e-12)


def test_dfp_3_it_runs_without_data():
    assert plan(load_net("mlp", "digits"), "data_free_pruning", where="fc1", keep=0.5)["fc1"].rows.sum() == 16


def test_dfp_4_merging_beats_removing_at_random_where_neurons_are_alike():
    """6-24-3 networks, each neuron planted three times with noise 0.05; 8 of 24 stay; mean over 10 seeds of the output's squared error."""
    ours, theirs = [], []
    for seed in range(10):
        model, x = two_layers(6, 24, 3, seed), normal(200, 6, seed=seed + 50)
        with torch.no_grad():
            for layer in (model[0].weight, model[0].bias):
                layer.copy_(layer[:8].repeat(3, *[1] * (layer.dim() - 1)) + 0.05 * normal(*layer.shape, seed=seed + 60))
        for found, method in ((ours, "data_free_pruning"), (theirs, "random_pruning")):
            copy = compress(model, method, where="0", data=(x, x[:, 0]), keep=8 / 24, unit="filter")
            found.append((copy(x) - model(x)).square().mean().item())
    assert np.mean(ours) < 0.1 * np.mean(theirs)


# synaptic strength


def normed(gamma, beta, w, x):
    """relu(gamma x + beta) convolved with w, and without the ReLU: what a batch norm, its ReLU and the next convolution make of normalised x."""
    maps = gamma.reshape(1, -1, 1, 1) * x + beta.reshape(1, -1, 1, 1)
    return F.conv2d(F.relu(maps), w), F.conv2d(maps, w)


def test_synapse_1_a_dropped_scale_moves_into_the_kernels_where_it_is_positive():
    w, x, beta = normal(5, 4, 3, 3), normal(2, 4, 7, 7, seed=1), normal(4, seed=2)
    gamma = normal(4, seed=3).abs() + 0.1
    kernels, shift = neurons.reparameterised(w, gamma, beta)
    for before, after in zip(normed(gamma, beta, w, x), normed(torch.ones(4, dtype=F64), shift, kernels, x), strict=True):
        assert torch.allclose(after, before, rtol=0, atol=1e-10)
    s = neurons.strengths(w, gamma[None, :, None, None])
    unit = w / torch.linalg.norm(w, dim=(2, 3), keepdim=True)
    assert torch.allclose(kernels, s[:, :, None, None] * unit, rtol=0, atol=1e-12)


def test_synapse_1_a_negative_scale_loses_its_sign():
    """The catalogue's first claim fails there: a norm has no sign."""
    w, x, beta, gamma = normal(5, 4, 3, 3), normal(2, 4, 7, 7, seed=1), normal(4, seed=2), -torch.ones(4, dtype=F64)
    kernels, shift = neurons.reparameterised(w, gamma, beta)
    for before, after in zip(normed(gamma, beta, w, x), normed(-gamma, shift, kernels, x), strict=True):
        assert (after - before).abs().max() > 1


def test_synapse_2_what_batch_norm_and_kernel_share_does_not_matter():
    model, c = stirred(build("cnn", "digits"), dtype=F64), 7.0
    x = torch.rand(20, 1, 8, 8, dtype=F64)
    find_s = lambda: Planner(model, neurons.synaptic_strength, where="conv2", data=(x, x[:, 0, 0, 0])).ranking(  # noqa: E731
        **neurons.synaptic_strength.bind({})
    ).scores["conv2"]  # fmt: skip
    before, said, plain = find_s(), model(x), torch.linalg.norm(model.conv2.weight.detach(), dim=(2, 3))
    with torch.no_grad():
        model.bn1.weight[2] *= c
        model.bn1.bias[2] *= c
        model.conv2.weight[:, 2] /= c
    assert torch.allclose(model(x), said, rtol=0, atol=1e-12) and torch.allclose(find_s(), before, rtol=1e-12)
    changed = torch.linalg.norm(model.conv2.weight.detach(), dim=(2, 3))
    assert not torch.equal(changed.flatten().argsort(), plain.flatten().argsort())


def test_synapse_3_with_all_scales_one_it_ranks_kernels_by_their_norm():
    w = normal(6, 4, 3, 3)
    s = neurons.synaptic_strength(w, torch.ones(1, 4, 1, 1, dtype=F64))
    norms = torch.linalg.norm(w, dim=(2, 3))
    assert torch.allclose(s.expand(w.shape).sum((2, 3)), norms, rtol=1e-12)
    assert torch.equal(select(s.expand(w.shape), 0.3, unit="kernel")[:, :, 0, 0], select(norms, 0.3))


def test_synapse_the_scale_is_that_of_the_channel_that_comes_in():
    """Not of the one that goes out; through a flattening, of each of its pixels; the first layer reads an image, whose scale is 1."""
    model = stirred(build("cnn", "digits"), dtype=F64)
    found = gather(model, weighted(model), "gamma_in", None)
    assert torch.equal(found["conv1"], torch.ones_like(found["conv1"]))
    assert torch.equal(found["conv2"][3].flatten(), model.bn1.weight.detach().abs())
    pixels = model.fc.in_features // len(model.bn2.weight)
    assert torch.equal(found["fc"][0], model.bn2.weight.detach().abs().repeat_interleave(pixels))


def test_synapse_the_scale_reaches_each_group_of_a_grouped_convolution():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    found = gather(model, weighted(model), "gamma_in", (torch.rand(2, 1, 6, 6, dtype=F64), torch.zeros(2, dtype=torch.int64)))["2"]
    assert found.shape == (6, 2, 1, 1)
    assert found[:3, :, 0, 0].tolist() == [[1, 2]] * 3 and found[3:, :, 0, 0].tolist() == [[3, 4]] * 3


def test_synapse_4_a_kernel_of_zeros_is_free_and_a_scale_of_zero_is_not():
    """The catalogue's fourth claim fails at gamma = 0: the channel is then the constant relu(beta), which its kernels pass on."""
    w, x, gamma = normal(5, 4, 3, 3), normal(2, 4, 7, 7, seed=1), normal(4, seed=3)
    gamma[1] = 0.0
    without = w.clone()
    without[:, 1] = 0.0
    assert (neurons.strengths(w, gamma[None, :, None, None])[:, 1] == 0).all()
    for beta, free in ((torch.full((4,), 0.7, dtype=F64), False), (torch.full((4,), -0.7, dtype=F64), True)):
        moved = (normed(gamma, beta, w, x)[0] - normed(gamma, beta, without, x)[0]).abs().max()
        assert (moved == 0) == free and (free or moved > 1)
    gone = w.clone()
    gone[2, 3] = 0.0
    s = neurons.strengths(gone, gamma[None, :, None, None])
    assert s[2, 3] == 0 and (s > 0).sum() == 14


def test_synapse_the_pressure_is_the_gradient_of_the_sum_of_strengths():
    model = stirred(build("cnn", "digits"), dtype=F64).train()
    with torch.no_grad():
        model.bn1.weight[0] *= -1
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    neurons.synapses(0.3, {"conv2": "bn1"}).gradients(model, None)
    total = 0.3 * neurons.strengths(model.conv2.weight, model.bn1.weight[None, :, None, None]).sum()
    by_w, by_gamma = torch.autograd.grad(total, [model.conv2.weight, model.bn1.weight])
    assert torch.allclose(model.conv2.weight.grad, by_w, rtol=0, atol=1e-12)
    assert torch.allclose(model.bn1.weight.grad, by_gamma, rtol=0, atol=1e-12) and not model.fc.weight.grad.any()


def test_synapse_training_under_pressure_makes_connections_weak(digits):
    """Digits CNN, 2 epochs of SGD at 0.1 from the trained one, one seed: the sum of conv2's strengths with lambda 0.03 and without."""
    total = []
    for lam in (0.0, 0.03):
        model = load_net("cnn", "digits")
        fit(model, digits, epochs=2, lr=0.1, optimizer=torch.optim.SGD, hooks=[neurons.synapses(lam, {"conv2": "bn1"})], keep_best=False)
        total.append(neurons.strengths(model.conv2.weight.detach(), model.bn1.weight.detach()[None, :, None, None]).sum().item())
    assert total[1] < 0.7 * total[0]


# determinantal point processes


ITEMS, DRAWS = 5, 20_000


def kernel(seed=0, rank=7):
    b = normal(ITEMS, rank, seed=seed) / 2
    return b @ b.T


def subsets(k=None):
    return [s for n in ([k] if k is not None else range(ITEMS + 1)) for s in itertools.combinations(range(ITEMS), n)]


def volume(l, s):  # noqa: E741
    return torch.linalg.det(l[list(s)][:, list(s)]).item() if s else 1.0


def test_dpp_1_the_elementary_polynomials_of_the_eigenvalues_are_the_volumes_of_all_subsets():
    l = kernel()  # noqa: E741
    e = neurons.log_elementary(neurons.spectrum(l)[0], ITEMS)[-1].exp()
    for k in range(ITEMS + 1):
        assert e[k].item() == pytest.approx(sum(volume(l, s) for s in subsets(k)), rel=1e-10)
    assert e.sum().item() == pytest.approx(torch.linalg.det(l + torch.eye(ITEMS, dtype=F64)).item(), rel=1e-10)


def test_dpp_2_items_and_pairs_come_as_often_as_the_marginal_kernel_says():
    l = kernel()  # noqa: E741
    marginal = l @ torch.linalg.inv(l + torch.eye(ITEMS, dtype=F64))
    drawn = neurons.dpp(l, DRAWS, torch.Generator().manual_seed(0)).double()
    for size in (1, 2):
        for s in subsets(size):
            p = volume(marginal, s)
            assert abs(drawn[:, list(s)].prod(1).mean().item() - p) < 4 * math.sqrt(p * (1 - p) / DRAWS)
    assert abs(drawn.sum(1).mean().item() - marginal.trace().item()) < 4 * drawn.sum(1).std().item() / math.sqrt(DRAWS)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_dpp_3_subsets_of_k_items_come_as_often_as_their_volume(k):
    l, all_of_k = kernel(), subsets(k)  # noqa: E741
    drawn = neurons.k_dpp(l, k, DRAWS, torch.Generator().manual_seed(k))
    assert (drawn.sum(1) == k).all()
    volumes = np.array([volume(l, s) for s in all_of_k])
    count = np.array([(drawn[:, list(s)].all(1)).sum().item() for s in all_of_k])
    expected = DRAWS * volumes / volumes.sum()
    assert ((count - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, len(all_of_k) - 1)


def test_dpp_4_two_of_the_same_are_never_drawn_together():
    l = kernel()  # noqa: E741
    same = [0, 1, 2, 3, 3]
    l = l[same][:, same]  # noqa: E741
    for drawn in (neurons.dpp(l, DRAWS, torch.Generator().manual_seed(0)), neurons.k_dpp(l, 3, DRAWS, torch.Generator().manual_seed(0))):
        assert not (drawn[:, 3] & drawn[:, 4]).any() and drawn[:, 3].any() and drawn[:, 4].any()
    with pytest.raises(ValueError, match=r"k=5 .* more than 4, the kernel's rank"):
        neurons.k_dpp(l, 5, 1, torch.Generator())


def test_dpp_5_with_a_diagonal_kernel_items_are_independent():
    values = torch.tensor([0.2, 1.0, 3.0, 0.5, 8.0], dtype=F64)
    drawn = neurons.dpp(values.diag(), DRAWS, torch.Generator().manual_seed(0)).double()
    p = values / (1 + values)
    assert ((drawn.mean(0) - p).abs() < 4 * (p * (1 - p) / DRAWS).sqrt()).all()
    together, expected = drawn.T @ drawn / DRAWS, p[:, None] * p
    off = ~torch.eye(ITEMS, dtype=torch.bool)
    assert ((together - expected).abs() < 4.5 * (expected * (1 - expected) / DRAWS).sqrt())[off].all()


def test_dpp_a_draw_is_not_the_likeliest_set():
    """The note's toy: the greedy set is always the same one."""
    acts = normal(30, 6, 1)
    sets = {tuple(neurons.determinantal_point_process(acts, keep=0.5, beta=0.3, seed=s).tolist()) for s in range(60)}
    assert len(sets) > 8 and all(sum(s) == 3 for s in sets)


def test_dpp_the_kernel_is_of_the_mean_squared_difference_of_activations():
    acts = normal(20, 4, 3)
    l = neurons.similarity(acts, 2.5)  # noqa: E741
    for i, j in itertools.product(range(4), repeat=2):
        assert l[i, j].item() == pytest.approx(math.exp(-2.5 * (acts[:, i] - acts[:, j]).square().sum().item() / 20), rel=1e-12)


def test_dpp_more_neurons_than_differ_are_topped_up():
    acts = normal(20, 3, 1)[:, [0, 0, 0, 1, 2]]
    drawn = neurons.determinantal_point_process(acts, keep=0.8)
    assert drawn.sum() == 3 and drawn[3] and drawn[4] and select(drawn[:, None], 0.8).sum() == 4


# Divnet


def test_divnet_1_the_fusion_is_least_squares_on_the_activations():
    v, w, rows = normal(80, 6, 1), normal(3, 6, 1, seed=1), torch.tensor([True, False, True, True, False, True])
    fused = neurons.divnet.rebuild(rows, v, w, reweight="on")
    flat = v[:, :, 0].numpy()
    expected = np.linalg.lstsq(flat[:, rows.numpy()], flat @ w[:, :, 0].T.numpy(), rcond=None)[0]
    assert np.abs(fused[:, rows, 0].T.numpy() - expected).max() < 1e-10 and (fused[:, ~rows] == 0).all()
    assert torch.equal(neurons.divnet.rebuild(rows, v, w, reweight="off"), w)


def planted_layer(seed=0):
    """A network 5-9-4 with no ReLU between, whose nine neurons are combinations of three: (model, inputs)."""
    model = nn.Sequential(nn.Linear(5, 9, bias=False), nn.Linear(9, 4)).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(normal(9, 3, seed=seed) @ normal(3, 5, seed=seed + 1))
        model[1].weight.copy_(normal(4, 9, seed=seed + 2))
    return model, normal(60, 5, seed=seed + 3)


@pytest.mark.parametrize("seed", range(3))
def test_divnet_2_an_independent_set_gives_all_back(seed):
    model, x = planted_layer(seed)
    copy = compress(model, "divnet", where="0", data=(x, x[:, 0]), keep=3 / 9, beta=0.5, seed=seed)
    assert (copy(x) - model(x)).abs().max() < 1e-8 and bake(copy, (x, x[:, 0]))[0].out_features == 3
    bare = compress(model, "divnet", where="0", data=(x, x[:, 0]), keep=3 / 9, beta=0.5, seed=seed, reweight="off")
    assert (bare(x) - model(x)).abs().max() > 0.1


def test_divnet_3_the_same_twice_is_never_kept_as_epsilon_goes_to_zero():
    acts = normal(30, 6, 1)
    acts[:, 4] = acts[:, 1]
    both = {eps: np.mean([neurons.divnet(acts, None, keep=0.5, beta=0.5, epsilon=eps, seed=s)[[1, 4]].sum().item() == 2 for s in range(150)])
            for eps in (0.1, 1e-9)}  # fmt: skip
    assert both[1e-9] == 0 < both[0.1]


def test_divnet_4_keeping_all_changes_nothing(mlp, digits64):
    data = digits64[0][:100], digits64[1][:100]
    copy = compress(mlp, "divnet", where="fc1", data=data, keep=1.0)
    assert (predict(copy, data[0]) - predict(mlp, data[0])).abs().max() < 1e-8


def test_divnet_5_diverse_and_fused_beats_random_and_fused_beats_random(digits64):
    """Trained digits MLP, 10 draws each, 8 of 32 neurons left and nothing retrained: mean squared change of the logits."""
    model, data = load_net("mlp", "digits").double(), (digits64[0][:400], digits64[1][:400])
    v, w = (gather(model, {"fc1": model.fc1}, e, data)["fc1"] for e in ("next_acts_in", "next_w"))
    errors = {"diverse": [], "random": [], "bare": []}
    for seed in range(10):
        rows = {"diverse": neurons.divnet(v, w, keep=0.25, seed=seed) > 0}
        rows["random"] = rows["bare"] = torch.randperm(32, generator=torch.Generator().manual_seed(seed)) < 8
        for name, r in rows.items():
            fused = neurons.divnet.rebuild(r, v, w, reweight="off" if name == "bare" else "on") * r[:, None]
            errors[name].append((v.flatten(1) @ (fused - w).flatten(1).T).square().mean().item())
    assert np.mean(errors["diverse"]) < np.mean(errors["random"]) < np.mean(errors["bare"])
