"""The two libraries' products on a CPU are the product, and each is called where it should be."""

import pytest
import torch

from kernels.cpu import matmul as module
from kernels.cpu.matmul import matmul, matmul_of_rows

LIBRARIES = [
    pytest.param(True, marks=pytest.mark.skipif(not module.ONEDNN, reason="no AVX-512, or torch without oneDNN")),
    False,
]
SHAPES = [  # T, M, N: aᵀ b of (T, M) and (T, N)
    (1, 1, 1),
    (5, 3, 7),
    (16, 8, 16),  # as few rows as columns
    (64, 8, 16),  # more, and a multiple of the convolution's batch
    (65, 8, 16),  # more, and none
    (512, 40, 33),
]


@pytest.fixture(params=LIBRARIES, ids=["oneDNN", "mm"])
def onednn(request, monkeypatch):
    monkeypatch.setattr(module, "ONEDNN", request.param)
    return request.param


def operands(t, m, n, dtype):
    random = torch.Generator().manual_seed(0)
    return torch.randn(t, m, generator=random).to(dtype), torch.randn(t, n, generator=random).to(dtype)


def check(got, a, b, out, onednn):
    """Within the rounding of sums of K terms; `out` is the result, or was left alone."""
    exact = a.double() @ b.double()
    unit = {torch.float32: 2e-7, torch.float64: 4e-16, torch.bfloat16: 2**-8}[got.dtype]
    bound = unit * (a.double().abs() @ b.double().abs()) * (1 if got.dtype == torch.bfloat16 else a.shape[1] ** 0.5 + 2)
    assert ((got.double() - exact).abs() <= bound + 1e-30).all()
    if onednn and got.dtype == torch.float32:
        assert out.isnan().all()
    else:
        assert got.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, dtype, onednn):
    t, m, n = shape
    a, b = operands(t, m, n, dtype)
    at = a.t().contiguous()
    for second in (b, b.t().contiguous().t()):  # a weight comes either way
        out = torch.full((m, n), float("nan"), dtype=dtype)
        check(matmul(at, second, out), at, second, out, onednn)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_rows(shape, dtype, threads, onednn):
    t, m, n = shape
    a, b = operands(t, m, n, dtype)
    out, before = torch.full((m, n), float("nan"), dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = matmul_of_rows(a, b, out)
    finally:
        torch.set_num_threads(before)
    assert got.shape == (m, n)
    check(got, a.t(), b, out, onednn)


def test_a_part_of_a_larger_matrix(onednn):
    """Operands are slices of the nine: rows that do not begin where memory does."""
    a, b = operands(96, 24, 16, torch.float32)
    out = torch.full((24, 16), float("nan"))
    check(matmul_of_rows(a[16:80], b[16:80], out), a[16:80].t(), b[16:80], out, onednn)
