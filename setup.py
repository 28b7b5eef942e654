"""Builds csrc/ into one shared object, fused_attn/_native.so, with ninja; the metadata is in pyproject.toml.

The object is on PyTorch's stable ABI and has no Python in it: one build serves torch >= 2.10 and every
Python. Only torch's headers and libtorch_cpu.so are needed to build it, and they are found without importing
torch, in the environment being installed into: pip's build isolation hides that environment from `import`,
but not from `sysconfig`, so no second torch is downloaded.

What cannot be built is left out, with one warning; fused_attn/_build_info.json keeps what was built and why
not more (`fused-attn info` prints it). A source file that a working compiler refuses is an error.

Environment:
    CXX, CXXFLAGS         the C++ compiler, and flags added to ours
    CUDA_HOME             where nvcc lives, if not on PATH
    FUSED_ATTN_NATIVE     0: leave the native library out
    FUSED_ATTN_CUDA       auto (default): build csrc/cuda if nvcc can; 0: do not; 1: fail if it cannot
    FUSED_ATTN_PORTABLE   1: need no newer C and C++ libraries than manylinux_2_28 has, wherever it is built
    TORCH_CUDA_ARCH_LIST  default: this machine's GPUs; without one, and with "all": 8.0, 9.0a, 10.0, 12.0, as far as
                          nvcc knows them. PTX for newer ones either way
    MAX_JOBS              compilers at a time; default: one a core, while there are 2 GiB of memory for each
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
OLDEST_TORCH = (2, 10)
OLDEST = "{}.{}".format(*OLDEST_TORCH)
TORCH_TARGET = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000ULL"
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-Icsrc"]
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
NVCC_FLAGS = ["--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# What wheels are for: a library for 8.0 serves 8.6 and 8.9, too.
ARCHITECTURES = ("8.0", "9.0a", "10.0", "12.0")


class Unavailable(Exception):
    """A part of the native library cannot be built here; the message says why."""


def find_torch() -> tuple[Path, str]:
    """The torch package (headers and libraries) of the environment being installed into, and its version."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()]
    folders += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    candidates = [Path(folder, "torch") for folder in folders]
    # `python -m build` isolates by an environment of its own; that it was started in an activated one, this tells.
    for activated in filter(None, map(os.environ.get, ("VIRTUAL_ENV", "CONDA_PREFIX"))):
        candidates += Path(activated).glob("lib/python3*/site-packages/torch")
    if spec := importlib.util.find_spec("torch"):
        candidates += map(Path, spec.submodule_search_locations or [])
    for torch in candidates:
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.search(r"__version__ = '(.+)'", (torch / "version.py").read_text()).group(1)
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
            raise Unavailable(f"torch {version} is too old; {OLDEST} or newer is needed")
        return torch, version
    raise Unavailable(
        "torch is not in this environment (install torch first, then fused_attn again; `python -m build` finds it in an"
        " activated environment, or with --no-isolation)"
    )


def output_of(command: list[str]) -> str:
    """What a command prints; Unavailable, with its last words, if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise Unavailable(f"`{command[0]}` does not work: {words[0]}")
    return done.stdout


def find_compiler() -> tuple[list[str], str]:
    """The C++ compiler and its name and version, after it has built a small shared object."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    command = next((words for name in names if shutil.which((words := shlex.split(name))[0])), None)
    if command is None:
        raise Unavailable(f"there is no C++ compiler ({', '.join(names)})")
    BUILD.mkdir(parents=True, exist_ok=True)
    probe = BUILD / "probe.cpp"
    probe.write_text("#include <vector>\nint probe() { if constexpr (true) return std::vector<int>(1)[0]; }")
    output_of([*command, "-std=c++17", "-shared", "-fPIC", str(probe), "-o", str(probe.with_suffix(".so"))])
    return command, output_of([*command, "--version"]).splitlines()[0]


def find_nvcc() -> tuple[Path, str]:
    """nvcc and its version."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin/nvcc") for home in homes]
    if not homes:
        candidates = [Path(p) for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p]
    nvcc = next((path for path in candidates if path.exists()), None)
    if nvcc is None:
        raise Unavailable("there is no nvcc")
    return nvcc, re.search(r"release [\d.]+, V([\d.]+)", output_of([str(nvcc), "--version"])).group(1)


def cards() -> list[str]:
    """Compute capabilities of this machine's GPUs, oldest first, as its driver says; none where there is no driver."""
    try:
        printed = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    except Unavailable:
        return []
    return sorted(set(re.findall(r"^\d+\.\d$", printed, re.MULTILINE)), key=float)


