"""Knobs: one annotation on an argument is the slider, the sweep axis, the check of validity and the corners of the tests.

    def taylor(w, grad, *, keep: Keep = 0.1): ...

A knob type is ``Annotated[type, Span(...)]`` or ``Annotated[str, Pick(...)]``; the dozen at the end serve all methods.
"""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Span:
    """Numbers from ``lo`` to ``hi``, both allowed; ``log`` spaces a slider evenly in the logarithm."""

    lo: float
    hi: float
    log: bool = False
    integer: bool = False

    def __contains__(self, value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and self.lo <= value <= self.hi and (not self.integer or float(value).is_integer())

    def __str__(self) -> str:
        return f"{'a whole number' if self.integer else 'a number'} from {self.lo:g} to {self.hi:g}"

    def points(self, count: int) -> list[float]:
        """``count`` values from end to end, evenly spaced on the slider: the axis of a sweep and the corners of a test."""
        lo, hi = (math.log(self.lo), math.log(self.hi)) if self.log else (self.lo, self.hi)
        steps = [lo + (hi - lo) * i / max(1, count - 1) for i in range(count)]
        values = [min(max(math.exp(s) if self.log else s, self.lo), self.hi) for s in steps]
        return sorted({round(v) for v in values}) if self.integer else values


@dataclass(frozen=True, init=False)
class Pick:
    """One of a few named choices."""

    choices: tuple[str, ...]

    def __init__(self, *choices: str) -> None:
        object.__setattr__(self, "choices", choices)

    def __contains__(self, value: Any) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return "one of " + ", ".join(self.choices)

    def points(self, count: int) -> list[str]:
        return list(self.choices)


@dataclass(frozen=True)
class Knob:
    """A keyword-only argument with its allowed values and its default; ``None`` passes where it is the default."""

    name: str
    span: Span | Pick
    default: Any

    def check(self, value: Any) -> Any:
        """The value, whole where it must be. ValueError names the knob, the value and what is allowed."""
        if value is None and self.default is None:
            return None
        if value not in self.span:
            raise ValueError(f"{self.name}={value!r} is not allowed: {self.name} is {self.span}")
        return int(value) if isinstance(self.span, Span) and self.span.integer else value


def knobs_of(fn: Callable) -> dict[str, Knob]:
    """The knobs of a function: its keyword-only arguments annotated with a Span or a Pick."""
    hints = typing.get_type_hints(fn, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        spans = [m for m in getattr(hints.get(name), "__metadata__", ()) if isinstance(m, (Span, Pick))]
        if parameter.kind is parameter.KEYWORD_ONLY and spans:
            found[name] = Knob(name, spans[0], parameter.default)
    return found


def bind(knobs: dict[str, Knob], given: dict[str, Any], owner: str) -> dict[str, Any]:
    """``given`` checked and completed by the defaults. ValueError for a value out of range or a name that is no knob."""
    for name in given:
        if name not in knobs:
            raise ValueError(f"{owner} has no knob {name!r}{nearest(name, knobs)}; its knobs are {', '.join(knobs) or 'none'}")
    return {name: knob.check(given.get(name, knob.default)) for name, knob in knobs.items()}


def nearest(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' where a name is close to one that exists, else nothing."""
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.55)
    return f" (did you mean {close[0]!r}?)" if close else ""


Keep = Annotated[float, Span(0.001, 1, log=True)]  # share of the weights (or rows, filters, blocks) that stay
Threshold = Annotated[float | None, Span(0, 1e9)]  # units whose score is below it go
Weight = Annotated[float, Span(0, 1)]  # how much a term counts
Penalty = Annotated[float, Span(1e-7, 10, log=True)]  # how hard a penalty presses
Damping = Annotated[float, Span(1e-10, 0.1, log=True)]  # what is added to a Hessian's diagonal
Bits = Annotated[int, Span(1, 8, integer=True)]  # of a code
WideBits = Annotated[int, Span(1, 32, integer=True)]  # of an input or a gradient; 32 leaves it as it is
Levels = Annotated[int, Span(2, 256, log=True, integer=True)]  # how many values a code can stand for
Per = Annotated[str, Pick("tensor", "filter", "group")]  # what has levels of its own: the layer, a filter, a run of at most 32 weights
Switch = Annotated[str, Pick("on", "off")]
Steps = Annotated[int, Span(0, 100_000, integer=True)]  # a count, or a seed
