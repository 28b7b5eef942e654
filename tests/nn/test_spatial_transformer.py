"""The spatial transformer against torch's sampling, with its own gradients in place of torch's too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.nn import spatial_transformer
from fused_attn.nn.spatial_transformer import gathered, grid_sample
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    gradcheck,
    in_layout,
    random,
    randomised,
    with_state_of,
)

C = 6
SPACE = {2: (7, 5), 3: (4, 5, 3)}


def localization(rank, features):
    convolution = (nn.Conv2d, nn.Conv3d)[rank - 2]
    pool = (nn.AvgPool2d, nn.AvgPool3d)[rank - 2]
    return nn.Sequential(convolution(C, features, 3, padding=1), nn.Tanh(), pool(SPACE[rank]), nn.Flatten())


class Original(nn.Module):
    def __init__(self, rank, features, size, padding_mode, align_corners):
        super().__init__()
        self.localization = localization(rank, 4 if features else rank * (rank + 1))
        self.theta = nn.Linear(4, rank * (rank + 1)) if features else nn.Identity()
        self.rank, self.size = rank, size
        self.padding_mode, self.align_corners = padding_mode, align_corners

    def forward(self, x):
        theta = self.theta(self.localization(x)).view(-1, self.rank, self.rank + 1)
        size = (*x.shape[:2], *(self.size or x.shape[2:]))
        grid = F.affine_grid(theta, size, align_corners=self.align_corners)
        return F.grid_sample(x, grid, padding_mode=self.padding_mode, align_corners=self.align_corners)


@pytest.fixture(params=["torch's gradients", "own gradients"])
def own(request, monkeypatch):
    """The path of CUDA under deterministic algorithms, taken here too."""
    if request.param == "own gradients":
        monkeypatch.setattr(spatial_transformer, "torch_has_no_deterministic", lambda x: True)
    return request.param


MODULES = {"fused": fused_nn, "reference": reference}
OPTIONS = {
    "2-D": (2, 4, None, "zeros", False),
    "2-D, theta itself": (2, None, None, "border", True),
    "2-D, another size": (2, 4, (3, 8), "reflection", False),
    "3-D": (3, 4, None, "zeros", True),
    "3-D, another size": (3, None, (2, 6, 3), "reflection", True),
}


def build(name, module):
    rank, features, size, padding_mode, align_corners = OPTIONS[name]
    original = randomised(Original(*OPTIONS[name]))
    block = module.SpatialTransformer(
        C,
        localization=localization(rank, features or rank * (rank + 1)),
        features=features,
        rank=rank,
        size=size,
        padding_mode=padding_mode,
        align_corners=align_corners,
    )
    return with_state_of(block.double(), original), original, random(3, C, *SPACE[rank], dtype=torch.float64)


@pytest.mark.combine(3)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_original(name, module, training, own):
    block, original, x = build(name, MODULES[module])
    assert_same_block(block, original, x, training=training)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("module", MODULES)
def test_starts_at_the_identity(module, rank, align_corners):
    block = MODULES[module].SpatialTransformer(
        C, localization=localization(rank, 4), features=4, rank=rank, align_corners=align_corners
    )
    x = random(2, C, *SPACE[rank])
    torch.testing.assert_close(block(x), x, rtol=1e-5, atol=1e-5)


def grid_of(kind, rank, dtype=torch.float64):
    out = (5, 6, 4)[:rank]
    if kind == "anywhere":
        return random(2, *out, rank, seed=1, dtype=dtype)
    theta = torch.eye(rank, rank + 1, dtype=dtype).expand(2, rank, rank + 1)
    return F.affine_grid(theta * (3 if kind == "far outside" else 1), (2, C, *SPACE[rank]), align_corners=True)


@pytest.mark.combine(3)
@pytest.mark.parametrize("kind", ["anywhere", "on the border", "far outside"])
@pytest.mark.parametrize("padding_mode", spatial_transformer.PADDINGS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_sampling(rank, align_corners, padding_mode, kind, own):
    """Derivatives at the border are torch's too: there a clipped place has none."""
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    inputs = {"x": random(2, C, *SPACE[rank], dtype=torch.float64), "grid": grid_of(kind, rank)}

    def function(x, grid):
        return grid_sample(x, grid, **options)

    def original(x, grid):
        return F.grid_sample(x, grid, **options)

    y = original(**inputs)
    torch.testing.assert_close(gathered(inputs["x"], inputs["grid"], padding_mode, align_corners), y)
    strided = random(*y.shape[::-1], seed=2, dtype=torch.float64).permute(*range(y.dim() - 1, -1, -1))
    for grad in (strided, random(*y.shape[:2], *[1] * rank, seed=2, dtype=torch.float64).expand(y.shape)):
        assert_equivalent(function, original, inputs, [grad])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_sampling_in_other_dtypes(rank, dtype, layout, own):
    """Places in between, where rounding does not move one to another neighbour."""
    x = in_layout(random(2, C, *SPACE[rank], dtype=dtype), layout)
    grid = (grid_of("anywhere", rank) * 0.3).to(dtype)
    assert grid_sample(x, grid).stride() == grid_sample(x, grid.detach().requires_grad_()).stride()
    assert in_layout(grid_sample(x, grid), layout).stride() == grid_sample(x, grid).stride()

    def original(x, grid):
        return F.grid_sample(x, grid, align_corners=False)

    y = original(x, grid)
    assert_equivalent(grid_sample, original, {"x": x, "grid": grid}, [random(*y.shape, seed=2, dtype=dtype)])


