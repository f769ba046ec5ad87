"""The verbs that make a compressed model: ``plan`` says what each weight becomes, ``compress`` does it to a copy, ``coded`` writes it shorter."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..core.apply import Plan, attach_plan, plan_of
from ..core.evidence import Loss
from ..core.method import Method
from ..core.planner import Planner
from ..core.wrapped import CODERS, entropy_coded
from ..methods import find


def plan(
    model: nn.Module, method: Method | str, *, where: str = "*", data: Any = None, loss: Loss = F.cross_entropy, samples: int = 512, **knobs: Any
) -> Plan:
    """What ``method`` makes of each covered layer's weight: {layer: packed}. The model is not changed.

    ``where`` names layers by pattern of name or type ("conv*", "Linear", "*, !first, !last"). ``data`` (of load_data, or a pair) is for methods that
    ask for gradients, curvature or activations; ``samples`` of its training images are used. ValueError says what is wrong and what mends it.
    """
    method = find(method)
    method.bind(knobs)  # a misspelt knob is told before evidence is gathered
    return Planner(model, method, where=where, data=data, loss=loss, samples=samples)(**knobs)


def compress(
    model: nn.Module, method: Method | str, *, where: str = "*", data: Any = None, loss: Loss = F.cross_entropy, samples: int = 512, **knobs: Any
) -> nn.Module:
    """A copy of ``model`` with the method's plan attached (see ``plan``); the original stays bit for bit as it was.

    The copy computes with the compressed weights at once, and masks hold through any training, with ``fit`` or any loop.
    """
    method = find(method)
    made = plan(model, method, where=where, data=data, loss=loss, samples=samples, **knobs)
    return attach_plan(deepcopy(model), made, method, method.bind(knobs))


def coded(model: nn.Module, coder: str = "huffman") -> nn.Module:
    """A copy of a compressed ``model`` whose codes, gaps and bitmaps are written in an entropy code, ``huffman`` or ``ans``; nothing else changes.

    It stands for the same network, and its file is smaller where some codes are rarer than others (Han et al. 2016, Deep Compression, section 4);
    where none are, the table of the code makes it a few bytes larger.
    What learned is frozen. ValueError for another coder, or where nothing is compressed.
    """
    if coder not in CODERS:
        raise ValueError(f"coder={coder!r} is not allowed: coder is one of {', '.join(CODERS)}")
    found = plan_of(model)
    if not found:
        raise ValueError("nothing is attached to any layer of the model, so there are no codes to write; compress it first")
    return attach_plan(deepcopy(model), {n: entropy_coded(p, coder) for n, p in found.items()})
