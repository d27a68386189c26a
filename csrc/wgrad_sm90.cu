// The weight gradient of k4 s2 p1 layers between maps of many channels, for sm_90a: TMA boxes into wgmma, each pixel
// loaded once for four taps.
#include "conv.h"
#include "wgmma.h"

namespace {

constexpr int BOX_PIXELS = 64;                                 // low pixels multiplied at a time
constexpr int MULTIPLIERS = 256, THREADS = MULTIPLIERS + 128;  // two warpgroups, and one that loads
constexpr int WARPS = MULTIPLIERS / WARP;
constexpr int MAX_STAGES = 8;

// Registers of a loading and of a multiplying thread, which share out what a launch of 384 gets: 168 each.
constexpr int FEW = 40, MANY = 232;
static_assert(FEW * (THREADS - MULTIPLIERS) + MANY * MULTIPLIERS <= 168 * THREADS);

// Shared memory of a block: stages of a plane of high pixels and a box of low ones, and the barriers.
template <int COLUMNS>
struct Plan {
  static constexpr int LOW_BYTES = COLUMNS / 64 * BOX_PIXELS * ROW_BYTES;
  static constexpr int BARRIER_BYTES = 2 * MAX_STAGES * 8, ROOM = (227 << 10) - BARRIER_BYTES;
  static constexpr int LARGEST_PLANE = BOX_PIXELS * 4 * ROW_BYTES;  // of boxes of one pixel, with three neighbours each
  static_assert(2 * (LARGEST_PLANE + LOW_BYTES) <= ROOM, "what a block of sm_90 may have");

  static int stages(int plane_bytes) {
    const int room = ROOM / (plane_bytes + LOW_BYTES);
    return room < MAX_STAGES ? room : MAX_STAGES;
  }
  static int total(int plane_bytes) { return stages(plane_bytes) * (plane_bytes + LOW_BYTES) + BARRIER_BYTES; }
};

struct Arguments {
  float* shares;
  int low, high;                // channels
  int log_height, log_width;    // of a box
  int deep, down, across;       // boxes
  int split, cluster, stages;
  int plane_rows, plane_bytes;  // pixels of a plane, and the room it has: whole atoms of the swizzle
};

// shares[s,l,ky,kx,c] = Σ_{n,y,x of share s} low[n,y,x,l] · high[n,2y+ky−1,2x+kx−1,c]
//
// Tile: COLUMNS low channels by 64 high ones, for each of the four taps that read one plane: the high pixels of one
//     parity of row and column. The taps of a row are a warpgroup's. The reduction goes by boxes of 64 low pixels, of
//     which share s has s, s + split, …; the plane has one more row and one more column. A tap is the same rows of it,
//     some further on, which is no matrix that a descriptor could name: so the plane is wgmma's left operand, through
//     registers, by ldmatrix, and low the right one. So a tile is transposed: its rows are high channels.
// Bytes: low and high once from memory. From L2 a high pixel comes (BH + 1)(BW + 1)/(BH·BW) times for each of
//     ⌈L/COLUMNS⌉ tiles; low C/64 times for each cluster of planes, of which each of its blocks loads a part for all.
// Accumulates in fp32, in registers; the shares are added in an order that depends only on `split`.
// Beats the library by what L2 need not give: tap by tap high would come four times as often, and low as well.
template <class T, int COLUMNS>
__global__ void __launch_bounds__(THREADS, 1)
    wgrad_sm90_kernel(const __grid_constant__ TensorMap low, const __grid_constant__ TensorMap high, Arguments a) {
#if defined(DCGAN_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using P = Plan<COLUMNS>;
  DYNAMIC_SHARED(memory);
  const int stage_bytes = a.plane_bytes + P::LOW_BYTES;
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + a.stages * stage_bytes);
  uint64_t* const empty = full + MAX_STAGES;
  const int wide_tiles = a.high / 64, low_tiles = (a.low + COLUMNS - 1) / COLUMNS;
  const int p = blockIdx.x / 2 % 2, q = blockIdx.x % 2, rest = blockIdx.x / 4;  // the planes change first: a cluster's
  const int channel = rest % wide_tiles * 64, column = rest / wide_tiles % low_tiles * COLUMNS;
  const int share = rest / (wide_tiles * low_tiles), boxes = a.deep * a.down * a.across;
  const int steps = (boxes - share + a.split - 1) / a.split;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

