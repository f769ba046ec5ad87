"""Chapter 03, pruning structures: whole filters.

Survey 001, section 2.1.2. A filter goes whole, with its bias, its batch norm and what the next layer reads of it, so that the network is really
smaller (``bake``). Six methods say what each filter is worth, with one number for each; three learn what goes while the network trains.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.apply import latent
from ..core.knobs import Keep, Penalty, Pick, Span, Steps
from ..core.method import Training, score
from ..core.packed import Masked, State
from ..core.select import select
from ..core.splitting import pull, split
from ..core.training import Hook

Norm = Annotated[int, Span(1, 2, integer=True)]
Switch = Annotated[str, Pick("on", "off")]
Cut = Annotated[float, Span(0, 1)]

WITHIN = {  # the axes of a weight (out, in, ...) of so many that lie within one group
    "filter": lambda axes: tuple(range(1, axes)),
    "channel": lambda axes: (0, *range(2, axes)),
    "shape": lambda axes: (0,),
    "depth": lambda axes: tuple(range(axes)),
}


def group_norms(w: Tensor, group: str) -> Tensor:
    """||w_g||_2 of every group, so shaped that it broadcasts to w."""
    return torch.linalg.vector_norm(w, dim=WITHIN[group](w.dim()), keepdim=True)


def group_soft_threshold(w: Tensor, t: float, group: str) -> Tensor:
    """The proximal step of t sum ||w_g||: each group shorter by t, and exactly zero within t of it."""
    norms = group_norms(w, group).clamp(min=torch.finfo(w.dtype).tiny)
    return w * (1 - t / norms).clamp(min=0)


def _group_lasso_step(w, lr, *, lambda_g, group, solver):
    return group_soft_threshold(w, lr * lambda_g, group) if solver == "proximal" else w


def _group_lasso(packed, *, lambda_g, group, solver):
    """sum ||w_g||, with a zero group's gradient taken as zero."""
    if solver == "proximal":
        return 0.0
    squares = packed.values.square().sum(WITHIN[group](packed.values.dim()))
    return lambda_g * torch.where(squares > 0, squares, 1.0).sqrt().mul(squares > 0).sum()


def standing(w: Tensor, group: str = "filter", least: float = 0.0) -> Masked:
    """The weights of the groups whose norm is above ``least``; those that are masked go on learning."""
    return Masked(w, (group_norms(w, group) > least).expand_as(w), straight=True)


@score("Wen, Wu, Wang, Chen & Li 2016, Learning structured sparsity in deep neural networks", chapter="03",
       training=Training(penalty=_group_lasso, project=_group_lasso_step), filters=lambda *, group: group in ("filter", "depth"))  # fmt: skip
def structured_sparsity_learning(
    w, training=False, *, lambda_g: Penalty = 1e-3, group: Annotated[str, Pick(*WITHIN)] = "filter",
    solver: Annotated[str, Pick("proximal", "subgradient")] = "proximal", threshold_after: Cut = 0.0, state: State | None = None,
) -> Masked:  # fmt: skip
    """Structured sparsity learning (SSL).

    min L(w) + lambda_g sum_g ||w_g||_2: groups reach zero whole, by the proximal step w_g <- w_g max(0, 1 - lr lambda_g / ||w_g||), and may leave
    it again (survey 001, 2.1.2 [35]). A ``group`` is a filter w[n], a channel w[:, c], a shape w[:, c, m, k] (one column of the weight matrix), or
    depth: the whole layer, which is safe only where a shortcut leads around it. The paper's lambda is ``fit``'s weight decay. ``subgradient`` adds
    lambda_g w_g / ||w_g|| to the gradient instead and reaches no exact zero; groups whose norm is then at most ``threshold_after`` count as removed
    once training is over. Plain SGD solves this problem; AdamW scales its steps.
    """
    least = 0.0 if training else threshold_after
    return standing(w, group, least)


