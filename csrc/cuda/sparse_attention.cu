// Forward: a block processes one work item of the plan for one (batch, head), with an online softmax over groups of 64
// keys. If a tile is split into several items, each stores a partial result, and a second kernel merges them in the
// plan's order.
#include "cuda/sparse_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/tile.h"

namespace dk {

namespace {

constexpr int COLUMNS = 64, THREADS = 128;
constexpr uint32_t MASK_BYTES = TILE_ROWS / 32 * COLUMNS * 4;
using ForwardPlan = DevicePlan<COLUMNS>;

struct ForwardParams {
  SparseAttentionArgs a;
  float* scratch;
  float scale, scale_log2;   // positive, so that the maximum can be taken before scaling
  uint32_t negate;           // sign bits to flip for a negative scale
};

// The work of a block. Blocks of one item are consecutive.
struct WorkByItem {
  int64_t item, bh, b, h;
  DK_DEVICE explicit WorkByItem(const SparseAttentionArgs& a) {
    const uint32_t block = static_cast<uint32_t>(dev::bid_x()), heads = static_cast<uint32_t>(a.heads),
                   pairs = static_cast<uint32_t>(a.batch) * heads;
    item = block / pairs, bh = block % pairs, b = static_cast<uint32_t>(bh) / heads,
    h = static_cast<uint32_t>(bh) % heads;
  }
  template <class T> DK_DEVICE const T* head(const void* p, const Strides& s) const {
    return static_cast<const T*>(p) + b * s.batch + h * s.head;
  }
  template <class T> DK_DEVICE T* head(void* p, const Strides& s) const {
    return static_cast<T*>(p) + b * s.batch + h * s.head;
  }
};

// The online-softmax state of an item: unnormalised output [64, D], running sum, running maximum.
template <int D> struct Partial {
  static constexpr int64_t FLOATS = TILE_ROWS * (D + 2);
  DK_DEVICE Partial(const ForwardParams& p, int64_t number, int64_t bh)
      : values(p.scratch + (number * (p.a.batch * p.a.heads) + bh) * FLOATS) {}
  DK_DEVICE float* at(int row, int column) const { return values + row * D + column; }
  DK_DEVICE float* max(int row) const { return values + TILE_ROWS * D + row; }
  DK_DEVICE float* sum(int row) const { return values + TILE_ROWS * (D + 1) + row; }
  float* values;
};

// natural_log does not propagate NaN; sum - sum does.
DK_DEVICE float log_sum(const ForwardParams& p, float max, float sum) {
  return dev::fma(max, p.scale, natural_log(sum)) + dev::sub_rn(sum, sum);
}

// The running maximum, or 0 while it is still -inf, so that inf - inf cannot arise.
DK_DEVICE float finite(float max) { return max == -dev::inf() ? 0.0f : max; }

// Copies the mask of a group along with its keys; -1: no mask.
DK_DEVICE void copy_mask(uint32_t to, const ForwardPlan& plan, int32_t mask) {
  if (mask >= 0 && dev::tid() * 16 < static_cast<int>(MASK_BYTES))
    dev::cp_async16(to + dev::tid() * 16, plan.mask(mask) + dev::tid() * 4);
}

// -- bfloat16 and float16, on tensor cores: a warp processes 16 rows of the tile
// Blocks per multiprocessor, limited by registers
constexpr int half_blocks(int d, bool aligned) { return (d == 128 ? 2 : 4) - !aligned; }
template <int D> struct HalfForward {
  // a stage: keys, values, mask
  static constexpr uint32_t TILE = Tile<D>::bytes(COLUMNS), STAGE = 2 * TILE + MASK_BYTES, SMEM = 2 * STAGE;
};

template <class T, int D, bool ALIGNED>
DK_KERNEL(THREADS, half_blocks(D, ALIGNED))
half_forward(DK_PARAM ForwardParams p) {
  using C = HalfForward<D>;
  using Share = RowShare<D, COLUMNS, THREADS>;
  constexpr int PARTS = COLUMNS / 16;
  const int warp = dev::tid() / 32, lane = dev::tid() % 32, g = lane / 4, t = lane % 4;
  const int head_dim = static_cast<int>(p.a.head_dim);
  const WorkByItem work(p.a);
  const ForwardPlan plan(p.a.plan);
  const ForwardPlan::Item item = plan.item(work.item);
  const uint16_t *k = work.head<uint16_t>(p.a.k, p.a.k_strides), *v = work.head<uint16_t>(p.a.v, p.a.v_strides);
  // stage 1 holds the queries until they are in registers
  const uint32_t stages = dev::smem_base(), q_tile = stages + C::STAGE;

  // `keys` of an entry are read three iterations ahead, its tokens two, and its rows are copied one iteration ahead.
  int32_t tokens[Share::COUNT], keys_ahead = plan.keys(item.begin);
  const auto read_tokens = [&](int32_t e) {
    if (e >= item.end) return;
    DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.column(keys_ahead, Share::row(i));
    if (e + 1 < item.end) keys_ahead = plan.keys(e + 1);
  };
  const auto copy_entry = [&](int32_t e) {
    if (e >= item.end) return;
    const uint32_t stage = stages + (e - item.begin) % 2 * C::STAGE;
    copy_rows<ALIGNED, D, COLUMNS, THREADS>(stage, k, p.a.k_strides.token, head_dim, tokens);
    copy_rows<ALIGNED, D, COLUMNS, THREADS>(stage + C::TILE, v, p.a.v_strides.token, head_dim, tokens);
    copy_mask(stage + 2 * C::TILE, plan, plan.entry(e).mask);
  };

  DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.row(item.tile, Share::row(i));
  copy_rows<ALIGNED, D, TILE_ROWS, THREADS>(q_tile, work.head<uint16_t>(p.a.q, p.a.q_strides), p.a.q_strides.token,
                                            head_dim, tokens);
  dev::cp_async_commit();
  read_tokens(item.begin);
  copy_entry(item.begin);
  dev::cp_async_commit();
  read_tokens(item.begin + 1);
  dev::cp_async_wait<1>();
  dev::syncthreads();
  uint32_t q[D / 16][4];
  DK_UNROLL_FOR (int i = 0; i < D / 16; ++i) {
    Tile<D>::load_a(q_tile, warp * 16, i * 2, q[i]);
    DK_UNROLL_FOR (int r = 0; r < 4; ++r) q[i][r] ^= p.negate;
  }

  float acc[D / 8][4] = {}, max[2] = {-dev::inf(), -dev::inf()}, sum[2] = {};   // of rows g and g + 8
  for (int32_t e = item.begin; e < item.end; ++e) {
    const ForwardPlan::Entry entry = plan.entry(e);
    dev::cp_async_wait<0>();
    dev::syncthreads();   // entry e has landed, and the other stage is free
    copy_entry(e + 1);
    dev::cp_async_commit();
    read_tokens(e + 2);
    const uint32_t stage = stages + (e - item.begin) % 2 * C::STAGE, live = entry.live_parts(warp);
    if (!live) continue;

    float s[2 * PARTS][4];
    DK_UNROLL_FOR (int part = 0; part < PARTS; ++part) {
      float (&left)[4] = s[2 * part], (&right)[4] = s[2 * part + 1];
      const bool computed = live >> part & 1;
      DK_UNROLL_FOR (int i = 0; i < 4; ++i) left[i] = right[i] = computed ? 0.0f : -dev::inf();
      if (!computed) continue;
      DK_UNROLL_FOR (int i = 0; i < D / 16; ++i) {
        uint32_t b[4];
        Tile<D>::load_b(stage, part * 16, i * 2, b);
        dev::mma(T{}, left, q[i], b[0], b[1]);
        dev::mma(T{}, right, q[i], b[2], b[3]);
      }
      if (entry.mask >= 0) {
        DK_UNROLL_FOR (int n = 2 * part; n < 2 * part + 2; ++n) {
          const dev::u32x2 words = dev::lds8(stage + 2 * C::TILE + (warp / 2 * COLUMNS + n * 8 + 2 * t) * 4);
          const uint32_t first = words.x >> (warp % 2 * 16 + g), second = words.y >> (warp % 2 * 16 + g);
          s[n][0] = first & 1 ? s[n][0] : -dev::inf(), s[n][1] = second & 1 ? s[n][1] : -dev::inf();
          s[n][2] = first & 256 ? s[n][2] : -dev::inf(), s[n][3] = second & 256 ? s[n][3] : -dev::inf();
        }
      }
    }

    float safe_maximum[2];   // scaled
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      float most = -dev::inf();
      DK_UNROLL_FOR (int n = 0; n < 2 * PARTS; ++n) most = dev::max(most, dev::max(s[n][2 * r], s[n][2 * r + 1]));
      most = dev::max(most, dev::shfl_xor(most, 1));
      most = dev::max(most, dev::shfl_xor(most, 2));
      const float old = max[r];
      max[r] = dev::max(old, most);
      safe_maximum[r] = finite(max[r]) * p.scale_log2;
      const float alpha = dev::exp2_approx(dev::fma(old, p.scale_log2, -safe_maximum[r]));
      sum[r] *= alpha;
      DK_UNROLL_FOR (int n = 0; n < D / 8; ++n) acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;
    }
    DK_UNROLL_FOR (int part = 0; part < PARTS; ++part) {
      if (!(live >> part & 1)) continue;
      DK_UNROLL_FOR (int n = 2 * part; n < 2 * part + 2; ++n) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
          s[n][i] = dev::exp2_approx(dev::fma(s[n][i], p.scale_log2, -safe_maximum[i / 2]));
          sum[i / 2] += s[n][i];
        }
      }
      uint32_t a[4];
      pack_a(T{}, s[2 * part], s[2 * part + 1], a);
      DK_UNROLL_FOR (int n = 0; n < D / 8; n += 2) {
        uint32_t b[4];
        Tile<D>::load_b_of_rows(stage + C::TILE, part * 16, n, b);
        dev::mma(T{}, acc[n], a, b[0], b[1]);
        dev::mma(T{}, acc[n + 1], a, b[2], b[3]);
      }
    }
  }

  DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
    sum[r] += dev::shfl_xor(sum[r], 1);
    sum[r] += dev::shfl_xor(sum[r], 2);
  }
  if (item.partial >= 0) {
    const Partial<D> partial(p, item.partial, work.bh);
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + r * 8 + g;
      if (t == 0) dev::stg(partial.max(row), max[r]), dev::stg(partial.sum(row), sum[r]);
      DK_UNROLL_FOR (int n = 0; n < D / 8; ++n)
        dev::stg8(partial.at(row, n * 8 + 2 * t), {dev::as_bits(acc[n][2 * r]), dev::as_bits(acc[n][2 * r + 1])});
    }
  } else {
    // Rows go through shared memory, so that whole chunks are written.
    dev::syncthreads();   // the stages are free
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      const int row = warp * 16 + r * 8 + g, token = plan.row(item.tile, row);
      if (t == 0 && token >= 0) dev::stg(p.a.lse + work.bh * p.a.n + token, log_sum(p, max[r], sum[r]));
      const float inverse = 1.0f / sum[r];
      DK_UNROLL_FOR (int n = 0; n < D / 8; ++n)
        dev::sts_u32(stages + Tile<D>::at(row, n) + 4 * t,
                     dev::pack(T{}, acc[n][2 * r] * inverse, acc[n][2 * r + 1] * inverse));
    }
    dev::syncwarp();
    uint16_t* out = work.head<uint16_t>(p.a.out, p.a.out_strides);
    DK_UNROLL_FOR (int i = 0; i < D / 16; ++i) {
      const int row = warp * 16 + (i * 32 + lane) / Tile<D>::CHUNKS, chunk = lane % Tile<D>::CHUNKS,
                token = plan.row(item.tile, row);
      if (token >= 0)
        store_chunk<ALIGNED>(out + token * p.a.out_strides.token, chunk, head_dim,
                             dev::lds16(stages + Tile<D>::at(row, chunk)));
    }
  }
}

