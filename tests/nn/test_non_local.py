"""Non-local blocks against the formulas of their four sources, and timm's class."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.nn import non_local
from fused_attn.reference.non_local import PRESETS
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_eager,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    checkpoint,
    error,
    in_layout,
    random,
    randomised,
    with_state_of,
)


class Original(nn.Module):
    """As published, with the matrix of all pairs and, for the concatenation, all pairs of features."""

    def __init__(self, channels, inner, *, mode="embedded", scale=1.0, pool=None, batch_norm=True, bias=True, rank=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.mode, self.scale, self.pool = mode, scale, pool
        if mode != "gaussian":
            self.theta, self.phi = conv(channels, inner, 1), conv(channels, inner, 1)
        self.g = conv(channels, inner, 1)
        self.out = conv(inner, channels, 1, bias=bias)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
        self.norm = norm(channels) if batch_norm else nn.Identity()
        if mode == "concatenation":
            self.project = nn.Conv2d(2 * inner, 1, 1, bias=False)
        self.max_pool = (nn.MaxPool1d(2), nn.MaxPool2d(2), nn.MaxPool3d((1, 2, 2)))[rank - 1]

    def forward(self, x):
        before = self.max_pool if self.pool == "before" else nn.Identity()
        after = self.max_pool if self.pool == "after" else nn.Identity()
        g = after(self.g(before(x))).flatten(2)
        if self.mode == "gaussian":
            theta, phi = x.flatten(2), self.max_pool(x).flatten(2) if self.pool else x.flatten(2)
        else:
            theta, phi = self.theta(x).flatten(2), after(self.phi(before(x))).flatten(2)
        n, m = theta.shape[2], phi.shape[2]
        if self.mode == "concatenation":
            pairs = [theta[:, :, :, None].repeat(1, 1, 1, m), phi[:, :, None, :].repeat(1, 1, n, 1)]
            f = self.project(torch.cat(pairs, 1)).relu()[:, 0] / m
        else:
            f = torch.einsum("bcn,bcm->bnm", theta, phi)
            scale = self.scale if self.mode == "embedded" else 1.0
            f = f / m if self.mode == "dot" else (f * scale).softmax(2)
        y = torch.einsum("bnm,bcm->bcn", f, g).reshape(x.shape[0], -1, *x.shape[2:])
        return self.norm(self.out(y)) + x


MODULES = {"fused": fused_nn, "reference": reference}
MODES = ("embedded", "gaussian", "dot", "concatenation")
SIZES = {1: (13,), 2: (7, 6), 3: (3, 5, 4)}
#: What differs in the wild, the name of a preset first -> ours, the original.
OPTIONS = {
    "defaults": ({}, {"inner": 6, "scale": 6**-0.5, "pool": "before"}),
    "caffe2": ({}, {"inner": 6, "scale": 6**-0.5, "pool": "before"}),
    "alexhex7": ({}, {"inner": 6, "pool": "after"}),
    "mmcv": ({}, {"inner": 6, "scale": 6**-0.5, "batch_norm": False}),
    "mmcv, norm": (
        {"pool": "after", "batch_norm": True, "out_bias": False},
        {"inner": 6, "scale": 6**-0.5, "pool": "after", "bias": False},
    ),
    "input": ({"scale": "input", "pool": None, "hidden": 2}, {"inner": 2, "scale": 12**-0.5}),
}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_original(name, mode, rank, module):
    mine, theirs = OPTIONS[name]
    original = randomised(Original(12, mode=mode, rank=rank, **theirs))
    build, preset = MODULES[module].NonLocal, name.partition(",")[0]
    options = mine | {"mode": mode, "rank": rank}
    block = build.preset(preset, 12, **options) if preset in PRESETS else build(12, **options)
    block = with_state_of(block.double(), original)
    x = random(2, 12, *SIZES[rank], dtype=torch.float64)
    assert_same_block(block, original, x, training=name != "alexhex7")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("module", MODULES)
def test_equals_timm(module, use_scale, training):
    layers = pytest.importorskip("timm.layers.non_local_attn", reason="timm is not installed")
    original = randomised(layers.NonLocalAttn(72, use_scale=use_scale))
    options = {} if use_scale else {"scale": None}
    block = MODULES[module].NonLocal.preset("timm", 72, **options).double()
    block.load_state_dict(original.state_dict())
    assert_same_block(block, original, random(2, 72, 5, 7, dtype=torch.float64), training=training)


@pytest.mark.parametrize("channels", [8, 20, 64, 72, 100, 1000])
def test_inner_width_of_timm(channels):
    layers = pytest.importorskip("timm.layers.non_local_attn", reason="timm is not installed")
    original = layers.NonLocalAttn(channels)
    assert fused_nn.NonLocal.preset("timm", channels).g.out_channels == original.g.out_channels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_as_good_as_the_reference(mode, dtype, layout):
    original = randomised(reference.NonLocal(16, mode=mode))
    block = fused_nn.NonLocal(16, mode=mode).double()
    block.load_state_dict(original.state_dict())
    x = in_layout(random(3, 16, 13, 11, dtype=dtype, scale=0.5), layout)
    if mode == "concatenation" and dtype != torch.float32:
        # In half precision some pairs are on either side of the ReLU by rounding alone: their gradients differ.
        original.eval()
        found, eager = (copy.deepcopy(b).to(dtype).eval()(x) for b in (block, original))
        assert_as_good_as_eager(found, eager, original(x.double()), "y")
    else:
        # With statistics of the batch in half precision their own rounding is all that is seen.
        assert_as_good_as_reference(original, block, x, training=dtype == torch.float32)
    y = block.to(dtype)(x)
    assert y.dtype == dtype and y.stride() == x.stride()


@pytest.mark.parametrize("mode", ["dot", "concatenation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(300, 300), (40, 7), (5, 300), (1, 1)])
def test_attentions_as_good_as_with_the_matrix(mode, n, m, dtype):
    """With queries and keys that are far from zero, on either side of one another."""
    width = 1 if mode == "concatenation" else 6
    inputs = {
        "query": random(2, width, n, dtype=dtype) + 9,
        "key": random(2, width, m, dtype=dtype, seed=1) - 9,
        "value": random(2, 5, m, dtype=dtype, seed=2) + 1,
    }
    ours, theirs = (getattr(where, f"{mode}_attention") for where in (non_local, reference.non_local))
    assert_equivalent(ours, theirs, inputs, [random(2, 5, n, seed=3, dtype=dtype)])


def test_concatenation_of_equal_and_of_opposite_numbers():
    """A pair that adds to zero counts for nothing, its gradient too; equal keys have equal ones."""
    query = torch.tensor([[[1.0, -1, 0, 2, -5]]], dtype=torch.float64)
    inputs = {
        "query": query,
        "key": torch.tensor([[[0.0, -1, 1, -1, 1, -2]]], dtype=torch.float64),
        "value": random(1, 3, 6, dtype=torch.float64),
    }
    grad = [random(1, 3, 5, seed=1, dtype=torch.float64)]
    assert_equivalent(non_local.concatenation_attention, reference.non_local.concatenation_attention, inputs, grad)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_in_a_concatenation_is_where_the_matrix_has_it(where):
    inputs = {"query": random(2, 1, 9), "key": random(2, 1, 6, seed=1), "value": random(2, 3, 6, seed=2)}
    inputs["query"][:, :, 0] = -50  # sees nothing
    inputs[where][1, :, 4] = torch.nan
    if where == "value":
        inputs["key"][1, :, 4] = torch.nan  # they come from one position
    expected = reference.non_local.concatenation_attention(**inputs)
    assert expected.isnan().any() and not expected.isnan().all()
    error(non_local.concatenation_attention(**inputs), expected)


@pytest.mark.parametrize("mode", MODES)
def test_nan_travels(mode):
    block = randomised(fused_nn.NonLocal(8, mode=mode)).eval()
    original = reference.NonLocal(8, mode=mode).double().eval()
    original.load_state_dict(block.state_dict())
    x = random(2, 8, 6, 7, dtype=torch.float64)
    x[0, 3, 2, 2] = torch.nan
    error(block(x), original(x))


@pytest.mark.parametrize("mode", MODES)
def test_odd_strides_and_gradients(mode):
    """A map that is a slice, and a gradient that is expanded."""
    block = randomised(fused_nn.NonLocal(8, mode=mode))
    original = reference.NonLocal(8, mode=mode).double()
    original.load_state_dict(block.state_dict())
    found = []
    for b in (block, original):
        whole = random(3, 16, 7, 9, dtype=torch.float64).requires_grad_()
        y = b(whole[:, ::2].transpose(2, 3))
        y.backward(random(3, 8, 1, 1, seed=1, dtype=torch.float64).expand(y.shape))
        found.append([y, whole.grad, *(p.grad for p in b.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_batches_of_none_and_of_one(mode):
    block = randomised(fused_nn.NonLocal(8, mode=mode)).eval()
    x = random(3, 8, 4, 5, dtype=torch.float64)
    assert block(x[:0]).shape == (0, 8, 4, 5)
    torch.testing.assert_close(block(x[:1]), block(x)[:1])
    block.train()(x[:1])


class Largest:
    """Counts the numbers of the largest tensor kept for backward."""

    def __init__(self):
        self.numel = 0

    def __enter__(self):
        def keep(tensor):
            self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("mode", ["dot", "concatenation"])
def test_no_matrix_of_pairs_is_kept(mode):
    """Growth with the positions is linear: 4 times for 4 times as many."""
    found = []
    for size in (16, 32):
        block = fused_nn.NonLocal(8, mode=mode, pool=None)
        with Largest() as largest:
            block(random(1, 8, size, size).requires_grad_())
        found.append(largest.numel)
    assert found[1] < 32**4 / 16 and found[1] <= 4.1 * found[0]


def test_the_cheaper_dot_product():
    """The matrix where it is smaller than its maps; both are the same function."""
    query, key, value = (random(2, 64, 3, 4, seed=i, dtype=torch.float64) for i in range(3))
    with Largest() as small:
        y = non_local.dot_attention(query.requires_grad_(), key, value)
    assert small.numel <= 2 * 64 * 12
    torch.testing.assert_close(y, reference.non_local.dot_attention(query, key, value), rtol=1e-12, atol=1e-12)
    big = random(2, 64, 50, 4, seed=3, dtype=torch.float64)
    torch.testing.assert_close(
        non_local.dot_attention(query, big, big), reference.non_local.dot_attention(query, big, big), rtol=1e-12, atol=0
    )


def test_a_dot_product_beyond_float16_does_not_overflow():
    query, key, value = torch.full((1, 2, 64), 0.001), torch.full((1, 2, 4096), 30.0), torch.full((1, 2, 4096), 30.0)
    y = non_local.dot_attention(query.half(), key.half(), value.half())
    torch.testing.assert_close(y.float(), torch.full((1, 2, 64), 1.8), rtol=2e-3, atol=0)


def test_a_convolution_that_is_not_plain_runs():
    """In the concatenation, where a plain one is only read."""
    block = randomised(fused_nn.NonLocal(8, mode="concatenation", pool=None))
    x = random(2, 8, 4, 5, dtype=torch.float64)
    expected = block(x)
    calls = []

    class Counting(nn.Conv2d):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    counting = Counting(8, 4, 1).double()
    counting.load_state_dict(block.theta.state_dict())
    block.theta = counting
    torch.testing.assert_close(block(x), expected)
    assert calls


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    """What eager gives: the block's layers in half precision, the map as it came."""
    block, original = fused_nn.NonLocal(8, mode=mode), reference.NonLocal(8, mode=mode)
    original.load_state_dict(randomised(block).float().state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, 8, 6, 7, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = block(x), original(x)
        assert y.dtype == expected.dtype == dtype
        torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_in_one_graph(mode, training):
    torch._dynamo.reset()
    block = randomised(fused_nn.NonLocal(8, mode=mode)).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, random(2, 8, 5, 7), training=training)


