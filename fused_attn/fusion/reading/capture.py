"""Running a module once on tensors without data, and writing down what it computes."""

from __future__ import annotations

import inspect
import math
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .canonical import Graph, Node, Unsupported, Value
from .context import OnOneDevice
from .match import reached
from .operators import OPERATORS, opaque
from .reads import is_torch
from .shapes import result
from .twin import STATE, twin

MAX_OPERATORS = 160


class Refused(Exception):
    """The module does something that a fused block would not; the message says what. graph: what it computed so far;
    inner, of what was computed to its end: as in `Captured`."""

    graph: Graph | None = None
    inner: frozenset[Node] | None = None


def takes_one_map(cls: type[nn.Module]) -> bool:
    """Whether it is somebody's class, with a forward of its own that one argument is enough for."""
    forward: Any = cls.forward
    if is_torch(cls) or forward is nn.Module.forward or not inspect.isfunction(forward) or is_torch(forward):
        return False
    if forward.__code__.co_flags & (inspect.CO_COROUTINE | inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR):
        return False
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = [
        p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    rest = [p for p in parameters if p.default is p.empty and p not in positional and p.kind is p.KEYWORD_ONLY]
    return len(positional) == 1 and not rest


Mode = TypeVar("Mode", bound=type[TorchDispatchMode])


def never_compiled(mode: Mode) -> Mode:
    """Decorator of a dispatch mode: without a wrapper of torch, which imports the compiler (seconds) in order not to
    be compiled."""
    mode.__torch_dispatch__ = getattr(mode.__torch_dispatch__, "__wrapped__", mode.__torch_dispatch__)  # type: ignore[method-assign]
    return mode


@never_compiled
class Recorder(TorchDispatchMode):
    """Gives every tensor that goes by its canonical value."""

    def __init__(self, graph: Graph, limit: int = MAX_OPERATORS) -> None:
        super().__init__()
        self.graph, self.limit = graph, limit
        self._values: dict[int, Value | None] = {}
        self._keep: list[Tensor] = []
        self._storages: dict[int, list[int]] = {}
        self._strangers: dict[int, Tensor] = {}
        self.count = 0
        self.strange: list[str] = []  # names of operators without canonical form
        self.remarks: list[str] = []  # what makes the whole thing not a function of its inputs
        self.protected: set[int] = set()  # storages that may not be written to
        self.written: list[Tensor] = []
        self.paused = False

    def put(self, tensor: Tensor, value: Value | None) -> None:
        self._values[id(tensor)] = value
        self._keep.append(tensor)
        self._storages.setdefault(_storage(tensor), []).append(id(tensor))

    def moved(self, tensor: Tensor) -> None:
        """Of a tensor that is put on a GPU: only one that is made of numbers alone may be."""
        value = self._values.get(id(tensor))
        if value is None or any(n.op in ("input", "leaf") for n in reached(value.node)):
            self.remarks.append("moves what it computes to a GPU")

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values

    def get(self, tensor: Tensor) -> Value:
        if id(tensor) not in self._values:
            self.remarks.append("reads a tensor that is neither its input nor a parameter")
            self.put(tensor, opaque(self.graph, f"tensor {id(tensor)}", (), tensor.shape))
        value = self._values[id(tensor)]
        if value is None:
            raise Unsupported
        return value

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "lift_fresh" and self._is_number(args[0]):
            number = torch.empty((), dtype=args[0].dtype, device="meta")
            self.put(number, self.graph.constant(args[0].item(), ()))
            return number
        args, kwargs = self._known(args), self._known(kwargs or {})
        if self.paused or function.namespace == "prim" or name in _SILENT:
            return function(*args, **kwargs)
        self.count += 1
        if self.count > self.limit:
            raise Refused("more operators than any block we know")
        if not torch.is_grad_enabled():
            self.remarks.append("runs without gradients in part")
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.remarks.append("draws random numbers")
            if not any(isinstance(a, Tensor) for a in args):
                kwargs = {**kwargs, "device": "meta"}  # torch's own are everybody's
        out = self._run(function, name, args, kwargs)
        outs = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        written = [a for a, s in zip(args, function._schema.arguments, strict=False) if s.is_write] + [
            kwargs[s.name] for s in function._schema.arguments if s.is_write and s.name in kwargs
        ]
        if not outs:
            return out
        values = self._values_of(function, name, args, kwargs, outs, bool(written))
        for tensor in written:
            self._write(tensor)
        for tensor, value in zip(outs, values, strict=False):
            self.put(tensor, value)
        return out

    def _is_number(self, tensor: Tensor) -> bool:
        """Whether it is what code has just made of a number, by torch.tensor."""
        made = tensor.device.type == "cpu" and tensor.dim() == 0 and tensor.is_floating_point()
        return made and id(tensor) not in self._values and not math.isnan(tensor.item())

    def _known(self, value: Any) -> Any:
        """Without tensors that come from elsewhere, so that nothing is read from them or written into them."""
        if isinstance(value, Tensor):
            return value if value.is_meta or id(value) in self._values else self._stranger(value)
        if type(value) in (list, tuple):
            return type(value)(map(self._known, value))
        return {k: self._known(v) for k, v in value.items()} if type(value) is dict else value

    def _stranger(self, tensor: Tensor) -> Tensor:
        found = self._strangers.get(id(tensor))
        if found is None:
            self.remarks.append("reads a tensor that is neither its input nor a parameter")
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self.put(found, opaque(self.graph, f"tensor {len(self._strangers)}", (), tensor.shape))
            self._strangers[id(tensor)] = found
            self._keep.append(tensor)
        return found

    def _run(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name.endswith("_") and isinstance(args[0], Tensor):
            out = result(name[:-1], args, kwargs)
            return args[0] if isinstance(out, Tensor) and out.shape == args[0].shape else function(*args, **kwargs)
        out = result(name, args, kwargs)
        return function(*args, **kwargs) if out is None else out

    def _values_of(
        self, function: Any, name: str, args: Any, kwargs: Any, outs: list[Tensor], writes: bool
    ) -> Sequence[Value | None]:
        shape = tuple(outs[0].shape)

        def valued(x: Any) -> Any:
            if isinstance(x, Tensor):
                return self.get(x)
            if isinstance(x, (list, tuple)):
                return type(x)(valued(y) for y in x) if type(x) in (list, tuple) else x
            return x

        if name == "copy_" and len(args) == 2:
            return [self._as(args[1], shape)]
        base = name[:-1] if writes and name.endswith("_") else name
        try:
            arguments = [valued(a) for a in args]
            if base not in OPERATORS or (writes and base == name):
                raise Unsupported
            found = OPERATORS[base](self.graph, shape, *arguments, **{k: valued(v) for k, v in kwargs.items()})
            found = list(found) if isinstance(found, (tuple, list)) else [found]
            for value, tensor in zip(found, outs, strict=False):
                if value is not None and value.shape != tuple(tensor.shape):
                    raise Unsupported
            return [found[i] if i < len(found) else None for i in range(len(outs))]
        except (Unsupported, TypeError, ValueError, IndexError, KeyError):
            if name not in _FACTORIES:
                self.strange.append(_described(name, args, kwargs))
        if any(isinstance(a, Tensor) and self._values.get(id(a), 0) is None for a in args):
            return [opaque(self.graph, f"{name} {self.count}", (), t.shape) for t in outs]
        known = [valued(a) for a in args]
        keywords = tuple((k, valued(v)) for k, v in sorted(kwargs.items()))
        return [opaque(self.graph, f"{function}{i or ''}", [*known, keywords], t.shape) for i, t in enumerate(outs)]

    def _as(self, tensor: Any, shape: tuple[int, ...]) -> Value | None:
        try:
            value = self.get(tensor)
            return value if value.shape == shape else self.graph.expand(value, shape)
        except Unsupported:
            return None

    def _write(self, tensor: Tensor) -> None:
        """Others that lie in the memory written to are no longer what they were."""
        storage = _storage(tensor)
        if storage in self.protected:
            self.remarks.append("writes into its input")
        self.written.append(tensor)
        for other in self._storages.get(storage, ()):
            if other != id(tensor):
                self._values[other] = None


class Plainly(TorchFunctionMode):
    """Makes tensors of numbers where these can be read, on the CPU: a tensor without data does not say which it is. And
    interpolates by the one operator for it, which torch takes apart on what is no CPU where algorithms are to be
    deterministic."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and isinstance(args[0] if args else None, (int, float)):
            kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if function is torch.nn.functional.interpolate:
            return _interpolated(*args, **kwargs)
        return function(*args, **kwargs)


def _interpolated(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *rest: Any, **kw: Any
) -> Any:
    corners = kw.get("align_corners", rest[0] if rest else None)
    others = [*rest[1:], *(v for k, v in kw.items() if k != "align_corners")]
    if mode != "bilinear" or x.dim() != 4 or size is None or scale_factor is not None or any(others):
        return torch.nn.functional.interpolate(x, size, scale_factor, mode, *rest, **kw)
    size = [size, size] if isinstance(size, int) else list(size)
    return torch.ops.aten.upsample_bilinear2d(x, size, bool(corners), None)


#: Operators that compute nothing.
_SILENT = {"device", "sym_size", "sym_stride", "sym_numel", "is_same_size"}
_FACTORIES = {"empty", "empty_like", "zeros", "ones", "full", "arange", "zeros_like", "ones_like"}

_NAMES = {
    "avg_pool2d": "average pool",
    "max_pool2d_with_indices": "maximum pool",
    "_adaptive_avg_pool2d": "average pool",
    "adaptive_max_pool2d": "maximum pool",
}


def _described(name: str, args: Any, kwargs: Any) -> str:
    if name in _NAMES:
        adaptive = "adaptive" in name
        size = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        shape = "×".join(str(n) for n in (size * 2 if len(size) == 1 else size))
        return f"spatial pool is {'to ' if adaptive else ''}{shape}, not global"
    return f"computes {name.strip('_')}"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# Capture


@dataclass(frozen=True)
class Call:
    """One call of a part of the module, at this path, of this class, with one tensor in and one out."""

    path: str
    kind: type
    input: Value
    output: Value


@dataclass
class Captured:
    """What a module computes: from its input of this shape, in this mode. calls: of its parts, the inner ones first.
    inner: what is first computed in parts that may be blocks themselves. space: of the input."""

    graph: Graph
    output: Value
    dtype: torch.dtype
    strange: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inner: frozenset[Node] = frozenset()
    space: tuple[int, ...] = ()

    @property
    def remark(self) -> str | None:
        return self.remarks[0] if self.remarks else None


#: Sizes of the map in a capture: odd, different from each other and from common channel counts.
SPACE = (13, 11, 17)
#: For blocks that take a quarter of the positions for granted where they pool.
EVEN_SPACE = (14, 10, 18)
BATCH = 5


def capture(
    module: nn.Module,
    shape: Sequence[int],
    *,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    maps: Sequence[str] = (),
) -> Captured:
    """The canonical form of module(x) for x of this shape.

    A twin of the module is run. maps: names of parameters that stand for other inputs.

    Raises:
        Refused: it branches on data, returns no single tensor, or is larger than any block.
        NoTwin: as in `twin`.
        Exception: whatever the module raises for such an input.
    """
    graph = Graph()
    recorder = Recorder(graph)
    tensors: dict[int, Tensor | None] = {}
    counted: set[int] = set()
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        stand_in = torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
        tensors[id(p)] = stand_in
        recorder.put(stand_in, graph.leaf("input" if name in maps else "leaf", name, p.shape))
        if name.endswith("num_batches_tracked"):
            counted.add(_storage(stand_in))
    for name, value in _made_by_hooks(module):
        stand_in = torch.empty(value.shape, dtype=dtype, device="meta")
        tensors[id(value)] = stand_in
        recorder.put(stand_in, graph.leaf("leaf", name, value.shape))
    given = {id(t) for t in tensors.values()}
    buffers = {_storage(t) for t in tensors.values() if t is not None}
    calls = _Calls(recorder)
    acting = twin(module, tensors, calls)
    calls.names = {part: name for name, part in acting.named_modules() if name}
    for part in acting.modules():
        part.training = training
    held = contents(acting)
    with torch.enable_grad():
        x = torch.empty(tuple(shape), dtype=dtype, device="meta")
        recorder.put(x, graph.leaf("input", "x", shape))
        recorder.protected = {_storage(x)}
        try:
            with OnOneDevice("meta", recorder.moved), Plainly(), recorder:
                y = acting(x)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if any(words in str(error) for words in ("meta tensor", "Meta", "meta device")):
                refused = Refused("branches on data")
                refused.graph = graph
                raise refused from error
            raise
    left = any(value is not None for value in vars(x).values())  # on the map; fastai's layers leave None there
    if contents(acting) != held or left:
        recorder.remarks.append("keeps state")
    if not isinstance(y, Tensor):
        several = isinstance(y, (tuple, list)) and any(isinstance(t, Tensor) for t in y)
        refused = Refused("returns more than a map, such as its attention" if several else "returns no single tensor")
        refused.graph, refused.inner = graph, calls.inner()
        raise refused
    try:
        output = recorder.get(y)
    except Unsupported:
        raise Refused("writes into a view of what it returns") from None
    if any(_storage(t) in buffers - counted for t in recorder.written):
        recorder.remarks.append("writes into a parameter or buffer")
    result = Captured(graph, output, y.dtype, recorder.strange, recorder.remarks, calls.found)
    result.inner, result.space = calls.inner(), tuple(shape[2:])
    dead = [weakref.ref(t) for t in recorder._keep if id(t) not in given and t is not x]
    recorder._keep.clear()
    recorder.written.clear()
    del y, acting, calls.recorder
    if any(ref() is not None for ref in dead):
        result.remarks.append("keeps a tensor")
    return result


def _made_by_hooks(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights that the hooks of torch's spectral and weight norm put into its layers before every call."""
    for path, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            if is_torch(type(part)) and type(hook) in (SpectralNorm, WeightNorm):
                value = part.__dict__.get(hook.name)
                if isinstance(value, Tensor):
                    yield f"{path}.{hook.name}", value


def _is_parametrised(part: nn.Module) -> bool:
    """Whether it is one of torch's layers, with parametrisations of torch's alone, as spectral norm."""
    found = getattr(part, "parametrizations", None) if is_parametrized(part) else None
    return found is not None and is_torch(type(part)) and all(is_torch(type(p)) for p in found.modules())


class _Calls:
    """Notes the calls of a twin's parts that take one tensor and give one."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.names: dict[nn.Module, str] = {}
        self.found: list[Call] = []
        self.spans: list[tuple[int, int]] = []  # of the graph's nodes, those of parts that may be blocks

    def inner(self) -> frozenset[Node]:
        nodes = self.recorder.graph.nodes()
        return frozenset(n for start, end in self.spans for n in nodes[start:end])

    def __call__(self, part: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._value(args[0]) if len(args) == 1 and not kwargs else None
        before = self.recorder.graph.size
        if given is not None and _is_parametrised(part) and part in self.names:
            result = self._whole(part, forward, args[0], given)
        else:
            result = forward(*args, **kwargs)
        if part in self.names and takes_one_map(type(part)):
            self.spans.append((before, self.recorder.graph.size))
        made = self._value(result)
        if given is not None and made is not None and part in self.names:
            self.found.append(Call(self.names[part], type(part), given, made))
        return result

    def _whole(self, part: nn.Module, forward: Any, x: Tensor, given: Value) -> Any:
        """The result of a layer that is not looked into: it iterates to find its weight."""
        recorder = self.recorder
        recorder.paused = True
        try:
            result = forward(x)
        finally:
            recorder.paused = False
        if isinstance(result, Tensor):
            recorder.put(result, opaque(recorder.graph, f"layer {self.names[part]}", [given], result.shape))
        return result

    def _value(self, x: Any) -> Value | None:
        try:
            return self.recorder.get(x) if isinstance(x, Tensor) and self.recorder.knows(x) else None
        except Unsupported:
            return None


def contents(module: nn.Module) -> list[Any]:
    """What the modules hold beside parameters: identities of attributes, and what is in plain containers."""
    found: list[Any] = []
    for part in module.modules():
        for key, value in part.__dict__.items():
            if key not in STATE and key != "_call_impl":
                found.append((key, id(value), _inside(value)))
        found.append(tuple(tuple(part.__dict__[place]) for place in ("_modules", "_parameters", "_buffers")))
    return found


def _inside(value: Any, depth: int = 4) -> Any:
    """Identities of what is in plain containers, and in those in them."""
    if not depth or not isinstance(value, (list, dict, set, tuple, deque)):
        return None
    values = [*value, *value.values()] if isinstance(value, dict) else value
    return tuple((id(v), _inside(v, depth - 1)) for v in values)
