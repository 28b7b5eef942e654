// axis_pool: one read of x. axis_pool_backward: one read of grad, where there is one, and one write of grad_x (and a
// read of x for ties shared evenly).
#include <torch/csrc/stable/ops.h>

#include "axes.h"
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Samples, and what they are cut into: channels of an NCHW map, rows of a channels_last map. The pools that a piece
// has all of are its own (rows and columns, or rows and the plane); those of the third kind are shared by the pieces.
struct AxisShape {
    int64_t batch, channels, height, width, pieces;
    bool channels_last;

    AxisShape(const Tensor& x) : batch(x.size(0)), channels(x.size(1)), height(x.size(2)), width(x.size(3)) {
        channels_last = !x.is_contiguous() || height * width == 1;
        pieces = std::min<int64_t>(8, pieces_of(batch, channels_last ? height : channels, x.numel()));
    }
    int64_t sample() const { return channels * height * width; }
    int64_t first(int64_t piece) const { return (channels_last ? height : channels) * piece / pieces; }
    AxisPanel panel(int64_t piece) const {
        const int64_t begin = first(piece), length = first(piece + 1) - begin;
        return channels_last ? AxisPanel{channels, length, width, true, begin}
                             : AxisPanel{length, height, width, false, begin};
    }
    int64_t offset(int64_t b, int64_t piece) const {
        return b * sample() + first(piece) * (channels_last ? width * channels : height * width);
    }
};

// A matrix as the kernels have it, (outer, inner) or transposed, and where it stands in a tensor: (outer, inner) with
// rows of `stride`.
struct Place {
    int64_t outer, inner, stride, offset;
    bool transposed;
    int64_t size() const { return outer * inner; }

    // f(index among the kernels' numbers, index in the tensor), in blocks that stay in cache.
    template <class F>
    void each(F f) const {
        if (!transposed) {
            for (int64_t i = 0; i < outer; ++i)
                for (int64_t j = 0; j < inner; ++j) f(i * inner + j, offset + i * stride + j);
            return;
        }
        constexpr int64_t kTile = 16;
        for (int64_t i0 = 0; i0 < outer; i0 += kTile)
            for (int64_t j0 = 0; j0 < inner; j0 += kTile)
                for (int64_t i = i0; i < std::min(outer, i0 + kTile); ++i)
                    for (int64_t j = j0; j < std::min(inner, j0 + kTile); ++j)
                        f(j * outer + i, offset + i * stride + j);
    }
};
// A panel's rows are channels x height, its columns channels x width, its plane height x width of the sample's.
Place rows_place(const AxisShape& shape, AxisPanel panel) {
    return {panel.channels, panel.height, shape.height, panel.channels_last ? panel.first : panel.first * shape.height,
            panel.channels_last};
}
Place columns_place(const AxisShape& shape, AxisPanel panel) {
    return {panel.channels, shape.width, shape.width, panel.channels_last ? 0 : panel.first * shape.width,
            panel.channels_last};
}
Place plane_place(const AxisShape& shape, AxisPanel panel) {
    return {panel.height, shape.width, shape.width, panel.channels_last ? panel.first * shape.width : 0, false};
}

// One pool of the whole batch: its tensor (batch, 2 or 1, numbers of a sample), in it the maxima and then the means.
template <class T>
struct PoolTensor {
    Tensor pool, index;
    T* values;
    int32_t* tags;
    int64_t numbers, length;  // of a sample; along the pooled axis
    bool maxima;

    PoolTensor(const Tensor& pool, const Tensor& index, int64_t numbers, int64_t length, bool maxima)
        : pool(in_order(pool)),
          index(in_order(index)),
          values(static_cast<T*>(this->pool.data_ptr())),
          tags(static_cast<int32_t*>(this->index.data_ptr())),
          numbers(numbers),
          length(length),
          maxima(maxima) {}
    T* peaks(int64_t b) const { return values + b * 2 * numbers; }
    T* means(int64_t b) const { return values + (maxima ? b * 2 + 1 : b) * numbers; }
};

