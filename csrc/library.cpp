// Registers the CPU implementations; csrc/cuda registers its own. The schemas are in schemas.cpp, and in Python
// (fused_attn/ops), with the fake kernels, for where this library is not.
#include <torch/csrc/stable/library.h>

#include "cpu/map.h"
#include "cpu/ops.h"

namespace {
// What it was before.
bool fresh_memory(bool by_torch) { return fused_attn::cpu::memory_by_torch.exchange(by_torch); }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_attn, CompositeExplicitAutograd, m) {
    m.impl("fresh_memory", TORCH_BOX(&fresh_memory));
}

STABLE_TORCH_LIBRARY_IMPL(fused_attn, CPU, m) {
    m.impl("squeeze.cpu", TORCH_BOX(&fused_attn::cpu::squeeze));
    m.impl("squeeze_backward.cpu", TORCH_BOX(&fused_attn::cpu::squeeze_backward));
    m.impl("scale.cpu", TORCH_BOX(&fused_attn::cpu::scale));
    m.impl("scale_backward.cpu", TORCH_BOX(&fused_attn::cpu::scale_backward));
    m.impl("mixed_scale.cpu", TORCH_BOX(&fused_attn::cpu::mixed_scale));
    m.impl("mixed_scale_backward.cpu", TORCH_BOX(&fused_attn::cpu::mixed_scale_backward));
    m.impl("channel_gate.cpu", TORCH_BOX(&fused_attn::cpu::channel_gate));
    m.impl("channel_gate_backward.cpu", TORCH_BOX(&fused_attn::cpu::channel_gate_backward));
    m.impl("spatial_gate.cpu", TORCH_BOX(&fused_attn::cpu::spatial_gate));
    m.impl("spatial_gate_backward.cpu", TORCH_BOX(&fused_attn::cpu::spatial_gate_backward));
    m.impl("spatial_logits.cpu", TORCH_BOX(&fused_attn::cpu::spatial_logits));
    m.impl("spatial_logits_backward.cpu", TORCH_BOX(&fused_attn::cpu::spatial_logits_backward));
    m.impl("channel_pool.cpu", TORCH_BOX(&fused_attn::cpu::channel_pool));
    m.impl("channel_pool_backward.cpu", TORCH_BOX(&fused_attn::cpu::channel_pool_backward));
    m.impl("context_pool.cpu", TORCH_BOX(&fused_attn::cpu::context_pool));
    m.impl("context_pool_backward.cpu", TORCH_BOX(&fused_attn::cpu::context_pool_backward));
    m.impl("simam.cpu", TORCH_BOX(&fused_attn::cpu::simam));
    m.impl("simam_backward.cpu", TORCH_BOX(&fused_attn::cpu::simam_backward));
    m.impl("moments.cpu", TORCH_BOX(&fused_attn::cpu::moments));
    m.impl("norm_coefficients.cpu", TORCH_BOX(&fused_attn::cpu::norm_coefficients));
    m.impl("norm_running.cpu", TORCH_BOX(&fused_attn::cpu::norm_running));
    m.impl("norm_scale.cpu", TORCH_BOX(&fused_attn::cpu::norm_scale));
    m.impl("norm_scale_into.cpu", TORCH_BOX(&fused_attn::cpu::norm_scale_into));
    m.impl("norm_dots.cpu", TORCH_BOX(&fused_attn::cpu::norm_dots));
    m.impl("norm_factors.cpu", TORCH_BOX(&fused_attn::cpu::norm_factors));
    m.impl("norm_gradients.cpu", TORCH_BOX(&fused_attn::cpu::norm_gradients));
    m.impl("axis_pool.cpu", TORCH_BOX(&fused_attn::cpu::axis_pool));
    m.impl("axis_pool_backward.cpu", TORCH_BOX(&fused_attn::cpu::axis_pool_backward));
    m.impl("select_squeeze.cpu", TORCH_BOX(&fused_attn::cpu::select_squeeze));
    m.impl("select_sum.cpu", TORCH_BOX(&fused_attn::cpu::select_sum));
    m.impl("select_dots.cpu", TORCH_BOX(&fused_attn::cpu::select_dots));
    m.impl("select_gradients.cpu", TORCH_BOX(&fused_attn::cpu::select_gradients));
    m.impl("select.cpu", TORCH_BOX(&fused_attn::cpu::select));
    m.impl("select_backward.cpu", TORCH_BOX(&fused_attn::cpu::select_backward));
    m.impl("position_attention.cpu", TORCH_BOX(&fused_attn::cpu::position_attention));
    m.impl("position_attention_backward.cpu", TORCH_BOX(&fused_attn::cpu::position_attention_backward));
    m.impl("relayout.cpu", TORCH_BOX(&fused_attn::cpu::relayout));
    m.impl("criss_cross_attention.cpu", TORCH_BOX(&fused_attn::cpu::criss_cross_attention));
    m.impl("criss_cross_attention_backward.cpu", TORCH_BOX(&fused_attn::cpu::criss_cross_attention_backward));
    m.impl("cbam.cpu", TORCH_BOX(&fused_attn::cpu::cbam));
    m.impl("cbam_backward.cpu", TORCH_BOX(&fused_attn::cpu::cbam_backward));
}
