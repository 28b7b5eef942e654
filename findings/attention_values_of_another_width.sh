#!/usr/bin/env bash
# On the CPU scaled_dot_product_attention keeps the matrix of all pairs in memory where the values are of another width
# than queries and keys.
#
# Versions: torch 2.13.0 (CPU build), x86-64.
# Source: one head, 8192 positions, float32, no mask, no dropout; queries and keys of 64 numbers. Such values are what
# DANet's and SAGAN's attention between positions has: C, beside C / 8.
# Expected: the memory of the flash kernel, which 64 numbers a value have: a few MiB.
# Seen: with 8, 65 or 128 numbers a value more than the matrix, 8192^2 numbers of 256 MiB, is taken, and nothing says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cat > "$folder/one.py" <<'PYTHON'
import resource
import sys

import torch

width, positions = int(sys.argv[1]), 8192
query, key = torch.randn(2, 1, 1, positions, 64)
value = torch.randn(1, 1, positions, width)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.nn.functional.scaled_dot_product_attention(query, key, value)
print(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
PYTHON
for width in 64 8 65 128; do
    mib=$("$folder/venv/bin/python" -W ignore "$folder/one.py" "$width")
    echo "values of $width numbers: $mib MiB"
    if [ "$width" = 64 ]; then [ "$mib" -lt 100 ]; else [ "$mib" -gt 256 ]; fi
done
