#!/usr/bin/env bash
# On the CPU the gradient of BatchNorm2d is wrong for a batch of one whose map is turned into rows of channels behind it.
#
# Versions: torch 2.13.0 (CPU build), x86-64.
# Source: bn(x).flatten(2).transpose(1, 2), as in front of attention between positions, its gradient contiguous. Back at
# the BatchNorm that gradient has a batch stride of C, which for a batch of one says nothing, and channels side by side.
# Expected: the gradient of x that a batch of two gives its samples, or that the same numbers in another layout give.
# Seen: other numbers, in training and in evaluation, in float32 and in float64, and no error. With two samples, or with
# a hook that makes the gradient contiguous, the gradient is right.
# It matters for who trains, or explains a prediction, one image at a time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch

print("torch", torch.__version__)
torch.manual_seed(0)
wrong = {}
for batch in (1, 2):
    for training in (True, False):
        norm = torch.nn.BatchNorm2d(8).double().train(training)
        x = torch.randn(batch, 8, 5, 6, dtype=torch.double, requires_grad=True)
        rows = torch.randn(batch, 30, 8, dtype=torch.double)
        found = []
        for contiguous in (False, True):
            y = norm(x)
            if contiguous:
                y.register_hook(lambda g: g.contiguous())
            loss = (y.flatten(2).transpose(1, 2) * rows).sum()
            found += torch.autograd.grad(loss, x)
        wrong[batch, training] = (found[0] - found[1]).abs().max().item() / found[1].abs().max().item()
        print(f"batch {batch}, {'training' if training else 'evaluation'}: off by {wrong[batch, training]:.1e}")
as_seen = all((difference > 0.1) == (batch == 1) for (batch, _), difference in wrong.items())
sys.exit(0 if as_seen else "another behaviour than the one seen")
PYTHON
