// conv k4 s2 p1 from an image to many channels: D's first layer, and the data gradient of G's last.
#include "image_patch.h"

namespace {

enum Mode { ACTIVATION, ACTIVATION_GRAD, BATCH_NORM_GRAD };

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int WARP_CHANNELS = 32, BLOCK_CHANNELS = 64;       // two warps side by side
constexpr int COLUMNS = BLOCK_CHANNELS / WARP_CHANNELS, DEEP = WARPS / COLUMNS;
constexpr int blocks_an_sm(Mode mode) { return mode == BATCH_NORM_GRAD ? 2 : 3; }  // what the registers allow
static_assert(BOX_PIXELS % (16 * DEEP) == 0, "sixteen pixels a product, the same number of products a warp");

template <class T>
struct Arguments {
  const T *x, *w;
  T* y;
  const T* saved;
  const float* state;
  float* values;
  Boxes boxes;
  int64_t images, groups;
  int channels;
  bool tanh;
  float slope;
};

// One warp's weights: 32 channels from `first` on, for products of 16 pixels. Thread (g, t) gets pixels g and g + 8 and
// channels first + 8t.. of each, so that what it stores is a vector: column n of tile j is channel 8·(n/2) + 2j + n%2.
template <class T, int C>
struct Weights {
  uint32_t at[C][4][2];

  __device__ void load(const T* w, int first, int channels) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int s = 0; s < C; ++s)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int channel = first + g / 2 * 8 + 2 * j + g % 2;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          at[s][j][half] = channel < channels ? pair_at(w + channel * 16 * C + 16 * s + 8 * half + 2 * t) : 0;
      }
  }

  __device__ void multiply(float (&acc)[4][4], const Patch<T, C>& patch, const Boxes& b, int p) const {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const T *upper = patch.at + patch.corner(b, p + g), *lower = patch.at + patch.corner(b, p + g + 8);
#pragma unroll
    for (int s = 0; s < C; ++s) {
      const int left = patch.tap(b, 16 * s + 2 * t), right = patch.tap(b, 16 * s + 8 + 2 * t);
      const uint32_t a[4] = {
          pair_at(upper + left), pair_at(lower + left), pair_at(upper + right), pair_at(lower + right)};
#pragma unroll
      for (int j = 0; j < 4; ++j) mma<T>(acc[j], a, at[s][j]);
    }
  }
};

// The same in fp32, exactly: no tensor core, and the weights stay in L1.
template <int C>
struct Weights<float, C> {
  const float* rows;
  bool here;

  __device__ void load(const float* w, int first, int channels) {
    const int channel = first + threadIdx.x % 4 * 8;
    rows = w + channel * 16 * C, here = channel < channels;
  }

  __device__ void multiply(float (&acc)[4][4], const Patch<float, C>& patch, const Boxes& b, int p) const {
    const int g = threadIdx.x % WARP / 4;
    if (!here) return;
    const float *upper = patch.at + patch.corner(b, p + g), *lower = patch.at + patch.corner(b, p + g + 8);
#pragma unroll 1
    for (int k = 0; k < 16 * C; k += 4) {
      const int tap = patch.tap(b, k);
#pragma unroll
      for (int channel = 0; channel < 8; ++channel) {
        float w[4];
        ::load<4>(rows + channel * 16 * C + k, w);
        float &above = acc[channel / 2][channel % 2], &below = acc[channel / 2][2 + channel % 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          above = fmaf(upper[tap + i], w[i], above);
          below = fmaf(lower[tap + i], w[i], below);
        }
      }
    }
  }
};