@pytest.mark.parametrize("padding_mode", spatial_transformer.PADDINGS)
@pytest.mark.parametrize("rank", [2, 3])
def test_gradients_of_gradients(rank, padding_mode, own):
    inputs = {
        "x": random(2, 2, *(3, 4, 2)[:rank], dtype=torch.float64),
        "grid": random(2, *(2, 3, 1)[:rank], rank, seed=1, dtype=torch.float64) * 0.6,
    }

    def function(x, grid):
        return grid_sample(x, grid, padding_mode=padding_mode)

    gradcheck(function, inputs)
    gradcheck(function, inputs, twice=True)


def test_gradient_of_one_alone(own):
    x, grid = random(2, C, 7, 5), grid_of("anywhere", 2, torch.float32)
    for leaf in (x, grid):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(grid_sample(x, grid).sum(), leaf)
        (expected,) = torch.autograd.grad(F.grid_sample(x, grid, align_corners=False).sum(), leaf)
        torch.testing.assert_close(grad, expected)
        leaf.requires_grad_(False)


def test_places_that_are_no_numbers(own):
    """What they read is not said; the other samples are as ever, and nothing is read outside the map."""
    x, grid = random(2, C, 7, 5).requires_grad_(), grid_of("anywhere", 2, torch.float32)
    grid[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[:, None]
    grad = random(2, C, 5, 6, seed=2)
    found, expected = (
        torch.autograd.grad(sample(x, grid, align_corners=False), x, grad)[0] for sample in (grid_sample, F.grid_sample)
    )
    torch.testing.assert_close(found[1], expected[1])
    assert found.shape == x.shape


def test_own_gradients_are_the_same_every_time(monkeypatch):
    monkeypatch.setattr(spatial_transformer, "torch_has_no_deterministic", lambda x: True)
    x, grid = random(2, C, 7, 5).requires_grad_(), (grid_of("anywhere", 2, torch.float32) / 9).requires_grad_()
    found = [torch.autograd.grad(grid_sample(x, grid).square().sum(), [x, grid]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_empty_batch(own):
    x, grid = random(0, C, 7, 5).requires_grad_(), random(0, 3, 4, 2).requires_grad_()
    y = grid_sample(x, grid)
    assert y.shape == (0, C, 3, 4)
    assert [g.shape for g in torch.autograd.grad(y.sum(), [x, grid])] == [x.shape, grid.shape]
    assert build("2-D", fused_nn)[0](x.double()).shape == x.shape  # of which torch makes no grid


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("space", [(7, 5), (4, 3), (3, 5, 2)], ids=str)
def test_grid(space, align_corners, dtype):
    rank = len(space)
    theta = random(2, rank, rank + 1, dtype=dtype)
    grids = [
        lambda x, affine_grid=m.affine_grid: affine_grid(x, (2, C, *space), align_corners=align_corners)
        for m in (spatial_transformer, reference.spatial_transformer)
    ]
    assert_equivalent(*grids, {"x": theta}, [random(2, *space, rank, seed=1, dtype=dtype)])


def test_grid_of_one_position():
    theta = random(2, 2, 3)
    expected = theta[:, :, 2].reshape(2, 1, 1, 2)
    torch.testing.assert_close(spatial_transformer.affine_grid(theta, (2, C, 1, 1), align_corners=True), expected)
    torch.testing.assert_close(spatial_transformer.affine_grid(theta, (2, C, 1, 1)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["2-D", "3-D"])
def test_as_good_as_the_reference(name, layout, own):
    original = build(name, reference)[0]
    block, _, x = build(name, fused_nn)
    x = in_layout(x.float(), layout)
    assert copy.deepcopy(block).float()(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype, own):
    """torch samples in float32 there, whatever the map is in."""
    block, original, x = build("2-D", fused_nn)
    leaf = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block.float()(leaf)
    y.sum().backward()
    assert y.dtype == torch.float32 and leaf.grad.dtype == dtype
    torch.testing.assert_close(y.double(), original(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["2-D", "3-D"])
def test_compiles_in_one_graph(name, own):
    torch._dynamo.reset()
    block, _, x = build(name, fused_nn)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, x, training=True)


def transformer(**options):
    return fused_nn.SpatialTransformer(C, **({"localization": nn.Flatten()} | options))


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.SpatialTransformer(0, localization=nn.Flatten()),
    "features: expected a positive integer; got 0": lambda: transformer(features=0),
    "rank: expected 2 or 3; got 1": lambda: transformer(rank=1),
    "size: expected 2 numbers; got (4,)": lambda: transformer(size=(4,)),
    "size: expected a positive integer; got 0": lambda: transformer(size=(4, 0)),
    "padding_mode: expected one of zeros, border, reflection; got 'same'": lambda: transformer(padding_mode="same"),
    "x: expected (B, 6, H, W); got shape (1, 5, 4, 4)": lambda: transformer()(torch.zeros(1, 5, 4, 4)),
    "x: expected (B, 6, D, H, W); got shape (1, 6, 4, 4)": lambda: transformer(rank=3)(torch.zeros(1, 6, 4, 4)),
    "localization: expected a result of shape (1, 6); got (1, 24)": lambda: transformer()(torch.zeros(1, 6, 2, 2)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_keys():
    block = transformer(localization=nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), features=4)
    assert list(block.state_dict()) == ["localization.1.weight", "localization.1.bias", "theta.weight", "theta.bias"]
