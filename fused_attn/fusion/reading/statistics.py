"""Blocks whose gate is made of each channel's norm (global response normalisation, gated channel transformation) or of
its mean and deviation (SRM).

A forward whose graph holds nothing but sums, products, roots and the like, and of layers those of SRM, is held against
the known formulas, with each of its parameters in each place, by their values and gradients.
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ... import functional
from ...backends import is_small
from ...nn.response_norm import is_small_norm, is_small_transformation
from ...reference.block_attention import NORMS
from ...reference.response_norm import response, transformation
from ...reference.srm import style
from ..recipes.names import host_of
from ..recipes.recipe import OwnLayers
from ..recipes.run import Unsuited, layer_at
from .check import differences, is_same, random_tensor, randomised
from .layers import paths_but
from .nodes import name_of
from .reads import Unstored, reads_of
from .recognise import has_own_forward, once
from .trace import Rank, Untraceable, is_same_code, trace_in_mode
from .twin import NoTwin

_known: weakref.WeakKeyDictionary[type, dict[Hashable, OwnLayers | None]] = weakref.WeakKeyDictionary()


def gate_of_statistics(block: nn.Module) -> OwnLayers | None:
    """How a block runs that gates a map by its channels' norms, or their means and deviations; None: it is none."""
    if not has_own_forward(block) or not any(True for _ in _attempts(block, (1.0,))):
        return None
    try:
        read = reads_of(block)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return None
    if read.remark is not None:
        return None

    def find() -> OwnLayers | None:
        with Unstored(read.stores):
            return _found(block)
        return None

    return once(_known, block, read, find, failed=None, changed=lambda: None)


@dataclass(frozen=True)
class EnergyGate:
    """What such a block runs. form: one of `_FORMS`. names: of its parameters in the form's order. last: maps have
    their channels last."""

    form: str
    names: tuple[str, ...]
    eps: float
    last: bool

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        parameters = [getattr(block, name) for name in self.names]
        excitation, bias = _FORMS[self.form](self.eps, *(p.flatten() for p in parameters))
        x = x.to(torch.promote_types(x.dtype, parameters[0].dtype))  # as the block's own sums and products do
        if x.shape[-1 if self.last else 1] != parameters[0].numel():
            raise Unsuited(f"x: expected {parameters[0].numel()} channels; got shape {tuple(x.shape)}")
        if self.last:
            return functional.energy_gate(x.movedim(-1, 1), excitation, bias).movedim(1, -1)
        return functional.energy_gate(x, excitation, bias)


Excitation = Callable[[Tensor], Tensor]


def _response_norm(eps: float, weight: Tensor, bias: Tensor) -> tuple[Excitation, Tensor | None]:
    return lambda energy: response(energy, weight, eps), bias


def _transformation(eps: float, alpha: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Excitation, Tensor | None]:
    return lambda energy: transformation(energy, alpha, gamma, beta, eps), None


_FORMS: dict[str, Callable[..., tuple[Excitation, Tensor | None]]] = {
    "GlobalResponseNorm": _response_norm,
    "GatedChannelTransformation": _transformation,
}
_COUNTS = {"GlobalResponseNorm": 2, "GatedChannelTransformation": 3}


@dataclass(frozen=True)
class StyleGate:
    """What SRM runs. weights: path of its convolution over mean and deviation, or of the parameter (C, 2) in its place.
    norm: path of its BatchNorm. eps, correction: of its deviation, as in `style`."""

    weights: str
    norm: str
    eps: float = 0.0
    correction: int = 1
    form = "SRM"
    last = False

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        weights, norm = layer_at(block, self.weights), layer_at(block, self.norm)
        if not isinstance(weights, nn.Module):
            x = x.to(torch.promote_types(x.dtype, weights.dtype))  # as the block's own product does

        def excitation(mean: Tensor, variance: Tensor) -> Tensor:
            z = style(mean, variance, math.prod(x.shape[2:]), x.dtype, self.eps, self.correction)
            z = weights(z) if isinstance(weights, nn.Module) else (z * weights).sum(2, keepdim=True)
            z = norm(z.reshape(*z.shape, *(1,) * NORMS.index(type(norm))))
            return z.sigmoid().flatten(1)

        if x.shape[1] != norm.num_features:
            raise Unsuited(f"x: expected {norm.num_features} channels; got shape {tuple(x.shape)}")
        return functional.moments_gate(x, excitation)


