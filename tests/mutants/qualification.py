"""Faults in how a device qualifies itself: what is collected, judged, timed, kept, shared and looked up."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CHOOSE = "tests/qualification/test_choose.py"
PARENT = "tests/qualification/test_parent.py"
QUALIFY = "tests/qualification/test_qualify.py"
TRIAL = "tests/qualification/test_trial.py"
VERDICTS = "tests/qualification/test_verdicts.py"

MUTANTS = [
    Mutant(
        name="a-verdict-changes-in-a-process",
        file="fused_attn/backends.py",
        old="            by_class.setdefault(verdict.shape, verdict)\n",
        new="            by_class[verdict.shape] = verdict\n",
        tests=f"{CHOOSE} -k test_a_verdict_stays",
    ),
    Mutant(
        name="compiled-code-looks-at-sizes",
        file="fused_attn/backends.py",
        old="                if _is_compiling() or type(x) not in _VALUED:\n",
        new="                if False:\n",
        tests=f"{CHOOSE} -k 'test_compiled_once_for_all_sizes or test_tensors_without_values'",
    ),
    Mutant(
        name="compiled-code-guards-on-how-much-is-known",
        file="fused_attn/backends.py",
        old="        if _Known.anything:\n",
        new="        if _SERVED:\n",
        tests=f"{CHOOSE} -k test_what_is_found_later_compiles_nothing_again",
    ),
    Mutant(
        name="a-resident-backend-serves-larger-samples",
        file="fused_attn/backends.py",
        old="        return verdict.backend if fits else self.anywhere\n",
        new="        return verdict.backend\n",
        tests=f"{CHOOSE} -k test_a_resident_backend_serves_what_fits",
    ),
    Mutant(
        name="other-tensors-are-no-part-of-a-question",
        file="fused_attn/backends.py",
        old="            dtypes = tuple([None if t is None else t.dtype for t in others])\n",
        new="            dtypes = (None,) * len(others)\n",
        tests=f"{CHOOSE} -k test_a_verdict_is_of_its_question_alone",
    ),
    Mutant(
        name="faster-by-one-clock-is-enough",
        file="fused_attn/qualification/trial.py",
        old="    return min(shares) <= FASTER and max(shares) <= NOT_SLOWER\n",
        new="    return min(shares) <= FASTER\n",
        tests=f"{TRIAL} -k test_faster_by_one_clock",
    ),
    Mutant(
        name="no-ties-are-tried",
        file="fused_attn/qualification/trial.py",
        old="    return tensor.clamp(-1, 1).mul(2).round()\n",
        new="    return tensor\n",
        tests=PARENT,
    ),
    Mutant(
        name="no-nan-is-tried",
        file="fused_attn/qualification/trial.py",
        old="    tensor[tuple(n // 2 for n in tensor.shape)] = torch.nan\n",
        new="",
        tests=PARENT,
    ),
    Mutant(
        name="no-gradients-are-tried-on-ties",
        file="fused_attn/qualification/trial.py",
        old="            _compare(made._replace(tensors=tied), training,",
        new="            _compare(made._replace(tensors=tied), False,",
        tests=PARENT,
    ),
    Mutant(
        name="two-runs-are-not-compared",
        file="fused_attn/qualification/trial.py",
        old='            raise AssertionError("two runs differ")\n',
        new="            pass\n",
        tests=PARENT,
    ),
    Mutant(
        name="fresh-memory-is-as-it-comes",
        file="fused_attn/qualification/trial.py",
        old="    deterministic.fill_uninitialized_memory = True\n",
        new="    deterministic.fill_uninitialized_memory = False\n",
        tests=PARENT,
    ),
    Mutant(
        name="only-odd-sizes-are-judged",
        file="fused_attn/qualification/trial.py",
        old="        return self._found(check_itself, call, training, name)\n",
        new="        return None\n",
        tests=PARENT,
    ),
    Mutant(
        name="autocast-is-off-where-it-was-on",
        file="fused_attn/qualification/trial.py",
        old="            with torch.autocast(device.type, call.question.dtype) if call.autocast else",
        new="            with torch.autocast(device.type, call.question.dtype) if False else",
        tests=f"{TRIAL} -k test_under_autocast",
    ),
    Mutant(
        name="a-block-counts-batches-it-never-saw",
        file="fused_attn/qualification/calls.py",
        old="        with modes_kept(block), kept, fake,",
        new="        with modes_kept(block), fake,",
        tests=f"{TRIAL} -k test_a_block_without_an_example",
    ),
    Mutant(
        name="what-has-no-memory-is-a-verdict",
        file="fused_attn/qualification/trial.py",
        old="        except Unmeasured:\n            raise\n",
        new="",
        tests=PARENT,
    ),
    Mutant(
        name="a-file-of-another-card-is-read",
        file="fused_attn/verdicts.py",
        old="    if table.environment != environment:\n",
        new="    if not table.environment:\n",
        tests=f"{VERDICTS} -k test_a_file_that_is_none_of_ours",
    ),
    Mutant(
        name="a-file-that-is-no-table-is-written-over",
        file="fused_attn/verdicts.py",
        old='                path.rename(path.with_suffix(".unread"))\n',
        new="                pass\n",
        tests=f"{VERDICTS} -k test_a_file_that_is_none_of_ours",
    ),
    Mutant(
        name="a-table-that-ships-serves-other-kernels",
        file="fused_attn/verdicts.py",
        old='    return "device" in table and all(here.get(key) == value for key, value in table.items())\n',
        new='    return "device" in table and here["device"] == table["device"]\n',
        tests=f"{VERDICTS} -k test_what_ships",
    ),
    Mutant(
        name="the-first-host-decides",
        file="fused_attn/qualification/ranks.py",
        old="    if len(verdicts) < len(answers) or len(names) > 1:\n",
        new="    if not answers:\n",
        tests=f"{QUALIFY} -k 'test_hosts_that_differ or test_ranks_choose_alike'",
    ),
    Mutant(
        name="every-rank-measures",
        file="fused_attn/qualification/__init__.py",
        old="        if next(i for i, of_rank in enumerate(everyone) if place in of_rank) == ranks.rank():\n",
        new="        if asking:\n",
        tests=f"{QUALIFY} -k test_ranks_choose_alike",
    ),
    Mutant(
        name="a-recomputed-checkpoint-measures",
        file="fused_attn/qualification/__init__.py",
        old="    if torch._C._current_graph_task_id() != -1:\n",
        new="    if torch._C._current_graph_task_id() < -1:\n",
        tests=f"{QUALIFY} -k test_moments_at_which_nothing_is_measured",
    ),
    Mutant(
        name="fuse-measures-whatever-was-asked-for",
        file="fused_attn/fusion/api.py",
        old="    if device.type in qualification.BY_FUSE and backends.forced() is None and",
        new="    if device.type in qualification.BY_FUSE and",
        tests=f"{QUALIFY} -k test_fuse_where_a_backend_was_asked_for",
    ),
    Mutant(
        name="qualify-leaves-a-model-in-evaluation-mode",
        file="fused_attn/qualification/calls.py",
        old="            part.training = training\n",
        new="            pass\n",
        tests=f"{QUALIFY} -k test_qualify_collects_what_a_run_calls",
    ),
]
