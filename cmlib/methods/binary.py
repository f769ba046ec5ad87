"""Chapter 04, quantization: one bit chosen well, sums of signs.

The bit is chosen by what it does to the loss or to the outputs. Leaves give the codes of a weight; ``acts`` of a method is what it rounds the layers'
inputs to. Of a pruned layer the weight is the vector of what is left. (Survey sections are of the 2020 survey, 001.) Signs take sign(0) = +1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.codes import Codes, grouped, sign_term
from ..core.knobs import Per, Pick, Span, Switch
from ..core.method import quantizer
from ..core.packed import Masked, State
from ..core.rounding import Steps, inside
from .grids import FEW, Average
from .quantize import filters, input_signs, signs, xnor_net

Bases = Annotated[int, Span(1, 8, integer=True)]


def positive(h: Tensor) -> Tensor:
    """A curvature that can be divided by: not below 0, a little everywhere, and 1 where there is none at all."""
    h = h.clamp(min=0)
    return h + 1e-6 * h.mean() if h.any() else torch.ones_like(h)


@quantizer("Hou, Yao & Kwok 2017, Loss-aware binarization of deep networks", chapter="04")
def loss_aware_binarization(w, hess_diag, *, curvature: Annotated[str, Pick("hess_diag", "ones")] = "hess_diag", per: Per = "tensor",
                            state: State | None = None):  # fmt: skip
    """Loss-aware binarization (LAB).

    The loss rises by about sum d_i (alpha b_i - w_i)^2 / 2, least for b = sign(w) and alpha = sum d |w| / sum d, d the diagonal of the Hessian;
    ``ones`` is the plain mean |w| (survey 001, 2.2.1 (1) [57]). Here d is that of the network as it came and stays; the paper renews it at every
    step, as the root of Adam's second moment, and divides the step by it. The gradient goes straight to the latent weight.
    """
    if state is None:
        state = {"d": positive(hess_diag) if curvature == "hess_diag" else torch.ones_like(w)}
    rows, d = grouped(w.detach(), per), grouped(state["d"], per)
    alpha = (d * rows.abs()).sum(1, keepdim=True) / d.sum(1, keepdim=True)
    return replace(signs(rows, alpha.to(w), w), state=state)


def least_squares(b: Tensor, x: Tensor) -> Tensor:
    """The a, (groups, m), of least |x - sum_j a_j b_j|^2: b (groups, m, n), x (groups, n). Where b leaves it open, the shortest."""
    gram = (b @ b.transpose(1, 2)).double()
    return (torch.linalg.pinv(gram, hermitian=True) @ (b @ x[:, :, None]).double())[:, :, 0].to(x)


def basis_codes(w: Tensor, b: Tensor, a: Tensor, values: Tensor | None = None) -> Codes:
    """The weight sum_j a_j b_j as codes: b (groups, m, entries) of -1 and 1, a (groups, m)."""
    bits = torch.arange(b.shape[1], device=b.device)[:, None]
    return Codes(w if values is None else values, ((b > 0).long() << bits).sum(1), a, 1 << b.shape[1], "basis")


@quantizer("Guo, Yao, Zhao & Chen 2017, Network sketching: exploiting binary structure in deep CNNs",
           chapter="04", exempt={"idempotent": "signs are chosen one after another, and need not come upon the old ones"})  # fmt: skip
def network_sketching(w, *, m_bases: Bases = 2, refined: Switch = "on"):
    """Network sketching.

    Each filter w ~ sum_j a_j b_j, b_j = sign(what those before it left), a_j the mean of its magnitudes; ``refined`` works out all a again by
    least squares after every new b_j. The squared error falls by a factor 1 - 1 / t or more with every sign, t the filter's size (survey 001, 2.2.1
    (1) [59]). Filters share what their signs have in common: ``shared_additions``.
    """
    rows = left = filters(w.detach())
    b, a = rows.new_zeros(len(rows), 0, rows.shape[1]), rows.new_zeros(len(rows), 0)
    for _ in range(m_bases):
        size, sign = sign_term(left)
        b = torch.cat([b, sign[:, None]], 1)
        a = least_squares(b, rows) if refined == "on" else torch.cat([a, size], 1)
        left = rows - (a[:, None] @ b)[:, 0]
    return basis_codes(w, b, a)


def shared_additions(b: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Products of one input with all rows of signs b (rows, t), each made from an earlier one: ([(row, the one it is made from)], additions).

    From row p to row q it takes as many additions as their signs differ, or agree (of the product's negative), whichever is less, and one to put
    them together; the first takes t - 1. The tree of fewest additions is Prim's (Guo et al. 2017, section 4.2: associative implementation).
    """
    t = b.shape[1]
    differ = ((t - b @ b.T) / 2).round()
    cost = torch.minimum(differ, t - differ)
    made, additions, from_row = [(0, 0)], t - 1, torch.zeros(len(b), dtype=torch.long)
    nearest = cost[0].clone()
    for _ in range(len(b) - 1):
        nearest[[row for row, _ in made]] = torch.inf
        row = int(nearest.argmin())
        made, additions = [*made, (row, int(from_row[row]))], additions + int(nearest[row])  # d - 1 to add d up, one to add them on
        closer = cost[row] < nearest
        nearest, from_row = torch.where(closer, cost[row], nearest), torch.where(closer, row, from_row)
    return made, additions


