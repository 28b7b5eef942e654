"""From a match to the recipe that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as fused_nn
from ... import reference
from ...reference.block_attention import CONVOLUTIONS, NORMS
from ..recipes import masks
from ..recipes.own import AS_IN_NN
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate
from . import templates
from .attentions import find_attentions
from .canonical import Node, Spread, Unsupported, Value
from .capture import Captured
from .layers import paths_but
from .match import Match, reached, unify
from .selections import Elsewhere, find_selections, program_of
from .templates import Template

Maker = Callable[[nn.Module], "Recipe | str"]


@dataclass(frozen=True)
class Found:
    """A recognised computation. mask: it is a gate alone, in this layout of its axes."""

    kind: str  # "channel", "spatial", "cbam", "selection" or the class's name
    recipe: Maker
    mask: bool = False


def _plain_output(value: Value, like: Node) -> bool:
    rank = len(like.sizes)
    return value.node.sizes == like.sizes and value.layout == tuple((i,) for i in range(rank))


def find(captured: Captured, rank: int) -> Iterator[Found]:
    """What the output of a capture is, of the blocks in `templates`; best first."""
    output = captured.output
    every = reached(output.node)
    inputs = [n for n in every if n.op == "input"]
    if len(inputs) != 1:
        return
    (x,) = inputs
    for maker in find_selections(captured, x, rank):
        yield Found("selection", maker)
    leaves = sum(n.op == "leaf" for n in every)
    if _plain_output(output, x):
        yield from _blocks(captured, x, leaves, rank)
    else:
        yield from _masks(captured, x, leaves, rank)
    for maker in find_attentions(captured, x, rank):
        yield Found("attention", maker)


def _blocks(captured: Captured, x: Node, leaves: int, rank: int) -> Iterator[Found]:
    """Whose result is a map like theirs."""
    graph, output = captured.graph, captured.output
    for node, adds_input in _residual(captured, output.node, x):
        yield from _gates(captured, node, x, leaves, rank, adds_input)
        for template in templates.modules(rank):
            if template.leaves == leaves and (not adds_input or template.name == "DoubleAttention"):
                for match in unify(template.output, node, graph, Match()):
                    if match.nodes.get(template.input) is x:
                        yield Found(template.name, _shell(template, match, rank, x.sizes[1], adds_input))
                        break
        if adds_input:
            continue
        for template in templates.self_attentions(rank):
            if template.leaves == leaves:
                for match in unify(template.output, node, graph, Match()):
                    if match.nodes.get(template.input) is x:
                        yield Found(template.name, _self_attention(template, match, rank))
                        break


def _residual(captured: Captured, node: Node, x: Node) -> Iterator[tuple[Node, bool]]:
    """The output, and the output without the input that it adds."""
    yield node, False
    if node.op == "poly":
        identity = (x, tuple(range(len(x.sizes))))
        rest = [(c, tuple(f)) for c, f in node.terms if (c, f) != (1.0, [identity])]
        if rest and len(rest) < len(node.terms):
            try:
                inner, order = captured.graph.poly(rest, node.sizes)
            except Unsupported:
                return
            if order == tuple(range(len(node.sizes))):
                yield inner, True


def _gates(
    captured: Captured,
    node: Node,
    x: Node,
    leaves: int,
    rank: int,
    adds_input: bool,
    kinds: str = "channel spatial cbam",
) -> Iterator[Found]:
    graph = captured.graph
    if node.op != "poly":
        return
    if "channel" in kinds:
        for template in templates.channel_gates(rank):
            if template.leaves == leaves:
                for match in unify(template.output, node, graph, Match()):
                    if match.nodes.get(template.input) is x:
                        yield Found(
                            "channel", _constant(replace(_channel(template, match, rank), adds_input=adds_input))
                        )
                        break
        if kinds != "channel":
            yield from _split(captured, node, x, rank, adds_input)
    if "spatial" not in kinds:
        return
    for template in templates.spatial_gates(rank):
        if template.leaves > leaves:
            continue
        for match in unify(template.output, node, graph, Match()):
            gated = match.nodes.get(template.input)
            if gated is None:
                continue
            spatial = _spatial(template, match, rank, adds_input)
            if gated is x:
                yield Found("spatial", spatial)
                break
            for channel in _gates(captured, gated, x, leaves - template.leaves, rank, False, "channel"):
                yield Found("cbam", _both(channel.recipe, spatial))
                return


def _split(captured: Captured, node: Node, x: Node, rank: int, adds_input: bool) -> Iterator[Found]:
    """A gate that the block's own layers make of the mean of its map, whatever they are."""
    axes = tuple(range(rank + 2))
    ((coefficient, factors),) = node.terms if len(node.terms) == 1 else [(0.0, [])]
    gates = [n for n, places in factors if places == axes[:2]]
    if coefficient != 1 or len(factors) != 2 or len(gates) != 1 or (x, axes) not in factors:
        return
    means = [n for n in reached(gates[0]) if (n.op, n.inputs, n.attrs) == ("mean", (x,), (axes[2:],))]
    if len(means) != 1 or any(n is x for n in reached(gates[0], means[0])):
        return
    try:
        program = program_of(captured.calls, means[0], gates)
    except Elsewhere:
        return

    def make(block: nn.Module) -> Recipe:
        bypassed = paths_but(block, *program.paths)
        return SplitGate(program.only, adds_input=adds_input, rank=rank + 2, bypassed=bypassed)

    yield Found("channel", make)


