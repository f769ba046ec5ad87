"""A network that runs in whole numbers alone: uint8 codes, int32 sums, fixed-point rescaling (Jacob et al. 2018, section 2).

A layer's output codes are q3 = Z3 + M (sum (q1 - Z1)(q2 - Z2) + bias), M = S1 S2 / S3 = 2^-n M0, where M0 in [0.5, 1) is a whole number over 2^31
and the bias a whole number of S1 S2. Where a ReLU follows, the output's range begins at 0, so that its clamp is the ReLU. The images are codes as
they are: S = 1/255, Z = 0.

Sums are torch's int32; that none can leave it is shown from the weights when the network is made. Whole numbers are multiplied on the CPU only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..core.apply import weighted
from ..core.inputs import pair_of, sample
from ..core.perforate import places_of
from ..core.sites import input_of
from .calibrate import SAMPLES, fold_batch_norm, traced
from .ranges import PER, Affine, Histogram, affine, counted, rule, varied, weight_affine
from .train import batches

INT32 = 2**31
LEFT = 20  # bits that the codes of a sum are moved up by, so that bringing both to one scale loses nothing (as TensorFlow Lite does)


class IntegerError(ValueError):
    """A network has no form in whole numbers; the message names the layer."""


def fixed_point(m: Tensor) -> tuple[Tensor, Tensor]:
    """(M0, n) with M = 2^-n M0 / 2^31: int32 M0 in [2^30, 2^31), n uint8. IntegerError for a multiplier outside (0, 1)."""
    if not ((m > 0) & (m < 1)).all():
        raise IntegerError(
            f"its output codes would be finer than its sums (a multiplier of {m.max():.3g}, not below 1); give more bits or another range"
        )
    mantissa, exponent = torch.frexp(m.double())
    whole = (mantissa * INT32).round().long()
    over = whole == INT32  # 1 to 31 bits, which is half of it moved up, or just below it where nothing can move up
    top = torch.where(exponent == 0, INT32 - 1, INT32 // 2)
    return torch.where(over, top, whole).int(), (-exponent - over.int()).clamp(min=0).to(torch.uint8)


def high_product(a: Tensor, b: Tensor) -> Tensor:
    """gemmlowp's SaturatingRoundingDoublingHighMul of int32s, a b / 2^31 to the nearest, halves upward; b > 0, so nothing saturates. int64."""
    return (a.long() * b).add_(1 << 30).bitwise_right_shift_(31)


def shifted(x: Tensor, n: Tensor) -> Tensor:
    """gemmlowp's RoundingDivideByPOT of int64s, x / 2^n to the nearest, halves away from zero."""
    half = (1 << n.long()) >> 1
    return (x >> 63).bitwise_and_(-half.sign()).add_(x).add_(half).bitwise_right_shift_(n.long())


def rescaled(x: Tensor, m0: Tensor, n: Tensor) -> Tensor:
    """M x of int32s, as int64."""
    return shifted(high_product(x, m0), n)


class _Step(nn.Module):
    """A step whose numbers are buffers, so that they are stored and counted."""

    def hold(self, **tensors: Tensor) -> None:
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def codes_of(self, x: Tensor) -> Tensor:
        """uint8 codes from whole numbers of the output's scale."""
        return (x + self.zero_out).clamp(0, self.top).to(torch.uint8)


