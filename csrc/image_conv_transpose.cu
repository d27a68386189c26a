// conv_transpose k4 s2 p1 onto an image: G's last layer, and the gradient of the images that D's first read.
#include "image_patch.h"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int BLOCKS_AN_SM = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int BOUND = 1;  // 140 to 168 registers there, where sm_80 to sm_90 fit 128: two blocks would spill
#else
constexpr int BOUND = BLOCKS_AN_SM;
#endif
constexpr int CHUNK = 32;  // channels a product of two mma steps takes: a quad's four vectors of eight

template <class T>
struct Arguments {
  const T *x, *w;
  T* y;
  const T* saved;
  Boxes boxes;
  int channels;
  bool tanh;
  float slope;
};

// Two neighbours in one access, whatever their size.
template <class T>
__device__ __forceinline__ void load_pair(const T* from, float (&to)[2]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = pair_at(from);
    T both[2];
    memcpy(both, &pair, 4);
    to[0] = to_float(both[0]), to[1] = to_float(both[1]);
  } else {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    to[0] = pair.x, to[1] = pair.y;
  }
}

template <class T>
__device__ __forceinline__ void store_pair(T* to, const float (&from)[2]) {
  if constexpr (sizeof(T) == 2) *reinterpret_cast<uint32_t*>(to) = pack(from_float<T>(from[0]), from_float<T>(from[1]));
  else *reinterpret_cast<float2*>(to) = {from[0], from[1]};
}

// Shared memory: the products z of the box and of the pixels around it, then the weights.
template <class T, int C>
struct Plan {
  static constexpr int TAPS = 16 * C;
  static constexpr int PIXELS = C == 4 ? 128 : BOX_PIXELS;  // of a box
  static constexpr int PITCH = TAPS + 8;                     // ±8 banks per pixel: a warp's pairs hit each bank twice
  static_assert(PITCH % 32 == 8 || PITCH % 32 == 24);
  static constexpr int AREA = (PIXELS / MAX_BOX_WIDTH + 2) * (MAX_BOX_WIDTH + 2);  // of the box and its rim
  static_assert(AREA >= (PIXELS / MIN_BOX_WIDTH + 2) * (MIN_BOX_WIDTH + 2) && AREA >= (PIXELS / 16 + 2) * 18);
  static constexpr int Z_BYTES = AREA * PITCH * 4;
  static_assert(Z_BYTES % VECTOR_BYTES == 0 && Z_BYTES <= 77 << 10);

  static int64_t bytes(int64_t channels) { return Z_BYTES + cdiv<int64_t>(channels, CHUNK) * CHUNK * TAPS * sizeof(T); }
};

// The weights (channels, 16·C) in shared memory, zeros up to a whole chunk. In 16 bits thread (g, t) finds the eight
// channels 8t.. of column 8j + g as one vector, which is its fragment of two mma steps; in fp32 they lie as in memory.
template <class T, int C>
__device__ void stage_weights(T* to, const T* w, int channels) {
  constexpr int TAPS = 16 * C;
  const int whole = (channels + CHUNK - 1) / CHUNK * CHUNK;
  for (int i = threadIdx.x; i < whole * TAPS; i += THREADS) {
    const int channel = i / TAPS, tap = i % TAPS;
    const int thread = tap % 8 * 4 + channel % CHUNK / 8;
    const int at = sizeof(T) == 4 ? i : ((channel / CHUNK * (TAPS / 8) + tap / 8) * WARP + thread) * 8 + channel % 8;
    to[at] = channel < channels ? w[i] : from_float<T>(0.f);
  }
}

// z[pixel][tap] for 32 pixels of a warp: rows[i] is where in the image the channels of pixel g + 8i start, or −1.
template <class T, int C>
__device__ __forceinline__ void multiply(
    float (&acc)[2][2 * C][4], const T* image, const int (&rows)[4], const T* weights, int channels) {
  const int lane = threadIdx.x % WARP, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll 1
    for (int c = 0; c < channels; c += CHUNK) {
      uint32_t x[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 raw = {0, 0, 0, 0};
        if (rows[i] >= 0 && c + 8 * t < channels)
          raw = *reinterpret_cast<const uint4*>(image + rows[i] + c + 8 * t);
        memcpy(x[i], &raw, VECTOR_BYTES);
      }
#pragma unroll
      for (int j = 0; j < 2 * C; ++j) {
        uint32_t w[4];
        const uint4 raw = *reinterpret_cast<const uint4*>(weights + (c / CHUNK * 2 * C + j) * WARP * 8 + lane * 8);
        memcpy(w, &raw, VECTOR_BYTES);
#pragma unroll
        for (int step = 0; step < 2; ++step)
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint32_t(&upper)[4] = x[2 * m], (&lower)[4] = x[2 * m + 1];
            const uint32_t a[4] = {upper[2 * step], lower[2 * step], upper[2 * step + 1], lower[2 * step + 1]};
            const uint32_t b[2] = {w[2 * step], w[2 * step + 1]};
            mma<T>(acc[m][j], a, b);
          }
      }
    }
  } else {
#pragma unroll 1
    for (int c = 0; c < channels; c += 4) {
      float x[4][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (rows[i] >= 0) load<4>(image + rows[i] + c, x[i]);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 2 * C; ++j) {
          float w[2];
          load_pair(weights + (c + k) * 16 * C + 8 * j + 2 * t, w);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = acc[i / 2][j][i % 2 * 2 + e];
              sum = fmaf(x[i][k], w[e], sum);
            }
        }
    }
  }
}

