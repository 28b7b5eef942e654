"""Op `simam`: x * sigmoid(d / (4 * (sum(d) / (n - 1) + e_lambda)) + 0.5) with d = (x - mean)^2, by channel.

With c = x - mean, q = 1 / (4 * (sum(c^2) / (n - 1) + e_lambda)), s = sigmoid(q c^2 + 0.5) and h = grad x s (1 - s):
grad_x = grad s + 2 c (q h - 4 q^2 sum(h c^2) / (n - 1)) - 2 q sum(h c) / n.
"""

from __future__ import annotations

from .. import reference
from .common import accumulator, below, define, differentiable, differentiable_backward, empty_map, wants_graph


def _fake(x, e_lambda):
    return empty_map(x), x.new_empty((x.shape[0], 3, x.shape[1]), dtype=accumulator(x.dtype))


def _fake_backward(grad, x, state):
    return empty_map(x)


# state: (B, 3, C), rows [pivot, rest, q]: pivot is the channel's first element, rest the mean's distance from it, so
# that c = (x - pivot) - rest is exact to its last digit however large the mean is.
FORWARD = define("simam", "(Tensor x, float e_lambda) -> (Tensor y, Tensor state)", _fake)
BACKWARD = define("simam_backward", "(Tensor grad, Tensor x, Tensor state) -> Tensor", _fake_backward)


def _formula(x, e_lambda):
    return reference.simam(x, e_lambda=e_lambda)


def _keep(ctx, inputs, results):
    ctx.save_for_backward(*inputs, results[1])


def _gradients(ctx, grad):
    x, state = ctx.saved_tensors
    if wants_graph():
        (grad_x,) = differentiable_backward(lambda x: _formula(x, *ctx.codes), (x,), ctx.needs_input_grad[1:], grad)
    else:
        grad_x = below(BACKWARD[ctx.backend], grad, x, state)
    return None, grad_x


#: simam(backend, x, e_lambda): the gated map, in x's dtype and layout.
simam = differentiable(FORWARD, BACKWARD, _keep, _gradients, _formula)
