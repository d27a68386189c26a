"""The captured step on a GPU: the same numbers as the same launches one by one, and nothing between them."""

import pytest
import torch

from dcgan.arch import Arch
from dcgan.average import Average
from dcgan.batches import Batches, Noise
from dcgan.fused import FusedStep
from dcgan.loop import Loop
from dcgan.model import Discriminator, Generator
from dcgan.step import METRICS, ReferenceStep, adam
from kernels import dependent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ARCH = Arch(image_size=32, nz=16, ngf=32, ndf=32)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


class Run:
    """A small run: 22 pictures in batches of 8, so that every third one has 6."""

    def __init__(self, graph, precision="bf16", kind=FusedStep, arch=ARCH, batch=8, pictures=22, seed=0):
        device, weights = torch.device("cuda"), torch.Generator().manual_seed(seed)
        self.models = [kind_(arch, weights).to(device) for kind_ in (Generator, Discriminator)]
        self.optimizers = [adam(m, fused=True, capturable=True) for m in self.models]
        self.update = kind(*self.models, *self.optimizers, precision=precision)
        size = arch.image_size
        images = torch.randint(0, 256, (pictures, size, size, 3), generator=weights, dtype=torch.uint8).numpy()
        self.batches = Batches(images, batch, seed, flip=True, device=device, channels_last=True)
        self.average, self.noise = Average(self.models[0], 0.9), Noise(arch.nz, seed, device)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        self.said = []
        parts = (self.update, self.batches, self.noise, self.average, self.sums)
        self.loop = Loop(*parts, graph, False, self.said.append)

    def steps(self, first, last):
        for step in range(first, last):
            self.loop(step, 0)
        torch.cuda.synchronize()
        return self

    def state(self):
        """Weights, statistics, moments, average and metrics."""
        modules = [*self.models, self.average.module]
        tensors = [t for m in modules for t in m.state_dict().values()]
        tensors += [t for o in self.optimizers for entry in o.state.values() for t in entry.values()]
        return [*tensors, self.sums]


def assert_same(one, other):
    for a, b in zip(one.state(), other.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_replayed_steps_are_the_launched_ones_bit_for_bit(precision):
    captured, launched = Run(True, precision).steps(0, 12), Run(False, precision).steps(0, 12)
    assert sorted(captured.loop.graphs) == [6, 8] and None not in captured.loop.graphs.values() and not captured.said
    assert_same(captured, launched)


@pytest.mark.skipif(not torch.cuda.is_available() or not dependent.able(torch.device("cuda")), reason="needs sm_90")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("graph", [True, False], ids=["captured", "launched"])
def test_kernels_that_begin_early_compute_the_same_bits(precision, graph):
    """Many steps, as a wait that is missing would not show in each."""
    early, plain = Run(graph, precision), Run(False, precision)
    early.update.dependent, plain.update.dependent = True, False
    assert_same(early.steps(0, 60), plain.steps(0, 60))
    assert not early.said


def test_the_reference_step_can_be_captured_too():
    torch.backends.cudnn.deterministic = True
    try:
        captured, launched = (Run(graph, "fp32", ReferenceStep).steps(0, 9) for graph in (True, False))
        for a, b in zip(captured.state(), launched.state(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    finally:
        torch.backends.cudnn.deterministic = False


def test_weights_loaded_after_capture_are_taken_over():
    one, other = Run(True).steps(0, 7), Run(False).steps(0, 7)
    for run in (one, other):
        fresh = Generator(ARCH, torch.Generator().manual_seed(5)).state_dict()
        run.models[0].load_state_dict(fresh)
        run.optimizers[1].load_state_dict(run.optimizers[1].state_dict())
        run.steps(7, 12)
    assert_same(one, other)


def test_parameters_that_moved_are_captured_anew():
    one, other = Run(True).steps(0, 7), Run(False).steps(0, 7)
    for run in (one, other):
        for parameter in run.models[1].parameters():
            parameter.data = parameter.data.clone()
        run.steps(7, 14)
    assert_same(one, other)


def test_a_replay_is_kernels_alone():
    """No synchronisation, no copy from or to the host, no allocation: from a trace of replays."""
    run = Run(True).steps(0, 7)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity)) as profile:
        for _ in range(3):
            run.loop.graphs[8].replay()
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    names = [event.name for event in profile.events()]
    assert sum("GraphLaunch" in name for name in names) == 3
    assert sum("Synchronize" in name for name in names) <= 2  # ours, and the profiler's own at its end
    assert not [name for name in names if "HtoD" in name or "DtoH" in name]


@pytest.mark.parametrize("update", ["alternating", "simultaneous"])
def test_fifty_steps_beside_the_reference_in_fp32(update):
    """Free-running, from the same weights and batches: losses stay together, weights within Adam's reach."""
    torch.backends.cudnn.allow_tf32 = False
    ours, reference = Run(True, "fp32"), Run(False, "fp32", ReferenceStep)
    for run in (ours, reference):
        run.update.update = update
    ours.steps(0, 50), reference.steps(0, 50)
    assert ours.sums.isfinite()[:2].all()
    torch.testing.assert_close(ours.sums[:2] / 50, reference.sums[:2] / 50, rtol=0.02, atol=0.02)


def test_a_step_beside_float64():
    """One bf16 step of dcgan64: losses and gradients within twice the error of the reference under autocast."""
    arch, device = Arch(), torch.device("cuda")
    errors = {}
    data = torch.Generator(device).manual_seed(1)
    real = torch.rand(64, 3, 64, 64, generator=data, device=device) * 2 - 1
    z = torch.randn(64, arch.nz, generator=data, device=device)
    kinds = {"exact": ReferenceStep, "reference": ReferenceStep, "fused": FusedStep}
    found = {}
    for name, kind in kinds.items():
        weights, dtype = torch.Generator().manual_seed(0), torch.float64 if name == "exact" else torch.float32
        models = [kind_(arch, weights).to(device, dtype) for kind_ in (Generator, Discriminator)]
        optimizers = [adam(m, fused=True) for m in models]
        step = kind(*models, *optimizers, precision="fp32" if name == "exact" else "bf16")
        losses = step(real.to(dtype), z.to(dtype))[:2].double()
        found[name] = losses, torch.cat([p.grad.double().flatten() for p in models[0].parameters()])
    losses, gradient = found.pop("exact")
    for name, (got, theirs) in found.items():
        errors[name] = (got - losses).abs().max(), (theirs - gradient).norm() / gradient.norm()
    assert errors["fused"][0] <= 2 * errors["reference"][0] + 2**-7
    assert errors["fused"][1] <= 2 * errors["reference"][1]
