"""Chapter 03, pruning structures: taken away by training.

Survey 001, section 2.1.2; survey 004. Norms of neurons that proximal steps bring to zero, and columns of the weight matrix that go by rank or with a
probability.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ..core.knobs import Keep, Penalty, Pick, Span, Weight
from ..core.method import Training, score
from ..core.packed import Masked, State
from ..core.select import removed
from .prune import soft_threshold
from .prune_training import least_noisy
from .structures import group_soft_threshold, standing


def _sparse_group_step(w, lr, *, lam, alpha):
    t = lr * lam
    return group_soft_threshold(soft_threshold(w, alpha * t), (1 - alpha) * t * math.sqrt(w[0].numel()), "filter")


@score("Alvarez & Salzmann 2016, Learning the number of neurons in deep networks", chapter="03", training=Training(project=_sparse_group_step),
       filters=lambda: True)  # fmt: skip
def learning_number_of_neurons(w, *, lam: Penalty = 1e-3, alpha: Weight = 0.0, state: State | None = None) -> Masked:
    """Learning the number of neurons.

    min L(w) + lam sum_n ((1 - alpha) sqrt(P) ||w_n||_2 + alpha ||w_n||_1), w_n the P incoming weights of neuron n: after each step t = lr, a soft
    threshold at t alpha lam, then each neuron shorter by t (1 - alpha) lam sqrt(P), in this order (survey 001, 2.1.2 [36]). Neurons at zero are
    removed, so that training from scratch finds the width. ``alpha`` 0 is the group lasso, 1 the lasso. The paper presses less on the first layers:
    compress them apart, with ``where``. The bias is not in the norm; it goes with its neuron. Plain SGD solves this problem; AdamW scales its steps.
    """
    return standing(w)


SALIENCY = {"obd": lambda w, h: 0.5 * h * w**2, "norm": lambda w, h: w**2}


@score("Lebedev & Lempitsky 2016, Fast ConvNets using group-wise brain damage", chapter="03", unit="shape", keep=0.3)
def group_wise_brain_damage(w, hess_diag, *, saliency: Annotated[str, Pick(*SALIENCY)] = "obd"):
    """Group-wise brain damage.

    The same entry (channel, row, column) goes from all filters of a layer, so that the convolution, as a product with the im2col matrix, loses a
    column: of the sum over filters of h w^2 / 2 (optimal brain damage) or of w^2, the smallest go (survey 001, 2.1.2 [38]). The paper's
    group_sparsity is 1 - ``keep``; its gradual mode is a schedule, its group lasso ``structured_sparsity_learning(group="shape")``, trained first.
    On 1 x 1 convolutions and dense layers this removes input channels.
    """
    return SALIENCY[saliency](w, hess_diag)


def singular_value_threshold(w: Tensor, t: float) -> Tensor:
    """The proximal step of t ||W||_*, W (out, rest): each singular value less by t, and exactly zero within t of it."""
    u, s, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
    return (u * (s - t).clamp(min=0) @ v).reshape(w.shape)


def _less_is_more_step(w, lr, step, *, lam, rank, every):
    if step % every:
        return w
    t = lr * every
    low = singular_value_threshold(w, t * rank) if rank else w
    return group_soft_threshold(low, t * lam, "filter")


@score("Zhou, Alvarez & Porikli 2016, Less is more: towards compact CNNs", chapter="03", training=Training(project=_less_is_more_step),
       filters=lambda: True)  # fmt: skip
def less_is_more_compact_cnn(
    w, *, lam: Penalty = 1e-3, rank: Weight = 0.0, every: Annotated[int, Span(1, 200, integer=True)] = 1, state: State | None = None
) -> Masked:
    """Less is more: sparse constraints on neurons.

    min L(w) + lam sum_n ||w_n||_2 + rank ||W||_*, by forward-backward splitting: gradient steps, and ``every`` so many the closed proximal steps, of
    as much as that many together (survey 001, 2.1.2 [39]). Neurons at zero are removed, above all of large dense layers; between two proximal steps
    they are not at zero. The paper's lambda_group is ``lam``, its lambda_lowrank ``rank``. From the abstract: which tensors the paper holds to a low
    rank is uncertain; here it is the weight matrix (out, rest), whose singular values give way first and its neurons then, which is the proximal step
    of the sum only where one of the two is 0.
    """
    return standing(w)


def increments(importance: Tensor, count: int, rate: float, u: float) -> Tensor:
    """D(r) of SPP, r the rank of each entry from the least important: positive for ``count`` of them, 0 for the next, negative for the rest.

    A e^(-a r) up to r = N = -ln(u) / a, then 2 u A - A e^(-a (2 N - r)), a = (ln 2 - ln u) / count; nothing where ``count`` is 0.
    """
    if not count:
        return torch.zeros_like(importance)
    r = torch.empty_like(importance).flatten()
    r[importance.flatten().argsort(stable=True)] = torch.arange(len(r)).to(r)
    a = (math.log(2) - math.log(u)) / count
    turn = -math.log(u) / a
    d = torch.where(r <= turn, rate * (-a * r).exp(), 2 * u * rate - rate * (-a * (2 * turn - r)).exp())
    return torch.where(r == count, 0.0, d).reshape(importance.shape)  # the formula gives 3e-18 there


Rate, Turn = Annotated[float, Span(0.005, 0.2)], Annotated[float, Span(0.01, 1)]
COLUMNS = {law: "it removes whole columns of the weight matrix" for law in ("count", "ties")}


@score("Wang, Zhang, Wang & Hu 2018, Structured probabilistic pruning for convolutional neural network acceleration", chapter="03", exempt=COLUMNS)
def structured_probabilistic_pruning(
    w, training=False, *, keep: Keep = 0.5, rate: Rate = 0.05, u: Turn = 0.25, every: Annotated[int, Span(1, 500, integer=True)] = 180,
    state: State | None = None,
) -> Masked:  # fmt: skip
    """Structured probabilistic pruning (SPP).

    Each column of the weight matrix, the same entry of all filters, is masked with its probability p, drawn anew each step; masked weights are kept
    and may return. ``every`` so many steps p <- clip(p + D(r), 0, 1), r the rank of its L1 norm over these steps, D falling from A through 0 at the
    share R that is to go (survey 004). Outside of training the columns of highest p are masked, of equal ones those of smaller norm. The paper's R is
    1 - ``keep``, its A ``rate``. It stops once R have p = 1, which here go on being ranked and may return. Norms are averaged over the steps between
    two updates: our reading.
    """
    norms = w.detach().abs().sum(0, keepdim=True)
    state = state or {"p": torch.zeros_like(norms), "norms": torch.zeros_like(norms), "step": 0}
    if not training:
        return Masked(w, least_noisy(norms, state["p"], keep).expand_as(w), state=state)
    p, total, step = state["p"], state["norms"] + norms, state["step"] + 1
    if step % every == 0:
        p, total = (p + increments(total, removed(total.numel(), keep), rate, u)).clamp(0, 1), torch.zeros_like(total)
    return Masked(w, (torch.rand_like(p) >= p).expand_as(w), state={"p": p, "norms": total, "step": step})
