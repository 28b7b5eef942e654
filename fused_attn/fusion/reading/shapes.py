"""Results without data of the commonest operators. torch's own kernels for such tensors are written in Python: they
import its compiler, which takes seconds, and cost more than all else in a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

RESULTS: dict[str, Callable[..., Any]] = {}


def result(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result, tensors on the meta device; None where it is left to torch."""
    function = RESULTS.get(name)
    if function is None or set(kwargs) - {"alpha", "beta", "approximate", "value"}:
        return None
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    first = tensors[0].dtype if tensors else None
    if not first or not first.is_floating_point or any(t.dtype != first or not t.is_meta for t in tensors):
        return None
    return function(*args)


def _broadcast(*args: Any) -> Tensor | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    shape: list[int] = []
    for t in tensors:
        sizes = list(t.shape)
        longer, shorter = (sizes, shape) if len(sizes) > len(shape) else (shape, sizes)
        merged = list(longer)
        for i in range(1, len(shorter) + 1):
            a, b = longer[-i], shorter[-i]
            if a != b and 1 not in (a, b):
                return None
            merged[-i] = b if a == 1 else a
        shape = merged
    like = next((t for t in tensors if list(t.shape) == shape), None)
    return tensors[0].new_empty(shape) if like is None else _empty_like(like)


def _empty_like(x: Tensor) -> Tensor:
    """With its strides, as results have them; torch.empty_like imports sympy for this."""
    if 0 in x.stride():
        return x.new_empty(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


_ELEMENTWISE = (
    "add sub rsub mul div neg square pow sigmoid relu silu tanh hardsigmoid hardswish exp sqrt rsqrt reciprocal log"
    " abs gelu leaky_relu hardtanh clamp clamp_min maximum addcmul mish"
)
for _name in _ELEMENTWISE.split():
    RESULTS[_name] = _broadcast


def _reduced(a: Tensor, dims: Any = None, keepdim: bool = False) -> Tensor | None:
    if isinstance(dims, int):
        return None
    gone = {d % a.dim() for d in dims} if dims else set(range(a.dim()))
    keep = keepdim and bool(dims)
    return a.new_empty([1 if i in gone else n for i, n in enumerate(a.shape) if keep or i not in gone])


RESULTS.update(mean=_reduced, sum=_reduced, amax=_reduced)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    shape = list(tensors[0].shape)
    dim %= len(shape)
    others = [[n for i, n in enumerate(t.shape) if i != dim] for t in tensors]
    if any(o != others[0] for o in others):
        return None
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tensors[0].new_empty(shape)


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    shape = list(tensors[0].shape)
    if any(list(t.shape) != shape for t in tensors):
        return None
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return tensors[0].new_empty(shape)


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    return a.new_empty((a.shape[0], b.shape[1])) if a.shape[1] == b.shape[0] else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    return _mm(a, b) if bias.shape in ((1,), b.shape[1:], (a.shape[0], b.shape[1])) else None


def _batch_norm(x: Tensor, *tensors: Any) -> Any:
    if any(isinstance(t, Tensor) and t.shape != (x.shape[1],) for t in tensors):
        return None
    return _empty_like(x), x.new_empty((x.shape[1],)), x.new_empty((x.shape[1],))


RESULTS.update(cat=_cat, stack=_stack, mm=_mm, addmm=_addmm, native_batch_norm=_batch_norm)
