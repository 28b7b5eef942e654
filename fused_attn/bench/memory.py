"""What a training step keeps in memory: bytes held for backward, the peak, and the largest batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .measure import Figure, peak_memory, synchronize
from .models import in_place, networks, training_call, with_least


def kept_bytes(call: Callable[[], object], *others: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of what `call` returns, every storage counted once and whole.

    others: what is there anyway (parameters, buffers, the input) and is not counted.
    """
    found: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor.detach()  # an operator's own result would otherwise hold the operator that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    there = {tensor.untyped_storage()._cdata for tensor in others}
    # What was saved for a branch that is gone by now is not kept.
    kept = sum(size for key, (storage, size) in found.items() if key not in there and not storage.expired())
    del result
    return kept


def kept_by_model(model: nn.Module, x: Tensor) -> int:
    """`kept_bytes` of a forward pass in training mode; running statistics move on."""
    return kept_bytes(lambda: model.train()(x), x, *model.parameters(), *model.buffers())


def state_bytes(model: nn.Module) -> int:
    """Of its parameters, of their gradients, and of its buffers."""
    parameters = sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in model.parameters())
    return parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def largest(fits: Callable[[int], bool], most: int = 1 << 16) -> int:
    """The largest batch up to `most` that fits, 0 where none does: doubled until one does not, then bisected."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_fits(model: nn.Module, x: Tensor) -> Callable[[int], bool]:
    """Whether a training step on x's first image, this many times over, ends without running out of memory."""

    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format

    def fits(batch: int) -> bool:
        try:
            images = x[:1].expand(batch, *x.shape[1:]).contiguous(memory_format=layout)
            training_call(model, images)()
            synchronize(x.device)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()  # what the error's frames held
            if x.device.type == "cuda":
                torch.cuda.empty_cache()

    return fits


def measure_memory(
    attention: str,
    plain: str,
    shape: tuple[int, ...],
    layout: str,
    device: torch.device,
    *,
    with_tails: bool = True,
    budget_bytes: int | None = None,
    search: bool = True,
) -> Figure:
    """Bytes kept for the backward pass of a network with attention: eager, fused, fused with its tails, with tails that
    save the least; its backbone's.

    On CUDA also the peak of a whole step above what was there before it, and the largest batch that runs (search=True),
    on the card as it is. Elsewhere the largest batch is derived from budget_bytes, if given: parameters, gradients,
    buffers and what a batch of this size and one of half of it keep, as a straight line. It leaves out what an operator
    allocates and frees while it runs.
    """
    if budget_bytes is not None and shape[0] < 2:
        raise ValueError(f"shape: expected a batch of at least 2, to see what grows with it; got {shape}")
    x = in_place(torch.randn(shape), layout, device)
    kept: dict[str, int] = {}
    peak: dict[str, int] = {}
    batches: dict[str, int] = {}
    for name, model in with_least(networks(attention, plain, with_tails)).items():
        in_place(model, layout, device)
        kept[name] = kept_by_model(model, x)
        if device.type == "cuda":
            peak[name] = peak_memory(training_call(model, x), device)
        if device.type == "cuda" and search:
            batches[name] = largest(step_fits(model, x))
        elif device.type != "cuda" and budget_bytes is not None:
            half = shape[0] // 2
            image = (kept[name] - kept_by_model(model, x[:half])) / (shape[0] - half)
            fixed = state_bytes(model) + kept[name] - shape[0] * image
            batches[name] = max(0, int((budget_bytes - fixed) / (image + x[0].numel() * x.element_size())))
        model.cpu()  # so that every network has the card for itself
    facts: dict[str, object] = {"kept bytes": kept}
    if peak:
        facts["peak bytes"] = peak
    if batches:
        facts["largest batch"] = batches
        facts["largest batch is"] = "measured" if device.type == "cuda" else f"derived from {budget_bytes} bytes"
    case = {"model": attention, "backbone": plain, "pass": "memory", "layout": layout, "shape": list(shape)}
    return Figure(case, {}, facts)
