"""What proves the further methods of chapter 02 right: identities, closed forms, whole enumerations and well-kept libraries, a test a claim.

Networks are float64; the digits MLP is 64-32-10. Orderings hold on the mean over the seeds named in the test, with the sizes that stand there.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from scipy.stats import chi2, norm
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from torch import nn

from cmlib.core.apply import latent, plan_of, weighted, with_plain_weights
from cmlib.core.bake import bake
from cmlib.core.evidence import quality
from cmlib.core.planner import Planner, gather
from cmlib.core.select import select
from cmlib.core.spectral import Spectral, dct, dct_matrix, idct
from cmlib.core.training import Hook
from cmlib.lab.train import fit, predict
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import prune_budgets as budgets
from cmlib.methods import prune_neurons as neurons
from cmlib.methods import prune_training as learnt
from tests.networks import stirred

F64 = torch.float64
SGD = partial(torch.optim.SGD, momentum=0.0)
PLAIN = {"optimizer": SGD, "schedule": "constant", "keep_best": False}

MUTATIONS = [
    ("data_free_pruning", "cmlib/methods/prune_neurons.py", "a.square().mean((0, 2)) * apart", "a.square().mean((0, 2))[:, None] * apart",
     "the one that stays pays, not the one that goes"),
    ("synaptic_strength", "cmlib/methods/prune_neurons.py", "gamma_in.flatten(1).abs()", "gamma_in.flatten(1)", "a negative scale counts as weak"),
    ("determinantal_point_process", "cmlib/methods/prune_neurons.py", "- table[i + 1, left]).exp()", "- table[i, left]).exp()",
     "one eigenvalue too few in the polynomial below the line"),
    ("divnet", "cmlib/methods/prune_neurons.py", "fused[stays] = w[stays] + torch.linalg", "fused[stays] = torch.linalg",
     "what a neuron says itself is forgotten"),
    ("variational_dropout_lrt", "cmlib/methods/prune_training.py", "_alpha(packed.state) * packed.values.square()",
     "_alpha(packed.state) * packed.values.abs()", "the noise's variance misses its square"),
    ("sensitivity_driven_regularization", "cmlib/methods/prune_training.py", '(1 - sensitivity[int(specific == "on")]).clamp(min=0)',
     'sensitivity[int(specific == "on")].clamp(max=1)', "what the output depends on decays"),
    ("learning_compression", "cmlib/methods/prune_training.py", 'state["lam"] - state["mu"] * (w.detach() - theta)',
     'state["lam"] + state["mu"] * (w.detach() - theta)', "the multiplier's wrong sign"),
    ("frequency_domain_pruning", "cmlib/methods/prune_training.py", "return band**-slope", "return band**slope", "low frequencies go first"),
    ("energy_constrained_projection", "cmlib/methods/prune_budgets.py", "order = (value / cost).argsort(", "order = value.argsort(",
     "by worth alone, whatever it costs"),
    ("constraint_aware_compression", "cmlib/methods/prune_budgets.py", "torch.special.ndtr((cap - cost[0]) / cost[1])",
     "torch.special.ndtr((cost[0] - cap) / cost[1])", "the chance to be too expensive"),
]  # fmt: skip


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


# variational dropout with local reparameterization


def noisy(layer, **knobs):
    """A layer attached to its noise, in training mode."""
    return compress(nn.Sequential(layer.double()), "variational_dropout_lrt", **knobs).train()[0]


@pytest.mark.parametrize("sharing", ["layer", "neuron", "weight"])
def test_lrt_1_pre_activations_have_the_moments_of_noisy_weights(sharing):
    """200,000 draws at the pre-activations, 20,000 of whole weights, and the closed forms."""
    layer, x = noisy(nn.Linear(5, 3), sharing=sharing, alpha=0.4, alpha_max=0.8), normal(1, 5)
    theta, alpha, many = latent(layer).detach(), 0.32, 200_000
    with torch.no_grad():
        out = layer(x.expand(many, -1))
    mean, variance = F.linear(x, theta, layer.bias.detach())[0], alpha * F.linear(x**2, theta**2)[0]
    assert ((out.mean(0) - mean).abs() < 4.5 * (variance / many).sqrt()).all() and (out.var(0) / variance - 1).abs().max() < 0.02
    drawn = theta * (1 + alpha**0.5 * torch.randn(20_000, 3, 5, dtype=F64))
    explicit = (drawn @ x[0]) + layer.bias.detach()
    assert (explicit.mean(0) - mean).abs().max() < 0.05 * variance.sqrt().max() and (explicit.var(0) / variance - 1).abs().max() < 0.06


def test_lrt_2_the_gradients_variance_falls_with_the_number_of_examples():
    """The same 4 examples R times: one noise an example gives 1 / R, one weight for the batch stays; both have the same mean. 1,500 draws each."""
    x, y, theta = normal(4, 5), normal(4, 3, seed=1), normal(3, 5, seed=2)
    sigma, times, draws = torch.full((3, 5), 0.3, dtype=F64), (1, 4, 16, 64), 1500
    spread, mean = {"local": [], "shared": []}, {"local": [], "shared": []}
    for r in times:
        xs, ys = x.repeat(r, 1), y.repeat(r, 1)
        local, shared = (noise.double() for noise in (torch.randn(draws, 4 * r, 3), torch.randn(draws, 3, 5)))
        variance = xs.square() @ sigma.square().T
        error = xs @ theta.T + variance.sqrt() * local - ys  # loss: half the mean over examples of the squared error
        by_variance = error * local / (2 * variance.sqrt()) / len(xs)
        found = {"local": 2 * sigma * torch.einsum("dno,ni->doi", by_variance, xs.square())}
        error = torch.einsum("ni,doi->dno", xs, theta + sigma * shared) - ys
        found["shared"] = torch.einsum("dno,ni->doi", error, xs) / len(xs) * shared
        for name, g in found.items():
            spread[name].append(g.var(0).mean().item())
            mean[name].append(g.mean().item())
    slope = {n: np.polyfit(np.log(times), np.log(s), 1)[0] for n, s in spread.items()}
    assert abs(slope["local"] + 1) < 0.1 and abs(slope["shared"]) < 0.1
    assert np.allclose(mean["local"], mean["shared"], atol=0.05)


def test_lrt_2_so_does_that_of_the_layer_itself():
    """The gradient that reaches the layer's own alpha, 4 examples once and 16 times over, 600 draws of each."""
    layer, x, y = noisy(nn.Linear(5, 3), sharing="weight"), normal(4, 5), normal(4, 3, seed=1)
    logit, spread = layer.parametrizations.weight[0].logit, []
    for r in (1, 16):
        xs, ys = x.repeat(r, 1), y.repeat(r, 1)
        grads = [torch.autograd.grad((layer(xs) - ys).square().sum(1).mean() / 2, logit)[0] for _ in range(600)]
        spread.append(torch.stack(grads).var(0).mean().item())
    assert spread[0] / spread[1] == pytest.approx(16, rel=0.25)