def _masks(captured: Captured, x: Node, leaves: int, rank: int) -> Iterator[Found]:
    node, layout = captured.output.node, captured.output.layout
    if len(layout) not in (2, rank + 2):
        return
    wide = tuple(isinstance(e, Spread) for e in layout)
    bare = tuple(() if isinstance(e, Spread) else e for e in layout)
    space = len(layout) - 2
    channel = bare == ((0,), (1,), *((),) * space)
    spatial = bare == ((0,), (), *((i + 1,) for i in range(rank)))
    for template in templates.channel_gates(rank) if channel else templates.spatial_gates(rank) if spatial else ():
        if template.leaves != leaves:
            continue
        for match in unify(template.mask, node, captured.graph, Match()):
            if match.nodes.get(template.input) is not x:
                continue
            shape = "expanded" if any(wide) else "flat" if len(layout) == 2 else "kept"
            if channel:
                yield Found("channel", _channel_mask(_channel(template, match, rank), shape), True)
            else:
                yield Found("spatial", _spatial_mask(_spatial(template, match, rank, False), shape), True)
            break


def scale_of(match: Match) -> float:
    """Of the products in a softmax, that of which the match has the first nine digits."""
    widths = [n.inputs[0].sizes[axis] for t, n in match.nodes.items() if t.op == "product" for axis in n.attrs[0][2]]
    channels = [n.sizes[1] for t, n in match.nodes.items() if t.op == "input"]
    exact = [width**-0.5 for width in (*widths, *channels)]
    return next((scale for scale in exact if float(f"{scale:.9g}") == match.scale), match.scale)


def _self_attention(template: Template, match: Match, rank: int) -> Maker:
    """A block that is made of its own layers and gamma."""
    leaves = match.leaves()
    gamma = leaves.pop("gamma")
    layers: dict[str, str] = {}
    named = True
    for name, path in leaves.items():
        ours, _, what = name.rpartition(".")
        theirs, _, same = path.rpartition(".")
        named = named and theirs != "" and same == what and layers.setdefault(ours, theirs) == theirs
    paths = tuple(layers[f"{name}_conv"] for name in ("query", "key", "value")) if layers else ()
    functions, _ = AS_IN_NN[getattr(reference, template.name)]

    def make(block: nn.Module) -> Recipe | str:
        if not named:
            return "its parameters are not in layers of their own"
        for path in paths:
            layer = block.get_submodule(path)
            if type(layer) not in CONVOLUTIONS:
                return f"{path} is a {type(layer).__name__}, not a plain layer"
        return OwnLayers(
            masks.SelfAttention(gamma, paths, scale_of(match)),
            template.name,
            functions,
            rank=rank + 2,
            bypassed=paths_but(block, *paths),
            whole=True,
        )

    return make


def _constant(recipe: Recipe) -> Maker:
    return lambda block: recipe


def _channel(template: Template, match: Match, rank: int) -> ChannelGate:
    options = {k: v for k, v in template.options.items() if k != "activation"}
    activation = match.options.get("activation", "identity")
    paths: dict[str, Any] = dict(match.leaves())
    return ChannelGate(**paths, **options, activation=activation, gate=match.options["gate"], rank=rank + 2)


def _spatial(template: Template, match: Match, rank: int, adds_input: bool) -> Maker:
    leaves = match.leaves()
    conv_weight = next(t for t in match.nodes if t.name in ("block.conv.weight", "block.conv.conv.weight"))
    conv = next(c for t, c in match.nodes.items() if t.op == "conv" and conv_weight in t.inputs)
    norms = {path.rpartition(".")[0] for name, path in leaves.items() if ".bn." in name}
    convs = {path.rpartition(".")[0] for name, path in leaves.items() if ".bn." not in name}
    layers: Any = (*convs, *norms)
    plain = conv.options == ((1,) * rank, 1, conv.options[2]) and all(k % 2 for k in conv.options[2])
    expected = {name: name.rpartition(".")[2] for name in leaves}
    named = all(path.rpartition(".")[2] == expected[name] for name, path in leaves.items())

    def make(block: nn.Module) -> Recipe | str:
        if not plain:
            return "its convolution is dilated or even"
        if len(convs) != 1 or len(norms) > 1 or not named or "" in layers:
            return "its convolution is no layer of its own"
        kinds = [type(block.get_submodule(path)) for path in layers]
        if kinds[0] not in CONVOLUTIONS or (len(kinds) > 1 and kinds[1] not in NORMS):
            return f"{layers[-1]} is a {kinds[-1].__name__}, not a plain layer"
        return SpatialGate(
            layers,
            order=template.options["order"],
            ties=template.options["ties"],
            gate=match.options["gate"],
            adds_input=adds_input,
            rank=rank + 2,
        )

    return make


