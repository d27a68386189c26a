"""The three products of a convolution layer on a CPU, and which way of computing them suits a layer.

Every layer of a DCGAN joins a `high` map, the larger, to a `low` one by a weight (C_low, C_high, R, S), which is
PyTorch's order for a convolution from high to low and for a transposed convolution from low to high alike:

    to_low       a convolution's forward; a transposed convolution's data gradient
    to_high      a convolution's data gradient; a transposed convolution's forward
    weight_grad  the same for both

A product class takes each operand in its own form, made once and used twice: `packed = pack(weight)`, `h = high(map)`,
`l = low(map)`; then `to_low(h, packed)` and `to_high(l, packed)` return maps and `weight_grad(h, l, out)` writes a
gradient. A high map that was written to `high_map(images)` is where `high` wants it. Maps are NCHW-shaped in
channels_last memory and of the class's dtype; master weights and their gradients keep their own. What a method returns
is overwritten by its next call, or may be.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.winograd import WinogradProduct
from kernels.geometry import Layer, nchw, nhwc
from kernels.pool import Pool

WINOGRAD_CHANNELS = 128 * 256
"""Low channels times high from which Winograd's products pay; below, the transforms cost more than they save. A whole
step with 64 × 128 channels so, too, over one without, on two Zen 5 cores: `dcgan64` 0.99 in fp32 and 1.05 in bf16,
`small32` 1.18 and 1.13. One Zen 4 core, the library's time over theirs: 32 × 64 channels 0.7 to 0.9, 64 × 128 0.9 to
1.1, 128 × 256 1.3, 256 × 512 1.5."""

PART_BYTES = 8 << 20
"""What a call of the library makes at most, before it is copied to a buffer: little enough to stay in cache."""


class LibraryProduct:
    """PyTorch's own convolutions (oneDNN): any kernel, stride and padding."""

    WHY = "the library's convolutions"

    def __init__(self, layer: Layer, low: int, high: int, dtype: torch.dtype, pool: Pool):
        self.name, self.dtype, self.pool = layer.name, dtype, pool
        self.stride, self.padding = [layer.stride] * 2, [layer.padding] * 2
        self.weight_shape = (low, high, layer.kernel, layer.kernel)
        smaller, larger = sorted((layer.in_size, layer.out_size))
        self.low_shape, self.high_shape = (low, smaller, smaller), (high, larger, larger)

    def pack(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype, memory_format=torch.channels_last)

    def high_map(self, images: int) -> Tensor:
        return self.pool.images(f"{self.name}.high_map", (images, *self.high_shape), self.dtype)

    def high(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    low = high

    def to_low(self, high: Tensor, weight: Tensor) -> Tensor:
        return self.in_parts(F.conv2d, high, weight, "to_low", self.low_shape)

    def to_high(self, low: Tensor, weight: Tensor) -> Tensor:
        return self.in_parts(F.conv_transpose2d, low, weight, "to_high", self.high_shape)

    def in_parts(
        self, convolve: Callable[..., Tensor], images: Tensor, weight: Tensor, name: str, shape: tuple[int, ...]
    ) -> Tensor:
        """`convolve` of some images at a time, each result copied to the buffer `name`: it is a fresh tensor every
        time, and a large one costs page faults."""
        out = self.pool.images(f"{self.name}.{name}", (len(images), *shape), self.dtype)
        count = max(1, PART_BYTES // (out[0].numel() * out.itemsize))
        for part, out_part in zip(images.split(count), out.split(count), strict=True):
            out_part.copy_(convolve(part, weight, stride=self.stride, padding=self.padding))
        return out

    def weight_grad(self, high: Tensor, low: Tensor, out: Tensor) -> None:
        shape = high.new_empty(()).expand(self.weight_shape)  # the library asks for a weight and reads its shape
        _, gradient, _ = torch.ops.aten.convolution_backward(
            low, high, shape, None, self.stride, self.padding, [1, 1], False, [0, 0], 1, [False, True, False]
        )
        out.copy_(gradient)


class ImageProduct(LibraryProduct):
    """The layer next to the image (C ≤ 4), k4 s2 p1, on a CPU: the library but for `to_high`.

    With rows 2p + φ − 1 and taps 2k + φ, the transposed convolution is a 2×2 convolution of stride 1 onto 4C channels,
    one C for each φ of height and width, whose pixels are then interleaved. oneDNN runs it 2.5 to 3 times as fast
    (64 images, 64 → 3 channels, two Zen 4 cores: 14.4 → 5.2 ms in fp32, 9.1 → 3.4 in bf16).
    """

    WHY = "the layer next to the image: a 2×2 convolution onto four times its channels"

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        low, high, _, _ = weight.shape
        weight = super().pack(weight)
        taps = weight.view(low, high, 2, 2, 2, 2).permute(3, 5, 1, 0, 2, 4)  # φ, φ, C, C', k, k
        return weight, taps.reshape(4 * high, low, 2, 2).flip(2, 3).contiguous(memory_format=torch.channels_last)

    def to_low(self, high: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        return super().to_low(high, weight[0])

    def to_high(self, low: Tensor, weight: tuple[Tensor, Tensor]) -> Tensor:
        n, _, p, _ = low.shape
        c = self.weight_shape[1]
        phases = nhwc(F.conv2d(low, weight[1], padding=1)).unflatten(3, (2, 2, c))  # N, P + 1, P + 1, φ, φ, C
        out = self.pool.take(f"{self.name}.to_high", (n, p + 1, 2, p + 1, 2, c), self.dtype)
        out.copy_(phases.transpose(2, 3))
        return nchw(out.view(n, 2 * p + 2, 2 * p + 2, c)[:, 1:-1, 1:-1])


class PatchProduct:
    """A layer between one pixel and a patch of the kernel's size: G's first and D's last, plain matrix products.

    With one low channel, D's logits, everything is computed in at least float32: there the products are small and the
    result feeds a loss.
    """

    WHY = "from or to one pixel: a plain matrix product"

    def __init__(self, layer: Layer, low: int, high: int, dtype: torch.dtype, pool: Pool):
        self.name, self.pool = layer.name, pool
        self.maps, self.size, self.channels = dtype, layer.kernel, high
        self.dtype = torch.promote_types(dtype, torch.float32) if low == 1 else dtype

    def pack(self, weight: Tensor) -> Tensor:
        return nhwc(weight).flatten(1).to(self.dtype)

    def high_map(self, images: int) -> Tensor:
        return self.pool.images(f"{self.name}.high_map", (images, self.channels, self.size, self.size), self.maps)

    def high(self, images: Tensor) -> Tensor:
        return nhwc(images).flatten(1).to(self.dtype)

    def low(self, images: Tensor) -> Tensor:
        return images.flatten(1).to(self.dtype)

    def to_low(self, high: Tensor, weight: Tensor) -> Tensor:
        return (high @ weight.t())[:, :, None, None]

    def to_high(self, low: Tensor, weight: Tensor) -> Tensor:
        return nchw((low @ weight).to(self.maps).view(-1, self.size, self.size, self.channels))

    def weight_grad(self, high: Tensor, low: Tensor, out: Tensor) -> None:
        nhwc(out).copy_((low.t() @ high).view(nhwc(out).shape))


Product = LibraryProduct | ImageProduct | PatchProduct | WinogradProduct


def choose(layer: Layer, dtype: torch.dtype, pool: Pool) -> Product:
    """The way to compute `layer`, by its geometry, as measured in docs/cpu.md; nothing is timed here."""
    low, high, _, _ = layer.weight_shape
    smaller = min(layer.in_size, layer.out_size)
    kind: type = LibraryProduct
    if smaller == 1:
        kind = PatchProduct
    elif (layer.kernel, layer.stride, layer.padding) == (4, 2, 1):
        if high <= 4:
            kind = ImageProduct
        elif smaller % 2 == 0 and low * high >= WINOGRAD_CHANNELS:
            kind = WinogradProduct
    return kind(layer, low, high, dtype, pool)
