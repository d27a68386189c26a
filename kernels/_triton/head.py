"""D's last layer and everything behind it: BN apply, dot product, BCE with logits, and all of that backward.

The layer reduces a whole feature map to one logit, so each feature is used once, and the batch norm before it can be
applied as the features are read: neither they nor their gradient is ever written activated.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.config import cdiv, power_of_two
from kernels._triton.epilogue import activate, derivative
from kernels._triton.launch import Job, Launch, check_nhwc, check_tensor
from kernels.geometry import Activation, Partials

BLOCK = 2048
CHANNELS = 64
IMAGES = 16


@triton.jit
def head_kernel(
    y, w, state, logits, losses, probabilities, dlogits, per_group, groups, real,
    P: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """logit = Σ act(scale·y + shift)·w; loss = softplus(∓logit); dlogit = (σ(logit) − target) / images of the group.

    Tile: one image.
    Bytes: y once; w out of L2.
    Accumulates in fp32, BLOCK partial sums and then a tree.
    Beats the library's apply, GEMV, sigmoid, loss and their backward kernels by reading y alone.
    """
    n = tl.program_id(0)
    group = n // per_group
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, P * C, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < P * C
        at = group * C + i % C
        scale = tl.load(state + 2 * groups * C + at, mask=mask, other=0.0)
        shift = tl.load(state + 3 * groups * C + at, mask=mask, other=0.0)
        z = tl.load(y + n.to(tl.int64) * (P * C) + i, mask=mask, other=0.0).to(tl.float32) * scale + shift
        total += activate(z, ACTIVATION, SLOPE) * tl.load(w + i, mask=mask, other=0.0).to(tl.float32)
    logit = tl.sum(total, 0)
    target = (real >> group) & 1
    e = tl.exp(-tl.abs(logit))  # never overflows
    larger = 1 / (1 + e)  # of the probability and 1 − probability, and e times it the smaller: nothing cancels
    probability = tl.where(logit >= 0, larger, e * larger)
    towards = tl.where(target == 1, -logit, logit)
    small = tl.where(e < 1e-3, e * (1 - e * (0.5 - e / 3)), tl.log(1 + e))  # log1p
    rest = tl.where(logit >= 0, e * larger, larger)
    tl.store(logits + n, logit)
    tl.store(losses + n, tl.maximum(towards, 0.0) + small)
    tl.store(probabilities + n, probability)
    tl.store(dlogits + n, tl.where(target == 1, -rest, probability) / per_group)


@triton.jit
def group_means_kernel(losses, probabilities, means, per_group, groups, BLOCK: tl.constexpr):
    """means[0,g], means[1,g] = the mean loss and probability of each group.

    Tile: everything; one program.
    Bytes: 8 an image.
    Accumulates in fp32, in a fixed order.
    Beats atomics by giving the same bits each run, and the host by not asking it.
    """
    for group in range(groups):
        loss, probability = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, per_group, BLOCK):
            n = first + tl.arange(0, BLOCK)
            loss += tl.load(losses + group * per_group + n, mask=n < per_group, other=0.0)
            probability += tl.load(probabilities + group * per_group + n, mask=n < per_group, other=0.0)
        tl.store(means + group, tl.sum(loss, 0) / per_group)
        tl.store(means + groups + group, tl.sum(probability, 0) / per_group)


@triton.jit
def head_grad_kernel(
    y, w, state, dlogits, g, dw, values, per_group, groups,
    P: tl.constexpr, C: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
):  # fmt: skip
    """g = dlogit·w·act′; Σg and Σg·x̂ over a pixel's images; dw = Σ dlogit·act(scale·y + shift) where it is wanted.

    Tile: one pixel, BC channels, all images, BI at a time.
    Bytes: y and g once.
    Accumulates in fp32 over images, in order: the same bits each run.
    Beats the library's two outer products, activation backward and reduction, which read and write the map five times.
    """
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


def _check(y: Tensor, weight: Tensor, state: Tensor, activation: Activation) -> tuple[int, int, int]:
    """Images of a group, pixels and channels, once everything fits."""
    check_nhwc("y", y)
    images, height, width, channels = y.shape
    check_tensor("weight", weight, (1, height, width, channels), y.dtype, y)
    groups = state.shape[1]
    check_tensor("state", state, (4, groups, channels), torch.float32, y)
    if not 1 <= groups <= 31 or images % groups:
        raise ValueError(f"state is of {groups} groups: they must divide the batch of {images}, and be at most 31")
    if activation == "tanh":
        raise ValueError("activation is 'tanh': after batch norm, accepted are none, relu and leaky_relu")
    return images // groups, height * width, channels


def prepare_head(
    y: Tensor, weight: Tensor, state: Tensor, real: tuple[bool, ...], activation: Activation = "leaky_relu",
    slope: float = 0.2,
) -> Job:  # fmt: skip
    """The job of `head`; see there."""
    per_group, pixels, channels = _check(y, weight, state, activation)
    groups = state.shape[1]
    if len(real) != groups:
        raise ValueError(f"real has {len(real)} entries: expected {groups}, one a group")
    logits, losses, probabilities, dlogits = (y.new_empty((y.shape[0],), dtype=torch.float32) for _ in range(4))
    means = logits.new_empty((2, groups))
    arguments = {
        "y": y, "w": weight, "state": state, "logits": logits, "losses": losses, "probabilities": probabilities,
        "dlogits": dlogits, "per_group": per_group, "groups": groups,
        "real": sum(1 << group for group, is_real in enumerate(real) if is_real), "P": pixels, "C": channels,
        "BLOCK": min(BLOCK, power_of_two(pixels * channels)), "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    reduce = {
        "losses": losses, "probabilities": probabilities, "means": means, "per_group": per_group, "groups": groups,
        "BLOCK": 256,
    }  # fmt: skip
    launches = (Launch(head_kernel, (y.shape[0],), arguments, warps=8), Launch(group_means_kernel, (1,), reduce))
    return Job(launches, (logits, dlogits, means))


def head(
    y: Tensor, weight: Tensor, state: Tensor, real: tuple[bool, ...], activation: Activation = "leaky_relu",
    slope: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits and losses from the raw output of the layer before the last.

    Args:
        y: (N, H, W, C), raw: its batch norm and activation are applied as it is read.
        weight: (1, H, W, C) of y's dtype: the last convolution's, in channels_last memory, permuted by (0, 2, 3, 1).
        state: batch norm's (4, groups, C) float32.
        real: for each group whether its target is 1: (True, False) for [real | fake], (True,) in G's step.
        activation, slope: of the layer before.

    Returns:
        logits (N,), dlogits (N,): the gradient of the sum over groups of each group's mean loss, and means (2, groups):
        each group's mean loss, and mean probability. All float32.
    """
    return prepare_head(y, weight, state, real, activation, slope).run()


