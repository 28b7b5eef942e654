"""Memory layouts."""

from __future__ import annotations

import torch
from torch import Tensor


def in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """y, a map of two or three spatial axes, with its channels last in memory where x has them there."""
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return y.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return y
