// D's last layer and everything behind it: BN apply, dot product, BCE with logits, and all of that backward; and the
// loss by itself, of logits that are there already.
//
// The layer reduces a whole feature map to one logit, so each feature is used once, and the batch norm before it can be
// applied as the features are read: neither they nor their gradient is ever written activated.
#include "head.h"
#include "ticket.h"

#include "block.h"

namespace {

constexpr int COLUMNS = 8;  // threads across the channels in the backward pass: 128 bytes of a pixel, and many blocks
static_assert(THREADS % COLUMNS == 0, "whole lines of threads");

struct Sizes {
  int64_t per_group;  // images
  int groups, pixels, channels, columns;
  unsigned real;
};

struct Loss {
  float loss, slope, probability;
};

// softplus(∓logit), its derivative σ(logit) − target, and σ(logit).
__device__ __forceinline__ Loss cross_entropy(float logit, bool real) {
  const float e = expf(-fabsf(logit));  // never overflows
  const float larger = 1 / (1 + e);  // of the probability and 1 − probability, e times it the smaller: nothing cancels
  const float probability = logit >= 0 ? larger : e * larger, rest = logit >= 0 ? e * larger : larger;
  const float towards = real ? -logit : logit;
  return {(towards > 0 ? towards : 0) + log1pf(e), real ? -rest : probability, probability};
}

// means[0, group], means[1, group] = mean loss and probability of a group; its dlogits where they are wanted.
template <class T>
__device__ __forceinline__ void group_means(const T* logits, float* dlogits, float* means, int group, const Sizes& s) {
  const bool real = s.real >> group & 1;
  float loss = 0, probability = 0;
  for (int64_t n = threadIdx.x; n < s.per_group; n += THREADS) {
    const Loss one = cross_entropy(to_float(logits[group * s.per_group + n]), real);
    loss += one.loss, probability += one.probability;
    if (dlogits) dlogits[group * s.per_group + n] = one.slope / s.per_group;
  }
  loss = block_sum(loss), probability = block_sum(probability);
  if (threadIdx.x == 0) means[group] = loss / s.per_group, means[s.groups + group] = probability / s.per_group;
}

// logit = Σ act(scale·y + shift)·w; loss = softplus(∓logit); dlogit = (σ(logit) − target) / images of the group.
// Tile: one image; the last block to finish also takes the groups' mean losses and probabilities.
// Bytes: y once; w and the state out of L2.
// Accumulates in fp32, a sum per thread and then a tree; means over logits in order: the same bits each run.
// Beats the library's apply, GEMV, sigmoid, loss and their backward kernels by reading only y.
// Two blocks per SM: a step has 256 images for 132 of them, so each may take the registers that its loads need.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 2) head_kernel(
    const T* y, const T* w, const float* state, const float* loss_scale, float* logits, float* dlogits, float* means,
    unsigned* ticket, Sizes s, float slope) {
  after_previous();
  const int group = int(blockIdx.x / s.per_group), features = s.pixels * s.channels;
  const T* image = y + int64_t(blockIdx.x) * features;
  const float* scales = state + int64_t(2 * s.groups + group) * s.channels;
  const float* shifts = state + int64_t(3 * s.groups + group) * s.channels;
  float total = 0;
#pragma unroll 4
  for (int i = threadIdx.x * N; i < features; i += THREADS * N) {
    float x[N], weight[N], scale[N], shift[N];
    load(image + i, x), load(w + i, weight);
    load(scales + i % s.channels, scale), load(shifts + i % s.channels, shift);
#pragma unroll
    for (int j = 0; j < N; ++j) total += activate(fmaf(x[j], scale[j], shift[j]), slope) * weight[j];
  }
  const float logit = block_sum(total);
  if (threadIdx.x == 0) {
    logits[blockIdx.x] = logit;
    const float slope_of_mean = cross_entropy(logit, s.real >> group & 1).slope / s.per_group;
    dlogits[blockIdx.x] = loss_scale ? slope_of_mean * *loss_scale : slope_of_mean;
  }
  __shared__ int flag;
  if (last_block(ticket, gridDim.x, &flag))
    for (int g = 0; g < s.groups; ++g) group_means<float>(logits, nullptr, means, g, s);
}

// means[0,g] = mean softplus(∓logit), means[1,g] = mean σ(logit), dlogit = (σ(logit) − target) / images of g.
// Tile: one group of logits.
// Bytes: 8 a logit.
// Accumulates in fp32, in order: the same bits each run.
// Beats the library's sigmoid, loss, two means and their backward by being one launch; nothing else costs here.
template <class T>
__global__ void __launch_bounds__(THREADS) gan_loss_kernel(const T* logits, float* dlogits, float* means, Sizes s) {
  after_previous();
  group_means(logits, dlogits, means, blockIdx.x, s);
}

