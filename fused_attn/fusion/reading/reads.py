"""What a block's code reads beside its inputs and parameters, and whether it does anything but read.

Nothing is run: the instructions of every function that the block's forward can reach, in whatever class, file or
closure, say which attributes, globals and options it names. Those that are there are what has to be watched (`Watched`)
and, with the functions themselves, what tells one block from another (`Reads.key`). More may be named than is read in
the end, never less: a name that is made at run time has all attributes watched.
"""

from __future__ import annotations

import argparse
import builtins
import dis
import enum
import functools
import inspect
import itertools
import sys
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..recipes.names import host_of
from .twin import STATE

MISSING: Any = type("Missing", (), {"__repr__": lambda self: "(nothing)"})()
MOST = 256
TOO_MANY = "reads more than can be watched"


class Watched(NamedTuple):
    """What must be unchanged for a block to be the same function. An owner None is the block itself.

    options: attributes with plain values, MISSING where there is none. parts: attributes by identity. absent: modules
    and names that are no attributes of their own. empty and filled: modules and names of parameters and buffers that
    are None, and that are not. contents: containers and what was in them.
    """

    options: tuple[tuple[Any, str, Any], ...] = ()
    parts: tuple[tuple[Any, str, Any], ...] = ()
    absent: tuple[tuple[Any, str], ...] = ()
    empty: tuple[tuple[nn.Module | None, str], ...] = ()
    filled: tuple[tuple[nn.Module | None, str], ...] = ()
    contents: tuple[tuple[Any, Any], ...] = ()


class Reads(NamedTuple):
    """remark: what the code does beside computing, or reads and cannot be watched; None: nothing. key: equal for blocks
    that compute the same function of their input and parameters. names: all that the code names. stores: code that sets
    attributes or items, prints or exits where it comes to that."""

    watched: Watched
    remark: str | None
    key: Hashable
    names: frozenset[str]
    stores: frozenset[types.CodeType] = frozenset()


def reads_of(block: nn.Module, replaced: Iterable[nn.Module] | None = None, most: int = MOST) -> Reads:
    """All that is read by a block's forward and by what that calls. most: what may be watched.

    replaced: the parts whose forward does not run, beside the block's own; the others see their own changes, and of
    them only what the code of these reads. None: all parts.
    """
    reader = _Reader(block, replaced)
    reader.read()
    watched = Watched(*(tuple(dict(entries).values()) for entries in reader.entries))
    if sum(map(len, watched)) > most:
        reader.remarks.append(TOO_MANY)
    remark = reader.remarks[0] if reader.remarks else None
    return Reads(watched, remark, tuple(reader.key), frozenset(reader.names), frozenset(reader.stores))


def restore(watched: Watched) -> bool:
    """Put back what running the code has changed of what it reads beside modules. Whether there was anything."""
    changed = False
    for container, copied in watched.contents:
        if list(map(id, _items(container))) == list(map(id, _items(copied))):
            continue
        changed = True
        container.clear()
        add = container.update if isinstance(container, (dict, set)) else container.extend
        add(copied)
    for owner, name, value in (*watched.options, *watched.parts):
        if not isinstance(owner, (nn.Module, type(None))) and getattr(owner, name, MISSING) is not value:
            if isinstance(value, types.MethodType):
                continue
            changed = True
            delattr(owner, name) if value is MISSING else setattr(owner, name, value)
    return changed


class _Stored(BaseException):
    pass


