"""Chapter 03, pruning structures: a learned factor a channel.

Survey 001, section 2.1.2; survey 003. What a channel says is multiplied by a number of its own, behind batch norm where there is one
(``Training.gain``), or batch norm's scale is that number; a penalty or noise brings it to zero, and the channel goes.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.apply import weighted, with_plain_weights
from ..core.channels import all_groups, example_of, groups
from ..core.evidence import acts_in, macs
from ..core.knobs import Penalty, Pick, Span
from ..core.method import Training, score
from ..core.packed import Masked, State
from ..core.training import Hook
from .prune import soft_threshold
from .structures import _each, network_slimming, scales

Cut, Momentum = Annotated[float, Span(0, 0.1)], Annotated[float, Span(0, 0.99)]


def accelerated_step(z: Tensor, before: Tensor, velocity: Tensor, t: float, mu: float) -> tuple[Tensor, Tensor]:
    """(scale, velocity) after APG's step: v = S_t(z) - before + mu v, scale = S_t(z) + mu v; z is what the gradient step gave."""
    soft = soft_threshold(z, t)
    velocity = soft - before + mu * velocity
    return soft + mu * velocity, velocity


def _accelerated(w, lr, scale, before, velocity, *, gamma, mu):
    scale, velocity = accelerated_step(scale, before, velocity, lr * gamma, mu)
    return Masked(w, torch.ones_like(w, dtype=torch.bool), state={"scale": scale, "before": scale, "velocity": velocity})


def _stands(scale: Tensor, w: Tensor, training: bool) -> Tensor:
    """A mask of w without what has scale zero; while it trains all stay, so that they can come back."""
    return (_each(scale.expand(len(w)), w) != 0).expand_as(w) | training


@score("Huang & Wang 2018, Data-driven sparse structure selection for deep neural networks", chapter="03",
       training=Training(project=_accelerated, gain=lambda scale: scale), filters=lambda: True)  # fmt: skip
def sparse_structure_selection(
    w, training=False, *, gamma: Penalty = 1e-3, structure: Annotated[str, Pick("channel", "block")] = "channel", mu: Momentum = 0.9,
    state: State | None = None,
) -> Masked:  # fmt: skip
    """Sparse structure selection (SSS).

    Each structure's output times a scale l, learned with gamma |l|_1 by accelerated proximal gradient: z = l - lr grad, v <- S_(lr gamma)(z) - l + mu
    v, l <- S_(lr gamma)(z) + mu v (survey 001, 2.1.2 [45]). What reaches zero goes. A structure is a channel, or a block: one scale for all that a
    layer says, safe only where a shortcut leads around it, so ``where="*conv2"`` in residual blocks. The scale acts behind batch norm. Train with
    plain SGD, of which z is the step; the paper's groups of a grouped convolution are left out, since their channels cannot go singly.
    """
    if state is None:
        ones = torch.ones(len(w) if structure == "channel" else 1, dtype=w.dtype, device=w.device)
        state = {"scale": nn.Parameter(ones), "before": ones.clone(), "velocity": torch.zeros_like(ones)}
    return Masked(w, _stands(state["scale"].detach(), w, training), state=state)


def _signal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """mu^2 / sigma^2 of each channel's factor."""
    return mean.square() / log_variance.exp()


def _information(packed, *, gamma):
    return gamma * torch.log1p(_signal(packed.state["mean"], packed.state["log_variance"])).sum()


def _drawn(mean, log_variance, noise, training):
    return mean + (log_variance / 2).exp() * noise if training else mean


Noise, Ratio = Annotated[float, Span(0.01, 1, log=True)], Annotated[float, Span(0, 10)]


@score("Dai, Zhu, Guo & Wipf 2018, Compressing neural networks using the variational information bottleneck", chapter="03",
       training=Training(penalty=_information, gain=_drawn), filters=lambda: True)  # fmt: skip
def vibnet(
    w, training=False, *, gamma: Penalty = 1e-3, threshold: Ratio = 1.0, sigma: Noise = 0.1, state: State | None = None
) -> Masked:  # fmt: skip
    """VIBNet: variational information bottleneck.

    Each channel times z ~ N(mu, sigma^2), both learned, with gamma sum log(1 + mu^2 / sigma^2) added to the loss: a bound on what a layer tells of
    the one before (survey 001, 2.1.2 [47]). Where mu^2 / sigma^2 falls below ``threshold`` (1 in the authors' code) the channel is noise and goes;
    outside of training z = mu. ``sigma`` is where the noise starts; the paper's gamma_i of layer i is a plan of its own, with ``where``. Here one z
    is drawn a batch, not an example, and it acts behind batch norm, before the activation.
    """
    if state is None:
        one = torch.ones(len(w), dtype=w.dtype, device=w.device)
        state = {"mean": nn.Parameter(one), "log_variance": nn.Parameter(2 * math.log(sigma) * one), "noise": torch.zeros_like(one)}
    if training:
        state = {**state, "noise": torch.randn_like(state["noise"])}
    stays = _signal(state["mean"], state["log_variance"]).detach() >= threshold
    return Masked(w, _each(stays, w).expand_as(w) | training, state=state)


def _l1_of_masks(packed, *, lam, solver):
    return lam * packed.state["m"].abs().sum() if solver == "subgradient" else 0.0


def _masks_step(w, lr, m, *, lam, solver):
    m = soft_threshold(m, lr * lam) if solver == "proximal" else m
    return Masked(w, torch.ones_like(w, dtype=torch.bool), state={"m": m})


