"""What the host side of the Triton kernels costs where there is no GPU: python -m tests.kernels.host PART...

- variants: kernels that a training step of an SE-ResNet-50 needs, by batch; and whether another batch makes new ones,
  for every case of `compile_ahead`.
- launches: of each op, in the first calls of a kind and in those that are replayed.
- times: [microseconds of Python a call, of a unit of work then] (medians, one thread), launches included but for the
  driver's part in them: `kernel` of the operator's function, replayed, and `as written`; `operator` through torch's
  dispatcher; `function` through `fused_attn.functional` and, with `grad`, autograd (backward: `torch.autograd.grad`).
- compiled: an SE block's kernels, compiled for sm_90 and launched.

Prints JSON. A process of its own, because under TRITON_INTERPRET there is no host side.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs

import fused_attn
from fused_attn import functional
from fused_attn.hosts import define_torchvision_operators
from fused_attn.ops.common import KERNELS, below
from tests.kernels import compile_ahead
from tests.kernels.stand_in import OnMeta, stand_in

BATCHES = (32, 1, 2, 7, 100, 256)


def variants() -> dict[str, Any]:
    define_torchvision_operators()
    import timm

    steps: dict[str, list[int]] = {}
    for layout, tails in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
        model = fused_attn.fuse(timm.create_model("seresnet50").train(), tails=tails).to("meta", torch.bfloat16)
        model = model.to(memory_format=layout)
        with stand_in() as standing, OnMeta():
            counts = steps[f"{layout}, tails: {tails}"] = []
            for batch in BATCHES:
                x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=layout)
                model(x).sum().backward()
                counts.append(standing.variants())
    return {"seresnet50": steps, "new for another batch": new_for_another_batch()}


def new_for_another_batch() -> dict[str, list[str]]:
    """By case, the kernels of which a batch needs a variant that another does not."""
    of = {
        compile_ahead.Case: compile_ahead.launches,
        compile_ahead.Selection: compile_ahead.launches_of_select,
        compile_ahead.Cross: compile_ahead.launches_of_cross,
    }
    cases = (*compile_ahead.CASES, *compile_ahead.SELECTIONS_OF, *compile_ahead.CROSSES)
    found: dict[str, list[str]] = {}
    for case in {c._replace(shape=(1, *c.shape[1:])): None for c in cases}:
        first: set[Any] = set()
        for batch in (256, 1, 7):
            launches = of[type(case)](case._replace(shape=(batch, *case.shape[1:])))
            seen = {compile_ahead.variant(kernel, given) for kernel, given in launches}
            first = first or seen
            if seen != first:
                found[str(case)] = sorted({v.kernel.__name__ for v in seen ^ first})
    return found


def excitation(channels: int, make: Callable[..., Tensor]) -> list[Tensor]:
    hidden = channels // 16
    return [make(hidden, channels), make(hidden), make(channels, hidden), make(channels)]


def calls(layout: torch.memory_format, batch: int = 32) -> dict[str, dict[str, Callable[[], Any]]]:
    """By op and direction, ways to call it: an SE block's and a CBAM's, on 256 × 14 × 14."""

    def make(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    x, grad = (make(batch, 256, 14, 14).to(memory_format=layout) for _ in range(2))
    weights, spatial = excitation(256, make), [make(1, 2, 7, 7), None]
    se = (*weights, None, None, None), (0, 0, 0, 1, 5, 0, 0)
    both = (*weights, *spatial, *(None,) * 5), (1e-5, 0, 3, 0, 1, 5, 0, 0, 5, 0, 0)
    found = {}
    for name, (tensors, codes), function, parameters in (
        ("channel_gate", se, functional.channel_gate, weights),
        ("cbam", both, functional.cbam, [*weights, spatial[0]]),
    ):
        forward, backward = (getattr(torch.ops.fused_attn, f"{name}{of}").triton for of in ("", "_backward"))
        y, *states = KERNELS[name](x, *tensors, *codes)
        leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
        result = function(*leaves)
        given, given_back = (x, *tensors, *codes), (grad, x, None, *states, *tensors, *codes)
        found[f"{name} forward"] = {
            "as written": below_autograd(lambda f=KERNELS[name].__wrapped__, a=given: f(*a)),
            "kernel": below_autograd(lambda f=KERNELS[name], a=given: f(*a)),
            "operator": lambda f=forward, a=given: below(f, *a),
            "function": lambda f=function, a=(x, *parameters): f(*a),
            "function, grad": lambda f=function, a=leaves: f(*a),
        }
        found[f"{name} backward"] = {
            "as written": below_autograd(lambda f=KERNELS[f"{name}_backward"].__wrapped__, a=given_back: f(*a)),
            "kernel": below_autograd(lambda f=KERNELS[f"{name}_backward"], a=given_back: f(*a)),
            "operator": lambda f=backward, a=given_back: below(f, *a),
            "function": lambda y=result, a=leaves: torch.autograd.grad(y, a, grad, retain_graph=True),
        }
    return found


def launches() -> dict[str, list[int]]:
    """Launches of the first, the second (recorded) and the third call (replayed) of a kind."""
    found = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        with stand_in() as standing:
            for name, ways in calls(layout, batch=3).items():
                counts = []
                for _ in range(4):
                    standing.launches = []
                    ways["kernel"]()
                    counts.append(len(standing.launches))
                found[f"{name} {layout}"] = counts
            found[f"heard {layout}"] = heard(ways["kernel"])
            found[f"replayed {layout}"] = sorted(
                name for name, kernel in KERNELS.items() if any(type(p) is not bool for p in kernel.plans.values())
            )
    return found


def heard(call: Callable[[], Any]) -> list[int]:
    """Launches that a listener hears of, of a call that was replayed before."""
    counts = []
    for listens in (True, False):
        names: list[Any] = []
        if listens:
            knobs.runtime.launch_enter_hook.add(names.append)
        call()
        knobs.runtime.launch_enter_hook.calls.clear()
        counts.append(len(names))
    return counts


def median(call: Callable[[], Any], times: int = 200) -> float:
    for _ in range(10):
        call()
    found = []
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        found.append(time.perf_counter_ns() - start)
    return statistics.median(found) / 1e3


def below_autograd(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call where a kernel is called by torch."""

    def function() -> Any:
        guard = torch._C._AutoDispatchBelowAutograd()
        try:
            return call()
        finally:
            del guard

    return function


def work() -> None:
    """A measure of this machine, now: what a launch is made of."""
    for _ in range(10):
        t = torch.empty_strided((8, 64), (64, 1), dtype=torch.float32)
        t.data_ptr(), hash((t.dtype, t.shape, t.stride()))


def times() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with stand_in() as standing:
        ways = calls(torch.channels_last)
        standing.launches = None
        for _ in range(3):  # of a machine that does other things too, the quietest of three
            unit = median(work)
            for name, by_way in ways.items():
                for way, call in by_way.items():
                    key = f"{name}: {way}"
                    took = round(median(call), 1), round(unit, 1)
                    found[key] = min(found.get(key, took), took, key=lambda pair: pair[0])
    return found


def compiled() -> dict[str, list[int]]:
    with stand_in(compiles=True) as standing:
        for name, ways in calls(torch.channels_last, batch=3).items():
            if name.startswith("channel_gate"):
                for _ in range(3):
                    ways["kernel"]()
        return {name: [len(keys)] for name, keys in standing.compiled.items()}


if __name__ == "__main__":
    json.dump({part: globals()[part]() for part in sys.argv[1:]}, sys.stdout, indent=1)
