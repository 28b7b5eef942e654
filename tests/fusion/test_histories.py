"""Histories: whatever is done to a model and to its fused copy alike, both stay the same function."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fused_attn import explain, fuse, unfuse
from tests.fusion.changeable import KINDS, C, Kind, Own, Squeeze, Undo, put
from tests.fusion.counting import FusedOperators

import timm.layers  # isort: skip  (after the line above, which makes it importable)

EXAMPLES, STEPS = 25, 14
LONGER = 40

Both = Callable[[nn.Module], object]


# What two runs are compared by


_SIXTHS = (nn.Hardsigmoid, nn.Hardswish, nn.ReLU6, timm.layers.HardSigmoid)  # float32 sixths in torch's own backward


def tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """Of what is to be the same in float64. In other dtypes a BatchNorm of few values may give anything: there it is
    compared what the results are, not their digits."""
    if dtype == torch.double:
        return 1e-6 if any(isinstance(part, _SIXTHS) for part in module.modules()) else 1e-9
    return 1e-2 if dtype == torch.float and not any(part.training for part in module.modules()) else float("inf")


def difference(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> str | None:
    """What is not the same first; a gradient that is None is one of zeros."""
    if actual.keys() != expected.keys():
        return f"has other things: {sorted(actual.keys() ^ expected.keys())}"
    # What is zero by cancelling, as the gradient of a bias of keys, is as exact as the terms that the others show.
    floor = max(1.0, 1e-6 * max((largest(e) for e in expected.values() if isinstance(e, Tensor)), default=0.0))
    for name, e in expected.items():
        a = actual[name]
        if not isinstance(e, Tensor) and not isinstance(a, Tensor):
            if a != e:
                return f"{name}: {a}, not {e}"
            continue
        a, e = (torch.zeros_like(other) if t is None else t for t, other in ((a, e), (e, a)))
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"{name}: {a.dtype} {tuple(a.shape)}, not {e.dtype} {tuple(e.shape)}"
        if not e.is_floating_point():
            if not torch.equal(a, e):
                return f"{name}: another {e.dtype}"
            continue
        if tolerance == float("inf") or (tolerance > 1e-6 and name.startswith("gradient")):
            continue
        a, e = a.double(), e.double()
        scale = max(floor, largest(e))
        if not torch.allclose(a, e, rtol=0, atol=tolerance * scale, equal_nan=True):
            return f"{name}: off by {(a - e).abs().max().item():.3g} (of {scale:.3g})"
    return None


def largest(t: Tensor) -> float:
    """The largest finite magnitude in it."""
    return t.double().nan_to_num(0, 0, 0).abs().max().item() if t.is_floating_point() and t.numel() else 0.0


def tensors_in(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors_in(part)]


def weighted(y: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return sum(
        (t * (torch.rand(t.shape, generator=generator, dtype=torch.double) + 0.5).to(t.dtype)).sum()
        for t in tensors_in(y)
    )  # type: ignore[return-value]


class Told:
    """A hook that counts its calls, and may change what goes by."""

    def __init__(self, factor: float | None = None) -> None:
        self.calls, self.factor = 0, factor

    def __call__(self, module: nn.Module, given: Any, result: Any = None) -> Any:
        self.calls += 1
        if self.factor is None:
            return None
        if result is None:
            return tuple(self.factor * t for t in given)
        return self.factor * result if isinstance(result, Tensor) else None


def told(module: nn.Module) -> list[Told]:
    places = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = (hook for part in module.modules() for place in places for hook in part.__dict__[place].values())
    return [hook for hook in hooks if isinstance(hook, Told)]


@dataclass(frozen=True)
class Given:
    """What the modules get: a map of this shape, laid out so; whether it wants a gradient, and is a leaf."""

    shape: tuple[int, ...] = (2, C, 6, 5)
    layout: str = "contiguous"
    wants: bool = True
    leaf: bool = True

    def map(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double).to(dtype)
        if self.layout == "channels_last" and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        elif self.layout == "strided":
            x = torch.stack([x, x], -1)[..., 0]
        elif self.layout == "expanded":
            x = x[..., :1].expand(self.shape)
        return x.requires_grad_(self.wants)


def found(module: nn.Module, given: Given, dtype: torch.dtype) -> dict[str, Any]:
    """Result, gradients, buffers and all else that one run of a module gives."""
    torch.manual_seed(3)
    for p in module.parameters():
        p.grad = None
    leaf = given.map(dtype)
    x = leaf if given.leaf else leaf * 1
    y = module(x)
    if any(t.requires_grad for t in tensors_in(y)):
        weighted(y).backward()
    results = {f"result {i}": t.detach() for i, t in enumerate(tensors_in(y))}
    gradients = {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    return {
        **results,
        "x afterwards": x.detach(),
        "wants a gradient": [t.requires_grad for t in tensors_in(y)],
        "gradient of x": leaf.grad,
        **gradients,
        **{f"parameter {n}": p.detach() for n, p in module.named_parameters()},
        **{f"buffer {n}": b.detach() for n, b in module.named_buffers()},
        "random state": torch.get_rng_state(),
        "hooks": [hook.calls for hook in told(module)],
    }


def attempt(function: Callable[[], Any]) -> Any:
    """What it returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:
        return error


