"""Chapter 02, pruning weights: to a budget of energy or work.

Survey 001, section 2.1.1. Layers differ in what a weight costs, so both look at all covered weights at once. ``budget`` is the share of the dense
network's cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from ..core.knobs import Pick, Span, Steps
from ..core.method import Training, score
from ..core.packed import Masked, State

Budget = Annotated[float, Span(0.05, 1)]
MAC, REGISTER, BUFFER, DRAM = 1.0, 1.0, 6.0, 200.0  # energy of a multiply-add and of fetching a number, relative (Chen et al. 2016, Eyeriss)
ENERGY = {  # of one weight that takes part in so many multiply-adds: each reads the weight and an input; the weight is loaded once an example
    "macs_only": lambda macs: MAC * macs,
    "macs_plus_memory": lambda macs: DRAM + (MAC + REGISTER + BUFFER) * macs,
}
SLACK = 1 + 1e-9  # of a budget, for rounding


def knapsack(value: Tensor, cost: Tensor, limit: float) -> Tensor:
    """The mask of the densest items, value / cost, as long as they fit: within the most valuable single item of the best there is."""
    order = (value / cost).argsort(descending=True, stable=True)
    fits = cost[order].double().cumsum(0) <= limit * SLACK
    return torch.zeros_like(fits).scatter(0, order, fits)


def _within(w, macs, *, budget, energy_model):
    """The weights whose energy stays within the budget, with (nearly) the greatest sum of squares; the others zero."""
    cost = ENERGY[energy_model](macs.double())
    return torch.where(knapsack(w.double().square(), cost, budget * cost.sum().item()), w, 0.0)


@score("Yang, Zhu & Liu 2019, Energy-constrained compression for deep neural networks via weighted sparse projection and layer input masking",
       chapter="02", joint=True, training=Training(project=_within))  # fmt: skip
def energy_constrained_projection(
    w, macs, *, budget: Budget = 0.3, energy_model: Annotated[str, Pick(*ENERGY)] = "macs_plus_memory", state: State | None = None
) -> Masked:
    """Energy-constrained projection.

    max sum w_i^2 z_i so that sum A_i z_i <= budget: a knapsack, filled by the density w_i^2 / A_i, A_i the energy that weight i costs (survey 001,
    2.1.1 [14]). Every training step ends with that projection, over all layers at once, and removed weights go on learning, so that they can return.
    The energies are the published ratios of a multiply-add to fetching from register, buffer and DRAM. The paper's input masks are left out.
    """
    w = _within(w, macs, budget=budget, energy_model=energy_model) if state is None else w
    return Masked(w, w != 0, straight=True)


def normal_density(z: Tensor) -> Tensor:
    return (-(z**2) / 2).exp() / (2 * torch.pi) ** 0.5


def gaussian_process(x: Tensor, y: Tensor, at: Tensor, length: float = 0.3, noise: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation at each point of ``at``, given y at x (n, d), both standardised: k(a, b) = exp(-||a - b||^2 / (2 length^2))."""
    kernel = lambda a, b: (-torch.cdist(a, b).square() / (2 * length**2)).exp()  # noqa: E731
    centre, scale = y.mean(), y.std(correction=0).clamp(min=1e-12)
    root = torch.linalg.cholesky(kernel(x, x) + noise * torch.eye(len(x)).to(x))
    across = kernel(x, at)
    mean = across.T @ torch.cholesky_solve(((y - centre) / scale)[:, None], root)[:, 0]
    variance = 1 - torch.linalg.solve_triangular(root, across, upper=False).square().sum(0)
    return centre + scale * mean, scale * variance.clamp(min=1e-12).sqrt()


def expected_improvement(mean: Tensor, std: Tensor, best: float) -> Tensor:
    """E max(0, f - best), f normal."""
    z = (mean - best) / std
    return (mean - best) * torch.special.ndtr(z) + std * normal_density(z)


def constrained_improvement(quality: tuple[Tensor, Tensor], cost: tuple[Tensor, Tensor], best: float, cap: float) -> Tensor:
    """Expected improvement times the probability that the cost stays below ``cap``; both (mean, std)."""
    return expected_improvement(*quality, best) * torch.special.ndtr((cap - cost[0]) / cost[1])


