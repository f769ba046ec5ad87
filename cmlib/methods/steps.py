"""Chapter 04, quantization: rounded in steps.

Inputs before weights, layer after layer, a portion at a time, fewer and fewer bits; and the splitting of ADMM. Leaves give the codes of a weight;
``acts`` of a method is what it rounds the layers' inputs to. A tool is called as it is; a recipe gives its stages. (Survey sections are of the 2020
survey, 001.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from ..core.codes import Codes, sign_term
from ..core.knobs import Pick, Span, Weight, WideBits
from ..core.method import Training, quantizer, recipe, tool
from ..core.packed import Masked, State
from ..core.schedule import Recipe, Step
from ..core.sites import AS_THEY_ARE
from ..core.splitting import split
from .binary import best_scale, swept
from .discrete import slq
from .grids import FEW, PARTITIONS, half_levels, half_wave, partly, taken
from .quantize import filters, ternary_weight_networks

# inputs first, then weights

Sparsity = Annotated[float, Span(0.5, 0.95)]
WEIGHTS = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0)}


def above(sparsity: float) -> float:
    """What a normal variable of variance 1 stays below so often, but not less than 0."""
    return max(0.0, torch.special.ndtri(torch.tensor(sparsity, dtype=torch.float64)).item())


def nearest_preimage(y: Tensor, v: Tensor, thresholds: Tensor, levels: Tensor, lam: float) -> Tensor:
    """The z of least (y - Q(z))^2 + lam (z - v)^2, entry by entry: Q is levels[i] from thresholds[i - 1] on and below thresholds[i].

    Within each of Q's cells that is v itself, or the cell's nearest end; the best of these.
    """
    low = torch.cat([thresholds.new_full((1,), -torch.inf), thresholds])
    high = torch.cat([torch.nextafter(thresholds, low[:1]), -low[:1]])
    z = torch.minimum(torch.maximum(v[..., None], low), high)
    cost = (y[..., None] - levels).square() + lam * (z - v[..., None]).square()
    return z.gather(-1, cost.argmin(-1, keepdim=True))[..., 0]


class Fitted(NamedTuple):
    """Weights alpha t, t (groups, filters, k) among a few levels, alpha (groups, filters, 1), and the objective after each step of the fit."""

    t: Tensor
    alpha: Tensor
    objective: list[float]


def transformed(x: Tensor, w: Tensor, t: Tensor, alpha: Tensor, grid: tuple[Tensor, Tensor] | None, weights: Tensor, lam: float,
                passes: int = 20) -> Fitted:  # fmt: skip
    """min |Y - Q(Z)|^2 + lam |Z - alpha X t|^2 from t and alpha on: Z, alpha and every entry of t in turn the best for the others.

    Y = Q(X w), of inputs x (samples, groups, k) and weights w (groups, filters, k). Q is a ``grid`` (thresholds, levels), or the identity, of
    what each filter gives less its mean and over its standard deviation, as behind a batch norm.
    """
    out = torch.einsum("ngk,gok->gon", x, w)
    x = x.transpose(0, 1)
    gram = x.transpose(1, 2) @ x
    mean, std = out.mean(2, keepdim=True), out.std(2, correction=0, keepdim=True)
    std = torch.where(std > 0, std, 1)
    y = unit = (out - mean) / std
    if grid is not None:
        thresholds, levels = grid
        y = levels[torch.bucketize(unit, thresholds, right=True)]
    objective: list[float] = []

    def v() -> Tensor:
        return (alpha * (t @ x.transpose(1, 2)) - mean) / std

    def note(z: Tensor, v: Tensor) -> None:
        q = z if grid is None else levels[torch.bucketize(z, thresholds, right=True)]
        objective.append(((y - q).square() + lam * (z - v).square()).sum().item())

    now = v()
    for _ in range(passes):
        z = (y + lam * now) / (1 + lam) if grid is None else nearest_preimage(y, now, thresholds, levels, lam)
        note(z, now)
        target = (z * std + mean) @ x
        alpha = best_scale(target, gram, t, alpha)
        note(z, v())
        t = swept(target, gram, t, alpha, weights)
        now = v()
        note(z, now)
        if objective[-1] > (1 - 1e-3) * objective[-3]:
            break
    return Fitted(t, alpha, objective)


def _sparse_inputs(x, *, a_bits: WideBits = 2, activation_sparsity: Sparsity = 0.75, state: State | None = None):
    return half_wave(x, a_bits, state, above(activation_sparsity)) if a_bits <= FEW else None


@quantizer("Wang, Hu, Zhang, Zhang, Liu & Cheng 2018, Two-step quantization for low-bit neural networks", chapter="04", acts=_sparse_inputs)
def two_step_quantization(
    w, acts_rows, *, w_levels: Annotated[str, Pick("ternary", "binary", "float")] = "ternary", a_bits: WideBits = 2,
    activation_sparsity: Sparsity = 0.75, lambda_relax: Annotated[float, Span(0.1, 100, log=True)] = 1.0, state: State | None = None,
):  # fmt: skip
    """Two-step quantization (TSQ).

    First the codes: inputs as in ``hwgq``, but 0 up to the threshold that a share ``activation_sparsity`` of a normal variable stays below, so that
    the levels serve the large ones; train so with ``w_levels="float"``. Then, layer after layer, the weights alpha t that give these codes: min |Y -
    Q(Z)|^2 + lambda |Z - alpha X t|^2, Y = Q(X w), t of few levels, one alpha a filter; ``transformed`` (survey 001, 2.2.4 (2) [84], which takes the
    bits for learned). Q here is of each filter's outputs as a batch norm would leave them, and all layers are fitted at once to what they read in
    the given network; give one after the other with ``where`` for the paper's order. Training then moves alpha. Of a pruned layer X is not known by
    weight, and it is ``ternary_weight_networks`` of each filter.
    """
    if w_levels == "float":
        return Masked(w, torch.ones_like(w, dtype=torch.bool), "dense")
    levels = torch.tensor(WEIGHTS[w_levels], dtype=torch.float64, device=w.device)
    if state is None:
        w0 = filters(w.detach()).double()
        start = ternary_weight_networks(w0, per="filter")
        alpha, t = (start.params, levels[start.index]) if w_levels == "ternary" else sign_term(w0)
        if acts_rows is not None:
            grid = half_levels(levels.new_ones(()), a_bits, above(activation_sparsity)) if a_bits <= FEW else None
            parts = (p.reshape(acts_rows.shape[1], -1, p.shape[1]) for p in (w0, t, alpha))
            t, alpha, _ = transformed(acts_rows.double(), *parts, grid, levels, lambda_relax)
        state = {"alpha": nn.Parameter(alpha.reshape(-1, 1).to(w)), "index": torch.bucketize(t.reshape(w0.shape), levels)}
    return Codes(w, state["index"], state["alpha"] * (levels[1] - levels[0]), len(levels), straight=False, state=state)


# a portion at a time, layer after layer


def nearest_of_three(x: Tensor, delta: Tensor) -> Tensor:
    """The number of each weight's level among -1, 0, 1: 0 where |x| is not above delta."""
    return 1 + torch.where(x >= 0, 1, -1) * (x.abs() > delta)


