"""A BatchNorm with what follows it: when it is one op."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import backend, reference
from fused_attn.nn import normalised as fused
from fused_attn.nn.normalised import normalised
from tests.checks import LAYOUTS, in_layout, random, randomised
from tests.fusion.counting import FusedOperators

LARGE = (2, 32, 64, 32)


def operators(shape, *, training=True, residual=False, dtype=torch.float32, layout="nchw", grad=False) -> int:
    """Of ours that one call runs."""
    norm = nn.BatchNorm2d(shape[1]).to(dtype).train(training)
    x = in_layout(random(*shape, dtype=dtype), layout)
    with torch.set_grad_enabled(grad), FusedOperators() as found:
        normalised(norm, x, activation="relu", residual=x if residual else None)
    return found.count


def test_what_is_small_is_run_by_pytorch():
    assert fused.LARGE == 2 * 32 * 64 * 32 and operators(LARGE) > 0
    assert not operators((2, 32, 64, 31)) and not operators((2, 32, 64, 31), training=False)
    # The statistics of rows of channels take it longer; a sum makes up for that, and in eval there are none.
    assert not operators(LARGE, layout="channels_last")
    assert operators(LARGE, layout="channels_last", residual=True)
    assert operators(LARGE, layout="channels_last", training=False)


def test_what_is_small_and_better_off_in_one():
    """Half precision is rounded once; of one sample torch's gradients may be wrong; and what is asked for is run."""
    small = 2, 8, 5, 4
    assert not operators(small)
    assert operators(small, dtype=torch.bfloat16)
    assert operators((1, 8, 5, 4), grad=True) and not operators((1, 8, 5, 4))
    with backend("cpu"):
        assert operators(small)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "relu"},
        {"residual": True, "post_activation": "relu"},
        {"activation": "silu", "gate": True, "residual": True},
    ],
    ids=str,
)
def test_both_ways_are_the_same(options, layout, training, monkeypatch):
    norm = randomised(nn.BatchNorm2d(6)).double().train(training)
    x = in_layout(random(3, 6, 5, 4, dtype=torch.float64), layout)
    maps = {"residual": random(3, 6, 5, 4, seed=1, dtype=torch.float64), "gate": random(3, 6, 1, 1, seed=2).double()}
    given = {name: maps.get(name, value) if value is True else value for name, value in options.items()}
    results = []
    for function, large in ((reference.normalised.normalised, 0), (normalised, 0), (normalised, 1 << 30)):
        monkeypatch.setattr(fused, "LARGE", large)
        module = copy.deepcopy(norm)
        leaf = x.detach().requires_grad_()
        y = function(module, leaf, **given)
        grads = torch.autograd.grad(y, [leaf, *module.parameters()], random(*y.shape, seed=3, dtype=torch.float64))
        results.append([y.detach(), *grads, *module.buffers()])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-9, atol=1e-9)
