"""Triplet attention."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .axis_pool import axis_pool_with_map
from .block_attention import SpatialAttention, check_channels, optional_channels
from .checkpoints import OtherNames
from .mixed_scale import mixed_scale
from .spatial_gate import spatial_logits


class TripletAttention(OtherNames):
    """See `fused_attn.nn.TripletAttention`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _axis_pool = staticmethod(axis_pool_with_map)
    _mixed_scale = staticmethod(mixed_scale)
    _spatial_logits = staticmethod(spatial_logits)

    other_names: ClassVar[dict[str, str]] = {"ChannelGateH": "cw", "ChannelGateW": "hc", "SpatialGate": "hw"}

    def __init__(
        self,
        channels: int | None = None,
        *,
        kernel_size: int = 7,
        no_spatial: bool = False,
        ties: str = "first",
    ) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        self.no_spatial = no_spatial
        for name in ("cw", "hc") if no_spatial else ("cw", "hc", "hw"):
            self.add_module(name, SpatialAttention(kernel_size=kernel_size, ties=ties, return_gate=True))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        branches: dict[str, Any] = dict(self.named_children())
        ties = branches["cw"].ties
        x, rows, columns, *plane = self._axis_pool(x, maxima=True, channels=not self.no_spatial, ties=ties)
        gates = {
            "columns": branches["cw"]._gate_of_pools(columns, self._spatial_logits).transpose(1, 2),
            "rows": branches["hc"]._gate_of_pools(rows.transpose(2, 3), self._spatial_logits).permute(0, 3, 2, 1),
        }
        if plane:
            gates["spatial"] = branches["hw"]._gate_of_pools(plane[0], self._spatial_logits)
        return self._mixed_scale(x, **{name: gate / len(gates) for name, gate in gates.items()}, combine="sum")
