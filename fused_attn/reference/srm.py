"""SRM: style-based recalibration."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block
from .block_attention import check_channels
from .moments_gate import moments_gate
from .response_norm import root
from .squeeze_excite import positive_int


class SRM(Block):
    """See `fused_attn.nn.SRM`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _moments_gate = staticmethod(moments_gate)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.cfc = nn.Conv1d(channels, channels, 2, groups=channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)

    def extra_repr(self) -> str:
        return f"{self.channels}"

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        count = math.prod(x.shape[2:])

        def excitation(mean: Tensor, variance: Tensor) -> Tensor:
            gate: Tensor = self.bn(self.cfc(style(mean, variance, count, x.dtype))).sigmoid()
            return gate

        return self._moments_gate(x, excitation)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(state_dict.get(f"{prefix}cfc"), Tensor) and f"{prefix}cfc.weight" not in state_dict:
            state_dict[f"{prefix}cfc.weight"] = state_dict.pop(f"{prefix}cfc").unsqueeze(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def style(
    mean: Tensor, variance: Tensor, count: int, dtype: torch.dtype, eps: float = 0.0, correction: int = 1
) -> Tensor:
    """Mean and deviation of this many values, (B, C, 2) in this dtype. eps: is added to the variance. correction: 1,
    Bessel's, or 0."""
    if correction:
        variance = variance * count / (count - 1) if count > 1 else variance * math.nan
    deviation = root(variance) if eps == 0 else (variance + eps).sqrt()
    return torch.stack([mean, deviation], 2).to(dtype)