Gate = EnergyGate | StyleGate
#: Of an option that says where a map has its channels.
Value = str | bool


@dataclass(frozen=True)
class WhereLarge:
    """What a block runs but for maps on which it is faster as it is written. option: the name of what it may be given
    beside the map, and the gates that it is then, by its values."""

    gate: Gate
    option: str = ""
    gates: tuple[tuple[Value, Gate], ...] = ()

    def __call__(self, block: nn.Module, x: Tensor, **given: Any) -> Tensor:
        gate = self._of(given[self.option]) if given else self.gate
        if _IS_SMALL[gate.form](x):
            raise Unsuited("x: is small")
        return gate(block, x)

    def _of(self, value: Any) -> Gate:
        for known, gate in self.gates:
            if type(known) is type(value) and known == value:
                return gate
        raise Unsuited(f"{self.option}: expected one of {', '.join(repr(v) for v, _ in self.gates)}; got {value!r}")


_IS_SMALL: dict[str, Callable[[Any], bool]] = {
    "GlobalResponseNorm": is_small_norm,
    "GatedChannelTransformation": is_small_transformation,
    "SRM": is_small,
}

#: What may be in the graph of such a forward: each smooth where a norm is not 0, so that formulas that agree on random
#: maps are the same.
_NAMES = {
    *("norm", "vector_norm", "linalg_vector_norm", "mean", "std", "var", "sum"),
    *("pow", "square", "sqrt", "rsqrt", "tanh"),
    *("add", "sub", "mul", "truediv", "div", "addcmul", "multiply", "divide", "sigmoid", "cat", "stack"),
    *("getattr", "getitem", "size", "view", "reshape", "flatten", "unsqueeze", "squeeze", "expand_as", "expand"),
    "unpacked",
}

#: Batches and spaces of the maps that a block is tried on, of which it has to take the first two.
_MAPS = ((2, 6, 5, 4), (3, 7, 9, 3), (1, 1, 3, 2), (2, 1, 1, 1))
_MOST_EPS = 0.01


def _attempts(block: nn.Module, floats: Collection[float]) -> Iterator[Gate]:
    """What it may be. floats: that may be its eps."""
    parameters = {n: p for n, p in block._parameters.items() if p is not None}
    flat = all(max(p.shape, default=0) == p.numel() > 1 for p in parameters.values())
    if not block._modules and flat and len({p.numel() for p in parameters.values()}) == 1:
        for form, count in _COUNTS.items():
            if count == len(parameters):
                for order, eps, last in itertools.product(itertools.permutations(parameters), floats, (False, True)):
                    yield EnergyGate(form, order, eps, last)
    norms = [n for n, part in block._modules.items() if type(part) in NORMS]
    weights = [n for n, part in block._modules.items() if type(part) is nn.Conv1d and part.kernel_size == (2,)]
    weights += [n for n, p in parameters.items() if p.dim() == 2 and p.shape[1] == 2]
    if len(norms) == len(weights) == 1:
        for eps, correction in itertools.product((0.0, *floats), (1, 0)):
            yield StyleGate(weights[0], norms[0], eps, correction)


def _found(block: nn.Module) -> OwnLayers | None:
    for dims in (4, 5, 3):
        gate = _gate_of(block, dims, {})
        if gate is not None:
            recipe = _recipe(block, gate, dims)
            option, default, others = _option_of(block) if isinstance(gate, EnergyGate) else _NO_OPTION
            found = [(value, _gate_of(block, dims, {option: value})) for value in others]
            gates = [(value, other) for value, other in found if other is not None and other.form == gate.form]
            if not gates:
                return recipe
            return replace(recipe, forward=WhereLarge(gate, option, ((default, gate), *gates)), options=(option,))
    return None


