"""The RGB ends by the extension, NHWC: convolutions between an image of 1, 3 or 4 channels and a map of many.

csrc/image_conv.cu, image_conv_transpose.cu and image_wgrad.cu. In 16 bits they run on the tensor cores; float32 is
computed in float32, whatever `precision` allows. Each is bound by memory: the map's side is read or written once.
"""

import torch
from torch import Tensor

from kernels._cuda import batch_norm
from kernels._cuda import launch as _launch
from kernels._cuda.epilogue import check_conv, check_conv_transpose, check_epilogue, check_wgrad, output
from kernels._cuda.launch import DTYPES, slope_of
from kernels._cuda.shares import empty_shares, settle
from kernels.geometry import Epilogue, Partials, Shares

IMAGE_CHANNELS = (1, 3, 4)
MOST_CHANNELS = 256
"""Of the map, in `conv_transpose`, whose weights stand in shared memory; more are work for a GEMM's tile."""
BOX_PIXELS, BOX_WIDTHS = 256, (8, 16, 32)
"""As in csrc/image.h: map pixels a block owns at a time, and how wide their box may be."""


def missing(image_channels: int, channels: int, kind: str) -> str | None:
    """Why these kernels do not serve a product (`conv`, `conv_transpose`, `wgrad`); None if they do."""
    if image_channels not in IMAGE_CHANNELS:
        return f"{image_channels} image channels: the image kernels take 1, 3 and 4"
    if channels % 8:
        return f"{channels} channels: the image kernels take multiples of 8"
    if kind == "conv_transpose" and channels > MOST_CHANNELS:
        return f"{channels} channels: the transposed convolution onto an image takes at most {MOST_CHANNELS}"
    return None


def boxes(height: int, width: int) -> int:
    """How many boxes a block at a time cover a map of one image."""
    across = next((w for w in BOX_WIDTHS if w >= width), BOX_WIDTHS[-1])
    return -(-height // (BOX_PIXELS // across)) * -(-width // across)


def _tanh_and_slope(epilogue: Epilogue) -> tuple[int, float]:
    tanh = epilogue.activation == "tanh"
    return int(tanh), 0.0 if tanh else slope_of(epilogue.activation, epilogue.slope)


def conv(x: Tensor, weight: Tensor, epilogue: Epilogue | None = None) -> tuple[Tensor, Partials | None]:
    """As `kernels._cuda.conv.conv`, of an image x (N, 2H, 2W, C) by weight (O, 4, 4, C); O is a multiple of 8.

    Statistics, which no image's convolution of a DCGAN wants, cost a second pass.
    """
    e = epilogue or Epilogue()
    images, height, width, into, out = check_conv(x, weight)
    if reason := missing(into, out, "conv"):
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: {reason}")
    y = x.new_empty((images, height, width, out))
    check_epilogue(e, y, images)
    values = None
    if e.mode == "batch_norm_grad":
        tiles = images // e.groups * boxes(*y.shape[1:3])
        values = y.new_empty((2, e.groups, tiles, out), dtype=torch.float32)
    _launch.launch(
        "image_conv", x, weight, y, e.saved, e.state, values, DTYPES[x.dtype], images, e.groups, *y.shape[1:3], into,
        out, *_tanh_and_slope(e),
    )  # fmt: skip
    if e.mode == "statistics":
        return y, batch_norm.statistics(y, e.groups)
    return y, None if values is None else Partials(values, None)


def conv_transpose(
    x: Tensor, weight: Tensor, epilogue: Epilogue | None = None, out: Tensor | None = None
) -> tuple[Tensor, Partials | None]:
    """As `kernels._cuda.conv.conv_transpose`, of x (N, H, W, C) by weight (C, 4, 4, O) onto an image of O channels.

    C is a multiple of 8, at most `MOST_CHANNELS`. Batch norm at the image, which no DCGAN has, costs a second pass.
    """
    e = epilogue or Epilogue()
    images, height, width, into, channels = check_conv_transpose(x, weight)
    if reason := missing(channels, into, "conv_transpose"):
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: {reason}")
    y = output(out, (images, 2 * height, 2 * width, channels), x, x.dtype)
    check_epilogue(e, y, images)
    raw = e.sums
    here = Epilogue() if raw else e
    _launch.launch(
        "image_conv_transpose", x, weight, y, here.saved, DTYPES[x.dtype], images, height, width, channels, into,
        *_tanh_and_slope(here),
    )  # fmt: skip
    if e.mode == "statistics":
        return y, batch_norm.statistics(y, e.groups)
    if e.mode == "batch_norm_grad":
        return batch_norm.activation_grad(y, e.saved, e.state, e.activation, e.slope)
    return y, None


def wgrad(low: Tensor, high: Tensor, out: Tensor | None = None, pending: list[Shares] | None = None) -> Tensor:
    """As `kernels._cuda.conv.wgrad`, of low (N, H, W, L) and an image high (N, 2H, 2W, C); L is a multiple of 8."""
    images, height, width, rows, channels = check_wgrad(low, high)
    if reason := missing(channels, rows, "wgrad"):
        raise ValueError(f"low has shape {tuple(low.shape)}, high {tuple(high.shape)}: {reason}")
    gpu = low.device.type == "cuda"
    blocks = 2 * torch.cuda.get_device_properties(low.device).multi_processor_count if gpu else 3
    split = min(blocks, images * boxes(height, width))
    gradient = output(out, (rows, 4, 4, channels), low, torch.float32)
    shares = empty_shares(split, gradient)
    _launch.launch("image_wgrad", low, high, shares, DTYPES[low.dtype], images, height, width, channels, rows, split)
    return settle(shares, gradient, pending)
