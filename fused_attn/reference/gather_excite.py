"""Gather-excite without parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..codes import ACTIVATIONS, FUNCTIONS, POOLS, TIES, code
from .block import Block
from .block_attention import check_channels, optional_channels
from .channel_gate import channel_gate


class GatherExcite(Block):
    """See `fused_attn.nn.GatherExcite`."""

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
