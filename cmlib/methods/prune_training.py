"""Chapter 02, pruning weights: weights that go in training.

Survey 001, section 2.1.1, beside those of ``prune``. Noise with a learned strength, decay of what the output does not depend on, a constrained
problem solved by turns, and kernels pruned in the frequency domain. Each returns its own mask.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..core.knobs import Keep, Penalty, Pick, Span, Steps, Switch, Weight
from ..core.method import Training, score
from ..core.packed import Masked, State
from ..core.select import removed, select
from ..core.spectral import Spectral, dct
from .prune import GATES, soft_threshold
from .structures import nearest

Rate, Share = Annotated[float, Span(0.1, 1)], Annotated[float, Span(0.01, 0.99)]
Cut = Annotated[float, Span(0, 0.1)]

ALPHAS = {  # the shape of the dropout rates for a weight of that shape
    "layer": lambda shape: (1,) * len(shape),
    "neuron": GATES["input_neuron"],
    "weight": GATES["weight"],
}


def kl_gaussian_dropout(alpha: Tensor) -> Tensor:
    """KL(q || log-uniform prior) of a weight with noise alpha <= 1, up to a constant: Kingma et al.'s cubic."""
    return -(0.5 * alpha.log() + 1.16145124 * alpha - 1.50204118 * alpha**2 + 0.58629921 * alpha**3)


def _alpha(state: State) -> Tensor:
    return state["alpha_max"] * torch.sigmoid(state["logit"])


def _lrt_penalty(packed, w, examples, *, kl_weight):
    alpha = _alpha(packed.state)
    return kl_weight / examples * kl_gaussian_dropout(alpha).sum() * (w.numel() / alpha.numel())


def _lrt_variance(packed):
    return _alpha(packed.state) * packed.values.square()


def least_noisy(w: Tensor, alpha: Tensor, keep: float) -> Tensor:
    """The mask of the ``keep`` weights with the least alpha; where alpha is shared, the larger first."""
    size = w.abs().flatten().argsort(descending=True, stable=True)
    order = size[alpha.expand_as(w).flatten()[size].argsort(stable=True)]
    return torch.zeros_like(w, dtype=torch.bool).flatten().index_fill(0, order[: len(order) - removed(len(order), keep)], True).reshape(w.shape)


@score("Kingma, Salimans & Welling 2015, Variational dropout and the local reparameterization trick", chapter="02",
       training=Training(penalty=_lrt_penalty, variance=_lrt_variance))  # fmt: skip
def variational_dropout_lrt(
    w, training=False, *, keep: Keep = 0.5, sharing: Annotated[str, Pick(*ALPHAS)] = "layer", alpha: Share = 0.5, alpha_max: Rate = 1.0,
    kl_weight: Weight = 1.0, state: State | None = None,
) -> Masked:  # fmt: skip
    """Variational dropout with local reparameterization.

    q(w) = N(theta, alpha theta^2), Gaussian dropout whose rate alpha = p / (1 - p) is learned by the ELBO: loss + KL(alpha) / N. The noise is drawn
    at the pre-activations, b ~ N(sum a theta, sum a^2 alpha theta^2), one draw an example and output (survey 001, 2.1.1 [29]). alpha stays below
    ``alpha_max``, of which ``alpha`` is the share at the start. The paper removes nothing; here the weights with the most noise go, outside of
    training, and of those that share an alpha the smallest. Where a weight serves several positions, as in convolutions, the trick approximates.
    """
    if state is None:
        first = torch.logit(torch.tensor(float(alpha))).item()
        state = {"logit": torch.nn.Parameter(torch.full(ALPHAS[sharing](w.shape), first, dtype=w.dtype, device=w.device)), "alpha_max": alpha_max}
    return Masked(w, torch.ones_like(w, dtype=torch.bool) if training else least_noisy(w, _alpha(state).detach(), keep), state=state)


def _insensitive_decay(w, sensitivity, *, lam, specific):
    """w <- w - lam w max(0, 1 - S)."""
    return w - lam * w * (1 - sensitivity[int(specific == "on")]).clamp(min=0)


@score("Tartaglione, Lepsoy, Fiandrotti & Francini 2018, Learning sparse neural networks via sensitivity-driven regularization", chapter="02",
       training=Training(project=_insensitive_decay))  # fmt: skip
