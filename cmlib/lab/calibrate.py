"""From floats to codes of few bits without training: batch norms folded away, ranges read off training images, the shift of each output corrected.

The ranges' rules and what a code stands for are in ``ranges``.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fusion

from ..core.apply import weighted, with_plain_weights
from ..core.channels import LAYERS, UntraceableError
from ..core.inputs import sample
from .ranges import PER, RULES, Affine, Histogram, Range, affine, counted, known_bits, rule, varied, weight_affine
from .train import batches, evaluate, evaluating

SAMPLES = 512  # training images that ranges are read from


def traced(model: nn.Module) -> fx.GraphModule:
    """The model's forward pass as a graph over its own layers. UntraceableError where torch.fx cannot follow it."""
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        raise UntraceableError(
            f"torch.fx cannot follow the forward pass of {type(model).__name__} ({type(error).__name__}: {str(error)[:200]}); "
            "give a network whose path does not depend on its numbers"
        ) from error


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy with plain weights and the same outputs in evaluation, in which each batch norm right behind a convolution or dense layer is part of it.

    w <- gamma w / sqrt(var + eps), b <- gamma (b - mean) / sqrt(var + eps) + beta; an identity stands where the norm was. A norm that has no
    statistics of its own, or whose layer's outputs or weights also go elsewhere, stays. UntraceableError where the forward pass cannot be followed.
    """
    folded = with_plain_weights(model)
    calls = [node for node in traced(folded).graph.nodes if node.op == "call_module"]
    once = {node.target: node for node in calls if sum(other.target == node.target for other in calls) == 1}
    for name, node in once.items():
        norm = folded.get_submodule(name)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        before = node.args[0]
        if len(before.users) > 1 or once.get(before.target) is not before:
            continue
        layer = folded.get_submodule(before.target)
        if isinstance(layer, LAYERS):
            fuse = fusion.fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fusion.fuse_conv_bn_eval
            folded.set_submodule(before.target, fuse(layer, norm))
            folded.set_submodule(name, nn.Identity())
    return folded


def histograms(model: nn.Module, data: Any, *, samples: int = SAMPLES) -> dict[str, Histogram]:
    """{layer: what goes into it} for each convolution and dense layer, in one pass over ``samples`` training images; a pair stands for its own part.

    ValueError where there are no images, or where a layer meets one value only or one that is not finite.
    """
    if samples < 1:
        raise ValueError(f"samples={samples!r}: ranges are read from one training image at least")
    found: dict[str, Histogram] = {}
    layers = weighted(model)

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], *, name: str) -> None:
        counted(found, name, inputs[0])

    handles = [layer.register_forward_pre_hook(partial(note, name=name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            for x in batches(sample(data, samples)[0], 64, model):
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return varied(found)


def input_ranges(model: nn.Module, data: Any, how: str = "minmax", *, bits: int = 8, samples: int = SAMPLES) -> dict[str, Range]:
    """{layer: (lo, hi)} of the inputs of each convolution and dense layer on training images, by the rule ``how`` of ``RULES``.

    ``bits`` matters to entropy and mse. ValueError for what ``histograms`` refuses, a rule not known, or bits outside 1 to 16.
    """
    chosen, _ = rule(how), known_bits(bits)
    return {name: chosen(h, bits) for name, h in histograms(model, data, samples=samples).items()}


def quantized_weight(name: str, w: Tensor, bits: int, per: str) -> Affine:
    """``weight_affine`` of a layer's weight; a ValueError names the layer."""
    try:
        return weight_affine(w, bits, per)
    except ValueError as error:
        raise ValueError(f"layer {name} cannot be quantized: {error}") from error


def simulated(model: nn.Module, ranges: dict[str, Range], *, bits: int = 8, per: str = "tensor") -> nn.Module:
    """A copy that computes in floats with what codes of ``bits`` bits stand for: weights, and the inputs of each layer of ``ranges``."""
    copy = with_plain_weights(model)
    for name, span in ranges.items():
        layer = copy.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(quantized_weight(name, layer.weight, bits, per).rounded(layer.weight))
        layer.register_forward_pre_hook(_FakeInput(affine(*span, bits)))
    return copy


@dataclass(frozen=True)
class _FakeInput:
    """A forward pre-hook: the layer sees what its input's codes stand for."""

    affine: Affine

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.affine.rounded(inputs[0])


def bias_correction(model: nn.Module, quantized: nn.Module, data: Any, *, samples: int = SAMPLES) -> nn.Module:
    """A copy of ``quantized`` whose layers say the same on average as those of ``model``: E[output] - E[dense output] of each channel off its bias.

    Layer by layer in the model's order, each behind those that are corrected already (Nagel et al. 2019, Data-free quantization through weight
    equalization and bias correction, appendix D), on ``samples`` training images. ValueError where the two have different layers.
    """
    corrected, images = deepcopy(quantized), sample(data, samples)[0]
    layers = weighted(corrected)
    if layers.keys() != weighted(model).keys():
        raise ValueError(
            f"the two networks have different layers, {', '.join(layers)} and {', '.join(weighted(model))}; quantize a copy of the other"
        )
    wanted = _output_means(model, images, layers)
    for name in wanted:
        layer = layers[name]
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight.flatten(1)[:, 0]))
        with torch.no_grad():
            layer.bias -= (_output_means(corrected, images, [name])[name] - wanted[name]).to(layer.bias)
    return corrected


def _output_means(model: nn.Module, images: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """{layer: the mean of each of its output channels over the images (and positions)}, float64."""
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, *, name: str) -> None:
        each = out.double().movedim(-1 if isinstance(layer, nn.Linear) else 1, 0).flatten(1)
        total[name] = total.get(name, 0) + each.sum(1)
        count[name] = count.get(name, 0) + each.shape[1]

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name=name)) for name in names]
    try:
        with evaluating(model):
            for x in batches(images, 64, model):
                model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: t / count[name] for name, t in total.items()}


def compared(
    model: nn.Module,
    data: Any,
    *,
    bits: Iterable[int] = (8, 6, 5, 4, 3),
    how: Iterable[str] = tuple(RULES),
    per: Iterable[str] = PER,
    corrected: bool = False,
    samples: int = SAMPLES,
) -> pd.DataFrame:
    """Validation accuracy of the folded model with weights and inputs of few bits: how, bits, per, accuracy; ranges from training images.

    With ``corrected`` the biases are, too.
    """
    folded, rows = fold_batch_norm(model), []
    seen = histograms(folded, data, samples=samples)
    for name in how:
        for b in bits:
            ranges = {layer: rule(name)(h, b) for layer, h in seen.items()}
            for p in per:
                net = simulated(folded, ranges, bits=b, per=p)
                net = bias_correction(folded, net, data, samples=samples) if corrected else net
                rows.append({"how": name, "bits": b, "per": p, "accuracy": evaluate(net, data)})
    return pd.DataFrame(rows)
