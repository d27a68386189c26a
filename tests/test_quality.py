"""The comparison of samples: what is trained, kept and gone on with; labels; the verdict; its stage in the suite."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bench import quality, record
from bench.group import Bench, Plan
from bench.pages import overlay
from bench.pages.records import records
from bench.quality import Study
from bench.samples.judge import MEASURES, T_975, Judge, compare, labels_of, table
from dcgan import train
from dcgan.arch import Arch
from dcgan.data import open_images
from dcgan.errors import InputError, run_command

ARCH, CPU = Arch(image_size=16, channels=1, nz=8, ngf=4, ndf=4), torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", 16, progress=False)


def in_process(arguments, seconds):
    return run_command(lambda: train.main(arguments)), "said"


@pytest.fixture(scope="module")
def studied(digits, tmp_path_factory):
    """A tiny study, its rows and the arguments of the runs that it started."""
    study, started, rows = Study(digits, ARCH, tmp_path_factory.mktemp("study"), 4, 2, 64, CPU), [], []

    def launch(arguments, seconds):
        started.append(arguments)
        return in_process(arguments, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "launch", launch)
        quality.train(study, collect(rows), math.inf)
    quality.measure(study, collect(rows), Judge(digits, CPU, samples=128, epochs=1))
    return study, rows, started


def collect(rows):
    return lambda suite, name, ok, why=None, **figures: rows.append(
        {"suite": suite, "name": name, "ok": ok, "why": why, **figures}
    )


def test_both_variants_train_from_the_command_line_with_the_same_seeds(studied):
    _, _, started = studied
    new = [arguments for arguments in started if "--resume" not in arguments]
    assert len(started) == 12 and len(new) == 4 and all("--seed" in arguments for arguments in new)
    fused = [arguments for arguments in new if "--fused" in arguments]
    assert len(fused) == 2 and all("bf16" in arguments for arguments in fused)
    assert all("fp32" in arguments for arguments in new if arguments not in fused)


def test_a_row_a_generator_and_one_a_measure_and_milestone(studied):
    study, rows, _ = studied
    assert study.milestones == (1, 2, 4)
    names = {row["name"]: row for row in rows}
    assert {f"{v}-seed{s}/step{n}" for v in quality.VARIANTS for s in (0, 1) for n in (1, 2, 4)} <= names.keys()
    assert {f"{name}/step{n}" for name in MEASURES for n in (1, 2, 4)} <= names.keys()
    generator = names["fused-bf16-seed1/step4"]
    assert all(math.isfinite(generator[name]) for name in (*MEASURES, "loss_d", "d_real", "seconds"))
    assert names["real"]["patch_distance"] < generator["patch_distance"] and 0 < names["real"]["accuracy"] <= 1
    late = [names[f"fused-bf16-seed1/checkpoint{step}"]["frechet"] for step in (3, 4)]
    assert generator["checkpoints"] == 2 and generator["frechet"] == pytest.approx(sum(late) / 2)
    row, values = names["frechet/step4"], [names[f"eager-fp32-seed{s}/step4"]["frechet"] for s in (0, 1)]
    assert row["eager"] == pytest.approx(sum(values) / 2) and row["verdict"] in ("inside", "worse", "better")
    assert row["ok"] is (row["verdict"] != "worse")
    assert table(rows).count("\n") == 1 + 9 and "| 4 | Fréchet, features |" in table(rows)


def test_runs_that_are_there_are_not_repeated(studied, monkeypatch):
    study, _, _ = studied
    monkeypatch.setattr(quality, "launch", lambda *_: pytest.fail("trained again"))
    quality.train(study, lambda *_, **__: pytest.fail("nothing to say"), math.inf)


def test_a_folder_of_other_runs_is_refused(studied, digits):
    study, _, _ = studied
    study.check("fused-bf16", 0)
    with pytest.raises(InputError, match="fused-bf16-seed0 was trained with steps 4; give another folder"):
        replace(study, steps=12).check("fused-bf16", 0)
    with pytest.raises(InputError, match="other pictures"):
        replace(study, images=replace(digits, fingerprint="0")).check("eager-fp32", 1)


def test_a_run_cut_off_goes_on_and_one_that_fails_is_a_row(digits, tmp_path, monkeypatch):
    study, rows, started = Study(digits, ARCH, tmp_path, 4, 2, 64, CPU), [], []
    cut = study.run("eager-fp32", 0)

    def launch(arguments, seconds):
        started.append(arguments)
        if str(study.run("fused-bf16", 0)) in arguments:
            return 3, "failed: on fire"
        if str(cut) in arguments and "--resume" not in arguments:
            cut.mkdir()
            (cut / "config.json").write_text("{}")
        return 143, "stopped by signal 15"

    monkeypatch.setattr(quality, "launch", launch)
    quality.train(study, collect(rows), math.inf)
    assert [(row["name"], row["ok"]) for row in rows] == [
        ("eager-fp32-seed0", None), ("fused-bf16-seed0", False), ("eager-fp32-seed1", None), ("fused-bf16-seed1", None),
    ]  # fmt: skip
    assert "on fire" in rows[1]["why"] and "within the time" in rows[0]["why"]
    assert study.arguments("eager-fp32", 0, 1)[:4] == ["--resume", str(cut), "--steps", "1"]
    rows.clear()
    quality.train(study, collect(rows), 0.0)
    assert len(started) == 4 and {row["why"] for row in rows} == {"no time left"}
    rows.clear()
    quality.measure(study, collect(rows), Judge(digits, CPU, samples=64, epochs=0))
    assert all(row["ok"] is None and "0 + 0 runs" in row["why"] for row in rows[1:]) and len(rows) == 1 + 9


def test_a_verdict_is_against_the_spread_of_the_seeds():
    near = compare([1.0, 1.2, 1.1], [1.05, 1.25, 0.95])
    assert near["verdict"] == "inside" and near["allowed_spreads"] == pytest.approx(2.776 * math.sqrt(2 / 3))
    assert near["spread"] == pytest.approx(math.sqrt((0.01 + 0.07 / 3) / 2))
    assert near["difference_spreads"] == pytest.approx((1.1 - 3.25 / 3) / near["spread"])
    assert compare([2.0, 2.2, 2.1], [1.05, 1.25, 0.95])["verdict"] == "worse"
    assert compare([0.2, 0.3, 0.1], [1.05, 1.25, 0.95])["verdict"] == "better"
    assert compare([math.nan, 1.0], [1.0, 2.0])["verdict"] == "worse"
    assert compare([1.0, 1.0], [1.0, 1.0])["verdict"] == "inside" and compare([2.0], [1.0])["verdict"] is None
    assert compare([2.0, 2.0], [1.0, 1.0])["verdict"] == "worse"


@pytest.mark.parametrize("seeds", T_975)
def test_the_quantiles_are_students(seeds):
    freedom = 2 * seeds - 2
    t = torch.linspace(0, T_975[seeds], 20_001, dtype=torch.float64)
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert 0.5 + torch.trapezoid(density, t).item() == pytest.approx(0.975, abs=2e-5)


def pictures(folder, bad=False):
    for name, shade in (("b/1.png", 10), ("b/2.png", 20), ("a/1.png", 200), ("c/9.png", 90)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), shade).save(folder / name)
    for i in range(200 if bad else 0):
        Image.new("L", (16, 16), i).save(folder / f"c/more{i:03d}.png")
    if bad:
        (folder / "b" / "1.png").write_bytes(b"no picture")


@pytest.mark.parametrize("bad", [False, True])
def test_a_pictures_label_is_its_folder(tmp_path, monkeypatch, bad):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures(tmp_path / "set", bad)
    images = open_images(str(tmp_path / "set"), 16, progress=False)
    labels = labels_of(images)
    assert labels[: 3 if bad else 4].tolist() == ([0, 1, 2] if bad else [0, 1, 1, 2])
    assert len(labels) == len(images.images) and (bad or images.images[0, 0, 0, 0] == 200)


def test_labels_of_digits_and_of_what_has_none(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert labels_of(digits).bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.save(tmp_path / "set.npy", np.zeros((3, 16, 16, 1), np.uint8))
    assert labels_of(open_images(str(tmp_path / "set.npy"), 16, progress=False)) is None
    (tmp_path / "flat").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "flat" / "1.png")
    assert labels_of(open_images(str(tmp_path / "flat"), 16, progress=False)) is None


def test_curves_are_means_over_the_seeds():
    runs = {"a": [[{"step": 1, "loss_d": 1.0}, {"step": 2, "loss_d": 3.0}], [{"step": 1, "loss_d": 2.0}]], "b": [[]]}
    assert overlay.overlaid(runs, "loss_d") == [{"step": 1, "a": 1.5}, {"step": 2, "a": 3.0}]
    html = overlay.render("<title>", runs)
    assert html.count("<figure") == 1 and "D&#x27;s loss" in html and "<script" not in html and "&lt;title&gt;" in html
    assert "No metrics yet." in overlay.render("T", {"a": []})


def test_the_documents_tables_are_those_of_records():
    text = (record.ROOT / "docs" / "quality.md").read_text()
    head = table([]).splitlines()[0]
    shown = [head + block.split("\n\n")[0].rstrip() for block in text.split(head)[1:]]
    known = {table(entry.rows) for entry in records(record.RESULTS)}
    assert shown and all(block in known for block in shown)


def test_the_stage_says_what_time_it_needs(tmp_path):
    rows = []
    bench = Bench(Plan(ARCH, CPU, (4,), (4,)), tmp_path, collect(rows), None)
    quality.quality(bench, 5.0)
    assert [(row["suite"], row["ok"]) for row in rows] == [("quality", None)] and "5 are there" in rows[0]["why"]


def test_the_stage_compares_on_the_digits(tmp_path, monkeypatch, digits):
    rows = []
    monkeypatch.setattr(quality, "STAGE", {"cpu": (4, 1.0)})
    monkeypatch.setattr(quality, "launch", in_process)
    monkeypatch.setattr(quality, "Judge", lambda *_: Judge(digits, CPU, samples=64, epochs=0))
    bench = Bench(Plan(replace(ARCH, channels=3), CPU, (4,), (4,)), tmp_path, collect(rows), None)
    quality.quality(bench, 1000.0)
    assert sum("measure" in row and row["verdict"] is not None for row in rows) == 9
    assert list(tmp_path.iterdir()) == [], "the runs are no part of a record"


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--seeds 0", "--seeds 0"),
        ("--seeds 11", "--seeds 11"),
        ("--steps 3", "--steps 3"),
        ("--minutes 0", "--minutes 0"),
        ("--image-size 20", "--image-size 20"),
        ("--data nowhere", "--data 'nowhere'"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, flags, names):
    monkeypatch.setattr(sys, "argv", ["quality", "--out", str(tmp_path / "out"), *flags.split()])
    assert run_command(quality.command) == 2
    error = capsys.readouterr().err
    assert names in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_command_writes_a_record(studied, monkeypatch, capsys):
    study, _, _ = studied
    flags = "--preset small32 --image-size 16 --steps 4 --seeds 2 --batch-size 64 --device cpu --commit c0ffee"
    monkeypatch.setattr(sys, "argv", ["quality", "--out", str(study.out), *flags.split()])
    monkeypatch.setattr(quality, "Judge", lambda *_: Judge(study.images, CPU, samples=64, epochs=0))
    arch = replace(quality.PRESETS["small32"].arch, nz=8, ngf=4, ndf=4)
    monkeypatch.setitem(quality.PRESETS, "small32", replace(quality.PRESETS["small32"], arch=arch))
    code = run_command(quality.command)
    rows = [json.loads(line) for line in (study.out / "rows.jsonl").read_text().splitlines()]
    assert code == (3 if any(row["ok"] is False for row in rows) else 0)
    assert table(rows) in (study.out / "README.md").read_text() and table(rows) in capsys.readouterr().out
    assert "fused-bf16, 2 runs" in (study.out / "curves.html").read_text()
    environment = json.loads((study.out / "env.json").read_text())
    assert environment["commit"] == "c0ffee" and environment["data"] == "digits" and environment["kernels_hash"]


@pytest.mark.parametrize(
    ("script", "seconds", "expected"),
    [
        ("trap 'echo saved >&2; exit 143' TERM; sleep 9 2>&- & wait", 0.5, (143, "saved")),
        ("echo first >&2; echo last >&2; exit 2", math.inf, (2, "last")),
        ("exit 0", 60.0, (0, "")),
    ],
)
def test_a_child_that_has_no_time_left_is_told_and_saves(tmp_path, monkeypatch, script, seconds, expected):
    (tmp_path / "python").write_text(f"#!/bin/bash\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert quality.launch([], seconds) == expected


@pytest.mark.long
def test_training_that_has_no_time_left_saves(tmp_path):
    flags = "--data digits --image-size 16 --nz 8 --ngf 4 --ndf 4 --device cpu --steps 1000000 --out".split()
    code, said = quality.launch([*flags, str(tmp_path / "run")], 20.0)
    assert code == 143 and "stopped by signal 15" in said
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.long
def test_a_short_study_gives_the_same_figures_twice_and_tells_early_from_late(tmp_path):
    flags = "--preset small32 --image-size 16 --steps 80 --seeds 2 --device cpu".split()
    for name in ("one", "two"):
        command = [sys.executable, "-m", "bench.quality", "--out", str(tmp_path / name), *flags]
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "rows.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in one] == [
        {k: v for k, v in row.items() if k != "seconds"} for row in two
    ]
    early, late = (
        [
            row["patch_distance"]
            for row in one
            if row["name"].startswith("fused") and row["name"].endswith(f"/step{step}")
        ]
        for step in (20, 80)
    )
    assert compare(early, late)["verdict"] == "worse"
