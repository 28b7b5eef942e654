"""The dispatcher operators: schema, fake kernel and backward, one file an op; one overload a backend."""

from .channel_gate import channel_gate
from .scale import scale
from .spatial_gate import spatial_gate
from .squeeze import squeeze

__all__ = ["channel_gate", "scale", "spatial_gate", "squeeze"]
