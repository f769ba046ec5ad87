"""Convolutions that work out some places of their output only; the others take the value of the nearest place that was worked out.

``attach_places`` makes a layer such a one: only the patches of these places are gathered and multiplied, so that the work really falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nearest_computed(computed: Tensor) -> Tensor:
    """For every place of the map (H, W), row by row, the number of the nearest one in ``computed`` (bool), counted among these; ties to the first."""
    return _nearest(tuple(computed.shape), tuple(computed.flatten().nonzero().flatten().tolist()))


@lru_cache(64)  # a slider asks for the same places with every batch of images
def _nearest(shape: tuple[int, int], computed: tuple[int, ...]) -> Tensor:
    rows, columns = (g.flatten() for g in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
    at = torch.tensor(computed)
    each = [(r[:, None] - rows[at]) ** 2 + (c[:, None] - columns[at]) ** 2 for r, c in zip(rows.split(1024), columns.split(1024), strict=True)]
    return torch.cat([squares.argmin(1) for squares in each])


class Places(nn.Module):
    """The linear map of a 2-D convolution at the places of ``computed`` (H, W), spread over the whole map; it stands for ``_conv_forward``."""

    def __init__(self, layer: nn.Conv2d, computed: Tensor) -> None:
        super().__init__()
        self.stride, self.dilation, self.padding, self.mode = layer.stride, layer.dilation, layer._reversed_padding_repeated_twice, layer.padding_mode
        self.register_buffer("computed", computed, persistent=False)
        self.register_buffer("nearest", nearest_computed(computed).to(computed.device), persistent=False)

    def forward(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        out = w.flatten(1).unflatten(0, (x.shape[1] // w.shape[1], -1)) @ self.patches(x, w)  # (N, groups, outputs of a group, places)
        out = out.flatten(1, 2) if bias is None else out.flatten(1, 2) + bias[:, None]
        return out[:, :, self.nearest].unflatten(2, self.computed.shape)

    def patches(self, x: Tensor, w: Tensor) -> Tensor:
        """What the outputs at these places are products of, (N, groups, weights of an output, places): ``unfold`` of nothing else."""
        x = F.pad(x, self.padding, "constant" if self.mode == "zeros" else self.mode)
        spans = [d * (k - 1) for d, k in zip(self.dilation, w.shape[2:], strict=True)]
        here = tuple((side - span - 1) // s + 1 for side, span, s in zip(x.shape[2:], spans, self.stride, strict=True))
        if here != tuple(self.computed.shape):
            raise ValueError(f"the places are those of maps of {list(self.computed.shape)}; this input makes maps of {list(here)}")
        down, across = (
            d * torch.arange(k, device=x.device)[:, None] + s * at
            for d, k, s, at in zip(self.dilation, w.shape[2:], self.stride, self.computed.nonzero().T, strict=True)
        )
        where = down[:, None] * x.shape[3] + across  # (kernel rows, kernel columns, places)
        columns = x.flatten(2)[:, :, where.flatten(0, 1)]  # (N, channels, kernel, places)
        return columns.flatten(1, 2).unflatten(1, (x.shape[1] // w.shape[1], -1))


def attach_places(layer: nn.Conv2d, computed: Tensor) -> None:
    """Have ``layer`` work out these places only; the layer is changed."""
    if not isinstance(layer, nn.Conv2d) or not computed.any():
        raise ValueError(f"some place of the map of a 2-D convolution must be worked out; got {int(computed.sum())} places of {layer}")
    layer.places = Places(layer, computed.to(layer.weight.device))
    layer.__dict__["_conv_forward"] = layer.places  # in front of the class's own


def detach_places(layer: nn.Module) -> None:
    """The layer works out its whole output again."""
    if places_of(layer) is not None:
        del layer.places, layer.__dict__["_conv_forward"]


def places_of(layer: nn.Module) -> Tensor | None:
    """The places that the layer works out, (H, W); None where it works out all."""
    places = getattr(layer, "places", None)
    return places.computed if isinstance(places, Places) else None


@contextmanager
def everywhere(model: nn.Module) -> Iterator[None]:
    """Every layer works out its whole output inside the block: for what follows channels through the network."""
    found = {m: places for m in model.modules() if (places := places_of(m)) is not None}
    try:
        for layer in found:
            detach_places(layer)
        yield
    finally:
        for layer, computed in found.items():
            attach_places(layer, computed)
