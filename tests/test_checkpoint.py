"""Checkpoints survive kills, full disks, flipped bits and hostile files."""

import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from dcgan import checkpoint as checkpoints
from dcgan.arch import Arch
from dcgan.checkpoint import Checkpoint, CheckpointError
from dcgan.model import Discriminator, Generator
from dcgan.step import adam

ARCH = Arch(image_size=16, channels=1, nz=3, ngf=2, ndf=2)


def make(step=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    models = {
        "generator": Generator(ARCH, generator).state_dict(),
        "discriminator": Discriminator(ARCH, generator).state_dict(),
    }
    state = {"noise": torch.arange(5, dtype=torch.uint8), "seconds": 1.5, "names": ["a"], "none": None}
    return Checkpoint(step, ARCH, models, state)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_saved_is_what_loads(tmp_path):
    saved = make(step=7)
    path = checkpoints.save(tmp_path, saved)
    assert path.name == "step_00000007"
    assert sorted(p.name for p in path.iterdir()) == [
        "discriminator.safetensors",
        "generator.safetensors",
        "manifest.json",
        "state.pt",
    ]
    loaded = checkpoints.load(path)
    assert (loaded.step, loaded.arch) == (7, ARCH)
    assert all(same(loaded.models[name], saved.models[name]) for name in saved.models)
    assert torch.equal(loaded.state.pop("noise"), saved.state.pop("noise")) and loaded.state == saved.state


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    for step in (1, 2, 9, 10):
        checkpoints.save(tmp_path, make(step), keep=2)
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step_00000009", "step_00000010"]
    assert checkpoints.newest(tmp_path)[0].step == 10


def test_pruning_never_takes_the_checkpoint_just_written(tmp_path):
    """A newer one, damaged and passed over, is no reason to lose a good one."""
    for step in (1, 2, 9):
        checkpoints.save(tmp_path, make(step))
    checkpoints.save(tmp_path, make(5), keep=1)
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step_00000005", "step_00000009"]
    checkpoints.abandon_after(tmp_path, 5)
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step_00000005"]


def flip_and_check(folder, flips, rng):
    files = sorted(folder.iterdir())
    for _ in range(flips):
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        bit = rng.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        whole = path.read_bytes()
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoints.verify(folder)
        path.write_bytes(whole)
    checkpoints.verify(folder)


def test_every_flipped_bit_is_found(tmp_path):
    flip_and_check(checkpoints.save(tmp_path, make()), 100, random.Random(0))


@pytest.mark.long
def test_every_flipped_bit_is_found_400_times(tmp_path):
    flip_and_check(checkpoints.save(tmp_path, make()), 400, random.Random(1))


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign format", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    checkpoints.save(tmp_path, make(1))
    last = checkpoints.save(tmp_path, make(2))
    target = last / "generator.safetensors"
    if damage == "truncate":
        os.truncate(target, 100)
    elif damage == "remove":
        target.unlink()
    elif damage == "foreign format":
        manifest = json.loads((last / "manifest.json").read_text())
        del manifest["sha256"]
        (last / "manifest.json").write_text(checkpoints._seal({**manifest, "format": 99}))
    else:
        (last / "manifest.json").unlink()
    loaded, rejected = checkpoints.newest(tmp_path)
    assert loaded.step == 1
    assert len(rejected) == 1 and str(last) in rejected[0]
    checkpoints.save(tmp_path, make(2))  # the run reaches that step again
    assert checkpoints.newest(tmp_path)[0].step == 2


def test_no_checkpoint_at_all_says_what_is_wrong_with_each(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoints.newest(tmp_path)
    (checkpoints.save(tmp_path, make(3)) / "state.pt").unlink()
    with pytest.raises(CheckpointError, match=r"step_00000003: state\.pt"):
        checkpoints.newest(tmp_path)


class Payload:
    """Pickles into a call that creates a file."""

    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (str(self.sentinel), "w"))


def test_a_malicious_state_never_executes(tmp_path):
    """Its hashes are right, as an attacker's would be."""
    sentinel = tmp_path / "executed"
    path = checkpoints.save(tmp_path, make())
    for write in (lambda f: torch.save({"a": Payload(sentinel)}, f), lambda f: pickle.dump(Payload(sentinel), f)):
        with open(path / "state.pt", "wb") as file:
            write(file)
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["sha256"]
        manifest["files"]["state.pt"] = checkpoints._sha256(path / "state.pt")
        (path / "manifest.json").write_text(checkpoints._seal(manifest))
        checkpoints.verify(path)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)
        assert not sentinel.exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_litter(tmp_path):
    checkpoints.save(tmp_path, make(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError):
            checkpoints.save(tmp_path, make(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert checkpoints.newest(tmp_path)[0].step == 1


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import checkpoints, make
print("ready", flush=True)
step = 2
while True:
    checkpoints.save(Path(sys.argv[1]), make(step), keep=2)
    step += 1
"""


def kill_while_saving(folder, kills):
    """Kill a process that does nothing but save, at random moments; some checkpoint must load each time."""
    rng = random.Random(0)
    checkpoints.save(folder, make(1))
    here = os.path.dirname(__file__)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SAVER, folder, here], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        checkpoints.newest(folder)
        checkpoints.remove_partial(folder)
        assert not list(folder.glob(".*"))


@pytest.mark.long
def test_a_kill_while_saving_never_loses_the_last_checkpoint_200_times(tmp_path):
    kill_while_saving(tmp_path, 200)


def fork_and_kill(folder, kills):
    """As above by fork alone, which needs no new interpreter: fast enough for every run of the tests."""
    rng = random.Random(0)
    checkpoints.save(folder, make(1))
    for i in range(kills):
        child = os.fork()
        if child == 0:
            step = 2 + 100 * i
            while True:
                checkpoints.save(folder, make(step), keep=2)
                step += 1
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        checkpoints.newest(folder)
        checkpoints.remove_partial(folder)


def test_a_kill_while_saving_never_loses_the_last_checkpoint(tmp_path):
    fork_and_kill(tmp_path, 20)
    assert checkpoints.newest(tmp_path)[0].step > 1


@pytest.mark.parametrize("fused", [False, True])
def test_adam_goes_on_bit_for_bit_whichever_implementation_saved_it(fused):
    """Also across implementations: the moments saved by one load into the other."""

    def steps(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

    images = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model = Discriminator(ARCH, torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    optimizer = adam(model, fused=fused)
    steps(model, optimizer, 3)
    resumed = Discriminator(ARCH).to(memory_format=torch.channels_last)
    resumed.load_state_dict(model.state_dict())
    saved = checkpoints.optimizer_state(model, optimizer)
    for other in (fused, not fused):
        optimizer_resumed = adam(resumed, fused=other)
        checkpoints.load_optimizer_state(resumed, optimizer_resumed, saved)
        assert same_state(checkpoints.optimizer_state(resumed, optimizer_resumed), saved)
    optimizer_resumed = adam(resumed, fused=fused)
    checkpoints.load_optimizer_state(resumed, optimizer_resumed, saved)
    steps(model, optimizer, 2)
    steps(resumed, optimizer_resumed, 2)
    assert same(resumed.state_dict(), model.state_dict())


def same_state(a, b):
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_a_run_directory_is_claimed_once(tmp_path):
    claim = checkpoints.lock(tmp_path)
    with pytest.raises(BlockingIOError):
        checkpoints.lock(tmp_path)
    claim.close()
    checkpoints.lock(tmp_path).close()
