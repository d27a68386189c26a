"""Whether float32 convolutions may use TF32: by PyTorch's flag, or by its newer settings, which forbid to read that."""

import pytest
import torch

import kernels
from bench.subjects.accuracy import arithmetic
from dcgan import sampling
from dcgan.arch import PRESETS
from dcgan.model import Generator
from kernels import dispatch, engine
from kernels.library import Products, switches, tf32

cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
SETTINGS = {
    "the flag alone": (lambda value: setattr(cudnn, "allow_tf32", value == "tf32")),
    "of convolutions": (lambda value: setattr(cudnn.conv, "fp32_precision", value)),
    "of cuDNN": (lambda value: setattr(cudnn, "fp32_precision", value)),
    "of all backends": (lambda value: setattr(torch.backends, "fp32_precision", value)),
}
SET = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def forget():
    torch.backends.fp32_precision = cudnn.fp32_precision = cudnn.conv.fp32_precision = matmul.fp32_precision = "none"
    cudnn.allow_tf32, matmul.allow_tf32 = True, False


@pytest.fixture(autouse=True)
def as_they_were():
    forget()
    yield
    forget()


def inherits(value):
    """Convolutions follow the settings of several backends at once, as they do when nothing else was set."""
    cudnn.conv.fp32_precision = "none"
    return value


@SET
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_it_is_told_and_is_as_before_behind_a_change(setting, value):
    setting(inherits(value))
    assert switches.tf32 == (value == "tf32")
    assert engine.precision("triton") == {"precision": value}
    for allowed in (True, False):
        with tf32(allowed):
            assert (cudnn.conv.fp32_precision == "tf32") == allowed
        assert switches.tf32 == (value == "tf32")
    with pytest.raises(KeyError), tf32(value != "tf32"):
        raise KeyError
    assert switches.tf32 == (value == "tf32")


def test_convolutions_follow_a_later_setting_of_all_backends():
    torch.backends.fp32_precision = inherits("ieee")
    with tf32(True):
        assert switches.tf32
    torch.backends.fp32_precision = "tf32"
    assert switches.tf32


def test_the_flag_can_be_read_within_and_behind_where_only_it_was_used():
    """The compiler reads it, and so does code that knows no other."""
    for allowed in (False, True):
        cudnn.allow_tf32 = not allowed
        with tf32(allowed), tf32(allowed, matmul):
            assert (cudnn.allow_tf32, matmul.allow_tf32) == (allowed, allowed)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (not allowed, False)


@SET
def test_an_op_selects_and_runs(setting, monkeypatch):
    setting(inherits("ieee"))
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)
    assert dispatch.select("gan_loss", None, torch.device("cpu"), torch.float32).backend == "eager"
    assert dispatch.backend_of("gan_loss", None, torch.device("cpu"), torch.float32, "triton", 4) == "triton"
    x, weight = torch.randn(1, 4, 4, 2), torch.randn(3, 4, 4, 2)
    Products(kernels.reference).conv(x, weight, precision="tf32")
    assert not switches.tf32


@SET
def test_a_sampler_and_a_benchmark_run(setting):
    setting(inherits("ieee"))
    generator = Generator(PRESETS["small32"].arch).eval()
    with torch.no_grad():
        sampling._AsItIs(generator, torch.float32, "tf32")(torch.randn(2, generator.arch.nz))
    for precision in ("tf32", "fp32"):
        with arithmetic(precision):
            assert [switches.tf32, matmul.fp32_precision == "tf32"] == [precision == "tf32"] * 2
    assert not switches.tf32 and matmul.fp32_precision != "tf32"


def test_a_compiled_op_selects_again_when_a_setting_changes(monkeypatch):
    """The settings' own getters cannot be traced."""
    seen = []
    monkeypatch.setattr(dispatch, "_choose", lambda *arguments: (seen.append(arguments[7]), ("eager", ""))[1])

    def run(x):
        return x if dispatch.backend_of("gan_loss", None, torch.device("cuda"), x.dtype, None, 4) == "eager" else -x

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for value in ("tf32", "ieee", "ieee"):
        cudnn.conv.fp32_precision = value
        compiled(torch.ones(1))
    assert seen == [True, False]


@pytest.mark.parametrize("backend", [cudnn, matmul], ids=["convolutions", "products"])
@pytest.mark.parametrize("allowed", [True, False])
def test_a_later_setting_of_all_backends_is_followed_again(backend, allowed):
    before = [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision]
    with tf32(allowed, backend):
        pass
    assert [cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision] == before
