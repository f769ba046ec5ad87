"""The pictures of a compressed layer, as small plain data: what a panel draws and a text twin reads out.

A card is a dict with a ``kind`` (histogram, stairs, image, strip, bars) and the numbers it needs; pictures are uint8 bytes in a list beside them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.apply import Plan, surrounded
from ..core.codes import Codes, Sum
from ..core.packed import Masked, Packed
from ..lab.measure import bare, codes_in, input_bits

BINS = 81
STICKS = 257  # so many levels are drawn each for itself; of more, those that lie close together as one
APART = 0.14  # of the histogram's width: used levels at least so far apart say how many weights they have
ROOM = 24  # characters above the histogram
LISTED = 16  # so many levels are read aloud one by one
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
        self.widest = max(self.rising[-1].item(), 1e-12)
        self.bins = self._bins(self.weight, self.reach)
        self.counts = np.bincount(self.bins, minlength=BINS).tolist()
        self.before = self.pictures(self.weight)
        self.grid, self.cell = self._cells()
        self.in_cell = np.bincount(self.cell)

    def _bins(self, w: Tensor, reach: float) -> np.ndarray:
        """The bar that each weight falls into, of a histogram from -reach to reach."""
        return ((w.flatten() / reach + 1) / 2 * BINS).clamp(0, BINS - 1).to(torch.int64).numpy()

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
        bins = self._bins(packed.values.detach().cpu(), self.reach) if moved else self.bins
        kept, cut = np.bincount(bins[packed.places], minlength=BINS), self.cut(packed.places)
        card = {"kind": "histogram", "caption": f"weight value (√ count) · {self.label}", "edges": [-self.reach, self.reach]}
        return {**card, "counts": self.counts, "kept": kept.tolist(), "cut": cut, "cut_label": f"threshold ±{cut:.2g}" if cut is not None else ""}

    def levels(self, packed: Packed, after: Tensor) -> dict[str, Any]:
        """How many weights of each value there were, and how many now stand at each level of the codes; ``after`` is the weight that these mean."""
        values, counts = tally(packed, after)
        span, what = 1.03 * max(self.widest, np.abs(values).max()), levels_text(packed)
        sticks, before = _sticks(values, counts, span), self.wide_counts.copy()
        before[BINS // 2] -= len(self.sizes) - packed.kept  # what pruning had removed: zeros
        caption = f"weights before (grey) and at {what} (sticks), √\u00a0count · {self.label}"
        label = "" if len(what) > ROOM or any(text for *_, text in sticks) else what
        listed = [f"{v:.3g}: {n:,.0f}" for v, n, _ in sticks] if len(sticks) <= LISTED else []
        card = {"kind": "histogram", "caption": caption, "edges": [-self.widest, self.widest], "span": [-span, span], "counts": before.tolist()}
        return {**card, "sticks": sticks, "cut_label": label, "alt": f"{caption}; level: weights {', '.join(listed)}" if listed else caption}

    @cached_property
    def wide_counts(self) -> np.ndarray:
        """The histogram of all weights, from the largest magnitude to its negative."""
        order, filled, starts = self._by_value
        counts = np.zeros(BINS, np.int64)
        counts[filled] = np.diff(starts, append=len(order))
        return counts

    @cached_property
    def _by_value(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The weights' places in the order of the bars of a histogram over all values, the bars that hold any, and where each of these begins."""
        bars = self._bins(self.weight, self.widest)
        order = np.argsort(bars, kind="stable")
        return order, *np.unique(bars[order], return_index=True)

    def stairs(self, after: Tensor) -> dict[str, Any]:
        """What weights of each value became, the lowest and the highest in each bar of the histogram, and how far that is from what they were."""
        order, filled, starts = self._by_value
        found, error, own = after.flatten().numpy()[order], (self.weight - after).square().mean().item(), self.weight.square().mean().item()
        share = 100 * error / max(own, 1e-30)
        loss = f"{error:.2g}, {share:{',.0f' if share > 10 else '.2g'}}\u00a0% of the weights' mean square"
        steps = filled, np.minimum.reduceat(found, starts), np.maximum.reduceat(found, starts)
        return _stairs(f"value before → after; mean squared error {loss}", (-self.widest, self.widest), *steps)

    def pictures(self, w: Tensor) -> Tensor | None:
        """The first units as small images (n, h, w) with 128 for zero: filters of a convolution, input images of a first dense layer."""
        if self.image:
            w = w.reshape(-1, *self.image)
        if w.dim() != 4 or max(w.shape[2:]) == 1:
            return None
        first = w[:UNITS, 0]
        return ((first / self.reach).clamp(-1, 1) * 127 + 128).to(torch.uint8)

    def strip(self, out: Cards, after: Tensor) -> None:
        """Filters, or a first dense layer's units, before and after."""
        if self.before is None:
            return
        n, h, width = self.before.shape
        channels = self.image[0] if self.image else after.shape[1]
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
        out.add({**card, "alt": alt}, before=self.before, after=self.pictures(after))

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


