"""Op `squeeze`: global average and/or maximum of a map in one pass over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codes import ACTIVATIONS, POOLS, TIES
from ..reference.squeeze import Affine, global_max, prologue, space
from .common import (
    accumulator,
    affine_or_none,
    below,
    define,
    differentiable,
    differentiable_backward,
    empty_map,
    like_or_none,
    shape_of,
    wants_graph,
)

AVG, MAX, BOTH = POOLS["avg"], POOLS["max"], POOLS["both"]
IDENTITY, EVEN = ACTIVATIONS["identity"], TIES["even"]
POOL_NAMES, TIE_NAMES, ACTIVATION_NAMES = (tuple(table) for table in (POOLS, TIES, ACTIVATIONS))


def _fake(x, affine_weight, affine_bias, pre_activation, pool, ties):
    descriptor, none = x.shape[:2], (0,)
    return (
        x.new_empty(none if pool == MAX else descriptor),
        x.new_empty(none if pool == AVG else descriptor),
        x.new_empty(none if pool == AVG else descriptor, dtype=torch.int32),
    )


def _fake_backward(grad_avg, grad_max, x, max, index, affine_weight, affine_bias, pre_activation, pool, ties):
    return empty_map(x), like_or_none(affine_weight, x), like_or_none(affine_bias, x)


FORWARD = define(
    "squeeze",
    "(Tensor x, Tensor? affine_weight, Tensor? affine_bias, int pre_activation, int pool, int ties)"
    " -> (Tensor avg, Tensor max, Tensor index)",
    _fake,
)
BACKWARD = define(
    "squeeze_backward",
    "(Tensor? grad_avg, Tensor? grad_max, Tensor x, Tensor max, Tensor index, Tensor? affine_weight,"
    " Tensor? affine_bias, int pre_activation, int pool, int ties)"
    " -> (Tensor grad_x, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def pooled(x: Tensor, pool: str, *, affine: Affine | None = None, pre_activation: str = "identity", **_: Any) -> Any:
    """`reference.squeeze` in the accumulators' dtype, for a formula: two poolings have a prologue each."""

    def u() -> Tensor:
        return prologue(x.to(accumulator(x.dtype)), affine, pre_activation)

    avg = None if pool == "max" else u().mean(space(x))
    peak = None if pool == "avg" else u().amax(space(x))
    return (avg, peak) if pool == "avgmax" else peak if avg is None else avg


def _formula(x, affine_weight, affine_bias, pre_activation, pool, ties):
    u = prologue(x, affine_or_none(affine_weight, affine_bias), ACTIVATION_NAMES[pre_activation])
    none = x.new_empty(0)
    return none if pool == MAX else u.mean(space(u)), none if pool == AVG else u.amax(space(u))


def _keep(ctx, inputs, results):
    x, affine_weight, affine_bias = inputs
    pre_activation, pool, ties = ctx.codes
    _, peak, index = results
    if affine_weight is None and pre_activation == IDENTITY and pool == AVG:  # torch's own maxima keep it
        x = shape_of(x)
    ctx.save_for_backward(x, affine_weight, affine_bias, peak if ties == EVEN else shape_of(peak), index)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_avg, grad_max):
    x, affine_weight, affine_bias, peak, index = ctx.saved_tensors
    _, pool, _ = ctx.codes
    grad_avg = None if pool == MAX else grad_avg
    grad_max = None if pool == AVG else grad_max
    if grad_avg is None and grad_max is None:
        return (None,) * 4
    if wants_graph():
        grads = _differentiable(ctx, (x, affine_weight, affine_bias), grad_avg, grad_max)
    else:
        grads = below(BACKWARD[ctx.backend], grad_avg, grad_max, x, peak, index, affine_weight, affine_bias, *ctx.codes)
        if affine_weight is None:
            grads = (grads[0], None, None)
    return None, *grads


def _differentiable(ctx, inputs, grad_avg, grad_max):
    pre_activation, _, ties = ctx.codes

    def function(x, weight, bias):
        u = prologue(x, None if weight is None else (weight, bias), ACTIVATION_NAMES[pre_activation])
        means = () if grad_avg is None else (u.mean(space(u)),)
        return means if grad_max is None else (*means, global_max(u, TIE_NAMES[ties]))

    grads = [g for g in (grad_avg, grad_max) if g is not None]
    return differentiable_backward(function, inputs, ctx.needs_input_grad[1:], grads)


#: squeeze(backend, x, affine_weight, affine_bias, pre_activation, pool, ties): (avg, max), each (B, C) in x's dtype;
#: the one that `pool` does not ask for has size (0,).
squeeze = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula, outputs=2, shown=lambda results: results[:2])
