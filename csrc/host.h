// CUDA's threads, shared memory, barriers, shuffles and 16-bit types in plain C++, so that the kernels' own sources
// run on a CPU: only for tests. g++ -std=c++20 -DDCGAN_HOST -x c++ -shared -fPIC -fno-strict-aliasing csrc/*.cu
//
// Blocks run one after another, those of a cluster together. Their threads are fibers: each runs until it ends, or waits
// at a barrier or in a warp's collective; when all that must arrive have, they go on. Runs repeat exactly.
// What can never go on (a barrier some lanes skip) ends the process with a message.
//
// Which order it all takes is a GPU's own affair, so kernels are run in several, and a wait that is missing shows by
// another result. `host_order(0)` goes from the first thread and block on, a warp for as long as it can, and so ahead of
// the others as far as barriers let it; 1 goes the other way around; from 2 on, warps take turns by chance. What runs by
// itself on a GPU (TMA, cp.async, wgmma) is done at once, or, after `host_late(1)`, at the last moment that the waits
// allow; until then it reads what is there by then, and what it will write is NaN.
//
// A dependent launch begins while the one before it still runs: of the memory named by `host_pending` (`host_forget` ends
// the list) each cluster finds NaN until it waits, and what it writes there before shows. It waits as long as it can.
//
// `static` shared memory keeps what the block before left, as on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <source_location>
#include <type_traits>
#include <vector>

