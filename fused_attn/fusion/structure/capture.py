"""Running a module once on tensors without data, and writing down what it computes."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..swap import as_original
from .graph import Graph, Unsupported, Value
from .operators import OPERATORS, opaque
from .shapes import result

MAX_OPERATORS = 160


class Refused(Exception):
    """The module does something that a fused block would not; the message says what. graph: what it computed so far."""

    graph: Graph | None = None


class Recorder(TorchDispatchMode):
    """Gives every tensor that goes by its canonical value."""

    def __init__(self, graph: Graph, limit: int = MAX_OPERATORS) -> None:
        super().__init__()
        self.graph, self.limit = graph, limit
        self._values: dict[int, Value | None] = {}
        self._keep: list[Tensor] = []
        self._storages: dict[int, list[int]] = {}
        self.count = 0
        self.strange: list[str] = []  # names of operators without canonical form
        self.remarks: list[str] = []  # what makes the whole thing not a function of its inputs
        self.protected: set[int] = set()  # storages that may not be written to
        self.written: list[Tensor] = []

    def put(self, tensor: Tensor, value: Value | None) -> None:
        self._values[id(tensor)] = value
        self._keep.append(tensor)
        self._storages.setdefault(_storage(tensor), []).append(id(tensor))

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
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if function.namespace == "prim" or name in _SILENT:
            return function(*args, **kwargs)
        self.count += 1
        if self.count > self.limit:
            raise Refused("more operators than any block we know")
        if not torch.is_grad_enabled():
            self.remarks.append("runs without gradients in part")
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.remarks.append("draws random numbers")
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


# torch has wrapped this method in one that imports its compiler (seconds) in order not to be compiled; it never is.
Recorder.__torch_dispatch__ = getattr(Recorder.__torch_dispatch__, "__wrapped__", Recorder.__torch_dispatch__)  # type: ignore[method-assign]

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


# What else the code does while it runs

_ALLOWED = (
    "torch",
    "torchvision",
    "timm",
    "monai",
    "einops",
    "typing",
    "functools",
    "contextlib",
    "collections",
    "enum",
    "abc",
)
_REMARKS = {
    "print": "prints",
    "open": "opens a file",
    "input": "reads input",
    "is_grad_enabled": "asks whether gradients are on",
    "is_inference_mode_enabled": "asks whether gradients are on",
    "is_autocast_enabled": "asks for autocast",
    "set_grad_enabled": "switches gradients",
    "gc": "",
}
#: Instructions by which Python code keeps state.
STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR"}
_codes: dict[CodeType, str | None] = {}


def stores(code: CodeType) -> bool:
    """Whether a function keeps state."""
    import dis

    return any(i.opname in STORES for i in dis.get_instructions(code))


def _remark_of_code(code: CodeType) -> str | None:
    """What a function of the user's does that is no computation."""
    if code not in _codes:
        _codes[code] = "keeps state" if stores(code) else None
    return _codes[code]


@contextlib.contextmanager
def watching(remarks: list[str]) -> Iterator[None]:
    """Note what the Python code that runs inside does beside computing."""
    before = sys.getprofile()
    me = threading.get_ident()

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_call":
            _watch_builtin(arg, frame, remarks)
        elif event == "call" and threading.get_ident() == me:
            _watch_function(frame, remarks)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)


def _module_of(frame: FrameType | None) -> str:
    return "" if frame is None else str(frame.f_globals.get("__name__", ""))


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _ALLOWED


def _watch_builtin(function: Any, frame: FrameType, remarks: list[str]) -> None:
    if _is_library(_module_of(frame)) or _module_of(frame).startswith("fused_attn.fusion.structure"):
        return
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__ or ""
    if name in _REMARKS and _REMARKS[name]:
        remarks.append(_REMARKS[name])
    elif module.partition(".")[0] in ("time", "random", "_random", "posix", "_io", "numpy", "_socket", "_thread"):
        remarks.append(f"calls {module}.{name}".replace("._", "."))
    elif name in (
        "append",
        "extend",
        "insert",
        "add",
        "update",
        "setdefault",
        "pop",
        "__setitem__",
        "setattr",
        "clear",
    ):
        owner = getattr(function, "__self__", None)
        if name == "setattr" or (isinstance(owner, (list, dict, set)) and not _is_local(owner, frame)):
            remarks.append("keeps state")


