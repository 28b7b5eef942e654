// select: reads the M branches twice, for the means of their sum and for y, and writes y. select_backward: reads grad
// and the branches for the dots, then grad (and, with a prologue, the branches), and writes the branches' gradients. A
// thread takes whole samples, a few at a time where the weights are large, so that the second read comes from cache.
// Too few samples: pieces, phase by phase. select_squeeze, select_sum, select_dots and select_gradients are the phases
// by themselves.
#include "excitation.h"
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Whether each sample lies as (C, *spatial).
bool is_nchw(const Tensor& u) {
    int64_t expected = 1;
    for (int64_t axis = u.dim() - 1; axis > 0; --axis) {
        if (u.size(axis) == 1) continue;
        if (u.stride(axis) != expected) return false;
        expected *= u.size(axis);
    }
    return true;
}
// The distance between positions where each sample lies as (*spatial, C), its positions C or more apart; else 0.
int64_t pixel_pitch(const Tensor& u) {
    if (u.size(1) != 1 && u.stride(1) != 1) return 0;
    int64_t pitch = 0, expected = 0;
    for (int64_t axis = u.dim() - 1; axis > 1; --axis) {
        if (u.size(axis) == 1) continue;
        if (pitch == 0) pitch = expected = std::max<int64_t>(u.stride(axis), 0);
        if (pitch < u.size(1) || u.stride(axis) != expected) return 0;
        expected *= u.size(axis);
    }
    return pitch;
}

template <class T>
Tensor empty_of(const Tensor& like, const std::vector<int64_t>& shape) {
    Tensor out = empty_tensor(shape, like.scalar_type());
    prefer_huge_pages(out, sizeof(T));
    return out;
}
Tensor axis_moved(Tensor tensor, int64_t from, int64_t to) {
    for (int64_t axis = from; axis > to; --axis) tensor = torch::stable::transpose(tensor, axis - 1, axis);
    return tensor;
}

// The branches as they are read: views, or NCHW copies where they are not all NCHW or all channels_last.
template <class T>
class BranchMaps {
  public:
    BranchMaps(const std::vector<Tensor>& branches, int64_t paths) : tensors_(branches), paths_(paths) {
        STD_TORCH_CHECK(paths >= 1 && paths <= kMostBranches, "fused_attn: select holds 1 to 8 branches, got ", paths);
        take_views();
        const bool nchw = views_[0].numel() == 0 || all(is_nchw);
        channels_last = !nchw && all([](const Tensor& u) { return pixel_pitch(u) > 0; });
        if (nchw || channels_last) return;
        for (Tensor& tensor : tensors_) tensor = torch::stable::contiguous(tensor);
        take_views();
    }
    const Tensor& first() const { return views_[0]; }
    const std::vector<Tensor>& views() const { return views_; }
    int64_t count() const { return paths_; }
    bool channels_last;

    Tensor empty_sum() const {
        const Tensor& u = views_[0];
        std::vector<int64_t> shape(u.sizes().begin(), u.sizes().end());
        if (!channels_last) return empty_of<T>(u, shape);
        if (is_dense_channels_last(u)) return empty_map<T>(u);
        std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
        // Like the view, and none itself: autograd refuses to write into a view that a node returned.
        return empty_map<T>(axis_moved(empty_tensor(shape, u.scalar_type()), u.dim() - 1, 1));
    }
    // As many as there are inputs. A stacked one is (B, M, C, ..) in memory, or (B, M, .., C), or (B, .., M, C) where
    // the branches share their pixels.
    std::vector<Tensor> empty_gradients() const {
        std::vector<Tensor> out;
        for (int64_t m = 0; is_separate() && m < paths_; ++m) out.push_back(empty_sum());
        if (is_separate()) return out;
        const Tensor& stacked = tensors_[0];
        const int64_t last = stacked.dim() - 1;
        const bool share = channels_last && stacked.stride(1) < pixel_pitch(views_[0]);
        std::vector<int64_t> shape(stacked.sizes().begin(), stacked.sizes().end());
        if (channels_last) std::rotate(shape.begin() + (share ? 1 : 2), shape.begin() + 3, shape.end());
        Tensor grads = empty_of<T>(stacked, shape);
        if (share) grads = axis_moved(grads, last - 1, 1);
        return {channels_last ? axis_moved(grads, last, 2) : grads};
    }
    // `other` in the layout of the sum: itself where it has it, else one copy.
    Tensor as_sum(const Tensor& other) const {
        const bool same = other.numel() == 0 || (channels_last ? is_dense_channels_last(other) : other.is_contiguous());
        if (same) return other;
        Tensor copy = empty_sum();
        torch::stable::copy_(copy, other);
        return copy;
    }

