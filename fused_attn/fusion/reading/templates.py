"""The blocks that are looked for: this library's own reference code, captured like anybody's."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import reference
from ...reference.select import branch_weights
from .canonical import Graph, Node
from .capture import BATCH, SPACE, Captured, capture
from .context import in_its_own_context
from .match import ANY, MARKERS, reached

ACTIVATION, GATE = MARKERS
CHANNELS, HIDDEN = 24, 6


@dataclass(frozen=True, eq=False)
class Template:
    """A block with its options. leaves: how many parameters and buffers it computes with. maps: names of those that
    stand for maps. training: as it is in training, where its BatchNorms take their statistics from the batch. batch,
    space: the map that is captured."""

    kind: str
    name: str
    build: Callable[[], nn.Module]
    options: dict[str, Any]
    rank: int
    leaves: int
    maps: tuple[str, ...] = ()
    training: bool = False
    batch: int = BATCH
    space: tuple[int, ...] = SPACE

    @functools.cached_property
    def captured(self) -> Captured:
        shape = (self.batch, CHANNELS, *self.space[: self.rank])
        with torch.device("meta"):  # which draws no random numbers
            block = self.build()
        return in_its_own_context(lambda: capture(block, shape, training=self.training, maps=self.maps))

    @property
    def output(self) -> Node:
        return self.captured.output.node

    @functools.cached_property
    def input(self) -> Node:
        """The map it is a function of; not of a selection, which has several."""
        (node,) = (n for n in reached(self.output) if n.op == "input")
        return node

    @property
    def mask(self) -> Node:
        """What the map is multiplied by, where that is one thing."""
        (node,) = (n for n in self.output.inputs if n.op != "input")
        return node

    @property
    def graph(self) -> Graph:
        return self.captured.graph


class _ChannelGate(nn.Module):
    def __init__(self, options: dict[str, Any], **shapes: tuple[int, ...] | None) -> None:
        super().__init__()
        self.options = options
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, device="meta")))

    def forward(self, x: Tensor) -> Tensor:
        weights: Any = (self.weight1, self.bias1, self.weight2, self.bias2)
        return reference.channel_gate(x, *weights, gate=GATE, **self.options)


class _SpatialGate(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block = reference.SpatialAttention(gate=GATE, return_gate=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.block(x)


_POOLS = [
    {"pool": pool, "ties": ties}
    for pool in ("avg", "max", "avgmax", "both")
    for ties in (("first",) if pool == "avg" else ("first", "even"))
]


@functools.cache
def channel_gates(rank: int) -> tuple[Template, ...]:
    return tuple(_channel_gates(rank))


def _channel_gates(rank: int) -> Iterator[Template]:
    def template(options: dict[str, Any], **shapes: tuple[int, ...] | None) -> Template:
        every: dict[str, Any] = {"weight1": None, "bias1": None, "weight2": None, "bias2": None, **shapes}
        leaves = sum(shape is not None for shape in every.values())
        return Template("channel", "ChannelGate", lambda: _ChannelGate(options, **every), options, rank, leaves)

    biases = (False, True)
    for pools in _POOLS:
        yield template(pools)
        for bias in biases:
            yield template({**pools, "layer": "conv"}, weight1=(1, 1, 3), bias1=(1,) if bias else None)
            yield template(pools, weight1=(CHANNELS, CHANNELS), bias1=(CHANNELS,) if bias else None)
        for hidden, (bias1, bias2) in itertools.product((HIDDEN, 1), itertools.product(biases, biases)):
            for activation in (ACTIVATION, "identity"):
                yield template(
                    {**pools, "activation": activation},
                    weight1=(hidden, CHANNELS),
                    bias1=(hidden,) if bias1 else None,
                    weight2=(CHANNELS, hidden),
                    bias2=(CHANNELS,) if bias2 else None,
                )


@functools.cache
def spatial_gates(rank: int) -> tuple[Template, ...]:
    found = []
    for order, bias, norm, ties in itertools.product(
        (("max", "mean"), ("mean", "max")), (False, True), (False, True), ("first", "even")
    ):
        options: dict[str, Any] = {"order": order, "ties": ties}
        build = functools.partial(_SpatialGate, bias=bias, batch_norm=norm, rank=rank, **options)
        found.append(Template("spatial", "SpatialGate", build, {**options, "norm": norm}, rank, 1 + bias + 4 * norm))
    return tuple(found)


def without_bias(cls: Callable[..., nn.Module], layers: tuple[str, ...], **options: Any) -> nn.Module:
    block = cls(**options)
    for path, layer in block.named_modules():
        if any(part in path for part in layers) and isinstance(getattr(layer, "bias", None), nn.Parameter):
            layer.bias = None
    return block


#: Modules of `fused_attn.reference` by name, with the options in which they differ, and the groups of layers that
#: may do without a bias.
MODULES: list[tuple[str, dict[str, tuple], tuple[tuple[str, ...], ...]]] = [
    (
        "BAM",
        {"num_layers": (1, 2), "dilated_convs": (1, 2, 3), "reduction": (4, CHANNELS)},
        ((), ("conv_reduce", "conv_di", "fc_0", "fc_1"), ("gate_s_conv_reduce", "gate_s_conv_di")),
    ),
    ("SCSE", {"combine": ("sum", "max"), "reduction": (4, CHANNELS)}, ((), ("",), ("sSE",), ("cSE",))),
    ("TripletAttention", {"no_spatial": (False, True), "ties": ("first", "even")}, ((),)),
    ("CoordinateAttention", {"activation": (ACTIVATION,), "gate": (GATE,)}, ((), ("conv",), ("conv1",))),
    ("SimAM", {"e_lambda": (1e-4,)}, ((),)),
    ("DoubleAttention", {"distribute": ("channels", "positions")}, ((), ("conv",))),
    ("ExternalAttention", {"memory": (64, 128, 32, 16, 8)}, ((), ("conv1",))),
    (
        "NonLocal",
        {
            "mode": ("embedded", "gaussian", "dot"),
            "batch_norm": (True, False),
            "scale": (None,),
            "pool": (None,),
        },
        ((), ("out",), ("theta", "phi", "g"), ("theta", "phi", "g", "out")),
    ),
]


@functools.cache
def modules(rank: int) -> tuple[Template, ...]:
    found = []
    for name, grid, bare in MODULES:
        for values, layers in itertools.product(itertools.product(*grid.values()), bare):
            options = dict(zip(grid, values, strict=True))
            if name in ("BAM", "DoubleAttention", "NonLocal"):
                options["rank"] = rank
            elif rank != 2 and name in ("CoordinateAttention", "ExternalAttention", "TripletAttention"):
                continue
            build = functools.partial(without_bias, getattr(reference, name), layers, channels=CHANNELS, **options)
            with torch.device("meta"):
                block = build()
            tensors = (*block.named_parameters(), *block.named_buffers())
            unread = ("num_batches_tracked", "convB.bias")  # a softmax does not see what all its logits have in common
            leaves = sum(not key.endswith(unread) for key, _ in tensors)
            options["bare"] = layers
            found.append(Template("module", name, build, options, rank, leaves))
    return tuple(found)


@functools.cache
def self_attentions(rank: int) -> tuple[Template, ...]:
    """The blocks with a parameter of their own, gamma, beside their layers."""
    found = [
        Template(
            "module", "ChannelSelfAttention", functools.partial(reference.ChannelSelfAttention, CHANNELS), {}, rank, 1
        )
    ]
    for layers in ((), ("query_conv", "key_conv"), ("",)):
        build = functools.partial(without_bias, reference.PositionAttention, layers, channels=CHANNELS, rank=rank)
        with torch.device("meta"):
            leaves = sum(1 for _ in build().parameters())
        found.append(Template("module", "PositionAttention", build, {}, rank, leaves))
    return tuple(found)


@functools.cache
def criss_crosses(rank: int) -> tuple[Template, ...]:
    """CCNet's block, applied once."""
    found = []
    for layers in ((), ("query_conv", "key_conv"), ("",)) if rank == 2 else ():
        build = functools.partial(without_bias, reference.CrissCrossAttention, layers, channels=CHANNELS, recurrence=1)
        with torch.device("meta"):
            leaves = sum(1 for _ in build().parameters())
        found.append(Template("module", "CrissCrossAttention", build, {"recurrence": 1, "bare": layers}, rank, leaves))
    return tuple(found)


