"""The ticket by which a grid's last program is found: the instructions that its memory-ordering argument needs."""

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, where the interpreter's process interprets", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels._triton.ticket import last_program


@triton.jit
def total_kernel(x, parts, out, ticket, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """out = Σx, by parts that the last program adds up."""
    pid = tl.program_id(0)
    tl.store(parts + pid, tl.sum(tl.load(x + pid * BLOCK + tl.arange(0, BLOCK)), 0))
    if last_program(ticket, PROGRAMS):
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, PROGRAMS)), 0))


def instructions(arch):
    """Barriers, atomics and global stores and loads of the kernel's PTX, in order."""
    types = {"x": "*fp32", "parts": "*fp32", "out": "*fp32", "ticket": "*i32"}
    types |= dict.fromkeys(("PROGRAMS", "BLOCK"), "constexpr")
    source = ASTSource(total_kernel, signature=types, constexprs={"PROGRAMS": 8, "BLOCK": 256})
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm["ptx"]
    found = re.findall(r"\b(bar\.sync|atom[\w.]*|st\.global|ld\.global(?:\.nc)?|ld\.shared)", ptx)
    return [name.removeprefix("atom.global.") for name in found]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_stores_barrier_atomic_barrier_loads(arch):
    order = instructions(arch)
    ticket = order.index("gpu.acq_rel.add.u32")
    assert order.count("gpu.acq_rel.add.u32") == 1, "one ticket a program"
    before, after = order[:ticket], order[ticket + 1 :]
    store = len(before) - 1 - before[::-1].index("st.global")
    assert "bar.sync" in before[store:], "the threads' stores come before the one thread's atomic"
    read = after.index("ld.global")
    assert "bar.sync" in after[:read] and "ld.shared" in after[:read], "the threads' loads come after it"
    assert "ld.global.nc" not in order, "no load past the caches that are kept coherent"
