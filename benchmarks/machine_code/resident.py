"""The resident kernels' launches: the host side runs as it is, on the CPU, with launches noted instead of made."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_attn.codes import LAYERS, POOLS, TIES
from tests.emulate import library

from . import cases, launch, model, walk

FOLDER = library.ROOT / "build" / "machine_code"
OPS = {"se-resident": "channel_gate"}
MOST = 1 << 16  # bytes of an argument
RANKS = 0x188  # where a kernel finds how many blocks its cluster has, in the bank of constants


class Noted(NamedTuple):
    blocks: int
    rows: int
    ranks: int
    threads: int
    shared: int
    argument: bytes


def made_of(*more: str) -> str:
    """A name for what is built of the sources."""
    found = hashlib.sha256(str(more).encode())
    for folder in (library.ROOT / "csrc", library.ROOT / "csrc" / "cuda", library.HERE, library.STAND_IN):
        for path in sorted(path for path in folder.iterdir() if path.suffix in (".h", ".cu", ".cuh", ".cpp")):
            found.update(path.read_bytes())
    return found.hexdigest()[:12]


def built(path: Path, command: list[str]) -> Path:
    """The file at `path`, made by the command where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{path.name.partition('-')[0]}-*{path.suffix}"):
            old.unlink()
        subprocess.run([*command, "-o", f"{path}.new"], check=True)
        Path(f"{path}.new").rename(path)
    return path


