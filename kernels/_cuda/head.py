"""D's head by the extension: its last layer with loss and both gradients, and the loss by itself; csrc/head.cu."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.batch_norm import merge_sums
from kernels._cuda.launch import DTYPES, slope_of
from kernels.arguments import check_head, check_logits, check_scale, check_ticket, real_bits
from kernels.geometry import Activation, MergeGradients, Partials, check_tensor


def _check(y: Tensor, weight: Tensor, state: Tensor, activation: Activation) -> tuple[int, int, int, int]:
    """`check_head`, and the extension's own limit."""
    sizes = check_head(y, weight, state, activation)
    if sizes[2] * sizes[3] >= 2**31:
        raise ValueError(f"y has shape {tuple(y.shape)}: an image must have fewer than 2^31 elements")
    return sizes


def head(
    y: Tensor, weight: Tensor, state: Tensor, real: Sequence[bool], activation: Activation = "leaky_relu",
    slope: float = 0.2, scale: Tensor | None = None, ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits, dlogits and means; arguments and results as `kernels._triton.head.head`'s."""
    per_group, groups, pixels, channels = _check(y, weight, state, activation)
    check_scale(scale, y)
    below, bits, ticket = slope_of(activation, slope), real_bits(real, groups), check_ticket(ticket, y)
    logits, dlogits = (y.new_empty((y.shape[0],), dtype=torch.float32) for _ in range(2))
    means = logits.new_empty((2, groups))
    tensors = y, weight, state, scale, logits, dlogits, means, ticket
    _launch.launch("head", *tensors, DTYPES[y.dtype], per_group, groups, pixels, channels, bits, below)
    return logits, dlogits, means


def gan_loss(logits: Tensor, real: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """dlogits and means; arguments and results as `kernels._triton.head.gan_loss`'s."""
    per_group, groups = check_logits(logits, real)
    dlogits = logits.new_empty(logits.shape, dtype=torch.float32)
    means = dlogits.new_empty((2, groups))
    bits = real_bits(real, groups)
    _launch.launch("gan_loss", logits, dlogits, means, DTYPES[logits.dtype], per_group, groups, bits)
    return dlogits, means


def head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True, out: Tensor | None = None,
    merge: MergeGradients | None = None,
) -> tuple[Tensor, Partials | Tensor, Tensor | None]:  # fmt: skip
    """Backward of `head`; arguments and results as `kernels._triton.head.head_grad`'s."""
    per_group, groups, pixels, channels = _check(y, weight, state, activation)
    check_tensor("dlogits", dlogits, (y.shape[0],), torch.float32, y)
    below = slope_of(activation, slope)
    g = torch.empty_like(y)
    dw = None
    if weight_grad:
        dw = dlogits.new_empty(weight.shape) if out is None else out
        check_tensor("out", dw, tuple(weight.shape), torch.float32, y)
    values = dlogits.new_empty((2, groups, pixels, channels))
    tensors = y, weight, state, dlogits, g, values, dw
    _launch.launch("head_grad", *tensors, DTYPES[y.dtype], per_group, groups, pixels, channels, below)
    sums = Partials(values, None)
    if merge is not None:
        sums = merge_sums(sums, per_group * pixels, merge.out)[2]
    return g, sums, dw
