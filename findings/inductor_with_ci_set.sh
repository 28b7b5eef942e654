#!/usr/bin/env bash
# With the variable CI in the environment, Inductor refuses an operator that has a decomposition which nobody gave it.
#
# Versions: torch 2.13.0 (CPU build); the C++ compiler of the machine. 2.10, 2.11 and 2.14 ask for CI in the same place.
# Source: an operator of a library with a decomposition in torch's own table (torch._decomp.register_decomposition), so
# that exporters can write it out. Inductor's own decompositions do not have it: it is to be called.
# Expected: code that calls the operator, wherever it runs.
# Seen: that, and where CI is set, as hosted runners do for all they run, an InductorError, "a decomposition exists, we
# should switch to it": a check of torch's own lists of operators.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cat > "$folder/ci.py" <<'PYTHON'
import torch
from torch._decomp import register_decomposition

library = torch.library.Library("demo", "DEF")
library.define("twice(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("twice", lambda x: x * 2, "CPU")
torch.library.register_fake("demo::twice", torch.empty_like, lib=library)
register_decomposition(torch.ops.demo.twice.default)(lambda x: x + x)
try:
    compiled = torch.compile(torch.ops.demo.twice.default)
    print("called" if torch.equal(compiled(torch.ones(8)), torch.full((8,), 2.0)) else "another value")
except torch._inductor.exc.InductorError as error:
    print("refused" if "a decomposition exists" in str(error) else error)
PYTHON
run() { env -u CI "$@" TORCHINDUCTOR_CACHE_DIR="$folder/${1:-none}" "$folder/venv/bin/python" -W ignore "$folder/ci.py"; }
without=$(run)
with=$(run CI=true)
echo "without CI: $without; with CI=true: $with"
[ "$without $with" = "called refused" ]
