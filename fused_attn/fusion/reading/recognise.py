"""Recognising a module by its computation: capture, match, watch, check; shared between equal modules."""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ...reference.block_attention import CONVOLUTIONS
from ..recipes.along import Turned, gate_along
from ..recipes.names import host_of
from ..recipes.recipe import ChannelGate, Recipe, SplitGate
from .attentions import is_attention, is_soft, why_no_attention
from .canonical import SIZED, Node
from .capture import BATCH, EVEN_SPACE, SPACE, Captured, Refused, capture, takes_one_map
from .check import (
    EVEN_MAPS,
    MAPS,
    MAPS_OF_ATTENTION,
    TOLERANCE,
    TOLERANCE_OF_SIXTHS,
    check_autocast,
    check_block,
)
from .context import in_its_own_context
from .find import Found, find
from .layers import swapped_layer
from .match import reached
from .reads import Reads, Unstored, is_torch, multiplies_itself, own_names, reads_of, restore
from .selections import why_no_selection

MAX_PARTS = 60


@dataclass
class Outcome:
    """What is known of all modules that are equal to one: found; or why not; or neither, no block at all."""

    found: Found | None = None
    reason: str | None = None
    channels: int = 0
    rank: int = 2


_outcomes: weakref.WeakKeyDictionary[type, dict[Hashable, Outcome]] = weakref.WeakKeyDictionary()


def is_candidate(block: nn.Module) -> bool:
    """Whether it may be a block of somebody's: not too large, with a forward of its own."""
    return has_own_forward(block) and sum(1 for _ in block.modules()) <= MAX_PARTS


def has_own_forward(block: nn.Module) -> bool:
    """Whether it is of somebody's class, with a forward of its own that one argument is enough for."""
    cls = host_of(type(block))
    if "forward" in block.__dict__ or cls.__call__ is not nn.Module.__call__:
        return False
    return takes_one_map(cls) and not isinstance(block, (torch.fx.GraphModule, torch.jit.ScriptModule))


def is_of_somebody(block: nn.Module) -> bool:
    """Whether it is of somebody's class, with a forward of its own, of whatever arguments."""
    forward: Any = host_of(type(block)).forward
    plain = inspect.isfunction(forward) and not is_torch(forward) and not is_torch(type(block))
    return plain and "forward" not in block.__dict__ and not isinstance(block, torch.fx.GraphModule)


T = TypeVar("T")


def once(
    known: weakref.WeakKeyDictionary[type, dict[Hashable, T]],
    block: nn.Module,
    read: Reads,
    find: Callable[[], T],
    *,
    failed: T,
    changed: Callable[[], T],
    key: Hashable = None,
) -> T:
    """What `find` makes of a block, in its own context: once for all of a class that read alike, and have the same key.

    failed: where it raises, which is not kept. changed: what is found instead where it changed what the block's code
    reads, which is put back.
    """
    of_class = known.setdefault(host_of(type(block)), {})
    key = read.key, key
    if key not in of_class:
        try:
            found = in_its_own_context(find)
        except Exception:
            return failed
        of_class[key] = changed() if restore(read.watched) else found
    return of_class[key]


def outcome_of(block: nn.Module) -> Outcome:
    """What a module is. One that lacks something to be looked at, or cannot be, is asked again next time."""
    if not is_candidate(block):
        return Outcome()
    try:
        read = reads_of(block)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return Outcome()
    return once(
        _outcomes,
        block,
        read,
        lambda: _without_stores(block, read),
        failed=Outcome(),
        changed=lambda: Outcome(None, "keeps state"),
    )


def _without_stores(block: nn.Module, read: Reads) -> Outcome:
    unstored = Unstored(read.stores)
    with unstored:
        return examine(block, read)
    return examine(block, read._replace(remark=unstored.why))


def recipe_of(block: nn.Module) -> Recipe | str | None:
    """The recipe of a recognised block, why it is left alone, or None."""
    outcome = outcome_of(block)
    if outcome.found is None:
        return outcome.reason
    recipe = outcome.found.recipe(block)
    return recipe if isinstance(recipe, str) else swapped_layer(block, recipe) or recipe


