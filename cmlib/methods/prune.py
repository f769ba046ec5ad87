"""Chapter 02, pruning weights: a score or a mask for each weight.

Survey 001, section 2.1.1. A score says what each weight is worth; the shared selection keeps the best. Four methods learn which weights go while the
network trains: they return the mask themselves.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ..core.knobs import Damping, Penalty, Pick, Span, Steps, Weight
from ..core.method import Training, score
from ..core.packed import Masked, State


@score("the floor that every score must beat", chapter="02", joint=True, exempt={"permutation": "a draw does not follow the filters"})
def random_pruning(w, *, seed: Steps = 0):
    """Random pruning.

    Every weight is worth a uniform random number: the floor that any score must beat at the same ``keep``.
    """
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)).to(w)


@score("Han, Pool, Tran & Dally 2015, Learning both weights and connections for efficient neural networks", chapter="02")
def magnitude_pruning_han(w):
    """Magnitude pruning.

    s = |w|. Train, remove the smallest, retrain what stays from where it stands, repeat (survey 001, 2.1.1 [23]). The paper's rule
    |w| < q std(w) of each layer is ``threshold``; its ``sparsity`` is 1 - keep.
    """
    return w.abs()


def retraining_dropout(rate: float, connections: float, left: float) -> float:
    """Han et al.'s smaller dropout rate for retraining: D_r = D_o sqrt(C_ir / C_io), from the connections before and left."""
    return rate * math.sqrt(left / connections)


def dead_units(w_in: Tensor, w_out: Tensor) -> Tensor:
    """Han et al.'s dead neurons, a mask (units,): no connection comes in, (units, n), or none goes out, (m, units)."""
    return ~((w_in != 0).any(1) & (w_out != 0).any(0))