def test_lrt_3_without_noise_it_is_the_deterministic_network_exactly():
    layer, x = noisy(nn.Linear(6, 4), sharing="layer"), normal(9, 6)
    with torch.no_grad():
        layer.parametrizations.weight[0].logit.fill_(-math.inf)
    assert torch.equal(layer(x), F.linear(x, latent(layer), layer.bias))


def test_lrt_4_a_fixed_alpha_has_the_moments_of_dropout():
    """Bernoulli dropout of the inputs at rate p, scaled by 1 / (1 - p): alpha = p / (1 - p). 200,000 draws."""
    p, x, many = 0.3, normal(1, 5), 200_000
    layer = noisy(nn.Linear(5, 3), alpha=p / (1 - p))
    with torch.no_grad():
        ours = layer(x.expand(many, -1))
        theirs = F.linear(F.dropout(x.expand(many, -1), p), latent(layer), layer.bias)
    assert torch.allclose(ours.mean(0), theirs.mean(0), rtol=0, atol=0.02) and torch.allclose(ours.var(0), theirs.var(0), rtol=0.02)


def test_lrt_the_cubic_is_the_kl():
    """Monte Carlo of E log|1 + sqrt(alpha) eps| - log(alpha) / 2, up to a constant, on alpha from 0.06 to 1."""
    alpha, eps = torch.linspace(0.06, 1, 25, dtype=F64), torch.randn(300_000, dtype=F64)
    sampled = torch.stack([torch.cat([1 + r * eps, 1 - r * eps]).abs().log().mean() for r in alpha.sqrt()]) - alpha.log() / 2
    apart = learnt.kl_gaussian_dropout(alpha) - sampled
    assert (apart - apart.mean()).abs().max() < 0.01
    assert (learnt.kl_gaussian_dropout(alpha).diff() < 0).all()


@pytest.mark.parametrize("sharing, count", [("layer", 1), ("neuron", 5), ("weight", 30)])
def test_lrt_each_weight_pays_its_kl_over_the_examples(sharing, count):
    w = normal(6, 5)
    packed = learnt.variational_dropout_lrt(w, True, sharing=sharing, alpha=0.5, alpha_max=0.6)
    assert packed.state["logit"].numel() == count and packed.mask.all()
    term = learnt.variational_dropout_lrt.training.penalty(packed, w, 50, kl_weight=0.7)
    assert term.item() == pytest.approx(0.7 / 50 * 30 * learnt.kl_gaussian_dropout(torch.tensor(0.3, dtype=F64)).item(), rel=1e-6)


def test_lrt_what_is_noisiest_goes_and_of_equals_the_smallest():
    w = torch.tensor([[4.0, -1.0, 2.0], [0.5, 3.0, -6.0]], dtype=F64)
    logit = torch.tensor([[0.0, -3.0, 2.0]], dtype=F64)
    packed = learnt.variational_dropout_lrt(w, False, keep=0.5, sharing="neuron", state={"logit": logit, "alpha_max": 1.0})
    assert packed.mask.tolist() == [[True, True, False], [False, True, False]]


