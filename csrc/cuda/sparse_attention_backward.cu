// Backward of sparse attention, from lse, without atomics. With P = exp(S * scale - lse) and dP = dO V^T:
//   dQ = dS K * scale,  dK = dS^T Q * scale,  dV = P^T dO,  where dS = P * (dP - delta),  delta = rowsum(dO * O).
// One kernel owns tiles of queries and computes dQ; another owns tiles of keys and computes dK and dV. Both iterate
// over the columns of their plan in steps of 32, and each warp processes its 16 rows with 16 columns at a time. The
// blocks of a split tile store their accumulators in scratch, in the layout of the threads, and a small kernel sums
// them in the plan's order.
//
// The rounding error of lse grows with lse and multiplies every weight of a query, which matters in float32. There the
// first kernel also sums the recomputed weights, and both kernels divide by the sum.
#include "cuda/sparse_attention_backward.h"

#include "cuda/element.h"
#include "cuda/plan.h"
#include "cuda/tile.h"

namespace dk::cuda {
namespace {

constexpr int THREADS = 128, COLUMNS = 32, STAGES = 2;   // COLUMNS of a step
// columns per group of the query plan and the key plan
constexpr int QUERY_GROUP = 64, KEY_GROUP = 32;

// Statistics of a query for the second kernel; 16 bytes in scratch.
struct Statistics {
  float lse;   // to base 2
  float delta;
  float weights;   // sum of the recomputed weights
};
constexpr int STATISTICS_FLOATS = 4;
constexpr uint32_t MASK_BYTES = TILE_ROWS / 32 * COLUMNS * 4;

struct Params {
  SparseAttentionBackwardArgs a;
  PlanSizes plan, backward_plan;
  float *statistics, *partial_q, *partial_kv;
  float scale_log2;
  bool aligned;   // all rows allow 16-byte copies
};

// -- 16 x 16 products in the accumulator layout of mma: x[n][2 r + e] of lane 4 g + t is row g + 8 r, column 8 n + 2 t
// + e. Tiles consist of 16-bit words (tile.h); a float is two.
struct Lane {
  int warp = dev::tid() / 32, group = dev::tid() % 32 / 4, quad = dev::tid() % 4;
  DK_DEVICE int row(int r) const { return 16 * warp + group + 8 * r; }   // in the block's tile
};
template <class T> constexpr bool NORMALISED = std::is_same_v<T, float>;
template <class T> constexpr int WORDS = sizeof(Stored<T>) / 2;

template <class T, int D> constexpr int MIN_BLOCKS = (D < 128 ? 4 : 3) - WORDS<T>;   // per multiprocessor

// The left operand of products: the warp's 16 rows of a tile, KEPT in registers or read again for every product.
template <class T, int D, bool KEPT> struct Operand {
  uint32_t own, kept[KEPT ? D / 16 : 1][4];
  DK_DEVICE Operand(uint32_t tile, const Lane& lane) : own(tile) {
    if constexpr (KEPT)
      DK_UNROLL_FOR (int k = 0; k < D / 16; ++k) Tile<D>::load_a(own, 16 * lane.warp, 2 * k, kept[k]);
  }
  // s = these rows times the rows of `tile` from `column` on
  DK_DEVICE void multiply(uint32_t tile, int column, const Lane& lane, float (&s)[2][4]) const {
    DK_UNROLL_FOR (int k = 0; k < D / 16; ++k) {
      uint32_t a[4], b[4];
      if constexpr (KEPT) {
        DK_UNROLL_FOR (int i = 0; i < 4; ++i) a[i] = kept[k][i];
      } else Tile<D>::load_a(own, 16 * lane.warp, 2 * k, a);
      Tile<D>::load_b(tile, column, 2 * k, b);
      dev::mma(T{}, s[0], a, b[0], b[1]);
      dev::mma(T{}, s[1], a, b[2], b[3]);
    }
  }
};
template <int D> struct Operand<float, D, false> {
  uint32_t own;
  DK_DEVICE Operand(uint32_t tile, const Lane&) : own(tile) {}
  DK_DEVICE void multiply(uint32_t tile, int column, const Lane& lane, float (&s)[2][4]) const {
    float chains[2][4][4] = {};   // short chains: dP and delta may nearly cancel, which amplifies rounding errors
    DK_ROLLED_FOR (int chunk = 0; chunk < D / 4; ++chunk) {
      float a[2][4], b[4];
      DK_UNROLL_FOR (int r = 0; r < 2; ++r) load(own, lane.row(r), chunk, a[r]);
      DK_UNROLL_FOR (int n = 0; n < 2; ++n)
        DK_UNROLL_FOR (int e = 0; e < 2; ++e) {
          load(tile, column + 8 * n + 2 * lane.quad + e, chunk, b);
          DK_UNROLL_FOR (int r = 0; r < 2; ++r)
            DK_UNROLL_FOR (int i = 0; i < 4; ++i)
              chains[n][2 * r + e][i] = dev::fma(a[r][i], b[i], chains[n][2 * r + e][i]);
        }
    }
    DK_UNROLL_FOR (int n = 0; n < 2; ++n)
      DK_UNROLL_FOR (int j = 0; j < 4; ++j)
        s[n][j] = (chains[n][j][0] + chains[n][j][1]) + (chains[n][j][2] + chains[n][j][3]);
  }
  static DK_DEVICE void load(uint32_t tile, int row, int chunk, float (&x)[4]) {
    load_shared_quad(float{}, tile + Tile<2 * D>::at(row, chunk), x);
  }
};

// Weighted sums of rows for the warp's 16 rows: x[n][2 r + e] is row r of the lane, column `column(n)` + e.
template <class T, int D> struct Accumulator {
  float x[D / 8][4] = {};
  static DK_DEVICE int column(int n, const Lane& lane) { return 8 * n + 2 * lane.quad; }

  // += weights times 16 rows of `tile`
  DK_DEVICE void add(const float (&weights)[2][4], uint32_t tile, int row, const Lane&) {
    uint32_t a[4], b[4];
    pack_a(T{}, weights[0], weights[1], a);
    DK_UNROLL_FOR (int n = 0; n < D / 8; n += 2) {
      Tile<D>::load_b_of_rows(tile, row, n, b);
      dev::mma(T{}, x[n], a, b[0], b[1]);
      dev::mma(T{}, x[n + 1], a, b[2], b[3]);
    }
  }
  DK_DEVICE void store(uint32_t tile, int n, int r, float factor, const Lane& lane) const {
    dev::sts_u32(tile + Tile<D>::at(lane.row(r), n) + 4 * lane.quad,
                 dev::pack(T{}, x[n][2 * r] * factor, x[n][2 * r + 1] * factor));
  }
};
template <int D> struct Accumulator<float, D> {   // the 16 columns of two n are distributed in fours
  float x[D / 8][4] = {};

  DK_DEVICE void add(const float (&weights)[2][4], uint32_t tile, int row, const Lane& lane) {
    DK_ROLLED_FOR (int i = 0; i < 8; ++i)   // columns i and 8 + i of the weights multiply rows i and 8 + i
      DK_UNROLL_FOR (int half = 0; half < 2; ++half) {
        float w[2], v[4];
        DK_UNROLL_FOR (int r = 0; r < 2; ++r)
          w[r] = dev::shfl(i % 2 ? weights[half][2 * r + 1] : weights[half][2 * r], 4 * lane.group + i / 2);
        DK_UNROLL_FOR (int n = 0; n < D / 8; n += 2) {
          Operand<float, D, false>::load(tile, row + 8 * half + i, 2 * n + lane.quad, v);
          DK_UNROLL_FOR (int e = 0; e < 4; ++e)
            DK_UNROLL_FOR (int r = 0; r < 2; ++r)
              x[n + e / 2][2 * r + e % 2] = dev::fma(w[r], v[e], x[n + e / 2][2 * r + e % 2]);
        }
      }
  }
  DK_DEVICE void store(uint32_t tile, int n, int r, float factor, const Lane& lane) const {
    const uint32_t to = tile + Tile<2 * D>::at(lane.row(r), n / 2 * 4 + lane.quad) + n % 2 * 8;
    dev::sts8(to, {dev::as_bits(x[n][2 * r] * factor), dev::as_bits(x[n][2 * r + 1] * factor)});
  }
};

// -- the shared memory of a block: both operands of the tile's rows (Q and dO, or K and V); per stage both operands of
// the step's columns, their mask [2 x 32 rows, COLUMNS] and, for queries, their statistics
template <class T, int D, bool BY_KEYS> struct Memory {
  static constexpr int W = D * WORDS<T>;
  static constexpr uint32_t ROWS = Tile<W>::bytes(TILE_ROWS), STEP = Tile<W>::bytes(COLUMNS);
  static constexpr uint32_t MASK = 2 * STEP, STATISTICS = MASK + MASK_BYTES;   // offsets in a stage
  static constexpr uint32_t STAGE = STATISTICS + (BY_KEYS ? COLUMNS * STATISTICS_FLOATS * 4 : 0);
  static constexpr uint32_t TOTAL = 2 * ROWS + STAGES * STAGE;
  uint32_t first = dev::smem_base(), second = first + ROWS;
  DK_DEVICE uint32_t stage(int step) const { return second + ROWS + step % STAGES * STAGE; }
};
static_assert(Memory<float, 128, true>::TOTAL <= 132608,
              "GPUs that have less are declined in dalle_kernels/backends/native/__init__.py");

// The (batch, head) of a block, and its index among `count` items or split tiles. Blocks of one head are consecutive,
// so that they share reads in the cache.
struct WorkByHead {
  int64_t bh, index;
  DK_DEVICE explicit WorkByHead(int64_t count) {
    const uint32_t block = static_cast<uint32_t>(dev::bid_x()), divisor = static_cast<uint32_t>(count);
    bh = block / divisor, index = block % divisor;
  }
};

// The matrix of one (batch, head), in 16-bit words.
struct Matrix {
  uint16_t* base;
  int64_t stride;
};
template <class T> DK_DEVICE Matrix matrix(const Params& p, const void* base, const Strides& s, int64_t bh) {
  const uint32_t heads = static_cast<uint32_t>(p.a.forward.heads), b = static_cast<uint32_t>(bh) / heads,
                 h = static_cast<uint32_t>(bh) % heads;
  return {static_cast<uint16_t*>(const_cast<void*>(base)) + WORDS<T> * (b * s.batch + h * s.head), WORDS<T> * s.token};
}

// Copies the rows `tokens` of a matrix to a tile.
template <class T, int D, int ROWS, int COUNT>
DK_DEVICE void copy(const Params& p, uint32_t to, const Matrix& m, const int32_t (&tokens)[COUNT]) {
  constexpr int W = D * WORDS<T>;
  const int width = static_cast<int>(p.a.forward.head_dim) * WORDS<T>;
  if (p.aligned) copy_rows<true, W, ROWS, THREADS>(to, m.base, m.stride, width, tokens);
  else copy_rows<false, W, ROWS, THREADS>(to, m.base, m.stride, width, tokens);
}

// Writes the warp's rows of result tile `number`, staged in its own rows of the tile at `tile`.
template <class T, int D, int GROUP>
DK_DEVICE void write_rows(const Params& p, const Accumulator<T, D>& sums, const float (&factor)[2], uint32_t tile,
                          const DevicePlan<GROUP>& plan, int32_t number, const Matrix& out, const Lane& lane) {
  using Chunks = Tile<D * WORDS<T>>;
  const int width = static_cast<int>(p.a.forward.head_dim) * WORDS<T>;
  dev::syncwarp();   // these rows of the tile have been read
  DK_UNROLL_FOR (int n = 0; n < D / 8; ++n)
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) sums.store(tile, n, r, factor[r], lane);
  dev::syncwarp();
  DK_ROLLED_FOR (int i = dev::tid() % 32; i < 16 * Chunks::CHUNKS; i += 32) {
    const int row = 16 * lane.warp + i / Chunks::CHUNKS, chunk = i % Chunks::CHUNKS;
    const int32_t token = plan.row(number, row);
    if (token < 0) continue;
    uint16_t* to = out.base + token * out.stride;
    const dev::u32x4 words = dev::lds16(tile + Chunks::at(row, chunk));
    p.aligned ? store_chunk<true>(to, chunk, width, words) : store_chunk<false>(to, chunk, width, words);
  }
}

// Accumulators of a split tile, in the layout of the threads. Collective over a block.
template <class T, int D> constexpr int64_t PARTIAL = TILE_ROWS * D;   // floats
template <class T, int D> DK_DEVICE void save(const Accumulator<T, D>& sums, float* partial) {
  DK_UNROLL_FOR (int n = 0; n < D / 8; ++n) {
    const float (&x)[4] = sums.x[n];
    dev::stg16(partial + 4 * (n * THREADS + dev::tid()),
               {dev::as_bits(x[0]), dev::as_bits(x[1]), dev::as_bits(x[2]), dev::as_bits(x[3])});
  }
}
template <class T, int D> DK_DEVICE void add_saved(Accumulator<T, D>& sums, const float* partial) {
  DK_UNROLL_FOR (int n = 0; n < D / 8; ++n) {
    const dev::u32x4 v = dev::ldg16(partial + 4 * (n * THREADS + dev::tid()));
    sums.x[n][0] += dev::as_float(v.x), sums.x[n][1] += dev::as_float(v.y), sums.x[n][2] += dev::as_float(v.z),
        sums.x[n][3] += dev::as_float(v.w);
  }
}

// Tokens of the rows that this thread copies.
template <int W, int GROUP>
DK_DEVICE void fetch_rows(const DevicePlan<GROUP>& plan, int32_t tile,
                          int32_t (&tokens)[RowShare<W, TILE_ROWS, THREADS>::COUNT]) {
  using Share = RowShare<W, TILE_ROWS, THREADS>;
  DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.row(tile, Share::row(i));
}

// The columns of a work item, in steps of 32.
template <int GROUP> struct Steps {
  static constexpr int PER_ENTRY = GROUP / COLUMNS;
  const DevicePlan<GROUP>& plan;
  int32_t first, count;
  DK_DEVICE Steps(const DevicePlan<GROUP>& plan, int32_t begin, int32_t end)
      : plan(plan), first(begin), count((end - begin) * PER_ENTRY) {}
  DK_DEVICE typename DevicePlan<GROUP>::Entry entry(int step) const { return plan.entry(first + step / PER_ENTRY); }
  DK_DEVICE static int offset(int step) { return step % PER_ENTRY * COLUMNS; }   // in the entry's group
  DK_DEVICE int32_t keys(int step) const { return plan.keys(first + step / PER_ENTRY); }
  DK_DEVICE void copy_mask(uint32_t to, int step) const {
    // chunks of 16 bytes, `row` of them for 32 rows
    const int32_t mask = entry(step).mask, chunk = dev::tid(), row = COLUMNS / 4;
    if (mask >= 0 && chunk < TILE_ROWS / 32 * row)
      dev::cp_async16(to + chunk * 16, plan.mask(mask) + chunk / row * GROUP + offset(step) + chunk % row * 4);
  }

  // Called after the copies of the rows are issued: issues those of the first step, and waits for the rows.
  template <class Fetch, class Copy> DK_DEVICE void start(const Fetch& fetch, const Copy& copy) const {
    dev::cp_async_commit();
    fetch(0);
    copy(0);
    dev::cp_async_commit();
    if (count > 1) fetch(1);
    dev::cp_async_wait<1>();
    dev::syncthreads();
  }
  // Rows are copied one step ahead, and their tokens are read one step before that.
  template <class Fetch, class Copy, class Body>
  DK_DEVICE void run(const Fetch& fetch, const Copy& copy, const Body& body) const {
    for (int step = 0; step < count; ++step) {
      dev::cp_async_wait<0>();   // this step's columns have landed ...
      dev::syncthreads();        // ... those of all threads, and the other stage is free
      if (step + 1 < count) copy(step + 1);
      dev::cp_async_commit();
      if (step + 2 < count) fetch(step + 2);
      body(step);
    }
  }
};

// The weight of a pair from its base-2 logarithm.
DK_DEVICE float weight_of(float, float log2, const Statistics& q) { return exp2(log2) / q.weights; }
template <class T> DK_DEVICE float weight_of(T, float log2, const Statistics&) { return dev::exp2_approx(log2); }

// Computes weights and dS of 16 x 16 pairs from scores and dP; 0 for pairs that `mask` (0: none) excludes.
// of_query(n, r, e): the Statistics of an element's query.
template <class T, class OfQuery>
DK_DEVICE void weigh(T, const Params& p, uint32_t mask, const Lane& lane, const OfQuery& of_query, float (&s)[2][4],
                     float (&d)[2][4]) {
  DK_UNROLL_FOR (int n = 0; n < 2; ++n)
    DK_UNROLL_FOR (int r = 0; r < 2; ++r)
      DK_UNROLL_FOR (int e = 0; e < 2; ++e) {
        const Statistics& q = of_query(n, r, e);
        float &weight = s[n][2 * r + e], &grad = d[n][2 * r + e];
        weight = weight_of(T{}, dev::fma(weight, p.scale_log2, -q.lse), q);
        grad = weight * (grad - q.delta);
      }
  if (mask == 0) return;
  DK_UNROLL_FOR (int n = 0; n < 2; ++n) {
    const dev::u32x2 words = dev::lds8(mask + (lane.warp / 2 * COLUMNS + 8 * n + 2 * lane.quad) * 4);
    DK_UNROLL_FOR (int r = 0; r < 2; ++r)
      DK_UNROLL_FOR (int e = 0; e < 2; ++e) {   // replaces masked values, which may be NaN
        const bool allowed = (e ? words.y : words.x) >> lane.row(r) % 32 & 1;
        s[n][2 * r + e] = allowed ? s[n][2 * r + e] : 0.0f;
        d[n][2 * r + e] = allowed ? d[n][2 * r + e] : 0.0f;
      }
  }
}

// -- dQ, by tiles of queries
template <class T, int D> struct GradQ {
  Accumulator<T, D> sums;
  float weights[2] = {}, delta[2] = {};   // of the lane's rows: sum of the weights; delta

  static constexpr int64_t FLOATS = PARTIAL<T, D> + 2 * TILE_ROWS;   // of a partial result
  static DK_DEVICE float* partial(const Params& p, int64_t bh, int32_t number) {
    return p.partial_q + (bh * p.plan.partials + number) * FLOATS;
  }

  DK_DEVICE void save(float* partial, const Lane& lane) const {
    cuda::save(sums, partial);
    if (lane.quad == 0)
      DK_UNROLL_FOR (int r = 0; r < 2; ++r)
        dev::stg8(partial + PARTIAL<T, D> + 2 * lane.row(r), {dev::as_bits(weights[r]), dev::as_bits(delta[r])});
  }
  DK_DEVICE void add(const float* partial, const Lane& lane) {
    add_saved(sums, partial);
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      const dev::u32x2 v = dev::ldg8(partial + PARTIAL<T, D> + 2 * lane.row(r));
      weights[r] += dev::as_float(v.x), delta[r] = dev::as_float(v.y);
    }
  }
  // Writes dQ and the statistics of the queries.
  DK_DEVICE void finish(const Params& p, const DevicePlan<QUERY_GROUP>& plan, int32_t tile, int64_t bh, uint32_t memory,
                        const Lane& lane) const {
    const SparseAttentionArgs& f = p.a.forward;
    float factor[2];
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      factor[r] = NORMALISED<T> ? f.scale / weights[r] : f.scale;
      const int32_t token = plan.row(tile, lane.row(r));
      if (lane.quad == 0 && token >= 0) {
        const int64_t at = bh * f.n + token;
        dev::stg16(p.statistics + at * STATISTICS_FLOATS,
                   {dev::as_bits(dev::ldg(f.lse + at) * LOG2E), dev::as_bits(delta[r]), dev::as_bits(weights[r]), 0});
      }
    }
    write_rows<T>(p, sums, factor, memory, plan, tile, matrix<T>(p, p.a.grad_q, p.a.grad_q_strides, bh), lane);
  }
};

