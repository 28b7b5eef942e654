"""What every op file needs: definition of an operator's overloads, its gradients, layouts, and double backward.

The schema and the fake kernel are defined here in Python, so that both exist where the native library does
not; where it does, the schemas are its own, which are the same (csrc/schemas.cpp). The native library registers `.cpu`
and `.cuda`; `.triton` imports its kernel at the first call.

Every operator has an Autograd kernel, so that a program which holds it (exported, compiled, traced) has the gradients
of the function that it came from. That kernel is Python and costs as much as a small map; a caller in Python makes
autograd's node itself, where one is needed, and calls past it (`below`). Both nodes are made of the same two functions:
keep(ctx, inputs, results), which saves, and gradients(ctx, *grads), which returns None and then a gradient an input.
The inputs are the arguments up to the codes behind them, lists flattened; ctx.codes and ctx.backend are set.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .. import native  # noqa: F401 (it defines its operators first)
from . import formulas, resident
from .inlined import called_by_inductor, tell_inductor

LIBRARY = torch.library.Library("fused_attn", "FRAGMENT")
BACKENDS = ("cpu", "triton", "cuda")

#: What `fused_attn.backends.OPS` calls an op -> the operators that it is made of.
OPERATORS: dict[str, list[str]] = {}

#: By operator, the functions of `fused_attn.kernels` that were called already.
KERNELS: dict[str, Callable[..., Any]] = {}

#: By operator, the fake kernel.
FAKES: dict[str, Callable[..., Any]] = {}

#: Operators of which the native library has another schema: one that was built from other sources.
OUTDATED: set[str] = set()

#: One overload a backend.
Overloads = dict[str, torch._ops.OpOverload]
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_in_dynamo = torch.compiler.is_dynamo_compiling
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_vmapped = torch._C._functorch.is_batchedtensor

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def is_defined(name: str, overload: str) -> str | None:
    """The schema of an operator that the native library defines."""
    try:
        return str(torch._C._get_schema(f"fused_attn::{name}", overload))
    except RuntimeError:
        return None


#: From whether the native library makes its tensors by torch's `empty`, which fills them with NaN where
#: `torch.utils.deterministic` says so, and not past it, which is faster; to whether it did before.
FRESH_MEMORY = "fresh_memory"
if not is_defined(FRESH_MEMORY, ""):
    LIBRARY.define(f"{FRESH_MEMORY}(bool by_torch) -> bool")

Keep = Callable[[Any, Sequence[Any], Any], None]
Gradients = Callable[..., tuple[Tensor | None, ...]]


def define(name: str, schema: str, fake: Callable, module: str | None = None, *, any_layout: bool = True) -> Overloads:
    """Define `fused_attn::name` with one overload a backend, all with this schema and fake kernel.

    any_layout: no shape, and nothing kept for a backward, depends on how a map lies, so that Inductor may give maps as
    a convolution wrote them; without it they are copied to the strides that were traced, and the results back.

    The Triton kernel is the function of that name in `fused_attn.kernels.<module>`, by default the operator's own.
    """
    module = module or name.removesuffix("_backward")
    OPERATORS.setdefault(module, []).append(name)
    FAKES[name] = fake

    def triton_kernel(*args):
        kernel = KERNELS.get(name)
        if kernel is None:
            kernel = KERNELS[name] = kernel_of(module, name)
        return kernel(*args)

    def fake_kernel(*args):
        tell_inductor()
        formulas.tell_counter()
        return fake(*args)

    tags = (torch.Tag.pt2_compliant_tag, *((torch.Tag.flexible_layout,) if any_layout else ()))
    for backend in BACKENDS:
        defined = is_defined(name, backend)
        if not defined:
            LIBRARY.define(f"{name}.{backend}{schema}", tags=tags)
        elif str(torch._C.parse_schema(f"fused_attn::{name}.{backend}{schema}")) != defined:
            OUTDATED.add(name)
        torch.library.register_fake(f"fused_attn::{name}.{backend}", fake_kernel, lib=LIBRARY)
    LIBRARY.impl(f"{name}.triton", triton_kernel, "CUDA")
    if os.environ.get("TRITON_INTERPRET") == "1":
        LIBRARY.impl(f"{name}.triton", triton_kernel, "CPU")
    packet = getattr(torch.ops.fused_attn, name)
    overloads: Overloads = {backend: getattr(packet, backend) for backend in BACKENDS}
    for overload in overloads.values():
        overload._tags = list(tags)  # the library's definitions have none: the stable ABI of torch 2.10 takes none
    return overloads


def kernel_of(module: str, name: str) -> Callable[..., Any]:
    """An operator's function in `fused_attn.kernels`; calls of a kind that was made before are replayed."""
    function = getattr(importlib.import_module(f"fused_attn.kernels.{module}"), name)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return function
    return importlib.import_module("fused_attn.kernels.replay").replayed(function)