def _towards_codes(g, w, alpha, delta, *, a1, a2):
    """The gradient of L(w) + a1 sum |g (w - c)| + a2 |w - c|^2, g and the codes c held fixed; what is frozen has no g, and no part in L."""
    off = w - alpha * (nearest_of_three(w, delta) - 1)
    return g + a1 * g.abs() * off.sign() + 2 * a2 * off


@quantizer("Zhou, Yao, Wang & Chen 2018, Explicit loss-error-aware quantization for low-bit deep neural networks",
           chapter="04", training=Training(gradient=_towards_codes),
           exempt={"trains": "with a portion of 1 every weight is rounded at once, and stays"})  # fmt: skip
def elq(
    w, *, code_set: Annotated[str, Pick("binary", "ternary")] = "ternary", portion: Weight = 1.0,
    partition: Annotated[str, Pick(*PARTITIONS)] = PARTITIONS[0], a1: Annotated[float, Span(0, 10)] = 0.3,
    a2: Annotated[float, Span(0, 10)] = 0.1, state: State | None = None,
):  # fmt: skip
    """Explicit loss-error-aware quantization (ELQ), as we read it.

    As ``inq``, a ``portion`` of the weights takes its code c and stays, in stages with training between, and the rest, still float, is drawn to its
    codes: by what they change of the loss, a1 sum |g (w - c)|, g = dL/dw, and by their distance, a2 |w - c|^2 (survey 001, 2.2.5 [92]). Codes are
    -alpha, 0, alpha of ``ternary_weight_networks``, or +-mean |w|, found once. With a1 = 1 a weight moves only towards its code, twice as fast, and
    no more makes up for the others. The sum of absolute values bounds |L(w) - L(c)| to first order; its form is our reading of the abstract, the
    paper's may differ.
    """
    flat = w.detach().flatten()
    if state is None:
        start, zero = ternary_weight_networks(flat), torch.zeros_like(flat, dtype=torch.bool)
        ternary = code_set == "ternary"
        alpha, delta = (start.params[0, 0], 0.7 * flat.abs().mean()) if ternary else (flat.abs().mean(), -flat.new_ones(()))
        state = {"alpha": alpha, "delta": delta, "frozen": zero, "index": zero.long() + 1}
    state = taken(flat, state, portion, partition, lambda v: nearest_of_three(v, state["delta"]))
    if code_set == "binary" and state["frozen"].all():
        return Codes(w, state["index"][None] // 2, 2 * state["alpha"].reshape(1, 1), 2, straight=False, state=state)
    return partly(Codes(w, state["index"][None], state["alpha"].reshape(1, 1), 3, straight=False), state)


@quantizer("Xu, Wang, Zhou, Lin & Xiong 2018, Deep neural network compression with single and multiple level quantization",
           chapter="04", exempt={"trains": "at full depth every cluster is rounded at once, and stays"})  # fmt: skip
def mlq(
    w, place, *, bits: Annotated[int, Span(2, 4, integer=True)] = 2, depth: Weight = 1.0,
    layer_order: Annotated[str, Pick("front_to_back", "back_to_front")] = "front_to_back", state: State | None = None,
):  # fmt: skip
    """Multi-level network quantization (MLQ).

    For few levels: ``slq``, but layer after layer, so that the layers still float learn to make up for those that are rounded. Of n layers the i-th
    (i = 0, 1, ...) has a portion of depth n - i of its clusters rounded, between none and all; ``depth`` is turned up in stages with training between
    (``cmlib.lab.stages``; survey 001, 2.2.3 [73]). From the abstract: width and depth are the paper's two levels; its order of layers, and how it
    chooses the three levels of a ternary net, we do not know: here they are k-means' centroids. Of one layer it is ``slq``.
    """
    i, n = place if state is None else state["place"]
    turn = i if layer_order == "front_to_back" else n - 1 - i
    found = slq(w, bits=bits, portion=min(1.0, max(0.0, depth * n - turn)), state=state)
    return replace(found, state={**found.state, "place": (i, n)})


# fewer and fewer bits

SEQUENCES = {"2": (2,), "8,2": (8, 2), "8,4,2": (8, 4, 2), "8,4": (8, 4), "8": (8,)}


@recipe("Zhuang, Shen, Tan, Liu & Reid 2018, Towards effective low-bitwidth convolutional neural networks", chapter="04")
def effective_low_bitwidth_training(
    *, trick: Annotated[str, Pick("none", "two_stage", "progressive", "guided", "all")] = "all",
    bit_sequence: Annotated[str, Pick(*SEQUENCES)] = "8,4,2", guidance_weight: Annotated[float, Span(0, 10)] = 1.0,
) -> Recipe:  # fmt: skip
    """Effective low-bitwidth training: two stages, fewer and fewer bits, guided.

    Three helps for ``dorefa_net`` at the last width of ``bit_sequence``: weights first and inputs after them (``two_stage``); through the widths of
    the sequence one after another, each from where the one before it ended (``progressive``); a network of full precision trained alongside, in both
    of whose losses stands how far their features and their answers are apart (``guided``, ``cmlib.lab.guided``); ``all`` has the weights go down the
    sequence, then the inputs, guided throughout (survey 001, 2.2.5 [91]). The epochs are shared out evenly, so that every recipe trains equally long.
    The paper starts at 32 bits, here the given network, and has a stage of 16, whose weights are no different.
    """
    widths = SEQUENCES[bit_sequence]
    last, every = widths[-1], widths if trick in ("progressive", "all") else widths[-1:]
    pairs = [(bits, bits) for bits in every]
    if trick in ("two_stage", "all"):
        pairs = [(bits, AS_THEY_ARE) for bits in every] + [(last, bits) for bits in every]
    guide = guidance_weight if trick in ("guided", "all") else 0.0
    return tuple(Step("dorefa_net", {"bits": b, "a_bits": a}, 1 / len(pairs), guide) for b, a in pairs)


# a tool


class Solution(NamedTuple):
    """Where ADMM ended, and the two residuals after each iteration: |x - z|, and rho |z - the last z|."""

    x: Tensor
    z: Tensor
    u: Tensor
    primal: list[float]
    dual: list[float]


Prox = Callable[[Tensor, float], Tensor]


@tool("Boyd, Parikh, Chu, Peleato & Eckstein 2011, Distributed optimization and statistical learning via the alternating direction method of "
      "multipliers", chapter="04")  # fmt: skip
def admm_solver(
    prox_f: Prox, prox_g: Prox, start: Tensor, *, rho: Annotated[float, Span(1e-5, 100, log=True)] = 1.0,
    iterations: Annotated[int, Span(1, 100_000, log=True, integer=True)] = 100, relaxation: Annotated[float, Span(1, 1.8)] = 1.0,
    tolerance: Annotated[float, Span(0, 1)] = 0.0,
) -> Solution:  # fmt: skip
    """Alternating direction method of multipliers (ADMM).

    min f(x) + g(z) so that x = z: x <- argmin f(x) + rho / 2 |x - (z - u)|^2, z <- argmin g(z) + rho / 2 |z - (x + u)|^2, u <- u + x - z, the
    scaled dual; ``prox_f(v, rho)`` and ``prox_g(v, rho)`` give the two: of a constraint, its nearest point. It stops when both residuals are within
    ``tolerance``. Of convex f and g the limit is the minimum for every rho, which only sets the pace; with few-weights or few-levels sets it
    is a heuristic, and |x - z| may stay: ``admm_weight_pruning`` and ``admm_low_bit``, which take x by training (survey 001, 2.2.5 [90]).
    """
    x, z, u, primal, dual = start, start, torch.zeros_like(start), [], []
    for _ in range(iterations):
        last, x = z, prox_f(z - u, rho)
        z, u = split(x, z, u, lambda v: prox_g(v, rho), relaxation)
        primal.append((x - z).norm().item())
        dual.append(rho * (z - last).norm().item())
        if max(primal[-1], dual[-1]) <= tolerance:
            break
    return Solution(x, z, u, primal, dual)
