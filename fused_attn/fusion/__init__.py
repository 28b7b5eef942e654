"""fuse(model): blocks of known host libraries run fused, in place, with everything they own left as it is."""

from . import monai, own, segmentation_models, tails, timm, torchvision, ultralytics  # noqa: F401  (they register)
from .api import FusionError, fuse, unfuse
from .registry import CbamGate, ChannelGate, OwnLayers, SpatialGate, SplitGate, register
from .report import Report, Row, explain

__all__ = [
    "CbamGate",
    "ChannelGate",
    "FusionError",
    "OwnLayers",
    "Report",
    "Row",
    "SpatialGate",
    "SplitGate",
    "explain",
    "fuse",
    "register",
    "unfuse",
]
