"""Chapter 04, quantization: training draws weights to levels.

By splitting, by chances for each level, by noise, by clusters that are rounded one after another. Leaves give the codes of a weight, and in training
what stands in for them. Of a pruned layer the weight is the vector of what is left. (Survey sections are of the 2020 survey, 001.)
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.clusters import Line
from ..core.codes import Codes, nearest_level
from ..core.knobs import Pick, Span, Switch, Weight
from ..core.method import Training, quantizer
from ..core.packed import Masked, Packed, State
from ..core.splitting import pull, split
from .grids import partly
from .prune import LogVariance, kl_log_uniform, log_alpha

CODE_SETS = {"{+-1}": (-1, 1), "{0,+-1}": (-1, 0, 1), "{0,+-1,+-2}": (-2, -1, 0, 1, 2), "{0,+-1,+-2,+-4}": (-4, -2, -1, 0, 1, 2, 4)}


def floats(w: Tensor, state: State) -> Masked:
    """A weight that training sees as it is."""
    return Masked(w, torch.ones_like(w, dtype=torch.bool), "dense", state=state)


def scaled_set(v: Tensor, levels: Tensor, passes: int = 20) -> tuple[Tensor, Tensor]:
    """The alpha and q of small |v - alpha q|^2, q among ``levels``: each in turn the best for the other, from alpha = mean |v| on. (alpha, index)"""
    alpha, index = v.abs().mean(), torch.zeros_like(v, dtype=torch.long)
    for _ in range(passes if alpha > 0 else 0):
        last, index = index, nearest_level(v.reshape(1, -1) / alpha, levels[None]).reshape(v.shape)
        q = levels[index]
        alpha = (v * q).sum() / q.square().sum()
        if torch.equal(index, last):
            break
    return alpha, index


def nearest_scaled(v: Tensor, levels: Tensor) -> Tensor:
    """The alpha q that ``scaled_set`` finds for v."""
    alpha, index = scaled_set(v, levels)
    return alpha * levels[index]


def latent_of(packed: Packed) -> Tensor:
    """The float weights behind a packed value; of a pruned layer, those that are left."""
    return getattr(packed, "codes", packed).values


WINDOW = 0.375  # reach of a spike's pull in units of a: the paper's 0.075 for a = 0.2


def kl_spikes(w: Tensor, log_sigma2: Tensor, spikes: Tensor, tau: Tensor | float) -> Tensor:
    """KL of each weight's N(w, sigma^2) to a prior with spikes at 0 and at ``spikes``, up to a constant: near each, the log-uniform prior's about it.

    sum_c Omega(w - c) F(w - c) + (1 - sum_c Omega(w - c)) F(w) over the spikes c but 0, Omega(x) = exp(-x^2 / (2 tau^2)), F of ``kl_log_uniform``.
    """
    off = w - spikes.reshape(-1, *[1] * w.dim())
    pull = torch.exp(-(off / tau).square() / 2)
    return (pull * kl_log_uniform(log_alpha(off, log_sigma2))).sum(0) + (1 - pull.sum(0)) * kl_log_uniform(log_alpha(w, log_sigma2))


def _kl(packed, examples, *, kl_weight):
    s, a = packed.state, packed.state["a"]
    return kl_weight / examples * kl_spikes(latent_of(packed), s["log_sigma2"], torch.stack([-a, a]), WINDOW * a).sum()


@quantizer("Achterhold, Koehler, Schmeink & Genewein 2018, Variational network quantization", chapter="04",
           exempt={"idempotent": "the levels start at the size of the float weights, and rounding changes it"},
           training=Training(penalty=_kl, variance=lambda packed: packed.state["log_sigma2"].exp()))  # fmt: skip
def variational_network_quantization(
    w, training=False, *, codebook_a: Annotated[float, Span(0.25, 4)] = 1.2, log_alpha_prune_threshold: Annotated[float, Span(0, 5)] = 2.0,
    kl_weight: Weight = 1.0, log_sigma2: LogVariance = -10.0, state: State | None = None,
):  # fmt: skip
    """Variational network quantization (VNQ).

    Each weight is noisy, w + sigma eps, with its own learned sigma; KL / N draws it to -a, 0 or a, where it may be noisier, a learned too. Afterwards
    it becomes the nearest of the three, and 0 where log(sigma^2 / w^2) reaches ``log_alpha_prune_threshold`` (survey 001, 2.2.2 [69]). With one spike
    at 0 it is ``sparse_variational_dropout``. The noise is sampled at the pre-activations. The windows that put the three parts of the KL together
    are our reading of the paper. a starts at ``codebook_a`` root mean squares of the layer's weights; the paper's 0.2 is for its own networks.
    """
    if state is None:
        size = w.detach().square().mean().sqrt()
        state = {"a": nn.Parameter(codebook_a * torch.where(size > 0, size, 1)), "log_sigma2": nn.Parameter(torch.full_like(w, log_sigma2))}
    if training:
        return floats(w, state)
    a = state["a"].abs()
    noise = log_alpha(w, state["log_sigma2"]) >= log_alpha_prune_threshold
    index = 1 + (w.sign() * ((w.abs() > a / 2) & ~noise)).long()
    return Codes(w, index.reshape(1, -1), a.reshape(1, 1), 3, straight=False, state=state)


def _distance(packed, *, rho):
    return pull(latent_of(packed), packed.state["g"], packed.state["u"], rho)


@quantizer("Leng, Dou, Li, Zhu & Jin 2018, Extremely low bit neural network: squeeze the last bit out with ADMM",
           chapter="04", training=Training(penalty=_distance),
           exempt={"idempotent": "what alternation finds depends on where it starts, the mean magnitude"})  # fmt: skip
def admm_low_bit(
    w, training=False, *, code_set: Annotated[str, Pick(*CODE_SETS)] = "{0,+-1}", rho: Annotated[float, Span(1e-5, 1, log=True)] = 1e-3,
    steps_per_iteration: Annotated[int, Span(1, 1000, log=True, integer=True)] = 50, state: State | None = None,
):  # fmt: skip
    """Extremely low bits by ADMM.

    min L(w) with w = alpha q, q among a few powers of two, is split: w is float and has (rho / 2) |w - g + u|^2 added to its loss; after every
    ``steps_per_iteration`` steps g becomes the alpha q near w + u, alpha and q each in turn the best for the other, and u grows by w - g
    (survey 001, 2.2.5 [89]). Training sees w, evaluation g. The paper takes each step with an extragradient, a second gradient at the point
    that the first leads to; here the optimizer is any.
    """
    levels = torch.tensor(CODE_SETS[code_set]).to(w)
    state = state or {"g": nearest_scaled(w.detach(), levels), "u": torch.zeros_like(w), "steps": 0}
    if training:
        state = {**state, "steps": state["steps"] + 1}
        if state["steps"] % steps_per_iteration == 0:
            state["g"], state["u"] = split(w.detach(), state["g"], state["u"], lambda v: nearest_scaled(v, levels))
        return floats(w, state)
    alpha, index = scaled_set(w.detach() + state["u"], levels)
    return Codes(w, index.reshape(1, -1), (alpha * levels)[None], len(levels), "table", state=state)


LEAST = 0.05  # of the chances to start with


def _chances(state: State) -> tuple[Tensor, Tensor]:
    """(that a weight is not 0, that it is then positive)."""
    a = state.get("a")
    return torch.ones_like(state["b"]) if a is None else torch.sigmoid(-a), torch.sigmoid(state["b"])


def moments(state: State) -> tuple[Tensor, Tensor]:
    """Mean and variance of each weight under its chances: E w = scale p (2 q - 1), E w^2 = scale^2 p."""
    some, plus = _chances(state)
    mean = some * (2 * plus - 1)
    return state["scale"] * mean, state["scale"] ** 2 * (some - mean.square())


def _decay(packed, *, prob_decay):
    return prob_decay * sum(packed.state[n].square().sum() for n in ("a", "b") if n in packed.state)


@quantizer("Shayer, Levi & Fetaya 2018, Learning discrete weights using the local reparameterization trick", chapter="04",
           exempt={"idempotent": "the scale is that of the float weights, and rounding changes it"},
           training=Training(penalty=_decay, variance=lambda packed: moments(packed.state)[1]))  # fmt: skip
def lr_net(
    w, training=False, *, levels: Annotated[str, Pick("binary", "ternary")] = "ternary", prob_decay: Annotated[float, Span(0, 0.01)] = 1e-11,
    state: State | None = None,
):  # fmt: skip
    """LR-net: discrete weights by local reparameterization.

    Each weight has learned chances: of 0, sigmoid(a), and if not, of +1, sigmoid(b). In training a layer's outputs are drawn as normal variables of
    the mean and variance that they have under these, so that a and b have true gradients without a straight-through line; in evaluation a
    weight is its likeliest value (survey 001, 2.2.5 [94]). The start has the float weight as its mean, in units of the root mean square, where
    the chances allow: 0.95 - 0.9 |w| for 0, all within 0.05 and 0.95. Draw batch norm's statistics anew with the discrete weights.
    """
    if state is None:
        scale = w.detach().square().mean().sqrt()
        unit = w.detach() / torch.where(scale > 0, scale, 1)
        none = (1 - LEAST - (1 - 2 * LEAST) * unit.abs()).clamp(LEAST, 1 - LEAST) if levels == "ternary" else torch.zeros_like(w)
        plus = ((1 + unit / (1 - none)) / 2).clamp(LEAST, 1 - LEAST)
        state = {"scale": scale, "b": nn.Parameter(plus.logit())} | ({"a": nn.Parameter(none.logit())} if levels == "ternary" else {})
    if training:
        return floats(moments(state)[0], state)
    some, plus = _chances(state)
    chances = torch.stack([some * (1 - plus), 1 - some, some * plus])
    if levels == "binary":
        return Codes(w, (plus >= 0.5).long().reshape(1, -1), 2 * state["scale"].reshape(1, 1), 2, straight=False, state=state)
    return Codes(w, chances.argmax(0).reshape(1, -1), state["scale"].reshape(1, 1), 3, straight=False, state=state)


def chances_of_levels(x: Tensor, step: Tensor, sigma: Tensor, count: int) -> Tensor:
    """The chance of each of the ``count`` levels step (i - count / 2) when x has logistic noise of ``sigma`` and is rounded, among these only."""
    edges = step * (torch.arange(count + 1).to(x) - count / 2 - 0.5)
    mass = torch.sigmoid((edges - x[..., None]) / sigma).diff(dim=-1)
    return mass / mass.sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def concrete(chances: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """A Gumbel-softmax draw: softmax((log chances + noise) / temperature), which turns to one level as the temperature falls."""
    return F.softmax((chances.clamp(min=torch.finfo(chances.dtype).tiny).log() + noise) / temperature, -1)


@quantizer("Louizos, Reisser, Blankevoort, Gavves & Welling 2019, Relaxed quantization for discretized neural networks", chapter="04")
def relaxed_quantization(
    w, training=False, *, bits: Annotated[int, Span(2, 6, integer=True)] = 4, temperature_lambda: Annotated[float, Span(0.1, 2)] = 1.0,
    sigma_init_fraction_of_step: Annotated[float, Span(0.05, 1)] = 1 / 3, hard_forward: Switch = "off", state: State | None = None,
):  # fmt: skip
    """Relaxed quantization (RQ).

    In training a weight with logistic noise of sigma falls on level g_i = step i with the chance F(g_i + step / 2) - F(g_i - step / 2), made to add
    up to 1; a Gumbel-softmax draw z of these gives sum_i z_i g_i, whose gradient is true for the weight, the step and sigma, all learned;
    ``hard_forward`` takes the likeliest of the draw. In evaluation it is the nearest level (survey 001, 2.2.5 [95]). The draw here is over all
    levels, hence at most 6 bits; the paper's is over those near the weight.
    """
    count = 1 << bits
    if state is None:
        most = w.detach().abs().max()
        step = torch.where(most > 0, most, 1) / (count / 2 - 1)
        state = {"step": nn.Parameter(step.log()), "sigma": nn.Parameter((sigma_init_fraction_of_step * step).log())}
    step, sigma = state["step"].exp(), state["sigma"].exp()
    levels = step * (torch.arange(count).to(w) - count / 2)
    if training:
        chances = chances_of_levels(w, step, sigma, count)
        z = concrete(chances, temperature_lambda, -torch.empty_like(chances).exponential_().log())
        if hard_forward == "on":
            z = F.one_hot(z.argmax(-1), count).to(z) + z - z.detach()
        return floats(z @ levels, state)
    return Codes(
        w, nearest_level(w.detach().reshape(1, -1), levels.detach()[None]), torch.stack([step, step * 0 + count / 2])[None], count, state=state
    )


ORDERS = ("large_loss_first", "small_loss_first", "random")


@quantizer("Xu, Wang, Zhou, Lin & Xiong 2018, Deep neural network compression with single and multiple level quantization",
           chapter="04", exempt={"trains": "with a portion of 1 every cluster is rounded at once, and stays"})  # fmt: skip
def slq(
    w, *, bits: Annotated[int, Span(2, 8, integer=True)] = 5, portion: Weight = 1.0, partition_order: Annotated[str, Pick(*ORDERS)] = ORDERS[0],
    state: State | None = None,
):  # fmt: skip
    """Single-level network quantization (SLQ).

    The weights are clustered by k-means; a ``portion`` of the 2^bits clusters, those of the largest error first, become their centroids and stay so,
    the others are float and learn to make up for it. The portion is turned up in stages with training between (``cmlib.lab.stages``), and what is
    left is clustered anew each time (survey 001, 2.2.3 [73], which has the order). At once it is ``vq_gong``'s scalar codebook.
    """
    flat, k = w.detach().flatten(), 1 << bits
    if state is None:
        nothing = torch.zeros_like(flat, dtype=torch.bool)
        state = {"levels": flat.new_zeros(1, k), "index": torch.full_like(flat, k - 1, dtype=torch.long), "frozen": nothing, "done": 0}
    done, frozen = state["done"], state["frozen"]
    due = round(portion * k) - done
    if due > 0 and not frozen.all():
        rest = flat[~frozen]
        centroids, own = (torch.from_numpy(t).to(w.device) for t in Line(rest.cpu()).cluster(k - done))
        loss = torch.bincount(own, (rest - centroids[own]).square(), k - done)
        chance = torch.randperm(k - done, generator=torch.Generator().manual_seed(0)).to(loss)
        first = {"large_loss_first": -loss, "small_loss_first": loss, "random": chance}[partition_order].argsort(stable=True)[:due]
        levels, number = state["levels"].clone(), torch.full_like(loss, k - 1, dtype=torch.long)
        levels[0, done : done + due], number[first] = centroids[first].to(w), torch.arange(done, done + due, device=w.device)
        taken = torch.isin(own, first)
        index, stays = state["index"].masked_scatter(~frozen, number[own]), frozen.masked_scatter(~frozen, taken)
        state = {"levels": levels, "index": index, "frozen": stays, "done": done + due}
    codes = Codes(w, state["index"][None], state["levels"], k, "table", straight=False)  # the last level is 0 until all are taken
    return partly(codes, state)
