"""Attention between layers of a block's own: every way of writing it, and what a fused one keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from fused_attn import explain, fuse, unfuse
from fused_attn import nn as fused_nn
from fused_attn.fusion.recipes.names import host_class
from tests.checks import random
from tests.fusion.reading.pasted_attention_forms import (
    BLOCKS,
    LOOK_ALIKES,
    Attention,
    CrissCrossAttention,
    EinsumCrissCross,
    Scale,
)
from tests.fusion.reading.pasted_attentions import CAM_Module, PAM_Module


def started(block: nn.Module) -> nn.Module:
    """With numbers in what starts at zero."""
    with torch.no_grad():
        for p in block.parameters():
            p.uniform_(-0.5, 0.5)
    return block


def one_of(name, dtype=torch.float64):
    build, kind, channels, rank = BLOCKS[name]
    torch.manual_seed(0)
    plain = started(build()).to(dtype)
    space = (6, 8, 4) if isinstance(plain, Attention) else (9, 6, 5)
    return plain, kind, random(2, channels, *space[:rank], dtype=dtype)


def same_as(block, plain, x, **bounds):
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = block(a), plain(b)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, **bounds)
    grad = random(*expected.shape, dtype=expected.dtype)
    actual.backward(grad), expected.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, **bounds)
    for p, q in zip(block.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **bounds)
    block.zero_grad(), plain.zero_grad()


@pytest.mark.parametrize("name", BLOCKS)
def test_recognised(name):
    plain, kind, x = one_of(name)
    block = fuse(copy.deepcopy(plain), strict=True)
    assert [(row.block, row.fused) for row in explain(block)] == [(kind, True)]
    assert host_class(block) is type(plain)
    assert list(block.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        block.train(training), plain.train(training)
        same_as(block, plain, x, rtol=1e-9, atol=1e-10)
        if x.dim() > 3:
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            same_as(block, plain, x.contiguous(memory_format=last), rtol=1e-9, atol=1e-10)
    for p, q in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    try:
        expected = plain(x[:0])
    except (RuntimeError, ValueError):  # a view to -1, or a pool
        expected = x[:0]
    assert block(x[:0]).shape == expected.shape
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert host_class(other) is type(plain) and torch.equal(other(x), block(x))
    assert type(unfuse(block)) is type(plain)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_mixed_precision(name):
    """The dtypes of the results are those of the code."""
    plain, _, x = one_of(name, torch.float32)
    plain.eval()
    block = fuse(copy.deepcopy(plain), strict=True)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            try:
                expected = plain(given)
            except RuntimeError:  # as a GroupNorm of another dtype
                continue
            actual = block(given)
        assert actual.dtype == expected.dtype
        off = (actual.float() - expected.float()).abs().mean() / expected.float().abs().mean()
        assert off < 0.05


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_left_alone(name):
    build, reason = LOOK_ALIKES[name]
    block = build()
    kind = type(block)
    (row,) = explain(fuse(block))
    assert type(block) is kind and not row.fused and reason in row.reason


class RCCAModule(nn.Module):
    """CCNet's head: one attention, as often as it says."""

    def __init__(self, in_channels, out_channels, num_classes):
        super().__init__()
        inter = in_channels // 4
        self.conva = nn.Sequential(nn.Conv2d(in_channels, inter, 3, padding=1, bias=False), nn.BatchNorm2d(inter))
        self.cca = CrissCrossAttention(inter)
        self.convb = nn.Sequential(nn.Conv2d(inter, inter, 3, padding=1, bias=False), nn.BatchNorm2d(inter))
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels + inter, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.Dropout2d(0.1),
            nn.Conv2d(out_channels, num_classes, 1),
        )

    def forward(self, x, recurrence=2):
        output = self.conva(x)
        for _ in range(recurrence):
            output = self.cca(output)
        output = self.convb(output)
        return self.bottleneck(torch.cat([x, output], 1))


