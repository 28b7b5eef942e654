"""Calls of the fused functions: which a model makes, as plain data that another process makes them from again.

They are seen by the interpreter's profiling hook of this thread, so that the functions hold no code for it, and mostly
on tensors without data: a block by itself, on maps as it gets them or as one of its channel count may get.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import functional
from ..backends import CANDIDATES, PLAIN, autocasts, is_ordinary
from ..reference.layout import lies_channels_last
from ..verdicts import Question, Shape, asked_as_json, asked_from_json, class_of, name_of, room_for


class Call(NamedTuple):
    """question: without regard to training. sizes: of the map that chooses the backend. room: as in `Verdict`.
    arguments: of the function of `functional`; a tensor is its shape, its dtype and the order of its axes in memory, a
    function is that it is one."""

    question: Question
    device: torch.device
    shape: Shape
    sizes: tuple[int, ...]
    room: tuple[int, int]
    function: str
    arguments: dict[str, Any]
    autocast: bool

    def asked(self, training: bool) -> tuple[Question, Shape]:
        """What there is one verdict about."""
        return self.question._replace(training=training), self.shape


def call_as_json(call: Call) -> dict[str, Any]:
    asked = asked_as_json(call.question, call.shape)
    return {**call._asdict(), "question": asked, "shape": None, "device": str(call.device)}


def call_from_json(record: dict[str, Any]) -> Call:
    question, shape = asked_from_json(record["question"])
    made = {"question": question, "shape": shape, "device": torch.device(record["device"])}
    return Call(**{**record, **made, "sizes": tuple(record["sizes"]), "room": tuple(record["room"])})


# ---- seeing them ----

_FUNCTIONS = {
    function.__code__: name
    for name, function in vars(functional).items()
    if inspect.isfunction(function) and function.__module__ == functional.__name__ and not name.startswith("_")
}


@contextlib.contextmanager
def seen() -> Iterator[list[Call]]:
    """The calls that this thread makes within, one of each question and class of shape."""
    found: list[Call] = []
    known: set[tuple[Question, Shape]] = set()

    def look(frame: Any, event: str, _: Any) -> None:
        if event != "call" or frame.f_code is not functional._choose.__code__:
            return
        asked, caller = frame.f_locals, frame.f_back
        while caller.f_code not in _FUNCTIONS:
            caller = caller.f_back
        call = _call(asked["op"], asked["options"], (asked["x"], *asked["others"]), caller)
        if call is not None and (call.question, call.shape) not in known:
            known.add((call.question, call.shape))
            found.append(call)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _call(op: str, options: tuple[Any, ...], tensors: tuple[Tensor | None, ...], frame: Any) -> Call | None:
    """None where no backend may serve it, and for an empty map, of which nothing can be said."""
    x = tensors[0]
    if x is None or not is_ordinary(x) or not all(t is None or type(t) in PLAIN for t in tensors) or x.numel() == 0:
        return None
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    arguments = {name: _plain(frame.f_locals[name]) for name in names}
    question = Question(op, options, x.dtype, tuple(None if t is None else t.dtype for t in tensors[1:]), False)
    shape, function = class_of(x.shape, x.stride(), x.itemsize), _FUNCTIONS[code]
    arguments |= LEFT_OUT.get(function, {})
    room = room_for(x, tensors[1:])
    return Call(question, x.device, shape, tuple(x.shape), room, function, arguments, autocasts(x))


#: Arguments that are not repeated: a process by itself has no group, what is written over is no leaf, and no layer
#: follows that would keep the result.
LEFT_OUT: dict[str, dict[str, Any]] = {
    "norm_gate": {"group": None, "inplace": False, "save": "all"},
    "spatial_gate": {"keep": None},
    "cbam": {"keep": None},
}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
        return {"sizes": list(value.shape), "dtype": name_of(value.dtype), "order": order}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {"callable": True} if callable(value) else value


# ---- of a block by itself ----

BATCH = 32
#: What people cast to where parameters are in float32.
AUTOCAST = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}


@contextlib.contextmanager
def buffers_kept(block: nn.Module) -> Iterator[None]:
    """The block's buffers, such as running statistics, are afterwards what they were. Those that are so are not written
    to: a backward that is still to come may read them, and minds."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if _differ(buffer, value):
                    buffer.copy_(value)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Also where nobody can tell, as without data."""
    try:
        return not torch.equal(one, other)
    except (NotImplementedError, RuntimeError):
        return True


@contextlib.contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Every part of it is afterwards in the mode that it was in."""
    before = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


