"""Gates of rows and columns around a block's own layers: found as they are written anywhere, equal to what they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_attn import explain, fuse
from fused_attn.fusion import FusionError
from tests.checks import LAYOUTS, assert_same_block, in_layout, random, randomised
from tests.fusion.counting import FusedOperators

C = 8
PIXELS = "its own layers, pixel gate in its forward"
AROUND = "axis_pool, its own layers, mixed_scale in its forward"


class LinearStrips(nn.Module):
    """Linears over the channels of both pools, and the sigmoid of their sum."""

    def __init__(self, add=True):
        super().__init__()
        self.add = add
        self.down, self.down_act = nn.Linear(C, 4), nn.SiLU()
        self.rows, self.columns = nn.Linear(4, C), nn.Linear(4, C, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        h = self.down_act(self.down(x.mean(dim=3).transpose(1, 2)))
        w = self.down_act(self.down(x.mean(dim=2).transpose(1, 2)))
        h = self.rows(h).transpose(1, 2).unsqueeze(-1)
        w = self.columns(w).transpose(1, 2).unsqueeze(-2)
        y = x * self.gate(h + w)
        return y + x if self.add else y


class DepthwiseStrips(nn.Module):
    """Depthwise convolutions along each axis, adaptive pools, functions."""

    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.along_h = nn.Conv2d(C, C, (3, 1), padding=(1, 0), groups=C)
        self.along_w = nn.Conv2d(C, C, (1, 5), padding=(0, 2), groups=C)
        self.norm = norm()

    def forward(self, inp):
        h = self.norm(self.along_h(F.adaptive_avg_pool2d(inp, (None, 1))))
        w = self.along_w(F.adaptive_avg_pool2d(inp, (1, None)))
        return torch.sigmoid(w.add(h)).mul(inp)


class BareStrips(nn.Module):
    """No layer at all."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        y = self.conv(x)
        y = y * torch.sigmoid(y.mean(3, True) + y.mean(2, True))
        return F.relu(y + x)


class LocalStrips(nn.Module):
    """Convolutions of one dimension over each pool, with a GroupNorm, and a product of two gates."""

    def __init__(self, in_place=False):
        super().__init__()
        self.in_place = in_place
        self.conv, self.norm = nn.Conv1d(C, C, 5, padding=2, groups=C, bias=False), nn.GroupNorm(4, C)

    def forward(self, x):
        b, c, h, w = x.size()
        rows = self.norm(self.conv(x.mean(-1))).sigmoid().view(b, c, h, 1)
        columns = self.norm(self.conv(x.mean(-2))).sigmoid().view(b, c, 1, w)
        y = x * rows
        if self.in_place:
            y *= columns
            return y
        return y * columns.expand(b, c, h, w)


class Coordinates(nn.Module):
    """Both pools through one layer, with a BatchNorm, and hard sigmoids: in a residual block's forward."""

    def __init__(self, gate=F.hardsigmoid):
        super().__init__()
        self.gate = gate
        self.body = nn.Conv2d(C, C, 3, padding=1)
        self.one, self.bn, self.prelu = nn.Conv2d(C, 6, 1), nn.BatchNorm2d(6), nn.PReLU()
        self.to_h, self.to_w = nn.Conv2d(6, C, 1), nn.Conv2d(6, C, 1)

    def forward(self, x):
        out = self.body(x)
        h, w = out.shape[2], out.shape[3]
        y = torch.cat([out.mean(3, True), out.mean(2, True).permute(0, 1, 3, 2)], 2)
        a, b = torch.split(self.prelu(self.bn(self.one(y))), [h, w], dim=2)
        out = self.gate(self.to_w(b.permute(0, 1, 3, 2))) * out * self.gate(self.to_h(a))
        return out + x


def _over_channels(t):
    return t.softmax(1)


class RowsAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        return x * self.conv(x.mean(3, keepdim=True)).tanh()


class WithChannels(nn.Module):
    """A row's gate is of the mean of the map, too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 1)

    def forward(self, x):
        h, w = self.conv(x.mean(3, keepdim=True)), self.conv(x.mean(2, keepdim=True))
        return x * torch.sigmoid(h * x.mean((2, 3), keepdim=True) + w)


class Weighted(DepthwiseStrips):
    """Of a weighted sum there is no gate of strips."""

    def forward(self, x):
        h, w = self.along_h(x.mean(3, keepdim=True)), self.along_w(x.mean(2, keepdim=True))
        return x * torch.sigmoid(torch.add(h, w, alpha=2))


class Detached(DepthwiseStrips):
    def forward(self, x):
        h, w = self.along_h(x.detach().mean(3, keepdim=True)), self.along_w(x.mean(2, keepdim=True))
        return x * torch.sigmoid(h + w)


class OfProducts(DepthwiseStrips):
    def forward(self, x):
        h, w = self.along_h(x.mean(3, keepdim=True)), self.along_w(x.mean(2, keepdim=True))
        return x * torch.sigmoid(h * w)


FOUND = {
    "Linears": (LinearStrips, AROUND),
    "Linears, no sum": (lambda: LinearStrips(False), AROUND),
    "convolutions": (DepthwiseStrips, AROUND),
    "convolutions, BatchNorm": (lambda: DepthwiseStrips(lambda: nn.BatchNorm2d(C)), AROUND),
    "no layers": (BareStrips, AROUND),
    "1-D": (LocalStrips, AROUND),
    "1-D, in place": (lambda: LocalStrips(True), AROUND),
    "coordinates": (Coordinates, AROUND),
    "coordinates, another gate": (lambda: Coordinates(_over_channels), AROUND),
    "rows alone": (RowsAlone, "its own layers, mixed_scale in its forward"),
    "with the mean of all": (WithChannels, AROUND),
    "a weighted sum": (Weighted, PIXELS),
    "a product": (OfProducts, PIXELS),
    "detached": (Detached, PIXELS),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name):
    make, block = FOUND[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original), strict=True)
    (row,) = explain(fused)
    assert (row.block, row.fused) == (block, True)
    for shape in ((3, C, 7, 9), (1, C, 12, 5), (2, C, 1, 6)):
        for training in (True, False):
            for layout in LAYOUTS:
                x = in_layout(random(*shape, dtype=torch.float64), layout)
                assert_same_block(fused, original, x, training=training)
    single, plain = fused.float().eval(), copy.deepcopy(original).float().eval()
    x = random(2, C, 7, 9)
    with FusedOperators() as ran:
        y = single(x)
    assert ran.count
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-5)


class OfAnotherFunction(DepthwiseStrips):
    def forward(self, x):
        h, w = self.along_h(x.mean(3, keepdim=True)), self.along_w(x.mean(2, keepdim=True))
        return x * torch.tanh(h * w)


def test_is_left_alone_with_a_reason():
    plain = randomised(OfAnotherFunction())
    net = fuse(copy.deepcopy(plain))
    (row,) = explain(net)
    assert not row.fused and row.reason == "its gate is a tanh, one number an element"
    assert type(net) is OfAnotherFunction
    x = random(2, C, 7, 9, dtype=torch.float64)
    assert torch.equal(net(x), plain(x))
    with pytest.raises(FusionError):
        fuse(net, strict=True)


def test_half_and_autocast():
    """The dtype of the block's own product, and maps of other sizes than it was recognised for."""
    plain = LinearStrips().eval()
    fused = fuse(copy.deepcopy(plain))
    x = random(2, C, 7, 9)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fused(x), plain(x)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    mine, theirs = fused.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16())
    torch.testing.assert_close(mine, theirs, rtol=3e-2, atol=3e-2)