  private:
    static bool is_dense_channels_last(const Tensor& map) {
        return pixel_pitch(map) == map.size(1) && is_dense_batch(map);
    }
    bool is_separate() const { return static_cast<int64_t>(tensors_.size()) == paths_; }
    void take_views() {
        views_ = tensors_;
        if (is_separate()) return;
        views_.clear();
        for (int64_t m = 0; m < paths_; ++m) views_.push_back(torch::stable::select(tensors_[0], 1, m));
    }
    template <class F>
    bool all(F f) const {
        return std::all_of(views_.begin(), views_.end(), f);
    }
    static bool is_dense_batch(const Tensor& u) { return u.size(0) == 1 || u.stride(0) * u.size(0) == u.numel(); }

    std::vector<Tensor> tensors_, views_;
    int64_t paths_;
};

// What lies where in the branches, and the calls of the kernels by sample and piece.
template <class T>
class Selection {
  public:
    using A = Accumulator<T>;
    Selection(const std::vector<Tensor>& branches, int64_t paths, const OptionalTensor& affine_weight,
              const OptionalTensor& affine_bias, int64_t pre_activation)
        : maps(branches, paths),
          x(layout(maps)),
          elements(x.batch * x.sample_size() * paths),
          pieces(pieces_of(x.batch, x.axis_length(), elements)),
          affine_(affine_weight, affine_bias) {
        wide_ = x;
        wide_.channels *= paths;
        branches_.count = paths, branches_.apart = x.channels;
        branches_.prologue = affine_.prologue(pre_activation);
        for (int64_t m = 0; m < paths; ++m) {
            branches_.data[m] = static_cast<const T*>(maps.views()[m].data_ptr());
            places_[m] = place(maps.views()[m]);
            branches_.pitch[m] = places_[m].pitch;
        }
    }

    const BranchMaps<T> maps;
    const MapView<T> x;  // the shape of a branch, and how samples are cut; its data are branch 0's
    const int64_t elements, pieces;

    // One number a branch and channel, or a channel.
    PieceValues<double> sums(bool of_branches, bool wanted = true) const {
        return PieceValues<double>(of_branches ? wide_ : x, pieces, 0.0, wanted);
    }
    int64_t units() const { return x.batch * pieces; }

    void pool(int64_t b, int64_t piece, PieceValues<double>& sum) const {
        select_kernels<T>().pool(at(b, piece), x.panel(piece, pieces), sum.piece(b, piece, channel(piece)));
    }
    // weights: (M, C) of this sample.
    void sum(int64_t b, int64_t piece, const A* weights, T* y) const {
        select_kernels<T>().sum(at(b, piece), x.panel(piece, pieces), weights + channel(piece), past_cache(1),
                                y + x.offset(b, piece, pieces));
    }
    void dot(int64_t b, int64_t piece, const T* grad, PieceValues<double>& dots) const {
        select_kernels<T>().dot(grad + x.offset(b, piece, pieces), at(b, piece), x.panel(piece, pieces),
                                dots.piece(b, piece, channel(piece)));
    }

