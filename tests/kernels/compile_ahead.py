"""Compile the Triton kernels ahead of time, with no GPU: python -m tests.kernels.compile_ahead CAPABILITY KERNEL...

The ops run on `meta` tensors with the launch replaced, so what is compiled are the kernels, tiles and options
that a call would use on an H100. Of a kernel's variants a cover is compiled, for sm_90 one in which occur

- each type, constant and alignment that any launch has of any argument, and each option;
- each (dtype, layout, shape) of the cases that launch it;

and for another card one of each (dtype, layout) of the largest maps. With --all all variants are.

Prints JSON: the kernels launched, and of what was compiled: kernel, case, registers, stack, shared memory, loads of 16
bytes. A process of its own, because under TRITON_INTERPRET kernels are not compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_attn.codes import ACTIVATIONS, COMBINES, LAYERS, POOLS, SELECTIONS, TIES
from fused_attn.kernels import (
    axis_pool,
    cbam,
    channel_gate,
    channel_pool,
    context_pool,
    criss_cross_attention,
    maps,
    mixed_scale,
    norm_gate,
    scale,
    select,
    simam,
    spatial_gate,
    squeeze,
)

TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
IDENTITY = ACTIVATIONS["identity"]
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
ALIGNED = [["tt.divisibility", 16]]


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    layer: str = "dense"
    layers: int = 2
    pool: str = "avg"
    ties: str = "first"
    pre: str = "identity"
    post: str = "identity"
    affine: bool = False
    residual: bool = False
    strided_grad: bool = False

    def __str__(self) -> str:
        return described(self)


def described(case: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in case._asdict().items() if v != case._field_defaults.get(k))


HEADLINE = ((32, 256, 56, 56), (32, 1024, 14, 14), (32, 2048, 7, 7), (1, 256, 56, 56))
SPATIAL = [shape[1:] for shape in HEADLINE[:2]]
CASES = [
    *(Case(s, d, cl) for s in HEADLINE for d in (torch.bfloat16, torch.float32) for cl in (False, True)),
    *(Case(s, channels_last=cl, residual=True, post="relu") for s in HEADLINE[:3] for cl in (False, True)),
    *(Case(HEADLINE[0], channels_last=cl, layer="conv", layers=1) for cl in (False, True)),
    *(Case(HEADLINE[0], layer="dense", layers=n) for n in (0, 1)),
    *(Case(HEADLINE[0], channels_last=cl, pool="avgmax", ties=t) for cl in (False, True) for t in TIES),
    *(Case(s, channels_last=cl, pool="both") for s in HEADLINE[:2] for cl in (False, True)),
    *(
        Case(HEADLINE[3], torch.float32, cl, pool="max", pre="silu", post="gelu", affine=True, residual=True)
        for cl in (False, True)
    ),
    Case((2, 40, 13, 17), torch.float64, pool="avgmax", ties="even", pre="relu", post="silu", affine=True),
    Case((2, 40, 13, 17), torch.float16, True, "circular", 1, "max", pre="hard_swish", affine=True, strided_grad=True),
]


class Selection(NamedTuple):
    """Branches of `select`; stacked: (B, M, C, *spatial) or, with "pixels", parts of the same pixels."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    paths: int = 2
    groups: int = 1
    stacked: str = ""
    gate: str = "softmax"
    pre: str = "identity"
    affine: bool = False
    strided_grad: bool = False

    def __str__(self) -> str:
        return described(self)


BRANCHES = ((32, 64, 56, 56), (32, 512, 7, 7), (1, 128, 28, 28))
WIDE = (4, 512, 56, 56)
LARGEST = (HEADLINE[0], BRANCHES[0], WIDE)
SELECTIONS_OF = [
    *(Selection(BRANCHES[0], d, cl) for d in (torch.bfloat16, torch.float32) for cl in (False, True)),
    *(Selection(s, channels_last=cl) for s in BRANCHES[1:] for cl in (False, True)),
    *(Selection(BRANCHES[0], channels_last=cl, pre="relu", affine=True) for cl in (False, True)),
    Selection(BRANCHES[0], torch.float32, stacked="planes", pre="relu", affine=True),
    Selection(BRANCHES[0], channels_last=True, stacked="pixels", groups=2),
    Selection(BRANCHES[1], torch.float32, True, stacked="pixels", pre="relu", affine=True),
    # Of many branches a thread loads 8 bytes each.
    Selection((32, 64, 28, 28), torch.float32, True, 4, pre="silu", affine=True, gate="sigmoid"),
    Selection((32, 64, 28, 28), paths=8, pre="silu", affine=True, gate="sigmoid"),
    Selection((2, 40, 13, 17), torch.float64, paths=3, groups=2, pre="silu", affine=True),
    Selection((2, 36, 13, 17), torch.float16, True, 8, 2, pre="hard_swish", affine=True, strided_grad=True),
]


