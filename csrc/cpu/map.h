// Tensors as the CPU ops see them: maps as (batch, channels, positions) in one of two layouts, parameters as
// arrays of the accumulator's type. Only the stable ABI; no strides survive past this file.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include "../codes.h"
#include "kernels.h"

namespace fused_attn::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Dense with channels next to each other: (B, *spatial, C) in memory. Axes of size 1 may have any stride.
inline bool is_channels_last(const Tensor& x) {
    int64_t expected = 1;
    auto axis_is_dense = [&](int64_t axis) {
        const bool dense = x.size(axis) == 1 || x.stride(axis) == expected;
        expected *= x.size(axis);
        return dense;
    };
    if (!axis_is_dense(1)) return false;
    for (int64_t axis = x.dim() - 1; axis > 1; --axis)
        if (!axis_is_dense(axis)) return false;
    return axis_is_dense(0);
}

// x itself where it is NCHW or channels_last, else one NCHW copy.
inline Tensor dense_map(const Tensor& x) {
    return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

// t itself where its elements lie in the order of its axes, else one copy: for what a forward kept, which torch.compile
// may hand over as it likes.
inline Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Large outputs are fresh pages from the system: 2 MiB pages take one fault where 4 KiB pages take 512.
// FUSED_ATTN_HUGEPAGES=0 leaves the allocator's choice alone.
inline void prefer_huge_pages(const Tensor& map, int64_t itemsize) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    static const bool enabled = [] {
        const char* asked = std::getenv("FUSED_ATTN_HUGEPAGES");
        return asked == nullptr || std::strcmp(asked, "0") != 0;
    }();
    constexpr uintptr_t kPage = 4096, kWorthwhile = 8 << 20;
    const uintptr_t bytes = static_cast<uintptr_t>(map.numel() * itemsize);
    if (!enabled || bytes < kWorthwhile) return;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(map.mutable_data_ptr()) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(map.mutable_data_ptr()) + bytes) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

// Whether torch's own `empty` makes the tensors here: it fills them where uninitialised memory is asked to show.
inline std::atomic<bool> memory_by_torch{false};

// A new tensor on the CPU, past the dispatcher, whose way there by an operator's name takes longer than the allocation:
// of a small map that was a third of an operator's time.
inline Tensor allocate(int64_t axes, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        axes, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

// Of these sizes, contiguous.
inline Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    if (memory_by_torch) return torch::stable::empty(sizes, dtype);
    constexpr size_t kMostAxes = 8;
    STD_TORCH_CHECK(sizes.size() <= kMostAxes, "fused_attn: expected at most 8 axes");
    int64_t strides[kMostAxes];
    int64_t stride = 1;
    for (size_t axis = sizes.size(); axis-- > 0;) {
        strides[axis] = stride;
        stride *= std::max<int64_t>(1, sizes[axis]);
    }
    return allocate(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype);
}

template <class T>
Tensor empty_map(const Tensor& dense) {
    Tensor map = memory_by_torch
                     ? torch::stable::empty_like(dense)
                     : allocate(dense.dim(), dense.sizes().data(), dense.strides().data(), dense.scalar_type());
    prefer_huge_pages(map, sizeof(T));
    return map;
}

// `other` in the layout of the dense map x: itself where the strides agree, else one copy.
template <class T>
Tensor in_layout_of(const Tensor& x, const Tensor& other) {
    bool same = true;
    for (int64_t axis = 0; axis < x.dim(); ++axis)
        same = same && (x.size(axis) == 1 || x.stride(axis) == other.stride(axis));
    if (same || x.numel() == 0) return other;
    Tensor copy = empty_map<T>(x);
    torch::stable::copy_(copy, other);
    return copy;
}

// A dense map's data, cut into samples and panels.
template <class T>
struct MapView {
    T* data;
    int64_t batch, channels, positions;
    bool channels_last;

    explicit MapView(const Tensor& dense)
        : data(static_cast<T*>(dense.data_ptr())),
          batch(dense.size(0)),
          channels(dense.size(1)),
          positions(1),
          channels_last(!dense.is_contiguous()) {
        for (int64_t axis = 2; axis < dense.dim(); ++axis) positions *= dense.size(axis);
        channels_last = channels_last || positions == 1;  // the same memory, and longer rows
    }
    int64_t sample_size() const { return channels * positions; }