# What is done to both


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point() and t.dim():
                drawn = torch.randn(t.shape, generator=generator, dtype=torch.double) * 0.4
                t.copy_(drawn.abs() + 0.5 if name.endswith("var") else drawn)


def options(layer: nn.Module) -> dict[str, Own]:
    """What may be set differently in one of torch's layers."""
    if isinstance(layer, nn.Conv2d):
        k = layer.kernel_size[0]
        same = (k // 2, k // 2)
        wide = {"dilation": (2, 2), "padding": (k - 1, k - 1)}
        return {
            "dilation": several(layer, wide, {"dilation": (1, 1), "padding": same}),
            "stride": put("stride", (2, 2), (1, 1)),
            "padding_mode": several(
                layer,
                {"padding_mode": "circular", "_reversed_padding_repeated_twice": [k // 2] * 4},
                {"padding_mode": "zeros"},
            ),
            "groups": put("groups", 2, layer.groups),
            "out_channels": put("out_channels", layer.out_channels + 1),
        }
    if isinstance(layer, nn.Conv1d):
        return {"dilation": several(layer, {"dilation": (2,), "padding": (2,)}, {"dilation": (1,), "padding": (1,)})}
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return {
            "eps": put("eps", 0.1, 1e-5),
            "momentum": put("momentum", 0.5, None, 0.1),
            "track_running_stats": put("track_running_stats", False, True),
            "no running_mean": several(layer, {"running_mean": None, "running_var": None}),
            "no affine": several(layer, {"weight": None, "bias": None}),
        }
    tables: tuple[tuple[Any, dict[str, Own]], ...] = (
        (nn.LeakyReLU, {"negative_slope": put("negative_slope", 0.3, 0.01)}),
        (nn.Hardtanh, {"max_val": put("max_val", 2.0, 6.0), "min_val": put("min_val", -2.0, 0.0)}),  # ReLU6 is one
        (nn.GELU, {"approximate": put("approximate", "tanh", "none")}),
        (nn.Dropout, {"p": put("p", 0.5, 0.0)}),
        (nn.Softmax, {"dim": put("dim", 2, 1)}),
        (nn.Flatten, {"start_dim": put("start_dim", 2, 1)}),
        (nn.AdaptiveAvgPool2d, {"output_size": put("output_size", (6, 5), 1)}),
        ((nn.GroupNorm, nn.LayerNorm), {"eps": put("eps", 0.1, 1e-5)}),
        (nn.ReLU, {"inplace": put("inplace", True, False)}),
        (nn.Linear, {"out_features": put("out_features", 1, 2)}),
    )
    return next((changes for cls, changes in tables if isinstance(layer, cls)), {})


def several(layer: nn.Module, *values: dict[str, Any]) -> Own:
    """Sets several attributes to the next of these values."""
    name = next(iter(values[0]))

    def change(module: Any) -> Undo:
        before = {n: getattr(module, n) for n in values[0]}
        chosen = values[-1] if getattr(module, name) == values[0][name] and len(values) > 1 else values[0]
        for n, value in chosen.items():
            setattr(module, n, value)
        return lambda: [setattr(module, n, value) for n, value in before.items()]

    return change


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class CallsTwice(nn.Sigmoid):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(super().__call__(x))


class LowRank(nn.Module):
    """What is put around a layer in fine-tuning."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.factor = layer, nn.Parameter(torch.full((), 1.5, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor.to(x.dtype)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def replacements(layer: nn.Module) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """What may be put in a layer's place."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {
        "Sequential": lambda layer: nn.Sequential(layer),
        "LowRank": LowRank,
        "Identity": lambda layer: nn.Identity(),
        "copy": copy.deepcopy,
    }
    if isinstance(layer, (nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish, nn.ReLU6, nn.Sigmoid, nn.Identity)):
        choices = (
            nn.SiLU,
            nn.ReLU,
            nn.LeakyReLU,
            nn.Hardswish,
            nn.ReLU6,
            Squared,
            nn.Sigmoid,
            nn.Hardsigmoid,
            CallsTwice,
        )
        found |= {cls.__name__: lambda layer, cls=cls: cls() for cls in choices}  # type: ignore[misc]
        found["in place"] = lambda layer: nn.ReLU(inplace=True)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        found["GroupNorm"] = lambda layer: nn.GroupNorm(1, layer.num_features)  # type: ignore[arg-type]
        found["plain"] = lambda layer: type(layer)(layer.num_features, affine=False, track_running_stats=False)  # type: ignore[call-arg]
    return found


def replace(module: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> Undo:
    parent_path, _, name = path.rpartition(".")
    parent = module.get_submodule(parent_path)
    before = parent._modules[name]
    assert before is not None
    torch.manual_seed(11)
    dtype = next((p.dtype for p in before.parameters()), None)
    new = make(before).train(before.training)
    setattr(parent, name, new if dtype is None else new.to(dtype))
    return lambda: setattr(parent, name, before)


def of_parameters(layer: Any) -> dict[str, Own]:
    """What may be done to what a layer owns."""
    found: dict[str, Own] = {}
    for name, p in layer._parameters.items():
        if p is None:
            continue

        def other(layer: Any, name: str = name) -> Undo:
            before = getattr(layer, name)
            generator = torch.Generator().manual_seed(13)
            drawn = torch.randn(before.shape, generator=generator, dtype=torch.double).to(before.dtype)
            setattr(layer, name, nn.Parameter(drawn))
            return lambda: setattr(layer, name, before)

        def taken(layer: Any, name: str = name) -> Undo:
            before = getattr(layer, name)
            setattr(layer, name, None)
            return lambda: setattr(layer, name, before)

        def plain(layer: Any, name: str = name) -> Undo:
            before = getattr(layer, name)
            delattr(layer, name)
            setattr(layer, name, before.detach() * 0.5)

            def undo() -> None:
                delattr(layer, name)
                layer.register_parameter(name, before)

            return undo

        def frozen(layer: Any, name: str = name) -> Undo:
            p = getattr(layer, name)
            p.requires_grad_(not p.requires_grad)
            return lambda: p.requires_grad_(not p.requires_grad)

        def written(layer: Any, name: str = name) -> Undo:
            with torch.no_grad():
                getattr(layer, name).mul_(-1)
            return lambda: None

        def parametrised(layer: Any, name: str = name) -> Undo:
            parametrize.register_parametrization(layer, name, Doubled())
            return lambda: parametrize.remove_parametrizations(layer, name)

        def pruned(layer: Any, name: str = name) -> Undo:
            prune.l1_unstructured(layer, name, amount=0.3)
            return lambda: prune.remove(layer, name)

        found[f"another {name}"] = other
        found[f"no {name}"] = taken
        found[f"{name} as a tensor"] = plain
        found[f"{name} frozen or not"] = frozen
        found[f"{name} written to"] = written
        found[f"{name} parametrised"] = parametrised
        found[f"{name} pruned"] = pruned
    if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is None:

        def biased(layer: Any) -> Undo:
            layer.bias = nn.Parameter(torch.full_like(layer.weight.detach().flatten(1)[:, 0], 0.3))
            return lambda: setattr(layer, "bias", None)

        found["a bias"] = biased
    if isinstance(layer, (nn.Conv2d, nn.Linear)):

        def normalised(layer: Any) -> Undo:
            nn.utils.parametrizations.weight_norm(layer)
            return lambda: parametrize.remove_parametrizations(layer, "weight")

        found["weight_norm"] = normalised
    return found


def hooked(register: str, *args: Any) -> Own:
    return lambda layer: getattr(layer, register)(Told(*args)).remove


HOOKS = {
    "forward": hooked("register_forward_hook"),
    "forward, times 2": hooked("register_forward_hook", 2.0),
    "pre": hooked("register_forward_pre_hook"),
    "pre, times 2": hooked("register_forward_pre_hook", 2.0),
    "backward": hooked("register_full_backward_hook"),
}


def by_module(choices: Callable[[nn.Module], dict[str, Any]], module: nn.Module) -> list[tuple[str, str]]:
    return [(path, label) for path, part in module.named_modules() for label in choices(part)]


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": pickled,
    "torch.save": saved,
}

#: Conversions of a whole model by torch and timm.
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "to timm's SyncBatchNorm": timm.layers.convert_sync_batchnorm,
    "BatchNorms frozen": timm.layers.freeze_batch_norm_2d,
    "BatchNorms thawed": timm.layers.unfreeze_batch_norm_2d,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "all frozen": lambda m: m.requires_grad_(False),
    "none frozen": lambda m: m.requires_grad_(True),
    "re-initialised": lambda m: m.apply(lambda part: randomise(part)),
}


# Other ways of running a module


def second_order(module: nn.Module, x: Tensor) -> list[Any]:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(weighted(module(x)) ** 2 * 0.01, x, create_graph=True)
    penalty = (g.flatten(1).norm(dim=1) - 1).square().mean()
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [g.detach(), *torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)]


