"""Whether an installed wheel works: python tools/smoke.py, with the environment's own Python, anywhere.

Needs torch and the wheel, nothing else: the native library is there and gives what plain PyTorch gives, forward and
backward, and fuse finds a pasted block.
"""

from __future__ import annotations

import platform
import sys
import time

import torch

start = time.perf_counter()
import fused_attn  # noqa: E402

seconds = time.perf_counter() - start
from fused_attn import backends  # noqa: E402


class SEBlock(torch.nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = torch.nn.Sequential(
            torch.nn.Linear(channels, channels // 4),
            torch.nn.ReLU(),
            torch.nn.Linear(channels // 4, channels),
            torch.nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def main() -> None:
    if backends.LIBRARY_ERROR:
        sys.exit(f"smoke: {backends.LIBRARY_ERROR}")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), SEBlock(32), fused_attn.nn.CBAM(32))
    x = torch.randn(2, 3, 33, 35)
    results = {}
    fused_attn.fuse(model)
    for name in ("reference", "cpu"):
        model.zero_grad()
        with fused_attn.backend(name):
            y = model(x)
            y.square().mean().backward()
        results[name] = [y.detach(), *(p.grad.clone() for p in model.parameters())]
    for ours, plain in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    fused = [r.name for r in fused_attn.explain(model) if r.fused]
    if fused != ["1", "2"]:
        sys.exit(f"smoke: expected that both blocks run fused; got {fused}")
    versions = f"fused_attn {fused_attn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    built = backends.build_record()
    print(f"{versions}: works; CUDA kernels {built['cuda']['architectures'] or 'none'}; imported in {seconds:.2f} s")


main()
