"""Operators by themselves, as a program holds them, and what they leave to plain PyTorch: gradients are eager's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from fused_attn import functional, reference
from fused_attn.backends import backend, choose, keep_operators
from fused_attn.ops.common import BACKENDS, OPERATORS
from tests.checks import Inputs, random
from tests.ops.test_every_op import ALL, SHAPE, Calls, gradients_for, leaves_of, variants

needs_operators = pytest.mark.skipif(
    choose("channel_gate", torch.empty(SHAPE)) == "reference",
    reason="no native library on this machine, or the reference was asked for: nothing here is an operator",
)

#: Operators of a backward.
BACKWARD = {name for names in OPERATORS.values() for name in names if name.endswith("_backward")}
BACKWARD |= {"norm_dots", "norm_factors", "norm_gradients", "select_dots", "select_gradients"}


#: Its sums of squares are an operator of `select`'s backward, which has no gradient in a graph that is made without
#: any: that raises, and says so.
OF_A_BACKWARD = "select/energy"
MADE_OF = [name for name in ALL if name != OF_A_BACKWARD]


class Module(nn.Module):
    """An op as a module of those of its inputs that are not None; `fixed` ones are its buffers."""

    def __init__(
        self, name: str, inputs: Inputs, post: str, *, fixed: tuple[str, ...] = (), module=functional, pre: str = "silu"
    ) -> None:
        super().__init__()
        self.function = ALL[name].call(module, pre, post)
        self.names = [k for k, v in inputs.items() if v is not None and k not in fixed]
        self.absent = [k for k, v in inputs.items() if v is None]
        self.fixed = fixed
        for key in fixed:
            self.register_buffer(f"fixed_{key}", inputs[key])

    def forward(self, *tensors: Tensor):
        others = dict.fromkeys(self.absent) | {key: getattr(self, f"fixed_{key}") for key in self.fixed}
        return self.function(**dict(zip(self.names, tensors, strict=True)), **others)


def exported(module: nn.Module, tensors: list[Tensor]) -> Callable:
    with keep_operators():
        return export(module, tuple(tensors)).module()


def exported_by_dynamo(module: nn.Module, tensors: list[Tensor]) -> Callable:
    with keep_operators():
        return export(module, tuple(tensors), strict=True).module()


def exported_without_gradients(module: nn.Module, tensors: list[Tensor]) -> Callable:
    with torch.no_grad(), keep_operators():
        return export(module, tuple(t.detach() for t in tensors)).module()


def traced(module: nn.Module, tensors: list[Tensor]) -> Callable:
    return make_fx(lambda *tensors: module(*tensors))(*tensors)


def traced_without_gradients(module: nn.Module, tensors: list[Tensor]) -> Callable:
    with torch.no_grad():
        return traced(module, tensors)


def traced_above_autograd(module: nn.Module, tensors: list[Tensor]) -> Callable:
    return make_fx(lambda *tensors: module(*tensors), pre_dispatch=True)(*tensors)


def operators_in(program: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fused_attn.")]


def given(inputs: Inputs) -> list[Tensor]:
    return [v.detach().requires_grad_() for v in inputs.values() if v is not None]


def results(function: Callable, leaves: list[Tensor], *, twice: bool = True) -> list[Tensor]:
    """Outputs, gradients, and those of a penalty on the gradients."""
    y = function(*leaves)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    grads = torch.autograd.grad(outputs, leaves, gradients_for(y), create_graph=twice)
    if not twice:
        return [*outputs, *grads]
    penalty = sum((g.square().sum() for g in grads), start=0 * leaves[0].sum())
    second = torch.autograd.grad(penalty, leaves, materialize_grads=True)
    return [*outputs, *grads, *second]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("operator", [name for names in OPERATORS.values() for name in names])
def test_every_operator_has_an_autograd_kernel(operator):
    for name in BACKENDS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_attn::{operator}.{name}", "Autograd")


@pytest.mark.parametrize("name", ALL)
def test_second_gradients_are_eagers(name):
    for post, inputs in variants(name):
        found, expected = (
            results(Module(name, inputs, post, module=module), given(inputs)) for module in (functional, reference)
        )
        assert_same(found, expected)


@needs_operators
@pytest.mark.parametrize("name", MADE_OF)
def test_gradients_of_the_operators(name):
    """A graph of them, made where nothing needed a gradient; first and second ones."""
    for post, inputs in variants(name):
        program = traced_without_gradients(Module(name, inputs, post), given(inputs))
        assert operators_in(program)
        assert_same(
            results(program, given(inputs)), results(Module(name, inputs, post, module=reference), given(inputs))
        )


PROGRAMS = (
    exported,
    *(
        pytest.param(program, marks=pytest.mark.slow)
        for program in (exported_by_dynamo, exported_without_gradients, traced, traced_above_autograd)
    ),
)


@needs_operators
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("name", MADE_OF)
def test_gradients_of_a_program(name, program):
    post, inputs = list(variants(name))[-2 if "residual" in ALL[name].inputs else -1]
    made = program(Module(name, inputs, post), given(inputs))
    assert operators_in(made)
    assert_same(results(made, given(inputs)), results(Module(name, inputs, post, module=reference), given(inputs)))


@needs_operators
@pytest.mark.parametrize("name", ALL)
def test_compiled_training_calls_the_operators_own_backward(name):
    """In one graph each way, and not the reference's; asked for, as some ops are left to compilers."""
    post, inputs = next(variants(name))
    called: list[list[str]] = []

    def record(graph, _):
        called.append(operators_in(graph))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()  # it compiles one `forward` for all ops
    module = Module(name, inputs, post)
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=record), fullgraph=True)
    with backend(choose("channel_gate", torch.empty(0))):
        found = results(compiled, given(inputs), twice=False)
    assert_same(found, results(module, given(inputs), twice=False))
    forward, of_backward = ({call.split(".")[1] for call in graph} for graph in called)
    assert forward and not forward & (BACKWARD - ({"select_dots"} if name == OF_A_BACKWARD else set()))
    assert of_backward and of_backward <= BACKWARD | {"select_sum"}  # which is a forward's, too


