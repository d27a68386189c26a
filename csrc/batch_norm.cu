// Batch norm, forward and backward: docs/batch_norm.md derives what is computed here.
//
// The four kernels that touch the tensor share one plan: a thread has N neighbouring channels, 16 bytes of them, and
// walks down the rows of a tile, UNROLL loads in flight; per-channel numbers stay in its registers. What tiles leave is
// merged by two small kernels, in tile order.
#include "batch_norm.h"

#include "block.h"
#include "merge.h"

namespace {

// The memory plan: UNROLL loads per thread and registers for at least BLOCKS blocks per SM, so that each SM has 32 KB on
// their way, and enough blocks to hide that a block ends.
constexpr int UNROLL = 4, BLOCKS = 2;
static_assert(BLOCKS * THREADS * UNROLL * VECTOR_BYTES >= 32 << 10, "bytes in flight");
static_assert(BLOCKS * THREADS * 128 <= 64 << 10, "registers: 128 per thread at most");

constexpr int COLUMNS = 32;       // threads across the channels, at most: 512 bytes of a row
constexpr int MERGE_COLUMNS = 8;  // channels of a merging block: a sector of 32 bytes; 32 tiles at a time
static_assert(THREADS % COLUMNS == 0 && THREADS % MERGE_COLUMNS == 0, "whole lines of threads");

// The sizes of one launch. Offsets into tensors are 64 bits wide, so they may have more than 2^31 elements.
struct Sizes {
  int64_t rows;                  // pixels of a group
  int groups, tiles, tile_rows;  // tiles of a group, pixels of a tile
  int channels, columns;         // threads across them
};

// Where a thread works: its tile's first row (of the whole tensor) and number of rows, and its first channel.
struct Place {
  int group, tile, line, lines, rows, c;
  int64_t first;
  bool inside;  // of the channels; all threads take part in the barriers
};

template <int N>
__device__ __forceinline__ Place place(const Sizes& s) {
  Place p;
  p.group = blockIdx.x / s.tiles, p.tile = blockIdx.x % s.tiles;
  p.line = threadIdx.x / s.columns, p.lines = THREADS / s.columns;
  const int64_t row = int64_t(p.tile) * s.tile_rows;
  p.rows = int(s.rows - row < s.tile_rows ? s.rows - row : s.tile_rows);
  p.first = p.group * s.rows + row;
  p.c = (blockIdx.y * s.columns + threadIdx.x % s.columns) * N;
  p.inside = p.c < s.channels;
  return p;
}

// N of the per-channel numbers in row `row` of (rows, groups, channels).
template <int N>
__device__ __forceinline__ void per_channel(
    const float* from, int row, const Sizes& s, const Place& p, float (&to)[N]) {
  if (p.inside) load(from + int64_t(row * s.groups + p.group) * s.channels + p.c, to);
}

// values[row] of this tile and thread's channels.
template <int N>
__device__ __forceinline__ float* partial(float* values, int row, const Sizes& s, const Place& p) {
  return values + (int64_t(row * s.groups + p.group) * s.tiles + p.tile) * s.channels + p.c;
}

// Mean and M2 = Σ(y − mean)² of each channel of a tile.
// Tile: tile_rows pixels by columns · N channels of one group.
// Bytes: y once.
// Accumulates in fp32: UNROLL rows about their own mean, then Chan's merge down the thread's rows, then over the lines.
// Beats the library by nothing: for outputs of a library's GEMM, which has no epilogue of ours.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) statistics(const T* y, float* values, float* counts, Sizes s) {
  after_previous();
  const Place p = place<N>(s);
  float n = 0, mean[N] = {}, m2[N] = {};
  for (int r = p.line; r < p.rows; r += UNROLL * p.lines) {
    float x[UNROLL][N] = {};
    float here = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int row = r + u * p.lines;
      if (row < p.rows) {
        here += 1;
        if (p.inside) load(y + (p.first + row) * s.channels + p.c, x[u]);
      }
    }
    const float share = 1 / here, total = n + here, part = here / total;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) sum += x[u][i];  // zeros where there is no row
      const float centre = sum * share;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const float off = r + u * p.lines < p.rows ? x[u][i] - centre : 0;
        squares += off * off;
      }
      const float delta = centre - mean[i];
      mean[i] += delta * part;
      m2[i] += squares + delta * delta * n * part;
    }
    n = total;
  }
  float mine[2 * N + 1];