def _each(norms: Tensor, w: Tensor) -> Tensor:
    """One number a filter, so shaped that it broadcasts to w."""
    return norms.reshape(-1, *[1] * (w.dim() - 1))


@score("Li, Kadav, Durdanovic, Samet & Graf 2017, Pruning filters for efficient ConvNets", chapter="03", unit="filter", keep=0.5)
def l1_norm_filter_pruning(w, *, p: Norm = 1):
    """Pruning by filter norm.

    s_n = ||w_n||_p, the sum of a filter's absolute weights: small filters make weak feature maps (survey 001, 2.1.2 [40]). The paper's
    filter_sparsity is 1 - ``keep``, its norm_p is ``p``; its greedy strategy is ``prune_in_order`` (``lab.in_order``).
    """
    return w.flatten(1).norm(p, dim=1)


def strongest(w: Tensor, keep: float, p: int) -> Tensor:
    """A mask of w without its floor(n (1 - keep)) filters of smallest norm."""
    norms = w.flatten(1).norm(p, dim=1)
    gone = math.floor(len(norms) * (1 - keep) + 1e-9)  # 10 (1 - 0.9) is a little less than 1
    stays = torch.ones_like(norms, dtype=torch.bool)
    stays[norms.argsort(descending=True, stable=True)[len(norms) - gone :]] = False
    return _each(stays, w).expand_as(w)


def _soft_prune(w, epoch_ends, *, keep, p):
    return torch.where(strongest(w, keep, p), w, 0.0) if epoch_ends else w


@score("He, Kang, Dong, Fu & Yang 2018, Soft filter pruning for accelerating deep convolutional neural networks", chapter="03",
       training=Training(project=_soft_prune), filters=lambda: True,
       exempt={"count": "of the paper's floor(n (1 - keep)) filters, not weights"})  # fmt: skip
def soft_filter_pruning(w, training=False, *, keep: Keep = 0.7, p: Norm = 2, state: State | None = None) -> Masked:
    """Soft filter pruning (SFP).

    After every epoch the floor(n (1 - keep)) filters of smallest ||w_n||_p in each layer are set to zero, and all go on learning: one wrongly zeroed
    grows again (survey 001, 2.1.2 [43]). Outside of training the smallest are masked. The paper's pruning rate P is 1 - ``keep``. Filters come back
    where batch norm follows and plain SGD steps; behind a ReLU a zero filter with no positive shift has no gradient and stays.
    """
    return Masked(w, torch.ones_like(w, dtype=torch.bool) if training else strongest(w, keep, p))


@score("Hu, Peng, Tai & Tang 2016, Network trimming: a data-driven neuron pruning approach towards efficient deep architectures", chapter="03",
       unit="filter", keep=0.7)  # fmt: skip
def network_trimming_apoz(zeros):
    """Network trimming (APoZ).

    s_c = 1 - APoZ_c, APoZ the share of zeros that channel c's map has behind its ReLU, over images and positions (survey 001, 2.1.2 [17]): a channel
    that is nearly always silent says little. The paper's rule, APoZ above mean + one std of the layer, is ``threshold=apoz_threshold(zeros)``.
    """
    return 1 - zeros


def apoz_threshold(zeros: Tensor, stds: float = 1.0) -> float:
    """The score below which channels go where APoZ is above its layer's mean + ``stds`` standard deviations."""
    return 1 - (zeros.mean() + stds * zeros.std(correction=0)).item()


@score("Liu, Li, Shen, Huang, Yan & Zhang 2017, Learning efficient convolutional networks through network slimming", chapter="03",
       unit="filter", keep=0.5, scope="network")  # fmt: skip
def network_slimming(bn_gamma):
    """Network slimming.

    s_c = |gamma_c|, the scale of the batch norm behind channel c, compared across the whole network (survey 001, 2.1.2 [44]). Train with
    ``hooks=[slimming(lam)]`` first, which pulls the scales to zero. Where several batch norms meet in one sum, their mean counts. The paper's
    percentage is 1 - ``keep``; the authors' code removes one channel more.
    """
    return bn_gamma.abs().mean(0)


