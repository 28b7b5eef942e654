"""Faults in what recognises blocks, swaps them, explains it, and rewrites graphs; and in the demo."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    # ---- plan and swap: what must be unchanged, hooks, copies ----
    Mutant(
        name="a-function-set-later-is-not-noticed",
        file="fused_attn/fusion/changing/plan.py",
        old="    for owner, name, value in (*watched.options, *watched.parts):\n        part",
        new="    for owner, name, value in watched.options:\n        part",
        tests="tests/fusion/test_fuse.py -k test_a_function_set_after_fusing_counts",
    ),
    Mutant(
        name="an-option-set-later-is-not-noticed",
        file="fused_attn/fusion/changing/plan.py",
        old="    for owner, name, value in (*watched.options, *watched.parts):\n        part",
        new="    for owner, name, value in watched.parts:\n        part",
        tests="tests/fusion/test_fuse.py -k test_options_changed_after_fusing_count",
    ),
    Mutant(
        name="what-a-global-holds-is-not-watched",
        file="fused_attn/fusion/reading/reads.py",
        old="            elif value is not MISSING:\n                self._value(space, name, value)\n",
        new="",
        tests="tests/fusion/test_watched.py",
    ),
    Mutant(
        name="what-a-closure-holds-is-not-watched",
        file="fused_attn/fusion/reading/reads.py",
        old='                self._value(cell, "cell_contents", content)\n',
        new="                pass\n",
        tests="tests/fusion/test_watched.py",
    ),
    Mutant(
        name="backward-hooks-are-no-hooks",
        file="fused_attn/fusion/changing/plan.py",
        old='_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")\n',
        new='_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_pre_hooks")\n',
        tests="tests/fusion/test_fuse.py -k 'test_hooked_layers_are_refused or test_changes_made_after_fusing_count'",
    ),
    Mutant(
        name="forward-pre-hooks-are-no-hooks",
        file="fused_attn/nn/pointwise.py",
        old="        or layer._forward_pre_hooks\n",
        new="",
        tests="tests/fusion/test_fuse.py tests/fusion/test_adapters.py -k 'test_hooked_layers_are_refused"
        " or test_changes_made_after_fusing_count or test_the_parts_of_a_block_that_is_left_alone_are_fused'",
    ),
    Mutant(
        name="copies-forget-their-tails",
        file="fused_attn/fusion/changing/swap.py",
        old="        recipe = decide(self, tails=True)  # it was fused: as what it is, or else for its tail\n",
        new="        recipe = decide(self)\n",
        tests="tests/fusion/test_fuse.py tests/fusion/test_tails.py -k test_copies_run_fused_too",
    ),
    # ---- api and report ----
    Mutant(
        name="unfuse-looks-one-level-down",
        file="fused_attn/fusion/api.py",
        old="    for block in model.modules():\n        restore(block)\n",
        new="    for block in (model, *model.children()):\n        restore(block)\n",
        tests="tests/fusion/test_fuse.py tests/fusion/test_tails.py -k 'test_unfuse_gives_back_the_original"
        " or test_copies_run_fused_too or test_fusing_again_and_undoing'",
    ),
    Mutant(
        name="strict-does-not-know-of-refused-tails",
        file="fused_attn/fusion/changing/decide.py",
        old="        recipe = recognise(block, TAILS) or recipe\n",
        new="        tail = recognise(block, TAILS)\n"
        "        recipe = recipe if isinstance(tail, str) else tail or recipe\n",
        tests="tests/fusion/test_tails.py -k 'test_what_is_left_alone or test_why_a_tail_was_left_alone_can_be_asked'",
    ),
    Mutant(
        name="a-fused-block-is-a-candidate-again",
        file="fused_attn/fusion/api.py",
        old="        done = plan is not None and intact(module, plan)\n",
        new="        done = False\n",
        tests="tests/fusion/test_fuse.py tests/fusion/changing/test_parents.py"
        " -k 'test_fusing_again_changes_nothing or test_inside_a_model'",
    ),
    Mutant(
        name="a-changed-block-is-not-planned-again",
        file="fused_attn/fusion/api.py",
        old="        done = plan is not None and intact(module, plan)\n",
        new="        done = plan is not None\n",
        tests="tests/fusion/test_transparent.py",
    ),
    Mutant(
        name="not-fused-yet-counts-as-fused",
        file="fused_attn/fusion/report.py",
        old='    return Row(name, describe(block, found), cls, False, "its own forward", why)',
        new='    return Row(name, describe(block, found), cls, True, "its own forward", why)',
        tests="tests/fusion/test_tails.py tests/fusion/test_adapters.py"
        " -k 'test_why_a_tail_was_left_alone_can_be_asked or test_own_modules_are_one_row'",
    ),
    # ---- registry and adapters ----
    Mutant(
        name="subclasses-may-override-what-is-private",
        file="fused_attn/fusion/hosts/registry.py",
        old='            changes = not attribute.startswith("__") or attribute in',
        new='            changes = not attribute.startswith("_") or attribute in',
        tests="tests/fusion/test_fuse.py -k test_subclasses",
    ),
    Mutant(
        name="light-attention-takes-its-gate",
        file="fused_attn/fusion/hosts/timm.py",
        old="    # The light channel attention takes the sigmoid whatever its gate is.\n"
        '    activation, gate = activation_name(block.act), "sigmoid" if light else activation_name(block.gate)\n',
        new="    activation, gate = activation_name(block.act), activation_name(block.gate)\n",
        tests="tests/fusion/test_adapters.py -k test_same_function",
    ),
    Mutant(
        name="selective-kernel-does-not-drop",
        file="fused_attn/fusion/hosts/timm.py",
        old='    plain = path.aa is None and _is_exactly(path.bn, "norm_act.BatchNormAct2d")'
        " and type(path.bn.drop) is nn.Identity\n",
        new='    plain = path.aa is None and _is_exactly(path.bn, "norm_act.BatchNormAct2d")\n',
        tests="tests/fusion/test_adapters.py -k 'test_same_function and SelectiveKernel'",
    ),
    # ---- what the layers of tails save ----
    Mutant(
        name="copies-save-all",
        file="fused_attn/fusion/changing/swap.py",
        old="        rest = [_without_plan(part, save_of(self)) for part in rest]\n",
        new="        rest = [_without_plan(part) for part in rest]\n",
        tests="tests/fusion/test_least.py -k test_copies_save_the_least_too",
    ),
    Mutant(
        name="what-is-made-again-is-made-for-each-layer",
        file="fused_attn/ops/remake.py",
        old="        self._made = made if self._left > 0 else None\n",
        new="        self._made = None\n",
        tests="tests/fusion/test_least.py -k 'test_two_layers_share_what_is_made_again or test_checkpoints'",
    ),
    Mutant(
        name="a-checkpoint-makes-again-what-came-from-outside",
        file="fused_attn/ops/remake.py",
        old="    return found if same and allowed else None\n",
        new="    return found if allowed else None\n",
        tests="tests/fusion/test_least.py -k test_checkpoints",
    ),
    Mutant(
        name="parameters-of-a-layer-may-change-before-its-backward",
        file="fused_attn/ops/remake.py",
        old="        if self.tensor._version != self.version:\n",
        new="        if False:\n",
        tests="tests/fusion/test_least.py -k test_a_parameter_that_is_changed_before_backward",
    ),
    Mutant(
        name="hooks-around-a-layer-see-nothing-of-it",
        file="fused_attn/ops/remake.py",
        old="        return _Unhooked(t) if outer is None else _Packed(t, outer)\n",
        new="        return _Unhooked(t)\n",
        tests="tests/fusion/test_least.py -k test_hooks_on_what_is_saved",
    ),
    Mutant(
        name="a-map-that-was-written-into-is-made-again",
        file="fused_attn/ops/remake.py",
        old="        if _place(t) == place and t._version == found.version:",
        new="        if _place(t) == place:",
        tests="tests/fusion/test_least.py -k test_a_map_that_is_changed",
    ),
    Mutant(
        name="every-sum-is-made-again",
        file="fused_attn/fusion/changing/tails.py",
        old=" and is_kept(residual))\n",
        new=")\n",
        tests="tests/fusion/test_least.py -k 'test_bytes_of_a_chain or test_what_is_made_again'",
    ),
    # ---- tails ----
    Mutant(
        name="senet-reads-its-first-norm-twice",
        file="fused_attn/fusion/changing/tails.py",
        old='    first, second = _pair(block, "bn1", "relu"), _pair(block, "bn2", "relu")\n',
        new='    first, second = _pair(block, "bn1", "relu"), _pair(block, "bn1", "relu")\n',
        tests="tests/fusion/test_tails.py -k test_the_block_it_was",
    ),
    Mutant(
        name="tail-does-not-count-batches",
        file="fused_attn/nn/normalised.py",
        old="        momentum=count_batch(norm),\n",
        new="        momentum=0.0 if norm.momentum is None else norm.momentum,\n",
        tests="tests/fusion/test_tails.py -k test_the_block_it_was",
    ),
    Mutant(
        name="tail-does-not-drop-paths",
        file="fused_attn/fusion/changing/tails.py",
        old="    return replace(tail, bypassed=bypassed, drop=path)\n",
        new="    return replace(tail, bypassed=bypassed)\n",
        tests="tests/fusion/test_tails.py -k test_paths_that_are_dropped_run_as_they_are",
    ),
    Mutant(
        name="tail-thaws-a-frozen-norm",
        file="fused_attn/fusion/changing/tails.py",
        old="        of_batch = uses_batch_statistics(norm)\n",
        new="        of_batch = block.training or norm.running_mean is None\n",
        tests="tests/fusion/test_tails.py -k test_eval_and_train_are_the_layers_own",
    ),
    Mutant(
        name="sum-in-place-takes-the-wider-dtype",
        file="fused_attn/fusion/changing/tails.py",
        old="        return FUNCTIONS[self.post_activation](y.to(x.dtype) if self.in_place else y)\n",
        new="        return FUNCTIONS[self.post_activation](y)\n",
        tests="tests/fusion/test_tails.py -k test_autocast",
    ),
    # ---- reading: the numerical check, and what code does beside computing ----
    Mutant(
        name="check-to-three-digits",
        file="fused_attn/fusion/reading/check.py",
        old="TOLERANCE = 1e-9\n",
        new="TOLERANCE = 1e-3\n",
        tests="tests/fusion/reading/test_refused.py",
    ),
    Mutant(
        name="check-leaves-out-gradients",
        file="fused_attn/fusion/reading/check.py",
        old='            ("gradient", self.gradients, other.gradients),\n',
        new="",
        tests="tests/fusion/reading/test_refused.py tests/fusion/reading/test_fuzz.py -m 'not slow and not long'",
    ),
    Mutant(
        name="setting-an-item-is-no-side-effect",
        file="fused_attn/fusion/reading/reads.py",
        old='"DELETE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR"}',
        new='"DELETE_ATTR"}',
        tests="tests/fusion/reading/test_refused.py",
    ),
    # ---- canonical form, recipes, selections, parents ----
    Mutant(
        name="mean-of-a-multiple-is-the-mean",
        file="fused_attn/fusion/reading/canonical.py",
        old="                factor *= node.attrs[0][0]\n",
        new="",
        tests="tests/fusion/reading/test_recognised.py tests/fusion/reading/test_refused.py",
    ),
    Mutant(
        name="no-activation-is-a-relu",
        file="fused_attn/fusion/reading/find.py",
        old='    activation = match.options.get("activation", "identity")\n',
        new='    activation = match.options.get("activation", "relu")\n',
        tests="tests/fusion/reading/test_recognised.py tests/fusion/reading/test_fuzz.py -m 'not slow and not long'",
    ),
    Mutant(
        name="equal-blocks-share-one-shell",
        file="fused_attn/fusion/reading/find.py",
        old="    cls = getattr(fused_nn, template.name)\n"
        "\n"
        "    def make(block: nn.Module) -> Recipe | str:\n"
        '        with torch.device("meta"):  # which draws no random numbers; its layers give way to the block\'s\n'
        "            shell = templates.without_bias(cls, layers, channels=templates.CHANNELS, **options)\n",
        new="    cls = getattr(fused_nn, template.name)\n"
        "    shell = templates.without_bias(cls, layers, channels=templates.CHANNELS, **options)\n"
        "\n"
        "    def make(block: nn.Module) -> Recipe | str:\n",
        tests="tests/fusion/reading/test_recognised.py",
    ),
    Mutant(
        name="selection-skips-hooks-of-its-excitation",
        file="fused_attn/fusion/reading/selections.py",
        old="        runs = [*branches.program.paths, *(() if known else excitation.paths)]\n",
        new="        runs = [*branches.program.paths, *excitation.paths]\n",
        tests="tests/fusion/reading/test_selections.py -k 'test_hooks or test_a_change_after_fusing_counts'",
    ),
    Mutant(
        name="a-rewritten-forward-is-not-compared",
        file="fused_attn/fusion/changing/parents.py",
        old="    if verdict.why_not is not None:\n",
        new="    if tolerance is None:\n",
        tests="tests/fusion/changing/test_parents.py"
        " -k 'test_a_rewritten_forward_is_compared or test_what_is_not_that_keeps_its_forward'",
    ),
    Mutant(
        name="a-sum-in-place-is-traced-as-a-new-map",
        file="fused_attn/fusion/reading/trace.py",
        old='        setattr(_Value, f"__i{name}__", binary(IN_PLACE[f"i{name}"]))\n',
        new="",
        tests="tests/fusion/reading/test_trace.py -k test_the_graph_is_the_forward",
    ),
    Mutant(
        name="an-option-of-a-part-is-written-down",
        file="fused_attn/fusion/reading/trace.py",
        old='                part.__dict__["_parameters"] = _Parameters(self, part)\n',
        new="                pass\n",
        tests="tests/fusion/reading/test_trace.py tests/fusion/changing/test_parents.py"
        " -k 'test_what_no_graph_says_is_refused or test_what_is_not_that_keeps_its_forward'",
    ),
    Mutant(
        name="a-hook-on-what-is-written-into-sees-it-unwritten",
        file="fused_attn/fusion/changing/parents.py",
        old="            self.owned.add(str(x.target))  # a hook on it may keep what is now not written into\n",
        new="            pass\n",
        tests="tests/fusion/changing/test_parents.py -k test_a_hook_sees_what_is_written_into_its_result",
    ),
    # ---- graphs of torch.compile and torch.export ----
    Mutant(
        name="writes-into-an-input-are-dropped",
        file="fused_attn/fusion/reading/region.py",
        old="        if written & inputs or any(_reads(",
        new="        if any(_reads(",
        tests="tests/fusion/changing/test_graphs.py"
        " -k 'test_what_must_not_be_replaced or test_what_is_written_into_an_argument_is_written'",
    ),
    Mutant(
        name="open-option-written-down-without-a-guard",
        file="fused_attn/fusion/changing/graphs.py",
        old="    for node in () if places else block.sizes:\n"
        '        known = node.meta.get("example_value")\n'
        "        if isinstance(known, torch.SymFloat):\n"
        "            float(known)  # an option that is now written into the graph: another one compiles anew\n",
        new="",
        tests="tests/fusion/changing/test_graphs.py -k 'test_several or test_an_option_that_is_open_is_guarded'",
    ),
    Mutant(
        name="exported-size-without-its-least",
        file="fused_attn/fusion/changing/graphs.py",
        old="torch.export.Dim(str(symbol), min=int(bounds.lower), **highest)",
        new="torch.export.Dim(str(symbol), **highest)",
        tests="tests/fusion/changing/test_graphs.py -k test_an_exported_program",
    ),
    Mutant(
        name="mode-of-the-compiler-is-dropped",
        file="fused_attn/fusion/changing/graphs.py",
        old="torch._TorchCompileInductorWrapper(mode, options, dynamic=None)",
        new="torch._TorchCompileInductorWrapper(None, options, dynamic=None)",
        tests="tests/fusion/changing/test_graphs.py -k test_mode_and_options_reach_inductor",
    ),
    Mutant(
        name="rounding-in-a-graph-is-overlooked",
        file="fused_attn/fusion/changing/graphs.py",
        old="        if any(torch.finfo(d).eps > torch.finfo(own[-1][1]).eps and _varies(seen, n) for n, d in own):\n"
        "            return False\n",
        new="",
        tests="tests/fusion/changing/test_graphs.py -k test_what_must_not_be_replaced",
    ),
    Mutant(
        name="infinity-in-a-program-stays-a-constant",
        file="fused_attn/fusion/changing/graphs.py",
        old="    _write_down_numbers(module)\n",
        new="",
        tests="tests/fusion/changing/test_graphs.py -k test_an_exported_criss_cross_and_context",
    ),
    Mutant(
        name="the-bias-that-no-softmax-sees-is-no-part-of-a-block",
        file="fused_attn/fusion/changing/graphs.py",
        old="        unseen = _others(seen, end, {x, *leaves}) if found.unseen else []\n",
        new="        unseen: list[fx.Node] = []\n",
        tests="tests/fusion/changing/test_graphs.py -k test_ways_of_writing_a_context",
    ),
    Mutant(
        name="samples-next-to-lines-are-large-in-the-small-check",
        file="fused_attn/fusion/reading/trial.py",
        old="numbers.setdefault(a * b, numbers.get(a, a) * numbers.get(b, b))",
        new="pass",
        tests="tests/fusion/changing/test_graphs.py -k test_a_criss_cross_of_a_large_map",
    ),
    Mutant(
        name="graphs-are-read-in-the-moment",
        file="fused_attn/fusion/changing/graphs.py",
        old="    return in_its_own_context(lambda: _rewrite(module, inputs, autocast, left, skipped))\n",
        new="    return _rewrite(module, inputs, autocast, left, skipped)\n",
        tests="tests/fusion/changing/test_graphs.py -k test_nothing_depends_on_the_moment",
    ),
    Mutant(
        name="hooks-and-forward-derivatives-are-followed",
        file="fused_attn/fusion/reading/followed.py",
        old='        if node.op.startswith("call_") and any(part in name for part in _CHANGING):\n',
        new="        if False:\n",
        tests="tests/fusion/changing/test_graphs.py -k 'test_a_derivative_forward or Hooked'",
    ),
    Mutant(
        name="random-numbers-are-drawn-while-a-graph-is-followed",
        file="fused_attn/fusion/reading/followed.py",
        old='                return torch.device("meta") if named or isinstance(value, torch.device) else value\n',
        new="                return value\n",
        tests="tests/fusion/changing/test_graphs.py -k test_tensors_that_are_made_beside_a_block",
    ),
    Mutant(
        name="open-number-of-a-program-is-closed",
        file="fused_attn/fusion/changing/graphs.py",
        old="    return torch.export.Dim.DYNAMIC if isinstance(value, torch.SymInt) else None\n",
        new="    return None\n",
        tests="tests/fusion/changing/test_graphs.py -k test_all_that_a_program_has_is_kept",
    ),
    # ---- demo ----
    Mutant(
        name="demo-turns-its-ratio-round",
        file="fused_attn/demo.py",
        old="    return median(original.seconds) / median(fused.seconds)\n",
        new="    return median(fused.seconds) / median(original.seconds)\n",
        tests="tests/test_demo.py",
    ),
]
