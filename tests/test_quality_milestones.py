"""A milestone of the comparison of samples: which checkpoints stand for it, that none is lost, and their mean."""

import contextlib
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from bench import quality
from bench.samples.judge import MEASURES, compare
from bench.samples.study import VARIANTS, Study
from dcgan import checkpoint, train
from dcgan.arch import Arch
from dcgan.data import open_images
from dcgan.errors import InputError, run_command
from dcgan.loop import Loop

ARCH, CPU = Arch(image_size=16, channels=1, nz=8, ngf=4, ndf=4), torch.device("cpu")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Of one run of 20 steps, a checkpoint each."""
    monkeypatch.setattr(quality, "VARIANTS", {"fused-bf16": VARIANTS["fused-bf16"]})
    return Study(open_images("digits", 16, progress=False), ARCH, tmp_path, 20, 1, 64, CPU)


def in_process(arguments, seconds):
    return run_command(lambda: train.main(arguments)), "said"


def collect(rows):
    return lambda suite, name, ok, why=None, **figures: rows.append({"name": name, "ok": ok, "why": why, **figures})


@pytest.mark.parametrize(
    ("steps", "windows"),
    [
        (4, [[1], [2], [3, 4]]),
        (20, [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [16, 17, 18, 19, 20]]),
        (1200, [[252, 264, 276, 288, 300], [552, 564, 576, 588, 600], [1152, 1164, 1176, 1188, 1200]]),
        (1250, [[264, 276, 288, 300, 312], [576, 588, 600, 612, 624], [1212, 1224, 1236, 1248, 1250]]),
    ],
)
def test_a_milestone_is_the_last_checkpoints_that_training_leaves(study, steps, windows):
    study = replace(study, steps=steps)
    assert [study.window(milestone) for milestone in study.milestones] == windows


def test_a_run_keeps_few_checkpoints_and_the_generators_of_its_milestones(study, monkeypatch):
    monkeypatch.setattr(quality, "launch", in_process)
    quality.train(study, lambda *_, **__: pytest.fail("nothing to say"), math.inf)
    run = study.run("fused-bf16", 0)
    left = checkpoint.steps(run / "checkpoints")
    assert [checkpoint.step_of(path) for path in left] == [16, 17, 18, 19, 20]
    kept = sorted(path.name for path in (run / "judged").iterdir())
    assert kept == [f"step_{step:08d}.safetensors" for step in (*range(1, 11), *range(16, 21))]
    assert study.kept("fused-bf16", 0, 20).read_bytes() == (left[-1] / "generator.safetensors").read_bytes()


def test_a_run_with_other_checkpoints_is_refused(study, monkeypatch):
    """As one of a version that kept a checkpoint a milestone."""
    arguments = study.arguments("fused-bf16", 0, 20)
    arguments[arguments.index("--checkpoint-every") + 1] = "5"
    assert in_process(arguments, math.inf)[0] == 0
    with pytest.raises(InputError, match="fused-bf16-seed0 was trained with checkpoint_every 5; give another folder"):
        study.check("fused-bf16", 0)


def stopped_at(steps, alone):
    """A `launch` whose training is told to stop after each of these steps, and that does not return from some."""
    pending, call = list(steps), Loop.__call__

    def stop(loop, step, course):
        n = call(loop, step, course)
        if pending and step + 1 == pending[0]:
            pending.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return n

    def launch(arguments, seconds):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "__call__", stop)
            code = in_process(arguments, seconds)
        if code[0] and len(steps) - len(pending) in alone:
            raise KeyboardInterrupt
        return code

    return launch


def test_a_study_cut_off_within_a_window_goes_on_to_the_same_generators(study, tmp_path, monkeypatch):
    """At odd steps, whose checkpoints are in no window and push out those that are; twice the study is killed too."""
    monkeypatch.setattr(Study, "every", 2)
    bytes_of, rows = {}, []
    for name, cuts in (("whole", []), ("cut", [5, 7, 9, 11, 21])):
        study = replace(study, out=tmp_path / name, steps=48)
        monkeypatch.setattr(quality, "launch", stopped_at(cuts, alone=(2, 3)))
        for _ in range(1 + len(cuts)):
            with contextlib.suppress(KeyboardInterrupt):
                quality.train(study, collect(rows), math.inf)
        windows = {step for milestone in study.milestones for step in study.window(milestone)}
        assert windows == {4, 6, 8, 10, 12, 16, 18, 20, 22, 24, 40, 42, 44, 46, 48}
        bytes_of[name] = {step: study.kept("fused-bf16", 0, step).read_bytes() for step in windows}
        study.check("fused-bf16", 0)
    assert [row["why"] for row in rows] == 3 * ["not finished within the time"]
    assert bytes_of["cut"] == bytes_of["whole"] and len(set(bytes_of["whole"].values())) == 15


@pytest.mark.parametrize("damaged", [5, 4])
def test_a_damaged_checkpoint_is_not_judged(study, monkeypatch, damaged):
    """The milestone's own is trained again from the one before it; one within a window asks for another run."""
    run, rows = study.run("fused-bf16", 0), []

    def launch(arguments, seconds):
        code = in_process(arguments, seconds)
        path = run / "checkpoints" / f"step_{damaged:08d}" / "generator.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        return code

    monkeypatch.setattr(quality, "launch", launch)
    quality.train(study, collect(rows), math.inf)
    monkeypatch.setattr(quality, "launch", in_process)
    quality.train(study, collect(rows), math.inf)
    said = [(row["ok"], row["why"].split(":")[0]) for row in rows]
    assert said == (1 if damaged == 5 else 2) * [(False, f"no whole checkpoint after step {damaged}")]
    assert study.missing("fused-bf16", 0, 5) == ([] if damaged == 5 else [4])
    assert bool(study.missing("fused-bf16", 0, 20)) is (damaged == 4)


