"""A method is a plain function and a decorator that says what it is.

    @score("Molchanov et al. 2017, Pruning CNNs for resource efficient inference", chapter="02")
    def taylor(w, grad):
        return (w * grad).abs()

Positional arguments are evidence, asked for by name (``cmlib.core.evidence`` lists what there is). Keyword-only arguments are
knobs. The decorated function stays callable as itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .knobs import Knob, bind, knobs_of
from .packed import Masked
from .select import selection

WITHOUT_PLAN = {  # kinds of which a weight becomes nothing by itself, and what to do with one instead
    "tool": "is a part that methods stand on: call it, as find({key!r})(...)",
    "recipe": "is a row of stages, each a method and its training: follow(model, {key!r}, data) goes through them",
    "block": "is a layer that is trained from the start: swapped(model, {key!r}) puts it in place of convolutions",
}


@dataclass(frozen=True)
class Training:
    """What a method wants of training, besides its forward pass; every part may be left out.

    ``gradient(g, [lr, w, <state>], **knobs)``: what takes the place of the latent weight's gradient.
    ``penalty(packed, [w, examples, progress], **knobs)``: a scalar added to the task's mean loss; ``w`` is the latent weight, ``examples`` the
    number of training examples, ``progress`` goes from 0 to 1. ``project(w, [g, lr, step, epoch_ends, <state>, <evidence>], **knobs)``: the weight
    after each optimizer step, or a ``Masked`` value whose mask and state become the state's; ``g`` is the step's gradient, evidence is gathered anew
    on a batch's worth of training examples.
    ``variance(packed)``: the weight's variance, sampled at the pre-activations (local reparameterization).
    ``gain(<state>, training)``: what multiplies each channel of the layer, (out,) or (1,): its weight and bias, or where batch norm stands right
    behind, which would undo that, its scale and shift. For methods that remove filters.
    """

    penalty: Callable | None = None
    gradient: Callable | None = None
    project: Callable | None = None
    variance: Callable | None = None
    gain: Callable | None = None


@dataclass(frozen=True, eq=False)
class Method:
    """A compression method: its function, its kind, its source, and how the shared parts should treat it.

    ``joint``: the function sees all covered weights laid end to end as one vector. ``repair(w, mask, <evidence>, **knobs)`` rewrites
    the weights that stay; ``rebuild(rows, <evidence>, **knobs)`` gives the next layer's weight, shaped as ``next_w``, for the channels
    ``rows`` that stay. ``training`` is what it wants of training. ``filters(**knobs)``: whether a method that makes its own masks removes
    filters whole. ``acts([x, training], **knobs)``: what a quantizer rounds the layers' inputs to (``cmlib.core.rounding``), None to leave them
    alone; ``errors(g, **knobs)``: the rounded gradient at the layers' outputs; ``weight_errors(g, rounded, **knobs)``: what the weights' gradient
    is worked out from where that is not ``rounded``, which ``errors`` gave; ``saves(x, **knobs)``: what training keeps of the inputs to work out
    the weights' gradient from, which alone changes; the knobs of all four join the method's. ``exempt`` names laws that it
    cannot meet, with the reason. ``jointly(<evidence>, **knobs)`` sees all covered weights laid end to end before the function sees a layer's, and
    what it gives for these weights is evidence by its name.
    """

    fn: Callable
    kind: str
    paper: str
    chapter: str
    joint: bool = False
    jointly: Callable | None = None
    repair: Callable | None = None
    rebuild: Callable | None = None
    training: Training = Training()
    filters: Callable[..., bool] | None = None
    acts: Callable | None = None
    errors: Callable | None = None
    weight_errors: Callable | None = None
    saves: Callable | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    exempt: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.key}: {self.paper}>"

    def __str__(self) -> str:
        """What ``print`` shows: the docstring, and every knob with its default and what is allowed."""
        knobs = [f"  {k.name} = {k.default!r}: {k.span}" for k in self.knobs.values()]
        learns = ["What goes is learned in training, by fit()."] if self.learns_masks else []
        return "\n".join([f"{self.key} ({self.kind}). {self.__doc__}", "", self.paper, *learns, *(["Knobs:"] if knobs else []), *knobs])

    def __post_init__(self) -> None:  # help(method) is the function's help
        object.__setattr__(self, "__doc__", inspect.getdoc(self.fn) or "")

    @property
    def key(self) -> str:
        return self.fn.__name__

    @property
    def title(self) -> str:
        """The first line of the docstring."""
        return (self.__doc__ or "").split("\n")[0].rstrip(".")

    @cached_property
    def asks(self) -> tuple[str, ...]:
        """The evidence that the function takes, in order, and what it works out jointly."""
        if self.jointly is None:
            return evidence_of(self.fn)
        return tuple(dict.fromkeys(n for fn in (self.fn, self.jointly) for n in evidence_of(fn) if n != self.jointly.__name__))

    @property
    def no_plan(self) -> str:
        """Why no plan can be made by this method, and what to do instead; empty where one can."""
        return f"{self.key} {WITHOUT_PLAN[self.kind].format(key=self.key)}" if self.kind in WITHOUT_PLAN else ""

    @cached_property
    def reads_inputs(self) -> bool:
        """Whether what the layers' inputs are rounded to depends on them, so that it needs data."""
        return self.acts is not None and "x" in inspect.signature(self.acts).parameters

    @cached_property
    def learns(self) -> bool:
        """Whether it is asked again on every training forward: with its state, or as a quantizer with the latent weight."""
        return self.kind == "quantizer" or "state" in inspect.signature(self.fn).parameters

    @property
    def learns_masks(self) -> bool:
        """Whether training decides which weights go."""
        return self.kind == "score" and self.learns

    @cached_property
    def follows(self) -> bool:
        """Whether it follows the layers' inputs through training."""
        return self.acts is not None and "state" in inspect.signature(self.acts).parameters

    @cached_property
    def selects(self) -> bool:
        """Whether it gives scores, from which the shared selection makes a mask, rather than a packed value of its own."""
        return self.kind == "score" and inspect.signature(self.fn).return_annotation not in (Masked, "Masked")

    @cached_property
    def companions(self) -> tuple[Callable, ...]:
        """The function, and those that round what its layers read, keep and get back."""
        return tuple(fn for fn in (self.fn, self.jointly, self.acts, self.errors, self.weight_errors, self.saves) if fn is not None)

    @cached_property
    def own_knobs(self) -> dict[str, Knob]:
        return {n: k for fn in self.companions for n, k in knobs_of(fn).items()}

    @cached_property
    def knobs(self) -> dict[str, Knob]:
        """Every knob: those of the selection (for a score: keep first), then the function's own."""
        shared = knobs_of(selection) if self.selects else {}
        merged = {**shared, **self.own_knobs}
        return {n: replace(k, default=self.defaults.get(n, k.default)) for n, k in merged.items()}

    def bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """The knobs checked and completed; ValueError names what is wrong and what is allowed."""
        return bind(self.knobs, given, self.key)


