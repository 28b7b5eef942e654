"""What each ATen operator is in canonical form: one function an operator, values in, values out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .canonical import Entry, Graph, Spread, Unsupported, Value, axis_or_none, of_shape

#: Operator -> function(graph, shape of the first output, *args, **kwargs) -> Value or several.
OPERATORS: dict[str, Callable[..., Any]] = {}

#: Up to which a number in front of a softmax is taken for minus infinity.
LOWEST = -1e8


def operator(*names: str) -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        for name in names:
            OPERATORS[name] = function
        return function

    return add


def _number(x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        raise Unsupported
    return float(x)


# Arithmetic


@operator("add", "sub")
def _(graph: Graph, shape: Any, a: Any, b: Any, *, alpha: float = 1, sign: float = 1) -> Value:
    factor = sign * _number(alpha)
    if not isinstance(a, Value):
        return graph.affine(b, factor, _number(a))
    return graph.add([a, b], [1.0, factor]) if isinstance(b, Value) else graph.affine(a, 1.0, factor * _number(b))


OPERATORS["sub"] = lambda graph, shape, a, b, alpha=1: OPERATORS["add"](graph, shape, a, b, alpha=alpha, sign=-1)
OPERATORS["rsub"] = lambda graph, shape, a, b, alpha=1: OPERATORS["add"](graph, shape, b, a, alpha=alpha, sign=-1)


@operator("mul")
def _(graph: Graph, shape: Any, a: Value, b: Any) -> Value:
    return graph.multiply(a, b) if isinstance(b, Value) else graph.affine(a, _number(b))


@operator("div")
def _(graph: Graph, shape: Any, a: Value, b: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise Unsupported
    if not isinstance(b, Value):
        return graph.affine(a, 1 / _number(b))
    return graph.multiply(a, graph.act("reciprocal", b))


@operator("neg")
def _(graph: Graph, shape: Any, a: Value) -> Value:
    return graph.affine(a, -1)


@operator("square")
def _(graph: Graph, shape: Any, a: Value) -> Value:
    return graph.multiply(a, a)


@operator("pow")
def _(graph: Graph, shape: Any, a: Value, exponent: Any) -> Value:
    if exponent != 2:
        raise Unsupported
    return graph.multiply(a, a)


@operator("addcmul")
def _(graph: Graph, shape: Any, a: Value, b: Value, c: Value, *, value: float = 1) -> Value:
    return graph.add([a, graph.multiply(b, c)], [1.0, _number(value)])


# Matrices with a diagonal, by which the code of a criss-cross attention leaves every position's own out once


@operator("full")
def _(graph: Graph, shape: Sequence[int], size: Any, number: Any, **_: Any) -> Value:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or math.isnan(number):
        raise Unsupported
    return graph.constant(float(number), shape)


@operator("new_full")
def _(graph: Graph, shape: Sequence[int], a: Any, size: Any, number: Any, **_: Any) -> Value:
    return OPERATORS["full"](graph, shape, size, number)


OPERATORS["ones"] = lambda graph, shape, *_, **__: graph.constant(1.0, shape)
OPERATORS["zeros"] = lambda graph, shape, *_, **__: graph.constant(0.0, shape)


@operator("diag_embed")
def _(graph: Graph, shape: Sequence[int], a: Value, *places: Any, **_: Any) -> Value:
    constant = a.node.op == "poly" and not a.node.inputs and len(a.node.terms) == 1
    if len(a.layout) != 1 or not constant or places[:1] not in ((), (0,)) or shape[0] == 1:
        raise Unsupported
    return graph.diagonal(a.node.terms[0][0], shape[0])


@operator("eye")
def _(graph: Graph, shape: Sequence[int], *_: Any, **__: Any) -> Value:
    if shape[0] != shape[1] or shape[0] == 1:
        raise Unsupported
    return graph.diagonal(1.0, shape[0])


@operator("masked_fill")
def _(graph: Graph, shape: Any, a: Value, mask: Value, number: Any) -> Value:
    """Of a diagonal: whatever was there makes no difference to a number beside which it vanishes."""
    if mask.node.op != "diagonal" or mask.node.attrs != (1.0,) or not isinstance(number, (int, float)):
        raise Unsupported
    if not number <= LOWEST:
        raise Unsupported
    diagonal = graph.diagonal(float(number), mask.node.sizes[0])
    return graph.add([a, Value(diagonal.node, mask.layout)], [1.0, 1.0])


# Functions of one value

for _aten, _name in {
    "sigmoid": "sigmoid",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
    "hardsigmoid": "hard_sigmoid",
    "hardswish": "hard_swish",
    "exp": "exp",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
    "reciprocal": "reciprocal",
    "log": "log",
    "abs": "abs",
    "mish": "mish",
}.items():
    OPERATORS[_aten] = lambda graph, shape, a, name=_name: graph.act(name, a)


@operator("detach")
def _(graph: Graph, shape: Any, a: Value) -> Value:
    number = a.node.op == "diagonal" or (a.node.op == "poly" and not a.node.inputs)
    return a if number else graph.act("detach", a)


@operator("gelu")
def _(graph: Graph, shape: Any, a: Value, *, approximate: str = "none") -> Value:
    return graph.act("gelu_tanh" if approximate == "tanh" else "gelu", a)


@operator("leaky_relu")
def _(graph: Graph, shape: Any, a: Value, slope: float = 0.01) -> Value:
    return graph.act("leaky_relu" if slope == 0.01 else f"leaky_relu {slope}", a)


@operator("hardtanh")
def _(graph: Graph, shape: Any, a: Value, low: float = -1.0, high: float = 1.0) -> Value:
    if (low, high) == (0, 6):
        return graph.act("relu6", a)
    return graph.act(f"hardtanh {float(low)} {float(high)}", a)


@operator("clamp")
def _(graph: Graph, shape: Any, a: Value, low: Any = None, high: Any = None) -> Value:
    """Not relu or relu6: at its bounds it passes the gradient, and these do not."""
    if isinstance(low, Value) or isinstance(high, Value):
        raise Unsupported
    low, high = (None if n is None else float(n) for n in (low, high))
    return graph.act(f"clamp {low} {high}", a)


OPERATORS["clamp_min"] = lambda graph, shape, a, low: OPERATORS["clamp"](graph, shape, a, low)
OPERATORS["clamp_max"] = lambda graph, shape, a, high: OPERATORS["clamp"](graph, shape, a, None, high)


@operator("_softmax")
def _(graph: Graph, shape: Any, a: Value, dim: int, to_float: bool) -> Value:
    return graph.softmax(a, dim)


# Reductions


@operator("mean", "sum")
def _(
    graph: Graph, shape: Any, a: Value, dims: Any = None, keepdim: bool = False, *, op: str = "mean", dtype: Any = None
) -> Value:
    every = dims is None or len(dims) == 0
    return graph.reduce(op, a, range(len(a.layout)) if every else dims, keepdim and not every)


OPERATORS["sum"] = lambda graph, shape, *args, **kwargs: OPERATORS["mean"](graph, shape, *args, op="sum", **kwargs)


@operator("amax")
def _(graph: Graph, shape: Any, a: Value, dims: Sequence[int] = (), keepdim: bool = False) -> Value:
    return graph.reduce("max", a, dims or range(len(a.layout)), keepdim, "even")


@operator("max")
def _(graph: Graph, shape: Any, a: Value, *args: Any) -> Any:
    if args and isinstance(args[0], int):
        return graph.reduce("max", a, [args[0]], len(args) > 1 and args[1], "first"), None
    if args and isinstance(args[0], Value):
        return _maximum(graph, a, args[0])
    raise Unsupported


@operator("maximum")
def _maximum_operator(graph: Graph, shape: Any, a: Value, b: Value) -> Value:
    return _maximum(graph, a, b)


def _maximum(graph: Graph, a: Value, b: Value) -> Value:
    if a.layout != b.layout or a.node.sizes != b.node.sizes:
        raise Unsupported
    pair = sorted([a.node, b.node], key=lambda n: n.rank_key)
    return Value(graph.node("maximum", pair, (), a.node.sizes), a.layout)


def _pool(graph: Graph, a: Value, op: str, out: Sequence[int]) -> Value:
    """A pool to these sizes, each of which is one or the map's own."""
    rank = len(out)
    sizes = a.shape[-rank:]
    dims = [i - rank for i, (n, m) in enumerate(zip(sizes, out, strict=True)) if n != m]
    if any(m not in (1, n) for n, m in zip(sizes, out, strict=True)):
        raise Unsupported
    return graph.reduce(op, a, dims, True, "first")


