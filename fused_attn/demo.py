"""The demo: a small network with attention blocks, trained on real data with its blocks original and fused.

The blocks are pasted as tutorials have them. Nothing here tells the library what they are: `fuse` sees it. Everything
is counted in steps and runs on one thread, so that losses and accuracies are the same on a busy machine; times are the
processor's, of runs in turn.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .fusion import fuse
from .timing import interleaved


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
    squeeze-and-excitation, CBAM and squeeze-and-excitation; then a linear classifier of means over 4 x 4 parts."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *stage(3, width, 1, SEBlock(width)),
            *stage(width, width, 2, CBAM(width)),
            *stage(width, 2 * width, 2, SEBlock(2 * width)),
        )
        self.head = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.stages(x), 4).flatten(1))


@dataclass
class Run:
    """One training: its network, losses and seconds by step, and which of the held-out images it tells right."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    found: Tensor = field(default_factory=lambda: torch.zeros(0))
    accuracy: float = 0.0

    def step(self, images: Tensor, labels: Tensor) -> None:
        begin = time.process_time()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.process_time() - begin)
        self.losses.append(loss.item())

    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        with torch.no_grad():
            self.found = torch.cat([self.model(part).argmax(1) for part in images.split(128)])
        self.accuracy = (self.found == labels).float().mean().item()

    def apart(self, other: Run) -> list[float]:
        """How far the losses of two runs lie from each other, by step."""
        return [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]


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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def moved(model: nn.Module) -> nn.Module:
    """The same network, each weight one unit in the last place higher: what rounding alone makes of a training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, float("inf"))))
    return model


def train(steps: int, batch: int = 32, progress: Callable[[], None] = lambda: None) -> tuple[Run, Run, Run]:
    """Train the same network from the same weights on the same batches, in turn: original, moved (see there), fused."""
    torch.manual_seed(0)
    original = DigitsNet()
    runs = []
    for name, model in (
        ("original", original),
        ("original, moved", moved(copy.deepcopy(original))),
        ("fused", fuse(copy.deepcopy(original))),
    ):
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
    for run in runs:
        run.evaluate(held_images, held_labels)
    return runs[0], runs[1], runs[2]


@dataclass
class Gain:
    """Seconds of forward and backward of one block, original and fused."""

    block: str
    shape: tuple[int, ...]
    original: float
    fused: float

    @property
    def ratio(self) -> float:
        """How many times as long the original takes."""
        return self.original / self.fused


def measure_blocks(original: nn.Module, fused: nn.Module, batch: int = 32, budget: float = 1.0) -> list[Gain]:
    """Each attention block of the two networks on a map of its size, in turn, within the budget in seconds."""
    gains, size = [], 32
    for i, module in enumerate(original.stages):
        if isinstance(module, nn.Conv2d):
            size //= module.stride[0]
            shape = (batch, module.out_channels, size, size)
        elif isinstance(module, (SEBlock, CBAM)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
            grad = torch.ones(shape)
            both = {"original": module.train(), "fused": fused.stages[i].train()}
            calls = {n: lambda block=block, x=x, grad=grad: block(x).backward(grad) for n, block in both.items()}
            timings = interleaved(calls, x.device, budget=budget, clock=time.process_time)
            gains.append(Gain(type(module).__name__, shape, timings["original"].median, timings["fused"].median))
    return gains


def step_ratio(original: Run, fused: Run) -> float:
    """How many times as long a step of the original takes, by medians."""
    return median(original.seconds) / median(fused.seconds)


def plot(original: Run, moved: Run, fused: Run, gains: list[Gain], path: Path) -> None:
    """Loss curves, one over the other, and what is gained."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    curves.plot(original.losses, color="#bbbbbb", linewidth=5, label="original")
    curves.plot(moved.losses, color="black", linewidth=1, linestyle=":", label="original, moved by rounding")
    curves.plot(fused.losses, color="#d62728", linewidth=1.3, label="fused")
    title = f"the same training: {100 * original.accuracy:.1f} % and {100 * fused.accuracy:.1f} % right"
    curves.set(xlabel="step", ylabel="cross-entropy", yscale="log", title=title)
    curves.legend(loc="lower left")
    names = [f"{gain.block}\n{'x'.join(map(str, gain.shape))}" for gain in gains] + ["a whole step"]
    ratios = [gain.ratio for gain in gains] + [step_ratio(original, fused)]
    drawn = bars.barh(names, ratios, color=["#d62728"] * len(gains) + ["#ff9896"])
    bars.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3)
    bars.axvline(1, color="black", linewidth=0.8)
    bars.invert_yaxis()
    bars.set(xlabel="as fast as the original", title="forward and backward, one thread", xlim=(0, 1.2 * max(ratios)))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
