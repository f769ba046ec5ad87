"""What stands between a layer and its weight: a packed value, attached as a torch parametrization.

``attach_plan`` puts a plan's packed values into a model, ``plan_of`` reads them off again; ``with_plain_weights`` is a copy with nothing attached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .channels import LAYERS
from .codes import SparseCodes
from .method import Method, call, evidence_of
from .packed import Masked, Packed, State, laid_like
from .perforate import attach_places, detach_places, places_of
from .rounding import INPUTS
from .sites import Site, attach_site, detach_site, input_of, inputs_at, rounds_gradients
from .wrapped import around, within

Plan = dict[str, Packed]


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and dense layer by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}


class Attached(nn.Module):
    """What stands between a layer's latent weight and the weight that it computes with (a torch parametrization).

    A frozen packed value is held as it is. A method that learns is asked again on every training forward with its state: what it gives as
    nn.Parameter learns with the weights, other tensors are buffers, the rest plain numbers. Where the layer was pruned before a quantizer came, the
    method sees the weights that stay, as one vector.
    """

    def __init__(self, packed: Packed, method: Method | None = None, knobs: dict[str, Any] | None = None) -> None:
        super().__init__()
        nothing_left = method is not None and method.kind == "quantizer" and isinstance(packed, Masked)
        self.method = method if method is not None and method.learns and not nothing_left else None
        self.knobs = knobs or {}
        self.vectors = packed.vectors
        self.fixed = packed if self.method is None else None
        self.pruned = packed.mask if self.method is not None and isinstance(packed, SparseCodes) else None
        self.rest: State = {}
        for name, value in (packed.state if self.method else {}).items():
            self._hold(name, value)

    def _hold(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        elif isinstance(value, Tensor):
            self.register_buffer(name, value.detach().clone())
        else:
            self.rest[name] = value

    def _apply(self, fn: Callable, recurse: bool = True) -> Attached:
        """Move or convert what is held beside the buffers, as they are."""
        self.fixed = None if self.fixed is None else moved(self.fixed, fn)
        self.pruned = None if self.pruned is None else fn(self.pruned)
        return super()._apply(fn, recurse)

    def content(self) -> State:
        return {**self.rest, **dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}

    @property
    def normed(self) -> bool:
        """Whether batch norm stands right behind the layer."""
        return any(name.endswith(".weight") for name, _ in self.vectors)

    def gain(self, state: State, training: bool) -> Tensor | None:
        """What the method multiplies each channel with, (out,) or (1,); None where it does not."""
        if self.method is None or self.method.training.gain is None:
            return None
        return call(self.method.training.gain, {**state, "training": training}, self.knobs)

    def packed(self, w: Tensor, training: bool = False) -> Packed:
        """The packed value that stands for latent weight ``w`` now."""
        if self.method is None:
            return self.fixed.at(w)
        given = {**dict.fromkeys(evidence_of(self.method.fn)), "w": w if self.pruned is None else w[self.pruned], "training": training}
        learned = call(self.method.fn, given, {**self.knobs, "state": self.content()})
        if self.pruned is not None:
            learned = SparseCodes(w, self.pruned, learned, state=learned.state)
        gain = None if self.normed else self.gain(learned.state, training)
        if gain is not None:
            learned = learned.at(learned.values * gain.reshape(-1, *[1] * (w.dim() - 1)))
        return replace(learned, vectors=self.vectors) if self.vectors else learned

    def forward(self, w: Tensor) -> Tensor:
        packed = self.packed(w, self.training)
        if self.method is not None and self.training:
            self.remember(packed.state)
        return laid_like(packed.through(packed.values), w)

    def remember(self, state: State) -> None:
        held = {**self._parameters, **self._buffers}
        for name, value in state.items():
            if isinstance(value, Tensor) and name in held and value is not held[name]:
                held[name].detach().copy_(value.detach())
            elif not isinstance(value, Tensor):
                self.rest[name] = value


def moved(packed: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A packed value with ``fn`` done to every tensor in it."""
    if isinstance(packed, Tensor):
        return fn(packed)
    if isinstance(packed, tuple):
        return tuple(moved(p, fn) for p in packed)
    inside = (Packed, *INPUTS.values())
    return replace(packed, **{f.name: moved(getattr(packed, f.name), fn) for f in fields(packed)}) if isinstance(packed, inside) else packed


