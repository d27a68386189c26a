"""Batch norm by the extension, NHWC, forward and backward: csrc/batch_norm.cu; derivation in docs/batch_norm.md.

Partials come a tile of pixels each, and are merged in tile order.
"""

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.launch import DTYPES, slope_of, vector_of
from kernels.arguments import check_statistics, check_sums, rows_of
from kernels.geometry import Activation, Merge, Partials, check_tensor

THREADS, COLUMNS, UNROLL = 256, 32, 4
"""As in csrc: of a block, at most of them across the channels, and rows a thread has in flight."""
TILES = 1024
"""Tiles that fill any GPU; a larger tensor gets larger tiles, up to 16 times, so that merging stays cheap."""


def tile_rows(tensor: Tensor, groups: int) -> tuple[int, int]:
    """Pixels of a tile, and tiles of a group, for an NHWC tensor."""
    channels = tensor.shape[3]
    rows = tensor.numel() // channels // groups
    vectors = channels // vector_of(tensor, channels)
    columns = min(COLUMNS, 1 << (vectors - 1).bit_length())
    smallest = THREADS // columns * UNROLL
    tiles = groups * -(-rows // smallest) * -(-vectors // columns)
    height = smallest * min(16, max(1, tiles // TILES))
    return height, -(-rows // height)


def statistics(y: Tensor, groups: int = 1, merge: Merge | None = None) -> Partials | Tensor:
    """Per-tile mean and M2 of y (N, H, W, C), for `merge_statistics`: where the GEMM has no epilogue (G's head).

    With `merge`, of `kernels.geometry.Epilogue`, the batch-norm state (4, groups, C) that they amount to.
    """
    rows, channels = rows_of("y", y, groups), y.shape[3]
    height, tiles = tile_rows(y, groups)
    values = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    counts = values.new_empty((groups, tiles))
    _launch.launch("bn_statistics", y, values, counts, DTYPES[y.dtype], rows, groups, channels, height)
    partials = Partials(values, counts)
    return partials if merge is None else merge_statistics(partials, *merge)


def merge_statistics(
    partials: Partials, weight: Tensor, bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, tracked: Tensor | None = None, eps: float = 1e-5, momentum: float = 0.1,
    rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The batch-norm state (4, groups, C); arguments and errors as `kernels._triton.batch_norm.merge_statistics`'s."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    groups, tiles, channels = check_statistics(partials, vectors, tracked, rows)
    state = partials.values.new_empty((4, groups, channels))
    _launch.launch(
        "bn_merge_statistics", *partials, *vectors.values(), tracked, state, groups, tiles, channels, eps, momentum
    )
    return state


def apply(y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2) -> Tensor:
    """activation(weight·x̂ + bias) of a raw output y (N, H, W, C), by its state (4, groups, C); y's dtype."""
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    out = torch.empty_like(y)
    height, _ = tile_rows(y, groups)
    below = slope_of(activation, slope)
    _launch.launch("bn_apply", y, state, out, DTYPES[y.dtype], rows, groups, channels, height, below)
    return out


def activation_grad(
    da: Tensor, y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2
) -> tuple[Tensor, Partials]:
    """g and its tiles' sums; arguments as `kernels._triton.batch_norm_grad.activation_grad`'s."""
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("da", da, tuple(y.shape), y.dtype, y)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    below = slope_of(activation, slope)
    height, tiles = tile_rows(y, groups)
    g = torch.empty_like(y)
    values = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    dtype = DTYPES[y.dtype]
    _launch.launch("bn_activation_grad", da, y, state, g, values, dtype, rows, groups, channels, height, below)
    return g, Partials(values, None)


def merge_sums(
    partials: Partials, rows: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm's weight and bias, (C,), and what `apply_grad` subtracts, (2, groups, C); arguments as
    `kernels._triton.batch_norm_grad.merge_sums`'s."""
    dweight, dbias, means = check_sums(partials, rows, out)
    _, groups, tiles, channels = partials.values.shape
    _launch.launch("bn_merge_sums", partials.values, dweight, dbias, means, rows, groups, tiles, channels)
    return dweight, dbias, means


def apply_grad(g: Tensor, y: Tensor, state: Tensor, means: Tensor) -> Tensor:
    """Gradient of the raw output y, (N, H, W, C) of its dtype, from g and the merged sums (docs/batch_norm.md)."""
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("g", g, tuple(y.shape), y.dtype, y)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    check_tensor("means", means, (2, groups, channels), torch.float32, y)
    dy = torch.empty_like(y)
    height, _ = tile_rows(y, groups)
    _launch.launch("bn_apply_grad", g, y, state, means, dy, DTYPES[y.dtype], rows, groups, channels, height)
    return dy