def prepare_head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True,
) -> Job:  # fmt: skip
    """The job of `head_grad`; see there."""
    per_group, pixels, channels = _check(y, weight, state, activation)
    check_tensor("dlogits", dlogits, (y.shape[0],), torch.float32, y)
    groups = state.shape[1]
    g = torch.empty_like(y)
    dw = dlogits.new_empty(weight.shape) if weight_grad else None
    values = dlogits.new_empty((2, groups, pixels, channels))
    columns = min(CHANNELS, power_of_two(channels))
    arguments = {
        "y": y, "w": weight, "state": state, "dlogits": dlogits, "g": g, "dw": dw, "values": values,
        "per_group": per_group, "groups": groups, "P": pixels, "C": channels, "BI": IMAGES, "BC": columns,
        "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    launch = Launch(head_grad_kernel, (pixels, cdiv(channels, columns)), arguments)
    return Job((launch,), (g, Partials(values, None), dw))


def head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True,
) -> tuple[Tensor, Partials, Tensor | None]:  # fmt: skip
    """Backward of `head` from dlogits (N,) float32.

    Returns:
        g (N, H, W, C) of y's dtype, the gradient behind y's activation; its sums for `merge_sums`, a tile a pixel; and
        the weight's gradient (1, H, W, C) float32, or None where `weight_grad` is False (D frozen in G's step).
    """
    return prepare_head_grad(y, weight, state, dlogits, activation, slope, weight_grad).run()
