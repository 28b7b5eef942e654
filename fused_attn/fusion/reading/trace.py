"""A module's own forward as a graph of torch.fx: its parts are called, not looked into.

It is run on a twin, with stand-ins for tensors, so that nothing is computed and nothing of torch's is patched. What the
graph could not say again at every call (a branch, a context, a tensor made on the way) is refused.
"""

from __future__ import annotations

import dis
import functools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from .capture import contents
from .layers import LISTS
from .nodes import dims_of
from .reads import is_plain
from .twin import STATE, twin


class Untraceable(Exception):
    """A forward that no graph stands for; the message says why."""


def trace(block: nn.Module, enters: Callable[[str], bool]) -> fx.Graph:
    """The graph of block(x), the same in training and in evaluation. Its inputs are "block", which nothing in it uses,
    and x.

    enters: whether the part at a path is no call in the graph, but what it calls is.

    Raises:
        Untraceable: no graph is the same function.
        NoTwin: as in `twin`.
    """
    graph, other = (trace_in_mode(block, enters, training) for training in (False, True))
    if not is_same_code(graph, other):
        raise Untraceable("computes something else in training")
    return graph


@dataclass
class Rank:
    """How many dimensions the map is taken to have where a forward asks for its or another tensor's; whether it has
    asked."""

    dims: int
    asked: bool = False


def trace_in_mode(
    block: nn.Module, enters: Callable[[str], bool], training: bool, rank: Rank | None = None, **given: Any
) -> fx.Graph:
    """As `trace`, of a forward that may do something else in the other mode, for maps of another rank, or where it is
    given something beside the map."""
    return _Trace(block, enters, training, rank).run(**given)


class Option(NamedTuple):
    """A number that a forward is given beside its map, and what the forward has asked of it: a function, what else it
    was given, and its answer."""

    name: str
    guards: list[tuple[Callable[..., bool], tuple[Any, ...], bool]]

    def holds(self, value: float) -> bool:
        """Whether the forward takes the same way for another number."""
        return all(function(value, *others) is answer for function, others, answer in self.guards)


def trace_with_option(
    block: nn.Module, enters: Callable[[str], bool], training: bool, rank: Rank, name: str, value: float
) -> tuple[fx.Graph, Option]:
    """As `trace_in_mode`, of block(x, name=value); its inputs are "block", x and the option."""
    made = _Trace(block, enters, training, rank)
    made.option = Option(name, [])
    option = _Number(made, made.graph.placeholder(name), value)
    return made.run(**{name: option}), made.option


def trace_two_maps(block: nn.Module, enters: Callable[[str], bool], training: bool, rank: Rank, name: str) -> fx.Graph:
    """As `trace_in_mode`, of block(x, y), the second under this name; its inputs are "block", x and y."""
    made = _Trace(block, enters, training, rank)
    return made.run(**{name: _Value(made, made.graph.placeholder("y"))})


def is_same_code(graph: fx.Graph, other: fx.Graph) -> bool:
    codes = [g.python_code("self") for g in (graph, other)]
    return codes[0].src == codes[1].src and codes[0].globals == codes[1].globals


