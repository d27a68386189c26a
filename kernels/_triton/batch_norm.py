"""Batch norm forward, NHWC: statistics of each group, merged from tiles; the apply with its activation.

The statistics come as (count, mean, M2) of each tile, from a convolution's epilogue or from `statistics` here; how they
are merged is in `merge`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import cdiv, power_of_two
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import activate
from kernels._triton.launch import Job, Launch
from kernels._triton.merge import merge, merge_arguments, settle_statistics
from kernels.arguments import check_activation, check_statistics, rows_of
from kernels.geometry import Activation, Epilogue, Merge, Partials, check_tensor

TILE_ELEMENTS = 4096
MERGED_TILES = 64
MERGED_CHANNELS = 16


def row_tile(channels: int) -> tuple[int, int]:
    """Rows and channels of an elementwise program: up to 128 channels, `TILE_ELEMENTS` in all."""
    columns = min(128, power_of_two(channels))
    return TILE_ELEMENTS // columns, columns


def row_grid(rows: int, groups: int, channels: int) -> tuple[tuple[int, int], int]:
    """The grid of elementwise programs over groups of `rows` rows, and the row tiles of a group."""
    height, width = row_tile(channels)
    tiles = cdiv(rows, height)
    return (groups * tiles, cdiv(channels, width)), tiles


@triton.jit
def locate(rows, tiles, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """An elementwise program's group, tile, offsets (BR, BC) int64 and their mask, channels (BC,), mask of the rows."""
    pid = tl.program_id(0)
    group, tile = pid // tiles, pid % tiles
    r = tile * BR + tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    offsets = (group * rows + r).to(tl.int64)[:, None] * C + c[None, :]
    return group, tile, offsets, (r < rows)[:, None] & (c < C)[None, :], c, r < rows


