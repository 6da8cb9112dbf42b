// Forward: one sweep over the logits computes weights relative to the running maximum; a second pass normalises them
// while they are in the cache. The hard variant needs the argmax only.
#include "cpu/gumbel_sweep.h"

namespace dk::DK_ISA {
namespace {

Cut forward_cut(const GumbelSoftmaxArgs& a) { return a.hard ? Cut(a, MAX_WIDTH) : cut_to_cache(a); }

template <class T> struct GumbelForward {
  // One-hot of the argmax; NaN for rows whose softmax is NaN.
  static void put_one_hot(const GumbelSoftmaxArgs& a, const Cut& cut, const Strip& s, const SweepSpace& w) {
    T* y = static_cast<T*>(a.y) + s.memory;
    if (s.lane_step > 1) {
      std::memset(static_cast<void*>(y), 0, s.lanes * s.lane_step * sizeof(T));
    } else {
      for (int64_t r = 0; r < s.rows; ++r)
        std::memset(static_cast<void*>(y + r * s.row_step), 0, s.lanes_in(r) * sizeof(T));
    }
    const auto write = [&](int64_t element, float best, bool nan, int64_t first, int64_t stride) {
      if (!nan && best - best == 0.0f) return from_float(1.0f, y + element);
      for (int64_t i = 0; i < a.classes; ++i) from_float(__builtin_nanf(""), y + first + i * stride);
    };
    float best = -INF;
    int64_t at = 0;
    bool nan = false;
    for (int i = 0; i < s.lanes; ++i) {
      const ArgMax& lane = w.best[i / LANES];
      const float value = lane.best[i % LANES];
      const int64_t element = lane.index[i % LANES] * s.row_step + i * s.lane_step;
      if (!cut.merge) {
        write(element, value, lane.nan[i % LANES], i * s.lane_step, s.row_step);
      } else {
        nan |= lane.nan[i % LANES] != 0;
        if (value > best || (value == best && element < at)) best = value, at = element;
      }
    }
    if (cut.merge) write(at, best, nan, 0, 1);
  }

  static void put_kl(const GumbelSoftmaxArgs& a, const Cut& cut, const Strip& s, StripSoftmax& plain) {
    if (cut.merge) plain.merge_lanes(LOG2E);
    const double log_classes = __builtin_log(static_cast<double>(a.classes));
    for (int i = 0; i < (cut.merge ? 1 : s.lanes); ++i) {
      const double sum = plain.sum[i];
      a.max[s.stat + i] = plain.maximum[i];
      a.sum[s.stat + i] = plain.sum[i];
      a.kl[s.stat + i] = static_cast<float>(plain.weighted[i] / sum - __builtin_log(sum) + log_classes);
    }
  }

  static void call(const GumbelSoftmaxArgs& a, float* workspace, int64_t begin, int64_t end) {
    const FlushDenormals guard;
    const Cut cut = forward_cut(a);
    Arena arena{workspace};
    SweepSpace w(arena, cut, !a.hard);
    for (int64_t i = begin; i < end; ++i) {
      const Strip s = cut.strip(i);
      Sweep<T>::run(a, cut, s, !a.hard, w);
      if (a.kl) put_kl(a, cut, s, w.plain);
      if (a.hard) {
        put_one_hot(a, cut, s, w);
        continue;
      }
      for (int64_t row = 0; row < s.rows; row += CHUNK_ROWS) {
        const int count = static_cast<int>(s.rows - row < CHUNK_ROWS ? s.rows - row : CHUNK_ROWS);
        Sweep<T>::soft_rows(w, cut.width, row, count, w.x);
        put<T>(w.x, s, row, count, cut.width, a.y);
      }
    }
  }
};

int64_t strips(const GumbelSoftmaxArgs& a) { return forward_cut(a).strips; }
int64_t workspace(const GumbelSoftmaxArgs& a) {
  Arena arena{nullptr};
  SweepSpace(arena, forward_cut(a), !a.hard);
  return arena.used;
}
void run(const GumbelSoftmaxArgs& a, float* workspace, int64_t begin, int64_t end) {
  dispatch<GumbelForward>(a.dtype, a, workspace, begin, end);
}

}   // namespace

extern const GumbelSoftmaxKernel gumbel_softmax;
const GumbelSoftmaxKernel gumbel_softmax = {strips, workspace, run};

}   // namespace dk::DK_ISA