def calls_of_a_step(names: Iterable[str] = tuple(ALL)) -> dict[str, tuple]:
    """Every operator of these ops with the arguments of a training step, in float64."""
    seen: dict[str, tuple] = {}
    for op in map(ALL.__getitem__, names):
        with Calls() as recorded:
            y = op.call(functional, "silu", "relu")(**leaves_of(op.inputs))
            torch.autograd.backward(y, gradients_for(y))
        for function, arguments, _ in recorded.seen:
            seen.setdefault(function._opname, (function, arguments))
    return seen


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple]:
    seen = calls_of_a_step()
    x = random(*SHAPE, dtype=torch.float64).requires_grad_()
    seen["relayout"] = torch.ops.fused_attn.relayout.cpu, (x, 1)  # of the block's own node, which no function calls
    statistics = [random(4, seed=i, dtype=torch.float64).square().requires_grad_() for i in range(4)]
    seen["norm_running"] = torch.ops.fused_attn.norm_running.cpu, (*statistics, 0.1)  # instead of norm_coefficients
    return seen


def with_gradients(arguments: tuple) -> tuple:
    def leaf(value):
        if isinstance(value, (list, tuple)):
            return [leaf(v) for v in value]
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if is_float else value

    return tuple(leaf(value) for value in arguments)


def channels_last_or_first(tensor: Tensor) -> Tensor:
    """A map whose channels are last where they were not, or the other way round; what is no map as it is."""
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if tensor.is_contiguous() else torch.contiguous_format)


def backwards(tensor: Tensor) -> Tensor:
    """Its first axis is contiguous, with room between the elements."""
    room = tensor.new_empty((*tensor.shape[::-1], 2))[..., 0].permute(*reversed(range(tensor.dim())))
    return room.copy_(tensor)


def check_layouts(function: torch._ops.OpOverload, arguments: tuple, relaid: Callable[[Tensor], Tensor]) -> None:
    """The results do not change when one argument lies otherwise."""
    with torch.no_grad():
        expected = tree_leaves(function(*arguments))
        for i in range(len(arguments)):
            given = [tree_map_only(Tensor, relaid, a) if i == j else a for j, a in enumerate(arguments)]
            for found, of_first in zip(tree_leaves(function(*given)), expected, strict=True):
                assert found.shape == of_first.shape
                torch.testing.assert_close(found, of_first, rtol=1e-12, atol=1e-12, equal_nan=True)


@needs_operators
@pytest.mark.parametrize("relaid", [channels_last_or_first, backwards])
@pytest.mark.parametrize("operator", [name for names in OPERATORS.values() for name in names])
def test_tensors_of_any_layout(calls, operator, relaid):
    """What Inductor may do with an operator of this tag: give each tensor in another layout than was traced, what a
    forward kept for the backward too, after a forward that had its maps in the first one."""
    if operator in ("norm_scale", "norm_scale_into", "norm_dots"):  # bits lie as the map does
        assert torch.Tag.flexible_layout not in getattr(torch.ops.fused_attn, operator).cpu.tags
        return
    function, arguments = calls[operator]
    assert torch.Tag.flexible_layout in function.tags
    check_layouts(function, arguments, relaid)


