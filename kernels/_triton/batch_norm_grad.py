"""Batch norm backward, NHWC: from the gradient of the activated output to that of the raw one.

With a = activation(weight·x̂ + bias), g = ∂a·activation′ and n pixels a group, by channel and group:

    ∂bias = Σg      ∂weight = Σg·x̂      ∂y = weight·rstd·(g − Σg/n − x̂·Σ(g·x̂)/n)

So the sums must be known before ∂y can be: a GEMM's epilogue writes g and takes them on its way (`batch_norm_grad`), or
`activation_grad` here does; `merge_sums` adds them up and `apply_grad` finishes. Derivation: docs/batch_norm.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.batch_norm import MERGED_CHANNELS, MERGED_TILES, locate, row_grid, row_tile
from kernels._triton.config import cdiv
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import derivative
from kernels._triton.launch import Job, Launch
from kernels._triton.merge import settle_sums
from kernels.arguments import check_activation, check_sums, rows_of
from kernels.geometry import Activation, Partials, check_tensor


@triton.jit
def activation_grad_kernel(
    da, y, state, g, values, rows, groups, tiles, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """g = da·activation′(scale·y + shift); Σg and Σg·x̂ of the tile.

    Tile: BR pixels by BC channels of one group.
    Bytes: da, y and g once.
    Accumulates in fp32.
    Beats the library's two kernels (activation backward, then a reduction that reads both again) by one pass.
    """
    after_previous(DEPENDENT)
    group, tile, offsets, mask, c, _ = locate(rows, tiles, C, BR, BC)
    at, row = group * C + c, groups * C
    mean = tl.load(state + at, mask=c < C, other=0.0)
    rstd = tl.load(state + row + at, mask=c < C, other=0.0)
    scale = tl.load(state + 2 * row + at, mask=c < C, other=0.0)
    shift = tl.load(state + 3 * row + at, mask=c < C, other=0.0)
    raw = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
    grad *= derivative(raw * scale[None, :] + shift[None, :], ACTIVATION, SLOPE)
    tl.store(g + offsets, grad.to(g.dtype.element_ty), mask=mask)
    partial = (group * tiles + tile) * C + c
    tl.store(values + partial, tl.sum(grad, 0), mask=c < C)
    normalised = (raw - mean[None, :]) * rstd[None, :]
    tl.store(values + groups * tiles * C + partial, tl.sum(grad * normalised, 0), mask=c < C)


@triton.jit
def merge_sums_kernel(
    values, dweight, dbias, means, rows, groups, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """∂weight = Σg·x̂ and ∂bias = Σg over all groups; Σg/n and Σg·x̂/n of each.

    Tile: BC channels, all groups in turn, BT tiles at a time.
    Bytes: 8 per tile and channel, out of L2.
    Accumulates in fp32, in an order fixed by the grid: the same bits each run.
    Beats a second pass over the tensors, as merge_statistics does.
    """
    after_previous(DEPENDENT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    settle_sums(values, dweight, dbias, means, rows, groups, tiles, c, C, BT)


@triton.jit
def apply_grad_kernel(
    g, y, state, means, dy, rows, groups, tiles, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """dy = scale·(g − mean(g) − x̂·mean(g·x̂)), by channel and group.

    Tile: BR pixels by BC channels of one group.
    Bytes: g, y and dy once, 16-byte vectors.
    Computes in fp32, rounded once.
    Beats the library by one read of both tensors: the sums are there already.
    """
    after_previous(DEPENDENT)
    group, _, offsets, mask, c, _ = locate(rows, tiles, C, BR, BC)
    at, row = group * C + c, groups * C
    mean = tl.load(state + at, mask=c < C, other=0.0)
    rstd = tl.load(state + row + at, mask=c < C, other=0.0)
    scale = tl.load(state + 2 * row + at, mask=c < C, other=0.0)
    mean_g = tl.load(means + at, mask=c < C, other=0.0)
    mean_gx = tl.load(means + row + at, mask=c < C, other=0.0)
    normalised = (tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
    grad = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    out = scale[None, :] * (grad - mean_g[None, :] - normalised * mean_gx[None, :])
    tl.store(dy + offsets, out.to(dy.dtype.element_ty), mask=mask)


def prepare_activation_grad(
    da: Tensor, y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2
) -> Job:
    """The job of `activation_grad`; see there."""
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("da", da, tuple(y.shape), y.dtype, y)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    check_activation(activation)
    grid, tiles = row_grid(rows, groups, channels)
    height, width = row_tile(channels)
    g = torch.empty_like(y)
    values = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    arguments = {
        "da": da, "y": y, "state": state, "g": g, "values": values, "rows": rows, "groups": groups, "tiles": tiles,
        "C": channels, "BR": height, "BC": width, "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    return Job((Launch(activation_grad_kernel, grid, arguments),), (g, Partials(values, None)))


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
    return prepare_activation_grad(da, y, state, activation, slope).run()


def prepare_merge_sums(partials: Partials, rows: int, out: tuple[Tensor, Tensor] | None = None) -> Job:
    """The job of `merge_sums`; see there."""
    dweight, dbias, means = check_sums(partials, rows, out)
    _, groups, tiles, channels = partials.values.shape
    arguments = {
        "values": partials.values, "dweight": dweight, "dbias": dbias, "means": means, "rows": rows,
        "groups": groups, "tiles": tiles, "C": channels, "BT": MERGED_TILES, "BC": MERGED_CHANNELS,
    }  # fmt: skip
    launch = Launch(merge_sums_kernel, (cdiv(channels, MERGED_CHANNELS),), arguments)
    return Job((launch,), (dweight, dbias, means))


def merge_sums(
    partials: Partials, rows: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm's weight and bias, (C,) float32, and what `apply_grad` subtracts, (2, groups, C).

    Args:
        partials: of a `batch_norm_grad` epilogue or of `activation_grad`.
        rows: pixels of one group, images × height × width.
        out: where the two gradients go; None: new tensors.
    """
    return prepare_merge_sums(partials, rows, out).run()


def prepare_apply_grad(g: Tensor, y: Tensor, state: Tensor, means: Tensor) -> Job:
    """The job of `apply_grad`; see there."""
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("g", g, tuple(y.shape), y.dtype, y)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    check_tensor("means", means, (2, groups, channels), torch.float32, y)
    grid, tiles = row_grid(rows, groups, channels)
    height, width = row_tile(channels)
    dy = torch.empty_like(y)
    arguments = {
        "g": g, "y": y, "state": state, "means": means, "dy": dy, "rows": rows, "groups": groups, "tiles": tiles,
        "C": channels, "BR": height, "BC": width,
    }  # fmt: skip
    return Job((Launch(apply_grad_kernel, grid, arguments),), dy)


def apply_grad(g: Tensor, y: Tensor, state: Tensor, means: Tensor) -> Tensor:
    """Gradient of the raw output y, (N, H, W, C) of its dtype, from g and the merged sums (docs/batch_norm.md)."""
    return prepare_apply_grad(g, y, state, means).run()
