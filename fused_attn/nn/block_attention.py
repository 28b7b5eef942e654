"""The CBAM family: ChannelAttention, SpatialAttention, and CBAM, one after the other.

Each is its reference with the fused functions put in: same arguments, same `state_dict`.
All take x of shape (B, C, *spatial) with one to three spatial axes, dtype float64, float32, float16 or
bfloat16, and return a map of the same shape, dtype and layout, or with `return_gate=True` the gate alone.
`forward(x, residual=None)` gives post_activation(x * gate + residual).

A BatchNorm is part of the op: folded into the convolution where it uses its running statistics (eval mode), else with
those of the batch. Another norm put in its place, such as SyncBatchNorm, works on the map of one channel between
`channel_pool` and `scale`.
"""

from __future__ import annotations

from .. import functional, reference
from .normalised import affine_of


class ChannelAttention(reference.ChannelAttention):
    """CBAM's channel attention: x * gate(mlp(mean(x)) + mlp(max(x))), mean and maximum over space, one MLP for both.

    Args:
        channels: C, the channels of the map.
        reduction: the MLP has channels // reduction hidden units.
        divisor: round channels / reduction to a multiple of this, as timm does (its default here is 1).
        hidden: explicit width of the MLP, instead of `reduction`.
        bias: whether fc1 and fc2 have biases; conv1d never has one.
        layer: "linear" or "conv1x1", an MLP whose weights have that shape, or "conv1d": instead of the MLP one
            convolution over the channels, as in ECA.
        kernel_size: of conv1d, odd; None: adaptive, see `fused_attn.reference.eca_kernel_size`.
        gamma, beta: of the adaptive kernel size.
        pool: "both" as above, "avgmax": the MLP sees the mean of both pools (timm's light form), "avg" or "max".
        ties: where the gradient of a maximum goes: "first" (adaptive_max_pool, max(dim)) or "even" (amax).
        activation, gate: names in `fused_attn.codes.ACTIVATIONS`.
        post_activation: what follows the sum with `residual`.
        return_gate: return the gate, (B, C, 1, ...), instead of the gated map.

    `forward(x, residual=None)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape.

    Keys: `fc1.weight` (hidden, C) or (hidden, C, 1, 1), `fc1.bias`, `fc2.weight`, `fc2.bias`; conv1d: `conv.weight`
    (1, 1, k). `load_state_dict` also takes checkpoints in which fc1 and fc2 are called `mlp.1` and `mlp.3`, `fc.0`
    and `fc.2`, or the like, and Linear weights for 1x1 convolutions and the reverse.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel.

    Source: CBAM, arXiv:1807.06521; equivalent to the authors' `ChannelGate` with its pools avg and max, and to timm's
    `ChannelAttn` (divisor=1, bias=False, layer="conv1x1", ties="even"), with pool="avgmax" to `LightChannelAttn`.
    """

    _squeeze = staticmethod(functional.squeeze)
    _channel_gate = staticmethod(functional.channel_gate)


class SpatialAttention(reference.SpatialAttention):
    """CBAM's spatial attention: x * gate(norm(conv([max(x), mean(x)]))), maximum and mean over channels.

    Args:
        channels: C; None: any. The block has no parameter that depends on it.
        kernel_size: of the convolution, odd, or one for each axis.
        order: of the two maps that the convolution sees: ("max", "mean") as the authors and most, or
            ("mean", "max") as timm, ultralytics and others; a checkpoint is only right with its own.
        bias: whether the convolution has one.
        batch_norm: whether a BatchNorm of one channel follows the convolution.
        momentum: of the BatchNorm (0.01: the authors; 0.1: timm).
        ties: where the gradient of a maximum goes: "first" (max(dim)) or "even" (amax).
        gate: a name in `fused_attn.codes.ACTIVATIONS`.
        post_activation: what follows the sum with `residual`.
        return_gate: return the gate, (B, 1, *spatial), instead of the gated map.
        rank: number of spatial axes, 1 to 3.

    `forward(x, residual=None)`: x (B, C, *spatial); a map of the same shape.

    Keys: with BatchNorm `conv.conv.weight` (1, 2, k, k), `conv.bn.*`; without `conv.weight`. `load_state_dict` also
    takes `spatial.conv` and `spatial.bn`, or `conv1` and `cv1` for `conv`.

    Raises:
        ValueError: an even kernel size or an option out of range; in `forward`: x has not `channels` channels.

    Source: CBAM, arXiv:1807.06521; equivalent to the authors' `SpatialGate`, to timm's `SpatialAttn`
    (order=("mean", "max"), ties="even", momentum=0.1), and to the paper as written (batch_norm=False).
    """

    _channel_pool = staticmethod(functional.channel_pool)
    _spatial_gate = staticmethod(functional.spatial_gate)
    _spatial_logits = staticmethod(functional.spatial_logits)
    _scale = staticmethod(functional.scale)
    _affine_of = staticmethod(affine_of)


class CBAM(reference.CBAM):
    """Convolutional block attention: `ChannelAttention`, then `SpatialAttention` on its output.

    Args:
        channels: C, the channels of the map.
        reduction, divisor, hidden, bias, layer, gamma, beta, pool, activation: of the channel attention.
        channel_kernel_size: its `kernel_size`, for layer="conv1d".
        no_spatial: leave out the spatial attention.
        kernel_size, order, batch_norm, momentum, rank: of the spatial attention; spatial_bias: its `bias`.
        ties, gate: of both.
        post_activation: what follows the sum with `residual`.

    `forward(x, residual=None)`: x (B, C, *spatial); a map of the same shape.

    Keys: `channel.*` as in `ChannelAttention` and `spatial.*` as in `SpatialAttention`. `load_state_dict` takes, with
    the arguments named, the checkpoints of

    - the authors' CBAM: the defaults,
    - timm's `CbamModule`: divisor=1, bias=False, layer="conv1x1", order=("mean", "max"), ties="even", momentum=0.1
      (these are our own keys and shapes too, so that timm loads what is saved here),
    - tutorials with `ca` and `sa`, `channel_attention_block` and `spatial_attention_block`, or `channel_attention`
      and `spatial_attention`: mostly bias=False, batch_norm=False and their `order`, `kernel_size` and `reduction`;
      External-Attention's also spatial_bias=True, and its output is `block(x, residual=x)`,
    - pytorchcv's `CbamBlock`: the defaults.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel; in `forward`: x has not
            `channels` channels.

    Source: CBAM, arXiv:1807.06521; equivalent to the authors' `CBAM` and to timm's `CbamModule`.
    """

    _cbam = staticmethod(functional.cbam)
    _channel_attention = ChannelAttention
    _spatial_attention = SpatialAttention