def functional(module: nn.Module, x: Tensor) -> list[Any]:
    parameters = {n: p.detach() * 0.7 for n, p in module.named_parameters()}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        return weighted(torch.func.functional_call(module, parameters, (x.detach(),)))

    called = torch.func.functional_call(module, parameters, (x.detach(),))
    return [called, *torch.func.grad(run)(parameters).values()]


def forward_mode(module: nn.Module, x: Tensor) -> Any:
    return torch.func.jvp(module, (x.detach(),), (torch.ones_like(x),))


def with_modes(*modes: Callable[[], Any]) -> Callable[[nn.Module, Tensor], Any]:
    def run(module: nn.Module, x: Tensor) -> Any:
        for mode in modes:
            with mode():
                y = module(x)
        return y

    return run


def autocast(module: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)


def kept_elsewhere(module: nn.Module, x: Tensor) -> list[Any]:
    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = module(x)
    return [y, *torch.autograd.grad(weighted(y), x)]


def written_afterwards(module: nn.Module, x: Tensor) -> list[Any]:
    x = x.detach().requires_grad_()
    y = module(x * 1)
    y += 1
    return [y, *torch.autograd.grad(weighted(y), x)]


def by_keyword(module: nn.Module, x: Tensor) -> Any:
    return module(**{list(inspect.signature(module.forward).parameters)[0]: x})


