"""Chapter 04, quantization: bits chosen for each weight.

Chosen by what they do to the loss. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from ..core.codes import Codes, SparseCodes, Sum
from ..core.knobs import Bits, Span, Weight
from ..core.method import quantizer
from ..core.packed import Masked, State


def water_filled(slope: Tensor, budget: float, most: Tensor) -> Tensor:
    """The tau of fewest bits in all, -sum log2 tau, that keep sum slope tau <= budget and tau <= most: min(most, lambda / slope).

    All share the budget evenly, slope tau = lambda, but those that ``most`` holds back, which leave the others more.
    """
    shares = (slope * most).sort().values
    level = (budget - (shares.cumsum(0) - shares)) / torch.arange(len(shares), 0, -1).to(shares)  # lambda if so many are held back
    reached = level <= shares
    share = (level[reached.int().argmax()].clamp(min=0) / slope).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.minimum(most, share) if reached.any() else most


def bits_for(w: Tensor, tolerance: Tensor, reach: Tensor, max_bits: int) -> Tensor:
    """The fewest bits whose even levels up to ``reach`` come within ``tolerance`` of w, ``max_bits`` at most; 0 where 0 does."""
    bits = (reach / tolerance.clamp(min=1e-30)).log2().ceil().clamp(1, max_bits).long()
    return torch.where(w.abs() <= tolerance, 0, bits)


def numbered(w: Tensor, bits: Tensor | int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the 2^bits even levels between -reach and reach each weight is nearest to, and their step."""
    step = 2 * reach / 2.0**bits
    step = torch.where(step > 0, step, 1)
    return ((w + reach) / step).floor().clamp(min=0).minimum(step.new_tensor(2.0) ** bits - 1), step


def tolerance(w, layer, loss_at, *, loss_budget: Weight = 0.05, trust_region: Annotated[float, Span(0.001, 1, log=True)] = 0.1,
              n_iterations: Annotated[int, Span(1, 50, log=True, integer=True)] = 8, max_bits: Bits = 8):  # fmt: skip
    """How far each weight may move, so that all together raise the loss by ``loss_budget`` at most."""
    reach = w.new_zeros(int(layer.max()) + 1).scatter_reduce(0, layer, w.abs(), "amax")[layer]

    def rounded(tau: Tensor) -> Tensor:
        bits = bits_for(w, tau, reach, max_bits)
        index, step = numbered(w, bits, reach)
        return torch.where(bits > 0, (index + 0.5) * step - reach, 0)

    def slope(at: Tensor) -> Tensor:
        return torch.autograd.grad(loss_at(at.requires_grad_()), at)[0]

    with torch.no_grad():
        start = loss_at(w)
    region = trust_region * reach
    between = (slope(w.clone()) + slope(rounded(region))).abs() / 2
    best, low, high, stretch = torch.zeros_like(w), 0.0, math.inf, 1.0
    for _ in range(n_iterations):
        tau = water_filled(between, stretch * loss_budget, region)
        with torch.no_grad():
            held = loss_at(rounded(tau)) <= start + loss_budget
        low, high, best = (stretch, high, tau) if held else (low, stretch, best)
        stretch = math.sqrt(low * high) if low > 0 and high < math.inf else 4 * low or high / 4
    return best


@quantizer("Khoram & Li 2018, Adaptive quantization of neural networks", chapter="04", jointly=tolerance,
           exempt={"idempotent": "the slopes at rounded weights are others, and so are the tolerances"})  # fmt: skip
def adaptive_quantization(w, tolerance, *, max_bits: Bits = 8, state: State | None = None):
    """Adaptive quantization: bits for each weight.

    Each weight has a tolerance tau and the bits that it takes to come so near, ceil(log2(largest weight of the layer / tau)), none where |w| <= tau.
    The tau of fewest bits with sum |g| tau <= ``loss_budget`` and tau <= ``trust_region`` (of the largest weight) is lambda / |g|, capped
    (survey 001, 2.2.4 (2) [18]). A trained network has no slope: g is the mean of that at w and at w rounded to the trust region, which for a
    quadratic loss is exact on the way between. The bound takes every error for the worst, so it is stretched, or drawn in, in ``n_iterations`` steps
    to the most at which the measured loss keeps the budget. From the paper's abstract; what lies between is our derivation.
    Which weight has how many bits is stored too.
    """
    if state is None:
        reach = w.detach().abs().max()
        state = {"bits": bits_for(w.detach(), tolerance, reach, max_bits), "reach": reach}
    bits, reach, terms = state["bits"], state["reach"], []
    for b in (b for b in range(1, max_bits + 1) if (bits == b).any()):
        index, step = numbered(w[bits == b].detach(), b, reach)
        terms.append(SparseCodes(w, bits == b, Codes(w[bits == b], index.long()[None], step.reshape(1, 1), 1 << b)))
    return Sum(w, tuple(terms), state=state) if terms else Masked(w, torch.zeros_like(w, dtype=torch.bool))