// z[pixel,tap] = Σ_c x[pixel,c] · w[c,tap], and then
// y[n,2i+p,2j+q,o] = act(Σ_{a,b∈{0,1}} z[(n,i+p−a,j+q−b), (1−p+2a, 1−q+2b, o)]).
//
// Tile: a box of input pixels by all 16·C taps, z in shared memory; each pixel is multiplied once for all its outputs.
// Bytes: x once, by 16-byte vectors, its rim again from L2 (a fifth of a box inside a picture); y and saved once, by
//     whole warps; z twice through shared memory, 8·16·C a pixel, against 9·2·channels for a gather of nine taps.
// Accumulates in fp32, in an order that depends only on the shapes.
// Beats the library by the activation or its derivative, and by 48 columns where it pads three channels to 8 per phase.
template <class T, int C>
__global__ void __launch_bounds__(THREADS, BOUND) image_conv_transpose_kernel(Arguments<T> a) {
  using P = Plan<T, C>;
  DYNAMIC_SHARED(memory);
  float* const z = reinterpret_cast<float*>(memory);
  T* const weights = reinterpret_cast<T*>(memory + P::Z_BYTES);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  const int height = a.boxes.height, width = a.boxes.width;
  after_previous();
  stage_weights<T, C>(weights, a.w, a.channels);

  for (int64_t index = blockIdx.x; index < a.boxes.count; index += gridDim.x) {
    const Box box = box_at(a.boxes, index);
    const int top = box.y ? box.y - 1 : 0, left = box.x ? box.x - 1 : 0;  // the box and its rim, inside the map
    const int across = least(box.x + box.columns + 1, width) - left;
    const int area = (least(box.y + box.rows + 1, height) - top) * across;
    const T* const image = a.x + box.image * height * width * a.channels;
    __syncthreads();  // the weights are there, and the last box's z is read

    for (int p = warp * 32; p < area; p += WARPS * 32) {
      int rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = p + g + 8 * i;
        rows[i] = at < area ? ((top + at / across) * width + left + at % across) * a.channels : -1;
      }
      float acc[2][2 * C][4] = {};
      multiply<T, C>(acc, image, rows, weights, a.channels);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = p + g + 8 * i;
        if (at >= area) continue;
#pragma unroll
        for (int j = 0; j < 2 * C; ++j) {
          const float pair[2] = {acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]};
          store_pair(z + at * P::PITCH + 8 * j + 2 * t, pair);
        }
      }
    }
    __syncthreads();

    for (int r = warp; r < 2 * box.rows; r += WARPS) {  // a warp's row of the image, two elements per thread
      const int64_t row = (((box.image * height + box.y) * 2 + r) * 2 * width + 2 * box.x) * C;
      for (int e = 2 * lane; e < 2 * box.columns * C; e += 2 * WARP) {
        float out[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = (e + i) / C, o = (e + i) % C, py = r % 2, px = column % 2;
          float sum = 0;
#pragma unroll
          for (int tap = 0; tap < 4; ++tap) {
            const int up = tap / 2, back = tap % 2;
            const int y = box.y + r / 2 + py - up, x = box.x + column / 2 + px - back;
            if (y < 0 || y >= height || x < 0 || x >= width) continue;
            const int at = (1 - py + 2 * up) * 4 + 1 - px + 2 * back;
            sum += z[((y - top) * across + x - left) * P::PITCH + at * C + o];
          }
          out[i] = sum;
        }
        if (a.saved) {
          float kept[2];
          load_pair(a.saved + row + e, kept);
#pragma unroll
          for (int i = 0; i < 2; ++i) out[i] *= a.tanh ? 1 - kept[i] * kept[i] : derivative(kept[i], a.slope);
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i) out[i] = a.tanh ? tanhf(out[i]) : activate(out[i], a.slope);
        }
        store_pair(a.y + row + e, out);
      }
    }
  }
}

}  // namespace

cudaError_t image_conv_transpose(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t image_channels, int64_t channels, int64_t tanh, double slope) {
  return by_dtype(dtype, [&]<class T>() {
    return by_image_channels(image_channels, [&]<int C>() {
      const Boxes boxes = image_boxes(images, height, width, Plan<T, C>::PIXELS);
      const Arguments<T> a{
          static_cast<const T*>(x), static_cast<const T*>(w), static_cast<T*>(y), static_cast<const T*>(saved.at),
          boxes, int(channels), tanh != 0, float(slope)};
      return launch(
          image_conv_transpose_kernel<T, C>, resident_blocks(boxes.count, BLOCKS_AN_SM), THREADS,
          size_t(Plan<T, C>::bytes(channels)), stream, a);
    });
  });
}
