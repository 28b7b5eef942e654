"""Blocks beside eager and torch.compile: device time, wall time, bytes a second, peak memory.

Device time is that of a CUDA graph replayed over rotated inputs and outputs beyond twice the L2 cache, so that nothing
is in it when it is used again. All candidates take turns. A speed is given only where output and gradients agree with
float64 in this process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn.bench import blocks
from fused_attn.bench.measure import copy_bandwidth, peak_memory
from fused_attn.equivalence import assert_equivalent
from fused_attn.qualification.trial import served
from fused_attn.timing import Timing, digits, graph_of, in_turn, interleaved, last_cache, nth

from .rows import DTYPES, Row, Setting, first_line, sized, state_of_card

SECONDS, STEP = 130, 60
#: Of the seconds, those in which all cores compile what the first rows need, and how many rows that are.
WARM, FIRST = 0.35, 64
MOST_COPIES = 256

#: What is measured first, and what is not among the first.
TELLING = ("se", "cbam-batch-norm", "norm-gate", "sk", "eca", "select", "norm-silu-gate", "cbam")
OTHERS = tuple(name for name in blocks.BLOCKS if name not in TELLING and blocks.BLOCKS[name].passes is not None)
#: (dtype, layout, how many shapes later than the first).
KINDS = (("bfloat16", "channels_last", 0), ("bfloat16", "nchw", 2), ("float32", "channels_last", 4))
DRY = (("se", (2, 16, 14, 14)), ("norm-gate", (2, 16, 14, 14)), ("bam", (1, 32, 8, 8)))


def rows(setting: Setting) -> list[Row]:
    copy = Row("copy", "copy")
    if setting.dry:
        kinds = [("float32", "nchw"), ("bfloat16", "channels_last"), ("float32", "nchw")]
        return [copy] + [row_of(*case, *kind) for case, kind in zip(DRY, kinds, strict=True)]
    found: list[tuple[int, Row]] = []
    for kind, (dtype, layout, later) in enumerate(KINDS):
        for name in (*TELLING, *OTHERS) if kind < 2 else TELLING[:5]:
            for place, shape in enumerate(blocks.SHAPES[blocks.BLOCKS[name].shapes]):
                later_block = 0 if name in TELLING else 3
                found.append((place + later + later_block, row_of(name, shape, dtype, layout)))
    return [copy, *(row for _, row in sorted(found, key=lambda pair: pair[0]))]


def row_of(name: str, shape: tuple[int, ...], dtype: str, layout: str) -> Row:
    return Row(f"{name} {dtype} {layout} {sized(shape)}", name, (name, shape, dtype, layout))


@functools.cache
def bytes_of_copy(device: torch.device) -> float:
    return copy_bandwidth(device, 1 << (20 if device.type == "cpu" else 30))


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    device = setting.device
    if row.key == "copy":
        facts = {"bytes a second": bytes_of_copy(device), "last cache": last_cache(device)}
        return {"status": "ok", **facts, "state": state_of_card()}
    name, shape, dtype, layout = row.what
    made = Made(name, shape, DTYPES[dtype], layout, device, copies_for(setting, name, shape, DTYPES[dtype]))
    candidates: dict[str, tuple[nn.Module, str]] = {"eager": (made.eager, "reference")}
    answers: dict[str, dict[str, str]] = {}
    for backend in setting.backends:
        answers[backend] = agreement(made, backend)
        if answers[backend]["status"] == "ok":
            candidates[backend] = made.ours, backend
    states = [answer["status"] for answer in answers.values()]
    worst = next((status for status in ("wrong", "failed") if status in states), None)
    found = {"status": worst or ("ok" if "ok" in states else states[0]), "backends": answers}
    if worst or "ok" not in states:
        found["why"] = "; ".join(f"{b}: {answer['why']}" for b, answer in answers.items() if "why" in answer)
    torch._dynamo.reset()
    compiled = torch.compile(made.eager)
    try:
        for what in ("forward", "forward + backward"):
            made.calls(compiled, "reference", what)[0]()
        candidates["compile"] = compiled, "reference"
    except Exception as error:  # of torch's compiler
        answers["compile"] = {"status": "refused", "why": first_line(error)}
    found["passes"] = {what: timed(setting, made, candidates, what) for what in ("forward", "forward + backward")}
    return {**found, "state": state_of_card()}


def rows_to_warm(setting: Setting) -> list[Row]:
    return [row for row in rows(setting)[:FIRST] if row.what]


def warm(setting: Setting, row: Row) -> None:
    """Have the disk hold what torch.compile and Triton make for the row."""
    name, shape, dtype, layout = row.what
    made = Made(name, shape, DTYPES[dtype], layout, setting.device, 1)
    torch._dynamo.reset()
    for module, backend in ((torch.compile(made.eager), "reference"), (made.ours, setting.backends[0])):
        for what in ("forward", "forward + backward"):
            made.calls(module, backend, what)[0]()


class Made:
    """A block twice, with the same weights, and so many copies of its maps and their gradients.

    In evaluation mode where there is one sample: its BatchNorms may have one value a channel, on which none trains.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device, copies: int
    ) -> None:
        torch.manual_seed(0)  # which of two almost equal numbers is the largest is not to change between runs
        block = blocks.BLOCKS[name]
        pair = blocks.pair(name, shape[1], dtype, device, len(shape) - 2)
        self.eager, self.ours = (module.train(shape[0] > 1) for module in pair)
        self.device = device
        self.inputs = [
            tuple(blocks.make_map(shape, dtype, layout, device) for _ in range(1 + block.residual))
            for _ in range(copies)
        ]
        sizes = blocks.forward_call(self.eager, self.inputs[0])().shape
        self.grads = [blocks.make_map(sizes, dtype, layout, device) for _ in range(copies)]
        self.bytes, self.reads = self.inputs[0][0].nbytes, block.passes

    def calls(self, module: nn.Module, backend: str, what: str) -> list[Callable[[], object]]:
        """One for each copy, served by that backend."""
        found: list[Callable[[], object]] = []
        for inputs, grad in zip(self.inputs, self.grads, strict=True):
            forward = what == "forward"
            call = blocks.forward_call(module, inputs) if forward else blocks.training_call(module, inputs, grad)
            found.append(functools.partial(served, backend, call))
        return found


