"""The training step as pytest-benchmark rows: rung × batch, on the GPU where there is one, else on the CPU.

    pytest bench/bench_step.py --benchmark-only

A row is verified against the reference step first and fails where it is wrong. `bench.suite` times the rungs beside
each other, which is what a ratio needs; these rows stand alone, for watching one machine over time.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from bench import ceilings
from bench.group import BATCHES_IN_TURN, in_turn
from bench.peers import ladder
from bench.peers.ladder import EXAMPLE, RUNGS, Rung
from bench.roofline import floor, step_kernels
from bench.timing import quantile
from bench.verify import differences, oracle, tolerance_class, verdict
from dcgan.arch import PRESETS, Arch
from dcgan.config import fast_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = {"cuda": 20, "cpu": 5}
STEPS_A_ROUND = {"cuda": 20, "cpu": 1}
"""On a GPU launches run ahead of the device, so a round is many steps and one wait."""

FASTEST = Rung("bf16" if fast_bf16(DEVICE) else "fp32", ours="fused")
ON_CPU = [rung for rung in RUNGS if rung.ours == "fused" or rung.name in (EXAMPLE, "example+bf16+channels_last+frozen")]
LADDER = {16: ON_CPU, 64: [RUNGS[0], FASTEST]} if DEVICE.type == "cpu" else {128: RUNGS, 1024: RUNGS}
"""Rungs by batch; few on a CPU, where a step takes up to a second and a row takes a dozen."""

ROWS = [
    pytest.param(rung, images, id=f"{rung.name}-b{images}")
    for images, rungs in LADDER.items()
    for rung in rungs
    if ladder.unavailable(rung, PRESETS["dcgan64"].arch, DEVICE) is None
]

oracle_of = cache(oracle)
measured = cache(ceilings.measure)


@pytest.mark.parametrize(("rung", "images"), ROWS)
def test_step(benchmark, rung: Rung, images: int) -> None:
    measure(benchmark, rung, PRESETS["dcgan64"].arch, images, DEVICE)


def measure(benchmark: Any, rung: Rung, arch: Arch, images: int, device: torch.device) -> None:
    """Verify `rung` at `images` images a step, time it, and put the figures of one step into `extra_info`."""
    expected = oracle_of(arch, images, device)
    runner = ladder.build(rung, arch, expected.start, device, images)
    precision = tolerance_class(rung.precision, device)
    why = verdict(differences(runner, expected), precision)
    assert why is None, why
    steps = STEPS_A_ROUND[device.type]
    call = several(in_turn(runner, ladder.batches(arch, images, device, BATCHES_IN_TURN)), steps, device)
    benchmark.group = f"step, batch {images}"
    benchmark.pedantic(call, rounds=ROUNDS[device.type], warmup_rounds=1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    benchmark.extra_info |= {"device": name, "rung": rung.name, "batch": images, "steps_a_round": steps}
    if benchmark.stats is None:  # --benchmark-disable: it ran once, untimed
        return
    times_ms = [seconds * 1e3 / steps for seconds in benchmark.stats.stats.data]
    step_ms = quantile(times_ms, 0.5)
    floor_ms = floor(list(step_kernels(arch, images)), measured(device).of(precision)).floor_us / 1e3
    benchmark.extra_info |= {f"p{q}_ms": quantile(times_ms, q / 100) for q in (20, 50, 80)}
    benchmark.extra_info |= {"images_per_s": images * 1e3 / step_ms, "roofline": floor_ms / step_ms}


def several(step: Callable[[], object], steps: int, device: torch.device) -> Callable[[], None]:
    """`steps` steps in a row and, on a GPU, one wait at the end."""

    def call() -> None:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call
