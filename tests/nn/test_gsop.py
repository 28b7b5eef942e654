"""Global second-order pooling against the authors' code, with its centring matrices."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.nn import gsop
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_eager,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    gradcheck,
    in_layout,
    random,
    randomised,
)


def centring(size, positions, x):
    return torch.eye(size, dtype=x.dtype) / positions - torch.ones(size, size, dtype=x.dtype) / positions**2


@pytest.fixture(autouse=True)
def one_op(monkeypatch):
    """A BatchNorm and what follows it, as in large maps: `test_normalised` has the choice."""
    monkeypatch.setattr("fused_attn.nn.normalised.pays", lambda *_: True)


class Original(nn.Module):
    """The attention in the authors' bottleneck, under its names."""

    def __init__(self, channels, mode, reduced=128, stride=1):
        super().__init__()
        self.mode = mode
        if mode != "position":
            self.conv_for_DR, self.bn_for_DR = nn.Conv2d(channels, reduced, 1, stride), nn.BatchNorm2d(reduced)
            self.row_bn = nn.BatchNorm2d(reduced)
            self.row_conv_group = nn.Conv2d(reduced, 4 * reduced, (reduced, 1), groups=reduced)
            self.fc_adapt_channels = nn.Conv2d(4 * reduced, channels, 1)
        if mode != "channel":
            self.conv_for_DR_spatial, self.bn_for_DR_spatial = nn.Conv2d(channels, reduced, 1), nn.BatchNorm2d(reduced)
            self.row_bn_for_spatial = nn.BatchNorm2d(64)
            self.row_conv_group_for_spatial = nn.Conv2d(64, 256, (64, 1), groups=64)
            self.fc_adapt_channels_for_spatial = nn.Conv2d(256, 64, 1)
        if mode == "concat":
            groups = channels // 64
            factor = int(math.log(32 / groups, 2))
            for name in ("dilate_conv_for_concat1", "dilate_conv_for_concat2"):
                conv = nn.Conv2d(channels, channels, (factor * 2 + 5, 1), padding=(factor + 2, 0), groups=groups)
                self.add_module(name, conv)
            self.bn_for_concat = nn.BatchNorm2d(channels)

    def of_channels(self, x):
        y = F.relu(self.bn_for_DR(self.conv_for_DR(F.relu(x)))).flatten(2)
        n = y.shape[2]
        y = (y @ centring(n, n, y) @ y.transpose(1, 2))[..., None]
        return torch.sigmoid(self.fc_adapt_channels(self.row_conv_group(self.row_bn(y))))

    def of_positions(self, x):
        y = F.adaptive_avg_pool2d(self.bn_for_DR_spatial(self.conv_for_DR_spatial(F.relu(x))), (8, 8)).flatten(2)
        y = (y.transpose(1, 2) @ centring(y.shape[1], 64, y) @ y)[..., None]
        y = F.relu(self.row_conv_group_for_spatial(self.row_bn_for_spatial(y)))
        y = torch.sigmoid(self.fc_adapt_channels_for_spatial(y)).view(-1, 1, 8, 8)
        return F.adaptive_avg_pool2d(y, x.shape[2:])

    def forward(self, x):
        if self.mode == "channel":
            return x * self.of_channels(x)
        if self.mode == "position":
            return F.relu(x * self.of_positions(x))
        one, other = x * self.of_channels(x), F.relu(x * self.of_positions(x))
        if self.mode == "avg":
            return one + other
        if self.mode == "max":
            return torch.max(one, other)
        return self.bn_for_concat(self.dilate_conv_for_concat1(one) + self.dilate_conv_for_concat2(other))


MODULES = {"fused": fused_nn, "reference": reference}
MODES = ("channel", "position", "avg", "max", "concat")


