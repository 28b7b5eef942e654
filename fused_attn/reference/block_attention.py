"""The modules of CBAM in plain PyTorch: channel attention, spatial attention, and one after the other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..codes import ACTIVATIONS, FUNCTIONS, TIES, code
from .cbam import cbam
from .channel_pool import Order, channel_pool
from .checkpoints import OtherNames
from .norm_gate import update_statistics
from .scale import scale
from .spatial_gate import spatial_gate, spatial_logits
from .squeeze_excite import Excitation, _ChannelGate, eca_kernel_size, finite, hidden_channels, positive_int

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS: tuple[Any, ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MLP_LAYERS = ("linear", "conv1x1", "conv1d")


def odd(argument: str, value: int) -> int:
    if positive_int(argument, value) % 2 == 0:
        raise ValueError(f"{argument}: expected an odd number; got {value}")
    return value


def spatial_rank(rank: int) -> int:
    if isinstance(rank, bool) or rank not in (1, 2, 3):
        raise ValueError(f"rank: expected 1, 2 or 3; got {rank!r}")
    return rank


def optional_channels(channels: int | None) -> int | None:
    """The channel count of a block that works for any: given, maps are held against it."""
    return channels if channels is None else positive_int("channels", channels)


def check_channels(channels: int | None, x: Tensor) -> None:
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"x: expected {channels} channels; got shape {tuple(x.shape)}")


def check_rank(rank: int, x: Tensor) -> None:
    if x.dim() != rank + 2:
        shape = ("(B, C, L)", "(B, C, H, W)", "(B, C, D, H, W)")[rank - 1]
        raise ValueError(f"x: expected {shape}; got shape {tuple(x.shape)}")


def uses_batch_statistics(norm: Any) -> bool:
    """Whether a BatchNorm takes mean and variance from its input, not from what it has seen before."""
    return norm.training or norm.running_mean is None


def folded_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Factor and shift, each (C,), of a normalisation with these statistics; float32 for half precision."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    factor = (var.to(dtype) + eps).rsqrt()
    if weight is not None:
        factor = factor * weight.to(dtype)
    shift = -mean.to(dtype) * factor
    return factor, shift if bias is None else shift + bias.to(dtype)


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """`folded_affine` of a BatchNorm that uses its running statistics."""
    return folded_affine(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, norm: Any, affine_of: Callable[[Any], tuple[Tensor, Tensor]] = affine_of
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution to one channel with the BatchNorm that follows it, in eval mode.

    Float32 for half precision, where a rounded factor would cost every logit digits.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factor, shift = (t.to(dtype) for t in affine_of(norm))
    return weight.to(dtype) * factor, shift if bias is None else shift + bias.to(dtype) * factor


def count_batch(norm: Any) -> float:
    """The momentum of this call, as a BatchNorm's own forward finds it; counts the batch."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def run_normalised(norm: Any, x: Tensor, run: Callable[..., Any]) -> Tensor:
    """run(batch_norm=..., keep=...), a map gated by position, whose statistics go into the buffers of the BatchNorm
    `norm` as its own forward would put them; run() where norm is None."""
    if norm is None:
        return run()

    def keep(mean: Tensor, variance: Tensor) -> None:
        momentum = count_batch(norm)
        count = x.shape[0] * math.prod(x.shape[2:])
        if count:
            variance = variance * (count / (count - 1))
            update_statistics(norm.running_mean, norm.running_var, mean, variance, momentum)

    keeps = norm.training and norm.track_running_stats
    y, *_ = run(batch_norm=(norm.weight, norm.bias, norm.eps), keep=keep if keeps else None)
    return y


