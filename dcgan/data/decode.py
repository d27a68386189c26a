"""One picture: read, decoded, cropped to a square, resized. Also the program that a decoding worker runs.

The file stands alone (Pillow and, for 16 bits, NumPy; nothing of this package), so that a worker starts in a tenth of
a second and runs from wherever the package lies. What a worker reads and writes is described at `serve`.
"""

import io
import json
import os
import struct
import sys
import zlib
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no EPS: Pillow would start Ghostscript for it
PIXEL_CAP = 16 * 2**20  # of a picture, by its header: the largest square is 4096 wide
BYTE_CAP = 128 * 2**20  # of a file: 16 megapixels of RGBA in 16 bits
STORED, DEFLATED = 0, 8  # the compression methods of a zip member that are read

Location = str | list[int]
"""Where a picture's bytes are: the path of a file, or a zip member's [offset of its local header, method, packed bytes,
bytes, CRC-32], in bytes."""


def kind(image: Image.Image) -> str:
    """What a picture's header says it is: `alpha`, `grey` or `colour`."""
    if image.has_transparency_data:
        return "alpha"
    return "grey" if image.mode in ("1", "L") or image.mode.startswith("I") else "colour"


def _plain(image: Image.Image) -> Image.Image:
    """The same picture in mode L, LA, RGB or RGBA."""
    if image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is what a 16-bit PGM becomes
        import numpy as np

        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point: 8 and 16 bits are read")
    if image.has_transparency_data:
        return image.convert("LA" if image.mode in ("L", "La") else "RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def fit(image: Image.Image, size: int, channels: int) -> Image.Image:
    """The centre square of a picture, resized with an antialiased bicubic filter.

    The same as resizing the short side to `size` and cropping, without the work outside the square. Where alpha has to
    go, the picture is laid on white.

    Args:
        image: of any mode but floating point.
        size: height and width of the result, in pixels.
        channels: 1 (L), 3 (RGB) or 4 (RGBA).
    """
    image = _plain(image)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    box = (left, top, left + side, top + side)
    if side == size:
        image = image if image.size == (size, size) else image.crop(box)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    if channels != 4 and image.mode in ("LA", "RGBA"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def open_picture(data: bytes) -> Image.Image:
    """A picture's header, checked; no pixel is decoded yet. Raises whatever Pillow raises, or ValueError."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > PIXEL_CAP:
        raise ValueError(f"{width}×{height} pixels: at most {PIXEL_CAP // 2**20} megapixels are decoded")
    return image


def decode(data: bytes, size: int, channels: int) -> bytes:
    """A picture file's bytes → size × size × channels bytes of uint8. Raises as `open_picture` does."""
    image = open_picture(data)
    # A JPEG can be decoded at 1/2, 1/4 or 1/8; twice the size asked for leaves the filter enough to work on.
    image.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))
    image.load()
    return _upright(fit(image, size, channels)).tobytes()


class Reader:
    """Bytes of pictures, from files or from one zip archive that is read in place."""

    def __init__(self, archive: str | None):
        self.archive: BinaryIO | None = open(archive, "rb") if archive else None  # noqa: SIM115  (closed by `close`)

    def close(self) -> None:
        if self.archive:
            self.archive.close()

    def read(self, location: Location) -> bytes:
        if isinstance(location, str):
            with open(location, "rb", buffering=0) as file:
                return file.read()
        offset, method, packed, size, crc = location
        self.archive.seek(offset)
        header = self.archive.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise ValueError("damaged in the archive: no header where the directory says")
        self.archive.seek(
            sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR
        )  # lengths of the name and the extra field
        data = self.archive.read(packed)
        if method == DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size or 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("damaged in the archive: wrong length or CRC")
        return data


def reason(error: Exception) -> str:
    """Why a picture was skipped, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of an accepted format, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).split("\n")[0] or type(error).__name__


def decode_all(reader: Reader, locations: list[Location], size: int, channels: int) -> tuple[list[str], bytes]:
    """Several pictures: for each the reason why it was skipped, "" where it was not; and the pixels of the others."""
    reasons, pixels = [], []
    for location in locations:
        try:
            pixels.append(decode(reader.read(location), size, channels))
            reasons.append("")
        except Exception as error:  # a damaged file can raise nearly anything out of a decoder
            reasons.append(reason(error))
    return reasons, b"".join(pixels)


def serve(requests: BinaryIO, replies: BinaryIO, archive: str | None, size: int, channels: int) -> None:
    """A worker: a line of JSON in, the locations of some pictures; a line of JSON out, their reasons and the number of
    bytes that follow it, the pixels. A first line says that it is ready; the end of the requests is the end of it."""
    reader = Reader(archive)
    replies.write(b"ready\n")
    replies.flush()
    for line in requests:
        reasons, pixels = decode_all(reader, json.loads(line), size, channels)
        replies.write(json.dumps([reasons, len(pixels)]).encode() + b"\n")
        replies.write(pixels)
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, *json.loads(sys.argv[1]))
