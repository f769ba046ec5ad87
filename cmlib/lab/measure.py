"""What a compressed model really costs and what it lost, beside the dense one: counted, written to disk, timed.

Every ``..._ratio`` is dense over now: above 1 the compressed model is the better one. Times are medians after a warm-up, with a fixed
number of threads, the models taking turns.
"""

from __future__ import annotations

import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core.apply import plan_of, weighted, with_plain_weights
from ..core.codes import Codes, SparseCodes, Sum
from ..core.inputs import device_of, pair_of
from ..core.packed import Masked, Packed
from ..core.wrapped import Around
from . import files
from .cost import milliseconds, multiply_adds
from .row import Layer, Row
from .train import batches, predict

LOADS = 5  # how often a file is loaded to time it


def measure(
    model: nn.Module,
    reference: nn.Module | None = None,
    data: Any = None,
    *,
    part: str = "validation",
    batch: int = 1,
    rounds: int = 30,
    threads: int = 2,
) -> Row:
    """Everything that a row says of ``model``, and of the dense ``reference`` beside it; neither is changed.

    ``data`` (of load_data, or a pair (images, labels)) gives accuracy on its ``part`` and the ``batch`` images that time and memory are
    measured with; what needs data is None without. ``rounds`` forward passes are timed, fewer where they would take over two seconds.
    ValueError for a count below 1; ``FileError`` where the model holds what a file cannot.
    """
    if min(batch, rounds, threads) < 1:
        raise ValueError(f"measure needs batch, rounds and threads of 1 at least; got {batch}, {rounds}, {threads}")
    models = {"now": model} if reference is None else {"dense": reference, "now": model}
    with threads_at(threads):
        plain = {key: with_plain_weights(m) for key, m in models.items()}
        found = {key: _stored(m, plain[key]) | {"batch": batch, "threads": threads} for key, m in models.items()}
        if data is not None:
            images, labels = pair_of(data, part)
            x = next(iter(batches(images[torch.arange(batch) % len(images)], batch, model)))
            times = latency(plain, x, rounds, threads)
            answers = {key: predict(m, images).argmax(1) for key, m in plain.items()}
            for key, m in plain.items():
                found[key] |= _executed(m, x, times.loc[key])
                found[key] |= _judged(answers[key], answers.get("dense"), labels.cpu(), getattr(data, "classes", None))
    now = Row(**found["now"])
    if reference is None:
        return replace(now, latency_ratio=None)
    return replace(now, dense=replace(Row(**found["dense"]), flipped=None))


