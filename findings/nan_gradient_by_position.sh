#!/usr/bin/env bash
# On the CPU the gradient of some activations at NaN depends on where in memory the element lies.
#
# Versions: torch 2.13.0 (CPU build), x86-64 with AVX2 or AVX-512.
# Source: 33 float32 NaNs through one activation, the incoming gradient all ones.
# Expected: one gradient for one value, whatever its place: 33 equal numbers.
# Seen: the vectorised loop and the loop over what is left of a vector's width disagree. hardswish: NaN in whole
# vectors, 1 in the rest; hardtanh, relu6, hardshrink and softshrink: 0 and 1, though their values are NaN everywhere.
# (Which of the two is 0 is printed below.) relu and clamp agree with themselves.
# It matters where results are compared element by element, or between layouts: the same tensor in channels_last has
# other elements at its end.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
OMP_NUM_THREADS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
found = {}
for f in (F.hardswish, F.hardtanh, F.relu6, F.hardshrink, F.softshrink, F.relu, torch.clamp_min):
    x = torch.full((33,), float("nan"), requires_grad=True)
    y = f(x, 0.0) if f is torch.clamp_min else f(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert y.isnan().all()
    found[f.__name__] = len({str(value) for value in gradient.tolist()})
    print(f"{f.__name__:12} first {gradient[0].item():4} last {gradient[-1].item():4}")
as_seen = {name: 1 if name in ("relu", "clamp_min") else 2 for name in found}
sys.exit(0 if found == as_seen else "another behaviour than the one seen")
PYTHON