COOLING = {  # the cap of stage 1, 2, ... of ``stages``, from the dense cost 1 to the budget
    "exponential": lambda budget, stage, stages: budget ** (stage / stages),
    "linear": lambda budget, stage, stages: 1 - (1 - budget) * stage / stages,
}


def caps(budget: float, steps: int, stages: int, cooling: str) -> list[float]:
    """The cap in force at each of ``steps`` evaluations."""
    return [COOLING[cooling](budget, 1 + s * stages // steps, stages) for s in range(steps)]


def search(quality: Callable[[Tensor], float], cost: Callable[[Tensor], float], limits: list[float], dims: int, seed: int = 0) -> Tensor:
    """The best theta in [0, 1)^dims found whose cost is within the last limit: constrained Bayesian optimization, a limit an evaluation.

    Nothing removed and the same share everywhere are looked at first, so that something within the limit is always known. Candidates are drawn
    uniformly and around the best so far.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.zeros(dims, dtype=torch.float64), torch.full((dims,), 1 - limits[-1], dtype=torch.float64)])
    found = torch.tensor([[quality(t), cost(t)] for t in x], dtype=torch.float64)
    for cap in limits[2:]:
        known = torch.where(found[:, 1] <= cap * SLACK, found[:, 0], -torch.inf)
        wide, near = torch.rand(2, 400, dims, generator=draw, dtype=torch.float64)
        near = (x[known.argmax()] + 0.3 * (near - 0.5)).clamp(0, 0.99)
        tried = torch.cat([0.99 * wide, near])
        gain = constrained_improvement(*(gaussian_process(x, f, tried) for f in found.T), known.max().item(), cap)
        x = torch.cat([x, tried[gain.argmax()][None]])
        found = torch.cat([found, torch.tensor([[quality(x[-1]), cost(x[-1])]], dtype=torch.float64)])
    return x[torch.where(found[:, 1] <= limits[-1] * SLACK, found[:, 0], -torch.inf).argmax()]


def pruned_by(w: Tensor, layer: Tensor, theta: Tensor) -> Tensor:
    """The mask without the share theta_l of the smallest weights of each layer l, rounded up."""
    stays = []
    for part, share in zip(w.split(layer.unique_consecutive(return_counts=True)[1].tolist()), theta.tolist(), strict=True):
        count = int((1 - share) * len(part) + 1e-9)
        stays.append(torch.zeros_like(part, dtype=torch.bool).index_fill(0, part.abs().argsort(descending=True, stable=True)[:count], True))
    return torch.cat(stays)


@score("Chen, Tung, Vedula & Mori 2018, Constraint-aware deep neural network compression", chapter="02", joint=True)
def constraint_aware_compression(
    w, macs, layer, quality, *, budget: Budget = 0.5, steps: Annotated[int, Span(5, 100, integer=True)] = 25,
    stages: Annotated[int, Span(1, 10, integer=True)] = 4, cooling: Annotated[str, Pick(*COOLING)] = "exponential", seed: Steps = 0,
) -> Masked:  # fmt: skip
    """Constraint-aware compression.

    max accuracy(theta) so that cost(theta) <= budget, theta_l the share of its smallest weights that layer l loses: constrained Bayesian
    optimization, the next theta where EI(theta) P(cost <= c_t) is greatest, both under Gaussian processes, c_t cooled from the dense cost to the
    budget (survey 001, 2.1.1 [13]). Cost is counted in multiply-adds, accuracy on a sample. The paper trains at each stage: call it again with a
    smaller budget after ``fit``.
    """
    cost = lambda theta: ((macs * pruned_by(w, layer, theta)).sum() / macs.sum()).item()  # noqa: E731
    gain = lambda theta: quality(w * pruned_by(w, layer, theta))  # noqa: E731
    theta = search(gain, cost, caps(budget, steps, stages, cooling), len(layer.unique()), seed)
    return Masked(w, pruned_by(w, layer, theta))
