"""Which tiles a search tries for a product: rules that respect shared memory and registers. Nothing is compiled here.

A tile of rows × columns keeps rows·columns / (32·warps) accumulators in each thread's registers, of which there are
255; it loads (rows + columns) · depth elements per step into each stage's shared memory. The rules keep the former from
`FEWEST` to `MOST` and the latter within the device's limit, and leave out tiles that are mostly empty.
"""

from itertools import product

from bench.subjects.accuracy import DTYPES
from bench.subjects.problems import Problem
from kernels._triton.config import (
    FLAT_CHANNELS,
    IMAGE_CHANNELS,
    PHASES,
    SHARED_LIMIT_BYTES,
    SMS,
    ConvConfig,
    WgradConfig,
    boxes,
    cdiv,
    conv_config,
    image_box,
    image_config,
    inner,
    pixel_box,
    power_of_two,
    tma_fits,
    wgrad_config,
)

FEWEST, MOST = 8, 128
"""Accumulators of a thread: fewer leave the tensor cores waiting, more leave no registers for the loop."""

LOAD = 132
"""Multiplications in the time of loading one 16-bit operand from the second-level cache: 790 TFLOP/s (design notes)
against about 6 TB/s. It orders the candidates and decides nothing."""

IMAGE_COLUMNS = 64
"""Of the tile that is onto an image, whatever its configuration says."""

FEW_POINTERS = 4
"""Tiles that load by pointers, where TMA can load too."""

VARIANTS = 6
"""Of one tile shape, by depth, warps and stages; so that several shapes are tried."""

Config = ConvConfig | WgradConfig


def candidates(problem: Problem, arch: int, most: int = 36) -> list[Config]:
    """Up to `most` tiles to try: the launcher's own default, then the likely best by the model."""
    own = default(problem, arch)
    found = wgrad_tiles(problem, arch) if problem.kernel == "wgrad" else conv_tiles(problem, arch)
    likely: dict[bool, list[Config]] = {True: [], False: []}
    shapes: dict[tuple[int, int, bool], int] = {}
    for config in sorted(found, key=lambda c: (expected(problem, c, arch), abs(c.stages - 4))):
        shape = (config.rows, config.columns * getattr(config, "taps", 1), config.tma)
        shapes[shape] = shapes.get(shape, 0) + 1
        if config != own and shapes[shape] <= VARIANTS:
            likely[config.tma].append(config)
    few = FEW_POINTERS if likely[True] else most
    return [own, *likely[True][: most - 1 - min(few, len(likely[False]))], *likely[False][:few]][:most]


