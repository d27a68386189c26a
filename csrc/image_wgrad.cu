// wgrad k4 s2 p1 between an image and many channels: the weight gradients of D's first layer and of G's last.
#include "image_patch.h"

namespace {

constexpr int THREADS = 128, WARPS = THREADS / WARP;
constexpr int BLOCK_CHANNELS = 64;  // a quad's row: eight threads of eight channels
constexpr int blocks_an_sm(int image_channels) { return image_channels == 4 ? 2 : 3; }  // what the registers allow

template <class T>
struct Arguments {
  const T *low, *high;
  float* shares;
  Boxes boxes;
  int64_t images;
  int channels;
};

// acc[i][j] += of sixteen pixels of a box, p on: element 16i + g (and + 8) of the window by channels 16t + 8e + j,
// e = 0 and 1. `low` is the box's first pixel at the block's first channel, of which `left` are to come.
template <class T, int C>
__device__ __forceinline__ void multiply(
    float (&acc)[C][8][4], const Patch<T, C>& patch, const Boxes& b, const Box& box, int p, const T* low,
    int64_t channels, int left) {
  const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    uint32_t v[4][4];  // thread (g, t): channels 8g.. of pixels 4t..4t+3, which lie in one row of the box
    const int y = (p + 4 * t) >> b.shift, x = (p + 4 * t) & ((1 << b.shift) - 1);
    int corners[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool here = y < box.rows && x + i < box.columns;
      const int64_t pixel = int64_t(y) * b.width + x + i;
      uint4 raw = {0, 0, 0, 0};
      if (here && 8 * g < left) raw = *reinterpret_cast<const uint4*>(low + pixel * channels + 8 * g);
      memcpy(v[i], &raw, VECTOR_BYTES);
      corners[i] = here ? patch.corner(b, p + 4 * t + i) : 0;
    }
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const int upper = patch.tap(b, 16 * i + g), lower = patch.tap(b, 16 * i + 8 + g);
      const T *c0 = patch.at + corners[0], *c1 = patch.at + corners[1];
      const T *c2 = patch.at + corners[2], *c3 = patch.at + corners[3];
      const uint32_t a[4] = {
          pack(c0[upper], c1[upper]), pack(c0[lower], c1[lower]),
          pack(c2[upper], c3[upper]), pack(c2[lower], c3[lower])};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t w[2] = {halves(v[0][j / 2], v[1][j / 2], j % 2), halves(v[2][j / 2], v[3][j / 2], j % 2)};
        mma<T>(acc[i][j], a, w);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const int y = (p + i) >> b.shift, x = (p + i) & ((1 << b.shift) - 1);
      if (y >= box.rows || x >= box.columns) continue;
      const float* const window = patch.at + patch.corner(b, p + i);
      const float* const from = low + (int64_t(y) * b.width + x) * channels + 16 * t;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float v[8] = {};
        if (16 * t + 8 * e < left) load(from + 8 * e, v);
#pragma unroll
        for (int m = 0; m < 2 * C; ++m) {
          const float tap = window[patch.tap(b, 8 * m + g)];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& sum = acc[m / 2][j][m % 2 * 2 + e];
            sum = fmaf(tap, v[j], sum);
          }
        }
      }
    }
  }
}

// shares[s,l,ky,kx,c] = Σ_{n,y,x of share s} low[n,y,x,l] · high[n,2y+ky−1,2x+kx−1,c].
//
// Tile: 64 low channels by all 16·C of a window; a block takes every gridDim.x-th box of pixels, the reduction.
// Bytes: low and high once, by 16-byte vectors, and high's rim again from L2; the shares, 4·16·C a channel and block.
// Accumulates in fp32: a warp its pixels in order, then the block its warps in order, then sum_shares the blocks.
// Beats the library's deterministic choice, which is not split and leaves most SMs idle for so small a gradient.
template <class T, int C>
__global__ void __launch_bounds__(THREADS, blocks_an_sm(C)) image_wgrad_kernel(Arguments<T> a) {
  __shared__ Patch<T, C> patch;
  __shared__ float total[BLOCK_CHANNELS * 16 * C];
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const int begin = blockIdx.y * BLOCK_CHANNELS, left = a.channels - begin;
  const int64_t elements = a.images * 4 * a.boxes.height * a.boxes.width * C;
  after_previous();

  float acc[C][8][4] = {};
  for (int64_t index = blockIdx.x; index < a.boxes.count; index += gridDim.x) {
    const Box box = box_at(a.boxes, index);
    patch.load(a.high, elements, a.boxes, box);
    __syncthreads();
    const int64_t pixel = (box.image * a.boxes.height + box.y) * a.boxes.width + box.x;
    const T* const low = a.low + pixel * a.channels + begin;
    for (int p = warp * 16; p >> a.boxes.shift < box.rows; p += WARPS * 16)
      multiply<T, C>(acc, patch, a.boxes, box, p, low, a.channels, left);
    __syncthreads();  // before the next box's patch
  }
  for (int turn = 0; turn < WARPS; ++turn) {
    if (warp == turn) {
#pragma unroll
      for (int i = 0; i < C; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float& sum = total[(16 * t + r % 2 * 8 + j) * 16 * C + 16 * i + r / 2 * 8 + g];
            sum = turn ? sum + acc[i][j][r] : acc[i][j][r];
          }
    }
    __syncthreads();
  }
  float* const share = a.shares + (int64_t(blockIdx.x) * a.channels + begin) * 16 * C;
  for (int i = threadIdx.x; i < least(left, BLOCK_CHANNELS) * 16 * C; i += THREADS) share[i] = total[i];
}

}  // namespace

cudaError_t image_wgrad(
    Stream stream, const void* low, const void* high, float* shares, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t image_channels, int64_t channels, int64_t split) {
  const Boxes boxes = image_boxes(images, height, width);
  return by_dtype(dtype, [&]<class T>() {
    const Arguments<T> a{
        static_cast<const T*>(low), static_cast<const T*>(high), shares, boxes, images, int(channels)};
    return by_image_channels(image_channels, [&]<int C>() {
      const dim3 grid(unsigned(split), cdiv(int(channels), BLOCK_CHANNELS));
      return launch(image_wgrad_kernel<T, C>, grid, THREADS, 0, stream, a);
    });
  });
}
