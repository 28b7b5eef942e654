"""Self-attention over positions and over channels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import functional, reference
from ..backends import autocasts
from ..reference.layout import lies_channels_last
from ..reference.self_attention import channel_self_attention as plain_channel_self_attention


def made_in_inference_mode(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.is_inference()


def channel_self_attention(x: Tensor, gamma: Tensor) -> Tensor:
    """x + gamma * softmax(-x x^T) x over the channels of x, (B, C, *spatial); gamma: (1,).

    gamma goes into the (C, C) weights and the sum into the second product, so that x is read three times and the
    result written once. channels_last maps are multiplied as they lie.
    """
    # Under autocast the product is in half precision, and x is added in its own. What inference mode has made cannot be
    # kept for the gradient of the weights that gamma is in.
    if autocasts(x) or made_in_inference_mode(x):
        return plain_channel_self_attention(x, gamma)
    rows = x.flatten(2)
    weights = (gamma * (-(rows @ rows.transpose(1, 2))).softmax(2)).to(x.dtype)
    if lies_channels_last(x):
        positions = rows.transpose(1, 2)
        return torch.baddbmm(positions, positions, weights.transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    return torch.baddbmm(rows, weights, rows).reshape(x.shape)


class SelfAttention2d(reference.SelfAttention2d):
    """SAGAN's self-attention: x + gamma * (values weighted by the softmax over positions of query . key).

    In the original keys and values are maxima of 2x2 positions after their convolutions, values have half the channels
    and a fourth 1x1 convolution brings them back; none has a bias. The port that is common in PyTorch has neither, and
    values of all channels: it is `PositionAttention`. gamma, one number, starts at 0. Spectral normalisation is
    torch's, on the convolutions. The matrix of all pairs of positions is left to `functional.position_attention`.

    Args:
        channels: of the map.
        form: "original" or "port".
        reduction: queries and keys have channels // reduction channels.
        bias: of the convolutions; None: in the port alone.

    `forward(x)`: x (B, channels, H, W); a map of the same shape and layout, without the weights that ports return.

    Keys: `query_conv.*`, `key_conv.*`, `value_conv.*`, `out_conv.*` (the original alone), `gamma` (1,).
    `load_state_dict` also takes `theta`, `phi`, `g`, `o` (BigGAN), `snconv1x1_theta`, ..., `snconv1x1_attn`, and
    `sigma`.

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or is not 2-D.

    Source: Self-Attention Generative Adversarial Networks, arXiv:1805.08318; equivalent to the authors'
    `sn_non_local_block_sim`.
    """

    _position_attention = staticmethod(functional.position_attention)


class PositionAttention(reference.PositionAttention):
    """DANet's attention between positions: x + gamma * (values weighted by the softmax of query . key).

    Query, key and value are 1x1 convolutions of x; the products are not scaled; gamma, one number, starts at 0.

    Args:
        channels: of the map.
        reduction: queries and keys have channels // reduction channels.
        hidden: explicit number of these channels, instead.
        rank: number of spatial axes, 1, 2 or 3.

    `forward(x)`: x (B, channels, *spatial); a map of the same shape and layout.

    Keys: those of `PAM_Module`, `query_conv.*`, `key_conv.*`, `value_conv.*`, `gamma` (1,). `load_state_dict` takes
    mmseg's too (`query_project`, ..., `gamma.scale`), and pytorchcv's `scale.alpha`.

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or not `rank` spatial axes.

    Source: Dual Attention Network for Scene Segmentation, arXiv:1809.02983; equivalent to the authors' `PAM_Module`.
    """

    _position_attention = staticmethod(functional.position_attention)


class ChannelSelfAttention(reference.ChannelSelfAttention):
    """DANet's attention between channels: x + gamma * (A x), A the softmax over channels of -x x^T.

    The authors subtract each energy from the largest of its row before the softmax, which changes nothing but which
    numbers overflow: here an energy beyond float16 weighs nothing, there it makes NaN. gamma starts at 0.

    Args:
        channels: C; None: any. No parameter depends on it.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape and layout.

    Keys: `gamma` (1,). `load_state_dict` also takes mmseg's `gamma.scale` and pytorchcv's `scale.alpha`.

    Raises:
        ValueError: in `forward`: x has not `channels` channels.

    Source: Dual Attention Network for Scene Segmentation, arXiv:1809.02983; equivalent to the authors' `CAM_Module`.
    """

    _channel_self_attention = staticmethod(channel_self_attention)


class DualAttention(reference.DualAttention):
    """DANet's head: `PositionAttention` and `ChannelSelfAttention` side by side, each between 3x3 convolutions, added.

    Args:
        channels: of the map.
        out_channels: classes; None: the head ends with the sum of its two branches.
        hidden: width of the branches; by default channels // 4.
        reduction: queries and keys of the position attention have hidden // reduction channels.
        dropout: of whole channels before the classifiers.

    `forward(x)`: x (B, channels, H, W). Without out_channels a map (B, hidden, H, W); with it three maps of
    (B, out_channels, H, W), from the sum, from the position branch and from the channel branch.

    Keys: those of the authors' `DANetHead`: `conv5a`, `sa`, `conv51`, `conv6` for positions, `conv5c`, `sc`, `conv52`,
    `conv7` for channels, `conv8` for the sum. `load_state_dict` also takes those of mmseg's `DAHead` and pytorchcv's
    `DANetHead`.

    Raises:
        ValueError: an option out of range, or a reduction that leaves no channel; in `forward`: x has not `channels`
            channels or is not 2-D.

    Source: Dual Attention Network for Scene Segmentation, arXiv:1809.02983; equivalent to the authors' `DANetHead`.
    """

    _position_attention = staticmethod(functional.position_attention)
    _channel_self_attention = staticmethod(channel_self_attention)
