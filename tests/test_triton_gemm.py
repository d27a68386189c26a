"""The two convolutions against their twins: every geometry of the family, both load paths, every epilogue."""

from dataclasses import replace

import pytest
import torch
from epilogues import doubled, epilogue_of
from hypothesis import given
from hypothesis import strategies as st
from interpreter import (
    BOTH_PATHS,
    EVERY_GEOMETRY,
    assert_accurate,
    fenced,
    generated,
    only_interpreted,
    run_guarded,
    tensor,
)

from kernels import reference
from kernels.geometry import Deferred, Epilogue, Partials, raw

only_interpreted()

from kernels._triton.batch_norm import prepare_apply  # noqa: E402
from kernels._triton.config import ConvConfig, image_box, pixel_box  # noqa: E402
from kernels._triton.conv import prepare_conv  # noqa: E402
from kernels._triton.conv_transpose import prepare_conv_transpose  # noqa: E402

PREPARE = {"conv": prepare_conv, "conv_transpose": prepare_conv_transpose}
TWIN = {"conv": reference.conv, "conv_transpose": reference.conv_transpose}
MODES = ("activation", "batch_norm", "statistics", "activation_grad", "batch_norm_grad")


def deferred(generator, y, groups, activation):
    """y before a batch norm of noise, whose shift is far from 0: padding must not have it."""
    channels = y.shape[3]
    state = reference.merge_statistics(
        reference.statistics(y, groups), tensor(generator, channels), tensor(generator, channels) + 2
    )
    return Deferred(y, fenced(state), activation)


def wide(x):
    """In float64; of a deferred map that is what its activation rounded to the map's type amounts to."""
    return reference.settled(x).double()


def merged(partials):
    """Partials of many tiles as those of one tile a group, in float64."""
    values = partials.values.double()
    if partials.counts is None:
        return Partials(values.sum(2, keepdim=True), None)
    counts = partials.counts.double()[:, :, None]
    total = counts.sum(1, keepdim=True)
    mean = (counts * values[0]).sum(1, keepdim=True) / total
    m2 = (values[1] + counts * (values[0] - mean).square()).sum(1, keepdim=True)
    return Partials(torch.stack([mean, m2]), total[:, :, 0])


