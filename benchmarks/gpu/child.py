"""The process of a part: `python -m benchmarks.gpu.child`.

It reads what to do in one line, and writes lines: {"rows": keys}, then {"trying": key} before each row that it may die
of and {"row": what was found}; {"lost": why} where the device is of no use any more, and ends; {"done": true}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fused_attn.qualification.process import answering, first_line
from fused_attn.timing import synchronize

from .rows import Row, Setting, in_place_of_a_card


def warm(part: Any, setting: Setting, nth: int, of: int) -> None:
    """Compile what the rows need, as one of so many processes."""
    for row in part.rows_to_warm(setting)[nth::of]:
        try:
            part.warm(setting, row)
        except Exception as error:  # it is said where it is measured
            print(f"{row.key}: {first_line(error)}", file=sys.stderr)


def found_by(part: Any, setting: Setting, row: Row) -> dict[str, Any]:
    try:
        return part.measure(setting, row)
    except Exception as error:
        return {"status": "failed", "why": f"{type(error).__name__}: {first_line(error)}"}


def main() -> None:
    say = answering()
    start = json.loads(sys.stdin.readline())
    part = importlib.import_module(f"{__package__}.{start['part']}")
    setting = Setting(start["dry"], Path(start["folder"]), start["seconds"])
    with in_place_of_a_card() if setting.dry else contextlib.nullcontext():
        measured(part, setting, start, say)


def measured(part: Any, setting: Setting, start: dict[str, Any], say: Callable[..., None]) -> None:
    if start["warm"] is not None:
        warm(part, setting, *start["warm"])
        say(done=True)
        return
    rows = part.rows(setting)
    say(rows=[row.key for row in rows])
    skip, given_up = set(start["skip"]), start["given up"]
    for row in rows:
        if row.key in skip:
            continue
        if row.group in given_up:
            say(row={"row": row.key, "status": "failed", "why": f"left out, because {given_up[row.group]}"})
            continue
        say(trying=row.key, group=row.group)
        began = time.monotonic()
        found = found_by(part, setting, row)
        took = round(time.monotonic() - began, 2)
        try:
            synchronize(setting.device)
        except RuntimeError as error:
            say(lost=first_line(error))
            return
        say(row={"row": row.key, **found, "took": took})
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    say(done=True)


if __name__ == "__main__":
    main()