#include "host_fiber.h"
#include "host_float.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED(name) unsigned char* name = host::state.shared

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = void*;
inline const cudaStream_t CALLERS_STREAM = reinterpret_cast<void*>(1);  // the tests' one; a launch elsewhere fails
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace host {

constexpr int MAX_THREADS = 1024, MAX_CLUSTER = 8, WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;

// Work that a thread has handed on, in groups that it may wait for.
struct Queue {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;

  void add(std::function<void()> work) { open.push_back(std::move(work)); }
  void commit() { groups.push_back(std::move(open)), open.clear(); }
  void wait(size_t pending) {  // until all but the last `pending` groups are done
    while (groups.size() > pending) {
      for (const auto& work : groups.front()) work();
      groups.pop_front();
    }
  }
  bool idle() const { return open.empty() && groups.empty(); }
};

struct Thread {
  Place place;
  std::unique_ptr<char[]> stack;
  uint3 index;
  enum { RUNS, POLLS, AT_BARRIER, AT_CLUSTER_BARRIER, IN_COLLECTIVE, AFTER_PREVIOUS, ENDED } state;
  // of a collective: its mask, where in the source it stands, what this lane brought, and where its result goes
  unsigned mask;
  unsigned line;
  const void* in;
  void* out;
  Queue copies, products;  // of cp.async and wgmma
};

// A box that TMA has yet to write, counting towards a barrier.
struct Box {
  const void* barrier;
  std::function<void()> land;
};

// Memory that the launch before is taken to be writing, and what it will have been when that has ended.
struct Pending {
  unsigned char* at;
  size_t bytes;
  std::vector<unsigned char> written;
};

struct Block {
  uint3 index{};
  unsigned char* shared = nullptr;
};

struct State {
  std::vector<Thread> threads{MAX_THREADS};  // of a cluster's first block, then of its second, …
  int count = 0, current = 0;                // of a block; among all
  unsigned order = 0;  // of threads and blocks: 0, 1 reversed, more at random
  bool late = false;
  uint64_t random = 0;
  std::vector<Box> boxes;
  std::vector<Pending> pending;
  bool dependent = false, waited = false;  // the launch; this cluster
  uint64_t first_block = 0, last_block = UINT64_MAX;
  Block blocks[MAX_CLUSTER];
  int cluster = 1, rank = 0;  // blocks that run together; which of them the current thread is of
  dim3 block_dim, grid_dim;
  unsigned char* shared = nullptr;  // of the current thread's block
  Place scheduler;
  const std::function<void()>* body = nullptr;
  const void* scheduler_stack = nullptr;  // for AddressSanitizer, which must know which stack is in use
  size_t scheduler_bytes = 0;

  Thread& self() { return threads[current]; }
};
inline State state;

inline void poison(void* at, size_t bytes) { std::memset(at, 0xff, bytes); }  // NaN in every type

[[noreturn]] inline void fail(const char* what, unsigned line) {
  const auto [x, y, z] = state.self().index;
  std::fprintf(stderr, "host.h: %s (thread %u,%u,%u, line %u)\n", what, x, y, z, line);
  std::abort();
}

// From a thread back to the scheduler, until that comes back to it (never, once it has ended).
inline void yield() {
  Thread& me = state.self();
  void* fake = nullptr;
  leave_for(me.state == Thread::ENDED ? nullptr : &fake, state.scheduler_stack, state.scheduler_bytes);
  go(me.place, state.scheduler);
  come_back(fake, &state.scheduler_stack, &state.scheduler_bytes);
}

// Let the others have a turn, while this thread waits for what one of them will do.
inline void poll() {
  state.self().state = Thread::POLLS;
  yield();
}

// The launch before runs still: what it writes is not there.
inline void begin_before_previous() {
  for (auto& [at, bytes, written] : state.pending) written.assign(at, at + bytes), poison(at, bytes);
  state.waited = false;
}

// It has ended. False where nobody waits for that.
inline bool end_previous() {
  bool waits = false;
  for (int t = 0; t < state.count * state.cluster; ++t)
    if (state.threads[t].state == Thread::AFTER_PREVIOUS) state.threads[t].state = Thread::RUNS, waits = true;
  if (!waits || state.waited) return waits;
  for (auto& [at, bytes, written] : state.pending) {
    for (size_t i = 0; i < bytes; ++i)
      if (at[i] != 0xff) fail("a block writes before it has waited for the launch before it", 0);
    std::memcpy(at, written.data(), bytes);
  }
  return state.waited = true;
}

// Do it now, or leave it to the thread's next wait.
inline void hand_on(Queue& queue, std::function<void()> work) {
  if (state.late) queue.add(std::move(work));
  else work();
}

inline void thread_main() {
  come_back(nullptr, &state.scheduler_stack, &state.scheduler_bytes);
  (*state.body)();
  if (!state.self().copies.idle() || !state.self().products.idle()) fail("a thread ends before what it handed on", 0);
  state.self().state = Thread::ENDED;
  yield();
}

inline void resume(int t) {
  state.current = t, state.rank = t / state.count, state.shared = state.blocks[state.rank].shared;
  void* fake = nullptr;
  leave_for(&fake, state.threads[t].stack.get(), STACK_BYTES);
  go(state.scheduler, state.threads[t].place);
  come_back(fake, nullptr, nullptr);
}

// Let those that wait at a barrier, threads from `first` on, go on once all that have not ended are there.
inline void settle(int first, int count, decltype(Thread::state) barrier) {
  int waiting = 0, ended = 0;
  for (int t = first; t < first + count; ++t)
    waiting += state.threads[t].state == barrier, ended += state.threads[t].state == Thread::ENDED;
  if (!waiting || waiting + ended < count) return;
  for (int t = first; t < first + count; ++t)
    if (state.threads[t].state == barrier) state.threads[t].state = Thread::RUNS;
}

// Repeatable, and another for each order.
inline unsigned next_random() {
  state.random = state.random * 6364136223846793005u + 1442695040888963407u;
  return unsigned(state.random >> 33);
}

inline void run_cluster() {
  const int n = state.count * state.cluster;
  if (n > int(state.threads.size())) state.threads.resize(n);
  for (int t = 0; t < n; ++t) {
    Thread& thread = state.threads[t];
    if (!thread.stack) thread.stack.reset(new char[STACK_BYTES]);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(thread.stack.get(), STACK_BYTES);  // frames that the block before never left
#endif
    const unsigned x = state.block_dim.x, y = state.block_dim.y, i = t % state.count;
    thread.index = {i % x, i / x % y, i / (x * y)};
    thread.state = Thread::RUNS;
    start_at(thread.place, thread.stack.get(), STACK_BYTES, thread_main);
  }
  if (state.dependent) begin_before_previous();
  for (bool progress = true; progress;) {
    progress = false;
    for (int i = 0, warps = (n + WARP - 1) / WARP; i < warps; ++i) {
      const int first = (state.order == 1 ? warps - 1 - i : i) * WARP, last = std::min(first + WARP, n) - 1;
      for (bool ran = true; ran && (state.order < 2 || next_random() % 4); progress |= ran) {
        ran = false;
        for (int j = 0; j <= last - first; ++j) {
          const int t = state.order == 1 ? last - j : first + j;
          if (state.threads[t].state == Thread::RUNS) resume(t), ran = true;
        }
      }
    }
    for (int block = 0; block < state.cluster; ++block) settle(block * state.count, state.count, Thread::AT_BARRIER);
    settle(0, n, Thread::AT_CLUSTER_BARRIER);
    for (int t = 0; t < n; ++t) {
      if (state.threads[t].state == Thread::POLLS) state.threads[t].state = Thread::RUNS;
      progress |= state.threads[t].state == Thread::RUNS;
    }
    progress |= !progress && end_previous();
  }
  for (int t = 0; t < n; ++t) {
    if (state.threads[t].state == Thread::ENDED) continue;
    state.current = t;
    fail("deadlock: a barrier or a collective that not all threads reach", state.self().line);
  }
  if (state.dependent && !state.waited) fail("a block ends before it has waited for the launch before it", 0);
}

inline cudaError_t launch(
    const std::function<void()>& body, dim3 grid, unsigned cluster, dim3 block, size_t shared, cudaStream_t stream,
    bool dependent) {
  auto& s = state;
  if (stream != CALLERS_STREAM) return cudaErrorInvalidValue;
  s.count = int(block.x * block.y * block.z), s.cluster = int(cluster);
  if (s.count < 1 || s.count > MAX_THREADS || !grid.x || !grid.y || !grid.z) return cudaErrorInvalidValue;
  if (s.cluster < 1 || s.cluster > MAX_CLUSTER || grid.x % cluster) return cudaErrorInvalidValue;
  if (s.cluster > 1 && s.count % WARP) return cudaErrorInvalidValue;  // threads of a warp are 32 in a row
  s.dependent = dependent, s.body = &body, s.block_dim = block, s.grid_dim = grid;
  const uint64_t clusters = uint64_t(grid.x) * grid.y * grid.z / cluster;
  const uint64_t first = s.first_block / cluster, last = std::min(s.last_block / cluster, clusters - 1);
  for (uint64_t i = first; i <= last; ++i) {
    for (unsigned rank = 0; rank < cluster; ++rank) {
      const uint64_t b = (s.order == 1 ? first + last - i : i) * cluster + rank;
      auto& [index, memory] = s.blocks[rank];
      index = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / (uint64_t(grid.x) * grid.y))};
      memory = shared ? static_cast<unsigned char*>(std::aligned_alloc(1024, (shared + 1023) / 1024 * 1024)) : nullptr;
      if (memory) poison(memory, shared);
    }
    run_cluster();
    if (!s.boxes.empty()) fail("a block ends before a box that it asked for is there", 0);
    for (unsigned rank = 0; rank < cluster; ++rank) std::free(s.blocks[rank].shared);
  }
  return cudaSuccess;
}

