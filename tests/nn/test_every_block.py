"""What every block owes: second gradients, maps with metadata, programs of open sizes, checkpoints."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

import fused_attn.nn
from fused_attn import explain, reference
from tests.checks import random, randomised
from tests.ops.test_autograd import Marked


class Gated(nn.Module):
    """A gate that takes two maps, as a block of one."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x.sin(), x)


class Last(nn.Module):
    """A block of maps with their channels last."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.movedim(1, -1)).movedim(-1, 1)


#: Blocks of 8 channels from the module that has them.
BLOCKS: dict[str, Callable] = {
    "AttentionGate": lambda m: Gated(m.AttentionGate(8)),
    "AttentionGate strided": lambda m: Gated(m.AttentionGate(8, stride=2, batch_norm=False, project=True)),
    "BAM": lambda m: m.BAM(8, reduction=2),
    "BilinearAttention": lambda m: m.BilinearAttention(8, block_size=1, drop_rate=0),
    "BilinearTransform": lambda m: m.BilinearTransform(8, block_size=1),
    "CBAM": lambda m: m.CBAM(8, reduction=2),
    "CBAM timm": lambda m: m.CBAM(8, reduction=2, order=("mean", "max"), ties="even", batch_norm=False),
    "ChannelAttention": lambda m: m.ChannelAttention(8, reduction=2),
    "ChannelSelfAttention": lambda m: m.ChannelSelfAttention(8),
    "CoordinateAttention": lambda m: m.CoordinateAttention(8, activation="silu"),
    "DualAttention": lambda m: m.DualAttention(8, hidden=8, reduction=2),
    "DoubleAttention": lambda m: m.DoubleAttention(8),
    "CrissCrossAttention": lambda m: m.CrissCrossAttention(8, reduction=2),
    "ECA": lambda m: m.ECA(8),
    "EMA": lambda m: m.EMA(8, factor=2),
    "EffectiveSE": lambda m: m.EffectiveSE(8, gate="sigmoid"),  # eager has no second derivative of its default
    "ExternalAttention": lambda m: m.ExternalAttention(8, memory=6),
    "GSoP": lambda m: m.GSoP(8, mode="max", reduced=6),
    "GatherExcite": lambda m: m.GatherExcite(8, pool="avgmax"),
    "NonLocal": lambda m: m.NonLocal(8),
    "NonLocal Gaussian": lambda m: m.NonLocal(8, mode="gaussian", pool="after", batch_norm=False),
    "NonLocal dot": lambda m: m.NonLocal(8, mode="dot", pool=None, hidden=2),
    "NonLocal concatenation": lambda m: m.NonLocal(8, mode="concatenation"),
    "PositionAttention": lambda m: m.PositionAttention(8, reduction=2),
    "GatedChannelTransformation": lambda m: m.GatedChannelTransformation(8),
    "GlobalResponseNorm": lambda m: m.GlobalResponseNorm(8),
    "GlobalResponseNorm last": lambda m: Last(m.GlobalResponseNorm(8, channels_last=True)),
    "GlobalContext": lambda m: m.GlobalContext(8, ratio=1 / 2),
    "GlobalContext scale": lambda m: m.GlobalContext(8, fuse="scale", ratio=1 / 2),
    "GlobalContext both": lambda m: m.GlobalContext(8, fuse="both", ratio=1 / 2),
    "ResidualAttention": lambda m: m.ResidualAttention(8, depth=2),
    "SCSE": lambda m: m.SCSE(8, reduction=2),
    "SCSE max": lambda m: m.SCSE(8, reduction=2, combine="max"),
    "SKConv": lambda m: m.SKConv(8, groups=4),
    "SRM": lambda m: m.SRM(8),
    "SelectiveKernel": lambda m: m.SelectiveKernel(8, 8),
    "SelfAttention2d": lambda m: m.SelfAttention2d(8, reduction=2),
    "SimAM": lambda m: m.SimAM(8),
    "SpatialAttention": lambda m: m.SpatialAttention(8, kernel_size=3),
    "SpatialTransformer": lambda m: m.SpatialTransformer(
        8, localization=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), features=8
    ),
    "SplitAttention": lambda m: m.SplitAttention(8),
    "SqueezeExcite": lambda m: m.SqueezeExcite(8, reduction=2, activation="silu"),
    "TripletAttention": lambda m: m.TripletAttention(kernel_size=3),
}

#: Held against numerical derivatives in their own tests.
EAGER_HAS_NO_SECOND = {"SpatialTransformer"}

#: Whose result autograd reads, in eager too.
ENDS_IN_RELU = {"BilinearTransform", "ExternalAttention"}

#: Height and width from which one program serves: torch has another one for a single position, of bilinear
#: interpolation and of what a pool of 2x2 leaves.
LEAST = {"ResidualAttention": 5} | dict.fromkeys(
    ("AttentionGate strided", "NonLocal", "NonLocal Gaussian", "NonLocal concatenation", "SelfAttention2d"), 4
)


def pair(name: str, training: bool) -> tuple[nn.Module, nn.Module]:
    original = randomised(BLOCKS[name](reference)).train(training)
    block = BLOCKS[name](fused_attn.nn).double().train(training)
    block.load_state_dict(copy.deepcopy(original.state_dict()))
    return block, original


def test_every_block_is_here():
    assert {name.partition(" ")[0] for name in BLOCKS} == set(fused_attn.nn.__all__)


@pytest.mark.parametrize("name", BLOCKS)
def test_is_one_row_of_explain(name):
    (row,) = explain(BLOCKS[name](fused_attn.nn))[:1]
    assert row.block == name.partition(" ")[0] and row.fused and row.reason


def penalised(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The first gradients, those of a penalty on the first, and a Hessian-vector product."""
    x = x.detach().requires_grad_()
    leaves = [x, *block.parameters()]
    y = block(x)
    loss = (y * random(*y.shape, seed=1, dtype=y.dtype)).square().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    penalty = (first[0].flatten(1).norm(dim=1) - 1).square().mean()
    product = (first[0] * random(*x.shape, seed=2, dtype=x.dtype)).sum()
    seconds = (torch.autograd.grad(s, leaves, retain_graph=True, materialize_grads=True) for s in (penalty, product))
    return [y, *first, *(g for second in seconds for g in second), *block.buffers()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in EAGER_HAS_NO_SECOND])
