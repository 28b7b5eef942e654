"""scSE: concurrent spatial and channel squeeze-and-excitation."""

from __future__ import annotations

from .. import functional, reference
from .small import eager_where_small


@eager_where_small()
class SCSE(reference.SCSE):
    """Concurrent squeeze-and-excitation: x * c and x * s, added or the larger of the two.

    c = sigmoid(W2 relu(W1 mean(x) + b1) + b2), one number a channel; s = sigmoid(w x + b), one a position.

    Args:
        channels: C, the channels of the map.
        reduction: c has channels // reduction hidden units (16: segmentation_models_pytorch; 2: the authors).
        combine: "sum" or "max" of x * c and x * s.

    `forward(x)`: x (B, C, *spatial), one to three spatial axes; a map of the same shape.

    Keys: those of segmentation_models_pytorch, `cSE.1.weight` (hidden, C, 1, 1), `cSE.1.bias`, `cSE.3.weight`,
    `cSE.3.bias`, `sSE.0.weight` (1, C, 1, 1), `sSE.0.bias`. `load_state_dict` also takes the authors' `cSE.fc1`,
    `cSE.fc2` and `sSE.conv`.

    Raises:
        ValueError: an option is out of range, or the reduction leaves no hidden channel.

    Source: arXiv:1803.02579 and 1808.08127; equivalent to segmentation_models_pytorch's `SCSEModule`, and to the
    authors' `ChannelSpatialSELayer` (reduction=2, combine="max").
    """

    _squeeze = staticmethod(functional.squeeze)
    _mixed_scale = staticmethod(functional.mixed_scale)
