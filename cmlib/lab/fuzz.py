"""Altered files by the thousand: whatever is done to a model's file, it loads as a network of the right shapes or is refused with a ``FileError``.

``python -m cmlib fuzz [--files 100000] [--seed S]``. Half of the files are altered as they lie on disk, where the sha256 must give them away. The
other half are altered inside, in an array or in what the header says, and sealed again with a right sha256, so that the decoders themselves are
reached. A file that takes longer than a second or claims more memory than a small multiple of the network is a failure too.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..core.apply import plan_of
from . import files
from .files import FileError, load, save
from .verbs import coded, compress
from .zoo import build

SECONDS = 1.0  # that a file may take
MEMORY = 64  # times the network's own bytes, that Python and numpy may hold for a file
GROWTH = 64  # MB by which the whole process may grow for it


def subjects() -> dict[str, nn.Module]:
    """Small compressed networks, one for each way in which a layer can be stored."""
    net = build("mlp", "digits")
    pruned = compress(net, "magnitude_pruning_han", keep=0.2)
    found = {f"masked, {s}": compress(net, "magnitude_pruning_han", keep=0.2, storage=s) for s in ("bitmap", "csr", "relative")}
    found["codes"] = compress(net, "dorefa_net", bits=3, a_bits=2)
    found["codebook"] = compress(net, "vq_gong", k=8)
    found["vectors"] = compress(net, "vq_gong", k=8, scheme="product")
    found["sum"] = compress(net, "inq", bits=5, portion=0.5)
    found["basis"] = compress(net, "lq_nets", bits=2, a_bits=32)
    found["evenly spaced inputs"] = compress(net, "stochastic_rounding_fixed_point", word_bits=8, fractional_bits=6, a_bits=8)
    found["sparse codes"] = compress(pruned, "vq_gong", k=8)
    found["sparse sum"] = compress(pruned, "inq", bits=5, portion=0.5)
    twice = ("codes", "codebook", "vectors", "sum", "sparse codes", "sparse sum")
    return found | {f"{name}, {coder}": coded(found[name], coder) for name in twice for coder in ("huffman", "ans")}


def as_it_lies(raw: bytes, draw: random.Random) -> bytes:
    """The file with some bytes changed, cut off, repeated or put in."""
    at, size = draw.randrange(len(raw)), draw.choice((1, 1, 2, 8, 64))
    kind = draw.randrange(4)
    if kind == 0:
        return raw[:at] + bytes(b ^ draw.randrange(1, 256) for b in raw[at : at + size]) + raw[at + size :]
    if kind == 1:
        return raw[:at]
    return raw[:at] + (raw[at : at + size] if kind == 2 else draw.randbytes(size)) + raw[at:]


def sealed(header: dict[str, Any], tensors: dict[str, Tensor], draw: random.Random) -> bytes:
    """The file with one to three things in it altered, under a right sha256."""
    header, tensors = deepcopy(header), dict(tensors)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if draw.random() < 0.5:
            _alter_array(tensors, draw)
        else:
            _alter_number(header["layers"], draw)
    header["sha256"] = files._digest(header, tensors)
    return safetensors.torch.save(tensors, {"cmlib": files._dump(header)})


def _alter_array(tensors: dict[str, Tensor], draw: random.Random) -> None:
    packed = sorted(n for n in tensors if "|" in n)
    name = draw.choice(packed)
    a, kind = tensors[name].numpy().copy(), draw.randrange(4)
    if kind == 0 and a.size:
        flat = a.reshape(-1).view(np.uint8)
        flat[[draw.randrange(flat.size) for _ in range(draw.choice((1, 4, 32)))]] = draw.randrange(256)
    elif kind == 1:
        a = a.reshape(-1)[: draw.randrange(a.size + 1)]
    elif kind == 2:
        a = np.concatenate([a.reshape(-1), a.reshape(-1)[: draw.randrange(1, 9)]])
    else:
        a = tensors[draw.choice(packed)].numpy()
    tensors[name] = torch.from_numpy(np.ascontiguousarray(a).copy())


def _alter_number(found: Any, draw: random.Random) -> None:
    """Another value for something in a header, wherever it lies."""
    while True:
        key = draw.choice(list(found) if isinstance(found, dict) else range(len(found)))
        inner = found[key]
        if isinstance(inner, (dict, list)) and inner:
            found = inner
            continue
        found[key] = draw.choice((0, 1, 2, 3, 7, 8, 255, 256, 65_537, 2**31, 2**62, "table", "huffman", "codes", [], {}, None, True))
        return


def altered(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``count`` files by turns of each kind of subject, alternately altered as they lie and sealed again: (what it is, its bytes)."""
    draw, whole = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in subjects().items():
            save(model, path := Path(folder) / "model")
            whole[name] = (path.read_bytes(), *files._read(path))
    for i in range(count):
        name = list(whole)[i // 2 % len(whole)]
        raw, header, tensors = whole[name]
        yield (f"{name}, as it lies", as_it_lies(raw, draw)) if i % 2 else (f"{name}, sealed", sealed(header, tensors, draw))


def tried(raw: bytes, path: Path) -> str:
    """Load a file: ``refused`` or ``loaded`` (as a network of the right shapes). AssertionError for anything else."""
    path.write_bytes(raw)
    start = time.perf_counter()
    try:
        model = load(path)
    except FileError:
        outcome = "refused"
    else:
        fresh = build("mlp", "digits")
        assert all(packed.dense().shape == fresh.get_submodule(n).weight.shape for n, packed in plan_of(model).items()), "a weight has another shape"
        assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10), "the network answers in another shape"
        outcome = "loaded"
    finally:
        path.unlink()  # a new file each time: writing over an old one waits for the disk
    assert time.perf_counter() - start < SECONDS, f"it took {time.perf_counter() - start:.1f} s"
    return outcome


