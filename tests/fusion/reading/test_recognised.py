"""Blocks known by what they compute: every way of writing them, and what a fused one keeps."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fused_attn import explain, fuse, unfuse
from fused_attn.fusion.changing.plan import PLAN
from fused_attn.fusion.reading import templates
from fused_attn.fusion.recipes.names import host_class
from tests.checks import random
from tests.fusion.reading import pasted_attentions
from tests.fusion.reading.pasted import BAM, BLOCKS, SCSE, CoordAtt, TripletAttention

BLOCKS |= {name: (build, "OwnLayers", {"name": block}) for name, (build, block) in pasted_attentions.BLOCKS.items()}


def fields(recipe) -> dict:
    if type(recipe).__name__ == "CbamGate":
        return {**vars(recipe.channel), **vars(recipe.spatial)}
    return vars(recipe)


def recipe_of(block):
    (row,) = explain(block)
    assert row.fused, row.reason
    return block.__dict__[PLAN].recipe


def like(block) -> torch.Tensor:
    rank = recipe_of(block).rank or 4
    channels = next((p.shape[1] for p in block.parameters() if p.dim() > 1 and p.shape[1] > 2), None)
    channels = channels or (64 if "ECA" in type(block).__name__ else 24)
    return random(2, channels, *(9, 6, 5)[: rank - 2], dtype=torch.float64)


@pytest.mark.parametrize("name", BLOCKS)
def test_recognised(name):
    build, kind, facts = BLOCKS[name]
    plain = build().double()
    with torch.no_grad():
        for p in plain.parameters():
            p.uniform_(-0.5, 0.5)
    # torch's own backward of hard_sigmoid has its sixths in float32.
    sixths = (
        {"rtol": 1e-6, "atol": 1e-6}
        if name in ("HardSE", "LinearOnLastAxis", "ESE", "CoordAttCoordinateAttention")
        else {"rtol": 1e-8, "atol": 1e-9}
    )
    block = fuse(copy.deepcopy(plain))
    assert host_class(block) is type(plain), [row.reason for row in explain(block)]
    recipe = recipe_of(block)
    assert type(recipe).__name__ == kind
    for key, value in facts.items():
        if key == "hidden":
            continue
        assert fields(recipe)[key] == value, key
    assert list(block.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        block.train(training), plain.train(training)
        x = like(block)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = block(a), plain(b)
        grad = random(*expected.shape, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        actual.backward(grad), expected.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, **sixths)
        for p, q in zip(block.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **sixths)
    for p, q in zip(block.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert host_class(other) is type(plain) and torch.equal(other(x), block(x))
    assert type(unfuse(block)) is type(plain)


@pytest.mark.parametrize("name", pasted_attentions.LOOK_ALIKES)
def test_another_attention_is_left_alone(name):
    block = pasted_attentions.LOOK_ALIKES[name]()
    kind = type(block)
    assert type(fuse(block)) is kind and not any(row.fused for row in explain(block))


def test_a_gamma_put_in_later_counts():
    """Another parameter, or another value: it is read at every call."""
    block = pasted_attentions.PAM_Module(32).double()
    fused = fuse(copy.deepcopy(block), strict=True)
    x = random(2, 32, 5, 6, dtype=torch.float64)
    for value in (0.5, 2.0):
        with torch.no_grad():
            fused.gamma.fill_(value), block.gamma.fill_(value)
        torch.testing.assert_close(fused(x), block(x))
    fused.gamma = block.gamma = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(fused(x), block(x))
    parameters = {"gamma": torch.full((1,), -1.0, dtype=torch.float64)}
    results = (torch.func.functional_call(b, parameters, (x,)) for b in (fused, block))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", pasted_attentions.BLOCKS)
def test_attentions_in_mixed_precision(name):
    """The dtypes of the results are those of the code."""
    block = pasted_attentions.BLOCKS[name][0]().eval()
    fused = fuse(copy.deepcopy(block), strict=True)
    x = like(fused).float()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = fused(given), block(given)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)


def test_recognising_attentions_draws_no_random_numbers():
    templates.self_attentions.cache_clear()
    templates.modules.cache_clear()
    state = torch.get_rng_state()
    list(templates.self_attentions(2)), list(templates.modules(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("block", ["PosAttBlock", "ChaAttBlock"])
def test_pytorchcv(block):
    danet = pytest.importorskip("pytorchcv.models.danet", reason="pytorchcv is not installed")
    plain = getattr(danet, block)(*((32,) if block == "PosAttBlock" else ())).double()
    with torch.no_grad():
        plain.scale.alpha.fill_(0.7)
    fused = fuse(copy.deepcopy(plain), strict=True)
    assert explain(fused)[0].fused
    x = random(2, 32, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x))


@pytest.mark.parametrize("cls", [BAM, CoordAtt, SCSE, TripletAttention])
def test_equal_blocks_keep_their_own_weights(cls):
    """Of one class and shapes: what they run is made once a block. A copy has its own, too."""
    arguments = () if cls is TripletAttention else (32,)
    plain = nn.Sequential(cls(*arguments), cls(*arguments)).double().eval()
    net = fuse(copy.deepcopy(plain), strict=True)
    other = copy.deepcopy(net)
    x = random(2, 32, 6, 5, dtype=torch.float64)
    for model in (net, other):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(other(x), net(x))
