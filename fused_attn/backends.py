"""What this machine can run, and which backend serves a call.

Backends: "reference" (plain PyTorch under autograd), "cpu" (C++), "triton" (streaming kernels, any GPU that
Triton serves), "cuda" (resident C++ kernels). Which one serves a call is read from verdicts: those that
`fused_attn.qualification` found on this card or processor, else those that ship for all devices of a type
(`fused_attn/tables`), else plain PyTorch serves. Nothing is measured here. Any backend runs when it is asked for by
`backend(...)` or by the environment variable FUSED_ATTN_BACKEND.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _torch_module

from . import ops as ops  # defines the operators
from .native import LIBRARY_ERROR, build_record
from .native import LIBRARY_PATH as LIBRARY_PATH
from .ops.common import OPERATORS, OUTDATED
from .verdicts import BACKENDS, Question, Shape, Verdict, class_of, room_for, say_once, shipped_of_type

NAMES = BACKENDS
#: What a backend may have a kernel for: the ops, and after a slash what not every backend's kernel has.
OPS = (
    *("squeeze", "scale", "scale/space", "mixed_scale", "channel_gate", "channel_gate/both", "channel_pool"),
    *("spatial_gate", "spatial_gate/batch_norm", "cbam", "cbam/batch_norm", "axis_pool", "simam"),
    "position_attention",
    "context_pool",
    "criss_cross_attention",
    *("select", "select/with", "select/many", "select/energy", "norm_gate", "norm_gate/moments"),
)

#: Device type -> the backends that may serve it beside plain PyTorch.
CANDIDATES: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

#: Those that hold a sample on chip, and refuse one that is too large.
RESIDENT = frozenset({"cuda"})

#: Ops that compilers make faster code of on the CPU where a backward is to come: what stands around the block becomes
#: part of its passes, and they write over maps that nobody reads any more. (See `ops.inlined` for inference.)
LEFT_TO_COMPILERS = frozenset(
    ("squeeze", "scale", "channel_gate", "channel_gate/both")
    + ("spatial_gate", "spatial_gate/batch_norm", "cbam", "cbam/batch_norm", "select", "select/with")
)

#: Ops that a backend has no kernel for, with what to use instead.
MISSING: dict[tuple[str, str], str] = {
    **{
        ("cuda", op): "the resident kernels serve whole blocks; use triton"
        for op in (
            "squeeze",
            "scale",
            "scale/space",
            "mixed_scale",
            "channel_pool",
            "axis_pool",
            "context_pool",
            "criss_cross_attention",
            "simam",
            "select/with",
            "select/energy",
        )
    },
    **{
        ("cuda", op): "statistics of the batch need all samples, a cluster holds one; use triton"
        for op in ("spatial_gate/batch_norm", "cbam/batch_norm", "norm_gate", "norm_gate/moments")
    },
    **{(name, "position_attention"): "on GPUs torch's own attention serves it" for name in ("triton", "cuda")},
    **{(name, "select/many"): "the kernels hold at most 8 branches" for name in ("cpu", "triton", "cuda")},
}


def _reason(name: str, op: str, device: str) -> str | None:
    """Why a backend cannot serve an op on a device type; None where it can."""
    if name == "reference":
        return None
    if (name, op) in MISSING:
        return MISSING[name, op]
    if name == "triton":
        if not Path(__file__).with_name("kernels").joinpath(f"{op.partition('/')[0]}.py").exists():
            return f"this version has no Triton kernel for {op}"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (device == "cpu" and interpreted):
            return "triton serves GPUs (and the CPU under TRITON_INTERPRET=1)"
        return None
    if device != name:
        return f"serves {name} tensors only"
    if LIBRARY_ERROR is None and not _has_kernel(name, op):
        if name == "cpu" or _has_kernel(name, "channel_gate"):
            return f"the native library is older than {op}: build it again"
        reason = build_record().get("cuda", {}).get("reason") or "no record of a build"
        return f"the native library was built without CUDA: {reason}"
    return LIBRARY_ERROR


def _has_kernel(name: str, op: str) -> bool:
    """Whether the native library that was loaded registered the backend's kernels for the op: "cpu" has one for each of
    its operators, "cuda" for those of whole blocks."""
    return (all if name == "cpu" else any)(
        operator not in OUTDATED
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_attn::{operator}.{name}", name.upper())
        for operator in OPERATORS[op.partition("/")[0]]
    )


if LIBRARY_ERROR is not None:
    warnings.warn(f"fused_attn: the CPU runs plain PyTorch, because {LIBRARY_ERROR}", stacklevel=2)

#: (backend, op, device type) -> why it cannot serve, None where it can. Made once, at import: choosing a backend
#: is then plain look-ups, which torch.compile can follow.
UNAVAILABLE: dict[tuple[str, str, str], str | None] = {
    (name, op, device): _reason(name, op, device) for name in NAMES for op in OPS for device in ("cpu", "cuda")
}


def unavailable(name: str, op: str, device: str) -> str | None:
    """Why a backend cannot serve an op on a device type; None where it can."""
    if name == "reference":
        return None
    return UNAVAILABLE.get((name, op, device), f"there are no kernels for {device}")


#: Types of tensors that are nothing but their numbers: torch's own fakes stand for such.
PLAIN = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
_PLAIN_OR_ABSENT = PLAIN | {type(None)}
_is_compiling, _any_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled
_in_dynamo, _is_exporting = torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting
_in_functorch, _jit_tracing = torch._C._are_functorch_transforms_active, torch._C._get_tracing_state


#: Hooks for the calls of all modules, as counters of operations set them.
_PRE_HOOKS, _HOOKS = _torch_module._global_forward_pre_hooks, _torch_module._global_forward_hooks
_BACKWARD_PRE_HOOKS, _BACKWARD_HOOKS = _torch_module._global_backward_pre_hooks, _torch_module._global_backward_hooks


class _Exported:
    """Whether `torch.export` finds the operators, or what they stand for: how many want these now."""

    operators: int = 0
    counting = threading.Lock()


@contextlib.contextmanager
def keep_operators() -> Iterator[None]:
    """Within the context (process-wide) `torch.export` keeps the fused operators in its programs.

    Without it what leaves PyTorch or the process is PyTorch's own operators, which run anywhere: a program with ours
    runs where `import fused_attn`, or `torch.ops.load_library` of its native library, came first. ONNX has none of them
    in any case.
    """
    with _Exported.counting:
        _Exported.operators += 1
    try:
        yield
    finally:
        with _Exported.counting:
            _Exported.operators -= 1


def is_ordinary(x: Tensor) -> bool:
    """Whether the operators may serve a call on x: it is no subclass, which may carry more than its numbers, and none
    of `torch.func`'s transforms, forward-mode differentiation and `torch.jit.trace`, which see through plain PyTorch
    only, is active here, nor an export to where there are none, and nobody listens to all modules, whose layers would
    be bypassed. `torch.compile` traces it."""
    return (
        type(x) in PLAIN
        and forward_ad._current_level < 0
        and not _in_functorch()
        and _jit_tracing() is None
        and (not _is_exporting() or _Exported.operators > 0)
        and not (_PRE_HOOKS or _HOOKS or _BACKWARD_PRE_HOOKS or _BACKWARD_HOOKS)
    )


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; torch knows of none on "meta"."""
    if not (_is_compiling() or _any_autocast()):
        return False
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none of them is a subclass."""
    for tensor in tensors:  # noqa: SIM110 (a generator would cost more than the rest)
        if type(tensor) not in _PLAIN_OR_ABSENT:
            return False
    return True


class _Forced:
    """The backend asked for by name, or None: a plain attribute, so that torch.compile can guard on it."""

    name: str | None = None


class _Thread(threading.local):
    """What a thread has declared for itself; read only where a backend is asked for."""

    unforced: bool = False


_thread = _Thread()


def forced() -> str | None:
    """The backend asked for by `backend(...)` or the environment, or None; None, too, within `unforced()`."""
    return None if _Forced.name is None or _thread.unforced else _Forced.name


@contextlib.contextmanager
def unforced() -> Iterator[None]:
    """Within the context, in this thread alone, calls are served as if no backend had been asked for."""
    before = _thread.unforced
    _thread.unforced = True
    try:
        yield
    finally:
        _thread.unforced = before


#: Types of tensors with numbers of their own.
_VALUED = frozenset({Tensor, nn.Parameter})
_WIDE = frozenset({torch.float32, torch.float64})


class _Small:
    """Bytes of a map up to which a block of several operators costs more in calls than its passes save."""

    most: int = 1 << 14


def is_small(x: Any, bytes_made: int = 0, most: int = 0) -> bool:
    """Whether x is so small a map that plain PyTorch serves blocks better that are not one operator here: in eager mode
    on the CPU, NCHW (the result of others may lie otherwise than they do, and torch 2.13's BatchNorm may have wrong
    gradients), in dtypes where that rounds no worse, unless a backend was asked for. bytes_made: of what is made on the
    way. most: bytes up to which a kind of block is faster so, where that is more than of others."""
    most = max(_Small.most, most) if _Small.most > 0 else _Small.most
    return (
        not _in_dynamo()
        and type(x) in _VALUED
        and x.nbytes <= most >= bytes_made
        and x.dtype in _WIDE
        and x.is_cpu
        and x.is_contiguous()
        and _Forced.name is None
        and not _any_autocast()
    )


@contextlib.contextmanager
def small_as_large() -> Iterator[None]:
    """Within the context (process-wide) small maps are served as large ones."""
    before = _Small.most
    _Small.most = -1
    try:
        yield
    finally:
        _Small.most = before


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context (process-wide, but see `unforced`) every call is served by this backend, or raises why it
    cannot be.

    Raises:
        ValueError: there is no backend of that name.
    """
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}; got {name!r}")
    before = _Forced.name
    _Forced.name = name
    try:
        yield
    finally:
        _Forced.name = before