@contextmanager
def threads_at(count: int) -> Iterator[None]:
    """torch works with ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stored(model: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """What is known without any input: counts, the file that is really written, how long it takes to load."""
    plan = plan_of(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        files.save(model, path)
        held, load_ms = files.sizes(path), _load_ms(path, plain)
    whole = any(p.vectors for p in plan.values()) or all(p.dim() > 1 for p in plain.parameters())
    layers = tuple(_layer(n, m.weight, plan.get(n), whole) for n, m in weighted(plain).items())
    counted = [layer for layer in layers if layer.format] or layers
    float_bytes = next((p.element_size() for p in plain.parameters()), 4)
    return {
        "mode": "simulated" if plan else "baked",
        "parameters": sum(p.numel() for p in plain.parameters()) - sum(layer.weights - layer.kept for layer in layers),
        "weight_bits": 8 * sum(layer.bytes for layer in counted) / max(1, sum(layer.weights for layer in counted)),
        "activation_bits": max((layer.input_bits for layer in layers if layer.input_bits), default=8 * float_bytes),
        "file_bytes": held["file"], "header_bytes": held["header"], "array_bytes": held["arrays"], "index_bytes": held["indices"],
        "load_ms": load_ms, "layers": layers, "device": _name(device_of(model)), "torch_version": torch.__version__,
    }  # fmt: skip


def _load_ms(path: Path, plain: nn.Module) -> float:
    times = []
    for _ in range(LOADS + 1):  # the first warms up
        fresh = deepcopy(plain)
        started = time.perf_counter()
        files.load(path, fresh)
        times.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times[1:]))


def _layer(name: str, weight: Tensor, packed: Packed | None, whole: bool) -> Layer:
    if packed is None:
        return Layer(name, weight.numel(), weight.numel(), weight.nbytes)
    cost, rows = costs(packed), packed.rows
    held = sum(cost.values())
    sizes = packed.sizes() if isinstance(packed, Masked) else {packed.format(): held}
    smallest = min(sizes, key=sizes.__getitem__)
    counts = {"levels": max((c.count for c in codes_in(packed)), default=0), "table_bytes": cost["tables"], "input_bits": input_bits(packed)}
    return Layer(name, weight.numel(), packed.kept, held, packed.format(), smallest, sizes[smallest], len(rows), int((~rows).sum()), whole, **counts)


def costs(packed: Packed) -> dict[str, int]:
    """The bytes of a packed value by what they say.

    ``values`` (floats, or codes), ``tables`` (what the codes' levels are made of: scales, codebooks), ``places`` (which weights stay) and
    ``inputs`` (what the layer's inputs are rounded to).
    """
    plain, streams = packed.parts()
    sizes = {n: a.nbytes for n, a in plain.items()} | {n: -(-len(numbers) * k // 8) for n, (numbers, k) in streams.items()}
    found = dict.fromkeys(("values", "tables", "places", "inputs"), 0)
    for name, size in sizes.items():
        words = set(name.split("."))
        found["places" if words & files.PLACES else "tables" if "params" in words else "inputs" if "input" in words else "values"] += size
    return found


def bare(packed: Packed) -> Packed:
    """What stands for the weight, without what is put around it."""
    return bare(packed.inner) if isinstance(packed, Around) else packed


def codes_in(packed: Packed) -> list[Codes]:
    """The codes that a packed value is made of, in order; none where its weights are floats."""
    packed = bare(packed)
    if isinstance(packed, (SparseCodes, Sum)):
        return [c for p in (packed.terms if isinstance(packed, Sum) else (packed.codes,)) for c in codes_in(p)]
    return [packed] if isinstance(packed, Codes) else []


def input_bits(packed: Packed) -> int | None:
    """Bits of the codes that a layer's inputs are rounded to; None where they are not."""
    given = getattr(packed, "input", None)
    return None if given is None else (given.count - 1).bit_length()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _executed(plain: nn.Module, x: Tensor, times: pd.Series) -> dict[str, Any]:
    counted, memory = multiply_adds(plain, x[:1].to(device_of(plain))), peak_memory(plain, x)
    spent = {"latency_ms": times.ms, "latency_low": times.low, "latency_high": times.high, "latency_ratio": times.ratio}
    return {"multiply_adds": counted, "peak_memory_bytes": memory} | {name: float(value) for name, value in spent.items()}


def _judged(answers: Tensor, dense: Tensor | None, labels: Tensor, classes: Sequence[str] | None) -> dict[str, Any]:
    right = answers == labels
    worst = min(labels.unique().tolist(), key=lambda c: right[labels == c].double().mean().item())
    here = labels == worst
    before = None if dense is None else (dense[here] == worst).double().mean().item()
    return {
        "accuracy": right.double().mean().item(), "images": len(labels),
        "flipped": None if dense is None else int((answers != dense).sum()),
        "worst_class": (classes[worst] if classes else str(worst), before, right[here].double().mean().item()),
    }  # fmt: skip


def latency(models: dict[str, nn.Module], example: Tensor, rounds: int = 30, threads: int = 2) -> pd.DataFrame:
    """Milliseconds of a forward pass of ``example`` (a batch) through each model, with plain weights, the models taking turns.

    A line a model: ms (median), low, high (quartiles), ms_per_image, ratio (median over rounds of the first model's time over this
    one's), rounds (fewer than asked where they would take over two seconds). Neither models nor thread settings are changed.
    """
    calls = [partial(_forward, with_plain_weights(m), example.to(device_of(m))) for m in models.values()]
    with threads_at(threads), torch.inference_mode():
        times = milliseconds(*calls, repeats=rounds, seconds=2.0)
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75), axis=1)
    ratio = np.median(times[0] / times, axis=1)
    columns = {"ms": middle, "low": low, "high": high, "ms_per_image": middle / len(example), "ratio": ratio, "rounds": times.shape[1]}
    return pd.DataFrame(columns, index=pd.Index(list(models), name="model"))