def test_a_head_that_runs_one_attention_several_times():
    torch.manual_seed(0)
    plain = started(RCCAModule(64, 16, 5)).double()
    head = fuse(copy.deepcopy(plain), strict=True)
    assert [(row.name, row.block) for row in explain(head)] == [("cca", "CrissCrossAttention")]
    assert list(head.state_dict()) == list(plain.state_dict())
    x = random(2, 64, 7, 6, dtype=torch.float64)
    for recurrence in (1, 2, 3):
        torch.manual_seed(1)
        actual = head(x, recurrence)
        torch.manual_seed(1)
        torch.testing.assert_close(actual, plain(x, recurrence), rtol=1e-8, atol=1e-8)


class SelfAttn(nn.Module):
    """The port of SAGAN's that returns its attention too."""

    def __init__(self, in_dim):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        m_batchsize, C, width, height = x.size()
        proj_query = self.query_conv(x).view(m_batchsize, -1, width * height).permute(0, 2, 1)
        proj_key = self.key_conv(x).view(m_batchsize, -1, width * height)
        attention = self.softmax(torch.bmm(proj_query, proj_key))
        proj_value = self.value_conv(x).view(m_batchsize, -1, width * height)
        out = torch.bmm(proj_value, attention.permute(0, 2, 1)).view(m_batchsize, C, width, height)
        return self.gamma * out + x, attention


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.attn1, self.last = nn.Conv2d(3, 32, 3, padding=1), SelfAttn(32), nn.Conv2d(32, 3, 1)

    def forward(self, z):
        out, p1 = self.attn1(self.l1(z))
        return self.last(out), p1


def test_one_that_returns_its_attention_still_does():
    plain = Generator()
    fused = fuse(copy.deepcopy(plain))
    (row,) = explain(fused)
    assert (row.name, row.fused) == ("attn1", False) and "returns more than a map" in row.reason
    x = random(2, 3, 6, 5)
    torch.testing.assert_close(fused(x), plain(x))
    assert fused(x)[1].shape == (2, 30, 30)


