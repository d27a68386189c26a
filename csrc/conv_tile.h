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

inline int log2_of(int64_t power) {
  int log = 0;
  while (int64_t(1) << log < power) ++log;
  return log;
}

inline ConvShape conv_shape(
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, bool transposed) {
  const int box_images = int(TILE_PIXELS / (box_height * box_width));
  return {
      int(images / groups), int(groups), int(height), int(width), int(into), int(out), box_images,
      log2_of(box_height), log2_of(box_width), cdiv(int(images / groups), box_images),
      cdiv(int(height), int(box_height)), cdiv(int(width), int(box_width)), transposed ? 4 : 1};
}

// A tile: its group and place among the group's, its first pixel, its first output channel. Neighbouring blocks have
// the same pixels, which L2 then reads once: first the columns, then the phases change.
struct ConvTile {
  int group, index;  // of the partials: box · phases + phase
  int column, phase;
  int n, h, w;  // n counts within the group
};

__device__ __forceinline__ ConvTile conv_tile(const ConvShape& s, int block, int columns) {
  const int wide = (s.out + columns - 1) / columns, pixels = block / (wide * s.phases), box = pixels % s.boxes();
  ConvTile tile;
  tile.column = block % wide * columns, tile.phase = block / wide % s.phases;
  tile.group = pixels / s.boxes(), tile.index = box * s.phases + tile.phase;
  tile.w = box % s.across << s.log_width, tile.h = box / s.across % s.down << s.log_height;
  tile.n = box / (s.across * s.down) * s.box_images;
  return tile;
}

// Where row r of a tile is in y, in pixels, or −1 where there is no such pixel in the picture or in the group.
__device__ __forceinline__ int64_t output_pixel(const ConvShape& s, const ConvTile& tile, int r) {
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

template <class T>
struct ConvOutput {
  T* y;
  float *values, *counts;  // null where y is activated
  float slope;
};

// A barrier of the block's first THREADS threads, or of all that have not ended.
template <int THREADS>
__device__ __forceinline__ void part_barrier() {
#ifdef DCGAN_HOST
  __syncthreads();
#else
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
#endif
}

// Statistics or activation of a block's accumulator, and its stores, by its first THREADS threads. A thread holds row
// `row` and row + 8, and MT − 1 times those 16 further, of columns column + 8j + 2t and the next, as mma and wgmma
// leave them. LINES warps stand above each other, this one at `line`. `sums` is shared memory for LINES + 1 rows of
// COLUMNS floats.
template <class T, int MT, int N, int COLUMNS, int LINES, int THREADS>
__device__ __forceinline__ void finish_tile(
    float (&d)[MT][N / 2], int row, int column, int line, const ConvShape& s, const ConvTile& tile,
    const ConvOutput<T>& out, float* sums) {
  const int t = threadIdx.x % 4, g = threadIdx.x % WARP / 4;
  int64_t pixel[MT][2];
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i) pixel[i / 2][i % 2] = output_pixel(s, tile, row + i / 2 * 16 + i % 2 * 8);

  if (out.values) {  // by their definitions, so that a large mean costs no digits: first the mean, then M2 about it
    float* const mean = sums + LINES * COLUMNS;
    const int count = tile_count(s, tile);
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
            if (pixel[i / 2][i % 2] >= 0) sum += pass ? off * off : x;
          }
#pragma unroll
          for (int by = 4; by < WARP; by *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
          if (!g) sums[line * COLUMNS + c] = sum;
        }
      part_barrier<THREADS>();
      for (int c = threadIdx.x; c < COLUMNS; c += THREADS) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < LINES; ++i) sum += sums[i * COLUMNS + c];
        if (!pass) sum /= float(count), mean[c] = sum;
        const int64_t at = (int64_t(pass * s.groups + tile.group) * s.boxes() * s.phases + tile.index) * s.out;
        if (tile.column + c < s.out) out.values[at + tile.column + c] = sum;
      }
      if (!pass && !threadIdx.x && !tile.column)
        out.counts[int64_t(tile.group) * s.boxes() * s.phases + tile.index] = float(count);
      part_barrier<THREADS>();
    }
  }
  static_assert(N % 32 == 0, "four column tiles make a thread's vectors");
#pragma unroll
  for (int i = 0; i < 2 * MT; ++i)
#pragma unroll
    for (int j = 0; j < N / 8; j += 4) {
      uint32_t p[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair[e] = d[i / 2][4 * (j + k) + i % 2 * 2 + e];
          if (!out.values) pair[e] = activate(pair[e], out.slope);
        }
        p[k] = pack(from_float<T>(pair[0]), from_float<T>(pair[1]));
      }
      quad_transpose(p, t);
      const int c = tile.column + column + 8 * (j + t);
      if (pixel[i / 2][i % 2] < 0 || c >= s.out) continue;
      uint4 vector;
      memcpy(&vector, p, VECTOR_BYTES);
      *reinterpret_cast<uint4*>(out.y + pixel[i / 2][i % 2] * s.out + c) = vector;
    }
}
