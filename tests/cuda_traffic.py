"""Counting what the extension's kernels load and store, on a CPU.

g++'s -fsanitize=thread puts a call before every access to memory. Linked with counters in place of its own runtime,
that counts what the threads of a kernel load from and store to each tensor, and what TMA loads for them.
"""

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from cuda_host import CSRC, FLAGS, call, finish, load, on_host, source_of

from kernels._cuda import launch as launch_module

BF16 = torch.bfloat16

COUNTERS = """
#include <cstddef>
#include <cstdint>
static struct { uintptr_t begin, end; uint64_t moved[2]; } tensors[64];
static int count;
static void see(void* at, size_t bytes, int written) {
  for (int i = 0; i < count; ++i)
    if (uintptr_t(at) - tensors[i].begin < tensors[i].end - tensors[i].begin) tensors[i].moved[written] += bytes;
}
#define SIZE(n) \\
  void __tsan_read##n(void* at) { see(at, n, 0); } \\
  void __tsan_write##n(void* at) { see(at, n, 1); } \\
  void __tsan_unaligned_read##n(void* at) { see(at, n, 0); } \\
  void __tsan_unaligned_write##n(void* at) { see(at, n, 1); }
extern "C" {
SIZE(1) SIZE(2) SIZE(4) SIZE(8) SIZE(16)
void __tsan_read_range(void* at, size_t bytes) { see(at, bytes, 0); }
void __tsan_write_range(void* at, size_t bytes) { see(at, bytes, 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void forget() { count = 0; }
void watch(uintptr_t begin, uint64_t bytes) { tensors[count++] = {begin, begin + bytes, {0, 0}}; }
uint64_t moved(int tensor, int written) { return tensors[tensor].moved[written]; }
}
"""


@functools.cache
def counting(source):
    """One source of csrc on a CPU, whose accesses are counted."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    flags = [flag for flag in FLAGS if flag != "-shared"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "counters.cpp").write_text(COUNTERS)
        objects = [folder / "kernels.o", folder / "counters.o"]
        commands = (
            ["g++", *flags, "-fsanitize=thread", "-fno-threadsafe-statics", "-c", "-x", "c++", str(source)],
            ["g++", *flags, "-c", str(folder / "counters.cpp")],
        )
        for out, command in zip(objects, commands, strict=True):
            finish(subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True))
        link = ["g++", "-shared", "-Wl,-z,defs", *map(str, objects), "-o", str(folder / "counting.so")]
        finish(subprocess.Popen(link, stderr=subprocess.PIPE, text=True))
        library = load(folder / "counting.so")
    library.moved.restype = ctypes.c_uint64
    library.watch.argtypes = [ctypes.c_uint64] * 2
    return library


def names_of(op):
    """Names of a launch function's arguments, without the stream."""
    text = "".join(path.read_text() for path in sorted(CSRC.glob("*.h")))
    arguments = re.search(rf"^cudaError_t {op}\(([^)]*)\);", text, re.M)[1]
    return [argument.split()[-1].lstrip("*") for argument in arguments.split(",")][1:]


def counted(monkeypatch):
    """For a fixture `traffic`: traffic(run, **more) → {op: {tensor: (bytes read, bytes written)}} of `run`'s launches.

    `more` are tensors that an op finds by other ways than its arguments.
    """

    def measure(run, **more):
        found = {}

        def count(op, *arguments):
            library = counting(source_of(op))
            tensors = {n: a for n, a in zip(names_of(op), arguments, strict=True) if isinstance(a, torch.Tensor)} | more
            library.forget()
            for tensor in tensors.values():
                library.watch(tensor.data_ptr(), tensor.nbytes)
            call(op, *arguments, source=library)
            found[op] = {name: tuple(library.moved(i, w) for w in (0, 1)) for i, name in enumerate(tensors)}

        monkeypatch.setattr(launch_module, "launch", count)
        run()
        return found

    with on_host():
        yield measure


def noise(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def once(tensor):
    return tensor.nbytes, 0
