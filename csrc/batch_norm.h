// Launch functions of batch norm, NHWC, as kernels/_cuda/batch_norm.py describes their arguments. A tensor is `groups`
// times `rows` pixels of `channels`; a tile is `tile_rows` pixels of one group, the last one of a group maybe fewer,
// and a group has `tiles` of them.
#pragma once

#include "common.h"

extern "C" {

cudaError_t bn_statistics(
    Stream stream, const void* y, float* values, float* counts, int64_t dtype, int64_t rows, int64_t groups,
    int64_t channels, int64_t tile_rows);

cudaError_t bn_merge_statistics(
    Stream stream, const float* values, const float* counts, const float* weight, const float* bias,
    Maybe<float> running_mean, Maybe<float> running_var, Maybe<int64_t> tracked, float* state, int64_t groups,
    int64_t tiles, int64_t channels, double eps, double momentum);

cudaError_t bn_apply(
    Stream stream, const void* y, const float* state, void* out, int64_t dtype, int64_t rows, int64_t groups,
    int64_t channels, int64_t tile_rows, double slope);

cudaError_t bn_activation_grad(
    Stream stream, const void* da, const void* y, const float* state, void* g, float* values, int64_t dtype,
    int64_t rows, int64_t groups, int64_t channels, int64_t tile_rows, double slope);

cudaError_t bn_merge_sums(
    Stream stream, const float* values, float* dweight, float* dbias, float* means, int64_t rows, int64_t groups,
    int64_t tiles, int64_t channels);

cudaError_t bn_apply_grad(
    Stream stream, const void* g, const void* y, const float* state, const float* means, void* dy, int64_t dtype,
    int64_t rows, int64_t groups, int64_t channels, int64_t tile_rows);
}
