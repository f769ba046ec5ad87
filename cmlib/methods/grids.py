"""Chapter 04, quantization: levels known beforehand.

Powers of two, the levels of a normal variable, fixed point, and evenly spaced ones. Leaves give the codes of a weight; ``acts`` of a method is what
it rounds the layers' inputs to, ``errors`` what it rounds the gradients at their outputs to. Of a pruned layer the weight is the vector of what is
left. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Annotated

import torch
from torch import Tensor

from ..core.codes import Codes, Sum, grouped
from ..core.knobs import Per, Pick, Span, Switch, Weight, WideBits
from ..core.method import Training, quantizer
from ..core.packed import Masked, State
from ..core.rounding import Affine, Steps, affine
from ..core.select import highest
from .quantize import filters, signs

Average = Annotated[float, Span(0, 0.9999)]  # how much of the old a moving average keeps
FEW, MANY = 8, 16  # an input of more bits is left as it is: by methods whose levels are listed, and by those whose levels are evenly spaced


def power_codes(w: Tensor, exponent: float, sizes: int) -> Tensor:
    """The level nearest to each weight among 0 and +-2^e, e the ``sizes`` whole numbers up to ``exponent``: its number in the ``powers`` grid.

    Halfway between two, the larger (INQ's rule, a <= |w| < b with both ends halfway); beyond the largest, the largest.
    """
    powers = torch.exp2(exponent - torch.arange(sizes - 1, -1, -1).to(w))
    middles = (powers + torch.cat([powers.new_zeros(1), powers[:-1]])) / 2
    return sizes + torch.bucketize(w.abs(), middles, right=True) * torch.where(w < 0, -1, 1)


PARTITIONS = ("pruning_inspired", "random")


def taken(flat: Tensor, state: State, portion: float, partition: str, index: Callable[[Tensor], Tensor]) -> State:
    """``state`` with a ``portion`` of all weights ``frozen``, the largest first or by chance; those that come in now at the level ``index`` says."""
    due = max(0, round(portion * len(flat)) - int(state["frozen"].sum()))
    if not due:
        return state
    worth = flat.abs() if partition == "pruning_inspired" else torch.rand(len(flat), generator=torch.Generator().manual_seed(0)).to(flat)
    new = highest(worth.masked_fill(state["frozen"], -1), due)
    return {**state, "frozen": state["frozen"] | new, "index": torch.where(new, index(flat), state["index"])}


def partly(codes: Codes, state: State) -> Codes | Sum:
    """The codes of what is ``frozen``, and the float weights of the rest, whose level must be 0."""
    if state["frozen"].all():
        return replace(codes, state=state)
    w = codes.values
    return Sum(w, (codes, Masked(w, ~state["frozen"].reshape(w.shape))), state=state)


@quantizer("Zhou, Yao, Guo, Xu & Chen 2017, Incremental network quantization: towards lossless CNNs with low-precision weights",
           chapter="04", exempt={"trains": "with a portion of 1 every weight is rounded at once, and stays"})  # fmt: skip
def inq(
    w, *, bits: Annotated[int, Span(2, 8, integer=True)] = 5, portion: Weight = 1.0,
    partition: Annotated[str, Pick(*PARTITIONS)] = PARTITIONS[0], state: State | None = None,
):  # fmt: skip
    """Incremental network quantization (INQ).

    The ``portion`` of largest weights becomes 0 or +-2^n, n = n_2 ... n_1, n_1 = floor(log2(4 max|W| / 3)), n_2 = n_1 + 1 - 2^(bits - 1) / 2, and
    stays so; the others are float and learn. The portion is turned up in stages with training between, 0.5, 0.75, 0.875, 1
    (``cmlib.lab.stages``): what was rounded stays, and so does n_1 (survey 001, 2.2.5 [87]; it says that the smallest go first, the paper takes the
    largest). A layer of zeros has n_1 = -1.
    """
    flat, sizes = w.detach().flatten(), 1 << bits - 2
    if state is None:
        exponent = flat.new_tensor([[math.frexp(4 * flat.abs().max().item() / 3)[1] - 1.0]])  # frexp: exact where log2 is not
        state = {"exponent": exponent, "frozen": torch.zeros_like(flat, dtype=torch.bool), "index": torch.full_like(flat, sizes, dtype=torch.long)}
    state = taken(flat, state, portion, partition, lambda v: power_codes(v, state["exponent"].item(), sizes))
    return partly(Codes(w, state["index"][None], state["exponent"], 2 * sizes + 1, "powers", straight=False), state)


@lru_cache
def half_gaussian(count: int, first: float = 1.0, free: bool = False, start: float = 0.0) -> tuple[float, ...]:
    """The ``count`` levels of least mean squared error for what of a normal variable of variance 1 is above ``start``.

    Multiples ``first``, first + 1, ... of one step, or ``free`` ones (Lloyd). Cells end halfway between levels, the first begins at ``start``.
    """
    multiples = first + torch.arange(count, dtype=torch.float64)

    def better(q: Tensor) -> Tensor:  # the best levels for the cells of q
        edges = torch.cat([q.new_zeros(1), (q[1:] + q[:-1]) / 2, q.new_full((1,), math.inf)]).clamp(min=start)
        mass, mean = torch.special.ndtr(edges).diff(), -torch.exp(-(edges**2) / 2).diff() / math.sqrt(2 * math.pi)  # of the cells: P, E[x]
        return mean / mass if free else multiples * (multiples @ mean) / (multiples**2 @ mass)

    if not free:  # where the best step for the cells is longer than the one that made them, so is the best of all
        low, high = 0.0, 4.0
        for _ in range(50):
            step = (low + high) / 2
            low, high = (step, high) if better(multiples * step)[0] > multiples[0] * step else (low, step)
        return tuple((multiples * low).tolist())
    q, last = multiples * 3 / count, torch.zeros_like(multiples)
    while (q - last).abs().max() > 1e-7:
        q, last = better(q), q
    return tuple(q.tolist())


def clipped_relu(x: Tensor, top: float, unit: float) -> Tensor:
    """1 between 0 and the highest level, else 0."""
    return ((x > 0) & (x <= top)).to(x)


def log_tailed(x: Tensor, top: float, unit: float) -> Tensor:
    """As the clipped one, but 1 / (x - (top - 1)) above the highest level, x and top in units."""
    return (x > 0) / ((x - top) / unit + 1).clamp(min=1)


def vanilla_relu(x: Tensor, top: float, unit: float) -> Tensor:
    """1 above 0."""
    return (x > 0).to(x)


SLOPES: dict[str, Callable[[Tensor, float, float], Tensor]] = {f.__name__: f for f in (clipped_relu, log_tailed, vanilla_relu)}


def half_levels(unit: Tensor, bits: int, start: float = 0.0, free: bool = False) -> tuple[Tensor, Tensor]:
    """(thresholds, levels) of 0 and the 2^bits - 1 levels of ``half_gaussian``, in units of ``unit``: what is above ``start`` is at least q_1."""
    q = unit.new_tensor(half_gaussian((1 << bits) - 1, free=free, start=start)) * unit
    first = (start * unit).reshape(1).clamp(min=torch.finfo(q.dtype).tiny)
    return torch.cat([first, torch.maximum((q[1:] + q[:-1]) / 2, first)]), torch.cat([q.new_zeros(1), q])


def half_wave(x: Tensor, bits: int, state: State | None, start: float = 0.0, backward: str = "clipped_relu", free: bool = False) -> Steps:
    """Inputs by ``half_levels``; the unit is the root mean square of those above 0, the half wave, averaged over the last few batches."""
    power = x.clamp(min=0).square().sum() / (x > 0).sum().clamp(min=1)
    power = (state["power"] + power) / 2 if state else power
    unit = power.sqrt() if power > 0 else torch.ones_like(power)
    thresholds, q = half_levels(unit, bits, start, free)
    return Steps(thresholds, q, partial(SLOPES[backward], top=q[-1].item(), unit=unit.item()), state={"power": power})


def _hwgq_inputs(
    x, *, a_bits: WideBits = 2, levels: Annotated[str, Pick("uniform", "lloyd")] = "uniform",
    backward: Annotated[str, Pick(*SLOPES)] = "clipped_relu", state: State | None = None,
):  # fmt: skip
    return half_wave(x, a_bits, state, backward=backward, free=levels == "lloyd") if a_bits <= FEW else None


@quantizer("Cai, He, Sun & Vasconcelos 2017, Deep learning with low precision by half-wave Gaussian quantization", chapter="04", acts=_hwgq_inputs)
def hwgq(w, *, binarize_weights: Switch = "on"):
    """Half-wave Gaussian quantization (HWGQ).

    Inputs become 0 where they are not above it, else one of 2^a_bits - 1 levels, the best for the positive half of a normal variable, ``uniform``
    or ``lloyd``; weights mean|w| sign(w), as in binary-weight networks (survey 001, 2.2.5 [88]). Backward, the levels count as a ReLU
    (``vanilla_relu``), one with slope 0 above the highest level (``clipped_relu``), or with a slope that falls there as 1 / x (``log_tailed``). The
    levels are those of N(0, 1), fixed; the unit that they are in is the inputs' own root mean square above 0 (in training averaged over the last few
    batches), since not every layer here has a batch norm before it. Inputs of more than 8 bits are left as they are.
    """
    if binarize_weights == "off":
        return Masked(w, torch.ones_like(w, dtype=torch.bool), "dense")
    rows = filters(w.detach())
    return signs(rows, rows.abs().mean(1, keepdim=True), w)


def fixed_point(x: Tensor, word_bits: int, fractional_bits: int, rounding: str = "nearest") -> Tensor:
    """The whole numbers q by which 2^-fractional_bits q stands for x, as far as a word of ``word_bits`` (its sign among them) reaches.

    ``nearest`` (halfway, the lower) or ``stochastic``: up with the probability x 2^fractional_bits - floor, so that the mean is x.
    """
    scaled = x * 2.0**fractional_bits
    low = scaled.floor()
    up = (torch.rand_like(x) if rounding == "stochastic" else 0.5) < scaled - low
    most = 2.0 ** (word_bits - 1)
    return (low + up).clamp(-most, most - 1)


Fraction = Annotated[int, Span(4, 20, integer=True)]
Mode = Annotated[str, Pick("nearest", "stochastic")]


def _to_grid(w, *, word_bits, fractional_bits, rounding):
    return fixed_point(w, word_bits, fractional_bits, rounding) * 2.0**-fractional_bits


def _fixed_inputs(*, a_bits: WideBits = 16, fractional_bits: Fraction = 12):
    if a_bits > MANY:
        return None
    return Affine(torch.tensor(2.0**-fractional_bits), torch.tensor(2.0 ** (a_bits - 1)), 1 << a_bits)


def _fixed_errors(g, *, g_bits: WideBits = 32, fractional_bits: Fraction = 12, rounding: Mode = "stochastic"):
    return g if g_bits == 32 else _to_grid(g, word_bits=g_bits, fractional_bits=fractional_bits, rounding=rounding)


@quantizer("Gupta, Agrawal, Gopalakrishnan & Narayanan 2015, Deep learning with limited numerical precision",
           chapter="04", training=Training(project=_to_grid), acts=_fixed_inputs, errors=_fixed_errors)  # fmt: skip
def stochastic_rounding_fixed_point(
    w, *, word_bits: Annotated[int, Span(8, 16, integer=True)] = 16, fractional_bits: Fraction = 12, rounding: Mode = "stochastic"
):
    """Fixed point with stochastic rounding.

    Weights 2^-FL q in words of ``word_bits``, FL the ``fractional_bits``. No float weight stands behind them: the result of each step is rounded, up
    with a probability that keeps the mean, so that steps smaller than 2^-FL count too (survey 001, 2.2.4 (1) Table 4 [79]). Inputs (to nearest) and
    gradients at the outputs have words of ``a_bits`` and ``g_bits`` and the same FL; more than 16 bits leave inputs as they are, 32 gradients. A word
    reaches 2^(word_bits - 1 - FL): 8 for 16 bits and FL = 12, 1/32 for 8 bits, where most weights are clipped; lower FL with the word.
    """
    q, half = fixed_point(w.detach(), word_bits, fractional_bits), 1 << word_bits - 1
    return Codes(w, q.long().reshape(1, -1) + half, w.new_tensor([[2.0**-fractional_bits, half]]), 1 << word_bits)


def ranges(x, *, a_bits: WideBits = 8, ema_decay: Average = 0.99, state: State | None = None):
    if a_bits > MANY:
        return None
    low, high = x.aminmax()
    if state is not None:
        low, high = (ema_decay * old + (1 - ema_decay) * new for old, new in ((state["low"], low), (state["high"], high)))
    return affine(low, high, 1 << a_bits, {"low": low, "high": high})


@quantizer("Jacob et al. 2018, Quantization and training of neural networks for efficient integer-arithmetic-only inference",
           chapter="04", acts=ranges)  # fmt: skip
def integer_only_quantization(w, *, bits: Annotated[int, Span(2, 8, integer=True)] = 8, per: Per = "tensor"):
    """Integer-arithmetic-only inference.

    r = S (q - Z), between the least and greatest weight, or a moving average of those of the inputs, and 0 always exact: a layer is then a product of
    whole numbers and one rescaling (survey 001, 2.2.4 (1) Table 4 [81]; ``cmlib.lab.integer`` runs it so). Training sees the rounded values, and the
    gradient goes straight through. Inputs of more than 16 bits are left as they are.
    """
    g = grouped(w.detach(), per)
    grid = affine(g.amin(1, keepdim=True), g.amax(1, keepdim=True), 1 << bits)
    return Codes(w, grid.quantize(g).long(), torch.cat([grid.scale, grid.zero], 1), grid.count)
