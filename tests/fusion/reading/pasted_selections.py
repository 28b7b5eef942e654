"""Selective kernels and split attention as people paste them."""

from __future__ import annotations

from collections import OrderedDict
from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.utils import _pair

BLOCKS: dict[str, tuple] = {}


def branches(*args, name="SelectiveKernel", norms=0, activation="relu", dense=True, case="", **options):
    """Decorator: instances made with these arguments are recognised as this, with so many BatchNorms and this
    activation of the branches in the fused function, and the whole excitation or not."""

    def add(cls):
        BLOCKS[cls.__name__ + case] = (lambda: cls(*args, **options), name, norms, activation, dense)
        return cls

    return add


@branches(64, 64, norms=2)
@branches(32, 64, stride=2, M=3, norms=3, case="3")
class SKConv(nn.Module):
    """One convolution gives all logits, reshaped branch by branch."""

    def __init__(self, in_channels, out_channels, stride=1, M=2, r=16, L=32):
        super().__init__()
        d = max(in_channels // r, L)
        self.M = M
        self.out_channels = out_channels
        self.conv = nn.ModuleList()
        for i in range(M):
            self.conv.append(
                nn.Sequential(
                    nn.Conv2d(
                        in_channels, out_channels, 3, stride, padding=1 + i, dilation=1 + i, groups=32, bias=False
                    ),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True),
                )
            )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Sequential(nn.Conv2d(out_channels, d, 1, bias=False), nn.BatchNorm2d(d), nn.ReLU(inplace=True))
        self.fc2 = nn.Conv2d(d, out_channels * M, 1, 1, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, input):
        batch_size = input.size(0)
        output = []
        for conv in self.conv:
            output.append(conv(input))
        U = reduce(lambda x, y: x + y, output)
        s = self.global_pool(U)
        z = self.fc1(s)
        a_b = self.fc2(z)
        a_b = a_b.reshape(batch_size, self.M, self.out_channels, -1)
        a_b = self.softmax(a_b)
        a_b = list(a_b.chunk(self.M, dim=1))
        a_b = [a.reshape(batch_size, self.out_channels, 1, 1) for a in a_b]
        V = list(map(lambda x, y: x * y, output, a_b))
        return reduce(lambda x, y: x + y, V)


@branches(16, 2, 4, norms=2)
@branches(16, 3, 4, norms=3, case="3")
class SKConvByCat(nn.Module):
    """Branches and weights are put together one by one; a Linear a branch, nothing between them and the first."""

    def __init__(self, features, M, G, r=2, stride=1, L=8):
        super().__init__()
        d = max(int(features / r), L)
        self.M = M
        self.features = features
        self.convs = nn.ModuleList([])
        for i in range(M):
            self.convs.append(
                nn.Sequential(
                    nn.Conv2d(features, features, kernel_size=3 + i * 2, stride=stride, padding=1 + i, groups=G),
                    nn.BatchNorm2d(features),
                    nn.ReLU(inplace=False),
                )
            )
        self.fc = nn.Linear(features, d)
        self.fcs = nn.ModuleList([nn.Linear(d, features) for _ in range(M)])
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        feas = vectors = None
        for conv in self.convs:
            fea = conv(x).unsqueeze(dim=1)
            feas = fea if feas is None else torch.cat([feas, fea], dim=1)
        fea_U = torch.sum(feas, dim=1)
        fea_s = fea_U.mean(-1).mean(-1)
        fea_z = self.fc(fea_s)
        for fc in self.fcs:
            vector = fc(fea_z).unsqueeze_(dim=1)
            vectors = vector if vectors is None else torch.cat([vectors, vector], dim=1)
        attention_vectors = self.softmax(vectors).unsqueeze(-1).unsqueeze(-1)
        return (feas * attention_vectors).sum(dim=1)


