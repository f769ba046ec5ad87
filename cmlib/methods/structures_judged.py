"""Chapter 03, pruning structures: judged by the layers behind.

Survey 001, section 2.1.2; survey 004. Places of a map that need not be worked out; filters whose worth is propagated from the last features, seen in
the loss of the layers behind, sampled with a guarantee, or ranked anew across the network while it trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.knobs import Keep, Pick, Span, Steps, Weight
from ..core.method import Training, dynamic, score
from ..core.packed import Masked, Packed, State
from ..core.select import highest
from ..core.wrapped import Perforated
from .structures import normal_equations


def best_places(score: Tensor, rate: float) -> Tensor:
    """The mask of the map (H, W) without the share ``rate`` of its places of lowest score; one stays."""
    return highest(score, max(1, score.numel() - round(rate * score.numel())))


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


def infinite_feature_selection(x: Tensor, alpha: float) -> Tensor:
    """Inf-FS (Roffo et al. 2015) of features x (samples, F), float64: the row sums of (I - r A)^-1 - I, r = 0.9 / rho(A): all paths through A.

    A_ij = alpha max(s_i, s_j) + (1 - alpha) (1 - |corr_ij|), s the standard deviations over the largest. The paper's rank correlation is Pearson's
    here.
    """
    x = x.double()
    s = x.std(0, correction=0)
    unit = (x - x.mean(0)) / s.clamp(min=1e-12) / len(x) ** 0.5
    s = s / s.max().clamp(min=1e-12)
    a = alpha * torch.maximum(s[:, None], s) + (1 - alpha) * (1 - (unit.T @ unit).abs().clamp(max=1))
    rho = torch.linalg.eigvalsh(a).abs().max().clamp(min=1e-12)
    one = torch.eye(len(a)).to(a)
    return (torch.linalg.inv(one - 0.9 / rho * a) - one).sum(1)


RANKERS: dict[str, Callable[[Tensor, float], Tensor]] = {  # what each of the last features is worth
    "inf_fs": infinite_feature_selection,
    "variance": lambda x, alpha: x.double().var(0, correction=0),
    "ones": lambda x, alpha: torch.ones_like(x[0], dtype=torch.float64),
}


@score("Yu et al. 2018, NISP: pruning networks using neuron importance score propagation", chapter="03", unit="filter", keep=0.5)
def nisp(responses, propagated, *, ranker: Annotated[str, Pick(*RANKERS)] = "inf_fs", inf_fs_alpha: Weight = 0.5):
    """Neuron importance score propagation (NISP).

    s_k = |W_(k+1)|^T s_(k+1), from the final responses, which the classifier reads and a feature ranker judges, back to every layer: a neuron is
    worth what it can move there (survey 001, 2.1.2 [51]). Batch norm counts with |gamma| / sigma; a max pooling hands its window's worth to one
    place; a channel is worth the sum over its places, as it stands behind its ReLU. The paper's prune_ratio is 1 - ``keep``, its ranker ``inf_fs``.
    """
    return propagated(RANKERS[ranker](responses, inf_fs_alpha))


Judge = Callable[[Tensor], Tensor]  # of a layer's output at samples (S, outputs), image after image: a loss
ROUNDS = 32  # in which channels are taken up; several at once where there are more


def auxiliary_loss(y: Tensor, labels: Tensor) -> Judge:
    """The cross entropy of a classifier batch norm - ReLU - mean over places - softmax on what a layer makes, fitted to ``y``, its dense output."""
    mean, scale = y.mean(0), y.std(0, correction=0).clamp(min=1e-12)
    pooled = lambda z: ((z - mean) / scale).clamp(min=0).unflatten(0, (len(labels), -1)).mean(1)  # noqa: E731
    theta = torch.zeros(y.shape[1] + 1, int(labels.max()) + 1, dtype=y.dtype, device=y.device, requires_grad=True)
    judge = lambda z, t: F.cross_entropy(pooled(z) @ t[:-1] + t[-1], labels)  # noqa: E731
    rule = torch.optim.LBFGS([theta], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        rule.zero_grad()
        loss = judge(y, theta) + 1e-3 * theta.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        rule.step(closure)
    return lambda z: judge(z, theta.detach())


def joint_loss(y: Tensor, lam: float, auxiliary: Judge | None) -> Judge:
    """L = ||y - z||^2 / (2 S) + lam L_S of an output z (S, outputs) where the dense one is y."""
    return lambda z: (y - z).square().sum() / (2 * len(y)) + (lam * auxiliary(z) if lam else 0.0)


def slope(loss: Judge, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of x v, and its gradient in v."""
    with torch.enable_grad():
        z = (x @ v).requires_grad_(True)
        value = loss(z)
        return value.detach(), x.T @ torch.autograd.grad(value, z)[0]


