"""Blocks whose forward reads an option from somewhere: an attribute, a container, a class, a global, a closure ...

Each has `residual` or the like in a place of its own, and `Kind` says how it is changed there: in the module (`own`),
or once for all modules (`shared`, by pytest's monkeypatch).
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attn import reference
from fused_attn.hosts import import_host

import_host("timm")

import timm.layers  # noqa: E402
from timm.layers.cbam import CbamModule  # noqa: E402
from timm.models._efficientnet_blocks import InvertedResidual  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck  # noqa: E402
from torchvision.ops.misc import SqueezeExcitation  # noqa: E402

C = 8
Undo = Callable[[], object]
Own = Callable[[Any], Undo]  # changes one module
Shared = Callable[[pytest.MonkeyPatch], object]  # changes what all modules read


@dataclasses.dataclass(frozen=True)
class Kind:
    """blocks: how many blocks `fuse` is to fuse in it as it is made (with tails, if it is `tailed`). operators: whether
    what runs then has operators of ours in it, also for small maps; else it is PyTorch's."""

    make: Callable[[], nn.Module]
    own: tuple[Own, ...] = ()
    shared: tuple[Shared, ...] = ()
    blocks: int = 1
    tailed: bool = False
    channels: int = C
    operators: bool = True


KINDS: dict[str, Kind] = {}


def kind(*own: Own, shared: tuple[Shared, ...] = (), blocks: int = 1) -> Callable[[type], type]:
    def add(cls: type) -> type:
        KINDS[cls.__name__] = Kind(cls, own, shared, blocks)
        return cls

    return add


def put(name: str, *values: Any, at: Callable[[Any], Any] = lambda m: m) -> Own:
    """Sets an attribute to the next of these values."""

    def change(module: Any) -> Undo:
        owner = at(module)
        before = getattr(owner, name)
        setattr(owner, name, copy.deepcopy(_next(before, values)))  # not one for all modules
        return lambda: setattr(owner, name, before)

    return change


def put_in(key: Any, *values: Any, at: Callable[[Any], Any]) -> Own:
    """Sets an item to the next of these values."""

    def change(module: Any) -> Undo:
        owner = at(module)
        before = owner[key]
        owner[key] = copy.deepcopy(_next(before, values))
        return lambda: operator.setitem(owner, key, before)

    return change


def _next(before: Any, values: tuple[Any, ...]) -> Any:
    """The one behind that which it is; the first where it is none of them."""
    same = [torch.equal(v, before) if isinstance(v, Tensor) else v is before or v == before for v in values]
    return values[(same.index(True) + 1) % len(values) if True in same else 0]


def for_all(owner: Callable[[], Any], name: str, *values: Any) -> Shared:
    """Sets an attribute of a class, a module or another thing that all read to the next of these values."""

    def change(patch: pytest.MonkeyPatch) -> None:
        here = owner()
        patch.setattr(here, name, _next(getattr(here, name), values))

    return change


class _Items:
    """What is in a list, as an attribute."""

    def __init__(self, container: list[Any]) -> None:
        self.container = container

    @property
    def items(self) -> list[Any]:
        return list(self.container)

    @items.setter
    def items(self, new: list[Any]) -> None:
        self.container[:] = new


def in_all(container: Callable[[], Any], key: Any, *values: Any) -> Shared:
    def change(patch: pytest.MonkeyPatch) -> None:
        here = container()
        new = [_next(v, values) if i == key else v for i, v in enumerate(here)] if isinstance(here, list) else None
        if new is None:
            patch.setitem(here, key, _next(here[key], values))
        else:  # pytest knows only of dictionaries
            patch.setattr(_Items(here), "items", new)

    return change


# Squeeze and excitation, and where its option may be