// Room for one pool of a panel, as the kernels write it.
template <class A>
struct PoolRoom {
    std::vector<A> sum, peak;
    std::vector<int32_t> tag;
    PoolRoom(int64_t n, bool maxima) : sum(n), peak(maxima ? n : 0), tag(maxima ? n : 0) {}
    AxisPool<A> pool() {
        const bool maxima = !peak.empty();
        return {sum.data(), maxima ? peak.data() : nullptr, maxima ? tag.data() : nullptr};
    }
    template <class T>
    void write(const PoolTensor<T>& to, int64_t b, Place place) const {
        T* means = to.means(b);
        const double length = static_cast<double>(to.length);
        place.each([&](int64_t from, int64_t at) { means[at] = static_cast<T>(static_cast<A>(sum[from] / length)); });
        if (!to.maxima) return;
        T* peaks = to.peaks(b);
        int32_t* tags = to.tags + b * to.numbers;
        place.each([&](int64_t from, int64_t at) { peaks[at] = static_cast<T>(peak[from]), tags[at] = tag[from]; });
    }
    // The same places of the next piece, behind this one along the pooled axis.
    void merge(const PoolRoom& next, bool even) {
        for (size_t i = 0; i < sum.size(); ++i) sum[i] = static_cast<A>(static_cast<double>(sum[i]) + next.sum[i]);
        for (size_t i = 0; i < peak.size(); ++i) {
            if (next.peak[i] > peak[i] || (std::isnan(next.peak[i]) && !std::isnan(peak[i]))) {
                peak[i] = next.peak[i];
                tag[i] = next.tag[i];
            } else if (even && next.peak[i] == peak[i]) {
                tag[i] += next.tag[i];
            }
        }
    }
};

// What the elements of a panel receive of one pool, as the kernels read it.
template <class A>
struct GradRoom {
    std::vector<A> mean, value, peak;
    std::vector<int32_t> tag;
    AxisGrad<A> grad() const {
        auto data = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
        return {data(mean), data(value), data(peak), data(tag)};
    }
    // grads: the gradient of the pool's tensor, null: none.
    template <class T>
    void read(const T* grads, const PoolTensor<T>& pool, int64_t b, Place place, bool even) {
        const int64_t n = place.size() + kAxisSlack;
        mean.assign(n, A(0));
        if (grads) {
            const T* means = grads + (pool.maxima ? b * 2 + 1 : b) * pool.numbers;
            const A length = static_cast<A>(pool.length);
            place.each([&](int64_t to, int64_t at) { mean[to] = static_cast<A>(means[at]) / length; });
        }
        if (!pool.maxima) return;
        value.assign(n, A(0));
        tag.assign(n, 0);
        const int32_t* tags = pool.tags + b * pool.numbers;
        place.each([&](int64_t to, int64_t at) { tag[to] = tags[at]; });
        if (grads) {
            const T* maxima = grads + b * 2 * pool.numbers;
            place.each([&](int64_t to, int64_t at) { value[to] = static_cast<A>(maxima[at]); });
        }
        if (!even) return;
        peak.assign(n, A(0));
        const T* peaks = pool.peaks(b);
        place.each([&](int64_t to, int64_t at) { peak[to] = static_cast<A>(peaks[at]); });
        if (grads) share_among_equals(value.data(), peak.data(), tag.data(), place.size(), value.data(), mean.data());
    }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> axis_pool(const Tensor& x_in, int64_t maxima,
                                                                     int64_t channels, int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x = dense_map(x_in);
        const AxisShape shape(x);
        const auto [batch, depth, height, width] =
            std::make_tuple(shape.batch, shape.channels, shape.height, shape.width);
        auto make = [&](bool wanted, std::vector<int64_t> sizes, ScalarType dtype) {
            return wanted ? empty_tensor(sizes, dtype) : empty_tensor({0}, dtype);
        };
        auto index = [&](bool wanted, std::vector<int64_t> sizes) { return make(wanted, sizes, ScalarType::Int); };
        using Sizes = std::vector<int64_t>;
        Tensor rows =
            make(true, maxima ? Sizes{batch, 2, depth, height} : Sizes{batch, depth, height, 1}, x.scalar_type());
        Tensor columns =
            make(true, maxima ? Sizes{batch, 2, depth, width} : Sizes{batch, depth, 1, width}, x.scalar_type());
        Tensor plane = make(channels, {batch, 2, height, width}, x.scalar_type());
        Tensor row_index = index(maxima, {batch, depth, height}), column_index = index(maxima, {batch, depth, width});
        Tensor plane_index = index(channels, {batch, height, width});
        const PoolTensor<T> of_rows(rows, row_index, depth * height, width, maxima);
        const PoolTensor<T> of_columns(columns, column_index, depth * width, height, maxima);
        const PoolTensor<T> of_plane(plane, plane_index, height * width, depth, true);

        const T* data = static_cast<const T*>(x.data_ptr());
        const int64_t pieces = shape.pieces;
        const bool even = ties == kEven, last = shape.channels_last;
        std::vector<PoolRoom<A>> shared(pieces > 1 ? batch * pieces : 0, PoolRoom<A>(0, false));
        parallel(batch * pieces, x.numel(), [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces;
            const AxisPanel panel = shape.panel(piece);
            const Place at_rows = rows_place(shape, panel), at_columns = columns_place(shape, panel);
            const Place at_plane = plane_place(shape, panel);
            PoolRoom<A> room_rows(at_rows.size(), maxima), room_columns(at_columns.size(), maxima);
            PoolRoom<A> room_plane(channels ? at_plane.size() : 0, channels);
            axis_kernels<T>().pool(data + shape.offset(b, piece), panel, even, room_rows.pool(), room_columns.pool(),
                                   channels ? room_plane.pool() : AxisPool<A>{});
            room_rows.write(of_rows, b, at_rows);
            if (pieces > 1) {
                if (!last) room_columns.write(of_columns, b, at_columns);
                if (last && channels) room_plane.write(of_plane, b, at_plane);
                shared[unit] = std::move(last ? room_columns : room_plane);
            } else {
                room_columns.write(of_columns, b, at_columns);
                if (channels) room_plane.write(of_plane, b, at_plane);
            }
        });
        if (pieces > 1 && (last || channels))
            parallel(batch, x.numel(), [&](int64_t b) {
                PoolRoom<A>& all = shared[b * pieces];
                for (int64_t piece = 1; piece < pieces; ++piece) all.merge(shared[b * pieces + piece], even);
                const AxisPanel panel = shape.panel(0);
                all.write(last ? of_columns : of_plane, b,
                          last ? columns_place(shape, panel) : plane_place(shape, panel));
            });
        return std::make_tuple(rows, columns, plane, row_index, column_index, plane_index);
    });
}