@score("Yang, Yang, Khattak, Yang, Zhang, Gao & Wang 2019, Structured pruning of convolutional neural networks via L1 regularization", chapter="03",
       training=Training(penalty=_l1_of_masks, project=_masks_step, gain=lambda m: m), filters=lambda: True)  # fmt: skip
def l1_mask_structured_pruning(
    w,
    training=False,
    *,
    lam: Penalty = 1e-3,
    threshold: Cut = 1e-4,
    solver: Annotated[str, Pick("proximal", "subgradient")] = "subgradient",
    state: State | None = None,
) -> Masked:
    """Pruning by L1-regularized masks.

    Every filter j has a number m_j that multiplies it, learned with lam |m|_1; where the mean of |m_j W_j| is not above ``threshold`` it goes, and
    elsewhere m_j goes into W_j (survey 003). m_j alone says little, since (c m_j, W_j / c) is the same filter. It multiplies the bias too, and
    where batch norm follows its scale and shift instead, which the weight's scale would not pass. From the abstract: whether the paper trains m and W
    together or by turns is uncertain; here together. ``proximal`` takes ISTA's step for m, which reaches exact zeros.
    """
    state = state or {"m": nn.Parameter(torch.ones(len(w), dtype=w.dtype, device=w.device))}
    size = (_each(state["m"], w) * w).detach().abs().flatten(1).mean(1)
    return Masked(w, _each(size > threshold, w).expand_as(w) | training, state=state)


@score("Ye, Lu, Lin & Wang 2018, Rethinking the smaller-norm-less-informative assumption in channel pruning of convolution layers", chapter="03",
       unit="filter", keep=0.5, scope="network")  # fmt: skip
def ista_channel_pruning(bn_gamma):
    """Channel pruning by ISTA on batch norm's scale.

    s_c = |gamma_c|; what counts is how gamma got there (survey 001, 2.1.2 [46]). Train with ``hooks=[ista(rho, channel_costs(net))]``, whose proximal
    steps bring scales to exactly zero, after ``rescaled(net, alpha)``, which lets them get there sooner. A channel of scale zero always says
    relu(beta): ``absorbed(net)`` puts that into the next layer, and ``threshold=1e-12`` then removes just these. The paper's mu is the learning rate.
    """
    return network_slimming(bn_gamma)


def ista(rho: float, costs: dict[str, float] | None = None) -> Hook:
    """After each step gamma <- S_(lr rho cost)(gamma) for every batch norm; its cost is that in ``costs``, 1 where none are given."""

    def shrink(model: nn.Module, rule: torch.optim.Optimizer) -> None:
        for name, gamma in scales(model).items():
            cost = 1.0 if costs is None else costs.get(name, 0.0)
            gamma.data.copy_(soft_threshold(gamma.detach(), rule.param_groups[0]["lr"] * rho * cost))

    return Hook(after=shrink)


def channel_costs(model: nn.Module, data: object = None) -> dict[str, float]:
    """lambda of each batch norm: the weights that make a channel, those that read it, and its map's size, over the size of the image."""
    plain = with_plain_weights(model)
    x = example_of(plain, data)
    layers = weighted(plain)
    positions = {n: m.flatten()[0].item() for n, m in macs(plain, layers, x, None, None).items()}
    found = {}
    for group in groups(plain, x):
        made = sum(layers[n].weight[0].numel() + positions[n] for n in group.makers)
        read = sum(layers[n].weight[:, places[0]].numel() for n, places in group.readers.items())
        found |= dict.fromkeys(group.norms, (made + read) / x[0, 0].numel())
    return found


def rescaled(model: nn.Module, alpha: float, data: object = None) -> nn.Module:
    """A copy with the same outputs (behind a ReLU, alpha > 0): batch norms' scales and shifts times alpha, the next layers' weights over alpha."""
    copy = with_plain_weights(model).train(model.training)
    with torch.no_grad():
        for group in groups(copy, example_of(copy, data)):
            if len(group.norms) == len(group.makers):
                for name, start in group.vectors:
                    if name.rpartition(".")[0] in group.norms:
                        copy.get_parameter(name)[start : start + group.count] *= alpha
                for name, places in group.readers.items():
                    copy.get_submodule(name).weight[:, places.flatten()] /= alpha
    return copy


def absorbed(model: nn.Module, data: object = None) -> nn.Module:
    """A copy whose channels of scale 0 say 0: what they said, relu(beta), goes off the mean of the next layer's batch norm, or into its bias.

    The outputs stay where the next layer pads nothing; a padded border read zeros there.
    """
    copy = with_plain_weights(model)
    x = example_of(copy, data)
    behind = {n: v for g in all_groups(copy, x) for n, own in g.own.items() for v in own if v[0].endswith(".weight")}
    for group in groups(copy, x):
        norms = [copy.get_parameter(n)[start : start + group.count] for n, start in group.vectors if n.rpartition(".")[0] in group.norms]
        gone = torch.stack(norms[::2]).eq(0).all(0) if norms else torch.zeros(group.count, dtype=torch.bool)
        readers = {n: copy.get_submodule(n) for n in group.readers} if gone.any() else {}
        for name, read in acts_in(copy, readers, x, None, None).items():
            inputs, layer = group.readers[name][gone].flatten(), readers[name]
            more = layer.weight[:, inputs].flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight[:, inputs]
            more = (more @ read[0, inputs].flatten(1)[:, 0] if read.dim() > 2 else more @ read[0, inputs]).detach()
            if name in behind:
                norm, start = behind[name]
                copy.get_submodule(norm.removesuffix(".weight")).running_mean[start : start + len(more)] -= more
            elif layer.bias is not None:
                layer.bias.data += more
            else:
                layer.bias = nn.Parameter(more)
        for v in norms:
            v.data[gone] = 0
    return copy