class Squeeze(nn.Module):
    """activation: of the excitation."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.act = nn.Conv2d(C, 4, 1), activation()
        self.fc2, self.gate = nn.Conv2d(4, C, 1), nn.Sigmoid()

    def gated(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))

    def joined(self, x: Tensor, residual: Any) -> Tensor:
        return self.gated(x) + x if residual else self.gated(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x)


def doubled(module: Any, x: Tensor) -> Tensor:
    """In place of a helper of `Squeeze`."""
    return 2 * x * module.gate(module.fc2(module.act(module.fc1(module.pool(x)))))


def _put_method(module: Any) -> Undo:
    module.gated = types.MethodType(doubled, module)
    return lambda: delattr(module, "gated")


KINDS["Squeeze"] = Kind(Squeeze, (_put_method,), (for_all(lambda: Squeeze, "gated", doubled, Squeeze.gated),))


@kind(put("_residual", True, False))
class PrivateAttribute(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self._residual = False

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self._residual)


@kind(put_in(0, True, False, at=lambda m: m._on), put("_on", [True], [False]))
class InList(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self._on = [False]

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self._on[0])


@kind(
    put_in("residual", True, False, at=lambda m: m.options["join"]),
    put_in("join", {"residual": True}, {"residual": False}, at=lambda m: m.options),
)
class InDictionary(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"join": {"residual": False}, "name": "se"}

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.options["join"]["residual"])


@kind(
    put("residual", True, False, at=lambda m: m.config.inner),
    put("power", 2, 1, at=lambda m: m.config),
    put("config", types.SimpleNamespace(power=2, inner=types.SimpleNamespace(residual=True))),
)
class InConfig(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(power=1, inner=types.SimpleNamespace(residual=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.joined(x, self.config.inner.residual)
        return y if self.config.power == 1 else y * y


class AttributeDictionary(dict):
    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


@kind(put("residual", True, False, at=lambda m: m.config))
class InAttributeDictionary(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.config = AttributeDictionary(residual=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.config.residual)


class Slotted:
    __slots__ = ("residual",)

    def __init__(self) -> None:
        self.residual = False


@kind(put("residual", True, False, at=lambda m: m.config))
class InSlots(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.config.residual)


@dataclasses.dataclass
class Options:
    residual: bool = False
    factors: list[float] = dataclasses.field(default_factory=lambda: [1.0])

    @property
    def adds(self) -> bool:
        return self.residual

    def factor(self) -> float:
        return self.factors[-1]


@kind(
    put("residual", True, False, at=lambda m: m.config),
    put_in(0, 2.0, 1.0, at=lambda m: m.config.factors),
    put("config", Options(True), Options(False, [0.5])),
    shared=(
        for_all(lambda: Options, "adds", property(lambda self: not self.residual), Options.adds),
        for_all(lambda: Options, "factor", lambda self: 3 * self.factors[-1], Options.factor),
    ),
)
class InDataclass(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.config = Options()

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.config.adds) * self.config.factor()


class ClassAttributeBase(Squeeze):
    residual: Any = False
    lists = [1.0]


@kind(
    put("residual", True, False),
    shared=(
        for_all(lambda: ClassAttributeBase, "residual", True, False),
        for_all(lambda: ClassAttribute, "factor", 2.0, 1.0),
        in_all(lambda: ClassAttributeBase.lists, 0, 2.0, 1.0),
    ),
)
class ClassAttribute(ClassAttributeBase):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.residual) * self.factor * self.lists[0]


class Switches:
    residual = False


class Level(enum.Enum):
    PLAIN = 0
    ADDED = 1


RESIDUAL = False
SETTINGS = {"residual": False}
FACTORS = (1.0, 1.0)
LEVEL = Level.PLAIN
MODULE: Any = types.ModuleType("tests.fusion.settings_of_changeable")
MODULE.residual = False
sys.modules[MODULE.__name__] = MODULE
HERE: Any = sys.modules[__name__]


@kind(shared=(for_all(lambda: HERE, "RESIDUAL", True, False), for_all(lambda: HERE, "FACTORS", (2.0, 1.0), (1.0, 1.0))))
class GlobalValue(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, RESIDUAL) * FACTORS[0]


@kind(shared=(in_all(lambda: SETTINGS, "residual", True, False), for_all(lambda: HERE, "SETTINGS", {"residual": True})))
class GlobalDictionary(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, SETTINGS["residual"])


@kind(shared=(for_all(lambda: Switches, "residual", True, False),))
class GlobalClass(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, Switches.residual)


@kind(shared=(for_all(lambda: HERE, "LEVEL", Level.ADDED, Level.PLAIN),))
class GlobalEnum(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, LEVEL is Level.ADDED)


@kind(shared=(for_all(lambda: MODULE, "residual", True, False),))
class OtherModule(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, MODULE.residual)


def _enclosed() -> tuple[type, Shared]:
    residual = False

    class Enclosed(Squeeze):
        def forward(self, x: Tensor) -> Tensor:
            return self.joined(x, residual)

    def change(patch: pytest.MonkeyPatch) -> None:
        cell = Enclosed.forward.__closure__[0]  # type: ignore[index]
        patch.setattr(cell, "cell_contents", not cell.cell_contents)

    return Enclosed, change


Enclosed, _change_enclosed = _enclosed()
KINDS["Enclosed"] = Kind(Enclosed, shared=(_change_enclosed,))


def with_factor(options: dict[str, float]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def decorated(self: Any, x: Tensor) -> Tensor:
            return function(self, x) * options["factor"]

        return decorated

    return decorate


OF_DECORATOR = {"factor": 1.0}


@kind(shared=(in_all(lambda: OF_DECORATOR, "factor", 2.0, 1.0),))
class Decorated(Squeeze):
    @with_factor(OF_DECORATOR)
    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x)


@kind(put("residual", True, False), shared=(for_all(lambda: Property, "residual", True, property(lambda m: False)),))
class Property(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self._on = [False]

    @property
    def residual(self) -> Any:
        return self._on[0]

    @residual.setter
    def residual(self, value: bool) -> None:
        self._on[0] = value

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.residual)


def scaled(x: Tensor, factor: float = 1.0, *, offset: float = 0.0) -> Tensor:
    return x * factor + offset if offset else x * factor


def tripled(x: Tensor) -> Tensor:
    return 3 * x


@kind(
    shared=(
        for_all(lambda: scaled, "__defaults__", (2.0,), (1.0,)),
        for_all(lambda: scaled, "__kwdefaults__", {"offset": 1.0}, {"offset": 0.0}),
        for_all(lambda: HERE, "scaled", tripled, scaled),
        for_all(lambda: scaled, "__code__", tripled.__code__, scaled.__code__),
    )
)
class GlobalHelper(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return scaled(self.gated(x))


def of_function(x: Tensor) -> Tensor:
    return x * of_function.factor  # type: ignore[attr-defined]


of_function.factor = 1.0  # type: ignore[attr-defined]


@kind(shared=(for_all(lambda: of_function, "factor", 2.0, 1.0),))
class FunctionAttribute(Squeeze):
    def forward(self, x: Tensor) -> Tensor:
        return of_function(self.gated(x))


@kind(
    put(
        "act", functools.partial(F.leaky_relu, negative_slope=0.3), functools.partial(F.leaky_relu, negative_slope=0.01)
    ),
    put_in("negative_slope", 0.3, 0.01, at=lambda m: m.act.keywords),
)
class Partial(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = functools.partial(F.leaky_relu, negative_slope=0.01)


class Functor:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.slope)


@kind(
    put("slope", 0.3, 0.01, at=lambda m: m.act),
    put("act", F.silu, F.relu, torch.tanh),
    shared=(for_all(lambda: Functor, "__call__", lambda self, x: x, Functor.__call__),),
)
class CalledObject(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        del self.act
        self.act = Functor(0.01)


POOLS = {"avg": lambda x: x.mean((2, 3), keepdim=True), "max": lambda x: F.adaptive_max_pool2d(x, 1)}


@kind(put("mode", "max", "avg"), shared=(in_all(lambda: POOLS, "avg", POOLS["max"], POOLS["avg"]),))
class NamedPool(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.mode = "avg"

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(POOLS[self.mode](x)))))


get_residual = operator.attrgetter("_residual")


@kind(put("_residual", True, False), put("_which", "other", "residual"), put("_other", True, False), blocks=0)
class MadeName(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self._residual = self._other = False
        self._which = "residual"

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.joined(x, getattr(self, f"_{self._which}")), get_residual(self))


def _write(module: Any) -> Undo:
    module.factor.mul_(2)
    return lambda: module.factor.div_(2)


@kind(_write, put("factor", torch.tensor(2.0).double(), torch.tensor(1.0).double()), blocks=0)
class PlainTensor(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.tensor(1.0, dtype=torch.double)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x) * self.factor


@kind(put_in(0, torch.ones(C).double(), 2 * torch.ones(C).double(), at=lambda m: m.factors), blocks=0)
class TensorsInList(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [torch.ones(C).double()]

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x) * self.factors[0][:, None, None]


@kind(put_in(0, torch.ones(C), torch.ones(2 * C), at=lambda m: m.notes), put_in(1, 2.0, 1.0, at=lambda m: m.notes))
class TensorsBeside(Squeeze):
    """Reads a list, in which there are tensors beside what it computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Any] = [torch.ones(C), 1.0]

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x) * self.notes[1]


