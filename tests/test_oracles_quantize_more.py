"""What proves single-bit residual nets, variational network quantization, 8-bit training, Q-CNN, adaptive quantization and LBCNN right.

A claim that does not hold stands here with its counter-example.
"""

import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from cmlib.core.apply import attached, latent, plan_of
from cmlib.core.method import call
from cmlib.core.training import penalty
from cmlib.lab.in_order import compress_in_order
from cmlib.lab.nets import range_normed, swapped
from cmlib.lab.train import evaluate, fit
from cmlib.lab.verbs import compress
from cmlib.lab.zoo import build
from cmlib.methods import bits_chosen, catalog, codebooks, discrete, formats
from cmlib.methods.binary import he_std
from cmlib.methods.prune import kl_log_uniform, log_alpha

F64 = torch.float64

MUTATIONS = [
    ("single_bit_wrn", "cmlib/methods/binary.py", "math.sqrt(2 / w[0].numel())", "math.sqrt(2 / w[:, 0].numel())", "fan out for fan in"),
    ("single_bit_wrn", "cmlib/methods/binary.py", "SCALES[scale](w.detach()).reshape(1, 1), w)", "SCALES[scale](w.detach()).reshape(1, 1), 2 * w)",
     "twice the gradient"),
    ("variational_network_quantization", "cmlib/methods/discrete.py", "torch.stack([-a, a])", "torch.stack([-2 * a, a])",
     "the negative spike at -2a"),
    ("variational_network_quantization", "cmlib/methods/discrete.py", "(1 - pull.sum(0)) * kl_log_uniform", "(1 + pull.sum(0)) * kl_log_uniform",
     "the spike at 0 pulls most at the others"),
    ("scalable_8bit_training", "cmlib/core/sites.py", 'ctx.site.weight_errors({"g": g, "rounded": rounded}), down', "rounded, down",
     "the weights' gradient of the 8-bit copy too"),
    ("scalable_8bit_training", "cmlib/methods/formats.py", "(g / step + torch.rand_like(g)).floor()", "(g / step + 0.7 * torch.rand_like(g)).floor()",
     "rounded down more often than up"),
    ("scalable_8bit_training", "cmlib/methods/formats.py", "(2 * math.sqrt(2 * math.log(max(len(p), 2))))", "math.sqrt(2 * math.log(max(len(p), 2)))",
     "C(n) twice as large"),
    ("q_cnn", "cmlib/methods/codebooks.py", "left[..., m, :] -= step[i]", "left[..., m, :] += step[i]", "what is left is told wrong"),
    ("q_cnn", "cmlib/methods/codebooks.py", "channels, places, channels, places).permute(0, 2, 1, 4, 3)",
     "places, channels, places, channels)", "the patch's channels taken for its places"),
    ("q_cnn", "cmlib/lab/in_order.py", "w @ (cross - gram)", "w @ (gram - cross)", "what earlier layers lost is lost twice"),
    ("adaptive_quantization", "cmlib/methods/bits_chosen.py", "(shares.cumsum(0) - shares)", "shares.cumsum(0)",
     "the first to be free is counted as held back"),
    ("adaptive_quantization", "cmlib/methods/bits_chosen.py", ".log2().ceil()", ".log2().floor()", "a bit too few"),
    ("adaptive_quantization", "cmlib/methods/bits_chosen.py", "<= start + loss_budget", "<= start + 2 * loss_budget", "twice the budget"),
    ("local_binary_convolution", "cmlib/methods/fixed_filters.py", ">= sparsity", "< sparsity", "as many zeros as there should be others"),
    ("local_binary_convolution", "cmlib/methods/fixed_filters.py", "anchors.requires_grad_(False)", "anchors", "the anchors learn"),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def codes(key, w, training=False, state=None, **knobs):
    return call(catalog()[key].fn, {"w": w, "training": training}, {**knobs, "state": state})


# single-bit residual nets


def test_single_bit_wrn_has_two_values_that_training_never_scales(digits64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10)).double()
    copy = compress(model, "single_bit_wrn")
    before = {n: p.dense() for n, p in plan_of(copy).items()}
    fit(copy, digits64, epochs=1, lr=0.05)
    for (name, packed), fan_in in zip(plan_of(copy).items(), (9, 216), strict=True):
        sigma = math.sqrt(2 / fan_in)
        assert torch.allclose(packed.dense().unique(), torch.tensor([-sigma, sigma], dtype=F64), rtol=1e-12)
        assert not torch.equal(packed.dense(), before[name])
        assert packed.bits() - 8 * packed.params.nbytes == 8 * math.ceil(packed.values.numel() / 8)  # a bit a weight