def scales(model: nn.Module) -> dict[str, Tensor]:
    """The scale of every batch norm, as it learns."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine}
    return {n: latent(m) if parametrize.is_parametrized(m, "weight") else m.weight for n, m in norms.items()}


def slimming(lam: float) -> Hook:
    """Training with lam sum |gamma| over all batch norms: ``fit(model, data, hooks=[slimming(1e-4)])`` adds lam sign(gamma) to their gradients."""

    def pull(model: nn.Module, rule: torch.optim.Optimizer) -> None:
        for gamma in scales(model).values():
            if gamma.grad is not None:
                gamma.grad += lam * gamma.detach().sign()

    return Hook(gradients=pull)


def contributions(next_acts_in: Tensor, next_w: Tensor, seed: int = 0) -> Tensor:
    """x_sc = sum_k X_sck W_ock: what channel c adds to the next layer's output at each sample, there at one output o drawn once; float64."""
    drawn = torch.randint(len(next_w), (len(next_acts_in),), generator=torch.Generator().manual_seed(seed)).to(next_w.device)
    return (next_acts_in.double() * next_w.double()[drawn]).sum(2)


def removal_order(x: Tensor) -> Tensor:
    """The step 0, 1, ... at which each column of x joins the removed set T, which grows by the one that keeps sum_s (sum_T x_sc)^2 least."""
    gram = x.T @ x
    with_removed, left = torch.zeros_like(gram[0]), torch.ones_like(gram[0], dtype=torch.bool)
    step = torch.empty(len(gram), dtype=torch.long, device=x.device)
    for i in range(len(gram)):  # ||r + x_c||^2 = ||r||^2 + 2 r x_c + ||x_c||^2, r the sum of what is removed
        c = (2 * with_removed + gram.diagonal()).masked_fill(~left, torch.inf).argmin()
        step[c], left[c] = i, False
        with_removed += gram[:, c]
    return step


def _rescaled(rows, next_acts_in, next_w, *, rescale):
    """The next layer's weight, each kept channel scaled so that together they give best what all gave: a = argmin ||y - x a||."""
    scale = rows.double()
    if rescale == "on":
        x = contributions(next_acts_in, next_w).cpu()
        scale[rows] = torch.linalg.lstsq(x[:, rows.cpu()], x.sum(1, keepdim=True), driver="gelsd").solution[:, 0].to(scale)
    return next_w * scale[:, None].to(next_w)


@score("Luo, Wu & Lin 2017, ThiNet: a filter level pruning method for deep neural network compression", chapter="03", unit="filter", keep=0.5,
       rebuild=_rescaled)  # fmt: skip
def thinet(next_acts_in, next_w, *, rescale: Switch = "on"):
    """ThiNet.

    A channel is worth what the next layer's output loses with it: the removed set T grows greedily by the channel that keeps sum_s (sum_T x_sc)^2
    least, x_sc what channel c adds at sample s; s_c is the share of channels that are gone when c goes (survey 001, 2.1.2 [49]). ``rescale`` then
    scales what stays in the next layer's weight by least squares. The paper's keep_ratio is ``keep``.
    """
    step = removal_order(contributions(next_acts_in, next_w))
    return (step + 1) / len(step)


def _shrunk(v: Tensor, t: Tensor) -> Tensor:
    return v.sign() * (v.abs() - t).clamp(min=0)


def coordinate_descent(gram: Tensor, target: Tensor, lam: Tensor, sweeps: int, tolerance: float) -> Tensor:
    """argmin b^T G b / 2 - c^T b + lam |b|_1 for every entry of ``lam``, (C, lams): one coordinate after the other, exactly, until none moves."""
    b, diagonal = torch.zeros(len(gram), len(lam)).to(gram), gram.diagonal()
    for _ in range(sweeps):
        before = b.clone()
        for j in (diagonal > 0).nonzero().flatten().tolist():
            rest = target[j] - gram[j] @ b + diagonal[j] * b[j]
            b[j] = _shrunk(rest, lam) / diagonal[j]
        if (b - before).abs().max() <= tolerance * b.abs().max():
            break
    return b


