"""When the loop launches, captures and replays, with a stand-in for CUDA's graphs that runs on a CPU."""

from contextlib import nullcontext

import pytest
import torch

from dcgan import loop as loops
from dcgan.arch import Arch
from dcgan.average import Average
from dcgan.batches import Batches, Noise
from dcgan.errors import RunError
from dcgan.fused import FusedStep
from dcgan.loop import Loop
from dcgan.model import Discriminator, Generator
from dcgan.stacks import Kept, last_group
from dcgan.step import METRICS, adam
from kernels.launchers import launchers

ARCH = Arch(image_size=16, channels=1, nz=5, ngf=4, ndf=4)


class Graph:
    """A graph whose replay runs what was captured; the host's count of averages is not the device's to move."""

    def __init__(self, loop, n, z):
        self.loop, self.n, self.z, self.replays = loop, n, z, 0

    def replay(self):
        self.replays += 1
        average = self.loop.average
        count, average.count = average.count, max(1, average.count)  # captured after the first update, a plain copy
        self.loop._run(self.n, self.z)
        average.count = count


class Run:
    """Ten pictures in batches of 4: every third one has 2."""

    def __init__(self, monkeypatch, graph=True, strict=False, broken=False):
        weights = torch.Generator().manual_seed(0)
        self.models = [kind(ARCH, weights) for kind in (Generator, Discriminator)]
        self.optimizers = [adam(model) for model in self.models]
        self.update = FusedStep(*self.models, *self.optimizers, launch=launchers("eager"))
        images = torch.randint(0, 256, (10, 16, 16, 1), generator=weights, dtype=torch.uint8).numpy()
        self.average = Average(self.models[0], 0.5)
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64)
        self.said, self.captured = [], []
        parts = (self.update, Batches(images, 4, 0), Noise(ARCH.nz, 0, "cpu"), self.average, self.sums)
        self.loop = Loop(*parts, False, strict, self.said.append)
        if graph:
            monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.loop.stream)
            monkeypatch.setattr(torch.cuda, "stream", nullcontext)
            monkeypatch.setattr(loops.torch.cuda, "graph_pool_handle", object)
            self.loop.graph, self.loop.pool = True, None
            self.loop.stream = type("Stream", (), {"wait_stream": lambda self, other: None})()
            self.loop._capture = self.broken if broken else self.capture

    def capture(self, n, z):
        self.captured.append(Graph(self.loop, n, z))
        return self.captured[-1]

    def broken(self, n, z):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def steps(self, *numbers):
        for step in numbers:
            self.loop(step, 0)
        return self

    def state(self):
        modules = [*self.models, self.average.module]
        return [*(t.clone() for m in modules for t in m.state_dict().values()), self.sums.clone()]


def assert_same(one, other):
    for a, b in zip(one.state(), other.state(), strict=True):
        assert torch.equal(a, b)


def test_the_first_batch_of_a_size_is_launched_the_second_captured(monkeypatch):
    replayed, launched = Run(monkeypatch).steps(*range(9)), Run(monkeypatch, graph=False).steps(*range(9))
    assert [(graph.n, graph.replays) for graph in replayed.captured] == [(4, 5), (2, 2)]
    assert replayed.average.count == launched.average.count == 9
    assert_same(replayed, launched)


def test_a_rollback_to_the_beginning_begins_the_average_anew(monkeypatch):
    runs = [Run(monkeypatch).steps(*range(5)), Run(monkeypatch, graph=False).steps(*range(5))]
    for run in runs:
        run.average.count = 0
        run.steps(0, 1)
        assert run.average.count == 2
    assert_same(*runs)


def test_what_moved_is_captured_anew(monkeypatch):
    runs = [Run(monkeypatch).steps(*range(4)), Run(monkeypatch, graph=False).steps(*range(4))]
    for run in runs:
        for parameter in run.models[0].parameters():
            parameter.data = parameter.data.clone()
        run.steps(4, 5, 6)
    assert [graph.n for graph in runs[0].captured] == [4, 4]
    assert_same(*runs)


def test_a_step_that_cannot_be_captured_is_launched_and_said(monkeypatch):
    broken, launched = Run(monkeypatch, broken=True), Run(monkeypatch, graph=False).steps(*range(6))
    broken.steps(*range(6))
    assert len(broken.said) == 1 and not broken.loop.graph
    assert "a step of 4 images cannot be captured" in broken.said[0]
    assert "(operation not permitted when stream is capturing)" in broken.said[0], "what broke it, not what followed"
    assert_same(broken, launched)


def test_strict_makes_it_an_error(monkeypatch):
    run = Run(monkeypatch, strict=True, broken=True).steps(0)
    with pytest.raises(RunError, match="cannot be captured"):
        run.steps(1)


def test_memory_that_runs_out_in_a_capture_is_that(monkeypatch):
    run = Run(monkeypatch)

    def capture(n, z):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    run.loop._capture = capture
    run.steps(0)
    with pytest.raises(torch.OutOfMemoryError):
        run.steps(1)


def test_the_last_group_of_an_odd_batch_is_aligned():
    """Simultaneous updates read the fake half of the maps; at 7×7 it may begin anywhere."""
    y = torch.arange(2 * 7 * 7 * 9.0).view(2, 7, 7, 9)
    assert y[1:].data_ptr() % 16
    part = last_group(Kept(None, y, None), 1).y
    assert part.data_ptr() % 16 == 0 and torch.equal(part, y[1:])
