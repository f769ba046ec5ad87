"""From a method to a plan: which layers are covered, and what each one's weight becomes.

``Planner`` works out evidence, scores and rankings once and answers every knob from them: the slider's engine, and what ``plan`` and
``compress`` use.
"""

from __future__ import annotations

import fnmatch
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .apply import Plan, plan_of, weighted, with_plain_weights
from .channel_evidence import CHANNEL_PROVIDERS, WITHOUT_DATA, into_reader, reader_of
from .channels import Structure, Vectors, example_of, refusal
from .codes import SparseCodes
from .evidence import OF_INPUTS, OF_WEIGHTS, Evidence, Loss, in_evaluation
from .evidence import PROVIDERS as LAYER_PROVIDERS
from .inputs import as_input, device_of, dtype_of, sample
from .knobs import nearest
from .method import Method, apart, call, end_to_end
from .packed import Masked, Packed
from .select import Masks, Ranking, is_n_of_m, rank, to_units, to_weights
from .sites import AS_THEY_ARE
from .wrapped import around

PROVIDERS = LAYER_PROVIDERS | CHANNEL_PROVIDERS
INPUT_IMAGES = 128  # whose activations set the ranges of rounded inputs


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
        if method.no_plan:
            raise ValueError(method.no_plan)
        self.model, self.method, self.layers, self.data, self.loss = model, method, covered(model, where), data, loss
        self.previous = {n: p.in_weights() for n, p in plan_of(model).items()}
        self.weights = self._dense(self.layers)
        _check_numbers(self.weights)
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
        if self.method.kind == "quantizer":
            return {n: self._at_places(n, self._with_input(n, p, knobs)) for n, p in self._quantized(knobs).items()}
        plan = self._selected(knobs) if self.method.selects else self._own(knobs)
        return {n: self._at_places(n, self._as_before(n, p)) for n, p in plan.items()}

    def _selected(self, knobs: dict[str, Any]) -> Plan:
        """The plan of a method that gives scores."""
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
        if self.method.joint:
            whole = call(self.method.fn, end_to_end(self._given), {**knobs, "state": None})
            made = apart(whole, {n: self.weights[n] for n in self._given})
        else:
            made = {n: call(self.method.fn, g, {**knobs, "state": None}) for n, g in self._given.items()}
        if self.method.filters is None or not call(self.method.filters, {}, knobs):
            return made
        own = {n: vectors for g in self.structure.groups for n, vectors in g.own.items()}
        return {n: replace(p, vectors=own[n]) for n, p in made.items() if n in own}

    def _quantized(self, knobs: dict[str, Any]) -> Plan:
        """Codes for every covered layer; of one that was pruned before, for the weights that are left."""
        plan: Plan = {}
        for name, given in self._told(knobs).items():
            before = self.previous.get(name)
            if before is None or before.kept == self.weights[name].numel():
                plan[name] = call(self.method.fn, given, {**knobs, "state": None})
            elif before.kept == 0:
                plan[name] = before
            else:
                left = {n: None if n in OF_INPUTS else _of_what_stays(v, before.mask) for n, v in given.items()}
                codes = call(self.method.fn, left, {**knobs, "state": None})
                plan[name] = (
                    before if isinstance(codes, Masked) else SparseCodes(given["w"], before.mask, codes, state=codes.state, vectors=before.vectors)
                )
        return plan

    def _told(self, knobs: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The layers' evidence, with what the method works out for all of them jointly."""
        if self.method.jointly is None:
            return self._given
        found = apart(call(self.method.jointly, end_to_end(self._given), knobs), self.weights)
        return {n: {**given, self.method.jointly.__name__: found[n]} for n, given in self._given.items()}

    def _as_before(self, name: str, packed: Packed) -> Packed:
        """The packed value with the rounding of inputs that the layer had before."""
        given = getattr(self.previous.get(name), "input", None)
        return around(packed, given)

    def _at_places(self, name: str, packed: Packed) -> Packed:
        """The packed value with the places of its output that the layer worked out before, where the method gives none."""
        return packed if hasattr(packed, "computed") else around(packed, computed=getattr(self.previous.get(name), "computed", None))

    def _with_input(self, name: str, packed: Packed, knobs: dict[str, Any]) -> Packed:
        """The packed value with the rounding of its layer's inputs. The first layer reads the image, whose 8 bits are left as they are."""
        if self.method.acts is None or name == next(iter(weighted(self.model))):
            return self._as_before(name, packed)
        if knobs.get("a_bits") == AS_THEY_ARE:
            return packed
        given = call(self.method.acts, {"x": self.inputs.get(name), "training": False}, {**knobs, "state": None})
        return around(packed, given)

    @cached_property
    def inputs(self) -> Evidence:
        """What each covered layer reads, of a few training images; empty where the method does not ask for it."""
        if not self.method.reads_inputs:
            return {}
        if self.data is None:
            raise ValueError(f"{self.method.key} reads off data what inputs are rounded to: pass data=load_data(...) or a pair (images, labels), "
                             "or a_bits=32, which leaves inputs as they are")  # fmt: skip
        return gather(self.model, self.layers, "arriving", self.data, self.loss, INPUT_IMAGES, self.method.key)

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
        given = end_to_end(self._given)
        flat = call(self.method.repair, {**given, "mask": torch.cat([masks[n].flatten() for n in self._given])}, knobs)
        return apart(flat, self.weights)

    def _score(self, own: dict[str, Any]) -> Evidence:
        scores = self._scored(own)
        for name, s in scores.items():
            shape = self.weights[name].shape
            if s.dim() > len(shape) or any(n not in (1, m) for n, m in zip(reversed(s.shape), reversed(shape), strict=False)):
                raise RuntimeError(f"{self.method.key}: a score of shape {list(s.shape)} does not broadcast to a weight of {list(shape)}")
            if s.isnan().any():
                raise ValueError(f"{self.method.key} scores {int(s.isnan().sum()):,} weights of layer {name} as NaN, which no order can rank")
        return scores

    def _scored(self, own: dict[str, Any]) -> Evidence:
        if self.method.joint:
            return apart(call(self.method.fn, end_to_end(self._given), own), self.weights)
        return {n: _column(call(self.method.fn, g, own), self.weights[n]) for n, g in self._given.items()}


def gather(
    model: nn.Module, layers: dict[str, nn.Module], name: str, data: Any, loss: Loss = F.cross_entropy, samples: int = 512, owner: str = "this"
) -> Evidence:
    """The evidence ``name`` for ``layers`` from a fixed stratified sample of the training part, the model in evaluation mode.

    What only asks how the network is built needs no data where the network says what images it takes.
    """
    if name not in PROVIDERS:
        raise ValueError(
            f"{owner} asks for {name!r}, which nothing provides{nearest(name, PROVIDERS)}; there are w, training, {', '.join(PROVIDERS)}"
        )
    if data is None and name not in WITHOUT_DATA:
        raise ValueError(f"{owner} asks for {name}, which needs data: pass data=load_data(...) or a pair (images, labels)")
    if samples < 1:
        raise ValueError(f"samples={samples}: {name} is gathered on at least one image")
    model = with_plain_weights(model) if name in OF_WEIGHTS else model
    if dtype_of(model) == torch.float16:  # whose sums run over, and whose squared gradients are 0
        model = deepcopy(model).float()
    layers = {n: model.get_submodule(n) for n in layers}
    pair = (example_of(model), torch.zeros(1, dtype=torch.int64)) if data is None else sample(data, samples)
    x, y = (t.to(device_of(model)) for t in pair)
    x = as_input(x, model).to(dtype_of(model))
    fixed = [p for p in model.parameters() if not p.requires_grad]
    try:
        for p in fixed:  # frozen weights have gradients and curvature too
            p.requires_grad_(True)
        with in_evaluation(model), parametrize.cached():  # an attached weight is one tensor, the same for the forward pass and its gradient
            found = PROVIDERS[name](model, layers, x, y, loss)
    except (RuntimeError, IndexError) as error:
        said = refusal(model, x[:1]) or f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{owner} asks for {name}, which cannot be worked out of this network and this data: {said}") from error
    finally:
        for p in fixed:
            p.requires_grad_(False)
    if name in CHANNEL_PROVIDERS and not found:
        raise ValueError(f"{owner} asks for {name} ({PROVIDERS[name].__doc__.splitlines()[0]}), which none of {', '.join(layers)} has; see where=...")
    if name not in CHANNEL_PROVIDERS and (idle := [n for n in layers if n not in found]):
        raise ValueError(f"layer {idle[0]} takes no part in the output, so it has no {name}; leave it out with where=...")
    for n, v in found.items():
        if isinstance(v, Tensor) and not torch.isfinite(v).all():
            raise ValueError(f"{owner} asks for {name}, which is NaN or infinite in layer {n} for this data")
    return {n: v.detach() if isinstance(v, Tensor) else v for n, v in found.items()}


def _of_what_stays(value: Any, mask: Tensor) -> Any:
    """Evidence of the weights that stay, as one vector; None where it is not one of single weights."""
    if not isinstance(value, Tensor):
        return value
    return value[..., mask] if value.shape[value.dim() - mask.dim() :] == mask.shape else None


def _column(s: Tensor, w: Tensor) -> Tensor:
    """A score of one number a filter as a column beside its weight; any other as it is."""
    return s.reshape(-1, *[1] * (w.dim() - 1)) if s.dim() == 1 and len(s) == len(w) else s


def _check_numbers(weights: dict[str, Tensor]) -> None:
    for name, w in weights.items():
        if w.is_meta:
            raise ValueError(f"layer {name} is on the meta device and has no numbers; load the model's weights before compressing it")
        if w.dtype not in (torch.float16, torch.float32, torch.float64):
            raise ValueError(f"layer {name} is {w.dtype}, which no file here holds; give model.float() or model.half()")
        bad = int((~torch.isfinite(w)).sum())
        if bad:
            raise ValueError(f"layer {name} has {bad:,} weights that are NaN or infinite; load or train the model again before compressing it")
