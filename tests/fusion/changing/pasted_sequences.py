"""Squeeze-and-excitation over sequences, as people write it."""

from __future__ import annotations

import torch
from torch import nn

C = 12


def inside(lengths, most=None, dtype=None):
    """1 for the steps of each sample, 0 behind its end; of branches, an assert and tensors from nothing."""
    assert lengths.dim() == 1
    if most is None:
        most = int(lengths.max().item())
    steps = torch.arange(most, dtype=lengths.dtype, device=lengths.device)
    return torch.as_tensor(steps[None] < lengths[:, None], dtype=dtype or lengths.dtype)


class Wrapped(nn.Module):
    def __init__(self, channels, width):
        super().__init__()
        self.conv = nn.Conv1d(channels, width, 1)

    def forward(self, x):
        return self.conv(x)


class Shares(nn.Module):
    """Lengths are shares of the longest; without them the mean is plain."""

    def __init__(self):
        super().__init__()
        self.down, self.up = Wrapped(C, 4), Wrapped(4, C)
        self.relu, self.sigmoid = nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x, lengths=None):
        if lengths is None:
            pooled = x.mean(2, keepdim=True)
        else:
            weights = inside(lengths * x.shape[2], most=x.shape[2]).unsqueeze(1)
            pooled = (x * weights).sum(2, keepdim=True) / weights.sum(2, keepdim=True)
        gate = self.sigmoid(self.up(self.relu(self.down(pooled))))
        return gate * x


class Counts(nn.Module):
    """Lengths are numbers, and have to be given: without them it raises. A BatchNorm in the excitation."""

    def __init__(self):
        super().__init__()
        self.se = nn.Sequential(nn.Conv1d(C, 5, 1), nn.ReLU(), nn.BatchNorm1d(5), nn.Conv1d(5, C, 1), nn.Sigmoid())

    def forward(self, x, length=None):
        steps = torch.arange(x.size(2)).to(x.device)
        mask = (steps.unsqueeze(0) < length.unsqueeze(1)).unsqueeze(1)
        pooled = torch.sum(x * mask, dim=2, keepdim=True) / torch.sum(mask, dim=2, keepdim=True)
        return torch.mul(self.se(pooled), x)


class Masked(nn.Module):
    """Of a map; where the mask is false there may be anything."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(C, 3), nn.Linear(3, C)

    def forward(self, x, mask):
        pooled = x.masked_fill(~mask, 0.0).sum((2, 3)) / mask.sum((2, 3))
        gate = self.up(self.down(pooled).relu()).sigmoid()
        return x + x * gate[:, :, None, None]


class NoGate(Masked):
    """Nothing is multiplied by a gate a channel."""

    def forward(self, x, mask):
        return x * mask


class Prints(Counts):
    def forward(self, x, length):
        print(length)
        mask = (torch.arange(x.size(2)) < length.unsqueeze(1)).unsqueeze(1)
        return x * self.se((x * mask).sum(2, True) / mask.sum(2, True))
