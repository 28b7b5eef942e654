#!/usr/bin/env bash
# On the CPU a compiled ReLU that is trained takes several times as long as eager's: its mask is written and read a
# lane at a time.
#
# Versions: torch 2.13.0 (CPU build), x86-64 with AVX2 or AVX-512, g++ as Inductor's compiler.
# Source: relu(x + r), as a residual block ends, float32, one thread, forward and backward. Inductor keeps the mask
# result <= 0 as bool: the generated code stores it by at::vec::VecMask::store and loads it by VecMask::from, whose
# general form converts the lanes through an array; the rest of both loops is vectors.
# Expected: not slower than eager, which reads and writes the maps once more.
# Seen: 6 to 13 times eager's time for both; without a gradient, where no mask is kept, compiled is not slower.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 setuptools
cat > "$folder/relu.py" <<'PYTHON'
import statistics
import time

import torch

torch.set_num_threads(1)


def end(x, r):
    return torch.relu(x + r)


def median(*calls):
    times = [[] for _ in calls]
    for turn in range(25):
        for call, of_call in zip(calls, times):
            start = time.process_time()
            call()
            if turn >= 5:
                of_call.append(time.process_time() - start)
    return [statistics.median(t) for t in times]


x, r, grad = torch.randn(3, 4, 512, 20, 20)
compiled = torch.compile(end)
with torch.no_grad():
    eager, of_inductor = median(lambda: end(x, r), lambda: compiled(x, r))
print(f"without gradients: {of_inductor / eager:.1f} times eager's time")
assert of_inductor < 1.5 * eager
x.requires_grad_()
r.requires_grad_()
eager, of_inductor = median(
    lambda: torch.autograd.grad(end(x, r), [x, r], grad), lambda: torch.autograd.grad(compiled(x, r), [x, r], grad)
)
print(f"with gradients: {of_inductor / eager:.1f} times eager's time")
assert of_inductor > 3 * eager
PYTHON
TORCHINDUCTOR_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" -W ignore "$folder/relu.py"
