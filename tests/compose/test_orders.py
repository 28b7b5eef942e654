"""What else is done to a model, before and after `fuse`: the original's results and gradients (docs/works_with.md)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fused_attn import fuse, reference, unfuse
from tests.checks import random, randomised
from tests.compose.test_export import Pasted

X = random(3, 3, 12, 11, dtype=torch.float64)


def original() -> nn.Module:
    blocks = Pasted(8), reference.CBAM(8, reduction=2, kernel_size=3), reference.SKConv(8, groups=4)
    return randomised(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *blocks)).eval()


def layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if type(layer) in (nn.Conv2d, nn.Linear)]


class Adapted(nn.Module):
    """A layer, and a second one of low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(random(base.in_features, 2, dtype=torch.float64))
        self.up = nn.Parameter(random(2, base.out_features, seed=1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


def adapted(model: nn.Module) -> nn.Module:
    for index in (0, 2):
        model[3].fc[index] = Adapted(model[3].fc[index])
    return model


def with_forwards_replaced(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        layer.forward = lambda x, forward=layer.forward: 1.5 * forward(x)  # type: ignore[method-assign]
    return model


def pruned(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


def pruned_for_good(model: nn.Module) -> nn.Module:
    for layer in layers(pruned(model)):
        prune.remove(layer, "weight")
    return model


def normalised(model: nn.Module) -> nn.Module:
    for layer in layers(model):
        parametrizations.weight_norm(layer).parametrizations.weight.original0.data.mul_(2)
    return model


def normalised_for_good(model: nn.Module) -> nn.Module:
    for layer in list(normalised(model).modules()):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight")
    return model


def averaged(model: nn.Module) -> nn.Module:
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for _ in range(2):
        mean.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    return mean


def frozen(model: nn.Module) -> nn.Module:
    return torch.jit.freeze(torch.jit.trace(model, (X,)))


def offloaded(model: nn.Module) -> nn.Module:
    """As accelerate leaves them: layers whose tensors are on no device, but while their forward runs."""
    for layer in (*layers(model[0]), *layers(model[3])):
        here = copy.deepcopy(layer)
        layer.to("meta")
        layer.forward = here.forward
    return model.requires_grad_(False)


#: What takes a model and gives one.
DONE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "adapted": adapted,
    "forwards replaced": with_forwards_replaced,
    "pruned": pruned,
    "pruned for good": pruned_for_good,
    "normalised": normalised,
    "normalised for good": normalised_for_good,
    "averaged": averaged,
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "offloaded": offloaded,
    "without gradients": lambda model: model.requires_grad_(False),
    "frozen": frozen,
}


def found(model: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    y = model(x)
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("name", DONE)
def test_in_any_order(name):
    done, plain = DONE[name], original()
    expected = found(done(copy.deepcopy(plain)))
    models = [done(fuse(copy.deepcopy(plain), strict=True))]
    if name != "frozen":  # which leaves a program
        models += [fuse(done(copy.deepcopy(plain))), fuse(done(fuse(copy.deepcopy(plain))))]
        models.append(unfuse(done(fuse(copy.deepcopy(plain)))))
    for model in models:
        for mine, theirs in zip(found(model), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
