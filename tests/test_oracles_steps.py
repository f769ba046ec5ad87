"""What proves the methods of ``methods/steps.py`` right: closed forms, brute force, scipy and scikit-learn, and the methods that they become.

A claim that does not hold stands here with its counter-example.
"""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import lsq_linear
from sklearn.linear_model import Lasso
from torch import nn

from cmlib.core.apply import attached, latent, plan_of, with_latent_weights
from cmlib.core.method import call
from cmlib.core.schedule import Step, one_shot, shared_out
from cmlib.core.sites import site_of
from cmlib.core.splitting import pull, split
from cmlib.lab.guided import Guided, features_apart, guided_loss, with_features
from cmlib.lab.stages import follow, in_stages, turn
from cmlib.lab.train import fit
from cmlib.lab.verbs import compress, plan
from cmlib.lab.zoo import build
from cmlib.methods import catalog
from cmlib.methods import steps as methods
from cmlib.methods.discrete import CODE_SETS, nearest_scaled
from cmlib.methods.grids import half_levels
from cmlib.methods.structures import nearest

F64 = torch.float64

MUTATIONS = [
    ("admm_solver", "cmlib/core/splitting.py", "return z, u + x - z", "return z, u - x + z", "the dual runs away from what it should mend"),
    ("admm_solver", "cmlib/methods/steps.py", "prox_f(z - u, rho)", "prox_f(z + u, rho)", "the sign of the dual in the step of x"),
    ("two_step_quantization", "cmlib/methods/steps.py", "lam * (z - v[..., None]).square()", "(z - v[..., None]).square()", "lambda is left out"),
    ("two_step_quantization", "cmlib/methods/steps.py", "target = (z * std + mean) @ x", "target = z @ x", "the units of each filter are forgotten"),
    ("two_step_quantization", "cmlib/methods/binary.py",
     "(to + now) - 2 * wanted[..., None]", "(to + now) - wanted[..., None]", "half of the slope is missing"),
    ("elq", "cmlib/methods/steps.py", "a1 * g.abs() * off.sign()", "a1 * g * off.sign()", "the pull has the gradient's sign too"),
    ("elq", "cmlib/methods/steps.py", "2 * a2 * off", "a2 * off", "half of the quadratic's slope"),
    ("mlq", "cmlib/methods/steps.py", "depth * n - turn", "depth * n - i", "the order of layers is not heard"),
    ("mlq", "cmlib/methods/steps.py", "min(1.0, max(0.0, depth * n - turn))", "depth", "all layers at once"),
    ("effective_low_bitwidth_training", "cmlib/lab/guided.py", "log_target=True)", "log_target=True).detach()", "the answers guide nobody"),
    ("effective_low_bitwidth_training", "cmlib/methods/steps.py", "(bits, AS_THEY_ARE) for bits in every] + [(last, bits)",
     "(last, bits) for bits in every] + [(bits, AS_THEY_ARE)", "inputs before weights"),
]  # fmt: skip


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def codes(key, w, training=False, state=None, evidence=None, **knobs):
    return call(catalog()[key].fn, {"w": w, "training": training, **(evidence or {})}, {**knobs, "state": state})


# ADMM


def regression(seed=0, n=40, p=10):
    """X, y and the proximal step of |X w - y|^2 / (2 n)."""
    x = normal(n, p, seed=seed) @ (torch.eye(p, dtype=F64) + 0.3 * normal(p, p, seed=100 + seed))
    y = x @ normal(p, seed=200 + seed) + 0.1 * normal(n, seed=300 + seed)
    gram, target = x.T @ x / n, x.T @ y / n
    return x, y, lambda v, rho: torch.linalg.solve(gram + rho * torch.eye(p, dtype=F64), target + rho * v)


def solved(*parts, **knobs):
    return catalog()["admm_solver"](*parts, torch.zeros(10, dtype=F64), **{"iterations": 100_000, "tolerance": 1e-11, **knobs})


def shrunk(v, rho, lam):
    return v.sign() * (v.abs() - lam / rho).clamp(min=0)


