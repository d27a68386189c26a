"""The pictures that ship with the package: 1,797 handwritten digits, 8×8. `digits.md` says where they come from."""

from pathlib import Path

import numpy as np

from dcgan.data.arrays import ArraySource

FILE = Path(__file__).with_name("digits.npz")


def _load() -> np.ndarray:
    with np.load(FILE, allow_pickle=False) as arrays:
        pixels = arrays["images"]  # 0 to 16: pixels set in a 4×4 square of the scan
    margin = ((0, 0), (1, 1), (1, 1))  # the scans fill their frame; without it the filter would cut strokes off
    return np.pad(pixels.astype(np.float32) / 16, margin)[..., None]


def open_digits() -> ArraySource:
    """The digits, white on black; a bicubic filter makes smooth strokes of the 8×8 squares."""
    return ArraySource("digits", "digits", [FILE], _load)