#pragma unroll
  for (int i = 0; i < N; ++i) mine[i] = mean[i], mine[N + i] = m2[i];
  mine[2 * N] = n;
  reduce_lines(mine, s.columns, [](float (&a)[2 * N + 1], const float (&b)[2 * N + 1]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float count = a[2 * N];
      chan(count, a[i], a[N + i], b[2 * N], b[i], b[N + i]);
    }
    a[2 * N] += b[2 * N];
  });
  if (p.line == 0 && p.inside) {
#pragma unroll
    for (int i = 0; i < N; ++i) mean[i] = mine[i], m2[i] = mine[N + i];
    store(partial<N>(values, 0, s, p), mean);
    store(partial<N>(values, 1, s, p), m2);
  }
  if (threadIdx.x == 0 && blockIdx.y == 0) counts[p.group * s.tiles + p.tile] = p.rows;
}

// mean, rstd, scale and shift of each group from its tiles; running ← (1 − momentum)·running + momentum·new.
// Tile: MERGE_COLUMNS channels, all groups in turn, since the running statistics move once per group, in order.
// Bytes: 8 per tile and channel, out of L2 as they were just written.
// Accumulates in fp32 by Chan's formula: each line its tiles in order, then over the lines.
// Beats the library by reading the partials and not the tensor, which is hundreds of times larger.
__global__ void __launch_bounds__(THREADS, BLOCKS) merge_statistics(
    const float* values, const float* counts, Norm norm, int64_t* tracked, float* state, int groups, int tiles,
    int channels) {
  after_previous();
  const int line = threadIdx.x / MERGE_COLUMNS, c = blockIdx.x * MERGE_COLUMNS + threadIdx.x % MERGE_COLUMNS;
  const bool inside = c < channels;
  const int64_t row = int64_t(groups) * channels;
  for (int group = 0; group < groups; ++group) {
    float mine[3] = {};  // n, mean, M2
#pragma unroll 4
    for (int tile = line; tile < tiles; tile += THREADS / MERGE_COLUMNS) {
      const int64_t at = int64_t(group * tiles + tile) * channels + c;
      if (inside)
        chan(mine[0], mine[1], mine[2], counts[group * tiles + tile], values[at], values[row * tiles + at]);
    }
    reduce_lines(mine, MERGE_COLUMNS, [](float (&a)[3], const float (&b)[3]) {
      chan(a[0], a[1], a[2], b[0], b[1], b[2]);
    });
    if (line || !inside) continue;
    settle_statistics(norm, state + int64_t(group) * channels + c, row, c, mine[0], mine[1], mine[2]);
  }
  if (tracked && blockIdx.x == 0 && threadIdx.x == 0) *tracked += groups;
}

// out = activation(scale·y + shift), by channel and group.
// Tile: tile_rows pixels by columns · N channels of one group.
// Bytes: y and out once, 16-byte vectors; scale and shift once per thread.
// Computes in fp32, rounded once.
// Beats the library's three kernels (statistics, apply, activation) by being the one that is left.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) apply(const T* y, const float* state, T* out, Sizes s, float slope) {
  after_previous();
  const Place p = place<N>(s);
  float scale[N], shift[N];
  per_channel(state, 2, s, p, scale);
  per_channel(state, 3, s, p, shift);
  if (!p.inside) return;
  for (int r = p.line; r < p.rows; r += UNROLL * p.lines) {
    float x[UNROLL][N];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (r + u * p.lines < p.rows) load(y + (p.first + r + u * p.lines) * s.channels + p.c, x[u]);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (r + u * p.lines >= p.rows) break;
#pragma unroll
      for (int i = 0; i < N; ++i) x[u][i] = activate(fmaf(x[u][i], scale[i], shift[i]), slope);
      store(out + (p.first + r + u * p.lines) * s.channels + p.c, x[u]);
    }
  }
}

