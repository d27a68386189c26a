"""A kernel with next to nothing to do, to measure what lies between two kernels; with and without dependent launch.

With programmatic dependent launch (from capability 9.0) a kernel may be launched while the one before it still runs: it
does what needs nothing of that one, waits for it at `gdc_wait`, and tells the next at `gdc_launch_dependents` that it
may come. Compiled for sm_90 in the tests; not yet run on a GPU.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 1024


@triton.jit
def touch_kernel(x, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """x += 1: one program, one block."""
    at = x + tl.arange(0, BLOCK)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    tl.store(at, tl.load(at) + 1)


def touch(x: torch.Tensor, dependent: bool) -> None:
    """Launch it on x (1024,) float32; `dependent`: so that it may begin before the kernel before it has ended."""
    options = {"launch_pdl": True} if dependent else {}
    touch_kernel[(1,)](x, BLOCK, dependent, num_warps=4, **options)