    // Panels cut a sample into `count` pieces: channels (NCHW) or positions (channels_last).
    int64_t axis_length() const { return channels_last ? positions : channels; }
    int64_t begin(int64_t piece, int64_t count) const { return axis_length() * piece / count; }
    int64_t first_channel(int64_t piece, int64_t count) const { return channels_last ? 0 : begin(piece, count); }
    int64_t offset(int64_t sample, int64_t piece, int64_t count) const {
        return sample * sample_size() + begin(piece, count) * (channels_last ? channels : positions);
    }
    Panel panel(int64_t piece, int64_t count) const {
        const int64_t first = begin(piece, count), length = begin(piece + 1, count) - first;
        return channels_last ? Panel{channels, length, true, first} : Panel{length, positions, false, 0};
    }
    // Parts of a sample that leave room beside them in a core's own cache. A second pass takes them from the last to
    // the first: what the first pass read last is still there.
    int64_t parts() const {
        constexpr int64_t kPart = (128 << 10) / sizeof(T);
        return std::max<int64_t>(1, std::min(axis_length(), sample_size() / kPart));
    }
    // Pieces of space have all channels.
    int64_t first_position(int64_t piece, int64_t count) const { return positions * piece / count; }
    int64_t space_offset(int64_t sample, int64_t piece, int64_t count) const {
        return sample * sample_size() + first_position(piece, count) * (channels_last ? channels : 1);
    }
    Panel space(int64_t piece, int64_t count) const {
        const int64_t first = first_position(piece, count);
        return {channels, first_position(piece + 1, count) - first, channels_last, first, positions};
    }
};

template <class T>
T* pointer(const OptionalTensor& tensor) {
    return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// How many pieces of this size cover n.
inline int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kSerialElements = 1 << 15;

// Calls body(begin, end) for ranges that cover 0..count, on torch's threads.
template <class F>
void parallel_ranges(int64_t count, int64_t elements, const F& body) {
    if (elements >= kSerialElements)
        torch::stable::parallel_for(0, count, 1, body);
    else if (count > 0)
        body(int64_t(0), count);
}
// Calls body(0), ..., body(count - 1) on torch's threads.
template <class F>
void parallel(int64_t count, int64_t elements, const F& body) {
    parallel_ranges(count, elements, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
    });
}

// A small tensor of any float dtype, read as an array of A. Without one, data() is null. Weights of another dtype are
// converted on torch's threads, into memory that nobody has to fill with zeros before.
template <class A>
class Values {
  public:
    Values() = default;
    explicit Values(const OptionalTensor& tensor) {
        if (tensor) read(*tensor);
    }
    explicit Values(const Tensor& tensor) { read(tensor); }
    const A* data() const { return data_; }

  private:
    void read(const Tensor& tensor) {
        kept_ = in_order(tensor);
        const int64_t n = kept_->numel();
        switch (kept_->scalar_type()) {
            case ScalarType::Double:
                return convert<double>(n);
            case ScalarType::Half:
                return convert<Half>(n);
            case ScalarType::BFloat16:
                return convert<BFloat16>(n);
            default:
                return convert<float>(n);
        }
    }
    template <class P>
    void convert(int64_t n) {
        const P* from = static_cast<const P*>(kept_->data_ptr());
        if constexpr (std::is_same_v<P, A>) {
            data_ = from;
        } else {
            constexpr int64_t kBlock = 1 << 14;
            converted_.reset(new A[std::max<int64_t>(n, 1)]);
            A* const to = converted_.get();
            parallel(ceil_div(n, kBlock), n, [&](int64_t block) {
                const int64_t begin = block * kBlock, end = std::min(n, begin + kBlock);
                std::transform(from + begin, from + end, to + begin, [](P v) { return static_cast<A>(v); });
            });
            data_ = to;
        }
    }
    std::optional<Tensor> kept_;
    std::unique_ptr<A[]> converted_;
    const A* data_ = nullptr;
};

