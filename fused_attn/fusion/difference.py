"""What a fused block runs in place of its forward, as a diff to read."""

from __future__ import annotations

import difflib
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

from .changing.plan import plan_of
from .recipes.names import host_class
from .recipes.recipe import CbamGate, ChannelGate, OwnLayers, Recipe, SpatialGate


def differences(model: nn.Module) -> Iterator[str]:
    """Unified diffs of the forwards of the fused blocks in a model, one a class and recipe."""
    seen: dict[str, list[str]] = {}
    for name, block in model.named_modules():
        host, plan = host_class(block), plan_of(block)
        if host is None or plan is None:
            continue
        try:
            before = textwrap.dedent(inspect.getsource(host.forward)).splitlines()
            file = inspect.getsourcefile(host) or host.__module__
        except (OSError, TypeError):
            before, file = (
                [f"def forward(self, x):  # of {host.__qualname__}; its source is not at hand"],
                host.__module__,
            )
        after = ["def forward(self, x):", *textwrap.indent(runs(plan.recipe), "    ").splitlines()]
        text = "\n".join(difflib.unified_diff(before, after, f"{file} {host.__qualname__}", "fused", lineterm="", n=99))
        seen.setdefault(text, []).append(name or "(the model)")
    for text, names in seen.items():
        yield f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}\n{text}"


def runs(recipe: Recipe) -> str:
    """A recipe as the code that stands for it."""
    if isinstance(recipe, ChannelGate):
        return _call("channel_gate", _excitation(recipe), _channel_options(recipe), recipe.adds_input)
    if isinstance(recipe, SpatialGate):
        options: dict[str, object] = {"order": recipe.order, "ties": recipe.ties, "gate": recipe.gate}
        return _call("spatial_gate", _convolution(recipe), options, recipe.adds_input)
    if isinstance(recipe, CbamGate):
        channel = {
            k.replace("ties", "channel_ties").replace("gate", "channel_gate"): v
            for k, v in _channel_options(recipe.channel).items()
        }
        spatial = {
            "order": recipe.spatial.order,
            "spatial_ties": recipe.spatial.ties,
            "spatial_gate": recipe.spatial.gate,
        }
        weights = [*(_excitation(recipe.channel) + ["None"] * 4)[:4], *_convolution(recipe.spatial)]
        return _call("cbam", weights, {**channel, **spatial}, recipe.adds_input)
    if isinstance(recipe, OwnLayers):
        by = ", ".join(f"functional.{f}" for f in recipe.functions) or "fewer passes over its map"
        return f"... {recipe.name}, with its own layers, by {by}"
    return "... functional.squeeze, its own layers, functional.scale"


def _excitation(recipe: ChannelGate) -> list[str]:
    paths = [recipe.weight1, recipe.bias1, recipe.weight2, recipe.bias2]
    while paths and paths[-1] is None:
        paths.pop()
    return ["None" if path is None else f"self.{path}" for path in paths]


def _channel_options(recipe: ChannelGate) -> dict[str, object]:
    found: dict[str, object] = {"layer": recipe.layer, "pool": recipe.pool, "gate": recipe.gate}
    if recipe.pool != "avg":
        found["ties"] = recipe.ties
    if recipe.weight2 is not None:
        found["activation"] = recipe.activation
    return found


def _convolution(recipe: SpatialGate) -> list[str]:
    conv, *norm = recipe.layers
    return [f"self.{conv}.weight", f"self.{conv}.bias"] + [f"batch_norm=self.{n}" for n in norm]


def _call(function: str, tensors: list[str], options: dict[str, object], adds_input: bool) -> str:
    arguments = ["x", *tensors, *(f"{k}={v!r}" for k, v in options.items()), *(["residual=x"] if adds_input else [])]
    return f"return functional.{function}(\n    " + ",\n    ".join(arguments) + ",\n)"