    // The second pass of a backward, and what it writes.
    class Gradients {
      public:
        Gradients(const Selection& selection, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias)
            : grads(selection.maps.empty_gradients()),
              selection_(selection),
              like_weight_(affine_weight),
              like_bias_(affine_bias),
              weight_(selection.sums(true, affine_weight.has_value())),
              bias_(weight_) {
            const int64_t paths = selection.maps.count();
            for (int64_t m = 0; m < paths; ++m) {
                const Tensor view =
                    static_cast<int64_t>(grads.size()) == paths ? grads[m] : torch::stable::select(grads[0], 1, m);
                data_[m] = static_cast<T*>(view.data_ptr());
                places_[m] = selection.place(view);
            }
        }
        // weights and mean, what the means of the sum pass on: of this sample.
        void write(int64_t b, int64_t piece, const T* grad, const A* weights, const A* mean) {
            const MapView<T>& x = selection_.x;
            const int64_t c = selection_.channel(piece);
            BranchOutputs<T> out;
            for (int64_t m = 0; m < selection_.maps.count(); ++m) {
                out.data[m] = data_[m] + selection_.offset(places_[m], b, piece);
                out.pitch[m] = places_[m].pitch;
            }
            select_kernels<T>().spread(grad + x.offset(b, piece, selection_.pieces), selection_.at(b, piece),
                                       x.panel(piece, selection_.pieces), weights + c, mean + c,
                                       selection_.past_cache(selection_.maps.count()), out,
                                       like_weight_ ? weight_.piece(b, piece, c) : nullptr,
                                       like_weight_ ? bias_.piece(b, piece, c) : nullptr);
        }
        std::array<Tensor, 2> affine() {
            const MapView<T>& x = selection_.x;
            if (like_weight_)
                for (int64_t b = 0; b < x.batch; ++b) weight_.merge(b), bias_.merge(b);
            auto sum = [&](PieceValues<double>& values) {
                return [&](A* to) { batch_sum(values, x.batch, x.channels * selection_.maps.count(), to); };
            };
            return {gradient_like<A>(like_weight_, selection_.maps.first(), sum(weight_)),
                    gradient_like<A>(like_bias_, selection_.maps.first(), sum(bias_))};
        }
        const std::vector<Tensor> grads;

      private:
        const Selection& selection_;
        OptionalTensor like_weight_, like_bias_;
        PieceValues<double> weight_, bias_;
        T* data_[kMostBranches];
        typename Selection::Place places_[kMostBranches];
    };

  private:
    struct Place {
        int64_t sample, pitch;
    };
    static MapView<T> layout(const BranchMaps<T>& maps) {
        MapView<T> x(maps.first());
        x.channels_last = maps.channels_last || x.positions == 1;
        return x;
    }
    Place place(const Tensor& u) const {
        if (!x.channels_last) return {u.stride(0), x.positions};
        return {u.stride(0), x.positions == 1 ? x.channels : pixel_pitch(u)};
    }
    // Whether so many maps are more than the caches hold.
    bool past_cache(int64_t maps) const {
        constexpr int64_t kCached = 16 << 20;
        return maps * x.batch * x.sample_size() * int64_t(sizeof(T)) >= kCached;
    }
    int64_t channel(int64_t piece) const { return x.first_channel(piece, pieces); }
    int64_t offset(const Place& place, int64_t b, int64_t piece) const {
        return b * place.sample + x.begin(piece, pieces) * place.pitch;
    }
    Branches<T> at(int64_t b, int64_t piece) const {
        Branches<T> out = branches_;
        out.prologue = branches_.prologue.from(channel(piece));
        for (int64_t m = 0; m < out.count; ++m) out.data[m] += offset(places_[m], b, piece);
        return out;
    }

    AffineValues<A> affine_;
    MapView<T> wide_ = x;
    Branches<T> branches_;
    Place places_[kMostBranches];
};

// A dense layer in groups: the rows of each take its own columns.
template <class A>
class GroupedLayer {
  public:
    GroupedLayer(const Tensor& weight, const OptionalTensor& bias, int64_t groups)
        : like_weight_(weight),
          like_bias_(bias),
          weight_(weight),
          bias_(bias),
          groups_(groups),
          rows_(weight.size(0) / groups),
          columns_(weight.size(1)) {}
    int64_t outputs() const { return groups_ * rows_; }
    int64_t inputs() const { return groups_ * columns_; }
    int64_t weight_count() const { return groups_ * rows_ * columns_; }