def test_lrt_trained_noise_finds_inputs_that_do_not_matter():
    """One regression, 4 inputs matter and 4 do not, nor by chance: orthogonal, N = 200, 300 full-batch steps of Adam at 0.05, alpha a neuron."""
    x = torch.linalg.qr(normal(200, 8)).Q * 200**0.5
    y = x[:, :4] @ torch.tensor([[1.0], [-1.5], [2.0], [-1.0]], dtype=F64) + 0.3 * normal(200, 1, seed=1)
    y -= x[:, 4:] @ (x[:, 4:].T @ y) / 200
    model = nn.Sequential(nn.Linear(8, 1, bias=False)).double()
    copy = compress(model, "variational_dropout_lrt", sharing="neuron")
    nll = lambda z, t: (z - t).square().sum(1).mean() / (2 * 0.09)  # noqa: E731
    fit(copy, (x, y), epochs=300, batch=200, lr=0.05, optimizer=torch.optim.Adam, loss=nll, keep_best=False)
    alpha = learnt._alpha(copy[0].parametrizations.weight[0].content())[0]
    assert alpha[:4].max() < 0.02 and alpha[4:].min() > 0.2
    assert plan_of(copy)["0"].mask[0].tolist() == [True] * 4 + [False] * 4


# sensitivity-driven regularization


def small_net(seed=0):
    model = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(*p.shape, seed=seed))
    return model


@pytest.mark.parametrize("count", [7, 40])
def test_sens_1_it_is_the_mean_absolute_jacobian(count):
    model, x, y = small_net(), normal(count, 1, 7, 7), torch.arange(count) % 4
    found = gather(model, weighted(model), "sensitivity", (x, y))
    params = {n: p.detach() for n, p in model.named_parameters()}
    jacobian = torch.func.vmap(torch.func.jacrev(lambda p, xi: torch.func.functional_call(model, p, xi[None])[0]), (None, 0))(params, x)
    for name, s in found.items():
        each = jacobian[f"{name}.weight"].abs()  # (examples, outputs, *w.shape)
        assert torch.allclose(s[0], each.mean((0, 1)), rtol=0, atol=1e-12)
        assert torch.allclose(s[1], each[torch.arange(count), y].mean(0), rtol=0, atol=1e-12)


def nothing(z, y):
    return 0 * z.sum()


def test_sens_2_alone_it_decays_only_what_does_not_matter():
    """The outputs are sums of inputs that are all s: S of a weight is s / 2 (it reaches one output of two)."""
    lam, steps = 0.01, 30
    x = torch.tensor([[0.0, 1.0, 2.0, 5.0]], dtype=F64).expand(8, 4)
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double()
    before = model[0].weight.detach().clone()
    copy = compress(model, "sensitivity_driven_regularization", lam=lam, threshold_after=0.0)
    fit(copy, (x, torch.zeros(8, dtype=torch.int64)), epochs=steps, batch=8, lr=0.1, loss=nothing, **PLAIN)
    expected = before * torch.tensor([1 - lam, 1 - lam / 2, 1.0, 1.0], dtype=F64) ** steps
    assert torch.allclose(latent(copy[0]), expected, rtol=1e-12) and torch.equal(latent(copy[0])[:, 2:], before[:, 2:])


def test_sens_3_without_sensitivity_it_is_weight_decay_of_lam_over_lr_and_without_lam_sgd():
    x, y = normal(40, 5), normal(40, 2, seed=1)
    mse = lambda z, t: (z - t).square().mean()  # noqa: E731
    decay, lr, lam = learnt.sensitivity_driven_regularization.training.project, 0.05, 0.02
    ours, theirs = normal(2, 5, seed=2).requires_grad_(), normal(2, 5, seed=2).requires_grad_()
    ours_rule, theirs_rule = torch.optim.SGD([ours], lr=lr), torch.optim.SGD([theirs], lr=lr, weight_decay=lam / lr)
    for _ in range(20):
        for w, rule in ((ours, ours_rule), (theirs, theirs_rule)):
            rule.zero_grad()
            mse(x @ w.T, y).backward()
        with torch.no_grad():
            pull = decay(ours, torch.zeros(2, 2, 5), lam=lam, specific="off") - ours
            assert torch.equal(decay(ours, torch.zeros(2, 2, 5), lam=0.0, specific="off"), ours)
        ours_rule.step()
        with torch.no_grad():
            ours += pull  # of the weight before the step, as both formulas have it
        theirs_rule.step()
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_sens_4_what_sees_nothing_goes_and_what_matters_stays_larger_than_under_l2(digits64):
    """Digits MLP, three of whose pixels are always 0; 300 examples, 16 epochs of SGD at 0.5, lam 0.05 a step against an L2 decay of as much."""
    x, y = digits64[0][:300], digits64[1][:300]
    dead = (x.flatten(1) == 0).all(0)
    start = load_net("mlp", "digits").double()
    knobs, lr = {"epochs": 16, "batch": 50, **PLAIN}, 0.5
    copy = compress(start, "sensitivity_driven_regularization", lam=0.05, threshold_after=0.02)
    fit(copy, (x, y), lr=lr, **knobs)
    plain = load_net("mlp", "digits").double()
    fit(plain, (x, y), lr=lr, weight_decay=0.05 / lr, **knobs)
    assert dead.sum() >= 3 and not plan_of(copy)["fc1"].mask[:, dead].any() and plan_of(copy)["fc1"].mask[:, ~dead].any()
    s = gather(start, weighted(start), "sensitivity", (x, y))["fc2"][0]
    important = s > s.median()
    assert copy.fc2.weight[important].norm() > plain.fc2.weight[important].norm()


