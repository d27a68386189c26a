// wgmma: the product of a warpgroup's 64 rows, the left operand in registers, the right one in swizzled shared memory
// (see tma.h), on sm_90a.
//
// a is (64, 16): each warp has the fragment of its 16 rows, laid out as mma.h has it. b is (16, N), n contiguous or k
// contiguous, by a descriptor (PTX ISA, "Matrix descriptor" and "Strides"). Thread i of the warpgroup gets rows
// 16·(i / 32) + i % 32 / 4 (and that + 8) and columns 8j + 2·(i % 4) (and that + 1): d[4j..4j+1] of the first row,
// d[4j+2..4j+3] of the second.
#pragma once

#include "async_copy.h"
#include "mma.h"

// What wgmma calls a matrix: where it starts, and how far its next atoms are. A K-major operand, whose rows of 128
// bytes run along k, has only `stride`, from eight rows to the next. An MN-major one, whose rows run along m or n, has
// it from eight k to the next, and `leading` from 64 m or n to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t stride, uint32_t leading = 16) {
  constexpr uint64_t SWIZZLE_128 = 1;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         SWIZZLE_128 << 62;
}

#ifdef DCGAN_HOST
// Element (mn, k) of the matrix that a descriptor names.
template <class T>
float described(uint64_t descriptor, bool mn_major, int mn, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t within = mn_major ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * ROW_BYTES
                                   : mn / 8 * stride + mn % 8 * ROW_BYTES + k * 2;
  T x;
  memcpy(&x, host::state.shared + swizzled(start + within), sizeof(T));
  return to_float(x);
}
#endif

// Before a wgmma, whose registers may then not be touched, nor its operands overwritten, until the wait.
__device__ __forceinline__ void wgmma_fence() {
#ifndef DCGAN_HOST
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef DCGAN_HOST
  host::state.self().products.commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all but the last PENDING commits are done.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
#ifdef DCGAN_HOST
  host::state.self().products.wait(PENDING);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// A warpgroup takes more registers from the block's share, or gives some back.
template <int REGISTERS, bool MORE>
__device__ __forceinline__ void share_registers() {
#ifndef DCGAN_HOST
  if constexpr (MORE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#endif
}

#ifndef DCGAN_HOST
// clang-format off
#define OUT_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUT_32(i) OUT_8(i), OUT_8(i + 8), OUT_8(i + 16), OUT_8(i + 24)
#define OUT_64(i) OUT_32(i), OUT_32(i + 32)
#define NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n, type, names, a0, a1, a2, a3, b_at, major_at, ...)                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, "                      \
               "{%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_at ", 1, 1, 1, %" major_at ";"                          \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(MN_MAJOR_B)))
#define WGMMA_OF(type)                                                                          \
  if constexpr (N == 64) WGMMA("64", type, NAMES_32, "32", "33", "34", "35", "36", "37", OUT_32(0)); \
  else WGMMA("128", type, NAMES_64, "64", "65", "66", "67", "68", "69", OUT_64(0));
// clang-format on
#endif

// d += a · b for k = 16. `a` is the fragment that `load_matrices` makes of a warp's 16 rows; `b` the descriptor of this
// step's part.
template <class T, int N, bool MN_MAJOR_B>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {
  static_assert(N == 64 || N == 128);
#ifdef DCGAN_HOST
  struct Operands {
    uint32_t a[4];
    uint64_t b;
  };
  struct Product {
    float at[N / 2];
  };
  host::hand_on(host::state.self().products, [&d, &a, b] {  // reads registers and shared memory when it runs
    const Product p = host::warp_collective<Product>(
        0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, b}, [](const Operands* const* in, Product** out) {
          float left[16][16], right[16][N];
          for (int lane = 0; lane < WARP; ++lane)
            for (int r = 0; r < 4; ++r)
              for (int half = 0; half < 2; ++half)
                left[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + half] = element<T>(in[lane]->a[r], half);
          for (int k = 0; k < 16; ++k)
            for (int n = 0; n < N; ++n) right[k][n] = described<T>(in[0]->b, MN_MAJOR_B, n, k);
          float sums[16][N] = {};
          for (int row = 0; row < 16; ++row)
            for (int k = 0; k < 16; ++k)
              for (int n = 0; n < N; ++n) sums[row][n] += left[row][k] * right[k][n];
          for (int lane = 0; lane < WARP; ++lane)
            for (int i = 0; i < N / 2; ++i)
              out[lane]->at[i] = sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
        });
    for (int i = 0; i < N / 2; ++i) d[i] += p.at[i];
  });
#else
  if constexpr (std::is_same_v<T, __half>) {
    WGMMA_OF("f16")
  } else {
    WGMMA_OF("bf16")
  }
#endif
}