@pytest.mark.parametrize("options", [{}, {"batch_norm": False}, {"mode": "concatenation"}], ids=str)
def test_it_starts_as_the_identity(options):
    x = random(2, 8, 6, 5)
    assert torch.equal(fused_nn.NonLocal(8, **options)(x), x)
    assert not torch.equal(fused_nn.NonLocal(8, zero_init=False, **options)(x), x)


def renamed(names, *, mode="embedded", rank=2, channels=64, inner=32, norm=True, bias=True):
    """A checkpoint under a source's names of theta, phi, g, out, norm and concat_project."""
    state = randomised(Original(channels, inner, mode=mode, rank=rank, batch_norm=norm, bias=bias)).float().state_dict()
    return {
        f"{names[layer]}.{key}": tensor for name, tensor in state.items() for layer, _, key in [name.partition(".")]
    }


#: Source -> its checkpoint, the block that it is of.
CHECKPOINTS = {
    "alexhex7": lambda: (checkpoint("AlexHex7.NONLocalBlock2D"), fused_nn.NonLocal.preset("alexhex7", 64)),
    "alexhex7, plain": lambda: (
        checkpoint("AlexHex7.NONLocalBlock2D sub=0 bn=0"),
        fused_nn.NonLocal.preset("alexhex7", 64, pool=None, batch_norm=False),
    ),
    "alexhex7, concatenation": lambda: (
        renamed(
            {"theta": "theta", "phi": "phi.0", "g": "g.0", "out": "W.0", "norm": "W.1", "project": "concat_project.0"},
            mode="concatenation",
        ),
        fused_nn.NonLocal.preset("alexhex7", 64, mode="concatenation"),
    ),
    "timm": lambda: (checkpoint("timm.NonLocalAttn"), fused_nn.NonLocal.preset("timm", 64)),
    "mmcv": lambda: (
        renamed({"theta": "theta.conv", "phi": "phi.conv", "g": "g.conv", "out": "conv_out.conv"}, norm=False),
        fused_nn.NonLocal.preset("mmcv", 64),
    ),
    "mmcv, 3-D": lambda: (
        renamed(
            {"theta": "theta.conv", "phi": "phi.0.conv", "g": "g.0.conv"}
            | {"out": "conv_out.conv", "norm": "conv_out.bn"},
            rank=3,
            bias=False,
        ),
        fused_nn.NonLocal.preset("mmcv", 64, rank=3, pool="after", batch_norm=True, out_bias=False),
    ),
    "mmcv, concatenation": lambda: (
        renamed(
            {name: f"{name}.conv" for name in ("theta", "phi", "g")}
            | {"out": "conv_out.conv", "project": "concat_project.conv"},
            mode="concatenation",
            norm=False,
        ),
        fused_nn.NonLocal.preset("mmcv", 64, mode="concatenation"),
    ),
    "SlowFast": lambda: (
        renamed({n: f"conv_{n}" for n in ("theta", "phi", "g", "out")} | {"norm": "norm"}, rank=3),
        fused_nn.NonLocal.preset("caffe2", 64, rank=3),
    ),
    "pytorch-resnet3d": lambda: (
        renamed({n: n for n in ("theta", "phi", "g", "out")} | {"norm": "bn"}, rank=3),
        fused_nn.NonLocal(64, rank=3),
    ),
}


