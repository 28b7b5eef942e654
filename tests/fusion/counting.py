"""What really runs fused, and what is said to."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attn import explain


class FusedOperators(TorchDispatchMode):
    """Counts the fused operators that run."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "fused_attn" in str(function)
        return function(*args, **(kwargs or {}))


def said_to_run_fused(model: nn.Module) -> int:
    """How many blocks, by `explain`."""
    return sum(row.fused for row in explain(model))