def lasso(z: Tensor, y: Tensor, lam: float) -> Tensor:
    """argmin ||y - Z b||^2 / (2 N) + lam |b|_1, Z (N, C)."""
    return coordinate_descent(z.T @ z / len(z), z.T @ y / len(z), torch.tensor([lam]).to(z), 100_000, 1e-12)[:, 0]


def lasso_problem(next_acts_in: Tensor, next_w: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """G = Z^T Z / N and c = Z^T y / N for z_i = vec(X_i W_i^T), ||W_i||_F = 1.

    ``y`` (N, outputs) is what the next layer should make; by default what it makes, X W^T, which beta_i = ||W_i||_F gives exactly.
    """
    channels, w, x = next_w.shape[1], next_w.double(), next_acts_in.double().flatten(1)
    y = x @ w.flatten(1).T if y is None else y
    w = (w / torch.linalg.vector_norm(w, dim=(0, 2)).clamp(min=torch.finfo(w.dtype).tiny)[:, None]).flatten(1)
    products = (x.T @ x / len(x)) * (w.T @ w)  # <z_i, z_j> = sum_kl (X^T X)_ik,jl (W^T W)_ik,jl
    gram = products.unflatten(0, (channels, -1)).unflatten(2, (channels, -1)).sum((1, 3))
    return gram, ((x.T @ y / len(x)) * w.T).sum(1).unflatten(0, (channels, -1)).sum(1)


def entry_points(gram: Tensor, target: Tensor, points: int = 200, decades: float = 4.0, sweeps: int = 300) -> Tensor:
    """The lambda at which each channel first has a coefficient as lambda falls from where all are zero, (C,); 0 for those that never have one.

    All ``points`` of a logarithmic grid are solved side by side; of channels that come in at the same one, the larger coefficient counts as earlier.
    """
    top = target.abs().max()
    grid = top * torch.logspace(0, -decades, points, dtype=gram.dtype, device=gram.device)
    b = coordinate_descent(gram, target, grid, sweeps, 1e-8).abs()
    inside = b > 1e-9 * b.max()
    first = inside.to(torch.uint8).argmax(1)
    size = b.gather(1, first[:, None])[:, 0]
    gap = grid[(first - 1).clamp(min=0)] - grid[first]
    return torch.where(inside.any(1), grid[first] + gap * size / b.max().clamp(min=torch.finfo(b.dtype).tiny) / 2, 0.0)


RIDGE = 1e-9  # relative to the mean diagonal of X^T X / N


def least_squares(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """argmin ||y - x W||^2 / N, (inputs, outputs), float64; where x leaves W open, a small ridge has it stay as it was, ``w``."""
    return normal_equations(x.T @ x / len(x), x.T @ y / len(x), w)


def normal_equations(gram: Tensor, target: Tensor, w: Tensor) -> Tensor:
    """The W of gram W = target, (inputs, outputs), float64; where the gram matrix leaves it open, a small ridge has it stay near ``w``."""
    ridge = (RIDGE * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), target + ridge * w)


def _refitted(rows, next_acts_in, next_w):
    """The next layer's weight W' on the kept channels that gives Y = X W best."""
    x, w, stays = next_acts_in.double().flatten(1), next_w.double().flatten(1).T, rows.repeat_interleave(next_w.shape[2])
    fitted = torch.zeros_like(w)
    fitted[stays] = least_squares(x[:, stays], x @ w, w[stays])
    return fitted.T.reshape(next_w.shape).to(next_w)


@score("He, Zhang & Sun 2017, Channel pruning for accelerating very deep neural networks", chapter="03", unit="filter", keep=0.5, rebuild=_refitted)
def lasso_channel_pruning(next_acts_in, next_w):
    """Channel pruning by LASSO and least squares (CP).

    min ||Y - sum_i beta_i X_i W_i||^2 / (2 N) + lambda |beta|_1, ||W_i||_F = 1, Y what the next layer gives: s_i is the lambda at which channel i
    comes in as lambda falls (survey 001, 2.1.2 [50]). Least squares then gives the next layer the weight that rebuilds Y best from the channels that
    stay. The paper raises lambda until c' coefficients are left; here that number is ``keep``. ``rebuild_in_order`` (``lab.in_order``) takes a whole
    network layer after layer, as the paper does.
    """
    return entry_points(*lasso_problem(next_acts_in, next_w))


@score("Molchanov, Tyree, Karras, Aila & Kautz 2017, Pruning convolutional neural networks for resource efficient inference", chapter="03",
       unit="filter", keep=0.5, scope="network")  # fmt: skip
def taylor_pruning(flow, *, normalise: Switch = "on"):
    """Taylor expansion pruning.

    s_c = mean over examples of |mean over positions of z dC/dz|: how the cost answers, to first order, when map z of channel c goes (survey 001,
    2.1.2 [53]). ``normalise`` divides a layer's scores by their L2 norm, so that layers can be compared. The paper removes one map at a time and
    trains between: prune a little, ``fit``, and prune again.
    """
    return flow / flow.norm().clamp(min=torch.finfo(flow.dtype).tiny) if normalise == "on" else flow


def survivors(w: Tensor, keep: float, constraint: str) -> Tensor:
    """The mask of ``keep`` of the weights, filters, channels or shapes (columns of the weight matrix) with the largest norms; a filter at least."""
    return select(w.detach().square(), max(keep, 1 / len(w)) if constraint == "filter" else keep, unit=constraint)


def nearest(w: Tensor, keep: float, constraint: str = "weight") -> Tensor:
    """The point nearest to w with ``keep`` of its weights, filters, channels or shapes."""
    return torch.where(survivors(w, keep, constraint), w, 0.0)


def _pull(packed):
    s = packed.state
    return pull(packed.values, s["z"], s["u"], s["rho"])


Growth = Annotated[float, Span(1, 4)]
HIGHEST = 1.0  # rho grows no further


@score("Zhang, Ye, Zhang, Tang, Wen, Fardad & Wang 2018, A systematic DNN weight pruning framework using alternating direction method of multipliers",
       chapter="03", training=Training(penalty=_pull), filters=lambda *, constraint: constraint == "filter")  # fmt: skip
def admm_weight_pruning(
    w, training=False, *, keep: Keep = 0.1, rho: Penalty = 1e-3, growth: Growth = 2.2, every: Steps = 50,
    constraint: Annotated[str, Pick("weight", "filter", "channel", "shape")] = "weight", state: State | None = None,
) -> Masked:  # fmt: skip
    """ADMM weight pruning.

    min L(W) so that W = Z and Z has ``keep`` of its weights: train with rho / 2 ||W - Z + U||^2 added, and ``every`` so many steps Z <- the point
    nearest to W + U, U <- U + W - Z (survey 001, 2.1.2 [55]). Outside of training W is projected, so the mask is exact. Each time rho is multiplied
    by ``growth`` (and U divided by it), up to 1: at the paper's constant rho W stays far from Z. Then retrain what is left.
    """
    state = state or {"z": nearest(w, keep, constraint), "u": torch.zeros_like(w), "rho": rho, "step": 0}
    if not training:
        return Masked(w, survivors(w, keep, constraint), state=state)
    state = {**state, "step": state["step"] + 1}
    if every and state["step"] % every == 0:
        z, u = split(w.detach(), state["z"], state["u"], lambda v: nearest(v, keep, constraint))
        higher = min(state["rho"] * growth, max(HIGHEST, state["rho"]))
        state |= {"z": z, "u": u * (state["rho"] / higher), "rho": higher}
    return Masked(w, torch.ones_like(w, dtype=torch.bool), state=state)
