// Merging what tiles leave of a batch norm: Chan's formula, and what follows from a group's sums.
#pragma once

#include "common.h"

// Count, mean and M2 of two sets of values as those of their union (Chan, Golub and LeVeque 1979, eq. 2.1).
__device__ __forceinline__ void chan(float& n, float& mean, float& m2, float n_new, float mean_new, float m2_new) {
  if (n_new == 0) return;
  const float total = n + n_new, part = n_new / total, delta = mean_new - mean;
  mean += delta * part;
  m2 += m2_new + delta * delta * n * part;
  n = total;
}

// Batch norm's parameters and running statistics, of which the latter may be null.
struct Norm {
  const float *weight, *bias;
  float *running_mean, *running_var;
  float eps, momentum;
};

// Channel c of one group: its state, rows `row` apart, and running ← (1 − momentum)·running + momentum·new.
__device__ __forceinline__ void settle_statistics(
    Norm norm, float* state, int64_t row, int c, float n, float mean, float m2) {
  const float rstd = 1 / sqrtf(m2 / n + norm.eps), scale = norm.weight[c] * rstd;
  state[0] = mean, state[row] = rstd, state[2 * row] = scale, state[3 * row] = fmaf(-mean, scale, norm.bias[c]);
  if (norm.running_mean) {
    norm.running_mean[c] += norm.momentum * (mean - norm.running_mean[c]);
    norm.running_var[c] += norm.momentum * (m2 / (n - 1) - norm.running_var[c]);
  }
}
