"""This library's own reference modules, which `fuse` runs as their fused forms."""

from __future__ import annotations

from typing import Any

from .registry import ChannelGate, Recipe, register

_MODULE = "fused_attn.reference.squeeze_excite"


@register(f"{_MODULE}.SqueezeExcite", f"{_MODULE}.EffectiveSE", f"{_MODULE}.ECA")
def reference_module(block: Any) -> Recipe | str:
    if block.return_gate or block.post_activation != "identity":
        return "returns its gate alone or has an epilogue; use fused_attn.nn"
    layers = [name for name, _ in block.named_children()]
    present = dict(block.named_parameters())
    parameters: dict[str, Any] = {
        f"{kind}{i}": path
        for i, layer in enumerate(layers, 1)
        for kind in ("weight", "bias")
        if (path := f"{layer}.{kind}") in present
    }
    return ChannelGate(
        **parameters,
        layer=block.layer,
        pool=block.pool,
        ties=block.ties,
        activation=block.activation,
        gate=block.gate,
        rank=None,
    )