// y[n,y,x,o] = Σ_{ky,kx,c} x[n,2y+ky−1,2x+kx−1,c] · w[o,ky,kx,c], then the epilogue.
//
// Tile: a box of 256 pixels by 64 channels; a block takes boxes in turn, its weights in registers throughout.
// Bytes: x, y and saved once, by 16-byte vectors; the rim of the patch, a tenth of a 32×8 box's, again from L2.
// Accumulates in fp32 over K = 16·C, which is C whole steps of mma.sync.
// Beats the library by the activation or its derivative, and by no channel of padding: three channels make K = 48.
template <class T, int C, Mode MODE>
__global__ void __launch_bounds__(THREADS, blocks_an_sm(MODE)) image_conv_kernel(Arguments<T> a) {
  __shared__ Patch<T, C> patch;
  __shared__ float state[4][BLOCK_CHANNELS];
  __shared__ float sums[DEEP][2][BLOCK_CHANNELS];
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  const int begin = blockIdx.y * BLOCK_CHANNELS, first = begin + warp % COLUMNS * WARP_CHANNELS;
  const int channel = first + 8 * t;
  const bool here = channel < a.channels;
  after_previous();
  Weights<T, C> weights;
  weights.load(a.w, first, a.channels);
  const int64_t total = a.images * 4 * a.boxes.height * a.boxes.width * C, per_group = a.images / a.groups;

  for (int64_t index = blockIdx.x; index < a.boxes.count; index += gridDim.x) {
    const Box box = box_at(a.boxes, index);
    const int64_t group = box.image / per_group;
    if (MODE == BATCH_NORM_GRAD)
      for (int i = threadIdx.x; i < 4 * BLOCK_CHANNELS; i += THREADS) {
        const int row = i / BLOCK_CHANNELS, c = begin + i % BLOCK_CHANNELS;
        state[row][i % BLOCK_CHANNELS] = c < a.channels ? a.state[(row * a.groups + group) * a.channels + c] : 0.f;
      }
    patch.load(a.x, total, a.boxes, box);
    __syncthreads();

    float sum[8] = {}, sum_normalised[8] = {};
    for (int p = warp / COLUMNS * 16; p >> a.boxes.shift < box.rows; p += 16 * DEEP) {
      float acc[4][4] = {};
      weights.multiply(acc, patch, a.boxes, p);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = p + g + 8 * half, y = at >> a.boxes.shift, x = at & ((1 << a.boxes.shift) - 1);
        if (!here || y >= box.rows || x >= box.columns) continue;
        const int64_t pixel = (box.image * a.boxes.height + box.y + y) * a.boxes.width + box.x + x;
        float out[8], kept[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] = acc[i / 2][2 * half + i % 2];
        if (MODE != ACTIVATION) load(a.saved + pixel * a.channels + channel, kept);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (MODE == ACTIVATION) {
            out[i] = a.tanh ? tanhf(out[i]) : activate(out[i], a.slope);
          } else if (MODE == ACTIVATION_GRAD) {
            out[i] *= a.tanh ? 1 - kept[i] * kept[i] : derivative(kept[i], a.slope);
          } else {
            const int c = channel - begin + i;
            out[i] *= derivative(fmaf(kept[i], state[2][c], state[3][c]), a.slope);
            sum[i] += out[i], sum_normalised[i] += out[i] * ((kept[i] - state[0][c]) * state[1][c]);
          }
        }
        store(a.y + pixel * a.channels + channel, out);
      }
    }
    if (MODE == BATCH_NORM_GRAD) {
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int by = 4; by < WARP; by *= 2) {
          sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], by);
          sum_normalised[i] += __shfl_xor_sync(0xffffffffu, sum_normalised[i], by);
        }
      if (!g)
        for (int i = 0; i < 8; ++i) {
          sums[warp / COLUMNS][0][channel - begin + i] = sum[i];
          sums[warp / COLUMNS][1][channel - begin + i] = sum_normalised[i];
        }
      __syncthreads();
      if (threadIdx.x < 2 * BLOCK_CHANNELS) {
        const int which = threadIdx.x / BLOCK_CHANNELS, c = threadIdx.x % BLOCK_CHANNELS;
        float all = 0;
        for (int i = 0; i < DEEP; ++i) all += sums[i][which][c];
        if (begin + c < a.channels) a.values[(which * a.boxes.count + index) * a.channels + begin + c] = all;
      }
    }
    __syncthreads();  // before the next box's patch
  }
}

template <class T, int C>
cudaError_t run(const Arguments<T>& a, Stream stream) {
  const Mode mode = !a.saved ? ACTIVATION : a.state ? BATCH_NORM_GRAD : ACTIVATION_GRAD;
  const dim3 grid(resident_blocks(a.boxes.count, blocks_an_sm(mode)), cdiv(a.channels, BLOCK_CHANNELS));
  const auto kernel = mode == ACTIVATION        ? image_conv_kernel<T, C, ACTIVATION>
                      : mode == BATCH_NORM_GRAD ? image_conv_kernel<T, C, BATCH_NORM_GRAD>
                                                : image_conv_kernel<T, C, ACTIVATION_GRAD>;
  return launch(kernel, grid, THREADS, 0, stream, a);
}

}  // namespace

cudaError_t image_conv(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width,
    int64_t image_channels, int64_t channels, int64_t tanh, double slope) {
  return by_dtype(dtype, [&]<class T>() {
    const Arguments<T> a{
        static_cast<const T*>(x), static_cast<const T*>(w), static_cast<T*>(y), static_cast<const T*>(saved.at),
        state.at, values.at, image_boxes(images, height, width), images, groups, int(channels), tanh != 0,
        float(slope)};
    return by_image_channels(image_channels, [&]<int C>() { return run<T, C>(a, stream); });
  });
}
