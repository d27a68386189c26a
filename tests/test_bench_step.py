"""The benchmark rows: right ones carry their figures, a wrong one fails before it is timed."""

from types import SimpleNamespace

import pytest
import torch

from bench import bench_ops, bench_step, ceilings, ops, timing
from bench.bench_step import measure, several
from bench.peers import ladder
from bench.peers.ladder import Rung
from bench.subjects import layers
from dcgan.arch import Arch

ARCH, CPU, IMAGES = Arch(image_size=16, nz=8, ngf=8, ndf=8), torch.device("cpu"), 4
FUSED = Rung(ours="fused")


class Fixture(SimpleNamespace):
    """pytest-benchmark's fixture as far as a row uses it; `times_s` are the rounds'."""

    def __init__(self, times_s):
        super().__init__(extra_info={}, times_s=times_s, stats=None, calls=0)

    def pedantic(self, call, rounds, warmup_rounds):
        call()
        self.calls += 1
        if self.times_s:
            self.stats = SimpleNamespace(stats=SimpleNamespace(data=self.times_s))


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    for module in (bench_ops, bench_step):
        monkeypatch.setattr(module, "measured", lambda device: ceilings.Measured({"fp32": 1.0, "bf16": 2.0}, 1.0))


def test_a_row_has_quantiles_images_a_second_and_its_part_of_the_floor():
    fixture = Fixture([0.1, 0.3, 0.2])
    measure(fixture, FUSED, ARCH, IMAGES, CPU)
    info = fixture.extra_info
    assert (info["rung"], info["batch"], info["device"]) == ("fused", IMAGES, "cpu")
    assert info["p50_ms"] == pytest.approx(200) and info["images_per_s"] == pytest.approx(20)
    assert info["p20_ms"] == pytest.approx(1e3 * timing.quantile([0.1, 0.2, 0.3], 0.2))
    assert 0 < info["roofline"] < 1e-2
    work = bench_step.floor(list(bench_step.step_kernels(ARCH, IMAGES)))
    assert info["tflops"] == pytest.approx(work.gflop / 200) and info["gbps"] == pytest.approx(work.mbytes / 200)
    assert "sm_clock_mhz" not in info, "a CPU has no NVML"


def test_a_row_has_the_clocks_under_load(monkeypatch):
    loads = []

    def under_load(step, ms):
        loads.append(ms)
        return {"sm_clock_mhz": 1980, "throttle": ["heat"]}

    card = SimpleNamespace(under_load=under_load, joules_per_image=lambda *_, **__: (0.25, None))
    monkeypatch.setattr(bench_step, "telemetry", lambda device: card)
    fixture = Fixture([0.1] * 3)
    measure(fixture, FUSED, ARCH, IMAGES, CPU)
    info = fixture.extra_info
    assert (info["sm_clock_mhz"], info["throttle"], info["joules_per_image"]) == (1980, ["heat"], 0.25)
    assert loads == [pytest.approx(100)]


def test_a_disabled_benchmark_runs_once_untimed():
    fixture = Fixture([])
    measure(fixture, FUSED, ARCH, IMAGES, CPU)
    assert fixture.calls == 1 and "p50_ms" not in fixture.extra_info


def test_a_wrong_row_fails_before_it_is_timed(monkeypatch):
    build = ladder.build

    def sabotaged(*arguments):
        runner = build(*arguments)
        runner.optimizers[1].param_groups[0]["lr"] = 0.0
        return runner

    monkeypatch.setattr(ladder, "build", sabotaged)
    fixture = Fixture([0.1])
    with pytest.raises(AssertionError, match="wrong against the reference step"):
        measure(fixture, FUSED, ARCH, IMAGES, CPU)
    assert fixture.calls == 0


def test_a_round_is_its_steps():
    ran = []
    several(lambda: ran.append(1), 3, CPU)()
    assert len(ran) == 3


def test_rows_are_few_on_a_cpu_and_all_can_run():
    if bench_step.DEVICE.type == "cpu" and not bench_step.FULL:
        rungs = {row.values[0].name for row in bench_step.ROWS}
        assert rungs == {"example", "example+bf16+channels_last+frozen", "fused", "fused+bf16"}
        assert len(bench_step.ROWS) == 7 and len(bench_ops.rows()) < 30


def test_the_whole_grid_is_asked_for_by_the_environment(monkeypatch):
    few = set(bench_step.points())
    monkeypatch.setattr(bench_step, "FULL", True)
    every = list(bench_step.points())
    assert {images for _, arch, images in every if arch == bench_step.BASE} >= {32, 4096}
    assert {arch.image_size for _, arch, _ in every} == {32, 64, 128, 256}
    assert {arch.ngf for _, arch, _ in every} == {32, 64, 128, 256} and len(few) < len(every)
    assert bench_step.row_id(FUSED, Arch(image_size=256), 8) == "fused-256px-f64-b8"


# Single ops


def op_row(direction="forward"):
    return next(op for op in layers.step_ops(ARCH, 2, "fp32") if op.direction == direction and op.layer.batch_norm)


def test_an_op_s_row_has_its_error_its_rates_and_its_part_of_the_floor():
    fixture, work = Fixture([0.1] * 3), op_row()
    bench_ops.measure(fixture, work, "eager", CPU)
    info = fixture.extra_info
    assert (info["recipe"], info["precision"], info["batch"]) == ("eager", "fp32", 2)
    assert info["error_over_allowed"] <= 1 and 0 < info["p20_ms"] <= info["p50_ms"]
    assert info["tflops"] == pytest.approx(sum(k.flops for k in work.work()) / info["p50_ms"] / 1e9)
    assert info["roofline"] == pytest.approx(info["floor_ms"] / info["p50_ms"])


def test_a_wrong_op_fails_before_it_is_timed(monkeypatch):
    fixture, work = Fixture([0.1]), op_row("backward")
    right = layers.fused
    monkeypatch.setattr(layers, "fused", lambda op, recipe, x, *rest: right(op, recipe, x.flip(0), *rest))
    bench_ops.built.cache_clear()
    with pytest.raises(AssertionError, match="error over what is allowed"):
        bench_ops.measure(fixture, work, "eager", CPU)
    bench_ops.built.cache_clear()
    assert fixture.calls == 0


def test_what_is_timed_in_turn_is_what_was_right(monkeypatch):
    """A recipe that is wrong has no times, the others have, and each stands beside the library's."""
    work = next(w for w in ops.plan(ARCH, CPU, (2,)) if isinstance(w, ops.Problem))

    def build(work, device):
        subject = original(work, device)
        subject.runs["triton"] = lambda: {name: t * 1.01 for name, t in subject.runs["library"]().items()}
        subject.timed["triton"] = subject.timed["cuda"] = subject.call("library")
        subject.runs["cuda"] = subject.runs["library"]
        return subject

    original = ops.build
    monkeypatch.setattr(ops, "build", build)
    monkeypatch.setattr(ops.Problem, "recipes", lambda self, device: ["library", "triton", "cuda"])
    rows = {row.figures["recipe"]: row for row in ops.measure(work, CPU, None, seconds=0.1)}
    assert rows["triton"].ok is False and "p50_ms" not in rows["triton"].figures
    assert rows["cuda"].figures["over_library"] > 0 and rows["cuda"].figures["ours"] == "cuda"
    assert rows["library"].figures["floor_ms"] is None and "over_library" not in rows["library"].figures
