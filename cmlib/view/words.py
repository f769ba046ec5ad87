"""What the panel says of a state: the table, the notes, the numbers in words. Panel, text twin and csv all say it from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from ..core.apply import Plan, substituted
from ..core.knobs import Knob, Span
from ..core.packed import Packed
from ..core.select import is_n_of_m
from ..lab.measure import codes_in, costs, input_bits
from .live import Estimate

KNOB_LABELS = {"keep": "keep, share that stays", "lam": "λ, strength of the penalty", "c": "c, threshold in standard deviations",
               "k": "k, levels of a codebook", "bits": "bits of a weight", "a_bits": "bits of an activation", "g_bits": "bits of a gradient",
               "per": "levels per"}  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """What the network is before compression."""

    accuracy: float
    file_bytes: int
    multiply_adds: int  # of one image
    layer_bits: dict[str, int]  # of the covered layers, as stored


@dataclass(frozen=True)
class Step:
    """A measured point of the path: the knobs, epochs of retraining, weights kept, bits a weight, bytes of the written file, exact accuracy."""

    knobs: dict[str, Any]
    epochs: int  # 0 where nothing was retrained
    kept: int
    weight_bits: float
    activation_bits: int | None  # None where no inputs are rounded
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

    def __repr__(self) -> str:
        knobs = ", ".join(f"{n}={v}" for n, v in self.knobs.items() if v is not None)
        right = "not measured yet" if self.accuracy is None else pct(self.accuracy)
        return f"State({knobs}: {size_text(self.file_bytes)}, {right})"

    @property
    def around(self) -> Plan:
        """The part of the plan that changes more of a layer than its weight: what it reads, which places of its output it works out."""
        return {n: p for n, p in self.plan.items() if hasattr(p, "input") or hasattr(p, "computed")}

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
        return Step(self.knobs, self.epochs, self.kept, self.weight_bits, self.activation_bits, self.file_bytes, self.accuracy)

    @property
    def kept(self) -> int:
        return sum(p.kept for p in self.plan.values())

    @property
    def total(self) -> int:
        return sum(p.values.numel() for p in self.plan.values())

    @property
    def weight_bits(self) -> float:
        """Bits that a covered weight costs as stored, all that belongs to it included."""
        return 8 * self.packed_bytes / self.total

    @property
    def activation_bits(self) -> int | None:
        """Most bits of a rounded input; None where none is rounded."""
        return max((n for p in self.plan.values() if (n := input_bits(p))), default=None)

    @cached_property
    def coded(self) -> bool:
        """Whether weights are codes, or inputs rounded."""
        return any(codes_in(p) or input_bits(p) for p in self.plan.values())

    @property
    def whole(self) -> bool:
        """Whether filters go with all that belongs to them, so that they can be taken out for real; codes would become floats again."""
        return any(p.vectors for p in self.plan.values()) and not self.coded


def cells(state: State, dense: Dense) -> list[list[str]]:
    """The table: label, dense, now, change. What is not measured yet is an ellipsis."""
    size = ("" if state.weighed else "≈ ") + size_text(state.file_bytes)
    kept = [["weights kept", f"{state.total:,}", f"{state.kept:,}", times(state.total, state.kept)]]
    return [*_accuracy(state, dense.accuracy),
            *(kept if state.kept < state.total or not state.coded else []),
            *(_coded(state, dense) if state.coded else []),
            ["file on disk", size_text(dense.file_bytes), size, times(dense.file_bytes, state.file_bytes)],
            *(_taken_out(state.speed, dense.file_bytes) if state.whole else []),
            *_speed(state.speed, dense.multiply_adds)]  # fmt: skip


def _taken_out(speed: Speed | None, before: int) -> list[list[str]]:
    """The file of the network that the multiply-adds are of; none where the filters could not be taken out."""
    if speed is None:
        return [["file, filters taken out", size_text(before), "…", "at rest"]]
    if not speed.small_bytes:
        return []
    return [["file, filters taken out", size_text(before), size_text(speed.small_bytes), times(before, speed.small_bytes)]]


def _coded(state: State, dense: Dense) -> list[list[str]]:
    """Bits and levels of weights, and of inputs where they are rounded."""
    before, bits, floats = bits_before(state, dense), state.activation_bits, 8 * next(iter(state.plan.values())).values.element_size()
    inputs = [["bits an activation", f"{floats}", f"{bits}", times(floats, bits)]] if bits else []
    return [["bits a covered weight", f"{before:.3g}", f"{state.weight_bits:.2f}", times(before, state.weight_bits)],
            ["levels", "floats", *levels_text(state.plan)], *inputs]  # fmt: skip


def bits_before(state: State, dense: Dense) -> float:
    """Bits that a covered weight cost before, as stored."""
    return sum(dense.layer_bits[n] for n in state.plan) / state.total


def levels_text(plan: Plan) -> tuple[str, str]:
    """How many values a code can stand for, from the fewest to the most in a layer; and how many groups have levels of their own, if not layers."""
    codes = [c for p in plan.values() for c in codes_in(p)]
    counts, groups = sorted({c.count for c in codes}), sum(len(c.params) for c in codes)
    return " to ".join(f"{n:,}" for n in dict.fromkeys(counts[:1] + counts[-1:])) or "floats", f"{groups:,} groups" if groups > len(codes) else ""


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
    found = [note("info", "Trained on.", f"What is shown was trained for {epochs(state.epochs)}.")] if state.net else []
    found += [note("warn", "Warning.", f"{'; '.join(state.warned)}.")] if state.warned else []
    found += [note("warn", "A layer is empty.", f"{', '.join(empty)} keeps no weight: it passes on nothing but its bias.")] if empty else []
    found.append(_costs(state, dense))
    if is_n_of_m(state.knobs.get("unit", "")):
        found.append(note("info", f"{state.knobs['unit']} fixes the share.", "So many weights of every group stay, whatever keep says."))
    if state.coded:
        found += _codes(state)
    elif state.whole and not (state.speed and state.speed.why):
        text = "Multiply-adds, latency and the file with filters taken out are those of bake(model); all else is of the masked network."
        found.append(note("info", "Filters go whole.", text))
    elif state.kept < state.total:
        why = f" {state.speed.why}" if state.speed else ""
        found.append(note("warn", "Why did the multiply-adds not move?", f"The mask sits in a dense matrix: the zeros are still multiplied.{why}"))
    return found


def _costs(state: State, dense: Dense) -> dict[str, str]:
    smaller = f"{times(dense.file_bytes, state.file_bytes)} smaller file."
    if not state.coded:
        return note("info", f"{times(state.total, state.kept)} fewer weights, {smaller}", _storage(state))
    parts = {part: 8 * sum(costs(p)[part] for p in state.plan.values()) / state.total for part in ("values", "tables", "places")}
    names = {"values": "value", "tables": "levels (scales, codebooks)", "places": "index"}
    text = ", ".join(f"{bits:{'.2f' if bits > 0.005 else '.1g'}} of {names[part]}" for part, bits in parts.items() if bits)
    return note("info", f"{times(bits_before(state, dense), state.weight_bits)} fewer bits, {smaller}", f"Bits a covered weight: {text}.")


def _codes(state: State) -> list[dict[str, str]]:
    """What codes do and do not do."""
    found = []
    if dear := [n for n, p in state.plan.items() if codes_in(p) and p.bits() >= 8 * p.values.nbytes]:
        text = f"Stored dense, {', '.join(dear)} would take less: too few weights share these levels."
        found.append(note("warn", "Levels that cost more than they save.", text))
    if inputs := [n for n, p in state.plan.items() if input_bits(p)]:
        text = f"What {', '.join(inputs)} read has {state.activation_bits} bits. No file holds it, so none shrinks by that."
        found.append(note("info", "Inputs are rounded too.", text))
    if signs := [n for n in inputs if state.plan[n].input.count == 2] if any(isinstance(m, nn.ReLU) for m in state.given.modules()) else []:
        text = f"{', '.join(signs)} may read what a ReLU let through: then every sign is the same. cmlib.signed(net) puts batch norms there."
        found.append(note("warn", "One bit behind a ReLU says nothing.", text))
    time = ", and rounding the inputs takes time of its own" if inputs else ""
    text = f"Each code is unpacked to a float32 number and multiplied as such{time}. integer_network() and int8 in ONNX Runtime multiply integers."
    return [*found, note("warn", "Why does the latency not fall?", text)]


def _storage(state: State) -> str:
    formats = sorted({p.format() for p in state.plan.values()} - {"dense"})
    if state.kept == state.total:
        return "Every weight stays."
    if not formats:
        return "Stored dense: the zeros are written like any other value."
    fillers = ", fillers between far weights included," if "relative" in formats else ""
    bits = f": {state.index[0]:.1f} bits of value{fillers} and {state.index[1]:.1f} bits of index" if state.index else ""
    return f"Each kept weight also stores where it sits ({', '.join(formats)}){bits}."


def layer_row(name: str, packed: Packed, before: int | None) -> list[str]:
    """A layer's line of the text twin: its bits where codes had ``before`` as many, else what is kept."""
    total = packed.values.numel()
    if before is None:
        return [f"kept in {name}", f"{total:,}", f"{packed.kept:,}", pct(packed.kept / total)]
    return [f"bits a weight in {name}", f"{before / total:.3g}", f"{packed.bits() / total:.2f}", times(before, packed.bits())]


