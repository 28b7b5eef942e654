"""From a launch to its row: compiled, walked through, estimated."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

from tests.kernels import compile_ahead

from . import cases, model, walk

CAPABILITY = 90
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PARAMETERS = 0x210  # where they start in the bank of constants, and the number of blocks of the grid
GRID = 0xC
#: A tensor is a map from this share of the launch's largest one.
LARGE = 1 / 20
ALIGNMENT = 512
DIVISIONS = ("I2F", "MUFU.RCP64H", "CALL")


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=256)
def compiled(variant: compile_ahead.Variant) -> tuple[Any, walk.Code, int]:
    """(Triton's binary, its instructions, registers)."""
    binary = compile_ahead.compiled(variant, CAPABILITY)
    code = walk.parsed(disassembled(binary.asm["cubin"]), binary.metadata.name)
    return binary, code, compile_ahead.usage(binary)["REG"]


def placed(given: dict[str, Any]) -> tuple[list[walk.Buffer], dict[str, int]]:
    """Where the tensors of a launch may lie, and the pointers that it gets."""
    tensors = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, tuple):
            tensors |= {f"{name}.{n}": v for n, v in enumerate(value) if isinstance(v, torch.Tensor)}
    starts: dict[int, int] = {}
    buffers: list[walk.Buffer] = []
    pointers, free = {}, 1 << 32
    largest = max((t.untyped_storage().nbytes() for t in tensors.values()), default=0)
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage._cdata not in starts:
            starts[storage._cdata] = free
            buffers.append(walk.Buffer(name, free, storage.nbytes(), storage.nbytes() >= LARGE * largest))
            free += -(-max(storage.nbytes(), 1) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        pointers[name] = starts[storage._cdata] + tensor.storage_offset() * tensor.element_size()
    return buffers, pointers


def constants(variant: compile_ahead.Variant, given: dict[str, Any], pointers: dict[str, int], programs: int) -> bytes:
    """The bank of constants of a launch."""
    bank = bytearray(PARAMETERS)
    for n, number in enumerate((programs, 1, 1)):
        bank[GRID + 4 * n : GRID + 4 * n + 4] = number.to_bytes(4, "little")
    for fact in variant.facts:
        if fact.kind == "constexpr":
            continue
        name = variant.kernel.params[fact.place[0]].name
        value = given[name]
        if len(fact.place) > 1:
            name, value = f"{name}.{fact.place[1]}", value[fact.place[1]]
        size = 8 if fact.kind.startswith("*") or fact.kind == "i64" else 4
        number = pointers[name] if fact.kind.startswith("*") else value
        bank += bytes(-len(bank) % size) + (number & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    return bytes(bank) + bytes(32)  # two pointers that Triton adds


def rows(case: cases.Case, only: list[str] | None = None) -> list[dict[str, Any]]:
    """A row a launch of the case."""
    found = []
    for nth, launch in enumerate(cases.launches(case)):
        name = launch.kernel if isinstance(launch.kernel, str) else launch.kernel.__name__
        if only and name not in only:
            continue
        known = {"op": case.op, "shape": list(case.shape), "layout": case.layout, "launch": nth, "kernel": name}
        found.append(known | (library_row(launch) if isinstance(launch.kernel, str) else row(launch)))
    return found


def library_row(launch: cases.Launch) -> dict[str, Any]:
    """An operator of torch's: its tensors once at the speed of a copy, and a launch."""
    bytes_ = sum(t.nbytes for t in launch.given.values())
    return {"seconds": bytes_ / model.COPY, "bytes": bytes_, "bound": "library"}


def row(launch: cases.Launch) -> dict[str, Any]:
    variant = compile_ahead.variant(launch.kernel, launch.given)
    binary, code, registers = compiled(variant)
    buffers, pointers = placed(launch.given)
    bank = constants(variant, launch.given, pointers, launch.programs)
    warps = binary.metadata.num_warps

    def walked(program: int, warp: int) -> walk.Counts:
        place = walk.Place((program, 0, 0), (launch.programs, 1, 1), 32 * warps)
        return walk.Warp(code, bank, buffers, place, warp).run()

    # Of two programs somewhere, one may be the last of its row, with less to do than the others.
    found = [walked(int(share * launch.programs), 0) for share in (0.414, 0.586)]
    counts = max(found, key=lambda c: sum(c.bytes.values()))
    # The first one may do what all the others need not.
    counts.cycles = max(counts.cycles, walked(0, 0).cycles)
    return facts(code, counts, buffers, launch.programs, warps, registers, binary.metadata.shared)


def facts(
    code: walk.Code,
    counts: walk.Counts,
    buffers: list[walk.Buffer],
    programs: int,
    warps: int,
    registers: int,
    shared: int,
) -> dict[str, Any]:
    """Of all programs, from one warp of one: the others do the same elsewhere."""
    used = set(counts.bytes)
    large = {b.name: touched(b, counts, programs * warps) for b in buffers if b.large}
    maps = sum(large[name] for name, _ in used if name in large)
    small = sum(b.bytes for b in buffers if not b.large and any((b.name, d) in used for d in ("load", "store")))
    work = model.Work(
        programs=programs,
        warps=warps,
        registers=registers,
        shared=shared,
        instructions=warps * counts.instructions,
        wavefronts=warps * counts.wavefronts,
        cycles=counts.cycles,
        maps=maps,
        touched=maps + small,
        sectors=programs * warps * sum(counts.sectors.values()),
    )
    found = model.estimate(work)
    fit = model.programs_that_fit(work)
    inner = inner_loop(code, counts, large)
    of_maps = sum(n for (name, _), n in counts.bytes.items() if name in large)
    return {
        "programs": programs,
        "warps": warps,
        "registers": registers,
        "shared": shared,
        "programs a multiprocessor": fit,
        "bytes in flight": fit * warps * counts.in_flight,
        "instructions a program": work.instructions,
        "cycles of a warp": work.cycles,
        "instructions for 16 bytes": ratio(walk.LANES * counts.instructions * 16, of_maps),
        "loop": inner,
        "sectors": int(work.sectors),
        "bytes": maps,
        "seconds": found.seconds,
        "of copy": found.of_copy if maps else None,
        "bound": found.bound,
        "divisions in loops": divisions(code, counts),
        **({"not followed": dict(counts.unknown)} if counts.unknown else {}),
    }


def touched(buffer: walk.Buffer, counts: walk.Counts, warps: int) -> int:
    """Bytes of a map that a launch reads or writes: all, but where its warps ask for a small part, as for the first
    element of each channel."""
    asked = warps * walk.SECTOR * max((n for (name, _), n in counts.sectors.items() if name == buffer.name), default=0)
    return asked if 0 < asked < buffer.bytes / 2 else buffer.bytes


def ratio(a: float, b: float) -> float | None:
    return round(a / b, 2) if b else None


def inner_loop(code: walk.Code, counts: walk.Counts, large: dict[str, int]) -> dict[str, Any] | None:
    """Of the loops that hold no other one, that which moves most of the maps."""
    loops = [loop for loop in code.loops() if loop[0] != loop[1]]
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    best: dict[str, Any] | None = None
    most = 0
    for first, last in innermost:
        executed = sum(n for at, n in counts.executed.items() if first <= at <= last)
        moved = requests = sectors = 0
        for (at, name), (of, asked, pieces) in counts.accesses.items():
            if first <= at <= last and name in large:
                moved, requests, sectors = moved + of, requests + asked, sectors + pieces
        if moved > most:
            most = moved
            best = {
                "instructions for 16 bytes": ratio(16 * walk.LANES * executed, moved),
                "accesses for 16 bytes": ratio(16 * walk.LANES * requests, moved),
                "bytes of sectors a byte": ratio(walk.SECTOR * sectors, moved),
                "instructions": last - first + 1,
                "turns of a warp": counts.executed[last],
            }
    return best


def divisions(code: walk.Code, counts: walk.Counts) -> int:
    """Integer divisions and calls in loops, as instructions that begin one, that are executed."""
    inside = {at for first, last in code.loops() if first != last for at in range(first, last + 1)}
    return sum(
        any(code.instructions[at].name.startswith(name) for name in DIVISIONS)
        and not re.match(r"I2FP|I2F\.F16", code.instructions[at].name)
        for at in inside & set(counts.executed)
    )
