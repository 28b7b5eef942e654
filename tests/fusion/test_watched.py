"""What a block's code reads, wherever it lies, may change after `fuse`: the block is then what the original is, or was
never fused. Each test changes a fused copy and the original alike and compares values, gradients and buffers."""

from __future__ import annotations

import argparse
import collections
import configparser
import contextvars
import copy
import dataclasses
import enum
import functools
import math
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.backends.cudnn as cudnn
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from fused_attn import explain, fuse
from fused_attn.fusion.recipes.names import host_of
from fused_attn.hosts import import_host
from tests.checks import random, randomised
from tests.fusion.counting import FusedOperators

X = random(2, 8, 6, 5, dtype=torch.float64)


def results(module: nn.Module, training: bool, x: Tensor = X) -> list[Tensor]:
    """Of a copy of its tensors: value, gradients (zero where there is none) and buffers afterwards."""
    before = [b.clone() for b in module.buffers()]
    x = x.clone().requires_grad_()
    y = module.train(training)(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((y * weights).sum(), leaves, allow_unused=True)
    after = [b.clone() for b in module.buffers()]
    for buffer, value in zip(module.buffers(), before, strict=True):
        buffer.data.copy_(value)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]
    return [y.detach(), *grads, *after]


def found(module: nn.Module) -> list[Any]:
    """As `results` in both modes, to be compared; what is raised instead."""
    try:
        return [t if t is None else t.tolist() for training in (False, True) for t in results(module, training)]
    except Exception as error:
        return [repr(error)]


def assert_same(model: nn.Module, original: nn.Module, x: Tensor = X) -> None:
    for training in (False, True):
        try:
            expected = results(original, training, x)
        except Exception as error:
            with pytest.raises(type(error)):
                results(model, training, x)
            continue
        torch.testing.assert_close(results(model, training, x), expected, rtol=1e-9, atol=1e-9)


def runs_fused(model: nn.Module) -> bool:
    """Whether fused operators run, which `explain` has to say."""
    with torch.no_grad(), FusedOperators() as operators:
        try:
            model.eval()(X)
        except Exception:
            assert not operators.count
    assert any(row.fused for row in explain(model)) == bool(operators.count), explain(model)
    return bool(operators.count)


Change = Callable[[Any, pytest.MonkeyPatch], Any]


def check(
    make: Callable[[], nn.Module],
    change: Change,
    patch: pytest.MonkeyPatch,
    *,
    left: str | None = None,
    may_stay: bool = False,
) -> None:
    """left: why it is left alone from the start; None: it is fused. may_stay: it may run fused after the change."""
    original = randomised(make())
    model = fuse(copy.deepcopy(original))
    assert_same(model, original)
    if left is not None:
        assert left in " ".join(row.reason for row in explain(model))
    assert runs_fused(model) is (left is None)
    before = found(original)
    change(original, patch)
    change(model, patch)
    assert found(original) != before, "the change has no effect: nothing is tested"
    assert_same(model, original)
    assert not runs_fused(model) or may_stay
    fuse(model)
    assert_same(model, original)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def excite(self, x):
        return self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True))))


def reading(read: Callable[[Any], Any], init: Callable[[Any], Any] | None = None, **members: Any) -> type[nn.Module]:
    """A class of blocks whose gated map is multiplied by what `read` reads."""

    class Block(Gate):
        def __init__(self):
            super().__init__()
            if init is not None:
                init(self)

        def forward(self, x):
            return x * torch.sigmoid(self.excite(x)) * read(self)

    for name, member in members.items():
        setattr(Block, name, member)
    return Block


def _named_first(block):
    return 1.0 if block.name else 2.0


class Item:
    factor = 1.0


class Slots:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


class Number:
    """Read by operators alone."""

    def __init__(self):
        self.value = 1.0

    def __float__(self):
        return self.value

    def __rmul__(self, other):
        return other * self.value

    def __neg__(self):
        return self.value

    def __call__(self, x):
        return x * self.value

    def __getitem__(self, i):
        return self.value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return None


@dataclasses.dataclass
class Inner:
    factor: float = 1.0


@dataclasses.dataclass
class Config:
    inner: Inner = dataclasses.field(default_factory=Inner)


