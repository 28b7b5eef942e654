"""Residual attention: (1 + mask) * trunk."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block
from .squeeze_excite import positive_int


def residual_mask(trunk: Tensor, mask: Tensor) -> Tensor:
    """(1 + mask) * trunk."""
    return (1 + mask) * trunk


def count(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{argument}: expected an integer of at least 0; got {value!r}")
    return value


class ResidualUnit(nn.Module):
    """A bottleneck that normalises first: x + conv1(relu(conv3(relu(conv1(relu(x)))))), each after a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 4
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return x + self.conv3(F.relu(self.bn3(y)))

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The published code makes a projection for every unit and uses it where the width or the size changes.
        state_dict.pop(f"{prefix}conv4.weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def units(channels: int, number: int) -> nn.Module:
    """That many, one after the other; a single one is itself."""
    several = [ResidualUnit(channels) for _ in range(number)]
    return several[0] if number == 1 else nn.Sequential(*several)


class ResidualAttention(Block):
    """See `fused_attn.nn.ResidualAttention`."""

    #: The product; `fused_attn.nn` puts the fused one here.
    _residual_mask = staticmethod(residual_mask)

    def __init__(
        self,
        channels: int,
        *,
        trunk: nn.Module | None = None,
        mask: nn.Module | None = None,
        depth: int = 3,
        p: int | None = None,
        t: int = 2,
        r: int = 1,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        self.depth, self.shortcuts = count("depth", depth), shortcuts
        given = trunk is not None and mask is not None
        around = count("p", (0 if given else 1) if p is None else p)
        if (around or not given) and channels % 4:
            raise ValueError(f"channels: expected a multiple of 4 for residual units; got {channels}")
        self.first_residual_blocks = units(channels, around)
        if trunk is None:
            trunk = nn.Sequential(*(ResidualUnit(channels) for _ in range(positive_int("t", t))))
        self.trunk_branches = trunk
        if mask is None:
            self._build_mask(positive_int("r", r))
        elif shortcuts:
            raise ValueError("shortcuts: expected False for a given mask; got True")
        self.mask = mask
        self.last_blocks = units(channels, around)

    def _build_mask(self, r: int) -> None:
        channels, depth = self.channels, self.depth
        for i in range(1, depth):
            self.add_module(f"softmax{i}_blocks", units(channels, r))
            self.add_module(f"skip{i}_connection_residual_block", ResidualUnit(channels))
        self.add_module(f"softmax{depth}_blocks", units(channels, 2 * r))
        for i in range(depth + 1, 2 * depth):
            self.add_module(f"softmax{i}_blocks", units(channels, r))
        tail: list[nn.Module] = []
        for _ in range(2):
            tail += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False)]
        self.add_module(f"softmax{self._last}_blocks", nn.Sequential(*tail, nn.Sigmoid()))

    @property
    def _last(self) -> int:
        return max(2 * self.depth, 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, depth={self.depth}, shortcuts={self.shortcuts}"

    def forward(self, x: Tensor) -> Tensor:
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        mask = self._built_mask(x, trunk) if self.mask is None else self.mask(x)
        return self.last_blocks(self._residual_mask(trunk, mask))

    def _built_mask(self, x: Tensor, trunk: Tensor) -> Tensor:
        depth, down = self.depth, [trunk]
        for i in range(1, depth + 1):
            x = self._blocks(i)(F.max_pool2d(x, 3, 2, 1))
            down.append(x)
        if depth == 0:
            x = self._blocks(0)(x)
        for i in range(depth - 1, -1, -1):
            x = F.interpolate(x, down[i].shape[2:], mode="bilinear", align_corners=True)
            if self.shortcuts:
                x = x + down[i]
            if i:
                x = self._blocks(2 * depth - i)(x + self.get_submodule(f"skip{i}_connection_residual_block")(down[i]))
        return self._blocks(self._last)(x)

    def _blocks(self, i: int) -> nn.Module:
        return self.get_submodule(f"softmax{i}_blocks")

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = {f"down_residual_blocks{i}": i for i in range(1, self.depth)}
        names |= {f"up_residual_blocks{i}": 2 * self.depth - i for i in range(1, self.depth)}
        names |= {"middle_2r_blocks": self.depth, "conv1_1_blocks": self._last}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name, dot, rest = key[len(prefix) :].partition(".")
            if dot and name in names:
                state_dict[f"{prefix}softmax{names[name]}_blocks.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
