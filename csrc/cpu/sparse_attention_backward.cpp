// Backward of one (batch, head): scores are recomputed from lse, tile by tile in plan order, and dK, dV are accumulated in that order: no atomics,
// the same bits whatever the number of threads. With P = exp(S - lse):  dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = dS K,  dK = dS^T Q.
#include "cpu/attention_tile.h"

namespace dk::DK_ISA {

template <int DP> struct BackwardSpace {
  alignas(64) float qt[DP * ROWS], gt[DP * ROWS], dqt[DP * ROWS];   // transposed: Q * scale * log2(e), dO, dQ
  alignas(64) float q[ROWS * DP], g[ROWS * DP];                     // rows: Q * scale, dO
  alignas(64) float p[CHUNK * ROWS], ds[CHUNK * ROWS], lse2[ROWS], delta[ROWS];
  const float *keys[CHUNK], *values[CHUNK];
  float *grad_keys[CHUNK], *grad_values[CHUNK];
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

template <class T, int DP> struct Backward {
  static constexpr int64_t SPACE = (sizeof(BackwardSpace<DP>) + 63) / 64 * 16;

  static void prepare_tile(const SparseAttentionBackwardArgs& a, const int32_t* rows, const T* q, const T* out, const T* g, const float* lse,
                           BackwardSpace<DP>& w) {
    const SparseAttentionArgs& f = a.forward;
    float o[DP];
    for (int r = 0; r < ROWS; ++r) {
      float *qr = w.q + r * DP, *gr = w.g + r * DP;
      w.delta[r] = w.lse2[r] = 0.0f;
      if (rows[r] < 0) {
        std::memset(qr, 0, DP * 4);
        std::memset(gr, 0, DP * 4);
      } else {
        fetch_row<T, DP>(q, f.q_strides.token, rows[r], f.head_dim, qr);
        fetch_row<T, DP>(g, a.grad_out_strides.token, rows[r], f.head_dim, gr);
        fetch_row<T, DP>(out, f.out_strides.token, rows[r], f.head_dim, o);
        Vec sum{};
        for (int d = 0; d < DP; d += LANES) {
          sum += load(o + d) * load(gr + d);
          store(qr + d, load(qr + d) * f.scale);
        }
        w.delta[r] = reduce_add(sum);
        w.lse2[r] = lse[rows[r]] * LOG2E;
      }
      for (int d = 0; d < DP; ++d) {
        w.qt[d * ROWS + r] = qr[d] * LOG2E;
        w.gt[d * ROWS + r] = gr[d];
      }
    }
    std::memset(w.dqt, 0, sizeof(w.dqt));
  }

  // p = exp2(S - lse), ds = p * (dP - delta); exactly zero where the mask forbids
  static void weights(const uint32_t* mask, float* p, float* ds, const BackwardSpace<DP>& w) {
    for (int j = 0; j < GROUP_COLUMNS; ++j)
      for (int r = 0; r < ROWS; r += LANES) {
        const int at = j * ROWS + r;
        Vec weight = exp2(load(p + at) - load(w.lse2 + r));
        Vec grad = (load(ds + at) - load(w.delta + r)) * weight;
        if (mask) {
          weight = select(mask[j] >> r, weight, Vec{});
          grad = select(mask[j] >> r, grad, Vec{});
        }
        store(p + at, weight);
        store(ds + at, grad);
      }
  }

  static void absorb_chunk(BackwardSpace<DP>& w, int count) {
    accumulate<DP>(w.ds, w.keys, count, w.dqt);
    for (int j = 0; j < count; j += 4) {
      outer4<DP>(w.p + j * ROWS, w.g, w.grad_values + j);
      outer4<DP>(w.ds + j * ROWS, w.q, w.grad_keys + j);
    }
  }

  static void call(const SparseAttentionBackwardArgs& a, float* workspace, int64_t bh) {
    const FlushDenormals guard;
    const SparseAttentionArgs& f = a.forward;
    const int64_t b = bh / f.heads, h = bh % f.heads, matrix = f.n * DP;
    const auto at = [&](const void* p, const Strides& s) { return static_cast<const T*>(p) + b * s.batch + h * s.head; };
    const auto mutable_at = [&](void* p, const Strides& s) { return static_cast<T*>(p) + b * s.batch + h * s.head; };
    auto& w = *reinterpret_cast<BackwardSpace<DP>*>(workspace);
    float *grad_k = workspace + SPACE, *grad_v = grad_k + matrix, *copy = grad_v + matrix;
    const FloatRows k = float_rows<T, DP>(at(f.k, f.k_strides), f.k_strides.token, f.n, f.head_dim, copy);
    const FloatRows v = float_rows<T, DP>(at(f.v, f.v_strides), f.v_strides.token, f.n, f.head_dim, copy + matrix);
    std::memset(grad_k, 0, 2 * matrix * sizeof(float));

    const Plan plan(f.plan);
    float row_scale[ROWS];
    for (int r = 0; r < ROWS; ++r) row_scale[r] = f.scale;
    for (int64_t t = 0; t < plan.tiles(); ++t) {
      const int32_t* rows = plan.rows(t);
      prepare_tile(a, rows, at(f.q, f.q_strides), at(f.out, f.out_strides), at(a.grad_out, a.grad_out_strides), f.lse + bh * f.n, w);
      int count = 0;
      for_each_group(plan, t, [&](const int32_t* tokens, const uint32_t* mask) {
        for (int j = 0; j < GROUP_COLUMNS; ++j) {
          w.keys[count + j] = k.row(tokens[j]);
          w.values[count + j] = v.row(tokens[j]);
          w.grad_keys[count + j] = grad_k + tokens[j] * DP;
          w.grad_values[count + j] = grad_v + tokens[j] * DP;
        }
        float *p = w.p + count * ROWS, *ds = w.ds + count * ROWS;
        products<DP>(w.qt, w.keys + count, p);
        products<DP>(w.gt, w.values + count, ds);
        weights(mask, p, ds, w);
        count += GROUP_COLUMNS;
        if (count == CHUNK) {
          absorb_chunk(w, count);
          count = 0;
        }
      });
      absorb_chunk(w, count);
      unpack_transposed<T, DP>(w.dqt, rows, f.head_dim, row_scale, mutable_at(a.grad_q, a.grad_q_strides), a.grad_q_strides.token);
    }
    for (int64_t i = 0; i < f.n; ++i) {
      store_row(grad_k + i * DP, mutable_at(a.grad_k, a.grad_k_strides) + i * a.grad_k_strides.token, f.head_dim);
      store_row(grad_v + i * DP, mutable_at(a.grad_v, a.grad_v_strides) + i * a.grad_v_strides.token, f.head_dim);
    }
  }
};

template <class T, int DP> struct BackwardWorkspace {
  static int64_t call(const SparseAttentionBackwardArgs& a) { return Backward<T, DP>::SPACE + 4 * a.forward.n * DP; }
};

static int64_t workspace(const SparseAttentionBackwardArgs& a) { return dispatch<BackwardWorkspace>(a.forward.dtype, a.forward.head_dim, a); }
static void run(const SparseAttentionBackwardArgs& a, float* workspace, int64_t bh) {
  dispatch<Backward>(a.forward.dtype, a.forward.head_dim, a, workspace, bh);
}

extern const SparseAttentionBackwardKernel sparse_attention_backward;
const SparseAttentionBackwardKernel sparse_attention_backward = {workspace, run};

}  // namespace dk::DK_ISA
