"""The process that measures: `python -m fused_attn.qualification.child`.

It says where it is, reads one job a line, and writes lines: {"tried": [backends]} before each step that it may die of,
then {"verdict": ...}, {"unmeasured": why}, or {"lost": why} where the device is of no use any more, and ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from ..verdicts import environment_of, verdict_as_json
from .calls import call_from_json
from .process import answering, first_line
from .trial import Judge, Unmeasured


def main() -> None:
    say = answering()

    def told(names: Sequence[str]) -> None:
        say(tried=list(names))

    start = json.loads(sys.stdin.readline())
    device = torch.device(start["device"])
    torch.set_num_threads(start["threads"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    judge = Judge(device, told)
    say(environment=environment_of(device))
    for line in sys.stdin:
        job = json.loads(line)
        try:
            verdict = judge.verdict(call_from_json(job["call"]), job["training"], job["failed"])
        except Unmeasured as error:
            say(unmeasured=str(error))
        except Exception as error:  # plain PyTorch itself fails, or the device is lost
            say(lost=first_line(error))
            return
        else:
            say(verdict=verdict_as_json(verdict))


if __name__ == "__main__":
    main()
