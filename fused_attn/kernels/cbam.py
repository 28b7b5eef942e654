"""Op `cbam`: forward 4 launches (read x; read x for the pools over channels of the gated map; convolve; read x, write
y), backward 6 (read grad and x; convolve; read grad and x; read grad, write grad_x; gradients of each gate's
parameters). The map between the gates is never written: v = u * gate is formed again from x wherever it is needed.

Where the layers of the channel gate are apart from the map's programs, as in channel_gate, each is a launch more; a
BatchNorm adds a few by PyTorch on one number a position.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import ACTIVATIONS
from . import channel_gate as channels
from . import layers, maps, spatial_gate
from .channel_gate import excite, excite_backward, store_hidden_grads
from .language import AVG, BOTH, EVEN, IDENTITY
from .maps import SIZES, channels_of, locate
from .passes import backward_pass, scale_pass
from .space import channel_dot_pass, channel_pool_pass


@triton.jit(do_not_specialize=SIZES)
def _excite_and_pool(
    x, weight1, bias1, weight2, bias2, affine_weight, affine_bias,
    sums, best, place, products, space_sums, space_best, space_place, state, index,
    c_q, s_q, n_cblk, n_split, blocks, tiles, pool_split, H, n_part, taps, width, APART: tl.constexpr,
    LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, SPACE_TIES: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE: tl.constexpr, PRE: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of the program's channels, where no launch has left them; then reads x for the pools over channels of
    the gated map."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    if not APART:
        excite(
            weight1, bias1, weight2, bias2, sums, best, place, products, state, index,
            b, cblk, tiles, C, S, pool_split, H, n_part, taps, width,
            LAYER, POOL, TIES, ACTIVATION, BLOCK_K, BLOCK_E, BLOCK_C, BLOCK_H, BLOCK_ROWS, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    channel_pool_pass(
        x, affine_weight, affine_bias, state + b * width + C, space_sums, space_best, space_place,
        b, cblk, split, C, S, n_cblk, blocks, tiles, GATE, PRE, SPACE_TIES, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _scale_both(
    x, affine_weight, affine_bias, residual, y, channel_state, state, c_q, s_q, n_cblk, n_split, blocks, tiles, width,
    GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, ROWS: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    scale_pass(
        x, residual, y, channel_state + b * width + C, state + b * ROWS * S + 2 * S, affine_weight, affine_bias,
        b, cblk, split, C, S, blocks, tiles, GATE, SPACE_GATE, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _dot_channels_gated(
    grad, x, y, residual, grad_residual, affine_weight, affine_bias, channel_state, state, space_dots,
    c_q, s_q, n_cblk, n_split, blocks, tiles, width, stride_b, stride_c, stride_s,
    GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr, ROWS: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    channel_dot_pass(
        grad, x, y, residual, grad_residual, affine_weight, affine_bias,
        channel_state + b * width + C, state + b * ROWS * S + 2 * S, space_dots,
        b, cblk, split, C, S, n_cblk, blocks, tiles, stride_b, stride_c, stride_s,
        GATE, SPACE_GATE, PRE, POST, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _dot_space(
    grad, x, weight2, affine_weight, affine_bias, channel_state, state, index, space_grads, dots, products,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H, width, stride_b, stride_c, stride_s,
    SPACE_TIES: tl.constexpr, GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, ROWS: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x; leaves partial dots over space of the gradient of v, and weight2's products with them."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    logits = channel_state + b * width + C
    row = state + b * ROWS * S
    backward_pass(
        grad, x, None, None, None, None, affine_weight, affine_bias,
        logits, None, None, None, None, dots, None, None,
        row + 2 * S, space_grads + b * 2 * S, index + b * S, row if SPACE_TIES == EVEN else None,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        GATE, SPACE_GATE, PRE, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip
    if weight2 is not None:
        c, in_c = channels_of(cblk, tiles, C, BLOCK_K, BLOCK_C)
        store_hidden_grads(
            weight2, logits, dots, products, b, cblk, split, c, in_c, C, n_cblk, n_split, H, GATE, BLOCK_H, ACC
        )


@triton.jit(do_not_specialize=SIZES)
def _spread_both(
    grad, x, weight1, weight2, affine_weight, affine_bias, channel_state, channel_index, state, index, space_grads,
    dots, products, mean, value, grad_logits, grad_hidden, tap_sums, grad_x, weight_sums, bias_sums,
    c_q, s_q, n_cblk, n_split, blocks, tiles, H, n_part, taps, width, stride_b, stride_c, stride_s,
    APART: tl.constexpr, LAYER: tl.constexpr, POOL: tl.constexpr, TIES: tl.constexpr, SPACE_TIES: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, SPACE_GATE: tl.constexpr, PRE: tl.constexpr, ROWS: tl.constexpr,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of the program's descriptors, where no launch has left them; then reads grad (x too after a prologue or
    for shared ties), writes grad_x, and leaves partial sums for the prologue."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    if not APART:
        excite_backward(
            weight1, weight2, channel_state, channel_index, dots, products, mean, value,
            grad_logits, grad_hidden, tap_sums,
            b, cblk, tiles, C, S, n_cblk, n_split, H, n_part, taps, width,
            LAYER, POOL, TIES, ACTIVATION, GATE, BLOCK_K, BLOCK_E, BLOCK_C, BLOCK_H, BLOCK_ROWS, ACC,
        )  # fmt: skip
        tl.debug_barrier()
    row = channel_state + b * width
    space_row = state + b * ROWS * S
    peak = row + (2 * C + H if POOL == BOTH else width - C)
    backward_pass(
        grad, x, None, None, grad_x, None, affine_weight, affine_bias,
        row + C, mean + b * C, None if POOL == AVG else value + b * C, channel_index + b * C,
        peak if POOL != AVG and TIES == EVEN else None, None, weight_sums, bias_sums,
        space_row + 2 * S, space_grads + b * 2 * S, index + b * S, space_row if SPACE_TIES == EVEN else None,
        b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
        GATE, SPACE_GATE, PRE, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


def cbam(
    x: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    layer: int,
    pool: int,
    channel_ties: int,
    activation: int,
    channel_gate: int,
    mean_first: int,
    spatial_ties: int,
    spatial_gate_code: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, plan = maps.dense(x)
    over_channels = maps.plan_over_channels(x, plan)
    pooling = maps.dense(x, True)[1]  # pools over space alone may have FLAT tiles
    parameters = tuple(map(maps.row, (weight1, bias1, weight2, bias2)))
    spatial_weight, spatial_bias = maps.row(spatial_weight), maps.row(spatial_bias)
    affine = {"affine_weight": maps.row(affine_weight), "affine_bias": maps.row(affine_bias)}
    sizes = channels.sizes_of(pooling, parameters[0], parameters[2], layer)
    channel_state, channel_index = channels.empty_state(x, plan, sizes["H"], pool, channel_ties)
    codes = layer, pool, channel_ties, activation, pre_activation
    found = channels.squeezed(x, pooling, parameters, affine, sizes, channel_state, channel_index, *codes)
    tables = maps.channel_pool_tables(x, over_channels)
    shared: dict[str, Any] = {"x": x, "GATE": channel_gate, "PRE": pre_activation, "width": channel_state.shape[1]}
    shared |= affine
    # A program has up to four times the channels that one of channel_gate has.
    sizes_of_pool = sizes | {"BLOCK_H": 16} | channels.channels_a_program(over_channels, sizes["taps"])
    maps.launch(
        _excite_and_pool,
        x,
        over_channels.programs,
        pool_split=pooling.n_split,
        LAYER=layer,
        POOL=pool,
        TIES=channel_ties,
        SPACE_TIES=spatial_ties,
        ACTIVATION=activation,
        **{f"space_{k}": v for k, v in tables.items()},
        **shared,
        **sizes_of_pool,
        **found,
        **over_channels.arguments(x.dtype),
        **maps.exact(spatial_ties),
    )
    norm = norm_weight, norm_bias, eps
    state, index, statistics = spatial_gate.convolve(
        x, over_channels, tables, spatial_weight, spatial_bias, *norm, mean_first, spatial_ties
    )
    y = torch.empty_like(x)
    maps.launch(
        _scale_both,
        x,
        plan.programs,
        residual=maps.as_map(residual, x),
        y=y,
        channel_state=channel_state,
        state=state,
        SPACE_GATE=spatial_gate_code,
        POST=post_activation,
        ROWS=state.shape[1],
        **shared,
        **plan.arguments(x.dtype),
    )
    return y, channel_state, channel_index, state, index, statistics


def cbam_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    channel_state: Tensor,
    channel_index: Tensor,
    state: Tensor,
    index: Tensor,
    statistics: Tensor,
    weight1: Tensor | None,
    bias1: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    spatial_weight: Tensor,
    spatial_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    affine_weight: Tensor | None,
    affine_bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    layer: int,
    pool: int,
    channel_ties: int,
    activation: int,
    channel_gate: int,
    mean_first: int,
    spatial_ties: int,
    spatial_gate_code: int,
    pre_activation: int,
    post_activation: int,
) -> tuple[Tensor, ...]:
    x, plan = maps.dense(x)
    channel_state, channel_index, state, index = (
        kept.contiguous() for kept in (channel_state, channel_index, state, index)
    )
    over_channels = maps.plan_over_channels(x, plan)
    grad, strides = maps.gradient(grad, x)
    parameters = tuple(map(maps.row, (weight1, bias1, weight2, bias2, affine_weight, affine_bias)))
    weight1, _, weight2, _, affine_weight, affine_bias = parameters
    spatial_weight, spatial_bias = maps.row(spatial_weight), maps.row(spatial_bias)
    sizes = channels.sizes_of(plan, weight1, weight2, layer)
    grad_x = torch.empty_like(x)
    grad_residual = None if post_activation == ACTIVATIONS["identity"] else torch.empty_like(x)
    space_dots = maps.channel_table(x, over_channels)
    shared: dict[str, Any] = {
        "x": x,
        "affine_weight": affine_weight,
        "affine_bias": affine_bias,
        "channel_state": channel_state,
        "state": state,
        "width": channel_state.shape[1],
        "GATE": channel_gate,
        "SPACE_GATE": spatial_gate_code,
        "PRE": pre_activation,
        "ROWS": state.shape[1],
    }
    maps.launch(
        _dot_channels_gated,
        x,
        over_channels.programs,
        grad=grad,
        y=maps.as_map(y, x),
        residual=maps.as_map(residual, x),
        grad_residual=grad_residual,
        space_dots=space_dots,
        POST=post_activation,
        **shared,
        **strides,
        **over_channels.arguments(x.dtype),
    )
    if grad_residual is not None:
        grad, strides = grad_residual, dict.fromkeys(strides)
    norm = norm_weight, norm_bias, eps
    space_grads, space_tap_sums, *norm_grads = spatial_gate.convolve_backward(
        x,
        over_channels,
        space_dots,
        spatial_weight,
        *norm,
        state,
        index,
        statistics,
        mean_first,
        spatial_ties,
        spatial_gate_code,
    )
    is_apart, dots = layers.is_apart(plan, weight1, layer, pool), maps.table(x, plan)
    shared |= {
        "grad": grad,
        "weight2": None if is_apart else weight2,
        "index": index,
        "space_grads": space_grads,
        "dots": dots,
        "products": state.new_empty((plan.batch, plan.parts, sizes["H"])) if sizes["H"] and not is_apart else None,
        "SPACE_TIES": spatial_ties,
        **strides,
        **plan.arguments(x.dtype),
        **maps.exact(spatial_ties),
    }
    maps.launch(_dot_space, x, plan.programs, **{k: sizes[k] for k in ("H", "BLOCK_H", "BLOCK_K")}, **shared)
    tables = channels.excitation_tables(state, plan, weight1, sizes, pool)
    sums = maps.affine_tables(x, plan, affine_weight)
    if is_apart:
        of_channels = channel_state, channel_index, pool, channel_ties, activation, channel_gate
        layers.excite_backward(x, plan, dots, tables, weight1, weight2, *of_channels)
    maps.launch(
        _spread_both,
        x,
        plan.programs,
        weight1=None if is_apart else weight1,
        channel_index=channel_index,
        grad_x=grad_x,
        n_part=plan.parts,
        APART=is_apart,
        LAYER=layer,
        POOL=pool,
        TIES=channel_ties,
        ACTIVATION=activation,
        **sizes,
        **tables,
        **sums,
        **(shared | maps.exact(channel_ties, pool)),
    )
    grads = channels.parameter_gradients(
        x, channel_state, plan, tables, sums, parameters, sizes, layer, pool, activation
    )
    spatial = spatial_gate.convolution_gradients(x, space_tap_sums, spatial_weight, spatial_bias)
    residual_grad = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, residual_grad, *grads[:4], *spatial, *norm_grads, *grads[4:]
