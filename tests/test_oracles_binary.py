"""What proves the methods of ``methods/binary.py`` right: brute force, closed forms and bounds, a test a claim.

A claim that does not hold stands here with its counter-example.
"""

import itertools
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import nn

from cmlib.core.apply import attach, plan_of
from cmlib.core.codes import sign_term
from cmlib.core.method import call
from cmlib.core.rounding import Steps
from cmlib.core.wrapped import Sited
from cmlib.lab.train import fit
from cmlib.lab.verbs import compress
from cmlib.methods import binary as methods
from cmlib.methods import catalog

F64 = torch.float64

MUTATIONS = [
    ("loss_aware_binarization", "cmlib/methods/binary.py", "(d * rows.abs()).sum(1, keepdim=True) / d.sum(1, keepdim=True)",
     "(d * rows.abs()).mean(1, keepdim=True)", "the weights d are not divided by their sum"),
    ("network_sketching", "cmlib/methods/binary.py", "size, sign = sign_term(left)", "size, sign = sign_term(rows)",
     "every sign is that of the weight, none of what is left"),
    ("bwnh", "cmlib/methods/binary.py", "target, mean, b = rows @ gram, rows", "target, mean, b = rows, rows", "q = w, without what the layer reads"),
    ("horq", "cmlib/core/sites.py", "left - size * sign * real", "left - sign * real", "the whole sign is taken away, without its scale"),
    ("abc_net", "cmlib/methods/binary.py", "rows.mean(1, keepdim=True) - u *", "-u *", "thresholds about 0, not about the mean"),
]  # fmt: skip


def codes(key, w, state=None, **knobs):
    return call(
        catalog()[key].fn, {"w": w, "training": False, "hess_diag": None, "acts_gram": None, **knobs.pop("given", {})}, {**knobs, "state": state}
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def all_signs(n):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=n)), dtype=F64)


def attached(layer, key, **knobs):
    """A copy of a layer in training with the method's weight and inputs."""
    method, layer = catalog()[key], deepcopy(layer).double().train()
    knobs = method.bind(knobs)
    packed = call(method.fn, {"w": layer.weight.detach()}, {**knobs, "state": None})
    attach(layer, Sited(packed, call(method.acts, {}, knobs)), method, knobs)
    return layer


# Loss-aware binarization


def test_lab_is_the_best_of_all_signs_under_the_curvature():
    w, d, b = normal(200, 8), normal(200, 8, seed=1).exp(), all_signs(8)
    alpha = (d[:, None] * b * w[:, None]).sum(2) / d.sum(1, keepdim=True)
    best = (d[:, None] * (alpha[:, :, None] * b - w[:, None]).square()).sum(2).min(1).values
    found = codes("loss_aware_binarization", w, given={"hess_diag": d}, per="filter").dense()
    assert torch.allclose((d * (found - w).square()).sum(1), best, rtol=1e-5)  # the curvature is raised by a millionth of its mean


def test_lab_without_curvature_is_the_mean_magnitude():
    w = normal(6, 10)
    for given in ({"hess_diag": torch.full_like(w, 3.0)}, {"hess_diag": torch.zeros_like(w)}):
        assert torch.allclose(codes("loss_aware_binarization", w, given=given, per="filter").dense(), catalog()["xnor_net"](w).dense(), rtol=1e-12)
    ones = codes("loss_aware_binarization", w, curvature="ones", given={"hess_diag": normal(6, 10, seed=2).abs()})
    assert torch.allclose(ones.dense(), w.abs().mean() * catalog()["binaryconnect"](w).dense(), rtol=1e-12)


def test_lab_does_not_ask_how_large_the_curvature_is():
    w, d = normal(6, 10), normal(6, 10, seed=1).square()
    one, many = (codes("loss_aware_binarization", w, given={"hess_diag": c * d}).dense() for c in (1.0, 1e6))
    assert torch.allclose(one, many, rtol=1e-12) and not torch.allclose(one.abs(), w.abs().mean().expand_as(w), rtol=1e-2)


