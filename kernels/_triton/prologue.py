"""What a GEMM does with a tile of its input between the load and the product; shared by conv, conv_transpose, wgrad.

The map in memory is a layer's raw output; its batch norm and activation are applied here, on the way to the tensor
cores, and the activated map is never written. The arithmetic is done once for each time a tile is loaded, though:
4·⌈CO/BN⌉ times per element in `conv`, 16·⌈CO/BN⌉ in `conv_transpose`, 1 to 2 onto an image: docs/convolution.md.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels._triton.epilogue import activate
from kernels.geometry import Deferred, check_nhwc, check_tensor, raw


@triton.jit
def applied(x, seen, state, group, groups, c, C: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """activation(scale·x + shift) of a tile x (pixels, channels) of one group, in fp32, rounded to its type.

    c: each column's channel, those past C being overhang. seen: what is of the picture, broadcast to x; the rest is 0
    afterwards, since the padding is of the activated map, and act(shift) is not 0.
    """
    at = group * C + c
    scale = tl.load(state + 2 * groups * C + at, mask=c < C, other=0.0)
    shift = tl.load(state + 3 * groups * C + at, mask=c < C, other=0.0)
    z = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], ACTIVATION, SLOPE)
    return tl.where(seen, z, 0.0).to(x.dtype)


def check_input(name: str, x: Tensor | Deferred, like: Tensor | None = None, groups: int | None = None) -> Tensor:
    """The map behind an input, checked.

    Args:
        name: of the argument.
        like: has the dtype and device it must have.
        groups: that a state must have; None for any that divide the batch.

    Raises:
        ValueError: a map or a state that does not fit, by name.
    """
    y = raw(x)
    check_nhwc(name, y, like)
    if isinstance(x, Deferred):
        if x.activation not in ("none", "relu", "leaky_relu"):
            raise ValueError(f"{name}.activation is {x.activation!r}: accepted are none, relu and leaky_relu")
        if groups is None:
            groups = groups_of(x)
            if y.shape[0] % groups:
                raise ValueError(f"{name}.state has {groups} groups: they must divide the batch of {y.shape[0]}")
        check_tensor(f"{name}.state", x.state, (4, groups, y.shape[3]), torch.float32, y)
    return y


def groups_of(x: Tensor | Deferred) -> int:
    """Groups of a deferred map's state; 1 of any other."""
    return x.state.shape[1] if isinstance(x, Deferred) and x.state.ndim == 3 else 1


def prologue(x: Tensor | Deferred) -> dict[str, Any]:
    """A kernel's arguments for an input: its state, None for a map that is loaded as it is, and the activation."""
    if isinstance(x, Deferred):
        return {"x_state": x.state, "BEFORE": x.activation, "BEFORE_SLOPE": x.slope}
    return {"x_state": None, "BEFORE": "none", "BEFORE_SLOPE": 0.0}
