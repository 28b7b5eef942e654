"""Numerical checks: every block's calls, as a card that qualifies itself checks them (`fused_attn.qualification`).

A cover, so that few kernels are compiled: each block in training under autocast or in one precision, in one of the
layouts, and the resident kernels, which are compiled already, on all shapes. `pytest -m gpu` checks much more.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fused_attn
from fused_attn.backends import unavailable
from fused_attn.bench.blocks import BLOCKS
from fused_attn.qualification.calls import Call, seen
from fused_attn.qualification.trial import Judge

from .rows import DTYPES, Row, Setting, sized

SECONDS, STEP = 130, 60

#: (block, shape, precision, layout, training). "amp": the map in bfloat16, parameters in float32, under autocast.
Case = tuple[str, tuple[int, ...], str, str, bool]
COVER: tuple[Case, ...] = (
    ("se", (4, 256, 56, 56), "amp", "channels_last", True),
    ("cbam", (4, 256, 56, 56), "amp", "channels_last", True),
    ("eca", (4, 512, 28, 28), "bfloat16", "nchw", True),
    ("norm-gate", (4, 256, 56, 56), "amp", "channels_last", True),
    ("sk", (4, 128, 28, 28), "amp", "channels_last", True),
    ("se-residual-relu", (1, 1024, 14, 14), "float32", "nchw", True),
    ("se-max", (4, 64, 14, 14), "float16", "channels_last", True),
    ("norm-silu-gate", (4, 96, 28, 28), "float32", "nchw", True),
    ("cbam-batch-norm", (4, 64, 14, 14), "float32", "nchw", True),
    ("split-attention", (4, 128, 14, 14), "amp", "nchw", True),
    ("triplet", (4, 64, 28, 28), "amp", "channels_last", True),
    ("coordinate", (4, 64, 28, 28), "float32", "nchw", True),
    ("simam", (4, 64, 28, 28), "amp", "channels_last", True),
    ("global-context", (4, 256, 14, 14), "amp", "channels_last", True),
    ("scse", (4, 64, 28, 28), "float32", "nchw", True),
    ("select", (4, 64, 28, 28), "bfloat16", "channels_last", True),
    ("channel-attention", (4, 256, 14, 14), "float32", "channels_last", True),
    ("criss-cross", (1, 128, 33, 33), "amp", "nchw", True),
    ("response-norm", (4, 128, 28, 28), "float32", "nchw", True),
    ("srm", (4, 128, 28, 28), "float32", "nchw", True),
    ("se", (1, 2048, 7, 7), "bfloat16", "channels_last", False),
    ("norm-add-relu", (4, 64, 28, 28), "amp", "nchw", False),
)
RESIDENT: tuple[Case, ...] = tuple(
    (block, (4, *shape), precision, layout, True)
    for block in ("se", "eca", "cbam", "spatial-attention", "select")
    for precision, layout in (("bfloat16", "channels_last"), ("float32", "nchw"))
    for shape in ((256, 56, 56), (64, 112, 112), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
)
#: With the backend.
DRY: tuple[tuple[str, Case], ...] = (
    ("cpu", ("se", (2, 16, 6, 6), "amp", "channels_last", True)),
    ("cpu", ("eca", (2, 16, 6, 6), "float32", "nchw", True)),
    ("cpu", ("spatial-attention", (2, 16, 6, 6), "float32", "nchw", True)),
    ("cuda", ("se", (2, 16, 6, 6), "amp", "channels_last", True)),
    ("cuda", ("cbam", (2, 16, 6, 6), "float32", "nchw", True)),
    ("cuda", ("select", (2, 16, 6, 6), "float32", "channels_last", True)),
    ("cpu", ("simam", (2, 16, 6, 6), "float32", "nchw", False)),
)


def cases(setting: Setting) -> list[tuple[str, Case]]:
    """With the backend that is checked."""
    if setting.dry:
        return list(DRY)
    streaming = [("triton", case) for case in COVER]
    resident = [("cuda", case) for case in (*COVER, *RESIDENT)]
    return streaming[:8] + resident[:2] + streaming[8:] + resident[2:]


def rows(setting: Setting) -> list[Row]:
    kernels = [Row("compile", "compile")]
    return kernels + [Row(key_of(b, c), f"{b} {c[0]}", (b, *c)) for b, c in cases(setting)]


def key_of(backend: str, case: Case) -> str:
    block, shape, precision, layout, training = case
    return f"{block} {backend} {precision} {layout} {sized(shape)} {'training' if training else 'inference'}"


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    if row.key == "compile":
        from .kernels import compile_ahead  # which needs Triton

        return compile_ahead(setting)
    backend, *case = row.what
    judge, training = judge_of(setting), row.what[-1]
    calls = [call for call in calls_of(*case) if unavailable(backend, call.question.op, setting.device.type) is None]
    if not calls:
        return {"status": "absent", "why": "no kernels of this backend for it"}
    reasons = {call.question.op: judge.against(call, training, backend) for call in calls}
    wrong = {op: why for op, why in reasons.items() if why is not None}
    if not wrong:
        return {"status": "ok", "ops": list(reasons)}
    why = "; ".join(f"{op}: {reason}" for op, reason in wrong.items())
    fits = not all("shared memory of a cluster" in reason for reason in wrong.values())
    refused = all(reason.startswith("cannot serve it") for reason in wrong.values())
    return {"status": ("failed" if refused else "wrong") if fits else "does not fit", "why": why}


@functools.cache
def judge_of(setting: Setting) -> Judge:
    return Judge(setting.device, lambda names: None)


def calls_of(block: str, shape: tuple[int, ...], precision: str, layout: str, training: bool) -> list[Call]:
    """What a block calls on such a map: run without data, on the CPU."""
    module = BLOCKS[block].build(fused_attn.nn, shape[1], len(shape) - 2)
    module.to(torch.float32 if precision == "amp" else DTYPES[precision]).train(training)
    return seen_in(module, shape, DTYPES[precision], layout, precision == "amp", 1 + BLOCKS[block].residual, training)


def seen_in(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, layout: str, amp: bool, maps: int, training: bool
) -> list[Call]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=amp))
        inputs = [empty(shape, dtype, layout) for _ in range(maps)]
        with seen() as found:
            module(*inputs)
    return found


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "nchw":
        return torch.empty(shape, dtype=dtype)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype).movedim(-1, 1)


def streamed(setting: Setting) -> Iterator[tuple[Call, bool]]:
    """(call, training) of all that the streaming kernels are checked on; a dry run has one."""
    for case in [DRY[-1][1]] if setting.dry else COVER:
        for call in calls_of(*case):
            yield call, case[-1]
