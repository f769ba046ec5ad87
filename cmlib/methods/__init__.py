"""The methods, one module a survey chapter. ``catalog()`` reads their namespaces; nothing is registered."""

from __future__ import annotations

from types import ModuleType

from ..core.knobs import nearest
from ..core.method import Method
from . import (
    binary,
    bits_chosen,
    codebooks,
    discrete,
    energy,
    fewbits,
    fixed_filters,
    formats,
    grids,
    prune,
    prune_budgets,
    prune_neurons,
    prune_training,
    quantize,
    steps,
    structures,
    structures_judged,
    structures_learned,
    structures_scales,
)

CHAPTERS: tuple[ModuleType, ...] = (
    prune, prune_neurons, prune_training, prune_budgets, structures, structures_learned, structures_scales, structures_judged, energy,
    quantize, grids, codebooks, binary, fewbits, formats, discrete, bits_chosen, fixed_filters, steps,
)  # fmt: skip


def catalog() -> dict[str, Method]:
    """Every method by its key, in the order of the chapters."""
    return {m.key: m for module in CHAPTERS for m in vars(module).values() if isinstance(m, Method)}


def find(method: Method | str) -> Method:
    """The method itself, or the one with that key. ValueError names the nearest key."""
    if isinstance(method, Method):
        return method
    if callable(method):
        raise ValueError(
            f'{getattr(method, "__name__", method)} is a plain function; make it a method with @score("where it comes from", chapter="00")'
        )
    methods = catalog()
    if method not in methods:
        raise ValueError(f"no method {method!r}{nearest(str(method), methods)}; catalog() lists {', '.join(methods)}")
    return methods[method]
