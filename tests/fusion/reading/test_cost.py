"""What recognising a network costs: by its distinct modules, however many there are of each."""

from __future__ import annotations

import weakref
from collections import Counter

from torch import nn

from fused_attn import explain, fuse
from fused_attn.fusion.reading import recognise
from tests.fusion.reading.pasted import ChannelAttention, SEBlock, eca_layer
from tests.fusion.reading.pasted_selections import SKAttention


class Unit(nn.Module):
    """The product is in this forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.ca = nn.Conv2d(16, 16, 1), ChannelAttention(16)

    def forward(self, x):
        x = self.conv(x)
        return x * self.ca(x)


KINDS = (lambda: SEBlock(16), lambda: SEBlock(16, 4), eca_layer, lambda: SKAttention(16, (1, 3), L=4), Unit)
#: What is compared in float64: one block of each kind; of the last, the gate and its product.
CHECKS = 6


def test_160_modules(monkeypatch):
    counts: Counter[str] = Counter()

    def counting(name):
        original = getattr(recognise, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(recognise, name, counted)

    counting("capture"), counting("check_block")
    monkeypatch.setattr(recognise, "_outcomes", weakref.WeakKeyDictionary())
    fuse(nn.Sequential(*(kind() for kind in KINDS)))
    first = dict(counts)
    assert first["check_block"] == CHECKS
    net = fuse(nn.Sequential(*(kind() for _ in range(160 // len(KINDS)) for kind in KINDS)))
    assert dict(counts) == first
    assert sum(row.fused for row in explain(net)) == 160
