"""A fused block is an instance of its class to whoever looks: tracers, exporters, copies, hosts with machinery of their
own; and `fuse` may be called again after any change."""

from __future__ import annotations

import collections
import copy
import inspect
import io
import multiprocessing
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from fused_attn import explain, fuse, keep_operators, reference, unfuse
from fused_attn.fusion.recipes.names import host_of
from tests.checks import random, randomised
from tests.fusion.counting import FusedOperators, said_to_run_fused

X = random(2, 8, 6, 5, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self, channels=8, reduction=2):
        super().__init__()
        self.config = channels, reduction
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Gated."""
        return features * self.fc(self.pool(features))


class ChannelMask(Block):
    def forward(self, x):
        return self.fc(self.pool(x))


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.mask = nn.Conv2d(8, 8, 3, padding=1), ChannelMask()

    def forward(self, image):
        y = self.conv(image)
        return self.mask(y) * y + image


MODELS = {
    "block": Block,
    "in a net": lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Block()),
    "parent": Parent,
    "cbam": lambda: reference.CBAM(8, reduction=2),
}


def fused_operators(call: Any) -> int:
    with torch.no_grad(), FusedOperators() as operators:
        call()
    return operators.count


def assert_same(model, original, x: torch.Tensor = X) -> None:
    """Values and gradients, of x and the parameters."""
    found = []
    for m in (model, original):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        leaves = [leaf, *(p for p in m.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True)
        found.append([y.detach(), *(g if g is not None and g.any() else None for g in grads)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=MODELS)
def pair(request):
    original = randomised(MODELS[request.param]())
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) >= 1
    return model, original


# To whoever looks


def test_signature_name_and_source():
    model = fuse(Block())
    cls = type(model)
    assert inspect.signature(model.forward) == inspect.signature(Block().forward)
    assert inspect.signature(cls.forward) == inspect.signature(Block.forward)
    assert inspect.get_annotations(cls.forward) == inspect.get_annotations(Block.forward)
    assert inspect.getsource(cls.forward) == inspect.getsource(Block.forward)
    assert cls.forward.__doc__ == "Gated." and cls.forward.__name__ == "forward"
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (Block.__name__, Block.__qualname__, Block.__module__)
    assert repr(model) == repr(Block()) and isinstance(model, Block)
    assert model._get_name() == "Block"


def test_what_it_has():
    original = Block()
    model = fuse(copy.deepcopy(original))
    assert {k for k in vars(model) if not k.startswith("_fused_attn")} == set(vars(original))
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    assert {n for n in dir(model) if not n.startswith("_")} == {n for n in dir(original) if not n.startswith("_")}


def test_called_by_keyword():
    original = randomised(Block())
    model = fuse(copy.deepcopy(original))
    torch.testing.assert_close(model(features=X), original(features=X), rtol=1e-9, atol=1e-9)
    for wrong in ((), (X, X)):
        with pytest.raises(TypeError, match="forward"):
            model(*wrong)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model(x=X)


# Tracers


def test_symbolic_trace(pair):
    model, original = pair
    if isinstance(original, reference.CBAM):  # checks the number of channels, which nothing traces
        for m in pair:
            with pytest.raises(torch.fx.proxy.TraceError):
                torch.fx.symbolic_trace(m)
        return
    graph = torch.fx.symbolic_trace(model)
    assert_same(graph, original)
    assert [n.target for n in graph.graph.nodes] == [n.target for n in torch.fx.symbolic_trace(original).graph.nodes]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_trace(pair, gradients):
    model, original = (m.eval() for m in pair)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, X)
        file = io.BytesIO()
        torch.jit.save(torch.jit.freeze(traced), file)
        file.seek(0)
        for shape in ((2, 8, 6, 5), (3, 8, 9, 4)):
            x = random(*shape, dtype=torch.float64)
            torch.testing.assert_close(torch.jit.load(io.BytesIO(file.getvalue()))(x), original(x))
    assert_same(traced, original)


class Annotated(nn.Module):
    """With a constant that TorchScript knows by its annotation alone."""

    def __init__(self):
        super().__init__()
        self.fc, self.scales = Block().fc, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * self.fc(F.adaptive_avg_pool2d(x, 1))
        if self.scales:
            y = y.unknown()
        return y


Annotated.__annotations__ = {"scales": torch.jit.Final[bool]}  # past this file's annotations, which are strings


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_script():
    for make in (Block, MODELS["in a net"], Parent, Annotated):
        original = randomised(make())
        model = fuse(copy.deepcopy(original))
        assert_same(torch.jit.script(model), original)
        assert said_to_run_fused(model) == 1


def test_export_by_the_names_of_arguments(pair):
    model, original = pair
    name = next(iter(inspect.signature(original.forward).parameters))
    dims = {name: {0: torch.export.Dim("b"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}}
    if isinstance(original, nn.Sequential):
        dims = {"input": dims[name]}
    with keep_operators():
        program = torch.export.export(model, (X,), dynamic_shapes=dims).module()
    x = random(3, 8, 7, 9, dtype=torch.float64)
    torch.testing.assert_close(program(x), original(x), rtol=1e-9, atol=1e-9)


def test_functional_call(pair):
    model, original = pair
    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in original.state_dict().items()}
    torch.testing.assert_close(
        torch.func.functional_call(model, other, (X,)), torch.func.functional_call(original, other, (X,))
    )
    assert_same(model, original)


# Copies

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle 2": lambda m: pickle.loads(pickle.dumps(m, protocol=2)),
    "ForkingPickler": lambda m: pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(m)),
    "copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
    "torch.save": lambda m: _saved(m),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def scale(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", MODELS)
def test_copies_are_independent(how, kind):
    original = randomised(MODELS[kind]())
    model = fuse(copy.deepcopy(original))
    copied = COPIES[how](model)
    assert said_to_run_fused(copied) == said_to_run_fused(model)
    assert_same(copied, original)
    if how in ("copy", "ForkingPickler"):  # which share their tensors
        return
    changed = copy.deepcopy(original)
    scale(copied), scale(changed)
    assert_same(copied, changed)
    assert_same(model, original)
    for block in (m for m in copied.modules() if hasattr(m, "fc")):
        block.fc[1] = nn.SiLU()
    for block in (m for m in changed.modules() if hasattr(m, "fc")):
        block.fc[1] = nn.SiLU()
    assert_same(copied, changed)
    assert_same(model, original)
    assert_same(unfuse(copied), changed)
    assert all(host_of(type(m)) is type(m) for m in copied.modules())


class Locked(Block):
    """Has what cannot be copied, and leaves it out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()

    def __getstate__(self):
        state = dict(self.__dict__)
        del state["lock"]
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


