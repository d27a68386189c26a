"""How a kernel is launched: argument checks, TMA descriptors, and the job that a launcher hands back."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import dependent

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the compiled function, its grid, and its arguments by name (constants included).

    dependent: whether it may begin before the launch before it has ended, as `kernels.dependent` says; one of the
    arguments, `DEPENDENT`, says so to the kernel.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    dependent: bool = field(default_factory=dependent.asked)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", {**self.arguments, "DEPENDENT": self.dependent})

    @property
    def options(self) -> dict[str, Any]:
        """What it is compiled and launched with, beside its arguments."""
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"launch_pdl": True} if self.dependent else {})

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True)
class Job:
    """Launches in order, and the tensors they fill. A job on meta tensors can be compiled, though not run."""

    launches: tuple[Launch, ...]
    result: Any

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        values = self.launches[0].arguments.values()
        return next(value.device for value in values if isinstance(value, Tensor))

    def run(self) -> Any:
        """Launch on the current stream of the tensors' device, and return the result, which may not be there yet."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for launch in self.launches:
                launch.run()
        return self.result


def arch_of(tensor: Tensor) -> int:
    """The capability whose default tiles suit the tensor's device: 80, 89, 90 or 100; 90 for the interpreter.

    Raises:
        ValueError: a GPU older than 8.0.
    """
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    if major < 8:
        raise ValueError(
            f"{tensor.device} has compute capability {major}.{minor}: the Triton kernels need 8.0 or later"
        )
    if major >= 12 or (8, 6) <= (major, minor) < (9, 0):  # 99 KB of shared memory, and no wgmma
        return 89
    return {8: 80, 9: 90}.get(major, 100)


def on_tensor_cores(tensor: Tensor, precision: str) -> bool:
    """Whether products of this dtype and precision are the tensor cores'."""
    return tensor.dtype != torch.float32 or precision == "tf32"


def box_view(tensor: Tensor, shape: tuple[int, ...], box: tuple[int, ...]) -> TensorDescriptor:
    """A TMA descriptor of `tensor` (contiguous) seen as `shape`; loads outside it give zeros."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(tensor, list(shape), strides, list(box))


def halves_view(tensor: Tensor, box: tuple[int, int, int], channels: int) -> TensorDescriptor:
    """NHWC of even height and width as (N, H/2, 2, W/2, 2C): each tap of a k4 s2 p1 window is one box of it.

    Row 2·oy + ky − 1 is half-row oy + (ky + 1)//2 − 1 of parity (ky + 1) % 2, columns likewise with the parity folded
    into the channels; what falls outside is the padding, and TMA reads it as zeros.
    """
    n, h, w, c = tensor.shape
    images, height, width = box
    return box_view(tensor, (n, h // 2, 2, w // 2, 2 * c), (images, height, 1, width, channels))
