"""Gather-excite without parameters."""

from __future__ import annotations

from .. import functional, reference


class GatherExcite(reference.GatherExcite):
    """Parameter-free gather-excite: x * gate(pool(x)), pool over all of space or over windows.

    Args:
        channels: C; None: any. The block has no parameters.
        extent: 0: the pool is global. e > 1: mean over windows of 2e - 1 every e positions, those outside the map
            not counted, and each position takes the gate of the window nearest to it; maps (B, C, H, W) only. This
            form runs as plain PyTorch.
        pool: "avg", "max" or "avgmax", the mean of both; with an extent "avg".
        ties: where the gradient of a maximum goes: "first" (adaptive_max_pool) or "even" (amax).
        gate: a name in `fused_attn.codes.ACTIVATIONS`.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape.

    Raises:
        ValueError: an option is out of range; in `forward`: x has not `channels` channels, or with an extent is not
            (B, C, H, W).

    Source: Gather-Excite, arXiv:1810.12348, GE-theta-minus; equivalent to timm's `GatherExcite` with
    extra_params=False and use_mlp=False (its add_maxpool: pool="avgmax", ties="even").
    """

    _channel_gate = staticmethod(functional.channel_gate)
