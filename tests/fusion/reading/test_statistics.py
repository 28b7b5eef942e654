"""Global response normalisation, gated channel transformation and SRM as people write them, and what is neither."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import explain, fuse, reference
from fused_attn.backends import _Small
from fused_attn.hosts import define_torchvision_operators
from tests.checks import assert_same_block, random, randomised
from tests.fusion.counting import FusedOperators

RESPONSE, TRANSFORMATION, STYLE = "GlobalResponseNorm", "GatedChannelTransformation", "SRM"


class GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * nx) + self.beta + x


class First(nn.Module):
    """Channels first, the bias before the weight, eps an option."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.b, self.a = nn.Parameter(torch.zeros(1, channels, 1, 1)), nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        norm = x.norm(p=2, dim=[2, 3], keepdim=True)
        return x + self.a * x * norm.div(norm.mean(1, True) + self.eps) + self.b


class Volume(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
        return torch.addcmul(self.bias, self.weight * norm / (norm.mean(-1, keepdim=True) + 1e-6), x) + x


class GCT(nn.Module):
    def __init__(self, num_channels, epsilon=1e-5, mode="l2"):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, num_channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_channels, 1, 1))
        self.epsilon, self.mode = epsilon, mode

    def forward(self, x):
        if self.mode == "l2":
            embedding = (x.pow(2).sum((2, 3), keepdim=True) + self.epsilon).pow(0.5) * self.alpha
            norm = self.gamma / (embedding.pow(2).mean(dim=1, keepdim=True) + self.epsilon).pow(0.5)
        else:
            embedding = torch.abs(x).sum((2, 3), keepdim=True) * self.alpha
            norm = self.gamma / (torch.abs(embedding).mean(dim=1, keepdim=True) + self.epsilon)
        return x * (1.0 + torch.tanh(embedding * norm + self.beta))


class SRMLayer(nn.Module):
    """The common one."""

    def __init__(self, channel):
        super().__init__()
        self.cfc = nn.Conv1d(channel, channel, kernel_size=2, bias=False, groups=channel)
        self.bn = nn.BatchNorm1d(channel)

    def forward(self, x):
        b, c, _, _ = x.size()
        mean = x.view(b, c, -1).mean(-1).unsqueeze(-1)
        std = x.view(b, c, -1).std(-1).unsqueeze(-1)
        z = self.bn(self.cfc(torch.cat((mean, std), -1)))
        g = torch.sigmoid(z)
        g = g.view(b, c, 1, 1)
        return x * g.expand_as(x)


class Styles(nn.Module):
    """The authors': a parameter, and a BatchNorm over maps of one position."""

    def __init__(self, channel):
        super().__init__()
        self.cfc = nn.Parameter(torch.zeros(channel, 2))
        self.bn = nn.BatchNorm2d(channel)
        self.activation = nn.Sigmoid()

    def _pooled(self, x, eps=0.0):
        n, c, _, _ = x.size()
        mean = x.view(n, c, -1).mean(dim=2, keepdim=True)
        std = x.view(n, c, -1).std(dim=2, keepdim=True) + eps
        return torch.cat((mean, std), dim=2)

    def forward(self, x):
        z = torch.sum(self._pooled(x) * self.cfc[None, :, :], dim=2)[:, :, None, None]
        return x * self.activation(self.bn(z))


class Exits(GCT):
    """The authors': a branch for what is no option prints and ends the program."""

    def forward(self, x):
        if self.mode == "l2":
            return super().forward(x)
        else:
            print("Unknown mode!")
            sys.exit()


class WithEps(Styles):
    """The authors': to the variance a number is added."""

    def _pooled(self, x, eps=1e-5):
        n, c, _, _ = x.size()
        mean = x.view(n, c, -1).mean(dim=2, keepdim=True)
        variance = x.view(n, c, -1).var(dim=2, keepdim=True) + eps
        return torch.cat((mean, variance.sqrt()), dim=2)


class Biased(SRMLayer):
    """The deviation without Bessel's correction."""

    def forward(self, x):
        b, c, _, _ = x.size()
        values = x.view(b, c, -1)
        u = torch.stack((values.mean(-1), values.std(-1, unbiased=False)), -1)
        return x * torch.sigmoid(self.bn(self.cfc(u))).view(b, c, 1, 1)


