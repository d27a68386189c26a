"""Every kernel again, in plain PyTorch: what it must compute, in the arithmetic of the tensors it is given.

Twins of the launchers in `kernels._triton`, with their names, layouts and results; run in float64 they are the oracle.
Tensors are NHWC, weights packed (low, 4, 4, high). Partials come as one tile per group; a `ticket` is not needed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.geometry import Activation, Deferred, Epilogue, Merge, MergeGradients, Partials, Shares


def activate(z: Tensor, activation: Activation, slope: float = 0.2) -> Tensor:
    """The activation of z."""
    if activation not in ("none", "relu", "leaky_relu", "tanh"):
        raise ValueError(f"activation is {activation!r}: accepted are none, relu, leaky_relu and tanh")
    if activation == "relu":
        return F.relu(z)
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    return z.tanh() if activation == "tanh" else z


def derivative(a: Tensor, activation: Activation, slope: float = 0.2) -> Tensor:
    """The activation's derivative where its output is a; at 0 the left one, as in PyTorch."""
    if activation == "tanh":
        return 1 - a * a
    below = {"none": 1.0, "relu": 0.0, "leaky_relu": slope}[activation]
    return torch.full_like(a, below).masked_fill(a > 0, 1.0)


def grouped(t: Tensor, groups: int) -> Tensor:
    """(N, H, W, C) as (groups, pixels, C), at least float32."""
    t = t.reshape(groups, -1, t.shape[-1])
    return t if t.dtype == torch.float64 else t.float()


def finish(y: Tensor, epilogue: Epilogue) -> tuple[Tensor, Partials | Tensor | None]:
    """The epilogue of a raw output y (N, H, W, C); its partials, or what `merge` makes of them."""
    e = epilogue
    if e.mode == "statistics":
        return y, statistics(y, e.groups, e.merge)
    if e.mode == "activation":
        return activate(y, e.activation, e.slope), None
    if e.mode == "batch_norm":
        return apply(y, e.state, e.activation, e.slope), None
    if e.mode == "activation_grad":
        return y * derivative(e.saved, e.activation, e.slope), None
    g, partials = activation_grad(y, e.saved, e.state, e.activation, e.slope)
    return g, merge_gradients(partials, y, e.merge)


def merge_gradients(partials: Partials, y: Tensor, merge: MergeGradients | None) -> Partials | Tensor:
    """A gradient's partials, of a map y, as they are; or, with `merge`, their means, the sums where it says."""
    if merge is None:
        return partials
    return merge_sums(partials, y[..., 0].numel() // partials.values.shape[1], merge.out)[2]


def settled(x: Tensor | Deferred) -> Tensor:
    """A map, its batch norm and activation applied."""
    return apply(*x) if isinstance(x, Deferred) else x


def conv(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None
) -> tuple[Tensor, Partials | Tensor | None]:
    """Convolution k4 s2 p1 of x (N, 2H, 2W, C) by weight (O, 4, 4, C): (N, H, W, O), and the epilogue."""
    x = settled(x)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), stride=2, padding=1)
    return finish(y.permute(0, 2, 3, 1).contiguous(), epilogue or Epilogue())


def conv_transpose(
    x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, out: Tensor | None = None
) -> tuple[Tensor, Partials | Tensor | None]:
    """Transposed convolution k4 s2 p1 of x (N, H, W, C) by weight (C, 4, 4, O): (N, 2H, 2W, O), and the epilogue."""
    x = settled(x)
    y = F.conv_transpose2d(x.permute(0, 3, 1, 2), weight.permute(0, 3, 1, 2), stride=2, padding=1)
    y, partials = finish(y.permute(0, 2, 3, 1).contiguous(), epilogue or Epilogue())
    return (y if out is None else out.copy_(y)), partials


def wgrad(
    low: Tensor | Deferred, high: Tensor | Deferred, out: Tensor | None = None, pending: list[Shares] | None = None
) -> Tensor:
    """Weight gradient (L, 4, 4, C) from low (N, H, W, L) and high (N, 2H, 2W, C); at least float32, nothing pending."""
    low, high = settled(low), settled(high)
    wide = torch.promote_types(low.dtype, torch.float32)
    windows = F.unfold(high.permute(0, 3, 1, 2).to(wide), 4, stride=2, padding=1)  # (N, C·16, H·W)
    gradient = torch.einsum("npl,nkp->lk", low.flatten(1, 2).to(wide), windows)
    gradient = gradient.view(low.shape[-1], high.shape[-1], 4, 4).permute(0, 2, 3, 1)
    return gradient.contiguous() if out is None else out.copy_(gradient)