// g = da·activation′(scale·y + shift); Σg and Σg·x̂ of the tile.
// Tile: tile_rows pixels by columns · N channels of one group.
// Bytes: da, y and g once, 16-byte vectors.
// Accumulates in fp32: each thread down its rows, then over the lines.
// Beats the library's two kernels (activation backward, then a reduction that reads both again) by one pass.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) activation_grad(
    const T* da, const T* y, const float* state, T* g, float* values, Sizes s, float slope) {
  after_previous();
  constexpr int ROWS = UNROLL / 2;  // of two tensors
  const Place p = place<N>(s);
  float mean[N], rstd[N], scale[N], shift[N], sums[2 * N] = {};
  per_channel(state, 0, s, p, mean);
  per_channel(state, 1, s, p, rstd);
  per_channel(state, 2, s, p, scale);
  per_channel(state, 3, s, p, shift);
  for (int r = p.line; p.inside && r < p.rows; r += ROWS * p.lines) {
    float raw[ROWS][N], grad[ROWS][N];
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const int64_t at = (p.first + r + u * p.lines) * s.channels + p.c;
      if (r + u * p.lines < p.rows) load(y + at, raw[u]), load(da + at, grad[u]);
    }
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      if (r + u * p.lines >= p.rows) break;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        grad[u][i] *= derivative(fmaf(raw[u][i], scale[i], shift[i]), slope);
        sums[i] += grad[u][i];
        sums[N + i] += grad[u][i] * ((raw[u][i] - mean[i]) * rstd[i]);
      }
      store(g + (p.first + r + u * p.lines) * s.channels + p.c, grad[u]);
    }
  }
  reduce_lines(sums, s.columns, add<2 * N>);
  if (p.line == 0 && p.inside) {
    float part[N];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < N; ++i) part[i] = sums[row * N + i];
      store(partial<N>(values, row, s, p), part);
    }
  }
}

// ∂weight = Σg·x̂ and ∂bias = Σg over all groups; Σg/n and Σg·x̂/n of each.
// Tile: MERGE_COLUMNS channels, all groups in turn.
// Bytes: 8 per tile and channel, out of L2.
// Accumulates in fp32: each line its tiles in order, then over the lines.
// Beats a second pass over the tensors, as merge_statistics does.
__global__ void __launch_bounds__(THREADS) merge_sums(
    const float* values, float* dweight, float* dbias, float* means, float rows, int groups, int tiles, int channels) {
  after_previous();
  const int line = threadIdx.x / MERGE_COLUMNS, c = blockIdx.x * MERGE_COLUMNS + threadIdx.x % MERGE_COLUMNS;
  const int64_t row = int64_t(groups) * channels;
  float total[2] = {};
  for (int group = 0; group < groups; ++group) {
    float mine[2] = {};
#pragma unroll 4
    for (int tile = line; tile < tiles; tile += THREADS / MERGE_COLUMNS) {
      const int64_t at = int64_t(group * tiles + tile) * channels + c;
      if (c < channels) mine[0] += values[at], mine[1] += values[row * tiles + at];
    }
    reduce_lines(mine, MERGE_COLUMNS, add<2>);
    if (line || c >= channels) continue;
    float* to = means + int64_t(group) * channels + c;
    to[0] = mine[0] / rows, to[row] = mine[1] / rows;
    add(total, mine);
  }
  if (line == 0 && c < channels) dbias[c] = total[0], dweight[c] = total[1];
}

// dy = scale·(g − mean(g) − x̂·mean(g·x̂)), by channel and group.
// Tile: tile_rows pixels by columns · N channels of one group.
// Bytes: g, y and dy once, 16-byte vectors.
// Computes in fp32, rounded once.
// Beats the library by one read of both tensors: the sums are there already.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, BLOCKS) apply_grad(
    const T* g, const T* y, const float* state, const float* means, T* dy, Sizes s) {
  after_previous();
  constexpr int ROWS = UNROLL / 2;  // of two tensors
  const Place p = place<N>(s);
  float mean[N], rstd[N], scale[N], mean_g[N], mean_gx[N];
  per_channel(state, 0, s, p, mean);
  per_channel(state, 1, s, p, rstd);
  per_channel(state, 2, s, p, scale);
  per_channel(means, 0, s, p, mean_g);
  per_channel(means, 1, s, p, mean_gx);
  if (!p.inside) return;
  for (int r = p.line; r < p.rows; r += ROWS * p.lines) {
    float raw[ROWS][N], grad[ROWS][N];
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      const int64_t at = (p.first + r + u * p.lines) * s.channels + p.c;
      if (r + u * p.lines < p.rows) load(y + at, raw[u]), load(g + at, grad[u]);
    }
#pragma unroll
    for (int u = 0; u < ROWS; ++u) {
      if (r + u * p.lines >= p.rows) break;
#pragma unroll
      for (int i = 0; i < N; ++i)
        grad[u][i] = scale[i] * fmaf((mean[i] - raw[u][i]) * rstd[i], mean_gx[i], grad[u][i] - mean_g[i]);
      store(dy + (p.first + r + u * p.lines) * s.channels + p.c, grad[u]);
    }
  }
}

