"""Whole networks with random weights, end to end: logits, loss, every gradient, some steps of SGD.

By default a shallow network of each kind; `pytest -m long` takes the deep ones, and more steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_attn import explain, fuse
from fused_attn.hosts import UnknownModel, build_model
from tests.checks import largest, random

IMAGES, VOLUMES = (2, 3, 64, 64), (2, 1, 32, 32, 32)

#: name -> (blocks fused, input)
SHALLOW = {
    "timm:seresnet18": (8, IMAGES),
    "timm:efficientnet_b0": (16, IMAGES),
    "timm:mobilenetv3_small_100": (9, IMAGES),
    "timm:ecaresnet26t": (8, IMAGES),
    "timm:regnety_002": (13, IMAGES),
    "timm:resnet26+cbam": (8, IMAGES),
    "timm:resnet26+lcbam": (8, IMAGES),
    "timm:skresnet18": (8, IMAGES),
    "timm:resnest14d": (4, IMAGES),
    "timm:gcresnext26ts": (8, IMAGES),
    "torchvision:mobilenet_v3_small": (9, IMAGES),
    "monai:SENet, 3-D": (5, VOLUMES),
}
DEEP = {
    "timm:seresnet50": (16, IMAGES),
    "timm:mobilenetv3_large_100": (8, IMAGES),
    "timm:ecaresnet50d": (16, IMAGES),
    "timm:regnety_016": (27, IMAGES),
    "timm:resnet50+cbam": (16, IMAGES),
    "timm:skresnext50_32x4d": (16, IMAGES),
    "timm:resnest50d": (16, IMAGES),
    "timm:gcresnet50t": (16, IMAGES),
    "monai:SEResNet50, 3-D": (16, VOLUMES),
}
MODELS = SHALLOW | DEEP


def networks(names: Iterable[str]) -> list:
    """Parameters for a test: the deep ones are long."""
    return [pytest.param(name, marks=pytest.mark.long) if name in DEEP else name for name in names]


def build(name: str) -> nn.Module:
    """The network in float64, every block's effect made visible, without dropout."""
    torch.manual_seed(0)
    if name.startswith("monai"):
        nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
        options = {"spatial_dims": 3, "in_channels": 1, "num_classes": 10}
        if name in DEEP:
            model = nets.SEResNet50(**options)
        else:  # the same blocks, one of them with a plain shortcut
            options |= {"groups": 1, "reduction": 16, "inplanes": 64, "downsample_kernel_size": 1, "input_3x3": False}
            model = nets.SENet(block="se_resnet_bottleneck", layers=(2, 1, 1, 1), dropout_prob=None, **options)
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


def one_ulp_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def assert_close(ours: Tensor, expected: Tensor, moved: Tensor, scale: float, name: str) -> None:
    """As near to eager as eager is to itself with its input moved by one unit in the last place, within a factor.

    In training mode a BatchNorm over a few values amplifies rounding by many orders; how many, only such a run tells.
    """
    allowed = 30 * (moved - expected).abs().max().item() + 1e-9 * scale
    found = (ours - expected).abs().max().item()
    assert found <= allowed, f"{name}: {found:.2e} is above {allowed:.2e}"


#: name -> rows of `explain` with fuse(tails=True): the residual blocks, and attention that is in none of them.
WITH_TAILS = {
    "timm:seresnet18": 8,
    "timm:efficientnet_b0": 16,
    "timm:mobilenetv3_small_100": 11,
    "timm:ecaresnet26t": 8,
    "timm:regnety_002": 13,
    "timm:resnet26+cbam": 8,
    "timm:resnet26+lcbam": 8,
    "torchvision:mobilenet_v3_small": 11,
    "monai:SENet, 3-D": 5,
    "timm:seresnet50": 16,
    "timm:mobilenetv3_large_100": 15,
    "timm:regnety_016": 27,
    "timm:resnet50+cbam": 16,
    "monai:SEResNet50, 3-D": 16,
}