// Write an array into a new contiguous tensor with the shape and dtype of `like`.
template <class A>
void write_values(const A* values, const Tensor& to) {
    const int64_t n = to.numel();
    auto copy = [&](auto* out) {
        using P = std::remove_pointer_t<decltype(out)>;
        std::transform(values, values + n, out, [](A v) { return static_cast<P>(v); });
    };
    switch (to.scalar_type()) {
        case ScalarType::Double:
            return copy(static_cast<double*>(to.data_ptr()));
        case ScalarType::Half:
            return copy(static_cast<Half*>(to.data_ptr()));
        case ScalarType::BFloat16:
            return copy(static_cast<BFloat16*>(to.data_ptr()));
        default:
            return copy(static_cast<float*>(to.data_ptr()));
    }
}
inline Tensor contiguous_like(const Tensor& like) { return allocate(like.sizes(), like.scalar_type()); }
template <class A>
constexpr ScalarType kScalarType = sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float;

inline Tensor empty_tensor(const std::vector<int64_t>& shape, ScalarType dtype) {
    return allocate({shape.data(), shape.size()}, dtype);
}
inline Tensor no_tensor(const Tensor& like) { return empty_tensor({0}, like.scalar_type()); }
// The gradient of an optional input, of size (0,) without it: fill(p) writes its numbers, in place where its
// dtype is A.
template <class A, class F>
Tensor gradient_like(const OptionalTensor& like, const Tensor& x, F fill) {
    if (!like) return no_tensor(x);
    Tensor out = contiguous_like(*like);
    if (out.scalar_type() == kScalarType<A>) {
        fill(static_cast<A*>(out.data_ptr()));
    } else {
        std::vector<A> values(std::max<int64_t>(1, out.numel()));
        fill(values.data());
        write_values(values.data(), out);
    }
    return out;
}

// Call f with a null pointer of the storage type.
template <class F>
auto dispatch(const Tensor& x, F f) {
    switch (x.scalar_type()) {
        case ScalarType::Double:
            return f(static_cast<double*>(nullptr));
        case ScalarType::Float:
            return f(static_cast<float*>(nullptr));
        case ScalarType::Half:
            return f(static_cast<Half*>(nullptr));
        case ScalarType::BFloat16:
            return f(static_cast<BFloat16*>(nullptr));
        default:
            STD_TORCH_CHECK(false, "fused_attn: expected a float64, float32, float16 or bfloat16 map");
    }
}

inline void zero(const Tensor& tensor, int64_t itemsize) {
    if (tensor.numel() > 0) std::memset(tensor.data_ptr(), 0, tensor.numel() * itemsize);
}

// Whole samples a thread, so that a sample's second pass finds it in cache; where there are too few of them for
// the threads, every sample is cut into this many pieces (fixed, so that sums do not depend on the threads).
inline int64_t pieces_of(int64_t batch, int64_t axis_length, int64_t elements) {
    const int64_t threads = torch::stable::get_num_threads();
    const bool balanced = batch >= 4 * threads || (batch >= threads && batch % threads == 0);
    if (threads == 1 || balanced || elements < kSerialElements) return 1;
    return std::max<int64_t>(1, std::min<int64_t>(axis_length, 32));
}

// Numbers a (sample, piece, channel): pieces of an NCHW sample own their channels, pieces of a channels_last
// sample each have a row of all channels until merge() has added the rows up in order.
template <class V>
class PieceValues {
  public:
    template <class T>
    PieceValues(const MapView<T>& map, int64_t pieces, V initial, bool wanted = true)
        : channels_(map.channels),
          rows_(map.channels_last ? pieces : 1),
          values_(wanted ? std::max<int64_t>(1, map.batch * rows_ * map.channels) : 0, initial) {}
    V* piece(int64_t sample, int64_t piece, int64_t first_channel) {
        return &values_[(sample * rows_ + (rows_ > 1 ? piece : 0)) * channels_ + first_channel];
    }
    V* sample(int64_t sample) { return &values_[sample * rows_ * channels_]; }
    int64_t rows() const { return rows_; }
    void merge(int64_t s) {
        for (int64_t row = 1; row < rows_; ++row)
            for (int64_t c = 0; c < channels_; ++c) sample(s)[c] += piece(s, row, c)[0];
    }

  private:
    int64_t channels_, rows_;
    std::vector<V> values_;
};

// Merged per-sample numbers summed over the batch, in order.
template <class A>
void batch_sum(PieceValues<double>& values, int64_t batch, int64_t n, A* out) {
    for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int64_t b = 0; b < batch; ++b) total += values.sample(b)[i];
        out[i] = static_cast<A>(total);
    }
}

}  // namespace fused_attn::cpu
