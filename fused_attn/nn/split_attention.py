"""Split attention."""

from __future__ import annotations

from .. import reference
from .selection import selection


class SplitAttention(reference.SplitAttention):
    """Split attention of ResNeSt: one grouped convolution makes `radix` splits, which are weighted and summed.

    The convolution, BatchNorm and activation give radix * out_channels channels; s, the mean over space of the splits'
    sum, goes through fc1, BatchNorm, the activation and fc2, in `groups` groups, to a logit a split and channel; the
    softmax over the splits (the sigmoid for radix 1) weighs them. The splits are read where the convolution put them;
    in eval the normalised map is not written.

    Args:
        in_channels: of the map.
        out_channels: of the result; by default as many.
        kernel_size, stride, padding, dilation, bias: of the convolution; padding by default kernel_size // 2.
        groups: cardinality; the convolution has groups * radix groups.
        radix: number of splits.
        rd_ratio, rd_divisor: the excitation is in_channels * radix * rd_ratio wide, at least 32, rounded to a multiple
            of rd_divisor.
        rd_channels: the excitation is rd_channels * radix wide, instead.
        activation: a name in `fused_attn.codes.ACTIVATIONS`.
        batch_norm: whether there are BatchNorms, behind the convolution and behind fc1.

    `forward(x)`: x (B, in_channels, H, W); a map (B, out_channels, H', W'). With BatchNorm, in training B must be at
    least 2.

    Keys: timm's and the authors', `conv.weight`, `bn0.*`, `fc1.weight`, `fc1.bias`, `bn1.*`, `fc2.weight`, `fc2.bias`.

    Raises:
        ValueError: an option is out of range, groups do not divide the channels, or one sample in training.

    Source: ResNeSt, arXiv:2004.08955; equivalent to timm's `SplitAttn`.
    """

    _selection = staticmethod(selection)
