"""MNIST's idx files. Source: LeCun, Cortes, Burges, "The MNIST database", the section on file formats."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from dcgan.data.arrays import ArraySource
from dcgan.data.source import check_ratio, shown
from dcgan.errors import InputError

NAMES = ("train-images-idx3-ubyte", "train-images.idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-images.idx3-ubyte")
MAGIC = 0x00000803  # unsigned bytes, three dimensions
DEFLATE_RATIO = 1040  # more than deflate can reach: a file that promises as much is cut off


def find(folder: Path) -> Path | None:
    """The file of training images in a folder, or of test images where there is no other."""
    files = [folder / f"{name}{end}" for name in NAMES for end in ("", ".gz")]
    return next((file for file in files if file.is_file()), None)


def _load(path: Path, where: str) -> np.ndarray:
    zipped = path.suffix == ".gz"
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            header = file.read(16)
            magic, *shape = struct.unpack(">4I", header.ljust(16, b"\0"))
            if magic != MAGIC or 0 in shape:
                raise InputError(
                    f"--data {where}: {path.name} begins with {header.hex(' ', 4)}; an idx file of images begins with "
                    f"{MAGIC:08x}, their number, height and width"
                )
            size = shape[0] * shape[1] * shape[2]
            packed = path.stat().st_size
            promised = size <= packed * (DEFLATE_RATIO if zipped else 1)
            if promised:
                check_ratio(where, size, packed)
            pixels = file.read(size + 1) if promised else b""
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"--data {where}: {path.name} cannot be read ({shown(error)}); is the file cut off?"
        ) from error
    if len(pixels) != size:
        raise InputError(
            f"--data {where}: {path.name} promises {shape[0]} pictures of {shape[1]}×{shape[2]} and "
            f"{'has data after them' if len(pixels) > size else 'is cut off'}; give the whole file"
        )
    return np.frombuffer(pixels, np.uint8).reshape(*shape, 1)


def open_idx(path: Path, name: str, where: str) -> ArraySource:
    """The images of one idx file, gzipped or not."""
    return ArraySource(name, where, [path], lambda: _load(path, where))