def expected(problem: Problem, c: Config, arch: int) -> float:
    """A time for comparison: waves of tiles, each at the slower of its multiplications and its loads."""
    p = problem
    if isinstance(c, WgradConfig):
        flat = not c.tma and p.out < FLAT_CHANNELS
        across = cdiv(16 * p.out, c.columns) if flat else 16 // c.taps * cdiv(p.out, c.columns)
        tiles, wide = c.split * cdiv(p.into, c.rows) * across, c.columns * c.taps
        length = boxes((c.images, c.height, c.width), p.images, p.low, p.low) * c.depth / c.split
    else:
        tiles, wide = conv_programs(p, (c.images, c.height, c.width), c.columns), c.columns
        length = p.into * (1 if is_image(p) else 16 // PHASES[p.kernel])
    waves = cdiv(tiles, SMS[arch])
    return waves * length * max(c.rows * wide, LOAD * (c.rows + wide))


def default(problem: Problem, arch: int) -> Config:
    """What the launcher takes where nothing is tuned."""
    p, itemsize, matrix = problem, DTYPES[problem.precision].itemsize, problem.precision != "fp32"
    if p.kernel == "wgrad":
        return wgrad_config(p.images, p.low, p.low, p.into, p.out, itemsize, arch, matrix)
    if is_image(p):
        return image_config(p.low, p.low, p.into, itemsize, arch, matrix)
    per_group = p.images // p.use.groups
    return conv_config(
        p.kernel, per_group, p.use.groups, p.low, p.low, (p.into, p.out), itemsize, arch, matrix
    )  # fmt: skip


def conv_programs(p: Problem, box: tuple[int, int, int], columns: int) -> int:
    """Programs of a convolution's launch: tiles of pixels (onto an image but for their rims), phases, columns."""
    per_group = p.images // p.use.groups
    if is_image(p):
        rows, across = inner(p.low, box[1]), inner(p.low, box[2])
        return p.use.groups * cdiv(per_group, box[0]) * cdiv(p.low, rows) * cdiv(p.low, across)
    return p.use.groups * boxes(box, per_group, p.low, p.low) * PHASES[p.kernel] * cdiv(p.out, columns)


def is_image(p: Problem) -> bool:
    return p.kernel == "conv_transpose" and p.out <= IMAGE_CHANNELS


def loads(p: Problem, arch: int) -> list[bool]:
    """Whether by TMA boxes, by pointers, or both."""
    itemsize = DTYPES[p.precision].itemsize
    channels = (p.into,) if is_image(p) else (p.into, p.out)
    if arch < 90 or p.precision == "fp32" or not tma_fits(channels, itemsize):
        return [False]
    return [True, False]


def depths(p: Problem, tma: bool) -> list[int]:
    """Channels multiplied at a time: half a line of 128 bytes, a line, two."""
    itemsize = DTYPES[p.precision].itemsize
    flat = p.kernel == "conv" and p.into < FLAT_CHANNELS
    most = max(16, power_of_two(16 * p.into if flat else p.into))
    found = sorted({min(most, n // itemsize) for n in (64, 128, 256)})
    return [n for n in found if n >= 16 and not (tma and p.kernel == "conv" and p.into % n)]


def conv_tiles(p: Problem, arch: int) -> list[ConvConfig]:
    itemsize, per_group = DTYPES[p.precision].itemsize, p.images // p.use.groups
    widest = 16 if is_image(p) else min(256, max(16, power_of_two(p.out)))
    columns_tried = [n for n in (16, 32, 64, 128, 256) if widest // 4 <= n <= widest]
    found = []
    for tma in loads(p, arch):
        for rows, columns, depth, warps, stages in product(
            (64, 128, 256), columns_tried, depths(p, tma), warps_tried(tma), (2, 3, 4, 5)
        ):
            box = (image_box if is_image(p) else pixel_box)(rows, p.low, p.low)
            tiles = conv_programs(p, box, columns)
            accumulated = IMAGE_COLUMNS if is_image(p) else columns
            if fits(rows, accumulated, depth, warps, stages, itemsize, arch) and busy(tiles, rows * accumulated, arch):
                found.append(ConvConfig(*box, columns, depth, warps, stages, tma))
    return [c for c in found if c.images <= power_of_two(per_group)]


def wgrad_tiles(p: Problem, arch: int) -> list[WgradConfig]:
    itemsize, found = DTYPES[p.precision].itemsize, []
    for tma in loads(p, arch):
        flat = not tma and p.out < FLAT_CHANNELS
        sides = [[n for n in (32, 64, 128, 256) if n <= max(32, power_of_two(c))] for c in
                 (p.into, 16 * p.out if flat else p.out)]  # fmt: skip
        for rows, columns, taps, depth, warps, stages in product(
            *sides, (1,) if flat else (1, 2, 4), (32, 64, 128), warps_tried(tma), (3, 4)
        ):
            if not fits(rows, columns * taps, depth, warps, stages, itemsize, arch):
                continue
            if taps > 1 and columns < min(256 // taps, sides[1][-1]):  # more columns serve low as well, by fewer loads
                continue
            box = pixel_box(depth, p.low, p.low)
            tiles = cdiv(p.into, rows) * (cdiv(16 * p.out, columns) if flat else 16 // taps * cdiv(p.out, columns))
            most = max(1, boxes(box, p.images, p.low, p.low) // 4)
            splits = {max(1, min(most, round(waves * SMS[arch] / tiles))) for waves in (1, 2)}
            found += [WgradConfig(*box, rows, columns, split, warps, stages, tma, taps) for split in sorted(splits)]
    return [c for c in found if c.images <= power_of_two(p.images)]


def warps_tried(tma: bool) -> tuple[int, ...]:
    """Flattened loops over pointers have miscompiled at eight warps (triton#189660, pytorch#173068): never shipped."""
    return (4, 8) if tma else (4,)


def fits(rows: int, columns: int, depth: int, warps: int, stages: int, itemsize: int, arch: int) -> bool:
    """Registers, and shared memory for all stages, half of which at least a pipeline should use or be deep."""
    shared = stages * (rows + columns) * depth * itemsize
    accumulators = rows * columns // (32 * warps)
    enough = stages >= 3 or shared > SHARED_LIMIT_BYTES[arch] // 2
    return FEWEST <= accumulators <= MOST and shared <= SHARED_LIMIT_BYTES[arch] and enough


def busy(tiles: int, size: int, arch: int) -> bool:
    """Whether half of the SMs have a tile, unless it is the smallest there is."""
    return tiles >= SMS[arch] // 2 or size <= 64 * 64
