"""Coordinate attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codes import ACTIVATIONS, FUNCTIONS, code
from .squeeze_excite import finite, positive_int


class CoordinateAttention(nn.Module):
    """Coordinate attention: x times a gate a row and channel times a gate a column and channel.

    The means over W and over H, (B, C, H + W) together, go through one 1x1 convolution, BatchNorm and activation;
    one convolution each turns the H rows and the W columns into gates.

    Args:
        channels: C, the channels of the map.
        reduction: the shared convolution has max(8, channels // reduction) channels.
        hidden: explicit width of it, instead of `reduction`.
        bias: whether the three convolutions have biases.
        activation, gate: names in `fused_attn.codes.ACTIVATIONS`.

    `forward(x)`: x (B, C, H, W); a map of the same shape.

    Keys: those of the authors' code and of timm, `conv1.weight` (hidden, C, 1, 1), `conv1.bias`, `bn1.*`,
    `conv_h.weight` (C, hidden, 1, 1), `conv_h.bias`, `conv_w.weight`, `conv_w.bias`.

    Raises:
        ValueError: an option is out of range.

    Source: Coordinate Attention, arXiv:2103.02907; equivalent to the authors' `CoordAtt` with as many channels out
    as in, and to timm's `CoordAttn` (bias=False, `hidden` its rd_channels).
    """

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
        height, width = x.shape[2:]
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
        strip = torch.cat([rows, columns.transpose(2, 3)], 2)
        strip = FUNCTIONS[self.activation](self.bn1(self.conv1(strip)))
        rows, columns = strip.split([height, width], 2)
        gate = FUNCTIONS[self.gate]
        return x * gate(self.conv_w(columns.transpose(2, 3))) * gate(self.conv_h(rows))
