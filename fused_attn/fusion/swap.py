"""Changing what a block runs, not what it owns: the instance gets a subclass of its class with a fused forward."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..codes import FUNCTIONS
from ..reference.block_attention import fold_batch_norm, run_normalised, uses_batch_statistics
from .registry import (
    FUSED_FORMS,
    CbamGate,
    ChannelGate,
    OwnLayers,
    Recipe,
    SpatialGate,
    SplitGate,
    recognise_with_tail,
)

#: The only thing a fused block has that the original has not; `restore` takes it away.
PLAN = "_fused_attn_plan"


class Plan(NamedTuple):
    """How one fused block is run, and what must be unchanged below it for that to be the same function."""

    recipe: Recipe
    parameters: tuple[tuple[str, str] | None, ...]  # (submodule, name) of weight1, bias1, weight2, bias2
    # parent (None: the block itself, which must not be in its own plan: a cycle would keep its memory), name, layer,
    # its class, whether it is bypassed
    layers: tuple[tuple[nn.Module | None, str, nn.Module, type, bool], ...]
    sizes: tuple[tuple[nn.Module | None, int], ...]  # the number of children of each, so that an added one shows
    options: tuple[tuple[nn.Module | None, str, Any], ...]  # plain attributes of the block and parts of its library


def bypassed_hooks(block: nn.Module, recipe: Recipe) -> str | None:
    """The first bypassed layer that carries a hook, or a forward of its own, which a fused block would skip."""
    for name, layer in block.named_modules():
        if layer is not block and _is_bypassed(name, recipe) and is_hooked(layer):
            return name
    return None


def _is_bypassed(name: str, recipe: Recipe) -> bool:
    return not isinstance(recipe, (SplitGate, OwnLayers)) or name in recipe.bypassed


def is_hooked(layer: Any) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def split_path(path: str | None) -> tuple[str, str] | None:
    if path is None:
        return None
    layer, _, name = path.rpartition(".")
    return layer, name


def plan(block: nn.Module, recipe: Recipe) -> Plan:
    modules: dict[str, nn.Module | None] = dict(block.named_modules(remove_duplicate=False))
    modules[""] = None
    layers = tuple(
        (modules[name.rpartition(".")[0]], name.rpartition(".")[2], layer, type(layer), _is_bypassed(name, recipe))
        for name, layer in modules.items()
        if layer is not None
    )
    sizes = tuple((module, len((block if module is None else module)._modules)) for module in modules.values())
    return Plan(recipe, parameter_paths(recipe), layers, sizes, _options(block))


def parameter_paths(recipe: Recipe) -> tuple[tuple[str, str] | None, ...]:
    """Of the excitation that is part of the block's function, as in `Plan`."""
    gate = recipe.channel if isinstance(recipe, CbamGate) else recipe
    if not isinstance(gate, ChannelGate):
        return ()
    return tuple(split_path(path) for path in (gate.weight1, gate.bias1, gate.weight2, gate.bias2))


def _options(block: nn.Module) -> tuple[tuple[nn.Module | None, str, Any], ...]:
    return tuple(
        (None if module is block else module, key, value)
        for module in block.modules()
        if module is block or not type(module).__module__.startswith("torch.")
        for key, value in module.__dict__.items()
        if key != "training" and not key.startswith("_") and _is_option(value)
    )


def _is_option(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, tuple)) or inspect.isroutine(value)


def intact(block: nn.Module, plan: Plan) -> bool:
    """Whether block and layers are those seen at `fuse`: none put in (LoRA), added, hooked or set differently since."""
    for parent, name, layer, kind, bypassed in plan.layers:
        owner = block if parent is None else parent
        if owner._modules.get(name) is not layer or type(layer) is not kind or (bypassed and is_hooked(layer)):
            return False
    for parent, size in plan.sizes:
        if len((block if parent is None else parent)._modules) != size:
            return False
    for part, key, value in plan.options:  # noqa: SIM110  (a loop costs less than a generator; it runs at every call)
        if (block if part is None else part).__dict__.get(key) != value:
            return False
    return True


