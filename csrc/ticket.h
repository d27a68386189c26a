// Which block of several comes last, and so may read what all of them wrote: a reduction in the launch that made its parts.
#pragma once

#include "common.h"

// Whether this block is the last of `blocks` to come here; each calls it once, after its stores, which the last one then
// sees: the barrier puts every thread's before thread 0's fence, the fence before its atomic, and the last block's
// atomic, which reads what all others wrote, before its own fence and the barrier that follows (PTX ISA, "Memory
// Consistency Model"). atomicInc leaves the ticket at 0 again, for the next launch. `flag` is shared memory.
__device__ __forceinline__ bool last_block(unsigned* ticket, unsigned blocks, int* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *flag = atomicInc(ticket, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return *flag;
}
