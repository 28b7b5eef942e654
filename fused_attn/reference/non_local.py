"""Non-local blocks: every position sees all the others, in four forms."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .block_attention import CONVOLUTIONS, NORMS, check_channels, check_rank, spatial_rank
from .checkpoints import OtherNames
from .position_attention import position_attention, weighted_values
from .selection import make_divisible
from .squeeze_excite import hidden_channels, positive_int

MODES = ("embedded", "gaussian", "dot", "concatenation")

#: The blocks of other implementations -> their options.
PRESETS: dict[str, dict[str, Any]] = {
    "caffe2": {"scale": "inner", "pool": "before"},
    "alexhex7": {"scale": None, "pool": "after"},
    "mmcv": {"scale": "inner", "pool": None, "batch_norm": False},
    "timm": {"scale": "input", "pool": None, "reduction": 8, "divisor": 8},
}


def dot_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean over the key positions of query . key times the values; shapes as in `position_attention`."""
    products = query.flatten(2).transpose(1, 2) @ key.flatten(2)
    return weighted_values(products / products.shape[2], value, query)


def concatenation_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The mean over the key positions of ReLU(query + key) times the values.

    query: (B, 1, *space); key: (B, 1, *other_space); value: (B, E, *other_space).
    """
    weights = (query.flatten(2).transpose(1, 2) + key.flatten(2)).relu()
    return weighted_values((weights / weights.shape[2]).to(value.dtype), value, query)


def project(x: Tensor, conv: Any, weight: Tensor) -> Tensor:
    """One number a position, (B, 1, *space): weight, (1, inner), times what the 1x1 convolution makes of x."""
    return weighted_channels(conv(x), weight)


def weighted_channels(x: Tensor, weight: Tensor) -> Tensor:
    """(B, 1, *space) of x (B, C, *space) and weight (1, C)."""
    return torch.einsum("oc,bc...->bo...", weight, x)


class NonLocal(OtherNames):
    """See `fused_attn.nn.NonLocal`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _position_attention = staticmethod(position_attention)
    _dot_attention = staticmethod(dot_attention)
    _concatenation_attention = staticmethod(concatenation_attention)
    _project = staticmethod(project)

    other_names: ClassVar[dict[str, str]] = {
        **{f"{name}.{theirs}": name for name in ("g", "phi") for theirs in ("0.conv", "0", "conv")},
        "theta.conv": "theta",
        "W.0": "out",
        "W.1": "norm",
        "W": "out",
        "conv_out.conv": "out",
        "conv_out.bn": "norm",
        "conv_theta": "theta",
        "conv_phi": "phi",
        "conv_g": "g",
        "conv_out": "out",
        "t": "theta",
        "p": "phi",
        "z": "out",
        "bn": "norm",
        "concat_project.0": "concat_project",
        "concat_project.conv": "concat_project",
        **{
            f"{name}_{theirs}": f"{name}.{ours}"
            for name in ("theta", "phi", "g", "out")
            for theirs, ours in (("w", "weight"), ("b", "bias"))
        },
        "bn_s": "norm.weight",
        "bn_b": "norm.bias",
        "bn_rm": "norm.running_mean",
        "bn_riv": "norm.running_var",
    }

    def __init__(
        self,
        channels: int,
        *,
        mode: str = "embedded",
        scale: str | None = "inner",
        pool: str | None = "before",
        reduction: float = 2,
        divisor: int | None = None,
        hidden: int | None = None,
        batch_norm: bool = True,
        out_bias: bool = True,
        zero_init: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        for argument, value, names in (
            ("mode", mode, MODES),
            ("scale", scale, ("inner", "input", None)),
            ("pool", pool, ("before", "after", None)),
        ):
            if value not in names:
                raise ValueError(f"{argument}: expected one of {', '.join(map(str, names))}; got {value!r}")
        self.mode, self.pool, self.rank = mode, pool, spatial_rank(rank)
        width = inner_channels(channels, reduction, divisor) if hidden is None else positive_int("hidden", hidden)
        self.scale = {"inner": width**-0.5, "input": channels**-0.5, None: 1.0}[scale]
        conv = CONVOLUTIONS[rank - 1]
        if mode != "gaussian":
            self.theta = conv(channels, width, 1)
            self.phi = conv(channels, width, 1)
        self.g = conv(channels, width, 1)
        self.out = conv(width, channels, 1, bias=out_bias)
        self.norm = NORMS[rank - 1](channels) if batch_norm else None
        if mode == "concatenation":
            self.concat_project = nn.Conv2d(2 * width, 1, 1, bias=False)
        if zero_init:
            for parameter in (self.out if self.norm is None else self.norm).parameters():
                nn.init.zeros_(parameter)

    @classmethod
    def preset(cls, name: str, channels: int, **options: Any) -> NonLocal:
        """See `fused_attn.nn.NonLocal`."""
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}; got {name!r}")
        return cls(channels, **(PRESETS[name] | options))

    def extra_repr(self) -> str:
        return f"{self.channels}, mode={self.mode!r}, pool={self.pool!r}, rank={self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        check_rank(self.rank, x)
        check_channels(self.channels, x)
        y = self.out(self._attention(x))
        return x + (y if self.norm is None else self.norm(y))

    def _attention(self, x: Tensor) -> Tensor:
        keys = self._pool(x, "before")
        value = self._pool(self.g(keys), "after")
        if self.mode == "gaussian":
            return self._position_attention(x, self._pool(keys, "after"), value)
        if self.mode == "concatenation":
            for_query, for_key = self.concat_project.weight.flatten(1).chunk(2, 1)
            query = self._project(x, self.theta, for_query)
            if self.pool == "after":
                key = weighted_channels(self._pool(self.phi(keys), "after"), for_key)
            else:
                key = self._project(keys, self.phi, for_key)
            return self._concatenation_attention(query, key, value)
        query, key = self.theta(x), self._pool(self.phi(keys), "after")
        if self.mode == "dot":
            return self._dot_attention(query, key, value)
        return self._position_attention(query, key, value, scale=self.scale)

    def _pool(self, x: Tensor, when: str) -> Tensor:
        """The maxima of 2x2 positions, in each frame of a video, if this is when the block takes them."""
        if self.pool != when:
            return x
        if self.rank == 3:
            return nn.functional.max_pool3d(x, (1, 2, 2))
        return nn.functional.max_pool2d(x, 2) if self.rank == 2 else nn.functional.max_pool1d(x, 2)


def inner_channels(channels: int, reduction: float, divisor: int | None) -> int:
    """channels // reduction, or timm's `make_divisible(channels / reduction, divisor)`."""
    if divisor is None:
        return hidden_channels(channels, reduction, None)
    hidden_channels(channels, reduction, divisor)  # checks both
    return make_divisible(channels / reduction, divisor, divisor)
