"""What proves the methods of chapter 03 right that judge structures by the rest of the network, and those of energy: a test a claim.

Identities and closed forms are float64; orderings hold on the mean over five seeds, with the sizes that stand there. A claim that does not hold
stands here with its counter-example. ``MUTATIONS`` are faults, each of which some test of the method's finds.
"""

import math
from copy import deepcopy
from functools import partial

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from scipy.optimize import minimize, nnls
from sklearn.linear_model import OrthogonalMatchingPursuit
from torch import nn

from cmlib.core import perforate
from cmlib.core.apply import attach_plan, attached, latent, plan_of, weighted, with_plain_weights
from cmlib.core.bake import bake
from cmlib.core.planner import Planner, gather
from cmlib.core.training import Hook
from cmlib.core.wrapped import Perforated, entropy_coded
from cmlib.lab.cost import layer_costs, multiply_adds
from cmlib.lab.files import FileError, load, save
from cmlib.lab.integer import IntegerError, integer_network
from cmlib.lab.measure import measure
from cmlib.lab.train import evaluate, fit, predict
from cmlib.lab.verbs import coded, compress, plan
from cmlib.lab.zoo import build, load_net
from cmlib.methods import catalog, energy
from cmlib.methods import structures_judged as judged

F64 = torch.float64
SGD = partial(torch.optim.SGD, momentum=0.0)
SEEDS = range(5)
JUDGED, ENERGY = "cmlib/methods/structures_judged.py", "cmlib/methods/energy.py"