@pytest.mark.parametrize("rho, relaxation", [(0.1, 1.0), (1.0, 1.0), (3.0, 1.0), (1.0, 1.7)])
def test_admm_finds_the_lasso_for_every_rho(rho, relaxation):
    x, y, prox = regression()
    lam = 0.2
    found = solved(prox, partial(shrunk, lam=lam), rho=rho, relaxation=relaxation)
    theirs = Lasso(alpha=lam, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x.numpy(), y.numpy()).coef_
    assert np.abs(found.z.numpy() - theirs).max() < 1e-8 and 0 < (found.z == 0).sum() < 10
    g = x.T @ (x @ found.z - y) / len(x)  # the conditions of Karush, Kuhn and Tucker
    on = found.z != 0
    assert torch.allclose(g[on], -lam * found.z[on].sign(), atol=1e-8) and (g[~on].abs() <= lam + 1e-9).all()
    assert found.primal[-1] <= 1e-11 and found.dual[-1] <= 1e-11 and found.primal[0] > 1e-3


def test_admm_within_a_box_is_scipys():
    x, y, prox = regression(1)
    found = solved(prox, lambda v, rho: v.clamp(-0.3, 0.5))
    theirs = lsq_linear(x.numpy(), y.numpy(), (-0.3, 0.5), tol=1e-14).x
    assert np.abs(found.z.numpy() - theirs).max() < 1e-6 and (found.z.abs() < 0.3).any() and (found.z == 0.5).any()


def test_admm_with_one_wish_alone():
    x, y, prox = regression(2)
    assert torch.allclose(solved(prox, lambda v, rho: v).x, torch.linalg.lstsq(x, y[:, None]).solution[:, 0], atol=1e-8)
    start = normal(10)
    found = catalog()["admm_solver"](lambda v, rho: v, lambda v, rho: v.clamp(-0.5, 0.5), start, iterations=5)
    assert torch.equal(found.z, start.clamp(-0.5, 0.5))


def test_admm_within_a_millionth_in_a_hundred_iterations_does_not_hold():
    _, _, prox = regression()
    exact = solved(prox, partial(shrunk, lam=0.2)).z
    far = {rho: (solved(prox, partial(shrunk, lam=0.2), rho=rho, iterations=100).z - exact).abs().max().item() for rho in (0.01, 1.0, 100.0)}
    assert min(far.values()) > 1e-3


def test_one_admm_serves_pruning_and_bits():
    """With exact steps of x, both methods walk with the solver, number by number."""
    _, _, prox = regression(3)
    levels = torch.tensor(CODE_SETS["{0,+-1}"], dtype=F64)
    for key, prox_g, kept, knobs in (
        ("admm_weight_pruning", lambda v, rho: nearest(v, 0.4), "z", {"keep": 0.4, "rho": 0.5, "growth": 1.0, "every": 1}),
        ("admm_low_bit", lambda v, rho: nearest_scaled(v, levels), "g", {"steps_per_iteration": 1}),
    ):
        start = prox_g(normal(10), 0.5)
        state = codes(key, normal(10), **knobs).state
        assert torch.equal(state[kept], start)
        for n in range(1, 20):
            w = prox(state[kept] - state["u"], 0.5)
            state = codes(key, w, training=True, state=state, **knobs).state
            theirs = catalog()["admm_solver"](prox, prox_g, start, rho=0.5, iterations=n)
            assert torch.equal(w, theirs.x) and torch.equal(state[kept], theirs.z) and torch.equal(state["u"], theirs.u)
        given = w.clone().requires_grad_(True)
        out = call(catalog()[key].training.penalty, {"packed": codes(key, given, training=True, state=state, **knobs)}, {"rho": 0.5})
        now = codes(key, w, training=True, state=state, **knobs).state
        assert torch.allclose(torch.autograd.grad(out, given)[0], 0.5 * (w - now[kept] + now["u"])) and torch.equal(
            out.detach(), pull(w, now[kept], now["u"], 0.5)
        )


def test_the_split_by_hand():
    x, z, u = normal(6), normal(6, seed=1), normal(6, seed=2)
    new, dual = split(x, z, u, lambda v: v.clamp(-1, 1), 1.5)
    mixed = 1.5 * x - 0.5 * z
    assert torch.allclose(new, (mixed + u).clamp(-1, 1)) and torch.allclose(dual, u + mixed - new)


@pytest.mark.parametrize("key", ["admm_solver", "effective_low_bitwidth_training"])
def test_what_has_no_plan_says_what_to_do_instead(key, digits):
    net = build("mlp", "digits")
    for verb in (plan, compress):
        with pytest.raises(ValueError, match=f"{key} is a .*: (call it|follow)"):
            verb(net, key, data=digits)


