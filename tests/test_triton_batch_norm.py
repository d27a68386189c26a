"""Batch norm's kernels against their twins, and against torch's own batch norm and autograd, groups apart."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated, only_interpreted, run_guarded

from kernels import reference
from kernels.geometry import Partials

only_interpreted()

from kernels._triton import batch_norm, batch_norm_grad  # noqa: E402

EPS, MOMENTUM = 1e-5, 0.1
SHAPES = [
    pytest.param(1, 1, 2, 2, 16, id="batch 1"),
    pytest.param(3, 2, 5, 3, 24, id="odd batch, channels no power of two"),
    pytest.param(2, 3, 7, 7, 1, id="one channel"),
    pytest.param(5, 2, 8, 8, 64, id="several tiles of rows"),
    pytest.param(1, 2, 4, 4, 160, id="several tiles of channels"),
]


def noise(*shape, dtype=torch.float32, seed=0):
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def forward(y, weight, bias, groups, running=(None, None, None)):
    """State by our kernels, statistics and merge, guarded."""
    partials = run_guarded(batch_norm.prepare_statistics(y, groups), y)
    kept = [t for t in (*partials, weight, bias, *running) if t is not None]
    job = batch_norm.prepare_merge_statistics(partials, weight, bias, *running, EPS, MOMENTUM)
    return run_guarded(job, *kept)


def autograd(y, weight, bias, groups, activation, da=None):
    """Activated output, and gradients of y, weight and bias, by torch in float64 and NCHW, group by group."""
    y, weight, bias = (t.double().detach().requires_grad_() for t in (y, weight, bias))
    parts = [
        reference.activate(
            F.batch_norm(part.permute(0, 3, 1, 2), None, None, weight, bias, True, MOMENTUM, EPS), activation
        )
        for part in y.chunk(groups)
    ]
    a = torch.cat(parts).permute(0, 2, 3, 1)
    return a if da is None else (a, *torch.autograd.grad(a, (y, weight, bias), da.double()))


def check_batch_norm(images, groups, height, width, channels, activation, dtype=torch.float32, seed=0):
    shape = (images * groups, height, width, channels)
    y, da = noise(*shape, dtype=dtype, seed=seed), noise(*shape, dtype=dtype, seed=seed + 1)
    y += 1
    weight, bias = noise(channels, seed=seed + 2), noise(channels, seed=seed + 3)
    rows = images * height * width

    state = forward(y, weight, bias, groups)
    twin_state = reference.merge_statistics(reference.statistics(y, groups), weight, bias)
    exact_state = reference.merge_statistics(reference.statistics(y.double(), groups), weight.double(), bias.double())
    for row, name in enumerate(("mean", "rstd", "scale")):
        assert_accurate(state[row], twin_state[row], exact_state[row], name, terms=rows)
    parts = exact_state[0] * exact_state[2]  # shift is bias − mean·scale, and has the rounding of both
    bar = 2 * (twin_state[3] - exact_state[3]).abs().max()
    bar += 2 * torch.finfo(torch.float32).eps * (bias.abs().max() + parts.abs().max()) * max(1, rows**0.5 / 2)
    assert (state[3] - exact_state[3]).abs().max() <= bar, "shift"

    a = run_guarded(batch_norm.prepare_apply(y, state, activation), y, state)
    job = batch_norm_grad.prepare_activation_grad(da, y, state, activation)
    g, partials = run_guarded(job, da, y, state)
    dweight, dbias, means = run_guarded(batch_norm_grad.prepare_merge_sums(partials, rows), partials.values)
    dy = run_guarded(batch_norm_grad.prepare_apply_grad(g, y, state, means), g, y, state, means)

    twin_g, twin_partials = reference.activation_grad(da, y, twin_state, activation)
    twins = reference.merge_sums(twin_partials, rows)
    twin_dy = reference.apply_grad(twin_g, y, twin_state, twins[2])
    exact = autograd(y, weight, bias, groups, activation, da)
    steepest = exact_state[2].abs().max()
    addends = [steepest * y, exact_state[3]]
    assert_accurate(a, reference.apply(y, twin_state, activation), exact[0], "a", addends=addends)
    assert_accurate(dy, twin_dy, exact[1], "dy", addends=[steepest * da])
    scale = rows**0.5 * max(1.0, float(exact_state[1].max()))
    torch.testing.assert_close(dweight.double(), exact[2], rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(dbias.double(), exact[3], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("images, groups, height, width, channels", SHAPES)
def test_against_torch(images, groups, height, width, channels, activation):
    check_batch_norm(images, groups, height, width, channels, activation)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu"])
def test_half_precision(activation):
    check_batch_norm(3, 2, 4, 4, 16, activation, torch.float16)


def test_running_statistics_move_once_a_group_in_order():
    y = noise(6, 4, 4, 16) + 2
    y[3:] *= 3  # real and fake are unlike, so their order shows
    weight, bias = noise(16, seed=1), noise(16, seed=2)
    mean, var, tracked = fenced(torch.zeros(16)), fenced(torch.ones(16)), torch.tensor(5)
    forward(y, weight, bias, 2, (mean, var, tracked))
    bn = torch.nn.BatchNorm2d(16).train()
    for part in y.chunk(2):
        bn(part.permute(0, 3, 1, 2))
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(var, bn.running_var)
    assert tracked == 7


def test_merge_is_of_unequal_tiles_and_far_from_zero():
    """Chan's formula in fp32 against float64, tiles of 1 to 200 pixels around a mean of 1000."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 200, (150,), generator=generator).tolist()
    tiles = [torch.randn(n, 16, generator=generator) + 1000 for n in sizes]
    stats = [(t.double().mean(0), (t.double() - t.double().mean(0)).square().sum(0)) for t in tiles]
    values = torch.stack([torch.stack(list(part)) for part in zip(*stats, strict=True)])[:, None].float()
    partials = Partials(fenced(values), fenced(torch.tensor(sizes).float()[None]))
    weight, bias = fenced(torch.ones(16)), fenced(torch.zeros(16))
    job = batch_norm.prepare_merge_statistics(partials, weight, bias, eps=EPS)
    state = run_guarded(job, *partials, weight, bias)
    exact = torch.cat(tiles).double()
    torch.testing.assert_close(state[0, 0].double(), exact.mean(0), rtol=5e-7, atol=0)
    torch.testing.assert_close(state[1, 0].double(), (exact.var(0, correction=0) + EPS).rsqrt(), rtol=2e-5, atol=0)


