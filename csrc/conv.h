// Launch functions of the k4 s2 p1 convolutions between maps of many channels, on the tensor cores: y and what its
// batch norm needs in one kernel, 16-bit. Channels are multiples of 64; height and width are the low side's.
//   transposed: 0: y (N, H, W, out) = conv(x (N, 2H, 2W, into), w (out, 4, 4, into))
//               1: y (N, 2H, 2W, out) = conv_transpose(x (N, H, W, into), w (into, 4, 4, out)), in four phases
//   box_height, box_width: of a tile of 128 pixels, powers of two, as many images as then fit; a tile is of one group,
//     and of one phase
//   columns: output channels of a tile, 64 or 128
//   cluster: blocks that share what they load of the weight, 1, 2, 4 or 8; divides the boxes of all groups together
// Then, with counts (groups, tiles) the pixels of each tile, and values (2, groups, tiles, out):
//   neither saved nor values: y is activated, by (leaky) ReLU of this slope
//   values, counts:           y is raw; mean and M2 = Σ(y − mean)² of each tile
//   saved (of y's shape):     y times the activation's derivative at its output, saved
//   saved, state, values:     y times the derivative at state's affine of saved, g; Σg and Σg·x̂ of each tile
// With tickets (conv_merge.h), the tiles' sums are merged before the launch ends, to `merged`:
//   statistics: the batch norm's state (4, groups, out), of its weight and bias; running statistics and tracked move
//   gradients:  means of g and g·x̂ (2, groups, out); dweight and dbias, where given
// _sm90 runs only on capability 9.0, _sm80 from 8.0 on.
#pragma once

#include "common.h"

extern "C" {

cudaError_t conv_sm80(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, Maybe<float> counts, Maybe<float> rounds, Maybe<float> round_counts, Maybe<int32_t> tickets,
    Maybe<const float> weight, Maybe<const float> bias, Maybe<float> running_mean, Maybe<float> running_var,
    Maybe<int64_t> tracked, Maybe<float> dweight, Maybe<float> dbias, Maybe<float> merged, int64_t transposed,
    int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out,
    int64_t box_height, int64_t box_width, int64_t columns, double slope, double eps, double momentum);
cudaError_t conv_sm90(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, Maybe<float> counts, Maybe<float> rounds, Maybe<float> round_counts, Maybe<int32_t> tickets,
    Maybe<const float> weight, Maybe<const float> bias, Maybe<float> running_mean, Maybe<float> running_var,
    Maybe<int64_t> tracked, Maybe<float> dweight, Maybe<float> dbias, Maybe<float> merged, int64_t transposed,
    int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width, int64_t into, int64_t out,
    int64_t box_height, int64_t box_width, int64_t columns, int64_t cluster, double slope, double eps, double momentum);

// shares (split, L, 4, 4, C) fp32, which add up to the weight's gradient (shares.h), from low (N, H, W, L) and
// high (N, 2H, 2W, C). A box is of 64 low pixels, `columns` are of L, and a cluster of 1, 2 or 4 blocks has the same
// pixels and columns, and other taps.
cudaError_t wgrad_sm90(
    Stream stream, const void* low, const void* high, float* shares, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t low_channels, int64_t high_channels, int64_t box_height, int64_t box_width,
    int64_t columns, int64_t cluster, int64_t split);
}
