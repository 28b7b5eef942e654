"""EMA: efficient multi-scale attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .squeeze_excite import positive_int


class EMA(nn.Module):
    """Efficient multi-scale attention: groups of channels, each times a gate a position.

    In a group g of c = channels // factor channels: the means over W and over H go through one 1x1 convolution and
    a sigmoid; u = GroupNorm(g * rows * columns), one group a channel; v = a 3x3 convolution of g. The gate is
    sigmoid(softmax(mean(u)) . v + softmax(mean(v)) . u), softmax and product over channels, mean over space.
    mean(u) is the GroupNorm's bias whatever x is, so that softmax is taken of the bias.

    Args:
        channels: C, the channels of the map.
        factor: number of groups; divides `channels`. All groups share the parameters.

    `forward(x)`: x (B, C, H, W); a map of the same shape.

    Keys: those of the authors' code, `gn.weight` (c,), `gn.bias`, `conv1x1.weight` (c, c, 1, 1), `conv1x1.bias`,
    `conv3x3.weight` (c, c, 3, 3), `conv3x3.bias`.

    Raises:
        ValueError: factor does not divide channels, or is not positive.

    Source: Efficient Multi-Scale Attention, arXiv:2305.13563; equivalent to the authors' `EMA`.
    """

    def __init__(self, channels: int, *, factor: int = 32) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.factor = positive_int("factor", factor)
        if channels % factor:
            raise ValueError(f"factor: expected a divisor of channels, {channels}; got {factor}")
        width = channels // factor
        self.gn = nn.GroupNorm(width, width)
        self.conv1x1 = nn.Conv2d(width, width, 1)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)

    def extra_repr(self) -> str:
        return f"{self.channels}, factor={self.factor}"

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        group = x.reshape(-1, self.channels // self.factor, height, width)
        rows, columns = group.mean(3, keepdim=True), group.mean(2, keepdim=True)
        strip = self.conv1x1(torch.cat([rows, columns.transpose(2, 3)], 2)).sigmoid()
        rows, columns = strip.split([height, width], 2)
        u = self.gn(group * rows * columns.transpose(2, 3))
        v = self.conv3x3(group)
        fixed = self.gn.bias.softmax(0)[:, None, None]
        pooled = v.mean((2, 3), keepdim=True).softmax(1)
        gate = (fixed * v + pooled * u).sum(1, keepdim=True).sigmoid()
        return (group * gate).reshape(x.shape)
