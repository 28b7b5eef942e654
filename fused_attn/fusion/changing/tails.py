"""Tails of residual blocks: BatchNorm, activation, attention, sum and activation as one `functional.norm_gate`.

An adapter here is for a whole residual block of a host library. The block's convolutions, its shortcut and what it
drops run as they are; a tail's layers are bypassed, and read at every call. The block's other BatchNorms are one op
with the activation behind them in training, where that spares passes and, with any activation but a ReLU, a map.

Where the block is to save the least, its convolutions keep how their inputs are made again (ops/remake.py): those that
an op here gives, and the sum of the block before, where that keeps its shortcut anyway: of maps that are sums of each
other every second one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...codes import FUNCTIONS
from ...nn.normalised import affine_of, norm_gate
from ...nn.pointwise import is_hooked
from ...ops.remake import is_kept, through
from ...reference.block_attention import uses_batch_statistics
from ...reference.channel_gate import excite
from ..hosts.registry import TAILS, recognise, register
from ..reading.layers import activation_name
from ..recipes.names import class_name, qualified_name
from ..recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate, SplitGate
from ..recipes.run import Paths, layer_at, parameter_paths, parameters_of, run_gate
from .plan import intact, plan_of

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_ACTS = tuple(f"timm.layers.norm_act.{name}" for name in ("BatchNormAct2d", "SyncBatchNormAct"))


@dataclass(frozen=True)
class Tail:
    """Paths in a block of a BatchNorm and of the attention behind it (None: none), the recipe of that, the names of the
    activations before and after the gate, the layers that are not run, and whether the sum keeps the map's dtype. With
    a gate that `functional.norm_gate` does not have, the BatchNorm is part of the op only with running statistics.
    parameters: `parameter_paths` of the recipe.
    drop: the path of a layer that drops paths before the sum; while it does, it and what follows it run as they are."""

    norm: str
    gate: str | None
    recipe: ChannelGate | SpatialGate | CbamGate | SplitGate | None
    activation: str
    post_activation: str
    bypassed: tuple[str, ...]
    in_place: bool = False
    parameters: Paths = ()
    drop: str | None = None

    def __call__(
        self, block: nn.Module, x: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor:
        """shortcut: the map that the block was called with."""
        drop = None if self.drop is None else layer_at(block, self.drop)
        dropping = drop is not None and drop.training
        # Of two dtypes: autocast, and a shortcut that it left alone.
        if residual is None or (residual.dtype == x.dtype and not dropping):
            again = residual is None or (residual is shortcut and self.forgets and is_kept(residual))
            return self._run(block, x, residual, self.post_activation, again)
        y = self._run(block, x, None, "identity", False)
        if drop is not None:
            y = drop(y)
        y = y + residual
        return FUNCTIONS[self.post_activation](y.to(x.dtype) if self.in_place else y)

    @property
    def forgets(self) -> bool:
        """Whether its backward does not need the residual."""
        return self.post_activation in ("identity", "relu")

    def _run(self, block: nn.Module, x: Tensor, residual: Tensor | None, post_activation: str, again: bool) -> Tensor:
        """again: what layers keep of the result may be how it is made again."""
        norm = layer_at(block, self.norm)
        if residual is None and self.gate is None and self.activation == post_activation == "identity":
            return norm(x)  # there is nothing to fuse it with
        gate: Any = None if self.gate is None else layer_at(block, self.gate)
        common: dict[str, Any] = {"residual": residual, "post_activation": post_activation}
        of_batch = uses_batch_statistics(norm)
        one_op = not (of_batch and _is_in_norm_gate(self.recipe))
        if isinstance(self.recipe, (ChannelGate, SpatialGate, CbamGate)) and one_op:
            if of_batch:
                x = norm(x)
            else:
                common.update(affine=affine_of(norm), pre_activation=self.activation)
            return run_gate(gate, self.recipe, parameters_of(gate, self.parameters), x, **common)
        excitation = None if gate is None else self._excitation(gate)
        common["save"] = "least" if again and saves_least(block) else "all"
        return norm_gate(norm, x, activation=self.activation, excitation=excitation, group=_group(norm), **common)

    def _excitation(self, gate: nn.Module) -> Callable[[Tensor], Tensor]:
        recipe = self.recipe
        if isinstance(recipe, SplitGate):
            return lambda s: recipe.excite(gate, s)
        assert isinstance(recipe, ChannelGate)
        weights = parameters_of(gate, self.parameters)
        return lambda s: FUNCTIONS[recipe.gate](excite(s, *weights, layer=recipe.layer, activation=recipe.activation))

    def describe(self) -> str:
        drop = "drop path" if self.drop else ""
        gate = {CbamGate: "CBAM", SpatialGate: "spatial gate", type(None): ""}.get(type(self.recipe), "gate")
        parts = (self.activation, gate, drop, self.post_activation)
        return " -> ".join(["BatchNorm", *(part for part in parts if part not in ("", "identity"))])


@dataclass(frozen=True)
class Pair:
    """A BatchNorm and the activation behind it, in a block that has a tail. With running statistics the layers run as
    they are: the BatchNorm would have to be folded at every call, which on small maps costs more than the two passes
    that it spares; unless that would keep a map more. tail: None where they always do."""

    layers: tuple[str, ...]
    tail: Tail | None

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.tail is not None and (uses_batch_statistics(layer_at(block, self.tail.norm)) or spares(block)):
            return self.tail(block, x)
        for path in self.layers:
            x = layer_at(block, path)(x)
        return x


def saves_least(block: nn.Module) -> bool:
    plan = plan_of(block)
    return plan is not None and isinstance(plan.recipe, OwnLayers) and plan.recipe.save == "least"


def spares(block: nn.Module) -> bool:
    """Whether it matters now what a block keeps, and it is to be the least."""
    return torch.is_grad_enabled() and saves_least(block) and not torch.compiler.is_compiling()


def _call(block: nn.Module, layer: Any, y: Tensor) -> Tensor:
    return through(layer, y) if spares(block) else layer(y)


def _is_in_norm_gate(recipe: Recipe | None) -> bool:
    """Whether `functional.norm_gate` has this gate."""
    return isinstance(recipe, (ChannelGate, SplitGate)) and recipe.pool == "avg"


def _group(norm: Any) -> Any:
    """The process group whose statistics a SyncBatchNorm takes; None where it takes its own batch's."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _found(block: nn.Module, path: str) -> Any:
    """The layer at a path; None where there is none or it is the identity."""
    layer: Any = block
    for part in path.split("."):
        layer = None if layer is None else layer._modules.get(part)
    return None if type(layer) is nn.Identity else layer


