// The CPU implementations, with the schemas of fused_attn/ops/*.py.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fused_attn::cpu {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> squeeze(const Tensor& x, const OptionalTensor& affine_weight,
                                           const OptionalTensor& affine_bias, int64_t pre_activation, int64_t pool,
                                           int64_t ties);

std::tuple<Tensor, Tensor, Tensor> squeeze_backward(const OptionalTensor& grad_avg, const OptionalTensor& grad_max,
                                                    const Tensor& x, const Tensor& max, const Tensor& index,
                                                    const OptionalTensor& affine_weight,
                                                    const OptionalTensor& affine_bias, int64_t pre_activation,
                                                    int64_t pool, int64_t ties);

Tensor scale(const Tensor& x, const Tensor& gate, const OptionalTensor& affine_weight,
             const OptionalTensor& affine_bias, const OptionalTensor& residual, int64_t pre_activation,
             int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scale_backward(const Tensor& grad, const Tensor& x,
                                                                  const OptionalTensor& y, const Tensor& gate,
                                                                  const OptionalTensor& affine_weight,
                                                                  const OptionalTensor& affine_bias,
                                                                  const OptionalTensor& residual,
                                                                  int64_t pre_activation, int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor> context_pool(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

std::tuple<Tensor, Tensor, Tensor> context_pool_backward(const OptionalTensor& grad, const OptionalTensor& gate,
                                                         const Tensor& grad_context, const Tensor& x,
                                                         const Tensor& weight, const OptionalTensor& bias,
                                                         const Tensor& mean, const Tensor& shares);

Tensor mixed_scale(const Tensor& x, const OptionalTensor& channel, const OptionalTensor& spatial,
                   const OptionalTensor& rows, const OptionalTensor& columns, int64_t combine);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_scale_backward(const Tensor& grad, const Tensor& x,
                                                                        const OptionalTensor& channel,
                                                                        const OptionalTensor& spatial,
                                                                        const OptionalTensor& rows,
                                                                        const OptionalTensor& columns, int64_t combine);

std::tuple<Tensor, Tensor, Tensor> channel_gate(const Tensor& x, const OptionalTensor& weight1,
                                                const OptionalTensor& bias1, const OptionalTensor& weight2,
                                                const OptionalTensor& bias2, const OptionalTensor& affine_weight,
                                                const OptionalTensor& affine_bias, const OptionalTensor& residual,
                                                int64_t layer, int64_t pool, int64_t ties, int64_t activation,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, int64_t layer, int64_t pool, int64_t ties, int64_t activation, int64_t gate,
    int64_t pre_activation, int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_gate(
    const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, double eps, int64_t mean_first, int64_t ties, int64_t gate, int64_t pre_activation,
    int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spatial_gate_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const Tensor& statistics, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, double eps, int64_t mean_first, int64_t ties, int64_t gate, int64_t pre_activation,
    int64_t post_activation);

Tensor spatial_logits(const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias);

std::tuple<Tensor, Tensor, Tensor> spatial_logits_backward(const Tensor& grad, const Tensor& pooled,
                                                           const Tensor& weight, const OptionalTensor& bias);

std::tuple<Tensor, Tensor> channel_pool(const Tensor& x, const OptionalTensor& affine_weight,
                                        const OptionalTensor& affine_bias, int64_t pre_activation, int64_t mean_first,
                                        int64_t ties);

std::tuple<Tensor, Tensor> position_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                              double scale);
std::tuple<Tensor, Tensor, Tensor> position_attention_backward(const Tensor& grad, const Tensor& query,
                                                               const Tensor& key, const Tensor& value,
                                                               const Tensor& out, const Tensor& state, double scale);
std::tuple<Tensor, Tensor, Tensor> channel_pool_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled,
                                                         const Tensor& index, const OptionalTensor& affine_weight,
                                                         const OptionalTensor& affine_bias, int64_t pre_activation,
                                                         int64_t mean_first, int64_t ties);

Tensor relayout(const Tensor& map, int64_t channels_last);
std::tuple<Tensor, Tensor> criss_cross_attention(const Tensor& query, const Tensor& key, const Tensor& value);
std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad, const Tensor& query,
                                                                  const Tensor& key, const Tensor& value,
                                                                  const Tensor& out, const Tensor& state);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> axis_pool(const Tensor& x, int64_t maxima, int64_t channels,
                                                                     int64_t ties);

Tensor axis_pool_backward(const OptionalTensor& grad, const OptionalTensor& grad_rows,
                          const OptionalTensor& grad_columns, const OptionalTensor& grad_plane, const Tensor& x,
                          const Tensor& rows, const Tensor& columns, const Tensor& plane, const Tensor& row_index,
                          const Tensor& column_index, const Tensor& plane_index, int64_t maxima, int64_t channels,
                          int64_t ties);

std::tuple<Tensor, Tensor> simam(const Tensor& x, double e_lambda);

Tensor moments(const Tensor& x);

std::tuple<Tensor, Tensor, Tensor> norm_coefficients(const Tensor& x, const Tensor& moments,
                                                     const OptionalTensor& weight, const OptionalTensor& bias,
                                                     double eps, bool wants_descriptor);

Tensor norm_running(const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                    double eps);

std::tuple<Tensor, Tensor> norm_scale(const Tensor& x, const OptionalTensor& gate, const Tensor& norm,
                                      const OptionalTensor& residual, int64_t activation, int64_t post_activation,
                                      bool keep_bits);

Tensor norm_scale_into(const Tensor& x, const OptionalTensor& gate, const Tensor& norm, const OptionalTensor& residual,
                       const Tensor& y, int64_t activation, int64_t post_activation, bool keep_bits);

std::tuple<Tensor, Tensor> norm_dots(const Tensor& grad, const Tensor& x, const OptionalTensor& bits,
                                     const OptionalTensor& residual, const Tensor& norm, const OptionalTensor& gate,
                                     int64_t activation, int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_factors(const Tensor& x, const Tensor& sums,
                                                        const OptionalTensor& grad_s, const Tensor& norm,
                                                        bool of_batch);

Tensor norm_gradients(const Tensor& grad, const Tensor& x, const Tensor& norm, const Tensor& factors,
                      const Tensor& constants, int64_t activation);

Tensor simam_backward(const Tensor& grad, const Tensor& x, const Tensor& state);

Tensor select_squeeze(const std::vector<Tensor>& branches, int64_t paths, const OptionalTensor& affine_weight,
                      const OptionalTensor& affine_bias, int64_t pre_activation);

Tensor select_sum(const std::vector<Tensor>& branches, const Tensor& weights, int64_t paths,
                  const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation);

Tensor select_dots(const Tensor& grad, const std::vector<Tensor>& branches, int64_t paths,
                   const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation);

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_gradients(
    const Tensor& grad, const std::vector<Tensor>& branches, const Tensor& weights, const Tensor& grad_descriptor,
    int64_t paths, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation);

std::tuple<Tensor, Tensor> select(const std::vector<Tensor>& branches, const Tensor& weight1,
                                  const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
                                  const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths,
                                  int64_t groups, int64_t activation, int64_t gate, int64_t pre_activation);

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_backward(
    const Tensor& grad, const std::vector<Tensor>& branches, const Tensor& state, const Tensor& weight1,
    const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths, int64_t groups,
    int64_t activation, int64_t gate, int64_t pre_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam(
    const Tensor& x, const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& affine_weight,
    const OptionalTensor& affine_bias, const OptionalTensor& residual, double eps, int64_t layer, int64_t pool,
    int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first, int64_t spatial_ties,
    int64_t spatial_gate, int64_t pre_activation, int64_t post_activation);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
cbam_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& channel_state,
              const Tensor& channel_index, const Tensor& state, const Tensor& index, const Tensor& statistics,
              const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
              const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& affine_weight,
              const OptionalTensor& affine_bias, const OptionalTensor& residual, double eps, int64_t layer,
              int64_t pool, int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first,
              int64_t spatial_ties, int64_t spatial_gate, int64_t pre_activation, int64_t post_activation);

}  // namespace fused_attn::cpu