MUTATIONS = [
    ('perforated_cnn', "cmlib/core/perforate.py",
     'd * torch.arange(k, device=x.device)[:, None] + s * at',
     'd * torch.arange(k, device=x.device)[:, None] + at', 'the stride is forgotten'),
    ('perforated_cnn', JUDGED,
     'round(len(line) * (1 - rate) ** 0.5)',
     'round(len(line) * (1 - rate))', 'rows and columns each fall to 1 - rate'),
    ('eyeriss_energy_model', ENERGY,
     'dram_cost * (word * weights + maps)',
     'dram_cost * word * (weights + maps)', "maps shrink with the weights' bits"),
    ('energy_aware_pruning', ENERGY,
     'energy.argsort(descending=True, stable=True)',
     'energy.argsort(stable=True)', 'the thriftiest layer first'),
    ('energy_aware_pruning', ENERGY,
     'g[stay] @ row, row[stay]',
     'g[stay][:, stay] @ row[stay], row[stay]', 'fitted to what the kept weights make alone'),
    ('ecc_energy_bilinear', ENERGY,
     '(z + dual_lr * excess.detach())',
     '(z - dual_lr * excess.detach())', 'descent on the multiplier'),
    ('ecc_energy_bilinear', "cmlib/core/channel_evidence.py",
     'F.pad(widths, (0, 1), value=1.0)',
     'F.pad(widths, (0, 1), value=0.0)', 'layers with a fixed side cost nothing'),
    ('nisp', "cmlib/core/channel_evidence.py",
     'm.weight.copy_(m.weight.abs())',
     'm.weight.copy_(m.weight)', 'signed weights'),
    ('nisp', JUDGED,
     'torch.linalg.inv(one - 0.9 / rho * a)',
     'torch.linalg.inv(one - 0.9 * a)', 'the radius of convergence is forgotten'),
    ('discrimination_aware_channel_pruning', JUDGED,
     'masked_fill(~left, -1.0)',
     'neg().masked_fill(~left, -torch.inf)', 'the smallest gradient joins'),
    ('discrimination_aware_channel_pruning', JUDGED,
     '(lam * auxiliary(z) if lam else 0.0)',
     '(lam if lam else 0.0)', 'the classes do not count'),
    ('global_dynamic_pruning', JUDGED,
     '(w * g).double()).abs()',
     '(w * g).double().abs())', 'absolute values before the sum'),
    ('global_dynamic_pruning', JUDGED,
     'if every and step % every == 0 else mask',
     'if not every else mask', 'the mask stays'),
    ('provable_filter_pruning', JUDGED,
     '(1 + more) / (time * p)',
     '(1 + more) / time', 'the chance is forgotten'),
    ('provable_filter_pruning', JUDGED,
     's.sum() / draws',
     '1 / draws', 'all layers shrink alike'),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def labelled(x, classes=3):
    return x, torch.arange(len(x)) % classes


# perforated_cnn

CONVOLUTIONS = {
    "valid": {"kernel_size": 3}, "padded": {"kernel_size": 3, "padding": 1}, "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "oblong": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0)}, "dilated": {"kernel_size": 3, "dilation": 2, "padding": 1},
    "grouped": {"kernel_size": 3, "groups": 2, "bias": False}, "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "same": {"kernel_size": 4, "padding": "same"},
}  # fmt: skip


def convolution(kind, seed=0):
    """A convolution of 4 channels to 6, and 3 inputs."""
    torch.manual_seed(seed)
    return nn.Conv2d(4, 6, **CONVOLUTIONS[kind]).double(), normal(3, 4, 9, 10, seed=seed)


def nearest_by_hand(computed):
    """{place: the computed place nearest to it}, of those as near the first in reading order."""
    there = [tuple(p) for p in computed.nonzero().tolist()]
    return {
        (i, j): min(there, key=lambda p: ((p[0] - i) ** 2 + (p[1] - j) ** 2, p)) for i in range(computed.shape[0]) for j in range(computed.shape[1])
    }


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_perforated_cnn_2_computed_places_are_the_convolutions_and_others_the_nearest(kind):
    layer, x = convolution(kind)
    with torch.no_grad():
        dense = layer(x)
    for seed in SEEDS:
        computed = uniform(*dense.shape[2:], seed=seed) < (0.05, 0.3, 0.5, 0.9, 1.1)[seed]
        computed[1, 2] = True
        perforate.attach_places(layer, computed)
        with torch.no_grad():
            out = layer(x)
        perforate.detach_places(layer)
        assert out.shape == dense.shape
        for (i, j), (a, b) in nearest_by_hand(computed).items():
            assert torch.allclose(out[:, :, i, j], dense[:, :, a, b], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(layer(x), dense)  # taken off, it is as it was


def chain(*, seed=0):
    """Two convolutions with pooling between, 8 by 8 maps, and 12 images with labels."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    )
    return net.double().eval(), labelled(uniform(12, 1, 8, 8, seed=seed))


@pytest.mark.parametrize("mask_type", judged.PERFORATIONS)
def test_perforated_cnn_1_nothing_left_out_is_the_network_itself(mask_type):
    net, data = chain()
    copy = compress(net, "perforated_cnn", data=data, rate=0.0, mask_type=mask_type)
    assert torch.equal(copy(data[0]), net(data[0]))
    assert not any(isinstance(p, Perforated) for p in plan_of(copy).values())


@pytest.mark.parametrize("mask_type", judged.PERFORATIONS)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.75, 0.9])
def test_perforated_cnn_3_multiply_adds_fall_to_the_share_of_places(mask_type, rate):
    net, data = chain()
    made = plan(net, "perforated_cnn", data=data, rate=rate, mask_type=mask_type)
    share = {n: p.computed.double().mean().item() if isinstance(p, Perforated) else 1.0 for n, p in made.items()}
    costs = layer_costs(net, data[0][:1]).set_index("layer").multiply_adds
    copy = attach_plan(deepcopy(net), made)
    assert multiply_adds(copy, data[0][:1]) == round(sum(costs[n] * share[n] for n in costs.index))
    for name, side in (("0", 8), ("3", 2)):
        if mask_type != "grid":  # a grid has whole rows and columns
            assert share[name] == max(1, side**2 - round(rate * side**2)) / side**2
        else:
            assert share[name] == max(1, round(side * (1 - rate) ** 0.5)) ** 2 / side**2
    row = measure(copy, net, data, part="train", rounds=3, threads=1) if rate == 0.75 else None
    assert row is None or row.multiply_adds < row.dense.multiply_adds


@pytest.mark.parametrize("mask_type", judged.PERFORATIONS)
def test_perforated_cnn_4_a_constant_image_is_exact_at_every_rate(mask_type):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 3)).double().eval()
    x = torch.full((4, 1, 10, 10), 0.7, dtype=F64)
    for rate in (0.2, 0.5, 0.9):
        made = plan(net, "perforated_cnn", where="0", data=labelled(x), rate=rate, mask_type=mask_type)
        assert torch.allclose(attach_plan(deepcopy(net), made)[0](x), net[0](x), rtol=1e-12)


def test_perforated_cnn_5_the_grid_at_three_quarters_is_a_strided_convolution_spread_by_twos():
    """Both start at the first row and column, and a place between two takes the one before it."""
    layer, x = convolution("padded")
    x = x[:, :, :8, :8]
    perforate.attach_places(layer, judged.grid((8, 8), 0.75))
    with torch.no_grad():
        strided = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1)
        assert torch.allclose(layer(x), F.interpolate(strided, scale_factor=2, mode="nearest"), rtol=1e-12, atol=1e-12)


def smooth(count, side, seed):
    """Random images without fast changes."""
    return F.interpolate(normal(count, 1, 4, 4, seed=seed), size=(side, side), mode="bicubic")


def test_perforated_cnn_6_on_smooth_images_a_grid_errs_less_than_chance():
    layer = nn.Conv2d(1, 4, 3).double()
    errors = {"grid": [], "uniform": []}
    for seed in SEEDS:
        x = smooth(8, 18, seed)
        for mask_type, found in errors.items():
            (packed,) = plan(
                nn.Sequential(layer, nn.Flatten()), "perforated_cnn", data=labelled(x), rate=0.75, mask_type=mask_type, seed=seed
            ).values()
            perforate.attach_places(layer, packed.computed)
            with torch.no_grad():
                out = layer(x)
            perforate.detach_places(layer)
            assert packed.computed.sum() == 64
            found.append((out - layer(x)).square().mean().item())
    assert np.mean(errors["grid"]) < 0.8 * np.mean(errors["uniform"])


def test_perforated_cnn_6_places_of_little_impact_cost_less_loss_than_places_by_chance(digits):
    model = load_net("cnn", "digits")
    images, labels = digits.validation

    def loss(**knobs):
        copy = compress(model, "perforated_cnn", data=digits, rate=0.3, **knobs).eval()
        return F.cross_entropy(predict(copy, images), labels).item()

    by_chance = [loss(mask_type="uniform", seed=seed) for seed in SEEDS]
    assert loss(mask_type="impact") < np.mean(by_chance)


def test_perforated_cnn_impact_is_what_the_loss_loses_with_a_place_to_first_order():
    net, (x, y) = chain()
    impact, reads = gather(net, {"0": net[0]}, "positions", (x, y))["0"]
    with torch.no_grad():
        v = net[0](x)
    for i, j in ((0, 0), (3, 4), (7, 2)):
        expected = 0.0
        for n in range(len(x)):  # one image, one channel at a time: (V dL/dV) by central differences
            for c in range(5):
                bump = torch.zeros_like(v[n : n + 1])
                bump[0, c, i, j] = 1e-6
                up, down = (F.cross_entropy(net[1:](v[n : n + 1] + s * bump), y[n : n + 1]) for s in (1, -1))
                expected += abs(v[n, c, i, j] * (up - down) / 2e-6).item() / len(x)
        assert impact[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    by_hand = torch.zeros(8, 8, dtype=F64)
    for top in range(-1, 6, 2):
        for left in range(-1, 6, 2):
            by_hand[max(0, top) : top + 3, max(0, left) : left + 3] += 1
    assert torch.equal(reads, by_hand)
    kept = plan(net, "perforated_cnn", where="0", data=(x, y), rate=0.75, mask_type="pooling_structure")["0"].computed
    assert reads[kept].min() >= reads[~kept].max()


def test_perforated_cnn_gradients_are_those_of_the_whole_convolution_read_at_the_nearest():
    for kind in ("padded", "strided", "grouped", "dilated"):
        layer, x = convolution(kind)
        computed = uniform(*layer(x).shape[2:], seed=3) < 0.4
        near = perforate.nearest_computed(computed)
        at = computed.flatten().nonzero().flatten()[near]
        weights = normal(*layer(x).shape, seed=1)
        x.requires_grad_(True)
        (layer(x).flatten(2)[:, :, at].unflatten(2, computed.shape) * weights).sum().backward()
        expected = [p.grad.clone() for p in (x, *layer.parameters())]
        x.grad = None
        layer.zero_grad()
        perforate.attach_places(layer, computed)
        (layer(x) * weights).sum().backward()
        for p, g in zip((x, *[q for n, q in layer.named_parameters()]), expected, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-10, atol=1e-12)


def test_perforated_cnn_is_stored_kept_by_later_plans_and_fine_tuned(digits, tmp_path):
    model = load_net("cnn", "digits")
    copy = compress(model, "perforated_cnn", data=digits, rate=0.6, mask_type="impact")
    images = digits.validation[0][:40]
    for stored in (copy, coded(copy)):
        length = save(stored, tmp_path / "file")
        back = load(tmp_path / "file")
        assert torch.equal(predict(back, images), predict(copy, images))
        assert all(torch.equal(p.computed, plan_of(copy)[n].computed) for n, p in plan_of(back).items() if hasattr(p, "computed"))
    assert length > save(model, tmp_path / "dense")  # nothing is removed, and a bitmap a layer is added
    places = {n: p.computed for n, p in plan_of(copy).items() if hasattr(p, "computed")}
    assert len(places) == 2
    for key, knobs in (("magnitude_pruning_han", {"keep": 0.5}), ("dorefa_net", {"data": digits}), ("l1_norm_filter_pruning", {"data": digits})):
        later = compress(copy, key, **knobs)
        assert {n: p.computed.tolist() for n, p in plan_of(later).items() if hasattr(p, "computed")} == {n: c.tolist() for n, c in places.items()}
    small = bake(later, digits)
    assert multiply_adds(small, torch.zeros(1, 1, 8, 8)) < 0.6 * multiply_adds(copy, torch.zeros(1, 1, 8, 8))
    assert torch.allclose(predict(small, images), predict(later, images), rtol=1e-4, atol=1e-4)
    before = evaluate(copy, digits.validation)
    fit(copy, digits, epochs=3, lr=1e-3)
    assert evaluate(copy, digits.validation) > before + 0.02
    assert all(torch.equal(p.computed, places[n]) for n, p in plan_of(copy).items() if n in places)


def test_perforated_cnn_says_what_it_cannot_do(digits, tmp_path):
    copy = compress(load_net("cnn", "digits"), "perforated_cnn", data=digits)
    with pytest.raises(ValueError, match=r"maps of \[6, 6\]; this input makes maps of \[10, 10\]"):
        copy(torch.zeros(1, 1, 12, 12))
    with pytest.raises(FileError, match="conv1, conv2 leaves out places but has plain weights"):
        save(with_plain_weights(copy), tmp_path / "file")
    with pytest.raises(IntegerError, match="conv1 works out some places"):
        integer_network(copy, digits)
    with pytest.raises(ValueError, match="some place of the map of a 2-D convolution"):
        perforate.attach_places(nn.Conv2d(1, 1, 3), torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="some place of the map of a 2-D convolution"):
        perforate.attach_places(nn.Linear(2, 2), torch.ones(3, 3, dtype=torch.bool))
    packed = plan_of(copy)["conv1"]
    arrays, meta = packed.arrays(), packed.meta()
    for wrong in ({"map": [6, 60]}, {"map": [3, 3]}):
        with pytest.raises(ValueError, match="do not fit a map"):
            Perforated.decode(arrays, {**meta, **wrong})
    with pytest.raises(ValueError, match="no place of the map"):
        Perforated.decode({**arrays, "computed": np.zeros_like(arrays["computed"])}, meta)
    assert entropy_coded(packed).bits() >= packed.inner.bits()


def test_perforated_cnn_works_in_half_precision_and_on_copies():
    layer, x = convolution("padded")
    perforate.attach_places(layer, judged.grid((9, 10), 0.6))
    full = layer(x)
    copy = deepcopy(layer).half()
    assert torch.allclose(copy(x.half()).double(), full, atol=2e-2) and copy.weight is not layer.weight
    with torch.no_grad():
        copy.weight.zero_()
    assert torch.equal(layer(x), full)


# eyeriss_energy_model


def counts(net, x):
    """(weights, multiply-adds, numbers read and written) of each layer of a plain network."""
    return gather(net, weighted(net), "workload", (x, torch.zeros(len(x), dtype=torch.int64)))[next(iter(weighted(net)))]


def test_eyeriss_energy_model_1_counts_are_the_closed_forms_and_torch_prunings():
    for layer, shape, macs in (
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 12, 10), 8 * 3 * 9 * 120),
        (nn.Conv2d(4, 6, 5, stride=2, bias=False), (4, 15, 15), 6 * 4 * 25 * 36),
        (nn.Linear(40, 7, bias=False), (40,), 280), (nn.Conv2d(6, 6, 3, groups=6, bias=False), (6, 9, 9), 6 * 9 * 49),
    ):  # fmt: skip
        x = torch.rand(2, *shape)
        (row,) = counts(nn.Sequential(layer), x).tolist()
        assert row == [layer.weight.numel(), macs, x[0].numel() + layer(x[:1]).numel()]
        assert torch_pruning.utils.count_ops_and_params(nn.Sequential(layer), x[:1])[0] == macs


COSTS = ("mac_cost", "register_cost", "buffer_cost", "dram_cost")


def test_eyeriss_energy_model_2_it_is_linear_in_its_costs_and_its_counts():
    rows = 1e4 * uniform(6, 3)
    once = energy.eyeriss_energy_model(*rows.T)
    twice = energy.eyeriss_energy_model(*rows.T, mac_cost=2.0, register_cost=2.0, buffer_cost=12.0, dram_cost=400.0)
    assert torch.allclose(twice, 2 * once, rtol=1e-14) and torch.allclose(energy.eyeriss_energy_model(*(3 * rows).T), 3 * once, rtol=1e-14)
    assert torch.equal(energy.eyeriss_energy_model(0, 0, rows[:, 2]), 200 * rows[:, 2])  # no weight left: the maps still move
    parts = [
        energy.eyeriss_energy_model(*rows.T, **{c: v if c == n else 0.0 for c in COSTS}) for n, v in zip(COSTS, (1.0, 1.0, 6.0, 200.0), strict=True)
    ]
    assert torch.allclose(sum(parts), once, rtol=1e-14)


def test_eyeriss_energy_model_3_no_weight_that_becomes_zero_costs_energy_nor_does_a_bit_less():
    net, (x, _) = chain()
    w, m, a = counts(net, x).unbind(1)
    shares = [energy.eyeriss_energy_model(w * keep, m * keep, a).sum().item() for keep in (1.0, 0.7, 0.3, 0.0)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 4
    bits = [energy.eyeriss_energy_model(100.0, 1e4, 50.0, weight_bits=b) for b in (32, 16, 8, 4, 1)]
    assert bits == sorted(bits, reverse=True) and bits[1] == 8e4 + 200 * 150 and bits[2] == 7.5e4 + 200 * 100


VGG16 = [(64, 3, 224), (64, 64, 224), (128, 64, 112), (128, 128, 112), (256, 128, 56), (256, 256, 56), (256, 256, 56),
         (512, 256, 28), (512, 512, 28), (512, 512, 28), (512, 512, 14), (512, 512, 14), (512, 512, 14)]  # (out, in, side)  # fmt: skip


def vgg16():
    convolutions = [(o * i * 9, o * i * 9 * s * s, (i + o) * s * s) for o, i, s in VGG16]
    dense = [(i * o, i * o, i + o) for i, o in ((25088, 4096), (4096, 4096), (4096, 1000))]
    return torch.tensor(convolutions + dense, dtype=F64)


def test_eyeriss_energy_model_4_memory_alone_ranks_by_bytes_and_arithmetic_alone_by_multiply_adds():
    rows = vgg16()
    weights, macs, maps = rows.T
    nothing = dict.fromkeys(COSTS, 0.0)
    memory = energy.eyeriss_energy_model(*rows.T, **{**nothing, "dram_cost": 200.0})
    arithmetic = energy.eyeriss_energy_model(*rows.T, **{**nothing, "mac_cost": 1.0})
    assert torch.equal(memory.argsort(), (weights + maps).argsort()) and torch.equal(arithmetic, macs)
    rank = lambda e: e.argsort(descending=True).argsort()[13].item()  # noqa: E731  (of the first dense layer)
    assert rank(memory) == 0 and rank(arithmetic) > 10
    assert 1.54e10 < macs.sum() < 1.56e10


# energy_aware_pruning


def least_squares_by_numpy(x, w, mask):
    """Per output the v on the mask with x v nearest to x w."""
    new = np.zeros_like(w)
    for i, stays in enumerate(mask):
        new[i, stays] = np.linalg.lstsq(x[:, stays], x @ w[i], rcond=None)[0]
    return new


def test_energy_aware_pruning_1_the_refit_is_numpys_least_squares_and_never_errs_more():
    for seed in SEEDS:
        x, w = normal(200, 12, seed=seed) @ normal(12, 12, seed=seed + 50), normal(5, 12, seed=seed + 9)
        gram = (x.T @ x / len(x))[None]
        mask = energy.with_restored(w, gram, 0.4, 0.2)
        new = energy.refitted(w, mask, gram)
        assert np.allclose(new, least_squares_by_numpy(x.numpy(), w.numpy(), mask.numpy()), rtol=1e-5, atol=1e-6)
        error = lambda v: (x @ (v - w).T).square().sum(0)  # noqa: B023, E731
        assert (error(new) <= error(w * mask)).all() and error(new).sum() < 0.9 * error(w * mask).sum()
        assert not new[~mask].any()


def test_energy_aware_pruning_1_what_reads_only_dead_inputs_keeps_its_weights():
    w, gram = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.diag(torch.tensor([0.0, 1.0], dtype=F64))[None]
    mask = torch.tensor([[True, False], [True, True]])
    assert torch.equal(energy.refitted(w, mask, gram), w * mask)


def test_energy_aware_pruning_1_groups_and_convolutions_are_fitted_to_their_own_inputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 3)).double().eval()
    x = normal(60, 4, 5, 5)
    made = plan(net, "energy_aware_pruning", data=labelled(x), keep=0.5)
    columns = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    for group in range(2):
        rows, own = slice(3 * group, 3 * group + 3), slice(18 * group, 18 * group + 18)
        w, mask = (t[rows].flatten(1).numpy() for t in (net[0].weight.detach(), made["0"].mask))
        expected = least_squares_by_numpy(columns[:, own].numpy(), w, mask)
        assert np.allclose(made["0"].dense()[rows].flatten(1), expected, rtol=1e-6, atol=1e-8)


def test_energy_aware_pruning_2_layers_come_in_the_order_of_their_energy():
    rows = vgg16()
    use = energy.eyeriss_energy_model(*rows.T)
    order = energy.ORDERS["energy"](use)
    assert order.tolist() == np.argsort(-use.numpy(), kind="stable").tolist()
    parameters = rows[:, 0].argsort(descending=True)
    assert order.tolist() != parameters.tolist()  # not that of parameters: an early convolution costs more than a dense layer
    assert use[1] > use[15] and rows[1, 0] < rows[15, 0]
    for budget in (0.95, 0.8, 0.6):
        taken = energy.taken(rows, 0.5, order, budget)
        first = int(taken.sum())
        assert taken[order[:first]].all() and not taken[order[first:]].any()
        left = energy.eyeriss_energy_model(*(rows * torch.where(taken, 0.5, 1.0)[:, None] ** torch.tensor([1, 1, 0])).T).sum()
        less = energy.eyeriss_energy_model(*(rows * torch.where(taken & (torch.arange(16) != order[first - 1]), 0.5, 1.0)[:, None]
                                             ** torch.tensor([1, 1, 0])).T).sum()  # fmt: skip
        assert left <= budget * use.sum() < less  # no layer more than it takes
    assert energy.taken(rows, 0.5, order, 0.0).all() and not energy.taken(rows, 0.5, order, 1.0).any()


def test_energy_aware_pruning_3_without_restoring_and_refit_it_is_magnitude_pruning_a_layer():
    net, data = chain()
    ours = plan(net, "energy_aware_pruning", data=data, keep=0.3, restore=0.0, refit="off", order="depth_first")
    theirs = plan(net, "magnitude_pruning_han", keep=0.3)
    for name, packed in ours.items():
        assert torch.equal(packed.mask, theirs[name].mask) and torch.equal(packed.dense(), theirs[name].dense())


def test_energy_aware_pruning_restores_what_moves_the_output_most():
    w, x = torch.tensor([[1.0, 0.9, 0.5, 0.4, 0.1]], dtype=F64), normal(500, 5)
    x[:, 4] *= 100  # the smallest weight reads the loudest input
    gram = (x.T @ x / len(x))[None]
    assert energy.with_restored(w, gram, 0.4, 0.0).tolist() == [[True, True, False, False, False]]
    assert energy.with_restored(w, gram, 0.4, 0.5).tolist() == [[True, False, False, False, True]]


def test_energy_aware_pruning_4_at_equal_energy_the_dearest_first_loses_less(digits):
    """A dear layer of many places and a thrifty one that holds most weights: in the order of energy one layer pays, in reverse both must."""
    lost = {"energy": [], "reverse": []}
    images, labels = (t[:500] for t in digits.train)
    x = images.double() / 255
    for seed in SEEDS:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 10)).double()
        fit(net, (x, labels), epochs=8, lr=5e-3, keep_best=False)
        rows = counts(net, x)
        use = energy.eyeriss_energy_model(*rows.T)
        for name, order in (("energy", use.argsort(descending=True)), ("reverse", use.argsort())):
            taken = energy.taken(rows, 0.3, order, 0.6)
            made = plan(net, "energy_aware_pruning", data=(x, labels), keep=0.3)
            copy = attach_plan(deepcopy(net), {n: p for (n, p), t in zip(made.items(), taken, strict=True) if t}).eval()
            lost[name].append(1 - (copy(x).argmax(1) == labels).double().mean().item())
    assert np.mean(lost["energy"]) <= np.mean(lost["reverse"])


# ecc_energy_bilinear


def plain_chain(widths=(1, 6, 5, 4), seed=0):
    """A chain of convolutions 3 by 3 on maps of 8 by 8, and a dense layer."""
    torch.manual_seed(seed)
    parts = []
    for a, b in zip(widths, widths[1:], strict=False):
        parts += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 3)).double().eval()


def test_ecc_energy_bilinear_1_the_fit_recovers_a_chains_multiply_adds():
    net = plain_chain()
    found = gather(net, weighted(net), "widths", labelled(uniform(2, 1, 8, 8)))["0"]
    s = (1 + uniform(60, 3) * found.full).floor().minimum(found.full)
    cost = found.multiply_adds(s)
    by_hand = 576 * (s[:, 0] + s[:, 0] * s[:, 1] + s[:, 1] * s[:, 2]) + 3 * s[:, 2]
    assert torch.allclose(cost, by_hand, rtol=1e-14)
    a = energy.bilinear_fit(found.products(s), cost)
    assert np.allclose(a[1:], found.each, rtol=1e-8) and abs(a[0]) < 1e-6 * cost.mean()
    residual = cost - a[0] - found.products(s) @ a[1:]
    assert residual.square().sum() < 1e-8 * (cost - cost.mean()).square().sum()
    line = torch.cat([torch.ones(60, 1, dtype=F64), s], 1)  # (2) a cost linear in the widths fits clearly worse
    rest = cost - line @ torch.linalg.lstsq(line, cost[:, None]).solution[:, 0]
    assert rest.square().sum() > 0.02 * (cost - cost.mean()).square().sum()


def test_ecc_energy_bilinear_1_a_planted_model_with_zeros_is_recovered_and_least_squares_are_scipys():
    for seed in SEEDS:
        products = 1 + 50 * uniform(60, 6, seed=seed)
        a = torch.tensor([3.0, 0, 2, 0, 5, 0.01, 1], dtype=F64)
        assert torch.allclose(energy.bilinear_fit(products, a[0] + products @ a[1:]), a, atol=1e-8)
        m, b = normal(30, 7, seed=seed), normal(30, seed=seed + 20)
        assert np.allclose(energy.nonnegative_least_squares(m, b), nnls(m.numpy(), b.numpy())[0], atol=1e-10)
    assert not energy.nonnegative_least_squares(m, torch.zeros(30, dtype=F64)).any()


@pytest.mark.parametrize("net, data", [("cnn", "digits"), ("lenet5", "mnist"), ("resnet", "mnist"), ("lenet300", "mnist")])
def test_ecc_energy_bilinear_the_black_box_counts_what_bake_leaves(net, data):
    model = networks.stirred(build(net, data), dtype=torch.float32)
    found = next(iter(gather(model, weighted(model), "widths", None).values()))
    assert found.multiply_adds(found.full).item() == pytest.approx(multiply_adds(model, torch.zeros(1, *model.input_shape)), rel=1e-12)
    planner = Planner(model, catalog()["l1_norm_filter_pruning"])
    small = bake(attach_plan(deepcopy(model), planner(unit="filter", keep=0.5)))
    left = torch.tensor([float(len(small.get_submodule(g.first).weight)) for g in planner.structure.groups], dtype=F64)
    assert found.multiply_adds(left).item() == pytest.approx(multiply_adds(small, torch.zeros(1, *model.input_shape)), rel=1e-12)


@pytest.mark.parametrize("net", ["cnn", "resnet"])
def test_ecc_energy_bilinear_3_widths_keep_to_the_budget(net):
    model = networks.stirred(build(net, "digits" if net == "cnn" else "mnist"), dtype=torch.float32)
    x = torch.zeros(1, *model.input_shape)
    for budget in (1.0, 0.7, 0.3):
        copy = compress(model, "ecc_energy_bilinear", budget=budget)
        share = multiply_adds(bake(copy), x) / multiply_adds(model, x)
        assert budget - 0.2 < share <= budget
        if budget == 1.0:
            assert all(p.mask.all() for p in plan_of(copy).values())
    for name, packed in plan_of(copy).items():  # what stays in a layer of its own are the filters of largest norm
        if net == "cnn" and not packed.rows.all():
            norms = model.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
            assert norms[packed.rows].min() >= norms[~packed.rows].max()


def test_ecc_energy_bilinear_4_the_primal_dual_solution_is_slsqps():
    for seed in SEEDS:
        best, steep = 1 + 0.3 * uniform(2, seed=seed), 0.3 + uniform(2, seed=seed + 9)
        loss = lambda u: (steep * (u - best).square()).sum()  # noqa: B023, E731
        cost = lambda u: 0.2 * u[0] + 0.6 * u[0] * u[1] + 0.2 * u[1]  # noqa: E731
        u = energy.primal_dual(loss, cost, 0.4, torch.ones(2, dtype=F64), 0.1)
        rule = {"type": "ineq", "fun": lambda v, cost=cost: 0.4 - cost(v)}
        found = minimize(
            lambda v, loss=loss: loss(torch.tensor(v)).item(),
            np.ones(2),
            bounds=[(0, 1)] * 2,
            constraints=rule,
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        assert np.allclose(u, found.x, rtol=0.01, atol=2e-3) and cost(u) <= 0.4 + 1e-3


def test_ecc_energy_bilinear_spares_the_layer_whose_filters_matter():
    squares = [torch.tensor([8.0, 7, 6, 5], dtype=F64), torch.tensor([8.0, 0.01, 0.01, 0.01], dtype=F64)]
    loss = energy.small_norms(squares)
    assert loss(torch.ones(2, dtype=F64)).item() == pytest.approx(0, abs=1e-12)
    assert loss(torch.tensor([0.5, 0.375], dtype=F64)).item() == pytest.approx(11 / 26 + 0.025 / 8.03, rel=1e-12)
    u = energy.primal_dual(loss, lambda u: u.prod(), 0.5, torch.ones(2, dtype=F64), 0.1)
    assert u[0] > 0.95 and 0.25 <= u[1] < 0.55


# nisp


def dense_net(sizes, seed=0, bias=True):
    """Dense layers with ReLU between, float64."""
    torch.manual_seed(seed)
    parts = [part for a, b in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*parts[:-1]).double().eval()


def nisp_scores(net, x, **knobs):
    return {n: s.flatten() for n, s in Planner(net, catalog()["nisp"], data=labelled(x)).ranking(**catalog()["nisp"].bind(knobs)).scores.items()}


@pytest.mark.parametrize("ranker", judged.RANKERS)
def test_nisp_1_scores_are_products_of_absolute_matrices(ranker):
    net, x = dense_net((7, 6, 5, 4, 3)), normal(50, 7)
    found = nisp_scores(net, x, ranker=ranker)
    last = judged.RANKERS[ranker](net[:6](x).detach(), 0.5)
    assert torch.allclose(found["4"], last, rtol=1e-12)
    w = {n: m.weight.detach().abs() for n, m in weighted(net).items()}
    assert torch.allclose(found["2"], w["4"].T @ last, rtol=1e-12)
    assert torch.allclose(found["0"], (w["4"] @ w["2"]).T @ last, rtol=1e-12)


def test_nisp_2_convolutions_batch_norm_and_pooling_count_as_their_absolute_linear_map():
    """A channel's score is what one more at each of its places adds to the worth of the last features, in a network of absolute values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
                        nn.Conv2d(4, 5, 2, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
                        nn.Flatten(), nn.Linear(20, 3))  # fmt: skip
    net, x = networks.stirred(net, dtype=F64), uniform(30, 1, 8, 8)
    found = nisp_scores(net, x)
    features = net[:8](x).detach()
    s = judged.infinite_feature_selection(features, 0.5)
    assert torch.allclose(found["4"], s.reshape(5, 4).sum(1), rtol=1e-12)
    maps = torch.zeros(1, 4, 6, 6, dtype=F64, requires_grad=True)
    scale = (net[5].weight.abs() / (net[5].running_var + net[5].eps).sqrt()).detach()
    out = F.conv2d(F.avg_pool2d(maps, 2), net[4].weight.detach().abs()) * scale[:, None, None]
    (out.flatten() @ s).backward()
    assert torch.allclose(found["0"], maps.grad[0].sum((1, 2)), rtol=1e-12)


def test_nisp_2_max_pooling_hands_on_the_worth_of_its_window_and_shortcuts_add():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    x = uniform(20, 1, 6, 6)
    s = judged.infinite_feature_selection(net[:4](x).detach(), 0.5)
    assert torch.allclose(nisp_scores(net, x)["0"], s.reshape(4, 4).sum(1), rtol=1e-12)
    scores = nisp_scores(networks.stirred(build("resnet", "mnist"), dtype=F64), uniform(8, 1, 28, 28))
    assert all((v > 0).all() for v in scores.values()) and len(scores) == 6


def test_nisp_3_the_scores_bound_what_pruning_moves_on_every_input():
    for seed in SEEDS:
        net, x = dense_net((7, 8, 6, 5, 3), seed), normal(100, 7, seed=seed)
        s = judged.infinite_feature_selection(net[:6](x).detach(), 0.5)
        score, gone = nisp_scores(net, x)["0"], torch.tensor([1, 4, 6])
        with torch.no_grad():
            hidden = net[:2](x)
            moved = (net[2:6](hidden) - net[2:6](hidden.index_fill(1, gone, 0.0))).abs() @ s
        bound = (hidden[:, gone].abs() * score[gone]).sum(1)
        assert (moved <= bound * (1 + 1e-12)).all() and moved.max() > 0


def test_nisp_4_who_is_not_listened_to_is_worth_nothing():
    net = dense_net((5, 6, 4, 3))
    with torch.no_grad():
        net[2].weight[:, 2] = 0
        net[0].weight[3] = 0  # one that says nothing is worth what it could move
    found = nisp_scores(net, normal(30, 5))["0"]
    assert found[2] == 0 and (found[[0, 1, 3, 4, 5]] > 0).all()


def test_nisp_5_inf_fs_is_the_sum_of_all_paths():
    x = normal(40, 6) @ normal(6, 6)
    found = judged.infinite_feature_selection(x, 0.3)
    s = np.std(x.numpy(), axis=0)
    s /= s.max()
    a = 0.3 * np.maximum.outer(s, s) + 0.7 * (1 - np.abs(np.corrcoef(x.numpy().T)))
    r = 0.9 / np.abs(np.linalg.eigvals(a)).max()
    paths, power = np.zeros(6), np.eye(6)
    for _ in range(600):
        power = power @ (r * a)
        paths += power.sum(1)
    assert np.allclose(found, paths, rtol=1e-9)


def test_nisp_6_with_ones_a_neuron_is_worth_its_outgoing_column():
    net, x = dense_net((5, 6, 4, 3)), normal(30, 5)
    assert torch.allclose(nisp_scores(net, x, ranker="ones")["0"], net[2].weight.detach().abs().sum(0), rtol=1e-12)
    incoming = net[0].weight.detach().abs().sum(1)
    assert nisp_scores(net, x, ranker="ones")["0"].argsort().tolist() != incoming.argsort().tolist()


# discrimination_aware_channel_pruning


def planted(n=40, channels=6, k=1, outputs=3, seed=0):
    """What a next layer reads (n, channels, k), its weight (outputs, channels, k), and labels."""
    return normal(n, channels, k, seed=seed), normal(outputs, channels, k, seed=seed + 1), torch.arange(n) % 3


@pytest.mark.parametrize("lam", [0.0, 0.7])
def test_discrimination_aware_channel_pruning_1_gradients_are_finite_differences(lam):
    x, w, labels = planted(k=2)
    flat, dense, loss = judged._problem(x, w, labels, lam)
    v = 0.3 * normal(*dense.shape, seed=5)
    _, g = judged.slope(loss, flat.flatten(1), v)
    for i, j in ((0, 0), (3, 2), (11, 1)):
        bump = torch.zeros_like(v)
        bump[i, j] = 1e-6
        up, down = (loss(flat.flatten(1) @ (v + s * bump)) for s in (1, -1))
        assert g[i, j].item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-5, abs=1e-8)
    if lam == 0:  # dL_M / dW = -X^T R / N
        residual = flat.flatten(1) @ (dense - v)
        assert torch.allclose(g, -flat.flatten(1).T @ residual / len(x), rtol=1e-12)


def test_discrimination_aware_channel_pruning_1_without_classes_it_is_orthogonal_matching_pursuit():
    for seed in range(10):
        x, w = normal(60, 8, 1, seed=seed), normal(1, 8, 1, seed=seed + 100)
        x = x / x.norm(dim=0)
        flat, _, loss = judged._problem(x, w, torch.zeros(60, dtype=torch.int64), 0.0)
        turn, _ = judged.selection_order(flat, loss, 1)
        last = set()
        for count in range(1, 9):
            found = OrthogonalMatchingPursuit(n_nonzero_coefs=count, fit_intercept=False).fit(
                x[:, :, 0].numpy(), (flat.flatten(1) @ w[0, :, 0]).numpy()
            )
            now = set(np.flatnonzero(found.coef_).tolist())
            assert (now - last) == {turn.tolist().index(count - 1)}
            last = now


@pytest.mark.parametrize("lam", [0.0, 1.0, 10.0])
def test_discrimination_aware_channel_pruning_2_the_joint_loss_never_rises(lam):
    for seed in SEEDS:
        x, w, labels = planted(60, 7, 2, 4, seed)
        flat, _, loss = judged._problem(x, w, labels, lam)
        turn, losses = judged.selection_order(flat, loss, 4)
        assert sorted(turn.tolist()) == list(range(7)) and len(losses) == 8
        assert all(b <= a + 1e-12 for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < 0.6 * losses[0]


def test_discrimination_aware_channel_pruning_3_classes_call_for_the_channel_that_tells_them_apart():
    n, draw = 90, torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    x = torch.zeros(n, 2, 1, dtype=F64)
    x[:, 0, 0] = 2 * torch.randn(n, generator=draw, dtype=F64)  # loud, says nothing of the class
    x[:, 1, 0] = 0.5 * (2 * labels - 1)  # quiet, is the class
    w = torch.eye(2, dtype=F64)[:, :, None]
    first = {lam: judged.discrimination_aware_channel_pruning(x, w, labels, lam=lam).argmax().item() for lam in (0.0, 1000.0)}
    assert first == {0.0: 0, 1000.0: 1}


def test_discrimination_aware_channel_pruning_4_all_kept_and_no_classes_is_the_dense_layer():
    x, w, labels = planted(60, 5, 2, 3)
    flat, _, loss = judged._problem(x, w, labels, 0.0)
    _, losses = judged.selection_order(flat, loss, 3)
    assert losses[-1] < 1e-14 * losses[0]
    every = torch.ones(5, dtype=torch.bool)
    assert torch.allclose(judged._selected(every, x, w, labels, lam=0.0), w, rtol=1e-9)


def test_discrimination_aware_channel_pruning_4_all_kept_is_the_dense_layer_does_not_hold_with_classes():
    """The minimum of L_M + lam L_S is not that of L_M: with every channel kept the layer still moves, and reconstruction is not 0."""
    x, w, labels = planted(60, 5, 2, 3)
    _, dense, loss = judged._problem(x, w, labels, 5.0)
    new = judged._selected(torch.ones(5, dtype=torch.bool), x, w, labels, lam=5.0).flatten(1).T
    assert (x.flatten(1) @ (new - dense)).square().mean() > 1e-3
    assert loss(x.flatten(1) @ new) < loss(x.flatten(1) @ dense)


def test_discrimination_aware_channel_pruning_takes_several_at_once_beyond_32_channels():
    x, w, labels = planted(200, 70, 1, 4)
    flat, _, loss = judged._problem(x, w, labels, 0.0)
    turn, losses = judged.selection_order(flat, loss, 4)
    assert sorted(turn.tolist()) == list(range(70)) and len(losses) == 25


def test_discrimination_aware_channel_pruning_prunes_a_network_better_than_by_norm(digits):
    model = load_net("cnn", "digits")
    ours, norm = (compress(model, key, data=digits, keep=0.5) for key in ("discrimination_aware_channel_pruning", "l1_norm_filter_pruning"))
    right = [(predict(m, digits.validation[0]).argmax(1) == digits.validation[1]).double().mean().item() for m in (ours.eval(), norm.eval())]
    assert right[0] > right[1]


# global_dynamic_pruning


def gated(net, x, y, layer, rows):
    """d loss / d gate of each row of a layer's weight, at gates of 1."""
    gate = torch.ones(rows, dtype=F64, requires_grad=True)
    w = net.get_submodule(layer).weight.detach()
    out = torch.func.functional_call(net, {f"{layer}.weight": w * gate.reshape(-1, *[1] * (w.dim() - 1))}, (x,))
    return torch.autograd.grad(F.cross_entropy(out, y), gate)[0]


def test_global_dynamic_pruning_1_a_filters_score_is_the_gradient_of_its_gate():
    net, (x, y) = chain()
    layers = {n: net.get_submodule(n) for n in ("0", "3")}
    g, channel = (gather(net, layers, name, (x, y)) for name in ("grad", "channel"))
    scores = {n: (g[n] * m.weight).flatten(1).sum(1).abs().detach() for n, m in layers.items()}
    for n, rows in (("0", 5), ("3", 6)):
        assert torch.allclose(scores[n], gated(net, x, y, n, rows).abs(), rtol=1e-9, atol=1e-14)
    together = torch.cat([scores["0"], scores["3"]])
    made = plan(net, "global_dynamic_pruning", data=(x, y), keep=0.5)
    assert torch.equal(torch.cat([p.rows for p in made.values()]), together >= together.sort(descending=True).values[4])  # floor(0.5 * 11) = 5
    assert channel["3"][:, :, 0, 0, 0].tolist() == [[5, 6, 7, 8, 9, 10], [1] * 6] and list(made) == ["0", "3"]


def test_global_dynamic_pruning_of_tied_layers_is_of_channels():
    model = networks.stirred(build("resnet", "mnist"), dtype=F64)
    data = labelled(uniform(8, 1, 28, 28), 10)
    made = plan(model, "global_dynamic_pruning", data=data, keep=0.4)
    for g in Planner(model, catalog()["l1_norm_filter_pruning"], data=data).structure.groups:
        assert all(torch.equal(made[n].rows, made[g.first].rows) for n in g.makers)


@pytest.mark.parametrize("scope", ["network", "layer"])
def test_global_dynamic_pruning_2_floor_of_keep_stay_and_a_layer_never_empties(scope):
    saliency, group = torch.tensor([9.0, 8, 7, 6, 5, 4, 0.3, 0.2, 0.1]), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert judged.active(saliency, group, 0.5, scope).nonzero().flatten().tolist() == {"network": [0, 1, 2, 3, 6], "layer": [0, 3, 6]}[scope]
    assert judged.active(saliency, group, 1.0, scope).all()
    for keep in (0.45, 0.7, 0.9):
        count = sum(math.floor(keep * n + 1e-9) for n in ([9] if scope == "network" else [3, 3, 3]))
        assert count <= int(judged.active(saliency, group, keep, scope).sum()) <= count + 1


def watched_training(net, data, **knobs):
    """The number of active filters after every step, the copy, and how often the mask changed."""
    copy, seen = compress(net, "global_dynamic_pruning", data=data, **knobs), []
    watch = Hook(after=lambda m, rule: seen.append({n: a.content()["mask"].clone() for n, _, a in attached(m)}))
    fit(copy, data, epochs=12, batch=6, lr=0.05, optimizer=SGD, schedule="constant", keep_best=False, hooks=[watch])
    changes = sum(any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(seen, seen[1:], strict=False))
    return copy, seen, changes


def test_global_dynamic_pruning_2_the_count_holds_through_training_and_the_mask_moves():
    net, data = chain(seed=2)
    copy, seen, changes = watched_training(net, data, keep=0.5, every=3)
    for masks in seen:
        assert 5 <= sum(int(m.flatten(1).any(1).sum()) for m in masks.values()) <= 6  # a hook of ours runs before or after theirs, all the same
    assert changes > 0
    assert all(torch.equal(p.mask, next(a for n, _, a in attached(copy) if n == name).mask) for name, p in plan_of(copy).items())


def test_global_dynamic_pruning_3_a_filter_wrongly_masked_comes_back():
    """Two filters, of which the necessary one is masked at first: only a mask that is looked at again finds it."""
    x = normal(200, 2)
    y = x[:, :1].clone()
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 1, bias=False)).double()
    kept = {}
    for every in (0, 5):
        with torch.no_grad():
            net[0].weight.copy_(torch.eye(2, dtype=F64))
            net[2].weight.copy_(torch.ones(1, 2, dtype=F64))
        copy = compress(net, "global_dynamic_pruning", where="0", data=(x, y), loss=F.mse_loss, keep=0.5, every=every)
        between = next(a for _, _, a in attached(copy))
        with torch.no_grad():
            between.mask.copy_(torch.tensor([[False, False], [True, True]]))  # wrong: the target is the first input
        fit(copy, (x, y), epochs=15, batch=50, lr=0.05, optimizer=SGD, schedule="constant", loss=F.mse_loss, keep_best=False)
        kept[every] = plan_of(copy)["0"].rows.tolist()
    assert kept == {0: [False, True], 5: [True, False]}


