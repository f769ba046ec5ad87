"""What the panel says of a state: the table, the notes, the numbers in words. Panel, text twin and csv all say it from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..core.apply import Plan, substituted
from ..core.knobs import Knob, Span
from ..core.select import is_n_of_m
from .live import Estimate

KNOB_LABELS = {"keep": "keep, share that stays", "lam": "λ, strength of the penalty", "c": "c, threshold in standard deviations"}


@dataclass(frozen=True)
class Dense:
    """What the network is before compression."""

    accuracy: float
    file_bytes: int
    multiply_adds: int  # of one image


@dataclass(frozen=True)
class Step:
    """A measured point of the path: the knobs, epochs of retraining, weights kept, bytes of the written file, exact accuracy."""

    knobs: dict[str, Any]
    epochs: int  # 0 where nothing was retrained
    kept: int
    file_bytes: int
    accuracy: float


@dataclass(frozen=True)
class Speed:
    """Multiply-adds of one image, and the median milliseconds of its forward pass beside the dense network's."""

    multiply_adds: int
    dense_ms: float
    ms: float
    ratio: float  # of dense over now, the models taking turns
    small_bytes: int | None = None  # of the file of the network without its whole filters, where they were taken out
    why: str = ""  # they could not be


@dataclass(eq=False)
class State:
    """One position of the knobs: the plan it means, and what has been measured of it so far."""

    knobs: dict[str, Any]
    plan: Plan
    given: nn.Module  # the plain network that the plan acts on
    packed_bytes: int  # of the covered weights, as stored
    file_bytes: int
    estimate: Estimate | None = None
    accuracy: float | None = None
    answers: Tensor | None = None  # of the network on every image, once the accuracy is exact
    weighed: bool = False  # whether file_bytes was read off a written file, or reckoned with the dense file's header
    index: tuple[float, float] | None = None  # bits of value and of index that a weight costs where indices are stored, once weighed
    speed: Speed | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)
    source: dict[str, Any] | None = None  # how the kit makes the network that it is a state of
    net: nn.Module | None = None  # what training made of it, with plain weights; None while only the plan differs from the dense network
    training: dict[str, Any] = field(default_factory=dict)  # the settings of that training
    before: State | None = None  # the state that the training began with
    warned: list[str] = field(default_factory=list)  # what the plan warned of

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The parameters that the plan puts in place, by name."""
        return substituted(self.given, self.plan)

    @property
    def untrained(self) -> State:
        """The state of the same knobs before any training."""
        return self.before or self

    @property
    def epochs(self) -> int:
        """How long it was trained."""
        return self.training.get("epochs", 0)

    def step(self) -> Step:
        """What the path remembers of it."""
        return Step(self.knobs, self.epochs, self.kept, self.file_bytes, self.accuracy)

    @property
    def kept(self) -> int:
        return sum(p.kept for p in self.plan.values())

    @property
    def total(self) -> int:
        return sum(p.mask.numel() for p in self.plan.values())

    @property
    def whole(self) -> bool:
        """Whether filters go with all that belongs to them, so that they can be taken out for real."""
        return any(p.vectors for p in self.plan.values())


def cells(state: State, dense: Dense) -> list[list[str]]:
    """The table: label, dense, now, change. What is not measured yet is an ellipsis."""
    size = ("" if state.weighed else "≈ ") + size_text(state.file_bytes)
    return [*_accuracy(state, dense.accuracy),
            ["weights kept", f"{state.total:,}", f"{state.kept:,}", times(state.total, state.kept)],
            ["file on disk", size_text(dense.file_bytes), size, times(dense.file_bytes, state.file_bytes)],
            *_speed(state.speed, dense.multiply_adds)]  # fmt: skip


def _accuracy(state: State, dense: float) -> list[list[str]]:
    exact = "…" if state.accuracy is None else pct(state.accuracy)
    change = "…" if state.accuracy is None else f"{100 * (state.accuracy - dense):+.2f}".replace("-", "−")
    estimate = f"{pct(state.estimate.accuracy, 1)} ±{100 * state.estimate.half:.1f}" if state.estimate else exact
    return [["accuracy, estimate", pct(dense), estimate, ""], ["accuracy, exact", pct(dense), exact, change]]


def _speed(speed: Speed | None, before: int) -> list[list[str]]:
    if speed is None:
        return [["multiply-adds", "…", "…", "at rest"], ["latency, batch 1", "…", "…", "at rest"]]
    now = speed.multiply_adds
    return [["multiply-adds", f"{before / 1e3:,.0f} k", f"{now / 1e3:,.0f} k", times(before, now)],
            ["latency, batch 1", f"{speed.dense_ms:.2f} ms", f"{speed.ms:.2f} ms", f"{speed.ratio:.2f}×"]]  # fmt: skip


def notes(state: State, dense: Dense) -> list[dict[str, str]]:
    """What the figures mean, and why some did not move."""
    empty = [n for n, p in state.plan.items() if p.kept == 0]
    found = [note("info", "Trained on.", f"What was left was trained for {epochs(state)}.")] if state.net else []
    found += [note("warn", "Warning.", f"{'; '.join(state.warned)}.")] if state.warned else []
    found += [note("warn", "A layer is empty.", f"{', '.join(empty)} keeps no weight: it passes on nothing but its bias.")] if empty else []
    title = f"{times(state.total, state.kept)} fewer weights, {times(dense.file_bytes, state.file_bytes)} smaller file."
    found.append(note("info", title, _storage(state)))
    if is_n_of_m(state.knobs.get("unit", "")):
        found.append(note("info", f"{state.knobs['unit']} fixes the share.", "So many weights of every group stay, whatever keep says."))
    if state.whole and not (state.speed and state.speed.why):
        size = f" Its file then has {size_text(state.speed.small_bytes)}." if state.speed and state.speed.small_bytes else ""
        found.append(note("info", "Filters go whole.", f"Multiply-adds and latency are those of bake(model), the network without them.{size}"))
    elif state.kept < state.total:
        why = f" {state.speed.why}" if state.speed else ""
        found.append(note("warn", "Why did the multiply-adds not move?", f"The mask sits in a dense matrix: the zeros are still multiplied.{why}"))
    return found


def _storage(state: State) -> str:
    formats = sorted({p.format() for p in state.plan.values()} - {"dense"})
    if state.kept == state.total:
        return "Every weight stays."
    if not formats:
        return "Stored dense: the zeros are written like any other value."
    fillers = ", fillers between far weights included," if "relative" in formats else ""
    bits = f": {state.index[0]:.1f} bits of value{fillers} and {state.index[1]:.1f} bits of index" if state.index else ""
    return f"Each kept weight also stores where it sits ({', '.join(formats)}){bits}."


def index_bits(plan: Plan) -> tuple[float, float] | None:
    """Bits of value and of index that a kept weight costs in the layers that store where it sits; None where none does."""
    stored = [p for p in plan.values() if p.kept and p.format() != "dense"]
    if not stored:
        return None
    arrays = [(name, a.nbytes) for p in stored for name, a in p.arrays().items()]
    values, kept = sum(size for name, size in arrays if name == "values"), sum(p.kept for p in stored)
    return 8 * values / kept, 8 * (sum(size for _, size in arrays) - values) / kept


def point(state: State | Step) -> dict[str, Any]:
    """The state on the plot of accuracy against bytes, and what made it."""
    knobs = {n: v for n, v in state.knobs.items() if v is not None}
    found = {"bytes": state.file_bytes, "label": size_text(state.file_bytes), "knobs": knobs, "epochs": state.epochs}
    if state.accuracy is not None:
        return {**found, "accuracy": state.accuracy}
    return {**found, "accuracy": state.estimate.accuracy, "half": state.estimate.half} if state.estimate else found


def epochs(state: State) -> str:
    """How long a state was trained."""
    return f"{state.epochs} epoch{'s' * (state.epochs > 1)}"


def note(tone: str, title: str, text: str) -> dict[str, str]:
    return {"tone": tone, "title": title, "text": text}


def knob_spec(knob: Knob, value: Any) -> dict[str, Any]:
    """A knob as the browser sees it."""
    found = {"name": knob.name, "label": KNOB_LABELS.get(knob.name, knob.name.replace("_", " ")), "value": value}
    if isinstance(knob.span, Span):
        return {**found, "kind": "span", "lo": knob.span.lo, "hi": knob.span.hi, "log": knob.span.log, "integer": knob.span.integer}
    return {**found, "kind": "pick", "choices": list(knob.span.choices)}


def pct(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def times(before: float, after: float) -> str:
    return f"{before / after:.1f}×" if after else "∞"


def size_text(count: int) -> str:
    return f"{count / 1e6:,.2f} MB" if count >= 10e6 else f"{count / 1e3:,.0f} kB" if count >= 10e3 else f"{count / 1e3:,.1f} kB"
