"""The modules: parameters, keys, defaults, and equality with their references."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from fused_attn import nn, reference
from tests.checks import (
    LAYOUTS,
    assert_equivalent,
    assert_same_block,
    in_layout,
    random,
    randomised,
    with_state_of,
)

MODULES = {
    "se": lambda m: m.SqueezeExcite(32),
    "se, max, no bias": lambda m: m.SqueezeExcite(32, reduction=4, pool="max", bias=False),
    "se, as timm": lambda m: m.SqueezeExcite(32, divisor=8, pool="avgmax", ties="even"),
    "se, as MobileNetV3": lambda m: m.SqueezeExcite(32, hidden=12, gate="hard_sigmoid"),
    "se, as EfficientNet": lambda m: m.SqueezeExcite(32, hidden=3, activation="silu"),
    "se, gelu": lambda m: m.SqueezeExcite(32, activation="gelu", gate="tanh"),
    "se, hard_swish": lambda m: m.SqueezeExcite(32, activation="hard_swish"),
    "se, linear": lambda m: m.SqueezeExcite(32, activation="identity"),
    "ese": lambda m: m.EffectiveSE(32),
    "ese, max": lambda m: m.EffectiveSE(32, pool="max", gate="sigmoid", bias=False),
    "eca": lambda m: m.ECA(32),
    "eca, explicit": lambda m: m.ECA(32, kernel_size=7, pool="avgmax"),
    "eca, circular": lambda m: m.ECA(32, padding="circular", gate="hard_sigmoid"),
}


def pair(name: str, dtype=torch.float32, **change):
    fused, plain = MODULES[name](nn).to(dtype), MODULES[name](reference).to(dtype)
    plain.load_state_dict(fused.state_dict())
    for module in (fused, plain):
        for key, value in change.items():
            setattr(module, key, value)
    return fused, plain


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("return_gate", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_equals_its_reference(name, return_gate, dtype, layout):
    fused, plain = pair(name, dtype, return_gate=return_gate)
    shape = (2, 32, 1, 1) if return_gate else (2, 32, 7, 9)
    inputs = {"x": in_layout(random(2, 32, 7, 9, dtype=dtype), layout)}
    inputs |= {k: v.detach() for k, v in fused.state_dict().items()}

    def call(module):
        def function(x, **parameters):
            return torch.func.functional_call(module, parameters, (x,))

        return function

    assert_equivalent(call(fused), call(plain), inputs, [random(*shape, seed=1, dtype=dtype)])


@pytest.mark.parametrize("name", MODULES)
def test_residual_and_activation(name):
    fused, plain = pair(name, post_activation="relu")
    x, residual = random(2, 32, 7, 9), random(2, 32, 7, 9, seed=1)
    torch.testing.assert_close(fused(x, residual), plain(x, residual))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_spatial_ranks(rank):
    fused, plain = pair("se")
    x = random(2, 32, *(5, 4, 3)[:rank])
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name):
    fused, _ = pair(name)
    x = random(2, 32, 7, 9)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert torch.equal(other(x), fused(x))
        assert list(other.state_dict()) == list(fused.state_dict())


def test_parameter_counts_of_the_papers():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(nn.SqueezeExcite(64, reduction=9, bias=False)) == 896
    assert count(nn.SqueezeExcite(64)) == 64 * 4 * 2 + 4 + 64
    assert count(nn.EffectiveSE(64)) == 64 * 64 + 64
    assert [count(nn.ECA(c)) for c in (256, 512, 1024, 2048)] == [5, 5, 5, 7]


def test_widths_follow_timm_where_asked():
    widths = {(64, 16): 8, (256, 16): 16, (72, 4): 16, (960, 4): 240, (100, 16): 8, (80, 4): 24}  # 2.5 * 8: up
    for (channels, reduction), width in widths.items():
        assert nn.SqueezeExcite(channels, reduction=reduction, divisor=8).fc1.out_features == width


@pytest.mark.parametrize("divisor", [1, 4, 8])
def test_widths_are_those_that_timm_makes(divisor):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    for channels in range(8, 520, 4):
        for reduction in (2, 4, 16):
            expected = layers.make_divisible(channels / reduction, divisor, round_limit=0.0)
            assert reference.squeeze_excite.hidden_channels(channels, reduction, divisor) == expected


class PlainSE(torch.nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.pool, self.fc1, self.fc2 = pool, torch.nn.Linear(32, 2), torch.nn.Linear(2, 32)

    def forward(self, x):
        return x * self.fc2(self.fc1(self.pool(x).flatten(1)).relu()).sigmoid()[:, :, None, None]


def timm_layer(name):
    return getattr(pytest.importorskip("timm.layers", reason="timm is not installed"), name)(32)


DEFAULTS = {
    "se": (lambda m: m.SqueezeExcite(32), lambda: PlainSE(torch.nn.AdaptiveAvgPool2d(1))),
    "se, max": (lambda m: m.SqueezeExcite(32, pool="max"), lambda: PlainSE(torch.nn.AdaptiveMaxPool2d(1))),
    "ese": (lambda m: m.EffectiveSE(32), lambda: timm_layer("EffectiveSEModule")),
    "eca": (lambda m: m.ECA(32), lambda: timm_layer("EcaModule")),
}


@pytest.mark.parametrize("module", [nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_defaults_are_the_originals(name, module):
    ours, original = DEFAULTS[name]
    original = randomised(original())
    block = with_state_of(ours(module).double(), original)
    x = random(3, 32, 6, 5, dtype=torch.float64).round()  # equal maxima
    assert_same_block(block, original, x, training=True)


@pytest.mark.parametrize("channels", [*range(1, 300), 512, 728, 1024, 2048, 4096])
def test_eca_kernel_size_is_always_odd(channels):
    size = reference.eca_kernel_size(channels)
    assert size % 2 == 1 and nn.ECA(channels)(random(1, channels, 2, 2)).shape == (1, channels, 2, 2)


def test_keys():
    assert list(nn.SqueezeExcite(32).state_dict()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert list(nn.EffectiveSE(32).state_dict()) == ["fc.weight", "fc.bias"]
    assert list(nn.ECA(32).state_dict()) == ["conv.weight"]


def test_trains_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for name in MODULES:
            fused, _ = pair(name)
            fused(random(2, 32, 7, 9)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