    void forward(int64_t samples, const A* in, int64_t in_stride, A* out, int64_t out_stride) const {
        for (int64_t g = 0; g < groups_; ++g)
            dense_kernels<A>().forward(weight(g), from(bias_.data(), g * rows_), rows_, columns_, samples,
                                       in + g * columns_, in_stride, out + g * rows_, out_stride);
    }
    void backward(int64_t samples, const A* grad, A* grad_in) const {
        for (int64_t g = 0; g < groups_; ++g)
            dense_kernels<A>().transposed(weight(g), rows_, columns_, samples, grad + g * rows_, outputs(),
                                          grad_in + g * columns_, inputs());
    }
    // Of weight and bias: sums over the batch in order, rows of the weight on torch's threads.
    std::array<Tensor, 2> gradients(const Tensor& x, int64_t batch, const A* grad, const A* in,
                                    int64_t in_stride) const {
        auto weights = [&](A* to) {
            for (int64_t g = 0; g < groups_; ++g)
                matrix_gradient(grad + g * rows_, outputs(), rows_, in + g * columns_, in_stride, batch, columns_,
                                to + g * rows_ * columns_);
        };
        auto biases = [&](A* to) { row_sum(grad, outputs(), batch, to); };
        return {gradient_like<A>(like_weight_, x, weights), gradient_like<A>(like_bias_, x, biases)};
    }

  private:
    const A* weight(int64_t group) const { return weight_.data() + group * rows_ * columns_; }

    OptionalTensor like_weight_, like_bias_;
    Values<A> weight_, bias_;
    int64_t groups_, rows_, columns_;
};

// The branch weights between the passes, on rows of `state`: [means (C) | hidden logits (H) | weights (M, C)]. The
// second layer's logits are (groups, M, C / groups).
template <class T>
class BranchWeights {
  public:
    using A = Accumulator<T>;
    BranchWeights(const MapView<T>& x, int64_t paths, const Tensor& weight1, const OptionalTensor& bias1,
                  const Tensor& weight2, const OptionalTensor& bias2, int64_t groups, int64_t activation, int64_t gate)
        : first_(weight1, bias1, groups),
          second_(weight2, bias2, groups),
          batch_(x.batch),
          channels_(x.channels),
          positions_(x.positions),
          paths_(paths),
          groups_(groups),
          hidden_(first_.outputs()),
          width_((paths + 1) * channels_ + hidden_),
          sample_bytes_(x.sample_size() * int64_t(sizeof(T))),
          activation_(static_cast<int>(activation)),
          gate_(gate) {}

    Tensor empty() const { return empty_tensor({batch_, width_}, kScalarType<A>); }
    void use(const Tensor& state) {
        state_ = in_order(state);
        rows_ = static_cast<A*>(state_->data_ptr());
    }
    // (M, C) of a sample.
    const A* of(int64_t b) const { return rows_ + b * width_ + channels_ + hidden_; }
    const A* mean(int64_t b) const { return &mean_[b * channels_]; }

    // Samples that share one read of the weights, as in a channel gate.
    int64_t group(int64_t maps) const {
        return samples_a_read((first_.weight_count() + second_.weight_count()) * sizeof(A), maps * sample_bytes_,
                              batch_);
    }

    void excite(int64_t first, int64_t samples, PieceValues<double>& sums) {
        A *row = rows_ + first * width_, *hidden_logits = row + channels_;
        for (int64_t b = first; b < first + samples; ++b) {
            sums.merge(b);
            for (int64_t c = 0; c < channels_; ++c)
                rows_[b * width_ + c] = static_cast<A>(sums.sample(b)[c] / positions_);
        }
        std::vector<A> hidden(samples * hidden_ + 1), logits(samples * paths_ * channels_ + 1);
        first_.forward(samples, row, width_, hidden_logits, width_);
        activate_hidden(samples, hidden_logits, hidden.data());
        second_.forward(samples, hidden.data(), hidden_, logits.data(), paths_ * channels_);
        for (int64_t s = 0; s < samples; ++s)
            select(&logits[s * paths_ * channels_], rows_ + (first + s) * width_ + channels_ + hidden_);
    }

