"""fused_attn: the attention blocks of convolutional networks, fused, with one line: `fuse(model)`."""

from . import functional, nn, reference
from .backends import backend, keep_operators
from .fusion import explain, fuse, unfuse
from .qualify import qualify
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "backend",
    "explain",
    "functional",
    "fuse",
    "keep_operators",
    "nn",
    "qualify",
    "reference",
    "unfuse",
    "warmup",
]
