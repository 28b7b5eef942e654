"""Attention blocks as people paste them: the same few functions, written in many ways."""

from __future__ import annotations

import math
from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn

BLOCKS: dict[str, tuple] = {}


def expect(kind: str, *args, name: str | None = None, **facts):
    """Decorator: instances made with these arguments are recognised as this, with these facts in the recipe."""

    def add(cls):
        BLOCKS[f"{cls.__name__}{name or len([k for k in BLOCKS if k.startswith(cls.__name__)]) or ''}"] = (
            lambda: cls(*args),
            kind,
            facts,
        )
        return cls

    return add


# Squeeze and excitation


@expect("ChannelGate", 32, pool="avg", activation="relu", gate="sigmoid")
class SEBlock(nn.Module):
    def __init__(self, channel, reduction=16):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channel, channel // reduction, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channel // reduction, channel, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.avg_pool(x).view(b, c)
        y = self.fc(y).view(b, c, 1, 1)
        return x * y.expand_as(x)


@expect("ChannelGate", 48, 3, pool="avg")
class se_block(SEBlock):
    pass


@expect("ChannelGate", 32, pool="max", ties="first")
class SEMax(nn.Module):
    def __init__(self, channel, ratio=4):
        super().__init__()
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Conv2d(channel, channel // ratio, 1)
        self.fc2 = nn.Conv2d(channel // ratio, channel, 1)

    def forward(self, x):
        w = F.relu(self.fc1(self.max_pool(x)), inplace=True)
        return torch.sigmoid(self.fc2(w)) * x


@expect("ChannelGate", 32, pool="max", ties="even")
class SEAmax(SEMax):
    def forward(self, x):
        return torch.sigmoid(self.fc2(self.fc1(x.amax((2, 3), keepdim=True)).relu())) * x


@expect("ChannelGate", 32, activation="silu", bias1="squeeze.bias")
class SwishSE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, kernel_size=1)

    def forward(self, inputs):
        s = F.avg_pool2d(inputs, kernel_size=inputs.size()[2:])
        s = self.squeeze(s)
        s = s * torch.sigmoid(s)
        s.unsqueeze_(0)
        return torch.mul(self.excite(s.squeeze(0)).sigmoid(), inputs)


@expect("ChannelGate", 40, gate="hard_sigmoid")
class HardSE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c))
        self.relu6 = nn.ReLU6(inplace=True)

    def forward(self, x):
        y = self.fc(x.mean([2, 3]))
        y = self.relu6(y + 3) / 6
        return x * y[:, :, None, None]


@expect("ChannelGate", 24, activation="hard_swish")
class LinearOnLastAxis(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down, self.up = nn.Linear(c, 5), nn.Linear(5, c, bias=False)

    def forward(self, x):
        y = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)
        y = self.down(y)
        y = y * F.relu6(y + 3.0) / 6.0
        y = torch.einsum("bchw->bhwc", x) * 0 + 0 if False else self.up(y)
        return x.mul(y.sigmoid().unsqueeze(-1).unsqueeze(-1))


@expect("ChannelGate", 32, adds_input=True)
class ResidualSE(SEBlock):
    def forward(self, x):
        return super().forward(x) + x


@expect("ChannelGate", 32, adds_input=True)
class OnePlusGate(SEBlock):
    def forward(self, x):
        gate = self.fc(self.avg_pool(x).flatten(1))
        return x * (1 + gate[..., None, None])


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


BLOCKS["Wrapper"] = (lambda: Wrapper(SEBlock(32)), "ChannelGate", {"weight1": "inner.fc.0.weight"})


@expect("ChannelGate", 32)
class GlobalPoolBySum(SEBlock):
    def forward(self, x):
        b, c, h, w = x.shape
        y = x.view(b, c, -1).sum(dim=-1) / (h * w)
        return x * self.fc(y).reshape(b, c, 1, 1)


@expect("ChannelGate", 32)
class MeanOfAMultiple(SEBlock):
    """The mean of twice the map, halved."""

    def forward(self, x):
        y = 0.5 * (2 * x).mean((2, 3))
        return x * self.fc(y)[:, :, None, None]


@expect("ChannelGate", 32, activation="identity")
class NoActivation(SEBlock):
    """Nothing between its two layers."""

    def forward(self, x):
        squeeze, _, excite, gate = self.fc
        return x * gate(excite(squeeze(x.mean((2, 3)))))[:, :, None, None]


