"""Chapter 04, quantization: binary and ternary weights, and inputs of one bit.

Every leaf gives the codes of a weight; ``acts`` of a method is what it rounds the layers' inputs to. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ..core.codes import Codes, grouped
from ..core.knobs import Per, Pick, Span
from ..core.method import Training, quantizer
from ..core.packed import State
from ..core.sites import Steps

Clip = Annotated[float, Span(0.5, 3)]


def signs(w: Tensor, scale: Tensor, soft: Tensor) -> Codes:
    """The weight scale * sign(w), with sign(0) = +1: w (groups, entries), scale (groups, 1); ``soft`` carries the gradient."""
    return Codes(soft, (w >= 0).long(), 2 * scale, 2)


def _clipped(w, *, clip):
    return w.clamp(-clip, clip)


@quantizer("Courbariaux, Bengio & David 2015, BinaryConnect: training deep neural networks with binary weights during propagations",
           chapter="04", training=Training(project=_clipped))  # fmt: skip
def binaryconnect(
    w, training=False, *, mode: Annotated[str, Pick("deterministic", "stochastic")] = "deterministic", clip: Clip = 1.0, state: State | None = None
):
    """BinaryConnect.

    Forward and backward see w_b = sign(w), or in training +1 with probability clamp((w + 1) / 2, 0, 1); its gradient goes to the latent w, which is
    then clipped to [-1, 1] (survey 001, 2.2.1 (1) [56]). Latent weights gather many small steps that w_b alone would lose.
    """
    drawn = 2 * torch.rand_like(w) - 1 if training and mode == "stochastic" else 0.0
    return signs((w - drawn).reshape(1, -1), torch.ones_like(w.reshape(-1)[:1, None]), w)