def test_sens_the_loss_gradient_would_call_everything_insensitive(digits64):
    """The note's toy: where training has ended, the gradient of the loss is some hundred times smaller than that of the outputs."""
    model, data = load_net("mlp", "digits").double(), (digits64[0][:300], digits64[1][:300])
    s, g = (gather(model, weighted(model), e, data)["fc2"] for e in ("sensitivity", "grad"))
    assert g.abs().mean() < 0.01 * s[0].mean()


# the learning-compression algorithm


def correlated(n=60, d=10, seed=0):
    """A regression X (n, d) with correlated columns and y (n, 1), noise 0.3."""
    x = normal(n, d, seed=seed) + 1.5 * normal(n, 1, seed=seed + 1)
    return x, x @ normal(d, 1, seed=seed + 2) + 0.3 * normal(n, 1, seed=seed + 3)


def half_mse(x, y, w):
    return ((x @ w.reshape(-1, 1) - y).square().mean() / 2).item()


def refit(x, y, mask):
    """Least squares on the columns of ``mask``, the others zero."""
    w = torch.zeros(x.shape[1], dtype=F64)
    w[mask] = torch.linalg.lstsq(x[:, mask], y).solution[:, 0]
    return w


def l_step(x, y, state):
    """argmin L(w) + mu / 2 ||w - theta - lam / mu||^2 = (X^T X / N + mu I)^-1 (X^T y / N + mu theta + lam)."""
    h, mu = x.T @ x / len(x), state["mu"]
    right = x.T @ y / len(x) + (mu * state["theta"] + state["lam"]).T
    return torch.linalg.solve(h + mu * torch.eye(len(h), dtype=F64), right).T


def lc(x, y, rounds=200, growth=1.1, mu=1e-3, **knobs):
    """The whole algorithm with exact L steps: (w, theta, ||w - theta|| round by round)."""
    ask = partial(learnt.learning_compression, mu=mu, growth=growth, every=1, **knobs)
    w, apart = torch.linalg.lstsq(x, y).solution.T, []
    state = ask(w, False).state
    for _ in range(rounds):
        w = l_step(x, y, state)
        state = ask(w, True, state=state).state
        apart.append((w - state["theta"]).norm().item())
    return w[0], state["theta"][0], apart


def test_lc_1_the_l_step_is_where_loss_and_penalty_balance():
    x, y = correlated()
    for mu in (1e-3, 0.1, 10.0):
        state = {"theta": normal(1, 10, seed=4), "lam": 0.1 * normal(1, 10, seed=5), "mu": mu, "step": 0}
        w = l_step(x, y, state).requires_grad_()
        packed = learnt.learning_compression(w, False, state=state)
        total = (x @ w.T - y).square().mean() / 2 + learnt.learning_compression.training.penalty(packed, w)
        assert torch.autograd.grad(total, w)[0].abs().max() < 1e-10


def test_lc_1_fit_takes_the_l_step():
    """Full-batch gradient descent, no C step between, ends at the closed form."""
    x, y = correlated()
    x = x / x.std()
    model = nn.Sequential(nn.Linear(10, 1, bias=False)).double()
    copy = compress(model, "learning_compression", keep=0.3, mu=0.5, every=0)
    state = copy[0].parametrizations.weight[0].content()
    fit(copy, (x, y), epochs=900, batch=60, lr=0.15, loss=lambda z, t: (z - t).square().mean() / 2, **PLAIN)
    assert torch.allclose(latent(copy[0]), l_step(x, y, state), rtol=0, atol=1e-6)


def test_lc_2_the_c_step_is_the_nearest_point():
    """With kappa entries: over all supports of 10; with a charge: entry by entry on a fine grid."""
    for seed in range(5):
        v, mu, alpha = normal(1, 10, seed=seed), 0.7, 0.2
        found = learnt.CONSTRAINTS["l0"](v, mu, 0.4, alpha)
        supports = (torch.zeros(10, dtype=F64).index_fill(0, torch.tensor(s), 1.0) for s in itertools.combinations(range(10), 4))
        assert (found - v).square().sum().item() == pytest.approx(min((v * (1 - s)).square().sum().item() for s in supports))
        grid = torch.cat([torch.linspace(-4, 4, 80_001, dtype=F64), v[0], torch.zeros(1, dtype=F64)])
        for form, charge in (("l0_penalty", (grid != 0).double()), ("l1_penalty", grid.abs())):
            best = grid[(alpha * charge + mu / 2 * (grid - v.T).square()).argmin(1)]
            assert (learnt.CONSTRAINTS[form](v, mu, 0.4, alpha)[0] - best).abs().max() < 2e-4


