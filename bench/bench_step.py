"""The training step as pytest-benchmark rows: rung × batch × size × width, on the GPU if there is one.

    pytest bench/bench_step.py --benchmark-only [-k 256px]

A row is verified against the reference step first and fails if it is wrong. Without DCGAN_BENCH_FULL=1 the rows are
few: every rung at one batch or two, and ours over batches, sizes and widths; with it, each rung at each of them.
`bench.suite` times the rungs beside each other, which is what a ratio needs; these rows are for watching one
machine over time.
"""

import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench import ceilings
from bench.group import BATCHES_IN_TURN, in_turn, peak_memory
from bench.peers import ladder
from bench.peers.ladder import EXAMPLE, RUNGS, Rung
from bench.roofline import floor, step_kernels
from bench.telemetry import Telemetry
from bench.timing import quantile
from bench.verify import differences, oracle, tolerance_class, verdict
from dcgan.arch import PRESETS, Arch
from dcgan.config import fast_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("DCGAN_BENCH_FULL") == "1"
ROUNDS = {"cuda": 20, "cpu": 4}
STEPS_A_ROUND = {"cuda": 20, "cpu": 1}
"""On a GPU launches run ahead of the device, so a round is many steps and one wait."""

BATCHES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SIZES = (32, 64, 128, 256)
WIDTHS = (32, 64, 128, 256)
BASE = PRESETS["dcgan64"].arch

FASTEST = Rung("bf16" if fast_bf16(DEVICE) else "fp32", ours="fused", graph=DEVICE.type == "cuda")
ON_CPU = [rung for rung in RUNGS if rung.ours == "fused" or rung.name in (EXAMPLE, "example+bf16+channels_last+frozen")]
LADDER = {16: ON_CPU, 64: [RUNGS[0], FASTEST]} if DEVICE.type == "cpu" else {128: RUNGS, 1024: RUNGS}
"""Rungs by batch; few on a CPU, where a step takes up to a second and a row takes a dozen."""

Point = tuple[Rung, Arch, int]


def points() -> Iterator[Point]:
    """Rung, architecture and images of each row."""
    gpu = DEVICE.type == "cuda"
    for images, rungs in LADDER.items():
        yield from ((rung, BASE, images) for rung in rungs)
    if not (gpu or FULL):
        yield FASTEST, PRESETS["small32"].arch, 16
        return
    rungs = [rung for rung in RUNGS if not rung.compile] if FULL else [FASTEST]
    for rung in rungs:
        yield from ((rung, BASE, images) for images in BATCHES)
        yield from ((rung, Arch(image_size=size), 128 if gpu else 8) for size in SIZES)
        yield from ((rung, Arch(ngf=width, ndf=width), 128 if gpu else 8) for width in WIDTHS)


def row_id(rung: Rung, arch: Arch, images: int) -> str:
    what = "" if arch == BASE else f"-{arch.image_size}px-f{arch.ngf}"
    return f"{rung.name}{what}-b{images}"


ROWS = [
    pytest.param(rung, arch, images, id=row_id(rung, arch, images))
    for rung, arch, images in dict.fromkeys(points())
    if ladder.unavailable(rung, arch, DEVICE) is None
]

oracle_of = cache(oracle)
measured = cache(ceilings.measure)
telemetry = cache(Telemetry)


@pytest.mark.parametrize(("rung", "arch", "images"), ROWS)
def test_step(benchmark, rung: Rung, arch: Arch, images: int) -> None:
    try:
        measure(benchmark, rung, arch, images, DEVICE)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"does not fit into this device's memory: {str(error).splitlines()[0]}")


def measure(benchmark: Any, rung: Rung, arch: Arch, images: int, device: torch.device) -> None:
    """Verify `rung` at `images` images per step, time it, and put the figures of one step into `extra_info`."""
    expected = oracle_of(arch, images, device)
    with peak_memory(device) as memory:
        runner = ladder.build(rung, arch, expected.start, device, images)
        precision = tolerance_class(rung.precision, device)
        why = verdict(differences(runner, expected), precision)
        assert why is None, why
        memory.steady(runner, rung.images(expected.data[0][0]), expected.data[0][1])
    steps = STEPS_A_ROUND[device.type]
    step = in_turn(runner, ladder.batches(arch, images, device, BATCHES_IN_TURN))
    benchmark.group = f"step, {arch.image_size} pixels, batch {images}"
    benchmark.pedantic(several(step, steps, device), rounds=ROUNDS[device.type], warmup_rounds=1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    settings = {"image_size": arch.image_size, "ngf": arch.ngf, "batch": images, "steps_a_round": steps}
    benchmark.extra_info |= {"device": name, "rung": rung.name, "peak_memory_bytes": memory.peak_bytes, **settings}
    if benchmark.stats is None:  # --benchmark-disable: it ran once, untimed
        return
    times_ms = [seconds * 1e3 / steps for seconds in benchmark.stats.stats.data]
    step_ms = quantile(times_ms, 0.5)
    work = floor(list(step_kernels(arch, images)), measured(device).of(precision))
    benchmark.extra_info |= {f"p{q}_ms": quantile(times_ms, q / 100) for q in (20, 50, 80)}
    benchmark.extra_info |= {"images_per_s": images * 1e3 / step_ms, "roofline": work.floor_us / 1e3 / step_ms}
    benchmark.extra_info |= {"tflops": work.gflop / step_ms, "gbps": work.mbytes / step_ms}  # 10^9, 10^6 in 10^-3 s
    benchmark.extra_info |= telemetry(device).under_load(step, step_ms)
    joules, _ = telemetry(device).joules_per_image(step, images, seconds=1.0)
    if joules is not None:
        benchmark.extra_info["joules_per_image"] = joules


def several(step: Callable[[], object], steps: int, device: torch.device) -> Callable[[], None]:
    """`steps` steps in a row and, on a GPU, one wait at the end."""

    def call() -> None:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
