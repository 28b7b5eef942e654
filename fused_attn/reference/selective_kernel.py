"""Selective kernels in plain PyTorch, as published and as in timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from ..codes import ACTIVATIONS, code
from .block import Block
from .checkpoints import OtherNames
from .selection import Layers, check_batch, make_divisible, selection
from .squeeze_excite import finite, positive_int


def divides(argument: str, value: int, **counts: int) -> int:
    """A positive integer that divides each of these counts."""
    positive_int(argument, value)
    for name, count in counts.items():
        if count % value:
            raise ValueError(f"{argument}: expected a divisor of {name}, {count}; got {value}")
    return value


class SKConv(OtherNames):
    """See `fused_attn.nn.SKConv`."""

    other_names: ClassVar[dict[str, str]] = {
        **{f"branches.branch{i + 2}.conv": f"conv.{i}.0" for i in range(8)},
        **{f"branches.branch{i + 2}.bn": f"conv.{i}.1" for i in range(8)},
        "fc1.conv": "fc1.0",
        "fc1.bn": "fc1.1",
    }

    #: The forward pass from the convolutions on; `fused_attn.nn` puts the fused one here.
    _selection = staticmethod(selection)

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        stride: int = 1,
        M: int = 2,
        r: float = 16,
        L: int = 32,
        groups: int = 32,
        dim_from: str = "in",
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = in_channels if out_channels is None else positive_int("out_channels", out_channels)
        positive_int("stride", stride)
        positive_int("M", M)
        positive_int("L", L)
        if finite("r", r) <= 0:
            raise ValueError(f"r: expected a positive number; got {r!r}")
        if dim_from not in ("in", "out"):
            raise ValueError(f"dim_from: expected one of in, out; got {dim_from!r}")
        divides("groups", groups, in_channels=self.in_channels, out_channels=self.out_channels)
        out = self.out_channels
        width = max(int((in_channels if dim_from == "in" else out) // r), L)
        self.conv = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels, out, 3, stride, 1 + i, dilation=1 + i, groups=groups, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            )
            for i in range(M)
        )
        self.fc1 = nn.Sequential(nn.Conv2d(out, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.fc2 = nn.Conv2d(width, M * out, 1, bias=False)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}"

    def forward(self, x: Tensor) -> Tensor:
        fc1, norm, _ = self.fc1
        convs, norms, _ = zip(*self.conv, strict=True)
        check_batch(x, norm)
        excitation = Layers(fc1, norm, "relu", self.fc2, len(self.conv))
        return self._selection([conv(x) for conv in convs], norms, "relu", excitation)


class SelectiveKernel(Block):
    """See `fused_attn.nn.SelectiveKernel`."""

    _selection = staticmethod(selection)

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int | Sequence[int] = (3, 5),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        keep_3x3: bool = True,
        split_input: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.out_channels = in_channels if out_channels is None else positive_int("out_channels", out_channels)
        kernels = [kernel_size] * 2 if isinstance(kernel_size, int) else list(kernel_size)
        for k in kernels:
            if positive_int("kernel_size", k) < 3 or k % 2 == 0:
                raise ValueError(f"kernel_size: expected odd numbers of at least 3; got {kernel_size!r}")
        if not kernels:
            raise ValueError(f"kernel_size: expected at least one; got {kernel_size!r}")
        positive_int("stride", stride)
        positive_int("dilation", dilation)
        code(ACTIVATIONS, "activation", activation)
        self.activation, self.split_input = activation, split_input
        out, paths = self.out_channels, len(kernels)
        width = in_channels
        if split_input:
            width //= divides("kernel_size", paths, in_channels=in_channels)
        groups = divides("groups", min(out, positive_int("groups", groups)), in_channels=width, out_channels=out)
        if rd_channels is None:
            divisor = positive_int("rd_divisor", rd_divisor)
            hidden = make_divisible(out * finite("rd_ratio", rd_ratio), divisor, divisor)
        else:
            hidden = positive_int("rd_channels", rd_channels)
        self.paths = nn.ModuleList()
        for k in kernels:
            spread = dilation * (k - 1) // 2 if keep_3x3 else dilation
            k = 3 if keep_3x3 else k
            padding = (stride - 1 + spread * (k - 1)) // 2
            conv = nn.Conv2d(width, out, k, stride, padding, spread, groups, bias=False)
            self.paths.append(nn.ModuleDict({"conv": conv, "bn": nn.BatchNorm2d(out)}))
        self.attn = nn.ModuleDict(
            {
                "fc_reduce": nn.Conv2d(out, hidden, 1, bias=False),
                "bn": nn.BatchNorm2d(hidden),
                "fc_select": nn.Conv2d(hidden, paths * out, 1, bias=False),
            }
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, activation={self.activation!r}"

    def forward(self, x: Tensor) -> Tensor:
        attn, count = self.attn, len(self.paths)
        check_batch(x, attn["bn"])
        inputs = x.chunk(count, 1) if self.split_input else [x] * count
        convs, norms = zip(*(path.values() for path in self.paths), strict=True)  # type: ignore[operator]
        maps = [conv(u) for conv, u in zip(convs, inputs, strict=True)]
        excitation = Layers(attn["fc_reduce"], attn["bn"], "relu", attn["fc_select"], count)
        return self._selection(maps, norms, self.activation, excitation)
