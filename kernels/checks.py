"""What every op checks before it runs: one clear error that names the argument, and never a wrong number."""

import torch
from torch import Tensor

from kernels.geometry import Layer

ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh")


def autocast(x: Tensor) -> Tensor:
    """x in the type that autocast asks for on its device; x itself outside autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def check_layer(
    kind: str, x: Tensor, weight: Tensor, stride: int, padding: int, activation: str, slope: float, batch_norm: bool
) -> Layer:
    """The geometry of a call.

    Args:
        kind: `conv` or `conv_transpose`.
        x: (N, C, H, W); weight: (out, C, R, R), or (C, out, R, R) for `conv_transpose`.

    Raises:
        ValueError, TypeError: an argument, by name, with what was given and what is accepted.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected four dimensions")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}: expected a floating-point tensor")
    if x.device != weight.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}: expected one device")
    if not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}: it must not be empty")
    if x.shape[2] != x.shape[3] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}: expected square images and square kernels"
        )
    into, out = (weight.shape[1], weight.shape[0]) if kind == "conv" else (weight.shape[0], weight.shape[1])
    if x.shape[1] != into:
        raise ValueError(f"x has {x.shape[1]} channels, weight {tuple(weight.shape)} takes {into}")
    if stride < 1 or padding < 0:
        raise ValueError(f"stride is {stride}, padding is {padding}: accepted are stride from 1, padding from 0")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}: accepted are {', '.join(ACTIVATIONS)}")
    if batch_norm and activation == "tanh":
        raise ValueError("activation is 'tanh': after batch norm, accepted are none, relu and leaky_relu")
    if not 0 <= slope <= 1:
        raise ValueError(f"negative_slope is {slope}: accepted are 0 to 1")
    layer = Layer(
        "layer", kind, into, out, x.shape[2], weight.shape[2], stride, padding, batch_norm, activation
    )  # fmt: skip
    if layer.out_size < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}: smaller than the kernel of {layer.kernel}")
    return layer


def check_batch_norm(
    x: Tensor, layer: Layer, gamma: Tensor, beta: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    groups: int, training: bool,
) -> None:  # fmt: skip
    """Raise ValueError where batch norm's tensors do not fit `layer`, or `groups` the batch."""
    vectors = {"bn_weight": gamma, "bn_bias": beta, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None and (tuple(vector.shape) != (layer.out_channels,) or vector.device != x.device):
            got = f"{tuple(vector.shape)} on {vector.device}"
            raise ValueError(f"{name} is {got}: expected ({layer.out_channels},) on {x.device}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: give both or neither")
    if not training and running_mean is None:
        raise ValueError("running_mean is None: needed where training=False")
    if groups < 1 or x.shape[0] % groups:
        raise ValueError(f"groups is {groups}: it must divide the batch of {x.shape[0]}")
    if training and x.shape[0] // groups * layer.out_size**2 < 2:
        raise ValueError("a group has 1 value a channel: training-mode batch norm needs at least 2")
