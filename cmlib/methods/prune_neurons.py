"""Chapter 02, pruning weights: neurons and kernels that add little.

The survey (001, section 2.1.1) lists these four beside the methods for single weights; three remove whole neurons that say what others say, one
removes 2-D kernels.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.apply import latent
from ..core.knobs import Keep, Span, Steps, Switch
from ..core.method import score
from ..core.select import removed
from ..core.training import Hook

Bandwidth, Jitter = Annotated[float, Span(0.001, 100, log=True)], Annotated[float, Span(0, 0.1)]
A_DRAW = {"permutation": "a draw does not follow the filters", "nested": "a draw of fewer is another draw, not a part of it"}


def merging(filter_rows: Tensor, next_w: Tensor) -> list[tuple[int, int, float]]:
    """Srinivas & Babu's surgery, (who goes, into whom, s_ij) step by step until one neuron is left; float64.

    s_ij = <a_j^2> ||W_i - W_j||^2, j the one that goes; then a_i += a_j. A neuron without weights or bias is always 0 and hands nothing on.
    """
    rows, a = filter_rows.double(), next_w.double() * filter_rows.any(1)[:, None]
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square().fill_diagonal_(torch.inf)
    steps = []
    for _ in range(len(rows) - 1):
        saliency = torch.where(apart.isinf(), torch.inf, a.square().mean((0, 2)) * apart)
        i, j = divmod(int(saliency.argmin()), len(rows))
        steps.append((j, i, saliency[i, j].item()))
        a[:, i] += a[:, j]
        apart[j], apart[:, j] = torch.inf, torch.inf
    return steps


def _merged(rows, filter_rows, next_w):
    """The next layer's weight: what each neuron that goes had there is added to the neuron that stands for it."""
    a = next_w * filter_rows.any(1)[:, None]
    for j, i, _ in merging(filter_rows, next_w):
        if not rows[j]:
            a[:, i] += a[:, j]
    return a


@score("Srinivas & Babu 2015, Data-free parameter pruning for deep neural networks", chapter="02", unit="filter", keep=0.5, rebuild=_merged)
def data_free_pruning(filter_rows, next_w):
    """Data-free parameter pruning.

    s_ij = <a_j^2> ||W_i - W_j||^2, W_i what neuron i is made of (bias and batch norm included), a_j its outgoing weights, <.> the mean over outputs:
    j of the smallest pair goes and its twin takes over, a_i += a_j, again and again (survey 001, 2.1.1 [21]). A neuron's score is the saliency at
    which it goes, never below an earlier one's; the paper's stop at a knee of that curve is ``threshold``.
    """
    saliency, last = torch.empty(len(filter_rows), dtype=torch.float64).fill_(torch.nan), -1.0
    for j, _, s in merging(filter_rows, next_w):
        saliency[j] = last = max(s, math.nextafter(last, math.inf))
    return saliency.nan_to_num(math.nextafter(last, math.inf)).to(filter_rows.device)


def strengths(w: Tensor, gamma_in: Tensor) -> Tensor:
    """|gamma_i| ||K_ji||_F for every kernel, (outputs, inputs): how much of input channel i reaches output channel j."""
    return gamma_in.flatten(1).abs() * torch.linalg.vector_norm(w.flatten(2) if w.dim() > 2 else w[..., None], dim=2)


