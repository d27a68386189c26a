"""The k4 s2 p1 products by the extension: the RGB ends, and between maps of many channels on the tensor cores.

The latter, csrc/conv_sm90.cu, wgrad_sm90.cu and conv_sm80.cu, are the challenger to Triton's and cuDNN's, in 16 bits
and for channels in multiples of 64. `missing` says what the extension leaves to other backends.
"""

import torch
from torch import Tensor

from kernels._cuda import image
from kernels._cuda import launch as _launch
from kernels._cuda.epilogue import (
    check_conv,
    check_conv_transpose,
    check_epilogue,
    check_wgrad,
    left,
    merging,
    output,
)
from kernels._cuda.launch import DTYPES, slope_of
from kernels._cuda.shares import empty_shares, settle
from kernels.geometry import CUDA_CLUSTERS, CUDA_COLUMNS, CudaConfig, Epilogue, Merge, Partials, Shares

TILE_PIXELS, DEPTH = 128, 64
"""As in csrc/conv_tile.h: pixels of a tile, and how many input channels it takes at a time."""
BOX_PIXELS, PLANES = 64, 4
"""As in csrc/wgrad_sm90.cu: pixels that a weight gradient multiplies at a time, and parities of row and column."""
LIKELY_CLUSTER = {128: 2, 64: 4}
"""By columns: what L2 then has to give is within what it is taken to have (docs/cuda_convolution.md)."""
SMS = {"sm90": 132, "sm80": 108}
"""Of the largest chips that run a source, H200 and A100: a tile is chosen so that each has one."""
CLUSTERED_SMS = 128
"""Of an H200's, those that blocks in clusters of four can have at once: 8 GPCs have 16 or 18 SMs each."""
PRECISIONS = ("ieee", "tf32")


def missing(kernel: str, first: Tensor, second: Tensor, epilogue: Epilogue | None = None) -> str | None:
    """Why the extension has no kernel for a call of `kernel`, `conv`, `conv_transpose` or `wgrad`; None if it has one.

    Args:
        first, second: its two tensors: x and weight, or low and high.
    """
    if epilogue and epilogue.mode == "batch_norm":
        return "batch norm with known statistics: the extension's epilogues do not apply it"
    low, high = (second.shape[0], second.shape[3]) if kernel != "wgrad" else (first.shape[3], second.shape[3])
    reason = image.missing(high, low, kernel)
    if reason is None or high <= max(image.IMAGE_CHANNELS):
        return reason
    if kernel == "wgrad" and source(first) != "sm90":
        return f"{low} × {high} channels: the extension's weight gradient between maps is for compute capability 9.0"
    if first.dtype == torch.float32:
        return "float32: the extension's tensor-core convolutions take bfloat16 and float16"
    if low % DEPTH or high % DEPTH:
        return f"{low} × {high} channels: the extension's tensor-core convolutions take multiples of {DEPTH}"
    if epilogue and epilogue.activation == "tanh":
        return "an epilogue with tanh: the extension's tensor-core convolutions have (leaky) ReLU"
    return None


def source(tensor: Tensor) -> str:
    """Which source's kernels the tensor's device runs, `sm90` or `sm80`; `sm90` if there is no GPU."""
    gpu = tensor.device.type == "cuda"
    return "sm80" if gpu and torch.cuda.get_device_capability(tensor.device)[0] != 9 else "sm90"


