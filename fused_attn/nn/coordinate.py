"""Coordinate attention."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small


@eager_where_small()
class CoordinateAttention(reference.CoordinateAttention):
    """Coordinate attention: x times a gate a row and channel times a gate a column and channel.

    The means over W and over H, (B, C, H + W) together, go through one 1x1 convolution, BatchNorm and activation;
    one convolution each turns the H rows and the W columns into gates. One pass over the map makes both means, one
    applies both gates, and backward takes two.

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

    _axis_pool = staticmethod(functional.axis_pool_with_map)
    _mixed_scale = staticmethod(functional.mixed_scale)
