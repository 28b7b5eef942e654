"""Calls that were made before, made again with little Python.

A kernel's function allocates, launches, and calls a few of torch's operators. What it does of that, and with which
numbers, depends on its codes and on how its tensors lie alone: dtype, shape, strides, device and address modulo 16,
which is what Triton compiles for. The first call of a kind runs as it is written; the second does too and is recorded;
from the third on the same memory is taken, the same kernels get the addresses of these tensors, the same operators are
called, and nothing is decided again. Where it is kernels alone that takes about a fifth of the time.
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

#: Versions whose launchers for NVIDIA's GPUs take what is given to them here: addresses as integers for pointers.
KNOWN = ((3, 6), (3, 7), (3, 8), (3, 9))
IS_KNOWN = torch.version.hip is None and tuple(int(n) for n in triton.__version__.split(".")[:2]) in KNOWN
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


class _Call(NamedTuple):
    """One of torch's operators, and which tensors it made: the bases from the first one on."""

    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: list[Tensor]
    first: int


def launched(kernel: Any, compiled: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Called after each launch."""
    if _thread.recording is not None:
        _thread.recording.steps.append(_Launch(kernel, compiled, programs, arguments))


def _tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


class _Recording(TorchDispatchMode):
    """What happens within, and whether it is all known: launches, allocations, views, and torch's operators.

    bases: the inputs, so many as `inputs` says, then all memory that was taken; `computed`: which an operator gave.
    origins: of each tensor seen, by id, the base that it is or is a view of.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.steps: list[_Launch | _Call] = []
        self.bases, self.inputs = list(inputs), len(inputs)
        self.computed: list[int] = []
        self.origins = {id(t): i for i, t in enumerate(inputs)}
        self.seen: list[Tensor] = []  # so that no id is given twice
        self.is_complete = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _ALLOCATIONS:
            self.add(result)
            self.is_complete &= result.device == self.bases[0].device
            return result
        given = [t for v in (*args, *kwargs.values()) for t in _tensors_of(v)]
        found = _tensors_of(result)
        self.is_complete &= bool(found) and all(id(t) in self.origins for t in given)
        if not self.is_complete:
            return result
        storages = {t.untyped_storage()._cdata: self.origins[id(t)] for t in given}
        first, made = len(self.bases), []
        for t in found:
            origin = storages.get(t.untyped_storage()._cdata)
            if origin is None:
                self.computed.append(len(self.bases))
                self.add(t)
                made.append(t)
            elif id(t) not in self.origins:
                self.origins[id(t)] = origin
                self.seen.append(t)
                self.is_complete &= t.dtype == self.bases[origin].dtype
        if made or func._schema.is_mutable:
            self.is_complete &= made == [] or len(made) == len(found)
            self.steps.append(_Call(func, args, kwargs, made, first))
        return result

    def add(self, t: Tensor) -> None:
        self.origins[id(t)] = len(self.bases)
        self.bases.append(t)

    def __enter__(self) -> _Recording:
        super().__enter__()
        _thread.recording = self
        torch.empty_like(self.bases[0])  # seen, unless something keeps modes from seeing
        self.is_complete = len(self.bases) > self.inputs
        return self

    def __exit__(self, *error: Any) -> None:
        _thread.recording = None
        super().__exit__(*error)

    def launches(self) -> list[_Launch]:
        return [step for step in self.steps if isinstance(step, _Launch)]


class _Incomplete(Exception):
    """A recording that is not all that the call did."""


class _View(NamedTuple):
    """A tensor by its place among a call's tensors: it itself, or of this size, strides and offset in it."""

    place: int
    shape: tuple[Any, ...] | None


class _Plan(NamedTuple):
    """A call's tensors are its inputs, what is allocated first (`memory`: size, strides and dtype), and what operators
    give. Its values are addresses (place of the tensor, offset), then constants, then addresses in what operators give.
    """

    setting: tuple[Any, ...]
    device: torch.device
    hooks: tuple[list[Any], ...]
    empty: Callable[..., Tensor] | None
    memory: tuple[tuple[Any, ...], ...]
    addresses: tuple[tuple[int, int], ...]
    constants: tuple[Any, ...]
    steps: tuple[tuple[Any, ...] | _Again, ...]  # launches: run, function, metadata, programs, which of the values
    compiled: tuple[Any, ...]  # kept, because Triton unloads what nobody keeps
    results: Any
    is_flat: bool  # results: takes them out of the tensors


class _Again(NamedTuple):
    """An operator's part in a plan: its arguments with views for tensors, and the addresses in what it gives."""

    operator: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    makes: bool
    addresses: tuple[tuple[int, int], ...]

    def run(self, tensors: list[Tensor], values: list[Any]) -> None:
        options = {name: _made(value, tensors) for name, value in self.options.items()}
        result = self.operator(*_made(self.arguments, tensors), **options)
        if self.makes:
            tensors += _tensors_of(result)
            values += [tensors[place].data_ptr() + offset for place, offset in self.addresses]


class _Planner:
    """Makes a plan of a recording. What is returned, or given to an operator, is a tensor of its own in each call; all
    other memory is one."""

    def __init__(self, recording: _Recording, results: Any) -> None:
        self.recording, self.bases = recording, recording.bases
        self.early: dict[tuple[int, int], int] = {}  # addresses, by (place, offset)
        self.late: dict[tuple[int, int], int] = {}  # in what operators give
        self.constants: list[Any] = []
        calls = [step for step in recording.steps if isinstance(step, _Call)]
        used = {self.base(t) for t in _flat((results, [(c.arguments, *c.options.values()) for c in calls]))}
        own = [i for i in range(recording.inputs, len(self.bases)) if i in used and i not in recording.computed]
        self.offsets: dict[int, int] = {}
        workspace = 0
        for i in range(recording.inputs, len(self.bases)):
            if i not in own and i not in recording.computed:
                self.offsets[i] = workspace
                workspace += -(-self.bases[i].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        self.memory = [(tuple(t.shape), t.stride(), t.dtype) for t in (self.bases[i] for i in own)]
        order: list[int | None] = [*range(recording.inputs), *own]
        if workspace:
            self.memory.append(((workspace,), (1,), torch.uint8))
            order.append(None)
        order += recording.computed
        self.places = {base: place for place, base in enumerate(order)}
        self.results = self.view(results)
        if any(i < recording.inputs for i in map(self.base, _flat(results))):
            raise _Incomplete

    def base(self, t: Tensor) -> int:
        if id(t) not in self.recording.origins:
            raise _Incomplete
        return self.recording.origins[id(t)]

    def view(self, value: Any) -> Any:
        """Tensors, and those in lists, as views; all else as it is."""
        if isinstance(value, list | tuple):
            return type(value)([self.view(v) for v in value])
        if not isinstance(value, Tensor):
            return value
        i = self.base(value)
        base, shape = self.bases[i], None
        if value is not base:
            shape = value.shape, value.stride(), value.storage_offset() - base.storage_offset()
        return _View(self.places[i], shape)

    def address(self, t: Tensor) -> tuple[str, int]:
        i = self.base(t)
        if t.numel() == 0:
            return self.constant(0)
        offset = t.data_ptr() - self.bases[i].data_ptr()
        place = self.places[None] if i in self.offsets else self.places[i]
        kind = self.late if i in self.recording.computed else self.early
        found = kind.setdefault((place, offset + self.offsets.get(i, 0)), len(kind))
        return "late" if kind is self.late else "early", found

    def constant(self, value: Any) -> tuple[str, int]:
        self.constants.append(value)
        return "constant", len(self.constants) - 1

    def value(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return self.address(given)
        if isinstance(given, tuple) and any(isinstance(v, Tensor) for v in given):
            return [self.value(v) for v in given]
        return self.constant(given)

    def plan(self, setting: tuple[Any, ...]) -> _Plan:
        launches = self.recording.launches()
        values = [[self.value(launch.arguments[p.name]) for p in launch.kernel.params] for launch in launches]
        # The values, in the order in which they are known: those in what operators give by operator.
        self.late = dict(sorted(self.late.items()))
        renamed = {old: new for new, old in enumerate(self.late.values())}
        first = {"early": 0, "constant": len(self.early), "late": len(self.early) + len(self.constants)}

        def index(value: tuple[str, int]) -> int:
            kind, place = value
            return first[kind] + (renamed[place] if kind == "late" else place)

        remaining = iter(values)
        steps: list[Any] = []
        for step in self.recording.steps:
            if isinstance(step, _Launch):
                c = step.compiled
                steps.append((c.run, c.function, c.packed_metadata, step.programs, _picked(next(remaining), index)))
            else:
                made = {self.places[step.first + i] for i in range(len(step.results))}
                addresses = tuple(a for a in self.late if a[0] in made)
                options = {name: self.view(value) for name, value in step.options.items()}
                steps.append(_Again(step.operator, self.view(step.arguments), options, bool(made), addresses))
        results, is_flat = self.results, False
        if type(results) is tuple and len(results) > 1 and all(type(r) is _View and r.shape is None for r in results):
            results, is_flat = itemgetter(*(r.place for r in results)), True
        at = self.bases[0].device
        return _Plan(
            setting,
            at,
            tuple(launch.kernel.pre_run_hooks for launch in launches),
            _EMPTY.get(at.type),
            tuple(self.memory),
            tuple(self.early),
            tuple(self.constants),
            tuple(steps),
            tuple(launch.compiled for launch in launches),
            results,
            is_flat,
        )


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [t for v in value for t in _flat(v)]
    return [value] if isinstance(value, Tensor) else []


def _picked(values: list[Any], index: Callable[[tuple[str, int]], int]) -> Callable[[list[Any]], Any]:
    """Takes a launch's arguments out of a call's values; a list stands for a tuple of them."""
    if not any(isinstance(v, list) for v in values):
        return itemgetter(*map(index, values))
    places = [[index(n) for n in v] if isinstance(v, list) else index(v) for v in values]
    return lambda there: [there[p] if type(p) is int else tuple([there[n] for n in p]) for p in places]


def _made(value: Any, tensors: list[Tensor]) -> Any:
    kind = type(value)
    if kind is _View:
        t = tensors[value.place]
        if value.shape is None:
            return t
        size, strides, offset = value.shape
        return t.as_strided(size, strides, t.storage_offset() + offset)
    return kind([_made(v, tensors) for v in value]) if kind is list or kind is tuple else value


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


def _run(plan: _Plan, tensors: list[Tensor], pointers: list[int]) -> Any:
    if plan.empty is None or torch.are_deterministic_algorithms_enabled():  # which may want memory filled
        at = plan.device
        made = [torch.empty_strided(size, stride, dtype=dtype, device=at) for size, stride, dtype in plan.memory]
    else:
        empty = plan.empty
        made = [empty(size, stride, dtype) for size, stride, dtype in plan.memory]
    tensors += made
    pointers += [t.data_ptr() for t in made]
    values = [pointers[place] + offset for place, offset in plan.addresses]
    values += plan.constants
    active = plan.setting[0]
    stream = active.get_current_stream(active.get_current_device())
    for step in plan.steps:
        if type(step) is tuple:
            run, function, metadata, programs, pick = step
            run(programs, 1, 1, stream, function, metadata, None, None, None, *pick(values))
        else:
            step.run(tensors, values)
    return plan.results(tensors) if plan.is_flat else _made(plan.results, tensors)


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose calls are recorded and replayed."""
    if not IS_KNOWN:
        return function
    plans: dict[tuple[Any, ...], _Plan | bool] = {}  # True: seen once; False: never replayed

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        key: list[Any] = []
        tensors: list[Tensor] = []
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
                    tensors.append(t)
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
                return _run(plan, tensors, pointers)
        return _run(plan, tensors, pointers)

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
    if not all(isinstance(launch.compiled, CompiledKernel) for launch in recording.launches()):
        return results, None
    if not recording.is_complete:
        return results, False
    try:
        return results, _Planner(recording, results).plan(setting)
    except _Incomplete:
        return results, False