def test_lab_loses_less_than_the_mean_on_a_quadratic():
    w = normal(300, 20)
    d = (3 * normal(300, 20, seed=1)).exp()
    lab = codes("loss_aware_binarization", w, given={"hess_diag": d}, per="filter").dense()
    plain = catalog()["xnor_net"](w).dense()
    loss = [(d * (v - w).square()).sum(1) for v in (lab, plain)]
    assert (loss[0] <= loss[1] * (1 + 1e-5)).all() and loss[0].mean() < 0.97 * loss[1].mean()


def test_lab_keeps_its_curvature_in_training(digits64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    copy = compress(model, "loss_aware_binarization", data=digits64)
    between = copy[1].parametrizations.weight
    d = between[0].d.clone()
    fit(copy, digits64, epochs=1)
    w = between.original.detach()
    alpha = (d * w.abs()).sum() / d.sum()
    assert torch.equal(between[0].d, d) and d.std() > 0
    assert torch.allclose(plan_of(copy)["1"].dense(), alpha * torch.where(w >= 0, 1.0, -1.0).to(w), rtol=1e-12)


# Network sketching


def bases(packed):
    """The signs (groups, m, n) and numbers (groups, m) of codes in a basis."""
    return (2 * (packed.index[:, None] >> torch.arange(packed.params.shape[1])[:, None] & 1) - 1).to(packed.params), packed.params


def error(packed, w):
    return (packed.dense() - w).flatten(1).square().sum(1)


@pytest.mark.parametrize("refined", ["on", "off"])
def test_a_sketch_of_one_sign_is_the_binary_weight_network(refined):
    w = normal(8, 3, 3, 3)
    packed = codes("network_sketching", w, m_bases=1, refined=refined)
    assert torch.allclose(packed.dense(), catalog()["xnor_net"](w).dense(), rtol=1e-12)
    assert torch.allclose(error(packed, w), w.flatten(1).square().sum(1) - w.flatten(1).abs().sum(1).square() / 27, rtol=1e-12)


@pytest.mark.parametrize("t", [2, 9, 50])
def test_each_sign_lowers_the_error_by_one_part_in_t_or_more(t):
    w = normal(500, t).sign() * normal(500, t, seed=1).square()
    for m in range(1, 9):
        assert (error(codes("network_sketching", w, m_bases=m, refined="off"), w) <= w.square().sum(1) * (1 - 1 / t) ** m * (1 + 1e-9) + 1e-20).all()


def test_refined_is_better_on_the_same_signs_and_on_average_but_not_always():
    w = normal(1000, 6)
    direct, refined = (codes("network_sketching", w, m_bases=3, refined=r) for r in ("off", "on"))
    b, _ = bases(direct)
    again = methods.least_squares(b, w)
    assert (((again[:, None] @ b)[:, 0] - w).square().sum(1) <= error(direct, w) + 1e-12).all()
    assert error(refined, w).mean() < 0.8 * error(direct, w).mean()
    assert (error(refined, w) > error(direct, w) * 1.01).any()  # other signs follow, and may be worse: "refined always wins" is not so


def test_what_a_refined_sketch_leaves_is_orthogonal_to_its_signs():
    w = normal(300, 20)
    packed = codes("network_sketching", w, m_bases=4)
    b, _ = bases(packed)
    assert ((b @ (w - packed.dense())[:, :, None]).abs() < 1e-10).all()


def test_products_with_signs_add_up_and_share_additions():
    w, x = normal(5, 2, 3, 3), normal(3, 2, 8, 8, seed=1)
    packed = codes("network_sketching", w, m_bases=2)
    b, a = bases(packed)
    whole = F.conv2d(x, packed.dense())
    parts = sum(a[:, j, None, None] * F.conv2d(x, b[:, j].reshape(w.shape)) for j in range(2))
    assert torch.allclose(whole, parts, atol=1e-8)
    rows, t = torch.cat([b.flatten(0, 1), -b[:2].flatten(0, 1)]), 18
    made, additions = methods.shared_additions(rows)
    columns = F.unfold(x, 3)
    total, found = t - 1, {0: rows[0] @ columns}
    for row, start in made[1:]:
        same = 1 if (rows[row] == rows[start]).sum() * 2 >= t else -1
        moves = rows[row] != same * rows[start]
        found[row] = same * found[start] + 2 * rows[row, moves] @ columns[:, moves]
        total += int(moves.sum())
    assert all(torch.allclose(found[i], rows[i] @ columns, atol=1e-10) for i in range(len(rows)))
    differ = (rows[:, None] != rows[None]).sum(2).numpy()
    shortest = minimum_spanning_tree(1 + np.minimum(differ, t - differ)).sum() - (len(rows) - 1)  # 1 more each: an edge of 0 counts as none
    assert total == additions == t - 1 + shortest < len(rows) * (t - 1)


# Binary weights via hashing


def correlated(seed, n=6, k=8):
    mix = normal(n, k, k, seed=seed)
    return mix @ mix.transpose(1, 2) / k


def objective(w, b, alpha, gram):
    off = w - alpha * b
    return (off @ gram * off).sum(2)


def test_bwnh_never_raises_its_objective_at_any_half_step():
    w, gram = normal(6, 40, 20), correlated(1, k=20)
    b, alpha = methods.hashed(w, gram, 0)
    fell = 0
    for n in range(1, 6):
        was, (new, scale) = objective(w, b, alpha, gram), methods.hashed(w, gram, n)
        middle, now = objective(w, new, alpha, gram), objective(w, new, scale, gram)
        assert (middle <= was + 1e-10).all() and (now <= middle + 1e-10).all()
        fell, b, alpha = fell + (middle < was - 1e-6).any() + (now < middle - 1e-6).any(), new, scale
    assert fell > 2


def test_bwnh_against_all_signs_it_is_a_local_best_and_no_more():
    w, gram = normal(6, 40, 8), correlated(2)
    b, alpha = methods.hashed(w, gram, 50)
    found, every = objective(w, b, alpha, gram), all_signs(8)
    target, size = w @ gram, torch.einsum("sj,gjk,sk->gs", every, gram, every)
    best = torch.einsum("goj,gjk,gok->go", w, gram, w) - ((target @ every.T).square() / size[:, None]).max(2).values
    assert (found >= best - 1e-10).all() and (found > 1.2 * best).any()
    for j in range(8):
        flipped = b.clone()
        flipped[:, :, j] *= -1
        assert (objective(w, flipped, alpha, gram) >= found - 1e-10).all()


def test_bwnh_with_white_inputs_is_the_binary_weight_network():
    w = normal(10, 12)
    for given in ({"acts_gram": 3 * torch.eye(12, dtype=F64)[None]}, {"acts_gram": None}):
        assert torch.allclose(codes("bwnh", w, n_alternations=10, given=given).dense(), catalog()["xnor_net"](w).dense(), rtol=1e-12)


def test_bwnh_keeps_products_better_than_signs_do():
    w, gram = normal(6, 100, 12), correlated(3, k=12)
    found = objective(w, *methods.hashed(w, gram, 10), gram)
    sign, mean = w.sign(), w.abs().mean(2, keepdim=True)
    scaled = objective(w, sign, (w @ gram * sign).sum(2, keepdim=True) / (sign @ gram * sign).sum(2, keepdim=True), gram)
    assert (found <= scaled + 1e-10).all() and (scaled <= objective(w, sign, mean, gram) + 1e-10).all()
    assert found.mean() < 0.85 * objective(w, sign, mean, gram).mean()


def test_bwnh_reads_what_its_layer_reads_group_by_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)).double().eval()
    x, y = normal(50, 1, 6, 6), torch.randint(0, 3, (50,))
    first = compress(model, "bwnh", where="0", data=(x, y))
    second = compress(first, "bwnh", where="2", data=(x, y))
    with torch.no_grad():
        read = first[1](first[0](x))  # of the layer that is binary already
    patches = F.unfold(read, 3).unflatten(1, (2, 18)).permute(1, 0, 3, 2).flatten(1, 2)
    gram = patches.transpose(1, 2) @ patches
    b, alpha = methods.hashed(model[2].weight.detach().reshape(2, 3, 18), gram, 10)
    assert torch.allclose(second[2].weight, (alpha * b).reshape(6, 2, 3, 3), rtol=1e-8)


