"""Wrong input: one line that names the argument, exit code 2, nothing lost."""

import json
import shutil

import pytest
import torch
from runs import SMALL, run

from dcgan import checkpoint as checkpoints


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--image-size 48", "--image-size 48 is not supported"),
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
        ("--fused --backend eager", "--backend only applies with --fused modules"),
        ("--strict", "--strict only applies with --fused"),
        ("--fused --no-channels-last", "--no-channels-last cannot be combined with --fused"),
        ("--fused --compile", "--compile cannot be combined with --fused"),
        ("--cuda-graph --device cpu", "--cuda-graph needs a CUDA device; this is cpu"),
        ("--fused modules --backend cuda --device cpu", "by cuda: the extension"),
        ("--fused modules --backend triton --device cpu", "need a CUDA device"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_the_driver_does_not_start_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old\n(found version 12020).")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML's count
    monkeypatch.setattr(torch.cuda, "init", init)
    assert run("--device", "cuda") == 2
    said = "error: --device cuda: The NVIDIA driver on your system is too old (found version 12020).\n"
    assert capsys.readouterr().err == said


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
    assert {"architecture": "ngf=8", "data": "differs from the data the run began with"}[what] in said[-1]


def test_fewer_steps_than_done_are_refused_and_config_json_stays(finished, capsys):
    before = (finished / "config.json").read_bytes()
    assert run("--resume", finished, "--steps", 1) == 2
    assert "is already at step 2" in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before