def test_lc_3_w_and_theta_meet_and_theta_has_kappa_entries():
    for seed in range(5):
        _, theta, apart = lc(*correlated(seed=seed), keep=0.3)
        assert (theta != 0).sum() == 3 and apart[-1] < 1e-3 * apart[0]


def test_lc_4_on_average_it_beats_magnitude_pruning_and_refitting():
    """20 problems of 10 correlated columns, 3 stay: final losses, with the best of all supports below both."""
    ours, theirs, best = [], [], []
    for seed in range(20):
        x, y = correlated(seed=10 * seed)
        ours.append(half_mse(x, y, lc(x, y, keep=0.3)[1]))
        dense = torch.linalg.lstsq(x, y).solution.T
        theirs.append(half_mse(x, y, refit(x, y, select(dense.abs(), 0.3)[0])))
        best.append(min(half_mse(x, y, refit(x, y, list(s))) for s in itertools.combinations(range(10), 3)))
        assert best[-1] <= min(ours[-1], theirs[-1]) + 1e-12
    assert np.mean(ours) < np.mean(theirs)


def test_lc_5_with_everything_kept_it_is_the_dense_optimum():
    x, y = correlated()
    w, theta, _ = lc(x, y, rounds=60, keep=1.0)
    dense = torch.linalg.lstsq(x, y).solution[:, 0]
    assert torch.allclose(w, dense, rtol=0, atol=1e-8) and torch.allclose(theta, dense, rtol=0, atol=1e-8)


def test_lc_mu_that_grows_too_fast_freezes_the_first_mask():
    """The note's toy: 20 problems; grown a thousandfold at each step the first support nearly always stays, which is magnitude pruning."""
    same = {1.1: 0, 1000.0: 0}
    for growth, seed in itertools.product(same, range(20)):
        x, y = correlated(seed=10 * seed)
        first = select(torch.linalg.lstsq(x, y).solution.T.abs(), 0.3)[0]
        same[growth] += bool(torch.equal(lc(x, y, growth=growth, rounds=8 if growth > 2 else 200, keep=0.3)[1] != 0, first))
    assert same[1000.0] >= same[1.1] + 5


def test_lc_a_copy_computes_with_theta_and_trains_towards_it(mlp, digits64):
    data = digits64[0][:300], digits64[1][:300]
    copy = compress(mlp, "learning_compression", keep=0.2, mu=0.05, growth=1.5, every=5)
    fit(copy, data, epochs=20, batch=60, lr=0.01)
    for name, layer in weighted(copy).items():
        theta = plan_of(copy)[name].dense()
        assert torch.equal(layer.eval().weight, theta) and (theta != 0).sum() == theta.numel() - round(0.8 * theta.numel())
        assert (latent(layer) - theta).norm() < 0.1 * theta.norm()


# frequency-domain pruning


def test_fdnp_1_there_and_back_is_the_same_and_it_is_scipys():
    for shape in ((4, 3, 5, 5), (2, 2, 3, 7), (3, 2, 1, 1), (5, 4)):
        w = normal(*shape)
        assert torch.allclose(idct(dct(w)), w, rtol=0, atol=1e-12)
        axes = tuple(range(2, len(shape)))
        expected = dctn(w.numpy(), axes=axes, norm="ortho") if axes else w.numpy()
        assert np.abs(dct(w).numpy() - expected).max() < 1e-12
    assert torch.equal(dct(normal(5, 4)), normal(5, 4)) and torch.equal(dct(normal(5, 4, 1, 1)), normal(5, 4, 1, 1))


def test_fdnp_1_with_all_kept_the_outputs_are_the_networks():
    model = stirred(build("cnn", "digits"), dtype=F64)
    x = torch.rand(10, 1, 8, 8, dtype=F64)
    assert (compress(model, "frequency_domain_pruning", keep=1.0)(x) - model(x)).abs().max() < 1e-10