def tally(packed: Packed, after: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The levels of a packed value, group by group, and how many weights stand at each; where several are added up, each weight for itself."""
    if isinstance(bare(packed), Sum):
        return after.flatten().double().numpy(), np.ones(after.numel(), np.int64)
    (codes,) = codes_in(packed)
    levels, index = codes.levels.detach().cpu(), codes.index.cpu()
    groups, count, *rest = levels.shape
    numbers = torch.bincount((index + count * torch.arange(groups)[:, None]).flatten(), minlength=groups * count)
    return levels.flatten().double().numpy(), numbers.repeat_interleave(math.prod(rest)).numpy()


def levels_text(packed: Packed) -> str:
    """What the codes of a layer choose from."""

    def said(codes: Codes) -> str:
        groups, count, *rest = codes.levels.shape
        return f"{count:,} {f'vectors of {rest[0]}' if rest else 'levels'}{f' in {groups:,} groups' if groups > 1 else ''}"

    floats = ["floats"] if any(isinstance(p, Masked) for p in getattr(bare(packed), "terms", ())) else []
    return " + ".join([*map(said, codes_in(packed)), *floats])


def _sticks(values: np.ndarray, counts: np.ndarray, span: float) -> list[list[Any]]:
    """[level, how many weights stand there, their share in words], for a histogram from -span to span; many levels are merged to a few."""
    if len(values) > STICKS:
        merged = np.bincount(((values / span + 1) / 2 * STICKS).astype(np.int64), counts, STICKS)
        filled = merged.nonzero()[0]
        values, counts = (filled + 0.5) * (2 * span / STICKS) - span, merged[filled]
    gaps, total = np.diff(np.sort(values[counts > 0])), counts.sum()
    texts = [share_text(n / total) if n and gaps.min(initial=span) > APART * 2 * span else "" for n in counts]
    return [list(stick) for stick in zip(values.tolist(), counts.tolist(), texts)]


def share_text(share: float) -> str:
    """A share in whole percent, and whether there is less than one."""
    return "<1\u00a0%" if share < 0.005 else f"{100 * share:.0f}\u00a0%"


def _stairs(caption: str, edges: tuple[float, float], filled: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """A staircase: over bar number ``filled`` of those between ``edges`` the values from ``low`` to ``high``."""
    alt = f"{caption}: {low[0]:.3g} to {high[-1]:.3g}, in steps"
    steps = np.stack([filled, low, high], 1).tolist()
    return {"kind": "stairs", "caption": caption, "alt": alt, "edges": list(edges), "bins": BINS, "steps": steps}


def input_stairs(out: Cards, name: str, packed: Packed) -> None:
    """What each input of the layer is rounded to, where it is."""
    if input_bits(packed) is None:
        return
    given = packed.input
    bottom, top = given.rounded(torch.tensor([-1e30, 1e30])).tolist()
    room = 0.15 * max(top - bottom, 1e-12)
    edges = min(bottom, 0.0) - room, top + room
    y = given.rounded(torch.linspace(*edges, BINS + 1)).numpy()
    caption = f"what {name} reads of an input: {given.count:,} levels{', times the mean |input| that an output sees' if given.spread else ''}"
    out.add(_stairs(caption, edges, np.arange(BINS), y[:-1], y[1:]))


def feature_maps(model: nn.Module, layer: str, x: Tensor, weights: dict[str, Tensor], around: Plan) -> Tensor | None:
    """The first maps (n, h, w) that a convolution makes of one image, with ``weights`` in place and what ``around`` puts about its layers."""
    seen: list[Tensor] = []
    with torch.no_grad(), surrounded(model, around):
        handle = model.get_submodule(layer).register_forward_hook(lambda m, i, o: seen.append(o))  # after the hook of a rounded input
        try:
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


def bits(plan: Plan) -> dict[str, Any]:
    """Bars: how many bits a weight of each layer costs as stored, of those that it had."""

    def row(name: str, packed: Packed) -> dict[str, Any]:
        total, cost = packed.values.numel(), packed.bits()
        kept = f" ({packed.kept / total:.1%} kept)".replace("%", " %") if packed.kept < total else ""
        label = f"{name} {'×'.join(map(str, packed.values.shape))}"
        return {"label": label, "share": cost / (8 * packed.values.nbytes), "text": f"{cost / total:.2f}{kept}"}

    return {"kind": "bars", "title": "bits a weight as stored, layer by layer", "rows": [row(n, p) for n, p in plan.items()]}