class AttributeDict(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value


class Pair(NamedTuple):
    factor: float = 1.0


class Mode(enum.Enum):
    ONE, TWO = 1.0, 2.0


class Runner:
    def run(self):
        return 1.0


class Gain(enum.Enum):
    ONE = 1

    @property
    def gain(self):
        return GAINS[self]


GAINS = {Gain.ONE: 1.0}


class Beta(float):
    gain = 1.0


def patched_beta(block, patch):
    patch.setattr(Beta, "gain", 2.0)


class Base:
    factor = 1.0


class Registered(type(nn.Module)):
    factor = 1.0


def scaled(x, factor=1.0):
    return x * factor


scaled.factor = 1.0

SETTINGS = types.ModuleType("settings_of_an_experiment")
SETTINGS.factor = 1.0
SETTINGS.inner = types.SimpleNamespace(factor=1.0)
sys.modules[SETTINGS.__name__] = SETTINGS
ITEM = Item()
FACTOR = 1.0
FACTORS = [1.0]
TABLE = {"factor": 1.0}
NAME = "factor"
NAMES = {"x": "factor", "own": "own"}


def helper():
    return FACTOR


def keep(name: str, value: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda block: setattr(block, name, value())


def put(path: str, value: Any = 2.0) -> Change:
    """Sets the last of a path of attributes."""
    owner, _, name = path.rpartition(".")
    return lambda block, patch: setattr(operator.attrgetter(owner)(block) if owner else block, name, value)


def put_item(path: str, key: Any, value: Any = 2.0) -> Change:
    return lambda block, patch: operator.setitem(operator.attrgetter(path)(block), key, value)


def patched(owner: Any, name: str, value: Any = 2.0) -> Change:
    return lambda block, patch: patch.setattr(owner, name, value)


def of_class(name: str, value: Any = 2.0) -> Change:
    """On the class that the block had when it was made."""
    return lambda block, patch: patch.setattr(host_of(type(block)), name, value, raising=False)


class Rows(NamedTuple):
    """read, init, change, and members of the class."""

    read: Callable[[Any], Any]
    init: Callable[[Any], Any] | None
    change: Change
    members: dict[str, Any] = {}


def _with(block):
    with block.number as value:
        return value


def _loop(block):
    y = 1.0
    for name in ("factor",):
        y = y * getattr(block, name)
    return y


PLACES: dict[str, Rows] = {
    # attributes of the block
    "public attribute": Rows(lambda s: s.factor, keep("factor", lambda: 1.0), put("factor")),
    "private attribute": Rows(lambda s: s._factor, keep("_factor", lambda: 1.0), put("_factor")),
    "mangled attribute": Rows(lambda s: s._Block__factor, keep("_Block__factor", lambda: 1.0), put("_Block__factor")),
    "a switch": Rows(lambda s: 2.0 if s.on else 1.0, keep("on", lambda: False), put("on", True)),
    "None or a number": Rows(lambda s: 1.0 if s.f is None else s.f, keep("f", lambda: None), put("f")),
    "a string": Rows(lambda s: {"a": 1.0, "b": 2.0}[s.mode], keep("mode", lambda: "a"), put("mode", "b")),
    "a tuple": Rows(lambda s: s.t[1][0], keep("t", lambda: (3, (1.0,))), put("t", (3, (2.0,)))),
    "an enum": Rows(lambda s: s.mode.value, keep("mode", lambda: Mode.ONE), put("mode", Mode.TWO)),
    "`is` an enum": Rows(
        lambda s: 2.0 if s.mode is Mode.TWO else 1.0, keep("mode", lambda: Mode.ONE), put("mode", Mode.TWO)
    ),
    "deleted, then the class's": Rows(
        lambda s: s.factor, keep("factor", lambda: 1.0), lambda s, patch: delattr(s, "factor"), {"factor": 2.0}
    ),
    # containers
    "list": Rows(lambda s: s.l[0], keep("l", lambda: [1.0]), put_item("l", 0)),
    "list in a list": Rows(lambda s: s.l[0][0], keep("l", lambda: [[1.0]]), lambda s, _: s.l[0].__setitem__(0, 2.0)),
    "length of a list": Rows(
        lambda s: float(len(s.l)), keep("l", lambda: [0]), lambda s, _: s.l.append(0)
    ),
    "dict": Rows(lambda s: s.d["f"], keep("d", lambda: {"f": 1.0}), put_item("d", "f")),
    "dict.get": Rows(lambda s: s.d.get("f", 1.0), keep("d", dict), put_item("d", "f")),
    "in a dict": Rows(lambda s: 2.0 if "f" in s.d else 1.0, keep("d", dict), put_item("d", "f")),
    "nested dicts": Rows(
        lambda s: s.d["a"]["f"], keep("d", lambda: {"a": {"f": 1.0}}), lambda s, _: s.d["a"].__setitem__("f", 2.0)
    ),
    "OrderedDict": Rows(
        lambda s: s.d["f"], keep("d", lambda: collections.OrderedDict(f=1.0)), put_item("d", "f")
    ),
    "deque": Rows(lambda s: s.d[0], keep("d", lambda: collections.deque([1.0])), put_item("d", 0)),
    "set": Rows(lambda s: 2.0 if 1 in s.d else 1.0, keep("d", set), lambda s, _: s.d.add(1)),
    "ChainMap's dict": Rows(lambda s: s.d[0]["f"], keep("d", lambda: ({"f": 1.0},)), lambda s, _: s.d[0].update(f=2.0)),
    "dict with attributes": Rows(
        lambda s: s.c.a.f, keep("c", lambda: AttributeDict(a=AttributeDict(f=1.0))), put("c.a.f")
    ),
    "NamedTuple": Rows(lambda s: s.c.factor, keep("c", Pair), put("c", Pair(2.0))),
    # objects
    "SimpleNamespace": Rows(lambda s: s.c.f, keep("c", lambda: types.SimpleNamespace(f=1.0)), put("c.f")),
    "argparse.Namespace": Rows(lambda s: s.c.f, keep("c", lambda: argparse.Namespace(f=1.0)), put("c.f")),
    "dataclass": Rows(lambda s: s.c.inner.factor, keep("c", Config), put("c.inner.factor")),
    "dataclass, the inner one replaced": Rows(
        lambda s: s.c.inner.factor, keep("c", Config), put("c.inner", Inner(2.0))
    ),
    "object": Rows(lambda s: s.c.factor, keep("c", Item), put("c.factor")),
    "object's class": Rows(lambda s: s.c.factor, keep("c", Item), patched(Item, "factor")),
    "object with slots": Rows(lambda s: s.c.factor, keep("c", Slots), put("c.factor")),
    "method set on an object": Rows(
        lambda s: s.c.run(), keep("c", lambda: Runner()), lambda s, _: setattr(s.c, "run", lambda: 2.0)
    ),
    "property of an enum": Rows(
        lambda s: s.mode.gain, keep("mode", lambda: Gain.ONE), lambda s, patch: patch.setitem(GAINS, Gain.ONE, 2.0)
    ),
    "a float with attributes": Rows(lambda s: s.beta.gain, keep("beta", lambda: Beta(1)), patched_beta),
    "object in a list": Rows(
        lambda s: s.c[0].factor, keep("c", lambda: [Item()]), lambda s, _: setattr(s.c[0], "factor", 2.0)
    ),
    "operator of an object": Rows(lambda s: s.number, keep("number", Number), put("number.value")),
    "float() of an object": Rows(lambda s: float(s.number), keep("number", Number), put("number.value")),
    "sign of an object": Rows(lambda s: 0.0 + -s.number, keep("number", Number), put("number.value")),
    "call of an object": Rows(lambda s: s.number(1.0), keep("number", Number), put("number.value")),
    "item of an object": Rows(lambda s: s.number[0], keep("number", Number), put("number.value")),
    "with an object": Rows(_with, keep("number", Number), put("number.value")),
    "special method replaced": Rows(
        lambda s: s.number(1.0), keep("number", Number), patched(Number, "__call__", lambda self, x: 2.0 * x)
    ),
    "bound method of another object": Rows(
        lambda s: s.f(1.0), lambda s: setattr(s, "f", Number().__call__), put("f.__self__.value")
    ),
    "partial": Rows(
        lambda s: s.f(1.0), keep("f", lambda: functools.partial(scaled, factor=1.0)), put_item("f.keywords", "factor")
    ),
    "another partial": Rows(
        lambda s: s.f(1.0), keep("f", lambda: functools.partial(scaled, factor=1.0)),
        put("f", functools.partial(scaled, factor=2.0)),
    ),
    "a function in an attribute": Rows(lambda s: s.f(1.0), keep("f", lambda: scaled), put("f", lambda x: 2.0 * x)),
    # classes
    "class attribute": Rows(lambda s: s.factor, None, of_class("factor"), {"factor": 1.0}),
    "class attribute, on the instance": Rows(lambda s: s.factor, None, put("factor"), {"factor": 1.0}),
    "class's container": Rows(lambda s: s.t["f"], None, put_item("t", "f"), {"t": None}),
    "property": Rows(lambda s: s.factor, keep("_f", lambda: [1.0]), put_item("_f", 0),
                     {"factor": property(lambda s: s._f[0])}),
    "property replaced": Rows(lambda s: s.factor, None, of_class("factor", property(lambda s: 2.0)),
                              {"factor": property(lambda s: 1.0)}),
    "method": Rows(lambda s: s.factor(), None, of_class("factor", lambda s: 2.0), {"factor": lambda s: 1.0}),
    "method, on the instance": Rows(lambda s: s.factor(), None, put("factor", lambda: 2.0), {"factor": lambda s: 1.0}),
    "staticmethod": Rows(lambda s: s.factor(), None, of_class("factor", staticmethod(lambda: 2.0)),
                         {"factor": staticmethod(lambda: 1.0)}),
    "classmethod": Rows(lambda s: s.factor(), None, of_class("factor", classmethod(lambda c: 2.0)),
                        {"factor": classmethod(lambda c: 1.0)}),
    "what a classmethod reads": Rows(lambda s: s.factor(), None, of_class("f"),
                                     {"factor": classmethod(lambda c: c.f), "f": 1.0}),
    "class by name": Rows(lambda s: Base.factor, None, patched(Base, "factor")),
    # names made at run time, or asked for
    "getattr": Rows(lambda s: getattr(s, "factor"), keep("factor", lambda: 1.0), put("factor")),  # noqa: B009
    "getattr by a name in a global": Rows(lambda s: getattr(s, NAME), keep("factor", lambda: 1.0), put("factor")),
    "getattr by a name in an attribute": Rows(
        lambda s: getattr(s, s.name), lambda s: vars(s).update(name="a", a=1.0, b=2.0), put("name", "b")
    ),
    "getattr by a name in an attribute, what is there": Rows(
        lambda s: getattr(s, s.name), lambda s: vars(s).update(name="a", a=1.0, b=2.0), put("a")
    ),
    "getattr by a name in an attribute that was read before": Rows(
        lambda s: _named_first(s) * getattr(s, s.name), lambda s: vars(s).update(name="a", a=1.0), put("a")
    ),
    "getattr by a name in an attribute of the class": Rows(
        lambda s: getattr(s, s.name), lambda s: vars(s).update(a=1.0, b=2.0), of_class("name", "b"), {"name": "a"}
    ),
    "getattr by a name in an attribute, of a method": Rows(
        lambda s: getattr(s, s.name)(), keep("name", lambda: "a"), of_class("a", lambda s: 2.0), {"a": lambda s: 1.0}
    ),
    "getattr by a name in a property": Rows(
        lambda s: getattr(s, s.name), lambda s: vars(s).update(kind="a", a=1.0), put("a"),
        {"name": property(lambda s: s.kind)},
    ),
    "getattr by a name in a tuple in an attribute": Rows(
        lambda s: getattr(s, s.name[0]), lambda s: vars(s).update(name=("a",), a=1.0), put("a")
    ),
    "getattr by a name in a dict": Rows(
        lambda s: getattr(s, NAMES["x"]), keep("factor", lambda: 1.0), put("factor")
    ),
    "getattr by a made name": Rows(
        lambda s: getattr(s, f"_{s.name}_factor"), lambda s: vars(s).update(name="a", _a_factor=1.0), put("_a_factor")
    ),
    "method by a made name": Rows(
        lambda s: getattr(s, "_" + s.name)(), keep("name", lambda: "a"), of_class("_a", lambda s: 2.0),
        {"_a": lambda s: 1.0},
    ),
    "what a method by a made name reads": Rows(
        lambda s: getattr(s, "_" + s.name)(), lambda s: vars(s).update(name="a", hidden=1.0), put("hidden"),
        {"_a": lambda s: s.hidden},
    ),
    "getattr in a loop": Rows(_loop, keep("factor", lambda: 1.0), put("factor")),
    "getattr in a loop, of the class": Rows(_loop, None, of_class("factor"), {"factor": 1.0}),
    "attrgetter": Rows(
        lambda s: operator.attrgetter("c.f")(s), keep("c", lambda: types.SimpleNamespace(f=1.0)), put("c.f")
    ),
    "reduce(getattr)": Rows(
        lambda s: functools.reduce(getattr, s.path.split("."), s),
        lambda s: vars(s).update(path="c.f", c=types.SimpleNamespace(f=1.0)), put("c.f"),
    ),
    "map(getattr)": Rows(
        lambda s: next(map(getattr, [s], ["factor"])), keep("factor", lambda: 1.0), put("factor")
    ),
    "__dict__": Rows(lambda s: s.__dict__["factor"], keep("factor", lambda: 1.0), put("factor")),
    "vars()": Rows(lambda s: vars(s)["factor"], keep("factor", lambda: 1.0), put("factor")),
    "in vars()": Rows(lambda s: 2.0 if "factor" in vars(s) else 1.0, None, put("factor")),
    "hasattr": Rows(lambda s: 2.0 if hasattr(s, "more") else 1.0, None, put("more")),
    "hasattr of a namespace": Rows(
        lambda s: 2.0 if hasattr(s.c, "more") else 1.0, keep("c", types.SimpleNamespace), put("c.more")
    ),
    "getattr with a default": Rows(lambda s: getattr(s, "more", 1.0), None, put("more")),
    "getattr with a default, then the class's": Rows(lambda s: getattr(s, "more", 1.0), None, of_class("more")),
    "hasattr, then a buffer": Rows(
        lambda s: 2.0 if hasattr(s, "more") else 1.0, None, lambda s, _: s.register_buffer("more", torch.ones(()))
    ),
    "hasattr, then a parameter": Rows(
        lambda s: 2.0 if hasattr(s, "more") else 1.0, None,
        lambda s, _: s.register_parameter("more", nn.Parameter(torch.ones((), dtype=torch.float64))),
    ),
    "hasattr, then a child": Rows(
        lambda s: 2.0 if hasattr(s, "more") else 1.0, None, lambda s, _: s.add_module("more", nn.Identity())
    ),
    "hasattr of a layer": Rows(lambda s: 2.0 if hasattr(s.up, "more") else 1.0, None, put("up.more")),
    # what lies outside
    "global": Rows(lambda s: FACTOR, None, lambda s, patch: patch.setitem(globals(), "FACTOR", 2.0)),
    "global list": Rows(lambda s: FACTORS[0], None, lambda s, _: FACTORS.__setitem__(0, 2.0)),
    "global dict": Rows(lambda s: TABLE["factor"], None, lambda s, patch: patch.setitem(TABLE, "factor", 2.0)),
    "global object": Rows(lambda s: ITEM.factor, None, lambda s, patch: patch.setattr(ITEM, "factor", 2.0)),
    "global of another module": Rows(lambda s: SETTINGS.factor, None, patched(SETTINGS, "factor")),
    "object in another module": Rows(lambda s: SETTINGS.inner.factor, None, patched(SETTINGS.inner, "factor")),
    "getattr of another module": Rows(lambda s: getattr(SETTINGS, NAME), None, patched(SETTINGS, "factor")),
    "helper": Rows(lambda s: helper(), None, lambda s, patch: patch.setitem(globals(), "helper", lambda: 2.0)),
    "code of a helper": Rows(lambda s: helper(), None, patched(helper, "__code__", (lambda: 2.0).__code__)),
    "what a helper reads": Rows(lambda s: helper(), None, lambda s, patch: patch.setitem(globals(), "FACTOR", 2.0)),
    "default argument": Rows(lambda s: scaled(1.0), None, patched(scaled, "__defaults__", (2.0,))),
    "attribute of a function": Rows(lambda s: scaled.factor, None, patched(scaled, "factor")),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read(place, monkeypatch):
    read, init, change, members = PLACES[place]
    members = {k: {"f": 1.0} if v is None else v for k, v in members.items()}
    FACTORS[:] = [1.0]
    check(reading(read, init, **members), change, monkeypatch)


def cell(block, patch):
    """The closure cell of a forward."""
    forward = host_of(type(block)).forward
    read = forward.__closure__[forward.__code__.co_freevars.index("read")]
    patch.setattr(read, "cell_contents", lambda s: 2.0)


class WithMeta(Gate, metaclass=Registered):
    def forward(self, x):
        return x * torch.sigmoid(self.excite(x)) * type(self).factor


class Default(Gate):
    def forward(self, x, factor=1.0, *, offset=0.0):
        return x * torch.sigmoid(self.excite(x)) * factor + offset


class Squeezed(nn.Module):
    """As in tutorials."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(self.pool(x))


class Derived(Squeezed):
    def forward(self, x):
        return super().forward(x)


def counted(function):
    state = {"factor": 1.0}

    @functools.wraps(function)
    def wrapper(self, x):
        return function(self, x) * state["factor"]

    wrapper.state = state
    return wrapper


class Decorated(Squeezed):
    @counted
    def forward(self, x):
        return super().forward(x)


def twice(function):
    return lambda self, *args: function(self, *args) * 2


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "closure cell": (reading(lambda s: 1.0), cell),
    "metaclass": (WithMeta, patched(Registered, "factor")),
    "default argument of forward": (Default, lambda s, patch: patch.setattr(Default.forward, "__defaults__", (2.0,))),
    "keyword default of forward": (
        Default,
        lambda s, patch: patch.setitem(Default.forward.__kwdefaults__, "offset", 2.0),
    ),
    "forward of its class": (Squeezed, patched(Squeezed, "forward", lambda self, x: x * 2)),
    "forward of its base": (Derived, patched(Squeezed, "forward", twice(Squeezed.forward))),
    "forward, on the instance": (Squeezed, lambda s, _: setattr(s, "forward", lambda x: x * 2)),
    "what a decorator keeps": (Decorated, lambda s, patch: patch.setitem(Decorated.forward.state, "factor", 2.0)),
    "forward of a layer": (Squeezed, patched(nn.Conv2d, "forward", twice(nn.Conv2d.forward))),
    "another method of a layer": (Squeezed, patched(nn.Conv2d, "_conv_forward", twice(nn.Conv2d._conv_forward))),
    "forward of Sequential": (Squeezed, patched(nn.Sequential, "forward", twice(nn.Sequential.forward))),
    "call of a layer": (
        Squeezed,
        lambda s, patch: patch.setattr(nn.Conv2d, "__call__", twice(nn.Module.__call__), raising=False),
    ),
    "call of every module": (Squeezed, patched(nn.Module, "__call__", twice(nn.Module.__call__))),
    "torch's function": (reading(lambda s: 1.0), patched(torch, "sigmoid", torch.tanh)),
    "torch.nn.functional, of a layer": (
        type(
            "Layered",
            (Gate,),
            {
                "__init__": lambda self: (Gate.__init__(self), setattr(self, "act", nn.ReLU()))[0],
                "forward": lambda self, x: (
                    x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3), keepdim=True)))))
                ),
            },
        ),
        patched(F, "relu", lambda x, inplace=False: x),
    ),
    "how a layer convolves": (
        reading(lambda s: 1.0),
        lambda s, patch: setattr(s.down, "_conv_forward", lambda x, w, b: F.conv2d(x, 2 * w, b)),
    ),
    "torch.nn.functional": (
        type("Hard", (Gate,), {"forward": lambda self, x: x * F.hardsigmoid(self.excite(x))}),
        patched(F, "hardsigmoid", torch.tanh),
    ),
    "a library's function": (reading(lambda s: math.cos(0.0)), patched(math, "cos", lambda x: 2.0)),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_what_is_run(what, monkeypatch):
    check(*FUNCTIONS[what], monkeypatch)


def test_what_no_name_asks_for_is_not_read():
    """A name that an attribute holds is one name, and not any."""
    makes = reading(lambda s: getattr(s, s.name), lambda s: vars(s).update(name="a", a=1.0))
    makes.init_weights = lambda self: print(os.environ)
    model = fuse(randomised(makes()))
    assert runs_fused(model)
    model.init_weights = None
    assert runs_fused(model)


def test_what_is_set_on_the_class_that_fuse_made():
    original, model = (randomised(reading(lambda s: s.factor(), factor=lambda s: 1.0)()) for _ in range(2))
    fuse(model)
    assert runs_fused(model)
    for block in (original, model):
        type(block).factor = lambda s: 2.0
    assert_same(model, original)
    assert not runs_fused(model)


# A tensor in the place of an equal number

Learned = Callable[[Any, Tensor, pytest.MonkeyPatch], Any]
LEARNED: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None, Learned]] = {
    "attribute": (lambda s: s.f, keep("f", lambda: 1.0), lambda s, t, _: setattr(s, "f", t)),
    "list": (lambda s: s.l[0], keep("l", lambda: [1.0]), lambda s, t, _: operator.setitem(s.l, 0, t)),
    "another list": (lambda s: s.l[0], keep("l", lambda: [1.0]), lambda s, t, _: setattr(s, "l", [t])),
    "tuple": (lambda s: s.t[0][0], keep("t", lambda: ((1.0,),)), lambda s, t, _: setattr(s, "t", ((t,),))),
    "dict": (lambda s: s.d["f"], keep("d", lambda: {"f": 1.0}), lambda s, t, _: operator.setitem(s.d, "f", t)),
    "dataclass": (lambda s: s.c.inner.factor, keep("c", Config), lambda s, t, _: setattr(s.c.inner, "factor", t)),
    "another dataclass": (
        lambda s: s.c.inner.factor, keep("c", Config), lambda s, t, _: setattr(s.c, "inner", Inner(t))
    ),
    "global": (lambda s: FACTOR, None, lambda s, t, patch: patch.setitem(globals(), "FACTOR", t)),
    "global list": (lambda s: FACTORS[0], None, lambda s, t, patch: patch.setitem(globals(), "FACTORS", [t])),
    "class": (lambda s: Base.factor, None, lambda s, t, patch: patch.setattr(Base, "factor", t)),
}  # fmt: skip


@pytest.mark.parametrize("where", LEARNED)
def test_a_tensor_for_an_equal_number(where, monkeypatch):
    """It is the same value, and has a gradient."""
    read, init, change = LEARNED[where]
    original = randomised(reading(read, init)())
    model = fuse(copy.deepcopy(original))
    assert runs_fused(model)
    gradients = []
    for module in (original, model):
        with monkeypatch.context() as patch:
            factor = torch.ones((), dtype=torch.float64, requires_grad=True)
            change(module, factor, patch)
            module(X).square().sum().backward()
            gradients.append(factor.grad)
            assert module is original or not runs_fused(module)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_a_dictionary_in_another_order():
    def read(s):
        y = 1.0
        for value in s.d.values():
            y = y * 2 + value
        return y

    original = randomised(reading(read, keep("d", lambda: {"a": 0.0, "b": -3.0}))())
    model = fuse(copy.deepcopy(original))
    assert runs_fused(model)
    for module in (original, model):
        module.d["a"] = module.d.pop("a")
    assert_same(model, original)
    assert not runs_fused(model)


def test_another_dictionary_of_parameters():
    """As `model.__dict__.update` puts it in: with the same parameters at first."""
    original = randomised(Layers())
    model = fuse(copy.deepcopy(original))
    assert runs_fused(model)
    for module in (original, model):
        module.down.__dict__["_parameters"] = dict(module.down._parameters)
    assert_same(model, original)
    for module in (original, model):
        module.down.weight = nn.Parameter(module.down.weight.detach() * 2)
    assert_same(model, original)


@pytest.mark.parametrize("path", ["down.weight", "up.weight"])
def test_a_weight_that_is_none(path):
    original = randomised(Layers())
    model = fuse(copy.deepcopy(original))
    for module in (original, model):
        operator.attrgetter(path.rpartition(".")[0])(module).weight = None
    assert_same(model, original)
    assert not runs_fused(model)


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_without_a_bias_behind_a_spatial_gate(training):
    original = randomised(Spatial(norm=nn.BatchNorm2d(1)))
    model = fuse(copy.deepcopy(original))
    for module in (original, model):
        module.norm.bias = None
    assert_same(model, original)
    model.train(training)
    with FusedOperators() as operators:
        model(X)
    assert operators.count and any(row.fused for row in explain(model))


def test_a_weight_that_is_none_in_front_of_a_spatial_gate():
    model = fuse(randomised(Spatial()))
    model.conv.weight = None
    assert not runs_fused(model)


# What a block's code reads of a child that runs as it is


class Child(nn.Module):
    factor = 1.0

    def __init__(self):
        super().__init__()
        self.conv, self.own = nn.Conv2d(8, 8, 1), 1.0

    def forward(self, x):
        return self.conv(x)


class Odd(nn.Module):
    factor = 1.0

    def forward(self, x):
        return torch.relu(x) + 0.1 * torch.tanh(x)


class GateOnly(Gate):
    def forward(self, x):
        return torch.sigmoid(self.excite(x))


def parent_of(child: Callable[[], nn.Module], read: Callable[[Any], Any]) -> type[nn.Module]:
    """A class of parents with a gate in their forward, which multiply by what they read of another child."""

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child, self.gate = child(), GateOnly()

        def forward(self, x):
            y = self.child(x)
            return self.gate(y) * y * read(self)

    return Parent


class OddInside(Gate):
    def __init__(self):
        super().__init__()
        self.odd = Odd()

    def forward(self, x):
        return x * torch.sigmoid(self.up(self.odd(self.down(x.mean((2, 3), keepdim=True))))) * self.odd.factor


class Wider(nn.Conv2d):
    factor = 1.0


CHILDREN: dict[str, tuple[Callable[[], nn.Module], Change]] = {
    "attribute": (parent_of(Child, lambda s: s.child.own), put("child.own")),
    "class attribute": (parent_of(Child, lambda s: s.child.factor), patched(Child, "factor")),
    "class attribute, on the instance": (parent_of(Child, lambda s: s.child.factor), put("child.factor")),
    "of a class derived from torch's": (
        parent_of(lambda: Wider(8, 8, 1), lambda s: s.child.factor), patched(Wider, "factor")
    ),
    "of its layer": (parent_of(Child, lambda s: s.child.conv.padding[0] + 1.0), put("child.conv.padding", (1, 1))),
    "by a name in a dict": (parent_of(Child, lambda s: getattr(s.child, NAMES["own"])), put("child.own")),
    "a bias that is None": (
        parent_of(Child, lambda s: 1.0 if s.child.conv.bias is None else 2.0), put("child.conv.bias", None)
    ),
    "inside an excitation": (OddInside, patched(Odd, "factor")),
    "inside an excitation, on the instance": (OddInside, put("odd.factor")),
}  # fmt: skip


@pytest.mark.parametrize("what", CHILDREN)
def test_what_is_read_of_a_child(what, monkeypatch):
    make, change = CHILDREN[what]
    original = randomised(make())
    model = fuse(copy.deepcopy(original))
    assert runs_fused(model)
    before = found(original)
    change(original, monkeypatch)
    change(model, monkeypatch)
    assert found(original) != before, "the change has no effect: nothing is tested"
    assert_same(model, original)
    fuse(model)
    assert_same(model, original)


# What it computes depends on what no trial map has, or on more than a map's values


class Sized(Gate):
    def gated(self, x):
        return x * torch.sigmoid(self.excite(x))


SIZES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], Tensor]]] = {
    "large batches": (lambda s, x: s.gated(x) if len(x) < 64 else s.gated(x) * 2, lambda: random(70, 8, 3, 3)),
    "the first of a batch": (lambda s, x: s.gated(x[:32]), lambda: random(40, 8, 3, 3)),
    "a factor of the batch": (lambda s, x: s.gated(x) * max(1, x.shape[0] // 50), lambda: random(120, 8, 3, 3)),
    "high maps": (lambda s, x: s.gated(x) * (1 + (x.shape[2] >= 300)), lambda: random(1, 8, 301, 2)),
    "one size": (lambda s, x: s.gated(x) * (1 + (tuple(x.shape[-2:]) == (14, 14))), lambda: random(1, 8, 14, 14)),
    "many numbers": (lambda s, x: s.gated(x) * (1 + (x.numel() > 1_000_000)), lambda: random(2, 8, 300, 300)),
    "no numbers": (lambda s, x: None if x.numel() == 0 else s.gated(x), lambda: random(0, 8, 3, 3)),
    "layout": (lambda s, x: s.gated(x) * (1 + x.is_contiguous()), lambda: random(2, 8, 5, 6).transpose(2, 3)),
    "strides": (lambda s, x: s.gated(x) * x.stride()[3], lambda: random(2, 8, 5, 6).transpose(2, 3)),
    "an attribute": (lambda s, x: s.gated(x) * getattr(x, "gain", 1.0), lambda: with_gain(random(2, 8, 5, 6))),
    "whether it has one": (lambda s, x: s.gated(x) * (1 + hasattr(x, "gain")), lambda: with_gain(random(2, 8, 5, 6))),
    "its class": (lambda s, x: s.gated(x) * (1 + (type(x) is Tensor)), lambda: nn.Parameter(random(2, 8, 5, 6))),
}


#: Which a graph of the forward computes anew at every call.
SAID_AGAIN = ("the first of a batch", "high maps", "many numbers")


def with_gain(x):
    x.gain = 3.0
    return x


@pytest.mark.parametrize("what", SIZES)
def test_branches_on_a_map_that_no_trial_has(what):
    forward, make = SIZES[what]
    original = type("Branching", (Sized,), {"forward": forward})().float()
    model = fuse(copy.deepcopy(original))
    x = make()
    torch.testing.assert_close(model(x), original(x))
    assert any(row.fused for row in explain(model)) == (what in SAID_AGAIN)


class Meter:
    def __init__(self):
        self.seen, self.counts, self.last = set(), {"calls": 0}, collections.deque([0, 1])


METER, SEEN = Meter(), [0]


def told(meter, x):
    meter.seen.add(tuple(x.shape))
    meter.counts.update(calls=meter.counts["calls"] + 1)


def alias(x):
    seen = SEEN
    seen += [1]


TOLD: dict[str, Callable[[Any, Any], Any]] = {
    "an object": lambda s, x: (told(s.meter, x), s.gated(x))[1],
    "a global": lambda s, x: (told(METER, x), s.gated(x))[1],
    "by map": lambda s, x: (list(map(METER.seen.add, [1])), s.gated(x))[1],
    "by an operator": lambda s, x: (operator.iadd(SEEN, [1]), s.gated(x))[1],
    "by another name": lambda s, x: (alias(x), s.gated(x))[1],
    "in another order": lambda s, x: (METER.last.rotate(), s.gated(x))[1],
}


@pytest.mark.parametrize("what", TOLD)
def test_nobody_is_told_of_trials(what):
    """Of calls they are, as often as by the original."""

    def state(meter):
        return sorted(meter.seen, key=str), dict(meter.counts), list(meter.last), list(SEEN)

    model = type("Telling", (Sized,), {"forward": TOLD[what]})()
    model.meter = Meter()
    before = state(METER), state(model.meter)
    fuse(model)
    assert (state(METER), state(model.meter)) == before
    model(random(2, 8, 5, 6))
    assert (state(METER), state(model.meter)) != before


class Named(Gate):
    """Asks what class it is of."""

    scale = 1.0

    def forward(self, x):
        return x * torch.sigmoid(self.excite(x)) * self.scale if type(self) is Named else x


def test_the_class_that_a_block_finds_itself_to_be():
    original = randomised(Named())
    model = fuse(copy.deepcopy(original))
    torch.testing.assert_close(model(x=X), original(x=X))
    model.scale = original.scale = 2.0
    assert_same(model, original)


def test_a_patched_class_of_a_library(monkeypatch):
    SEModule = import_host("timm.layers").SEModule
    forward = SEModule.forward
    fused_before = fuse(SEModule(8).double())
    monkeypatch.setattr(SEModule, "forward", lambda self, x: 2 * forward(self, x))
    original = SEModule(8).double()
    fused_before.load_state_dict(original.state_dict())
    for model in (fuse(copy.deepcopy(original)), fused_before, fuse(fused_before), copy.deepcopy(fused_before)):
        assert_same(model, original)


class Batched(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.norm, self.up = nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.norm(self.down(x.mean((2, 3)))))))[..., None, None]


def test_a_layer_that_raises_has_run_once():
    model = fuse(randomised(Batched()))
    assert runs_fused(model)
    before = int(model.norm.num_batches_tracked)
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(X[:1])
    assert model.norm.num_batches_tracked == before + 1


def test_a_closure_under_compile():
    factor = 1.0

    def change(value):
        nonlocal factor
        factor = value

    original = randomised(reading(lambda s: factor)())
    model = fuse(copy.deepcopy(original))
    assert runs_fused(model)
    change(2.0)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), original(X))


# What cannot be watched is left alone

ENVIRONMENT = os.environ
VARIABLE = contextvars.ContextVar("factor", default=1.0)
LOCAL = threading.local()
LOCAL.factor = 1.0
REFERENCE = weakref.ref(ITEM)


@functools.cache
def remembered():
    return TABLE["factor"]


class UserDict(collections.UserDict):
    pass


class Descriptor:
    value = 1.0

    def __get__(self, owner, cls=None):
        return self.value


DESCRIPTOR = Descriptor()


def parser():
    found = configparser.ConfigParser()
    found.read_string("[block]\nfactor = 1.0")
    return found


def forget(block, patch):
    patch.setitem(TABLE, "factor", 2.0)
    patch.setattr(sys.modules[__name__], "remembered", remembered)  # as it was, whatever it knows
    remembered.cache_clear()


def caught(block):
    try:
        return block.more
    except AttributeError:
        return 1.0


def caught_any(block):
    try:
        return block.more
    except:  # noqa: E722
        return 1.0


def counter(block):
    block.calls += 1
    return 1.0 if block.calls < 50 else 2.0


def setting(name: str) -> Change:
    return lambda block, patch: patch.setenv(name, "2")


class Left(NamedTuple):
    """read, init, change, the reason, and members of the class."""

    read: Callable[[Any], Any]
    init: Callable[[Any], Any] | None
    change: Change
    reason: str
    members: dict[str, Any] = {}


LEFT: dict[str, Left] = {
    "environment": Left(lambda s: float(os.environ.get("FACTOR", "1")), None, setting("FACTOR"), "a setting"),
    "getenv": Left(lambda s: float(os.getenv("FACTOR", "1")), None, setting("FACTOR"), "a setting"),
    "environment by another name": Left(
        lambda s: float(ENVIRONMENT.get("FACTOR", "1")), None, setting("FACTOR"), "reads ENVIRONMENT"
    ),
    "torch's determinism": Left(
        lambda s: 1.0 if torch.are_deterministic_algorithms_enabled() else 2.0, None,
        lambda s, _: torch.use_deterministic_algorithms(False), "a setting",
    ),
    "torch's precision": Left(
        lambda s: 1.0 if torch.get_float32_matmul_precision() == "highest" else 2.0, None,
        patched(torch, "get_float32_matmul_precision", lambda: "high"), "a setting",
    ),
    "torch's threads": Left(
        lambda s: float(torch.get_num_threads()), None, patched(torch, "get_num_threads", lambda: 7), "a setting"
    ),
    "default dtype": Left(
        lambda s: 1.0 if torch.get_default_dtype() == torch.float32 else 2.0, None,
        patched(torch, "get_default_dtype", lambda: torch.float64), "a setting",
    ),
    "cudnn": Left(
        lambda s: 2.0 if torch.backends.cudnn.benchmark else 1.0, None, patched(cudnn, "benchmark", True), "a setting"
    ),
    "cudnn by another name": Left(
        lambda s: 2.0 if cudnn.benchmark else 1.0, None, patched(cudnn, "benchmark", True), "a setting"
    ),
    "weak reference": Left(lambda s: REFERENCE().factor, None, lambda s, patch: patch.setattr(ITEM, "factor", 2.0),
                           "reads REFERENCE"),
    "context variable": Left(lambda s: VARIABLE.get(), None, lambda s, _: VARIABLE.set(2.0), "reads VARIABLE"),
    "of a thread": Left(lambda s: LOCAL.factor, None, patched(LOCAL, "factor"), "reads LOCAL"),
    "UserDict": Left(lambda s: s.d["f"], keep("d", lambda: UserDict(f=1.0)), put_item("d", "f"), "reads d, a UserDict"),
    "ConfigParser": Left(lambda s: float(s.c["block"]["factor"]), keep("c", parser),
                         lambda s, _: s.c["block"].__setitem__("factor", "2"), "reads c"),
    "numpy": Left(lambda s: float(s.a[0]), keep("a", lambda: numpy.ones(1)), put_item("a", 0), "reads a"),
    "cached function": Left(lambda s: remembered(), None, forget, "reads remembered"),
    "globals()": Left(lambda s: globals().get("MORE", 1.0), None,
                      lambda s, patch: patch.setitem(globals(), "MORE", 2.0), "makes code or names"),
    "eval": Left(lambda s: eval("s.factor"), keep("factor", lambda: 1.0), put("factor"), "makes code or names"),
    "a caught error": Left(caught, None, put("more"), "catches exceptions"),
    "any caught error": Left(caught_any, None, put("more"), "catches exceptions"),
    "descriptor": Left(lambda s: s.factor, None, lambda s, patch: patch.setattr(DESCRIPTOR, "value", 2.0),
                       "reads factor, a Descriptor", {"factor": DESCRIPTOR}),
    "counter": Left(counter, keep("calls", lambda: 0), put("calls", 1000), "keeps state"),
    "tensor": Left(lambda s: s.t, keep("t", lambda: torch.ones(())), lambda s, _: s.t.fill_(2.0), "reads a tensor"),
    "tensor in a list": Left(
        lambda s: s.t[0], keep("t", lambda: [torch.ones(())]), lambda s, _: s.t[0].fill_(2.0), "reads a tensor"
    ),
    "tensor's value": Left(
        lambda s: 2.0 if s.t else 1.0, keep("t", lambda: torch.zeros(())), lambda s, _: s.t.fill_(1.0), "on data"
    ),
    "buffer's value": Left(
        lambda s: 2.0 if s.t.item() else 1.0, lambda s: s.register_buffer("t", torch.zeros((), dtype=torch.long)),
        lambda s, _: s.t.fill_(1), "on data",
    ),
    "own __getattr__": Left(
        lambda s: s.more, keep("factor", lambda: 1.0), put("factor"), "__getattr__ of its own",
        {"__getattr__": lambda s, name: s.factor if name == "more" else nn.Module.__getattr__(s, name)},
    ),
    "own __getattribute__": Left(
        lambda s: s.factor, keep("factor", lambda: 1.0), put("factor"), "__getattribute__ of its own",
        {"__getattribute__": lambda s, name: nn.Module.__getattribute__(s, name)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_watched_is_left_alone(what, monkeypatch):
    read, init, change, reason, members = LEFT[what]
    check(reading(read, init, **members), change, monkeypatch, left=reason)


# Options of torch's own layers


class Layers(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        self.pool = layers.get("pool") or nn.AdaptiveAvgPool2d(1)
        self.down, self.up = layers.get("down") or nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.norm = layers.get("norm") or nn.Identity()
        self.act, self.gate = layers.get("act") or nn.ReLU(), layers.get("gate") or nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.up(self.act(self.norm(self.down(self.pool(x))))))


class Spatial(nn.Module):
    def __init__(self, conv=None, norm=None):
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(2, 1, 3, padding=1), norm or nn.Identity()

    def forward(self, x):
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(pooled)))


class Eca(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


OPTIONS: dict[str, tuple[Callable[[], nn.Module], str, Any]] = {
    **{f"Conv2d {name}": (Layers, f"down.{name}", value) for name, value in (
        ("padding", (1, 1)), ("groups", 2), ("padding_mode", "circular"),
    )},
    **{f"spatial Conv2d {name}": (Spatial, f"conv.{name}", value) for name, value in (
        ("padding", (0, 0)), ("stride", (2, 2)), ("dilation", (2, 2)),
        ("padding_mode", "circular"),
    )},
    **{f"Conv1d {name}": (Eca, f"conv.{name}", value) for name, value in (
        ("padding", (2,)), ("stride", (2,)), ("dilation", (2,)), ("padding_mode", "circular"),
    )},
    "AdaptiveAvgPool2d output_size": (Layers, "pool.output_size", (2, 1)),
    "AdaptiveMaxPool2d output_size": (lambda: Layers(pool=nn.AdaptiveMaxPool2d(1)), "pool.output_size", 2),
    "AdaptiveMaxPool2d return_indices": (lambda: Layers(pool=nn.AdaptiveMaxPool2d(1)), "pool.return_indices", True),
    "LeakyReLU": (lambda: Layers(act=nn.LeakyReLU(0.01)), "act.negative_slope", 0.3),
    "ELU": (lambda: Layers(act=nn.ELU()), "act.alpha", 0.3),
    "CELU": (lambda: Layers(act=nn.CELU()), "act.alpha", 0.3),
    "GELU": (lambda: Layers(act=nn.GELU()), "act.approximate", "tanh"),
    "Softplus beta": (lambda: Layers(act=nn.Softplus()), "act.beta", 3.0),
    "Softplus threshold": (lambda: Layers(act=nn.Softplus()), "act.threshold", 0.1),
    "Threshold": (lambda: Layers(act=nn.Threshold(0.0, 0.0)), "act.value", 1.0),
    "Hardshrink": (lambda: Layers(act=nn.Hardshrink()), "act.lambd", 0.1),
    "Hardtanh max_val": (lambda: Layers(act=nn.Hardtanh(0.0, 6.0)), "act.max_val", 0.1),
    "ReLU6 max_val": (lambda: Layers(act=nn.ReLU6()), "act.max_val", 0.1),
    "ReLU6 min_val": (lambda: Layers(act=nn.ReLU6()), "act.min_val", -1.0),
    "gate Hardtanh": (lambda: Layers(gate=nn.Hardtanh(0.0, 1.0)), "gate.max_val", 0.1),
    "gate Softmax": (lambda: Layers(gate=nn.Softmax(1)), "gate.dim", 0),
    "LayerNorm": (lambda: Layers(norm=nn.GroupNorm(1, 4)), "norm.eps", 0.5),
    "GroupNorm": (lambda: Layers(norm=nn.GroupNorm(1, 4)), "norm.num_groups", 4),
    **{f"{kind.__name__} BatchNorm2d {name}={value}": (make, f"norm.{name}", value)
       for kind, make in (
           (Layers, lambda: Layers(norm=nn.BatchNorm2d(4))), (Spatial, lambda: Spatial(norm=nn.BatchNorm2d(1))))
       for name, value in (
           ("eps", 0.5), ("momentum", 0.7), ("momentum", None), ("track_running_stats", False),
           ("num_batches_tracked", None))},
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_torchs_layers(option, monkeypatch):
    make, path, value = OPTIONS[option]
    owner, name = path.split(".")
    assert hasattr(getattr(make(), owner), name)

    def change(block, patch):
        layer = getattr(block, owner)
        setattr(layer, name, value)
        if name == "padding_mode":  # as the layer has it from its constructor
            layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]
            layer.weight.data.mul_(1.1)  # a kernel of one pads nothing
        if name in ("num_batches_tracked", "track_running_stats"):
            layer.bias.data.add_(0.1)  # these change no number by themselves

    check(make, change, monkeypatch, may_stay=True)


class KeepsEval(Layers):
    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(4))
        self.frozen = False

    def train(self, mode=True):
        super().train(mode)
        self.norm.train(mode and not self.frozen)
        return self


class KeepsEvalSpatial(Spatial):
    frozen = False

    def __init__(self):
        super().__init__(norm=nn.BatchNorm2d(1))

    def train(self, mode=True):
        super().train(mode)
        self.norm.train(mode and not self.frozen)
        return self


@pytest.mark.parametrize("cls", [KeepsEval, KeepsEvalSpatial])
def test_batch_norms_that_a_host_keeps_in_evaluation(cls, monkeypatch):
    check(cls, put("frozen", True), monkeypatch, may_stay=True)


# Layers put in, taken out, hooked


def with_forward(block, patch):
    forward = block.fc[0].forward
    block.fc[0].forward = lambda x: forward(x) * 2


def moved(block, patch):
    layer = block.fc._modules.pop("1")
    block.fc._modules["1"] = layer


def hook(name: str, function: Callable[..., Any]) -> Change:
    return lambda block, patch: getattr(block.fc[0], name)(function)


def pruned(block, patch):
    prune.l1_unstructured(block.fc[0], "weight", amount=0.5)


def pruned_for_good(block, patch):
    pruned(block, patch)
    prune.remove(block.fc[0], "weight")


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def wider(block, patch):
    down, up = block.fc[0], block.fc[2]
    down.weight = nn.Parameter(torch.cat([down.weight.detach()] * 2))
    down.bias = nn.Parameter(torch.cat([down.bias.detach()] * 2))
    up.weight = nn.Parameter(torch.cat([up.weight.detach()] * 2, 1))


def as_buffer(block, patch):
    weight = block.fc[0].weight.detach() * 2
    del block.fc[0].weight
    block.fc[0].register_buffer("weight", weight)


def bias_as_buffer(block, patch):
    bias = block.fc[0].bias.detach() * 2
    del block.fc[0].bias
    block.fc[0].register_buffer("bias", bias)


SURGERY: dict[str, Change] = {
    "layer replaced": lambda s, _: s.fc.__setitem__(1, nn.SiLU()),
    "layer appended": lambda s, _: s.fc.append(nn.Tanh()),
    "layer inserted": lambda s, _: s.fc.insert(1, nn.Tanh()),
    "layer deleted": lambda s, _: s.fc.__delitem__(3),
    "layers swapped": lambda s, _: s.fc._modules.update({"1": s.fc[3], "3": s.fc[1]}),
    "layers in another order": moved,
    "container replaced": lambda s, _: setattr(s, "fc", nn.Sequential(*list(s.fc), nn.Tanh())),
    "children replaced": lambda s, _: vars(s.fc).update(_modules={**s.fc._modules, "1": nn.SiLU()}),
    "pool replaced": lambda s, _: setattr(s, "pool", nn.AdaptiveMaxPool2d(1)),
    "class of a layer": lambda s, _: setattr(s.fc[1], "__class__", nn.SiLU),
    "class of the block": lambda s, _: setattr(s, "__class__", Doubled),
    "forward of a layer": with_forward,
    "forward hook": hook("register_forward_hook", lambda m, x, y: y * 2),
    "forward pre-hook": hook("register_forward_pre_hook", lambda m, x: (x[0] * 2,)),
    "backward hook": hook("register_full_backward_hook", lambda m, g, h: (g[0] * 2,)),
    "backward pre-hook": hook("register_full_backward_pre_hook", lambda m, g: (g[0] * 2,)),
    "hook of the block": lambda s, _: s.register_forward_hook(lambda m, x, y: y * 2),
    "backward hook of the block": lambda s, _: s.register_full_backward_hook(lambda m, g, h: (g[0] * 2,)),
    "parametrised": lambda s, _: parametrize.register_parametrization(s.fc[0], "weight", Twice()),
    "weight norm": lambda s, _: (
        setattr(
            parametrizations.weight_norm(s.fc[0]).parametrizations.weight,
            "original0",
            nn.Parameter(torch.ones(4, 1, 1, 1)),
        )
        or s.double()
    ),
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "weight replaced": lambda s, _: setattr(s.fc[0], "weight", nn.Parameter(s.fc[0].weight.detach() * 2)),
    "weight's data": lambda s, _: setattr(s.fc[0].weight, "data", s.fc[0].weight.data * 2),
    "weight loaded": lambda s, _: s.load_state_dict({k: 2 * v for k, v in s.state_dict().items()}),
    "weight assigned": lambda s, _: s.load_state_dict({k: 2 * v for k, v in s.state_dict().items()}, assign=True),
    "weight as a buffer": as_buffer,
    "bias as a buffer": bias_as_buffer,
    "bias taken away": lambda s, _: setattr(s.fc[0], "bias", None),
    "more hidden channels": wider,
    "frozen": lambda s, _: s.fc[0].requires_grad_(False) and s.fc[0].bias.data.add_(1),
}


class Doubled(Squeezed):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", SURGERY)
def test_layers_changed(change, monkeypatch):
    check(Squeezed, SURGERY[change], monkeypatch, may_stay=True)


def no_bias():
    block = Squeezed()
    block.fc[0].bias = None
    return block


@pytest.mark.parametrize("how", ["attribute", "register_parameter", "buffer"])
def test_a_bias_given_where_there_was_none(how, monkeypatch):
    def change(block, patch):
        bias = torch.ones(4, dtype=torch.float64)
        if how == "buffer":
            del block.fc[0].bias
            block.fc[0].register_buffer("bias", bias)
        elif how == "attribute":
            block.fc[0].bias = nn.Parameter(bias)
        else:
            block.fc[0].register_parameter("bias", nn.Parameter(bias))

    check(no_bias, change, monkeypatch)


class Ordered(nn.Module):
    """Runs its children in the order in which it has them."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        y = x.mean((2, 3), keepdim=True)
        for layer in self.children():
            y = layer(y)
        return x * torch.sigmoid(y)


class Listed(Gate):
    def __init__(self):
        super().__init__()
        self.layers, self.named, self.skip = nn.ModuleList([nn.ReLU()]), nn.ModuleDict({"act": nn.ReLU()}), ()

    def forward(self, x):
        y = self.down(x.mean((2, 3), keepdim=True))
        for i, layer in enumerate(self.layers):
            y = y if i in self.skip else layer(y)
        return x * torch.sigmoid(self.up(self.named["act"](y)))


class Twofold(nn.Module):
    """One layer, twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)
        self.b, self.depth = self.a, 2

    def forward(self, x):
        return x * torch.sigmoid(self.b(torch.relu(self.a(x.mean((2, 3), keepdim=True)))))


def reordered(block, patch):
    layer = block.act
    del block.act
    block.act = layer


def parted(block, patch):
    block.b = copy.deepcopy(block.a)
    block.b.weight.data.mul_(2)


CONTAINERS: dict[str, tuple[type[nn.Module], Change]] = {
    "children in another order": (Ordered, reordered),
    "list appended to": (Listed, lambda s, _: s.layers.append(nn.Tanh())),
    "list's layer replaced": (Listed, lambda s, _: s.layers.__setitem__(0, nn.Tanh())),
    "list emptied": (Listed, lambda s, _: s.layers.pop(0) and s.named.update({"act": nn.Identity()})),
    "layer skipped": (Listed, lambda s, _: vars(s).update(skip=(0,)) or s.named.update({"act": nn.Identity()})),
    "dict's layer replaced": (Listed, lambda s, _: s.named.update({"act": nn.SiLU()})),
    "a shared layer parted": (Twofold, parted),
}


@pytest.mark.parametrize("change", CONTAINERS)
def test_containers_changed(change, monkeypatch):
    check(*CONTAINERS[change], monkeypatch)