def test_fdnp_2_products_are_the_same_in_both_domains():
    w, x = normal(6, 3, 5, 5), normal(2, 3, 9, 9, seed=1)
    patches = F.unfold(x, 5).transpose(1, 2).reshape(2, 25, 3, 5, 5)
    ours = torch.einsum("npcuv,ocuv->nop", dct(patches.flatten(0, 1)).reshape(patches.shape), dct(w)).reshape(2, 6, 5, 5)
    assert torch.allclose(ours, F.conv2d(x, w), rtol=0, atol=1e-10)
    c = dct_matrix(5)
    assert torch.allclose(c @ c.T, torch.eye(5, dtype=F64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_fdnp_3_the_error_is_the_norm_of_what_is_pruned(keep):
    w = normal(6, 4, 5, 5)
    packed = learnt.frequency_domain_pruning(w, keep=keep)
    assert packed.kept == 600 - round((1 - keep) * 600)
    assert (packed.dense() - w).norm().item() == pytest.approx(dct(w)[~packed.mask].norm().item(), rel=1e-12)
    assert (dct(packed.dense())[~packed.mask].abs() < 1e-14).all()


def blurred(seed, sigma=1.2, size=7):
    """64 kernels of smooth noise: white noise blurred by a Gaussian, cut out of the middle."""
    t = torch.arange(-4, 5, dtype=F64)
    g = (-(t**2) / (2 * sigma**2)).exp()
    return F.conv2d(normal(64, 1, size + 8, size + 8, seed=seed), torch.outer(g, g)[None, None])


def test_fdnp_4_smooth_kernels_lose_less_in_frequencies_and_noise_loses_the_same():
    """Relative squared error at 80 % removed, slope 0, 5 seeds of 64 kernels of 7 by 7 each."""
    for make, holds in ((blurred, lambda f, s: f < 0.2 * s), (lambda seed: normal(64, 1, 7, 7, seed=seed), lambda f, s: abs(f - s) < 0.03)):
        error = {"frequency": [], "space": []}
        for seed in range(5):
            w = make(seed)
            pruned = {"frequency": learnt.frequency_domain_pruning(w, keep=0.2, slope=0.0).dense(), "space": w * select(w.abs(), 0.2)}
            for name, p in pruned.items():
                error[name].append(((p - w).square().sum() / w.square().sum()).item())
        assert holds(np.mean(error["frequency"]), np.mean(error["space"]))


def test_fdnp_5_the_slope_presses_on_high_frequencies_and_none_on_all_alike():
    w = normal(32, 4, 5, 5)
    flat, steep = (learnt.frequency_domain_pruning(w, keep=0.3, slope=s).mask for s in (0.0, 2.0))
    assert torch.equal(flat, select(dct(w).abs(), 0.3))
    band = torch.arange(5)[:, None] + torch.arange(5)
    share = [[m[:, :, band == b].double().mean().item() for b in (0, 4, 8)] for m in (flat, steep)]
    assert share[1][0] > 0.75 > 0.4 > share[0][0] and share[1][2] < 0.1 < share[0][2]
    assert learnt.band_weights(w, 2.0)[0, 0, 1, 3].item() == pytest.approx(1 / 25)


def test_fdnp_a_pruned_coefficient_can_return_unless_it_is_not_dynamic():
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.Flatten(), nn.Linear(2 * 36, 2)).double(), normal(64, 1, 8, 8)
    for dynamic in ("on", "off"):
        copy = compress(model, "frequency_domain_pruning", where="0", keep=0.3, dynamic=dynamic)
        before = plan_of(copy)["0"].mask
        fit(copy, (x, (x.mean((1, 2, 3)) > 0).long()), epochs=20, batch=32, lr=0.05, keep_best=False)
        after = plan_of(copy)["0"]
        assert torch.equal(after.mask, before) == (dynamic == "off") and after.kept == before.sum()
        assert torch.allclose(after.dense(), copy.eval()[0].weight, rtol=0, atol=1e-12)


def test_fdnp_all_of_w_learns_where_it_is_dynamic_and_else_what_stays():
    w, upstream = normal(4, 3, 5, 5).requires_grad_(), normal(4, 3, 5, 5, seed=1)
    for dynamic in ("on", "off"):
        packed = learnt.frequency_domain_pruning(w, True, keep=0.2, dynamic=dynamic)
        got = torch.autograd.grad((packed.through(packed.values) * upstream).sum(), w)[0]
        expected = upstream if dynamic == "on" else idct(dct(upstream) * packed.mask)
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_fdnp_what_is_stored_are_coefficients_and_written_again_they_are_the_same():
    packed = learnt.frequency_domain_pruning(normal(8, 4, 5, 5).float(), keep=0.2).frozen()
    assert packed.bits() < 0.3 * 32 * 800
    again = Spectral.decode(packed.arrays(), packed.meta())
    assert torch.equal(again.dense(), packed.dense())
    for name, array in packed.arrays().items():
        assert array.tobytes() == again.arrays()[name].tobytes()
    assert (packed.dense() != 0).all() and np.allclose(
        np.sort(dct(packed.dense())[packed.mask].numpy()), np.sort(packed.arrays()["values"]), atol=1e-5
    )


def test_fdnp_what_compresses_it_further_sees_weights():
    """The mask is of frequencies: pruned again, weights go by their size, not where a coefficient is gone."""
    model = stirred(build("cnn", "digits"), dtype=F64)
    first = compress(model, "frequency_domain_pruning", where="conv2", keep=0.3)
    w = first.conv2.weight.detach().clone()
    assert torch.equal(plan(first, "magnitude_pruning_han", where="conv2", keep=0.5)["conv2"].mask, select(w.abs(), 0.5))
    codes, plain = (plan(m, "dorefa_net", where="conv2", bits=3)["conv2"].dense() for m in (first, with_plain_weights(first)))
    assert torch.equal(codes, plain)


# energy-constrained projection


def optimum(value, cost, limit):
    """The greatest sum of values within the limit, over all subsets."""
    picks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(value))), dtype=F64)
    return (picks @ value)[picks @ cost <= limit].max().item()


