"""Bad input gets one line that names the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch

from fused_attn import functional, nn, reference

x = torch.zeros(2, 8, 4, 4)
w1, w2, w16 = torch.zeros(4, 8), torch.zeros(8, 4), torch.zeros(16, 4)
k3 = torch.zeros(1, 2, 3, 3)

BAD_CALLS = [
    ("x: expected a tensor", TypeError, lambda: functional.squeeze([1.0])),
    ("x: expected float64", TypeError, lambda: functional.squeeze(x.int())),
    ("x: expected float64", TypeError, lambda: functional.squeeze(x.cfloat())),
    ("x: expected (B, C, *spatial)", ValueError, lambda: functional.squeeze(x[:, :, 0, 0])),
    ("x: expected (B, C, *spatial)", ValueError, lambda: functional.squeeze(x[..., None, None])),
    ("pool: expected one of avg, max, avgmax; got 'mean'", ValueError, lambda: functional.squeeze(x, "mean")),
    ("ties: expected one of first, even; got 'last'", ValueError, lambda: functional.squeeze(x, "max", ties="last")),
    ("x: expected at least one spatial position", ValueError, lambda: functional.squeeze(x[..., :0], "max")),
    ("gate: expected shape (2, 8)", ValueError, lambda: functional.scale(x, torch.zeros(2, 7))),
    ("gate: expected shape (2, 8)", ValueError, lambda: functional.scale(x, torch.zeros(2, 8, 4, 4))),
    ("gate: expected shape (2, 8)", ValueError, lambda: functional.scale(x, torch.zeros(2, 1, 4, 3))),
    ("pool: expected one of avg, max, avgmax; got 'both'", ValueError, lambda: functional.squeeze(x, "both")),
    ("x: expected at least one channel for a maximum", ValueError, lambda: functional.channel_pool(x[:, :0])),
    ("order: expected ('max', 'mean')", ValueError, lambda: functional.channel_pool(x, order=("max", "max"))),
    ("order: expected ('max', 'mean')", ValueError, lambda: functional.channel_pool(x, order="max")),
    ("ties: expected one of first, even; got 'last'", ValueError, lambda: functional.channel_pool(x, ties="last")),
    ("x: expected (B, C, H, W); got shape (2, 8, 4)", ValueError, lambda: functional.axis_pool(x[..., 0])),
    ("channels: expected False without maxima; got True", ValueError, lambda: functional.axis_pool(x, channels=True)),
    ("x: expected no axis of size 0", ValueError, lambda: functional.axis_pool(x[..., :0], maxima=True)),
    ("x: expected no axis of size 0", ValueError, lambda: functional.axis_pool(x[:, :0], maxima=True, channels=True)),
    ("ties: expected one of first, even; got 'last'", ValueError, lambda: functional.axis_pool(x, ties="last")),
    ("query: expected (B, D, H, W)", ValueError, lambda: functional.criss_cross_attention(x[0], x[0], x[0])),
    ("query: expected float64", TypeError, lambda: functional.criss_cross_attention(x.int(), x, x)),
    ("key: expected a tensor; got NoneType", TypeError, lambda: functional.criss_cross_attention(x, None, x)),
    ("key: expected query's shape", ValueError, lambda: functional.criss_cross_attention(x, x[:, :7], x)),
    ("key: expected query's dtype, torch.float32", TypeError, lambda: functional.criss_cross_attention(x, x.half(), x)),
    (
        "value: expected shape (2, E, 4, 4); got (2, 8, 4, 3)",
        ValueError,
        lambda: functional.criss_cross_attention(x, x, x[..., :3]),
    ),
    ("value: expected shape (2, E, 4, 4)", ValueError, lambda: functional.criss_cross_attention(x, x, x[:1])),
    ("weight: expected a tensor", TypeError, lambda: functional.spatial_gate(x, None)),
    (
        "weight: expected shape (1, 2, k, k) with every k odd; got (1, 2, 3, 4)",
        ValueError,
        lambda: functional.spatial_gate(x, torch.zeros(1, 2, 3, 4)),
    ),
    ("weight: expected shape (1, 2, k, k)", ValueError, lambda: functional.spatial_gate(x, torch.zeros(1, 2, 3))),
    ("weight: expected shape (1, 2, k, k)", ValueError, lambda: functional.spatial_gate(x, torch.zeros(1, 1, 3, 3))),
    ("weight: expected shape (1, 2, k, k)", ValueError, lambda: functional.spatial_gate(x, torch.zeros(1, 2, 0, 3))),
    ("weight: expected x's dtype", TypeError, lambda: functional.spatial_gate(x, k3.double())),
    ("bias: expected shape (1,)", ValueError, lambda: functional.spatial_gate(x, k3, torch.zeros(2))),
    ("x: expected at least one channel", ValueError, lambda: functional.spatial_gate(x[:, :0], k3)),
    ("x: expected at least one spatial position", ValueError, lambda: functional.spatial_gate(x[..., :0], k3)),
    ("gate: expected one of identity", ValueError, lambda: functional.spatial_gate(x, k3, gate="swish")),
    ("residual: expected x's shape", ValueError, lambda: functional.spatial_gate(x, k3, residual=x[:1])),
    ("spatial_weight: expected a tensor; got NoneType", TypeError, lambda: functional.cbam(x, w1, None, w2)),
    ("spatial_weight: expected shape (1, 2, k, k)", ValueError, lambda: functional.cbam(x, spatial_weight=k3[:, :1])),
    (
        "spatial_bias: expected shape (1,)",
        ValueError,
        lambda: functional.cbam(x, spatial_weight=k3, spatial_bias=torch.zeros(8)),
    ),
    ("weight2: expected shape (8, 4)", ValueError, lambda: functional.cbam(x, w1, None, w2.t(), spatial_weight=k3)),
    (
        "channel_ties: expected one of first, even",
        ValueError,
        lambda: functional.cbam(x, spatial_weight=k3, channel_ties="last"),
    ),
    (
        "spatial_gate: expected one of identity",
        ValueError,
        lambda: functional.cbam(x, spatial_weight=k3, spatial_gate="swish"),
    ),
    (
        "x: expected at least one spatial",
        ValueError,
        lambda: functional.cbam(x[..., :0], spatial_weight=k3, pool="avg"),
    ),
    ("residual: expected x's shape", ValueError, lambda: functional.scale(x, x[..., 0, 0], residual=x[:1])),
    ("residual: expected x's dtype", TypeError, lambda: functional.scale(x, x[..., 0, 0], residual=x.double())),
    ("affine weight: expected shape (8,)", ValueError, lambda: functional.squeeze(x, affine=(w1[0, :7], w1[0]))),
    ("affine bias: expected x's dtype", TypeError, lambda: functional.squeeze(x, affine=(w1[0], w1[0].double()))),
    ("weight1: expected shape (4, 8)", ValueError, lambda: functional.channel_gate(x, w1[:, :7], None, w2)),
    ("weight2: expected shape (8, 4)", ValueError, lambda: functional.channel_gate(x, w1, None, w2[:7])),
    ("weight2: expected shape (8, 4)", ValueError, lambda: functional.channel_gate(x, w1, None, w2.t())),
    ("weight1: expected shape (hidden, 8)", ValueError, lambda: functional.channel_gate(x, w1[:0], None, w2[:, :0])),
    ("weight1: expected shape (8, 8)", ValueError, lambda: functional.channel_gate(x, w1)),
    ("bias1: expected shape (4,)", ValueError, lambda: functional.channel_gate(x, w1, torch.zeros(8), w2)),
    ("bias2: expected shape (8,)", ValueError, lambda: functional.channel_gate(x, w1, None, w2, torch.zeros(4))),
    ("bias1: expected None without weight1", ValueError, lambda: functional.channel_gate(x, None, torch.zeros(8))),
    ("bias2: expected None without weight2", ValueError, lambda: functional.channel_gate(x, w1, bias2=w1[0])),
    ("weight1: expected x's dtype", TypeError, lambda: functional.channel_gate(x, w1.double(), None, w2)),
    ("weight1: expected x's dtype", TypeError, lambda: functional.channel_gate(x.bfloat16(), w1, None, w2)),
    ("weight1: expected x's device", ValueError, lambda: functional.channel_gate(x, w1.to("meta"), None, w2)),
    (
        "weight1: expected shape (1, 1, k) with k odd; got (1, 1, 4)",
        ValueError,
        lambda: functional.channel_gate(x, torch.zeros(1, 1, 4), layer="conv"),
    ),
    (
        "weight2: expected None for layer='conv'",
        ValueError,
        lambda: functional.channel_gate(x, torch.zeros(1, 1, 3), weight2=w2, layer="conv"),
    ),
    ("gate: expected one of identity", ValueError, lambda: functional.channel_gate(x, w1, None, w2, gate="swish")),
    ("branches: expected a tensor or a sequence", TypeError, lambda: functional.select([], w1, None, w16)),
    ("branches: expected a tensor or a sequence", TypeError, lambda: functional.select((u for u in (x, x)), w1)),
    ("branches: expected a tensor; got float", TypeError, lambda: functional.select([x, 1.0], w1, None, w16)),
    ("branches: expected one shape", ValueError, lambda: functional.select([x, x[:1]], w1, None, w16)),
    ("branches: expected one dtype", TypeError, lambda: functional.select([x, x.double()], w1, None, w16)),
    ("branches: expected (B, C, *spatial)", ValueError, lambda: functional.select([x[..., 0, 0]] * 2, w1, None, w16)),
    ("branches: expected (B, M, C, *spatial)", ValueError, lambda: functional.select(x[..., 0], w1, None, w16)),
    ("branches: expected (B, M, C, *spatial)", ValueError, lambda: functional.select(x[:, :0], w1, None, w16)),
    ("branches: expected (B, 3 * C, *spatial)", ValueError, lambda: functional.select(x, w1, None, w16, paths=3)),
    ("paths: expected a positive integer", ValueError, lambda: functional.select(x, w1, None, w16, paths=0)),
    ("paths: expected None for a sequence", ValueError, lambda: functional.select([x, x], w1, None, w16, paths=2)),
    ("groups: expected a positive integer", ValueError, lambda: functional.select([x, x], w1, None, w16, groups=3)),
    ("weight1: expected a tensor", TypeError, lambda: functional.select([x, x], None, None, w16)),
    ("weight2: expected a tensor", TypeError, lambda: functional.select([x, x], w1)),
    ("weight1: expected shape (hidden, 8)", ValueError, lambda: functional.select([x, x], w1[:0], None, w16)),
    ("weight1: expected shape (4, 8)", ValueError, lambda: functional.select([x, x], w1[:, :7], None, w16)),
    (
        "weight1: expected shape (hidden, 2), hidden a multiple of 4; got (5, 2)",
        ValueError,
        lambda: functional.select([x, x], torch.zeros(5, 2), None, w16, groups=4),
    ),
    ("weight2: expected shape (16, 4)", ValueError, lambda: functional.select([x, x], w1, None, w2)),
    ("weight2: expected x's dtype", TypeError, lambda: functional.select([x, x], w1, None, w16.double())),
    ("bias1: expected shape (4,)", ValueError, lambda: functional.select([x, x], w1, w1[0], w16)),
    ("bias2: expected shape (16,)", ValueError, lambda: functional.select([x, x], w1, None, w16, w1[0])),
    (
        "gate: expected one of softmax, sigmoid",
        ValueError,
        lambda: functional.select([x, x], w1, None, w16, gate="relu"),
    ),
    (
        "affine weight: expected shape (2, 8)",
        ValueError,
        lambda: functional.select([x, x], w1, None, w16, affine=(w1[0], w1[0])),
    ),
    (
        "excitation: expected a result of shape (2, 2, 8); got (2, 16)",
        ValueError,
        lambda: functional.select_with([x, x], lambda s: s.repeat(1, 2)),
    ),
    (
        "excitation: expected a tensor as its result; got NoneType",
        TypeError,
        lambda: functional.select_with([x, x], lambda s: None),
    ),
    ("query: expected (B, C, *spatial)", ValueError, lambda: functional.position_attention(x[..., 0, 0], x, x)),
    ("key: expected a tensor; got None", TypeError, lambda: functional.position_attention(x, None, x)),
    ("value: expected one to three spatial", ValueError, lambda: functional.position_attention(x, x, x[..., 0, 0])),
    ("key: expected query's dtype", TypeError, lambda: functional.position_attention(x, x.double(), x)),
    ("value: expected query's dtype", TypeError, lambda: functional.position_attention(x, x, x.half())),
    ("key: expected shape (2, 8, *other_space)", ValueError, lambda: functional.position_attention(x, x[:1], x)),
    ("key: expected shape (2, 8, *other_space)", ValueError, lambda: functional.position_attention(x, x[:, :7], x)),
    ("value: expected shape (2, E, 4, 4)", ValueError, lambda: functional.position_attention(x, x, x[..., :3])),
    ("value: expected shape (2, E, 4, 4)", ValueError, lambda: functional.position_attention(x, x, x[:1])),
    (
        "scale: expected a finite number; got nan",
        ValueError,
        lambda: functional.position_attention(x, x, x, scale=float("nan")),
    ),
    ("reduction: 16 leaves no hidden channel of 8", ValueError, lambda: nn.SqueezeExcite(8)),
    ("reduction: expected a finite number", ValueError, lambda: nn.SqueezeExcite(8, reduction=float("nan"))),
    ("reduction: expected a positive number", ValueError, lambda: nn.SqueezeExcite(8, reduction=-1)),
    ("hidden: expected a positive integer", ValueError, lambda: nn.SqueezeExcite(8, hidden=0)),
    ("channels: expected a positive integer", ValueError, lambda: nn.EffectiveSE(0)),
    ("channels: expected a positive integer", ValueError, lambda: nn.ECA(8.0)),
    ("kernel_size: expected an odd number; got 4", ValueError, lambda: nn.ECA(8, kernel_size=4)),
    ("gamma: expected a finite number", ValueError, lambda: nn.ECA(8, gamma=float("nan"))),
    ("gamma: expected a number other than 0", ValueError, lambda: nn.ECA(8, gamma=0)),
    ("padding: expected one of zeros, circular", ValueError, lambda: nn.ECA(8, padding="same")),
    ("post_activation: the gate alone has none", ValueError, lambda: nn.ECA(8, post_activation="relu", return_gate=1)),
    ("residual: the gate alone has none", ValueError, lambda: nn.ECA(8, return_gate=True)(x, residual=x)),
]


@pytest.mark.parametrize("message, kind, call", BAD_CALLS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD_CALLS)])
def test_bad_input(message, kind, call):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value).startswith(message), caught.value
    assert "\n" not in str(caught.value)


def test_reference_has_the_same_signatures():
    import inspect

    names = ("squeeze", "scale", "channel_gate", "channel_pool", "spatial_gate", "cbam", "mixed_scale", "simam")
    names += ("axis_pool", "axis_pool_with_map", "select", "select_with", "norm_gate", "position_attention")
    names += ("context_pool", "context_gate", "context_pool_with_map", "energy_gate", "moments_gate")
    for name in names:
        assert inspect.signature(getattr(functional, name)) == inspect.signature(getattr(reference, name)), name
    for name in nn.__all__:
        assert inspect.signature(getattr(nn, name)) == inspect.signature(getattr(reference, name)), name


def test_names_mean_the_same_numbers_everywhere():
    """csrc/codes.h holds the numbers of fused_attn/codes.py."""
    import re
    from pathlib import Path

    from fused_attn import codes

    header = (Path(__file__).parents[1] / "csrc" / "codes.h").read_text()
    found = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)", header)}
    expected = {
        "".join(part.capitalize() for part in name.split("_")): value
        for table in (codes.ACTIVATIONS, codes.POOLS, codes.TIES, codes.LAYERS)
        for name, value in table.items()
    }
    expected["AvgMax"] = expected.pop("Avgmax")
    expected |= {name.capitalize() + "Of": value for name, value in codes.COMBINES.items()}
    expected |= {"SelectBy" + name.capitalize(): value for name, value in codes.SELECTIONS.items()}
    assert found == expected
    assert set(codes.FUNCTIONS) == set(codes.ACTIVATIONS)
