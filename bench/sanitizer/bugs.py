"""Kernels with a bug each, for compute-sanitizer to find. Never part of a step."""

import triton
import triton.language as tl


@triton.jit
def write_past(x, size, BLOCK: tl.constexpr, SOURCE=None):
    """x[i] = SOURCE[i], or i, for all of BLOCK, however short x is: the mask by `size` is what is missing."""
    i = tl.arange(0, BLOCK)
    value = i.to(tl.float32) + size if SOURCE is None else tl.load(SOURCE + i)
    tl.store(x + i, value)


@triton.jit
def race(x, BLOCK: tl.constexpr):
    """x[i] = what another warp's thread leaves in shared memory, with no barrier between its store and this load."""
    i = tl.arange(0, BLOCK)
    got = tl.inline_asm_elementwise(
        """{
        .shared .align 4 .b8 slots[1024];
        .reg .b32 base, thread, other, at;
        mov.u32 base, slots;
        mov.u32 thread, %tid.x;
        mad.lo.u32 at, thread, 4, base;
        st.shared.b32 [at], $1;
        add.u32 other, thread, 32;
        and.b32 other, other, 127;
        mad.lo.u32 at, other, 4, base;
        ld.shared.b32 $0, [at];
        }""",
        "=r,r",
        [i],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.store(x + i, got)