def _is_local(owner: Any, frame: FrameType) -> bool:
    """Whether a container was made in this call: a local of it, not an argument or something read from elsewhere."""
    code = frame.f_code
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    local = any(value is owner for name, value in frame.f_locals.items() if name not in arguments)
    if not local:
        return sys.getrefcount(owner) <= 5  # a list that is being built and has no name yet
    kept = (v for f in (frame.f_locals.get("self"),) if isinstance(f, nn.Module) for v in vars(f).values())
    return not any(v is owner for v in kept) and not any(v is owner for v in frame.f_globals.values())


def _watch_function(frame: FrameType, remarks: list[str]) -> None:
    module = _module_of(frame)
    name = frame.f_code.co_name
    if module in ("torch.autograd.grad_mode", "torch.amp.autocast_mode") and name in ("__enter__", "__init__"):
        back = frame.f_back
        while back is not None and _module_of(back).startswith(
            ("torch.autograd.grad_mode", "torch.utils._contextlib", "torch.amp", "torch.cuda.amp", "torch.cpu.amp")
        ):
            back = back.f_back
        if back is not None and not _is_library(_module_of(back)) and not _module_of(back).startswith("fused_attn"):
            remarks.append("switches gradients or autocast")
        return
    if module.startswith("torch.utils.checkpoint"):
        remarks.append("uses checkpointing")
    if _is_library(module) or module.startswith("fused_attn."):
        return
    if module.partition(".")[0] in sys.stdlib_module_names and not _called_by_library(frame):
        remarks.append(f"calls {module}")
        return
    if module.partition(".")[0] in sys.stdlib_module_names:
        return
    remark = _remark_of_code(frame.f_code)
    if remark:
        remarks.append(remark)


def _called_by_library(frame: FrameType) -> bool:
    return (
        _is_library(_module_of(frame.f_back))
        or _module_of(frame.f_back).startswith("fused_attn")
        or _module_of(frame.f_back).partition(".")[0] in sys.stdlib_module_names
    )


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
    """What a module computes: from its input of this shape, in this mode. calls: of its parts, the inner ones first."""

    graph: Graph
    output: Value
    dtype: torch.dtype
    strange: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def remark(self) -> str | None:
        return self.remarks[0] if self.remarks else None


#: Sizes of the map in a capture: odd, different from each other and from common channel counts.
SPACE = (13, 11, 17)
BATCH = 5


