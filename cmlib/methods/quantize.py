"""Chapter 04, quantization: one bit, three levels, a few bits.

Survey 001, section 2.2. Every leaf gives the codes of a latent weight: levels, the number of each weight's level, and, as ``values``, what carries
the straight-through gradient. A method's ``acts`` is what it rounds the layers' inputs to. Signs take sign(0) = +1.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.codes import Codes, grouped
from ..core.knobs import Bits, Per, Pick, Span, Switch, WideBits
from ..core.method import Training, quantizer
from ..core.packed import State
from ..core.rounding import Steps, inside

Clip = Annotated[float, Span(0.5, 3)]


def signs(rows: Tensor, scale: Tensor, soft: Tensor) -> Codes:
    """The weight scale * sign(w): rows (groups, entries) of w, scale (groups, 1); ``soft``, of the weight's shape, carries the gradient."""
    return Codes(soft, (rows >= 0).long(), 2 * scale, 2)


def filters(w: Tensor) -> Tensor:
    """The weight as (filters, entries); what is left of a pruned layer, whose filters are no longer whole, is one row."""
    return w.flatten(1) if w.dim() > 1 else w[None]


def input_signs(slope, spread: bool = False) -> Steps:
    """Inputs by their sign, -1 or +1; ``slope`` stands for the derivative in training."""
    return Steps(torch.zeros(1), torch.tensor([-1.0, 1.0]), slope, spread)


# one bit a weight


def glorot(w: Tensor) -> float:
    """c = sqrt(1.5 / (fan in + fan out)), the reach of Glorot's uniform starting weights; 1 where pruning has hidden the fans."""
    return math.sqrt(1.5 / (w[0].numel() + w[:, 0].numel())) if w.dim() > 1 else 1.0


def _clipped(w, *, clip, lr_scale_by_init):
    reach = clip * (glorot(w) if lr_scale_by_init == "on" else 1.0)
    return w.clamp(-reach, reach)


@quantizer("Courbariaux, Bengio & David 2015, BinaryConnect: training deep neural networks with binary weights during propagations",
           chapter="04", training=Training(project=_clipped))  # fmt: skip
def binaryconnect(w, training=False, *, mode: Annotated[str, Pick("deterministic", "stochastic")] = "deterministic",
                  clip: Annotated[float, Span(0.5, 2)] = 1.0, lr_scale_by_init: Switch = "on"):  # fmt: skip
    """BinaryConnect.

    Forward and backward see w_b = sign(w), or in training +1 with probability clamp((w + 1) / 2, 0, 1); its gradient goes to the latent w, which is
    then clipped to [-1, 1] (survey 001, 2.2.1 (1) [56]). Latent weights gather many small steps that w_b alone would lose.
    ``lr_scale_by_init``: the authors multiply the step of w by 1 / c, c of ``glorot``. Here the latent weight is held as c w, clipped to [-c, c] and
    drawn by (w / c + 1) / 2, which is the same under any optimizer, and is how large a trained network's weights are. In evaluation the weight is its
    sign, drawn or not; the authors' other two ways, the real weight and a mean over draws, are not here.
    """
    unit = glorot(w) if lr_scale_by_init == "on" else 1.0
    drawn = unit * (2 * torch.rand_like(w) - 1) if training and mode == "stochastic" else 0.0
    return signs((w - drawn).reshape(1, -1), w.new_ones(1, 1), w)


def ap2(x: Tensor) -> Tensor:
    """BNN's approximate power of two, sign(x) 2^round(log2 |x|), by which a product is a shift of bits; 0 for 0."""
    return torch.where(x == 0, x, x.sign() * torch.exp2(x.abs().log2().round()))


def shift_batch_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """BNN's shift-based batch norm of x (N, C), and its variance: every product and the division are by powers of two.

    c = x - mean, variance = mean(c AP2(c)), y = AP2(gamma) c AP2(1 / sqrt(variance + eps)) + beta (Courbariaux et al. 2016, algorithm 3).
    """
    c = x - x.mean(0)
    variance = (c * ap2(c)).mean(0)
    return ap2(gamma) * (c * ap2((variance + eps).rsqrt())) + beta, variance


def _bnn_inputs(*, ste_clip: Clip = 1.0):
    return input_signs(inside(-ste_clip, ste_clip))


@quantizer("Courbariaux, Hubara, Soudry, El-Yaniv & Bengio 2016, Binarized neural networks: weights and activations constrained to +1 or -1",
           chapter="04", training=Training(project=lambda w: w.clamp(-1, 1)), acts=_bnn_inputs)  # fmt: skip
