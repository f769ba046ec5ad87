"""Layer after layer: each is judged in the network that the layers before it left, and done before the next is looked at.

``prune_in_order`` and ``rebuild_in_order`` give a small network with plain weights; ``keeps`` is {layer: share of its filters that stay}, taken in
the network's order. ``compress_in_order`` is for methods that keep what a layer answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.apply import weighted, with_plain_weights
from ..core.bake import bake
from ..core.channel_evidence import into_reader, reader_of
from ..core.channels import example_of, groups
from ..core.evidence import CHUNK, patches
from ..core.knobs import nearest
from ..core.method import Method, score
from ..core.planner import covered, gather
from ..methods import find
from ..methods.structures import entry_points, lasso_problem, least_squares
from .verbs import compress


def prune_in_order(model: nn.Module, method: Method | str, keeps: dict[str, float], data: Any = None, **knobs: Any) -> nn.Module:
    """The small network that is left when ``method`` prunes one layer after the other.

    With ``l1_norm_filter_pruning`` it is the greedy strategy of Li et al. 2017 (section 3.3): a filter's norm without its weights for channels that
    an earlier layer no longer makes. ``compress`` judges all layers in the whole network, which is their independent strategy. ValueError names a
    layer that is not there.
    """
    small = with_plain_weights(model)
    for name, keep in _ordered(model, keeps):
        small = bake(compress(small, method, where=name, data=data, unit="filter", keep=keep, **knobs), data)
    return small


def rebuild_in_order(model: nn.Module, keeps: dict[str, float], data: Any, *, samples: int = 512) -> nn.Module:
    """Channel pruning of a whole network (He, Zhang & Sun 2017, section 3.2): the pruned network's inputs, the original's outputs.

    From what the pruned network gives it, each next layer is to make what it made in the original one: the lasso chooses the channels and least
    squares fits the weight to that target, which mends what earlier layers lost. ValueError where not just one layer reads the channels.
    """
    small = with_plain_weights(model)
    for name, keep in _ordered(model, keeps):
        x, w = _read(model, name, data, samples)
        small = bake(compress(small, _entering(x @ w), where=name, data=data, samples=samples, keep=keep), data)
        _fit_reader(small, name, x @ w, data, samples)
    return small


def compress_in_order(model: nn.Module, method: Method | str, data: Any, *, where: str = "*", samples: int = 128, **knobs: Any) -> nn.Module:
    """A copy in which each layer, from what the compressed ones before it give it, is to make what it made in the original network.

    Before ``method`` compresses a layer its weight becomes the W' of least E |W x - W' x'|^2, x what it reads in the original and x' in the copy;
    what x' does not show of W stays (Wu et al. 2016, Q-CNN, the error correction of multiple layers: errors pile up otherwise).
    """
    copy = with_plain_weights(model)
    for name in covered(model, where):
        layer, original = copy.get_submodule(name), model.get_submodule(name)
        given = [gather(m, {name: m.get_submodule(name)}, "acts_in", data, samples=samples)[name] for m in (model, copy)]
        cross = gram = 0.0
        for x, read in zip(*(a.split(CHUNK) for a in given), strict=True):
            x, read = (patches(original, a).double().transpose(0, 1).transpose(2, 3).flatten(1, 2) for a in (x, read))  # (groups, places, k)
            cross, gram = cross + x.transpose(1, 2) @ read, gram + read.transpose(1, 2) @ read
        w = original.weight.detach().double().reshape(len(gram), -1, gram.shape[1])
        with torch.no_grad():
            layer.weight.copy_((w + w @ (cross - gram) @ torch.linalg.pinv(gram, hermitian=True)).reshape(layer.weight.shape))
        copy = compress(copy, method, where=name, data=data, **knobs)
    return copy


def _ordered(model: nn.Module, keeps: dict[str, float]) -> Iterator[tuple[str, float]]:
    layers = weighted(model)
    for name in keeps:
        if name not in layers:
            raise ValueError(f"keeps names no layer {name!r}{nearest(name, layers)}; the layers are {', '.join(layers)}")
    return ((name, keeps[name]) for name in layers if name in keeps)


def _read(model: nn.Module, name: str, data: Any, samples: int) -> tuple[Tensor, Tensor]:
    """X (places, inputs) and W (inputs, outputs) of the layer that reads ``name``'s channels, in float64; the same places in every network."""
    acts, w = (gather(model, {name: model.get_submodule(name)}, what, data, samples=samples)[name] for what in ("next_acts_in", "next_w"))
    return acts.double().flatten(1), w.double().flatten(1).T


def _entering(y: Tensor) -> Method:
    """Channel pruning's choice where the next layer is to make ``y``."""

    def entering(next_acts_in, next_w):
        return entry_points(*lasso_problem(next_acts_in, next_w, y))

    return score(find("lasso_channel_pruning").paper, chapter="03", unit="filter")(entering)


def _fit_reader(small: nn.Module, name: str, y: Tensor, data: Any, samples: int) -> None:
    """Give the layer that reads ``name``'s channels the weight that makes ``y`` best."""
    group = next(g for g in groups(small, example_of(small, data)) if name in g.makers)
    reader, places = reader_of(group, small)
    x, w = _read(small, name, data, samples)
    weight = small.get_submodule(reader).weight
    with torch.no_grad():
        weight.copy_(into_reader(weight, places, least_squares(x, y, w).T))