def timm_norm(**options):
    define_torchvision_operators()
    grn = pytest.importorskip("timm.layers.grn", reason="timm is not installed")
    return grn.GlobalResponseNorm(8, **options)


FOUND = {
    "authors": (lambda: GRN(8), (3, 6, 5, 8), RESPONSE),
    "channels first": (lambda: First(8), (3, 8, 6, 5), RESPONSE),
    "volumes": (lambda: Volume(8), (2, 3, 4, 5, 8), RESPONSE),
    "timm": (timm_norm, (3, 6, 5, 8), RESPONSE),
    "timm, channels first": (lambda: timm_norm(channels_last=False), (3, 8, 6, 5), RESPONSE),
    "transformation": (lambda: GCT(8), (3, 8, 6, 5), TRANSFORMATION),
    "transformation, authors": (lambda: Exits(8), (3, 8, 6, 5), TRANSFORMATION),
    "style": (lambda: SRMLayer(8), (3, 8, 6, 5), STYLE),
    "style, authors": (lambda: Styles(8), (3, 8, 6, 5), STYLE),
    "style, authors, eps": (lambda: WithEps(8), (3, 8, 6, 5), STYLE),
    "style, without correction": (lambda: Biased(8), (3, 8, 6, 5), STYLE),
    "reference, style": (lambda: reference.SRM(8), (3, 8, 6, 5), STYLE),
    "reference": (lambda: reference.GlobalResponseNorm(8), (3, 8, 6, 5), RESPONSE),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name):
    make, shape, kind = FOUND[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original))
    (row,) = explain(fused)
    assert (row.block, row.fused) == (kind, True)
    for training in (True, False):
        assert_same_block(fused, original, random(*shape, dtype=torch.float64), training=training)
    assert [*fused.state_dict()] == [*original.state_dict()]
    wrong = random(2, 7, 5, 7, dtype=torch.float64)  # channels that it does not take
    with pytest.raises((RuntimeError, ValueError)):
        fused(wrong)


def test_as_in_autocast():
    """The dtype that the block's own sum has."""
    original = randomised(GRN(8)).float()
    fused = fuse(copy.deepcopy(original))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            x = random(2, 6, 5, 8, dtype=dtype)
            mine, theirs = fused(x), original(x)
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_an_option_that_is_changed_counts():
    fused = fuse(GCT(8))
    x = random(2, 8, 5, 5)
    for p in fused.parameters():
        nn.init.normal_(p)
    original = GCT(8)
    original.load_state_dict(fused.state_dict())
    original.epsilon = fused.epsilon = 10.0
    torch.testing.assert_close(fused(x), original(x))
    assert not explain(fused)[0].fused


def test_small_maps_run_as_written_on_the_processor(monkeypatch):
    """Where the block is faster so: without gradients up to larger maps than with them."""
    monkeypatch.setattr(_Small, "most", 1 << 14)
    fused = fuse(randomised(GCT(64)).float())
    assert explain(fused)[0].reason.endswith("; as it is written on small maps")
    for space, inference, training in ((16, 0, 0), (72, 0, 2), (130, 2, 2)):
        x = random(1, 64, space, space)
        for enabled, count in ((False, inference), (True, training)):
            with torch.set_grad_enabled(enabled), FusedOperators() as operators:
                fused(x)
            assert operators.count == count
    norm = fuse(randomised(GRN(64)).float())
    with torch.no_grad(), FusedOperators() as operators:
        norm(random(1, 72, 72, 64))
    assert operators.count == 2


def test_networks_of_timm():
    """Those in the MLPs of ConvNeXt V2."""
    define_torchvision_operators()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    network = randomised(timm.create_model("convnextv2_atto", num_classes=3, **options))
    fused = fuse(copy.deepcopy(network))
    rows = [row for row in explain(fused) if row.block == RESPONSE]
    assert len(rows) == 4 and all(row.fused for row in rows)
    assert_same_block(fused, network, random(2, 3, 64, 64, dtype=torch.float64), training=True)


