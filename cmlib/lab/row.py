"""A row of measurements: its columns, why a number did not move, and tables of rows.

The columns are the survey's own (survey 001, section 3: accuracy, parameters, operations, bits) and those it lacks: bytes of the file, load time,
peak memory, latency with its spread, the worst class, the answers that flipped. Every ``..._ratio`` is dense over now: above 1 the compressed model
is the better one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

SAME = 1.15  # below this ratio two latencies count as the same


@dataclass(frozen=True)
class Layer:
    """One convolution's or dense layer's weight: how many numbers, how many stay, its bytes in the file, and in which storage format.

    ``format`` is None where the layer is not compressed; ``smallest`` is the format that would take the fewest bytes. ``gone`` of
    ``units`` filters (rows) are masked; ``whole`` says whether all that belongs to them is too. ``levels``: how many values a code can stand for
    (0 for floats), ``table_bytes`` of its bytes say which these are; ``input_bits``: of the codes that its inputs are rounded to, if they are.
    """

    name: str
    weights: int
    kept: int
    bytes: int
    format: str | None = None
    smallest: str | None = None
    smallest_bytes: int = 0
    units: int = 0
    gone: int = 0
    whole: bool = False
    levels: int = 0
    table_bytes: int = 0
    input_bits: int | None = None


@dataclass(frozen=True)
class Row:
    """One measured model; a field is None where there was nothing to measure it with. ``dense`` is the reference's own row.

    ``mode``            simulated (masks on dense tensors) or baked (plain weights, as small as they are).
    ``parameters``      numbers that no mask removes, biases and batch norm included.
    ``weight_bits``     mean bits that a covered weight costs as stored, indices, scales and codebooks included.
    ``activation_bits`` most bits of a rounded input; those of a float where none is rounded.
    ``file_bytes``      of a file really written: ``header_bytes`` + ``array_bytes``; ``index_bytes`` of these say where weights lie.
    ``load_ms``         median time to load that file, from the disk cache.
    ``accuracy``        in [0, 1], on ``images`` images.
    ``worst_class``     (label, dense accuracy, accuracy now) of the class that is lowest now.
    ``flipped``         images whose answer is not the dense model's.
    ``multiply_adds``   of one image, as executed: a masked zero is multiplied too.
    ``peak_memory_bytes``, ``latency_ms`` (median; quartiles ``latency_low``, ``latency_high``)   of a forward pass of ``batch`` images.
    ``latency_ratio``   median over rounds of dense over now.
    """

    mode: str
    parameters: int
    weight_bits: float
    activation_bits: int
    file_bytes: int
    header_bytes: int
    array_bytes: int
    index_bytes: int
    load_ms: float
    layers: tuple[Layer, ...]
    device: str
    threads: int
    torch_version: str
    batch: int = 1
    seeds: int = 1
    accuracy: float | None = None
    images: int | None = None
    worst_class: tuple[str, float | None, float] | None = None
    flipped: int | None = None
    multiply_adds: int | None = None
    peak_memory_bytes: int | None = None
    latency_ms: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None
    latency_ratio: float | None = None
    dense: Row | None = None

    @property
    def accuracy_change(self) -> float | None:
        """Percentage points."""
        return None if self.dense is None or self.accuracy is None else 100 * (self.accuracy - self.dense.accuracy)

    @property
    def flipped_share(self) -> float | None:
        return None if self.flipped is None else self.flipped / self.images

    @property
    def parameters_ratio(self) -> float | None:
        return self._ratio("parameters")

    @property
    def flops_ratio(self) -> float | None:
        return self._ratio("multiply_adds")

    @property
    def file_ratio(self) -> float | None:
        return self._ratio("file_bytes")

    @property
    def latency_per_image_ms(self) -> float | None:
        return None if self.latency_ms is None else self.latency_ms / self.batch

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Layers with no weight left."""
        return tuple(layer.name for layer in self.layers if layer.kept == 0)

    @property
    def rounds_inputs(self) -> bool:
        """Whether some layer's inputs are rounded."""
        return any(layer.input_bits for layer in self.layers)

    @property
    def compressed(self) -> tuple[Layer, ...]:
        """The layers that something is attached to."""
        return tuple(layer for layer in self.layers if layer.format)

    def _ratio(self, name: str) -> float | None:
        now, before = getattr(self, name), getattr(self.dense, name, None)
        return before / now if now and before is not None else None

    def explain(self) -> list[str]:
        """Why a number did not move, or less than one would expect: sentences that follow from this row's own facts."""
        return [sentence for reason in _REASONS for sentence in reason(self)]

    def conditions(self) -> str:
        """What the numbers hold for."""
        seeds = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
        ratio = "× is dense over now; " if self.dense else ""
        return f"{ratio}{self.mode}; batch {self.batch}; {self.device}, {self.threads} threads, torch {self.torch_version}; {seeds}"

    def lines(self) -> list[tuple[str, str, str, str]]:
        """(what, dense, now, change) as text; what was not measured is left out."""
        found = [(title, show(self.dense) if self.dense else "", show(self), change(self)) for title, show, change in _LINES]
        return [line for line in found if line[2]]

    def _cells(self) -> list[tuple[str, ...]]:
        """The table with its head; the dense and change columns only where there is a reference."""
        table = [("measured", "dense", "now", "change"), *self.lines()]
        return table if self.dense else [(what, now) for what, _, now, _ in table]

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [line[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True)) for line in table]
        return "\n".join([*lines, self.conditions()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        (first, *rest), *body = [[html.escape(cell) for cell in line] for line in self._cells()]
        head = f'<th scope="col" style="text-align:left">{first}</th>' + "".join(f'<th scope="col">{c}</th>' for c in rest)
        lines = [f'<th scope="row" style="text-align:left">{what}</th>' + "".join(f"<td>{c}</td>" for c in cells) for what, *cells in body]
        caption = f'<caption style="caption-side:bottom">{html.escape(self.conditions())}</caption>'
        rows = "".join(f"<tr>{line}</tr>" for line in lines)
        return f'<table style="font-variant-numeric:tabular-nums">{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _as(form: str, name: str):
    """A function from a row to the text of one of its fields, empty where it is None."""
    return lambda row: "" if getattr(row, name) is None else form.format(getattr(row, name))


def _worst(row: Row) -> str:
    return "" if row.worst_class is None else f"{row.worst_class[2]:.1%} ({row.worst_class[0]})"


def _worst_change(row: Row) -> str:
    if row.worst_class is None or row.worst_class[1] is None:
        return ""
    return f"{100 * (row.worst_class[2] - row.worst_class[1]):+.1f} points ({row.worst_class[0]})"


def _quartiles(row: Row) -> str:
    return "" if row.latency_ms is None else f"{row.latency_low:.3f} to {row.latency_high:.3f}"


def _nothing(row: Row) -> str:
    return ""


_LINES = (  # what, its text in a row, the text of its change
    ("accuracy", _as("{:.2%}", "accuracy"), _as("{:+.2f} points", "accuracy_change")),
    ("worst class", _worst, _worst_change),
    ("answers that changed", _as("{:,}", "flipped"), _as("{:.1%}", "flipped_share")),
    ("parameters", _as("{:,}", "parameters"), _as("{:.2f}×", "parameters_ratio")),
    ("multiply-adds an image", _as("{:,}", "multiply_adds"), _as("{:.2f}×", "flops_ratio")),
    ("bits a covered weight", _as("{:.2f}", "weight_bits"), _nothing),
    ("bits an activation", _as("{}", "activation_bits"), _nothing),
    ("file, bytes", _as("{:,}", "file_bytes"), _as("{:.2f}×", "file_ratio")),
    ("loading, ms", _as("{:.2f}", "load_ms"), _nothing),
    ("peak memory, bytes", _as("{:,}", "peak_memory_bytes"), _nothing),
    ("latency, ms", _as("{:.3f}", "latency_ms"), _as("{:.2f}×", "latency_ratio")),
    ("latency, quartiles", _quartiles, _nothing),
)


def _not_compressed(row: Row) -> Iterator[str]:
    if not row.compressed and (row.dense is None or row.parameters == row.dense.parameters):
        yield "This model is not compressed: nothing is attached to any of its layers, and every weight is stored."


def _collapse(row: Row) -> Iterator[str]:
    for name in row.collapsed:
        yield f"{name} has no weight left (layer collapse): whatever goes in, its bias comes out, and the layers before it do not count."


def _wrong_storage(row: Row) -> Iterator[str]:
    for layer in row.compressed:
        if layer.smallest_bytes < layer.bytes:
            how = "dense, zeros and all" if layer.format == "dense" else f"as {layer.format}"
            yield (
                f"{layer.name}: its mask is stored {how}, in {layer.bytes:,} bytes; {layer.smallest} would take {layer.smallest_bytes:,}. "
                'storage="auto" takes the smallest.'
            )
        elif layer.format == "dense" and layer.kept < layer.weights:
            yield f"{layer.name}: {layer.kept / layer.weights:.1%} is kept, so much that indices would cost more than the zeros."


def _uncovered(row: Row) -> Iterator[str]:
    left = [layer for layer in row.layers if not layer.format]
    if left and row.compressed:
        held = sum(layer.bytes for layer in left)
        names = ", ".join(layer.name for layer in left)
        yield f"Not covered: {names}. Stored dense, {held:,} bytes, {held / row.file_bytes:.1%} of the file."
    rest = row.array_bytes - sum(layer.bytes for layer in row.layers)
    if row.compressed and rest > 0.05 * row.file_bytes:
        yield f"Biases and batch norm are stored dense too: {rest:,} bytes, {rest / row.file_bytes:.1%} of the file."


def _indices(row: Row) -> Iterator[str]:
    kept = sum(layer.kept for layer in row.compressed)
    if not (row.index_bytes and kept):
        return
    values = sum(layer.bytes for layer in row.compressed) - row.index_bytes
    if row.dense is not None and max(1, row.file_ratio) < row.parameters_ratio:
        yield f"Parameters fell {row.parameters_ratio:.1f} times, the file {row.file_ratio:.1f} times: a weight's place is stored too."
    fillers = ", fillers between far weights included," if any(layer.format == "relative" for layer in row.compressed) else ""
    yield f"A kept weight costs {8 * values / kept:.1f} bits of value{fillers} and {8 * row.index_bytes / kept:.1f} bits of index."


def _header(row: Row) -> Iterator[str]:
    if row.header_bytes > 0.02 * row.file_bytes:
        yield f"The header (names, shapes, hash) is {row.header_bytes:,} bytes, {row.header_bytes / row.file_bytes:.1%} of this small file."


def _masked_filters(row: Row) -> Iterator[str]:
    for whole, mend in (
        (True, "bake(model) takes them out for real, and then file, work and time fall"),
        (False, 'biases and batch norms live on; unit="filter" silences these too, and bake(model) then takes them out'),
    ):
        masked = [layer for layer in row.compressed if layer.gone and layer.whole is whole]
        if masked and row.mode == "simulated":
            which = ", ".join(f"{layer.name} {layer.gone} of {layer.units}" for layer in masked[:4]) + (" ..." if len(masked) > 4 else "")
            yield f"Whole filters or neurons are masked where they stand ({which}): {mend}."


def _tables(row: Row) -> Iterator[str]:
    dense = {layer.name: layer.bytes for layer in row.dense.layers} if row.dense else {}
    for layer in row.compressed:
        if layer.levels and layer.bytes >= dense.get(layer.name, math.inf):
            yield f"{layer.name}: its codes and levels take {layer.bytes:,} bytes, more than the {dense[layer.name]:,} of its weights as they were."
    tables, held = sum(layer.table_bytes for layer in row.compressed), sum(layer.bytes for layer in row.compressed)
    if tables > 0.02 * held:
        yield f"What the codes stand for (scales, codebooks) takes {tables:,} bytes, {tables / held:.1%} of the covered layers."


def _inputs(row: Row) -> Iterator[str]:
    rounded = [layer for layer in row.layers if layer.input_bits]
    if rounded:
        found = ", ".join(f"{layer.name} {layer.input_bits} bits" for layer in rounded)
        left = ", ".join(layer.name for layer in row.layers if not layer.input_bits) or "no layer"
        yield f"Rounded inputs: {found}; as they were: {left}. The file holds no activations: it does not shrink by these, and rounding takes time."


def _same_work(row: Row) -> Iterator[str]:
    pruned, coded = any(layer.kept < layer.weights for layer in row.compressed), any(layer.levels for layer in row.compressed)
    if not (pruned or coded):
        return
    if row.dense is not None and row.multiply_adds and row.multiply_adds == row.dense.multiply_adds:
        if pruned:
            yield f"Multiply-adds stay at {row.multiply_adds:,}: the zeros sit in dense matrices, and a dense kernel multiplies by them too."
        if coded:
            yield f"Multiply-adds stay at {row.multiply_adds:,}: each code is unpacked to a float32 number, and multiplied as such."
    if row.latency_ratio is not None:
        noise = "noise" if 1 / SAME < row.latency_ratio < SAME else "to be measured again, with more rounds, before anyone believes it"
        if not row.rounds_inputs:
            yield f"The same dense kernels run on the same shapes: a latency ratio of {row.latency_ratio:.2f} is {noise}."
        if pruned:
            yield "A sparse kernel wins only where few enough weights stay; sparse_crossover() measures where that is on this machine."
        if coded:
            yield "Whole numbers are multiplied where the network is rewritten for them: integer_network(), and int8 in ONNX Runtime."
    if row.peak_memory_bytes is not None:
        yield "Peak memory does not fall with the file: in memory each weight is unpacked to a dense tensor."


def _less_work(row: Row) -> Iterator[str]:
    if row.latency_ratio is None or not row.flops_ratio or row.flops_ratio < SAME * max(1, row.latency_ratio):
        return
    fell = f"Multiply-adds fell {row.flops_ratio:.1f} times"
    if row.latency_ratio * SAME < 1:
        yield f"{fell}, yet it takes {1 / row.latency_ratio:.1f} times as long: choosing what to work out and putting it in its place costs more."
    else:
        yield (
            f"{fell}, the time {row.latency_ratio:.2f} times: starting a layer, moving maps through memory, batch norm and ReLU take time too, "
            "and kernels are made for widths of 8 or 16. With more images a batch the arithmetic counts for more."
        )


def _unsteady(row: Row) -> Iterator[str]:
    if row.latency_ms is not None and row.latency_high > 2 * row.latency_low:
        yield (
            f"Half of the runs took from {row.latency_low:.3f} to {row.latency_high:.3f} ms: something else was at work on this machine. "
            "Measure again when it rests, or with threads=1."
        )


def _decoded(row: Row) -> Iterator[str]:
    if row.compressed and row.dense is not None and row.load_ms > SAME * row.dense.load_ms:
        what = "fewer bytes are read, but they" if row.file_bytes < row.dense.file_bytes else "its bytes"
        yield f"Loading takes {row.load_ms:.1f} ms against {row.dense.load_ms:.1f}: {what} have to be decoded."


def _forgets(row: Row) -> Iterator[str]:
    if row.flipped and row.dense is not None:
        net = abs(round(row.accuracy * row.images) - round(row.dense.accuracy * row.images))
        if row.flipped > 2 * net:
            yield (
                f"Accuracy moved by {net:,} images of {row.images:,}, yet {row.flipped:,} answers changed: what is forgotten and what is "
                "newly right cancel in the mean."
            )


_REASONS = (_not_compressed, _collapse, _wrong_storage, _uncovered, _indices, _tables, _header, _decoded, _inputs, _masked_filters, _same_work,
            _less_work, _unsteady, _forgets)  # fmt: skip


_COLUMNS = {
    "accuracy %": lambda r: None if r.accuracy is None else 100 * r.accuracy,
    "accuracy change": lambda r: r.accuracy_change,
    "parameters": lambda r: r.parameters,
    "parameters ratio": lambda r: r.parameters_ratio,
    "multiply-adds": lambda r: r.multiply_adds,
    "FLOPs ratio": lambda r: r.flops_ratio,
    "weight bits": lambda r: r.weight_bits,
    "activation bits": lambda r: r.activation_bits,
    "file bytes": lambda r: r.file_bytes,
    "file ratio": lambda r: r.file_ratio,
    "load ms": lambda r: r.load_ms,
    "peak memory": lambda r: r.peak_memory_bytes,
    "latency ms": lambda r: r.latency_ms,
    "latency ratio": lambda r: r.latency_ratio,
    "worst class %": lambda r: None if r.worst_class is None else 100 * r.worst_class[2],
    "flipped %": lambda r: None if r.flipped is None else 100 * r.flipped_share,
    "seeds": lambda r: r.seeds,
    "mode": lambda r: r.mode,
}


def rows_table(rows: dict[str, Row]) -> pd.DataFrame:
    """One line a row, the survey's columns first; accuracies in per cent, changes in points, ratios dense over now."""
    return pd.DataFrame([{title: get(row) for title, get in _COLUMNS.items()} for row in rows.values()], index=list(rows))


def over_seeds(rows: Sequence[Row]) -> pd.Series:
    """The same measurement over several seeds, as text: a column's mean ± its sample standard deviation; n is the number of rows.

    Columns that were not measured in every row are left out. ValueError where there is no row.
    """
    if not rows:
        raise ValueError("over_seeds needs at least one row")
    columns = {title: [get(row) for row in rows] for title, get in _COLUMNS.items() if title not in ("seeds", "mode")}
    return pd.Series({title: _plus_minus(v) for title, v in columns.items() if None not in v} | {"n": len(rows)})


def _plus_minus(values: Sequence[float]) -> str:
    """The mean, to the first digit of the spread."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    if spread == 0:
        number = f"{mean:,.0f}" if mean.is_integer() else f"{mean:,.4g}"
        return f"{number} ± 0" if len(values) > 1 else number
    digits = min(6, max(0, -math.floor(math.log10(spread))))
    return f"{mean:,.{digits}f} ± {spread:,.{digits}f}"
