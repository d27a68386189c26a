"""A matrix product on a CPU by the faster of the libraries that PyTorch brings.

In fp32 `torch.mm` calls MKL, which on processors that are not Intel's keeps to AVX2; oneDNN uses AVX-512 on any that
have it. Two Zen 5 cores reach 235 GF/s by the one and 500 by the other, two Zen 4 cores 140 and 165. What
`torch.compile` calls for a linear layer, `mkldnn._linear_pointwise`, is the way to oneDNN's product. In bf16 `torch.mm`
is oneDNN's already.
"""

import torch
from torch import Tensor

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether fp32 products are oneDNN's here."""

BATCH = 16
"""Images that a 1×1 convolution needs for PyTorch to give it to oneDNN on one thread."""


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a (M, K) times b (K, N), without autograd. All are on the CPU and of one dtype; a's rows follow one another.

    Returns:
        The product (M, N): `out`, or where the library makes its own result another tensor, `out` untouched.
    """
    if ONEDNN and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=out)


def matmul_of_rows(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """aᵀ b of a (T, M) and b (T, N), whose rows follow one another; otherwise as `matmul`.

    oneDNN's product copies aᵀ, which costs an N-th of the multiplications; the weight gradient of a 1×1 convolution is
    the same sum and reorders its result, a T-th. The lesser is taken (two Zen 5 cores, GF/s by the one and the other:
    T, N = 4096, 256: 294 and 468; 1024, 512: 408 and 451; 256, 1024: 475 and 228).
    """
    if not ONEDNN or a.dtype != torch.float32:
        return torch.mm(a.t(), b, out=out)
    if len(a) <= b.shape[1] or len(a) % BATCH:
        return matmul(a.t(), b, out)
    low, high = (rows.unflatten(0, (BATCH, 1, -1)).permute(0, 3, 1, 2) for rows in (a, b))
    weight = a.new_empty(()).expand(a.shape[1], b.shape[1], 1, 1)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        low, high, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
    )
    return gradient.flatten(1)