class Reduced(Block):
    """Made anew from its arguments."""

    def __reduce__(self):
        return _made, (type(self), self.config, self.state_dict())


def _made(cls, config, state):
    block = cls(*config).double()
    block.load_state_dict(state)
    return block


class ReducedEx(Block):
    def __reduce_ex__(self, protocol):
        return _made, (Block, self.config, self.state_dict())


class Copying(Block):
    def __deepcopy__(self, memo):
        new = type(self)(*self.config).double()
        memo[id(self)] = new
        new.load_state_dict(self.state_dict())
        new.copies = getattr(self, "copies", 0) + 1
        return new


class CopyingBare(Block):
    """As in pasted recipes: past the constructor."""

    def __deepcopy__(self, memo):
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        for name, value in self.__dict__.items():
            new.__dict__[name] = copy.deepcopy(value, memo)
        return new


class WithArguments(Block):
    def __getnewargs__(self):
        return self.config

    def __new__(cls, channels=8, reduction=2):
        assert channels
        return super().__new__(cls)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("cls", [Locked, Reduced, ReducedEx, Copying, CopyingBare, WithArguments])
def test_hosts_that_copy_themselves(cls, how):
    original = randomised(nn.Sequential(cls()))
    model = fuse(COPIES[how](original))
    assert said_to_run_fused(model) == 1
    for copied in (COPIES[how](model), COPIES[how](COPIES[how](model))):
        assert isinstance(copied[0], Block)
        assert_same(copied, original)
        changed = COPIES[how](original)
        scale(copied), scale(changed)
        assert_same(copied, changed)
        explain(copied), fuse(copied), unfuse(copied)
        assert_same(copied, changed)
    assert_same(model, original)


def test_a_replica_of_data_parallel():
    """As `nn.parallel.replicate` makes them: other tensors in place of the parameters."""
    original = randomised(Block())
    model = fuse(copy.deepcopy(original))
    found = []
    for block in (original, model):
        parts = {id(m): m._replicate_for_data_parallel() for m in block.modules()}
        for m in block.modules():
            replica = parts[id(m)]
            replica._modules = {name: parts[id(child)] for name, child in m._modules.items()}
            for name, p in m._parameters.items():
                setattr(replica, name, p * 2)
        replica = parts[id(block)]
        found.append(replica(X))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert_same(model, original)


