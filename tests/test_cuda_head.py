"""The extension's head and loss, their own source run on a CPU, against their twins and torch's own loss."""

import pytest
import torch
import torch.nn.functional as F
from cuda_host import assert_sum_accurate, in_both_orders, on_host
from hypothesis import given
from hypothesis import strategies as st
from interpreter import assert_accurate, fenced, generated

from kernels import reference
from kernels._cuda.batch_norm import merge_sums
from kernels._cuda.head import gan_loss, head, head_grad
from kernels.geometry import MergeGradients

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def host():
    with on_host():
        yield


def noise(*shape, dtype=torch.float32, seed=0):
    return fenced(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def arguments(images, real, height, width, channels, dtype=torch.float32, seed=0, gain=1.0):
    groups, features = len(real), height * width * channels
    y = noise(images * groups, height, width, channels, dtype=dtype, seed=seed)
    weight = fenced((noise(1, height, width, channels, seed=seed + 1) * gain / features**0.5).to(dtype))
    vectors = [noise(channels, seed=seed + 2), noise(channels, seed=seed + 3)]
    return y, weight, fenced(reference.merge_statistics(reference.statistics(y, groups), *vectors))


def check_head(images, real, height, width, channels, activation="leaky_relu", dtype=torch.float32, seed=0, gain=1.0):
    y, weight, state = arguments(images, real, height, width, channels, dtype, seed, gain)
    made = head(y, weight, state, real, activation)
    twins = reference.head(y, weight, state, real, activation)
    exact = reference.head(y.double(), weight.double(), state.double(), real, activation)
    size = (reference.apply(y.double(), state.double(), activation) * weight).flatten(1).norm(dim=1)
    sizes = size, size / images / 4, size  # σ′ is at most a quarter
    for name, *results in zip(("logits", "dlogits", "means"), made, twins, exact, sizes, strict=True):
        assert_sum_accurate(*results[:3], name, results[3])

    dlogits = made[1]
    g, partials, dw = head_grad(y, weight, state, dlogits, activation)
    twin = reference.head_grad(y, weight, state, dlogits, activation)
    oracle = reference.head_grad(y.double(), weight.double(), state.double(), dlogits.double(), activation)
    assert_accurate(g, twin[0], oracle[0], "g")
    assert_accurate(dw, twin[2], oracle[2], "dw", terms=len(y))
    sums, exact_sums = partials.values.double().sum(2), oracle[1].values.sum(2)
    bound = (oracle[0].abs().sum((0, 1, 2)).max() * 8).item()  # of a sum's terms; |x̂| is below 8 here
    assert (sums - exact_sums).abs().max() <= bound * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "images, real, height, width, channels",
    [
        pytest.param(1, (True,), 2, 2, 16, id="batch 1"),
        pytest.param(3, (True, False), 4, 4, 24, id="real and fake, odd batch"),
        pytest.param(2, (False, True, True), 2, 3, 72, id="three groups, more channels than a tile"),
        pytest.param(2, (True, False), 3, 3, 7, id="unaligned pixels"),
    ],
)
def test_head(images, real, height, width, channels, dtype):
    check_head(images, real, height, width, channels, dtype=dtype)


@pytest.mark.parametrize("activation", ["relu", "none"])
def test_other_activations(activation):
    check_head(2, (True, False), 2, 2, 16, activation)


def test_more_images_than_lines_and_features_than_threads():
    check_head(40, (True, False), 1, 1, 64)
    check_head(1, (True, False), 4, 4, 160)


def test_far_out_nothing_overflows_or_loses_its_digits():
    check_head(4, (True, False), 2, 2, 16, gain=300)  # logits of hundreds


def test_without_a_weight_gradient():
    y, weight, state = arguments(2, (True,), 2, 2, 16)
    assert head_grad(y, weight, state, torch.ones(2), weight_grad=False)[2] is None