# Two-step quantization


GRID = half_levels(torch.ones((), dtype=F64), 2, methods.above(0.75))


def q(z):
    return GRID[1][torch.bucketize(z, GRID[0], right=True)]


@pytest.mark.parametrize("lam", [0.1, 1.0, 30.0])
def test_two_step_preimages_are_the_best_of_a_fine_scan(lam):
    v, scan = 2 * normal(60), torch.linspace(-8, 8, 160_001, dtype=F64)
    y = GRID[1][torch.randint(0, 4, (60,))]
    z = methods.nearest_preimage(y, v, *GRID, lam)
    ours = (y - q(z)).square() + lam * (z - v).square()
    scanned = ((y[:, None] - q(scan)).square() + lam * (scan - v[:, None]).square()).min(1).values
    assert (ours <= scanned + 1e-12).all() and (scanned - ours).max() < lam * 1e-4 * 20 and (z != v).any() and (z == v).any()


def problem(n=400, k=12, filters=5, seed=0, groups=1):
    """Inputs of ReLU kind that hang together, and float weights."""
    x = (normal(n, groups, k, seed=seed) @ (torch.eye(k, dtype=F64) + 0.2 * normal(k, k, seed=seed + 1))).relu()
    return x, normal(groups, filters, k, seed=seed + 2)


def started(w, kind="ternary"):
    first = catalog()["ternary_weight_networks"](w.flatten(0, 1), per="filter", delta_factor=0.7 if kind == "ternary" else 0.0)
    return first.index.reshape(w.shape).double() - 1, first.params.reshape(*w.shape[:2], 1)


def by_hand(x, w, t, alpha):
    """What each filter should give, in codes, and what it gives with alpha t, in the same units."""
    out = torch.einsum("ngk,gok->gon", x, w)
    mean, std = out.mean(2, keepdim=True), out.std(2, correction=0, keepdim=True)
    return q((out - mean) / std), (alpha * torch.einsum("ngk,gok->gon", x, t) - mean) / std


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("groups", [1, 3])
def test_two_step_objective_never_rises_over_any_of_its_steps(kind, groups):
    levels = torch.tensor(methods.WEIGHTS[kind], dtype=F64)
    for seed in range(5):
        x, w = problem(seed=10 * seed, groups=groups)
        found = methods.transformed(x, w, *started(w, kind), GRID, levels, 1.0)
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(found.objective)) and found.objective[-1] < 0.99 * found.objective[0]
        assert torch.isin(found.t, levels).all()
        y, v = by_hand(x, w, *found[:2])
        z = methods.nearest_preimage(y, v, *GRID, 1.0)
        assert ((y - q(z)).square() + (z - v).square()).sum() <= found.objective[-1] * (1 + 1e-12)


def test_two_step_scales_are_least_squares_of_each_row_and_entries_brute_force():
    x, w = problem(k=6)
    t, alpha = started(w)
    target, gram = torch.einsum("ngk,gon->gok", x, normal(1, 5, 400, seed=9)), torch.einsum("ngk,ngl->gkl", x, x)
    z = normal(1, 5, 400, seed=9)
    ours = methods.best_scale(target, gram, t, alpha)
    for o in range(5):
        lstsq = torch.linalg.lstsq((x[:, 0] @ t[0, o])[:, None], z[0, o][:, None]).solution
        assert torch.allclose(ours[0, o], lstsq[0])
    levels = torch.tensor([-1.0, 0, 1], dtype=F64)
    swept = methods.swept(target, gram, t, ours, levels)
    slow = t.clone()
    for o, j in itertools.product(range(5), range(6)):
        tried = slow[0, o].repeat(3, 1)
        tried[:, j] = levels
        slow[0, o, j] = levels[(z[0, o] - ours[0, o] * (tried @ x[:, 0].T)).square().sum(1).argmin()]
    assert torch.equal(swept, slow) and not torch.equal(swept, t)


def white(n, k):
    """Inputs of mean zero with X^T X = 2 n I."""
    x = torch.linalg.qr(normal(n, k))[0][:, None] * n**0.5
    return torch.cat([x, -x])


