"""The sampler: the generator's own images, by other routes."""

import pytest
import torch
from torch import nn

from bench.stages.sampling import trained
from dcgan import sampling
from dcgan.arch import PRESETS, Arch
from dcgan.errors import InputError
from dcgan.sampling import Sampler
from kernels import reference

CPU = torch.device("cpu")
ARCHES = {
    "64×64": Arch(nz=7, ngf=64),  # two layers by Winograd's products
    "16×16 RGBA": Arch(16, 4, 5, 6, 6),
    "28×28 grey": Arch(28, 1, 5, 8, 8),
    "32×32 dense": Arch(32, 3, 5, 8, 8, dense=True),
}


def noise(arch, n, seed=2):
    return torch.randn(n, arch.nz, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=ARCHES)
def generator(request):
    return trained(ARCHES[request.param], CPU)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_its_images_are_the_generators(generator, precision, allowed, monkeypatch):
    """In whole pieces and what is left of one, the second time from buffers that were used."""
    monkeypatch.setitem(sampling.AT_ONCE, "cpu", 4)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    sampler = Sampler(generator, precision)
    for n in (1, 11, 4):
        z = noise(generator.arch, n)
        images = sampler(z)
        with torch.no_grad():
            exact = generator.double()(z.double())
        generator.float()
        assert images.dtype == dtype and images.shape == exact.shape
        assert images.is_contiguous(memory_format=torch.channels_last) and error(images, exact) < allowed
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())


def test_an_image_does_not_depend_on_its_batch_mates(generator):
    sampler, z = Sampler(generator, "fp32"), noise(generator.arch, 70)
    torch.testing.assert_close(sampler(z)[:3], sampler(z[:3]), rtol=0, atol=2e-6)


def test_results_last(generator):
    """On a CPU a call's images are its own."""
    sampler, z = Sampler(generator, "fp32"), noise(generator.arch, 3)
    first = sampler(z)
    kept = first.clone()
    sampler(z + 1)
    assert torch.equal(first, kept)


def test_it_is_of_the_moment_and_of_running_statistics(generator):
    """Whatever the generator's mode, and whatever becomes of it."""
    z = noise(generator.arch, 5)
    with torch.no_grad():
        exact = generator(z)
    sampler, gpu = Sampler(generator.train(), "fp32"), sampling._OnGpu(generator, torch.float32, "fp32")
    gpu.launch, gpu.options = reference, {}
    for module in generator.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 1
    for parameter in generator.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(sampler(z), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(gpu.run(z), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("within", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_is_called_within_anything(generator, within):
    sampler, z = Sampler(generator, "fp32"), noise(generator.arch, 3)
    with within():
        images = sampler(z)
    assert not images.is_inference() and torch.equal(images, sampler(z))


def test_the_launches_of_a_gpu_over_their_twins(generator):
    gpu = sampling._OnGpu(generator, torch.float32, "fp32")
    gpu.launch, gpu.options = reference, {}
    z = noise(generator.arch, 5)
    with torch.no_grad():
        torch.testing.assert_close(gpu.run(z), generator(z), rtol=0, atol=1e-5)


def test_where_no_kernel_runs_the_generator_does(generator):
    z = noise(generator.arch, 5)
    tf32 = torch.backends.cudnn.allow_tf32
    with torch.no_grad():
        exact = generator(z)
        assert torch.equal(sampling._AsItIs(generator, torch.float32, "fp32")(z), exact)
        images = sampling._AsItIs(generator, torch.bfloat16, "bf16")(z)
    assert images.dtype == torch.bfloat16 and error(images, exact.double()) < 0.03
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_graphs_are_kept_by_the_number_of_images_and_not_without_end(generator, monkeypatch):
    gpu = sampling._OnGpu(generator, torch.float32, "fp32")
    captured = []

    class Graph:
        def __init__(self, room, images):
            self.room, self.images = room, images

        def replay(self):
            with torch.no_grad():
                self.images.copy_(generator(self.room))

    def capture(room):
        captured.append(len(room))
        images = torch.empty(len(room), *generator(room).shape[1:])
        return Graph(room, images), room, images

    monkeypatch.setattr(gpu, "capture", capture)
    for n in (3, 3, 2, 1, 5, 3, 6, 3):
        z = noise(generator.arch, n, seed=n)
        with torch.no_grad():
            assert torch.equal(gpu(z), generator(z))
    assert captured == [3, 2, 1, 5, 6, 3]
    monkeypatch.setitem(sampling.AT_ONCE, "cuda", 3)
    z = noise(generator.arch, 8)
    images = gpu(z)
    with torch.no_grad():
        torch.testing.assert_close(images, generator(z), rtol=0, atol=1e-6)
    assert captured[6:] == [2] and images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 7), (3, 8), (3, 7, 1, 1)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"z is .* expected \(N, 7\) on cpu, N at least 1"):
        Sampler(trained(ARCHES["64×64"], CPU), "fp32")(torch.zeros(shape))


def test_a_precision_that_the_device_lacks_is_refused():
    with pytest.raises(InputError, match="tf32 needs a CUDA device"):
        Sampler(trained(PRESETS["mnist28"].arch, CPU), "tf32")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("tf32", 5e-3), ("bf16", 0.03), ("fp16", 5e-3)])
def test_on_a_gpu(precision, allowed):
    generator = trained(Arch(), torch.device("cuda"))
    sampler = Sampler(generator, precision)
    assert sampler.why is None
    for n in (5, 64, 5):
        z = noise(generator.arch, n).cuda()
        with torch.no_grad():
            exact = generator.double()(z.double())
        generator.float()
        assert error(sampler(z), exact) < allowed