def test_compiled_in_place_then_copied():
    original = randomised(Block())
    model = fuse(copy.deepcopy(original))
    model.compile(backend="eager")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(copied, original)
    assert_same(model, original)
    torch.compiler.reset()


# Hosts with machinery of their own

REGISTRY: dict[str, type] = {}
MADE: list[type] = []


class Registering(type):
    def __init__(cls, name, bases, space, **kwargs):
        super().__init__(name, bases, space)
        REGISTRY[space.get("kind", name)] = cls

    def __call__(cls, *args, **kwargs):
        MADE.append(cls)
        return super().__call__(*args, **kwargs)


class Registered(nn.Module, metaclass=Registering):
    kind = "base"
    subclasses: list[type] = []

    def __init_subclass__(cls, *, kind, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.subclasses.append(cls)


class RegisteredBlock(Registered, kind="block"):
    kind = "block"

    def __init__(self):
        nn.Module.__init__(self)
        self.fc, self.pool = Block().fc, nn.AdaptiveAvgPool2d(1)

    forward = Block.forward


def test_registries_of_classes_stay():
    before = dict(REGISTRY), list(Registered.subclasses), RegisteredBlock.__subclasses__()
    original = randomised(RegisteredBlock())
    made = len(MADE)
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) == 1 and len(MADE) == made
    assert (REGISTRY, Registered.subclasses) == before[:2]
    assert_same(model, original)
    assert_same(copy.deepcopy(model), original)


def test_made_by_the_class_of_a_fused_block():
    model = fuse(randomised(Block()))
    clone = type(model)(*model.config).double()
    clone.load_state_dict(model.state_dict())
    assert_same(clone, model)
    explain(clone)
    assert_same(copy.deepcopy(clone), model)
    assert_same(fuse(clone), model)
    assert said_to_run_fused(clone) == 1
    assert type(unfuse(clone)) is Block


def test_a_class_derived_from_that_of_a_fused_block():
    model = fuse(randomised(Block()))

    class Doubled(type(model)):  # type: ignore[misc]
        def forward(self, x):
            return super().forward(x) * 2

    derived = Doubled().double()
    derived.load_state_dict(model.state_dict())
    for m in (derived, fuse(derived), copy.deepcopy(derived), unfuse(derived)):
        torch.testing.assert_close(m(X), model(X) * 2, rtol=1e-9, atol=1e-9)


def test_a_class_put_around_a_fused_block():
    """As fully_shard and parametrisations do it."""
    original = randomised(Block())
    model = fuse(copy.deepcopy(original))
    cls = type(model)
    model.__class__ = type("Sharded" + cls.__name__, (cls,), {"shard": lambda self: 1})
    assert_same(model, original)
    assert model.shard() == 1
    explain(model)
    assert_same(copy.deepcopy(model), original)
    unfuse(model)
    assert model.shard() == 1
    assert_same(model, original)


def test_a_class_put_around_that_changes_a_method():
    class Tanh(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

        def gate(self, y):
            return torch.sigmoid(y)

        def forward(self, x):
            return x * self.gate(self.b(torch.relu(self.a(x.mean((2, 3), keepdim=True)))))

    original = randomised(Tanh())
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) == 1
    for m in (original, model):
        m.__class__ = type("Other", (type(m),), {"gate": lambda self, y: torch.tanh(y)})
    assert_same(model, original)
    assert said_to_run_fused(model) == 0
    assert_same(fuse(model), original)
    assert_same(copy.deepcopy(model), original)
    assert_same(unfuse(model), original)


def test_a_class_made_by_exec():
    space: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__(); self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)\n"
        "    def forward(self, x):\n"
        "        return x * torch.sigmoid(self.b(torch.relu(self.a(x.mean((2, 3), keepdim=True)))))\n",
        space,
    )
    original = randomised(nn.Sequential(space["Made"]()))
    model = fuse(copy.deepcopy(original))
    assert_same(model, original)
    str(explain(model)), unfuse(model)
    assert_same(model, original)


def test_a_class_whose_instances_keep_no_other_class():
    class Slotted(Block):
        __slots__ = ("extra",)

    class Final(Block):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise TypeError("the class of this cannot be changed")
            super().__setattr__(name, value)

    for cls in (Slotted, Final):
        model = fuse(randomised(cls()))
        torch.testing.assert_close(model(X), cls.forward(model, X), rtol=1e-9, atol=1e-9)
        unfuse(model)
        assert type(model) is cls