// delta of the lane's rows, as the diagonal of dO O^T, computed like dP; makes dP - delta exactly 0 for queries with a
// single key.
template <class T, int D>
DK_DEVICE void diagonal(const Operand<T, D, WORDS<T> == 1>& grad_out, uint32_t out, const Lane& lane,
                        float (&delta)[2]) {
  float x[2][4] = {};
  grad_out.multiply(out, 16 * lane.warp, lane, x);
  DK_UNROLL_FOR (int r = 0; r < 2; ++r)
    delta[r] = dev::shfl(lane.group % 2 ? x[r][2 * r + 1] : x[r][2 * r], 4 * lane.group + lane.group / 2);
}

template <class T, int D> DK_KERNEL(THREADS, (MIN_BLOCKS<T, D>)) grad_q_kernel(DK_PARAM Params p) {
  using M = Memory<T, D, false>;
  const SparseAttentionArgs& f = p.a.forward;
  const Lane lane;
  const M memory;
  const DevicePlan<QUERY_GROUP> plan(f.plan);
  const WorkByHead work(p.plan.items);
  const int64_t bh = work.bh;
  const auto item = plan.item(work.index);
  const Steps<QUERY_GROUP> steps(plan, item.begin, item.end);

  const Matrix k = matrix<T>(p, f.k, f.k_strides, bh), v = matrix<T>(p, f.v, f.v_strides, bh);
  using Share = RowShare<M::W, COLUMNS, THREADS>;
  int32_t tokens[Share::COUNT];
  const auto fetch = [&](int step) {
    const int32_t keys = steps.keys(step);
    DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.column(keys, steps.offset(step) + Share::row(i));
  };
  const auto copy_step = [&](int step) {
    copy<T, D, COLUMNS>(p, memory.stage(step), k, tokens);
    copy<T, D, COLUMNS>(p, memory.stage(step) + M::STEP, v, tokens);
    steps.copy_mask(memory.stage(step) + M::MASK, step);
  };
  {
    int32_t rows[RowShare<M::W, TILE_ROWS, THREADS>::COUNT];
    fetch_rows<M::W>(plan, item.tile, rows);
    copy<T, D, TILE_ROWS>(p, memory.first, matrix<T>(p, f.q, f.q_strides, bh), rows);
    copy<T, D, TILE_ROWS>(p, memory.second, matrix<T>(p, p.a.grad_out, p.a.grad_out_strides, bh), rows);
    // fills both operands of stage 1, which is free until the second step
    copy<T, D, TILE_ROWS>(p, memory.stage(1), matrix<T>(p, f.out, f.out_strides, bh), rows);
  }
  steps.start(fetch, copy_step);

  const Operand<T, D, WORDS<T> == 1> q(memory.first, lane), grad_out(memory.second, lane);
  GradQ<T, D> grad;
  diagonal<T, D>(grad_out, memory.stage(1), lane, grad.delta);
  Statistics of_row[2];
  DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
    const int32_t token = plan.row(item.tile, lane.row(r));
    of_row[r] = {token < 0 ? 0.0f : dev::ldg(f.lse + bh * f.n + token) * LOG2E, grad.delta[r], 1.0f};
  }
  steps.run(fetch, copy_step, [&](int step) {
    const auto entry = steps.entry(step);
    const uint32_t live = entry.live_parts(lane.warp) >> steps.offset(step) / 16, stage = memory.stage(step);
    DK_UNROLL_FOR (int part = 0; part < COLUMNS / 16; ++part) {
      if (!(live >> part & 1)) continue;
      float s[2][4] = {}, d[2][4] = {};
      q.multiply(stage, 16 * part, lane, s);
      grad_out.multiply(stage + M::STEP, 16 * part, lane, d);
      weigh(
          T{}, p, entry.mask < 0 ? 0 : stage + M::MASK + 64 * part, lane,
          [&](int, int r, int) -> const Statistics& { return of_row[r]; }, s, d);
      if constexpr (NORMALISED<T>)
        DK_UNROLL_FOR (int r = 0; r < 2; ++r)
          grad.weights[r] += (s[0][2 * r] + s[0][2 * r + 1]) + (s[1][2 * r] + s[1][2 * r + 1]);
      grad.sums.add(d, stage, 16 * part, lane);
    }
  });
  if constexpr (NORMALISED<T>)
    DK_UNROLL_FOR (int r = 0; r < 2; ++r) {
      grad.weights[r] += dev::shfl_xor(grad.weights[r], 1);
      grad.weights[r] += dev::shfl_xor(grad.weights[r], 2);
    }
  if (item.partial < 0) grad.finish(p, plan, item.tile, bh, memory.first, lane);
  else grad.save(grad.partial(p, bh, item.partial), lane);
}

