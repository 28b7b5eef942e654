#!/usr/bin/env bash
# Triton's interpreter makes int32 of a condition that it spreads over a block, which its 3.9 then takes for no mask.
#
# Versions: triton 3.7.1 and 3.9.0, numpy 2.4, torch 2.13.0 (CPU build).
# Source: a load whose mask is a block of comparisons `&` a comparison of two scalars, with TRITON_INTERPRET=1.
# Expected: the elements for which both hold, as a compiled kernel has it; a mask is int1.
# Seen: the block's data are int32 in both; 3.7.1 loads by them, 3.9.0 raises "mask has unsupported dtype".
# It matters for who tests kernels without a GPU: spread a number instead, `mask & (tl.full(shape, 0, tl.int32) + c != 0)`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 'numpy==2.4.*'
cat > "$folder/load.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def load(x, out, kind, n, k, m, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    mask = (i < n) & (k < m)
    tl.store(kind, mask.handle.data.dtype.num)  # numpy's number of it: 0 is bool, 5 is int32
    tl.store(out + i, tl.load(x + i, mask=mask, other=-1.0))


x, out, kind = torch.arange(4.0), torch.zeros(4), torch.zeros(1, dtype=torch.int32)
try:
    load[(1,)](x, out, kind, 3, 0, 1, SIZE=4)
    print(triton.__version__, kind.item(), out.tolist())
except Exception as error:
    print(triton.__version__, kind.item(), error)
PYTHON
for version in 3.7.1 3.9.0; do
    "$folder/venv/bin/pip" install -q --no-deps "triton==$version"
    TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/load.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
3.7.1 5 [0.0, 1.0, 2.0, -1.0]
3.9.0 5 ValueError('mask has unsupported dtype')
SEEN