def checkpointed(module: nn.Module, x: Tensor) -> list[Any]:
    x = x.detach().requires_grad_()
    with set_checkpoint_early_stop(False):  # else what is run again depends on what is saved, and so do BatchNorms
        y = checkpoint(module, x, use_reentrant=False)
    return [y, *torch.autograd.grad(weighted(y), x)]


def traced(module: nn.Module, x: Tensor) -> Any:
    return torch.jit.trace(module, (x.detach(),), check_trace=False)(x)


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "second order": second_order,
    "functional_call": functional,
    "jvp": forward_mode,
    "vmap": lambda m, x: torch.func.vmap(m)(torch.stack([x.detach(), -x.detach()])),
    "no_grad": with_modes(torch.no_grad),
    "inference_mode": with_modes(torch.inference_mode, torch.no_grad),
    "autocast": autocast,
    "saved_tensors_hooks": kept_elsewhere,
    "written afterwards": written_afterwards,
    "by keyword": by_keyword,
    "checkpoint": checkpointed,
    "torch.fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "jit.trace": traced,
    "twice": lambda m, x: m(m(x) * 0.5),
}

SHAPES = ((2, C, 6, 5), (3, C, 7, 9), (1, C, 1, 1), (2, C, 1, 3), (0, C, 4, 4), (2, C, 9), (C, 6, 5))


# The histories


@dataclass
class Pair:
    """A model and its fused copy. undo: of what was done last."""

    kind: Kind
    original: nn.Module
    fused: nn.Module
    dtype: torch.dtype = torch.double
    undo: Undo | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self.original, self.fused))


