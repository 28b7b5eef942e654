"""Spatial transformer: a map sampled on a grid that a network chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .layout import in_layout_of
from .squeeze_excite import positive_int

PADDINGS = ("zeros", "border", "reflection")


def affine_grid(theta: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """`torch.nn.functional.affine_grid`."""
    return F.affine_grid(theta, list(size), align_corners)


def grid_sample(x: Tensor, grid: Tensor, *, padding_mode: str = "zeros", align_corners: bool = False) -> Tensor:
    """`torch.nn.functional.grid_sample` between the nearest values, in x's layout."""
    return in_layout_of(F.grid_sample(x, grid, "bilinear", padding_mode, align_corners), x)


class SpatialTransformer(Block):
    """See `fused_attn.nn.SpatialTransformer`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts its own here.
    _affine_grid = staticmethod(affine_grid)
    _grid_sample = staticmethod(grid_sample)

    def __init__(
        self,
        channels: int,
        *,
        localization: nn.Module,
        features: int | None = None,
        rank: int = 2,
        size: Sequence[int] | None = None,
        padding_mode: str = "zeros",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        if isinstance(rank, bool) or rank not in (2, 3):
            raise ValueError(f"rank: expected 2 or 3; got {rank!r}")
        if size is not None and len(size) != rank:
            raise ValueError(f"size: expected {rank} numbers; got {size!r}")
        if padding_mode not in PADDINGS:
            raise ValueError(f"padding_mode: expected one of {', '.join(PADDINGS)}; got {padding_mode!r}")
        self.rank, self.padding_mode, self.align_corners = rank, padding_mode, align_corners
        self.size = None if size is None else tuple(positive_int("size", n) for n in size)
        self.localization = localization
        self.theta: nn.Linear | None = None
        if features is not None:
            self.theta = nn.Linear(positive_int("features", features), rank * (rank + 1))
            nn.init.zeros_(self.theta.weight)
            with torch.no_grad():
                self.theta.bias.copy_(torch.eye(rank, rank + 1).flatten())

    def extra_repr(self) -> str:
        size = "" if self.size is None else f", size={self.size}"
        return f"{self.channels}{size}, padding_mode={self.padding_mode!r}, align_corners={self.align_corners}"

    def forward(self, x: Tensor) -> Tensor:
        batch, rank = x.shape[0], self.rank
        if x.dim() != rank + 2 or x.shape[1] != self.channels:
            shape = ", ".join(["B", str(self.channels), *"DHW"[-rank:]])
            raise ValueError(f"x: expected ({shape}); got shape {tuple(x.shape)}")
        theta = self.localization(x)
        if self.theta is not None:
            theta = self.theta(theta.flatten(1))
        numbers = rank * (rank + 1)
        if theta.shape not in ((batch, numbers), (batch, rank, rank + 1)):
            raise ValueError(f"localization: expected a result of shape ({batch}, {numbers}); got {tuple(theta.shape)}")
        theta = theta.to(x.dtype).reshape(batch, rank, rank + 1)
        size = x.shape[2:] if self.size is None else self.size
        grid = self._affine_grid(theta, (batch, self.channels, *size), align_corners=self.align_corners)
        return self._grid_sample(x, grid, padding_mode=self.padding_mode, align_corners=self.align_corners)
