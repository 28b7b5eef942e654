"""Split attention (ResNeSt) in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..codes import ACTIVATIONS, code
from .block import Block
from .selection import Layers, check_batch, make_divisible, selection
from .selective_kernel import divides
from .squeeze_excite import finite, positive_int


class SplitAttention(Block):
    """See `fused_attn.nn.SplitAttention`."""

    #: The forward pass from the convolution on; `fused_attn.nn` puts the fused one here.
    _selection = staticmethod(selection)

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        radix: int = 2,
        rd_ratio: float = 0.25,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        activation: str = "relu",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = in_channels if out_channels is None else positive_int("out_channels", out_channels)
        for argument, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            positive_int(argument, value)
        positive_int("radix", radix)
        positive_int("rd_divisor", rd_divisor)
        code(ACTIVATIONS, "activation", activation)
        self.radix, self.groups, self.activation = radix, groups, activation
        out = self.out_channels
        if rd_channels is not None:
            hidden = positive_int("rd_channels", rd_channels) * radix
        else:
            hidden = make_divisible(in_channels * radix * finite("rd_ratio", rd_ratio), rd_divisor, 32)
        divides("groups", groups, out_channels=out, hidden=hidden)
        divides("groups * radix", groups * radix, in_channels=in_channels)
        padding = kernel_size // 2 if padding is None else padding
        options: dict[str, Any] = {"groups": groups * radix, "bias": bias}
        self.conv = nn.Conv2d(in_channels, out * radix, kernel_size, stride, padding, dilation, **options)
        self.bn0 = nn.BatchNorm2d(out * radix) if batch_norm else nn.Identity()
        self.fc1 = nn.Conv2d(out, hidden, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(hidden) if batch_norm else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, out * radix, 1, groups=groups)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, radix={self.radix}, activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        has_norm = not isinstance(self.bn0, nn.Identity)
        norm = self.bn1 if has_norm else None
        check_batch(x, norm)
        gate = "softmax" if self.radix > 1 else "sigmoid"
        excitation = Layers(self.fc1, norm, self.activation, self.fc2, self.radix, self.groups, gate)
        norms = [self.bn0] if has_norm else []
        return self._selection(self.conv(x), norms, self.activation, excitation, self.radix)