def _find(
    block: nn.Module,
    norm: str,
    *,
    activation: str | None = None,
    gate: str | None = None,
    post: str | None = None,
    in_place: bool = False,
) -> Tail | str:
    """The tail that begins with the BatchNorm at this path; a string: why there is none."""
    layer = _found(block, norm)
    norm_act = layer is not None and qualified_name(type(layer)) in _NORM_ACTS
    if not norm_act and type(layer) not in _NORMS:
        return f"{norm} is a {type(layer).__name__}, not a BatchNorm"
    bypassed = [norm]
    names = []
    if norm_act:
        if type(layer.drop) is not nn.Identity:
            return f"{norm} drops"
        activation = f"{norm}.act"
        bypassed.append(f"{norm}.drop")
    for path in (activation, post):
        found = None if path is None else _found(block, path)
        name = "identity" if found is None else activation_name(found)
        if name is None:
            return f"{path} is a {type(found).__name__}, which is not one we fuse"
        names.append(name)
        bypassed += [] if path is None else [path]
    attention = None if gate is None else _found(block, gate)
    recipe: Any = None
    if attention is not None:
        plan = plan_of(attention)
        known = plan is not None and intact(attention, plan)
        recipe = plan.recipe if plan is not None and known else recognise(attention)
        behind = isinstance(recipe, (ChannelGate, SpatialGate, CbamGate)) and names[0] == "identity"
        if not (behind or _is_in_norm_gate(recipe)) or recipe.adds_input:
            why = f": {recipe}" if isinstance(recipe, str) else ""
            return f"{gate} is a {class_name(attention).rpartition('.')[2]}, which is not part of the op{why}"
        inside = [name for name, _ in attention.named_modules() if name]
        inside = list(recipe.bypassed) if isinstance(recipe, SplitGate) else inside
        bypassed += [str(gate), *(f"{gate}.{name}" for name in inside)]
    gate = gate if attention is not None else None
    parameters = () if recipe is None else parameter_paths(recipe)
    return Tail(norm, gate, recipe, names[0], names[1], tuple(bypassed), in_place, parameters)


