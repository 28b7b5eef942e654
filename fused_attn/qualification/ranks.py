"""The ranks of torch.distributed: one a host and card measures, and all come to the same verdicts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ..verdicts import Question, Shape, Verdict

Key = tuple[Question, Shape]
#: By what was asked, the verdict, or why there is none.
Found = dict[Key, "Verdict | str"]


def host() -> str:
    return socket.gethostname()


def rank() -> int:
    return dist.get_rank() if _is_up() else 0


def _is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def gathered(value: Any, device: torch.device) -> list[Any]:
    """What every rank gives, in their order; the value alone where there are none. device: for the transport."""
    if not _is_up():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        dist.all_gather_object(everyone, value)
    return everyone


def combined(everyone: Iterable[Found]) -> Found:
    """A backend serves where all hosts that were asked found it the best; where they differ plain PyTorch does."""
    answers: dict[Key, list[Verdict | str]] = {}
    for found in everyone:
        for key, answer in found.items():
            answers.setdefault(key, []).append(answer)
    return {key: _agreed(key, of) for key, of in answers.items()}


def _agreed(key: Key, answers: list[Verdict | str]) -> Verdict | str:
    verdicts = [a for a in answers if isinstance(a, Verdict)]
    if not verdicts:
        return answers[0]
    sample, weights = (min(sizes) for sizes in zip(*(v.room for v in verdicts), strict=True))
    first = verdicts[0]._replace(room=(sample, weights))
    names, anywhere = {v.backend for v in verdicts}, {v.anywhere for v in verdicts}
    if len(verdicts) < len(answers) or len(names) > 1:
        names, anywhere = {"reference"}, {"reference"}
        shown = dict.fromkeys(f"{a.backend} ({a.why})" if isinstance(a, Verdict) else a for a in answers)
        first = first._replace(why=f"the hosts differ: {'; '.join(shown)}")
    return first._replace(backend=names.pop(), anywhere=anywhere.pop() if len(anywhere) == 1 else "reference")