def normed(z):
    """Batch norm with eps = 0."""
    return (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), correction=0, keepdim=True)


@pytest.mark.parametrize("factor", [0.01, 7.0])
def test_single_bit_wrn_behind_a_batch_norm_any_scale_gives_the_same(factor):
    x, w = normal(16, 3, 6, 6), codes("single_bit_wrn", normal(5, 3, 3, 3, seed=1)).dense()
    one, other = (normed(F.conv2d(x, c * w)) for c in (1.0, factor))
    assert torch.allclose(one, other, atol=1e-10)


def test_single_bit_wrn_starts_with_the_spread_of_outputs_that_he_has():
    ratios = []
    for seed in range(20):
        torch.manual_seed(seed)
        x, w = torch.randn(64, 8, 8, 8, dtype=F64), torch.empty(64, 8, 3, 3, dtype=F64)
        nn.init.kaiming_normal_(w)
        ratios.append((F.conv2d(x, codes("single_bit_wrn", w).dense()).var() / F.conv2d(x, w).var()).item())
    assert abs(sum(ratios) / len(ratios) - 1) < 0.05
    assert torch.allclose(he_std(w), torch.tensor(math.sqrt(2 / 72), dtype=F64))


def test_single_bit_wrn_passes_the_gradient_whole():
    w = normal(4, 5).requires_grad_(True)
    g = normal(4, 5, seed=1)
    (codes("single_bit_wrn", w).dense() * g).sum().backward()
    assert torch.equal(w.grad, g)


def test_single_bit_wrn_other_scales():
    w = normal(4, 5)
    assert torch.equal(codes("single_bit_wrn", w, scale="one").dense(), w.sign())
    assert torch.allclose(codes("single_bit_wrn", w, scale="mean_abs").dense(), w.abs().mean() * w.sign(), rtol=1e-12)
    assert torch.allclose(codes("single_bit_wrn", w.flatten()).dense().abs(), w.abs().mean(), rtol=1e-12)  # pruned: the fan in is not known


# variational network quantization


def spikes(w, log_sigma2, a):
    return discrete.kl_spikes(w, torch.full_like(w, log_sigma2), torch.tensor([-a, a], dtype=F64), discrete.WINDOW * a)


def test_variational_network_quantization_with_one_spike_is_variational_dropout():
    w, log_sigma2 = torch.linspace(-1, 1, 100, dtype=F64), torch.full((100,), -4.0, dtype=F64)
    alone, far = (discrete.kl_spikes(w, log_sigma2, torch.tensor(at, dtype=F64), 0.1) for at in ([], [-50.0, 50.0]))
    assert torch.allclose(alone, kl_log_uniform(log_alpha(w, log_sigma2)), rtol=1e-12) and torch.allclose(far, alone, rtol=1e-12)


@pytest.mark.parametrize("log_sigma2", [-12.0, -9.0])
def test_variational_network_quantization_rewards_each_code(log_sigma2):
    w = torch.linspace(-0.4, 0.4, 4001, dtype=F64)
    kl = spikes(w, log_sigma2, 0.2)
    dips = w[1:-1][(kl[1:-1] < kl[:-2]) & (kl[1:-1] < kl[2:])]
    assert len(dips) == 3 and torch.allclose(dips, torch.tensor([-0.2, 0.0, 0.2], dtype=F64), atol=1e-2)
    assert torch.allclose(kl, kl.flip(0), rtol=1e-9)
    assert torch.allclose(spikes(10 * w, log_sigma2 + 2 * math.log(10), 2.0), kl, rtol=1e-6)  # in any unit


def test_variational_network_quantization_takes_the_nearest_code_and_zero_for_noise():
    w = torch.tensor([[-0.9, -0.4, 0.1, 0.45, 0.55, 2.0]], dtype=F64)
    state = {"a": nn.Parameter(torch.tensor(-1.0, dtype=F64)), "log_sigma2": torch.tensor([[-9.0, -9, -9, -9, -9, 4]], dtype=F64)}
    found = codes("variational_network_quantization", w, state=state)
    assert torch.equal(found.dense(), torch.tensor([[-1.0, 0, 0, 0, 1, 0]], dtype=F64))  # the sign of a is no matter
    kept = codes("variational_network_quantization", w, state=state, log_alpha_prune_threshold=3.0)
    assert kept.dense()[0, 5] == 1