def channel_guesses(block: nn.Module) -> list[int]:
    found: list[int] = []
    for part in block.modules():
        for name in ("in_channels", "in_features", "num_features", "num_channels", "normalized_shape"):
            value = getattr(part, name, None)
            if isinstance(value, int):
                found.append(value)
    for part in block.modules():
        found += [
            p.shape[-1] if p.dim() < 3 else p.shape[1]
            for p in (*part._parameters.values(), *part._buffers.values())
            if p is not None and p.dim()
        ]
    found += [v for v in block.__dict__.values() if isinstance(v, int) and not isinstance(v, bool) and v > 2]
    usual = [n for n in dict.fromkeys(found) if n > 2][:6]
    return [*usual, 12, *([2] if 2 in found else [])]


def ranks_of(block: nn.Module) -> list[int]:
    """Of the maps that it may take, the likeliest first."""
    names = {type(part).__name__[-2:] for part in block.modules()}
    if "3d" in names:
        return [3]
    return [2, 3, 1] if "1d" not in names or "2d" in names else [2, 1, 3]


def captures(block: nn.Module) -> Iterator[tuple[int, int, Captured | Refused]]:
    """Captures in eval mode for the ranks and channels that it takes: the first that goes through a rank."""
    spaces = (SPACE, EVEN_SPACE) if _may_attend(block) else (SPACE,)
    for rank in ranks_of(block):
        for space, channels in itertools.product(spaces, channel_guesses(block)):
            try:
                yield rank, channels, capture(block, (BATCH, channels, *space[:rank]))
                break
            except Refused as refusal:
                yield rank, channels, refusal
                break
            except Exception:
                continue


def examine(block: nn.Module, read: Reads) -> Outcome:
    """What a module is; read: of its code."""
    if read.remark is not None:  # then it is not run, so that what it is can only be guessed
        return Outcome(None, read.remark if _may_be_gate(block, read) or _may_attend(block) else None)
    first_reason: Outcome | None = None
    rectangles = False
    for rank, channels, captured in captures(block):
        rectangles = True
        if isinstance(captured, Refused):
            if _concerns(captured) or _may_attend(block) or (_has_pooled(captured) and names_a_gate(block, read)):
                first_reason = first_reason or Outcome(None, str(captured), channels, rank)
            continue
        reason = None
        for found in find(captured, rank):
            reason = _unsafe(block, found, channels, rank, captured)
            if reason is None:
                return Outcome(_of_any_rank(block, found, rank), None, channels, rank)
        reason = reason or why_not(captured)
        if reason is not None and first_reason is None:
            first_reason = Outcome(None, reason, channels, rank)
    if first_reason is not None or rectangles:
        return first_reason or Outcome()
    return (_along_an_axis(block) if has_a_gate(block, read) else None) or _square_only(block)


def _along_an_axis(block: nn.Module) -> Outcome | None:
    """Of a module that takes maps of one height or width only: a gate along that axis, if it is one."""
    for axis in (2, 3):
        turned = Turned(block, axis)
        for rank, channels, captured in captures(turned):
            if isinstance(captured, Refused):
                continue
            for match in find(captured, rank):
                recipe = match.recipe(turned)
                if isinstance(recipe, (ChannelGate, SplitGate)):
                    reason = "its pool is no mean" if recipe.pool != "avg" else None
                    reason = reason or _unsafe(turned, match, channels, rank, captured)
                    found = None if reason else Found("along", functools.partial(gate_along, axis, match.recipe, rank))
                    return Outcome(found, reason, channels, rank)
    return None


def _concerns(refused: Refused) -> bool:
    """Whether what was refused has a gate, or an attention that is not one of its parts'."""
    if refused.graph is None:
        return False
    if refused.inner is None:
        return any(_is_gate(n) for n in refused.graph.nodes() if n.op == "act")
    own = (n for n in refused.graph.nodes() if n not in refused.inner and is_attention(n))
    return any(is_soft(n) for node in own for n in node.inputs)


def _has_pooled(refused: Refused) -> bool:
    """Whether it had come to a pool of its input where it was given up, but to no gate yet."""
    nodes = refused.graph.nodes() if refused.graph is not None and refused.inner is None else ()
    return any(n.op in ("mean", "max") and any(i.op == "input" for i in reached(n)) for n in nodes)