@kind(_write)
class Buffer(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x) * self.factor


def _write_weight(module: Any) -> Undo:
    with torch.no_grad():
        module.alpha.neg_()
    return lambda: module.alpha.data.neg_()


@kind(_write_weight, blocks=0)
class BranchOnParameter(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(x, self.alpha > 0)


class Steps(Squeeze):
    def squeezed(self, x: Tensor) -> Tensor:
        return self.pool(x)

    @staticmethod
    def activated(x: Tensor) -> Tensor:
        return x.sigmoid()

    @classmethod
    def applied(cls, x: Tensor, gate: Tensor) -> Tensor:
        return x * gate


def _own_step(module: Any) -> Undo:
    module.squeezed = lambda x: x.mean((2, 3), keepdim=True) + 1
    return lambda: delattr(module, "squeezed")


@kind(
    _own_step,
    shared=(
        for_all(lambda: Steps, "squeezed", lambda self, x: x.amax((2, 3), keepdim=True), Steps.squeezed),
        for_all(lambda: Steps, "activated", staticmethod(torch.tanh), staticmethod(Steps.activated)),
        for_all(lambda: Steps, "applied", classmethod(lambda cls, x, gate: x * gate + x)),
    ),
)
class Helpers(Steps):
    def forward(self, x: Tensor) -> Tensor:
        return self.applied(x, self.activated(self.fc2(self.act(self.fc1(self.squeezed(x))))))


# Blocks of torch's layers with options


def _with(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Squeeze(activation)


KINDS |= {
    "LeakyReLU": Kind(_with(nn.LeakyReLU)),
    "GELU": Kind(_with(nn.GELU)),
    "Hardswish": Kind(_with(nn.Hardswish)),
    "Dropout": Kind(_with(lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.0)))),
    "BatchNormInside": Kind(_with(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))),
}


