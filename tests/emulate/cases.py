"""A call of a block on the emulated machine: its tensors and options, its run, its judgement against float64."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_attn.reference
from fused_attn.codes import ACTIVATIONS, LAYERS, ORDERS, POOLS, SELECTIONS, TIES

from ..checks import largest, random
from ..workers import folder_of_the_run, one_at_a_time

ops = importlib.import_module("fused_attn.ops.select")  # the package has a function of that name
HERE = Path(__file__).parent
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
PARAMETERS = ("weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias")
# One rounding at the output, in epsilons of the largest value; float32 and float64 also sum in another order.
EPS = {torch.float64: 1024, torch.float32: 128, torch.float16: 3, torch.bfloat16: 3}


def build(source: str, tmp_path_factory) -> Path:
    """An emulated program, under AddressSanitizer and UBSan; built once for all workers of a run."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the emulator with")
    program = folder_of_the_run(tmp_path_factory) / f"emulate_{Path(source).stem}"
    flags = ["-std=c++17", "-Og", "-g1", "-DFUSED_ATTN_EMULATE", f"-I{HERE}", "-fsanitize=address,undefined"]
    # What AddressSanitizer sees where it is used; these checks double the time to compile.
    flags += ["-fno-sanitize=null,pointer-overflow,object-size", "-fno-sanitize-recover=all"]
    with one_at_a_time(program):
        if not program.exists():
            subprocess.run([compiler, *flags, str(HERE / source), "-o", str(program)], check=True)
    return program


