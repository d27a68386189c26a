// Hopper's asynchronous machinery: barriers in shared memory, boxes by TMA, and products of a warpgroup by wgmma. Each
// primitive is a line of PTX, and over host.h the same thing modelled after the PTX ISA, bit for bit of its addresses.
//
// Operand tiles have rows of 128 bytes, 64 elements, in the 128-byte swizzle: the number of a 16-byte chunk, bits 4 to
// 6 of its address, is xored with its row, bits 7 to 9. So tiles start at multiples of 1024 bytes. TMA writes it so,
// and wgmma reads it so.
#pragma once

#include "common.h"

#ifdef DCGAN_HOST
#define __grid_constant__

struct TensorMap {
  const unsigned char* base;
  int rank, element_bytes;
  int64_t sizes[5], strides[5];  // elements, bytes; innermost first
  int box[5];
};
#else
#include <cuda.h>

using TensorMap = CUtensorMap;
#endif

constexpr int MAX_RANK = 5;
constexpr int ROW_BYTES = 128, ATOM_BYTES = 1024;  // of the swizzle: a row, and eight rows

__device__ __forceinline__ uint32_t shared_address(const void* at) {
#ifdef DCGAN_HOST
  return uint32_t(static_cast<const unsigned char*>(at) - host::state.shared);
#else
  return uint32_t(__cvta_generic_to_shared(at));
#endif
}

__device__ __forceinline__ uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- mbarrier: a phase ends when all arrivals are in and all announced bytes have come; waits name its parity ----

#ifdef DCGAN_HOST
struct HostBarrier {  // in the barrier's 8 bytes
  int32_t bytes;
  uint16_t missing;
  uint8_t arrivals, phase;

  void settle() {
    if (!missing && !bytes) missing = arrivals, phase ^= 1;
  }
};
inline HostBarrier& host_barrier(uint64_t* barrier) { return *reinterpret_cast<HostBarrier*>(barrier); }
#endif

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
#ifdef DCGAN_HOST
  host_barrier(barrier) = {0, uint16_t(arrivals), uint8_t(arrivals), 0};
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// After barrier_init and before a __syncthreads, so that TMA sees the barriers.
__device__ __forceinline__ void barrier_init_fence() {
#ifndef DCGAN_HOST
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
#ifdef DCGAN_HOST
  auto& b = host_barrier(barrier);
  if (!b.missing) host::fail("more arrivals at a barrier than it was made for", __LINE__);
  --b.missing, b.settle();
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
#ifdef DCGAN_HOST
  host_barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity is over; that before the first counts as over, with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
#ifdef DCGAN_HOST
  auto& boxes = host::state.boxes;
  for (int turns = 0; host_barrier(barrier).phase == parity; ++turns) {
    if (turns == 1 << 14) host::fail("a barrier whose phase never ends", __LINE__);
    host::poll();
    const auto due = std::find_if(boxes.begin(), boxes.end(), [&](const auto& box) { return box.barrier == barrier; });
    if (due == boxes.end()) continue;
    const auto land = std::move(due->land);
    boxes.erase(due), land();
  }
#else
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ---- Clusters: blocks that run together and reach each other's shared memory, by the same offsets ----

__device__ __forceinline__ int cluster_rank() {
#ifdef DCGAN_HOST
  return host::state.rank;
#else
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// All threads of all of its blocks arrive, and then wait until all have. RELAXED orders no more than
// barrier_init_fence has: a release is a fence of the whole GPU.
template <bool RELAXED>
__device__ __forceinline__ void cluster_arrive() {
#ifndef DCGAN_HOST
  if constexpr (RELAXED) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef DCGAN_HOST
  host::state.self().state = host::Thread::AT_CLUSTER_BARRIER;
  host::yield();
#else
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// An arrival at the barrier's counterpart in block `rank`. It releases what was read, not what was written: to the whole
// cluster a release would be a fence of the whole GPU.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
#ifdef DCGAN_HOST
  barrier_arrive(host_peer(barrier, rank));
#else
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)), "r"(rank)
      : "memory");
#endif
}

// Fetches what TMA has to know of a tensor, ahead of its first box.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
#ifndef DCGAN_HOST
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// ---- TMA: a box of a tensor into shared memory, swizzled; what is outside of the tensor comes as zeros ----

