"""Residual attention against the published network, written out, and its product against (1 + mask) * trunk."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.nn.residual_attention import residual_mask
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_eager,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    gradcheck,
    in_layout,
    random,
    randomised,
)

C = 8


class Unit(nn.Module):
    """With the projection that the published code makes for every unit, and does not use in these."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, C // 4, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(C // 4), nn.Conv2d(C // 4, C // 4, 3, padding=1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(C // 4), nn.Conv2d(C // 4, C, 1, bias=False)
        self.conv4 = nn.Conv2d(C, C, 1, bias=False)

    def forward(self, x):
        y = x
        for norm, conv in ((self.bn1, self.conv1), (self.bn2, self.conv2), (self.bn3, self.conv3)):
            y = conv(F.relu(norm(y)))
        return x + y


def two():
    return nn.Sequential(Unit(), Unit())


def tail():
    layers = [nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 1, bias=False)]
    return nn.Sequential(*layers, *copy.deepcopy(layers), nn.Sigmoid())


def down(x):
    return nn.MaxPool2d(3, 2, 1)(x)


def up(x, like):
    return nn.UpsamplingBilinear2d(size=tuple(like.shape[2:]))(x)


class Pre(nn.Module):
    """The paper's, three times down and up."""

    def __init__(self):
        super().__init__()
        self.first_residual_blocks, self.trunk_branches = Unit(), two()
        self.softmax1_blocks, self.skip1_connection_residual_block = Unit(), Unit()
        self.softmax2_blocks, self.skip2_connection_residual_block = Unit(), Unit()
        self.softmax3_blocks, self.softmax4_blocks, self.softmax5_blocks = two(), Unit(), Unit()
        self.softmax6_blocks, self.last_blocks = tail(), Unit()

    def forward(self, x):
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        one = self.softmax1_blocks(down(x))
        two = self.softmax2_blocks(down(one))
        three = self.softmax3_blocks(down(two))
        four = self.softmax4_blocks(up(three, two) + self.skip2_connection_residual_block(two))
        five = self.softmax5_blocks(up(four, one) + self.skip1_connection_residual_block(one))
        return self.last_blocks((1 + self.softmax6_blocks(up(five, trunk))) * trunk)


class Stage2(nn.Module):
    """The later code's: it adds the maps of the way down themselves, too."""

    def __init__(self):
        super().__init__()
        self.first_residual_blocks, self.trunk_branches = Unit(), two()
        self.softmax1_blocks, self.skip1_connection_residual_block = Unit(), Unit()
        self.softmax2_blocks, self.softmax3_blocks, self.softmax4_blocks = two(), Unit(), tail()
        self.last_blocks = Unit()

    def forward(self, x):
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        one = self.softmax1_blocks(down(x))
        two = self.softmax2_blocks(down(one))
        three = self.softmax3_blocks(up(two, one) + one + self.skip1_connection_residual_block(one))
        return self.last_blocks((1 + self.softmax4_blocks(up(three, trunk) + trunk)) * trunk)


class Stage1Cifar(nn.Module):
    """The same under its names for small images."""

    def __init__(self):
        super().__init__()
        self.first_residual_blocks, self.trunk_branches = Unit(), two()
        self.down_residual_blocks1, self.skip1_connection_residual_block = Unit(), Unit()
        self.middle_2r_blocks, self.up_residual_blocks1, self.conv1_1_blocks = two(), Unit(), tail()
        self.last_blocks = Unit()

    def forward(self, x):
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        one = self.down_residual_blocks1(down(x))
        two = self.middle_2r_blocks(down(one))
        three = self.up_residual_blocks1(up(two, one) + one + self.skip1_connection_residual_block(one))
        return self.last_blocks((1 + self.conv1_1_blocks(up(three, trunk) + trunk)) * trunk)


