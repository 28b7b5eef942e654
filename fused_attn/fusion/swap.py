"""Changing what a block runs, not what it owns: the instance gets a subclass of its class with a fused forward."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import functional
from .registry import ChannelGate, Recipe, SplitGate, recognise

#: The only thing a fused block has that the original has not; `restore` takes it away.
PLAN = "_fused_attn_plan"


class Plan(NamedTuple):
    """How one fused block is run, and what must be unchanged below it for that to be the same function."""

    recipe: Recipe
    parameters: tuple[tuple[str, str] | None, ...]  # (submodule, name) of weight1, bias1, weight2, bias2
    layers: tuple[tuple[str, type], ...]


def bypassed_hooks(block: nn.Module) -> str | None:
    """The first layer below the block that carries a hook, or a forward of its own, which a fused block would skip."""
    for name, layer in block.named_modules():
        if layer is not block and _is_hooked(layer):
            return name
    return None


def _is_hooked(layer: Any) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def _split(path: str | None) -> tuple[str, str] | None:
    if path is None:
        return None
    layer, _, name = path.rpartition(".")
    return layer, name


def plan(block: nn.Module, recipe: Recipe) -> Plan:
    paths = () if isinstance(recipe, SplitGate) else (recipe.weight1, recipe.bias1, recipe.weight2, recipe.bias2)
    layers = tuple((name, type(layer)) for name, layer in block.named_modules() if layer is not block)
    return Plan(recipe, tuple(_split(path) for path in paths), layers)


def intact(block: nn.Module, plan: Plan) -> bool:
    """Whether the layers are those seen at `fuse`: no LoRA put in since, no hook, no other activation."""
    split = isinstance(plan.recipe, SplitGate)
    for name, kind in plan.layers:
        layer: Any = block
        for part in name.split("."):
            layer = layer._modules.get(part)
            if layer is None:
                return False
        if type(layer) is not kind or (not split and _is_hooked(layer)):
            return False
    return True


def _parameter(block: nn.Module, path: tuple[str, str] | None) -> Tensor | None:
    if path is None:
        return None
    owner = block
    for part in path[0].split(".") if path[0] else ():
        owner = getattr(owner, part)
    return getattr(owner, path[1])


def run(block: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    recipe = plan.recipe
    residual = x if recipe.adds_input else None
    if isinstance(recipe, ChannelGate):
        return functional.channel_gate(
            x,
            *(_parameter(block, path) for path in plan.parameters),
            layer=recipe.layer,
            pool=recipe.pool,
            ties=recipe.ties,
            activation=recipe.activation,
            gate=recipe.gate,
            residual=residual,
        )
    pooled = functional.squeeze(x, recipe.pool, ties=recipe.ties)
    descriptor = pooled if isinstance(pooled, Tensor) else 0.5 * pooled[0] + 0.5 * pooled[1]
    return functional.scale(x, recipe.excite(block, descriptor), residual=residual)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The one fused subclass of a host's class."""
    if host not in _CLASSES:
        _CLASSES[host] = _make_fused_class(host)
    return _CLASSES[host]


def _make_fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's class whose instances run fused. It copies and pickles as the host's class."""

    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan: Plan = self.__dict__[PLAN]
        expected = not args and not kwargs and plan.recipe.rank in (None, x.dim())
        if not expected or not intact(self, plan):
            return host.forward(self, x, *args, **kwargs)
        return run(self, plan, x)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple:
        state = {key: value for key, value in self.__dict__.items() if key != PLAN}
        return _empty, (host,), state

    def __setstate__(self: nn.Module, state: dict) -> None:
        self.__class__ = host
        setter = getattr(self, "__setstate__", None)
        setter(state) if setter else self.__dict__.update(state)
        recipe = recognise(self)
        if recipe is not None and not isinstance(recipe, str):
            swap(self, recipe)

    attributes = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "__module__": host.__module__,
        "__doc__": host.__doc__,
        "_fused_attn_host": host,
    }
    return type(f"Fused{host.__name__}", (host,), attributes)


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


def restore(block: nn.Module) -> None:
    """Undo `swap`.

    Raises:
        RuntimeError: the block was sharded after it was fused.
    """
    host = host_class(block)
    if host is None:
        return
    if type(block) is not fused_class(host):
        raise RuntimeError(f"{type(block).__name__} was sharded after it was fused; unfuse before fully_shard")
    block.__class__ = host
    del block.__dict__[PLAN]
