"""What the launchers of both GPU backends ask of their arguments, and the tables and tickets they hand to a device.

A check returns the sizes that its launcher goes on with, and raises a ValueError that names the argument, says what was
given and what is accepted. `kernels.geometry` has the checks of a single tensor; `kernels.checks` those of the public
ops, which come first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.geometry import DTYPES, Merge, MergeGradients, Partials, check_nhwc, check_tensor

MOST_GROUPS = 31
"""Groups of D's head: their targets are the bits of one int32."""

GROWTH, BACKOFF, INTERVAL = 2.0, 0.5, 2000
"""How float16's loss scale moves: torch.amp.GradScaler's defaults."""


# Tickets

_TICKETS: dict[tuple[torch.device, int, int], Tensor] = {}


def tickets(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros, which every launch leaves as zeros: so all launches of a stream share them.

    Two CUDA graphs captured on one stream share them too, and must not be replayed at the same time.
    """
    if like.device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device="meta")
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    size = max(4096, 1 << (count - 1).bit_length())
    key = like.device, stream, size
    if key in _TICKETS:
        return _TICKETS[key]
    made = torch.zeros(size, dtype=torch.int32, device=like.device)
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):  # else that graph's own, zeroed by its replays
        _TICKETS[key] = made
    return made


def check_ticket(ticket: Tensor | None, like: Tensor) -> Tensor:
    """`ticket`, (1,) int32 beside `like`, or, if None, one of the stream's."""
    if ticket is None:
        return tickets(like, 1)[:1]
    if ticket.dtype != torch.int32 or ticket.shape != (1,) or ticket.device != like.device:
        raise ValueError(
            f"ticket is {ticket.dtype} {tuple(ticket.shape)} on {ticket.device}: "
            f"expected int32 (1,) on {like.device}, zero before its first use"
        )
    return ticket


# Batch norm


def rows_of(name: str, tensor: Tensor, groups: int) -> int:
    """Pixels of one group of (N, H, W, C)."""
    check_nhwc(name, tensor)
    images = tensor.shape[0]
    if groups < 1 or images % groups:
        raise ValueError(f"groups is {groups}: it must divide the batch of {images}")
    return images // groups * tensor.shape[1] * tensor.shape[2]


def check_activation(activation: str) -> None:
    """Raise ValueError if it cannot follow batch norm."""
    if activation not in ("none", "relu", "leaky_relu"):
        raise ValueError(f"activation is {activation!r}: after batch norm, accepted are none, relu and leaky_relu")


def check_statistics(
    partials: Partials, vectors: dict[str, Tensor | None], tracked: Tensor | None, rows: int | None
) -> tuple[int, int, int]:
    """Groups, tiles and channels of what `merge_statistics` merges; `vectors` has weight, bias, running_mean and
    running_var."""
    _, groups, tiles, channels = partials.values.shape
    if rows == 1:
        raise ValueError("a group has 1 value per channel: training-mode batch norm needs at least 2")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_mean and running_var: give both or neither")
    check_tensor("partials.values", partials.values, (2, groups, tiles, channels), torch.float32, None)
    if partials.counts is None:
        raise ValueError("partials.counts is None: these are a gradient's sums, not statistics")
    check_tensor("partials.counts", partials.counts, (groups, tiles), torch.float32, partials.values)
    for name, vector in vectors.items():
        if vector is not None:
            check_tensor(name, vector, (channels,), torch.float32, partials.values)
    if tracked is not None:
        check_tensor("tracked", tracked, (), torch.int64, partials.values)
    return groups, tiles, channels


def check_merge(merge: Merge | MergeGradients, channels: int, like: Tensor) -> None:
    """The tensors of an epilogue's `merge`, beside `like`."""
    for name, tensor in merge._asdict().items():
        if name == "tracked" and tensor is not None:
            check_tensor("merge.tracked", tensor, (), torch.int64, like)
        elif name not in ("tracked", "eps", "momentum") and tensor is not None:
            check_tensor(f"merge.{name}", tensor, (channels,), torch.float32, like)


def check_sums(partials: Partials, rows: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Where `merge_sums` writes: the gradients of weight and bias (C,), `out` where given, and the means
    (2, groups, C)."""
    _, groups, tiles, channels = partials.values.shape
    check_tensor("partials.values", partials.values, (2, groups, tiles, channels), torch.float32, None)
    if rows < 1:
        raise ValueError(f"rows is {rows}: a group has at least 1 pixel")
    means = partials.values.new_empty((2, groups, channels))
    dweight, dbias = (means.new_empty(channels), means.new_empty(channels)) if out is None else out
    for name, gradient in (("out[0]", dweight), ("out[1]", dbias)):
        check_tensor(name, gradient, (channels,), torch.float32, means)
    return dweight, dbias, means


# D's head


def check_head(y: Tensor, weight: Tensor, state: Tensor, activation: str) -> tuple[int, int, int, int]:
    """Images of a group, groups, pixels and channels."""
    check_nhwc("y", y)
    images, height, width, channels = y.shape
    check_tensor("weight", weight, (1, height, width, channels), y.dtype, y)
    groups = state.shape[1]
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    if not 1 <= groups <= MOST_GROUPS or images % groups:
        raise ValueError(f"state is of {groups} groups: they must divide the batch of {images}, and be at most 31")
    check_activation(activation)
    return images // groups, groups, height * width, channels


def check_scale(scale: Tensor | None, like: Tensor) -> None:
    """Raise ValueError if the scale of D's loss does not fit."""
    if scale is not None and (scale.dtype != torch.float32 or not scale.numel() or scale.device != like.device):
        got = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        raise ValueError(f"scale is {got}: expected float32 on {like.device}, its first element the scale")


def check_logits(logits: Tensor, real: Sequence[bool]) -> tuple[int, int]:
    """Logits of a group, and groups."""
    if logits.ndim != 1 or not logits.is_contiguous() or not _served(logits) or not len(logits):
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}: expected contiguous (N,) "
            "bfloat16, float16 or float32, not empty"
        )
    groups = len(real)
    if not 1 <= groups <= MOST_GROUPS or len(logits) % groups:
        raise ValueError(f"real has {groups} entries: they must divide the {len(logits)} logits, and be at most 31")
    return len(logits) // groups, groups