    void prepare_backward() {
        grad_logits_.resize(batch_ * paths_ * channels_ + 1);
        grad_hidden_.resize(batch_ * hidden_ + 1);
        mean_.resize(batch_ * channels_ + 1);
    }
    // From the gradients of some samples' weights to what the means pass on.
    void excite_backward(int64_t first, int64_t samples, PieceValues<double>& dots) {
        const int64_t logits = paths_ * channels_;
        for (int64_t b = first; b < first + samples; ++b) {
            dots.merge(b);
            select_backward(dots.sample(b), of(b), &grad_logits_[b * logits]);
        }
        A* grad_hidden = &grad_hidden_[first * hidden_];
        second_.backward(samples, &grad_logits_[first * logits], grad_hidden);
        for (int64_t s = 0; s < samples; ++s)
            dense_kernels<A>().activate_grad(grad_hidden + s * hidden_, rows_ + (first + s) * width_ + channels_,
                                             hidden_, activation_, grad_hidden + s * hidden_);
        first_.backward(samples, grad_hidden, &mean_[first * channels_]);
        for (int64_t i = first * channels_; i < (first + samples) * channels_; ++i) mean_[i] /= A(positions_);
    }
    std::array<Tensor, 4> parameter_gradients(const Tensor& x) const {
        std::vector<A> hidden(batch_ * hidden_ + 1);
        activate_hidden(batch_, rows_ + channels_, hidden.data());
        auto [weight2, bias2] = second_.gradients(x, batch_, grad_logits_.data(), hidden.data(), hidden_);
        auto [weight1, bias1] = first_.gradients(x, batch_, grad_hidden_.data(), rows_, width_);
        return {weight1, bias1, weight2, bias2};
    }

  private:
    void activate_hidden(int64_t samples, const A* logits, A* hidden) const {
        for (int64_t s = 0; s < samples; ++s)
            dense_kernels<A>().activate(logits + s * width_, hidden_, activation_, hidden + s * hidden_);
    }
    // Calls body(logit, weight) for the channels of a branch, first to last, where both lie one after another.
    template <class Body>
    void each_run(int64_t m, const Body& body) const {
        const int64_t n = channels_ / groups_;
        for (int64_t g = 0; g < groups_; ++g) body((g * paths_ + m) * n, m * channels_ + g * n, n);
    }
    void select(const A* logits, A* weights) const {
        for (int64_t m = 0; m < paths_; ++m)
            each_run(m, [&](int64_t from, int64_t to, int64_t n) { std::copy_n(logits + from, n, weights + to); });
        if (gate_ == kSelectBySigmoid)
            return dense_kernels<A>().activate(weights, paths_ * channels_, kSigmoid, weights);
        if (paths_ == 2) {  // of the difference, in vectors; an infinite maximum is NaN, as in torch
            A *a = weights, *b = weights + channels_;
            for (int64_t c = 0; c < channels_; ++c) {
                const A most = std::max(a[c], b[c]), difference = (a[c] - most) - (b[c] - most);
                a[c] = difference, b[c] = -difference;
            }
            return dense_kernels<A>().activate(weights, 2 * channels_, kSigmoid, weights);
        }
        for (int64_t c = 0; c < channels_; ++c) {
            A most = weights[c], total = 0;
            for (int64_t m = 1; m < paths_; ++m) most = std::max(most, weights[m * channels_ + c]);
            for (int64_t m = 0; m < paths_; ++m) {
                A& weight = weights[m * channels_ + c];
                weight = std::exp(weight - most);
                total += weight;
            }
            for (int64_t m = 0; m < paths_; ++m) weights[m * channels_ + c] /= total;
        }
    }
    void select_backward(const double* grad, const A* weights, A* grad_logits) const {
        std::vector<double> total(channels_ + 1, 0.0);
        if (gate_ == kSelectBySoftmax)
            for (int64_t i = 0; i < paths_ * channels_; ++i) total[i % channels_] += grad[i] * weights[i];
        for (int64_t m = 0; m < paths_; ++m)
            each_run(m, [&](int64_t to, int64_t from, int64_t n) {
                const double* sum = &total[from - m * channels_];
                for (int64_t i = 0; i < n; ++i) {
                    const double a = weights[from + i];
                    const double slope = gate_ == kSelectBySoftmax ? grad[from + i] - sum[i] : grad[from + i] * (1 - a);
                    grad_logits[to + i] = static_cast<A>(a * slope);
                }
            });
    }