def bnn(w):
    """Binarized neural network (BNN).

    Weights and inputs are signs, so that a product is n - 2 popcount(a xor w). Straight through sign(r) the gradient passes where |r| <= ``ste_clip``
    (with the bound: weights clipped to [-1, 1] still learn) and is cancelled elsewhere (survey 001, 2.2.1 (2) [62]). The network needs a
    batch norm before each sign and no ReLU, after which every sign is +1: ``cmlib.lab.nets.signed``.
    """
    return signs(w.reshape(1, -1), w.new_ones(1, 1), w)


def _xnor_inputs(*, mode: Annotated[str, Pick("bwn", "xnor")] = "xnor", use_K_map: Switch = "on"):
    return input_signs(inside(-1, 1), use_K_map == "on") if mode == "xnor" else None


@quantizer("Rastegari, Ordonez, Redmon & Farhadi 2016, XNOR-Net: ImageNet classification using binary convolutional neural networks",
           chapter="04", acts=_xnor_inputs)  # fmt: skip
def xnor_net(w):
    """XNOR-Net, and BWN (binary-weight network).

    w ~ alpha sign(w) with alpha = mean |w| of each filter, the nearest such weight; ``mode="bwn"`` leaves the inputs real. ``xnor`` takes their signs
    too and multiplies each output by K, the mean |x| of what it sees (survey 001, 2.2.1 (2) [63]). The gradient is the paper's, g_i (1 / n +
    alpha 1[|w_i| <= 1]); the true derivative of alpha sign(w) has sign(w_i) / n sum_j g_j sign(w_j) in place of g_i / n.
    """
    rows = filters(w)
    scale = rows.abs().mean(1, keepdim=True).detach()
    slope = 1 / rows.shape[1] + scale * (rows.abs() <= 1)
    return signs(rows, scale, (rows * slope).reshape(w.shape))


def approx_sign_slope(x: Tensor) -> Tensor:
    """2 - 2|x| within [-1, 1], else 0: the derivative of ApproxSign, whose pieces 2x + x^2 and 2x - x^2 lie closer to sign(x) than clamp(x)."""
    return (2 - 2 * x.abs()).clamp(min=0)


def _bi_real_inputs(*, ste: Annotated[str, Pick("approxsign", "identity_clip")] = "approxsign"):
    return input_signs(approx_sign_slope if ste == "approxsign" else inside(-1, 1))


@quantizer("Liu, Wu, Luo, Yang, Liu & Cheng 2018, Bi-Real net: enhancing the performance of 1-bit CNNs with improved representational capability",
           chapter="04", acts=_bi_real_inputs)  # fmt: skip
def bi_real_net(w, *, magnitude_aware: Switch = "on"):
    """Bi-Real net.

    Signs of weights and inputs, with three changes: the derivative of the inputs' sign is ApproxSign's; the weight is mean |w| sign(w), so that its
    gradient g mean |w| 1[|w| <= 1] knows the size of w (mean of a filter, held fixed); and a shortcut carries the real sums around every 1-bit
    convolution, which is the network's part: ``cmlib.lab.nets.bireal`` (survey 001, 2.2.1 (2) [65]).
    """
    rows = filters(w)
    scale = rows.abs().mean(1, keepdim=True).detach() if magnitude_aware == "on" else torch.ones_like(rows[:, :1])
    return signs(rows, scale, (rows * scale * (rows.abs() <= 1)).reshape(w.shape))


# three levels


def best_support(size: Tensor) -> Tensor:
    """Which magnitudes (groups, n) the best ternary weight keeps: the k largest with the greatest (their sum)^2 / k, by sorting."""
    falling = size.sort(1, descending=True).values
    gain = falling.double().cumsum(1).square() / torch.arange(1, size.shape[1] + 1, device=size.device)
    return size >= falling.gather(1, gain.argmax(1, keepdim=True))


@quantizer("Li, Zhang & Liu 2016, Ternary weight networks", chapter="04")
def ternary_weight_networks(w, *, delta_factor: Annotated[float, Span(0, 2)] = 0.7, exact_delta: Switch = "off", per: Per = "tensor"):
    """Ternary weight network (TWN).

    w ~ alpha t, t = sign(w) where |w| > delta and 0 elsewhere; alpha is the mean |w| of what is not 0 (0 where all is), delta the paper's rule
    ``delta_factor`` mean |w|, or ``exact_delta``: the best one, which maximizes (sum of the kept |w|)^2 / their number (survey 001, 2.2.2 [67]).
    The gradient goes straight to the latent weight; alpha is held fixed.
    """
    rows = grouped(w, per)
    size = rows.abs()
    kept = best_support(size) if exact_delta == "on" else size > delta_factor * size.mean(1, keepdim=True)
    alpha = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return Codes(w, 1 + (rows.sign() * kept).long(), alpha.detach(), 3)