def test_two_step_of_identity_and_white_inputs_is_nearly_the_nearest_ternary_weight_for_a_small_lambda():
    levels, w, x = torch.tensor([-1.0, 0, 1], dtype=F64), normal(1, 200, 8, seed=4), white(64, 8)
    best = (w[0] - catalog()["ternary_weight_networks"](w[0], per="filter", exact_delta="on").dense()).square().sum()
    t, alpha, _ = methods.transformed(x, w, *started(w), None, levels, 1e-3, passes=200)
    assert 1 - 1e-12 <= (w - alpha * t).square().sum() / best < 1.02 and (t != (w / alpha).round().clamp(-1, 1)).double().mean() < 0.001


def test_two_step_of_identity_being_the_nearest_ternary_weight_does_not_hold_for_a_lambda_of_one():
    """Z stands between: it leaves each entry only 1 / (1 + lambda) of what it would gain by another level, and some stay where they began."""
    levels, w, x = torch.tensor([-1.0, 0, 1], dtype=F64), normal(1, 200, 8, seed=4), white(64, 8)
    t, alpha, _ = methods.transformed(x, w, *started(w), None, levels, 1.0, passes=200)
    assert (t != (w / alpha).round().clamp(-1, 1)).double().mean() > 0.01


def test_two_step_planted_ternary_weights_are_recovered():
    """Their levels exactly; alpha only as far as the codes bind it, which do not change while nothing crosses a threshold."""
    x, _ = problem(n=2000, k=10)
    levels = torch.tensor([-1.0, 0, 1], dtype=F64)
    for seed in range(5):
        t = levels[torch.randint(0, 3, (1, 4, 10), generator=torch.Generator().manual_seed(seed))]
        w = t * torch.tensor([0.3, 0.7, 1.0, 1.4], dtype=F64)[None, :, None]
        noisy = w + 0.15 * normal(*w.shape, seed=seed) * w.abs().amax(2, keepdim=True)
        found = methods.transformed(x, w, *started(noisy), GRID, levels, 1.0, passes=30)
        assert torch.equal(found.t, t)
        y, v = by_hand(x, w, *found[:2])
        assert torch.allclose(found.alpha, w.abs().amax(2, keepdim=True), rtol=0.1) and (q(v) != y).double().mean() < 0.03


def test_two_step_inputs_at_half_sparsity_are_exactly_hwgqs():
    x = normal(4, 50)
    for bits in (1, 2, 4):
        hwgq = call(catalog()["hwgq"].acts, {"x": x}, {"a_bits": bits})
        ours = call(catalog()["two_step_quantization"].acts, {"x": x}, {"a_bits": bits, "activation_sparsity": 0.5})
        assert torch.equal(ours.levels, hwgq.levels) and torch.equal(ours.thresholds, hwgq.thresholds) and torch.equal(ours(x), hwgq(x))
    assert call(catalog()["two_step_quantization"].acts, {"x": x}, {"a_bits": 32}) is None


def test_two_step_sparse_inputs_keep_their_share_and_have_the_best_step_for_it():
    x = normal(200_000)
    unit = x / x[x > 0].square().mean().sqrt()
    for sparsity in (0.6, 0.75, 0.9):
        steps = call(catalog()["two_step_quantization"].acts, {"x": unit}, {"activation_sparsity": sparsity})
        assert abs((steps(unit) == 0).double().mean() - sparsity) < 0.005
        on, first = unit[unit >= steps.thresholds[0]], steps.levels[1]

        def error(step, on=on):
            return (on - step * (on / step).round().clamp(1, 3)).square().mean()

        best = min(torch.linspace(0.3, 1.5, 601), key=error)
        assert abs(first - best) < 0.02 and torch.allclose(steps.levels, first * torch.arange(4, dtype=F64))


def test_two_step_on_a_network_gives_the_codes_better_than_rounding_weights_does(digits64):
    wrong = []
    for seed in range(3):
        model, pair = small(digits64, seed)
        first = compress(model, "two_step_quantization", w_levels="float", data=pair)
        fit(first, pair, epochs=3, lr=0.01, keep_best=False)
        nets = [first, *(compress(first, key, where="3", data=pair, **k) for key, k in
                         (("two_step_quantization", {}), ("ternary_weight_networks", {"per": "filter"})))]  # fmt: skip
        with torch.no_grad():
            out = [net.eval()(digits64[0][300:900]) for net in nets]
        y = [q((o - out[0].mean(0)) / out[0].std(0)) for o in out]
        wrong.append([(y[0] - other).square().mean().item() for other in y[1:]])
        assert site_of(nets[1][3]) is not None and all(row.unique().numel() <= 3 for row in plan_of(nets[1])["3"].dense())
    ours, theirs = np.mean(wrong, 0)
    assert ours < 0.9 * theirs