#: By device type and op, what the tables that ship say, and why.
SHIPPED: dict[tuple[str, str], tuple[str, str]] = {
    (op, device): found for device in CANDIDATES for op, found in shipped_of_type(device).items()
}


NOT_MEASURED = "not measured here yet: fuse(model) and fused_attn.qualify(model, ...) do that"


def _shipped(op: str, device: str) -> tuple[str, str]:
    """The backend that serves an op on a device type where nothing was measured here, and why it is that one."""
    name, why = SHIPPED.get((op, device), ("reference", ""))
    if reason := unavailable(name, op, device):
        return "reference", reason
    if why:
        return name, why
    if device not in CANDIDATES:
        return name, f"there are no kernels for {device}"
    reasons = {other: unavailable(other, op, device) for other in CANDIDATES[device]}
    if all(reasons.values()):
        return name, "; ".join(f"{other}: {reason}" for other, reason in reasons.items())
    return name, NOT_MEASURED


_DEFAULT = {(op, device): _shipped(op, device)[0] for op in OPS for device in CANDIDATES}


class _ByClass:
    """Where the verdicts on a question differ by the class of shape. anywhere: serves other classes, and where torch
    traces."""

    def __init__(self, verdicts: dict[Shape, Verdict], itemsize: int) -> None:
        names = {v.anywhere for v in verdicts.values()}
        self.anywhere = anywhere = names.pop() if len(names) == 1 else "reference"

        def find(sizes: tuple[int, ...], strides: tuple[int, ...]) -> str | Verdict:
            verdict = verdicts.get(class_of(sizes, strides, itemsize))
            if verdict is None:
                return anywhere
            return verdict if verdict.backend in RESIDENT else verdict.backend

        #: From sizes and strides to the backend; those of a network come again and again. To the verdict on a resident
        #: one, whose room is then looked at.
        self.find = functools.lru_cache(maxsize=4096)(find)

    def if_there_is_room(self, verdict: Verdict, x: Tensor, others: tuple[Tensor | None, ...]) -> str:
        fits = all(need <= room for need, room in zip(room_for(x, others), verdict.room, strict=True))
        return verdict.backend if fits else self.anywhere


