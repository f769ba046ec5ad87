"""Stored runs: what takes minutes to train is trained once, kept as a small file with its recipe, versions and machine, and read from then on.

A run is named by the hash of its recipe: the same recipe is never trained twice, an interrupted sweep goes on where it stopped, and a changed
recipe is another run. The files lie in ``datasets/runs``.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from .data import DATASETS
from .zoo import card, write

RUNS = DATASETS / "runs"


class RunError(ValueError):
    """A stored run is missing, cut or altered; the message says which and how to make it anew."""


def machine() -> str:
    """The machine, the widest vectors that torch uses on it, and the versions behind a figure."""
    cpu, found = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if found.exists():
        cpu = next((line.split(":")[1].strip() for line in found.read_text().split("\n") if line.startswith("model name")), cpu)
    cores = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return f"{cpu}, {cores}, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"


def stored(recipe: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``work`` for ``recipe`` (plain JSON values both): read if it was done before, else done now and kept.

    The recipe holds all that the result depends on, and says its ``kind``.
    """
    path = _path(recipe)
    if path.is_file():
        return _read(path)["result"]
    start = time.perf_counter()
    content = {"recipe": recipe, "result": work(), "seconds": time.perf_counter() - start, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, (json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n").encode())
    return content["result"]


def table(kind: str) -> pd.DataFrame:
    """All stored runs of a kind, a line each: recipe and result side by side, with seconds, machine and date. RunError where there is none."""
    found = [_read(p) for p in sorted(RUNS.glob(f"{kind}-*.json"))]
    if not found:
        raise RunError(f"no stored run of kind {kind!r} in {RUNS}; 'python -m cmlib bench --only {kind}' makes them")
    return _lines(found)


def of(recipes: list[dict[str, Any]]) -> pd.DataFrame:
    """The runs of these recipes alone, a line each as in ``table``. RunError where one is missing."""
    for recipe in recipes:
        if not _path(recipe).is_file():
            raise RunError(f"no stored run of {recipe}; 'python -m cmlib bench --only {recipe['kind']}' makes it")
    return _lines([_read(_path(recipe)) for recipe in recipes])


def along(method: str, net: str, data: str, seed: int = 0) -> list[dict[str, Any]]:
    """A method's short runs on a network of the kit: knobs, training (in words), bytes of the covered weights, accuracy on validation; by bytes.

    Those along a slider or as the panel trains; else that of the atlas, unless it shared ``keep`` out among the layers. Empty where there is none.
    """
    wanted = {"method": method, "data": data, "seed": seed, "checkpoint": card(net, data, seed)["sha256"][:12]}
    found = [r for kind in ("by_bits", "learned") for r in _like(kind, network=net, **wanted)]
    told = [(r, f"{r['epochs']} epoch{'s' * (r['epochs'] > 1)}" + (f" of {r['images']:,} images" if "images" in r else "")) for r in found]
    if not told:
        best = sorted((r for r in _like("atlas", net=net, **wanted) if "keep" not in r["knobs"]), key=lambda r: r["validation"])[-1:]
        told = [(r, f"{r['rounds']} rounds of {r['images']:,} images at learning rate {r['rate']}") for r in best]
    lines = [{"knobs": r["knobs"], "training": how, "bytes": r["bytes"], "accuracy": r["validation"]} for r, how in told]
    return sorted(lines, key=lambda line: line["bytes"])


def _like(kind: str, **wanted: Any) -> list[dict[str, Any]]:
    """Recipe and result of the runs of a kind whose recipes have what is wanted; only files that name its method are read whole."""
    named = [p for p in sorted(RUNS.glob(f"{kind}-*.json")) if f'"{wanted["method"]}"' in p.read_text()]
    found = [_read(p) for p in named]
    return [r["recipe"] | r["result"] for r in found if wanted.items() <= r["recipe"].items()]


def _path(recipe: dict[str, Any]) -> Path:
    return RUNS / f"{recipe['kind']}-{_digest(recipe)[:12]}.json"


def _lines(found: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame([{**r["recipe"], **r["result"], **{k: r[k] for k in ("seconds", "machine", "date")}} for r in found])


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        whole = content.pop("sha256") == _digest(content)
    except (ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is cut or not a stored run ({error}); delete it and run the bench again") from error
    if whole and path.name != _path(content["recipe"]).name:
        raise RunError(f"{path} does not hold the run of its name, whose recipe is another; delete it and run the bench again")
    if not whole:
        raise RunError(f"{path} is altered: its content and its sha256 differ; delete it and run the bench again")
    return content
