"""What a module multiplies by a gate in its own forward, and what keeps that from being fused, as far as it can be seen
from what is computed: on tensors without data, each of which knows what it was made of.

A gate is smaller than its map, one number for all that lies along some axes of it, and comes of an input by a layer or
a function of gates; or it is a function of gates of what layers make of this map alone, a number an element. What is
multiplied in a part of somebody's is that part's.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..recipes.names import host_of
from .capture import Plainly, never_compiled
from .context import OnOneDevice
from .reads import is_torch, taken_apart
from .recognise import channel_guesses, ranks_of
from .shapes import result
from .twin import twin

#: Of a map that is tried, by rank; the second for networks that halve it several times.
_SPACES = ((13, 11, 9), (64, 96, 32))
#: By how much two maps are coarser than the finer of them.
_COARSER = ((1, 1), (2, 1), (1, 2))
_BATCH = 2
#: Parts up to which a module is tried on maps of many heights and widths.
_FEW_PARTS = 20
#: Operators up to which a module is looked at.
_MOST = 20_000

_LAYERS = {"convolution", "addmm", "mm", "bmm", "baddbmm", "linear", "native_batch_norm", "native_layer_norm"}
_GATES = {"sigmoid", "hardsigmoid", "tanh", "_softmax", "softmax", "clamp", "hardtanh", "softplus"}
_VIEWS = {"view", "_unsafe_view", "reshape", "alias", "permute", "transpose", "t", "clone", "contiguous", "expand"}
_VIEWS |= {"unsqueeze", "squeeze", "_reshape_alias", "lift_fresh", "repeat"}
_SAME = {*_VIEWS, "detach", "_to_copy"}
#: What is of norms, and what divides by them: a map that is divided by its norm is normalised, and not gated.
_NORMS = {"linalg_vector_norm", "norm", "sqrt"}
_DIVIDES = {"div", "rsqrt", "reciprocal", "pow"}
_SUMS = {"mean", "sum", "amax", "max", "linalg_vector_norm"}
_POOLS = {"mean", "sum", "amax", "max", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d"}
_POOLS |= {"adaptive_max_pool3d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices"}


@dataclass(eq=False)
class _Made:
    """A tensor: by which operator, of which others."""

    op: str
    inputs: tuple[_Made, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@never_compiled
class _Watch(TorchDispatchMode):
    """Knows what every tensor was made of. found: (map, gate) of each product of a map and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.keep: list[Tensor] = []
        self.owners: list[bool] = [True]  # whether what runs is the module's own, innermost last
        self.found: list[tuple[_Made, _Made]] = []
        self.count = 0

    def put(self, tensor: Tensor, made: _Made) -> None:
        self.made[id(tensor)] = made
        self.keep.append(tensor)

    def of(self, tensor: Tensor) -> _Made:
        if id(tensor) not in self.made:
            self.put(tensor, _Made("held", (), tuple(tensor.shape), tensor.dtype))
        return self.made[id(tensor)]

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        if self.count > _MOST:
            raise RuntimeError("it is too large")
        name = function.overloadpacket.__name__
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if torch.Tag.nondeterministic_seeded in function.tags and not any(t.is_meta for t in tensors):
            kwargs = {**kwargs, "device": "meta"}  # torch's random numbers are everybody's
        inputs = tuple(map(self.of, tensors))
        writes = name.endswith("_") and not name.endswith("__")
        out = None if writes else result(name, args, kwargs)
        out = function(*args, **kwargs) if out is None else out
        base = name[:-1] if writes else name
        made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
        # What is filled with numbers of its own is made of nothing.
        sources = () if "_like" in base or base.startswith("new_") or base in _RANDOM else inputs
        for tensor in made:
            self.put(tensor, _Made(base, sources, tuple(tensor.shape), tensor.dtype))
        if base == "mul" and len(inputs) == 2 and made and self.owners[-1] and not _is_fused():
            self._note(*inputs, tuple(made[0].shape))
        return out

    def _note(self, a: _Made, b: _Made, shape: tuple[int, ...]) -> None:
        for x, gate in ((a, b), (b, a)):
            gate = _narrow(gate)
            if x.shape != shape or len(shape) < 3:
                continue
            if _is_gate(gate, x) if _spans(gate.shape, shape) else _is_pixel_gate(gate, x):
                self.found.append((x, gate))
                return