def test_merges_are_deterministic():
    y, weight, bias = noise(5, 8, 8, 64), noise(64), noise(64)
    assert torch.equal(forward(y, weight, bias, 1), forward(y, weight, bias, 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda y: batch_norm.prepare_statistics(y, 2), "groups is 2: it must divide the batch of 3"),
        (lambda y: batch_norm.prepare_statistics(y.permute(0, 3, 1, 2)), "y has shape"),
        (lambda y: batch_norm.prepare_apply(y, torch.zeros(3, 1, 16)), "state has shape"),
        (
            lambda y: batch_norm_grad.prepare_activation_grad(y, y, torch.zeros(4, 1, 16), "tanh"),
            "activation is 'tanh'",
        ),
        (lambda y: batch_norm_grad.prepare_merge_sums(Partials(torch.zeros(2, 1, 1, 4), None), 0), "rows is 0"),
        (
            lambda y: batch_norm.prepare_merge_statistics(
                Partials(torch.zeros(2, 1, 1, 4), None), *[torch.ones(4)] * 2
            ),
            "partials.counts is None",
        ),
        (
            lambda y: batch_norm.prepare_merge_statistics(
                batch_norm.prepare_statistics(y).result, *[y[0, 0, 0]] * 2, rows=1
            ),
            "1 value per channel",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, 2, 16))


@given(
    images=st.integers(1, 5), groups=st.integers(1, 3), height=st.integers(2, 9), width=st.integers(1, 9),
    channels=st.integers(1, 140), activation=st.sampled_from(["none", "relu", "leaky_relu"]), seed=st.integers(0, 999),
)  # fmt: skip
def any_batch_norm(images, groups, height, width, channels, activation, seed):
    check_batch_norm(images, groups, height, width, channels, activation, seed=seed)


def test_generated():
    generated(any_batch_norm, 5)


@pytest.mark.long
def test_generated_long():
    generated(any_batch_norm, 2000)
