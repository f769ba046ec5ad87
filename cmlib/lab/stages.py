"""Stages: a method's knob is turned in steps and the network trained after each, as INQ's portion is.

Unlike compressing again, turning a knob keeps what the method has learned: its state, and the float weights behind the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.apply import attached
from ..core.inputs import Pair
from ..core.knobs import knobs_of
from ..core.method import Method
from .data import Data
from .train import Fit, fit
from .verbs import compress


def turn(model: nn.Module, **knobs: Any) -> nn.Module:
    """Give the methods attached to ``model`` other values of their weights' knobs; the model itself, changed, all else as it was.

    ValueError where no method that learns is attached, for a value that is not allowed, and for a knob of the inputs or gradients.
    """
    layers = [a for _, _, a in attached(model) if a.method is not None]
    if not layers:
        raise ValueError("no method that learns is attached to the model; compress() attaches one")
    for a in layers:
        elsewhere = {name for fn in a.method.companions[1:] for name in knobs_of(fn)}
        if fixed := elsewhere & knobs.keys():
            raise ValueError(f"{min(fixed)} of {a.method.key} is a knob of inputs or gradients, which stay; compress(..., {min(fixed)}=...) sets it")
        a.knobs = a.method.bind({**a.knobs, **knobs})
    return model


def in_stages(model: nn.Module, method: Method | str, data: Data | Pair, knob: str, stages: Sequence[tuple[Any, int]], *,
              where: str = "*", seed: int = 0, knobs: dict[str, Any] | None = None, **training: Any) -> tuple[nn.Module, list[Fit]]:  # fmt: skip
    """A copy of ``model`` with the method attached, its ``knob`` turned to each value in turn and trained: (the copy, what each stage's ``fit`` did).

    ``stages`` are pairs (value, epochs), such as ``((0.5, 1), (0.75, 1), (0.875, 1), (1.0, 0))`` for INQ's portion. ``knobs`` are the method's
    others, further keywords go to ``fit``. ValueError where the stages are no pairs.
    """
    if not isinstance(stages, Sequence) or not stages or any(not isinstance(stage, Sequence) or len(stage) != 2 for stage in stages):
        raise ValueError(f"stages={stages!r} must be pairs (value, epochs) with at least one of them, such as [(0.5, 1), (1.0, 0)]")
    model = compress(model, method, where=where, data=data, **{knob: stages[0][0]}, **(knobs or {}))
    runs = []
    for number, (value, epochs) in enumerate(stages):
        runs.append(fit(turn(model, **{knob: value}), data, epochs=epochs, seed=seed + 1000 * number, **training))
        if runs[-1].interrupted:
            break
    return model, runs
