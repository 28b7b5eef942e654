"""How one fused block is run, and what must be unchanged for that to be the same function."""

from __future__ import annotations

import itertools
import operator
import types
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ...nn.pointwise import is_hooked
from ..reading.layers import calls_itself
from ..reading.reads import MISSING, Watched, is_plain, is_torch, reads_of
from ..recipes.names import HOST, host_of
from ..recipes.recipe import OwnLayers, Recipe, SplitGate
from ..recipes.run import Parameters, Paths, layer_at, parameter_paths, parameters_of
from .traced import Layer, Traced, traced
from .weighted import gate_with_weights

#: The only thing a fused block has that the original has not; `restore` takes it away.
PLAN = "_fused_attn_plan"


class Glance(NamedTuple):
    """The same as in a plan for one look that costs little: attributes of a dictionary at once, against what they were.

    places: dictionaries of attributes, what reads them, what it read, and their lengths; None is the block's own.
    same: owners that are no modules, names of their attributes, and values. contents: containers or their views, and
    what was in them. All of these by identity: a tensor may be equal to a number. equals and alike: as places and as
    same, but by equality, which costs a fifth: what is equal to nothing but itself, and options of torch's own layers,
    which make numbers of such a tensor. filled: attributes of a layer, where its parameters or buffers are, these, and
    the name of one that is not None. hooks: dictionaries that are empty.
    """

    places: tuple[tuple[Mapping[str, Any] | None, Callable[[Any], Any], Any, int], ...]
    equals: tuple[tuple[Mapping[str, Any], Callable[[Any], Any], Any, int], ...]
    kind: type
    layers: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    same: tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]
    alike: tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]
    filled: tuple[tuple[Mapping[str, Any], str, Mapping[str, Any], str], ...]
    hooks: tuple[dict[Any, Any], ...]
    contents: tuple[tuple[Any, tuple[Any, ...]], ...]
    sets: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """children: parent, name, layer and its class. unhooked: layers that are bypassed. A parent or owner None is the
    block itself, which must not be in its own plan: a cycle would keep its memory. No tuple, which torch.export would
    look into and put back with other tensors in it."""

    recipe: Recipe
    paths: Paths
    places: tuple[tuple[dict[str, Any], str] | None, ...]  # where the parameters at the paths are
    children: tuple[tuple[nn.Module | None, str, nn.Module, type], ...]
    names: tuple[tuple[nn.Module | None, tuple[str, ...]], ...]  # those of each one's children, in order
    unhooked: tuple[nn.Module, ...]
    norms: tuple[nn.Module, ...]  # BatchNorms that are bypassed, which may have another dtype than the map
    kind: type  # its fused class; what is called may be derived from that
    members: int  # of the fused class
    again: bool  # whether a run that raises has run none of its layers, so that its forward may run after it
    closures: bool  # whether anything is in the cell of a closure, which compilers do not follow
    watched: Watched
    glance: Glance
    traced: Traced
    weighted: Callable[..., Any] | None  # what runs where it is given weights beside its map

    def __deepcopy__(self, memo: Any) -> None:
        """A copy is planned anew."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _unplanned, ()


def _unplanned() -> None:
    return None


def plan_of(block: nn.Module) -> Plan | None:
    """The plan by which a block runs fused; None where it does not."""
    found: Plan | None = block.__dict__.get(PLAN)
    return found


def is_bypassed(path: str, recipe: Recipe) -> bool:
    return not isinstance(recipe, (SplitGate, OwnLayers)) or path in recipe.bypassed


def why_bound(block: nn.Module, recipe: Recipe) -> str | None:
    """Why a layer cannot be bypassed: it carries a hook, or a forward or call of its own, which would be skipped."""
    for name, layer in block.named_modules():
        if layer is not block and is_bypassed(name, recipe):
            if is_hooked(layer):
                return f"{name} carries a hook or a forward of its own, which the fused block would skip"
            if calls_itself(layer):
                return f"{name} is a {type(layer).__name__}, which has a __call__ of its own"
    return None


def make_plan(block: nn.Module, recipe: Recipe) -> Plan:
    modules: dict[str, nn.Module | None] = dict(block.named_modules(remove_duplicate=False))
    modules[""] = None
    children = tuple(
        (modules[name.rpartition(".")[0]], name.rpartition(".")[2], layer, type(layer))
        for name, layer in modules.items()
        if layer is not None
    )
    names = tuple((module, tuple(_of(block, module)._modules)) for module in modules.values())
    bypassed = tuple(layer for name, layer in modules.items() if layer is not None and is_bypassed(name, recipe))
    watched = reads_of(block, bypassed).watched
    kind = next(cls for cls in type(block).__mro__ if HOST in vars(cls))
    paths = parameter_paths(recipe)
    places = tuple(_place(block, path) for path in paths)
    glance = _glance(block, kind, children, bypassed, watched)
    norms = tuple(layer for layer in bypassed if isinstance(layer, _BatchNorm))
    members = len(vars(kind))
    again = not isinstance(recipe, (SplitGate, OwnLayers)) or len(bypassed) == len(children)
    maps = isinstance(recipe, OwnLayers) and (recipe.maps or recipe.options)
    weighted = None if maps else gate_with_weights(block)
    closures = any(isinstance(owner, types.CellType) for owner, *_ in (*watched.options, *watched.parts))
    return Plan(
        recipe,
        paths,
        places,
        children,
        names,
        bypassed,
        norms,
        kind,
        members,
        again,
        closures,
        watched,
        glance,
        traced(block, watched),
        None if weighted is None else weighted.forward,
    )


def _of(block: nn.Module, owner: Any) -> Any:
    """The owner of something in a plan, in which the block itself is None."""
    return block if owner is None else owner


def _where(part: nn.Module, name: str) -> str:
    return "_buffers" if name in part._buffers else "_parameters"


def _place(block: nn.Module, path: tuple[str, str] | None) -> tuple[dict[str, Any], str] | None:
    if path is None:
        return None
    layer, name = layer_at(block, path[0]), path[1]
    place: dict[str, Any] = layer.__dict__[_where(layer, name)]
    return place, name


def parameters_in(block: nn.Module, plan: Plan) -> Parameters:
    """The parameters of a block that is intact."""
    if not torch.compiler.is_compiling():
        try:
            return tuple([None if place is None else place[0][place[1]] for place in plan.places])
        except KeyError:
            pass
    return parameters_of(block, plan.paths)


def is_mixed(plan: Plan, x: Tensor) -> bool:
    """Whether a BatchNorm has parameters of another dtype than the map, as in half models: only PyTorch takes that."""
    for norm in plan.norms:
        weight = norm.running_mean if norm.weight is None else norm.weight
        if isinstance(weight, Tensor) and weight.dtype != x.dtype:
            return not torch.is_autocast_enabled(x.device.type)
    return False


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _glance(block: nn.Module, kind: type, children: Any, bypassed: tuple[nn.Module, ...], watched: Watched) -> Glance:
    own = block.__dict__
    keys: dict[int, dict[str, None]] = {}
    dictionaries: dict[int, dict[str, Any]] = {}

    def note(place: dict[str, Any], *names: str) -> None:
        dictionaries[id(place)] = place
        keys.setdefault(id(place), {}).update(dict.fromkeys(names))

    parts = list(dict.fromkeys((block, *(layer for _, _, layer, _ in children))))
    counted: list[tuple[Any, Callable[[Any], Any]]] = []
    for part in parts:
        note(part.__dict__, "_modules", "_parameters", "_buffers", *(_HOOKS if part is not block else ()))
        if part._modules:
            note(part._modules, *part._modules)
        if len(part._modules) > 1:  # some run them in the order in which they have them
            counted.append((part._modules, list))
    others: dict[tuple[int, str], tuple[Any, str, Any]] = {}
    for owner, name, value in (*watched.options, *watched.parts):
        part = _of(block, owner)
        if not isinstance(part, nn.Module):
            others[id(part), name] = part, name, value
        elif name in part.__dict__:
            note(part.__dict__, name)
        else:  # it has it from its class, or not at all; one of its own would make its dictionary longer
            others[id(type(part)), name] = type(part), name, value
            if value is MISSING:
                counted += [(part.__dict__[place], len) for place in ("_modules", "_parameters", "_buffers")]
    for owner, _ in watched.absent:
        if not isinstance(owner, (nn.Module, types.NoneType)) and hasattr(owner, "__dict__"):
            counted.append((vars(owner), len))
    for owner, name in watched.empty:
        part = _of(block, owner)
        note(part.__dict__[_where(part, name)], name)
    filled = [(_of(block, owner), name) for owner, name in watched.filled]
    counted.append((vars(kind), len))  # what is set on the fused class is no attribute of the host's
    equal = {id(part.__dict__) for part in parts if is_torch(host_of(type(part)))}
    equal |= {id(part._modules) for part in parts if all(map(_is_itself, part._modules.values()))}
    places, equals = [], [(place, read, read(place), len(place)) for place, read in counted]
    for i, names in keys.items():
        read: Callable[[Any], Any] = operator.itemgetter(*names, next(iter(names)))  # of one alone it makes no tuple
        place = dictionaries[i]
        length = len(place) + (place is own and PLAN not in place)
        if i in equal:
            equals.append((place, read, read(place), length))
        else:
            places.append((None if place is own else place, read, read(place), length))
    alike = [entry for entry in others.values() if _is_itself(entry[2])]
    same = [entry for entry in others.values() if not _is_itself(entry[2])]
    contents: list[tuple[Any, tuple[Any, ...]]] = []
    for container, copied in watched.contents:
        if isinstance(copied, dict):
            contents += [(container.keys(), tuple(copied)), (container.values(), tuple(copied.values()))]
        elif isinstance(copied, (list, deque)):
            contents.append((container, tuple(copied)))
    return Glance(
        tuple(places),
        tuple(equals),
        kind,
        tuple(parts[1:]),
        tuple(map(type, parts[1:])),
        _columns(same),
        _columns(alike),
        tuple((p.__dict__, _where(p, name), p.__dict__[_where(p, name)], name) for p, name in filled),
        tuple(layer.__dict__[place] for layer in bypassed for place in _HOOKS),
        tuple(contents),
        tuple((container, copied) for container, copied in watched.contents if isinstance(copied, set)),
    )


def _columns(entries: list[tuple[Any, str, Any]]) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]:
    return tuple(e[0] for e in entries), tuple(e[1] for e in entries), tuple(e[2] for e in entries)


def _is_itself(value: Any) -> bool:
    """Whether nothing but the same is equal to it. Bound methods are made when they are asked for, equal each time."""
    if isinstance(value, (str, types.NoneType, types.MethodType)):
        return True
    return getattr(type(value), "__eq__") is object.__eq__  # noqa: B009 (mypy takes it for a bound one)


def _unchanged(block: nn.Module, glance: Glance) -> bool:
    own = block.__dict__
    for place, read, expected, length in glance.places:
        here = own if place is None else place
        if len(here) != length or not all(map(operator.is_, read(here), expected)):
            return False
    for counted, read, expected, length in glance.equals:
        if len(counted) != length or read(counted) != expected:
            return False
    if type(block) is not glance.kind or any(glance.hooks) or tuple(map(type, glance.layers)) != glance.kinds:
        return False
    owners, names, values = glance.alike
    if tuple(map(getattr, owners, names, itertools.repeat(MISSING))) != values:
        return False
    owners, names, values = glance.same
    if owners and not all(map(operator.is_, map(getattr, owners, names, itertools.repeat(MISSING)), values)):
        return False
    for attributes, where, tensors, name in glance.filled:
        if attributes[where] is not tensors or tensors.get(name, MISSING) is None:
            return False
    for container, copied in glance.contents:
        if len(container) != len(copied) or not all(map(operator.is_, container, copied)):
            return False
    for container, copied in glance.sets:  # noqa: SIM110
        if container != copied:
            return False
    return True


def intact(block: nn.Module, plan: Plan) -> bool:
    """Whether block and layers are those seen at `fuse`: none put in (LoRA), added, hooked or set differently since,
    and nothing else changed that their code reads."""
    if torch.compiler.is_compiling():
        return not plan.closures and _is_intact(block, plan) and _seen(block, plan)
    try:
        if _unchanged(block, plan.glance):
            return True
    except Exception:  # something is gone, or cannot be compared
        pass
    return _intact(block, plan)


def _layers(plan: Plan) -> tuple[Layer, ...]:
    """Those to look at, whose own contents compilers take for constants."""
    return plan.traced.layers


def _is_intact(block: nn.Module, plan: Plan) -> bool:
    """As `intact`, for compilers: a constant to them."""
    return _intact(block, plan)


# As torch.compiler.assume_constant_result does, which imports all of Dynamo.
_layers.__dict__["_dynamo_marked_constant"] = _is_intact.__dict__["_dynamo_marked_constant"] = True


def _seen(block: nn.Module, plan: Plan) -> bool:
    """Whether a block is intact as far as compilers are to see: what they read here they ask for at every call."""
    for way, names, options, lacking, absent, empty, filled in _layers(plan):
        part: Any = block
        for name in way:
            part = part._modules.get(name)
        type(part)
        if names is not None and tuple(part._modules) != names:
            return False
        for name, value in options:
            found = getattr(part, name, MISSING)
            if isinstance(found, Tensor) or found != value:
                return False
        for name in lacking:
            if hasattr(part, name):
                return False
        for name in absent:
            if _has_of_its_own(part, name):
                return False
        for name in empty:
            if getattr(part, name, None) is not None:
                return False
        for name in filled:
            if _is_none(part, name):
                return False
    others = plan.traced.others
    return others is None or _changed(block, others) is None


def _intact(block: nn.Module, plan: Plan) -> bool:
    """As `intact`, one by one: so that what does not matter may have changed."""
    for parent, name, layer, kind in plan.children:
        if _of(block, parent)._modules.get(name) is not layer or type(layer) is not kind:
            return False
    if not (torch.compiler.is_compiling() or (_is_of_its_class(block, plan) and _are_in_place(block, plan))):
        return False
    for parent, names in plan.names:
        if tuple(_of(block, parent)._modules) != names:
            return False
    for layer in plan.unhooked:
        if is_hooked(layer):
            return False
    return _changed(block, plan.watched) is None


def _changed(block: nn.Module, watched: Watched) -> str | None:
    """The name of what was read and has changed since, "" where that has none; None: nothing has."""
    options, parts, absent, empty, filled, contents = watched
    for owner, name, value in options:
        if not _is_equal(getattr(_of(block, owner), name, MISSING), value):
            return name
    compiling = torch.compiler.is_compiling()
    for owner, name, value in parts:
        if compiling and name == "__call__":  # which torch.export replaces for all modules while it traces
            continue
        if getattr(_of(block, owner), name, MISSING) is not value:
            return name
    for parent, name in absent:
        if _has_of_its_own(_of(block, parent), name):
            return name
    for parent, name in empty:
        if getattr(_of(block, parent), name, None) is not None:
            return name
    for parent, name in filled:
        if _is_none(_of(block, parent), name):
            return name
    for container, copied in contents:
        if not _holds(container, copied):
            return ""
    return None


def _has_of_its_own(part: Any, name: str) -> bool:
    """Whether it has an attribute that is not its class's. Compilers guard on an attribute that is read, not on what
    a dictionary has not."""
    if torch.compiler.is_compiling():
        getattr(part, name, None)
    return name in part.__dict__


def _is_none(part: Any, name: str) -> bool:
    """Whether a parameter is None; one that is parametrised is not computed."""
    return not is_parametrized(part, name) and getattr(part, name, MISSING) is None


def _is_equal(found: Any, value: Any) -> bool:
    """Also of what cannot be compared, or is equal and another thing: a tensor in a number's place."""
    if found is value or type(found) is not type(value):
        return found is value
    if type(value) in (tuple, list, dict):
        return _holds(found, value)
    return (is_plain(value) or isinstance(value, types.MethodType)) and bool(found == value)