def check_conv(
    kind, images, groups, height, width, into, out, mode, activation, config=None, dtype=torch.float32, seed=0,
    before=None,
):  # fmt: skip
    """One convolution, guarded, against its twin and its oracle; height and width of the low-resolution side.

    before: the activation that the input's batch norm is deferred with, None for an input that is none.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, high = images * groups, (2 * height, 2 * width)
    x_size, y_size = (high, (height, width)) if kind == "conv" else ((height, width), high)
    x = tensor(generator, batch, *x_size, into, dtype=dtype)
    if before is not None:
        x = deferred(generator, x, groups, before)
    ends = (out, into) if kind == "conv" else (into, out)
    weight = tensor(generator, ends[0], 4, 4, ends[1], dtype=dtype)
    weight *= 0.25 / into**0.5  # outputs of the order of 1
    epilogue = epilogue_of(generator, mode, activation, groups, (batch, *y_size, out), dtype)
    job = PREPARE[kind](x, weight, epilogue, config=config)
    kept = [t for t in (raw(x), getattr(x, "state", None), weight, epilogue.saved, epilogue.state) if t is not None]
    y, partials = run_guarded(job, *kept)
    twin = TWIN[kind](x, weight, epilogue)
    oracle = TWIN[kind](wide(x), weight.double(), doubled(epilogue))
    strays = TWIN[kind](wide(x).square(), weight.double().square())[0].sqrt()
    assert_accurate(y, twin[0], oracle[0], "y", terms=16 * into, addends=[strays])
    if oracle[1] is None:
        assert partials is None
        return
    ours = merged(partials)
    if mode == "statistics":
        assert torch.equal(ours.counts, oracle[1].counts)
    if dtype != torch.float32 and mode != "statistics":
        return  # the twin sums gradients that it has rounded to 16 bits, the kernel those of its accumulator
    pixels = oracle[0][..., 0].numel() / groups
    for row, name in enumerate(("mean", "M2") if mode == "statistics" else ("sum of g", "sum of g·x̂")):
        mine, theirs, exact = (p.values[row].double() for p in (ours, twin[1], oracle[1]))
        y_strays = max(oracle[0].abs().max(), strays.max())  # of few outputs all may cancel within their products
        if name == "M2":
            terms = max(exact.abs().max(), exact.abs().max().sqrt() * y_strays)
        else:
            terms = y_strays * (1 if name == "mean" else pixels**0.5)
        allowed = 2 * (theirs - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * terms
        assert (mine - exact).abs().max() <= allowed, (name, (mine - exact).abs().max(), allowed)


def box(pixels, height, width, columns, depth, tma):
    return ConvConfig(*pixel_box(pixels, height, width), columns, depth, 4, 2, tma)


@pytest.mark.parametrize("kind", PREPARE)
@pytest.mark.parametrize("size, tma", EVERY_GEOMETRY)
def test_every_geometry(kind, size, tma):
    pixels = 64 if size <= 16 else 1024
    check_conv(kind, 1, 1, size, size, 16, 16, "statistics", "none", box(pixels, size, size, 16, 16, tma))


@BOTH_PATHS
@pytest.mark.parametrize("before", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("kind", PREPARE)
def test_batch_norm_in_the_load(kind, before, tma):
    """Two groups of an odd number of images, overhanging tiles; every edge of the picture has padding."""
    config = box(32, 5, 4, 32, 16, tma)
    check_conv(kind, 3, 2, 5, 4, 16, 24, "statistics", "none", config, before=before)


@BOTH_PATHS
@pytest.mark.parametrize("kind", PREPARE)
def test_batch_norm_in_the_load_gives_the_bits_of_an_apply(kind, tma):
    generator = torch.Generator().manual_seed(0)
    x = deferred(generator, tensor(generator, 6, 8, 8, 16, dtype=torch.float16), 2, "leaky_relu")
    weight = tensor(generator, 16, 4, 4, 16, dtype=torch.float16) * 0.1
    epilogue, config = Epilogue("relu", groups=2), box(64, 4, 4, 16, 16, tma)
    fused, apart = (PREPARE[kind](t, weight, epilogue, config=config).run()[0] for t in (x, prepare_apply(*x).run()))
    assert torch.equal(fused, apart)


@pytest.mark.parametrize("groups", [1, 2])
@BOTH_PATHS
def test_batch_norm_in_the_load_onto_an_image(groups, tma):
    config = ConvConfig(1, 4, 4, 16, 16, 4, 2, tma)
    check_conv("conv_transpose", 3, groups, 5, 4, 40, 3, "activation", "tanh", config, before="relu")


def test_batch_norm_in_the_load_of_few_channels():
    check_conv("conv", 3, 2, 5, 4, 3, 24, "activation", "relu", before="leaky_relu")


EPILOGUES = [("statistics", "none")] + [
    (mode, activation)
    for mode in ("activation", "batch_norm", "activation_grad", "batch_norm_grad")
    for activation in ("none", "relu", "leaky_relu", "tanh")
    if not (mode.startswith("batch_norm") and activation == "tanh")
]


@pytest.mark.parametrize("mode, activation", EPILOGUES)
@pytest.mark.parametrize("kind", PREPARE)
def test_every_epilogue(kind, mode, activation):
    check_conv(kind, 2, 2, 4, 4, 16, 24, mode, activation, box(32, 4, 4, 32, 16, kind == "conv"))


CASES = [
    # images, groups, height, width, into, out, pixels, columns, depth
    pytest.param(1, 1, 4, 4, 16, 16, 64, 16, 16, id="batch 1, three quarters of the tile empty"),
    pytest.param(3, 2, 4, 4, 16, 16, 32, 16, 16, id="an odd group: the last tile would reach into the next"),
    pytest.param(5, 1, 7, 7, 16, 16, 64, 16, 16, id="7×7, no power of two"),
    pytest.param(2, 1, 3, 5, 16, 16, 32, 16, 16, id="height and width apart"),
    pytest.param(2, 2, 4, 4, 48, 40, 32, 32, 16, id="channels no multiple of the columns"),
    pytest.param(1, 3, 4, 4, 16, 8, 16, 16, 16, id="three groups, fewer channels than columns"),
    pytest.param(2, 1, 4, 4, 32, 128, 32, 128, 16, id="epilogue in parts"),
]


@pytest.mark.parametrize("mode, tma", [("statistics", True), ("batch_norm_grad", False)], ids=["tma", "pointers"])
@pytest.mark.parametrize("kind", PREPARE)
@pytest.mark.parametrize("images, groups, height, width, into, out, pixels, columns, depth", CASES)
def test_edges(kind, mode, images, groups, height, width, into, out, pixels, columns, depth, tma):
    config = box(pixels, height, width, columns, depth, tma)
    activation = "none" if mode == "statistics" else "leaky_relu"
    check_conv(kind, images, groups, height, width, into, out, mode, activation, config)


@pytest.mark.parametrize("kind", PREPARE)
@pytest.mark.parametrize("into, out", [(3, 16), (20, 17), (1, 1)])
def test_channels_that_tma_cannot_load(kind, into, out):
    check_conv(kind, 2, 1, 4, 4, into, out, "activation", "leaky_relu")


@BOTH_PATHS
@pytest.mark.parametrize("mode", ["activation", "activation_grad"])
@pytest.mark.parametrize("size, out", [(4, 3), (7, 1), (8, 4)])
def test_onto_an_image(size, out, mode, tma):
    config = ConvConfig(*image_box(128, size, size), 16, 16, 4, 2, tma)
    check_conv("conv_transpose", 3, 1, size, size, 20, out, mode, "tanh", config)


@BOTH_PATHS
@pytest.mark.parametrize(
    "height, width, box",
    [
        pytest.param(9, 4, (2, 4, 4), id="rims above and below"),
        pytest.param(4, 9, (1, 4, 4), id="rims left and right"),
        pytest.param(6, 9, (1, 4, 8), id="rims all around"),
        pytest.param(5, 4, (2, 4, 4), id="the last tile has one row of its own"),
    ],
)
def test_onto_an_image_of_many_tiles(height, width, box, tma):
    """What a tile's rim holds belongs to the tiles beside it."""
    check_conv("conv_transpose", 3, 1, height, width, 16, 3, "activation", "tanh", ConvConfig(*box, 16, 16, 4, 2, tma))


