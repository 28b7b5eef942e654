"""Blocks of hosts that the tests do not install: the same function, parts' names and class path as theirs."""

from __future__ import annotations

import types

import torch
from torch import nn


def of(module: str):
    """Decorator: the class is known as one of this module."""

    def rename(cls: type) -> type:
        cls.__module__ = module
        for member in vars(cls).values():
            if isinstance(member, types.FunctionType):
                member.__module__ = module
        return cls

    return rename


@of("ultralytics.nn.modules.conv")
class ChannelAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(channels, channels, 1)
        self.act = nn.Sigmoid()

    def forward(self, x):
        return self.act(self.fc(self.pool(x))) * x


@of("ultralytics.nn.modules.conv")
class SpatialAttention(nn.Module):
    def __init__(self, kernel_size=7):
        super().__init__()
        self.cv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.act = nn.Sigmoid()

    def forward(self, x):
        pools = x.mean(1, keepdim=True), x.max(1, keepdim=True).values
        return self.act(self.cv1(torch.cat(pools, 1))) * x


@of("ultralytics.nn.modules.conv")
class CBAM(nn.Module):
    def __init__(self, channels, kernel_size=7):
        super().__init__()
        self.channel_attention = ChannelAttention(channels)
        self.spatial_attention = SpatialAttention(kernel_size)

    def forward(self, x):
        return self.spatial_attention(self.channel_attention(x))


@of("segmentation_models_pytorch.base.modules")
class SCSEModule(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        hidden = channels // reduction
        convolutions = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        pool = nn.AdaptiveAvgPool2d(1)
        self.cSE = nn.Sequential(pool, convolutions[0], nn.ReLU(inplace=True), convolutions[1], nn.Sigmoid())
        self.sSE = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)
