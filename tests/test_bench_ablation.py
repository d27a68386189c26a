"""Each part of the fused step turned off alone: the same numbers, by the launches that it says."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench.peers import ladder, without
from bench.peers.ladder import Rung, unavailable
from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import adam
from kernels import reference

ARCH, IMAGES = Arch(image_size=32, nz=6, ngf=6, ndf=6), 4
COUNTED = ("conv", "conv_transpose", "wgrad", "statistics", "merge_statistics", "apply", "activation_grad",
           "merge_sums", "apply_grad", "head", "head_grad")  # fmt: skip


def trained(off: str | None) -> tuple[list[torch.Tensor], Counter]:
    """Two steps in float64 over the launchers' twins: metrics, weights and buffers; and how often each was launched."""
    random, counts = torch.Generator().manual_seed(0), Counter()
    models = [network(ARCH, random).double() for network in (Generator, Discriminator)]

    def counted(name):
        def call(*arguments, **options):
            counts[name] += 1
            return getattr(reference, name)(*arguments, **options)

        return call

    step = FusedStep(*models, *map(adam, models), launch=reference)
    for stack in (step.generator, step.discriminator):
        stack.launch = SimpleNamespace(**vars(reference) | {name: counted(name) for name in COUNTED})
    if off:
        without.OFF[off](step)
    data = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        real = torch.rand(IMAGES, 3, 32, 32, generator=data, dtype=torch.float64) * 2 - 1
        found.append(step(real, torch.randn(IMAGES, ARCH.nz, generator=data, dtype=torch.float64)))
    return found + [value for model in models for value in model.state_dict().values()], counts


# Of two steps of an architecture whose G has three batch norms and whose D has two: launches more than in the whole.
MORE = {
    "statistics": {"statistics": 2 * (2 + 2 * 2)},  # G1 has its own anyway; D twice
    "sums": {"activation_grad": 2 * (3 + 1 + 1), "merge_sums": 2 * (3 + 1 + 1)},  # D's last is the head's
    "merge": {"merge_statistics": 2 * (3 + 2 * 2), "merge_sums": 2 * (3 + 2 * 2)},
    "deferred": {"apply": 2},  # of G's last map
    "batched": {"conv": 2 * 3, "conv_transpose": 2 * 2, "wgrad": 2 * 3, "apply": 2, "apply_grad": 2 * 2,
                "head": 2, "head_grad": 2},
    "frozen": {"wgrad": 2 * 3},
    "dependent": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return trained(None)


@pytest.mark.parametrize("off", without.OFF)
def test_the_same_numbers_by_the_launches_it_says(off, whole):
    (expected, before), (got, after) = whole, trained(off)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    if off == "products":
        assert not any(after[name] for name in ("conv", "conv_transpose", "wgrad"))
        assert after["activation_grad"] == 2 * 5 and after["statistics"] == before["statistics"] + 2 * 6
    else:
        assert after - before == Counter(MORE[off]) and not before - after


def test_rungs_name_what_is_off_and_need_the_launchers():
    rung = Rung("bf16", ours="fused", graph=True, off="merge")
    assert rung.name == "fused+bf16+graph-merge"
    assert "CUDA graph" in unavailable(rung, ARCH, torch.device("cpu"))
    assert "launchers" in unavailable(Rung(ours="fused", off="merge"), ARCH, torch.device("cpu"))
    assert all(not rung.off for rung in ladder.RUNGS)
