"""An estimate of a launch's time on an H100 from what its warps execute; no card has confirmed it yet.

The time is the largest of five, each of the multiprocessor that has the most programs:

- memory: the bytes of the maps, each tensor read or written once, and of whatever else is touched, at 90 % of the
  speed of a copy. 90 % is what published kernels of this kind reach: quack's softmax moves 3.01 TB/s of an H100's 3.35
  (github.com/Dao-AILab/quack, its blog post on memory-bound kernels), where a copy moves 3.0 to 3.1.
- cache: all sectors of 32 bytes that are asked for, at L2's 5.5 TB/s (Chips and Cheese's measurement of an H100 PCIe,
  which quack's notes put at 5 to 10 for the SXM card).
- units: the requests' wavefronts of 128 bytes, one a cycle and multiprocessor.
- issue: an instruction a cycle of each of four schedulers, of whose cycles 70 % are used: arithmetic has half-rate
  instructions, and warps wait.
- latency: rounds of as many programs as fit, each as long as its slowest warp alone (see `walk`).

"copy" is the time in which a copy kernel moves the maps' bytes, and `of copy` that over the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .walk import FROM_CACHE, FROM_MEMORY, SECTOR

MULTIPROCESSORS, CLOCK = 132, 1.7e9
COPY, OF_COPY, CACHE = 3.0e12, 0.9, 5.5e12
SCHEDULERS, OF_ISSUE = 4, 0.7
#: Between two launches of a stream that depend on each other, without a host that waits.
GAP = 1e-6
REGISTERS, WARPS, BLOCKS, SHARED, SHARED_A_BLOCK = 65536, 64, 32, 227 << 10, 1 << 10

CONSTANTS = {
    "multiprocessors": MULTIPROCESSORS,
    "clock": CLOCK,
    "copy": COPY,
    "of copy": OF_COPY,
    "cache": CACHE,
    "of issue": OF_ISSUE,
    "gap": GAP,
    "cycles from memory": FROM_MEMORY,
    "cycles from cache": FROM_CACHE,
}


class Work(NamedTuple):
    """Of a launch. Of a program: warps, and of its warps together the instructions and wavefronts; cycles of its
    slowest one. maps: bytes that a copy would move; touched: all of the launch's; sectors: of all programs."""

    programs: int
    warps: int
    registers: int
    shared: int
    instructions: float
    wavefronts: float
    cycles: float
    maps: float
    touched: float
    sectors: float
    ranks: int = 1


class Estimate(NamedTuple):
    seconds: float
    of_copy: float
    bound: str


def programs_that_fit(work: Work) -> int:
    """A multiprocessor; registers come in pieces of 256 a warp."""
    of_registers = REGISTERS // (math.ceil(work.registers * 32 / 256) * 256 * work.warps)
    of_shared = SHARED // (work.shared + SHARED_A_BLOCK) if work.shared else BLOCKS
    return max(min(of_registers, of_shared, WARPS // work.warps, BLOCKS), 1)


def estimate(work: Work) -> Estimate:
    fit = programs_that_fit(work)
    most = math.ceil(work.programs / MULTIPROCESSORS)  # programs of one multiprocessor
    bounds = {
        "bandwidth": work.touched / (OF_COPY * COPY),
        "L2": SECTOR * work.sectors / CACHE,
        "load units": most * work.wavefronts / CLOCK,
        "issue": most * work.instructions / (SCHEDULERS * OF_ISSUE) / CLOCK,
        "latency": max(most / fit, 1) * work.cycles / CLOCK,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    seconds = bounds[bound]
    return Estimate(seconds, work.maps / COPY / seconds, bound)


def estimate_resident(work: Work) -> Estimate:
    """Of a kernel whose cluster reads a sample, computes and writes it, one after the other: beside that the
    multiprocessor has only the other blocks that fit. Clusters come in rounds; what a block moves has its
    multiprocessor's share of the memory, what it computes is bound by issue or by its slowest warp.
    """
    fit = programs_that_fit(work)
    clusters = MULTIPROCESSORS // work.ranks * fit  # at a time
    rounds = math.ceil(work.programs / work.ranks / clusters)
    moved = work.maps / work.programs / (OF_COPY * COPY / MULTIPROCESSORS)
    computed = max(work.instructions / (SCHEDULERS * OF_ISSUE), work.cycles) / CLOCK
    seconds = rounds * max(fit * moved, fit * work.instructions / (SCHEDULERS * OF_ISSUE) / CLOCK, moved + computed)
    bound = "bandwidth" if computed < 0.1 * moved else "issue" if computed * CLOCK > work.cycles else "latency"
    return Estimate(seconds, work.maps / COPY / seconds, bound)