_NO_OPTION: tuple[str, Any, list[Value]] = ("", None, [])


def _option_of(block: nn.Module) -> tuple[str, Any, list[Value]]:
    """The name of the one option of a forward, if it is a word or a truth value, its default, and what else it may be:
    what the forward has written down."""
    forward: Any = host_of(type(block)).forward
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    if len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        name, default = parameters[0].name, parameters[0].default
        if isinstance(default, bool):
            return name, default, [not default]
        if isinstance(default, str) and inspect.isfunction(forward):
            words = dict.fromkeys(word for word in forward.__code__.co_consts if isinstance(word, str))
            others: list[Value] = [word for word in words if word not in (default, forward.__doc__)]
            return name, default, others[:_MOST_WORDS]
    return _NO_OPTION


_MOST_WORDS = 4


def _gate_of(block: nn.Module, dims: int, given: dict[str, Any]) -> Gate | None:
    """The gate that a forward is for maps of so many dimensions, given this beside them; None: it is none."""
    rank = Rank(dims)
    try:
        graph, other = (trace_in_mode(block, lambda p: False, training, rank, **given) for training in (False, True))
    except Untraceable:
        if not given:
            raise
        return None
    if not is_same_code(graph, other) or not all(_is_smooth(block, node) for node in graph.nodes):
        return None
    attempts = _attempts(block, sorted(set(_floats_in(graph))))
    return next((gate for gate in attempts if _is_gate(block, gate, dims, given)), None)


def _is_smooth(block: nn.Module, node: fx.Node) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op == "call_module":
        return type(block.get_submodule(str(node.target))) in (nn.Conv1d, nn.Sigmoid, *NORMS)
    return name_of(node) in _NAMES


def _floats_in(graph: fx.Graph) -> Iterator[float]:
    for node in graph.nodes:
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, float) and 0 < value < _MOST_EPS:
                yield value


def _shape(gate: Gate, batch: int, channels: int, space: list[int]) -> tuple[int, ...]:
    return (batch, *space, channels) if gate.last else (batch, channels, *space)


def _is_gate(block: nn.Module, gate: Gate, dims: int, given: dict[str, Any]) -> bool:
    channels = max(n for p in block.parameters() for n in p.shape)
    try:
        original, fused = randomised(block), randomised(block)
    except NoTwin:
        return False
    shapes = [(_shape(gate, b, channels, s[: dims - 2]), i < 2) for i, (b, *s) in enumerate(_MAPS)]
    x = random_tensor(shapes[0][0], torch.Generator().manual_seed(2), spread=5)
    for part in (original, fused):
        part.eval()
    try:
        with torch.no_grad():
            if not is_same(gate(fused, x), original(x, **given)):  # which is most of the attempts
                return False
    except Exception:  # on a map that it does not take
        return False
    why = differences((original, lambda m, x: m(x, **given)), (fused, gate), iter(shapes), "the known block")
    return why is None and _same_dtypes(block, gate, shapes[0][0], given)


def _recipe(block: nn.Module, gate: Gate, dims: int) -> OwnLayers:
    if isinstance(gate, EnergyGate):
        return OwnLayers(WhereLarge(gate), gate.form, ("select/energy", "scale"), rank=dims)
    bypassed = paths_but(block, gate.weights, gate.norm)
    functions = "norm_gate/moments", "scale"
    return OwnLayers(WhereLarge(gate), gate.form, functions, rank=dims, bypassed=bypassed)


def _same_dtypes(block: nn.Module, gate: Gate, shape: tuple[int, ...], given: dict[str, Any]) -> bool:
    """Whether both give the same dtype, also under autocast and for half precision."""
    acting = randomised(block).eval()
    for own, dtype, autocast in (
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
    ):
        acting.to(own)
        x = torch.ones(shape, dtype=dtype, device="cpu")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if acting(x, **given).dtype != gate(acting, x).dtype:
                return False
    return True
