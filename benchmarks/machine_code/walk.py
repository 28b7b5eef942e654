"""Walk through a kernel's SASS, warp by warp, as one block of it runs.

Only integers are followed: parameters, places in the grid, loop counters, addresses, masks. What comes from memory, and
what is made of it in floating point, is unknown, and nothing in these kernels branches on it but the rare paths of
divisions, which are taken to be not taken. So what is counted is what a card executes: instructions, how often each,
and of each access to global memory the sectors of 32 bytes.

A warp's time alone is that of an in-order machine: an instruction goes out one cycle after the last and not before its
operands are there. NVIDIA does not document the opcodes; those not known here leave unknown numbers and are reported.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

LANES = 32
ALL = 0xFFFFFFFF
SECTOR = 32
ONES = (1 << LANES) - 1

#: Cycles until a result can be used: of what memory gives, of L2, of shared memory, of the other units, of arithmetic.
#: Idle, an H100's memory answers after 480 and its L2 after 260 (Luo et al., arXiv:2402.13499); here both are busy.
FROM_MEMORY, FROM_CACHE, FROM_SHARED, FROM_UNITS, FROM_ARITHMETIC = 800, 350, 30, 20, 5
UNITS = (
    "MUFU",
    "I2F",
    "F2I",
    "S2R",
    "S2UR",
    "R2UR",
    "SHFL",
    "LDC",
    "POPC",
    "FLO",
    "VOTE",
    "BAR",
    "DADD",
    "DMUL",
    "DFMA",
)
MEMORY = ("LDG", "STG", "LDGSTS", "LD", "ST", "ATOMG", "RED", "ATOM")


class Instruction(NamedTuple):
    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]


@dataclass
class Code:
    """A kernel's instructions in order, and the places that labels name."""

    instructions: list[Instruction]
    labels: dict[str, int]
    tables: bytes = b""  # of its branches to one of several places: the bank of constants 2

    @functools.cached_property
    def destinations(self) -> list[list[str]]:
        return [destinations_of(i) for i in self.instructions]

    @functools.cached_property
    def sources(self) -> list[list[str]]:
        return [sources_of(i) for i in self.instructions]

    def target(self, instruction: Instruction) -> int | None:
        """The place that a branch names."""
        found = re.search(r"`\(([^)]+)\)", " ".join(instruction.operands))
        return self.labels.get(found[1]) if found else None

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) place of each loop: where a branch goes back to, and the branch. The last one never ends."""
        found = {}
        for place, instruction in enumerate(self.instructions):
            back = self.target(instruction) if instruction.opcode == "BRA" else None
            if back is not None and back < place:
                found[back] = max(place, found.get(back, 0))
        return sorted(found.items())


def parsed(text: str, kernel: str) -> Code:
    """Of nvdisasm's or cuobjdump's text, the function `kernel`."""
    part = text.partition(f"\n.text.{kernel}:\n")[2]
    part = re.split(r"\n//-+ |\n\t\.section", part)[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {f".text.{kernel}": 0, kernel: 0}
    for line in part.splitlines():
        if found := re.match(r"(\S+):\s*$", line):
            labels[found[1]] = len(instructions)
        elif found := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            operands = tuple(o.strip() for o in found[4].split(",")) if found[4] else ()
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3], operands))
    return Code(instructions, labels)


class Buffer(NamedTuple):
    """A tensor in global memory. large: a map, which comes from memory; others are in L2."""

    name: str
    start: int
    bytes: int
    large: bool


@dataclass
class Counts:
    """What one warp has done. executed: by place; of memory, by buffer name, bytes and sectors of loads and stores."""

    executed: Counter[int] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    sectors: Counter[tuple[str, str]] = field(default_factory=Counter)
    #: (place, buffer name): bytes, requests, sectors
    accesses: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    in_flight: int = 0
    wavefronts: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.executed.values())


class Place(NamedTuple):
    """Of a block: in the grid, its size, its place in its cluster."""

    block: tuple[int, int, int] = (0, 0, 0)
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 128
    rank: int = 0
    ranks: int = 1


Value = tuple[Any, int]  # 32 lanes, which bits are known of all of them


#: Tables of three bits that occur most.
SHORT: dict[int, Callable[..., Any]] = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0x33: lambda a, b, c: ~b,
    0x30: lambda a, b, c: a & ~b,
    0x0C: lambda a, b, c: ~a & b,
    0xF8: lambda a, b, c: a | b & c,
    0xFE: lambda a, b, c: a | b | c,
}


def _compare(how: str, a: Any, b: Any) -> Any:
    return {
        "LT": lambda: a < b, "LE": lambda: a <= b, "GT": lambda: a > b, "GE": lambda: a >= b,
        "EQ": lambda: a == b, "NE": lambda: a != b,
    }[how]()  # fmt: skip


def _wide(v: Any, signed: bool) -> Any:
    return v.astype(np.int32).astype(np.int64) if signed else v.astype(np.int64)


def upper(operand: str) -> str:
    """The operand that holds the upper half of a pair."""
    text = operand.replace(".reuse", "").partition(".")[0]
    if found := re.fullmatch(r"(-|~)?(U?R)(\d+)", text):
        return f"{found[2]}{int(found[3]) + 1}"
    if found := re.fullmatch(r"(c\[0x[02]\])\[(?:(U?R\d+|RZ)\+?)?(0x[0-9a-f]+)?\]", text):
        offset = int(found[3] or "0", 16) + 4
        return f"{found[1]}[{found[2]}+{offset:#x}]" if found[2] else f"{found[1]}[{offset:#x}]"
    return "RZ"


def destinations_of(i: Instruction) -> list[str]:
    """Registers that it writes."""
    no = ("STG", "STS", "ST", "STL", "BRA", "EXIT", "BAR", "BSSY", "BSYNC", "NOP", "LDGSTS", "LDGDEPBAR", "DEPBAR",
          "CALL", "RET", "WARPSYNC", "RED", "MEMBAR", "ERRBAR", "CCTL", "STSM", "STAS", "UCGABAR_ARV",
          "UCGABAR_WAIT", "UBLKCP", "NANOSLEEP", "YIELD", "FENCE")  # fmt: skip
    if i.opcode in no or not i.operands:
        return []
    names = []
    for operand in i.operands:
        if not re.fullmatch(r"(U?R\d+|RZ|URZ|U?P\d|U?PT|PR)", operand):
            break
        names.append(operand)
        if "R" in operand:
            break
        if not names[0].startswith(("P", "UP")):
            break
    # a register, then predicates (carries), or predicates, then a register
    if names and "R" in names[0]:
        names += [o for o in i.operands[1:3] if re.fullmatch(r"U?P\d", o)]
    width = 1
    if found := re.search(r"\.(64|128)\b", i.name):
        width = int(found[1]) // 32
    if ".WIDE" in i.name or i.opcode in ("CS2R", "DADD", "DMUL", "DFMA") and ".32" not in i.name:
        width = 2
    if i.opcode == "LDSM" and (found := re.search(r"\.M88\.(\d)", i.name)):
        width = int(found[1])
    if i.opcode in ("HMMA",):
        width = 4
    for name in [n for n in names if re.fullmatch(r"U?R\d+", n)]:
        prefix, number = re.match(r"(U?R)(\d+)", name).groups()  # type: ignore[union-attr]
        names += [f"{prefix}{int(number) + k}" for k in range(1, width)]
    return [n for n in names if n not in ("RZ", "URZ", "PT", "UPT", "PR")]


def sources_of(i: Instruction) -> list[str]:
    """Registers that it reads, for the time."""
    found = []
    for operand in (*i.operands, i.guard):
        for name, wide in re.findall(r"\b(U?R\d+)(\.64)?", operand):
            found.append(name)
            if wide or ".WIDE" in i.name:
                found.append(upper(name))
        found += re.findall(r"\bU?P\d\b", operand)
    if width := re.search(r"^ST\w*\.(?:E\.)?(?:\w+\.)*(64|128)", i.name):
        name = i.operands[-1].replace(".reuse", "")
        if re.fullmatch(r"R\d+", name):
            found += [f"R{int(name[1:]) + k}" for k in range(1, int(width[1]) // 32)]
    return found


class Warp:
    """Its registers, all lanes of each, and which of their bits are known."""

    def __init__(self, code: Code, constants: bytes, buffers: list[Buffer], place: Place, warp: int) -> None:
        self.code, self.constants, self.buffers, self.place = code, constants, buffers, place
        self.starts = np.array([b.start for b in buffers] or [0], np.uint64)
        self.values: dict[str, Any] = {}
        self.known: dict[str, int] = {}
        self.ready: dict[str, int] = {}
        self.threads = warp * LANES + np.arange(LANES, dtype=np.uint32)
        self.counts = Counts()
        self.loads: list[tuple[int, int]] = []  # (when it is there, bytes) of loads from memory
        self.zero = np.zeros(LANES, np.uint32)
        self.at: dict[int, int] = {place: at for at, place in enumerate(i.address for i in code.instructions)}
        self.partial = False  # whether a guard holds for some lanes only
        self.steps = [self.step_of(i) for i in code.instructions]

    # ---- operands ----

    def read(self, operand: str) -> Callable[[], Value]:
        """A 32-bit operand; signs included."""
        text = operand.replace(".reuse", "").strip()
        if text.startswith(("|", "-|")):
            return lambda: (self.zero, 0)
        if text[0] in "-~" and not re.match(r"-(0x|\d)", text):
            inner, invert = self.read(text[1:]), text[0] == "~"

            def signed() -> Value:
                v, known = inner()
                return (~v if invert else (~v + np.uint32(1))), known if invert or known == ALL else 0

            return signed
        name = text.partition(".")[0]
        if name in ("RZ", "URZ", "SRZ"):
            return lambda: (self.zero, ALL)
        if re.fullmatch(r"U?R\d+", name):
            values, known, zero = self.values, self.known, self.zero
            return lambda: (values.get(name, zero), known.get(name, 0))
        if found := re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
            full = np.full(LANES, int(found[0], 0) & ALL, np.uint32)
            return lambda: (full, ALL)
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            number = self.constant(int(found[1], 16))
            return lambda: number
        if found := re.fullmatch(r"c\[(0x[02])\]\[(U?R\d+|RZ)(?:\+(-?0x[0-9a-f]+))?\]", text):
            index, offset = self.read(found[2]), int(found[3] or "0", 0)
            bank = self.constants if found[1] == "0x0" else self.code.tables

            def indexed() -> Value:
                v, known = index()
                return self.constant(int(v[0]) + offset, bank) if known == ALL else (self.zero, 0)

            return indexed
        return lambda: (self.zero, 0)  # a float or a constant of another bank

    def constant(self, offset: int, bank: bytes | None = None) -> Value:
        data = (self.constants if bank is None else bank)[offset : offset + 4]
        if len(data) < 4:
            return self.zero, 0
        return np.full(LANES, int.from_bytes(data, "little"), np.uint32), ALL

    def read_pair(self, operand: str) -> Callable[[], tuple[Any, int]]:
        low, top = self.read(operand), self.read(upper(operand))

        def pair() -> tuple[Any, int]:
            (a, known_a), (b, known_b) = low(), top()
            return a.astype(np.int64) | (b.astype(np.int64) << 32), known_a & known_b

        return pair

    def predicate(self, operand: str) -> Callable[[], tuple[Any, bool]]:
        text = operand.strip()
        if text.startswith("!"):
            inner = self.predicate(text[1:])

            def inverted() -> tuple[Any, bool]:
                v, known = inner()
                return ~v, known

            return inverted
        if text in ("PT", "UPT"):
            true = np.ones(LANES, bool)
            return lambda: (true, True)
        none = np.zeros(LANES, bool)
        return lambda: (self.values.get(text, none), bool(self.known.get(text, 0)))

    def write(self, name: str, value: Any, known: int, mask: Any, everyone: bool) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if everyone or name not in self.values:
            self.values[name], self.known[name] = value, int(known)
        else:
            self.values[name] = np.where(mask, value, self.values[name])
            # Lanes that are elsewhere are not asked: where they meet these again, such a register is seldom read.
            self.known[name] = int(known) & (self.known[name] if self.partial else ALL)

    def write_pair(self, name: str, value: Any, known: int, mask: Any, everyone: bool) -> None:
        self.write(name, (value & ALL).astype(np.uint32), known, mask, everyone)
        self.write(upper(name), ((value >> 32) & ALL).astype(np.uint32), known, mask, everyone)

    # ---- instructions ----

    def step_of(self, i: Instruction) -> Callable[[Any, bool], None]:
        """What it does to the registers of the lanes in a mask."""
        opcode = i.opcode.removeprefix("U") if i.opcode not in ("UBLKCP", "UCGABAR_ARV", "UCGABAR_WAIT") else i.opcode
        make = getattr(self, f"make_{opcode}", None)
        nothing, known = dict.fromkeys(destinations_of(i), 0), self.known

        def forget(mask: Any, everyone: bool) -> None:
            known.update(nothing)

        if make is None:
            return forget
        made = make(i)
        return forget if made is None else made

    def split(self, i: Instruction) -> tuple[str, list[str], list[str], list[str]]:
        """(destination, predicates written behind it, sources, predicates read) of arithmetic."""
        first, rest = i.operands[0], list(i.operands[1:])
        written = []
        while rest and re.fullmatch(r"U?P(\d|T)", rest[0]):
            written.append(rest.pop(0))
        read: list[str] = []
        while rest and re.fullmatch(r"!?U?P(\d|T)", rest[-1]):
            read.insert(0, rest.pop())
        return first, written, rest, read

    def make_IADD3(self, i: Instruction) -> Any:
        to, carries, of, carried = self.split(i)
        # A negated operand is its complement and a carry of its own, so that carries out are those of the sum.
        negated = [o[1:] if o.startswith("-") and not o.startswith("-0x") else o for o in of]
        ones = sum(o != n for o, n in zip(of, negated, strict=True))
        reads = [(self.read(n), o != n) for o, n in zip(of, negated, strict=True)]
        ins = [self.predicate(p) for p in carried]

        def run(mask: Any, everyone: bool) -> None:
            total, known = np.zeros(LANES, np.int64) + ones, ALL
            for read, complement in reads:
                v, k = read()
                total += (~v if complement else v).astype(np.int64)
                known &= k
            for carry in ins:
                p, k = carry()
                total += p
                known &= ALL if k else 0
            known = ALL if known == ALL else 0
            self.write(to, (total & ALL).astype(np.uint32), known, mask, everyone)
            for nth, name in enumerate(carries):
                self.write(name, (total >> 32) > nth, known, mask, everyone)

        return run

    make_VIADD = make_IADD3

    def make_IMAD(self, i: Instruction) -> Any:
        to, carries, of, carried = self.split(i)
        if len(of) != 3:
            return None
        wide, unsigned, high = ".WIDE" in i.name, ".U32" in i.name, ".HI" in i.name
        a, b = self.read(of[0]), self.read(of[1])
        c = self.read_pair(of[2]) if wide or high else self.read(of[2])
        ins = [self.predicate(p) for p in carried if p not in ("!PT", "!UPT")]

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vb, kb), (vc, kc) = a(), b(), c()
            known = ALL if ka & kb & kc == ALL else 0
            with np.errstate(over="ignore"):
                if wide or high:
                    product = _wide(va, not unsigned) * _wide(vb, not unsigned)
                    if unsigned:
                        product = (va.astype(np.uint64) * vb.astype(np.uint64)).astype(np.int64)
                    total = product + vc
                else:
                    total = (va * vb).astype(np.int64) + vc.astype(np.int64)
                for carry in ins:
                    p, k = carry()
                    total = total + p
                    known = known if k else 0
            if wide:
                self.write_pair(to, total, known, mask, everyone)
                for name in carries:
                    carry_out = total.astype(np.uint64) < vc.astype(np.uint64)
                    self.write(name, carry_out, known, mask, everyone)
            elif high:
                self.write(to, ((total >> 32) & ALL).astype(np.uint32), known, mask, everyone)
            else:
                self.write(to, (total & ALL).astype(np.uint32), known, mask, everyone)
                for name in carries:
                    self.write(name, (total >> 32) > 0, known, mask, everyone)

        return run

    def make_LEA(self, i: Instruction) -> Any:
        to, carries, of, carried = self.split(i)
        high, extended = ".HI" in i.name, ".SX32" in i.name
        shift = (
            int(of.pop(), 16) if len(of) > 2 and of[-1].startswith("0x") and len(of) >= (3 if not high else 3) else 0
        )
        reads = [self.read(o) for o in of]
        ins = [self.predicate(p) for p in carried]

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vb, kb) = reads[0](), reads[1]()
            known = ka & kb
            if high:
                if extended:
                    top = _wide(va, True) >> 31
                elif len(reads) > 2:
                    vc, kc = reads[2]()
                    known &= kc
                    top = vc.astype(np.int64)
                else:
                    top = np.zeros(LANES, np.int64)
                whole = va.astype(np.int64) | (top << 32)
                shifted = (whole >> (32 - shift)) & ALL
            else:
                shifted = (va.astype(np.int64) << shift) & ALL
            total = shifted + vb.astype(np.int64)
            for carry in ins:
                p, k = carry()
                total = total + p
                known = known if k else 0
            known = ALL if known == ALL else 0
            self.write(to, (total & ALL).astype(np.uint32), known, mask, everyone)
            for name in carries:
                self.write(name, (total >> 32) > 0, known, mask, everyone)

        return run

    def make_LOP3(self, i: Instruction) -> Any:
        operands = list(i.operands)
        out = operands.pop(0) if re.fullmatch(r"U?P(\d|T)", operands[0]) else None
        to, *of = operands
        table = int(of[3], 16)
        reads = [self.read(o) for o in of[:3]]
        short = SHORT.get(table)

        def run(mask: Any, everyone: bool) -> None:
            found = [read() for read in reads]
            (a, ka), (b, kb), (c, kc) = found
            if short and ka & kb & kc == ALL:
                value = short(a, b, c)
                self.write(to, value, ALL, mask, everyone)
                if out:
                    self.write(out, value != 0, ALL, mask, everyone)
                return
            one = [v | np.uint32(~k & ALL) for v, k in found]  # bits that may be 1
            zero = [~(v & np.uint32(k)) for v, k in found]  # bits that may be 0
            may_1, may_0 = self.zero, self.zero
            for minterm in range(8):
                there = [(one if minterm >> (2 - n) & 1 else zero)[n] for n in range(3)]
                both = there[0] & there[1] & there[2]
                if table >> minterm & 1:
                    may_1 = may_1 | both
                else:
                    may_0 = may_0 | both
            known = int(np.bitwise_and.reduce(may_1 ^ may_0))
            self.write(to, may_1, known, mask, everyone)
            if out:
                self.write(out, may_1 != 0, ALL if known == ALL else 0, mask, everyone)

        return run

    def make_PLOP3(self, i: Instruction) -> Any:
        first, second, *of = i.operands
        reads, table, other = [self.predicate(o) for o in of[:3]], int(of[3], 16), int(of[4], 16)

        def run(mask: Any, everyone: bool) -> None:
            values, known = zip(*(read() for read in reads), strict=True)
            for name, lut in ((first, table), (second, other)):
                if name in ("PT", "UPT"):
                    continue
                can = [np.zeros(LANES, bool), np.zeros(LANES, bool)]
                for minterm in range(8):
                    there = np.ones(LANES, bool)
                    for n in range(3):
                        wanted = bool(minterm >> (2 - n) & 1)
                        there = there & ((values[n] == wanted) | (not known[n]))
                    can[lut >> minterm & 1] = can[lut >> minterm & 1] | there
                self.write(name, can[1], ALL if not (can[0] & can[1]).any() else 0, mask, everyone)

        return run

    def make_ISETP(self, i: Instruction) -> Any:
        parts = i.name.split(".")
        how, unsigned, extended = parts[1], "U32" in parts, "EX" in parts
        combine = next(p for p in parts if p in ("AND", "OR", "XOR"))
        first, second, a, b, with_ = i.operands[:5]
        reads, given = (self.read(a), self.read(b)), self.predicate(with_)
        lower = self.predicate(i.operands[5]) if extended else None

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vb, kb) = reads[0](), reads[1]()
            p, kp = given()
            va, vb = _wide(va, not unsigned), _wide(vb, not unsigned)
            known = ka & kb == ALL
            holds = _compare(how, va, vb)
            if lower is not None:
                low, k = lower()
                known = known and k
                if how == "NE":
                    holds = holds | low
                elif how == "EQ":
                    holds = holds & low
                else:
                    strict = _compare(how[0] + "T", va, vb)
                    holds = strict | ((va == vb) & low)
            for name, result in ((first, holds), (second, ~holds)):
                if name in ("PT", "UPT"):
                    continue
                if combine == "AND":
                    value = result & p
                    sure = (known and kp) or (kp and not p.any()) or (known and not result.any())
                elif combine == "OR":
                    value = result | p
                    sure = (known and kp) or (kp and p.all()) or (known and result.all())
                else:
                    value, sure = result ^ p, known and kp
                self.write(name, value, ALL if sure else 0, mask, everyone)

        return run

    def make_SHF(self, i: Instruction) -> Any:
        to, a, n, c = i.operands
        ra, rn, rc = self.read(a), self.read(n), self.read(c)
        left, signed, long, high = ".L" in i.name, ".S32" in i.name or ".S64" in i.name, "64" in i.name, ".HI" in i.name

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vn, kn), (vc, kc) = ra(), rn(), rc()
            shift = vn.astype(np.int64)
            shift = shift & 31 if ".W" in i.name else np.minimum(shift, 63 if long else 32)
            known = ka & kn & kc
            if left and not high:
                value, known = va.astype(np.int64) << shift, ka & kn
            elif left:
                value = (((vc.astype(np.int64) << 32) | va.astype(np.int64)) << shift) >> 32
            elif high:
                value, known = _wide(vc, signed) >> shift, kc & kn
            else:
                value = ((_wide(vc, signed) << 32) | va.astype(np.int64)) >> shift
            self.write(to, (value & ALL).astype(np.uint32), ALL if known == ALL else 0, mask, everyone)

        return run

    def make_SEL(self, i: Instruction) -> Any:
        to, a, b, p = i.operands
        ra, rb, rp = self.read(a), self.read(b), self.predicate(p)

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vb, kb), (vp, kp) = ra(), rb(), rp()
            if not kp:
                known = ka & kb if (va == vb).all() else 0
            else:
                known = ka & kb if vp.any() and not vp.all() else ka if vp.all() else kb
            self.write(to, np.where(vp, va, vb), known, mask, everyone)

        return run

    def make_IMNMX(self, i: Instruction) -> Any:
        *of, b, p = i.operands
        if not 2 <= len(of) <= 3:
            return None
        to, a = of[:2]
        ra, rb, rp = self.read(a), self.read(b), self.predicate(p)
        added = self.read(of[2]) if len(of) > 2 else lambda: (self.zero, ALL)
        signed = ".U32" not in i.name

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vb, kb), (vp, kp), (more, k) = ra(), rb(), rp(), added()
            ka &= k
            wa, wb = _wide(va + more, signed), _wide(vb, signed)
            value = np.where(vp, np.minimum(wa, wb), np.maximum(wa, wb))
            self.write(to, (value & ALL).astype(np.uint32), ALL if kp and ka & kb == ALL else 0, mask, everyone)

        return run

    make_VIMNMX = make_VIADDMNMX = make_IMNMX

    def make_MOV(self, i: Instruction) -> Any:
        to, of = i.operands[:2]
        read = self.read(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            self.write(to, v, known, mask, everyone)

        return run

    def make_R2UR(self, i: Instruction) -> Any:
        to, of = i.operands[-2:] if len(i.operands) == 2 else i.operands[:2]
        read = self.read(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            self.write(to, np.full(LANES, v[int(np.argmax(mask))], np.uint32), known, mask, True)

        return run

    def make_LDC(self, i: Instruction) -> Any:
        to, of = i.operands[:2]
        if any(f".{kind}" in i.name for kind in ("U8", "S8", "U16", "S16")):
            found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", of)
            if not found or ".U8" not in i.name:
                return None
            place = int(found[1], 16)
            byte = np.full(LANES, self.constants[place] if place < len(self.constants) else 0, np.uint32)
            return lambda mask, everyone: self.write(to, byte, ALL, mask, everyone)
        read = self.read(of)
        if ".64" not in i.name:
            return self.make_MOV(i)
        pair = self.read_pair(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = pair()
            self.write_pair(to, v, known if read()[1] == ALL else 0, mask, everyone)

        return run

    def make_S2R(self, i: Instruction) -> Any:
        to, of = i.operands
        place = self.place
        numbers = {"SR_CTAID.X": place.block[0], "SR_CTAID.Y": place.block[1], "SR_CTAID.Z": place.block[2],
                   "SR_CgaCtaId": place.rank, "SR_TID.Y": 0, "SR_TID.Z": 0}  # fmt: skip
        if of == "SR_TID.X":
            value: Any = self.threads
        elif of == "SR_LANEID":
            value = np.arange(LANES, dtype=np.uint32)
        elif of in numbers:
            value = np.full(LANES, numbers[of], np.uint32)
        else:
            return None
        return lambda mask, everyone: self.write(to, value, ALL, mask, everyone)

    make_S2UR = make_S2R

    def make_CS2R(self, i: Instruction) -> Any:
        if i.operands[1] != "SRZ":
            return None
        names = [i.operands[0]] + ([] if ".32" in i.name else [upper(i.operands[0])])

        def run(mask: Any, everyone: bool) -> None:
            for name in names:
                self.write(name, self.zero, ALL, mask, everyone)

        return run

    def make_HFMA2(self, i: Instruction) -> Any:
        """Of two zeros, which is how a constant is loaded."""
        if i.operands[1:3] != ("-RZ", "RZ") or len(i.operands) != 5:
            return None
        try:
            low, high = (int(np.float16(float(o)).view(np.uint16)) for o in i.operands[3:])
        except ValueError:
            return None
        value = np.full(LANES, high | low << 16, np.uint32)
        return lambda mask, everyone: self.write(i.operands[0], value, ALL, mask, everyone)

    def make_IABS(self, i: Instruction) -> Any:
        to, of = i.operands
        read = self.read(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            self.write(to, np.abs(v.astype(np.int32)).astype(np.uint32), ALL if known == ALL else 0, mask, everyone)

        return run

    def make_SGXT(self, i: Instruction) -> Any:
        to, of, bits = i.operands
        read, width, signed = self.read(of), int(bits, 16), ".U32" not in i.name

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            kept = v & np.uint32((1 << width) - 1)
            if signed:
                kept = np.where(kept >> np.uint32(width - 1), kept | np.uint32(ALL << width & ALL), kept)
            below = (1 << width) - 1
            self.write(to, kept.astype(np.uint32), ALL if known & below == below else 0, mask, everyone)

        return run

    def make_PRMT(self, i: Instruction) -> Any:
        to, a, how, c = i.operands
        if not how.startswith("0x") or i.name != "PRMT":
            return None
        ra, rc, chosen = self.read(a), self.read(c), int(how, 16)

        def run(mask: Any, everyone: bool) -> None:
            (va, ka), (vc, kc) = ra(), rc()
            if ka & kc != ALL:
                self.write(to, self.zero, 0, mask, everyone)
                return
            value = self.zero
            for n in range(4):
                which = chosen >> 4 * n & 15
                byte = (va if which & 7 < 4 else vc) >> np.uint32(8 * (which & 3)) & np.uint32(255)
                if which & 8:
                    byte = np.where(byte >> np.uint32(7), 255, 0).astype(np.uint32)
                value = value | byte << np.uint32(8 * n)
            self.write(to, value, ALL, mask, everyone)

        return run

    def make_P2R(self, i: Instruction) -> Any:
        to, which, of, bits = i.operands
        if which != "PR":
            return None
        read, kept = self.read(of), int(bits, 16)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            value, known = v & np.uint32(~kept & ALL), known & ~kept
            for n in range(7):
                if kept >> n & 1:
                    p, sure = self.predicate(f"P{n}")()
                    value = value | np.where(p, 1 << n, 0).astype(np.uint32)
                    known |= sure << n
            self.write(to, value, known | (kept & ~0x7F), mask, everyone)

        return run

    def make_R2P(self, i: Instruction) -> Any:
        _, of, bits = i.operands
        read, kept = self.read(of), int(bits, 16)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            for n in range(7):
                if kept >> n & 1:
                    self.write(
                        f"P{n}", (v >> np.uint32(n) & np.uint32(1)) != 0, ALL if known >> n & 1 else 0, mask, everyone
                    )

        return run

    def make_I2F(self, i: Instruction) -> Any:
        to, of = i.operands
        read, signed = self.read(of), ".U32" not in i.name

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            self.write(
                to, _wide(v, signed).astype(np.float32).view(np.uint32), ALL if known == ALL else 0, mask, everyone
            )

        return run

    def make_MUFU(self, i: Instruction) -> Any:
        to, of = i.operands
        if i.name != "MUFU.RCP":
            return None
        read = self.read(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            with np.errstate(all="ignore"):
                value = (np.float32(1) / v.view(np.float32)).astype(np.float32).view(np.uint32)
            self.write(to, value, ALL if known == ALL else 0, mask, everyone)

        return run

    def make_F2I(self, i: Instruction) -> Any:
        to, of = i.operands
        if ".U32" not in i.name:
            return None
        read = self.read(of)

        def run(mask: Any, everyone: bool) -> None:
            v, known = read()
            with np.errstate(all="ignore"):
                value = np.clip(np.nan_to_num(v.view(np.float32)), 0, 4294967040).astype(np.uint32)
            self.write(to, value, ALL if known == ALL else 0, mask, everyone)

        return run

    def make_SHFL(self, i: Instruction) -> Any:
        out, to, of, lane, *_ = i.operands
        read, index, how = self.read(of), self.read(lane), i.name.split(".")[1]

        def run(mask: Any, everyone: bool) -> None:
            (v, known), (n, sure) = read(), index()
            lanes = np.arange(LANES)
            if sure != ALL or how not in ("IDX", "BFLY"):
                known, from_ = 0, lanes
            else:
                from_ = n.astype(np.int64) & 31 if how == "IDX" else lanes ^ (n.astype(np.int64) & 31)
            self.write(to, v[from_], known, mask, everyone)
            self.write(out, np.ones(LANES, bool), ALL, mask, everyone)

        return run

    def make_VOTE(self, i: Instruction) -> Any:
        *to, of = i.operands
        read, how = self.predicate(of), i.name.split(".")[1]

        def run(mask: Any, everyone: bool) -> None:
            p, known = read()
            p = p & mask
            ballot = int(sum(1 << n for n in range(LANES) if p[n]))
            value = bool(ballot) if how == "ANY" else bool((p == mask).all())
            for name in to:
                number: Any = np.full(LANES, value) if "P" in name else np.full(LANES, ballot, np.uint32)
                self.write(name, number, ALL if known else 0, mask, everyone)

        return run

    make_VOTEU = make_VOTE

    def make_STL(self, i: Instruction) -> Any:
        """What does not fit the registers; places are told apart by how they are written."""
        to, of = i.operands
        names = [of.replace(".reuse", "")] + [f"R{int(of[1:].partition('.')[0]) + 1}"] * (".64" in i.name)

        def run(mask: Any, everyone: bool) -> None:
            for nth, name in enumerate(names):
                v, known = self.read(name)()
                self.write(f"{to}{nth}", v, known, mask, everyone)

        return run

    def make_LDL(self, i: Instruction) -> Any:
        to, of = i.operands
        names = [to] + [upper(to)] * (".64" in i.name)
        if ".128" in i.name:
            return None

        def run(mask: Any, everyone: bool) -> None:
            for nth, name in enumerate(names):
                self.write(
                    name, self.values.get(f"{of}{nth}", self.zero), self.known.get(f"{of}{nth}", 0), mask, everyone
                )

        return run

    # ---- memory ----

    def address(self, operand: str) -> Callable[[], tuple[Any, bool]] | None:
        """Of a global access: the lanes' addresses."""
        found = re.fullmatch(
            r"(?:desc\[U?R\d+\])?\[(?:(R\d+)(?:\.64|\.U32)?)?\+?(?:(UR\d+)(?:\.64)?)?\+?(-?0x[0-9a-f]+)?\]",
            operand.replace(" ", ""),
        )
        if not found:
            return None
        lane, uniform, offset = found[1], found[2], int(found[3] or "0", 0)
        reads = []
        if lane:
            narrow = f"{lane}.U32" in operand
            reads.append(self.read(lane) if narrow else self.read_pair(lane))
        if uniform:
            reads.append(self.read_pair(uniform))

        def find() -> tuple[Any, bool]:
            total, sure = np.full(LANES, offset, np.int64), True
            for read in reads:
                v, known = read()
                total = total + v.astype(np.int64)
                sure = sure and known == ALL
            return total, sure

        return find

    def access(self, place: int, i: Instruction, mask: Any, now: int) -> int:
        """Counts it; how many cycles until its numbers are there."""
        operand = next(o for o in i.operands if "desc[" in o or (o.startswith("[") and i.opcode in MEMORY))
        find = self.finders.get(place)
        if find is None:
            find = self.finders[place] = self.address(operand) or (lambda: (self.zero, False))
        width = 4
        if found := re.search(r"\.(U8|S8|U16|S16|64|128)\b", i.name):
            width = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[found[1]]
        lanes = int(mask.sum())
        if not lanes:
            return 1
        stores = i.opcode in ("STG", "ST", "RED", "ATOMG", "ATOM")
        addresses, sure = find()
        name, large = "?", False
        if sure:
            kept = addresses[mask]
            buffer = self.buffers[max(int(np.searchsorted(self.starts, np.uint64(kept[0]), "right")) - 1, 0)]
            name, large = buffer.name, buffer.large
            sectors = len(np.unique(np.concatenate([kept // SECTOR, (kept + width - 1) // SECTOR])))
            distinct = len(np.unique(kept)) * width
        else:
            sectors, distinct = max(lanes * width // SECTOR, 1), lanes * width
            self.counts.unknown["address"] += 1
        key = name, "store" if stores else "load"
        self.counts.bytes[key] += distinct
        self.counts.sectors[key] += sectors
        entry = self.counts.accesses.setdefault((place, name), [0, 0, 0])
        entry[0] += distinct
        entry[1] += 1
        entry[2] += sectors
        self.counts.wavefronts += max(-(-sectors // 4), -(-lanes * width // 128))
        if stores:
            return 1
        if large:
            self.loads = [(until, of) for until, of in self.loads if until > now]
            self.loads.append((now + FROM_MEMORY, distinct))
            self.counts.in_flight = max(self.counts.in_flight, sum(of for _, of in self.loads))
        return FROM_MEMORY if large else FROM_CACHE

    # ---- the walk ----

    def latency(self, i: Instruction) -> int:
        if i.opcode in ("LDS", "LDSM", "LDL"):
            return FROM_SHARED
        return FROM_UNITS if i.opcode in UNITS else FROM_ARITHMETIC

    def run(self, most: int = 2_000_000) -> Counts:
        code, counts = self.code.instructions, self.counts
        self.finders: dict[int, Any] = {}
        guards = [self.predicate(i.guard) if i.guard else None for i in code]
        targets = [self.code.target(i) for i in code]
        sources, destinations = self.code.sources, self.code.destinations
        latencies = [self.latency(i) for i in code]
        # Where a branch passes a call by, the call is the rare path.
        past_a_call = [
            to is not None and to > at and any(i.opcode == "CALL" for i in code[at + 1 : to])
            for at, to in enumerate(targets)
        ]
        self.mask = np.ones(LANES, bool)
        waiting: dict[int, Any] = {}
        alive = np.ones(LANES, bool)
        at, now, everyone, ready = 0, 0, True, self.ready
        copies = 0  # when the last asynchronous copy is there
        for _ in range(most):
            if waiting and (lowest := min(waiting)) <= at:
                if lowest == at:
                    self.mask = self.mask | waiting.pop(at)
                else:
                    other = waiting.pop(lowest)
                    waiting[at] = waiting.get(at, np.zeros(LANES, bool)) | self.mask
                    self.mask, at = other, lowest
                everyone = bool(self.mask.all())
            i, guard = code[at], guards[at]
            opcode = i.opcode
            counts.executed[at] += 1
            now = max(now + 1, *(ready.get(name, 0) for name in sources[at])) if sources[at] else now + 1
            mask, whole, self.partial = self.mask, everyone, False
            if guard is not None:
                p, sure = guard()
                if sure:
                    mask = self.mask & p
                    whole = everyone and bool(p.all())
                    self.partial = not bool(p[self.mask].all())
                elif opcode in ("BRA", "BRX", "CALL", "EXIT", "RET"):
                    if not past_a_call[at]:
                        mask, whole = np.zeros(LANES, bool), False  # a rare path
                else:
                    whole = False
            if opcode in ("BRA", "BRX", "CALL", "EXIT", "RET") and i.guard == "" and opcode == "BRA":
                # BRA P0, `(label)` has a second condition
                if i.operands and re.fullmatch(r"!?U?P\d", i.operands[0]):
                    p, sure = self.predicate(i.operands[0])()
                    mask = self.mask & p if sure else np.zeros(LANES, bool)
            elif opcode == "BRA" and i.operands and re.fullmatch(r"!?U?P(\d|T)", i.operands[0]):
                p, sure = self.predicate(i.operands[0])()
                mask = mask & p if sure else np.zeros(LANES, bool)
            if opcode in ("BRA", "BRX", "CALL", "EXIT", "RET"):
                if mask.any():
                    if opcode == "EXIT":
                        to: int | None = None
                        alive = alive & ~mask
                    elif opcode in ("RET", "BRX"):
                        v, sure = self.read(i.operands[0].split()[0])()
                        to = self.at.get(int(v[int(np.argmax(mask))])) if sure == ALL else None
                        if to is None:
                            counts.unknown[opcode] += 1
                            alive = alive & ~mask
                    else:
                        to = targets[at]
                        if to == at:  # the loop behind the end
                            to, alive = None, alive & ~mask
                    rest = self.mask & ~mask
                    if to is not None and not rest.any():
                        at = to
                        continue
                    if to is not None:
                        waiting[to] = waiting.get(to, np.zeros(LANES, bool)) | mask
                    if rest.any():
                        self.mask, at, everyone = rest, at + 1, False
                    elif waiting:
                        at = min(waiting)
                        self.mask = waiting.pop(at)
                        everyone = bool(self.mask.all())
                    else:
                        break
                    continue
                at += 1
                continue
            if mask.any():
                self.steps[at](mask, whole)
                if guard is not None and not sure:
                    self.known.update(dict.fromkeys(destinations[at], 0))
                later = latencies[at]
                if opcode in MEMORY:
                    later = self.access(at, i, mask, now)
                    if opcode == "LDGSTS":
                        copies = max(copies, now + later)
                elif opcode == "DEPBAR" and "SB0" in "".join(i.operands):
                    now = max(now, copies)
                for name in destinations[at]:
                    ready[name] = now + later
            at += 1
            if at >= len(code):
                break
        else:
            counts.unknown["too long"] += 1
        counts.cycles = now
        return counts