def _is_fused() -> bool:
    """Whether it is a fused function that multiplies, as its operators do without data."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is not _Acting.run.__code__:
        if frame.f_globals.get("__name__", "").startswith(_FUSED):
            return True
        frame = frame.f_back
    return False


_FUSED = tuple(f"{__name__.partition('.')[0]}.{part}" for part in ("functional", "nn.", "ops.", "reference."))

_RANDOM = {"bernoulli", "rand", "randn", "uniform", "normal", "dropout", "native_dropout"}


def _narrow(made: _Made) -> _Made:
    """What was expanded."""
    while made.op in ("expand", "repeat", "clone", "alias") and made.inputs:
        made = made.inputs[0]
    return made


def _spans(gate: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether it is broadcast to this shape, and has samples."""
    if len(gate) != len(shape) or gate[0] != shape[0] or gate == shape:
        return False
    return all(n in (1, m) for n, m in zip(gate, shape, strict=True)) and any(n > 1 for n in gate[1:])


def _root(made: _Made) -> _Made:
    """What it is the same values of."""
    while made.op in _SAME and made.inputs:
        made = made.inputs[0]
    return made


def _views(made: _Made) -> Iterator[_Made]:
    """It and what lies between it and its root."""
    while made.op in _SAME and made.inputs:
        yield made
        made = made.inputs[0]


def _inside(gate: _Made, x: _Made) -> tuple[list[_Made], list[_Made]]:
    """What a gate is made of that is smaller than its map, and what of the rest that is made of directly."""
    small: dict[int, _Made] = {}
    large: dict[int, _Made] = {}
    waiting = [gate]
    while waiting:
        made = waiting.pop()
        if id(made) in small or id(made) in large:
            continue
        if _root(made) is _root(x) or (made.size >= x.size and made is not gate):
            large[id(made)] = made
            continue
        small[id(made)] = made
        waiting += made.inputs
    return list(small.values()), list(large.values())


def _sources(made: _Made) -> Iterator[_Made]:
    """It and all that it was made of."""
    seen: set[int] = set()
    waiting = [made]
    while waiting:
        current = waiting.pop()
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            waiting += current.inputs


def _is_given(made: _Made) -> bool:
    """Whether it comes of an input."""
    return any(source.op == "input" for source in _sources(made))


def _is_gate(gate: _Made, x: _Made) -> bool:
    if _root(gate).op in ("_softmax", "softmax") and gate.shape[1] == 1:  # the weights of a pool
        return False
    small, large = _inside(gate, x)
    ops = {made.op for made in small}
    if any(_root(made) is _root(x) for made in large):
        return bool(ops & (_LAYERS | _GATES)) or _is_of_norms(gate, x, small)
    if any(source is x for source in _sources(gate)) and _is_of_norms(gate, x, small):
        return True
    return bool(ops & _GATES) and _is_given(gate)


def _is_pixel_gate(gate: _Made, x: _Made) -> bool:
    """Whether it is a function of gates, an element each, of what layers make of this map and of no other."""
    if gate.shape != x.shape or _root(gate).op not in _GATES - {"clamp", "hardtanh", "softplus"}:
        return False
    of_map, layers = False, False
    seen: set[int] = set()
    waiting = [gate]
    while waiting:
        made = waiting.pop()
        if id(made) in seen:
            continue
        seen.add(id(made))
        if _root(made) is _root(x):
            of_map = True
        elif made.op == "input":
            return False
        else:
            layers = layers or made.op in _LAYERS
            waiting += made.inputs
    return of_map and layers


def _is_of_norms(gate: _Made, x: _Made, small: list[_Made]) -> bool:
    """Whether it is one number a channel, made of norms: of its own alone, or of all channels' too, as in response
    normalisation."""
    ops = {made.op for made in small}
    channels = gate.size // x.shape[0]
    if not ops & _NORMS or channels not in (x.shape[1], x.shape[-1]):
        return False
    of_all = (m for m in small if m.op in _SUMS and m.size == x.shape[0])
    return not ops & _DIVIDES or any(i.size == gate.size for m in of_all for i in m.inputs)


def _is_bounded(small: list[_Made]) -> bool:
    """Whether there are layers or functions of gates in what a gate is made of."""
    return any(made.op in _LAYERS | _GATES for made in small)


# Why it is left

_OF_ELEMENTS = "its gate is one number an element, in a form that is none of the known"
_OF_NORMS = "its gate is made of norms, in a form that is none of the known"


