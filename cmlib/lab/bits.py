"""How many bits each layer gets: what few bits do to one layer alone, and the best choice for all layers under a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.func import functional_call

from ..core.apply import Plan, attach_plan, substituted, surrounded, with_plain_weights
from ..core.inputs import Pair, pair_of
from ..core.knobs import nearest
from ..core.method import Method
from ..core.planner import Planner
from ..methods import find
from .data import Data
from .train import batches, evaluating

BITS = (8, 6, 5, 4, 3, 2, 1)


def _quantizer(method: Method | str) -> Method:
    method = find(method)
    if "bits" not in method.knobs:
        own = ", ".join(method.knobs) or "none"
        raise ValueError(f"{method.key} has no knob 'bits' (its knobs are {own}); give a quantizer that has, such as integer_only_quantization")
    return method


def bit_sensitivity(model: nn.Module, method: Method | str, data: Data | Pair, *, bits: int | Sequence[int] = BITS, where: str = "*",
                    part: str = "validation", batch: int = 250, **knobs: Any) -> pd.DataFrame:  # fmt: skip
    """What each layer makes of few bits: accuracy with that layer alone quantized, not trained.

    A line a layer and number of bits: layer, bits, bytes (of the layer's weight, tables included), accuracy in [0, 1] on ``part``, drop (from the
    model as given). The model is not changed.
    """
    planner, plain = Planner(model, _quantizer(method), where=where, data=data), with_plain_weights(model)
    images, labels = pair_of(data, part)
    dense, rows = _accuracy(plain, {}, images, labels, batch), []
    for count in [bits] if isinstance(bits, int) else bits:
        for name, packed in planner(**knobs, bits=count).items():
            accuracy = _accuracy(plain, {name: packed}, images, labels, batch)
            rows.append({"layer": name, "bits": int(count), "bytes": packed.bits() // 8, "accuracy": accuracy, "drop": dense - accuracy})
    return pd.DataFrame(rows)


def _accuracy(plain: nn.Module, plan: Plan, images: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    """Accuracy in [0, 1] with the plan in place of the model's own weights and inputs."""
    weights = substituted(plain, plan)
    with evaluating(plain), surrounded(plain, plan):
        answers = [functional_call(plain, weights, (x,)).argmax(1).cpu() for x in batches(images, batch, plain)]
    return (torch.cat(answers) == labels.cpu()).double().mean().item()


class Choice(NamedTuple):
    """Bits for some layers, the bytes that they take, and the accuracy that they lose if losses add up."""

    bits: dict[str, int]
    bytes: int
    drop: float


def bits_within(table: pd.DataFrame, budget: int) -> Choice:
    """The bits for each layer whose losses add up to the least while the layers' bytes stay within ``budget``.

    ``table`` is one of ``bit_sensitivity``; a layer that gains by fewer bits is taken to lose nothing. The choice is the best there is, if losses add
    up (of equal ones the smaller). ValueError where even the fewest bits take more, with what they take.
    """
    found = [Choice({}, 0, 0.0)]
    for layer, lines in table.groupby("layer", sort=False):
        more = [Choice({**c.bits, layer: r.bits}, c.bytes + r.bytes, c.drop + max(r.drop, 0.0)) for c in found for r in lines.itertuples()]
        found = _undominated(more)
    if found[0].bytes > budget:
        raise ValueError(f"budget={budget:,} bytes is too small: with the fewest bits in the table the layers take {found[0].bytes:,}")
    return [c for c in found if c.bytes <= budget][-1]


def _undominated(choices: list[Choice]) -> list[Choice]:
    """Those of which no other takes as few bytes and loses less, by rising bytes."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.drop)):
        if not kept or choice.drop < kept[-1].drop:
            kept.append(choice)
    return kept


def compress_bits(model: nn.Module, method: Method | str, bits: dict[str, int] | Choice, data: Any = None, **knobs: Any) -> nn.Module:
    """A copy of ``model`` in which each layer of ``bits`` {layer: bits} is quantized with its own number, the others left as they are."""
    method, copy, bits = _quantizer(method), deepcopy(model), bits.bits if isinstance(bits, Choice) else bits
    names = [n for n, _ in model.named_modules()]
    if unknown := [n for n in bits if n not in names]:
        raise ValueError(f"the network has no layer {unknown[0]!r}{nearest(unknown[0], names)}")
    for count in sorted(set(bits.values())):
        own = method.bind({**knobs, "bits": count})
        planner = Planner(model, method, where=", ".join(n for n, b in bits.items() if b == count), data=data)
        attach_plan(copy, planner(**own), method, own)
    return copy
