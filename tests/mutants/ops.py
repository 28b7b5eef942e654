"""Faults in the Python layer below fusion: operators, checks, backends, references, the shell and its benchmarks."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = [
    # Operators: schemas, fake kernels, backward.
    Mutant(
        name="maps-are-copied-to-traced-strides",
        file="fused_attn/ops/common.py",
        old="any_layout: bool = True",
        new="any_layout: bool = False",
        tests="tests/ops/test_autograd.py -k test_tensors_of_any_layout",
    ),
    Mutant(
        name="torchs-attention-where-the-formula-was-asked-for",
        file="fused_attn/functional.py",
        old="in _WITH_TORCHS_ATTENTION and forced() is None",
        new="in _WITH_TORCHS_ATTENTION",
        tests="tests/ops/test_position_attention.py -k test_torchs_attention_under_autocast",
    ),
    Mutant(
        name="second-derivative-of-torchs-attention",
        file="fused_attn/ops/position_attention.py",
        old="by_formula = wants_graph(grad)",
        new="by_formula = False",
        tests="tests/ops/test_position_attention.py -k test_torchs_attention",
    ),
    Mutant(
        name="mixed-scale-fake-is-nchw",
        file="fused_attn/ops/mixed_scale.py",
        old="    return empty_map(x)",
        new="    return x.new_empty(x.shape)",
        tests='tests/ops/test_mixed_scale.py -k "test_opcheck or test_compiles_to_one_graph"',
    ),
    Mutant(
        name="select-squeeze-fake-dtype",
        file="fused_attn/ops/select.py",
        old="    return u.new_empty(u.shape[:2])",
        new="    return u.new_empty(u.shape[:2], dtype=accumulator(u.dtype))",
        tests='tests/ops/test_select.py tests/ops/test_every_op.py -k "test_operators"',
    ),
    Mutant(
        name="state-of-both-pools-too-small",
        file="fused_attn/ops/channel_gate.py",
        old="        width += channels + hidden",
        new="        width += channels",
        tests="tests/ops/test_channel_gate.py -k test_opcheck",
    ),
    Mutant(
        name="norm-scale-into-undeclared-write",
        file="fused_attn/ops/norm_gate.py",
        old="Tensor(a!) y",
        new="Tensor y",
        tests='tests/ops/test_norm_gate.py -k "test_opcheck or test_write_over_x"',
    ),
    Mutant(
        name="scale-fake-gradient-of-a-gate-of-space",
        file="fused_attn/ops/scale.py",
        old="        torch.empty_like(gate, memory_format=torch.contiguous_format),",
        new="        x.new_empty(x.shape[:2]),",
        tests="tests/ops/test_squeeze_scale.py -k test_opcheck",
    ),
    Mutant(
        name="channel-gate-create-graph-loses-residual",
        file="fused_attn/ops/channel_gate.py",
        old="    return grads if recomputed else (*grads[:7], grad if needs[7] else None)",
        new="    return grads",
        tests='tests/ops/test_channel_gate.py tests/ops/test_every_op.py -k "test_double_backward or with_a_graph"',
    ),
    Mutant(
        name="create-graph-passes-the-relu",
        file="fused_attn/ops/scale.py",
        old="(~(y <= 0)).to(grad.dtype)",
        new="(y >= 0).to(grad.dtype)",
        tests=(
            "tests/ops/test_channel_gate.py tests/ops/test_spatial_gate.py tests/ops/test_every_op.py"
            ' -k "test_double_backward or with_a_graph"'
        ),
    ),
    Mutant(
        name="the-last-input-alone-needs-no-gradient",
        file="fused_attn/ops/common.py",
        old="            for tensor in inputs:",
        new="            for tensor in inputs[:-1]:",
        tests=(
            "tests/ops/test_cbam.py tests/ops/test_every_op.py"
            ' -k "test_what_needs_no_gradient or test_epilogue or test_one_input_alone_requires_a_gradient"'
        ),
    ),
    Mutant(
        name="norm-weight-gradient-rounded-to-the-map",
        file="fused_attn/ops/norm_gate.py",
        old="to_weight.to(weight.dtype)",
        new="to_weight.to(x.dtype)",
        tests=(
            "tests/ops/test_norm_gate.py tests/ops/test_every_op.py"
            ' -k "test_autocast or test_shapes_dtypes_layouts or test_float32_gradients_of_parameters"'
        ),
    ),
    Mutant(
        name="norm-gate-keeps-the-residual",
        file="fused_attn/ops/norm_gate.py",
        old="        kept = None if relu or post_activation == IDENTITY else residual",
        new="        kept = None if relu else residual",
        tests="tests/ops/test_norm_gate.py -k test_saved_bytes",
    ),
    Mutant(
        name="norm-gate-copies-channels-last",
        file="fused_attn/ops/norm_gate.py",
        old="    if not (x.is_contiguous() or is_channels_last(x)):",
        new="    if not x.is_contiguous():",
        tests='tests/ops/test_norm_gate.py -k "test_output_and_gradients_keep_the_layout or test_saved_bytes"',
    ),
    # Operators in a program, and what is left to plain PyTorch.
    Mutant(
        name="operators-have-no-gradients",
        file="fused_attn/ops/common.py",
        old="            if forward_ad._current_level < 0 and not needs_grad(",
        new="            if forward_ad._current_level < 0 or not needs_grad(",
        tests='tests/ops/test_autograd.py -k "test_gradients_of_the_operators or test_gradients_of_a_program"',
    ),
    Mutant(
        name="gradient-of-a-gradient-is-zero",
        file="fused_attn/ops/common.py",
        old="    register_gradients(overloads, keep, gradients, sys.maxsize)",
        new="    register_gradients(overloads, keep, gradients, 0)",
        tests="tests/ops/test_autograd.py -k test_a_gradient_of_a_backward_operator_raises",
    ),
    Mutant(
        name="backward-drops-the-tangent-of-its-gradient",
        file="fused_attn/ops/common.py",
        old="    seen = torch.is_grad_enabled() or forward_ad._current_level >= 0\n",
        new="    seen = torch.is_grad_enabled()\n",
        tests="tests/ops/test_autograd.py -k test_dual_numbers_in_the_backward_alone",
    ),
    Mutant(
        name="select-unpacks-twice",
        file="fused_attn/ops/select.py",
        old="    *inputs, state = ctx.saved_tensors\n",
        new="    inputs, state = ctx.saved_tensors[:-1], ctx.saved_tensors[-1]\n",
        tests='tests/ops/test_autograd.py -k "test_saved_tensors_are_unpacked_once or test_in_a_checkpoint"',
    ),
    Mutant(
        name="norm-bits-read-as-the-gradient-lies",
        file="fused_attn/ops/norm_gate.py",
        old="_unpacked(bits, inputs[0])",
        new="_unpacked(bits, grad)",
        tests="tests/ops/test_norm_gate.py -k test_double_backward",
    ),
    Mutant(
        name="descriptor-alone-has-no-gradient",
        file="fused_attn/ops/norm_gate.py",
        old="            if grad_s is None:",
        new="            if grad_s is None or not torch.is_grad_enabled():",
        tests="tests/ops/test_norm_gate.py -k test_double_backward",
    ),
    Mutant(
        name="dual-numbers-are-ordinary",
        file="fused_attn/backends.py",
        old=" and forward_ad._current_level < 0",
        new="",
        tests='tests/ops/test_autograd.py tests/test_backends.py -k "test_dual_numbers or test_what_is_ordinary"',
    ),
    Mutant(
        name="weights-are-not-looked-at",
        file="fused_attn/functional.py",
        old="if is_ordinary(x) and are_plain(*others)",
        new="if is_ordinary(x)",
        tests="tests/ops/test_autograd.py -k test_packed_tensors",
    ),
    Mutant(
        name="unforced-is-everywhere",
        file="fused_attn/backends.py",
        old="class _Thread(threading.local):",
        new="class _Thread:",
        tests="tests/test_backends.py -k test_a_thread_free_of_the_forced_backend",
    ),
    Mutant(
        name="open-sizes-are-counted",
        file="fused_attn/functional.py",
        old="    positions = math.prod(x.shape[2:])",
        new="    positions = x.shape[2:].numel()",
        tests="tests/ops/test_autograd.py -k test_export_with_open_sizes",
    ),
    Mutant(
        name="position-attention-fake-is-the-value-s-map",
        file="fused_attn/ops/position_attention.py",
        old="    out = empty_map(value) if same else query.new_empty(shape)\n",
        new="    out = empty_map(value)\n",
        tests="tests/ops/test_position_attention.py -k 'test_fake_kernels or test_compiles_in_one_graph'",
    ),
    Mutant(
        name="position-attention-s-second-gradients-without-the-scale",
        file="fused_attn/ops/position_attention.py",
        old="reference.position_attention(query, key, value, scale=scale)",
        new="reference.position_attention(query, key, value)",
        tests="tests/ops/test_position_attention.py -k test_second_derivatives",
    ),
    Mutant(
        name="context-gone-and-the-map-s-gradient-with-it",
        file="fused_attn/ops/context_pool.py",
        old="            return None, grad, None, None\n",
        new="            return None, None, None, None\n",
        tests="tests/ops/test_context_pool.py -k test_map_or_context_alone",
    ),
    Mutant(
        name="criss-cross-meets-itself-twice",
        file="fused_attn/reference/criss_cross.py",
        old=".masked_fill(itself, -torch.inf)",
        new="",
        tests=(
            "tests/nn/test_criss_cross.py tests/ops/test_criss_cross.py"
            " -k 'test_equals_the_original or test_the_formula_position_by_position'"
        ),
    ),
    Mutant(
        name="criss-cross-once",
        file="fused_attn/reference/criss_cross.py",
        old="for _ in range(recurrence):",
        new="for _ in range(1):",
        tests="tests/nn/test_criss_cross.py -k test_equals_the_original",
    ),
    Mutant(
        name="criss-cross-gradient-of-the-last-step",
        file="fused_attn/nn/criss_cross.py",
        old=".add_(rows).addmm_(of_products, weight)",
        new=".addmm_(of_products, weight)",
        tests="tests/nn/test_criss_cross.py -k test_equals_the_original",
    ),
    Mutant(
        name="criss-cross-listened-to-by-nobody",
        file="fused_attn/nn/pointwise.py",
        old="all(is_pointwise(layer) and not is_hooked(layer) for layer in layers)",
        new="all(is_pointwise(layer) for layer in layers)",
        tests="tests/nn/test_criss_cross.py -k test_a_layer_that_somebody_listens_to",
    ),
    # Checks and dispatch.
    Mutant(
        name="one-even-side-of-a-kernel",
        file="fused_attn/functional.py",
        old="any(k % 2 == 0 for k in kernel_size)",
        new="all(k % 2 == 0 for k in kernel_size)",
        tests="tests/test_functional.py -k test_bad_input",
    ),
    Mutant(
        name="spatial-logits-ignores-the-backend",
        file="fused_attn/functional.py",
        old='    if _choose("spatial_gate", (), pooled, weight, bias) != "cpu":',
        new='    if pooled.device.type != "cpu":',
        tests=(
            "tests/compose/test_compose.py tests/test_backends.py"
            ' -k "test_export_is_plain_aten or test_reference_is_plain_pytorch"'
        ),
    ),
    Mutant(
        name="unknown-devices-are-served",
        file="fused_attn/backends.py",
        old='    return UNAVAILABLE.get((name, op, device), f"there are no kernels for {device}")',
        new="    return UNAVAILABLE.get((name, op, device))",
        tests=(
            "tests/test_backends.py"
            ' -k "test_every_combination_has_an_answer or test_a_backend_that_cannot_serve_says_why'
            ' or test_no_backend_but_the_reference_serves_an_unknown_device"'
        ),
    ),
    Mutant(
        name="misspelt-environment-ignored",
        file="fused_attn/backends.py",
        old="""\
        if name not in NAMES:
            raise ValueError(f"FUSED_ATTN_BACKEND: expected one of {', '.join(NAMES)}; got {name!r}")
        _Forced.name = name