@operator("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def _(graph: Graph, shape: Any, a: Value, out: Sequence[int]) -> Value:
    return _pool(graph, a, "mean", out)


@operator("adaptive_max_pool2d", "adaptive_max_pool3d")
def _(graph: Graph, shape: Any, a: Value, out: Sequence[int]) -> Any:
    return _pool(graph, a, "max", out), None


@operator("avg_pool2d", "avg_pool3d")
def _(graph: Graph, shape: Any, a: Value, size: Sequence[int], stride: Any = (), padding: Any = 0, *rest: Any) -> Value:
    return _pool(graph, a, "mean", _windows(a, size, padding, rest[2:3]))


@operator("max_pool2d_with_indices", "max_pool3d_with_indices")
def _(
    graph: Graph,
    shape: Any,
    a: Value,
    size: Sequence[int],
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    *rest: Any,
) -> Any:
    if any(d != 1 for d in _many(dilation)):
        raise Unsupported
    return _pool(graph, a, "max", _windows(a, size, padding, ())), None


def _many(x: Any) -> tuple:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def _windows(a: Value, size: Any, padding: Any, divisor: Sequence[Any]) -> list[int]:
    """The output sizes of a pool whose windows are the whole map or, in a dimension, one position."""
    if any(_many(padding)) or any(d is not None for d in divisor):
        raise Unsupported
    sizes = _many(size)
    space = a.shape[-max(len(sizes), 2) :]
    sizes = sizes * len(space) if len(sizes) == 1 else sizes
    if any(k not in (1, n) for k, n in zip(sizes, space, strict=True)):
        raise Unsupported
    return [n if k == 1 else 1 for k, n in zip(sizes, space, strict=True)]


# Views


@operator("view", "_unsafe_view", "reshape")
def _(graph: Graph, shape: Sequence[int], a: Value, *_: Any) -> Value:
    return graph.reshape(a, shape)


@operator("unsqueeze", "squeeze")
def _(graph: Graph, shape: Sequence[int], a: Value, *_: Any) -> Value:
    return _inserted(a, shape)


def _inserted(a: Value, shape: Sequence[int]) -> Value:
    """The same value with dimensions of size one put in or taken out."""
    kept = [e for e, n in zip(a.layout, a.shape, strict=True) if n != 1]
    entries = iter(kept)
    return Value(a.node, tuple(() if n == 1 else next(entries) for n in shape))


@operator("permute")
def _(graph: Graph, shape: Any, a: Value, dims: Sequence[int]) -> Value:
    return Value(a.node, tuple(a.layout[d] for d in dims))


@operator("transpose")
def _(graph: Graph, shape: Any, a: Value, i: int, j: int) -> Value:
    layout = list(a.layout)
    layout[i], layout[j] = layout[j], layout[i]
    return Value(a.node, tuple(layout))


@operator("t", "numpy_T")
def _(graph: Graph, shape: Any, a: Value) -> Value:
    return Value(a.node, a.layout[::-1])


@operator("expand")
def _(graph: Graph, shape: Sequence[int], a: Value, *_: Any, implicit: bool = False) -> Value:
    return graph.expand(a, shape)


@operator("repeat")
def _(graph: Graph, shape: Sequence[int], a: Value, times: Sequence[int]) -> Value:
    layout: list[Entry] = [()] * (len(times) - len(a.layout)) + list(a.layout)
    for i, n in enumerate(times):
        if n != 1:
            if layout[i] != ():
                raise Unsupported
            layout[i] = Spread(n)
    return Value(a.node, tuple(layout))


@operator("alias", "clone", "contiguous", "lift_fresh")
def _(graph: Graph, shape: Any, a: Value, *_: Any, **__: Any) -> Value:
    return a


@operator("_to_copy")
def _(graph: Graph, shape: Any, a: Value, **_: Any) -> Value:
    return a


# Pieces


@operator("cat")
def _(graph: Graph, shape: Any, values: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(shape)
    if len(values) == 1:
        return values[0]
    pieces = [p for v in values for p in graph.pieces(v, dim)]
    if all(v.layout[dim] == () for v in pieces):
        return graph.stack(pieces, dim)
    return graph.concatenate(pieces, dim)


@operator("stack")
def _(graph: Graph, shape: Any, values: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(shape)
    return graph.stack([Value(v.node, (*v.layout[:dim], (), *v.layout[dim:])) for v in values], dim)


@operator("select")
def _(graph: Graph, shape: Any, a: Value, dim: int, index: int) -> Value:
    return graph.select(a, dim % len(a.layout), index)


@operator("slice")
def _(
    graph: Graph, shape: Sequence[int], a: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    if step != 1:
        raise Unsupported
    dim %= len(a.layout)
    start = start or 0
    start = max(start + a.shape[dim], 0) if start < 0 else start
    return graph.slice(a, dim, start, shape[dim])


@operator("unbind")
def _(graph: Graph, shape: Any, a: Value, dim: int = 0) -> list[Value]:
    dim %= len(a.layout)
    return [graph.select(a, dim, i) for i in range(a.shape[dim])]


@operator("split", "split_with_sizes")
def _(graph: Graph, shape: Any, a: Value, size: Any, dim: int = 0) -> list[Value]:
    dim %= len(a.layout)
    whole = a.shape[dim]
    sizes = [min(size, whole - at) for at in range(0, whole, size)] if isinstance(size, int) else size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [graph.slice(a, dim, start, n) for start, n in zip(starts, sizes, strict=True)]


# Layers


def _weight(weight: Value, out_dim: int, in_dim: int) -> str:
    """Whether the weight, whose dimensions these are, lies as in a Linear; raises where it is neither that nor its
    transpose."""
    axes = [a for d in (out_dim, in_dim) if (a := axis_or_none(weight.layout[d])) is not None]
    if len(axes) < 2:
        return ""
    return "" if axes == sorted(axes) else "transposed"


@operator("mm")
def _(graph: Graph, shape: Sequence[int], a: Value, b: Value) -> Value:
    return graph.dense(a, 1, b.node, shape[1], _weight(b, 1, 0))


@operator("bmm")
def _(graph: Graph, shape: Sequence[int], a: Value, b: Value) -> Value:
    if b.node.op == "leaf" and isinstance(b.layout[0], Spread):  # a Linear of a map that is not contiguous
        return graph.dense(a, 2, b.node, shape[2], _weight(b, 2, 1))
    if a.node.op == "leaf" and isinstance(a.layout[0], Spread):  # a weight times a map
        return graph.dense(b, 1, a.node, shape[1], _weight(a, 1, 2))
    return graph.product(a, b)


@operator("baddbmm")
def _(
    graph: Graph, shape: Sequence[int], added: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    products = OPERATORS["bmm"](graph, shape, a, b)
    if beta == 0:  # then what would be added is not read
        return graph.affine(products, _number(alpha))
    return graph.add([products, added], [_number(alpha), _number(beta)])


@operator("addmm")
def _(
    graph: Graph, shape: Sequence[int], bias: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    return graph.add([OPERATORS["mm"](graph, shape, a, b), bias], [_number(alpha), _number(beta)])


@operator("convolution")
def _(
    graph: Graph,
    shape: Sequence[int],
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    out_padding: Sequence[int],
    groups: int,
) -> Value:
    rank = len(shape) - 2
    if transposed or any(isinstance(e, Spread) for e in x.layout):
        raise Unsupported
    kernel = weight.shape[2:]
    one = all(k == 1 for k in kernel) and not any(padding)
    if one and groups == 1 and all(s == 1 or n == 1 for s, n in zip(stride, x.shape[2:], strict=True)):
        y = graph.dense(x, 1, weight.node, shape[1], "")
    else:
        same = x.shape[2:] == tuple(shape[2:]) and all(s == 1 for s in stride)
        places = (axis_or_none(x.layout[0]), axis_or_none(x.layout[1]), tuple(axis_or_none(e) for e in x.layout[2:]))
        kind = "same" if same else (tuple(stride), tuple(padding))
        widened = graph.channels(
            "conv",
            [x.node, weight.node],
            (places, kind, shape[1] != 1),
            (tuple(dilation), groups, kernel),
            x,
            1,
            shape[1],
        )
        y = widened
        if not same:
            sizes = list(y.node.sizes)
            for e, n in zip(y.layout[2:], shape[2:], strict=True):
                axis = axis_or_none(e)
                if axis is None or n == 1:
                    raise Unsupported
                sizes[axis] = n
            y = Value(graph.node("conv", y.node.inputs, y.node.attrs, sizes, y.node.options), y.layout)
    if bias is None:
        return y
    return graph.add([y, Value(bias.node, (*bias.layout, *((),) * rank))], [1.0, 1.0])


def _batch_norm(
    graph: Graph, x: Value, tensors: Sequence[Value | None], training: bool, momentum: float, eps: float
) -> Value:
    if any(isinstance(e, Spread) for e in x.layout):
        raise Unsupported
    present = tuple(t is not None for t in tensors)
    inputs = [x.node, *(t.node for t in tensors if t is not None)]
    attrs = (axis_or_none(x.layout[1]), bool(training), present)
    return Value(graph.node("batch_norm", inputs, attrs, x.node.sizes, (float(eps), float(momentum))), x.layout)


@operator("native_batch_norm", "cudnn_batch_norm")
def _(
    graph: Graph,
    shape: Any,
    x: Value,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    return _batch_norm(graph, x, (weight, bias, mean, var), training, momentum, eps), None, None


@operator("_native_batch_norm_legit_no_training")
def _(
    graph: Graph, shape: Any, x: Value, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return _batch_norm(graph, x, (weight, bias, mean, var), False, momentum, eps), None, None


def opaque(graph: Graph, name: str, args: Sequence[Any], shape: Sequence[int]) -> Value:
    """An operator without canonical form: equal only to the same one with the same arguments."""
    inputs: list[Any] = []

    def seen(x: Any) -> Any:
        if isinstance(x, Value):
            inputs.append(x.node)
            return x.layout
        if isinstance(x, (list, tuple)):
            return tuple(seen(y) for y in x)
        return x if isinstance(x, (int, float, str, bool, type(None))) else str(x)

    attrs = (name, *(seen(x) for x in args))
    return of_shape(graph.node("opaque", inputs, attrs, [n for n in shape if n != 1]), shape)
