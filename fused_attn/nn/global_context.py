"""Global context, GCNet's block."""

from __future__ import annotations

from .. import functional, reference


class GlobalContext(reference.GlobalContext):
    """Global context: the map's attention-weighted mean, through an MLP, is added to the map or gates its channels.

    The context, (B, C), is the mean of x over space, each position weighted by the softmax over all positions of a 1x1
    convolution to one channel: one read of the map. Of it fc2(activation(norm(fc1(context)))), norm a LayerNorm over
    the hidden channels, is what is added to every position ("add"), or with a sigmoid behind it the gate of every
    channel ("scale"); "both" scales, then adds, with an MLP each.

    Args:
        channels: C, the channels of the map.
        fuse: "add" (the paper), "scale" (timm) or "both".
        ratio: the MLPs are int(C * ratio) wide.
        divisor: round C * ratio to a multiple of this instead, as timm does (its defaults are 1, and a ratio of 1/8).
        hidden: explicit width of them, instead of `ratio`.
        pooling: "attention", or "avg": the context is the plain mean.
        activation, gate: names in `fused_attn.codes.ACTIVATIONS`.
        eps: of the LayerNorms; timm's is 1e-6.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape, dtype and layout. The last
    layers start at zero, as the authors' do: "add" as the identity, "scale" with gates of one half.

    Keys: timm's, `conv_attn.weight` (1, C, 1, 1), `conv_attn.bias` and, for each of `mlp_add` and `mlp_scale` that
    there is, `fc1.weight` (hidden, C, 1, 1), `fc1.bias`, `norm.weight`, `norm.bias`, `fc2.weight` (C, hidden, 1, 1),
    `fc2.bias`. The authors' load too: `conv_mask`, `channel_add_conv.{0,1,3}` and `channel_mul_conv.{0,1,3}`, with
    LayerNorms over (hidden, 1, 1).

    Raises:
        ValueError: an option is out of range, or the ratio leaves no hidden channel; in `forward`: x has not `channels`
            channels.

    Source: GCNet, arXiv:1904.11492; equivalent to the authors' `ContextBlock` and to timm's `GlobalContext`
    (fuse="scale", ratio=1 / 8, divisor=1, eps=1e-6).
    """

    _context_gate = staticmethod(functional.context_gate)
    _context_pool = staticmethod(functional.context_pool_with_map)
    _squeeze = staticmethod(functional.squeeze)
    _scale = staticmethod(functional.scale)
