"""The extension's kernels of RGB ends, run on a CPU, against their twins; and what they refuse."""

import pytest
import torch
from cuda_host import in_both_orders, on_host
from cuda_products import DTYPES, MODES, check_product
from epilogues import epilogue_of
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, generated, tensor

from kernels import reference
from kernels._cuda import image
from kernels.geometry import Epilogue

OURS = {"conv": image.conv, "conv_transpose": image.conv_transpose}


@pytest.fixture(scope="module", autouse=True)
def host():
    with on_host():
        yield


def check_conv(kind, dtype, channels, images, groups, height, width, many, *epilogue, seed=0, **options):
    """One convolution; height and width are of the map of `many` channels, `channels` the image's."""
    ends = (channels, many) if kind == "conv" else (many, channels)
    mode = epilogue[0] if epilogue else "activation"
    # sums of a second pass see the product rounded
    sums_of = None if mode == "batch_norm_grad" and kind == "conv" else dtype
    check_product(
        OURS[kind], kind, dtype, images, groups, height, width, *ends, *epilogue, sums_of=sums_of, seed=seed, **options
    )


def check_wgrad(dtype, channels, images, height, width, many, seed=0):
    generator = torch.Generator().manual_seed(seed)
    low = tensor(generator, images, height, width, many, dtype=dtype)
    high = tensor(generator, images, 2 * height, 2 * width, channels, dtype=dtype)
    oracle = reference.wgrad(low.double(), high.double())
    ours = image.wgrad(low, high)
    assert_accurate(ours, reference.wgrad(low, high), oracle, "wgrad", terms=images * height * width)
    assert torch.equal(ours, image.wgrad(low, high))


SHAPES = [
    pytest.param(1, 4, 4, 64, id="batch 1"),
    pytest.param(3, 8, 8, 8, id="odd batch, eight channels"),
    pytest.param(1, 14, 14, 32, id="a 28×28 image: rows that are no multiple of 16 bytes"),
    pytest.param(1, 32, 32, 64, id="a 64×64 image: four boxes"),
    pytest.param(1, 9, 37, 72, id="boxes cut on both sides, channels over a block's 64"),
    pytest.param(2, 1, 1, 16, id="one pixel"),
    pytest.param(1, 3, 70, 24, id="three boxes across"),
]


@pytest.mark.parametrize("images, height, width, many", SHAPES)
@pytest.mark.parametrize("channels", image.IMAGE_CHANNELS)
def test_shapes(channels, images, height, width, many):
    for number, dtype in enumerate(DTYPES.values()):
        if number and many * height * width > 4096:
            continue  # the larger shapes in bf16 alone: the kernels' paths are those of the smaller ones
        check_conv("conv", dtype, channels, images, 1, height, width, many, activation="leaky_relu")
        check_conv("conv_transpose", dtype, channels, images, 1, height, width, many, activation="tanh")
        check_wgrad(dtype, channels, images, height, width, many)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode, activation", MODES)
def test_epilogues(kind, mode, activation, dtype):
    check_conv(kind, DTYPES[dtype], 3, 2, 2, 6, 10, 40, mode, activation)


@pytest.mark.long
def test_generated():
    sizes = st.integers(1, 40)

    @given(
        st.sampled_from(sorted(OURS)), st.sampled_from(sorted(DTYPES)), st.sampled_from(image.IMAGE_CHANNELS),
        st.integers(1, 2), st.integers(1, 2), sizes, sizes, st.integers(1, 12),
        st.sampled_from([("activation", "tanh"), ("activation_grad", "leaky_relu"), ("batch_norm_grad", "relu")]),
        st.integers(0, 2**31),
    )  # fmt: skip
    def check(kind, dtype, channels, images, groups, height, width, eights, mode, seed):
        check_conv(kind, DTYPES[dtype], channels, images, groups, height, width, 8 * eights, *mode, seed=seed)
        check_wgrad(DTYPES[dtype], channels, images, height, width, 8 * eights, seed)

    generated(check, 2000)


def test_threads_do_not_race():
    """Turned around, blocks and threads give the same bits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = tensor(generator, 2, 24, 72, 3), tensor(generator, 16, 4, 4, 3)
    low = tensor(generator, 2, 12, 36, 16)
    epilogue = epilogue_of(generator, "batch_norm_grad", "relu", 2, low.shape, low.dtype)

    def run():
        y, partials = image.conv(x, weight, epilogue)
        return y, partials.values, image.conv_transpose(low, weight)[0], image.wgrad(low, x)

    assert all(torch.equal(*pair) for pair in zip(*in_both_orders(run), strict=True))


def huge(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: image.conv(t(1, 8, 8, 2), t(8, 4, 4, 2)), "2 image channels: .* take 1, 3 and 4"),
        (lambda t: image.conv(t(1, 8, 8, 3), t(12, 4, 4, 3)), "12 channels: .* take multiples of 8"),
        (lambda t: image.conv_transpose(t(1, 4, 4, 264), t(264, 4, 4, 3)), "264 channels: .* takes at most 256"),
        (lambda t: image.conv_transpose(huge(1, 4096, 4096, 256), huge(256, 4, 4, 3)), "fewer than 2.31 elements"),
        (lambda t: image.conv(t(1, 7, 8, 3), t(8, 4, 4, 3)), "x has shape .* even heights and widths"),
        (lambda t: image.conv(t(1, 8, 8, 3), t(8, 4, 4, 4)), r"weight has shape \(8, 4, 4, 4\)"),
        (lambda t: image.wgrad(t(1, 4, 4, 8), t(1, 8, 6, 3)), r"high has shape \(1, 8, 6, 3\)"),
        (lambda t: image.conv(t(1, 8, 8, 3), t(8, 4, 4, 3), Epilogue("gelu")), "activation is 'gelu'"),
        (lambda t: image.conv(t(3, 8, 8, 3), t(8, 4, 4, 3), Epilogue(groups=2)), "groups is 2"),
        (lambda t: image.conv(t(1, 8, 8, 3).permute(0, 2, 1, 3), t(8, 4, 4, 3)), "expected a contiguous"),
        (lambda t: image.conv(t(1, 8, 8, 3).int(), t(8, 4, 4, 3)), "accepted are bfloat16, float16 and float32"),
        (lambda t: image.conv(t(1, 8, 8, 3), t(8, 4, 4, 3).half()), "weight is torch.float16"),
        (lambda t: image.conv(t(1, 8, 8, 3), t(8, 4, 4, 3), Epilogue(saved=t(1, 4, 4, 4))), "saved has shape"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros)
