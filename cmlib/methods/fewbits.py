"""Chapter 04, quantization: few bits in training too.

Weights, inputs and gradients, so that training multiplies little or keeps little. Leaves give the codes of a weight; of their companions ``acts``
rounds the layers' inputs, ``errors`` the gradients at their outputs, ``saves`` what is kept of the inputs for the weights' gradient. (Survey sections
are of the 2020 survey, 001.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.codes import Codes, Sum
from ..core.knobs import Pick, Span, Switch, WideBits
from ..core.method import Training, quantizer
from ..core.packed import Masked, State
from ..core.rounding import Affine, affine
from ..core.select import highest
from .grids import Mode
from .quantize import ap2, binaryconnect, glorot, unit_inputs


def reach_of(w: Tensor, lr_scale_by_init: str) -> float:
    """What stands for 1 in the latent weight: ``binaryconnect`` says why."""
    return glorot(w) if lr_scale_by_init == "on" else 1.0


def _inside_reach(w, *, lr_scale_by_init):
    reach = reach_of(w, lr_scale_by_init)
    return w.clamp(-reach, reach)


def power_of_two(x: Tensor, low: int, high: int, rounding: str = "stochastic") -> Tensor:
    """x as 0 or +-2^k, k from ``low`` to ``high``: up with the chance that keeps the mean, or to the nearest (halfway, the lower)."""
    size = x.abs().clamp(max=2.0**high)
    below = torch.exp2(torch.frexp(size).exponent.to(x) - 1)
    below, gap = torch.where(size < 2.0**low, 0, below), torch.where(size < 2.0**low, 2.0**low, below)
    up = (torch.rand_like(x) if rounding == "stochastic" else 0.5) * gap < size - below
    return x.sign() * (below + gap * up)


def _shifts(x, *, quantized_backprop: Switch = "on", min_exponent: Annotated[int, Span(-8, -1, integer=True)] = -4,
            max_exponent: Annotated[int, Span(0, 8, integer=True)] = 4, rounding: Mode = "stochastic"):  # fmt: skip
    return power_of_two(x, min_exponent, max_exponent, rounding) if quantized_backprop == "on" else x


@quantizer("Lin, Courbariaux, Memisevic & Bengio 2016, Neural networks with few multiplications",
           chapter="04", training=Training(project=_inside_reach), saves=_shifts)  # fmt: skip
def few_multiplications(w, training=False, *, connect: Annotated[str, Pick("binary", "ternary")] = "ternary", lr_scale_by_init: Switch = "on"):
    """Neural networks with few multiplications.

    In training a weight is sign(w) with probability |w|, else 0 (``binary``: BinaryConnect's -1 or +1), so that its mean is w and a layer only adds.
    Back, the inputs in the weight's gradient (and only there) are rounded to powers of two, so that its products are shifts
    (survey 001, 2.2.4 (1) [74]). In evaluation the likelier of the two is taken. The latent weight is scaled and clipped as BinaryConnect's.
    """
    if connect == "binary":
        return binaryconnect(w, training, mode="stochastic", lr_scale_by_init=lr_scale_by_init)
    rows = w.detach().reshape(1, -1) / reach_of(w, lr_scale_by_init)
    taken = rows.abs() > (torch.rand_like(rows) if training else 0.5)
    return Codes(w, 1 + (rows.sign() * taken).long(), w.new_ones(1, 1), 3)


FewBits = Annotated[int, Span(2, 8, integer=True)]


@quantizer("Mishra, Nurvitadhi, Cook & Marr 2018, WRPN: wide reduced-precision networks", chapter="04", acts=unit_inputs, a_bits=4)
def wrpn(w, *, bits: FewBits = 2, lr_scale_by_init: Switch = "on"):
    """Wide reduced-precision network (WRPN).

    w_q = round((2^(k-1) - 1) clamp(w, -1, 1)) / (2^(k-1) - 1): 2^k - 1 levels with 0 among them; inputs round((2^k - 1) clamp(x, 0, 1)) / (2^k - 1),
    often of fewer bits than the weights. What that loses, m times the channels win back, at m^2 times the products: the network's part, m^2 w_bits
    a_bits / 1024 of the float one's work (survey 001, 2.2.4 (1) [76]). With ``lr_scale_by_init`` 1 is the reach of Glorot's starting weights, else
    a trained network's weights are all rounded to 0. Outside the reach no gradient passes.
    """
    reach, steps = reach_of(w, lr_scale_by_init), 2 ** (bits - 1) - 1
    soft = w.clamp(-reach, reach)
    return Codes(soft, (steps * soft / reach).round().long().reshape(1, -1) + steps, w.new_full((1, 1), reach / steps), 2 * steps + 1)


def in_units(x: Tensor, bits: int) -> Tensor:
    """WAGE's Q(x, k), in units of 2^(1 - k): whole numbers, of less than 2^(k - 1) either way."""
    most = 2.0 ** (bits - 1) - 1
    return (x * 2.0 ** (bits - 1)).round().clamp(-most, most)


def layer_shift(w: Tensor, bits: int) -> float:
    """WAGE's alpha = max(Shift(L_min / L), 1): L = sqrt(6 / fan in), the reach of the starting weights, L_min = 1.5 steps of 2^(1 - bits)."""
    fan_in = w[0].numel() if w.dim() > 1 else 1
    return max(2.0 ** round(math.log2(1.5 * 2.0 ** (1 - bits) * math.sqrt(fan_in / 6))), 1.0)


Wide = Annotated[int, Span(4, 16, integer=True)]


def _unit_integers(*, a_bits: WideBits = 8):
    return Affine(torch.tensor(2.0 ** (1 - a_bits)), torch.tensor(2.0 ** (a_bits - 1) - 1), 2**a_bits - 1) if 2 <= a_bits <= 16 else None


def _unit_errors(g, *, e_bits: Wide = 8):
    reach = ap2(g.abs().max())
    return in_units(g / torch.where(reach > 0, reach, 1), e_bits) * 2.0 ** (1 - e_bits) * reach


def _integer_steps(g, lr, *, bits, g_bits, eta):
    reach = ap2(g.abs().max())
    steps = eta * g / torch.where(reach > 0, reach, 1)
    return (steps + torch.rand_like(g)).floor() * 2.0 ** (1 - g_bits) / layer_shift(g, bits) / lr


def _on_the_grid(w, *, bits, g_bits):
    alpha = layer_shift(w, bits)
    return in_units(w * alpha, g_bits) * 2.0 ** (1 - g_bits) / alpha


@quantizer("Wu, Li, Chen & Shi 2018, Training and inference with integers in deep neural networks",
           chapter="04", acts=_unit_integers, errors=_unit_errors, training=Training(gradient=_integer_steps, project=_on_the_grid))  # fmt: skip
def wage(w, *, bits: FewBits = 2, g_bits: Wide = 8, eta: Annotated[float, Span(0.25, 8, log=True)] = 1.0):
    """WAGE: weights, activations, gradients and errors as integers.

    Q(x, k) = sigma round(x / sigma) within +-(1 - sigma), sigma = 2^(1 - k). Weights are Q(alpha w, bits) / alpha, alpha a power of two of the layer,
    in place of batch norm; inputs Q(x, a_bits); errors Q(e / r, e_bits) r, r the power of two nearest to the greatest (the paper drops r, on which
    no step depends). The step is sigma(g_bits) times the whole number that eta g / r is rounded to by chance, whatever the rate; what it is added to
    has g_bits (survey 001, 2.2.4 (1) Table 4 [83]). Train with plain SGD: momentum or decay would leave the whole numbers.
    """
    most, alpha = 2 ** (bits - 1) - 1, layer_shift(w, bits)
    return Codes(w, in_units(w.detach() * alpha, bits).long().reshape(1, -1) + most, w.new_full((1, 1), 2.0 ** (1 - bits) / alpha), 2 * most + 1)


GRANULARITY = {"pixel": (2, 3, 0, 1), "row": (2, 0, 1, 3), "layer": (0, 1, 2, 3)}  # the axes of a convolution's weight, those of the groups first


def _fixed_point(x, *, a_bits: Annotated[int, Span(2, 8, integer=True)] = 8):
    whole = math.frexp(x.max().item())[1] if x.max() > 0 else 0
    return Affine(torch.tensor(2.0 ** (whole - a_bits)), torch.tensor(0.0), 1 << a_bits)


@quantizer("Faraone, Fraser, Blott & Leong 2018, SYQ: learning symmetric quantization for efficient deep neural networks",
           chapter="04", acts=_fixed_point)  # fmt: skip
def syq(w, *, bits: Annotated[int, Span(1, 2, integer=True)] = 2, granularity: Annotated[str, Pick(*GRANULARITY)] = "pixel",
        eta: Annotated[float, Span(0, 0.3)] = 0.05, state: State | None = None):  # fmt: skip
    """Symmetric quantization (SYQ).

    w ~ alpha q, q = sign(w), or of 2 bits 0 where |w| <= eta max |w|; a learned alpha for each place of the kernel (``pixel``), each of its rows, or
    the layer, so that an output takes only as many products. alpha starts at the mean |w| of what is not 0, the best one, and has its true
    gradient; that of w is alpha g (survey 001, 2.2.4 (2) [85]). Its size counts, so that no group turns. Inputs are unsigned fixed point
    up to the power of two above their largest. A dense layer has one alpha.
    """
    axes = GRANULARITY[granularity] if w.dim() == 4 else ()
    laid = w.permute(axes) if axes else w
    groups = {"pixel": math.prod(laid.shape[:2]), "row": laid.shape[0], "layer": 1}[granularity] if axes else 1
    rows = laid.reshape(groups, -1)
    size = rows.detach().abs()
    kept = size > eta * size.max() if bits == 2 else torch.ones_like(size, dtype=torch.bool)
    state = state or {"alpha": nn.Parameter((size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1))}
    alpha = state["alpha"].abs()
    index = 1 + (rows.sign() * kept).long() if bits == 2 else (rows >= 0).long()
    soft = (rows * alpha.detach()).reshape(laid.shape)
    soft = soft.permute(sorted(range(4), key=axes.__getitem__)) if axes else soft
    return Codes(soft, index, alpha if bits == 2 else 2 * alpha, 1 + bits, axes=axes, state=state)


def v_split(x: Tensor, percent: float, bits: int) -> tuple[Tensor, Affine]:
    """Where the ``percent`` largest magnitudes are, and evenly spaced levels for the others, 0 among them."""
    large = highest(x.abs().flatten(), round(percent / 100 * x.numel())).reshape(x.shape)
    rest = x.masked_fill(large, 0)
    return large, affine(rest.min(), rest.max(), 1 << bits)


Percent = Annotated[float, Span(0, 10)]
Use = Annotated[str, Pick("saved_activations", "weights", "both")]


def _v_saved(x, *, large_ratio_percent: Percent = 2.0, low_bits: FewBits = 3, use: Use = "both"):
    if use == "weights":
        return x
    large, grid = v_split(x, large_ratio_percent, low_bits)
    return torch.where(large, x, grid.rounded(x))


@quantizer("Park, Yoo & Vajda 2018, Value-aware quantization for training and inference of neural networks",
           chapter="04", saves=_v_saved, exempt={"idempotent": "rounded, one of the others may be larger than one that was kept"})  # fmt: skip
def value_aware_quantization(w, *, large_ratio_percent: Percent = 2.0, low_bits: FewBits = 3, use: Use = "both"):
    """Value-aware quantization (V-Quant).

    The few largest magnitudes stay exact, in a sparse list; the others, whose range is now much smaller, take 2^low_bits even levels. Training reads
    the inputs as they are and passes the error down exactly, but keeps them so quantized for the weight's gradient, which saves memory (survey 001,
    2.2.5 [93]). The large ones take 32 bits here, 16 in the paper; which they are a sort says, in the paper a sample of it.
    """
    large, grid = v_split(w.detach(), large_ratio_percent, low_bits)
    if use == "saved_activations" or large.all():
        return Masked(w, torch.ones_like(large), "dense")
    index = grid.quantize(w.detach().masked_fill(large, 0)).long().reshape(1, -1)
    codes = Codes(w.masked_fill(large, 0), index, torch.stack([grid.scale, grid.zero])[None], grid.count)
    return Sum(w, (codes, Masked(w, large))) if large.any() else replace(codes, values=w)
