"""qualify(model, *inputs): which backend is right and fastest on this device, for the calls of this model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fusion.api import running
from .qualification import busy, settle
from .qualification.calls import buffers_kept, calls_on, maps_in_run, seen, typical_calls, without_data
from .qualification.parent import Job
from .verdicts import Verdict, name_of


class Qualified(list[Verdict]):
    """Verdicts, one a call and mode; printed as a table."""

    def __str__(self) -> str:
        if not self:
            return "no call that a backend could serve"
        head = ("op", "dtype", "layout", "mode", "channels", "positions", "bytes", "served by", "why")
        rows = [head, *map(_row, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _row(verdict: Verdict) -> tuple[str, ...]:
    question, shape = verdict.question, verdict.shape
    mode = "training" if question.training else "inference"
    powers = (f"2^{n}" for n in (shape.channels, shape.positions, shape.bytes))
    return question.op, str(name_of(question.dtype)), shape.layout, mode, *powers, verdict.backend, verdict.why


def qualify(model: nn.Module, *inputs: Any, **keywords: Any) -> Qualified:
    """Find out which backend is right and fastest on the model's device for what it calls, and use it from now on.

    It is measured once a device and version, in a process of its own: an op serves where its results are as good as
    those of plain PyTorch, forward and every gradient, on maps of these sizes and on odd ones, and where it is at least
    5 % faster; elsewhere plain PyTorch serves. What was found is kept in the user's cache (FUSED_ATTN_CACHE, or
    fused_attn in XDG_CACHE_HOME or ~/.cache). `fuse` of a model on a GPU does this by itself, for maps of usual sizes.

    Where `torch.distributed` is initialised, all ranks call it together and come to the same verdicts.

    Args:
        model: a fused model (see `fuse`), or one with modules of `fused_attn.nn`.
        inputs, keywords: what its forward takes; dtypes, layouts and autocast count. It is run once, in evaluation mode
            without gradients; parameters, buffers, modes and random state stay as they are. None: maps of usual sizes.

    Returns:
        The verdicts, printable.

    Raises:
        TypeError: model is no `nn.Module`.
        RuntimeError: it is called where torch traces, captures or runs a backward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module; got {type(model).__name__}")
    if why := busy():
        raise RuntimeError(f"qualify: not while {why}")
    blocks = list(running(model))
    tensor = next((t for t in (*model.parameters(), *model.buffers(), *inputs) if isinstance(t, Tensor)), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    try:
        given = inputs or keywords
        jobs = _jobs_of_run(model, blocks, inputs, keywords) if given else map(Job._make, typical_calls(model, blocks))
    except Exception:
        settle([], device)  # other ranks wait for this one
        raise
    return Qualified(settle(jobs, device))


def _jobs_of_run(
    model: nn.Module, blocks: list[nn.Module], inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> list[Job]:
    """What a run of the model calls, and what its blocks call on the same maps in either mode."""
    cards = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(cards), buffers_kept(model), torch.compiler.set_stance("force_eager"), seen() as found:
        maps = maps_in_run(model, blocks, inputs, keywords, without_data)
    jobs = [Job(call, training) for call in found for training in (False, True)]
    for block, x in maps:
        jobs += [Job(call, training) for call in calls_on(block, x, False) for training in (False, True)]
        jobs += [Job(call, True) for call in calls_on(block, x, True)]
    return jobs
