"""The extension's batch norm, its own sources run on a CPU, against its twins and torch's autograd, groups apart."""

import pytest
import torch
import torch.nn.functional as F
from cuda_host import CSRC, STREAM, assert_sum_accurate, in_both_orders, library, on_host
from hypothesis import given
from hypothesis import strategies as st
from interpreter import fenced, generated

from kernels import reference
from kernels._cuda import batch_norm
from kernels.geometry import Merge, Partials

EPS, MOMENTUM = 1e-5, 0.1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    pytest.param(1, 1, 2, 2, 16, id="batch 1"),
    pytest.param(3, 2, 5, 3, 24, id="odd batch, channels no power of two"),
    pytest.param(2, 3, 7, 7, 1, id="one channel"),
    pytest.param(3, 2, 8, 8, 7, id="unaligned rows"),
    pytest.param(5, 2, 8, 8, 64, id="several tiles of rows"),
    pytest.param(1, 2, 4, 4, 320, id="several tiles of channels"),
]


@pytest.fixture(autouse=True)
def host():
    with on_host():
        yield


def noise(*shape, dtype=torch.float32, seed=0):
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def autograd(y, weight, bias, groups, activation, da):
    """Activated output, and gradients of y, weight and bias, by torch in float64 and NCHW, group by group."""
    y, weight, bias = (t.double().detach().requires_grad_() for t in (y, weight, bias))
    norms = [F.batch_norm(part.permute(0, 3, 1, 2), None, None, weight, bias, True, 0, EPS) for part in y.chunk(groups)]
    a = torch.cat([reference.activate(norm, activation) for norm in norms]).permute(0, 2, 3, 1)
    return a, *torch.autograd.grad(a, (y, weight, bias), da.double())


def check_batch_norm(images, groups, height, width, channels, activation, dtype=torch.float32, seed=0):
    shape = (images * groups, height, width, channels)
    y, da = noise(*shape, dtype=dtype, seed=seed), noise(*shape, dtype=dtype, seed=seed + 1)
    y += 1
    weight, bias = noise(channels, seed=seed + 2), noise(channels, seed=seed + 3)
    rows = images * height * width

    partials = batch_norm.statistics(y, groups)
    assert (partials.counts.sum(1) == rows).all()
    state = batch_norm.merge_statistics(partials, weight, bias, eps=EPS)
    twin_state = reference.merge_statistics(reference.statistics(y, groups), weight, bias)
    exact_state = reference.merge_statistics(reference.statistics(y.double(), groups), weight.double(), bias.double())
    mean, rstd, scale, _ = exact_state
    condition = 1 + y.abs().max() * rstd  # of a variance: mean over deviation (Chan, Golub and LeVeque 1983)
    sizes = (y.abs().max(), rstd * condition, scale * condition, (mean * scale).abs() * condition + bias.abs())
    for row, (name, size) in enumerate(zip(("mean", "rstd", "scale", "shift"), sizes, strict=True)):
        assert_sum_accurate(state[row], twin_state[row], exact_state[row], name, size)

    a = batch_norm.apply(y, state, activation)
    g, partials = batch_norm.activation_grad(da, y, state, activation)
    dweight, dbias, means = batch_norm.merge_sums(partials, rows)
    dy = batch_norm.apply_grad(g, y, state, means)

    twin_g, twin_partials = reference.activation_grad(da, y, twin_state, activation)
    twin_dy = reference.apply_grad(twin_g, y, twin_state, reference.merge_sums(twin_partials, rows)[2])
    exact = autograd(y, weight, bias, groups, activation, da)
    size = reference.grouped(y, groups).abs().amax((0, 1))  # of each channel, times what it is scaled by
    assert_sum_accurate(a, reference.apply(y, twin_state, activation), exact[0], "a", size * scale)
    size = scale * (da.abs().max() * (1 + size * rstd))  # |mean(g·x̂)| ≤ max |g|, since mean(x̂²) ≤ 1
    assert_sum_accurate(dy, twin_dy, exact[1], "dy", size)
    spread = rows**0.5 * max(1.0, float(rstd.max()))
    torch.testing.assert_close(dweight.double(), exact[2], rtol=1e-5, atol=1e-5 * spread)
    torch.testing.assert_close(dbias.double(), exact[3], rtol=1e-5, atol=1e-5 * spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images, groups, height, width, channels", SHAPES)
def test_against_torch(images, groups, height, width, channels, dtype):
    check_batch_norm(images, groups, height, width, channels, "leaky_relu", dtype)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_other_activations(activation):
    check_batch_norm(3, 2, 4, 4, 16, activation)


def test_larger_tiles(monkeypatch):
    """A tensor of many tiles gets larger ones, whose threads walk down more rows than they hold at once."""
    monkeypatch.setattr(batch_norm, "TILES", 8)
    assert batch_norm.tile_rows(noise(2, 16, 16, 256), 1) == (128, 4)
    check_batch_norm(1, 2, 16, 16, 256, "relu")


def test_relu_of_what_is_not_finite():
    y = fenced(torch.tensor([float("-inf"), float("inf"), float("nan"), -1.0]).view(4, 1, 1, 1))
    state = fenced(torch.tensor([0.0, 1.0, 1.0, 0.0]).view(4, 1, 1))
    torch.testing.assert_close(batch_norm.apply(y, state, "relu"), y.relu(), equal_nan=True)


def test_running_statistics_move_once_a_group_in_order():
    y = noise(6, 4, 4, 16) + 2
    y[3:] *= 3  # real and fake are unlike, so their order shows
    mean, var, tracked = fenced(torch.zeros(16)), fenced(torch.ones(16)), torch.tensor(5)
    partials = batch_norm.statistics(y, 2)
    batch_norm.merge_statistics(partials, noise(16), noise(16), mean, var, tracked, EPS, MOMENTUM)
    bn = torch.nn.BatchNorm2d(16).train()
    for part in y.chunk(2):
        bn(part.permute(0, 3, 1, 2))
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)
    assert tracked == 7


