"""Attention as people paste it, with layers of their own before and behind it: criss-cross, pooled, with several heads,
to one context; and what looks like it and is not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

#: Name -> the block, the name of its recipe, its channels and spatial axes.
BLOCKS: dict[str, tuple] = {}
LOOK_ALIKES: dict[str, tuple] = {}


def expect(name: str, *args, rank: int = 2, channels: int | None = None):
    """Decorator: an instance made with these arguments is recognised as this."""

    def add(cls):
        of = args[0] if channels is None else channels
        BLOCKS[f"{cls.__name__} {args} {rank}"] = (lambda: cls(*args), name, of, rank)
        return cls

    return add


def look_alike(*args, reason: str):
    def add(cls):
        LOOK_ALIKES[cls.__name__] = (lambda: cls(*args), reason)
        return cls

    return add


# Criss-cross


def infinity(B, H, W, device):
    return -torch.diag(torch.tensor(float("inf")).to(device).repeat(H), 0).unsqueeze(0).repeat(B * W, 1, 1)


@expect("CrissCrossAttention", 32)
class CrissCrossAttention(nn.Module):
    """As the authors' in plain PyTorch."""

    def __init__(self, in_dim=32):
        super().__init__()
        self.query_conv = nn.Conv2d(in_channels=in_dim, out_channels=in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_channels=in_dim, out_channels=in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_channels=in_dim, out_channels=in_dim, kernel_size=1)
        self.softmax = nn.Softmax(dim=3)
        self.INF = infinity
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        b, _, h, w = x.size()
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        q_h = q.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h).permute(0, 2, 1)
        q_w = q.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w).permute(0, 2, 1)
        k_h = k.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h)
        k_w = k.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w)
        v_h = v.permute(0, 3, 1, 2).contiguous().view(b * w, -1, h)
        v_w = v.permute(0, 2, 1, 3).contiguous().view(b * h, -1, w)
        energy_h = (torch.bmm(q_h, k_h) + self.INF(b, h, w, x.device)).view(b, w, h, h).permute(0, 2, 1, 3)
        energy_w = torch.bmm(q_w, k_w).view(b, h, w, w)
        concate = self.softmax(torch.cat([energy_h, energy_w], 3))
        att_h = concate[:, :, :, 0:h].permute(0, 2, 1, 3).contiguous().view(b * w, h, h)
        att_w = concate[:, :, :, h : h + w].contiguous().view(b * h, w, w)
        out_h = torch.bmm(v_h, att_h.permute(0, 2, 1)).view(b, w, -1, h).permute(0, 2, 3, 1)
        out_w = torch.bmm(v_w, att_w.permute(0, 2, 1)).view(b, h, -1, w).permute(0, 2, 1, 3)
        return self.gamma * (out_h + out_w) + x


