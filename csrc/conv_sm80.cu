// conv and conv_transpose k4 s2 p1 between maps of many channels, for sm_80 on: cp.async into mma.sync.
#include "async_copy.h"
#include "conv_merge.h"

namespace {

constexpr int THREADS = 256;
constexpr int LINES = 4, WARP_ROWS = TILE_PIXELS / LINES, ROW_TILES = WARP_ROWS / 16;  // four warps down, two across
constexpr int PIXEL_COPIES = TILE_PIXELS * 8 / THREADS;  // vectors of the first operand tile, a thread and step
static_assert(THREADS / WARP == 2 * LINES);

// Shared memory of a block: `STAGES` pairs of operand tiles; the epilogue's sums take their place.
template <int COLUMNS>
struct Plan {
  static constexpr int N = COLUMNS / 2;  // of a warp
  static constexpr int A_BYTES = TILE_PIXELS * ROW_BYTES, B_BYTES = COLUMNS * ROW_BYTES, BYTES = A_BYTES + B_BYTES;
  static constexpr int STAGES = 3, TOTAL = STAGES * BYTES;
  static_assert(2 * LINES * COLUMNS * 4 <= TOTAL && TOTAL <= 99 << 10, "sm_86 and sm_89 have 99 KB");
  static constexpr int COPIES = COLUMNS * 8 / THREADS;  // vectors of the second tile, a thread and step
};

template <class T>
struct Arguments {
  const T *x, *w;
  ConvShape shape;
  ConvOutput<T> out;
  ConvMerge merge;
};

// A thread's share of a tile's pixels: vector `lane` of rows line, line + 32, …, and of each where its first tap lies.
template <class T, bool TRANSPOSED>
struct Pixels {
  int64_t first[PIXEL_COPIES];  // element of x, its channel 0; may lie outside
  int y[PIXEL_COPIES], x[PIXEL_COPIES];

  __device__ Pixels(const ConvShape& s, const ConvTile& tile) {
#pragma unroll
    for (int i = 0; i < PIXEL_COPIES; ++i) {
      const int r = pixel_of_row(s, threadIdx.x / 8 + i * (THREADS / 8));
      const int w = tile.w + (r & ((1 << s.log_width) - 1));
      const int h = tile.h + (r >> s.log_width & ((1 << s.log_height) - 1));
      const int n = tile.n + (r >> (s.log_width + s.log_height)), scale = TRANSPOSED ? 1 : 2;
      y[i] = TRANSPOSED ? h + tile.phase / 2 : 2 * h - 1, x[i] = TRANSPOSED ? w + tile.phase % 2 : 2 * w - 1;
      const int64_t image = int64_t(tile.group) * s.per_group + n;
      first[i] = ((image * scale * s.height + y[i]) * scale * s.width + x[i]) * s.into;
      if (n >= s.per_group) y[i] = -4 * s.height - 4;  // outside, whatever the tap
    }
  }

  // Channels k.. of the tap `down` rows and `right` columns on, into a stage's first tile.
  __device__ void copy(uint32_t to, const T* x_, const ConvShape& s, int down, int right, int k) const {
    const int scale = TRANSPOSED ? 1 : 2, chunk = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < PIXEL_COPIES; ++i) {
      const int r = threadIdx.x / 8 + i * (THREADS / 8), py = y[i] + down, px = x[i] + right;
      const bool there = py >= 0 && py < scale * s.height && px >= 0 && px < scale * s.width;
      const int64_t at = first[i] + (int64_t(down) * scale * s.width + right) * s.into + k + 8 * chunk;
      copy_async(swizzled(to + r * ROW_BYTES + chunk * VECTOR_BYTES), x_ + (there ? at : 0), there);
    }
  }
};