def descended(loss: Judge, x: Tensor, v: Tensor, steps: int) -> Tensor:
    """v after so many Newton steps of the reconstruction alone, each halved until the joint loss falls; one step is exact where it is all there
    is."""
    gram = x.T @ x / len(x)
    for _ in range(steps):
        value, g = slope(loss, x, v)
        step = normal_equations(gram, g, torch.zeros_like(g))
        tried = next((v - step / 2**i for i in range(12) if loss(x @ (v - step / 2**i)) <= value), v)
        v = tried
    return v


def selection_order(x: Tensor, loss: Judge, outputs: int, steps: int = 2) -> tuple[Tensor, list[float]]:
    """The turn in which each channel of x (samples, channels, k) joins: by the gradient of the loss at the weights so far; and the losses on the
    way."""
    channels, k = x.shape[1:]
    flat, v = x.flatten(1), torch.zeros(x[0].numel(), outputs, dtype=x.dtype, device=x.device)
    turn, losses = torch.full((channels,), -1, device=x.device), []
    while (left := turn < 0).any():
        value, g = slope(loss, flat, v)
        losses.append(value.item())
        norms = torch.linalg.vector_norm(g.unflatten(0, (channels, k)), dim=(1, 2)).masked_fill(~left, -1.0)
        best = norms.argsort(descending=True, stable=True)[: min(-(-channels // ROUNDS), int(left.sum()))]
        turn[best] = turn.max() + 1 + torch.arange(len(best), device=x.device)
        inside = (turn >= 0).repeat_interleave(k)
        v[inside] = descended(loss, flat[:, inside], v[inside], steps)
    return turn, [*losses, loss(flat @ v).item()]


def _problem(next_acts_in: Tensor, next_w: Tensor, labels: Tensor, lam: float) -> tuple[Tensor, Tensor, Judge]:
    """x (samples, channels, k), the dense weight (channels x k, outputs), and the joint loss of what they make."""
    x, w = next_acts_in.double(), next_w.double().flatten(1).T
    y = x.flatten(1) @ w
    return x, w, joint_loss(y, lam, auxiliary_loss(y, labels) if lam else None)


def _selected(rows, next_acts_in, next_w, labels, *, lam):
    """The next layer's weight on the channels that stay, moved to where the joint loss is least from where it was."""
    x, w, loss = _problem(next_acts_in, next_w, labels, lam)
    inside, new = rows.repeat_interleave(x.shape[2]), torch.zeros_like(w)
    new[inside] = descended(loss, x.flatten(1)[:, inside], w[inside], 10)
    return new.T.reshape(next_w.shape).to(next_w)


@score("Zhuang, Tan, Zhuang, Liu, Guo, Wu, Huang & Zhu 2018, Discrimination-aware channel pruning for deep neural networks", chapter="03",
       unit="filter", keep=0.5, rebuild=_selected)  # fmt: skip
def discrimination_aware_channel_pruning(next_acts_in, next_w, labels, *, lam: Annotated[float, Span(0, 10)] = 1.0):
    """Discrimination-aware channel pruning (DCP).

    L(W) = ||Y - X W||^2 / (2 S) + lam L_S(X W), Y what the next layer gives, L_S the loss of an auxiliary classifier on it (batch norm - ReLU - mean
    over places - softmax). Starting from none, the channel of largest ||dL/dW_k||_F joins, all that joined are optimised, and so on: s_k is the share
    of channels that are not yet in when k joins (survey 001, 2.1.2 [52]). What stays is then optimised once more. Here every next layer has a
    classifier of its own, fitted once to the dense output, where the paper trains P of them with the network; its tolerance is ``keep``.
    """
    x, _, loss = _problem(next_acts_in, next_w, labels, lam)
    turn, _ = selection_order(x, loss, len(next_w))
    return 1 - turn / len(turn)


def sensitivities(next_acts_in: Tensor, next_w: Tensor) -> Tensor:
    """s_j = max over samples, outputs i and signs of [w_ij a_j]+- / sum_k [w_ik a_k]+-, (channels,), float64: the largest share that j ever has."""
    w, most = next_w.double(), torch.zeros_like(next_acts_in[0, :, 0], dtype=torch.float64)
    for a in next_acts_in.double().split(64):
        for sign in (1, -1):  # where the products are positive, then where they are negative
            p = sum(torch.einsum("sck,ock->soc", (s * a).clamp(min=0), (s * sign * w).clamp(min=0)) for s in (1, -1))
            most = torch.maximum(most, (p / p.sum(2, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)).amax((0, 1)))
    return most


def arrivals(s: Tensor, seed: int) -> Tensor:
    """When each channel is first drawn, draws coming at rate 1 and falling on j with p_j = s_j / sum s; never where s_j = 0."""
    waits = -torch.rand(s.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log().to(s.device)
    return torch.where(s > 0, waits * s.sum() / s.clamp(min=torch.finfo(s.dtype).tiny), torch.inf)


def importance_weights(s: Tensor, time: float, first: Tensor, seed: int) -> Tensor:
    """n_j / (m p_j), n_j how often j is drawn until ``time`` = m (``first`` is once): its mean is 1 for every j that can be drawn."""
    p, drawn = s / s.sum(), first <= time
    expected = torch.where(drawn, p * (time - first), 0.0).cpu()
    more = torch.poisson(expected, generator=torch.Generator().manual_seed(seed + 1)).to(s)  # later draws know nothing of the first
    return torch.where(drawn, (1 + more) / (time * p).clamp(min=torch.finfo(s.dtype).tiny), 0.0)


def _reweighted(rows, next_acts_in, next_w, *, variant, seed):
    """The next layer's weight, each sampled channel scaled by n_j / (m p_j); whole where nothing goes."""
    if variant == "deterministic" or rows.all():
        return next_w
    s = sensitivities(next_acts_in, next_w)
    first = arrivals(s, seed)
    drawn = rows & first.isfinite()
    scale = importance_weights(s, first[drawn].max().item(), first, seed) * drawn if drawn.any() else rows.double()
    return next_w * scale[:, None].to(next_w)


@score("Liebenwein, Baykal, Lang, Feldman & Rus 2020, Provable filter pruning for efficient neural networks", chapter="03", unit="filter", keep=0.5,
       scope="network", rebuild=_reweighted, exempt={"permutation": "channels are drawn, each with its own chance"})  # fmt: skip
def provable_filter_pruning(next_acts_in, next_w, *, variant: Annotated[str, Pick("rand", "deterministic")] = "rand", seed: Steps = 0):
    """Provable filter pruning (PFP).

    s_j, the largest share that channel j ever has in a sum of the next layer, positive and negative products apart; m draws with p_j = s_j / sum s
    keep the sum within 1 +- eps of its value with probability 1 - delta if m ~ sum s log(1 / delta) / eps^2, channel j weighing n_j / (m p_j)
    (survey 004). The score is sum s / m_j, m_j the draws until j first comes up (``deterministic``: its place by falling s_j, unweighted): across the
    network those above one threshold stay, which is the same eps in every layer; the paper's delta and constants only move that threshold. Draws come
    as a Poisson process and end with the last channel that stays: weights are unbiased at a fixed m, and nearly so here.
    """
    s = sensitivities(next_acts_in, next_w)
    draws = arrivals(s, seed) if variant == "rand" else 1 + (-s).argsort(stable=True).argsort()
    return torch.where(s > 0, s.sum() / draws, 0.0)


def active(saliency: Tensor, group: Tensor, keep: float, scope: str) -> Tensor:
    """The mask of the floor(keep n) most salient channels, across the network or in each group of layers; the best of a group always stays."""
    stays = torch.zeros_like(group, dtype=torch.bool)
    for part in [torch.ones_like(stays)] if scope == "network" else [group == g for g in group.unique()]:
        places = part.nonzero()[:, 0][saliency[part].argsort(descending=True, stable=True)]
        stays[places[: int(keep * len(places) + 1e-9)]] = True
    for g in group.unique():  # a layer without channels would end the network
        here = (group == g).nonzero()[:, 0]
        stays[here[saliency[here].argmax()]] = True
    return stays


def salient(w: Tensor, g: Tensor, channel: Tensor, keep: float, scope: str) -> Tensor:
    """The mask of the weights of active channels, a channel's saliency |sum of g w| over all that make it: the gradient of a gate on it."""
    numbers, own = channel[0].unique(return_inverse=True)
    saliency = torch.zeros(len(numbers), dtype=torch.float64, device=w.device).index_add(0, own, (w * g).double()).abs()
    group = torch.zeros_like(numbers).scatter(0, own, channel[1])
    return active(saliency, group, keep, scope)[own]


def _mask_anew(w, g, channel, mask, step, *, keep, every, scope):
    """The latent weights, and every so many steps the mask that the last batch's gradient asks for."""
    return Masked(w, salient(w, g, channel, keep, scope) if every and step % every == 0 else mask)


@score("Lin, Ji, Li, Wu, Huang & Zhang 2018, Accelerating convolutional networks via global and dynamic filter pruning", chapter="03", joint=True,
       filters=lambda: True, training=Training(project=_mask_anew),
       exempt={"count": "of floor(keep n) filters, not weights", "ties": "filters are ranked, not single weights"})  # fmt: skip
def global_dynamic_pruning(
    w, grad, channel, *, keep: Keep = 0.6, every: Steps = 100, scope: Annotated[str, Pick("network", "layer")] = "network", state: State | None = None
) -> Masked:
    """Global and dynamic filter pruning (GDP).

    min L(m W) so that ||m||_0 <= keep sum_l C_l, m over all filters of all layers: those of largest |sum dL/dw w|, the first-order Taylor term, are
    active. All weights go on learning through the mask, straight, and ``every`` so many steps the mask is chosen anew by the gradient of that batch,
    so that a filter wrongly pruned comes back (survey 001, 2.1.2 [54]). ``keep`` is the paper's beta. From the abstract and the catalogue: whether
    the saliency is squared or normalised between layers we could not read. 0 for ``every`` is pruning once. A group's best channel always stays.
    """
    if state is None:
        mask = salient(w, grad, channel, keep, scope)
        state = {"mask": mask, "channel": channel}
    return Masked(w, state["mask"], straight=True, state=state)