def below(op: torch._ops.OpOverload, *arguments: Any) -> Any:
    """op(*arguments) past its Autograd kernel. Dynamo's graph gets the operator itself, for gradients to come."""
    if _in_dynamo():
        return op(*arguments)
    guard = _BelowAutograd()
    try:
        return op._op(*arguments)
    finally:
        del guard  # now, not when a traceback lets go of this frame


def fresh_memory_by_torch(wanted: bool) -> bool:
    """See FRESH_MEMORY. Without a native library, or with one that has no other way, it always is."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_attn::{FRESH_MEMORY}", "CompositeExplicitAutograd"):
        return True
    before: bool = getattr(torch.ops.fused_attn, FRESH_MEMORY)(wanted)
    return before


def apply_of(node: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`node.apply` without what that does for `torch.func`, which takes half of its time: whoever calls has seen that
    none of its transforms is active. Tensors that one left behind go torch's way, and so does what is compiled."""
    at_once = super(torch.autograd.Function, node).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return node.apply(*arguments)
        for argument in arguments:
            if type(argument) is Tensor and _is_wrapped(argument):
                return node.apply(*arguments)
        return at_once(*arguments)

    return apply


def stand_for(overloads: Overloads, formula: formulas.Formula, backward: Overloads | None = None) -> None:
    """The operators compute that, where they are written out or counted. backward: what computes its gradients."""
    for backend, op in overloads.items():
        formulas.write_out(op, formula, FAKES[op._opname])
        called_by_inductor(op)
        formulas.count_flops(op, None if backward is None else backward[backend], formula)


class _Rule(NamedTuple):
    """What the Autograd kernel of an operator does where a gradient is needed."""

    op: torch._ops.OpOverload
    backend: str
    keep: Keep
    gradients: Gradients
    outputs: int
    codes: int
    require: Callable[[tuple[Any, ...]], None] | None


class _Call(NamedTuple):
    rule: _Rule
    spec: TreeSpec
    results_spec: list[TreeSpec]  # empty before the call


class _Operator(torch.autograd.Function):
    """The node of an operator that was called by itself: all its results, lists flattened."""

    @staticmethod
    def forward(ctx, call, *leaves):
        rule, spec, results_spec = call
        arguments = tree_unflatten(list(leaves), spec)
        if rule.require is not None:
            rule.require(arguments)
        results = below(rule.op, *arguments)
        last = len(leaves) - rule.codes
        ctx.rule, ctx.spec, ctx.backend, ctx.codes = rule, spec, rule.backend, leaves[last:]
        rule.keep(ctx, leaves[:last], results)
        flat, found = tree_flatten(results)
        results_spec.append(found)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*flat[rule.outputs :])
        return tuple(flat)

    @staticmethod
    def backward(ctx, *grads):
        grads = grads[: ctx.rule.outputs]
        found = () if all(g is None for g in grads) else ctx.rule.gradients(ctx, *grads)
        return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))


def _codes_of(op: torch._ops.OpOverload) -> int:
    """How many arguments stand behind the last tensor."""
    is_tensor = ["Tensor" in str(argument.type) for argument in op._schema.arguments]
    return is_tensor[::-1].index(True)