def test_variational_network_quantization_adds_its_kl_and_its_noise():
    torch.manual_seed(0)
    copy = compress(nn.Sequential(nn.Linear(6, 4)).double(), "variational_network_quantization", kl_weight=0.5, log_sigma2=-4.0).train()
    (between,) = copy[0].parametrizations.weight
    w, size = latent(copy[0]), latent(copy[0]).square().mean().sqrt()
    a = between.a.detach()
    assert torch.allclose(a, 1.2 * size)
    assert torch.allclose(penalty(copy, 50, 0.0), 0.5 / 50 * discrete.kl_spikes(w, between.log_sigma2, a * torch.tensor([-1, 1]), 0.375 * a).sum())
    x = normal(1, 6, seed=1)
    with torch.no_grad():
        z = copy(x.expand(20_000, 6))
    assert torch.allclose(z.mean(0), F.linear(x, w, copy[0].bias)[0], atol=0.02)
    assert torch.allclose(z.var(0), x.square().sum() * math.exp(-4) * torch.ones(4, dtype=F64), rtol=0.05)


def drops(seed, digits64):
    """What rounding costs in accuracy: with the KL, without it, and of the same net trained plainly and rounded as TWN rounds."""
    digits64 = tuple(t[:400] for t in digits64)
    torch.manual_seed(seed)
    model = build("mlp", "digits").double()
    fit(model, digits64, epochs=12, lr=0.02, batch=200, seed=seed, keep_best=False)
    lost = []
    for kl_weight in (1.0, 0.0):
        copy = compress(model, "variational_network_quantization", kl_weight=kl_weight)
        fit(copy, digits64, epochs=20, lr=1e-2, batch=200, seed=seed, keep_best=False)
        plain = deepcopy(model)
        for name, layer, _ in attached(copy):
            plain.get_submodule(name).weight.data.copy_(latent(layer))
            plain.get_submodule(name).bias.data.copy_(layer.bias)
        lost.append(evaluate(plain, digits64) - evaluate(copy, digits64))
    return [*lost, evaluate(plain, digits64) - evaluate(compress(plain, "ternary_weight_networks"), digits64)]


def test_variational_network_quantization_rounds_at_less_cost_than_twn_thanks_to_its_kl(digits64):
    with_kl, without, twn = torch.tensor([drops(seed, digits64) for seed in range(5)]).mean(0)
    assert with_kl < 0.5 * without and with_kl < 0.5 * twn


# 8-bit training


def test_scalable_8bit_training_range_is_a_slow_stand_in_for_the_deviation_on_the_mean_of_draws():
    torch.manual_seed(0)
    found, single = [], []
    for n in (64, 512, 1024, 8192):
        x = torch.randn(n, 200, dtype=F64)
        ratio = formats.range_scale(x) / x.std(0)
        found.append(ratio.mean().item())
        single += [ratio.min().item(), ratio.max().item()] if n == 64 else []
    assert all(0.78 <= r <= 1 for r in found) and found == sorted(found)
    assert torch.allclose(torch.tensor(found), torch.tensor([0.83, 0.87, 0.87, 0.89]), atol=0.015)
    assert single[0] < 0.7 and single[1] > 1.0  # of one draw neither bound holds
    x = torch.tensor([[0.0], [1.0], [5.0], [2.0]], dtype=F64)
    assert math.isclose(formats.range_scale(x).item(), 5 / (2 * math.sqrt(2 * math.log(4))))
    assert math.isclose(formats.range_scale(x, 2).item(), (1 + 3) / 2 / (2 * math.sqrt(2 * math.log(2))))


def ranged(dims=2):
    model = nn.Sequential(nn.Conv2d(2, 3, 1) if dims == 2 else nn.Linear(2, 3), nn.BatchNorm2d(3) if dims == 2 else nn.BatchNorm1d(3)).double()
    return range_normed(model)[1].train()


def test_scalable_8bit_training_range_norm_forgets_scale_and_shift():
    norm, x = ranged(), normal(8, 3, 4, 4)
    norm.eps = 0.0
    assert torch.allclose(norm(3.7 * x - 2), norm(x), atol=1e-10) and torch.allclose(norm(x).mean((0, 2, 3)), torch.zeros(3, dtype=F64), atol=1e-12)
    size = (x.amax((0, 2, 3)) - x.amin((0, 2, 3))) / (2 * math.sqrt(2 * math.log(128)))
    assert torch.allclose(norm(x), (x - x.mean((0, 2, 3), keepdim=True)) / size.reshape(1, 3, 1, 1))


def test_scalable_8bit_training_range_norm_gradients_are_finite_differences():
    norm, x = ranged(1), normal(7, 3).requires_grad_(True)
    assert torch.autograd.gradcheck(norm, (x,))
    size = formats.range_scale(x)
    (g,) = torch.autograd.grad(size.sum(), x)
    assert (g != 0).sum() == 6 and (g.argmax(0) == x.argmax(0)).all() and (g.argmin(0) == x.argmin(0)).all()