class ChannelAttention(OtherNames, _ChannelGate):
    """See `fused_attn.nn.ChannelAttention`."""

    other_names: ClassVar[dict[str, str]] = {
        theirs: ours
        for first, second in (("mlp.1", "mlp.3"), ("mlp.fc1", "mlp.fc2"))
        + tuple((f"{name}.0", f"{name}.2") for name in ("fc", "fc_layers", "sharedMLP", "se"))
        for theirs, ours in ((first, "fc1"), (second, "fc2"))
    }

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        divisor: int | None = None,
        hidden: int | None = None,
        bias: bool = True,
        layer: str = "linear",
        kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        pool: str = "both",
        ties: str = "first",
        activation: str = "relu",
        gate: str = "sigmoid",
        post_activation: str = "identity",
        return_gate: bool = False,
    ) -> None:
        if layer not in MLP_LAYERS:
            raise ValueError(f"layer: expected one of {', '.join(MLP_LAYERS)}; got {layer!r}")
        super().__init__(
            channels,
            layer="conv" if layer == "conv1d" else "dense",
            pool=pool,
            ties=ties,
            activation=activation,
            gate=gate,
            post_activation=post_activation,
            return_gate=return_gate,
        )
        if layer == "conv1d":
            k = eca_kernel_size(channels, gamma, beta) if kernel_size is None else odd("kernel_size", kernel_size)
            self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)
            return
        if kernel_size is not None:
            raise ValueError(f"kernel_size: expected None for layer={layer!r}; got {kernel_size!r}")
        width = hidden_channels(channels, reduction, divisor) if hidden is None else positive_int("hidden", hidden)
        dense = nn.Linear if layer == "linear" else functools.partial(nn.Conv2d, kernel_size=1)
        self.fc1 = dense(channels, width, bias=bias)
        self.fc2 = dense(width, channels, bias=bias)

    def _excitation(self) -> Excitation:
        if self.layer == "conv":
            return self.conv.weight, None, None, None
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias


