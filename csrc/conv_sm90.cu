// conv and conv_transpose k4 s2 p1 between maps of many channels, for sm_90a: TMA boxes into wgmma, each pixel loaded once
// for four taps, and the weights once for a cluster.
#include "conv_merge.h"
#include "wgmma.h"

namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;    // two warpgroups, which load as well
constexpr int ROW_TILES = TILE_PIXELS / (THREADS / 2);  // of a warpgroup, 64 rows each
constexpr int TAPS = 4;                                 // of a plane
constexpr int PLANES = 2, MIN_STAGES = 3, MAX_STAGES = 6;
static_assert(DEPTH * 2 == ROW_BYTES && TILE_PIXELS % 64 == 0);

// Shared memory of a block: PLANES planes of pixels, 3 to 6 stages of weights, the epilogue's sums, the barriers.
template <int COLUMNS>
struct Plan {
  static constexpr int BLOCKS = 2;  // of an SM, so that one stores while the other multiplies
  static constexpr int STAGE_BYTES = COLUMNS * ROW_BYTES, SUMS_BYTES = 2 * WARPS * COLUMNS * 4;
  static constexpr int BARRIER_BYTES = 2 * (PLANES + MAX_STAGES) * 8;
  static constexpr int LARGEST_PLANE = TILE_PIXELS * 4 * ROW_BYTES;  // of boxes of one pixel, with three neighbours each
  static_assert(STAGE_BYTES % ATOM_BYTES == 0 && SUMS_BYTES % 8 == 0, "a stage starts an atom of the swizzle");
  static_assert(
      PLANES * LARGEST_PLANE + MIN_STAGES * STAGE_BYTES + SUMS_BYTES + BARRIER_BYTES <= 227 << 10,
      "what a block of sm_90 may have");

  // As many as leave an SM room for BLOCKS blocks, or where that is too few, for one less. It has 228 KB, and takes 1 KB
  // of each block's.
  static int stages(int plane_bytes) {
    int room = 0;
    for (int blocks = BLOCKS; blocks && room < MIN_STAGES; --blocks)
      room = ((228 << 10) / blocks - (1 << 10) - PLANES * plane_bytes - SUMS_BYTES - BARRIER_BYTES) / STAGE_BYTES;
    return room > MAX_STAGES ? MAX_STAGES : room;
  }
  static int total(int plane_bytes) {
    return PLANES * plane_bytes + stages(plane_bytes) * STAGE_BYTES + SUMS_BYTES + BARRIER_BYTES;
  }
};

template <class T>
struct Arguments {
  ConvShape shape;
  ConvOutput<T> out;
  ConvMerge merge;
  int cluster, part;            // blocks; rows of a stage (of 64 columns of one) that each of them loads
  int plane_rows, plane_bytes;  // pixels of a plane, and the room it has: whole atoms of the swizzle
  int stages;
};

