"""D's last layer and everything behind it: BN apply, dot product, BCE with logits, and all of that backward; and the
loss by itself, of logits that are there already.

The layer reduces a whole feature map to one logit, so each feature is used once, and the batch norm before it can be
applied as the features are read: neither they nor their gradient is ever written activated.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import cdiv, power_of_two
from kernels._triton.dependent import after_previous
from kernels._triton.epilogue import activate, derivative
from kernels._triton.launch import Job, Launch
from kernels._triton.merge import TOGETHER, settle_sums
from kernels._triton.ticket import last_program
from kernels.arguments import check_head, check_logits, check_merge, check_scale, check_ticket, real_bits, tickets
from kernels.geometry import Activation, MergeGradients, Partials, check_tensor

BLOCK = 2048
MEANS = 256
CHANNELS = 64
IMAGES = 16


@triton.jit
def log1p(e):
    """log(1 + e), 0 ≤ e ≤ 1, to a few ulp, where the hardware's logarithm of 1 + e keeps only absolute accuracy.

    2·artanh(s), s = e/(2 + e) ≤ 1/3; the first term of the series that is left out is below 2·10⁻⁸ of the sum.
    """
    s = e / (2 + e)
    t = s * s
    tail = 1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13))))
    return 2 * s * (1 + t * (1 / 3 + t * tail))


@triton.jit
def cross_entropy(logit, target):
    """softplus(∓logit), its derivative σ(logit) − target, and σ(logit), elementwise; target is 1 or 0."""
    e = tl.exp(-tl.abs(logit))  # never overflows
    larger = 1 / (1 + e)  # of the probability and 1 − probability, and e times it the smaller: nothing cancels
    probability = tl.where(logit >= 0, larger, e * larger)
    rest = tl.where(logit >= 0, e * larger, larger)
    towards = tl.where(target == 1, -logit, logit)
    return tl.maximum(towards, 0.0) + log1p(e), tl.where(target == 1, -rest, probability), probability


@triton.jit
def head_kernel(
    y, w, state, scale, logits, dlogits, means, ticket, per_group, groups, real,
    P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, MEANS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """logit = Σ act(scale·y + shift)·w; loss = softplus(∓logit); dlogit = (σ(logit) − target) / images of the group.

    Tile: one image; the last program to finish also takes the groups' mean losses and probabilities.
    Bytes: y once; w out of L2.
    Accumulates in fp32, BLOCK partial sums and then a tree; means over logits in order: the same bits each run.
    Beats the library's apply, GEMV, sigmoid, loss and their backward kernels by reading only y.
    """
    after_previous(DEPENDENT)
    n = tl.program_id(0)
    group = n // per_group
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, P * C, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < P * C
        at = group * C + i % C
        scales = tl.load(state + 2 * groups * C + at, mask=mask, other=0.0)
        shifts = tl.load(state + 3 * groups * C + at, mask=mask, other=0.0)
        z = tl.load(y + n.to(tl.int64) * (P * C) + i, mask=mask, other=0.0).to(tl.float32) * scales + shifts
        total += activate(z, ACTIVATION, SLOPE) * tl.load(w + i, mask=mask, other=0.0).to(tl.float32)
    logit = tl.sum(total, 0)
    _, slope, _ = cross_entropy(logit, (real >> group) & 1)
    slope = slope / per_group
    if scale is not None:
        slope *= tl.load(scale)
    tl.store(logits + n, logit)
    tl.store(dlogits + n, slope)
    if last_program(ticket, tl.num_programs(0)):
        for g in range(groups):
            group_means(logits, None, means, g, groups, per_group, (real >> g) & 1, MEANS)


@triton.jit
def group_means(logits, dlogits, means, group, groups, per_group, target, BLOCK: tl.constexpr):
    """means[0,group], means[1,group] = mean loss and probability of a group; its dlogits where they are wanted."""
    losses, probabilities = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, per_group, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < per_group
        logit = tl.load(logits + group * per_group + n, mask=inside, other=0.0).to(tl.float32)
        loss, slope, probability = cross_entropy(logit, target)
        losses += tl.where(inside, loss, 0.0)
        probabilities += tl.where(inside, probability, 0.0)
        if dlogits is not None:
            tl.store(dlogits + group * per_group + n, slope / per_group, mask=inside)
    tl.store(means + group, tl.sum(losses, 0) / per_group)
    tl.store(means + groups + group, tl.sum(probabilities, 0) / per_group)


@triton.jit
def gan_loss_kernel(logits, dlogits, means, per_group, groups, real, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    """means[0,g] = mean softplus(∓logit), means[1,g] = mean σ(logit), dlogit = (σ(logit) − target) / images of g.

    Tile: one group of logits, BLOCK at a time.
    Bytes: 8 per logit.
    Accumulates in fp32, in order: the same bits each run.
    Beats the library's sigmoid, loss, two means and their backward by being one launch; nothing else takes time here.
    """
    after_previous(DEPENDENT)
    group = tl.program_id(0)
    group_means(logits, dlogits, means, group, groups, per_group, (real >> group) & 1, BLOCK)


@triton.jit
def head_grad_kernel(
    y, w, state, dlogits, g, dw, values, dweight, dbias, means, tickets, per_group, groups,
    P: tl.constexpr, C: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, TOGETHER: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """g = dlogit·w·act′; Σg and Σg·x̂ over a pixel's images; dw = Σ dlogit·act(scale·y + shift) where it is wanted.

    Tile: one pixel, BC channels, all images, BI at a time; of the pixels' programs the last one merges their sums where
        `means` is wanted.
    Bytes: y and g once.
    Accumulates in fp32 over images, in order: the same bits each run.
    Beats the library's two outer products, activation backward and reduction, which read and write the map five times.
    """
    after_previous(DEPENDENT)
    p, c = tl.program_id(0), tl.program_id(1) * BC + tl.arange(0, BC)
    inside = c < C
    weight = tl.load(w + p * C + c, mask=inside, other=0.0).to(tl.float32)
    dw_total = tl.zeros((BI, BC), tl.float32)
    for group in range(groups):
        at, row = group * C + c, groups * C
        mean = tl.load(state + at, mask=inside, other=0.0)
        rstd = tl.load(state + row + at, mask=inside, other=0.0)
        scale = tl.load(state + 2 * row + at, mask=inside, other=0.0)
        shift = tl.load(state + 3 * row + at, mask=inside, other=0.0)
        sum_g, sum_gx = tl.zeros((BI, BC), tl.float32), tl.zeros((BI, BC), tl.float32)
        for first in range(0, per_group, BI):
            n = first + tl.arange(0, BI)
            mask = (n < per_group)[:, None] & inside[None, :]
            offsets = ((group * per_group + n).to(tl.int64) * P + p)[:, None] * C + c[None, :]
            raw = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
            dlogit = tl.load(dlogits + group * per_group + n, mask=n < per_group, other=0.0)
            z = raw * scale[None, :] + shift[None, :]
            grad = dlogit[:, None] * weight[None, :] * derivative(z, ACTIVATION, SLOPE)
            tl.store(g + offsets, grad.to(g.dtype.element_ty), mask=mask)
            sum_g += grad
            sum_gx += grad * (raw - mean[None, :]) * rstd[None, :]
            dw_total += dlogit[:, None] * activate(z, ACTIVATION, SLOPE)
        partial = (group * P + p) * C + c
        tl.store(values + partial, tl.sum(sum_g, 0), mask=inside)
        tl.store(values + groups * P * C + partial, tl.sum(sum_gx, 0), mask=inside)
    if dw is not None:
        tl.store(dw + p * C + c, tl.sum(dw_total, 0), mask=inside)
    if means is not None:  # noqa: SIM102  a constant: without it there are no tickets
        if last_program(tickets + tl.program_id(1), P):
            settle_sums(values, dweight, dbias, means, per_group * P, groups, P, c, C, TOGETHER)


def prepare_head(
    y: Tensor, weight: Tensor, state: Tensor, real: Sequence[bool], activation: Activation = "leaky_relu",
    slope: float = 0.2, scale: Tensor | None = None, ticket: Tensor | None = None,
) -> Job:  # fmt: skip
    """The job of `head`; see there."""
    per_group, groups, pixels, channels = check_head(y, weight, state, activation)
    check_scale(scale, y)
    logits, dlogits = (y.new_empty((y.shape[0],), dtype=torch.float32) for _ in range(2))
    means = logits.new_empty((2, groups))
    arguments = {
        "y": y, "w": weight, "state": state, "scale": scale, "logits": logits, "dlogits": dlogits, "means": means,
        "ticket": check_ticket(ticket, y), "per_group": per_group, "groups": groups,
        "real": real_bits(real, groups), "P": pixels, "C": channels,
        "BLOCK": min(BLOCK, power_of_two(pixels * channels)), "MEANS": MEANS, "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    return Job((Launch(head_kernel, (y.shape[0],), arguments, warps=8),), (logits, dlogits, means))


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
        scale: float32 on the device, whose first element multiplies dlogits (a `loss_scale` of `adam` will do);
            None: no scale. Losses and probabilities stay as they are.
        ticket: (1,) int32 zero, kept by the caller; None: one that the stream's launches share.

    Returns:
        logits (N,), dlogits (N,): the gradient of the sum over groups of each group's mean loss, and means (2, groups):
        each group's mean loss, and mean probability. All float32.
    """
    return prepare_head(y, weight, state, real, activation, slope, scale, ticket).run()


