"""The reference step is the training step of the literature: it equals two plain re-statements of it.

Training is chaotic in fp32 (two right implementations drift 1e-3 apart in 20 steps), so free running is compared in
fp64, and fp32 step by step from the same state.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import example
from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import METRICS, ReferenceStep, adam

STEPS = 20
ARCHS = {
    "16×16": (Arch(image_size=16, nz=9, ngf=6, ndf=5), (2, 1), (1, 2)),
    "64×64": (Arch(nz=12, ngf=4, ndf=4), (8, 4, 2, 1), (1, 2, 4, 8)),
}


def pair(name: str, seed: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
    """The example's networks with seeded weights, and ours with the same."""
    arch, down, up = ARCHS[name]
    torch.manual_seed(seed)
    g = example.generator(arch.nz, arch.ngf, arch.channels, down).to(dtype)
    d = example.discriminator(arch.ndf, arch.channels, up).to(dtype)
    ours_g, ours_d = Generator(arch).to(dtype), Discriminator(arch).to(dtype)
    ours_g.load_state_dict(g.state_dict())
    ours_d.load_state_dict(d.state_dict())
    return g, d, ours_g, ours_d


def batches(name: str, seed: int, dtype: torch.dtype, images: int = 6):
    arch, generator = ARCHS[name][0], torch.Generator().manual_seed(1000 + seed)
    for _ in range(STEPS):
        real = torch.rand(images, arch.channels, *[arch.image_size] * 2, generator=generator, dtype=dtype) * 2 - 1
        yield real, torch.randn(images, arch.nz, generator=generator, dtype=dtype)


def assert_same_state(ours: nn.Module, theirs: nn.Module, atol: float) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


CASES = [("16×16", 0), ("16×16", 1), ("16×16", 2), ("64×64", 3)]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_alternating_equals_the_example_over_free_steps(name, seed):
    g, d, ours_g, ours_d = pair(name, seed, torch.float64)
    theirs, ours = example.ExampleStep(g, d), ReferenceStep(ours_g, ours_d, adam(ours_g), adam(ours_d))
    for real, z in batches(name, seed, torch.float64):
        expected = torch.tensor(theirs(real, z), dtype=torch.float64)
        got = ours(real, z)
        torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=1e-9)
        torch.testing.assert_close(got[2:], expected[2:], rtol=0, atol=1e-6)  # our probabilities are fp32
    assert_same_state(ours_g, g, 1e-9)
    assert_same_state(ours_d, d, 1e-9)
    assert ours_d.main[3].num_batches_tracked == 3 * STEPS
    assert ours_g.main[1].num_batches_tracked == STEPS


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_alternating_equals_the_example_step_by_step_in_fp32(name, seed):
    g, d, ours_g, ours_d = pair(name, seed, torch.float32)
    theirs, ours = example.ExampleStep(g, d), ReferenceStep(ours_g, ours_d, adam(ours_g), adam(ours_d))
    for real, z in batches(name, seed, torch.float32):
        for mine, other in ((ours_g, g), (ours_d, d)):
            mine.load_state_dict(other.state_dict())
        for mine, other in ((ours.optimizer_g, theirs.adam_g), (ours.optimizer_d, theirs.adam_d)):
            mine.load_state_dict(copy.deepcopy(other.state_dict()))
        torch.testing.assert_close(ours(real, z)[:2], torch.tensor(theirs(real, z))[:2], rtol=0, atol=1e-5)


class PlainSimultaneous:
    """The TensorFlow tutorial's step, each network's gradient by its own `backward` on the example's networks."""

    def __init__(self, g: nn.Module, d: nn.Module):
        self.g, self.d = g, d
        self.adam_g = torch.optim.Adam(g.parameters(), lr=2e-4, betas=(0.5, 0.999))
        self.adam_d = torch.optim.Adam(d.parameters(), lr=2e-4, betas=(0.5, 0.999))

    def __call__(self, real: Tensor, z: Tensor) -> list[float]:
        ones, zeros = torch.ones(len(real)).to(real), torch.zeros(len(real)).to(real)
        on_real = self.d(real).view(-1)
        on_fake = self.d(self.g(z[:, :, None, None])).view(-1)
        loss_g = F.binary_cross_entropy(on_fake, ones)
        loss_d = F.binary_cross_entropy(on_real, ones) + F.binary_cross_entropy(on_fake, zeros)
        for network, loss in ((self.d, loss_d), (self.g, loss_g)):
            self.g.zero_grad()
            self.d.zero_grad()
            loss.backward(retain_graph=True)
            network.kept = [parameter.grad for parameter in network.parameters()]
        for network, optimiser in ((self.d, self.adam_d), (self.g, self.adam_g)):
            for parameter, gradient in zip(network.parameters(), network.kept, strict=True):
                parameter.grad = gradient
            optimiser.step()
        return [loss_d.item(), loss_g.item()]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_simultaneous_equals_a_plain_statement_over_free_steps(name, seed):
    g, d, ours_g, ours_d = pair(name, seed, torch.float64)
    theirs, ours = PlainSimultaneous(g, d), ReferenceStep(ours_g, ours_d, adam(ours_g), adam(ours_d), "simultaneous")
    for real, z in batches(name, seed, torch.float64):
        expected = torch.tensor(theirs(real, z), dtype=torch.float64)
        got = ours(real, z)
        torch.testing.assert_close(got[:2], expected, rtol=0, atol=1e-9)
        assert got[METRICS.index("d_fake_after")].isnan()
    assert_same_state(ours_g, g, 1e-9)
    assert_same_state(ours_d, d, 1e-9)
    assert ours_d.main[3].num_batches_tracked == 2 * STEPS


def test_the_forms_differ():
    """Otherwise the tests above could not tell them apart."""
    results = []
    for update in ("alternating", "simultaneous"):
        _, _, g, d = pair("16×16", 0, torch.float64)
        step = ReferenceStep(g, d, adam(g), adam(d), update)
        for real, z in batches("16×16", 0, torch.float64):
            losses = step(real, z)[:2]
        results.append(losses)
    assert not torch.allclose(*results, rtol=0, atol=1e-3)


def test_a_loss_scale_goes_from_one_kind_of_step_to_the_other():
    """A run that was begun by the kernels may be resumed without them, and the other way round."""
    plain = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    ReferenceStep.load_state_dict(plain, {"loss_scale": torch.tensor([4096.0, 7.0, 0.0])})
    assert plain.scaler.get_scale() == 4096 and plain.scaler._get_growth_tracker() == 7
    fused = SimpleNamespace(loss_scale=torch.zeros(3))
    FusedStep.load_state_dict(fused, plain.scaler.state_dict())
    assert fused.loss_scale.tolist() == [4096, 7, 0]
    ReferenceStep.load_state_dict(SimpleNamespace(scaler=torch.amp.GradScaler("cpu", enabled=False)), {"scale": 1.0})
