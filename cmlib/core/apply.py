"""From a method to a model: which layers are covered, the plan that all verbs share, and what stands between a layer and its weight.

``Planner`` works out evidence, scores and rankings once and answers every knob from them: the slider's engine, and what ``plan`` and
``compress`` use. ``attach`` puts a packed value between a layer and its weight; ``with_plain_weights`` is a copy with nothing attached.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .channel_evidence import CHANNEL_PROVIDERS, into_reader, reader_of
from .channels import Structure, Vectors, example_of
from .evidence import PROVIDERS as LAYER_PROVIDERS
from .evidence import Evidence, Loss
from .inputs import as_input, device_of, sample
from .knobs import nearest
from .method import Method, call
from .packed import Masked, Packed, State, laid_like
from .select import Masks, Ranking, is_n_of_m, rank, to_units, to_weights

COVERED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Plan = dict[str, Packed]
PROVIDERS = LAYER_PROVIDERS | CHANNEL_PROVIDERS


def weighted(model: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and dense layer by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, COVERED)}


def covered(model: nn.Module, where: str = "*") -> dict[str, nn.Module]:
    """The layers that ``where`` names: patterns of layer names or types, separated by commas; ``!`` leaves out.

    ``"conv*"``, ``"Linear"``, ``"*, !first, !last"`` (first and last weighted layer). ValueError where a pattern matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be a torch.nn.Module; got {type(model).__name__} {str(model)[:40]!r}: load_net(name, data) gives one of the kit's"
        )
    if not isinstance(where, str):
        raise TypeError(f"where={where!r} must be one text, patterns of layer names or types separated by commas, such as 'conv*, !first'")
    layers = weighted(model)
    if not layers:
        raise ValueError("the model has no convolution or dense layer to compress")
    names = list(layers)
    ends = {"first": names[0], "last": names[-1]}

    def matches(pattern: str) -> list[str]:
        found = [n for n in names if fnmatch.fnmatchcase(n, ends.get(pattern, pattern)) or type_name(layers[n]) == pattern]
        if not found:
            raise ValueError(f"where={where!r}: {pattern!r} matches no layer{nearest(pattern, names)}; the layers are {', '.join(names)}")
        return found

    patterns = [p.strip() for p in where.split(",") if p.strip()]
    wanted = {n for p in patterns if not p.startswith("!") for n in matches(p)}
    if not any(not p.startswith("!") for p in patterns):
        wanted = set(names)
    wanted -= {n for p in patterns if p.startswith("!") for n in matches(p[1:])}
    if not wanted:
        raise ValueError(f"where={where!r} leaves no layer; the layers are {', '.join(names)}")
    return {n: m for n, m in layers.items() if n in wanted}


def type_name(layer: nn.Module) -> str:
    """The layer's class name as it was before anything was attached."""
    return parametrize.type_before_parametrizations(layer).__name__


