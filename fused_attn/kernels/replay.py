"""Calls that were made before, made again with little Python.

A kernel's function allocates and launches. What it allocates, and which kernels it launches with which numbers, depends
on its codes and on how its tensors lie alone: dtype, shape, strides, device and address modulo 16, which is what Triton
compiles for. The first call of a kind runs as it is written; the second does too and is recorded; from the third on the
same memory is allocated, the same kernels get the addresses of these tensors, and nothing is decided again. That takes
a fifth of the time.

Functions that also call torch's operators, or launch anything but Triton's compiled kernels, are never replayed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

#: Versions whose launchers take what is given to them here: addresses as integers for pointers.
KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))
IS_KNOWN = tuple(int(n) for n in triton.__version__.split(".")[:2]) in KNOWN
MOST = 1024  # kinds of calls that are kept of a function
ALIGNMENT = 256  # of temporaries in their one allocation

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


#: By device type: torch.empty_strided on the current device, without dispatch; torch's compiler calls it too.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_EMPTY = {at: getattr(_guards, f"_empty_strided_{at}", None) for at in ("cpu", "cuda")}


class _Thread(threading.local):
    recording: _Recording | None = None


_thread = _Thread()


class _Launch(NamedTuple):
    kernel: Any
    compiled: Any
    programs: int
    arguments: dict[str, Any]


def launched(kernel: Any, compiled: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Called after each launch."""
    if _thread.recording is not None:
        _thread.recording.launches.append(_Launch(kernel, compiled, programs, arguments))


def _tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


