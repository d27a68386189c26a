"""What every kernel does first: wait for the launch before it, which it may overlap (`kernels.dependent`)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(DEPENDENT: tl.constexpr):
    """Wait until the launch before this one has ended, and let the next one begin.

    It stands before all loads and never in a loop: Triton's pipeliner moves loads out of a loop, past a wait in it
    (triton-lang/triton#11905).
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