// conv: y[n,oy,ox,o] = Σ_{ky,kx,c} x[n,2oy+ky−1,2ox+kx−1,c] · w[o,ky,kx,c]
// conv_transpose: y[n,2i+p,2j+q,o] = Σ_{a,b,c} x[n,i+p−a,j+q−b,c] · w[c,1−p+2a,1−q+2b,o], a and b in {0, 1}
//
// Tile: a box of 128 low pixels (of one phase) by COLUMNS channels. Its reduction goes plane by plane. A plane is what
//     four taps read, 64 channels deep: for conv the pixels of one parity of row and column, for conv_transpose all;
//     with one more row and one more column than the box. A tap is the same rows of it, some further on, which is no
//     matrix that a descriptor could name: so the pixels come to wgmma through registers, by ldmatrix.
// Bytes: x, w and y once from memory. From L2 a pixel comes (BH + 1)(BW + 1)/(BH·BW) times for each of ⌈out/COLUMNS⌉
//     tiles (and 4 phases) where tap by tap it were four times that; w once for each cluster of boxes.
// Accumulates in fp32, in registers, which the statistics see before it is rounded.
// Beats the library by what does not follow, and by what L2 need not give: of 128×128 tiles it is bound by L2 otherwise
//     (docs/cuda_convolution.md). Two blocks per SM where there are as many, so that one multiplies while another stores.
template <class T, int COLUMNS, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, Plan<COLUMNS>::BLOCKS)
    conv_sm90_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, Arguments<T> a) {
#if defined(DCGAN_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using P = Plan<COLUMNS>;
  DYNAMIC_SHARED(memory);
  unsigned char* const weights = memory + PLANES * a.plane_bytes;
  float* const sums = reinterpret_cast<float*>(weights + a.stages * P::STAGE_BYTES);
  uint64_t* const plane_full = reinterpret_cast<uint64_t*>(sums + P::SUMS_BYTES / 4);
  uint64_t* const plane_empty = plane_full + PLANES;
  uint64_t* const full = plane_empty + PLANES;
  uint64_t* const empty = full + MAX_STAGES;
  const ConvShape& s = a.shape;
  const ConvTile tile = conv_tile(s, int(blockIdx.x), COLUMNS, a.cluster);
  const int planes = (TRANSPOSED ? 1 : 4) * (s.into / DEPTH), steps = TAPS * planes, rank = cluster_rank();
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

  const auto load_plane = [&](int i) {
    const int slot = i % PLANES, image = tile.group * s.per_group + tile.n;
    barrier_arrive_expecting(plane_full + slot, a.plane_rows * ROW_BYTES);
    void* const to = memory + slot * a.plane_bytes;
    if constexpr (TRANSPOSED) {
      const int h = tile.h + tile.phase / 2 - 1, w = tile.w + tile.phase % 2 - 1;
      load_box<4>(to, x, {i * DEPTH, w, h, image}, plane_full + slot);
    } else {  // row 2h + p of the image, column 2w + q
      const int p = i / 2 % 2, q = i % 2;
      load_box<5>(to, x, {q * s.into + i / 4 * DEPTH, tile.w - q, p, tile.h - p, image}, plane_full + slot);
    }
  };
  // Each block of a cluster loads its part of a stage, for all of them.
  const auto load_weights = [&](int step, int stage) {
    const int i = step / TAPS, down = step / 2 % 2, right = step % 2;
    const int p = TRANSPOSED ? tile.phase / 2 : i / 2 % 2, q = TRANSPOSED ? tile.phase % 2 : i % 2;
    unsigned char* const to = weights + stage * P::STAGE_BYTES;
    const auto load = [&](unsigned char* part, const int (&at)[2]) {
      if (a.cluster == 1) load_box<2>(part, w, at, full + stage);
      else load_box_to_all(part, w, at, full + stage, a.cluster);
    };
    barrier_arrive_expecting(full + stage, P::STAGE_BYTES);
    if constexpr (TRANSPOSED) {  // rows of 64 columns of one k; 64 such rows, then the next 64 columns
      const int ky = 1 - p + 2 * (1 - down), kx = 1 - q + 2 * (1 - right), from = rank * a.part;
#pragma unroll
      for (int n = 0; n < COLUMNS; n += 64)
        load(to + (n + from) * ROW_BYTES, {(ky * 4 + kx) * s.out + tile.column + n, i * DEPTH + from});
    } else {  // rows of 64 k of one column
      const int ky = 1 - p + 2 * down, kx = 1 - q + 2 * right, from = rank * a.part;
      load(to + from * ROW_BYTES, {(ky * 4 + kx) * s.into + i / 4 * DEPTH, tile.column + from});
    }
  };

  if (threadIdx.x == 0) {
    prefetch_map(x), prefetch_map(w);
    for (int i = 0; i < PLANES; ++i) barrier_init(plane_full + i, 1), barrier_init(plane_empty + i, WARPS);
#pragma unroll 1
    for (int i = 0; i < a.stages; ++i) barrier_init(full + i, 1), barrier_init(empty + i, WARPS * a.cluster);
    barrier_init_fence();
  }
  if (a.cluster > 1) cluster_arrive<true>(), cluster_wait();
  else __syncthreads();
  after_previous();
  if (threadIdx.x == 0) {
    for (int i = 0; i < PLANES && i < planes; ++i) load_plane(i);
#pragma unroll 1
    for (int step = 0; step < a.stages && step < steps; ++step) load_weights(step, step);
  }
  __syncwarp();

  const int wide = (1 << s.log_width) + 1, high = (1 << s.log_height) + 1;  // of a plane
  uint32_t rows[ROW_TILES];                                                // in bytes: what this lane names to ldmatrix
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    const int r = pixel_of_row(s, m * 64 + warp * 16 + lane % 16), h = r >> s.log_width & (high - 2);
    rows[m] = (((r >> (s.log_width + s.log_height)) * high + h) * wide + (r & (wide - 2))) * ROW_BYTES;
  }
  // The pipeline. A step is one tap of a plane, in two halves a and b of 32 channels, a group of wgmma each. With 4
  // stages, after the loads above (planes 0 and 1, weights of steps 0 to 3):
  //
  //     step   plane,  waits for    in flight when   then freed   then refilled by thread 0:
  //            tap     weights of   a has begun      by warps     stage ← weights of step (parity waited for)
  //     0      0, 0    stage 0      0a               –            –
  //     1      0, 1    stage 1      1a               stage 0      –
  //     2      0, 2    stage 2      2a               stage 1      stage 0 ← 4 (0)
  //     3      0, 3    stage 3      3a               stage 2      stage 1 ← 5 (0)
  //     4      1, 0    stage 0      4a               stage 3      stage 2 ← 6 (0)     and plane 0 freed, plane 2 loaded
  //     5      1, 1    stage 1      5a               stage 0      stage 3 ← 7 (0)
  //     6      1, 2    stage 2      6a               stage 1      stage 0 ← 8 (1)
  //
  // "In flight" is what wgmma_wait<1> leaves: once a step's a has begun, the step before is done and its stage free;
  // once its b has begun, a is done and left[0] free.
  //
  // Invariant of refill_parity: from step 2 on it is (step − 2) / stages mod 2, the parity of the phase of `empty` that
  // ends when all warps of the cluster have freed the stage of step − 2. One bit is enough: a stage is freed again only
  // after its refill, which comes after this wait, so the barrier is never more than one phase ahead of the wait.
  float d[ROW_TILES][COLUMNS / 2] = {};
  uint32_t left[2][ROW_TILES][2][4];  // of half a step each: one is loaded while the other is multiplied
  int stage = 0, parity = 0;          // of this step
  int last = 0, last_but_one = 0, refill_parity = 0;  // stages of the two steps before
  for (int i = 0; i < planes; ++i) {
    const uint32_t plane = shared_address(memory) + i % PLANES * a.plane_bytes;
    barrier_wait(plane_full + i % PLANES, i / PLANES & 1);
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      const int step = i * TAPS + tap, shift = (tap / 2 * wide + tap % 2) * ROW_BYTES;
      const uint32_t b = shared_address(weights) + stage * P::STAGE_BYTES;
      barrier_wait(full + stage, parity);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = half * 32;
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m)  // matrices: rows 0 to 7 and 8 to 15 of k to k + 7, then of the next eight
            load_matrices<false>(
                left[half][m][e], swizzled(plane + rows[m] + shift + (k + 16 * e + lane / 16 * 8) * 2));
        wgmma_fence();
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint64_t right = TRANSPOSED ? descriptor(b + (k + 16 * e) * ROW_BYTES, ATOM_BYTES, DEPTH * ROW_BYTES)
                                            : descriptor(b + 2 * (k + 16 * e), ATOM_BYTES);