def _why(x: _Made, gate: _Made) -> str | None:
    """What of a product is none of a kind that is fused; None: nothing of what it computes."""
    if gate.shape == x.shape:
        function = _root(gate).op.strip("_")
        return f"its gate is a {function}, one number an element" if function != "sigmoid" else _OF_ELEMENTS
    small, large = _inside(gate, x)
    own = [made for made in large if _root(made) is _root(x)]
    others = [made for made in large if made not in own and _is_given(made)]
    given = [made for made in small if made.op == "input"]
    if not own:
        after = [made for made in others if any(source is x for source in _sources(made))]
        if after and not _is_bounded(small):
            return _OF_NORMS
        if after:
            weighted = any(made.op in ("mul", "masked_fill", "where") for made in after)
            return (
                "its map is weighted or masked before it is pooled"
                if weighted
                else ("its gate is computed from another function of its map")
            )
        return "its gate is computed from another map" if others else "its gate is computed from another input"
    if others:
        return "its gate is computed from more than its map"
    if given:
        return "its gate is computed from another input, too"
    path = [*small, *(view for made in own for view in _views(made))]
    if any(made.op == "detach" for made in path):
        return "detaches a branch"
    if any(made.dtype.is_floating_point and made.dtype != x.dtype for made in path):
        return "its gate is computed in another dtype than its map has"
    along = tuple(i for i, (n, m) in enumerate(zip(gate.shape, x.shape, strict=True)) if i and n == m > 1)
    space = tuple(range(1, len(x.shape)))
    last = (space[-1:], space[:-1]) if _is_last(x) else ()
    if along not in (space[:1], space[1:], *last):
        names = dict(enumerate(("channel", *_AXES[len(x.shape) - 3]), 1))
        return f"its gate is one number a {' and '.join(names[i] for i in along)}"
    pools = sorted({m.op for m in small if m.op not in _POOLS | _SAME and any(_root(i) is _root(x) for i in m.inputs)})
    if not _is_bounded(small):
        return _OF_NORMS
    if set(pools) & {"slice", "select", "split", "unbind"}:
        return "its gate is computed from a part of its map"
    if along in (space[:1], space[-1:]) and pools:
        return f"its pool is no mean and no maximum: {pools[0].strip('_')}"
    return None


def _is_last(x: _Made) -> bool:
    """Whether a map may have its channels last: it was laid so, or given."""
    ops = {made.op for made in (*_views(x), _root(x))}
    return bool(ops & {"permute", "transpose", "input", "addmm", "_unsafe_view", "native_layer_norm"})


_AXES = (("position",), ("row", "column"), ("slice", "row", "column"))


# Running it


def products_left(
    block: nn.Module, run: Callable[[nn.Module, Tensor], Any] | None = None, dims: int | None = None
) -> list[str | None] | None:
    """Of each product of a map and a gate in a module's own forward, what keeps it from being fused, if what it
    computes says so. None: no map was found that it runs on, and nothing was multiplied until it stopped.

    run: what runs in place of its forward, on maps of so many dimensions; None: of any.
    """
    best: _Watch | None = None
    taken: set[int] = set()  # ranks of maps that it runs on
    acting = _Acting(block)
    for inputs in itertools.chain(_inputs(block, run is None), _inputs_of_one_size(block, run is None)):
        if len(inputs[0]) in taken or dims not in (None, len(inputs[0])):
            continue
        if isinstance(inputs, _OfOneSize) and taken:
            break
        watch = _Watch()
        try:
            acting.run(run, watch, lambda maps: maps, inputs)
        except Exception:  # of whatever kind: it is somebody's, on maps that it may not take
            if watch.found and (best is None or len(watch.found) > len(best.found)):
                best = watch
            continue
        taken.add(len(inputs[0]))
        best = best or watch
        if watch.found:
            best = watch
            break
    if run is None and not (best is not None and best.found):
        held = _products_of_held(block)
        if held:
            return held
    return None if best is None else [_why(*pair) for pair in best.found]


def _products_of_held(block: nn.Module) -> list[str | None]:
    """The same of a module whose maps are in a list or a dictionary, which keeps all of them from being fused."""
    forward: Any = host_of(type(block)).forward
    found = taken_apart(forward)
    if found is None or sum(p.default is p.empty for p in inspect.signature(forward).parameters.values()) != 2:
        return []
    kind, count = found
    acting = _Acting(block)
    guesses = sorted(channel_guesses(block), reverse=True)
    for many in (count,) if count else (2, 3, 4):
        ranks = ranks_of(block)
        pairs = _pairs(ranks, guesses) if many == 2 else ()
        alike = ([(_BATCH, c, *_SPACES[1][:rank])] * many for rank, c in itertools.product(ranks, guesses))
        for shapes in (*alike, *pairs):
            watch = _Watch()
            with contextlib.suppress(Exception):  # of whatever kind: it is somebody's, on maps that it may not take
                acting.run(None, watch, lambda maps: [_Keyed(maps) if kind == "dict" else maps], shapes)
            if watch.found:
                return [f"takes its maps in a {'dictionary' if kind == 'dict' else 'list'}"] * len(watch.found)
    return []


