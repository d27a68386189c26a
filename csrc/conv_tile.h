// What the tensor-core convolutions share: which tile a block owns, and what happens to its accumulator.
#pragma once

#include "conv.h"
#include "mma.h"

constexpr int TILE_PIXELS = 128;
constexpr int DEPTH = 64;  // channels of one tap multiplied at a time: 128 bytes

// Boxes of `box_images` × 2^log_height × 2^log_width low pixels, TILE_PIXELS in all, within one group of images.
struct ConvShape {
  int per_group, groups, height, width, into, out;
  int box_images, log_height, log_width;
  int deep, down, across;  // boxes of a group
  int phases;              // 1, or 4 of a transposed convolution

  __host__ __device__ int boxes() const { return deep * down * across; }
};

inline ConvShape conv_shape(
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, bool transposed) {
  const int box_images = int(TILE_PIXELS / (box_height * box_width));
  return {
      int(images / groups), int(groups), int(height), int(width), int(into), int(out), box_images,
      log2_of(box_height), log2_of(box_width), cdiv(int(images / groups), box_images),
      cdiv(int(height), int(box_height)), cdiv(int(width), int(box_width)), transposed ? 4 : 1};
}

// A tile: its group and place among the group's, its first pixel, its first output channel. The blocks of a cluster have
// boxes next to each other, and all else alike. Neighbouring clusters have the same pixels, which L2 then reads once:
// first the columns, then the phases change.
struct ConvTile {
  int group, index;  // of the partials: box · phases + phase
  int column, phase;
  int n, h, w;  // n counts within the group
};

__device__ __forceinline__ ConvTile conv_tile(const ConvShape& s, int block, int columns, int cluster = 1) {
  const int wide = (s.out + columns - 1) / columns, other = block / cluster;  // tile of a cluster's first block
  const int pixels = other / (wide * s.phases) * cluster + block % cluster, box = pixels % s.boxes();
  ConvTile tile;
  tile.column = other % wide * columns, tile.phase = other / wide % s.phases;
  tile.group = pixels / s.boxes(), tile.index = box * s.phases + tile.phase;
  tile.w = box % s.across << s.log_width, tile.h = box / s.across % s.down << s.log_height;
  tile.n = box / (s.across * s.down) * s.box_images;
  return tile;
}

// Which pixel of the box (w fastest, then h, then n) row r of a tile is: pixel r, but in boxes of 4×4 pixels.
//
// ldmatrix reads 16 bytes of each of eight rows. A pixel has 128 bytes, and the swizzle chooses the banks of its 16 by
// the pixel's index in shared memory mod 8: there is no conflict if all eight indices differ mod 8. In conv_sm90 the
// plane of a 4×4 box has rows of 5 pixels. Unpermuted, rows 0 to 7 would be its pixels 0 1 2 3, 5 6 7 8, where 0 and 8
// conflict. So bits 2 (lowest of h) and 6 (highest of n) of r change places:
//
//     bit of r       6  5  4  3  2  1  0
//     bit of pixel   h0 n1 n0 h1 n2 w1 w0      (in order: n2 n1 n0 h1 h0 w1 w0)
//
// Eight rows are then four pixels of an image and the same four of the fourth image after it, 4·5·5 = 100 further on:
// 100 mod 8 = 4, so they are indices i to i + 3 and i + 4 to i + 7 mod 8.
__device__ __forceinline__ int pixel_of_row(const ConvShape& s, int r) {
  return s.log_width == 2 && s.log_height == 2 ? (r & ~0x44) | (r >> 4 & 4) | (r & 4) << 4 : r;
}

// Where row r of a tile is in y, in pixels, or −1 where there is no such pixel in the picture or in the group.
__device__ __forceinline__ int64_t output_pixel(const ConvShape& s, const ConvTile& tile, int row) {
  const int r = pixel_of_row(s, row);
  const int w = tile.w + (r & ((1 << s.log_width) - 1)), h = tile.h + (r >> s.log_width & ((1 << s.log_height) - 1));
  const int n = tile.n + (r >> (s.log_width + s.log_height));
  if (n >= s.per_group || h >= s.height || w >= s.width) return -1;
  const int64_t image = int64_t(tile.group) * s.per_group + n;
  if (s.phases == 1) return (image * s.height + h) * s.width + w;
  return (image * 2 * s.height + 2 * h + tile.phase / 2) * 2 * s.width + 2 * w + tile.phase % 2;
}

// How many rows of a tile there are.
__device__ __forceinline__ int tile_count(const ConvShape& s, const ConvTile& tile) {
  const auto least = [](int a, int b) { return a < b ? a : b; };
  return least(s.per_group - tile.n, s.box_images) * least(s.height - tile.h, 1 << s.log_height) *
         least(s.width - tile.w, 1 << s.log_width);
}

// The four threads of a quad turn a 4×4 matrix around: p[j] of thread t becomes p[t] of thread j.
__device__ __forceinline__ void quad_transpose(uint32_t (&p)[4], int t) {
#pragma unroll
  for (int by = 1; by < 4; by *= 2)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & by) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, t & by ? p[j] : p[j + by], by);
      if (t & by) p[j] = got;
      else p[j + by] = got;
    }
}

// What becomes of the accumulator; without saved and values, the activation of this slope.
template <class T>
struct ConvOutput {
  T* y;
  const T* saved;      // of y's shape: times the activation's derivative at saved, or at state's affine of it
  const float* state;  // (4, groups, out)
  float* values;       // (2, groups, tiles, out): with state Σg and Σg·x̂ of each tile, else mean and M2
  float* counts;       // (groups, tiles): pixels of each tile, of mean and M2
  float slope;
};

