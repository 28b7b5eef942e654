"""The native library, loaded before Python defines any operator: it defines its own, for programs without Python."""

from __future__ import annotations

import json
import struct
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


def _is_cut_short() -> bool:
    """Whether the file ends before what its headers say. The system's loader does not look: it maps what is not there,
    and reading that ends the process."""
    with open(LIBRARY_PATH, "rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return False  # the loader refuses it, or knows more
        segments, sections, size, count, section_size, section_count = struct.unpack_from("<32x2Q6x4H", header)
        if size != 56:
            return False
        file.seek(segments)
        table = file.read(size * count)
        if len(table) < size * count:
            return True
        end = sections + section_size * section_count
        for at in range(0, size * count, size):
            offset, bytes_there = struct.unpack_from("<8xQ16xQ", table, at)
            end = max(end, offset + bytes_there)
        return end > file.seek(0, 2)


def load_library() -> str | None:
    """Load the native library; None, or why there is none."""
    if not LIBRARY_PATH.exists():
        reason = build_record().get("cpu", {}).get("reason") or "no record of a build"
        return f"the native library was not built: {reason}"
    try:
        if _is_cut_short():
            return f"the native library does not load: {LIBRARY_PATH}: cut short; install it again"
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the native library does not load: {error.__cause__ or error}"  # torch's own names the file only
    return None


#: Why there is no native library here, or None.
LIBRARY_ERROR = load_library()