@kind()
class Clamped(Squeeze):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gate(self.fc2(self.act(self.fc1(self.pool(x)))) + 3) / 6)


@kind()
class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(C, 4), nn.ReLU(inplace=True), nn.Linear(4, C), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.pool(x)).view(x.shape[0], -1, 1, 1)


@kind()
class OwnParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(4, C)), nn.Parameter(torch.randn(C, 4))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(F.linear(F.relu(F.linear(x.mean((2, 3)), self.w1)), self.w2))
        return x * gate[:, :, None, None]


@kind()
class EfficientChannelAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).unsqueeze(1)).squeeze(1)
        return x * y.sigmoid()[:, :, None, None]


class ChannelMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(C, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, C, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1)))


class SpatialMask(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 1, 3, padding=1, bias=False), norm()

    def forward(self, x: Tensor) -> Tensor:
        pools = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return torch.sigmoid(self.norm(self.conv(pools)))


@kind()
class SpatialBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mask = SpatialMask(lambda: nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x)


@kind(put("ca", ChannelMask().double(), nn.Identity()))
class Cbam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ca, self.sa = ChannelMask(), SpatialMask()

    def forward(self, x: Tensor) -> Tensor:
        x = self.ca(x) * x
        return self.sa(x) * x


@kind(put("_skip", False, True), put("_alpha", 0.5, 1.0), put_in(0, 2.0, 1.0, at=lambda m: m._list))
class Parent(nn.Module):
    """Gates in the forward of a larger module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.ca, self.sa = nn.Conv2d(C, C, 3, padding=1), ChannelMask(), SpatialMask()
        self._skip, self._alpha, self._list = True, 1.0, [1.0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.ca(y) * y
        y = self.sa(y) * y * self._alpha * self._list[0]
        return y + x if self._skip else y


@kind(put("every", 3, 2))
class CountingParent(nn.Module):
    """Keeps state in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ca, self.every = ChannelMask(), 2
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.told: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.told.append(len(self.told))
        y = self.ca(x) * x
        return y + x if len(self.told) % self.every else y