  if (threadIdx.x == 0) {
    prefetch_map(low), prefetch_map(high);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, WARPS * a.cluster);
    barrier_init_fence();
  }
  if (a.cluster > 1) cluster_arrive<true>(), cluster_wait();
  else __syncthreads();
  after_previous();

  int stage = 0, parity = 0;
  if (warp >= WARPS) {
    share_registers<FEW, false>();
    if (threadIdx.x == MULTIPLIERS) {
      const int images = BOX_PIXELS >> (a.log_height + a.log_width);
      for (int step = 0; step < steps; ++step) {
        const int box = share + step * a.split, w = box % a.across << a.log_width;
        const int h = box / a.across % a.down << a.log_height, n = box / (a.across * a.down) * images;
        unsigned char* const plane = memory + stage * stage_bytes;
        unsigned char* const pixels = plane + a.plane_bytes;
        barrier_wait(empty + stage, parity ^ 1);
        barrier_arrive_expecting(full + stage, a.plane_rows * ROW_BYTES + P::LOW_BYTES);
        load_box<5>(plane, high, {q * a.high + channel, w - q, p, h - p, n}, full + stage);
        // 64 low channels of half a box at a time: its images, or its rows where there is one image
        for (int i = a.cluster > 1 ? cluster_rank() : 0; i < COLUMNS / 32; i += a.cluster) {
          const int l = column + i / 2 * 64, half = i % 2, up = images > 1 ? 0 : half << a.log_height >> 1;
          const int at[4] = {l, w, h + up, images > 1 ? n + half * (images / 2) : n};
          unsigned char* const to = pixels + i * (BOX_PIXELS / 2) * ROW_BYTES;
          if (a.cluster == 1) load_box<4>(to, low, at, full + stage);
          else load_box_to_all<4>(to, low, at, full + stage, a.cluster);
        }
        if (++stage == a.stages) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (a.cluster > 1) cluster_arrive<false>();
  } else {
    share_registers<MANY, true>();
    const int wide = (1 << a.log_width) + 1, tall = (1 << a.log_height) + 1;  // of a plane
    const int down = warp / 4, m = warp % 4 * 16;  // which row's taps, and which of the tile's rows
    uint32_t at[BOX_PIXELS / 16];  // in bytes, what this lane names to ldmatrix: a pixel, for eight channels
#pragma unroll
    for (int i = 0; i < BOX_PIXELS / 16; ++i) {
      const int r = i * 16 + lane / 16 * 8 + lane % 8, h = r >> a.log_width & (tall - 2);
      const int pixel = ((r >> (a.log_width + a.log_height)) * tall + h + down) * wide + (r & (wide - 2));
      at[i] = pixel * ROW_BYTES + (m + lane / 8 % 2 * 8) * 2;
    }
    float d[2][COLUMNS / 2] = {};  // of the row's two taps
    uint32_t left[2][2][2][4];     // of half a step each: one is loaded while the other is multiplied
    int last = 0;
    for (int step = 0; step < steps; ++step) {
      const uint32_t plane = shared_address(memory + stage * stage_bytes), b = plane + a.plane_bytes;
      barrier_wait(full + stage, parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int right = 0; right < 2; ++right)  // matrices: channels 0 to 7 and 8 to 15 of eight pixels, then of eight more
            load_matrices<true>(left[half][right][e], swizzled(plane + at[2 * half + e] + right * ROW_BYTES));
        wgmma_fence();
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int right = 0; right < 2; ++right)
            wgmma<T, COLUMNS, true>(
                d[right], left[half][right][e],
                descriptor(b + (2 * half + e) * 16 * ROW_BYTES, ATOM_BYTES, BOX_PIXELS * ROW_BYTES));
        wgmma_commit();
        wgmma_wait<1>();  // all but this half step: the registers of the one before are free
        if (half || !step) continue;
        if (lane < a.cluster) {  // the last step is done with its stage
          if (a.cluster == 1) barrier_arrive(empty + last);
          else barrier_arrive_at(empty + last, lane);
        }
        __syncwarp();
      }
      last = stage;
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
    wgmma_wait<0>();
    if (a.cluster > 1) cluster_arrive<false>();  // ahead of the stores, which it would wait for
    const int64_t row = int64_t(16) * a.high;  // of one low channel
#pragma unroll
    for (int right = 0; right < 2; ++right) {
      const int tap = (1 - p + 2 * down) * 4 + 1 - q + 2 * right;
      float* to = a.shares + (int64_t(share) * a.low + column + lane % 4 * 2) * row + tap * a.high + channel + m + lane / 4;
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; ++j, to += 8 * row) {  // eight neighbouring lanes have eight neighbouring channels
        if (column + 8 * j >= a.low) break;  // low channels are multiples of 64
        to[0] = d[right][4 * j], to[row] = d[right][4 * j + 1];
        to[8] = d[right][4 * j + 2], to[row + 8] = d[right][4 * j + 3];
      }
    }
  }
  if (a.cluster > 1) cluster_wait();  // before a block ends that others still signal
