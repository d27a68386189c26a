// What a block's threads do together: sums and merges in a fixed order, so that the same bits come out each run.
#pragma once

#include "common.h"

constexpr int THREADS = 256;  // of every block here
constexpr int WARPS = THREADS / WARP;
static_assert(THREADS % WARP == 0 && WARPS <= WARP, "block_sum adds the warps' sums in one warp");

// Threads stand in `columns` of THREADS / columns lines, thread = line · columns + column; `combine(mine, theirs)`
// joins what two lines hold, halving the lines until line 0 has it all. Both counts are powers of two.
template <int M, class Combine>
__device__ __forceinline__ void reduce_lines(float (&mine)[M], int columns, Combine combine) {
  __shared__ float theirs[M][THREADS];
  static_assert(sizeof(theirs) <= 48 << 10, "static shared memory");
  const int thread = threadIdx.x, line = thread / columns;
  for (int half = THREADS / columns / 2; half; half /= 2) {
    if (line >= half && line < 2 * half)
#pragma unroll
      for (int i = 0; i < M; ++i) theirs[i][thread - half * columns] = mine[i];
    __syncthreads();
    if (line < half) {
      float other[M];
#pragma unroll
      for (int i = 0; i < M; ++i) other[i] = theirs[i][thread];
      combine(mine, other);
    }
    __syncthreads();
  }
}

template <int M>
__device__ __forceinline__ void add(float (&mine)[M], const float (&theirs)[M]) {
#pragma unroll
  for (int i = 0; i < M; ++i) mine[i] += theirs[i];
}

// The sum over the block, in every thread.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[WARPS];
  for (int by = WARP / 2; by; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  __syncthreads();  // the sum before this one has been read
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total += sums[warp];
  return total;
}