def _served(tensor: Tensor) -> bool:
    return str(tensor.dtype).removeprefix("torch.") in DTYPES


def real_bits(real: Sequence[bool], groups: int) -> int:
    """Bit g says whether group g's target is 1."""
    if len(real) != groups:
        raise ValueError(f"real has {len(real)} entries: expected {groups}, one per group")
    return sum(1 << group for group, is_real in enumerate(real) if is_real)


# Adam


@dataclass(frozen=True)
class AdamTable:
    """Where the tensors of an update are: made once, on the host, and valid until one of them moves.

    addresses: (tensors, 6) int64: of p, g, m, v and the copy (0 for none), and the number of elements.
    blocks: (programs, 2) int64: each program's tensor and first element.
    copy_dtype: of the copies.
    flags: (2,) int32: a ticket, and whether a gradient overflowed; both 0 between launches.
    tensors: what the addresses point to, kept alive.
    """

    addresses: Tensor
    blocks: Tensor
    copy_dtype: torch.dtype
    flags: Tensor
    tensors: tuple[Tensor, ...]


def table_of(
    block: int, params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor], copies: Sequence[Tensor | None],
) -> AdamTable:  # fmt: skip
    """The table of an update.

    Args:
        block: elements of one program.
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
            raise ValueError(f"{name} has {len(tensors)} tensors: expected {len(params)}, one per parameter")
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
        if p.untyped_storage().size() < p.numel() * p.itemsize or not _is_dense(p):
            raise ValueError(f"params[{index}] has strides {p.stride()}: it must be dense, without gaps or overlap")
        rows.append([t.data_ptr() if t is not None else 0 for t in group] + [p.numel()])
        blocks += [[index, first] for first in range(0, p.numel(), block)]
    keep = tuple(t for tensors in lists.values() for t in tensors if t is not None)
    flags = torch.zeros(2, dtype=torch.int32, device=device)
    made = torch.tensor(rows, device=device), torch.tensor(blocks, device=device)
    return AdamTable(*made, copy_dtypes.pop(), flags, keep)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
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


def check_update(table: AdamTable, step: Tensor, betas: tuple[float, float], loss_scale: Tensor | None) -> None:
    """The other arguments of `adam`."""
    if step.dtype not in (torch.int64, torch.float32) or step.ndim:
        raise ValueError(f"step is {step.dtype} of shape {tuple(step.shape)}: expected int64 or float32 of shape ()")
    if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
        raise ValueError(f"betas is {betas}: accepted are 0 to 1, without 1")
    if loss_scale is not None and (loss_scale.dtype != torch.float32 or loss_scale.shape != (3,)):
        raise ValueError(f"loss_scale is {loss_scale.dtype} of shape {tuple(loss_scale.shape)}: expected float32 (3,)")
    for name, tensor in (("step", step), ("loss_scale", loss_scale)):
        if tensor is not None and tensor.device != table.flags.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {table.flags.device}")