def _forward(model: nn.Module, x: Tensor) -> None:
    model(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {s.data_ptr() for s in _storages((args, kwargs))}
        out = op(*args, **(kwargs or {}))
        for storage in _storages(out):
            key, size = storage.data_ptr(), storage.nbytes()
            if size and key not in given and key not in self.seen:
                self.seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.layout is torch.strided]


def peak_memory(model: nn.Module, example: Tensor) -> int:
    """Most bytes held at once in a forward pass of ``example``: plain weights and buffers, the input, what the layers make on the way.

    On a GPU what its allocator counts. On a CPU the tensors that operations return, while they live; a kernel's own scratch space is
    not seen.
    """
    model, device = with_plain_weights(model), device_of(model)
    x = example.to(device)
    held = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers(), x]}.values())
    with torch.no_grad():
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            _forward(model, x)
            return held + torch.cuda.max_memory_allocated(device) - before
        with _Live() as tracked:
            model(x)
    return held + tracked.peak


def sparse_crossover(
    shape: tuple[int, int] = (500, 800),
    batch: Sequence[int] = (1, 64),
    keeps: Sequence[float] = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01),
    block: int | None = None,
    *,
    rounds: int = 30,
    threads: int = 2,
    device: str = "cpu",
    seed: int = 0,
) -> pd.DataFrame:
    """Measured milliseconds of x w^T, x (batch, in), w ``shape`` (out, in), by the dense product and by torch's sparse one, taking turns.

    Sparse is CSR with weights removed at random, or BSR with whole ``block`` by ``block`` squares removed. A line a batch and keep:
    dense_ms, sparse_ms (medians), speedup (median over rounds of dense over sparse), low, high (its quartiles), sparse_faster (in at
    least three rounds of four), max_error. ``first_faster`` reads off where sparse begins to win. ValueError where the blocks do not fit
    the shape; ArithmeticError where the two products differ by more than rounding.
    """
    side = block or 1
    if side < 1 or shape[0] % side or shape[1] % side:
        raise ValueError(f"shape={tuple(shape)} cannot be cut into blocks of {block} by {block}")
    draw = torch.Generator().manual_seed(seed)
    w, score = torch.randn(*shape, generator=draw), torch.rand(shape[0] // side, shape[1] // side, generator=draw)
    score = score.repeat_interleave(side, 0).repeat_interleave(side, 1)
    rows = []
    with threads_at(threads), torch.inference_mode():
        for n in batch:
            x = torch.randn(n, shape[1], generator=draw).to(device)
            rows += [{"batch": n, "keep": keep} | _compared(x, (w * (score < keep)).to(device), block, rounds) for keep in keeps]
    return pd.DataFrame(rows)


def _compared(x: Tensor, w: Tensor, block: int | None, rounds: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse (CSR|BSR).*")
        s = w.to_sparse_bsr((block, block)) if block else w.to_sparse_csr()
    exact = F.linear(x, w)
    error = ((s @ x.T).T - exact).abs().max().item()
    if not error <= 1e-5 * w.shape[1] ** 0.5 * max(1.0, exact.abs().max().item()):
        raise ArithmeticError(f"the sparse product differs from the dense one by {error:.2g}")
    wait = partial(torch.cuda.synchronize, x.device) if x.is_cuda else lambda: None
    dense, sparse = milliseconds(lambda: (F.linear(x, w), wait()), lambda: (s @ x.T, wait()), repeats=rounds)
    low, middle, high = np.quantile(dense / sparse, (0.25, 0.5, 0.75))
    times = {"dense_ms": float(np.median(dense)), "sparse_ms": float(np.median(sparse)), "speedup": middle, "low": low, "high": high}
    return times | {"sparse_faster": bool(low > 1), "max_error": error}


def first_faster(table: pd.DataFrame) -> dict[int, float | None]:
    """{batch: the highest keep at which sparse was faster, or None for never} of a table of ``sparse_crossover``."""
    won = {int(n): rows.keep[rows.sparse_faster] for n, rows in table.groupby("batch")}
    return {n: None if keeps.empty else float(keeps.max()) for n, keeps in won.items()}
