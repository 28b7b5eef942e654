"""Faults in the C++ CPU layer."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "hard-swish-slope-at-its-kinks",
        "csrc/cpu/vec.inl",
        "return x <= -three ? zero : (x < three ? x / three + splat<A>(A(0.5)) : one);",
        "return x < -three ? zero : (x <= three ? x / three + splat<A>(A(0.5)) : one);",
        "tests/ops/test_spatial_gate.py -k 'test_prologue or test_any_shape_and_option'",
    ),
    Mutant(
        "nan-clamped-in-the-baseline-build",
        "csrc/cpu/vec.inl",
        "#else\n    x = x < low ? low : x;",
        "#else\n    x = x > low ? x : low;",
        "tests/test_backends.py -k test_every_instruction_set_gives_the_same_function",
    ),
    Mutant(
        "last-lane-of-tied-lanes",
        "csrc/cpu/kernels.inl",
        "(other.tag < tag ? other.tag : tag)",
        "(other.tag > tag ? other.tag : tag)",
        "tests/ops/test_channel_gate.py -k test_maximum_with_ties",
    ),
    Mutant(
        "affine-bias-gradient-of-a-maximum-without-slope",
        "csrc/cpu/kernels.inl",
        "grad_bias[c] += share[0];",
        "grad_bias[c] += peak_grad.value[c];",
        "tests/ops/test_squeeze_scale.py -k test_squeeze_after_a_prologue",
    ),
    Mutant(
        "batch-stride-of-a-gradient-not-compared",
        "csrc/cpu/map.h",
        "for (int64_t axis = 0; axis < x.dim(); ++axis)\n        same = same",
        "for (int64_t axis = 1; axis < x.dim(); ++axis)\n        same = same",
        "tests/ops/test_channel_gate.py -k 'test_strides or test_gradient_of_a_sum'",
    ),
    Mutant(
        "pieces-by-the-number-of-threads",
        "csrc/cpu/map.h",
        "std::min<int64_t>(axis_length, 32)",
        "std::min<int64_t>(axis_length, 4 * threads)",
        "tests/ops/test_channel_gate.py"
        " -k 'test_the_number_of_threads_changes_no_bit or test_two_runs_agree_to_the_bit'",
    ),
    Mutant(
        "nan-lost-between-pieces",
        "csrc/cpu/passes.h",
        "if (value[c] > best[c] || (std::isnan(value[c]) && !std::isnan(best[c]))) {",
        "if (value[c] > best[c]) {",
        "tests/ops/test_squeeze_scale.py tests/ops/test_channel_gate.py tests/ops/test_cbam.py"
        " -k 'test_nan or test_squeeze_of_special_values'",
    ),
    Mutant(
        "nan-maximum-reaches-no-element",
        "csrc/cpu/passes.h",
        "if (std::isnan(peak[c])) mean[c] = ",
        "if (std::isnan(peak[c])) value[c] = ",
        "tests/ops/test_squeeze_scale.py tests/ops/test_channel_gate.py"
        " -k 'test_channel_pool_of_nan or test_squeeze_of_special_values or test_nan_and_infinity'",
    ),
    Mutant(
        "pivot-of-an-empty-channel",
        "csrc/cpu/passes.h",
        "x.positions > 0 ? static_cast<A>(x.data[sample * x.sample_size() + c * stride]) : A(0);",
        "static_cast<A>(x.data[sample * x.sample_size() + c * stride]);",
        "tests/ops/test_simam.py -k test_empty",
    ),
    Mutant(
        "counts-of-equals-not-kept",
        "csrc/cpu/channel.h",
        "if (pool_ != kAvg) std::copy_n(pooling.index(b)",
        "if (pool_ != kAvg && !even_) std::copy_n(pooling.index(b)",
        "tests/ops/test_channel_gate.py -k test_maximum_with_ties",
    ),
    Mutant(
        "both-pools-share-the-gradient",
        "csrc/cpu/channel.h",
        "const A share = pool_ == kAvgMax ? A(0.5) : A(1);",
        "const A share = pool_ == kAvg || pool_ == kMax ? A(1) : A(0.5);",
        "tests/ops/test_channel_gate.py -k test_both_pools",
    ),
    Mutant(
        "circular-padding-of-more-than-a-row",
        "csrc/cpu/excitation.h",
        "row[((i - pad) % channels_ + channels_) % channels_]",
        "row[(channels_ + i - pad) % channels_]",
        "tests/ops/test_channel_gate.py -k test_convolution_longer_than_the_channels",
    ),
    Mutant(
        "residual-ignored-without-activations",
        "csrc/cpu/space.inl",
        "const bool plain = prologue.identity() && !residual && activation == kIdentity;",
        "const bool plain = prologue.identity() && activation == kIdentity;",
        "tests/ops/test_cbam.py -k test_epilogue",
    ),
    Mutant(
        "unbiased-variance-of-the-logits",
        "csrc/cpu/space.h",
        "{ return (v - mean) * (v - mean); }) / count;",
        "{ return (v - mean) * (v - mean); }) / (count - 1);",
        "tests/ops/test_spatial_gate.py -k 'test_batch_norm or test_statistics_of_the_batch'",
    ),
    Mutant(
        "gradient-of-logits-read-as-if-dense",
        "csrc/cpu/spatial_logits.cpp",
        "grad = as_rows(grad_in);",
        "grad = grad_in;",
        "tests/ops/test_spatial_logits.py -k 'test_shapes_and_dtypes or test_strides'",
    ),
    Mutant(
        "gate-by-position-of-the-first-piece",
        "csrc/cpu/scale.cpp",
        "gates.data() + b * x.positions + x.first_position(piece, pieces),",
        "gates.data() + b * x.positions,",
        "tests/ops/test_squeeze_scale.py -k test_scale_by_position_in_pieces",
    ),
    Mutant(
        "first-element-of-a-tail-not-summed",
        "csrc/cpu/select.inl",
        "SomeLanes<A>{~lanes_below<A>(lanes - (last - i))}",
        "SomeLanes<A>{~lanes_below<A>(lanes - (last - i) + 1)}",
        "tests/ops/test_select.py -k 'test_branches_and_gates or test_threads'",
    ),
    Mutant(
        "softmax-without-its-maximum",
        "csrc/cpu/select.cpp",
        "weight = std::exp(weight - most);",
        "weight = std::exp(weight);",
        "tests/ops/test_select.py"
        " -k 'test_branches_and_gates or test_nan_and_infinity or test_logits_too_large_for_an_exponential'",
    ),
    Mutant(
        "products-compared-before-rounding",
        "csrc/cpu/mix.inl",
        "const V a = rounded_to<T>(x * g.channel), b = rounded_to<T>(x * g.spatial);\n            const V share",
        "const V a = x * g.channel, b = x * g.spatial;\n            const V share",
        "tests/ops/test_mixed_scale.py -k 'test_equal_products_share_the_gradient or test_any_shape'",
    ),
    Mutant(
        "rows-of-a-piece-counted-from-zero",
        "csrc/cpu/axis_pool.cpp",
        "AxisPanel{channels, length, width, true, begin}",
        "AxisPanel{channels, length, width, true, 0}",
        "tests/ops/test_axis_pool.py -k 'test_shapes_dtypes_layouts or test_results_do_not_depend_on_the_run'",
    ),
    Mutant(
        "vector-read-one-past-the-panel",
        "csrc/cpu/axes.inl",
        "return at + kLanes<Accumulator<T>> <= n ? load(p + at)",
        "return at + kLanes<Accumulator<T>> <= n + 1 ? load(p + at)",
        "tests/test_sanitizers.py",
    ),
    Mutant(
        "mean-put-together-before-it-is-taken-off",
        "csrc/cpu/simam.inl",
        "return (x - pivot) - rest;",
        "return x - (pivot + rest);",
        "tests/ops/test_simam.py -k 'test_shapes_dtypes_layouts or test_a_large_mean_costs_no_digits'",
    ),
    Mutant(
        "last-byte-of-relu-bits-shifted-by-one",
        "csrc/cpu/norm.inl",
        "shift ? bits >> (8 - shift) : bits",
        "shift ? bits >> (7 - shift) : bits",
        "tests/ops/test_norm_gate.py -k test_bits",
    ),
    Mutant(
        "relu-bits-read-one-byte-past-the-row",
        "csrc/cpu/norm.inl",
        "if (shift + n > 8) bits |= ",
        "if (shift + n >= 8) bits |= ",
        "tests/test_sanitizers.py",
    ),
]