// The products of conv_sm90.cu, where their formulas stand.
//
// Tile: a box of 128 low pixels (of one phase) by COLUMNS channels; 16 (4) taps of the input's channels, 64 at a time.
// Bytes: x, w and y once from memory; from L2 x 4·⌈out/COLUMNS⌉ (16·) times, and w once per row of tiles.
// Accumulates in fp32, in registers, which the statistics see before it is rounded.
// Beats the library by what does not follow: statistics and activation cost no pass over memory.
template <class T, int COLUMNS, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1) conv_sm80_kernel(Arguments<T> a) {
  using P = Plan<COLUMNS>;
  DYNAMIC_SHARED(memory);
  const uint32_t shared = shared_address(memory);
  const ConvShape& s = a.shape;
  const ConvTile tile = conv_tile(s, int(blockIdx.x), COLUMNS);
  const int chunks = s.into / DEPTH, steps = (TRANSPOSED ? 4 : 16) * chunks;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const Pixels<T, TRANSPOSED> pixels(s, tile);

  after_previous();

  const auto copy_step = [&](int step) {
    const uint32_t to = shared + step % P::STAGES * P::BYTES, b = to + P::A_BYTES;
    const int tap = step / chunks, k = step % chunks * DEPTH, up = tap / 2, back = tap % 2;
    if constexpr (TRANSPOSED) pixels.copy(to, a.x, s, -up, -back, k);
    else pixels.copy(to, a.x, s, tap / 4, tap % 4, k);
#pragma unroll
    for (int i = 0; i < P::COPIES; ++i) {
      const int vector = threadIdx.x + i * THREADS;
      if constexpr (TRANSPOSED) {  // rows of 64 columns of one k; 64 such rows, then the next 64 columns
        const int chunk = vector % 8, row = vector / 8 % DEPTH, block = vector / (8 * DEPTH);
        const int column = tile.column + 64 * block + 8 * chunk;
        const int at = (1 - tile.phase / 2 + 2 * up) * 4 + 1 - tile.phase % 2 + 2 * back;
        const bool there = column < s.out;
        const T* const from = a.w + (int64_t(k + row) * 16 + at) * s.out + column;
        copy_async(swizzled(b + vector / 8 * ROW_BYTES + chunk * VECTOR_BYTES), there ? from : a.w, there);
      } else {  // rows of 64 k of one column
        const int chunk = vector % 8, column = tile.column + vector / 8;
        const bool there = column < s.out;
        const T* const from = a.w + (int64_t(column) * 16 + tap) * s.into + k + 8 * chunk;
        copy_async(swizzled(b + vector / 8 * ROW_BYTES + chunk * VECTOR_BYTES), there ? from : a.w, there);
      }
    }
  };

  float d[ROW_TILES][P::N / 2] = {};
  for (int step = 0; step < P::STAGES - 1; ++step) {
    if (step < steps) copy_step(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<P::STAGES - 2>();
    __syncthreads();  // this step's tiles are there for all, and the last step's are read
    if (step + P::STAGES - 1 < steps) copy_step(step + P::STAGES - 1);
    copy_commit();
    const uint32_t rows = shared + step % P::STAGES * P::BYTES + warp / 2 * WARP_ROWS * ROW_BYTES;
    const uint32_t b = shared + step % P::STAGES * P::BYTES + P::A_BYTES;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      uint32_t left[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)  // matrices: rows 0 to 7 and 8 to 15 of k to k + 7, then of the next eight
        load_matrices<false>(
            left[m], swizzled(rows + (16 * m + lane % 16) * ROW_BYTES + (k + lane / 16 * 8) * 2));
#pragma unroll
      for (int j = 0; j < P::N / 8; j += 2) {
        const int column = warp % 2 * P::N + 8 * j;
        uint32_t right[4];  // of column tiles j and j + 1, k to k + 7 and the next eight of each
        if constexpr (TRANSPOSED) {
          const int n = column + lane / 16 * 8, row = n / 64 * DEPTH + k + lane % 16;
          load_matrices<true>(right, swizzled(b + row * ROW_BYTES + n % 64 * 2));
        } else {
          const int n = column + lane / 16 * 8 + lane % 8;
          load_matrices<false>(right, swizzled(b + n * ROW_BYTES + (k + lane / 8 % 2 * 8) * 2));
        }
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) {
            const uint32_t w[2] = {right[2 * e], right[2 * e + 1]};
            float(&sum)[4] = *reinterpret_cast<float(*)[4]>(&d[m][4 * (j + e)]);
            mma<T>(sum, left[m], w);
          }
      }
    }
  }
  copy_wait<0>();
  __syncthreads();  // the epilogue's sums take the tiles' place
  finish_tile<T, ROW_TILES, 16, P::N, COLUMNS, LINES, THREADS>(
      d, warp / 2 * WARP_ROWS + lane / 4, warp % 2 * P::N, warp / 2, s, tile, a.out, reinterpret_cast<float*>(memory));
  if (a.merge.tickets) merge_tiles<T, COLUMNS, THREADS>(s, tile, a.out, a.merge, reinterpret_cast<int*>(memory));
}

template <class T, bool TRANSPOSED>
cudaError_t run(Stream stream, const Arguments<T>& a, int64_t columns) {
  const ConvShape& s = a.shape;
  const unsigned grid = unsigned(s.groups) * s.boxes() * s.phases * cdiv(s.out, int(columns));
  switch (columns) {
    case 64: return launch(conv_sm80_kernel<T, 64, TRANSPOSED>, grid, THREADS, Plan<64>::TOTAL, stream, a);
    case 128: return launch(conv_sm80_kernel<T, 128, TRANSPOSED>, grid, THREADS, Plan<128>::TOTAL, stream, a);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t conv_sm80(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, Maybe<float> counts, Maybe<float> rounds, Maybe<float> round_counts, Maybe<int32_t> tickets,
    Maybe<const float> weight, Maybe<const float> bias, Maybe<float> running_mean, Maybe<float> running_var,
    Maybe<int64_t> tracked, Maybe<float> dweight, Maybe<float> dbias, Maybe<float> merged, int64_t transposed,
    int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out,
    int64_t box_height, int64_t box_width, int64_t columns, double slope, double eps, double momentum) {
  const auto shape = conv_shape(images, groups, height, width, into, out, box_height, box_width, transposed);
  const ConvMerge merge{
      rounds.at, round_counts.at, reinterpret_cast<unsigned*>(tickets.at),
      {weight.at, bias.at, running_mean.at, running_var.at, float(eps), float(momentum)},
      tracked.at, dweight.at, dbias.at, merged.at};
  return by_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      const Arguments<T> a{
          static_cast<const T*>(x), static_cast<const T*>(w), shape,
          {static_cast<T*>(y), static_cast<const T*>(saved.at), state.at, values.at, counts.at, float(slope)}, merge};
      return transposed ? run<T, true>(stream, a, columns) : run<T, false>(stream, a, columns);
    }
    return cudaErrorInvalidValue;
  });
}
