"""What the panel says of a state: the table, the notes, the numbers in words. Panel, text twin and csv all say it from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..core.apply import Plan, substituted
from ..core.knobs import Knob, Span
from ..core.select import is_n_of_m
from ..lab.measure import Row
from .live import Estimate

KNOB_LABELS = {"keep": "keep, share of weights", "lam": "λ, strength of the penalty", "c": "c, threshold in standard deviations"}


@dataclass(frozen=True)
class Dense:
    """What the network is before compression."""

    accuracy: float
    file_bytes: int


@dataclass(frozen=True)
class Step:
    """A measured point of the path: the knobs, weights kept, bytes of the written file, exact accuracy."""

    knobs: dict[str, Any]
    kept: int
    file_bytes: int
    accuracy: float


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
    row: Row | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)
    source: dict[str, Any] | None = None  # how the kit makes the network that it is a state of
    net: nn.Module | None = None  # what training made of it, with plain weights; None while only the plan differs from the dense network
    training: dict[str, Any] = field(default_factory=dict)  # the settings of that training

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The parameters that the plan puts in place, by name."""
        return substituted(self.given, self.plan)

    def step(self) -> Step:
        """What the path remembers of it."""
        return Step(self.knobs, self.kept, self.file_bytes, self.accuracy)

    @property
    def kept(self) -> int:
        return sum(p.kept for p in self.plan.values())

    @property
    def total(self) -> int:
        return sum(p.mask.numel() for p in self.plan.values())


def cells(state: State, dense: Dense) -> list[list[str]]:
    """The table: label, dense, now, change. What is not measured yet is an ellipsis."""
    size = ("" if state.weighed else "≈ ") + size_text(state.file_bytes)
    return [*_accuracy(state, dense.accuracy),
            ["weights kept", f"{state.total:,}", f"{state.kept:,}", times(state.total, state.kept)],
            ["file on disk", size_text(dense.file_bytes), size, times(dense.file_bytes, state.file_bytes)],
            *_speed(state.row)]  # fmt: skip


def _accuracy(state: State, dense: float) -> list[list[str]]:
    exact = "…" if state.accuracy is None else pct(state.accuracy)
    change = "…" if state.accuracy is None else f"{100 * (state.accuracy - dense):+.2f}".replace("-", "−")
    estimate = f"{pct(state.estimate.accuracy, 1)} ±{100 * state.estimate.half:.1f}" if state.estimate else exact
    return [["accuracy, estimate", pct(dense), estimate, ""], ["accuracy, exact", pct(dense), exact, change]]


def _speed(row: Row | None) -> list[list[str]]:
    if row is None:
        return [["multiply-adds", "…", "…", "at rest"], ["latency, batch 1", "…", "…", "at rest"]]
    before, after = row.dense.multiply_adds, row.multiply_adds
    return [["multiply-adds", f"{before / 1e3:,.0f} k", f"{after / 1e3:,.0f} k", times(before, after)],
            ["latency, batch 1", f"{row.dense.latency_ms:.2f} ms", f"{row.latency_ms:.2f} ms", f"{row.latency_ratio:.2f}×"]]  # fmt: skip


def notes(state: State, dense: Dense) -> list[dict[str, str]]:
    """What the figures mean, and why some did not move."""
    empty = [n for n, p in state.plan.items() if p.kept == 0]
    found = [note("info", "Trained on.", f"What was left was trained for {epochs(state)}.")] if state.net else []
    found += [note("warn", "A layer is empty.", f"{', '.join(empty)} keeps no weight: it passes on nothing but its bias.")] if empty else []
    title = f"{times(state.total, state.kept)} fewer weights, {times(dense.file_bytes, state.file_bytes)} smaller file."
    found.append(note("info", title, _storage(state)))
    if is_n_of_m(state.knobs.get("unit", "")):
        found.append(note("info", f"{state.knobs['unit']} fixes the share.", "So many weights of every group stay, whatever keep says."))
    if state.kept < state.total:
        found.append(note("warn", "Why did the multiply-adds not move?", "The mask sits in a dense matrix: the zeros are still multiplied."))
    return found


def _storage(state: State) -> str:
    formats = sorted({p.format() for p in state.plan.values()})
    if state.kept == state.total:
        return "Every weight stays."
    if formats == ["dense"]:
        return "Stored dense: the zeros are written like any other value."
    values = sum(p.kept * p.values.element_size() for p in state.plan.values())
    index = 8 * (state.packed_bytes - values) / max(1, state.kept)
    value = 8 * values / max(1, state.kept)
    return f"Each kept weight also stores where it sits ({', '.join(formats)}): {index:.1f} bits of index beside {value:.0f} of value."


def point(state: State | Step) -> dict[str, Any]:
    """The state on the plot of accuracy against bytes."""
    found = {"bytes": state.file_bytes, "label": size_text(state.file_bytes)}
    if state.accuracy is not None:
        return {**found, "accuracy": state.accuracy}
    return {**found, "accuracy": state.estimate.accuracy, "half": state.estimate.half} if state.estimate else found


def epochs(state: State) -> str:
    """How long a state was trained."""
    count = state.training["epochs"]
    return f"{count} epoch{'s' * (count > 1)}"


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
