"""What the extension's convolutions share: checks of maps and weight, checks of the epilogue, and its tensors."""

import torch
from torch import Tensor

from kernels.arguments import check_merge, tickets
from kernels.geometry import Epilogue, Partials, check_nhwc, check_tensor


def check_conv(x: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    """Images, low height and width, channels in and out of a convolution of x (N, 2H, 2W, C) by (O, 4, 4, C).

    Raises:
        ValueError: they do not fit, by name.
    """
    check_nhwc("x", x)
    check_nhwc("weight", weight, x)
    images, height, width, into = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: a k4 s2 p1 convolution here takes even heights and widths")
    out = weight.shape[0]
    check_tensor("weight", weight, (out, 4, 4, into), x.dtype, x)
    return images, height // 2, width // 2, into, out


def check_conv_transpose(x: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    """As `check_conv`, of a transposed convolution of x (N, H, W, C) by (C, 4, 4, O)."""
    check_nhwc("x", x)
    check_nhwc("weight", weight, x)
    images, height, width, into = x.shape
    out = weight.shape[3]
    check_tensor("weight", weight, (into, 4, 4, out), x.dtype, x)
    if height * width * into >= 2**31:  # places within an image are 32-bit
        raise ValueError(f"x has shape {tuple(x.shape)}: an image must have fewer than 2^31 elements")
    return images, height, width, into, out


def check_wgrad(low: Tensor, high: Tensor) -> tuple[int, int, int, int, int]:
    """Images, low height and width, low and high channels of low (N, H, W, L) and high (N, 2H, 2W, C)."""
    check_nhwc("low", low)
    check_nhwc("high", high, low)
    images, height, width, rows = low.shape
    channels = high.shape[3]
    check_tensor("high", high, (images, 2 * height, 2 * width, channels), low.dtype, low)
    return images, height, width, rows, channels


def output(out: Tensor | None, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """`out`, once it fits, or a new tensor of `like`'s device."""
    if out is None:
        return like.new_empty(shape, dtype=dtype)
    check_tensor("out", out, shape, dtype, like)
    return out


def check_epilogue(epilogue: Epilogue, out: Tensor, images: int) -> None:
    """Raise ValueError if the epilogue does not fit an output (N, H, W, C), naming the argument."""
    if epilogue.groups < 1 or images % epilogue.groups:
        raise ValueError(f"groups is {epilogue.groups}: it must divide the batch of {images}")
    if epilogue.activation not in ("none", "relu", "leaky_relu", "tanh"):
        raise ValueError(f"activation is {epilogue.activation!r}: accepted are none, relu, leaky_relu and tanh")
    if epilogue.statistics and (epilogue.activation != "none" or epilogue.saved is not None):
        raise ValueError("statistics=True requires a raw output: activation='none' and no saved tensor")
    if epilogue.merge is not None and not epilogue.sums:
        raise ValueError(
            "merge is given, but the epilogue takes no sums: merge needs statistics=True, or saved and state"
        )
    if epilogue.state is not None:
        if epilogue.saved is None:
            raise ValueError("state is given without saved: the extension's epilogues do not apply batch norm")
        if epilogue.activation == "tanh":
            raise ValueError("activation is 'tanh': after batch norm, accepted are none, relu and leaky_relu")
        check_tensor("state", epilogue.state, (4, epilogue.groups, out.shape[3]), torch.float32, out)
    if epilogue.saved is not None:
        check_tensor("saved", epilogue.saved, tuple(out.shape), out.dtype, out)


TOGETHER = 32
"""Tiles that are merged first, as in csrc/conv_merge.h."""


def merging(epilogue: Epilogue, values: Tensor | None, rows: int, columns: int) -> tuple[Tensor | None, ...]:
    """Tensors for a product whose last blocks merge what its tiles leave: rounds, round_counts, tickets, weight, bias,
    running_mean, running_var, tracked, dweight, dbias, merged; None of each where the epilogue has no `merge`.

    Args:
        values: (2, groups, tiles, C) of the tiles.
        rows: pixels of a group.
        columns: channels of a tile.

    Raises:
        ValueError: vectors that do not fit, by name.
    """
    merge = epilogue.merge
    if merge is None or values is None:
        return (None,) * 11
    _, groups, tiles, channels = values.shape
    check_merge(merge, channels, values)
    if epilogue.statistics and rows == 1:
        raise ValueError("a group has 1 value per channel: training-mode batch norm needs at least 2")
    rounds = -(-tiles // TOGETHER)
    workspace = values.new_empty((2, groups, rounds, channels)), values.new_empty((groups, rounds))
    zeros = tickets(values, -(-channels // columns) * (1 + groups * rounds))
    merged = values.new_empty((4 if epilogue.statistics else 2, groups, channels))
    if epilogue.statistics:
        return *workspace, zeros, *merge[:5], None, None, merged
    return *workspace, zeros, None, None, None, None, None, *merge, merged


def left(
    epilogue: Epilogue, values: Tensor | None, counts: Tensor | None, merged: Tensor | None
) -> Partials | Tensor | None:
    """What a product returns beside its output: the merged sums, else the tiles' `Partials`, or nothing."""
    if merged is not None:
        return merged
    return Partials(values, counts) if epilogue.sums else None
