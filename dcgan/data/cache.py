"""Decoded once: pictures as one uint8 .npy file that later runs map into memory.

An entry is `<key>.npy` and `<key>.json`, what is known of it; the second, written last, says that the first is whole.
Both are written aside, synced and renamed, so that whoever reads sees all or nothing, and two processes that decode the
same set end with the same files. A lock spares the second one the work, where there are locks; nothing depends on it.
"""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VERSION = 1  # of the decoding and of the entries: another number, other keys
STALE_S = 24 * 3600  # a file written aside and older than this was left by a process that was killed


@dataclass(frozen=True)
class Entry:
    """Decoded pictures.

    Args:
        images: uint8 (N, size, size, channels), C-contiguous, read-only.
        fingerprint: sha256 of their shape and pixels, in hex.
        skipped: "path: reason" of those that could not be read.
    """

    images: np.ndarray
    fingerprint: str
    skipped: tuple[str, ...]


def directory() -> Path:
    """`$XDG_CACHE_HOME/dcgan`, by default `~/.cache/dcgan`. Raises OSError: there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "dcgan"
    except RuntimeError as error:
        raise OSError(f"{error}; set XDG_CACHE_HOME") from error


def warn(error: OSError) -> None:
    """Say that the cache cannot be written, and what follows from it."""
    warnings.warn(
        f"the cache of decoded pictures cannot be written ({error}): they stay in memory for this run",
        RuntimeWarning,
        stacklevel=2,
    )


def entry_key(content: str, size: int, channels: int | None) -> str:
    """The name of an entry: what the pictures depend on."""
    return hashlib.sha256(f"{VERSION} {content} {size} {channels}".encode()).hexdigest()[:40]


def _spots(images: np.ndarray) -> str:
    """sha256 of sixteen spots of 64 KiB from the first byte to the last: finds what a crash, a full disk or a careless
    copy does to a file, in a millisecond."""
    flat = images.reshape(-1)
    total = hashlib.sha256()
    for i in range(16):
        start = max(flat.size - 2**16, 0) * i // 15
        total.update(np.ascontiguousarray(flat[start : start + 2**16]))
    return total.hexdigest()


def read(folder: Path, key: str) -> Entry | None:
    """An entry, or None if there is none that is whole."""
    try:
        known = json.loads((folder / f"{key}.json").read_text())
        images = np.load(folder / f"{key}.npy", mmap_mode="r", allow_pickle=False)
        whole = images.dtype == np.uint8 and list(images.shape) == known["shape"] and _spots(images) == known["spots"]
        return Entry(images, known["fingerprint"], tuple(known["skipped"])) if whole else None
    except Exception:  # whatever is wrong with it, it is decoded again
        return None


def _header(shape: tuple[int, ...]) -> bytes:
    """An .npy header; NumPy pads it so that its length does not depend on the number of pictures."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Writer:
    """Collects decoded blocks in a file, or in memory where no file can be had: no folder, no right, no room.

    Args:
        folder, key: where the entry goes; None keeps the pictures in memory.
        count: pictures at most.
        shape: of one picture.
    """

    def __init__(self, folder: Path | None, key: str, count: int, shape: tuple[int, int, int]):
        self.folder, self.key, self.count, self.shape = folder, key, count, shape
        self.written = 0
        self.total = hashlib.sha256(repr(shape).encode())
        self.file: io.FileIO | None = None
        self.memory: np.ndarray | None = None
        if folder is None:
            self.memory = np.empty((count, *shape), np.uint8)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in (*folder.glob("*.part"), *folder.glob("*.lock")):
                if time.time() - old.stat().st_mtime > STALE_S:
                    old.unlink(missing_ok=True)
            self.file = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", buffering=0, delete=False)  # noqa: SIM115
            self._put(_header((count, *shape)))
        except OSError as error:
            self._to_memory(error)

    def _put(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while data:
            data = data[self.file.write(data) :]

    def _to_memory(self, error: OSError) -> None:
        """Go on without the file; what is in it already is read back."""
        warn(error)
        self.memory = np.empty((self.count, *self.shape), np.uint8)
        rest = memoryview(self.memory[: self.written].reshape(-1))
        if rest:
            self.file.seek(len(_header((self.count, *self.shape))))
        while rest:
            rest = rest[self.file.readinto(rest) :]
        self.close()

    def append(self, block: np.ndarray) -> None:
        """Add pictures, uint8 (n, *shape), C-contiguous."""
        self.total.update(block)
        if self.memory is None:
            try:
                self._put(block.reshape(-1).data)
            except OSError as error:
                self._to_memory(error)
        if self.memory is not None:
            self.memory[self.written : self.written + len(block)] = block
        self.written += len(block)

    def finish(self, skipped: list[str]) -> Entry:
        """The entry, in its place."""
        fingerprint = self.total.hexdigest()
        shape = (self.written, *self.shape)
        if self.memory is None:
            try:
                self.file.seek(0)
                self._put(_header(shape))
                os.fsync(self.file.fileno())
                images = np.load(self.file.name, mmap_mode="r", allow_pickle=False)
                known = {"shape": shape, "spots": _spots(images), "fingerprint": fingerprint, "skipped": skipped}
                self._place(json.dumps(known))
                return Entry(images, fingerprint, tuple(skipped))
            except OSError as error:
                self._to_memory(error)
        images = self.memory[: self.written]
        images.flags.writeable = False
        return Entry(images, fingerprint, tuple(skipped))

    def _place(self, known: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False) as file:
            try:
                file.write(known)
                file.flush()
                os.fsync(file.fileno())
                os.replace(self.file.name, self.folder / f"{self.key}.npy")
                os.replace(file.name, self.folder / f"{self.key}.json")
            finally:  # where all went well, it has another name by now
                with contextlib.suppress(OSError):
                    os.unlink(file.name)

    def close(self) -> None:
        """Leave nothing beside the entry."""
        if self.file is not None:
            self.file.close()
            with contextlib.suppress(OSError):
                os.unlink(self.file.name)


@contextlib.contextmanager
def lock(folder: Path, key: str) -> Iterator[None]:
    """One process at a time decodes a set; the others wait and then find it. If its owner dies, the system frees it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):
            import fcntl  # not on Windows

            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{key}.lock"
            file = stack.enter_context(path.open("w"))
            stack.callback(path.unlink, missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