def _pair(
    block: nn.Module,
    norm: str,
    activation: str | None = None,
    *,
    between: str | None = None,
    inside: tuple[str, ...] = (),
) -> Pair:
    """The BatchNorm at this path with its activation. between: a layer that they can only be one op without. inside:
    layers that are bypassed where they are one."""
    layers = tuple(path for path in (norm, between, activation) if path is not None)
    tail = _find(block, norm, activation=activation)
    parted = between is not None and _found(block, between) is not None
    if isinstance(tail, str) or tail.activation == "identity" or parted:
        return Pair(layers, None)
    tail = replace(tail, bypassed=(*tail.bypassed, *([between] if between else []), *inside))
    hooked = any(is_hooked(layer_at(block, path)) for path in tail.bypassed)
    return Pair(layers, None if hooked else tail)


def _recipe(
    forward: Callable[[Any, Tensor], Tensor], *parts: Tail | Pair | None, bypassed: tuple[str, ...] = ()
) -> OwnLayers:
    """parts: in the order they run in."""
    tails = [part.tail if isinstance(part, Pair) else part for part in parts]
    present = [tail for tail in tails if tail is not None]
    kinds = {CbamGate: "cbam", SpatialGate: "spatial_gate", ChannelGate: "channel_gate"}
    gates = [function for kind, function in kinds.items() if any(type(tail.recipe) is kind for tail in present)]
    return OwnLayers(
        forward,
        "; ".join(tail.describe() for tail in present),
        ("norm_gate", "squeeze", "scale", *gates),
        bypassed=bypassed + tuple(path for tail in present for path in tail.bypassed),
        covers=tuple(tail.gate for tail in present if tail.gate is not None),
        rank=None,
        save="all",
    )


_DROPS = ("timm.layers.drop.DropPath", "torchvision.ops.stochastic_depth.StochasticDepth")


def _dropping(block: nn.Module, tail: Tail, path: str) -> Tail | str:
    """The tail with the layer at this path, if there is one, between its gate and its sum."""
    layer = _found(block, path)
    bypassed = (*tail.bypassed, path)  # in evaluation, even where it is one that drops
    if layer is not None and qualified_name(type(layer)) not in _DROPS:
        return f"it drops paths by a {type(layer).__name__}, which is not one we know"
    if layer is None or getattr(layer, "drop_prob", getattr(layer, "p", 1)) == 0:
        return replace(tail, bypassed=bypassed)
    return replace(tail, bypassed=bypassed, drop=path)


@register("timm.models.resnet.BasicBlock", "timm.models.resnet.Bottleneck", adapters=TAILS)
def resnet(block: Any) -> Recipe | str:
    last = 3 if hasattr(block, "conv3") else 2
    found = _find(block, f"bn{last}", gate="se", post=f"act{last}", in_place=True)
    tail = found if isinstance(found, str) else _dropping(block, found, "drop_path")
    if isinstance(tail, str):
        return tail
    pairs = [_pair(block, f"bn{n}", f"act{n}") for n in range(1, last - 1)]
    pairs.append(_pair(block, f"bn{last - 1}", f"act{last - 1}", between="drop_block"))

    def forward(block: Any, x: Tensor) -> Tensor:
        y = pairs[0](block, _call(block, block.conv1, x))
        if last == 3:
            y = pairs[1](block, _call(block, block.conv2, y))
        y = _call(block, layer_at(block, f"conv{last}"), _call(block, block.aa, y))
        return tail(block, y, x if block.downsample is None else _call(block, block.downsample, x), x)

    return _recipe(forward, *pairs, tail)