def box(height: int, width: int, pixels: int = TILE_PIXELS) -> tuple[int, int]:
    """Height and width of a box of pixels, as square as powers of two let it be."""
    wide = min(1 << (width - 1).bit_length(), 16 if pixels >= 128 else 8)
    return min(1 << (height - 1).bit_length(), pixels // wide), wide


def boxes(images: int, height: int, width: int, pixels: int = TILE_PIXELS) -> int:
    """How many boxes cover `images` pictures."""
    h, w = box(height, width, pixels)
    return -(-images // (pixels // (h * w))) * -(-height // h) * -(-width // w)


def cluster_of(tiles: int, most: int) -> int:
    """The largest cluster of at most `most` blocks that divides so many tiles."""
    return max(c for c in CUDA_CLUSTERS if c <= most and tiles % c == 0)


def default_config(tiles: int, phases: int, out: int, source: str = "sm90") -> CudaConfig:
    """As many columns as leave every SM a tile, of `tiles` boxes of pixels a phase, and a likely cluster."""
    fitting = [c for c in CUDA_COLUMNS if c <= out]
    columns = next((c for c in fitting if tiles * phases * -(-out // c) >= 0.9 * SMS[source]), fitting[-1])
    return CudaConfig(columns, LIKELY_CLUSTER[columns])


def _product(
    kernel: str, x: Tensor, weight: Tensor, e: Epilogue, sizes: tuple[int, ...], config: CudaConfig | None,
    to: Tensor | None,
) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
    images, height, width, into, out = sizes
    scale = 2 if kernel == "conv_transpose" else 1
    y = output(to, (images, scale * height, scale * width, out), x, x.dtype)
    check_epilogue(e, y, images)
    per_group, phases = boxes(images // e.groups, height, width), scale**2
    values = counts = None
    if e.sums:
        values = y.new_empty((2, e.groups, per_group * phases, out), dtype=torch.float32)
        counts = values.new_empty(values.shape[1:3]) if e.statistics else None
    made_for, tiles = source(x), e.groups * per_group
    config = config or default_config(tiles, phases, out, made_for)
    tile = (*box(height, width), config.columns)
    if made_for == "sm90":
        tile = (*tile, cluster_of(tiles, config.cluster))
    merge = merging(e, values, y[..., 0].numel() // e.groups, config.columns)
    eps, momentum = (e.merge.eps, e.merge.momentum) if isinstance(e.merge, Merge) else (0.0, 0.0)
    _launch.launch(
        f"conv_{made_for}", x, weight, y, e.saved, e.state, values, counts, *merge, int(phases > 1), DTYPES[x.dtype],
        images, e.groups, height, width, into, out, *tile, slope_of(e.activation, e.slope), eps, momentum,
    )  # fmt: skip
    return y, left(e, values, counts, merge[-1])


def conv(
    x: Tensor, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: CudaConfig | None = None,
) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
    """Convolution of kernel 4, stride 2, padding 1, without bias, and its epilogue.

    Args:
        x: (N, 2H, 2W, C) bfloat16, float16 or float32, contiguous.
        weight: (O, 4, 4, C) of x's dtype, contiguous: the layout that all products of a layer share.
        epilogue: what happens to the accumulator; None: kept as it is.
        precision: of float32 products: `ieee`, or `tf32`, which permits less precision and is not used.
        config: the tile on the tensor cores; None: a default.

    Returns:
        y (N, H, W, O) of x's dtype, and where the epilogue takes sums the tiles' `Partials`, or what its `merge` makes
        of them: batch norm's state (4, groups, O), or the means (2, groups, O). From an image it is left to the caller.

    Raises:
        ValueError: a shape, dtype, layout or configuration that does not fit, by name, or that `missing` names.
    """
    sizes = check_conv(x, weight)
    e = _check("conv", x, weight, epilogue, precision)
    if sizes[3] in image.IMAGE_CHANNELS:
        return image.conv(x, weight, e)
    return _product("conv", x, weight, e, sizes, config, None)


def conv_transpose(
    x: Tensor, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
    config: CudaConfig | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
    """Transposed convolution of kernel 4, stride 2, padding 1, without bias, and its epilogue.

    As `conv`, of x (N, H, W, C) by weight (C, 4, 4, O); y is (N, 2H, 2W, O), and goes to `out` where that is given.
    """
    sizes = check_conv_transpose(x, weight)
    e = _check("conv_transpose", x, weight, epilogue, precision)
    if sizes[4] in image.IMAGE_CHANNELS:
        return image.conv_transpose(x, weight, e, out)
    return _product("conv_transpose", x, weight, e, sizes, config, out)


def wgrad_config(low: int) -> CudaConfig:
    """The default tile of a weight gradient with `low` channels on the low side."""
    return CudaConfig(min(128, low), 4)


def wgrad(
    low: Tensor, high: Tensor, precision: str = "ieee", config: CudaConfig | None = None, out: Tensor | None = None,
    pending: list[Shares] | None = None,
) -> Tensor:  # fmt: skip
    """Weight gradient (L, 4, 4, C) float32 of low (N, H, W, L) and high (N, 2H, 2W, C); in `out` if given.

    Args:
        config: the tile on the tensor cores, of low channels. The blocks of a cluster, at most four, have the same
            pixels and other taps.
        pending: takes the shares that are left to be added up; None: they are added here.
    """
    _check("wgrad", low, high, None, precision)
    if high.shape[3] in image.IMAGE_CHANNELS:
        return image.wgrad(low, high, out, pending)
    images, height, width, rows, channels = check_wgrad(low, high)
    config = config or wgrad_config(rows)
    gradient = output(out, (rows, 4, 4, channels), low, torch.float32)
    tiles = -(-rows // config.columns) * (channels // 64) * PLANES
    split = max(1, min(CLUSTERED_SMS // tiles, boxes(images, height, width, BOX_PIXELS) // 4))
    shares = empty_shares(split, gradient)
    _launch.launch(
        "wgrad_sm90", low, high, shares, DTYPES[low.dtype], images, height, width, rows, channels,
        *box(height, width, BOX_PIXELS), config.columns, cluster_of(PLANES, config.cluster), split,
    )  # fmt: skip
    return settle(shares, gradient, pending)


def _check(kernel: str, first: Tensor, second: Tensor, epilogue: Epilogue | None, precision: str) -> Epilogue:
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: accepted are {PRECISIONS}")
    for name, tensor in (("the first tensor", first), ("the second", second)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected four dimensions")
    if reason := missing(kernel, first, second, epilogue):
        raise ValueError(f"{kernel} of {tuple(first.shape)} and {tuple(second.shape)} by the extension: {reason}")
    return epilogue or Epilogue()
