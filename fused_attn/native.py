"""The native library, loaded before Python defines any operator: it defines its own, for programs without Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

LIBRARY_PATH = Path(__file__).with_name("_native.so")


def build_record() -> dict[str, Any]:
    """What setup.py wrote about the native library: what was built, with what, and why not more. Empty where there is
    none that can be read."""
    try:
        record = json.loads(LIBRARY_PATH.with_name("_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def load_library() -> str | None:
    """Load the native library; None, or why there is none."""
    if not LIBRARY_PATH.exists():
        reason = build_record().get("cpu", {}).get("reason") or "no record of a build"
        return f"the native library was not built: {reason}"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the native library does not load: {error.__cause__ or error}"  # torch's own names the file only
    return None


#: Why there is no native library here, or None.
LIBRARY_ERROR = load_library()
