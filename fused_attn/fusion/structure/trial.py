"""The numerical check that a block in a graph has to pass: its nodes against the fused call, on random data in float64
on the CPU, values and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .check import TOLERANCE, TOLERANCE_OF_SIXTHS, is_same
from .followed import Followed
from .region import Region

#: What stands for the batch and the sizes of a map in a graph without open sizes.
SPACE = (2, 6, 5, 4)
#: Elements of a map up to which more than one setting is tried, and up to which any is.
SMALL, MOST_ELEMENTS = 2**19, 2**23

#: The running statistics that a block reads, which have no gradient; whether each is a variance, and so positive.
Buffers = dict[fx.Node, bool]

_CASTS = {"float", "half", "bfloat16", "double"}
_MOVES = {"cuda", "cpu", "xpu"}


class Trial:
    """Checks blocks of one graph. Equal ones, which is what a network has many of, are checked once."""

    def __init__(self, seen: Followed) -> None:
        self.seen = seen
        self._verdicts: dict[Any, str | None] = {}

    def why_not(
        self,
        block: Region,
        x: fx.Node,
        new: Sequence[fx.Node],
        buffers: Buffers,
        sixths: bool,
    ) -> str | None:
        """Why the new nodes do not compute what the block does; None where they do.

        x: the map.
        """
        key = self._form(block, x, new, buffers)
        if key not in self._verdicts:
            tolerance = TOLERANCE_OF_SIXTHS if sixths else TOLERANCE
            self._verdicts[key] = self._compare(block, x, new, buffers, tolerance)
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
        shapes = [tuple(r.shape) if isinstance(r := results[n], Tensor) else r for n in number if n in results]
        return tuple(lines), tuple(shapes), frozenset((number.get(n), var) for n, var in buffers.items())

    def _compare(
        self, block: Region, x: fx.Node, new: Sequence[fx.Node], buffers: Buffers, tolerance: float
    ) -> str | None:
        generator = torch.Generator().manual_seed(0)
        reason: str | None = "it is too large to be checked"
        for i, setting in enumerate(self._settings(block, x)):
            for ties in (False, True) if i == 0 else (False,):
                shape = setting.values[x].shape
                tensors = {
                    n: _random(v, buffers.get(n, False), n not in buffers and v.shape == shape, ties, generator)
                    if isinstance(v, Tensor)
                    else v
                    for n, v in setting.values.items()
                }
                reason = _differ(block, new, tensors, set(buffers), setting.numbers, tolerance)
                if reason is not None:
                    break
            if setting.decides == (reason is not None):
                return reason
        return reason

    def _settings(self, block: Region, x: fx.Node) -> Iterator[_Setting]:
        results = self.seen.results
        own = {n: results[n] for n in (*block.stops, *block.sizes)}
        others = self.seen.other_sizes()
        for sizes in others if own[x].numel() <= SMALL else others[:1]:
            yield _Setting({n: sizes[n] for n in own}, {}, True)
        if others:
            return
        shape = own[x].shape
        if not block.sizes and not self.seen.is_dynamic:
            for kept in ((), shape[:1]):
                fresh = iter(SPACE)
                numbers = {n: n for n in kept}
                numbers |= {n: next(fresh) for n in dict.fromkeys((shape[0], *shape[2:])) if n not in numbers and n > 1}
                space = [numbers.get(n, n) for n in shape[2:]]
                small = own[x].new_empty((numbers.get(shape[0], shape[0]), shape[1], *space))
                numbers.setdefault(shape[2:].numel(), small.shape[2:].numel())
                yield _Setting({n: small if v.shape == shape else v for n, v in own.items()}, numbers, False)
        if shape.numel() <= MOST_ELEMENTS:
            yield _Setting(own, {}, True)


@dataclass
class _Setting:
    """Tensors without data, or numbers, for all that a block reads; and what stands for the sizes of the graph where
    its nodes have them written down. decides: a failure with these sizes is one of the block."""

    values: dict[fx.Node, Any]
    numbers: dict[int, int]
    decides: bool


def _random(like: Tensor, positive: bool, is_map: bool, ties: bool, generator: torch.Generator) -> Tensor:
    t = torch.rand(like.shape, generator=generator, dtype=torch.float64, device="cpu")
    if positive:
        return t + 0.5
    if is_map and ties:
        return ((t - 0.5) * 5).round()
    return (t - 0.5) * (5 if is_map else 1.5)


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _differ(
    block: Region,
    new: Sequence[fx.Node],
    tensors: dict[fx.Node, Any],
    fixed: set[fx.Node],
    numbers: dict[int, int],
    tolerance: float,
) -> str | None:
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            expected = _run(block.nodes, tensors, fixed, numbers)
        except Exception as error:
            return f"its own nodes raise {type(error).__name__}"
        try:
            actual = _run(new, tensors, fixed, {})
        except Exception as error:
            return f"the fused form raises {type(error).__name__}: {error}"
    for what in ("result", "gradient", "buffer"):
        a, b = actual[what], expected[what]
        if len(a) != len(b) or not all(is_same(*pair, tolerance) for pair in zip(a, b, strict=True)):
            return f"another {what}"
    return None


def _run(
    nodes: Sequence[fx.Node], tensors: dict[fx.Node, Any], fixed: set[fx.Node], numbers: dict[int, int]
) -> dict[str, list[Tensor]]:
    """The result of the last node, the gradients of all maps and parameters, and the buffers as they are then."""
    env: dict[fx.Node, Any] = {n: t.clone() if isinstance(t, Tensor) else t for n, t in tensors.items()}
    leaves = [t.requires_grad_() for n, t in env.items() if isinstance(t, Tensor) and n not in fixed]
    # In-place operators may not write into leaves.
    env |= {n: t.clone() for n, t in env.items() if isinstance(t, Tensor) and n not in fixed}

    def here(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return numbers.get(value, value)  # type: ignore[arg-type]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    for node in nodes:
        given: Any = fx.node.map_aggregate(
            fx.node.map_aggregate((node.args, dict(node.kwargs)), here),
            lambda a: env[a] if isinstance(a, fx.Node) else a,
        )
        args, kwargs = given
        if node.op == "call_function":
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.target in _CASTS or node.target in _MOVES:
            env[node] = args[0].double() if node.target in _CASTS else args[0]
        else:
            env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    y = env[nodes[-1]]
    weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64, device="cpu") + 0.5
    grads = torch.autograd.grad(y, leaves, weights.to(y.dtype), allow_unused=True) if y.requires_grad else ()
    return {
        "result": [y.detach()],
        "gradient": [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=False)],
        "buffer": [env[n] for n in tensors if n in fixed],
    }
