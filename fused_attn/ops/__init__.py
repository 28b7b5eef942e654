"""The dispatcher operators: schema, fake kernel and backward, one file an op; one overload a backend."""

from .channel_gate import channel_gate
from .scale import scale
from .squeeze import squeeze

__all__ = ["channel_gate", "scale", "squeeze"]
