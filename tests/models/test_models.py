"""Whole networks with random weights, end to end: logits, loss, every gradient, twenty steps of SGD."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn import explain, fuse
from fused_attn.hosts import UnknownModel, build_model
from tests.checks import random

#: name -> (blocks fused, input)
MODELS = {
    "timm:seresnet50": (16, (2, 3, 64, 64)),
    "timm:efficientnet_b0": (16, (2, 3, 64, 64)),
    "timm:mobilenetv3_large_100": (8, (2, 3, 64, 64)),
    "timm:ecaresnet50d": (16, (2, 3, 64, 64)),
    "timm:regnety_016": (27, (2, 3, 64, 64)),
    "torchvision:mobilenet_v3_small": (9, (2, 3, 64, 64)),
    "monai:SEResNet50, 3-D": (16, (2, 1, 32, 32, 32)),
}


def build(name: str) -> nn.Module:
    """The network in float64, every block's effect made visible, without dropout."""
    torch.manual_seed(0)
    if name.startswith("monai"):
        nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
        model = nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=10)
    else:
        try:
            model = build_model(name)
        except UnknownModel as error:
            pytest.skip(str(error))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # some start at 0, which would hide the block before them
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    if hasattr(model, "drop_rate"):
        model.drop_rate = 0.0
    return model.double()


def gradients(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = model(x)
    loss = F.cross_entropy(logits, labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return logits, loss, dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def labels_for(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 10


@pytest.mark.slow  # up to 10 s a network
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients(name, training):
    """float64: what remains is the order of summation, amplified by the depth; 1e-9 of the largest value bounds it."""
    blocks, shape = MODELS[name]
    original = build(name).train(training)
    fused = fuse(copy.deepcopy(original), strict=True)
    report = explain(fused)
    assert len(report) == blocks and all(row.fused for row in report)
    x = random(*shape, dtype=torch.float64)
    labels = labels_for(x)
    logits, loss, grads = gradients(original, x, labels)
    fused_logits, fused_loss, fused_grads = gradients(fused, x, labels)
    torch.testing.assert_close(fused_logits, logits, rtol=0, atol=1e-9 * logits.abs().max().item())
    torch.testing.assert_close(fused_loss, loss, rtol=1e-9, atol=0)
    largest = max(g.abs().max().item() for g in grads.values())
    for key, grad in grads.items():
        torch.testing.assert_close(fused_grads[key], grad, rtol=0, atol=1e-8 * largest, msg=key)
    for key, value in original.state_dict().items():  # running statistics
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.slow  # up to 30 s a network
@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_of_sgd_stay_together(name):
    """In float64 rounding differences grow from 1e-16 by the training's own sensitivity; 1e-6 is far below any
    difference in the function, which would show at the first step."""
    shape = MODELS[name][1]
    original = build(name).train()
    fused = fuse(copy.deepcopy(original))
    losses = []
    for model in (original, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        found = []
        for step in range(20):
            x = random(*shape, seed=step % 4, dtype=torch.float64)
            loss = F.cross_entropy(model(x), labels_for(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert losses[0][-1] != losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-6, atol=1e-8)
