"""The shares of a weight gradient that blocks of the extension's kernels leave, and their sum (csrc/shares.cu)."""

from torch import Tensor

from kernels._cuda import launch as _launch
from kernels.geometry import Shares


def empty_shares(split: int, gradient: Tensor) -> Tensor:
    """Room for `split` shares of a gradient (L, 4, 4, C) float32; the gradient itself where there is one."""
    return gradient if split == 1 else gradient.new_empty((split, *gradient.shape))


def settle(shares: Tensor, gradient: Tensor, pending: list[Shares] | None) -> Tensor:
    """Add the shares up into the gradient, in order, or leave that pending; returns the gradient."""
    if shares is gradient:
        return gradient
    if pending is None:
        _launch.launch("sum_shares", shares, gradient, gradient.numel(), len(shares))
    else:
        pending.append(Shares(shares, gradient))
    return gradient