@branches(16, norms=3)
class SKAttention(nn.Module):
    """Stacked in front of the batch."""

    def __init__(self, channel, kernels=(1, 3, 5), reduction=4, group=1, L=6):
        super().__init__()
        self.d = max(L, channel // reduction)
        self.convs = nn.ModuleList([])
        for k in kernels:
            layers = [
                ("conv", nn.Conv2d(channel, channel, kernel_size=k, padding=k // 2, groups=group)),
                ("bn", nn.BatchNorm2d(channel)),
                ("relu", nn.ReLU()),
            ]
            self.convs.append(nn.Sequential(OrderedDict(layers)))
        self.fc = nn.Linear(channel, self.d)
        self.fcs = nn.ModuleList([])
        for _ in range(len(kernels)):
            self.fcs.append(nn.Linear(self.d, channel))
        self.softmax = nn.Softmax(dim=0)

    def forward(self, x):
        bs, c, _, _ = x.size()
        conv_outs = []
        for conv in self.convs:
            conv_outs.append(conv(x))
        feats = torch.stack(conv_outs, 0)
        U = sum(conv_outs)
        S = U.mean(-1).mean(-1)
        Z = self.fc(S)
        weights = []
        for fc in self.fcs:
            weight = fc(Z)
            weights.append(weight.view(bs, c, 1, 1))
        attention_weights = torch.stack(weights, 0)
        attention_weights = self.softmax(attention_weights)
        return (attention_weights * feats).sum(0)


@branches(16, norms=2)
@branches(16, 3, norms=3, case="3")
class SKByView(nn.Module):
    """Concatenated along the channels, then viewed as branches; BatchNorm and ReLU in the excitation."""

    def __init__(self, c, M=2, bias=False):
        super().__init__()
        self.M, self.features = M, c
        self.convs = nn.ModuleList([nn.Conv2d(c, c, 3, padding=1 + i, dilation=1 + i, bias=bias) for i in range(M)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(c) for _ in range(M)])
        self.relu = nn.ReLU(inplace=True)
        self.gap = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Sequential(nn.Conv2d(c, 8, 1, bias=bias), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.fcs = nn.ModuleList([nn.Conv2d(8, c, 1) for _ in range(M)])
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x):
        batch_size = x.shape[0]
        feats = torch.cat([self.relu(bn(conv(x))) for conv, bn in zip(self.convs, self.bns, strict=True)], dim=1)
        feats = feats.view(batch_size, self.M, self.features, feats.shape[2], feats.shape[3])
        feats_Z = self.fc(self.gap(torch.sum(feats, dim=1)))
        attention_vectors = torch.cat([fc(feats_Z) for fc in self.fcs], dim=1)
        attention_vectors = attention_vectors.view(batch_size, self.M, self.features, 1, 1)
        attention_vectors = self.softmax(attention_vectors)
        return torch.sum(feats * attention_vectors, dim=1)


@branches(16, dense=False, norms=2)
class SKDeep(SKByView):
    """An excitation that is not two layers."""

    def __init__(self, c):
        super().__init__(c, bias=True)
        self.more = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())

    def forward(self, x):
        maps = [F.relu(bn(conv(x))) for conv, bn in zip(self.convs, self.bns, strict=True)]
        z = self.more(torch.tanh(self.fc((maps[0] + maps[1]).mean((2, 3), keepdim=True))).flatten(1))[..., None, None]
        a, b = torch.stack([fc(z) for fc in self.fcs], 1).softmax(1).unbind(1)
        return maps[0] * a.expand_as(maps[0]) + b * maps[1]


@branches(16, activation="identity")
class SKOfAnything(nn.Module):
    """Branches that end in different things."""

    def __init__(self, c):
        super().__init__()
        self.stem = nn.Conv2d(c, c, 1)
        self.a, self.b = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.Tanh()), nn.MaxPool2d(3, 1, 1)
        self.fc1, self.fc2 = nn.Linear(c, 4), nn.Linear(4, 2 * c)

    def forward(self, x):
        x = F.silu(self.stem(x))
        a, b = self.a(x), self.b(x)
        s = (b + a).flatten(2).mean(-1)
        w = F.softmax(self.fc2(F.leaky_relu(self.fc1(s))).view(len(x), 2, -1), dim=-2)
        return w[:, 0, :, None, None] * a + w[:, 1, :, None, None] * b


class rSoftMax(nn.Module):
    def __init__(self, radix, cardinality):
        super().__init__()
        self.radix = radix
        self.cardinality = cardinality

    def forward(self, x):
        batch = x.size(0)
        if self.radix > 1:
            x = x.view(batch, self.cardinality, self.radix, -1).transpose(1, 2)
            x = F.softmax(x, dim=1)
            x = x.reshape(batch, -1)
        else:
            x = torch.sigmoid(x)
        return x


@branches(16, 16, 3, padding=1, name="SplitAttention", norms=1, norm_layer=nn.BatchNorm2d)
@branches(16, 24, 3, groups=2, padding=1, name="SplitAttention", norms=1, norm_layer=nn.BatchNorm2d, case="Grouped")
@branches(16, 24, 3, groups=2, padding=1, radix=4, name="SplitAttention", case="WithoutNorm")
class SplAtConv2d(nn.Module):
    def __init__(
        self,
        in_channels,
        channels,
        kernel_size,
        stride=(1, 1),
        padding=(0, 0),
        dilation=(1, 1),
        groups=1,
        bias=True,
        radix=2,
        reduction_factor=4,
        norm_layer=None,
    ):
        super().__init__()
        padding = _pair(padding)
        inter_channels = max(in_channels * radix // reduction_factor, 32)
        self.radix = radix
        self.cardinality = groups
        self.channels = channels
        self.conv = nn.Conv2d(
            in_channels, channels * radix, kernel_size, stride, padding, dilation, groups=groups * radix, bias=bias
        )
        self.use_bn = norm_layer is not None
        if self.use_bn:
            self.bn0 = norm_layer(channels * radix)
        self.relu = nn.ReLU(inplace=True)
        self.fc1 = nn.Conv2d(channels, inter_channels, 1, groups=self.cardinality)
        if self.use_bn:
            self.bn1 = norm_layer(inter_channels)
        self.fc2 = nn.Conv2d(inter_channels, channels * radix, 1, groups=self.cardinality)
        self.rsoftmax = rSoftMax(radix, groups)

    def forward(self, x):
        x = self.conv(x)
        if self.use_bn:
            x = self.bn0(x)
        x = self.relu(x)

        batch, rchannel = x.shape[:2]
        if self.radix > 1:
            splited = torch.split(x, rchannel // self.radix, dim=1)
            gap = sum(splited)
        else:
            gap = x
        gap = F.adaptive_avg_pool2d(gap, 1)
        gap = self.fc1(gap)

        if self.use_bn:
            gap = self.bn1(gap)
        gap = self.relu(gap)

        atten = self.fc2(gap)
        atten = self.rsoftmax(atten).view(batch, -1, 1, 1)

        if self.radix > 1:
            attens = torch.split(atten, rchannel // self.radix, dim=1)
            out = sum([att * split for (att, split) in zip(attens, splited, strict=True)])
        else:
            out = atten * x
        return out.contiguous()


@branches(16, 16, 3, padding=1, name="SplitAttention", norms=1, norm_layer=nn.BatchNorm2d)
@branches(16, 24, 3, groups=2, padding=1, name="SplitAttention", norms=1, norm_layer=nn.BatchNorm2d, case="Grouped")
class SplitByReshape(SplAtConv2d):
    def forward(self, x):
        x = self.relu(self.bn0(self.conv(x)))
        B, RC, H, W = x.shape
        x = x.reshape((B, self.radix, RC // self.radix, H, W))
        x_gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        x_attn = self.fc2(self.relu(self.bn1(self.fc1(x_gap))))
        x_attn = self.rsoftmax(x_attn).view(B, -1, 1, 1)
        return (x * x_attn.reshape((B, self.radix, RC // self.radix, 1, 1))).sum(dim=1)