class _Keyed(dict[Any, Tensor]):
    """Maps by whatever they are asked for: each name gets the next."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.rest = maps

    def __missing__(self, key: Any) -> Tensor:
        self[key] = self.rest.pop(0)
        return self[key]


def _inputs(block: nn.Module, several: bool) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what it may take."""
    places, count = _places(block, several)
    guesses = sorted(channel_guesses(block), reverse=True)  # of maps that are no wider than their layers make them
    for rank, space, channels in itertools.product(ranks_of(block), _SPACES, guesses):
        shape = (_BATCH, channels, *space[:rank])
        yield [shape] * count
        if count == 2:
            yield [shape, (_BATCH,)]
            yield [shape, (_BATCH, 1, *space[:rank])]
        if rank < 3 and count == 1:
            yield [(_BATCH, *space[:rank], channels)]
    if several and (count == 2 or (count == 1 and len(places) == 2 and places[1].default is None)):
        kinds = {type(part).__name__[-2:] for part in block.modules()}
        ranks = [rank for rank in ranks_of(block) if f"{rank}d" in kinds] or ranks_of(block)
        yield from _pairs(ranks, guesses)


class _OfOneSize(list[tuple[int, ...]]):
    """The shape of a map of a height or width that layers ask for."""


def _inputs_of_one_size(block: nn.Module, several: bool) -> Iterator[_OfOneSize]:
    """Shapes of what it may take if that is maps of one height or width only."""
    few = sum(1 for _ in block.modules()) <= _FEW_PARTS
    if _places(block, several)[1] > 1 or not few or taken_apart(host_of(type(block)).forward) is not None:
        return
    guesses = sorted(channel_guesses(block), reverse=True)
    for rank, axis, size, channels in itertools.product(ranks_of(block), (0, 1), guesses, guesses):
        if rank > 1:
            sizes = (size if i == axis else n for i, n in enumerate(_SPACES[0][:rank]))
            yield _OfOneSize([(_BATCH, channels, *sizes)])


def _places(block: nn.Module, several: bool) -> tuple[list[inspect.Parameter], int]:
    """What a forward takes by position, and how many of that it is given."""
    parameters = list(inspect.signature(host_of(type(block)).forward).parameters.values())[1:]
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in places if p.default is p.empty]
    return places, max(1, len(needed)) if several else 1


def _pairs(ranks: list[int], guesses: list[int]) -> Iterator[list[tuple[int, ...]]]:
    """Of two maps of any channels, one of them coarser by a step."""
    for rank, steps, channels in itertools.product(ranks, _COARSER, itertools.product(guesses, guesses)):
        space = _SPACES[1][:rank]
        yield [(_BATCH, c, *(n // step for n in space)) for c, step in zip(channels, steps, strict=True)]


class _Empty(dict[int, Tensor | None]):
    """For every tensor of a module one without data."""

    def get(self, key: int, default: Any = None) -> Any:
        if key not in self and isinstance(default, Tensor):
            dtype = torch.float64 if default.is_floating_point() else default.dtype
            self[key] = torch.empty(default.shape, dtype=dtype, device="meta")
        return super().get(key, default)


class _Acting:
    """Runs a stand-in of a module, one for many runs that raise: making it is most of what such a run costs."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.watch = block, _Watch()
        self.module: nn.Module | None = None

    def _called(self, part: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        owners = self.watch.owners
        owners.append(owners[-1] and is_torch(type(part)))
        try:
            return forward(*args, **kwargs)
        finally:
            owners.pop()

    def run(
        self,
        run: Callable[[nn.Module, Tensor], Any] | None,
        watch: _Watch,
        held: Callable[[list[Tensor]], list[Any]],
        shapes: Sequence[tuple[int, ...]],
    ) -> None:
        """run: as in `products_left`. held: from maps of these shapes to what it is given."""
        self.watch = watch
        if self.module is None:
            self.module = twin(self.block, _Empty(), self._called)
        for part in self.module.modules():
            part.training = False
        given = [torch.empty(shape, dtype=torch.float64, device="meta") for shape in shapes]
        for tensor in given:
            watch.put(tensor, _Made("input", (), tuple(tensor.shape), tensor.dtype))
        with torch.enable_grad(), OnOneDevice("meta"), Plainly(), watch:
            if run is None:
                host_of(type(self.block)).forward(self.module, *held(given))
            else:
                run(self.module, *held(given))
        self.module = None  # it may keep what it has computed
