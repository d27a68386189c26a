"""Fused layers inside anyone's model: `fuse(model)` makes its Sequentials run conv + batch norm + activation as one.

Nothing moves: the children keep their names, parameters and buffers, so state dicts, optimisers and hooks on the model
stay as they are; only `forward` of the Sequential reads them together. Children that have hooks or a `forward` of their
own run as they are, and so does everything on an input that the ops do not take.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from kernels.conv_act import conv_act, conv_transpose_act
from kernels.conv_bn_act import conv_bn_act, conv_transpose_bn_act

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Identity: "none"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fusion(NamedTuple):
    """What `fuse` did: the convolutions that now run fused with what follows, and why others were left."""

    fused: tuple[str, ...]
    left: dict[str, str]


def why_left(convolution: nn.Module, norm: nn.Module | None = None, activation: nn.Module | None = None) -> str | None:
    """Why a convolution, its batch norm and its activation cannot run as one op; None where they can."""
    return (
        _why_itself(convolution, norm, activation)
        or _why_convolution(convolution)
        or (norm and _why_norm(norm))
        or (activation and _why_activation(activation))
    )


def _why_itself(convolution: nn.Module, norm: nn.Module | None, activation: nn.Module | None) -> str | None:
    """Why what a module does beyond its class would be bypassed; parametrizations are not."""
    parts = (("it", convolution), ("its batch norm", norm), ("its activation", activation))
    for name, module in parts:
        if module is None:
            continue
        kind = type_before_parametrizations(module)
        if kind not in (*CONVOLUTIONS, nn.BatchNorm2d, *ACTIVATIONS):
            return f"{name} is a {kind.__name__}, which may compute something else"
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own"
        if any(len(getattr(module, hooks)) for hooks in HOOKS):
            return f"{name} has a hook"
    return None


def _why_convolution(convolution: nn.Module) -> str | None:
    if convolution.bias is not None:
        return "it has a bias"
    if convolution.groups != 1:
        return f"it has {convolution.groups} groups"
    if convolution.dilation != (1, 1):
        return f"its dilation is {convolution.dilation}"
    if convolution.padding_mode != "zeros":
        return f"its padding mode is {convolution.padding_mode}"
    if not isinstance(convolution.padding, tuple) or getattr(convolution, "output_padding", (0, 0)) != (0, 0):
        return "its padding is not a plain number"
    for name in ("kernel_size", "stride", "padding"):
        if len(set(getattr(convolution, name))) != 1:
            return f"its {name} differs between the axes"
    return None


def _why_norm(norm: nn.BatchNorm2d) -> str | None:
    if not norm.affine:
        return "its batch norm has no weight and bias"
    if norm.momentum is None:
        return "its batch norm keeps a cumulative average"
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return "its batch norm keeps no running statistics"
    return None


def _why_activation(activation: nn.Module) -> str | None:
    slope = getattr(activation, "negative_slope", 0.0)
    return None if 0 <= slope <= 1 else f"its activation's negative_slope is {slope}: accepted are 0 to 1"


class FusedSequential(nn.Sequential):
    """A Sequential that runs each convolution together with the batch norm and activation that follow it.

    `bn_groups`, 1 unless set, is the number of equal parts of the batch with their own statistics.
    """

    bn_groups = 1

    def forward(self, x: Tensor) -> Tensor:
        children = list(self)
        i = 0
        while i < len(children):
            length = run_length(children, i)
            if length and not served(x):
                length = 0
            x = self._fused(x, *children[i : i + length]) if length else self._plain(x, children[i])
            i += max(1, length)
        return x

    def _plain(self, x: Tensor, child: nn.Module) -> Tensor:
        """A child as it is; a batch norm on each group by itself."""
        by_group = isinstance(child, _BatchNorm) and (child.training or child.running_mean is None)
        if self.bn_groups == 1 or not by_group:
            return child(x)
        if x.shape[0] % self.bn_groups:
            raise ValueError(f"bn_groups is {self.bn_groups}: it must divide the batch of {x.shape[0]}")
        return torch.cat([child(part) for part in x.chunk(self.bn_groups)])

    def _fused(self, x: Tensor, convolution: nn.Module, *rest: nn.Module) -> Tensor:
        norm = next((m for m in rest if isinstance(m, nn.BatchNorm2d)), None)
        last = rest[-1] if rest else None
        settings = {
            "stride": convolution.stride[0],
            "padding": convolution.padding[0],
            "activation": ACTIVATIONS.get(type_before_parametrizations(last), "none"),
            "negative_slope": getattr(last, "negative_slope", 0.2),
        }
        transposed = isinstance(convolution, nn.ConvTranspose2d)
        if norm is None:
            op = conv_transpose_act if transposed else conv_act
            return op(x, convolution.weight, **settings)
        op = conv_transpose_bn_act if transposed else conv_bn_act
        return op(
            x, convolution.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var,
            norm.num_batches_tracked, groups=self.bn_groups, training=norm.training, momentum=norm.momentum,
            eps=norm.eps, **settings,
        )  # fmt: skip


def served(x: Tensor) -> bool:
    """Whether the ops take a map: a batch of square images, not empty."""
    square = isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == x.shape[3] and x.numel() > 0
    return square and x.is_floating_point()


def followers(children: list[nn.Module], start: int) -> tuple[nn.Module | None, nn.Module | None]:
    """The batch norm and the activation that run with the convolution at `start`; None for what there is not."""
    norm = activation = None
    following = children[start + 1 : start + 3]
    if following and isinstance(following[0], nn.BatchNorm2d):
        norm = following.pop(0)
    if following and type_before_parametrizations(following[0]) in ACTIVATIONS:
        activation = following[0]
    return norm, None if norm is not None and isinstance(activation, nn.Tanh) else activation


def run_length(children: list[nn.Module], start: int) -> int:
    """How many modules from `start` on run as one op; 0 where the first is no convolution, or one to be left."""
    if not isinstance(children[start], CONVOLUTIONS):
        return 0
    norm, activation = followers(children, start)
    if why_left(children[start], norm, activation):
        return 0
    return 1 + (norm is not None) + (activation is not None)


def fuse(model: nn.Module) -> Fusion:
    """Make every plain `nn.Sequential` in `model` run its convolutions fused, in place.

    Returns:
        The names of the convolutions that run fused now, and those that were left, with the reason.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}: expected an nn.Module")
    fused, left = [], {}
    for name, module in model.named_modules():
        if type(module) is nn.Sequential:
            module.__class__ = FusedSequential
        inside = isinstance(module, FusedSequential)
        own = inside and "forward" in module.__dict__
        children = list(module._modules.values())  # a module that stands in it twice is there twice
        for i, (child, convolution) in enumerate(module._modules.items()):
            if not isinstance(convolution, CONVOLUTIONS):
                continue
            path = f"{name}.{child}" if name else child
            if not inside:
                left[path] = "it is not in a Sequential"
            elif own:
                left[path] = "its Sequential has a forward of its own"
            elif reason := why_left(convolution, *followers(children, i)):
                left[path] = reason
            else:
                fused.append(path)
    return Fusion(tuple(fused), left)
