"""CCNet's criss-cross attention."""

from __future__ import annotations

from .. import functional, reference


class CrissCrossAttention(reference.CrissCrossAttention):
    """Criss-cross attention: x + gamma * (values of the row and the column, weighted), as often as `recurrence` says.

    Query, key and value are 1x1 convolutions of x. The weights of a position are one softmax of query . key over the
    H positions of its column, itself left out, and the W of its row; there is no scale. Twice, with the same
    parameters, every position has met every other. gamma, one number, starts at 0.

    Args:
        channels: of the map.
        reduction: queries and keys have channels // reduction channels.
        recurrence: how often the block is applied to its own result; the authors' R. Their class is one application.

    `forward(x)`: x (B, channels, H, W); a map of the same shape and layout.

    Keys: those of the authors' code, `query_conv.*`, `key_conv.*`, `value_conv.*`, `gamma` (1,). `load_state_dict` also
    takes mmcv's `gamma.scale`.

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or is not 2-D.

    Source: CCNet: Criss-Cross Attention for Semantic Segmentation, arXiv:1811.11721; equivalent to the authors'
    `CrissCrossAttention`, the form in plain PyTorch.
    """

    _criss_cross_attention = staticmethod(functional.criss_cross_attention)
    _scale = staticmethod(functional.scale)