def attached(model: nn.Module) -> Iterator[tuple[str, nn.Module, Attached]]:
    """(name, layer, what is attached to it) for every compressed layer."""
    for name, layer in weighted(model).items():
        if parametrize.is_parametrized(layer, "weight"):
            for p in layer.parametrizations.weight:
                if isinstance(p, Attached):
                    yield name, layer, p


def latent(layer: nn.Module) -> Tensor:
    """The float weight behind what is attached."""
    return layer.parametrizations.weight.original


def plan_of(model: nn.Module) -> Plan:
    """What is attached to a model now: {layer: packed}, detached and frozen; empty for a model that was never compressed."""
    with torch.no_grad():
        return {name: _around(a.packed(latent(layer)).frozen(), layer) for name, layer, a in attached(model)}


def _around(packed: Packed, layer: nn.Module) -> Packed:
    """The packed value with what stands around it in its layer."""
    given = None if hasattr(packed, "input") else input_of(layer)
    return around(packed, given and given.frozen(), None if hasattr(packed, "computed") else places_of(layer))


def attach(layer: nn.Module, packed: Packed, method: Method | None = None, knobs: dict[str, Any] | None = None) -> None:
    """Put ``packed`` between a layer and its weight, in place of whatever stood there, and what stands around it; the layer is changed."""
    detach(layer)
    detach_site(layer)
    detach_places(layer)
    given = getattr(packed, "input", None)
    if given is not None or rounds_gradients(method, knobs or {}) or (method is not None and method.saves is not None):
        attach_site(layer, Site(given, method, knobs))
    if hasattr(packed, "computed"):
        attach_places(layer, packed.computed)
    packed = within(packed)
    between = Attached(packed, method, knobs).to(layer.weight.device)
    between.training = layer.training
    if between.method is None or (between.method.training.project and isinstance(packed, Masked)):  # others learn from the weight as it is
        with torch.no_grad():
            layer.weight.copy_(packed.values.to(layer.weight))
    parametrize.register_parametrization(layer, "weight", between, unsafe=True)
    if between.method is not None and between.method.training.variance is not None:
        layer.register_forward_hook(local_reparametrization)


def attach_plan(model: nn.Module, plan: Plan, method: Method | None = None, knobs: dict[str, Any] | None = None) -> nn.Module:
    """Attach every packed value of ``plan`` to its layer, and to the vectors that go with its rows; the model itself, changed."""
    layers = {name: model.get_submodule(name) for name in plan}
    for _, owner, parameter in held(model):
        if any(isinstance(p, Held) and p.of[0] in layers.values() for p in owner.parametrizations[parameter]):
            owner.parametrizations[parameter].original.data.copy_(with_gains(owner, parameter))  # what was learned stays
    for name, packed in plan.items():
        attach(layers[name], packed, method, knobs)
        for vector, start in packed.vectors:
            owner, _, parameter = vector.rpartition(".")
            _hold(model.get_submodule(owner), parameter, Held(layers[name], start, owner == name))
    return model


class Held(nn.Module):
    """Holds a bias or a batch norm's parameter at zero where the filters that it belongs to are gone (a torch parametrization).

    While a method still learns which filters go, the vector is left alone in training, but for the method's gain, so that a filter can come back.
    """

    def __init__(self, layer: nn.Module, start: int, own: bool) -> None:
        super().__init__()
        self.of, self.start, self.own = (layer,), start, own  # in a tuple: the layer is not a part of this module

    @property
    def between(self) -> Attached:
        return next(p for p in self.of[0].parametrizations.weight if isinstance(p, Attached))

    def with_gain(self, v: Tensor, training: bool) -> Tensor:
        """The vector times what the method multiplies the channels with; the layer's own bias only where no batch norm follows."""
        gain = None if self.own and self.between.normed else self.between.gain(self.between.content(), training)
        if gain is None:
            return v
        count = len(latent(self.of[0]))
        return v * F.pad(gain.expand(count), (self.start, len(v) - self.start - count), value=1.0)

    def forward(self, v: Tensor) -> Tensor:
        v, between = self.with_gain(v, self.training), self.between
        if between.method is not None and self.training:
            return v
        with torch.no_grad():
            rows = between.packed(latent(self.of[0])).rows
        stays = torch.ones_like(v, dtype=torch.bool)
        stays[self.start : self.start + len(rows)] = rows
        return torch.where(stays, v, 0.0)


