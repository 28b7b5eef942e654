"""Global response normalisation and gated channel transformation against their formulas and timm's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.hosts import define_torchvision_operators
from tests.checks import LAYOUTS, assert_as_good_as_reference, assert_same_block, in_layout, random, randomised


class Response(nn.Module):
    """ConvNeXt V2's, of maps with their channels last."""

    def __init__(self, channels):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, channels)) for _ in range(2))

    def forward(self, x):
        norm = x.square().sum((1, 2), keepdim=True).sqrt()
        return x + self.beta + self.gamma * x * norm / (norm.sum(-1, keepdim=True) / x.shape[-1] + 1e-6)


class First(Response):
    """The same of maps with their channels first, of any rank."""

    def forward(self, x):
        return (
            super().forward(x.flatten(2).transpose(1, 2)[:, None]).squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])
        )


class Transformation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha, self.gamma, self.beta = (nn.Parameter(torch.ones(1, channels, 1, 1)) for _ in range(3))

    def forward(self, x):
        alpha, gamma, beta = (p.view(1, -1, *(1 for _ in x.shape[2:])) for p in self.parameters())
        e = alpha * (x.square().flatten(2).sum(2) + 1e-5).sqrt().view(*x.shape[:2], *(1 for _ in x.shape[2:]))
        rms = ((e * e).mean(1, keepdim=True) + 1e-5).sqrt()
        z = (gamma * e / rms + beta).exp()
        return x * 2 * z * z / (z * z + 1)  # 1 + tanh


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "response": (lambda m: m.GlobalResponseNorm(8), First, (3, 8, 6, 9)),
    "response, volumes": (lambda m: m.GlobalResponseNorm(8), First, (2, 8, 3, 4, 5)),
    "response, sequences": (lambda m: m.GlobalResponseNorm(8), First, (2, 8, 5)),
    "response, last": (lambda m: m.GlobalResponseNorm(8, channels_last=True), Response, (3, 6, 9, 8)),
    "transformation": (lambda m: m.GatedChannelTransformation(8), Transformation, (3, 8, 6, 9)),
    "transformation, volumes": (lambda m: m.GatedChannelTransformation(8), Transformation, (2, 8, 3, 4, 5)),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module):
    ours, original, shape = PAIRS[name]
    block, theirs = ours(MODULES[module]).double(), randomised(original(8))
    block.load_state_dict(theirs.state_dict())
    assert_same_block(block, theirs, random(*shape, dtype=torch.float64), training=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["GlobalResponseNorm", "GatedChannelTransformation"])
def test_as_good_as_the_reference(name, dtype, layout):
    block = randomised(getattr(fused_nn, name)(16)).float()
    original = getattr(reference, name)(16).double()
    original.load_state_dict(block.state_dict())
    assert_as_good_as_reference(original, block, in_layout(random(4, 16, 13, 17, dtype=dtype), layout))


def test_starts_as_the_identity_and_keeps_the_layout():
    x = random(2, 5, 7, 8)
    for block in (fused_nn.GlobalResponseNorm(8, channels_last=True), fused_nn.GatedChannelTransformation(5)):
        assert block(x).equal(x) and block(x).is_contiguous()


def test_channels_of_zeros_have_no_gradient_of_nan():
    """As torch's norm: ConvNeXt V2's maps are masked."""
    x = random(2, 4, 5, 5)
    x[:, 1] = 0
    leaf, block = x.requires_grad_(), fused_nn.GlobalResponseNorm(4)
    nn.init.ones_(block.weight)
    (grad,) = torch.autograd.grad(block(leaf).square().sum() + leaf.sum(), leaf)
    assert grad.isfinite().all() and grad[:, 1].equal(torch.ones(2, 5, 5))


def test_keys():
    """timm's; those of the authors are in the first test."""
    define_torchvision_operators()
    grn = pytest.importorskip("timm.layers.grn", reason="timm is not installed")
    theirs = randomised(grn.GlobalResponseNorm(8))
    block = fused_nn.GlobalResponseNorm(8, channels_last=True).double()
    block.load_state_dict(theirs.state_dict())
    assert [*block.state_dict()] == [*theirs.state_dict()] == ["weight", "bias"]
    assert_same_block(block, theirs, random(2, 5, 6, 8, dtype=torch.float64), training=False)
    assert [*fused_nn.GatedChannelTransformation(8).state_dict()] == ["alpha", "gamma", "beta"]
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        block.load_state_dict({"gamma": torch.ones(1, 1, 1, 7), "beta": torch.ones(1, 1, 1, 8)})


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.GlobalResponseNorm(0),
    "eps: expected a positive number; got 0": lambda: fused_nn.GatedChannelTransformation(8, eps=0),
    "x: expected 8 channels; got shape (2, 5, 6, 8)": lambda: fused_nn.GlobalResponseNorm(8)(random(2, 5, 6, 8)),
    "x: expected 8 channels, last; got shape (2, 8, 6, 5)": lambda: fused_nn.GlobalResponseNorm(8, channels_last=True)(
        random(2, 8, 6, 5)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message
