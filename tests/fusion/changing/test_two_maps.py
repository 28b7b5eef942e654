"""Blocks of two maps: found in pasted classes and MONAI's, equal to what they are written as."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

from fused_attn import backend, explain, fuse, reference, unfuse
from fused_attn.fusion import FusionError
from fused_attn.fusion.changing.plan import plan_of
from tests.checks import LAYOUTS, in_layout, random, randomised
from tests.fusion.changing import pasted_gates as pasted
from tests.fusion.counting import FusedOperators
from tests.nn.test_attention_gate import Common, results

MONAI = pytest.importorskip("monai.networks.nets.attentionunet", reason="MONAI is not installed")

GATE, OTHER, SUM = "AttentionGate", "gate from one map on another", "norm_gate"
#: What makes a block, the shapes of its maps, what it is found as, and whether its BatchNorm is summed at once.
FOUND = {
    "pasted": (lambda: pasted.AttentionBlock(6, 10, 4), (6, 8, 6), (10, 8, 6), GATE, True),
    "common, 3-D": (lambda: Common(6, 10, 4, 3), (6, 3, 4, 5), (10, 3, 4, 5), OTHER, False),
    "functions": (lambda: pasted.Functions(10, 4), (10, 8, 6), (10, 8, 6), OTHER, False),
    "resampled, 3-D": (lambda: pasted.Resampled(6, 10), (6, 8, 6, 4), (10, 4, 3, 2), OTHER, False),
    "resampled, 2-D": (lambda: pasted.Resampled(6, 10, 2), (6, 8, 6), (10, 4, 3), OTHER, False),
    "upsampled": (lambda: pasted.Upsampled(6, 10, 4), (10, 4, 3), (6, 8, 6), GATE, True),
    "otherwise in training": (lambda: pasted.Twice(6), (6, 8, 6), (6, 8, 6), OTHER, False),
    "PAN": (lambda: pasted.GlobalAttention(6, 6), (6, 4, 3), (6, 8, 6), OTHER, False),
    "MAnet": (lambda: pasted.Fusion(6, 8), (6, 4, 3), (8, 8, 6), OTHER, False),
    "LR-ASPP": (lambda: pasted.Reduced(6, 10, 8, 4), (6, 8, 6), (10, 4, 3), OTHER, False),
    "weights in a list": (lambda: pasted.WithParameters(6), (6, 8, 6), (6, 8, 6), OTHER, False),
    "MONAI, 2-D": (lambda: MONAI.AttentionBlock(2, 4, 6, 10), (6, 8, 6), (10, 8, 6), GATE, True),
    "MONAI, 3-D": (lambda: MONAI.AttentionBlock(3, 4, 6, 10), (6, 3, 4, 5), (10, 3, 4, 5), GATE, True),
    "reference": (lambda: reference.AttentionGate(10, gating=6), (6, 8, 6), (10, 8, 6), GATE, True),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_found_and_equal(name):
    make, first, second, block, summed = FOUND[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original))
    row = next(iter(explain(fused)))
    assert (row.name, row.block, row.fused) == ("(the model)", block, True)
    assert (SUM in plan_of(fused).recipe.functions) is summed
    maps = random(3, *first, dtype=torch.float64), random(3, *second, seed=1, dtype=torch.float64)
    for training in (True, False):
        for mine, theirs in zip(*(results(b, *maps, training) for b in (fused, original)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    assert [*fused.state_dict()] == [*original.state_dict()]
    assert type(unfuse(fused)) is type(original)


def test_maps_by_keyword_and_in_another_order():
    """As MONAI's network gives them."""
    original = randomised(pasted.AttentionBlock(6, 10, 4)).eval()
    fused = fuse(copy.deepcopy(original))
    g, x = random(2, 6, 8, 6, dtype=torch.float64), random(2, 10, 8, 6, dtype=torch.float64)
    expected = original(g, x)
    options = {"skip_connection": x, "gate": g}
    for args, kwargs in (((g, x), {}), ((g,), {"skip_connection": x}), ((), options)):
        torch.testing.assert_close(fused(*args, **kwargs), expected, rtol=1e-9, atol=1e-11)
    with pytest.raises(TypeError, match="skip_connection"):
        fused(g)
    with pytest.raises(TypeError, match="mask"):
        fused(g, x, mask=None)


