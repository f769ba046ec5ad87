"""Chapter 04, quantization: number formats.

For training and for sending: shared exponents, 8-bit floating point, the dynamic tree. Leaves give the codes of a weight; ``acts`` of a method is
what it rounds the layers' inputs to, ``errors`` what it rounds the gradients at their outputs to. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.codes import Codes, grouped, nearest_level
from ..core.knobs import Per, Pick, Span, Switch, WideBits
from ..core.method import Training, quantizer
from ..core.packed import State
from ..core.rounding import Affine, Floating, round_float
from .fewbits import Wide
from .grids import Mode, integer_only_quantization, ranges

Mantissa = Annotated[int, Span(4, 16, integer=True)]
Exponent = Annotated[int, Span(3, 8, integer=True)]


def finest(most: float, mantissa_bits: int, exponent_bits: int) -> int:
    """The greatest e at which 2^-e (2^(mantissa_bits - 1) - 1) still reaches ``most``; e is one of 2^exponent_bits numbers, a quarter below 0."""
    greatest = 2 ** (mantissa_bits - 1) - 1
    e = math.frexp(greatest / most)[1] - 1 if most > 0 else math.inf
    quarter = 2 ** (exponent_bits - 2)
    return int(min(max(e, -quarter), 3 * quarter - 1))


def flex(x: Tensor, e: int, mantissa_bits: int) -> Tensor:
    """The whole numbers m, of so many bits, by which 2^-e m stands for x."""
    most = 2.0 ** (mantissa_bits - 1)
    return (x * 2.0**e).round().clamp(-most, most - 1)


def predicted(history: Tensor, headroom: float) -> float:
    """Autoflex's guess of the next largest magnitude: headroom (max + 3 standard deviations) of the last ones."""
    return headroom * (history.max() + 3 * history.std(correction=0)).item()


Headroom = Annotated[float, Span(1, 4)]


def _autoflex(x, *, mantissa_bits: Mantissa = 16, exponent_bits: Exponent = 5, autoflex_headroom: Headroom = 2.0,
              history_length: Annotated[int, Span(4, 64, integer=True)] = 16, state: State | None = None):  # fmt: skip
    history = x.abs().max().reshape(1) if state is None else state["history"]
    e = finest(predicted(history, autoflex_headroom), mantissa_bits, exponent_bits)
    scale, half = torch.tensor(2.0**-e).to(x), 2 ** (mantissa_bits - 1)
    most, reach = x.abs().max(), scale * (half - 1)
    later = torch.cat([history, most.reshape(1)])[-history_length:] if most <= reach else 2 * reach.reshape(1)  # after an overflow anew
    return Affine(scale, torch.tensor(float(half)).to(x), 2 * half, state={"history": later})


def _flex_errors(g, *, mantissa_bits: Mantissa = 16, exponent_bits: Exponent = 5):
    most = g.abs().max().item()
    shift = math.frexp(most)[1]  # gradients are counted in units of the power of two above the largest
    e = finest(most * 2.0**-shift, mantissa_bits, exponent_bits)
    return flex(g * 2.0**-shift, e, mantissa_bits) * 2.0 ** (shift - e)


@quantizer("Koster et al. 2017, Flexpoint: an adaptive numerical format for efficient training of deep neural networks",
           chapter="04", acts=_autoflex, errors=_flex_errors)  # fmt: skip
def flexpoint(w, *, mantissa_bits: Mantissa = 16, exponent_bits: Exponent = 5):
    """Flexpoint.

    A tensor is whole numbers of ``mantissa_bits`` and one exponent for all, x = 2^-e m, so that inside a layer all is fixed point (survey 001, 2.2.4
    (1) [77]). A weight's e is the finest that holds its largest; what is some 2^-15 of it is lost. Of inputs Autoflex sets e before they come,
    for ``autoflex_headroom`` times (maximum + 3 deviations) of their last largest; an overflow doubles the reach and starts the history anew.
    Gradients at the outputs take their own largest. Weights are rounded for each forward pass; behind them stands a float weight.
    """
    e, half = finest(w.detach().abs().max().item(), mantissa_bits, exponent_bits), 2 ** (mantissa_bits - 1)
    return Codes(w, flex(w.detach(), e, mantissa_bits).long().reshape(1, -1) + half, w.new_tensor([[2.0**-e, half]]), 2 * half)


def chunked_sum(x: Tensor, chunk: int, mantissa: int = 9, exponent: int = 6) -> Tensor:
    """The sum of x along its last axis as an accumulator of so many bits has it, rounded after every addition: first inside chunks, then of these."""

    def accumulated(x: Tensor) -> Tensor:
        total = torch.zeros_like(x[..., 0])
        for one in x.unbind(-1):
            total = round_float(total + one, exponent, mantissa)
        return total

    return accumulated(accumulated(F.pad(x, (0, -x.shape[-1] % chunk)).unflatten(-1, (-1, chunk))))


Small = Annotated[int, Span(1, 5, integer=True)]


def _float_inputs(*, mantissa_bits: Small = 2):
    return Floating(torch.tensor(5.0), torch.tensor(float(mantissa_bits)))


def _float_errors(g, *, mantissa_bits: Small = 2, loss_scale: Annotated[float, Span(1, 65536, log=True)] = 1000.0):
    return round_float(g * loss_scale, 5, mantissa_bits) / loss_scale