def index_bits(plan: Plan) -> tuple[float, float] | None:
    """Bits of value and of index that a kept weight costs in the layers that store where it sits; None where none does."""
    stored = [p for p in plan.values() if p.kept and p.format() != "dense"]
    if not stored:
        return None
    parts, kept = [costs(p) for p in stored], sum(p.kept for p in stored)
    return 8 * sum(c["values"] for c in parts) / kept, 8 * sum(c["places"] for c in parts) / kept


def point(state: State | Step) -> dict[str, Any]:
    """The state on the plot of accuracy against bytes, and what made it."""
    knobs = {n: v for n, v in state.knobs.items() if v is not None}
    found = {"bytes": state.file_bytes, "label": size_text(state.file_bytes), "knobs": knobs, "epochs": state.epochs}
    if state.accuracy is not None:
        return {**found, "accuracy": state.accuracy}
    return {**found, "accuracy": state.estimate.accuracy, "half": state.estimate.half} if state.estimate else found


def epochs(count: int) -> str:
    """How long a state was trained."""
    return f"{count} epoch{'s' * (count > 1)}"


UNTRAINED = {"tone": "info", "title": "It learns while it trains.", "text": "Untrained, the network is where the method starts from: press retrain."}


def stored_note(run: dict[str, Any], knobs: dict[str, Any]) -> dict[str, str]:
    """A run that was trained once and is stored, and where its knobs differ from these."""
    at = ", ".join(f"{name} = {value:.3g}" if isinstance(value, float) else f"{name} = {value}" for name, value in run["knobs"].items())
    text = f"{pct(run['accuracy'])} of the validation images after {run['training']}, {size_text(run['bytes'])}."
    elsewhere = "" if run["knobs"].items() <= knobs.items() else ", not at these knobs"
    return note("info", f"Stored run at {at}{elsewhere}." if at else "Stored run.", text)


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
