"""Global response normalisation and gated channel transformation: gates made of each channel's norm."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from .block import Block
from .block_attention import check_channels
from .energy_gate import energy_gate
from .squeeze_excite import finite, positive_int


def root(energy: Tensor) -> Tensor:
    """The norm, of which the gradient is 0 where it is 0, as of torch's."""
    none = energy == 0
    return (energy + none).sqrt() * ~none


def response(energy: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gate of global response normalisation, (B, C), of the energy; weight (C,)."""
    norm = root(energy)
    return 1 + weight * (norm / (norm.mean(1, keepdim=True) + eps))


def transformation(energy: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """The gate of gated channel transformation, (B, C), of the energy; alpha, gamma and beta (C,)."""
    embedding = (energy + eps).sqrt() * alpha
    normed = embedding * (gamma * (embedding.square().mean(1, keepdim=True) + eps).rsqrt())
    return 1 + (normed + beta).tanh()


def positive(argument: str, value: float) -> float:
    if finite(argument, value) <= 0:
        raise ValueError(f"{argument}: expected a positive number; got {value!r}")
    return value


class GlobalResponseNorm(Block):
    """See `fused_attn.nn.GlobalResponseNorm`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _energy_gate = staticmethod(energy_gate)

    def __init__(self, channels: int, *, eps: float = 1e-6, channels_last: bool = False) -> None:
        super().__init__()
        self.channels, self.eps, self.channels_last = (
            positive_int("channels", channels),
            positive("eps", eps),
            channels_last,
        )
        self.weight, self.bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}, channels_last={self.channels_last}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.channels_last:
            check_channels(self.channels, x)
            return self._run(x)
        if x.shape[-1] != self.channels:
            raise ValueError(f"x: expected {self.channels} channels, last; got shape {tuple(x.shape)}")
        return self._run(x.movedim(-1, 1)).movedim(1, -1)

    def _run(self, x: Tensor) -> Tensor:
        return self._energy_gate(x, lambda energy: response(energy, self.weight, self.eps), self.bias)

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
            if prefix + theirs in state_dict and prefix + ours not in state_dict:
                state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
            tensor = state_dict.get(prefix + ours)
            if isinstance(tensor, Tensor) and tensor.numel() == self.channels:  # (1, 1, 1, C) or (1, C, 1, 1)
                state_dict[prefix + ours] = tensor.reshape(self.channels)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class GatedChannelTransformation(Block):
    """See `fused_attn.nn.GatedChannelTransformation`."""

    #: The function the forward pass is made of; `fused_attn.nn` puts the fused one here.
    _energy_gate = staticmethod(energy_gate)

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.eps = positive_int("channels", channels), positive("eps", eps)
        shape = (1, channels, 1, 1)
        self.alpha = nn.Parameter(torch.ones(shape))
        self.gamma, self.beta = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        check_channels(self.channels, x)

        def excitation(energy: Tensor) -> Tensor:
            alpha, gamma, beta = (p.flatten() for p in (self.alpha, self.gamma, self.beta))
            return transformation(energy, alpha, gamma, beta, self.eps)

        return self._energy_gate(x, excitation)