@pytest.mark.parametrize(("strays", "verdict"), [((300,), "inside"), (range(252, 301), "worse")])
def test_one_bad_moment_of_its_runs_does_not_make_a_variant_worse(study, monkeypatch, strays, verdict):
    """By one checkpoint a run fused is beyond the seeds' spread; by the means only where all its checkpoints are."""
    study, rows = replace(study, steps=1200, seeds=6), []
    monkeypatch.setattr(quality, "VARIANTS", VARIANTS)
    monkeypatch.setattr(Study, "missing", lambda study, variant, seed, milestone: [0] if milestone > 300 else [])
    monkeypatch.setattr(quality, "load", lambda path, device: path)
    monkeypatch.setattr(quality, "sample", lambda path, n, seed: [torch.zeros(0)])
    seen = []

    def kept(study, variant, seed, step):
        seen.append((variant, seed, step))
        return study.out

    class Stub:
        real, accuracy, labelled = torch.zeros(1), 1.0, True

        def halves(self):
            return {}

        def __call__(self, fake):
            variant, seed, step = seen[-1]
            value = 0.08 + 0.005 * seed + 0.06 * (variant == "fused-bf16" and step in strays)
            return dict.fromkeys(MEASURES, value)

    monkeypatch.setattr(Study, "kept", kept)
    quality.measure(study, collect(rows), Stub())
    names = {row["name"]: row for row in rows}
    single = [[names[f"{v}-seed{s}/checkpoint300"]["frechet"] for s in range(6)] for v in ("fused-bf16", "eager-fp32")]
    assert compare(*single)["verdict"] == "worse"
    row = names["frechet/step300"]
    assert row["verdict"] == verdict and row["ok"] is (verdict == "inside")
    assert row["spread"] == pytest.approx(compare(*single)["spread"]), "of the runs, not of their checkpoints"
    assert names["frechet/step600"]["why"] == "0 + 0 runs got there"
