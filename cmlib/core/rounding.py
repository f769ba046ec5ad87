"""To what a layer's inputs are rounded: levels of any kind, evenly spaced ones, small floating-point numbers.

``Steps`` is any rounding of real numbers to a few levels; ``Affine`` the evenly spaced one, which is faster; ``Floating`` a number format. All are
small plain tensors, so that they go to disk beside the weight. ``sites`` puts one in front of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import storage
from .packed import Arrays, State, laid_like


class Straight(torch.autograd.Function):
    """``rounded`` in the forward pass; in the backward pass the gradient goes to ``x`` times ``slope``, and whole to ``rounded``."""

    @staticmethod
    def forward(ctx, x, rounded, slope):
        ctx.save_for_backward(slope)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, g):
        (slope,) = ctx.saved_tensors
        return g * slope, g if ctx.needs_input_grad[1] else None, None


def inside(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """The slope of the clipped straight-through line: 1 from ``low`` to ``high``, both included, else 0."""
    return lambda x: ((x >= low) & (x <= high)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Steps:
    """``levels`` (count,), rising, the i-th where x lies from ``thresholds[i - 1]`` on and below ``thresholds[i]``.

    ``slope`` is what stands for the derivative in training (1 between the outer levels, if not given). ``spread``: the layer's output is
    multiplied by the mean of |x| over the inputs that each output sees (XNOR-Net's K). ``order``: what an output sees is a sum of so many
    such signs, each of what those before it left and times its mean size (HORQ); 0 for none.
    """

    thresholds: Tensor
    levels: Tensor
    slope: Callable[[Tensor], Tensor] | None = None
    spread: bool = False
    state: State = field(default_factory=dict)
    order: int = 0

    @property
    def count(self) -> int:
        return len(self.levels) ** max(1, self.order)

    def rounded(self, x: Tensor) -> Tensor:
        levels, thresholds = self.levels.to(x), self.thresholds.to(x)
        if len(self.levels) == 2:  # a comparison is three times as fast as a search
            return torch.where(x.detach() >= thresholds, levels[1], levels[0])
        return laid_like(levels[torch.bucketize(x.detach().contiguous(), thresholds, right=True)], x)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.rounded(x)
        return Straight.apply(x, self.rounded(x), self.derivative(x.detach()))

    def derivative(self, x: Tensor) -> Tensor:
        return (self.slope or inside(*self.levels[[0, -1]].tolist()))(x)

    def arrays(self) -> Arrays:
        return {"thresholds": self.thresholds.detach().cpu().numpy(), "levels": self.levels.detach().cpu().numpy()}

    def frozen(self) -> Steps:
        return replace(self, thresholds=self.thresholds.detach().clone(), levels=self.levels.detach().clone(), state={})

    def meta(self) -> dict[str, Any]:
        return {"type": "steps", "spread": self.spread, "order": self.order}

    @classmethod
    def decode(cls, arrays: Arrays, meta: dict[str, Any]) -> Steps:
        thresholds, levels = (torch.from_numpy(arrays[n].copy()) for n in ("thresholds", "levels"))
        flat = levels.dim() == thresholds.dim() == 1
        storage.need(flat and 0 < len(levels) <= 1 << 16 and len(thresholds) == len(levels) - 1, "thresholds and levels of an input do not fit")
        storage.need(bool((thresholds.diff() >= 0).all()) and bool(levels.isfinite().all()), "thresholds do not rise, or a level is not finite")
        storage.need(meta.get("order", 0) in range(5), "an input is a sum of at most 4 signs")
        return cls(thresholds, levels, spread=bool(meta["spread"]), order=meta.get("order", 0))


@dataclass(frozen=True, eq=False)
class Affine:
    """Evenly spaced levels scale (q - zero) for the codes q = 0 ... count - 1 (Jacob et al. 2018, equation 1).

    ``scale`` and ``zero``, a whole number, are 0-d tensors, or of a weight one a filter, shaped to broadcast.
    """

    scale: Tensor
    zero: Tensor
    count: int
    state: State = field(default_factory=dict)
    spread = False
    order = 0

    def quantize(self, x: Tensor) -> Tensor:
        """Codes, whole numbers in the type of x: round(x / scale) + zero, clamped; halves to even, as torch's own fake quantization has them."""
        return (x * (1 / self.scale.to(x))).round().add_(self.zero.to(x)).clamp_(0, self.count - 1)

    def dequantize(self, q: Tensor) -> Tensor:
        """What codes, of any type, stand for."""
        return (q - self.zero) * self.scale

    def rounded(self, x: Tensor) -> Tensor:
        return self.dequantize(self.quantize(x)).to(x)

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.rounded(x)
        low, high = (self.scale * (q - self.zero) for q in (-0.5, self.count - 0.5))
        return Straight.apply(x, self.rounded(x), inside(low.item(), high.item())(x.detach()))

    def arrays(self) -> Arrays:
        return {"affine": torch.stack([self.scale, self.zero]).detach().cpu().numpy()}

    def frozen(self) -> Affine:
        return replace(self, scale=self.scale.detach().clone(), zero=self.zero.detach().clone(), state={})

    def meta(self) -> dict[str, Any]:
        return {"type": "affine", "count": self.count}

    @classmethod
    def decode(cls, arrays: Arrays, meta: dict[str, Any]) -> Affine:
        storage.need(arrays["affine"].shape == (2,) and bool(np.isfinite(arrays["affine"]).all()), "scale and zero of an input are not two numbers")
        storage.need(2 <= meta["count"] <= 1 << 16 and arrays["affine"][0] > 0, "an input has no levels, or a scale that is not above 0")
        scale, zero = torch.from_numpy(arrays["affine"].copy())
        return cls(scale, zero, meta["count"])


def affine(low: Tensor, high: Tensor, count: int, state: State | None = None) -> Affine:
    """``count`` levels from low to high, first widened to 0, which is one of them (Jacob et al. 2018, section 3); scale 1 where both are 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (count - 1)
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, 1.0)
    return Affine(scale, (-low / scale).round().clamp(0, count - 1), count, state or {})


def round_float(x: Tensor, exponent: int, mantissa: int, rounding: str = "nearest") -> Tensor:
    """x as a small floating-point number: a sign, so many bits of exponent and of mantissa, subnormal ones too; the largest where it is too large.

    ``nearest`` (halfway, the even one) or ``stochastic``, up with the probability that keeps the mean.
    """
    bias = 2 ** (exponent - 1) - 1
    step = torch.exp2((torch.frexp(x).exponent - 1).clamp(min=1 - bias).to(x.dtype) - mantissa)
    q = x / step
    q = q.round() if rounding == "nearest" else (q + torch.rand_like(q)).floor()
    most = (2 - 2.0**-mantissa) * 2.0**bias
    return (q * step).clamp(-most, most)


@dataclass(frozen=True, eq=False)
class Floating:
    """Small floating-point numbers, bits of ``exponent`` and ``mantissa``, both 0-d tensors (``round_float``)."""

    exponent: Tensor
    mantissa: Tensor
    state: State = field(default_factory=dict)
    spread = False
    order = 0

    @property
    def count(self) -> int:
        return ((1 << int(self.exponent)) - 1 << 1 + int(self.mantissa)) - 1

    def rounded(self, x: Tensor) -> Tensor:
        return round_float(x, int(self.exponent), int(self.mantissa))

    def __call__(self, x: Tensor) -> Tensor:
        return Straight.apply(x, self.rounded(x.detach()), torch.ones_like(x)) if torch.is_grad_enabled() and x.requires_grad else self.rounded(x)

    def arrays(self) -> Arrays:
        return {"floating": torch.stack([self.exponent, self.mantissa]).cpu().numpy()}

    def frozen(self) -> Floating:
        return replace(self, exponent=self.exponent.clone(), mantissa=self.mantissa.clone(), state={})

    def meta(self) -> dict[str, Any]:
        return {"type": "floating"}

    @classmethod
    def decode(cls, arrays: Arrays, meta: dict[str, Any]) -> Floating:
        bits = arrays["floating"].tolist()
        storage.need(len(bits) == 2 and bits[0] in range(2, 9) and bits[1] in range(24), "an exponent has 2 to 8 bits, a mantissa 0 to 23")
        return cls(*torch.from_numpy(arrays["floating"].copy()))


Input = Steps | Affine | Floating
INPUTS: dict[str, type] = {"steps": Steps, "affine": Affine, "floating": Floating}  # the name in a file's header -> the dataclass