def test_global_dynamic_pruning_4_without_updates_it_is_pruning_once_and_whole_it_is_training():
    net, data = chain(seed=1)
    copy, _, changes = watched_training(net, data, keep=0.5, every=0)
    first = plan(net, "global_dynamic_pruning", data=data, keep=0.5)
    assert changes == 0 and all(torch.equal(p.mask, first[n].mask) for n, p in plan_of(copy).items())
    whole, _, _ = watched_training(net, data, keep=1.0, every=2)
    plain = deepcopy(net)
    fit(plain, data, epochs=12, batch=6, lr=0.05, optimizer=SGD, schedule="constant", keep_best=False)
    for name, layer in weighted(whole).items():
        trained = latent(layer) if name in plan_of(whole) else layer.weight
        assert torch.allclose(trained, plain.get_submodule(name).weight, rtol=1e-12)


def test_global_dynamic_pruning_5_what_bake_removes_was_not_there(digits):
    model = load_net("cnn", "digits")
    copy = compress(model, "global_dynamic_pruning", data=digits, keep=0.5, every=5)
    fit(copy, digits, epochs=1, lr=1e-3)
    copy.eval()
    small, images = bake(copy, digits), digits.validation[0]
    assert torch.allclose(predict(small, images), predict(copy, images), atol=1e-4)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())