def test_bwnh_trains_scales_and_keeps_signs(digits64):
    torch.manual_seed(0)
    copy = compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), "bwnh", data=digits64)
    before = plan_of(copy)["1"].dense()
    fit(copy, digits64, epochs=1)
    after = plan_of(copy)["1"].dense()
    assert torch.equal(before.sign(), after.sign()) and not torch.allclose(before, after) and (after.abs() == after.abs()[:, :1]).all()


# HORQ


@pytest.mark.parametrize("layer, shape", [(nn.Linear(12, 5), (7, 12)), (nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (3, 4, 7, 7)),
                                          (nn.Conv2d(2, 3, 3, bias=False), (3, 2, 7, 7))])  # fmt: skip
def test_horq_of_order_one_is_xnor_net(layer, shape):
    x, found = normal(*shape), []
    if getattr(layer, "groups", 1) > 1:  # the K map of XNOR-Net is of all channels
        x = x[:, :2].repeat(1, 2, 1, 1)
    for key, knobs in (("horq", {"order_K": 1}), ("xnor_net", {})):
        one, given = attached(layer, key, **knobs), x.clone().requires_grad_(True)
        out = one(given)
        weight = one.parametrizations.weight.original
        found.append([out, *torch.autograd.grad(out.square().sum(), [given, weight])])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_each_sign_takes_n_beta_squared_of_the_energy():
    left = normal(50, 30)
    for _ in range(6):
        size, sign = sign_term(left)
        rest = left - size * sign
        assert torch.allclose(rest.square().sum(1), left.square().sum(1) - 30 * size[:, 0].square(), rtol=1e-10)
        assert (rest.square().sum(1) < left.square().sum(1)).all()
        left = rest


