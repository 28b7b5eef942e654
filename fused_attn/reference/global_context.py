"""Global context, GCNet's block: a map's attention-weighted mean, through an MLP, scales it or is added to it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..codes import ACTIVATIONS, FUNCTIONS, code
from .block_attention import check_channels
from .checkpoints import OtherNames
from .context_pool import context_gate, context_pool_with_map
from .scale import scale
from .squeeze import per_channel, squeeze
from .squeeze_excite import finite, positive_int

FUSIONS = ("add", "scale", "both")
POOLINGS = ("attention", "avg")


def _dense(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of a descriptor, (B, C)."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class GlobalContext(OtherNames):
    """See `fused_attn.nn.GlobalContext`."""

    other_names: ClassVar[dict[str, str]] = {
        "conv_mask": "conv_attn",
        **{
            f"channel_{theirs}_conv.{i}": f"mlp_{ours}.{layer}"
            for theirs, ours in (("mul", "scale"), ("add", "add"))
            for i, layer in ((0, "fc1"), (1, "norm"), (3, "fc2"))
        },
    }

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _context_gate = staticmethod(context_gate)
    _context_pool = staticmethod(context_pool_with_map)
    _squeeze = staticmethod(squeeze)
    _scale = staticmethod(scale)

    def __init__(
        self,
        channels: int,
        *,
        fuse: str = "add",
        ratio: float = 1.0 / 16,
        divisor: int | None = None,
        hidden: int | None = None,
        pooling: str = "attention",
        activation: str = "relu",
        gate: str = "sigmoid",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        for argument, name, allowed in (("fuse", fuse, FUSIONS), ("pooling", pooling, POOLINGS)):
            if name not in allowed:
                raise ValueError(f"{argument}: expected one of {', '.join(allowed)}; got {name!r}")
        code(ACTIVATIONS, "activation", activation)
        code(ACTIVATIONS, "gate", gate)
        if finite("eps", eps) < 0:
            raise ValueError(f"eps: expected a number of at least 0; got {eps!r}")
        self.fuse, self.pooling, self.activation, self.gate = fuse, pooling, activation, gate
        width = _hidden(channels, ratio, divisor) if hidden is None else positive_int("hidden", hidden)
        self.conv_attn = nn.Conv2d(channels, 1, 1) if pooling == "attention" else None
        self.mlp_add = _mlp(channels, width, eps) if fuse != "scale" else None
        self.mlp_scale = _mlp(channels, width, eps) if fuse != "add" else None
        if self.conv_attn is not None:
            nn.init.kaiming_normal_(self.conv_attn.weight)
            nn.init.zeros_(self.conv_attn.bias)  # type: ignore[arg-type]
        for mlp in (self.mlp_add, self.mlp_scale):
            if mlp is not None:
                nn.init.zeros_(mlp["fc2"].weight)  # type: ignore[arg-type]
                nn.init.zeros_(mlp["fc2"].bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.channels}, fuse={self.fuse!r}, pooling={self.pooling!r}"

    def _transformed(self, mlp: Any, context: Tensor) -> Tensor:
        hidden = mlp["norm"](_dense(mlp["fc1"], context))
        return _dense(mlp["fc2"], FUNCTIONS[self.activation](hidden))

    def _gates(self, context: Tensor) -> Tensor:
        return FUNCTIONS[self.gate](self._transformed(self.mlp_scale, context))

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)
        attention = self.conv_attn
        if attention is not None and self.mlp_add is None:
            return self._context_gate(x, attention.weight, attention.bias, self._gates)
        context: Any
        if attention is None:
            context = self._squeeze(x)
        else:
            x, context = self._context_pool(x, attention.weight, attention.bias)
        y = x if self.mlp_scale is None else self._scale(x, self._gates(context))
        if self.mlp_add is not None:
            y = y + per_channel(self._transformed(self.mlp_add, context), x).to(x.dtype)
        return y


def _hidden(channels: int, ratio: float, divisor: int | None) -> int:
    if finite("ratio", ratio) <= 0:
        raise ValueError(f"ratio: expected a positive number; got {ratio!r}")
    if divisor is None:
        width = int(channels * ratio)
    else:
        positive_int("divisor", divisor)
        width = max(divisor, int(channels * ratio + divisor / 2) // divisor * divisor)
    if width < 1:
        raise ValueError(f"ratio: {ratio} leaves no hidden channel of {channels}; give `hidden` instead")
    return width


def _mlp(channels: int, hidden: int, eps: float) -> nn.ModuleDict:
    layers = {
        "fc1": nn.Conv2d(channels, hidden, 1),
        "norm": nn.LayerNorm(hidden, eps=eps),
        "fc2": nn.Conv2d(hidden, channels, 1),
    }
    return nn.ModuleDict(layers)