class Network(nn.Module):
    """A block behind a convolution, which others see by its gradients."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv, self.block = nn.Conv2d(C, C, 1), block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.conv(x)) + x


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": lambda block: block,
    "in a Sequential": lambda block: nn.Sequential(block),
    "in a network": Network,
}


class Histories(RuleBasedStateMachine):
    """All rules do to both what they do; after each, what both give is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.given = Given()
        self.pairs: list[Pair] = []
        self.patches: list[pytest.MonkeyPatch] = []

    @property
    def pair(self) -> Pair:
        return self.pairs[-1]

    @property
    def block(self) -> Callable[[nn.Module], nn.Module]:
        """Where the block is in a model."""
        return {"alone": lambda m: m, "in a Sequential": lambda m: m[0], "in a network": lambda m: m.block}[self.around]

    def do(self, change: Own) -> None:
        """To both; what cannot be done to the original is not done."""
        before = attempt(lambda: change(self.pair.original))
        if isinstance(before, Exception):
            assert isinstance(attempt(lambda: change(self.pair.fused)), Exception), before
            self.pair.undo = None
            return
        after = change(self.pair.fused)

        def undo() -> None:
            before()
            after()

        self.pair.undo = undo

    @initialize(
        name=st.sampled_from(sorted(KINDS)),
        around=st.sampled_from(sorted(AROUND)),
        tails=st.booleans(),
        train=st.booleans(),
    )
    def build(self, name: str, around: str, tails: bool, train: bool) -> None:
        self.name, self.around = name, around
        self.make(tails or KINDS[name].tailed, train)

    def make(self, tails: bool, train: bool) -> None:
        torch.manual_seed(2)
        kind = KINDS[self.name]
        original = AROUND[self.around](kind.make()).double().train(train)
        randomise(original)
        self.pairs = [Pair(kind, original, fuse(copy.deepcopy(original), tails=tails))]

    # fuse, explain and unfuse

    @rule(tails=st.booleans(), save=st.sampled_from(["all", "least"]))
    def fuse(self, tails: bool, save: str = "all") -> None:
        state = torch.get_rng_state()
        assert fuse(self.pair.fused, tails=tails, save=save if tails else "all") is self.pair.fused
        assert torch.equal(torch.get_rng_state(), state), "the random state moved"

    @rule(tails=st.booleans())
    def explain(self, tails: bool) -> None:
        state = torch.get_rng_state()
        str(explain(self.pair.fused, tails=tails))
        assert torch.equal(torch.get_rng_state(), state), "the random state moved"

    @rule()
    def unfuse(self) -> None:
        unfuse(self.pair.fused)
        for (name, a), b in zip(self.pair.fused.named_modules(), self.pair.original.modules(), strict=True):
            assert parametrize.is_parametrized(a) or type(a) is type(b), name
            extra = {key for key in a.__dict__.keys() ^ b.__dict__.keys() if "fused" in key}
            assert not extra, (name, extra)

    # One thing changed

    @rule(data=st.data())
    def change_what_the_block_reads(self, data: st.DataObject) -> None:
        count = len(self.pair.kind.own) + len(self.pair.kind.shared)
        if count:
            self.change(data.draw(st.integers(0, count - 1)))

    def change(self, number: int) -> None:
        kind = self.pair.kind
        if number < len(kind.own):
            self.do(lambda m: kind.own[number](self.block(m)))
        else:
            patch = pytest.MonkeyPatch()
            self.patches.append(patch)
            kind.shared[number - len(kind.own)](patch)
            self.pair.undo = patch.undo

    def choose(self, data: st.DataObject, choices: Callable[[nn.Module], dict[str, Any]]) -> None:
        found = by_module(choices, self.pair.original)
        if found:
            self.set(*data.draw(st.sampled_from(found)), choices)

    def set(self, path: str, label: str, choices: Callable[[nn.Module], dict[str, Any]]) -> None:
        self.do(lambda m: choices(m.get_submodule(path))[label](m.get_submodule(path)))

    @rule(data=st.data())
    def set_an_option(self, data: st.DataObject) -> None:
        self.choose(data, options)

    @rule(data=st.data())
    def change_a_parameter(self, data: st.DataObject) -> None:
        self.choose(data, of_parameters)

    @rule(data=st.data())
    def hook(self, data: st.DataObject) -> None:
        self.choose(data, lambda layer: HOOKS)

    @rule(data=st.data())
    def replace_a_layer(self, data: st.DataObject) -> None:
        found = [choice for choice in by_module(replacements, self.pair.original) if choice[0]]
        if found:
            path, label = data.draw(st.sampled_from(found))
            self.do(lambda m: replace(m, path, replacements(m.get_submodule(path))[label]))

    @rule()
    def undo(self) -> None:
        if self.pair.undo is not None:
            attempt(self.pair.undo)
            self.pair.undo = None

    @rule(what=st.sampled_from(sorted(CONVERSIONS)))
    def convert(self, what: str) -> None:
        self.both(CONVERSIONS[what])

    def both(self, function: Callable[[nn.Module], nn.Module], keep: bool = False) -> None:
        """A pair made of this one."""
        original = attempt(lambda: function(self.pair.original))
        if isinstance(original, Exception):  # perhaps with half of it done
            attempt(lambda: function(self.pair.fused))
            self.resynchronise()
            return
        new = Pair(self.pair.kind, original, function(self.pair.fused), self.pair.dtype)
        self.pairs = [*self.pairs[-1:], new] if keep else [*self.pairs[:-1], new]

    @rule(dtype=st.sampled_from([torch.double, torch.float, torch.bfloat16]))
    def to(self, dtype: torch.dtype) -> None:
        self.both(lambda m: m.to(dtype))
        self.pair.dtype = dtype

    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.both(lambda m: m.train(train))

    @rule(train=st.booleans(), data=st.data())
    def mode_of_one(self, train: bool, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from([path for path, _ in self.pair.original.named_modules()]))
        for module in self.pair:
            module.get_submodule(path).train(train)

    # Copies

    @rule(how=st.sampled_from(sorted(COPIES)))
    def copy(self, how: str) -> None:
        self.both(COPIES[how], keep=True)

    @rule()
    def the_other_of_two_copies(self) -> None:
        self.pairs.reverse()

    @rule(assign=st.booleans())
    def load(self, assign: bool) -> None:
        original, fused = self.pair
        state = original.state_dict()
        assert list(state) == list(fused.state_dict())
        randomise(fused)
        for module in self.pair:
            module.load_state_dict(copy.deepcopy(OrderedDict(state)), assign=assign)
        self.pair.undo = None

    # Runs

    @rule(
        shape=st.sampled_from(SHAPES),
        layout=st.sampled_from(["contiguous", "channels_last", "strided", "expanded"]),
        wants=st.booleans(),
        leaf=st.booleans(),
    )
    def give(self, shape: tuple[int, ...], layout: str, wants: bool, leaf: bool) -> None:
        self.given = Given(shape, layout, wants, leaf)

    @rule(momentum=st.sampled_from([0.0, 0.9]), to_none=st.booleans())
    def train_a_step(self, momentum: float, to_none: bool) -> None:
        self.both(lambda m: self.trained(m, momentum, to_none))

    def trained(self, module: nn.Module, momentum: float, to_none: bool) -> nn.Module:
        wanted = [p for p in module.parameters() if p.requires_grad]
        if wanted:
            optimiser = torch.optim.SGD(wanted, lr=0.01, momentum=momentum)
            for seed in (21, 22):
                optimiser.zero_grad(set_to_none=to_none)
                torch.manual_seed(seed)
                y = module(self.given.map(self.pair.dtype, seed))
                (weighted(y) / max(1, y.numel())).backward()
                optimiser.step()
        return module

    @rule(how=st.sampled_from(sorted(CALLS)))
    def call(self, how: str) -> None:
        results = []
        for module in self.pair:
            torch.manual_seed(9)
            results.append(attempt(lambda: CALLS[how](module, self.given.map(self.pair.dtype))))  # noqa: B023
        expected, actual = results
        if isinstance(expected, Exception):
            self.resynchronise()
            return
        if isinstance(actual, Exception):
            raise AssertionError(f"{how}: raises") from actual
        a, e = (dict(enumerate(t.detach() for t in tensors_in(found))) for found in (actual, expected))
        allowed = tolerance(self.pair.original, self.pair.dtype)
        if how == "autocast" and self.pair.dtype != torch.double:
            allowed = float("inf")
        different = difference({str(k): v for k, v in a.items()}, {str(k): v for k, v in e.items()}, allowed)
        assert different is None, f"{how}: {different}"
        if how == "autocast":
            self.resynchronise()

    @rule()
    def run_while_another_is_fused(self) -> None:
        errors: list[Exception] = []
        module = KINDS[self.name].make()

        def work() -> None:
            for function in (fuse, explain, copy.deepcopy, unfuse):
                error = attempt(lambda: function(module))  # type: ignore[operator]  # noqa: B023
                errors.extend([error] if isinstance(error, Exception) else [])

        thread = threading.Thread(target=work)
        thread.start()
        self.same()
        thread.join()
        assert not errors, errors

    # What holds

    @invariant()
    def same(self) -> None:
        for pair in self.pairs:
            self.compare(pair)

    def compare(self, pair: Pair) -> None:
        original, fused = pair
        names = [[name for name, _ in module.named_modules()] for module in pair]
        assert names[0] == names[1]
        expected = attempt(lambda: found(original, self.given, pair.dtype))
        actual = attempt(lambda: found(fused, self.given, pair.dtype))
        if isinstance(expected, Exception):
            empty = 0 in self.given.shape  # of which a view may be ambiguous, and an op needs none
            assert empty or isinstance(actual, Exception), f"the original raises {expected!r}, the fused does not"
            self.rescue(pair)
            return
        if isinstance(actual, Exception):
            raise AssertionError("raises, and the original does not") from actual
        different = difference(actual, expected, tolerance(original, pair.dtype))
        assert different is None, different
        rows = explain(fused)
        with torch.no_grad(), FusedOperators() as operators:
            torch.manual_seed(4)
            fused(self.given.map(pair.dtype))
        if not any(row.fused for row in rows):
            assert operators.count == 0, f"runs {operators.count} fused operators, and none is said to"
        elif len(self.given.shape) == 4 and self.given.shape[0] and KINDS[self.name].operators:
            assert operators.count > 0, f"runs no fused operator\n{rows}"
        with torch.no_grad():
            torch.manual_seed(4)
            original(self.given.map(pair.dtype))
        if pair.dtype != torch.double:
            self.resynchronise(pair)

    def rescue(self, pair: Pair) -> None:
        """From a change that the original does not survive."""
        if self.given != Given():
            self.given = Given()
        elif pair.undo is not None:
            attempt(pair.undo)
            pair.undo = None
        else:
            self.make(False, pair.original.training)
            return
        self.resynchronise(pair)

    def resynchronise(self, pair: Pair | None = None) -> None:
        """Rounding apart, or half a run that raised."""
        pair = pair or self.pair
        with torch.no_grad():
            for a, b in zip(pair.fused.parameters(), pair.original.parameters(), strict=True):
                a.copy_(b)
            for a, b in zip(pair.fused.buffers(), pair.original.buffers(), strict=True):
                a.copy_(b)
        for hook in (*told(pair.fused), *told(pair.original)):
            hook.calls = 0

    def teardown(self) -> None:
        for patch in reversed(self.patches):
            patch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(LONGER * EXAMPLES, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore")
def test_histories(examples: int) -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=examples, stateful_step_count=STEPS))


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_what_it_is_here_for(name: str) -> None:
    """As it is made, as many of its blocks run fused as are said to: else its histories would show nothing."""
    kind = KINDS[name]
    module = fuse(kind.make().double(), tails=kind.tailed)
    assert sum(row.fused for row in explain(module)) == kind.blocks, explain(module)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_each_thing_changed_by_itself(name: str) -> None:
    """What its code reads, set differently and back; and so each option of its layers."""
    kind = KINDS[name]
    layers = by_module(options, kind.make())
    for number in range(len(kind.own) + len(kind.shared) + len(layers)):
        history = Histories()
        try:
            history.build(name=name, around="alone", tails=False, train=bool(number % 2))
            for _ in range(2):
                if number < len(kind.own) + len(kind.shared):
                    history.change(number)
                else:
                    path, label = layers[number - len(kind.own) - len(kind.shared)]
                    history.set(path, label, options)
                history.same()
            history.undo()
            history.same()
            history.fuse(tails=False)
            history.same()
        except Exception as error:
            raise AssertionError(f"change {number}") from error
        finally:
            history.teardown()