// -- dK and dV, by tiles of keys
template <class T, int D> struct GradKV {
  Accumulator<T, D> k, v;

  static constexpr int64_t FLOATS = 2 * PARTIAL<T, D>;
  static DK_DEVICE float* partial(const Params& p, int64_t bh, int32_t number) {
    return p.partial_kv + (bh * p.backward_plan.partials + number) * FLOATS;
  }

  DK_DEVICE void save(float* partial, const Lane&) const {
    cuda::save(k, partial), cuda::save(v, partial + PARTIAL<T, D>);
  }
  DK_DEVICE void add(const float* partial, const Lane&) {
    add_saved(k, partial), add_saved(v, partial + PARTIAL<T, D>);
  }
  DK_DEVICE void finish(const Params& p, const DevicePlan<KEY_GROUP>& plan, int32_t tile, int64_t bh, uint32_t memory,
                        const Lane& lane) const {
    const float scale[2] = {p.a.forward.scale, p.a.forward.scale}, one[2] = {1.0f, 1.0f};
    write_rows<T>(p, k, scale, memory, plan, tile, matrix<T>(p, p.a.grad_k, p.a.grad_k_strides, bh), lane);
    write_rows<T>(p, v, one, memory, plan, tile, matrix<T>(p, p.a.grad_v, p.a.grad_v_strides, bh), lane);
  }
};

