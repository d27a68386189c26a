// Launch functions of D's head, as kernels/_cuda/head.py describes their arguments. y is `groups` times `per_group`
// images of `pixels` by `channels`; bit g of `real` says whether group g's target is 1.
#pragma once

#include "common.h"

extern "C" {

cudaError_t head(
    Stream stream, const void* y, const void* weight, const float* state, Maybe<const float> scale,
    float* logits, float* dlogits, float* means, int32_t* ticket, int64_t dtype, int64_t per_group, int64_t groups,
    int64_t pixels, int64_t channels, int64_t real, double slope);

cudaError_t gan_loss(
    Stream stream, const void* logits, float* dlogits, float* means, int64_t dtype, int64_t per_group,
    int64_t groups, int64_t real);

cudaError_t head_grad(
    Stream stream, const void* y, const void* weight, const float* state, const float* dlogits, void* g,
    float* values, Maybe<float> dw, int64_t dtype, int64_t per_group, int64_t groups, int64_t pixels,
    int64_t channels, double slope);
}
