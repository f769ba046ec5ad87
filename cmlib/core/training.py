"""What attached methods ask of training: gradients rewritten, weights projected after a step, penalties added to the loss.

``lab.train.fit`` calls these and knows no method.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .apply import attached, latent
from .method import apart, call, end_to_end, evidence_of
from .packed import Masked


@dataclass(frozen=True)
class Hook:
    """What happens around an optimizer step; each part takes (model, optimizer)."""

    before: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None
    gradients: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None
    after: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None


def attached_hooks(model: nn.Module, epoch: int = 1, gathered: Callable[[dict[str, nn.Module], str], Any] | None = None) -> list[Hook]:
    """What attached methods make of gradients, and the projections that they ask for after each step, ``epoch`` of which make an epoch.

    ``gathered(layers, name)`` gives them the evidence of that name; a joint method's weights are projected as one vector.
    """
    learning = [(name, layer, a) for name, layer, a in attached(model) if a.method is not None]
    rewritten = [(layer, a) for _, layer, a in learning if a.method.training.gradient]
    steps, alike = itertools.count(1), {}
    for name, layer, a in learning:
        if a.method.training.project:
            alike.setdefault((a.method, *sorted(a.knobs.items())), {})[name] = layer, a

    def rewrite(_: nn.Module, rule: torch.optim.Optimizer) -> None:
        for w, a in ((latent(layer), a) for layer, a in rewritten):
            if w.grad is not None:
                available = {**a.content(), "g": w.grad, "lr": rule.param_groups[0]["lr"], "w": w.detach()}
                w.grad = call(a.method.training.gradient, available, a.knobs)

    def project(_: nn.Module, rule: torch.optim.Optimizer) -> None:
        step = next(steps)
        available = {"lr": rule.param_groups[0]["lr"], "step": step, "epoch_ends": step % epoch == 0}
        for (method, *knobs), found in alike.items():
            ask, layers = method.training.project, {n: layer for n, (layer, _) in found.items()}
            weights = {n: latent(layer).detach() for n, layer in layers.items()}
            held = {n: {**a.content(), **available, "w": weights[n], "g": latent(layer).grad} for n, (layer, a) in found.items()}
            evidence = {e: gathered(layers, e) for e in evidence_of(ask) if any(e not in h for h in held.values())}
            given = {n: {e: evidence[e][n] if e in evidence else h[e] for e in evidence_of(ask)} for n, h in held.items()}
            with torch.no_grad():
                if method.joint:
                    new = apart(call(ask, end_to_end(given), dict(knobs)), weights)
                else:
                    new = {n: call(ask, g, dict(knobs)) for n, g in given.items()}
                for n, w in weights.items():
                    w.copy_(new[n].values if isinstance(new[n], Masked) else new[n])
                    if isinstance(new[n], Masked):
                        found[n][1].remember({"mask": new[n].mask, **new[n].state})

    return [Hook(gradients=rewrite, after=project)] if alike or rewritten else []


def penalty(model: nn.Module, examples: int, progress: float) -> Tensor | float:
    """The sum of what attached methods add to the task's mean loss. It is not another training forward: nothing is drawn or counted twice."""
    available = {"examples": examples, "progress": progress}
    terms = [
        call(a.method.training.penalty, {**available, "packed": a.packed(latent(layer)), "w": latent(layer)}, a.knobs)
        for _, layer, a in attached(model)
        if a.method is not None and a.method.training.penalty
    ]
    return sum(terms)
