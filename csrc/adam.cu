// Adam over every tensor of a network in one launch, which also leaves the 16-bit weights that the GEMMs read, and
// counts the step where a CUDA graph's replay finds it: on the device.
#include "adam.h"

#include <cmath>

#include "block.h"
#include "ticket.h"

namespace {

constexpr int N = 4;  // 16 bytes of each of p, g, m and v: with two such rounds, 8 loads in flight a thread
static_assert(ADAM_BLOCK % (THREADS * N) == 0, "whole vectors for every thread");

struct Constants {
  float lr, beta2, rest1, rest2, log1, log2, eps;  // 1 − β and log β of doubles: 1 − 0.999f is off by 1.3e-5 of it
  float growth, backoff, interval;
  bool step_is_float, move_scale;
};

// One block's part of one tensor, from its first element on.
template <class T>
struct Part {
  float *p, *m, *v;
  const float* g;
  T* copy;  // null for none
  int left;
};

template <class T>
__device__ __forceinline__ Part<T> part(const int64_t* table, const int64_t* blocks) {
  const int64_t *row = table + 6 * blocks[2 * blockIdx.x], first = blocks[2 * blockIdx.x + 1], left = row[5] - first;
  Part<T> a;
  a.p = reinterpret_cast<float*>(row[0]) + first, a.g = reinterpret_cast<const float*>(row[1]) + first;
  a.m = reinterpret_cast<float*>(row[2]) + first, a.v = reinterpret_cast<float*>(row[3]) + first;
  a.copy = row[4] ? reinterpret_cast<T*>(row[4]) + first : nullptr;
  a.left = int(left < ADAM_BLOCK ? left : ADAM_BLOCK);
  return a;
}

// K elements from `i` on.
template <int K, class T>
__device__ __forceinline__ void update(
    const Part<T>& a, int i, float rate, float root, float unscale, const Constants& k) {
  float p[K], g[K], m[K], v[K];
  load(a.g + i, g), load(a.m + i, m), load(a.v + i, v), load(a.p + i, p);
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const float grad = g[j] * unscale;
    m[j] += k.rest1 * (grad - m[j]);
    v[j] = v[j] * k.beta2 + k.rest2 * grad * grad;
    p[j] -= rate * (m[j] / (sqrtf(v[j]) * root + k.eps));
  }
  store(a.m + i, m), store(a.v + i, v), store(a.p + i, p);
  if (a.copy) store(a.copy + i, p);
}

// Scale, good steps and overflows after an update; with `move` as torch.amp.GradScaler.update moves them.
__device__ __forceinline__ void move_scale(float* scale, bool sound, const Constants& k) {
  float overflows = scale[2] + (sound ? 0 : 1);
  if (k.move_scale) {
    const float good = overflows == 0 ? scale[1] + 1 : 0, larger = scale[0] * k.growth;
    if (overflows > 0) scale[0] *= k.backoff;
    else if (good == k.interval && larger < INFINITY) scale[0] = larger;
    scale[1] = good == k.interval ? 0 : good;
    overflows = 0;
  }
  scale[2] = overflows;
}

// flags[1] ← 1 where any gradient is infinite or NaN.
// Tile: ADAM_BLOCK elements of one tensor.
// Bytes: 4 per element.
// Compares only.
// Beats a pass per tensor and a read-back by the host; only a float16 step, whose gradients are scaled, pays for it.
__global__ void __launch_bounds__(THREADS) overflow(const int64_t* table, const int64_t* blocks, int32_t* flags) {
  after_previous();
  const auto a = part<__half>(table, blocks);
  for (int i = threadIdx.x * N; i < a.left; i += THREADS * N) {
    bool sound = true;
    for (int j = i; j < i + N && j < a.left; ++j) sound &= fabsf(a.g[j]) < INFINITY;
    if (!sound) flags[1] = 1;  // whoever stores it, stores the same
  }
}

// m ← β1·m + (1−β1)·g; v ← β2·v + (1−β2)·g²; p ← p − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε); copy ← p in 16 bits.
// Tile: ADAM_BLOCK elements of one tensor. The last block to finish counts the step, and moves the loss scale.
// Bytes: 30 per element: p, m, v read and written, g read, the copy written.
// Computes in fp32; 1 − βᵗ as −expm1(t·log β), which loses nothing at small t.
// Beats one launch per tensor, and the cast of every weight that would follow.
template <class T>
__global__ void __launch_bounds__(THREADS, 4) adam_kernel(
    const int64_t* table, const int64_t* blocks, void* step, int32_t* flags, float* loss_scale, Constants k) {
  after_previous();
  const auto a = part<T>(table, blocks);
  const float before = k.step_is_float ? *static_cast<float*>(step) : float(*static_cast<int64_t*>(step));
  const float rate = k.lr / -expm1f((before + 1) * k.log1), root = 1 / sqrtf(-expm1f((before + 1) * k.log2));
  const float unscale = loss_scale ? 1 / *loss_scale : 1;
  const bool sound = !loss_scale || !flags[1];
  if (sound)
#pragma unroll
    for (int round = 0; round < ADAM_BLOCK / (THREADS * N); ++round) {
      const int i = (round * THREADS + threadIdx.x) * N;
      if (i + N <= a.left) update<N>(a, i, rate, root, unscale, k);
      else
#pragma unroll 1
        for (int j = i; j < a.left; ++j) update<1>(a, j, rate, root, unscale, k);
    }
  __shared__ int flag;
  if (!last_block(reinterpret_cast<unsigned*>(flags), gridDim.x, &flag) || threadIdx.x) return;
  if (sound && k.step_is_float) *static_cast<float*>(step) += 1;
  if (sound && !k.step_is_float) *static_cast<int64_t*>(step) += 1;
  if (loss_scale) move_scale(loss_scale, sound, k), flags[1] = 0;
}

}  // namespace

extern "C" cudaError_t adam(
    Stream stream, const int64_t* table, const int64_t* blocks, void* step, int32_t* flags,
    Maybe<float> loss_scale, int64_t programs, int64_t copy_dtype, int64_t step_is_float, int64_t move_scale,
    double lr, double beta1, double beta2, double eps, double growth, double backoff, double interval) {
  // log 0 as a number whose every multiple is 0 by exp
  const auto log_of = [](double beta) { return float(beta > 0 ? std::log(beta) : -1e9); };
  const Constants k = {float(lr), float(beta2), float(1 - beta1), float(1 - beta2), log_of(beta1), log_of(beta2),
                       float(eps), float(growth), float(backoff), float(interval), step_is_float != 0,
                       move_scale != 0};
  const dim3 grid(static_cast<unsigned>(programs));
  if (loss_scale.at)
    if (const auto error = launch(overflow, grid, THREADS, 0, stream, table, blocks, flags)) return error;
  return by_dtype(copy_dtype, [&]<class T>() {
    return launch(adam_kernel<T>, grid, THREADS, 0, stream, table, blocks, step, flags, loss_scale.at, k);
  });
}
