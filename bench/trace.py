"""What a profiler's trace says of a GPU between its kernels: how many per step, the gaps, who made the host wait.

And what Nsight Compute's counters say of each kernel, where `ncu` is installed and the driver lets it read them.
Neither has run on a GPU yet; both read text, which the tests have.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
WAITS = re.compile(r"Synchronize$|^cudaMemcpy$|^cuMemcpy(?!.*Async)")
"""Runtime calls that hold the host until the device is done."""
ALLOCATES = re.compile(r"^(cuda|cu)(Malloc|MemAlloc|HostAlloc|Free)(?!.*FromPool)")
METRICS = {
    "gpu__time_duration.sum": "us",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
}
"""Counters asked for, and what they are called here; all but the time are fractions of the chip's peak."""


@dataclass(frozen=True)
class Timeline:
    """Figures of one step, averaged over those in the trace.

    nodes: kernels, copies and fills on the device. graphs: graph launches. busy_us: of the device, overlaps counted
    once. gap_us: the median idle time between two that follow each other; idle_us: all of it, from first to last.
    waits, allocations: runtime calls by name.
    """

    nodes: float
    graphs: float
    busy_us: float
    gap_us: float
    idle_us: float
    waits: dict[str, float]
    allocations: dict[str, float]


def timeline(trace: dict[str, Any], steps: int) -> Timeline | None:
    """The figures of a Chrome trace of `steps` steps, its last synchronisation left out; None without a GPU in it."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    device = sorted((event for event in events if event.get("cat") in ON_DEVICE), key=lambda event: event["ts"])
    if not device:
        return None
    ends_at, busy, gaps = device[0]["ts"], 0.0, []
    for event in device:
        begin, end = event["ts"], event["ts"] + event["dur"]
        if event is not device[0]:
            gaps.append(max(0.0, begin - ends_at))
        busy += max(0.0, end - max(begin, ends_at))
        ends_at = max(ends_at, end)
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    within = [call for call in calls if call["ts"] < device[-1]["ts"] and not _is_last_wait(call, calls)]
    return Timeline(
        nodes=len(device) / steps,
        graphs=sum("GraphLaunch" in call["name"] for call in calls) / steps,
        busy_us=busy / steps,
        gap_us=median(gaps) if gaps else 0.0,
        idle_us=sum(gaps) / steps,
        waits=_counted((call["name"] for call in within if WAITS.search(call["name"])), steps),
        allocations=_counted((call["name"] for call in within if ALLOCATES.search(call["name"])), steps),
    )


def _is_last_wait(call: dict, calls: list[dict]) -> bool:
    """Whether it is the wait that ends the profile."""
    waits = [other for other in calls if WAITS.search(other["name"])]
    return bool(waits) and call is max(waits, key=lambda other: other["ts"])


def _counted(names: Iterable[str], steps: int) -> dict[str, float]:
    counts: dict[str, float] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1 / steps
    return counts


def read(path: Path, steps: int) -> Timeline | None:
    """`timeline` of a trace's file."""
    return timeline(json.loads(path.read_text()), steps)


def words(found: Timeline) -> str:
    """The figures in a line or three."""
    lines = [
        f"{found.nodes:.1f} nodes and {found.graphs:.1f} graph launches a step; busy {found.busy_us:.1f} µs, "
        f"idle {found.idle_us:.1f} µs, median gap {found.gap_us:.2f} µs"
    ]
    for what, calls in (("the host waits", found.waits), ("allocations", found.allocations)):
        said = ", ".join(f"{name} {count:.1f}" for name, count in sorted(calls.items())) or "none"
        lines.append(f"{what}, a step: {said}")
    return "\n".join(lines)


def counters(text: str) -> list[dict[str, Any]]:
    """Rows `name`, `calls`, `us` and fractions by kernel, the longest first, from `ncu --csv`'s output.

    Raises:
        ValueError: it is no such table; the message is what ncu said instead.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if line.startswith("==ERROR==")] or lines[-1:] or ["nothing"]
        raise ValueError(f"ncu: {said[0].removeprefix('==ERROR==').strip()}")
    kernels: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(lines[start:]):
        if (name := METRICS.get(row["Metric Name"])) is None:
            continue
        value = float(row["Metric Value"].replace(",", ""))
        unit = row["Metric Unit"]
        value *= {"%": 0.01, "ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3}.get(unit, 1.0)
        kernels.setdefault(row["Kernel Name"], {}).setdefault(name, []).append(value)
    rows = []
    for name, values in kernels.items():
        weights = values["us"]
        fractions = {
            what: sum(v * w for v, w in zip(found, weights, strict=True)) / sum(weights)
            for what, found in values.items()
            if what != "us"
        }
        rows.append({"name": name, "calls": len(weights), "us": sum(weights), **fractions})
    return sorted(rows, key=lambda row: -row["us"])


def measure_counters(command: list[str], seconds: float) -> list[dict[str, Any]]:
    """Run `python -m bench.profile` with `command` under ncu and read its counters.

    Raises:
        ValueError: there is no ncu, it may not read counters, or takes longer than `seconds`; the message says which.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("ncu is not installed")
    call = [ncu, "--csv", "--metrics", ",".join(METRICS), "--target-processes", "all"]
    call += ["--nvtx", "--nvtx-include", "counted/", sys.executable, "-m", "bench.profile", *command]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=seconds, env=dict(os.environ))
    except subprocess.TimeoutExpired:
        raise ValueError(f"ncu was not done within {seconds:.0f} s") from None
    return counters(done.stdout)