def test_a_map_that_may_be_left_out():
    """Without it the block runs as it is written, and `explain` says so."""
    original = randomised(pasted.MaybeSkip(6)).eval()
    fused = fuse(copy.deepcopy(original))
    (row,) = explain(fused)
    assert row.fused and row.reason.endswith("; as it is written without skip")
    x, skip = random(2, 6, 8, 6, dtype=torch.float64), random(2, 6, 8, 6, dtype=torch.float64)
    for args, kwargs in (((x,), {}), ((x, skip), {}), ((x,), {"skip": skip})):
        torch.testing.assert_close(fused(*args, **kwargs), original(*args, **kwargs), rtol=1e-9, atol=1e-11)


#: What makes a module of two maps in one argument, and what holds them.
HELD = {
    "dictionary": (lambda: pasted.Head(6, 10, 8, 4), lambda low, high: {"low": low, "high": high}),
    "ordered, with more in it": (
        lambda: pasted.Head(6, 10, 8, 4),
        lambda low, high: OrderedDict(aux=low, high=high, low=low),
    ),
    "list": (lambda: pasted.Listed(6, "unpacked"), lambda high, low: [low[:, :6], high]),
    "tuple": (lambda: pasted.Listed(6, "indices"), lambda high, low: (low[:, :6], high)),
    "from behind": (lambda: pasted.Listed(6, "behind"), lambda high, low: [low[:, :6], high]),
}


@pytest.mark.parametrize("name", HELD)
def test_maps_in_one_argument(name):
    make, held = HELD[name]
    original = randomised(make())
    fused = fuse(copy.deepcopy(original), strict=True)
    (row,) = explain(fused)
    assert (row.block, row.fused) == (OTHER, True)
    maps = random(3, 6, 8, 6, dtype=torch.float64), random(3, 10, 4, 3, seed=1, dtype=torch.float64)
    for training in (True, False):
        found = []
        for block in (fused, original):
            block = copy.deepcopy(block).train(training)
            leaves = [m.clone().requires_grad_() for m in maps]
            y = block(held(*leaves))
            grads = torch.autograd.grad(y.square().sum(), [*leaves, *block.parameters()])
            found.append([y, *grads, *block.buffers()])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    with FusedOperators() as ran:
        fused.float()(held(*(m.float() for m in maps)))
    assert ran.count


def test_what_holds_maps_otherwise_runs_as_written():
    """Subclasses of dictionaries, lists of more maps, and what is missing."""

    class Own(dict):
        def __getitem__(self, key):
            return 2 * super().__getitem__(key)

    low, high = random(2, 6, 8, 6, dtype=torch.float64), random(2, 10, 4, 3, seed=1, dtype=torch.float64)
    original = randomised(pasted.Head(6, 10, 8, 4)).eval()
    fused = fuse(copy.deepcopy(original))
    with FusedOperators() as ran:
        y = fused(Own(low=low, high=high))
    assert not ran.count
    torch.testing.assert_close(y, original(Own(low=low, high=high)))
    torch.testing.assert_close(fused(maps={"low": low, "high": high}), y * 0 + original({"low": low, "high": high}))
    with pytest.raises(KeyError):
        fused({"low": low})
    listed = randomised(pasted.Listed(6, "unpacked")).eval()
    with pytest.raises(ValueError, match="too many values"):
        fuse(listed)([low, low, low])