class Raises(nn.Module):
    """Whatever is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def forward(self, x):
        return x


class RaisingProperty(Block):
    @property
    def more(self):
        raise RuntimeError("not now")

    def forward(self, x):
        return x * self.fc(self.pool(x)) * (1 if True else self.more)


class NotEqual(Block):
    """Cannot be compared, and an option neither."""

    __hash__ = nn.Module.__hash__

    def __init__(self):
        super().__init__()
        self.values = torch.ones(3)

    def __eq__(self, other):
        raise RuntimeError("no")


class KeywordOnly(Block):
    def forward(self, *, features):
        return features * self.fc(self.pool(features))


class NoArguments(Block):
    def forward(self):
        return self.fc


class Generating(Block):
    def forward(self, x):
        yield x * self.fc(self.pool(x))


class Awaited(Block):
    async def forward(self, x):
        return x * self.fc(self.pool(x))


class Cyclic(Block):
    def __init__(self):
        super().__init__()
        self.me = [self]
        self.loop = {}
        self.loop["loop"] = self.loop


class WithoutInit(nn.Module):
    def __init__(self):
        """Forgets that of Module."""

    def forward(self, x):
        return x


class NoneChild(Block):
    def __init__(self):
        super().__init__()
        self.register_module("more", None)
        self.register_buffer("nothing", None)
        self.register_parameter("none", None)


class Properties(Block):
    forward = property(lambda self: lambda x: x * self.fc(self.pool(x)))


STRANGE = [RaisingProperty, NotEqual, KeywordOnly, NoArguments, Generating, Awaited, Cyclic, NoneChild, Properties]


@pytest.mark.filterwarnings("error:coroutine:RuntimeWarning")
@pytest.mark.parametrize("cls", STRANGE, ids=lambda c: c.__name__)
def test_fuse_takes_strange_modules(cls):
    block = cls().double()
    model = nn.ModuleList([block, nn.Sequential(block)])
    fuse(model, tails=True)
    str(explain(model, tails=True))
    if cls in (RaisingProperty, NotEqual, Cyclic, NoneChild, Properties):
        torch.testing.assert_close(model[1](X), X * block.fc(block.pool(X)), rtol=1e-9, atol=1e-9)
    unfuse(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_leaves_compiled_modules():
    scripted, traced = torch.jit.script(Block()), torch.jit.trace(Block(), random(2, 8, 4, 4))
    graph, optimized = torch.fx.symbolic_trace(Block()), torch.compile(Block(), backend="eager")
    model = nn.ModuleList([scripted, traced, graph, optimized, nn.Sequential(scripted, Block()), nn.LazyConv2d(8, 1)])
    x = random(2, 8, 6, 5)
    expected = [m(x) for m in model[:5]]
    fuse(model, tails=True)
    str(explain(model))
    for m, y in zip(model[:5], expected, strict=True):
        torch.testing.assert_close(m(x), y)
    unfuse(model)


def test_a_module_without_its_constructor():
    model = WithoutInit.__new__(WithoutInit)
    WithoutInit.__init__(model)
    with pytest.raises(AttributeError):  # torch's own, for any call of it
        list(model.modules())


# Hooks, parametrisations


@pytest.mark.parametrize("kind", MODELS)
def test_hooks_of_all_modules(kind):
    original = randomised(MODELS[kind]())
    model = fuse(copy.deepcopy(original))

    def calls(m, register):
        seen: collections.Counter[str] = collections.Counter()
        handle = register(lambda module, *_: seen.update([host_of(type(module)).__name__]))
        try:
            m(X.clone().requires_grad_()).sum().backward()
        finally:
            handle.remove()
        return seen

    for register in (
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ):
        assert calls(model, register) == calls(original, register), register.__name__
    assert said_to_run_fused(model) >= 1 and fused_operators(lambda: model(X))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class OwnWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(8, 4))

    def forward(self, x):
        s = torch.sigmoid(torch.relu(x.mean((2, 3)) @ self.w1.T) @ self.w2.T)
        return x * s[:, :, None, None]


@pytest.mark.parametrize("cls,path,name", [(Block, "fc.0", "weight"), (OwnWeights, "", "w1")])
def test_parametrised_copied_fused_again_and_unfused(cls, path, name):
    original = randomised(cls())
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) == 1
    for m in (original, model):
        parametrize.register_parametrization(m.get_submodule(path), name, Halved())
    assert_same(model, original)
    copied, changed = copy.deepcopy(model), copy.deepcopy(original)
    scale(copied), scale(changed)
    assert_same(copied, changed)
    fuse(model)
    assert_same(model, original)
    unfuse(model)
    assert_same(model, original)
    for m in (original, model):
        parametrize.remove_parametrizations(m.get_submodule(path), name)
    assert_same(model, original)
    assert type(unfuse(model)) is cls  # the parametrisation had the fused class as its base
    assert said_to_run_fused(fuse(model)) == 1
    assert_same(model, original)


# Again (what was fused, changed, and is fused again)


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.norm, self.up = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(torch.relu(self.norm(self.down(x.mean((2, 3), keepdim=True))))))


class NormedSpatial(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)

    def forward(self, x):
        z = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(z)))


def to_sync(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def eps(model):
    for norm in norms(model):
        norm.eps = 0.1
    return model


def activation(model):
    for m in model.modules():
        if hasattr(m, "fc"):
            m.fc[1] = nn.SiLU()
    return model


def option(model):
    for m in model.modules():
        if isinstance(getattr(m, "conv", None), nn.Conv2d):
            m.conv.padding_mode = "circular"
            m.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return model


@pytest.mark.parametrize("change", [to_sync, eps, activation, option])
@pytest.mark.parametrize("cls", [Block, Normed, NormedSpatial, Parent])
def test_fused_again_after_a_change(cls, change):
    original = randomised(nn.Sequential(cls())).eval()
    model = fuse(copy.deepcopy(original))
    assert said_to_run_fused(model) == 1
    original, model = change(original), change(model)
    assert_same(model, original)
    fresh = said_to_run_fused(fuse(copy.deepcopy(original)))
    fuse(model)
    assert said_to_run_fused(model) == fresh == bool(fused_operators(lambda: model(X)))
    assert_same(model, original)
    assert_same(copy.deepcopy(model), original)
    unfuse(model)
    assert_same(model, original)
    assert not any(k.startswith("_fused_attn") for m in model.modules() for k in vars(m))


def test_a_changed_block_changed_back():
    original = randomised(Block())
    model = fuse(copy.deepcopy(original))
    act, model.fc[1] = model.fc[1], nn.SiLU()
    assert said_to_run_fused(model) == 0 and not fused_operators(lambda: model(X))
    model.fc[1] = act
    assert said_to_run_fused(model) == 1 and fused_operators(lambda: model(X))
    assert_same(model, original)


def test_explain_names_a_gate_inside_a_changed_block():
    """The block around it would be one op again as it is now; until it is fused again, the gate in it runs."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.block, self.scale = nn.Conv2d(8, 8, 1), Block(), 1.0

        def forward(self, x):
            return self.block(self.conv(x)) * self.scale

    model = fuse(randomised(Around()))
    assert [row.name for row in explain(model) if row.fused] == ["block"]
    model.conv = nn.Identity()
    fuse(model)
    assert [row.name for row in explain(model) if row.fused] == ["(the model)"]
    model.scale = 2.0
    assert [row.name for row in explain(model) if row.fused] == ["block"]
    assert fused_operators(lambda: model(X))