#pragma unroll
          for (int m = 0; m < ROW_TILES; ++m) wgmma<T, COLUMNS, TRANSPOSED>(d[m], left[half][m][e], right);
        }
        wgmma_commit();
        wgmma_wait<1>();  // all but this half step: the registers of the one before are free
        if (half || !step) continue;

        // The last step is done with its stage, and at a plane's first tap with the plane before.
        if (lane < a.cluster) {
          if (a.cluster == 1) barrier_arrive(empty + last);
          else barrier_arrive_at(empty + last, lane);
        }
        if (!tap && !lane) barrier_arrive(plane_empty + (i - 1) % PLANES);
        if (threadIdx.x == 0) {  // a stage is filled again a step later, when others are likely done with it
          if (step >= 2 && step - 2 + a.stages < steps) {
            barrier_wait(empty + last_but_one, refill_parity);
            load_weights(step - 2 + a.stages, last_but_one);
          }
          if (!tap && i - 1 + PLANES < planes) {
            barrier_wait(plane_empty + (i - 1) % PLANES, (i - 1) / PLANES & 1);
            load_plane(i - 1 + PLANES);
          }
        }
        __syncwarp();
      }
      if (step >= 2 && last_but_one == a.stages - 1) refill_parity ^= 1;
      last_but_one = last, last = stage;
      if (++stage == a.stages) stage = 0, parity ^= 1;
    }
  }
  wgmma_wait<0>();
  if (a.cluster > 1) cluster_arrive<false>();
  finish_tile<T, ROW_TILES, 64, COLUMNS, COLUMNS, WARPS, THREADS>(
      d, warp * 16 + lane / 4, 0, warp, s, tile, a.out, sums);
  if (a.merge.tickets) merge_tiles<T, COLUMNS, THREADS>(s, tile, a.out, a.merge, reinterpret_cast<int*>(sums));
  if (a.cluster > 1) cluster_wait();  // before a block ends that others still signal