#ifdef DCGAN_HOST
// Into the shared memory of each of the cluster's blocks from `first` to `last`, each element read once.
template <int RANK>
void host_load_box(
    void* to, const TensorMap& map, const int (&at)[RANK], uint64_t* barrier, int first, int last) {
  if (map.rank != RANK || map.element_bytes != 2 || shared_address(to) % ATOM_BYTES)
    host::fail("a box that its map does not describe", __LINE__);
  size_t count = 1;
  for (int d = 0; d < RANK; ++d) count *= map.box[d];
  std::vector<uint16_t> elements(count);
  for (size_t i = 0; i < count; ++i) {
    int64_t rest = int64_t(i), from = 0;
    bool inside = true;
    for (int d = 0; d < RANK; rest /= map.box[d++]) {
      const int64_t index = at[d] + rest % map.box[d];
      inside = inside && index >= 0 && index < map.sizes[d];
      from += index * map.strides[d];
    }
    elements[i] = inside ? *reinterpret_cast<const uint16_t*>(map.base + from) : 0;
  }
  const uint32_t start = shared_address(to);
  for (int rank = first; rank <= last; ++rank) {
    unsigned char* const shared = host::state.blocks[rank].shared;
    uint64_t* const signal = host_peer(barrier, rank);
    const auto land = [=] {
      for (size_t i = 0; i < elements.size(); ++i) memcpy(shared + swizzled(start + uint32_t(2 * i)), &elements[i], 2);
      auto& b = host_barrier(signal);
      b.bytes -= int32_t(2 * elements.size()), b.settle();
    };
    host::poison(shared + start, 2 * count);
    if (host::state.late) host::state.boxes.push_back({signal, land});
    else land();
  }
}
#endif

template <int RANK>
__device__ __forceinline__ void load_box(void* to, const TensorMap& map, const int (&at)[RANK], uint64_t* barrier) {
#ifdef DCGAN_HOST
  host_load_box(to, map, at, barrier, host::state.rank, host::state.rank);
#else
  const uint32_t shared = shared_address(to), signal = shared_address(barrier);
  if constexpr (RANK == 2)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 ::"r"(shared), "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]) : "memory");
  else if constexpr (RANK == 4)
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 ::"r"(shared), "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
  else
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(shared), "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
                 : "memory");
#endif
}

// To the same place in each of the `cluster` blocks, where it counts towards the barrier's counterparts.
template <int RANK>
__device__ __forceinline__ void load_box_to_all(
    void* to, const TensorMap& map, const int (&at)[RANK], uint64_t* barrier, int cluster) {
  static_assert(RANK == 2 || RANK == 4);
#ifdef DCGAN_HOST
  host_load_box(to, map, at, barrier, 0, cluster - 1);
#else
  const uint32_t shared = shared_address(to), signal = shared_address(barrier);
  const auto all = uint16_t((1 << cluster) - 1);
  if constexpr (RANK == 2)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(shared), "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "h"(all) : "memory");
  else
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
                 ::"r"(shared), "l"(&map), "r"(signal), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "h"(all)
                 : "memory");
#endif
}

// ---- On the host ----

// `base` seen as a tensor of these sizes, innermost first, read box by box of 128-byte rows.
template <class T>
cudaError_t make_map(
    TensorMap& map, const void* base, int rank, const int64_t (&sizes)[MAX_RANK], const int (&box)[MAX_RANK]) {
#ifdef DCGAN_HOST
  map = {static_cast<const unsigned char*>(base), rank, sizeof(T), {}, {}, {}};
  int64_t stride = sizeof(T);
  for (int d = 0; d < rank; stride *= sizes[d++])
    map.sizes[d] = sizes[d], map.strides[d] = stride, map.box[d] = box[d];
  return cudaSuccess;
#else
  using Encode = CUresult(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode* encode = nullptr;  // of the driver, which the extension does not link
  if (!encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return error;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode*>(found);
  }
  cuuint64_t extents[MAX_RANK], strides[MAX_RANK];
  cuuint32_t boxes[MAX_RANK], steps[MAX_RANK];
  cuuint64_t stride = sizeof(T);
  for (int d = 0; d < rank; ++d) {
    extents[d] = cuuint64_t(sizes[d]), boxes[d] = cuuint32_t(box[d]), steps[d] = 1;
    stride *= extents[d], strides[d] = stride;  // of the next dimension: the innermost's is not given
  }
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      &map, type, cuuint32_t(rank), const_cast<void*>(base), extents, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

// Whether a kernel was compiled empty, for 9.0 and not 9.0a: it then has not even the registers of its accumulator.
inline cudaError_t built_for_sm90a([[maybe_unused]] const void* kernel, [[maybe_unused]] int accumulators) {
#ifdef DCGAN_HOST
  return cudaSuccess;
#else
  cudaFuncAttributes found;
  const auto error = cudaFuncGetAttributes(&found, kernel);
  return error != cudaSuccess ? error : found.numRegs < accumulators ? cudaErrorNoKernelImageForDevice : cudaSuccess;
#endif
}
