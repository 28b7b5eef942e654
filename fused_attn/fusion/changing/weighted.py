"""Channel gates that are made of a weighted mean, of sequences with lengths or a mask: s = (x * mask).sum(2) / total.

How the mask is made is anybody's code, with branches and helpers that no graph stands for. So nothing of it is written
anew: the forward is compiled once more from its own source, in which products are calls of `product`, that is `scale`
where one factor is a gate a channel of the other. Whatever else it computes, it computes as before.
"""

from __future__ import annotations
import __future__

import ast
import functools
import inspect
import operator
import sys
import textwrap
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...backends import is_small
from ..reading.check import Run, random_tensor, randomised
from ..reading.context import OnOneDevice
from ..reading.layers import calls_itself
from ..reading.reads import Reads, Unstored, asks_for_its_class, is_torch, multiplies_itself, reads_of
from ..reading.recognise import channel_guesses, has_a_gate, once, ranks_of
from ..reading.rewritten import FEW
from ..reading.twin import NoTwin
from ..recipes.names import host_of
from ..recipes.recipe import OwnLayers
from .two_maps import gated

Forward = Callable[..., Any]

_known: weakref.WeakKeyDictionary[type, dict[Hashable, OwnLayers | None]] = weakref.WeakKeyDictionary()


def gate_with_weights(block: nn.Module) -> OwnLayers | None:
    """How a module runs that is given weights, a mask or lengths beside its map, and multiplies the map by a gate a
    channel; None: it is none. Without them it runs as it is written."""
    names = _names(block)
    if names is None or asks_for_its_class(host_of(type(block))):
        return None
    if any(map(calls_itself, block.modules())):
        return None
    if sum(p.numel() for p in block.parameters()) > FEW:
        return None
    try:
        read = reads_of(block, most=sys.maxsize)
    except Exception:  # somebody's module in a way that was not thought of is left alone
        return None
    if read.remark is not None or not has_a_gate(block, read):
        return None
    return once(_known, block, read, lambda: _without_stores(block, names, read), failed=None, changed=lambda: None)


def _names(block: nn.Module) -> tuple[str, str] | None:
    """Of a map and of what may be weights of its positions."""
    cls = host_of(type(block))
    forward: Any = cls.forward
    if "forward" in block.__dict__ or is_torch(cls) or not inspect.isfunction(forward) or is_torch(forward):
        return None
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    if len(parameters) != 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return None
    if parameters[0].default is not inspect.Parameter.empty or not multiplies_itself(forward):
        return None
    return (
        (parameters[0].name, parameters[1].name) if parameters[1].default in (None, inspect.Parameter.empty) else None
    )


def _without_stores(block: nn.Module, names: tuple[str, str], read: Reads) -> OwnLayers | None:
    with Unstored(read.stores):
        return _found(block, names)
    return None


def _found(block: nn.Module, names: tuple[str, str]) -> OwnLayers | None:
    written: Any = host_of(type(block)).forward
    forward = with_products(written, product)
    counted = _Counted()
    counting = with_products(written, counted)
    if forward is None or counting is None:
        return None
    try:
        module = randomised(block).eval()
    except NoTwin:
        return None
    for rank in ranks_of(block):
        for inputs in _inputs(block, rank):
            if _is_gated(module, counting, counted, inputs) and _is_same(block, counting, inputs):
                name = "squeeze with weights as it is written, scale"
                return OwnLayers(forward, name, ("scale",), rank=rank + 2, maps=names)
    return None


# Its products


def product(a: Any, b: Any) -> Any:
    """a * b; by `scale` where one is a map and the other its gate, one number a sample and channel."""
    if _is_gate_of(b, a) and _gains(a):
        return gated(a, b, b)
    if _is_gate_of(a, b) and _gains(b):
        return gated(b, a, a)
    return a * b


def _gains(x: Tensor) -> bool:
    """Whether a product of a map has a backward to come, whose passes are what is saved: forward it is one anyway."""
    return torch.is_grad_enabled() and not is_small(x, most=_SMALL)


def _is_gate_of(gate: Any, x: Any) -> bool:
    if not (isinstance(gate, Tensor) and isinstance(x, Tensor)):
        return False
    space = x.dim() - 2
    return space > 0 and gate.shape == (*x.shape[:2], *(1,) * space) != x.shape


#: Bytes of a map up to which a product is faster as it is written, on the CPU.
_SMALL = 8 << 20