# provable_filter_pruning


def positive_layer(samples=30, channels=20, outputs=8, seed=0):
    """Inputs and weights that are not negative: (samples, channels, 1), (outputs, channels, 1)."""
    return uniform(samples, channels, 1, seed=seed), uniform(outputs, channels, 1, seed=seed + 1)


def sampled(s, m, seeds, weighted=True):
    """n_j / (m p_j) at a time m, fixed beforehand, of each draw (or whether j came up)."""
    found = [judged.importance_weights(s, m, judged.arrivals(s, 2 * i), 2 * i) for i in range(seeds)]
    return torch.stack([f if weighted else (f > 0).double() for f in found])


def test_provable_filter_pruning_1_the_weighted_sum_is_unbiased_and_the_plain_one_is_not():
    a, w = normal(3, 12, 2), normal(4, 12, 2, seed=1)
    s = judged.sensitivities(a, w)
    parts = torch.einsum("sck,ock->soc", a, w).flatten(0, 1)
    for weighted_, holds in ((True, True), (False, False)):
        found = sampled(s, 6.0, 4000, weighted_) @ parts.T
        error = (found.mean(0) - parts.sum(1)).abs() / (found.std(0) / 4000**0.5)
        assert bool((error < 4.5).all()) == holds


def test_provable_filter_pruning_1_counts_are_those_of_draws_with_replacement():
    """n_j of a Poisson process until m: mean and variance m p_j, and the order of first draws that of drawing without returning."""
    s = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    n = sampled(s, 5.0, 6000) * 5.0 * s
    assert torch.allclose(n.mean(0), 5 * s, rtol=0.05) and torch.allclose(n.var(0), 5 * s, rtol=0.08)
    first = torch.stack([judged.arrivals(s, i).argmin() for i in range(6000)]).bincount(minlength=3) / 6000
    assert torch.allclose(first.double(), s, atol=0.02)


