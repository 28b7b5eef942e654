"""Op `axis_pool`: a map pooled along its height, its width and its channels, in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .common import (
    apply_of,
    below,
    define,
    differentiable_backward,
    differentiable_once,
    empty_map,
    needs_node,
    register_gradients,
    shape_of,
    stand_for,
    wants_graph,
)
from .squeeze import TIE_NAMES

_POOLS = ("rows", "columns", "plane")
_KEPT = ", ".join(f"Tensor {name}" for name in (*_POOLS, "row_index", "column_index", "plane_index"))


def _fake(x, maxima, channels, ties):
    batch, depth, height, width = x.shape

    def tables(wanted, *shape, dtype=x.dtype):
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    if not maxima:
        pools = x.new_empty((batch, depth, height, 1)), x.new_empty((batch, depth, 1, width)), x.new_empty(0)
    else:
        pools = (
            x.new_empty((batch, 2, depth, height)),
            x.new_empty((batch, 2, depth, width)),
            tables(channels, batch, 2, height, width),
        )
    return (
        *pools,
        tables(maxima, batch, depth, height, dtype=torch.int32),
        tables(maxima, batch, depth, width, dtype=torch.int32),
        tables(channels, batch, height, width, dtype=torch.int32),
    )


def _fake_backward(grad, grad_rows, grad_columns, grad_plane, x, *kept_and_codes):
    return empty_map(x)


FORWARD = define("axis_pool", f"(Tensor x, int maxima, int channels, int ties) -> ({_KEPT})", _fake)
BACKWARD = define(
    "axis_pool_backward",
    "(Tensor? grad, Tensor? grad_rows, Tensor? grad_columns, Tensor? grad_plane, Tensor x,"
    f" {_KEPT}, int maxima, int channels, int ties) -> Tensor",
    _fake_backward,
)


def _keep(ctx, inputs, kept):
    (x,), (maxima, _, ties) = inputs, ctx.codes
    pools, indices = kept[:3], kept[3:]
    if not (maxima and TIE_NAMES[ties] == "even"):
        pools = map(shape_of, pools)
    ctx.save_for_backward(x if maxima else shape_of(x), *pools, *indices)
    ctx.set_materialize_grads(False)


def _gradients(ctx, *grads):
    _, channels, _ = ctx.codes
    return _gradients_with_map(ctx, None, *grads[: 3 if channels else 2])


def _gradients_with_map(ctx, *grads):
    grads = (*grads, None)[:4]
    x, *kept = ctx.saved_tensors
    if all(g is None for g in grads):
        grad_x = None
    elif wants_graph():
        grad_x = _differentiable(ctx, x, grads)
    else:
        grad_x = below(BACKWARD[ctx.backend], *grads, x, *kept, *ctx.codes)
    return None, grad_x


class _AxisPool(torch.autograd.Function):
    """The map itself and its pools: the gradient of whatever else uses the map comes through here and meets the pools'
    in one pass."""

    @staticmethod
    def forward(ctx, backend, *arguments):
        x, *codes = arguments
        kept = below(FORWARD[backend], x, *codes)
        ctx.backend, ctx.codes = backend, codes
        _keep(ctx, (x,), kept)
        return x.view_as(x), *kept[: 3 if codes[1] else 2]

    @staticmethod
    def backward(ctx, *grads):
        return *_gradients_with_map(ctx, *grads), None, None, None


_apply_axis_pool = apply_of(_AxisPool)


def _with_map(x, maxima, channels, ties):
    return reference.axis_pool_with_map(x, maxima=bool(maxima), channels=bool(channels), ties=TIE_NAMES[ties])


def _formula(x, *codes):
    _, *pools = _with_map(x, *codes)
    return pools if len(pools) == len(_POOLS) else (*pools, x.new_empty(0))


def _differentiable(ctx, x, grads):
    def function(x):
        outputs = _with_map(x, *ctx.codes)
        return [o * 1 if o is x else o for o, g in zip(outputs, grads, strict=False) if g is not None]

    return differentiable_backward(function, (x,), (True,), [g for g in grads if g is not None])[0]


def axis_pool(backend, x, maxima, channels, ties) -> tuple[Tensor, ...]:
    """The map itself, then rows, columns and, with `channels`, the plane, as `functional.axis_pool` has them."""
    if needs_node(x):
        return _apply_axis_pool(backend, x, maxima, channels, ties)
    return x, *below(FORWARD[backend], x, maxima, channels, ties)[: 3 if channels else 2]


register_gradients(FORWARD, _keep, _gradients, 3)
stand_for(FORWARD, _formula, BACKWARD)
differentiable_once(BACKWARD)
