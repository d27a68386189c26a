"""One layer's shapes, GEMM views, operations and bytes, and what may come before and after its product. No torch at run
time: the vocabulary that every other part shares, and the checks of a tensor that every backend makes.

Shape letters, here and everywhere: `N C H W` batch, channels, height, width; `R S` kernel taps; `M N K` the rows,
columns and reduction of the matrix product a convolution amounts to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Kind = Literal["conv", "conv_transpose"]
Activation = Literal["none", "relu", "leaky_relu", "tanh"]
Direction = Literal["forward", "dgrad", "wgrad"]


@dataclass(frozen=True)
class Gemm:
    """The matrix product behind one pass of a layer: an (M, K) times a (K, N) operand."""

    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply and an add counted as two."""
        return 2 * self.m * self.n * self.k


@dataclass(frozen=True)
class Layer:
    """A square convolution or transposed convolution without bias, and what follows it: batch norm, activation.

    Args:
        name: `G1` … for a generator's layers, `D1` … for a discriminator's, from the input on.
        kind: `conv` or `conv_transpose`.
        in_channels, out_channels: C of the input and of the output.
        in_size: height and width of the input, in pixels.
        kernel, stride, padding: of both axes.
        batch_norm: whether batch norm follows the convolution.
        activation: what comes last.
    """

    name: str
    kind: Kind
    in_channels: int
    out_channels: int
    in_size: int
    kernel: int
    stride: int
    padding: int
    batch_norm: bool
    activation: Activation

    @property
    def out_size(self) -> int:
        """Height and width of the output, in pixels."""
        if self.kind == "conv":
            return (self.in_size + 2 * self.padding - self.kernel) // self.stride + 1
        return (self.in_size - 1) * self.stride - 2 * self.padding + self.kernel

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weight in PyTorch's order: (out, in, R, S), and (in, out, R, S) when transposed."""
        ends = (self.out_channels, self.in_channels)
        return (*(ends if self.kind == "conv" else ends[::-1]), self.kernel, self.kernel)

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.in_channels * self.out_channels * self.kernel**2

    @property
    def parameters(self) -> int:
        """Trainable elements: the weight, and batch norm's weight and bias."""
        return self.weights + 2 * self.out_channels * self.batch_norm

    def in_elements(self, batch: int) -> int:
        return batch * self.in_channels * self.in_size**2

    def out_elements(self, batch: int) -> int:
        return batch * self.out_channels * self.out_size**2

    def gemm(self, direction: Direction, batch: int) -> Gemm:
        """The GEMM of one pass over `batch` images.

        A convolution gathers: every output pixel is a row, the taps of all input channels are the reduction. A
        transposed convolution of stride 2 is the data gradient of a convolution: its output pixels fall in stride²
        phases, each with kernel² / stride² taps; so the rows are the output pixels and the reduction is that much
        shorter. A stride of 1 from a single pixel (the generator's head) is a plain product of N × (R·S·C) outputs,
        and so is the discriminator's last layer.
        """
        gather = self.kind == "conv"
        small = batch * (self.out_size if gather else self.in_size) ** 2  # pixels on the low-resolution side
        low, high = (self.out_channels, self.in_channels) if gather else (self.in_channels, self.out_channels)
        taps = self.kernel**2
        if direction == "wgrad":
            return Gemm(low, taps * high, small)
        if (direction == "forward") == gather:  # towards the low-resolution side
            return Gemm(small, low, taps * high)
        if self.stride == 1:  # one pixel to a kernel-sized patch
            return Gemm(small, taps * high, low)
        return Gemm(small * self.stride**2, high, taps // self.stride**2 * low)


class Merge(NamedTuple):
    """What a GEMM's last programs need to settle the batch norm whose statistics its tiles took (`statistics`): its
    weight and bias (C,) float32; running statistics (C,) and counter () int64, to be moved once per group; eps and
    momentum."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    tracked: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1


class MergeGradients(NamedTuple):
    """Where a GEMM's last programs write the gradients by batch norm's weight and bias, (C,) float32, whose sums its
    tiles took (`batch_norm_grad`); None if nobody wants them."""

    dweight: Tensor | None = None
    dbias: Tensor | None = None

    @property
    def out(self) -> tuple[Tensor, Tensor] | None:
        """As `merge_sums` takes them."""
        return None if self.dweight is None else (self.dweight, self.dbias)


@dataclass(frozen=True)
class Epilogue:
    """What a GEMM does with its accumulator before it leaves the registers.

    Forward: apply an activation, or a batch norm whose statistics are known (in evaluation) and then an activation, or
    keep the output raw and take its batch-norm statistics. Backward, where the accumulator is the gradient of the
    previous layer's activated output: multiply it by the activation's derivative, and where that layer has batch norm,
    also sum g and g·x̂.

    Args:
        activation: `none`, `relu`, `leaky_relu` or `tanh`: applied to the output, or, with `saved`, differentiated.
        slope: of leaky_relu.
        groups: the batch is this many equal groups of images, each with its own statistics (real | fake).
        statistics: forward: mean and M2 of each tile's raw output; then `activation` must be `none`.
        saved: backward: what the previous layer kept, shaped as the output: its activated output, or, with `state`,
            its raw convolution output.
        state: (4, groups, C) float32 of `STATE`: forward, of the batch norm to apply; backward, of the layer below.
        merge: merge the tiles' sums before the launch ends: what is returned beside the output is then the batch-norm
            state (`Merge`), or the means that `apply_grad` subtracts (`MergeGradients`), and not `Partials`. A backend
            may leave it to its caller.

    Raises:
        TypeError: a merge of the other direction.
    """

    activation: Activation = "none"
    slope: float = 0.2
    groups: int = 1
    statistics: bool = False
    saved: Tensor | None = None
    state: Tensor | None = None
    merge: Merge | MergeGradients | None = None

    def __post_init__(self) -> None:
        expected = {"statistics": Merge, "batch_norm_grad": MergeGradients}.get(self.mode)
        if self.merge is not None and expected and not isinstance(self.merge, expected):
            raise TypeError(f"merge is a {type(self.merge).__name__}: {self.mode} takes a {expected.__name__}")

    @property
    def mode(self) -> str:
        if self.saved is None and self.state is not None:
            return "batch_norm"
        if self.saved is None:
            return "statistics" if self.statistics else "activation"
        return "activation_grad" if self.state is None else "batch_norm_grad"

    @property
    def sums(self) -> bool:
        """Whether it takes sums over pixels, which a batch norm needs."""
        return self.mode in ("statistics", "batch_norm_grad")


class Partials(NamedTuple):
    """What the tiles of a GEMM leave for the finalize kernels to merge, always in tile order.

    values: (2, groups, tiles, C) float32: mean and M2 (`statistics`), or Σg and Σg·x̂ (`batch_norm_grad`).
    counts: (groups, tiles) float32: output pixels of each tile; None for the sums.
    """

    values: Tensor
    counts: Tensor | None


class Shares(NamedTuple):
    """A weight gradient in several programs' shares, yet to be added up.

    values: (shares, L, 4, 4, C) float32. gradient: (L, 4, 4, C) float32, where their sum goes.
    """

    values: Tensor
    gradient: Tensor


CUDA_COLUMNS, CUDA_CLUSTERS = (128, 64), (1, 2, 4, 8)
"""Accepted values of a `CudaConfig`."""


@dataclass(frozen=True)
class CudaConfig:
    """The tile of the extension's tensor-core products.

    Args:
        columns: output channels; of a weight gradient, channels of the low side.
        cluster: upper bound on the cluster size; the largest accepted size that divides the tile count is used (1
            without cluster support).

    Raises:
        ValueError: either is not among `CUDA_COLUMNS` or `CUDA_CLUSTERS`.
    """

    columns: int
    cluster: int = 1

    def __post_init__(self) -> None:
        for name, accepted in (("columns", CUDA_COLUMNS), ("cluster", CUDA_CLUSTERS)):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)}: accepted are {accepted}")


class Deferred(NamedTuple):
    """A map whose batch norm and activation are yet to be applied: a GEMM does so as it loads it, its prologue.

    y: (N, H, W, C), the raw output. state: (4, groups, C) float32 of `STATE`. activation: `none`, `relu` or
    `leaky_relu`, of slope `slope`. What is applied is rounded to y's dtype, as `apply` does.
    """

    y: Tensor
    state: Tensor
    activation: Activation = "none"
    slope: float = 0.2


def raw(x: Tensor | Deferred) -> Tensor:
    """The map in memory."""
    return x.y if isinstance(x, Deferred) else x


STATE = ("mean", "rstd", "scale", "shift")
"""Rows of a batch-norm state (4, groups, C) float32: x̂ = (y − mean)·rstd, and weight·x̂ + bias = scale·y + shift."""

DTYPES = ("bfloat16", "float16", "float32")
"""Accepted types of maps and packed weights."""


def nhwc(images: Tensor) -> Tensor:
    """(N, C, H, W) seen as (N, H, W, C): dense where the memory is channels_last."""
    return images.permute(0, 2, 3, 1)


def nchw(images: Tensor) -> Tensor:
    """(N, H, W, C) seen as (N, C, H, W)."""
    return images.permute(0, 3, 1, 2)


def check_nhwc(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """Refuse what the kernels would misread.

    Raises:
        ValueError: not four-dimensional, not contiguous as (N, H, W, C), empty, not 16-byte aligned, or of another
            dtype or device than `like`.
    """
    if tensor.ndim != 4 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
            "expected a contiguous (N, H, W, C) tensor (permute a channels_last one by (0, 2, 3, 1))"
        )
    check_tensor(name, tensor, tuple(tensor.shape), like.dtype if like is not None else None, like)
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: accepted are bfloat16, float16 and float32")
    if not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must not be empty")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, like: Tensor | None
) -> None:
    """Refuse a tensor of another shape or dtype, on another device than `like`, strided, or not 16-byte aligned."""
    if tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}: expected contiguous {shape}"
        )
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}: expected {dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}: expected {like.device}")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}: it must be 16-byte aligned")
