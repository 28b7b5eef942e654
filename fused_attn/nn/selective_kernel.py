"""Selective kernels: SKConv as published, SelectiveKernel as in timm."""

from __future__ import annotations

from .. import reference
from .selection import selection


class SKConv(reference.SKConv):
    """Selective kernel convolution: branches of different receptive fields, weighted by what is in all of them.

    M branches, each a grouped 3x3 convolution of dilation 1, 2, ..., M, BatchNorm and ReLU; s, the mean over space of
    their sum, goes through fc1 (1x1 convolution, BatchNorm, ReLU) and fc2 (1x1 convolution) to M logits a channel; the
    branches are summed with the softmax of these. In eval neither a normalised branch nor the sum of all is written.

    Args:
        in_channels: of the map.
        out_channels: of the result; by default as many.
        stride: of the branches.
        M: number of branches.
        r, L: fc1 is max(channels // r, L) wide.
        groups: of the branches' convolutions.
        dim_from: which channels these are, "in" (most ports) or "out" (the authors).

    `forward(x)`: x (B, in_channels, H, W); a map (B, out_channels, H', W'). In training B must be at least 2: the
    BatchNorm of fc1 has one value a sample.

    Keys: `conv.{i}.0.weight`, `conv.{i}.1.*`, `fc1.0.weight` (width, out, 1, 1), `fc1.1.*`, `fc2.weight`
    (M * out, width, 1, 1), the rows of which are M branches of out channels. Checkpoints of pytorchcv's `SKConvBlock`
    load too.

    Raises:
        ValueError: an option is out of range, groups do not divide the channels, or one sample in training.

    Source: Selective Kernel Networks, arXiv:1903.06586.
    """

    _selection = staticmethod(selection)


class SelectiveKernel(reference.SelectiveKernel):
    """Selective kernel convolution as in timm.

    As `SKConv`, with each branch taking its share of the input's channels.

    Args:
        in_channels: of the map.
        out_channels: of the result; by default as many.
        kernel_size: of each branch, all odd and at least 3; one number stands for two branches of that size.
        stride, dilation, groups: of the branches' convolutions.
        rd_ratio, rd_divisor: the excitation is out_channels * rd_ratio wide, rounded to a multiple of rd_divisor.
        rd_channels: explicit width of it, instead.
        keep_3x3: larger kernels are 3x3 with dilation.
        split_input: each branch takes in_channels / M of the channels; else all of them.
        activation: the branches', a name in `fused_attn.codes.ACTIVATIONS`; the excitation's is ReLU.

    `forward(x)`: x (B, in_channels, H, W); a map (B, out_channels, H', W'). In training B must be at least 2.

    Keys: timm's, `paths.{i}.conv.weight`, `paths.{i}.bn.*`, `attn.fc_reduce.weight`, `attn.bn.*`,
    `attn.fc_select.weight`.

    Raises:
        ValueError: an option is out of range, groups do not divide the channels, or one sample in training.

    Source: Selective Kernel Networks, arXiv:1903.06586; equivalent to timm's `SelectiveKernel`.
    """

    _selection = staticmethod(selection)
