"""Compiling Triton launches ahead, in many processes, into the cache on disk that the launching process reads.

A worker needs no GPU: it specialises and compiles exactly as a launch does (`JITFunction.warmup`), for a driver that
only names the target, and reports what the assembler made of it. So a search compiles its candidates on all cores,
leaves out those that spill or do not fit before one is run, and finds the others compiled.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.group import one_line

LaunchesOf = Callable[..., Any]
"""A function of the arguments that makes the launches (`kernels._triton.launch.Launch`) on meta tensors; it must be
importable by name, as it travels to the workers."""


def target_driver(arch: int) -> Any:
    """A driver as far as compiling asks one: the target, and a device that is never launched on."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )


def start(arch: int) -> None:
    """A worker's first act: the target, and one thread, as there is a worker a core."""
    import triton

    torch.set_num_threads(1)
    triton.runtime.driver.set_active(target_driver(arch))


def compile_one(launches_of: LaunchesOf, arguments: tuple) -> list[dict[str, int]] | str:
    """Registers, spilled bytes and shared memory of each launch; or, where it does not compile, why."""
    import triton

    from bench.resources import _resource_usage

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = []
    try:
        for launch in launches_of(*arguments):
            built = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.options)
            usage = _resource_usage(built.asm["cubin"], cuobjdump)
            spills = usage["STACK"] + usage["LOCAL"]
            found.append({"registers": usage["REG"], "spills": spills, "shared_bytes": built.metadata.shared})
    except subprocess.CalledProcessError as error:
        return f"cuobjdump: {error}"[:200]
    except Exception as error:  # whatever the compiler raises for a tile that it cannot do
        return one_line(error)
    return found


class Compiler:
    """Worker processes that compile; a context manager, whose workers start with the first work.

    Args:
        arch: compute capability, 90 for 9.0.
        workers: processes; None: as many as cores. They are spawned, as a process with CUDA cannot be forked.
    """

    def __init__(self, arch: int, workers: int | None = None):
        self.arch, self.workers = arch, workers or os.cpu_count() or 1
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = None

    def compile(self, launches_of: LaunchesOf, arguments: list[tuple]) -> list[list[dict[str, int]] | str]:
        """What `compile_one` finds for `launches_of(*a)`, for each a of `arguments`, in their order.

        A compiler that crashes takes its worker with it and breaks the pool: what was not done by then is said to have
        died, and the next work gets new workers.
        """
        if not arguments:
            return []
        if self.pool is None:
            options = {"mp_context": get_context("spawn"), "initializer": start, "initargs": (self.arch,)}
            self.pool = ProcessPoolExecutor(self.workers, **options)
        try:
            futures = [self.pool.submit(compile_one, launches_of, a) for a in arguments]
        except BrokenProcessPool:
            self.__exit__()
            return [DIED] * len(arguments)
        found: list[list[dict[str, int]] | str] = []
        for future in futures:
            try:
                found.append(future.result())
            except BrokenProcessPool:
                found.append(DIED)
        if DIED in found:
            self.__exit__()
        return found


DIED = "the compiler's process died"


def available() -> str | None:
    """Why nothing can be compiled ahead here; None if it can."""
    if sys.platform != "linux":
        return "Triton compiles on Linux"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set: kernels are interpreted"
    return None
