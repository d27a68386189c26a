"""Decoded once, whatever happens meanwhile: faults, other processes, a full disk."""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcgan.data import arrays, cache, open_images, pictures, workers
from dcgan.errors import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where the cache is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "dcgan"


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def spec(tmp_path, images):
    """Forty pictures."""
    (tmp_path / "set").mkdir()
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i:02}.png")
    return str(tmp_path / "set")


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one whenever pictures are decoded."""
    calls, decode = [], workers.decode_in_order
    monkeypatch.setattr(pictures.workers, "decode_in_order", lambda *a: (calls.append(a), decode(*a))[1])
    return calls


def files(folder):
    return sorted(path.suffix for path in folder.iterdir())


def test_a_second_run_does_not_decode(spec, folder, images, decoded):
    first, second = open_images(spec, 16), open_images(spec, 16)
    assert len(decoded) == 1 and files(folder) == [".json", ".npy"]
    for result in (first, second):
        assert isinstance(result.images, np.memmap) and not result.images.flags.writeable
        np.testing.assert_array_equal(result.images, images)
    assert first.fingerprint == second.fingerprint


def test_size_channels_and_content_have_entries_of_their_own(spec, folder, decoded):
    results = [open_images(spec, 16), open_images(spec, 8), open_images(spec, 16, 1)]
    os.utime(f"{spec}/07.png", ns=(0, 1))  # another time, the same pixels
    touched = open_images(spec, 16)
    Image.new("RGB", (16, 16), "red").save(f"{spec}/07.png")
    results.append(open_images(spec, 16))
    os.rename(f"{spec}/07.png", f"{spec}/99.png")  # another order
    results.append(open_images(spec, 16))
    os.remove(f"{spec}/99.png")
    results.append(open_images(spec, 16))
    assert len({result.fingerprint for result in results}) == 6
    assert touched.fingerprint == results[0].fingerprint
    assert len(decoded) == 7 and files(folder) == [".json"] * 7 + [".npy"] * 7


def test_a_resumed_run_that_names_the_channels_finds_them(spec, decoded):
    first = open_images(spec, 16)
    assert open_images(spec, 16, 3).fingerprint == first.fingerprint and len(decoded) == 1
    assert open_images(spec, 16, 4).images.shape[-1] == 4 and len(decoded) == 2


def test_files_are_keyed_by_their_bytes(tmp_path, folder, images):
    """Same name, same size, same time: still another set."""
    for change in (0, 1):
        np.save(tmp_path / "a.npy", images + np.uint8(change))
        os.utime(tmp_path / "a.npy", ns=(0, 0))
        np.testing.assert_array_equal(open_images(str(tmp_path / "a.npy"), 16).images, images + np.uint8(change))


def flip(offset):
    def damage(npy, _):
        content = bytearray(npy.read_bytes())
        content[offset] ^= 1
        npy.write_bytes(content)

    return damage


DAMAGE = {
    "cut": lambda npy, _: os.truncate(npy, npy.stat().st_size - 1),
    "empty": lambda npy, _: os.truncate(npy, 0),
    "gone": lambda npy, _: npy.unlink(),
    "zeros": lambda npy, _: (size := npy.stat().st_size, os.truncate(npy, 128), os.truncate(npy, size)),
    "first byte": flip(128),
    "last byte": flip(-1),
    "header": flip(60),
    "other shape": lambda npy, _: np.save(npy, np.zeros((40, 8, 8, 3), np.uint8)),
    "other type": lambda npy, _: np.save(npy, np.zeros((40, 16, 16, 3), np.int8)),
    "objects": lambda npy, _: np.save(npy, np.array([{}], object), allow_pickle=True),
    "no json": lambda _, known: known.unlink(),
    "empty json": lambda _, known: known.write_text(""),
    "cut json": lambda _, known: known.write_text(known.read_text()[:-5]),
    "another's json": lambda _, known: known.write_text("[1, 2]"),
    "json without a key": lambda _, known: known.write_text(json.dumps({"shape": [40, 16, 16, 3]})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_made_again(spec, folder, images, decoded, damage):
    fingerprint = open_images(spec, 16).fingerprint
    DAMAGE[damage](next(folder.glob("*.npy")), next(folder.glob("*.json")))
    for _ in range(2):
        result = open_images(spec, 16)
        np.testing.assert_array_equal(result.images, images)
        assert result.fingerprint == fingerprint
    assert len(decoded) == 2 and files(folder) == [".json", ".npy"]


def test_an_entry_in_use_may_be_replaced(spec, folder, images):
    used = open_images(spec, 16).images
    next(folder.glob("*.json")).unlink()
    assert open_images(spec, 16).images is not used
    np.testing.assert_array_equal(used, images)


def in_memory(result, images):
    np.testing.assert_array_equal(result.images, images)
    return not isinstance(result.images, np.memmap) and not result.images.flags.writeable


def test_a_cache_that_cannot_be_written_costs_a_warning(spec, folder, images, tmp_path, monkeypatch):
    usual = open_images(spec, 16).fingerprint
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match=r"the cache of decoded pictures cannot be written .*file") as caught:
        result = open_images(spec, 16)
    assert len(caught) == 1 and in_memory(result, images) and result.fingerprint == usual


def test_nobody_has_no_home(spec, images, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("XDG_CACHE_HOME", "relative paths are to be ignored")
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(RuntimeWarning, match="XDG_CACHE_HOME"):
        assert in_memory(open_images(spec, 16), images)


@pytest.mark.parametrize("room", [0, 100, 128, 129, 10_000, 40 * 768 + 127])
def test_a_disk_that_fills_up(spec, folder, images, room, monkeypatch):
    """A limit on the size of files stands in: the same error in the same place, a write that is cut short."""
    monkeypatch.setattr(workers, "BATCH", 7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.warns(RuntimeWarning, match="File too large") as caught:
            result = open_images(spec, 16, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(caught) == 1 and in_memory(result, images) and files(folder) == []
    assert open_images(spec, 16).fingerprint == result.fingerprint


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end(spec, folder, images, call, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left"):
        patch.setattr(cache.os, call, full)
        result = open_images(spec, 16)
    assert in_memory(result, images) and files(folder) == []


def test_what_killed_processes_left_is_swept_up(spec, folder):
    folder.mkdir(parents=True)
    for name, age_s in (("old.part", 90_000), ("old.lock", 90_000), ("young.part", 60)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    open_images(spec, 16)
    assert files(folder) == [".json", ".npy", ".part"]


def test_a_disk_that_cannot_be_read(tmp_path, images, folder, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    np.save(tmp_path / "a.npy", images)
    monkeypatch.setattr(arrays, "hash_files", broken)
    with pytest.raises(InputError, match=r"--data .*a.npy: cannot be read .*Input/output error"):
        open_images(str(tmp_path / "a.npy"), 16)


def test_bad_pictures_leave_nothing(spec, folder):
    Path(spec, "00.png").write_text("text")
    with pytest.raises(InputError, match="1 of 40"):
        open_images(spec, 16)
    assert files(folder) == []


SCRIPT = """
import os, signal, sys, time
from dcgan.data import open_images, workers
workers.SERIAL, workers.BATCH, workers.cores = 0, 4, lambda: 2
def started(self, wait=workers.Worker.wait):
    wait(self)
    print(self.process.pid, flush=True)