def copies_for(setting: Setting, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """So many that inputs and outputs of the forward are beyond twice the last cache, two at least."""
    if setting.dry:
        return 2
    bytes_ = dtype.itemsize * torch.Size(shape).numel() * (2 + blocks.BLOCKS[name].residual)
    return min(max(2, -(-2 * last_cache(setting.device) // bytes_)), MOST_COPIES)


def agreement(made: Made, backend: str) -> dict[str, str]:
    """Whether output and all gradients are as good as eager's, by the rule of the tests."""

    count = len(made.inputs[0])
    inputs = dict(zip(("x", "residual"), made.inputs[0], strict=False)) | dict(made.ours.named_parameters())

    def of(module: nn.Module, name: str) -> Callable[..., Tensor]:
        def function(**given: Tensor) -> Tensor:
            maps = [given.pop(key) for key in ("x", "residual")[:count]]
            buffers = {k: cast(v, maps[0].dtype) for k, v in module.named_buffers()}
            with fused_attn.backend(name):
                return torch.func.functional_call(module, given | buffers, tuple(maps))

        return function

    try:
        ours, eager = of(made.ours, backend), of(made.eager, "reference")
        assert_equivalent(ours, eager, inputs, made.grads[:1], chance=True)
    except AssertionError as error:
        return {"status": "wrong", "why": first_line(error)}
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = first_line(error)
        if "shared memory of a cluster" in why:
            return {"status": "does not fit", "why": why}
        return {"status": "refused" if "cannot serve" in why else "failed", "why": why}
    return {"status": "ok"}


def cast(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy: it is written into."""
    return buffer.to(dtype, copy=True) if buffer.is_floating_point() else buffer.clone()


def timed(
    setting: Setting, made: Made, candidates: dict[str, tuple[nn.Module, str]], what: str
) -> dict[str, dict[str, Any]]:
    """By candidate: medians and spread by both clocks, bytes a second, and the bytes at the peak."""
    device, copies, budget = setting.device, len(made.inputs), setting.budget(0.15)
    calls = {name: made.calls(module, backend, what) for name, (module, backend) in candidates.items()}
    wall = interleaved({n: in_turn(of) for n, of in calls.items()}, device, budget=budget, least=5)
    found: dict[str, dict[str, Any]] = {
        n: {"wall": digits(t.median), "wall spread": round(t.spread, 3)} for n, t in wall.items()
    }
    on_device = wall
    if device.type == "cuda":
        graphs: dict[str, Callable[[], None]] = {}
        for name, of in calls.items():
            try:
                graphs[name] = graph_of(functools.partial(nth, of), copies)
            except RuntimeError as error:  # it cannot be captured
                found[name]["no graph"] = first_line(error)
        replays = interleaved(graphs, device, budget=budget, least=5)
        on_device = {n: Timing([s / copies for s in t.seconds]) for n, t in replays.items()}
    passes = made.reads and made.reads[what != "forward"]
    for name, timing in on_device.items():
        found[name] |= {"device": digits(timing.median), "spread": round(timing.spread, 3)}
        if passes:
            rate = passes * made.bytes / timing.median
            found[name] |= {"bytes a second": float(f"{rate:.4g}"), "of copy": round(rate / bytes_of_copy(device), 3)}
    for name, of in calls.items():
        found[name]["peak bytes"] = peak_memory(of[0], device)
    return found