class Layer(_Step):
    """A convolution or dense layer: uint8 codes in, uint8 codes out."""

    def __init__(self, layer: nn.Conv2d | nn.Linear, weight: Affine, into: Affine, out: Affine) -> None:
        super().__init__()
        conv = isinstance(layer, nn.Conv2d)
        if conv and layer.padding_mode != "zeros":
            raise IntegerError(f"it pads with {layer.padding_mode!r}; only zeros have a code here")
        self.how = {k: getattr(layer, k) for k in ("stride", "padding", "dilation", "groups")} if conv else {}
        self.product = F.conv2d if conv else F.linear
        self.wide = (-1, 1, 1) if conv else (-1,)  # a number a filter, as it meets the outputs
        bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
        weight = _reaching(weight, bias / into.scale)
        scale = (weight.scale.double() * into.scale.double()).reshape(-1)
        bias = (bias.double() / scale).round()
        codes = weight.quantize(layer.weight.detach()).contiguous()
        m0, n = fixed_point(scale / out.scale.double())
        self.hold(codes=codes.to(torch.uint8), zero=weight.zero.to(torch.uint8), zero_in=into.zero.to(torch.uint8))
        self._check(codes - weight.zero, bias, into)
        self.hold(bias=bias.int(), m0=m0, n=n, zero_out=out.zero.to(torch.uint8))
        self.top = out.count - 1

    def _check(self, w: Tensor, bias: Tensor, into: Affine) -> None:
        """IntegerError unless every sum, whatever the codes, stays below 2^31: largest |q1 - Z1| times the sum of |q2 - Z2|, and the bias."""
        largest = max(int(into.zero), into.count - 1 - int(into.zero)) * w.long().abs().flatten(1).sum(1) + bias.abs()
        if not largest.max() < INT32:
            raise IntegerError(f"its sums could reach {largest.max():.3g}, beyond 32 bits; give fewer bits, or a bias that its range holds")

    def sums(self, q: Tensor) -> Tensor:
        """sum (q1 - Z1)(q2 - Z2) + bias, int32."""
        x = q.int() - self.zero_in
        return self.product(x, self.codes.int() - self.zero, None, **self.how) + self.bias.reshape(self.wide)

    def forward(self, q: Tensor) -> Tensor:
        return self.codes_of(rescaled(self.sums(q), self.m0.reshape(self.wide), self.n.reshape(self.wide)))


def _reaching(weight: Affine, bias: Tensor) -> Affine:
    """``weight`` with scales no finer than lets 31 bits hold the biases: beside its bias a filter of next to nothing is nothing."""
    least = torch.where(bias.isfinite(), bias.abs() / 2**30, 0)
    least = least.reshape(weight.scale.shape) if weight.scale.dim() else least.max()
    return replace(weight, scale=torch.maximum(weight.scale, least.to(weight.scale)))


class Sum(_Step):
    """Two inputs of different scales added: both brought to twice the larger scale over 2^20, then to the output's."""

    def __init__(self, a: Affine, b: Affine, out: Affine) -> None:
        super().__init__()
        common = 2 * max(a.scale.double(), b.scale.double())
        m0, n = zip(*(fixed_point(m) for m in (a.scale.double() / common, b.scale.double() / common, common / (out.scale.double() * 2**LEFT))))
        self.hold(m0=torch.stack(m0), n=torch.stack(n), zeros=torch.stack([a.zero, b.zero]).to(torch.uint8), zero_out=out.zero.to(torch.uint8))
        self.top = out.count - 1

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = sum(rescaled(q.int() - self.zeros[i] << LEFT, self.m0[i], self.n[i]) for i, q in enumerate((a, b)))
        return self.codes_of(rescaled(total, self.m0[2], self.n[2]))


class Clamp(_Step):
    """A ReLU that does not stand right behind a layer: codes from that of 0 on."""

    def __init__(self, into: Affine) -> None:
        super().__init__()
        self.hold(zero=into.zero.to(torch.uint8))

    def forward(self, q: Tensor) -> Tensor:
        return torch.maximum(q, self.zero)


