"""Where a map's elements lie, and which program works on which of them.

A map (B, C, *spatial) is seen as (B, C, S). Programs work on tiles of BLOCK_C channels x BLOCK_S positions, whose
contiguous axis is the map's; of small maps in NCHW, whose rows are short and begin anywhere, a tile may be FLAT: the
16-byte vectors of BLOCK_C whole channels, one contiguous run of BLOCK_S elements at most. C and S reach a kernel as
`c_q * CV` and `s_q * SV`, CV and SV being the largest powers of two that a 16-byte load can use, so that the compiler
sees the alignment of rows that are no multiple of 16.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..codes import POOLS, TIES
from . import replay

NCHW, CHANNELS_LAST, FLAT = (tl.constexpr(i) for i in range(3))

#: Integer arguments that must not make a new variant of a kernel when they are 1 or a multiple of 16.
SIZES = (
    *(
        "c_q",
        "s_q",
        "h_q",
        "n_cblk",
        "n_split",
        "blocks",
        "tiles",
        "s_blocks",
        "n_part",
        "n_rows",
        "affine_rows",
        "width",
        "pool_split",
    ),
    *("B", "C", "S", "D", "H", "W", "taps", "n_taps"),
)


@triton.jit
def locate(n_cblk, n_split, LAYOUT: tl.constexpr, REVERSE: tl.constexpr):
    """(sample, channel block, split) of this program, in the order of memory.

    A second pass runs in REVERSE: what the first pass read last is still in the L2 cache.
    """
    pid = tl.program_id(0)
    if REVERSE:
        pid = tl.num_programs(0) - 1 - pid
    if LAYOUT == FLAT:  # space is never split
        b = pid // n_cblk
        return b.to(tl.int64), pid - b * n_cblk, tl.full((), 0, tl.int32)
    elif LAYOUT == CHANNELS_LAST:
        return (pid // (n_cblk * n_split)).to(tl.int64), pid % n_cblk, pid // n_cblk % n_split
    else:
        return (pid // (n_cblk * n_split)).to(tl.int64), pid // n_split % n_cblk, pid % n_split


@triton.jit
def tile_at(b, c0, s0, C, S, LAYOUT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """(64-bit offset of a tile's first element, offsets within the tile, step to the next tile along space)."""
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    if LAYOUT == CHANNELS_LAST:
        return (b * S + s0) * C + c0, c + s * C, (BLOCK_S * C).to(tl.int64)
    else:
        return (b * C + c0) * S + s0, c * S + s, tl.full((), BLOCK_S, tl.int64)


@triton.jit
def flat_rows(c0, C, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """The vectors of a FLAT tile: (channel in which each begins, whether it exists, whether the next channel begins in
    it too, how many of its elements at most are the first channel's, position of its first element there)."""
    begin = tl.arange(0, BLOCK_S // VECTOR) * VECTOR
    k = ((begin + 0.5) * (1.0 / S)).to(tl.int32)  # begin // S: exact, for so few elements
    edge = (k + 1) * S - begin
    exists = begin < tl.minimum(C - c0, BLOCK_C) * S
    return c0 + k, exists, exists & (edge < VECTOR), edge, begin - k * S


@triton.jit
def firsts(edge, VECTOR: tl.constexpr):
    """Which elements are the first channel's."""
    return tl.arange(0, VECTOR)[None, :] < edge[:, None]


@triton.jit
def flat_tile_at(b, c0, C, S, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """tile_at for a FLAT tile, which has no next one."""
    vectors = tl.arange(0, BLOCK_S // VECTOR)[:, None] * VECTOR
    return b * (C * S) + c0 * S, vectors + tl.arange(0, VECTOR)[None, :], tl.full((), 0, tl.int64)


@triton.jit
def flat_parts(pairs, S, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, VECTOR: tl.constexpr):
    """What a FLAT tile's vectors have for each of its channels, (vectors of one, channels), and which of that exists.

    pairs: each vector's number for the channel in which it begins, and for the next.
    """
    CHANNELS: tl.constexpr = triton.next_power_of_2(BLOCK_C)
    VECTORS: tl.constexpr = triton.next_power_of_2(BLOCK_S // BLOCK_C // VECTOR + 2)
    k, i = tl.arange(0, CHANNELS)[None, :], tl.arange(0, VECTORS)[:, None]
    shift: tl.constexpr = 1 if VECTOR == 2 else 2 if VECTOR == 4 else 3
    begin = tl.minimum(k, BLOCK_C - 1) * S
    at = (begin >> shift) + i
    exists = (at * VECTOR < begin + S) & (k < BLOCK_C)
    index = 2 * at + ((i == 0) & (begin % VECTOR != 0)).to(tl.int32)
    if (BLOCK_C - 1) * (BLOCK_S // BLOCK_C) // VECTOR + VECTORS > BLOCK_S // VECTOR:  # it may lie behind them all
        index = tl.where(exists, index, 0)
    parts = tl.gather(tl.reshape(pairs, (2 * (BLOCK_S // VECTOR),)), tl.reshape(index, (VECTORS * CHANNELS,)), 0)
    return tl.reshape(parts, (VECTORS, CHANNELS)), exists


@triton.jit
def strided_tile_at(b, c0, s0, stride_b, stride_c, stride_s, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """tile_at for any strides."""
    c = tl.arange(0, BLOCK_C)[:, None].to(tl.int64)
    s = tl.arange(0, BLOCK_S)[None, :].to(tl.int64)
    first = b * stride_b + c0.to(tl.int64) * stride_c + s0.to(tl.int64) * stride_s
    return first, c * stride_c + s * stride_s, tl.full((), BLOCK_S, tl.int64) * stride_s


@triton.jit
def channels_of(cblk, tiles, C, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_K channels from a program's first one on, which of them are its own)."""
    k = tl.arange(0, BLOCK_K)
    c = cblk * tiles * BLOCK_C + k
    return c, (k < tiles * BLOCK_C) & (c < C)


class Plan(NamedTuple):
    """Programs over (sample, block of channels, split of space), each looping over `tiles` tiles of its channels and
    `blocks` of its space.

    The batch decides how many tiles a program has, not what is compiled: a batch never seen before runs at once.
    """

    batch: int
    channels: int
    space: int
    layout: int
    block_k: int  # channels a program, at most
    block_c: int  # channels a tile
    block_s: int  # positions a tile
    n_cblk: int
    n_split: int
    blocks: int
    tiles: int
    lane: int  # elements a thread

    @property
    def programs(self) -> int:
        return self.batch * self.n_cblk * self.n_split

    @property
    def parts(self) -> int:
        """Programs, so rows of partial results, a sample."""
        return self.n_cblk * self.n_split

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The arguments that every kernel with passes over a map takes."""
        cv, sv = vector_of(self.channels, dtype), vector_of(max(self.space, 1), dtype)
        tile = self.block_s if self.layout == FLAT.value else self.block_c * self.block_s
        return {
            "c_q": self.channels // cv,
            "s_q": self.space // sv,
            "n_cblk": self.n_cblk,
            "n_split": self.n_split,
            "blocks": self.blocks,
            "tiles": self.tiles,
            "CV": cv,
            "SV": sv,
            "LAYOUT": self.layout,
            "BLOCK_C": self.block_c,
            "BLOCK_S": self.block_s,
            "ACC": triton_accumulator(dtype),
            "num_warps": min(max(tile // (32 * self.lane), 1), 4),
        }


def vector_of(size: int, dtype: torch.dtype) -> int:
    """The largest power of two that divides a size and that a 16-byte load can use."""
    return math.gcd(size, 16 // dtype.itemsize)


# A thread has two 16-byte loads of each tensor in flight, or four elements where each is a load of its own (its address
# takes two registers).
LANE_BYTES, LANE_ALONE = 32, 4
THREADS = 128
FLAT_LANE_BYTES = 64  # likewise of a FLAT tile, of which a program has one
LONG_ROW = 2**26  # offsets within a tile have 32 bits
# Programs a multiprocessor that a launch aims at, and at most for one sample: each of a sample's programs sums what
# all of them left (parts x hidden numbers), which must stay small beside the map.
PROGRAMS_PER_SM = 8
PARTS_PER_SM = 2
CHANNELS_A_PROGRAM = 64
CHANNELS_A_POOL = 256  # where channels are what is reduced
USUAL_BATCH = 8  # tiles that are reduced over channels are as long in space as this many samples allow
ROWS_AT_ONCE = 16  # of partial results


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def multiprocessors(device: torch.device) -> int:
    """Of the GPU; few for the interpreter, which runs programs one by one; an H100's for what is only compiled."""
    if device.type == "cuda":
        return _multiprocessors(device.index)
    return 4 if device.type == "cpu" else 132


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _width(size: int, widest: int, narrowest: int) -> int:
    """The widest power of two that covers `size` with at most 15 % idle lanes, else the least idle one."""
    widest = min(widest, next_power_of_2(size))
    widths = [1 << i for i in range(widest.bit_length() - 1, min(narrowest, widest).bit_length() - 2, -1)]
    covered = {w: triton.cdiv(size, w) * w for w in widths}
    return next((w for w in widths if covered[w] <= 1.15 * size), min(widths, key=lambda w: (covered[w], -w)))


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int,
    channels: int,
    space: int,
    layout: int,
    itemsize: int,
    sms: int,
    lane_bytes: int = LANE_BYTES,
    most_channels: int = CHANNELS_A_PROGRAM,
) -> Plan:
    """Tiles and programs for a map.

    Rows of a tile are 128 to 512 bytes along the contiguous axis where the map has them; small maps take many channels
    a tile and several tiles a program. Few samples: fewer channels a program, space split.
    `lane_bytes`: of a tile, for each thread; `most_channels`: of a program, where a tile has no more.
    """
    size, wanted = max(space, 1), PROGRAMS_PER_SM // 2 * sms
    contiguous = channels if layout == CHANNELS_LAST.value else size
    lane = lane_bytes // itemsize
    if contiguous * itemsize % 8 != 0:
        lane = min(lane, LANE_ALONE)
    tile = lane * THREADS
    if layout == CHANNELS_LAST.value:
        block_c = _width(channels, max(256 // itemsize, 1), 32 // itemsize)
        block_s = min(next_power_of_2(size), tile // block_c)
    else:
        block_s = _width(size, min(512, tile), 64)
        block_c = 1 if size >= LONG_ROW else min(next_power_of_2(channels), tile // block_s)
    s_blocks = triton.cdiv(size, block_s)
    block_k, tiles = block_c, 1
    while block_k < min(most_channels, channels):
        block_k *= 2
    # Along space a sum goes on from tile to tile; a further tile of channels begins a new one.
    while tiles * block_c < block_k and batch * triton.cdiv(channels, 2 * tiles * block_c) >= wanted:
        tiles *= 2
    n_cblk = triton.cdiv(channels, tiles * block_c)
    programs = min(PROGRAMS_PER_SM * sms // max(batch, 1), PARTS_PER_SM * sms)
    blocks = triton.cdiv(s_blocks, min(max(programs // max(n_cblk, 1), 1), s_blocks))
    n_split = triton.cdiv(s_blocks, blocks)
    return Plan(batch, channels, space, layout, block_k, block_c, block_s, n_cblk, n_split, blocks, tiles, lane)


@functools.lru_cache(maxsize=4096)
def flat_plan(batch: int, channels: int, space: int, itemsize: int, lane_bytes: int = FLAT_LANE_BYTES) -> Plan | None:
    """A plan of FLAT tiles, None where a map has no use for them or cannot have them: its rows begin at any address but
    its samples at multiples of 16 bytes, and no vector lies in three channels."""
    vector = 16 // itemsize
    if space % vector == 0 or space < vector or channels * space % vector != 0:
        return None
    lane = lane_bytes // itemsize
    block_s, unit = min(lane * THREADS, next_power_of_2(channels * space)), vector // math.gcd(space, vector)
    most = min(block_s // space, next_power_of_2(channels))
    coarse = max(1 << max(most.bit_length() - 3, 0), unit)  # so that few kernels serve maps of all sizes
    block_c = most // coarse * coarse
    if block_c == 0:
        return None
    n_cblk, block_k = triton.cdiv(channels, block_c), next_power_of_2(block_c)
    return Plan(batch, channels, space, FLAT.value, block_k, block_c, block_s, n_cblk, 1, 1, 1, lane)


@functools.lru_cache(maxsize=4096)
def _plan_over_channels(plan: Plan, sms: int) -> Plan:
    size, wanted = max(plan.space, 1), 2 * sms
    block_c, block_s = plan.block_c, plan.block_s
    block_k = max(min(next_power_of_2(plan.channels), CHANNELS_A_POOL), block_c)
    fewest = min(block_k, max(block_c, CHANNELS_A_PROGRAM))
    least_s = 64 if plan.layout == NCHW.value else 4
    while block_s > least_s and USUAL_BATCH * triton.cdiv(plan.channels, block_k) * triton.cdiv(size, block_s) < wanted:
        block_s //= 2
    if size < LONG_ROW:
        block_c = max(min(block_k, plan.lane * THREADS // block_s), 1)  # tiles stay as large as they were
    s_blocks, tiles = triton.cdiv(size, block_s), block_k // block_c
    while (
        tiles * block_c > max(fewest, block_c)
        and plan.batch * triton.cdiv(plan.channels, tiles * block_c) * s_blocks < wanted
    ):
        tiles //= 2
    n_cblk = triton.cdiv(plan.channels, tiles * block_c)
    blocks = triton.cdiv(s_blocks, min(max(PROGRAMS_PER_SM * sms // max(plan.batch * n_cblk, 1), 1), s_blocks))
    return plan._replace(
        block_k=block_k,
        block_c=block_c,
        block_s=block_s,
        n_cblk=n_cblk,
        n_split=triton.cdiv(s_blocks, blocks),
        blocks=blocks,
        tiles=tiles,
    )


def plan_over_channels(x: Tensor, plan: Plan) -> Plan:
    """A plan for passes that reduce over channels: as many channels a program as may be, split along space first."""
    return _plan_over_channels(plan, multiprocessors(x.device))


def rows_of_channels(plan: Plan) -> int:
    """How many blocks of channels' partial results are read at once, of however many a batch makes."""
    fewest = min(plan.block_k, max(plan.block_c, CHANNELS_A_PROGRAM))
    return min(next_power_of_2(triton.cdiv(plan.channels, fewest)), 8)


def dense(
    x: Tensor, may_be_flat: bool = False, lane_bytes: int = LANE_BYTES, flat_lane_bytes: int = FLAT_LANE_BYTES
) -> tuple[Tensor, Plan]:
    """x, copied to NCHW where it is neither that nor channels_last, and the plan for it."""
    space = x.shape[2:].numel()
    if x.is_contiguous():
        layout = CHANNELS_LAST if space == 1 else NCHW  # of a 1 x 1 map the channels are the contiguous axis
    elif x.movedim(1, -1).is_contiguous():
        layout = CHANNELS_LAST
    else:
        x, layout = x.contiguous(), NCHW
    if may_be_flat and layout is NCHW:
        flat = flat_plan(x.shape[0], x.shape[1], space, x.element_size(), flat_lane_bytes)
        if flat is not None:
            return x, flat
    sms = multiprocessors(x.device)
    return x, plan(x.shape[0], x.shape[1], space, layout.value, x.element_size(), sms, lane_bytes)


def _lies_as(t: Tensor, x: Tensor) -> bool:
    """Whether two maps of one shape have the same strides wherever these count: one sample may have any."""
    return all(size == 1 or a == b for size, a, b in zip(x.shape, t.stride(), x.stride(), strict=True))


def as_map(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t in the memory order of the dense map x; copied where it has another."""
    if t is None or _lies_as(t, x):
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def _collapsed(t: Tensor) -> tuple[int, int, int] | None:
    """(batch, channel, space) strides where the spatial axes can be walked with one stride, else None."""
    step, expected = None, 0
    for size, stride in zip(reversed(t.shape[2:]), reversed(t.stride()[2:]), strict=True):
        if size == 1:
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return t.stride(0), t.stride(1), 1 if step is None else step


def gradient(grad: Tensor | None, x: Tensor) -> tuple[Tensor | None, dict[str, int | None]]:
    """(grad, its strides as kernel arguments, None: as x lies); copied where its spatial axes do not collapse."""
    found = None if grad is None or _lies_as(grad, x) else _collapsed(grad)
    if found is None:
        grad, found = as_map(grad, x), (None, None, None)
    return grad, dict(zip(("stride_b", "stride_c", "stride_s"), found, strict=True))


def row(t: Tensor | None) -> Tensor | None:
    """A small tensor as kernels read it."""
    return None if t is None else t.contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def table(x: Tensor, plan: Plan) -> Tensor:
    """Room for one partial sum a channel and program."""
    return x.new_empty((plan.batch, plan.n_split, plan.channels), dtype=accumulator(x.dtype))


def pool_tables(x: Tensor, plan: Plan, pool: int) -> dict[str, Tensor | None]:
    """What pool_pass leaves."""
    best = None if pool == POOLS["avg"] else table(x, plan)
    return {
        "sums": None if pool == POOLS["max"] else table(x, plan),
        "best": best,
        "place": None if best is None else torch.empty_like(best, dtype=torch.int32),
    }


def channel_table(x: Tensor, plan: Plan) -> Tensor:
    """Room for one partial sum a position and block of channels."""
    return x.new_empty((plan.batch, plan.n_cblk, max(plan.space, 0)), dtype=accumulator(x.dtype))


def channel_pool_tables(x: Tensor, plan: Plan) -> dict[str, Tensor]:
    """What channel_pool_pass leaves."""
    best = channel_table(x, plan)
    return {"sums": torch.empty_like(best), "best": best, "place": torch.empty_like(best, dtype=torch.int32)}


def affine_tables(x: Tensor, plan: Plan, affine_weight: Tensor | None) -> dict[str, Tensor | None]:
    """What backward_pass leaves of the prologue's gradients."""
    return {name: None if affine_weight is None else table(x, plan) for name in ("weight_sums", "bias_sums")}


def affine_gradients(
    sums: dict[str, Tensor | None], affine_weight: Tensor | None, affine_bias: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor]:
    if affine_weight is None:
        return x.new_empty(0), x.new_empty(0)
    return (
        sums["weight_sums"].sum((0, 1)).to(affine_weight.dtype),
        sums["bias_sums"].sum((0, 1)).to(affine_bias.dtype),
    )


def exact(ties: int, pool: int = POOLS["max"]) -> dict[str, bool]:
    """Launch options under which a value computed in two kernels has the same bits: shared ties compare them."""
    return {"enable_fp_fusion": False} if pool != POOLS["avg"] and ties == TIES["even"] else {}


def launch(kernel, on: Tensor, programs: int, /, **arguments: Any) -> None:
    """Run a kernel over a one-dimensional grid, on the device of `on` and its current stream."""
    if programs == 0:
        return
    with torch.cuda.device_of(on) if on.is_cuda else contextlib.nullcontext():
        compiled = kernel[(programs,)](**arguments)
    replay.launched(kernel, compiled, programs, arguments)


def launch_where(there: bool, kernel, on: Tensor, programs: int, /, **arguments: Any) -> None:
    """`launch` where there is something to do for this batch; elsewhere compile what another batch will launch."""
    if there:
        launch(kernel, on, programs, **arguments)
    elif isinstance(kernel, triton.JITFunction):
        with torch.cuda.device_of(on) if on.is_cuda else contextlib.nullcontext():
            kernel.warmup(grid=(1,), **arguments)