def prepare_gan_loss(logits: Tensor, real: Sequence[bool]) -> Job:
    """The job of `gan_loss`; see there."""
    per_group, groups = check_logits(logits, real)
    dlogits = logits.new_empty(logits.shape, dtype=torch.float32)
    means = dlogits.new_empty((2, groups))
    arguments = {
        "logits": logits, "dlogits": dlogits, "means": means, "per_group": per_group, "groups": groups,
        "real": real_bits(real, groups), "BLOCK": MEANS,
    }  # fmt: skip
    return Job((Launch(gan_loss_kernel, (groups,), arguments),), (dlogits, means))


def gan_loss(logits: Tensor, real: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Losses of logits (N,) in equal groups, and their gradient; `real` as for `head`.

    Returns:
        dlogits (N,): the gradient of the sum over groups of each group's mean loss, and means (2, groups): each group's
        mean loss, and mean probability. Both float32.
    """
    return prepare_gan_loss(logits, real).run()


def prepare_head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True, out: Tensor | None = None,
    merge: MergeGradients | None = None,
) -> Job:  # fmt: skip
    """The job of `head_grad`; see there."""
    per_group, groups, pixels, channels = check_head(y, weight, state, activation)
    check_tensor("dlogits", dlogits, (y.shape[0],), torch.float32, y)
    g = torch.empty_like(y)
    dw = None
    if weight_grad:
        dw = dlogits.new_empty(weight.shape) if out is None else out
        check_tensor("out", dw, tuple(weight.shape), torch.float32, y)
    values = dlogits.new_empty((2, groups, pixels, channels))
    columns = min(CHANNELS, power_of_two(channels))
    arguments = {
        "y": y, "w": weight, "state": state, "dlogits": dlogits, "g": g, "dw": dw, "values": values,
        "dweight": None, "dbias": None, "means": None, "tickets": None,
        "per_group": per_group, "groups": groups, "P": pixels, "C": channels, "BI": IMAGES, "BC": columns,
        "ACTIVATION": activation, "SLOPE": slope, "TOGETHER": TOGETHER,
    }  # fmt: skip
    sums = Partials(values, None)
    if merge is not None:
        sums = values.new_empty((2, groups, channels))
        check_merge(merge, channels, sums)
        arguments |= merge._asdict() | {"tickets": tickets(y, cdiv(channels, columns)), "means": sums}
    launch = Launch(head_grad_kernel, (pixels, cdiv(channels, columns)), arguments)
    return Job((launch,), (g, sums, dw))


def head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True, out: Tensor | None = None,
    merge: MergeGradients | None = None,
) -> tuple[Tensor, Partials | Tensor, Tensor | None]:  # fmt: skip
    """Backward of `head` from dlogits (N,) float32.

    Returns:
        g (N, H, W, C) of y's dtype, the gradient behind y's activation; its sums for `merge_sums`, a tile per pixel, or
        with `merge` (see `kernels.geometry.Epilogue`) their means (2, groups, C) for `apply_grad`; and the weight's
        gradient (1, H, W, C) float32, in `out` where given, None if not `weight_grad` (D frozen in G's step).
    """
    return prepare_head_grad(y, weight, state, dlogits, activation, slope, weight_grad, out, merge).run()
