"""What compilers look at again of a fused block: a change after a compilation is followed as by the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fused_attn import fuse
from fused_attn.fusion.changing.plan import plan_of
from tests.checks import random, randomised
from tests.fusion.counting import FusedOperators

X = random(2, 8, 6, 5, dtype=torch.float64)


class Options:
    scale = 1.0


class Block(nn.Module):
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.down, self.act, self.up = nn.Conv2d(8, 4, 1), nn.LeakyReLU(0.1), nn.Conv2d(4, 8, 1, bias=False)
        self.gate = nn.Sequential(nn.Identity(), nn.Sigmoid())
        self.options, self.widths, self.offset = Options(), [8, 4], None

    def forward(self, x: Tensor) -> Tensor:
        s = self.down(x.mean((2, 3), keepdim=True))
        s = self.up(self.act(s)) * self.options.scale
        if self.offset is not None:
            s = s + self.offset
        if len(self.widths) == 3 or hasattr(self, "double"):
            s = 2 * s
        return x * self.gate(s) ** self.power


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def _of_class(cls: Any, name: str, value: Any) -> Callable[[Any], None]:
    return lambda block: setattr(cls, name, value)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another class": lambda b: setattr(b, "act", nn.Tanh()),
    "another gate": lambda b: b.gate.__setitem__(1, nn.Tanh()),
    "the same class": lambda b: setattr(b, "down", randomised(nn.Conv2d(8, 4, 1)).double()),
    "the same with another option": lambda b: setattr(b, "act", nn.LeakyReLU(0.5)),
    "an option of a layer": lambda b: setattr(b.act, "negative_slope", 0.5),
    "a child more": lambda b: b.gate.append(nn.Tanh()),
    "an attribute": lambda b: setattr(b, "offset", 1.0),
    "an attribute that was none": lambda b: setattr(b, "double", True),
    "of a helper": lambda b: setattr(b.options, "scale", 3.0),
    "another helper": lambda b: setattr(b, "options", type("Other", (), {"scale": 2.0})()),
    "a container": lambda b: b.widths.append(2),
    "of the instance": lambda b: setattr(b, "power", 2),
    "of the class": _of_class(Block, "power", 3),
    "a bias more": lambda b: setattr(b.up, "bias", nn.Parameter(torch.ones(8, dtype=torch.float64))),
    "a bias less": lambda b: setattr(b.down, "bias", None),
    "a forward": lambda b: setattr(b.act, "forward", torch.tanh),
    "its own forward": lambda b: setattr(b, "forward", lambda x: 2 * x),
    "a parametrisation": lambda b: parametrize.register_parametrization(b.down, "weight", Doubled()),
    "the values of a weight": lambda b: b.down.weight.data.mul_(2),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changed_after_a_compilation(name, monkeypatch):
    monkeypatch.setattr(Block, "power", 1)
    original = randomised(Block()).double()
    model = fuse(copy.deepcopy(original))
    assert plan_of(model) is not None
    torch._dynamo.reset()
    compiled, eager = torch.compile(model, backend="eager"), torch.compile(original, backend="eager")
    with FusedOperators() as seen:
        torch.testing.assert_close(compiled(X), eager(X))
    assert seen.count, "it was not fused to begin with"
    torch.manual_seed(1)
    CHANGES[name](model)
    torch.manual_seed(1)
    CHANGES[name](original)
    torch.testing.assert_close(compiled(X), eager(X))
    torch.testing.assert_close(compiled(X), original(X))


class Gate(nn.Module):
    """None of whose layers runs in the fused block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(self.pool(x))


@pytest.mark.parametrize("path", ["pool", "fc", "fc.0", "fc.1", "fc.3"])
@torch.no_grad()
def test_a_forward_that_is_put_on_a_layer_after_a_compilation(path):
    original = randomised(Gate()).double()
    model = fuse(copy.deepcopy(original))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with FusedOperators() as seen:
        torch.testing.assert_close(compiled(X), original(X))
    assert seen.count
    for block in (model, original):
        layer = block.get_submodule(path)
        layer.forward = lambda x, run=layer.forward: 3 * run(x)  # type: ignore[method-assign]
    torch.testing.assert_close(compiled(X), original(X))


def guards(module: nn.Module, x: Tensor) -> int:
    """How many guards stand before the code that is compiled for a call."""
    torch._dynamo.reset()
    torch.compile(module, backend="eager")(x)
    forward: Any = type(module).forward
    entries: Any = torch._dynamo.eval_frame._debug_get_cache_entry_list(forward.__code__)
    return str(entries[0].guard_manager).count("+- ")


def test_not_many_more_guards_than_before():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(4)))

        def forward(self, x):
            return self.blocks(x)

    original = randomised(Model()).double()
    assert guards(fuse(copy.deepcopy(original)), X) <= 2.5 * guards(original, X)
