"""Faults in what is built and shipped: the registration of operators, setup.py, the packages' contents, the README and
the pages."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    # ---- the native library ----
    Mutant(
        name="an-operator-not-registered",
        file="csrc/library.cpp",
        old='    m.impl("channel_pool_backward.cpu", TORCH_BOX(&fused_attn::cpu::channel_pool_backward));\n',
        new="",
        tests="tests/test_backends.py tests/ops/test_squeeze_scale.py"
        " -k 'test_channel_pool or test_opcheck or test_the_native_library_serves_every_op'",
    ),
    Mutant(
        name="symbols-may-stay-unresolved",
        file="setup.py",
        old='"-ltorch_cpu", "-Wl,-z,defs", "-Wl,-s"]',
        new='"-ltorch_cpu", "-Wl,-s"]',
        tests="tests/packaging/test_install.py -k test_a_symbol_that_torch_lacks_is_an_error_of_the_build",
    ),
    # ---- setup.py: what is found, said and recorded ----
    Mutant(
        name="torch-looked-for-where-import-looks",
        file="setup.py",
        old='    candidates = [Path(folder, "torch") for folder in folders]\n',
        new='    candidates = [Path(folder, "torch") for folder in sys.path]\n',
        tests="tests/packaging/test_install.py -k test_isolated_build_used_this_environments_torch",
    ),
    Mutant(
        name="cuda-demanded-without-a-compiler-is-no-error",
        file="setup.py",
        old='        if os.environ.get("FUSED_ATTN_CUDA") == "1":\n            without_cuda(cuda, str(reason))\n',
        new="",
        tests="tests/packaging/test_install.py -k test_cuda_that_must_be_built_but_cannot_is_one_line",
    ),
    Mutant(
        name="two-warnings-for-one-reason",
        file="setup.py",
        old='        if os.environ.get("FUSED_ATTN_CUDA") == "1":\n            without_cuda(cuda, str(reason))\n',
        new="        without_cuda(cuda, str(reason))\n",
        tests="tests/packaging/test_install.py -k test_without_torch_it_builds_and_says_so",
    ),
    Mutant(
        name="a-compilation-an-architecture",
        file="setup.py",
        old='ptx = "90" if int(match[1]) >= 9 else "80" if int(match[1]) == 8 else match[1] + match[2]',
        new='ptx = "".join(match.group(1, 2, 3))',
        tests="tests/packaging/test_install.py -k test_architectures_are",
    ),
    Mutant(
        name="wheel-bound-to-an-abi",
        file="setup.py",
        old='return ("py3", "none", super().get_tag()[2])',
        new='return ("py3", *super().get_tag()[1:])',
        tests="tests/packaging/test_install.py -k test_wheel_is_for_every_python",
    ),
    Mutant(
        name="reason-read-from-the-wrong-level-of-the-record",
        file="fused_attn/native.py",
        old='reason = build_record().get("cpu", {}).get("reason") or "no record of a build"',
        new='reason = build_record().get("reason") or "no record of a build"',
        tests="tests/packaging/test_install.py -k test_without_compiler_it_installs_warns_once_and_says_why",
    ),
    # ---- what the packages hold ----
    Mutant(
        name="only-python-of-the-tests-in-the-sdist",
        file="MANIFEST.in",
        old="graft tests\n",
        new="recursive-include tests *.py\n",
        tests="tests/packaging/test_install.py -k test_sdist_has_what_a_build_and_its_tests_need",
    ),
    Mutant(
        name="script-without-its-function",
        file="pyproject.toml",
        old='fused-attn = "fused_attn.cli:main"',
        new='fused-attn = "fused_attn.cli:cli"',
        tests="tests/packaging/test_install.py -k test_wheel_works_in_another_environment",
    ),
    # ---- the README and what it names ----
    Mutant(
        name="make-target-renamed",
        file="Makefile",
        old="demo: $(STAMPS)/bench  ##",
        new="demonstrate: $(STAMPS)/bench  ##",
        tests="tests/test_readme.py -k test_make_targets_exist",
    ),
    Mutant(
        name="parameters-of-a-block-miscounted",
        file="docs/blocks.md",
        old="| 4160 |",
        new="| 4096 |",
        tests="tests/test_readme.py -k test_parameters_of_blocks_are_as_the_page_says",
    ),
    Mutant(
        name="readme-table-typed-in",
        file="docs/figures.py",
        old="tax.get('tails', tax['fused'])",
        new="tax['fused']",
        tests="tests/test_readme.py -k test_the_readme_says_what_was_stored",
    ),
]