def test_maps_that_it_does_not_take_raise_as_they_did():
    plain = Attention(32)
    block = fuse(copy.deepcopy(plain), strict=True)
    for model in (plain, block):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            model(random(2, 32, 5, 7))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "norm", [spectral_norm, weight_norm, parametrizations.spectral_norm, parametrizations.weight_norm], ids=range(4)
)
def test_layers_with_a_norm_of_their_weights(norm):
    """They are called, so that it iterates as often as it did."""
    plain, block = (Attention(32, norm).double() for _ in range(2))
    with torch.no_grad():
        plain.gamma.fill_(0.5)
    block.load_state_dict(plain.state_dict())
    fuse(block, strict=True)
    assert [row.block for row in explain(block)] == ["NonLocal"]
    x = random(2, 32, 6, 8, dtype=torch.float64)
    for training in (True, True, False):
        block.train(training), plain.train(training)
        same_as(block, plain, x, rtol=1e-9, atol=1e-10)
        for p, q in zip(block.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(p, q)
    assert list(block.state_dict()) == list(plain.state_dict())


def test_rearranged_by_einops():
    einops = pytest.importorskip("einops", reason="einops is not installed")

    class Rearranged(nn.Module):
        def __init__(self, c, heads=4, dim_head=8):
            super().__init__()
            self.heads, self.scale = heads, dim_head**-0.5
            self.to_qkv = nn.Conv2d(c, heads * dim_head * 3, 1, bias=False)
            self.to_out = nn.Conv2d(heads * dim_head, c, 1)

        def forward(self, x):
            qkv = self.to_qkv(x).chunk(3, dim=1)
            q, k, v = (einops.rearrange(t, "b (h c) x y -> b h c (x y)", h=self.heads) for t in qkv)
            sim = torch.einsum("b h d i, b h d j -> b h i j", q * self.scale, k)
            out = torch.einsum("b h i j, b h d j -> b h i d", sim.softmax(dim=-1), v)
            return self.to_out(einops.rearrange(out, "b h (x y) d -> b (h d) x y", x=x.shape[2], y=x.shape[3]))

    plain = Rearranged(24).double()
    block = fuse(copy.deepcopy(plain), strict=True)
    assert explain(block)[0].fused
    same_as(block, plain, random(2, 24, 7, 6, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["CrissCrossAttention (32,) 2", "HeadsOfOneLayer (24,) 2", "WeightedSum (24,) 2"])
def test_compiled(name):
    plain, _, x = one_of(name)
    block = fuse(copy.deepcopy(plain), strict=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain(x))
    exported = torch.export.export(block.eval(), (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), plain.eval()(x))


def test_no_matrix_of_pairs_is_kept():
    """What backward keeps of a block is linear in the positions."""
    plain, _, _ = one_of("AttnBlock (24,) 2", torch.float32)
    block = fuse(copy.deepcopy(plain), strict=True)

    def kept(model, side):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(random(1, 24, side, side))
        return sum(sizes.values()) + 0 * y.numel()

    assert kept(block, 32) < 4.5 * kept(block, 16)
    assert kept(block, 32) < kept(plain, 32) / 4


class WithAMaskOnAGpu(CrissCrossAttention):
    """As the authors', whose mask is made on a GPU wherever the map is."""

    def __init__(self):
        super().__init__(32)
        self.INF = lambda B, H, W, device: (
            -torch.diag(torch.tensor(float("inf")).cuda().repeat(H), 0).unsqueeze(0).repeat(B * W, 1, 1)
        )


class OnAGpu(WithAMaskOnAGpu):
    def forward(self, x):
        return super().forward(x.cuda())


def test_a_mask_that_is_made_on_a_gpu():
    """It is found on any machine; and then runs where its map is."""
    fused = fuse(WithAMaskOnAGpu().double(), strict=True)
    plain = CrissCrossAttention(32).double()
    with torch.no_grad():
        plain.gamma.fill_(0.5)
    fused.load_state_dict(plain.state_dict())
    assert [row.block for row in explain(fused)] == ["CrissCrossAttention"]
    x = random(2, 32, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))
    (row,) = explain(fuse(OnAGpu()))
    assert not row.fused and row.reason == "moves what it computes to a GPU"


class SelfAttentionBlock(nn.Module):
    """As mmseg's: a query map and a key map, which are often one."""

    def __init__(self, channels, key_downsample=None, with_out=False, matmul_norm=False):
        super().__init__()
        self.query_project = nn.Conv2d(channels, channels // 8, 1)
        self.key_project = nn.Conv2d(channels, channels // 8, 1)
        self.value_project = nn.Conv2d(channels, channels, 1)
        self.key_downsample = key_downsample
        self.out_project = (
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if with_out else None
        )
        self.matmul_norm, self.channels = matmul_norm, channels // 8

    def forward(self, query_feats, key_feats):
        batch_size = query_feats.size(0)
        query = self.query_project(query_feats)
        query = query.reshape(*query.shape[:2], -1).permute(0, 2, 1).contiguous()
        key, value = self.key_project(key_feats), self.value_project(key_feats)
        if self.key_downsample is not None:
            key, value = self.key_downsample(key), self.key_downsample(value)
        key = key.reshape(*key.shape[:2], -1)
        value = value.reshape(*value.shape[:2], -1).permute(0, 2, 1).contiguous()
        sim_map = torch.matmul(query, key)
        if self.matmul_norm:
            sim_map = (self.channels**-0.5) * sim_map
        context = torch.matmul(torch.nn.functional.softmax(sim_map, dim=-1), value).permute(0, 2, 1).contiguous()
        context = context.reshape(batch_size, -1, *query_feats.shape[2:])
        return context if self.out_project is None else self.out_project(context)


class PAM(SelfAttentionBlock):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gamma = Scale()

    def forward(self, x):
        return self.gamma(super().forward(x, x)) + x


class CAM(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = Scale()

    def forward(self, x):
        batch_size, channels, height, width = x.size()
        proj_query = x.view(batch_size, channels, -1)
        energy = torch.bmm(proj_query, x.view(batch_size, channels, -1).permute(0, 2, 1))
        energy_new = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        attention = torch.nn.functional.softmax(energy_new, dim=-1)
        out = torch.bmm(attention, x.view(batch_size, channels, -1)).view(batch_size, channels, height, width)
        return self.gamma(out) + x


class DAHead(nn.Module):
    """As mmseg's."""

    def __init__(self, in_channels=24, channels=32, num_classes=5, **options):
        super().__init__()
        conv = lambda c: nn.Sequential(nn.Conv2d(c, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))  # noqa: E731
        self.pam_in_conv, self.pam, self.pam_out_conv = conv(in_channels), PAM(channels, **options), conv(channels)
        self.pam_conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.cam_in_conv, self.cam, self.cam_out_conv = conv(in_channels), CAM(), conv(channels)
        self.cam_conv_seg, self.conv_seg = nn.Conv2d(channels, num_classes, 1), nn.Conv2d(channels, num_classes, 1)

    def forward(self, inputs):
        pam_feat = self.pam_out_conv(self.pam(self.pam_in_conv(inputs)))
        cam_feat = self.cam_out_conv(self.cam(self.cam_in_conv(inputs)))
        return self.conv_seg(pam_feat + cam_feat), self.pam_conv_seg(pam_feat), self.cam_conv_seg(cam_feat)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "PositionAttention"),
        ({"key_downsample": nn.MaxPool2d(2)}, "NonLocal"),
        ({"with_out": True, "matmul_norm": True}, "NonLocal"),
    ],
    ids=["as published", "pooled keys", "a layer behind"],
)
def test_heads_of_danet(options, name):
    torch.manual_seed(0)
    plain = started(DAHead(**options)).double()
    head = fuse(copy.deepcopy(plain), strict=True)
    assert [(row.name, row.block) for row in explain(head)] == [("pam", name), ("cam", "ChannelSelfAttention")]
    assert list(head.state_dict()) == list(plain.state_dict())
    head.load_state_dict(plain.state_dict())
    x = random(2, 24, 8, 6, dtype=torch.float64)
    for training in (True, False):
        head.train(training), plain.train(training)
        for actual, expected in zip(head(x), plain(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_danet_of_pytorchcv():
    danet = pytest.importorskip("pytorchcv.models.danet", reason="pytorchcv is not installed")
    plain = danet.DANetHead(in_channels=64, out_channels=5).double().eval()
    with torch.no_grad():
        plain.branch_pa.att.scale.alpha.fill_(0.7), plain.branch_ca.att.scale.alpha.fill_(0.6)
    head = fuse(copy.deepcopy(plain), strict=True)
    assert {row.block for row in explain(head)} == {"PositionAttention", "ChannelSelfAttention"}
    assert list(head.state_dict()) == list(plain.state_dict())
    x = random(2, 64, 7, 6, dtype=torch.float64)
    for actual, expected in zip(head(x), plain(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_mmcvs_keys_load_into_our_criss_cross_attention():
    theirs = started(EinsumCrissCross(32)).double()
    ours = fused_nn.CrissCrossAttention(32, recurrence=1).double()
    ours.load_state_dict(theirs.state_dict())
    x = random(2, 32, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


GAMMAS = {
    "a number": 0.3,
    "without dimensions": torch.tensor(0.3, dtype=torch.float64),
    "of each column": torch.linspace(-1, 1, 5, dtype=torch.float64),
    "of each channel": torch.linspace(-1, 1, 32, dtype=torch.float64).view(1, -1, 1, 1),
}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("build", [CrissCrossAttention, PAM_Module, CAM_Module])
def test_gamma_becomes_something_else(build, gamma):
    """After fuse: the block then runs as it was written."""
    plain = started(build(32)).double()
    block = fuse(copy.deepcopy(plain), strict=True)
    number = GAMMAS[gamma]
    for b in (block, plain):
        del b.gamma
        b.gamma = nn.Parameter(number.clone()) if isinstance(number, torch.Tensor) else number
    same_as(block, plain, random(2, 32, 5, 5, dtype=torch.float64))