def _both(channel: Maker, spatial: Maker) -> Maker:
    def make(block: nn.Module) -> Recipe | str:
        first, second = channel(block), spatial(block)
        if isinstance(second, str):
            return second
        assert isinstance(first, ChannelGate) and isinstance(second, SpatialGate)
        return CbamGate(first, second)

    return make


def _every_part(block: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, part in block.named_modules() if part is not block)


def _channel_mask(gate: ChannelGate, shape: str) -> Maker:
    def make(block: nn.Module) -> Recipe | str:
        return OwnLayers(
            masks.ChannelMask(gate, shape),
            "gate of a channel attention",
            ("squeeze",),
            rank=gate.rank,
            bypassed=_every_part(block),
            whole=True,
        )

    return make


def _spatial_mask(spatial: Maker, shape: str) -> Maker:
    def make(block: nn.Module) -> Recipe | str:
        gate = spatial(block)
        if not isinstance(gate, SpatialGate):
            return gate
        run = tuple(path for path in gate.layers[1:])
        bypassed = tuple(name for name in _every_part(block) if name not in run)
        name = "gate of a spatial attention"
        return OwnLayers(
            masks.SpatialMask(gate, shape), name, ("channel_pool",), rank=gate.rank, bypassed=bypassed, whole=True
        )

    return make


# Blocks that run as a module of fused_attn.nn with their own layers in it


class _Reshaped(nn.Module):
    """A layer that takes descriptors in another shape than it gets them: (B, C) or (B, C, 1, ...)."""

    def __init__(self, layer: nn.Module, flat_inside: bool, rank: int) -> None:
        super().__init__()
        self.layer, self.flat_inside, self.rank = layer, flat_inside, rank

    def forward(self, x: Tensor) -> Tensor:
        if self.flat_inside:
            return self.layer(x.movedim(1, -1)).movedim(-1, 1)
        return self.layer(x.reshape(*x.shape, *(1,) * self.rank)).flatten(1)


_DENSE = (nn.Linear, *CONVOLUTIONS)


def _shell(template: Template, match: Match, rank: int, channels: int, adds_input: bool) -> Maker:
    paths: dict[str, set[str]] = {}
    for name, path in match.leaves().items():
        ours, _, what = name.rpartition(".")
        theirs, _, same = path.rpartition(".")
        paths.setdefault(ours, set()).add(theirs if same == what else "")
    options = {**template.options, **match.options}
    layers = options.pop("bare")
    cls = getattr(fused_nn, template.name)

    def make(block: nn.Module) -> Recipe | str:
        with torch.device("meta"):  # which draws no random numbers; its layers give way to the block's
            shell = templates.without_bias(cls, layers, channels=templates.CHANNELS, **options)
        # Triplet attention takes any channels, and so does what has no parameters.
        shell.channels = channels if paths and template.name != "TripletAttention" else None  # type: ignore[assignment]
        if template.name == "NonLocal":
            shell.scale = scale_of(match)  # type: ignore[assignment]
        used: list[str] = []
        for ours, found in paths.items():
            if len(found) != 1 or "" in found:
                return "its parameters are not in layers of their own"
            (path,) = found
            layer, place = block.get_submodule(path), shell.get_submodule(ours)
            shim = _fitting(layer, place, template.name)
            if shim is None:
                return f"{path} is a {type(layer).__name__}, not a plain layer"
            parent, _, last = ours.rpartition(".")
            shell.get_submodule(parent)._modules[last] = shim
            used.append(path)
        forward = masks.Shell(shell, adds_input)
        bypassed = tuple(name for name in _every_part(block) if name not in used)
        ours = getattr(reference, template.name)
        functions, fixed = AS_IN_NN[ours]
        return OwnLayers(
            forward, template.name, functions, adds_input, rank=fixed or rank + 2, bypassed=bypassed, whole=True
        )

    def _fitting(layer: nn.Module, place: nn.Module, name: str) -> nn.Module | None:
        if type(layer) is type(place):
            return layer
        if name == "SCSE":  # it reads weights only
            return layer if type(layer) in _DENSE else None
        kinds = (_DENSE, (*NORMS,))
        if not any(type(layer) in kind and type(place) in kind for kind in kinds):
            return None
        flat_place = type(place) in (nn.Linear, nn.BatchNorm1d) and rank != 1
        flat_layer = type(layer) in (nn.Linear, nn.BatchNorm1d)
        if flat_place == flat_layer:
            return None
        return _Reshaped(layer, flat_layer, rank)

    return make