def register_gradients(
    overloads: Overloads,
    keep: Keep,
    gradients: Gradients,
    outputs: int,
    require: Callable[[tuple[Any, ...]], None] | None = None,
) -> None:
    """Give each overload its Autograd kernel. outputs: how many of the leading results have gradients. require: raises
    where the "cuda" backend has no backward for the arguments."""

    def register(backend: str, op: torch._ops.OpOverload) -> None:
        rule = _Rule(op, backend, keep, gradients, outputs, _codes_of(op), require if backend == "cuda" else None)

        def kernel(*arguments):
            leaves, spec = tree_flatten(arguments)
            # A dual number goes to the node too, which says that it has no tangents.
            if forward_ad._current_level < 0 and not needs_grad(*(t for t in leaves if isinstance(t, Tensor))):
                return below(op, *arguments)
            call = _Call(rule, spec, [])
            return tree_unflatten(list(_Operator.apply(call, *leaves)), call.results_spec[0])

        LIBRARY.impl(op._name.removeprefix("fused_attn::"), kernel, "Autograd")

    for backend, op in overloads.items():
        register(backend, op)


def not_differentiable(overloads: Overloads) -> None:
    """For an operator that writes over an argument: where a gradient is needed it raises, before it writes."""

    def register(op: torch._ops.OpOverload) -> None:
        def kernel(*arguments):
            if needs_grad(*(t for t in arguments if isinstance(t, Tensor))):
                raise RuntimeError(f"{op._name}: has no gradient, because it writes over a map")
            return below(op, *arguments)

        LIBRARY.impl(op._name.removeprefix("fused_attn::"), kernel, "Autograd")

    for op in overloads.values():
        register(op)


def as_it_is(results: Any) -> Any:
    return results


def first(results: Any) -> Any:
    return results[0]


def first_and_last(results: Any) -> Any:
    return results[0], results[-1]


def differentiable(
    overloads: Overloads,
    backward: Overloads,
    keep: Keep,
    gradients: Gradients,
    formula: formulas.Formula,
    *,
    outputs: int = 1,
    shown: Callable[[Any], Any] = first,
    resident_clusters: Callable[..., resident.Clusters] | None = None,
) -> Callable[..., Any]:
    """Give the overloads their gradients, and return what Python calls them by: call(backend, *arguments, told=None).

    Their arguments are tensors, then codes; a list of tensors, where there is one, is the first.

    Args:
        backward: the operator that `gradients` calls.
        formula: from the operator's arguments to its first result, or the first ones, in plain PyTorch.
        outputs: how many of the leading results have gradients.
        shown: from the results to what `call` returns; `keep` marks what of that has no gradient. told: gets that
            before anything is kept for the backward, where a checkpoint's recomputation may end.
        resident_clusters: of the "cuda" backend's kernels, where they are resident (ops/resident.py): a call whose
            backward they do not hold raises before its forward.
    """
    any_overload = next(iter(overloads.values()))
    require = None
    if resident_clusters is not None:
        resident.QUESTIONS[any_overload._opname] = resident_clusters
        require = functools.partial(resident.require, any_overload._opname)
    register_gradients(overloads, keep, gradients, outputs, require)
    differentiable_once(backward)
    stand_for(overloads, formula, backward)
    arguments = any_overload._schema.arguments
    count, listed = len(arguments) - _codes_of(any_overload), str(arguments[0].type) == "List[Tensor]"

    def forward(ctx, where, *inputs):
        ctx.backend, ctx.codes, told = backend, codes, _ = where
        arguments = (inputs[: 1 - count], *inputs[1 - count :], *codes) if listed else (*inputs, *codes)
        if backend == "cuda" and require is not None:
            require(arguments)
        results = below(overloads[backend], *arguments)
        found = told_of(results, told)
        keep(ctx, inputs, results)
        return found

    functions = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    node: Any = type(any_overload._opname.title().replace("_", ""), (torch.autograd.Function,), functions)
    apply = apply_of(node)

    def told_of(results, told):
        found = shown(results)
        if told is not None:
            told(found)
        return found

    def call(backend, *arguments, told=None):
        if torch.is_grad_enabled():
            inputs = (*arguments[0], *arguments[1:count]) if listed else arguments[:count]
            for tensor in inputs:
                if tensor is not None and tensor.requires_grad:
                    if torch.compiler.is_compiling():
                        return told_of(overloads[backend](*arguments), told)
                    return apply((backend, arguments[count:], told), *inputs)
        return told_of(below(overloads[backend], *arguments), told)

    return call