def test_provable_filter_pruning_2_sensitivities_are_shares():
    for seed in SEEDS:
        s = judged.sensitivities(normal(30, 9, 3, seed=seed), normal(5, 9, 3, seed=seed + 1))
        assert (s >= 0).all() and (s <= 1).all()
        a, w = positive_layer(seed=seed)
        s = judged.sensitivities(a, w)
        shares = (a[:, None] * w[None]).sum(3)
        shares = shares / shares.sum(2, keepdim=True)
        assert torch.allclose(s, shares.amax((0, 1)), rtol=1e-12) and s.sum() >= 1 and s.max() <= 1


def test_provable_filter_pruning_2_signs_are_kept_apart():
    """1 - 1 has nothing to divide by; apart each of both is the whole of its sign."""
    s = judged.sensitivities(torch.ones(1, 3, 1, dtype=F64), torch.tensor([[[1.0], [-1.0], [0.5]]], dtype=F64))
    assert torch.allclose(s, torch.tensor([2 / 3, 1, 1 / 3], dtype=F64))


def test_provable_filter_pruning_3_the_error_falls_as_the_root_of_the_draws_and_within_bernsteins_bound():
    a, w = positive_layer(8, 30, 5)
    s = judged.sensitivities(a, w)
    parts = torch.einsum("sck,ock->soc", a, w).flatten(0, 1)
    sizes, spread = (20.0, 80.0, 320.0), []
    for m in sizes:
        error = ((sampled(s, m, 1000) @ parts.T) / parts.sum(1) - 1).abs()
        spread.append(error.square().mean().sqrt().item())
        total, high = s.sum().item(), math.log(2 / 0.05)
        bound = math.sqrt(2 * total * high / m) + 2 * total * high / (3 * m)
        assert error.quantile(0.95, dim=0).max() < bound
    assert np.polyfit(np.log(sizes), np.log(spread), 1)[0] == pytest.approx(-0.5, abs=0.1)