class _Recording(TorchDispatchMode):
    """What happens within: launches and allocations, and whether it was nothing but these and views.

    origins: of each tensor seen, by id, the one that it is or is a view of: an input, or behind them an allocation.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.launches: list[_Launch] = []
        self.bases, self.inputs = list(inputs), len(inputs)
        self.origins = {id(t): i for i, t in enumerate(inputs)}
        self.seen: list[Tensor] = []  # so that no id is given twice
        self.is_complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.origins[id(result)] = len(self.bases)
            self.bases.append(result)
            self.is_complete &= result.device == self.bases[0].device
            return result
        found, given = _tensors_of(result), _tensors_of(args)
        origin = self.origins.get(id(given[0])) if given else None
        if origin is None or not found or func._schema.is_mutable:
            self.is_complete = False
            return result
        storage = given[0].untyped_storage()._cdata
        for t in found:
            if t.untyped_storage()._cdata != storage:
                self.is_complete = False
            self.origins[id(t)] = origin
            self.seen.append(t)
        return result

    def __enter__(self) -> _Recording:
        super().__enter__()
        _thread.recording = self
        torch.empty_like(self.bases[0])  # seen, unless something keeps modes from seeing
        self.is_complete = len(self.bases) > self.inputs
        return self

    def __exit__(self, *error: Any) -> None:
        _thread.recording = None
        super().__exit__(*error)


class _Incomplete(Exception):
    """A recording that is not all that the call did."""


class _Plan(NamedTuple):
    """values: addresses, (base, offset) each; then constants; then tuples of values, by their places."""

    setting: tuple[Any, ...]
    device: torch.device
    hooks: tuple[list[Any], ...]
    empty: Callable[..., Tensor] | None
    memory: tuple[tuple[Any, ...], ...]  # size, stride and dtype of the outputs, and of one allocation for all else
    addresses: tuple[tuple[int, int], ...]
    constants: tuple[Any, ...]
    tuples: tuple[Callable[[list[Any]], Any], ...]
    launches: tuple[tuple[Any, Any, Any, int, Callable[[list[Any]], Any]], ...]
    compiled: tuple[Any, ...]  # kept, because Triton unloads what nobody keeps
    results: Any
    is_flat: bool  # results: takes the outputs out of what was allocated


class _Planner:
    """Makes a plan of a recording: bases are the inputs, the allocations that are returned, and one for all others."""

    def __init__(self, recording: _Recording, results: Any) -> None:
        self.recording, self.bases = recording, recording.bases
        self.addresses: dict[tuple[int, int], int] = {}
        self.constants: list[Any] = []
        self.tuples: list[list[tuple[str, int]]] = []
        self.returned: list[int] = []
        self.results = self.shape_of(results)
        self.offsets: dict[int, int] = {}
        self.workspace = 0
        for i in range(recording.inputs, len(self.bases)):
            if i not in self.returned:
                self.offsets[i] = self.workspace
                self.workspace += -(-self.bases[i].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT

    def shape_of(self, results: Any) -> Any:
        """How results are made of the outputs: (place, None or size, strides and offset of a view), or a list."""
        if isinstance(results, list | tuple):
            return type(results)(self.shape_of(r) for r in results)
        i = self.recording.origins.get(id(results), -1)
        if i < self.recording.inputs:
            raise _Incomplete
        if i not in self.returned:
            self.returned.append(i)
        base, view = self.bases[i], None
        if results is not base:
            view = results.shape, results.stride(), results.storage_offset()
        return _Output(self.returned.index(i), view)

    def address(self, t: Tensor) -> tuple[str, int]:
        i = self.recording.origins.get(id(t))
        if i is None:
            raise _Incomplete
        if t.numel() == 0:
            return self.constant(0)
        base, offset = i, t.data_ptr() - self.bases[i].data_ptr()
        if i in self.offsets:
            base, offset = self.recording.inputs + len(self.returned), offset + self.offsets[i]
        elif i >= self.recording.inputs:
            base = self.recording.inputs + self.returned.index(i)
        return "address", self.addresses.setdefault((base, offset), len(self.addresses))

    def constant(self, value: Any) -> tuple[str, int]:
        self.constants.append(value)
        return "constant", len(self.constants) - 1

    def value(self, given: Any) -> tuple[str, int]:
        if isinstance(given, Tensor):
            return self.address(given)
        if isinstance(given, tuple) and any(isinstance(v, Tensor) for v in given):
            self.tuples.append([self.value(v) for v in given])
            return "tuple", len(self.tuples) - 1
        return self.constant(given)

    def plan(self, setting: tuple[Any, ...]) -> _Plan:
        launches = []
        for kernel, compiled, programs, arguments in self.recording.launches:
            values = [self.value(arguments[p.name]) for p in kernel.params]
            launches.append((compiled, programs, values))
        first = {
            "address": 0,
            "constant": len(self.addresses),
            "tuple": len(self.addresses) + len(self.constants),
        }

        def picked(values: list[tuple[str, int]]) -> Callable[[list[Any]], Any]:
            places = [first[kind] + place for kind, place in values]
            if len(places) == 1:
                return lambda there: (there[places[0]],)
            return itemgetter(*places)

        memory = [(tuple(t.shape), t.stride(), t.dtype) for t in (self.bases[i] for i in self.returned)]
        if self.workspace:
            memory.append(((self.workspace,), (1,), torch.uint8))
        results, is_flat = self.results, False
        if type(results) is tuple and len(results) > 1 and all(type(r) is _Output and r.view is None for r in results):
            results, is_flat = itemgetter(*(r.place for r in results)), True
        return _Plan(
            setting,
            self.bases[0].device,
            tuple(launch.kernel.pre_run_hooks for launch in self.recording.launches),
            _EMPTY.get(self.bases[0].device.type),
            tuple(memory),
            tuple(self.addresses),
            tuple(self.constants),
            tuple(picked(values) for values in self.tuples),
            tuple((c.run, c.function, c.packed_metadata, programs, picked(v)) for c, programs, v in launches),
            tuple(launch.compiled for launch in self.recording.launches),
            results,
            is_flat,
        )


class _Output(NamedTuple):
    place: int
    view: tuple[Any, ...] | None


def _made(shape: Any, outputs: list[Tensor]) -> Any:
    if type(shape) is _Output:
        t = outputs[shape.place]
        return t if shape.view is None else t.as_strided(*shape.view)
    return type(shape)(_made(s, outputs) for s in shape)


def _setting() -> tuple[Any, ...] | None:
    """What Triton compiles and launches by besides a call's arguments; None: somebody listens to launches."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    if (enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)):
        return None
    if getattr(runtime, "add_stages_inspection_hook", None) is not None:
        return None
    compilation = knobs.compilation
    return (
        driver.active,
        runtime.debug,
        getattr(compilation, "instrumentation_mode", None),
        getattr(compilation, "fpsan_homomorphic_casts", None),
    )