def he_std(w: Tensor) -> Tensor:
    """sqrt(2 / fan in), the standard deviation of He's starting weights; the mean |w| where pruning has hidden the fan in."""
    return w.new_tensor(math.sqrt(2 / w[0].numel())) if w.dim() > 1 else w.abs().mean()


SCALES = {"he_std": he_std, "mean_abs": lambda w: w.abs().mean(), "one": lambda w: w.new_ones(())}


@quantizer("McDonnell 2018, Training wide residual networks for deployment using a single bit for each weight",
           chapter="04")  # fmt: skip
def single_bit_wrn(w, *, scale: Annotated[str, Pick(*SCALES)] = "he_std"):
    """Single-bit wide residual networks (McDonnell).

    w_b = sigma sign(w), sigma = sqrt(2 / fan in) of the layer: the spread of He's starting weights, a constant that nothing learns; the gradient of
    w_b goes whole to w (survey 001, 2.2.1 (1) [60]). Behind a batch norm any sigma gives the same output, and only says how long a step is beside
    the weight. The rest of the paper is the network's and the training's part: a wide residual net, batch norm without learned scale and shift, a
    cosine rate with warm restarts. ``one`` is the plain sign, ``mean_abs`` that of binary-weight networks, of the layer.
    """
    return signs(w.reshape(1, -1), SCALES[scale](w.detach()).reshape(1, 1), w)


def best_scale(target: Tensor, gram: Tensor, b: Tensor, otherwise: Tensor) -> Tensor:
    """The alpha (groups, filters, 1) of least alpha^2 b^T gram b - 2 alpha target^T b; ``otherwise`` where b shows nothing."""
    size = (b @ gram * b).sum(2, keepdim=True)
    return torch.where(size > 0, (target * b).sum(2, keepdim=True) / size, otherwise)


def swept(target: Tensor, gram: Tensor, b: Tensor, alpha: Tensor, levels: Tensor) -> Tensor:
    """b with one entry after another, for what else there is, the level of least alpha^2 b^T gram b - 2 alpha target^T b.

    target and b (groups, filters, k), gram (groups, k, k), alpha (groups, filters, 1), levels (count,). Places at which no filter has anything to
    gain when the sweep begins wait for the next one.
    """
    b, diagonal = b.clone(), gram.diagonal(dim1=1, dim2=2)[:, None]

    def best(at: slice) -> tuple[Tensor, Tensor]:
        """(change of the objective, 0 or less; the level) of each entry by itself."""
        now, own = b[:, :, at], diagonal[:, :, at]
        wanted = target[:, :, at] - alpha * (b @ gram[:, :, at] - now * own)
        size, to, now = alpha[..., None], levels, now[..., None]
        change, index = (size * (to - now) * (size * own[..., None] * (to + now) - 2 * wanted[..., None])).min(3)
        return change, torch.where(change < 0, levels[index], now[..., 0])

    for j in (best(slice(None))[0] < 0).any(0).any(0).nonzero().flatten().tolist():
        b[:, :, j : j + 1] = best(slice(j, j + 1))[1]
    return b


def hashed(rows: Tensor, gram: Tensor, alternations: int) -> tuple[Tensor, Tensor]:
    """Signs b and scales alpha of least (w - alpha b)^T gram (w - alpha b), each in turn the best for what else there is.

    rows (groups, filters, k), gram (groups, k, k) -> b (groups, filters, k), alpha (groups, filters, 1); from sign(w) on, one entry after another.
    """
    target, mean, b = rows @ gram, rows.abs().mean(2, keepdim=True), sign_term(rows, 2)[1]
    alpha = best_scale(target, gram, b, mean)
    for _ in range(alternations):
        last, b = b, swept(target, gram, b, alpha, torch.tensor([-1.0, 1.0]).to(b))
        alpha = best_scale(target, gram, b, mean)
        if torch.equal(b, last):
            break
    return b, alpha