@pytest.mark.parametrize("source", CHECKPOINTS)
def test_checkpoints_of_the_sources_load(source):
    state, block = CHECKPOINTS[source]()
    block.load_state_dict(dict(state))
    ours = sorted((tuple(t.shape), t.double().sum().item()) for t in block.state_dict().values())
    assert ours == sorted((tuple(t.shape), t.double().sum().item()) for t in state.values())
    again = copy.deepcopy(block)
    again.load_state_dict(block.state_dict())


def test_blobs_of_caffe2_load():
    original = randomised(fused_nn.NonLocal(8, rank=3)).float()
    blobs = {"weight": "w", "bias": "b"}
    norm = {"weight": "bn_s", "bias": "bn_b", "running_mean": "bn_rm", "running_var": "bn_riv"}
    state = {}
    for name, tensor in original.state_dict().items():
        layer, _, key = name.partition(".")
        if layer != "norm":
            state[f"{layer}_{blobs[key]}"] = tensor
        elif key in norm:
            state[norm[key]] = tensor
    block = nn.ModuleDict({"nonlocal": fused_nn.NonLocal(8, rank=3)})
    block.load_state_dict({f"nonlocal.{key}": tensor for key, tensor in state.items()})
    x = random(1, 8, 2, 4, 4)
    assert torch.equal(block["nonlocal"].eval()(x), original.eval()(x))