def differentiable_by_reference(overloads: Overloads, function: Callable[..., Sequence[Tensor]], outputs: int) -> None:
    """Gradients of an operator that no caller in Python differentiates by itself: those of plain PyTorch.

    function: from the operator's arguments to its first `outputs` results.
    """

    def keep(ctx, inputs, results):
        leaves = *inputs, *ctx.codes
        ctx.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))

    def gradients(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if is_tensor else None for is_tensor in ctx.is_tensor]

        def of_tensors(*tensors):
            leaves = [other if t is None else t for t, other in zip(tensors, ctx.others, strict=True)]
            results = function(*tree_unflatten(leaves, ctx.spec))
            return [r for r, g in zip(results, grads, strict=True) if g is not None]

        given = [g for g in grads if g is not None]
        return None, *differentiable_backward(of_tensors, inputs, ctx.needs_input_grad[1:], given)

    register_gradients(overloads, keep, gradients, outputs)
    stand_for(overloads, function)


def differentiable_once(overloads: Overloads) -> None:
    """For operators of a backward: what is computed of their results' gradients raises, and is not zero in silence."""

    def keep(ctx, inputs, results):
        pass

    def gradients(ctx, *grads):
        raise RuntimeError(
            f"{ctx.rule.op._name}: the gradient of a gradient is not in this graph; differentiate the function that it"
            " was made from, with create_graph=True"
        )

    register_gradients(overloads, keep, gradients, sys.maxsize)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, descriptors and gates: float64 for float64 maps, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether (B, C, *spatial) lies as (B, *spatial, C) in memory, for any spatial rank."""
    return x.movedim(1, -1).is_contiguous()


def empty_map(x: Tensor) -> Tensor:
    """An output map: x's strides where x is NCHW or channels_last, else NCHW (the kernels copy such an x)."""
    if x.is_contiguous() or is_channels_last(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def affine_or_none(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The two arguments of an operator, of which there are both or none, as functions in Python take them."""
    return None if weight is None or bias is None else (weight, bias)


def like_or_none(tensor: Tensor | None, x: Tensor) -> Tensor:
    """The fake gradient of an optional input: contiguous and of its shape and dtype, or of size (0,)."""
    if tensor is None:
        return x.new_empty(0)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def unless_absent(tensors: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients that a backward operator wrote, without those of optional inputs that are not there."""
    return [None if t is None else g for t, g in zip(tensors, grads, strict=True)]


def shape_of(x: Tensor) -> Tensor:
    """A tensor to save where a backward reads its shape and layout alone: what is written into it before that is no
    error."""
    return x.data


def differentiable_backward(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
    grads: Tensor | Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """The reference's gradients, recomputed from the saved inputs; they too can be differentiated.

    It costs what eager costs. needs_grad: of the inputs, and of what follows them.
    """
    needs_grad = needs_grad[: len(inputs)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each input under a name of its own: one that was computed from another (a gate from the map) would pass its
        # gradient on to that one here, and once more outside.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        for t, needed in zip(inputs, needs_grad, strict=True):
            if needed and t is not None and not t.requires_grad:  # a `shape_of`
                t.requires_grad_()
        wanted = [t for t, needed in zip(inputs, needs_grad, strict=True) if needed and t is not None]
        outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        grads = [grads] if isinstance(grads, Tensor) else grads
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        if not pairs:
            return (None,) * len(inputs)
        found = torch.autograd.grad(
            [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    remaining = iter(found)
    return tuple(
        next(remaining) if needed and t is not None else None for t, needed in zip(inputs, needs_grad, strict=True)
    )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see a call of these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_node(*tensors: Tensor | None) -> bool:
    """The same where an `autograd.Function` is made of several operators. An exported program has none: it holds the
    operators, and differentiates them one by one."""
    return needs_grad(*tensors) and not torch.compiler.is_exporting()


def wants_graph(*grads: Tensor | None) -> bool:
    """Inside a backward: whether what it does is seen through, and so has to be plain PyTorch: differentiated by
    `create_graph=True` or by dual numbers, or mapped over, by `is_grads_batched=True` or by `torch.func.vmap`: these,
    where it writes in place or an operator has a list of tensors, which torch does not map over."""
    if torch.compiler.is_compiling():
        return False
    seen = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return seen or any(g is not None and (_is_batched(g) or _is_vmapped(g)) for g in grads)
