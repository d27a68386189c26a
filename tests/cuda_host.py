"""Running the extension's kernels on a CPU: csrc/*.cu as plain C++ over csrc/host.h, under the launchers as they are.

`on_host` lets the launchers of `kernels._cuda` call such libraries instead of the ops, on CPU tensors. A source is
compiled when one of its launch functions is first called, once a process; a process may be given libraries that are
built already, with sanitizers say, by a folder in DCGAN_TEST_HOST.
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels import dependent
from kernels._cuda import launch as launch_module

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = "-std=c++20 -DDCGAN_HOST -fPIC -shared -fno-strict-aliasing -fno-gnu-unique -Wno-unknown-pragmas -O1".split()
SANITIZE = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined".split()
LOADED = []


class Stream(ctypes.Structure):
    """`Stream` of csrc/common.h."""

    _fields_ = (("at", ctypes.c_void_p), ("dependent", ctypes.c_bool))


STREAM = Stream(1, False)  # CALLERS_STREAM of csrc/host.h
TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}


def compile_host(source, out, *flags):
    """Start g++ on one source, into the library `out`; skips where there is no g++."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    command = ["g++", *FLAGS, *flags, f"-I{CSRC}", "-x", "c++", str(source), "-o", str(out)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(compiling):
    """Wait for `compile_host`; fails with what g++ said."""
    said = compiling.communicate()[1]
    assert compiling.returncode == 0, said


@functools.cache
def prototypes():
    """{launch function: ctypes of its arguments} as the headers of csrc declare them."""
    found = {}
    for header in sorted(CSRC.glob("*.h")):
        for name, arguments in re.findall(r"^cudaError_t (\w+)\(([^)]*)\);", header.read_text(), re.M):
            _, *kinds = [argument.split()[0] for argument in arguments.split(",")]
            found[name] = [Stream, *(TYPES.get(kind, ctypes.c_void_p) for kind in kinds)]
    return found


def source_of(function):
    """The .cu that defines a launch function."""
    pattern = re.compile(rf"\bcudaError_t {function}\(\s*Stream")
    return next(path for path in sorted(CSRC.glob("*.cu")) if pattern.search(path.read_text()))


def load(path):
    """A library of `compile_host`, with the types of its launch functions."""
    loaded = ctypes.CDLL(str(path))
    for name, types in prototypes().items():
        with contextlib.suppress(AttributeError):  # another source's
            getattr(loaded, name).argtypes = types
    loaded.host_blocks.argtypes = [ctypes.c_uint64] * 2
    loaded.host_pending.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    LOADED.append(loaded)
    return loaded


@functools.cache
def library(source):
    """One source of csrc on a CPU."""
    if made := os.environ.get("DCGAN_TEST_HOST"):
        return load(Path(made) / f"{source.stem}.so")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{source.stem}.so"
        finish(compile_host(source, out))
        return load(out)


def call(op, *arguments, source=None, pending=()):
    """An op of the extension on CPU tensors.

    Args:
        source: a library to take the place of csrc's own.
        pending: tensors that a dependent launch reaches beside its arguments, which the one before writes too.
    """
    passed = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    loaded, early = source or library(source_of(op)), dependent.asked()
    for at, size in memory_of((*arguments, *pending)) if early else ():
        loaded.host_pending(at, size)
    error = getattr(loaded, op)(Stream(STREAM.at, early), *passed)
    loaded.host_forget()
    assert error == 0, f"{op}: error {error}"


def memory_of(arguments):
    """Address and bytes of the tensors among `arguments`, no byte twice."""
    found = []
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in arguments if isinstance(t, torch.Tensor)]
    for begin, end in sorted(spans):
        if found and begin < found[-1][1]:
            found[-1][1] = max(end, found[-1][1])
        else:
            found.append([begin, end])
    return [(begin, end - begin) for begin, end in found]


@contextlib.contextmanager
def on_host(source=None):
    """Within, the launchers of `kernels._cuda` run on CPU tensors; new tensors hold NaN until they are written."""
    before = launch_module.launch, torch.are_deterministic_algorithms_enabled()
    launch_module.launch = functools.partial(call, source=source)
    torch.use_deterministic_algorithms(True)  # and with it, NaN in what torch.empty gives
    try:
        yield SimpleNamespace(host_order=host_order)
    finally:
        launch_module.launch = before[0]
        torch.use_deterministic_algorithms(before[1])


def host_order(order):
    """Let the threads and blocks of every kernel run in order (0), the other way around (1), or warps by chance."""
    for loaded in LOADED:
        loaded.host_order(order)


def host_late(on):
    """Let what a GPU does by itself be done at once (0), or at the last moment that the kernels' waits allow (1)."""
    for loaded in LOADED:
        loaded.host_late(on)


def in_orders(run, orders):
    """The results of `run` in each order, of which the first also loads what it needs."""
    found = []
    try:
        for order in orders:
            host_order(order)
            found.append(run())
    finally:
        host_order(0)
    return found


def in_both_orders(run):
    """The results of `run` in order, and the other way around."""
    return in_orders(run, (0, 1))


def in_every_order(run):
    """As `in_both_orders`, and by chance, each also with all that is asynchronous as late as can be: six results."""
    early = in_orders(run, (0, 1, 2))
    host_late(1)
    try:
        return early + in_orders(run, (0, 1, 3))
    finally:
        host_late(0)


def assert_sum_accurate(ours, twin, oracle, name, size):
    """The error bar of `interpreter.assert_accurate`, and two units of float32 of `size`, how large its terms are.

    Where they cancel (two pixels that nearly agree, a logit near 0) the sum is much smaller, and the twin may be lucky.
    """
    error, twins = ((t.double() - oracle).abs().max() for t in (ours, twin))
    eps = torch.finfo(torch.float32).eps
    allowed = 2 * twins + 2 * torch.finfo(ours.dtype).eps * oracle.abs().max() + 2 * eps * size.abs().max()
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # false for NaN too
