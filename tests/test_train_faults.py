"""What goes wrong on the way: damaged checkpoints, NaN, full memory, full disks, kills, other processes."""

import errno
import itertools
import shutil
import sys

import pytest
import torch
from runs import EVERY, SMALL, assert_same_run, metrics, run

from dcgan import checkpoint as checkpoints
from dcgan import errors
from dcgan.loop import Loop


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


def sabotage(monkeypatch, when, how):
    """Let `how` spoil what the step returns, or raise, at the calls that `when` says."""
    original, calls = Loop.__init__, itertools.count(1)

    def patched(self, update, *rest):
        original(self, update, *rest)
        run_step = update.run
        update.run = lambda real, z: (how if when(next(calls)) else lambda values: values)(run_step(real, z))

    monkeypatch.setattr(Loop, "__init__", patched)


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


@pytest.mark.parametrize(
    "said", ["Triton Error [CUDA]: an illegal memory access", "CUDA error: unspecified launch failure"]
)
def test_a_device_that_fails_ends_the_run_with_its_last_checkpoint(tmp_path, monkeypatch, capsys, said):
    def fail(values):
        raise RuntimeError(said)

    sabotage(monkeypatch, lambda call: call == 6, fail)
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert "the device failed at step 5" in message and said in message and "step_00000004" in message


def test_out_of_memory_suggests_a_batch_that_may_fit(tmp_path, monkeypatch, capsys):
    sabotage(monkeypatch, lambda call: call == 6, out_of_memory)
    assert run(*SMALL, *EVERY, "--steps", 12, "--out", tmp_path / "r") == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--batch-size 64" in said and "step_00000004" in said
    checkpoints.verify(tmp_path / "r" / "checkpoints" / "step_00000004")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory", True),
        ("Storage size calculation overflowed with sizes=[4611686018427387904]", True),
        ("numel: integer multiplication overflow", True),
        ("value cannot be converted to type at::Half without overflow", False),
    ],
)
def test_what_is_a_lack_of_memory(said, expected):
    assert errors.out_of_memory(RuntimeError(said)) == expected


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