def write(tensor: Tensor, path: Path) -> None:
    path.write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def read(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0:
        return torch.empty([max(n, 0) for n in shape], dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(shape)


def execute(program: Path, folder: Path, numbers: dict[str, int], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Hand a case to a program and run it; its passes over the map, forward and backward."""
    lines = [f"{k} {v}" for k, v in numbers.items()]
    for name, tensor in tensors.items():
        lines.append(f"tensor {name} {CODES[tensor.dtype]} {tensor.numel()}")
        write(tensor, folder / f"{name}.bin")
    (folder / "case.txt").write_text("\n".join(lines) + "\n")
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run([program, folder], capture_output=True, text=True, env=environment, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    passes = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("passes"))
    return {k: float(v) for k, v in passes.items()}


class Case:
    """One call of a channel gate: tensors, options, and how it is spread over the machine."""

    parameters = PARAMETERS

    def __init__(self, shape=(2, 8, 7, 7), dtype=torch.float32, layout="nchw", ranks=1, threads=64, seed=0, **options):
        self.dtype, self.layout, self.ranks, self.threads, self.seed = dtype, layout, ranks, threads, seed
        self.options = {
            "layer": "dense",
            "pool": "avg",
            "ties": "first",
            "activation": "relu",
            "gate": "sigmoid",
        }
        self.options |= {"pre_activation": "identity", "post_activation": "identity"}
        self.layers = options.pop("layers", 2)
        hidden, bias, taps = options.pop("hidden", 3), options.pop("bias", True), options.pop("taps", 3)
        with_affine, with_residual = options.pop("affine", False), options.pop("residual", False)
        weights = options.pop("weights", None) or dtype
        special = options.pop("x", None)
        self.options |= self.only(options)
        c, dense = shape[1], self.options["layer"] == "dense"
        self.hidden, self.taps = (
            (hidden if self.layers == 2 else 0),
            (0 if dense or self.layers == 0 else taps),
        )
        t: dict[str, Tensor | None] = dict.fromkeys((*self.parameters, "residual"))
        t["x"] = (random(*shape, seed=1) if special is None else special).to(dtype)
        t["grad"] = random(*shape, seed=2, dtype=dtype)
        if self.layers == 2:
            t["weight1"], t["weight2"] = random(hidden, c, seed=3), random(c, hidden, seed=4)
            t["bias1"], t["bias2"] = random(hidden, seed=5), random(c, seed=6)
        elif self.layers == 1:
            t["weight1"] = random(c, c, seed=3) if dense else random(1, 1, taps, seed=3)
            t["bias1"] = random(c if dense else 1, seed=5)
        if not bias:
            t["bias1"] = t["bias2"] = None
        if with_affine:
            t["affine_weight"], t["affine_bias"] = random(c, seed=7), random(c, seed=8)
        if with_residual:
            t["residual"] = random(*shape, seed=9, dtype=dtype)
        t |= self.more(shape)
        for name in self.parameters:
            if t[name] is not None:
                t[name] = t[name].to(weights)
        self.tensors = t

    def only(self, options: dict) -> dict:
        """The options that are handed on to the reference."""
        return options

    def more(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Further tensors of the call."""
        return {}

    def numbers(self) -> dict[str, int]:
        """Further numbers for the program."""
        return {"gated": 1}

    def run(self, program: Path, folder: Path, drop: int = -1) -> tuple[dict[str, Tensor], dict[str, float]]:
        t, o = self.tensors, self.options
        b, c, *spatial = t["x"].shape
        general = o["pre_activation"] != "identity" or o["post_activation"] not in ("identity", "relu")
        general = general or t["affine_weight"] is not None or self.dtype == torch.float64
        numbers = {
            "batch": b, "channels": c, "spatial": int(np.prod(spatial)), "hidden": self.hidden,
            "taps": self.taps, "layers": self.layers, "general": int(general),
            "channels_last": int(self.layout == "channels_last"),
            "ranks": self.ranks, "threads": self.threads, "seed": self.seed, "drop": drop,
            "layer": LAYERS[o["layer"]], "pool": POOLS[o["pool"]], "ties": TIES[o["ties"]],
        }  # fmt: skip
        numbers |= {k: ACTIVATIONS[o[k]] for k in ("activation", "gate", "pre_activation", "post_activation")}
        numbers |= self.numbers()
        maps = ("x", "grad", "residual")
        files = {k: self.memory(v) if k in maps else v for k, v in t.items() if v is not None}
        passes = execute(program, folder, numbers, files)
        out = {"y": self.map(read(folder / "out_y.bin", self.dtype, (-1,)))}
        out["x"] = self.map(read(folder / "out_grad_x.bin", self.dtype, (-1,)))
        if t["residual"] is not None and o["post_activation"] != "identity":
            out["residual"] = self.map(read(folder / "out_grad_residual.bin", self.dtype, (-1,)))
        for name in self.parameters:
            if t[name] is not None:
                out[name] = read(folder / f"out_grad_{name}.bin", t[name].dtype, t[name].shape)
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        for name, rows in {"state": (b, -1), "space_state": (b, 3, *spatial)}.items():
            if (folder / f"out_{name}.bin").exists():
                setattr(self, name, read(folder / f"out_{name}.bin", acc, rows))
        for name, rows in {"index": (b, c), "space_index": (b, *spatial)}.items():
            if (folder / f"out_{name}.bin").exists():
                setattr(self, name, read(folder / f"out_{name}.bin", torch.int32, rows))
        return out, passes

    def memory(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1) if self.layout == "channels_last" else tensor

    def map(self, flat: Tensor) -> Tensor:
        shape = self.memory(self.tensors["x"]).shape
        return flat.reshape(shape).movedim(-1, 1) if self.layout == "channels_last" else flat.reshape(shape)

    def exact(self) -> dict[str, Tensor]:
        """The output ("y") and all gradients of the reference in float64."""
        leaves = {k: v.double().requires_grad_() for k, v in self.tensors.items() if v is not None and k != "grad"}
        affine = (leaves["affine_weight"], leaves["affine_bias"]) if "affine_weight" in leaves else None
        y = self.reference(leaves, affine)
        grads = torch.autograd.grad(y, list(leaves.values()), self.tensors["grad"].double(), allow_unused=True)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def reference(self, leaves: dict[str, Tensor], affine: tuple[Tensor, Tensor] | None) -> Tensor:
        given = {k: leaves.get(k) for k in ("weight1", "bias1", "weight2", "bias2", "residual")}
        return fused_attn.reference.channel_gate(leaves["x"], **given, affine=affine, **self.options)

    def check(self, program: Path, folder: Path, drop: int = -1, floor: float = 0.0) -> dict[str, float]:
        found, passes = self.run(program, folder, drop)
        for name, exact in self.exact().items():
            if name not in found:
                continue
            actual = found[name].double()
            assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN is not where the reference has it"
            error = largest((actual - exact).nan_to_num())
            bound = EPS[found[name].dtype] * torch.finfo(found[name].dtype).eps * max(largest(exact), 1e-3)
            assert error <= max(bound, floor), f"{name}: error {error:.3g} is above {bound:.3g}"
        return passes


class SpaceCase(Case):
    """One call of a spatial gate, or with `gated` of CBAM."""

    parameters = (*PARAMETERS, "weight", "bias")

    def __init__(self, shape=(2, 8, 7, 7), *arguments, gated=False, kernel=7, order=("max", "mean"), **options):
        rank = len(shape) - 2
        self.gated, self.order = gated, order
        self.kernel = (kernel,) * rank if isinstance(kernel, int) else kernel
        self.space_bias = options.pop("space_bias", True)
        super().__init__(shape, *arguments, **({} if gated else {"layers": 0}), **options)

    def only(self, options):
        self.space = {"ties": options.pop("space_ties", "first"), "gate": options.pop("space_gate", "sigmoid")}
        return options

    def more(self, shape):
        weight = random(1, 2, *self.kernel, seed=11, scale=float(np.prod(self.kernel)) ** -0.5)
        return {"weight": weight, "bias": random(1, seed=12) if self.space_bias else None}

    def numbers(self):
        spatial = self.tensors["x"].shape[2:]
        size, kernel = (1,) * (3 - len(spatial)) + spatial, (1,) * (3 - len(spatial)) + self.kernel
        axes = ("depth", "height", "width")
        return {
            "gated": int(self.gated), "mean_first": ORDERS[self.order], "space_ties": TIES[self.space["ties"]],
            "space_gate": ACTIVATIONS[self.space["gate"]], **dict(zip(axes, size, strict=True)),
            **{f"kernel_{axis}": k for axis, k in zip(axes, kernel, strict=True)},
        }  # fmt: skip

    def exact(self):
        if self.dtype in (torch.float64, torch.float32):
            return super().exact()
        module = sys.modules["fused_attn.reference.channel_pool"]
        with mock.patch.object(module, "channel_max", self.rounded_max):
            return super().exact()

    def rounded_max(self, x: Tensor, ties: str) -> Tensor:
        """The maximum over channels of x rounded to the map's dtype, which makes equals that float64 tells apart."""
        rounded = x.detach().to(self.dtype)
        peak, first = rounded.max(1, keepdim=True)
        chosen = torch.zeros_like(x).scatter_(1, first, 1.0) if ties == "first" else (rounded == peak).double()
        return peak.double() + ((x - x.detach()) * chosen / chosen.sum(1, keepdim=True)).sum(1, keepdim=True)

    def reference(self, leaves, affine):
        o, given = self.options, {k: leaves.get(k) for k in ("weight1", "bias1", "weight2", "bias2")}
        ends = {k: o[k] for k in ("pre_activation", "post_activation")} | {"residual": leaves.get("residual")}
        weights = leaves["weight"], leaves.get("bias")
        if not self.gated:
            return fused_attn.reference.spatial_gate(
                leaves["x"], *weights, order=self.order, affine=affine, **self.space, **ends
            )
        return fused_attn.reference.cbam(
            leaves["x"],
            **given,
            spatial_weight=weights[0],
            spatial_bias=weights[1],
            layer=o["layer"],
            pool=o["pool"],
            channel_ties=o["ties"],
            activation=o["activation"],
            channel_gate=o["gate"],
            order=self.order,
            spatial_ties=self.space["ties"],
            spatial_gate=self.space["gate"],
            affine=affine,
            **ends,
        )


def flat(branches: list[Tensor]) -> list[Tensor]:
    """The memory of each tensor, as it lies."""
    return [b.as_strided((b.untyped_storage().nbytes() // b.element_size(),), (1,), 0) for b in branches]


class SelectCase(Case):
    """One call of select. `lie` says how the branches do: apart, sliced out of wider maps, or stacked."""

    def __init__(
        self, shape=(2, 8, 7, 7), dtype=torch.float32, layout="nchw", ranks=1, threads=64, seed=0, lie="apart",
        paths=2, hidden=4, groups=1, bias=True, affine=False, weights=None, **options,
    ):  # fmt: skip
        self.dtype, self.layout, self.ranks, self.threads, self.seed = dtype, layout, ranks, threads, seed
        self.paths, self.groups, self.hidden = paths, groups, hidden
        self.options = {"activation": "relu", "gate": "softmax", "pre_activation": "identity"} | options
        b, c, *spatial = shape
        t: dict[str, Tensor | None] = dict.fromkeys(PARAMETERS)
        inner, width = c // groups, hidden // groups
        t["weight1"] = random(hidden, inner, seed=3, scale=inner**-0.5)
        t["weight2"] = random(paths * c, width, seed=4, scale=0.5 * width**-0.5)  # a saturated softmax passes nothing
        if bias:
            t["bias1"], t["bias2"] = random(hidden, seed=5), random(paths * c, seed=6)
        if affine:
            t["affine_weight"], t["affine_bias"] = random(paths, c, seed=7), random(paths, c, seed=8)
        self.tensors = {k: None if v is None else v.to(weights or dtype) for k, v in t.items()}
        self.tensors["grad"] = random(*shape, seed=2, dtype=dtype)
        values = random(b, paths, c, *spatial, seed=1, dtype=dtype)
        wide = 1 if lie == "sliced" else 0  # a channel more, and so odd distances and an odd first place
        if lie == "stacked" and layout == "pixels":
            self.branches = [values.movedim((1, 2), (-2, -1)).contiguous().movedim((-2, -1), (1, 2))]
        elif lie == "stacked":
            self.branches = [self.laid(values, 2)]
        else:
            padded = [torch.cat([random(b, wide, *spatial, dtype=dtype), v], 1) for v in values.unbind(1)]
            self.branches = [self.laid(v, 1)[:, wide:] for v in padded]
        assert ops.are_channels_last(self.branches, paths) == (layout != "nchw")

    def laid(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.contiguous() if self.layout == "nchw" else tensor.movedim(axis, -1).contiguous().movedim(-1, axis)

    def memory(self, tensor: Tensor) -> Tensor:
        return tensor if self.layout == "nchw" else tensor.movedim(1, -1)

    def views(self, name: str, branches: list[Tensor]) -> dict[str, int]:
        """Where each branch lies in the memory of its tensor."""
        numbers = {}
        for m, view in enumerate(ops.branch_views(branches, self.paths)):
            steps = [view.stride(axis) for axis in range(2, view.dim()) if view.shape[axis] != 1]
            pitch = steps[-1] if self.layout != "nchw" and steps else view.shape[1]
            numbers |= {f"{name}_at{m}": view.storage_offset(), f"{name}_stride{m}": view.stride(0)}
            numbers[f"{name}_pitch{m}"] = pitch
        return numbers

    def run(self, program, folder, drop=-1):
        t, o = self.tensors, self.options
        b, c, *spatial = t["grad"].shape
        to = ops.empty_gradients(self.branches, self.paths)
        general = o["pre_activation"] not in ("identity", "relu") or self.dtype == torch.float64
        numbers = {
            "batch": b, "channels": c, "spatial": int(np.prod(spatial)), "hidden": self.hidden, "paths": self.paths,
            "groups": self.groups, "general": int(general), "channels_last": int(self.layout != "nchw"),
            "stacked": int(len(self.branches) != self.paths), "ranks": self.ranks, "threads": self.threads,
            "seed": self.seed, "drop": drop, "gate": SELECTIONS[o["gate"]],
            **{k: ACTIVATIONS[o[k]] for k in ("activation", "pre_activation")},
            **self.views("from", self.branches), **self.views("to", to),
        }  # fmt: skip
        files = {k: v for k, v in t.items() if v is not None} | {"grad": self.memory(t["grad"])}
        files |= {f"from{m}": memory for m, memory in enumerate(flat(self.branches))}
        passes = execute(program, folder, numbers, files | {f"to{m}": memory for m, memory in enumerate(flat(to))})
        shape = self.memory(t["grad"]).shape
        y = read(folder / "out_y.bin", self.dtype, shape)
        out = {"y": y if self.layout == "nchw" else y.movedim(-1, 1)}
        for m, like in enumerate(to):
            found = read(folder / f"out_to{m}.bin", self.dtype, (-1,))
            out[f"branch{m}"] = found.as_strided(like.shape, like.stride(), like.storage_offset())
        for name in PARAMETERS:
            if t[name] is not None:
                out[name] = read(folder / f"out_grad_{name}.bin", t[name].dtype, t[name].shape)
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.state = read(folder / "out_state.bin", acc, (b, -1))
        return out, passes

    def exact(self):
        leaves = {k: v.double().requires_grad_() for k, v in self.tensors.items() if v is not None and k != "grad"}
        leaves |= {f"branch{m}": v.double().requires_grad_() for m, v in enumerate(self.branches)}
        given = {k: leaves.get(k) for k in ("weight1", "bias1", "weight2", "bias2")}
        affine = (leaves["affine_weight"], leaves["affine_bias"]) if "affine_weight" in leaves else None
        branches = [leaves[f"branch{m}"] for m in range(len(self.branches))]
        maps = ops.branch_views(branches, self.paths)
        y = fused_attn.reference.select(maps, **given, groups=self.groups, affine=affine, **self.options)
        grads = torch.autograd.grad(y, list(leaves.values()), self.tensors["grad"].double(), allow_unused=True)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
