"""fuse(model): blocks of known host libraries run fused, in place, with everything they own left as it is."""

from .api import FusionError, fuse, unfuse
from .changing import tails  # noqa: F401  (its adapters register)
from .hosts import monai, own, segmentation_models, timm, torchvision, ultralytics  # noqa: F401
from .hosts.registry import register
from .recipes.recipe import CbamGate, ChannelGate, OwnLayers, SpatialGate, SplitGate
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
