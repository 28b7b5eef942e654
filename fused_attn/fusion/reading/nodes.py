"""What the nodes of a graph are: the function that is called, and how many dimensions its value has where no size is
known yet."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn


def name_of(node: fx.Node) -> str:
    """Of the function or method that is called."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", ""))


def dims_of(node: fx.Node, dims: int, block: nn.Module) -> int:
    """Of a value in a graph of a block's forward, of maps of so many dimensions; what is not known here is taken to
    leave the number as it is."""

    def of(value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return max(map(of, value), default=0)
        return dims_of(value, dims, block) if isinstance(value, fx.Node) else 0

    if node.op == "placeholder":
        return dims
    if node.op == "get_attr":
        found = operator.attrgetter(str(node.target))(block)
        return found.dim() if isinstance(found, Tensor) else dims
    if not node.args:
        return dims
    if node.op == "call_module":
        return _after(block.get_submodule(str(node.target)), of(node.args[0]))
    first = node.args[0]
    of_pair = node.target is operator.getitem and isinstance(first, fx.Node) and name_of(first) in _PAIRS
    if of_pair and isinstance(node.args[1], int):
        return of(first)
    change = _CHANGES.get(name_of(node))
    if change is None:
        return max(map(of, node.args))
    try:
        return change(of(first), *node.args[1:], **node.kwargs)
    except TypeError:  # names that only another version of it has
        return dims


def _after(layer: nn.Module, dims: int) -> int:
    if type(layer) is nn.Sequential:
        for inner in layer:
            dims = _after(inner, dims)
    elif type(layer) is nn.Flatten:
        return _flattened(dims, layer.start_dim, layer.end_dim)
    elif type(layer) is nn.Unflatten:
        return _unflattened(dims, layer.dim, layer.unflattened_size)
    return dims


def _flattened(dims: int, start_dim: int = 0, end_dim: int = -1) -> int:
    return dims - (end_dim % dims - start_dim % dims)


def _unflattened(dims: int, dim: int, sizes: Sequence[int]) -> int:
    return dims + len(sizes) - 1


def _viewed(dims: int, *sizes: Any, **named: Any) -> int:
    sizes = sizes or tuple(named.values())
    return len(sizes[0]) if isinstance(sizes[0], (tuple, list)) else len(sizes)


def _reduced(dims: int, dim: Any = None, keepdim: bool = False, **options: Any) -> int:
    count = dims if dim is None or dim == () else len(dim) if isinstance(dim, (tuple, list)) else 1
    return dims if keepdim else dims - count


def _squeezed(dims: int, dim: Any) -> int:
    return dims - (len(dim) if isinstance(dim, (tuple, list)) else 1)


def _indexed(dims: int, index: Any) -> int:
    parts = index if isinstance(index, tuple) else (index,)
    return dims + sum(part is None for part in parts) - sum(isinstance(part, (int, fx.Node)) for part in parts)


#: Those that return values and places.
_PAIRS = {"max", "min", "median", "mode", "kthvalue"}
_CHANGES: dict[str, Callable[..., int]] = {
    "flatten": _flattened,
    "unflatten": _unflattened,
    "view": _viewed,
    "reshape": _viewed,
    "squeeze": _squeezed,
    "unsqueeze": lambda dims, dim: dims + 1,
    "getitem": _indexed,
    "select": lambda dims, dim, index: dims - 1,
    "stack": lambda dims, dim=0: dims + 1,
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var", "norm", "prod", "logsumexp", *_PAIRS), _reduced),
}
