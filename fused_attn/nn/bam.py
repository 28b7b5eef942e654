"""BAM: the bottleneck attention module."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small


@eager_where_small()
class BAM(reference.BAM):
    """Bottleneck attention: x * (1 + sigmoid(c * s)), c one number a channel, s one a position.

    c: the mean over space through dense layers to channels // reduction, each with BatchNorm and ReLU, and one back.
    s: x through a 1x1 convolution to channels // reduction, dilated 3x3 convolutions, each with BatchNorm and ReLU,
    and a 1x1 convolution to one channel.

    Args:
        channels: C, the channels of the map.
        reduction: both branches are channels // reduction wide.
        num_layers: dense layers before the last.
        dilated_convs: number of 3x3 convolutions.
        dilation: their dilation.
        rank: number of spatial axes, 1 to 3.

    `forward(x)`: x (B, C, *spatial); a map of the same shape. In training B must be at least 2, as in the original:
    the BatchNorm of the channel branch has one value a sample.

    Keys: those of the authors' code, `channel_att.gate_c.gate_c_fc_0.weight` and so on.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel.

    Source: BAM, arXiv:1807.06514; equivalent to the authors' `BAM` (the paper has c + s, the code and its weights
    c * s) on square maps. On others the authors pool over height x height only, which is an error or no global mean;
    here the pool is always global.
    """

    _squeeze = staticmethod(functional.squeeze)
    _mixed_scale = staticmethod(functional.mixed_scale)