template <class T, int D> DK_KERNEL(THREADS, (MIN_BLOCKS<T, D>)) grad_kv_kernel(DK_PARAM Params p) {
  using M = Memory<T, D, true>;
  const SparseAttentionArgs& f = p.a.forward;
  const Lane lane;
  const M memory;
  const DevicePlan<KEY_GROUP> plan(p.a.backward_plan);
  const WorkByHead work(p.backward_plan.items);
  const int64_t bh = work.bh;
  const auto item = plan.item(work.index);
  const Steps<KEY_GROUP> steps(plan, item.begin, item.end);

  const Matrix q = matrix<T>(p, f.q, f.q_strides, bh), grad_out = matrix<T>(p, p.a.grad_out, p.a.grad_out_strides, bh);
  const float* statistics = p.statistics + bh * f.n * STATISTICS_FLOATS;
  using Share = RowShare<M::W, COLUMNS, THREADS>;
  int32_t tokens[Share::COUNT], statistics_token = -1;   // thread i copies the statistics of column i
  const auto fetch = [&](int step) {
    const int32_t keys = steps.keys(step);
    DK_UNROLL_FOR (int i = 0; i < Share::COUNT; ++i) tokens[i] = plan.column(keys, Share::row(i));
    if (dev::tid() < COLUMNS) statistics_token = plan.column(keys, dev::tid());
  };
  const auto copy_step = [&](int step) {
    const uint32_t stage = memory.stage(step);
    copy<T, D, COLUMNS>(p, stage, q, tokens);
    copy<T, D, COLUMNS>(p, stage + M::STEP, grad_out, tokens);
    steps.copy_mask(stage + M::MASK, step);
    const bool valid = statistics_token >= 0;
    if (dev::tid() < COLUMNS)
      dev::cp_async16(stage + M::STATISTICS + dev::tid() * 16,
                      statistics + (valid ? statistics_token : 0) * STATISTICS_FLOATS, valid);
  };
  {
    int32_t rows[RowShare<M::W, TILE_ROWS, THREADS>::COUNT];
    fetch_rows<M::W>(plan, item.tile, rows);
    copy<T, D, TILE_ROWS>(p, memory.first, matrix<T>(p, f.k, f.k_strides, bh), rows);
    copy<T, D, TILE_ROWS>(p, memory.second, matrix<T>(p, f.v, f.v_strides, bh), rows);
  }
  steps.start(fetch, copy_step);

  const Operand < T, D, WORDS<T> == 1 && D<128> k(memory.first, lane);   // KEPT as far as registers allow
  const Operand < T, D, WORDS<T> == 1 && D<64> v(memory.second, lane);
  GradKV<T, D> grad;
  steps.run(fetch, copy_step, [&](int step) {
    const auto entry = steps.entry(step);
    const uint32_t live = entry.live_parts(lane.warp), stage = memory.stage(step);
    DK_UNROLL_FOR (int part = 0; part < COLUMNS / 16; ++part) {
      if (!(live >> part & 1)) continue;
      float s[2][4] = {}, d[2][4] = {};
      k.multiply(stage, 16 * part, lane, s);
      v.multiply(stage + M::STEP, 16 * part, lane, d);
      Statistics of_column[2][2];
      DK_UNROLL_FOR (int n = 0; n < 2; ++n)
        DK_UNROLL_FOR (int e = 0; e < 2; ++e) {
          const dev::u32x4 x = dev::lds16(stage + M::STATISTICS + (16 * part + 8 * n + 2 * lane.quad + e) * 16);
          of_column[n][e] = {dev::as_float(x.x), dev::as_float(x.y), dev::as_float(x.z)};
        }
      weigh(
          T{}, p, entry.mask < 0 ? 0 : stage + M::MASK + 64 * part, lane,
          [&](int n, int, int e) -> const Statistics& { return of_column[n][e]; }, s, d);
      grad.v.add(s, stage + M::STEP, 16 * part, lane);
      grad.k.add(d, stage, 16 * part, lane);
    }
  });
  if (item.partial < 0) grad.finish(p, plan, item.tile, bh, memory.first, lane);
  else grad.save(grad.partial(p, bh, item.partial), lane);
}

