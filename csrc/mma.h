// One warp's 16×8×16 product on the tensor cores: mma.sync.m16n8k16, from sm_80 on. The fragments, with g = lane / 4
// and t = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"):
//
//   a (16, 16), row-major: a[0] = (g, 2t..2t+1), a[1] = (g + 8, 2t..), a[2] = (g, 2t+8..), a[3] = (g + 8, 2t+8..)
//   b (16, 8):             b[0] = (2t..2t+1, g), b[1] = (2t+8..2t+9, g)
//   d (16, 8) fp32:        d[0..1] = (g, 2t..2t+1), d[2..3] = (g + 8, 2t..2t+1)
//
// A register holds two elements, the first in its low half. What k stands for is the caller's choice, as long as a and
// b agree: the kernels number k, and the columns n, so that each thread's loads and stores are whole vectors.
#pragma once

#include "common.h"

// One of the two 16-bit elements that a register holds.
template <class T>
__device__ __forceinline__ float element(uint32_t pair, int half) {
  const uint16_t bits = uint16_t(pair >> 16 * half);
  T x;
  memcpy(&x, &bits, 2);
  return to_float(x);
}

// d += a · b, of T = __half or __nv_bfloat16.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "16-bit operands");
#ifdef DCGAN_HOST
  struct Operands {
    uint32_t a[4], b[2];
  };
  struct Product {
    float at[4];
  };
  const Product p = host::warp_collective<Product>(
      0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
      [](const Operands* const* in, Product** out) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < WARP; ++lane) {
          const int g = lane / 4, t = lane % 4;
          for (int half = 0; half < 2; ++half) {
            for (int r = 0; r < 4; ++r) left[g + r % 2 * 8][2 * t + r / 2 * 8 + half] = element<T>(in[lane]->a[r], half);
            for (int r = 0; r < 2; ++r) right[2 * t + r * 8 + half][g] = element<T>(in[lane]->b[r], half);
          }
        }
        for (int lane = 0; lane < WARP; ++lane)
          for (int i = 0; i < 4; ++i) {
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
            out[lane]->at[i] = sum;
          }
      });
  for (int i = 0; i < 4; ++i) d[i] += p.at[i];
#else
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two neighbouring 16-bit elements, as a fragment's register holds them; `from` is on a 4-byte boundary.
template <class T>
__device__ __forceinline__ uint32_t pair_at(const T* from) {
  return *reinterpret_cast<const uint32_t*>(from);
}

template <class T>
__device__ __forceinline__ uint32_t pack(T low, T high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, 2);
  memcpy(&bits[1], &high, 2);
  return bits[0] | uint32_t(bits[1]) << 16;
}

// The low, or the high, halves of two registers: (a.lo, b.lo) or (a.hi, b.hi).
__device__ __forceinline__ uint32_t halves(uint32_t a, uint32_t b, bool high) {
#ifdef DCGAN_HOST
  return high ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
#else
  return __byte_perm(a, b, high ? 0x7632 : 0x5410);
#endif
}
