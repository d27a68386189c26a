"""Pictures to train on: any SPEC in, one array of square uint8 pictures out.

A SPEC is
- `digits`, which ship with the package, or `mnist`, `fashion-mnist`, `cifar10`, which are downloaded (a folder of that
  name: `./mnist`);
- a folder (with all below it) or a .zip of pictures;
- a folder with MNIST's idx files, or one such file, gzipped or not;
- a folder with CIFAR-10's batches in their python or binary form, or its .tar.gz;
- an .npy or .npz file, `uint8` or floating-point in [0, 1] (see `arrays.checked`).
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dcgan.data import arrays, cache, cifar, digits, idx, named, pictures
from dcgan.data.source import Decoding, Source, shown
from dcgan.errors import InputError

NAMES = ("digits", *named.DOWNLOADS)
ACCEPTED = (
    f"accepted are {', '.join(NAMES)}, a folder or .zip of pictures, a folder of MNIST idx files or CIFAR-10 batches, "
    "cifar-10-python.tar.gz, .npy and .npz"
)
SIZES = range(1, 1025)


@dataclass(frozen=True)
class ImageSet:
    """A set of pictures.

    Args:
        images: uint8 (N, H, W, C), C-contiguous, read-only, perhaps memory-mapped; H == W == image_size.
        name: short, for logs: `digits`, the name of a file or folder.
        source: the spec, resolved: an absolute path, or a name.
        fingerprint: sha256 of the shape and the pixels, in hex; the same wherever the pictures lie.
        skipped: "path: reason" of unreadable pictures that were left out.
    """

    images: np.ndarray
    name: str
    source: str
    fingerprint: str
    skipped: tuple[str, ...]


def _open(spec: str, progress: bool) -> Source:
    """The reader of a spec."""
    if spec == "digits":
        return digits.open_digits()
    if spec in named.DOWNLOADS:
        return named.open_named(spec, progress)
    try:
        path = Path(spec).expanduser().absolute() if spec else None
        found = path is not None and path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--data {shown(spec)}: cannot be opened ({shown(error)}); {ACCEPTED}") from error
    if not found:
        raise InputError(f"--data {shown(spec)!r}: no such file or folder; {ACCEPTED}")
    if path.is_dir():
        file, batches = idx.find(path), cifar.find(path)
        if file:
            return idx.open_idx(file, path.name, str(path))
        return cifar.open_folder(batches, str(path)) if batches else pictures.PictureSource(path)
    name = path.name.lower()
    if path.is_file() and name.endswith(".zip"):
        return pictures.PictureSource(path)
    if path.is_file() and name.endswith((".npy", ".npz")):
        return arrays.open_arrays(path)
    if path.is_file() and name.endswith((".tar.gz", ".tgz")):
        return cifar.open_archive(path, path.name, str(path))
    if path.is_file() and "idx3-ubyte" in name:
        return idx.open_idx(path, path.name, str(path))
    raise InputError(f"--data {shown(spec)}: not a set of pictures; {ACCEPTED}")


def _shown_progress(decoding: Decoding, label: str) -> Iterator[np.ndarray]:
    """The blocks, with a bar on a terminal, with a line before and after in a log."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=decoding.count, desc=label, unit=" pictures", unit_scale=True) as bar:
            done = 0
            for block in decoding.blocks:
                done += len(block)
                bar.update(done + len(decoding.skipped) - bar.n)
                yield block
        return
    print(f"{label}: {decoding.count} pictures", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield from decoding.blocks
    seconds = time.perf_counter() - start
    print(f"{label}: {seconds:.1f} s, {decoding.count / seconds:.0f} pictures/s", file=sys.stderr, flush=True)


def _decode(
    source: Source, size: int, channels: int | None, folder: Path | None, key: str, progress: bool
) -> cache.Entry:
    decoding = source.decode(size, channels)
    label = f"decoding {source.name} at {size}×{size}"
    writer = cache.Writer(folder, key, decoding.count, (size, size, decoding.channels))
    blocks = _shown_progress(decoding, label) if progress else decoding.blocks
    with contextlib.closing(decoding.blocks), contextlib.closing(writer), contextlib.closing(blocks):
        for block in blocks:
            writer.append(block)
        return writer.finish(decoding.skipped)


def _cached(source: Source, size: int, channels: int | None, progress: bool) -> cache.Entry:
    try:
        folder = cache.directory()
    except OSError as error:
        cache.warn(error)
        return _decode(source, size, channels, None, "", progress)
    content = source.key()
    key = cache.entry_key(content, size, channels)

    def find() -> cache.Entry | None:
        entry = cache.read(folder, key)
        if (
            entry is None and channels
        ):  # those that followed the data may be the ones now asked for, as in a resumed run
            entry = cache.read(folder, cache.entry_key(content, size, None))
        return entry if entry and channels in (None, entry.images.shape[-1]) else None

    entry = find()
    if entry is None:
        with cache.lock(folder, key):
            entry = find() or _decode(source, size, channels, folder, key, progress)
    return entry


def open_images(spec: str, image_size: int, channels: int | None = None, *, progress: bool = True) -> ImageSet:
    """Open a set of pictures; decode it, unless an earlier run did.

    Args:
        spec: see above.
        image_size: height and width of the result, in pixels: the short side is resized to it, the centre cropped.
        channels: 1, 3 or 4; None follows the data: 1 if all pictures are grey, 4 if all have alpha, else 3.
        progress: whether decoding, and what it skipped, is reported on stderr.

    Raises:
        InputError: the spec leads to nothing, to something else or to more than one unreadable picture in a hundred;
            one line that names the argument and says what is accepted.
    """
    if image_size not in SIZES:
        raise InputError(f"--image-size {image_size}: accepted are {SIZES[0]} to {SIZES[-1]} pixels")
    if channels not in (None, 1, 3, 4):
        raise InputError(f"channels {channels}: accepted are 1, 3 and 4")
    try:
        source = _open(str(spec), progress)
        if source.where == "digits":  # quicker made than looked up
            entry = _decode(source, image_size, channels, None, "", False)
        else:
            entry = _cached(source, image_size, channels, progress)
    except OSError as error:  # no permission, a disk that fails, a file that went away meanwhile
        raise InputError(f"--data {shown(spec)}: cannot be read ({shown(error)})") from error
    if entry.skipped and progress:
        some = "; ".join(entry.skipped[:5]) + ("; …" if len(entry.skipped) > 5 else "")
        total = len(entry.images) + len(entry.skipped)
        print(f"{source.name}: left out {len(entry.skipped)} of {total} pictures: {some}", file=sys.stderr)
    return ImageSet(entry.images, source.name, source.where, entry.fingerprint, entry.skipped)
