// What every family of kernels shares: types, vectors, launches. Compiles for GPUs with nvcc, and with DCGAN_HOST as
// plain C++ against host.h, which runs the same sources on a CPU for the tests.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef DCGAN_HOST
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

// Blocks of a launch, and how many neighbours along x make a cluster (sm_90 on): it divides them.
struct Grid {
  dim3 blocks;
  unsigned cluster;
  Grid(dim3 blocks, unsigned cluster = 1) : blocks(blocks), cluster(cluster) {}
  Grid(unsigned blocks, unsigned cluster = 1) : blocks(blocks), cluster(cluster) {}
};

// Where a launch goes; `dependent`: it may begin before the one before it has ended (kernels/dependent.py; sm_90 on).
struct Stream {
  cudaStream_t at;
  bool dependent;
};

// kernel<<<grid, block, shared, stream>>>(arguments...) as a function, since host.h has no chevrons.
#ifdef DCGAN_HOST
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), Grid grid, dim3 block, size_t shared, Stream stream, A... arguments) {
  const auto body = [&] { kernel(P(arguments)...); };
  return host::launch(body, grid.blocks, grid.cluster, block, shared, stream.at, stream.dependent);
}
#else
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), Grid grid, dim3 block, size_t shared, Stream stream, A... arguments) {
  if (shared > 48 << 10) {  // beyond the default limit, by request only (programming guide, "shared memory")
    const auto error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream.at;
  config.attrs = attributes;
  if (grid.cluster > 1) {
    auto& clusters = attributes[config.numAttrs++];
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim.x = grid.cluster, clusters.val.clusterDim.y = clusters.val.clusterDim.z = 1;
  }
  // A kernel that the driver makes from the PTX of an older architecture does not wait, so it must not begin early.
  cudaFuncAttributes compiled = {};
  if (stream.dependent)
    if (const auto error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel))) return error;
  if (compiled.ptxVersion >= 90) {
    auto& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, P(arguments)...);
}

// The block's dynamic shared memory, as `unsigned char* name`.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

// What every kernel does before it reads or writes memory that others see: wait for the launch before it, which may still
// run, and let the next one begin (kernels/dependent.py). Nothing to wait for where the launch is not a dependent one.
__device__ __forceinline__ void after_previous() {
#ifdef DCGAN_HOST
  host::after_previous();
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A pointer that may be null: an optional tensor of the op. It is passed as a plain pointer is.
template <class T>
struct Maybe {
  T* at;
};

constexpr int WARP = 32;
constexpr int VECTOR_BYTES = 16;  // the widest load of a thread

// The codes of `dtype` arguments, as in kernels/_cuda/launch.py.
enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// f.operator()<T>() with the element type of a code.
template <class F>
cudaError_t by_dtype(int64_t dtype, F f) {
  switch (dtype) {
    case FLOAT32: return f.template operator()<float>();
    case FLOAT16: return f.template operator()<__half>();
    case BFLOAT16: return f.template operator()<__nv_bfloat16>();
    default: return cudaErrorInvalidValue;
  }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// N elements in one access: 16 bytes, or a single element where channels leave rows unaligned.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <class T>
constexpr int WIDE = VECTOR_BYTES / sizeof(T);

// N elements from `from`, which is aligned to N of them or to 16 bytes, as floats.
template <int N, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  constexpr int ONCE = N < WIDE<T> ? N : WIDE<T>;
#pragma unroll
  for (int i = 0; i < N; i += ONCE) {
    const auto v = *reinterpret_cast<const Vector<T, ONCE>*>(from + i);
#pragma unroll
    for (int j = 0; j < ONCE; ++j) to[i + j] = to_float(v.at[j]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  constexpr int ONCE = N < WIDE<T> ? N : WIDE<T>;
#pragma unroll
  for (int i = 0; i < N; i += ONCE) {
    Vector<T, ONCE> v;
#pragma unroll
    for (int j = 0; j < ONCE; ++j) v.at[j] = from_float<T>(from[i + j]);
    *reinterpret_cast<Vector<T, ONCE>*>(to + i) = v;
  }
}

// (Leaky) ReLU by its slope below zero: 1 is none, 0 is ReLU (which −inf · 0 must not reach).
__device__ __forceinline__ float activate(float z, float slope) {
  if (z > 0) return z;
  return slope != 0 ? slope * z : z < 0 ? 0.f : z;
}

// Its derivative; at 0 the left one, as in PyTorch.
__device__ __forceinline__ float derivative(float z, float slope) { return z > 0 ? 1.f : slope; }

template <class T>
constexpr T cdiv(T a, T b) {
  return (a + b - 1) / b;
}

inline int log2_of(int64_t power) {
  int log = 0;
  while (int64_t(1) << log < power) ++log;
  return log;
}