def test_gradient_penalty_and_hessian_vector_product(name, training):
    x = random(3, 8, 6, 5, dtype=torch.float64)
    for mine, theirs in zip(*(penalised(block, x) for block in pair(name, training)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_maps_with_metadata(name, training):
    """The result has it, too, and a shortcut may be added to it in place; without gradients as well."""
    values, found = random(3, 8, 6, 5, dtype=torch.float64), []
    for block, kind in zip(pair(name, training), (Marked, Tensor), strict=True):
        x = values.clone().requires_grad_()
        leaf = x.as_subclass(kind)
        leaf.mark = "affine"
        y = block(leaf)
        assert type(y) is kind
        assert kind is Tensor or y.mark == "affine"
        if name in ENDS_IN_RELU:
            y = y + x
        else:
            y += x
        found.append([y.as_subclass(Tensor), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
        with torch.no_grad():
            assert type(block(leaf)) is kind
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_export_with_open_sizes(name):
    """Batch, height and width."""
    block, original = pair(name, training=False)
    least = LEAST.get(name)
    sizes = ({0: Dim("batch"), 2: Dim("height", min=least), 3: Dim("width", min=least)},)
    program = export(block, (random(2, 8, 10, 9, dtype=torch.float64),), dynamic_shapes=sizes).module()
    for shape in ((4, 8, 7, 12), (3, 8, 10, 5)):
        x = random(*shape, dtype=torch.float64)
        torch.testing.assert_close(program(x), original(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_in_a_checkpoint(name):
    """One that is not reentrant: it lets every saved tensor go when it has been read."""
    found = []
    for block in pair(name, training=True):
        x = random(3, 8, 6, 5, dtype=torch.float64).requires_grad_()
        y = block(x) if found else checkpoint(block, x, use_reentrant=False)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def listened(block: nn.Module) -> list[str]:
    """Gets the path of each layer that is called, whose result is then doubled."""
    called: list[str] = []

    def doubled(path: str) -> Callable:
        return lambda layer, arguments, y: called.append(path) or 2 * y  # type: ignore[func-returns-value]

    for path, layer in block.named_modules():
        if path and not [*layer.children()]:
            layer.register_forward_hook(doubled(path))
    return called


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_is_called_where_somebody_listens(name, training):
    """As the reference calls it. What a hook makes of its result, or its weight, counts. A large map: some do less
    for those."""
    found = []
    for block in pair(name, training):
        called = listened(block)
        found.append((block(random(3, 8, 26, 25, dtype=torch.float64)), called))
    (mine, called), (theirs, expected) = found
    assert called == expected
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_batched(name):
    found = []
    for block in pair(name, training=True):
        x = random(3, 8, 6, 5, dtype=torch.float64).requires_grad_()
        y = block(x)
        grads, leaves = random(2, *y.shape, seed=1, dtype=torch.float64), [x, *block.parameters()]
        of_each = functools.partial(torch.autograd.grad, y, leaves, retain_graph=True)
        found.append((*torch.func.vmap(of_each)(grads), *of_each(grads, is_grads_batched=True)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_without_numbers(name):
    block = BLOCKS[name](fused_attn.nn).eval().to("meta")
    x = torch.empty(3, 8, 6, 5, device="meta")
    assert block(x).shape == BLOCKS[name](reference).eval()(random(3, 8, 6, 5)).shape


@pytest.mark.parametrize("name", BLOCKS)
def test_maps_of_inference_mode(name):
    with torch.inference_mode():
        x = random(3, 8, 6, 5, dtype=torch.float64)
    found: list[object] = []
    for block in pair(name, training=False):
        try:
            found.append(block(x).detach())
        except RuntimeError as error:
            found.append(str(error))
    mine, theirs = found
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


#: Whose result is made of matrices, or of stacked branches: it lies as the map does, where plain PyTorch lays it anew.
LAID_ANEW = {"ChannelSelfAttention", "CrissCrossAttention", "DoubleAttention", "ExternalAttention", "SplitAttention"}


@pytest.mark.parametrize("part", ["half of NCHW", "half", "rows"])
@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - LAID_ANEW))
def test_the_result_lies_as_in_torch(name, part):
    """A part of a channels_last map is neither NCHW nor channels_last; a product of it is channels_last."""
    ours, plain = BLOCKS[name](fused_attn.nn).eval(), BLOCKS[name](reference).eval()
    plain.load_state_dict(ours.state_dict())
    x = random(2, 16, 9, 7)
    x = x if part == "half of NCHW" else x.contiguous(memory_format=torch.channels_last)
    x = x[:, 8:, 1:] if part == "rows" else x[:, 8:]
    x = x.detach().requires_grad_()
    results = [block(x) for block in (ours, plain)]
    assert results[0].stride() == results[1].stride()
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