// -- sums the partial results of a split tile
template <template <class, int> class Grad, class T, int D, int GROUP>
DK_DEVICE void add_partials(const Params& p, const int32_t* packed, int64_t split_tiles) {
  const Lane lane;
  const DevicePlan<GROUP> plan(packed);
  const WorkByHead work(split_tiles);
  const auto split = plan.split_tile(work.index);
  Grad<T, D> grad;
  for (int i = 0; i < split.count; ++i) grad.add(grad.partial(p, work.bh, split.first + i), lane);
  grad.finish(p, plan, split.tile, work.bh, dev::smem_base(), lane);
}
template <class T, int D> DK_KERNEL(THREADS, 2) add_grad_q_kernel(DK_PARAM Params p) {
  add_partials<GradQ, T, D, QUERY_GROUP>(p, p.a.forward.plan, p.plan.split_tiles);
}
template <class T, int D> DK_KERNEL(THREADS, 2) add_grad_kv_kernel(DK_PARAM Params p) {
  add_partials<GradKV, T, D, KEY_GROUP>(p, p.a.backward_plan, p.backward_plan.split_tiles);
}

template <class T, int D> const char* run(const Params& p, void* stream) {
  const int64_t pairs = p.a.forward.batch * p.a.forward.heads;
  using ByQueries = Memory<T, D, false>;
  using ByKeys = Memory<T, D, true>;
  const auto launch = [&](const char* what, void (*kernel)(Params), int64_t blocks, uint32_t smem) {
    return dev::launch(what, kernel, {pairs * blocks}, THREADS, smem, stream, p);
  };
  const char* error = launch("sparse_attention_backward (dQ)", grad_q_kernel<T, D>, p.plan.items, ByQueries::TOTAL);
  if (!error)
    error =
        launch("sparse_attention_backward (sum of dQ)", add_grad_q_kernel<T, D>, p.plan.split_tiles, ByQueries::ROWS);
  if (!error)
    error = launch("sparse_attention_backward (dK, dV)", grad_kv_kernel<T, D>, p.backward_plan.items, ByKeys::TOTAL);
  if (!error)
    error = launch("sparse_attention_backward (sums of dK, dV)", add_grad_kv_kernel<T, D>, p.backward_plan.split_tiles,
                   ByKeys::ROWS);
  return error;
}

