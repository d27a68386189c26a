"""Tiles: what one program owns, and which tile a layer gets if nothing has been tuned. No Triton and no torch here.

The defaults follow three rules, in this order: a tile as large as the registers allow, since a program loads
(rows + columns) × depth to do rows × columns × depth multiplications; enough tiles that every SM has one; all of it in
shared memory as many times as there are stages. Measured choices belong in the tuned table, which overrides these.
"""

from dataclasses import dataclass

SHARED_LIMIT_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory a program may have, by compute capability. Source: CUDA programming guide, technical specifications."""

SMS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}
"""Streaming multiprocessors of the largest chip sold of each capability (A100, A40, L40, H100/H200, B200)."""

FLAT_CHANNELS = 16
"""Below this, `conv` and `wgrad` put all taps and channels of the high-resolution side in one row."""

WGRAD_TILES = ((128, 128, 1), (128, 128, 2), (128, 256, 1), (128, 64, 1), (128, 64, 2), (128, 64, 4))
"""Rows, columns and taps of a 16-bit weight gradient's tiles on TMA; none spills (`bench.resources`)."""

IMAGE_CHANNELS = 4
"""With up to this many output channels `conv_transpose` is onto an image, which has a kernel of its own."""

PHASES = {"conv": 1, "conv_transpose": 4}


@dataclass(frozen=True)
class ConvConfig:
    """The tile of a convolution or of one phase of a transposed convolution; every size a power of two.

    Args:
        images, height, width: the box of output pixels; their product is the tile's rows, M.
        columns: output channels, N.
        depth: channels of one tap multiplied at a time, K.
        warps, stages: of the program, and of its software pipeline.
        tma: operands by TMA boxes (sm_90 on), or by masked pointer loads (sm_80 on).
    """

    images: int
    height: int
    width: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool

    @property
    def rows(self) -> int:
        return self.images * self.height * self.width


