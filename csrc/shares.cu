// The shares of a weight gradient, added up.
#include "shares.h"

namespace {

constexpr int SUMMED = 32, PARTS = 8;  // elements of a block, and warps that share out the shares

// out[i] = Σ_s shares[s,i].
//
// Tile: 32 elements; a warp adds every eighth share in order, and one warp the eight sums in order.
// Bytes: 4·(split + 1) per element, out of L2, as the shares were just written.
// Accumulates in fp32, in an order that depends only on `split`.
// Beats float atomics, whose order differs from run to run.
__global__ void sum_shares_kernel(const float* shares, float* out, int64_t size, int64_t split) {
  after_previous();
  __shared__ float sums[PARTS][SUMMED];
  const int lane = threadIdx.x % SUMMED, part = threadIdx.x / SUMMED;
  const int64_t i = int64_t(blockIdx.x) * SUMMED + lane;
  float sum = 0;
  if (i < size) {
#pragma unroll 4
    for (int64_t s = part; s < split; s += PARTS) sum += shares[s * size + i];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part || i >= size) return;
  for (int other = 1; other < PARTS; ++other) sum += sums[other][lane];
  out[i] = sum;
}

}  // namespace

cudaError_t sum_shares(Stream stream, const float* shares, float* gradient, int64_t size, int64_t split) {
  const auto blocks = unsigned(cdiv<int64_t>(size, SUMMED));
  return launch(sum_shares_kernel, blocks, PARTS * SUMMED, 0, stream, shares, gradient, size, split);
}