def sum_shares(pending: Sequence[Shares]) -> None:
    """gradient = Σ of its shares, of each that is pending."""
    for values, gradient in pending:
        gradient.copy_(values.sum(0))


def statistics(y: Tensor, groups: int = 1, merge: Merge | None = None) -> Partials | Tensor:
    """Mean and M2 = Σ(y − mean)² of each group and channel, as one tile; with `merge` the batch-norm state."""
    rows = grouped(y, groups)
    mean = rows.mean(1, keepdim=True)
    m2 = (rows - mean).square().sum(1, keepdim=True)
    partials = Partials(torch.stack([mean, m2]), rows.new_full((groups, 1), rows.shape[1]))
    return partials if merge is None else merge_statistics(partials, *merge)


def merge_statistics(
    partials: Partials, weight: Tensor, bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, tracked: Tensor | None = None, eps: float = 1e-5, momentum: float = 0.1,
) -> Tensor:  # fmt: skip
    """The batch-norm state (4, groups, C): mean, rstd, scale, shift; moves the running statistics, group by group."""
    (means, m2s), counts = partials.values, partials.counts[:, :, None]
    total = counts.sum(1)
    mean = (counts * means).sum(1) / total
    m2 = (m2s + counts * (means - mean[:, None]).square()).sum(1)
    rstd = (m2 / total + eps).rsqrt()
    if running_mean is not None:
        for group in range(len(mean)):
            running_mean.lerp_(mean[group].to(running_mean.dtype), momentum)
            running_var.lerp_((m2 / (total - 1))[group].to(running_var.dtype), momentum)
    if tracked is not None:
        tracked += len(mean)
    return torch.stack([mean, rstd, weight * rstd, bias - mean * weight * rstd])


def apply(y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2) -> Tensor:
    """activation(scale·y + shift), y (N, H, W, C) of as many groups as the state (4, groups, C) has."""
    _, _, scale, shift = state[:, :, None]
    z = grouped(y, state.shape[1]) * scale + shift
    return activate(z, activation, slope).view(y.shape).to(y.dtype)


def activation_grad(
    da: Tensor, y: Tensor, state: Tensor, activation: Activation = "none", slope: float = 0.2
) -> tuple[Tensor, Partials]:
    """g = da·activation′(scale·y + shift), and Σg, Σg·x̂ of each group as one tile."""
    mean, rstd, scale, shift = state[:, :, None]
    raw = grouped(y, state.shape[1])
    g = grouped(da, state.shape[1]) * derivative(raw * scale + shift, activation, slope)
    sums = torch.stack([g.sum(1, keepdim=True), (g * (raw - mean) * rstd).sum(1, keepdim=True)])
    return g.view(y.shape).to(da.dtype), Partials(sums, None)


