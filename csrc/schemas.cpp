// The schemas of the operators, for those who load this library without Python: a saved trace, a compiled package. The
// same as in fused_attn/ops, which defines what is not here: the `triton` backend's, and all where there is no library.
#include <string>

#include <torch/csrc/stable/library.h>

namespace {

void define(torch::stable::detail::StableLibrary& library, const std::string& name, const std::string& schema) {
    for (const char* backend : {".cpu", ".cuda"}) library.def((name + backend + schema).c_str());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn, m) {
    m.def("fresh_memory(bool by_torch) -> bool");
    define(m, "squeeze",
           "(Tensor x, Tensor? affine_weight, Tensor? affine_bias, int pre_activation, int pool, int ties) -> "
           "(Tensor avg, Tensor max, Tensor index)");
    define(m, "squeeze_backward",
           "(Tensor? grad_avg, Tensor? grad_max, Tensor x, Tensor max, Tensor index, Tensor? affine_weight, "
           "Tensor? affine_bias, int pre_activation, int pool, int ties) -> (Tensor grad_x, Tensor "
           "grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "axis_pool",
           "(Tensor x, int maxima, int channels, int ties) -> (Tensor rows, Tensor columns, Tensor plane, Tensor "
           "row_index, Tensor column_index, Tensor plane_index)");
    define(m, "axis_pool_backward",
           "(Tensor? grad, Tensor? grad_rows, Tensor? grad_columns, Tensor? grad_plane, Tensor x, Tensor rows, "
           "Tensor columns, Tensor plane, Tensor row_index, Tensor column_index, Tensor plane_index, int maxima, "
           "int channels, int ties) -> Tensor");
    define(m, "scale",
           "(Tensor x, Tensor gate, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual, int "
           "pre_activation, int post_activation) -> Tensor");
    define(m, "scale_backward",
           "(Tensor grad, Tensor x, Tensor? y, Tensor gate, Tensor? affine_weight, Tensor? affine_bias, Tensor? "
           "residual, int pre_activation, int post_activation) -> (Tensor grad_x, Tensor grad_gate, Tensor "
           "grad_residual, Tensor grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "channel_gate",
           "(Tensor x, Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor? affine_weight, "
           "Tensor? affine_bias, Tensor? residual, int layer, int pool, int ties, int activation, int gate, int "
           "pre_activation, int post_activation) -> (Tensor y, Tensor state, Tensor index)");
    define(m, "channel_gate_backward",
           "(Tensor grad, Tensor x, Tensor? y, Tensor state, Tensor index, Tensor? weight1, Tensor? bias1, "
           "Tensor? weight2, Tensor? bias2, Tensor? affine_weight, Tensor? affine_bias, Tensor? residual, int "
           "layer, int pool, int ties, int activation, int gate, int pre_activation, int post_activation) -> "
           "(Tensor grad_x, Tensor grad_residual, Tensor grad_weight1, Tensor grad_bias1, Tensor grad_weight2, "
           "Tensor grad_bias2, Tensor grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "spatial_gate",
           "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? "
           "affine_weight, Tensor? affine_bias, Tensor? residual, float eps, int mean_first, int ties, int gate, "
           "int pre_activation, int post_activation) -> (Tensor y, Tensor state, Tensor index, Tensor "
           "statistics)");
    define(m, "spatial_gate_backward",
           "(Tensor grad, Tensor x, Tensor? y, Tensor state, Tensor index, Tensor statistics, Tensor weight, "
           "Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? affine_weight, Tensor? affine_bias, "
           "Tensor? residual, float eps, int mean_first, int ties, int gate, int pre_activation, int "
           "post_activation) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias, "
           "Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "cbam",
           "(Tensor x, Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor spatial_weight, "
           "Tensor? spatial_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? affine_weight, Tensor? "
           "affine_bias, Tensor? residual, float eps, int layer, int pool, int channel_ties, int activation, int "
           "channel_gate, int mean_first, int spatial_ties, int spatial_gate, int pre_activation, int "
           "post_activation) -> (Tensor y, Tensor channel_state, Tensor channel_index, Tensor state, Tensor "
           "index, Tensor statistics)");
    define(m, "cbam_backward",
           "(Tensor grad, Tensor x, Tensor? y, Tensor channel_state, Tensor channel_index, Tensor state, Tensor "
           "index, Tensor statistics, Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, Tensor "
           "spatial_weight, Tensor? spatial_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? affine_weight, "
           "Tensor? affine_bias, Tensor? residual, float eps, int layer, int pool, int channel_ties, int "
           "activation, int channel_gate, int mean_first, int spatial_ties, int spatial_gate, int "
           "pre_activation, int post_activation) -> (Tensor grad_x, Tensor grad_residual, Tensor grad_weight1, "
           "Tensor grad_bias1, Tensor grad_weight2, Tensor grad_bias2, Tensor grad_spatial_weight, Tensor "
           "grad_spatial_bias, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_affine_weight, Tensor "
           "grad_affine_bias)");
    define(m, "channel_pool",
           "(Tensor x, Tensor? affine_weight, Tensor? affine_bias, int pre_activation, int mean_first, int ties) "
           "-> (Tensor pooled, Tensor index)");
    define(m, "channel_pool_backward",
           "(Tensor grad, Tensor x, Tensor pooled, Tensor index, Tensor? affine_weight, Tensor? affine_bias, int "
           "pre_activation, int mean_first, int ties) -> (Tensor grad_x, Tensor grad_affine_weight, Tensor "
           "grad_affine_bias)");
    define(m, "select_squeeze",
           "(Tensor[] branches, int paths, Tensor? affine_weight, Tensor? affine_bias, int pre_activation) -> "
           "Tensor");
    define(m, "select_sum",
           "(Tensor[] branches, Tensor weights, int paths, Tensor? affine_weight, Tensor? affine_bias, int "
           "pre_activation) -> Tensor");
    define(m, "select_dots",
           "(Tensor grad, Tensor[] branches, int paths, Tensor? affine_weight, Tensor? affine_bias, int "
           "pre_activation) -> Tensor");
    define(m, "select_gradients",
           "(Tensor grad, Tensor[] branches, Tensor weights, Tensor grad_descriptor, int paths, Tensor? "
           "affine_weight, Tensor? affine_bias, int pre_activation) -> (Tensor[] grads, Tensor "
           "grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "select",
           "(Tensor[] branches, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? "
           "affine_weight, Tensor? affine_bias, int paths, int groups, int activation, int gate, int "
           "pre_activation) -> (Tensor y, Tensor state)");
    define(m, "select_backward",
           "(Tensor grad, Tensor[] branches, Tensor state, Tensor weight1, Tensor? bias1, Tensor weight2, "
           "Tensor? bias2, Tensor? affine_weight, Tensor? affine_bias, int paths, int groups, int activation, "
           "int gate, int pre_activation) -> (Tensor[] grads, Tensor grad_weight1, Tensor grad_bias1, Tensor "
           "grad_weight2, Tensor grad_bias2, Tensor grad_affine_weight, Tensor grad_affine_bias)");
    define(m, "context_pool",
           "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor context, Tensor mean, Tensor shares)");
    define(m, "context_pool_backward",
           "(Tensor? grad, Tensor? gate, Tensor grad_context, Tensor x, Tensor weight, Tensor? bias, Tensor "
           "mean, Tensor shares) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
    define(m, "relayout", "(Tensor x, int channels_last) -> Tensor");
    define(m, "criss_cross_attention", "(Tensor query, Tensor key, Tensor value) -> (Tensor out, Tensor state)");
    define(m, "criss_cross_attention_backward",
           "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor state) -> (Tensor "
           "grad_query, Tensor grad_key, Tensor grad_value)");
    define(m, "mixed_scale",
           "(Tensor x, Tensor? channel, Tensor? spatial, Tensor? rows, Tensor? columns, int combine) -> Tensor");
    define(m, "mixed_scale_backward",
           "(Tensor grad, Tensor x, Tensor? channel, Tensor? spatial, Tensor? rows, Tensor? columns, int "
           "combine) -> (Tensor grad_x, Tensor grad_channel, Tensor grad_spatial, Tensor grad_rows, Tensor "
           "grad_columns)");
    define(m, "moments", "(Tensor x) -> Tensor");
    define(m, "norm_coefficients",
           "(Tensor x, Tensor moments, Tensor? weight, Tensor? bias, float eps, bool wants_descriptor) -> "
           "(Tensor norm, Tensor unbiased, Tensor descriptor)");
    define(m, "norm_running", "(Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps) -> Tensor");
    define(m, "norm_scale",
           "(Tensor x, Tensor? gate, Tensor norm, Tensor? residual, int activation, int post_activation, bool "
           "keep_bits) -> (Tensor y, Tensor bits)");
    define(m, "norm_scale_into",
           "(Tensor x, Tensor? gate, Tensor norm, Tensor? residual, Tensor(a!) y, int activation, int "
           "post_activation, bool keep_bits) -> Tensor bits");
    define(m, "norm_dots",
           "(Tensor grad, Tensor x, Tensor? bits, Tensor? residual, Tensor norm, Tensor? gate, int activation, "
           "int post_activation) -> (Tensor sums, Tensor grad_residual)");
    define(m, "norm_factors",
           "(Tensor x, Tensor sums, Tensor? grad_s, Tensor norm, bool of_batch) -> (Tensor grad_weight, Tensor "
           "grad_bias, Tensor factors, Tensor constants)");
    define(m, "norm_gradients",
           "(Tensor grad, Tensor x, Tensor norm, Tensor factors, Tensor constants, int activation) -> Tensor");
    define(m, "position_attention",
           "(Tensor query, Tensor key, Tensor value, float scale) -> (Tensor out, Tensor state)");
    define(m, "position_attention_backward",
           "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor state, float scale) -> "
           "(Tensor grad_query, Tensor grad_key, Tensor grad_value)");
    define(m, "simam", "(Tensor x, float e_lambda) -> (Tensor y, Tensor state)");
    define(m, "simam_backward", "(Tensor grad, Tensor x, Tensor state) -> Tensor");
    define(m, "spatial_logits", "(Tensor pooled, Tensor weight, Tensor? bias) -> Tensor");
    define(m, "spatial_logits_backward",
           "(Tensor grad, Tensor pooled, Tensor weight, Tensor? bias) -> (Tensor grad_pooled, Tensor "
           "grad_weight, Tensor grad_bias)");
}
