"""Global response normalisation and gated channel transformation: gates made of each channel's norm."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small, up_to

#: Without gradients plain PyTorch passes over the map as often as the operators do, and its passes over maps in a
#: processor's cache cost no more than those operators' calls.
is_small_norm, is_small_transformation = up_to(1 << 20, 1 << 19), up_to(1 << 22, 1 << 20)


@eager_where_small(is_small_norm)
class GlobalResponseNorm(reference.GlobalResponseNorm):
    """Global response normalisation: x + weight * (x * n) + bias, n each channel's norm over the mean of all channels'.

    The norm is the square root of the sum of squares over space, n = norm / (mean of the norms + eps). In 3 passes over
    the map, and 6 backward.

    Args:
        channels: C.
        eps: added to the mean of the norms.
        channels_last: maps are (B, *spatial, C), as in the MLPs of ConvNeXt V2.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape and dtype. It starts as the
    identity.

    Keys: timm's, `weight` (C,) and `bias` (C,). `load_state_dict` also takes the authors' `gamma` and `beta`,
    (1, 1, 1, C).

    Raises:
        ValueError: an option is out of range; in `forward`: x has not `channels` channels.

    Source: ConvNeXt V2, arXiv:2301.00808; equivalent to the authors' `GRN` (channels_last=True) and timm's
    `GlobalResponseNorm`, whose default is channels_last=True.
    """

    _energy_gate = staticmethod(functional.energy_gate)


@eager_where_small(is_small_transformation)
class GatedChannelTransformation(reference.GatedChannelTransformation):
    """Gated channel transformation: x * (1 + tanh(gamma * e / rms(e) + beta)), e = alpha * the norm of each channel.

    The norm is the square root of the sum of squares over space plus eps, and rms(e) the root of the mean of e squared
    over the channels plus eps. In 3 passes over the map, and 5 backward.

    Args:
        channels: C.
        eps: added under both roots.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape. It starts as the identity.

    Keys: the authors', `alpha`, `gamma` and `beta`, each (1, C, 1, 1).

    Raises:
        ValueError: an option is out of range; in `forward`: x has not `channels` channels.

    Source: Gated Channel Transformation, arXiv:1909.11519; equivalent to the authors' `GCT` in its default mode, "l2".
    """

    _energy_gate = staticmethod(functional.energy_gate)
