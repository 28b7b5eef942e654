"""BAM against the authors' formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_same_block,
    checkpoint,
    in_layout,
    random,
    randomised,
    with_state_of,
)


class Original(nn.Module):
    """From the formula: a dense and a dilated branch, the sigmoid of their product, plus one."""

    def __init__(self, channels, width, layers=1, convs=2, dilation=4, rank=2):
        super().__init__()
        widths = [channels] + [width] * layers
        self.dense = nn.ModuleList(
            nn.ModuleList([nn.Linear(i, o), nn.BatchNorm1d(o)]) for i, o in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Linear(width, channels)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        dilated = [conv(width, width, 3, dilation=dilation, padding="same") for _ in range(convs)]
        self.convs = nn.ModuleList(
            nn.ModuleList([layer, norm(width)]) for layer in [conv(channels, width, 1), *dilated]
        )
        self.project = conv(width, 1, 1)

    def forward(self, x):
        c = x.flatten(2).mean(-1)
        for dense, norm in self.dense:
            c = F.relu(norm(dense(c)))
        c = self.last(c)
        s = x
        for conv, norm in self.convs:
            s = F.relu(norm(conv(s)))
        product = self.project(s) * c.reshape(*c.shape, *[1] * (x.dim() - 2))
        return x + x * torch.sigmoid(product)


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "default": (lambda m: m.BAM(32), lambda: Original(32, 2), 2),
    "options": (
        lambda m: m.BAM(32, reduction=4, num_layers=2, dilated_convs=1, dilation=2),
        lambda: Original(32, 8, 2, 1, 2),
        2,
    ),
    "1-D": (lambda m: m.BAM(32, rank=1), lambda: Original(32, 2, rank=1), 1),
    "3-D": (lambda m: m.BAM(32, rank=3), lambda: Original(32, 2, rank=3), 3),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training):
    ours, original, rank = PAIRS[name]
    original = randomised(original())
    block = with_state_of(ours(MODULES[module]).double(), original)
    x = random(4, 32, *(7, 9, 5)[:rank], dtype=torch.float64)  # not square
    assert_same_block(block, original, x, training=training)


def test_keys_are_the_authors():
    block = fused_nn.BAM(64)
    block.channel_att.load_state_dict(checkpoint("note004.ChannelGate"))
    block.spatial_att.load_state_dict(checkpoint("note004.SpatialGate"))
    prefixes = {"channel_att": "note004.ChannelGate", "spatial_att": "note004.SpatialGate"}
    state = {f"{prefix}.{k}": v for prefix, source in prefixes.items() for k, v in checkpoint(source).items()}
    block.load_state_dict(state)
    assert list(block.state_dict()) == list(state)


def test_one_position_and_a_batch_of_one():
    block = fused_nn.BAM(32)
    assert torch.isfinite(block(random(2, 32, 1, 1))).all()
    assert torch.isfinite(block.eval()(random(1, 32, 1, 1))).all()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block.train()(random(1, 32, 5, 5))


ERRORS = {
    "channels: expected a positive integer; got -1": lambda: fused_nn.BAM(-1),
    "reduction: 16 leaves no hidden channel of 8; give `hidden` instead": lambda: fused_nn.BAM(8),
    "num_layers: expected a positive integer; got 0": lambda: fused_nn.BAM(32, num_layers=0),
    "dilated_convs: expected a positive integer; got 0": lambda: fused_nn.BAM(32, dilated_convs=0),
    "dilation: expected a positive integer; got 1.5": lambda: fused_nn.BAM(32, dilation=1.5),
    "rank: expected 1, 2 or 3; got 0": lambda: fused_nn.BAM(32, rank=0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_trains_under_deterministic_algorithms(rank):
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.BAM(32, rank=rank)
    block(random(4, 32, *(7, 6, 5)[:rank])).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    """The map's gradient and every parameter's; eval takes the running statistics."""
    original = randomised(reference.BAM(32, reduction=4))
    x = in_layout(random(4, 32, 7, 9, dtype=dtype), layout)
    assert_as_good_as_reference(original, with_state_of(fused_nn.BAM(32, reduction=4), original), x, training)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout):
    block = fused_nn.BAM(32)
    x = in_layout(random(2, 32, 6, 5), layout).requires_grad_()
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    expected = block(x)
    torch.testing.assert_close(found, expected)
    grad = random(2, 32, 6, 5, seed=1)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (found, expected)))
