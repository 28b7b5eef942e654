"""Ops of `norm_gate`: post_activation(activation(BatchNorm(x)) * gate + residual) without a map kept but x.

The passes are operators; so is what lies between them, numbers a channel of each sample. With n = numel / C,
xhat = (x - mean) * rstd, a = weight * rstd, v = a x + b, u = act(v), s = mean of u over space, g = excitation(s):

forward     moments (read x); norm_coefficients: a and b; squeeze (read x; act identity: none, s = a mean + b);
            norm_scale (read x, residual, write y and, where a ReLU follows, one bit an element: whether its gradient
            passes)
backward    norm_dots (read grad, x and the bits; write h = grad post'(..) where an activation follows): five sums a
            channel of each sample; norm_factors; norm_gradients (read h, x, write grad_x)

From the sums come the gradient of g, through the excitation that of s, and with dv = (h g + grad_s / HW) act'(v)

grad_bias = sum(dv), grad_weight = sum(dv xhat), grad_x = a (dv - grad_bias / n - xhat grad_weight / n).

Autograd runs the excitation, so there are two functions: `_Normalise`, from x to s, and `_Gate`, from g to y. `_Gate`
hands h and its sums to `_Normalise`, which then writes grad_x once: as the gradients of two carriers, tensors without
values. Where gradients are differentiated again, each gives those of its own inputs by plain PyTorch and the carriers
none. An exported program has neither, but the operators, whose own gradients are plain PyTorch, too. Where the least is
to be kept, a third function between the two, `_Kept`, saves what y is made of again (ops/remake.py).

With a process group the statistics are those of all its processes, as SyncBatchNorm's: one all_gather of (mean, squared
distances, count) forward, one all_reduce of the two sums backward; the parameters' gradients stay each process's own.
What stands for norm_coefficients there, and where the running statistics are those to normalise with, and for
norm_factors in a group's backward, is plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..codes import FUNCTIONS
from ..reference.block_attention import folded_affine
from ..reference.layout import lies_channels_last
from ..reference.squeeze import per_channel, prologue, space
from .common import (
    accumulator,
    apply_of,
    below,
    define,
    differentiable_backward,
    differentiable_by_reference,
    differentiable_once,
    empty_map,
    is_channels_last,
    needs_node,
    not_differentiable,
    wants_graph,
)
from .remake import Remake
from .scale import ACTIVATION_NAMES, IDENTITY, RELU
from .squeeze import AVG
from .squeeze import FORWARD as SQUEEZE

#: What `norm_dots` sums over space, with c = x - mean: h u, h act'(v), h act'(v) c, act'(v), act'(v) c. With the gate
#: as one row more they are all that the gradients of x, weight and bias need of it.
SUMS = 5


def _fake_moments(x):
    return x.new_empty((x.shape[0], 3, x.shape[1]), dtype=accumulator(x.dtype))


def _fake_coefficients(x, moments, weight, bias, eps, wants_descriptor):
    (batch, channels), dtype = x.shape[:2], accumulator(x.dtype)
    return (
        x.new_empty((4, channels), dtype=dtype),
        x.new_empty(channels, dtype=dtype),
        x.new_empty((batch, channels) if wants_descriptor else 0),
    )


def _fake_running(weight, bias, mean, var, eps):
    return mean.new_empty((4, mean.numel()), dtype=accumulator(mean.dtype))


def _lies_by_position(x: Tensor) -> bool:
    """Whether the bits of a map lie in rows of channels, one a position, and not in rows of positions."""
    return math.prod(x.shape[2:]) == 1 or lies_channels_last(x)


def _fake_bits(x, keep_bits):
    if not keep_bits:
        return x.new_empty(0, dtype=torch.uint8)
    (batch, channels), positions = x.shape[:2], math.prod(x.shape[2:])
    rows, length = (positions, channels) if _lies_by_position(x) else (channels, positions)
    return x.new_empty((batch, rows, (length + 7) // 8), dtype=torch.uint8)


def _fake_scale(x, gate, norm, residual, activation, post_activation, keep_bits):
    return empty_map(x), _fake_bits(x, keep_bits)


def _fake_scale_into(x, gate, norm, residual, y, activation, post_activation, keep_bits):
    return _fake_bits(x, keep_bits)


def _fake_dots(grad, x, bits, residual, norm, gate, activation, post_activation):
    return (
        x.new_empty((x.shape[0], SUMS + 1, x.shape[1]), dtype=accumulator(x.dtype)),
        x.new_empty(0) if post_activation == IDENTITY else empty_map(x),
    )


def _fake_factors(x, sums, grad_s, norm, of_batch):
    batch, channels = x.shape[:2]
    shapes = channels, channels, (batch, 2, channels), (2, channels)
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in shapes)


def _fake_gradients(grad, x, norm, factors, constants, activation):
    return empty_map(x)


# (B, 3, C), rows [pivot, rest, squares]: the mean of each channel in two parts (pivot is its first element, so that
# the mean has all its digits however large it is), and the sum of the squared distances from it.
MOMENTS = define("moments", "(Tensor x) -> Tensor", _fake_moments, "norm_gate")
# From the moments, of x's sizes and dtype: norm, (4, C), rows [a, b, mean, rstd]; the unbiased variance; the mean of v
# over space, (B, C) in x's dtype, of size (0,) unless it is asked for. Nothing of x is read.
COEFFICIENTS = define(
    "norm_coefficients",
    "(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, float eps, bool wants_descriptor)"
    " -> (Tensor norm, Tensor unbiased, Tensor descriptor)",
    _fake_coefficients,
    "norm_gate",
)
# The same norm from running statistics, in the accumulator of their dtype.
RUNNING = define(
    "norm_running",
    "(Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor",
    _fake_running,
    "norm_gate",
)
# norm: rows [a, b, mean], what follows them is not read; gate: (B, C), of any float dtype, None: of ones. bits: of size
# (0,) unless they are asked for. They lie as x does, in rows of whole bytes, eight elements a byte and the first in its
# lowest bit: (B, C, bytes) where x is NCHW, (B, positions, bytes) where it is channels_last or of one position. Set
# unless y <= 0, so where y is NaN, too.
SCALE = define(
    "norm_scale",
    "(Tensor x, Tensor? gate, Tensor norm, Tensor? residual, int activation, int post_activation, bool keep_bits)"
    " -> (Tensor y, Tensor bits)",
    _fake_scale,
    "norm_gate",
    any_layout=False,
)
# The same into a given map: x, the residual, or another of x's layout. Whoever calls it tells autograd.
SCALE_INTO = define(
    "norm_scale_into",
    "(Tensor x, Tensor? gate, Tensor norm, Tensor? residual, Tensor(a!) y, int activation, int post_activation,"
    " bool keep_bits) -> Tensor bits",
    _fake_scale_into,
    "norm_gate",
    any_layout=False,
)
# bits: those of a ReLU; residual: what another post_activation's derivative is computed from again. sums: of the
# accumulator's dtype, with the gate as the last row. grad_residual is h, of size (0,) without a post_activation.
DOTS = define(
    "norm_dots",
    "(Tensor grad, Tensor x, Tensor? bits, Tensor? residual, Tensor norm, Tensor? gate, int activation,"
    " int post_activation) -> (Tensor sums, Tensor grad_residual)",
    _fake_dots,
    "norm_gate",
    any_layout=False,
)
# From these sums and the gradient of s, of x's sizes and dtype, of which nothing is read: the gradients of weight and
# bias, in the accumulator's dtype, and what norm_gradients takes. of_batch: the statistics are the batch's.
FACTORS = define(
    "norm_factors",
    "(Tensor x, Tensor sums, Tensor? grad_s, Tensor norm, bool of_batch)"
    " -> (Tensor grad_weight, Tensor grad_bias, Tensor factors, Tensor constants)",
    _fake_factors,
    "norm_gate",
)
# (grad * factors[b, 0, c] + factors[b, 1, c]) * act'(v) + constants[0, c] + constants[1, c] * (x - mean)
GRADIENTS = define(
    "norm_gradients",
    "(Tensor grad, Tensor x, Tensor norm, Tensor factors, Tensor constants, int activation) -> Tensor",
    _fake_gradients,
    "norm_gate",
)

Statistics = tuple[Tensor, Tensor]


def _batch_statistics(moments: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, sum of squared distances, distance of each sample's mean from it) by Chan's formula: nothing cancels."""
    pivot, rest, squares = moments.unbind(1)
    offsets = (pivot - pivot[:1]) + rest
    middle = offsets.mean(0)
    distances = offsets - middle
    return pivot[0] + middle, squares.sum(0) + positions * distances.square().sum(0), distances


