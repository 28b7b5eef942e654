"""Attention between positions and between channels as people paste it, and what looks like it and is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

#: Name -> the block, the name of its recipe.
BLOCKS: dict[str, tuple] = {}
LOOK_ALIKES: dict[str, type[nn.Module]] = {}


def expect(name: str, *args):
    """Decorator: an instance made with these arguments is recognised as this."""

    def add(cls):
        BLOCKS[f"{cls.__name__} {args}"] = (lambda: cls(*args), name)
        return cls

    return add


def look_alike(cls):
    LOOK_ALIKES[cls.__name__] = cls
    return cls


@expect("PositionAttention", 32)
class PAM_Module(nn.Module):
    """As DANet's."""

    def __init__(self, in_dim=32):
        super().__init__()
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, kernel_size=1)
        self.value_conv = nn.Conv2d(in_dim, in_dim, kernel_size=1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        n, c, height, width = x.size()
        query = self.query_conv(x).view(n, -1, width * height).permute(0, 2, 1)
        key = self.key_conv(x).view(n, -1, width * height)
        attention = self.softmax(torch.bmm(query, key))
        value = self.value_conv(x).view(n, -1, width * height)
        out = torch.bmm(value, attention.permute(0, 2, 1)).view(n, c, height, width)
        return self.gamma * out + x


@expect("PositionAttention", 24)
class SelfAttention(nn.Module):
    """A port of SAGAN's without biases, by einsum, and with a scale."""

    def __init__(self, c):
        super().__init__()
        self.f, self.g, self.h = (nn.Conv2d(c, n, 1, bias=False) for n in (c // 2, c // 2, c))
        self.sigma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        f, g, h = (layer(x).flatten(2) for layer in (self.f, self.g, self.h))
        beta = torch.softmax(torch.einsum("bcn,bcm->bnm", f, g) / f.shape[1] ** 0.5, dim=2)
        return torch.addcmul(x, self.sigma, torch.einsum("bnm,bcm->bcn", beta, h).reshape_as(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return x * self.scale


@expect("PositionAttention", 16)
class PAM(nn.Module):
    """As mmseg's, gamma in a layer; and for sequences."""

    def __init__(self, c):
        super().__init__()
        self.key_project, self.query_project = nn.Conv1d(c, 4, 1), nn.Conv1d(c, 4, 1)
        self.value_project, self.gamma = nn.Conv1d(c, c, 1), Scale()

    def forward(self, x):
        sim_map = torch.matmul(self.query_project(x).permute(0, 2, 1).contiguous(), self.key_project(x))
        context = torch.matmul(F.softmax(sim_map, dim=-1), self.value_project(x).permute(0, 2, 1).contiguous())
        return self.gamma(context.permute(0, 2, 1).contiguous()) + x


@expect("ChannelSelfAttention", 24)
class CAM_Module(nn.Module):
    """As DANet's."""

    def __init__(self, in_dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x):
        n, c, height, width = x.size()
        rows = x.view(n, c, -1)
        energy = torch.bmm(rows, x.view(n, c, -1).permute(0, 2, 1))
        energy_new = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        out = torch.bmm(self.softmax(energy_new), rows).view(n, c, height, width)
        return self.gamma * out + x


@expect("ChannelSelfAttention")
class PlainCAM(nn.Module):
    """Without the difference to the largest, and for volumes."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        n, c, d, h, w = x.shape
        rows = x.reshape(n, c, d * h * w)
        return x + self.alpha * (F.softmin(rows @ rows.mT, dim=-1) @ rows).reshape(n, c, d, h, w)


@expect("NonLocal", 32)
@expect("NonLocal", 32, "gaussian")
@expect("NonLocal", 32, "dot")
@expect("NonLocal", 32, "embedded", False)
class NONLocalBlock2D(nn.Module):
    """As AlexHex7's, without the pool."""

    def __init__(self, c, mode="embedded", bn_layer=True):
        super().__init__()
        self.mode, self.inter_channels = mode, c // 2
        self.g = nn.Conv2d(c, c // 2, 1)
        self.W = nn.Conv2d(c // 2, c, 1)
        if bn_layer:
            self.W = nn.Sequential(self.W, nn.BatchNorm2d(c))
        if mode != "gaussian":
            self.theta, self.phi = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c, c // 2, 1)

    def forward(self, x):
        n = x.size(0)
        g_x = self.g(x).view(n, self.inter_channels, -1).permute(0, 2, 1)
        theta_x = (x if self.mode == "gaussian" else self.theta(x)).flatten(2).permute(0, 2, 1)
        phi_x = (x if self.mode == "gaussian" else self.phi(x)).flatten(2)
        f = torch.matmul(theta_x, phi_x)
        f_div_C = f / f.size(-1) if self.mode == "dot" else F.softmax(f, dim=-1)
        y = torch.matmul(f_div_C, g_x).permute(0, 2, 1).contiguous()
        return self.W(y.view(n, self.inter_channels, *x.size()[2:])) + x


@expect("NonLocal", 32)
class ScaledNonLocal(nn.Module):
    """As mmcv's: scaled in place, no norm."""

    def __init__(self, c):
        super().__init__()
        self.g, self.theta, self.phi = (nn.Conv2d(c, c // 2, 1) for _ in range(3))
        self.conv_out = nn.Conv2d(c // 2, c, 1)

    def forward(self, x):
        n, c = x.shape[:2]
        g_x = self.g(x).view(n, c // 2, -1).permute(0, 2, 1)
        theta_x = self.theta(x).view(n, c // 2, -1).permute(0, 2, 1)
        pairwise_weight = torch.matmul(theta_x, self.phi(x).view(n, c // 2, -1))
        pairwise_weight /= theta_x.shape[-1] ** 0.5
        y = torch.matmul(pairwise_weight.softmax(dim=-1), g_x)
        return x + self.conv_out(y.permute(0, 2, 1).contiguous().reshape(n, c // 2, *x.shape[2:]))


# Others


@look_alike
class OverTheQueries(PAM_Module):
    def __init__(self):
        super().__init__(32)
        self.softmax = nn.Softmax(dim=1)


@look_alike
class ScaledByPositions(PAM_Module):
    """A scale that is another on another map."""

    def forward(self, x):
        n, c, h, w = x.shape
        query, key, value = (layer(x).flatten(2) for layer in (self.query_conv, self.key_conv, self.value_conv))
        attention = torch.softmax(query.mT @ key / (h * w) ** 0.5, -1)
        return self.gamma * (value @ attention.mT).reshape(n, c, h, w) + x


@expect("NonLocal")
class WithoutTheMap(PAM_Module):
    """Its result alone."""

    def forward(self, x):
        return super().forward(x) - x


@look_alike
class WithTheLargest(nn.Module):
    """Of similar channels, not of different ones."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        rows = x.flatten(2)
        return x + self.gamma * ((rows @ rows.mT).softmax(-1) @ rows).view(x.shape)


@look_alike
class GammaOfEachChannel(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 24, 1, 1))

    def forward(self, x):
        rows = x.flatten(2)
        return x + self.gamma * ((-rows @ rows.mT).softmax(-1) @ rows).view(x.shape)


@look_alike
class Transposed(PAM_Module):
    """The values of the positions that attend to one, not of those it attends to."""

    def forward(self, x):
        query, key, value = (layer(x).flatten(2) for layer in (self.query_conv, self.key_conv, self.value_conv))
        return self.gamma * (value @ (query.mT @ key).softmax(-1)).view(x.shape) + x