def merge_sums(
    partials: Partials, rows: int, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """∂weight and ∂bias (C,), and the means (2, groups, C) of g and g·x̂ over a group's `rows` pixels."""
    sums = partials.values.sum(2)
    gradients = sums[1].sum(0), sums[0].sum(0)
    if out is not None:
        gradients = tuple(into.copy_(gradient) for into, gradient in zip(out, gradients, strict=True))
    return *gradients, sums / rows


def apply_grad(g: Tensor, y: Tensor, state: Tensor, means: Tensor) -> Tensor:
    """Gradient of the raw output: scale·(g − mean(g) − x̂·mean(g·x̂))."""
    mean, rstd, scale, _ = state[:, :, None]
    mean_g, mean_gx = means[:, :, None]
    normalised = (grouped(y, state.shape[1]) - mean) * rstd
    dy = scale * (grouped(g, state.shape[1]) - mean_g - normalised * mean_gx)
    return dy.view(y.shape).to(y.dtype)


class AdamTable(NamedTuple):
    """The tensors of `adam`, a list of each kind; see `kernels._triton.adam.adam_table`, but any dtype will do."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    copies: Sequence[Tensor | None]


adam_table = AdamTable


def adam(
    table: AdamTable, step: Tensor, lr: float, betas: tuple[float, float] = (0.5, 0.999), eps: float = 1e-8,
    loss_scale: Tensor | None = None, move_scale: bool = True,
) -> None:  # fmt: skip
    """One update in place, step and loss scale included; the host never waits."""
    if loss_scale is None:
        sound, unscale = torch.ones_like(step, dtype=torch.bool), 1.0
    else:
        sound = torch.stack([g.isfinite().all() for g in table.grads]).all()
        unscale = loss_scale[0].double().reciprocal()
    t = (step + 1).double()
    for p, g, m, v, copy in zip(*table, strict=True):
        new = adam_update(p, g * unscale, m, v, t, lr, betas, eps)
        for old, value in zip((p, m, v), new, strict=True):
            old.copy_(torch.where(sound, value, old))
        if copy is not None:
            copy.copy_(p)
    step += sound
    if loss_scale is not None:
        _move_scale(loss_scale, sound, move_scale)


def _move_scale(loss_scale: Tensor, sound: Tensor, move: bool) -> None:
    """torch.amp.GradScaler.update, by its defaults, over (scale, good steps, overflows)."""
    scale, good, overflows = loss_scale.clone()
    overflows = overflows + ~sound
    if move:
        good = torch.where(overflows == 0, good + 1, 0)
        larger = torch.where((2 * scale).isfinite(), 2 * scale, scale)
        scale = torch.where(overflows > 0, scale / 2, torch.where(good == 2000, larger, scale))
        good, overflows = torch.where(good == 2000, 0, good), torch.zeros_like(overflows)
    loss_scale.copy_(torch.stack([scale, good, overflows]))


def adam_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor | int, lr: float, betas: tuple[float, float],
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """p, m and v after update number `step` (from 1 on)."""
    m = m.lerp(g.to(m.dtype), 1 - betas[0])
    v = v * betas[1] + (1 - betas[1]) * g * g
    root = (1 - betas[1] ** step) ** 0.5
    return p - lr / (1 - betas[0] ** step) * m / (v.sqrt() / root + eps), m, v


def gather(
    rows: Tensor, permutation: Tensor, cursor: Tensor, batch: int, flip: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16, channels: int | None = None, ticket: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The next `batch` rows (rows, H, W, C) uint8 by the permutation, mirrored, in [-1, 1]; moves the cursor."""
    places = (cursor + torch.arange(batch, device=rows.device)) % len(permutation)
    images = rows[permutation[places]].float() * (2 / 255) - 1
    if flip is not None:
        images = torch.where(flip[places][:, None, None, None] != 0, images.flip(2), images)
    cursor += batch
    images = F.pad(images, (0, (channels or rows.shape[3]) - rows.shape[3]))
    return images.to(dtype) if out is None else out.copy_(images)


def gan_loss(logits: Tensor, real: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """dlogits (N,) of the sum of the groups' mean losses, and (2, groups) mean losses, probabilities."""
    parts = logits.view(len(real), -1)
    parts = parts if parts.dtype == torch.float64 else parts.float()
    sign = parts.new_tensor([[-1.0 if is_real else 1.0] for is_real in real])
    dlogits = sign * (sign * parts).sigmoid() / parts.shape[1]
    return dlogits.flatten(), torch.stack([-F.logsigmoid(-sign * parts).mean(1), parts.sigmoid().mean(1)])


def head(
    y: Tensor, weight: Tensor, state: Tensor, real: Sequence[bool], activation: Activation = "leaky_relu",
    slope: float = 0.2, scale: Tensor | None = None, ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """logits (N,), dlogits (N,) of the sum of the groups' mean losses, and (2, groups) mean losses, probabilities."""
    _, _, scales, shifts = state[:, :, None]
    a = activate(grouped(y, state.shape[1]) * scales + shifts, activation, slope)
    logits = a.reshape(len(y), -1) @ weight.flatten().to(a.dtype)
    dlogits, means = gan_loss(logits, real)
    return logits, dlogits if scale is None else dlogits * scale.flatten()[0], means


def head_grad(
    y: Tensor, weight: Tensor, state: Tensor, dlogits: Tensor, activation: Activation = "leaky_relu",
    slope: float = 0.2, weight_grad: bool = True, out: Tensor | None = None,
    merge: MergeGradients | None = None,
) -> tuple[Tensor, Partials, Tensor | None]:  # fmt: skip
    """g behind y's activation, its sums, and the weight's gradient."""
    da = dlogits[:, None, None, None] * weight.to(dlogits.dtype)
    raw = y.to(dlogits.dtype)
    g, partials = activation_grad(da, raw, state, activation, slope)
    dw = torch.einsum("n,nhwc->hwc", dlogits, apply(raw, state, activation, slope))[None] if weight_grad else None
    return g.to(y.dtype), merge_gradients(partials, y, merge), dw if out is None or dw is None else out.copy_(dw)
