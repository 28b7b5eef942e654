"""A card qualifies itself: which backend is right and faster on it is measured there, before anything runs.

`settle` finds the verdicts on the calls of a model, from the tables that ship, from the user's cache, or in a process
of its own (`parent`, `child`, `trial`), and `backends` reads them from then on. It is for `fuse` and `qualify`: never
in a forward, and not where torch traces, captures or differentiates.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable

import torch

from .. import backends
from ..ops.resident import limits_of
from ..verdicts import Environment, Verdict, cached, environment_of, keep, one_at_a_time, say_once, shipped
from . import ranks
from .parent import Job, measure
from .ranks import Found, Key

#: A host and the environment of one of its devices: of its ranks that have such a device one measures.
Place = tuple[str, str]

#: Types of devices on which `fuse` qualifies by itself. A processor's backend is there without it.
BY_FUSE = frozenset({"cuda"})


def busy() -> str | None:
    """Why nothing may be measured now, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces this"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces this"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func sees through this"
    if torch._C._len_torch_dispatch_stack():
        return "a dispatch mode sees this, as where tensors are fake"
    if torch._C._current_graph_task_id() != -1:
        return "this is run by a backward, as where a checkpoint is recomputed"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is captured"
    return None


def settle(jobs: Iterable[Job], device: torch.device) -> list[Verdict]:
    """Verdicts on these calls, which hold in this process from now on. Where torch.distributed is up, all ranks call it
    together.

    device: of this process, where it has several, for the ranks' transport.
    """
    here: dict[Place, tuple[torch.device, dict[Key, Job]]] = {}
    devices: dict[torch.device, Place] = {}
    for job in filter(_has_candidates, jobs):
        at = job.call.device
        if at not in devices:
            devices[at] = ranks.host(), repr(environment_of(at))
        _, of_place = here.setdefault(devices[at], (at, {}))
        of_place.setdefault(job.call.asked(job.training), job)
    everyone = ranks.gathered({place: wanted for place, (_, wanted) in here.items()}, device)
    found: list[Found] = []
    for place, (at, _) in here.items():
        asking = [of_rank[place] for of_rank in everyone if place in of_rank]
        if next(i for i, of_rank in enumerate(everyone) if place in of_rank) == ranks.rank():
            found.append(_found_here({key: job for wanted in asking for key, job in wanted.items()}, at))
    answers = ranks.combined(of for of_rank in ranks.gathered(found, device) for of in of_rank)
    verdicts = [answer for answer in answers.values() if isinstance(answer, Verdict)]
    missing = [answer for answer in answers.values() if isinstance(answer, str)]
    if missing:
        say_once(f"{len(missing)} of {len(answers)} calls could not be measured; the first: {missing[0]}")
    for at in devices:
        for device in _alike(at):
            backends.install(device, verdicts)
    return verdicts


def _alike(device: torch.device) -> list[torch.device]:
    """The devices of this process that are like it: a model has copies on others, or is moved there."""
    if device.type != "cuda":
        return [device]
    every = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [other for other in every if environment_of(other) == environment_of(device)]


def _has_candidates(job: Job) -> bool:
    op, device = job.call.question.op, job.call.device.type
    return any(backends.unavailable(name, op, device) is None for name in backends.CANDIDATES.get(device, ()))


def _found_here(wanted: dict[Key, Job], device: torch.device) -> Found:
    """From the tables that ship, from the cache, and what is in neither is measured. It raises nothing: other ranks
    wait for what is found."""
    found: Found = {}
    try:
        environment = environment_of(device)
        found = _among(wanted, shipped(environment))
        if len(found) < len(wanted):
            with one_at_a_time(environment):
                found = _among(wanted, cached(environment)) | found
                missing = {key: job for key, job in wanted.items() if key not in found}
                if missing:
                    found |= _measured(missing, device, environment)
    except Exception as error:
        return {key: f"{type(error).__name__}: {error}" for key in wanted} | found
    return found


def _among(wanted: dict[Key, Job], verdicts: Iterable[Verdict]) -> Found:
    """Of what can serve here, whatever a file says."""
    return {key: v for v in verdicts if (key := v.asked) in wanted and _can_serve(v, wanted[key].call.device)}


def _can_serve(verdict: Verdict, device: torch.device) -> bool:
    """Also where the kernels were built for other cards."""
    names = {verdict.backend, verdict.anywhere}
    if any(backends.unavailable(name, verdict.question.op, device.type) for name in names):
        return False
    if names & backends.RESIDENT:
        try:
            limits_of(device.index or 0)
        except RuntimeError:
            return False
    return True


def _measured(missing: dict[Key, Job], device: torch.device, environment: Environment) -> Found:
    """What was found is kept, too, where the user has seen enough and interrupts it."""
    show = functools.partial(_show, len(missing), str(environment["device"]))
    found: Found = {}
    try:
        found.update(zip(missing, measure(list(missing.values()), device, show), strict=True))
    finally:
        show(len(missing), "")
        keep(environment, [v for v in found.values() if isinstance(v, Verdict)])
    return found


def _show(total: int, device: str, done: int, what: str) -> None:
    """On a terminal a bar, gone when all is done; in a log one line."""
    line = f"fused_attn qualifies itself on {device}, once"
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, none, or a logger that only writes
        if not sys.stderr.isatty():
            line = "" if done else f"{line}: {total} calls\n"
        elif done < total:
            line = f"\r\x1b[K{line}  [{'#' * (20 * done // total):<20}] {done}/{total}  {what}"[:160]
        else:
            line = "\r\x1b[K"
        sys.stderr.write(line)
        sys.stderr.flush()