// The sum of what the eight threads with the same columns hold; in each of them.
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int by = 4; by < WARP; by *= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

// The epilogue of a block's accumulator, by all of its THREADS threads. A thread holds row `row` and row + 8, and MT − 1
// times those STEP further, of columns column + 8j + 2t and the next, as mma and wgmma leave them. LINES warps stand
// above each other, this one at `line`. `sums` is shared memory for 2·LINES rows of COLUMNS floats.
template <class T, int MT, int STEP, int N, int COLUMNS, int LINES, int THREADS>
__device__ __forceinline__ void finish_tile(
    float (&d)[MT][N / 2], int row, int column, int line, const ConvShape& s, const ConvTile& tile,
    const ConvOutput<T>& out, float* sums) {
  static_assert(LINES > 1 && N % 32 == 0, "four column tiles make a thread's vectors");
  const int t = threadIdx.x % 4, g = threadIdx.x % WARP / 4;
  const int64_t tiles = int64_t(s.boxes()) * s.phases, plane = int64_t(s.groups) * s.out;  // of the state
  int64_t pixel[2 * MT];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) pixel[i] = output_pixel(s, tile, row + i / 2 * STEP + i % 2 * 8);

  // Column c of a tile's `which` sum: what the lines left, added in order.
  const auto add_lines = [&](int which, int c) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < LINES; ++i) sum += sums[(which * LINES + i) * COLUMNS + c];
    return sum;
  };
  const auto store_value = [&](int which, int c, float value) {
    if (tile.column + c < s.out)
      out.values[((which * s.groups + tile.group) * tiles + tile.index) * s.out + tile.column + c] = value;
  };

  if (out.values && !out.state) {  // by their definitions, so that a large mean costs no digits: the mean, then M2
    float* const mean = sums + LINES * COLUMNS;
    const float count = float(tile_count(s, tile));
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = column + 8 * j + 2 * t + e;
          float sum = 0;
#pragma unroll
          for (int i = 0; i < 2 * MT; ++i) {
            const float x = d[i / 2][4 * j + i % 2 * 2 + e], off = pass ? x - mean[c] : 0.f;
            if (pixel[i] >= 0) sum += pass ? off * off : x;
          }
          sum = column_sum(sum);
          if (!g) sums[line * COLUMNS + c] = sum;
        }
      __syncthreads();
      for (int c = threadIdx.x; c < COLUMNS; c += THREADS) {
        float sum = add_lines(0, c);
        if (!pass) sum /= count, mean[c] = sum;
        store_value(pass, c, sum);
      }
      if (!pass && !threadIdx.x && !tile.column) out.counts[tile.group * tiles + tile.index] = count;
      __syncthreads();
    }
  }

#pragma unroll
  for (int j = 0; j < N / 8; j += 4) {  // eight columns per thread: 8k + 2t + e of these four tiles; vectors are 8t + 2k + e
    const int vector = tile.column + column + 8 * (j + t);
    float g_sum[8] = {}, gx_sum[8] = {};
    uint32_t kept[2 * MT][4] = {};
    if (out.saved) {  // all at once: a store to y, which saved might be, would let no later load pass
#pragma unroll
      for (int i = 0; i < 2 * MT; ++i) {
        if (pixel[i] < 0 || vector >= s.out) continue;
        const uint4 found = *reinterpret_cast<const uint4*>(out.saved + pixel[i] * s.out + vector);
        memcpy(kept[i], &found, VECTOR_BYTES);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * MT; ++i) {
      const bool there = pixel[i] >= 0 && vector < s.out;
      const int64_t at = pixel[i] * s.out + vector;
      uint32_t(&p)[4] = kept[i];
      if (out.saved) quad_transpose(p, t);
      uint32_t q[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int pair_at = tile.column + column + 8 * (j + k) + 2 * t;
        const float* const state =
            out.state ? out.state + int64_t(tile.group) * s.out + (pair_at < s.out ? pair_at : 0) : nullptr;
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float x = d[i / 2][4 * (j + k) + i % 2 * 2 + e];
          const int c = 2 * k + e;
          if (out.state) {  // read again for each row, out of L1: all at once they would be 24 registers
            const float y = element<T>(p[k], e), z = y * state[2 * plane + e] + state[3 * plane + e];
            x = pixel[i] < 0 ? 0.f : x * derivative(z, out.slope);
            g_sum[c] += x, gx_sum[c] += x * (y - state[e]);
          } else if (out.saved) {
            x *= derivative(element<T>(p[k], e), out.slope);
          } else if (!out.values) {
            x = activate(x, out.slope);
          }
          pair[e] = x;
        }
        q[k] = pack(from_float<T>(pair[0]), from_float<T>(pair[1]));
      }
      quad_transpose(q, t);
      if (!there) continue;
      uint4 stored;
      memcpy(&stored, q, VECTOR_BYTES);
      *reinterpret_cast<uint4*>(out.y + at) = stored;
    }
    if (out.state)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int c = column + 8 * (j + i / 2) + 2 * t + i % 2;
        const float g_all = column_sum(g_sum[i]), gx_all = column_sum(gx_sum[i]);  // the latter yet to be times rstd
        if (!g) sums[line * COLUMNS + c] = g_all, sums[(LINES + line) * COLUMNS + c] = gx_all;
      }
  }
  if (out.state) {
    __syncthreads();
    for (int c = threadIdx.x; c < COLUMNS; c += THREADS) {
      if (tile.column + c >= s.out) continue;
      const float rstd = out.state[(int64_t(s.groups) + tile.group) * s.out + tile.column + c];
      store_value(0, c, add_lines(0, c)), store_value(1, c, rstd * add_lines(1, c));
    }
  }
}