@pytest.fixture(params=["torch's pools", "own pools"])
def own(request, monkeypatch):
    """The path of CUDA under deterministic algorithms, taken here too."""
    if request.param == "own pools":
        monkeypatch.setattr(gsop, "torch_has_no_deterministic", lambda x: True)


def build(mode, module, channels=12, reduced=10, stride=1):
    channels = 64 if mode == "concat" else channels
    original = randomised(Original(channels, mode, reduced, stride))
    block = module.GSoP(channels, mode=mode, reduced=reduced, stride=stride).double()
    block.load_state_dict(original.state_dict())
    return block, original, random(3, channels, 9, 7, dtype=torch.float64)


@pytest.mark.combine(3)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_original(mode, module, training, own):
    block, original, x = build(mode, MODULES[module])
    assert_same_block(block, original, x, training=training)


@pytest.mark.parametrize(("batch", "training"), [(1, False), (3, False), (3, True)])
def test_a_large_map(batch, training, own):
    """In eval its means of windows are taken first."""
    block, original, _ = build("position", fused_nn)
    assert_same_block(block, original, random(batch, 12, 29, 23, dtype=torch.float64), training=training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["channel", "max"])
def test_stride_of_the_channel_form(mode, training):
    block, original, x = build(mode, fused_nn, stride=2)
    assert_same_block(block, original, x, training=training)


@pytest.mark.parametrize("mode", ["channel", "avg", "max"])
def test_zeros(mode):
    """As a BatchNorm before it that starts at zero makes them: what autograd gives there, too."""
    block, original, x = build(mode, fused_nn)
    assert_same_block(block, original, x.relu() * 0, training=False)
    assert_same_block(block, original, x.clamp(min=-0.5, max=0), training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("mode", ["channel", "position", "avg", "max"])
def test_as_good_as_the_original(mode, dtype, training, layout):
    block, original, x = build(mode, fused_nn)
    x = in_layout((random(8, 12, 11, 9) + random(8, 12, 1, 1)).to(dtype), layout)
    assert copy.deepcopy(block).to(dtype)(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x, training)


@pytest.mark.parametrize("mode", ["channel", "max"])
def test_bfloat16_in_training(mode):
    """The BatchNorm over rows makes rounding large and its largest error a matter of chance: by the median, then."""
    ratios = []
    for seed in range(3):
        block, original, _ = build(mode, fused_nn)
        x = (random(8, 12, 11, 9, seed=seed) + random(8, 12, 1, 1, seed=seed)).bfloat16()
        found = []
        for module, dtype in ((original, torch.float64), (block, x.dtype), (original, x.dtype)):
            module = copy.deepcopy(module).to(dtype).train()
            leaf = x.to(dtype).detach().clone().requires_grad_()
            module(leaf).backward(random(*x.shape, seed=1, dtype=x.dtype).to(dtype))
            found.append([leaf.grad, *(p.grad for p in module.parameters())])
        ratios += [((a - x).norm() / (e - x).norm()).item() for x, a, e in zip(*found, strict=True)]
    assert torch.tensor(ratios).median() < 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [None, 64, 20])
def test_covariance(count, dtype):
    x = random(2, 6, 35, dtype=dtype) + 1

    def theirs(x):
        n = x.shape[2]
        return x @ centring(n, n if count is None else count, x) @ x.transpose(1, 2)

    for y in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        grad = random(6, 6, 2, seed=1, dtype=dtype).permute(2, 0, 1)
        assert_equivalent(
            lambda x: gsop.covariance(x, count), lambda x: reference.gsop.covariance(x, count), {"x": y}, [grad]
        )
    for function in (gsop.covariance, reference.gsop.covariance):
        assert_as_good_as_eager(function(x, count), theirs(x), theirs(x.double()))
    torch.testing.assert_close(gsop.covariance(x.double())[0], torch.cov(x[0].double(), correction=0))


