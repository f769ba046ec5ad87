"""Training and evaluating: one loop for everything that the kit trains.

``fit`` knows no method. What a method wants of training (a penalty, a projection after the step, noise) reaches it as the
``penalty`` and ``hooks`` that ``cmlib.core.training`` reads off the layers it has attached something to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.inputs import Pair, as_input, device_of, pair_of, sample
from ..core.method import Method
from ..core.planner import gather
from ..core.schedule import Schedule
from ..core.training import Hook, attached_hooks, penalty
from .data import Data
from .verbs import compress

Loss = Callable[[Tensor, Tensor], Tensor]
ADAMW = partial(torch.optim.AdamW, fused=True)


@dataclass
class Fit:
    """What ``fit`` did: a row an epoch (train loss, validation accuracy, seconds), the best epoch, whether it was cut short."""

    rows: list[dict[str, float]] = field(default_factory=list)
    best_accuracy: float = 0.0
    best_epoch: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def caching(model: nn.Module) -> AbstractContextManager:
    """Each attached weight worked out once inside. torch's cache is one for all threads, so a model with nothing attached keeps out of it."""
    return parametrize.cached() if any(parametrize.is_parametrized(m) for m in model.modules()) else nullcontext()


@contextmanager
def evaluating(model: nn.Module):
    """Evaluation mode, no gradients, each attached weight worked out once; the model's mode is as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), caching(model):
            yield model
    finally:
        for module, mode in modes:
            module.training = mode


def batches(images: Tensor, batch: int, model: nn.Module) -> Iterable[Tensor]:
    """The model's inputs in order, on its device, in its precision, in the memory layout that convolutions are fastest in."""
    for part in images.split(batch):
        x = as_input(part.to(device_of(model)), model)
        yield x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def predict(model: nn.Module, images: Tensor, *, batch: int = 250) -> Tensor:
    """Logits for all ``images`` (uint8, or floats as the network takes them), in evaluation mode, on the CPU."""
    with evaluating(model):
        return torch.cat([model(x).cpu() for x in batches(images, batch, model)])


def evaluate(model: nn.Module, data: Data | Pair, *, part: str = "validation", batch: int = 250) -> float:
    """Accuracy in [0, 1] on the validation part (``part="test"`` for final tables), or on a pair (images, labels)."""
    images, labels = pair_of(data, part)
    return (predict(model, images, batch=batch).argmax(1) == labels).double().mean().item()


def shifted(x: Tensor, generator: torch.Generator, by: int = 2, flip: bool = False) -> Tensor:
    """Each image moved by up to ``by`` pixels either way over black, and mirrored half the time where ``flip``."""
    n, _, h, w = x.shape
    if flip:
        x = torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.5, x.flip(3), x)
    dy, dx = torch.randint(0, 2 * by + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(h) + dy, torch.arange(w) + dx
    padded = F.pad(x, (by,) * 4)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fit(
    model: nn.Module,
    data: Data | Pair,
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    batch: int = 128,
    weight_decay: float = 0.0,
    loss: Loss = F.cross_entropy,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    schedule: str = "cosine",
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    hooks: Sequence[Hook] = (),
    seed: int = 0,
    keep_best: bool = True,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Fit:
    """Train ``model`` in place on the training part and leave it in its best state on the validation part.

    The learning rate rises over the first tenth and then falls as a cosine (``schedule="constant"`` holds it).
    ``loss(logits, labels)`` gains the penalties of whatever methods are attached. ``hooks`` run around each step. A pair
    (images, labels) instead of a data set serves for training and validation both; where
    its labels are no classes, the last state is kept. ``keep_best=False`` keeps the last state;
    interrupting (KeyboardInterrupt) keeps the best so far and returns.
    """
    if epochs < 0 or batch < 1 or lr < 0:
        raise ValueError(f"fit needs epochs >= 0, batch >= 1 and lr >= 0; got epochs={epochs}, batch={batch}, lr={lr}")
    images, labels = pair_of(data, "train")
    device, classes = device_of(model), not labels.is_floating_point()
    steps = -(-len(labels) // batch)
    step_rule = optimizer([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    rate = _rate(step_rule, schedule, max(1, epochs * steps))
    few = sample((images, labels), batch)
    hooks = [*hooks, *attached_hooks(model, steps, lambda layers, name: gather(model, layers, name, few, loss, batch))]
    draw = torch.Generator().manual_seed(seed)
    done, best, started = Fit(), None, time.perf_counter()
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            for epoch in range(1, epochs + 1):
                model.train()
                total = 0.0
                for rows in torch.randperm(len(labels), generator=draw).split(batch):
                    x = as_input(images[rows], model)
                    x = augment(x, draw) if augment else x
                    x = x.to(device, memory_format=torch.channels_last) if x.dim() == 4 else x.to(device)
                    total += _step(
                        model,
                        x,
                        labels[rows].to(device),
                        loss,
                        lambda m: penalty(m, len(labels), rate.last_epoch / (epochs * steps)),
                        step_rule,
                        hooks,
                    )
                    rate.step()
                accuracy = evaluate(model, data) if classes else float("nan")
                done.rows.append({"epoch": epoch, "loss": total / steps, "accuracy": accuracy, "seconds": time.perf_counter() - started})
                if not classes or accuracy >= done.best_accuracy:
                    done.best_accuracy, done.best_epoch = accuracy, epoch
                    best = deepcopy(model.state_dict()) if keep_best else None
                if progress:
                    progress(done.rows[-1])
        except KeyboardInterrupt:
            done.interrupted = True
    if best is not None:
        model.load_state_dict(best)
    model.train(was_training)
    done.seconds = time.perf_counter() - started
    return done


def _step(model, x, y, loss: Loss, extra: Callable[[nn.Module], Tensor | float], rule: torch.optim.Optimizer, hooks: Sequence[Hook]) -> float:
    for hook in hooks:
        hook.before(model, rule)
    rule.zero_grad(set_to_none=True)
    with caching(model):
        value = loss(model(x), y) + extra(model)
    value.backward()
    for hook in hooks:
        hook.gradients(model, rule)
    rule.step()
    for hook in hooks:
        hook.after(model, rule)
    return value.item()


def prune_and_train(model: nn.Module, method: Method | str, data: Data | Pair, schedule: Schedule, *, where: str = "*", seed: int = 0,
                    knobs: dict[str, Any] | None = None, **training: Any) -> tuple[nn.Module, list[Fit]]:  # fmt: skip
    """A copy of ``model`` pruned and trained stage by stage: (the copy, what each stage's ``fit`` did).

    Every stage scores the weights as they then are; what is gone stays gone. ``knobs`` go to the method, further keywords to ``fit``.
    """
    runs = []
    for number, stage in enumerate(schedule):
        model = compress(model, method, where=where, data=data, keep=stage.keep, **(knobs or {}))
        runs.append(fit(model, data, epochs=stage.epochs, seed=seed + 1000 * number, **training))
        if runs[-1].interrupted:
            break
    return model, runs


def _rate(rule: torch.optim.Optimizer, schedule: str, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(rule, factor=1.0)
    if schedule != "cosine":
        raise ValueError(f"schedule={schedule!r}; allowed are 'cosine' and 'constant'")
    highest = [group["lr"] for group in rule.param_groups]
    total = steps + 1 if steps != 9 else steps + 2  # of ten, torch divides by a rise of no steps
    return torch.optim.lr_scheduler.OneCycleLR(rule, highest, total_steps=total, pct_start=0.1, cycle_momentum=False)