def _of_any_rank(block: nn.Module, found: Found, rank: int) -> Found:
    """A channel gate that is the same for maps of one, two and three axes, as one for all."""
    recipe = found.recipe(block)
    others = [r for r in (1, 2, 3) if r != rank]
    if not isinstance(recipe, ChannelGate) or not set(others) <= set(ranks_of(block)):
        return found
    general = replace(recipe, rank=None)
    for other, channels, captured in captures(block):
        if other in others and isinstance(captured, Captured):
            for match in find(captured, other):
                same = match.recipe(block)
                if isinstance(same, ChannelGate) and replace(same, rank=None) == general:
                    if _unsafe(block, match, channels, other, captured) is None:
                        others.remove(other)
                    break
    return found if others else Found(found.kind, lambda block: general, found.mask)


_POOLS = ("mean", "amax", "max", "adaptive_avg_pool2d", "avg_pool2d", "AdaptiveAvgPool2d", "AdaptiveMaxPool2d")
_SELECTING = ("softmax", "Softmax")
_GATE_NAMES = ("sigmoid", "hardsigmoid", "tanh", "Sigmoid", "Hardsigmoid", *_SELECTING)


def _may_be_gate(block: nn.Module, read: Reads) -> bool:
    """Whether its layers and what its code names are those of a gate or a selection, and of nothing larger."""
    parts = list(block.modules())
    wide = [p for p in parts if isinstance(p, CONVOLUTIONS) and p.out_channels > 1 and max(p.kernel_size) > 1]
    named = read.names | {type(part).__name__ for part in parts}
    gates = _SELECTING if wide else _GATE_NAMES
    return len(wide) < 5 and any(n in named for n in _POOLS) and any(n in named for n in gates)


def has_a_gate(block: nn.Module, read: Reads) -> bool:
    """Whether its layers and what its code names have a function of gates, which a softmax is not."""
    named = read.names | {type(part).__name__ for part in block.modules()}
    return any(n in named for n in _GATE_NAMES if n not in _SELECTING)


def names_a_gate(block: nn.Module, read: Reads) -> bool:
    """Whether its own code multiplies, and names a function of gates, as its layers may, and what it calls a pool,
    which a gate of two maps needs not."""
    forward: Any = host_of(type(block)).forward
    named = own_names(forward) | {type(part).__name__ for part in block.children()}
    named |= {type(part).__name__ for child in block.children() if type(child) is nn.Sequential for part in child}
    needed = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty]
    pools = len(needed) == 3 or any(n in named or n in read.names for n in _POOLS)
    return pools and multiplies_itself(forward) and any(n in named for n in _GATE_NAMES)


_PRODUCTS = ("bmm", "matmul", "einsum", "baddbmm", "__matmul__")


def _may_attend(block: nn.Module) -> bool:
    """Whether its own code, not that of its parts, names a softmax and products, and it has convolutions for them."""
    cls: Any = host_of(type(block))
    named = own_names(cls.forward)
    soft = any(n in named for n in _SELECTING)
    layers = [part for part in block.children() if isinstance(part, CONVOLUTIONS)]
    return soft and len(layers) > 1 and any(n in named for n in _PRODUCTS)


def _square_only(block: nn.Module) -> Outcome:
    """Of a module that raises for maps that are not square."""
    for channels in channel_guesses(block):
        try:
            captured = capture(block, (BATCH, channels, 13, 13))
        except Exception:
            continue
        if any(not isinstance(found.recipe(block), str) for found in find(captured, 2)):
            return Outcome(None, "takes square maps only", channels)
    return Outcome()


