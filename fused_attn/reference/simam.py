"""SimAM, a gate a position and channel from an energy function, without parameters."""

from __future__ import annotations

import math

from torch import Tensor

from .block import Block
from .block_attention import check_channels, optional_channels
from .squeeze import space
from .squeeze_excite import finite


def simam(x: Tensor, *, e_lambda: float = 1e-4) -> Tensor:
    """See `fused_attn.functional.simam`."""
    axes = space(x)
    distance = (x - x.mean(axes, keepdim=True)).square()
    variance = distance.sum(axes, keepdim=True) / (math.prod(x.shape[2:]) - 1)
    return x * (distance / (4 * (variance + e_lambda)) + 0.5).sigmoid()


class SimAM(Block):
    """See `fused_attn.nn.SimAM`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _simam = staticmethod(simam)

    def __init__(self, channels: int | None = None, *, e_lambda: float = 1e-4) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        if finite("e_lambda", e_lambda) < 0:
            raise ValueError(f"e_lambda: expected a number of at least 0; got {e_lambda!r}")
        self.e_lambda = e_lambda

    def extra_repr(self) -> str:
        return f"e_lambda={self.e_lambda}"

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        return self._simam(x, e_lambda=self.e_lambda)
