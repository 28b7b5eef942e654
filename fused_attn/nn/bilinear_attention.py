"""Bilinear attentional transforms: blocks of rows and of columns mixed by what the map has in them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .deterministic import torch_has_no_deterministic
from .normalised import normalised
from .small import eager_where_small


def pool_blocks(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As `fused_attn.reference.bilinear_attention.pool_blocks`, with the gradient to the first maximum too; where that
    of adaptive pools raises, deterministic."""
    if not (torch.compiler.is_compiling() or torch_has_no_deterministic(x)):
        return reference.bilinear_attention.pool_blocks(x, n)
    height, width = x.shape[2:]
    rows = x.unflatten(2, (n, height // n)).flatten(3).max(3).values
    columns = x.unflatten(3, (n, width // n)).transpose(2, 3).flatten(3).max(3).values
    return rows.unsqueeze(3), columns.unsqueeze(2)


@eager_where_small()
class BilinearTransform(reference.BilinearTransform):
    """A bilinear attentional transform: y = relu(BatchNorm(conv(P x Q))), P and Q for each group of channels.

    x is cut into block_size blocks of rows and as many of columns. A convolution to one channel a group, BatchNorm and
    ReLU; of its maxima over each block of rows a convolution makes P, of those over each block of columns one makes Q,
    both (block_size, block_size) through a sigmoid, P's rows and Q's columns divided by their sums. They mix the
    blocks: position i of one gets position i of the others.

    timm's code makes P and Q of H x H and W x W numbers a channel. Here P stays as it is, and Q has W x W a group. That
    is two products, each of which reads and writes one map, and a copy of P a channel; a map that lies channels_last
    is turned before and after.

    Args:
        channels: C, of the map.
        block_size: number of blocks along each axis.
        groups: of channels that share P and Q; divides C.

    `forward(x)`: x (B, C, H, W), H and W multiples of block_size; a map of the same shape.

    Keys: timm's, `conv1.conv.weight` (groups, C, 1, 1), `conv1.bn.*`, `conv_p.*` (block_size^2 * groups, groups,
    block_size, 1), `conv_q.*`, `conv2.conv.weight` (C, C, 1, 1), `conv2.bn.*`.

    Raises:
        ValueError: an option is out of range; in `forward`: x of another shape.

    Source: Non-Local Neural Networks with Grouped Bilinear Attentional Transforms, CVPR 2020; equivalent to timm's
    `BilinearAttnTransform`.
    """

    _normalised = staticmethod(normalised)
    _pool_blocks = staticmethod(pool_blocks)


@eager_where_small()
class BilinearAttention(reference.BilinearAttention):
    """A bottleneck around `BilinearTransform`: x + dropout(relu(BatchNorm(conv(transform(...))))).

    Convolution, BatchNorm and ReLU to rd_channels, the transform, convolution, BatchNorm and ReLU back. In large
    maps the last two, the dropout (of whole channels, so a gate) and the sum are one fused op.

    Args:
        channels: C, of the map.
        block_size, groups: of the transform.
        rd_ratio, rd_divisor: the bottleneck has C * rd_ratio channels, rounded to a multiple of rd_divisor.
        rd_channels: explicit width of it, instead.
        drop_rate: of the dropout.

    `forward(x)`: x (B, C, H, W), H and W multiples of block_size; a map of the same shape.

    Keys: timm's, `conv1.conv.weight`, `conv1.bn.*`, `ba.*` as in `BilinearTransform`, `conv2.conv.weight`,
    `conv2.bn.*`.

    Raises:
        ValueError: an option is out of range; in `forward`: x of another shape.

    Source: as `BilinearTransform`; equivalent to timm's `BatNonLocalAttn`.
    """

    _normalised = staticmethod(normalised)
    _transform = BilinearTransform
