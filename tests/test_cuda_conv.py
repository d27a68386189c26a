"""The extension's tensor-core convolutions, run on a CPU with barriers, TMA and wgmma modelled, against their twins.

What this shows is arithmetic: which box each tap loads, where the swizzle puts it, which operand a descriptor names,
which pixel and channel an accumulator is of, and the counting of the pipeline's barriers. Whether a GPU's asynchronous
units agree with the model only a GPU can tell.
"""

from types import SimpleNamespace

import pytest
import torch
from cuda_host import in_both_orders, on_host
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, generated, tensor

from kernels import reference
from kernels._cuda import conv as products
from kernels.geometry import Epilogue

OURS = {"conv": products.conv, "conv_transpose": products.conv_transpose}
TWIN = {"conv": reference.conv, "conv_transpose": reference.conv_transpose}
BF16 = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def host():
    with on_host():
        yield


@pytest.fixture(params=["sm90", "sm80"])
def source(request, monkeypatch):
    """Which kernels run, as the GPU would decide."""
    monkeypatch.setattr(products, "source", lambda tensor: request.param)
    return request.param


def merged(partials):
    values, counts = partials.values.double(), partials.counts.double()[:, :, None]
    mean = (counts * values[0]).sum(1) / counts.sum(1)
    return mean, (values[1] + counts * (values[0] - mean[:, None]).square()).sum(1)


def check(kind, images, groups, height, width, into, out, columns=None, dtype=BF16, activation=None, mean=0.0, seed=0):
    """Height and width are of the low side; statistics where there is no activation."""
    generator = torch.Generator().manual_seed(seed)
    size = (2 * height, 2 * width) if kind == "conv" else (height, width)
    ends = (out, into) if kind == "conv" else (into, out)
    x = tensor(generator, images * groups, *size, into, dtype=dtype)
    weight = tensor(generator, ends[0], 4, 4, ends[1], dtype=dtype)
    weight *= 0.25 / into**0.5
    if mean:
        weight += mean / into
        x += 1
    epilogue = Epilogue(activation, groups=groups) if activation else Epilogue(statistics=True, groups=groups)
    y, partials = OURS[kind](x, weight, epilogue, config=columns)
    twin, _ = TWIN[kind](x, weight, epilogue)
    oracle, expected = TWIN[kind](x.double(), weight.double(), epilogue)
    assert_accurate(y, twin, oracle, kind)
    if activation:
        assert partials is None
        return
    assert torch.equal(partials.counts.sum(1).double(), expected.counts[:, 0])
    single, _ = TWIN[kind](x.float(), weight.float(), Epilogue())
    theirs, exact = merged(reference.statistics(single, groups)), merged(expected)
    for name, got, near, true in zip(("mean", "M2"), merged(partials), theirs, exact, strict=True):
        assert_accurate(got.float(), near, true, f"{kind} {name}", terms=images * height * width)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize(
    "images, groups, height, width, into, out, columns",
    [
        pytest.param(2, 1, 8, 8, 64, 64, 64, id="one whole tile"),
        pytest.param(1, 2, 4, 8, 64, 128, 128, id="two groups in tiles cut short"),
        pytest.param(1, 1, 4, 4, 64, 256, 256, id="256 columns"),
        pytest.param(2, 1, 4, 6, 128, 192, 128, id="two chunks, columns that hang over, a width of 6"),
        pytest.param(1, 1, 5, 17, 64, 64, 64, id="two boxes across"),
    ],
)
def test_shapes(kind, images, groups, height, width, into, out, columns, source):
    columns = min(columns, max(products.COLUMNS[source]))
    check(kind, images, groups, height, width, into, out, columns)


@pytest.mark.parametrize("kind, activation", [("conv", "relu"), ("conv_transpose", "leaky_relu"), ("conv", "none")])
def test_activations(kind, activation, source):
    check(kind, 1, 1, 4, 4, 64, 64, activation=activation)


def test_half_precision(source):
    check("conv_transpose", 1, 1, 2, 2, 64, 64, dtype=torch.float16)


def test_a_mean_far_from_zero_costs_no_variance():
    check("conv_transpose", 2, 1, 8, 8, 64, 64, mean=4.0)


@pytest.mark.long
def test_generated(source):
    @given(
        st.sampled_from(sorted(OURS)), st.integers(1, 3), st.integers(1, 2), st.integers(1, 6), st.integers(1, 18),
        st.integers(1, 2), st.integers(1, 3), st.sampled_from(["none", "relu", None]), st.integers(0, 2**31),
    )  # fmt: skip
    def one(kind, images, groups, height, width, into, out, activation, seed):
        check(kind, images, groups, height, width, 64 * into, 64 * out, activation=activation, seed=seed)

    generated(one, 150)  # a tile takes a second


