"""Chapter 04, quantization: drawn filters that never learn.

Of one bit and a sign, drawn once. A block makes a layer: (channels in, channels out) and what a convolution is told -> nn.Module. (Survey sections
are of the 2020 survey, 001.)
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from ..core.knobs import Span, Steps
from ..core.method import block


class LocalBinary(nn.Module):
    """1 by 1 weights over the ReLU of fixed filters: ``mix(act(anchors(x)))``; only ``mix`` learns."""

    def __init__(self, anchors: nn.Conv2d, mix: nn.Conv2d) -> None:
        super().__init__()
        self.anchors, self.act, self.mix = anchors.requires_grad_(False), nn.ReLU(), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.act(self.anchors(x)))


def ternary(shape: tuple[int, ...], sparsity: float, seed: int) -> Tensor:
    """Zeros with probability ``sparsity``, else -1 or 1 by chance."""
    draw = torch.Generator().manual_seed(seed)
    sign = 2 * torch.randint(0, 2, shape, generator=draw) - 1
    return sign * (torch.rand(shape, generator=draw) >= sparsity)


@block("Juefei-Xu, Naresh Boddeti & Savvides 2017, Local binary convolutional neural networks", chapter="04")
def local_binary_convolution(
    cin: int, cout: int, *, kernel_size: Annotated[int, Span(1, 13, integer=True)] = 3, stride: int = 1, padding: int | None = None,
    bias: bool = False, anchors: Annotated[int, Span(4, 512, log=True, integer=True)] = 64, sparsity: Annotated[float, Span(0, 0.99)] = 0.5,
    seed: Steps = 0,
) -> nn.Module:  # fmt: skip
    """Local binary convolution (LBC).

    x'_t = sum_i relu(b_i * x) V_it: m fixed random filters b_i of -1, 0 and 1 (``anchors``; ``sparsity`` is the share of zeros), a ReLU, and learned
    1 by 1 weights V: m weights an output in place of cin k^2 (survey 001, 2.2.1 (1) [58]). The filters cost less than two bits a number, or nothing
    where they are drawn again from the ``seed``; multiplications do not fall, as m is usually above cin. Without ``padding`` the size stays.
    """
    fixed = nn.Conv2d(cin, anchors, kernel_size, stride, kernel_size // 2 if padding is None else padding, bias=False)
    with torch.no_grad():
        fixed.weight.copy_(ternary(fixed.weight.shape, sparsity, seed))
    return LocalBinary(fixed, nn.Conv2d(anchors, cout, 1, bias=bias))