def _run(plan: _Plan, pointers: list[int]) -> Any:
    if plan.empty is None or torch.are_deterministic_algorithms_enabled():  # which may want memory filled
        at = plan.device
        made = [torch.empty_strided(size, stride, dtype=dtype, device=at) for size, stride, dtype in plan.memory]
    else:
        empty = plan.empty
        made = [empty(size, stride, dtype) for size, stride, dtype in plan.memory]
    pointers += [t.data_ptr() for t in made]
    values = [pointers[base] + offset for base, offset in plan.addresses]
    values += plan.constants
    for pick in plan.tuples:
        values.append(pick(values))
    active = plan.setting[0]
    stream = active.get_current_stream(active.get_current_device())
    for run, function, metadata, programs, pick in plan.launches:
        run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(values))
    return plan.results(made) if plan.is_flat else _made(plan.results, made)


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose calls are recorded and replayed."""
    if not IS_KNOWN:
        return function
    plans: dict[tuple[Any, ...], _Plan | bool] = {}  # True: seen once; False: never replayed

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        key: list[Any] = []
        pointers: list[int] = []
        device = None
        for a in arguments:
            if type(a) is list or type(a) is tuple:
                key.append(len(a))
            else:
                a = (a,)
            for t in a:
                kind = type(t)
                if kind is Tensor or kind is nn.Parameter:
                    pointer = t.data_ptr()
                    pointers.append(pointer)
                    at = t.get_device()
                    if device is None:
                        device = at
                    elif at != device:
                        return function(*arguments)
                    key += (t.dtype, t.shape, t.stride(), pointer & 15)
                elif isinstance(t, Tensor):
                    return function(*arguments)
                else:
                    key.append(t)
        key.append(device)
        kinds = tuple(key)
        plan = plans.get(kinds)
        if plan is False:
            return function(*arguments)
        setting = _setting()
        if setting is None or device is None:
            return function(*arguments)
        if plan is None:
            if len(plans) >= MOST:
                plans.clear()
            plans[kinds] = True
            return function(*arguments)
        if plan is True:
            results, found = _recorded(function, arguments, setting)
            if found is not None:
                plans[kinds] = found
            return results
        if plan.setting != setting or any(plan.hooks):
            return function(*arguments)
        if device >= 0 and setting[0].get_current_device() != device:
            with torch.cuda.device(device):
                return _run(plan, pointers)
        return _run(plan, pointers)

    call.plans = plans  # type: ignore[attr-defined] (tests look at them)
    return call


def _recorded(
    function: Callable[..., Any], arguments: tuple[Any, ...], setting: tuple[Any, ...]
) -> tuple[Any, _Plan | bool | None]:
    """(what the call returns, its plan; False: it can have none; None: not this time)."""
    # Inputs under names of their own: which of two that are one tensor, or parts of one, a launch reads would not show.
    inputs: list[Tensor] = []

    def alias(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return [alias(t) for t in a]
        if not isinstance(a, Tensor):
            return a
        inputs.append(a.detach())
        return inputs[-1]

    aliases = [alias(a) for a in arguments]
    with _Recording(inputs) as recording:
        results = function(*aliases)
    if not all(isinstance(launch.compiled, CompiledKernel) for launch in recording.launches):
        return results, None
    if not recording.is_complete:
        return results, False
    try:
        return results, _Planner(recording, results).plan(setting)
    except _Incomplete:
        return results, False
