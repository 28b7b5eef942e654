"""The sdist and the wheel: what is in them, where they install, and what if something is missing."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.workers import folder_of_the_run, one_at_a_time
from tools import wheels

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SITE = Path(sysconfig.get_path("purelib"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the native library is for Linux"),
]


def run(*command: str | Path, cwd: Path, ok: bool = True, path: str | None = None, **environment: str) -> str:
    """What the command prints, both streams; the build's own variables are only those given here."""
    ours = ("CXX", "CXXFLAGS", "FUSED_ATTN_", "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    kept["PATH"] = path or f"{BIN}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ok, f"exit status {done.returncode}: {done.stdout[-4000:]}"
    return done.stdout


#: As the checkout was built, so that its objects serve.
AS_HERE = {name: value for name, value in os.environ.items() if name == "TORCH_CUDA_ARCH_LIST"}


def setup(tree: Path, command: str, *options: str, **kwargs) -> str:
    """What pip runs, without pip's own time."""
    return run(sys.executable, "setup.py", command, *options, cwd=tree, **kwargs)


def pip_wheel(source: Path, out: Path, *options: str, **kwargs) -> tuple[Path, str]:
    command = ("pip", "wheel", "-v", "--no-deps", *options, "-w", out, source)
    printed = run(sys.executable, "-m", *command, cwd=out, **kwargs)
    (wheel,) = out.glob("*.whl")
    return wheel, printed


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `sdist/`, `tree/` (the sdist unpacked) and `wheel/`, made once for all workers.

    The wheel is built under pip's build isolation. The objects that the checkout has are brought along, so
    only what changed is compiled.
    """
    folder = folder_of_the_run(tmp_path_factory) / "packages"
    folder.mkdir(exist_ok=True)
    with one_at_a_time(folder / "done"):
        if not (folder / "done").exists():
            # the output of one `make` is not in another's sdist
            left_out = (".git", ".venv", ".cache", "build", "dist", "*.egg-info", "__pycache__", "_native.so")
            shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*left_out))
            command = ("build", "--sdist", "--no-isolation", "-o", folder / "sdist")
            run(sys.executable, "-m", *command, cwd=folder / "copy")
            (sdist,) = (folder / "sdist").glob("*.tar.gz")
            with tarfile.open(sdist) as archive:
                archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
            (folder / sdist.name.removesuffix(".tar.gz")).rename(folder / "tree")
            if (ROOT / "build/native").exists():
                with contextlib.suppress(FileNotFoundError):
                    shutil.copytree(ROOT / "build/native", folder / "tree/build/native")
            (folder / "wheel").mkdir()
            _, printed = pip_wheel(folder / "tree", folder / "wheel", **AS_HERE)
            (folder / "printed").write_text(printed)
            (folder / "done").touch()
    return folder


@pytest.fixture
def wheel(built: Path) -> Path:
    (path,) = (built / "wheel").glob("*.whl")
    return path


def build_info(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("fused_attn/_build_info.json"))


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel in it, and this one's torch; its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin/python"
    options = ("--no-deps", "--no-index", "--no-warn-script-location")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    # This environment's packages, but not its .pth files: an editable fused_attn stays out of sight.
    (site / "torch-from-elsewhere.pth").write_text(f"{SITE}\n")
    return python


USE = """
import json, pathlib, sys
import torch, fused_attn
from fused_attn import backends

torch.manual_seed(0)
x = torch.randn(2, 16, 9, 7)
block = fused_attn.nn.SqueezeExcite(16, reduction=4)
with fused_attn.backend("reference"):
    expected = block(x)
error = (block(x) - expected).abs().max().item()
reason = backends.unavailable("cpu", "channel_gate", "cpu")
backend = backends.choose("channel_gate", x)
print(json.dumps([fused_attn.__file__, fused_attn.__version__, backend, reason, error]))
"""


def use(python: Path, folder: Path) -> list:
    return json.loads(run(python, "-W", "ignore", "-c", USE, cwd=folder).splitlines()[-1])


def test_sdist_has_what_a_build_and_its_tests_need(built: Path):
    (sdist,) = (built / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = (".so", ".o", ".pyc", "_build_info.json")
    source = built / "copy"
    needed = {"setup.py", "pyproject.toml", "Makefile", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    needed |= {".clang-format", "tests/checkpoint_keys.json", "tests/emulate/harness.h", "docs/demo.png"}
    # Tests read more than Python: sources to compile, shapes of checkpoints, pictures and figures that the README has.
    for folder in ("fused_attn", "csrc", "tests", "tools", "benchmarks", "docs", ".ci", ".github"):
        files = [path for path in (source / folder).rglob("*") if path.is_file() and not path.name.endswith(made)]
        assert files, folder
        needed |= {str(path.relative_to(source)) for path in files}
    assert needed <= names, sorted(needed - names)
    built_files = [n for n in names if n.endswith(made)]
    assert not built_files


def test_wheel_is_for_every_python(wheel: Path):
    name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{name}.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    requires = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    always = [r for r in requires if "extra ==" not in r]
    assert "Requires-Python: >=3.10" in metadata
    assert [re.match(r"[\w-]+", r)[0] for r in always] == ["torch", "triton"], always


def test_wheel_has_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused_attn"}
    expected = {str(p.relative_to(ROOT)) for p in ROOT.glob("fused_attn/**/*.py")}
    expected |= {
        "fused_attn/py.typed",
        "fused_attn/_native.so",
        "fused_attn/_build_info.json",
        "fused_attn/tables/cpu.json",
    }
    assert {name for name in names if name.startswith("fused_attn/")} == expected


def test_native_library_has_no_python_and_only_the_stable_abi(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("fused_attn/_native.so", tmp_path)
    undefined = [line.split()[-1] for line in run("nm", "-D", "-u", library, cwd=tmp_path).splitlines()]
    assert "torch_call_dispatcher" in undefined, "the list is not that of a torch library"
    python = [name for name in undefined if re.match(r"_?Py", name)]
    assert not python
    # Mangled names of torch, ATen or c10 change with every torch; C names of the stable ABI do not.
    unstable = [name for name in undefined if re.search(r"^_Z\w*(?:N2at|N3c10|N5torch)", name)]
    assert not unstable
    dynamic = run("readelf", "-d", library, cwd=tmp_path)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    unwanted = ("libpython", "libtorch_python", "libc10", "libcudart")
    assert not [name for name in needed if name.startswith(unwanted)]
    assert "libtorch_cpu.so" in needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_a_symbol_that_torch_lacks_is_an_error_of_the_build(built: Path, tmp_path: Path):
    """Not one of loading the library."""
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree, ignore=shutil.ignore_patterns("build", "csrc"))
    (tree / "csrc").mkdir()
    for value, ok in (("1", True), ("not_in_torch()", False)):
        (tree / "csrc/library.cpp").write_text(f"int not_in_torch();\nint used() {{ return {value}; }}\n")
        printed = setup(tree, "build_ext", "--inplace", ok=ok, FUSED_ATTN_CUDA="0")
        assert ("not_in_torch" in printed) != ok and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("fused_attn: csrc does not compile")


def test_wheel_works_in_another_environment(wheel: Path, tmp_path: Path):
    python = install(wheel, tmp_path / "other")
    file, version, backend, reason, error = use(python, tmp_path)
    assert file.startswith(str(tmp_path / "other"))
    assert version == wheel.name.split("-")[1]
    assert (backend, reason) == ("cpu", None)
    assert error < 1e-5
    printed = run(python.with_name("fused-attn"), "--version", cwd=tmp_path)
    assert printed.split() == ["fused-attn,", "version", version]


def test_isolated_build_used_this_environments_torch(built: Path, wheel: Path):
    import torch

    info = build_info(wheel)
    assert info["torch_headers"] == torch.__version__ and len(info["sources"]) == 16
    assert info["cpu"]["built"] and info["cpu"]["reason"] is None
    printed = (built / "printed").read_text()
    (installed,) = re.findall(r"Successfully installed (.+)", printed)
    assert {re.sub(r"-[\d.]+$", "", name) for name in installed.split()} == {"setuptools", "ninja"}


@pytest.mark.parametrize("case", ["none on PATH", "does not work"])
def test_without_compiler_it_installs_warns_once_and_says_why(built: Path, tmp_path: Path, case: str):
    environment = {"path": str(BIN)} if case == "none on PATH" else {"CXX": "false"}
    if case == "none on PATH" and any(shutil.which(c, path=str(BIN)) for c in ("c++", "g++", "clang++")):
        pytest.skip("this Python lives beside a C++ compiler")
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree, ignore=shutil.ignore_patterns("build"))
    if case == "none on PATH":
        (tmp_path / "wheel").mkdir()
        wheel, printed = pip_wheel(tree, tmp_path / "wheel", "--no-build-isolation", **environment)
    else:
        printed = setup(tree, "bdist_wheel", **environment)
        (wheel,) = (tree / "dist").glob("*.whl")
    warnings = re.findall(r"fused_attn: WARNING: (.+)", printed)
    assert len(warnings) == 1, warnings
    reason = "there is no C++ compiler" if case == "none on PATH" else "`false` does not work"
    assert f"installed without the native library: {reason}" in warnings[0]
    info = build_info(wheel)
    assert not info["cpu"]["built"] and reason in info["cpu"]["reason"]
    with zipfile.ZipFile(wheel) as archive:
        assert "fused_attn/_native.so" not in archive.namelist()
    if case != "none on PATH":  # once installed they are the same
        return
    _, _, backend, why, error = use(install(wheel, tmp_path / "other"), tmp_path)
    assert (backend, error) == ("reference", 0.0)
    assert reason in why


def test_without_torch_it_builds_and_says_so(built: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree, ignore=shutil.ignore_patterns("build"))
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare", cwd=tmp_path)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for found in [SITE / "setuptools", SITE / "_distutils_hack", *SITE.glob("setuptools-*.dist-info")]:
        (site / found.name).symlink_to(found)
    printed = run(tmp_path / "bare/bin/python", "setup.py", "bdist_wheel", cwd=tree, PYTHONNOUSERSITE="1")
    assert printed.count("fused_attn: WARNING") == 1
    assert "torch is not in this environment" in printed
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "torch is not in this environment" in build_info(wheel)["cpu"]["reason"]


def test_torch_of_the_activated_environment_is_found(built: Path, tmp_path: Path):
    """`python -m build` runs setup.py in an environment of its own, and says which was activated."""
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree, ignore=shutil.ignore_patterns("build", "csrc"))
    (tree / "csrc").mkdir()
    (tree / "csrc/library.cpp").write_text("int used() { return 1; }\n")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare", cwd=tmp_path)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    for found in [*(SITE / name for name in ("setuptools", "_distutils_hack", "ninja")), *SITE.glob("setuptools-*")]:
        (site / found.name).symlink_to(found)
    environment = {"PYTHONNOUSERSITE": "1", "VIRTUAL_ENV": sys.prefix, "FUSED_ATTN_CUDA": "0"}
    printed = run(tmp_path / "bare/bin/python", "setup.py", "build_ext", "--inplace", cwd=tree, **environment)
    info = json.loads((tree / "fused_attn/_build_info.json").read_text())
    assert info["torch_headers"] and info["cpu"]["built"], printed


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_published_wheels_are_for_old_systems(built: Path, wheel: Path, tmp_path: Path, kind: str):
    """auditwheel agrees that glibc 2.28 is enough; what is not made for it is refused. Nothing of torch is packed."""
    pytest.importorskip("auditwheel")
    cuda = build_info(wheel)["cuda"]
    if kind == "cuda" and not cuda["built"]:
        pytest.skip(f"no CUDA kernels here: {cuda['reason']}")
    (sdist,) = (built / "sdist").glob("*.tar.gz")
    asked = AS_HERE.get("TORCH_CUDA_ARCH_LIST", " ".join(cuda["architectures"] or ()))
    made = wheels.wheel(sdist, kind, tmp_path / "raw", built / "tree/build/native", asked)
    audited = wheels.audit(made, tmp_path / "out")
    version = wheel.name.split("-")[1]
    assert audited.name == f"fused_attn-{version}{'+cpu' if kind == 'cpu' else ''}-py3-none-{wheels.PLATFORM}.whl"
    assert build_info(audited)["cpu"]["built"] and build_info(audited)["cuda"]["built"] == (kind == "cuda")
    with zipfile.ZipFile(audited) as archive:
        assert not [name for name in archive.namelist() if ".so" in name and name != "fused_attn/_native.so"]
        tag = archive.read(next(n for n in archive.namelist() if n.endswith("/WHEEL"))).decode()
    assert f"Tag: py3-none-{wheels.PLATFORM}\n" in tag
    if tuple(map(int, platform.libc_ver()[1].split("."))) > (2, 31):  # whose symbols this build would have
        with pytest.raises(subprocess.CalledProcessError):
            wheels.audit(wheel, tmp_path / "refused")
    python = install(audited, tmp_path / "other")
    kernels = "none" if kind == "cpu" else cuda["architectures"]
    assert f"works; CUDA kernels {kernels}" in run(python, ROOT / "tools/smoke.py", cwd=tmp_path)


def test_cuda_can_be_left_out(built: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree)
    printed = setup(tree, "build_ext", "--inplace", FUSED_ATTN_CUDA="0")
    info = json.loads((tree / "fused_attn/_build_info.json").read_text())
    assert info["cpu"]["built"] and not info["cuda"]["built"]
    assert "FUSED_ATTN_CUDA=0" in info["cuda"]["reason"]
    assert "fused_attn: WARNING" not in printed


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"FUSED_ATTN_CUDA": "1", "CUDA_HOME": "/nowhere"}, "kernels cannot be built: there is no nvcc"),
        ({"FUSED_ATTN_CUDA": "yes"}, "FUSED_ATTN_CUDA: expected auto, 0 or 1; got 'yes'"),
        ({"FUSED_ATTN_CUDA": "1", "CXX": "false"}, "kernels cannot be built: `false` does not work"),
    ],
)
def test_cuda_that_must_be_built_but_cannot_is_one_line(built: Path, tmp_path: Path, environment, words):
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree)
    printed = setup(tree, "build_ext", "--inplace", ok=False, **environment)
    assert words in printed.splitlines()[-1]
    assert "Traceback" not in printed


OLD, NEW = {"compute_80": ["sm_80"]}, ["sm_90a", "sm_100", "sm_120", "compute_90"]


@pytest.mark.parametrize(
    "known, cards, asked, expected",
    [
        ("75 80 90 100 120", "", "", OLD | {"compute_90": NEW}),
        ("80 90", "", "", OLD | {"compute_90": ["sm_90a", "compute_90"]}),
        ("80 90 100 120", "9.0", "all", OLD | {"compute_90": NEW}),
        ("80 90 100 120", "9.0 9.0", "", {"compute_90": ["sm_90", "compute_90"]}),
        ("80 86 90 100 120", "12.0 7.5 8.6", "", {"compute_80": ["sm_86"], "compute_90": ["sm_120", "compute_90"]}),
        ("80 86", "8.6", "", {"compute_80": ["sm_86", "compute_80"]}),
        ("80 90", "10.3", "", {"compute_90": ["sm_90a", "compute_90"]}),
        ("90", "8.6", "8.0;9.0+PTX;10.0+PTX", OLD | {"compute_90": ["sm_90", "compute_90", "sm_100"]}),
    ],
)
def test_architectures_are_the_machines_or_those_that_nvcc_knows(
    built: Path, tmp_path: Path, known: str, cards: str, asked: str, expected: dict
):
    """From as few compilations as there can be; the last one's PTX is for newer cards."""
    printed = build_with_tools_that_answer(built, tmp_path, known, cards, TORCH_CUDA_ARCH_LIST=asked)
    found: dict[str, list[str]] = {}
    for ptx, code in re.findall(r"-gencode=arch=(\w+),code=(\w+)", printed):
        found.setdefault(ptx, []).append(code)
    assert found == expected


def test_cards_that_are_too_old_are_said(built: Path, tmp_path: Path):
    printed = build_with_tools_that_answer(built, tmp_path, "75 80 90", "7.5")
    assert printed.splitlines()[-1].endswith("this machine's GPU has compute capability 7.5; 8.0 is needed")


def build_with_tools_that_answer(built: Path, tmp_path: Path, known: str, cards: str, **environment: str) -> str:
    """What a build prints where nvcc knows, and the driver has, those architectures; it compiles nothing and fails."""
    tree, cuda = tmp_path / "tree", tmp_path / "cuda"
    shutil.copytree(built / "tree", tree, ignore=shutil.ignore_patterns("build", "csrc"))
    for folder in (tree / "csrc/cuda", cuda / "bin", cuda / "lib64"):
        folder.mkdir(parents=True)
    (tree / "csrc/cuda/kernel.cu").touch()
    (cuda / "lib64/libcudart_static.a").touch()
    names = "\n".join(f"sm_{name}" for name in known.split())
    answers = {
        "nvcc": f"""case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
*--list-gpu-code*) echo "{names}" ;;
*--dryrun*) ;;
*) exit 1 ;;
esac""",
        "nvidia-smi": f"printf '%s\\n' {cards}" if cards else "exit 9",
    }
    for name, answer in answers.items():
        (cuda / "bin" / name).write_text(f"#!/bin/sh\n{answer}\n")
        (cuda / "bin" / name).chmod(0o755)
    path = os.pathsep.join(map(str, (cuda / "bin", BIN, os.environ["PATH"])))
    environment |= {"FUSED_ATTN_CUDA": "1", "CUDA_HOME": str(cuda)}
    return setup(tree, "build_ext", "--inplace", ok=False, path=path, **environment)


def test_a_second_build_compiles_nothing(built: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    shutil.copytree(built / "tree", tree)
    assert "no work to do" in setup(tree, "build_ext", "--inplace", **AS_HERE)
