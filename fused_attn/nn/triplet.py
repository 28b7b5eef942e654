"""Triplet attention."""

from __future__ import annotations

from .. import functional, reference


class TripletAttention(reference.TripletAttention):
    """Triplet attention: x times the mean of three gates: `cw` over (C, W), `hc` over (H, C) and `hw` over (H, W).

    Each gate is sigmoid(BatchNorm(conv([max, mean]))), the pools over the axis that is left, as in
    `SpatialAttention`. The gates are small and are permuted; the map is never copied: one pass over it makes all pools,
    one applies the mean of the gates, and backward takes two.

    Args:
        channels: C; None: any. The block has no parameter that depends on it.
        kernel_size: of the three convolutions, odd.
        no_spatial: leave out the gate over (H, W); the mean is then of two.
        ties: where the gradient of a maximum goes: "first" (max(dim)) or "even" (amax).

    `forward(x)`: x (B, C, H, W); a map of the same shape.

    Keys: those of the authors' code, `cw.conv.conv.weight` (1, 2, k, k), `cw.conv.bn.*`, and the same of `hc` and
    `hw`. `load_state_dict` also takes the authors' older names, `ChannelGateH`, `ChannelGateW` and `SpatialGate`.

    Raises:
        ValueError: an even kernel size or an option out of range; in `forward`: x has not `channels` channels.

    Source: Rotate to Attend, arXiv:2010.03045; equivalent to the authors' `TripletAttention`.
    """

    _axis_pool = staticmethod(functional.axis_pool_with_map)
    _mixed_scale = staticmethod(functional.mixed_scale)
    _spatial_logits = staticmethod(functional.spatial_logits)
