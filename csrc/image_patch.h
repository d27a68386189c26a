// The RGB ends: k4 s2 p1 convolutions between an image of 1, 3 or 4 channels (`high`, 2H × 2W) and a map of many
// (`low`, H × W). What the three kernels share: the box of low pixels a block owns, and the patch of image above it.
#pragma once

#include "image.h"
#include "mma.h"

constexpr int BOX_PIXELS = 256, MIN_BOX_WIDTH = 8, MAX_BOX_WIDTH = 32;

// Boxes of low pixels, a power of two wide, never of two images.
struct Boxes {
  int pixels, shift;  // of a box: how many at most, and log2 of its width
  int height, width;  // of the map
  int down, across;   // boxes of one image
  int64_t count;      // in all
};

// Where a box stands.
struct Box {
  int64_t image;
  int y, x, rows, columns;  // its first pixel, and how many there are before the map ends
};

inline Boxes image_boxes(int64_t images, int64_t height, int64_t width, int pixels = BOX_PIXELS) {
  Boxes b;
  b.pixels = pixels, b.shift = 3;
  while ((1 << b.shift) < width && (1 << b.shift) < MAX_BOX_WIDTH) ++b.shift;
  b.height = int(height), b.width = int(width);
  b.down = cdiv(b.height, pixels >> b.shift), b.across = cdiv(b.width, 1 << b.shift);
  b.count = images * b.down * b.across;
  return b;
}

// Blocks that fill the GPU `each` times an SM, or all there are to do; three on a host, so that its tests loop, unless
// they pick blocks.
inline unsigned resident_blocks(int64_t blocks, [[maybe_unused]] int each) {
#ifdef DCGAN_HOST
  const int64_t most = host::state.last_block == UINT64_MAX ? 3 : blocks;
#else
  int device = 0, processors = 132;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = int64_t(processors) * each;
#endif
  return unsigned(blocks < most ? blocks : most);
}

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }

__device__ __forceinline__ Box box_at(const Boxes& b, int64_t index) {
  const int within = int(index % (b.down * b.across));
  const int rows = b.pixels >> b.shift;
  Box box;
  box.image = index / (b.down * b.across);
  box.y = within / b.across * rows, box.x = within % b.across << b.shift;
  box.rows = least(b.height - box.y, rows), box.columns = least(b.width - box.x, 1 << b.shift);
  return box;
}

// The image above a box in shared memory, the convolution's padding included: row r and column c of the patch are row
// 2·y − 1 + r and column 2·x − 1 + c of the image, zero outside. A pixel's window is four runs of 4·C elements, one in
// each of four rows, from element 2·C·column on, which is even: 16-bit elements are read two at a time.
template <class T, int C>
struct Patch {
  static constexpr int SIDE = 2 * MAX_BOX_WIDTH + 2;                      // of the widest box, 32
  static constexpr int TALL = 2 * (BOX_PIXELS / MIN_BOX_WIDTH) + 2;       // of the narrowest, 8
  static constexpr int PIXELS = TALL * (2 * MIN_BOX_WIDTH + 2);
  static_assert(PIXELS >= (2 * (BOX_PIXELS / MAX_BOX_WIDTH) + 2) * SIDE, "boxes in between are squarer: smaller");
  static_assert(PIXELS >= 34 * 34 && C >= 1 && C <= 4);
  static constexpr int ELEMENTS = PIXELS * C;
  static_assert(ELEMENTS * sizeof(T) <= 19 << 10, "eight blocks per SM within 227 KB");

  alignas(VECTOR_BYTES) T at[ELEMENTS];

  __device__ static int pitch(const Boxes& b) { return (2 * (1 << b.shift) + 2) * C; }

  // Element of the window of pixel p of the box, without its tap.
  __device__ static int corner(const Boxes& b, int p) {
    return (p >> b.shift) * 2 * pitch(b) + (p & ((1 << b.shift) - 1)) * 2 * C;
  }

  // Element k = (ky·4 + kx)·C + c of a window.
  __device__ static int tap(const Boxes& b, int k) { return k / (4 * C) * pitch(b) + k % (4 * C); }

  // Fills the patch; a barrier must follow. `image` is (N, 2H, 2W, C) of `total` elements, read by 16-byte vectors.
  __device__ void load(const T* image, int64_t total, const Boxes& b, const Box& box) {
    constexpr int N = VECTOR_BYTES / sizeof(T);
    constexpr int UNIT = C == 4 ? 4 : C == 2 ? 2 : 1;  // what both sides can align
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int high = 2 * b.height, wide = 2 * b.width, row = pitch(b);
    const int first = box.x ? 0 : 1, last = least(row / C, wide + 1 - 2 * box.x);  // columns inside the image
    for (int r = warp; r < 2 * box.rows + 2; r += blockDim.x / WARP) {
      T* to = at + r * row;
      const int y = 2 * box.y - 1 + r;
      const bool inside = y >= 0 && y < high;
      const int from = inside ? first * C : row, until = inside ? last * C : row;
      for (int e = lane; e < from; e += WARP) to[e] = from_float<T>(0.f);
      for (int e = until + lane; e < row; e += WARP) to[e] = from_float<T>(0.f);
      if (!inside) continue;
      const int64_t start = ((box.image * high + y) * wide + 2 * box.x - 1) * C;  // of column 0 of the patch
      for (int64_t v = (start + from) / N + lane; v * N < start + until; v += WARP) {
        Vector<T, N> got;
        if (v * N + N <= total) {
          const uint4 raw = *reinterpret_cast<const uint4*>(image + v * N);
          memcpy(&got, &raw, VECTOR_BYTES);
        } else {
          for (int i = 0; i < N; ++i) got.at[i] = v * N + i < total ? image[v * N + i] : from_float<T>(0.f);
        }
        const int e = int(v * N - start);
#pragma unroll
        for (int i = 0; i < N; i += UNIT)
          if (e + i >= from && e + i < until) {
            Vector<T, UNIT> unit;
            for (int j = 0; j < UNIT; ++j) unit.at[j] = got.at[i + j];
            *reinterpret_cast<Vector<T, UNIT>*>(to + e + i) = unit;
          }
      }
    }
  }
};

// f.operator()<C>() with the image's channels as a constant.
template <class F>
cudaError_t by_image_channels(int64_t channels, F f) {
  switch (channels) {
    case 1: return f.template operator()<1>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    default: return cudaErrorInvalidValue;
  }
}
