"""The stages that run other processes: what they count, what they start anew, what they keep of a cut run."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ceilings, stages, suite
from bench.group import Bench, Plan
from bench.overview import table
from bench.peers import ladder
from bench.stages import layers
from bench.telemetry import Telemetry
from dcgan.arch import PRESETS, Arch

PLAN = Plan(Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device("cpu"), (4,), (2,), rounds=4, compile=False)


def test_parity_runs_tests_and_reports_what_pytest_counted(tmp_path, monkeypatch):
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_a():\n    pass\n")
    bad.write_text("def test_b():\n    assert False\n")
    monkeypatch.setattr(stages, "_parity_process", lambda file, seconds, environment: None)
    monkeypatch.setattr(stages, "TESTS", {"cpu": (str(good), str(bad), str(tmp_path / "test_none.py"))})
    rows = suite.run(tmp_path / "out", PLAN, ["parity"], minutes=1.0)
    assert [(row["ok"], row.get("passed"), row.get("failed")) for row in rows] == [(True, 1, None), (False, None, 1)]


def test_on_a_gpu_whole_steps_come_first_their_kernels_compiled_ahead(tmp_path, monkeypatch):
    did, writer = [], suite.Writer(tmp_path / "rows.jsonl")
    bench = Bench(replace(PLAN, device=torch.device("cuda")), tmp_path, writer.emit, Telemetry(PLAN.device))
    monkeypatch.setattr(stages.dependent, "able", lambda device: True)
    monkeypatch.setattr(stages.ahead, "compile_steps", lambda bench, stage, jobs: did.append(jobs))
    monkeypatch.setattr(stages, "run_tests", lambda bench, tests, seconds: did.append((tests, seconds)))
    monkeypatch.setattr(stages, "_parity_process", lambda file, seconds, environment: did.append(seconds))
    stages.parity(bench, 100.0)
    jobs, (captured, seconds), _, rest = did
    assert captured == "tests/test_captured_step.py" and 39 < seconds <= 40 and 99 < rest <= 100
    arch, batches, large, images = stages.CAPTURED
    assert {(job[0], job[1]) for job in jobs} == {(arch, n) for n in batches} | {(large, images)}
    assert len(set(jobs)) == len(jobs) == 4 * 2 * len(batches) + 1
    test = importlib.import_module("test_captured_step")
    assert arch == test.ARCH and sorted({rung.precision for _, _, rung in jobs}) == sorted(test.PRECISIONS)
    assert set(batches) == {8, 22 % 8}, "of test_captured_step.Run"


PARITY_ROWS = [
    {"name": "conv_act/D1/forward/triton/bf16/b8", "ok": True, "section": "numbers",
     "error_over_allowed": 0.5},
    {"name": "conv_act/D2/forward/triton/bf16/b8", "ok": False, "why": "y 3", "section": "numbers",
     "error_over_allowed": 3.0},
    {"name": "conv_act/D1/forward/eager/bf16/b8", "ok": True, "section": "numbers"},
    {"name": "12 more", "ok": None, "why": "not reached", "section": "numbers"},
]  # fmt: skip


def test_parity_counts_a_section_and_names_what_is_wrong(tmp_path, monkeypatch):
    def process(file, seconds, environment):
        if not file.exists():
            file.write_text("".join(json.dumps(row) + "\n" for row in PARITY_ROWS))

    monkeypatch.setattr(stages, "_parity_process", process)
    monkeypatch.setattr(stages, "TESTS", {"cpu": ()})
    rows = {row["name"]: row for row in suite.run(tmp_path / "out", PLAN, ["parity"], minutes=1.0)}
    assert rows["numbers/triton/bf16"]["why"] == "1 of 2 are wrong" and rows["numbers/triton/bf16"]["checked"] == 2
    assert rows["numbers/triton/bf16"]["worst_error_over_allowed"] == 3.0
    assert rows["conv_act/D2/forward/triton/bf16/b8"]["ok"] is False
    assert "conv_act/D1/forward/triton/bf16/b8" not in rows and rows["numbers/eager/bf16"]["ok"] is True
    assert rows["12 more"]["ok"] is None
    assert [rows[f"numbers/{recipe}/bf16"]["ours"] for recipe in ("triton", "eager")] == ["ours", ""]


def test_sanitize_gets_its_seconds_and_the_rows(tmp_path, monkeypatch):
    def sanitize(seconds, emit):
        emit("sanitize", "memcheck", None, f"{seconds > 0}: no compute-sanitizer")

    monkeypatch.setitem(sys.modules, "bench.sanitize", SimpleNamespace(sanitize=sanitize))
    (row,) = suite.run(tmp_path / "out", PLAN, ["sanitize"], minutes=1.0)
    assert (row["suite"], row["why"]) == ("sanitize", "True: no compute-sanitizer")


class Processes:
    """`subprocess.run` by a script: each call pops what it does to the rows and how it ends."""

    def __init__(self, monkeypatch, *script):
        self.script, self.commands = list(script), []
        monkeypatch.setattr(subprocess, "run", self.run)

    def run(self, command, **options):
        self.commands.append(command)
        act, code = self.script.pop(0)
        act(command)
        if code is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return SimpleNamespace(returncode=code, stdout="table.json", stderr="")


def test_parity_that_dies_or_hangs_is_started_anew_until_it_ends_by_itself(tmp_path, monkeypatch):
    file = tmp_path / "parity.jsonl"

    def begin(command):
        file.with_suffix(".journal").write_text("+ a\n")

    def end(command):
        file.with_suffix(".journal").unlink()

    processes = Processes(monkeypatch, (begin, -11), (begin, None), (end, 3), (end, 0))
    stages._parity_process(file, 60.0, {})
    assert len(processes.commands) == 3 and processes.commands[0][-4:-2] == ["--rows", str(file)]
    processes = Processes(monkeypatch, *[(begin, -11)] * 9)
    stages._parity_process(file, 60.0, {})
    assert len(processes.commands) == stages.STARTS


ENTRY = {"recipe": "triton", "tile": {}, "us": 12.0, "library_us": 15.0}
TABLE = {
    "device": "NVIDIA Test 1",
    "tiles": {"conv": {"64x128@32": {"bf16": {"256": ENTRY}}}},
    "ops": {"conv_bn_act": {"64x128@32": {"bf16": {"256": "library"}}}},
}


@pytest.mark.parametrize("code", [0, None])
def test_tune_goes_on_from_the_tree_s_table_and_keeps_what_it_has_when_cut(tmp_path, monkeypatch, code):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 1")
    monkeypatch.setattr(stages.record, "machine", lambda: "nvidia-test-1")
    monkeypatch.setattr(stages.tuning, "FOLDER", tmp_path)
    (tmp_path / "nvidia-test-1.json").write_text(json.dumps(TABLE))
    rows = []
    plan = replace(PLAN, arch=PRESETS["paper"].arch, device=torch.device("cuda"), peer_batches=(128, 256))
    out = tmp_path / "2026-11-23_first"
    out.mkdir()
    bench = Bench(plan, out, lambda stage, name, ok, why=None, **f: rows.append((name, ok, why, f)), Telemetry("cpu"))
    processes = Processes(monkeypatch, (lambda command: None, code))
    stages.tune(bench, 600.0)
    command = " ".join(processes.commands[0])
    assert "--preset paper --batch 128 --batch 256" in command and "--minutes 10.00" in command
    assert "bench/results/nvidia-test-1/2026-11-23_first" in command
    assert rows[0][:2] == ("conv/64x128@32/triton/bf16/b256", True) and rows[0][3]["us"] == 12.0
    assert rows[1][:2] == ("conv_bn_act/64x128@32/library/bf16/b256", True)
    assert rows[2][:2] == ("tune", code == 0)


def test_without_a_gpu_there_is_nothing_to_tune(tmp_path):
    (row,) = suite.run(tmp_path / "out", PLAN, ["tune"], minutes=1.0)
    assert row["ok"] is None and "--dry-run" in row["why"]


def test_the_table_has_one_line_for_the_recipes_of_an_op_and_one_for_what_failed():
    common = {"suite": "ops", "ok": True, "precision": "bf16", "batch": 8}
    rows = [
        common | {"name": "conv/D2/forward/library/bf16/b8", "recipe": "library", "p50_ms": 0.02, "roofline": 0.3},
        common | {"name": "conv/D2/forward/triton/bf16/b8", "recipe": "triton", "p50_ms": 0.01, "roofline": 0.6},
        {"suite": "ops", "name": "conv/D3/forward/triton/bf16/b8", "ok": False, "why": "y 7", "recipe": "triton"},
        {"suite": "tune", "name": "conv/64x128@32/triton/bf16/b8", "ok": True, "us": 12.0, "library_us": 15.0},
        {"suite": "parity", "name": "numbers/triton/bf16", "ok": True, "checked": 12},
        {"suite": "profile", "name": "D2 fwd", "ok": True, "ms": 1.0},
    ]
    lines = table(rows)
    assert len(lines) == 5 and "conv/D2/forward/bf16/b8" in lines[-1]
    assert lines[-1].endswith("triton 10.0, library 20.0 µs; floor 0.60")
    assert "failed: y 7" in lines[1] and "12.0 µs, library 15.0" in lines[2] and "12 checked" in lines[3]


def test_the_best_peer_s_kernels_are_beside_ours_and_a_peer_that_fails_is_a_row(tmp_path, monkeypatch):
    """What a GPU's profile adds, here of a CPU's operations."""
    rows = []
    bench = Bench(PLAN, tmp_path, lambda *row, **figures: rows.append((*row, figures)), Telemetry("cpu"))
    bench.measured, bench.summary["b4"] = (
        ceilings.Measured({"bf16": 1.0, "fp32": 1.0}, 1.0),
        {"best_peer": "example+bf16"},
    )
    layers.profile_peers(bench, 4)
    assert [row[:3] for row in rows] == [("profile", f"kernels/{name}", True) for name in ("example", "example+bf16")]
    assert all(row[-1]["kernels"] > 50 and row[-1]["kernels_ms"] > 0 for row in rows)
    assert "example+bf16, batch 4, " in (tmp_path / "profile.txt").read_text()
    bench.summary["b4"]["best_peer"] = "example+graph"
    monkeypatch.setattr(ladder, "Graphed", None)
    layers.profile_peers(bench, 4)
    assert rows[-1][1:3] == ("kernels/example+graph", None) and "TypeError" in rows[-1][3]
