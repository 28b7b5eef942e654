"""warmup runs every block on maps like its own, and leaves the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_attn
from fused_attn.nn import CBAM, ECA, SKConv


class Called(nn.Module):
    """Calls its block by keyword."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x=x).tanh()


def with_dropout() -> nn.Module:
    block = SKConv(16, groups=4)
    block.conv[0][0] = nn.Sequential(block.conv[0][0], nn.Dropout())
    return block


MODELS = {
    "running statistics of its own": lambda: CBAM(16),
    "of a block that was fused": lambda: fused_attn.fuse(fused_attn.reference.CBAM(16)),
    "layers that draw numbers": with_dropout,
    "a block called by keyword": lambda: Called(ECA(16)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_stays_as_it_is(name, training):
    model = nn.Sequential(MODELS[name](), nn.BatchNorm2d(16)).train(training)
    model[1].train(not training)
    modes = [module.training for module in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert fused_attn.warmup(model, torch.randn(3, 16, 7, 5, generator=torch.Generator().manual_seed(0))) == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_block_runs_in_its_own_mode(backward, training):
    """In training there are other kernels to compile."""
    model = CBAM(16).train(training)
    seen = []
    original = model._cbam
    model._cbam = lambda x, *args, **options: (
        seen.append((options.get("batch_norm") is not None, torch.is_grad_enabled())),
        original(x, *args, **options),
    )[1]
    assert fused_attn.warmup(model, torch.randn(3, 16, 7, 5), backward=backward) == 1
    assert seen == [(False, False), (training, backward)]  # the model's own pass, in eval, and then the block's


def test_no_hook_is_left_when_one_cannot_be_hung_in(monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("no hooks here")

    model = nn.Sequential(ECA(16), ECA(16)).train()
    monkeypatch.setattr(model[1], "register_forward_pre_hook", refuse)
    with pytest.raises(RuntimeError, match="no hooks here"):
        fused_attn.warmup(model, torch.randn(1, 16, 6, 6))
    assert not model[0]._forward_pre_hooks and model.training
