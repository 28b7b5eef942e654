"""ChannelAttention, SpatialAttention, CBAM: the code they are equivalent to, checkpoints, options, errors."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_equivalent,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)
from tests.ops.test_cbam import separated

timm_cbam = pytest.importorskip("timm.layers.cbam", reason="timm is not installed")

C = 32


class ZPool(nn.Module):
    """Maximum, then mean, over the channels."""

    def forward(self, x):
        return torch.stack([x.max(dim=1)[0], x.mean(dim=1)], dim=1)


class OfficialSpatial(nn.Module):
    """The spatial gate of the authors' CBAM, for any rank and with its choices open."""

    def __init__(self, rank=2, k=7, mean_first=False, norm=True, bias=False):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](2, 1, k, padding="same", bias=bias)
        batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](1, momentum=0.01)
        self.spatial = nn.ModuleDict({"conv": conv} | ({"bn": batch_norm} if norm else {}))
        self.mean_first = mean_first

    def forward(self, x):
        z = ZPool()(x)
        z = self.spatial["conv"](z.flip(1) if self.mean_first else z)
        if "bn" in self.spatial:
            z = self.spatial["bn"](z)
        return x * torch.sigmoid(z)


class OfficialChannel(nn.Module):
    """The channel gate of the authors' CBAM: two layers, the first maximum of adaptive pooling."""

    def __init__(self, channels=C, hidden=2, bias=True):
        super().__init__()
        linears = nn.Linear(channels, hidden, bias=bias), nn.Linear(hidden, channels, bias=bias)
        self.mlp = nn.Sequential(nn.Flatten(), linears[0], nn.ReLU(), linears[1])

    def forward(self, x):
        flat = x.flatten(2)
        logits = self.mlp(flat.sum(2) / flat.shape[2]) + self.mlp(F.adaptive_max_pool1d(flat, 1))
        return x * torch.sigmoid(logits).reshape(*logits.shape, *[1] * (x.dim() - 2))


class OfficialCBAM(nn.Module):
    def __init__(self, channels=C, hidden=2, no_spatial=False, **options):
        super().__init__()
        self.ChannelGate = OfficialChannel(channels, hidden)
        self.SpatialGate = nn.Identity() if no_spatial else OfficialSpatial(**options)

    def forward(self, x):
        return self.SpatialGate(self.ChannelGate(x))


