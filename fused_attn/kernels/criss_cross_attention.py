"""Op `criss_cross_attention`: two launches. Along columns: reads query, key and value, writes the sum of values.
Along rows: reads them again and that sum, goes on with the softmax where the columns ended, writes the result.
Backward: reads grad and the result for a number a position; then two launches, which read query, key, value and grad
and write all three gradients, the second those of rows added to what it reads of the first's.

A program has a block of a line's positions and a tile of the channels that it writes. It goes along the line block by
block, so a line of more than one block is read once for each, from the cache. On chip are the products of two blocks
and the tile's sums: the weights are made again for each tile of channels and never written. Positions that follow each
other down a column are whole pixels only with channels last: an NCHW map is copied to that order first, results are
written in their own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.common import empty_map, is_channels_last
from ..reference.layout import laid
from . import maps
from .language import IDENTITY
from .maps import CHANNELS_LAST, NCHW, SIZES, locate
from .space import channel_dot_pass

CROSS_SIZES = (*SIZES, "d_q", "e_q", "w_q", "d_tiles", "e_tiles")
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -infinity: a column may have nothing but its position itself


@triton.jit
def _in_block(first, length, BLOCK: tl.constexpr):
    return tl.arange(0, BLOCK) < tl.minimum(length - first, BLOCK)


@triton.jit
def _first_of(line, first, W, COLUMNS: tl.constexpr):
    """Where in a sample's positions a block of a line begins."""
    return first * W + line if COLUMNS else line * W + first