def _mean_of(size: Tensor, zone: Tensor, other: Tensor) -> nn.Parameter:
    """The mean magnitude of a zone, of the other one where it is empty, as a number that learns: from 0 it never would."""
    zone = zone if zone.any() else other
    return nn.Parameter((size * zone).sum() / zone.sum().clamp(min=1))


def _zero_zone(size: Tensor, threshold_t: float, target_sparsity: float | None) -> Tensor:
    """Delta: magnitudes up to it become 0."""
    if target_sparsity is None:
        return threshold_t * size.max()
    zeros = round(target_sparsity * size.numel())
    return size.flatten().kthvalue(zeros).values if zeros else size.new_zeros(())


@quantizer("Zhu, Han, Mao & Dally 2017, Trained ternary quantization", chapter="04")
def trained_ternary_quantization(w, *, threshold_t: Annotated[float, Span(0, 0.5)] = 0.05,
                                 target_sparsity: Annotated[float | None, Span(0, 0.9)] = None, state: State | None = None):  # fmt: skip
    """Trained ternary quantization (TTQ).

    W_p where w > delta, -W_n where w < -delta, 0 between; delta = t max |w|, or what makes ``target_sparsity`` of the weights 0. W_p and W_n of each
    layer learn by their true gradients (of W_n it is minus the sum over its zone); the latent weight's gradient is multiplied by W_p, 1 or W_n of
    its zone (survey 001, 2.2.2 [68]). Both start at the mean |w| of their zone; their sizes count, so that neither can turn and swap the zones.
    """
    size = w.detach().abs()
    delta = _zero_zone(size, threshold_t, target_sparsity)
    plus, minus = w > delta, w < -delta
    state = state or {"w_p": _mean_of(size, plus, minus), "w_n": _mean_of(size, minus, plus)}
    w_p, w_n = state["w_p"].abs(), state["w_n"].abs()
    zone = 1 + plus.long() - minus.long()
    slope = torch.stack([w_n, torch.ones_like(w_n), w_p]).detach()[zone]
    return Codes(w * slope, zone.reshape(1, -1), torch.stack([-w_n, torch.zeros_like(w_n), w_p])[None], 3, "table", state=state)


# a few bits


def unit_inputs(*, a_bits: WideBits = 2):
    if a_bits > 16:
        return None
    steps = 2**a_bits - 1
    levels = torch.arange(steps + 1) / steps
    return Steps((levels[1:] + levels[:-1]) / 2, levels)


def _dorefa_errors(g, *, g_bits: WideBits = 32):
    if g_bits == 32:
        return g
    steps = 2**g_bits - 1
    reach = 2 * g.abs().flatten(1).amax(1).reshape(-1, *[1] * (g.dim() - 1))  # of each image
    unit = g / reach.masked_fill(reach == 0, 1) + 0.5
    return reach * ((steps * unit + torch.rand_like(g) - 0.5).round().clamp(0, steps) / steps - 0.5)


@quantizer("Zhou, Wu, Ni, Zhou, Wen & Zou 2016, DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth gradients",
           chapter="04", acts=unit_inputs, errors=_dorefa_errors, exempt={"idempotent": "tanh squashes again what it has squashed"})  # fmt: skip
def dorefa_net(w, *, bits: Bits = 1):
    """DoReFa-Net.

    quantize_k(r) = round((2^k - 1) r) / (2^k - 1) for r in [0, 1]. Weights: 2 quantize_k(tanh(w) / (2 max |tanh w|) + 1/2) - 1, all gradients through
    tanh and its maximum; of one bit sign(w) mean |w|, one scale a layer. Inputs (``a_bits``): quantize_k(clamp(x, 0, 1)); beyond 16 bits they are
    left as they are. Gradients at the layers' outputs (``g_bits``): scaled to each image's greatest and rounded with noise, which keeps them right
    on average; 32 leaves them. (Survey 001, 2.2.4 (1) [75].) 0 is not a level: it goes to the one above.
    """
    if bits == 1:
        return signs(w.reshape(1, -1), w.abs().mean().detach().reshape(1, 1), w)
    steps, t = 2**bits - 1, torch.tanh(w)
    top = t.abs().max()
    soft = t / torch.where(top > 0, top, 1)
    return Codes(soft, (steps * (soft / 2 + 0.5)).round().long().reshape(1, -1), w.new_full((1, 1), 2 / steps), steps + 1)