class Formatted(nn.Module):
    """Told by an option where a map has its channels, as OpenMMLab's."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def forward(self, x, layout="first"):
        if layout == "last":
            norm = x.norm(p=2, dim=(1, 2), keepdim=True)
            return self.gamma * (x * (norm / (norm.mean(-1, True) + 1e-6))) + self.beta + x
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        gamma, beta = self.gamma.view(1, -1, 1, 1), self.beta.view(1, -1, 1, 1)
        return gamma * (x * (norm / (norm.mean(1, True) + 1e-6))) + beta + x


class Turned(Formatted):
    """Told by a truth value, its default the other."""

    def forward(self, x, channels_last=True):
        return super().forward(x, "last" if channels_last else "first")


@pytest.mark.parametrize(("cls", "option", "values"), [(Formatted, "layout", ("first", "last")), (Turned, "", (0, 1))])
def test_an_option_that_says_where_the_channels_are(cls, option, values):
    """Fused for each value that the forward has written down, by position and by name; others run as written."""
    original = randomised(cls(8))
    fused = fuse(copy.deepcopy(original), strict=True)
    (row,) = explain(fused)
    assert (row.block, row.fused) == (RESPONSE, True) and "as it is written where" not in row.reason
    option = option or "channels_last"
    for value in (bool(v) if cls is Turned else v for v in values):
        for call in (lambda m, x, v=value: m(x, v), lambda m, x, v=value: m(**{"x": x, option: v})):
            x = random(3, 8, 6, 8, dtype=torch.float64)
            leaves = [[x.clone().requires_grad_(), *block.parameters()] for block in (original, fused)]
            with FusedOperators() as ran:
                mine = call(fused, leaves[1][0])
            theirs = call(original, leaves[0][0])
            assert ran.count and mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs)
            grad = random(*x.shape, seed=5, dtype=torch.float64)
            torch.testing.assert_close(
                torch.autograd.grad(mine, leaves[1], grad), torch.autograd.grad(theirs, leaves[0], grad)
            )
    assert_same_block(fused, original, random(3, 8, 6, 8, dtype=torch.float64), training=True)
    assert torch.equal(fused(x, "any other"), original(x, "any other"))


class Both(Formatted):
    """The option does something else with it."""

    def forward(self, x, layout="first"):
        return super().forward(x) * 2 if layout == "twice" else super().forward(x)


def test_an_option_that_is_something_else_is_told():
    """Fused by default; otherwise it runs as it is written, and `explain` says so."""
    original = randomised(Both(8))
    fused = fuse(copy.deepcopy(original), strict=True)
    (row,) = explain(fused)
    assert (row.block, row.fused) == (RESPONSE, True)
    assert "; as it is written where layout is not the default" in row.reason
    x = random(3, 8, 6, 8, dtype=torch.float64)
    assert_same_block(fused, original, x, training=True)
    torch.testing.assert_close(fused(x, layout="first"), original(x))
    assert torch.equal(fused(x, layout="twice"), original(x, layout="twice"))


class Clamped(GRN):
    """The same but for large values."""

    def forward(self, x):
        return super().forward(x.clamp(-1e4, 1e4))


class Branches(GRN):
    def forward(self, x):
        return super().forward(x) if x.shape[1] > 60 else super().forward(x) * 1


class OtherNorm(GRN):
    def forward(self, x):
        norm = x.norm(p=1, dim=(1, 2), keepdim=True)
        return self.gamma * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class Detached(GRN):
    def forward(self, x):
        norm = x.detach().norm(p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + self.beta + x


class LayerNorm(nn.Module):
    """Of the same parameters, which is no gate."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(channels)) for _ in range(2))

    def forward(self, x):
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6)


def test_a_mode_that_ends_the_program_still_does(capsys):
    """Chosen before fuse and behind it; fuse itself does not run on to there."""
    chosen, changed = fuse(Exits(8, mode="l0")), fuse(Exits(8))
    assert "prints" in explain(chosen)[0].reason and capsys.readouterr().out == ""
    changed.mode = "l0"
    for block in (chosen, changed):
        with pytest.raises(SystemExit):
            block(random(2, 8, 5, 5))
        assert capsys.readouterr().out == "Unknown mode!\n"


LEFT = [Clamped, Branches, OtherNorm, Detached, LayerNorm]


@pytest.mark.parametrize("make", LEFT, ids=lambda make: make.__name__)
def test_is_left_alone(make):
    block = make(8)
    kind = type(block)
    assert not any(row.fused for row in explain(fuse(block))) and type(block) is kind