def cuda_architectures(nvcc: Path) -> tuple[list[str], list[str]]:
    """TORCH_CUDA_ARCH_LIST, this machine's GPUs, or those of wheels as far as nvcc knows them; and nvcc's options."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if asked and asked != "all":
        names = re.split(r"[;,\s]+", asked)
        return names, list(dict.fromkeys(option for name in names for option in gencode(name)))
    there = [] if asked else cards()
    wanted = [name for name in there if float(name) >= float(ARCHITECTURES[0])]
    if there and not wanted:
        raise Unavailable(f"this machine's GPU has compute capability {there[-1]}; {ARCHITECTURES[0]} is needed")
    known = set(output_of([str(nvcc), "--list-gpu-code"]).split())
    names = [name for name in wanted or ARCHITECTURES if "sm_" + re.sub(r"\D", "", name) in known]
    # A GPU that nvcc does not know runs the newest PTX that it does.
    names = names or [name for name in ARCHITECTURES if "sm_" + re.sub(r"\D", "", name) in known][-1:]
    if not names:
        raise Unavailable(f"nvcc knows none of {', '.join(ARCHITECTURES)}")
    names[-1] += "+PTX"
    return names, [option for name in names for option in gencode(name)]


def gencode(architecture: str) -> list[str]:
    """nvcc's options for one entry such as 8.0, 9.0a or 10.0+PTX."""
    match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
    if match is None:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST: {architecture!r} is not of the form 8.0, 9.0a or 10.0+PTX")
    # The kernels use nothing beyond compute_90 and, before it, compute_80: what is newer is assembled from their PTX,
    # so that nvcc compiles once or twice, however many architectures there are.
    ptx = "90" if int(match[1]) >= 9 else "80" if int(match[1]) == 8 else match[1] + match[2]
    codes = ["sm_" + "".join(match.group(1, 2, 3))] + ([f"compute_{ptx}"] if match[4] else [])
    return [f"-gencode=arch=compute_{ptx},code={code}" for code in codes]


