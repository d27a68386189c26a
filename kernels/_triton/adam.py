"""Adam over every tensor of a network in one launch, which also leaves the 16-bit weights that the GEMMs read.

Tensors are found through a table of addresses, so parameters stay where their modules keep them, and a CUDA graph may
replay the launch for as long as they do. The step is counted on the device, where float16's loss scale moves too.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.dependent import after_previous
from kernels._triton.launch import Job, Launch
from kernels._triton.ticket import last_program
from kernels.arguments import BACKOFF, GROWTH, INTERVAL, AdamTable, check_update, table_of

BLOCK = 1024
NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def overflow_kernel(table, blocks, flags, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """flags[1] ← 1 where any gradient is infinite or NaN.

    Tile: BLOCK elements of one tensor, as in `adam_kernel`.
    Bytes: 4 per element.
    Only compares.
    Beats a pass per tensor and a read-back by the host; only a float16 step, whose gradients are scaled, pays for it.
    """
    after_previous(DEPENDENT)
    pid = tl.program_id(0)
    row = table + tl.load(blocks + 2 * pid) * 6
    first = tl.multiple_of(tl.load(blocks + 2 * pid + 1), 16)
    i = tl.arange(0, BLOCK)
    grad = tl.load(address(tl.load(row + 1), tl.float32) + first + i, mask=i < tl.load(row + 5) - first, other=0.0)
    if tl.sum(tl.where(tl.abs(grad) < float("inf"), 0, 1), 0) > 0:
        tl.store(flags + 1, 1)  # whoever stores it, stores the same


@triton.jit
def adam_kernel(
    table, blocks, step, loss_scale, flags, lr, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr,
    LOG2: tl.constexpr, EPS: tl.constexpr, COPY: tl.constexpr, MOVE_SCALE: tl.constexpr, GROWTH: tl.constexpr,
    BACKOFF: tl.constexpr, INTERVAL: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """m ← β1·m + (1−β1)·g; v ← β2·v + (1−β2)·g²; p ← p − lr/(1−β1ᵗ) · m / (√v/√(1−β2ᵗ) + ε); copy ← p in 16 bits.

    Tile: BLOCK elements of one tensor; `blocks` says of which, and from where on. The last program to finish counts the
        step, and moves the loss scale.
    Bytes: 30 per element: p, m, v read and written, g read, the copy written.
    Computes in fp32; the bias corrections in fp64, since 1 − 0.999ᵗ in fp32 has four digits at t = 1.
    Beats one launch per tensor, and the cast of every weight that would follow.
    """
    after_previous(DEPENDENT)
    pid = tl.program_id(0)
    row = table + tl.load(blocks + 2 * pid) * 6
    first = tl.multiple_of(tl.load(blocks + 2 * pid + 1), 16)
    p, g = address(tl.load(row), tl.float32) + first, address(tl.load(row + 1), tl.float32) + first
    m, v = address(tl.load(row + 2), tl.float32) + first, address(tl.load(row + 3), tl.float32) + first
    copy_at, left = tl.load(row + 4), tl.load(row + 5) - first
    copy = address(copy_at, COPY) + first
    before = tl.load(step)
    t = (before + 1).to(tl.float64)
    rate = (lr / (1 - tl.exp(t * LOG1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp(t * LOG2)).to(tl.float32)
    unscale, sound = 1.0, True
    if loss_scale is not None:
        unscale, sound = tl.div_rn(1.0, tl.load(loss_scale)), tl.load(flags + 1) == 0
    if sound:
        if left >= BLOCK:  # without a mask, which would keep the compiler from 16-byte loads
            update(p, g, m, v, copy, copy_at, None, rate, root, unscale, BETA1, BETA2, EPS, COPY, BLOCK)
        else:
            mask = tl.arange(0, BLOCK) < left
            update(p, g, m, v, copy, copy_at, mask, rate, root, unscale, BETA1, BETA2, EPS, COPY, BLOCK)
    if last_program(flags, tl.num_programs(0)):
        if sound:
            tl.store(step, before + 1)
        if loss_scale is not None:
            move_scale(loss_scale, sound, MOVE_SCALE, GROWTH, BACKOFF, INTERVAL)
            tl.store(flags + 1, 0)


@triton.jit
def move_scale(
    loss_scale, sound, MOVE: tl.constexpr, GROWTH: tl.constexpr, BACKOFF: tl.constexpr, INTERVAL: tl.constexpr
):
    """Scale, good steps and overflows after an update; with MOVE as torch.amp.GradScaler.update moves them."""
    scale, good = tl.load(loss_scale), tl.load(loss_scale + 1)
    overflows = tl.load(loss_scale + 2) + tl.where(sound, 0.0, 1.0)
    if MOVE:
        good = tl.where(overflows == 0, good + 1, 0.0)
        larger = tl.where(scale * GROWTH < float("inf"), scale * GROWTH, scale)
        scale = tl.where(overflows > 0, scale * BACKOFF, tl.where(good == INTERVAL, larger, scale))
        tl.store(loss_scale, scale)
        tl.store(loss_scale + 1, tl.where(good == INTERVAL, 0.0, good))
        overflows = 0.0
    tl.store(loss_scale + 2, overflows)


@triton.jit
def address(number, TYPE: tl.constexpr):
    """The pointer that an int64 of the table is."""
    return tl.multiple_of(number.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def update(
    p, g, m, v, copy, copy_at, mask, rate, root, unscale, BETA1: tl.constexpr, BETA2: tl.constexpr,
    EPS: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements of one program."""
    i = tl.arange(0, BLOCK)
    grad, old = tl.load(g + i, mask=mask) * unscale, tl.load(m + i, mask=mask)
    first = old + (1 - BETA1) * (grad - old)
    second = tl.load(v + i, mask=mask) * BETA2 + (1 - BETA2) * grad * grad
    new = tl.load(p + i, mask=mask) - rate * (first / (tl.sqrt_rn(second) / root + EPS))
    tl.store(m + i, first, mask=mask)
    tl.store(v + i, second, mask=mask)
    tl.store(p + i, new, mask=mask)
    if copy_at != 0:
        tl.store(copy + i, new.to(COPY), mask=mask)


