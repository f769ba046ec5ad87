"""From masks to a network that is really smaller: filters whose channels are zero throughout leave every layer that has to do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .apply import with_plain_weights
from .channels import Group, UntraceableError, example_of, graph_of, groups

WIDTHS = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features")
Widths = dict[str, dict[str, int]]


def bake(model: nn.Module, data: Any = None) -> nn.Module:
    """A copy with plain weights from which every filter that is zero with all that belongs to its channel is removed for real.

    Its outputs are the masked network's. ``data`` (a data set or a pair) gives the image that channels are traced with; the kit's networks need
    none. UntraceableError where the forward pass cannot be followed, or where a zero channel still matters (an activation with f(0) != 0).
    """
    small, example = with_plain_weights(model), example_of(model, data)
    before = widths(small)
    channels_last = any(p.dim() == 4 and not p.is_contiguous() for p in small.parameters())
    expected = _outputs(small, example)
    graph = graph_of(small, example)
    zeros = [(g, dead(small, g)) for g in groups(small, example, graph)]  # all looked up before any goes: norms behind a concat shift
    for group, gone in zeros:
        if gone:
            _remove(graph, small.get_submodule(group.first), group.first, gone[:-1] if len(gone) == group.count else gone)
    if channels_last:
        small = small.to(memory_format=torch.channels_last)
    _check_same(expected, _outputs(small, example))
    now = widths(small)
    small.widths = getattr(model, "widths", {}) | {name: w for name, w in now.items() if w != before[name]}
    return small


def dead(model: nn.Module, group: Group) -> list[int]:
    """The channels of a plain ``model`` that are zero in every maker and every vector of their group."""
    alive = torch.zeros(group.count, dtype=torch.bool)
    for name in group.makers:
        alive |= model.get_submodule(name).weight.detach().cpu().flatten(1).any(1)
    for name, start in group.vectors:
        alive |= model.get_parameter(name).detach().cpu()[start : start + group.count] != 0
    return (~alive).nonzero().flatten().tolist()


def widths(model: nn.Module) -> Widths:
    """{module: its numbers of channels} for every module that has them."""
    found = {n: {w: getattr(m, w) for w in WIDTHS if isinstance(getattr(m, w, None), int)} for n, m in model.named_modules()}
    return {n: w for n, w in found.items() if w}


def narrowed(model: nn.Module, to: Widths) -> nn.Module:
    """The model itself with the modules that ``to`` names made as narrow as it says, their parameters and buffers new and empty."""
    for name, numbers in to.items():
        module = model.get_submodule(name)
        for width, value in numbers.items():
            setattr(module, width, value)
        for held in (module._parameters, module._buffers):
            for key, old in held.items():
                if old is not None and old.dim():
                    plain = old.stride() == torch.empty(old.shape, device="meta").stride()
                    layout = torch.contiguous_format if plain or old.dim() != 4 else torch.channels_last
                    new = torch.empty(_shape(module, key, old), dtype=old.dtype, device=old.device, memory_format=layout)
                    held[key] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    model.widths = getattr(model, "widths", {}) | to
    return model


def _shape(module: nn.Module, key: str, old: Tensor) -> tuple[int, ...]:
    numbers = [getattr(module, w, None) for w in ("out_channels", "out_features", "num_features")]
    out = next(n for n in numbers if n is not None)
    if old.dim() == 1:
        return (out,)
    if getattr(module, "transposed", False):
        return (module.in_channels, out // module.groups, *old.shape[2:])
    into = module.in_features if isinstance(module, nn.Linear) else module.in_channels // module.groups
    return (out, into, *old.shape[2:])


def _remove(graph: Any, layer: nn.Module, name: str, gone: list[int]) -> None:
    try:
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, gone).prune()
    except Exception as error:
        raise UntraceableError(
            f"torch-pruning cannot take channels out of {name} ({type(error).__name__}: {error}); leave it out with where=..."
        ) from error


def _outputs(model: nn.Module, example: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, *example.shape[1:], generator=draw).to(example)
    with torch.no_grad():
        return model(x)


def _check_same(expected: Tensor, found: Tensor) -> None:
    scale = expected.abs().max()
    if expected.shape != found.shape or not (found - expected).abs().max() <= 1e-4 * scale:
        raise UntraceableError(
            "without its zero channels the network says something else: an activation of zero is not zero here, or a sum adds to it; "
            "the masked network still stands, and unit='row' with save() stores it small"
        )