def _unsafe(block: nn.Module, found: Found, channels: int, rank: int, captured: Captured) -> str | None:
    """Why a match may not be used; None where it may."""
    recipe = found.recipe(block)
    if isinstance(recipe, str):
        return recipe
    bent = swapped_layer(block, recipe)
    if bent:
        return bent
    if captured.remarks:
        return captured.remarks[0]
    own = (BATCH, channels, *captured.space)
    attends = found.kind == "attention"  # it may pool
    sizes = [(batch, *space[:rank]) for batch, *space in (_SIZES_OF_POOLED if attends else _SIZES)]
    for training in (False, True):
        try:
            watched = capture(block, own, training=training)
            others = {
                dtype: capture(block, own, training=training, dtype=dtype)
                for dtype in (torch.bfloat16, torch.float16, torch.float64)
                if not (attends and _mixes(block, own, dtype))
            }
        except Exception as error:
            return f"raises {type(error).__name__} in {'training' if training else 'evaluation'} mode or half precision"
        if watched.remarks:
            return watched.remarks[0]
        if any(other.dtype != dtype for dtype, other in others.items()):
            return "returns another dtype than it gets"
        if any(_skeleton(other.output.node) != _skeleton(watched.output.node) for other in others.values()):
            return "branches on the dtype"
        if training and _skeleton(watched.output.node) != _skeleton(captured.output.node):
            return "computes something else in training"
        for batch, *space in sizes:
            try:
                other = capture(block, (batch, channels, *space), training=training)
            except Exception:
                if batch > 1 and space[0] > 1:
                    return f"raises on maps of {'×'.join(map(str, space))}"
                continue
            if batch > 1 and space[0] > 1 and _skeleton(other.output.node) != _skeleton(watched.output.node):
                return "branches on the size of the map"
    sixths = any(n.op == "act" and n.attrs[0] in ("hard_sigmoid", "hard_swish") for n in reached(captured.output.node))
    if _branches_on_sizes(block, own, _PAIRS_OF_POOLED if attends else _PAIRS):
        return "branches on the size of the map"
    if _branches_on_channels(block, channels, rank, captured):
        return "branches on the number of channels"
    maps = (EVEN_MAPS if captured.space == EVEN_SPACE[:rank] else MAPS_OF_ATTENTION) if attends else MAPS
    why = check_block(block, found.recipe, channels, rank, TOLERANCE_OF_SIXTHS if sixths else TOLERANCE, maps)
    if why is None and attends:
        why = check_autocast(block, found.recipe, channels, rank, maps)
    return why