def _holds(container: Any, copied: Any) -> bool:
    """Whether the same is in a container as in its copy."""
    if isinstance(copied, dict):
        return list(container) == list(copied) and all(_is_equal(container[k], v) for k, v in copied.items())
    if isinstance(copied, (list, tuple, deque)):
        return len(container) == len(copied) and all(_is_equal(c, v) for c, v in zip(container, copied, strict=True))
    return bool(container == copied)


def _are_in_place(block: nn.Module, plan: Plan) -> bool:
    """Whether the dictionaries in which a plan finds parameters are those of the layers."""
    for path, place in zip(plan.paths, plan.places, strict=True):
        if path is not None and place is not None:
            layer = layer_at(block, path[0])
            if place[0] is not layer._parameters and place[0] is not layer._buffers:
                return False
    return True


def _is_of_its_class(block: nn.Module, plan: Plan) -> bool:
    """Whether it has the class that it was fused as, unchanged, or one derived from it (by fully_shard, for a
    parametrisation) that has nothing else under the names that were read."""
    cls, host = type(block), host_of(plan.kind)
    if len(vars(plan.kind)) != plan.members or not issubclass(cls, plan.kind):
        return False
    if cls is plan.kind:
        return True
    read = (name for owner, name, _ in (*plan.watched.options, *plan.watched.parts) if owner is host)
    added = [vars(c) for c in cls.__mro__[: cls.__mro__.index(plan.kind)]]
    return not any(name in members for name in read if name != "forward" for members in added)


def changes(block: nn.Module, plan: Plan) -> str:
    """What of a block that is not intact has changed first, to be read."""
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    name = _changed_layer(block, plan) or _changed(block, plan.watched)
    return f"changed since fuse: {name}" if name else "changed since fuse"


def _changed_layer(block: nn.Module, plan: Plan) -> str | None:
    """The name of a layer that is another now, has other layers, or is hooked."""
    names = {part: name for name, part in block.named_modules()}
    for parent, name, layer, kind in plan.children:
        if _of(block, parent)._modules.get(name) is not layer or type(layer) is not kind:
            return f"{names.get(_of(block, parent), '')}.{name}".lstrip(".")
    for parent, children in plan.names:
        if tuple(_of(block, parent)._modules) != children:
            return names.get(_of(block, parent))
    return next((names.get(layer) for layer in plan.unhooked if is_hooked(layer)), None)