// Floats of each section of the scratch memory.
struct Scratch {
  int64_t statistics, partial_q, partial_kv = 0;
  Scratch(const SparseAttentionArgs& f, const PlanSizes& plan, const PlanSizes& backward_plan) {
    const int64_t pairs = f.batch * f.heads;
    statistics = pairs * f.n * STATISTICS_FLOATS;
    with_head_dim(f.head_dim, [&](auto d) {
      partial_q = pairs * plan.partials * GradQ<float, d>::FLOATS;
      partial_kv = pairs * backward_plan.partials * GradKV<float, d>::FLOATS;
      return nullptr;
    });
  }
};

}   // namespace

int64_t sparse_attention_backward_scratch(const SparseAttentionBackwardArgs& a, const PlanSizes& plan,
                                          const PlanSizes& backward_plan) {
  const Scratch scratch(a.forward, plan, backward_plan);
  return scratch.statistics + scratch.partial_q + scratch.partial_kv;
}

const char* sparse_attention_backward(const SparseAttentionBackwardArgs& a, const PlanSizes& plan,
                                      const PlanSizes& backward_plan, float* scratch, void* stream) {
  const SparseAttentionArgs& f = a.forward;
  const Scratch parts(f, plan, backward_plan);
  Params p{a,
           plan,
           backward_plan,
           scratch,
           scratch + parts.statistics,
           scratch + parts.statistics + parts.partial_q,
           f.scale * LOG2E,
           true};
  const auto aligned = [&](const void* x, const Strides& s) {
    return rows_aligned(x, s, f.head_dim, f.dtype == DType::float32 ? 4 : 2);
  };
  p.aligned = aligned(f.q, f.q_strides) && aligned(f.k, f.k_strides) && aligned(f.v, f.v_strides) &&
              aligned(f.out, f.out_strides) && aligned(a.grad_out, a.grad_out_strides) &&
              aligned(a.grad_q, a.grad_q_strides) && aligned(a.grad_k, a.grad_k_strides) &&
              aligned(a.grad_v, a.grad_v_strides);
  return with_head_dim(f.head_dim, [&](auto d) {
    if (f.dtype == DType::float32) return run<float, d>(p, stream);
    return with_element(f.dtype, [&](auto t) { return run<decltype(t), d>(p, stream); });
  });
}

}   // namespace dk::cuda
