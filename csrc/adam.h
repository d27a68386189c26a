// Launch function of Adam. `table` (tensors, 6) holds addresses of p, g, m, v and the 16-bit copy (0 for none), and the
// elements of each tensor; `blocks` (programs, 2) the tensor and first element of each of ADAM_BLOCK elements.
#pragma once

#include "common.h"

constexpr int ADAM_BLOCK = 2048;

extern "C" {

// step: one int64, or one float where step_is_float. flags: a ticket, and whether a gradient overflowed; 0 between
// launches. loss_scale: scale, good steps, overflows; without it gradients are taken as they are.
cudaError_t adam(
    Stream stream, const int64_t* table, const int64_t* blocks, void* step, int32_t* flags,
    Maybe<float> loss_scale, int64_t programs, int64_t copy_dtype, int64_t step_is_float, int64_t move_scale,
    double lr, double beta1, double beta2, double eps, double growth, double backoff, double interval);
}