@kind(blocks=2)
class WritingParent(nn.Module):
    """Writes into the map between a gate and its product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.ca, self.sa = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), ChannelMask(), SpatialMask()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        gate = self.ca(y)
        y += x
        y = y * gate
        y *= self.sa(y)
        return F.relu(y, inplace=True)


@kind()
class Network(nn.Module):
    """Blocks among other layers, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU())
        self.se, self.attention = Linears(), nn.Sequential(SpatialBlock())

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.stem(x))
        return self.se(self.attention(y)) + x


@kind()
class Selective(nn.Module):
    """Selective kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(C, C, 3, padding=1, groups=2), nn.BatchNorm2d(C), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=2), nn.BatchNorm2d(C), nn.ReLU())
        self.squeeze = nn.Sequential(nn.Conv2d(C, 4, 1), nn.ReLU())
        self.excite, self.softmax = nn.Conv2d(4, 2 * C, 1), nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        z = self.excite(self.squeeze((a + b).mean((2, 3), keepdim=True)))
        weights = self.softmax(z.view(z.shape[0], 2, C, 1, 1))
        return a * weights[:, 0] + b * weights[:, 1]


@kind()
class PositionAttention(nn.Module):
    """As DANet's and SAGAN's."""

    def __init__(self) -> None:
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(C, 4, 1), nn.Conv2d(C, 4, 1)
        self.value_conv, self.gamma = nn.Conv2d(C, C, 1), nn.Parameter(torch.ones(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.size()
        query = self.query_conv(x).view(n, -1, width * height).permute(0, 2, 1)
        attention = self.softmax(torch.bmm(query, self.key_conv(x).view(n, -1, width * height)))
        value = self.value_conv(x).view(n, -1, width * height)
        return self.gamma * torch.bmm(value, attention.permute(0, 2, 1)).view(n, c, height, width) + x


class ChannelSelfAttention(nn.Module):
    """As DANet's."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.softmax = nn.Parameter(torch.ones(1)), nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.size()
        rows = x.view(n, c, -1)
        energy = torch.bmm(rows, rows.permute(0, 2, 1))
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        return self.gamma * torch.bmm(self.softmax(energy), rows).view(n, c, height, width) + x


@kind(put("factor", 0.5, 1.0))
class NonLocal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(C, 4, 1) for _ in range(3))
        self.W, self.factor = nn.Sequential(nn.Conv2d(4, C, 1), nn.BatchNorm2d(C)), 1.0

    def forward(self, x: Tensor) -> Tensor:
        g, theta, phi = (layer(x).flatten(2) for layer in (self.g, self.theta, self.phi))
        f = torch.softmax(theta.transpose(1, 2) @ phi * self.factor, -1)
        return self.W((f @ g.transpose(1, 2)).transpose(1, 2).reshape(x.shape[0], 4, *x.shape[2:])) + x


# Libraries' and our own


def _se(channels: int, **factory: Any) -> nn.Module:
    return timm.layers.SEModule(channels, rd_ratio=0.5, **factory)


def _eca(channels: int, **factory: Any) -> nn.Module:
    return timm.layers.EcaModule(channels, **factory)


