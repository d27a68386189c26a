"""The public ops by the Triton and library backends, in the interpreter: forward, gradients, running statistics,
evaluation mode; the loss, Adam, the gather."""

import pytest
import torch
from interpreter import only_interpreted

import kernels
from kernels.dispatch import BackendError

only_interpreted()


def run(kind, backend, dtype, groups, shape):
    """Everything a user can see of the two ops of a kind, from the same random inputs."""
    n, c, o, size = shape
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, size, size, generator=g).to(dtype).requires_grad_()
    ends = (o, c) if kind == "conv" else (c, o)
    weight = (torch.randn(*ends, 4, 4, generator=g) * 0.2).requires_grad_()
    gamma = (torch.rand(o, generator=g) + 0.5).requires_grad_()
    beta = torch.randn(o, generator=g).requires_grad_()
    running = [torch.zeros(o), torch.ones(o), torch.tensor(0)]
    bn_act, act = getattr(kernels, f"{kind}_bn_act"), getattr(kernels, f"{kind}_act")

    y = bn_act(x, weight, gamma, beta, *running, groups=groups, backend=backend)
    results = {"y": y, **{f"running{i}": t.clone() for i, t in enumerate(running)}}
    coefficients = torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape)
    gradients = torch.autograd.grad((y.float() * coefficients).sum(), (x, weight, gamma, beta))
    results |= dict(zip(("dx", "dweight", "dgamma", "dbeta"), gradients, strict=True))
    with torch.no_grad():
        results["evaluated"] = bn_act(x, weight, gamma, beta, *running, training=False, backend=backend)
    y = act(x, weight, backend=backend)
    results["act"] = y
    gradients = torch.autograd.grad((y.float() * coefficients).sum(), (x, weight))
    return results | dict(zip(("act dx", "act dweight"), gradients, strict=True))


@pytest.mark.parametrize("backend", ["triton", "library"])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
@pytest.mark.parametrize(
    ("dtype", "groups", "shape"),
    [
        (torch.float32, 2, (2, 8, 8, 4)),
        (torch.float32, 1, (1, 5, 3, 4)),  # batch 1, channels that no vector divides
        (torch.float16, 1, (3, 8, 8, 4)),  # odd batch
    ],
)
def test_a_fused_backend_equals_plain_pytorch(backend, kind, dtype, groups, shape):
    ours, theirs = (run(kind, backend, dtype, groups, shape) for backend in (backend, "eager"))
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3  # rounding of fp32 sums; of fp16 maps, between two kernels
    for name, expected in theirs.items():
        got = ours[name]
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        error = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-6)
        assert error <= tolerance, f"{name}: {error}"


def test_the_gradients_are_the_same_bits_each_time():
    first, second = (run("conv", "triton", torch.float32, 2, (2, 8, 8, 4)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_head_takes_the_library_s_convolution_and_the_kernels_around_it():
    """G1 of a DCGAN: 4×4 from one pixel."""
    g = torch.Generator().manual_seed(0)
    z, weight = torch.randn(3, 5, 1, 1, generator=g), torch.randn(5, 8, 4, 4, generator=g)
    results = []
    for backend in ("triton", "eager"):
        w = weight.clone().requires_grad_()
        gamma, beta = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
        y = kernels.conv_transpose_bn_act(z, w, gamma, beta, stride=1, padding=0, backend=backend)
        results.append((y, *torch.autograd.grad((y * y.detach().cos()).sum(), (w, gamma, beta))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_unaligned_view_is_copied_and_gives_the_same_numbers():
    g = torch.Generator().manual_seed(0)
    images, weight = torch.randn(2, 4, 4, 3, generator=g), torch.randn(4, 3, 4, 4, generator=g)
    aligned = images.permute(0, 3, 1, 2)
    storage = torch.cat([torch.zeros(1), images.flatten()])
    unaligned = storage[1:].view(images.shape).permute(0, 3, 1, 2)
    assert unaligned.data_ptr() % 16
    ours, theirs = (kernels.conv_act(x, weight, backend="triton") for x in (unaligned, aligned))
    assert torch.equal(ours, theirs)


def test_a_type_that_the_kernels_do_not_serve_is_refused_by_name():
    with pytest.raises(BackendError, match="float64"):
        kernels.conv_act(torch.zeros(1, 3, 4, 4).double(), torch.zeros(4, 3, 4, 4).double(), backend="triton")


def test_half_precision_batch_norm_parameters_run_eagerly_or_are_refused_by_name():
    x, weight = torch.zeros(2, 3, 4, 4).half(), torch.zeros(4, 3, 4, 4).half()
    with pytest.raises(BackendError, match=r"bn_weight is torch\.float16"):
        kernels.conv_bn_act(x, weight, torch.ones(4).half(), torch.zeros(4).half(), backend="triton")


# The loss, Adam, the gather


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_loss_and_its_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    results = []
    logits = (torch.randn(301 * 2, generator=generator) * 5).to(dtype)
    for backend in ("triton", "eager"):
        leaf = logits.clone().requires_grad_()
        got = kernels.gan_loss(leaf, (False, True), backend=backend)
        (got.losses * torch.tensor([1.0, -3.0])).sum().backward()
        assert not got.probabilities.requires_grad
        results.append((*(t.detach() for t in got), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_adam_over_two_tensors(scaled):
    results = []
    for backend in ("triton", "eager"):
        generator = torch.Generator().manual_seed(0)
        lists = [[torch.randn(n, generator=generator).abs() for n in (5, 3000)] for _ in range(4)]
        copies, step = [torch.zeros(5).half(), None], torch.tensor(2)
        loss_scale = kernels.new_loss_scale(first=4.0) if scaled else None
        for _ in range(2):
            kernels.adam_step(*lists, step, lr=1e-2, copies=copies, loss_scale=loss_scale, backend=backend)
        lists[1][1][-1] = float("nan") if scaled else 0.0
        kernels.adam_step(*lists, step, lr=1e-2, copies=copies, loss_scale=loss_scale, backend=backend)
        results.append([*lists[0], *lists[2], *lists[3], copies[0], step, *([loss_scale] if scaled else [])])
    assert results[0][7] == (4 if scaled else 5)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gather_of_two_batches():
    results = []
    for backend in ("triton", "eager"):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, 256, (7, 6, 5, 3), generator=generator, dtype=torch.uint8)
        order, cursor = torch.randperm(7, generator=generator), torch.tensor(0)
        flip = torch.tensor([0, 1, 1, 0, 0, 1, 0], dtype=torch.uint8)
        batches = [
            kernels.gather_images(rows, order, cursor, 4, flip=flip, channels=4, dtype=torch.float16, backend=backend)
            for _ in range(2)
        ]
        results.append((*batches, cursor))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        assert ours.stride() == theirs.stride()