#: What was found here, and what `choose` reads of it. A verdict stays what it is once it is in here; both only grow.
_VERDICTS: dict[tuple[torch.device, Question], dict[Shape, Verdict]] = {}
_SERVED: dict[tuple[Any, ...], str | _ByClass] = {}
_installing = threading.Lock()


class _Known:
    """anything: whether there is a verdict; a plain attribute, so that torch.compile guards on it, and not on how many.
    told: whether it was said that there is none for the card of a call, or somebody wants it so."""

    anything: bool = False
    told: bool = False


def leave_unmeasured() -> None:
    """Nothing is said of it from now on."""
    _Known.told = True


def _tell(op: str, device: torch.device) -> None:
    """A model that was fused before it was moved to its card, or never, would be no faster there in silence."""
    if _Known.told:
        return
    _Known.told = True
    measured = any(where == device for where, _ in list(_VERDICTS))
    if not measured and _shipped(op, device.type) == ("reference", NOT_MEASURED):
        say_once(
            f"plain PyTorch serves {device}, where nothing was measured yet: run fused_attn.qualify(model) once, now"
            " that the model is there"
        )


#: Where it is traced it runs then: what `torch.compiler.assume_constant_result` sets, which would import the compiler.
vars(_tell)["_dynamo_marked_constant"] = True