def test_sums_merged_at_once_and_gradients_in_their_places():
    y, weight, state = arguments(2, (True, False), 2, 2, 16)
    dlogits = noise(4, seed=5)
    _, sums, dw = head_grad(y, weight, state, dlogits)
    dweight, dbias, means = merge_sums(sums, 8)
    places = [torch.zeros(16), torch.zeros(16), torch.zeros_like(weight)]
    g, merged, out = head_grad(y, weight, state, dlogits, out=places[2], merge=MergeGradients(*places[:2]))
    assert out is places[2]
    assert all(torch.equal(a, b) for a, b in zip((merged, *places), (means, dweight, dbias, dw), strict=True))
    frozen = head_grad(y, weight, state, dlogits, weight_grad=False, merge=MergeGradients())
    assert torch.equal(frozen[0], g) and torch.equal(frozen[1], means) and frozen[2] is None


def test_the_scale_multiplies_the_gradient_and_nothing_else():
    y, weight, state = arguments(2, (True, False), 2, 2, 16)
    plain = head(y, weight, state, (True, False))
    scaled = head(y, weight, state, (True, False), scale=torch.tensor([4096.0, 7.0, 0.0]))
    assert torch.equal(scaled[1], plain[1] * 4096)
    assert torch.equal(scaled[0], plain[0]) and torch.equal(scaled[2], plain[2])


def test_a_ticket_serves_again_and_again():
    y, weight, state = arguments(3, (True, False), 2, 2, 16)
    ticket = torch.zeros(1, dtype=torch.int32, device=y.device)
    runs = [head(y, weight, state, (True, False), ticket=ticket) for _ in range(3)]
    assert ticket == 0
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images, real", [(1, (True,)), (300, (True, False)), (5, (False, True, False))])
def test_loss_is_torchs(images, real, dtype):
    logits = noise(images * len(real), dtype=dtype) * 4
    dlogits, means = gan_loss(logits, real)
    exact = logits.double().requires_grad_()
    bce = F.binary_cross_entropy_with_logits
    targets = [torch.full((images,), float(is_real), dtype=torch.float64) for is_real in real]
    losses = [bce(part, target) for part, target in zip(exact.chunk(len(real)), targets, strict=True)]
    sum(losses).backward()
    torch.testing.assert_close(dlogits.double(), exact.grad, rtol=1e-5, atol=1e-7)
    probabilities = torch.stack([part.sigmoid().mean() for part in exact.detach().chunk(len(real))])
    torch.testing.assert_close(
        means.double(), torch.stack([torch.stack(losses).detach(), probabilities]), rtol=1e-5, atol=1e-6
    )


def test_the_order_of_threads_and_blocks_changes_no_bit():
    made = arguments(5, (True, False), 2, 2, 24)

    def run():
        forward = head(*made, (True, False))
        g, partials, dw = head_grad(*made, forward[1])
        return *forward, *gan_loss(forward[0], (True, False)), g, partials.values, dw

    assert all(torch.equal(a, b) for a, b in zip(*in_both_orders(run), strict=True))


def test_errors_name_the_argument():
    y, weight, state = torch.zeros(4, 2, 2, 16), torch.zeros(1, 2, 2, 16), torch.zeros(4, 2, 16)
    cases = [
        (lambda: head(y, weight, state, (True,)), "real has 1 entries: expected 2"),
        (lambda: head(y, weight, torch.zeros(4, 3, 16), (True,) * 3), "state is of 3 groups"),
        (lambda: head(y, weight[..., :8], state, (True, False)), "weight has shape"),
        (lambda: head(y, weight, state, (True, False), "tanh"), "activation is 'tanh'"),
        (lambda: head(y, weight, state, (True, False), scale=torch.ones(1).double()), r"scale is torch\.float64"),
        (lambda: head(y, weight, state, (True, False), ticket=torch.zeros(1)), "ticket is torch.float32"),
        (lambda: head_grad(y, weight, state, torch.zeros(3)), "dlogits has shape"),
        (lambda: gan_loss(torch.zeros(5), (True, False)), "real has 2 entries: they must divide the 5 logits"),
        (lambda: gan_loss(torch.zeros(8)[::2], (True,)), r"logits is torch\.float32 .* strides \(2,\)"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@given(
    images=st.integers(1, 20), real=st.lists(st.booleans(), min_size=1, max_size=3), height=st.integers(1, 5),
    width=st.integers(2, 5), channels=st.integers(1, 80), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def any_head(images, real, height, width, channels, dtype, seed):
    check_head(images, tuple(real), height, width, channels, dtype=dtype, seed=seed)


def test_generated():
    generated(any_head, 6)


@pytest.mark.long
def test_generated_long():
    generated(any_head, 2000)
