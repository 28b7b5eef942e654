"""1x1 convolutions as products with matrices, on what is no map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.block_attention import CONVOLUTIONS
from ..reference.layout import lies_channels_last


def is_pointwise(layer: Any) -> bool:
    """A convolution with a kernel of one position, without groups, stride or padding."""
    plain = type(layer) in CONVOLUTIONS and layer.groups == 1
    return plain and {*layer.kernel_size, *layer.stride} == {1} and layer.padding in ((0,) * len(layer.kernel_size), 0)


def is_hooked(layer: Any) -> bool:
    """Whether somebody wants its calls: a hook, which may also make its weight as those of pruning do."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def are_products(*layers: Any) -> bool:
    """Whether to multiply with their matrices is all that calling them does."""
    return all(is_pointwise(layer) and not is_hooked(layer) for layer in layers)


def matrix(layer: Any) -> Tensor:
    """Its weight, (out, in)."""
    return layer.weight.flatten(1)


def product(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """weight columns + bias, of (out, in) and (B, in, n), which are read as they lie."""
    weight = weight.expand(columns.shape[0], -1, -1)
    return torch.bmm(weight, columns) if bias is None else torch.baddbmm(bias[:, None], weight, columns)


def spread(weights: Tensor, maps: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """weights maps + bias, of (B, channels, n) and (B, n, positions), as a map in x's layout."""
    space = x.shape[2:]
    if lies_channels_last(x):
        maps, weights = maps.transpose(1, 2), weights.transpose(1, 2)
        y = torch.bmm(maps, weights) if bias is None else torch.baddbmm(bias, maps, weights)
        return y.unflatten(1, space).movedim(-1, 1)
    y = torch.bmm(weights, maps) if bias is None else torch.baddbmm(bias[:, None], weights, maps)
    return y.unflatten(2, space)


def rows_of(x: Tensor) -> Tensor:
    """(B, C, *space) as (B * positions, C)."""
    return x.flatten(2).transpose(1, 2).flatten(0, 1)


def map_of(rows: Tensor, batch: int, space: Sequence[int]) -> Tensor:
    """Back from `rows_of`, in channels_last."""
    return rows.view(batch, *space, rows.shape[1]).movedim(-1, 1)
