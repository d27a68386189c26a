// The batch norm behind a convolution, settled by the last blocks of its launch: no extra launch.
//
// Two rounds: of every TOGETHER tiles of a group the last block to finish merges their partials, while others still
// multiply; of these the last one merges what the rounds left and settles the batch norm. Which block is last is left
// to chance; what it does, and in which order, is not: the same bits each run.
//
// An example: 2 groups (real | fake) of 256 tiles each, 256 channels in tiles of 128 columns: 2·256·2 blocks, and 8
// rounds per group. Each column tile merges its own channels: one thread per channel, row after row.
//
//     tiles         out.values (2, 2, 256, 256), out.counts (2, 256)   by every block
//     first round   rounds (2, 2, 8, 256), round_counts (2, 8)         by the last of each 32 blocks: 2·(2·8) of them
//     second round  merged (4, 2, 256), or (2, 2, 256) of a gradient   by the last of each column tile's 2·8: 2 of them
//
// tickets has column tiles · (1 + groups · rounds) counters, here 2·(1 + 2·8) = 34: first the second round's, one per
// column tile, then the first's, one per column tile, group and round. All are zero again afterwards.
#pragma once

#include "conv_tile.h"
#include "merge.h"
#include "ticket.h"

constexpr int TOGETHER = 32;  // as in kernels/_cuda/epilogue.py

// Where it goes; without tickets nothing is merged.
struct ConvMerge {
  float *rounds, *round_counts;  // (2, groups, ⌈tiles/TOGETHER⌉, out), (groups, ⌈tiles/TOGETHER⌉)
  unsigned* tickets;             // a zero for each tile of columns, then for each of those and each round
  Norm norm;                     // of statistics
  int64_t* tracked;              // grows by the groups; may be null
  float *dweight, *dbias;        // of the gradient's sums; may be null
  float* merged;                 // (4, groups, out), the state; or (2, groups, out), means of g and g·x̂
};

// A channel's partials, `count` rows of them: count, mean and M2, or Σg and Σg·x̂.
struct Sums {
  float n = 0, first = 0, second = 0;

  __device__ void add(
      const float* values, int64_t plane, const float* counts, int count, int channels, bool statistics) {
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const float a = values[int64_t(i) * channels], b = values[plane + int64_t(i) * channels];
      if (statistics) chan(n, first, second, counts[i], a, b);
      else first += a, second += b;
    }
  }
};

// By all of a block's THREADS threads, once finish_tile has left its partials. `flag` is shared memory.
template <class T, int COLUMNS, int THREADS>
__device__ __forceinline__ void merge_tiles(
    const ConvShape& s, const ConvTile& tile, const ConvOutput<T>& out, const ConvMerge& m, int* flag) {
  static_assert(COLUMNS <= THREADS, "one thread per channel");
  const bool statistics = !out.state;
  const int tiles = s.boxes() * s.phases, rounds = (tiles + TOGETHER - 1) / TOGETHER, round = tile.index / TOGETHER;
  const int wide = (s.out + COLUMNS - 1) / COLUMNS, of = tile.column / COLUMNS, place = tile.group * rounds + round;
  const int first = round * TOGETHER, members = tiles - first < TOGETHER ? tiles - first : TOGETHER;
  const int c = tile.column + int(threadIdx.x);
  const bool mine = int(threadIdx.x) < COLUMNS && c < s.out;
  const int64_t plane = int64_t(s.groups) * tiles * s.out, round_plane = int64_t(s.groups) * rounds * s.out;

  if (!last_block(m.tickets + wide + of * s.groups * rounds + place, members, flag)) return;
  if (mine) {
    const int64_t row = int64_t(tile.group) * tiles + first;
    Sums sums;
    sums.add(out.values + row * s.out + c, plane, out.counts + row, members, s.out, statistics);
    float* const to = m.rounds + int64_t(place) * s.out + c;
    to[0] = sums.first, to[round_plane] = sums.second;
    if (statistics && threadIdx.x == 0) m.round_counts[place] = sums.n;
  }
  if (!last_block(m.tickets + of, s.groups * rounds, flag)) return;
  if (statistics && m.tracked && !c) *m.tracked += s.groups;
  if (!mine) return;
  const int64_t row = int64_t(s.groups) * s.out;
  const float pixels = float(s.per_group) * s.height * s.width * s.phases;
  float g_all = 0, gx_all = 0;
  for (int group = 0; group < s.groups; ++group) {
    Sums sums;
    sums.add(
        m.rounds + int64_t(group) * rounds * s.out + c, round_plane, m.round_counts + group * rounds, rounds, s.out,
        statistics);
    float* const to = m.merged + int64_t(group) * s.out + c;
    if (statistics) {
      settle_statistics(m.norm, to, row, c, sums.n, sums.first, sums.second);
    } else {
      to[0] = sums.first / pixels, to[row] = sums.second / pixels;
      g_all += sums.first, gx_all += sums.second;
    }
  }
  if (!statistics && m.dweight) m.dbias[c] = g_all, m.dweight[c] = gx_all;
}
