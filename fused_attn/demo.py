"""The demo: a small network with attention blocks, trained on real data with its blocks original and fused.

The blocks are pasted as tutorials have them. Nothing here tells the library what they are: `fuse` sees it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fusion import fuse


class SEBlock(nn.Module):
    """Squeeze-and-excitation as tutorials write it."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        gate = self.fc(F.adaptive_avg_pool2d(x, 1).view(batch, channels))
        return x * gate.view(batch, channels, 1, 1)


class ChannelAttention(nn.Module):
    """The channel gate of CBAM as tutorials write it: a mask."""

    def __init__(self, in_planes: int, ratio: int = 16) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.max_pool = nn.AdaptiveMaxPool2d(1)
        self.fc1 = nn.Conv2d(in_planes, in_planes // ratio, 1, bias=False)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Conv2d(in_planes // ratio, in_planes, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        avg_out = self.fc2(self.relu1(self.fc1(self.avg_pool(x))))
        max_out = self.fc2(self.relu1(self.fc1(self.max_pool(x))))
        return self.sigmoid(avg_out + max_out)


class SpatialAttention(nn.Module):
    """The spatial gate of CBAM as tutorials write it: a mask."""

    def __init__(self, kernel_size: int = 7) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        avg_out = torch.mean(x, dim=1, keepdim=True)
        max_out, _ = torch.max(x, dim=1, keepdim=True)
        return self.sigmoid(self.conv1(torch.cat([avg_out, max_out], dim=1)))


class CBAM(nn.Module):
    """Both, one after the other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ca, self.sa = ChannelAttention(channels), SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.ca(x)
        return out * self.sa(out)


def stage(channels: int, width: int, stride: int, attention: nn.Module) -> list[nn.Module]:
    """Convolution 3x3, BatchNorm, ReLU, attention."""
    return [
        nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        attention,
    ]


class DigitsNet(nn.Module):
    """RGB images through three stages, the second and third at half the size of the one before, with
    squeeze-and-excitation, CBAM and squeeze-and-excitation; then a linear classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *stage(3, width, 1, SEBlock(width)),
            *stage(width, width, 2, CBAM(width)),
            *stage(width, 2 * width, 2, SEBlock(2 * width)),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


@dataclass
class Run:
    """One training: its network, losses and seconds by step, and accuracy on the held-out images."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        begin = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())

    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            parts = [self.model(part).argmax(1) for part in images.split(128)]
        self.accuracy = (torch.cat(parts) == labels).float().mean().item()


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits (1,797 images of 8 x 8), enlarged to 32 x 32, in three equal
    channels: training and held-out parts."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, scale_factor=4, mode="bilinear", align_corners=False)
    images = images.repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    held_out = len(labels) // 5
    return images[held_out:], labels[held_out:], images[:held_out], labels[:held_out]


def train(
    steps: int, batch: int = 64, seconds: float = float("inf"), progress: Callable[[], None] = lambda: None
) -> tuple[Run, Run]:
    """Train the same network twice from the same weights on the same batches, original and fused in turn.

    Ends after `steps`, or after the first step past `seconds`.
    """
    start = time.monotonic()
    torch.manual_seed(0)
    original = DigitsNet()
    runs = []
    for name, model in (("original", original), ("fused", fuse(copy.deepcopy(original)))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
        runs.append(Run(name, model, optimizer, schedule))
    images, labels, held_images, held_labels = digits()
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        for run in runs if step % 2 else reversed(runs):
            run.step(images[chosen], labels[chosen])
        progress()
        if time.monotonic() - start > seconds:
            break
    for run in runs:
        run.evaluate(held_images, held_labels)
    return runs[0], runs[1]


def step_ratio(original: Run, fused: Run) -> float:
    """How many times as long a step of the original takes, by medians."""
    return median(original.seconds) / median(fused.seconds)


def plot(original: Run, fused: Run, path: Path) -> None:
    """Loss curves of both, one over the other, and the step times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, times) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 1), layout="constrained")
    curves.plot(original.losses, color="#999999", linewidth=4, label="original")
    curves.plot(fused.losses, color="#d62728", linewidth=1.2, label="fused")
    curves.set(xlabel="step", ylabel="cross-entropy", yscale="log", title="the same training")
    curves.legend()
    times.boxplot(
        [[1e3 * s for s in run.seconds] for run in (original, fused)],
        tick_labels=("original", "fused"),
        showfliers=False,
    )
    times.set(ylabel="ms a step", title=f"{step_ratio(original, fused):.2f}x", ylim=(0, None))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
