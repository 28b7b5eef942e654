"""Where torch has no deterministic gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def torch_has_no_deterministic(x: Tensor) -> bool:
    """Whether torch's own gradients of sampling and of adaptive pools raise: on CUDA they add with atomics."""
    return x.is_cuda and torch.are_deterministic_algorithms_enabled()