def _mixes(block: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether it takes no maps of a dtype without autocast, as where it adds a mask in float32 to its logits: then
    there is nothing that a fused block would have to equal."""
    try:
        capture(block, shape, dtype=dtype)
    except RuntimeError as error:
        return "dtype" in str(error) or "scalar type" in str(error)
    return False


#: Maps on which a block computes the same; one that raises on small ones may.
_SIZES = ((1, 1, 1, 1), (2, 7, 7, 7), (4, 56, 56, 16), (8, 224, 160, 24), (2, 5, 64, 9))

#: Batches (of one, axes are left out) and spaces with as many positions, so that a block that divides by their number
#: does so by the same: what its computations differ in then comes of a branch.
_PAIRS = (
    ((2, 14, 14, 4), (4000, 14, 14, 4)),
    ((2, 14, 14, 4), (33, 28, 7, 4)),
    ((2, 28, 28, 4), (9, 112, 7, 4)),
    ((3, 30, 30, 4), (2, 300, 3, 4)),
    ((4, 60, 55, 4), (2, 3, 1100, 4)),
    ((2, 660, 1000, 2), (70, 1100, 600, 2)),
    ((8, 224, 160, 4), (16, 256, 140, 4)),
)


#: The same for blocks that pool a part of the map by up to eight: there the numbers of positions are equal too.
_SIZES_OF_POOLED = ((1, 1, 1, 1), (2, 18, 18, 18), (4, 56, 56, 16), (8, 224, 160, 24), (2, 20, 64, 18))
_PAIRS_OF_POOLED = (
    ((2, 32, 32, 16), (4000, 32, 32, 16)),
    ((2, 32, 32, 16), (33, 64, 16, 16)),
    ((2, 48, 48, 16), (9, 144, 16, 16)),
    ((3, 64, 64, 16), (2, 256, 16, 16)),
    ((4, 64, 48, 16), (2, 16, 192, 16)),
    ((2, 640, 960, 16), (70, 960, 640, 16)),
    ((8, 224, 160, 16), (16, 320, 112, 16)),
)


def _branches_on_sizes(block: nn.Module, shape: tuple[int, ...], pairs: Any) -> bool:
    channels, rank = shape[1], len(shape) - 2
    for pair in pairs:
        alike = [(batch, channels, *space[:rank]) for batch, *space in pair]
        if rank == 1:
            alike[1] = (alike[1][0], *alike[0][1:])
        try:
            first, second = (_skeleton(capture(block, shape).output.node, exact=True) for shape in alike)
        except Exception:
            return True
        if first != second:
            return True
    try:
        capture(block, (0, *shape[1:]))
    except Refused:  # where the others are not
        return True
    except Exception:  # as of a maximum
        return False
    return False


def _branches_on_channels(block: nn.Module, channels: int, rank: int, captured: Captured) -> bool:
    """Of a block that takes maps of other channels."""
    for other in (2 * channels, channels // 2 + 1):
        try:
            found = capture(block, (BATCH, other, *captured.space))
        except Exception:
            continue
        if _skeleton(found.output.node) != _skeleton(captured.output.node):
            return True
    return False


def _skeleton(node: Node, exact: bool = False) -> Any:
    """A computation without what may depend on the sizes of the map, and without the mode of a BatchNorm. exact: with
    the numbers in it, which may depend on how many positions there are."""
    memo: dict[int, Any] = {}

    def walk(n: Node) -> Any:
        if id(n) not in memo:
            attrs: Any = n.attrs
            if n.op == "poly":
                attrs = tuple(factors for _, factors in n.attrs)
            elif n.op == "batch_norm":
                attrs = (n.attrs[0], n.attrs[2])
            elif n.op in SIZED:
                attrs = n.attrs[:1]
            children = tuple(walk(i) for i in n.inputs)
            if n.op == "poly":
                numbers = sorted(float(f"{c:.9e}") for c, _ in n.attrs) if exact else ()
                attrs, children = (len(n.attrs), *numbers), tuple(sorted(children, key=repr))
            memo[id(n)] = hash((n.op, attrs, children))
        return memo[id(n)]

    return walk(node)


#: What is said of a gate where nothing better is known.
UNKNOWN = "its gate is none that we know"

_GATES = {"sigmoid", "hard_sigmoid", "tanh", "relu6"}


def why_not(captured: Captured) -> str | None:
    """Where the output is a map times something computed from it by pooling: what keeps it from being a known block.
    None: it looks like none."""
    output = captured.output
    selected = why_no_selection(captured)
    if selected is not None:
        return [*captured.remarks, *captured.strange, selected][0]
    attends = why_no_attention(captured)
    if attends is not None:
        return [*captured.remarks, attends][0]
    if output.node.op == "poly":
        gates = [
            [n for n, _ in factors if n.op != "input"]
            for _, factors in output.node.terms
            if any(n.op == "input" for n, _ in factors)
        ]
        found = [n for factors in gates for n in factors if _is_gate(n)]
        if not found:
            return None
        for factors in gates:
            if len(set(factors)) < len(factors):
                return "second use of the gate"
    elif output.node.op == "act" and output.node.attrs[0] in _GATES and len(output.node.sizes) < 4:
        found = [output.node]
        if not _is_gate(output.node):
            return None
    else:
        return None
    if captured.remarks:
        return captured.remarks[0]
    if captured.strange:
        return captured.strange[0]
    inside = reached(found[0])
    if any(n.op == "act" and n.attrs[0] == "detach" for n in inside):
        return "detaches a branch"
    if any(n.op == "batch_norm" for n in inside) and not any(n.op == "conv" for n in inside):
        return "a BatchNorm inside its excitation"
    if not any(n.op in ("mean", "max") for n in inside):
        return "its pool is not global"
    return UNKNOWN


def _is_gate(node: Node) -> bool:
    """Something that goes through a gate's function and is pooled from the input."""
    inside = reached(node)
    pooled = any(n.op in ("mean", "max") or (n.op == "opaque" and "pool" in str(n.attrs[0])) for n in inside)
    through = any((n.op == "act" and n.attrs[0] in _GATES) or n.op == "softmax" for n in inside)
    return pooled and through and any(n.op == "input" for n in inside)