def adam_table(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
) -> AdamTable:  # fmt: skip
    """The table of `adam`; arguments and errors as `kernels.arguments.table_of`'s."""
    return table_of(BLOCK, params, grads, exp_avgs, exp_avg_sqs, copies)


def prepare_adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8,
    loss_scale: Tensor | None = None, move_scale: bool = True,
) -> Job:  # fmt: skip
    """The job of `adam`; see there."""
    check_update(table, step, betas, loss_scale)
    arguments = {
        "table": table.addresses, "blocks": table.blocks, "step": step, "loss_scale": loss_scale, "flags": table.flags,
        "lr": float(lr), "BETA1": float(betas[0]), "BETA2": float(betas[1]), "LOG1": logarithm(betas[0]),
        "LOG2": logarithm(betas[1]), "EPS": float(eps), "COPY": NAMES[table.copy_dtype],
        "MOVE_SCALE": move_scale and loss_scale is not None, "GROWTH": GROWTH, "BACKOFF": BACKOFF,
        "INTERVAL": INTERVAL, "BLOCK": BLOCK,
    }  # fmt: skip
    grid = (len(table.blocks),)
    launches = [Launch(adam_kernel, grid, arguments)]
    if loss_scale is not None:
        look = {name: arguments[name] for name in ("table", "blocks", "flags", "BLOCK")}
        launches.insert(0, Launch(overflow_kernel, grid, look))
    return Job(tuple(launches), None)


def logarithm(beta: float) -> float:
    """log β; for β = 0 a large negative number, so that every power βᵗ is 0."""
    return math.log(beta) if beta else -1e9


def adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8,
    loss_scale: Tensor | None = None, move_scale: bool = True,
) -> None:  # fmt: skip
    """One step of Adam (Kingma and Ba 2015, algorithm 1), in place, as torch.optim.Adam takes it without weight decay.

    Args:
        table: of `adam_table`.
        step: () int64, or float32 as torch.optim.Adam keeps it, on the device: updates done so far; grows by one,
            unless the update is skipped.
        lr, betas, eps: the usual; a CUDA graph keeps those of its capture.
        loss_scale: (3,) float32 on the device: the factor that the gradients carry, the steps since it moved, and the
            overflows since then; None: no scale. With it a first launch looks at every gradient: if one is infinite
            or NaN the update is skipped, else it takes gradients / scale, and the stored ones stay as they are.
        move_scale: whether the scale then moves: halved after an overflow, doubled after 2000 steps without, as in
            torch.amp.GradScaler. False for all but the last of the networks that share a scale in a step.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    prepare_adam(table, step, lr, betas, eps, loss_scale, move_scale).run()