def test_a_tile_without_an_inside_is_refused():
    with pytest.raises(ValueError, match="needs a rim"):
        prepare_conv_transpose(zeros(1, 8, 8, 16), zeros(16, 4, 4, 3), config=ConvConfig(4, 2, 8, 16, 16, 4, 2, False))


def test_onto_an_image_in_half_precision():
    check_conv("conv_transpose", 2, 1, 4, 4, 16, 3, "activation", "tanh", dtype=torch.float16)


@pytest.mark.parametrize("mode", MODES)
def test_from_an_image(mode):
    """The taps and channels of an image in one row; three channels, so that a row of taps has a ragged end."""
    activation = "none" if mode == "statistics" else "leaky_relu"
    check_conv("conv", 3, 2, 5, 4, 3, 24, mode, activation)


@BOTH_PATHS
@pytest.mark.parametrize("mode", ["statistics", "batch_norm_grad"])
@pytest.mark.parametrize("kind", PREPARE)
def test_half_precision(kind, mode, tma):
    config = box(32, 4, 4, 16, 16, tma)
    check_conv(kind, 3, 1, 4, 4, 16, 16, mode, "none" if mode == "statistics" else "relu", config, torch.float16)


def test_statistics_far_from_zero():
    """A deviation of 0.01 about 100, where E[y²] − mean² has no digit left. No tap that counts sees the padding."""
    x = fenced(torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 100)
    weight = fenced(torch.zeros(16, 4, 4, 16))
    weight[:, 1:3, 1:3] = 1 / 64
    _, partials = run_guarded(prepare_conv(x, weight, Epilogue(statistics=True)), x, weight)
    exact = reference.conv(x.double(), weight.double(), Epilogue(statistics=True))[1]
    assert (exact.values[1] < 0.02).all()
    torch.testing.assert_close(merged(partials).values, exact.values, rtol=5e-3, atol=0)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "tanh"])
def test_nan_stays_nan(activation):
    """Training must find it, so no activation may swallow it; and it stays where it belongs."""
    x, weight = torch.zeros(2, 8, 8, 16), torch.ones(16, 4, 4, 16)
    x[1, 3, 3, 5] = float("nan")
    y, _ = prepare_conv(x, weight, Epilogue(activation), config=box(32, 4, 4, 16, 16, True)).run()
    expected = reference.conv(x, weight, Epilogue(activation))[0]
    assert torch.equal(y.isnan(), expected.isnan()) and y[1].isnan().any()


def test_deterministic():
    generator = torch.Generator().manual_seed(0)
    high, weight = tensor(generator, 4, 8, 8, 16), tensor(generator, 16, 4, 4, 16)
    once, again = (prepare_conv(high, weight, Epilogue(statistics=True)).run() for _ in range(2))
    assert torch.equal(once[0], again[0]) and torch.equal(once[1].values, again[1].values)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