class _Trace:
    def __init__(
        self, block: nn.Module, enters: Callable[[str], bool], training: bool, rank: Rank | None = None
    ) -> None:
        self.block, self.enters, self.rank = block, enters, rank
        self.refused: str | None = None  # kept: the forward may catch what is raised
        self.option = Option("", [])
        self.indices: list[_Value] = []  # of what an index was asked, by torch if it is in its next call
        self.graph = fx.Graph()
        self.graph.placeholder("block")
        self.x = _Value(self, self.graph.placeholder("x"))
        self.held: set[fx.Node] = set()
        tensors: dict[int, Any] = {}
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            node = self.graph.create_node("get_attr", name)
            self.held.add(node)
            tensors[id(tensor)] = _Value(self, node)
        self.root = twin(block, tensors, self.call)
        self.paths = {id(part): path for path, part in self.root.named_modules()}
        for path, part in self.root.named_modules():
            part.training = training
            if path:
                part.__dict__["_parameters"] = _Parameters(self, part)

    def run(self, **options: Any) -> fx.Graph:
        before = contents(self.root)
        try:
            with _Functions(self):
                result = self.root.forward(self.x, **options)
        except Untraceable:
            raise
        except Exception as error:  # of somebody's code, given what is no tensor
            raise Untraceable(f"raises {type(error).__name__}") from error
        if contents(self.root) != before:
            self.refuse("keeps state")
        self.expect_indices(())
        if self.refused is not None:
            raise Untraceable(self.refused)
        self.graph.output(self.argument(result))
        for node in reversed(self.graph.nodes):
            if not node.users and (node in self.held or node.target is getattr):
                self.graph.erase_node(node)
        return self.graph

    def expect_indices(self, tree: Any) -> None:
        """Refuses where anything else than this call has asked for an index."""
        given = {id(v) for v in _values_in(tree)}
        if any(id(v) not in given for v in self.indices):
            self.refuse(_LOOKS)
        self.indices.clear()

    def refuse(self, why: str) -> NoReturn:
        self.refused = self.refused or why
        raise Untraceable(self.refused)

    def call(self, part: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.paths.get(id(part))
        if not path:
            self.refuse("calls itself" if path == "" else "calls what is no part of it")
        return forward(*args, **kwargs) if self.enters(path) else self.record("call_module", path, args, kwargs)

    def record(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _Trace.run.__code__:
            if frame.f_code.co_filename not in _OURS and _guards(frame.f_code):
                self.refuse("computes in a `with` or `try`")
            frame = frame.f_back
        self.expect_indices((args, kwargs) if op == "call_function" else ())
        given = tuple(map(self.argument, args)), {k: self.argument(v) for k, v in kwargs.items()}
        return _Value(self, self.graph.create_node(op, target, *given))

    def dims(self, node: Any) -> int:
        """How many dimensions a value has, of maps of the rank that is assumed."""
        assert self.rank is not None
        self.rank.asked = True
        return dims_of(node, self.rank.dims, self.block)

    def argument(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, _Value):
            return value._node
        if kind in (tuple, list):
            return kind(map(self.argument, value))
        if kind is dict and all(type(key) is str for key in value):
            return {key: self.argument(v) for key, v in value.items()}
        if kind is slice:
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if kind is torch.Size:
            return tuple(value)
        if kind is not range and is_plain(value) and kind.__module__ in ("builtins", "torch"):
            return value
        self.refuse(f"passes on a {kind.__name__}")


class _Parameters(dict[str, Any]):
    """Of a part, without its other attributes: an option that is read would be written down as it is now, and `fuse`
    watches those of the parts that it bypasses only, and the mode of none."""

    def __init__(self, trace: _Trace, part: nn.Module) -> None:
        super().__init__(part.__dict__["_parameters"])
        self.trace = trace
        # What a list of parameters has beside these says only how many there are, and their names.
        held = _OF_LISTS if type(part) in LISTS else STATE
        self.options = [n for n in part.__dict__ if n == "training" or (n not in held and n != "_call_impl")]
        for name in self.options:
            del part.__dict__[name]

    def __contains__(self, name: object) -> bool:  # where a module looks first for what it has not itself
        if name in self.options:
            self.trace.refuse("reads an option of one of its parts")
        return super().__contains__(name)


_OF_LISTS = {*STATE, "_size", "_keys"}


def _guards(code: types.CodeType) -> bool:
    """Whether there is a `with` or a `try`: what runs in it may not do the same outside."""
    known = _GUARDED.get(code)
    if known is None:
        known = _GUARDED[code] = any(step.opname in _GUARDS for step in dis.get_instructions(code))
    return known


_GUARDS = {"BEFORE_WITH", "SETUP_WITH", "SETUP_FINALLY", "PUSH_EXC_INFO"}
_GUARDED: weakref.WeakKeyDictionary[types.CodeType, bool] = weakref.WeakKeyDictionary()
#: Between a forward and what it calls of torch's; these have no part in what is computed.
_OURS = {
    __file__,
    twin.__code__.co_filename,
    torch.overrides.handle_torch_function.__code__.co_filename,
    torch.nn.functional.relu.__code__.co_filename,
    torch.nn.Module.forward.__code__.co_filename,
    torch.functional.split.__code__.co_filename,
    torch._jit_internal.boolean_dispatch.__code__.co_filename,
}


class _Functions(TorchFunctionMode):
    """Writes down the functions of torch that are called. On this thread only, as all of torch's modes."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "a function")
        if not any(True for _ in _values_in((args, kwargs))):  # made now, for good; and random numbers would be drawn
            self.trace.refuse(f"makes a tensor by {name}")
        if getattr(Tensor, name, None) is function:
            return self.trace.record("call_method", name, args, kwargs)
        return self.trace.record("call_function", function, args, kwargs)


def _values_in(tree: Any) -> Iterator[_Value]:
    if isinstance(tree, _Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for inner in tree:
            yield from _values_in(inner)
    elif isinstance(tree, dict):
        for inner in tree.values():
            yield from _values_in(inner)


class _Value:
    """What stands for a tensor, a size or whatever else is known only when the forward is run."""

    __slots__ = ("_node", "_trace")

    def __init__(self, trace: _Trace, node: fx.Node) -> None:
        self._trace, self._node = trace, node

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented  # the mode sees it first

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "ndim" and self._trace.rank is not None:
            return self._trace.dims(self._node)
        found = self._trace.record("call_function", getattr, (self, name), {})
        return _Attribute(self, name, found)

    def _is_shape(self) -> bool:
        node = self._node
        return (node.op, node.target, node.args[1:]) == ("call_method", "size", ()) or (
            node.target is getattr and node.args[1] == "shape"
        )

    def __len__(self) -> int:
        if self._trace.rank is None or not self._is_shape():
            self._trace.refuse(_BRANCHES)
        return self._trace.dims(self._node.args[0])

    def __index__(self) -> int:
        self._trace.indices.append(self)  # torch asks before it gives a call to the mode, with the value itself
        return 1

    def __iter__(self) -> Any:
        frame = sys._getframe(1)
        code, at = frame.f_code.co_code, frame.f_lasti
        if dis.opname[code[at]] == "UNPACK_SEQUENCE":
            count = code[at + 1]
        elif self._trace.rank is not None and self._is_shape():
            count = self._trace.dims(self._node.args[0])
        else:
            self._trace.refuse("loops over a tensor or its sizes")
        every = self._trace.record("call_function", unpacked, (self, count), {})
        return iter([self._trace.record("call_function", operator.getitem, (every, i), {}) for i in range(count)])


class _Attribute(_Value):
    """Of a value; called, it is a method."""

    __slots__ = ("_name", "_owner")

    def __init__(self, owner: _Value, name: str, found: _Value) -> None:
        super().__init__(found._trace, found._node)
        self._owner, self._name = owner, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._name == "dim" and self._trace.rank is not None:
            return self._trace.dims(self._owner._node)
        return self._trace.record("call_method", self._name, (self._owner, *args), kwargs)


class _Number(_Value):
    """An option. What it is compared with says which way a forward takes for it."""

    __slots__ = ("_value",)

    def __init__(self, trace: _Trace, node: fx.Node, value: float) -> None:
        super().__init__(trace, node)
        self._value = value

    def _asked(self, function: Callable[..., bool], *others: Any) -> bool:
        if any(type(other) not in (int, float) for other in others):
            self._trace.refuse(_BRANCHES)
        answer = function(self._value, *others)
        self._trace.option.guards.append((function, others, answer))
        return answer

    def __bool__(self) -> bool:
        return self._asked(bool)


def unpacked(value: Any, count: int) -> tuple[Any, ...]:
    """What `a, b = value` gives.

    Raises:
        ValueError: there are more or fewer.
    """
    found = tuple(value)
    if len(found) != count:
        raise ValueError(f"expected {count} values to unpack; got {len(found)}")
    return found


#: x += y and the like, as functions: as a statement in the graph's code it would change the name of what it was.
IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {}


def _operators() -> None:
    def binary(function: Callable[..., Any], turned: bool = False) -> Callable[..., Any]:
        def method(self: _Value, other: Any) -> _Value:
            pair = (other, self) if turned else (self, other)
            return self._trace.record("call_function", function, pair, {})

        return method

    def in_place(name: str) -> Callable[[Any, Any], Any]:
        function = getattr(operator, name)

        def changed(x: Any, y: Any) -> Any:
            return function(x, y)

        changed.__name__ = changed.__qualname__ = name.strip("_")
        return changed

    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "lshift",
        "rshift",
        "and",
        "or",
        "xor",
    ):
        function = getattr(operator, f"__{name}__")
        IN_PLACE[f"i{name}"] = in_place(f"__i{name}__")
        setattr(_Value, f"__{name}__", binary(function))
        setattr(_Value, f"__r{name}__", binary(function, turned=True))
        setattr(_Value, f"__i{name}__", binary(IN_PLACE[f"i{name}"]))
    for name in ("lt", "le", "gt", "ge", "eq", "ne", "getitem"):
        setattr(_Value, f"__{name}__", binary(getattr(operator, name)))
    for name in ("neg", "pos", "invert", "abs"):
        setattr(_Value, f"__{name}__", _unary(getattr(operator, name)))
    for name, why in _REFUSED.items():
        setattr(_Value, name, functools.partialmethod(_refused, why))


def _unary(function: Callable[..., Any]) -> Callable[[_Value], _Value]:
    return lambda self: self._trace.record("call_function", function, (self,), {})


def _refused(self: _Value, why: str, *args: Any) -> NoReturn:
    self._trace.refuse(why)


_BRANCHES, _LOOKS = "branches on a tensor or its sizes", "looks at a tensor or its sizes"
_REFUSED = {
    **dict.fromkeys(("__bool__", "__contains__", "__hash__"), _BRANCHES),
    **dict.fromkeys(("__int__", "__float__", "__complex__", "__round__", "__trunc__"), _LOOKS),
    **dict.fromkeys(("__floor__", "__ceil__", "__str__", "__repr__", "__format__", "__array__"), _LOOKS),
    **dict.fromkeys(("__copy__", "__deepcopy__", "__reduce_ex__", "__enter__", "__setitem__", "__delitem__"), _LOOKS),
}
_operators()
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Number, f"__{_name}__", functools.partialmethod(_Number._asked, getattr(operator, _name)))
