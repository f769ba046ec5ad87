"""Accuracy while the hand still moves: an interval from a stratified sample first, the exact figure when all images are through.

One pass does both. The images stand in an order whose every prefix is stratified, so the first of them are the sample and the rest complete the
count; nothing is computed twice, and between batches a newer move can take over. What lies before the first changed layer is kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.apply import Plan, surrounded, with_plain_weights
from ..core.inputs import as_input, device_of, pair_of, stratified

HALF_WIDTH = 0.02  # an estimate is shown once its interval is at most this wide to either side
FIRST = 250  # images before the first look
Z95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """The middle and half-width of the interval for the accuracy on all ``total`` images, from ``done`` of them."""

    accuracy: float
    half: float
    done: int
    total: int

    @property
    def exact(self) -> bool:
        return self.done == self.total


def interval(correct: Tensor, done: Tensor, total: Tensor, z: float = Z95) -> Estimate:
    """The 95 % interval for the share correct among all images, from counts of each class: correct, done, and in all."""
    middle, half = middle_and_half(correct, done, total, z)
    return Estimate(middle.item(), half.item(), int(done[total > 0].sum()), int(total.sum()))


def middle_and_half(correct: Tensor, done: Tensor, total: Tensor, z: float = Z95) -> tuple[Tensor, Tensor]:
    """Of counts (..., classes) the middle and half-width of the interval, (...).

    A stratified sample without replacement: classes weigh as in the whole, each class's variance p (1 - p) / n shrinks by (N - n) / (N - 1). One
    right and one wrong answer are added to each class where its variance is taken (not its share), so that a class of which all are right so far
    still counts as uncertain.
    """
    correct, done, total = (count[..., total > 0].double() for count in (correct, done, total))
    weight, smooth = total / total.sum(), (correct + 1) / (done + 2)
    variance = smooth * (1 - smooth) / done * (total - done) / (total - 1).clamp(min=1)
    return (weight * correct / done).sum(-1), z * (weight**2 * variance).sum(-1).sqrt()


class Live:
    """A trained network and its validation images, ready to be asked again and again with other weights.

    The model is never copied on a question: weights are put in its place for the length of a call.
    """

    def __init__(self, model: nn.Module, data: Any, *, batch: int = 125, part: str = "validation") -> None:
        self.model, self.lock = with_plain_weights(model), threading.Lock()
        self.parameters = {n for n, _ in self.model.named_parameters()}
        images, labels = pair_of(data, part)
        self.order = stratified(labels, len(labels))
        self.images, self.labels = images[self.order], labels[self.order]
        self.totals = torch.bincount(labels)
        device = device_of(model)
        x = as_input(self.images, self.model)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        self.starts: dict[int, list[Tensor]] = {0: list(x.to(device).split(batch))}
        chain = type(self.model).forward is nn.Sequential.forward
        self.stages = list(self.model._modules.items()) if chain else []  # named_children would leave out a module that stands twice
        self.dense = self.answers({})

    def tail(self, weights: dict[str, Tensor], around: Plan | None = None) -> tuple[nn.Module, list[Tensor]]:
        """The part of the network from the first changed parameter or layer on, and the kept activations that go into it."""
        names = {name.split(".")[0] for name in (*weights, *(around or {}))}
        first = next((i for i, (name, _) in enumerate(self.stages) if name in names), 0)
        if first not in self.starts:
            head = nn.Sequential(OrderedDict(self.stages[:first]))
            with torch.no_grad():
                self.starts[first] = [head(x) for x in self.starts[0]]
        return (nn.Sequential(OrderedDict(self.stages[first:])) if first else self.model), self.starts[first]

    def batches(self, weights: dict[str, Tensor], around: Plan | None = None) -> Iterator[Tensor]:
        """The answers (classes) of the network with ``weights`` ({layer, or parameter: tensor}) in place, a batch of images at a time.

        ``around`` ({layer: packed}) says what these layers read instead of their inputs, and which places of their output they work out.
        """
        model, starts = self.tail(weights, around)
        model.eval()
        parameters = {n if n in self.parameters else f"{n}.weight": w for n, w in weights.items()}
        for x in starts:
            with self.lock, torch.no_grad(), surrounded(model, around or {}):  # both change the one model for the length of the call
                answers = functional_call(model, parameters, (x,)).argmax(1).cpu()
            yield answers  # outside: whoever stops asking must not keep the lock

    def answers(self, weights: dict[str, Tensor], around: Plan | None = None) -> Tensor:
        return torch.cat(list(self.batches(weights, around)))

    def estimates(self, weights: dict[str, Tensor], around: Plan | None = None) -> Iterator[tuple[Estimate | None, Tensor]]:
        """After each batch: the estimate, or None while it is too wide to show, and the answers so far. The last is exact."""
        answers: list[Tensor] = []
        correct, done = torch.zeros_like(self.totals), torch.zeros_like(self.totals)
        for part in self.batches(weights, around):
            labels = self.labels[int(done.sum()) :][: len(part)]
            answers.append(part)
            correct += self._count(labels[part == labels])
            done += self._count(labels)
            now = interval(correct, done, self.totals)
            wide = now.done < FIRST or not now.half <= HALF_WIDTH
            yield (None if wide and not now.exact else now), torch.cat(answers) if now.exact else part

    def _count(self, labels: Tensor) -> Tensor:
        """How many of each class."""
        return torch.bincount(labels, minlength=len(self.totals))

    def accuracy(self, weights: dict[str, Tensor] | None = None, around: Plan | None = None) -> float:
        """The exact accuracy, in [0, 1]."""
        answers = self.dense if weights is None else self.answers(weights, around)
        return (answers == self.labels).double().mean().item()

    def by_class(self, answers: Tensor) -> Tensor:
        """Accuracy of each class."""
        return self._count(self.labels[answers == self.labels]) / self.totals
