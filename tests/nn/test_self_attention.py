"""SAGAN's self-attention and DANet's two attentions and head against the published formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    error,
    in_layout,
    random,
    randomised,
    with_state_of,
)


def attended(query, key, value):
    """The values' sums with the softmax of the products, as published, (B, E, *space)."""
    energy = torch.bmm(query.flatten(2).mT, key.flatten(2))
    y = torch.bmm(value.flatten(2), energy.softmax(-1).permute(0, 2, 1))
    return y.view(*value.shape[:2], *query.shape[2:])


class Sagan(nn.Module):
    def __init__(self, channels, reduction=8, bias=False):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.theta = nn.Conv2d(channels, channels // reduction, 1, bias=bias)
        self.phi = nn.Conv2d(channels, channels // reduction, 1, bias=bias)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=bias)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=bias)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        y = self.o(attended(self.theta(x), self.pool(self.phi(x)), self.pool(self.g(x))))
        return self.gamma * y + x


class Pam(nn.Module):
    def __init__(self, channels, inner=None, rank=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        inner = inner or channels // 8
        self.gamma = nn.Parameter(torch.zeros(1))
        self.query_conv, self.key_conv = conv(channels, inner, 1), conv(channels, inner, 1)
        self.value_conv = conv(channels, channels, 1)

    def forward(self, x):
        return self.gamma * attended(self.query_conv(x), self.key_conv(x), self.value_conv(x)) + x


class Cam(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        rows = x.flatten(2)
        energy = torch.bmm(rows, rows.mT)
        attention = (energy.max(-1, keepdim=True)[0].expand_as(energy) - energy).softmax(-1)
        return self.gamma * torch.bmm(attention, rows).view(x.shape) + x


def normalised(channels, out):
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Head(nn.Module):
    def __init__(self, channels, out, width):
        super().__init__()
        self.conv5a, self.conv5c = normalised(channels, width), normalised(channels, width)
        self.sa, self.sc = Pam(width), Cam()
        self.conv51, self.conv52 = normalised(width, width), normalised(width, width)
        if out:
            self.conv6, self.conv7, self.conv8 = (
                nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, out, 1)) for _ in range(3)
            )

    def forward(self, x):
        positions, channels = self.conv51(self.sa(self.conv5a(x))), self.conv52(self.sc(self.conv5c(x)))
        if not hasattr(self, "conv8"):
            return positions + channels
        return torch.stack([self.conv8(positions + channels), self.conv6(positions), self.conv7(channels)])


class Stacked(nn.Module):
    """A head's three results as one."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return torch.stack(self.head(x))


MODULES = {"fused": fused_nn, "reference": reference}
SIZES = {1: (13,), 2: (7, 6), 3: (3, 5, 4)}
PAIRS = {
    "SelfAttention2d": (lambda m: m.SelfAttention2d(16), lambda: Sagan(16), 2),
    "SelfAttention2d, bias": (
        lambda m: m.SelfAttention2d(16, reduction=4, bias=True),
        lambda: Sagan(16, reduction=4, bias=True),
        2,
    ),
    "SelfAttention2d, port": (lambda m: m.SelfAttention2d(16, form="port"), lambda: Pam(16), 2),
    "PositionAttention": (lambda m: m.PositionAttention(16), lambda: Pam(16), 2),
    "PositionAttention, 1-D": (lambda m: m.PositionAttention(16, hidden=3, rank=1), lambda: Pam(16, 3, rank=1), 1),
    "PositionAttention, 3-D": (lambda m: m.PositionAttention(16, rank=3), lambda: Pam(16, rank=3), 3),
    "ChannelSelfAttention": (lambda m: m.ChannelSelfAttention(16), lambda: Cam(), 2),
    "ChannelSelfAttention, 1-D": (lambda m: m.ChannelSelfAttention(), lambda: Cam(), 1),
    "ChannelSelfAttention, 3-D": (lambda m: m.ChannelSelfAttention(), lambda: Cam(), 3),
    "DualAttention": (lambda m: m.DualAttention(16, hidden=8), lambda: Head(16, None, 8), 2),
}


def build(name, module):
    ours, original, rank = PAIRS[name]
    original = randomised(original())
    block = ours(module).double()
    state = original.state_dict()
    if "SelfAttention2d" in name and "port" not in name:
        block.load_state_dict(state)  # under the names of a port
    else:
        block.load_state_dict({k: v.reshape(block.state_dict()[k].shape) for k, v in state.items()})
    return block, original, random(2, 16, *SIZES[rank], dtype=torch.float64, scale=0.5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training):
    block, original, x = build(name, MODULES[module])
    found = []
    for b in (block, original):
        b.train(training)
        leaf = x.clone().requires_grad_()
        y = b(leaf)
        y.backward(random(*y.shape, seed=1, dtype=torch.float64))
        gradients = sorted((p.numel(), p.grad.sum().item(), p.grad.flatten()) for p in b.parameters())
        found.append([y, leaf.grad, *(g for *_, g in gradients), *b.buffers()])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
def test_a_head_with_classifiers_equals_the_original(module, training):
    original = randomised(Head(16, 5, 8))
    block = with_state_of(MODULES[module].DualAttention(16, 5, hidden=8).double(), original)
    for b in (block, original):
        for layer in b.modules():
            if isinstance(layer, nn.Dropout2d):
                layer.eval()
                layer.train = lambda mode, layer=layer: layer
    x = random(2, 16, 7, 6, dtype=torch.float64)
    assert_same_block(Stacked(block), original, x, training=training)


@pytest.mark.parametrize("module", MODULES)
def test_pytorchcv(module):
    danet = pytest.importorskip("pytorchcv.models.danet", reason="pytorchcv is not installed")
    original = randomised(danet.DANetHead(32, 5)).eval()
    block = MODULES[module].DualAttention(32, 5).double().eval()
    block.load_state_dict(original.state_dict())
    x = random(2, 32, 7, 6, dtype=torch.float64)
    for mine, theirs in zip(block(x), original(x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


BLOCKS = {
    "SelfAttention2d": lambda m: m.SelfAttention2d(16),
    "PositionAttention": lambda m: m.PositionAttention(16),
    "ChannelSelfAttention": lambda m: m.ChannelSelfAttention(),
    "DualAttention": lambda m: m.DualAttention(16, hidden=16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_as_good_as_the_reference(name, dtype, layout):
    original = randomised(BLOCKS[name](reference))
    block = BLOCKS[name](fused_nn).double()
    block.load_state_dict(original.state_dict())
    x = in_layout(random(3, 16, 13, 11, dtype=dtype, scale=0.25), layout)
    assert_as_good_as_reference(original, block, x, training=False)
    y = block.to(dtype)(x)
    assert y.dtype == dtype and y.stride() == x.stride()


@pytest.mark.parametrize("shape", [(2, 6, 5, 3), (2, 6, 1, 1), (1, 1, 4, 4), (0, 6, 5, 3), (2, 6, 40)], ids=str)
def test_channel_attention_as_good_as_the_reference(shape):
    block, original = fused_nn.ChannelSelfAttention(), reference.ChannelSelfAttention()

    def function(block):
        return lambda x, gamma: torch.func.functional_call(block, {"gamma": gamma}, (x,))

    inputs = {"x": random(*shape), "gamma": torch.tensor([0.7])}
    assert_equivalent(function(block), function(original), inputs, [random(*shape, seed=1)])


def test_energies_beyond_float16_are_finite():
    """Where the authors' difference to the largest is infinite minus infinite."""
    x = random(1, 4, 64, 64, scale=10).half()
    block = fused_nn.ChannelSelfAttention()
    nn.init.ones_(block.gamma)
    y = block.half()(x)
    exact = reference.ChannelSelfAttention().double()
    nn.init.ones_(exact.gamma)
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=2e-2, atol=0.1)
    assert Cam().half()(x).isnan().any()


@pytest.mark.parametrize("name", BLOCKS)
def test_nan_travels(name):
    block = randomised(BLOCKS[name](fused_nn)).eval()
    original = BLOCKS[name](reference).double().eval()
    original.load_state_dict(block.state_dict())
    x = random(2, 16, 6, 7, dtype=torch.float64, scale=0.5)
    x[0, 3, 2, 2] = torch.nan
    error(block(x), original(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_odd_strides_and_gradients(name):
    """A map that is a slice, and a gradient that is expanded."""
    block = randomised(BLOCKS[name](fused_nn))
    original = BLOCKS[name](reference).double()
    original.load_state_dict(block.state_dict())
    found = []
    for b in (block, original):
        whole = random(3, 32, 7, 9, dtype=torch.float64, scale=0.5).requires_grad_()
        y = b(whole[:, ::2].transpose(2, 3))
        y.backward(random(3, 16, 1, 1, seed=1, dtype=torch.float64).expand(y.shape))
        found.append([y, whole.grad, *(p.grad for p in b.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", BLOCKS)
def test_batches_of_none_and_of_one(name):
    block = randomised(BLOCKS[name](fused_nn)).eval()
    x = random(3, 16, 4, 5, dtype=torch.float64)
    assert block(x[:0]).shape == (0, 16, 4, 5)
    torch.testing.assert_close(block(x[:1]), block(x)[:1])
    block.train()(x[:1])


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast(name):
    """The layers in half precision, the map as it came."""
    block, original = BLOCKS[name](fused_nn), BLOCKS[name](reference)
    original.load_state_dict(randomised(block).float().state_dict())
    block.eval(), original.eval()
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, 16, 6, 7, dtype=dtype, scale=0.25)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = block(x), original(x)
        assert y.dtype == expected.dtype
        assert name == "DualAttention" or y.dtype == dtype
        torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_compiles_in_one_graph(name, training):
    torch._dynamo.reset()
    block = randomised(BLOCKS[name](fused_nn)).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, random(2, 16, 5, 7, scale=0.5), training=training)


@pytest.mark.parametrize("name", ["SelfAttention2d", "PositionAttention", "ChannelSelfAttention"])
def test_it_starts_as_the_identity(name):
    x = random(2, 16, 6, 5)
    assert torch.equal(BLOCKS[name](fused_nn)(x), x)


@pytest.mark.parametrize("how", ["hooks", "parametrizations"])
def test_spectral_norm(how):
    """torch's, in both its forms, on the convolutions."""
    norm = torch.nn.utils.spectral_norm if how == "hooks" else torch.nn.utils.parametrizations.spectral_norm
    found = []
    for module in (fused_nn, reference):
        block = module.SelfAttention2d(16).double()
        block.load_state_dict(randomised(reference.SelfAttention2d(16)).state_dict())
        torch.manual_seed(0)
        for name in ("query_conv", "key_conv", "value_conv", "out_conv"):
            setattr(block, name, norm(getattr(block, name)))
        x = random(2, 16, 6, 8, dtype=torch.float64)
        y = block(block(x))
        y.square().sum().backward()
        found.append([y, *(p.grad for p in block.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def renamed(block, names):
    """Random values for the block under other names: of layers, or of whole keys."""
    state = randomised(block).float().state_dict()
    found = {}
    for key, tensor in state.items():
        layer, dot, rest = key.rpartition(".")
        found[names[key] if key in names else names.get(layer, layer) + dot + rest] = tensor
    return found


MMSEG = {
    key: value
    for branch, first, attention, second, last in (
        ("pam", "conv5a", "sa", "conv51", "conv6"),
        ("cam", "conv5c", "sc", "conv52", "conv7"),
    )
    for key, value in (
        (f"{first}.0", f"{branch}_in_conv.conv"),
        (f"{first}.1", f"{branch}_in_conv.bn"),
        (f"{attention}.gamma", f"{branch}.gamma.scale"),
        *((f"{attention}.{n}_conv", f"{branch}.{n}_project") for n in ("query", "key", "value")),
        (f"{second}.0", f"{branch}_out_conv.conv"),
        (f"{second}.1", f"{branch}_out_conv.bn"),
        (f"{last}.1", f"{branch}_conv_seg"),
    )
} | {"conv8.1": "conv_seg"}
SN = {"query_conv": "snconv1x1_theta", "key_conv": "snconv1x1_phi", "value_conv": "snconv1x1_g"}
CHECKPOINTS = {
    "DANet.PAM_Module": lambda: (checkpoint("DANet.PAM_Module"), fused_nn.PositionAttention(64)),
    "DANet.CAM_Module": lambda: (checkpoint("DANet.CAM_Module"), fused_nn.ChannelSelfAttention(64)),
    "mmseg, positions": lambda: (
        renamed(
            fused_nn.PositionAttention(64),
            {f"{n}_conv": f"{n}_project" for n in ("query", "key", "value")} | {"gamma": "gamma.scale"},
        ),
        fused_nn.PositionAttention(64),
    ),
    "mmseg, channels": lambda: ({"gamma.scale": torch.tensor(0.3)}, fused_nn.ChannelSelfAttention(64)),
    "mmseg": lambda: (renamed(fused_nn.DualAttention(64, 5), MMSEG), fused_nn.DualAttention(64, 5)),
    "pytorchcv": lambda: ({"scale.alpha": torch.tensor([0.3])}, fused_nn.ChannelSelfAttention(64)),
    "spectral ports": lambda: (
        renamed(fused_nn.SelfAttention2d(64, bias=True), SN | {"out_conv": "snconv1x1_attn", "gamma": "sigma"}),
        fused_nn.SelfAttention2d(64, bias=True),
    ),
    "hub ports": lambda: (
        renamed(fused_nn.SelfAttention2d(64), SN | {"out_conv": "snconv1x1_o_conv"}),
        fused_nn.SelfAttention2d(64),
    ),
}


@pytest.mark.parametrize("source", CHECKPOINTS)
def test_checkpoints_of_others_load(source):
    state, block = CHECKPOINTS[source]()
    block.load_state_dict(dict(state))
    ours, theirs = (
        sorted((t.numel(), t.double().sum().item()) for t in s.values()) for s in (block.state_dict(), state)
    )
    assert ours == theirs


def test_keys():
    keys = {"DANet.PAM_Module": fused_nn.PositionAttention(64), "DANet.CAM_Module": fused_nn.ChannelSelfAttention(64)}
    for source, block in keys.items():
        assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes(source)
    assert set(fused_nn.DualAttention(64, 5).state_dict()) == set(Head(64, 5, 16).state_dict())
    port = fused_nn.SelfAttention2d(64, form="port").state_dict()
    assert {k: tuple(v.shape) for k, v in port.items()} == checkpoint_shapes("DANet.PAM_Module")


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.PositionAttention(0),
    "channels: expected a positive integer; got 'x'": lambda: fused_nn.ChannelSelfAttention("x"),
    "reduction: 8 leaves no hidden channel of 4; give `hidden` instead": lambda: fused_nn.PositionAttention(4),
    "hidden: expected a positive integer; got 0": lambda: fused_nn.PositionAttention(8, hidden=0),
    "rank: expected 1, 2 or 3; got 0": lambda: fused_nn.PositionAttention(8, rank=0),
    "form: expected one of original, port; got 'other'": lambda: fused_nn.SelfAttention2d(8, form="other"),
    "dropout: expected a number from 0 to 1; got 2": lambda: fused_nn.DualAttention(64, dropout=2),
    "out_channels: expected a positive integer; got 0": lambda: fused_nn.DualAttention(64, 0),
    "x: expected 8 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.PositionAttention(8)(random(1, 4, 3, 3)),
    "x: expected 6 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.ChannelSelfAttention(6)(random(1, 4, 3, 3)),
    "x: expected (B, C, H, W); got shape (8, 3, 3)": lambda: fused_nn.SelfAttention2d(8)(random(8, 3, 3)),
    "x: expected (B, C, L); got shape (1, 8, 3, 3)": lambda: fused_nn.PositionAttention(8, rank=1)(random(1, 8, 3, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("name", BLOCKS)
def test_trains_under_deterministic_algorithms(name):
    assert torch.are_deterministic_algorithms_enabled()
    block = randomised(BLOCKS[name](fused_nn)).float()
    block(random(2, 16, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
