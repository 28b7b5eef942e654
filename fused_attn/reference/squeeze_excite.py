"""The modules of the squeeze, excite, scale family in plain PyTorch."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..codes import ACTIVATIONS, POOLS, TIES, code
from .block import Block
from .channel_gate import channel_gate, excite, gate_alone
from .squeeze import per_channel, squeeze

Excitation = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def positive_int(argument: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}: expected a positive integer; got {value!r}")
    return value


def finite(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number; got {value!r}")
    return value


def hidden_channels(channels: int, reduction: float, divisor: int | None) -> int:
    """Width of the bottleneck: channels // reduction, or timm's `make_divisible(channels / reduction, divisor)`.

    Raises:
        ValueError: the reduction is not a finite positive number, or leaves no hidden channel.
    """
    if finite("reduction", reduction) <= 0:
        raise ValueError(f"reduction: expected a positive number; got {reduction!r}")
    if divisor is None:
        hidden = int(channels // reduction)
    else:
        positive_int("divisor", divisor)
        hidden = max(divisor, int(channels / reduction + divisor / 2) // divisor * divisor)
    if hidden < 1:
        raise ValueError(f"reduction: {reduction} leaves no hidden channel of {channels}; give `hidden` instead")
    return hidden


def eca_kernel_size(channels: int, gamma: float = 2, beta: float = 1) -> int:
    """ECA's adaptive kernel size: t = |(log2(channels) + beta) / gamma| cut to an integer, t + 1 where t is even.

    Source: ECA-Net, arXiv:1910.03151, equation 12, and the authors' code.
    """
    positive_int("channels", channels)
    finite("beta", beta)
    if finite("gamma", gamma) == 0:
        raise ValueError("gamma: expected a number other than 0; got 0")
    t = int(abs((math.log2(channels) + beta) / gamma))
    return t if t % 2 else t + 1


class _ChannelGate(Block):
    """What the modules of the family share: the options, and the forward pass over `_excitation()`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _squeeze = staticmethod(squeeze)
    _channel_gate = staticmethod(channel_gate)

    def __init__(
        self,
        channels: int,
        *,
        layer: str,
        pool: str,
        ties: str,
        activation: str,
        gate: str,
        post_activation: str,
        return_gate: bool,
    ) -> None:
        super().__init__()
        self.channels = positive_int("channels", channels)
        code(POOLS, "pool", pool)
        code(TIES, "ties", ties)
        for argument, name in (("activation", activation), ("gate", gate), ("post_activation", post_activation)):
            code(ACTIVATIONS, argument, name)
        if return_gate and post_activation != "identity":
            raise ValueError("post_activation: the gate alone has none; expected 'identity' with return_gate=True")
        self.layer, self.pool, self.ties, self.activation, self.gate = layer, pool, ties, activation, gate
        self.post_activation, self.return_gate = post_activation, return_gate

    def _excitation(self) -> Excitation:
        """weight1, bias1, weight2, bias2."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        options = [f"pool={self.pool!r}", f"gate={self.gate!r}"]
        options += [f"post_activation={self.post_activation!r}"] if self.post_activation != "identity" else []
        options += ["return_gate=True"] if self.return_gate else []
        return ", ".join([str(self.channels), *options])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.return_gate:
            return self._channel_gate(
                x,
                *self._excitation(),
                layer=self.layer,
                pool=self.pool,
                ties=self.ties,
                activation=self.activation,
                gate=self.gate,
                residual=residual,
                post_activation=self.post_activation,
            )
        if residual is not None:
            raise ValueError("residual: the gate alone has none; expected None with return_gate=True")
        options = {"pool": self.pool, "ties": self.ties, "gate": self.gate}
        return per_channel(gate_alone(x, self._squeeze, self._logits, **options), x)

    def _logits(self, descriptor: Tensor) -> Tensor:
        return excite(descriptor, *self._excitation(), layer=self.layer, activation=self.activation)


class SqueezeExcite(_ChannelGate):
    """See `fused_attn.nn.SqueezeExcite`."""

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        divisor: int | None = None,
        hidden: int | None = None,
        bias: bool = True,
        pool: str = "avg",
        ties: str = "first",
        activation: str = "relu",
        gate: str = "sigmoid",
        post_activation: str = "identity",
        return_gate: bool = False,
    ) -> None:
        super().__init__(
            channels,
            layer="dense",
            pool=pool,
            ties=ties,
            activation=activation,
            gate=gate,
            post_activation=post_activation,
            return_gate=return_gate,
        )
        if hidden is None:
            hidden = hidden_channels(channels, reduction, divisor)
        positive_int("hidden", hidden)
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def _excitation(self) -> Excitation:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class EffectiveSE(_ChannelGate):
    """See `fused_attn.nn.EffectiveSE`."""

    def __init__(
        self,
        channels: int,
        *,
        bias: bool = True,
        pool: str = "avg",
        ties: str = "first",
        gate: str = "hard_sigmoid",
        post_activation: str = "identity",
        return_gate: bool = False,
    ) -> None:
        super().__init__(
            channels,
            layer="dense",
            pool=pool,
            ties=ties,
            activation="identity",
            gate=gate,
            post_activation=post_activation,
            return_gate=return_gate,
        )
        self.fc = nn.Linear(channels, channels, bias=bias)

    def _excitation(self) -> Excitation:
        return self.fc.weight, self.fc.bias, None, None


class ECA(_ChannelGate):
    """See `fused_attn.nn.ECA`."""

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        padding: str = "zeros",
        pool: str = "avg",
        ties: str = "first",
        gate: str = "sigmoid",
        post_activation: str = "identity",
        return_gate: bool = False,
    ) -> None:
        if padding not in ("zeros", "circular"):
            raise ValueError(f"padding: expected one of zeros, circular; got {padding!r}")
        super().__init__(
            channels,
            layer="conv" if padding == "zeros" else "circular",
            pool=pool,
            ties=ties,
            activation="identity",
            gate=gate,
            post_activation=post_activation,
            return_gate=return_gate,
        )
        if kernel_size is None:
            kernel_size = eca_kernel_size(channels, gamma, beta)
        elif positive_int("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number; got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def _excitation(self) -> Excitation:
        return self.conv.weight, None, None, None
