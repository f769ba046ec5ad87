"""Evidence of channels that can go: their batch norms, their maps behind the activation, and what the next layer makes of them.

Providers as in ``evidence``; each answers, with an entry a channel, for those covered layers whose channels can go (``channels.groups``) and that
have what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .apply import with_plain_weights
from .channels import LAYERS, Group, all_groups, groups
from .evidence import CHUNK, Evidence, Layers, Loss, _watched, at_places, patches

RELUS = {F.relu, F.relu6, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.hardtanh, F.hardtanh_}


def bn_gamma(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Scales of the batch norms behind each channel, (norms, channels)."""
    found = {name: _scales(model, group) for name, group in _groups(model, layers, x)}
    return {name: torch.stack(scales) for name, scales in found.items() if scales}


def _scales(model: nn.Module, group: Group) -> list[Tensor]:
    norms = {model.get_submodule(n): start for n, start in group.norms.items()}
    return [norm.weight[start : start + group.count] for norm, start in norms.items() if norm.affine]


def gamma_in(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """|scale| of the batch norm in front of each input channel (the mean of several), so that it broadcasts to ``w``; 1 where there is none."""
    inputs = {n: torch.ones(m.weight.shape[1] * getattr(m, "groups", 1)).to(m.weight) for n, m in layers.items()}
    for group in all_groups(model, x[:1]):
        if scales := _scales(model, group):
            for name in group.readers.keys() & layers.keys():
                inputs[name][group.readers[name]] = torch.stack(scales).detach().abs().mean(0)[:, None]
    return {n: _beside(g, layers[n]) for n, g in inputs.items()}


def _beside(channels: Tensor, layer: nn.Module) -> Tensor:
    """A number an input channel, so shaped that it broadcasts to the layer's weight, whose outputs see the channels of their own group only."""
    rows = channels.reshape(getattr(layer, "groups", 1), -1)
    rows = rows.repeat_interleave(len(layer.weight) // len(rows), 0)
    return rows.reshape(*rows.shape, *[1] * (layer.weight.dim() - 2))


def filter_rows(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Each filter's weights and its bias, (channels, weights + 1), the batch norm behind it folded in: what its map is made of."""
    found = {}
    for name, group in _groups(model, layers, x):
        layer, norms = layers[name], [(model.get_submodule(n), start) for n, start in group.norms.items()]
        bias = torch.zeros_like(layer.weight[:, 0].flatten(1)[:, :1]) if layer.bias is None else layer.bias[:, None]
        rows = torch.cat([layer.weight.flatten(1), bias], 1)
        if len(group.makers) == len(norms) == 1:
            norm, own = norms[0][0], slice(norms[0][1], norms[0][1] + group.count)
            scale = (norm.running_var[own] + norm.eps).rsqrt() * (norm.weight[own] if norm.affine else 1)
            rows[:, -1] -= norm.running_mean[own]
            rows = rows * scale[:, None]
            rows[:, -1] += norm.bias[own] if norm.affine else 0
        found[name] = rows
    return found


def zeros(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """Share of zeros of each channel behind its ReLU, over images and positions, (channels,); an exact ratio of counts."""
    count: dict[str, Tensor] = {}
    seen: dict[str, int] = {}
    with torch.no_grad():
        for xs in x.split(CHUNK):
            for name, maps in _maps(model, layers, xs).items():
                for a in maps.relu:
                    count[name] = count.get(name, 0) + (a == 0).transpose(0, 1).flatten(1).sum(1)
                    seen[name] = seen.get(name, 0) + a.numel() // a.shape[1]
    return {name: c.double() / seen[name] for name, c in count.items()}


def flow(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """mean over examples of |mean over positions of z dC/dz|, C the example's loss, (channels,).

    z is each channel's map behind its ReLU; where there is none, as far as batch norm and other maps of the same shape can be followed.
    """
    total: Evidence = {}
    for xs, ys in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        found = _maps(model, layers, xs)
        if not found:
            break
        maps = [(name, z) for name, m in found.items() for z in m.relu or [m.last]]
        cost = loss(next(iter(found.values())).output, ys) * len(xs)
        products: dict[str, list[Tensor]] = {}
        for (name, z), g in zip(maps, torch.autograd.grad(cost, [z for _, z in maps], allow_unused=True), strict=True):
            if g is not None:
                products.setdefault(name, []).append((z.detach() * g).flatten(2).mean(2) if z.dim() > 2 else z.detach() * g)
        total |= {n: total.get(n, 0) + sum(p).abs().sum(0) / len(x) for n, p in products.items()}
    return total


def next_acts_in(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What the one next layer reads of each channel at sampled places of its output: (samples, channels, inputs of a channel)."""
    reads = _readers(model, layers, x)
    parts: dict[str, list[Tensor]] = {name: [] for name in reads}
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for xs in x.split(CHUNK):
            with _watched({name: reader for name, (reader, _) in reads.items()}) as seen:
                model(xs)
            for name, (reader, places) in reads.items():
                columns = patches(reader, seen[name][0])[:, 0]  # (examples, inputs x kernel, positions)
                parts[name].append(_by_channel(at_places(columns, draw), places, reader))
    return {name: torch.cat(p) for name, p in parts.items()}


def next_w(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """The one next layer's weight by channel: (its outputs, channels, inputs of a channel), so that its output is the sum over both of x w."""
    reads = _readers(model, layers, x)
    return {name: _by_channel(reader.weight.flatten(1), places, reader) for name, (reader, places) in reads.items()}


def channel(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """The number of the channel that each weight makes, counted through the network, and of its group, (2, *w.shape); of tied filters the same."""
    found, start = {}, 0
    for i, group in enumerate(groups(model, x[:1])):
        for name in layers.keys() & set(group.makers):
            w = layers[name].weight
            number = torch.arange(start, start + group.count, device=w.device).reshape(-1, *[1] * (w.dim() - 1)).expand(w.shape)
            found[name] = torch.stack([number, torch.full_like(number, i)])
        start += group.count
    return {name: found[name] for name in layers if name in found}


class Widths(NamedTuple):
    """The groups of channels of a network, and what it does for one example when some of them are gone."""

    full: Tensor  # (groups,) how many channels each has
    terms: Tensor  # (terms, 2) the groups that meet in a product: of a layer's inputs and of its outputs; len(full) where none can go
    each: Tensor  # (terms,) multiply-adds that a pair of channels costs

    def products(self, widths: Tensor) -> Tensor:
        """s_in s_out of each term, for ``widths`` (..., groups); 1 stands for what cannot change."""
        return F.pad(widths, (0, 1), value=1.0)[..., self.terms].prod(-1)

    def multiply_adds(self, widths: Tensor) -> Tensor:
        return self.products(widths) @ self.each


def widths(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Widths]:
    """The groups of channels, their sizes, and the network's multiply-adds at any widths (``Widths``), the same for each layer; float64."""
    found = groups(model, x[:1])
    everywhere = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    with torch.no_grad(), _watched(everywhere) as seen:
        model(x[:1])
    out, fixed, terms = {n: i for i, g in enumerate(found) for n in g.makers}, len(found), {}
    for name, (_, made) in seen.items():
        w, own = everywhere[name].weight, out.get(name, fixed)
        into = {i: g.readers[name].numel() for i, g in enumerate(found) if name in g.readers and getattr(everywhere[name], "groups", 1) == 1}
        for i, inputs in {**into, fixed: w.shape[1] - sum(into.values())}.items():
            pairs = [found[g].count for g in (i, own) if g != fixed]
            terms[i, own] = terms.get((i, own), 0) + made.numel() * inputs * _area(w) / math.prod(pairs)
    terms = {pair: cost for pair, cost in terms.items() if cost}
    counts, costs = (torch.tensor(list(v), dtype=torch.float64, device=x.device) for v in ([g.count for g in found], terms.values()))
    given = Widths(counts, torch.tensor(list(terms), device=x.device), costs)
    return {n: given for g in found for n in g.makers if n in layers}


def responses(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> Evidence:
    """What the classifier, the layer that runs last, reads: (examples, features), the same for each layer."""
    covered, everywhere = _groups(model, layers, x), {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    with torch.no_grad(), _watched(everywhere) as seen:
        model(x)
    last = next(reversed(seen.values()))[0].flatten(1)
    return {name: last for name, _ in covered}


def propagated(model: nn.Module, layers: Layers, x: Tensor, y: Tensor, loss: Loss) -> dict[str, Callable[[Tensor], Tensor]]:
    """A function of what the classifier's inputs are worth, (features,), that gives what each channel is worth by the paths of |weights| between.

    It is the gradient of worth . features in a copy of the network of absolute weights and batch norm scales, without shifts, every ReLU open.
    """
    covered = _groups(model, layers, x)  # first: what an attached weight is without gradients is kept, and channels are followed by gradients
    copy, ones = with_plain_weights(model).requires_grad_(True), torch.ones_like(x[:1])
    with torch.no_grad():
        for m in copy.modules():
            if isinstance(m, (*LAYERS, nn.modules.batchnorm._BatchNorm)):
                for shift in (m.bias, getattr(m, "running_mean", None)):
                    None if shift is None else shift.zero_()
                None if m.weight is None else m.weight.copy_(m.weight.abs())
        with _watched({n: m for n, m in copy.named_modules() if isinstance(m, LAYERS)}) as seen:
            copy(ones)
    classifier, first = copy.get_submodule(next(reversed(seen))), _firsts(copy, ones)

    def worth(features: Tensor, name: str) -> Tensor:
        with torch.enable_grad():
            classifier.weight.data.zero_()[0] = features.reshape(classifier.weight[0].shape).to(ones)  # the first output is worth . features
            found = _maps(copy, {name: copy.get_submodule(name)}, ones, first, straight=True)[name]
            gradients = torch.autograd.grad(found.output[0, 0], found.relu or [found.last], allow_unused=True)
            return sum(g[0].reshape(g.shape[1], -1).sum(1) for g in gradients if g is not None)

    return {name: partial(worth, name=name) for name, _ in covered}


CHANNEL_PROVIDERS = {
    f.__name__: f for f in (bn_gamma, gamma_in, filter_rows, zeros, flow, next_acts_in, next_w, channel, widths, responses, propagated)
}
WITHOUT_DATA = {
    "macs",
    "place",
    "workload",
    *(f.__name__ for f in (bn_gamma, gamma_in, filter_rows, next_w, channel, widths, propagated)),
}  # one image of any content shows them which channels go where


def into_reader(weight: Tensor, places: Tensor, by_channel: Tensor) -> Tensor:
    """A next layer's weight with its part ``by_channel`` (``next_w``'s shape) put in the place of what it had there."""
    out = weight.clone()
    wide = out.reshape(len(out), -1, _area(weight))
    wide[:, places.flatten()] = by_channel.reshape(len(out), places.numel(), -1).to(wide)
    return wide.reshape(weight.shape)


def reader_of(group: Group, model: nn.Module) -> tuple[str, Tensor] | None:
    """The layer that reads a group's channels, and where; None where there are several, several makers, or one whose inputs are not seen."""
    if len(group.readers) != 1 or len(group.makers) != 1:
        return None
    name, places = next(iter(group.readers.items()))
    layer = model.get_submodule(name)
    seen = isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
    )
    return (name, places) if seen else None


def _readers(model: nn.Module, layers: Layers, x: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """{covered layer: (the one layer that reads its channels, where)} for those that have just one."""
    found = {name: reader_of(group, model) for name, group in _groups(model, layers, x)}
    return {name: (model.get_submodule(r[0]), r[1]) for name, r in found.items() if r}


def _area(weight: Tensor) -> int:
    """Weights that a layer has for one output and one input channel."""
    return weight[0, 0].numel()


def _by_channel(rows: Tensor, places: Tensor, reader: nn.Module) -> Tensor:
    """(n, inputs x kernel) as (n, channels, inputs of a channel)."""
    return rows.reshape(len(rows), -1, _area(reader.weight))[:, places.to(rows.device)].flatten(2)


def _groups(model: nn.Module, layers: Layers, x: Tensor) -> list[tuple[str, Group]]:
    """(covered layer, its group) for every covered layer whose channels can go."""
    return [(n, g) for g in groups(model, x[:1]) for n in g.makers if n in layers]


class _Traced(TorchFunctionMode):
    """Follows each maker's output through batch norm, pooling and sums to the ReLUs behind it."""

    def __init__(self, straight: bool = False) -> None:
        super().__init__()
        self.straight = straight  # whether ReLUs let everything through
        self.owner: dict[int, str] = {}
        self.held: list[Tensor] = []  # while a tensor lives, no other has its id
        self.relu: dict[str, list[Tensor]] = {}
        self.last: dict[str, Tensor] = {}  # the farthest map that has its maker's shape

    def own(self, t: Tensor, name: str) -> None:
        self.owner[id(t)] = name
        self.held.append(t)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = args[0].clone() if self.straight and func in RELUS else func(*args, **(kwargs or {}))
        source = next((a for a in args if isinstance(a, Tensor) and id(a) in self.owner), None)
        if source is not None and isinstance(out, Tensor):
            name = self.owner[id(source)]
            if func in RELUS:
                self.relu.setdefault(name, []).append(out)
            if out.shape == source.shape and self.last.get(name) is source:
                self.last[name] = out
            self.own(out, name)
        return out


class _Found:
    """A layer's maps in one forward pass: behind its ReLUs, and as far as they can be followed; and the network's output."""

    def __init__(self, relu: list[Tensor], last: Tensor, output: Tensor) -> None:
        self.relu, self.last, self.output = relu, last, output


def _firsts(model: nn.Module, x: Tensor) -> dict[str, str]:
    """{maker: the first maker of its group}."""
    return {n: g.first for g in groups(model, x[:1]) for n in g.makers}


def _maps(model: nn.Module, layers: Layers, xs: Tensor, first: dict[str, str] | None = None, straight: bool = False) -> dict[str, _Found]:
    """What each covered layer's group makes of ``xs``, with every ReLU open where ``straight``; a map belongs to the last maker before it."""
    first = first or _firsts(model, xs)
    with _Traced(straight) as traced:

        def note(name: str, out: Tensor) -> None:
            traced.last[name] = out
            traced.own(out, name)

        makers = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() > 1]
        handles = [m.register_forward_hook(lambda _, __, o, n=n: note(first.get(n, n), o)) for n, m in makers]
        try:
            output = model(xs)
        finally:
            for handle in handles:
                handle.remove()
    return {n: _Found(traced.relu.get(f, []), traced.last[f], output) for n, f in first.items() if n in layers}