def test_provable_filter_pruning_4_importance_beats_chance_where_few_channels_dominate():
    a, w = positive_layer(20, 20, 6)
    a[:, :3] *= 20
    s = judged.sensitivities(a, w)
    parts = torch.einsum("sck,ock->soc", a, w).flatten(0, 1)
    errors = [((sampled(p, 8.0, 1000) @ parts.T - parts.sum(1)) ** 2).mean() for p in (s, torch.ones_like(s))]
    assert errors[0] < 0.5 * errors[1]


def test_provable_filter_pruning_5_a_dead_channel_is_never_drawn():
    a, w = positive_layer()
    a[:, 4] = 0
    s = judged.sensitivities(a, w)
    assert s[4] == 0 and judged.arrivals(s, 0)[4] == math.inf
    for variant in ("rand", "deterministic"):
        score = judged.provable_filter_pruning(a, w, variant=variant)
        assert score[4] == 0 and (score[torch.arange(20) != 4] > 0).all()
    assert not sampled(s, 500.0, 5)[:, 4].any()


def test_provable_filter_pruning_6_one_threshold_is_one_eps_for_all_layers():
    """By the bound m_l = c sum s_l / eps^2 in every layer: one eps for which they add up to the budget, found by bisection."""
    layers = [positive_layer(10, 30, 4, seed=0), positive_layer(10, 24, 4, seed=5), positive_layer(10, 40, 4, seed=9)]
    layers[1][0][:, 3:] *= 0.01  # three channels do nearly all
    sums = [judged.sensitivities(*layer).sum().item() for layer in layers]
    scores = [judged.provable_filter_pruning(*layer, variant="deterministic") for layer in layers]
    for budget in (20, 40, 60):
        line = torch.cat(scores).sort(descending=True).values[budget - 1]
        ours = [int((score >= line).sum()) for score in scores]
        low, high = 1e-6, 1e3
        for _ in range(200):
            eps = math.sqrt(low * high)
            by_bound = [min(len(score), math.floor(total / eps**2 + 1e-9)) for score, total in zip(scores, sums, strict=True)]
            low, high = (low, eps) if sum(by_bound) < budget else (eps, high)
        eps = low
        by_bound = [min(len(score), math.floor(total / eps**2 + 1e-9)) for score, total in zip(scores, sums, strict=True)]
        assert ours == by_bound and sum(ours) == budget
        assert sums.index(min(sums)) == ours.index(min(ours)) == 1  # that of least sum s keeps the fewest


