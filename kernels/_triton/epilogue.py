"""What a GEMM does with its fp32 accumulator before it leaves the registers; shared by conv and conv_transpose.

Forward: apply an activation, or a batch norm whose statistics are known and an activation, or keep the output raw and
take its batch-norm statistics. Backward: the accumulator is the gradient of the previous layer's activated output a;
multiply it by the derivative of the activation, and where that layer has batch norm also sum g and g·x̂, which its
backward and its weight and bias gradients need.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.geometry import Epilogue, Partials, check_tensor

PART_COLUMNS = {"statistics": 64, "activation": 64, "batch_norm": 64, "activation_grad": 32, "batch_norm_grad": 32}
"""Columns finished at a time. Compiled for sm_90, `batch_norm_grad` on a 128×128 tile takes 237 registers whole, 178 by
64 columns and 138 by 32; on a 128×256 tile it spills 536 bytes whole and nothing by 64. Statistics: 254, 181, 171."""


def check_epilogue(epilogue: Epilogue, out: Tensor, images: int) -> None:
    """Raise ValueError if the epilogue does not fit an output (N, H, W, C), naming the argument."""
    if epilogue.groups < 1 or images % epilogue.groups:
        raise ValueError(f"groups is {epilogue.groups}: it must divide the batch of {images}")
    if epilogue.activation not in ("none", "relu", "leaky_relu", "tanh"):
        raise ValueError(f"activation is {epilogue.activation!r}: accepted are none, relu, leaky_relu and tanh")
    given = (epilogue.saved, epilogue.state)
    if epilogue.statistics and (epilogue.activation != "none" or any(tensor is not None for tensor in given)):
        raise ValueError("statistics=True requires a raw output: activation='none', no saved tensor and no state")
    if epilogue.merge is not None and not epilogue.sums:
        raise ValueError(
            "merge is given, but the epilogue takes no sums: merge needs statistics=True, or saved and state"
        )
    if epilogue.state is not None:
        if epilogue.activation == "tanh":
            raise ValueError("activation is 'tanh': after batch norm, accepted are none, relu and leaky_relu")
        check_tensor("state", epilogue.state, (4, epilogue.groups, out.shape[3]), torch.float32, out)
    if epilogue.saved is not None:
        check_tensor("saved", epilogue.saved, tuple(out.shape), out.dtype, out)


def empty_partials(epilogue: Epilogue, tiles: int, out: Tensor) -> Partials | None:
    """Workspaces for `tiles` tiles per group, or None if the epilogue leaves nothing to merge."""
    if not epilogue.sums:
        return None
    values = out.new_empty((2, epilogue.groups, tiles, out.shape[3]), dtype=torch.float32)
    counted = epilogue.mode == "statistics"
    return Partials(values, values.new_empty((epilogue.groups, tiles)) if counted else None)


@triton.jit
def tanh(x):
    """Within 3 ulp where exp is exact: by exp(−2|x|) where that keeps its digits, by Taylor below |x| = 1/4."""
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    q = x * x
    near = 1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * (1382 / 155925)))))
    return tl.where(q < 0.0625, x * near, tl.where(x < 0, -far, far))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)  # written so that NaN stays NaN, as in PyTorch, and is found
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == "tanh":
        z = tanh(z)
    return z


@triton.jit
def derivative(a, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """The activation's derivative at output a; for relu and leaky_relu at the input too, whose sign is the same."""
    if ACTIVATION == "relu":
        d = tl.where(a <= 0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(a > 0, 1.0, SLOPE)
    elif ACTIVATION == "tanh":
        d = 1 - a * a
    else:
        d = tl.full(a.shape, 1.0, tl.float32)
    return d


@triton.jit
def finish(
    acc, y, saved, state, values, counts, rows, valid, column, group, groups, tile, tiles,
    C: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Finish a tile, PART columns at a time, so that what the epilogue loads needs few registers beside acc.

    Triton's language cannot slice a tensor in registers, so the tile is halved until its columns fit. Reshape and
    permute put the column index's highest bit last, and `split` separates by it. In the accumulator's layout a thread
    holds columns of both halves, so the split moves nothing between threads: it only sorts a thread's own registers.

    acc (BM, BN) fp32; rows (BM,) int64, each output pixel's index; valid (BM,): whether the pixel exists and is of
    this group, without which it may neither be stored nor counted; column: the first of BN, those ≥ C being overhang.
    """
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if BN <= PART:
        columns = column + tl.arange(0, BN)
        finish_part(
            acc, y, saved, state, values, counts, rows, valid, columns, group, groups, tile, tiles,
            C, MODE, ACTIVATION, SLOPE,
        )  # fmt: skip
    else:
        left, right = acc.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()
        finish(
            left, y, saved, state, values, counts, rows, valid, column, group, groups, tile, tiles,
            C, MODE, ACTIVATION, SLOPE, PART,
        )  # fmt: skip
        finish(
            right, y, saved, state, values, counts, rows, valid, column + BN // 2, group, groups, tile, tiles,
            C, MODE, ACTIVATION, SLOPE, PART,
        )  # fmt: skip


@triton.jit
def finish_part(
    acc, y, saved, state, values, counts, rows, valid, columns, group, groups, tile, tiles,
    C: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    inside = columns < C
    mask = valid[:, None] & inside[None, :]
    offsets = rows[:, None] * C + columns[None, :]
    partial = (group * tiles + tile) * C + columns
    plane = groups * tiles * C
    if MODE == "statistics":
        n = tl.sum(valid.to(tl.float32), 0)
        mean = tl.sum(tl.where(valid[:, None], acc, 0.0), 0) / n
        off = tl.where(valid[:, None], acc - mean[None, :], 0.0)
        tl.store(values + partial, mean, mask=inside)
        tl.store(values + plane + partial, tl.sum(off * off, 0), mask=inside)
        tl.store(counts + group * tiles + tile, n)  # every column tile writes the same number
    elif MODE == "activation":
        acc = activate(acc, ACTIVATION, SLOPE)
    elif MODE == "batch_norm":
        at = group * C + columns
        scale = tl.load(state + 2 * groups * C + at, mask=inside, other=0.0)
        shift = tl.load(state + 3 * groups * C + at, mask=inside, other=0.0)
        acc = activate(acc * scale[None, :] + shift[None, :], ACTIVATION, SLOPE)
    else:
        kept = tl.load(saved + offsets, mask=mask, other=0.0).to(tl.float32)
        if MODE == "activation_grad":
            acc *= derivative(kept, ACTIVATION, SLOPE)
        else:
            at = group * C + columns
            mean = tl.load(state + at, mask=inside, other=0.0)
            rstd = tl.load(state + groups * C + at, mask=inside, other=0.0)
            scale = tl.load(state + 2 * groups * C + at, mask=inside, other=0.0)
            shift = tl.load(state + 3 * groups * C + at, mask=inside, other=0.0)
            acc *= derivative(kept * scale[None, :] + shift[None, :], ACTIVATION, SLOPE)
            acc = tl.where(valid[:, None], acc, 0.0)
            normalised = (kept - mean[None, :]) * rstd[None, :]
            tl.store(values + partial, tl.sum(acc, 0), mask=inside)
            tl.store(values + plane + partial, tl.sum(acc * normalised, 0), mask=inside)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=mask)
