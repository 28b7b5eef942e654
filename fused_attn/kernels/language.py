"""What the kernels compute with: activations, a maximum that keeps NaN, sums of partial results."""

from __future__ import annotations

import triton
import triton.language as tl

from ..codes import ACTIVATIONS, LAYERS, POOLS, TIES

IDENTITY = tl.constexpr(ACTIVATIONS["identity"])
RELU = tl.constexpr(ACTIVATIONS["relu"])
SILU = tl.constexpr(ACTIVATIONS["silu"])
GELU = tl.constexpr(ACTIVATIONS["gelu"])
GELU_TANH = tl.constexpr(ACTIVATIONS["gelu_tanh"])
HARD_SWISH = tl.constexpr(ACTIVATIONS["hard_swish"])
SIGMOID = tl.constexpr(ACTIVATIONS["sigmoid"])
HARD_SIGMOID = tl.constexpr(ACTIVATIONS["hard_sigmoid"])
TANH = tl.constexpr(ACTIVATIONS["tanh"])
LEAKY_RELU = tl.constexpr(ACTIVATIONS["leaky_relu"])
RELU6 = tl.constexpr(ACTIVATIONS["relu6"])
AVG = tl.constexpr(POOLS["avg"])
MAX = tl.constexpr(POOLS["max"])
AVGMAX = tl.constexpr(POOLS["avgmax"])
BOTH = tl.constexpr(POOLS["both"])
FIRST = tl.constexpr(TIES["first"])
EVEN = tl.constexpr(TIES["even"])
DENSE = tl.constexpr(LAYERS["dense"])
CIRCULAR = tl.constexpr(LAYERS["circular"])

NOWHERE = tl.constexpr(2**31 - 1)  # a position behind every position


@triton.jit
def masked(mask, condition):
    """mask & condition, of one number for all. It is spread as a number: of a spread int1 Triton's interpreter makes an
    int32, which its 3.9 takes for no mask."""
    return mask & (tl.full(mask.shape, 0, tl.int32) + condition != 0)


# ---- activations: comparisons are written so that NaN passes, as in PyTorch ----


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Near 0, 1 - exp(-2|x|) cancels: there a continued fraction cut after 13, exact to 2e-16 for |x| < 0.5.
    z = tl.minimum(x * x, 0.25)
    near = x * (135135.0 + z * (17325.0 + z * (378.0 + z))) / (135135.0 + z * (62370.0 + z * (3150.0 + z * 28.0)))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, near, tl.where(x < 0, -far, far))


@triton.jit
def gelu_tanh_share(x):
    # 0.5 (1 + tanh(v)) = sigmoid(2 v)
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def clamp_to_6(x):
    return tl.where(x <= 0, 0.0, tl.where(x >= 6.0, 6.0, x))


@triton.jit
def activate(x, CODE: tl.constexpr):
    """The activation CODE."""
    if CODE == RELU:
        return tl.where(x <= 0, 0.0, x)
    elif CODE == SILU:
        return x * sigmoid(x)
    elif CODE == GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CODE == GELU_TANH:
        return x * gelu_tanh_share(x)
    elif CODE == HARD_SWISH:
        return x * clamp_to_6(x + 3.0) / 6.0
    elif CODE == SIGMOID:
        return sigmoid(x)
    elif CODE == HARD_SIGMOID:
        return clamp_to_6(x + 3.0) / 6.0
    elif CODE == TANH:
        return tanh(x)
    elif CODE == LEAKY_RELU:
        return tl.where(x > 0, x, 0.01 * x)
    elif CODE == RELU6:
        return clamp_to_6(x)
    else:
        return x


@triton.jit
def activate_grad(x, CODE: tl.constexpr):
    """The derivative of the activation CODE at x, at its kinks as PyTorch has it."""
    one = tl.full(x.shape, 1.0, x.dtype)
    if CODE == RELU:
        return tl.where(x <= 0, 0.0, one)
    elif CODE == SILU:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif CODE == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif CODE == GELU_TANH:
        s = gelu_tanh_share(x)
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif CODE == HARD_SWISH:
        return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, x / 3.0 + 0.5))
    elif CODE == SIGMOID:
        s = sigmoid(x)
        return s * (1.0 - s)
    elif CODE == HARD_SIGMOID:
        return tl.where((x > -3.0) & (x < 3.0), one / 6.0, 0.0)
    elif CODE == TANH:
        t = tanh(x)
        return 1.0 - t * t
    elif CODE == LEAKY_RELU:
        return tl.where(x > 0, 1.0, one * 0.01)
    elif CODE == RELU6:
        return tl.where((x <= 0) | (x >= 6.0), 0.0, one)
    else:
        return one


