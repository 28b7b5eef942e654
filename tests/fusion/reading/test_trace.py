"""A forward as a graph: what it writes stays written, and what a graph cannot say is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn.fusion.reading.trace import Untraceable, trace
from tests.checks import random


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.table, self.sizes = {3: 1.0, 4: 2.0}, [1, 2]
        self.weight = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        raise NotImplementedError


def module(forward) -> nn.Module:
    return type("Module", (Base,), {"forward": forward})().double()


def code(block, enters=lambda path: False):
    return trace(block, enters).python_code("self")


def run(block, x):
    made = code(block)
    space = dict(made.globals)
    exec(made.src, space)
    return space["forward"](block, block, x)


def writes_into_an_alias(self, x):
    y = self.conv(x)
    kept = y
    y += x
    y *= self.weight
    y -= 1
    y /= 2
    return kept


def counts_in_sizes(self, x):
    h = x.shape[2]
    half = h
    half //= 2
    half += 1
    return x[:, :, :half].sum() * h


def unpacks(self, x):
    b, c, h, w = x.size()
    first, second = x.chunk(2, 1)
    return first.reshape(b, c // 2, h * w) + second.flatten(2)


def by_functions(self, x):
    y = F.interpolate(F.pad(x, (1, 1, 0, 0)), size=x.shape[2:], mode="nearest")
    y = torch.cat([y, F.relu(x)], dim=1).transpose(1, 2)[..., None]
    return torch.einsum("bhcwk->bw", y) + (2 ** x.mean((1, 2))).abs() - (-x).sum((1, 2))


def in_structures(self, x):
    return {"a": [self.inner(x), (x.shape[0], None)], "b": (self.bn(x),)}


@pytest.mark.parametrize(
    "forward", [writes_into_an_alias, counts_in_sizes, unpacks, by_functions, in_structures], ids=lambda f: f.__name__
)
def test_the_graph_is_the_forward(forward):
    block = module(forward).eval()
    x = random(2, 4, 5, 6, dtype=torch.float64)
    expected, actual = block(x), run(block, x)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_too_many_to_unpack_are_too_many():
    def forward(self, x):
        first, second = x.split(2, 1)
        return first + second

    block = module(forward)
    with pytest.raises(ValueError, match="2 values"):
        run(block, random(2, 6, 3, 3, dtype=torch.float64))


def test_what_is_entered_is_no_call():
    block = module(lambda self, x: self.inner(x))
    assert "self.inner(" in code(block).src
    assert "self.inner(" not in code(block, lambda path: path == "inner").src


def length(x):
    try:
        return len(x)
    except Exception:
        return 1


@functools.lru_cache
def looked_up(size):
    return float(3)


REFUSED = {
    "a comparison": (lambda self, x: x if x.sum() > 0 else -x, "branches"),
    "a size": (lambda self, x: x if x.shape[0] > 1 else -x, "branches"),
    "a length that is not missed": (lambda self, x: x * length(x), "branches"),
    "a length": (lambda self, x: x * len(x), "branches"),
    "membership": (lambda self, x: x if 4 in x.shape else -x, "branches"),
    "a key": (lambda self, x: x * self.table.get(x.dim(), 5.0), "branches"),
    "a cache": (lambda self, x: x * looked_up(x.shape[0]), "branches"),
    "a loop": (lambda self, x: [row * 2 for row in x], "loops"),
    "a loop over more than is there": (lambda self, x: [*x.shape], "loops"),
    "a number": (lambda self, x: x * float(x.mean()), "looks"),
    "a range": (lambda self, x: [x for _ in range(x.shape[0])], "looks"),
    "text": (lambda self, x: {f"{x.shape[0]}": x}, "looks"),
    "random numbers": (lambda self, x: x + torch.rand(1), "makes a tensor by rand"),
    "a constant": (lambda self, x: x + torch.tensor(1.0), "makes a tensor"),
    "an object": (lambda self, x: self.conv(x, object()), "passes on a object"),
    "mode": (lambda self, x: F.dropout(x, 0.1, self.training), "training"),
    "mode of a part": (lambda self, x: x if self.bn.training else -x, "option"),
    "an option of a part": (lambda self, x: x * self.conv.stride[0], "option"),
    "an option of a part, if any": (lambda self, x: x * getattr(self.conv, "groups", 2), "option"),
    "whether a part has an option": (lambda self, x: x if hasattr(self.conv, "stride") else -x, "option"),
    "what it keeps": (lambda self, x: self.sizes.append(1) or x, "keeps state"),
    "itself": (lambda self, x: self(x), "calls itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_says_is_refused(name):
    forward, why = REFUSED[name]
    block = module(forward)
    before = torch.get_rng_state()
    with pytest.raises(Untraceable, match=why):
        code(block)
    assert torch.equal(torch.get_rng_state(), before) and block.sizes == [1, 2]


def decorated(context):
    return module(context(lambda self, x: self.conv(x)))


@pytest.mark.parametrize(
    "context",
    [torch.no_grad(), torch.autocast("cuda", enabled=False), torch.inference_mode(), torch.set_grad_enabled(True)],
    ids=lambda c: type(c).__name__,
)
def test_a_context_around_it_is_refused(context):
    with pytest.raises(Untraceable):
        code(decorated(context))


def test_a_part_that_is_none_of_its_own_is_refused():
    block = module(lambda self, x: self.others[0](x))
    block.others = [nn.Conv2d(4, 4, 1)]
    with pytest.raises(Untraceable, match="no part of it"):
        code(block)
