"""How many dimensions values have, before any size is known: as torch says of the same code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_attn.fusion.reading.nodes import dims_of
from fused_attn.fusion.reading.trace import Rank, trace_in_mode

C = 8
CODES = {
    "mean of axes": lambda self, x: x.mean((2, 3)),
    "mean that keeps": lambda self, x: x.mean((2, 3), keepdim=True),
    "mean by position that keeps": lambda self, x: torch.mean(x, [2, 3], True),
    "of all": lambda self, x: x.sum(),
    "max and where": lambda self, x: x.max(1)[0],
    "max that keeps": lambda self, x: x.max(dim=1, keepdim=True)[0],
    "largest": lambda self, x: x.amax(dim=(-2, -1)),
    "flatten": lambda self, x: torch.flatten(x, 1),
    "flatten by name": lambda self, x: x.flatten(start_dim=2),
    "flatten all": lambda self, x: x.flatten(),
    "view": lambda self, x: x.view(x.size(0), C, -1),
    "view of sizes": lambda self, x: x.reshape((x.shape[0], -1)),
    "reshape by name": lambda self, x: torch.reshape(x, shape=(-1, 1, 1)),
    "squeeze": lambda self, x: x.mean(3, keepdim=True).squeeze(-1),
    "squeeze of axes": lambda self, x: x.mean((2, 3), keepdim=True).squeeze((2, 3)),
    "unsqueeze": lambda self, x: x.unsqueeze(1),
    "unflatten": lambda self, x: x.unflatten(1, (2, C // 2)),
    "index": lambda self, x: x[:, 0],
    "new axes": lambda self, x: x.mean((2, 3))[:, :, None, None],
    "ellipsis": lambda self, x: x.mean((2, 3))[..., None],
    "select": lambda self, x: x.select(1, 0),
    "stack": lambda self, x: torch.stack([x, x]),
    "sum of two": lambda self, x: x.mean((2, 3), keepdim=True).flatten(1) + x.amax((2, 3), keepdim=True),
    "a layer": lambda self, x: self.conv(x),
    "layers that flatten": lambda self, x: self.flat(x),
    "a layer that unflattens": lambda self, x: self.back(self.flat(x)),
    "a parameter": lambda self, x: self.conv.bias,
    "a number": lambda self, x: 1 - torch.sigmoid(x),
}


class Block(nn.Module):
    def __init__(self, code):
        super().__init__()
        self.code = code
        self.conv = nn.Conv2d(C, C, 1)
        self.flat = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten()), nn.Linear(C, 4))
        self.back = nn.Unflatten(1, (4, 1, 1))

    def forward(self, x):
        return self.code(self, x)


@pytest.mark.parametrize("name", CODES)
def test_as_torch_says(name):
    block = Block(CODES[name])
    graph = trace_in_mode(block, lambda path: False, False, Rank(4))
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    assert dims_of(result, 4, block) == block(torch.randn(2, C, 5, 3)).dim()


def test_what_is_not_known_changes_nothing():
    """An unknown method, and a name that ours has not."""
    graph = torch.fx.Graph()
    graph.placeholder("block")
    x = graph.placeholder("x")
    assert dims_of(graph.call_method("of_another_version", (x, 1)), 4, nn.Module()) == 4
    assert dims_of(graph.call_method("flatten", (x,), {"another": 1}), 4, nn.Module()) == 4
