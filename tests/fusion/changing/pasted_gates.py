"""Blocks of two maps as people write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AttentionBlock(nn.Module):
    """Two-dimensional Attention U-Nets, by layers in Sequentials."""

    def __init__(self, F_g, F_l, n_coefficients):
        super().__init__()
        self.W_gate = nn.Sequential(nn.Conv2d(F_g, n_coefficients, 1), nn.BatchNorm2d(n_coefficients))
        self.W_x = nn.Sequential(nn.Conv2d(F_l, n_coefficients, 1), nn.BatchNorm2d(n_coefficients))
        self.psi = nn.Sequential(nn.Conv2d(n_coefficients, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())
        self.relu = nn.ReLU(inplace=True)

    def forward(self, gate, skip_connection):
        psi = self.relu(self.W_gate(gate) + self.W_x(skip_connection))
        return skip_connection * self.psi(psi)


class Functions(nn.Module):
    """Everything in the forward, the gate first, the map second or the other way round, without BatchNorm."""

    def __init__(self, channels, inner):
        super().__init__()
        self.theta = nn.Conv2d(channels, inner, 1, bias=False)
        self.phi = nn.Conv2d(channels, inner, 1)
        self.psi = nn.Conv2d(inner, 1, 1)

    def forward(self, x, g):
        f = F.relu(torch.add(self.theta(x), self.phi(g)), inplace=True)
        return torch.mul(torch.sigmoid(self.psi(f)), x)


class Resampled(nn.Module):
    """The paper's: the gating signal has half the size, and so has the sum."""

    def __init__(self, channels, gating, rank=3):
        super().__init__()
        conv, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
        self.mode = {2: "bilinear", 3: "trilinear"}[rank]
        self.theta = conv(channels, channels, 2, stride=2, bias=False)
        self.phi = conv(gating, channels, 1)
        self.psi = conv(channels, 1, 1)
        self.W = nn.Sequential(conv(channels, channels, 1), norm(channels))

    def forward(self, x, g):
        theta_x = self.theta(x)
        phi_g = F.interpolate(self.phi(g), size=theta_x.size()[2:], mode=self.mode)
        psi = torch.sigmoid(self.psi(F.relu(theta_x + phi_g, inplace=True)))
        return self.W(F.interpolate(psi, size=x.size()[2:], mode=self.mode).expand_as(x) * x)


class Upsampled(nn.Module):
    """The gating signal is brought to size by a layer, its gate too; every layer has a name of its own."""

    def __init__(self, channels, gating, inner):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.conv_g, self.bn_g = nn.Conv2d(gating, inner, 1), nn.BatchNorm2d(inner)
        self.conv_x, self.bn_x = nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv_psi, self.bn_psi = nn.Conv2d(inner, 1, 1), nn.BatchNorm2d(1)
        self.relu, self.sigmoid = nn.ReLU(), nn.Sigmoid()

    def forward(self, g, x):
        g1 = self.bn_g(self.conv_g(self.up(g)))
        x1 = self.bn_x(self.conv_x(x))
        a = self.sigmoid(self.bn_psi(self.conv_psi(self.relu(x1 + g1))))
        return a * x


class Twice(nn.Module):
    """Does something else in evaluation."""

    def __init__(self, channels):
        super().__init__()
        self.w = nn.Conv2d(channels, 1, 1)

    def forward(self, x, g):
        y = x * torch.sigmoid(self.w(g))
        return y if self.training else y + 0


class GlobalAttention(nn.Module):
    """PAN's: channels of the fine map are weighted by the mean of the coarse one, which is added."""

    def __init__(self, channels, out):
        super().__init__()
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out), nn.Sigmoid()
        )
        self.fine = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x, y):
        h, w = y.size(2), y.size(3)
        y_up = F.interpolate(x, size=(h, w), mode="bilinear", align_corners=True)
        return y_up + torch.mul(self.fine(y), self.pooled(x))