KINDS |= {
    "timm.SEModule": Kind(lambda: _se(C), (put("add_maxpool", True, False),)),
    "timm.EcaModule": Kind(lambda: _eca(C)),
    "timm.CbamModule": Kind(lambda: CbamModule(C, rd_ratio=0.5)),
    "timm.SelectiveKernel": Kind(
        lambda: timm.layers.SelectiveKernel(C, rd_channels=4), (put("split_input", False, True),)
    ),
    "timm.GlobalContext": Kind(lambda: timm.layers.GlobalContext(C, rd_channels=4)),
    "timm.NonLocalAttn": Kind(lambda: timm.layers.NonLocalAttn(C, rd_channels=4), (put("scale", 0.5, 1.0),)),
    "timm.BatNonLocalAttn": Kind(
        lambda: timm.layers.BatNonLocalAttn(C, block_size=1, rd_channels=4),
        (put("block_size", 2, 1, at=lambda m: m.ba), put("groups", 1, 2, at=lambda m: m.ba)),
        operators=False,
    ),
    "timm.BasicBlock": Kind(lambda: BasicBlock(C, C, attn_layer=_se), tailed=True),
    "timm.BasicBlock, drop_path": Kind(
        lambda: BasicBlock(C, C, attn_layer=_eca, drop_path=timm.layers.DropPath(0.25)),
        (put("drop_prob", 0.0, 0.25, at=lambda m: m.drop_path),),
        tailed=True,
    ),
    "timm.Bottleneck": Kind(lambda: Bottleneck(C, C // 4, attn_layer=_se), tailed=True),
    "timm.InvertedResidual": Kind(
        lambda: InvertedResidual(C, C, exp_ratio=1.0, se_layer=timm.layers.SqueezeExcite), tailed=True
    ),
    "torchvision.SqueezeExcitation": Kind(lambda: SqueezeExcitation(C, 4)),
    "reference.CBAM": Kind(lambda: reference.CBAM(C, reduction=2)),
    "reference.BAM": Kind(lambda: reference.BAM(C, reduction=2)),
    "reference.SCSE": Kind(lambda: reference.SCSE(C, reduction=2)),
    "reference.CoordinateAttention": Kind(lambda: reference.CoordinateAttention(C)),
    "reference.TripletAttention": Kind(reference.TripletAttention),
    "reference.SimAM": Kind(reference.SimAM),
    "reference.SKConv": Kind(lambda: reference.SKConv(C, groups=2)),
    "reference.SplitAttention": Kind(lambda: reference.SplitAttention(C)),
    "reference.EMA": Kind(lambda: reference.EMA(C, factor=2)),
    "ChannelSelfAttention": Kind(ChannelSelfAttention, operators=False),
    "reference.NonLocal": Kind(lambda: reference.NonLocal(C, hidden=4), (put("mode", "gaussian", "embedded"),)),
    "reference.NonLocal, concatenation": Kind(
        lambda: reference.NonLocal(C, hidden=4, mode="concatenation"), operators=False
    ),
    "reference.PositionAttention": Kind(lambda: reference.PositionAttention(C, reduction=2)),
    "reference.SelfAttention2d": Kind(lambda: reference.SelfAttention2d(C, reduction=2)),
    "reference.ChannelSelfAttention": Kind(lambda: reference.ChannelSelfAttention(C), operators=False),
    "reference.DualAttention": Kind(lambda: reference.DualAttention(C, hidden=C, reduction=2)),
    "reference.CrissCrossAttention": Kind(lambda: reference.CrissCrossAttention(C, reduction=2)),
    "reference.GlobalContext": Kind(lambda: reference.GlobalContext(C, hidden=4, fuse="both")),
    "reference.GSoP": Kind(lambda: reference.GSoP(C, mode="avg", reduced=4), (put("mode", "max", "avg"),)),
    "reference.ResidualAttention": Kind(  # around a mask that is a block
        lambda: reference.ResidualAttention(C, trunk=nn.Conv2d(C, C, 1), mask=ChannelMask()),
        (put("mask", SpatialMask().double(), ChannelMask().double()),),
        blocks=2,
    ),
    "reference.SpatialTransformer": Kind(
        lambda: reference.SpatialTransformer(C, localization=nn.AdaptiveAvgPool2d(1), features=C),
        (put("align_corners", True, False), put("padding_mode", "border", "zeros")),
        operators=False,
    ),
    "reference.BilinearAttention": Kind(
        lambda: reference.BilinearAttention(C, block_size=1, rd_channels=4), operators=False
    ),
    "reference.DoubleAttention": Kind(lambda: reference.DoubleAttention(C), operators=False),
    "reference.ExternalAttention": Kind(lambda: reference.ExternalAttention(C, memory=4), operators=False),
    "reference.GatherExcite": Kind(lambda: reference.GatherExcite(C)),
}
