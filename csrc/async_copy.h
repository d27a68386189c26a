// Ampere's copies past the registers and its fragment loads: cp.async and ldmatrix, from sm_80 on. Shared memory is
// addressed as in tma.h: rows of 128 bytes in the 128-byte swizzle, which also spreads ldmatrix over all banks.
#pragma once

#include "tma.h"

// 16 bytes from `from` to a shared address, or zeros where there is nothing to copy.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
#ifdef DCGAN_HOST
  unsigned char* const at = host::state.shared + to;
  host::poison(at, VECTOR_BYTES);
  host::hand_on(host::state.self().copies, [=] {
    if (there) memcpy(at, from, VECTOR_BYTES);
    else memset(at, 0, VECTOR_BYTES);
  });
#else
  const int bytes = there ? VECTOR_BYTES : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#ifdef DCGAN_HOST
  host::state.self().copies.commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but this thread's last PENDING commits have arrived.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#ifdef DCGAN_HOST
  host::state.self().copies.wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Four 8×8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8. Thread (g, t) gets of each elements 2t
// and 2t + 1 of row g, or with TRANSPOSED those of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
#ifdef DCGAN_HOST
  struct Parts {
    uint32_t at[4];
  };
  const Parts parts = host::warp_collective<Parts>(0xffffffffu, address, [](const uint32_t* const* in, Parts** out) {
    for (int lane = 0; lane < WARP; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (int e = 0; e < 2; ++e) {
          const int row = TRANSPOSED ? lane % 4 * 2 + e : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + e;
          uint16_t bits;
          memcpy(&bits, host::state.shared + *in[8 * m + row] + 2 * column, 2);
          pair |= uint32_t(bits) << 16 * e;
        }
        out[lane]->at[m] = pair;
      }
  });
  for (int m = 0; m < 4; ++m) to[m] = parts.at[m];
#else
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
#endif
}
