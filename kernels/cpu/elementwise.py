"""What stands between the convolutions of a step: batch norm, activations, the loss.

Each is a pure function of its tensors, apart from outputs named `out` and batch norm's running statistics, and has its
backward beside it; nothing here uses autograd. Maps are (N, C, H, W) in channels_last memory; batch norm's weights and
statistics and every loss are float32 or wider. The convolutions are in `products`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Statistics(NamedTuple):
    """What a training-mode batch norm keeps of one group: mean and 1/√(variance + ε), (C,) each."""

    mean: Tensor
    inverse_std: Tensor


def batch_norm_act(
    z: Tensor, norm: nn.BatchNorm2d, slope: float, groups: int, normal: Tensor, out: Tensor
) -> list[Statistics]:
    """Batch norm with the batch's own statistics, then LeakyReLU: `out = act((z − m)·s·weight + bias)`.

    Args:
        z: (N, C, H, W), channels_last; N is a multiple of `groups`.
        norm: weight, bias, ε and momentum; its running statistics move once a group, in the groups' order, towards the
            mean and the unbiased variance.
        slope: LeakyReLU's below zero; 0 is ReLU.
        groups: equal parts of the batch, each with its own statistics (real and fake images).
        normal: scratch like `z`.
        out: where the result goes; any strides.

    Returns:
        The statistics of each group, for the backward.
    """
    kept = []
    for z_part, normal_part in zip(z.chunk(groups), normal.chunk(groups), strict=True):
        mean, inverse_std = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_mean)
        aten.native_batch_norm.out(
            z_part, norm.weight, norm.bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps,
            out=normal_part, save_mean=mean, save_invstd=inverse_std,
        )  # fmt: skip
        kept.append(Statistics(mean, inverse_std))
    norm.num_batches_tracked.add_(groups)
    leaky_relu(normal, slope, out)
    return kept


def batch_norm_act_backward(
    grad: Tensor,
    z: Tensor,
    y: Tensor,
    norm: nn.BatchNorm2d,
    slope: float,
    kept: list[Statistics],
    weights: bool,
    scratch: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """The gradient of `batch_norm_act` by z: with g = grad · act'(y) and x̂ = (z − m)·s, each group's

        out = weight·s·(g − mean(g) − x̂·mean(g·x̂))

    Args:
        grad: by the output, any strides.
        z, y: input and output of the forward. The sign of y tells that of what the activation saw: at exactly 0 its
            derivative is `slope`, as in PyTorch.
        norm, slope, kept: the forward's.
        weights: whether the gradients of weight and bias are wanted.
        scratch: like `z`.
        out: where the result goes; any strides.

    Returns:
        The gradients of weight and bias (C,), summed over the groups; None where not wanted.
    """
    leaky_relu_backward(grad, y, slope, scratch)
    sums = None
    parts = (tensor.chunk(len(kept)) for tensor in (z, scratch, out))
    for statistics, z_part, g_part, out_part in zip(kept, *parts, strict=True):
        by_z, *by_weights = aten.native_batch_norm_backward(
            g_part, z_part, norm.weight, None, None, *statistics, True, norm.eps, [True, weights, weights]
        )
        out_part.copy_(by_z)
        if weights:
            sums = by_weights if sums is None else [a + b for a, b in zip(sums, by_weights, strict=True)]
    return sums if sums is None else tuple(sums)


def leaky_relu(x: Tensor, slope: float, out: Tensor) -> None:
    """out = x where x > 0, else slope·x; any strides."""
    aten.leaky_relu.out(x, slope, out=out)


def leaky_relu_backward(grad: Tensor, y: Tensor, slope: float, out: Tensor) -> None:
    """out = grad · (1 where y > 0, else slope), `y` being the activation's output."""
    aten.leaky_relu_backward.grad_input(grad, y, slope, True, grad_input=out)


def tanh_backward(grad: Tensor, y: Tensor, out: Tensor) -> None:
    """out = grad · (1 − y²), `y` being tanh's output."""
    aten.tanh_backward.grad_input(grad, y, grad_input=out)


class Loss(NamedTuple):
    """A batch's mean loss (), the mean probability that an image is real (), and the loss's gradient by the logits."""

    loss: Tensor
    probability: Tensor
    grad: Tensor


def gan_loss(logits: Tensor, real: bool) -> Loss:
    """Mean binary cross-entropy of logits (N,) against all-ones (`real`) or all-zeros: softplus(∓logit), and its
    gradient (σ(logit) − target)/N."""
    probability = logits.sigmoid()
    return Loss(
        -F.logsigmoid(logits if real else -logits).mean(),
        logits.float().sigmoid().mean(),
        (-(-logits).sigmoid() if real else probability) / logits.numel(),
    )
