"""CCNet's criss-cross attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from .. import functional, reference
from ..backends import is_ordinary
from ..ops.common import is_channels_last
from .pointwise import are_products


def attend(x: Tensor, query: Any, key: Any, value: Any, gamma: Tensor, recurrence: int) -> Tensor:
    """As `fused_attn.reference.criss_cross.attend`. Columns and rows are read alike where a position's channels are next
    to each other, so the map is. The map itself is attended to, and the values' convolution taken of the sums: that is
    the same, as the weights add up to 1, and neither the values nor their sums times gamma are kept."""
    if not is_ordinary(x):
        return reference.criss_cross.attend(x, query, key, value, gamma, recurrence)
    y = x.contiguous(memory_format=torch.channels_last)
    one_dtype = x.dtype == gamma.dtype and not torch.is_autocast_enabled(x.device.type)
    products = one_dtype and are_products(query, key, value) and x.dtype == value.weight.dtype
    for _ in range(recurrence):
        if products:
            attended = functional.criss_cross_attention(*both(query, key, y), y)
            y = conv2d(attended, gamma * value.weight, None if value.bias is None else gamma * value.bias).add_(y)
        else:
            attended = functional.criss_cross_attention(query(y), key(y), value(y))
            y = functional.scale(attended.to(x.dtype), gamma.expand(x.shape[:2]), residual=y)
    return y if is_channels_last(x) and not x.is_contiguous() else y.contiguous()


def both(query: Any, key: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two convolutions of a map, which is read once where they can be one."""
    if (query.bias is None) != (key.bias is None):
        return query(x), key(x)
    bias = None if key.bias is None else torch.cat([query.bias, key.bias])
    maps = conv2d(x, torch.cat([query.weight, key.weight]), bias)
    return maps[:, : query.out_channels], maps[:, query.out_channels :]


class CrissCrossAttention(reference.CrissCrossAttention):
    """Criss-cross attention: x + gamma * (values of the row and the column, weighted), as often as `recurrence` says.

    Query, key and value are 1x1 convolutions of x. The weights of a position are one softmax of query . key over the
    H positions of its column, itself left out, and the W of its row; there is no scale. Twice, with the same
    parameters, every position has met every other. gamma, one number, starts at 0.

    Args:
        channels: of the map.
        reduction: queries and keys have channels // reduction channels.
        recurrence: how often the block is applied to its own result; the authors' R. Their class is one application.

    `forward(x)`: x (B, channels, H, W); a map of the same shape and layout.

    Keys: those of the authors' code, `query_conv.*`, `key_conv.*`, `value_conv.*`, `gamma` (1,).

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or is not 2-D.

    Source: CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv:1811.11721; equivalent to the authors'
    `CrissCrossAttention`, the form in plain PyTorch.
    """

    _attend = staticmethod(attend)