inline void after_previous() {
  if (!state.dependent) return;
  state.self().state = Thread::AFTER_PREVIOUS;
  yield();
}

// A step that a warp takes together, for shuffles, votes and matrix fragments. Each lane of `mask` brings an In and
// leaves with an Out; once all are there one of them calls `step(in, out)`, over arrays of 32 pointers that are null
// for lanes outside the mask:
//
//   Fragment d = host::warp_collective<Fragment>(0xffffffffu, operands, [](const Operands* const* in, Fragment** out) {
//     ...in[lane]->a...; *out[lane] = ...;
//   });
template <class Out, class In, class Step>
Out warp_collective(
    unsigned mask, const In& in, Step step, std::source_location where = std::source_location::current()) {
  Out out{};
  Thread& me = state.self();
  const int first = state.current / WARP * WARP, lane = state.current % WARP;
  if (!(mask >> lane & 1)) fail("a collective whose mask leaves out the calling lane", where.line());
  me.state = Thread::IN_COLLECTIVE, me.mask = mask, me.line = where.line(), me.in = &in, me.out = &out;
  const In* ins[WARP] = {};
  Out* outs[WARP] = {};
  for (int l = 0; l < WARP; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= state.count * (state.rank + 1)) fail("a collective whose mask names lanes beyond the block", where.line());
    Thread& other = state.threads[first + l];
    if (other.state != Thread::IN_COLLECTIVE) {
      yield();  // the last to arrive sets this lane going again, its result in `out`
      return out;
    }
    if (other.mask != mask || other.line != me.line) fail("lanes meet in different collectives", where.line());
    ins[l] = static_cast<const In*>(other.in), outs[l] = static_cast<Out*>(other.out);
  }
  step(static_cast<const In* const*>(ins), static_cast<Out**>(outs));
  for (int l = 0; l < WARP; ++l)
    if (mask >> l & 1) state.threads[first + l].state = Thread::RUNS;
  return out;
}

