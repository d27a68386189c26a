"""The main job as a user runs it: train, stop, resume, and every way it can go wrong."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcgan import checkpoint as checkpoints
from dcgan import train
from dcgan.errors import run_command
from dcgan.signals import StopOnSignal
from dcgan.step import METRICS

SMALL = "--data digits --image-size 16 --batch-size 128 --nz 8 --ngf 4 --ndf 4 --device cpu".split()
EVERY = "--log-every 2 --sample-every 5 --checkpoint-every 4".split()


def run(*arguments, **options):
    """The command in this process; its exit code."""
    return run_command(lambda: train.main([*map(str, arguments)], **options))


def metrics(folder):
    """The lines of metrics.jsonl without what a clock says."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_s")} for line in lines]


def assert_equal(a, b, where=""):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Weights, optimisers, average, noise, accumulators, metrics and samples: bit for bit."""
    ends = [checkpoints.newest(folder / "checkpoints")[0] for folder in (a, b)]
    for end in ends:
        del end.state["seconds"]
    assert ends[0].step == ends[1].step
    assert_equal(ends[0].models, ends[1].models, "models")
    assert_equal(ends[0].state, ends[1].state, "state")
    assert metrics(a) == metrics(b)
    names = sorted(p.name for p in (a / "samples").iterdir())
    assert names == sorted(p.name for p in (b / "samples").iterdir())
    assert all((a / "samples" / n).read_bytes() == (b / "samples" / n).read_bytes() for n in names)


FORMS = {
    "eager": [],
    "fused": ["--fused", "--flip", "--ema", "0.9"],
    "fused fp32, simultaneous": ["--fused", "--precision", "fp32", "--update", "simultaneous"],
    "fused modules": ["--fused", "modules", "--precision", "fp32"],
    "eager, simultaneous": ["--update", "simultaneous", "--ema", "0.5"],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, form):
    """18 steps cross the end of the first epoch of 15, with its smaller last batch; the first cut is between logs."""
    arguments = [*SMALL, *EVERY, *FORMS[form], "--seed", 3]
    assert run(*arguments, "--steps", 18, "--out", tmp_path / "whole") == 0
    assert run(*arguments, "--steps", 7, "--out", tmp_path / "cut") == 0
    cut_log = metrics(tmp_path / "cut")
    assert run("--resume", tmp_path / "cut", "--steps", 15) == 0
    assert run("--resume", tmp_path / "cut", "--steps", 18) == 0
    assert cut_log[:3] == metrics(tmp_path / "whole")[:3]
    whole, cut = (checkpoints.newest(tmp_path / name / "checkpoints")[0] for name in ("whole", "cut"))
    assert_equal(whole.models, cut.models)
    assert_equal(whole.state["optimizer_g"], cut.state["optimizer_g"])
    assert_equal(whole.state["noise"], cut.state["noise"])


def stop_by_signal(tmp_path, cuts, seed):
    """Run with `cuts` interruptions at random moments, each by another signal; then to the end."""
    rng = random.Random(seed)
    arguments = [*SMALL, *EVERY, "--fused", "--flip", "--ema", "0.9", "--steps", 150]
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    command = [*arguments, "--out", tmp_path / "cut"]
    stopped = 0
    for number in (rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)) for _ in range(cuts)):
        process = start(*command)
        while b"step " not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(number)
        said = process.communicate(timeout=30)[1].decode()
        command = ["--resume", tmp_path / "cut"]
        if process.returncode == 0:  # it was done already
            break
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said and "go on with --resume" in said
        stopped += 1
    assert stopped
    assert run("--resume", tmp_path / "cut", "--log-every", 2) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def start(*arguments):
    command = [sys.executable, "-m", "dcgan.train", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_run_stopped_by_signals_equals_an_uninterrupted_one(tmp_path):
    stop_by_signal(tmp_path, 2, seed=0)


@pytest.mark.long
def test_a_run_stopped_by_signals_equals_an_uninterrupted_one_at_20_points(tmp_path):
    for i in range(10):
        (tmp_path / str(i)).mkdir()
        stop_by_signal(tmp_path / str(i), 2, seed=i + 1)


def test_a_second_signal_stops_at_once():
    child = os.fork()
    if child == 0:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGINT


def test_a_run_leaves_what_the_design_names(tmp_path):
    assert run(*SMALL, *EVERY, "--steps", 10, "--out", tmp_path / "r", "--keep", 2) == 0
    names = {str(p.relative_to(tmp_path / "r")) for p in (tmp_path / "r").rglob("*") if p.is_file()}
    files = ("discriminator.safetensors", "generator.safetensors", "manifest.json", "state.pt")
    assert names == {
        *(".lock", "config.json", "metrics.jsonl", "report.html"),
        *("samples/real.png", "samples/step_00000005.png", "samples/step_00000010.png"),
        *(f"checkpoints/step_{step}/{file}" for step in ("00000008", "00000010") for file in files),
    }
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["batch_size"] == 128 and config["precision"] in ("fp32", "bf16") and config["fused"] is None
    assert [line["step"] for line in metrics(tmp_path / "r")] == [2, 4, 6, 8, 10]
    assert all(0 < line["d_real"] < 1 for line in metrics(tmp_path / "r"))


def test_the_same_seed_gives_the_same_run_and_another_a_different_one(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run(*SMALL, "--steps", 3, "--log-every", 1, "--seed", seed, "--out", tmp_path / name) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert metrics(tmp_path / "a")[0] != metrics(tmp_path / "c")[0]


def test_epochs_count_the_smaller_last_batch(tmp_path):
    assert run(*SMALL, "--epochs", 1, "--out", tmp_path / "r") == 0
    last = metrics(tmp_path / "r")[-1]
    assert (last["step"], last["epoch"]) == (15, 1.0)  # 14 × 128 + 5 = 1,797


def test_a_finished_run_says_so(tmp_path, capsys):
    assert run(*SMALL, "--steps", 2, "--out", tmp_path / "r") == 0
    assert run("--resume", tmp_path / "r") == 0
    assert "has its 2 steps already" in capsys.readouterr().err


# What goes wrong on the way


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, capsys):
    assert run(*SMALL, *EVERY, "--steps", 8, "--out", tmp_path / "whole") == 0
    assert run(*SMALL, *EVERY, "--steps", 8, "--out", tmp_path / "r") == 0
    damaged = tmp_path / "r" / "checkpoints" / "step_00000008" / "generator.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert run("--resume", tmp_path / "r") == 0
    assert "passed over" in (said := capsys.readouterr().err) and "generator.safetensors" in said
    assert_same_run(tmp_path / "whole", tmp_path / "r")


class Sabotage:
    """A step that goes wrong at given calls."""

    def __init__(self, step, when, how):
        self.step, self.when, self.how, self.calls = step, when, how, 0
        self.state_dict, self.load_state_dict = step.state_dict, step.load_state_dict

    def __call__(self, real, z):
        self.calls += 1
        return self.how(self.step(real, z)) if self.when(self.calls) else self.step(real, z)


def sabotage(monkeypatch, when, how):
    from dcgan.trainer import Trainer

    original = Trainer.__init__

    def patched(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.update = Sabotage(self.update, when, how)

    monkeypatch.setattr(Trainer, "__init__", patched)


def test_a_nan_is_rolled_back_and_training_goes_on(tmp_path, monkeypatch, capsys):
    sabotage(monkeypatch, lambda call: call == 6, lambda values: values * float("nan"))
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 0
    said = capsys.readouterr().err
    assert "not finite by step 6" in said and "back from step 6 to 4" in said
    lines = metrics(tmp_path / "r")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert all(line["loss_d"] is not None for line in lines)
    assert checkpoints.newest(tmp_path / "r" / "checkpoints")[0].state["rollbacks"] == 1


def test_a_nan_that_comes_again_and_again_ends_the_run(tmp_path, monkeypatch, capsys):
    sabotage(monkeypatch, lambda call: call > 5, lambda values: values * float("inf"))
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "3 rollbacks" in said and str(tmp_path / "r" / "checkpoints" / "step_00000004") in said


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    from dcgan.trainer import Trainer

    original = Trainer._train

    def poisoned(self, stop, progress):
        if self.rollbacks == 0:
            self.discriminator.main[0].weight.data[0] = float("nan")
            self.config.log_every = 100
        original(self, stop, progress)

    monkeypatch.setattr(Trainer, "_train", poisoned)
    assert run(*SMALL, "--checkpoint-every", 2, "--keep", 9, "--steps", 4, "--out", tmp_path / "r") == 0
    for path in checkpoints.steps(tmp_path / "r" / "checkpoints"):
        for tensors in checkpoints.load(path).models.values():
            assert all(torch.isfinite(t).all() for t in tensors.values())


def out_of_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_suggests_a_batch_that_may_fit(tmp_path, monkeypatch, capsys):
    sabotage(monkeypatch, lambda call: call == 6, out_of_memory)
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size 64" in said and "step_00000004" in said
    checkpoints.verify(tmp_path / "r" / "checkpoints" / "step_00000004")


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_full_at_the_start_is_wrong_input_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "save", full_disk)
    assert run(*SMALL, "--steps", 4, "--out", tmp_path / "r") == 2
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_disk_that_fills_up_later_costs_a_warning(tmp_path, monkeypatch, capsys):
    save, calls = checkpoints.save, []

    def sometimes(*args, **kwargs):
        calls.append(args)
        return full_disk() if len(calls) in (2, 3) else save(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", sometimes)
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 0
    said = capsys.readouterr().err
    assert said.count("not written") == 2 and "training goes on" in said
    assert checkpoints.newest(tmp_path / "r" / "checkpoints")[0].step == 12


def test_a_last_checkpoint_that_cannot_be_written_fails_the_run(tmp_path, monkeypatch, capsys):
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda f, c, k: full_disk() if c.step == 6 else save(f, c, k))
    assert run(*SMALL, *EVERY, "--steps", 6, "--out", tmp_path / "r") == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "step 6 not written" in last and "step_00000004" in last
    assert checkpoints.newest(tmp_path / "r" / "checkpoints")[0].step == 4


def test_room_is_made_for_the_last_checkpoint(tmp_path, monkeypatch):
    """A disk with room for two checkpoints: the older ones go before the newest is given up."""
    save = checkpoints.save

    def small_disk(folder, *rest):
        return full_disk() if len(checkpoints.steps(folder)) >= 2 else save(folder, *rest)

    monkeypatch.setattr(checkpoints, "save", small_disk)
    assert run(*SMALL, *EVERY, "--steps", 6, "--out", tmp_path / "r") == 0
    assert checkpoints.newest(tmp_path / "r" / "checkpoints")[0].step == 6


def test_a_run_whose_newest_checkpoint_was_damaged_keeps_a_good_one(tmp_path, capsys):
    folder = tmp_path / "r" / "checkpoints"
    assert run(*SMALL, "--checkpoint-every", 4, "--steps", 8, "--out", tmp_path / "r") == 0
    (folder / "step_00000008" / "generator.safetensors").write_bytes(b"")
    assert run("--resume", tmp_path / "r", "--keep", 1, "--checkpoint-every", 2) == 0
    assert [p.name for p in checkpoints.steps(folder)] == ["step_00000008"]
    checkpoints.verify(folder / "step_00000008")


@pytest.mark.parametrize("left", ["only the lock", "no checkpoint yet"])
def test_a_run_killed_before_its_first_checkpoint_can_be_begun_or_resumed(tmp_path, left):
    assert run(*SMALL, "--steps", 4, "--out", tmp_path / "whole") == 0
    if left == "only the lock":
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / ".lock").touch()
        (tmp_path / "r" / ".config.json.partial").write_text("{")
        assert run(*SMALL, "--steps", 4, "--out", tmp_path / "r") == 0
    else:
        assert run(*SMALL, "--steps", 4, "--out", tmp_path / "r") == 0
        shutil.rmtree(tmp_path / "r" / "checkpoints")
        assert run("--resume", tmp_path / "r") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "r")


def test_a_directory_that_another_process_begins_is_left_alone(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    claim = checkpoints.lock(tmp_path / "r")
    assert run(*SMALL, "--steps", 4, "--out", tmp_path / "r") == 2
    assert "in use by another process" in capsys.readouterr().err
    assert (tmp_path / "r").exists()
    claim.close()


def test_a_closed_terminal_does_not_end_a_run(tmp_path, monkeypatch):
    class Closed:
        def write(self, _):
            raise BrokenPipeError

        flush = write

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stderr", Closed())
    assert run(*SMALL, *EVERY, "--steps", 4, "--out", tmp_path / "r") == 0
    assert checkpoints.newest(tmp_path / "r" / "checkpoints")[0].step == 4


def test_fewer_steps_than_done_are_refused_and_config_json_stays(finished, capsys):
    before = (finished / "config.json").read_bytes()
    assert run("--resume", finished, "--steps", 1) == 2
    assert "is at step 2 already" in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before


def test_default_intervals_follow_a_longer_run(tmp_path):
    assert run(*SMALL, "--steps", 2, "--out", tmp_path / "r") == 0
    assert run("--resume", tmp_path / "r", "--steps", 4, "--sample-every", 3) == 0
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert (config["log_every"], config["sample_every"]) == (1, 3)
    (tmp_path / "r2").mkdir()
    assert run(*SMALL, "--steps", 2, "--out", tmp_path / "r2") == 0
    config = json.loads((tmp_path / "r2" / "config.json").read_text())
    config["steps"] = 10**5
    flags = {"steps": 10**5 + 1, "device": "cpu"}
    resumed, _ = train.resolve_resumed(flags, tmp_path / "r2")
    assert resumed.log_every == 100 and resumed.checkpoint_every == 1000


# Wrong input: one line that names the argument, exit code 2, nothing lost


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--image-size 48", "--image-size 48 is outside the family"),
        ("--batch-size 5000", "--batch-size 5000 is larger than the data"),
        ("--batch-size 0", "--batch-size"),
        ("--steps none", "--steps"),
        ("--steps 5 --epochs 5", "--epochs"),
        ("--preset huge", "--preset"),
        ("--channels 2", "--channels"),
        ("--ema 1", "--ema"),
        ("--lr 0", "--lr"),
        ("--device tpu", "--device tpu: accepted are cpu"),
        ("--device cuda:99", "--device cuda:99"),
        ("--precision fp16 --device cpu", "--precision fp16 needs a CUDA device"),
        ("--precision tf32 --device cpu", "--precision tf32 needs a CUDA device"),
        ("--data no/such/place", "no/such/place"),
        ("--resume no/such/run", "no/such/run"),
        ("--resume .", "not a run directory"),
        ("--frobnicate", "--frobnicate"),
        ("--fused everything", "--fused"),
        ("--fused --strict", "--backend and --strict are of --fused modules"),
        ("--fused modules --backend cuda", "kernels._C is not built"),
        ("--fused modules --backend triton --device cpu", "need a CUDA device"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "r"
    assert run(*SMALL, "--steps", 2, "--out", folder) == 0
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--resume RUN --seed 1", "--seed cannot be given with --resume"),
        ("--resume RUN --fused", "--fused cannot"),
        ("--resume RUN --out x", "--out cannot"),
        ("--out RUN", "already in use"),
        ("--out RUN/config.json", "already in use"),
        ("--out RUN/config.json/x", "cannot be made"),
    ],
)
def test_a_run_directory_in_use_is_left_as_it_is(finished, capsys, arguments, said):
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run(*arguments.replace("RUN", str(finished)).split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def test_a_run_that_another_process_trains_is_refused(finished, capsys):
    claim = checkpoints.lock(finished)
    assert run("--resume", finished, "--steps", 9) == 2
    assert "in use by another process" in capsys.readouterr().err
    claim.close()


@pytest.mark.parametrize(
    "change",
    [{"nz": 0}, {"batch_size": -1}, {"log_every": 0}, {"lr": float("nan")}, {"fused": "yes"}, {"update": "both"},
     {"precision": "fp8"}, {"seed": "a"}, {"resolved": []}, {"resolved": {}}, {"image_size": 48}, {"flip": 1},
     {"unknown": 1}, {"ema": 0.9}, {"backend": "metal"}, {"data": ""}],
    ids=str,
)  # fmt: skip
def test_a_config_json_edited_to_nonsense_is_one_line(tmp_path, finished, capsys, change):
    shutil.copytree(finished, tmp_path / "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    (tmp_path / "r" / "config.json").write_text(json.dumps(config | change))
    assert run("--resume", tmp_path / "r", "--steps", 9) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


@pytest.mark.parametrize("what", ["architecture", "data"])
def test_a_checkpoint_of_another_architecture_or_other_data_is_refused(tmp_path, capsys, what):
    assert run(*SMALL, "--steps", 2, "--out", tmp_path / "r") == 0
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    if what == "architecture":
        config["ngf"] = 8
    else:
        config["resolved"]["fingerprint"] = "0" * 64
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    assert run("--resume", tmp_path / "r", "--steps", 4) == 2
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert ("ngf=2" if what == "nothing" else {"architecture": "ngf=8", "data": "has changed"}[what]) in said[-1]


def test_the_metrics_are_the_ones_that_the_design_names(finished):
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == ["step", "epoch", *METRICS, "images_per_s", "seconds"]
    assert Path(finished / "report.html").stat().st_size > 1000
