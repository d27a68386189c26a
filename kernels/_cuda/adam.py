"""Adam by the extension, over every tensor of a network in one launch; csrc/adam.cu.

Tensors are found through a table of addresses, so parameters stay where their modules keep them, and a CUDA graph may
replay the launch for as long as they do. The step is counted on the device, where float16's loss scale moves too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.launch import DTYPES
from kernels.arguments import BACKOFF, GROWTH, INTERVAL, AdamTable, check_update, table_of

BLOCK = 2048
"""Elements of a block, as in csrc/adam.h."""


def adam_table(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor | None],
) -> AdamTable:  # fmt: skip
    """The table of `adam`; arguments and errors as `kernels.arguments.table_of`'s."""
    return table_of(BLOCK, params, grads, exp_avgs, exp_avg_sqs, copies)


def adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8,
    loss_scale: Tensor | None = None, move_scale: bool = True,
) -> None:  # fmt: skip
    """One step of Adam, in place; arguments and errors as `kernels._triton.adam.adam`'s."""
    check_update(table, step, betas, loss_scale)
    _launch.launch(
        "adam", table.addresses, table.blocks, step, table.flags, loss_scale, len(table.blocks),
        DTYPES[table.copy_dtype], int(step.dtype == torch.float32), int(move_scale), float(lr), *map(float, betas),
        float(eps), GROWTH, BACKOFF, float(INTERVAL),
    )  # fmt: skip