def _hold(owner: nn.Module, parameter: str, held: Held) -> None:
    there = owner.parametrizations[parameter] if parametrize.is_parametrized(owner, parameter) else ()
    if not any(isinstance(p, Held) and p.of[0] is held.of[0] for p in there):
        parametrize.register_parametrization(owner, parameter, held.train(owner.training))


def detach(layer: nn.Module) -> None:
    """Make the weight that the layer computes with its plain parameter again."""
    _plain(layer, "weight")
    for key in [k for k, hook in layer._forward_hooks.items() if hook is local_reparametrization]:
        del layer._forward_hooks[key]


def _plain(owner: nn.Module, parameter: str) -> None:
    if parametrize.is_parametrized(owner, parameter):
        owner.parametrizations.eval()
        cls = type(owner)  # torch takes the parameter off the class, which a deep copy shares with its original
        owner.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(owner, parameter, leave_parametrized=True)


@contextmanager
def surrounded(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Layers of a plain ``model`` round what they read, and leave out places of their output, as ``plan`` says, inside the block."""
    places = {model.get_submodule(n): p.computed for n, p in plan.items() if hasattr(p, "computed")}
    try:
        for layer, computed in places.items():
            attach_places(layer, computed)
        with inputs_at(model, {n: p.input for n, p in plan.items() if hasattr(p, "input")}):
            yield
    finally:
        for layer in places:
            detach_places(layer)


def substituted(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Every parameter of a plain ``model`` that ``plan`` changes, by name, as the compressed network computes with it."""
    with torch.no_grad():
        found = {f"{name}.weight": packed.dense() for name, packed in plan.items()}
        for packed in plan.values():
            for name, start in packed.vectors:
                v = found.get(name, model.get_parameter(name)).clone()
                v[start : start + len(packed.rows)] *= packed.rows.to(v)
                found[name] = v
    return found


def held(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(module's name, the module, the parameter's name) of every vector that is held with the filters of some layer."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for parameter, chain in module.parametrizations.items():
                if any(isinstance(p, Held) for p in chain):
                    yield name, module, parameter


def with_gains(owner: nn.Module, parameter: str) -> Tensor:
    """A held vector times what methods that still learn multiply its channels with."""
    chain = owner.parametrizations[parameter]
    with torch.no_grad():
        return functools.reduce(lambda v, p: p.with_gain(v, False) if isinstance(p, Held) else v, chain, chain.original)


def with_plain_weights(model: nn.Module) -> nn.Module:
    """A copy with plain weights: the same outputs, nothing attached, nothing left to work out on a forward pass but the rounding of inputs."""
    copy = deepcopy(model).eval()
    for _, owner, parameter in list(held(copy)):  # first: what they hold follows the layers' masks
        _plain(owner, parameter)
    for _, layer, _ in list(attached(copy)):
        given = input_of(layer)
        detach(layer)
        detach_site(layer)
        if given is not None:
            attach_site(layer, Site(given.frozen()))
    return copy


def with_latent_weights(model: nn.Module) -> nn.Module:
    """A copy with nothing attached, whose weights are the float ones that methods learned behind what they made of them."""
    copy = deepcopy(model)
    for _, owner, parameter in list(held(copy)):
        _plain(owner, parameter)
    for _, layer, _ in list(attached(copy)):
        w = latent(layer).detach().clone()
        detach(layer)
        detach_site(layer)
        with torch.no_grad():
            layer.weight.copy_(w)
    return copy


def local_reparametrization(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Noise on the pre-activations instead of the weights, one draw an output: variance = conv(x^2, var w) (Kingma et al. 2015)."""
    between = next(a for a in layer.parametrizations.weight if isinstance(a, Attached))
    if not between.training:
        return out
    var = between.method.training.variance(between.packed(latent(layer)))
    var = var if between.pruned is None else torch.zeros_like(latent(layer)).masked_scatter(between.pruned, var)
    variance = apply_weight(layer, inputs[0].square(), var)
    return out + torch.where(variance > 0, variance.clamp(min=1e-12).sqrt(), 0.0) * torch.randn_like(out)


def apply_weight(layer: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """The layer's linear map with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, w)
    return layer._conv_forward(x, w, None)
