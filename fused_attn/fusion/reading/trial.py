"""The numerical check of a block in a graph: which sizes are tried, and how its nodes are run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .check import TOLERANCE, TOLERANCE_OF_SIXTHS, Run, random_tensor
from .followed import MOVES, Followed
from .region import Region

#: What stands for the batch and the sizes of a map in a graph without open sizes.
SPACE = (2, 6, 5, 4)
#: Elements of a map up to which more than one setting is tried, and up to which any is.
SMALL, MOST_ELEMENTS = 2**19, 2**23

#: The running statistics that a block reads, which have no gradient; whether each is a variance, and so positive.
Buffers = dict[fx.Node, bool]

_CASTS = {"float", "half", "bfloat16", "double"}


class Trial:
    """Checks blocks of one graph. Equal ones, which is what a network has many of, are checked once."""

    def __init__(self, seen: Followed) -> None:
        self.seen = seen
        self._verdicts: dict[Any, str | None] = {}

    def why_not(
        self, block: Region, x: fx.Node, new: Sequence[fx.Node], buffers: Buffers, sixths: bool, copies: bool = False
    ) -> str | None:
        """Why the new nodes do not compute what the block does with its map x; None where they do. copies: some are
        those of the block's own nodes, which may have sizes written down."""
        key = self._form(block, x, new, buffers)
        if key not in self._verdicts:
            tolerance = TOLERANCE_OF_SIXTHS if sixths else TOLERANCE
            self._verdicts[key] = self._compare(block, x, new, buffers, tolerance, copies)
        return self._verdicts[key]

    def _form(self, block: Region, x: fx.Node, new: Sequence[fx.Node], buffers: Buffers) -> Any:
        """Nodes, options and shapes, without names."""
        number = {x: 0}

        def numbered(n: fx.Node) -> str:
            return f"%{number.setdefault(n, len(number))}"

        lines = [
            (n.op, n.target, repr(fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: _Name(numbered(a)))), numbered(n))
            for n in (*block.nodes, *new)
        ]
        results = self.seen.results
        shapes = [[getattr(r, "shape", r) for r in tree_leaves(results[n])] for n in number if n in results]
        return tuple(lines), tuple(map(tuple, shapes)), frozenset((number.get(n), var) for n, var in buffers.items())

    def _compare(
        self, block: Region, x: fx.Node, new: Sequence[fx.Node], buffers: Buffers, tolerance: float, copies: bool
    ) -> str | None:
        generator = torch.Generator().manual_seed(0)

        def difference(setting: _Setting, ties: bool) -> str | None:
            values = dict(setting.values)
            for n, like in values.items():
                if isinstance(like, Tensor):
                    is_map = n not in buffers and like.shape == setting.values[x].shape
                    kind: Any = {"spread": 5, "ties": ties} if is_map else {"positive": buffers.get(n, False)}
                    values[n] = random_tensor(like.shape, generator, **kind)
            try:
                expected = _run(block.nodes, values, buffers, setting.numbers)
            except Exception as error:
                return f"its own nodes raise {type(error).__name__}"
            try:
                different = _run(new, values, buffers, setting.numbers if copies else {}).difference(
                    expected, tolerance
                )
            except Exception as error:
                return f"the fused form raises {type(error).__name__}: {error}"
            return different and f"another {different}"

        reason: str | None = "it is too large to be checked"
        for i, setting in enumerate(self._settings(block, x)):
            reason = difference(setting, False) or (difference(setting, True) if i == 0 else None)
            if setting.decides == (reason is not None):
                return reason
        return reason

    def _settings(self, block: Region, x: fx.Node) -> Iterator[_Setting]:
        results = self.seen.results
        own = {n: results[n] for n in (*block.stops, *block.sizes)}
        others = [{n: sizes[n] for n in own} for sizes in self.seen.other_sizes()]
        large = _largest(own) > SMALL
        if others and large:  # one setting, the smallest; smaller still where only some sizes are open
            others = [min(others, key=_largest)]
            shape, other = own[x].shape, others[0][x].shape
            open_sizes = [m for n, m in zip(shape, other, strict=True) if n != m]
            if _largest(others[0]) > SMALL:
                yield from (_smaller(others[0], x, open_sizes, joined) for joined in (False, True))
        yield from (_Setting(sizes, {}, True) for sizes in others)
        if others:
            return
        if not block.sizes and not self.seen.is_dynamic:
            for joined, kept in itertools.product((False, True), ((), own[x].shape[:1])):
                yield _smaller(own, x, kept, joined)
        if _largest(own) <= MOST_ELEMENTS:
            yield _Setting(own, {}, True)


