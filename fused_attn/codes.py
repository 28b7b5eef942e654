"""The integer codes by which options cross the dispatcher, and what each one means in PyTorch.

Python functions take names; operators, C++ and Triton take the code. `csrc/codes.h` holds the same numbers; a test
keeps the two together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, int] = {
    "identity": 0,
    "relu": 1,
    "silu": 2,
    "gelu": 3,
    "gelu_tanh": 4,
    "hard_swish": 5,
    "sigmoid": 6,
    "hard_sigmoid": 7,
    "tanh": 8,
    "leaky_relu": 9,
    "relu6": 10,
}
POOLS: dict[str, int] = {"avg": 0, "max": 1, "avgmax": 2, "both": 3}
TIES: dict[str, int] = {"first": 0, "even": 1}
LAYERS: dict[str, int] = {"dense": 0, "conv": 1, "circular": 2}

#: The two maps of a channel pool by their order, as a convolution's weights have them: `mean_first`.
ORDERS: dict[tuple[str, str], int] = {("max", "mean"): 0, ("mean", "max"): 1}

#: How several gates act on a map together, see `fused_attn.functional.mixed_scale`.
COMBINES: dict[str, int] = {"product": 0, "sum": 1, "max": 2, "sigmoid": 3, "strips": 4, "gate": 5}

#: How the weights of several branches come of their logits, see `fused_attn.functional.select`.
SELECTIONS: dict[str, int] = {"softmax": 0, "sigmoid": 1}

#: What torch multiplies by in the backward of hardsigmoid, in float64 too.
(_SIXTH,) = struct.unpack("f", struct.pack("f", 1 / 6))


def _hard_sigmoid(x: Tensor) -> Tensor:
    """F.hardsigmoid has no second derivative, and min(max(x + 3, 0), 6) / 6 as people write it has."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.hardsigmoid(x)
    clamped = F.hardtanh(x, -3.0, 3.0)
    if x.dtype == torch.float64:
        return F.hardsigmoid(x.detach()) + (clamped - clamped.detach()) * _SIXTH
    return clamped.add(3).div(6)


#: What each activation is, as PyTorch computes it (the slope of leaky_relu is torch's default, 0.01).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hard_swish": F.hardswish,
    "sigmoid": lambda x: x.sigmoid(),
    "hard_sigmoid": _hard_sigmoid,
    "tanh": lambda x: x.tanh(),
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
}


def code(table: dict[str, int], argument: str, name: str) -> int:
    """The code of an option by its name.

    Raises:
        ValueError: the name is not in the table; the message lists those that are.
    """
    try:
        return table[name]
    except (KeyError, TypeError):
        raise ValueError(f"{argument}: expected one of {', '.join(table)}; got {name!r}") from None
