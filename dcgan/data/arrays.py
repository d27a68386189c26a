"""Pictures that are an array already: .npy and .npz files, and what the idx and CIFAR-10 readers return."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dcgan.data import decode
from dcgan.data.source import Decoding, check_ratio, hash_files, shown
from dcgan.errors import InputError

BLOCK = 256  # pictures converted at a time
ACCEPTED = "uint8, or floating-point in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W), with C = 1, 3 or 4"


class ArraySource:
    """Pictures from an array.

    Args:
        name, where: as in `Source`.
        files: the files whose bytes the array depends on.
        load: returns it: uint8, or floating-point in [0, 1], (N, H, W, C) with C 1, 3 or 4.
    """

    def __init__(self, name: str, where: str, files: list[Path], load: Callable[[], np.ndarray]):
        self.name, self.where, self.files, self.load = name, where, files, load

    def key(self) -> str:
        return hash_files(self.files)

    def decode(self, size: int, channels: int | None) -> Decoding:
        array = self.load()
        channels = channels or array.shape[-1]
        return Decoding(len(array), channels, _blocks(array, size, channels))


def _blocks(array: np.ndarray, size: int, channels: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), BLOCK):
        block = array[start : start + BLOCK]
        if block.dtype != np.uint8:
            block = (block.astype(np.float32) * 255).round().astype(np.uint8)
        if block.shape[1:] != (size, size, channels):
            block = np.stack([_fit(picture, size, channels) for picture in block])
        yield np.ascontiguousarray(block)


def _fit(picture: np.ndarray, size: int, channels: int) -> np.ndarray:
    """One picture, uint8 (H, W, C), cropped and resized to (size, size, channels)."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else np.ascontiguousarray(picture))
    return np.asarray(decode.fit(image, size, channels)).reshape(size, size, channels)


def checked(array: np.ndarray, where: str) -> np.ndarray:
    """Pictures of any accepted dtype and layout, seen as (N, H, W, C); nothing is copied.

    A 4-d array is (N, H, W, C) where its last axis is 1, 3 or 4 long, else (N, C, H, W) where its second is. Floats are
    taken only if all of them lie in [0, 1]: pictures in [-1, 1] or [0, 255] are refused rather than guessed at.

    Raises:
        InputError: it is none of these, or empty.
    """
    got = f"--data {where}: {shown(array.dtype)} of shape {array.shape}"
    if array.ndim == 3:
        array = array[..., None]
    elif array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or (array.dtype != np.uint8 and array.dtype.kind != "f"):
        raise InputError(f"{got}; accepted is {ACCEPTED}")
    if array.size == 0:
        raise InputError(f"{got} holds no pictures; accepted is {ACCEPTED}")
    if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{got} with values from {array.min():.4g} to {array.max():.4g}; accepted is {ACCEPTED}")
    return array


def _headers(archive: zipfile.ZipFile) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of an .npz, from its first bytes."""
    headers = {}
    for member in archive.infolist():
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        headers[member.filename.removesuffix(".npy")] = (shape, dtype)
        if np.prod(shape, dtype=object) * dtype.itemsize > member.file_size:
            raise ValueError(f"{member.filename} of shape {shape} does not fit its {member.file_size} bytes")
    return headers


def _key_of_images(headers: dict[str, tuple[tuple[int, ...], np.dtype]], where: str) -> str:
    if "images" in headers:
        return "images"
    likely = [key for key, (shape, dtype) in headers.items() if dtype == np.uint8 and len(shape) in (3, 4)]
    if len(likely) == 1:
        return likely[0]
    keys = ", ".join(shown(f"{key} {dtype}{shape}") for key, (shape, dtype) in list(headers.items())[:9]) or "nothing"
    raise InputError(
        f"--data {where}: holds {keys}; accepted is a key `images`, or one uint8 array of 3 or 4 dimensions"
    )


def _load(path: Path) -> np.ndarray:
    try:
        if path.suffix.lower() == ".npy":
            return checked(np.load(path, mmap_mode="r", allow_pickle=False), str(path))
        with zipfile.ZipFile(path) as archive:
            key = _key_of_images(_headers(archive), str(path))
            check_ratio(str(path), sum(member.file_size for member in archive.infolist()), path.stat().st_size)
        with np.load(path, allow_pickle=False) as arrays:
            return checked(arrays[key], str(path))
    except InputError:
        raise
    except Exception as error:  # NumPy and zipfile raise a dozen kinds for a damaged or hostile file
        raise InputError(f"--data {path}: not a {path.suffix} file that can be read ({shown(error)})") from error


def open_arrays(path: Path) -> ArraySource:
    """An .npy file, or an .npz: its key `images`, else its only uint8 array of three or four dimensions."""
    return ArraySource(path.name, str(path), [path], lambda: _load(path))
