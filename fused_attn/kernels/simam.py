"""Op `simam`: forward reads x for each channel's moments, then x again and writes y: 3 passes in 2 launches.

Backward reads grad and x for two sums a channel, then both again and writes grad_x: 5 passes in 2 launches. Kept on
chip: a tile. Left in memory between launches: two numbers a channel and split of space. The first element of each
channel is read once more by each program: from it all others are measured, so that a large mean costs no digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import maps
from .language import masked, sigmoid, sum_rows
from .maps import CHANNELS_LAST, FLAT, SIZES, firsts, flat_rows, flat_tile_at, locate, strided_tile_at, tile_at
from .passes import inside

PLAIN_SPACE = 4096  # positions


@triton.jit
def _first_of(x, b, c, mask, C, S, LAYOUT: tl.constexpr, ACC: tl.constexpr):
    """The first element of channels c."""
    at = b * C * S + c if LAYOUT == CHANNELS_LAST else (b * C + c) * S
    return tl.load(x + at, mask=masked(mask, S > 0), other=0.0).to(ACC)


@triton.jit
def _store_moments(means, squares, out, b, split, n_split, c, mask, C, pivot, mean, square):
    """Into `out`, (B, 3, C), where it is given and space is not split; else a row of the tables, and the pivot where
    `out` is given."""
    row = (b * n_split + split) * C
    if out is not None:
        to = out + 3 * b * C + c
        tl.store(to, pivot, mask=masked(mask, split == 0))
        if n_split == 1:
            tl.store(to + C, mean, mask=mask)
            tl.store(to + 2 * C, square, mask=mask)
        else:
            tl.store(means + row + c, mean, mask=mask)
            tl.store(squares + row + c, square, mask=mask)
    else:
        tl.store(means + row + c, mean, mask=mask)
        tl.store(squares + row + c, square, mask=mask)


@triton.jit
def _flat_moments(
    x, b, c0, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr
):
    """(pivot, mean of x - pivot, sum of squared distances from it) of the channels from c0 on, from a FLAT tile.

    A vector's elements count for the channel in which it begins; those
    before a channel's first vector are taken from the tile once more.
    """
    CHANNELS: tl.constexpr = triton.next_power_of_2(BLOCK_C)
    VECTORS: tl.constexpr = triton.next_power_of_2(BLOCK_S // BLOCK_C // VECTOR + 1)
    at, offsets, _ = flat_tile_at(b, c0, C, S, BLOCK_S, VECTOR)
    x += at
    k, exists, _, edge, position = flat_rows(0, C - c0, S, BLOCK_C, BLOCK_S, VECTOR)
    value = tl.load(x + offsets, mask=exists[:, None], other=0.0)
    of_channel = tl.arange(0, CHANNELS)
    in_c = (of_channel < BLOCK_C) & (c0 + of_channel < C)
    begin = tl.minimum(of_channel, BLOCK_C - 1) * S
    pivot = tl.load(x + begin, mask=in_c, other=0.0).to(ACC)
    pivots = tl.gather(pivot, tl.where(exists, k, 0), 0)
    apart = tl.where(firsts(edge, VECTOR), value.to(ACC) - pivots[:, None], 0.0)
    sums, squares = tl.sum(apart, axis=1), tl.sum(apart * apart, axis=1)
    # A channel's vectors.
    nth = ((begin + (VECTOR - 1)) // VECTOR)[None, :] + tl.arange(0, VECTORS)[:, None]
    own = nth * VECTOR < (begin + S)[None, :]
    index = tl.reshape(tl.where(own, nth, 0), (VECTORS * CHANNELS,))
    total = tl.where(own, tl.reshape(tl.gather(sums, index, 0), (VECTORS, CHANNELS)), 0.0)
    square = tl.where(own, tl.reshape(tl.gather(squares, index, 0), (VECTORS, CHANNELS)), 0.0)
    # What lies before them.
    i = tl.arange(0, VECTOR)[:, None]
    own = i < (-begin & (VECTOR - 1))[None, :]
    index = tl.reshape(begin[None, :] + i, (VECTOR * CHANNELS,))
    head = tl.reshape(tl.gather(tl.reshape(value, (BLOCK_S,)), index, 0), (VECTOR, CHANNELS))
    apart = tl.where(own, head.to(ACC) - pivot[None, :], 0.0)
    mean = (tl.sum(total, axis=0) + tl.sum(apart, axis=0)) / S
    square = tl.sum(square, axis=0) + tl.sum(apart * apart, axis=0)
    return pivot, mean, square - mean * mean * S, c0 + of_channel, in_c


@triton.jit(do_not_specialize=SIZES)
def _moments(
    x, means, squares, out, c_q, s_q, n_cblk, n_split, blocks, tiles,
    PLAIN: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once; leaves of each split the mean of x - pivot and the sum of squared distances from it,
    (B, n_split, C); where there is one split and `out` is given, with the pivot in (B, 3, C).

    PLAIN: from the sums of x - pivot and of its square.
    """
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    if LAYOUT == FLAT:
        VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        pivot, mean, square, c, in_c = _flat_moments(x, b, cblk * BLOCK_C, C, S, BLOCK_C, BLOCK_S, VECTOR, ACC)
        _store_moments(means, squares, out, b, split, n_split, c, in_c, C, pivot, mean, square)
    else:
        s0 = (split * blocks).to(tl.int64) * BLOCK_S
        # How many of the split's positions each lane has seen at the end.
        positions = tl.maximum(tl.minimum(S - s0, blocks.to(tl.int64) * BLOCK_S), 0)
        counts = ((positions - tl.arange(0, BLOCK_S) + (BLOCK_S - 1)) // BLOCK_S).to(ACC)[None, :]
        for j in range(tiles):
            c0 = (cblk * tiles + j) * BLOCK_C
            c = c0 + tl.arange(0, BLOCK_C)
            in_c = c < C
            pivot = _first_of(x, b, c, in_c, C, S, LAYOUT, ACC)
            at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
            first = s0  # position of the tile
            seen = tl.full((), 0.0, ACC)
            mean = tl.zeros((BLOCK_C, BLOCK_S), ACC)
            square = tl.zeros((BLOCK_C, BLOCK_S), ACC)
            value = tl.load(x + at + offsets, mask=in_c[:, None] & inside(first, S, BLOCK_S)[None, :], other=0.0)
            for i in range(blocks):  # where it is not PLAIN, Welford's update, lane by lane
                mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
                in_next = in_c[:, None] & masked(inside(first + BLOCK_S, S, BLOCK_S), i + 1 < blocks)[None, :]
                following = tl.load(x + at + step + offsets, mask=in_next, other=0.0)  # two tiles are in flight
                apart = value.to(ACC) - pivot[:, None]
                if PLAIN:
                    apart = tl.where(mask, apart, 0.0)
                    mean += apart
                    square += apart * apart
                else:
                    seen += 1.0
                    distance = tl.where(mask, apart - mean, 0.0)
                    mean += distance * (1.0 / seen)
                    square += distance * (apart - mean)
                value = following
                at += step
                first += BLOCK_S
            if PLAIN:
                centre = tl.sum(mean, axis=1) / positions.to(ACC)
                square = tl.sum(square, axis=1) - centre * centre * positions.to(ACC)
            else:
                centre = tl.sum(mean * counts, axis=1) / positions.to(ACC)
                aside = mean - centre[:, None]
                square = tl.sum(square + aside * aside * counts, axis=1)
            _store_moments(means, squares, out, b, split, n_split, c, in_c, C, pivot, centre, square)


@triton.jit
def _joined(
    means, squares, b, c, mask, C, S, n_split, split_size, BLOCK_ROWS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared distances of channels c from those of all splits, in a fixed order."""
    rows = tl.arange(0, BLOCK_ROWS)
    columns = b * n_split * C + c[None, :]
    total = tl.zeros(c.shape, ACC)
    for k in range(0, n_split, BLOCK_ROWS):
        at = (k + rows)[:, None].to(tl.int64) * C + columns
        count = tl.minimum(S - (k + rows) * split_size, split_size).to(ACC)[:, None]
        present = ((k + rows) < n_split)[:, None] & mask[None, :]
        total += tl.sum(tl.load(means + at, mask=present, other=0.0) * count, axis=0)
    mean = total / S
    square = tl.zeros(c.shape, ACC)
    for k in range(0, n_split, BLOCK_ROWS):
        at = (k + rows)[:, None].to(tl.int64) * C + columns
        count = tl.minimum(S - (k + rows) * split_size, split_size).to(ACC)[:, None]
        present = ((k + rows) < n_split)[:, None] & mask[None, :]
        apart = tl.load(means + at, mask=present, other=0.0) - mean[None, :]
        spread = tl.load(squares + at, mask=present, other=0.0) + apart * apart * count
        square += tl.sum(tl.where(present, spread, 0.0), axis=0)
    return mean, square


@triton.jit(do_not_specialize=SIZES)
def _simam(
    x, means, squares, y, state, c_q, s_q, n_cblk, n_split, blocks, tiles,
    E_LAMBDA: tl.constexpr, CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads x once, in reverse, writes y. Programs that share channels store the same numbers in `state`."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(tiles):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        pivot = _first_of(x, b, c, in_c, C, S, LAYOUT, ACC)
        rest, square = _joined(
            means, squares, b, c, in_c, C, S, n_split, blocks.to(tl.int64) * BLOCK_S, BLOCK_ROWS, ACC
        )  # fmt: skip
        # One position has no variance: 0 / 0.
        variance = tl.where(S > 1, square / tl.maximum(S - 1, 1), float("nan"))
        q = 0.25 / (variance + E_LAMBDA)
        tl.store(state + 3 * b * C + c, pivot, mask=in_c)
        tl.store(state + (3 * b + 1) * C + c, rest, mask=in_c)
        tl.store(state + (3 * b + 2) * C + c, q, mask=in_c)
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        first = s0  # position of the tile
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
            centred = (value - pivot[:, None]) - rest[:, None]
            tl.store(y + at + offsets, value * sigmoid(centred * centred * q[:, None] + 0.5), mask=mask)
            at += step
            first += BLOCK_S


@triton.jit
def _grad_tile(grad, stride_b, at, offsets, grad_at, grad_offsets, mask, ACC: tl.constexpr):
    if stride_b is not None:
        return tl.load(grad + grad_at + grad_offsets, mask=mask, other=0.0).to(ACC)
    else:
        return tl.load(grad + at + offsets, mask=mask, other=0.0).to(ACC)


@triton.jit
def _backward_pass(
    grad, x, state, dots, squares, grad_x, to_squares, to_dot,
    b, cblk, split, C, S, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads grad and x once. With s the sigmoid, c = x - mean and h = grad x s (1 - s): without grad_x leaves the sums
    of h c and h c^2 of each split, (B, n_split, C); with it reads these and writes grad_x."""
    row = (b * n_split + split) * C
    s0 = (split * blocks).to(tl.int64) * BLOCK_S
    for j in range(tiles):
        c0 = (cblk * tiles + j) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        in_c = c < C
        pivot = tl.load(state + 3 * b * C + c, mask=in_c, other=0.0)
        rest = tl.load(state + (3 * b + 1) * C + c, mask=in_c, other=0.0)
        q = tl.load(state + (3 * b + 2) * C + c, mask=in_c, other=0.0)
        dot = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        square = tl.zeros((BLOCK_C, BLOCK_S), ACC)
        if grad_x is not None:
            all_rows = b * n_split * C
            of_dot = sum_rows(dots + all_rows, n_split, C, c, in_c, BLOCK_ROWS, ACC)
            of_squares = sum_rows(squares + all_rows, n_split, C, c, in_c, BLOCK_ROWS, ACC)
            k = (of_squares * (4.0 * q * q) * to_squares)[:, None]
            shift = (of_dot * (-2.0 * q) * to_dot)[:, None]
        at, offsets, step = tile_at(b, c0, s0, C, S, LAYOUT, BLOCK_C, BLOCK_S)
        grad_at, grad_offsets, grad_step = at, offsets, step
        if stride_b is not None:
            grad_at, grad_offsets, grad_step = strided_tile_at(
                b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C, BLOCK_S
            )
        first = s0  # position of the tile
        for _ in range(blocks):
            mask = in_c[:, None] & inside(first, S, BLOCK_S)[None, :]
            value = tl.load(x + at + offsets, mask=mask, other=0.0).to(ACC)
            dy = _grad_tile(grad, stride_b, at, offsets, grad_at, grad_offsets, mask, ACC)
            centred = (value - pivot[:, None]) - rest[:, None]
            decay = tl.exp(-(centred * centred * q[:, None] + 0.5))
            s = 1.0 / (1.0 + decay)
            h = dy * value * decay * s * s  # 1 - s = decay * s, without cancellation
            if grad_x is not None:
                tl.store(grad_x + at + offsets, dy * s + 2.0 * centred * (q[:, None] * h - k) + shift, mask=mask)
            else:
                h = tl.where(mask, h * centred, 0.0)
                dot += h
                square += h * centred
            at += step
            grad_at += grad_step
            first += BLOCK_S
        if grad_x is None:
            tl.store(dots + row + c, tl.sum(dot, axis=1), mask=in_c)
            tl.store(squares + row + c, tl.sum(square, axis=1), mask=in_c)


@triton.jit(do_not_specialize=SIZES)
def _simam_dots(
    grad, x, state, dots, squares, stride_b, stride_c, stride_s, c_q, s_q, n_cblk, n_split, blocks, tiles,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    _backward_pass(
        grad, x, state, dots, squares, None, None, None, b, cblk, split, C, S, n_split, blocks, tiles,
        stride_b, stride_c, stride_s, LAYOUT, BLOCK_ROWS, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _simam_spread(
    grad, x, state, dots, squares, grad_x, stride_b, stride_c, stride_s, c_q, s_q, n_cblk, n_split, blocks, tiles,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, True)
    one = tl.full((), 1.0, ACC)
    _backward_pass(
        grad, x, state, dots, squares, grad_x, one / tl.maximum(S - 1, 1), one / S,
        b, cblk, split, C, S, n_split, blocks, tiles,
        stride_b, stride_c, stride_s, LAYOUT, BLOCK_ROWS, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


def is_plain(plan: maps.Plan, dtype: torch.dtype) -> bool:
    """Whether the squares of the distances from a channel's first element lose no digits that the map has: at worst,
    where it differs from all others, one in as many as there are positions."""
    return dtype.itemsize == 2 and plan.space <= PLAIN_SPACE


def simam(x: Tensor, e_lambda: float) -> tuple[Tensor, Tensor]:
    x, plan = maps.dense(x)
    y = torch.empty_like(x)
    state = x.new_empty((plan.batch, 3, plan.channels), dtype=maps.accumulator(x.dtype))
    tables = {"means": maps.table(x, plan), "squares": maps.table(x, plan)}
    arguments = plan.arguments(x.dtype)
    plain = is_plain(plan, x.dtype)
    maps.launch(_moments, x, plan.programs, x=x, out=None, PLAIN=plain, **tables, **arguments)
    maps.launch(
        _simam,
        x,
        plan.programs,
        x=x,
        y=y,
        state=state,
        E_LAMBDA=e_lambda,
        BLOCK_ROWS=maps.ROWS_AT_ONCE,
        **tables,
        **arguments,
    )
    return y, state


def simam_backward(grad: Tensor, x: Tensor, state: Tensor) -> Tensor:
    x, plan = maps.dense(x)
    grad_x = torch.empty_like(x)
    grad, strides = maps.gradient(grad, x)
    given = {
        "grad": grad,
        "x": x,
        "state": state.contiguous(),
        "dots": maps.table(x, plan),
        "squares": maps.table(x, plan),
        "BLOCK_ROWS": maps.ROWS_AT_ONCE,
        **strides,
        **plan.arguments(x.dtype),
    }
    maps.launch(_simam_dots, x, plan.programs, **given)
    maps.launch(_simam_spread, x, plan.programs, grad_x=grad_x, **given)
    return grad_x
