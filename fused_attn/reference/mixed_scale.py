"""A map times several gates: one a channel, a position, a row or a column."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .squeeze import per_channel


def mixed_scale(
    x: Tensor,
    *,
    channel: Tensor | None = None,
    spatial: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    combine: str = "product",
) -> Tensor:
    """See `fused_attn.functional.mixed_scale`."""
    if channel is not None and channel.dim() != x.dim():
        channel = per_channel(channel, x)
    gates = [gate.to(x.dtype) for gate in (channel, spatial, rows, columns) if gate is not None]
    if combine == "product":
        return functools.reduce(torch.mul, gates, x)
    if combine == "sigmoid":
        return x * (1 + (gates[0] * gates[1]).sigmoid())
    if combine == "strips":
        return x * (gates[0] + gates[1]).sigmoid()
    if combine == "gate":
        return x * gates[0].sigmoid()
    return functools.reduce(torch.add if combine == "sum" else torch.maximum, [x * gate for gate in gates])


def pixel_gate(x: Tensor, logits: Tensor) -> Tensor:
    """See `fused_attn.functional.pixel_gate`."""
    return x * logits.sigmoid().to(x.dtype)
