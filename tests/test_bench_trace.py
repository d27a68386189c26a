"""What is read off a profiler's trace and Nsight Compute's table, from texts of their forms."""

import pytest

from bench import profile, trace

STEPS = 2


def event(category, name, at, took=1.0):
    return {"ph": "X", "cat": category, "name": name, "ts": at, "dur": took}


def two_steps():
    """Two replays of three nodes: 10 µs busy, 2 µs and 3 µs idle within, 5 µs between; and the profile's own wait."""
    events = [{"ph": "M", "name": "process_name"}, event("user_annotation", "step", 0, 100)]
    for start in (100.0, 120.0):
        events += [
            event("cuda_runtime", "cudaGraphLaunch", start - 10),
            event("kernel", "conv", start, 4.0),
            event("kernel", "beside", start + 1, 2.0),  # on another stream, at the same time
            event("gpu_memcpy", "Memcpy DtoD", start + 6, 2.0),
            event("kernel", "adam", start + 11, 4.0),
        ]
    return [*events, event("cuda_runtime", "cudaDeviceSynchronize", 119.0, 40.0)]


def test_nodes_gaps_and_waits():
    found = trace.timeline({"traceEvents": two_steps()}, STEPS)
    assert (found.nodes, found.graphs, found.busy_us) == (4, 1, 10)
    assert found.idle_us == (2 + 3 + 5 + 2 + 3) / STEPS and found.gap_us == 2
    assert found.waits == {} and found.allocations == {}, "the wait that ends the profile is not the step's"


def test_calls_that_hold_the_host_or_allocate_are_named():
    calls = [
        event("cuda_runtime", "cudaStreamSynchronize", 101.0),
        event("cuda_runtime", "cudaMalloc", 102.0),
        event("cuda_runtime", "cudaMemcpyAsync", 103.0),
        event("cuda_runtime", "cudaLaunchKernel", 104.0),
    ]
    found = trace.timeline({"traceEvents": two_steps() + calls}, STEPS)
    assert found.waits == {"cudaStreamSynchronize": 0.5} and found.allocations == {"cudaMalloc": 0.5}
    said = trace.words(found)
    assert "4.0 nodes" in said and "cudaStreamSynchronize 0.5" in said and "cudaMalloc 0.5" in said


def test_a_trace_without_a_gpu_has_no_timeline():
    assert trace.timeline({"traceEvents": [event("cpu_op", "aten::mm", 0)]}, 1) is None


HEADER = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def table(*rows):
    return "\n".join(["==PROF== Connected to process 7", HEADER, *(",".join(f'"{v}"' for v in row) for row in rows)])


def test_counters_are_means_over_a_kernel_s_time():
    compute, memory = (
        "sm__throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    )
    time = "gpu__time_duration.sum"
    rows = trace.counters(
        table(
            (0, "apply", time, "us", "2.0"), (0, "apply", compute, "%", "10"), (0, "apply", memory, "%", "80"),
            (1, "conv", time, "ns", "1,000"), (1, "conv", compute, "%", "50"), (1, "conv", memory, "%", "20"),
            (2, "conv", time, "us", "3.0"), (2, "conv", compute, "%", "90"), (2, "conv", memory, "%", "40"),
        )
    )  # fmt: skip
    assert [row["name"] for row in rows] == ["conv", "apply"]
    assert rows[0] == {
        "name": "conv",
        "calls": 2,
        "us": 4.0,
        "compute": pytest.approx(0.8),
        "memory": pytest.approx(0.35),
    }
    said = profile.counted_text(rows)
    assert "conv" in said and "0.80" in said and "nan" in said, "L2 was not counted"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n", "no permission"),
        ("", "nothing"),
    ],
)
def test_what_ncu_says_instead_is_the_reason(text, said):
    with pytest.raises(ValueError, match=said):
        trace.counters(text)


def test_without_ncu_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(trace.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="ncu is not installed"):
        trace.measure_counters([], 1.0)


def test_the_child_of_ncu_is_our_own_command(monkeypatch, tmp_path):
    """A stand-in for ncu that prints what it was asked to run."""
    ncu = tmp_path / "ncu"
    ncu.write_text('#!/bin/sh\nfor last; do :; done\necho "==ERROR== asked for $last"\n')
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="ncu: asked for --once"):
        trace.measure_counters(["--batch-size", "4", "--once"], 20.0)