def test_two_step_training_moves_alpha_alone(digits64):
    torch.manual_seed(0)
    net = compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), "two_step_quantization", data=digits64)
    (between,) = net[1].parametrizations.weight
    was = between.alpha.detach().clone(), between.index.clone()
    fit(net, digits64, epochs=1)
    assert not torch.equal(between.alpha, was[0]) and torch.equal(between.index, was[1])
    pruned = compress(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), "magnitude_pruning_han", keep=0.3)
    pruned = compress(pruned, "two_step_quantization", data=digits64)
    kept = plan_of(pruned)["1"]
    expected = catalog()["ternary_weight_networks"](latent(pruned[1])[kept.mask])
    assert torch.allclose(kept.dense()[kept.mask], expected.dense(), rtol=1e-12)


@pytest.mark.parametrize("key, out", [("bwnh", 8), ("two_step_quantization", 1)])
def test_what_inputs_show_is_not_taken_for_a_number_a_weight_where_shapes_agree(key, out):
    """Of a pruned layer (8, 8) the inputs' second moment is (1, 8, 8) too; of one output the sampled rows are (samples, 1, 8)."""
    torch.manual_seed(0)
    x, y = torch.rand(40, 8, dtype=F64), torch.rand(40, out, dtype=F64)
    pruned = compress(nn.Sequential(nn.Linear(8, out)).double(), "magnitude_pruning_han", keep=0.5)
    found = plan(pruned, key, data=(x, y), loss=F.mse_loss)["0"]
    assert found.kept == 4 * out and found.dense().abs().unique().numel() == 2


# ELQ


def test_elq_gradient_is_that_of_its_three_terms():
    w, curvature, c = normal(6, 5), normal(30, 30), normal(30)
    hessian = curvature @ curvature.T / 30
    state = codes("elq", w, portion=0.0).state
    alpha, delta = state["alpha"], state["delta"]

    def loss(v):
        return v.flatten() @ hessian @ v.flatten() / 2 + c @ v.flatten()

    g = (hessian @ w.flatten() + c).reshape(w.shape)
    code = alpha * (w.sign() * (w.abs() > delta))

    def objective(v, a1=0.7, a2=0.2):
        return loss(v) + a1 * (g * (v - code)).abs().sum() + a2 * (v - code).square().sum()

    ours = catalog()["elq"].training.gradient(g, w, alpha, delta, a1=0.7, a2=0.2)
    h = 1e-6
    for i, j in itertools.product(range(6), range(5)):
        e = torch.zeros_like(w)
        e[i, j] = h
        assert ours[i, j].item() == pytest.approx(((objective(w + e) - objective(w - e)) / (2 * h)).item(), rel=1e-5, abs=1e-7)
    whole = catalog()["elq"].training.gradient(g, w, alpha, delta, a1=1.0, a2=0.0)
    towards = g * (w - code) > 0
    assert torch.allclose(whole, torch.where(towards, 2 * g, 0.0))  # only towards the code, twice as fast


def test_elq_bounds_the_change_of_a_linear_loss_and_meets_it_where_all_signs_agree():
    w, c = normal(40), normal(40, seed=1)
    code = codes("elq", w).dense()
    change = (c * (w - code)).sum().abs()  # of L = c w, exactly
    bound = (c * (w - code)).abs().sum()
    assert change < bound
    same = c.abs() * (w - code).sign()
    assert torch.allclose((same * (w - code)).sum(), (same * (w - code)).abs().sum())


@pytest.mark.parametrize("code_set, count", [("ternary", 3), ("binary", 2)])
def test_elq_at_once_is_the_ternary_or_binary_weight_network(code_set, count):
    w = normal(20, 15)
    w[0, 0] = 0.0
    found = codes("elq", w, code_set=code_set)
    same = catalog()["ternary_weight_networks"](w) if code_set == "ternary" else catalog()["admm_low_bit"](w, code_set="{+-1}")
    assert torch.allclose(found.dense(), same.dense().detach(), rtol=1e-12) and found.count == count == found.dense().unique().numel()


