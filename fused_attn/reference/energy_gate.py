"""Energy gate: a map times a gate that is made of each channel's sum of squares."""

from __future__ import annotations

import torch
from torch import Tensor

from .squeeze import Excitation, per_channel, space


def energy(x: Tensor) -> Tensor:
    """Sums of squares over space, (B, C), in float32 (float64 of float64): float16's squares overflow."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(wide).square().sum(space(x))


def energy_gate(x: Tensor, excitation: Excitation, bias: Tensor | None = None) -> Tensor:
    """See `fused_attn.functional.energy_gate`."""
    y = x * per_channel(excitation(energy(x)).flatten(1), x).to(x.dtype)
    return y if bias is None else y + per_channel(bias, x).to(x.dtype)
