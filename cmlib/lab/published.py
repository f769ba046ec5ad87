"""Published layer tables applied to real networks: how many weights they leave, and what these take to store, their places included.

A table is a small csv in the folder ``published``, one a paper, a row a layer, typed from the paper; every row names its source. Networks may lie
on torch's meta device, where VGG-16 takes no memory: only shapes are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from ..core.apply import weighted
from ..core.storage import FORMATS, nbytes

TABLES = Path(__file__).with_suffix("")
UNITS = {"K": 1e3, "M": 1e6}
BYTES = 4  # a value in float32


def published_layers(paper: str, network: str) -> pd.DataFrame:
    """The paper's table of a network: layer, weights (as printed, rounded), kept, density in (0, 1], source.

    Its last row, ``total``, is what the paper claims for the whole network; of a layer, kept is density times weights. ValueError names the
    papers, or the paper's networks, that there are.
    """
    path = TABLES / f"{paper}.csv"
    if path not in TABLES.glob("*.csv"):
        raise ValueError(f"no published layers of {paper!r}; there are those of {', '.join(sorted(p.stem for p in TABLES.glob('*.csv')))}")
    table = pd.read_csv(path, dtype=str)
    found = table[table.network == network].reset_index(drop=True)
    if found.empty:
        raise ValueError(f"{paper} has no network {network!r}; it has {', '.join(table.network.unique())}")
    density = found.density_percent.astype(float) / 100
    numbers = {"weights": found.weights.map(_number), "kept": found.kept.map(_number).fillna(density * found.weights.map(_number))}
    return found[["layer"]].assign(**numbers, density=density, source=found.source)


def _number(printed: str | float) -> float:
    """A count as papers print it: 38M, 0.5K; NaN where it is not printed."""
    return float(printed[:-1]) * UNITS[printed[-1]] if isinstance(printed, str) else math.nan


def applied(network: nn.Module, densities: Sequence[float], *, seed: int = 0) -> pd.DataFrame:
    """The densities given to a network's convolutions and dense layers in their order: layer, weights, density, kept, and the bytes by format.

    Bytes (columns dense, bitmap, csr, relative) are those of ``core.storage`` for the kept weights in float32 and their places, drawn at random
    layer by layer; biases, which nobody prunes, are left out. ValueError where densities and layers differ in number, or one lies outside [0, 1].
    """
    layers, densities = weighted(network), list(densities)
    if len(layers) != len(densities):
        raise ValueError(f"{len(densities)} densities for {len(layers)} layers: {', '.join(layers)}")
    wrong = [d for d in densities if not 0 <= d <= 1]
    if wrong:
        raise ValueError(f"a density is a share in [0, 1]; got {wrong[0]}")
    rng, rows = np.random.default_rng(seed), []
    for (name, layer), density in zip(layers.items(), densities, strict=True):
        shape = tuple(layer.weight.shape)
        kept = round(density * math.prod(shape))
        rows.append({"layer": name, "weights": math.prod(shape), "density": density, "kept": kept}
                    | nbytes(random_places(math.prod(shape), kept, rng), shape, BYTES))  # fmt: skip
    return pd.DataFrame(rows)


def random_places(total: int, kept: int, rng: np.random.Generator) -> np.ndarray:
    """``kept`` of ``total`` places, rising, every choice equally likely, without a number for each of ``total``.

    Each place is drawn with a chance a little too high, by the gaps between them; then what is too many is dropped at random.
    """
    if not 0 <= kept <= total:
        raise ValueError(f"{kept:,} of {total:,} places cannot be drawn")
    if kept == 0:
        return np.zeros(0, np.int64)
    chance = min(1.0, (kept + 6 * math.sqrt(kept) + 20) / total)
    found = np.zeros(0, np.int64)
    while len(found) < kept:
        ahead = int(chance * total + 6 * math.sqrt(chance * total)) + 20
        found = rng.geometric(chance, ahead).cumsum() - 1
        found = found[: np.searchsorted(found, total)]
    return np.delete(found, rng.choice(len(found), len(found) - kept, replace=False, shuffle=False))


def in_megabytes(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of what ``applied`` gives, the whole network's megabytes by format: values, and places (with the fillers that stand for long gaps)."""
    values = {form: BYTES * (table.weights if form == "dense" else table.kept).sum() / 1e6 for form in FORMATS}
    return {form: {"values": values[form], "places": table[form].sum() / 1e6 - values[form]} for form in FORMATS}