@expect("ChannelGate", 16, 1, hidden=1)
class HiddenOfOne(nn.Module):
    def __init__(self, c, hidden):
        super().__init__()
        self.a, self.b = nn.Linear(c, hidden), nn.Linear(hidden, c)

    def forward(self, x):
        return x * torch.sigmoid(self.b(torch.relu(self.a(x.mean(-1).mean(-1)))))[:, :, None, None]


@expect("ChannelGate", 32, rank=5)
class SE3d(SEBlock):
    def __init__(self, channel):
        super().__init__(channel)
        self.avg_pool = nn.AdaptiveAvgPool3d(1)

    def forward(self, x):
        y = self.fc(self.avg_pool(x).flatten(1))
        return x * y.view(*y.shape, 1, 1, 1)


@expect("ChannelGate", 32, rank=3)
class SE1d(SEBlock):
    def __init__(self, channel):
        super().__init__(channel)
        self.avg_pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, x):
        return x * self.fc(self.avg_pool(x).squeeze(-1)).unsqueeze(-1)


@expect("ChannelGate", 20, gate="hard_sigmoid", weight2=None)
class ESE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc, self.gate = nn.Conv2d(c, c, 1), nn.Hardsigmoid(inplace=True)

    def forward(self, x):
        w = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc(w))


# ECA


@expect("ChannelGate", layer="conv")
class eca_layer(nn.Module):
    def __init__(self, k_size=3):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k_size, padding=(k_size - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        y = self.avg_pool(x)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        y = self.sigmoid(y)
        return x * y.expand_as(x)


@expect("ChannelGate", 64, layer="conv")
class ECABlock(nn.Module):
    def __init__(self, channels, gamma=2, b=1):
        super().__init__()
        t = int(abs((math.log(channels, 2) + b) / gamma))
        k = t if t % 2 else t + 1
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=True)

    def forward(self, x):
        b, c, h, w = x.size()
        v = self.conv(self.avg_pool(x).view(b, 1, c)).sigmoid().view([b, c, 1, 1])
        return v * x


# Channel attention


@expect("OwnLayers", 32)
class ChannelAttention(nn.Module):
    def __init__(self, in_planes, ratio=8):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        avg_out = self.fc2(self.relu1(self.fc1(self.avg_pool(x))))
        max_out = self.fc2(self.relu1(self.fc1(self.max_pool(x))))
        out = avg_out + max_out
        return self.sigmoid(out)


