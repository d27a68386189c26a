"""The three products of a k4 s2 p1 layer with 9/16 of the multiplications: Winograd's F(2×2, 2×2) minimal filtering.

A k4 s2 convolution is a 2×2 convolution of stride 1 over pairs of pixels: with padded rows h = 2p + φ and taps
r = 2k + φ, `low[p] = Σ_{k,φ} high[2(p + k) + φ] · w[2k + φ]`, so φ (of both axes) joins the channels: 4C of them. On
one axis, for two taps and two outputs, three products do the work of four:

    d = pairs (d0, d1, d2), g = taps (g0, g1), y = outputs (y0, y1) = (d0·g0 + d1·g1, d1·g0 + d2·g1)
    Bᵀd = (d0 − d1, d1, d2 − d1)     G g = (g0, g0 + g1, g1)     Aᵀm = (m0 + m1, m1 + m2)
    y = Aᵀ[(G g) ⊙ (Bᵀd)]            the convolution
    d' = B [(G g) ⊙ (A y')]          its transpose: the data gradient, a transposed convolution's forward
    g' = Gᵀ[(Bᵀd) ⊙ (A y')]          the weight gradient

Over both axes that is nine matrix products in place of sixteen, and each of the three transformed operands serves two
of the three passes. Exact in exact arithmetic; every coefficient is ±1, so little accuracy is lost (docs/cpu.md has
the numbers). Source: Winograd 1980, Arithmetic complexity of computations; Lavin and Gray 2015, arXiv:1509.09308.

Memory, T = N(P/2)² tiles: `high` operand (9, T, 4C), `low` operand (9, T, C'), weight (9, C', 4C); the nine are (3, 3)
over (height, width), and 4C is (φ of height, φ of width, C).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kernels.cpu.matmul import Take, matmul, matmul_of_rows
from kernels.geometry import Layer, nchw, nhwc
from kernels.pool import Pool

Multiply = Callable[[Tensor, Tensor, Take], Tensor]

CHUNK_BYTES = 16 << 20
"""Operand bytes handled at a time, so that what one operation writes is still in cache for the next (1 MB of L2 a core,
32 of L3). At half of it a step on Zen 5 cores is 1 to 3 % slower in fp32; bf16, and twice of it, make no difference."""


class WinogradProduct:
    """A layer between a `high` map (N, C, 2P, 2P) and a `low` map (N, C', P, P), P even; see `products`.

    Maps are NCHW-shaped in channels_last memory and of `dtype`; the operands in between belong to `pool`.
    """

    WHY = "Winograd F(2×2, 2×2): nine matrix products for sixteen"

    def __init__(self, layer: Layer, low: int, high: int, dtype: torch.dtype, pool: Pool):
        self.name, self.dtype, self.pool = layer.name, dtype, pool
        self.low_channels, self.high_channels = low, high
        self.p = min(layer.in_size, layer.out_size)
        self.t = self.p // 2

    def chunks(self, images: int) -> Iterator[tuple[slice, slice]]:
        """Ranges of images whose `high` operand is about `CHUNK_BYTES`, each with its range of tiles."""
        tiles = self.t**2
        image_bytes = 9 * tiles * 4 * self.high_channels * self.dtype.itemsize
        count = -(-images // max(1, CHUNK_BYTES // image_bytes))
        step = -(-images // count)
        for start in range(0, images, step):
            stop = min(start + step, images)
            yield slice(start, stop), slice(start * tiles, stop * tiles)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """A buffer shared with every other layer: nothing in it outlives one call."""
        return self.pool.take(f"scratch.{name}", shape, self.dtype)

    def pack(self, weight: Tensor) -> Tensor:
        """G g Gᵀ of the master weight (C', C, 4, 4), in `dtype`; the sums are taken in the master's."""
        packed = self.pool.take(f"{self.name}.weight", (3, 3, self.low_channels, 2, 2 * self.high_channels), self.dtype)
        taps = weight_taps(weight)
        rows = taps[0] + taps[1]
        packed[::2, ::2].copy_(taps)
        packed[::2, 1].copy_(taps[:, 0] + taps[:, 1])
        packed[1, ::2].copy_(rows)
        packed[1, 1].copy_(rows[0] + rows[1])
        return packed.view(9, self.low_channels, 4 * self.high_channels)

    def padded(self, images: int) -> Tensor:
        """The buffer (N, 2P + 2, 2P + 2, C) of high maps, whose border is zero."""
        return self.pool.take(f"{self.name}.padded", (images, *[2 * self.p + 2] * 2, self.high_channels), self.dtype)

    def high_map(self, images: int) -> Tensor:
        return nchw(self.padded(images)[:, 1:-1, 1:-1])

    def high(self, images: Tensor) -> Tensor:
        """Bᵀ d B of a high map: (9, T, 4C)."""
        n, c, p, t = images.shape[0], self.high_channels, self.p, self.t
        if images.data_ptr() != self.high_map(n).data_ptr():
            self.high_map(n).copy_(images)
        operand = self.pool.take(f"{self.name}.high", (3, 3, n, t, t, 2, 2 * c), self.dtype)
        for part, _ in self.chunks(n):
            count = part.stop - part.start
            padded = self.padded(n)[part]
            by_row = padded.view(count, p + 1, 2, 2 * p + 2, c).unfold(1, 3, 2).permute(5, 0, 1, 2, 3, 4)
            rows = self.scratch("rows", 2, count, t, 2, 2 * p + 2, c)
            torch.sub(by_row[::2], by_row[1], out=rows)
            outer = rows.view(2, count, t, 2, p + 1, 2 * c).unfold(4, 3, 2).permute(6, 0, 1, 2, 4, 3, 5)
            middle = padded.view(count, p + 1, 2, p + 1, 2 * c)[:, 1::2].unfold(3, 3, 2).permute(5, 0, 1, 3, 2, 4)
            out = operand[:, :, part]
            torch.sub(outer[::2], outer[1], out=out[::2, ::2].transpose(0, 1))
            out[::2, 1].copy_(outer[1])
            torch.sub(middle[::2], middle[1], out=out[1, ::2])
            out[1, 1].copy_(middle[1])
        return operand.view(9, n * t * t, 4 * c)

    def low(self, images: Tensor) -> Tensor:
        """A y Aᵀ of a low map: (9, T, C')."""
        n, c, t = images.shape[0], self.low_channels, self.t
        operand = self.pool.take(f"{self.name}.low", (3, 3, n, t, t, c), self.dtype)
        y = nhwc(images).unflatten(2, (t, 2)).unflatten(1, (t, 2)).permute(2, 4, 0, 1, 3, 5)
        operand[::2, ::2].copy_(y)
        torch.add(y[:, 0], y[:, 1], out=operand[::2, 1])
        torch.add(y[0], y[1], out=operand[1, ::2])
        torch.add(operand[1, 0], operand[1, 2], out=operand[1, 1])
        return operand.view(9, n * t * t, c)

    def to_low(self, high: Tensor, weight: Tensor) -> Tensor:
        """The convolution: `high` and packed weight → low map (N, C', P, P)."""
        c, t = self.low_channels, self.t
        n = high.shape[1] // t**2
        out = self.pool.images(f"{self.name}.to_low", (n, c, self.p, self.p), self.dtype)
        y = nhwc(out).view(n, t, 2, t, 2, c).permute(2, 4, 0, 1, 3, 5)
        for part, tiles in self.chunks(n):
            count = part.stop - part.start
            m = self.nine(matmul, high[:, tiles], weight.transpose(1, 2), (count, t, t, c))
            rows = self.scratch("sums", 2, 3, count, t, t, c)
            for i, j in product(range(2), range(3)):
                torch.add(m[i][j], m[i + 1][j], out=rows[i, j])
            torch.add(rows[:, :2], rows[:, 1:], out=y[:, :, part])
        return out

    def to_high(self, low: Tensor, weight: Tensor) -> Tensor:
        """The transposed convolution: `low` and packed weight → high map (N, C, 2P, 2P), a view of a padded buffer."""
        c, p, t = self.high_channels, self.p, self.t
        n = low.shape[1] // t**2
        out = self.pool.take(f"{self.name}.to_high", (n, p + 1, 2, p + 1, 2 * c), self.dtype)
        for part, tiles in self.chunks(n):
            count = part.stop - part.start
            m = self.nine(matmul, low[:, tiles], weight, (count, t, t, 2, 2 * c))
            rows = self.scratch("sums", 3, count, p + 1, t, 2, 2 * c)
            for column, sums in zip(zip(*m, strict=True), rows, strict=True):
                overlap(column, sums)
            overlap(rows.transpose(2, 3), out[part].permute(0, 3, 1, 2, 4))
        return nchw(out.view(n, 2 * p + 2, 2 * p + 2, c)[:, 1:-1, 1:-1])

    def weight_grad(self, high: Tensor, low: Tensor, out: Tensor) -> None:
        """Gᵀ[(Bᵀd) ⊙ (A y)]G of both operands, written to `out` (C', C, 4, 4) in its own dtype."""
        shape = (self.low_channels, 2, 2 * self.high_channels)
        m = self.nine(matmul_of_rows, low, high, shape)
        if self.dtype != out.dtype:  # the sums are taken in the gradient's precision
            wide = self.pool.take("scratch.weight_wide", (3, 3, *shape), out.dtype)
            m = [[wide[i, j].copy_(m[i][j]) for j in range(3)] for i in range(3)]
        rows = self.pool.take("scratch.weight_rows", (2, 3, *shape), out.dtype)
        for i, j in product(range(2), range(3)):
            torch.add(m[i][j], m[i + 1][j], out=rows[i, j])
        torch.add(rows[:, :2], rows[:, 1:], out=weight_taps(out))

    def nine(self, multiply: Multiply, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> list[list[Tensor]]:
        """The products of a's and b's matrices, each as `shape`, three rows of three. One at a time: `bmm` copies an
        operand whose nine matrices are spaced apart, and is no faster otherwise (D2 forward at 64 images, two Zen 4
        cores: 17 ms against 27 in fp32, 7.4 against 7.7 in bf16)."""
        m = [multiply(a[i], b[i], partial(self.scratch, f"m{i}")).view(shape) for i in range(9)]
        return [m[:3], m[3:6], m[6:]]


def overlap(m: Sequence[Tensor], out: Tensor) -> None:
    """B m along axis 1: three m[i] (.., t, ...) → pairs `out` (.., 2t + 1, ...).

    A tile covers the pairs 2t, 2t + 1 and 2t + 2, the last of which is the next tile's first: there the two add up.
    """
    first, middle, last = m
    inner = out[:, 1::2]
    torch.sub(middle, first, out=inner)
    inner.sub_(last)
    torch.add(first[:, 1:], last[:, :-1], out=out[:, 2:-1:2])
    out[:, 0].copy_(first[:, 0])
    out[:, -1].copy_(last[:, -1])


def weight_taps(weight: Tensor) -> Tensor:
    """A weight (C', C, 4, 4) in channels_last memory as (k of height, k of width, C', φ of height, φ of width × C)."""
    taps = nhwc(weight).unflatten(2, (2, 2)).unflatten(1, (2, 2))  # C', k, φ, k, φ, C
    return taps.permute(1, 3, 0, 2, 4, 5).flatten(4)