def test_statistics_merged_at_once():
    y, vectors = noise(4, 4, 4, 16), [noise(16, seed=1), noise(16, seed=2)]
    running = [noise(16).abs(), noise(16, seed=3).abs(), torch.tensor(1)]
    apart = batch_norm.merge_statistics(batch_norm.statistics(y, 2), *vectors, *(r.clone() for r in running), EPS, 0.5)
    at_once = batch_norm.statistics(y, 2, Merge(*vectors, *running, EPS, 0.5))
    assert torch.equal(apart, at_once) and running[2] == 3


def test_sums_merged_into_places():
    partials = Partials(noise(2, 2, 3, 16), None)
    places = torch.zeros(16), torch.zeros(16)
    dweight, dbias, _ = batch_norm.merge_sums(partials, 9, places)
    assert dweight is places[0] and dbias is places[1]
    assert all(torch.equal(a, b) for a, b in zip(places, batch_norm.merge_sums(partials, 9), strict=False))
    with pytest.raises(ValueError, match=r"out\[1\] has shape"):
        batch_norm.merge_sums(partials, 9, (places[0], torch.zeros(8)))


def test_merge_is_of_unequal_tiles_and_far_from_zero():
    """Chan's formula in fp32 against float64, tiles of 1 to 200 pixels around a mean of 1000."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (150,), generator=generator).tolist()
    tiles = [torch.randn(n, 16, generator=generator) + 1000 for n in sizes]
    stats = [(t.double().mean(0), (t.double() - t.double().mean(0)).square().sum(0)) for t in tiles]
    values = torch.stack([torch.stack(list(part)) for part in zip(*stats, strict=True)])[:, None].float()
    partials = Partials(fenced(values), fenced(torch.tensor(sizes).float()[None]))
    state = batch_norm.merge_statistics(partials, fenced(torch.ones(16)), fenced(torch.zeros(16)), eps=EPS)
    exact = torch.cat(tiles).double()
    torch.testing.assert_close(state[0, 0].double(), exact.mean(0), rtol=5e-7, atol=0)
    torch.testing.assert_close(state[1, 0].double(), (exact.var(0, correction=0) + EPS).rsqrt(), rtol=2e-5, atol=0)


def test_statistics_far_from_zero():
    y = noise(4, 8, 8, 16) + 1000
    state = batch_norm.merge_statistics(batch_norm.statistics(y), torch.ones(16), torch.zeros(16))
    exact = (y.double().flatten(0, 2).var(0, correction=0) + EPS).rsqrt()
    torch.testing.assert_close(state[1, 0].double(), exact, rtol=1e-5, atol=0)


def everything(y, da, weight, bias):
    """All that comes out of both passes."""
    partials = batch_norm.statistics(y, 2)
    state = batch_norm.merge_statistics(partials, weight, bias)
    g, sums = batch_norm.activation_grad(da, y, state, "relu")
    merged = batch_norm.merge_sums(sums, y.numel() // y.shape[3] // 2)
    dy = batch_norm.apply_grad(g, y, state, merged[2])
    return *partials, state, batch_norm.apply(y, state), g, sums.values, *merged, dy


def test_the_order_of_threads_and_blocks_changes_no_bit():
    tensors = noise(4, 9, 9, 40), noise(4, 9, 9, 40, seed=1), noise(40), noise(40)
    before, after = in_both_orders(lambda: everything(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_offsets_beyond_two_to_the_31():
    """The last tile of 2^33 elements, alone, from pointers so far back that it is the tensor we have."""
    rows, channels, height = 2**30, 8, 128
    y, state = noise(height, 1, 1, channels), noise(4, 1, channels)
    out, last = torch.empty_like(y), rows // height - 1
    base = [t.data_ptr() - last * height * channels * 4 for t in (y, out)]
    source = library(CSRC / "batch_norm.cu")
    source.host_blocks(last, last)
    try:
        assert source.bn_apply(STREAM, base[0], state.data_ptr(), base[1], 0, rows, 1, channels, height, 0.5) == 0
    finally:
        source.host_blocks(0, 2**64 - 1)
    torch.testing.assert_close(out, reference.apply(y, state, "leaky_relu", 0.5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda y: batch_norm.statistics(y, 2), "groups is 2: it must divide the batch of 3"),
        (lambda y: batch_norm.statistics(y.permute(0, 3, 1, 2)), "y has shape"),
        (lambda y: batch_norm.statistics(y[:, ::2]), "y has shape .* and strides"),
        (lambda y: batch_norm.statistics(y.double()), "y is torch.float64: accepted are"),
        (lambda y: batch_norm.statistics(y.flatten()[1:169].view(3, 2, 2, 14)), "must be 16-byte aligned"),
        (lambda y: batch_norm.apply(y, torch.zeros(3, 1, 16)), "state has shape"),
        (lambda y: batch_norm.apply(y, torch.zeros(4, 1, 16, device="meta")), "state is on meta: expected cpu"),
        (lambda y: batch_norm.activation_grad(y, y, torch.zeros(4, 1, 16), "tanh"), "activation is 'tanh'"),
        (lambda y: batch_norm.activation_grad(y.half(), y, torch.zeros(4, 1, 16)), "da is torch.float16"),
        (lambda y: batch_norm.merge_sums(Partials(torch.zeros(2, 1, 1, 4), None), 0), "rows is 0"),
        (
            lambda y: batch_norm.merge_statistics(Partials(torch.zeros(2, 1, 1, 4), None), *[torch.ones(4)] * 2),
            "partials.counts is None",
        ),
        (
            lambda y: batch_norm.merge_statistics(batch_norm.statistics(y), *[y[0, 0, 0]] * 2, rows=1),
            "1 value per channel",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, 2, 16))


@given(
    images=st.integers(1, 5), groups=st.integers(1, 3), height=st.integers(2, 9), width=st.integers(1, 9),
    channels=st.integers(1, 140), activation=st.sampled_from(["none", "relu", "leaky_relu"]),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 999),
)  # fmt: skip
def any_batch_norm(images, groups, height, width, channels, activation, dtype, seed):
    check_batch_norm(images, groups, height, width, channels, activation, dtype, seed)


def test_generated():
    generated(any_batch_norm, 10)


@pytest.mark.long
def test_generated_long():
    generated(any_batch_norm, 2000)