// -- float32, by multiply-adds: a thread has 4 rows, with 8 columns of scores (8 i + its index in the row) and D / 8 of
// values
template <int D> struct FloatForward {
  static constexpr int BLOCKS = D == 128 ? 1 : 3;
  // bytes; padded by a chunk, so that equal chunks of different rows are in different banks
  static constexpr uint32_t ROW = (D + 4) * 4, WEIGHT_ROW = (COLUMNS + 4) * 4;
  static constexpr uint32_t KEYS_AT = TILE_ROWS * ROW, VALUES_AT = KEYS_AT + COLUMNS * ROW,
                            WEIGHTS_AT = VALUES_AT + COLUMNS * ROW, MASK_AT = WEIGHTS_AT + TILE_ROWS * WEIGHT_ROW,
                            SMEM = MASK_AT + MASK_BYTES;
};

template <int D, bool ALIGNED> DK_KERNEL(THREADS, FloatForward<D>::BLOCKS) float_forward(DK_PARAM ForwardParams p) {
  using C = FloatForward<D>;
  using Share = RowShare<2 * D, COLUMNS, THREADS>;                                      // a chunk is four floats
  const int warp = dev::tid() / 32, place = dev::tid() % 8, row = dev::tid() / 8 * 4;   // a warp has 16 rows
  const int head_dim = static_cast<int>(p.a.head_dim);
  const WorkByItem work(p.a);
  const ForwardPlan plan(p.a.plan);
  const ForwardPlan::Item item = plan.item(work.item);
  const float *k = work.head<float>(p.a.k, p.a.k_strides), *v = work.head<float>(p.a.v, p.a.v_strides);
  const uint32_t queries = dev::smem_base(), keys = queries + C::KEYS_AT, values = queries + C::VALUES_AT,
                 weights = queries + C::WEIGHTS_AT, mask = queries + C::MASK_AT;

  ForwardPlan::Entry entry = plan.entry(item.begin);
  int32_t tokens[Share::COUNT];
  const auto copy = [&](uint32_t to, const float* base, int64_t stride) {
    DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i)
      copy_chunk<ALIGNED>(to + Share::row(i) * C::ROW + Share::chunk() * 16,
                          base + (tokens[i] < 0 ? 0 : tokens[i]) * stride, Share::chunk(), head_dim, tokens[i] >= 0);
  };
  const auto read_tokens = [&] {
    DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.column(entry.keys, Share::row(i));
  };
  DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.row(item.tile, Share::row(i));
  copy(queries, work.head<float>(p.a.q, p.a.q_strides), p.a.q_strides.token);
  read_tokens();
  copy(keys, k, p.a.k_strides.token);
  copy_mask(mask, plan, entry.mask);
  dev::cp_async_commit();
  copy(values, v, p.a.v_strides.token);
  dev::cp_async_commit();

  float acc[4][D / 8] = {}, max[4], sum[4] = {};
  DK_UNROLL_FOR (int r = 0; r < 4; ++r) max[r] = -dev::inf();
  for (int32_t e = item.begin; e < item.end; ++e) {
    const bool live = entry.live_parts(warp) != 0, more = e + 1 < item.end;
    dev::cp_async_wait<1>();
    dev::syncthreads();   // keys have landed
    float s[4][8] = {};
    if (live) {
      float odd[4][8] =
          {};   // even and odd elements are summed separately: shorter chains have smaller rounding errors
      DK_ROLLED_FOR (int d = 0; d < D; d += 4) {
        float a[4][4], b[4];
        DK_UNROLL_FOR (int r = 0; r < 4; ++r) load_shared_quad(float{}, queries + (row + r) * C::ROW + d * 4, a[r]);
        DK_UNROLL_FOR (int c = 0; c < 8; ++c) {
          load_shared_quad(float{}, keys + (place + 8 * c) * C::ROW + d * 4, b);
          DK_UNROLL_FOR (int r = 0; r < 4; ++r) {
            s[r][c] = dev::fma(a[r][2], b[2], dev::fma(a[r][0], b[0], s[r][c]));
            odd[r][c] = dev::fma(a[r][3], b[3], dev::fma(a[r][1], b[1], odd[r][c]));
          }
        }
      }
      DK_UNROLL_FOR (int c = 0; c < 8; ++c) {
        const uint32_t bits =
            entry.mask < 0 ? ~0u : dev::lds_u32(mask + (row / 32 * COLUMNS + place + 8 * c) * 4) >> row % 32;
        DK_UNROLL_FOR (int r = 0; r < 4; ++r)
          s[r][c] = bits >> r & 1 ? dev::as_float(dev::as_bits(s[r][c] + odd[r][c]) ^ p.negate) : -dev::inf();
      }
    }
    dev::syncthreads();   // keys and mask have been read
    if (more) {
      entry = plan.entry(e + 1);
      read_tokens();
      copy(keys, k, p.a.k_strides.token);
      copy_mask(mask, plan, entry.mask);
    }
    dev::cp_async_commit();
    if (live) {
      DK_UNROLL_FOR (int r = 0; r < 4; ++r) {
        float most = max[r];
        DK_UNROLL_FOR (int c = 0; c < 8; ++c) most = dev::max(most, s[r][c]);
        DK_UNROLL_FOR (int lanes = 1; lanes < 8; lanes *= 2) most = dev::max(most, dev::shfl_xor(most, lanes));
        const float safe_maximum = finite(most), alpha = exp2((max[r] - safe_maximum) * p.scale_log2);
        max[r] = most, sum[r] *= alpha;
        DK_UNROLL_FOR (int c = 0; c < 8; ++c) {
          const float weight = exp2((s[r][c] - safe_maximum) * p.scale_log2);
          sum[r] += weight;
          dev::sts_f32(weights + (row + r) * C::WEIGHT_ROW + (place + 8 * c) * 4, weight);
        }
        DK_UNROLL_FOR (int d = 0; d < D / 8; ++d) acc[r][d] *= alpha;
      }
    }
    dev::cp_async_wait<1>();
    dev::syncthreads();   // values have landed, weights are stored
    if (live) {
      DK_ROLLED_FOR (int j = 0; j < COLUMNS; j += 4) {
        float a[4][4], b[4];
        DK_UNROLL_FOR (int r = 0; r < 4; ++r)
          load_shared_quad(float{}, weights + (row + r) * C::WEIGHT_ROW + j * 4, a[r]);
        DK_UNROLL_FOR (int i = 0; i < 4; ++i) {
          DK_UNROLL_FOR (int d = 0; d < D / 32; ++d) {
            load_shared_quad(float{}, values + (j + i) * C::ROW + (d * 8 + place) * 16, b);
            DK_UNROLL_FOR (int r = 0; r < 4; ++r) {
              DK_UNROLL_FOR (int x = 0; x < 4; ++x) acc[r][d * 4 + x] = dev::fma(a[r][i], b[x], acc[r][d * 4 + x]);
            }
          }
        }
      }
    }
    dev::syncthreads();   // values and weights have been read
    if (more) copy(values, v, p.a.v_strides.token);
    dev::cp_async_commit();
  }

  DK_UNROLL_FOR (int r = 0; r < 4; ++r) {
    DK_UNROLL_FOR (int lanes = 1; lanes < 8; lanes *= 2) sum[r] += dev::shfl_xor(sum[r], lanes);
    const int token = plan.row(item.tile, row + r);
    if (item.partial >= 0) {
      const Partial<D> partial(p, item.partial, work.bh);
      if (place == 0) dev::stg(partial.max(row + r), max[r]), dev::stg(partial.sum(row + r), sum[r]);
      DK_UNROLL_FOR (int d = 0; d < D / 8; ++d)
        dev::stg(partial.at(row + r, (d / 4 * 8 + place) * 4 + d % 4), acc[r][d]);
    } else if (token >= 0) {
      if (place == 0) dev::stg(p.a.lse + work.bh * p.a.n + token, log_sum(p, max[r], sum[r]));
      float* out = work.head<float>(p.a.out, p.a.out_strides) + token * p.a.out_strides.token;
      DK_UNROLL_FOR (int d = 0; d < D / 8; ++d) {
        const int column = (d / 4 * 8 + place) * 4 + d % 4;
        if (column < head_dim) dev::stg(out + column, acc[r][d] / sum[r]);
      }
    }
  }
}

