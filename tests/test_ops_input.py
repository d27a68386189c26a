"""Wrong input of the convolution ops, and backends that cannot run: an error that names argument and reason."""

from fractions import Fraction

import numpy as np
import pytest
import torch

import kernels
from kernels.dispatch import BackendError, select, use_backend
from kernels.geometry import Layer


def call(kind="conv", bn=True, **changes):
    arguments = {"x": torch.randn(2, 3, 8, 8), "weight": torch.randn(*((4, 3) if kind == "conv" else (3, 4)), 4, 4)}
    if bn:
        arguments |= {"bn_weight": torch.rand(4), "bn_bias": torch.randn(4)}
        arguments |= {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
        arguments |= {"num_batches_tracked": torch.tensor(0)}
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
        ({"weight": torch.randn(4, 3, 4)}, "weight has shape (4, 3, 4)"),
        ({"weight": torch.ones(4, 3, 4, 4, dtype=torch.int64)}, "weight is torch.int64"),
        ({"weight": torch.randn(4, 3, 9, 9), "padding": 0}, "smaller than the kernel of 9"),
        ({"weight": torch.randn(0, 3, 4, 4)}, "weight has shape (0, 3, 4, 4): it must not be empty"),
        ({"bn_weight": torch.randn(5)}, "bn_weight is (5,)"),
        ({"bn_bias": torch.randn(4, device="meta")}, "bn_bias is (4,) on meta: expected (4,) on cpu"),
        ({"bn_bias": torch.randn(4).half()}, "bn_bias is torch.float16, bn_weight torch.float32"),
        ({"running_var": torch.ones(4, dtype=torch.int64)}, "running_var is torch.int64"),
        ({"x": torch.randn(2, 3, 8, 8).double()}, "bn_weight is torch.float32: with an x of torch.float64"),
        (
            {name: torch.ones(4).half() for name in ("bn_weight", "bn_bias", "running_mean", "running_var")},
            "bn_weight is torch.float16: with an x of torch.float32 expected torch.float32",
        ),
        ({"num_batches_tracked": torch.zeros(())}, "num_batches_tracked is torch.float32"),
        ({"num_batches_tracked": torch.zeros(1, dtype=torch.int64)}, "num_batches_tracked is torch.int64 (1,)"),
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
        ({"x": [1]}, "x is [1]: expected a tensor"),
        ({"weight": None}, "weight is None: expected a tensor"),
        ({"bn_bias": 0.0}, "bn_bias is 0.0: expected a tensor"),
        ({"running_var": 1}, "running_var is 1: expected a tensor"),
        ({"num_batches_tracked": 0}, "num_batches_tracked is 0: expected a tensor"),
        ({"stride": (2, 2)}, "stride is (2, 2): expected a whole number"),
        ({"stride": None}, "stride is None: expected a whole number"),
        ({"padding": "same"}, "padding is 'same': expected a whole number"),
        ({"padding": 1.0}, "padding is 1.0: expected a whole number"),
        ({"groups": 2.0}, "groups is 2.0: expected a whole number"),
        ({"negative_slope": "0.2"}, "negative_slope is '0.2': expected a number"),
        ({"negative_slope": float("nan")}, "negative_slope is nan"),
        ({"momentum": None}, "momentum is None: expected a number"),
        ({"eps": "1e-5"}, "eps is '1e-5': expected a number"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"momentum": float("inf")}, "momentum is inf"),
        ({"momentum": Fraction(1, 10)}, "momentum is Fraction(1, 10): expected a number"),
        ({"training": "no"}, "training is 'no': expected True or False"),
        ({"stride": True}, "stride is True: expected a whole number"),
        ({"groups": True}, "groups is True: expected a whole number"),
        ({"activation": ["relu"]}, "activation is ['relu']"),
    ],
)
def test_wrong_input_names_the_argument(changes, said):
    with pytest.raises((ValueError, TypeError)) as error:
        call(**changes)
    assert said in str(error.value)


def test_one_value_a_channel_is_refused_as_batch_norm_refuses_it():
    with pytest.raises(ValueError, match="1 value per channel"):
        call(x=torch.randn(2, 3, 2, 2), groups=2)


def test_numpy_s_numbers_are_numbers():
    call(stride=np.int64(2), padding=np.int32(1), groups=np.int64(2), negative_slope=np.float32(0.2))


@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
def test_symbols_of_torch_compile_are_numbers(kind):
    """Sizes, and numbers that the caller gives."""

    weight = torch.rand(*((4, 3) if kind == "conv" else (3, 4)), 4, 4)

    def run(x, stride, padding, groups, slope):
        ones = torch.ones(4)
        options = {"stride": stride, "padding": padding, "negative_slope": slope}
        y = getattr(kernels, f"{kind}_bn_act")(x, weight, ones, ones, groups=groups, activation="leaky_relu", **options)
        return y.sum() + getattr(kernels, f"{kind}_act")(x, weight, **options).sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, size, *numbers in ((4, 8, 2, 1, 2, 0.2), (6, 10, 3, 2, 3, 0.3)):
        x = torch.randn(n, 3, size, size)
        torch.testing.assert_close(compiled(x, *numbers), run(x, *numbers), rtol=1e-4, atol=1e-4)


LAYER = Layer("L", "conv", 3, 4, 8, 4, 2, 1, True, "relu")


def test_a_backend_by_name_that_cannot_run_raises_with_the_cause(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, cause in (("triton", "need a CUDA device"), ("cuda", "by cuda: the extension")):
        with pytest.raises(BackendError, match=cause):
            call(backend=backend)
        with use_backend(backend), pytest.raises(BackendError, match=cause):
            call()
    call()


def test_auto_is_eager_on_a_cpu_without_a_warning(recwarn):
    assert select("conv_act", LAYER, torch.device("cpu"), torch.float32) == ("eager", "the tensor is on cpu")
    assert not recwarn.list


@pytest.mark.parametrize("wants", ["x", "weight", "bn_bias"])
def test_evaluation_with_a_gradient_is_refused_by_name_and_not_run_eagerly_in_silence(wants, monkeypatch):
    monkeypatch.setattr("kernels.dispatch.why_not", lambda *_: None)
    shape = {"x": (2, 3, 8, 8), "weight": (4, 3, 4, 4), "bn_bias": (4,)}[wants]
    changes = {wants: torch.randn(shape, requires_grad=True), "training": False}
    for strict in (False, True):
        with use_backend("triton", strict=strict), pytest.raises(BackendError, match="training=False has no backward"):
            call(**changes)
    assert call(**changes).requires_grad