def test_elq_takes_portions_in_inqs_order():
    w = normal(20, 15)
    for partition in ("pruning_inspired", "random"):
        for portion in (0.25, 0.5, 0.875):
            ours, theirs = (codes(key, w, portion=portion, partition=partition) for key in ("elq", "inq"))
            assert torch.equal(ours.state["frozen"], theirs.state["frozen"]) and ours.state["frozen"].sum() == round(portion * 300)
            free = ~ours.state["frozen"].reshape(w.shape)
            assert torch.equal(ours.dense()[free], w[free])


def small(digits64, seed=0):
    torch.manual_seed(seed)
    x, y = digits64[0][:300], digits64[1][:300]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).double()
    fit(model, (x, y), epochs=10, lr=0.02, seed=seed, keep_best=False)
    return model, (x, y)


SGD = partial(torch.optim.SGD, momentum=0.9)


def test_elq_without_its_terms_is_incremental_quantization_with_these_codes(digits64):
    """By hand: a mask on the gradients, codes where it is closed."""
    model, pair = small(digits64)
    ours = compress(model, "elq", portion=0.5, a1=0.0, a2=0.0)
    frozen = {n: a.frozen.reshape(latent(layer).shape).clone() for n, layer, a in attached(ours)}
    hand = with_latent_weights(model)
    for n, packed in plan_of(ours).items():
        w = hand.get_submodule(n).weight
        w.data = torch.where(frozen[n], packed.dense(), w.data)
        w.register_hook(lambda g, n=n: torch.where(frozen[n], 0.0, g))
    for net in (ours, hand):
        fit(net, pair, epochs=3, lr=0.05, optimizer=SGD, keep_best=False)
    assert all(torch.equal(p.dense(), hand.get_submodule(n).weight) for n, p in plan_of(ours).items())


def test_elq_frozen_weights_stay_bit_by_bit_and_all_end_on_three_levels(digits64):
    model, pair = small(digits64)
    net, seen = compress(model, "elq", portion=0.5), []
    for portion in (0.5, 0.75, 0.875, 1.0):
        fit(turn(net, portion=portion), pair, epochs=2, lr=0.05, optimizer=SGD, weight_decay=0.01, keep_best=False)
        seen.append(
            {n: (p.dense().flatten().clone(), net.get_submodule(n).parametrizations.weight[0].frozen.clone()) for n, p in plan_of(net).items()}
        )
    for was, now in itertools.pairwise(seen):
        for n in was:
            frozen = was[n][1]
            assert torch.equal(was[n][0][frozen], now[n][0][frozen]) and (now[n][1] | ~frozen).all() and not torch.equal(was[n][0], now[n][0])
    assert all(now[n][0].unique().numel() <= 3 for n in now)


def gap(net, pair):
    """|L(W) - L(codes)| before the last snap: what is left float, and what it becomes."""
    with torch.no_grad():
        before = F.cross_entropy(net.eval()(pair[0]), pair[1])
        turn(net, portion=1.0).train()
        after = F.cross_entropy(net(pair[0]), pair[1])
    return (after - before).abs().item()


def test_elq_leaves_a_smaller_gap_at_the_last_snap_than_without_its_loss_term(digits64):
    found = []
    for seed in range(3):
        model, pair = small(digits64, seed)
        row = []
        for a1 in (0.3, 0.0):
            net = compress(model, "elq", portion=0.5, a1=a1, a2=0.0)
            fit(net, pair, epochs=40, lr=0.1, optimizer=SGD, seed=seed, keep_best=False)
            row.append(gap(net, pair))
        found.append(row)
    ours, without = np.mean(found, 0)
    assert ours < 0.9 * without


# MLQ


def taken(net):
    return [between.frozen.double().mean().item() for _, _, between in attached(net)]


def three(digits64, seed=0):
    torch.manual_seed(seed)
    x, y = digits64[0][:300], digits64[1][:300]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)).double()
    fit(model, (x, y), epochs=10, lr=0.02, seed=seed, keep_best=False)
    return model, (x, y)