class _Counted:
    """`product`, of small maps too; the shapes of those that were gated."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __call__(self, a: Any, b: Any) -> Any:
        for x, gate in ((a, b), (b, a)):
            if _is_gate_of(gate, x):
                self.shapes.append(x.shape)
                return gated(x, gate, gate)
        return a * b


# Its code


_PRODUCT = "__fused_product__"
_FUTURE = functools.reduce(operator.or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))


class _Products(ast.NodeTransformer):
    """Products as calls."""

    def __init__(self, has_torch: bool) -> None:
        self.has_torch, self.count = has_torch, 0

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return self._call(node, [node.left, node.right]) if isinstance(node.op, ast.Mult) else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        named = ast.unparse(node.func) in ("torch.mul", "torch.multiply")
        plain = len(node.args) == 2 and not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args)
        return self._call(node, node.args) if named and plain and self.has_torch else node

    def _call(self, node: ast.expr, args: list[ast.expr]) -> ast.AST:
        self.count += 1
        return ast.copy_location(ast.Call(ast.Name(_PRODUCT, ast.Load()), args, []), node)


def with_products(function: types.FunctionType, multiply: Callable[[Any, Any], Any]) -> Forward | None:
    """The function with `multiply` in place of its products; None: it has none, or its source is not what runs."""
    code = function.__code__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        imports = list(_imports_in(ast.parse("".join(inspect.findsource(function)[0]))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    ast.increment_lineno(tree, code.co_firstlineno - 1)
    if not _is_same_code(_compiled(definition, imports, code, code.co_freevars), code):
        return None
    products = _Products(function.__globals__.get("torch") is torch)
    changed = products.visit(definition)
    if not products.count:
        return None
    made = _compiled(changed, imports, code, (*code.co_freevars, _PRODUCT))
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells[_PRODUCT] = types.CellType(multiply)
    closure = tuple(cells[name] for name in made.co_freevars)
    found = types.FunctionType(made, function.__globals__, function.__name__, function.__defaults__, closure)
    found.__kwdefaults__ = function.__kwdefaults__
    return found


def _imports_in(tree: ast.AST) -> Iterator[ast.stmt]:
    """Those of a module: how a name is called depends on whether it is one of these."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", None) != "__future__":
            yield node
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield from _imports_in(node)


def _compiled(
    definition: ast.FunctionDef, imports: list[ast.stmt], code: types.CodeType, free: tuple[str, ...]
) -> types.CodeType:
    """The code of a function with these free variables. Nothing is run: no import, no default and no annotation."""
    outer = ast.parse(f"def outer({', '.join(free)}):\n    pass")
    body: Any = outer.body[0]
    body.body = [definition]
    outer.body[:0] = imports
    flags = code.co_flags & _FUTURE
    module = compile(ast.fix_missing_locations(outer), code.co_filename, "exec", flags=flags, dont_inherit=True)
    (around,) = _codes_in(module)
    return next(inner for inner in _codes_in(around) if inner.co_name == code.co_name)


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    return (inner for inner in code.co_consts if isinstance(inner, types.CodeType))


def _is_same_code(a: types.CodeType, b: types.CodeType) -> bool:
    """Whether one does what the other does; where they are from may differ."""
    names = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount")
    if any(getattr(a, n) != getattr(b, n) for n in names) or len(a.co_consts) != len(b.co_consts):
        return False
    if (a.co_flags ^ b.co_flags) & ~inspect.CO_NESTED:
        return False
    if getattr(a, "co_exceptiontable", None) != getattr(b, "co_exceptiontable", None):
        return False
    return all(
        _is_same_code(x, y)
        if isinstance(x, types.CodeType) and isinstance(y, types.CodeType)
        else _is_same_constant(x, y)
        for x, y in zip(a.co_consts, b.co_consts, strict=True)
    )


def _is_same_constant(a: Any, b: Any) -> bool:
    return type(a) is type(b) and repr(a) == repr(b)


# Whether it is one


_SPACE = (12, 9, 7)
_BATCH = 3


def _inputs(block: nn.Module, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps with lengths, as shares or numbers, or with masks."""
    generator = torch.Generator().manual_seed(3)
    space = _SPACE[:rank]
    last = space[-1]
    shares = torch.tensor([1.0, 0.58, 0.31], dtype=torch.float64, device="cpu")
    counts = (shares * last).round()
    mask = torch.arange(last, device="cpu") < counts[:, None]
    wide = mask.view(_BATCH, 1, *(1,) * (rank - 1), last).expand(_BATCH, 1, *space)
    for channels in channel_guesses(block):
        x = random_tensor((_BATCH, channels, *space), generator, spread=5)
        for weights in (shares, counts.long(), counts, wide.double(), wide, mask.double(), mask):
            yield x, weights


def _is_gated(module: nn.Module, forward: Forward, counted: _Counted, inputs: tuple[Tensor, Tensor]) -> bool:
    """Whether a forward runs on these and gates a map of this shape, which is that of its result."""
    counted.shapes.clear()
    try:
        with torch.no_grad(), OnOneDevice("cpu"):
            module(*inputs)  # first, so that nothing comes to what its own code may not do while it is looked at
            y = forward(module, *inputs)
    except Exception:  # of whatever kind: it is somebody's, on what it may not take
        return False
    return isinstance(y, Tensor) and y.shape == inputs[0].shape and inputs[0].shape in counted.shapes


def _is_same(block: nn.Module, forward: Forward, inputs: tuple[Tensor, Tensor]) -> bool:
    """Whether a forward is the block's in both modes."""
    given, weights = inputs
    for training in (False, True):
        runs: list[Run] = []
        for run in (lambda module, *args: module(*args), forward):
            module = randomised(block)
            for part in module.modules():
                part.training = training
            x = given.clone().requires_grad_()
            leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
            function = functools.partial(run, module, x, weights)
            try:
                with OnOneDevice("cpu"):
                    runs.append(Run.of(function, leaves, list(module.buffers())))
            except Exception:  # of whatever kind: it is somebody's, on what it may not take
                return False
        if runs[1].difference(runs[0]) is not None:
            return False
    return True
