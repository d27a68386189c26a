"""The fused step's Triton kernels compiled on all cores before the first step launches them.

A step of `dcgan64` has some forty kernels of a second or more each, which the first launch would compile one after the
other, for each precision and again for other sizes and widths. Here worker processes walk through the same step over
tensors that are never computed on, share its kernels out among themselves, and leave them in Triton's cache on disk,
where the launching process finds them. Not yet run on a GPU.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.group import Bench
from bench.peers import without
from bench.peers.ladder import Rung
from bench.tuning import precompile
from bench.tuning.lab import arch_of_device
from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import adam
from kernels import tuning

Job = tuple[Arch, int, Rung]
"""Architecture, images, and the rung of ours."""

TILES_OF = 90
"""Off a GPU the kernels choose the tiles of this capability, so others have nothing compiled ahead."""


def step_launches(job: Job, name: str | None = None) -> list:
    """The distinct launches (`kernels._triton.launch.Launch`) of a step, on CPU tensors that hold nothing.

    Args:
        job: which step.
        name: of the device whose tuned table chooses the tiles; None: the defaults.
    """
    from kernels._triton.launch import Launch
    from kernels.launchers import launchers

    arch, images, rung = job
    models = Generator(arch), Discriminator(arch)
    step = FusedStep(*models, *map(adam, models), precision=rung.precision, launch=launchers("triton"))
    step.dependent = rung.dependent
    if rung.off in without.OFF:
        without.OFF[rung.off](step)
    found: dict[tuple, Launch] = {}
    before = Launch.run, tuning.device_name
    Launch.run = lambda self: found.setdefault(specialised(self), self)
    tuning.device_name = lambda device: name
    try:
        step.run(step.room(images), torch.zeros(images, arch.nz, dtype=step.dtype))
    finally:
        Launch.run, tuning.device_name = before
    return list(found.values())


def specialised(launch) -> tuple:
    """What a launch is compiled for, as far as two launches of a step can differ in it."""
    constants = {parameter.name for parameter in getattr(launch.kernel, "params", ()) if parameter.is_constexpr}
    values: list[tuple] = []
    for key, value in launch.arguments.items():
        base = getattr(value, "base", value)  # of a TMA descriptor
        if isinstance(base, torch.Tensor):
            box = tuple(getattr(value, "block_shape", ()))
            values.append((key, str(base.dtype), base.data_ptr() % 16 == 0, box))
        elif key in constants or not isinstance(value, int):
            values.append((key, value))
        else:
            values.append((key, value == 1, value % 16 == 0, value >= 1 << 31))
    return (launch.kernel.fn.__name__, *launch.options.items(), *values)


def share(jobs: Sequence[Job], name: str | None, worker: int, workers: int) -> list:
    """Every `workers`-th distinct launch of `jobs`, from number `worker` on; the others' tensors are let go at once."""
    seen: set[tuple] = set()
    mine = []
    for job in jobs:
        for launch in step_launches(job, name):
            key = specialised(launch)
            if key not in seen and len(seen) % workers == worker:
                mine.append(launch)
            seen.add(key)
    return mine


def share_of_table(folder: str, *arguments) -> list:
    """`share`, with the tuned tables of a folder."""
    tuning.FOLDER = Path(folder)
    tuning.forget()
    return share(*arguments)


def compile_steps(bench: Bench, stage: str, jobs: Sequence[Job]) -> None:
    """Compile the steps of `jobs`, and note how long it took. What fails here will fail, and say why, at its launch."""
    device = bench.plan.device
    jobs = tuple(dict.fromkeys(jobs))
    if device.type != "cuda" or not jobs or precompile.available() or arch_of_device(device) != TILES_OF:
        return
    began, workers, name = time.perf_counter(), os.cpu_count() or 1, tuning.device_name(device)
    with precompile.Compiler(TILES_OF, workers) as compiler:
        found = compiler.compile(share, [(jobs, name, worker, workers) for worker in range(workers)])
    failed = [part for part in found if isinstance(part, str)]
    kernels = sum(len(part) for part in found if not isinstance(part, str))
    seconds = time.perf_counter() - began
    why = f"{kernels} kernels in {seconds:.0f} s" + (f"; {failed[0]}" if failed else "")
    bench.emit(stage, "compiled ahead", None, why, kernels=kernels, seconds=seconds)
