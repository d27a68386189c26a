"""The public ops against plain PyTorch, through every way of running them that needs no GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import engine, reference

CASES = {  # N, C, O, size
    "a middle layer": (2, 6, 4, 8),
    "batch 1": (1, 3, 5, 4),
    "odd batch, channels not a multiple of 8": (3, 7, 9, 4),
    "the smallest image": (4, 2, 3, 2),
}
KINDS = ("conv", "conv_transpose")
ACTIVATIONS = ("none", "relu", "leaky_relu")


def inputs(kind, n, c, o, size, dtype=torch.float64, seed=0):
    """x, weight, batch norm's weight and bias, its running mean and variance, its counter."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, size, size, generator=g, dtype=dtype)
    weight = torch.randn(*((o, c) if kind == "conv" else (c, o)), 4, 4, generator=g, dtype=dtype) * 0.3
    gamma, beta = torch.rand(o, generator=g, dtype=dtype) + 0.5, torch.randn(o, generator=g, dtype=dtype)
    return x, weight, gamma, beta, torch.zeros(o, dtype=dtype), torch.ones(o, dtype=dtype), torch.tensor(0)


def plain(kind, x, weight, activation, slope=0.2, norm=None, groups=1):
    """What the ops compute, by PyTorch's functions and its autograd."""
    y = (F.conv2d if kind == "conv" else F.conv_transpose2d)(x, weight, stride=2, padding=1)
    if norm is not None:
        gamma, beta, mean, var = norm
        y = torch.cat([F.batch_norm(part, mean, var, gamma, beta, True) for part in y.chunk(groups)])
    table = {"none": lambda t: t, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, slope), "tanh": torch.tanh}
    return table[activation](y)


def function_act(kind, x, weight, activation, shape=(2, 1), backend="eager"):
    """The autograd Function itself, which `eager` otherwise never enters: by the reference launchers."""
    return engine.Act.apply(x, weight, kind, (*shape, activation, 0.2), backend)


def function_bn_act(kind, x, weight, gamma, beta, running, activation, groups=1, shape=(2, 1), backend="eager"):
    settings, norm = (*shape, activation, 0.2), (groups, 0.1, 1e-5)
    return engine.BatchNormAct.apply(x, weight, gamma, beta, running, kind, settings, norm, backend)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "tanh"])
def test_act_and_its_gradients(kind, case, activation):
    x, weight, *_ = inputs(kind, *CASES[case])
    op = getattr(kernels, f"{kind}_act")
    results = []
    for run in (
        lambda a, b: plain(kind, a, b, activation),
        lambda a, b: op(a, b, activation=activation),
        lambda a, b: function_act(kind, a, b, activation),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = run(a, b)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
        results.append((y.detach(), a.grad, b.grad))
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 2])
def test_bn_act_its_gradients_and_running_statistics(kind, case, activation, groups):
    n, *rest = CASES[case]
    n = 2 * n if n % groups else n
    x, weight, gamma, beta, mean, var, tracked = inputs(kind, n, *rest)
    op = getattr(kernels, f"{kind}_bn_act")
    results = []
    for run in ("plain", "op", "function"):
        tensors = [t.clone().requires_grad_() for t in (x, weight, gamma, beta)]
        running = [mean.clone(), var.clone(), tracked.clone()]
        if run == "plain":
            y = plain(kind, *tensors[:2], activation, norm=(*tensors[2:], *running[:2]), groups=groups)
            running[2] += groups
        elif run == "op":
            y = op(*tensors, *running, activation=activation, groups=groups)
        else:
            y = function_bn_act(kind, *tensors, tuple(running), activation, groups)
        y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape))
        results.append([y.detach(), *(t.grad for t in tensors), *running])
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Passes(TorchDispatchMode):
    """The operations that ran, in `names`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), func.overloadpacket.__name__]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_activation_s_backward_is_one_pass_and_right_at_zero(activation, dtype):
    out = torch.tensor([-0.5, -0.0, 0.0, 0.25, 0.75], dtype=dtype)
    grad = torch.tensor([3.0, -2.0, 1.5, -4.0, 1.0], dtype=dtype)
    with Passes() as passes:
        got = engine.activation_backward(grad, out, activation, 0.2)
    expected = grad.double() * reference.derivative(out.double(), activation, 0.2)
    assert got.dtype == dtype and len(getattr(passes, "names", [])) == (activation != "none")
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_gradcheck_act(kind, activation):
    x, weight, *_ = inputs(kind, 2, 2, 3, 4)
    x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: function_act(kind, a, b, activation), (x, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_bn_act(kind, groups):
    x, weight, gamma, beta, *_ = inputs(kind, 2, 2, 3, 4)
    tensors = tuple(t.requires_grad_() for t in (x, weight, gamma, beta))
    none = (None, None, None)
    assert torch.autograd.gradcheck(
        lambda *t: function_bn_act(kind, *t, none, "leaky_relu", groups), tensors, atol=1e-6
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "size", "shape"), [("conv", 4, (1, 0)), ("conv_transpose", 1, (1, 0)), ("conv", 5, (2, 1))]
)
def test_gradcheck_where_the_library_has_the_convolution(kind, size, shape):
    """A DCGAN's 4×4 ends, and an odd size."""
    x, weight, gamma, beta, *_ = inputs(kind, 3, 2, 3, size)
    tensors = tuple(t.requires_grad_() for t in (x, weight, gamma, beta))
    assert torch.autograd.gradcheck(lambda a, b: function_act(kind, a, b, "tanh", shape), tensors[:2])
    none = (None, None, None)
    assert torch.autograd.gradcheck(
        lambda *t: function_bn_act(kind, *t, none, "leaky_relu", 1, shape), tensors, atol=1e-6
    )  # fmt: skip


