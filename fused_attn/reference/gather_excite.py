"""Gather-excite without parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..codes import ACTIVATIONS, FUNCTIONS, POOLS, TIES, code
from .block_attention import check_channels, optional_channels
from .channel_gate import channel_gate


class GatherExcite(nn.Module):
    """Parameter-free gather-excite: x * gate(pool(x)), pool over all of space or over windows.

    Args:
        channels: C; None: any. The block has no parameters.
        extent: 0: the pool is global. e > 1: mean over windows of 2e - 1 every e positions, those outside the map
            not counted, and each position takes the gate of the window nearest to it; maps (B, C, H, W) only.
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

    #: The function of the global form; `fused_attn.nn` puts the fused one here.
    _channel_gate = staticmethod(channel_gate)

    def __init__(
        self,
        channels: int | None = None,
        *,
        extent: int = 0,
        pool: str = "avg",
        ties: str = "first",
        gate: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 0 or extent == 1:
            raise ValueError(f"extent: expected 0 or an integer above 1; got {extent!r}")
        if code(POOLS, "pool", pool) == POOLS["both"] or (extent and pool != "avg"):
            allowed = "'avg' with an extent" if extent else "one of avg, max, avgmax"
            raise ValueError(f"pool: expected {allowed}; got {pool!r}")
        code(TIES, "ties", ties)
        code(ACTIVATIONS, "gate", gate)
        self.extent, self.pool, self.ties, self.gate = extent, pool, ties, gate

    def extra_repr(self) -> str:
        return f"extent={self.extent}, pool={self.pool!r}, gate={self.gate!r}"

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        if self.extent == 0:
            return self._channel_gate(x, pool=self.pool, ties=self.ties, gate=self.gate)
        if x.dim() != 4:
            raise ValueError(f"x: expected (B, C, H, W) with an extent; got shape {tuple(x.shape)}")
        size = 2 * self.extent - 1
        gathered = F.avg_pool2d(x, size, self.extent, padding=size // 2, count_include_pad=False)
        return x * FUNCTIONS[self.gate](F.interpolate(gathered, size=x.shape[2:]))
