"""Ops `select*`: branch maps weighted by an excitation of their sum's mean; the sum itself is never written.

`select` is the whole block. Its two phases are operators too, for excitations that are any PyTorch code:
`select_squeeze` reads the branches once, `select_sum` reads them again and writes y; backward `select_dots` reads the
gradient and the branches, `select_gradients` reads the gradient and writes the branches' gradients (with a prologue it
reads the branches again). Both run 2M + 1 passes forward and 2M + 2 backward, over M maps.

`branches` are `paths` = M maps (B, C, *spatial), or one stacked tensor (B, M, C, *spatial), M at least 2. A map is read
as it lies if within a sample it is NCHW (channels HW apart) or channels_last (channels 1 apart, pixels C or more apart,
rows collapsing), with any distance between samples, and all M are of that kind; else NCHW copies are made. Affine
weight and bias are (M, C). Between forward and backward travel the branches and `state`, (B, C + hidden + M * C) in the
accumulator's dtype: the means of the sum, the hidden logits and the branch weights (B, M, C).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import reference
from ..codes import SELECTIONS
from ..reference.select import branch_prologue
from ..reference.squeeze import per_channel, space
from .common import (
    accumulator,
    apply_of,
    below,
    define,
    differentiable,
    differentiable_backward,
    differentiable_by_reference,
    differentiable_once,
    like_or_none,
    needs_node,
    unless_absent,
    wants_graph,
)
from .resident import Clusters, Limits, ask
from .scale import ACTIVATION_NAMES

SELECTION_NAMES = tuple(SELECTIONS)

#: The most branches that kernels hold.
MOST_BRANCHES = 8


def branch_views(branches: Sequence[Tensor], paths: int) -> list[Tensor]:
    """The M maps (B, C, *spatial)."""
    return list(branches) if len(branches) == paths else list(branches[0].unbind(1))


def _is_nchw(u: Tensor) -> bool:
    """Whether each sample of (B, C, *spatial) lies as (C, *spatial)."""
    expected = 1
    for axis in range(u.dim() - 1, 0, -1):
        if u.shape[axis] != 1:
            if u.stride(axis) != expected:
                return False
            expected *= u.shape[axis]
    return True


def _is_pixels(u: Tensor) -> bool:
    """Whether each sample of (B, C, *spatial) lies as (*spatial, C), its pixels C or more apart."""
    channels = u.shape[1]
    if channels != 1 and u.stride(1) != 1:
        return False
    expected = None
    for axis in range(u.dim() - 1, 1, -1):
        if u.shape[axis] != 1:
            if expected is None and u.stride(axis) >= channels:
                expected = u.stride(axis)
            if u.stride(axis) != expected:
                return False
            expected *= u.shape[axis]
    return True


def are_channels_last(branches: Sequence[Tensor], paths: int) -> bool:
    """The kind of layout that the branches are read in, and y and gradients written in; False is NCHW."""
    views = branch_views(branches, paths)
    if views[0].numel() == 0 or all(_is_nchw(u) for u in views):
        return False
    return all(_is_pixels(u) for u in views)


def readable(branches: Sequence[Tensor], paths: int) -> tuple[list[Tensor], bool]:
    """The M maps as kernels read them, and whether they are channels_last: views, or NCHW copies."""
    views = branch_views(branches, paths)
    channels_last = are_channels_last(branches, paths)
    if channels_last or all(_is_nchw(u) for u in views):
        return views, channels_last
    return branch_views([u.contiguous() for u in branches], paths), False


def empty_sum(branches: Sequence[Tensor], paths: int) -> Tensor:
    """y: dense, in the kind of layout of the branches."""
    u = branch_views(branches, paths)[0]
    batch, channels, *spatial = u.shape
    if are_channels_last(branches, paths):
        return u.new_empty((batch, *spatial, channels)).movedim(-1, 1)
    return u.new_empty(u.shape)


def empty_gradients(branches: Sequence[Tensor], paths: int) -> list[Tensor]:
    """The branches' gradients: dense, in their kind of layout, as many tensors as there are.

    One stacked gradient is (B, M, C, *spatial) in memory, or (B, M, *spatial, C) for channels_last branches, or
    (B, *spatial, M, C) where the branches share their pixels.
    """
    if len(branches) == paths:
        return [empty_sum(branches, paths) for _ in branches]
    stacked = branches[0]
    batch, _, channels, *spatial = stacked.shape
    if not are_channels_last(branches, paths):
        return [stacked.new_empty(stacked.shape)]
    pixel = min(stacked.stride(axis) for axis in range(3, stacked.dim()) if stacked.shape[axis] != 1)
    if stacked.stride(1) < pixel:
        return [stacked.new_empty((batch, *spatial, paths, channels)).movedim((-2, -1), (1, 2))]
    return [stacked.new_empty((batch, paths, *spatial, channels)).movedim(-1, 2)]


def _fake_squeeze(branches, paths, affine_weight, affine_bias, pre_activation):
    u = branch_views(branches, paths)[0]
    return u.new_empty(u.shape[:2])


def _fake_sum(branches, weights, paths, affine_weight, affine_bias, pre_activation):
    return empty_sum(branches, paths)


def _fake_dots(grad, branches, paths, affine_weight, affine_bias, pre_activation):
    batch, channels = grad.shape[:2]
    return grad.new_empty((batch, paths, channels), dtype=accumulator(grad.dtype))


def _fake_gradients(grad, branches, weights, grad_descriptor, paths, affine_weight, affine_bias, pre_activation):
    return empty_gradients(branches, paths), *(like_or_none(t, grad) for t in (affine_weight, affine_bias))


def _fake(branches, weight1, bias1, weight2, bias2, affine_weight, affine_bias, paths, groups, activation, gate, pre):
    y = empty_sum(branches, paths)
    batch, channels = y.shape[:2]
    width = (paths + 1) * channels + weight1.shape[0]
    return y, y.new_empty((batch, width), dtype=accumulator(y.dtype))


def _fake_backward(grad, branches, state, *parameters_and_codes):
    parameters, (paths, *_) = parameters_and_codes[:6], parameters_and_codes[6:]
    return empty_gradients(branches, paths), *(like_or_none(t, grad) for t in parameters)


_PHASE = "int paths, Tensor? affine_weight, Tensor? affine_bias, int pre_activation"
_TENSORS = (
    "Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? affine_weight, Tensor? affine_bias,"
    " int paths, int groups, int activation, int gate, int pre_activation"
)

SQUEEZE = define("select_squeeze", f"(Tensor[] branches, {_PHASE}) -> Tensor", _fake_squeeze, "select")
SUM = define("select_sum", f"(Tensor[] branches, Tensor weights, {_PHASE}) -> Tensor", _fake_sum, "select")
DOTS = define("select_dots", f"(Tensor grad, Tensor[] branches, {_PHASE}) -> Tensor", _fake_dots, "select")
GRADIENTS = define(
    "select_gradients",
    f"(Tensor grad, Tensor[] branches, Tensor weights, Tensor grad_descriptor, {_PHASE})"
    " -> (Tensor[] grads, Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_gradients,
    "select",
)
FORWARD = define("select", f"(Tensor[] branches, {_TENSORS}) -> (Tensor y, Tensor state)", _fake)
BACKWARD = define(
    "select_backward",
    f"(Tensor grad, Tensor[] branches, Tensor state, {_TENSORS})"
    " -> (Tensor[] grads, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2,"
    " Tensor grad_affine_weight, Tensor grad_affine_bias)",
    _fake_backward,
)


def _affine(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if weight is None or bias is None else (weight, bias)


def resident_clusters(limits: Limits, branches: Sequence[Tensor], *arguments) -> Clusters:
    """Over how many blocks the resident kernels spread the branches of a sample; `arguments` as in the operator's
    schema."""
    weight1, *_, affine_weight, _, paths, _, _, _, pre_activation = arguments
    u = branch_views(branches, paths)[0]
    channels, *spatial = u.shape[1:]
    sizes = channels, math.prod(spatial), u.itemsize, are_channels_last(branches, paths), paths, weight1.shape[0]
    return ask("select", *sizes, affine_weight is not None, pre_activation, *limits)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, results[1])


def _gradients(ctx, grad):
    *inputs, state = ctx.saved_tensors
    if wants_graph(grad):
        return None, *differentiable_backward(_reference(ctx.codes), inputs, ctx.needs_input_grad[1:], grad)
    branches, parameters = inputs[:-6], inputs[-6:]
    grads, *others = below(BACKWARD[ctx.backend], grad, branches, state, *parameters, *ctx.codes)
    return None, *grads, *unless_absent(parameters, others)


def _reference(codes):
    paths, groups, activation, gate, pre_activation = codes

    def function(*inputs):
        *weights, affine_weight, affine_bias = inputs[-6:]
        return reference.select(
            branch_views(inputs[:-6], paths),
            *weights,
            groups=groups,
            activation=ACTIVATION_NAMES[activation],
            gate=SELECTION_NAMES[gate],
            affine=_affine(affine_weight, affine_bias),
            pre_activation=ACTIVATION_NAMES[pre_activation],
        )

    return function


def _formula(branches, *arguments):
    inputs, codes = arguments[:6], arguments[6:]
    return _reference(codes)(*branches, *inputs)


#: select(backend, branches, *parameters_and_codes): y; the arguments as in the operator's schema.
select = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula, resident_clusters=resident_clusters)


class _Squeeze(torch.autograd.Function):
    """The mean of the branches' sum, and two carriers: tensors without values, of y's and of the weights' shape.

    Autograd runs between the phases, over the excitation. What `_Sum` knows in backward (the gradient of y and the
    weights) comes here as the carriers' gradients, so that the branches' gradients are written once, with all that
    reaches them. `_Sum` passes the branches none.
    """

    @staticmethod
    def forward(ctx, backend, paths, pre_activation, affine_weight, affine_bias, *branches):
        s = below(SQUEEZE[backend], branches, paths, affine_weight, affine_bias, pre_activation)
        ctx.save_for_backward(affine_weight, affine_bias, *branches)
        ctx.backend, ctx.paths, ctx.pre_activation = backend, paths, pre_activation
        ctx.set_materialize_grads(False)
        shape = branch_views(branches, paths)[0].shape
        nothing = s.new_zeros(())
        weights_shape = shape[0], paths, shape[1]
        return s, nothing.expand(shape), nothing.to(accumulator(s.dtype), copy=True).expand(weights_shape)

    @staticmethod
    def backward(ctx, grad_s, grad, weights):
        inputs = ctx.saved_tensors
        *affine, branches = inputs[0], inputs[1], inputs[2:]
        u = branch_views(branches, ctx.paths)[0]
        if grad_s is None and grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if grad_s is None:
            grad_s = u.new_zeros(u.shape[:2])
        if grad is None or weights is None:  # y was not used, the descriptor was
            grad = u.new_zeros(u.shape)
            weights = u.new_zeros((u.shape[0], ctx.paths, u.shape[1]), dtype=accumulator(u.dtype))
        if wants_graph(grad, grad_s):
            return None, None, None, *_differentiable_gradients(ctx, inputs, grad_s, grad, weights)
        grads, *grad_affine = below(
            GRADIENTS[ctx.backend], grad, branches, weights, grad_s, ctx.paths, *affine, ctx.pre_activation
        )
        return None, None, None, *unless_absent(affine, grad_affine), *grads


_apply_squeeze = apply_of(_Squeeze)


def _differentiable_gradients(ctx, inputs, grad_s, grad, weights):
    def prologues(affine_weight, affine_bias, *branches):
        maps = branch_views(branches, ctx.paths)
        return branch_prologue(maps, _affine(affine_weight, affine_bias), ACTIVATION_NAMES[ctx.pre_activation])

    from_s = per_channel(grad_s, grad) / math.prod(grad.shape[2:])
    grads = [grad * per_channel(a, grad).to(grad.dtype) + from_s for a in weights.unbind(1)]
    return differentiable_backward(prologues, inputs, ctx.needs_input_grad[3:], grads)


class _Sum(torch.autograd.Function):
    """The branches times their weights. The branches' own gradients are `_Squeeze`'s to write."""

    @staticmethod
    def forward(ctx, backend, paths, pre_activation, weights, carrier_y, carrier_weights, *affine_and_branches):
        affine_weight, affine_bias, *branches = affine_and_branches
        ctx.save_for_backward(weights, *affine_and_branches)
        ctx.backend, ctx.paths, ctx.pre_activation = backend, paths, pre_activation
        return below(SUM[backend], branches, weights, paths, affine_weight, affine_bias, pre_activation)

    @staticmethod
    def backward(ctx, grad):
        weights, affine_weight, affine_bias, *branches = ctx.saved_tensors
        if not ctx.needs_input_grad[3]:
            dots = None
        elif wants_graph(grad):
            maps = branch_views(branches, ctx.paths)
            maps = branch_prologue(maps, _affine(affine_weight, affine_bias), ACTIVATION_NAMES[ctx.pre_activation])
            dots = torch.stack([(grad * u).sum(space(u)) for u in maps], 1)
        else:
            dots = below(DOTS[ctx.backend], grad, branches, ctx.paths, affine_weight, affine_bias, ctx.pre_activation)
        to_squeeze = (grad, weights) if ctx.needs_input_grad[4] else (None, None)
        return None, None, None, dots, *to_squeeze, None, None, *(None for _ in branches)


_apply_sum = apply_of(_Sum)


def select_with(
    backend,
    branches: Sequence[Tensor],
    excitation: Callable[[Tensor], Tensor],
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    paths: int,
    pre_activation: int,
) -> Tensor:
    """y; `excitation` takes descriptors (B, C) to branch weights (B, M, C)."""
    inputs = affine_weight, affine_bias, *branches
    if needs_node(*inputs):
        s, carrier_y, carrier_weights = _apply_squeeze(backend, paths, pre_activation, *inputs)
        weights = excitation(s).contiguous()
        return _apply_sum(backend, paths, pre_activation, weights, carrier_y, carrier_weights, *inputs)
    s = below(SQUEEZE[backend], branches, paths, affine_weight, affine_bias, pre_activation)
    weights = excitation(s).contiguous()
    if needs_node(weights):
        nothing = s.new_zeros(())
        return _apply_sum(backend, paths, pre_activation, weights, nothing, nothing, *inputs)
    return below(SUM[backend], branches, weights, paths, affine_weight, affine_bias, pre_activation)


def _reference_squeeze(branches, paths, affine_weight, affine_bias, pre_activation):
    maps = branch_views(branches, paths)
    maps = branch_prologue(maps, _affine(affine_weight, affine_bias), ACTIVATION_NAMES[pre_activation])
    total = functools.reduce(torch.add, maps)
    return [total.mean(space(total))]


def _reference_sum(branches, weights, paths, affine_weight, affine_bias, pre_activation):
    maps = branch_views(branches, paths)
    maps = branch_prologue(maps, _affine(affine_weight, affine_bias), ACTIVATION_NAMES[pre_activation])
    weighted = [u * per_channel(a, u).to(u.dtype) for u, a in zip(maps, weights.unbind(1), strict=True)]
    return [functools.reduce(torch.add, weighted)]


differentiable_by_reference(SQUEEZE, _reference_squeeze, 1)
differentiable_by_reference(SUM, _reference_sum, 1)
differentiable_once(DOTS)
differentiable_once(GRADIENTS)
