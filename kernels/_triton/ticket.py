"""The last program of a grid, which may read what all others wrote: a reduction over a grid in the launch that made it.

Every program writes its part and takes a ticket; whoever takes the last one reads the parts, in a fixed order, so that
the result has the same bits whichever program it was. The ticket is one int32 zero on the device, and zero again when
the kernel ends, so that the next launch, or a CUDA graph's next replay, finds it so.

Why that is safe, by PTX's memory model (PTX ISA, "Memory Consistency Model"):

1. Within a program, `debug_barrier` (bar.sync) puts every thread's loads and stores before the one thread's atomic that
   follows it (causality order, by the barrier's synchronization).
2. The atomics are acq_rel at gpu scope on one address, and each reads what the one before it wrote. A release pattern
   synchronizes with an acquire that observes it, also through a chain of read-modify-writes: so the last atomic, which
   has all others before it in the chain, synchronizes with each of them, and comes after all that step 1 put there.
3. Triton hands an atomic's scalar result to the program's other threads through shared memory and a barrier, after
   which their loads, too, come after everything in step 2.

Loads that precede a program's ticket are ordered the same way: a counter that every program reads and the last one
moves is moved after all of them have read it.
"""

import triton
import triton.language as tl


@triton.jit
def last_program(ticket, programs):
    """Whether this program is the last of the grid's `programs` to come here; each calls it once, after its stores.

    For the last one, whatever the others stored before their call is visible. It has put the ticket back to zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last