""",
        new="""\
        _Forced.name = name if name in NAMES else None
""",
        tests=(
            "tests/test_backends.py"
            ' -k "test_environment_forces_a_backend or test_backend_names_are_checked'
            ' or test_an_environment_that_names_no_backend_is_an_error"'
        ),
    ),
    Mutant(
        name="context-forgets-the-outer-one",
        file="fused_attn/backends.py",
        old="        _Forced.name = before",
        new="        _Forced.name = None",
        tests=(
            "tests/test_backends.py"
            ' -k "test_context_is_left_even_after_an_error or test_environment_forces_a_backend or test_contexts_nest"'
        ),
    ),
    # Modules and references.
    Mutant(
        name="running-variance-biased",
        file="fused_attn/reference/block_attention.py",
        old="            variance = variance * (count / (count - 1))\n",
        new="",
        tests="tests/nn/test_block_attention.py -k test_equals_the_original",
    ),
    Mutant(
        name="folded-bias-not-scaled",
        file="fused_attn/nn/selection.py",
        old="shift + layer.bias.to(factor.dtype) * factor",
        new="shift + layer.bias.to(factor.dtype)",
        tests="tests/nn/test_selective_kernel.py -k test_equals_the_original",
    ),
    Mutant(
        name="divisor-rounds-half-to-even",
        file="fused_attn/reference/squeeze_excite.py",
        old="int(channels / reduction + divisor / 2) // divisor * divisor",
        new="round(channels / reduction / divisor) * divisor",
        tests="tests/nn/test_squeeze_excite.py -k test_widths",
    ),
    Mutant(
        name="eca-kernel-size-rounded",
        file="fused_attn/reference/squeeze_excite.py",
        old="    t = int(abs((math.log2(channels) + beta) / gamma))",
        new="    t = round(abs((math.log2(channels) + beta) / gamma))",
        tests="tests/nn/test_squeeze_excite.py -k test_parameter_counts_of_the_papers",
    ),
    Mutant(
        name="transposed-weights-load",
        file="fused_attn/reference/checkpoints.py",
        old="_trimmed(tensor) == _trimmed(parameter)",
        new="tensor.numel() == parameter.numel()",
        tests=(
            "tests/nn/test_block_attention.py"
            ' -k "test_checkpoints_that_do_not_fit_are_refused or test_loads_the_checkpoint_of"'
        ),
    ),
    Mutant(
        name="simam-reference-of-one-position-finite",
        file="fused_attn/reference/simam.py",
        old="(math.prod(x.shape[2:]) - 1)",
        new="max(math.prod(x.shape[2:]) - 1, 1)",
        tests=(
            "tests/nn/test_simam.py tests/ops/test_simam.py"
            ' -k "test_equals_the_original or test_one_position_is_nan_as_in_the_original"'
        ),
    ),
    # Attention between positions and channels, and the blocks made of products.
    Mutant(
        name="timm-s-scale-of-the-inner-width",
        file="fused_attn/reference/non_local.py",
        old='"timm": {"scale": "input"',
        new='"timm": {"scale": "inner"',
        tests="tests/nn/test_non_local.py -k test_equals_timm",
    ),
    Mutant(
        name="alexhex7-pools-before-its-convolutions",
        file="fused_attn/reference/non_local.py",
        old='"alexhex7": {"scale": None, "pool": "after"}',
        new='"alexhex7": {"scale": None, "pool": "before"}',
        tests="tests/nn/test_non_local.py -k test_equals_the_original",
    ),
    Mutant(
        name="mean-over-the-queries-instead-of-the-keys",
        file="fused_attn/nn/non_local.py",
        old="beta=0, alpha=1 / m)",
        new="beta=0, alpha=1 / n)",
        tests="tests/nn/test_non_local.py -k 'test_equals_the_original or test_attentions_as_good_as_with_the_matrix'",
    ),
    Mutant(
        name="a-key-of-minus-the-query-is-seen",
        file="fused_attn/nn/non_local.py",
        old="torch.searchsorted(-keys.detach(), queries.detach())",
        new="torch.searchsorted(-keys.detach(), queries.detach(), right=True)",
        tests="tests/nn/test_non_local.py -k test_concatenation_of_equal_and_of_opposite_numbers",
    ),
    Mutant(
        name="channel-energies-taken-from-their-maximum",
        file="fused_attn/nn/self_attention.py",
        old="(-(rows @ rows.transpose(1, 2))).softmax(2)",
        new="((e := rows @ rows.transpose(1, 2)).amax(2, True) - e).softmax(2)",
        tests="tests/nn/test_self_attention.py -k test_energies_beyond_float16_are_finite",
    ),
    Mutant(
        name="channel-energies-not-turned-round",
        file="fused_attn/nn/self_attention.py",
        old="(-(rows @ rows.transpose(1, 2))).softmax(2)",
        new="(rows @ rows.transpose(1, 2)).softmax(2)",
        tests="tests/nn/test_self_attention.py -k test_equals_the_original",
    ),
    Mutant(
        name="values-of-the-original-not-pooled-with-the-keys",
        file="fused_attn/reference/self_attention.py",
        old="nn.functional.max_pool2d(key, 2), nn.functional.max_pool2d(value, 2)",
        new="nn.functional.max_pool2d(key, 2), nn.functional.avg_pool2d(value, 2)",
        tests="tests/nn/test_self_attention.py -k test_equals_the_original",
    ),
    Mutant(
        name="positions-centred-by-their-own-number",
        file="fused_attn/reference/gsop.py",
        old="self._covariance(x.flatten(2).transpose(1, 2), SIDE * SIDE)",
        new="self._covariance(x.flatten(2).transpose(1, 2))",
        tests="tests/nn/test_gsop.py -k test_equals_the_original",
    ),
    Mutant(
        name="running-statistics-folded-in-training",
        file="fused_attn/nn/gsop.py",
        old="    if not (pays and plain) or uses_batch_statistics(norm):\n",
        new="    if not (pays and plain):\n",
        tests="tests/nn/test_gsop.py -k test_a_large_map",
    ),
    Mutant(
        name="gradient-of-a-covariance-without-its-means",
        file="fused_attn/nn/gsop.py",
        old="            if n != count:\n",
        new="            if n < count:\n",
        tests="tests/nn/test_gsop.py -k 'test_covariance or test_gradients_of_the_covariance'",
    ),
    Mutant(
        name="columns-divided-by-the-sums-of-rows",
        file="fused_attn/reference/bilinear_attention.py",
        old="q / q.sum(2, keepdim=True)",
        new="q / q.sum(3, keepdim=True)",
        tests="tests/nn/test_bilinear_attention.py -k test_equals_timms",
    ),
    Mutant(
        name="columns-turned",
        file="fused_attn/reference/bilinear_attention.py",
        old="share * height, width) @ columns",
        new="share * height, width) @ columns.transpose(2, 3)",
        tests="tests/nn/test_bilinear_attention.py -k 'test_mixing or test_equals_timms'",
    ),
    Mutant(
        name="dropout-of-whole-samples",
        file="fused_attn/reference/bilinear_attention.py",
        old="self.dropout(y.new_ones(*y.shape[:2], 1, 1))",
        new="self.dropout(y.new_ones(y.shape[0], 1, 1, 1)).expand(*y.shape[:2], 1, 1)",
        tests="tests/nn/test_bilinear_attention.py -k 'test_drops_whole_channels or test_equals_timms'",
    ),
    Mutant(
        name="width-of-the-context-rounded-down",
        file="fused_attn/reference/global_context.py",
        old="int(channels * ratio + divisor / 2) // divisor",
        new="int(channels * ratio) // divisor",
        tests="tests/nn/test_global_context.py -k test_equals_timm",
    ),
    Mutant(
        name="gradient-of-the-trunk-through-the-mask-alone",
        file="fused_attn/nn/residual_attention.py",
        old="torch.addcmul(grad, grad, mask) if of_trunk",
        new="grad * mask if of_trunk",
        tests="tests/nn/test_residual_attention.py -k 'test_product or test_gradients_of_the_product'",
    ),
    Mutant(
        name="small-mask-without-the-one",
        file="fused_attn/nn/residual_attention.py",
        old="functional.scale(trunk, 1 + mask)",
        new="functional.scale(trunk, mask)",
        tests="tests/nn/test_residual_attention.py -k test_branches_given",
    ),
    Mutant(
        name="mask-between-the-middles-of-values",
        file="fused_attn/reference/residual_attention.py",
        old='mode="bilinear", align_corners=True',
        new='mode="bilinear", align_corners=False',
        tests="tests/nn/test_residual_attention.py -k test_equals_the_published_network",
    ),
    Mutant(
        name="rows-and-columns-of-theta-exchanged",
        file="fused_attn/nn/spatial_transformer.py",
        old="theta[..., len(space) - 1 - axis].to(dtype)",
        new="theta[..., axis].to(dtype)",
        tests="tests/nn/test_spatial_transformer.py -k test_grid",
    ),
    Mutant(
        name="reflected-where-the-side-is-left",
        file="fused_attn/nn/spatial_transformer.py",
        old="(away / span).floor() % 2 == 0",
        new="(away / span).floor() % 2 == 1",
        tests="tests/nn/test_spatial_transformer.py -k test_sampling",
    ),
    Mutant(
        name="places-outside-add-at-the-border",
        file="fused_attn/nn/spatial_transformer.py",
        old="(grads * weight.detach().flatten()[:, None]).masked_fill_(outside, 0)",
        new="grads * weight.detach().flatten()[:, None]",
        tests="tests/nn/test_spatial_transformer.py -k test_sampling",
    ),
    Mutant(
        name="features-convolved-without-their-bias",
        file="fused_attn/nn/double_attention.py",
        old="product(matrix(features), gathered, features.bias)",
        new="product(matrix(features), gathered, None)",
        tests="tests/nn/test_double_attention.py -k test_equals_the_original",
    ),
    # The shell, what it measures and what it draws.
    Mutant(
        name="verify-passes-nan",
        file="fused_attn/verify.py",
        old="        if not error_fused <= allowed:  # NaN does not pass",
        new="        if error_fused > allowed:",
        tests="tests/cli/test_cli.py tests/cli/test_verify.py -k 'test_verify_a_file or test_what_differs_is_a_miss'",
    ),
    Mutant(
        name="exit-code-counts-the-misses",
        file="fused_attn/cli.py",
        old="    if missed:\n        sys.exit(1)",
        new="    if missed:\n        sys.exit(missed)",
        tests="tests/cli/test_cli.py -k test_verify_a_file",
    ),
    Mutant(
        name="median-is-a-mean",
        file="fused_attn/timing.py",
        old="        return median(self.seconds)",
        new="        return sum(self.seconds) / len(self.seconds)",
        tests=(
            "tests/cli/test_cli.py tests/bench/test_measure.py"
            ' -k "test_means_are_of_ratios or test_medians or test_figures_are_ratios_of_medians"'
        ),
    ),
    Mutant(
        name="what-is-freed-still-counts",
        file="fused_attn/bench/measure.py",
        old="        now += event.nbytes()\n",
        new="        now += max(event.nbytes(), 0)\n",
        tests="tests/bench/test_blocks.py -k test_the_peak_is_counted_and_not_the_sum",
    ),
    Mutant(
        name="json-without-medians",
        file="fused_attn/bench/measure.py",
        old="        medians = {name: t.median for name, t in self.timings.items()}\n"
        '        return {**asdict(self), "medians": medians}',
        new="        return asdict(self)",
        tests=(
            "tests/cli/test_cli.py tests/bench/test_measure.py"
            ' -k "test_interrupted_bench_keeps_what_it_has or test_figures_are_ratios_of_medians"'
        ),
    ),
    Mutant(
        name="picture-of-the-first-sample",
        file="fused_attn/viz.py",
        old="        values = gate[sample].detach().float().cpu()",
        new="        values = gate[0].detach().float().cpu()",
        tests="tests/test_viz.py -k test_show",
    ),
    Mutant(
        name="memory-counts-the-view",
        file="fused_attn/bench/memory.py",
        old="StorageWeakRef(storage), storage.nbytes()",
        new="StorageWeakRef(storage), tensor.nbytes",
        tests=('tests/bench/test_memory.py -k "test_every_map_is_counted_once or test_a_view_keeps_its_whole_storage"'),
    ),
]
