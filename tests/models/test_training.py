"""Steps of SGD with tails=True beside eager: losses and running statistics, within what bfloat16 costs eager."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fused_attn import explain, fuse
from tests.checks import random
from tests.models.test_models import build, labels_for

#: name -> (images a batch, their side, learning rate). The rates are small: on so few pixels a step that is not soon
#: turns rounding into another network, and what float32 does to eager is then no less than what bfloat16 does.
NETWORKS = {
    "timm:seresnet18": (4, 64, 3e-5),
    "timm:mobilenetv3_small_100": (8, 64, 1e-4),
    "timm:efficientnet_b0": (4, 64, 1e-5),
    "timm:regnety_002": (8, 64, 3e-6),
    "timm:seresnet50": (4, 48, 1e-6),
    "timm:seresnext50_32x4d": (4, 48, 1e-6),
}
BATCHES = 5
#: By default, for so many steps; all of them for fifty take ten minutes.
SHALLOW, STEPS = ("timm:seresnet18", "timm:mobilenetv3_small_100", "timm:regnety_002"), 15


class RoundedToBfloat16(TorchFunctionMode):
    """Operands, results and their gradients of convolutions and dense layers as autocast rounds them, in float32.

    It is less than autocast does, which rounds what lies between as well. Its own convolutions take twenty times as
    long on a processor without bfloat16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.conv2d, F.linear):
            return function(*args, **(kwargs or {}))
        args = [a.bfloat16().float() if isinstance(a, Tensor) else a for a in args]
        return function(*args, **(kwargs or {})).bfloat16().float()


def train(model: nn.Module, steps: int, images: int, side: int, rate: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and the buffers after the first step and the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses, buffers = [], {}
    for step in range(steps):
        x = random(images, 3, side, side, seed=step % BATCHES)
        loss = F.cross_entropy(model(x), labels_for(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in (0, steps - 1):
            buffers |= {f"{name} after {step + 1}": b.double() for name, b in model.named_buffers()}
    return torch.tensor(losses, dtype=torch.float64), buffers


LONG = [pytest.param(name, 50, marks=pytest.mark.long) for name in NETWORKS]


@pytest.mark.slow  # 3 to 8 s a network; 50 steps of a deep one up to 110 s
@pytest.mark.parametrize(("name", "steps"), [*((name, STEPS) for name in SHALLOW), *LONG])
def test_steps_of_sgd(name, steps):
    original = build(name).float().train()
    fused = fuse(copy.deepcopy(original), tails=True)
    assert any("BatchNorm" in row.block for row in explain(fused))
    with RoundedToBfloat16():
        rounded_losses, rounded = train(copy.deepcopy(original), steps, *NETWORKS[name])
    losses, buffers = train(original, steps, *NETWORKS[name])
    fused_losses, fused_buffers = train(fused, steps, *NETWORKS[name])
    drift, spread = (fused_losses - losses).abs(), (rounded_losses - losses).abs()
    ratios = {}
    for key, value in buffers.items():
        if "num_batches" in key:
            assert torch.equal(fused_buffers[key], value), key
            continue
        if key.endswith("after 1"):
            torch.testing.assert_close(
                fused_buffers[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
            )
        allowed = (rounded[key] - value).norm() + 1e-6 * value.norm()
        ratios[key] = ((fused_buffers[key] - value).norm() / allowed).item()
    worst = max(ratios, key=ratios.get)
    print(
        f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, drift {drift.max():.2e}, spread {spread.max():.2e};",
        end=" ",
    )
    print(f"of the running statistics' spread at most {ratios[worst]:.2f}, {worst}")
    assert losses[-BATCHES:].mean() < losses[:BATCHES].mean(), "it does not learn, so nothing is shown"
    assert drift.max() <= spread.max() and drift.mean() <= spread.mean()
    assert ratios[worst] <= 1, worst