def test_only_the_gradients_that_are_wanted_are_computed():
    x, weight, *_ = inputs("conv", 2, 3, 4, 4)
    function_act("conv", x, weight.requires_grad_(), "relu").sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen = weight.detach()
    x.requires_grad_()
    function_act("conv", x, frozen, "relu").sum().backward()
    assert x.grad is not None and frozen.grad is None


def test_a_double_backward_is_a_clear_error():
    x, weight, *_ = inputs("conv", 2, 3, 4, 4)
    x.requires_grad_()
    for y in (function_act("conv", x, weight, "tanh"), bn_act_of(x)):
        with pytest.raises(RuntimeError, match="no double backward: run them with backend='eager'"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def bn_act_of(x):
    _, weight, gamma, beta, *_ = inputs("conv", 2, 3, 4, 4)
    return function_bn_act("conv", x, weight, gamma, beta, (None, None, None), "relu")


# Registration, torch.compile, autocast, layouts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [1, 2])
def test_opcheck(kind, grouped):
    x, weight, gamma, beta, mean, var, tracked = inputs(kind, 2, 3, 4, 4, torch.float32)
    ops = torch.ops.dcgan_kernels
    forward, backward = getattr(ops, f"{kind}_act"), getattr(ops, f"{kind}_act_backward")
    out = forward(x, weight, 2, 1, "relu", 0.2, "eager")
    torch.library.opcheck(forward, (x, weight, 2, 1, "relu", 0.2, "eager"))
    for wanted in ((True, False), (False, True)):
        torch.library.opcheck(backward, (out, x, weight, out, 2, 1, "relu", 0.2, *wanted, "eager"))
    forward, backward = getattr(ops, f"{kind}_bn_act"), getattr(ops, f"{kind}_bn_act_backward")
    settings = (2, 1, "relu", 0.2, grouped, 0.1, 1e-5, "eager")
    for running in ((mean, var, tracked), (None, None, None)):
        torch.library.opcheck(forward, (x, weight, gamma, beta, *running, *settings))
    out, y, state = forward(x, weight, gamma, beta, None, None, None, *settings)
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(backward, (out, x, weight, y, state, 2, 1, "relu", 0.2, *wanted, "eager"))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_breaks(kind):
    """Both the op as users call it, and the Function that the fused backends enter."""
    x, weight, gamma, beta, mean, var, tracked = inputs(kind, 2, 3, 4, 4, torch.float32)
    weight.requires_grad_()
    op = getattr(kernels, f"{kind}_bn_act")
    for run in (
        lambda w: op(x, w, gamma, beta, mean.clone(), var.clone(), tracked.clone()).square().sum(),
        lambda w: function_bn_act(kind, x, w, gamma, beta, (None, None, None), "relu").square().sum(),
        lambda w: function_act(kind, x, w, "tanh").square().sum(),
    ):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        (expected,), (got,) = torch.autograd.grad(run(weight), weight), torch.autograd.grad(compiled(weight), weight)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_casts_the_images_and_keeps_the_gradient_s_type(kind):
    x, weight, gamma, beta, *running = inputs(kind, 2, 8, 8, 8, torch.float32)
    weight.requires_grad_()
    op = getattr(kernels, f"{kind}_bn_act")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(x, weight, gamma, beta, *running)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    exact = op(x, weight, gamma, beta, *running)
    assert (y.float() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_any_layout_gives_the_same_numbers(kind):
    x, weight, *_ = inputs(kind, 2, 6, 4, 8)
    op = getattr(kernels, f"{kind}_act")
    expected = op(x, weight)
    strided = torch.stack([x, -x], dim=-1)[..., 0]
    for other in (x.contiguous(memory_format=torch.channels_last), strided, x.transpose(2, 3).contiguous().mT):
        torch.testing.assert_close(op(other, weight), expected, rtol=1e-12, atol=1e-12)
        got = function_act(kind, other, weight, "leaky_relu" if kind == "conv" else "tanh")
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