#endif
}

template <class T, int COLUMNS, bool TRANSPOSED>
cudaError_t run(
    Stream stream, const void* x, const void* w, const ConvShape& s, const ConvOutput<T>& out,
    const ConvMerge& merge, int cluster) {
  using P = Plan<COLUMNS>;
  if (cluster < 1 || cluster > 8 || (cluster & (cluster - 1)) || s.groups * s.boxes() % cluster)
    return cudaErrorInvalidValue;
  const int64_t images = int64_t(s.per_group) * s.groups, taps = 16;
  const int wide = (1 << s.log_width) + 1, high = (1 << s.log_height) + 1, rows = s.box_images * high * wide;
  const int plane_bytes = cdiv(rows * ROW_BYTES, ATOM_BYTES) * ATOM_BYTES;
  const int part = (TRANSPOSED ? DEPTH : COLUMNS) / cluster;
  TensorMap pixels, weights;
  auto error = TRANSPOSED
                   ? make_map<T>(
                         pixels, x, 4, {s.into, s.width, s.height, images, 0}, {DEPTH, wide, high, s.box_images, 0})
                   : make_map<T>(  // the image's pairs of rows and columns: a plane is one box of this view
                         pixels, x, 5, {2 * s.into, s.width, 2, s.height, images},
                         {DEPTH, wide, 1, high, s.box_images});
  if (error != cudaSuccess) return error;
  error = TRANSPOSED ? make_map<T>(weights, w, 2, {taps * s.out, s.into, 0, 0, 0}, {64, part, 0, 0, 0})
                     : make_map<T>(weights, w, 2, {taps * s.into, s.out, 0, 0, 0}, {DEPTH, part, 0, 0, 0});
  if (error != cudaSuccess) return error;
  const unsigned grid = unsigned(s.groups) * s.boxes() * s.phases * cdiv(s.out, COLUMNS);
  const auto kernel = conv_sm90_kernel<T, COLUMNS, TRANSPOSED>;
  error = built_for_sm90a(reinterpret_cast<const void*>(kernel), COLUMNS);
  if (error != cudaSuccess) return error;
  const Arguments<T> a{s, out, merge, cluster, part, rows, plane_bytes, P::stages(plane_bytes)};
  return launch(kernel, Grid(grid, unsigned(cluster)), THREADS, P::total(plane_bytes), stream, pixels, weights, a);
}

}  // namespace

cudaError_t conv_sm90(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, Maybe<float> counts, Maybe<float> rounds, Maybe<float> round_counts, Maybe<int32_t> tickets,
    Maybe<const float> weight, Maybe<const float> bias, Maybe<float> running_mean, Maybe<float> running_var,
    Maybe<int64_t> tracked, Maybe<float> dweight, Maybe<float> dbias, Maybe<float> merged, int64_t transposed,
    int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out,
    int64_t box_height, int64_t box_width, int64_t columns, int64_t cluster, double slope, double eps, double momentum) {
  const auto shape = conv_shape(images, groups, height, width, into, out, box_height, box_width, transposed);
  const ConvMerge merge{
      rounds.at, round_counts.at, reinterpret_cast<unsigned*>(tickets.at),
      {weight.at, bias.at, running_mean.at, running_var.at, float(eps), float(momentum)},
      tracked.at, dweight.at, dbias.at, merged.at};
  return by_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      const ConvOutput<T> output{
          static_cast<T*>(y), static_cast<const T*>(saved.at), state.at, values.at, counts.at, float(slope)};
      const auto with = [&]<int COLUMNS>() {
        return transposed ? run<T, COLUMNS, true>(stream, x, w, shape, output, merge, int(cluster))
                          : run<T, COLUMNS, false>(stream, x, w, shape, output, merge, int(cluster));
      };
      switch (columns) {
        case 64: return with.template operator()<64>();
        case 128: return with.template operator()<128>();
      }
    }
    return cudaErrorInvalidValue;
  });
}
