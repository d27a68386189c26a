// conv and conv_transpose k4 s2 p1 between maps of many channels, for sm_90a: TMA boxes into wgmma.
#include "conv_tile.h"
#include "wgmma.h"

namespace {

constexpr int CONSUMERS = TILE_PIXELS / 64 * 128;  // threads: two warpgroups of 64 rows
constexpr int THREADS = CONSUMERS + 128;           // and one that loads
constexpr int LINES = CONSUMERS / WARP;            // consumer warps, of 16 rows
static_assert(LINES * 16 == TILE_PIXELS && DEPTH * 2 == ROW_BYTES);

// Registers of a loading and of a multiplying thread, which share out what a launch of 384 gets: 168 each.
constexpr int FEW = 24, MANY = 240;
static_assert(FEW * 128 + MANY * CONSUMERS <= 168 * THREADS);

// Shared memory of a block: `STAGES` pairs of operand tiles, the barriers, the epilogue's sums.
template <int COLUMNS>
struct Plan {
  static constexpr int A_BYTES = TILE_PIXELS * ROW_BYTES, B_BYTES = COLUMNS * ROW_BYTES, BYTES = A_BYTES + B_BYTES;
  static constexpr int STAGES = (192 << 10) / BYTES;
  static constexpr int BARRIERS = STAGES * BYTES, SUMS = BARRIERS + 2 * STAGES * 8;
  static constexpr int TOTAL = SUMS + (LINES + 1) * COLUMNS * 4;
  static_assert(A_BYTES % ATOM_BYTES == 0 && B_BYTES % ATOM_BYTES == 0, "each tile starts an atom of the swizzle");
  static_assert(BARRIERS % 8 == 0 && SUMS % 16 == 0);
  static_assert(TOTAL <= 227 << 10, "what a block of sm_90 may have");
};

template <class T>
struct Arguments {
  ConvShape shape;
  ConvOutput<T> out;
};

// conv: y[n,oy,ox,o] = Σ_{ky,kx,c} x[n,2oy+ky−1,2ox+kx−1,c] · w[o,ky,kx,c]
// conv_transpose: y[n,2i+p,2j+q,o] = Σ_{a,b∈{0,1},c} x[n,i+p−a,j+q−b,c] · w[c,1−p+2a,1−q+2b,o]
// then the activation, or the tile's mean and M2.
//
// Tile: a box of 128 low pixels (of one phase) by COLUMNS channels; 16 (4) taps of the input's channels, 64 at a time.
// Bytes: x, w and y once from memory; from L2 x 4·⌈out/COLUMNS⌉ (16·) times, and w once a row of tiles.
// Accumulates in fp32, in registers, which the statistics see before it is rounded.
// Beats the library by what does not follow. Unlike Triton's it feeds both operands from shared memory, x too, and has
//     loads in flight by a warp of its own; which of the two is faster is for the tuned table to say.
template <class T, int COLUMNS, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS, 1)
    conv_sm90_kernel(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, Arguments<T> arguments) {
#if defined(DCGAN_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using P = Plan<COLUMNS>;
  DYNAMIC_SHARED(memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + P::BARRIERS);
  uint64_t* const empty = full + P::STAGES;
  const ConvShape& s = arguments.shape;
  const ConvTile tile = conv_tile(s, int(blockIdx.x), COLUMNS);
  const int chunks = s.into / DEPTH, steps = (TRANSPOSED ? 4 : 16) * chunks;
  const int warp = threadIdx.x / WARP;
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::STAGES; ++i) barrier_init(full + i, 1), barrier_init(empty + i, LINES);
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= LINES) {
    share_registers<FEW, false>();
    if (threadIdx.x == CONSUMERS) {
      const int image = tile.group * s.per_group + tile.n;
      for (int step = 0; step < steps; ++step) {
        const int stage = step % P::STAGES, tap = step / chunks, k = step % chunks * DEPTH;
        unsigned char* const a = memory + stage * P::BYTES;
        unsigned char* const b = a + P::A_BYTES;
        barrier_wait(empty + stage, (step / P::STAGES & 1) ^ 1);
        barrier_arrive_expecting(full + stage, P::BYTES);
        if constexpr (TRANSPOSED) {
          const int p = tile.phase / 2, q = tile.phase % 2, up = tap / 2, back = tap % 2;
          const int at = ((1 - p + 2 * up) * 4 + 1 - q + 2 * back) * s.out + tile.column;
          load_box<4>(a, x, {k, tile.w + q - back, tile.h + p - up, image}, full + stage);
#pragma unroll
          for (int i = 0; i < COLUMNS / 64; ++i)
            load_box<2>(b + i * DEPTH * ROW_BYTES, w, {at + 64 * i, k}, full + stage);
        } else {
          const int ky = tap / 4 + 1, kx = tap % 4 + 1;  // of the padded image, whose pairs of rows start with row −1
          load_box<5>(
              a, x, {kx % 2 * s.into + k, tile.w + kx / 2 - 1, ky % 2, tile.h + ky / 2 - 1, image}, full + stage);
          load_box<2>(b, w, {tap * s.into + k, tile.column}, full + stage);
        }
      }
    }
  } else {
    share_registers<MANY, true>();
    float d[1][COLUMNS / 2] = {};
    for (int step = 0; step < steps; ++step) {
      const int stage = step % P::STAGES;
      const uint32_t a = shared_address(memory + stage * P::BYTES) + warp / 4 * 64 * ROW_BYTES;
      const uint32_t b = shared_address(memory + stage * P::BYTES + P::A_BYTES);
      barrier_wait(full + stage, step / P::STAGES & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < DEPTH; k += 16) {
        const uint64_t right = TRANSPOSED ? descriptor(b + k * ROW_BYTES, ATOM_BYTES, DEPTH * ROW_BYTES)
                                          : descriptor(b + 2 * k, ATOM_BYTES);
        wgmma<T, COLUMNS, TRANSPOSED>(d[0], descriptor(a + 2 * k, ATOM_BYTES), right);
      }
      wgmma_commit();
      wgmma_wait<1>();  // the step before is done with its stage
      if (step && threadIdx.x % WARP == 0) barrier_arrive(empty + (step - 1) % P::STAGES);
    }
    wgmma_wait<0>();
    finish_tile<T, 1, COLUMNS, COLUMNS, LINES, CONSUMERS>(
        d, warp * 16 + threadIdx.x % WARP / 4, 0, warp, s, tile, arguments.out,
        reinterpret_cast<float*>(memory + P::SUMS));
  }
