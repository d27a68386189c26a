"""The timing core and the telemetry: their arithmetic, their honesty about noise and about what cannot be read."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from bench import telemetry
from bench.telemetry import FIELDS, Telemetry, throttle_names
from bench.timing import Timed, interleave, measure_ms, quantile


def test_quantiles_interpolate():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert quantile([7.0], 0.8) == 7.0
    with pytest.raises(ValueError, match="at least one"):
        quantile([], 0.5)


def test_the_ratio_is_of_rounds_not_of_medians():
    """A machine that halves its speed for half of the rounds leaves every round's ratio alone."""
    timed = Timed({"slow": [4.0, 8.0, 4.0, 8.0], "fast": [2.0, 4.0, 2.0, 4.0]})
    ratio = timed.ratio("slow", "fast")
    assert (ratio.median, ratio.p20, ratio.p80, ratio.noisy) == (2.0, 2.0, 2.0, False)
    assert timed.figures("slow") == {"p20_ms": 4.0, "p50_ms": 6.0, "p80_ms": 8.0, "rounds": 4}


def test_halves_that_disagree_are_noise():
    drifted = Timed({"a": [2.0, 2.0, 2.1, 2.1], "b": [1.0] * 4})
    assert drifted.ratio("a", "b").noisy
    steady = Timed({"a": [2.0, 2.0, 2.05, 2.05], "b": [1.0] * 4})
    assert steady.ratio("a", "b").noisy is False
    assert Timed({"a": [2.0] * 3, "b": [1.0] * 3}).ratio("a", "b").noisy is None, "three rounds have no halves"


def test_runs_that_differ_by_more_than_they_may_say_so():
    """Normally distributed ratios: seldom do two quiet runs differ by over 3 %; a steady machine is not noisy."""
    random = torch.Generator().manual_seed(0)

    def run(spread):
        values = (2 * (1 + spread * torch.randn(15, generator=random))).tolist()
        return Timed({"a": values, "b": [1.0] * 15}).ratio("a", "b")

    quiet = dict.fromkeys((0.005, 0.02, 0.05, 0.1), 0)
    for spread in quiet:
        pairs = [(run(spread), run(spread)) for _ in range(400)]
        apart = [(one, other) for one, other in pairs if abs(one.median / other.median - 1) > 0.03]
        assert sum(not (one.noisy or other.noisy) for one, other in apart) <= 4
        quiet[spread] = sum(not one.noisy for one, _ in pairs) / len(pairs)
    assert quiet[0.005] > 0.99 and quiet[0.05] < 0.2 and quiet[0.1] < 0.01


def test_rounds_rotate_and_fast_calls_are_batched():
    order = []
    calls = {name: (lambda name=name: (order.append(name), time.sleep(0.006))) for name in "abc"}
    timed = interleave(calls, rounds=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert timed.rounds == 3 and all(value >= 6.0 for values in timed.samples_ms.values() for value in values)
    assert interleave({"nothing": lambda: None}, rounds=3).calls["nothing"] > 1


def test_seconds_limit_the_rounds_but_not_below_three():
    timed = interleave({"a": lambda: time.sleep(0.02)}, rounds=50, warmup=1, seconds=0.2)
    assert 3 <= timed.rounds <= 10
    assert interleave({"a": lambda: time.sleep(0.02)}, rounds=50, warmup=1, seconds=0.0).rounds == 3


@pytest.mark.parametrize(("calls", "options"), [({}, {}), ({"a": int}, {"rounds": 2}), ({"a": int}, {"warmup": 0})])
def test_wrong_arguments_are_named(calls, options):
    with pytest.raises(ValueError, match=r"empty|rounds="):
        interleave(calls, **options)


def test_a_measurement_is_of_one_call():
    assert 4.0 <= measure_ms(lambda: time.sleep(0.004), 3, "cpu") < 12.0


def test_without_a_gpu_every_field_is_none_and_says_why():
    read = Telemetry("cpu").read()
    assert [read[field] for field in FIELDS] == [None] * len(FIELDS)
    assert "NVML reads NVIDIA GPUs" in read["missing"]["all"]
    joules, why = Telemetry("cpu").joules_per_image(lambda: None, 1)
    assert joules is None and "NVML" in why


class FakeNvml(SimpleNamespace):
    """A driver that answers all but the power, which it forbids."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        flags = {f"nvml{flag}": 1 << bit for bit, flag in enumerate(telemetry.THROTTLE)}
        super().__init__(NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, energy_mj=0, **flags)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, identity):
        assert identity == "GPU-abc"
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1980, 2: 3201}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return 2000

    def nvmlDeviceGetPowerUsage(self, handle):
        raise self.NVMLError("Insufficient Permissions")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 41

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 0b11

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.energy_mj += 5_000
        return self.energy_mj


@pytest.fixture
def gpu(monkeypatch):
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return nvml


def test_what_the_driver_forbids_is_none_with_its_reason_and_the_rest_is_read(gpu):
    read = Telemetry("cuda").read()
    assert (read["sm_clock_mhz"], read["memory_clock_mhz"], read["power_limit_w"]) == (1980, 3201, 700.0)
    assert (read["power_w"], read["missing"]) == (None, {"power_w": "Insufficient Permissions"})
    assert read["throttle"] == ["software power cap", "hardware slowdown"]
    assert throttle_names(gpu, 0) == []


def test_energy_is_divided_by_the_images_that_ran(gpu):
    steps = []
    joules, why = Telemetry("cuda").joules_per_image(lambda: steps.append(time.sleep(0.001)), 4, seconds=0.02)
    assert why is None and joules == pytest.approx(5.0 / (4 * len(steps)))


def test_clocks_are_read_while_work_is_queued(gpu, monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: events.append("wait"))
    monkeypatch.setattr(gpu, "nvmlDeviceGetTemperature", lambda *_: events.append("read") or 41)
    found = Telemetry("cuda").under_load(lambda: events.append("step"), ms=10.0)
    assert found["temperature_c"] == 41 and events == ["step"] * 5 + ["read", "wait"]
    assert Telemetry("cpu").under_load(lambda: events.append("more"), ms=10.0) == {} and "more" not in events
