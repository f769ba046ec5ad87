"""Chapter 03: structures judged by what the rest of the network makes of them (survey 001, section 2.1.2; survey 004).

Places of a map that need not be worked out; filters whose worth is propagated from the last features, seen in the loss of the layers behind, sampled
with a guarantee, or ranked anew across the network while it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ..core.knobs import Pick, Span, Steps
from ..core.method import dynamic
from ..core.packed import Masked, Packed
from ..core.wrapped import Perforated


def best_places(score: Tensor, rate: float) -> Tensor:
    """The mask of the map (H, W) without the share ``rate`` of its places of lowest score; one stays."""
    order = score.flatten().argsort(descending=True, stable=True)
    count = max(1, len(order) - round(rate * len(order)))
    return torch.zeros_like(order, dtype=torch.bool).index_fill(0, order[:count], True).reshape(score.shape)


def grid(shape: tuple[int, int], rate: float) -> Tensor:
    """Whole rows and columns at even steps, from the first on: sqrt(1 - rate) of each, so that all places left are crossings."""
    lines = [torch.zeros(n, dtype=torch.bool) for n in shape]
    for line in lines:
        count = max(1, round(len(line) * (1 - rate) ** 0.5))
        line[torch.arange(count) * len(line) // count] = True
    return lines[0][:, None] & lines[1]


PERFORATIONS: dict[str, Callable[[Tensor, Tensor, float, Tensor], Tensor]] = {  # of (impact, pooling windows, rate, chance in [0, 1))
    "uniform": lambda impact, reads, rate, chance: best_places(chance, rate),
    "grid": lambda impact, reads, rate, chance: grid(impact.shape, rate),
    "pooling_structure": lambda impact, reads, rate, chance: best_places(reads + chance, rate),
    "impact": lambda impact, reads, rate, chance: best_places(impact, rate),
}


@dynamic("Figurnov, Ibraimova, Vetrov & Kohli 2016, PerforatedCNNs: acceleration through elimination of redundant convolutions", chapter="03")
def perforated_cnn(
    w, positions, *, rate: Annotated[float, Span(0, 0.9)] = 0.5, mask_type: Annotated[str, Pick(*PERFORATIONS)] = "grid", seed: Steps = 0
) -> Packed:
    """Perforated convolutions.

    A convolution is worked out at the places I of its map alone, V^(x, y) = V(l(x, y)), l the nearest place in I: the rows of the im2col matrix, and
    with them the multiply-adds, fall to 1 - ``rate`` (survey 001, 2.1.2 [37]). I is drawn (``uniform``), a ``grid``, what most windows of the pooling
    behind read, or the places of greatest ``impact``, the mean of sum_c |V dL/dV|: how the loss answers to V = 0 there, to first order. The grid's
    steps are even, the paper's pseudo-random. No weight goes, so the file does not shrink; dense layers stay as they are. ``fit`` is the fine-tuning.
    """
    whole = Masked(w, torch.ones_like(w, dtype=torch.bool), "dense")
    impact, reads = positions
    chance = torch.rand(impact.shape, generator=torch.Generator().manual_seed(seed)).to(impact)
    computed = PERFORATIONS[mask_type](impact, reads, rate, chance)
    return whole if computed.all() else Perforated(whole, computed.to(w.device))
