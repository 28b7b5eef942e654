"""What operators stand for, for those who cannot call them: exporters write an operator out by its formula, counters
count what the formula does.

`torch.onnx.export` and `ExportedProgram.run_decompositions` find a formula in torch's own table of decompositions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import global_decomposition_table
from torch.utils._pytree import tree_map_only

#: From an operator's arguments to its first result, or the first ones.
Formula = Callable[..., Tensor | Sequence[Tensor]]
Fake = Callable[..., Tensor | tuple[Tensor, ...]]

#: What a counter asks a backward operator for, by name: parameters of layers, which may be frozen.
_WEIGHTS = frozenset({"weight", "weight1", "weight2", "spatial_weight"})


def write_out(op: torch._ops.OpOverload, formula: Formula, fake: Fake) -> None:
    """Have the operator written out by its formula. What else it gives is kept for a backward, and NaN there: nothing
    in a graph that is written out reads it."""

    def written_out(*arguments: Any) -> Any:
        made = formula(*arguments)
        made = (made,) if isinstance(made, Tensor) else tuple(made)
        count = len(op._schema.returns)
        if count == 1:
            return made[0]
        kept = fake(*arguments)[len(made) :]
        return (*made, *(t.new_full(t.shape, torch.nan if t.is_floating_point() else -1) for t in kept))

    global_decomposition_table["post_autograd"][op] = written_out
    # Fake tensors of open sizes ask a decomposition for them, unless there is an entry here.
    global_decomposition_table["meta"][op] = fake


_waiting: list[tuple[torch._ops.OpOverload, torch._ops.OpOverload | None, Formula]] = []


def count_flops(op: torch._ops.OpOverload, backward: torch._ops.OpOverload | None, formula: Formula) -> None:
    """Have `torch.utils.flop_counter` count of the operator what it counts of the formula, and of its backward what it
    counts of a formula's: once more for what flows on, and once more for the weights if these learn."""
    _waiting.append((op, backward, formula))


def tell_counter() -> None:
    """The counter imports Triton, so nothing is told before somebody else has imported it: what `import fused_attn` and
    the fake kernels look for. Of modules it sees the layers anyway, which run one by one while it listens to them."""
    if _waiting and "torch.utils.flop_counter" in sys.modules:
        while _waiting:
            _tell(*_waiting.pop())


def _tell(op: torch._ops.OpOverload, backward: torch._ops.OpOverload | None, formula: Formula) -> None:
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    def counted(*arguments: Any, **_: Any) -> int:
        given = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), arguments)
        with FlopCounterMode(display=False) as counter:
            formula(*given)
        return int(counter.get_total_flops())

    flop_registry[op.overloadpacket] = counted
    if backward is None:
        return
    names, of_backward = ([a.name for a in o._schema.arguments] for o in (op, backward))

    def counted_backward(*arguments: Any, **_: Any) -> int:
        given = dict(zip(of_backward, arguments, strict=True))
        weights = [given[name] for name in names if name in _WEIGHTS and given[name] is not None]
        times = 1 + (not weights or any(weight.requires_grad for weight in weights))
        return times * counted(*(given[name] for name in names))

    flop_registry[backward.overloadpacket] = counted_backward