@triton.jit
def statistics_kernel(
    y, values, counts, rows, groups, tiles,
    rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged, eps, momentum,
    C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, MERGE: tl.constexpr, TOGETHER: tl.constexpr,
    WIDTH: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of each channel of a tile of y.

    Tile: BR pixels by BC channels of one group.
    Bytes: y once.
    Accumulates in fp32, about the tile's own mean.
    Does not beat the library: it serves outputs of a library's GEMM, which has no epilogue of ours.
    """
    after_previous(DEPENDENT)
    group, tile, offsets, mask, c, valid = locate(rows, tiles, C, BR, BC)
    x = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    n = tl.sum(valid.to(tl.float32), 0)
    mean = tl.sum(x, 0) / n
    off = tl.where(mask, x - mean[None, :], 0.0)
    at = (group * tiles + tile) * C + c
    tl.store(values + at, mean, mask=c < C)
    tl.store(values + groups * tiles * C + at, tl.sum(off * off, 0), mask=c < C)
    tl.store(counts + group * tiles + tile, n)
    if MERGE:
        merge(
            values, counts, rounds, round_counts, tickets, weight, bias, running_mean, running_var, tracked, merged,
            tl.program_id(1) * BC, group, groups, tile, tiles, rows, eps, momentum, C, BC, "statistics", TOGETHER,
            WIDTH,
        )  # fmt: skip


@triton.jit
def merge_statistics_kernel(
    values, counts, weight, bias, running_mean, running_var, tracked, state, groups, tiles, eps, momentum,
    C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """mean, rstd, scale and shift of each group from its tiles; running ← (1 − momentum)·running + momentum·new.

    Tile: BC channels, all groups in turn (the running statistics move once per group, in order), BT tiles at a time.
    Bytes: 8 per tile and channel, out of L2 as they were just written.
    Accumulates in fp32 by Chan's formula, in tile order: the same bits each run.
    Beats the library by reading the partials and not the tensor, which is hundreds of times larger.
    """
    after_previous(DEPENDENT)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    settle_statistics(
        values, counts, weight, bias, running_mean, running_var, tracked, state, groups, tiles, eps, momentum, c,
        tl.program_id(0) == 0, C, BT,
    )  # fmt: skip


@triton.jit
def apply_kernel(
    y, state, out, rows, groups, tiles, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = activation(scale·y + shift), by channel and group.

    Tile: BR pixels by BC channels of one group.
    Bytes: y and out once, 16-byte vectors.
    Computes in fp32, rounded once.
    Beats the library's three kernels (statistics, apply, activation) by being the only one left.
    """
    after_previous(DEPENDENT)
    group, _, offsets, mask, c, _ = locate(rows, tiles, C, BR, BC)
    at = group * C + c
    scale = tl.load(state + 2 * groups * C + at, mask=c < C, other=0.0)
    shift = tl.load(state + 3 * groups * C + at, mask=c < C, other=0.0)
    z = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(out + offsets, activate(z, ACTIVATION, SLOPE).to(out.dtype.element_ty), mask=mask)


def prepare_statistics(y: Tensor, groups: int = 1, merge: Merge | None = None) -> Job:
    """The job of `statistics`; see there."""
    rows, channels = rows_of("y", y, groups), y.shape[3]
    grid, tiles = row_grid(rows, groups, channels)
    values = y.new_empty((2, groups, tiles, channels), dtype=torch.float32)
    counts = values.new_empty((groups, tiles))
    height, width = row_tile(channels)
    arguments = {
        "y": y, "values": values, "counts": counts, "groups": groups, "tiles": tiles,
        "C": channels, "BR": height, "BC": width,
        **merge_arguments(Epilogue(groups=groups, statistics=True, merge=merge), values, tiles, grid[1], rows),
    }  # fmt: skip
    result = Partials(values, counts) if merge is None else arguments["merged"]
    return Job((Launch(statistics_kernel, grid, arguments),), result)


def statistics(y: Tensor, groups: int = 1, merge: Merge | None = None) -> Partials | Tensor:
    """Per-tile mean and M2 of y (N, H, W, C), for `merge_statistics`: where the GEMM has no epilogue (G's head).

    With `merge`, of `kernels.geometry.Epilogue`, the batch-norm state (4, groups, C) that they amount to.
    """
    return prepare_statistics(y, groups, merge).run()


def prepare_merge_statistics(
    partials: Partials, weight: Tensor, bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, tracked: Tensor | None = None, eps: float = 1e-5, momentum: float = 0.1,
    rows: int | None = None,
) -> Job:  # fmt: skip
    """The job of `merge_statistics`; see there."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    groups, tiles, channels = check_statistics(partials, vectors, tracked, rows)
    state = partials.values.new_empty((4, groups, channels))
    arguments = {
        "values": partials.values, "counts": partials.counts, **vectors, "tracked": tracked, "state": state,
        "groups": groups, "tiles": tiles, "eps": eps, "momentum": momentum,
        "C": channels, "BT": MERGED_TILES, "BC": MERGED_CHANNELS,
    }  # fmt: skip
    return Job((Launch(merge_statistics_kernel, (cdiv(channels, MERGED_CHANNELS),), arguments),), state)


def merge_statistics(
    partials: Partials, weight: Tensor, bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, tracked: Tensor | None = None, eps: float = 1e-5, momentum: float = 0.1,
    rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The batch-norm state from the tiles' statistics; moves the running statistics.

    Args:
        partials: of `conv`, `conv_transpose` or `statistics`.
        weight, bias: batch norm's own, (C,) float32.
        running_mean, running_var: (C,) float32, moved in place once per group, in order, with the unbiased variance.
        tracked: `num_batches_tracked`, () int64, grows by the number of groups.
        eps, momentum: as in BatchNorm2d.
        rows: pixels of a group where the caller knows: 1 is refused, as BatchNorm2d refuses it.

    Returns:
        (4, groups, C) float32, rows as in `kernels.geometry.STATE`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    return prepare_merge_statistics(
        partials, weight, bias, running_mean, running_var, tracked, eps, momentum, rows
    ).run()


def prepare_apply(y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2) -> Job:
    """The job of `apply`; see there."""
    check_activation(activation)
    groups, channels = state.shape[1], y.shape[-1]
    rows = rows_of("y", y, groups)
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    grid, tiles = row_grid(rows, groups, channels)
    height, width = row_tile(channels)
    out = torch.empty_like(y)
    arguments = {
        "y": y, "state": state, "out": out, "rows": rows, "groups": groups, "tiles": tiles,
        "C": channels, "BR": height, "BC": width, "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    return Job((Launch(apply_kernel, grid, arguments),), out)


def apply(y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2) -> Tensor:
    """activation(weight·x̂ + bias) of a raw output y (N, H, W, C), by its state (4, groups, C); y's dtype."""
    return prepare_apply(y, state, activation, slope).run()
