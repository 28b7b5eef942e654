"""`python -m benchmarks.machine_code`: what is counted is what a warp executes, and the tool runs from end to end."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.machine_code import launch, model, walk

COUNT, MAP, TABLE = 0x210, 0x218, 0x220  # where parameters lie


def code_of(text: str) -> walk.Code:
    lines, address = ["", ".text.kernel:"], 0
    for line in text.strip().splitlines():
        line = line.strip()
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/    {line} ;")
            address += 16
    return walk.parsed("\n".join([*lines, ""]), "kernel")


def walked(text: str, count: int = 5, warp: int = 0) -> walk.Warp:
    bank = bytearray(0x230)
    bank[COUNT : COUNT + 4] = count.to_bytes(4, "little")
    bank[MAP : MAP + 8] = (1 << 33).to_bytes(8, "little")
    bank[TABLE : TABLE + 8] = (1 << 34).to_bytes(8, "little")
    buffers = [walk.Buffer("map", 1 << 33, 1 << 20, True), walk.Buffer("table", 1 << 34, 1 << 12, False)]
    found = walk.Warp(code_of(text), bytes(bank), buffers, walk.Place(), warp)
    found.run()
    return found


LOOP = """
    S2R R0, SR_TID.X
    ULDC.64 UR4, c[0x0][0x218]
    LDC R2, c[0x0][0x210]
    IMAD.MOV.U32 R3, RZ, RZ, RZ
    IMAD.U32 R4, RZ, RZ, UR4
    IMAD.U32 R5, RZ, RZ, UR5
    IMAD.WIDE.U32 R4, R0, 0x10, R4
    .L_x_0:
    LDG.E.128 R8, desc[UR6][R4.64]
    FADD R12, R8, R9
    IADD3 R3, R3, 0x1, RZ
    IADD3 R4, P1, R4, 0x200, RZ
    IADD3.X R5, R5, RZ, RZ, P1, !PT
    ISETP.GE.AND P0, PT, R3, R2, PT
    @!P0 BRA `(.L_x_0)
    EXIT
"""


def test_a_loop_over_a_map():
    found = walked(LOOP)
    assert found.code.loops() == [(7, 13)]
    assert found.counts.executed[7] == 5 and found.counts.instructions == 7 + 5 * 7 + 1
    assert found.counts.bytes == {("map", "load"): 5 * 512}
    assert found.counts.sectors == {("map", "load"): 5 * 16}
    assert found.counts.in_flight == 512  # its sum waits for each load
    assert found.counts.cycles > 5 * walk.FROM_MEMORY
    assert not found.counts.unknown


def test_lanes_apart_cost_sectors_and_idle_ones_nothing():
    apart = LOOP.replace("IMAD.WIDE.U32 R4, R0, 0x10, R4", "IMAD.WIDE.U32 R4, R0, 0x62, R4").replace(
        "LDG.E.128", "LDG.E.U16"
    )
    assert walked(apart).counts.sectors["map", "load"] == 5 * 32
    idle = LOOP.replace("    LDG", "    ISETP.LT.U32.AND P2, PT, R0, 0x8, PT\n    @P2 LDG")
    assert walked(idle).counts.bytes["map", "load"] == 5 * 128
    second = walked(idle, warp=1)
    assert second.counts.bytes["map", "load"] == 0 and second.counts.instructions == walked(idle).counts.instructions


@pytest.mark.parametrize(("n", "divisor"), [(895, 7), (100000, 9), (12, 28), (4095, 1)])
def test_an_integer_division(n, divisor):
    """The instructions that a compiler writes for it."""
    division = f"""
        IMAD.MOV.U32 R0, RZ, RZ, {n:#x}
        LDC R5, c[0x0][0x210]
        I2F.U32.RP R4, R5
        MUFU.RCP R4, R4
        IADD3 R2, R4, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R3, R2
        IMAD.MOV.U32 R2, RZ, RZ, RZ
        IADD3 R7, RZ, -R3, RZ
        IMAD R7, R7, R5, RZ
        IMAD.HI.U32 R3, R3, R7, R2
        IMAD.HI.U32 R3, R3, R0, RZ
        IADD3 R2, -R3, RZ, RZ
        IMAD R0, R5, R2, R0
        ISETP.GE.U32.AND P0, PT, R0, R5, PT
        @P0 IMAD.IADD R0, R0, 0x1, -R5
        @P0 IADD3 R3, R3, 0x1, RZ
        ISETP.GE.U32.AND P1, PT, R0, R5, PT
        @P1 IADD3 R3, R3, 0x1, RZ
        EXIT
    """
    found = walked(division, divisor)
    assert found.known["R3"] == walk.ALL and set(found.values["R3"]) == {n // divisor}


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("LEA R2, R0, R1, 0x3", lambda t: 8 * t + 100),
        ("LEA.HI R2, R0, R1, RZ, 0x1f", lambda t: (t << 31 >> 32) + 100),
        ("LOP3.LUT R2, R0, 0x7, RZ, 0xc0, !PT", lambda t: t & 7),
        ("LOP3.LUT R2, R0, R1, RZ, 0x3c, !PT", lambda t: t ^ 100),
        ("LOP3.LUT R2, R0, 0x8, R1, 0xf8, !PT", lambda t: t | 8 & 100),
        ("SHF.R.S32.HI R2, RZ, 0x1, R0", lambda t: t >> 1),
        ("SHF.L.U32 R2, R0, 0x4, RZ", lambda t: t << 4),
        ("IADD3 R2, -R0, R1, RZ", lambda t: 100 - t),
        ("IMAD R2, R0, R1, -R0", lambda t: 99 * t),
        ("VIMNMX R2, R0, 0x5, PT", lambda t: min(t, 5)),
        ("SGXT.U32 R2, R0, 0x2", lambda t: t & 3),
        ("SHFL.IDX PT, R2, R0, 0x3, 0x1f", lambda t: 3),
    ],
)
def test_integers(instruction, result):
    found = walked(f"S2R R0, SR_TID.X\nIMAD.MOV.U32 R1, RZ, RZ, 0x64\n{instruction}\nEXIT")
    assert found.known["R2"] == walk.ALL
    assert [int(v) for v in found.values["R2"]] == [result(t) for t in range(32)]


def test_constants_by_index():
    found = walked("IMAD.MOV.U32 R0, RZ, RZ, 0x8\nLDC.64 R2, c[0x0][R0+0x210]\nEXIT")
    assert [found.values[name][0] for name in ("R2", "R3")] == [0, 2] and found.known["R3"] == walk.ALL


@pytest.mark.parametrize("first", [0x0, 0x21])
def test_a_vote_of_all_lanes_in_a_uniform_register(first):
    """Of threads 0 to 31, as a division in uniform registers asks."""
    found = walked(f"""
        S2R R0, SR_TID.X
        ISETP.GE.U32.AND P0, PT, R0, {first:#x}, PT
        UMOV UR4, 0x7
        VOTEU.ANY UP0, P0
        @UP0 UIADD3 UR4, UR4, 0x1, URZ
        EXIT
    """)
    assert found.known["UR4"] == walk.ALL and found.values["UR4"][0] == (8 if first == 0 else 7)


def test_lanes_that_part_meet_again():
    found = walked("""
        S2R R0, SR_TID.X
        ISETP.LT.U32.AND P0, PT, R0, 0x4, PT
        @P0 BRA `(.L_x_1)
        IADD3 R0, R0, 0x64, RZ
        .L_x_1:
        IADD3 R0, R0, 0x1, RZ
        EXIT
    """)
    assert [int(v) for v in found.values["R0"]] == [t + 1 + (100 if t >= 4 else 0) for t in range(32)]
    assert found.counts.executed[4] == 1


def test_what_came_from_memory_is_unknown():
    found = walked("""
        ULDC.64 UR4, c[0x0][0x220]
        IMAD.U32 R4, RZ, RZ, UR4
        IMAD.U32 R5, RZ, RZ, UR5
        LDG.E R0, desc[UR6][R4.64]
        ISETP.LT.AND P0, PT, R0, RZ, PT
        IMAD.MOV.U32 R1, RZ, RZ, 0x1
        @P0 IMAD.MOV.U32 R1, RZ, RZ, 0x2
        LOP3.LUT R2, R0, 0xff, RZ, 0xc0, !PT
        @P0 BRA `(.L_x_1)
        EXIT
        .L_x_1:
        IADD3 R1, R1, 0x1, RZ
        EXIT
    """)
    assert found.known["R0"] == found.known["R1"] == 0
    assert found.known["R2"] == np.uint32(~0xFF & walk.ALL)  # bits that a mask clears are known
    assert found.counts.executed[10] == 0  # a rare path
    assert found.counts.bytes["table", "load"] == 4


def work(**given):
    nothing = {"programs": 132 * 64, "warps": 4, "registers": 32, "shared": 0, "wavefronts": 0.0, "cycles": 1.0}
    return model.Work(**{**nothing, "instructions": 1.0, "maps": 3e9, "touched": 3e9, "sectors": 1.0, **given})


def test_resident_blocks_overlap_where_two_fit():
    given = {"programs": 132 * 4, "maps": 132 * 4 * 1e5, "instructions": 1e5, "warps": 16, "shared": 110 << 10}
    two, alone = (model.estimate_resident(work(**given, registers=r)).seconds for r in (64, 65))
    moved, computed = 1e5 / (2.7e12 / 132), 1e5 / 2.8 / model.CLOCK
    assert alone == pytest.approx(4 * (moved + computed))
    assert two == pytest.approx(2 * max(2 * moved, 2 * computed, moved + computed))


def test_the_largest_bound_is_the_time():
    assert model.estimate(work()) == pytest.approx((3e9 / 2.7e12, 0.9, "bandwidth"))
    assert model.estimate(work(instructions=1e6)).bound == "issue"
    alone = model.estimate(work(cycles=1e6, registers=255))
    assert alone.bound == "latency" and alone.seconds == pytest.approx(64 / 2 * 1e6 / model.CLOCK)
    assert model.estimate(work(sectors=1e9)).bound == "L2"


def test_programs_of_a_multiprocessor():
    fits = [
        model.programs_that_fit(work(registers=r, shared=s)) for r, s in ((32, 0), (255, 0), (32, 100 << 10), (168, 0))
    ]
    assert fits == [16, 2, 2, 3]


@pytest.mark.timeout(300)
def test_the_tool(tmp_path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    file = tmp_path / "found.json"
    what = ["--op=eca", "--kernel=_pool", "--kernel=_gate", "--shape=2048x7x7", "--layout=channels_last"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.machine_code", *what, "--json", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(file.read_text())
    assert [row["kernel"] for row in found["rows"]] == ["_pool", "_gate"] and found["model"]["multiprocessors"] == 132
    bytes_ = 2 * 256 * 2048 * 49
    for row, passes in zip(found["rows"], (1, 2), strict=True):
        assert passes * bytes_ <= row["bytes"] < 1.1 * passes * bytes_  # and partial sums
        assert set(row.get("not followed", [])) <= {"address"}, row["not followed"]  # sectors are then an estimate
        assert 0.05 < row["of copy"] <= 0.9
        assert row["loop"]["accesses for 16 bytes"] < 1.2 and row["loop"]["bytes of sectors a byte"] < 1.2
        assert row["kernel"] in done.stdout


def test_a_map_of_which_little_is_read():
    """Counts with the sectors that are asked for; one that is read whole, with its bytes."""
    counts = walk.Counts()
    counts.sectors["map", "load"] = 4
    buffer = walk.Buffer("map", 0, 10_000, True)
    assert launch.touched(buffer, counts, 10) == 10 * 4 * walk.SECTOR
    assert launch.touched(buffer, counts, 100) == launch.touched(walk.Buffer("y", 0, 10_000, True), counts, 1) == 10_000