// -- merging the partial results of a split tile; a warp processes one row at a time
DK_DEVICE void store(float, float* to, float x) { dev::stg(to, x); }
template <class T> DK_DEVICE void store(T, uint16_t* to, float x) {
  dev::stg(to, static_cast<uint16_t>(dev::pack(T{}, x, 0.0f)));
}

template <class T, int D> DK_KERNEL(THREADS, 4) combine(DK_PARAM ForwardParams p) {
  const int warp = dev::tid() / 32, lane = dev::tid() % 32;
  const WorkByItem work(p.a);
  const ForwardPlan plan(p.a.plan);
  const ForwardPlan::SplitTile tile = plan.split_tile(work.item);
  const auto partial = [&](int i) { return Partial<D>(p, tile.first + i, work.bh); };
  for (int row = warp; row < TILE_ROWS; row += THREADS / 32) {
    const int token = plan.row(tile.tile, row);
    if (token < 0) continue;
    float max = -dev::inf(), sum = 0.0f, acc[D / 32] = {};
    for (int i = 0; i < tile.count; ++i) max = dev::max(max, dev::ldg(partial(i).max(row)));
    for (int i = 0; i < tile.count; ++i) {
      const float weight = exp2((dev::ldg(partial(i).max(row)) - max) * p.scale_log2);
      sum = dev::fma(weight, dev::ldg(partial(i).sum(row)), sum);
      DK_UNROLL_FOR (int d = 0; d < D / 32; ++d)
        acc[d] = dev::fma(weight, dev::ldg(partial(i).at(row, d * 32 + lane)), acc[d]);
    }
    if (lane == 0) dev::stg(p.a.lse + work.bh * p.a.n + token, log_sum(p, max, sum));
    Stored<T>* out = work.head<Stored<T>>(p.a.out, p.a.out_strides) + token * p.a.out_strides.token;
    DK_UNROLL_FOR (int d = 0; d < D / 32; ++d)
      if (d * 32 + lane < p.a.head_dim) store(T{}, out + d * 32 + lane, acc[d] / sum);
  }
}