class Cross(NamedTuple):
    """Of the value, with the channels of query and key."""

    shape: tuple[int, ...]
    depth: int
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = False
    other: bool = False  # query and key lie in the other order

    def __str__(self) -> str:
        return described(self)


CROSSES = [
    *(Cross(WIDE, 64, d, cl) for d in (torch.bfloat16, torch.float32) for cl in (False, True)),
    Cross((2, 512, 97, 97), 512, other=True),
    Cross((2, 301, 33, 70), 75),  # an address for each element
    Cross((2, 40, 13, 17), 5, torch.float64),
    Cross((2, 40, 13, 17), 20, torch.float16, True, other=True),
]

#: Of mixed_scale, (combine, gates).
MIXED = (
    ("sigmoid", ("channel", "spatial")),
    ("max", ("channel", "spatial")),
    ("sum", ("spatial", "rows", "columns")),
    ("product", ("channel", "spatial", "rows", "columns")),
    ("strips", ("rows", "columns")),
    ("gate", ("spatial",)),
)


def mixed_gates(case: Case, make: Any) -> dict[str, torch.Tensor]:
    batch, channels, height, width = case.shape
    shapes = {"channel": (), "spatial": (height, width), "rows": (height, 1), "columns": (1, width)}
    return {name: make(batch, 1 if name == "spatial" else channels, *shape) for name, shape in shapes.items()}


