"""Chapter 03, pruning structures: to save energy.

Survey 001, sections 2.1.2 and 1.2. A model of energy counts multiply-adds and what is fetched from where, at published ratios; no joule is measured
here. Widths of layers can be chosen for any cost that a few networks were profiled for, by a bilinear fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.knobs import Keep, Pick, Span, Steps, Switch, Weight, WideBits
from ..core.method import score, tool
from ..core.packed import Masked
from ..core.select import highest, removed
from .structures import normal_equations

Cost = Annotated[float, Span(0, 500)]
Budget = Annotated[float, Span(0.05, 1)]


@tool("Chen, Emer & Sze 2016, Eyeriss: a spatial architecture for energy-efficient dataflow for convolutional neural networks", chapter="03")
def eyeriss_energy_model(weights, macs, maps, *, mac_cost: Cost = 1.0, register_cost: Cost = 1.0, buffer_cost: Cost = 6.0, dram_cost: Cost = 200.0,
                         weight_bits: WideBits = 16):  # fmt: skip
    """Energy model of Eyeriss.

    E = e_MAC macs + sum over levels of e_level accesses: a multiply-add reads its weight from a register and an input from the buffer; weights and
    maps cross to DRAM once an image (survey 001, 2.1.2 [41]). In units of a 16-bit multiply-add: register 1, buffer 6, DRAM 200, as published; a
    weight of b bits costs b / 16 of a word. Counts, numbers or tensors: ``weights`` that are not zero, ``macs`` with these alone, ``maps`` the
    numbers read and written. A layer's are in ``layer_costs`` (``lab.cost``). A model, not joules: the reuse of inputs between processing elements (2
    a hop) and the row-stationary mapping are left out, and zeros among the activations.
    """
    word = weight_bits / 16
    return (mac_cost + word * register_cost + buffer_cost) * macs + dram_cost * (word * weights + maps)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {  # the layers' turns, given their energies
    "energy": lambda energy: energy.argsort(descending=True, stable=True),
    "depth_first": lambda energy: torch.arange(len(energy), device=energy.device),
    "random": lambda energy: torch.randperm(len(energy), generator=torch.Generator().manual_seed(0)).to(energy.device),
}


def taken(workload: Tensor, keep: float, order: Tensor, budget: float) -> Tensor:
    """Which layers are pruned to ``keep``, (layers,): in ``order``, until the network's energy is at most ``budget`` of what it was."""
    energy, pruned = eyeriss_energy_model(*workload.T), eyeriss_energy_model(*(workload * workload.new_tensor([keep, keep, 1.0])).T)
    saved = (energy - pruned)[order]
    before = energy.sum() - saved.cumsum(0) + saved
    return torch.zeros(len(order), dtype=torch.bool, device=order.device).scatter(0, order, before > budget * energy.sum())


def with_restored(w: Tensor, acts_gram: Tensor, keep: float, restore: float) -> Tensor:
    """The mask of ``keep`` of the weights: the largest, and for the share ``restore`` of these those others of largest w_i^2 E x_i^2."""
    stay = w.numel() - removed(w.numel(), keep)
    back = round(restore * stay)
    mask = highest(w.abs(), stay - back)
    moves = w.double().reshape(len(acts_gram), -1, acts_gram.shape[2]).square() * acts_gram.double().diagonal(dim1=1, dim2=2)[:, None]
    return mask | highest(moves.reshape(w.shape).masked_fill(mask, -torch.inf), back)


def refitted(w: Tensor, mask: Tensor, acts_gram: Tensor) -> Tensor:
    """argmin E (x w - x v)^2 over the v of each output that are zero outside ``mask``: least squares on the layer's own output."""
    gram, shape = acts_gram.double(), (len(acts_gram), -1, acts_gram.shape[2])
    rows, stays = w.double().reshape(shape), mask.reshape(shape)
    new = torch.zeros_like(rows)
    for g, row, stay, out in ((gram[i], rows[i, j], stays[i, j], new[i, j]) for i in range(rows.shape[0]) for j in range(rows.shape[1])):
        out[stay] = normal_equations(g[stay][:, stay], g[stay] @ row, row[stay])
    return new.reshape(w.shape).to(w)