class SpatialAttention(OtherNames):
    """See `fused_attn.nn.SpatialAttention`."""

    #: The functions the forward pass is made of; `fused_attn.nn` puts the fused ones here.
    _channel_pool = staticmethod(channel_pool)
    _spatial_gate = staticmethod(spatial_gate)
    _spatial_logits = staticmethod(spatial_logits)
    _scale = staticmethod(scale)
    _affine_of = staticmethod(affine_of)

    other_names: ClassVar[dict[str, str]] = {"spatial": "conv", "conv1": "conv", "cv1": "conv"}

    def __init__(
        self,
        channels: int | None = None,
        *,
        kernel_size: int | Sequence[int] = 7,
        order: Order = ("max", "mean"),
        bias: bool = False,
        batch_norm: bool = True,
        momentum: float = 0.01,
        ties: str = "first",
        gate: str = "sigmoid",
        post_activation: str = "identity",
        return_gate: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channels = optional_channels(channels)
        self.rank = spatial_rank(rank)
        sizes = (kernel_size,) * rank if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sizes) != rank:
            raise ValueError(f"kernel_size: expected an odd number or {rank} of them; got {kernel_size!r}")
        for size in sizes:
            odd("kernel_size", size)
        if tuple(order) not in (("max", "mean"), ("mean", "max")):
            raise ValueError(f"order: expected ('max', 'mean') or ('mean', 'max'); got {order!r}")
        self.order: Order = (order[0], order[1])
        code(TIES, "ties", ties)
        for argument, name in (("gate", gate), ("post_activation", post_activation)):
            code(ACTIVATIONS, argument, name)
        if return_gate and post_activation != "identity":
            raise ValueError("post_activation: the gate alone has none; expected 'identity' with return_gate=True")
        self.ties, self.gate, self.post_activation, self.return_gate = ties, gate, post_activation, return_gate
        conv: nn.Module = CONVOLUTIONS[rank - 1](2, 1, sizes, padding=tuple(k // 2 for k in sizes), bias=bias)
        # Names as in timm with the BatchNorm, and as in most other code without.
        finite("momentum", momentum)
        norm = NORMS[rank - 1](1, momentum=momentum) if batch_norm else None
        self.conv = conv if norm is None else nn.ModuleDict({"conv": conv, "bn": norm})

    def extra_repr(self) -> str:
        options = [] if self.channels is None else [str(self.channels)]
        options += [f"order={self.order!r}", f"gate={self.gate!r}"]
        options += [f"post_activation={self.post_activation!r}"] if self.post_activation != "identity" else []
        options += ["return_gate=True"] if self.return_gate else []
        return ", ".join(options)

    def _layers(self) -> tuple[Any, Any]:
        """The convolution and the BatchNorm."""
        return (self.conv["conv"], self.conv["bn"]) if isinstance(self.conv, nn.ModuleDict) else (self.conv, None)

    def _live_norm(self) -> Any:
        """The BatchNorm where it takes its statistics from the batch."""
        norm = self._layers()[1]
        return norm if norm is not None and uses_batch_statistics(norm) else None

    def _falls_apart(self) -> bool:
        """Whether the BatchNorm takes its statistics from the batch in a way that the op does not (SyncBatchNorm)."""
        norm = self._live_norm()
        return norm is not None and (type(norm) not in NORMS or norm.weight is None or norm.bias is None)

    def _convolution(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, with the BatchNorm folded in if it uses its running statistics."""
        conv, norm = self._layers()
        if norm is None or uses_batch_statistics(norm):
            return conv.weight, conv.bias
        return fold_batch_norm(conv.weight, conv.bias, norm, self._affine_of)

    def _gate(self, x: Tensor) -> Tensor:
        """The gate alone, (B, 1, *spatial)."""
        return self._gate_of_pools(self._channel_pool(x, order=self.order, ties=self.ties), self._spatial_logits)

    def _gate_of_pools(self, pooled: Tensor, spatial_logits: Callable[..., Tensor]) -> Tensor:
        conv, norm = self._layers()
        logits = spatial_logits(pooled, conv.weight, conv.bias)
        return FUNCTIONS[self.gate](logits if norm is None else norm(logits))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_channels(self.channels, x)
        if self.return_gate:
            if residual is not None:
                raise ValueError("residual: the gate alone has none; expected None with return_gate=True")
            return self._gate(x)
        if self._falls_apart():
            return self._scale(x, self._gate(x), residual=residual, post_activation=self.post_activation)
        run = functools.partial(
            self._spatial_gate,
            x,
            *self._convolution(),
            order=self.order,
            ties=self.ties,
            gate=self.gate,
            residual=residual,
            post_activation=self.post_activation,
        )
        return run_normalised(self._live_norm(), x, run)


class CBAM(OtherNames):
    """See `fused_attn.nn.CBAM`."""

    #: What it is made of; `fused_attn.nn` puts the fused ones here.
    _cbam = staticmethod(cbam)
    _channel_attention = ChannelAttention
    _spatial_attention = SpatialAttention

    other_names: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("ChannelGate", "ca", "channel_attention_block", "channel_attention", "ch_gate"), "channel"),
        **dict.fromkeys(("SpatialGate", "sa", "spatial_attention_block", "spatial_attention", "sp_gate"), "spatial"),
    }

    def __init__(
        self,
        channels: int,
        *,
        reduction: float = 16,
        divisor: int | None = None,
        hidden: int | None = None,
        bias: bool = True,
        layer: str = "linear",
        channel_kernel_size: int | None = None,
        gamma: float = 2,
        beta: float = 1,
        pool: str = "both",
        activation: str = "relu",
        no_spatial: bool = False,
        kernel_size: int | Sequence[int] = 7,
        order: Order = ("max", "mean"),
        spatial_bias: bool = False,
        batch_norm: bool = True,
        momentum: float = 0.01,
        ties: str = "first",
        gate: str = "sigmoid",
        post_activation: str = "identity",
        rank: int = 2,
    ) -> None:
        super().__init__()
        self.channel = self._channel_attention(
            channels,
            reduction=reduction,
            divisor=divisor,
            hidden=hidden,
            bias=bias,
            layer=layer,
            kernel_size=channel_kernel_size,
            gamma=gamma,
            beta=beta,
            pool=pool,
            ties=ties,
            activation=activation,
            gate=gate,
            post_activation=post_activation if no_spatial else "identity",
        )
        self.spatial = None
        if not no_spatial:
            self.spatial = self._spatial_attention(
                channels,
                kernel_size=kernel_size,
                order=order,
                bias=spatial_bias,
                batch_norm=batch_norm,
                momentum=momentum,
                ties=ties,
                gate=gate,
                post_activation=post_activation,
                rank=rank,
            )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        channel, spatial = self.channel, self.spatial
        if spatial is None:
            return channel(x, residual)
        if spatial._falls_apart():
            return spatial(channel(x), residual)
        check_channels(channel.channels, x)
        run = functools.partial(
            self._cbam,
            x,
            *channel._excitation(),
            *spatial._convolution(),
            layer=channel.layer,
            pool=channel.pool,
            channel_ties=channel.ties,
            activation=channel.activation,
            channel_gate=channel.gate,
            order=spatial.order,
            spatial_ties=spatial.ties,
            spatial_gate=spatial.gate,
            residual=residual,
            post_activation=spatial.post_activation,
        )
        return run_normalised(spatial._live_norm(), x, run)
