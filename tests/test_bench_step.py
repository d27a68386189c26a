"""The benchmark rows: right ones carry their figures, a wrong one fails before it is timed."""

from types import SimpleNamespace

import pytest
import torch

from bench import bench_step, ceilings, timing
from bench.bench_step import measure, several
from bench.peers import ladder
from bench.peers.ladder import Rung
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
    monkeypatch.setattr(bench_step, "measured", lambda device: ceilings.Measured({"fp32": 1.0, "bf16": 2.0}, 1.0))


def test_a_row_has_quantiles_images_a_second_and_its_part_of_the_floor():
    fixture = Fixture([0.1, 0.3, 0.2])
    measure(fixture, FUSED, ARCH, IMAGES, CPU)
    info = fixture.extra_info
    assert (info["rung"], info["batch"], info["device"]) == ("fused", IMAGES, "cpu")
    assert info["p50_ms"] == pytest.approx(200) and info["images_per_s"] == pytest.approx(20)
    assert info["p20_ms"] == pytest.approx(1e3 * timing.quantile([0.1, 0.2, 0.3], 0.2))
    assert 0 < info["roofline"] < 1e-2


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
    if bench_step.DEVICE.type == "cpu":
        rungs = {row.values[0].name for row in bench_step.ROWS}
        assert rungs == {"example", "example+bf16+channels_last+frozen", "fused", "fused+bf16"}