class Fusion(nn.Module):
    """MAnet's: the gate is a sum of those of both maps."""

    def __init__(self, channels, skip, reduction=4):
        super().__init__()
        self.conv = nn.Conv2d(channels, skip, 3, padding=1)
        self.of_high, self.of_low = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(skip, skip // reduction, 1),
                nn.ReLU(inplace=True),
                nn.Conv2d(skip // reduction, skip, 1),
                nn.Sigmoid(),
            )
            for _ in range(2)
        )

    def forward(self, x, skip):
        x = F.interpolate(self.conv(x), scale_factor=2, mode="nearest")
        x = x * (self.of_high(x) + self.of_low(skip))
        return torch.cat([x, skip], dim=1)


class Reduced(nn.Module):
    """The heads of LR-ASPP, with both maps as arguments."""

    def __init__(self, low, high, inner, classes):
        super().__init__()
        self.cbr = nn.Sequential(nn.Conv2d(high, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True))
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(high, inner, 1, bias=False), nn.Sigmoid())
        self.low_classifier, self.high_classifier = nn.Conv2d(low, classes, 1), nn.Conv2d(inner, classes, 1)

    def forward(self, low, high):
        x = self.cbr(high) * self.scale(high)
        x = F.interpolate(x, size=low.shape[-2:], mode="bilinear", align_corners=False)
        return self.low_classifier(low) + self.high_classifier(x)


class Head(Reduced):
    """torchvision's: both maps are in one dictionary."""

    def forward(self, maps):
        low = maps["low"]
        return super().forward(low, maps["high"])


class Listed(nn.Module):
    """Both maps in a list or a tuple. how: it gets them from there."""

    def __init__(self, channels, how):
        super().__init__()
        self.conv, self.how = nn.Conv2d(channels, 1, 1), how

    def forward(self, xs):
        if self.how == "unpacked":
            coarse, fine = xs
        elif self.how == "indices":
            coarse, fine = xs[0], xs[1]
        else:
            fine, coarse = xs[-1], xs[0]
        up = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return fine * torch.sigmoid(self.conv(up + fine))


class WithParameters(nn.Module):
    """The gate's weights in a list of parameters."""

    def __init__(self, channels):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(1, channels, 1, 1)) for _ in range(2)])

    def forward(self, g, x):
        return x * torch.sigmoid(F.conv2d(g, self.weights[0]) + F.conv2d(x, self.weights[1]))


# What is left alone


class MaybeSkip(nn.Module):
    """A map that may be given beside the first, or not."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x, skip=None):
        if skip is None:
            return x
        return skip * torch.sigmoid(self.conv(x + skip))[:, :1]


class Widened(nn.Module):
    """A gate that gets the channels that are in the code."""

    def __init__(self, channels, how):
        super().__init__()
        self.conv, self.channels, self.how = nn.Conv2d(channels, 1, 1), channels, how

    def forward(self, g, x):
        gate = torch.sigmoid(self.conv(g))
        if self.how == "repeat":
            return x * gate.repeat(1, self.channels, 1, 1)
        return x * gate.expand(-1, self.channels, -1, -1)


class BySize(nn.Module):
    """Asks for the size of a map, and does something else then."""

    def __init__(self, channels):
        super().__init__()
        self.w = nn.Conv2d(channels, 1, 1)

    def forward(self, g, x):
        if g.shape[2] > 50:
            g = 2 * g
        return x * self.w(g).sigmoid()


class Keeps(nn.Module):
    """Keeps its gate for a picture."""

    def __init__(self, channels):
        super().__init__()
        self.w = nn.Conv2d(channels, 1, 1)

    def forward(self, g, x):
        self.last = self.w(g).sigmoid()
        return x * self.last


class Product(nn.Module):
    """No gate: a product of maps."""

    def __init__(self, channels):
        super().__init__()
        self.w = nn.Conv2d(channels, channels, 1)

    def forward(self, g, x):
        return x * self.w(g).sigmoid()
