"""`conv_bn_act` and `conv_transpose_bn_act`: a convolution of either kind, batch norm and an activation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import engine, reference
from kernels.checks import autocast, check_batch_norm, check_layer
from kernels.dispatch import backend_of
from kernels.geometry import Epilogue, nchw


def conv_bn_act(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, num_batches_tracked: Tensor | None = None, *, stride: int = 2, padding: int = 1,
    activation: str = "leaky_relu", negative_slope: float = 0.2, groups: int = 1, training: bool = True,
    momentum: float = 0.1, eps: float = 1e-5, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Convolution, batch norm, activation: z = x ∗ weight, y = act(bn_weight·(z − m)/√(v + eps) + bn_bias).

    1. z, and in the same kernel each tile's mean and M2, a group of images at a time.
    2. m, v of each group, merged from the tiles in order; the running statistics move once a group, in order.
    3. The affine map and the activation, in one pass.

    Args:
        x: (N, C, H, W) bfloat16, float16, float32 or float64, H = W; channels_last memory, other layouts are copied to
            it. Under autocast it is cast first.
        weight: (O, C, R, R), cast to x's type; best in channels_last memory. Its gradient has its own type.
        bn_weight, bn_bias: (O,) float32 (float64 with a float64 x).
        running_mean, running_var: (O,), moved in place when training, towards the unbiased variance; used when not.
        num_batches_tracked: () int64, grows by `groups` when training.
        stride, padding: of both axes. For kernel 4, stride 2, padding 1 on an even size the backends have a
            convolution of their own; elsewhere they take the library's.
        activation: `none`, `relu` or `leaky_relu`.
        negative_slope: of leaky_relu, 0 to 1.
        groups: equal parts of the batch with their own statistics (real and fake images).
        training: the batch's statistics, or the running ones. With the running ones the fused kernels have no backward:
            where a gradient is wanted only `eager` can run.
        momentum, eps: as in BatchNorm2d.
        backend: one of `kernels.dispatch.BACKENDS`; None: that of `use_backend`, else `auto`.

    Returns:
        (N, O, H', W') of x's type, channels_last.

    Raises:
        ValueError, TypeError: an argument that does not fit, by name.
        BackendError: a backend asked for by name that cannot run.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1; docs/batch_norm.md.
    """
    return _bn_act(
        "conv", x, weight, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, stride, padding,
        activation, negative_slope, groups, training, momentum, eps, backend,
    )  # fmt: skip


def conv_transpose_bn_act(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, running_mean: Tensor | None = None,
    running_var: Tensor | None = None, num_batches_tracked: Tensor | None = None, *, stride: int = 2, padding: int = 1,
    activation: str = "relu", negative_slope: float = 0.2, groups: int = 1, training: bool = True,
    momentum: float = 0.1, eps: float = 1e-5, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Transposed convolution without bias, batch norm, activation: a generator's middle layer.

    As `conv_bn_act`, but weight is (C, O, R, R), as ConvTranspose2d's, and the result twice as large for kernel 4,
    stride 2, padding 1.
    """
    return _bn_act(
        "conv_transpose", x, weight, bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, stride,
        padding, activation, negative_slope, groups, training, momentum, eps, backend,
    )  # fmt: skip


def _bn_act(
    kind, x, weight, gamma, beta, running_mean, running_var, tracked, stride, padding, activation, slope, groups,
    training, momentum, eps, backend,
):  # fmt: skip
    layer = check_layer(kind, x, weight, stride, padding, activation, slope, batch_norm=True)
    x = autocast(x)
    check_batch_norm(x, layer, gamma, beta, running_mean, running_var, tracked, groups, training, momentum, eps)
    unless = _only_eager(gamma.dtype, training, any(t.requires_grad for t in (x, weight, gamma, beta)))
    backend = backend_of(f"{kind}_bn_act", layer, x.device, x.dtype, backend, x.shape[0], unless)
    settings = (stride, padding, activation, slope)
    if backend != "eager" and training:
        running = (running_mean, running_var, tracked)
        return engine.BatchNormAct.apply(
            x, weight, gamma, beta, running, kind, settings, (groups, momentum, eps), backend
        )
    if backend != "eager":
        return _evaluate(kind, x, weight, gamma, beta, running_mean, running_var, settings, eps, backend)
    convolution = F.conv2d if kind == "conv" else F.conv_transpose2d
    z = convolution(x, weight.to(x.dtype), stride=stride, padding=padding)
    parts = [F.batch_norm(part, running_mean, running_var, gamma, beta, training, momentum, eps)
             for part in (z.chunk(groups) if training else (z,))]  # fmt: skip
    if training and tracked is not None:
        tracked.add_(groups)
    return reference.activate(parts[0] if len(parts) == 1 else torch.cat(parts), activation, slope)


def _only_eager(dtype: torch.dtype, training: bool, requires_grad: bool) -> str | None:
    """Why no fused kernel serves batch norm with a weight of this type, in this mode; None where one does."""
    if dtype != torch.float32:
        return f"bn_weight is {dtype}: the fused kernels take float32"
    if not training and requires_grad and torch.is_grad_enabled():
        return (
            "training=False has no backward in the fused kernels, and a gradient is wanted: call it in torch.no_grad()"
        )
    return None


def _evaluate(kind, x, weight, gamma, beta, running_mean, running_var, settings, eps, backend):
    """Evaluation mode without gradients: batch norm and activation in the product's epilogue."""
    stride, padding, activation, slope = settings
    epilogue = Epilogue(activation, slope, state=running_state(gamma, beta, running_mean, running_var, eps))
    y, _ = engine.forward_product(engine.Shape(kind, stride, padding), x, weight, epilogue, backend)
    return nchw(y)


def running_state(gamma: Tensor, beta: Tensor, running_mean: Tensor, running_var: Tensor, eps: float) -> Tensor:
    """The batch-norm state (4, 1, C) float32 that the running statistics make."""
    rstd = (running_var.float() + eps).rsqrt()
    scale = gamma * rstd
    return torch.stack([running_mean, rstd, scale, beta - running_mean * scale])[:, None].float().contiguous()
