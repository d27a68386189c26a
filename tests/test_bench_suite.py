"""The suite on a tiny network: its rows, its files, what it says where it has nothing, what it keeps when cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch

from bench import ceilings, profile, record, stages, suite
from bench.group import Bench, Group, Plan
from bench.peers import ladder
from bench.peers.ladder import Rung
from bench.roofline import Ceilings, step_kernels
from bench.telemetry import Telemetry
from dcgan.arch import Arch
from dcgan.errors import run_command

ARCH, CPU = Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device("cpu")
SIZES = (64, 1 << 16)
PLAN = Plan(ARCH, CPU, (4,), (2, 4), rounds=4, compile=False, ceiling_sizes=SIZES)
LONG = ("parity", "sanitize", "quality")  # each has tests of its own, beside these
ONLY = [name for name in suite.STAGES if name not in LONG]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite") / "record"
    return out, suite.run(out, PLAN, ONLY, minutes=30.0, commit="c0ffee")  # a slow machine skips no rung


def read(out, name):
    return json.loads((out / name).read_text())


def test_rows_are_in_the_file_as_returned_and_well_formed(ran):
    out, rows = ran
    assert [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()] == rows
    assert all(row["ok"] in (True, None) for row in rows), [row for row in rows if row["ok"] is False]
    assert all(row["why"] for row in rows if row["ok"] is not True)
    assert {row["suite"] for row in rows} == set(ONLY)


def test_every_rung_has_a_row_and_those_that_ran_their_figures(ran):
    rows = {row["name"]: row for row in ran[1] if row["suite"] == "peers"}
    assert {name for name in rows if "jax" not in name} == {rung.name for rung in ladder.RUNGS}
    assert any("jax" in name for name in rows)
    for rung in ladder.RUNGS:
        row = rows[rung.name]
        if rung.graph or rung.compile:
            assert row["ok"] is None and ("GPU" in row["why"] or "not in this plan" in row["why"])
            continue
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["images_per_s"] == pytest.approx(4e3 / row["p50_ms"])
        assert row["roofline"] > 0 and row["difference_gradient"] < 0.4
        assert rung.name == "example" or row["over_example_p20"] <= row["over_example"] <= row["over_example_p80"]


def test_the_summary_has_the_issues_keys_and_comes_from_the_rows(ran):
    out, rows = ran
    summary = read(out, "summary.json")
    assert (summary["cpu"], summary["commit"]) == (record.cpu_name(), "c0ffee")
    assert summary["kernels_hash"] == record.kernels_hash() and "gpu" not in summary
    found = summary["b4"]
    row = next(row for row in rows if row["suite"] == "peers" and row["name"] == found["ours"])
    assert found["step_ms"] == row["p50_ms"] and found["over_example"] == row["over_example"]
    assert found["best_peer"].startswith("example") and found["over_best_peer"] > 0
    assert found["roofline"] == row["roofline"] and found["peak_memory_over_example"] is None
    fused = [row for row in rows if row["name"].startswith("sampling/fused") and row["ok"]]
    assert summary["sampling_images_per_s"] == max(row["images_per_s"] for row in fused)
    assert summary["b2"]["best_peer"] is None and summary["b2"]["over_example"] > 0


def test_at_most_eight_small_files_and_an_environment(ran):
    out, _ = ran
    files = {path.name: path.stat().st_size for path in out.iterdir()}
    assert set(files) == {"rows.jsonl", "env.json", "summary.json", "README.md", "profile.txt", "trace.json"}
    assert all(size <= 1 << 20 for name, size in files.items() if name != "trace.json")
    environment = read(out, "env.json")
    assert environment["kernel_files"] == suite.file_hashes() and "dcgan/step.py" in environment["kernel_files"]
    assert "NVML reads NVIDIA GPUs" in environment["telemetry"]["missing"]["all"]


def test_the_profile_names_layers_as_the_roofline_does(ran):
    floors = profile.floors_ms(ARCH, 4, Ceilings())
    assert len(floors) == len(list(step_kernels(ARCH, 4)))
    rows = {row["name"]: row for row in ran[1] if row["suite"] == "profile"}
    assert {name for name, row in rows.items() if row["floor_ms"]} >= set(floors) - {"D wgrad D3"}
    assert "D wgrad D3" not in floors, "D's head has one backward"
    assert all(row["ms"] >= 0 for row in rows.values())


def test_a_wrong_rung_fails_its_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    build = ladder.build

    def sabotaged(rung, *rest):
        if rung.name == "example+bf16":
            raise RuntimeError("first line\nsecond line")
        runner = build(rung, *rest)
        if rung.name == "fused":
            runner.optimizers[0].param_groups[0]["lr"] = 0.0
        if rung.name == "reference":
            runner.optimizers[1].param_groups[0]["lr"] = float("nan")
        return runner

    monkeypatch.setattr(ladder, "build", sabotaged)
    rows = {row["name"]: row for row in suite.run(tmp_path / "out", PLAN, ["peers"], minutes=30.0)}
    assert rows["example+bf16"]["why"] == "RuntimeError: first line" and rows["example+bf16"]["ok"] is False
    assert rows["fused"]["ok"] is False and "wrong against the reference step" in rows["fused"]["why"]
    assert "p50_ms" not in rows["fused"], "what is wrong is not timed"
    assert "nan" in rows["reference"]["why"] and rows["reference"]["difference_update"] is None
    assert "NaN" not in (tmp_path / "out/rows.jsonl").read_text()
    assert rows["fused+bf16"]["ok"] and rows["fused+bf16"]["roofline"] is None, "no ceilings, no fraction"


def test_where_the_example_has_no_such_network_ours_stand_alone(tmp_path):
    plan = replace(PLAN, arch=Arch(image_size=28, channels=1, nz=6, ngf=8, ndf=8), step_batches=(2,))
    rows = suite.run(tmp_path / "out", plan, ["ceilings", "peers", "step"], minutes=30.0)
    ran = {row["name"] for row in rows if row["suite"] != "ceilings" and row["ok"] and row["group"] != "sampling"}
    assert ran == {"reference", "reference+bf16", "fused", "fused+bf16"}
    assert all("7×7" in row["why"] for row in rows if row["name"].startswith("example") and "graph" not in row["name"])
    summary = read(tmp_path / "out", "summary.json")["b4"]
    assert summary["over_example"] is summary["best_peer"] is None and summary["step_ms"] > 0


def test_when_time_is_short_the_example_and_ours_come_first(tmp_path):
    (tmp_path / "out").mkdir()
    writer = suite.Writer(tmp_path / "out/rows.jsonl")
    bench = Bench(PLAN, tmp_path / "out", writer.emit, Telemetry(CPU))
    Group(bench, "peers", 4, "eager").run([rung for rung in ladder.RUNGS if not rung.graph], seconds=0.0)
    ran = {row["name"] for row in writer.rows if row["ok"]}
    assert ran == {"example", "fused", "fused+bf16"}
    assert all("of which 0 are left" in row["why"] for row in writer.rows if not row["ok"])
    assert bench.summary["b4"]["ours"].startswith("fused")


def test_a_stage_that_raises_is_a_row_and_time_that_is_up_another(tmp_path, monkeypatch):
    def broken(bench, seconds):
        raise OSError("disk on fire")

    monkeypatch.setitem(suite.STAGES, "ceilings", (broken, 1.0))
    rows = suite.run(tmp_path / "a", PLAN, ["ceilings", "tune"], minutes=1.0)
    assert [(row["ok"], row["why"][:20]) for row in rows] == [
        (False, "OSError: disk on fir"),
        (None, "needs a GPU and a pr"),
    ]
    (row,) = suite.run(tmp_path / "b", PLAN, ["step"], minutes=1e-9)
    assert row["ok"] is None and "no time left" in row["why"]


def test_what_was_measured_survives_a_termination(tmp_path):
    code = (
        "import time, torch\nfrom bench import suite\nfrom bench.group import Plan\nfrom dcgan.arch import Arch\n"
        "suite.plan_of = lambda args: Plan(Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device('cpu'), (4,), (4,),"
        f" rounds=4, compile=False, ceiling_sizes={SIZES})\n"
        "suite.STAGES['peers'] = (lambda bench, seconds: (print('here', flush=True), time.sleep(60)), 1.0)\n"
        "suite.sys.argv[1:] = ['--out', 'record', '--only', 'ceilings,peers']\n"
        "suite.sys.exit(suite.run_command(suite.command))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(record.ROOT)},
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("here"):
            break
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 128 + signal.SIGTERM
    assert len((tmp_path / "record/rows.jsonl").read_text().splitlines()) == 3
    assert "matrix product" in (tmp_path / "record/README.md").read_text()


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.suite", *map(str, arguments)])
    code = run_command(suite.command)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--out"),
        (("--only", "peers,speed"), "'speed' is not a stage"),
        (("--minutes", "0"), "--minutes 0"),
        (("--minutes", "nan"), "--minutes nan"),
        (("--minutes", "inf"), "--minutes inf"),
        (("--only", "nonsense"), "'nonsense' is not a stage"),
        (("--only", ""), "'' is not a stage"),
        (("--batch", "0"), "--batch 0"),
        (("--preset", "huge"), "huge"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, named):
    out = () if not arguments else ("--out", tmp_path / "out")
    code, error = command(monkeypatch, capsys, *out, *arguments)
    assert code == 2 and error.count("\n") == 1 and named in error
    assert not (tmp_path / "out").exists()


def test_a_record_is_never_written_over(tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("kept\n")
    code, error = command(monkeypatch, capsys, "--out", tmp_path)
    assert code == 2 and "append-only" in error and (tmp_path / "rows.jsonl").read_text() == "kept\n"
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "rows.jsonl")
    assert code == 2 and "it is a file" in error


def test_a_folder_that_cannot_be_made_or_written_is_said_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "run", None)
    (tmp_path / "file").write_text("")
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "file/below")
    assert code == 2 and error.count("\n") == 1 and "file/below cannot be written" in error

    def forbidden(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(suite.tempfile, "TemporaryFile", forbidden)
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "out")
    assert code == 2 and error.count("\n") == 1 and "out cannot be written: Permission denied" in error


def test_a_folder_that_holds_other_files_is_taken(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("kept")
    monkeypatch.setattr(suite, "run", lambda *_: [])
    assert command(monkeypatch, capsys, "--out", tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_summary_is_on_disk_as_soon_as_a_group_is_measured(tmp_path, monkeypatch):
    """Whatever kills the process between two groups, and asks nobody."""
    seen = []
    out = tmp_path / "out"
    monkeypatch.setattr(stages, "jax", lambda *_: seen.append(read(out, "summary.json")["b4"]["ours"]))
    suite.run(out, PLAN, ["peers"], minutes=30.0)
    assert seen and seen[0].startswith("fused")


def test_something_of_ours_that_is_wrong_is_exit_code_3(tmp_path, monkeypatch, capsys):
    rows = [{"suite": "peers", "name": "example+compile", "ok": False, "why": "no compiler", "ours": ""}]
    monkeypatch.setattr(suite, "run", lambda *_: rows)
    assert command(monkeypatch, capsys, "--out", tmp_path / "a")[0] == 0, "a peer that fails is its own affair"
    rows.append({"suite": "step", "name": "fused", "ok": False, "why": "wrong", "ours": "fused"})
    code, error = command(monkeypatch, capsys, "--out", tmp_path / "a")
    assert code == 3 and "fused" in error and "example" not in error


def test_staleness_names_the_sources_that_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "machine", lambda: "abacus")
    assert suite.staleness(tmp_path) == "no record of abacus yet"
    files = suite.file_hashes()
    for day, known in (("01", None), ("03", files | {"dcgan/step.py": "another"})):
        folder = tmp_path / "abacus" / f"2026-01-{day}_step"
        folder.mkdir(parents=True)
        environment = {"date": f"2026-01-{day}T00:00:00Z", "kernels_hash": "old"} | (
            {"kernel_files": known} if known else {}
        )
        (folder / "env.json").write_text(json.dumps(environment))
        (folder / "summary.json").write_text("{}")
    quality = tmp_path / "abacus" / "2026-01-12_quality"  # which says nothing of speed
    quality.mkdir()
    (quality / "env.json").write_text('{"date": "2026-01-12T00:00:00Z"}')
    now = datetime(2026, 1, 13, tzinfo=UTC)
    line = suite.staleness(tmp_path, now)
    assert line == "abacus: newest record 2026-01-03_step is 10 days old; kernel sources changed since: dcgan/step.py"
    (folder / "env.json").write_text("{")  # a record that cannot be read is bench.report's to name
    assert "changed, which ones that record does not say" in suite.staleness(tmp_path, now)


def test_ops_are_verified_and_timed(ran):
    rows = [row for row in ran[1] if row["suite"] == "ops" and row["ok"]]
    assert {row["recipe"] for row in rows} == {"library", "eager"}
    names = {row["name"].split("/")[0] for row in rows}
    assert names >= {"conv", "conv_transpose", "wgrad", "conv_bn_act", "conv_transpose_act", "adam_step", "gan_loss"}
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["error_over_allowed"] <= 1
        assert row["roofline"] == pytest.approx(row["floor_ms"] / row["p50_ms"]) and row["gbps"] > 0
    missing = {row["name"]: row["why"] for row in ran[1] if row["suite"] == "ops" and row["ok"] is None}
    assert "CUDA device" in missing["triton"] and set(missing) == {"triton", "cuda"}


def test_ceilings_are_rates(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) * 0.5)  # every measurement takes half a second
    measured = ceilings.measure(CPU, 3, side=100, copy_bytes=1000)
    assert measured.matrix_tflops == {"bf16": pytest.approx(4e-6), "fp32": pytest.approx(4e-6)}
    assert measured.copy_tbps == pytest.approx(4e-9)
    assert measured.of("fp32") == Ceilings(measured.matrix_tflops["fp32"], measured.copy_tbps)


def test_the_example_has_no_layers_to_mark(capsys):
    runner = ladder.build(Rung(), ARCH, ladder.weights(ARCH), CPU, 2)
    found = profile.profile(runner, ARCH, 2, CPU, Ceilings(), steps=1)
    assert found.layers == [] and found.operations and found.step_ms > 0
    assert "operation" in profile.text(found)
