"""A training step's bytes: kept for the backward, and at the peak. AMP in bfloat16, channels_last."""

from __future__ import annotations

from typing import Any

import fused_attn
from fused_attn.bench.memory import measure_memory
from fused_attn.hosts import UnknownModel

from .networks import amp, images, pairs
from .rows import Row, Setting, first_line

SECONDS, STEP = 30, 30


def rows(setting: Setting) -> list[Row]:
    return [Row(attention, attention, (attention, plain)) for attention, plain in pairs(setting)]


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    try:
        with fused_attn.backend(setting.backends[0]), amp(setting):
            figure = measure_memory(*row.what, images(setting), "channels_last", setting.device, search=False)
    except UnknownModel as error:
        return {"status": "absent", "why": first_line(error)}
    return {"status": "ok", "served by": setting.backends[0], **figure.facts}