def test_scalable_8bit_training_range_norm_in_evaluation_is_a_batch_norm_of_its_running_sizes():
    norm, x = ranged(), normal(8, 3, 4, 4)
    norm.momentum = 1.0
    seen = norm(x)
    common = nn.BatchNorm2d(3).double().eval()
    common.load_state_dict(norm.state_dict())
    assert torch.allclose(norm.eval()(x), seen) and torch.allclose(common(x), seen) and norm.num_batches_tracked == 1


class Fixed(torch.autograd.Function):
    """A layer's output, given a gradient that is not round."""

    @staticmethod
    def forward(ctx, z):
        return z.sum()

    @staticmethod
    def backward(ctx, g):
        return normal(5, 4, seed=9)


def gradients(layer, x):
    """(of the input, of the weight, of the bias)"""
    x = x.clone().requires_grad_(True)
    for p in layer.parameters():
        p.grad = None
    Fixed.apply(layer(x)).backward()
    w = latent(layer) if hasattr(layer, "parametrizations") else layer.weight
    return x.grad, w.grad, layer.bias.grad


def eight_bits(**knobs):
    """A dense layer with float weights that reads float inputs, its gradients rounded."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)).double()
    layer = compress(model, "scalable_8bit_training", where="1", bits=16, a_bits=32, **knobs).train()[1]
    return layer, layer.weight.detach()


def rounded(g, bits, seed):
    torch.manual_seed(seed)
    return formats.stochastic(g, bits)


def test_scalable_8bit_training_forks_the_gradient():
    x, g = normal(5, 3), normal(5, 4, seed=9)
    layer, w = eight_bits()
    torch.manual_seed(3)
    dx, dw, db = gradients(layer, x)
    torch.manual_seed(3)
    down, across = formats.stochastic(g, 8), formats.stochastic(g, 16)
    assert torch.allclose(dx, down @ w, atol=1e-14) and torch.allclose(dw, across.T @ x, atol=1e-14) and torch.allclose(db, across.sum(0))
    assert not torch.allclose(down, across, atol=1e-4)
    layer, w = eight_bits(bifurcation="off")
    torch.manual_seed(3)
    dx, dw, _ = gradients(layer, x)
    assert torch.allclose(dx, down @ w, atol=1e-14) and torch.allclose(dw, down.T @ x, atol=1e-14)
    layer, w = eight_bits(g_bits=32)
    dx, dw, _ = gradients(layer, x)
    assert torch.allclose(dx, g @ w, atol=1e-14) and torch.allclose(dw, g.T @ x, atol=1e-14)


def test_scalable_8bit_training_forks_behind_a_convolution_and_through_the_network(digits64):
    torch.manual_seed(0)
    parts = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=1.0), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    model = range_normed(nn.Sequential(*parts)).double().train()
    model(digits64[0])  # ranges of inputs are read in evaluation
    copy = compress(model, "scalable_8bit_training", data=digits64, bits=16, a_bits=16, g_bits=16).train()
    x, y = digits64[0][:64], digits64[1][:64]
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(copy(x), y).backward()
    for name, layer, _ in attached(copy):
        assert torch.allclose(latent(layer).grad, model.get_submodule(name).weight.grad, atol=2e-4)  # of 16 bits, nearly backpropagation
    assert torch.allclose(copy[1].weight.grad, model[1].weight.grad, atol=2e-4)
    small = compress(model, "scalable_8bit_training", data=digits64)
    fit(small, digits64, epochs=3, lr=0.01, batch=64)
    assert evaluate(small, digits64) > 0.85


def test_scalable_8bit_training_rounds_gradients_right_on_average_and_zero_to_zero():
    torch.manual_seed(0)
    g = torch.cat([normal(50), torch.zeros(3, dtype=F64)])
    found = torch.stack([formats.stochastic(g, 4) for _ in range(4000)])
    step = g.abs().max() / 7
    assert ((found.mean(0) - g).abs() <= 4 * (step / 2) / 4000**0.5).all() and not found[:, -3:].any()
    assert torch.allclose(found / step, (found / step).round(), atol=1e-9) and found.abs().max() <= g.abs().max() * (1 + 1e-12)
    assert not formats.stochastic(torch.zeros(4), 8).any()


def test_scalable_8bit_training_the_sign_keeps_the_angle():
    x = normal(200_000)
    assert math.isclose(F.cosine_similarity(x, x.sign(), dim=0).item(), math.sqrt(2 / math.pi), abs_tol=3e-3)
    near = [F.cosine_similarity(x, formats.stochastic(x, bits), dim=0).item() for bits in (2, 4, 8)]
    assert near == sorted(near) and near[-1] > 0.999


# Q-CNN


def channels_last(w):
    """A convolution's weight as the matrix (filters and places of the kernel, channels)."""
    return w.flatten(2).transpose(1, 2).flatten(0, 1)