def test_energy_1_the_greedy_knapsack_is_feasible_and_nearly_the_best():
    """40 problems of 12 items: within one item of the optimum, and at least half of it where the best single item may stand in."""
    for seed in range(40):
        value, cost = normal(12, seed=seed).square(), 0.5 + 4 * torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=F64)
        limit = (0.2 + 0.015 * seed) * cost.sum().item()
        mask = budgets.knapsack(value, cost, limit)
        best, kept = optimum(value, cost, limit), value[mask].sum().item()
        assert cost[mask].sum() <= limit and kept >= best - value.max().item()
        assert max(kept, value[cost <= limit].max().item()) >= best / 2


def test_energy_2_where_all_cost_the_same_it_is_magnitude_pruning_across_the_network():
    w = normal(200)
    for budget in (0.1, 0.35, 0.8):
        packed = budgets.energy_constrained_projection(w, torch.full((200,), 9.0), budget=budget)
        assert torch.equal(packed.mask, select(w.abs(), budget))


def test_energy_3_an_ample_budget_changes_nothing(digits64):
    model = stirred(build("cnn", "digits"), dtype=F64)
    copy = compress(model, "energy_constrained_projection", budget=1.0)
    assert all(torch.equal(copy.get_submodule(n).weight, m.weight) for n, m in weighted(model).items())


def energy_share(model, energy_model):
    """The energy of the weights that are not zero, as a share of all, counted by hand from the shapes."""
    plain = with_plain_weights(model)
    sizes, spent, total = {"conv1": 36, "conv2": 16, "fc": 1}, 0.0, 0.0
    for name, m in weighted(plain).items():
        each = sizes[name] if energy_model == "macs_only" else 200 + 8 * sizes[name]
        spent, total = spent + each * m.weight.count_nonzero().item(), total + each * m.weight.numel()
    return spent / total


def test_energy_a_weight_costs_its_positions():
    model = build("cnn", "digits").double()
    found = gather(model, weighted(model), "macs", None)
    x = torch.zeros(1, 1, 8, 8, dtype=F64)
    for name, m in weighted(model).items():
        seen = []
        handle = m.register_forward_hook(lambda _, i, o, seen=seen: seen.append(o))
        model(x)
        handle.remove()
        assert (found[name] == seen[0][0, 0].numel()).all() and found[name].shape == m.weight.shape
    assert budgets.ENERGY["macs_plus_memory"](torch.tensor(10.0)) == 280 and budgets.ENERGY["macs_only"](torch.tensor(10.0)) == 10


@pytest.mark.parametrize("energy_model", ["macs_only", "macs_plus_memory"])
def test_energy_4_every_step_ends_within_the_budget_and_weights_return(digits64, energy_model):
    model, data = stirred(build("cnn", "digits"), dtype=F64), (digits64[0][:200], digits64[1][:200])
    copy, seen = compress(model, "energy_constrained_projection", budget=0.25, energy_model=energy_model), []
    support = lambda m: torch.cat([latent(w).flatten() for w in weighted(m).values()]) != 0  # noqa: E731
    watch = Hook(before=lambda m, rule: seen.append((energy_share(m, energy_model), support(m))))
    fit(copy, data, epochs=3, batch=50, lr=0.1, hooks=[watch], keep_best=False)
    shares = [s for s, _ in seen] + [energy_share(copy, energy_model)]
    assert max(shares) <= 0.25 and min(shares) > 0.24
    assert any((later & ~earlier).any() for (_, earlier), (_, later) in itertools.pairwise(seen))


def test_energy_5_the_expensive_layer_ends_sparser_than_by_magnitude():
    w, macs = normal(400), torch.cat([torch.full((200,), 10.0), torch.full((200,), 1.0)])
    ours = budgets.energy_constrained_projection(w, macs, budget=0.3, energy_model="macs_only").mask
    theirs = select(w.abs(), ours.double().mean().item())
    assert ours[:200].sum() < theirs[:200].sum() and ours[200:].sum() > theirs[200:].sum()


# constraint-aware compression


def toy(theta):
    """Accuracy and cost of two layers: the first matters more, the second costs more."""
    accuracy = 1 - 0.6 * theta[0] ** 2 - 0.3 * theta[1] ** 4 - 0.05 * math.sin(6 * theta[0])
    return float(accuracy), float(1 - 0.3 * theta[0] - 0.7 * theta[1])


def test_bo_1_the_posterior_is_sklearns():
    x, at, y = torch.rand(12, 2, dtype=F64), torch.rand(30, 2, dtype=F64), normal(12)
    mean, std = budgets.gaussian_process(x, y, at, length=0.3, noise=1e-6)
    reference = GaussianProcessRegressor(RBF(0.3), alpha=1e-6, optimizer=None, normalize_y=True).fit(x.numpy(), y.numpy())
    expected, deviation = reference.predict(at.numpy(), return_std=True)
    assert np.abs(mean.numpy() - expected).max() < 1e-6 and np.abs(std.numpy() - deviation).max() < 1e-5


