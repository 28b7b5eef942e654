"""Channel pool: maximum and mean over the channels, a map of two channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .squeeze import Affine, prologue

Order = tuple[str, str]


def channel_max(x: Tensor, ties: str) -> Tensor:
    """Maximum over channels, (B, 1, *spatial); ties "first": the gradient goes to the first, "even": shared."""
    return x.amax(1, keepdim=True) if ties == "even" else x.max(1, keepdim=True).values


def channel_pool(
    x: Tensor,
    *,
    order: Order = ("max", "mean"),
    ties: str = "first",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """See `fused_attn.functional.channel_pool`."""
    x = prologue(x, affine, pre_activation)
    pools = {"max": channel_max(x, ties), "mean": x.mean(1, keepdim=True)}
    return torch.cat([pools[name] for name in order], 1)