@pytest.mark.parametrize("order", ["front_to_back", "back_to_front"])
def test_mlq_takes_one_layer_after_the_other_and_they_stay(order, digits64):
    model, pair = three(digits64)
    net = compress(model, "mlq", depth=1 / 3, layer_order=order, data=pair)
    seen = []
    for n, depth in enumerate((1 / 3, 2 / 3, 1.0), 1):
        fit(turn(net, depth=depth), pair, epochs=2, lr=0.01, keep_best=False)
        done = taken(net) if order == "front_to_back" else taken(net)[::-1]
        assert done == [1.0] * n + [0.0] * (3 - n)
        seen.append([p.dense().clone() for p in plan_of(net).values()])
    if order == "back_to_front":
        seen = [s[::-1] for s in seen]
    for n, (was, now) in enumerate(itertools.pairwise(seen), 1):
        assert all(torch.equal(a, b) for a, b in zip(was[:n], now[:n], strict=True)) and not any(
            torch.equal(a, b) for a, b in zip(was[n:], now[n:], strict=True)
        )
    assert all(w.unique().numel() <= 4 for w in seen[-1])


def test_mlq_takes_part_of_a_layers_clusters_where_depth_ends_within_it():
    w = normal(30, 20)
    half = codes("mlq", w, evidence={"place": (1, 2)}, bits=3, depth=0.75)
    theirs = codes("slq", w, bits=3, portion=0.5)
    assert torch.equal(half.dense(), theirs.dense()) and 0 < half.state["frozen"].sum() < 600
    assert torch.equal(codes("mlq", w, evidence={"place": (1, 2)}, bits=3, depth=0.5).dense(), w)


def test_mlq_of_one_layer_is_slq(digits64):
    torch.manual_seed(0)
    one, found = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double(), []
    for key, knob in (("mlq", "depth"), ("slq", "portion")):
        net, _ = in_stages(one, key, digits64, knob, [(0.5, 1), (1.0, 1)], knobs={"bits": 2}, lr=0.02, keep_best=False)
        found.append(plan_of(net)["1"].dense())
    assert torch.equal(*found)


def test_mlq_without_training_is_all_layers_at_once(digits64):
    model, pair = three(digits64)
    net = compress(model, "mlq", depth=1 / 3, data=pair)
    for depth in (2 / 3, 1.0):
        turn(net, depth=depth).train()(pair[0])
    at_once = plan(model, "slq", bits=2)
    assert all(torch.equal(p.dense(), at_once[n].dense()) for n, p in plan_of(net).items())


def test_mlq_layer_by_layer_ends_lower_than_at_once(digits64):
    found = []
    for seed in range(3):
        model, pair = three(digits64, seed)
        row = []
        for stages in ([(1 / 3, 8), (2 / 3, 8), (1.0, 8)], [(1.0, 24)]):
            net, _ = in_stages(model, "mlq", pair, "depth", stages, seed=seed, lr=0.02, keep_best=False)
            with torch.no_grad():
                row.append(F.cross_entropy(net.eval()(pair[0]), pair[1]).item())
        found.append(row)
    ours, at_once = np.mean(found, 0)
    assert ours < 0.9 * at_once


# Effective low-bitwidth training


def steps_of(**knobs):
    return catalog()["effective_low_bitwidth_training"](**knobs)


def pairs(**knobs):
    return [(s.knobs["bits"], s.knobs["a_bits"]) for s in steps_of(**knobs)]


def test_low_bitwidth_schedules_are_the_papers():
    assert (
        pairs(trick="none", bit_sequence="8,4,2")
        == [(2, 2)]
        == pairs(trick="guided", bit_sequence="2")
        == pairs(trick="progressive", bit_sequence="2")
    )
    assert pairs(trick="two_stage", bit_sequence="8,4,2") == [(2, 32), (2, 2)]
    assert pairs(trick="progressive", bit_sequence="8,4,2") == [(8, 8), (4, 4), (2, 2)]
    assert pairs(trick="all", bit_sequence="8,2") == [(8, 32), (2, 32), (2, 8), (2, 2)]
    assert [s.guide for s in steps_of(trick="guided", guidance_weight=0.5)] == [0.5] and {s.guide for s in steps_of(trick="progressive")} == {0.0}
    assert all(s.key == "dorefa_net" and s.share == pytest.approx(1 / len(steps_of())) for s in steps_of())


def test_epochs_are_shared_out_whole():
    assert shared_out([0.25] * 4, 8) == [2, 2, 2, 2] and shared_out([1, 1, 1], 7) == [2, 2, 3] and sum(shared_out([0.7, 0.2, 0.1], 10)) == 10
    assert one_shot(0.1, 4)[0].epochs == 4