template <class T>
T shuffle(unsigned mask, T value, int (*source)(int lane, int by), int by, std::source_location where) {
  struct Ask {
    T value;
    int from;
  };
  const int lane = state.current % WARP;
  return warp_collective<T>(
      mask, Ask{value, source(lane, by)},
      [](const Ask* const* in, T** out) {
        for (int l = 0; l < WARP; ++l) {
          if (!in[l]) continue;
          const int from = in[l]->from;
          *out[l] = from >= 0 && from < WARP && in[from] ? in[from]->value : in[l]->value;
        }
      },
      where);
}

}  // namespace host

extern "C" {
__attribute__((used)) inline void host_order(unsigned order) { host::state.order = order, host::state.random = order; }

__attribute__((used)) inline void host_late(int on) { host::state.late = on; }

// Of the next dependent launches: memory that the launch before writes, of which no part is named twice.
__attribute__((used)) inline void host_pending(void* at, uint64_t bytes) {
  host::state.pending.push_back({static_cast<unsigned char*>(at), bytes, {}});
}

__attribute__((used)) inline void host_forget() { host::state.pending.clear(); }

// Run only these blocks of the next grids, x counting fastest: those far out in a tensor that is too large to test.
__attribute__((used)) inline void host_blocks(uint64_t first, uint64_t last) {
  host::state.first_block = first, host::state.last_block = last;
}
}

#define threadIdx (host::state.self().index)
#define blockIdx (host::state.blocks[host::state.rank].index)
#define blockDim (host::state.block_dim)
#define gridDim (host::state.grid_dim)

#define HOST_WHERE std::source_location where = std::source_location::current()

inline void __syncthreads() {
  host::state.self().state = host::Thread::AT_BARRIER;
  host::yield();
}

// The pointer's counterpart in another block of the cluster.
template <class T>
T* host_peer(T* at, int rank) {
  const auto offset = reinterpret_cast<const unsigned char*>(at) - host::state.shared;
  return reinterpret_cast<T*>(host::state.blocks[rank].shared + offset);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, HOST_WHERE) {
  host::warp_collective<int>(mask, 0, [](const int* const*, int**) {}, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, HOST_WHERE) {
  return host::shuffle(mask, value, [](int, int by) { return by; }, lane, where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, HOST_WHERE) {
  return host::shuffle(mask, value, [](int lane, int by) { return lane ^ by; }, by, where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, HOST_WHERE) {
  return host::shuffle(mask, value, [](int lane, int by) { return lane + by; }, by, where);
}

inline void __threadfence() {}

inline unsigned atomicInc(unsigned* at, unsigned last) {  // the old value; `last` is followed by 0
  const unsigned old = *at;
  *at = old >= last ? 0 : old + 1;
  return old;
}
