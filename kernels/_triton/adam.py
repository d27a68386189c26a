"""Adam over every tensor of a network in one launch, which also leaves the 16-bit weights that the GEMMs read.

Tensors are found through a table of addresses, so parameters stay where their modules keep them, and a CUDA graph may
replay the launch for as long as they do. The step is counted on the device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.launch import Job, Launch

BLOCK = 1024
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def count_kernel(counter, by):
    """counter ← counter + by, before the launch that reads it.

    Tile: one number; one program.
    Bytes: 16.
    Counts in the counter's own dtype.
    Beats a count on the host, which a CUDA graph would replay as a constant.
    """
    tl.store(counter, tl.load(counter) + by)


@triton.jit
def adam_kernel(
    table, blocks, step, lr, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr,
    EPS: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m ← β1·m + (1−β1)·g; v ← β2·v + (1−β2)·g²; p ← p − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε); copy ← p in 16 bits.

    Tile: BLOCK elements of one tensor; `blocks` says of which, and from where on.
    Bytes: 30 an element: p, m, v read and written, g read, the copy written.
    Computes in fp32; the bias corrections in fp64, since 1 − 0.999ᵗ in fp32 has four digits at t = 1.
    Beats a launch a tensor, and the cast of every weight that would follow.
    """
    pid = tl.program_id(0)
    row = table + tl.load(blocks + 2 * pid) * 6
    first = tl.multiple_of(tl.load(blocks + 2 * pid + 1), 16)
    p, g = address(tl.load(row), tl.float32) + first, address(tl.load(row + 1), tl.float32) + first
    m, v = address(tl.load(row + 2), tl.float32) + first, address(tl.load(row + 3), tl.float32) + first
    copy_at, left = tl.load(row + 4), tl.load(row + 5) - first
    copy = address(copy_at, COPY) + first
    t = tl.load(step).to(tl.float64)
    rate = (lr / (1 - tl.exp(t * LOG1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(t * LOG2)).to(tl.float32)
    if left >= BLOCK:  # without a mask, which would keep the compiler from 16-byte loads
        update(p, g, m, v, copy, copy_at, None, rate, root, BETA1, BETA2, EPS, COPY, BLOCK)
    else:
        mask = tl.arange(0, BLOCK) < left
        update(p, g, m, v, copy, copy_at, mask, rate, root, BETA1, BETA2, EPS, COPY, BLOCK)


@triton.jit
def address(number, TYPE: tl.constexpr):
    """The pointer that an int64 of the table is."""
    return tl.multiple_of(number.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def update(
    p, g, m, v, copy, copy_at, mask, rate, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements of one program."""
    i = tl.arange(0, BLOCK)
    grad, old = tl.load(g + i, mask=mask), tl.load(m + i, mask=mask)
    first = old + (1 - BETA1) * (grad - old)
    second = tl.load(v + i, mask=mask) * BETA2 + (1 - BETA2) * grad * grad
    new = tl.load(p + i, mask=mask) - rate * (first / (tl.sqrt_rn(second) / root + EPS))
    tl.store(m + i, first, mask=mask)
    tl.store(v + i, second, mask=mask)
    tl.store(p + i, new, mask=mask)
    if copy_at != 0:
        tl.store(copy + i, new.to(COPY), mask=mask)


@dataclass(frozen=True)
class AdamTable:
    """Where the tensors are: made once, on the host, and valid until one of them moves.

    addresses: (tensors, 6) int64: of p, g, m, v and the copy (0 for none), and the number of elements.
    blocks: (programs, 2) int64: each program's tensor and first element.
    copy_dtype: of the copies.
    tensors: what the addresses point to, kept alive.
    """

    addresses: Tensor
    blocks: Tensor
    copy_dtype: torch.dtype
    tensors: tuple[Tensor, ...]


def adam_table(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
) -> AdamTable:  # fmt: skip
    """The table of `adam`.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: float32, on one device, dense; of equal strides, since elements are
            paired as they lie in memory.
        copies: for each parameter None, or a bfloat16 or float16 tensor of its shape and strides. For a convolution's
            weight in channels_last memory this is the packed weight of the GEMMs, seen from the parameter's side.

    Raises:
        ValueError: a tensor that does not fit its parameter, by name and index.
    """
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "copies": copies}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors: expected {len(params)}, one a parameter")
    if not params:
        raise ValueError("params is empty: there is nothing to update")
    copy_dtypes = {c.dtype for c in copies if c is not None} or {torch.bfloat16}
    if len(copy_dtypes) > 1 or not copy_dtypes <= set(NAMES):
        raise ValueError(f"copies are of {copy_dtypes}: accepted are all bfloat16 or all float16")
    rows, blocks = [], []
    for index, group in enumerate(zip(*lists.values(), strict=True)):
        p = group[0]
        for name, t in zip(lists, group, strict=True):
            if t is None:
                continue
            _check_fits(f"{name}[{index}]", t, p, t.dtype if name == "copies" else torch.float32)
        if p.untyped_storage().size() < p.numel() * 4 or not _is_dense(p):
            raise ValueError(f"params[{index}] has strides {p.stride()}: it must be dense, without gaps or overlap")
        rows.append([t.data_ptr() if t is not None else 0 for t in group] + [p.numel()])
        blocks += [[index, first] for first in range(0, p.numel(), BLOCK)]
    device = params[0].device
    keep = tuple(t for tensors in lists.values() for t in tensors if t is not None)
    return AdamTable(torch.tensor(rows, device=device), torch.tensor(blocks, device=device), copy_dtypes.pop(), keep)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory."""
    pairs = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def _check_fits(name: str, t: Tensor, p: Tensor, dtype: torch.dtype) -> None:
    if t.dtype != dtype or t.device != p.device:
        raise ValueError(f"{name} is {t.dtype} on {t.device}: expected {dtype} on {p.device}")
    places = [(s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    if t.shape != p.shape or places != [(s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1]:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} and strides {t.stride()}: expected its parameter's, "
            f"{tuple(p.shape)} and {p.stride()}"
        )
    if t.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {t.data_ptr():#x}: it must be 16-byte aligned")


def prepare_adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8
) -> Job:
    """The job of `adam`; see there."""
    if step.dtype != torch.int64 or step.ndim:
        raise ValueError(f"step is {step.dtype} of shape {tuple(step.shape)}: expected int64 of shape ()")
    if not 0 < betas[0] < 1 or not 0 < betas[1] < 1:
        raise ValueError(f"betas is {betas}: both must lie between 0 and 1")
    arguments = {
        "table": table.addresses, "blocks": table.blocks, "step": step, "lr": float(lr), "BETA1": float(betas[0]),
        "BETA2": float(betas[1]), "LOG1": math.log(betas[0]), "LOG2": math.log(betas[1]), "EPS": float(eps),
        "COPY": NAMES[table.copy_dtype], "BLOCK": BLOCK,
    }  # fmt: skip
    count = Launch(count_kernel, (1,), {"counter": step, "by": 1}, warps=1)
    return Job((count, Launch(adam_kernel, (len(table.blocks),), arguments)), None)


def adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8
) -> None:
    """One step of Adam (Kingma and Ba 2015, algorithm 1), in place, as torch.optim.Adam takes it without weight decay.

    Args:
        table: of `adam_table`.
        step: () int64 on the device: updates done so far; grows by one.
        lr, betas, eps: the usual; a CUDA graph keeps those of its capture.
    """
    prepare_adam(table, step, lr, betas, eps).run()