def sensitivity_driven_regularization(
    w, training=False, *, lam: Penalty = 1e-4, threshold_after: Cut = 1e-3, specific: Switch = "off", state: State | None = None
) -> Masked:
    """Sensitivity-driven regularization.

    S(w) = sum_k |dy_k/dw| / C, how much the outputs depend on a weight; each step w <- w - lam w max(0, 1 - S), so that only what the output does not
    depend on decays (survey 001, 2.1.1 [32]). Outside of training what is below ``threshold_after``, the paper's T, is masked. ``specific`` takes the
    label's output alone. S is the mean over a batch's worth of training examples, the same ones each step; the loss's gradient would not do: at a
    minimum it is 0 for all.
    """
    return Masked(w, torch.ones_like(w, dtype=torch.bool) if training else w.abs() >= threshold_after)


CONSTRAINTS = {  # the point nearest to v: with ``keep`` of its entries; with alpha a nonzero one; with alpha |theta|
    "l0": lambda v, mu, keep, alpha: nearest(v, keep),
    "l0_penalty": lambda v, mu, keep, alpha: torch.where(v.square() > 2 * alpha / mu, v, 0.0),
    "l1_penalty": lambda v, mu, keep, alpha: soft_threshold(v, alpha / mu),
}
Growth = Annotated[float, Span(1.01, 2)]


def _augmented(packed, w):
    s = packed.state
    return s["mu"] / 2 * (w - s["theta"] - s["lam"] / s["mu"]).square().sum()


@score("Carreira-Perpinan & Idelbayev 2018, Learning-compression algorithms for neural net pruning", chapter="02",
       training=Training(penalty=_augmented))  # fmt: skip
def learning_compression(
    w, training=False, *, keep: Keep = 0.1, mu: Penalty = 1e-3, growth: Growth = 1.1, every: Steps = 10,
    constraint: Annotated[str, Pick(*CONSTRAINTS)] = "l0", alpha: Penalty = 1e-5, state: State | None = None,
) -> Masked:  # fmt: skip
    """Learning-compression algorithm (LC).

    min L(w) so that w = theta and theta has ``keep`` of a layer's weights. L step: train with mu / 2 ||w - theta - lam / mu||^2 added. C step, each
    ``every`` so many: theta <- the largest of w - lam / mu, lam <- lam - mu (w - theta), mu <- ``growth`` mu (survey 001, 2.1.1 [33]). Which weights
    are zero changes until w and theta meet; the network is theta. The penalty forms charge ``alpha`` for each weight, or for its size, instead.
    """
    compressed = CONSTRAINTS[constraint]
    state = state or {"theta": compressed(w, mu, keep, alpha), "lam": torch.zeros_like(w), "mu": mu, "step": 0}
    if not training:
        return Masked(state["theta"], state["theta"] != 0, state=state)
    state = {**state, "step": state["step"] + 1}
    if every and state["step"] % every == 0:
        theta = compressed(w.detach() - state["lam"] / state["mu"], state["mu"], keep, alpha)
        state |= {"theta": theta, "lam": state["lam"] - state["mu"] * (w.detach() - theta), "mu": state["mu"] * growth}
    return Masked(w, torch.ones_like(w, dtype=torch.bool), state=state)


def band_weights(w: Tensor, slope: float) -> Tensor:
    """(1 + u + v)^-slope of each frequency (u, v) of a kernel, so shaped that it broadcasts to w."""
    band = torch.ones([1] * w.dim()).to(w)
    for axis in range(2, w.dim()):
        band = band + torch.arange(w.shape[axis]).to(w).reshape([-1 if a == axis else 1 for a in range(w.dim())])
    return band**-slope


@score("Liu, Xu, Peng & Xiong 2018, Frequency-domain dynamic pruning for convolutional neural networks", chapter="02",
       exempt={"projection": "what is held are coefficients; there and back rounds",
               "ties": "of equal coefficients the one of lower frequency stays"})  # fmt: skip
def frequency_domain_pruning(
    w, training=False, *, keep: Keep = 0.2, slope: Annotated[float, Span(0, 4)] = 1.0, dynamic: Switch = "on", state: State | None = None
) -> Masked:
    """Frequency-domain dynamic pruning (FDNP).

    F = C W C^T, the orthonormal DCT of each kernel; the largest |F_uv| (1 + u + v)^-slope stay, so that high frequencies go first (survey 001, 2.1.1
    [34]). ``dynamic`` looks again at every training step, all of w learning, so that a coefficient can return. The paper's bands have thresholds from
    a Beta distribution; the power law is a simplification. Kernels of 1 x 1 and dense layers have no frequencies: their weights are pruned as is.
    """
    c = dct(w)
    again = state is None or (training and dynamic == "on")
    mask = select((c * band_weights(w, slope)).detach().abs(), keep) if again else state["mask"]
    return Spectral(c, mask, straight=dynamic == "on", state={"mask": mask})
