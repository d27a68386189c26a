"""The fused step over the Triton kernels, interpreted, against the reference step: whole networks, both updates, Adam.

Shows that the launchers fit each other: what one leaves another reads, real and fake through D in one pass, D frozen in
G's step, gradients written where Adam's table finds them, packed weights where the next product does. And counts the
kernels of a step, without running them.
"""

from collections import Counter

import pytest
import torch
from interpreter import only_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from dcgan import sampling
from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import ReferenceStep, adam
from kernels import tuning
from kernels.launchers import launchers

only_interpreted()

from kernels._triton import launch  # noqa: E402

STEPS = 2
ARCHES = {
    "16×16 RGB": Arch(image_size=16, nz=5, ngf=16, ndf=16),
    "28×28 grey": Arch(image_size=28, channels=1, nz=5, ngf=8, ndf=8),
    "32×32 RGBA, unaligned widths": Arch(image_size=32, channels=4, nz=7, ngf=6, ndf=9),
}


def networks(arch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    models = Generator(arch, generator), Discriminator(arch, generator)
    for model in models:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data *= 3  # so that gradients are not all tiny
    return models


def batch(arch, images, data):
    size = arch.image_size
    real = torch.rand(images, arch.channels, size, size, generator=data) * 2 - 1
    return real, torch.randn(images, arch.nz, generator=data)


def steps_of(arch, update, precision="fp32"):
    fused, exact = networks(arch), [model.double() for model in networks(arch)]
    ours = FusedStep(*fused, *map(adam, fused), update, precision, launch=launchers("triton"))
    return fused, exact, ours, ReferenceStep(*exact, *map(adam, exact), update)


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("16×16 RGB", "alternating"),
        ("16×16 RGB", "simultaneous"),
        *(pytest.param(name, "alternating", marks=pytest.mark.long) for name in list(ARCHES)[1:]),
    ],
)
def test_steps_of_the_reference_in_fp32(name, update):
    """Losses, gradients and running statistics; the second step begins with what the first one's Adam packed."""
    arch, data = ARCHES[name], torch.Generator().manual_seed(1)
    fused, exact, ours, reference = steps_of(arch, update)
    kept = []
    reference.optimizer_d.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in exact[1].parameters()))
    for step in range(STEPS):
        real, z = batch(arch, 2, data)
        got, expected = ours(real, z), reference(real.double(), z.double())
        tolerance = 1e-5 if step == 0 else 2e-3  # after Adam's first move, see test_fused_step
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance, equal_nan=True)
        if step == 0:
            pairs = zip([*fused[0].parameters()], [p.grad for p in exact[0].parameters()], strict=True)
            assert_gradients(pairs, 2e-3)  # of G, after D's update
            assert_gradients(zip([*fused[1].parameters()], kept, strict=True), 1e-4)
            for (at, ours_), theirs in zip(fused[1].named_buffers(), exact[1].buffers(), strict=True):
                torch.testing.assert_close(ours_.double(), theirs.double(), rtol=1e-3, atol=1e-4, msg=at)
            tracked = exact[1].main[3].num_batches_tracked
            assert fused[1].main[3].num_batches_tracked == tracked == (3 if update == "alternating" else 2)
    state = ours.optimizer_g.state
    assert all(entry["step"] == STEPS for entry in state.values()) and len(state) == len([*fused[0].parameters()])


def test_batch_norm_in_every_load(monkeypatch):
    """As a table may say; the default is onto the image alone."""
    monkeypatch.setattr(tuning, "deferred", lambda *_: (True, "for the test"))
    test_steps_of_the_reference_in_fp32("16×16 RGB", "alternating")


def assert_gradients(pairs, tolerance):
    for parameter, expected in pairs:
        error = (parameter.grad.double() - expected).norm() / expected.norm()
        assert error <= tolerance, (tuple(parameter.shape), error)


def test_fp16_scales_the_loss_and_skips_what_overflows():
    arch, data = ARCHES["16×16 RGB"], torch.Generator().manual_seed(1)
    fused, _, ours, _ = steps_of(arch, "alternating", "fp16")
    before = [parameter.detach().clone() for model in fused for parameter in model.parameters()]
    ours.loss_scale[0] = 2.0**31  # far beyond fp16
    assert ours(*batch(arch, 3, data)).isfinite().all()
    assert ours.loss_scale[0] == 2.0**30
    after = [parameter for model in fused for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ours.loss_scale[0] = 2.0**10
    assert ours(*batch(arch, 3, data)).isfinite().all()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert ours.loss_scale[0] == 2.0**10 and ours.state_dict()["loss_scale"][1] == 1


class Count(TorchDispatchMode):
    """Names of the operations that would launch a kernel on a GPU: all but views and allocations."""

    FREE = ("view", "permute", "slice", "select", "empty", "new_empty", "detach", "t.", "alias", "_unsafe_view")

    def __init__(self):
        self.names = []
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def nodes(arch, monkeypatch):
    """Kernels of a captured bf16 step by name, Triton's and the library's, counted without running Triton's."""
    models = networks(arch)
    ours = FusedStep(*models, *map(adam, models), precision="bf16", launch=launchers("triton"))
    real, z = batch(arch, 4, torch.Generator())
    z = z.bfloat16()  # as the loop hands it over
    ours.refresh()
    names = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: names.append(self.kernel.fn.__name__))
    room = ours.room(4)
    room.copy_(real)
    ours.run(room, z)  # makes the tickets
    names.clear()
    with Count() as library:
        ours.run(room, z)
    return names, library.names


def test_the_kernels_of_a_step_are_accounted_for(monkeypatch):
    """A captured step is these, the gather and the addition to the metrics' sums."""
    triton, library = nodes(Arch(), monkeypatch)
    assert Counter(triton) == {
        "conv_kernel": 12,  # D1–D4 forward, twice; G5–G2's data gradients
        "conv_transpose_kernel": 9,  # G2–G4 forward, D4–D2's data gradients, twice
        "conv_transpose_image_kernel": 2,  # G5 forward, D1's data gradient
        "wgrad_kernel": 8,
        "sum_shares_kernel": 2,  # a launch for all weight gradients of a network
        "statistics_kernel": 1,  # of G1, which is the library's product
        "apply_kernel": 7,  # not D4's, which the head applies as it reads, nor G4's, which G5 does
        "apply_grad_kernel": 10,
        "head_kernel": 2,
        "head_grad_kernel": 2,
        "adam_kernel": 2,
    }
    assert library == ["mm.default", "_to_copy.default", "_to_copy.default", "mm.out", "add.Tensor", "stack.default"]
    on_gpu = len(library) - 2  # where a product of bfloat16 is float32 without casts
    assert len(triton) + on_gpu + len(("gather", "sums")) == 63


def test_samples_of_the_generator():
    """By one kernel a layer, batch norm by running statistics in its epilogue."""
    generator = networks(ARCHES["16×16 RGB"])[0]
    for norm in (m for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        generator(z)
        sampler = sampling._OnGpu(generator, torch.float32, "fp32")
        sampler.launch = launchers("triton")
        torch.testing.assert_close(sampler.run(z[:3]), generator.eval()(z[:3]), rtol=0, atol=1e-5)
