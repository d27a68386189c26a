"""Single kernels and ops as pytest-benchmark rows: what runs on this machine, on the GPU if there is one.

    pytest bench/bench_ops.py --benchmark-only [-k conv_bn_act]

The rows are those of `bench.ops`, each recipe by itself: verified first, and failed if it is wrong. Without
DCGAN_BENCH_FULL=1 a CPU has the public ops at one small batch, a GPU everything at batch 128 in bf16.
"""

import os
from functools import cache
from typing import Any

import pytest
import torch

from bench import ceilings, ops
from bench.subjects import layers
from bench.subjects.accuracy import arithmetic
from bench.telemetry import Telemetry
from bench.timing import cold_ms, quantile
from dcgan.arch import PRESETS
from kernels import tuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FULL = os.environ.get("DCGAN_BENCH_FULL") == "1"
ROUNDS = {"cuda": 15, "cpu": 3}
ARCH = PRESETS["dcgan64"].arch


def works() -> list[ops.Work]:
    """What this machine measures."""
    if DEVICE.type == "cuda":
        name = tuning.device_name(DEVICE)
        return list(ops.plan(ARCH, DEVICE, (128, 1024)) if FULL else ops.step_works(ARCH, 128, "bf16", name))
    found = list(ops.plan(ARCH, DEVICE, (16,) if FULL else (4,)))
    precision = found[0].precision
    return found if FULL else [w for w in found if isinstance(w, layers.Op) and w.precision == precision]


def rows() -> list[Any]:
    return [pytest.param(work, recipe, id=work.name(recipe)) for work in works() for recipe in work.recipes(DEVICE)]


measured = cache(ceilings.measure)
telemetry = cache(Telemetry)


@cache
def built(work: ops.Work) -> Any:
    built.cache_clear()  # one at a time: the next work's tensors take this one's place
    return ops.build(work, DEVICE)


@pytest.mark.parametrize(("work", "recipe"), rows())
def test_op(benchmark, work: ops.Work, recipe: str) -> None:
    measure(benchmark, work, recipe, DEVICE)


def measure(benchmark: Any, work: ops.Work, recipe: str, device: torch.device) -> None:
    """Verify a recipe, time it, and put its figures into `extra_info`."""
    subject = built(work)
    row = ops.verified(work, subject, recipe)
    assert row.ok, row.why
    call, times_ms = subject.call(recipe), []
    benchmark.group = work.name("*")

    def cold() -> None:
        with arithmetic(work.precision):
            times_ms.append(cold_ms(call, 1, device))

    benchmark.pedantic(cold, rounds=ROUNDS[device.type], warmup_rounds=1)
    benchmark.extra_info |= row.figures | {"peak_memory_bytes": ops.peak_bytes(call, device)}
    if benchmark.stats is None:  # --benchmark-disable: it ran once, untimed
        return
    times_ms = times_ms[-ROUNDS[device.type] :]  # what a flush of the cache takes is not the op's
    benchmark.extra_info |= {f"p{q}_ms": quantile(times_ms, q / 100) for q in (20, 50, 80)}
    benchmark.extra_info |= ops.rates(work, quantile(times_ms, 0.5), measured(device))
    joules, _ = telemetry(device).joules_per_image(call, work.images, seconds=0.5)
    if joules is not None:
        benchmark.extra_info["joules_per_image"] = joules
