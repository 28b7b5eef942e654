"""Op `spatial_logits`: the convolution of two pooled maps to one. The map itself does not come in.

Part of `spatial_gate` and `cbam`; by itself where a gate's norm or its axes keep a block from being one op. The CPU has
a kernel, because its convolutions are made for many channels; GPUs run PyTorch's.
"""

from __future__ import annotations

from .. import reference
from .common import as_it_is, below, define, differentiable, differentiable_backward, like_or_none, wants_graph


def _fake(pooled, weight, bias):
    return pooled.new_empty((pooled.shape[0], 1, *pooled.shape[2:]))


def _fake_backward(grad, pooled, weight, bias):
    return tuple(like_or_none(t, pooled) for t in (pooled, weight, bias))


FORWARD = define("spatial_logits", "(Tensor pooled, Tensor weight, Tensor? bias) -> Tensor", _fake)
BACKWARD = define(
    "spatial_logits_backward",
    "(Tensor grad, Tensor pooled, Tensor weight, Tensor? bias)"
    " -> (Tensor grad_pooled, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
)


def _keep(ctx, inputs, logits):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    inputs = ctx.saved_tensors
    if wants_graph():
        grads = differentiable_backward(reference.spatial_logits, inputs, ctx.needs_input_grad[1:], grad)
    else:
        grads = below(BACKWARD[ctx.backend], grad, *inputs)
        grads = (*grads[:2], None if inputs[2] is None else grads[2])
    return None, *grads


#: spatial_logits(backend, pooled, weight, bias): (B, 1, *spatial), contiguous, in pooled's dtype.
spatial_logits = differentiable(FORWARD, BACKWARD, _keep, _gradients, reference.spatial_logits, shown=as_it_is)
