"""A folder or a zip archive of pictures, read where it lies."""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dcgan.data import decode, workers
from dcgan.data.source import Decoding, check_ratio, shown
from dcgan.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff")
SUFFIXES += (".ppm", ".pgm", ".pbm", ".pnm")
MEMBER_CAP = 2_000_000  # of an archive: ImageNet has 1.3 million
BAD_PERCENT = 1  # of unreadable pictures; more stop the run


@dataclass
class Listing:
    """What a folder or an archive holds.

    Args:
        pictures: name relative to the root → where the bytes are and what the cache key takes of them.
        refused: "name: reason" of pictures that are not even opened.
    """

    pictures: dict[str, tuple[decode.Location, tuple]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def refuse(self, name: str, reason: str) -> None:
        self.refused.append(f"{shown(name)}: {reason}")


def _is_picture(name: str) -> bool:
    """By the suffix; hidden files are none, nor the Finder's shadows of files (`__MACOSX/._a.jpg`)."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return not hidden and name.lower().endswith(SUFFIXES)


def list_folder(root: Path) -> Listing:
    """All pictures under a folder. Links are followed, and each folder is read once, however many links lead to it.

    Raises:
        InputError: a folder cannot be read.
    """
    listing, seen, waiting = Listing(), set(), [""]
    while waiting:
        prefix = waiting.pop()
        try:
            status = os.stat(root / prefix)
            with os.scandir(root / prefix) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(
                f"--data {root}: the folder {shown(prefix or '.')} cannot be read ({error.strerror})"
            ) from error
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders = []
        for child in children:
            name = prefix + child.name
            try:
                if child.is_dir():
                    folders.append(name + "/")
                elif _is_picture(name) and (child.is_file() or child.is_symlink()):
                    status = child.stat()
                    if status.st_size > decode.BYTE_CAP:
                        listing.refuse(name, f"{status.st_size} bytes: at most {decode.BYTE_CAP} are read")
                    else:
                        listing.pictures[name] = (child.path, (status.st_size, status.st_mtime_ns))
            except OSError as error:  # a broken link, or a link to itself
                listing.refuse(name, error.strerror or str(error))
        waiting += [folder for folder in reversed(folders) if not folder.rsplit("/", 2)[-2].startswith(".")]
    return listing


def _refusal(member: zipfile.ZipInfo, name: str) -> str | None:
    """Why a member is not read; None if it is."""
    if name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
        return "its name leads out of the archive"
    if member.compress_type not in (decode.STORED, decode.DEFLATED):
        return f"compression method {member.compress_type}: stored and deflated members are read"
    if max(member.file_size, member.compress_size) > decode.BYTE_CAP:
        return f"{max(member.file_size, member.compress_size)} bytes: at most {decode.BYTE_CAP} are read"
    return None


def list_zip(path: Path) -> Listing:
    """All pictures in an archive; nothing is extracted.

    Raises:
        InputError: it is no zip archive, it is encrypted, or it unpacks to more than an archive of pictures would.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, EOFError) as error:
        raise InputError(f"--data {path}: not a zip archive that can be read ({shown(error)})") from error
    if len(members) > MEMBER_CAP:
        raise InputError(f"--data {path}: {len(members)} members; an archive may have {MEMBER_CAP}")
    listing = Listing()
    for member in members:
        name = member.filename.replace("\\", "/")
        if member.is_dir() or not _is_picture(name):
            continue
        if member.flag_bits & 0x1:
            raise InputError(f"--data {path}: {shown(name)} is encrypted; give an archive without a password")
        refusal = _refusal(member, name)
        if refusal:
            listing.refuse(name, refusal)
        else:
            size, packed, crc = member.file_size, member.compress_size, member.CRC
            listing.pictures[name] = ([member.header_offset, member.compress_type, packed, size, crc], (size, crc))
    unpacked = sum(key[0] for _, key in listing.pictures.values())
    check_ratio(str(path), unpacked, path.stat().st_size)
    return listing


class PictureSource:
    """The pictures of a folder or of a zip archive, sorted by name.

    Args:
        path: absolute.

    Raises:
        InputError: it cannot be read, or holds no picture.
    """

    def __init__(self, path: Path):
        self.name, self.where = path.name or str(path), str(path)
        self.archive = None if path.is_dir() else str(path)
        listing = list_zip(path) if self.archive else list_folder(path)
        self.pictures = dict(sorted(listing.pictures.items()))
        self.refused = sorted(listing.refused)
        if not self.pictures:
            also = f"; left out: {'; '.join(self.refused[:3])}" if self.refused else ""
            raise InputError(f"--data {path}: no pictures in it (accepted are {' '.join(SUFFIXES)}){also}")

    def key(self) -> str:
        total = hashlib.sha256()
        for name, (_, stamp) in self.pictures.items():
            total.update(repr((name, stamp)).encode())
        total.update("\n".join(self.refused).encode())
        return total.hexdigest()

    def _channels(self) -> int:
        """1 if all pictures are grey, 4 if all have alpha, else 3. Reads headers until one opaque coloured picture, or
        two different pictures, settle it."""
        kinds = set()
        reader = decode.Reader(self.archive)
        for location, _ in self.pictures.values():
            try:
                kinds.add(decode.kind(decode.open_picture(reader.read(location))))
            except Exception:  # decoding will meet it again, and name it
                continue
            if "colour" in kinds or len(kinds) > 1:
                break
        reader.close()
        return {frozenset({"grey"}): 1, frozenset({"alpha"}): 4}.get(frozenset(kinds), 3)

    def decode(self, size: int, channels: int | None) -> Decoding:
        channels = channels or self._channels()
        skipped = list(self.refused)
        blocks = self._blocks(size, channels, skipped)
        return Decoding(len(self.pictures) + len(self.refused), channels, blocks, skipped)

    def _blocks(self, size: int, channels: int, skipped: list[str]) -> Iterator[np.ndarray]:
        names = iter(self.pictures)
        locations = [location for location, _ in self.pictures.values()]
        for reasons, pixels in workers.decode_in_order(locations, self.archive, size, channels):
            skipped += [f"{shown(name)}: {shown(why)}" for why, name in zip(reasons, names, strict=False) if why]
            yield np.frombuffer(pixels, np.uint8).reshape(-1, size, size, channels)
        total = len(locations) + len(self.refused)
        if len(skipped) * 100 > total * BAD_PERCENT:
            raise InputError(
                f"--data {self.where}: {len(skipped)} of {total} pictures cannot be read, more than {BAD_PERCENT} %: "
                f"{'; '.join(skipped[:3])}{'; …' if len(skipped) > 3 else ''}. Remove or repair them"
            )