workers.Worker.wait = started
ask = workers.Worker.ask
workers.Worker.ask = lambda self, entries: (time.sleep({sleep}), ask(self, entries))[1]
try:
    print(open_images({spec!r}, 16).fingerprint)
except KeyboardInterrupt:
    print("interrupted")
"""


def start(spec, sleep=0.0):
    command = [sys.executable, "-c", SCRIPT.format(spec=spec, sleep=sleep)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_processes_that_want_the_same_set_decode_it_once(spec, folder):
    outputs = [process.communicate(timeout=60) for process in [start(spec, 0.05) for _ in range(3)]]
    assert len({out.split()[-1] for out, _ in outputs}) == 1
    assert sum(err.count("pictures/s") for _, err in outputs) == 1
    assert files(folder) == [".json", ".npy"]


def test_without_the_lock_they_get_the_same(spec, folder, images, monkeypatch):
    """The lock only saves work: here the second process decodes while the first does."""

    def blocks(self, *arguments, blocks=pictures.PictureSource._blocks):
        for i, block in enumerate(blocks(self, *arguments)):
            if i == 0 and not inner:
                monkeypatch.setattr(cache, "lock", lambda *_: contextlib.nullcontext())
                inner.append(None)
                inner.append(open_images(spec, 16))
            yield block

    inner = []
    monkeypatch.setattr(workers, "BATCH", 7)
    monkeypatch.setattr(pictures.PictureSource, "_blocks", blocks)
    outer = open_images(spec, 16)
    for result in (outer, inner[1], open_images(spec, 16)):
        np.testing.assert_array_equal(result.images, images)
    assert files(folder) == [".json", ".npy"]


def gone(pid):
    """Whether a process ends within twenty seconds."""
    for _ in range(400):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[-1][0]
        except OSError:
            return True
        if state == "Z":  # ended; nobody has asked for it yet
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped(spec, folder, images, number):
    """Ctrl-C reaches the whole group of a terminal: one clean interrupt, no worker's traceback, no litter. After the
    others, which leave no time to tidy up, the workers go too, and the next run makes the entry."""
    process = start(spec, 0.2)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    assert process.pid not in map(os.getpgid, pids), "a terminal's Ctrl-C would reach the workers"
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert all(gone(pid) for pid in pids)
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert out == "interrupted\n" and files(folder) == []
    np.testing.assert_array_equal(open_images(spec, 16).images, images)
