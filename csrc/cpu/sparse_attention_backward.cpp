// Backward of one (batch, head), tile by tile in plan order; dK and dV are accumulated in that order: no atomics, the same bits whatever the number of
// threads. A tile keeps the weights of all its keys, so they are normalised exactly as in a plain softmax and neither out nor lse is read:
//   P = softmax(S),  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dV = P^T dO,  dQ = dS K * scale,  dK = dS^T Q * scale.
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {

template <int DP> struct BackwardSpace {
  alignas(64) float qt[DP * ROWS], gt[DP * ROWS], dqt[DP * ROWS];   // transposed: Q, dO, dQ
  alignas(64) float q[ROWS * DP], g[ROWS * DP];                     // rows: Q * scale, dO
};

// The keys of one tile: S then P, dP then dS, and where their rows lie.
struct TileKeys {
  float *p, *ds;
  const float** rows;
  float **grad_k, **grad_v;
  int count;

  static int64_t floats(int64_t keys) { return keys * (2 * ROWS + 3 * static_cast<int64_t>(sizeof(float*) / sizeof(float))); }
  TileKeys(float* space, int64_t keys) : p(space), ds(p + keys * ROWS), rows(reinterpret_cast<const float**>(ds + keys * ROWS)), count(0) {
    grad_k = const_cast<float**>(rows + keys);
    grad_v = grad_k + keys;
  }
};

// out[j][DP] += sum_r w[j][r] * x[r][DP] for the 4 rows out[0..3]
template <int DP> DK_INLINE void outer4(const float* w, const float* x, float* const* out) {
  constexpr int WIDE = LANES == 16 && DP % 64 == 0 ? 4 : 2;   // vectors per register block
  for (int d = 0; d < DP; d += WIDE * LANES) {
    Vec acc[4][WIDE] = {};
    for (int r = 0; r < ROWS; ++r) {
      Vec row[WIDE];
      DK_UNROLL for (int i = 0; i < WIDE; ++i) row[i] = load(x + r * DP + d + i * LANES);
      DK_UNROLL for (int j = 0; j < 4; ++j)
        DK_UNROLL for (int i = 0; i < WIDE; ++i) acc[j][i] += row[i] * w[j * ROWS + r];
    }
    DK_UNROLL for (int j = 0; j < 4; ++j)
      DK_UNROLL for (int i = 0; i < WIDE; ++i) {
        float* o = out[j] + d + i * LANES;
        store(o, load(o) + acc[j][i]);
      }
  }
}

// From scores and dP to P and dS, for all keys of the tile.
DK_INLINE void softmax_backward(const TileKeys& keys) {
  for (int r = 0; r < ROWS; r += LANES) {
    Vec most = splat(LOWEST), sum{}, delta{};
    for (int j = 0; j < keys.count; ++j) most = max(most, load(keys.p + j * ROWS + r));
    for (int j = 0; j < keys.count; ++j) {
      const Vec weight = exp(load(keys.p + j * ROWS + r) - most);
      store(keys.p + j * ROWS + r, weight);
      sum += weight;
    }
    sum = max(splat(1.0f), sum);   // it is at least 1 already, or NaN, but for padding rows that see nothing
    for (int j = 0; j < keys.count; ++j) {
      const Vec weight = load(keys.p + j * ROWS + r) / sum;
      store(keys.p + j * ROWS + r, weight);
      delta += weight * load(keys.ds + j * ROWS + r);
    }
    for (int j = 0; j < keys.count; ++j) {
      const int at = j * ROWS + r;
      store(keys.ds + at, load(keys.p + at) * (load(keys.ds + at) - delta));
    }
  }
}

template <class T, int DP> struct Backward {
  static constexpr int64_t SPACE = (sizeof(BackwardSpace<DP>) + 63) / 64 * 16;

  static void prepare_tile(const SparseAttentionBackwardArgs& a, const int32_t* rows, const T* q, const T* g, BackwardSpace<DP>& w) {
    const SparseAttentionArgs& f = a.forward;
    for (int r = 0; r < ROWS; ++r) {
      float *qr = w.q + r * DP, *gr = w.g + r * DP;
      if (rows[r] < 0) {
        std::memset(qr, 0, DP * 4);
        std::memset(gr, 0, DP * 4);
      } else {
        fetch_row<T, DP>(q, f.q_strides.token, rows[r], f.head_dim, qr);
        fetch_row<T, DP>(g, a.grad_out_strides.token, rows[r], f.head_dim, gr);
      }
      for (int d = 0; d < DP; ++d) {
        w.qt[d * ROWS + r] = qr[d];
        w.gt[d * ROWS + r] = gr[d];
        qr[d] *= f.scale;
      }
    }
    std::memset(w.dqt, 0, sizeof(w.dqt));
  }

  static void call(const SparseAttentionBackwardArgs& a, float* workspace, int64_t bh) {
    const FlushDenormals guard;
    const SparseAttentionArgs& f = a.forward;
    const Plan plan(f.plan);
    const int64_t b = bh / f.heads, h = bh % f.heads, matrix = f.n * DP;
    const auto at = [&](const void* p, const Strides& s) { return static_cast<const T*>(p) + b * s.batch + h * s.head; };
    const auto mutable_at = [&](void* p, const Strides& s) { return static_cast<T*>(p) + b * s.batch + h * s.head; };
    auto& w = *reinterpret_cast<BackwardSpace<DP>*>(workspace);
    float *grad_k = workspace + SPACE, *grad_v = grad_k + matrix, *copy = grad_v + matrix;
    const FloatRows k = float_rows<T, DP>(at(f.k, f.k_strides), f.k_strides.token, f.n, f.head_dim, copy);
    const FloatRows v = float_rows<T, DP>(at(f.v, f.v_strides), f.v_strides.token, f.n, f.head_dim, copy + matrix);
    TileKeys keys(copy + 2 * matrix, plan[Plan::MOST_COLUMNS]);
    std::memset(grad_k, 0, 2 * matrix * sizeof(float));

    for (int64_t t = 0; t < plan.tiles(); ++t) {
      const int32_t* rows = plan.rows(t);
      prepare_tile(a, rows, at(f.q, f.q_strides), at(a.grad_out, a.grad_out_strides), w);
      keys.count = 0;
      for_each_group(plan, t, [&](const int32_t* tokens, const uint32_t* mask) {
        const float* values[GROUP_COLUMNS];
        for (int j = 0; j < GROUP_COLUMNS; ++j) {
          keys.rows[keys.count + j] = k.row(tokens[j]);
          values[j] = v.row(tokens[j]);
          keys.grad_k[keys.count + j] = grad_k + tokens[j] * DP;
          keys.grad_v[keys.count + j] = grad_v + tokens[j] * DP;
        }
        float *p = keys.p + keys.count * ROWS, *ds = keys.ds + keys.count * ROWS;
        products<DP>(w.qt, keys.rows + keys.count, f.scale, p);
        products<DP>(w.gt, values, 1.0f, ds);
        if (mask) {
          apply_mask(mask, -INF, p);
          apply_mask(mask, 0.0f, ds);
        }
        keys.count += GROUP_COLUMNS;
      });
      softmax_backward(keys);
      accumulate<DP>(keys.ds, keys.rows, keys.count, w.dqt);
      for (int j = 0; j < keys.count; j += 4) {
        outer4<DP>(keys.p + j * ROWS, w.g, keys.grad_v + j);
        outer4<DP>(keys.ds + j * ROWS, w.q, keys.grad_k + j);
      }
      unpack_transposed<T, DP>(w.dqt, rows, f.head_dim, f.scale, mutable_at(a.grad_q, a.grad_q_strides), a.grad_q_strides.token);
    }
    for (int64_t i = 0; i < f.n; ++i) {
      store_row(grad_k + i * DP, mutable_at(a.grad_k, a.grad_k_strides) + i * a.grad_k_strides.token, f.head_dim);
      store_row(grad_v + i * DP, mutable_at(a.grad_v, a.grad_v_strides) + i * a.grad_v_strides.token, f.head_dim);
    }
  }
};

template <class T, int DP> struct BackwardWorkspace {
  static int64_t call(const SparseAttentionBackwardArgs& a) {
    return Backward<T, DP>::SPACE + 4 * a.forward.n * DP + TileKeys::floats(Plan(a.forward.plan)[Plan::MOST_COLUMNS]);
  }
};

static int64_t workspace(const SparseAttentionBackwardArgs& a) { return dispatch<BackwardWorkspace>(a.forward.dtype, a.forward.head_dim, a); }
static void run(const SparseAttentionBackwardArgs& a, float* workspace, int64_t bh) {
  dispatch<Backward>(a.forward.dtype, a.forward.head_dim, a, workspace, bh);
}

extern const SparseAttentionBackwardKernel sparse_attention_backward;
const SparseAttentionBackwardKernel sparse_attention_backward = {workspace, run};

}  // namespace dk::DK_ISA
