// Launch function of the sum of a weight gradient's shares.
#pragma once

#include "common.h"

extern "C" {

// gradient (size) = Σ_s shares (split, size)
cudaError_t sum_shares(Stream stream, const float* shares, float* gradient, int64_t size, int64_t split);
}
