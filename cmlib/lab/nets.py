"""The kit's networks, small enough to answer while a slider moves and written in torch's own layers.

They take floats in [0, 1] of shape (N, C, H, W) and give class scores (logits). Layer names are part of the contract: they are
what ``where=`` matches and what files store.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


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


NETS: dict[str, Callable[..., nn.Module]] = {f.__name__: f for f in (linear, lenet300, lenet5, resnet, mlp, cnn)}