def test_what_widens_a_gate_widens_the_result():
    """Where the map has fewer channels than it was recognised for, or a gate of more samples."""
    for how in ("repeat", "expand"):
        original = randomised(pasted.Widened(6, how)).eval()
        fused = fuse(copy.deepcopy(original))
        assert explain(fused)[0].fused
        g = random(2, 6, 8, 6, dtype=torch.float64)
        for shape in ((2, 6, 8, 6), (2, 1, 8, 6), (1, 6, 8, 6), (1, 1, 8, 6)):
            x = random(*shape, dtype=torch.float64)
            torch.testing.assert_close(fused(g, x), original(g, x), rtol=1e-9, atol=1e-11)
        with pytest.raises(RuntimeError, match="size"):
            fused(g, random(2, 5, 8, 6, dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_fused(layout):
    """By the operators, in the layout of the maps."""
    fused = fuse(pasted.AttentionBlock(32, 32, 16))
    g, x = (in_layout(random(2, 32, 66, 67, seed=i), layout) for i in (0, 1))
    with torch.profiler.profile() as profile:
        y = fused(g, x)
    names = {event.key for event in profile.key_averages()}
    assert {"fused_attn::norm_scale", "fused_attn::scale"} <= names
    assert y.stride() == x.stride()
    with backend("reference"):
        torch.testing.assert_close(fused(g, x), y, rtol=1e-4, atol=1e-4)


def test_networks_of_monai():
    """Their gates, in place; values and gradients stay."""
    network = MONAI.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)).double()
    fused = fuse(copy.deepcopy(network))
    rows = explain(fused)
    assert [row.block for row in rows] == [GATE] * 2 and all(row.fused for row in rows)
    x = random(2, 1, 32, 32, dtype=torch.float64)
    found = []
    for model in (network, fused):
        model.train()
        torch.manual_seed(0)
        y = model(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [*model.parameters()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-8)


def test_copies_pickles_and_compiles():
    torch._dynamo.reset()
    original = randomised(pasted.AttentionBlock(6, 10, 4)).eval()
    fused = fuse(copy.deepcopy(original))
    maps = random(2, 6, 8, 6, dtype=torch.float64), random(2, 10, 8, 6, dtype=torch.float64)
    again = pickle.loads(pickle.dumps(fused))
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="aot_eager")
    for block in (copy.deepcopy(fused), again, compiled):
        torch.testing.assert_close(block(*maps), original(*maps), rtol=1e-9, atol=1e-11)
    assert all(row.fused for row in explain(again))


def test_a_hook_and_a_layer_that_is_put_in_count():
    """A hook before fuse keeps the block as it is written, one behind it has it run so."""
    hooked = pasted.AttentionBlock(6, 10, 4)
    hooked.W_x[1].register_forward_hook(lambda *_: None)
    assert "carries a hook" in next(iter(explain(hooked))).reason
    with pytest.raises(FusionError):
        fuse(hooked, strict=True)
    original = randomised(pasted.AttentionBlock(6, 10, 4)).eval()
    fused = fuse(copy.deepcopy(original))
    for block in (original, fused):
        block.W_x[1].register_forward_hook(lambda layer, given, y: 2 * y)
    maps = random(2, 6, 8, 6, dtype=torch.float64), random(2, 10, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(*maps), original(*maps), rtol=1e-9, atol=1e-11)
    assert not next(iter(explain(fused))).fused


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (pasted.BySize, ["branches on a tensor or its sizes"]),
        (pasted.Keeps, ["keeps state"]),
        (pasted.Product, []),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)
def test_is_left_alone(make, reasons):
    block = make(6)
    assert [row.reason for row in explain(fuse(block))] == reasons and type(block) is make


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_and_autocast(dtype):
    """The dtype of the block's own product, where one of its factors is in half precision too."""
    original: nn.Module = pasted.AttentionBlock(6, 10, 4).eval()
    fused = fuse(copy.deepcopy(original))
    maps = random(2, 6, 8, 6), random(2, 10, 8, 6)
    with torch.autocast("cpu", dtype):
        mine, theirs = fused(*maps), original(*maps)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    halves = [m.to(dtype) for m in maps]
    torch.testing.assert_close(fused.to(dtype)(*halves), original.to(dtype)(*halves), rtol=3e-2, atol=3e-2)
