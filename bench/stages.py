"""The stages of `bench.suite`. Each takes the bench and the seconds it has, and emits rows."""

import re
import subprocess
import sys
import time

from bench import ceilings, record
from bench.group import Bench, Group
from bench.peers import ladder
from bench.peers.ladder import EXAMPLE

PARITY = ("tests/test_fused_step.py",)


def parity(bench: Bench, seconds: float) -> None:
    """The fused step against the reference step, by the tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PARITY]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        bench.emit("parity", PARITY[0], None, f"not finished within the {seconds:.0f} s of this stage")
        return
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    ok = done.returncode == 0 and counts.get("passed", 0) > 0
    why = None if ok else (done.stdout.strip().splitlines() or ["pytest said nothing"])[-1][:200]
    bench.emit("parity", PARITY[0], ok, why, **counts, seconds=time.perf_counter() - began)


def measure_ceilings(bench: Bench, seconds: float) -> None:
    """The rates that floors are counted against; they stay within about this stage's seconds."""
    found = ceilings.measure(bench.plan.device, 200, *(bench.plan.ceiling_sizes or (None, None)), seconds=seconds)
    for precision, rate in found.matrix_tflops.items():
        name = f"matrix product {precision}"
        bench.emit("ceilings", name, True, matrix_tflops=rate, median_over_shortest=found.spread[precision])
    bench.emit("ceilings", "copy", True, copy_tbps=found.copy_tbps, median_over_shortest=found.spread["copy"])
    bench.measured = found


def peers(bench: Bench, seconds: float) -> None:
    """Every rung, ours among them, at each of the plan's batches."""
    began, batches = time.perf_counter(), bench.plan.peer_batches
    for done, images in enumerate(batches):
        share = (seconds - (time.perf_counter() - began)) / (len(batches) - done)
        compiled = [rung for rung in ladder.RUNGS if rung.compile]
        quick = [rung for rung in ladder.RUNGS if not rung.compile]
        left = time.perf_counter() + share
        fastest = Group(bench, "peers", images, "eager").run(quick, share * (0.5 if bench.plan.compile else 1.0))
        if not bench.plan.compile:
            for rung in compiled:
                why = ladder.unavailable(rung, bench.plan.arch, bench.plan.device)
                bench.emit("peers", rung.name, None, why or "compiling takes minutes: not in this plan", batch=images)
            continue
        seconds_left = left - time.perf_counter()
        here = [rung for rung in compiled if not ladder.unavailable(rung, bench.plan.arch, bench.plan.device)]
        fits = any(ladder.COMPILE_SECONDS[rung.compile] <= seconds_left for rung in here)
        beside = [rung for rung in quick if fits and rung.name in {EXAMPLE, *fastest}]
        Group(bench, "peers", images, "compiled").run(beside + compiled, seconds_left)


def step(bench: Bench, seconds: float) -> None:
    """Ours beside the example at each of the plan's batches."""
    rungs = [rung for rung in ladder.RUNGS if rung.ours == "fused" or rung.name == EXAMPLE]
    began, batches = time.perf_counter(), bench.plan.step_batches
    for done, images in enumerate(batches):
        left = seconds - (time.perf_counter() - began)
        if f"b{images}" in bench.summary:
            bench.emit("step", f"b{images}", None, "measured in the stage peers", batch=images)
        elif left <= 0 and done:
            bench.emit("step", f"b{images}", None, f"no time left of this stage's {seconds:.0f} s", batch=images)
        else:
            Group(bench, "step", images, "step").run(rungs, left / (len(batches) - done))