def test_explain_says_what_runs_for_every_rank():
    layers = {
        1: (nn.Conv1d, nn.AdaptiveAvgPool1d),
        2: (nn.Conv2d, nn.AdaptiveAvgPool2d),
        3: (nn.Conv3d, nn.AdaptiveAvgPool3d),
    }

    class Any_(nn.Module):
        def __init__(self, rank):
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x):
            y = torch.sigmoid(self.b(F.relu(self.a(x.flatten(2).mean(-1)))))
            return x * y.view(*y.shape, *[1] * (x.dim() - 2))

    class Ranked(nn.Module):
        def __init__(self, rank):
            super().__init__()
            conv, pool = layers[rank]
            self.pool, self.fc = pool(1), nn.Sequential(conv(8, 4, 1), nn.ReLU(), conv(4, 8, 1), nn.Sigmoid())

        def forward(self, x):
            return x * self.fc(self.pool(x))

    for cls in (Any_, Ranked):
        for rank in (1, 2, 3):
            original = randomised(cls(rank))
            model = fuse(copy.deepcopy(original))
            x = random(2, 8, *(6, 5, 4)[:rank], dtype=torch.float64)
            assert said_to_run_fused(model) == 1, (cls.__name__, rank)
            assert fused_operators(lambda: model(x)), (cls.__name__, rank)  # noqa: B023
            assert_same(model, original, x)