class Planner:
    """One model, one method, and everything that does not change while knobs move: evidence, scores, the order of the units.

    ``data`` is a data set of load_data or a pair (images, labels); methods that ask for evidence need it. ``samples`` training images serve for
    evidence. The model is not changed.
    """

    def __init__(self, model: nn.Module, method: Method, *, where: str = "*", data: Any = None, loss: Loss = F.cross_entropy, samples: int = 512):
        self.model, self.method, self.layers, self.data = model, method, covered(model, where), data
        self.previous = plan_of(model)
        self.weights = self._dense(self.layers)
        _check_finite(self.weights)
        self._given = {n: {"w": self.weights[n], "training": False} for n in self.layers}
        for name in (a for a in method.asks if a not in ("w", "training")):
            found = gather(model, self.layers, name, data, loss, samples, method.key)
            self.layers = {n: m for n, m in self.layers.items() if n in found}  # evidence of channels is not of every layer
            self._given = {n: {**self._given[n], name: found[n]} for n in self.layers}
        self._scores: tuple[Any, Masks] | None = None
        self._ranking: tuple[Any, Ranking] | None = None

    @cached_property
    def structure(self) -> Structure:
        """The channels of the covered layers, for filters that go whole."""
        return Structure(with_plain_weights(self.model), example_of(self.model, self.data), self.layers)

    def __call__(self, **knobs: Any) -> Plan:
        """The plan {layer: packed} for these knobs. ValueError for a knob that is misspelt or out of range."""
        knobs = self.method.bind(knobs)
        if not self.method.selects:
            return self._own(knobs)
        if knobs["threshold"] is not None and is_n_of_m(knobs["unit"]):
            raise ValueError(f"threshold={knobs['threshold']} does not go with unit={knobs['unit']!r}, which fixes how many of each group stay")
        ranking = self.ranking(**knobs)
        if knobs["unit"] == "filter":
            return self._filters(ranking, knobs)
        masks = self._still_gone(ranking.at(knobs["keep"]) if knobs["threshold"] is None else ranking.above(knobs["threshold"]))
        return {n: self._masked(n, self._values(n, masks, knobs), m, knobs) for n, m in masks.items()}

    def _masked(self, name: str, values: Tensor, mask: Tensor, knobs: dict[str, Any], vectors: Vectors = ()) -> Masked:
        """The packed value; vectors that an earlier plan holds at zero stay held."""
        return Masked(values, mask, knobs["storage"], vectors=vectors or (self.previous[name].vectors if name in self.previous else ()))

    def ranking(self, **knobs: Any) -> Ranking:
        """The units in order (scores only)."""
        own = {n: knobs[n] for n in self.method.own_knobs}
        if self._scores is None or self._scores[0] != own:
            self._scores, self._ranking = (own, self._score(own)), None
        key = knobs["unit"], knobs["scope"]
        if self._ranking is None or self._ranking[0] != key:
            shapes = {n: self.weights[n].shape for n in self.layers}
            scores = self._still_last(self._scores[1], shapes, knobs["unit"])
            if knobs["unit"] == "filter":
                scores = self.structure.tied({n: to_units(s, "filter", shapes[n]) for n, s in scores.items()})
                shapes = {n: s.shape for n, s in scores.items()}
            self._ranking = key, rank(scores, *key, shapes)
        return self._ranking[1]

    def _own(self, knobs: dict[str, Any]) -> Plan:
        """The plan of a method that makes its masks itself."""
        if not self.previous.keys().isdisjoint(self.layers):
            raise ValueError(f"{self.method.key} learns its own mask and would forget what was removed before; give it with_plain_weights(model)")
        made = {n: call(self.method.fn, g, {**knobs, "state": None}) for n, g in self._given.items()}
        if self.method.filters is None or not call(self.method.filters, {}, knobs):
            return made
        own = {n: vectors for g in self.structure.groups for n, vectors in g.own.items()}
        return {n: replace(p, vectors=own[n]) for n, p in made.items() if n in own}

    def _filters(self, ranking: Ranking, knobs: dict[str, Any]) -> Plan:
        """Filters with all that belongs to their channels, in every layer that is tied to a covered one; the network's outputs stay."""
        kept = ranking.at(knobs["keep"]) if knobs["threshold"] is None else ranking.above(knobs["threshold"])
        found = self.structure.spread(kept, ranking.scores)
        weights = self._dense({n: self.model.get_submodule(n) for n in found if n not in self.weights}) | self.weights
        masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in self.weights.items()}
        masks = self._still_gone(masks | {n: to_weights(rows, "filter", weights[n].shape) for n, (rows, _) in found.items()})
        values = weights if self.method.repair is None else weights | self._repair(masks, knobs)
        plan = {n: self._masked(n, values[n], m, knobs, found[n][1] if n in found else ()) for n, m in masks.items()}
        return plan if self.method.rebuild is None else self._rebuilt(plan, knobs)

    def _rebuilt(self, plan: Plan, knobs: dict[str, Any]) -> Plan:
        """The plan with the next layers' weights rebuilt for the channels that stay."""
        for group in self.structure.groups:
            reader, places = reader_of(group, self.model)
            if reader not in plan:
                w = self._dense({reader: self.model.get_submodule(reader)})[reader]
                plan[reader] = self.previous.get(reader) or Masked(w, torch.ones_like(w, dtype=torch.bool))
            given = {**self._given[group.first], "rows": plan[group.first].rows}
            plan[reader] = replace(plan[reader], values=into_reader(plan[reader].values, places, call(self.method.rebuild, given, knobs)))
        return plan

    def _dense(self, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
        return {n: self.previous[n].dense() if n in self.previous else layer.weight.detach() for n, layer in layers.items()}

    def _still_gone(self, masks: Masks) -> Masks:
        return {n: m & self.previous[n].mask if n in self.previous else m for n, m in masks.items()}

    def _still_last(self, scores: Evidence, shapes: dict[str, torch.Size], unit: str) -> Evidence:
        """What an earlier plan removed counts for nothing, so it goes first (and stays away)."""
        least = -torch.inf if unit == "weight" else 0.0

        def last(s: Tensor, before: Packed, shape: torch.Size) -> Tensor:
            if unit in ("row", "filter") and s.numel() == shape[0]:  # one number a filter already: it is not to be summed
                return s.masked_fill(~before.rows.reshape(s.shape), -torch.inf)
            return s.expand(shape).masked_fill(~before.mask, least)

        return {n: last(s, self.previous[n], shapes[n]) if n in self.previous else s for n, s in scores.items()}

    def _values(self, name: str, masks: Masks, knobs: dict[str, Any]) -> Tensor:
        """The weights that stay: as they are, or rewritten by the method's repair."""
        if self.method.repair is None:
            return self.weights[name]
        if self._repaired is None or self._repaired[0] is not masks:
            self._repaired = masks, self._repair(masks, knobs)
        return self._repaired[1][name]

    _repaired: tuple[Masks, dict[str, Tensor]] | None = None

    def _repair(self, masks: Masks, knobs: dict[str, Any]) -> dict[str, Tensor]:
        if not self.method.joint:
            return {n: call(self.method.repair, {**g, "mask": masks[n]}, knobs) for n, g in self._given.items()}
        given = _end_to_end(self._given)
        flat = call(self.method.repair, {**given, "mask": torch.cat([masks[n].flatten() for n in self._given])}, knobs)
        return _apart(flat, self.weights)

    def _score(self, own: dict[str, Any]) -> Evidence:
        scores = self._scored(own)
        for name, s in scores.items():
            if torch.broadcast_shapes(s.shape, self.weights[name].shape) != self.weights[name].shape:
                raise RuntimeError(
                    f"{self.method.key}: a score of shape {list(s.shape)} does not broadcast to a weight of {list(self.weights[name].shape)}"
                )
            if s.isnan().any():
                raise ValueError(f"{self.method.key} scores {int(s.isnan().sum()):,} weights of layer {name} as NaN, which no order can rank")
        return scores

    def _scored(self, own: dict[str, Any]) -> Evidence:
        if self.method.joint:
            return _apart(call(self.method.fn, _end_to_end(self._given), own), self.weights)
        return {n: _column(call(self.method.fn, g, own), self.weights[n]) for n, g in self._given.items()}


def gather(
    model: nn.Module, layers: dict[str, nn.Module], name: str, data: Any, loss: Loss = F.cross_entropy, samples: int = 512, owner: str = "this"
) -> Evidence:
    """The evidence ``name`` for ``layers`` from a fixed stratified sample of the training part, the model in evaluation mode."""
    if name not in PROVIDERS:
        raise ValueError(
            f"{owner} asks for {name!r}, which nothing provides{nearest(name, PROVIDERS)}; there are w, training, {', '.join(PROVIDERS)}"
        )
    if data is None:
        raise ValueError(f"{owner} asks for {name}, which needs data: pass data=load_data(...) or a pair (images, labels)")
    if samples < 1:
        raise ValueError(f"samples={samples}: {name} is gathered on at least one image")
    x, y = (t.to(device_of(model)) for t in sample(data, samples))
    modes, fixed = [(m, m.training) for m in model.modules()], [p for p in model.parameters() if not p.requires_grad]
    try:
        for p in fixed:  # frozen weights have gradients and curvature too
            p.requires_grad_(True)
        with parametrize.cached():  # an attached layer's weight is one tensor, the same for the forward pass and its gradient
            found = PROVIDERS[name](model.eval(), layers, as_input(x, model), y, loss)
    finally:
        for p in fixed:
            p.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
    if name in CHANNEL_PROVIDERS and not found:
        raise ValueError(f"{owner} asks for {name} ({PROVIDERS[name].__doc__.splitlines()[0]}), which none of {', '.join(layers)} has; see where=...")
    if name not in CHANNEL_PROVIDERS and (idle := [n for n in layers if n not in found]):
        raise ValueError(f"layer {idle[0]} takes no part in the output, so it has no {name}; leave it out with where=...")
    return {n: v.detach() for n, v in found.items()}


def _column(s: Tensor, w: Tensor) -> Tensor:
    """A score of one number a filter as a column beside its weight; any other as it is."""
    return s.reshape(-1, *[1] * (w.dim() - 1)) if s.dim() == 1 and len(s) == len(w) else s


def _end_to_end(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The layers' evidence as if they were one long vector of weights (after whatever leads the weight's own axes)."""
    layers = list(given.values())

    def joined(name: str) -> Any:
        parts = [(g[name], g["w"].dim()) for g in layers]
        return torch.cat([p.flatten(p.dim() - d) for p, d in parts], dim=-1) if isinstance(parts[0][0], Tensor) else parts[0][0]

    return {name: joined(name) for name in layers[0]}


def _apart(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: part.reshape(w.shape) for (n, w), part in zip(like.items(), flat.split([w.numel() for w in like.values()]), strict=True)}


def _check_finite(weights: dict[str, Tensor]) -> None:
    for name, w in weights.items():
        bad = int((~torch.isfinite(w)).sum())
        if bad:
            raise ValueError(f"layer {name} has {bad:,} weights that are NaN or infinite; load or train the model again before compressing it")


class Attached(nn.Module):
    """What stands between a layer's latent weight and the weight that it computes with (a torch parametrization).

    A frozen packed value holds its tensors as buffers. A method that learns is asked again on every training forward with its state:
    what it gives as nn.Parameter learns with the weights, other tensors are buffers, the rest plain numbers.
    """

    def __init__(self, packed: Packed, method: Method | None = None, knobs: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.method = method if method is not None and method.learns else None
        self.knobs = knobs or {}
        self.kind, self.vectors = type(packed), packed.vectors
        self.rest: State = {}
        content = packed.state if self.method else {f.name: getattr(packed, f.name) for f in fields(packed) if f.name != "values"}
        for name, value in content.items():
            self._hold(name, value)

    def _hold(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        elif isinstance(value, Tensor):
            self.register_buffer(name, value.detach().clone())
        else:
            self.rest[name] = value

    def content(self) -> State:
        return {**self.rest, **dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}

    def packed(self, w: Tensor, training: bool = False) -> Packed:
        """The packed value that stands for latent weight ``w`` now."""
        if self.method is None:
            return self.kind(values=w, **self.content())
        learned = call(self.method.fn, {"w": w, "training": training}, {**self.knobs, "state": self.content()})
        return replace(learned, vectors=self.vectors) if self.vectors else learned

    def forward(self, w: Tensor) -> Tensor:
        packed = self.packed(w, self.training)
        if self.method is not None and self.training:
            self._remember(packed.state)
        return laid_like(packed.through(packed.values), w)

    def _remember(self, state: State) -> None:
        for name, value in state.items():
            if isinstance(value, Tensor) and name in self._buffers:
                getattr(self, name).copy_(value.detach())
            elif not isinstance(value, Tensor):
                self.rest[name] = value


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
        return {name: a.packed(latent(layer)).frozen() for name, layer, a in attached(model)}


def attach(layer: nn.Module, packed: Packed, method: Method | None = None, knobs: dict[str, Any] | None = None) -> None:
    """Put ``packed`` between a layer and its weight, in place of whatever stood there; the layer is changed."""
    detach(layer)
    between = Attached(packed, method, knobs).to(layer.weight.device)
    between.training = layer.training
    if between.method is None:  # a method that learns works its values out of the layer's own weight, again and again
        with torch.no_grad():
            layer.weight.copy_(packed.values.to(layer.weight))
    parametrize.register_parametrization(layer, "weight", between, unsafe=True)
    if between.method is not None and between.method.training.variance is not None:
        layer.register_forward_hook(local_reparametrization)


def attach_plan(model: nn.Module, plan: Plan, method: Method | None = None, knobs: dict[str, Any] | None = None) -> nn.Module:
    """Attach every packed value of ``plan`` to its layer, and to the vectors that go with its rows; the model itself, changed."""
    for name, packed in plan.items():
        layer = model.get_submodule(name)
        attach(layer, packed, method, knobs)
        for vector, start in packed.vectors:
            owner, _, parameter = vector.rpartition(".")
            _hold(model.get_submodule(owner), parameter, Held(layer, start))
    return model


class Held(nn.Module):
    """Holds a bias or a batch norm's parameter at zero where the filters that it belongs to are gone (a torch parametrization).

    While a method still learns which filters go, the vector is left alone in training, so that a filter can come back.
    """

    def __init__(self, layer: nn.Module, start: int) -> None:
        super().__init__()
        self.of, self.start = (layer,), start  # in a tuple: the layer is not a part of this module

    def forward(self, v: Tensor) -> Tensor:
        layer = self.of[0]
        between = next(p for p in layer.parametrizations.weight if isinstance(p, Attached))
        if between.method is not None and self.training:
            return v
        with torch.no_grad():
            rows = between.packed(latent(layer)).rows
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


def with_plain_weights(model: nn.Module) -> nn.Module:
    """A copy with plain weights: the same outputs, nothing attached, nothing left to work out on a forward pass."""
    copy = deepcopy(model).eval()
    for _, owner, parameter in list(held(copy)):  # first: what they hold follows the layers' masks
        _plain(owner, parameter)
    for _, layer, _ in list(attached(copy)):
        detach(layer)
    return copy


def local_reparametrization(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Noise on the pre-activations instead of the weights, one draw an output: variance = conv(x^2, var w) (Kingma et al. 2015)."""
    between = next(a for a in layer.parametrizations.weight if isinstance(a, Attached))
    if not between.training:
        return out
    variance = apply_weight(layer, inputs[0].square(), between.method.training.variance(between.packed(latent(layer))))
    return out + variance.clamp(min=1e-12).sqrt() * torch.randn_like(out)


def apply_weight(layer: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """The layer's linear map with another weight and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, w)
    return layer._conv_forward(x, w, None)


@dataclass(frozen=True)
class Hook:
    """What happens around an optimizer step; each part takes (model, optimizer)."""

    before: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None
    gradients: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None
    after: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda model, rule: None


def attached_hooks(model: nn.Module, epoch: int = 1) -> list[Hook]:
    """The projections that attached methods ask for after each step, ``epoch`` of which make an epoch."""
    steps, layers = itertools.count(1), [(layer, a) for _, layer, a in attached(model) if a.method is not None and a.method.training.project]

    def project(_: nn.Module, rule: torch.optim.Optimizer) -> None:
        available = {"lr": rule.param_groups[0]["lr"], "epoch_ends": next(steps) % epoch == 0}
        with torch.no_grad():
            for layer, a in layers:
                w = latent(layer)
                w.copy_(call(a.method.training.project, {"w": w, **available}, a.knobs))

    return [Hook(after=project)] if layers else []


def penalty(model: nn.Module, examples: int, progress: float) -> Tensor | float:
    """The sum of what attached methods add to the task's mean loss. It is not another training forward: nothing is drawn or counted twice."""
    available = {"examples": examples, "progress": progress}
    terms = [
        call(a.method.training.penalty, {**available, "packed": a.packed(latent(layer))}, a.knobs)
        for _, layer, a in attached(model)
        if a.method is not None and a.method.training.penalty
    ]
    return sum(terms)