def install(device: torch.device, verdicts: Iterable[Verdict]) -> None:
    """From now on these hold on that device, where nothing holds yet."""
    with _installing:
        for verdict in verdicts:
            question = verdict.question
            by_class = _VERDICTS.setdefault((device, question), {})
            by_class.setdefault(verdict.shape, verdict)
            key = (device, *question)
            names = {name for v in by_class.values() for name in (v.backend, v.anywhere)}
            _Known.anything = True
            _SERVED[key] = names.pop() if len(names) == 1 else _ByClass(dict(by_class), question.dtype.itemsize)


def verdicts_on(device: str, op: str | None = None) -> list[Verdict]:
    """Those that hold in this process on devices of a type, of one op or of all."""
    found = [(question, of) for (where, question), of in list(_VERDICTS.items()) if where.type == device]
    return [v for question, of in found if op is None or question.op == op for v in of.values()]


def default(op: str, device: str) -> tuple[str, str]:
    """The backend that serves an op on a device type when none is asked for, and why it is that one. Where that differs
    by options and shapes, the one that serves most of what was measured."""
    verdicts = verdicts_on(device, op)
    if not verdicts:
        return _shipped(op, device)
    names = [v.backend for v in verdicts]
    name = max(dict.fromkeys(names), key=names.count)
    whys = list(dict.fromkeys(v.why for v in verdicts if v.backend == name))
    shown = f"measured here: {whys[0]}" + (f", and {len(whys) - 1} more like it" if len(whys) > 1 else "")
    others = [v for v in verdicts if v.backend != name]
    if others:
        shown += f"; in {len(others)} of {len(verdicts)} cases {others[0].backend}: {others[0].why}"
    return name, shown


def is_left_to_compilers(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether compiled code calls an op there as plain PyTorch, which its compiler fuses with what is around. Not in
    half precision: Inductor looks for a rounded maximum among unrounded numbers, and its gradient is NaN
    (pytorch#195214)."""
    return device == "cpu" and dtype in _WIDE and op in LEFT_TO_COMPILERS and torch.is_grad_enabled()


def choose(op: str, x: Tensor, options: tuple[Any, ...] = (), others: tuple[Tensor | None, ...] = ()) -> str:
    """The backend that serves this call. Nothing but look-ups: where torch traces, of what no size changes.

    Args:
        options: the codes of what is chosen by name.
        others: the call's other tensors.

    Raises:
        RuntimeError: the backend that was asked for cannot serve it; the message says why.
    """
    name = _Forced.name
    if name is None or _thread.unforced:
        device = x.device
        if _in_dynamo() and not _is_exporting() and is_left_to_compilers(op, device.type, x.dtype):
            return "reference"
        if _Known.anything:
            dtypes = tuple([None if t is None else t.dtype for t in others])
            served = _SERVED.get((device, op, options, x.dtype, dtypes, torch.is_grad_enabled()))
            if isinstance(served, str):
                return served
            if served is not None:
                if _is_compiling() or type(x) not in _VALUED:
                    return served.anywhere
                found = served.find(x.shape, x.stride())
                return found if isinstance(found, str) else served.if_there_is_room(found, x, others)
        if device.type == "cuda" and type(x) in _VALUED and (_is_compiling() or not _Known.told):
            _tell(op, device)
        return _DEFAULT.get((op, device.type), "reference")
    device_type = x.device.type
    reason = unavailable(name, op, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve {op} on {device_type}: {reason}")
    return name


def _read_environment() -> None:
    name = os.environ.get("FUSED_ATTN_BACKEND")
    if name:
        if name not in NAMES:
            raise ValueError(f"FUSED_ATTN_BACKEND: expected one of {', '.join(NAMES)}; got {name!r}")
        _Forced.name = name


_read_environment()
