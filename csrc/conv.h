// Launch functions of the k4 s2 p1 convolutions between maps of many channels, on the tensor cores: y and what its
// batch norm needs in one kernel, 16-bit. Channels are multiples of 64; height and width are the low side's.
//   box_height, box_width: of a tile of 128 pixels, powers of two, as many images as then fit; a tile is of one group
//   columns: output channels of a tile, 64, 128 or, on sm_90, 256
//   values (2, groups, tiles, out), counts (groups, tiles): mean and M2 = Σ(y − mean)² of each tile, and its pixels;
//     where they are given. Otherwise y is activated, by (leaky) ReLU of this slope.
// _sm90 runs on capability 9.0 alone, _sm80 from 8.0 on.
#pragma once

#include "common.h"

extern "C" {

// y (N, H, W, out) = conv(x (N, 2H, 2W, into), w (out, 4, 4, into))
cudaError_t conv_sm80(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope);
cudaError_t conv_sm90(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope);

// y (N, 2H, 2W, out) = conv_transpose(x (N, H, W, into), w (into, 4, 4, out)); each of its four phases has its tiles
cudaError_t conv_transpose_sm80(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope);
cudaError_t conv_transpose_sm90(
    cudaStream_t stream, const void* x, const void* w, void* y, Maybe<float> values, Maybe<float> counts, int64_t dtype,
    int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out, int64_t box_height,
    int64_t box_width, int64_t columns, double slope);
}
