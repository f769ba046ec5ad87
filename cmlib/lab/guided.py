"""Guided training: a network of full precision is trained beside one of few bits, and each is drawn towards the other (Zhuang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..core.apply import weighted

Both = tuple[Tensor, Tensor, Tensor]  # answers of the network, those of its guide, how far their features are apart


def features_apart(a: Tensor, b: Tensor) -> Tensor:
    """1/2 |a / |a| - b / |b||^2 of each example's features, on average: 0 where they differ by a positive factor alone."""
    a, b = (F.normalize(t.flatten(1), dim=1) for t in (a, b))
    return (a - b).square().sum(1).mean() / 2


class Guided(nn.Module):
    """``net`` and its ``guide``, of equal layers. Evaluation asks ``net`` alone; training gives both answers, and how far apart their features are,
    which are what their last layers read, before any rounding.
    """

    def __init__(self, net: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.net, self.guide = net, guide

    def forward(self, x: Tensor) -> Tensor | Both:
        if not self.training:
            return self.net(x)
        (low, mu), (full, nu) = (with_features(m, x) for m in (self.net, self.guide))
        return low, full, features_apart(mu, nu)


def with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The model's answer, and what its last weighted layer reads of x, before that is rounded."""
    found = []
    last = list(weighted(model).values())[-1]
    handle = last.register_forward_pre_hook(lambda layer, inputs: found.append(inputs[0]), prepend=True)
    try:
        return model(x), found[0]
    finally:
        handle.remove()


def guided_loss(weight: float, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> Callable[[Tensor | Both, Tensor], Tensor]:
    """The loss of ``Guided``: L(low) + L(full) + weight (features apart + KL(full || low)). No term is held fixed for either network."""

    def total(out: Tensor | Both, y: Tensor) -> Tensor:
        if isinstance(out, Tensor):
            return loss(out, y)
        low, full, features = out
        answers = F.kl_div(F.log_softmax(low, 1), F.log_softmax(full, 1), reduction="batchmean", log_target=True)
        return loss(low, y) + loss(full, y) + weight * (features + answers)

    return total
