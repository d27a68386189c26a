"""Fused layers inside anyone's model: `fuse(model)` makes its Sequentials run conv + batch norm + activation as one.

Nothing moves: the children keep their names, parameters and buffers, so state dicts, optimisers and hooks on the model
stay as they are; only `forward` of the Sequential reads them together.
"""

from typing import NamedTuple

from torch import Tensor, nn

from kernels.conv_act import conv_act, conv_transpose_act
from kernels.conv_bn_act import conv_bn_act, conv_transpose_bn_act

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
ACTIVATIONS = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh", nn.Identity: "none"}


class Fusion(NamedTuple):
    """What `fuse` did: the convolutions that now run fused with what follows, and why others were left."""

    fused: tuple[str, ...]
    left: dict[str, str]


def why_left(convolution: nn.Module, norm: nn.BatchNorm2d | None) -> str | None:
    """Why a convolution and its batch norm cannot run as one op; None where they can."""
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
    if norm is not None and not norm.affine:
        return "its batch norm has no weight and bias"
    if norm is not None and norm.momentum is None:
        return "its batch norm keeps a cumulative average"
    if norm is not None and not norm.track_running_stats:
        return "its batch norm keeps no running statistics"
    return None


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
            x = self._fused(x, *children[i : i + length]) if length else children[i](x)
            i += max(1, length)
        return x

    def _fused(self, x: Tensor, convolution: nn.Module, *rest: nn.Module) -> Tensor:
        norm = next((m for m in rest if isinstance(m, nn.BatchNorm2d)), None)
        last = rest[-1] if rest else None
        settings = {
            "stride": convolution.stride[0],
            "padding": convolution.padding[0],
            "activation": ACTIVATIONS.get(type(last), "none"),
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


def run_length(children: list[nn.Module], start: int) -> int:
    """How many modules from `start` on run as one op; 0 where the first is no convolution, or one to be left."""
    if not isinstance(children[start], CONVOLUTIONS):
        return 0
    end = start + 1
    norm = None
    if end < len(children) and isinstance(children[end], nn.BatchNorm2d):
        norm = children[end]
        end += 1
    if why_left(children[start], norm):
        return 0
    if end < len(children) and type(children[end]) in ACTIVATIONS and not (norm and type(children[end]) is nn.Tanh):
        end += 1
    return end - start


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
        children = list(module.named_children())
        for i, (child, convolution) in enumerate(children):
            if not isinstance(convolution, CONVOLUTIONS):
                continue
            path = f"{name}.{child}" if name else child
            if not inside:
                left[path] = "it is not in a Sequential"
                continue
            following = children[i + 1][1] if i + 1 < len(children) else None
            reason = why_left(convolution, following if isinstance(following, nn.BatchNorm2d) else None)
            if reason:
                left[path] = reason
            else:
                fused.append(path)
    return Fusion(tuple(fused), left)