// g = dlogit·w·act′; Σg and Σg·x̂ over a pixel's images; dw = Σ dlogit·act(scale·y + shift) where it is wanted.
// Tile: one pixel, columns · N channels, all images, a line of threads each.
// Bytes: y and g once.
// Accumulates in fp32, each line its images in order, then over the lines: the same bits each run.
// Beats the library's two outer products, activation backward and reduction, which read and write the map five times.
// One block per SM: a step has 128 of them in 16 bits, so each block may take all registers.
template <class T, int N>
__global__ void __launch_bounds__(THREADS, 1) head_grad_kernel(
    const T* y, const T* w, const float* state, const float* dlogits, T* g, float* values, float* dw, Sizes s,
    float slope) {
  after_previous();
  const int pixel = blockIdx.x, line = threadIdx.x / s.columns, lines = THREADS / s.columns;
  const int c = (blockIdx.y * s.columns + threadIdx.x % s.columns) * N;
  const bool inside = c < s.channels;
  float weight[N], dw_total[N] = {};
  if (inside) load(w + int64_t(pixel) * s.channels + c, weight);
  for (int group = 0; group < s.groups; ++group) {
    float mean[N], rstd[N], scale[N], shift[N], sums[2 * N] = {};
    const float* from = state + int64_t(group) * s.channels + c;
    const int64_t row = int64_t(s.groups) * s.channels;
    if (inside) load(from, mean), load(from + row, rstd), load(from + 2 * row, scale), load(from + 3 * row, shift);
#pragma unroll 2
    for (int64_t n = line; inside && n < s.per_group; n += lines) {
      const int64_t image = group * s.per_group + n, at = (image * s.pixels + pixel) * s.channels + c;
      const float dlogit = dlogits[image];
      float raw[N], grad[N];
      load(y + at, raw);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float z = fmaf(raw[i], scale[i], shift[i]);
        grad[i] = dlogit * weight[i] * derivative(z, slope);
        sums[i] += grad[i];
        sums[N + i] += grad[i] * ((raw[i] - mean[i]) * rstd[i]);
        dw_total[i] += dlogit * activate(z, slope);
      }
      store(g + at, grad);
    }
    reduce_lines(sums, s.columns, add<2 * N>);
    if (line == 0 && inside) {
      float part[N];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < N; ++i) part[i] = sums[r * N + i];
        store(values + (int64_t(r * s.groups + group) * s.pixels + pixel) * s.channels + c, part);
      }
    }
  }
  if (!dw) return;
  reduce_lines(dw_total, s.columns, add<N>);
  if (line == 0 && inside) store(dw + int64_t(pixel) * s.channels + c, dw_total);
}

// f.operator()<T, N>(vectors) for maps of this dtype and these channels, `vectors` accesses wide.
template <class F>
cudaError_t over_channels(int64_t dtype, int64_t channels, F f) {
  return by_dtype(dtype, [&]<class T>() {
    return channels % WIDE<T> ? f.template operator()<T, 1>(channels)
                              : f.template operator()<T, WIDE<T>>(channels / WIDE<T>);
  });
}

}  // namespace

extern "C" {

cudaError_t head(
    Stream stream, const void* y, const void* weight, const float* state, Maybe<const float> scale,
    float* logits, float* dlogits, float* means, int32_t* ticket, int64_t dtype, int64_t per_group, int64_t groups,
    int64_t pixels, int64_t channels, int64_t real, double slope) {
  const Sizes s = {per_group, int(groups), int(pixels), int(channels), 1, unsigned(real)};
  return over_channels(dtype, channels, [&]<class T, int N>(int64_t) {
    return launch(
        head_kernel<T, N>, dim3(unsigned(groups * per_group)), THREADS, 0, stream, static_cast<const T*>(y),
        static_cast<const T*>(weight), state, scale.at, logits, dlogits, means, reinterpret_cast<unsigned*>(ticket), s,
        float(slope));
  });
}

cudaError_t gan_loss(
    Stream stream, const void* logits, float* dlogits, float* means, int64_t dtype, int64_t per_group,
    int64_t groups, int64_t real) {
  const Sizes s = {per_group, int(groups), 1, 1, 1, unsigned(real)};
  return by_dtype(dtype, [&]<class T>() {
    return launch(
        gan_loss_kernel<T>, dim3(unsigned(groups)), THREADS, 0, stream, static_cast<const T*>(logits), dlogits, means,
        s);
  });
}

cudaError_t head_grad(
    Stream stream, const void* y, const void* weight, const float* state, const float* dlogits, void* g,
    float* values, Maybe<float> dw, int64_t dtype, int64_t per_group, int64_t groups, int64_t pixels,
    int64_t channels, double slope) {
  return over_channels(dtype, channels, [&]<class T, int N>(int64_t vectors) {
    Sizes s = {per_group, int(groups), int(pixels), int(channels), 1, 0};
    while (s.columns < vectors && s.columns < COLUMNS) s.columns *= 2;
    const dim3 grid(unsigned(pixels), unsigned(cdiv(vectors, int64_t(s.columns))));
    return launch(
        head_grad_kernel<T, N>, grid, THREADS, 0, stream, static_cast<const T*>(y), static_cast<const T*>(weight),
        state, dlogits, static_cast<T*>(g), values, dw.at, s, float(slope));
  });
}
}