#endif
}

template <class T, int COLUMNS>
cudaError_t run(
    Stream stream, const void* low, const void* high, Arguments a, int64_t images, int64_t height,
    int64_t width) {
  using P = Plan<COLUMNS>;
  const int wide = 1 << a.log_width, tall = 1 << a.log_height, box_images = BOX_PIXELS / (wide * tall);
  a.plane_rows = box_images * (tall + 1) * (wide + 1);
  a.plane_bytes = cdiv(a.plane_rows * ROW_BYTES, ATOM_BYTES) * ATOM_BYTES;
  a.stages = P::stages(a.plane_bytes);
  const bool one = box_images == 1;  // a box is loaded in halves
  TensorMap pixels, planes;
  auto error = make_map<T>(
      pixels, low, 4, {a.low, width, height, images, 0}, {64, wide, one ? tall / 2 : tall, one ? 1 : box_images / 2, 0});
  if (error != cudaSuccess) return error;
  error = make_map<T>(
      planes, high, 5, {2 * a.high, width, 2, height, images}, {64, wide + 1, 1, tall + 1, box_images});
  if (error != cudaSuccess) return error;
  const auto kernel = wgrad_sm90_kernel<T, COLUMNS>;
  error = built_for_sm90a(reinterpret_cast<const void*>(kernel), COLUMNS);
  if (error != cudaSuccess) return error;
  const unsigned grid = unsigned(a.split) * cdiv(a.low, COLUMNS) * (a.high / 64) * 4;
  return launch(kernel, Grid(grid, unsigned(a.cluster)), THREADS, P::total(a.plane_bytes), stream, pixels, planes, a);
}

}  // namespace

cudaError_t wgrad_sm90(
    Stream stream, const void* low, const void* high, float* shares, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t low_channels, int64_t high_channels, int64_t box_height, int64_t box_width,
    int64_t columns, int64_t cluster, int64_t split) {
  const int64_t box_images = BOX_PIXELS / (box_height * box_width);
  if (cluster != 1 && cluster != 2 && cluster != 4) return cudaErrorInvalidValue;
  const Arguments a{
      shares, int(low_channels), int(high_channels), log2_of(box_height), log2_of(box_width),
      int(cdiv(images, box_images)), int(cdiv(height, box_height)), int(cdiv(width, box_width)), int(split),
      int(cluster), 0, 0, 0};
  if (split < 1 || split > int64_t(a.deep) * a.down * a.across) return cudaErrorInvalidValue;
  return by_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      switch (columns) {
        case 64: return run<T, 64>(stream, low, high, a, images, height, width);
        case 128: return run<T, 128>(stream, low, high, a, images, height, width);
      }
    }
    return cudaErrorInvalidValue;
  });
}
