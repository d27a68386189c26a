"""The layers of a DCGAN as registered ops: forward and backward written over one set of launchers.

The convolution is a backend's own for kernel 4, stride 2, padding 1 on even sizes, every middle layer; elsewhere (a
DCGAN's 4×4 ends) it is the library's, and what surrounds it is still the backend's.

`kernels.reference` and `kernels._triton` have launchers of the same names, so each pass is written once. The ops carry
schemas and fake kernels (`torch.library`), which is what torch.compile and CUDA-graph capture see; autograd wraps them
from outside, because that costs least (and an op that moves running statistics is then no false mutation to it).

Tensors inside are NHWC; weights are packed (low, 4, 4, high), which is a parameter in channels_last memory permuted by
(0, 2, 3, 1), for Conv2d and ConvTranspose2d alike.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from kernels import reference
from kernels.geometry import Epilogue, nchw, nhwc
from kernels.launchers import launchers
from kernels.library import switches

aten = torch.ops.aten
LIBRARY = torch.library.Library("dcgan_kernels", "DEF")


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as the launchers take it; only a cast where it lies in channels_last memory."""
    return dense_nhwc(weight.to(dtype))


def dense_nhwc(images: Tensor) -> Tensor:
    """(N, C, H, W) as contiguous (N, H, W, C) on a 16-byte boundary; no copy of aligned channels_last memory."""
    images = nhwc(images).contiguous()
    return images if images.data_ptr() % 16 == 0 else images.clone()


def precision(backend: str) -> dict:
    """fp32 products follow PyTorch's own switch for convolutions; the reference twins have no such choice."""
    return {} if backend == "eager" else {"precision": "tf32" if switches.tf32 else "ieee"}


