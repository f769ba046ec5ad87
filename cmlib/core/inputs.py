"""What goes into a network: pairs (images, labels), in which layout and on which device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


def as_input(images: Tensor, model: nn.Module | None = None) -> Tensor:
    """uint8 images as the floats x/255 that networks take, in the model's own precision; anything already float passes unchanged."""
    return images.to(dtype_of(model)).div_(255) if images.dtype == torch.uint8 else images


def pair_of(data: Any, part: str) -> Pair:
    """The named part of a data set; a pair (images, labels) of the user's own stands for every part."""
    pair = getattr(data, part, data)
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        got = f"({', '.join(type(t).__name__ for t in pair)})" if isinstance(pair, (tuple, list)) else f"{type(data).__name__} {str(data)[:40]!r}"
        raise ValueError(f"data must be a data set, as load_data(name) gives it, or a pair of tensors (images, labels); got {got}")
    if not len(pair[0]) == len(pair[1]) > 0:
        raise ValueError(f"data must have as many labels as images, and some; got {len(pair[0]):,} images and {len(pair[1]):,} labels")
    if any(t.is_meta for t in pair):
        raise ValueError("data must have numbers; got a tensor on the meta device")
    return pair[0], pair[1]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def dtype_of(model: nn.Module | None) -> torch.dtype:
    """The type of a model's floats; float32 where there is no model or no float."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32) if model is not None else torch.float32


def stratified(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """``count`` row numbers in which every class has its share (to within one), in an order whose every prefix has too.

    The rows of each class are shuffled by ``seed`` and dealt out evenly spaced along the order.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)
    for c in labels.unique():
        rows = (labels == c).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        place[rows] = (torch.arange(len(rows), dtype=torch.float64) + start) / len(rows)
    return place.argsort(stable=True)[:count]


def sample(data: Any, count: int) -> Pair:
    """A fixed stratified sample of the training part, for gradients, curvature and calibration."""
    images, labels = pair_of(data, "train")
    if count < len(labels):
        rows = stratified(labels, count) if labels.dtype == torch.int64 and labels.dim() == 1 else torch.arange(count)
        images, labels = images[rows], labels[rows]
    if images.is_floating_point() and not images.isfinite().all():
        raise ValueError("the images hold numbers that are NaN or infinite; clean them, or leave these images out")
    return images, labels
