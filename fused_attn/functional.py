"""Fused functions: tensors in, tensor out. Arguments are checked here, and only here.

Every function takes a map x of shape (B, C, *spatial) with one to three spatial axes, dtype float64,
float32, float16 or bfloat16. NCHW-contiguous and channels_last maps are read as they lie and the output
has x's layout; a map with other strides is copied once. Sums are float32 (float64 for float64 maps) and
rounded once, at the output. Under autocast x keeps its dtype and parameters are read as they are.
Results are deterministic to the bit. Backward keeps x, O(B * C) numbers, O(B * positions) where channels are
pooled, and y where a ReLU follows (the residual for other activations); with `create_graph=True` it runs the
reference, which costs what eager costs. The reference runs, too, under torch.func's transforms, forward-mode
differentiation, torch.jit.trace, torch.export (but see `fused_attn.keep_operators`) and hooks on all modules, and
where an argument is a subclass of Tensor, whatever backend was asked for.

Options are names: activations in `fused_attn.codes.ACTIVATIONS`; pool "avg", "max", "avgmax" or "both"; ties
"first" (the gradient of a maximum goes to the first that has it, as in adaptive_max_pool and max(dim)) or "even"
(shared, as in amax); layer "dense", "conv" or "circular".

All raise TypeError for what is not a floating-point tensor or mixes dtypes outside autocast, and ValueError
for wrong shapes, devices, names, and a maximum over an empty map; the message names the argument, what was
expected and what came.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .backends import are_plain, autocasts, choose, forced, is_ordinary, is_small
from .codes import ACTIVATIONS, COMBINES, LAYERS, ORDERS, POOLS, SELECTIONS, TIES, code
from .ops.common import is_channels_last
from .ops.remake import SAVES
from .reference.moments_gate import OfMoments
from .reference.norm_gate import update_statistics
from .reference.squeeze import Excitation

Affine = tuple[Tensor, Tensor]
BatchNorm = tuple[Tensor, Tensor, float]
Order = tuple[str, str]

_SQUEEZE_POOLS = {name: code for name, code in POOLS.items() if name != "both"}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def squeeze(
    x: Tensor,
    pool: str = "avg",
    *,
    ties: str = "first",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor]:
    """Global pooling of pre_activation(x * weight + bias), one pass over x.

    Args:
        x: (B, C, *spatial).
        pool: "avg", "max", or "avgmax" for both from the same pass.
        affine: (weight, bias), each (C,): a folded BatchNorm.

    Returns:
        (B, C) in x's dtype; for "avgmax" the pair (avg, max).

    Equivalent to `x.mean((2, 3))`, `x.amax((2, 3))` (ties "even") or `adaptive_max_pool2d(x, 1)` (ties "first").
    """
    codes = (
        code(ACTIVATIONS, "pre_activation", pre_activation),
        code(_SQUEEZE_POOLS, "pool", pool),
        code(TIES, "ties", ties),
    )
    autocast = _check_map(x)
    _check_pool(x, pool)
    weight, bias = _check_affine(x, affine, autocast)
    backend = _choose("squeeze", codes, x, weight, bias)
    if backend == "reference":
        return reference.squeeze(x, pool, ties=ties, affine=affine, pre_activation=pre_activation)
    avg, peak = ops.squeeze(backend, x, weight, bias, *codes)
    return (avg, peak) if pool == "avgmax" else avg if pool == "avg" else peak


def scale(
    x: Tensor,
    gate: Tensor,
    *,
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """post_activation(pre_activation(x * weight + bias) * gate + residual), one pass over each map.

    Args:
        x: (B, C, *spatial).
        gate: one a channel: (B, C), or (B, C, 1, ...) as a gate-only module returns it; or one a position:
            (B, 1, *spatial). Any floating-point dtype.
        affine: (weight, bias), each (C,).
        residual: a map of x's shape and dtype, any strides.

    Returns:
        A map of x's shape, dtype and layout.
    """
    codes = code(ACTIVATIONS, "pre_activation", pre_activation), code(ACTIVATIONS, "post_activation", post_activation)
    autocast = _check_map(x)
    batch, channels, *spatial = x.shape
    _check_tensor("gate", gate, x)
    if gate.shape == (batch, channels, *(1,) * len(spatial)):
        gate = gate.flatten(1)
    of_space = gate.shape == (batch, 1, *spatial)
    if gate.shape != (batch, channels) and not of_space:
        raise ValueError(
            f"gate: expected shape ({batch}, {channels}) or (B, C, 1, ...), or {(batch, 1, *spatial)}, one a position;"
            f" got {tuple(gate.shape)}"
        )
    weight, bias = _check_affine(x, affine, autocast)
    _check_residual(x, residual)
    backend = _choose("scale/space" if of_space else "scale", codes, x, gate, weight, bias, residual)
    if backend == "reference":
        return reference.scale(
            x,
            gate,
            affine=affine,
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation,
        )
    return ops.scale(backend, _as_it_lies(x), gate, weight, bias, residual, *codes)


def simam(x: Tensor, *, e_lambda: float = 1e-4) -> Tensor:
    """SimAM: x * sigmoid(d / (4 * (sum(d) / (n - 1) + e_lambda)) + 0.5) with d = (x - mean(x))^2.

    Sum and mean are over the n positions of each channel; the mean is taken off before squaring, so that a large one
    costs no digits. Backward goes through both and keeps three numbers a channel.

    Args:
        x: (B, C, *spatial).
        e_lambda: at least 0; keeps the quotient finite where a channel is constant.

    Returns:
        A map of x's shape, dtype and layout. On maps of one position all NaN, as in the original.

    Source: SimAM, ICML 2021, proceedings.mlr.press/v139/yang21o.html.
    """
    if not 0 <= e_lambda < math.inf:
        raise ValueError(f"e_lambda: expected a finite number of at least 0; got {e_lambda!r}")
    _check_map(x)
    backend = _choose("simam", (), x)
    if backend == "reference":
        return reference.simam(x, e_lambda=e_lambda)
    return ops.simam(backend, _as_it_lies(x), float(e_lambda))


#: The gates of those ways to combine them that take no others.
_GATES_OF = {
    "max": ["channel", "spatial"],
    "sigmoid": ["channel", "spatial"],
    "strips": ["rows", "columns"],
    "gate": ["spatial"],
}


def mixed_scale(
    x: Tensor,
    *,
    channel: Tensor | None = None,
    spatial: Tensor | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    combine: str = "product",
) -> Tensor:
    """x with several gates at once, one pass over each map: read x, write y.

    With the gates broadcast to x's shape, `combine` is

    - "product": x times all of them (coordinate attention: rows and columns),
    - "sum": x times their sum (concurrent squeeze-and-excitation, triplet attention),
    - "max": torch.maximum(x * channel, x * spatial); where the two are equal each gets half of the gradient,
    - "sigmoid": x * (1 + sigmoid(channel * spatial)), of logits (BAM),
    - "strips": x * sigmoid(rows + columns), of logits (timm's strip attention),
    - "gate": x * sigmoid(spatial), of logits.

    Args:
        x: (B, C, *spatial).
        channel: one a channel, (B, C) or (B, C, 1, ...).
        spatial: one a position, (B, 1, *spatial).
        rows: one a channel and row of a map (B, C, H, W): (B, C, H, 1).
        columns: one a channel and column of it: (B, C, 1, W).

    At least one gate; for "max" and "sigmoid" channel and spatial and no other, for "strips" rows and columns, for
    "gate" spatial. Any floating-point dtype.

    Returns:
        A map of x's shape, dtype and layout. Backward keeps x and the gates, and reads x once more.
    """
    number = code(COMBINES, "combine", combine)
    _check_map(x)
    batch, channels, *space = x.shape
    if isinstance(channel, Tensor) and channel.shape == (batch, channels, *(1,) * len(space)):
        channel = channel.flatten(1)
    _check_gate("channel", channel, (batch, channels), x)
    _check_gate("spatial", spatial, (batch, 1, *space), x)
    if (rows is not None or columns is not None) and len(space) != 2:
        raise ValueError(f"x: expected (B, C, H, W) for gates of rows and columns; got shape {tuple(x.shape)}")
    _check_gate("rows", rows, (*x.shape[:3], 1), x)
    _check_gate("columns", columns, (batch, channels, 1, space[-1]), x)
    gates = {"channel": channel, "spatial": spatial, "rows": rows, "columns": columns}
    given = [name for name, gate in gates.items() if gate is not None]
    expected = _GATES_OF.get(combine, given)
    if given != expected:
        wanted = " and ".join(expected)
        raise ValueError(f"combine: expected {wanted} for {combine!r}; got {', '.join(given) or 'no gate'}")
    if not given:
        raise ValueError("channel: expected at least one gate; got None for all")
    backend = _choose("mixed_scale", (number,), x, channel, spatial, rows, columns)
    if backend == "reference":
        return reference.mixed_scale(x, channel=channel, spatial=spatial, rows=rows, columns=columns, combine=combine)
    return ops.mixed_scale(backend, _as_it_lies(x), channel, spatial, rows, columns, number)


def pixel_gate(x: Tensor, logits: Tensor) -> Tensor:
    """x * sigmoid(logits), one gate an element (pixel attention): reads x and the logits once, writes y.

    Backward reads the gradient, x and the logits once, and writes both gradients; plain PyTorch also writes and keeps
    the gate, 14 passes in all where these are 8. Under `torch.compile` it is PyTorch's own formula, which compilers
    fuse as well.

    Args:
        x: (B, C, *spatial).
        logits: of x's shape. Any floating-point dtype; where they lie otherwise than x does they are copied.

    Returns:
        A map of x's shape, dtype and layout. Backward keeps x and the logits.

    Source: arXiv:2010.01073.
    """
    _check_map(x)
    _check_gate("logits", logits, tuple(x.shape), x)
    if torch.compiler.is_compiling() or not (is_ordinary(x) and are_plain(logits)):
        return reference.pixel_gate(x, logits)
    last = not x.is_contiguous() and is_channels_last(x)
    map_, gate = ((m.movedim(1, -1) if last else m).reshape(_rows(x, last)) for m in (x, logits))
    number = COMBINES["gate"]
    backend = _choose("mixed_scale", (number,), map_, gate)
    if backend == "reference":
        return reference.pixel_gate(x, logits)
    y = ops.mixed_scale(backend, map_, None, gate, None, None, number)
    return y.view(x.movedim(1, -1).shape).movedim(-1, 1) if last else y.view(x.shape)


#: Elements from which on a row or channel is by itself what a thread takes.
_ROW = 1024


def _rows(x: Tensor, last: bool) -> tuple[int, int, int]:
    """A map that is NCHW, or has its channels last, as maps of one channel: how many, 1, and how long."""
    batch, channels, *space = x.shape
    first, *rest = (*space, channels) if last else (channels, *space)
    length = math.prod(rest)
    return (batch * first, 1, length) if length >= _ROW else (batch, 1, first * length)


def channel_gate(
    x: Tensor,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    layer: str = "dense",
    pool: str = "avg",
    ties: str = "first",
    activation: str = "relu",
    gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor:
    """A whole channel attention block: squeeze, excite, scale.

    With u = pre_activation(x * affine_weight + affine_bias) and s = pool(u) over space (avgmax: the mean of both),
    returns post_activation(u * gate(excitation(s)) + residual); pool="both" excites the average and the maximum each
    by itself, with the same weights, and adds the two (CBAM's channel attention). The excitation is

    - two dense layers: weight2 activation(weight1 s + bias1) + bias2 (squeeze-and-excitation),
    - one dense layer: weight1 s + bias1 (effective SE),
    - layer="conv" or "circular": conv1d(s, weight1, bias1) over the channels, zero or circular padding (ECA),
    - no weights: s itself (parameter-free gather-excite).

    Args:
        x: (B, C, *spatial).
        weight1: dense: (hidden, C), or (C, C) for one layer; conv, circular: (1, 1, k), k odd. Trailing axes
            of size 1, as 1x1 convolutions have them, are allowed.
        bias1: (hidden,), (C,) or (1,).
        weight2, bias2: (C, hidden) and (C,), dense only.
        affine: (weight, bias), each (C,): a folded BatchNorm.
        residual: a map of x's shape and dtype, any strides.

    Returns:
        A map of x's shape, dtype and layout.

    Sources: arXiv:1709.01507 (SE), 1911.06667 (effective SE), 1910.03151 (ECA), 1807.06521 (CBAM).
    """
    codes = (
        code(LAYERS, "layer", layer),
        code(POOLS, "pool", pool),
        code(TIES, "ties", ties),
        code(ACTIVATIONS, "activation", activation),
        code(ACTIVATIONS, "gate", gate),
        code(ACTIVATIONS, "pre_activation", pre_activation),
        code(ACTIVATIONS, "post_activation", post_activation),
    )
    autocast = _check_map(x)
    _check_pool(x, pool)
    _check_excitation(x, weight1, bias1, weight2, bias2, layer, autocast)
    affine_weight, affine_bias = _check_affine(x, affine, autocast)
    _check_residual(x, residual)
    tensors = weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual
    backend = _choose("channel_gate/both" if pool == "both" else "channel_gate", codes, x, *tensors)
    if backend == "reference":
        return reference.channel_gate(
            x,
            weight1,
            bias1,
            weight2,
            bias2,
            layer=layer,
            pool=pool,
            ties=ties,
            activation=activation,
            gate=gate,
            affine=affine,
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation,
        )
    return ops.channel_gate(backend, _as_it_lies(x), *tensors, *codes)


def _as_it_lies(x: Tensor) -> Tensor:
    """x, or a channels_last copy of a part of a channels_last map: operators copy such a map in any case, and a product
    then lies as it does in torch."""
    if x.is_contiguous() or is_channels_last(x):
        return x
    spatial = [stride for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True) if size > 1]
    falling = all(a >= b for a, b in itertools.pairwise(spatial))
    if x.shape[1] == 1 or not spatial or not falling or x.stride(1) >= spatial[-1]:
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _in_order(grad: Tensor) -> Tensor:
    """For torch 2.13's BatchNorm, whose gradients of one NCHW sample are wrong where those that come to it lie
    otherwise."""
    return grad.contiguous()


def norm_gate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    excitation: Excitation | None = None,
    residual: Tensor | None = None,
    post_activation: str = "identity",
    group: Any = None,
    inplace: bool = False,
    save: str = "all",
) -> Tensor:
    """BatchNorm with what follows it in a residual network: activation, channel gate, sum, activation.

    With u = activation(batch_norm(x)) returns post_activation(u * excitation(mean of u over space) + residual). In
    training 4 passes forward (3 without a gate or residual) and 6 backward (5 without a post_activation), of which
    nothing is kept but x and, where a ReLU follows, one bit an element; the activations between are computed again.

    Args:
        x: (B, C, *spatial), a convolution's output.
        weight, bias, running_mean, running_var, training, momentum, eps: as in `torch.nn.functional.batch_norm`, each
            (C,) or None, in x's dtype or float32. In training the statistics are those of the batch, and the running
            ones, where they are given, are updated.
        excitation: from the descriptor, (B, C) in x's dtype, to the gate, (B, C) or (B, C, 1, ...): any PyTorch code.
            Autograd goes through it. None: no gate.
        residual: a map of x's shape and dtype, any strides.
        group: a `torch.distributed` process group; in training the statistics are those of all its processes' batches,
            as SyncBatchNorm's.
        inplace: write the result over one of the maps and return that: over x where gradients are disabled (in
            `torch.no_grad()`), else over the residual, which backward does not need after a ReLU or nothing (it does
            need x). As with torch's own operators in place, an autograd node that has kept the overwritten map raises
            in its backward, and code that autograd does not see (a checkpointed region that is run again) does not.
            `torch.compile` places results itself: there this does nothing.
        save: "least": the result knows how it is made again, in one pass over x (and the residual, which is kept for
            that), and layers that `fused_attn.ops.remake.through` calls with it keep this and not the result, as those
            of `fuse(model, tails=True, save="least")`. "all": they keep the result, and always where the reference
            serves this.

    Returns:
        A map of x's shape, dtype and layout. With `group` its gradient cannot be differentiated again.

    Raises:
        ValueError: also where the batch has but one value a channel in training, without running statistics where it is
            not training, and where `inplace` has no map to write over: no residual or another post_activation with
            gradients enabled; a residual that is a leaf that requires a gradient, a view, or not in x's layout; x and
            residual in one storage; an x that is neither NCHW nor channels_last; a tensor of `inference_mode` outside.
    """
    codes = code(ACTIVATIONS, "activation", activation), code(ACTIVATIONS, "post_activation", post_activation)
    least = code(SAVES, "save", save) == SAVES["least"]
    autocast = _check_map(x)
    parameters = weight, bias, running_mean, running_var
    shape, dtype, device = (x.shape[1],), x.dtype, x.device
    for i, parameter in enumerate(parameters):
        if parameter is None:
            continue
        if parameter.shape != shape or parameter.dtype != dtype or parameter.device != device:
            name = ("weight", "bias", "running_mean", "running_var")[i]
            _check_parameter(name, parameter, shape, x, autocast or parameter.dtype == torch.float32)
    _check_residual(x, residual)
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean: expected running_mean and running_var where it is not training; got None")
    group = group if training else None
    if group is not None and x.numel() == 0:
        raise ValueError(f"x: expected values on every process of the group; got shape {tuple(x.shape)}")
    if training and group is None and x.numel() == x.shape[1]:
        raise ValueError(f"x: expected more than one value a channel in training; got shape {tuple(x.shape)}")

    over = None
    if inplace and not torch.compiler.is_compiling():
        over = _written_over(x, residual, post_activation)

    def checked_excitation(descriptor: Tensor) -> Tensor:
        assert excitation is not None
        gate = excitation(descriptor)
        if isinstance(gate, Tensor) and gate.dtype == x.dtype and gate.device == x.device and gate.shape == x.shape[:2]:
            return gate  # as most are
        _check_tensor("excitation", gate, x)
        if gate.shape[:2] != x.shape[:2] or gate.numel() != x.shape[0] * x.shape[1]:
            raise ValueError(f"excitation: expected it to return {tuple(x.shape[:2])}; got {tuple(gate.shape)}")
        return gate.flatten(1)

    excite = None if excitation is None else checked_excitation
    # A group's processes may have maps of other sizes, and maps of other dtypes parameters in float32.
    small = group is None and dtype == torch.float32 and is_small(x)
    if small:
        backend = "reference"
    else:
        backend = _choose("norm_gate", (*codes, training, excitation is not None), x, *parameters, residual)
    if backend == "reference" or x.numel() == 0:
        y = reference.norm_gate(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=activation,
            excitation=excite,
            residual=residual,
            post_activation=post_activation,
            group=group,
            inplace=over is not None,
        )
        if small and x.shape[0] == 1 and post_activation != "relu" and y.requires_grad:
            y.register_hook(_in_order)  # the ReLU's gradients lie as the map does
        return y
    statistics = None if training or running_mean is None or running_var is None else (running_mean, running_var)

    def keep(mean: Tensor, variance: Tensor) -> None:
        update_statistics(running_mean, running_var, mean, variance, momentum)

    return ops.norm_gate(
        backend,
        _as_it_lies(x),
        weight,
        bias,
        statistics,
        excite,
        residual,
        float(eps),
        *codes,
        group=group,
        over=over,
        keep=keep if training else None,
        least=least,
    )


def channel_pool(
    x: Tensor,
    *,
    order: Order = ("max", "mean"),
    ties: str = "first",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """Maximum and mean of pre_activation(x * weight + bias) over the channels, one pass over x.

    Args:
        x: (B, C, *spatial), C at least 1.
        order: which comes first, ("max", "mean") or ("mean", "max").
        affine: (weight, bias), each (C,): a folded BatchNorm.

    Returns:
        (B, 2, *spatial) in x's dtype, contiguous.

    Equivalent to `torch.cat([x.amax(1, True), x.mean(1, True)], 1)` (ties "even"), or with `x.max(1, True).values`
    (ties "first").
    """
    codes = code(ACTIVATIONS, "pre_activation", pre_activation), _mean_first(order), code(TIES, "ties", ties)
    autocast = _check_map(x)
    _check_channel_pool(x)
    weight, bias = _check_affine(x, affine, autocast)
    backend = _choose("channel_pool", codes, x, weight, bias)
    if backend == "reference":
        return reference.channel_pool(x, order=order, ties=ties, affine=affine, pre_activation=pre_activation)
    return ops.channel_pool(backend, x, weight, bias, *codes)


def context_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The context of a map, one read of it: its mean over space, each position weighted by a softmax over all of them.

    The logits are a 1x1 convolution to one channel, sum(weight * x) + bias over the channels. Backward keeps x, a
    number a position and (B, C), and reads x once more.

    Args:
        x: (B, C, *spatial).
        weight: (1, C). Trailing axes of size 1, as a 1x1 convolution has them, are allowed.
        bias: (1,). The softmax does not see it, and its gradient is 0.

    Returns:
        (B, C) in x's dtype; zeros where there is no position.

    Equivalent to `x.flatten(2) @ conv(x, weight, bias).flatten(2).softmax(2).transpose(1, 2)`.

    Source: GCNet, arXiv:1904.11492.
    """
    backend = _check_context("context_pool", x, weight, bias)
    if backend == "reference":
        return reference.context_pool(x, weight, bias)
    return ops.context_pool(backend, x, weight, bias)


def context_pool_with_map(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(x, its context as from `context_pool`): a block that goes on from this x, as one that scales the map by a gate
    made of its context, has the gradients of both added up in one pass."""
    backend = _check_context("context_pool_with_map", x, weight, bias)
    if backend == "reference":
        return reference.context_pool_with_map(x, weight, bias)
    return ops.context_pool_with_map(backend, x, weight, bias)


def context_gate(x: Tensor, weight: Tensor, bias: Tensor | None, excitation: Excitation) -> Tensor:
    """x times a gate a channel made of its context: 3 passes over the map, and 5 backward.

    Args:
        x, weight, bias: as in `context_pool`.
        excitation: from the context, (B, C) in x's dtype, to the gate, (B, C) or (B, C, 1, ...): any PyTorch code.
            Autograd goes through it.

    Returns:
        A map of x's shape, dtype and layout.
    """
    backend = _check_context("context_gate", x, weight, bias)

    checked = _checked(excitation, x)
    if backend == "reference":
        return reference.context_gate(x, weight, bias, checked)
    return ops.context_gate(backend, _as_it_lies(x), weight, bias, checked)


def _checked(excitation: Callable[..., Tensor], x: Tensor) -> Callable[..., Tensor]:
    """The excitation, whose gate is held against its map."""

    def checked(*descriptors: Tensor) -> Tensor:
        gate = excitation(*descriptors)
        _check_tensor("excitation", gate, x)
        if gate.shape[:2] != x.shape[:2] or gate.numel() != x.shape[0] * x.shape[1]:
            raise ValueError(f"excitation: expected it to return {tuple(x.shape[:2])}; got {tuple(gate.shape)}")
        return gate.flatten(1)

    return checked


def energy_gate(x: Tensor, excitation: Excitation, bias: Tensor | None = None) -> Tensor:
    """x times a gate a channel made of its energy, the sum of its squares over space, plus a bias: 3 passes over the
    map, and 5 backward (6 with a bias).

    Args:
        x: (B, C, *spatial).
        excitation: from the energy, (B, C) in float32 (float64 of float64 maps), to the gate, (B, C) or (B, C, 1, ...):
            any PyTorch code. Autograd goes through it.
        bias: (C,), any floating-point dtype.

    Returns:
        A map of x's shape, dtype and layout.

    Sources: arXiv:1909.11519 (gated channel transformation), 2301.00808 (global response normalisation).
    """
    _check_map(x)
    if bias is not None:
        _check_tensor("bias", bias, x)
        if bias.shape != x.shape[1:2]:
            raise ValueError(f"bias: expected shape ({x.shape[1]},); got {tuple(bias.shape)}")
    backend = _choose("select/energy", (), x, bias)
    checked = _checked(excitation, x)
    if backend == "reference":
        return reference.energy_gate(x, checked, bias)
    return ops.energy_gate(backend, _as_it_lies(x), checked, bias)


def moments_gate(x: Tensor, excitation: OfMoments) -> Tensor:
    """x times a gate a channel made of its mean and variance over space: 3 passes over the map, and 7 backward.

    Args:
        x: (B, C, *spatial).
        excitation: from mean and variance (without Bessel's correction), (B, C) each in float32 (float64 of float64
            maps), to the gate, (B, C) or (B, C, 1, ...): any PyTorch code. Autograd goes through it.

    Returns:
        A map of x's shape, dtype and layout.

    Source: arXiv:1903.10829 (style-based recalibration).
    """
    _check_map(x)
    backend = _choose("norm_gate/moments", (), x)
    checked = _checked(excitation, x)
    if backend == "reference" or x.numel() == 0:
        return reference.moments_gate(x, checked)
    return ops.moments_gate(backend, _as_it_lies(x), checked)


def _statistics_to(keep: Callable[[Tensor, Tensor], None] | None) -> Callable[[Any], None] | None:
    return None if keep is None else lambda results: keep(results[1][0], results[1][1])


def spatial_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
    order: Order = ("max", "mean"),
    ties: str = "first",
    gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A whole spatial attention block: channel pool, convolution, scale.

    With u = pre_activation(x * affine_weight + affine_bias) and m the maximum and the mean of u over its channels,
    returns post_activation(u * gate(conv(m, weight, bias)) + residual), the convolution zero-padded to x's size.

    Args:
        x: (B, C, *spatial).
        weight: (1, 2, k), (1, 2, k, k) or (1, 2, k, k, k) for one to three spatial axes, every k odd.
        bias: (1,).
        batch_norm: (weight, bias, eps), weight and bias (1,): a BatchNorm between convolution and gate that takes its
            statistics from the batch, as in training. (One that uses its running statistics is folded into the
            convolution.)
        keep: gets the mean and the biased variance that it used before the backward's tensors are saved: a checkpoint
            that recomputes no further than these tells it as often as eager updates the buffers of a BatchNorm.
        order: the two input channels of the convolution, ("max", "mean") or ("mean", "max").
        affine: (weight, bias), each (C,): a folded BatchNorm.
        residual: a map of x's shape and dtype, any strides.

    Returns:
        A map of x's shape, dtype and layout; with batch_norm also the mean and the biased variance that it used, in
        the dtype of sums. Backward keeps x, and three numbers (with batch_norm four) and an index a position.

    Source: arXiv:1807.06521 (CBAM).
    """
    codes = (
        _mean_first(order),
        code(TIES, "ties", ties),
        code(ACTIVATIONS, "gate", gate),
        code(ACTIVATIONS, "pre_activation", pre_activation),
        code(ACTIVATIONS, "post_activation", post_activation),
    )
    autocast = _check_map(x)
    _check_channel_pool(x)
    _check_spatial_convolution("weight", weight, "bias", bias, x, autocast)
    affine_weight, affine_bias = _check_affine(x, affine, autocast)
    _check_residual(x, residual)
    norm_weight, norm_bias, eps = _check_batch_norm(x, batch_norm, autocast)
    tensors = weight, bias, norm_weight, norm_bias, affine_weight, affine_bias, residual
    backend = _choose("spatial_gate" if batch_norm is None else "spatial_gate/batch_norm", codes, x, *tensors)
    if backend == "reference":
        return reference.spatial_gate(
            x,
            weight,
            bias,
            batch_norm=batch_norm,
            keep=keep,
            order=order,
            ties=ties,
            gate=gate,
            affine=affine,
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation,
        )
    y, statistics = ops.spatial_gate(backend, _as_it_lies(x), *tensors, eps, *codes, told=_statistics_to(keep))
    return y if batch_norm is None else (y, statistics[0], statistics[1])


def cbam(
    x: Tensor,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    spatial_weight: Tensor | None = None,
    spatial_bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
    layer: str = "dense",
    pool: str = "both",
    channel_ties: str = "first",
    activation: str = "relu",
    channel_gate: str = "sigmoid",
    order: Order = ("max", "mean"),
    spatial_ties: str = "first",
    spatial_gate: str = "sigmoid",
    affine: Affine | None = None,
    pre_activation: str = "identity",
    residual: Tensor | None = None,
    post_activation: str = "identity",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """A whole CBAM block: a channel gate, then a spatial gate on its output, which is never written.

    With u = pre_activation(x * affine_weight + affine_bias), v = channel_gate(u) (see `channel_gate`, whose options
    are meant by layer, pool, channel_ties, activation and channel_gate) and m the maximum and the mean of v over its
    channels, returns post_activation(v * spatial_gate(conv(m, spatial_weight, spatial_bias)) + residual).

    Args:
        x: (B, C, *spatial).
        weight1, bias1, weight2, bias2: the excitation, as in `channel_gate`.
        spatial_weight: the convolution's, as in `spatial_gate`; required.
        spatial_bias: (1,).
        batch_norm, keep: as in `spatial_gate`.
        order, spatial_ties: as `order` and `ties` in `spatial_gate`.
        affine: (weight, bias), each (C,): a folded BatchNorm.
        residual: a map of x's shape and dtype, any strides.

    Returns:
        A map of x's shape, dtype and layout; with batch_norm also its mean and biased variance.

    Source: arXiv:1807.06521 (CBAM).
    """
    codes = (
        code(LAYERS, "layer", layer),
        code(POOLS, "pool", pool),
        code(TIES, "channel_ties", channel_ties),
        code(ACTIVATIONS, "activation", activation),
        code(ACTIVATIONS, "channel_gate", channel_gate),
        _mean_first(order),
        code(TIES, "spatial_ties", spatial_ties),
        code(ACTIVATIONS, "spatial_gate", spatial_gate),
        code(ACTIVATIONS, "pre_activation", pre_activation),
        code(ACTIVATIONS, "post_activation", post_activation),
    )
    autocast = _check_map(x)
    _check_pool(x, pool)
    _check_channel_pool(x)
    _check_excitation(x, weight1, bias1, weight2, bias2, layer, autocast)
    _check_spatial_convolution("spatial_weight", spatial_weight, "spatial_bias", spatial_bias, x, autocast)
    affine_weight, affine_bias = _check_affine(x, affine, autocast)
    _check_residual(x, residual)
    excitation = weight1, bias1, weight2, bias2
    norm_weight, norm_bias, eps = _check_batch_norm(x, batch_norm, autocast)
    tensors = *excitation, spatial_weight, spatial_bias, norm_weight, norm_bias, affine_weight, affine_bias, residual
    backend = _choose("cbam" if batch_norm is None else "cbam/batch_norm", codes, x, *tensors)
    if backend == "reference":
        return reference.cbam(
            x,
            *excitation,
            spatial_weight,
            spatial_bias,
            batch_norm=batch_norm,
            keep=keep,
            layer=layer,
            pool=pool,
            channel_ties=channel_ties,
            activation=activation,
            channel_gate=channel_gate,
            order=order,
            spatial_ties=spatial_ties,
            spatial_gate=spatial_gate,
            affine=affine,
            pre_activation=pre_activation,
            residual=residual,
            post_activation=post_activation,
        )
    y, statistics = ops.cbam(backend, _as_it_lies(x), *tensors, eps, *codes, told=_statistics_to(keep))
    return y if batch_norm is None else (y, statistics[0], statistics[1])


def position_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float = 1.0) -> Tensor:
    """Attention between positions: for each of the query's the softmax over the key's of scale * query . key, times
    the values.

    Args:
        query: (B, D, *space), one to three spatial axes.
        key: (B, D, *other_space).
        value: (B, E, *other_space). D and E may differ.
        scale: of the products; the softmax is of them as they are otherwise.

    Returns:
        (B, E, *space) in value's dtype, and in its layout where it has the query's space. Backward keeps the inputs,
        the result and two numbers a position; no matrix of pairs is written, in either direction. As in flash
        attention the softmax's backward subtracts gradient . result, rounded by itself: where one product outdoes the
        others by thousands, the gradients of query and key are zero but for that rounding times key or query.

    Equivalent to `scaled_dot_product_attention` over `t.flatten(2).transpose(1, 2)` of each, with that scale. (Where
    the value has another width than query and key, torch's own writes that matrix on a CPU. On a GPU it does not, and
    serves this function unless the backend "reference" is asked for; its gradients call it once more.)
    """
    _check_attention(query, key, value, scale)
    backend = _choose("position_attention", (), query, key, value)
    same = query.dtype == key.dtype == value.dtype
    if backend == "reference" and same and _serves_by_torch(query, key, value):
        return ops.position_attention_by_torch(query, key, value, float(scale))
    if backend == "reference" or not same:
        return reference.position_attention(query, key, value, scale=scale)
    return ops.position_attention(backend, query, key, value, float(scale))


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Criss-cross attention: for each position the softmax of query . key over the positions of its column, itself
    left out, and of its row, times the values.

    Args:
        query, key: (B, D, H, W).
        value: (B, E, H, W). D and E may differ.

    Returns:
        A map of value's shape, dtype and layout. Backward keeps the inputs, the result and two numbers a position; no
        (H + W) weights a position are written, in either direction. Gradients are rounded as `position_attention`'s.

    Source: CCNet, arXiv:1811.11721; without the block's convolutions and its residual.
    """
    _check_criss_cross(query, key, value)
    backend = _choose("criss_cross_attention", (), query, key, value)
    if backend == "reference" or not query.dtype == key.dtype == value.dtype:
        return reference.criss_cross_attention(query, key, value)
    return ops.criss_cross_attention(backend, query, key, value)


def spatial_logits(pooled: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution inside `spatial_gate` by itself: of two pooled maps to one, zero-padded to the same size.

    For gates that are not one op, such as those of triplet attention. A kernel of its own on the CPU; on GPUs PyTorch's
    convolution.

    Args:
        pooled: (B, 2, *spatial).
        weight: (1, 2, k), (1, 2, k, k) or (1, 2, k, k, k) for one to three spatial axes, every k odd.
        bias: (1,).

    Returns:
        (B, 1, *spatial), in pooled's dtype.
    """
    autocast = _check_map(pooled)
    _check_spatial_convolution("weight", weight, "bias", bias, pooled, autocast)
    if _choose("spatial_gate", (), pooled, weight, bias) != "cpu":
        return reference.spatial_logits(pooled, weight, bias)
    return ops.spatial_logits("cpu", pooled, weight, bias)


def axis_pool(
    x: Tensor, *, maxima: bool = False, channels: bool = False, ties: str = "first"
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Pools along the axes of a map of two spatial axes, one pass over x, nothing permuted.

    Args:
        x: (B, C, H, W).
        maxima: False: the means over W and over H (coordinate attention). True: maxima and means (triplet attention).
        channels: with maxima, also those over C.

    Returns:
        The pair (rows, columns), in x's dtype, contiguous: the means over W, (B, C, H, 1), and over H, (B, C, 1, W).
        With maxima: rows (B, 2, C, H), the maximum and the mean over W, columns (B, 2, C, W), the same over H, and with
        `channels` a third, (B, 2, H, W), the same over C. Backward keeps the places of the maxima (int32).

    Raises:
        ValueError: x has not two spatial axes; channels=True without maxima; a maximum over an empty axis.

    Equivalent to `x.mean(3, True), x.mean(2, True)`, or `torch.stack([x.amax(i), x.mean(i)], 1)` for i = 3, 2 and 1
    (ties "even"), with `x.max(i).values` (ties "first").

    Sources: arXiv:2103.02907 (coordinate attention), 2010.03045 (triplet attention).
    """
    return axis_pool_with_map(x, maxima=maxima, channels=channels, ties=ties)[1:]  # type: ignore[return-value]


def axis_pool_with_map(
    x: Tensor, *, maxima: bool = False, channels: bool = False, ties: str = "first"
) -> tuple[Tensor, ...]:
    """The map itself, then its pools as `axis_pool` returns them.

    For a block that pools a map and then scales it: where it goes on with the map that is returned, the gradient of all
    that follows meets the pools' in one pass (read 1, write 1), and autograd has no maps to add.
    """
    ties_code = code(TIES, "ties", ties)
    _check_map(x)
    _check_axis_pool(x, maxima, channels)
    backend = _choose("axis_pool", (maxima, channels, ties_code), x)
    if backend == "reference":
        return reference.axis_pool_with_map(x, maxima=maxima, channels=channels, ties=ties)
    return ops.axis_pool(backend, x, int(maxima), int(channels), ties_code)


def select(
    branches: Tensor | Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    paths: int | None = None,
    groups: int = 1,
    activation: str = "relu",
    gate: str = "softmax",
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """A whole selection of M branches: selective kernels, split attention.

    With u_m = pre_activation(branch_m * affine_weight[m] + affine_bias[m]) and s the mean over space of the sum of all
    u_m, which is never written, returns the sum of a_m * u_m, where (a_1, ..., a_M) is the softmax over the branches,
    or the sigmoid, of weight2 activation(weight1 s + bias1) + bias2. 2M + 1 passes over a map.

    Args:
        branches: M maps (B, C, *spatial), or one tensor that has them all, (B, M, C, *spatial), or (B, M * C, *spatial)
            with `paths`; either is read as it lies.
        weight1: (hidden, C / groups). Trailing axes of size 1, as 1x1 convolutions have them, are allowed.
        bias1: (hidden,).
        weight2: (M * C, hidden / groups); required. Its rows are M branches of C channels; with groups, each group's
            are M branches of C / groups channels (ResNeSt).
        bias2: (M * C,).
        paths: M, for branches (B, M * C, *spatial) only.
        gate: "softmax" or "sigmoid".
        affine: (weight, bias), each (M, C): the branches' folded BatchNorm.

    Returns:
        (B, C, *spatial), in the branches' dtype and layout. More than eight branches are served by the reference.

    Sources: arXiv:1903.06586 (selective kernels), 2004.08955 (split attention).
    """
    codes = (
        code(ACTIVATIONS, "activation", activation),
        code(SELECTIONS, "gate", gate),
        code(ACTIVATIONS, "pre_activation", pre_activation),
    )
    maps, autocast = _check_branches(branches, paths)
    _check_selection(maps, weight1, bias1, weight2, bias2, groups, autocast)
    affine_weight, affine_bias = _check_branch_affine(maps, affine, autocast)
    count = len(maps)
    parameters = weight1, bias1, weight2, bias2, affine_weight, affine_bias
    backend = _choose("select/many" if count > ops.MOST_BRANCHES else "select", codes, *maps, *parameters)
    if backend == "reference":
        return reference.select(
            branches,
            weight1,
            bias1,
            weight2,
            bias2,
            paths=paths,
            groups=groups,
            activation=activation,
            gate=gate,
            affine=affine,
            pre_activation=pre_activation,
        )
    return ops.select(backend, _read_as_one(branches, maps), *parameters, count, groups, *codes)


def select_with(
    branches: Tensor | Sequence[Tensor],
    excitation: Excitation,
    *,
    paths: int | None = None,
    affine: Affine | None = None,
    pre_activation: str = "identity",
) -> Tensor:
    """`select` around an excitation of your own: one with a BatchNorm or dropout inside, or a layer a branch.

    Args:
        branches, paths, affine: as in `select`.
        excitation: called once, with s, (B, C), in the branches' dtype; returns the branch weights, (B, M, C) up to
            trailing axes of size 1, of any floating-point dtype. Autograd runs through it.

    Returns:
        (B, C, *spatial), in the branches' dtype and layout: in as many passes as `select`, forward and backward.
    """
    pre_activation_code = code(ACTIVATIONS, "pre_activation", pre_activation)
    maps, autocast = _check_branches(branches, paths)
    affine_weight, affine_bias = _check_branch_affine(maps, affine, autocast)
    count, x = len(maps), maps[0]

    def checked(s: Tensor) -> Tensor:
        weights = excitation(s)
        shape = x.shape[0], count, x.shape[1]
        if not isinstance(weights, Tensor):
            raise TypeError(f"excitation: expected a tensor as its result; got {type(weights).__name__}")
        if weights.shape[:3] != shape or any(n != 1 for n in weights.shape[3:]):
            raise ValueError(f"excitation: expected a result of shape {shape}; got {tuple(weights.shape)}")
        _check_tensor("excitation's result", weights, x)
        return weights.reshape(shape)

    op = "select/many" if count > ops.MOST_BRANCHES else "select/with"
    backend = _choose(op, (pre_activation_code,), *maps, affine_weight, affine_bias)
    if backend == "reference":
        return reference.select_with(branches, checked, paths=paths, affine=affine, pre_activation=pre_activation)
    inputs = _read_as_one(branches, maps)
    return ops.select_with(backend, inputs, checked, affine_weight, affine_bias, count, pre_activation_code)


def _mean_first(order: Order) -> int:
    for names, number in ORDERS.items():
        if order == names:
            return number
    raise ValueError(f"order: expected ('max', 'mean') or ('mean', 'max'); got {order!r}")


def _choose(op: str, options: tuple[Any, ...], x: Tensor, *others: Tensor | None) -> str:
    """The backend; plain PyTorch where the operators may not serve x or one of the others, whatever was asked for."""
    return choose(op, x, options, others) if is_ordinary(x) and are_plain(*others) else "reference"


#: Types of devices whose attention is torch's where no backend of ours serves: its memory-efficient kernel is theirs.
_WITH_TORCHS_ATTENTION = {"cuda"}


def _serves_by_torch(*maps: Tensor) -> bool:
    """Whether `scaled_dot_product_attention` may stand for the formula, which whoever asks for "reference" gets."""
    wanted = maps[0].device.type in _WITH_TORCHS_ATTENTION and forced() is None
    return wanted and is_ordinary(maps[0]) and are_plain(*maps[1:]) and all(t.numel() for t in maps)


def _check_tensor(argument: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: expected a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{argument}: expected float64, float32, float16 or bfloat16; got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{argument}: expected x's device, {x.device}; got {tensor.device}")


def _check_map(x: Tensor, argument: str = "x") -> bool:
    """Whether autocast is on for x's device; raises for what is no feature map."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        _check_tensor(argument, x, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{argument}: expected (B, C, *spatial) with one to three spatial axes; got shape {tuple(x.shape)}"
        )
    return autocasts(x)


def _check_branches(branches: Tensor | Sequence[Tensor], paths: int | None) -> tuple[list[Tensor], bool]:
    """The M maps (views of a stacked tensor), and whether autocast is on for their device."""
    if isinstance(branches, Tensor):
        _check_tensor("branches", branches, branches)
        if paths is not None:
            if isinstance(paths, bool) or not isinstance(paths, int) or paths < 1:
                raise ValueError(f"paths: expected a positive integer; got {paths!r}")
            if not 3 <= branches.dim() <= 5 or branches.shape[1] % paths:
                expected = f"(B, {paths} * C, *spatial) with one to three spatial axes"
                raise ValueError(f"branches: expected {expected}; got shape {tuple(branches.shape)}")
        elif not 4 <= branches.dim() <= 6 or branches.shape[1] == 0:
            expected = "(B, M, C, *spatial) with one to three spatial axes"
            raise ValueError(f"branches: expected {expected}; got shape {tuple(branches.shape)}")
    elif paths is not None:
        raise ValueError(f"paths: expected None for a sequence of branches; got {paths!r}")
    elif not isinstance(branches, (list, tuple)) or not branches:
        raise TypeError(f"branches: expected a tensor or a sequence of them; got {branches!r:.40}")
    maps = reference.branch_maps(branches, paths)
    for u in maps:
        _check_tensor("branches", u, maps[0])
        if u.shape != maps[0].shape:
            raise ValueError(f"branches: expected one shape, {tuple(maps[0].shape)}; got {tuple(u.shape)}")
        if u.dtype != maps[0].dtype:
            raise TypeError(f"branches: expected one dtype, {maps[0].dtype}; got {u.dtype}")
    return maps, _check_map(maps[0], "branches")


def _read_as_one(branches: Tensor | Sequence[Tensor], maps: list[Tensor]) -> list[Tensor]:
    """What the operators take: the maps, or the stacked tensor as (B, M, C, *spatial) where there is one."""
    if not isinstance(branches, Tensor) or len(maps) == 1:
        return maps
    return [branches if branches.dim() > maps[0].dim() else branches.unflatten(1, (len(maps), -1))]


def _check_branch_affine(
    maps: list[Tensor], affine: Affine | None, autocast: bool
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if affine is None:
        return None, None
    weight, bias = affine
    shape = len(maps), maps[0].shape[1]
    for argument, tensor in (("affine weight", weight), ("affine bias", bias)):
        _check_parameter(argument, tensor, shape, maps[0], autocast or _is_folded(tensor, maps[0]))
    return weight, bias


def _is_folded(tensor: Tensor, x: Tensor) -> bool:
    """A folded BatchNorm comes in float32 for half precision too."""
    return isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and x.dtype.itemsize == 2


def _check_selection(
    maps: list[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    groups: int,
    autocast: bool,
) -> None:
    x = maps[0]
    channels = x.shape[1]
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"groups: expected a positive integer that divides {channels} channels; got {groups!r}")
    for argument, weight in (("weight1", weight1), ("weight2", weight2)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{argument}: expected a tensor; got {type(weight).__name__}")
    hidden = weight1.shape[0] if weight1.dim() else 0
    if hidden == 0 or hidden % groups:
        multiple = "" if groups == 1 else f", hidden a multiple of {groups}"
        raise ValueError(
            f"weight1: expected shape (hidden, {channels // groups}){multiple}; got {tuple(weight1.shape)}"
        )
    folded = autocast or _is_folded(weight1, x)
    _check_parameter("weight1", weight1, (hidden, channels // groups), x, folded)
    _check_parameter("weight2", weight2, (len(maps) * channels, hidden // groups), x, autocast)  # type: ignore[arg-type]
    if bias1 is not None:
        _check_parameter("bias1", bias1, (hidden,), x, folded)
    if bias2 is not None:
        _check_parameter("bias2", bias2, (len(maps) * channels,), x, autocast)


def _check_pool(x: Tensor, pool: str) -> None:
    if pool == "avg":
        return
    positions = math.prod(x.shape[2:])
    if positions == 0:
        raise ValueError(f"x: expected at least one spatial position for a maximum; got shape {tuple(x.shape)}")
    if positions >= 2**31:
        raise ValueError(f"x: expected fewer than 2**31 spatial positions for a maximum; got {positions}")


def _check_channel_pool(x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one channel for a maximum; got shape {tuple(x.shape)}")


def _check_axis_pool(x: Tensor, maxima: bool, channels: bool) -> None:
    if x.dim() != 4:
        raise ValueError(f"x: expected (B, C, H, W); got shape {tuple(x.shape)}")
    if channels and not maxima:
        raise ValueError("channels: expected False without maxima; got True")
    if maxima and 0 in x.shape[1 if channels else 2 :]:
        raise ValueError(f"x: expected no axis of size 0 for a maximum; got shape {tuple(x.shape)}")


def _check_parameter(argument: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor, autocast: bool) -> None:
    """A parameter of this shape, up to trailing axes of size 1, in x's dtype (any float dtype under autocast)."""
    if isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype == x.dtype and tensor.device == x.device:
        return  # as most are
    _check_tensor(argument, tensor, x)
    found, rank = tensor.shape, len(shape)
    if found != shape and (found[:rank] != shape or any(n != 1 for n in found[rank:])):
        raise ValueError(f"{argument}: expected shape {shape}; got {tuple(found)}")
    if tensor.dtype != x.dtype and not autocast:
        raise TypeError(f"{argument}: expected x's dtype, {x.dtype} (or autocast); got {tensor.dtype}")


def _check_context(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> str:
    """The backend of a context pool, or of what goes on from it."""
    autocast = _check_map(x)
    _check_parameter("weight", weight, (1, x.shape[1]), x, autocast)
    if bias is not None:
        _check_parameter("bias", bias, (1,), x, autocast)
    return _choose("context_pool", (function,), x, weight, bias)


def _check_affine(x: Tensor, affine: Affine | None, autocast: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if affine is None:
        return None, None
    weight, bias = affine
    # A folded BatchNorm comes in float32 for half precision too.
    autocast = autocast or (
        x.dtype.itemsize == 2 and all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in affine)
    )
    _check_parameter("affine weight", weight, (x.shape[1],), x, autocast)
    _check_parameter("affine bias", bias, (x.shape[1],), x, autocast)
    return weight, bias


def _check_residual(x: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    if not isinstance(residual, Tensor) or residual.dtype != x.dtype or residual.device != x.device:
        _check_tensor("residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected x's shape, {tuple(x.shape)}; got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected x's dtype, {x.dtype}; got {residual.dtype}")


def _written_over(x: Tensor, residual: Tensor | None, post_activation: str) -> Tensor:
    """The map that `norm_gate` may write its result over."""
    over, expected = x, "inplace: expected "
    if torch.is_grad_enabled():
        if residual is None:
            raise ValueError(expected + "a residual to write over while gradients are enabled; got None")
        if post_activation not in ("identity", "relu"):
            raise ValueError(
                f"{expected}post_activation identity or relu while gradients are enabled; got {post_activation!r}"
            )
        if residual.requires_grad and residual.is_leaf:
            raise ValueError(expected + "a residual that is not a leaf that requires a gradient")
        if residual._is_view():
            raise ValueError(expected + "a residual that is not a view")
        over = residual
    if not (x.is_contiguous() or is_channels_last(x)):
        raise ValueError(f"{expected}x NCHW or channels_last; got strides {x.stride()}")
    layouts = [[n for size, n in zip(x.shape, t.stride(), strict=True) if size > 1] for t in (x, over)]
    if layouts[0] != layouts[1]:
        raise ValueError(f"{expected}a residual of x's strides, {x.stride()}; got {over.stride()}")
    if residual is not None and residual.untyped_storage()._cdata == x.untyped_storage()._cdata:
        raise ValueError(expected + "x and residual in storages of their own")
    if over.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(expected + "no tensor of inference_mode outside it")
    return over


def _check_gate(argument: str, gate: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if gate is None:
        return
    _check_tensor(argument, gate, x)
    if gate.shape != shape:
        raise ValueError(f"{argument}: expected shape {shape}; got {tuple(gate.shape)}")


def _check_spatial_convolution(
    argument: str, weight: Tensor | None, bias_argument: str, bias: Tensor | None, x: Tensor, autocast: bool
) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{argument}: expected a tensor; got {type(weight).__name__}")
    rank = x.dim() - 2
    kernel_size = tuple(weight.shape[2:])
    if weight.shape[:2] != (1, 2) or len(kernel_size) != rank or any(k % 2 == 0 for k in kernel_size):
        shape = ", ".join(("1", "2") + ("k",) * rank)
        raise ValueError(f"{argument}: expected shape ({shape}) with every k odd; got {tuple(weight.shape)}")
    autocast = autocast or _is_folded(weight, x)
    _check_parameter(argument, weight, (1, 2, *kernel_size), x, autocast)
    if bias is not None:
        _check_parameter(bias_argument, bias, (1,), x, autocast)
    if 0 in x.shape[2:]:
        raise ValueError(f"x: expected at least one spatial position for a convolution; got shape {tuple(x.shape)}")


def _check_batch_norm(
    x: Tensor, batch_norm: BatchNorm | None, autocast: bool
) -> tuple[Tensor, Tensor, float] | tuple[None, None, float]:
    if batch_norm is None:
        return None, None, 0.0
    weight, bias, eps = batch_norm
    _check_parameter("batch_norm weight", weight, (1,), x, autocast)
    _check_parameter("batch_norm bias", bias, (1,), x, autocast)
    if x.shape[0] * math.prod(x.shape[2:]) == 1:
        raise ValueError(f"x: expected more than one position for statistics of the batch; got shape {tuple(x.shape)}")
    return weight, bias, float(eps)


def _check_excitation(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    layer: str,
    autocast: bool,
) -> None:
    channels = x.shape[1]
    if weight1 is None:
        for argument, tensor in (("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
            if tensor is not None:
                raise ValueError(f"{argument}: expected None without weight1; got a tensor")
        return
    if layer != "dense":
        for argument, tensor in (("weight2", weight2), ("bias2", bias2)):
            if tensor is not None:
                raise ValueError(f"{argument}: expected None for layer={layer!r}; got a tensor")
        kernel_size = weight1.shape[-1] if isinstance(weight1, Tensor) and weight1.dim() else 0
        if kernel_size % 2 == 0:
            raise ValueError(f"weight1: expected shape (1, 1, k) with k odd; got {tuple(weight1.shape)}")
        _check_parameter("weight1", weight1, (1, 1, kernel_size), x, autocast)
        if bias1 is not None:
            _check_parameter("bias1", bias1, (1,), x, autocast)
        return
    if weight2 is None:
        if bias2 is not None:
            raise ValueError("bias2: expected None without weight2; got a tensor")
        hidden = channels
    else:
        hidden = weight1.shape[0] if isinstance(weight1, Tensor) and weight1.dim() else 0
        if hidden == 0:
            raise ValueError(f"weight1: expected shape (hidden, {channels}); got {tuple(weight1.shape)}")
    _check_parameter("weight1", weight1, (hidden, channels), x, autocast)
    if weight2 is not None:
        _check_parameter("weight2", weight2, (channels, hidden), x, autocast)
    if bias1 is not None:
        _check_parameter("bias1", bias1, (hidden,), x, autocast)
    if bias2 is not None:
        _check_parameter("bias2", bias2, (channels,), x, autocast)


def _check_beside_query(argument: str, tensor: Tensor, query: Tensor, autocast: bool) -> None:
    _check_tensor(argument, tensor, query)
    if tensor.dtype != query.dtype and not autocast:
        raise TypeError(f"{argument}: expected query's dtype, {query.dtype} (or autocast); got {tensor.dtype}")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    autocast = _check_map(query, "query")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < math.inf:
        raise ValueError(f"scale: expected a finite number; got {scale!r}")
    for argument, tensor in (("key", key), ("value", value)):
        _check_beside_query(argument, tensor, query, autocast)
        if not 3 <= tensor.dim() <= 5:
            expected = "one to three spatial axes"
            raise ValueError(f"{argument}: expected {expected}; got shape {tuple(tensor.shape)}")
    batch, width = query.shape[:2]
    if key.shape[:2] != (batch, width):
        raise ValueError(f"key: expected shape ({batch}, {width}, *other_space); got {tuple(key.shape)}")
    if value.shape[0] != batch or value.shape[2:] != key.shape[2:]:
        expected = f"({batch}, E, {', '.join(map(str, key.shape[2:]))})"
        raise ValueError(f"value: expected shape {expected}; got {tuple(value.shape)}")


def _check_criss_cross(query: Tensor, key: Tensor, value: Tensor) -> None:
    autocast = _check_map(query, "query")
    if query.dim() != 4:
        raise ValueError(f"query: expected (B, D, H, W); got shape {tuple(query.shape)}")
    batch, _, height, width = query.shape
    for argument, tensor in (("key", key), ("value", value)):
        _check_beside_query(argument, tensor, query, autocast)
    if key.shape != query.shape:
        raise ValueError(f"key: expected query's shape, {tuple(query.shape)}; got {tuple(key.shape)}")
    if value.dim() != 4 or value.shape[0] != batch or value.shape[2:] != query.shape[2:]:
        raise ValueError(f"value: expected shape ({batch}, E, {height}, {width}); got {tuple(value.shape)}")
