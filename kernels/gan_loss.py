"""`gan_loss`: the loss of a discriminator's logits, real and fake at once, and its gradient, in one kernel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kernels.checks import check_gan_loss
from kernels.dispatch import backend_of
from kernels.engine import LIBRARY, launchers, refuse_double_backward


class GanLoss(NamedTuple):
    """Of each group of logits: the mean loss, differentiable, and the mean probability of being real, which is not.

    Both (groups,) float32 (float64 of float64 logits).
    """

    losses: Tensor
    probabilities: Tensor


def gan_loss(logits: Tensor, real: Sequence[bool], *, backend: str | None = None) -> GanLoss:
    """Binary cross-entropy with logits, by group: loss_g = mean softplus(−l) where real[g], mean softplus(l) else.

    1. Each group's mean loss, and the mean of σ(l), which is what one logs.
    2. In the same pass (σ(l) − target)/n, the gradient of each loss by its n logits, kept for the backward.

    D's step is `gan_loss(d(images), (True, False)).losses.sum().backward()` with images = [real | fake]; G's step is
    `gan_loss(d(fake), (True,))`, the loss that does not saturate.

    Args:
        logits: (N,) bfloat16, float16, float32 or float64, `len(real)` equal groups one after another. Computed in
            float32 whatever their type, under autocast too.
        real: for each group whether its target is 1; 1 to 31 of them.
        backend: one of `kernels.dispatch.BACKENDS`; None: that of `use_backend`, else `auto`.

    Returns:
        `GanLoss`: losses and probabilities, (groups,) each.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: a backend asked for by name that cannot run.

    Source: Goodfellow et al. 2014, arXiv:1406.2661, section 3; docs/loss.md.
    """
    real = check_gan_loss(logits, real)
    backend = backend_of("gan_loss", None, logits.device, logits.dtype, backend, logits.shape[0])
    if backend != "eager":
        means = Loss.apply(logits, real, backend)
        return GanLoss(means[0], means[1].detach())
    parts = logits.reshape(len(real), -1)
    parts = parts if parts.dtype == torch.float64 else parts.float()
    losses = [-F.logsigmoid(part if is_real else -part).mean() for part, is_real in zip(parts, real, strict=True)]
    return GanLoss(torch.stack(losses), parts.detach().sigmoid().mean(1))


def _forward(logits: Tensor, real: Sequence[bool], backend: str) -> tuple[Tensor, Tensor]:
    return launchers(backend).gan_loss(logits.contiguous(), tuple(real))


def _fake(logits: Tensor, real: Sequence[bool], backend: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(logits.shape, dtype=wide), logits.new_empty((2, len(real)), dtype=wide)


LIBRARY.define("gan_loss(Tensor logits, bool[] real, str backend) -> (Tensor, Tensor)")
LIBRARY.impl("gan_loss", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("dcgan_kernels::gan_loss", _fake, lib=LIBRARY)


class Loss(Function):
    """Mean losses and probabilities (2, groups); the gradient by the second row is not looked at."""

    @staticmethod
    def forward(ctx, logits, real, backend):
        dlogits, means = torch.ops.dcgan_kernels.gan_loss.default(logits, real, backend)
        ctx.save_for_backward(dlogits)
        ctx.dtype = logits.dtype
        return means

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        (dlogits,) = ctx.saved_tensors
        by_group = dlogits.view(grad.shape[1], -1) * grad[0][:, None]
        return by_group.flatten().to(ctx.dtype), None, None
