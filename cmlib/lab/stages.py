"""Stages: a method's knob is turned in steps and the network trained after each, as INQ's portion is; and recipes, whose steps are data.

Unlike compressing again, turning a knob keeps what the method has learned: its state, and the float weights behind the codes. A recipe's step
attaches its method anew, to those float weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..core.apply import attached, with_latent_weights
from ..core.inputs import Pair
from ..core.knobs import knobs_of
from ..core.method import Method, call
from ..core.schedule import Recipe, shared_out
from ..methods import find
from .data import Data
from .guided import Guided, guided_loss
from .train import Fit, Loss, fit
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
            what = "inputs or gradients, or of all layers at once, which stay"
            raise ValueError(f"{min(fixed)} of {a.method.key} is a knob of {what}; compress(..., {min(fixed)}=...) sets it")
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


def follow(model: nn.Module, steps: Method | str | Recipe, data: Data | Pair, *, epochs: int = 4, where: str = "*", seed: int = 0,
           knobs: dict[str, Any] | None = None, loss: Loss = F.cross_entropy, **training: Any) -> tuple[nn.Module, list[Fit]]:  # fmt: skip
    """A copy of ``model`` taken through a recipe, or through ``Step`` s of your own: (the copy, what each step's ``fit`` did).

    Each step attaches its method to the float weights that the one before it left, and trains for its share of the ``epochs``. Where a step is
    guided, a copy of the given network, in full precision, trains beside it and goes along from step to step. ``knobs`` are the recipe's, further
    keywords go to ``fit``. ValueError for a method that is no recipe.
    """
    if isinstance(steps, (Method, str)):
        method = find(steps)
        if method.kind != "recipe":
            raise ValueError(f"{method.key} is a {method.kind}, not a recipe, and has no steps to follow; compress(model, {method.key!r}) applies it")
        steps = call(method.fn, {}, method.bind(knobs or {}))
    guide, runs = with_latent_weights(model), []
    for number, (step, share) in enumerate(zip(steps, shared_out([s.share for s in steps], epochs), strict=True)):
        model = compress(with_latent_weights(model), step.key, where=where, data=data, **step.knobs)
        trained, total = (Guided(model, guide), guided_loss(step.guide, loss)) if step.guide else (model, loss)
        runs.append(fit(trained, data, epochs=share, seed=seed + 1000 * number, loss=total, **training))
        if runs[-1].interrupted:
            break
    return model, runs
