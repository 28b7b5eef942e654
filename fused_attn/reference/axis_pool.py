"""Axis pool: a map pooled along its height, its width and its channels."""

from __future__ import annotations

import torch
from torch import Tensor


def _max_and_mean(x: Tensor, axis: int, ties: str) -> Tensor:
    """Both along one axis, next to each other in axis 1 of what is left."""
    peak = x.amax(axis) if ties == "even" else x.max(axis).values
    return torch.stack([peak, x.mean(axis)], 1)


def axis_pool(
    x: Tensor, *, maxima: bool = False, channels: bool = False, ties: str = "first"
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """See `fused_attn.functional.axis_pool`."""
    if not maxima:
        return x.mean(3, keepdim=True), x.mean(2, keepdim=True)
    rows, columns = _max_and_mean(x, 3, ties), _max_and_mean(x, 2, ties)
    return (rows, columns, _max_and_mean(x, 1, ties)) if channels else (rows, columns)


def axis_pool_with_map(
    x: Tensor, *, maxima: bool = False, channels: bool = False, ties: str = "first"
) -> tuple[Tensor, ...]:
    """See `fused_attn.functional.axis_pool_with_map`."""
    return x, *axis_pool(x, maxima=maxima, channels=channels, ties=ties)