def claimed(raw: bytes, path: Path) -> tuple[str, int]:
    """What became of a file, and the most bytes that Python and numpy held for it at once; tracemalloc must run.

    AssertionError where the process grew by more than ``GROWTH``, torch's memory included.
    """
    tracemalloc.reset_peak()
    before, peak = tracemalloc.get_traced_memory()[0], _peak()
    outcome = tried(raw, path)
    if (grown := _peak() - peak) > GROWTH:
        raise AssertionError(f"the process grew by {grown:.0f} MB")
    return outcome, tracemalloc.get_traced_memory()[1] - before


def _peak() -> float:
    """The most memory that this process has had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run(count: int, seed: int = 0) -> Counter:
    """Try ``count`` altered files: how many of each kind were refused and loaded. The first that fails raises, and says how to make it again."""
    outcomes: Counter = Counter()
    most = MEMORY * sum(p.nbytes for p in build("mlp", "digits").parameters())
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for i, (name, raw) in enumerate(altered(count, seed)):
                path = Path(folder) / str(i)
                try:
                    outcome, held = claimed(raw, path)
                    if held >= most:  # Python's own tables grow now and then; what a file claims it claims again
                        outcome, held = claimed(raw, path)
                    assert held < most, f"it claimed {held:,} bytes; {most:,} are allowed"
                except Exception as error:
                    raise AssertionError(f"file {i} of seed {seed} ({name}): {type(error).__name__}: {error}") from error
                kind = name.rpartition(", ")[2]
                assert (kind, outcome) != ("as it lies", "loaded"), f"file {i} of seed {seed} ({name}) loaded though its bytes are altered"
                outcomes[kind, outcome] += 1
    finally:
        tracemalloc.stop()
    return outcomes


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cmlib fuzz", description="Load altered files; each must be refused or be a network.")
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    for (kind, outcome), count in sorted(run(asked.files, asked.seed).items()):
        print(f"{kind}: {count:,} {outcome}")


if __name__ == "__main__":
    main()
