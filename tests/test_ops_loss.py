"""`gan_loss` against plain PyTorch, through every way of running it that needs no GPU."""

import pytest
import torch
import torch.nn.functional as F

import kernels
from dcgan.step import bce, probability
from kernels import reference
from kernels.dispatch import BackendError
from kernels.gan_loss import Loss


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def function_loss(logits, real):
    """The autograd Function itself, which `eager` otherwise never enters."""
    return kernels.GanLoss(*Loss.apply(logits, real, "eager"))


LOSSES = pytest.mark.parametrize("loss", [kernels.gan_loss, function_loss], ids=["op", "function"])


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_and_probabilities_are_the_reference_step_s(loss, dtype):
    logits = (noise(10, dtype=torch.float64) * 5).to(dtype)
    got = loss(logits, (True, False))
    parts = logits.chunk(2)
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    torch.testing.assert_close(got.losses, torch.stack([bce(parts[0], True), bce(parts[1], False)]))
    expected = torch.stack([probability(part.to(exact)) for part in parts])
    torch.testing.assert_close(got.probabilities, expected.to(exact))
    assert got.losses.dtype == exact


@LOSSES
def test_the_gradient_is_autograd_s(loss):
    weights = torch.tensor([0.3, -2.0, 1.0])
    results = []
    for run in (loss, lambda logits, real: kernels.GanLoss(torch.stack(
        [F.binary_cross_entropy_with_logits(part, torch.full_like(part, float(is_real)))
         for part, is_real in zip(logits.chunk(3), real, strict=True)]), None)):  # fmt: skip
        logits = (noise(12) * 10).requires_grad_()
        (run(logits, (True, False, True)).losses * weights).sum().backward()
        results.append(logits.grad)
    torch.testing.assert_close(*results)


def test_no_gradient_flows_from_the_probabilities():
    logits = noise(4).requires_grad_()
    assert not kernels.gan_loss(logits, (True,)).probabilities.requires_grad


@LOSSES
def test_far_logits_give_finite_losses_and_exact_gradients(loss):
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    got = loss(logits, (True, False))
    assert got.losses.tolist() == [100, 100]
    got.losses.sum().backward()
    assert logits.grad.tolist() == [-0.5, 0, 0, 0.5]


def test_gradcheck_of_the_loss():
    logits = noise(6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: function_loss(t, (True, False)).losses, logits)


def test_a_double_backward_of_the_loss_is_a_clear_error():
    logits = noise(4).requires_grad_()
    loss = function_loss(logits, (True,)).losses.sum()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_any_layout_of_logits_and_autocast_give_the_same_losses():
    logits = noise(8)
    expected = kernels.gan_loss(logits, (True, False)).losses
    strided = torch.stack([logits, logits], dim=1)[:, 0]
    assert torch.equal(kernels.gan_loss(strided, (True, False)).losses, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernels.gan_loss(logits, (True, False)).losses, expected)


def test_opcheck_of_the_loss():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.library.opcheck(torch.ops.dcgan_kernels.gan_loss.default, (noise(6).to(dtype), [True, False], "eager"))


@LOSSES
def test_the_loss_compiles_without_graph_breaks(loss):
    def run(t):
        got = loss(t, (True, False))
        return got.losses.sum() + got.probabilities.sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (6, 8):  # the second with a size that torch.compile no longer holds constant
        logits = noise(n).requires_grad_()
        (expected,), (got,) = torch.autograd.grad(run(logits), logits), torch.autograd.grad(compiled(logits), logits)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("logits", "real", "said"),
    [
        (noise(4, 1), (True,), "logits has shape (4, 1): expected (N,)"),
        (torch.zeros(0), (True,), "logits has shape (0,): it must not be empty"),
        (torch.zeros(4, dtype=torch.int64), (True,), "logits is torch.int64"),
        (noise(5), (True, False), "real has 2 entries: they must divide the 5 logits"),
        (noise(5), (), "real has 0 entries"),
        (noise(32), (True,) * 32, "real has 32 entries"),
        ([1.0], (True,), "logits is [1.0]: expected a tensor"),
        (noise(4), None, "real is None: expected a bool for each group"),
        (noise(4), 1, "real is 1: expected a bool for each group"),
        (noise(4), True, "real is True: expected a bool for each group"),
        (noise(4), (1, 0), "real is (1, 0)"),
    ],
)
def test_wrong_input_of_the_loss(logits, real, said):
    with pytest.raises((ValueError, TypeError)) as error:
        kernels.gan_loss(logits, real)
    assert said in str(error.value)


def test_a_backend_by_name_that_cannot_run_raises_with_the_cause(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, cause in (("triton", "Triton's kernels need a CUDA device"), ("cuda", "extension")):
        with pytest.raises(BackendError, match=cause):
            kernels.gan_loss(noise(4), (True,), backend=backend)


def test_the_twin_of_the_head_agrees_with_the_loss():
    """`kernels.reference.head` ends in the same loss, over the logits it makes."""
    y, weight = noise(4, 2, 2, 3, dtype=torch.float64), noise(1, 2, 2, 3, dtype=torch.float64, seed=1)
    state = torch.rand(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, dlogits, means = reference.head(y, weight, state, (True, False))
    expected = function_loss(logits.requires_grad_(), (True, False))
    torch.testing.assert_close(means, torch.stack(expected).detach())
    torch.testing.assert_close(dlogits, torch.autograd.grad(expected.losses.sum(), logits)[0])