def capture(
    module: nn.Module,
    shape: Sequence[int],
    *,
    training: bool = False,
    dtype: torch.dtype = torch.float32,
    watch: bool = True,
    maps: Sequence[str] = (),
) -> Captured:
    """The canonical form of module(x) for x of this shape.

    Nothing of the module is changed: parameters and buffers are stood in for. maps: names of parameters that stand for
    other inputs.

    Raises:
        Refused: it branches on data, returns no single tensor, or is larger than any block.
        Exception: whatever the module raises for such an input.
    """
    graph = Graph()
    recorder = Recorder(graph)
    remarks = recorder.remarks
    modes = [(m, m.training) for m in module.modules()]
    with torch.enable_grad():
        x = torch.empty(tuple(shape), dtype=dtype, device="meta")
        tensors: dict[int, Tensor] = {}
        counted: set[int] = set()
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            tensors[id(p)] = torch.empty(p.shape, dtype=dtype if p.is_floating_point() else p.dtype, device="meta")
            recorder.put(tensors[id(p)], graph.leaf("input" if name in maps else "leaf", name, p.shape))
            if name.endswith("num_batches_tracked"):
                counted.add(_storage(tensors[id(p)]))
        recorder.put(x, graph.leaf("input", "x", shape))
        recorder.protected = {_storage(x)}
        contents, held = _contents(module), [(part, dict(part.__dict__)) for part in module.modules()]
        dead: list[weakref.ref] = []
        calls: list[Call] = []
        try:
            for m, _ in modes:
                m.training = training
            quiet = _Quiet()
            with (
                as_original(),
                recording(module, recorder, calls),
                standing_in(module, tensors),
                recorder,
                contextlib.redirect_stdout(quiet),
                contextlib.redirect_stderr(quiet),
                watching(remarks) if watch else contextlib.nullcontext(),
            ):
                y = module(x)
        except (RuntimeError, NotImplementedError) as error:
            if "meta tensor" in str(error) or "Meta" in str(error):
                refused = Refused("branches on data")
                refused.graph = graph
                raise refused from error
            raise
        finally:
            for m, was in modes:
                m.training = was
            if sys.exc_info()[0] is not None:
                _put_back(module, held, contents)
        if quiet.written and watch:
            remarks.append("prints")
        if _put_back(module, held, contents):
            remarks.append("keeps state")
        if not isinstance(y, Tensor):
            raise Refused("returns no single tensor")
        try:
            output = recorder.get(y)
        except Unsupported:
            raise Refused("writes into a view of what it returns") from None
        buffers = {_storage(t) for t in tensors.values()}
        if any(_storage(t) in buffers - counted for t in recorder.written):
            remarks.append("writes into a parameter or buffer")
        result = Captured(graph, output, y.dtype, recorder.strange, remarks, calls)
        known = {id(t) for t in tensors.values()} | {id(x)}
        dead = [weakref.ref(t) for t in recorder._keep if id(t) not in known]
        recorder._keep.clear()
        recorder.written.clear()
        del y, x, tensors
    if any(ref() is not None for ref in dead):
        remarks.append("keeps a tensor")
    return result


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextlib.contextmanager
def standing_in(module: nn.Module, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Other tensors in place of the parameters and buffers with these ids, wherever they are."""
    places = [
        (held, name, tensor)
        for part in module.modules()
        for held in (part._parameters, part._buffers)
        for name, tensor in held.items()
        if tensor is not None and id(tensor) in tensors
    ]
    for held, name, tensor in places:
        held[name] = tensors[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor  # type: ignore[assignment]


@contextlib.contextmanager
def recording(module: nn.Module, recorder: Recorder, calls: list[Call]) -> Iterator[None]:
    """Note the calls of a module's parts by hooks. Nobody else's are called for tensors without data."""
    before = [(m, h, m.__dict__[h]) for m in module.modules() for h in HOOKS if m.__dict__.get(h)]
    for m, h, hooks in before:
        m.__dict__[h] = type(hooks)()
    places = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    names = {m: name for name, m in module.named_modules() if name and all(h in m.__dict__ for h in places)}
    before += [(m, h, m.__dict__[h]) for m in names for h in places]
    waiting: list[tuple[nn.Module, Value | None]] = []  # calls under way, with what their inputs were before them

    def value_of(x: Any) -> Value | None:
        try:
            return recorder.get(x) if isinstance(x, Tensor) and recorder.knows(x) else None
        except Unsupported:
            return None

    def begin(part: nn.Module, args: tuple, kwargs: dict) -> None:
        waiting.append((part, value_of(args[0]) if len(args) == 1 and not kwargs else None))

    def end(part: nn.Module, args: tuple, result: Any) -> None:
        caller, given = waiting.pop()
        while caller is not part:  # one that raised, and somebody caught it
            caller, given = waiting.pop()
        made = value_of(result)
        if given is not None and made is not None:
            calls.append(Call(names[part], type(part), given, made))

    for m in names:
        for place, hook in zip(places, (begin, True, end), strict=True):
            m.__dict__[place] = OrderedDict({0: hook})
    try:
        yield
    finally:
        for m, h, hooks in reversed(before):
            m.__dict__[h] = hooks


class _Quiet:
    written = False

    def write(self, text: str) -> int:
        self.written = True
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _contents(module: nn.Module) -> list:
    """What the modules hold beside parameters: identities of attributes, and what is in plain containers."""
    found: list = []
    for name, part in module.named_modules():
        for key, value in part.__dict__.items():
            if key in ("training", "_parameters", "_buffers", "_modules") or key.startswith("_fused_attn"):
                continue
            inside = (
                tuple(map(id, value.values() if isinstance(value, dict) else value))
                if isinstance(value, (list, dict, set, tuple))
                else None
            )
            found.append((name, key, id(value) if not isinstance(value, (int, float, str)) else value, inside))
        found.append((name, tuple(part._modules), tuple(part._parameters), tuple(part._buffers)))
    return found


def _put_back(module: nn.Module, held: list[tuple[nn.Module, dict]], contents: list) -> bool:
    """Whether a run has changed what the modules hold; attributes are then what they were."""
    if _contents(module) == contents:
        return False
    for part, before in held:
        for key in set(part.__dict__) - set(before):
            del part.__dict__[key]
        part.__dict__.update(before)
    return True
