"""The attention gate of Attention U-Net."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .block_attention import CONVOLUTIONS, NORMS, check_rank, spatial_rank
from .checkpoints import OtherNames
from .normalised import normalised
from .scale import scale
from .squeeze_excite import positive_int

_LINEAR = ("linear", "bilinear", "trilinear")


class AttentionGate(OtherNames):
    """See `fused_attn.nn.AttentionGate`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _normalised = staticmethod(normalised)
    _scale = staticmethod(scale)

    other_names: ClassVar[dict[str, str]] = {
        **{f"{layer}.0.conv": f"{layer}.0" for layer in ("W_g", "W_x", "psi")},  # MONAI's
        **{f"phi.{what}": f"W_g.0.{what}" for what in ("weight", "bias")},
        "theta.weight": "W_x.0.weight",
        **{f"psi.{what}": f"psi.0.{what}" for what in ("weight", "bias")},
    }

    def __init__(
        self,
        channels: int,
        *,
        gating: int | None = None,
        hidden: int | None = None,
        stride: int = 1,
        batch_norm: bool = True,
        project: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.gating = channels if gating is None else positive_int("gating", gating)
        width = max(channels // 2, 1) if hidden is None else positive_int("hidden", hidden)
        self.stride, self.rank = positive_int("stride", stride), spatial_rank(rank)
        conv, norm = CONVOLUTIONS[rank - 1], NORMS[rank - 1]

        def layers(convolution: nn.Module, out: int, normed: bool) -> nn.Sequential:
            return nn.Sequential(convolution, norm(out)) if normed else nn.Sequential(convolution)

        self.W_g = layers(conv(self.gating, width, 1), width, batch_norm)
        # The bias of the other makes one of this superfluous: those that go by steps have none.
        self.W_x = layers(conv(channels, width, stride, stride, bias=stride == 1), width, batch_norm)
        self.psi = layers(conv(width, 1, 1), 1, batch_norm)
        self.W = layers(conv(channels, channels, 1), channels, True) if project else None

    def extra_repr(self) -> str:
        return f"{self.channels}, gating={self.gating}, stride={self.stride}, rank={self.rank}"

    def forward(self, g: Tensor, x: Tensor) -> Tensor:
        check_rank(self.rank, x)
        if g.dim() != x.dim() or g.shape[0] != x.shape[0]:
            raise ValueError(
                f"g: expected a map of {x.shape[0]} samples with the axes of x; got shape {tuple(g.shape)}"
            )
        of_x: Any = self.W_x[0](x)
        hidden = _sum(self._normalised, self.W_x, of_x, self._resized(self.W_g(g), of_x))
        gate = self._resized(self.psi(hidden).sigmoid(), x)
        y = self._scale(x, gate)
        return y if self.W is None else self.W(y)

    def _resized(self, t: Tensor, like: Tensor) -> Tensor:
        if self.stride == 1 and t.shape[2:] == like.shape[2:]:  # of strided maps a program of open sizes cannot tell
            return t
        return F.interpolate(t, size=like.shape[2:], mode=_LINEAR[self.rank - 1], align_corners=False)


def _sum(normalise: Any, layers: nn.Sequential, of_x: Tensor, of_g: Tensor) -> Tensor:
    """ReLU of the sum, that of x still without its BatchNorm, if it has one."""
    if len(layers) == 1:
        return F.relu(of_x + of_g)
    result: Tensor = normalise(layers[1], of_x, residual=of_g, post_activation="relu")
    return result