class Shape(NamedTuple):
    """What the passes of a layer share: `conv` or `conv_transpose`, stride and padding."""

    kind: str
    stride: int
    padding: int

    def has_kernel(self, weight: Tensor, low_or_high: Tensor) -> bool:
        """Whether the backends' own convolutions serve an NCHW weight and a map of either side."""
        even = self.kind == "conv_transpose" or low_or_high.shape[2] % 2 == 0
        return (weight.shape[2], self.stride, self.padding) == (4, 2, 1) and even

    def out(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(N, C, H, W) of the raw output."""
        n, _, size, _ = x.shape
        k, s, p = weight.shape[2], self.stride, self.padding
        if self.kind == "conv":
            return (n, weight.shape[0], *(2 * ((size + 2 * p - k) // s + 1,)))
        return (n, weight.shape[1], *(2 * ((size - 1) * s - 2 * p + k,)))


def forward_product(shape: Shape, x: Tensor, weight: Tensor, epilogue: Epilogue, backend: str):
    """The raw or finished output (N, H, W, C), and its partials where the epilogue takes statistics."""
    if shape.has_kernel(weight, x):
        launcher = getattr(launchers(backend), shape.kind)
        return launcher(dense_nhwc(x), pack(weight, x.dtype), epilogue, **precision(backend))
    convolution = F.conv2d if shape.kind == "conv" else F.conv_transpose2d
    y = dense_nhwc(convolution(x, weight.to(x.dtype), stride=shape.stride, padding=shape.padding))
    if epilogue.statistics:
        return y, launchers(backend).statistics(y, epilogue.groups)
    if epilogue.state is not None:
        return launchers(backend).apply(y, epilogue.state, epilogue.activation, epilogue.slope), None
    return reference.activate(y, epilogue.activation, epilogue.slope), None


def backward_products(
    shape: Shape, dy: Tensor, x: Tensor, weight: Tensor, for_x: bool, for_weight: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients by x and weight from the one by the raw output (N, H, W, C); empty where not wanted."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if not shape.has_kernel(weight, x):
        got = aten.convolution_backward(
            nchw(dy), x, weight.to(x.dtype), None, [shape.stride] * 2, [shape.padding] * 2, [1, 1],
            shape.kind == "conv_transpose", [0, 0], 1, [for_x, for_weight, False],
        )  # fmt: skip
        return got[0] if for_x else dx, got[1].to(weight.dtype) if for_weight else dweight
    launch = launchers(backend)
    if for_x:
        launcher = launch.conv_transpose if shape.kind == "conv" else launch.conv
        dx = nchw(launcher(dy, pack(weight, x.dtype), Epilogue(), **precision(backend))[0])
    if for_weight:
        low, high = (dy, dense_nhwc(x)) if shape.kind == "conv" else (dense_nhwc(x), dy)
        dweight = nchw(launch.wgrad(low, high, **precision(backend))).to(weight.dtype)
    return dx, dweight


def act_forward(
    kind: str, x: Tensor, weight: Tensor, stride: int, padding: int, activation: str, slope: float, backend: str
) -> Tensor:
    y, _ = forward_product(Shape(kind, stride, padding), x, weight, Epilogue(activation, slope), backend)
    return nchw(y)


def activation_backward(grad: Tensor, out: Tensor, activation: str, slope: float) -> Tensor:
    """grad · activation′ where the output is `out`, in one pass; at 0 the left derivative."""
    if activation == "tanh":
        return aten.tanh_backward(grad, out)
    if activation == "relu":
        return aten.threshold_backward(grad, out, 0)
    return aten.leaky_relu_backward(grad, out, slope, True) if activation == "leaky_relu" else grad


def act_backward(
    kind: str, grad: Tensor, x: Tensor, weight: Tensor, out: Tensor, stride: int, padding: int, activation: str,
    slope: float, for_x: bool, for_weight: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients by x and weight; empty tensors where not wanted."""
    dy = activation_backward(dense_nhwc(grad), dense_nhwc(out), activation, slope).to(x.dtype)
    return backward_products(Shape(kind, stride, padding), dy, x, weight, for_x, for_weight, backend)


def bn_act_forward(
    kind: str, x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, tracked: Tensor | None, stride: int, padding: int, activation: str, slope: float,
    groups: int, momentum: float, eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The activated output, and what the backward needs: the raw output and the batch-norm state."""
    launch = launchers(backend)
    statistics = Epilogue("none", groups=groups, statistics=True)
    y, partials = forward_product(Shape(kind, stride, padding), x, weight, statistics, backend)
    state = launch.merge_statistics(partials, gamma, beta, running_mean, running_var, tracked, eps, momentum)
    return nchw(launch.apply(y, state, activation, slope)), nchw(y), state


def bn_act_backward(
    kind: str, grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, state: Tensor, stride: int, padding: int,
    activation: str, slope: float, for_x: bool, for_weight: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients by x, weight, gamma and beta; the first two empty where not wanted."""
    launch = launchers(backend)
    raw = dense_nhwc(y)
    g, partials = launch.activation_grad(dense_nhwc(grad), raw, state, activation, slope)
    pixels = raw.numel() // raw.shape[-1] // state.shape[1]
    dgamma, dbeta, means = launch.merge_sums(partials, pixels)
    dy = launch.apply_grad(g, raw, state, means)
    gradients = backward_products(Shape(kind, stride, padding), dy, x, weight, for_x, for_weight, backend)
    return *gradients, dgamma, dbeta


def fake_act(kind, x, weight, stride, padding, activation, slope, backend):
    empty = x.new_empty(Shape(kind, stride, padding).out(x, weight))
    return empty.contiguous(memory_format=torch.channels_last)


def fake_gradients(x, weight, for_x, for_weight):
    last = torch.channels_last
    dx = x.new_empty(x.shape).contiguous(memory_format=last) if for_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape).contiguous(memory_format=last) if for_weight else weight.new_empty(0)
    return dx, dweight


def fake_act_backward(kind, grad, x, weight, out, stride, padding, activation, slope, for_x, for_weight, backend):
    return fake_gradients(x, weight, for_x, for_weight)


def fake_bn_act(
    kind, x, weight, gamma, beta, running_mean, running_var, tracked, stride, padding, activation, slope, groups,
    momentum, eps, backend,
):  # fmt: skip
    y = fake_act(kind, x, weight, stride, padding, activation, slope, backend)
    return y, torch.empty_like(y), gamma.new_empty((4, groups, y.shape[1]))


def fake_bn_act_backward(
    kind, grad, x, weight, y, state, stride, padding, activation, slope, for_x, for_weight, backend
):  # fmt: skip
    channels = state.shape[2]
    return *fake_gradients(x, weight, for_x, for_weight), state.new_empty(channels), state.new_empty(channels)


SCHEMAS = {
    "act": "(Tensor x, Tensor weight, int stride, int padding, str activation, float slope, str backend) -> Tensor",
    "act_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor out, int stride, int padding, str activation, "
    "float slope, bool for_x, bool for_weight, str backend) -> (Tensor, Tensor)",
    "bn_act": "(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? tracked, int stride, int padding, str activation, float slope, int groups, float momentum, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    "bn_act_backward": "(Tensor grad, Tensor x, Tensor weight, Tensor y, Tensor state, int stride, int padding, "
    "str activation, float slope, bool for_x, bool for_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
}
PASSES = {
    "act": (act_forward, fake_act),
    "act_backward": (act_backward, fake_act_backward),
    "bn_act": (bn_act_forward, fake_bn_act),
    "bn_act_backward": (bn_act_backward, fake_bn_act_backward),
}


def _register(kind: str, name: str) -> None:
    run, fake = PASSES[name]
    op = f"{kind}_{name}"
    LIBRARY.define(op + SCHEMAS[name])
    LIBRARY.impl(op, lambda *args: run(kind, *args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"dcgan_kernels::{op}", lambda *args: fake(kind, *args), lib=LIBRARY)


for _kind in ("conv", "conv_transpose"):
    for _name in SCHEMAS:
        _register(_kind, _name)


def op(kind: str, name: str):
    """A registered op: `torch.ops.dcgan_kernels.<kind>_<name>`."""
    return getattr(torch.ops.dcgan_kernels, f"{kind}_{name}").default


def refuse_double_backward() -> None:
    """Raise where a graph of this backward is wanted: its derivatives would silently be missing from it."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("the fused ops have no double backward: run them with backend='eager' for create_graph=True")


class Act(Function):
    """A convolution of either kind and its activation; `settings` are stride, padding, activation and slope."""

    @staticmethod
    def forward(ctx, x, weight, kind, settings, backend):
        out = op(kind, "act")(x, weight, *settings, backend)
        ctx.save_for_backward(x, weight, out)
        ctx.settings = kind, settings, backend
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        kind, settings, backend = ctx.settings
        for_x, for_weight = ctx.needs_input_grad[:2]
        dx, dweight = op(kind, "act_backward")(grad, *ctx.saved_tensors, *settings, for_x, for_weight, backend)
        return dx if for_x else None, dweight if for_weight else None, None, None, None


class BatchNormAct(Function):
    """A convolution of either kind, batch norm with the batch's statistics, and the activation.

    `running` are running mean, running variance and counter, or None; `norm` are groups, momentum and ε.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, running, kind, settings, norm, backend):
        out, y, state = op(kind, "bn_act")(x, weight, gamma, beta, *running, *settings, *norm, backend)
        ctx.save_for_backward(x, weight, y, state)
        ctx.settings = kind, settings, backend
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward()
        kind, settings, backend = ctx.settings
        for_x, for_weight, for_gamma, for_beta = ctx.needs_input_grad[:4]
        backward = op(kind, "bn_act_backward")
        dx, dweight, dgamma, dbeta = backward(grad, *ctx.saved_tensors, *settings, for_x, for_weight, backend)
        wanted = zip((dx, dweight, dgamma, dbeta), (for_x, for_weight, for_gamma, for_beta), strict=True)
        return *(gradient if want else None for gradient, want in wanted), None, None, None, None, None