def reparameterised(w: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels s_ji K_ji / ||K_ji|| and the batch norm's shift for a batch norm whose scale is dropped; the same function where gamma > 0."""
    return w * gamma.abs().reshape(1, -1, *[1] * (w.dim() - 2)), beta / gamma.abs()


@score("Lin, Zhong, Wu & Yan 2018, Synaptic strength for convolutional neural network", chapter="02", unit="kernel", scope="network")
def synaptic_strength(w, gamma_in):
    """Synaptic strength.

    s_ij = |gamma_i| ||K_ij||_F, K_ij the kernel from input channel i to output channel j, gamma_i the batch norm's scale of the channel that comes
    in (survey 001, 2.1.1 [25]): how much a connection carries, whichever of the two holds it. A kernel's weights share its score evenly. Train with
    ``hooks=[synapses(lam, {"conv2": "bn1", ...})]`` first, which presses on sum s_ij.
    """
    s = strengths(w, gamma_in)
    return (s / w[0, 0].numel()).reshape(*s.shape, *[1] * (w.dim() - 2))


def synapses(lam: float, behind: dict[str, str]) -> Hook:
    """Training with lam sum s_ij: adds its gradient to weights and scales; ``behind`` is {layer: batch norm whose channels it reads one by one}."""

    def press(model: nn.Module, rule: torch.optim.Optimizer) -> None:
        for layer, norm in ((model.get_submodule(n), model.get_submodule(b)) for n, b in behind.items()):
            w = latent(layer) if hasattr(layer, "parametrizations") else layer.weight
            kernels = w.detach().flatten(2) if w.dim() > 2 else w.detach()[..., None]
            sizes = torch.linalg.vector_norm(kernels, dim=2)
            gamma, unit = norm.weight.detach(), kernels / sizes.clamp(min=torch.finfo(w.dtype).tiny)[..., None]
            w.grad += lam * (gamma.abs()[:, None] * unit).reshape(w.shape)
            norm.weight.grad += lam * gamma.sign() * sizes.sum(0)

    return Hook(gradients=press)


def spectrum(l: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741 (the kernel's own letter)
    """Eigenvalues of a kernel, exactly zero where they are not distinguishable from it, and eigenvectors; float64."""
    values, vectors = torch.linalg.eigh(l.double())
    return torch.where(values > len(values) * torch.finfo(values.dtype).eps * values.max(), values, 0.0), vectors


def log_elementary(values: Tensor, k: int) -> Tensor:
    """log e_l of the first i values, (n + 1, k + 1) for i, l from 0: e_l = the sum over subsets of l values of their product."""
    table = [torch.full((k + 1,), -torch.inf, dtype=values.dtype).index_fill(0, torch.tensor(0), 0.0)]
    for value in values:
        table.append(torch.cat([table[-1][:1], torch.logaddexp(table[-1][1:], value.log() + table[-1][:-1])]))
    return torch.stack(table)


def _from_projection(vectors: Tensor, chosen: Tensor, draw: torch.Generator) -> Tensor:
    """Draws from the projection DPPs that the ``chosen`` eigenvectors (draws, n) span: an item a step, p_i what those drawn leave of K_ii."""
    v, size, each = vectors * chosen[:, None, :], chosen.sum(1), torch.arange(len(chosen))
    left, taken = v.square().sum(2), torch.zeros_like(chosen)
    past = torch.zeros(*chosen.shape, int(size.max()), dtype=vectors.dtype)
    for t in range(past.shape[2]):
        more = (size > t)[:, None]
        sums = torch.where(more, left.clamp(min=0), 1.0).cumsum(1)
        where = sums[:, -1:] * torch.rand(len(sums), 1, generator=draw, dtype=sums.dtype)
        item = torch.searchsorted(sums, where, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
        column = (v @ v[each, item][:, :, None] - past @ past[each, item][:, :, None])[:, :, 0]
        past[:, :, t] = torch.where(more, column / left[each, item].clamp(min=1e-300).sqrt()[:, None], 0.0)
        taken[each, item] |= more[:, 0]
        left = (left - past[:, :, t].square()).masked_fill(taken, 0.0)
    return taken


def dpp(l: Tensor, draws: int, draw: torch.Generator) -> Tensor:  # noqa: E741
    """Draws of P(S) = det(L_S) / det(L + I), (draws, n): each eigenvector with probability value / (1 + value), then an item for each."""
    values, vectors = spectrum(l)
    chosen = torch.rand(draws, len(values), generator=draw, dtype=values.dtype) < values / (1 + values)
    return _from_projection(vectors, chosen, draw)


def k_dpp(l: Tensor, k: int, draws: int, draw: torch.Generator) -> Tensor:  # noqa: E741
    """Draws of the L-ensemble given |S| = k, P(S) = det(L_S) / e_k(eigenvalues), (draws, n). ValueError where k exceeds the rank of L."""
    values, vectors = spectrum(l)
    if k > (rank := int((values > 0).sum())):
        raise ValueError(f"k={k} items cannot be drawn together: every set of more than {rank}, the kernel's rank, has determinant 0")
    table, left, chosen = log_elementary(values, k), torch.full((draws,), k), torch.zeros(draws, len(values), dtype=torch.bool)
    for i in reversed(range(len(values))):
        odds = (values[i].log() + table[i, (left - 1).clamp(min=0)] - table[i + 1, left]).exp()
        chosen[:, i] = (left > 0) & (torch.rand(draws, generator=draw, dtype=values.dtype) < odds)
        left = left - chosen[:, i].long()
    return _from_projection(vectors, chosen, draw)


def similarity(next_acts_in: Tensor, beta: float) -> Tensor:
    """L_ij = exp(-beta ||v_i - v_j||^2 / samples), v_i what neuron i says on every sample; float64, on the CPU."""
    v = next_acts_in.double().cpu().transpose(0, 1).flatten(1)
    return (-beta / len(next_acts_in) * torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist").square()).exp()


def _drawn(l: Tensor, keep: float, seed: int) -> Tensor:  # noqa: E741
    """1 for the neurons of one draw of as many as stay, else 0; beyond the kernel's rank the first of the rest stay too."""
    k = min(max(1, len(l) - removed(len(l), keep)), int((spectrum(l)[0] > 0).sum()))
    return k_dpp(l, k, 1, torch.Generator().manual_seed(seed))[0].double()


@score("Macchi 1975, The coincidence approach to stochastic point processes", chapter="02", unit="filter", exempt=A_DRAW)
def determinantal_point_process(next_acts_in, *, keep: Keep = 0.5, beta: Bandwidth = 10.0, seed: Steps = 1):
    """Determinantal point process (DPP).

    P(S) = det(L_S) / e_k(L), |S| = k: neurons that say the same are hardly ever kept together (survey 001, 2.1.1 [27]). Here
    L_ij = exp(-beta ||v_i - v_j||^2 / |T|), v_i what neuron i says on the samples T, and what stays is one exact draw of k, not the likeliest set.
    """
    return _drawn(similarity(next_acts_in, beta), keep, seed).to(next_acts_in.device)


def _fused(rows, next_acts_in, next_w, *, reweight):
    """The next layer's weight on what stays, plus the least change that makes up best for what is gone."""
    if reweight == "off":
        return next_w
    v, w = next_acts_in.double().cpu().flatten(1), next_w.double().cpu().flatten(1).T
    stays, fused = rows.cpu().repeat_interleave(next_w.shape[2]), torch.zeros_like(w)
    fused[stays] = w[stays] + torch.linalg.lstsq(v[:, stays], v[:, ~stays] @ w[~stays], driver="gelsd").solution
    return fused.T.reshape(next_w.shape).to(next_w)


@score("Mariet & Sra 2016, Diversity networks: neural network compression using determinantal point processes", chapter="02", unit="filter",
       rebuild=_fused, exempt=A_DRAW)  # fmt: skip
def divnet(next_acts_in, next_w, *, keep: Keep = 0.5, beta: Bandwidth = 10.0, epsilon: Jitter = 0.01, reweight: Switch = "on", seed: Steps = 1):
    """Divnet.

    A k-DPP with L = exp(-beta ||v_i - v_j||^2 / |T|) + epsilon I, v_i the activations of neuron i, draws who stays; the others are fused into them:
    w~ = argmin ||sum_Y w~_i v_i - sum_all w_i v_i|| for every next neuron, by least squares (survey 001, 2.1.1 [28]). No training is needed.
    ``reweight`` is that fusion.
    """
    l = similarity(next_acts_in, beta)  # noqa: E741
    return _drawn(l + epsilon * torch.eye(len(l), dtype=l.dtype), keep, seed).to(next_acts_in.device)
