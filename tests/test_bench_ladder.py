"""Every rung trains as the reference does, and one that does not is found out before it is timed."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from bench import verify
from bench.peers import ladder
from bench.peers.ladder import RUNGS, DeviceStep, Graphed, Rung, Runner, build, unavailable, weights
from bench.subjects.accuracy import arithmetic
from bench.verify import differences, oracle, verdict
from dcgan.arch import Arch
from kernels.cpu import elementwise

ARCH, IMAGES, CPU = Arch(image_size=16, nz=8, ngf=8, ndf=8), 6, torch.device("cpu")
EAGER = [rung for rung in RUNGS if not (rung.graph or rung.compile)]


@pytest.fixture(scope="module")
def expected():
    return oracle(ARCH, IMAGES, CPU)


def test_names_are_distinct_and_say_what_a_rung_adds():
    names = [rung.name for rung in RUNGS]
    assert len(set(names)) == len(names) and names[0] == "example"
    best = Rung("bf16", channels_last=True, compile="max-autotune", frozen=True, graph=True)
    assert best in RUNGS and best.name == "example+bf16+channels_last+max-autotune+frozen+graph"


@pytest.mark.parametrize("rung", EAGER, ids=lambda rung: rung.name)
def test_trains_as_the_reference(rung, expected):
    found = differences(build(rung, ARCH, expected.start, CPU, IMAGES), expected)
    assert verdict(found, rung.precision) is None
    if rung.precision == "fp32":
        assert found["gradient"] < 1e-4 and found["first"] < 1e-5, "fp32 rungs compute the very same step"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rung", [rung for rung in RUNGS if not rung.compile], ids=lambda rung: rung.name)
def test_trains_as_the_reference_on_a_gpu(rung):
    device = torch.device("cuda")
    expected = oracle(ARCH, IMAGES, device)
    found = differences(build(rung, ARCH, expected.start, device, IMAGES), expected)
    assert verdict(found, verify.tolerance_class(rung.precision, device)) is None


def broken_by(monkeypatch, what: str) -> Rung:
    if what == "one optimiser too eager":
        monkeypatch.setattr(ladder, "adam", lambda model, **_: torch.optim.Adam(model.parameters(), lr=2e-3))
        return Rung("bf16", ours="reference")
    if what == "real and fake share statistics":
        apart = elementwise.batch_norm_act
        shared = lambda z, n, s, groups, *rest: apart(z, n, s, 1, *rest) * groups  # noqa: E731
        monkeypatch.setattr(elementwise, "batch_norm_act", shared)
        return Rung("bf16", ours="fused")
    if what == "D is never updated":
        step = DeviceStep.__call__
        monkeypatch.setattr(DeviceStep, "__call__", lambda self, *batch: (stop(self.adam_d), step(self, *batch))[1])
        return Rung("bf16", True, frozen=True)
    raise AssertionError(what)


def stop(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.0


@pytest.mark.parametrize("what", ["one optimiser too eager", "real and fake share statistics", "D is never updated"])
def test_a_planted_bug_fails_even_in_bf16(monkeypatch, expected, what):
    rung = broken_by(monkeypatch, what)
    why = verdict(differences(build(rung, ARCH, expected.start, CPU, IMAGES), expected), "bf16")
    assert why and "wrong against the reference step" in why


def test_nan_is_wrong():
    found = dict.fromkeys(["first", "gradient", "metrics", "update", "statistics", "counts"], float("nan"))
    assert "counts nan > 0" in verdict(found, "bf16")
    assert verdict(dict.fromkeys(found, 0.0), "fp32") is None


def test_what_cannot_run_here_says_why():
    assert "needs a GPU" in unavailable(Rung(graph=True), ARCH, CPU)
    assert "7×7" in unavailable(Rung(), Arch(image_size=28, channels=1), CPU)
    assert unavailable(Rung(ours="fused"), Arch(image_size=28, channels=1), CPU) is None


def test_frozen_leaves_d_without_gradients_from_gs_step(expected):
    runner = build(Rung(channels_last=True, frozen=True), ARCH, expected.start, CPU, IMAGES)
    real, z = expected.data[0]
    before = []
    runner.optimizers[1].register_step_pre_hook(
        lambda *_: before.extend(p.grad.clone() for p in runner.networks[1].parameters())
    )
    runner(runner.rung.images(real), z)
    for parameter, grad in zip(runner.networks[1].parameters(), before, strict=True):
        assert parameter.requires_grad and torch.equal(parameter.grad, grad)


@pytest.fixture
def graphs_that_replay_eagerly(monkeypatch):
    """`torch.cuda` as far as `Graphed` uses it, on a CPU: capture runs the step, as a GPU's warm-up does."""
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=lambda other: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)


@pytest.mark.parametrize("ours", [False, True], ids=["peer", "fused"])
def test_making_a_graph_leaves_the_state_and_replays_take_their_inputs(graphs_that_replay_eagerly, expected, ours):
    eager_rung = Rung(ours="fused") if ours else Rung(channels_last=True, frozen=True)
    runner = build(eager_rung, ARCH, expected.start, CPU, IMAGES)
    real, z = (torch.zeros_like(part) for part in expected.data[0])
    graphed = Graphed(runner.step, runner.networks, runner.optimizers, eager_rung.images(real), z)
    graphed.graph.replay = lambda: graphed.metrics.copy_(runner.step(graphed.real, graphed.z))
    found = differences(Runner(eager_rung, runner.networks, runner.optimizers, graphed), expected)
    assert verdict(found, "fp32") is None and found["update"] < 1e-2, found


def test_weights_are_the_same_every_time():
    for a, b in zip(weights(ARCH), weights(ARCH), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_oracle_leaves_tf32_as_it_was():
    before = torch.backends.cudnn.allow_tf32
    with arithmetic("ieee"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