@needs_operators
@pytest.mark.parametrize("operator", [n for names in OPERATORS.values() for n in names if n not in BACKWARD])
def test_opcheck_with_gradients(calls, operator):
    if operator == "norm_scale_into":
        pytest.skip("has no gradient: test_an_operator_that_writes_over_a_map_refuses")
    function, arguments = calls[operator]
    torch.library.opcheck(function, with_gradients(arguments))


@needs_operators
@pytest.mark.parametrize("operator", sorted(BACKWARD))
def test_a_gradient_of_a_backward_operator_raises(calls, operator):
    """It is called all the same: a joint graph may run where gradients are enabled."""
    function, arguments = calls[operator]
    results = function(*with_gradients(arguments))
    first = results if isinstance(results, Tensor) else results[0]
    first = first if isinstance(first, Tensor) else first[0]
    plain = function(*arguments)
    plain = plain if isinstance(plain, Tensor) else plain[0]
    assert torch.equal(first, plain if isinstance(plain, Tensor) else plain[0])
    with pytest.raises(RuntimeError, match=f"{operator}.cpu: the gradient of a gradient is not in this graph"):
        first.sum().backward()


@needs_operators
def test_an_operator_that_writes_over_a_map_refuses(calls):
    function, (x, gate, norm, residual, *codes) = calls["norm_scale"]
    y = torch.zeros_like(x)
    write = torch.ops.fused_attn.norm_scale_into.cpu
    with pytest.raises(RuntimeError, match="norm_scale_into.cpu: has no gradient, because it writes over a map"):
        write(x.detach().requires_grad_(), gate, norm, residual, y, *codes)
    assert not y.any()
    with torch.no_grad():
        write(x, gate, norm, residual, y, *codes)
        assert torch.equal(y, function(x, gate, norm, residual, *codes)[0])


@pytest.mark.parametrize("name", ALL)
def test_saved_tensors_are_unpacked_once(name):
    """A checkpoint that is not reentrant lets them go then."""
    for post, inputs in variants(name):
        for twice in (False, True):
            counts: list[int] = []

            def pack(tensor, counts=counts):
                counts.append(0)
                return len(counts) - 1, tensor

            def unpack(packed, counts=counts):
                counts[packed[0]] += 1
                return packed[1]

            module, leaves = Module(name, inputs, post), given(inputs)
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                y = module(*leaves)
            torch.autograd.grad(y, leaves, gradients_for(y), create_graph=twice)
            assert max(counts) == 1


@pytest.mark.parametrize("name", ALL)
def test_in_a_checkpoint(name):
    for post, inputs in variants(name):
        module = Module(name, inputs, post)
        found = results(lambda *t, m=module: checkpoint(m, *t, use_reentrant=False), given(inputs), twice=False)
        assert_same(found, results(module, given(inputs), twice=False))


OPEN = {0: Dim("batch"), -2: Dim("height"), -1: Dim("width")}


def open_axes(name: str, key: str, tensor: Tensor) -> dict[int, Dim]:
    """Those of a map, a gate or a descriptor that have the map's sizes."""
    batch, _, *space = SHAPE
    of_map = tensor.dim() == 4 and tensor.shape[0] == batch
    found = {0: OPEN[0]} if of_map or key in ("gate", "channel") else {}
    if of_map:
        found |= {axis % 4: OPEN[axis] for axis in (-2, -1) if tensor.shape[axis] == space[axis]}
    return found


@needs_operators
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ALL)
def test_export_with_open_sizes(name, strict):
    """Batch, height and width; the exported program is right at other sizes."""
    post, inputs = list(variants(name))[-2 if "residual" in ALL[name].inputs else -1]
    axes = {k: open_axes(name, k, v) for k, v in inputs.items() if v is not None}
    fixed = tuple(k for k, found in axes.items() if not found)
    module, original = (Module(name, inputs, post, fixed=fixed, module=m) for m in (functional, reference))
    shapes = (tuple(axes[k] for k in module.names),)
    given = tuple(inputs[k] for k in module.names)
    with keep_operators():
        program = export(module, given, dynamic_shapes=shapes, strict=strict).module()
    assert operators_in(program)
    for sizes in ((3, 9, 4), (4, 13, 17), SHAPE[:1] + SHAPE[2:]):
        size_of = dict(zip(OPEN.values(), sizes, strict=True))
        tensors = []
        for i, key in enumerate(module.names):
            shape = [size_of[axes[key][a]] if a in axes[key] else n for a, n in enumerate(inputs[key].shape)]
            tensors.append(random(*shape, seed=i, dtype=torch.float64))
        assert_same([*program(*tensors)], [*original(*tensors)])


