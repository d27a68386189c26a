"""The two libraries' products on a CPU are the product, and each is called where it should be."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu import matmul as module
from kernels.cpu.matmul import matmul, matmul_of_rows

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
HERE = "avx512f" in CPU and torch.backends.mkldnn.is_available()
only_here = pytest.mark.skipif(not HERE, reason="no AVX-512, or torch without oneDNN")
SHAPES = [  # T, M, N: aᵀ b of (T, M) and (T, N)
    (1, 1, 1),
    (5, 3, 7),
    (16, 8, 16),  # as few rows as columns
    (64, 8, 16),  # more, and a multiple of the convolution's batch
    (65, 8, 16),  # more, and none
    (512, 40, 33),
]


@pytest.fixture
def without_onednn():
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    yield
    torch.backends.mkldnn.enabled = before


@pytest.fixture(params=[pytest.param("oneDNN", marks=only_here), "mm"])
def onednn(request):
    if request.param == "mm":
        request.getfixturevalue("without_onednn")
    return request.param == "oneDNN"


class Buffer:
    """Where a product goes that is not a fresh tensor; and whether it was asked for."""

    def __init__(self, dtype):
        self.dtype, self.tensor = dtype, None

    def __call__(self, rows, columns):
        self.tensor = torch.full((rows, columns), float("nan"), dtype=self.dtype)
        return self.tensor


class Called(TorchDispatchMode):
    """The names of the operations within."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names = [*getattr(self, "names", []), function.overloadpacket.__name__]
        return function(*arguments, **(options or {}))


def operands(t, m, n, dtype):
    random = torch.Generator().manual_seed(0)
    return torch.randn(t, m, generator=random).to(dtype), torch.randn(t, n, generator=random).to(dtype)


def check(got, a, b, buffer, onednn):
    """Within the rounding of sums of K terms, in the buffer or in none."""
    exact = a.double() @ b.double()
    unit = {torch.float32: 2e-7, torch.float64: 4e-16, torch.bfloat16: 2**-8}[got.dtype]
    bound = unit * (a.double().abs() @ b.double().abs()) * (1 if got.dtype == torch.bfloat16 else a.shape[1] ** 0.5 + 2)
    assert ((got.double() - exact).abs() <= bound + 1e-30).all()
    assert (buffer.tensor is None) == (onednn and got.dtype == torch.float32)
    assert buffer.tensor is None or got.data_ptr() == buffer.tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape, dtype, onednn):
    t, m, n = shape
    a, b = operands(t, m, n, dtype)
    at = a.t().contiguous()
    for second in (b, b.t().contiguous().t()):  # a weight comes either way
        buffer = Buffer(dtype)
        check(matmul(at, second, buffer), at, second, buffer, onednn)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_rows(shape, dtype, threads, onednn):
    t, m, n = shape
    a, b = operands(t, m, n, dtype)
    buffer, before = Buffer(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = matmul_of_rows(a, b, buffer)
    finally:
        torch.set_num_threads(before)
    assert got.shape == (m, n)
    check(got, a.t(), b, buffer, onednn)


def test_a_part_of_a_larger_matrix(onednn):
    """Operands are slices of the nine: rows that do not begin where memory does."""
    a, b = operands(96, 24, 16, torch.float32)
    buffer = Buffer(torch.float32)
    check(matmul_of_rows(a[16:80], b[16:80], buffer), a[16:80].t(), b[16:80], buffer, onednn)


@only_here
@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 8, 16), "convolution_backward"), ((16, 8, 16), "_linear_pointwise"), ((65, 8, 16), "_linear_pointwise")],
)
def test_the_cheaper_way_to_a_product_of_rows(shape, expected):
    assert module.ONEDNN
    a, b = operands(*shape, torch.float32)
    with Called() as called:
        matmul_of_rows(a, b, Buffer(torch.float32))
    assert expected in called.names


def test_who_turns_onednn_off_does_not_get_it(without_onednn):
    with Called() as called:
        matmul_of_rows(*operands(64, 8, 16, torch.float32), Buffer(torch.float32))
    assert "mm" in called.names