def parameter_at(block: nn.Module, path: tuple[str, str] | None) -> Tensor | None:
    if path is None:
        return None
    return getattr(layer_at(block, path[0]), path[1])


def layer_at(block: nn.Module, path: str) -> Any:
    owner = block
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    return owner


def run(block: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    recipe = plan.recipe
    if isinstance(recipe, OwnLayers):
        return recipe.forward(block, x)
    residual = x if recipe.adds_input else None
    if isinstance(recipe, SplitGate):
        pooled = functional.squeeze(x, recipe.pool, ties=recipe.ties)
        descriptor = pooled if isinstance(pooled, Tensor) else 0.5 * pooled[0] + 0.5 * pooled[1]
        return functional.scale(x, recipe.excite(block, descriptor), residual=residual)
    return run_gate(block, recipe, plan.parameters, x, residual=residual)


def run_gate(
    block: nn.Module,
    recipe: ChannelGate | SpatialGate | CbamGate,
    parameters: tuple[tuple[str, str] | None, ...],
    x: Tensor,
    **around: Any,
) -> Tensor:
    """The one function that the block is. parameters: as in `Plan`. around: its arguments affine, pre_activation,
    residual and post_activation."""
    if isinstance(recipe, SpatialGate):
        return _run_spatial(block, recipe, x, around)
    values = tuple(parameter_at(block, path) for path in parameters)
    if isinstance(recipe, CbamGate):
        return _run_cbam(block, recipe, values, x, around)
    return _run_channel(recipe, values, x, around)


#: What stands around a gate: `run_gate`.
Around = dict[str, Any]
_BEFORE = ("affine", "pre_activation")


def _run_channel(recipe: ChannelGate, parameters: tuple[Tensor | None, ...], x: Tensor, around: Around) -> Tensor:
    return functional.channel_gate(
        x,
        *parameters,
        layer=recipe.layer,
        pool=recipe.pool,
        ties=recipe.ties,
        activation=recipe.activation,
        gate=recipe.gate,
        **around,
    )


def _spatial_convolution(block: nn.Module, recipe: SpatialGate) -> tuple[Tensor, Tensor | None, Any] | None:
    """Weight and bias of the convolution, and its BatchNorm where that takes its statistics from the batch; one that
    does not is folded in. None where the op does not know such a BatchNorm."""
    conv, *norms = (layer_at(block, path) for path in recipe.layers)
    weight, bias, live = conv.weight, conv.bias, None
    for norm in norms:
        if not uses_batch_statistics(norm):
            weight, bias = fold_batch_norm(weight, bias, norm)
        elif norm is norms[-1] and norm.weight is not None:
            live = norm
        else:
            return None
    return (torch.cat([weight, weight], 1) * 0.5 if recipe.merged else weight), bias, live


def _run_spatial(block: nn.Module, recipe: SpatialGate, x: Tensor, around: Around) -> Tensor:
    convolution = _spatial_convolution(block, recipe)
    if convolution is not None:
        weight, bias, norm = convolution
        run = functools.partial(functional.spatial_gate, x, weight, bias, **around)
        return run_normalised(norm, x, functools.partial(run, order=recipe.order, ties=recipe.ties, gate=recipe.gate))
    before = {key: around[key] for key in _BEFORE if key in around}
    z = functional.channel_pool(x, order=recipe.order, ties=recipe.ties, **before)
    if recipe.merged:
        z = 0.5 * z[:, :1] + 0.5 * z[:, 1:]
    for path in recipe.layers:
        z = layer_at(block, path)(z)
    return functional.scale(x, FUNCTIONS[recipe.gate](z), **around)


def _run_cbam(
    block: nn.Module, recipe: CbamGate, parameters: tuple[Tensor | None, ...], x: Tensor, around: Around
) -> Tensor:
    channel, spatial = recipe.channel, recipe.spatial
    convolution = _spatial_convolution(block, spatial)
    if convolution is None:
        before = {key: around.pop(key) for key in _BEFORE if key in around}
        return _run_spatial(block, spatial, _run_channel(channel, parameters, x, before), around)
    *weights, norm = convolution
    run = functools.partial(
        functional.cbam,
        x,
        *parameters,
        *weights,
        layer=channel.layer,
        pool=channel.pool,
        channel_ties=channel.ties,
        activation=channel.activation,
        channel_gate=channel.gate,
        order=spatial.order,
        spatial_ties=spatial.ties,
        spatial_gate=spatial.gate,
        **around,
    )
    return run_normalised(norm, x, run)


_as_original = False


@contextlib.contextmanager
def as_original() -> Iterator[None]:
    """Fused blocks run what they ran before, which is what is looked at when one of them is part of another."""
    global _as_original
    before, _as_original = _as_original, True
    try:
        yield
    finally:
        _as_original = before


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The one fused subclass of a host's class."""
    if host not in _CLASSES:
        _CLASSES[host] = _make_fused_class(host)
    return _CLASSES[host]


def _make_fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's class whose instances run fused. It copies and pickles as the host's class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        plan: Plan = self.__dict__[PLAN]
        if _as_original or len(args) != 1 or kwargs:  # by keyword: hosts name it differently
            return host.forward(self, *args, **kwargs)
        (x,) = args
        # What is no tensor is torch.fx's proxy, or an error that is the host's to raise.
        expected = isinstance(x, Tensor) and plan.recipe.rank in (None, x.dim())
        if not expected or not intact(self, plan):
            return host.forward(self, x)
        return run(self, plan, x)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        state = {key: value for key, value in self.__dict__.items() if key != PLAN}
        return _empty, (host,), state

    def __setstate__(self: nn.Module, state: dict) -> None:
        self.__class__ = host
        setter = getattr(self, "__setstate__", None)
        setter(state) if setter else self.__dict__.update(state)
        recipe = recognise_with_tail(self)  # it was fused: as what it is, or else for its tail
        if recipe is not None and not isinstance(recipe, str):
            swap(self, recipe)

    attributes = {
        **_fused_functions(host),
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "__module__": host.__module__,
        "__doc__": host.__doc__,
        "_fused_attn_host": host,
    }
    return type(f"Fused{host.__name__}", (host,), attributes)


def _fused_functions(host: type[nn.Module]) -> dict[str, Any]:
    """What `fused_attn.nn` puts into a module of `fused_attn.reference` in place of the plain functions there."""
    ours = next((FUSED_FORMS[base] for base in host.__mro__ if base in FUSED_FORMS), nn.Module)
    return {name: value for name, value in vars(ours).items() if isinstance(value, staticmethod)}


def _empty(host: type[nn.Module]) -> nn.Module:
    """An instance of the fused class with nothing in it yet: what copy and pickle fill."""
    cls = fused_class(host)
    return cls.__new__(cls)


def host_class(block: nn.Module) -> type[nn.Module] | None:
    """The class that a fused block had; None for others. Seen through what fully_shard makes of a class."""
    return getattr(type(block), "_fused_attn_host", None)


def swap(block: nn.Module, recipe: Recipe) -> None:
    block.__dict__[PLAN] = plan(block, recipe)
    block.__class__ = fused_class(type(block))


def refuse_sharded(block: nn.Module) -> None:
    """Raise RuntimeError where a block was sharded after it was fused: its class is no longer ours to change."""
    host = host_class(block)
    if host is not None and type(block) is not fused_class(host):
        raise RuntimeError(f"{type(block).__name__} was sharded after it was fused; unfuse before fully_shard")


def restore(block: nn.Module) -> None:
    """Undo `swap`, where `refuse_sharded` lets it."""
    host = host_class(block)
    if host is not None:
        block.__class__ = host
        del block.__dict__[PLAN]