@pytest.mark.parametrize("name", ALL)
def test_traced_by_jit_with_gradients_on(name):
    """And saved: as eager."""
    post, inputs = list(variants(name))[0]
    module, file = Module(name, inputs, post), io.BytesIO()
    traced = torch.jit.trace(module, tuple(given(inputs)), check_trace=False)
    torch.jit.save(traced, file)
    file.seek(0)
    assert_same(results(torch.jit.load(file), given(inputs), twice=False), results(module, given(inputs), twice=False))


class Marked(Tensor):
    """A map with metadata, as MONAI's MetaTensor and fastai's TensorImage."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        y = super().__torch_function__(function, types, args, kwargs)
        marks = [a.mark for a in tree_leaves(args) if isinstance(a, Marked) and hasattr(a, "mark")]
        for output in tree_leaves(y):
            if isinstance(output, Marked) and marks:
                output.mark = marks[0]
        return y


@pytest.mark.parametrize("name", ALL)
def test_subclass_with_metadata(name):
    """Of a map: it keeps what it carries, and the result may be written over."""
    for post, inputs in variants(name):
        if post == "relu":
            continue  # whose result backward reads, in eager too
        leaves, expected = given(inputs), given(inputs)
        x = leaves[0].as_subclass(Marked)
        x.mark = "affine"
        y = Module(name, inputs, post)(x, *leaves[1:])
        outputs = (y,) if isinstance(y, Tensor) else y
        assert all(type(o) is Marked for o in outputs)
        assert all(o.mark == "affine" for o in outputs)
        theirs = Module(name, inputs, post, module=reference)(*expected)
        first = 1 if name == "axis_pool" else 0  # which returns x before its pools
        y, theirs = outputs[first], theirs if isinstance(theirs, Tensor) else theirs[first]
        y *= 2
        theirs = theirs * 2
        grad = gradients_for(theirs)[0]
        found = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
        assert_same(found, torch.autograd.grad(theirs, expected, grad, materialize_grads=True))
        with torch.inference_mode():
            assert type(Module(name, inputs, post)(x, *leaves[1:])) in (Marked, tuple)


class Packed(Tensor):
    """Values in a form of their own, as int8 weights and DTensor have: torch's operators run on them, no others do."""

    @staticmethod
    def __new__(cls, values: Tensor):
        packed = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        packed.values = values
        return packed

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"{function} of a packed tensor")
        args, kwargs = tree_map_only(Packed, lambda t: t.values, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.mark.parametrize("name", ALL)
def test_packed_tensors(name):
    """Any input, a weight too: its own operators run, as in eager."""
    post, inputs = next(variants(name))
    values = [v for v in inputs.values() if v is not None]
    with torch.no_grad():
        expected = Module(name, inputs, post, module=reference)(*values)
        for i, value in enumerate(values):
            y = Module(name, inputs, post)(*values[:i], Packed(value), *values[i + 1 :])
            if isinstance(y, tuple) and isinstance(y[0], Packed):  # axis_pool returns x before its pools
                y = y[0].values, *y[1:]
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)


