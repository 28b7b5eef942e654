"""External attention: positions against a memory that all samples share."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .normalised import normalised
from .squeeze_excite import positive_int


def look_up(x: Tensor, query: Any, keys: Any, values: Any, output: Any) -> Tensor:
    """output(values a), a the softmax of keys(query(x)) over positions, divided by its sums over the memory."""
    a = F.softmax(keys(query(x).flatten(2)), 2)
    a = a / (1e-9 + a.sum(1, keepdim=True))
    return output(values(a).unflatten(2, x.shape[2:]))


class ExternalAttention(Block):
    """See `fused_attn.nn.ExternalAttention`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _look_up = staticmethod(look_up)
    _normalised = staticmethod(normalised)

    def __init__(self, channels: int, *, memory: int = 64) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        positive_int("memory", memory)
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.linear_0 = nn.Conv1d(channels, memory, 1, bias=False)
        self.linear_1 = nn.Conv1d(memory, channels, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        for layer in self.modules():
            if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.out_channels))
            if isinstance(layer, nn.Conv2d) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, memory={self.linear_0.out_channels}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected (B, {self.channels}, H, W); got shape {tuple(x.shape)}")
        output, norm = self.conv2
        y = self._look_up(x, self.conv1, self.linear_0, self.linear_1, output)
        return self._normalised(norm, y, residual=x, post_activation="relu")