@dataclass(frozen=True)
class WgradConfig:
    """The tile of a weight gradient: `rows` channels of the low-resolution side by `columns` of the high one, for each
    of `taps` (1, 2 or 4) side by side; the box of pixels is the reduction's step, and `split` programs share one tile's
    pixels."""

    images: int
    height: int
    width: int
    rows: int
    columns: int
    split: int
    warps: int
    stages: int
    tma: bool
    taps: int = 1

    @property
    def depth(self) -> int:
        return self.images * self.height * self.width


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (n ≥ 1)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def pixel_box(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """A box of `pixels` (images, height, width), as square as a power of two lets it be, no wider than the picture."""
    w = min(power_of_two(width), 16, pixels)
    h = min(power_of_two(height), pixels // w)
    return pixels // (w * h), h, w


def boxes(box: tuple[int, int, int], images: int, height: int, width: int) -> int:
    """How many boxes cover `images` pictures."""
    return cdiv(images, box[0]) * cdiv(height, box[1]) * cdiv(width, box[2])


def tma_fits(channels: tuple[int, ...], itemsize: int) -> bool:
    """TMA's strides are multiples of 16 bytes. Source: CUDA driver API, cuTensorMapEncodeTiled."""
    return all(c * itemsize % 16 == 0 for c in channels)


def conv_config(
    kind: str, images: int, groups: int, height: int, width: int, channels: tuple[int, int], itemsize: int, arch: int,
    tensor_cores: bool = True,
) -> ConvConfig:  # fmt: skip
    """The default tile.

    Args:
        kind: `conv` or `conv_transpose`.
        images: of one group.
        groups: batch-norm groups; a tile never spans two.
        height, width: of the low-resolution side.
        channels: of the input and of the output.
        itemsize: bytes of an element.
        arch: compute capability, 80 for 8.0.
        tensor_cores: False for ieee float32 products, which are made of scalar multiplications.
    """
    into, out = channels
    flat = kind == "conv" and into < FLAT_CHANNELS
    depth = min(128 // itemsize, power_of_two(16 * into) if flat else max(16, power_of_two(into)))
    tma = tensor_cores and arch >= 90 and tma_fits(channels, itemsize)
    tma = tma and (kind == "conv_transpose" or into % depth == 0)
    if tma and itemsize == 2:
        shapes = [
            (128, 256, 8, 4),
            (256, 128, 8, 4),
            (128, 128, 8, 4),
            (256, 64, 8, 4),
            (128, 64, 8, 4),
            (64, 64, 4, 4),
        ]
        shapes.append((64, 32, 4, 4))
    else:  # four warps: flattened loops over pointers have miscompiled at eight (triton#189660, pytorch#173068)
        shapes = [(128, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 3)][itemsize // 4 :]
        depth = min(depth, 64 if flat and itemsize == 2 else 32 if tensor_cores else 16)
    narrow = max(16, power_of_two(out))
    fitting = [shape for shape in shapes if shape[1] <= narrow] or [(128, narrow, 4, shapes[-1][3])]
    for rows, columns, warps, stages in fitting:  # noqa: B007 (used after the loop)
        box = pixel_box(rows, height, width)
        tiles = groups * boxes(box, images, height, width) * PHASES[kind] * cdiv(out, columns)
        if tiles >= 0.9 * SMS[arch]:
            break
    return ConvConfig(*box, columns, depth, warps, stages, tma)


def inner(size: int, box: int) -> int:
    """How many pixels along a box's side have their neighbours in it: all if it spans the picture, else all but two."""
    return box if size <= box else box - 2


def image_box(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """The box of `pixels` that reads the fewest of them twice for its rims; whole pictures where some fit."""
    sides = [1 << e for e in range(pixels.bit_length()) if 1 << e <= max(4, power_of_two(max(height, width)))]
    found = [
        (cdiv(height, inner(height, h)) * h * cdiv(width, inner(width, w)) * w, -w, pixels // (h * w), h)
        for h in sides
        for w in sides
        if h * w <= pixels and inner(height, h) > 0 and inner(width, w) > 0
    ]
    _, w, images, h = min(found)
    return images, h, -w


def image_config(height: int, width: int, into: int, itemsize: int, arch: int, tensor_cores: bool = True) -> ConvConfig:
    """The default tile of a transposed convolution onto an image, from `into` channels; arguments as above."""
    depth = min(128 // itemsize if tensor_cores else 16, max(16, power_of_two(into)))
    tma = tensor_cores and arch >= 90 and tma_fits((into,), itemsize)
    pixels, warps = (256, 8) if tensor_cores else (128, 4)
    stages = 3 if SHARED_LIMIT_BYTES[arch] > 128 << 10 else 2  # with a prologue three take up to 113 KB
    return ConvConfig(*image_box(pixels, height, width), 16, depth, warps, stages, tma)


def wgrad_config(
    images: int, height: int, width: int, low: int, high: int, itemsize: int, arch: int, tensor_cores: bool = True
) -> WgradConfig:
    """The default tile of a weight gradient, the one that moves least; arguments as above, `images` being all."""
    tma = tensor_cores and arch >= 90 and tma_fits((low, high), itemsize)
    flat = not tma and high < FLAT_CHANNELS
    if tma and itemsize == 2:
        shapes, depth, warps, stages = WGRAD_TILES, 64, 8, 4
    else:
        shapes, depth, warps, stages = ((64, 64, 1),), 32 if tensor_cores else 16, 4, 4  # at 3 ptxas spills on sm_80
    box = pixel_box(depth, height, width)
    steps = boxes(box, images, height, width)
    found = []
    for most_rows, most_columns, taps in shapes:
        rows = min(most_rows, max(16, power_of_two(low)))
        columns = min(most_columns, max(16, power_of_two(16 * high if flat else high)))
        tiles = cdiv(low, rows) * (cdiv(16 * high, columns) if flat else 16 // taps * cdiv(high, columns))
        split = max(1, min(SMS[arch] // tiles, steps // 4))
        loaded = tiles * steps * depth * (rows + columns * taps) * itemsize
        shares = 3 * split * low * 16 * high * 4 if split > 1 else 0  # written, written back, read
        idle = cdiv(tiles * split, SMS[arch]) * SMS[arch] / (tiles * split)
        found.append((loaded * idle + shares, WgradConfig(*box, rows, columns, split, warps, stages, tma, taps)))
    return min(found, key=lambda pair: pair[0])[1]