// f.operator()<T, N>(sizes, grid) for a tensor of this dtype and these channels.
template <class F>
cudaError_t over_tiles(
    int64_t dtype, int64_t rows, int64_t groups, int64_t channels, int64_t tile_rows, F f) {
  return by_dtype(dtype, [&]<class T>() {
    const bool wide = channels % WIDE<T> == 0;
    const int64_t vectors = wide ? channels / WIDE<T> : channels;
    Sizes s = {rows, int(groups), int(cdiv(rows, tile_rows)), int(tile_rows), int(channels), 1};
    while (s.columns < vectors && s.columns < COLUMNS) s.columns *= 2;
    const dim3 grid(unsigned(groups * s.tiles), unsigned(cdiv(vectors, int64_t(s.columns))));
    return wide ? f.template operator()<T, WIDE<T>>(s, grid) : f.template operator()<T, 1>(s, grid);
  });
}

dim3 merge_grid(int64_t channels) { return dim3(unsigned(cdiv(channels, int64_t(MERGE_COLUMNS)))); }

}  // namespace

extern "C" {

cudaError_t bn_statistics(
    Stream stream, const void* y, float* values, float* counts, int64_t dtype, int64_t rows, int64_t groups,
    int64_t channels, int64_t tile_rows) {
  return over_tiles(dtype, rows, groups, channels, tile_rows, [&]<class T, int N>(Sizes s, dim3 grid) {
    return launch(statistics<T, N>, grid, THREADS, 0, stream, static_cast<const T*>(y), values, counts, s);
  });
}

cudaError_t bn_merge_statistics(
    Stream stream, const float* values, const float* counts, const float* weight, const float* bias,
    Maybe<float> running_mean, Maybe<float> running_var, Maybe<int64_t> tracked, float* state, int64_t groups,
    int64_t tiles, int64_t channels, double eps, double momentum) {
  return launch(
      merge_statistics, merge_grid(channels), THREADS, 0, stream, values, counts,
      Norm{weight, bias, running_mean.at, running_var.at, float(eps), float(momentum)}, tracked.at, state, int(groups),
      int(tiles), int(channels));
}

cudaError_t bn_apply(
    Stream stream, const void* y, const float* state, void* out, int64_t dtype, int64_t rows, int64_t groups,
    int64_t channels, int64_t tile_rows, double slope) {
  return over_tiles(dtype, rows, groups, channels, tile_rows, [&]<class T, int N>(Sizes s, dim3 grid) {
    return launch(
        apply<T, N>, grid, THREADS, 0, stream, static_cast<const T*>(y), state, static_cast<T*>(out), s, float(slope));
  });
}

cudaError_t bn_activation_grad(
    Stream stream, const void* da, const void* y, const float* state, void* g, float* values, int64_t dtype,
    int64_t rows, int64_t groups, int64_t channels, int64_t tile_rows, double slope) {
  return over_tiles(dtype, rows, groups, channels, tile_rows, [&]<class T, int N>(Sizes s, dim3 grid) {
    return launch(
        activation_grad<T, N>, grid, THREADS, 0, stream, static_cast<const T*>(da), static_cast<const T*>(y), state,
        static_cast<T*>(g), values, s, float(slope));
  });
}

cudaError_t bn_merge_sums(
    Stream stream, const float* values, float* dweight, float* dbias, float* means, int64_t rows, int64_t groups,
    int64_t tiles, int64_t channels) {
  return launch(
      merge_sums, merge_grid(channels), THREADS, 0, stream, values, dweight, dbias, means, float(rows), int(groups),
      int(tiles), int(channels));
}

cudaError_t bn_apply_grad(
    Stream stream, const void* g, const void* y, const float* state, const float* means, void* dy, int64_t dtype,
    int64_t rows, int64_t groups, int64_t channels, int64_t tile_rows) {
  return over_tiles(dtype, rows, groups, channels, tile_rows, [&]<class T, int N>(Sizes s, dim3 grid) {
    return launch(
        apply_grad<T, N>, grid, THREADS, 0, stream, static_cast<const T*>(g), static_cast<const T*>(y), state, means,
        static_cast<T*>(dy), s);
  });
}
}
