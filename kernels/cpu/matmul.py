"""A matrix product on a CPU by the library that reaches more there.

In fp32 `torch.mm` is MKL's, which on processors that are not Intel's keeps to AVX2; oneDNN uses AVX-512 on any that has
it. Two Zen 5 cores reach 235 GF/s by the one and 500 by the other, two Zen 4 cores 140 and 165 (Intel's: not measured).
`mkldnn._linear_pointwise`, which `torch.compile` calls for a linear layer, is the way to oneDNN's product. In bf16
`torch.mm` is oneDNN's already.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Take = Callable[[int, int], Tensor]
"""Makes or finds the buffer of a product of so many rows and columns."""

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN's fp32 product is there, and worth it."""

BATCH = 16
"""Images that a 1×1 convolution needs for PyTorch to give it to oneDNN on one thread."""


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are made by the calls that only oneDNN has."""
    return ONEDNN and dtype == torch.float32 and torch.backends.mkldnn.enabled


def matmul(a: Tensor, b: Tensor, take: Take) -> Tensor:
    """a (M, K) times b (K, N), without autograd. Both are on the CPU and of one dtype; a's rows follow one another.

    Args:
        take: asked for the result's buffer where the library writes to one; oneDNN's product is a fresh tensor.
    """
    if by_onednn(a.dtype):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=take(len(a), b.shape[1]))


def matmul_of_rows(a: Tensor, b: Tensor, take: Take) -> Tensor:
    """aᵀ b of a (T, M) and b (T, N), whose rows follow one another; otherwise as `matmul`.

    oneDNN's product copies aᵀ, which costs an N-th of the multiplications; the weight gradient of a 1×1 convolution is
    the same sum and reorders its result, a T-th. The lesser is taken (two Zen 5 cores, GF/s by the one and the other:
    T, N = 4096, 256: 294 and 468; 1024, 512: 408 and 451; 256, 1024: 475 and 228).
    """
    if not by_onednn(a.dtype) or len(a) <= b.shape[1] or len(a) % BATCH:
        return matmul(a.t(), b, take)
    low, high = (rows.unflatten(0, (BATCH, 1, -1)).permute(0, 3, 1, 2) for rows in (a, b))
    weight = a.new_empty(()).expand(a.shape[1], b.shape[1], 1, 1)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        low, high, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return gradient.flatten(1)