#endif
}

// `base` seen as a tensor of these sizes, innermost first, read box by box of 128-byte rows.
template <class T>
cudaError_t make_map(
    TensorMap& map, const void* base, int rank, const int64_t (&sizes)[MAX_RANK], const int (&box)[MAX_RANK]) {
#ifdef DCGAN_HOST
  map = {static_cast<const unsigned char*>(base), rank, sizeof(T), {}, {}, {}};
  int64_t stride = sizeof(T);
  for (int d = 0; d < rank; stride *= sizes[d++])
    map.sizes[d] = sizes[d], map.strides[d] = stride, map.box[d] = box[d];
  return cudaSuccess;
#else
  using Encode = CUresult(
      CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
      const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static Encode* encode = nullptr;  // of the driver, which the extension does not link
  if (!encode) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const auto error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
    if (error != cudaSuccess) return error;
    if (status != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    encode = reinterpret_cast<Encode*>(found);
  }
  cuuint64_t extents[MAX_RANK], strides[MAX_RANK];
  cuuint32_t boxes[MAX_RANK], steps[MAX_RANK];
  cuuint64_t stride = sizeof(T);
  for (int d = 0; d < rank; ++d) {
    extents[d] = cuuint64_t(sizes[d]), boxes[d] = cuuint32_t(box[d]), steps[d] = 1;
    stride *= extents[d], strides[d] = stride;  // of the next dimension: the innermost's is not given
  }
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      &map, type, cuuint32_t(rank), const_cast<void*>(base), extents, strides, boxes, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

template <class T, int COLUMNS, bool TRANSPOSED>
cudaError_t run(cudaStream_t stream, const void* x, const void* w, const Arguments<T>& a) {
  const ConvShape& s = a.shape;
  const int64_t images = int64_t(s.per_group) * s.groups, taps = 16;
  const int width = 1 << s.log_width, height = 1 << s.log_height;
  TensorMap pixels, weights;
  auto error = TRANSPOSED ? make_map<T>(
                                pixels, x, 4, {s.into, s.width, s.height, images, 0},
                                {DEPTH, width, height, s.box_images, 0})
                          : make_map<T>(  // the image's pairs of rows and columns: each tap is one box of this view
                                pixels, x, 5, {2 * s.into, s.width, 2, s.height, images},
                                {DEPTH, width, 1, height, s.box_images});
  if (error != cudaSuccess) return error;
  error = TRANSPOSED ? make_map<T>(weights, w, 2, {taps * s.out, s.into, 0, 0, 0}, {64, DEPTH, 0, 0, 0})
                     : make_map<T>(weights, w, 2, {taps * s.into, s.out, 0, 0, 0}, {DEPTH, COLUMNS, 0, 0, 0});
  if (error != cudaSuccess) return error;
  const unsigned grid = unsigned(s.groups) * s.boxes() * s.phases * cdiv(s.out, COLUMNS);
  const auto kernel = conv_sm90_kernel<T, COLUMNS, TRANSPOSED>;
#ifndef DCGAN_HOST
  cudaFuncAttributes found;  // built for 9.0 and not 9.0a, the kernel is empty: no room even for its accumulator
  error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel));
  if (error != cudaSuccess) return error;
  if (found.numRegs < COLUMNS / 2) return cudaErrorNoKernelImageForDevice;
#endif
  return launch(kernel, grid, THREADS, Plan<COLUMNS>::TOTAL, stream, pixels, weights, a);
}

template <bool TRANSPOSED>
cudaError_t conv(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    const ConvShape& shape, int64_t columns, double slope) {
  return by_dtype(dtype, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      const Arguments<T> a{shape, {static_cast<T*>(y), values.at, counts.at, float(slope)}};
      switch (columns) {
        case 64: return run<T, 64, TRANSPOSED>(stream, x, w, a);
        case 128: return run<T, 128, TRANSPOSED>(stream, x, w, a);
        case 256: return run<T, 256, TRANSPOSED>(stream, x, w, a);
      }
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t conv_sm90(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope) {
  const auto shape = conv_shape(images, groups, height, width, into, out, box_height, box_width, false);
  return conv<false>(stream, x, w, y, values, counts, dtype, shape, columns, slope);
}

cudaError_t conv_transpose_sm90(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope) {
  const auto shape = conv_shape(images, groups, height, width, into, out, box_height, box_width, true);
  return conv<true>(stream, x, w, y, values, counts, dtype, shape, columns, slope);
}
