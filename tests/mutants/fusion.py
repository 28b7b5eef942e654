"""Faults in what recognises blocks, swaps them, explains it, and rewrites graphs; and in the demo."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    # ---- swap: what must be unchanged, hooks, copies ----
    Mutant(
        name="a-function-set-later-is-not-noticed",
        file="fused_attn/fusion/swap.py",
        old="isinstance(value, (bool, int, float, str, tuple)) or inspect.isroutine(value)\n",
        new="isinstance(value, (bool, int, float, str, tuple))\n",
        tests="tests/fusion/test_fuse.py"
        " -k 'test_a_function_set_after_fusing_counts or test_options_changed_after_fusing_count'",
    ),
    Mutant(
        name="backward-hooks-are-no-hooks",
        file="fused_attn/fusion/swap.py",
        old="        or layer._backward_hooks\n",
        new="",
        tests="tests/fusion/test_fuse.py -k 'test_hooked_layers_are_refused or test_changes_made_after_fusing_count'",
    ),
    Mutant(
        name="forward-pre-hooks-are-no-hooks",
        file="fused_attn/fusion/swap.py",
        old="        or layer._forward_pre_hooks\n",
        new="",
        tests="tests/fusion/test_fuse.py tests/fusion/test_adapters.py -k 'test_hooked_layers_are_refused"
        " or test_changes_made_after_fusing_count or test_the_parts_of_a_block_that_is_left_alone_are_fused'",
    ),
    Mutant(
        name="copies-forget-their-tails",
        file="fused_attn/fusion/swap.py",
        old="        recipe = recognise_with_tail(self)  # it was fused: as what it is, or else for its tail\n",
        new="        from .registry import recognise\n\n        recipe = recognise(self)\n",
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
        file="fused_attn/fusion/registry.py",
        old="        recipe = recognise(block, TAILS) or recipe\n",
        new="        tail = recognise(block, TAILS)\n"
        "        recipe = recipe if isinstance(tail, str) else tail or recipe\n",
        tests="tests/fusion/test_tails.py -k 'test_what_is_left_alone or test_why_a_tail_was_left_alone_can_be_asked'",
    ),
    Mutant(
        name="a-fused-block-is-a-candidate-again",
        file="fused_attn/fusion/api.py",
        old="        done = is_own(module) or host_class(module) is not None\n",
        new="        done = is_own(module)\n",
        tests="tests/fusion/test_fuse.py tests/fusion/structure/test_parents.py"
        " -k 'test_fusing_again_changes_nothing or test_inside_a_model'",
    ),
    Mutant(
        name="not-fused-yet-counts-as-fused",
        file="fused_attn/fusion/report.py",
        old='    return Row(name, describe(block, found), cls, False, "its own forward", f"not fused yet:',
        new='    return Row(name, describe(block, found), cls, True, "its own forward", f"not fused yet:',
        tests="tests/fusion/test_tails.py tests/fusion/test_adapters.py"
        " -k 'test_why_a_tail_was_left_alone_can_be_asked or test_own_modules_are_one_row'",
    ),
    # ---- registry and adapters ----
    Mutant(
        name="subclasses-may-override-what-is-private",
        file="fused_attn/fusion/registry.py",
        old='            if not attribute.startswith("__") and hasattr(known, attribute):\n',
        new='            if not attribute.startswith("_") and hasattr(known, attribute):\n',
        tests="tests/fusion/test_fuse.py -k test_subclasses",
    ),
    Mutant(
        name="light-attention-takes-its-gate",
        file="fused_attn/fusion/timm.py",
        old="    # The light channel attention takes the sigmoid whatever its gate is.\n"
        '    activation, gate = activation_name(block.act), "sigmoid" if light else activation_name(block.gate)\n',
        new="    activation, gate = activation_name(block.act), activation_name(block.gate)\n",
        tests="tests/fusion/test_adapters.py -k test_same_function",
    ),
    Mutant(
        name="selective-kernel-does-not-drop",
        file="fused_attn/fusion/timm.py",
        old='    plain = path.aa is None and _is_exactly(path.bn, "norm_act.BatchNormAct2d")'
        " and type(path.bn.drop) is nn.Identity\n",
        new='    plain = path.aa is None and _is_exactly(path.bn, "norm_act.BatchNormAct2d")\n',
        tests="tests/fusion/test_adapters.py -k 'test_same_function and SelectiveKernel'",
    ),
    # ---- tails ----
    Mutant(
        name="senet-reads-its-first-norm-twice",
        file="fused_attn/fusion/tails.py",
        old='    first, second = _pair(block, "bn1", "relu"), _pair(block, "bn2", "relu")\n',
        new='    first, second = _pair(block, "bn1", "relu"), _pair(block, "bn1", "relu")\n',
        tests="tests/fusion/test_tails.py -k test_the_block_it_was",
    ),
    Mutant(
        name="tail-does-not-count-batches",
        file="fused_attn/fusion/tails.py",
        old="            momentum=count_batch(norm),\n",
        new="            momentum=0.0 if norm.momentum is None else norm.momentum,\n",
        tests="tests/fusion/test_tails.py -k test_the_block_it_was",
    ),
    Mutant(
        name="tail-does-not-drop-paths",
        file="fused_attn/fusion/tails.py",
        old="    return replace(tail, bypassed=bypassed, drop=path)\n",
        new="    return replace(tail, bypassed=bypassed)\n",
        tests="tests/fusion/test_tails.py -k test_paths_that_are_dropped_run_as_they_are",
    ),
    Mutant(
        name="tail-thaws-a-frozen-norm",
        file="fused_attn/fusion/tails.py",
        old="        of_batch = uses_batch_statistics(norm)\n",
        new="        of_batch = block.training or norm.running_mean is None\n",
        tests="tests/fusion/test_tails.py -k test_eval_and_train_are_the_layers_own",
    ),
    Mutant(
        name="sum-in-place-takes-the-wider-dtype",
        file="fused_attn/fusion/tails.py",
        old="        return FUNCTIONS[self.post_activation](y.to(x.dtype) if self.in_place else y)\n",
        new="        return FUNCTIONS[self.post_activation](y)\n",
        tests="tests/fusion/test_tails.py -k test_autocast",
    ),
    # ---- structure: the numerical check, and what the capture sees ----
    Mutant(
        name="check-to-three-digits",
        file="fused_attn/fusion/structure/check.py",
        old="TOLERANCE = 1e-9\n",
        new="TOLERANCE = 1e-3\n",
        tests="tests/fusion/structure/test_refused.py",
    ),
    Mutant(
        name="check-leaves-out-gradients",
        file="fused_attn/fusion/structure/check.py",
        old="                for n, (a, b) in enumerate(zip(actual[0], expected[0], strict=True)):\n",
        new="                for n, (a, b) in enumerate(zip(actual[0][:1], expected[0][:1], strict=True)):\n",
        tests="tests/fusion/structure/test_refused.py tests/fusion/structure/test_fuzz.py -m 'not slow and not long'",
    ),
    Mutant(
        name="setting-an-item-is-no-side-effect",
        file="fused_attn/fusion/structure/capture.py",
        old='"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR"}',
        new='"STORE_GLOBAL", "DELETE_GLOBAL"}',
        tests="tests/fusion/structure/test_refused.py",
    ),
    # ---- structure: canonical form, recipes, selections, parents ----
    Mutant(
        name="mean-of-a-multiple-is-the-mean",
        file="fused_attn/fusion/structure/graph.py",
        old="                factor *= node.attrs[0][0]\n",
        new="",
        tests="tests/fusion/structure/test_recognised.py tests/fusion/structure/test_refused.py",
    ),
    Mutant(
        name="no-activation-is-a-relu",
        file="fused_attn/fusion/structure/recipes.py",
        old='    activation = match.options.get("activation", "identity")\n',
        new='    activation = match.options.get("activation", "relu")\n',
        tests="tests/fusion/structure/test_recognised.py tests/fusion/structure/test_fuzz.py"
        " -m 'not slow and not long'",
    ),
    Mutant(
        name="equal-blocks-share-one-shell",
        file="fused_attn/fusion/structure/recipes.py",
        old="    cls = getattr(fused_nn, template.name)\n"
        "\n"
        "    def make(block: nn.Module) -> Recipe | str:\n"
        "        shell = templates.without_bias(cls, layers, channels=templates.CHANNELS, **options)\n",
        new="    cls = getattr(fused_nn, template.name)\n"
        "    shell = templates.without_bias(cls, layers, channels=templates.CHANNELS, **options)\n"
        "\n"
        "    def make(block: nn.Module) -> Recipe | str:\n",
        tests="tests/fusion/structure/test_recognised.py",
    ),
    Mutant(
        name="selection-skips-hooks-of-its-excitation",
        file="fused_attn/fusion/structure/selections.py",
        old="        runs = [*branches.program.paths, *(() if known else excitation.paths)]\n",
        new="        runs = [*branches.program.paths, *excitation.paths]\n",
        tests="tests/fusion/structure/test_selections.py -k 'test_hooks or test_a_change_after_fusing_counts'",
    ),
    Mutant(
        name="gate-of-another-map",
        file="fused_attn/fusion/structure/parents.py",
        old="        if not gates[gate.target][1] or gate.args != (x,) or gate.kwargs or len(gate.users) != 1:\n",
        new="        if not gates[gate.target][1] or len(gate.args) != 1 or gate.kwargs or len(gate.users) != 1:\n",
        tests="tests/fusion/structure/test_parents.py -k test_what_is_not_that_keeps_its_forward",
    ),
    # ---- structure: graphs of torch.compile and torch.export ----
    Mutant(
        name="writes-into-an-input-are-dropped",
        file="fused_attn/fusion/structure/region.py",
        old="        if written & inputs or any(_reads(",
        new="        if any(_reads(",
        tests="tests/fusion/structure/test_compiled.py"
        " -k 'test_what_must_not_be_replaced or test_what_is_written_into_an_argument_is_written'",
    ),
    Mutant(
        name="open-option-written-down-without-a-guard",
        file="fused_attn/fusion/structure/compiled.py",
        old="    for node in block.sizes:\n"
        '        known = node.meta.get("example_value")\n'
        "        if isinstance(known, torch.SymFloat):\n"
        "            float(known)  # an option that is now written into the graph: another one compiles anew\n",
        new="",
        tests="tests/fusion/structure/test_compiled.py -k 'test_several or test_an_option_that_is_open_is_guarded'",
    ),
    Mutant(
        name="exported-size-without-its-least",
        file="fused_attn/fusion/structure/compiled.py",
        old="torch.export.Dim(str(symbol), min=int(bounds.lower), **highest)",
        new="torch.export.Dim(str(symbol), **highest)",
        tests="tests/fusion/structure/test_compiled.py -k test_an_exported_program",
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