def tangents_of(function: Callable, values: list[Tensor], i: int) -> list[Tensor | None]:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values[i], random(*values[i].shape, seed=3, dtype=values[i].dtype))
        y = function(*values[:i], dual, *values[i + 1 :])
        return [forward_ad.unpack_dual(o).tangent for o in ((y,) if isinstance(y, Tensor) else y)]


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_dual_numbers(name, gradients):
    """Of each input, with all else frozen."""
    post, inputs = next(variants(name))
    ours, theirs = (Module(name, inputs, post, module=module) for module in (functional, reference))
    values = [v.detach() for v in inputs.values() if v is not None]
    with torch.set_grad_enabled(gradients):
        for i in range(len(values)):
            found, expected = (tangents_of(module, values, i) for module in (ours, theirs))
            assert any(t is not None for t in expected)
            for mine, other in zip(found, expected, strict=True):
                assert (mine is None) == (other is None)
                assert mine is None or torch.allclose(mine, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_dual_numbers_in_the_backward_alone(name):
    """The forward ran before; its gradient is asked for a tangent."""
    post, inputs = next(variants(name))
    if name == "norm_gate":
        inputs = inputs | dict.fromkeys(("weight1", "weight2"))  # whose excitation has a silu
    found = []
    for module in (functional, reference):
        leaves = given(inputs)
        y = Module(name, inputs, post, module=module, pre="tanh")(*leaves)  # torch has none for silu's backward
        y = y if isinstance(y, Tensor) else y[0]
        grad, direction = gradients_for(y)[0], random(*y.shape, seed=4, dtype=y.dtype)
        with forward_ad.dual_level():
            grads = torch.autograd.grad(y, leaves, forward_ad.make_dual(grad, direction), materialize_grads=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in grads]
            found.append(
                [torch.zeros_like(g) if t is None else t.clone() for g, t in zip(grads, tangents, strict=True)]
            )
    assert any(t.any() for t in found[0])
    assert_same(*found)


@needs_operators
def test_dual_numbers_in_an_operator_raise(calls):
    """It has no tangents, and says so where it is called by itself."""
    for operator in ("scale", "channel_gate", "select", "norm_scale", "scale_backward"):
        function, arguments = calls[operator]
        first = arguments[0]
        with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp|forward"):
            dual = forward_ad.make_dual(*([t.detach() for t in [first] * 2] if isinstance(first, Tensor) else first))
            function(*([dual] if isinstance(first, Tensor) else [[dual, *first[1:]]]), *arguments[1:])


@pytest.mark.parametrize("name", ALL)
def test_transforms_of_torch_func(name):
    post, inputs = next(variants(name))
    values = tuple(v.detach() for v in inputs.values() if v is not None)
    found = []
    for module in (functional, reference):
        block = Module(name, inputs, post, module=module)

        def loss(x, block=block):
            y = block(x, *values[1:])
            return (y if isinstance(y, Tensor) else y[0]).square().sum()

        x, direction = values[0], random(*values[0].shape, seed=5, dtype=torch.float64)
        _, along = torch.func.jvp(torch.func.grad(loss), (x,), (direction,))
        _, linear = torch.func.linearize(loss, x)
        found.append([torch.func.grad(loss)(x), along, linear(direction)])
    assert_same(*found)


@pytest.mark.slow  # a compilation
@pytest.mark.parametrize("name", ["scale", "channel_gate", "norm_gate"])
def test_transforms_of_torch_func_compiled(name):
    post, inputs = next(variants(name))
    values = tuple(v.detach() for v in inputs.values() if v is not None)
    block = Module(name, inputs, post)
    gradient = torch.func.grad(lambda x: block(x, *values[1:]).square().sum())
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(values[0]), gradient(values[0]))


#: What keeps no map for its backward, in torch either.
LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "squeeze": lambda x: functional.squeeze(x),
    "channel_pool": lambda x: functional.channel_pool(x),
    "axis_pool": lambda x: torch.cat([p.flatten(1) for p in functional.axis_pool(x)[1:]], 1),
    "scale by a constant": lambda x: functional.scale(x, torch.full(x.shape[:2], 0.5, dtype=x.dtype)),
    "scale and ReLU": lambda x: functional.scale(
        x, torch.full(x.shape[:2], 0.5, dtype=x.dtype), post_activation="relu"
    ),
}


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_a_map_that_is_written_over_before_the_backward(name, create_graph):
    found = []
    for writes in (False, True):
        x = random(*SHAPE, dtype=torch.float64).requires_grad_()
        y = x * 1
        result = LINEAR[name](y)
        if writes:
            y.neg_()
        (grad,) = torch.autograd.grad(result.square().sum(), x, create_graph=create_graph)
        found.append(torch.autograd.grad(grad.square().sum(), x) if create_graph else grad)
    torch.testing.assert_close(*found)


def test_a_map_whose_values_are_needed_is_not_written_over():
    x = random(*SHAPE, dtype=torch.float64).requires_grad_()
    y = x * 1
    result = functional.squeeze(y, pre_activation="silu")
    y.neg_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@needs_operators
@pytest.mark.parametrize("name", ALL)
def test_written_out(name):
    """As ONNX's exporter asks for it: PyTorch's own operators, which compute the same."""
    post, inputs = list(variants(name))[-2 if "residual" in ALL[name].inputs else -1]
    tensors = tuple(v for v in inputs.values() if v is not None)
    with torch.no_grad(), keep_operators():
        program = export(Module(name, inputs, post), tensors)
    assert operators_in(program.graph_module)
    written = program.run_decompositions(dict(decomposition_table))
    assert not operators_in(written.graph_module)
    expected = Module(name, inputs, post, module=reference)(*tensors)
    for mine, theirs in zip(tree_leaves(written.module()(*tensors)), tree_leaves(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