    GroupedLayer<A> first_, second_;
    int64_t batch_, channels_, positions_, paths_, groups_, hidden_, width_, sample_bytes_;
    int activation_;
    int64_t gate_;
    std::optional<Tensor> state_;
    A* rows_ = nullptr;
    std::vector<A> grad_logits_, grad_hidden_, mean_;
};

// Runs first(b, piece) for all, between(first sample, samples), second(b, piece): a few samples at a time, or phase by
// phase where samples are cut into pieces.
template <class First, class Between, class Second>
void in_two_passes(int64_t batch, int64_t pieces, int64_t group, int64_t elements, const First& first,
                   const Between& between, const Second& second) {
    if (pieces > 1) {
        parallel(batch * pieces, elements, [&](int64_t unit) { first(unit / pieces, unit % pieces); });
        between(0, batch);
        parallel(batch * pieces, elements, [&](int64_t unit) { second(unit / pieces, unit % pieces); });
        return;
    }
    parallel(ceil_div(batch, group), elements, [&](int64_t unit) {
        const int64_t begin = unit * group, end = std::min(batch, begin + group);
        for (int64_t b = begin; b < end; ++b) first(b, 0);
        between(begin, end - begin);
        for (int64_t b = end; b-- > begin;) second(b, 0);  // the last sample read is still in cache
    });
}

}  // namespace

Tensor select_squeeze(const std::vector<Tensor>& branches, int64_t paths, const OptionalTensor& affine_weight,
                      const OptionalTensor& affine_bias, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        const MapView<T>& x = selection.x;
        Tensor descriptor = empty_tensor({x.batch, x.channels}, branches[0].scalar_type());
        T* out = static_cast<T*>(descriptor.data_ptr());
        PieceValues<double> sums = selection.sums(false);
        parallel(selection.units(), selection.elements,
                 [&](int64_t unit) { selection.pool(unit / selection.pieces, unit % selection.pieces, sums); });
        for (int64_t b = 0; b < x.batch; ++b) {
            sums.merge(b);
            for (int64_t c = 0; c < x.channels; ++c)
                out[b * x.channels + c] = static_cast<T>(static_cast<Accumulator<T>>(sums.sample(b)[c] / x.positions));
        }
        return descriptor;
    });
}

Tensor select_sum(const std::vector<Tensor>& branches, const Tensor& weights, int64_t paths,
                  const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        const Values<Accumulator<T>> values(weights);
        Tensor y = selection.maps.empty_sum();
        T* out = static_cast<T*>(y.data_ptr());
        parallel(selection.units(), selection.elements, [&](int64_t unit) {
            const int64_t b = unit / selection.pieces;
            selection.sum(b, unit % selection.pieces, values.data() + b * paths * selection.x.channels, out);
        });
        return y;
    });
}