def test_guidance_is_zero_for_equal_features_and_knows_no_scale():
    a, b = normal(8, 3, 4), normal(8, 3, 4, seed=1)
    assert features_apart(a, a).abs() < 1e-15 and torch.allclose(features_apart(a, b), features_apart(7 * a, 0.2 * b))
    by_hand = torch.stack([(p / p.norm() - r / r.norm()).square().sum() / 2 for p, r in zip(a, b, strict=True)]).mean()
    assert torch.allclose(features_apart(a, b), by_hand)


def test_guidance_reaches_both_networks_through_features_and_answers(digits64):
    x, y = digits64[0][:50], digits64[1][:50]
    low, full = (build("mlp", "digits", seed).double() for seed in range(2))
    both = Guided(low, full).train()
    out = both(x)
    for part in (out[2], F.kl_div(F.log_softmax(out[0], 1), F.log_softmax(out[1], 1), log_target=True, reduction="batchmean")):
        for net in (low, full):
            assert torch.autograd.grad(part, net.fc1.weight, retain_graph=True)[0].abs().max() > 1e-6
    plain, held = (guided_loss(c)(out, y) for c in (0.0, 2.0))
    extra = 2 * (out[2] + F.kl_div(F.log_softmax(out[0], 1), F.softmax(out[1], 1), reduction="batchmean"))
    assert torch.allclose(plain, F.cross_entropy(out[0], y) + F.cross_entropy(out[1], y)) and torch.allclose(held - plain, extra)
    for net in (low, full):
        whole, own = (torch.autograd.grad(t, net.fc1.weight, retain_graph=True)[0] for t in (held - plain, extra))
        assert torch.allclose(whole, own)
    assert torch.equal(both.eval()(x), low.eval()(x)) and torch.equal(with_features(low, x)[1], nn.Sequential(*list(low)[:-1])(x))


def test_low_bitwidth_without_guidance_weight_is_the_unguided_run(digits):
    torch.manual_seed(0)
    net = build("mlp", "digits")
    runs = [follow(net, "effective_low_bitwidth_training", digits, epochs=2, knobs={"trick": t, "bit_sequence": "2", "guidance_weight": 0.0})
            for t in ("guided", "none")]  # fmt: skip
    ours, theirs = (plan_of(m) for m, _ in runs)
    assert all(torch.equal(ours[n].dense(), theirs[n].dense()) for n in ours)
    direct = compress(net, "dorefa_net", bits=2, a_bits=2)
    fit(direct, digits, epochs=2)
    assert all(torch.equal(ours[n].dense(), p.dense()) for n, p in plan_of(direct).items())


def test_low_bitwidth_steps_start_from_the_float_weights_of_the_one_before(digits):
    torch.manual_seed(0)
    net = build("mlp", "digits")
    two = (Step("dorefa_net", {"bits": 8, "a_bits": 32}, 1.0), Step("dorefa_net", {"bits": 2, "a_bits": 2}, 0.0))
    done, runs = follow(net, two, digits, epochs=1)
    first = compress(net, "dorefa_net", bits=8, a_bits=32)
    fit(first, digits, epochs=1)
    expected = plan(with_latent_weights(first), "dorefa_net", bits=2, a_bits=2)
    assert len(runs) == 2 and all(torch.equal(p.dense(), expected[n].dense()) for n, p in plan_of(done).items())
    with pytest.raises(ValueError, match="dorefa_net is a quantizer, not a recipe"):
        follow(net, "dorefa_net", digits)


def test_low_bitwidth_fewer_and_fewer_bits_end_lower_than_few_at_once_in_as_many_epochs(digits64):
    """Of the three helps this is the one that helps here; two stages and the guide need more epochs than they share."""
    found = []
    for seed in range(3):
        model, pair = small(digits64, seed)
        row = []
        for trick in ("progressive", "none"):
            net, _ = follow(model, "effective_low_bitwidth_training", pair, epochs=30, seed=seed, lr=0.02, keep_best=False, knobs={"trick": trick})
            with torch.no_grad():
                row.append(F.cross_entropy(net.eval()(pair[0]), pair[1]).item())
        found.append(row)
    ours, at_once = np.mean(found, 0)
    assert ours < 0.97 * at_once
