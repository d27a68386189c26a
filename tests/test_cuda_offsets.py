"""Tensors of more than 2^32 elements, in the extension's own sources on a CPU: the last blocks of a grid, alone.

The tensors are of memory that is there only once it is touched. An offset of 32 bits would read zeros, or leave them.
Batch norm's is in test_cuda_batch_norm.
"""

import mmap
from contextlib import contextmanager

import pytest
import torch
from cuda_host import call, library, source_of

from kernels import reference
from kernels._cuda.conv import box
from kernels._cuda.launch import DTYPES
from kernels.arguments import BACKOFF, GROWTH, INTERVAL
from kernels.geometry import Epilogue

BF16 = torch.bfloat16
NO_RESERVE = 0x4000  # MAP_NORESERVE on Linux: promises no memory
IMAGES = 2**22 + 1


def sparse(*shape, dtype=BF16):
    """Zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for such a tensor: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def noise(*shape, dtype=BF16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(*shape, last=1, dtype=BF16, seed=0):
    """Noise in the last few of the first dimension."""
    tensor = sparse(*shape, dtype=dtype)
    tensor[-last:] = noise(last, *shape[1:], dtype=dtype, seed=seed)
    return tensor


@contextmanager
def blocks(op, first, last):
    source = library(source_of(op))
    source.host_blocks(first, last)
    try:
        yield
    finally:
        source.host_blocks(0, 2**64 - 1)


def close(ours, exact):
    torch.testing.assert_close(ours.float(), exact.float(), rtol=2e-2, atol=2e-2)
    assert exact.abs().max() > 0.1


@pytest.mark.parametrize("source", ["sm80", "sm90"])
def test_products(source):
    low, high, weight = (IMAGES, 4, 4, 64), (IMAGES, 8, 8, 64), noise(64, 4, 4, 64, seed=1) / 32
    boxes = -(-IMAGES // 8)  # eight images a box, of which the last has one
    for kind, x, y, phases in (("conv", high, low, 1), ("conv_transpose", low, high, 4)):
        op, x, saved, y = f"conv_{source}", filled(*x), filled(*y, seed=2), sparse(*y)
        sizes = IMAGES, 1, 4, 4, 64, 64, *box(4, 4), 64, *([1] if source == "sm90" else []), 0.2, 0.0, 0.0
        with blocks(op, (boxes - 1) * phases, boxes * phases - 1):
            call(op, x, weight, y, saved, *[None] * 14, int(phases > 1), DTYPES[BF16], *sizes)
        close(y[-1:], getattr(reference, kind)(x[-1:], weight, Epilogue("leaky_relu", saved=saved[-1:]))[0])
        assert not y[-2].any()


def test_images():
    """A box is a picture here, and a block's."""
    high, low, weight = (IMAGES, 32, 32, 3), (IMAGES, 16, 16, 8), noise(8, 4, 4, 3, seed=1) / 4
    sizes = DTYPES[BF16], IMAGES, 1, 16, 16, 3, 8, 0, 0.2
    x, y, saved = filled(*high), sparse(*low), filled(*low, seed=2)
    with blocks("image_conv", IMAGES - 1, IMAGES - 1):
        call("image_conv", x, weight, y, saved, None, None, *sizes)
    close(y[-1:], reference.conv(x[-1:], weight, Epilogue("leaky_relu", saved=saved[-1:]))[0])

    kept, back = filled(*high, seed=3), sparse(*high)
    sizes = DTYPES[BF16], IMAGES, 16, 16, 3, 8, 0, 0.2
    with blocks("image_conv_transpose", IMAGES - 1, IMAGES - 1):
        call("image_conv_transpose", saved, weight, back, kept, *sizes)
    close(back[-1:], reference.conv_transpose(saved[-1:], weight, Epilogue("leaky_relu", saved=kept[-1:]))[0])

    shares = sparse(IMAGES, 8, 4, 4, 3, dtype=torch.float32)
    with blocks("image_wgrad", IMAGES - 1, IMAGES - 1):
        call("image_wgrad", saved, x, shares, DTYPES[BF16], IMAGES, 16, 16, 3, 8, IMAGES)
    close(shares[-1], reference.wgrad(saved[-1:], x[-1:]))


def test_head():
    y, weight, state = filled(IMAGES, 4, 4, 64), noise(1, 4, 4, 64) / 32, noise(4, 1, 64, dtype=torch.float32)
    logits, dlogits = (sparse(IMAGES, dtype=torch.float32) for _ in range(2))
    means, ticket = torch.zeros(2, 1), torch.zeros(1, dtype=torch.int32)
    sizes = DTYPES[BF16], IMAGES, 1, 16, 64, 1, 0.2
    with blocks("head", IMAGES - 1, IMAGES - 1):
        call("head", y, weight, state, None, logits, dlogits, means, ticket, *sizes)
    close(logits[-1:], reference.head(y[-1:], weight, state, (True,))[0])
    assert dlogits[-1] < 0 and ticket == 1


def test_the_heads_gradient():
    """Five images of 2^30 elements, of which only the last pixel is looked at."""
    images, pixels, channels = 5, 2**27, 8
    y, g, weight = sparse(images, pixels, channels), sparse(images, pixels, channels), sparse(pixels, channels)
    values, dw = (sparse(n, pixels, channels, dtype=torch.float32) for n in (2, 1))
    y[:, -1], weight[-1] = noise(images, channels), noise(channels, seed=1)
    state, dlogits = noise(4, 1, channels, dtype=torch.float32), noise(images, dtype=torch.float32, seed=2)
    sizes = DTYPES[BF16], images, 1, pixels, channels, 0.2
    with blocks("head_grad", pixels - 1, pixels - 1):
        call("head_grad", y, weight, state, dlogits, g, values, dw, *sizes)
    pixel = y[:, -1].view(images, 1, 1, channels), weight[-1].view(1, 1, 1, channels)
    exact, sums, exact_dw = reference.head_grad(*pixel, state, dlogits)
    close(g[:, -1], exact.view(images, channels))
    close(values[:, -1], sums.values.sum(2).view(2, channels))
    close(dw[0, -1], exact_dw.flatten())


def test_adam():
    size = 2**32 + 3
    p, g, m, v = (sparse(size, dtype=torch.float32) for _ in range(4))
    copy, first = sparse(size), size - 5
    p[first:], g[first:] = noise(5), noise(5, seed=1)
    expected = reference.adam_update(*(t[first:].double() for t in (p, g, m, v)), 1, 0.1, (0.5, 0.999), 1e-8)[0]
    table = torch.tensor([[t.data_ptr() for t in (p, g, m, v, copy)] + [size]])
    rest = torch.zeros((), dtype=torch.int64), torch.zeros(2, dtype=torch.int32), None, 1, DTYPES[BF16], 0, 1
    call("adam", table, torch.tensor([[0, first]]), *rest, 0.1, 0.5, 0.999, 1e-8, GROWTH, BACKOFF, INTERVAL)
    close(p[first:], expected)
    assert torch.equal(copy[first:], p[first:].bfloat16()) and not p[first - 5 : first].any()