def correlated(n, k, seed=0):
    return normal(n, k, seed=seed) @ normal(k, k, seed=seed + 100)


def test_q_cnn_tables_give_the_products_of_a_dense_layer():
    w, x = normal(40, 12), normal(7, 12, seed=1)
    packed = codes_of_inputs("q_cnn", w, x, k=8)
    found, products, sums = codebooks.table_products(x, packed.params, packed.index)
    assert torch.allclose(found, x @ packed.dense().T, atol=1e-10) and packed.params.shape == (3, 8, 4)
    counted = count_by_hand(x[0].tolist(), packed.params.tolist(), packed.index.tolist())
    assert torch.allclose(torch.tensor(counted[0], dtype=F64), found[0]) and (products, sums) == counted[1:]
    assert products == 8 * 12 and sums - 8 * 12 + 8 * 3 == 2 * 40  # tables K C_in in place of C_in C_out, then M - 1 additions an output


def count_by_hand(x, levels, index):
    """The products of one x by tables, each operation counted where it is done."""
    products = sums = 0
    tables = []
    for m, level in enumerate(levels):
        d, row = len(level[0]), []
        for vector in level:
            value = x[m * d] * vector[0]
            products += 1
            for j in range(1, d):
                value += x[m * d + j] * vector[j]
                products, sums = products + 1, sums + 1
            row.append(value)
        tables.append(row)
    outs = []
    for own in zip(*index, strict=True):
        value = tables[0][own[0]]
        for m in range(1, len(own)):
            value += tables[m][own[m]]
            sums += 1
        outs.append(value)
    return outs, products, sums


def codes_of_inputs(key, w, x, **knobs):
    """The codes of a dense layer's weight that reads x."""
    return call(catalog()[key].fn, {"w": w, "acts_gram": (x.T @ x / len(x))[None]}, {**knobs, "state": None})


def test_q_cnn_tables_of_a_picture_serve_all_filters_and_places_of_a_convolution():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(6, 10, 3, bias=False).double(), normal(2, 6, 7, 7)
    copy = compress(nn.Sequential(layer), "q_cnn", data=(x, torch.zeros(2, dtype=torch.long)), k=5, subspace_dim=3)
    packed = plan_of(copy)["0"]
    assert packed.params.shape == (2, 5, 3) and packed.axes == (0, 2, 3, 1)
    at, products, _ = codebooks.table_products(x.permute(0, 2, 3, 1), packed.params, packed.index)
    at = at.unflatten(-1, (10, 3, 3))
    total = sum(at[:, i : i + 5, j : j + 5, :, i, j] for i in range(3) for j in range(3))
    assert torch.allclose(total.permute(0, 3, 1, 2), F.conv2d(x, packed.dense()), atol=1e-10) and products == 5 * 6
    vectors = channels_last(packed.dense()).unflatten(1, (2, 3))
    assert all(len(vectors[:, m].unique(dim=0)) <= 5 for m in range(2))


def response_error(model, copy, x):
    with torch.no_grad():
        return (model(x) - copy(x)).square().mean().item()


@pytest.mark.parametrize("kind", ["dense", "convolution", "grouped"])
def test_q_cnn_correction_never_raises_the_response_error(kind):
    lower = []
    for seed in range(5):
        torch.manual_seed(seed)
        layers = {"dense": nn.Linear(8, 30), "convolution": nn.Conv2d(8, 12, 3), "grouped": nn.Conv2d(8, 12, 3, groups=2)}
        model = nn.Sequential(layers[kind].double())
        x = correlated(200, 8, seed) if kind == "dense" else correlated(8 * 36, 8, seed).reshape(8, 6, 6, 8).permute(0, 3, 1, 2)
        data = x, torch.zeros(len(x), dtype=torch.long)
        tried = [
            compress(model, "q_cnn", data=data, k=6, passes=p, error_correction=c) for p, c in ((1, "none"), *((p, "layer") for p in range(1, 6)))
        ]
        errors = [response_error(model, copy, x) for copy in tried]
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))
        lower.append(errors[3] / errors[0])
    assert sum(lower) / len(lower) < 0.8