def cuda_runtime(nvcc: Path) -> Path:
    """The folder of the static CUDA runtime that goes with nvcc."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)  # nvcc may be a script or a link to elsewhere
    home = Path(top[1]).resolve() if top else nvcc.resolve().parent.parent
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (home / folder / "libcudart_static.a").exists():
            return home / folder
    raise Unavailable(f"no libcudart_static.a below {home}")


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def ninja_file(torch: Path, compiler: list[str], cuda: dict | None) -> str:
    """The rules: an object a source, one link. Paths of sources and objects are relative to ROOT."""

    def quote(words: list) -> str:
        return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")

    # libtorch_cpu.so is named (and nothing else of torch, and no rpath): torch loads it into a local scope,
    # where undefined symbols of other objects are not looked up, but the loader matches a named library with
    # the one already there. `-z defs` makes a symbol that torch lacks an error now instead of at load.
    link = [*compiler, "-shared", "-L" + str(torch / "lib"), "-ltorch_cpu", "-Wl,-z,defs", "-Wl,-s"]
    include = ["-isystem", torch / "include"]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    lines = [
        "ninja_required_version = 1.5",
        "builddir = build/native",
        "rule cxx",
        f"  command = {quote([*compiler, *FLAGS, *CXX_FLAGS])} $level {quote([*extra, *include])}"
        " -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $in",
    ]
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]
    if os.environ.get("FUSED_ATTN_PORTABLE") == "1":
        portable = [ROOT / "csrc/portable" / name for name in ("glibc.cpp", *(["cuda_runtime.cpp"] if cuda else []))]
        sources += portable
        text = "".join(source.read_text() for source in portable)
        names = dict.fromkeys(re.findall(r"\b__wrap_(\w+)|^FROM\(.*, (\w+)\)", text, re.M))
        link += [f"-Wl,--wrap={''.join(name)}" for name in names]
    if cuda:
        options = [f"--threads={max(1, min(4, jobs() // 3))}"]  # architectures at a time, of each of three sources
        options += cuda["gencode"]
        host = [f"-ccbin={compiler[0]}"] if os.environ.get("CXX") else []
        lines += [
            "rule nvcc",
            f"  command = {quote([cuda['path'], *FLAGS, *NVCC_FLAGS, *options, *host, *include])}"
            " -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CUDA $in",
        ]
        sources += ROOT.glob("csrc/cuda/*.cu")
        link += ["-L" + str(cuda["runtime"]), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    objects = []
    # Ninja starts them in this order: those that take longest first, so that no core waits for another at the end.
    for source in sorted(sources, key=lambda path: (path.suffix != ".cu", "kernels_" not in path.name, path)):
        name = source.relative_to(ROOT)
        objects.append(f"build/native/{name.relative_to('csrc')}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {name}")
        # Where AVX2 does the work, the kernels for any other processor are only built quickly.
        if source.stem == "kernels_baseline" and platform.machine() == "x86_64":
            lines.append("  level = -O2")
    first, libraries = link[: len(compiler) + 1], link[len(compiler) + 1 :]
    lines += [
        "rule link",
        f"  command = {quote(first)} $in -o $out {quote(libraries)}",
        "  description = LINK $out",
        f"build build/native/_native.so: link {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def run_ninja(text: str) -> None:
    """Build; Unavailable with the compiler's first error if that fails."""
    file = BUILD / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    ninja = shutil.which("ninja")
    if ninja is None:
        import ninja as package

        ninja = str(Path(package.BIN_DIR, "ninja"))
    done = subprocess.run(
        [ninja, "-C", str(ROOT), "-f", str(file), "-j", str(jobs())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    if done.returncode:
        lines = done.stdout.splitlines() or ["ninja failed"]
        raise Unavailable(next((line for line in lines if "error" in line.lower()), lines[-1]))


def warn(message: str) -> None:
    print(f"fused_attn: WARNING: {message}", file=sys.stderr, flush=True)


def prepare_cuda(info: dict) -> dict | None:
    """What the build file needs of CUDA; None, and the reason in `info`, if it is not wanted or not there."""
    wish = os.environ.get("FUSED_ATTN_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FUSED_ATTN_CUDA: expected auto, 0 or 1; got {wish!r}")
    if wish == "0":
        info["reason"] = "switched off when it was built (FUSED_ATTN_CUDA=0)"
        return None
    try:
        if not list(ROOT.glob("csrc/cuda/*.cu")):
            raise Unavailable("there are no CUDA sources")
        nvcc, info["nvcc"] = find_nvcc()
        info["architectures"], options = cuda_architectures(nvcc)
        return {"path": nvcc, "runtime": cuda_runtime(nvcc), "gencode": options}
    except Unavailable as reason:
        without_cuda(info, str(reason))
        return None


def without_cuda(info: dict, reason: str) -> None:
    if os.environ.get("FUSED_ATTN_CUDA") == "1":
        sys.exit(f"fused_attn: FUSED_ATTN_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    info.update(reason=reason, architectures=[])
    warn(f"built without the CUDA kernels: {reason}")


def hash_of_sources() -> str:
    """What the native library is made of, whatever compiles it."""
    found = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def build_native() -> dict:
    """Build build/native/_native.so where that is possible; what was built, and why not more."""
    cpu: dict = {"built": False, "compiler": None, "reason": None}
    cuda: dict = {"built": False, "nvcc": None, "architectures": [], "reason": None}
    info = {"torch_headers": None, "torch_target": OLDEST, "sources": hash_of_sources(), "cpu": cpu, "cuda": cuda}
    started = time.monotonic()
    try:
        if os.environ.get("FUSED_ATTN_NATIVE") == "0":
            raise Unavailable("switched off when it was built (FUSED_ATTN_NATIVE=0)")
        if not sys.platform.startswith("linux"):
            raise Unavailable(f"it is built on Linux only, this is {sys.platform}")
        torch, info["torch_headers"] = find_torch()
        compiler, cpu["compiler"] = find_compiler()
    except Unavailable as reason:
        cpu["reason"] = cuda["reason"] = str(reason)
        if os.environ.get("FUSED_ATTN_CUDA") == "1":
            without_cuda(cuda, str(reason))
        warn(
            f"installed without the native library: {reason}. "
            "Everything works: Triton serves GPUs, plain PyTorch serves the CPU."
        )
        return info
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = prepare_cuda(cuda)
        if found:
            try:
                run_ninja(ninja_file(torch, compiler, found))
                cuda["built"] = True
            except Unavailable as reason:
                without_cuda(cuda, str(reason))
        if not cuda["built"]:
            try:
                run_ninja(ninja_file(torch, compiler, None))
            except Unavailable as reason:
                sys.exit(f"fused_attn: csrc does not compile (FUSED_ATTN_NATIVE=0 leaves it out): {reason}")
    cpu["built"] = True
    print(f"fused_attn: built the native library in {time.monotonic() - started:.1f} s", flush=True)
    return info


class build_ext(_build_ext):
    """Puts _native.so and _build_info.json into the package: in the source tree for an editable install."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fused_attn"
        package.mkdir(parents=True, exist_ok=True)
        info = build_native()
        target = package / "_native.so"
        target.unlink(missing_ok=True)  # a stale one, or one that a running process has mapped
        if info["cpu"]["built"]:
            shutil.copy2(BUILD / "_native.so", target)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        files = (Path(self.build_lib, "fused_attn", name) for name in ("_native.so", "_build_info.json"))
        return [] if self.inplace else [str(file) for file in files if file.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []  # MANIFEST.in names csrc


class bdist_wheel(_bdist_wheel):
    """No CPython in the native library: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("fused_attn._native", sources=[])],
    cmdclass={"build_ext": build_ext, "bdist_wheel": bdist_wheel},
)
