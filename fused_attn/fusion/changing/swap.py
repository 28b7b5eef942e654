"""Changing what a block runs, not what it owns: the instance gets a subclass of its class with a fused forward."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ...backends import is_ordinary
from ..reading.reads import asks_for_its_class, token
from ..recipes.names import HOST, host_class
from ..recipes.own import FUSED_FORMS
from ..recipes.recipe import OwnLayers, Recipe
from ..recipes.run import Unsuited, run
from .decide import decide
from .plan import PLAN, Plan, intact, is_mixed, make_plan, parameters_in, plan_of

#: By the host's token: a class lives as long as an instance of it, and keeps its host's alive no longer.
_CLASSES: weakref.WeakValueDictionary[int | None, type[nn.Module]] = weakref.WeakValueDictionary()


def fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The one fused subclass of a host's class."""
    found = _CLASSES.get(token(host))
    return _CLASSES.setdefault(token(host), _make_fused_class(host)) if found is None else found


def _make_fused_class(host: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a host's class whose instances run fused where they have a plan, and else as the host's. They are
    called, copied, pickled, traced and scripted as instances of the host's class."""

    functions = _fused_functions(host)
    views = bool(functions) or asks_for_its_class(host)
    taken = _taken(host)

    def as_written(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return host.forward(_as_host(self, host, made) if views else self, *args, **kwargs)

    def call(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plan: Plan | None = self.__dict__.get(PLAN)
        given = args, kwargs
        maps = plan.recipe.maps if plan is not None and isinstance(plan.recipe, OwnLayers) else ()
        if maps:
            args, kwargs = _in_order(taken, plan.recipe, args, kwargs)  # type: ignore[union-attr, arg-type]
        elif plan is not None and (kwargs or len(args) != 1):
            args, kwargs = _without_defaults(taken, plan.recipe, args, kwargs)
        options = None if plan is None else _options(plan.recipe, args, kwargs)
        if plan is None or options is None:
            if plan is not None and plan.weighted is not None and _takes(self, plan, args):
                return plan.weighted(self, *given[0], **given[1])
            return as_written(self, *given[0], **given[1])
        x = args[0]
        # What is no tensor is torch.fx's proxy, or an error that is the host's to raise.
        if not (
            isinstance(x, Tensor)
            and plan.recipe.rank in (None, x.dim())
            and is_ordinary(x)
            and all(isinstance(m, Tensor) and is_ordinary(m) for m in args[1 : len(maps)])
            and intact(self, plan)
        ):
            return as_written(self, *given[0], **given[1])
        if isinstance(plan.recipe, OwnLayers) and is_mixed(plan, x):
            return as_written(self, *given[0], **given[1])
        try:
            return run(self, plan.recipe, parameters_in(self, plan), x, *(args[1:] if maps else ()), **options)
        except (TypeError, ValueError) as error:  # a map that the host may take and the fused function does not
            if plan.again or isinstance(error, Unsuited):
                return as_written(self, *given[0], **given[1])
            raise

    def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return call(self, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = host.__reduce_ex__(self, protocol)
        if type(self) is not fused_class(host) or not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        places = tuple(i for i, arg in enumerate(args) if arg is type(self))
        plain = tuple(host if i in places else arg for i, arg in enumerate(args))
        if function is type(self):
            return host, plain, *(_without_plan(part) for part in rest)
        rest = [_without_plan(part, save_of(self)) for part in rest]
        return (_rebuilt, (function, host, places, plain), *rest) if places else (function, args, *rest)

    def __setstate__(self: nn.Module, state: Any) -> None:
        host.__setstate__(self, state)
        save = self.__dict__.pop(PLAN, None)
        recipe = decide(self, tails=True)  # it was fused: as what it is, or else for its tail
        if recipe is not None and not isinstance(recipe, str):
            self.__dict__[PLAN] = make_plan(self, recipe)
            if isinstance(save, str):
                set_save(self, save)

    attributes = {
        **functions,
        "forward": _as_written_by(host, forward),
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "__annotations__": inspect.get_annotations(host),  # TorchScript looks at those of a class alone
        HOST: host,
    }
    made = _derived(host, attributes)
    return made


def why_no_class(host: type[nn.Module]) -> str:
    """Why there can be no fused class of a host's; empty where there can."""
    try:
        fused_class(host)
    except TypeError as error:
        return f"no class can be derived from its own: {error}"
    return ""


def _derived(host: type[nn.Module], attributes: dict[str, Any]) -> type[nn.Module]:
    """A class of the host's name, past its metaclass and its `__init_subclass__`, which may keep a list of classes: its
    base is set afterwards.

    Raises:
        TypeError: that cannot be done (slots, or a first base that is no module) and `__init_subclass__` is its own.
    """
    made: type[nn.Module] = type.__new__(type(host), host.__name__, (nn.Module,), attributes)
    try:
        made.__bases__ = (host,)
    except TypeError:
        if any("__init_subclass__" in vars(base) for base in host.__mro__ if base not in (object, Generic)):
            raise
        made = type.__new__(type(host), host.__name__, (host,), attributes)
    return made


def _takes(block: nn.Module, plan: Plan, args: tuple[Any, ...]) -> bool:
    """Whether a block may run by its plan what it is given beside its map."""
    x = args[0] if args else None
    return isinstance(x, Tensor) and plan.recipe.rank in (None, x.dim()) and is_ordinary(x) and intact(block, plan)


def _taken(host: type[nn.Module]) -> tuple[tuple[str, Any], ...]:
    """What a forward takes by position or name, the map first, with the defaults that it has."""
    try:
        parameters = list(inspect.signature(host.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    either, by_name = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    if not parameters or parameters[0].kind is not either:
        return ()
    return tuple((p.name, p.default) for p in parameters if p.kind in (either, by_name))


def _without_defaults(
    taken: tuple[tuple[str, Any], ...], recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the map by position and the rest by name, without what is the default anyway (lengths=None): a
    block was recognised by what it computes then. What a recipe has options for is its own to read."""
    if not taken or len(args) > len(taken):
        return args, kwargs
    options = recipe.options if isinstance(recipe, OwnLayers) else ()
    named = {**dict(zip((name for name, _ in taken), args, strict=False)), **kwargs}
    if len(named) < len(args) + len(kwargs) or taken[0][0] not in named:
        return args, kwargs
    x = named.pop(taken[0][0])
    for name, default in taken[1:]:
        if name in named and name not in options and _is_default(named[name], default):
            del named[name]
    return (x,), named


def _is_default(value: Any, default: Any) -> bool:
    if value is None or default is None:
        return value is default
    return type(value) is type(default) and isinstance(value, (bool, int, float, str)) and bool(value == default)


def _options(recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What a block is called with beside its map; None where it runs as it is written."""
    if isinstance(recipe, OwnLayers) and recipe.maps:
        return kwargs if len(args) == len(recipe.maps) and not kwargs else None
    if len(args) == 1 and not kwargs:
        return kwargs
    names = recipe.options if isinstance(recipe, OwnLayers) else ()
    if not 1 <= len(args) <= len(names) + 1 or not set(kwargs) <= set(names):
        return None
    return {**dict(zip(names, args[1:], strict=False)), **kwargs}


def _in_order(
    taken: tuple[tuple[str, Any], ...], recipe: OwnLayers, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Arguments with the maps of a block by position: MONAI gives them by keyword, torchvision in a dictionary."""
    maps = recipe.maps
    if recipe.keys:
        held = (*args, *(kwargs.values() if taken and set(kwargs) <= {taken[0][0]} else ()))
        if len(held) != 1 or len(args) + len(kwargs) != 1 or not _holds(held[0], recipe.keys):
            return args, kwargs
        return tuple([held[0][key] for key in recipe.keys]), {}
    rest = maps[len(args) :]
    if not rest or not set(rest) <= kwargs.keys():
        return args, kwargs
    return (*args, *(kwargs[name] for name in rest)), {n: v for n, v in kwargs.items() if n not in rest}


def _holds(held: Any, keys: tuple[Any, ...]) -> bool:
    """Whether it is a list, tuple or dictionary of Python's own that has something at each of these keys; one of the
    first two nothing beside."""
    if type(held) in (list, tuple):
        return len(held) == len(keys) and keys == (0, 1)
    return type(held) in (dict, OrderedDict) and keys != (0, 1) and all(key in held for key in keys)


def _as_written_by(host: Any, function: Any) -> Any:
    """With the signature, the source and the globals of the host's forward, which tracers and compilers look at."""
    space = getattr(host.forward, "__globals__", function.__globals__)
    found = types.FunctionType(function.__code__, space, "forward", function.__defaults__, function.__closure__)
    return functools.wraps(host.forward)(found)


def _fused_functions(host: type[nn.Module]) -> dict[str, Any]:
    """What `fused_attn.nn` puts into a module of `fused_attn.reference` in place of the plain functions there."""
    ours = next((FUSED_FORMS[base] for base in host.__mro__ if base in FUSED_FORMS), nn.Module)
    return {
        name: staticmethod(_with_resort(value.__func__, getattr(host, name)))
        for name, value in vars(ours).items()
        if isinstance(value, staticmethod)
    }


def _with_resort(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """The fused function, and the plain one for maps that it does not take."""

    @functools.wraps(fused)
    def function(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fused(*args, **kwargs)
        try:
            return fused(*args, **kwargs)
        except (TypeError, ValueError):
            return plain(*args, **kwargs)

    return function


def _as_host(block: nn.Module, host: type[nn.Module], fused: type[nn.Module]) -> nn.Module:
    """The same block as an instance of its host's class, which may have other functions than the fused one."""
    view: nn.Module = object.__new__(_as_of_host(type(block), host, fused))
    object.__setattr__(view, "__dict__", block.__dict__)
    return view


def _as_of_host(cls: type[nn.Module], host: type[nn.Module], fused: type[nn.Module]) -> type[nn.Module]:
    """The host's class with what was added to the fused one since: parameters of the block itself that are parametrised
    are properties of a class that is derived from it."""
    added: dict[str, Any] = {}
    for base in reversed(cls.__mro__[: cls.__mro__.index(fused)]):
        added |= {name: value for name, value in vars(base).items() if isinstance(value, property)}
    if not added:
        return host
    return _derived(host, added)


def _without_plan(part: Any, save: str | None = None) -> Any:
    """The state without the plan; save: what is there in its place, for `__setstate__`."""
    if isinstance(part, tuple):
        return tuple(_without_plan(p, save) for p in part)
    if type(part) is not dict or PLAN not in part:
        return part
    return {k: save if k == PLAN else v for k, v in part.items() if k != PLAN or save == "least"}


def _rebuilt(function: Any, host: type[nn.Module], places: tuple[int, ...], args: tuple[Any, ...]) -> Any:
    """function(*args), with the fused class of a host's in some places: what copy and pickle make."""
    cls = fused_class(host)
    return function(*(cls if i in places else arg for i, arg in enumerate(args)))


def swap(block: nn.Module, recipe: Recipe) -> None:
    """
    Raises:
        TypeError: the class of this block cannot be changed.
    """
    if host_class(block) is None:  # else it has the fused class, or one derived from that
        block.__class__ = fused_class(type(block))  # without a plan it is as the host's
    before = save_of(block)
    block.__dict__[PLAN] = make_plan(block, recipe)
    if before is not None:
        set_save(block, before)


def save_of(block: nn.Module) -> str | None:
    """What the layers of a block with tails keep; None: it has none."""
    plan = plan_of(block)
    return plan.recipe.save if plan is not None and isinstance(plan.recipe, OwnLayers) else None


def set_save(block: nn.Module, save: str) -> None:
    """Have the layers of a block, if it has tails, keep this."""
    plan = plan_of(block)
    if plan is not None and isinstance(plan.recipe, OwnLayers) and plan.recipe.save not in (None, save):
        block.__dict__[PLAN] = replace(plan, recipe=replace(plan.recipe, save=save))


def restore(block: nn.Module) -> None:
    """Undo `swap`. What was made of the class since, as by fully_shard or a parametrisation, keeps the fused class as a
    base, which without a plan is the host's."""
    host = host_class(block)
    if host is not None:
        if type(block) is fused_class(host):
            block.__class__ = host
        block.__dict__.pop(PLAN, None)