def launches(case: Case) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, arguments) of every launch of all ops, forward and backward."""

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.dtype, device="meta")

    channels = case.shape[1]
    x = make(*case.shape)
    x = x.to(memory_format=torch.channels_last) if case.channels_last else x
    hidden = max(channels // 16, 1)
    weights = [None] * 4
    if case.layers == 2:
        weights = [make(hidden, channels), make(hidden), make(channels, hidden), make(channels)]
    elif case.layers == 1:
        weights = [make(channels, channels) if case.layer == "dense" else make(1, 1, 5), None, None, None]
    affine = (make(channels), make(channels)) if case.affine else (None, None)
    residual = torch.empty_like(x) if case.residual else None
    pre, post = ACTIVATIONS[case.pre], ACTIVATIONS[case.post]
    pools = POOLS[case.pool], TIES[case.ties]
    keeps_y = case.post == "relu"
    grad = make(*case.shape, 2)[..., 0] if case.strided_grad else torch.empty_like(x)

    with recorded() as found:
        codes = (LAYERS[case.layer], *pools, ACTIVATIONS["relu"], ACTIVATIONS["sigmoid"], pre, post)
        y, state, index = channel_gate.channel_gate(x, *weights, *affine, residual, *codes)
        kept = (y, None) if keeps_y else (None, residual)
        channel_gate.channel_gate_backward(grad, x, kept[0], state, index, *weights, *affine, kept[1], *codes)
        _, numbers = simam.simam(x, 1e-4)
        simam.simam_backward(grad, x, numbers)
        to_logit, shift = make(1, channels, 1, 1), make(1) if case.affine else None
        context, *kept_context = context_pool.context_pool(x, to_logit, shift)
        for of_map, of_gate in ((grad, context), (grad, None), (None, None)):
            context_pool.context_pool_backward(of_map, of_gate, context, x, to_logit, shift, *kept_context)
        moments, of_norm = norm_gate.moments(x), (make(channels), make(channels)) if case.affine else (None, None)
        norm, _, descriptor = norm_gate.norm_coefficients(x, moments, *of_norm, 1e-5, not case.affine)
        norm_gate.norm_running(*of_norm, make(channels), make(channels), 1e-5)
        rows = x.new_empty((4, case.shape[0], channels), dtype=maps.accumulator(x.dtype))
        gate = None if case.strided_grad else rows[0]
        for norm_pre in {pre, IDENTITY, ACTIVATIONS["silu"]}:
            _, bits = norm_gate.norm_scale(x, gate, norm, residual, norm_pre, post, keeps_y)
            kept_bits = bits if keeps_y else None
            sums, _ = norm_gate.norm_dots(grad, x, kept_bits, kept[1], norm, gate, norm_pre, post)
            of_s = None if case.affine else descriptor
            *_, factors, constants = norm_gate.norm_factors(x, sums, of_s, norm, not case.affine)
            norm_gate.norm_gradients(grad, x, norm, factors, constants, norm_pre)
        for gate in (make(*case.shape[:2]), make(case.shape[0], 1, *case.shape[2:])):
            scale.scale(x, gate, *affine, residual, pre, post)
            scale.scale_backward(grad, x, kept[0], gate, *affine, kept[1], pre, post)
        if case.pool != "both":  # which squeeze calls avgmax
            average, peak, place = squeeze.squeeze(x, *affine, pre, *pools)
            to_avg = None if case.pool == "max" else average
            squeeze.squeeze_backward(to_avg, None if case.pool == "avg" else peak, x, peak, place, *affine, pre, *pools)
        plain = case.layers == 2 and case.layer == "dense" and case.shape[1:] in SPATIAL and not case.residual
        if not (case.affine or plain and case.dtype == torch.bfloat16):  # the spatial gates: as many kernels again
            return found
        for combine, names in MIXED:
            gates = (gate if name in names else None for name, gate in mixed_gates(case, make).items())
            arguments = x, *gates, COMBINES[combine]
            mixed_scale.mixed_scale(*arguments)
            mixed_scale.mixed_scale_backward(grad, *arguments)
        for axis_codes in ((0, 0, 0), (1, 0, TIES[case.ties]), (1, 1, TIES[case.ties])):
            tables = axis_pool.axis_pool(x, *axis_codes)
            grads = grad, tables[0], tables[1], tables[2] if axis_codes[1] else None
            axis_pool.axis_pool_backward(*grads, x, *tables, *axis_codes)
        space_codes = (0, TIES[case.ties], ACTIVATIONS["sigmoid"], pre, post)
        norm = (make(1), make(1)) if case.affine else (None, None)
        spatial = (make(1, 2, 7, 7), make(1), *norm)
        _, *states = spatial_gate.spatial_gate(x, *spatial, *affine, residual, 1e-5, *space_codes)
        spatial_gate.spatial_gate_backward(grad, x, kept[0], *states, *spatial, *affine, kept[1], 1e-5, *space_codes)
        pooled, place = channel_pool.channel_pool(x, *affine, pre, 0, TIES[case.ties])
        channel_pool.channel_pool_backward(pooled, x, pooled, place, *affine, pre, 0, TIES[case.ties])
        both_codes = (1e-5, *codes[:5], *space_codes)
        _, *states = cbam.cbam(x, *weights, *spatial, *affine, residual, *both_codes)
        cbam.cbam_backward(grad, x, kept[0], *states, *weights, *spatial, *affine, kept[1], *both_codes)
    return found


def launches_of_select(case: Selection) -> list[tuple[Any, dict[str, Any]]]:
    batch, channels, *space = case.shape

    def make(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=case.dtype, device="meta")

    def in_layout(*shape: int, pixels: bool = True) -> torch.Tensor:
        """(B, [M,] C, *spatial); the M of channels_last branches in their pixels or outside."""
        if not case.channels_last:
            return make(*shape, *space)
        outside, inside = (shape[:1], shape[1:]) if pixels else (shape[:-1], shape[-1:])
        axes = range(len(outside), len(outside) + len(space))
        return make(*outside, *space, *inside).movedim(tuple(axes), tuple(range(-len(space), 0)))

    if case.stacked:
        branches = [in_layout(batch, case.paths, channels, pixels=case.stacked == "pixels")]
    else:
        branches = [in_layout(batch, channels)] * case.paths
    hidden = case.groups * max(channels // 16, 32 // case.groups)
    outputs = case.paths * channels
    layers = make(hidden, channels // case.groups), make(hidden), make(outputs, hidden // case.groups), make(outputs)
    affine = (make(case.paths, channels), make(case.paths, channels)) if case.affine else (None, None)
    pre = ACTIVATIONS[case.pre]
    grad = make(*case.shape, 2)[..., 0] if case.strided_grad else in_layout(batch, channels)
    codes = case.paths, case.groups, ACTIVATIONS["relu"], SELECTIONS[case.gate], pre
    with recorded() as found:
        y, state = select.select(branches, *layers, *affine, *codes)
        select.select_backward(grad, branches, state, *layers, *affine, *codes)
        phase = case.paths, *affine, pre
        s = select.select_squeeze(branches, *phase)
        weights = make(batch, case.paths, channels)
        select.select_sum(branches, weights, *phase)
        select.select_dots(grad, branches, *phase)
        select.select_gradients(grad, branches, weights, s, *phase)
    return found


def launches_of_cross(case: Cross) -> list[tuple[Any, dict[str, Any]]]:
    batch, channels, *space = case.shape

    def in_layout(channels: int, channels_last: bool) -> torch.Tensor:
        t = torch.empty((batch, channels, *space), dtype=case.dtype, device="meta")
        return t.to(memory_format=torch.channels_last) if channels_last else t

    query, key = (in_layout(case.depth, case.channels_last != case.other) for _ in range(2))
    value = in_layout(channels, case.channels_last)
    with recorded() as found:
        out, state = criss_cross_attention.criss_cross_attention(query, key, value)
        criss_cross_attention.criss_cross_attention_backward(out, query, key, value, out, state)
    return found


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Launches made within, instead of them."""
    found: list[tuple[Any, dict[str, Any]]] = []
    launch, launch_where = maps.launch, maps.launch_where
    maps.launch = lambda kernel, on, programs, /, **given: found.append((kernel, given))
    maps.launch_where = lambda there, kernel, on, programs, /, **given: found.append((kernel, given))
    try:
        yield found
    finally:
        maps.launch, maps.launch_where = launch, launch_where