def without_units(dead: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two dense layers (a ReLU between) without their dead units; what a unit without inputs always said goes into the next bias."""
    constant = torch.where(dead, b_in, 0.0).clamp(min=0)
    return w_in[~dead], b_in[~dead], w_out[:, ~dead], b_out + w_out @ constant


@score("LeCun, Denker & Solla 1989, Optimal brain damage", chapter="02")
def optimal_brain_damage(w, hess_diag):
    """Optimal brain damage (OBD).

    s_k = h_kk w_k^2 / 2: the rise of the loss when weight k goes, at a minimum and with a diagonal Hessian (survey 001, 2.1.1 [19]).
    """
    return 0.5 * hess_diag * w**2


def hessian(rows: Tensor, damping: float) -> Tensor:
    """H = rows^T rows / P + damping I, in float64."""
    rows = rows.double()
    return rows.T @ rows / len(rows) + damping * torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)


def recursive_inverse(rows: Tensor, damping: float) -> Tensor:
    """OBS's inverse of ``hessian(rows, damping)``, one outer product at a time: H^-1 -= H^-1 x x^T H^-1 / (P + x^T H^-1 x)."""
    inverse = torch.eye(rows.shape[1], dtype=torch.float64) / damping
    for x in rows.double():
        v = inverse @ x
        inverse -= torch.outer(v, v) / (len(rows) + x @ v)
    return inverse


def deletion_costs(w: Tensor, inverse: Tensor) -> Tensor:
    """What each weight costs when OBS deletes them one by one, the cheapest first, correcting the others each time.

    L_q = w_q^2 / (2 [H^-1]_qq); delta w = -(w_q / [H^-1]_qq) H^-1 e_q; then row and column q leave H^-1. Costs never fall along the order,
    so that selection by them deletes in that order. w (n,), inverse (n, n), both float64.
    """
    w, inverse, costs = w.clone(), inverse.clone(), torch.empty_like(w)
    left, last = torch.arange(len(w), device=w.device), torch.tensor(-1.0, dtype=w.dtype, device=w.device)
    while len(left):
        gone = torch.zeros(len(left), dtype=torch.bool, device=w.device)
        for _ in range(-(-len(left) // 8)):  # then the deleted rows are really dropped, which keeps the work near n^3 / 3
            cost = (w**2 / (2 * inverse.diagonal())).masked_fill(gone, torch.inf)
            q = cost.argmin()
            last = torch.maximum(cost[q], torch.nextafter(last, last + 1))
            costs[left[q]], gone[q] = last, True
            column, pivot = inverse[:, q].clone(), inverse[q, q].clone()
            w -= column * (w[q] / pivot)
            inverse.addr_(column, column, alpha=-1 / pivot.item())
            inverse.diagonal()[gone] = 1.0
        left, w, inverse = left[~gone], w[~gone], inverse[~gone][:, ~gone]
    return costs


def corrected(w: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    """The weights that stay, moved so that the quadratic loss w^T H w / 2 rises least: what any order of OBS deletions ends at.

    w_S += H_SS^-1 H_SM w_M, S what stays and M what goes. w, mask (r, n), one H (n, n) for all rows; float64.
    """
    keep = mask.to(h)
    pull = (w * (1 - keep)) @ h
    stays = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]  # rows with fewer are padded
    real = keep.gather(1, stays)
    system = h[stays[:, :, None], stays[:, None, :]] * real[:, :, None] * real[:, None, :] + torch.diag_embed(1 - real)
    step = torch.cholesky_solve((pull.gather(1, stays) * real)[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
    return keep * (w + torch.zeros_like(w).scatter(1, stays, step))


def _obs_repair(w, hess_rows, mask, *, damping):
    return corrected(w[None].double(), mask[None], hessian(hess_rows, damping))[0].to(w)


@score("Hassibi & Stork 1992, Second order derivatives for network pruning: optimal brain surgeon", chapter="02", joint=True,
       repair=_obs_repair)  # fmt: skip
def optimal_brain_surgeon(w, hess_rows, *, damping: Damping = 1e-3):
    """Optimal brain surgeon (OBS).

    L_q = w_q^2 / (2 [H^-1]_qq) with the whole Hessian, weights deleted one at a time and the others corrected (survey 001, 2.1.1 [20]). For some
    4,000 weights at most. ``damping`` is the paper's eps.
    """
    return deletion_costs(w.double(), torch.linalg.inv(hessian(hess_rows, damping)))


def _by_group(w: Tensor, acts_gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Weight rows (groups, outputs, k) and the layer's damped Hessian (groups, k, k), in float64."""
    h = acts_gram.double()
    scale = damping * h.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-12)
    return w.double().reshape(len(h), -1, h.shape[1]), h + scale * torch.eye(h.shape[1], dtype=h.dtype, device=h.device)


def _lobs_repair(w, acts_gram, mask, *, damping):
    rows, h = _by_group(w, acts_gram, damping)
    chunks = [[corrected(r, m, hg) for r, m in zip(rg.split(64), mg.split(64), strict=True)]
              for rg, mg, hg in zip(rows, mask.reshape(rows.shape), h, strict=True)]  # fmt: skip
    return torch.cat([torch.cat(c) for c in chunks]).reshape(w.shape).to(w)


@score("Dong, Chen & Pan 2017, Learning to prune deep neural networks via layer-wise optimal brain surgeon", chapter="02", repair=_lobs_repair)
def layerwise_obs(w, acts_gram, *, order: Annotated[str, Pick("one_shot", "greedy")] = "one_shot", damping: Damping = 1e-4):
    """Layer-wise optimal brain surgeon (L-OBS).

    L_q = w_q^2 / (2 [Psi^-1]_qq), Psi the second moment of the layer's inputs: OBS on each layer's own output error (survey 001, 2.1.1 [22]).
    ``one_shot`` scores once, ``greedy`` deletes one weight of each output at a time; both then correct what stays exactly. ``damping`` is relative to
    Psi's mean diagonal.
    """
    rows, h = _by_group(w, acts_gram, damping)
    inverse = torch.linalg.inv(h)
    if order == "one_shot":
        return (rows**2 / (2 * inverse.diagonal(dim1=1, dim2=2)[:, None])).reshape(w.shape)
    return torch.stack([deletion_costs(r, i) for rg, i in zip(rows, inverse, strict=True) for r in rg]).reshape(w.shape)


@score("Lee, Ajanthan & Torr 2019, SNIP: single-shot network pruning based on connection sensitivity", chapter="02", joint=True, scope="network")
def snip(w, grad):
    """SNIP.

    s = |w dL/dw| / sum |w dL/dw|: how the loss answers to a gate on each weight, asked once, before training (survey 001, 2.1.1 [26]). The
    gradient is summed over the sample before the absolute value.
    """
    s = (w * grad).abs()
    return s / s.sum().clamp(min=torch.finfo(s.dtype).tiny)


def soft_threshold(w: Tensor, t: float) -> Tensor:
    """The proximal step of t|w|: towards zero by t, and exactly zero within t of it."""
    return w.sign() * (w.abs() - t).clamp(min=0)


def _ista(w, lr, *, lam, solver="proximal"):
    return soft_threshold(w, lr * lam) if solver == "proximal" else w


def _l1(packed, *, lam, solver="proximal"):
    return lam * packed.values.abs().sum() if solver == "subgradient" else 0.0


Cut = Annotated[float, Span(0, 1)]


@score("Tibshirani 1996, Regression shrinkage and selection via the lasso", chapter="02", training=Training(penalty=_l1, project=_ista))
def l1_weight_regularization(
    w, training=False, *, lam: Penalty = 1e-3, solver: Annotated[str, Pick("proximal", "subgradient")] = "proximal", threshold_after: Cut = 0.0,
    state: State | None = None,
) -> Masked:  # fmt: skip
    """L1 regularization.

    min L(w) + lam |w|_1, by the proximal step w <- S_(lr lam)(w - lr grad L) (ISTA): exact zeros appear while training, and may leave again
    (survey 001, 2.1.1; the survey's non-structured baseline). ``subgradient`` adds lam sign(w) to the gradient instead and reaches no exact zero;
    what is then at most ``threshold_after`` in size counts as removed once training is over. The lasso is what plain SGD solves
    (``fit(..., optimizer=torch.optim.SGD)``); AdamW scales its steps, so that the same ``lam`` removes less.
    """
    return Masked(w, w != 0 if training else w.abs() > threshold_after, straight=True)


Hysteresis = Annotated[float, Span(0, 4)]
Decay = Annotated[float, Span(0, 0.1)]


def surgery(w: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """DNS's rule: cut below ``low``, splice from ``high`` on, and in between leave as it is."""
    return (w.abs() >= high) | (mask & (w.abs() >= low))


@score("Guo, Yao & Chen 2016, Dynamic network surgery for efficient DNNs", chapter="02")
def dynamic_network_surgery(
    w, training=False, *, c: Hysteresis = 1.0, margin: Hysteresis = 0.1, decay: Decay = 1e-3, state: State | None = None
) -> Masked:
    """Dynamic network surgery (DNS).

    T = 0 where |w| < a, 1 where |w| >= b, as before between; a = mean|w| + c std|w|, b = a + margin std|w|, fixed at the start
    (survey 001, 2.1.1 [24]); c = 0 cuts nothing. All of w learns through the mask, so a weight wrongly cut can return. The mask is looked at
    again with probability 1 / (1 + decay step).
    """
    if state is None:
        mean, std = w.abs().mean().item(), w.abs().std().item()
        low, high = max(0.0, mean + c * std) * (c > 0), max(0.0, mean + (c + margin) * std) * (c + margin > 0)
        state = {"mask": surgery(w, torch.ones_like(w, dtype=torch.bool), low, high), "low": low, "high": high, "step": 0}
    if training:
        step, due = state["step"], torch.rand(()) < 1 / (1 + decay * state["step"])
        mask = surgery(w.detach(), state["mask"], state["low"], state["high"]) if due else state["mask"]
        state = {**state, "mask": mask, "step": step + 1}
    return Masked(w, state["mask"], straight=True, state=state)


def kl_log_uniform(log_alpha: Tensor) -> Tensor:
    """KL(q || log-uniform prior) of each weight, up to a constant: Molchanov et al.'s approximation, 0 at log alpha -> inf."""
    return 0.63576 * torch.sigmoid(-1.87320 - 1.48695 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)


def log_alpha(w: Tensor, log_sigma2: Tensor) -> Tensor:
    """log(sigma^2 / w^2) of each weight: how much of it is noise."""
    return log_sigma2 - (w**2 + 1e-16).log()


def _vd_penalty(packed, examples, progress, *, kl_weight, warmup):
    weight = kl_weight * (1.0 if progress >= warmup else progress / warmup)
    return weight / examples * kl_log_uniform(log_alpha(packed.values, packed.state["log_sigma2"])).sum()


def _vd_variance(packed):
    return packed.state["log_sigma2"].exp()


LogAlpha = Annotated[float, Span(-8, 16)]
LogVariance = Annotated[float, Span(-16, 0)]


@score("Molchanov, Ashukha & Vetrov 2017, Variational dropout sparsifies deep neural networks", chapter="02",
       training=Training(penalty=_vd_penalty, variance=_vd_variance))  # fmt: skip
def sparse_variational_dropout(
    w, training=False, *, threshold: LogAlpha = 3.0, kl_weight: Weight = 1.0, warmup: Weight = 0.3, log_sigma2: LogVariance = -10.0,
    state: State | None = None,
) -> Masked:  # fmt: skip
    """Sparse variational dropout.

    Each weight is noisy, w + sigma eps, with its own learned sigma; KL(log alpha) / N rewards noise, alpha = sigma^2 / w^2, and where log
    alpha passes ``threshold`` the weight is noise alone and goes (survey 001, 2.1.1 [30]). The noise is sampled at the pre-activations.
    ``log_sigma2`` is where the noise starts; ``warmup`` is the share of training over which the KL term grows to ``kl_weight``.
    """
    state = state or {"log_sigma2": torch.nn.Parameter(torch.full_like(w, log_sigma2))}
    stays = log_alpha(w, state["log_sigma2"]) < threshold
    return Masked(w, torch.ones_like(stays) if training else stays, state=state)


GAMMA, ZETA = -0.1, 1.1  # how far the concrete gate is stretched beyond [0, 1]


def hard_concrete(log_alpha: Tensor, u: Tensor | None, beta: float, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """The gate in [0, 1], exactly 0 and exactly 1 with positive probability; ``u`` uniform noise, or None for the test-time gate."""
    logits = log_alpha if u is None else (u.log() - (1 - u).log() + log_alpha) / beta
    return (torch.sigmoid(logits) * (zeta - gamma) + gamma).clamp(0, 1)


def open_probability(log_alpha: Tensor, beta: float, gamma: float = GAMMA, zeta: float = ZETA) -> Tensor:
    """P(gate != 0) = sigmoid(log alpha - beta log(-gamma / zeta)): the expected L0 norm of one weight."""
    return torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta))


def _l0_penalty(packed, examples, *, lam, beta, gamma=GAMMA, zeta=ZETA):
    open_ = open_probability(packed.state["log_alpha"], beta, gamma, zeta)
    return lam / examples * open_.sum() * (packed.values.numel() / open_.numel())


GATES = {  # the shape of the gates for a weight of that shape
    "weight": lambda shape: shape,
    "input_neuron": lambda shape: (1, shape[1], *[1] * (len(shape) - 2)),
    "filter": lambda shape: (shape[0], *[1] * (len(shape) - 1)),
}
Below, Above, Group = Annotated[float, Span(-0.5, -0.01)], Annotated[float, Span(1.01, 1.5)], Annotated[str, Pick(*GATES)]
Temper = Annotated[float, Span(0.1, 1)]


@score(
    "Louizos, Welling & Kingma 2018, Learning sparse neural networks through L0 regularization", chapter="02", training=Training(penalty=_l0_penalty)
)
def l0_hard_concrete(
    w, training=False, *, lam: Penalty = 0.1, group: Group = "weight", beta: Temper = 2 / 3, gamma: Below = GAMMA, zeta: Above = ZETA,
    start: Temper = 0.9, state: State | None = None,
) -> Masked:  # fmt: skip
    """L0 regularization with hard concrete gates.

    w z, z = clamp(sigmoid((log u - log(1-u) + log alpha) / beta) (zeta - gamma) + gamma, 0, 1); lam / N sum P(z != 0), over all weights, is
    added to the loss (survey 001, 2.1.1 [31]). At test time z is the gate without noise. A ``group`` of weights shares a gate. ``start`` is the
    probability that a gate is open at first.
    """
    if state is None:
        first = math.log(start / (1 - start + 1e-3)) + beta * math.log(-gamma / zeta)
        state = {"log_alpha": torch.nn.Parameter(torch.full(GATES[group](w.shape), first, dtype=w.dtype, device=w.device))}
    u = torch.rand_like(state["log_alpha"]).clamp(1e-6, 1 - 1e-6) if training else None
    z = hard_concrete(state["log_alpha"], u, beta, gamma, zeta).expand_as(w)
    return Masked(w * z, z > 0, state=state)