def fused_copies(name: str, original: nn.Module) -> dict[str, nn.Module]:
    """The network fused, and where it has any with its tails."""
    copies = {"fused": fuse(copy.deepcopy(original), strict=True)}
    if name in WITH_TAILS:
        copies["tails"] = fuse(copy.deepcopy(original), tails=True, strict=True)
    for kind, rows in {"fused": MODELS[name][0], "tails": WITH_TAILS.get(name)}.items():
        if kind in copies:
            report = explain(copies[kind])
            assert len(report) == rows and all(row.fused for row in report), kind
    return copies


@pytest.mark.slow  # 1 to 4 s a network, a deep one up to 15 s
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", networks(MODELS))
def test_logits_loss_and_gradients(name, training):
    original = build(name).train(training)
    moved_up = copy.deepcopy(original)
    copies = fused_copies(name, original)
    x = random(*MODELS[name][1], dtype=torch.float64)
    labels = labels_for(x)
    logits, loss, grads = gradients(original, x, labels)
    moved_logits, moved_loss, moved_grads = gradients(moved_up, one_ulp_up(x), labels)
    scale = max(largest(g) for g in grads.values())
    for kind, fused in copies.items():
        fused_logits, fused_loss, fused_grads = gradients(fused, x, labels)
        assert_close(fused_logits, logits, moved_logits, largest(logits), f"{kind}: logits")
        assert_close(fused_loss, loss, moved_loss, largest(loss), f"{kind}: loss")
        for key, grad in grads.items():
            assert_close(fused_grads[key], grad, moved_grads[key], scale, f"{kind}: {key}")
        state, moved_state = fused.state_dict(), moved_up.state_dict()
        for key, value in original.state_dict().items():  # running statistics
            assert_close(state[key].double(), value.double(), moved_state[key].double(), 1.0, f"{kind}: {key}")


#: Learning rate and batch at which a network of random weights, so few images a BatchNorm, is not yet chaotic.
RATES = {
    "timm:regnety_002": (1e-5, 8),
    "timm:regnety_016": (1e-5, 8),
    "monai:SENet, 3-D": (1e-6, 4),
    "monai:SEResNet50, 3-D": (1e-6, 4),
}


#: The excitations of the last three have a BatchNorm over as many values as there are images: with few, eager itself
#: parts from eager within the steps.
NO_STEPS = ("timm:resnet26+lcbam", "timm:resnest14d", "timm:resnest50d", "timm:skresnext50_32x4d")


def losses_of_sgd(model: nn.Module, name: str, steps: int, nudged: bool = False) -> Tensor:
    """The losses of so many steps, the first input moved by one unit in the last place if nudged."""
    rate, batch = RATES.get(name, (1e-5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    losses = []
    for step in range(steps):
        x = random(batch, *MODELS[name][1][1:], seed=step % 4, dtype=torch.float64)
        loss = F.cross_entropy(model(one_ulp_up(x) if nudged and step == 0 else x), labels_for(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow  # 1 to 5 s a network; 20 steps of a deep one up to a minute
@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", networks(name for name in MODELS if name not in NO_STEPS))
def test_steps_of_sgd_stay_together(name, steps):
    """Beside eager, within what eager itself makes of an input moved by one unit in the last place. Those of tails are
    in test_training.py."""
    original = build(name).train()
    fused = fused_copies(name, original)["fused"]
    moved = losses_of_sgd(copy.deepcopy(original), name, steps, nudged=True)
    eager = losses_of_sgd(original, name, steps)
    assert eager[-1] != eager[0]
    allowed = 100 * (moved - eager).abs().max().item() + 1e-10
    assert allowed < 1e-2
    drift = (losses_of_sgd(fused, name, steps) - eager).abs().max().item()
    assert drift <= allowed, f"{drift:.2e} is above {allowed:.2e}"
