// Backward: y * (grad - sum y grad) / tau, plus grad_kl * p * (log p + log classes - kl) with p = softmax(logits). Two
// passes over y and grad. The hard variant first recomputes the soft y from the logits, because noise is not stored.
#include "cpu/gumbel_sweep.h"

namespace dk::DK_ISA {
namespace {

constexpr int STREAM_WIDTH = 256;   // lanes of a strip that is streamed twice from memory: longer runs than the sweep's
constexpr int ACROSS_WIDTH = 16;    // with classes_last: few lanes, so that a strip may stay in the cache

Cut backward_cut(const GumbelSoftmaxBackwardArgs& a) {
  if (a.forward.hard) return cut_to_cache(a.forward);
  return Cut(a.forward, a.forward.classes_last ? ACROSS_WIDTH : STREAM_WIDTH);
}

struct BackwardSpace {
  BackwardSpace(Arena& arena, const Cut& cut, bool hard)
      : sweep(arena, cut, hard),
        y(arena.take(CHUNK_ROWS * cut.width)),
        grad(arena.take(CHUNK_ROWS * cut.width)),
        dot(arena.take(2 * cut.width)),
        max(arena.take(cut.width)),
        shift(arena.take(cut.width)),
        kl_scale(arena.take(cut.width)) {}
  SweepSpace sweep;
  float *y, *grad, *dot;           // dot: sum of y * grad, a KahanSum per lane
  float *max, *shift, *kl_scale;   // of the KL gradient: kl_scale * exp(x - max) * (x - max + shift)
};

template <class T> struct GumbelBackward {
  DK_INLINE static void fetch_rows(const GumbelSoftmaxBackwardArgs& a, const Cut& cut, const Strip& s, int64_t row,
                                   int count, BackwardSpace& w) {
    fetch<T>(a.grad_y, s, row, count, cut.width, 0.0f, w.grad);
    if (a.forward.hard) {
      Sweep<T>::soft_rows(w.sweep, cut.width, row, count, w.y);
    } else {
      fetch<T>(a.forward.y, s, row, count, cut.width, 0.0f, w.y);
    }
  }

  static void dot_product(const GumbelSoftmaxBackwardArgs& a, const Cut& cut, const Strip& s, BackwardSpace& w) {
    const int width = cut.width;
    std::memset(w.dot, 0, 2 * width * sizeof(float));
    for (int64_t row = 0; row < s.rows; row += CHUNK_ROWS) {
      const int count = static_cast<int>(s.rows - row < CHUNK_ROWS ? s.rows - row : CHUNK_ROWS);
      fetch_rows(a, cut, s, row, count, w);
      for (int j = 0; j < width; j += LANES) {
        Vec chunk{};
        for (int r = 0; r < count; ++r) chunk += load(w.y + r * width + j) * load(w.grad + r * width + j);
        KahanSum dot = KahanSum::at(w.dot + j, width);
        dot.add(chunk);
        dot.to(w.dot + j, width);
      }
    }
    if (!cut.merge) return;
    double total = 0;
    for (int i = 0; i < width; ++i) total += w.dot[i];
    for (int i = 0; i < width; ++i) w.dot[i] = static_cast<float>(total);
  }

  static void prepare_kl(const GumbelSoftmaxBackwardArgs& a, const Cut& cut, const Strip& s, BackwardSpace& w) {
    const GumbelSoftmaxArgs& f = a.forward;
    const double log_classes = __builtin_log(static_cast<double>(f.classes));
    for (int i = 0; i < cut.width; ++i) {
      const int64_t at = s.stat + (cut.merge || i >= s.lanes ? 0 : i);
      w.max[i] = f.max[at];
      w.shift[i] = static_cast<float>(log_classes - __builtin_log(static_cast<double>(f.sum[at])) - f.kl[at]);
      w.kl_scale[i] = a.grad_kl[at] / f.sum[at];
    }
  }

  static void gradient(const GumbelSoftmaxBackwardArgs& a, const Cut& cut, const Strip& s, BackwardSpace& w) {
    const int width = cut.width;
    const float inverse_tau = 1.0f / *a.forward.tau;
    for (int64_t row = 0; row < s.rows; row += CHUNK_ROWS) {
      const int count = static_cast<int>(s.rows - row < CHUNK_ROWS ? s.rows - row : CHUNK_ROWS);
      fetch_rows(a, cut, s, row, count, w);
      for (int r = 0; r < count; ++r)
        for (int j = 0; j < width; j += LANES) {
          float* g = w.grad + r * width + j;
          store(g, load(w.y + r * width + j) * inverse_tau * (load(g) - load(w.dot + j)));
        }
      if (a.grad_kl) {
        float* x = w.sweep.x;
        fetch<T>(a.forward.logits, s, row, count, width, 0.0f, x);
        for (int r = 0; r < count; ++r)
          for (int j = 0; j < width; j += LANES) {
            float* g = w.grad + r * width + j;
            const Vec d = max(splat(FAR), load(x + r * width + j) - load(w.max + j));
            store(g, load(g) + load(w.kl_scale + j) * exp2(d * LOG2E) * (d + load(w.shift + j)));
          }
      }
      put<T>(w.grad, s, row, count, width, a.grad_logits);
    }
  }

  static void call(const GumbelSoftmaxBackwardArgs& a, float* workspace, int64_t begin, int64_t end) {
    const FlushDenormals guard;
    const Cut cut = backward_cut(a);
    Arena arena{workspace};
    BackwardSpace w(arena, cut, a.forward.hard);
    for (int64_t i = begin; i < end; ++i) {
      const Strip s = cut.strip(i);
      if (a.forward.hard) {
        GumbelSoftmaxArgs soft = a.forward;
        soft.kl = nullptr;   // its statistics are known
        Sweep<T>::run(soft, cut, s, true, w.sweep);
      }
      dot_product(a, cut, s, w);
      if (a.grad_kl) prepare_kl(a, cut, s, w);
      gradient(a, cut, s, w);
    }
  }
};

int64_t strips(const GumbelSoftmaxBackwardArgs& a) { return backward_cut(a).strips; }
int64_t workspace(const GumbelSoftmaxBackwardArgs& a) {
  Arena arena{nullptr};
  BackwardSpace(arena, backward_cut(a), a.forward.hard);
  return arena.used;
}
void run(const GumbelSoftmaxBackwardArgs& a, float* workspace, int64_t begin, int64_t end) {
  dispatch<GumbelBackward>(a.forward.dtype, a, workspace, begin, end);
}

}   // namespace

extern const GumbelSoftmaxBackwardKernel gumbel_softmax_backward;
const GumbelSoftmaxBackwardKernel gumbel_softmax_backward = {strips, workspace, run};

}   // namespace dk::DK_ISA
