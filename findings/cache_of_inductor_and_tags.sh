#!/usr/bin/env bash
# Inductor's cache on disk gives code that was made for an operator with other tags.
#
# Versions: torch 2.13.0 (CPU build); the C++ compiler of the machine.
# Source: an operator of a library, behind a convolution whose result Inductor lays channels last. The operator is
# tagged needs_fixed_stride_order, is compiled, and then is tagged flexible_layout, as a new version of the library may:
# two processes, one cache folder.
# Expected: the second gets the map as the convolution writes it, channels last, as with a cache that is empty.
# Seen: a hit in the cache; the map is still copied to the strides that the old tag asked for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cat > "$folder/tags.py" <<'PYTHON'
import sys

import torch

seen = []


def twice(x):
    seen.append(x.stride(1))
    return x * 2


library = torch.library.Library("demo", "DEF")
library.define("twice(Tensor x) -> Tensor", tags=(getattr(torch.Tag, sys.argv[1]), torch.Tag.pt2_compliant_tag))
library.impl("twice", twice, "CPU")
torch.library.register_fake("demo::twice", lambda x: torch.empty_like(x), lib=library)
convolution = torch.nn.Conv2d(8, 8, 3, padding=1)
with torch.no_grad():
    torch.compile(lambda x: torch.ops.demo.twice(convolution(x)))(torch.randn(2, 8, 16, 16))
print("channels_last" if seen == [1] else "nchw")
PYTHON
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" -W ignore "$folder/tags.py" "$2"; }
first=$(run cache needs_fixed_stride_order)
second=$(run cache flexible_layout)
alone=$(run empty flexible_layout)
echo "needs_fixed_stride_order: $first; then flexible_layout: $second; flexible_layout with an empty cache: $alone"
[ "$first $second $alone" = "nchw nchw channels_last" ]
