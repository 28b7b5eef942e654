"""Triplet attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .block_attention import SpatialAttention, check_channels, optional_channels
from .checkpoints import OtherNames

#: Branch -> the axes of x that its gate sees as (batch, channels, height, width); each swap is its own inverse.
BRANCHES = {"cw": (0, 2, 1, 3), "hc": (0, 3, 2, 1), "hw": (0, 1, 2, 3)}


class TripletAttention(OtherNames):
    """Triplet attention: x times the mean of three gates, over (C, W), (H, C) and (H, W).

    Each gate is sigmoid(BatchNorm(conv([max, mean]))), the pools over the axis that is left, as in
    `SpatialAttention`. The gates are small and are permuted; the map is never copied.

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
        for name in list(BRANCHES)[: 2 if no_spatial else 3]:
            self.add_module(name, SpatialAttention(kernel_size=kernel_size, ties=ties, return_gate=True))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        branches = dict(self.named_children())
        gates = [self._gate(branch, x, BRANCHES[name]) / len(branches) for name, branch in branches.items()]
        return x * sum(gates[1:], gates[0])

    @staticmethod
    def _gate(branch: nn.Module, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """The branch's gate with the axes of x, its size 1 along the axis that was pooled."""
        return branch(x.permute(axes)).permute(axes)
