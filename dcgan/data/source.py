"""What every format offers: a cheap key of its content, and its pictures at the size that is asked for."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dcgan.errors import InputError

RATIO_CAP = 200  # bytes unpacked over bytes packed; blank bitmaps reach 1,000, pictures 1 to 20
SMALL = 2**30  # bytes that may be unpacked from anything


def check_ratio(where: str, unpacked: int, packed: int) -> None:
    """Refuse, with an InputError, what unpacks to more memory or work than pictures ever do. Sizes in bytes."""
    if unpacked > max(SMALL, RATIO_CAP * packed):
        raise InputError(
            f"--data {where}: unpacks to {unpacked} bytes, more than {RATIO_CAP} times its size; no pictures do"
        )


@dataclass
class Decoding:
    """Pictures on their way.

    Args:
        count: how many there are, the unreadable ones included.
        channels: 1, 3 or 4.
        blocks: uint8 (n, size, size, channels), C-contiguous, in order; drawn once.
        skipped: "path: reason" of unreadable pictures; complete when `blocks` is exhausted.
    """

    count: int
    channels: int
    blocks: Iterator[np.ndarray]
    skipped: list[str] = field(default_factory=list)


class Source(Protocol):
    """A set of pictures: `name` for logs, `where` it is (absolute path or name)."""

    name: str
    where: str

    def key(self) -> str:
        """What the decoded pictures depend on, cheap to find out; no picture is decoded."""

    def decode(self, size: int, channels: int | None) -> Decoding:
        """All pictures at size × size pixels; `channels` None follows the data."""


def hash_files(files: Iterable[Path]) -> str:
    """One sha256 over the bytes of several files, in hex."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def shown(text: object) -> str:
    """A file's name or a reason as it may be printed: control characters escaped, one line, at most 200 characters."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return line if len(line) <= 200 else line[:120] + "…" + line[-79:]