class Scale(nn.Module):
    def __init__(self, scale=0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        return x * self.scale


def minus_infinity_on_the_diagonal(n, device):
    return torch.diag(torch.tensor(float("-inf")).to(device).repeat(n), 0)


@expect("CrissCrossAttention", 64)
class EinsumCrissCross(nn.Module):
    """As mmcv's."""

    def __init__(self, in_channels=64):
        super().__init__()
        self.query_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.key_conv = nn.Conv2d(in_channels, in_channels // 8, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = Scale(0.0)
        self.in_channels = in_channels

    def forward(self, x):
        B, C, H, W = x.size()
        query, key, value = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        energy_H = torch.einsum("bchw,bciw->bwhi", query, key) + minus_infinity_on_the_diagonal(H, query.device)
        energy_H = energy_H.transpose(1, 2)
        energy_W = torch.einsum("bchw,bchj->bhwj", query, key)
        attn = F.softmax(torch.cat([energy_H, energy_W], dim=-1), dim=-1)
        out = torch.einsum("bciw,bhwi->bchw", value, attn[..., :H])
        out += torch.einsum("bchj,bhwj->bchw", value, attn[..., H:])
        out = self.gamma(out) + x
        return out.contiguous()


@expect("CrissCrossAttention", 24)
class MaskedRows(nn.Module):
    """Itself left out of the row, which comes first; no biases; a layer behind; no residual."""

    def __init__(self, c):
        super().__init__()
        self.qkv = nn.Conv2d(c, 2 * (c // 4) + c, 1, bias=False)
        self.c, self.proj = c, nn.Sequential(nn.Conv2d(c, c, 1), nn.BatchNorm2d(c), nn.ReLU(inplace=True))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).split([self.c // 4, self.c // 4, self.c], dim=1)
        itself = torch.eye(w, device=x.device).bool()
        rows = torch.einsum("bchw,bchv->bhwv", q, k).masked_fill(itself, float("-inf"))
        columns = torch.einsum("bchw,bcgw->bhwg", q, k)
        weights = torch.cat((rows, columns), -1).softmax(-1)
        of_rows, of_columns = torch.split(weights, [w, h], dim=-1)
        y = torch.einsum("bhwv,bchv->bchw", of_rows, v) + torch.einsum("bhwg,bcgw->bchw", of_columns, v)
        return self.proj(y)


@expect("CrissCrossAttention", 16)
class TwiceInOneForward(CrissCrossAttention):
    def forward(self, x):
        for _ in range(2):
            x = super().forward(x)
        return x


@look_alike(reason="its attention")
class Unmasked(CrissCrossAttention):
    """Itself twice."""

    def __init__(self):
        super().__init__()
        self.INF = lambda b, h, w, device: torch.zeros(b * w, h, h, device=device)


@look_alike(reason="its attention")
class WithoutColumns(CrissCrossAttention):
    """Two softmaxes, one a line."""

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        rows = torch.einsum("bchw,bchv->bhwv", q, k).softmax(-1)
        columns = torch.einsum("bchw,bcgw->bhwg", q, k).softmax(-1)
        y = torch.einsum("bhwv,bchv->bchw", rows, v) + torch.einsum("bhwg,bcgw->bchw", columns, v)
        return self.gamma * y + x


# Pooled keys and values


@expect("NonLocal", 32)
class Attention(nn.Module):
    """SAGAN's original, as in BigGAN-PyTorch: it takes even maps only."""

    def __init__(self, ch, which=nn.Identity()):  # noqa: B008
        super().__init__()
        self.ch = ch
        self.theta = which(nn.Conv2d(ch, ch // 8, kernel_size=1, padding=0, bias=False))
        self.phi = which(nn.Conv2d(ch, ch // 8, kernel_size=1, padding=0, bias=False))
        self.g = which(nn.Conv2d(ch, ch // 2, kernel_size=1, padding=0, bias=False))
        self.o = which(nn.Conv2d(ch // 2, ch, kernel_size=1, padding=0, bias=False))
        self.gamma = nn.Parameter(torch.tensor(0.0), requires_grad=True)

    def forward(self, x, y=None):
        theta = self.theta(x)
        phi = F.max_pool2d(self.phi(x), [2, 2])
        g = F.max_pool2d(self.g(x), [2, 2])
        theta = theta.view(-1, self.ch // 8, x.shape[2] * x.shape[3])
        phi = phi.view(-1, self.ch // 8, x.shape[2] * x.shape[3] // 4)
        g = g.view(-1, self.ch // 2, x.shape[2] * x.shape[3] // 4)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        o = self.o(torch.bmm(g, beta.transpose(1, 2)).view(-1, self.ch // 2, x.shape[2], x.shape[3]))
        return self.gamma * o + x


@expect("NonLocal", 32)
class PooledSelfAttention(nn.Module):
    """SAGAN's original with a pool that is a layer and sigma."""

    def __init__(self, c):
        super().__init__()
        self.snconv1x1_theta = nn.Conv2d(c, c // 8, 1)
        self.snconv1x1_phi = nn.Conv2d(c, c // 8, 1)
        self.snconv1x1_g = nn.Conv2d(c, c // 2, 1)
        self.snconv1x1_attn = nn.Conv2d(c // 2, c, 1)
        self.maxpool = nn.MaxPool2d(2, stride=2, padding=0)
        self.softmax = nn.Softmax(dim=-1)
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        _, ch, h, w = x.size()
        theta = self.snconv1x1_theta(x).view(-1, ch // 8, h * w)
        phi = self.maxpool(self.snconv1x1_phi(x)).view(-1, ch // 8, (h // 2) * (w // 2))
        attn = self.softmax(torch.bmm(theta.permute(0, 2, 1), phi))
        g = self.maxpool(self.snconv1x1_g(x)).view(-1, ch // 2, (h // 2) * (w // 2))
        attn_g = torch.bmm(g, attn.permute(0, 2, 1)).view(-1, ch // 2, h, w)
        return x + self.sigma * self.snconv1x1_attn(attn_g)


@expect("NonLocal", 24, "embedded", 1, True, rank=1)
@expect("NonLocal", 24, "embedded", 2, True)
@expect("NonLocal", 24, "embedded", 2, False)
@expect("NonLocal", 24, "embedded", 3, True, rank=3)
@expect("NonLocal", 24, "gaussian", 1, True, rank=1)
@expect("NonLocal", 24, "gaussian", 2, True)
@expect("NonLocal", 24, "gaussian", 3, True, rank=3)
@expect("NonLocal", 24, "dot", 1, True, rank=1)
@expect("NonLocal", 24, "dot", 2, True)
@expect("NonLocal", 24, "dot", 3, True, rank=3)
@expect("NonLocal", 24, "concatenation", 1, True, rank=1)
@expect("NonLocal", 24, "concatenation", 2, True)
@expect("NonLocal", 24, "concatenation", 2, False)
@expect("NonLocal", 24, "concatenation", 3, True, rank=3)
@expect("NonLocal", 24, "embedded", 2, True, False)
@expect("NonLocal", 24, "concatenation", 2, True, False)
class _NonLocalBlockND(nn.Module):
    """As AlexHex7's four files."""

    def __init__(self, in_channels, mode, dimension, sub_sample=True, bn_layer=True):
        super().__init__()
        self.mode, self.sub_sample = mode, sub_sample
        self.inter_channels = in_channels // 2
        conv_nd = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1]
        pools = nn.MaxPool1d(kernel_size=2), nn.MaxPool2d(kernel_size=(2, 2)), nn.MaxPool3d(kernel_size=(1, 2, 2))
        pool, bn = pools[dimension - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1]
        self.g = conv_nd(in_channels, self.inter_channels, 1)
        if bn_layer:
            self.W = nn.Sequential(conv_nd(self.inter_channels, in_channels, 1), bn(in_channels))
        else:
            self.W = conv_nd(self.inter_channels, in_channels, 1)
        self.theta = self.phi = None
        if mode != "gaussian":
            self.theta = conv_nd(in_channels, self.inter_channels, 1)
            self.phi = conv_nd(in_channels, self.inter_channels, 1)
        if mode == "concatenation":
            self.concat_project = nn.Sequential(nn.Conv2d(self.inter_channels * 2, 1, 1, 1, 0, bias=False), nn.ReLU())
        if sub_sample:
            self.g = nn.Sequential(self.g, pool)
            self.phi = pool if self.phi is None else nn.Sequential(self.phi, pool)

    def forward(self, x):
        batch_size = x.size(0)
        g_x = self.g(x).view(batch_size, self.inter_channels, -1)
        g_x = g_x.permute(0, 2, 1)
        if self.mode == "concatenation":
            theta_x = self.theta(x).view(batch_size, self.inter_channels, -1, 1)
            phi_x = self.phi(x).view(batch_size, self.inter_channels, 1, -1)
            h, w = theta_x.size(2), phi_x.size(3)
            concat_feature = torch.cat([theta_x.repeat(1, 1, 1, w), phi_x.repeat(1, 1, h, 1)], dim=1)
            f = self.concat_project(concat_feature)
            b, _, h, w = f.size()
            f = f.view(b, h, w)
        elif self.mode == "gaussian":
            theta_x = x.view(batch_size, x.size(1), -1).permute(0, 2, 1)
            phi_x = (self.phi(x) if self.sub_sample else x).view(batch_size, x.size(1), -1)
            f = torch.matmul(theta_x, phi_x)
        else:
            theta_x = self.theta(x).view(batch_size, self.inter_channels, -1).permute(0, 2, 1)
            f = torch.matmul(theta_x, self.phi(x).view(batch_size, self.inter_channels, -1))
        f_div_C = F.softmax(f, dim=-1) if self.mode in ("embedded", "gaussian") else f / f.size(-1)
        y = torch.matmul(f_div_C, g_x).permute(0, 2, 1).contiguous()
        W_y = self.W(y.view(batch_size, self.inter_channels, *x.size()[2:]))
        return W_y + x


class ConvModule(nn.Module):
    def __init__(self, c, out, norm=False, act=False):
        super().__init__()
        self.conv = nn.Conv2d(c, out, 1, bias=not norm)
        self.bn = nn.BatchNorm2d(out) if norm else None
        self.activate = nn.ReLU(inplace=True) if act else None

    def forward(self, x):
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x if self.activate is None else self.activate(x)


@expect("NonLocal", 32, "embedded_gaussian")
@expect("NonLocal", 32, "dot_product")
@expect("NonLocal", 32, "embedded_gaussian", True, True)
class NonLocal2d(nn.Module):
    """As mmcv's, keys and values pooled."""

    def __init__(self, in_channels, mode, use_scale=True, norm=False):
        super().__init__()
        self.inter_channels, self.mode, self.use_scale = in_channels // 2, mode, use_scale
        self.g = ConvModule(in_channels, self.inter_channels)
        self.conv_out = ConvModule(self.inter_channels, in_channels, norm)
        self.theta = ConvModule(in_channels, self.inter_channels)
        self.phi = ConvModule(in_channels, self.inter_channels)
        max_pool_layer = nn.MaxPool2d(kernel_size=(2, 2))
        self.g = nn.Sequential(self.g, max_pool_layer)
        self.phi = nn.Sequential(self.phi, max_pool_layer)

    def embedded_gaussian(self, theta_x, phi_x):
        pairwise_weight = torch.matmul(theta_x, phi_x)
        if self.use_scale:
            pairwise_weight /= theta_x.shape[-1] ** 0.5
        return pairwise_weight.softmax(dim=-1)

    def dot_product(self, theta_x, phi_x):
        pairwise_weight = torch.matmul(theta_x, phi_x)
        pairwise_weight /= pairwise_weight.shape[-1]
        return pairwise_weight

    def forward(self, x):
        n = x.size(0)
        g_x = self.g(x).view(n, self.inter_channels, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(n, self.inter_channels, -1).permute(0, 2, 1)
        phi_x = self.phi(x).view(n, self.inter_channels, -1)
        pairwise_weight = getattr(self, self.mode)(theta_x, phi_x)
        y = torch.matmul(pairwise_weight, g_x)
        y = y.permute(0, 2, 1).contiguous().reshape(n, self.inter_channels, *x.size()[2:])
        return x + self.conv_out(y)


@expect("NonLocal", 24, rank=3)
class Nonlocal(nn.Module):
    """As SlowFast's: x is pooled before the convolutions, the BatchNorm comes last."""

    def __init__(self, dim, pool_size=(1, 2, 2)):
        super().__init__()
        self.dim_inner = dim // 2
        self.conv_theta = nn.Conv3d(dim, self.dim_inner, kernel_size=1, stride=1, padding=0)
        self.conv_phi = nn.Conv3d(dim, self.dim_inner, kernel_size=1, stride=1, padding=0)
        self.conv_g = nn.Conv3d(dim, self.dim_inner, kernel_size=1, stride=1, padding=0)
        self.conv_out = nn.Conv3d(self.dim_inner, dim, kernel_size=1, stride=1, padding=0)
        self.bn = nn.BatchNorm3d(dim, eps=1e-5, momentum=0.1)
        self.pool = nn.MaxPool3d(kernel_size=pool_size, stride=pool_size, padding=[0, 0, 0])

    def forward(self, x):
        x_identity = x
        N, C, T, H, W = x.size()
        theta = self.conv_theta(x)
        x = self.pool(x)
        phi, g = self.conv_phi(x), self.conv_g(x)
        theta, phi, g = (t.view(N, self.dim_inner, -1) for t in (theta, phi, g))
        theta_phi = torch.einsum("nct,ncp->ntp", (theta, phi))
        theta_phi = theta_phi * (self.dim_inner**-0.5)
        theta_phi = nn.functional.softmax(theta_phi, dim=2)
        theta_phi_g = torch.einsum("ntg,ncg->nct", (theta_phi, g))
        theta_phi_g = theta_phi_g.view(N, self.dim_inner, T, H, W)
        return x_identity + self.bn(self.conv_out(theta_phi_g))


# Global context


@expect("GlobalContext", 32, "att", ("channel_add",))
@expect("GlobalContext", 32, "att", ("channel_mul",))
@expect("GlobalContext", 32, "att", ("channel_add", "channel_mul"))
class ContextBlock(nn.Module):
    """As mmcv's."""

    def __init__(self, in_channels, pooling_type="att", fusion_types=("channel_add",), ratio=1.0 / 4):
        super().__init__()
        self.in_channels, self.pooling_type = in_channels, pooling_type
        self.planes = int(in_channels * ratio)
        self.conv_mask = nn.Conv2d(in_channels, 1, kernel_size=1)
        self.softmax = nn.Softmax(dim=2)
        self.channel_add_conv = self._make() if "channel_add" in fusion_types else None
        self.channel_mul_conv = self._make() if "channel_mul" in fusion_types else None

    def _make(self):
        return nn.Sequential(
            nn.Conv2d(self.in_channels, self.planes, kernel_size=1),
            nn.LayerNorm([self.planes, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(self.planes, self.in_channels, kernel_size=1),
        )

    def spatial_pool(self, x):
        batch, channel, height, width = x.size()
        input_x = x.view(batch, channel, height * width).unsqueeze(1)
        context_mask = self.conv_mask(x).view(batch, 1, height * width)
        context_mask = self.softmax(context_mask).unsqueeze(-1)
        context = torch.matmul(input_x, context_mask)
        return context.view(batch, channel, 1, 1)

    def forward(self, x):
        context = self.spatial_pool(x)
        out = x
        if self.channel_mul_conv is not None:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        if self.channel_add_conv is not None:
            out = out + self.channel_add_conv(context)
        return out


@expect("GlobalContext", 24)
class WeightedSum(nn.Module):
    """Written as a sum, and with Linears."""

    def __init__(self, c):
        super().__init__()
        self.mask = nn.Conv2d(c, 1, 1)
        self.mlp = nn.Sequential(nn.Linear(c, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, c))

    def forward(self, x):
        p = torch.softmax(self.mask(x).flatten(2), dim=-1).view(x.size(0), 1, *x.shape[2:])
        return x + self.mlp((x * p).sum(dim=(2, 3)))[:, :, None, None]


@look_alike(reason="its attention")
class ContextOfAnother(ContextBlock):
    """Of other values than those that the weights are of."""

    def __init__(self):
        super().__init__(32)
        self.value = nn.Conv2d(32, 32, 1)

    def forward(self, x):
        p = self.conv_mask(x).flatten(2).softmax(-1)
        context = torch.einsum("bcn,bon->bc", self.value(x).flatten(2), p)
        return x + self.channel_add_conv(context[:, :, None, None])


# Double and external attention


@expect("DoubleAttention", 32)
@expect("DoubleAttention, adds its input", 32, True)
class DoubleAttentionLayer(nn.Module):
    """As ports of A2-Nets."""

    def __init__(self, in_channels, residual=False):
        super().__init__()
        self.c_m, self.c_n, self.residual = in_channels // 4, in_channels // 8, residual
        self.convA = nn.Conv2d(in_channels, self.c_m, kernel_size=1)
        self.convB = nn.Conv2d(in_channels, self.c_n, kernel_size=1)
        self.convV = nn.Conv2d(in_channels, self.c_n, kernel_size=1)
        self.conv_reconstruct = nn.Conv2d(self.c_m, in_channels, kernel_size=1)

    def forward(self, x):
        batch_size, c, h, w = x.size()
        A, B, V = self.convA(x), self.convB(x), self.convV(x)
        feature_maps = A.view(batch_size, self.c_m, h * w)
        attention_maps = F.softmax(B.view(batch_size, self.c_n, h * w), dim=-1)
        global_descriptors = torch.bmm(feature_maps, attention_maps.permute(0, 2, 1))
        attention_vectors = F.softmax(V.view(batch_size, self.c_n, h * w), dim=1)
        out = torch.bmm(global_descriptors, attention_vectors).view(batch_size, self.c_m, h, w)
        out = self.conv_reconstruct(out)
        return x + out if self.residual else out


@look_alike(reason="its attention")
class OverTheBatch(DoubleAttentionLayer):
    """A softmax over the samples, as where `dim` is left out."""

    def __init__(self):
        super().__init__(32)

    def forward(self, x):
        a, b, v = (f(x).flatten(2) for f in (self.convA, self.convB, self.convV))
        y = (a @ b.softmax(0).mT) @ v.softmax(0)
        return self.conv_reconstruct(y.view(x.shape[0], -1, *x.shape[2:]))


@expect("ExternalAttention", 32)
class External_attention(nn.Module):
    """As the authors'."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 1)
        self.k = 16
        self.linear_0 = nn.Conv1d(c, self.k, 1, bias=False)
        self.linear_1 = nn.Conv1d(self.k, c, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x):
        idn = x
        x = self.conv1(x)
        b, c, h, w = x.size()
        n = h * w
        x = x.view(b, c, h * w)
        attn = self.linear_0(x)
        attn = F.softmax(attn, dim=-1)
        attn = attn / (1e-9 + attn.sum(dim=1, keepdim=True))
        x = self.linear_1(attn)
        x = self.conv2(x.view(b, c, h, w)) + idn
        assert n == h * w
        return F.relu(x)


# Other ways of writing them


@expect("NonLocal", 24)
class NormalisedProjections(nn.Module):
    """BatchNorms and activations in the projections, d ** -0.5, Linear names."""

    def __init__(self, dim):
        super().__init__()
        layer = lambda out: nn.Sequential(nn.Conv2d(dim, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())  # noqa: E731
        self.to_q, self.to_k, self.to_v = layer(6), layer(6), layer(12)
        self.to_out = nn.Sequential(nn.Conv2d(12, dim, 1), nn.BatchNorm2d(dim))
        self.scale = 6**-0.5

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.to_q, self.to_k, self.to_v))
        attn = (q.transpose(-2, -1) @ k * self.scale).softmax(dim=-1)
        out = (attn @ v.transpose(-2, -1)).transpose(-2, -1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])
        return F.relu(x + self.to_out(out))


@expect("NonLocal", 24)
class OfTokens(nn.Module):
    """By Linears, the query scaled before."""

    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        n = int(H * W)
        t = x.view(B, C, n).permute(0, 2, 1)
        q = self.q(t) * (C**-0.5)
        attn = torch.softmax(torch.matmul(q, self.k(t).transpose(1, 2)), dim=2)
        out = self.proj(torch.matmul(attn, self.v(t)))
        return out.transpose(1, 2).reshape(B, C, H, W) + x


@expect("NonLocal", 24)
@expect("NonLocal", 48)
class AttnBlock(nn.Module):
    """As in diffusion models: a GroupNorm before, the layer behind added to the map."""

    def __init__(self, in_channels):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups=6, num_channels=in_channels, eps=1e-6, affine=True)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(in_channels, in_channels, 1) for _ in range(4))

    def forward(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        w_ = torch.bmm(q, k) * (int(c) ** (-0.5))
        w_ = torch.nn.functional.softmax(w_, dim=2)
        v = v.reshape(b, c, h * w)
        h_ = torch.bmm(v, w_.permute(0, 2, 1)).reshape(b, c, h, w)
        return x + self.proj_out(h_)


@expect("NonLocal", 24)
class HeadsOfOneLayer(nn.Module):
    """Several heads, their queries, keys and values from one layer."""

    def __init__(self, dim, heads=4):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1, bias=False)
        self.to_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        flat = x.dim() == 3
        x = x.unsqueeze(-1) if flat else x
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, -1, h * w) for t in self.to_qkv(x).chunk(3, dim=1))
        sim = torch.einsum("bhdi,bhdj->bhij", q * self.scale, k)
        out = torch.einsum("bhij,bhdj->bhid", sim.softmax(dim=-1), v)
        out = self.to_out(out.permute(0, 1, 3, 2).reshape(b, c, h, w))
        return out.squeeze(-1) if flat else out


@expect("NonLocal", 16)
class KeysFromAStride(nn.Module):
    """A strided layer makes keys and values fewer; other names; softmax as a layer; a clone that is added to."""

    def __init__(self, c):
        super().__init__()
        self.a, self.down = nn.Conv2d(c, 4, 1), nn.Conv2d(c, c, 3, stride=2, padding=1)
        self.b, self.d = nn.Conv2d(c, 4, 1), nn.Conv2d(c, c, 1)
        self.act, self.alpha = nn.Softmax(-1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        n, c, h, w = x.size()
        small = self.down(x)
        a = self.a(x).view(n, -1, h * w)
        b, d = self.b(small).flatten(2), self.d(small).flatten(2)
        s = self.act(torch.einsum("bci,bcj->bij", a, b))
        y = torch.einsum("bij,bcj->bci", s, d).contiguous().view(n, c, h, w)
        out = x.clone()
        out += self.alpha * y
        return out


@expect("NonLocal", 24)
class AveragedKeys(nn.Module):
    """Averaged keys, a product with the roles of its sides swapped, another width of result."""

    def __init__(self, c):
        super().__init__()
        self.f_query, self.f_key, self.f_value = nn.Conv2d(c, 6, 1), nn.Conv2d(c, 6, 1), nn.Conv2d(c, 10, 1)

    def forward(self, x):
        q = self.f_query(x).flatten(2)
        k, v = (F.avg_pool2d(f(x), 2).flatten(2) for f in (self.f_key, self.f_value))
        weights = (k.transpose(1, 2).bmm(q) / math.sqrt(6)).softmax(dim=1)
        return v.bmm(weights).unflatten(2, x.shape[2:])


@expect("NonLocal", 32)
class SequencesOfPositions(nn.Module):
    """Conv1d over flattened positions, channels last at the end."""

    def __init__(self, c):
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv1d(c, c // 2, 1) for _ in range(3))
        self.w = nn.Sequential(nn.Conv1d(c // 2, c, 1), nn.BatchNorm1d(c))

    def forward(self, x):
        size = x.size()
        flat = x.reshape(size[0], size[1], -1)
        f = torch.bmm(self.theta(flat).transpose(1, 2), self.phi(flat))
        y = torch.bmm(F.softmax(f, -1), self.g(flat).transpose(1, 2)).transpose(1, 2)
        return (self.w(y) + flat).view(size)


@expect("NonLocal", 24)
class InAResidualBlock(nn.Module):
    """The attention written out between the layers of a residual block."""

    def __init__(self, c):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.q, self.k, self.v = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 4, 1), nn.Conv2d(12, 12, 1)
        self.conv2, self.bn2 = nn.Conv2d(12, c, 1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        b, c, h, w = out.shape
        att = F.softmax(self.q(out).view(b, -1, h * w).mT @ self.k(out).view(b, -1, h * w), dim=-1)
        out = out + (self.v(out).view(b, -1, h * w) @ att.mT).view(b, c, h, w)
        return self.relu(self.bn2(self.conv2(out)) + x)


@expect("NonLocal", 32)
class BothOfDanet(nn.Module):
    """Positions and channels in one forward, a temperature that is learned."""

    def __init__(self, c):
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(c, c // 8, 1), nn.Conv2d(c, c // 8, 1), nn.Conv2d(c, c, 1)
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x):
        b, c, h, w = x.shape
        q, k = self.query(x).view(b, -1, h * w).permute(0, 2, 1), self.key(x).view(b, -1, h * w)
        positions = torch.softmax(self.temperature * torch.bmm(q, k), dim=-1)
        feat_p = torch.bmm(self.value(x).view(b, -1, h * w), positions.permute(0, 2, 1)).view(b, c, h, w)
        a = x.view(b, c, -1)
        energy = torch.bmm(a, a.transpose(1, 2))
        channels = F.softmax(torch.max(energy, dim=-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
        feat_c = torch.bmm(channels, a).view(b, c, h, w)
        return (self.alpha * feat_p + x) + (self.beta * feat_c + x)


@look_alike(reason="its attention")
class WithPositions(nn.Module):
    """What is added to the products depends on where they are."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(24, 24, 1) for _ in range(3))
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x):
        q, k, v = (f(x).flatten(2) for f in (self.q, self.k, self.v))
        far = torch.arange(q.shape[2], device=x.device, dtype=x.dtype)
        s = q.mT @ k - self.slope * (far[:, None] - far).abs()
        return x + (v @ s.softmax(-1).mT).view(x.shape)


@look_alike(reason="another result")
class ScaledByTheKeys(nn.Module):
    """A scale that is another on another map."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(24, 12, 1) for _ in range(3))
        self.out = nn.Conv2d(12, 24, 1)

    def forward(self, x):
        q, (k, v) = self.q(x).flatten(2), (F.max_pool2d(f(x), 2).flatten(2) for f in (self.k, self.v))
        s = (q.mT @ k / k.shape[2] ** 0.5).softmax(-1)
        return x + self.out((v @ s.mT).view(x.shape[0], 12, *x.shape[2:]))


@expect("NonLocal", 32)
class SelfAttentionOfSequences(nn.Module):
    """fastai's: a softmax over the first of the two, and the values on the left."""

    def __init__(self, n_channels):
        super().__init__()
        self.query, self.key, self.value = (
            self._conv(n_channels, c) for c in (n_channels // 8, n_channels // 8, n_channels)
        )
        self.gamma = nn.Parameter(torch.tensor([0.0]))

    def _conv(self, n_in, n_out):
        return nn.Conv1d(n_in, n_out, 1, bias=False)

    def forward(self, x):
        size = x.size()
        x = x.view(*size[:2], -1)
        f, g, h = self.query(x), self.key(x), self.value(x)
        beta = F.softmax(torch.bmm(f.transpose(1, 2), g), dim=1)
        o = self.gamma * torch.bmm(h, beta) + x
        return o.view(*size).contiguous()


@expect("NonLocal", 32)
class LessItsLargest(nn.Module):
    """With a norm of one group, and the largest product taken off."""

    def __init__(self, c):
        super().__init__()
        self.norm = nn.GroupNorm(1, c)
        self.q, self.k, self.v, self.o = (
            nn.Conv2d(c, 16, 1),
            nn.Conv2d(c, 16, 1),
            nn.Conv2d(c, 16, 1),
            nn.Conv2d(16, c, 1),
        )

    def forward(self, x):
        h = self.norm(x)
        b, _, height, width = h.shape
        q, k, v = (f(h).reshape(b, 16, height * width) for f in (self.q, self.k, self.v))
        sim = torch.einsum("bdi,bdj->bij", q * 16**-0.5, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("bij,bdj->bdi", sim.softmax(dim=-1), v)
        return self.o(out.view(b, 16, height, width)) + x


@expect("NonLocal", 32)
class HeadsOfTokens(nn.Module):
    """As in vision transformers, on a map."""

    def __init__(self, dim, num_heads=4):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def attend(self, q, k, v):
        return (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1) @ v

    def forward(self, x):
        B, C, H, W = x.shape
        t = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(t).reshape(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        t = self.attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(B, H * W, C)
        return x + self.proj(t).transpose(1, 2).reshape(B, C, H, W)


@expect("NonLocal", 32)
class UnboundHeads(HeadsOfTokens):
    def forward(self, x):
        B, C, H, W = x.shape
        t = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = self.qkv(t).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y.view(B, H, W, C).permute(0, 3, 1, 2) + x


@expect("NonLocal", 32)
class NormalisedTokens(nn.Module):
    """A LayerNorm of the tokens, which are added."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(c), nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, x):
        B, C, H, W = x.shape
        t = x.view(B, C, H * W).swapaxes(1, 2)
        y = self.norm(t)
        a = torch.softmax(torch.bmm(self.q(y), self.k(y).permute(0, 2, 1)) / math.sqrt(C), dim=2)
        return (torch.bmm(a, self.v(y)) + t).swapaxes(2, 1).reshape(B, C, H, W)


class Projected(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(c, c // 4, 1), nn.Conv2d(c, c // 4, 1), nn.Conv2d(c, c, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def attended(self, x):
        b, c, h, w = x.shape
        energy = torch.matmul(self.q(x).view(b, -1, h * w).permute(0, 2, 1), self.k(x).view(b, -1, h * w))
        return torch.matmul(self.v(x).view(b, c, -1), F.softmax(energy, dim=-1).permute(0, 2, 1)).view_as(x)


@expect("NonLocal", 32)
class TakenOff(Projected):
    def forward(self, x):
        return x - self.gamma * self.attended(x)


@expect("NonLocal", 32)
class GammaOfEachChannel(Projected):
    def __init__(self, c):
        super().__init__(c)
        self.gamma = nn.Parameter(torch.zeros(1, c, 1, 1))

    def forward(self, x):
        return self.gamma * self.attended(x) + x


@expect("NonLocal", 32)
class BesideTheMap(Projected):
    """Concatenated with the map, as OCNet's."""

    def __init__(self, c):
        super().__init__(c)
        self.bottleneck = nn.Sequential(nn.Conv2d(2 * c, c, 1), nn.BatchNorm2d(c), nn.ReLU())

    def forward(self, x):
        return self.bottleneck(torch.cat([self.gamma * self.attended(x), x], 1))


@expect("NonLocal", 32)
class AGate(Projected):
    def forward(self, x):
        return x * torch.sigmoid(self.attended(x))


@expect("NonLocal", 32)
@expect("NonLocal", 32, 2)
class SharedLayers(nn.Module):
    """Queries and keys from one layer with a BatchNorm, which counts twice; a pooled map, resized at the end."""

    def __init__(self, c, scale=1):
        super().__init__()
        self.scale, self.pool = scale, nn.MaxPool2d(kernel_size=(scale, scale))
        self.f_key = nn.Sequential(nn.Conv2d(c, 16, 1), nn.BatchNorm2d(16))
        self.f_query, self.f_value, self.W = self.f_key, nn.Conv2d(c, 16, 1), nn.Conv2d(16, c, 1)

    def forward(self, x):
        b, h, w = x.size(0), x.size(2), x.size(3)
        if self.scale > 1:
            x = self.pool(x)
        value = self.f_value(x).view(b, 16, -1).permute(0, 2, 1)
        query, key = self.f_query(x).view(b, 16, -1).permute(0, 2, 1), self.f_key(x).view(b, 16, -1)
        sim_map = F.softmax((16**-0.5) * torch.matmul(query, key), dim=-1)
        context = torch.matmul(sim_map, value).permute(0, 2, 1).contiguous().view(b, 16, *x.size()[2:])
        context = self.W(context)
        if self.scale > 1:
            context = F.interpolate(context, size=(h, w), mode="bilinear", align_corners=True)
        return context


class DotProduct(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.temperature = temperature

    def forward(self, q, k, v):
        return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / self.temperature, 2), v)


@expect("NonLocal", 32)
class ByAPartOfThreeInputs(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.qkv, self.attention = nn.Conv2d(c, 3 * c, 1, bias=False), DotProduct(c**0.5)

    def forward(self, x):
        q, k, v = torch.chunk(self.qkv(x).flatten(2).transpose(1, 2), 3, dim=-1)
        return self.attention(q, k, v).transpose(1, 2).reshape(x.shape) + x


@expect("NonLocal", 32)
class PyramidOfKeys(nn.Module):
    """Keys and values pooled to several sizes, as the asymmetric non-local block's."""

    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Conv2d(c, 8, 1), nn.Conv2d(c, 8, 1), nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1)
        self.stages = nn.ModuleList([nn.AdaptiveAvgPool2d(n) for n in (1, 3, 6)])

    def psp(self, t):
        return torch.cat([stage(t).view(t.size(0), t.size(1), -1) for stage in self.stages], -1)

    def forward(self, x):
        B, _, H, W = x.shape
        q = self.q(x).view(B, 8, -1).permute(0, 2, 1)
        attention = F.softmax(torch.matmul(q, self.psp(self.k(x))), dim=-1)
        y = torch.matmul(attention, self.psp(self.v(x)).permute(0, 2, 1)).permute(0, 2, 1)
        return x + self.o(y.reshape(B, 8, H, W))


@expect("NonLocal", 24, rank=3)
class Volumes(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.q, self.k, self.v = nn.Conv3d(c, 6, 1), nn.Conv3d(c, 6, 1), nn.Conv3d(c, c, 1)
        self.gamma, self.pool = nn.Parameter(torch.zeros(1)), nn.MaxPool3d(2)

    def forward(self, x):
        b, c, d, h, w = x.shape
        query = self.q(x).view(b, -1, d * h * w).permute(0, 2, 1)
        a = torch.softmax(query @ self.pool(self.k(x)).flatten(2), -1)
        y = self.pool(self.v(x)).flatten(2) @ a.permute(0, 2, 1)
        return x + self.gamma * y.view(b, c, d, h, w)


@expect("CrissCrossAttention", 32)
class OnTheDevice(CrissCrossAttention):
    """Infinity as others make it."""

    def __init__(self, c):
        super().__init__(c)
        del self.INF

    def INF(self, B, H, W, device):
        return torch.diag(torch.tensor(float("-inf"), device=device).repeat(H), 0).unsqueeze(0).repeat(B * W, 1, 1)


@expect("CrissCrossAttention", 32)
class FullOfInfinity(CrissCrossAttention):
    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        h = x.shape[2]
        diagonal = torch.diag(torch.full((h,), float("-inf"), device=x.device, dtype=x.dtype)).view(h, 1, h)
        columns = torch.einsum("bchw,bcgw->bhwg", q, k) + diagonal
        rows = torch.einsum("bchw,bchv->bhwv", q, k)
        a = torch.softmax(torch.cat([columns, rows], -1), -1)
        y = torch.einsum("bhwg,bcgw->bchw", a[..., :h], v) + torch.einsum("bhwv,bchv->bchw", a[..., h:], v)
        return self.gamma * y + x


@expect("GlobalContext", 24)
class ContextOfTokens(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.mlp = nn.Linear(c, 1), nn.Sequential(nn.Linear(c, 8), nn.ReLU(), nn.Linear(8, c))

    def forward(self, x):
        t = x.flatten(2).transpose(1, 2)
        weights = torch.softmax(self.a(t), dim=1)
        return x + self.mlp((t * weights).sum(1)).unsqueeze(-1).unsqueeze(-1)


@expect("GlobalContext", 24, rank=3)
class ContextOfVolumes(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.m = nn.Conv3d(c, 1, 1)
        self.t = nn.Sequential(nn.Conv3d(c, 4, 1), nn.LayerNorm([4, 1, 1, 1]), nn.ReLU(), nn.Conv3d(4, c, 1))

    def forward(self, x):
        a = self.m(x).view(x.shape[0], 1, -1).softmax(-1)
        context = torch.einsum("bcn,bn->bc", x.flatten(2), a[:, 0])
        return x * torch.sigmoid(self.t(context[:, :, None, None, None]))


@look_alike(reason="keeps state")
class SavesItsAttention(Projected):
    def __init__(self):
        super().__init__(32)

    def forward(self, x):
        self.attention = F.softmax(self.q(x).flatten(2).mT @ self.k(x).flatten(2), dim=-1)
        return self.gamma * (self.v(x).flatten(2) @ self.attention.mT).view(x.shape) + x


@look_alike(reason="draws random numbers")
class DropsAttention(Projected):
    def __init__(self):
        super().__init__(32)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        a = self.drop(F.softmax(self.q(x).flatten(2).mT @ self.k(x).flatten(2), dim=-1))
        return self.gamma * (self.v(x).flatten(2) @ a.mT).view(x.shape) + x


@look_alike(reason="another result")
class InFloat32(Projected):
    """Its softmax is of fewer digits than a map may have."""

    def __init__(self):
        super().__init__(32)

    def forward(self, x):
        a = F.softmax((self.q(x).flatten(2).mT @ self.k(x).flatten(2)).float(), dim=-1).type_as(x)
        return self.gamma * (self.v(x).flatten(2) @ a.mT).view(x.shape) + x


@look_alike(reason="its attention")
class PositionsPooledElsewhere(Projected):
    """Values that are not pooled as the keys are: their sum is over other positions."""

    def __init__(self):
        super().__init__(32)

    def forward(self, x):
        b, c, h, w = x.shape
        a = (self.q(x).flatten(2).mT @ self.k(x).flatten(2)).softmax(1)
        return x + self.gamma * (self.v(x).flatten(2) @ a.mT).view(b, c, h, w)
