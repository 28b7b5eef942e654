"""Memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def lies_channels_last(x: Tensor) -> bool:
    """Whether a map's channels are last in memory and it is not NCHW as well, as a map of one channel may be."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def laid(x: Tensor, channels_last: bool | int) -> Tensor:
    """A copy of a 4-D map, in that layout."""
    return x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """y, a map of two or three spatial axes, with its channels last in memory where x has them there."""
    if lies_channels_last(x):
        return y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return y