def _largest(values: dict[fx.Node, Any]) -> int:
    return max(v.numel() for v in values.values() if isinstance(v, Tensor))


def _smaller(own: dict[fx.Node, Any], x: fx.Node, kept: Sequence[int], joined: bool) -> _Setting:
    """With small numbers in place of the batch and the sizes of the map x, but for those that are kept. joined: also in
    place of products and sums of two of them."""
    shape = own[x].shape
    fresh = (n for n in SPACE if n not in kept)
    numbers = {n: n for n in kept}
    numbers |= {n: next(fresh) for n in dict.fromkeys((shape[0], *shape[2:])) if n not in numbers and n > 1}
    batch, *space = (numbers.get(n, n) for n in (shape[0], *shape[2:]))
    numbers.setdefault(shape[2:].numel(), math.prod(space))
    for a, b in itertools.combinations((shape[0], *shape[2:]), 2) if joined else ():
        numbers.setdefault(a * b, numbers.get(a, a) * numbers.get(b, b))  # samples next to columns
        numbers.setdefault(a + b, numbers.get(a, a) + numbers.get(b, b))  # rows behind columns

    def small(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.new_empty((batch, v.shape[1], *space)) if _is_as(v.shape, shape) else v
        return numbers.get(v, v) if isinstance(v, int) and not isinstance(v, bool) else v

    return _Setting({n: small(v) for n, v in own.items()}, numbers, False)


def _is_as(shape: torch.Size, other: torch.Size) -> bool:
    """Whether it is that of a map of as many samples and as large a space."""
    return len(shape) == len(other) and shape[:1] == other[:1] and shape[2:] == other[2:]


@dataclass
class _Setting:
    """Tensors without data, or numbers, for all that a block reads; and what stands for the sizes of the graph where
    its nodes have them written down. decides: a failure with these sizes is one of the block."""

    values: dict[fx.Node, Any]
    numbers: dict[int, int]
    decides: bool


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _run(nodes: Sequence[fx.Node], values: dict[fx.Node, Any], buffers: Buffers, numbers: dict[int, int]) -> Run:
    """The last node's result, the gradients of all maps and parameters, and the buffers. numbers: what stands for those
    that are written down."""
    env = {n: t.clone() if isinstance(t, Tensor) else t for n, t in values.items()}
    leaves = {n: t.requires_grad_() for n, t in env.items() if isinstance(t, Tensor) and n not in buffers}
    env |= {n: t.clone() for n, t in leaves.items()}  # in-place operators may not write into leaves

    def here(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return numbers.get(value, value)  # type: ignore[arg-type]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def result() -> Tensor:
        for node in nodes:
            given: Any = fx.node.map_aggregate((node.args, dict(node.kwargs)), here)
            args, kwargs = given
            if isinstance(kwargs.get("device"), str):
                kwargs = {**kwargs, "device": "cpu"}
            if node.target == "to":
                args = tuple("cpu" if isinstance(a, str) else a for a in args)
            if node.op == "call_function":
                env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            elif node.target in _CASTS or node.target in MOVES:
                env[node] = args[0].double() if node.target in _CASTS else args[0]
            else:
                env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        found: Tensor = env[nodes[-1]]
        return found

    return Run.of(result, list(leaves.values()), [env[n] for n in buffers])