@score("Yang, Chen & Sze 2017, Designing energy-efficient convolutional neural networks using energy-aware pruning", chapter="03",
       exempt={"ties": "of equal weights those come back that move the output more"})  # fmt: skip
def energy_aware_pruning(
    w, acts_gram, workload, place, *, keep: Keep = 0.3, restore: Annotated[float, Span(0, 0.5)] = 0.1,
    order: Annotated[str, Pick(*ORDERS)] = "energy", refit: Switch = "on", budget: Weight = 0.0,
) -> Masked:  # fmt: skip
    """Energy-aware pruning (EAP).

    Layers are pruned in order of the energy that they take (``eyeriss_energy_model``), until the network's is at most ``budget`` of what it was. In
    each the largest weights stay, those are restored whose loss moves the layer's output most, w_i^2 E x_i^2, each by itself, and what stays is
    fitted anew to the output, argmin E (x w - x v)^2, in closed form (survey 001, 2.1.2 [15]). The paper's sparsity is 1 - ``keep``, of which
    ``restore`` is the share brought back. Outputs are those of the dense network. The paper repeats all this with training between: ``fit``, and
    again at a smaller keep.
    """
    turn, _ = place
    if not taken(workload, keep, ORDERS[order](eyeriss_energy_model(*workload.T)), budget)[turn]:
        return Masked(w, torch.ones_like(w, dtype=torch.bool))
    mask = with_restored(w, acts_gram, keep, restore)
    return Masked(refitted(w, mask, acts_gram) if refit == "on" else w, mask)


def nonnegative_least_squares(a: Tensor, b: Tensor) -> Tensor:
    """argmin ||a x - b||^2, x >= 0: the active-set method of Lawson & Hanson (1974), one coefficient more at a time."""
    x, free = torch.zeros_like(a[0]), torch.zeros_like(a[0], dtype=torch.bool)
    while True:
        pull = (a.T @ (b - a @ x)).masked_fill(free, -torch.inf)
        if free.all() or pull.max() <= 1e-10 * (a.T @ b).abs().max():
            return x
        free[pull.argmax()] = True
        while True:
            z = torch.zeros_like(x)
            z[free] = torch.linalg.lstsq(a[:, free], b[:, None], driver="gelsd").solution[:, 0]
            if not (low := free & (z <= 0)).any():
                break
            x = x + (x[low] / (x[low] - z[low])).min() * (z - x)  # as far as all stay nonnegative
            free &= x > 1e-14 * x.max()
            x = torch.where(free, x, 0.0)
        x = z


def bilinear_fit(products: Tensor, cost: Tensor) -> Tensor:
    """a_0 and a_j >= 0 of cost = a_0 + sum_j a_j (s_in s_out)_j, from profiled networks' ``products`` (networks, terms) and ``cost``."""
    scale = products.max(0).values
    design = torch.cat([torch.ones_like(products[:, :1]), products / scale], 1)
    return nonnegative_least_squares(design, cost) / torch.cat([torch.ones_like(scale[:1]), scale])


def primal_dual(
    loss: Callable[[Tensor], Tensor], cost: Callable[[Tensor], Tensor], budget: float, u: Tensor, dual_lr: float, steps: int = 1000
) -> Tensor:
    """The u in [0, 1]^n that makes ``loss`` small with cost(u) <= ``budget``: gradient descent on u, ascent on the multiplier.

    L = loss + (max(0, z + excess)^2 - z^2) / 2, the augmented Lagrangian of an inequality; loss and cost about 1 in size.
    """
    z, rate = u.new_zeros(()), 0.01
    for _ in range(steps):
        u = u.detach().requires_grad_(True)
        excess = cost(u) - budget
        (g,) = torch.autograd.grad(loss(u) + (z + excess).clamp(min=0).square() / 2, u)
        u, z = (u.detach() - rate * g).clamp(0, 1), (z + dual_lr * excess.detach()).clamp(min=0)
    return u