class SharedConv(nn.Module):
    """Channel attention by one convolution over the channels, of both descriptors."""

    def __init__(self, k=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        flat = x.flatten(2)
        rows = self.conv(flat.mean(2)[:, None]) + self.conv(flat.max(2)[0][:, None])
        return x * rows.sigmoid().reshape(*x.shape[:2], *[1] * (x.dim() - 2))


class ExternalSpatial(OfficialSpatial):
    """With a bias, without BatchNorm."""

    def __init__(self):
        super().__init__(norm=False, bias=True)


class Residual(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return x + self.block(x)


class Light(timm_cbam.LightChannelAttn):
    """timm's, by the mean of both pools."""


TIMM = {"bias": False, "divisor": 1, "layer": "conv1x1", "ties": "even"}
ORDER = {"order": ("mean", "max")}
TIMM_SPATIAL = ORDER | {"momentum": 0.1}

#: name -> (ours, the original, spatial rank)
PAIRS = {
    "channel, official": (lambda m: m.ChannelAttention(C), OfficialChannel, 2),
    "channel, official 1-D": (lambda m: m.ChannelAttention(C), OfficialChannel, 1),
    "channel, official 3-D": (lambda m: m.ChannelAttention(C), OfficialChannel, 3),
    "channel, notes": (
        lambda m: m.ChannelAttention(C, reduction=4, bias=False),
        lambda: OfficialChannel(C, 8, False),
        2,
    ),
    "channel, hidden": (lambda m: m.ChannelAttention(C, hidden=5), lambda: OfficialChannel(C, 5), 2),
    "channel, conv1d": (lambda m: m.ChannelAttention(C, layer="conv1d"), SharedConv, 2),
    "channel, conv1d k 5": (lambda m: m.ChannelAttention(C, layer="conv1d", kernel_size=5), lambda: SharedConv(5), 3),
    "channel, timm": (lambda m: m.ChannelAttention(C, **TIMM), lambda: timm_cbam.ChannelAttn(C), 2),
    "channel, timm bias": (
        lambda m: m.ChannelAttention(C, **TIMM | {"bias": True}, reduction=5),
        lambda: timm_cbam.ChannelAttn(C, rd_ratio=1 / 5, mlp_bias=True),
        2,
    ),
    "channel, timm silu": (
        lambda m: m.ChannelAttention(C, **TIMM, activation="silu", gate="hard_sigmoid"),
        lambda: timm_cbam.ChannelAttn(C, act_layer=nn.SiLU, gate_layer="hard_sigmoid"),
        2,
    ),
    "channel, timm light": (lambda m: m.ChannelAttention(C, **TIMM, pool="avgmax"), lambda: Light(C), 2),
    "spatial, official": (lambda m: m.SpatialAttention(C), OfficialSpatial, 2),
    "spatial, official 1-D": (lambda m: m.SpatialAttention(rank=1), lambda: OfficialSpatial(1), 1),
    "spatial, official 3-D": (lambda m: m.SpatialAttention(rank=3), lambda: OfficialSpatial(3), 3),
    "spatial, k 3": (lambda m: m.SpatialAttention(kernel_size=3), lambda: OfficialSpatial(k=3), 2),
    "spatial, k 5 3 1": (
        lambda m: m.SpatialAttention(kernel_size=(5, 3, 1), rank=3),
        lambda: OfficialSpatial(3, (5, 3, 1)),
        3,
    ),
    "spatial, notes": (
        lambda m: m.SpatialAttention(kernel_size=5, batch_norm=False),
        lambda: OfficialSpatial(k=5, norm=False),
        2,
    ),
    "spatial, notes mean first": (
        lambda m: m.SpatialAttention(batch_norm=False, **ORDER),
        lambda: OfficialSpatial(norm=False, mean_first=True),
        2,
    ),
    "spatial, bias": (lambda m: m.SpatialAttention(batch_norm=False, bias=True), ExternalSpatial, 2),
    "spatial, bias and norm": (lambda m: m.SpatialAttention(bias=True), lambda: OfficialSpatial(bias=True), 2),
    "spatial, timm": (lambda m: m.SpatialAttention(ties="even", **TIMM_SPATIAL), timm_cbam.SpatialAttn, 2),
    "cbam, official": (lambda m: m.CBAM(C), OfficialCBAM, 2),
    "cbam, official 1-D": (lambda m: m.CBAM(C, rank=1), lambda: OfficialCBAM(rank=1), 1),
    "cbam, official 3-D": (lambda m: m.CBAM(C, rank=3), lambda: OfficialCBAM(rank=3), 3),
    "cbam, no spatial": (lambda m: m.CBAM(C, no_spatial=True), lambda: OfficialCBAM(no_spatial=True), 2),
    "cbam, bias, no norm": (
        lambda m: m.CBAM(C, batch_norm=False, spatial_bias=True),
        lambda: OfficialCBAM(norm=False, bias=True),
        2,
    ),
    "cbam, conv1d": (
        lambda m: m.CBAM(C, layer="conv1d", batch_norm=False, kernel_size=3, **ORDER),
        lambda: nn.Sequential(SharedConv(), OfficialSpatial(k=3, norm=False, mean_first=True)),
        2,
    ),
    "cbam, timm": (lambda m: m.CBAM(C, **TIMM, **TIMM_SPATIAL), lambda: timm_cbam.CbamModule(C), 2),
    "cbam, timm k 3": (
        lambda m: m.CBAM(C, **TIMM, **TIMM_SPATIAL, kernel_size=3, reduction=5, gate="hard_sigmoid"),
        lambda: timm_cbam.CbamModule(C, rd_ratio=1 / 5, spatial_kernel_size=3, gate_layer="hard_sigmoid"),
        2,
    ),
}


@pytest.mark.parametrize("values", ["distinct", "ties"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, training, values):
    ours, original, rank = PAIRS[name]
    x = random(3, C, *(6, 5, 4)[:rank], dtype=torch.float64)
    x = x.round() if values == "ties" else x
    original = randomised(original())
    ours = with_state_of(ours(reference).double(), original)
    assert_same_block(ours, original, x, training=training)


#: source -> (block, whether its names and shapes are ours)
CHECKPOINTS = {
    "note000.Channel_Attention_Module_FC": (lambda m: m.ChannelAttention(64, reduction=4, bias=False), False),
    "note000.Channel_attention_Module_FC_Use_Conv": (
        lambda m: m.ChannelAttention(64, reduction=4, bias=False, layer="conv1x1"),
        False,
    ),
    "note000.Channel_Attention_Module_Conv": (lambda m: m.ChannelAttention(64, layer="conv1d", gamma=2.4), True),
    "note001.channel_attention": (lambda m: m.ChannelAttention(64, reduction=4, bias=False), True),
    "note004.ChannelAttention": (lambda m: m.ChannelAttention(64, bias=False), False),
    "note001.spatial_attention": (lambda m: m.SpatialAttention(batch_norm=False), True),
    "note004.SpatialAttention": (lambda m: m.SpatialAttention(batch_norm=False, **ORDER), True),
    "note000.CBAMBlock FC": (lambda m: m.CBAM(64, bias=False, batch_norm=False), False),
    "note000.CBAMBlock Conv": (lambda m: m.CBAM(64, layer="conv1d", batch_norm=False), False),
    "note002.CBAM": (lambda m: m.CBAM(64, bias=False, batch_norm=False, layer="conv1x1", **ORDER), False),
    "Jongchan.CBAM": (lambda m: m.CBAM(64), False),
    "xmu.CBAMBlock": (lambda m: m.CBAM(64, bias=False, batch_norm=False, spatial_bias=True), False),
    "timm.CbamModule": (lambda m: m.CBAM(64, **TIMM, **TIMM_SPATIAL), True),
}


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a model"])
@pytest.mark.parametrize("source", CHECKPOINTS)
def test_loads_the_checkpoint_of(source, nested):
    build, same_names = CHECKPOINTS[source]
    block, state = build(reference), checkpoint(source)
    model = nn.Sequential(nn.ReLU(), block) if nested else block
    model.load_state_dict({f"1.{k}": v for k, v in state.items()} if nested else state)
    for (key, mine), (name, theirs) in zip(block.state_dict().items(), state.items(), strict=True):
        assert torch.equal(mine, theirs.reshape(mine.shape)) and key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]
    if same_names:
        assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes(source)


def test_checkpoints_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match="Missing key.*channel.fc1.bias"):
        reference.CBAM(64).load_state_dict(checkpoint("timm.CbamModule"))
    with pytest.raises(RuntimeError, match="Unexpected key.*bn"):
        reference.CBAM(64, batch_norm=False).load_state_dict(checkpoint("Jongchan.CBAM"))
    both = checkpoint("note001.channel_attention") | {"fc.0.weight": torch.zeros(16, 64)}
    with pytest.raises(RuntimeError, match="Unexpected key.*fc.0.weight"):
        reference.ChannelAttention(64, reduction=4, bias=False).load_state_dict(both)
    with pytest.raises(RuntimeError, match="size mismatch for fc1.weight"):
        state = checkpoint("note001.channel_attention") | {"fc1.weight": torch.zeros(64, 16)}
        reference.ChannelAttention(64, reduction=4, bias=False).load_state_dict(state)


def test_the_state_given_to_load_is_not_changed():
    state = checkpoint("Jongchan.CBAM")
    reference.CBAM(64).load_state_dict(state)
    assert list(state) == list(checkpoint_shapes("Jongchan.CBAM"))


def test_parameter_counts_of_the_notes():
    def count(block):
        return sum(p.numel() for p in block.parameters())

    plain = {"bias": False, "batch_norm": False}
    assert count(reference.CBAM(64, reduction=9, kernel_size=5, **plain)) == 946
    assert count(reference.CBAM(64, layer="conv1d", kernel_size=5, **plain)) == 53
    assert count(reference.CBAM(32, reduction=4, kernel_size=7, **plain)) == 610


BLOCKS = {name: build for name, (build, _, rank) in PAIRS.items() if rank == 2}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in BLOCKS if not name.startswith("cbam")])
def test_the_gate_alone(name, training):
    block = randomised(BLOCKS[name](reference)).train(training)
    x = random(3, C, 6, 5, dtype=torch.float64)
    y = copy.deepcopy(block)(x)
    block.return_gate = True
    gate = block(x)
    assert gate.shape == ((3, C, 1, 1) if name.startswith("channel") else (3, 1, 6, 5))
    torch.testing.assert_close(x * gate, y)
    with pytest.raises(ValueError, match="residual: the gate alone has none"):
        block(x, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_residual_and_activation(name, training):
    block = randomised(BLOCKS[name](reference)).train(training)
    x, residual = random(3, C, 6, 5, dtype=torch.float64), random(3, C, 6, 5, seed=1, dtype=torch.float64)
    expected = (copy.deepcopy(block)(x) + residual).relu()
    last = block if not isinstance(block, reference.CBAM) else block.spatial or block.channel
    last.post_activation = "relu"
    torch.testing.assert_close(block(x, residual), expected)


def test_post_activation_goes_to_the_last_part():
    for no_spatial in (False, True):
        block = reference.CBAM(C, post_activation="relu", no_spatial=no_spatial).eval()
        plain = reference.CBAM(C, no_spatial=no_spatial).eval()
        plain.load_state_dict(block.state_dict())
        x = random(2, C, 5, 5)
        assert torch.equal(block(x, x.flip(0)), plain(x, x.flip(0)).relu())


@pytest.mark.parametrize("name", BLOCKS)
def test_one_position_and_a_batch_of_one(name):
    block = BLOCKS[name](reference)
    assert torch.isfinite(block.eval()(random(1, C, 1, 1))).all()
    assert torch.isfinite(block.train()(random(2, C, 1, 1))).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_and_pickles(name):
    block = BLOCKS[name](reference).eval()
    x = random(2, C, 7, 9)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert torch.equal(other(x), block(x))
        assert list(other.state_dict()) == list(block.state_dict())


def test_statistics_frozen_in_a_model_that_trains():
    block = randomised(reference.CBAM(C)).train()
    block.spatial.conv["bn"].eval()
    frozen = copy.deepcopy(block).eval()
    x = random(2, C, 5, 5, dtype=torch.float64)
    assert torch.equal(block(x), frozen(x))
    assert torch.equal(block.spatial.conv["bn"].running_mean, frozen.spatial.conv["bn"].running_mean)


def norms_of(block):
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("module", [fused_nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name", ["spatial, official", "cbam, official"])
def test_statistics_that_are_the_mean_of_all_batches(name, module):
    """momentum=None."""
    ours, original, _ = PAIRS[name]
    original = randomised(original()).train()
    block = with_state_of(ours(module).double(), original).train()
    for norm in norms_of(original) + norms_of(block):
        norm.momentum = None
        norm.reset_running_stats()
    for seed in range(3):
        x = random(3, C, 6, 5, seed=seed, dtype=torch.float64)
        torch.testing.assert_close(block(x), original(x))
    (mine,), (theirs,) = norms_of(block), norms_of(original)
    assert mine.num_batches_tracked == 3
    torch.testing.assert_close(dict(mine.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("module", [fused_nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name", ["SpatialAttention", "CBAM"])
def test_statistics_in_half_precision_are_rounded_once(name, module):
    dtype = torch.bfloat16
    block = getattr(module, name)(C, momentum=0.1).to(dtype).train()
    exact = getattr(reference, name)(C, momentum=0.1).double().train()
    (norm,), (exact_norm,) = norms_of(block), norms_of(exact)
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(5.0)
    exact.load_state_dict(block.state_dict())
    x = separated((2, C, 6, 5), dtype)
    block(x)
    exact(x.double())
    for mine, theirs in zip(norm.buffers(), exact_norm.buffers(), strict=True):
        # The batch's share, a tenth, has the logits' rounding.
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0.6 * torch.finfo(dtype).eps, atol=0)
    assert norm.running_mean.dtype == dtype and norm.running_mean < 3


def test_statistics_that_are_not_tracked():
    block = randomised(reference.SpatialAttention()).eval()
    x = random(2, C, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(block).train()(x)
    norm = block.conv["bn"]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    torch.testing.assert_close(block(x), expected)


def test_half_precision_with_norms_in_float32():
    block = reference.CBAM(C).bfloat16().eval()
    block.spatial.conv["bn"].float()
    assert block(random(2, C, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


ERRORS = {
    "channels: expected a positive integer; got 0": lambda m: m.ChannelAttention(0),
    "channels: expected a positive integer; got 2.0": lambda m: m.SpatialAttention(2.0),
    "reduction: 16 leaves no hidden channel of 8; give `hidden` instead": lambda m: m.CBAM(8),
    "reduction: expected a finite number; got nan": lambda m: m.CBAM(8, reduction=float("nan")),
    "hidden: expected a positive integer; got 0": lambda m: m.CBAM(8, hidden=0),
    "layer: expected one of linear, conv1x1, conv1d; got 'dense'": lambda m: m.ChannelAttention(8, layer="dense"),
    "kernel_size: expected an odd number; got 4": lambda m: m.ChannelAttention(8, layer="conv1d", kernel_size=4),
    "kernel_size: expected None for layer='linear'; got 3": lambda m: m.ChannelAttention(64, kernel_size=3),
    "pool: expected one of avg, max, avgmax, both; got 'lse'": lambda m: m.CBAM(64, pool="lse"),
    "ties: expected one of first, even; got 'last'": lambda m: m.SpatialAttention(ties="last"),
    "gate: expected one of ": lambda m: m.SpatialAttention(gate="softmax"),
    "kernel_size: expected an odd number; got 6": lambda m: m.CBAM(64, kernel_size=6),
    "kernel_size: expected an odd number or 2 of them; got (3, 3, 3)": lambda m: m.CBAM(64, kernel_size=(3, 3, 3)),
    "order: expected ('max', 'mean') or ('mean', 'max'); got ('max', 'max')": lambda m: m.CBAM(64, order=("max",) * 2),
    "rank: expected 1, 2 or 3; got 4": lambda m: m.CBAM(64, rank=4),
    "post_activation: the gate alone has none; expected 'identity' with return_gate=True": (
        lambda m: m.SpatialAttention(return_gate=True, post_activation="relu")
    ),
    "x: expected 7 channels; got shape (2, 4, 5, 5)": lambda m: m.SpatialAttention(7)(random(2, 4, 5, 5)),
    "x: expected 64 channels; got shape (2, 4, 5, 5)": (
        lambda m: m.CBAM(64, layer="conv1d").eval()(random(2, 4, 5, 5))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message](reference)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()  # as for every test here: tests/conftest.py
    for build in BLOCKS.values():
        block = build(reference)
        optimizer = torch.optim.SGD(block.parameters(), 0.1)
        block(random(2, C, 7, 9)).square().sum().backward()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in block.parameters())


def fused_pair(build, dtype, training):
    fused = randomised(build(fused_nn)).to(dtype).train(training)
    plain = build(reference).to(dtype).train(training)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PAIRS)
def test_fused_equals_its_reference(name, training, dtype, layout):
    build, _, rank = PAIRS[name]
    fused, plain = fused_pair(build, dtype, training)
    shape = (2, C, *(7, 9, 5)[:rank])
    # In half precision only what has clear maxima: between near-equal ones eager and float64 choose differently.
    x = separated(shape, dtype) if dtype == torch.bfloat16 else random(*shape, dtype=dtype)
    inputs = {"x": in_layout(x, layout)}
    inputs |= {k: v.detach() for k, v in fused.named_parameters()}

    def call(module):
        def function(x, **parameters):
            tensors = {k: b.clone().to(x.dtype if b.is_floating_point() else b.dtype) for k, b in buffers.items()}
            return torch.func.functional_call(module, tensors | parameters, (x,))

        buffers = dict(module.named_buffers())
        return function

    assert_equivalent(call(fused), call(plain), inputs, [random(*shape, seed=1, dtype=dtype)])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_fused_statistics_gate_and_residual(name, training):
    fused, plain = fused_pair(BLOCKS[name], torch.float64, training)
    x = random(3, C, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x, x.flip(0)), plain(x, x.flip(0)))
    for mine, theirs in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    if not name.startswith("cbam"):
        fused.return_gate = plain.return_gate = True
        torch.testing.assert_close(fused(x), plain(x))
