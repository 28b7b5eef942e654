"""Coordinate attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codes import ACTIVATIONS, FUNCTIONS, code
from .axis_pool import axis_pool_with_map
from .block import Block
from .block_attention import check_rank
from .mixed_scale import mixed_scale
from .squeeze_excite import finite, positive_int


class CoordinateAttention(Block):
    """See `fused_attn.nn.CoordinateAttention`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _axis_pool = staticmethod(axis_pool_with_map)
    _mixed_scale = staticmethod(mixed_scale)

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 32,
        hidden: int | None = None,
        bias: bool = True,
        activation: str = "hard_swish",
        gate: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if finite("reduction", reduction) <= 0:
            raise ValueError(f"reduction: expected a positive number; got {reduction!r}")
        width = max(8, int(channels // reduction)) if hidden is None else positive_int("hidden", hidden)
        code(ACTIVATIONS, "activation", activation)
        code(ACTIVATIONS, "gate", gate)
        self.activation, self.gate = activation, gate
        self.conv1 = nn.Conv2d(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv_h = nn.Conv2d(width, channels, 1, bias=bias)
        self.conv_w = nn.Conv2d(width, channels, 1, bias=bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, activation={self.activation!r}, gate={self.gate!r}"

    def forward(self, x: Tensor) -> Tensor:
        check_rank(2, x)
        height, width = x.shape[2:]
        x, rows, columns = self._axis_pool(x)
        strip = torch.cat([rows, columns.transpose(2, 3)], 2)
        strip = FUNCTIONS[self.activation](self.bn1(self.conv1(strip)))
        rows, columns = strip.split([height, width], 2)
        gate = FUNCTIONS[self.gate]
        rows, columns = gate(self.conv_h(rows)), gate(self.conv_w(columns.transpose(2, 3)))
        return self._mixed_scale(x, rows=rows, columns=columns)
