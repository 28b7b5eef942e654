"""The squeeze, excite, scale family: SqueezeExcite, EffectiveSE, ECA.

Each is its reference with the fused functions put in: same arguments, same `state_dict`.
All take x of shape (B, C, *spatial) with one to three spatial axes, dtype float64, float32, float16 or
bfloat16, and return a map of the same shape, dtype and layout, or with `return_gate=True` the gate
alone, (B, C, 1, ...). `forward(x, residual=None)` gives post_activation(x * gate + residual).
"""

from __future__ import annotations

from .. import functional, reference


class SqueezeExcite(reference.SqueezeExcite):
    """Squeeze-and-excitation: x * gate(fc2(activation(fc1(pool(x))))).

    Args:
        channels: C, the channels of the map.
        reduction: the bottleneck has channels // reduction units.
        divisor: round channels / reduction to a multiple of this, as timm does (its default is 8).
        hidden: explicit width of the bottleneck, instead of `reduction`.
        bias: whether fc1 and fc2 have biases.
        pool: "avg", "max" or "avgmax", the mean of both.
        ties: where the gradient of a maximum goes: "first" (adaptive_max_pool, max(dim)) or "even" (amax).
        activation, gate: names in `fused_attn.codes.ACTIVATIONS`.
        post_activation: what follows the sum with `residual`.
        return_gate: return the gate, (B, C, 1, ...), instead of the gated map.

    Keys: `fc1.weight` (hidden, C), `fc1.bias`, `fc2.weight` (C, hidden), `fc2.bias`.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel.

    Source: Squeeze-and-Excitation Networks, arXiv:1709.01507; equivalent to timm's `SEModule` (divisor=8),
    torchvision's `SqueezeExcitation` and MONAI's `ChannelSELayer`.
    """

    _squeeze = staticmethod(functional.squeeze)
    _channel_gate = staticmethod(functional.channel_gate)


class EffectiveSE(reference.EffectiveSE):
    """Effective squeeze-excitation, one layer without a bottleneck: x * gate(fc(pool(x))).

    Args: as in `SqueezeExcite`, without reduction and activation.

    Keys: `fc.weight` (C, C), `fc.bias`.

    Source: CenterMask, arXiv:1911.06667; equivalent to timm's `EffectiveSEModule`.
    """

    _squeeze = staticmethod(functional.squeeze)
    _channel_gate = staticmethod(functional.channel_gate)


class ECA(reference.ECA):
    """Efficient channel attention: x * gate(conv1d(pool(x))), the convolution running over the channels.

    Args:
        channels: C, the channels of the map.
        kernel_size: explicit odd kernel size; None: adaptive, see `fused_attn.reference.eca_kernel_size`.
        gamma, beta: of the adaptive kernel size.
        padding: "zeros" (the paper) or "circular" (timm's CecaModule).
        pool, ties, gate, post_activation, return_gate: as in `SqueezeExcite`.

    Keys: `conv.weight` (1, 1, kernel_size).

    Raises:
        ValueError: an even kernel size, or an option out of range.

    Source: ECA-Net, arXiv:1910.03151; equivalent to the authors' `eca_layer` and timm's `EcaModule`.
    """

    _squeeze = staticmethod(functional.squeeze)
    _channel_gate = staticmethod(functional.channel_gate)
