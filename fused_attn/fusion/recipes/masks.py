"""What blocks run that are no single op: a gate alone, a self-attention, or a module of fused_attn.nn with the block's
own layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import functional
from ...codes import FUNCTIONS
from ...nn.self_attention import channel_self_attention
from ...reference.channel_gate import excite, gate_alone
from ...reference.self_attention import attended_channels
from .recipe import ChannelGate, SpatialGate
from .run import layer_at, number_at, parameter_at, parameter_paths, split_path


def channel_mask(
    block: nn.Module, gate: ChannelGate, x: Tensor, squeeze: Callable[..., Any] = functional.squeeze
) -> Tensor:
    """The (B, C) gate of a channel attention, one pass over x."""
    weights = [parameter_at(block, path) for path in parameter_paths(gate)]

    def logits(descriptor: Tensor) -> Tensor:
        return excite(descriptor, *weights, layer=gate.layer, activation=gate.activation)

    return gate_alone(x, squeeze, logits, pool=gate.pool, ties=gate.ties, gate=gate.gate)


class ChannelMask:
    """A module that returns the gate of a channel attention: "flat" (B, C), "kept" (B, C, 1, ...) or "expanded"."""

    def __init__(self, gate: ChannelGate, shape: str) -> None:
        self.gate, self.shape = gate, shape

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        mask = channel_mask(block, self.gate, x)
        if self.shape == "flat":
            return mask
        mask = mask.reshape(*mask.shape, *(1 for _ in x.shape[2:]))
        return mask.expand_as(x) if self.shape == "expanded" else mask


class SpatialMask:
    """A module that returns the gate of a spatial attention: "kept" (B, 1, *spatial) or "expanded"."""

    def __init__(self, gate: SpatialGate, shape: str) -> None:
        self.gate, self.shape = gate, shape

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        conv, *norms = (layer_at(block, path) for path in self.gate.layers)
        z = functional.spatial_logits(
            functional.channel_pool(x, order=self.gate.order, ties=self.gate.ties), conv.weight, conv.bias
        )
        for norm in norms:
            z = norm(z)
        mask = FUNCTIONS[self.gate.gate](z)
        return mask.expand_as(x) if self.shape == "expanded" else mask


class SelfAttention:
    """x + gamma * attention between positions, of what three layers make of x; without layers, between channels."""

    def __init__(self, gamma: str, layers: tuple[str, ...], scale: float) -> None:
        self.gamma, self.layers, self.scale = split_path(gamma), layers, scale

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        gamma = number_at(block, self.gamma)
        if self.layers:
            query, key, value = (layer_at(block, path)(x) for path in self.layers)
            y = functional.position_attention(query, key, value, scale=self.scale)
        elif gamma.dtype == x.dtype:
            return channel_self_attention(x, gamma)
        else:
            y = attended_channels(x)
        return torch.addcmul(x, gamma, y)  # in the dtype that the block's own sum has


class Shell:
    """Runs a module of `fused_attn.nn` that has the block's own layers in it; adds_input: and adds the map."""

    def __init__(self, module: nn.Module, adds_input: bool) -> None:
        self.module, self.adds_input = module, adds_input

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        y = type(self.module).forward(self.module, x)
        return x + y if self.adds_input else y
