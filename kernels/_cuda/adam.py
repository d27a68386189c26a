"""Adam by the extension, over every tensor of a network in one launch; csrc/adam.cu.

Tensors are found through a table of addresses, so parameters stay where their modules keep them, and a CUDA graph may
replay the launch for as long as they do. The step is counted on the device, where float16's loss scale moves too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.launch import DTYPES

BLOCK = 2048
"""Elements of a block, as in csrc/adam.h."""
GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000.0  # torch.amp.GradScaler's defaults


@dataclass(frozen=True)
class AdamTable:
    """Where the tensors are: made once, on the host, and valid until one of them moves.

    addresses: (tensors, 6) int64: of p, g, m, v and the copy (0 for none), and the number of elements.
    blocks: (programs, 2) int64: each block's tensor and first element.
    copy_dtype: of the copies.
    flags: (2,) int32: a ticket, and whether a gradient overflowed; both 0 between launches.
    tensors: what the addresses point to, kept alive.
    """

    addresses: Tensor
    blocks: Tensor
    copy_dtype: torch.dtype
    flags: Tensor
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
    if len(copy_dtypes) > 1 or not copy_dtypes <= {torch.bfloat16, torch.float16}:
        raise ValueError(f"copies are of {copy_dtypes}: accepted are all bfloat16 or all float16")
    device = params[0].device
    rows, blocks = [], []
    for index, group in enumerate(zip(*lists.values(), strict=True)):
        p = group[0]
        for name, t in zip(lists, group, strict=True):
            if t is not None:
                _check_fits(f"{name}[{index}]", t, p, t.dtype if name == "copies" else torch.float32, device)
        if not _is_dense(p):
            raise ValueError(f"params[{index}] has strides {p.stride()}: it must be dense, without gaps or overlap")
        rows.append([t.data_ptr() if t is not None else 0 for t in group] + [p.numel()])
        blocks += [[index, first] for first in range(0, p.numel(), BLOCK)]
    keep = tuple(t for tensors in lists.values() for t in tensors if t is not None)
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    made = torch.tensor(rows, device=device), torch.tensor(blocks, device=device)
    return AdamTable(*made, copy_dtypes.pop(), flags, keep)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory."""
    pairs = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def _check_fits(name: str, t: Tensor, p: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.dtype != dtype or t.device != device:
        raise ValueError(f"{name} is {t.dtype} on {t.device}: expected {dtype} on {device}")
    places = [(s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    if t.shape != p.shape or places != [(s, n) for s, n in zip(p.stride(), p.shape, strict=True) if n > 1]:
        raise ValueError(
            f"{name} has shape {tuple(t.shape)} and strides {t.stride()}: expected its parameter's, "
            f"{tuple(p.shape)} and {p.stride()}"
        )
    if t.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {t.data_ptr():#x}: it must be 16-byte aligned")


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
            overflows since then; none where None. With it a launch more looks at every gradient first: where one is
            infinite or NaN the update is skipped, else it takes gradients / scale, the stored ones staying as they are.
        move_scale: then let the scale move: halved after an overflow, doubled after 2000 steps without, as
            torch.amp.GradScaler. False for all but the last network of a step that share a scale.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    if step.dtype not in (torch.int64, torch.float32) or step.ndim:
        raise ValueError(f"step is {step.dtype} of shape {tuple(step.shape)}: expected int64 or float32 of shape ()")
    if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
        raise ValueError(f"betas is {betas}: accepted are 0 to 1, without 1")
    if loss_scale is not None and (loss_scale.dtype != torch.float32 or loss_scale.shape != (3,)):
        raise ValueError(f"loss_scale is {loss_scale.dtype} of shape {tuple(loss_scale.shape)}: expected float32 (3,)")
    for name, tensor in (("step", step), ("loss_scale", loss_scale)):
        if tensor is not None and tensor.device != table.flags.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {table.flags.device}")
    _launch.launch(
        "adam", table.addresses, table.blocks, step, table.flags, loss_scale, len(table.blocks),
        DTYPES[table.copy_dtype], int(step.dtype == torch.float32), int(move_scale), float(lr), *map(float, betas),
        float(eps), GROWTH, BACKOFF, INTERVAL,
    )  # fmt: skip