Tensor axis_pool_backward(const OptionalTensor& grad_in, const OptionalTensor& grad_rows,
                          const OptionalTensor& grad_columns, const OptionalTensor& grad_plane, const Tensor& x_in,
                          const Tensor& rows, const Tensor& columns, const Tensor& plane, const Tensor& row_index,
                          const Tensor& column_index, const Tensor& plane_index, int64_t maxima, int64_t channels,
                          int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x = dense_map(x_in);
        const AxisShape shape(x);
        Tensor grad_x = empty_map<T>(x);
        const OptionalTensor grad = grad_in ? OptionalTensor(in_layout_of<T>(x, *grad_in)) : grad_in;
        auto dense = [&](const OptionalTensor& small) {
            if (!small) return small;
            STD_TORCH_CHECK(small->scalar_type() == x.scalar_type(), "fused_attn: expected gradients of x's dtype");
            return OptionalTensor(in_order(*small));
        };
        const OptionalTensor to_rows = dense(grad_rows), to_columns = dense(grad_columns);
        const OptionalTensor to_plane = channels ? dense(grad_plane) : OptionalTensor();
        const int64_t depth = shape.channels, height = shape.height, width = shape.width;
        const PoolTensor<T> of_rows(rows, row_index, depth * height, width, maxima);
        const PoolTensor<T> of_columns(columns, column_index, depth * width, height, maxima);
        const PoolTensor<T> of_plane(plane, plane_index, height * width, depth, true);

        const T *data = static_cast<const T*>(x.data_ptr()), *above = pointer<T>(grad);
        T* out = static_cast<T*>(grad_x.data_ptr());
        const int64_t pieces = shape.pieces;
        const bool even = ties == kEven;
        parallel(shape.batch * pieces, x.numel(), [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, at = shape.offset(b, piece);
            const AxisPanel panel = shape.panel(piece);
            GradRoom<A> room_rows, room_columns, room_plane;
            room_rows.read(pointer<T>(to_rows), of_rows, b, rows_place(shape, panel), even);
            room_columns.read(pointer<T>(to_columns), of_columns, b, columns_place(shape, panel), even);
            if (to_plane) room_plane.read(pointer<T>(to_plane), of_plane, b, plane_place(shape, panel), even);
            axis_kernels<T>().spread(above ? above + at : nullptr, data + at, panel, room_rows.grad(),
                                     room_columns.grad(), room_plane.grad(), out + at);
        });
        return grad_x;
    });
}

}  // namespace fused_attn::cpu