def is_squeeze(kind: Kind) -> bool:
    return isinstance(kind.make, type) and issubclass(kind.make, Squeeze)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("how", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_each_way_to_run_each_kind(how: str, train: bool) -> None:
    """But for those that are `Squeeze` with an option somewhere, which compute all the same."""
    for name in (n for n, k in KINDS.items() if not (is_squeeze(k) and (k.own or k.shared))):
        history = Histories()
        history.build(name=name, around="alone", tails=False, train=train)
        try:
            history.call(how=how)
            history.same()
            if KINDS[name].tailed:
                history.fuse(tails=True, save="least")
                history.call(how=how)
                history.same()
        except Exception as error:
            raise AssertionError(name) from error


def test_tensors_in_a_list_that_is_read() -> None:
    """They are told from each other without being compared, which for tensors is done element by element."""
    for _ in range(2):
        module = fuse(KINDS["TensorsBeside"].make())
        assert explain(module)[0].fused
    module.notes[0] = torch.zeros(2, C)
    given = Given(wants=False).map(torch.float)
    assert torch.equal(module(given), unfuse(copy.deepcopy(module))(given))


def test_a_gate_that_runs_alone_is_said_to() -> None:
    """Of a residual block whose tail was given up after `fuse`."""
    block = fuse(KINDS["timm.InvertedResidual"].make(), tails=True)
    assert [row.fused for row in explain(block)] == [True]
    parametrize.register_parametrization(block.conv_pw, "weight", Doubled())
    with torch.no_grad(), FusedOperators() as operators:
        block(Given().map(torch.float))
    assert operators.count == 1
    assert [(row.name, row.fused) for row in explain(block)] == [("(the model)", False), ("se", True)]


@pytest.mark.parametrize("name", ["SplitAttention", "SKConv", "BAM"])
def test_a_changed_block_of_our_own_runs_as_it_was_written(name: str) -> None:
    """Its own functions, not the fused ones, so that what is hooked is called."""
    block = fuse(KINDS[f"reference.{name}"].make().eval())
    norms = [part for part in block.modules() if isinstance(part, nn.BatchNorm2d)]
    hook = Told(2.0)
    norms[0].register_forward_hook(hook)
    x = Given(wants=False).map(torch.float)
    y = block(x)
    assert hook.calls == 1
    torch.testing.assert_close(y, unfuse(copy.deepcopy(block))(x))


def test_a_tail_is_planned_again_with_the_gate_as_it_is_now() -> None:
    """Not with what its gate was when it was fused first: it is none that the op has since."""
    block = KINDS["timm.BasicBlock, drop_path"].make().double().eval()
    fused = fuse(copy.deepcopy(block), tails=True)
    for module in (block, fused):
        module.se.conv.dilation, module.se.conv.padding = (2,), (2,)
    given = Given()
    expected = found(block, given, torch.double)
    for tails in (False, True):
        assert difference(found(fuse(fused, tails=tails), given, torch.double), expected, 1e-9) is None


def test_a_weight_taken_away_is_an_error_still() -> None:
    module = fuse(KINDS["EfficientChannelAttention"].make())
    module.conv.weight = None
    with pytest.raises(TypeError):
        module(Given().map(torch.float))


def test_a_batch_norm_without_affine_is_folded() -> None:
    """One whose weight and bias were taken away after `fuse`."""
    module = KINDS["timm.CbamModule"].make().double().eval()
    fused = fuse(copy.deepcopy(module))
    for m in (module, fused):
        m.spatial.conv.bn.weight = m.spatial.conv.bn.bias = None
    given = Given()
    assert difference(found(fused, given, torch.double), found(module, given, torch.double), 1e-9) is None


def test_a_layer_put_into_a_block_of_our_own_is_seen_when_it_is_fused_again() -> None:
    block = KINDS["reference.SKConv"].make().double().eval()
    fused = fuse(copy.deepcopy(block))
    for module in (block, fused):
        module.fc1[0] = LowRank(module.fc1[0])
    given = Given()
    assert difference(found(fuse(fused), given, torch.double), found(block, given, torch.double), 1e-9) is None


@pytest.mark.parametrize(
    "name", ["ChannelSelfAttention", "PositionAttention", "SelfAttention2d", "CrissCrossAttention"]
)
def test_a_parameter_of_the_block_itself_is_parametrised(name: str) -> None:
    """After `fuse`: it is then a property of a class that is derived from the fused one."""
    block = KINDS[f"reference.{name}"].make().double()
    randomise(block)
    fused = fuse(copy.deepcopy(block))
    for module in (block, fused):
        parametrize.register_parametrization(module, "gamma", Doubled())
    for change in (lambda m: m, fuse, unfuse):
        assert (
            difference(found(change(fused), Given(), torch.double), found(block, Given(), torch.double), 1e-9) is None
        )


def test_what_is_parametrised_is_not_computed_to_explain() -> None:
    block = fuse(KINDS["timm.SelectiveKernel"].make())
    conv = block.get_submodule("paths.0.conv")
    parametrize.register_parametrization(conv, "weight", Doubled())
    hook = Told()
    conv.parametrizations.weight.register_forward_hook(hook)  # type: ignore[union-attr]
    assert not explain(block)[0].fused and hook.calls == 0
