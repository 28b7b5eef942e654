"""This library's own reference modules, which `fuse` runs as their fused forms."""

from __future__ import annotations

from torch import nn

from .registry import ChannelGate, Recipe, register

_MODULE = "fused_attn.reference.squeeze_excite"


@register(f"{_MODULE}.SqueezeExcite", f"{_MODULE}.EffectiveSE", f"{_MODULE}.ECA")
def reference_module(block: nn.Module) -> Recipe | str:
    if block.return_gate or block.post_activation != "identity":
        return "returns its gate alone or has an epilogue; use fused_attn.nn"
    layers = [name for name, _ in block.named_children()]
    paths = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    present = dict(block.named_parameters())
    return ChannelGate(
        *(path if path in present else None for path in paths),
        layer=block.layer,
        pool=block.pool,
        ties=block.ties,
        activation=block.activation,
        gate=block.gate,
        rank=None,
    )