class Mean(nn.Module):
    """The mean over all positions of a map, halves upward: (N, C, H, W) to (N, C, 1, 1), codes of the same scale."""

    def forward(self, q: Tensor) -> Tensor:
        n = q.shape[2] * q.shape[3]
        return ((2 * q.sum((2, 3), keepdim=True) + n) // (2 * n)).to(torch.uint8)


class IntegerNet(nn.Module):
    """A network of steps on uint8 codes: uint8 images (N, C, H, W) in, uint8 codes of the logits (N, classes) out, no float between.

    ``wires`` says of each step which values go in: 0 the images, k the k-th step's output. ``out`` is what the codes of the logits stand for.
    """

    def __init__(self, steps: list[nn.Module], wires: list[tuple[int, ...]], out: Affine) -> None:
        super().__init__()
        self.steps, self.wires, self.out = nn.ModuleList(steps), wires, out
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            raise TypeError(f"an integer network takes uint8 images, 0 to 255, as they are in the data; got {images.dtype}")
        values = [images]
        for step, wires in zip(self.steps, self.wires, strict=True):
            values.append(step(*(values[i] for i in wires)))
        return values[-1]

    @property
    def bytes(self) -> int:
        """What its weights, biases, multipliers and zero points take as they stand here: a byte a code, however few its bits."""
        return sum(b.nbytes for b in self.buffers())

    def predict(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Codes of the logits for all uint8 ``images``."""
        return torch.cat([self(part) for part in images.split(batch)])

    def evaluate(self, data: Any, *, part: str = "validation", batch: int = 64) -> float:
        """Accuracy in [0, 1] on the named part of a data set, or on a pair (images, labels)."""
        images, labels = pair_of(data, part)
        return (self.predict(images, batch=batch).argmax(1) == labels).double().mean().item()


def _layer(op: nn.Module, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    return Layer(op, weight_affine(op.weight, making.bits, making.per), into[0], out)


def _sum(op: fx.Node, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    if len(into) != 2 or op.kwargs:
        raise IntegerError("it adds something else than the outputs of two steps")
    return Sum(*into, out)


def _relu(op: Any, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    return Clamp(into[0]) if into[0].zero else nn.Identity()


def _mean(op: nn.AdaptiveAvgPool2d, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    if op.output_size not in (1, (1, 1)):
        raise IntegerError(f"it gives maps of {op.output_size}; only the mean over the whole map is written here")
    return Mean()


def _as_is(op: nn.Module, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    return op


def _flatten(op: fx.Node, into: list[Affine], out: Affine, making: _Making) -> nn.Module:
    if op.args[1:] != (1,) or op.kwargs:
        raise IntegerError("only torch.flatten(x, 1) is written here")
    return nn.Flatten()


SCALED: dict[Any, Callable] = {nn.Conv2d: _layer, nn.Linear: _layer, operator.add: _sum, operator.iadd: _sum, torch.add: _sum}
RELU: dict[Any, Callable] = {nn.ReLU: _relu, F.relu: _relu, torch.relu: _relu}
OTHERS: dict[Any, Callable] = {
    nn.MaxPool2d: _as_is, nn.Flatten: _as_is, torch.flatten: _flatten, nn.AdaptiveAvgPool2d: _mean
}  # fmt: skip
IDLE = (nn.Identity, nn.Dropout)
STEPS = SCALED | RELU | OTHERS  # a layer's type or a function -> its step


def integer_network(model: nn.Module, data: Any, *, bits: int = 8, per: str = "tensor", how: str = "minmax", samples: int = SAMPLES) -> IntegerNet:
    """``model`` after folding, in whole numbers: weights and activations of ``bits`` bits, weights with one scale or one a filter (``per``).

    Ranges of what passes between the layers come from ``samples`` training images by the rule ``how`` (``ranges.RULES``). Covered are
    convolutions, dense layers, ReLU, max pooling, flattening, the mean over a map, and sums. IntegerError names any other step, and a layer whose
    sums 32 bits cannot hold; ValueError for a knob outside its range or images that say nothing.
    """
    if not (isinstance(bits, int) and 2 <= bits <= 8) or per not in PER:
        raise ValueError(f"bits={bits!r}, per={per!r}: allowed are bits from 2 to 8, as a code is a byte, and per one of {', '.join(PER)}")
    if rounding := [n for n, m in weighted(model).items() if input_of(m) is not None]:
        raise IntegerError(f"layer {rounding[0]} rounds its inputs already, to levels of its own; give the network before its inputs were quantized")
    if skipping := [n for n, m in weighted(model).items() if places_of(m) is not None]:
        raise IntegerError(f"layer {skipping[0]} works out some places of its map only, which whole numbers do not; give the network before that")
    net, choose = _known(traced(fold_batch_norm(model).cpu())), rule(how)
    images = sample(data, samples)[0]
    if images.dtype != torch.uint8:
        raise ValueError(f"an integer network takes uint8 images, whose codes are known; got {images.dtype}")
    seen = _histograms(net, images)
    made = _Making(net, {node: affine(*choose(h, bits), bits) for node, h in seen.items()}, bits, per)
    for node in net.graph.nodes:
        made.add(node)
    return IntegerNet(made.steps, made.wires, made.out)


def _known(net: fx.GraphModule) -> fx.GraphModule:
    """The graph without steps that do nothing in evaluation or that nobody reads. IntegerError for a step that has no form here."""
    for node in net.graph.nodes:
        if _kind(net, node) in IDLE:
            node.replace_all_uses_with(node.args[0])
    net.graph.eliminate_dead_code()
    net.recompile()
    for node in net.graph.nodes:
        kind = _kind(net, node)
        if node.op not in ("placeholder", "output") and kind not in STEPS:
            known = ", ".join(sorted({k.__name__ for k in STEPS}))
            raise IntegerError(f"{_name(node)} ({getattr(kind, '__name__', kind)}) has no form in whole numbers here; there are {known}")
    return net


def _kind(net: fx.GraphModule, node: fx.Node) -> Any:
    """What a node does: the type of its layer, else its function."""
    return type(net.get_submodule(node.target)) if node.op == "call_module" else node.target


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _histograms(net: fx.GraphModule, images: Tensor) -> dict[fx.Node, Histogram]:
    """{step that makes a scale of its own: what its codes must hold}: what leaves it, or leaves the ReLU that alone reads it."""
    shown = {}
    for node in net.graph.nodes:
        if _kind(net, node) in SCALED:
            first = next(iter(node.users))
            shown[first if len(node.users) == 1 and _kind(net, first) in RELU else node] = node
    found: dict[str, Histogram] = {}

    class Watched(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            out = super().run_node(node)
            if node in shown:
                counted(found, _name(shown[node]), out)
            return out

    with torch.no_grad():
        for x in batches(images, 64, net):
            counted(found, "the network", x)
            Watched(net).run(x)
    varied(found)
    return {node: found[_name(node)] for node in shown.values()}


class _Making:
    """The steps made so far, in the graph's order; ``values`` says of each node where its output stands and what its codes mean."""

    def __init__(self, net: fx.GraphModule, scales: dict[fx.Node, Affine], bits: int, per: str) -> None:
        self.net, self.scales, self.bits, self.per = net, scales, bits, per
        self.values: dict[fx.Node, tuple[int, Affine]] = {}
        self.steps: list[nn.Module] = []
        self.wires: list[tuple[int, ...]] = []

    def add(self, node: fx.Node) -> None:
        """Make the node's step. IntegerError names it where it cannot be made."""
        if node.op == "placeholder":
            self.values[node] = 0, affine(0.0, 1.0)
            return
        inputs = [self.values[n] for n in node.args if isinstance(n, fx.Node)]
        if node.op == "output":
            if [i for i, _ in inputs] != [len(self.steps)]:
                raise IntegerError("the network's output is not that of its last step alone; give one that returns its logits")
            self.out = inputs[0][1]
            return
        op = self.net.get_submodule(node.target) if node.op == "call_module" else node
        try:
            step = STEPS[_kind(self.net, node)](op, [a for _, a in inputs], self.scales.get(node), self)
        except ValueError as error:
            raise IntegerError(f"{_name(node)} has no form in whole numbers: {error}") from error
        self.steps.append(step)
        self.wires.append(tuple(i for i, _ in inputs))
        self.values[node] = len(self.steps), self.scales.get(node) or inputs[0][1]