def maps_in_run(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    inputs: tuple[Any, ...],
    keywords: dict[str, Any],
    like: Callable[[Tensor], Tensor],
) -> list[tuple[nn.Module, Tensor]]:
    """(block, like(map)) of the maps that the blocks get where the model runs on these inputs, in evaluation mode and
    without gradients: of those of a block that are alike once."""
    maps: dict[tuple[Any, ...], tuple[nn.Module, Tensor]] = {}

    def remember(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next(iter((*arguments, *named.values())), None)
        if isinstance(x, Tensor):
            maps.setdefault((block, x.shape, x.stride(), x.dtype, x.device), (block, like(x)))

    with contextlib.ExitStack() as stack:
        stack.enter_context(modes_kept(model))
        for block in blocks:
            hook = block.register_forward_pre_hook(remember, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        model.eval()
        model(*inputs, **keywords)
    return list(maps.values())


def without_data(x: Tensor) -> Tensor:
    """A tensor of the same sizes, strides, dtype and device that takes no memory."""
    with FakeTensorMode():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def calls_on(block: nn.Module, x: Tensor, training: bool) -> list[Call]:
    """What a block calls, in that mode, on a map like x: run without data, so that nothing of it changes. Nothing where
    it cannot be run so."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    # Numbers of one element have values there, too: a BatchNorm's count of batches goes up.
    kept = buffers_kept(block) if training else contextlib.nullcontext()
    try:
        with modes_kept(block), kept, fake, torch.set_grad_enabled(training):
            block.train(training)
            map_ = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
            with seen() as found:
                type(block).forward(block, *(map_,) * _maps_of(block))
    except Exception:  # one value a channel, a rank that it does not take, a number that is read
        return []
    return found


def _maps_of(block: nn.Module) -> int:
    """How many maps a forward cannot do without: here they are alike, as those of decoders are."""
    parameters = inspect.signature(type(block).forward).parameters.values()
    needed = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
    return max(needed - 1, 1)  # without the block itself


def typical_calls(model: nn.Module, blocks: Iterable[nn.Module]) -> list[tuple[Call, bool]]:
    """(call, training) of each of these blocks of the model, on maps of the sizes at which convolutional networks have
    its channel count: a batch of one, and a batch of `BATCH` in training too. Of parameters in float32 also under
    autocast."""
    channels = _channels_before(model)
    last = any(_is_channels_last(p) for p in model.parameters())
    found: dict[tuple[Question, Shape], tuple[Call, bool]] = {}
    for block in blocks:
        tensor = next(iter([*block.parameters(), *model.parameters()]), None)
        if tensor is None or not tensor.is_floating_point() or tensor.device.type not in CANDIDATES:
            continue
        guess = _channels_of(block, channels.get(block, 256), tensor)
        if guess is None:
            continue
        c, rank = guess
        device = tensor.device.type
        for dtype in (tensor.dtype, *(AUTOCAST.get(device, ()) if tensor.dtype == torch.float32 else ())):
            with torch.autocast(device, None if dtype == tensor.dtype else dtype, enabled=dtype != tensor.dtype):
                for batch, mode in ((1, False), (BATCH, False), (BATCH, True)):
                    for side in _sides(c):
                        x = _map((batch, c, *_space(side, rank)), dtype, tensor.device, last)
                        for call in calls_on(block, x, mode):
                            # In evaluation mode, too, gradients may be on.
                            for training in (False,) if batch == 1 else (mode, True):
                                found.setdefault(call.asked(training), (call, training))
    return list(found.values())


def _map(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    with FakeTensorMode():
        x = torch.empty((sizes[0], *sizes[2:], sizes[1]) if channels_last else sizes, dtype=dtype, device=device)
        return x.movedim(-1, 1) if channels_last else x


def _is_channels_last(p: Tensor) -> bool:
    return p.dim() == 4 and lies_channels_last(p)


def _sides(channels: int) -> tuple[int, int]:
    """Two sides of a map of so many channels: a ResNet's after its bottlenecks, and about that of a network which has
    more channels early."""
    for least, sides in ((1025, (7, 14)), (513, (14, 7)), (257, (28, 14)), (65, (56, 28))):
        if channels >= least:
            return sides
    return 112, 56


def _space(side: int, rank: int) -> tuple[int, ...]:
    return {1: (side * side,), 2: (side, side), 3: (max(side // 4, 2), side, side)}[rank]


def _channels_before(model: nn.Module) -> dict[nn.Module, int]:
    """For every module the channels of the last convolution or norm before it, as they are listed."""
    found: dict[nn.Module, int] = {}
    last = 256
    for module in model.modules():
        found[module] = last
        count = getattr(module, "num_features", None) or getattr(module, "out_channels", None)
        last = count if isinstance(count, int) else last
    return found


def _channels_of(block: nn.Module, before: int, tensor: Tensor) -> tuple[int, int] | None:
    """(channels, spatial rank) of a map that a block runs on: as it says itself, as many as come before it, or one of
    its parameters' sizes."""
    own: Any = getattr(block, "channels", None)
    sizes = sorted({n for p in block.parameters() for n in p.shape[:2]}, reverse=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it reports what does not fit as an error
    disabled, log.disabled = log.disabled, True
    try:
        for rank in (2, 3, 1):
            for n in (own, before, *sizes):
                if isinstance(n, int) and n > 1:
                    x = _map((2, n, *_space(8, rank)), tensor.dtype, tensor.device, False)
                    if calls_on(block, x, False):
                        return n, rank
    finally:
        log.disabled = disabled
    return None
