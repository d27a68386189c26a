"""The main job as a user runs it: train, stop, resume; a resumed run equals an uninterrupted one to the last bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import EVERY, SMALL, assert_equal, assert_same_run, metrics, run

from dcgan import checkpoint as checkpoints
from dcgan import train
from dcgan.signals import StopOnSignal
from dcgan.step import METRICS

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
        assert "Traceback" not in said and "continue with --resume" in said
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
    assert "already has its 2 steps" in capsys.readouterr().err


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


def test_the_metrics_are_the_ones_that_the_design_names(tmp_path):
    assert run(*SMALL, "--steps", 2, "--out", tmp_path / "r") == 0
    line = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[0])
    assert list(line) == ["step", "epoch", *METRICS, "images_per_s", "seconds"]
    assert (tmp_path / "r" / "report.html").stat().st_size > 1000


def test_a_run_goes_on_from_where_its_pictures_are_now(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "here.npy", images)
    small = ["--image-size", "16", "--ngf", "2", "--ndf", "2", "--device", "cpu", "--out", tmp_path / "r"]
    assert run("--data", tmp_path / "here.npy", *small, "--steps", 2) == 0
    (tmp_path / "here.npy").rename(tmp_path / "there.npy")
    assert run("--resume", tmp_path / "r", "--steps", 3) == 2
    assert run("--resume", tmp_path / "r", "--steps", 3, "--data", tmp_path / "there.npy") == 0
    np.save(tmp_path / "other.npy", images[::-1])
    assert run("--resume", tmp_path / "r", "--steps", 4, "--data", tmp_path / "other.npy") == 2