@quantizer("Hu, Wang & Cheng 2018, From hashing to CNNs: training binary weight networks via hashing", chapter="04")
def bwnh(w, acts_gram, *, n_alternations: Annotated[int, Span(0, 50, integer=True)] = 10, state: State | None = None):
    """Binary weights via hashing (BWNH).

    Signs b and a scale alpha for each filter that keep its products with what the layer reads: min |X^T w - alpha X^T b|^2. In turn alpha by
    least squares and each b_j = sign(alpha (q_j - alpha sum_(k != j) Z_jk b_k)), Z = X X^T, q = Z w; none raises the error (survey 001, 2.2.1 (1)
    [61]). X is that of the model as it stands: compress layer after layer, and each sees the binary ones before it. Training then moves alpha and
    leaves the signs. Of a pruned layer X is not known by weight, and alpha = mean |w|.
    """
    if state is None:
        rows = filters(w.detach())
        gram = torch.eye(rows.shape[1]).to(rows)[None] if acts_gram is None else acts_gram
        b, alpha = hashed(rows.reshape(len(gram), -1, rows.shape[1]).to(gram), gram, 0 if acts_gram is None else n_alternations)
        state = {"alpha": nn.Parameter(alpha.reshape(-1, 1).to(w)), "index": (b > 0).long().reshape(rows.shape)}
    return Codes(w, state["index"], 2 * state["alpha"], 2, straight=False, state=state)


def _residual_signs(*, order_K: Annotated[int, Span(1, 4, integer=True)] = 2):
    return replace(input_signs(inside(-1, 1)), order=order_K)


@quantizer("Li, Ni, Zhang, Yang & Gao 2017, Performance guaranteed network acceleration via high-order residual quantization",
           chapter="04", acts=_residual_signs)  # fmt: skip
def horq(w, *, weight_binarize: Switch = "on"):
    """High-order residual quantization (HORQ).

    What each output reads is a sum of signs, x ~ sum_k beta_k h_k, h_k = sign(what those before it left), beta_k the mean of its magnitudes: of order
    1 it is XNOR-Net's, and a layer is ``order_K`` products of signs. The scales are of each patch that a convolution sees. Weights are
    those of XNOR-Net, or real (survey 001, 2.2.1 (2) [64]). A sign passes on beta_k times the gradient where |what was left| <= 1.
    """
    return xnor_net(w) if weight_binarize == "on" else Masked(w, torch.ones_like(w, dtype=torch.bool), "dense")


def shifts(rows: Tensor, m: int) -> Tensor:
    """The thresholds (groups, m) of the m shifted signs of rows (groups, n): mean - u std, u evenly from -1 to 1, 0 where there is but one."""
    u = torch.linspace(-1, 1, m).to(rows) if m > 1 else rows.new_zeros(1)
    return rows.mean(1, keepdim=True) - u * rows.std(1, correction=0, keepdim=True)


def shifted_signs(rows: Tensor, thresholds: Tensor) -> Tensor:
    """(groups, m, n): +1 where an entry is not below the threshold, else -1."""
    return torch.where(rows[:, None] >= thresholds[:, :, None], 1.0, -1.0).to(rows)


def _abc_inputs(x, *, N_activation_bases: Annotated[int, Span(1, FEW, integer=True)] = 3, moving_average: Average = 0.9, state: State | None = None):
    row = x.reshape(1, -1)
    at = shifts(row, N_activation_bases)
    found = torch.cat([at, least_squares(shifted_signs(row, at), row)])
    if state is not None:
        found = moving_average * state["found"] + (1 - moving_average) * found
    (at, order), beta = found[0].sort(), found[1]
    levels = torch.cat([-beta.sum().reshape(1), 2 * beta[order].cumsum(0) - beta.sum()])
    return Steps(at, levels, lambda x: (beta * ((x[..., None] - found[0]).abs() <= x.std() / 2)).sum(-1), state={"found": found})


@quantizer("Lin, Zhao & Pan 2017, Towards accurate binary convolutional neural network",
           chapter="04", acts=_abc_inputs)  # fmt: skip
def abc_net(w, *, M_weight_bases: Bases = 3, per: Per = "tensor"):
    """ABC-Net: accurate binary convolution.

    w ~ sum_i alpha_i b_i with fixed signs b_i = sign(w - mean + u_i std), u_i evenly from -1 to 1 (0 for one), and alpha by least squares, held
    fixed for the gradient, which is sum_i alpha_i g. Inputs are sum_j beta_j h_j, signs about thresholds, and pass beta_j g within half a standard
    deviation of each: a layer is M times N products of signs (survey 001, 2.2.1 (2) [66]). In the paper thresholds and beta learn by gradient; here
    they are chosen as those of the weights are, for what the layer reads, and follow it by a moving average.
    """
    rows = grouped(w.detach(), per)
    b = shifted_signs(rows, shifts(rows, M_weight_bases))
    alpha = least_squares(b, rows)
    return basis_codes(w, b, alpha, (grouped(w, per) * alpha.sum(1, keepdim=True)).reshape(w.shape))
