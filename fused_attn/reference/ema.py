"""EMA: efficient multi-scale attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import Block
from .block_attention import check_channels, check_rank
from .scale import scale
from .squeeze_excite import positive_int


class EMA(Block):
    """See `fused_attn.nn.EMA`."""

    #: The function of the last product; `fused_attn.nn` puts the fused one here.
    _scale = staticmethod(scale)

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
        check_rank(2, x)
        check_channels(self.channels, x)
        height, width = x.shape[2:]
        group = x.reshape(x.shape[0] * self.factor, self.channels // self.factor, height, width)
        rows, columns = group.mean(3, keepdim=True), group.mean(2, keepdim=True)
        strip = self.conv1x1(torch.cat([rows, columns.transpose(2, 3)], 2)).sigmoid()
        rows, columns = strip.split([height, width], 2)
        u = self.gn(group * rows * columns.transpose(2, 3))
        v = self.conv3x3(group)
        fixed = self.gn.bias.softmax(0)[:, None, None]
        pooled = v.mean((2, 3), keepdim=True).softmax(1)
        gate = (fixed * v + pooled * u).sum(1, keepdim=True).sigmoid()
        return self._scale(group, gate).reshape(x.shape)