@quantizer("Wang, Choi, Brand, Chen & Gopalakrishnan 2018, Training deep neural networks with 8-bit floating point numbers",
           chapter="04", acts=_float_inputs, errors=_float_errors,
           training=Training(project=lambda w, *, update_rounding: round_float(w, 6, 9, update_rounding)))  # fmt: skip
def fp8_training(w, *, mantissa_bits: Small = 2, update_rounding: Mode = "stochastic"):
    """Training with 8-bit floating point (FP8).

    Weights, inputs and gradients at the outputs (times ``loss_scale``) are rounded to a sign, 5 bits of exponent and 2 of mantissa; the weight that
    the steps are added to has 6 and 9, rounded with chance, for a step below half a unit would else be lost (survey 001, 2.2.4 (1) [78]). The
    products' sums have (1, 6, 9) too, in chunks of 64, or they stall: ``chunked_sum``; the layers here add up in float. The paper's format may
    treat overflow otherwise; here the largest number stands for all beyond it. First and last layer: 16 bits, ``where="*, !first, !last"``.
    """
    params = w.new_tensor([[5, mantissa_bits]])
    codes = Codes(w, torch.zeros(1, w.numel(), dtype=torch.long, device=w.device), params, (31 << 1 + mantissa_bits) - 1, "floats")
    codes.index.copy_(torch.searchsorted(codes.levels[0], round_float(w.detach(), 5, mantissa_bits).reshape(1, -1)))
    return codes


def stochastic(g: Tensor, bits: int) -> Tensor:
    """g on 2^bits - 1 even levels up to its greatest magnitude, 0 among them, up with the chance that keeps the mean."""
    most = 2 ** (bits - 1) - 1
    step = g.abs().max() / most
    step = torch.where(step > 0, step, 1)
    return (g / step + torch.rand_like(g)).floor().clamp(-most, most) * step


def range_scale(x: Tensor, chunks: int = 1) -> Tensor:
    """What range batch norm has for the standard deviation of each column of x (N, C): C(n) (max - min), C(n) = 1 / (2 sqrt(2 ln n)).

    It is the mean over so many ``chunks`` of n rows, since the two ends of a batch are noisy.
    """
    parts = x.chunk(chunks)
    return sum((p.amax(0) - p.amin(0)) / (2 * math.sqrt(2 * math.log(max(len(p), 2)))) for p in parts) / len(parts)


def _eight_bit_errors(g, *, g_bits: WideBits = 8):
    return stochastic(g, g_bits) if 2 <= g_bits < 32 else g


def _sixteen_bit_copy(g, rounded, *, bifurcation: Switch = "on"):
    return stochastic(g, 16) if bifurcation == "on" else rounded


@quantizer("Banner, Hubara, Hoffer & Soudry 2018, Scalable methods for 8-bit training of neural networks",
           chapter="04", acts=ranges, errors=_eight_bit_errors, weight_errors=_sixteen_bit_copy)  # fmt: skip
def scalable_8bit_training(w, *, bits: Wide = 8):
    """Scalable 8-bit training: gradient bifurcation.

    Weights and inputs take 2^bits even levels between their least and greatest, as in ``integer_only_quantization``; the gradient at a layer's
    outputs forks: what goes down to the inputs comes of ``g_bits`` (8), stochastically rounded, so that its mean stays; the weights' gradient, off
    which no other hangs, of a copy of 16 (survey 001, 2.2.4 (1) Table 4 [82]). Range batch norm is the network's part:
    ``cmlib.lab.nets.range_normed``. Gradients' levels are even about 0 here, so that nothing is cut off at either end.
    """
    return integer_only_quantization(w, bits=bits)


def eight_bits(x: Tensor, datatype: str, per: str) -> tuple[Tensor, Tensor, int, str]:
    """x in 8 bits a number, each group in units of its greatest magnitude: (index, params, count, grid)."""
    rows = grouped(x, per)
    most = rows.abs().amax(1, keepdim=True)
    params, count, grid = (most, 256, "tree") if datatype == "dynamic_tree" else (most / 127, 255, "linear")
    unit = Codes(x, rows.long(), torch.ones_like(params[:1]) / (1 if grid == "tree" else 127), count, grid).levels
    return nearest_level(rows / torch.where(most > 0, most, 1), unit.expand(len(rows), -1)), params, count, grid


Datatype = Annotated[str, Pick("dynamic_tree", "linear8")]


def _sent(g, *, datatype: Datatype = "dynamic_tree", compress_errors: Switch = "on"):
    if compress_errors == "off":
        return g
    index, params, count, grid = eight_bits(g, datatype, "tensor")
    return Codes(g, index, params, count, grid).rounded()


@quantizer("Dettmers 2016, 8-bit approximations for parallelism in deep learning",
           chapter="04", errors=_sent, exempt={"idempotent": "the tree has +1 but not -1: where the greatest is negative, it shrinks"})  # fmt: skip
def dettmers_8bit(w, *, datatype: Datatype = "dynamic_tree", per: Per = "tensor"):
    """8-bit approximations: the dynamic tree.

    Numbers divided by their greatest magnitude go into 8 bits: a sign, z zeros for 10^-z, a one, and the remaining bits a fraction from 0.1 to 1, so
    that seven powers of ten are held, the large ones finely; ``linear8`` is evenly spaced (survey 001, 2.2.4 (1) Table 4 [80]). Meant for what
    machines send one another, gradients and activations, while all work is done in float: here the weights and the gradients at the outputs. The
    paper's static tree and its 8-bit mantissa are not here.
    """
    return Codes(w, *eight_bits(w.detach(), datatype, per))
