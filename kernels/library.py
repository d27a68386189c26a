"""The three products by PyTorch's library (cuDNN, oneDNN), as launchers: the convolution theirs, what follows it ours.

The recipe `library` of a tuned table. Layouts and results are those of the launchers in `kernels._triton`; what their
epilogues do in registers is a pass over the output here, by the launchers that the products are made `around`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.geometry import Deferred, Epilogue, Partials, Shares, nchw, nhwc


class _Switches(ModuleType):
    """A module, as torch.backends are: torch.compile takes an attribute of one for a constant and guards on it, where
    it cannot trace what reads the attribute."""

    @property
    def tf32(self) -> bool:
        """Whether float32 convolutions may use TF32, by whichever of PyTorch's settings."""
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


switches = _Switches(f"{__name__}.switches")


@contextmanager
def tf32(allowed: bool, backend: Any = torch.backends.cudnn) -> Iterator[None]:
    """Float32 convolutions with TF32 or without it; matrix products where `backend` is torch.backends.cuda.matmul.

    PyTorch has a flag (`allow_tf32`) and settings (`fp32_precision`, here and for several backends at once), and once
    the settings were used to read the flag is an error. So the flag is moved where only it was used, else the setting.
    """
    switch = getattr(backend, "conv", backend)
    moved = [switch] if switch is backend else [switch, backend.rnn]  # what the flag moves too
    before = [part.fp32_precision for part in moved]
    if (before[0] == "tf32") == allowed:
        yield
        return
    by_flag = _only_the_flag_was_used(backend)
    if by_flag:
        backend.allow_tf32 = allowed
    else:
        switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if by_flag:
            backend.allow_tf32 = not allowed
        for part, precision in zip(moved if by_flag else moved[:1], before, strict=False):
            if part.fp32_precision != precision:
                _restore(part, precision)


def _only_the_flag_was_used(backend: Any) -> bool:
    if torch.backends.cudnn.fp32_precision != "none":  # of CUDA's operations, or of all backends
        return False
    try:
        return backend.allow_tf32 in (True, False)
    except RuntimeError:
        return False


def _restore(switch: Any, before: str) -> None:
    """Inherited again where that is the same, so that it follows a later change of what it inherits."""
    switch.fp32_precision = "none"
    if switch.fp32_precision != before:
        switch.fp32_precision = before


def arithmetic(dtype: torch.dtype, precision: str) -> Any:
    """Float32 convolutions in the launchers' `precision`, whatever PyTorch's own switch says."""
    return tf32(precision == "tf32") if dtype == torch.float32 else nullcontext()


class Products:
    """`conv`, `conv_transpose` and `wgrad`; `launch` has `apply`, `statistics`, `activation_grad` and `merge_sums`."""

    def __init__(self, launch: ModuleType | SimpleNamespace):
        self.launch = launch

    def settled(self, x: Tensor | Deferred) -> Tensor:
        """A map, its batch norm and activation applied."""
        return self.launch.apply(*x) if isinstance(x, Deferred) else x

    def finish(self, y: Tensor, e: Epilogue) -> tuple[Tensor, Partials | Tensor | None]:
        """The epilogue of a raw output y (N, H, W, C); its partials, or what `merge` makes of them."""
        if e.mode == "statistics":
            return y, self.launch.statistics(y, e.groups, e.merge)
        if e.mode == "batch_norm":
            return self.launch.apply(y, e.state, e.activation, e.slope), None
        if e.mode != "batch_norm_grad":
            return reference.finish(y, e)
        g, partials = self.launch.activation_grad(y, e.saved, e.state, e.activation, e.slope)
        if e.merge is None:
            return g, partials
        return g, self.launch.merge_sums(partials, y[..., 0].numel() // e.groups, e.merge.out)[2]

    def conv(
        self, x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee"
    ) -> tuple[Tensor, Partials | Tensor | None]:
        """Convolution k4 s2 p1 of x (N, 2H, 2W, C) by weight (O, 4, 4, C): (N, H, W, O), and the epilogue."""
        x = self.settled(x)
        with arithmetic(x.dtype, precision):
            y = F.conv2d(nchw(x), nchw(weight), stride=2, padding=1)
        return self.finish(nhwc(y).contiguous(), epilogue or Epilogue())

    def conv_transpose(
        self, x: Tensor | Deferred, weight: Tensor, epilogue: Epilogue | None = None, precision: str = "ieee",
        out: Tensor | None = None,
    ) -> tuple[Tensor, Partials | Tensor | None]:  # fmt: skip
        """The transposed one of x (N, H, W, C) by weight (C, 4, 4, O): (N, 2H, 2W, O), and the epilogue."""
        x = self.settled(x)
        with arithmetic(x.dtype, precision):
            y = F.conv_transpose2d(nchw(x), nchw(weight), stride=2, padding=1)
        y, partials = self.finish(nhwc(y).contiguous(), epilogue or Epilogue())
        return y if out is None else out.copy_(y), partials

    def wgrad(
        self, low: Tensor | Deferred, high: Tensor | Deferred, precision: str = "ieee", out: Tensor | None = None,
        pending: list[Shares] | None = None,
    ) -> Tensor:  # fmt: skip
        """Weight gradient (L, 4, 4, C) float32 from low (N, H, W, L) and high (N, 2H, 2W, C), in whose type it is
        rounded by the library; nothing is left pending."""
        low, high = self.settled(low), self.settled(high)
        shape = high.new_empty(()).expand(low.shape[3], high.shape[3], 4, 4)  # the library reads only its shape
        with arithmetic(low.dtype, precision):
            _, gradient, _ = torch.ops.aten.convolution_backward(
                nchw(low), nchw(high), shape, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
            )
        gradient = gradient.permute(0, 2, 3, 1)
        if out is not None:
            return out.copy_(gradient)
        return gradient.to(torch.promote_types(low.dtype, torch.float32)).contiguous()