class Stage3(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_residual_blocks, self.trunk_branches = Unit(), two()
        self.softmax1_blocks, self.softmax2_blocks, self.last_blocks = two(), tail(), Unit()

    def forward(self, x):
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        one = self.softmax1_blocks(down(x))
        return self.last_blocks((1 + self.softmax2_blocks(up(one, trunk) + trunk)) * trunk)


class Stage3Cifar(nn.Module):
    def __init__(self):
        super().__init__()
        self.first_residual_blocks, self.trunk_branches = Unit(), two()
        self.middle_2r_blocks, self.conv1_1_blocks, self.last_blocks = two(), tail(), Unit()

    def forward(self, x):
        x = self.first_residual_blocks(x)
        trunk = self.trunk_branches(x)
        return self.last_blocks((1 + self.conv1_1_blocks(self.middle_2r_blocks(x))) * trunk)


MODULES = {"fused": fused_nn, "reference": reference}
PUBLISHED = {
    "pre": (Pre, {}),
    "stage 2": (Stage2, {"depth": 2, "shortcuts": True}),
    "stage 3": (Stage3, {"depth": 1, "shortcuts": True}),
    "stage 1, small": (Stage1Cifar, {"depth": 2, "shortcuts": True}),
    "stage 3, small": (Stage3Cifar, {"depth": 0}),
}


def build(name, module):
    cls, options = PUBLISHED[name]
    original = randomised(cls())
    block = module.ResidualAttention(C, **options).double()
    block.load_state_dict(copy.deepcopy(original.state_dict()))
    for unit in original.modules():
        if isinstance(unit, Unit):
            del unit.conv4
    return block, original


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_network(name, module, training):
    block, original = build(name, MODULES[module])
    x = random(3, C, 13, 10, dtype=torch.float64)
    if "small" not in name:
        assert block.state_dict().keys() == original.state_dict().keys()
    assert_same_results(block, original, x, training)


def assert_same_results(block, original, x, training):
    """As `assert_same_block`, with the parameters by name: those that both have."""
    found = []
    for module in (block, original):
        module = copy.deepcopy(module).train(training)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(random(*y.shape, seed=1, dtype=y.dtype))
        state = {k: p.grad for k, p in module.named_parameters()} | dict(module.named_buffers())
        found.append({"y": y, "x": leaf.grad} | state)
    mine, theirs = found
    shared = mine.keys() & theirs.keys()
    assert {"y", "x", "trunk_branches.0.conv1.weight", "last_blocks.bn3.running_mean"} <= shared
    for key in shared:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-9, atol=1e-11)


def gate_of_channels():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())


def gate_of_positions():
    return nn.Sequential(nn.Conv2d(C, 1, 3, padding=1), nn.Sigmoid())


def gate_of_all():
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.Sigmoid())


class Given(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.trunk, self.mask = nn.Conv2d(C, C, 3, padding=1), mask

    def forward(self, x):
        y = self.trunk(x)
        return y + y * self.mask(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mask", [gate_of_channels, gate_of_positions, gate_of_all], ids=lambda f: f.__name__)
@pytest.mark.parametrize("module", MODULES)
def test_branches_given(module, mask, training):
    original = randomised(Given(mask()))
    block = MODULES[module].ResidualAttention(C, trunk=nn.Conv2d(C, C, 3, padding=1), mask=mask()).double()
    block.trunk_branches.load_state_dict(original.trunk.state_dict())
    block.mask.load_state_dict(original.mask.state_dict())
    assert_same_block(block, original, random(2, C, 7, 5, dtype=torch.float64), training=training)


def test_one_branch_given():
    """The other is built, between units."""
    block = fused_nn.ResidualAttention(C, mask=gate_of_all(), t=1)
    assert len(block.trunk_branches) == 1 and isinstance(
        block.first_residual_blocks, reference.residual_attention.ResidualUnit
    )
    block = fused_nn.ResidualAttention(C, trunk=nn.Identity(), p=2, r=2, depth=1)
    assert len(block.first_residual_blocks) == 2 and len(block.softmax1_blocks) == 4
    assert block(random(2, C, 6, 5)).shape == (2, C, 6, 5)


SHAPES = {"full": (2, 5, 7, 6), "of channels": (2, 5, 1, 1), "of positions": (2, 1, 7, 6)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape, dtype, layout):
    inputs = {
        "trunk": in_layout(random(2, 5, 7, 6, dtype=dtype), layout),
        "mask": in_layout(random(*SHAPES[shape], seed=1).sigmoid().to(dtype), layout),
    }
    y = residual_mask(**inputs)
    assert y.stride() == inputs["trunk"].stride()
    strided = random(6, 7, 2, 5, seed=2, dtype=dtype).permute(2, 3, 1, 0)
    for grad in (strided, random(2, 5, 1, 1, seed=2, dtype=dtype).expand(2, 5, 7, 6)):
        assert_equivalent(residual_mask, reference.residual_attention.residual_mask, inputs, [grad])


@pytest.mark.parametrize("space", [(9,), (4, 3, 5)], ids=str)
def test_product_in_other_ranks(space):
    for shape in ((2, 5, *space), (2, 1, *space), (2, 5, *(1 for _ in space))):
        inputs = {"trunk": random(2, 5, *space), "mask": random(*shape, seed=1)}
        assert_equivalent(
            residual_mask, reference.residual_attention.residual_mask, inputs, [random(2, 5, *space, seed=2)]
        )


def test_gradients_of_the_product():
    inputs = {"trunk": random(2, 3, 4, 2, dtype=torch.float64), "mask": random(2, 3, 4, 2, seed=1, dtype=torch.float64)}
    gradcheck(residual_mask, inputs)
    gradcheck(residual_mask, inputs, twice=True)


def test_gradient_of_one_alone():
    trunk, mask = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    for leaf in (trunk, mask):
        leaf.requires_grad_()
        (grad,) = torch.autograd.grad(residual_mask(trunk, mask).sum(), leaf)
        (expected,) = torch.autograd.grad(reference.residual_attention.residual_mask(trunk, mask).sum(), leaf)
        torch.testing.assert_close(grad, expected)
        leaf.requires_grad_(False)


def test_one_map_as_both():
    x = random(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    y, expected = residual_mask(x, x), x + x * x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sin().sum(), x)[0] for v in (y, expected)))