@expect("ChannelGate", 32, pool="both", ties="first")
class Channel_Attention_Module_FC(nn.Module):
    def __init__(self, channels, ratio=4):
        super().__init__()
        self.avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.max_pooling = nn.AdaptiveMaxPool2d(1)
        self.fc_layers = nn.Sequential(
            nn.Linear(channels, channels // ratio, bias=False),
            nn.ReLU(),
            nn.Linear(channels // ratio, channels, bias=False),
        )
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        b, c, h, w = x.size()
        avg_x = self.avg_pooling(x).view(b, c)
        max_x = self.max_pooling(x).view(b, c)
        v = self.fc_layers(avg_x) + self.fc_layers(max_x)
        v = self.sigmoid(v).view(b, c, 1, 1)
        return x * v


@expect("ChannelGate", 64, pool="both", layer="conv")
class Channel_Attention_Module_Conv(nn.Module):
    def __init__(self, channels, gamma=2, b=1):
        super().__init__()
        k = int(abs((math.log(channels, 2) + b) / gamma))
        k = k if k % 2 else k + 1
        self.avg_pooling = nn.AdaptiveAvgPool2d(1)
        self.max_pooling = nn.AdaptiveMaxPool2d(1)
        self.conv = nn.Conv1d(1, 1, kernel_size=k, padding=(k - 1) // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        avg_x = self.conv(self.avg_pooling(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        max_x = self.conv(self.max_pooling(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * self.sigmoid(avg_x + max_x)


class Flatten(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


@expect("ChannelGate", 32, pool="both", bias2="mlp.3.bias")
class ChannelGate(nn.Module):
    def __init__(self, gate_channels, reduction_ratio=16, pool_types=("avg", "max")):
        super().__init__()
        self.gate_channels = gate_channels
        self.mlp = nn.Sequential(
            Flatten(),
            nn.Linear(gate_channels, gate_channels // reduction_ratio),
            nn.ReLU(),
            nn.Linear(gate_channels // reduction_ratio, gate_channels),
        )
        self.pool_types = list(pool_types)

    def forward(self, x):
        channel_att_sum = None
        for pool_type in self.pool_types:
            size = (x.size(2), x.size(3))
            pool = F.avg_pool2d if pool_type == "avg" else F.max_pool2d
            raw = self.mlp(pool(x, size, stride=size))
            channel_att_sum = raw if channel_att_sum is None else channel_att_sum + raw
        scale = torch.sigmoid(channel_att_sum).unsqueeze(2).unsqueeze(3).expand_as(x)
        return x * scale


@expect("ChannelGate", 32, pool="both")
class ByReduce(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.pools = nn.ModuleList([nn.AdaptiveAvgPool2d((1, 1)), nn.AdaptiveMaxPool2d((1, 1))])
        self.mlp = nn.Sequential(nn.Conv2d(c, 4, 1, bias=False), nn.ReLU(True), nn.Conv2d(4, c, 1, bias=False))

    def forward(self, x):
        return x * reduce(lambda a, b: a + b, [self.mlp(pool(x)) for pool in self.pools]).sigmoid()


@expect("ChannelGate", 32, pool="avgmax", ties="even")
class LightChannelAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, 8, 1), nn.Conv2d(8, c, 1)

    def forward(self, x):
        s = 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True)
        return x * F.sigmoid(self.fc2(F.relu(self.fc1(s))))


# Spatial attention


@expect("OwnLayers")
class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        x = torch.cat([avg_out, max_out], dim=1)
        return self.sigmoid(self.conv1(x))


@expect("SpatialGate", order=("mean", "max"), ties="first", rank=3)
class SpatialAttention1d(nn.Module):
    """With a BatchNorm, which raises for the one position that a map may have."""

    def __init__(self, kernel_size=7):
        super().__init__()
        self.conv = nn.Conv1d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm1d(1)

    def forward(self, x):
        z = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.bn(self.conv(z)))


@expect("SpatialGate", order=("max", "mean"), ties="first")
class Spatial_Attention_Module(nn.Module):
    def __init__(self, k=5):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=(k, k), padding="same", bias=True)

    def forward(self, x):
        pools = [torch.max(x, 1).values.unsqueeze(1), torch.mean(x, 1).unsqueeze(1)]
        return x * torch.sigmoid(self.conv(torch.cat(pools, 1)))


@expect("SpatialGate", order=("mean", "max"), ties="even")
class StackedPools(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        return x * self.conv(torch.stack([x.mean(1), x.amax(1)], 1)).tanh().expand_as(x)


class BasicConv(nn.Module):
    def __init__(self, cin, cout, k, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, padding=(k - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-5, momentum=0.01, affine=True)
        self.relu = nn.ReLU() if relu else None

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.relu is None else self.relu(x)


class ChannelPool(nn.Module):
    def forward(self, x):
        return torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)


@expect("SpatialGate", order=("max", "mean"), layers=("spatial.conv", "spatial.bn"))
class SpatialGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.compress = ChannelPool()
        self.spatial = BasicConv(2, 1, 7, relu=False)

    def forward(self, x):
        return x * torch.sigmoid(self.spatial(self.compress(x)))


# Both


@expect("CbamGate", 32)
class CBAM(nn.Module):
    def __init__(self, c, no_spatial=False):
        super().__init__()
        self.ChannelGate = ChannelGate(c)
        self.no_spatial = no_spatial
        if not no_spatial:
            self.SpatialGate = SpatialGate()

    def forward(self, x):
        x_out = self.ChannelGate(x)
        if not self.no_spatial:
            x_out = self.SpatialGate(x_out)
        return x_out


@expect("CbamGate", 32, adds_input=False)
class cbam(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ca, self.sa = ChannelAttention(c), SpatialAttention()

    def forward(self, x):
        x = x * self.ca(x)
        x = x * self.sa(x)
        return x


@expect("CbamGate", 32, adds_input=True)
class CBAMWithResidual(cbam):
    def forward(self, x):
        residual = x
        out = self.ca(x).expand_as(x) * x
        out = out * self.sa(out)
        return out + residual


@expect("OwnLayers", 16, 16, name="WithOneHiddenChannel")
@expect("OwnLayers", 32, name="SCSE")
class SCSE(nn.Module):
    def __init__(self, c, r=8):
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c, c // r, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c // r, c, 1),
            nn.Sigmoid(),
        )
        self.sSE = nn.Sequential(nn.Conv2d(c, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


@expect("OwnLayers", 32, name="SCSE")
class SCSEMax(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, c // 2), nn.Linear(c // 2, c)
        self.conv = nn.Conv2d(c, 1, 1)

    def forward(self, x):
        g = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return torch.max(torch.mul(x, g[:, :, None, None]), torch.mul(x, torch.sigmoid(self.conv(x))))


@expect("OwnLayers", 32, name="BAM")
class BAM(nn.Module):
    def __init__(self, c, r=8, d=4):
        super().__init__()
        m = c // r
        self.channel = nn.Sequential(nn.Linear(c, m), nn.BatchNorm1d(m), nn.ReLU(), nn.Linear(m, c))
        self.spatial = nn.Sequential(
            nn.Conv2d(c, m, 1),
            nn.BatchNorm2d(m),
            nn.ReLU(),
            nn.Conv2d(m, m, 3, padding=d, dilation=d),
            nn.BatchNorm2d(m),
            nn.ReLU(),
            nn.Conv2d(m, m, 3, padding=d, dilation=d),
            nn.BatchNorm2d(m),
            nn.ReLU(),
            nn.Conv2d(m, 1, 1),
        )

    def forward(self, x):
        c = self.channel(F.adaptive_avg_pool2d(x, 1).flatten(1)).unsqueeze(2).unsqueeze(3).expand_as(x)
        s = self.spatial(x).expand_as(x)
        return (1 + torch.sigmoid(c * s)) * x


@expect("OwnLayers", 32, name="BAM")
class BAMByConvolutions(BAM):
    def __init__(self, c, r=8):
        super().__init__(c, r)
        m = c // r
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, m, 1), nn.BatchNorm2d(m), nn.ReLU(), nn.Conv2d(m, c, 1)
        )

    def forward(self, x):
        return x + x * torch.sigmoid(self.channel(x) * self.spatial(x))


class AttentionGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.compress = ChannelPool()
        self.conv = BasicConv(2, 1, 7, relu=False)

    def forward(self, x):
        return x * torch.sigmoid_(self.conv(self.compress(x)))


@expect("OwnLayers", name="TripletAttention")
class TripletAttention(nn.Module):
    def __init__(self, no_spatial=False):
        super().__init__()
        self.cw, self.hc = AttentionGate(), AttentionGate()
        self.no_spatial = no_spatial
        if not no_spatial:
            self.hw = AttentionGate()

    def forward(self, x):
        x_perm1 = x.permute(0, 2, 1, 3).contiguous()
        x_out11 = self.cw(x_perm1).permute(0, 2, 1, 3).contiguous()
        x_perm2 = x.permute(0, 3, 2, 1).contiguous()
        x_out21 = self.hc(x_perm2).permute(0, 3, 2, 1).contiguous()
        if not self.no_spatial:
            return 1 / 3 * (self.hw(x) + x_out11 + x_out21)
        return 1 / 2 * (x_out11 + x_out21)


BLOCKS["TripletWithoutSpatial"] = (lambda: TripletAttention(True), "OwnLayers", {"name": "TripletAttention"})


class h_sigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.relu(x + 3) / 6


class h_swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.sigmoid = h_sigmoid()

    def forward(self, x):
        return x * self.sigmoid(x)


@expect("OwnLayers", 32, name="CoordinateAttention")
class CoordAtt(nn.Module):
    def __init__(self, inp, reduction=8):
        super().__init__()
        self.pool_h, self.pool_w = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))
        mip = max(8, inp // reduction)
        self.conv1, self.bn1, self.act = nn.Conv2d(inp, mip, 1), nn.BatchNorm2d(mip), h_swish()
        self.conv_h, self.conv_w = nn.Conv2d(mip, inp, 1), nn.Conv2d(mip, inp, 1)

    def forward(self, x):
        identity = x
        n, c, h, w = x.size()
        x_h = self.pool_h(x)
        x_w = self.pool_w(x).permute(0, 1, 3, 2)
        y = self.act(self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2))))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        a_h = self.conv_h(x_h).sigmoid()
        a_w = self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid()
        return identity * a_w * a_h


@expect("OwnLayers", name="SimAM")
class simam_module(nn.Module):
    def __init__(self, e_lambda=1e-4):
        super().__init__()
        self.activaton = nn.Sigmoid()
        self.e_lambda = e_lambda

    def forward(self, x):
        b, c, h, w = x.size()
        n = w * h - 1
        x_minus_mu_square = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        y = x_minus_mu_square / (4 * (x_minus_mu_square.sum(dim=[2, 3], keepdim=True) / n + self.e_lambda)) + 0.5
        return x * self.activaton(y)


# Excitations that are no part of an op


@expect("SplitGate")
class NormInside(nn.Module):
    """An excitation that couples samples runs between squeeze and scale."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 16, 1)

    def forward(self, x):
        return x * self.b(self.bn(self.a(x.mean((2, 3), keepdim=True))).relu()).sigmoid()


@expect("SplitGate")
class SharedWeight(nn.Module):
    """So does one whose layer is run twice."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x):
        return x * self.a(self.a(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
