"""The kit's networks, small enough to answer while a slider moves and written in torch's own layers.

They take floats in [0, 1] of shape (N, C, H, W) and give class scores (logits). Layer names are part of the contract: they are
what ``where=`` matches and what files store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.apply import weighted
from ..core.method import Method
from ..core.planner import covered
from ..methods import find
from ..methods.formats import range_scale


def _chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def linear(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """A linear softmax classifier: the floor that any deeper network must beat."""
    c, h, w = shape
    return _chain(flatten=nn.Flatten(), fc=nn.Linear(c * h * w, classes))


def lenet300(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): three dense layers, 266,610 parameters on 28 by 28 images."""
    c, h, w = shape
    return _chain(
        flatten=nn.Flatten(),
        fc1=nn.Linear(c * h * w, 300), relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100), relu2=nn.ReLU(),
        fc3=nn.Linear(100, classes),
    )  # fmt: skip


def lenet5(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """LeNet-5 as the pruning papers use it (the Caffe example's 20-50-500-10): 431,080 parameters on 28 by 28 images."""
    c, h, w = shape
    side = ((h - 4) // 2 - 4) // 2, ((w - 4) // 2 - 4) // 2
    return _chain(
        conv1=nn.Conv2d(c, 20, 5), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(20, 50, 5), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(50 * side[0] * side[1], 500), relu=nn.ReLU(),
        fc2=nn.Linear(500, classes),
    )  # fmt: skip


class Residual(nn.Module):
    """Two 3 by 3 convolutions with batch norm and a shortcut around them (He et al. 2016); ``stride`` 2 halves the picture."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = _chain(conv=nn.Conv2d(cin, cout, 1, stride, bias=False), bn=nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """A small residual network with batch norm: 147,066 parameters and 9.3 million multiply-adds on a 28 by 28 image."""
    return _chain(
        conv=nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), bn=nn.BatchNorm2d(16), relu=nn.ReLU(),
        block1=Residual(16, 32, 2),
        block2=Residual(32, 64, 2),
        block3=Residual(64, 64),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        fc=nn.Linear(64, classes),
    )  # fmt: skip


class BiReal(nn.Module):
    """A 3 by 3 convolution and batch norm with a shortcut of their own (Liu et al. 2018, Bi-Real net, figure 3).

    The real sum goes on; the sign is taken in front of the convolution. The border of zeros is added before it, so that their sign is +1.
    """

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(cin, cout, 3, stride, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            pool = nn.AvgPool2d(stride, ceil_mode=True)
            self.shortcut = _chain(pool=pool, conv=nn.Conv2d(cin, cout, 1, bias=False), bn=nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.pad(x))) + self.shortcut(x)


def bireal(shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10) -> nn.Module:
    """Bi-Real's form of ``resnet``: the same convolutions, no ReLU, and a shortcut around each.

    The 1-bit ones are ``where="block*, !*shortcut*"``; first, last and shortcuts stay real.
    """
    return _chain(
        conv=nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False), bn=nn.BatchNorm2d(16),
        block1=BiReal(16, 32, 2), block2=BiReal(32, 32),
        block3=BiReal(32, 64, 2), block4=BiReal(64, 64),
        block5=BiReal(64, 64), block6=BiReal(64, 64),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        fc=nn.Linear(64, classes),
    )  # fmt: skip


def mlp(shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10) -> nn.Module:
    """64-32-10 with ReLU for the 8 by 8 digits: small enough for a whole Hessian (2,410 parameters)."""
    c, h, w = shape
    return _chain(flatten=nn.Flatten(), fc1=nn.Linear(c * h * w, 32), relu=nn.ReLU(), fc2=nn.Linear(32, classes))


def cnn(shape: tuple[int, int, int] = (1, 8, 8), classes: int = 10) -> nn.Module:
    """Two 3 by 3 convolutions of 8 and 16 filters with batch norm, for the 8 by 8 digits."""
    return _chain(
        conv1=nn.Conv2d(shape[0], 8, 3), bn1=nn.BatchNorm2d(8), relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3), bn2=nn.BatchNorm2d(16), relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        fc=nn.Linear(16, classes),
    )  # fmt: skip


def signed(model: nn.Module) -> nn.Module:
    """A copy of a chain of layers for inputs of one bit: batch norm before every weighted layer but the first and at the end, and no ReLU.

    What the layers read is then of both signs and of size one (Courbariaux et al. 2016, BNN; Rastegari et al. 2016, XNOR-Net, figure 3); after a ReLU
    every sign is +1. Layers keep their names and weights; the batch norms are new, so that the copy is to be trained. ValueError for a model
    that is no chain.
    """
    if not isinstance(model, nn.Sequential) or any(list(m.children()) for m in model):
        raise ValueError(f"signed() takes a chain of single layers (nn.Sequential), whose ReLUs it can see; got {type(model).__name__} of blocks")
    layers, parts = list(weighted(model)), {}
    for name, m in deepcopy(model).named_children():
        if name in layers[1:]:
            parts[f"norm_{name}"] = nn.BatchNorm2d(m.in_channels) if isinstance(m, nn.Conv2d) else nn.BatchNorm1d(m.in_features)
        if not isinstance(m, (nn.ReLU, nn.BatchNorm2d)):
            parts[name] = m
    return _chain(**parts, norm=nn.BatchNorm1d(len(model.get_submodule(layers[-1]).weight))).train(model.training)


class RangeNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm by range (Banner et al. 2018): y = gamma (x - mean) / s + beta, s = ``range_scale`` of each channel over a batch.

    In evaluation it is the common batch norm, whose running variance is that of s^2.
    """

    chunks = 1

    def forward(self, x: Tensor) -> Tensor:
        mean, power = self.running_mean, self.running_var
        if self.training:
            rows = x.transpose(0, 1).flatten(1).T
            mean, power = rows.mean(0), range_scale(rows, self.chunks).square()
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(power, self.momentum)
        a = (power + self.eps).rsqrt() * (1 if self.weight is None else self.weight)
        b = (0 if self.bias is None else self.bias) - mean * a
        return x * a.reshape(-1, *[1] * (x.dim() - 2)) + b.reshape(-1, *[1] * (x.dim() - 2))


def range_normed(model: nn.Module) -> nn.Module:
    """A copy whose batch norms are by range; names, weights and running statistics stay, so that it is to be trained a little."""
    copy = deepcopy(model)
    for m in copy.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__class__ = RangeNorm
    return copy


def swapped(model: nn.Module, block: Method | str, *, where: str = "Conv2d", **knobs: Any) -> nn.Module:
    """A copy in which every convolution that ``where`` names is a new ``block`` of its channels, kernel size, stride and padding; to be trained.

    ValueError for a method that is no block, and for a layer that is no plain 2-D convolution with a square kernel.
    """
    method, copy = find(block), deepcopy(model)
    if method.kind != "block":
        raise ValueError(f"{method.key} is a {method.kind}, not a block; compress() puts it on the layers that are there")
    knobs = method.bind(knobs)
    for name, layer in covered(copy, where).items():
        shape = {n: getattr(layer, n, None) for n in ("kernel_size", "stride", "padding")}
        same = all(isinstance(v, tuple) and len(v) == 2 and v[0] == v[1] for v in shape.values())
        if not same or layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            raise ValueError(f"layer {name} is no plain 2-D convolution with a square kernel: {layer}; leave it out with where=...")
        given = {**knobs, **{n: v[0] for n, v in shape.items()}, "bias": layer.bias is not None}
        copy.set_submodule(name, method(layer.in_channels, layer.out_channels, **given).to(layer.weight).train(layer.training))
    copy.__dict__.pop("source", None)  # it is the kit's network no more
    return copy


NETS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (linear, lenet300, lenet5, resnet, bireal, mlp, cnn)}