def _group_statistics(moments: Tensor, positions: int, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, biased variance, distance of each sample's mean from it, count) of all processes."""
    mean, total, distances = _batch_statistics(moments, positions)
    mine = torch.cat([mean, total, total.new_tensor([positions * moments.shape[0]])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    means, totals, counts = torch.stack(gathered).split([len(mean), len(mean), 1], 1)
    count = counts.sum()
    # From the first process's mean, for the same reason as from the first pivot.
    middle = ((means - means[0]) * counts).sum(0) / count
    total = totals.sum(0) + (counts * (means - means[0] - middle).square()).sum(0)
    distances = distances + (mean - (means[0] + middle))
    return means[0] + middle, total / count, distances, count


def _normalise(
    backend, x, weight, bias, statistics: Statistics | None, eps, activation, wants_descriptor, group
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(norm, unbiased variance, descriptor, values a channel of a group); statistics: the running ones, without the
    second; None: those of the batch, which are returned."""
    if statistics is None and group is None:
        of_mean = wants_descriptor and activation == IDENTITY
        norm, unbiased, s = below(COEFFICIENTS[backend], x, below(MOMENTS[backend], x), weight, bias, eps, of_mean)
        if wants_descriptor and not of_mean:
            s = _squeezed(backend, x, norm, activation, True)
        return norm, unbiased, s, None
    dtype = accumulator(x.dtype)
    if statistics is not None:
        mean, var = (t.to(dtype) for t in statistics)
        norm = below(RUNNING[backend], weight, bias, mean, var, eps)
        return norm, x.new_empty(0), _squeezed(backend, x, norm, activation, wants_descriptor), None
    mean, var, distances, count = _group_statistics(below(MOMENTS[backend], x), math.prod(x.shape[2:]), group)
    rstd = (var + eps).rsqrt()
    a = rstd if weight is None else weight.to(dtype) * rstd
    b = -mean * a if bias is None else bias.to(dtype) - mean * a
    norm = torch.stack([a, b, mean, rstd])
    if wants_descriptor and activation == IDENTITY:
        s = a * distances
        s = (s if bias is None else s + bias.to(dtype)).to(x.dtype)
    else:
        s = _squeezed(backend, x, norm, activation, wants_descriptor)
    return norm, var * (count / (count - 1)), s, count


def _squeezed(backend, x, norm, activation, wanted) -> Tensor:
    """The mean of u over space."""
    if not wanted:
        return x.new_empty(0)
    a, b, *_ = norm.unbind()
    return below(SQUEEZE[backend], x, a, b, activation, AVG, 0)[0]


def _group_factors(x, sums, grad_s, norm, count, group, needs_x) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_factors` where the statistics are those of a process group; the last two are for the gradient of x."""
    a, rstd = norm[0], norm[3]
    _, h, h_c, slope, slope_c, gate = sums.unbind(1)
    pooled = torch.zeros_like(gate) if grad_s is None else grad_s.to(norm.dtype) / math.prod(x.shape[2:])
    to_bias = (gate * h + pooled * slope).sum(0)
    to_weight = rstd * (gate * h_c + pooled * slope_c).sum(0)
    totals = torch.stack([to_bias, to_weight])
    if needs_x:
        dist.all_reduce(totals, group=group)
    constants = torch.stack([totals[0], rstd * totals[1]]) * (-a / count)
    return to_weight, to_bias, torch.stack([gate, pooled], 1) * a, constants


def _normalised(x, weight, bias, norm, eps: float | None) -> Tensor:
    """BatchNorm in plain PyTorch; eps: with the batch's statistics, None: with those in norm."""
    if eps is not None:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    _, _, mean, rstd = norm
    values = (x.to(norm.dtype) - per_channel(mean, x)) * per_channel(rstd, x)
    values = values if weight is None else values * per_channel(weight, x)
    return (values if bias is None else values + per_channel(bias, x)).to(x.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, options):
        norm, unbiased, s, ctx.count = _normalise(backend, x, weight, bias, *options)
        statistics, eps, activation, _, ctx.group = options
        ctx.save_for_backward(x, weight, bias, norm)
        ctx.backend, ctx.activation, ctx.eps = backend, activation, eps if statistics is None else None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(norm, unbiased)
        batch, channels = x.shape[:2]
        sums = norm.new_empty(()).expand(batch, SUMS + 1, channels)
        return s, x.view_as(x), sums, norm, unbiased

    @staticmethod
    def backward(ctx, grad_s, h, sums, *_):
        x, weight, bias, norm = ctx.saved_tensors
        grad_s = None if grad_s is None or grad_s.numel() == 0 else grad_s
        if h is None:
            if grad_s is None:
                return (None,) * 5
            _refuse_group(ctx.group)

            def descriptor(x, weight, bias):
                u = FUNCTIONS[ACTIVATION_NAMES[ctx.activation]](_normalised(x, weight, bias, norm, ctx.eps))
                return u.mean(space(x))

            needs = ctx.needs_input_grad[1:4]
            return None, *differentiable_backward(descriptor, (x, weight, bias), needs, grad_s), None
        grad_x, needs_x = None, ctx.needs_input_grad[1]
        if ctx.group is None:
            found = below(FACTORS[ctx.backend], x, sums, grad_s, norm, ctx.eps is not None)
        else:
            found = _group_factors(x, sums, grad_s, norm, ctx.count, ctx.group, needs_x)
        to_weight, to_bias, factors, constants = found
        if needs_x:
            grad_x = below(GRADIENTS[ctx.backend], h, x, norm, factors, constants, ctx.activation)
        grad_weight = None if weight is None else to_weight.to(weight.dtype)
        grad_bias = None if bias is None else to_bias.to(bias.dtype)
        return None, grad_x, grad_weight, grad_bias, None


def _refuse_group(group: Any) -> None:
    if group is not None:
        raise RuntimeError(
            "norm_gate: with a process group its gradient cannot be differentiated again; use backend('reference')"
        )


def _scale(backend, x, gate, norm, residual, over, activation, post_activation, keep_bits) -> tuple[Tensor, Tensor]:
    """(y, bits); over: the map that y is written over, None: a new one."""
    if over is None:
        return below(SCALE[backend], x, gate, norm, residual, activation, post_activation, keep_bits)
    bits = below(SCALE_INTO[backend], x, gate, norm, residual, over, activation, post_activation, keep_bits)
    if not over.is_inference():
        torch.autograd.graph.increment_version(over)  # whoever kept it for a backward is told so there
    return over, bits


class _Gate(torch.autograd.Function):
    """weight, bias and eps (None: running statistics) are for gradients that are differentiated again."""

    @staticmethod
    def forward(ctx, backend, x, norm, gate, carrier, sums, residual, weight, bias, options):
        ctx.eps, ctx.group, activation, post_activation, inplace = options
        relu = post_activation == RELU
        over = residual if inplace else None
        y, bits = _scale(backend, x, gate, norm, residual, over, activation, post_activation, relu)
        if inplace:
            ctx.mark_dirty(y)
        kept = None if relu or post_activation == IDENTITY else residual
        ctx.save_for_backward(x, norm, gate, bits if relu else None, kept, weight, bias)
        ctx.backend, ctx.codes = backend, (activation, post_activation)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, norm, gate, bits, residual, weight, bias = ctx.saved_tensors
        if (remake := getattr(ctx, "remake", None)) is not None:
            remake.drop()
        needs = ctx.needs_input_grad
        if wants_graph():
            _refuse_group(ctx.group)
            inputs = x, weight, bias, gate, residual
            to_x, to_weight, to_bias, to_gate, to_residual = _differentiable(ctx, inputs, norm, bits, grad)
            return None, to_x, None, to_gate, None, None, to_residual, to_weight, to_bias, None
        sums, h = below(DOTS[ctx.backend], grad, x, bits, residual, norm, gate, *ctx.codes)
        if ctx.codes[1] == IDENTITY:
            h = grad
        to_gate = sums.select(1, 0).to(gate.dtype) if needs[3] else None
        carriers = h if needs[4] else None, sums if needs[5] else None
        return None, None, None, to_gate, *carriers, h if needs[6] else None, None, None, None


class _Kept(torch.autograd.Function):
    """What y is made of again, kept by a node of its own between `_Normalise` and `_Gate`, on the carrier of the sums:
    a checkpoint hands what a node saved to one backward once. Parameters are saved for their versions."""

    @staticmethod
    def forward(ctx, sums, *saved):
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx, sums):
        return sums, *(None,) * (len(ctx.needs_input_grad) - 1)


def _differentiable(ctx, inputs, norm, bits, grad):
    activation, post_activation = (ACTIVATION_NAMES[c] for c in ctx.codes)
    _, needs_x, _, needs_gate, _, _, needs_residual, *needs_parameters = ctx.needs_input_grad[:9]
    recomputed = post_activation not in ("identity", "relu")
    if bits is not None:
        grad = grad * _unpacked(bits, inputs[0]).to(grad.dtype)

    def function(x, weight, bias, gate, residual):
        u = FUNCTIONS[activation](_normalised(x, weight, bias, norm, ctx.eps))
        return _epilogue(u, gate, residual, post_activation if recomputed else "identity")

    needs = needs_x, *needs_parameters, needs_gate, needs_residual
    *grads, to_residual = differentiable_backward(function, inputs, needs, grad)
    return *grads, to_residual if recomputed or not needs_residual else grad


def _epilogue(u: Tensor, gate: Tensor | None, residual: Tensor | None, post_activation: str) -> Tensor:
    if gate is not None:
        return reference.scale(u, gate, residual=residual, post_activation=post_activation)
    return FUNCTIONS[post_activation](u if residual is None else u + residual)


def _unpacked(bits: Tensor, x: Tensor) -> Tensor:
    """The bits of `norm_scale`, one an element, 0 or 1, of x's shape."""
    values = (bits.unsqueeze(3) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    if _lies_by_position(x):
        return values.flatten(2)[..., :channels].transpose(1, 2).reshape(x.shape)
    return values.flatten(2)[..., :positions].reshape(x.shape)


def norm_gate(
    backend,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    excitation: Callable[[Tensor], Tensor] | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    post_activation: int,
    group: Any = None,
    over: Tensor | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
    least: bool = False,
) -> Tensor:
    """The map y. statistics: (mean, variance) to normalise with, None: those of the batch, of which `keep` gets mean
    and unbiased variance before the gate is computed, as a BatchNorm keeps them: so a checkpoint that recomputes no
    further than it must updates them as often. `excitation` takes (B, C) descriptors, in x's dtype, to gates (B, C).
    over: what y is written over, the residual, or x with gradients disabled. least: layers called by `remake.through`
    keep how y is made again, for which the residual is kept."""
    if not (x.is_contiguous() or is_channels_last(x)):
        x = x.contiguous()  # once, and not in every pass
    options = statistics, eps, activation, excitation is not None, group
    carrier = sums = None
    if needs_node(x, weight, bias):
        s, carrier, sums, norm, unbiased = _apply_normalise(backend, x, weight, bias, options)
    else:
        norm, unbiased, s, _ = _normalise(backend, x, weight, bias, *options)
    if keep is not None:
        keep(norm[2], unbiased)
    gate = None if excitation is None else excitation(s)
    if needs_node(gate, residual, sums):
        eps_of_batch = eps if statistics is None else None
        options_of_gate = eps_of_batch, group, activation, post_activation, over is not None
        kept = None
        if least and over is None and sums is not None and not torch.compiler.is_compiling():
            sums = _Kept.apply(sums, x, norm, gate, residual, weight, bias)
            kept = sums.grad_fn
        y = _apply_gate(backend, x, norm, gate, carrier, sums, residual, weight, bias, options_of_gate)
        if kept is not None:

            def make(x, norm, gate, residual, *_):  # by the kernel that made it, which writes bits where a ReLU follows
                codes = activation, post_activation, post_activation == RELU
                return _scale(backend, x, gate, norm, residual, None, *codes)[0]

            y.grad_fn.remake = Remake(y, kept, make)
    else:
        y, _ = _scale(backend, x, gate, norm, residual, over, activation, post_activation, False)
    return y


_apply_normalise, _apply_gate = apply_of(_Normalise), apply_of(_Gate)


def _reference_moments(x):
    values = x.flatten(2).to(accumulator(x.dtype))
    pivot = values[..., 0]
    offsets = values - pivot.unsqueeze(2)
    rest = offsets.mean(2)
    return [torch.stack([pivot, rest, (offsets - rest.unsqueeze(2)).square().sum(2)], 1)]


def _reference_coefficients(x, moments, weight, bias, eps, wants_descriptor):
    positions = math.prod(x.shape[2:])
    mean, total, distances = _batch_statistics(moments, positions)
    count = positions * x.shape[0]
    rstd = (total / count + eps).rsqrt()
    a = rstd if weight is None else weight * rstd
    shift = torch.zeros_like(a) if bias is None else bias.to(a.dtype)
    s = (a * distances + shift).to(x.dtype) if wants_descriptor else x.new_empty(0)
    return [torch.stack([a, shift - mean * a, mean, rstd]), total / (count - 1), s]


def _reference_scale(x, gate, norm, residual, activation, post_activation, keep_bits):
    u = prologue(x, (norm[0], norm[1]), ACTIVATION_NAMES[activation])
    return [_epilogue(u, gate, residual, ACTIVATION_NAMES[post_activation])]


def _reference_running(weight, bias, mean, var, eps):
    mean, var = (t.to(accumulator(mean.dtype)) for t in (mean, var))
    a, b = folded_affine(weight, bias, mean, var, eps)
    return [torch.stack([a, b, mean, (var + eps).rsqrt()])]


differentiable_by_reference(RUNNING, _reference_running, 1)
differentiable_by_reference(MOMENTS, _reference_moments, 1)
differentiable_by_reference(COEFFICIENTS, _reference_coefficients, 3)
differentiable_by_reference(SCALE, _reference_scale, 1)
not_differentiable(SCALE_INTO)
for _backward in (DOTS, FACTORS, GRADIENTS):
    differentiable_once(_backward)
