"""Attention between positions, with the matrix of all pairs of them."""

from __future__ import annotations

import torch
from torch import Tensor


def position_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """See `fused_attn.functional.position_attention`."""
    energy = torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2)) * scale
    out = torch.bmm(value.flatten(2), energy.softmax(-1).transpose(1, 2))
    return out.view(*out.shape[:2], *query.shape[2:])