TMA = box(16, 4, 4, 16, 16, True)
X, WEIGHT, Y = zeros(2, 8, 8, 16), zeros(24, 4, 4, 16), zeros(2, 4, 4, 24)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: prepare_conv(X.permute(0, 3, 1, 2), WEIGHT), "x has shape .* contiguous"),
        (lambda: prepare_conv(X.double(), WEIGHT.double()), "x is torch.float64"),
        (lambda: prepare_conv(zeros(0, 8, 8, 16), WEIGHT), "must not be empty"),
        (lambda: prepare_conv(zeros(2, 7, 8, 16), WEIGHT), "even heights and widths"),
        (lambda: prepare_conv(X, WEIGHT.half()), "weight is torch.float16: expected torch.float32"),
        (lambda: prepare_conv(X, zeros(24, 3, 4, 16)), r"weight has shape \(24, 3, 4, 16\).*expected"),
        (lambda: prepare_conv(X, WEIGHT, precision="fast"), "precision is 'fast'"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue(groups=3)), "groups is 3: it must divide the batch of 2"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue("gelu")), "activation is 'gelu'"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue("relu", statistics=True)), "statistics=True requires a raw output"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue(saved=Y[:1])), "saved has shape"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue(statistics=True, state=zeros(4, 1, 24))), "tensor and no state"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue("tanh", state=zeros(4, 1, 24))), "activation is 'tanh'"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue(state=zeros(4, 1, 16))), r"state has shape .* \(4, 1, 24\)"),
        (lambda: prepare_conv(X, WEIGHT, Epilogue("tanh", saved=Y, state=zeros(4, 1, 24))), "activation is 'tanh'"),
        (lambda: prepare_conv(X, WEIGHT, config=box(32, 4, 4, 16, 32, True)), "must be a multiple of depth"),
        (lambda: prepare_conv(zeros(4097)[1:].view(4, 8, 8, 16), WEIGHT), "must be 16-byte aligned"),
        (lambda: prepare_conv_transpose(Y, zeros(16, 4, 4, 24)), "weight has shape"),
        (lambda: prepare_conv_transpose(Y[..., :6].clone(), zeros(6, 4, 4, 3), config=TMA), "6 channels must be"),
        (lambda: prepare_conv(Deferred(X, zeros(4, 2, 16)), WEIGHT), r"x.state has shape .* \(4, 1, 16\)"),
        (lambda: prepare_conv(Deferred(X, zeros(4, 1, 16), "tanh"), WEIGHT), "x.activation is 'tanh'"),
        (lambda: prepare_conv_transpose(Y, zeros(24, 4, 4, 5), config=box(32, 4, 4, 16, 16, True)), "multiples of 16"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


BOX = ("images", "height", "width")
shapes = {
    "images": st.integers(1, 3), "height": st.integers(1, 7), "width": st.integers(1, 7), "tma": st.booleans(),
    "pixels": st.sampled_from([16, 32, 64]), "columns": st.sampled_from([16, 32]), "seed": st.integers(0, 999),
}  # fmt: skip


def any_conv(kind):
    @given(
        into=st.integers(1, 24), out=st.integers(1, 24), groups=st.integers(1, 3), mode=st.sampled_from(MODES),
        activation=st.sampled_from(["none", "relu", "leaky_relu", "tanh"]),
        before=st.sampled_from([None, "none", "relu", "leaky_relu"]), **shapes,
    )  # fmt: skip
    def check(images, groups, height, width, into, out, mode, activation, before, pixels, columns, tma, seed):
        if tma:  # what the launcher refuses otherwise
            into, out = -(-into // 16) * 16, -(-out // 4) * 4
        if kind == "conv_transpose" and seed % 4 == 0:
            out, tma = 1 + out % 4, tma and mode.startswith("activation")  # an image
        if mode == "statistics":
            activation = "none"
        elif mode.startswith("batch_norm") and activation == "tanh":
            activation = "relu"
        if groups * images * height * width < 2:
            images = 2
        config = box(pixels, height, width, columns, 16, tma)
        if kind == "conv_transpose" and out <= 4:
            config = replace(config, **dict(zip(BOX, image_box(pixels, height, width), strict=True)))
        check_conv(kind, images, groups, height, width, into, out, mode, activation, config, seed=seed, before=before)

    return check


OPS = {"conv": any_conv("conv"), "conv_transpose": any_conv("conv_transpose")}


@pytest.mark.parametrize("op", OPS)
def test_generated(op):
    generated(OPS[op], 5)


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_generated_long(op):
    generated(OPS[op], 2000)