@triton.jit
def _numbers_at(line, first, H, W, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(where a block of positions lies in a sample's row of numbers, which of them are in the line)."""
    step = W if COLUMNS else 1
    at = _first_of(line, first, W, COLUMNS) + tl.arange(0, BLOCK) * step
    return at, _in_block(first, H if COLUMNS else W, BLOCK)


@triton.jit
def _tile_at(
    b, line, first, c0, C, H, W, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(64-bit offset of a tile's first element, offsets within the tile, which of them are in the map): positions by
    channels, in 64 bits."""
    p, c = tl.arange(0, BLOCK)[:, None].to(tl.int64), tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    mask = _in_block(first, H if COLUMNS else W, BLOCK)[:, None] & _in_block(c0, C, BLOCK_C)[None, :]
    if COLUMNS:
        p = p * W
    S = H * W
    position = _first_of(line, first, W, COLUMNS)
    if LAYOUT == CHANNELS_LAST:
        return (b * S + position) * C + c0, p * C + c, mask
    else:
        return (b * C + c0) * S + position, p + c * S, mask


@triton.jit
def _load(
    x, b, line, first, c0, C, H, W, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of a map whose channels are last, 0 beside it."""
    at, offsets, mask = _tile_at(b, line, first, c0, C, H, W, CHANNELS_LAST, COLUMNS, BLOCK, BLOCK_C)
    return tl.load(x + at + offsets, mask=mask, other=0.0)


@triton.jit
def _pairs(first, far, length, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Which positions, of a block from `far` on, those of a block from `first` on are paired with."""
    pairs = _in_block(far, length, BLOCK)[None, :]
    if COLUMNS:
        pairs &= first + tl.arange(0, BLOCK)[:, None] != far + tl.arange(0, BLOCK)[None, :]
    return pairs


@triton.jit
def _add_product(sums, left, right, DOT: tl.constexpr, ACC: tl.constexpr):
    return tl.dot(left.to(DOT), right.to(DOT), sums, input_precision="ieee", out_dtype=ACC)


@triton.jit
def _product_of(left, right, DOT: tl.constexpr, ACC: tl.constexpr):
    """Of two tiles of positions by channels, summed over these."""
    sums = tl.zeros((left.shape[0], right.shape[0]), ACC)
    return _add_product(sums, left, tl.trans(right), DOT, ACC)


@triton.jit
def _products(
    near, other, b, line, first, far, C, H, W,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same of a block of one map and a block of the other, over all their tiles."""
    sums = tl.zeros((BLOCK, BLOCK), ACC)
    for c0 in range(0, C, BLOCK_C):
        left = _load(near, b, line, first, c0, C, H, W, COLUMNS, BLOCK, BLOCK_C)
        right = _load(other, b, line, far, c0, C, H, W, COLUMNS, BLOCK, BLOCK_C)
        sums = _add_product(sums, left, tl.trans(right), DOT, ACC)
    return sums


@triton.jit
def _place(tiles, H, W, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(sample, line, first position in it, tile) of this program: tiles of a block, and blocks of a line, follow each
    other and find in the cache what those before them read."""
    lines, length = W if COLUMNS else H, H if COLUMNS else W
    blocks = tl.cdiv(length, BLOCK)
    pid = tl.program_id(0)
    b = (pid // (tiles * blocks * lines)).to(tl.int64)
    return b, pid // (tiles * blocks) % lines, pid // tiles % blocks * BLOCK, pid % tiles


@triton.jit(do_not_specialize=CROSS_SIZES)
def _cross(
    query, key, value, sums, found, out, state, d_q, e_q, H, w_q, e_tiles,
    WHOLE: tl.constexpr, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr,
    DV: tl.constexpr, EV: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Columns: writes the sums of values and each position's (peak, sum). Rows: reads these, `sums` and `found`, and
    writes the means, LAYOUT being theirs, and each position's (peak, 1 / sum)."""
    D, E, W = d_q * DV, e_q * EV, w_q * WV
    length = H if COLUMNS else W
    b, line, first, tile = _place(e_tiles, H, W, COLUMNS, BLOCK)
    c0 = tile * BLOCK_E
    place, in_line = _numbers_at(line, first, H, W, COLUMNS, BLOCK)
    at = b * 2 * H * W
    if COLUMNS:
        total = tl.zeros((BLOCK,), ACC)
        peak = tl.full((BLOCK,), LOWEST, ACC)
        summed = tl.zeros((BLOCK, BLOCK_E), ACC)
    else:
        peak = tl.load(found + at + place, mask=in_line, other=0.0)
        total = tl.load(found + at + H * W + place, mask=in_line, other=0.0)
        summed = _load(sums, b, line, first, c0, E, H, W, COLUMNS, BLOCK, BLOCK_E)
    if WHOLE:
        queries = _load(query, b, line, first, 0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
    for far in range(0, length, BLOCK):
        if WHOLE:
            keys = _load(key, b, line, far, 0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
            score = _product_of(queries, keys, DOT, ACC)
        else:
            score = _products(query, key, b, line, first, far, D, H, W, COLUMNS, BLOCK, BLOCK_D, DOT, ACC)
        score = tl.where(_pairs(first, far, length, COLUMNS, BLOCK), score, float("-inf"))
        larger = tl.maximum(peak, tl.max(score, axis=1))
        share, power = tl.exp(peak - larger), tl.exp(score - larger[:, None])
        total = total * share + tl.sum(power, axis=1)
        values = _load(value, b, line, far, c0, E, H, W, COLUMNS, BLOCK, BLOCK_E)
        summed = _add_product(summed * share[:, None], power, values, DOT, ACC)
        peak = larger
    if not COLUMNS:
        total = 1.0 / total
        summed *= total[:, None]
    out_at, offsets, mask = _tile_at(b, line, first, c0, E, H, W, LAYOUT, COLUMNS, BLOCK, BLOCK_E)
    tl.store(out + out_at + offsets, summed, mask=mask)
    if tile == 0:
        tl.store(state + at + place, peak, mask=in_line)
        tl.store(state + at + H * W + place, total, mask=in_line)


@triton.jit(do_not_specialize=SIZES)
def _cross_dots(
    grad, out, dots, c_q, s_q, n_cblk, n_split, blocks, tiles, stride_b, stride_c, stride_s,
    CV: tl.constexpr, SV: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reads the gradient and the result once, writes a number a position."""
    C, S = c_q * CV, s_q * SV
    b, cblk, split = locate(n_cblk, n_split, LAYOUT, False)
    channel_dot_pass(
        grad, out, None, None, None, None, None, None, None, dots,
        b, cblk, split, C, S, n_cblk, blocks, tiles, stride_b, stride_c, stride_s,
        IDENTITY, IDENTITY, IDENTITY, IDENTITY, LAYOUT, BLOCK_C, BLOCK_S, ACC,
    )  # fmt: skip


@triton.jit
def _weights(
    score, state, b, line, at, H, W, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The softmax, made again from the scores and what is known of the queries from `at` on; AXIS: what the queries do
    not lie along."""
    place, in_line = _numbers_at(line, at, H, W, COLUMNS, BLOCK)
    state += b * 2 * H * W
    peak = tl.load(state + place, mask=in_line, other=0.0)
    inverse = tl.load(state + H * W + place, mask=in_line, other=0.0)
    return tl.exp(score - tl.expand_dims(peak, AXIS)) * tl.expand_dims(inverse, AXIS)


@triton.jit
def _store_gradient(
    summed, sums, result, b, line, first, c0, C, H, W, LAYOUT: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if not COLUMNS:
        summed += _load(sums, b, line, first, c0, C, H, W, COLUMNS, BLOCK, BLOCK_C)
    at, offsets, mask = _tile_at(b, line, first, c0, C, H, W, LAYOUT, COLUMNS, BLOCK, BLOCK_C)
    tl.store(result + at + offsets, summed, mask=mask)


@triton.jit
def _through_scores(
    near, other, of_near, of_other, state, dots, sums, result, b, line, first, c0, D, E, H, W,
    OF_QUERY: tl.constexpr, WHOLE: tl.constexpr, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block's gradient of the query, `near` being it, `of_near` grad, the others key and value; or of the key."""
    length = H if COLUMNS else W
    AXIS: tl.constexpr = 1 if OF_QUERY else 0
    summed = tl.zeros((BLOCK, BLOCK_D), ACC)
    if WHOLE:
        own = _load(near, b, line, first, 0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
    for far in range(0, length, BLOCK):
        others = _load(other, b, line, far, c0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
        if WHOLE:
            score = _product_of(own, others, DOT, ACC)
        else:
            score = _products(near, other, b, line, first, far, D, H, W, COLUMNS, BLOCK, BLOCK_D, DOT, ACC)
        slope = _products(of_near, of_other, b, line, first, far, E, H, W, COLUMNS, BLOCK, BLOCK_E, DOT, ACC)
        queries = first if OF_QUERY else far
        place, in_line = _numbers_at(line, queries, H, W, COLUMNS, BLOCK)
        slope -= tl.expand_dims(tl.load(dots + b * H * W + place, mask=in_line, other=0.0), AXIS)
        slope *= _weights(score, state, b, line, queries, H, W, COLUMNS, BLOCK, AXIS)
        slope = tl.where(_pairs(first, far, length, COLUMNS, BLOCK), slope, 0.0)
        summed = _add_product(summed, slope, others, DOT, ACC)
    _store_gradient(summed, sums, result, b, line, first, c0, D, H, W, LAYOUT, COLUMNS, BLOCK, BLOCK_D)


@triton.jit
def _of_value(
    grad, query, key, state, sums, result, b, line, first, c0, D, E, H, W,
    WHOLE: tl.constexpr, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A block's gradient of the value."""
    length = H if COLUMNS else W
    summed = tl.zeros((BLOCK, BLOCK_E), ACC)
    if WHOLE:
        keys = _load(key, b, line, first, 0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
    for far in range(0, length, BLOCK):
        if WHOLE:
            queries = _load(query, b, line, far, 0, D, H, W, COLUMNS, BLOCK, BLOCK_D)
            score = _product_of(keys, queries, DOT, ACC)
        else:
            score = _products(key, query, b, line, first, far, D, H, W, COLUMNS, BLOCK, BLOCK_D, DOT, ACC)
        weight = _weights(score, state, b, line, far, H, W, COLUMNS, BLOCK, 0)
        weight = tl.where(_pairs(first, far, length, COLUMNS, BLOCK), weight, 0.0)
        grads = _load(grad, b, line, far, c0, E, H, W, COLUMNS, BLOCK, BLOCK_E)
        summed = _add_product(summed, weight, grads, DOT, ACC)
    _store_gradient(summed, sums, result, b, line, first, c0, E, H, W, LAYOUT, COLUMNS, BLOCK, BLOCK_E)


@triton.jit(do_not_specialize=CROSS_SIZES)
def _cross_backward(
    grad, query, key, value, state, dots, query_sums, key_sums, value_sums, grad_query, grad_key, grad_value,
    d_q, e_q, H, w_q, d_tiles, e_tiles,
    QUERY_LAYOUT: tl.constexpr, KEY_LAYOUT: tl.constexpr, VALUE_LAYOUT: tl.constexpr,
    WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
    DV: tl.constexpr, EV: tl.constexpr, WV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program has a block's gradient of the query, of the key or of the value, in a tile of channels. The first two
    pass over query, key, value and grad, the last over query, key and grad. Columns write sums; rows add theirs."""
    D, E, W = d_q * DV, e_q * EV, w_q * WV
    b, line, first, tile = _place(2 * d_tiles + e_tiles, H, W, COLUMNS, BLOCK)
    if tile < d_tiles:
        _through_scores(
            query, key, grad, value, state, dots, query_sums, grad_query, b, line, first, tile * BLOCK_D, D, E, H, W,
            True, WHOLE, QUERY_LAYOUT, COLUMNS, BLOCK, BLOCK_D, BLOCK_E, DOT, ACC,
        )  # fmt: skip
    elif tile < 2 * d_tiles:
        _through_scores(
            key, query, value, grad, state, dots, key_sums, grad_key, b, line, first, (tile - d_tiles) * BLOCK_D,
            D, E, H, W, False, WHOLE, KEY_LAYOUT, COLUMNS, BLOCK, BLOCK_D, BLOCK_E, DOT, ACC,
        )  # fmt: skip
    else:
        _of_value(
            grad, query, key, state, value_sums, grad_value, b, line, first, (tile - 2 * d_tiles) * BLOCK_E,
            D, E, H, W, WHOLE, VALUE_LAYOUT, COLUMNS, BLOCK, BLOCK_D, BLOCK_E, DOT, ACC,
        )  # fmt: skip


# ---- which program works on what ----


def _layout(t: Tensor) -> int:
    """Of a dense map."""
    return (CHANNELS_LAST if is_channels_last(t) else NCHW).value


def _pixels(t: Tensor) -> Tensor:
    """The map with its channels last in memory; copied where it has another order."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _sums(result: Tensor, dtype: torch.dtype) -> Tensor:
    """Where columns leave what rows add to: the result itself where its order and dtype are those of the sums."""
    if result.dtype == dtype and is_channels_last(result):
        return result
    batch, channels, *space = result.shape
    return result.new_empty((batch, *space, channels), dtype=dtype).movedim(-1, 1)


#: What products are taken of; the interpreter has none of bfloat16.
TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
#: Of an element's size: positions a block, channels a tile of query and key, of the value.
TILES = {2: (32, 64, 64), 4: (32, 32, 64), 8: (16, 16, 32)}
WARPS = 4


def _arguments(query: Tensor, value: Tensor, columns: bool) -> tuple[dict, int]:
    """(what a launch along columns or rows takes but its tensors and counts of tiles, its programs a tile)."""
    (batch, depth, height, width), channels = query.shape, value.shape[1]
    length, lines = (height, width) if columns else (width, height)
    size = value.element_size()
    dv, ev, wv = (math.gcd(n, 16 // size) for n in (depth, channels, width))
    most = TILES[size]
    sizes = (length, depth, channels)
    block, block_d, block_e = (max(min(maps.next_power_of_2(n), m), 16) for n, m in zip(sizes, most, strict=True))
    arguments = {
        "d_q": depth // dv,
        "e_q": channels // ev,
        "H": height,
        "w_q": width // wv,
        "WHOLE": 0 < depth <= block_d,
        "COLUMNS": columns,
        "DV": dv,
        "EV": ev,
        "WV": wv,
        "BLOCK": block,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "DOT": tl.float32 if value.device.type == "cpu" and value.dtype == torch.bfloat16 else TYPES[value.dtype],
        "ACC": maps.triton_accumulator(value.dtype),
        "num_warps": WARPS,
        "num_stages": 2,
    }
    return arguments, batch * lines * triton.cdiv(length, block)


def relayout(x: Tensor, channels_last: int) -> Tensor:
    return laid(x, channels_last)


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    dtype, (batch, channels, *space) = maps.accumulator(value.dtype), value.shape
    out = empty_map(value)
    state = value.new_empty((batch, 2, math.prod(space)), dtype=dtype)
    if out.numel() == 0:
        return out, state.zero_()
    query, key, value = _pixels(query), _pixels(key), _pixels(value)
    sums, found = _sums(out, dtype), torch.empty_like(state)
    for columns in (True, False):
        arguments, programs = _arguments(query, value, columns)
        e_tiles = triton.cdiv(channels, arguments["BLOCK_E"])
        maps.launch(
            _cross,
            value,
            programs * e_tiles,
            query=query,
            key=key,
            value=value,
            sums=None if columns else sums,
            found=None if columns else found,
            out=sums if columns else out,
            state=found if columns else state,
            e_tiles=e_tiles,
            LAYOUT=_layout(sums if columns else out),
            **arguments,
        )
    return out, state


def _dots(grad: Tensor, out: Tensor) -> Tensor:
    """Each position's product of the two, (B, 1, H * W)."""
    out, plan = maps.dense(out)
    plan = maps.plan_over_channels(out, plan)
    tiles = triton.cdiv(plan.channels, plan.block_c)
    plan = plan._replace(tiles=tiles, n_cblk=1)
    dots, (grad, strides) = maps.channel_table(out, plan), maps.gradient(grad, out)
    maps.launch(_cross_dots, out, plan.programs, grad=grad, out=out, dots=dots, **strides, **plan.arguments(out.dtype))
    return dots


def criss_cross_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    results = empty_map(query), empty_map(key), empty_map(value)
    if out.numel() == 0:
        return tuple(result.zero_() for result in results)
    dtype, dots = maps.accumulator(out.dtype), _dots(grad, out)
    sums = [_sums(result, dtype) for result in results]
    grad, query, key, value = (_pixels(t) for t in (grad, query, key, value))
    for columns in (True, False):
        arguments, programs = _arguments(query, value, columns)
        d_tiles = triton.cdiv(query.shape[1], arguments["BLOCK_D"])
        e_tiles = triton.cdiv(value.shape[1], arguments["BLOCK_E"])
        for name, of_columns, result in zip(("query", "key", "value"), sums, results, strict=True):
            written = of_columns if columns else result
            arguments |= {f"{name}_sums": None if columns else of_columns, f"grad_{name}": written}
            arguments[f"{name.upper()}_LAYOUT"] = _layout(written)
        maps.launch(
            _cross_backward,
            value,
            programs * (2 * d_tiles + e_tiles),
            grad=grad,
            query=query,
            key=key,
            value=value,
            state=state.contiguous(),
            dots=dots,
            d_tiles=d_tiles,
            e_tiles=e_tiles,
            **arguments,
        )
    return results
