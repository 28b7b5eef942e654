"""Faults in the Triton layer: its kernels run in Triton's interpreter, two of the tests count passes or compile."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    # ---- language: numbers ----
    Mutant(
        name="negative-nan-below-everything",
        file="fused_attn/kernels/language.py",
        old="return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))",
        new="return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
        tests="tests/kernels/test_interpreter.py tests/kernels/test_interpreter_space.py"
        " -k 'test_special_values or test_nan'",
    ),
    Mutant(
        name="later-rows-win-ties",
        file="fused_attn/kernels/language.py",
        old="tie = place + place2 if TIES == EVEN else tl.minimum(place, place2)",
        new="tie = place + place2 if TIES == EVEN else tl.maximum(place, place2)",
        tests="tests/kernels/test_interpreter_rows.py -k test_squeeze",
    ),
    # ---- maps: plans and strides ----
    Mutant(
        name="last-split-ignored",
        file="fused_attn/kernels/maps.py",
        old="    n_split = triton.cdiv(s_blocks, blocks)\n    return Plan(",
        new="    n_split = s_blocks // blocks\n    return Plan(",
        tests="tests/kernels/test_interpreter.py -k 'test_maximum_with_ties or test_shapes_and_layouts'",
    ),
    Mutant(
        name="permuted-gradient-copied-first",
        file="fused_attn/kernels/maps.py",
        old="    if found is None:\n        grad, found = as_map(grad, x), (None, None, None)",
        new="    if found is None or found[2] != 1:\n        grad, found = as_map(grad, x), (None, None, None)",
        tests="tests/kernels/test_traffic.py -k test_a_gradient_of_other_strides_is_read_where_it_lies",
    ),
    Mutant(
        name="rows-aligned-to-eight-bytes",
        file="fused_attn/kernels/maps.py",
        old="math.gcd(size, 16 // dtype.itemsize)",
        new="math.gcd(size, 8 // dtype.itemsize)",
        tests="tests/kernels/test_compile.py -k 90-0",
    ),
    Mutant(
        name="channels-of-the-next-program-too",
        file="fused_attn/kernels/maps.py",
        old="return c, (k < tiles * BLOCK_C) & (c < C)",
        new="return c, c < C",
        tests="tests/kernels/test_interpreter.py -k test_shapes_and_layouts",
    ),
    Mutant(
        name="channels-a-program-by-the-batch",
        file="fused_attn/kernels/maps.py",
        old="while block_k < min(most_channels, channels):",
        new="while block_k < min(most_channels, channels, 16 * batch):",
        tests="tests/kernels/test_host.py -k test_what_is_compiled_does_not_depend_on_the_batch",
    ),
    Mutant(
        name="a-kernel-of-its-own-for-one-tile",
        file="fused_attn/kernels/maps.py",
        old='        "tiles",\n        "s_blocks",',
        new='        "s_blocks",',
        tests="tests/kernels/test_host.py -k test_a_batch_never_seen_before_compiles_nothing",
    ),
    Mutant(
        name="one-sample-of-other-strides-copied",
        file="fused_attn/kernels/maps.py",
        old="return all(size == 1 or a == b for",
        new="return all(a == b for",
        tests="tests/kernels/test_host.py -k test_strides_of_one_sample",
    ),
    # ---- calls that are replayed ----
    Mutant(
        name="replayed-for-another-alignment",
        file="fused_attn/kernels/replay.py",
        old="key += (t.dtype, t.shape, t.stride(), pointer & 15)",
        new="key += (t.dtype, t.shape, t.stride())",
        tests="tests/kernels/test_replay.py -k test_what_makes_a_call_another_kind",
    ),
    Mutant(
        name="recorded-as-the-tensors-that-they-are",
        file="fused_attn/kernels/replay.py",
        old="inputs.append(a.detach())",
        new="inputs.append(a)",
        tests="tests/kernels/test_replay.py -k test_a_residual_that_was_the_map_and_is_another",
    ),
    Mutant(
        name="operators-in-place-not-replayed",
        file="fused_attn/kernels/replay.py",
        old="        if made or func._schema.is_mutable:\n",
        new="        if made:\n",
        tests="tests/kernels/test_replay.py -k 'test_every_op and batch_norm'",
    ),
    Mutant(
        name="temporaries-one-upon-the-other",
        file="fused_attn/kernels/replay.py",
        old="found = kind.setdefault((place, offset + self.offsets.get(i, 0)), len(kind))",
        new="found = kind.setdefault((place, offset), len(kind))",
        tests="tests/kernels/test_replay.py -k 'test_every_op and channel_gate'",
    ),
    Mutant(
        name="listeners-of-a-kernel-passed-over",
        file="fused_attn/kernels/replay.py",
        old="if plan.setting != setting or any(plan.hooks):",
        new="if plan.setting != setting:",
        tests="tests/kernels/test_replay.py -k test_listeners_and_other_settings_are_not_passed_over",
    ),
    Mutant(
        name="listeners-of-all-launches-passed-over",
        file="fused_attn/kernels/replay.py",
        old='if (enter is not None and getattr(enter, "calls", True)) or (leave',
        new="if (leave",
        tests="tests/kernels/test_host.py -k test_launches_of_a_call",
    ),
    # ---- passes over a map, pools over space ----
    Mutant(
        name="nan-never-better",
        file="fused_attn/kernels/passes.py",
        old="better = mask & (peak == peak) & ~(u <= peak)",
        new="better = mask & (u > peak)",
        tests="tests/kernels/test_interpreter.py -k test_special_values",
    ),
    Mutant(
        name="slope-before-the-prologue",
        file="fused_attn/kernels/passes.py",
        old="du *= activate_grad(before, PRE)",
        new="du *= activate_grad(v.to(ACC), PRE)",
        tests="tests/kernels/test_interpreter.py"
        " -k 'test_every_activation_in_every_place or test_prologue_and_epilogue_together'",
    ),
    # ---- space: pools over channels ----
    Mutant(
        name="tap-mirrored",
        file="fused_attn/kernels/channel_gate.py",
        old="near = _at_taps(dz, taps - 1 - t0, -1, mask, TAPS, BLOCK_K, BLOCK_E)",
        new="near = _at_taps(dz, t0, 1, mask, TAPS, BLOCK_K, BLOCK_E)",
        tests="tests/kernels/test_interpreter.py -k 'test_shapes_and_layouts and eca'",
    ),
    Mutant(
        name="neighbours-of-the-first-block",
        file="fused_attn/kernels/channel_gate.py",
        old="    first = cblk * tiles * BLOCK_C\n    n = ",
        new="    first = cblk * 0\n    n = ",
        tests="tests/kernels/test_interpreter.py -k 'test_shapes_and_layouts and eca'",
    ),
    Mutant(
        name="last-channel-wins-ties",
        file="fused_attn/kernels/space.py",
        old="better = mask & (peak == peak) & ~(v <= peak)",
        new="better = mask & (peak == peak) & ~(v < peak)",
        tests="tests/kernels/test_interpreter_space.py"
        " -k 'test_spatial_gate or test_channel_pool_and_scale_by_position'",
    ),
    Mutant(
        name="epilogue-without-the-gate-of-space",
        file="fused_attn/kernels/space.py",
        old="dy = before_epilogue(dy, v * by_space, y, residual, at + offsets, mask, POST)",
        new="dy = before_epilogue(dy, v, y, residual, at + offsets, mask, POST)",
        tests="tests/kernels/test_interpreter_space.py -k test_prologue_and_epilogue",
    ),
    # ---- channel_gate ----
    Mutant(
        name="second-bias-counted-once-for-two-pools",
        file="fused_attn/kernels/channel_gate.py",
        old="_store_sum(grad_bias2, grad_logits, PAIR, B, C, c, in_c, BLOCK_B, ACC)",
        new="_store_sum(grad_bias2, grad_logits, 1, B, C, c, in_c, BLOCK_B, ACC)",
        tests="tests/kernels/test_interpreter_space.py -k test_both_pools",
    ),
    Mutant(
        name="peaks-of-avgmax-not-kept",
        file="fused_attn/kernels/channel_gate.py",
        old="        elif TIES == EVEN:\n            tl.store(row + width - C + reads, peak, mask=own)",
        new="        elif POOL == MAX and TIES == EVEN:\n            tl.store(row + width - C + reads, peak, mask=own)",
        tests="tests/kernels/test_interpreter.py -k test_maximum_with_ties",
    ),
    # ---- squeeze, scale, channel_pool ----
    Mutant(
        name="first-maximum-found-by-value",
        file="fused_attn/kernels/squeeze.py",
        old="max + row if grad_max is not None and TIES == EVEN else None, None, weight_sums, bias_sums,",
        new="max + row if grad_max is not None else None, None, weight_sums, bias_sums,",
        tests="tests/kernels/test_interpreter.py tests/kernels/test_traffic.py"
        " -k 'test_squeeze or test_squeeze_and_scale'",
    ),
    Mutant(
        name="residual-not-in-the-order-of-the-map",
        file="fused_attn/kernels/scale.py",
        old="        residual=maps.as_map(residual, x),\n        y=y,",
        new="        residual=maps.row(residual),\n        y=y,",
        tests="tests/kernels/test_interpreter.py -k test_every_activation_in_every_place",
    ),
    Mutant(
        name="peaks-taken-from-the-first-plane",
        file="fused_attn/kernels/channel_pool.py",
        old='peak = pooled[:, mean_first] if ties == TIES["even"] else None',
        new='peak = pooled[:, 0] if ties == TIES["even"] else None',
        tests="tests/kernels/test_interpreter_space.py -k test_channel_pool_and_scale_by_position",
    ),
    # ---- spatial_gate, cbam ----
    Mutant(
        name="epsilon-left-out-in-backward",
        file="fused_attn/kernels/spatial_gate.py",
        old="    reciprocal = (variance + eps).rsqrt()",
        new="    reciprocal = variance.rsqrt()",
        tests="tests/kernels/test_interpreter_space.py -k test_batch_norm",
    ),
    Mutant(
        name="strides-of-the-gradient-before-the-epilogue",
        file="fused_attn/kernels/cbam.py",
        old="        grad, strides = grad_residual, dict.fromkeys(strides)",
        new="        grad = grad_residual",
        tests="tests/kernels/test_interpreter_space.py -k test_prologue_and_epilogue",
    ),
    # ---- mixed_scale, axis_pool ----
    Mutant(
        name="partial-sums-in-the-dtype-of-the-map",
        file="fused_attn/kernels/mixed_scale.py",
        old="x.new_empty((x.shape[0], parts, *shape), dtype=maps.accumulator(x.dtype))",
        new="x.new_empty((x.shape[0], parts, *shape))",
        tests="tests/kernels/test_interpreter_mixed.py",
    ),
    Mutant(
        name="zeros-beside-the-map-in-a-maximum",
        file="fused_attn/kernels/axis_pool.py",
        old='key, where = reduce_max(tl.where(mask, v, float("-inf")), found, AXIS, TIES)',
        new="key, where = reduce_max(v, found, AXIS, TIES)",
        tests="tests/kernels/test_interpreter_axes.py",
    ),
    # ---- simam, select ----
    Mutant(
        name="dots-as-they-are",
        file="fused_attn/kernels/select.py",
        old="dz = a * (dot - first - common) if GATE == SOFTMAX",
        new="dz = a * (dot - common) if GATE == SOFTMAX",
        tests="tests/kernels/test_interpreter_select.py -k test_shapes",
    ),
    Mutant(
        name="distances-between-splits-left-out",
        file="fused_attn/kernels/simam.py",
        old="spread = tl.load(squares + at, mask=present, other=0.0) + apart * apart * count",
        new="spread = tl.load(squares + at, mask=present, other=0.0)",
        tests="tests/kernels/test_interpreter_simam.py",
    ),
    Mutant(
        name="softmax-of-large-logits",
        file="fused_attn/kernels/select.py",
        old="e = tl.where(real, tl.exp(z - tl.max(z, axis=0)[None, :]), 0.0)",
        new="e = tl.where(real, tl.exp(z), 0.0)",
        tests="tests/kernels/test_interpreter_select.py",
    ),
    Mutant(
        name="rows-of-the-second-layer-as-of-one-group",
        file="fused_attn/kernels/select.py",
        old="return m * C + c, c // CG * (M * CG) + m * CG + c % CG, c // CG, exists",
        new="return m * C + c, m * C + c, c // CG, exists",
        tests="tests/kernels/test_interpreter_select.py",
    ),
    # ---- criss_cross_attention ----
    Mutant(
        name="position-itself-in-its-column-too",
        file="fused_attn/kernels/criss_cross_attention.py",
        old="    if COLUMNS:\n        pairs &=",
        new="    if False:\n        pairs &=",
        tests="tests/kernels/test_interpreter_criss_cross.py -k test_dtypes",
    ),
    Mutant(
        name="sums-as-of-the-first-peak",
        file="fused_attn/kernels/criss_cross_attention.py",
        old="summed = _add_product(summed * share[:, None], power, values, DOT, ACC)",
        new="summed = _add_product(summed, power, values, DOT, ACC)",
        tests="tests/kernels/test_interpreter_criss_cross.py -k test_dtypes",
    ),
    Mutant(
        name="peaks-of-the-first-block-of-queries",
        file="fused_attn/kernels/criss_cross_attention.py",
        old="        queries = first if OF_QUERY else far\n",
        new="        queries = first\n",
        tests="tests/kernels/test_interpreter_criss_cross.py",
    ),
    Mutant(
        name="scores-of-the-first-channels",
        file="fused_attn/kernels/criss_cross_attention.py",
        old='"WHOLE": 0 < depth <= block_d,',
        new='"WHOLE": 0 < depth,',
        tests="tests/kernels/test_interpreter_criss_cross.py",
    ),
    # ---- norm_gate ----
    Mutant(
        name="running-variance-biased",
        file="fused_attn/kernels/norm_gate.py",
        old="tl.store(unbiased + c, variance * (count / (count - 1.0)), mask=in_c)",
        new="tl.store(unbiased + c, variance, mask=in_c)",
        tests="tests/kernels/test_interpreter_norm_gate.py",
    ),
    Mutant(
        name="last-byte-of-channels-dropped",
        file="fused_attn/kernels/norm_gate.py",
        old="return at, offsets, step, (c0 // 8 + tl.arange(0, TILE) < width)[:, None]",
        new="return at, offsets, step, (c0 // 8 + tl.arange(0, TILE) < C // 8)[:, None]",
        tests="tests/kernels/test_interpreter_norm_gate.py",
    ),
    # ---- context pool ----
    Mutant(
        name="context-of-later-tiles-without-its-share",
        file="fused_attn/kernels/context_pool.py",
        old="context = context * share + tl.sum(",
        new="context = context + tl.sum(",
        tests="tests/kernels/test_interpreter_context.py",
    ),
    Mutant(
        name="positions-past-the-end-in-the-softmax",
        file="fused_attn/kernels/context_pool.py",
        old="power = tl.where(in_s, tl.exp(logit - _base(larger)), 0.0)",
        new="power = tl.exp(logit - _base(larger))",
        tests="tests/kernels/test_interpreter_context.py",
    ),
]