def test_q_cnn_a_step_of_the_levels_in_a_dense_layer_is_least_squares():
    w, x = normal(20, 4), correlated(50, 4)
    levels, index = normal(1, 3, 4, seed=5), torch.randint(0, 3, (1, 1, 20, 1))
    gram = (x.T @ x).reshape(1, 1, 1, 4, 1, 1, 4)
    found, new = codebooks.responding(w.reshape(1, 20, 1, 1, 4), gram, levels, index, 1)
    chosen = F.one_hot(index.flatten(), 3).double()
    best = torch.linalg.lstsq(torch.kron(chosen, x), (x @ w.T).T.flatten()).solution.reshape(3, 4)  # outputs of filter after filter
    assert torch.allclose(found[0], best, atol=1e-9)
    errors = ((w[:, None] - best) @ x.T).square().sum(2)
    assert torch.equal(new.flatten(), errors.argmin(1))  # codes: each of the three tried


def test_q_cnn_with_a_word_a_filter_is_exact_and_of_white_inputs_the_criteria_coincide():
    w = normal(12, 8)
    assert torch.allclose(codes_of_inputs("q_cnn", w, correlated(50, 8), k=12).dense(), w, atol=1e-9)
    x = torch.linalg.qr(normal(50, 8))[0] * 50**0.5
    for passes in (1, 4):
        found = codes_of_inputs("q_cnn", w, x, k=4, passes=passes).dense()
        assert math.isclose((w - found).square().sum().item(), ((w - found) @ x.T).square().sum().item() / 50)
    plain = codes_of_inputs("q_cnn", w, x, k=4, error_correction="none").dense()
    assert torch.allclose(codes_of_inputs("q_cnn", w, x, k=4, passes=4).dense(), plain)  # k-means has found its place already


def test_q_cnn_correcting_what_earlier_layers_lost_helps_the_outputs():
    found = []
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16)).double()
        x = correlated(300, 12, seed)
        data = x, torch.zeros(300, dtype=torch.long)
        copies = compress(model, "q_cnn", data=data, k=4), compress_in_order(model, "q_cnn", data, samples=300, k=4)
        found.append([response_error(model, c, x) for c in copies])
        assert not any(torch.equal(a.dense(), b.dense()) for a, b in zip(*(list(plan_of(c).values())[1:] for c in copies), strict=True))
    apart, together = torch.tensor(found).mean(0)
    assert together < 0.95 * apart


def test_q_cnn_a_layer_that_reads_what_it_always_did_keeps_its_weight_in_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)).double()
    data = normal(30, 4, 6, 6), torch.zeros(30, dtype=torch.long)
    exact = compress_in_order(model, "q_cnn", data, k=256, samples=30)  # as many words as vectors: nothing is lost on the way
    assert all(torch.allclose(p.dense(), model.get_submodule(n).weight, atol=1e-7) for n, p in plan_of(exact).items())


# adaptive quantization


def tolerances(slope, budget, most):
    return bits_chosen.water_filled(torch.tensor(slope, dtype=F64), budget, torch.tensor(most, dtype=F64))


@pytest.mark.parametrize("most", [10.0, 0.3, 0.1])
def test_adaptive_quantization_tolerances_are_slsqps(most):
    for seed in range(3):
        slope = (normal(6, seed=seed).abs() + 0.05).numpy()
        found = tolerances(slope, 0.4, [most] * 6).numpy()
        best = minimize(lambda t: -np.log2(t).sum(), np.full(6, 1e-3), jac=lambda t: -1 / (t * math.log(2)), method="SLSQP",
                        bounds=[(1e-9, most)] * 6, constraints={"type": "ineq", "fun": lambda t, s=slope: 0.4 - s @ t, "jac": lambda t, s=slope: -s},
                        options={"maxiter": 500, "ftol": 1e-14})  # fmt: skip
        assert np.allclose(found, best.x, rtol=1e-4), best
        if most == 10.0:
            assert np.allclose(found, 0.4 / (6 * slope), rtol=1e-12)  # nothing held back: (Lbar - L) / (n |g|)
        assert slope @ found <= 0.4 + 1e-12