def test_provable_filter_pruning_6_at_one_eps_each_layer_keeps_what_its_own_number_of_draws_shows():
    """m = sum s / eps^2 draws with returning show j with probability 1 - (1 - p_j)^m, in the Poisson process 1 - exp(-m p_j); 400 seeds."""
    for total, (a, w) in ((9.0, positive_layer(10, 30, 4)), (30.0, positive_layer(10, 12, 4, seed=5))):
        a[:, :3] *= 10
        s = judged.sensitivities(a, w)
        kept = torch.stack([judged.provable_filter_pruning(a, w, seed=i) >= s.sum() / total for i in range(400)]).double()
        chance = 1 - torch.exp(-total * s / s.sum())
        assert ((kept.mean(0) - chance).abs() <= 4.5 * (chance * (1 - chance) / 400).sqrt() + 1e-9).all()


def test_provable_filter_pruning_leaves_a_whole_network_alone_and_weighs_what_it_draws(digits):
    model = load_net("cnn", "digits")
    images = digits.validation[0][:50]
    whole = compress(model, "provable_filter_pruning", data=digits, keep=1.0).eval()
    assert torch.equal(predict(whole, images), predict(model, images))
    for variant in ("rand", "deterministic"):
        made = plan(model, "provable_filter_pruning", data=digits, keep=0.6, variant=variant)
        scaled = made["conv2"].dense() / model.conv2.weight.detach()
        rows = made["conv1"].rows
        factors = scaled[made["conv2"].rows][:, rows]
        assert torch.allclose(factors, factors[:1, :, :1, :1].expand_as(factors), rtol=1e-4)
        assert torch.allclose(factors, torch.ones_like(factors)) == (variant == "deterministic")