template <class T, int D>
const char* launch(const ForwardParams& p, const PlanSizes& sizes, bool aligned, void* stream) {
  const int64_t pairs = p.a.batch * p.a.heads;
  const dev::Grid items{sizes.items * pairs}, split{sizes.split_tiles * pairs};
  const char* error = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    error = dev::launch("sparse_attention", aligned ? float_forward<D, true> : float_forward<D, false>, items, THREADS,
                        FloatForward<D>::SMEM, stream, p);
  } else {
    error = dev::launch("sparse_attention", aligned ? half_forward<T, D, true> : half_forward<T, D, false>, items,
                        THREADS, HalfForward<D>::SMEM, stream, p);
  }
  return error ? error : dev::launch("sparse_attention (combine)", combine<T, D>, split, THREADS, 0, stream, p);
}

template <int D>
const char* launch(const SparseAttentionArgs& a, const PlanSizes& sizes, float* scratch, void* stream) {
  const int64_t size = a.dtype == DType::float32 ? 4 : 2;
  const bool aligned =
      rows_aligned(a.q, a.q_strides, a.head_dim, size) && rows_aligned(a.k, a.k_strides, a.head_dim, size) &&
      rows_aligned(a.v, a.v_strides, a.head_dim, size) && rows_aligned(a.out, a.out_strides, a.head_dim, size);
  // Never 0: -inf * 0 is NaN.
  const float scale = std::max(std::abs(a.scale), 4 * std::numeric_limits<float>::min());
  const uint32_t negate = a.scale >= 0 ? 0 : a.dtype == DType::float32 ? 0x80000000u : 0x80008000u;
  const ForwardParams p{a, scratch, scale, scale * LOG2E, negate};
  if (a.dtype == DType::float32) return launch<float, D>(p, sizes, aligned, stream);
  return with_element(a.dtype, [&](auto element) { return launch<decltype(element), D>(p, sizes, aligned, stream); });
}

}   // namespace

namespace cuda {

int64_t sparse_attention_scratch(const SparseAttentionArgs& a, const PlanSizes& sizes) {
  int64_t floats = 0;
  with_head_dim(a.head_dim, [&](auto d) {
    floats = sizes.partials * a.batch * a.heads * Partial<d>::FLOATS;
    return nullptr;
  });
  return floats;
}

const char* sparse_attention(const SparseAttentionArgs& a, const PlanSizes& sizes, float* scratch, void* stream) {
  return with_head_dim(a.head_dim, [&](auto d) { return launch<d>(a, sizes, scratch, stream); });
}

}   // namespace cuda

}   // namespace dk