def test_adaptive_quantization_shares_what_the_held_back_leave():
    assert torch.allclose(tolerances([1.0, 1.0, 0.1], 1.0, [1.0, 1.0, 1.0]), torch.tensor([0.45, 0.45, 1.0], dtype=F64))
    assert torch.equal(tolerances([1.0, 0.0], 5.0, [1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=F64))  # all are held back
    assert torch.equal(tolerances([1.0, 0.0], 0.0, [1.0, 2.0]), torch.tensor([0.0, 2.0], dtype=F64))
    assert torch.allclose(tolerances([2.0, 2.0, 2.0], 0.3, [1.0, 1.0, 1.0]), torch.full((3,), 0.05, dtype=F64))


def test_adaptive_quantization_takes_the_fewest_bits_that_keep_the_tolerance():
    w, tau, reach = 2 * torch.rand(2000, dtype=F64) - 1, torch.exp2(-6 * torch.rand(2000, dtype=F64)), torch.tensor(1.0, dtype=F64)
    w[0] = 1.0  # the layer's reach
    bits = bits_chosen.bits_for(w, tau, reach, 8)
    packed = call(catalog()["adaptive_quantization"].fn, {"w": w, "tolerance": tau}, {"state": None})
    lost = (packed.dense() - w).abs()
    assert (lost <= tau * (1 + 1e-9)).all() and bits.unique().numel() == 7
    assert (w.abs() > tau)[bits > 0].all() and not packed.dense()[bits == 0].any()
    some = bits > 1
    assert (torch.exp2(-(bits[some] - 1.0)) > tau[some]).all()  # a bit less would not do
    same = bits_chosen.bits_for(w, torch.full_like(w, 0.2), reach, 8)
    assert set(same.tolist()) == {0, 3} and torch.equal(same == 0, w.abs() <= 0.2)  # equal slopes: one width, or none
    assert (bits_chosen.bits_for(w, 1e-9 * tau, reach, 5) == 5).all()


def regression(seed, spread=2.0):
    """A linear regression near its optimum, whose inputs are of unlike sizes: (the layer, data, mean squared error / 2)."""
    torch.manual_seed(seed)
    x = torch.randn(200, 24, dtype=F64) * torch.logspace(-spread, 0, 24, dtype=F64)
    model = nn.Sequential(nn.Linear(24, 3, bias=False)).double()
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(200, 3, dtype=F64)
    return model, (x, y), lambda z, t: (z - t).square().mean() / 2


def adapted(seed, **knobs):
    model, data, loss = regression(seed)
    copy = compress(model, "adaptive_quantization", data=data, loss=loss, **knobs)
    packed = plan_of(copy)["0"]
    bits = sum(t.codes.index.numel() * t.codes.width for t in getattr(packed, "terms", ())) / packed.values.numel()
    with torch.no_grad():
        return bits, (loss(copy(data[0]), data[1]) - loss(model(data[0]), data[1])).item()


def test_adaptive_quantization_keeps_the_loss_within_its_budget_with_ever_fewer_bits():
    budgets = (1e-4, 1e-3, 1e-2, 1e-1)
    found = [[adapted(seed, loss_budget=b, trust_region=1.0, n_iterations=12) for b in budgets] for seed in range(5)]
    for row in found:
        assert all(rise <= b + 1e-12 for (_, rise), b in zip(row, budgets, strict=True))
        assert all(more[0] >= less[0] for more, less in itertools.pairwise(row))
    assert sum(row[0][0] for row in found) > 1.3 * sum(row[2][0] for row in found)


def test_adaptive_quantization_takes_fewer_bits_than_one_width_at_the_same_loss():
    """Counted as the paper counts: which weight has how many bits is free."""
    ours, same = [], []
    for seed in range(5):
        model, data, loss = regression(seed)
        w = model[0].weight.detach()
        index, step = bits_chosen.numbered(w, 4, w.abs().max())
        with torch.no_grad():
            rise = loss(data[0] @ ((index + 0.5) * step - w.abs().max()).T, data[1]) - loss(model(data[0]), data[1])
        bits, lost = adapted(seed, loss_budget=rise.item(), trust_region=1.0, n_iterations=20)
        assert lost <= rise
        ours, same = [*ours, bits], [*same, 4]
    assert sum(ours) < 0.8 * sum(same)


def test_adaptive_quantization_pays_for_saying_who_has_how_many_bits(digits64):
    torch.manual_seed(0)
    model, digits64 = build("mlp", "digits").double(), tuple(t[:400] for t in digits64)
    fit(model, digits64, epochs=15, lr=0.02)
    copy = compress(model, "adaptive_quantization", data=digits64)
    packed = plan_of(copy)["fc1"]
    payload = sum(8 * math.ceil(t.codes.index.numel() * t.codes.width / 8) for t in packed.terms)
    places = sum(8 * math.ceil(min(packed.values.numel(), t._gaps[2] * len(t._gaps[1])) / 8) for t in packed.terms)
    assert packed.bits() == payload + places + 64 * len(packed.terms) and places > 0.5 * packed.values.numel()
    assert evaluate(copy, digits64) > evaluate(model, digits64) - 0.05
    before = {n: p.dense() for n, p in plan_of(copy).items()}
    fit(copy, digits64, epochs=1, lr=0.01)
    after = plan_of(copy)
    assert not torch.equal(after["fc1"].dense(), before["fc1"])
    assert torch.equal(after["fc1"].dense() == 0, before["fc1"] == 0)  # the widths stay


# local binary convolution

LBC = catalog()["local_binary_convolution"]


@pytest.mark.parametrize("cin, cout, size, m", [(3, 8, 3, 16), (16, 5, 5, 64), (1, 4, 13, 4)])
def test_local_binary_convolution_learns_m_weights_an_output(cin, cout, size, m):
    made = LBC(cin, cout, kernel_size=size, anchors=m)
    learned = sum(p.numel() for p in made.parameters() if p.requires_grad)
    conv = nn.Conv2d(cin, cout, size, padding=size // 2, bias=False)
    assert learned == m * cout and conv.weight.numel() * m == learned * cin * size**2
    x = torch.rand(2, cin, 15, 15)
    assert made(x).shape == conv(x).shape and LBC(cin, cout, kernel_size=size, stride=2)(x).shape == (2, cout, 8, 8)
    made(x).sum().backward()
    assert made.mix.weight.grad.any() and made.anchors.weight.grad is None


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_local_binary_convolution_draws_fixed_ternary_filters(sparsity):
    w = LBC(8, 4, anchors=256, sparsity=sparsity, seed=3).anchors.weight
    share, spread = (w == 0).double().mean().item(), (sparsity * (1 - sparsity) / w.numel()) ** 0.5
    assert set(w.unique().tolist()) <= {-1, 0, 1} and abs(share - sparsity) <= 4 * spread and not w.requires_grad
    assert abs(w.sum().item()) <= 4 * (w.numel() * (1 - sparsity)) ** 0.5
    assert torch.equal(LBC(8, 4, anchors=256, sparsity=sparsity, seed=3).anchors.weight, w)
    assert not torch.equal(LBC(8, 4, anchors=256, sparsity=sparsity, seed=4).anchors.weight, w)


def test_local_binary_convolution_without_a_bend_can_be_any_convolution():
    made, conv = LBC(3, 5, anchors=40, seed=1).double(), nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    basis = made.anchors.weight.flatten(1)
    assert torch.linalg.matrix_rank(basis) == 27
    made.act = nn.Identity()
    with torch.no_grad():
        made.mix.weight.copy_((conv.weight.flatten(1) @ torch.linalg.pinv(basis))[:, :, None, None])
    x = normal(2, 3, 8, 8)
    assert torch.allclose(made(x), conv(x), atol=1e-8)
    made.act = nn.ReLU()
    assert not torch.allclose(made(x), conv(x), atol=1e-2)


def test_local_binary_convolution_in_a_network_trains_its_1x1_weights_only(digits64):
    pair, gained = tuple(t[:256] for t in digits64), []
    for seed in range(5):
        torch.manual_seed(seed)
        model = swapped(build("cnn", "digits").double(), "local_binary_convolution", anchors=32, seed=seed)
        before = {n: p.clone() for n, p in model.named_parameters()}
        frozen = deepcopy(model)
        for name in ("conv1", "conv2"):
            frozen.get_submodule(name).mix.requires_grad_(False)
        for net in (model, frozen):
            fit(net, pair, epochs=6, lr=0.03, batch=64, seed=seed, keep_best=False)
        assert all(torch.equal(p, before[n]) == ("anchors" in n) for n, p in model.named_parameters())
        gained.append(evaluate(model, pair) - evaluate(frozen, pair))
    assert sum(gained) / 5 > 0.02


def test_local_binary_convolution_takes_the_place_of_convolutions(digits64):
    dense = build("cnn", "digits")
    model = swapped(dense, "local_binary_convolution", where="conv2", anchors=8)
    assert isinstance(model.conv1, nn.Conv2d) and model.conv2.anchors.kernel_size == (3, 3) and model.conv2.mix.bias is not None
    assert model(digits64[0][:2].float()).shape == (2, 10) and isinstance(dense.conv2, nn.Conv2d)
    small = compress(model, "ternary_weight_networks", where="conv2.anchors")
    assert torch.equal(small.conv2.anchors.weight, model.conv2.anchors.weight)  # as codes of 2 bits they are the same
    for wrong, says in ((("bnn", "conv2"), "bnn is a quantizer, not a block"), (("local_binary_convolution", "fc"), "layer fc is no plain 2-D")):
        with pytest.raises(ValueError, match=says):
            swapped(dense, wrong[0], where=wrong[1])
    with pytest.raises(ValueError, match=r"is a layer that is trained from the start: swapped\(model, 'local_binary_convolution'\)"):
        compress(dense, "local_binary_convolution")
