"""Double attention: features gathered by one softmax and distributed by another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .block import Block
from .block_attention import CONVOLUTIONS, spatial_rank
from .squeeze_excite import positive_int

DISTRIBUTIONS = ("channels", "positions")


def gather_and_distribute(
    x: Tensor, features: Any, gather: Any, distribute: Any, reconstruct: Any, over: str = "channels"
) -> Tensor:
    """reconstruct(A softmax(B)^T softmax(V)) with A, B, V the three convolutions of x; reconstruct None: none."""
    a, b, v = (conv(x).flatten(2) for conv in (features, gather, distribute))
    descriptors = a @ b.softmax(2).transpose(1, 2)
    y = (descriptors @ v.softmax(1 if over == "channels" else 2)).unflatten(2, x.shape[2:])
    return y if reconstruct is None else reconstruct(y)


class DoubleAttention(Block):
    """See `fused_attn.nn.DoubleAttention`."""

    #: The whole forward pass; `fused_attn.nn` puts the fused one here.
    _gather_and_distribute = staticmethod(gather_and_distribute)

    def __init__(
        self,
        channels: int,
        *,
        features: int | None = None,
        descriptors: int | None = None,
        reconstruct: bool = True,
        distribute: str = "channels",
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        width = positive_int("features", max(channels // 4, 1) if features is None else features)
        count = positive_int("descriptors", max(channels // 4, 1) if descriptors is None else descriptors)
        if distribute not in DISTRIBUTIONS:
            raise ValueError(f"distribute: expected one of {', '.join(DISTRIBUTIONS)}; got {distribute!r}")
        self.distribute, self.rank = distribute, spatial_rank(rank)
        conv = CONVOLUTIONS[rank - 1]
        self.convA = conv(channels, width, 1)
        self.convB = conv(channels, count, 1)
        self.convV = conv(channels, count, 1)
        self.conv_reconstruct = conv(width, channels, 1) if reconstruct else None
        for layer in self.children():
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.channels}, distribute={self.distribute!r}"

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.rank + 2 or x.shape[1] != self.channels:
            shape = ", ".join(["B", str(self.channels), *"DHW"[-self.rank :]])
            raise ValueError(f"x: expected ({shape}); got shape {tuple(x.shape)}")
        convs = self.convA, self.convB, self.convV, self.conv_reconstruct
        return self._gather_and_distribute(x, *convs, over=self.distribute)
