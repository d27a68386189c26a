"""The public ops against plain PyTorch, through every way of running them that needs no GPU."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import engine
from kernels.dispatch import BackendError, layer_key, select, tuned_table, use_backend
from kernels.geometry import Layer

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


# Wrong input


def call(kind="conv", bn=True, **changes):
    x, weight, gamma, beta, mean, var, tracked = inputs(kind, 2, 3, 4, 8, torch.float32)
    arguments = {"x": x, "weight": weight}
    if bn:
        arguments |= {"bn_weight": gamma, "bn_bias": beta, "running_mean": mean, "running_var": var}
        arguments |= {"num_batches_tracked": tracked}
    arguments |= changes
    return getattr(kernels, f"{kind}_bn_act" if bn else f"{kind}_act")(**arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": torch.randn(2, 3, 8)}, "x has shape (2, 3, 8)"),
        ({"x": torch.randn(0, 3, 8, 8)}, "x has shape (0, 3, 8, 8): it must not be empty"),
        ({"x": torch.randn(2, 5, 8, 8)}, "x has 5 channels"),
        ({"x": torch.randn(2, 3, 8, 6)}, "square images"),
        ({"x": torch.zeros(2, 3, 8, 8, dtype=torch.int32)}, "x is torch.int32"),
        ({"x": torch.randn(2, 3, 8, 8, device="meta")}, "weight is on cpu, x on meta"),
        ({"weight": torch.randn(4, 3, 4, 3)}, "square kernels"),
        ({"bn_weight": torch.randn(5)}, "bn_weight is (5,)"),
        ({"running_mean": None}, "running_mean and running_var"),
        ({"running_mean": None, "running_var": None, "training": False}, "running_mean is None"),
        ({"negative_slope": -0.1}, "negative_slope is -0.1"),
        ({"negative_slope": 1.5}, "negative_slope is 1.5"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"groups": 3}, "groups is 3"),
        ({"groups": 0}, "groups is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"padding": -1}, "padding is -1"),
        ({"backend": "metal"}, "backend is 'metal'"),
    ],
)
def test_wrong_input_names_the_argument(changes, said):
    with pytest.raises((ValueError, TypeError)) as error:
        call(**changes)
    assert said in str(error.value)


def test_one_value_a_channel_is_refused_as_batch_norm_refuses_it():
    with pytest.raises(ValueError, match="1 value a channel"):
        call(x=torch.randn(2, 3, 2, 2), groups=2)


# Dispatch


LAYER = Layer("L", "conv", 3, 4, 8, 4, 2, 1, True, "relu")


def test_a_backend_by_name_that_cannot_run_raises_with_the_cause(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, cause in (("triton", "need a CUDA device"), ("cuda", "not built")):
        with pytest.raises(BackendError, match=cause):
            call(backend=backend)
        with use_backend(backend), pytest.raises(BackendError, match=cause):
            call()
    call()


def test_auto_is_eager_on_a_cpu_without_a_warning(recwarn):
    assert select("conv_act", LAYER, torch.device("cpu"), torch.float32) == ("eager", "the tensor is on cpu")
    assert not recwarn.list


class FakeGPU:
    """A GPU as far as dispatch looks."""

    def __init__(self, monkeypatch, tmp_path, table=None):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA Test 1")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
        monkeypatch.setattr("kernels.dispatch.TUNED", tmp_path)
        tuned_table.cache_clear()
        if table is not None:
            (tmp_path / "nvidia-test-1.json").write_text(table)

    def select(self, layer=LAYER, **options):
        return select("conv_act", layer, torch.device("cuda"), torch.bfloat16, **options)


def test_without_a_tuned_table_auto_warns_once_and_strict_raises(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning, match="no tuned table for NVIDIA Test 1") as caught:
        assert [gpu.select().backend for _ in range(3)] == ["eager"] * 3
    assert len(caught) == 1
    with use_backend("auto", strict=True), pytest.raises(BackendError, match="no tuned table"):
        gpu.select()
    assert gpu.select(backend="triton") == ("triton", "asked for by name")


def test_auto_takes_the_tuned_recipe_where_it_can_run(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, tmp_path, json.dumps({"conv_act": {layer_key(LAYER): "triton", "3x4@7": "cuda"}}))
    assert gpu.select() == ("triton", "fastest in the tuned table")
    other = Layer("L", "conv", 3, 4, 7, 4, 2, 1, True, "relu")
    with pytest.warns(RuntimeWarning, match="not built"):
        assert gpu.select(other).backend == "eager"
    with pytest.warns(RuntimeWarning, match="3x4@32 is not in the tuned table"):
        assert gpu.select(Layer("L", "conv", 3, 4, 32, 4, 2, 1, True, "relu")).backend == "eager"


# fuse


def sequential():
    return nn.Sequential(
        *(nn.ConvTranspose2d(5, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)),
        *(nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.1)),
        *(nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.BatchNorm2d(4)),
        *(nn.Conv2d(4, 3, 4, 2, 1, bias=False), nn.Tanh(), nn.Dropout(0.0)),
    )  # fmt: skip


def test_fuse_changes_neither_names_nor_numbers():
    torch.manual_seed(0)
    model, same = sequential(), sequential()
    same.load_state_dict(model.state_dict())
    report = kernels.fuse(model)
    assert report.fused == ("0", "3", "8") and report.left == {"6": "it has a bias"}
    assert list(model.state_dict()) == list(same.state_dict())
    z = torch.randn(3, 5, 1, 1)
    for _ in range(2):
        ours, theirs = model(z), same(z)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        ours.sum().backward(), theirs.sum().backward()
        for a, b in zip(model.parameters(), same.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for a, b in zip(model.buffers(), same.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.eval()(z), same.eval()(z), rtol=1e-5, atol=1e-6)


def test_fuse_says_what_it_leaves_and_why():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.alone = nn.Conv2d(3, 3, 4, 2, 1, bias=False)
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 4, 2, 1, bias=False, groups=3),
                nn.Conv2d(6, 6, 3, 1, 1, bias=False, dilation=2),
                nn.Conv2d(6, 6, 4, 2, 1, bias=False, padding_mode="reflect"),
                nn.Conv2d(6, 6, (4, 2), 2, 1, bias=False),
                nn.Conv2d(6, 6, 4, 2, 1, bias=False),
                nn.BatchNorm2d(6, affine=False),
            )

    report = kernels.fuse(Net())
    assert report.fused == ()
    assert {name: reason.split(" is")[0] for name, reason in report.left.items()} == {
        "alone": "it",
        "body.0": "it has 3 groups",
        "body.1": "its dilation",
        "body.2": "its padding mode",
        "body.3": "its kernel_size differs between the axes",
        "body.4": "its batch norm has no weight and bias",
    }


def test_bn_groups_give_real_and_fake_their_own_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
    real, fake = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8) * 3 + 1
    expected = torch.cat([model(real), model(fake)])
    kernels.fuse(model)
    model.bn_groups = 2
    torch.testing.assert_close(model(torch.cat([real, fake])), expected, rtol=1e-5, atol=1e-6)
    assert model[1].num_batches_tracked == 4
