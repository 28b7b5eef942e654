"""The resident kernels' source on the emulated machine, under AddressSanitizer and UBSan, against float64."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fused_attn
import fused_attn.reference
from fused_attn.codes import ACTIVATIONS, LAYERS, POOLS, TIES

from ..checks import largest, random

HERE = Path(__file__).parent
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
PARAMETERS = ("weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias")
# One rounding at the output, in epsilons of the largest value; float32 and float64 also sum in another order.
EPS = {torch.float64: 1024, torch.float32: 128, torch.float16: 3, torch.bfloat16: 3}


@pytest.fixture(scope="session")
def emulate(tmp_path_factory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to build the emulator with")
    program = tmp_path_factory.mktemp("emulate") / "emulate"
    flags = ["-std=c++17", "-O1", "-g1", "-DFUSED_ATTN_EMULATE", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-I{HERE}"]
    subprocess.run([compiler, *flags, str(HERE / "main.cpp"), "-o", str(program)], check=True)
    return program


def write(tensor: Tensor, path: Path) -> None:
    path.write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def read(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).reshape(shape)


class Case:
    """One call of the block: tensors, options, and how it is spread over the machine."""

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
        self.options |= options
        c, dense = shape[1], self.options["layer"] == "dense"
        self.hidden, self.taps = (
            (hidden if self.layers == 2 else 0),
            (0 if dense or self.layers == 0 else taps),
        )
        t: dict[str, Tensor | None] = dict.fromkeys((*PARAMETERS, "residual"))
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
        for name in PARAMETERS:
            if t[name] is not None:
                t[name] = t[name].to(weights)
        self.tensors = t

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
        lines = [f"{k} {v}" for k, v in numbers.items()]
        for name, tensor in t.items():
            if tensor is not None:
                lines.append(f"tensor {name} {CODES[tensor.dtype]} {tensor.numel()}")
                write(self.memory(tensor) if tensor.dim() == t["x"].dim() else tensor, folder / f"{name}.bin")
        (folder / "case.txt").write_text("\n".join(lines) + "\n")
        environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
        environment.pop("LD_PRELOAD", None)
        done = subprocess.run([program, folder], capture_output=True, text=True, env=environment, timeout=120)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        out = {"y": self.map(read(folder / "out_y.bin", self.dtype, (-1,)))}
        out["x"] = self.map(read(folder / "out_grad_x.bin", self.dtype, (-1,)))
        if t["residual"] is not None and o["post_activation"] != "identity":
            out["residual"] = self.map(read(folder / "out_grad_residual.bin", self.dtype, (-1,)))
        for name in PARAMETERS:
            if t[name] is not None:
                out[name] = read(folder / f"out_grad_{name}.bin", t[name].dtype, t[name].shape)
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.state = read(folder / "out_state.bin", acc, (b, -1))
        self.index = read(folder / "out_index.bin", torch.int32, (b, c))
        passes = dict(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("passes"))
        return out, {k: float(v) for k, v in passes.items()}

    def memory(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(1, -1) if self.layout == "channels_last" else tensor

    def map(self, flat: Tensor) -> Tensor:
        shape = self.memory(self.tensors["x"]).shape
        return flat.reshape(shape).movedim(-1, 1) if self.layout == "channels_last" else flat.reshape(shape)

    def exact(self) -> dict[str, Tensor]:
        """The output ("y") and all gradients of the reference in float64."""
        leaves = {k: v.double().requires_grad_() for k, v in self.tensors.items() if v is not None and k != "grad"}
        given = {k: leaves.get(k) for k in ("weight1", "bias1", "weight2", "bias2", "residual")}
        affine = (leaves["affine_weight"], leaves["affine_bias"]) if "affine_weight" in leaves else None
        y = fused_attn.reference.channel_gate(leaves["x"], **given, affine=affine, **self.options)
        grads = torch.autograd.grad(y, list(leaves.values()), self.tensors["grad"].double(), allow_unused=True)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

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


BOTH = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
HALF = torch.bfloat16


@BOTH
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squeeze_excite(emulate, tmp_path, layout, ranks, dtype):
    shape = {1: (2, 8, 7, 7), 2: (3, 9, 13, 17), 4: (2, 72, 7, 7), 8: (1, 20, 5, 3)}[ranks]
    passes = Case(shape, dtype, layout, ranks, seed=ranks).check(emulate, tmp_path)
    assert passes == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(
    "shape", [(2, 8, 1, 1), (1, 1, 13, 17), (1, 3, 1, 1), (2, 5, 11), (1, 4, 3, 5, 2), (3, 7, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_shapes(emulate, tmp_path, layout, shape, dtype):
    passes = Case(shape, dtype, layout, ranks=2, pool="avgmax").check(emulate, tmp_path)
    assert passes == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(
    ("layer", "layers", "taps"), [("dense", 0, 0), ("dense", 1, 0), ("conv", 1, 5), ("circular", 1, 11)]
)
@pytest.mark.parametrize(("ranks", "channels"), [(1, 8), (4, 9)])
def test_excitations(emulate, tmp_path, layout, layer, layers, taps, ranks, channels):
    case = Case((2, channels, 5, 6), HALF, layout, ranks, layer=layer, layers=layers, taps=taps, gate="hard_sigmoid")
    assert case.check(emulate, tmp_path) == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(("pool", "ties"), list(itertools.product(["max", "avgmax"], ["first", "even"])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maxima_and_ties(emulate, tmp_path, layout, pool, ties, dtype):
    x = random(2, 12, 6, 5).mul(2).round()  # few values: every maximum is tied
    x[0, 3] = -1.0
    Case(x.shape, dtype, layout, 2, x=x, pool=pool, ties=ties, bias=False).check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize("ties", ["first", "even"])
def test_nan(emulate, tmp_path, layout, ties):
    x = random(2, 8, 5, 4)
    x[0, 2, 1, 3] = x[0, 2, 4, 0] = torch.nan
    x[1, 4] = -torch.inf
    case = Case(x.shape, torch.float32, layout, 2, x=x, pool="max", ties=ties, layers=0)
    found, _ = case.run(emulate, tmp_path)
    assert torch.equal(found["y"].isnan(), case.exact()["y"].isnan())
    assert case.index[0, 2] == (7 if ties == "first" else 0)
    assert case.index[1, 4] == (0 if ties == "first" else 20)
    assert not found["x"][1, :4].isnan().any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 4])
def test_residual_and_relu(emulate, tmp_path, layout, dtype, ranks):
    case = Case((2, 11, 6, 7), dtype, layout, ranks, residual=True, post_activation="relu")
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("post_activation", ["silu", "gelu", "leaky_relu"])
def test_recomputed_epilogue(emulate, tmp_path, layout, post_activation):
    case = Case((2, 6, 5, 5), torch.float32, layout, 2, residual=True, post_activation=post_activation)
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "silu", "hard_swish"])
@pytest.mark.parametrize(("dtype", "pool"), [(torch.float32, "avgmax"), (torch.float64, "max"), (HALF, "avg")])
def test_prologue(emulate, tmp_path, layout, pre_activation, dtype, pool):
    case = Case((2, 10, 5, 4), dtype, layout, 2, affine=True, pre_activation=pre_activation, pool=pool)
    assert case.check(emulate, tmp_path) == {"forward": 2, "backward": 3}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(emulate, tmp_path, name):
    options = {
        "activation": name,
        "gate": name,
        "pre_activation": name,
        "post_activation": name,
        "residual": True,
    }
    floor = 1e-6 if name.startswith("hard") else 0.0  # torch keeps 1 / 6 in float32
    Case((2, 6, 3, 3), torch.float64, **options).check(emulate, tmp_path, floor=floor)


@BOTH
def test_float32_weights_of_a_half_map(emulate, tmp_path, layout):
    Case((2, 16, 4, 4), HALF, layout, 2, weights=torch.float32).check(emulate, tmp_path)


@BOTH
def test_two_runs_and_two_schedules_agree_to_the_bit(emulate, tmp_path, layout):
    runs = [Case((2, 10, 6, 5), HALF, layout, 4, seed=seed).run(emulate, tmp_path)[0] for seed in (1, 2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_state_rows(emulate, tmp_path, layout):
    case = Case((2, 6, 4, 3), torch.float64, layout, 2, pool="max", ties="even")
    case.run(emulate, tmp_path)
    t, state = case.tensors, case.state
    s = t["x"].amax((2, 3))
    z1 = s @ t["weight1"].T + t["bias1"]
    z2 = z1.relu() @ t["weight2"].T + t["bias2"]
    torch.testing.assert_close(state, torch.cat([s, z2, z1, s], 1))


@pytest.mark.parametrize(("layout", "barriers"), [("nchw", 1), ("channels_last", 3)])
def test_every_cluster_barrier_is_needed(emulate, tmp_path, layout, barriers):
    """Taken out one by one, and the last one (nobody leaves early): the emulator sees each."""
    seen = []
    for drop in range(barriers + 1):
        for seed in range(12):
            try:
                Case((1, 16, 6, 6), torch.float32, layout, 4, seed=seed).check(emulate, tmp_path, drop)
            except (AssertionError, RuntimeError):
                seen.append(drop)
                break
    assert seen == list(range(barriers + 1))
