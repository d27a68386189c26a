"""The extension's kernels of RGB ends, run on a CPU, against their twins; and what they refuse."""

import pytest
import torch
from cuda_host import in_both_orders, on_host
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated, tensor

from kernels import reference
from kernels._cuda import image
from kernels.geometry import Epilogue

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OURS = {"conv": image.conv, "conv_transpose": image.conv_transpose}
TWIN = {"conv": reference.conv, "conv_transpose": reference.conv_transpose}


@pytest.fixture(scope="module", autouse=True)
def host():
    with on_host():
        yield


def doubled(epilogue):
    parts = {name: t.double() for name in ("saved", "state") if (t := getattr(epilogue, name)) is not None}
    return Epilogue(epilogue.activation, epilogue.slope, epilogue.groups, epilogue.statistics, **parts)


def epilogue_of(generator, mode, activation, groups, shape, dtype):
    if mode == "statistics":
        return Epilogue(statistics=True, groups=groups)
    if mode == "activation":
        return Epilogue(activation, groups=groups)
    saved = tensor(generator, *shape, dtype=dtype)
    if mode == "activation_grad":
        return Epilogue(activation, groups=groups, saved=fenced(saved.tanh()) if activation == "tanh" else saved)
    state = reference.merge_statistics(
        reference.statistics(saved, groups), *(tensor(generator, shape[3]) for _ in range(2))
    )
    return Epilogue(activation, groups=groups, saved=saved, state=fenced(state))


def merged(partials, groups):
    """Partials of any number of tiles as one tile a group, in float64."""
    values = partials.values.double()
    if partials.counts is None:
        return values.sum(2)
    counts = partials.counts.double()[:, :, None]
    mean = (counts * values[0]).sum(1) / counts.sum(1)
    return torch.stack([mean, (values[1] + counts * (values[0] - mean[:, None]).square()).sum(1)])


def check_conv(
    kind, dtype, channels, images, groups, height, width, many, mode="activation", activation="none", seed=0
):
    """One convolution; height and width are of the map of `many` channels, `channels` the image's."""
    generator = torch.Generator().manual_seed(seed)
    batch, high, low = images * groups, (2 * height, 2 * width), (height, width)
    x_size, y_size, into, out = (high, low, channels, many) if kind == "conv" else (low, high, many, channels)
    x = tensor(generator, batch, *x_size, into, dtype=dtype)
    weight = tensor(generator, many, 4, 4, channels, dtype=dtype)
    weight *= 0.25 / into**0.5
    epilogue = epilogue_of(generator, mode, activation, groups, (batch, *y_size, out), dtype)
    y, partials = OURS[kind](x, weight, epilogue)
    twin, twin_partials = TWIN[kind](x, weight, epilogue)
    oracle, oracle_partials = TWIN[kind](x.double(), weight.double(), doubled(epilogue))
    assert_accurate(y, twin, oracle, kind)
    if mode == "statistics":
        found = [merged(p, groups) for p in (partials, twin_partials, oracle_partials)]
        for name, ours, theirs, exact in zip(("mean", "M2"), *found, strict=True):  # of the rounded output
            assert_accurate(ours.to(dtype), theirs, exact, f"{kind} {name}", terms=batch * y_size[0] * y_size[1])
    elif mode == "batch_norm_grad":
        ours, theirs, exact = (merged(p, groups) for p in (partials, twin_partials, oracle_partials))
        # terms of either sign cancel, so the bar grows with them, not with their sum; a second pass sees them rounded
        terms, seen = images * y_size[0] * y_size[1], torch.float32 if kind == "conv" else dtype
        spread = 8 * torch.finfo(seen).eps * terms**0.5 * oracle.abs().max()
        error, allowed = (ours - exact).abs().max(), 2 * (theirs - exact).abs().max() + spread
        assert error <= allowed, f"{kind} sums: error {error:.3g}, allowed {allowed:.3g}"
    else:
        assert partials is None


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
@pytest.mark.parametrize(
    "mode, activation",
    [
        ("activation", "relu"),
        ("activation", "tanh"),
        ("activation_grad", "leaky_relu"),
        ("activation_grad", "tanh"),
        ("batch_norm_grad", "relu"),
        ("batch_norm_grad", "leaky_relu"),
        ("batch_norm_grad", "none"),
        ("statistics", "none"),
    ],
)
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
        (lambda t: image.conv_transpose(t(1, 4, 4, 264), t(264, 4, 4, 3)), "264 channels: .* takes 256 at most"),
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
