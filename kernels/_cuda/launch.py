"""Argument checks of the extension's launchers, and the way into its ops."""

import functools

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/common.h."""

SLOPES = {"none": 1.0, "relu": 0.0}


def launch(op: str, *arguments) -> None:
    """Run an op of the extension on the current stream of its tensors' device."""
    getattr(torch.ops.dcgan_cuda, op).default(*arguments)


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


@functools.cache
def _tickets(device: torch.device, stream: int, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32, device=device)


def tickets(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros, which every launch leaves as zeros: so all launches of a stream share them."""
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    return _tickets(like.device, stream, max(4096, 1 << (count - 1).bit_length()))