def test_product_keeps_two_maps_and_makes_no_other():
    kept = []
    trunk, mask = random(2, 3, 4, 4).requires_grad_(), random(2, 3, 4, 4, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        residual_mask(trunk, mask)
    assert [t.data_ptr() for t in kept] == [trunk.data_ptr(), mask.data_ptr()]


def test_masks_of_another_dtype():
    """As a mask under autocast is: the dtypes promote."""
    trunk, mask = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1).bfloat16()
    assert torch.equal(residual_mask(trunk, mask), (1 + mask) * trunk)
    block, original = build("stage 3", fused_nn)
    x = random(4, C, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = block.float()(x)
        assert_as_good_as_eager(y, original.float()(x), original.double()(x.double()).to(y.dtype).double())


def test_special_values():
    trunk, mask = random(1, 2, 3, 3), random(1, 2, 3, 3, seed=1).sigmoid()
    trunk[0, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    mask[0, 1, 0, 0] = torch.nan
    torch.testing.assert_close(
        residual_mask(trunk, mask), reference.residual_attention.residual_mask(trunk, mask), equal_nan=True
    )


@pytest.mark.parametrize("shape", [(0, C, 5, 6), (1, C, 1, 1)], ids=str)
def test_odd_batches(shape):
    block, original = build("pre", fused_nn)
    x = random(*shape, dtype=torch.float64)
    torch.testing.assert_close(block.eval()(x), original.eval()(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    original = randomised(reference.ResidualAttention(C, depth=1))
    block = fused_nn.ResidualAttention(C, depth=1)
    block.load_state_dict(original.state_dict())
    x = in_layout(random(8, C, 7, 9, dtype=dtype), layout)
    assert copy.deepcopy(block).to(dtype)(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x, training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    block = randomised(fused_nn.ResidualAttention(C, depth=1)).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, random(2, C, 6, 5), training=training)


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.ResidualAttention(0),
    "channels: expected a multiple of 4 for residual units; got 6": lambda: fused_nn.ResidualAttention(6),
    "depth: expected an integer of at least 0; got -1": lambda: fused_nn.ResidualAttention(C, depth=-1),
    "p: expected an integer of at least 0; got 0.5": lambda: fused_nn.ResidualAttention(C, p=0.5),
    "t: expected a positive integer; got 0": lambda: fused_nn.ResidualAttention(C, t=0),
    "r: expected a positive integer; got 0": lambda: fused_nn.ResidualAttention(C, r=0),
    "shortcuts: expected False for a given mask; got True": lambda: fused_nn.ResidualAttention(
        C, mask=nn.Identity(), shortcuts=True
    ),
    "mask: expected trunk's shape, (2, 8, 5, 4), or one a channel or a position; got (2, 8, 5, 1)": lambda: (
        residual_mask(torch.zeros(2, 8, 5, 4), torch.zeros(2, 8, 5, 1))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.ResidualAttention(C)
    block(random(2, C, 9, 8)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
