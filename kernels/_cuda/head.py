"""D's head by the extension: its last layer with loss and both gradients, and the loss alone; csrc/head.cu."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels._cuda import launch as _launch
from kernels._cuda.batch_norm import merge_sums
from kernels._cuda.launch import DTYPES, slope_of, tickets
from kernels.geometry import Activation, Merge, Partials, check_nhwc, check_tensor

MOST_GROUPS = 31
"""Their targets are the bits of one int32."""


def _check(y: Tensor, weight: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    """Images of a group, groups, pixels and channels, once everything fits."""
    check_nhwc("y", y)
    images, height, width, channels = y.shape
    check_tensor("weight", weight, (1, height, width, channels), y.dtype, y)
    groups = state.shape[1]
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    if not 1 <= groups <= MOST_GROUPS or images % groups:
        raise ValueError(f"state is of {groups} groups: they must divide the batch of {images}, and be at most 31")
    if height * width * channels >= 2**31:
        raise ValueError(f"y has shape {tuple(y.shape)}: an image must have fewer than 2^31 elements")
    return images // groups, groups, height * width, channels


def real_bits(real: Sequence[bool], groups: int) -> int:
    """Bit g says whether group g's target is 1; ValueError where there is not one entry a group."""
    if len(real) != groups:
        raise ValueError(f"real has {len(real)} entries: expected {groups}, one a group")
    return sum(1 << group for group, is_real in enumerate(real) if is_real)


def head(
    y: Tensor, weight: Tensor, state: Tensor, real: Sequence[bool], activation: Activation = "leaky_relu",
    slope: float = 0.2, scale: Tensor | None = None, ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits and losses from the raw output of the layer before the last.

    Args:
        y: (N, H, W, C), raw: its batch norm and activation are applied as it is read.
        weight: (1, H, W, C) of y's dtype: the last convolution's, in channels_last memory, permuted by (0, 2, 3, 1).
        state: batch norm's (4, groups, C) float32.
        real: for each group whether its target is 1: (True, False) for [real | fake], (True,) in G's step.
        activation, slope: of the layer before.
        scale: float32 on the device, whose first element multiplies dlogits (a `loss_scale` of `adam` will do); none
            where None. Losses and probabilities stay as they are.
        ticket: (1,) int32 zero, which every launch leaves so; the stream's where None.

    Returns:
        logits (N,), dlogits (N,): the gradient of the sum over groups of each group's mean loss, and means (2, groups):
        each group's mean loss, and mean probability. All float32.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    per_group, groups, pixels, channels = _check(y, weight, state)
    below, bits = slope_of(activation, slope), real_bits(real, groups)
    if scale is not None and (scale.dtype != torch.float32 or not scale.numel() or scale.device != y.device):
        raise ValueError(
            f"scale is {scale.dtype} {tuple(scale.shape)} on {scale.device}: "
            f"expected float32 on {y.device}, its first element the scale"
        )
    ticket = tickets(y, 1)[:1] if ticket is None else ticket
    if ticket.dtype != torch.int32 or ticket.shape != (1,) or ticket.device != y.device:
        raise ValueError(
            f"ticket is {ticket.dtype} {tuple(ticket.shape)} on {ticket.device}: "
            f"expected int32 (1,) on {y.device}, zero before its first use"
        )
    logits, dlogits = (y.new_empty((y.shape[0],), dtype=torch.float32) for _ in range(2))
    means = logits.new_empty((2, groups))
    tensors = y, weight, state, scale, logits, dlogits, means, ticket
    _launch.launch("head", *tensors, DTYPES[y.dtype], per_group, groups, pixels, channels, bits, below)
    return logits, dlogits, means


def gan_loss(logits: Tensor, real: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Losses of logits (N,) in equal groups, and their gradient; `real` as for `head`.

    Returns:
        dlogits (N,): the gradient of the sum over groups of each group's mean loss, and means (2, groups): each group's
        mean loss, and mean probability. Both float32.

    Raises:
        ValueError: an argument that does not fit, by name.
    """
    if logits.ndim != 1 or not logits.is_contiguous() or logits.dtype not in DTYPES or not len(logits):
        raise ValueError(
            f"logits is {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}: expected contiguous (N,) "
            "bfloat16, float16 or float32, not empty"
        )
    groups = len(real)
    if not 1 <= groups <= MOST_GROUPS or len(logits) % groups:
        raise ValueError(f"real has {groups} entries: they must divide the {len(logits)} logits, and be at most 31")
    dlogits = logits.new_empty(logits.shape, dtype=torch.float32)
    means = dlogits.new_empty((2, groups))
    per_group, bits = len(logits) // groups, real_bits(real, groups)
    _launch.launch("gan_loss", logits, dlogits, means, DTYPES[logits.dtype], per_group, groups, bits)
    return dlogits, means


def head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True, out: Tensor | None = None, merge: Merge | None = None,
) -> tuple[Tensor, Partials | Tensor, Tensor | None]:  # fmt: skip
    """Backward of `head` from dlogits (N,) float32.

    Returns:
        g (N, H, W, C) of y's dtype, the gradient behind y's activation; its sums for `merge_sums`, a tile a pixel, or
        with `merge` (see `kernels.geometry.Epilogue`) their means (2, groups, C) for `apply_grad`; and the weight's
        gradient (1, H, W, C) float32, in `out` where given, None where not `weight_grad` (D frozen in G's step).
    """
    per_group, groups, pixels, channels = _check(y, weight, state)
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
        gradients = None if merge.weight is None else (merge.weight, merge.bias)
        sums = merge_sums(sums, per_group * pixels, gradients)[2]
    return g, sums, dw
