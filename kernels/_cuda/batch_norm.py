"""Batch norm by the extension, NHWC, forward and backward: csrc/batch_norm.cu; derivation in docs/batch_norm.md.

Partials come a tile of pixels each, and are merged in tile order.
"""

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.launch import DTYPES, slope_of, vector_of
from kernels.geometry import Activation, Merge, Partials, check_nhwc, check_tensor

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


def rows_of(name: str, tensor: Tensor, groups: int) -> int:
    """Pixels of one group; ValueError where `tensor` is not (N, H, W, C) or `groups` does not divide N."""
    check_nhwc(name, tensor)
    images = tensor.shape[0]
    if groups < 1 or images % groups:
        raise ValueError(f"groups is {groups}: it must divide the batch of {images}")
    return images // groups * tensor.shape[1] * tensor.shape[2]


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
    """The batch-norm state from the tiles' statistics; moves the running statistics.

    Args:
        partials: of `statistics`, or of a GEMM's epilogue.
        weight, bias: batch norm's own, (C,) float32.
        running_mean, running_var: (C,) float32, moved in place once a group, in order, with the unbiased variance.
        tracked: `num_batches_tracked`, () int64, grows by the number of groups.
        eps, momentum: as in BatchNorm2d.
        rows: pixels of a group where the caller knows: 1 is refused, as BatchNorm2d refuses it.

    Returns:
        (4, groups, C) float32, rows as in `kernels.geometry.STATE`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _, groups, tiles, channels = partials.values.shape
    if rows == 1:
        raise ValueError("a group has 1 value a channel: training-mode batch norm needs at least 2")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: give both or neither")
    check_tensor("partials.values", partials.values, (2, groups, tiles, channels), torch.float32, None)
    if partials.counts is None:
        raise ValueError("partials.counts is None: these are a gradient's sums, not statistics")
    check_tensor("partials.counts", partials.counts, (groups, tiles), torch.float32, partials.values)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(name, vector, (channels,), torch.float32, partials.values)
    if tracked is not None:
        check_tensor("tracked", tracked, (), torch.int64, partials.values)
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
    """g and its tiles' sums, where no GEMM's epilogue has made them: modules that fuse no further than themselves.

    Args:
        da: gradient of the activated output (N, H, W, C), y's dtype.
        y: raw convolution output (N, H, W, C).
        state: (4, groups, C) float32 of `merge_statistics`.
        activation, slope: what the forward pass applied; `none`, `relu` or `leaky_relu`.
    """
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
    """Gradients of batch norm's weight and bias, (C,) float32, and what `apply_grad` subtracts, (2, groups, C).

    Args:
        partials: of a `batch_norm_grad` epilogue or of `activation_grad`.
        rows: pixels of one group, images × height × width.
        out: where the two gradients go; new tensors where None.
    """
    _, groups, tiles, channels = partials.values.shape
    check_tensor("partials.values", partials.values, (2, groups, tiles, channels), torch.float32, None)
    if rows < 1:
        raise ValueError(f"rows is {rows}: a group has at least 1 pixel")
    means = partials.values.new_empty((2, groups, channels))
    dweight, dbias = (means.new_empty(channels), means.new_empty(channels)) if out is None else out
    for name, gradient in (("out[0]", dweight), ("out[1]", dbias)):
        check_tensor(name, gradient, (channels,), torch.float32, means)
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
