"""Images of a step from a dataset on the device: by a permutation, mirrored where asked, scaled to [-1, 1], NHWC."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import cdiv
from kernels._triton.dependent import after_previous
from kernels._triton.launch import DTYPES, Job, Launch
from kernels._triton.ticket import last_program
from kernels.arguments import check_ticket
from kernels.geometry import check_tensor

BLOCK = 2048


@triton.jit
def gather_kernel(
    rows, permutation, cursor, flip, out, ticket, length,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[n,y,x,c] = rows[permutation[k], y, flip[k] ? W−1−x : x, c] · 2/255 − 1 with k = (cursor + n) mod length.

    Tile: BLOCK elements of one image; the last program to finish moves the cursor.
    Bytes: 1 per element read, 2 or 4 written.
    Computes in fp32, rounded once.
    Beats a gather, a flip, a cast, a scale and a permute: one kernel, and the host sends nothing.
    """
    after_previous(DEPENDENT)
    n = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x, c = i // (W * CO), i // CO % W, i % CO
    taken = tl.load(cursor)
    place = (taken + n) % length
    source = tl.load(permutation + place)
    if flip is not None:
        x = tl.where(tl.load(flip + place) != 0, W - 1 - x, x)
    inside = i < H * W * CO
    pixel = tl.load(rows + source * (H * W * C) + (y * W + x) * C + c, mask=inside & (c < C), other=0)
    value = tl.where(c < C, pixel.to(tl.float32) * (2 / 255) - 1, 0.0)
    tl.store(out + n.to(tl.int64) * (H * W * CO) + i, value.to(out.dtype.element_ty), mask=inside)
    if last_program(ticket, tl.num_programs(0) * tl.num_programs(1)):
        tl.store(cursor, taken + tl.num_programs(0))


def prepare_gather(
    rows: Tensor, permutation: Tensor, cursor: Tensor, batch: int, flip: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16, channels: int | None = None, ticket: Tensor | None = None,
    out: Tensor | None = None,
) -> Job:  # fmt: skip
    """The job of `gather`; see there."""
    if rows.ndim != 4 or rows.dtype != torch.uint8 or not rows.is_contiguous():
        raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}: expected contiguous uint8 (rows, H, W, C)")
    count, height, width, into = rows.shape
    channels = into if channels is None else channels
    if batch < 1 or channels < into or not count:
        raise ValueError(f"batch is {batch} and channels {channels} for {count} rows of {into} channels: too few")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}: accepted are bfloat16, float16 and float32")
    if permutation.ndim != 1 or not len(permutation):
        raise ValueError(f"permutation has shape {tuple(permutation.shape)}: expected (length,), not empty")
    check_tensor("permutation", permutation, (len(permutation),), torch.int64, rows)
    check_tensor("cursor", cursor, (), torch.int64, rows)
    if flip is not None:
        check_tensor("flip", flip, (len(permutation),), torch.uint8, rows)
    shape = (batch, height, width, channels)
    out = rows.new_empty(shape, dtype=dtype) if out is None else out
    check_tensor("out", out, shape, dtype, rows)
    arguments = {
        "rows": rows, "permutation": permutation, "cursor": cursor, "flip": flip, "out": out,
        "ticket": check_ticket(ticket, rows), "length": len(permutation), "H": height, "W": width, "C": into,
        "CO": channels, "BLOCK": BLOCK,
    }  # fmt: skip
    grid = (batch, cdiv(height * width * channels, BLOCK))
    return Job((Launch(gather_kernel, grid, arguments),), out)


def gather(
    rows: Tensor, permutation: Tensor, cursor: Tensor, batch: int, flip: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16, channels: int | None = None, ticket: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The next `batch` images of an epoch, as a network reads them.

    Args:
        rows: the dataset (rows, H, W, C) uint8, on the device.
        permutation: the epoch's order (length,) int64, of row numbers. Not checked: the kernel trusts them.
        cursor: () int64 on the device: images taken so far; grows by `batch`, and wraps around `length`.
        batch: images.
        flip: (length,) uint8, by place in the permutation: not 0 mirrors the image left to right; None: no image.
        dtype: of the result.
        channels: of the result; those past C are zeros (four make an RGB pixel one 8-byte load).
        ticket: (1,) int32 zero, kept by the caller; None: one that the stream's launches share.
        out: where the result goes; None: a new tensor.

    Returns:
        (batch, H, W, channels) in [-1, 1].
    """
    return prepare_gather(rows, permutation, cursor, batch, flip, dtype, channels, ticket, out).run()
