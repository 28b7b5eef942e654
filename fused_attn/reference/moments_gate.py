"""Moments gate: a map times a gate that is made of each channel's mean and variance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .squeeze import per_channel, space

#: From mean and variance, (B, C) each, to the gate.
OfMoments = Callable[[Tensor, Tensor], Tensor]


def moments_gate(x: Tensor, excitation: OfMoments) -> Tensor:
    """See `fused_attn.functional.moments_gate`."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    mean = wide.mean(space(x))
    variance = (wide - per_channel(mean, x)).square().mean(space(x))
    return x * per_channel(excitation(mean, variance).flatten(1), x).to(x.dtype)
