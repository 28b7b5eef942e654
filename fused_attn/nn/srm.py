"""SRM: style-based recalibration."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small


@eager_where_small()
class SRM(reference.SRM):
    """Style-based recalibration: x * sigmoid(BatchNorm(w1 mean + w2 deviation)), two weights a channel.

    The deviation is the standard one over space, with Bessel's correction: NaN on maps of one position, as torch's. In
    3 passes over the map, and 7 backward.

    Args:
        channels: C.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape. In training B must be at
    least 2: the BatchNorm has one value a sample.

    Keys: those of the common code, `cfc.weight` (C, 1, 2) and `bn.*`. `load_state_dict` also takes the authors' `cfc`,
    (C, 2).

    Raises:
        ValueError: channels is no positive integer; in `forward`: x has not `channels` channels.

    Source: SRM, arXiv:1903.10829; equivalent to the common `SRMLayer`.
    """

    _moments_gate = staticmethod(functional.moments_gate)
