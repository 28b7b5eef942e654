"""Global context against timm's class and the published code."""

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
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)

timm_context = pytest.importorskip("timm.layers.global_context", reason="timm is not installed")


class Original(nn.Module):
    """GCNet's ContextBlock, as in its formulas; for any number of spatial axes."""

    def __init__(self, channels, width, *, scale=False, add=True, attention=True):
        super().__init__()

        def mlp():
            layers = nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, channels)
            return nn.Sequential(*layers)

        self.conv_mask = nn.Linear(channels, 1) if attention else None
        self.channel_add_conv = mlp() if add else None
        self.channel_mul_conv = mlp() if scale else None

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        shares = torch.ones_like(pixels[..., :1]) if self.conv_mask is None else self.conv_mask(pixels).exp()
        context = (shares * pixels).sum(1) / shares.sum(1)
        shape = (*context.shape, *(1,) * (x.dim() - 2))
        if self.channel_mul_conv is not None:
            x = x * torch.sigmoid(self.channel_mul_conv(context)).view(shape)
        if self.channel_add_conv is not None:
            x = x + self.channel_add_conv(context).view(shape)
        return x


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "add": (lambda m: m.GlobalContext(64), lambda: Original(64, 4)),
    "scale": (lambda m: m.GlobalContext(24, fuse="scale", hidden=5), lambda: Original(24, 5, scale=True, add=False)),
    "both": (lambda m: m.GlobalContext(32, fuse="both", ratio=0.2), lambda: Original(32, 6, scale=True)),
    "avg": (
        lambda m: m.GlobalContext(32, fuse="both", ratio=1 / 4, pooling="avg"),
        lambda: Original(32, 8, scale=True, attention=False),
    ),
}
TIMM = {
    "scale": ({"fuse": "scale"}, {}),
    "add": ({"fuse": "add"}, {"fuse_add": True, "fuse_scale": False}),
    "both": (
        {"fuse": "both", "activation": "silu", "gate": "hard_sigmoid"},
        {"fuse_add": True, "act_layer": nn.SiLU, "gate_layer": "hard_sigmoid"},
    ),
    "no attention": ({"fuse": "scale", "pooling": "avg", "hidden": 6}, {"use_attn": False, "rd_channels": 6}),
    "divisor": ({"fuse": "scale", "ratio": 1 / 3, "divisor": 8}, {"rd_ratio": 1 / 3, "rd_divisor": 8}),
}


def as_timm(module, channels: int, name: str) -> nn.Module:
    ours = {"ratio": 1 / 8, "divisor": 1, "eps": 1e-6} | TIMM[name][0]
    return module.GlobalContext(channels, **ours)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(7, 9), (11,), (3, 5, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, layout, shape, module, training):
    ours, original = PAIRS[name]
    original = randomised(original())
    block = with_state_of(ours(MODULES[module]).double(), original)
    x = in_layout(random(3, block.channels, *shape, dtype=torch.float64), layout)
    assert_same_block(block, original, x, training=training)
    assert block(x).stride() == x.stride()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", TIMM)
def test_equals_timm(name, module):
    original = randomised(timm_context.GlobalContext(40, **TIMM[name][1]))
    block = as_timm(MODULES[module], 40, name).double()
    block.load_state_dict(original.state_dict())  # the same keys and shapes
    assert_same_block(block, original, random(3, 40, 7, 9, dtype=torch.float64), training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fuse", ["add", "scale", "both"])
def test_as_good_as_the_reference(fuse, dtype, layout):
    original = randomised(reference.GlobalContext(32, fuse=fuse, ratio=1 / 4))
    block = fused_nn.GlobalContext(32, fuse=fuse, ratio=1 / 4).double()
    block.load_state_dict(original.state_dict())
    # Samples that differ: of means of plain noise a LayerNorm would amplify rounding alone.
    x = in_layout((random(4, 32, 13, 17) + random(4, 32, 1, 1)).to(dtype), layout)
    assert_as_good_as_reference(original, block, x)


@pytest.mark.parametrize("fuse", ["add", "scale", "both"])
def test_compiles_in_one_graph(fuse):
    torch._dynamo.reset()
    block = randomised(fused_nn.GlobalContext(16, fuse=fuse))
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, random(2, 16, 5, 7), training=True)