class _Selection(nn.Module):
    """A selection between maps that any modules make, with any excitation but for the softmax: one layer that gives the
    logits of all branches, or one a branch."""

    def __init__(self, paths: int, groups: int, joined: bool, rank: int) -> None:
        super().__init__()
        self.groups = groups
        width = paths * CHANNELS if joined else CHANNELS
        for i in range(paths):
            shape = (BATCH, CHANNELS, *SPACE[:rank])
            self.register_parameter(f"branch{i}", nn.Parameter(torch.empty(shape, device="meta")))
        for i in range(1 if joined else paths):
            self.register_parameter(f"{ANY}{i}", nn.Parameter(torch.empty((width, CHANNELS), device="meta")))

    def forward(self, x: Tensor) -> Tensor:
        maps, layers = ([p for n, p in self.named_parameters() if n.startswith(kind)] for kind in ("branch", ANY))

        def excitation(descriptor: Tensor) -> Tensor:
            logits = torch.cat([nn.functional.linear(descriptor, layer) for layer in layers], 1)
            return branch_weights(logits, len(maps), self.groups, "softmax")

        return reference.select_with(maps, excitation)


@functools.cache
def selections(paths: int, rank: int) -> tuple[Template, ...]:
    """Of this many branches: their weights from one layer, in one group or in several, and from one layer a branch."""
    maps = tuple(f"branch{i}" for i in range(paths))
    kinds = ((1, True), (2, True), (1, False))
    return tuple(
        Template(
            "selection",
            "select",
            functools.partial(_Selection, paths, groups, joined, rank),
            {"groups": groups, "joined": joined},
            rank,
            0,
            maps,
        )
        for groups, joined in kinds
    )
