"""Pictures for people: images as bytes, several of them in one picture, PNG files.

torchvision has all of this, but no CPU build for the torch we pin; it is small enough to have here.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcgan.errors import InputError

MID_GREY = 128
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def to_uint8(images: Tensor) -> np.ndarray:
    """Images in [-1, 1] as bytes: round((x + 1) · 127.5), clamped to 0 … 255.

    What is not finite becomes mid-grey, 128: a broken generator should look broken, not like white noise.

    Args:
        images: (N, C, H, W), any floating-point dtype, any memory format, on any device. This waits for the device.

    Returns:
        uint8 (N, H, W, C), contiguous, on the host.

    Raises:
        ValueError: another rank, or a dtype that is not floating point.
    """
    if images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"images is {got}: accepted is a floating-point tensor (N, C, H, W)")
    images = images.detach()
    images = images if images.dtype == torch.float64 else images.float()
    levels = images.clamp(-1, 1).add_(1).mul_(127.5).round_()
    levels = torch.where(images.isfinite(), levels, MID_GREY)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid(images_uint8: np.ndarray, columns: int | None = None, padding: int = 2) -> np.ndarray:
    """Several images in one, row by row, with black (transparent, with four channels) between them and none around.

    Args:
        images_uint8: uint8 (N, H, W, C), at least one image.
        columns: images in a row; more than N are taken as N. None: the grid that is as wide as high, or the next wider.
        padding: pixels between neighbours.

    Returns:
        uint8 (height, width, C).

    Raises:
        ValueError: another dtype or rank, no image, `columns` below 1 or `padding` below 0.
    """
    if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or not len(images_uint8):
        got = f"{images_uint8.dtype} of shape {images_uint8.shape}"
        raise ValueError(f"images_uint8 is {got}: accepted is uint8 (N, H, W, C) with at least one image")
    n, height, width, channels = images_uint8.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else min(columns, n)
    if columns < 1 or padding < 0:
        raise ValueError(f"columns is {columns}, padding is {padding}: accepted are columns from 1, padding from 0")
    rows = -(-n // columns)
    pitch_y, pitch_x = height + padding, width + padding
    sheet = np.zeros((rows * pitch_y, columns * pitch_x, channels), np.uint8)
    for i, image in enumerate(images_uint8):
        top, left = i // columns * pitch_y, i % columns * pitch_x
        sheet[top : top + height, left : left + width] = image
    return sheet[: rows * pitch_y - padding, : columns * pitch_x - padding]


def save_png(path: str | Path, array: np.ndarray) -> Path:
    """Write one picture; whoever looks while it is written sees the old file or the new one, never half of one.

    Not flushed to the disk: a picture can be made again, and a training step does not wait for it.

    Args:
        path: where to; its folder is made if need be.
        array: uint8 (H, W) or (H, W, C); C is 1 (grey), 3 (RGB) or 4 (RGBA).

    Raises:
        InputError: a name that does not end in `.png`.
        ValueError: another dtype, rank or C, or a picture without pixels.
        OSError: it cannot be written; nothing is left behind.
    """
    path, array = Path(path), np.asarray(array)
    if path.suffix.lower() != ".png":
        raise InputError(f"path is {str(path)!r}: accepted is a name that ends in .png")
    pixels = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in CHANNELS or not array.size:
        got = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"array is {got}: accepted is uint8 (H, W) or (H, W, C) with C 1, 3 or 4")
    pixels = np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        Image.fromarray(pixels).save(aside, format="PNG")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def save_grid(path: str | Path, images: Tensor | np.ndarray, columns: int | None = None, padding: int = 2) -> Path:
    """`images` in one PNG file: floating point (N, C, H, W) in [-1, 1], or uint8 (N, H, W, C).

    The other arguments and the errors are those of `grid` and `save_png`.
    """
    pixels = to_uint8(images) if isinstance(images, Tensor) else images
    return save_png(path, grid(pixels, columns, padding))
