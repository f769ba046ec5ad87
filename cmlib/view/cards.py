"""The pictures of a pruned layer, as small plain data: what a panel draws and a text twin reads out.

A card is a dict with a ``kind`` (histogram, image, strip, bars) and the numbers it needs; pictures are uint8 bytes in a list beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.apply import Plan
from ..core.packed import Packed

BINS = 81
UNITS = 6  # how many units, filters or maps a strip shows


@dataclass(frozen=True)
class Cards:
    """Cards and the picture bytes they point into."""

    cards: list[dict[str, Any]]
    buffers: list[bytes]

    def add(self, card: dict[str, Any], **pictures: Tensor) -> None:
        """A card; each picture (uint8) is appended to the buffers and its number put into the card."""
        numbers = {name: len(self.buffers) + i for i, name in enumerate(pictures)}
        self.cards.append({**card, **numbers})
        self.buffers.extend(p.contiguous().numpy().tobytes() for p in pictures.values())


class LayerView:
    """One layer's pictures; what no slider changes is worked out once. ``image`` (channels, h, w) is the input that a first dense layer reads."""

    def __init__(self, name: str, weight: Tensor, image: tuple[int, int, int] | None = None) -> None:
        self.name, self.given, self.weight, self.image = name, weight, weight.detach().cpu(), image
        self.sizes = self.weight.abs().flatten().numpy()
        self.rising = np.sort(self.sizes)
        self.label = f"{name} {'×'.join(str(n) for n in weight.shape)}"
        self.reach = max(self.rising[int(0.999 * (weight.numel() - 1))].item(), 1e-12)
        self.bins = self._bins(self.weight)
        self.counts = np.bincount(self.bins, minlength=BINS).tolist()
        self.before = self.pictures(self.weight)
        self.grid, self.cell = self._cells()
        self.in_cell = np.bincount(self.cell)

    def _bins(self, w: Tensor) -> np.ndarray:
        """The bar of the histogram that each weight falls into."""
        return ((w.flatten() / self.reach + 1) / 2 * BINS).clamp(0, BINS - 1).to(torch.int64).numpy()

    def _cells(self) -> tuple[tuple[int, int], np.ndarray]:
        """The map's height and width, and each weight's cell: the input pixel it reads in a first dense layer, else its part of the matrix."""
        outputs, inputs = self.weight.flatten(1).shape
        if self.image:
            channels, h, w = self.image
            return (h, w), np.tile(np.arange(h * w), outputs * channels)
        high, wide = min(outputs, 64), min(inputs, 96)
        down, across = np.arange(outputs) * high // outputs, np.arange(inputs) * wide // inputs
        return (high, wide), (down[:, None] * wide + across).ravel()

    def cut(self, places: np.ndarray) -> float | None:
        """The magnitude below which weights went, where magnitude is what decided; None elsewhere."""
        gone = len(self.sizes) - len(places)
        if gone in (0, len(self.sizes)) or self.sizes[places].min() < self.rising[gone]:
            return None
        return (self.rising[gone - 1] + self.rising[gone]).item() / 2

    def histogram(self, packed: Packed) -> dict[str, Any]:
        """How many weights of each value there were, and how many there are of those that stay."""
        moved = packed.values is not self.given  # by a repair, or by training
        bins = self._bins(packed.values.detach().cpu()) if moved else self.bins
        kept, cut = np.bincount(bins[packed.places], minlength=BINS), self.cut(packed.places)
        card = {"kind": "histogram", "caption": f"weight value (√ count) · {self.label}", "edges": [-self.reach, self.reach]}
        return {**card, "counts": self.counts, "kept": kept.tolist(), "cut": cut, "cut_label": f"threshold ±{cut:.2g}" if cut is not None else ""}

    def pictures(self, w: Tensor) -> Tensor | None:
        """The first units as small images (n, h, w) with 128 for zero: filters of a convolution, input images of a first dense layer."""
        if self.image:
            w = w.reshape(-1, *self.image)
        if w.dim() != 4 or max(w.shape[2:]) == 1:
            return None
        first = w[:UNITS, 0]
        return ((first / self.reach).clamp(-1, 1) * 127 + 128).to(torch.uint8)

    def strip(self, out: Cards, packed: Packed) -> None:
        """Filters, or a first dense layer's units, before and after."""
        if self.before is None:
            return
        w, (n, h, width) = packed.dense().detach().cpu(), self.before.shape
        channels = self.image[0] if self.image else w.shape[1]
        what = f"{'units' if self.image else 'filters'}{' (first input channel)' if channels > 1 else ''}"
        card = {
            "kind": "strip",
            "n": n,
            "h": h,
            "w": width,
            "palette": "diverging",
            "caption": f"{n} {what} of {self.name}, before",
            "caption_after": "… and after",
        }
        alt = f"{n} {what} of {self.name} as pictures, before and after compression"
        out.add({**card, "alt": alt}, before=self.before, after=self.pictures(w))

    def map(self, out: Cards, places: np.ndarray) -> None:
        """Where the kept weights sit: per input pixel for a first dense layer, else the weight matrix seen from afar."""
        share, (h, w) = np.bincount(self.cell[places], minlength=len(self.in_cell)) / self.in_cell, self.grid
        if self.image:
            share, caption = share / max(share.max(), 1e-9), "weights kept per pixel of the input: what the layer looks at"
        else:
            caption = f"share kept · {self.name} as a matrix, outputs down, inputs across"
        alt = f"{caption}; {len(places) / len(self.cell):.1%} of the weights stay"
        card = {"kind": "image", "h": h, "w": w, "palette": "sequential", "caption": caption, "alt": alt}
        out.add(card, buffer=torch.from_numpy((share * 255).astype(np.uint8)))


def feature_maps(model: nn.Module, layer: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor | None:
    """The first maps (n, h, w) that a convolution makes of one image, with ``weights`` in place."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))
    try:
        with torch.no_grad():
            torch.func.functional_call(model, weights, (x,))
    finally:
        handle.remove()
    return seen[0][0, :UNITS].cpu() if seen and seen[0].dim() == 4 else None


def maps_strip(out: Cards, layer: str, before: Tensor | None, after: Tensor | None) -> None:
    """Feature maps before and after, on one common scale."""
    if before is None or after is None or before.shape[-1] < 2:
        return
    low, high = before.min(), before.max()
    before, after = (((m - low) / (high - low).clamp(min=1e-9)).clamp(0, 1) * 255 for m in (before, after))
    n, h, w = before.shape
    card = {
        "kind": "strip",
        "n": n,
        "h": h,
        "w": w,
        "palette": "grey",
        "caption": f"what {layer} makes of one image, before",
        "caption_after": "… and after",
    }
    out.add({**card, "alt": f"{n} feature maps of {layer} before and after"}, before=before.to(torch.uint8), after=after.to(torch.uint8))


def shares(plan: Plan) -> dict[str, Any]:
    """Bars: how much of each layer stays."""
    rows = [{"label": f"{n} {'×'.join(map(str, p.mask.shape))}", "share": p.kept / p.mask.numel()} for n, p in plan.items()]
    return {"kind": "bars", "title": "kept, layer by layer", "rows": [{**r, "text": f"{r['share']:.1%}".replace("%", " %")} for r in rows]}
