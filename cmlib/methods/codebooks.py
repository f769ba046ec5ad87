"""Chapter 04, quantization: codebooks and learned bases.

Leaves give the codes of a weight; ``acts`` of a method is what it rounds the layers' inputs to. Of a pruned layer the weight is the vector of what is
left. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core import clusters
from ..core.codes import Codes, Sum, grouped, nearest_level
from ..core.knobs import Bits, Levels, Per, Pick, Span, Weight, WideBits
from ..core.method import quantizer
from ..core.packed import State
from ..core.rounding import Steps
from .grids import FEW, Average, half_gaussian

Book = tuple[Tensor, Tensor]  # levels (groups, k) or (groups, k, d), and the number of each entry's level (groups, entries)


def book(found: clusters.Clustering, w: Tensor) -> Book:
    """A clustering as levels and codes of one group."""
    levels, index = found
    return torch.from_numpy(levels).to(w)[None], torch.from_numpy(index).reshape(1, -1).to(w.device)


def runs(w: Tensor, d: int) -> Tensor:
    """The weight matrix (out, rest) in runs of ``d`` columns, (out, runs, d); where d does not divide rest, the next smaller number that does."""
    rows = w.detach().reshape(len(w), -1)
    return rows.reshape(len(w), -1, max(i for i in range(1, d + 1) if rows.shape[1] % i == 0))


def scalar_kmeans(w: Tensor, k: int, d: int, stages: int) -> list[Book]:
    """One codebook of k numbers."""
    return [book(clusters.line_of(w).cluster(k), w)]


def product(w: Tensor, k: int, d: int, stages: int) -> list[Book]:
    """A codebook of k vectors (at most one a row) for each run of columns."""
    books = [book(clusters.kmeans(x.cpu(), min(k, len(w))), w) for x in runs(w, d).unbind(1)]
    return [(torch.cat([levels for levels, _ in books]), torch.cat([index for _, index in books]))]


def residual(w: Tensor, k: int, d: int, stages: int) -> list[Book]:
    """One codebook of k vectors for all runs, then one for what it leaves, and so on."""
    left, books = runs(w, d).flatten(0, 1), []
    for _ in range(stages):
        levels, index = book(clusters.kmeans(left.cpu(), k), w)
        left = left - levels[0, index[0]]
        books.append((levels, index))
    return books


def sign(w: Tensor, k: int, d: int, stages: int) -> list[Book]:
    """Two levels, -mean|w| and mean|w|; sign(0) = +1."""
    scale = w.detach().abs().mean()
    return [(torch.stack([-scale, scale])[None], (w >= 0).long().reshape(1, -1))]


SCHEMES: dict[str, Callable[[Tensor, int, int, int], list[Book]]] = {f.__name__: f for f in (scalar_kmeans, product, residual, sign)}


def learned(books: list[Book]) -> State:
    """Levels that learn, and codes that stay."""
    return {f"levels{i}": nn.Parameter(levels) for i, (levels, _) in enumerate(books)} | {f"index{i}": index for i, (_, index) in enumerate(books)}


def looked_up(w: Tensor, state: State, axes: tuple[int, ...] = ()) -> Codes | Sum:
    """What ``learned`` stands for, in place of ``w``. The gradient of a level is the sum of those of its weights."""
    pairs = [(state[f"levels{i}"], state[f"index{i}"]) for i in range(len(state) // 2)]
    terms = tuple(Codes(w, index, levels, levels.shape[1], "table", columns=len(levels) > 1, straight=False, axes=axes) for levels, index in pairs)
    return replace(terms[0], state=state) if len(terms) == 1 else Sum(w, terms, state=state)


@quantizer("Gong, Liu, Yang & Bourdev 2014, Compressing deep convolutional networks using vector quantization",
           chapter="04", exempt={"idempotent": "the sums of residual codebooks are more levels than one new codebook has"})  # fmt: skip
def vq_gong(
    w, *, k: Levels = 16, scheme: Annotated[str, Pick(*SCHEMES)] = "scalar_kmeans", sub_vector_dim: Annotated[int, Span(1, 16, integer=True)] = 4,
    residual_stages: Annotated[int, Span(1, 4, integer=True)] = 2, state: State | None = None,
):  # fmt: skip
    """Codebooks by k-means: scalar, product, residual.

    min sum_ij |w_ij - c_(code of ij)|^2 over k levels c: numbers, or vectors of ``sub_vector_dim`` weights, with a codebook for each run of columns
    (``product``) or ``residual_stages`` codebooks for the whole layer, each for what those before it left (``residual``). ``sign`` is the paper's
    binarization, at +-mean|w| (the paper: +-1) (survey 001, 2.2.3 [70]). Training moves the levels and leaves the codes (Han, Mao & Dally 2016, Deep
    compression, section 3.3).
    """
    return looked_up(w, state or learned(SCHEMES[scheme](w, k, sub_vector_dim, residual_stages)))


def responding(laid: Tensor, gram: Tensor, levels: Tensor, index: Tensor, passes: int) -> Book:
    """Levels (runs, k, d) and codes (runs, groups, filters, places) of less response error sum (w - w')^T gram (w - w') than those given.

    laid (groups, filters, places, runs, d) and gram (groups, places, runs, d, places, runs, d), the places of a kernel. For one run of channels after
    the other the levels go as far as is best along the error's slope (in a dense layer that is least squares), then each code in turn is the best
    for what else there is. Nothing raises the error.
    """
    levels, index = levels.clone(), index.clone()
    left = laid - torch.stack([v[i] for v, i in zip(levels, index, strict=True)], 3)
    for m, v, i in [(m, levels[m], index[m]) for m in range(len(levels))] * passes:
        to_run = gram[..., m, :]
        own = to_run[:, :, m]
        near = own.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (groups, places, d, d)
        slope = torch.zeros_like(v).index_add_(0, i.flatten(), torch.einsum("gfpmi,gpmiqj->gfqj", left, to_run).flatten(0, 2))
        curvature = v.new_zeros(len(v), *near.shape[2:]).index_add_(0, i.flatten(), near[:, None].expand(*i.shape, -1, -1).flatten(0, 2))
        step = (torch.linalg.pinv(curvature, hermitian=True) @ slope[:, :, None])[:, :, 0]
        size = torch.einsum("gfpi,gpiqj,gfqj->", step[i], own, step[i])
        step *= (step * slope).sum() / size if size > 0 else 0.0
        v += step
        left[..., m, :] -= step[i]
        for p in range(i.shape[2]):
            now = i[:, :, p]
            wanted = torch.einsum("gfqmi,gqmij->gfj", left, to_run[:, :, :, :, p]) + v[now] @ near[:, p]
            cost = torch.einsum("ki,gij,kj->gk", v, near[:, p], v)[:, None] - 2 * wanted @ v.T
            best = torch.where(cost.amin(2) < cost.gather(2, now[..., None])[..., 0], cost.argmin(2), now)
            left[:, :, p, m] += v[now] - v[best]
            i[:, :, p] = best
    return levels, index


@quantizer("Wu, Leng, Wang, Hu & Cheng 2016, Quantized convolutional neural networks for mobile devices",
           chapter="04", exempt={"permutation": "k-means starts at filters drawn by their place"})  # fmt: skip
def q_cnn(
    w, acts_gram, *, k: Levels = 32, subspace_dim: Annotated[int, Span(1, 16, integer=True)] = 4,
    error_correction: Annotated[str, Pick("layer", "none")] = "layer", passes: Annotated[int, Span(1, 20, integer=True)] = 3,
    state: State | None = None,
):  # fmt: skip
    """Q-CNN: product codebooks that keep the responses.

    Each run of ``subspace_dim`` input channels has a codebook of k vectors for all filters and places of the kernel, so that a layer looks its
    products up: ``table_products``. Codebooks start by k-means; then levels and codes in turn lower the response error E |(w - w')^T x|^2 over what
    the layer reads (survey 001, 2.2.3 [71]). ``cmlib.lab.in_order.compress_in_order`` is the paper's correction of what earlier layers lost. Of a
    pruned layer the responses are not known by weight. Training moves the levels.
    """
    axes = (0, *range(2, w.dim()), 1) if w.dim() > 2 else ()
    if state is None:
        laid = w.detach().reshape(len(w), w.shape[1] if w.dim() > 1 else 1, -1).transpose(1, 2)  # (filters, places, channels)
        ((levels, index),) = product(laid.flatten(0, 1), k, subspace_dim, 1)
        if error_correction == "layer" and acts_gram is not None:
            groups, (places, channels), (runs, _, d) = len(acts_gram), laid.shape[1:], levels.shape
            gram = acts_gram.double().reshape(groups, channels, places, channels, places).permute(0, 2, 1, 4, 3)
            found = responding(laid.double().reshape(groups, -1, places, runs, d), gram.reshape(groups, *(places, runs, d) * 2),
                               levels.double(), index.reshape(runs, groups, -1, places), passes)  # fmt: skip
            levels, index = found[0].to(w), found[1].flatten(1)
        state = learned([(levels, index)])
    return looked_up(w, state, axes)


def table_products(x: Tensor, levels: Tensor, index: Tensor) -> tuple[Tensor, int, int]:
    """The products of x (..., channels) with every vector of codes, by tables: (products (..., vectors), multiplications, additions for one x).

    levels (runs, k, d), index (runs, vectors). Each run of x is multiplied with all its levels once; a product is then a sum of ``runs`` entries.
    """
    runs, k, d = levels.shape
    tables = torch.einsum("...md,mkd->...mk", x.unflatten(-1, (runs, d)), levels)
    total = sum(tables[..., m, :][..., index[m]] for m in range(runs))
    return total, runs * k * d, runs * k * (d - 1) + (runs - 1) * index.shape[1]


def hw_kmeans(w: Tensor, h: Tensor, k: int, rate: float) -> Book:
    """Weighted k-means: c = sum h w / sum h over each cluster."""
    return book(clusters.Line(w.cpu(), h.cpu()).cluster(k), w)


def ecsq(w: Tensor, h: Tensor, k: int, rate: float) -> Book:
    """Entropy-constrained quantization: mean h (w - c)^2 + lam H of at most k clusters; lam is ``rate`` times the error of a single cluster."""
    spread = (h * (w - (h * w).mean() / h.mean()).square()).mean().item()
    return book(clusters.ecsq(w.cpu(), k, rate * spread, h.cpu()), w)


def uniform_huffman(w: Tensor, h: Tensor, k: int, rate: float) -> Book:
    """k cells of one width, each at the weighted mean of its weights (in its middle where h says nothing)."""
    w, h, low = w.double().flatten(), h.double().flatten(), w.double().min()
    width = (w.max() - low) / k
    index = ((w - low) / width).nan_to_num(0).clamp(0, k - 1).long()
    mass, first = (torch.bincount(index, weights, k) for weights in (h, h * w))
    return torch.where(mass > 0, first / mass, low + (torch.arange(k).to(w) + 0.5) * width)[None], index[None]


WEIGHTED: dict[str, Callable[[Tensor, Tensor, int, float], Book]] = {f.__name__: f for f in (hw_kmeans, ecsq, uniform_huffman)}


@quantizer("Choi, El-Khamy & Lee 2017, Towards the limit of network quantization",
           chapter="04", exempt={"idempotent": "the price of a bit moves weights to commoner levels each time"})  # fmt: skip
def hessian_weighted_kmeans(
    w, hess_diag, *, k: Levels = 16, scheme: Annotated[str, Pick(*WEIGHTED)] = "hw_kmeans", lambda_entropy: Weight = 0.01,
    hessian_source: Annotated[str, Pick("exact_diag", "ones")] = "exact_diag", state: State | None = None,
):  # fmt: skip
    """Hessian-weighted k-means, entropy-constrained quantization.

    The loss rises by about sum h_i (w_i - c_i)^2 / 2, so the clusters weigh each weight by its h, the diagonal of the Hessian. ``ecsq`` adds
    lambda H, H the entropy of the codes: the price of a bit, in errors of a single level. It and ``uniform_huffman`` are meant for an entropy code
    behind them (survey 001, 2.2.3 [72]). The levels then learn. Each layer has its own levels; in the paper all layers share one set.
    """
    if state is None:
        h = hess_diag.clamp(min=0) if hessian_source == "exact_diag" and (hess_diag > 0).any() else torch.ones_like(w)
        levels, index = WEIGHTED[scheme](w.detach(), h, k, lambda_entropy)
        state = learned([(levels.to(w), index)])
    return looked_up(w, state)


def patterns(bits: int, off: int, like: Tensor) -> Tensor:
    """The bits of every code, (2^bits, bits), lowest first: 1 where set, else ``off``."""
    on = torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1
    return (off + (1 - off) * on).to(like)


def qem(x: Tensor, v: Tensor, off: int, passes: int) -> Tensor:
    """The basis ``v`` (groups, bits) after ``passes`` over x (groups, n): the nearest levels v e, then the v of least squared error for these codes.

    e are the bits of the codes, with ``off`` (-1 or 0) where not set. Codes that leave v open choose the shortest (LQ-Nets, algorithm 1).
    """
    given, x, v = v, x.double(), v.double()
    e = patterns(v.shape[1], off, x)
    for _ in range(passes):
        index = nearest_level(x, v @ e.T)
        count, total = (x.new_zeros(len(x), len(e)).scatter_add(1, index, t) for t in (torch.ones_like(x), x))
        gram = (e.T * count[:, None]) @ e
        v = (torch.linalg.pinv(gram, hermitian=True) @ (total @ e)[:, :, None])[:, :, 0]
    return v.to(given)


def first_basis(x: Tensor, bits: int, off: int) -> Tensor:
    """Powers of two times the step that is best for a normal variable of each group's mean size: x (groups, n) -> (groups, bits)."""
    step = 2 * half_gaussian(1 << bits - 1, 0.5)[0] if off else half_gaussian((1 << bits) - 1)[0]
    size = x.abs().mean(1, keepdim=True) * math.sqrt(math.pi / 2)
    return size * step / (1 - off) * torch.exp2(torch.arange(bits).to(x))


def followed(x: Tensor, bits: int, off: int, passes: int, old: Tensor | None, keep: float) -> Tensor:
    """The basis that fits x: a new one, or a moving average of the old and the one that it becomes."""
    return qem(x, first_basis(x, bits, off), off, passes) if old is None else keep * old + (1 - keep) * qem(x, old, off, passes)


Passes = Annotated[int, Span(1, 20, integer=True)]


def _lq_inputs(x, *, a_bits: WideBits = 2, qem_iterations: Passes = 1, moving_average: Average = 0.9, state: State | None = None):
    if a_bits > FEW:
        return None
    v = followed(x.reshape(1, -1), a_bits, 0, qem_iterations, state and state["v"], moving_average)
    levels = (v @ patterns(a_bits, 0, v).T)[0].sort().values
    return Steps((levels[1:] + levels[:-1]) / 2, levels, state={"v": v})


@quantizer("Zhang, Yang, Ye & Hua 2018, LQ-Nets: learned quantization for highly accurate and compact deep neural networks",
           chapter="04", acts=_lq_inputs, exempt={"idempotent": "a basis is fitted by passes, which need not come upon the old one"})  # fmt: skip
def lq_nets(
    w, training=False, *, bits: Bits = 2, qem_iterations: Passes = 1, moving_average: Average = 0.9, per: Per = "filter", state: State | None = None
):
    """LQ-Nets: learned bases.

    Levels v e for all e in {-1, 1}^bits, v learned for every filter, so that products with inputs are sums of popcounts; inputs have e in
    {0, 1}^a_bits and one v a layer. v starts at the even levels that are best for a normal weight; in training it follows its least-squares fit by a
    moving average, ``qem_iterations`` passes a step, and the gradient goes straight through (survey 001, 2.2.4 (2) [86]). Inputs of more than 8 bits
    are left as they are.
    """
    g = grouped(w.detach(), per)
    if state is None or training:
        state = {"v": followed(g, bits, -1, qem_iterations, state and state["v"], moving_average)}
    v = state["v"]
    return Codes(w, nearest_level(g, v @ patterns(bits, -1, v).T), v, 1 << bits, "basis", state=state)
