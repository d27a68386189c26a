"""Argument checks of the extension's launchers, and the way into its ops."""

import torch
from torch import Tensor

from kernels import dependent
from kernels.arguments import check_activation

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/common.h."""


def launch(op: str, *arguments) -> None:
    """Run an op of the extension on the current stream of its tensors' device; as `kernels.dependent` says."""
    getattr(torch.ops.dcgan_cuda, op).default(*arguments, dependent=dependent.asked())


def slope_of(activation: str, slope: float) -> float:
    """The slope below zero that (leaky) ReLU or no activation amounts to.

    Raises:
        ValueError: any other.
    """
    check_activation(activation)
    return {"none": 1.0, "relu": 0.0}.get(activation, float(slope))


def vector_of(tensor: Tensor, channels: int) -> int:
    """Elements of a thread's access: 16 bytes, or one where the channels leave rows unaligned."""
    wide = 16 // tensor.element_size()
    return wide if channels % wide == 0 else 1
