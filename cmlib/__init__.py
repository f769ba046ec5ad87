"""cmlib: every way to make a deep network small, acting on a real trained network, measured.

The public names below are loaded when first used, so that ``python -m cmlib`` works before anything is installed and importing the package costs
next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "catalog": "methods", "find": "methods", "with_plain_weights": "core.apply", "bake": "core.bake",
    "compress": "lab.verbs", "plan": "lab.verbs", "coded": "lab.verbs",
    "fit": "lab.train", "evaluate": "lab.train", "predict": "lab.train", "prune_and_train": "lab.train",
    "measure": "lab.measure", "Row": "lab.row", "over_seeds": "lab.row", "rows_table": "lab.row", "sparse_crossover": "lab.measure",
    "sensitivity": "lab.ratios", "solve": "lab.ratios", "compress_each": "lab.ratios", "recalibrate": "lab.ratios", "latency_scan": "lab.ratios",
    "bit_sensitivity": "lab.bits", "bits_within": "lab.bits", "compress_bits": "lab.bits",
    "in_stages": "lab.stages", "turn": "lab.stages", "follow": "lab.stages",
    "integer_network": "lab.integer", "to_onnx": "lab.engines", "to_int8": "lab.engines", "Engine": "lab.engines",
    "fold_batch_norm": "lab.calibrate", "bias_correction": "lab.calibrate", "signed": "lab.nets", "swapped": "lab.nets",
    "save": "lab.files", "load": "lab.files", "FileError": "lab.files",
    "load_data": "lab.data", "DataError": "lab.data", "Data": "lab.data",
    "load_net": "lab.zoo", "build": "lab.zoo", "NetError": "lab.zoo",
    "explore": "view.explorer", "predict_first": "view.quiz", "browse": "view.browse", "methods_table": "view.browse", "installed": "view.browse",
    "families": "view.browse",
    "one_shot": "core.schedule", "iterative": "core.schedule", "gradual": "core.schedule",
    "score": "core.method", "quantizer": "core.method", "Keep": "core.knobs", "Bits": "core.knobs", "Span": "core.knobs", "Pick": "core.knobs",
    "Masked": "core.packed", "Codes": "core.codes", "select": "core.select",
}  # fmt: skip

__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'cmlib' has no attribute {name!r}")
    value = getattr(import_module(f".{_PLACES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