def product(x, w, order):
    """The dense product with real weights and inputs of so many signs."""
    layer = nn.Linear(*w.shape[::-1], bias=False).double()
    layer.weight.data = w
    return attached(layer, "horq", order_K=order, weight_binarize="off")(x)


def test_two_signs_give_four_symmetric_levels_exactly():
    x = torch.tensor([[3.0, 1.0, -1.0, -3.0] * 3], dtype=F64) / 2  # +-(1 + 1/2), +-(1 - 1/2)
    w = normal(5, 12)
    assert torch.allclose(product(x, w, 2), x @ w.T, atol=1e-12) and not torch.allclose(product(x, w, 1), x @ w.T, atol=0.1)


def test_horq_errs_less_with_every_order_and_one_sign_leaves_what_theory_says():
    x, w = normal(100, 400), normal(30, 400, seed=1)
    error = [((product(x, w, k) - x @ w.T).square().sum() / (x @ w.T).square().sum()).item() for k in range(1, 5)]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(error)) and error[0] == pytest.approx(1 - 2 / math.pi, abs=0.02)


def test_horq_is_the_direct_sketch_of_the_input():
    x = normal(20, 30)
    for k in (1, 2, 3, 4):
        assert torch.allclose(product(x, torch.eye(30, dtype=F64), k), codes("network_sketching", x, m_bases=k, refined="off").dense(), atol=1e-12)


def test_horq_convolutions_take_each_patch_apart():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 2).double()
    x = normal(1, 2, 4, 4)
    found = attached(layer, "horq", order_K=2)(x)
    w = catalog()["xnor_net"](layer.weight.detach()).dense().flatten(1)
    for i, j in itertools.product(range(3), range(3)):
        patch = x[:, :, i : i + 2, j : j + 2].reshape(1, -1)
        seen = codes("network_sketching", patch, m_bases=2, refined="off").dense()[0]
        assert torch.allclose(found[0, :, i, j], w @ seen + layer.bias, atol=1e-12)


def test_the_order_of_an_input_is_stored_and_counts():
    given = call(catalog()["horq"].acts, {}, {"order_K": 3})
    back = Steps.decode(given.arrays(), given.meta())
    assert back.order == 3 and back.count == 8
    with pytest.raises(ValueError, match="at most 4 signs"):
        Steps.decode(given.arrays(), {**given.meta(), "order": 10**6})


