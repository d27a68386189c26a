"""D's head, loss and both gradients in one, and the loss alone, against its twin and against torch's own operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated, only_interpreted, run_guarded

from kernels import reference

only_interpreted()

from kernels._triton.head import prepare_gan_loss, prepare_head, prepare_head_grad  # noqa: E402


def noise(*shape, dtype=torch.float32, seed=0):
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def check_head(images, real, height, width, channels, activation="leaky_relu", dtype=torch.float32, seed=0, gain=1.0):
    groups = len(real)
    y = noise(images * groups, height, width, channels, dtype=dtype, seed=seed)
    weight = fenced(
        (noise(1, height, width, channels, seed=seed + 1) * gain / (height * width * channels) ** 0.5).to(dtype)
    )
    vectors = [noise(channels, seed=seed + 2), noise(channels, seed=seed + 3)]
    state = fenced(reference.merge_statistics(reference.statistics(y, groups), *vectors))
    ticket = torch.zeros(1, dtype=torch.int32)
    job = prepare_head(y, weight, state, real, activation, ticket=ticket)
    logits, dlogits, means = run_guarded(job, y, weight, state, ticket)
    assert len(job.launches) == 1 and ticket == 0
    twin = reference.head(y, weight, state, real, activation)[0].double()
    exact = reference.head(y.double(), weight.double(), state.double(), real, activation)[0]
    _, _, scale, shift = state.double()[:, :, None]
    a = reference.activate(reference.grouped(y.double(), groups) * scale + shift, activation)
    size = (a.view(y.shape) * weight.double()).abs().sum((1, 2, 3)).max()  # a logit near 0 is a sum of larger terms
    walk = max(1, (height * width * channels) ** 0.5 / 8)
    allowed = 2 * (twin - exact).abs().max() + 2 * walk * torch.finfo(torch.float32).eps * size
    assert (logits.double() - exact).abs().max() <= allowed
    twins, exact = reference.gan_loss(logits, real), reference.gan_loss(logits.double(), real)
    for ours, twin, oracle, name in zip((dlogits, means), twins, exact, ("dlogits", "means"), strict=True):
        assert_accurate(ours, twin, oracle, name, terms=images)

    job = prepare_head_grad(y, weight, state, dlogits, activation)
    g, partials, dw = run_guarded(job, y, weight, state, dlogits)
    twin = reference.head_grad(y, weight, state, dlogits, activation)
    oracle = reference.head_grad(y.double(), weight.double(), state.double(), dlogits.double(), activation)
    assert_accurate(g, twin[0], oracle[0], "g")
    assert_accurate(dw, twin[2], oracle[2], "dw", terms=images * groups)
    sums, exact_sums = partials.values.double().sum(2), oracle[1].values.sum(2)
    bound = (oracle[0].abs().sum((0, 1, 2)).max() * 8).item()  # of a sum's terms; |x̂| is below 8 here
    assert (sums - exact_sums).abs().max() <= bound * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    "images, real, height, width, channels",
    [
        pytest.param(1, (True,), 2, 2, 16, id="batch 1"),
        pytest.param(3, (True, False), 4, 4, 24, id="real and fake, odd batch"),
        pytest.param(17, (False,), 2, 3, 40, id="more images than a step, channels no power of two"),
        pytest.param(2, (False, True, True), 2, 2, 70, id="three groups, more channels than a tile"),
    ],
)
@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "none"])
def test_head(images, real, height, width, channels, activation):
    check_head(images, real, height, width, channels, activation)


def test_head_in_half_precision():
    check_head(3, (True, False), 4, 4, 32, dtype=torch.float16)


def test_head_far_out_neither_overflows_nor_loses_its_digits():
    check_head(4, (True, False), 2, 2, 16, gain=300)  # logits of hundreds


def test_head_is_torchs_loss_and_autograd():
    """From the raw output to the loss and back by torch's own operations, real and fake."""
    y = noise(4, 4, 4, 16).double().requires_grad_()
    weight = (noise(1, 4, 4, 16, seed=1).double() * 0.1).requires_grad_()
    gamma, beta = noise(16, seed=2).double(), noise(16, seed=3).double()
    a = [
        F.leaky_relu(F.batch_norm(part.permute(0, 3, 1, 2), None, None, gamma, beta, True), 0.2) for part in y.chunk(2)
    ]
    logits = [F.conv2d(part, weight.permute(0, 3, 1, 2)).flatten() for part in a]
    bce = F.binary_cross_entropy_with_logits
    losses = [bce(logits[0], torch.ones(2, dtype=torch.float64)), bce(logits[1], torch.zeros(2, dtype=torch.float64))]
    dweight, *da = torch.autograd.grad(sum(losses), (weight, *a))

    y32, w32 = y.detach().float(), weight.detach().float()
    state = reference.merge_statistics(reference.statistics(y32, 2), gamma.float(), beta.float())
    ours, dlogits, means = prepare_head(y32, w32, state, (True, False)).run()
    g, _, dw = prepare_head_grad(y32, w32, state, dlogits).run()
    exact_da = torch.cat(da).permute(0, 2, 3, 1)
    exact_g = reference.activation_grad(exact_da, y.detach(), state.double(), "leaky_relu")[0]
    torch.testing.assert_close(ours.double(), torch.cat(logits).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means[0].double(), torch.stack(losses).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(means[1].double(), torch.stack([part.sigmoid().mean() for part in logits]).detach())
    torch.testing.assert_close(dw.double(), dweight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(g.double(), exact_g, rtol=1e-4, atol=1e-6)


def test_a_ticket_serves_launch_after_launch():
    y, weight, ticket = noise(6, 2, 2, 16), noise(1, 2, 2, 16, seed=1), torch.zeros(1, dtype=torch.int32)
    state = reference.merge_statistics(reference.statistics(y, 2), torch.ones(16), torch.zeros(16))
    runs = [prepare_head(y, weight, state, (True, False), ticket=ticket).run() for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True)) and ticket == 0
    with pytest.raises(ValueError, match=r"ticket is torch\.int64"):
        prepare_head(y, weight, state, (True, False), ticket=ticket.long())


def test_head_without_a_weight_gradient():
    y, weight = noise(2, 2, 2, 16), noise(1, 2, 2, 16, seed=1)
    state = reference.merge_statistics(reference.statistics(y), torch.ones(16), torch.zeros(16))
    assert prepare_head_grad(y, weight, state, torch.ones(2), weight_grad=False).run()[2] is None


def test_head_names_what_does_not_fit():
    y, weight = torch.zeros(4, 2, 2, 16), torch.zeros(1, 2, 2, 16)
    with pytest.raises(ValueError, match="real has 1 entries: expected 2"):
        prepare_head(y, weight, torch.zeros(4, 2, 16), (True,))
    with pytest.raises(ValueError, match="state is of 3 groups"):
        prepare_head(y, weight, torch.zeros(4, 3, 16), (True,) * 3)
    with pytest.raises(ValueError, match="weight has shape"):
        prepare_head(y, weight[..., :8], torch.zeros(4, 2, 16), (True, False))


def check_gan_loss(images, real, dtype=torch.float32, gain=1.0, seed=0):
    logits = fenced((noise(images * len(real), seed=seed) * gain).to(dtype))
    ours = run_guarded(prepare_gan_loss(logits, real), logits)
    twins, exact = reference.gan_loss(logits, real), reference.gan_loss(logits.double(), real)
    for got, twin, oracle, name in zip(ours, twins, exact, ("dlogits", "means"), strict=True):
        assert_accurate(got, twin, oracle, name, terms=images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("images, real", [(1, (True,)), (3, (True, False)), (300, (False, True, True))])
@pytest.mark.parametrize("gain", [1.0, 100.0])
def test_gan_loss(images, real, dtype, gain):
    check_gan_loss(images, real, dtype, gain)


def test_small_losses_keep_their_digits():
    """Of logits that are judged well: the loss is nearly e^−|l|, far below one unit in the last place of 1 + e^−|l|."""
    for logit in (0.0, 0.5, 3.0, 7.0, 16.0, 40.0, 80.0):
        _, means = prepare_gan_loss(torch.tensor([-logit, logit]), (False, True)).run()
        expected = math.log1p(math.exp(-logit))
        assert means[0].tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_gan_loss_is_as_wrong_as_its_logits():
    for bad in (float("nan"), float("inf")):
        dlogits, means = prepare_gan_loss(torch.tensor([bad, 1.0]), (False,)).run()
        assert not means[0].isfinite() and dlogits[1].isfinite()


@given(
    images=st.integers(1, 600), real=st.lists(st.booleans(), min_size=1, max_size=4), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16]), gain=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def any_gan_loss(images, real, seed, dtype, gain):
    check_gan_loss(images, tuple(real), dtype, gain, seed)


@given(
    images=st.integers(1, 20), real=st.lists(st.booleans(), min_size=1, max_size=3), height=st.integers(1, 5),
    width=st.integers(2, 5), channels=st.integers(1, 80), seed=st.integers(0, 99),
)  # fmt: skip
def any_head(images, real, height, width, channels, seed):
    check_head(images, tuple(real), height, width, channels, seed=seed)


OPS = {"head": any_head, "gan_loss": any_gan_loss}


@pytest.mark.parametrize("op", OPS)
def test_generated(op):
    generated(OPS[op], 8)


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_generated_long(op):
    generated(OPS[op], 2000)
