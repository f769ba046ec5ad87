"""The pictures of a pruned layer, as small plain data: what a panel draws and a text twin reads out.

A card is a dict with a ``kind`` (histogram, image, strip, bars, line) and the numbers it needs; pictures are uint8 bytes in a list beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.apply import Plan

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
    """One layer's pictures; what no slider changes is worked out once."""

    def __init__(self, name: str, weight: Tensor) -> None:
        self.name, self.weight = name, weight.detach().cpu()
        self.sorted, self.order = self.weight.abs().flatten().sort()
        self.label = f"{name} {'×'.join(str(n) for n in weight.shape)}"
        self.reach = max(self.sorted[int(0.999 * (weight.numel() - 1))].item(), 1e-12)
        scaled = ((self.weight.flatten() / self.reach + 1) / 2 * BINS).clamp(0, BINS - 1)
        self.bins = scaled.to(torch.int64)
        self.counts = torch.bincount(self.bins, minlength=BINS).tolist()
        self.before = self.pictures(self.weight)

    def cut(self, mask: Tensor) -> float | None:
        """The magnitude below which weights went, where magnitude is what decided; None elsewhere."""
        by_size, gone = mask.flatten()[self.order], int(mask.numel() - np.count_nonzero(mask.numpy()))
        if gone in (0, mask.numel()) or by_size[:gone].any():
            return None
        return (self.sorted[gone - 1] + self.sorted[gone]).item() / 2

    def histogram(self, mask: Tensor) -> dict[str, Any]:
        kept, cut = torch.bincount(self.bins[mask.flatten()], minlength=BINS), self.cut(mask)
        card = {"kind": "histogram", "caption": f"weight value (√ count) · {self.label}", "edges": [-self.reach, self.reach]}
        return {**card, "counts": self.counts, "kept": kept.tolist(), "cut": cut, "cut_label": f"threshold ±{cut:.2g}" if cut is not None else ""}

    def pictures(self, w: Tensor) -> Tensor | None:
        """The first units as small images (n, h, w) with 128 for zero: filters of a convolution, input images of a first dense layer."""
        side = round(w.shape[1] ** 0.5) if w.dim() == 2 else 0
        if w.dim() == 4 and w.shape[-1] > 1:
            first = w[:UNITS, 0]
        elif side * side == w.shape[1:].numel() and side >= 8:
            first = w[:UNITS].reshape(-1, side, side)
        else:
            return None
        return ((first / self.reach).clamp(-1, 1) * 127 + 128).to(torch.uint8)

    def strip(self, out: Cards, w: Tensor) -> None:
        if self.before is None:
            return
        n, h, width = self.before.shape
        what = "filters (first input channel)" if w.dim() == 4 else "units"
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

    def map(self, out: Cards, mask: Tensor, kept: int) -> None:
        """Where the ``kept`` weights sit: per input pixel for a first dense layer, else the weight matrix seen from afar."""
        side = round(mask.shape[1] ** 0.5)
        if mask.dim() == 2 and side * side == mask.shape[1] and side >= 8:
            shares = mask.float().mean(0).reshape(side, side)
            picture, caption = shares / shares.max().clamp(min=1e-9), "weights kept per pixel of the input: what the layer looks at"
        else:
            matrix = mask.flatten(1).float()
            size = min(matrix.shape[0], 64), min(matrix.shape[1], 96)
            picture, caption = (
                F.adaptive_avg_pool2d(matrix[None, None], size)[0, 0],
                f"share kept · {self.name} as a matrix, outputs down, inputs across",
            )
        h, w = picture.shape
        card = {
            "kind": "image",
            "h": h,
            "w": w,
            "palette": "sequential",
            "caption": caption,
            "alt": f"{caption}; {kept / mask.numel():.1%} of the weights stay",
        }
        out.add(card, buffer=(picture * 255).to(torch.uint8))


def feature_maps(model: nn.Module, layer: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor | None:
    """The first maps (n, h, w) that a convolution makes of one image, with ``weights`` in place."""
    seen: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))
    try:
        with torch.no_grad():
            torch.func.functional_call(model, {f"{n}.weight": w for n, w in weights.items()}, (x,))
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