def test_keys():
    assert list(fused_nn.NonLocal(8, mode="concatenation").state_dict()) == [
        *(f"{layer}.{kind}" for layer in ("theta", "phi", "g", "out") for kind in ("weight", "bias")),
        *(f"norm.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "concat_project.weight",
    ]


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.NonLocal(0),
    "mode: expected one of embedded, gaussian, dot, concatenation; got 'softmax'": lambda: fused_nn.NonLocal(
        8, mode="softmax"
    ),
    "scale: expected one of inner, input, None; got 0.5": lambda: fused_nn.NonLocal(8, scale=0.5),
    "pool: expected one of before, after, None; got True": lambda: fused_nn.NonLocal(8, pool=True),
    "rank: expected 1, 2 or 3; got 4": lambda: fused_nn.NonLocal(8, rank=4),
    "hidden: expected a positive integer; got 0": lambda: fused_nn.NonLocal(8, hidden=0),
    "divisor: expected a positive integer; got 0": lambda: fused_nn.NonLocal(8, divisor=0),
    "reduction: 16 leaves no hidden channel of 8; give `hidden` instead": lambda: fused_nn.NonLocal(8, reduction=16),
    "name: expected one of caffe2, alexhex7, mmcv, timm; got 'keras'": lambda: fused_nn.NonLocal.preset("keras", 8),
    "x: expected 8 channels; got shape (1, 4, 3, 3)": lambda: fused_nn.NonLocal(8)(random(1, 4, 3, 3)),
    "x: expected (B, C, H, W); got shape (8, 3, 3)": lambda: fused_nn.NonLocal(8)(random(8, 3, 3)),
    "x: expected (B, C, D, H, W); got shape (1, 8, 3, 3)": lambda: fused_nn.NonLocal(8, rank=3)(random(1, 8, 3, 3)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("mode", MODES)
def test_trains_under_deterministic_algorithms(mode):
    assert torch.are_deterministic_algorithms_enabled()
    block = randomised(fused_nn.NonLocal(8, mode=mode))
    block(random(2, 8, 6, 5, dtype=torch.float64)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