class Unstored:
    """While it is entered, on this thread, nothing is run on that sets attributes or items, prints or exits: where this
    code comes to that, everything ends up to here. It may set attributes of tensors: these are made on the way, or the
    map, which `capture` looks at afterwards."""

    def __init__(self, code: frozenset[types.CodeType]) -> None:
        self.places = {c: dict(_stores_in(c)) for c in code}
        #: What it came to.
        self.why = "keeps state"

    def __enter__(self) -> Unstored:
        self.before = sys.gettrace()
        if self.places:
            sys.settrace(self._called)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        if self.places:
            sys.settrace(self.before)
        return kind is _Stored

    def _called(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code not in self.places:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._stepped

    def _stepped(self, frame: types.FrameType, event: str, _: Any) -> Any:
        places = self.places[frame.f_code]
        at = places.get(frame.f_lasti) if event == "opcode" else None
        if at is not None and type(frame.f_locals.get(at[0])) is not Tensor:
            self.why = at[1]
            raise _Stored
        return self._stepped


def _stores_in(code: types.CodeType) -> Iterator[tuple[int, tuple[str, str]]]:
    """Where it does what must not be done: the variable that is changed there, if that is one, and what to say."""
    before = None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in _STOPS:
            yield step.offset, ("", _STOPS[step.argval])
        elif step.opname in _STORES:
            loaded = before is not None and before.opname.startswith("LOAD_FAST") and "ATTR" in step.opname
            names = before.argval if loaded and before is not None else ""
            yield step.offset, (names[-1] if isinstance(names, tuple) else names, "keeps state")
        before = step


def _items(container: Any) -> Iterator[Any]:
    if isinstance(container, dict):
        return itertools.chain(container.keys(), container.values())
    return iter(sorted(container, key=id) if isinstance(container, (set, frozenset)) else container)


# What one function names


class _Names(NamedTuple):
    """Of a function: the attributes that it names, in strings too; its globals; what it does beside reading; methods
    that change their owner, where that is a global; whether it makes names at run time; attributes that it asks for
    where there may be none; globals with what it names of them, and of that; code, its own or that of functions in it,
    that sets attributes or items, prints or exits; attributes that hold names of attributes that it asks for."""

    attributes: frozenset[str]
    globals: tuple[str, ...]
    remark: str | None
    changed: tuple[tuple[str, str], ...]
    dynamic: bool
    asked: frozenset[str]
    chains: frozenset[tuple[str, ...]]
    stores: frozenset[types.CodeType] = frozenset()
    held: frozenset[str] = frozenset()


_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR"}
#: Globals that code must not come to, which it may have in a branch for what is no option: `print(...); sys.exit()`.
_STOPS = {"print": "prints", "sys": "calls sys", **dict.fromkeys(("exit", "quit", "SystemExit"), "exits")}
_GLOBAL_STORES = {"STORE_GLOBAL", "DELETE_GLOBAL"}
_MUTATORS = {"append", "extend", "insert", "setdefault", "pop", "popitem", "clear", "remove", "appendleft", "popleft"}
_CHANGING = _MUTATORS | {"add", "discard", "update"}
_MADE = {"BUILD_LIST", "BUILD_MAP", "BUILD_SET", "LIST_EXTEND", "BUILD_CONST_KEY_MAP", "DICT_UPDATE", "SET_UPDATE"}
_MAKERS = {"list", "dict", "set", "OrderedDict", "defaultdict", "deque"}
_DYNAMIC = {"vars", "locals", "attrgetter", "methodcaller", "__dict__", "__getattribute__"}
#: What says more of a tensor, or of the moment, than what is computed; and what happens beside the computation.
_REMARKS = {
    **dict.fromkeys(("pprint",), "prints"),
    **dict.fromkeys(("open",), "opens a file"),
    **dict.fromkeys(("input", "breakpoint"), "reads input"),
    **dict.fromkeys(("is_grad_enabled", "is_inference_mode_enabled", "is_inference"), "asks whether gradients are on"),
    **dict.fromkeys(("is_autocast_enabled", "is_autocast_available", "get_autocast_dtype"), "asks for autocast"),
    **dict.fromkeys(("set_grad_enabled", "no_grad", "enable_grad", "inference_mode"), "switches gradients or autocast"),
    **dict.fromkeys(("autocast", "custom_fwd", "custom_bwd"), "switches gradients or autocast"),
    **dict.fromkeys(("checkpoint", "checkpoint_sequential"), "uses checkpointing"),
    **dict.fromkeys(("record_function", "set_detect_anomaly", "saved_tensors_hooks"), "is recorded"),
    **dict.fromkeys(("register_hook", "retain_grad", "register_post_accumulate_grad_hook"), "sets a hook"),
    **dict.fromkeys(("register_forward_hook", "register_forward_pre_hook"), "sets a hook"),
    **dict.fromkeys(("register_full_backward_hook", "register_full_backward_pre_hook"), "sets a hook"),
    **dict.fromkeys(("requires_grad", "requires_grad_", "grad_fn", "is_leaf"), "asks for gradients"),
    **dict.fromkeys(("is_cuda", "is_cpu", "is_mps", "is_xpu", "get_device", "is_available"), "asks for the device"),
    **dict.fromkeys(("is_compiling", "is_dynamo_compiling", "is_exporting", "is_in_onnx_export"), "asks who runs it"),
    **dict.fromkeys(("get_default_dtype", "get_default_device", "getenv", "environ"), "asks for a setting"),
    **dict.fromkeys(("are_deterministic_algorithms_enabled", "is_warn_always_enabled"), "asks for a setting"),
    **dict.fromkeys(("get_float32_matmul_precision", "get_deterministic_debug_mode"), "asks for a setting"),
    **dict.fromkeys(("get_num_threads", "get_num_interop_threads", "is_anomaly_enabled"), "asks for a setting"),
    **dict.fromkeys(("get_world_size", "get_rank", "is_initialized", "device_count"), "asks for a setting"),
    **dict.fromkeys(("setattr", "delattr", "register_buffer", "register_parameter", "add_module"), "keeps state"),
    **dict.fromkeys(("data_ptr", "_version", "untyped_storage", "storage"), "looks into a tensor's memory"),
    **dict.fromkeys(("is_contiguous", "dim_order", "storage_offset"), "asks how a tensor lies in memory"),
    **dict.fromkeys(("_base", "_is_view", "is_shared", "is_pinned"), "looks into a tensor's memory"),
    **dict.fromkeys(("is_neg", "is_conj"), "looks into a tensor's memory"),
    **dict.fromkeys(("_backward_hooks", "grad"), "asks for gradients"),
    **dict.fromkeys(("__setitem__", "__delitem__", "__setattr__", "__delattr__", "__iadd__", "__ior__"), "keeps state"),
    **dict.fromkeys(("setitem", "delitem", "iadd", "iconcat", "ior", "iand"), "keeps state"),
    **dict.fromkeys(("move_to_end", "reverse", "rotate", "subtract"), "keeps state"),
    **dict.fromkeys(("manual_seed", "get_rng_state", "set_rng_state", "fork_rng"), "draws random numbers"),
}  # fmt: skip
#: As globals: functions that find or make names that no string says.
_AT_RUN_TIME = {"globals", "eval", "exec", "compile"}
#: Errors that say nothing of attributes: containers are watched whole.
_OF_CONTAINERS = {"KeyError", "IndexError", "StopIteration"}
#: Modules of Python's own that only compute.
_PURE = {
    "math", "cmath", "functools", "itertools", "operator", "typing", "collections", "enum", "abc", "numbers",
    "fractions", "dataclasses", "types", "builtins", "copy", "string", "re", "typing_extensions", "__future__",
}  # fmt: skip
#: Libraries whose own functions are taken for computations.
_TRUSTED = ("torch", "torchvision", "timm", "monai", "einops", "fused_attn", "segmentation_models_pytorch")


def _root(name: Any) -> str:
    return str(name or "").partition(".")[0]


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> _Names:
    steps = list(dis.get_instructions(code))
    strings = frozenset(_identifiers(code.co_consts))
    attributes = set(strings)
    used: list[str] = []
    remark: str | None = None
    changed: list[tuple[str, str]] = []
    dynamic = False
    held: set[str] = set()
    for i, step in enumerate(steps):
        name = step.argval
        if step.opname in _GLOBAL_STORES or (step.opname == "STORE_DEREF" and name in code.co_freevars):
            remark = remark or "keeps state"
        elif step.opname == "IMPORT_NAME" and _root(name) not in _TRUSTED and _root(name) not in _PURE:
            remark = remark or f"imports {name}"
        elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            used.append(name)
            remark = remark or _REMARKS.get(name) or ("makes code or names" if name in _AT_RUN_TIME else None)
            dynamic |= name in _DYNAMIC
            if name == "getattr":
                where = _asked_for(code, steps[i:])
                dynamic |= where is None
                held |= {where} if where else set()
            if name in ("getattr", "hasattr", "type") and _is_argument(code, steps[i + 1 : i + 3]):
                remark = remark or "asks what a tensor has or is"
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(name)
            if name == "stride" and _is_method(step):
                remark = remark or "asks how a tensor lies in memory"
            remark = remark or _REMARKS.get(name) or _looks(steps[i : i + 5]) or _mutates(steps, i, changed)
            dynamic |= name in _DYNAMIC
        elif _catches(steps, i):
            remark = remark or "catches exceptions"
    asked = strings if dynamic or {"getattr", "hasattr"} & set(used) else frozenset()
    stores = frozenset((code,)) if any(True for _ in _stores_in(code)) else frozenset()
    found = _Names(
        frozenset(attributes),
        tuple(dict.fromkeys(used)),
        remark,
        tuple(changed),
        dynamic,
        asked,
        _chains(steps),
        stores,
        frozenset(held),
    )
    for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
        other = _names_of(inner)
        found = _Names(
            found.attributes | other.attributes,
            tuple(dict.fromkeys(found.globals + other.globals)),
            found.remark or other.remark,
            found.changed + other.changed,
            found.dynamic or other.dynamic,
            found.asked | other.asked,
            found.chains | other.chains,
            found.stores | other.stores,
            found.held | other.held,
        )
    return found


def own_names(function: types.FunctionType) -> frozenset[str]:
    """What a function itself names."""
    found = _names_of(function.__code__)
    matrix = any(step.argrepr in ("@", "@=") for step in dis.get_instructions(function.__code__))
    return found.attributes | frozenset(found.globals) | (frozenset(("__matmul__",)) if matrix else frozenset())


#: By class, which it keeps none of.
_MULTIPLIES: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def multiplies(cls: type[nn.Module]) -> bool:
    """Whether a forward, or a function or method of somebody's that it may call, multiplies anything."""
    if cls not in _MULTIPLIES:
        _MULTIPLIES[cls] = _multiplies(cls)
    return _MULTIPLIES[cls]


def _multiplies(cls: type[nn.Module]) -> bool:
    waiting: list[Any] = [inspect.getattr_static(cls, "forward", None)]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        function = getattr(function, "__func__", getattr(function, "fget", function))
        if not isinstance(function, types.FunctionType) or id(function) in seen or is_torch(function):
            continue
        seen.add(id(function))
        names = _names_of(function.__code__)
        if any(_has_product(code) for code in _codes(function.__code__)) or names.attributes & _PRODUCTS:
            return True
        waiting += [vars(base).get(name) for base in cls.__mro__ for name in names.attributes]
        waiting += [function.__globals__.get(name) for name in names.globals]
    return False


def multiplies_itself(function: types.FunctionType) -> bool:
    """Whether it does so in its own code."""
    named = _names_of(function.__code__).attributes
    return any(map(_has_product, _codes(function.__code__))) or bool(named & _PRODUCTS)


_PRODUCTS = frozenset(("mul", "mul_", "multiply", "multiply_"))


def taken_apart(function: types.FunctionType) -> tuple[str, int] | None:
    """Whether a function's first argument is a list or a dictionary ("list", "dict"), by what its own code does with
    it, and how many things in it that asks for (of a list that it loops over: 0); None: neither, by its code."""
    if function.__code__.co_argcount < 2:
        return None
    first = function.__code__.co_varnames[1]
    steps = list(dis.get_instructions(function.__code__))
    keys: set[str | int] = set()
    counts = []
    for step, after, last in zip(steps, steps[1:], [*steps[2:], None], strict=False):
        if not step.opname.startswith("LOAD_FAST") or step.argval != first:
            continue
        if after.opname == "UNPACK_SEQUENCE":
            counts.append(int(after.arg or 0))
        elif after.opname == "GET_ITER":
            counts.append(0)
        elif after.opname in ("LOAD_CONST", "LOAD_SMALL_INT") and last is not None and _is_index(last):
            keys.add(after.argval)
    names = {key for key in keys if type(key) is str}
    if names:
        return "dict", len(names)
    counts += [1 + max(key if key >= 0 else -1 - key for key in keys)] if keys and _are_numbers(keys) else []
    looped = {"zip", "enumerate"} & set(function.__code__.co_names)
    return ("list", max(counts)) if counts else ("list", 0) if looped else None


def _is_index(step: dis.Instruction) -> bool:
    return step.opname.startswith("BINARY_SUBSCR") or step.argrepr == "[]"


def _are_numbers(keys: Iterable[Any]) -> TypeGuard[Iterable[int]]:
    return all(type(key) is int for key in keys)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _has_product(code: types.CodeType) -> bool:
    operators = ("*", "*="), ("BINARY_MULTIPLY", "INPLACE_MULTIPLY")
    return any(s.argrepr in operators[0] or s.opname in operators[1] for s in dis.get_instructions(code))


def _identifiers(constants: Iterable[Any]) -> Iterator[str]:
    """The names in strings, also in tuples of such, and the parts of dotted ones."""
    for constant in constants:
        if isinstance(constant, (tuple, frozenset)):
            yield from _identifiers(constant)
        elif isinstance(constant, str):
            parts = constant.split(".")
            yield from parts if all(map(str.isidentifier, parts)) else ()


def _chains(steps: list[dis.Instruction]) -> frozenset[tuple[str, ...]]:
    """Such as ("torch", "nn", "functional", "relu")."""
    found: list[list[str]] = []
    open_ = False
    for step in steps:
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append([step.argval])
            open_ = True
        elif open_ and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found[-1].append(step.argval)
        else:
            open_ = False
    return frozenset(tuple(chain) for chain in found if len(chain) > 1)


def _asked_for(code: types.CodeType, steps: list[dis.Instruction]) -> str | None:
    """Where the name that `getattr` is given stands, of which these instructions are the beginning, as far as the two
    before its call tell: "" if it is a constant, else the attribute of self that it is, or None."""
    depth = 0
    for i, step in enumerate(steps):
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if "JUMP" in step.opname:
            return None
        if step.opname in ("CALL", "CALL_FUNCTION") and depth == 1:
            before = [s for s in steps[1:i] if s.opname not in ("PRECALL", "PUSH_NULL")][-2:]
            name = before[-1] if step.argval == 2 else before[0]
            if name.opname == "LOAD_ATTR" and step.argval == 2 and _is_self(code, before[0]):
                return str(name.argval)
            constant = name.opname == "LOAD_CONST" and isinstance(name.argval, str) and name.argval.isidentifier()
            return "" if constant else None
    return None


def _is_self(code: types.CodeType, step: dis.Instruction) -> bool:
    """Whether an instruction loads the first argument, last."""
    loaded = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return step.opname.startswith("LOAD_FAST") and code.co_argcount > 0 and loaded[-1] == code.co_varnames[0]


def _is_argument(code: types.CodeType, steps: list[dis.Instruction]) -> bool:
    """Whether an argument behind the first is loaded, which in a method is no module but a map."""
    loaded = next((s.argval for s in steps if s.opname.startswith("LOAD_FAST")), None)
    return loaded in code.co_varnames[1 : code.co_argcount]


def _is_method(step: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called."""
    return step.opname == "LOAD_METHOD" or (sys.version_info >= (3, 12) and bool((step.arg or 0) & 1))


def _catches(steps: list[dis.Instruction], i: int) -> bool:
    """Whether an instruction begins to handle an error that may say that there is no such attribute."""
    if steps[i].opname in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH"):
        return steps[i - 1].argval not in _OF_CONTAINERS
    return steps[i].opname == "PUSH_EXC_INFO" and steps[i + 1].opname == "POP_TOP"


def _looks(steps: list[dis.Instruction]) -> str | None:
    """Whether it asks what kind of device a tensor is on, or for one of torch's flags."""
    name, following = steps[0].argval, [(s.opname, s.argval) for s in steps[1:]]
    if name == "device" and following and (following[0][1] == "type" or any(o == "COMPARE_OP" for o, _ in following)):
        return "asks for the device"
    if name == "backends":
        return "asks for a setting"
    return None


def _mutates(steps: list[dis.Instruction], i: int, changed: list[tuple[str, str]]) -> str | None:
    """Whether a container that was not made here is changed; `changed` gets those that are globals."""
    owner, method = steps[i - 1], steps[i].argval
    if owner.opname == "LOAD_GLOBAL" and method in _CHANGING:
        changed.append((owner.argval, method))
    elif method in _MUTATORS and not (owner.opname == "LOAD_FAST" and _is_local(steps[: i - 1], owner.argval)):
        return "keeps state"
    return None


def _is_local(steps: list[dis.Instruction], name: str) -> bool:
    """Whether what a variable got last before these instructions end is a container made there."""
    at = next((i for i in reversed(range(len(steps))) if (steps[i].opname, steps[i].argval) == ("STORE_FAST", name)), 0)
    before = steps[max(at - 6, 0) : at]
    if not before or before[-1].opname in _MADE:
        return bool(before)
    comprehended = any(s.opname in ("GET_ITER", "LIST_APPEND") for s in before[-4:])
    called = any(s.opname == "LOAD_GLOBAL" and s.argval in _MAKERS for s in before)
    return before[-1].opname in ("CALL", "CALL_FUNCTION", "END_FOR", "SWAP") and (comprehended or called)


def asks_for_its_class(cls: type) -> bool:
    """Whether a method of a class asks what the class of an object is."""
    members = [member for base in cls.__mro__ if not is_torch(base) for member in vars(base).values()]
    names = [_names_of(member.__code__) for member in members if isinstance(member, types.FunctionType)]
    return any("type" in n.globals or "__class__" in n.attributes for n in names)


@functools.lru_cache(maxsize=512)
def _names_of_layer(cls: type) -> frozenset[str]:
    """The attributes that the forward of one of torch's own layers names, and what that calls of its class."""
    return frozenset().union(*(_names_of(f.__code__).attributes for f in _functions_of_layer(cls)))


def _functions_of_layer(cls: type) -> list[types.FunctionType]:
    """The forward of one of torch's own layers and what it calls of its class."""
    found: dict[types.FunctionType, None] = {}
    waiting, seen = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        functions = [f for base in cls.__mro__ if inspect.isfunction(f := vars(base).get(name))]
        if base_is_module(functions):
            continue
        found.update(dict.fromkeys(functions))
        for names in (_names_of(f.__code__).attributes for f in functions):
            waiting += names - seen
            seen |= names
    return list(found)


def base_is_module(functions: list[Any]) -> bool:
    """Whether these are methods that every module has."""
    return any(f.__qualname__.startswith("Module.") and f.__module__ == "torch.nn.modules.module" for f in functions)


# Values


def is_plain(value: Any) -> bool:
    """Whether a value is what it is: compared, not watched."""
    if isinstance(value, (tuple, frozenset)) and type(value) in (tuple, frozenset, torch.Size):
        return all(map(is_plain, value))
    if isinstance(value, float):
        return value == value and (type(value) is float or type(value).__module__ == "numpy")
    return type(value) in _PLAIN or isinstance(value, enum.Enum)


_PLAIN = (
    bool, int, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice,
    torch.dtype, torch.device, torch.memory_format, torch.layout,
)  # fmt: skip

_tokens: dict[int, tuple[weakref.ref[Any], int]] = {}
_count = itertools.count()


def token(thing: Any) -> int | None:
    """A number that stands for an object as long as it lives, and for no other after that; None where there is none."""
    i = id(thing)  # not a dictionary of weak keys: these are compared, which a tensor does element by element
    found = _tokens.get(i)
    if found is None or found[0]() is not thing:
        try:
            found = weakref.ref(thing, lambda _: _tokens.pop(i, None) and None), next(_count)
        except TypeError:
            return None
        _tokens[i] = found
    return found[1]


def _is_library(module: Any) -> bool:
    root = _root(module)
    return root in _TRUSTED or root in sys.stdlib_module_names or root in ("numpy", "triton", "scipy")


def _namespace(function: types.FunctionType) -> Any:
    """What has a function's globals as its attributes."""
    names = function.__globals__
    module = sys.modules.get(str(names.get("__name__")))
    if module is not None and vars(module) is names:
        return module
    found = _Globals()
    found.__dict__ = names
    return found


class _Globals:
    """Of functions whose module is not, or no longer, where Python looks for it."""


#: Methods that no computation calls.
_ASIDE = {
    "__init__", "__new__", "__del__", "__repr__", "__str__", "__format__", "__dir__", "__sizeof__", "__class_getitem__",
    "__setattr__", "__delattr__", "__setitem__", "__delitem__", "__init_subclass__", "__subclasshook__", "__copy__",
    "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__replace__",
    "__getnewargs_ex__", "__post_init__", "__set_name__", "__set__", "__delete__",
}  # fmt: skip


class _Reader:
    def __init__(self, block: nn.Module, replaced: Iterable[nn.Module] | None) -> None:
        self.block = block
        self.modules = list(block.modules())
        self.replaced = {id(part) for part in (self.modules if replaced is None else (block, *replaced))}
        self.remarks: list[str] = []
        self.stores: set[types.CodeType] = set()
        self.key: list[Hashable] = []
        #: As in `Watched`: a key that names the entry once, and the entry.
        self.entries: tuple[list[tuple[Any, Any]], ...] = ([], [], [], [], [], [])
        self.names: dict[str, None] = {}
        self.asked: dict[str, None] = {}  # of these, those that may be no attribute
        self.everything = False
        self.held: set[str] = set()  # attributes that hold names of attributes that are asked for
        self.strings: dict[str, dict[str, None]] = {}  # what attributes hold, where it is a string
        self.others: set[str] = set()  # attributes that hold anything else
        self.owners: list[Any] = []
        self.seen: dict[int, int] = {}  # where in `keep` it is, by id
        self.keep: list[Any] = []
        self.done: set[tuple[int, str]] = set()

    # The walk

    def read(self) -> None:
        for path, part in self.block.named_modules(remove_duplicate=False):
            self._structure(path, part)
        for part in (m for m in self.modules if id(m) in self.replaced):
            cls = host_of(type(part))
            self._part(cls, "forward", getattr(cls, "forward", None), visit=not is_torch(cls))
            if is_torch(cls):
                for function in _functions_of_layer(cls):
                    for chain in sorted(_names_of(function.__code__).chains):
                        self._chain(function.__globals__.get(chain[0]), chain[1:])
            own_call = cls.__call__ is not nn.Module.__call__ and not is_torch(cls)
            self._part(cls, "__call__", cls.__call__, visit=own_call)
            for name in ("__getattr__", "__getattribute__", "__setattr__"):
                if not is_torch(cls) and getattr(cls, name) is not getattr(nn.Module, name):
                    self.remarks.append(f"{cls.__name__} has a {name} of its own")
        done = -1
        while done != len(self.done):  # what is found last may name what those looked at first have
            if len(self.owners) > MOST:
                self.remarks.append(TOO_MANY)
                break
            done = len(self.done)
            for name in sorted(self.held):
                self.names.update(self.strings.get(name, {}))
                self.everything |= name in self.others
            for owner in (*self.modules, *list(self.owners)):
                for name in self._names_for(owner):
                    if (id(owner), name) not in self.done:
                        self._named(owner, name)

    def _structure(self, path: str, part: nn.Module) -> None:
        cls = host_of(type(part))
        self.key += [path, token(cls), self.modules.index(part)]
        self.key += [
            (place, name, None if p is None else (_shape(p), p.dtype))
            for place in ("_parameters", "_buffers")
            for name, p in part.__dict__[place].items()
        ]
        self.key.append(any(part.__dict__.get(h) for h in STATE if "hooks" in h) or "forward" in part.__dict__)

    def _names_for(self, owner: Any) -> Iterable[str]:
        cls: Any = host_of(type(owner)) if isinstance(owner, nn.Module) else type(owner)
        if isinstance(owner, nn.Module) and is_torch(cls):
            return (*self.names, *(_names_of_layer(cls) if id(owner) in self.replaced else ()))
        if not self.everything or isinstance(owner, types.FunctionType):
            return tuple(self.names)
        classes = (owner if isinstance(owner, type) else cls).__mro__
        of_class = (n for c in classes if not is_torch(c) and not _is_builtin_class(c) for n in vars(c))
        own = () if isinstance(owner, type) else getattr(owner, "__dict__", ())
        if isinstance(owner, nn.Module):
            own = (*own, *owner._parameters, *owner._buffers)
        return (*self.names, *(n for n in (*own, *of_class) if not n.startswith("__")))

    def _named(self, owner: Any, name: str) -> None:
        """A name in reached code, and an object that may have such an attribute."""
        self.done.add((id(owner), name))
        if isinstance(owner, nn.Module):
            own, cls = owner.__dict__, host_of(type(owner))
            for place in ("_parameters", "_buffers"):
                if name in own[place]:
                    entry = (id(owner), name), (self._owner(owner), name)
                    if own[place][name] is None:
                        self.entries[3].append(entry)
                    elif (
                        name == "weight" or name in self.names
                    ):  # layers of torch's may lose a bias, as what is run may
                        self.entries[4].append(entry)
                    return
            if name in STATE or name in own["_modules"]:
                return
            if name in own:
                if not name.startswith("_fused_attn"):
                    self._value(owner, name, own[name])
            elif is_torch(cls):
                function = getattr(cls, name, None)
                if isinstance(function, types.FunctionType) and name in _names_of_layer(cls):
                    self._part(cls, name, function, visit=False)
                    self.entries[2].append(((id(owner), name), (self._owner(owner), name)))
                self._absent(owner, name)
            else:
                self._of_class(owner, cls, name)
        elif isinstance(owner, types.ModuleType):
            if name in vars(owner):
                self._value(owner, name, vars(owner)[name])
            elif "__getattr__" in vars(owner):
                self.remarks.append(f"reads {owner.__name__}, which makes what it is asked for")
            else:
                self._absent(owner, name)
        elif isinstance(owner, types.FunctionType):
            if name in vars(owner):
                self._value(owner, name, vars(owner)[name])
        elif isinstance(owner, type):
            metas: Any = type(owner)
            if any("__getattr__" in vars(m) and not _is_library(m.__module__) for m in metas.__mro__):
                self.remarks.append(f"reads {owner.__name__}, which makes what it is asked for")
            if not name.startswith("__"):
                self._of_class(owner, owner, name)
        elif name in getattr(owner, "__dict__", ()) or name in _slots(type(owner)):
            self._value(owner, name, getattr(owner, name, MISSING))
        else:
            self._of_class(owner, type(owner), name)

    def _absent(self, owner: Any, name: str) -> None:
        """What code asks for where there may be none."""
        if name in self.asked and getattr(owner, name, MISSING) is MISSING:
            self.key += [name, "absent"]
            self.entries[0].append(((id(owner), name), (self._owner(owner), name, MISSING)))

    def _of_class(self, owner: Any, cls: Any, name: str) -> None:
        """An attribute that an object has from its class."""
        bases = [base for base in cls.__mro__ if name in vars(base) and not _is_builtin_class(base)]
        found = [(base, vars(base)[name]) for base in bases if not is_torch(base)]
        if not found:
            for meta in (m for m in type(cls).__mro__ if name in vars(m) and not _is_library(m.__module__)):
                self._value(meta, name, vars(meta)[name])  # `type(self).name`
            self._absent(owner, name)
            return
        value = found[0][1]
        if not isinstance(value, (types.FunctionType, staticmethod, classmethod, property, functools.cached_property)):
            if isinstance(owner, tuple) and hasattr(type(owner), "_fields"):
                return  # what is in it is known already
            if hasattr(type(value), "__get__"):
                self.remarks.append(f"reads {name}, a {type(value).__name__}, which cannot be watched")
            else:
                self._value(owner, name, value)
            return
        for base in {cls: None, **dict.fromkeys(bases)}:  # those that it may call by super() too
            if base in (cls, *bases[1:]) and base is not nn.Module:
                self._watch_method(base, name)
        self.others.add(name)
        if owner is not cls and not isinstance(value, property):
            self.entries[2].append(((id(owner), name), (self._owner(owner), name)))
        for _, function in found:
            for f in (function, *(getattr(function, n, None) for n in ("__func__", "fget", "func"))):
                if isinstance(f, types.FunctionType):
                    self._visit(f)

    def _watch_method(self, cls: type, name: str) -> None:
        value = getattr(cls, name)
        if isinstance(value, types.MethodType):  # of a classmethod: another object each time, but an equal one
            self.entries[0].append(((id(cls), name), (cls, name, value)))
        else:
            self._part(cls, name, value, visit=False)

    # What was found

    def _owner(self, owner: Any) -> Any:
        return None if owner is self.block else owner

    def _value(self, owner: Any, name: str, value: Any) -> None:
        self.key.append(name)
        if isinstance(value, str):
            self.strings.setdefault(name, {})[value] = None
        elif value is not None:
            self.others.add(name)
        if is_plain(value):
            self._member(value)
            self.key.append((type(value).__name__, value))
            self.entries[0].append(((id(owner), name), (self._owner(owner), name, value)))
        else:
            self._part(owner, name, value)

    def _part(self, owner: Any, name: str, value: Any, visit: bool = True) -> None:
        self.entries[1].append(((id(owner), name), (self._owner(owner), name, value)))
        if visit:
            self._visit(value, name)
        else:
            self.key.append(token(value))

    def _member(self, value: Any) -> None:
        """What an enumeration's members have beside their names, which may read more."""
        if not isinstance(value, enum.Enum) or id(value) in self.seen:
            return
        self._keep(value)
        if not is_plain(value.value):
            self._visit(value.value)
        for cls in (c for c in type(value).__mro__ if not _is_library(c.__module__)):
            for name, member in vars(cls).items():
                if not name.startswith("_") and isinstance(member, (types.FunctionType, property)):
                    self._watch_method(cls, name)
                    self._visit(member.fget if isinstance(member, property) else member)

    def _keep(self, value: Any) -> None:
        self.seen[id(value)] = len(self.keep)
        self.keep.append(value)

    def _visit(self, value: Any, name: str = "") -> None:
        if is_plain(value):
            self._member(value)
            self.key.append((type(value).__name__, value))
        elif id(value) in self.seen:
            self.key.append(self.seen[id(value)])
        else:
            self._keep(value)
            self._new(value, name)

    def _new(self, value: Any, name: str) -> None:
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, (types.MethodType, functools.partial)):
            held = (value.func, *value.args, value.keywords) if isinstance(value, functools.partial) else ()
            for inner in held or (value.__func__, value.__self__):  # type: ignore[union-attr]
                self._visit(inner)
        elif isinstance(value, (nn.Module, Tensor, types.BuiltinFunctionType, types.ModuleType)):
            self._known(value)
        elif isinstance(value, (list, tuple, set, frozenset, dict, deque)):
            self._container(value)
        elif isinstance(value, type):
            self.key.append(token(value))
            if not _is_library(value.__module__):
                self.owners.append(value)
                self._function_of_autograd(value)
        elif _is_opaque(value):
            self.remarks.append(f"reads {name or 'something'}, a {type(value).__name__}, which cannot be watched")
        else:
            self.key.append(token(type(value)))
            self._owned(value)

    def _owned(self, value: Any) -> None:
        """An object whose attributes are watched, and its operators and the like, which code calls by no name."""
        self.owners.append(value)
        for cls in type(value).__mro__:
            for name, function in () if _is_library(cls.__module__) else vars(cls).items():
                special = name.startswith("__") and name not in _ASIDE
                if special and isinstance(function, types.FunctionType):
                    self._part(cls, name, function)

    def _known(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            if value not in self.modules:
                self.remarks.append(f"runs a {type(value).__name__} that is no part of it")
            else:
                self.key.append(self.modules.index(value))
        elif isinstance(value, types.ModuleType):
            self.key.append(value.__name__)
            if type(value) is not types.ModuleType and type(value).__module__ != "torch._ops":
                self.remarks.append("asks for a setting")
            if not _is_library(value.__name__):
                self.owners.append(value)
            elif _root(value.__name__) not in (*_TRUSTED, *_PURE) and value is not builtins:
                self.remarks.append(f"calls {_root(value.__name__)}")
        elif isinstance(value, types.BuiltinFunctionType):
            self.key.append(value.__qualname__)
            module = _root(getattr(value, "__module__", None))
            owner = value.__self__
            if module and module.lstrip("_") not in (*_TRUSTED, *_PURE):
                self.remarks.append(f"calls {module}.{value.__name__}".replace("._", "."))
            elif not isinstance(owner, (types.ModuleType, type(None), type)):
                self._visit(owner)
        else:
            self.key.append(token(value))

    def _container(self, value: Any) -> None:
        if not isinstance(value, (tuple, frozenset)):
            copied = (
                dict(value) if isinstance(value, dict) else type(value)(value) if _is_builtin(value) else list(value)
            )
            self.entries[5].append((id(value), (value, copied)))
        if not _is_builtin(value):
            self._owned(value)
        self.key += [type(value).__name__, len(value)]
        inner: Iterator[Any] = iter(value)
        if isinstance(value, dict):
            inner = itertools.chain.from_iterable(value.items())
        elif isinstance(value, (set, frozenset)):
            inner = iter(sorted(value, key=repr))
        for v in itertools.islice(inner, MOST):
            self._visit(v)
        if len(value) > MOST:
            self.remarks.append(TOO_MANY)

    def _function_of_autograd(self, cls: type) -> None:
        if issubclass(cls, torch.autograd.Function):
            for name in ("forward", "backward", "setup_context", "vjp", "jvp"):
                function = inspect.getattr_static(cls, name, None)
                function = getattr(function, "__func__", function)
                if isinstance(function, types.FunctionType) and not is_torch(cls):
                    self._function(function, keeps=True)  # what it keeps is in its context

    def _function(self, function: types.FunctionType, keeps: bool = False) -> None:
        module = str(function.__module__ or "")
        if _root(module) in ("torch", "einops", "fused_attn") or (
            _is_library(module) and _root(module) not in _TRUSTED
        ):
            self.key.append(token(function))
            if _root(module) == "fused_attn":  # of its own blocks the options count, and nothing else changes
                self.names.update(dict.fromkeys(sorted(_names_of(function.__code__).attributes)))
            elif _root(module) not in (*_TRUSTED, *_PURE):
                self.remarks.append(f"calls {_root(module)}")
            return
        self.key.append(function.__code__)
        self.entries[1].append(((id(function), "code"), (function, "__code__", function.__code__)))
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name) is not None:
                self._value(function, name, getattr(function, name))
        names = _names_of(function.__code__)
        self.names.update(dict.fromkeys(sorted(names.attributes)))
        self.asked.update(dict.fromkeys(sorted(names.asked)))
        self.everything |= names.dynamic
        self.held |= names.held
        if vars(function):
            self.owners.append(function)
        space = _namespace(function)
        if not _is_library(module):
            changes = [m for g, m in names.changed if not isinstance(getattr(space, g, None), types.ModuleType)]
            if names.remark and not (keeps and names.remark == "keeps state"):
                self.remarks.append(names.remark)
            elif changes:
                self.remarks.append("keeps state")
            if not keeps:
                self.stores |= names.stores
            elif stops := [_STOPS[name] for name in names.globals if name in _STOPS]:
                self.remarks.append(stops[0])
        for name in names.globals:
            value = getattr(space, name, MISSING)
            if name in _STOPS and not keeps and not _is_library(module):  # what stands behind it is not come to
                continue
            if isinstance(value, types.ModuleType):  # such as torch: what is read of it is watched, if anything
                self._visit(value)
            elif value is not MISSING:
                self._value(space, name, value)
        for chain in sorted(c for c in names.chains if c[0] not in _STOPS):
            self._chain(getattr(space, chain[0], None), chain[1:])
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:
                continue
            if not (isinstance(content, type) and content in type(self.block).__mro__):  # __class__, for super()
                self._value(cell, "cell_contents", content)

    def _chain(self, owner: Any, names: tuple[str, ...]) -> None:
        """What code reads of a library's modules, such as torch.nn.functional.relu: others are owners."""
        for name in names:
            if not isinstance(owner, types.ModuleType) or not _is_library(owner.__name__) or name not in vars(owner):
                return
            value = vars(owner)[name]
            if isinstance(value, types.ModuleType):
                self._visit(value)
            elif isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
                self._part(owner, name, value, visit=False)
            elif isinstance(value, (bool, int, float, str)):
                self._value(owner, name, value)
            owner = value


#: Python's own classes that keep nothing but attributes, and modules of such as keep nothing.
_OPEN = {*types.SimpleNamespace.__mro__, *argparse.Namespace.__mro__}
_STATELESS = ("builtins", "abc", "typing", "typing_extensions", "enum", "collections.abc")


def _is_opaque(value: Any) -> bool:
    """Whether nothing says what is in it: it is of a compiled class or of one of Python's own."""
    if isinstance(value, weakref.ref) or (_is_library(type(value).__module__) and not hasattr(value, "__dict__")):
        return True
    return any(
        _root(base.__module__) in sys.stdlib_module_names and base not in _OPEN and base.__module__ not in _STATELESS
        for base in type(value).__mro__
    )


def _is_builtin_class(cls: type) -> bool:
    return cls.__module__ == "builtins"


def is_torch(thing: Any) -> bool:
    """Whether a class or function is torch's own."""
    return is_of_torch(thing.__module__)


def is_of_torch(module: Any) -> bool:
    """Whether a module of that name is torch's."""
    return _root(module) == "torch"


def _is_builtin(value: Any) -> bool:
    return type(value).__module__ in ("builtins", "collections")


def _shape(p: Any) -> Hashable:
    return None if is_lazy(p) else tuple(p.shape)


def _slots(cls: type) -> set[str]:
    return {name for base in cls.__mro__ for name in getattr(base, "__slots__", ())}