def test_gradients_of_the_covariance():
    for count in (None, 7, 3):
        inputs = {"x": random(2, 3, 4, dtype=torch.float64)}
        gradcheck(lambda x, count=count: gsop.covariance(x, count), inputs)
        gradcheck(lambda x, count=count: gsop.covariance(x, count), inputs, twice=True)


def test_covariance_keeps_one_map():
    kept = []
    x = random(2, 3, 40).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gsop.covariance(x)
    assert [tuple(t.shape) for t in kept] == [(2, 3, 40), (2, 3, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(9, 7, 8, 8), (8, 8, 9, 7), (8, 8, 1, 3), (16, 5, 8, 8), (1, 1, 8, 8)], ids=str)
def test_means_of_windows(size, dtype, own):
    height, width, *counts = size
    inputs = {"x": random(2, 3, height, width, dtype=dtype)}
    grad = random(2, 3, *counts, seed=1, dtype=dtype)
    assert_equivalent(
        lambda x: gsop.mean_of_windows(x, *counts), lambda x: F.adaptive_avg_pool2d(x, counts), inputs, [grad]
    )


@pytest.mark.parametrize("mode", ["channel", "position", "avg"])
def test_odd_batches(mode):
    block, original, x = build(mode, fused_nn)
    for y in (x[:1], x[:1, :, :1, :1], x[:, :, :1]):
        assert_same_block(block, original, y, training=False)
    assert block.eval()(x[:0]).shape == x[:0].shape
    assert_same_block(block, original, x[:1], training=True)
    x[0, 2, 3, 4] = torch.nan
    torch.testing.assert_close(block(x), original.eval()(x), equal_nan=True)


@pytest.mark.parametrize("mode", ["channel", "max"])
def test_buffers_in_training_are_the_originals(mode):
    """With a BatchNorm of its own momentum, one that averages all batches, and one that is frozen."""
    block, original, x = build(mode, fused_nn)
    for module in (block, original):
        module.train()
        module.bn_for_DR.momentum = None
        for i in range(3):
            module(x * (i + 1))
        module.bn_for_DR.eval()
        module(x)
    for (name, ours), theirs in zip(block.named_buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


def test_under_autocast():
    block, original, x = build("avg", fused_nn)
    block, exact = block.float(), original(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.float())
        y.sum().backward()
        eager = copy.deepcopy(original).float()(x.float())
    assert y.dtype == torch.float32
    assert_as_good_as_eager(y, eager, exact)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", ["channel", "avg"])
def test_compiles_in_one_graph(mode, training):
    torch._dynamo.reset()
    block, _, x = build(mode, fused_nn)
    compiled = torch.compile(copy.deepcopy(block.train(training)), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, x, training=training)


def test_keys_and_parameters_are_the_authors():
    block = fused_nn.GSoP(256, stride=2)
    assert sum(p.numel() for p in block.parameters()) == sum(p.numel() for p in Original(256, "channel").parameters())
    assert block.row_conv_group.weight.shape == (512, 1, 128, 1)
    assert list(fused_nn.GSoP(256, mode="concat").state_dict()) == list(Original(256, "concat").state_dict())


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.GSoP(0),
    "mode: expected one of channel, position, avg, max, concat; got 'sum'": lambda: fused_nn.GSoP(8, mode="sum"),
    "reduced: expected a positive integer; got 0": lambda: fused_nn.GSoP(8, reduced=0),
    "stride: expected a positive integer; got 0": lambda: fused_nn.GSoP(8, stride=0),
    "channels: expected a multiple of 64 up to 2048 for 'concat'; got 32": lambda: fused_nn.GSoP(32, mode="concat"),
    "x: expected (B, 8, H, W); got shape (1, 4, 5, 5)": lambda: fused_nn.GSoP(8)(torch.zeros(1, 4, 5, 5)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", MODES)
def test_trains_under_deterministic_algorithms(mode):
    assert torch.are_deterministic_algorithms_enabled()
    block, _, x = build(mode, fused_nn)
    block.train()(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