@functools.cache
def instructions(source: str) -> dict[str, tuple[walk.Code, int]]:
    """(instructions, registers) of the kernels of a file of csrc/cuda, by mangled name, for sm_90a."""
    include = ["-isystem", str(Path(torch.__file__).parent / "include"), f"-I{library.ROOT / 'csrc'}"]
    options = ["-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", library.TARGET, "-arch=sm_90a", "-cubin"]
    command = ["nvcc", *options, *include, str(library.ROOT / "csrc" / "cuda" / f"{source}.cu")]
    cubin = built(FOLDER / f"{source}-{made_of(*options)}.cubin", command)
    text = launch.disassembled(cubin.read_bytes())
    usage = subprocess.run(
        [launch.TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers = {name: int(n) for name, n in re.findall(r"Function (\w+):\n\s+REG:(\d+)", usage)}
    found = {name: (walk.parsed(text, name), registers[name]) for name in registers}
    for name, data in sections(cubin.read_bytes()).items():
        if name.startswith(".nv.constant2."):
            found[name.removeprefix(".nv.constant2.")][0].tables = data
    return found


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file."""
    start, (size, count, names) = int.from_bytes(elf[0x28:0x30], "little"), struct.unpack("<3H", elf[0x3A:0x40])
    headers = [struct.unpack("<IIQQQQ", elf[at : at + 40]) for at in range(start, start + size * count, size)]
    name_of = headers[names][4]
    return {
        elf[name_of + name : elf.index(b"\0", name_of + name)].decode(): elf[offset : offset + length]
        for name, _, _, _, offset, length in headers
    }


@functools.cache
def host(source: str) -> ctypes.CDLL:
    """The host side, loaded: its operators serve the CPU."""
    own = [f"-I{library.HERE}", f"-I{library.STAND_IN}", "-isystem", str(Path(torch.__file__).parent / "include")]
    options = [
        *library.FLAGS,
        library.TARGET,
        "-O0",
        "-DLAUNCHES_ARE_NOTED",
        f'-DKERNELS="../../csrc/cuda/{source}.cu"',
    ]
    if library.LIMITS_ARE_KNOWN:
        options.append("-DLIMITS_ARE_KNOWN")
    linked = [str(library.HERE / "library.cpp"), f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
    path = built(FOLDER / f"{source}-{made_of(*options)}.so", [shutil.which("g++") or "g++", *options, *own, *linked])
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def noted(loaded: ctypes.CDLL) -> Iterator[Noted]:
    """What was launched since the last time."""
    numbers, argument = (ctypes.c_uint * 5)(), ctypes.create_string_buffer(MOST)
    loaded.noted_launch.restype = ctypes.c_size_t
    nth = 0
    while size := loaded.noted_launch(ctypes.c_size_t(nth), numbers, argument):
        yield Noted(*numbers, argument.raw[:size])
        nth += 1


def launches(case: cases.Case) -> list[tuple[str, Noted, int]]:
    """(kernel, what was noted, bytes of the maps it reads and writes) of a call forward and backward."""
    loaded = host(OPS[case.op])
    x = torch.empty_like(cases.map_of(case), device="cpu")
    weights = [torch.empty(w.shape, dtype=w.dtype) for w in cases.excitation(case.shape[1])]
    identity, relu, sigmoid = cases.IDENTITY, cases.RELU, cases.SIGMOID
    ops = torch.ops.fused_attn
    codes = (LAYERS["dense"], POOLS["avg"], TIES["first"], relu, sigmoid, identity, identity)
    _, *states = ops.channel_gate.cuda(x, *weights, None, None, None, *codes)
    ops.channel_gate_backward.cuda(x, x, None, *states, *weights, None, None, None, *codes)
    kernels = ["channel_gate_kernel", "channel_gate_backward_kernel", "parameter_grad_kernel"]
    moved = [2 * x.nbytes, 3 * x.nbytes, 0]
    return list(zip(kernels, list(noted(loaded)), moved, strict=True))


def rows(case: cases.Case, only: list[str] | None = None) -> list[dict[str, Any]]:
    found = []
    for nth, (kernel, of, maps) in enumerate(launches(case)):
        if only and kernel not in only:
            continue
        known = {"op": case.op, "shape": list(case.shape), "layout": case.layout, "launch": nth, "kernel": kernel}
        found.append(known | row(case, kernel, of, maps))
    return found


def row(case: cases.Case, kernel: str, of: Noted, maps: int) -> dict[str, Any]:
    """A row of a launch that moves so many bytes of maps, all but the last one of which it reads."""
    read = maps - cases.map_of(case).nbytes if maps else 0
    last = "Lb1E" if case.layout == "channels_last" else "Lb0E"
    parts = [str(len(kernel)) + kernel] + ([last, "bfloat16"] if maps else ["IfE"])
    found = instructions(OPS[case.op])
    code, registers = found[next(name for name in found if all(part in name for part in parts))]
    bank = bytearray(launch.PARAMETERS) + of.argument + bytes(16)
    for n, number in enumerate((of.threads, 1, 1, of.blocks, of.rows, 1)):
        bank[4 * n : 4 * n + 4] = number.to_bytes(4, "little")
    bank[RANKS : RANKS + 4] = of.ranks.to_bytes(4, "little")
    everything = [walk.Buffer("memory", 0, 1 << 62, False)]
    block = of.blocks // 2 // of.ranks * of.ranks
    place = walk.Place((block, 0, 0), (of.blocks, of.rows, 1), of.threads, 0, of.ranks)
    # The first thread starts the copies, and waits; another warp is what most are like.
    counts = [walk.Warp(code, bytes(bank), everything, place, warp).run() for warp in (0, of.threads // 64)]
    warps = of.threads // 32
    work = model.Work(
        programs=of.blocks * of.rows,
        warps=warps,
        registers=registers,
        shared=of.shared,
        instructions=warps * counts[1].instructions,
        wavefronts=warps * counts[1].wavefronts,
        cycles=max(c.cycles for c in counts),
        maps=maps,
        touched=maps,
        sectors=of.blocks * of.rows * warps * sum(counts[1].sectors.values()),
        ranks=of.ranks,
    )
    estimate = model.estimate_resident(work) if maps else model.estimate(work)
    unknown = counts[0].unknown + counts[1].unknown
    return {
        "programs": work.programs,
        "warps": warps,
        "blocks a cluster": of.ranks,
        "registers": registers,
        "shared": of.shared,
        "programs a multiprocessor": model.programs_that_fit(work),
        "bytes in flight": model.programs_that_fit(work) * read // of.blocks,
        "instructions a program": work.instructions,
        "cycles of a warp": work.cycles,
        "instructions for 16 bytes": launch.ratio(16 * walk.LANES * work.instructions * work.programs, maps),
        "loop": None,
        "sectors": work.sectors,
        "bytes": maps,
        "seconds": estimate.seconds,
        "of copy": estimate.of_copy if maps else None,
        "bound": estimate.bound,
        "divisions in loops": launch.divisions(code, counts[1]),
        **({"not followed": dict(unknown)} if unknown else {}),
    }
