// Launch functions of the RGB ends: k4 s2 p1 convolutions between an image of 1, 3 or 4 channels and a map of many,
// NHWC, as kernels/_cuda/image.py calls them. Height and width are the map's; the image has twice both. `channels`,
// the map's, are a multiple of 8.
#pragma once

#include "common.h"

extern "C" {

// y (N, H, W, channels) = conv(x (N, 2H, 2W, image_channels), w (channels, 4, 4, image_channels)), then:
//   neither saved nor state: the activation, tanh where `tanh` is not 0, else (leaky) ReLU by its slope;
//   saved (of y's shape):    times the activation's derivative at its output, saved;
//   saved, state, values:    times the derivative at state's affine of saved; values (2, groups, boxes, channels) get
//                            Σg and Σg·x̂ of each box, group by group.
cudaError_t image_conv(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, Maybe<const float> state,
    Maybe<float> values, int64_t dtype, int64_t images, int64_t groups, int64_t height, int64_t width,
    int64_t image_channels, int64_t channels, int64_t tanh, double slope);

// y (N, 2H, 2W, image_channels) = conv_transpose(x (N, H, W, channels), w (channels, 4, 4, image_channels)), then the
// activation, or with saved its derivative, as above.
cudaError_t image_conv_transpose(
    Stream stream, const void* x, const void* w, void* y, Maybe<const void> saved, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t image_channels, int64_t channels, int64_t tanh, double slope);

// shares (split, channels, 4, 4, image_channels) fp32, which add up to the weight's gradient (shares.h), from
// low (N, H, W, channels) and high (N, 2H, 2W, image_channels): what each block column of `split` contributes.
cudaError_t image_wgrad(
    Stream stream, const void* low, const void* high, float* shares, int64_t dtype, int64_t images,
    int64_t height, int64_t width, int64_t image_channels, int64_t channels, int64_t split);
}