@pytest.mark.parametrize("fuse", ["add", "scale", "both"])
def test_autocast(fuse):
    block = fused_nn.GlobalContext(16, fuse=fuse, ratio=1 / 2)
    block.load_state_dict(randomised(reference.GlobalContext(16, fuse=fuse, ratio=1 / 2)).state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, 16, 9, 8, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = block(x)
        y.sum().backward()
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), block(x.float()), rtol=0.05, atol=0.05)


def test_one_map_is_kept_where_it_is_added():
    """Of "add" backward keeps x, and no other map."""
    block, x = fused_nn.GlobalContext(32), random(2, 32, 40, 40).requires_grad_()
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    assert sum(saved.values()) < 1.2 * x.untyped_storage().nbytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_stays_in_its_sample(layout):
    block = randomised(fused_nn.GlobalContext(16, fuse="both")).float()
    x = random(3, 16, 6, 5)
    x[1, 2, 3, 4] = torch.nan
    y = block(in_layout(x, layout))
    assert y[1].isnan().all() and not y[::2].isnan().any()


def test_empty_batch():
    block = fused_nn.GlobalContext(16, fuse="both")
    x = random(0, 16, 5, 4).requires_grad_()
    y = block(x)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert all(not p.grad.any() for p in block.parameters())


def test_starts_as_the_authors_block_does():
    x = random(2, 32, 5, 6)
    torch.testing.assert_close(fused_nn.GlobalContext(32)(x), x)
    torch.testing.assert_close(fused_nn.GlobalContext(32, fuse="scale")(x), x / 2)
    block = fused_nn.GlobalContext(4096, hidden=1)
    assert 0.9 < block.conv_attn.weight.std() / (2 / 4096) ** 0.5 < 1.1 and not block.conv_attn.bias.any()


KEYS = {
    "timm.GlobalContext": lambda: fused_nn.GlobalContext(64, fuse="scale", ratio=1 / 8),
    "timm.GlobalContext_add": lambda: fused_nn.GlobalContext(64, ratio=1 / 8),
    "GCNet.ContextBlock": lambda: fused_nn.GlobalContext(64, fuse="both"),
}


@pytest.mark.parametrize("source", KEYS)
def test_keys(source):
    block = KEYS[source]()
    state = checkpoint(source)
    block.load_state_dict(dict(state))
    for (key, ours), theirs in zip(block.state_dict().items(), state.values(), strict=True):
        assert torch.equal(ours, theirs.reshape(ours.shape)), key
    if source.startswith("timm"):
        assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes(source)


def test_parameters_of_the_published_block():
    """2 C^2 / r and what is small beside it."""
    assert sum(p.numel() for p in fused_nn.GlobalContext(256).parameters()) == 257 + 2 * 256 * 16 + 16 + 32 + 256


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.GlobalContext(0),
    "fuse: expected one of add, scale, both; got 'channel_add'": lambda: fused_nn.GlobalContext(8, fuse="channel_add"),
    "pooling: expected one of attention, avg; got 'max'": lambda: fused_nn.GlobalContext(8, pooling="max"),
    "ratio: expected a positive number; got -1": lambda: fused_nn.GlobalContext(8, ratio=-1),
    "ratio: expected a finite number; got nan": lambda: fused_nn.GlobalContext(8, ratio=float("nan")),
    "ratio: 0.0625 leaves no hidden channel of 8; give `hidden` instead": lambda: fused_nn.GlobalContext(8),
    "divisor: expected a positive integer; got 0": lambda: fused_nn.GlobalContext(64, divisor=0),
    "hidden: expected a positive integer; got 0": lambda: fused_nn.GlobalContext(8, hidden=0),
    "activation: expected one of ": lambda: fused_nn.GlobalContext(64, activation="mish"),
    "gate: expected one of ": lambda: fused_nn.GlobalContext(64, gate="softmax"),
    "eps: expected a number of at least 0; got -1": lambda: fused_nn.GlobalContext(64, eps=-1),
    "x: expected 16 channels; got shape (2, 5, 4, 4)": lambda: fused_nn.GlobalContext(16)(random(2, 5, 4, 4)),
    "x: expected (B, C, *spatial) with one to three": lambda: fused_nn.GlobalContext(16)(random(2, 16)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fuse", ["add", "scale", "both"])
def test_trains_under_deterministic_algorithms(fuse):
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.GlobalContext(16, fuse=fuse)
    block(random(2, 16, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