@register(
    *(f"timm.models.senet.{name}" for name in ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")),
    adapters=TAILS,
)
def senet(block: Any) -> Recipe | str:
    tail = _find(block, "bn3", gate="se_module", post="relu")
    if isinstance(tail, str):
        return tail
    first, second = _pair(block, "bn1", "relu"), _pair(block, "bn2", "relu")

    def forward(block: Any, x: Tensor) -> Tensor:
        y = first(block, _call(block, block.conv1, x))
        y = _call(block, block.conv3, second(block, _call(block, block.conv2, y)))
        return tail(block, y, x if block.downsample is None else _call(block, block.downsample, x), x)

    return _recipe(forward, first, second, tail)


@register("timm.models.senet.SEResNetBlock", adapters=TAILS)
def senet_basic(block: Any) -> Recipe | str:
    tail = _find(block, "bn2", activation="relu", gate="se_module", post="relu")
    if isinstance(tail, str):
        return tail
    first = _pair(block, "bn1", "relu")

    def forward(block: Any, x: Tensor) -> Tensor:
        y = _call(block, block.conv2, first(block, _call(block, block.conv1, x)))
        return tail(block, y, x if block.downsample is None else _call(block, block.downsample, x), x)

    return _recipe(forward, first, tail)


@register("timm.models.regnet.Bottleneck", adapters=TAILS)
def regnet(block: Any) -> Recipe | str:
    for path in ("conv1", "conv2", "conv3"):
        layer = _found(block, path)
        if class_name(layer) != "timm.layers.conv_bn_act.ConvNormAct" or layer.aa is not None:
            return f"{path} is not timm's, or blurs"
    middle = _find(block, "conv2.bn", gate="se")
    if isinstance(middle, str):
        return middle
    end = _find(block, "conv3.bn", post="act3") if block.downsample is not None else None
    end = end if end is None or isinstance(end, str) else _dropping(block, end, "drop_path")
    if isinstance(end, str):
        return end

    first = _pair(block, "conv1.bn", inside=("conv1",))

    def forward(block: Any, x: Tensor) -> Tensor:
        y = _call(block, block.conv1, x) if first.tail is None else first(block, _call(block, block.conv1.conv, x))
        y = middle(block, _call(block, block.conv2.conv, y))
        if end is not None:
            return end(block, _call(block, block.conv3.conv, y), _call(block, block.downsample, x), x)
        return block.act3(_call(block, block.conv3, y))

    return _recipe(forward, first, middle, end, bypassed=("conv2",) if end is None else ("conv2", "conv3"))


@register(
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv",
    "timm.models._efficientnet_blocks.InvertedResidual",
    adapters=TAILS,
)
def efficientnet(block: Any) -> Recipe | str:
    expands = hasattr(block, "conv_pwl")
    if _found(block, "aa") is not None:
        return "it blurs (aa) between its BatchNorm and its gate"
    middle = _find(block, "bn2" if expands else "bn1", gate="se")
    if isinstance(middle, str):
        return middle
    # An activation of the BatchNorm's own comes before the sum.
    end = _find(block, "bn3" if expands else "bn2") if block.has_skip else None
    end = end if end is None or isinstance(end, str) else _dropping(block, end, "drop_path")
    if isinstance(end, str):
        return end

    to_depth = _pair(block, "bn_s2d") if block.conv_s2d is not None else None
    first = _pair(block, "bn1") if expands else None
    last = _pair(block, "bn3" if expands else "bn2")

    def forward(block: Any, x: Tensor) -> Tensor:
        y = x
        if to_depth is not None:
            y = to_depth(block, _call(block, block.conv_s2d, y))
        if first is not None:
            y = first(block, _call(block, block.conv_pw, y))
        y = middle(block, _call(block, block.conv_dw, y))
        y = _call(block, block.conv_pwl if expands else block.conv_pw, y)
        return last(block, y) if end is None else end(block, y, x, x)

    return _recipe(forward, to_depth, first, middle, last if end is None else end, bypassed=("aa",))


_CONV_NORM = "torchvision.ops.misc.Conv2dNormActivation"


def _conv_norm_tail(block: nn.Module, path: str, gate: str | None = None) -> Tail | str:
    """Of torchvision's (convolution, norm[, activation]) at this path."""
    layers = _found(block, path)
    if class_name(layers) != _CONV_NORM or len(layers) not in (2, 3):
        return f"{path} is not torchvision's"
    return _find(block, f"{path}.1", activation=f"{path}.2" if len(layers) == 3 else None, gate=gate, in_place=True)


class _Chain(NamedTuple):
    """What is fused of a Sequential of torchvision's, by the names of the layers that it begins in, and the layers
    bypassed for its tails, the Sequential among them."""

    pairs: dict[str, Pair]
    tails: dict[str, Tail]
    bypassed: tuple[str, ...]

    def recipe(self, forward: Callable[[Any, Tensor], Tensor], *bypassed: str) -> OwnLayers:
        return _recipe(forward, *self.pairs.values(), *self.tails.values(), bypassed=self.bypassed + bypassed)


def _chain(block: nn.Module, path: str) -> _Chain | str:
    """Of one with one attention in it: a tail begins in the layer before that and in the last."""
    names = list(_found(block, path)._modules)
    layers = [_found(block, f"{path}.{name}") for name in names]
    gates = [i for i, layer in enumerate(layers) if class_name(layer) == "torchvision.ops.misc.SqueezeExcitation"]
    at = gates[0] if gates else len(names) - 1
    if len(gates) > 1 or at == 0:
        return "its layers are not torchvision's"
    gate = f"{path}.{names[at]}" if gates else None
    before, last = names[at - 1], names[-1]
    pairs, tails = {}, {}
    for name in names[: at - 1]:
        here = f"{path}.{name}"
        if class_name(_found(block, here)) == _CONV_NORM and len(_found(block, here)) == 3:
            pairs[name] = _pair(block, f"{here}.1", f"{here}.2", inside=(here,))
    for name, tail in (
        (before, _conv_norm_tail(block, f"{path}.{before}", gate)),
        (last, _conv_norm_tail(block, f"{path}.{last}")),
    ):
        if isinstance(tail, str):
            return tail
        tails[name] = tail
    pairs = {name: pair for name, pair in pairs.items() if pair.tail is not None}
    return _Chain(pairs, tails, (path, f"{path}.{before}", f"{path}.{last}"))


def _run_chain(block: nn.Module, path: str, chain: _Chain, x: Tensor, residual: Callable[[], Tensor] | None) -> Tensor:
    """The Sequential, its last tail with the residual; None: that BatchNorm runs by itself."""
    layers = layer_at(block, path)._modules
    pairs, tails = chain.pairs, chain.tails
    gates = {tail.gate for tail in tails.values()}
    last, y = next(reversed(layers)), x
    for name, layer in layers.items():
        if f"{path}.{name}" in gates:
            continue
        y = _call(block, layer[0] if name in pairs or name in tails else layer, y)
        if name in pairs:
            y = pairs[name](block, y)
        elif name in tails:
            y = tails[name](block, y, residual() if name == last and residual is not None else None, x)
    return y


@register("torchvision.models.mobilenetv3.InvertedResidual", "torchvision.models.efficientnet.MBConv", adapters=TAILS)
def torchvision_inverted_residual(block: Any) -> Recipe | str:
    chain = _chain(block, "block")
    if isinstance(chain, str):
        return chain
    last = next(reversed(block.block._modules))
    if block.use_res_connect:
        end = _dropping(block, chain.tails[last], "stochastic_depth")
        if isinstance(end, str):
            return end
        chain.tails[last] = end

    def forward(block: Any, x: Tensor) -> Tensor:
        return _run_chain(block, "block", chain, x, (lambda: x) if block.use_res_connect else None)

    return chain.recipe(forward)


@register("torchvision.models.regnet.ResBottleneckBlock", adapters=TAILS)
def torchvision_regnet(block: Any) -> Recipe | str:
    chain = _chain(block, "f")
    if isinstance(chain, str):
        return chain
    post = activation_name(block.activation)
    if post is None:
        return "its activation is not one we fuse"
    last = next(reversed(block.f._modules))
    chain.tails[last] = replace(chain.tails[last], post_activation=post, in_place=False)

    def forward(block: Any, x: Tensor) -> Tensor:
        return _run_chain(block, "f", chain, x, lambda: x if block.proj is None else _call(block, block.proj, x))

    return chain.recipe(forward, "activation")


def _behind(block: nn.Module, path: str) -> list[str] | None:
    """The names of what stands behind a convolution of MONAI's: A, D, N; None where that is no such thing."""
    layers = _found(block, path)
    if class_name(layers) != "monai.networks.blocks.convolutions.Convolution":
        return None
    return list(layers.adn._modules) if list(layers._modules) == ["conv", "adn"] else None


@register(
    *(
        f"monai.networks.blocks.squeeze_and_excitation.{name}"
        for name in ("SEBlock", "SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck")
    ),
    adapters=TAILS,
)
def monai(block: Any) -> Recipe | str:
    behind = [_behind(block, f"conv{n}") for n in (1, 2, 3)]
    if behind[2] != ["N"]:
        return "conv3 is not MONAI's convolution with a norm and nothing else behind it"
    tail = _find(block, "conv3.adn.N", gate="se_layer", post="act", in_place=True)
    if isinstance(tail, str):
        return tail

    pairs = [
        _pair(block, f"{path}.adn.N", f"{path}.adn.A", inside=(path, f"{path}.adn"))
        if layers == ["N", "A"]
        else Pair((), None)
        for path, layers in zip(("conv1", "conv2"), behind, strict=False)
    ]

    def forward(block: Any, x: Tensor) -> Tensor:
        y = x
        for layers, pair in zip((block.conv1, block.conv2), pairs, strict=True):
            y = _call(block, layers if pair.tail is None else layers.conv, y)
            y = y if pair.tail is None else pair(block, y)
        return tail(block, _call(block, block.conv3.conv, y), _call(block, block.project, x), x)

    return _recipe(forward, *pairs, tail, bypassed=("conv3", "conv3.adn"))