@triton.jit
def load_affine(affine_weight, affine_bias, c, mask, ACC: tl.constexpr):
    """The prologue's weight and bias of channels c; without a prologue, numbers that nobody uses."""
    if affine_weight is not None:
        weight = tl.load(affine_weight + c, mask=mask, other=0.0).to(ACC)
        return weight, tl.load(affine_bias + c, mask=mask, other=0.0).to(ACC)
    else:
        return c, c


@triton.jit
def before_activation(x, weight, bias, AFFINE: tl.constexpr):
    """What the prologue's activation is applied to; one explicit fma, so that every pass gets the same bits. weight and
    bias are one a row, or lie as x does."""
    if AFFINE:
        if len(weight.shape) == 1:
            return tl.fma(x, tl.broadcast_to(weight[:, None], x.shape), tl.broadcast_to(bias[:, None], x.shape))
        else:
            return tl.fma(x, tl.broadcast_to(weight, x.shape), tl.broadcast_to(bias, x.shape))
    else:
        return x


# ---- maxima: floats are reduced as integers of the same order in which NaN is the largest; tl.max drops NaN ----


@triton.jit
def order_key(x):
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits))
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def from_order_key(key):
    if key.dtype == tl.int64:
        return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)
    else:
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def reduce_max(best, place, AXIS: tl.constexpr, TIES: tl.constexpr):
    """Key of the maximum along AXIS and its first position, or with EVEN its multiplicity."""
    keys = order_key(best)
    key = tl.max(keys, axis=AXIS)
    hit = keys == tl.expand_dims(key, AXIS)
    if TIES == EVEN:
        return key, tl.sum(tl.where(hit, place, 0), axis=AXIS)
    else:
        return key, tl.min(tl.where(hit, place, NOWHERE), axis=AXIS)


@triton.jit
def higher_of(key, place, key2, place2, TIES: tl.constexpr):
    """Of two maxima of parts, the parts' one."""
    tie = place + place2 if TIES == EVEN else tl.minimum(place, place2)
    return tl.maximum(key, key2), tl.where(key2 > key, place2, tl.where(key2 == key, tie, place))


@triton.jit
def linear_in(mean, peak, POOL: tl.constexpr):
    """What a linear excitation needs of the descriptors; `mean` is the maximum where that is the only pool."""
    if POOL == AVGMAX:
        return 0.5 * mean + 0.5 * peak
    elif POOL == BOTH:
        return mean + peak
    else:
        return mean


# ---- products of matrices ----


@triton.jit
def product(a, b, TF32: tl.constexpr, ACC: tl.constexpr):
    """a @ b. TF32: b is read from half precision, so that TF32 holds it, and a as the sum of two such numbers but for
    2^-22 of it; of infinity nothing is left for the second."""
    if TF32:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        rest = tl.dot(tl.where(high == a, 0.0, a - high), b, input_precision="tf32", out_dtype=ACC)
        return tl.dot(high, b, rest, input_precision="tf32", out_dtype=ACC)
    else:
        return tl.dot(a, b, input_precision="ieee", out_dtype=ACC)


@triton.jit
def add_product(total, a, b, HALF: tl.constexpr, ACC: tl.constexpr):
    """total + a @ b; of maps in half precision (HALF) as three products in TF32, 2^-21 of float32's own digits."""
    return tl.dot(a, b, total, input_precision="tf32x3" if HALF else "ieee", out_dtype=ACC)


# ---- partial results, one row a program of the pass before ----


@triton.jit
def sum_rows(table, n_rows, width, columns, mask, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr):
    """Sum of the first n_rows rows of a (rows, width) table at `columns`, in a fixed order."""
    rows = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros(columns.shape, ACC)
    for k in range(0, n_rows, BLOCK_ROWS):
        at = (k + rows)[:, None].to(tl.int64) * width + columns[None, :]
        total += tl.sum(tl.load(table + at, mask=((k + rows) < n_rows)[:, None] & mask[None, :], other=0.0), axis=0)
    return total


@triton.jit
def max_of_rows(
    best, place, n_rows, width, columns, mask, TIES: tl.constexpr, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr
):
    """(maximum, first position or multiplicity) at `columns` of a table of partial maxima and their places."""
    rows = tl.arange(0, BLOCK_ROWS)
    nowhere: tl.constexpr = 0 if TIES == EVEN else NOWHERE
    key = order_key(tl.full(columns.shape, float("-inf"), ACC))
    found = tl.full(columns.shape, nowhere, tl.int32)
    for k in range(0, n_rows, BLOCK_ROWS):
        at = (k + rows)[:, None].to(tl.int64) * width + columns[None, :]
        inside = ((k + rows) < n_rows)[:, None] & mask[None, :]
        values = tl.load(best + at, mask=inside, other=float("-inf"))
        key2, found2 = reduce_max(values, tl.load(place + at, mask=inside, other=nowhere), 0, TIES)
        key, found = higher_of(key, found, key2, found2, TIES)
    if TIES == FIRST:
        found = tl.where(found == nowhere, 0, found)  # nothing but -inf: the first of them
    return from_order_key(key), found
