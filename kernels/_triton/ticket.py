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

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def check_ticket(ticket: Tensor | None, like: Tensor) -> Tensor:
    """`ticket`, or one of the stream's; ValueError where it is none."""
    if ticket is None:
        return tickets(like, 1)[:1]
    if ticket.dtype != torch.int32 or ticket.shape != (1,) or ticket.device != like.device:
        raise ValueError(
            f"ticket is {ticket.dtype} {tuple(ticket.shape)} on {ticket.device}: "
            f"expected int32 (1,) on {like.device}, zero before its first use"
        )
    return ticket


@functools.cache
def _tickets(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def tickets(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros, which every launch leaves as zeros: so all launches of a stream share them."""
    if like.device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device="meta")
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _tickets(like.device, stream, max(4096, 1 << (count - 1).bit_length()))
