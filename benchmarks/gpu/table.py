"""Verdicts on what the networks call, in training first: the table that ships, written to the part's folder after each
of them. `fuse(model)` on a card whose table is in `fused_attn/tables` does not measure."""

from __future__ import annotations

from typing import Any

import torch

from fused_attn import fuse, nn
from fused_attn.fusion.api import running
from fused_attn.hosts import UnknownModel, build_model
from fused_attn.qualification.calls import Call, typical_calls
from fused_attn.qualification.trial import Unmeasured
from fused_attn.verdicts import Question, Shape, environment_of, write_shipped

from .networks import TABLES, found_before, pairs, placed
from .right import judge_of, seen_in
from .rows import Row, Setting, first_line, sized

SECONDS, STEP = 80, 60
#: Of the seconds, those in which all cores compile what the first rows need, and how many rows that are.
WARM, FIRST = 0.45, 64

#: Of blocks by themselves, where no network can be built.
BLOCKS = ("SqueezeExcite", "ECA", "CBAM")


def rows(setting: Setting) -> list[Row]:
    """Those of one class and question once, those of autocast in bfloat16 first."""
    found: dict[tuple[Question, Shape], tuple[Call, bool]] = {}
    for call, training in every_call(setting):
        found.setdefault(call.asked(training), (call, training))
    ordered = sorted(found.values(), key=lambda pair: (pair[0].question.dtype != torch.bfloat16, not pair[1]))
    return [Row(name_of(call, training), call.question.op, (call, training)) for call, training in ordered]


def name_of(call: Call, training: bool) -> str:
    question, shape = call.question, call.shape
    others = "".join("-" if d is None else str(d)[6] for d in question.others)
    mode = "training" if training else "inference"
    options = ",".join(map(str, question.options))
    return f"{question.op}({options}) {str(question.dtype)[6:]}[{others}] {shape.layout} {sized(call.sizes)} {mode}"


def every_call(setting: Setting) -> list[tuple[Call, bool]]:
    found: list[tuple[Call, bool]] = []
    for attention, _ in pairs(setting):
        try:
            model = placed(fuse(build_model(attention)), setting)
        except UnknownModel:
            continue
        found += typical_calls(model, list(running(model)))
    if setting.dry:
        return found[:1]
    if not found:
        for shape in ((32, 256, 56, 56), (32, 512, 28, 28), (32, 1024, 14, 14), (32, 2048, 7, 7)):
            for name in BLOCKS:
                module = getattr(nn, name)(shape[1]).train()
                calls = seen_in(module, shape, torch.bfloat16, "channels_last", True, 1, True)
                found += [(call, training) for call in calls for training in (True, False)]
    return found


def measure(setting: Setting, row: Row) -> dict[str, Any]:
    call, training = row.what
    try:
        verdict = judge_of(setting).verdict(call, training, {})
    except Unmeasured as error:
        return {"status": "absent", "why": first_line(error)}
    kept = {v.asked: v for v in (*found_before(setting), verdict)}
    folder = setting.folder / TABLES
    folder.mkdir(parents=True, exist_ok=True)
    write_shipped(folder, environment_of(setting.device), kept.values())
    return {"status": "ok", "backend": verdict.backend, "why": verdict.why, "seconds": verdict.seconds}


def rows_to_warm(setting: Setting) -> list[Row]:
    return rows(setting)[:FIRST]


def warm(setting: Setting, row: Row) -> None:
    """Have Triton's cache hold what the row needs, and what `models` does."""
    call, training = row.what
    judge_of(setting).against(call, training, setting.backends[0])
