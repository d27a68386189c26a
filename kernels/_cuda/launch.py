"""Argument checks of the extension's launchers, and the way into its ops."""

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


def check_nhwc(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: not four-dimensional, not contiguous as (N, H, W, C), empty, not 16-byte aligned, or of another
            dtype or device than `like`.
    """
    if tensor.ndim != 4 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
            "expected a contiguous (N, H, W, C) tensor (permute a channels_last one by (0, 2, 3, 1))"
        )
    check_tensor(name, tensor, tuple(tensor.shape), like.dtype if like is not None else None, like)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: accepted are bfloat16, float16 and float32")
    if not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must not be empty")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, like: Tensor | None
) -> None:
    """Refuse a tensor of another shape or dtype, on another device than `like`, strided, or not 16-byte aligned."""
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected contiguous {shape}"
        )
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}: expected {dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {like.device}")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}: it must be 16-byte aligned")