def small_norms(squares: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Of the share u_j of channels that each group keeps: the sum over groups of the share of ||w||^2 that its smallest others had, piecewise
    linear."""
    falling = nn.utils.rnn.pad_sequence([s.sort(descending=True).values / s.sum().clamp(min=1e-30) for s in squares], batch_first=True)
    kept, counts = F.pad(falling.cumsum(1), (1, 0)), torch.tensor([float(len(s)) for s in squares]).to(falling)

    def loss(u: Tensor) -> Tensor:
        below = (u.detach() * counts).floor().minimum(counts - 1).long()[:, None]
        start, next_one = kept.gather(1, below)[:, 0], falling.gather(1, below)[:, 0]
        return (1 - start - (u * counts - below[:, 0]) * next_one).sum()

    return loss


def whole_widths(u: Tensor, full: Tensor, cost: Callable[[Tensor], Tensor], budget: float) -> Tensor:
    """Whole numbers of channels in proportion to ``u``, one at least, as many as ``budget`` allows (bisection on a common factor)."""
    at = lambda t: (t * u * full + 1e-9).floor().clamp(min=1).minimum(full)  # noqa: E731
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle) / full) <= budget * (1 + 1e-9) else (low, middle)
    return at(low)


@score("Yang, Zhu & Liu 2019, ECC: platform-independent energy-constrained deep neural network compression via a bilinear regression model",
       chapter="03", joint=True, filters=lambda: True)  # fmt: skip
def ecc_energy_bilinear(
    w, channel, widths, *, budget: Budget = 0.5, profiles: Annotated[int, Span(10, 10_000, log=True, integer=True)] = 200,
    dual_lr: Annotated[float, Span(1e-4, 1, log=True)] = 0.1, seed: Steps = 0,
) -> Masked:  # fmt: skip
    """Energy-constrained compression by a bilinear model (ECC).

    A network of widths s costs E(s) = a_0 + sum_j a_j s_in s_out, a >= 0 fitted by least squares to ``profiles`` random widths whose cost is asked
    for as of a black box; then min loss so that E(s) <= ``budget`` of the dense cost, by gradient descent on s and ascent on the multiplier
    (survey 001, 2.1.2 [16]). The box here counts multiply-adds, no joules. The paper trains the weights in that loop; here the loss is what the
    smallest filters' squared norms are of their layer's, so that widths come at once: ``fit`` afterwards. A channel of each layer stays whatever
    the budget.
    """
    number, group = channel
    full, draw = widths.full, torch.Generator().manual_seed(seed)
    profiled = (1 + torch.rand(profiles, len(full), generator=draw, dtype=full.dtype).to(full) * full).floor().minimum(full)
    a = bilinear_fit(widths.products(profiled), widths.multiply_adds(profiled))
    dense, mine = a[0] + widths.products(full) @ a[1:], group.unique()
    cost = lambda u: (a[0] + widths.products(full * torch.ones_like(full).scatter(0, mine, u)) @ a[1:]) / dense  # noqa: E731
    squares = torch.zeros(int(full.sum()), dtype=torch.float64, device=w.device).index_add(0, number, w.double().square())
    parts = [part for i, part in enumerate(squares.split(full.long().tolist())) if i in mine.tolist()]
    u = primal_dual(small_norms(parts), cost, budget, torch.ones_like(full[mine]), dual_lr)
    counts = whole_widths(u, full[mine], cost, budget).long().tolist()
    stays = torch.ones_like(squares, dtype=torch.bool).split(full.long().tolist())
    for i, part, count in zip(mine.tolist(), parts, counts, strict=True):
        stays[i].copy_(highest(part, count))
    mask = torch.cat(stays)[number]
    return Masked(w, mask)
