"""Where a layer's inputs are rounded, and the gradients that come back to it: a site in front of the layer, which ``attach_site`` puts there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import sign_term
from .evidence import patches
from .method import Method, call
from .packed import laid_like
from .rounding import Input, Steps, Straight

AS_THEY_ARE = 32  # bits of inputs and of gradients that are not rounded


def rounds_gradients(method: Method | None, knobs: dict[str, Any]) -> bool:
    """Whether the method, with these knobs, rounds the gradients at the layers' outputs."""
    return method is not None and method.errors is not None and knobs.get("g_bits") != AS_THEY_ARE


class Site(nn.Module):
    """Stands in front of a layer and rounds its inputs (None: leaves them), and the gradients at its outputs where the method does.

    In training a method that follows its inputs is asked again with its state.
    """

    def __init__(self, given: Input | None, method: Method | None = None, knobs: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.knobs = knobs or {}
        self.input = given
        self.method = method if given is not None and method is not None and method.follows else None
        self.errors = partial(call, method.errors, knobs=self.knobs) if rounds_gradients(method, self.knobs) else None
        self.saves = partial(call, method.saves, knobs=self.knobs) if method is not None and method.saves is not None else None
        self.weight_errors = partial(call, method.weight_errors, knobs=self.knobs) if self.errors is not None and method.weight_errors else None
        self.keeping = self.forked = None  # while the layer runs

    @property
    def input(self) -> Input | None:
        """The rounding; its tensors and what the method remembers are buffers, so that they are moved, copied and restored with the model."""
        if self.given is None:
            return None
        held = {n: b for n, b in self.named_buffers(recurse=False)}
        state = {n: held.pop(f"state_{n}", v) for n, v in self.given.state.items()}
        return replace(self.given, **held, state=state)

    @input.setter
    def input(self, given: Input | None) -> None:
        self.given = given
        if given is not None:
            tensors = {f.name: getattr(given, f.name) for f in fields(given)} | {f"state_{n}": v for n, v in given.state.items()}
            for name, value in tensors.items():
                if isinstance(value, Tensor):
                    self.register_buffer(name, value.detach())

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.method is not None:
            self.input = call(self.method.acts, {"x": x.detach(), "training": True}, {**self.knobs, "state": self.input.state})
        given = self.input
        return x if given is None else given(x)


def attach_site(layer: nn.Module, site: Site) -> None:
    """Put ``site`` in front of ``layer``, in place of one that stood there; the layer is changed."""
    detach_site(layer)
    layer.input_site = site.train(layer.training)
    layer.register_forward_pre_hook(_before)
    layer.register_forward_hook(_after, always_call=True)


def detach_site(layer: nn.Module) -> None:
    """Nothing stands in front of the layer any more."""
    if site_of(layer) is not None:
        del layer.input_site
        for hooks, ours in ((layer._forward_pre_hooks, _before), (layer._forward_hooks, _after)):
            for key in [k for k, hook in hooks.items() if hook is ours]:
                del hooks[key]


def site_of(layer: nn.Module) -> Site | None:
    return getattr(layer, "input_site", None)


def input_of(layer: nn.Module) -> Input | None:
    """What the layer's inputs are rounded to; None where they are left."""
    site = site_of(layer)
    return None if site is None else site.input


@contextmanager
def inputs_at(model: nn.Module, inputs: dict[str, Input]) -> Iterator[None]:
    """The layers named in ``inputs`` round what they read, inside the block; they had no site before."""
    layers = {model.get_submodule(n): given for n, given in inputs.items()}
    try:
        for layer, given in layers.items():
            attach_site(layer, Site(given))
        yield
    finally:
        for layer in layers:
            detach_site(layer)


def _before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    site = layer.input_site
    given = site.input
    site.read = inputs[0] if given is not None and (given.spread or given.order) else None
    read = inputs[0] if given is not None and given.order else site(inputs[0])
    if site.weight_errors is not None and site.training and torch.is_grad_enabled():
        site.forked = read, read.detach().requires_grad_(read.requires_grad)
        read = site.forked[1]
    if site.saves is not None and site.training and torch.is_grad_enabled():
        site.keeping = kept_as(read, site.saves)
        site.keeping.__enter__()
    return (read, *inputs[1:])


def _after(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    site = layer.input_site
    if site.keeping is not None:
        site.keeping.__exit__()
        site.keeping = None
    forked, site.forked = site.forked, None
    if out is None:  # the layer failed
        return None
    if site.read is not None:
        bias = 0 if layer.bias is None else layer.bias.reshape(-1, *[1] * (layer.weight.dim() - 2))
        if site.input.order:
            out = bias + laid_like(of_residual_signs(layer, site.read, site.input).reshape(out.shape), out)
        else:
            out = (out - bias) * spread_of(layer, site.read) + bias
        site.read = None
    if forked is not None:
        return Bifurcated.apply(out, *forked, site)
    return Rounded.apply(out, site.errors) if site.errors is not None and site.training and torch.is_grad_enabled() else out


def kept_as(x: Tensor, saves: Callable[[dict[str, Tensor]], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """A context in which the backward pass keeps ``saves`` of x in place of x: outputs and the gradient to x stay, bit for bit."""

    def packed(t: Tensor) -> Tensor:
        return saves({"x": t.detach()}) if t.data_ptr() == x.data_ptr() and t.numel() == x.numel() else t

    return torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t)


def spread_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The mean of |x| over the inputs that each output of the layer sees (XNOR-Net's K): padded zeros count as inputs."""
    if isinstance(layer, nn.Linear):
        return x.detach().abs().mean(-1, keepdim=True)
    size = x.detach().abs().unflatten(1, (layer.groups, -1)).mean(2)
    window = size.new_full((layer.groups, 1, *layer.kernel_size), 1 / math.prod(layer.kernel_size))
    means = F.conv2d(size, window, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return means.repeat_interleave(layer.out_channels // layer.groups, 1) if layer.groups > 1 else means


def of_residual_signs(layer: nn.Module, x: Tensor, given: Steps) -> Tensor:
    """The layer's linear map, each output of the sum of ``order`` signs that stands for what it sees; padded zeros count, and have no sign."""
    seen, real = patches(layer, x), patches(layer, torch.ones_like(x[:1]))
    left, total, slope = seen.detach(), 0.0, 0.0
    for _ in range(given.order):
        size, sign = sign_term(left, 2)
        total, slope, left = total + size * sign * real, slope + size * given.derivative(left), left - size * sign * real
    out = layer.weight.reshape(1, seen.shape[1], -1, seen.shape[2]) @ Straight.apply(seen, total, slope)
    return out.transpose(2, 3) if isinstance(layer, nn.Linear) else out


class Rounded(torch.autograd.Function):
    """The identity, whose backward pass rounds the gradient."""

    @staticmethod
    def forward(ctx, x, rounding):
        ctx.rounding = rounding
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.rounding({"g": g}), None


class Bifurcated(torch.autograd.Function):
    """The identity in ``out``, worked out from ``copy``, x cut off from what made it; in the backward pass the gradient forks.

    What goes on to x comes of the rounded gradient, what the layer's parameters get of the other copy.
    """

    @staticmethod
    def forward(ctx, out, x, copy, site):
        ctx.save_for_backward(out)
        ctx.copy, ctx.site = copy, site
        return out.view_as(out)

    @staticmethod
    def backward(ctx, g):
        (out,) = ctx.saved_tensors
        rounded = ctx.site.errors({"g": g})
        down = torch.autograd.grad(out, ctx.copy, rounded, retain_graph=True)[0] if ctx.needs_input_grad[1] else None
        return ctx.site.weight_errors({"g": g, "rounded": rounded}), down, None, None
