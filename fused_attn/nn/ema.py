"""EMA: efficient multi-scale attention."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small


@eager_where_small()
class EMA(reference.EMA):
    """Efficient multi-scale attention: groups of channels, each times a gate a position.

    In a group g of c = channels // factor channels: the means over W and over H go through one 1x1 convolution and
    a sigmoid; u = GroupNorm(g * rows * columns), one group a channel; v = a 3x3 convolution of g. The gate is
    sigmoid(softmax(mean(u)) . v + softmax(mean(v)) . u), softmax and product over channels, mean over space.
    mean(u) is the GroupNorm's bias whatever x is, so that softmax is taken of the bias.

    Args:
        channels: C, the channels of the map.
        factor: number of groups; divides `channels`. All groups share the parameters.

    `forward(x)`: x (B, C, H, W); a map of the same shape. The last product is one fused op; the convolutions and the
    GroupNorm before it are PyTorch's.

    Keys: those of the authors' code, `gn.weight` (c,), `gn.bias`, `conv1x1.weight` (c, c, 1, 1), `conv1x1.bias`,
    `conv3x3.weight` (c, c, 3, 3), `conv3x3.bias`.

    Raises:
        ValueError: factor does not divide channels, or is not positive.

    Source: Efficient Multi-Scale Attention, arXiv:2305.13563; equivalent to the authors' `EMA`.
    """

    _scale = staticmethod(functional.scale)