# ABC-Net


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_abc_net_numbers_are_numpys_least_squares(m):
    w = normal(4, 2, 3, 3) + 0.3
    packed = codes("abc_net", w, M_weight_bases=m, per="filter")
    for row, dense in zip(w.flatten(1).numpy(), packed.dense().flatten(1).numpy(), strict=True):
        u = [0.0] if m == 1 else [-1 + 2 * i / (m - 1) for i in range(m)]
        b = np.stack([np.where(row - row.mean() + x * row.std() >= 0, 1.0, -1.0) for x in u], 1)
        alpha = np.linalg.lstsq(b, row, rcond=None)[0]
        assert np.allclose(dense, b @ alpha, atol=1e-10) and np.abs(b.T @ (row - dense)).max() < 1e-10


def test_one_basis_of_weights_about_zero_is_the_binary_weight_network():
    w = normal(5, 20)
    w = w - w.mean(1, keepdim=True)
    assert torch.allclose(codes("abc_net", w, M_weight_bases=1, per="filter").dense(), catalog()["xnor_net"](w).dense(), rtol=1e-12)


def test_abc_net_errs_less_with_more_bases_on_average():
    def errors(w):
        return [(error(codes("abc_net", w, M_weight_bases=m, per="filter"), w) / w.square().sum(1)).mean().item() for m in (1, 2, 3, 4)]

    for n in (72, 500):
        assert all(b < a for a, b in itertools.pairwise(errors(normal(1000, n))))
    density, beyond = math.exp(-0.5) / math.sqrt(2 * math.pi), math.erfc(0.5**0.5)  # of a normal variable at 1; the chance of |x| > 1
    assert errors(normal(20, 20_000))[:2] == pytest.approx([1 - 2 / math.pi, 1 - 4 * density**2 / beyond], abs=0.005)


def test_abc_net_layers_are_sums_of_products_of_signs():
    w, x = normal(4, 2, 3, 3), normal(5, 2, 8, 8, seed=1)
    packed = codes("abc_net", w, M_weight_bases=3)
    b, alpha = bases(packed)
    given = call(catalog()["abc_net"].acts, {"x": x}, {"N_activation_bases": 2, "state": None})
    at, beta = given.state["found"]
    h = torch.where(x[None] >= at[:, None, None, None, None], 1.0, -1.0).double()
    total = sum(alpha[0, i] * beta[j] * F.conv2d(h[j], b[0, i].reshape(w.shape)) for i in range(3) for j in range(2))
    assert torch.allclose(F.conv2d(given(x), packed.dense()), total, atol=1e-10)
    assert torch.allclose(at, x.mean() + torch.tensor([1.0, -1.0], dtype=F64) * x.std(correction=0))
    by_numpy = np.linalg.lstsq(h.flatten(1).T.numpy(), x.flatten().numpy(), rcond=None)[0]
    assert np.allclose(beta.numpy(), by_numpy)


def test_abc_net_gradients_are_those_of_its_signs():
    w = normal(4, 6).requires_grad_(True)
    packed = codes("abc_net", w, M_weight_bases=3, per="filter")
    g = normal(4, 6, seed=1)
    (found,) = torch.autograd.grad((packed.through(packed.values) * g).sum(), w)
    assert torch.allclose(found, packed.params.sum(1, keepdim=True) * g)
    x = torch.linspace(-2, 2, 41, dtype=F64).requires_grad_(True)
    given = call(catalog()["abc_net"].acts, {"x": x.detach()}, {"N_activation_bases": 3, "state": None})
    (found,) = torch.autograd.grad(given(x).sum(), x)
    at, beta = given.state["found"]
    near = (x.detach()[:, None] - at).abs() <= x.detach().std() / 2
    assert torch.allclose(found, near.double() @ beta) and found.unique().numel() > 2


def test_abc_net_inputs_are_followed():
    acts, old, new = catalog()["abc_net"].acts, normal(40, 5), 3 * normal(40, 5, seed=1)
    knobs = {"N_activation_bases": 2, "moving_average": 0.75}
    before, alone = (call(acts, {"x": x}, {**knobs, "state": None}).state["found"] for x in (old, new))
    after = call(acts, {"x": new}, {**knobs, "state": {"found": before}}).state["found"]
    assert torch.allclose(after, 0.75 * before + 0.25 * alone)
