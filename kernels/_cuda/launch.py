"""Argument checks of the extension's launchers, and the way into its ops."""

import torch
from torch import Tensor

from kernels import dependent

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/common.h."""

SLOPES = {"none": 1.0, "relu": 0.0}


def launch(op: str, *arguments) -> None:
    """Run an op of the extension on the current stream of its tensors' device; as `kernels.dependent` says."""
    getattr(torch.ops.dcgan_cuda, op).default(*arguments, dependent=dependent.asked())


def slope_of(activation: str, slope: float) -> float:
    """The slope below zero that (leaky) ReLU or no activation amounts to.

    Raises:
        ValueError: any other.
    """
    if activation == "leaky_relu":
        return float(slope)
    if activation not in SLOPES:
        raise ValueError(f"activation is {activation!r}: after batch norm, accepted are none, relu and leaky_relu")
    return SLOPES[activation]


def vector_of(tensor: Tensor, channels: int) -> int:
    """Elements of a thread's access: 16 bytes, or one where the channels leave rows unaligned."""
    wide = 16 // tensor.element_size()
    return wide if channels % wide == 0 else 1


_TICKETS: dict[tuple[torch.device, int, int], Tensor] = {}


def tickets(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros, which every launch leaves as zeros: so all launches of a stream share them."""
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    size = max(4096, 1 << (count - 1).bit_length())
    key = like.device, stream, size
    if key in _TICKETS:
        return _TICKETS[key]
    made = torch.zeros(size, dtype=torch.int32, device=like.device)
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):  # else zero in that graph's replays alone
        _TICKETS[key] = made
    return made