def test_bo_1_the_acquisition_is_expected_improvement_times_the_chance_to_be_allowed():
    mean, std = normal(50), 0.1 + torch.rand(50, dtype=F64)
    cost, best, many = (normal(50, seed=1), 0.1 + torch.rand(50, dtype=F64)), 0.3, 400_000
    plain = budgets.expected_improvement(mean, std, best)
    sampled = (mean + std * torch.randn(many, 1, dtype=F64) - best).clamp(min=0)
    assert (plain - sampled.mean(0)).abs().max() < 0.01
    z = ((mean - best) / std).numpy()
    assert np.abs(plain.numpy() - ((mean - best).numpy() * norm.cdf(z) + std.numpy() * norm.pdf(z))).max() < 1e-12
    for cap in (-1.0, 0.5):
        found = budgets.constrained_improvement((mean, std), cost, best, cap)
        assert np.abs(found.numpy() - plain.numpy() * norm.cdf((cap - cost[0].numpy()) / cost[1].numpy())).max() < 1e-12
    assert torch.allclose(budgets.constrained_improvement((mean, std), cost, best, 1e9), plain, rtol=1e-12)


def grid_optimum(limit):
    points = [(toy((a, b)), (a, b)) for a in np.linspace(0, 0.99, 100) for b in np.linspace(0, 0.99, 100)]
    return max(accuracy for (accuracy, cost), _ in points if cost <= limit)


def test_bo_2_and_3_it_keeps_the_limit_and_comes_nearer_than_random_search():
    """25 evaluations each, 20 seeds."""
    limit, best, ours, theirs = 0.5, grid_optimum(0.5), [], []
    for seed in range(20):
        looked = []
        theta = budgets.search(
            lambda t, looked=looked: looked.append(t) or toy(t)[0], lambda t: toy(t)[1], budgets.caps(limit, 25, 4, "linear"), 2, seed
        )
        assert len(looked) == 25 and toy(theta)[1] <= limit + 1e-9
        ours.append(best - toy(theta)[0])
        drawn = 0.99 * torch.rand(25, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)
        theirs.append(best - max((toy(t)[0] for t in drawn if toy(t)[1] <= limit), default=0.0))
    assert np.mean(ours) < 0.3 * np.mean(theirs)


def test_bo_4_one_stage_is_one_cap_and_the_dense_cost_allows_everything():
    for cooling in budgets.COOLING:
        assert budgets.caps(0.3, 12, 1, cooling) == pytest.approx([0.3] * 12)
        falling = budgets.caps(0.3, 12, 4, cooling)
        assert falling[-1] == pytest.approx(0.3) and falling[0] > 0.7 and (np.diff(falling) <= 0).all() and len(set(falling)) == 4
    worse = lambda t: -float(t.square().sum())  # noqa: E731
    assert (budgets.search(worse, lambda t: 1 - float(t.mean()), budgets.caps(1.0, 15, 3, "linear"), 3) == 0).all()


def test_bo_on_a_network_it_stays_within_its_budget_and_beats_the_same_share_everywhere(digits64):
    """Digits CNN, a quarter of the multiply-adds, nothing retrained; the accuracy on the sample that it looked at."""
    model, data = load_net("cnn", "digits").double(), (digits64[0][:400], digits64[1][:400])
    for seed in range(2):
        made = plan(model, "constraint_aware_compression", data=data, budget=0.25, seed=seed)
        macs = gather(model, weighted(model), "macs", data)
        spent = sum((macs[n] * p.mask).sum().item() for n, p in made.items()) / sum(m.sum().item() for m in macs.values())
        assert spent <= 0.25 + 1e-9
        ask = quality(model, weighted(model), *data, F.cross_entropy)["fc"]
        tried = {"constraint_aware_compression": {"budget": 0.25, "seed": seed}, "magnitude_pruning_han": {"keep": 0.25}}
        plans = [plan(model, m, data=data, **knobs) for m, knobs in tried.items()]
        found, same = (ask(torch.cat([p.dense().flatten() for p in made.values()])) for made in plans)
        assert found > same


def test_bo_quality_is_the_accuracy_with_those_weights_and_leaves_the_network_alone(digits64):
    model, (x, y) = stirred(build("cnn", "digits"), dtype=F64).train(), (digits64[0][:200], digits64[1][:200])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    other = stirred(build("cnn", "digits", 1), seed=0, dtype=F64)
    flat = torch.cat([m.weight.detach().flatten() for m in weighted(other).values()])
    ask = gather(model, weighted(model), "quality", (x, y))["fc"]
    with torch.no_grad():
        for n, m in weighted(model).items():
            m.weight.copy_(weighted(other)[n].weight)
        said = (predict(model, x).argmax(1) == y).double().mean().item()
        model.load_state_dict(before)
    assert ask(flat) == pytest.approx(said) and model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_bo_the_share_of_each_layer_goes():
    w, layer = normal(30), torch.tensor([0] * 10 + [1] * 20)
    mask = budgets.pruned_by(w, layer, torch.tensor([0.25, 0.6], dtype=F64))
    assert torch.equal(mask[:10], select(w[:10].abs(), 0.7)) and torch.equal(mask[10:], select(w[10:].abs(), 0.4))