Tensor select_dots(const Tensor& grad_in, const std::vector<Tensor>& branches, int64_t paths,
                   const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        const Tensor grad = selection.maps.as_sum(grad_in);
        const T* from = static_cast<const T*>(grad.data_ptr());
        PieceValues<double> dots = selection.sums(true);
        parallel(selection.units(), selection.elements,
                 [&](int64_t unit) { selection.dot(unit / selection.pieces, unit % selection.pieces, from, dots); });
        const int64_t batch = selection.x.batch, numbers = paths * selection.x.channels;
        Tensor out = empty_tensor({batch, paths, selection.x.channels}, kScalarType<A>);
        A* to = static_cast<A*>(out.data_ptr());
        for (int64_t b = 0; b < batch; ++b) {
            dots.merge(b);
            std::transform(dots.sample(b), dots.sample(b) + numbers, to + b * numbers,
                           [](double v) { return static_cast<A>(v); });
        }
        return out;
    });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> select_gradients(
    const Tensor& grad_in, const std::vector<Tensor>& branches, const Tensor& weights, const Tensor& grad_descriptor,
    int64_t paths, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        const MapView<T>& x = selection.x;
        const Tensor grad = selection.maps.as_sum(grad_in);
        const T* from = static_cast<const T*>(grad.data_ptr());
        const Values<A> values(weights), descriptor(grad_descriptor);
        std::vector<A> mean(x.batch * x.channels + 1);
        for (int64_t i = 0; i < x.batch * x.channels; ++i) mean[i] = descriptor.data()[i] / A(x.positions);
        typename Selection<T>::Gradients gradients(selection, affine_weight, affine_bias);
        parallel(selection.units(), selection.elements, [&](int64_t unit) {
            const int64_t b = unit / selection.pieces;
            gradients.write(b, unit % selection.pieces, from, values.data() + b * paths * x.channels,
                            &mean[b * x.channels]);
        });
        auto [grad_weight, grad_bias] = gradients.affine();
        return std::make_tuple(gradients.grads, grad_weight, grad_bias);
    });
}

std::tuple<Tensor, Tensor> select(const std::vector<Tensor>& branches, const Tensor& weight1,
                                  const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
                                  const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths,
                                  int64_t groups, int64_t activation, int64_t gate, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        BranchWeights<T> weights(selection.x, paths, weight1, bias1, weight2, bias2, groups, activation, gate);
        Tensor state = weights.empty(), y = selection.maps.empty_sum();
        weights.use(state);
        T* out = static_cast<T*>(y.data_ptr());
        PieceValues<double> sums = selection.sums(false);
        in_two_passes(
            selection.x.batch, selection.pieces, weights.group(paths), selection.elements,
            [&](int64_t b, int64_t piece) { selection.pool(b, piece, sums); },
            [&](int64_t first, int64_t samples) { weights.excite(first, samples, sums); },
            [&](int64_t b, int64_t piece) { selection.sum(b, piece, weights.of(b), out); });
        return std::make_tuple(y, state);
    });
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_backward(
    const Tensor& grad_in, const std::vector<Tensor>& branches, const Tensor& state, const Tensor& weight1,
    const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths, int64_t groups,
    int64_t activation, int64_t gate, int64_t pre_activation) {
    return dispatch(branches[0], [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Selection<T> selection(branches, paths, affine_weight, affine_bias, pre_activation);
        const Tensor grad = selection.maps.as_sum(grad_in);
        const T* from = static_cast<const T*>(grad.data_ptr());
        BranchWeights<T> weights(selection.x, paths, weight1, bias1, weight2, bias2, groups, activation, gate);
        weights.use(state);
        weights.prepare_backward();
        typename Selection<T>::Gradients gradients(selection, affine_weight, affine_bias);
        PieceValues<double> dots = selection.sums(true);
        in_two_passes(
            selection.x.batch, selection.pieces, weights.group(paths + 1), selection.elements,
            [&](int64_t b, int64_t piece) { selection.dot(b, piece, from, dots); },
            [&](int64_t first, int64_t samples) { weights.excite_backward(first, samples, dots); },
            [&](int64_t b, int64_t piece) { gradients.write(b, piece, from, weights.of(b), weights.mean(b)); });
        const auto grads = weights.parameter_gradients(grad);
        auto [grad_weight, grad_bias] = gradients.affine();
        return std::make_tuple(gradients.grads, grads[0], grads[1], grads[2], grads[3], grad_weight, grad_bias);
    });
}

}  // namespace fused_attn::cpu