def test_columns_keep_every_sm_busy():
    assert products.columns_of(512, 512) == 256  # D3 at 256 images
    assert products.columns_of(16, 512) == 64  # G2: half as many tiles as SMs, were it 128
    assert products.columns_of(10_000, 64) == 64
    assert products.columns_of(512, 512, "sm80") == 128
    assert products.boxes(128, 16, 16) == 256 and products.box(4, 4) == (4, 4) and products.box(3, 40) == (4, 16)


@pytest.mark.parametrize(
    "kernel, first, second, epilogue, dtype, reason",
    [
        ("conv", (1, 8, 8, 64), (96, 4, 4, 64), None, BF16, "multiples of 64"),
        ("conv", (1, 8, 8, 64), (64, 4, 4, 64), None, torch.float32, "take bfloat16 and float16"),
        ("conv_transpose", (1, 4, 4, 64), (64, 4, 4, 64), Epilogue("tanh"), BF16, "an epilogue of activation, tanh"),
        ("wgrad", (1, 4, 4, 64), (1, 8, 8, 64), None, BF16, "weight gradient is of images"),
        ("conv", (1, 8, 8, 2), (64, 4, 4, 2), None, BF16, "2 image channels"),
    ],
)
def test_what_is_missing_is_named_and_refused(kernel, first, second, epilogue, dtype, reason):
    tensors = torch.zeros(first, dtype=dtype), torch.zeros(second, dtype=dtype)
    assert reason in products.missing(kernel, *tensors, epilogue)
    arguments = () if kernel == "wgrad" else (epilogue,)
    with pytest.raises(ValueError, match=f"{kernel} of .* by the extension: .*{reason}"):
        getattr(products, kernel)(*tensors, *arguments)


@pytest.mark.parametrize(
    "capability, expected", [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm80")]
)
def test_each_gpu_has_its_source(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert products.source(SimpleNamespace(device=torch.device("cuda"))) == expected
    assert products.source(torch.empty(0)) == "sm90"


def test_a_tile_of_another_source_is_refused(monkeypatch):
    monkeypatch.setattr(products, "source", lambda tensor: "sm80")
    x, weight = torch.zeros(1, 8, 8, 64, dtype=BF16), torch.zeros(256, 4, 4, 64, dtype=BF16)
    with pytest.raises(ValueError, match=r"config is 256: accepted on sm80 are \(128, 64\)"):
        products.conv(x, weight, config=256)


def test_threads_do_not_race(source):
    generator = torch.Generator().manual_seed(0)
    x, weight = tensor(generator, 2, 8, 8, 64, dtype=BF16), tensor(generator, 64, 4, 4, 64, dtype=BF16)

    def run():
        return [t for kernel in OURS.values() for t in flat(kernel(x, weight, Epilogue(statistics=True, groups=2)))]

    def flat(result):
        return result[0], *result[1]

    assert all(torch.equal(*pair) for pair in zip(*in_both_orders(run), strict=True))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": 96}, "config is 96: accepted on sm90 are"),
        ({"precision": "bf16"}, "precision is 'bf16'"),
        ({"epilogue": Epilogue(statistics=True, groups=2)}, "groups is 2"),
    ],
)
def test_refused(options, message):
    x, weight = torch.zeros(1, 8, 8, 64, dtype=BF16), torch.zeros(64, 4, 4, 64, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        products.conv(x, weight, **options)


def test_images_go_to_their_own_kernels():
    generator = torch.Generator().manual_seed(0)
    x, weight = tensor(generator, 1, 8, 8, 3), tensor(generator, 8, 4, 4, 3)
    low = tensor(generator, 1, 4, 4, 8)
    assert_accurate(
        products.conv(x, weight)[0], reference.conv(x, weight)[0], reference.conv(x.double(), weight.double())[0]
    )
    up, oracle = reference.conv_transpose(low, weight)[0], reference.conv_transpose(low.double(), weight.double())[0]
    assert_accurate(products.conv_transpose(low, weight)[0], up, oracle)
    assert_accurate(products.wgrad(low, x), reference.wgrad(low, x), reference.wgrad(low.double(), x.double()))


@pytest.mark.parametrize("channels", [3, 64])
def test_outputs_go_where_they_are_wanted(channels):
    x, weight = torch.ones(1, 2, 2, 64, dtype=BF16), torch.ones(64, 4, 4, channels, dtype=BF16)
    out = torch.empty(1, 4, 4, channels, dtype=BF16)
    y, _ = products.conv_transpose(x, weight, out=out)
    assert y is out and torch.equal(y, reference.conv_transpose(x, weight)[0])
    with pytest.raises(ValueError, match="out has shape"):
        products.conv_transpose(x, weight, out=out[:, :2].contiguous())
    if channels == 3:
        gradient = torch.empty(64, 4, 4, 3)
        assert products.wgrad(x, torch.ones(1, 4, 4, 3, dtype=BF16), out=gradient) is gradient
        assert gradient[0, 1, 1, 0] == 4  # each of four pixels