def _kind(kind: str) -> Callable[..., Callable[[Callable], Method]]:
    def decorator(paper: str, *, chapter: str, **how: Any) -> Callable[[Callable], Method]:
        settings = {f.name: how.pop(f.name) for f in fields(Method) if f.name in how}
        return lambda fn: Method(fn, kind, paper, chapter, defaults=how, **settings)

    decorator.__name__ = kind
    decorator.__doc__ = f"Make a method of kind {kind!r} of a function; further keywords are defaults of shared knobs."
    return decorator


score = _kind("score")
quantizer = _kind("quantizer")
tool = _kind("tool")
recipe = _kind("recipe")
dynamic = _kind("dynamic")
block = _kind("block")


def end_to_end(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The layers' evidence as if they were one long vector of weights (after whatever leads the weight's own axes): what a joint method sees."""
    layers = list(given.values())

    def joined(name: str) -> Any:
        parts = [(g[name], g["w"].dim()) for g in layers]
        return torch.cat([p.flatten(p.dim() - d) for p, d in parts], dim=-1) if isinstance(parts[0][0], Tensor) else parts[0][0]

    return {name: joined(name) for name in layers[0]}


def apart(flat: Any, like: dict[str, Tensor]) -> dict[str, Any]:
    """That long vector, or a ``Masked`` one with what it remembers of each weight, cut into the layers' weights again."""
    if isinstance(flat, Masked):
        values, masks = apart(flat.values, like), apart(flat.mask, like)
        state = {key: apart(v, like) for key, v in flat.state.items()}
        return {n: replace(flat, values=values[n], mask=masks[n], state={key: v[n] for key, v in state.items()}) for n in like}
    parts = flat.split([w.numel() for w in like.values()], -1)
    return {n: part.reshape(*flat.shape[:-1], *w.shape) for (n, w), part in zip(like.items(), parts, strict=True)}


_READ: WeakKeyDictionary[Callable, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def _parameters(fn: Callable) -> Mapping[str, inspect.Parameter]:
    """A function's parameters, read once while it lives: training asks for them at every step."""
    if not isinstance(fn, FunctionType):
        return inspect.signature(fn).parameters
    if fn not in _READ:
        _READ[fn] = inspect.signature(fn).parameters
    return _READ[fn]


def evidence_of(fn: Callable) -> tuple[str, ...]:
    """What a function asks for by name: its positional arguments, in order."""
    return tuple(n for n, p in _parameters(fn).items() if p.kind is not p.KEYWORD_ONLY)


def call(fn: Callable, available: dict[str, Any], knobs: dict[str, Any]) -> Any:
    """Call ``fn`` with the positional arguments it names, taken from ``available``, and those knobs that it has."""
    parameters = _parameters(fn)
    asked = [available[n] for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    return fn(*asked, **{n: v for n, v in knobs.items() if n in parameters and parameters[n].kind is inspect.Parameter.KEYWORD_ONLY})