class Fact(NamedTuple):
    """What a kernel's compiler knows of one argument."""

    place: tuple[int, ...]  # of the parameter, and of the number in its tuple
    kind: str
    aligned: bool = False  # a multiple of 16
    constant: Any = None


class Variant(NamedTuple):
    """One compilation of a kernel: a launch of other facts or options is another one."""

    kernel: Any
    facts: tuple[Fact, ...]
    options: tuple[tuple[str, Any], ...]


def fact(place: tuple[int, ...], value: Any, constant: bool, specialized: bool) -> Fact:
    """As Triton's launcher sees it, with 16-byte aligned pointers."""
    if isinstance(value, torch.Tensor) and not constant:
        return Fact(place, TYPES[value.dtype], True)
    if constant or not isinstance(value, int) or (specialized and value == 1):
        return Fact(place, "constexpr", constant=value)
    return Fact(place, "i32" if value < 2**31 else "i64", specialized and value % 16 == 0)


def variant(kernel: Any, given: dict[str, Any]) -> Variant:
    facts = []
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, tuple):  # Triton specializes the numbers in it
            facts += [fact((i, k), v, False, True) for k, v in enumerate(value)]
        else:
            facts.append(fact((i,), value, parameter.is_constexpr, not parameter.do_not_specialize))
    return Variant(kernel, tuple(facts), tuple((name, given[name]) for name in OPTIONS if name in given))


def variants() -> dict[str, dict[Variant, list[Any]]]:
    """Of each kernel, by name, what the launches of all cases compile, with the cases."""
    found: dict[str, dict[Variant, list[Any]]] = {}
    of = {Case: launches, Selection: launches_of_select, Cross: launches_of_cross}
    for case in (*CASES, *SELECTIONS_OF, *CROSSES):
        for kernel, given in of[type(case)](case):
            found.setdefault(kernel.__name__, {}).setdefault(variant(kernel, given), []).append(case)
    return found


def covering(found: dict[Variant, list[Any]], capability: int) -> list[Variant]:
    """Few of a kernel's variants in which everything that the module's docstring names occurs."""
    if capability == 90:
        wanted = {
            v: {*v.facts, *v.options, *((case.dtype, case.channels_last, case.shape) for case in cases)}
            for v, cases in found.items()
        }
    else:
        largest = {v: [case for case in cases if case.shape in LARGEST] for v, cases in found.items()}
        cases_of = largest if any(largest.values()) else found
        wanted = {v: {(case.dtype, case.channels_last) for case in cases} for v, cases in cases_of.items()}
    chosen, left = [], set().union(*wanted.values())
    while left:
        chosen.append(max(wanted, key=lambda v: len(wanted[v] & left)))
        left -= wanted[chosen[-1]]
    return chosen


def compiled(variant: Variant, capability: int) -> Any:
    signature: dict[str, Any] = {}
    for place, kind, *_ in variant.facts:
        name = variant.kernel.params[place[0]].name
        signature[name] = kind if len(place) == 1 else (*signature.get(name, ()), kind)
    constants = {fact.place: fact.constant for fact in variant.facts if fact.kind == "constexpr"}
    hints = {fact.place: ALIGNED for fact in variant.facts if fact.aligned}
    source = ASTSource(variant.kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))


def usage(binary: Any) -> dict[str, int]:
    """Registers and stack of a cubin, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", out)[1]) for name in ("REG", "STACK", "LOCAL")}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("capability", type=int)
    arguments.add_argument("kernels", nargs="+")
    arguments.add_argument("--all", action="store_true")
    given = arguments.parse_args()
    launched, records = variants(), []
    for name in given.kernels:
        found = launched.get(name, {})
        for variant in found if given.all else covering(found, given.capability):
            binary, case = compiled(variant, given.capability), found[variant][0]
            loads = len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"]))
            record = {"kernel": name, "case": str(case), "loads of 16 bytes": loads} | usage(binary)
            warps, shared = binary.metadata.num_warps, binary.metadata.shared
            records.append(record | {"warps": warps, "shared": shared, "dtype": str(case.dtype)})
    json.dump({"launched": sorted(launched), "compiled": records}, sys.stdout)


if __name__ == "__main__":
    main()
