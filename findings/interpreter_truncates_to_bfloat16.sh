#!/usr/bin/env bash
# Triton's interpreter cuts float32 off to bfloat16, where a compiled kernel rounds it.
#
# Versions: triton 3.7.1, numpy 2.4, torch 2.13.0 (CPU build).
# Source: 1 + 3 * 2^-9, whose neighbours in bfloat16 are 1 and 1 + 2^-7, cast by `.to(tl.bfloat16)` and by storing it to a
# pointer to bfloat16, with TRITON_INTERPRET=1.
# Expected: the nearest, 1 + 2^-7, as tl.cast has it by default ("rtne"), and as torch gives.
# Seen: 1, either way, and -1 for its negative.
# It matters for who tests kernels without a GPU: errors in bfloat16 are twice those of the kernel, and biased to zero.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 triton==3.7.1 'numpy==2.4.*'
cat > "$folder/cast.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, by_cast, by_store, n: tl.constexpr):
    i = tl.arange(0, n)
    value = tl.load(x + i)
    tl.store(by_cast + i, value.to(tl.bfloat16))
    tl.store(by_store + i, value)


x = torch.tensor([1 + 3 * 2**-9, -1 - 3 * 2**-9])
by_cast, by_store = torch.empty(2, 2, dtype=torch.bfloat16)
cast[(1,)](x, by_cast, by_store, n=2)
print("torch", x.bfloat16().tolist(), "cast", by_cast.tolist(), "store", by_store.tolist())
as_seen = x.bfloat16().tolist() == [1.0078125, -1.0078125] and by_cast.tolist() == by_store.tolist() == [1.0, -1.0]
sys.exit(0 if as_seen else "another behaviour than the one seen")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/cast.py"
