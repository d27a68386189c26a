"""wgrad k4 s2 p1, NHWC: the weight gradient of both convolutions, since each is the other's data gradient."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import FLAT_CHANNELS, WgradConfig, cdiv, wgrad_config
from kernels._triton.dependent import after_previous
from kernels._triton.launch import PRECISIONS, Job, Launch, arch_of, box_view, halves_view, on_tensor_cores
from kernels._triton.prologue import applied, check_input, groups_of, prologue
from kernels.geometry import Deferred, Shares, check_tensor

SUM_BLOCK, SUM_SHARES = 128, 16
"""Elements that a program of `sum_shares` sums, and how many of their shares it loads at a time."""
SUMS = 4
"""Gradients that one launch of it sums."""


@triton.jit
def wgrad_kernel(
    low, high, x_state, out, per_group, groups,
    H: tl.constexpr, W: tl.constexpr, L: tl.constexpr, C: tl.constexpr,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, FLAT: tl.constexpr,
    SIDE: tl.constexpr, BEFORE: tl.constexpr, BEFORE_SLOPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[s,l,ky,kx,c] = Σ_{n,y,x of share s} low[n,y,x,l] · high[n,2y+ky−1,2x+kx−1,c]; with x_state, of `low` or
    `high`, as SIDE says, batch-normed and activated as it is loaded.

    Tile: BM low channels by BN high channels of TAPS taps side by side, or, FLAT, by BN of the 16·C taps and channels
        in a row; a box of BI×BH×BW pixels is one step of the reduction.
    Bytes: low, high and the SPLIT shares once; from L2 low ⌈C/BN⌉·16/TAPS times and high ⌈L/BM⌉·4 times.
    Accumulates in fp32; a share takes every SPLIT-th box and has its own place, so no order is left to chance.
    Beats the library's deterministic choice, which is not split and leaves most SMs idle where the weight is small.
    """
    after_previous(DEPENDENT)
    BK: tl.constexpr = BI * BH * BW
    TW: tl.constexpr = (W + BW - 1) // BW
    TH: tl.constexpr = (H + BH - 1) // BH
    CB: tl.constexpr = (C + BN - 1) // BN
    BLOCKS: tl.constexpr = (16 * C + BN - 1) // BN if FLAT else 16 // TAPS * CB
    pid = tl.program_id(0)  # neighbours share their pixels, for all taps and channels
    block, share = pid % BLOCKS, pid // BLOCKS
    row, share = share % ((L + BM - 1) // BM) * BM, share // ((L + BM - 1) // BM)
    tap, column = block // CB * TAPS, block % CB * BN
    ky, kx = tap // 4, tap % 4

    m, n = row + tl.arange(0, BM), column + tl.arange(0, BN)
    f = block * BN + tl.arange(0, BN)
    if FLAT:  # each column has its own tap
        ky, kx, n = (f // (4 * C))[None, :], (f // C % 4)[None, :], f % C
    else:
        f = tap * C + n
    inside = (f < 16 * C) if FLAT else (n < C)
    r = tl.arange(0, BK)
    accs = (tl.zeros((BM, BN), tl.float32),)
    for _ in tl.static_range(1, TAPS):
        accs += (tl.zeros((BM, BN), tl.float32),)
    in_group = (per_group + BI - 1) // BI * TH * TW
    for place in range(share, groups * in_group, SPLIT):
        group, box = (0, place) if x_state is None else (place // in_group, place % in_group)
        w0, h0, n0 = box % TW * BW, box // TW % TH * BH, box // (TW * TH) * BI
        image, y, x = n0 + r // (BW * BH), h0 + r // BW % BH, w0 + r % BW
        valid = ((image < per_group) & (y < H) & (x < W))[:, None]
        image, n0 = group * per_group + image, group * per_group + n0
        if TMA:
            a = low.load([n0, h0, w0, row]).reshape(BK, BM)  # zeros past the picture silence what high has there
        else:
            pixel = ((image * H + y) * W + x).to(tl.int64)
            a = tl.load(low + pixel[:, None] * L + m[None, :], valid & (m < L)[None, :], 0.0)
        if x_state is not None and SIDE == "low":
            a = applied(a, valid, x_state, group, groups, m, L, BEFORE, BEFORE_SLOPE)
        sums = ()
        for t in tl.static_range(TAPS):
            iy, ix = (2 * y - 1)[:, None] + ky, (2 * x - 1)[:, None] + kx + t
            seen = valid & (iy >= 0) & (iy < 2 * H) & (ix >= 0) & (ix < 2 * W)
            if TMA:
                # The last axis has the channels of two pixels, 2C. Where column + BN > C the box may run into the
                # second one's. Here channels are columns of the product, which do not mix: the mask of the store drops
                # those past C. In `conv` channels are the reduction, where they would be added: hence C % depth == 0.
                half_row, half_column = h0 + (ky + 1) // 2 - 1, w0 + (kx + t + 1) // 2 - 1
                b = high.load([n0, half_row, (ky + 1) % 2, half_column, (kx + t + 1) % 2 * C + column])
                b = b.reshape(BK, BN)
            else:
                above = ((image[:, None] * 2 * H + iy) * 2 * W + ix).to(tl.int64)
                b = tl.load(high + above * C + n[None, :], seen & inside[None, :], 0.0)
            if x_state is not None and SIDE == "high":
                b = applied(b, seen, x_state, group, groups, n, C, BEFORE, BEFORE_SLOPE)
            sums += (tl.dot(a.T, b, accs[t], input_precision=PRECISION),)
        accs = sums

    for t in tl.static_range(TAPS):
        mask = (m < L)[:, None] & inside[None, :]
        tl.store(out + share.to(tl.int64) * (L * 16 * C) + m[:, None] * (16 * C) + f[None, :] + t * C, accs[t], mask)


@triton.jit
def sum_of(shares, out, size, count, block, BLOCK: tl.constexpr, BS: tl.constexpr):
    """out[i] = Σ_s shares[s,i] for the i of a block, BS shares at a time so that their loads are in flight together."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BS, BLOCK), tl.float32)
    for first in range(0, count, BS):
        s = first + tl.arange(0, BS)
        mask = (s < count)[:, None] & (i < size)[None, :]
        total += tl.load(shares + s[:, None].to(tl.int64) * size + i[None, :], mask=mask, other=0.0)
    tl.store(out + i, tl.sum(total, 0), mask=i < size)


@triton.jit
def sum_shares_kernel(
    shares0, out0, size0, count0, shares1, out1, size1, count1,
    shares2, out2, size2, count2, shares3, out3, size3, count3, BLOCK: tl.constexpr, BS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_s shares[s,i], of up to four gradients; None for unused slots.

    Tile: BLOCK elements of one gradient, all their shares.
    Bytes: 4·(shares + 1) per element.
    Accumulates in fp32, in the same order every time.
    Beats atomics by giving the same bits run after run, and one launch per gradient by fewer gaps between launches.
    """
    after_previous(DEPENDENT)
    block = tl.program_id(0)
    blocks = (size0 + BLOCK - 1) // BLOCK
    if block < blocks:
        sum_of(shares0, out0, size0, count0, block, BLOCK, BS)
    if shares1 is not None:
        block, blocks = block - blocks, (size1 + BLOCK - 1) // BLOCK
        if (block >= 0) & (block < blocks):
            sum_of(shares1, out1, size1, count1, block, BLOCK, BS)
    if shares2 is not None:
        block, blocks = block - blocks, (size2 + BLOCK - 1) // BLOCK
        if (block >= 0) & (block < blocks):
            sum_of(shares2, out2, size2, count2, block, BLOCK, BS)
    if shares3 is not None:
        block, blocks = block - blocks, (size3 + BLOCK - 1) // BLOCK
        if (block >= 0) & (block < blocks):
            sum_of(shares3, out3, size3, count3, block, BLOCK, BS)


def prepare_sum_shares(pending: Sequence[Shares]) -> Job:
    """The job of `sum_shares`; see there."""
    launches = []
    for first in range(0, len(pending), SUMS):
        some = pending[first : first + SUMS]
        arguments: dict[str, Any] = {"BLOCK": SUM_BLOCK, "BS": SUM_SHARES}
        for slot in range(SUMS):
            values, gradient = some[slot] if slot < len(some) else (None, None)
            arguments |= {
                f"shares{slot}": values, f"out{slot}": gradient,
                f"size{slot}": 0 if gradient is None else gradient.numel(),
                f"count{slot}": 0 if values is None else len(values),
            }  # fmt: skip
        grid = (sum(cdiv(gradient.numel(), SUM_BLOCK) for _, gradient in some),)
        launches.append(Launch(sum_shares_kernel, grid, arguments))
    return Job(tuple(launches), None)


def sum_shares(pending: Sequence[Shares]) -> None:
    """Add up the shares that `wgrad` left pending, into their gradients, in order; a launch for up to four of them."""
    if pending:
        prepare_sum_shares(pending).run()


def prepare_wgrad(
    low: Tensor | Deferred, high: Tensor | Deferred, precision: str = "ieee", config: WgradConfig | None = None,
    arch: int | None = None, out: Tensor | None = None, pending: list[Shares] | None = None,
) -> Job:  # fmt: skip
    """The job of `wgrad`; see there. The default tile is that of capability `arch` (None: the device's own)."""
    sides = {"low": low, "high": high}
    deferred = [name for name, side in sides.items() if isinstance(side, Deferred)]
    if len(deferred) == 2:
        raise ValueError("low and high are both deferred, but one of them must be a gradient")
    side = deferred[0] if deferred else "low"
    groups, before = groups_of(sides[side]), prologue(sides[side])
    low = check_input("low", low)
    high = check_input("high", high, low)
    images, h, w, rows = low.shape
    channels = high.shape[3]
    check_tensor("high", high, (images, 2 * h, 2 * w, channels), low.dtype, low)
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: accepted are {PRECISIONS}")
    itemsize = low.element_size()
    c = config or wgrad_config(
        images, h, w, rows, channels, itemsize, arch or arch_of(low), on_tensor_cores(low, precision)
    )
    if c.tma and (rows * itemsize % 16 or channels * itemsize % 16):
        raise ValueError(f"tile {c} uses TMA: {rows} and {channels} channels must be multiples of 16 bytes")
    gradient = low.new_empty((rows, 4, 4, channels), dtype=torch.float32) if out is None else out
    check_tensor("out", gradient, (rows, 4, 4, channels), torch.float32, low)
    shares = gradient if c.split == 1 else gradient.new_empty((c.split, *gradient.shape))
    box, flat = (c.images, c.height, c.width), not c.tma and channels < FLAT_CHANNELS
    if c.taps not in ((1,) if flat else (1, 2, 4)):
        raise ValueError(
            f"tile {c}, {channels} channels: taps must be 1, or 2 or 4 if tma or from {FLAT_CHANNELS} channels"
        )
    arguments = {
        "low": box_view(low, tuple(low.shape), (*box, c.rows)) if c.tma else low,
        "high": halves_view(high, box, c.columns) if c.tma else high,
        "out": shares, "per_group": images // groups, "groups": groups, "H": h, "W": w, "L": rows, "C": channels,
        "BI": c.images, "BH": c.height, "BW": c.width, "BM": c.rows, "BN": c.columns, "SPLIT": c.split, "TAPS": c.taps,
        "PRECISION": precision, "TMA": c.tma, "FLAT": flat, "SIDE": side, **before,
    }  # fmt: skip
    blocks = cdiv(16 * channels, c.columns) if flat else 16 // c.taps * cdiv(channels, c.columns)
    tiles = cdiv(rows, c.rows) * blocks
    launches = [Launch(wgrad_kernel, (c.split * tiles,), arguments, c.warps, c.stages)]
    if c.split > 1:
        left = [Shares(shares, gradient)]
        if pending is None:
            launches += prepare_sum_shares(left).launches
        else:
            pending += left
    return Job(tuple(launches), gradient)


def wgrad(
    low: Tensor | Deferred, high: Tensor | Deferred, precision: str = "ieee", config: WgradConfig | None = None,
    out: Tensor | None = None, pending: list[Shares] | None = None,
) -> Tensor:  # fmt: skip
    """Weight gradient of a k4 s2 p1 convolution or transposed convolution.

    Args:
        low: (N, H, W, L): a convolution's output gradient, or a transposed convolution's input.
        high: (N, 2H, 2W, C) of low's dtype: a convolution's input, or a transposed convolution's output gradient. The
            input of either may be `Deferred`, a map before its batch norm and activation.
        precision, config: as for `conv`.
        out: where the result goes; None: a new tensor.
        pending: takes what is left to be added up for it, by one `sum_shares` for several gradients; None:
            that is done here.

    Returns:
        (L, 4, 4, C) float32, the packed weight's layout; permuted by (0, 3, 1, 2) it is the parameter's gradient, of
        Conv2d and of ConvTranspose2d alike.

    Raises:
        ValueError: a shape, dtype, layout or configuration that does not fit, by name.
    """
    return prepare_wgrad(low, high, precision, config, out=out, pending=pending).run()
