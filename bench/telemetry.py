"""What a GPU says of itself while it is measured: clocks, power, temperature, what holds its clocks back, energy.

Through NVML (`pynvml`). Where there is no GPU, no library, or no permission, a field is None and a reason stands beside
it, so that a record never claims a reading that was not made.
"""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

THROTTLE = {
    "ClocksThrottleReasonSwPowerCap": "software power cap",
    "ClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "ClocksThrottleReasonSwThermalSlowdown": "software thermal slowdown",
    "ClocksThrottleReasonHwThermalSlowdown": "hardware thermal slowdown",
    "ClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
    "ClocksThrottleReasonSyncBoost": "sync boost",
    "ClocksThrottleReasonApplicationsClocksSetting": "clocks set by an application",
}
"""NVML's bits that mean something held the clocks back, and what to call them; idle is not among them."""

FIELDS = (
    "sm_clock_mhz",
    "sm_clock_max_mhz",
    "memory_clock_mhz",
    "power_w",
    "power_limit_w",
    "temperature_c",
    "throttle",
)


LOAD_MS, MOST_CALLS = 50.0, 200
"""How much work to queue for a look at the clocks under load; NVML's own power is an average over about a second."""


class Telemetry:
    """Readings of one GPU.

    Args:
        device: a CUDA device; anything else has no readings.

    `why` is None, or the one reason for which there are no readings at all.
    """

    def __init__(self, device: torch.device | str = "cuda"):
        self.device = torch.device(device)
        self.nvml = self.handle = None
        self.why = self._open()

    def _open(self) -> str | None:
        if self.device.type != "cuda":
            return f"the device is {self.device.type}: NVML reads NVIDIA GPUs"
        try:
            import pynvml
        except ImportError:
            return "pynvml is not installed (package nvidia-ml-py)"
        try:
            pynvml.nvmlInit()
            # By identity: NVML's numbers ignore CUDA_VISIBLE_DEVICES.
            identity = str(torch.cuda.get_device_properties(self.device).uuid)
            identity = identity if identity.startswith(("GPU-", "MIG-")) else f"GPU-{identity}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(identity)
        except (pynvml.NVMLError, RuntimeError, AssertionError) as error:
            return f"NVML: {error}"
        self.nvml = pynvml
        return None

    def _ask(self, missing: dict[str, str], field: str, question: Callable[[Any, Any], Any]) -> Any:
        """The answer, or None with the reason put in `missing`."""
        if self.why:
            missing[field] = self.why
            return None
        try:
            return question(self.nvml, self.handle)
        except self.nvml.NVMLError as error:
            missing[field] = str(error)
            return None

    def read(self) -> dict[str, Any]:
        """The `FIELDS` now, and `missing`: why each that is None is so, under `all` where one reason holds for all."""
        if self.why:
            return dict.fromkeys(FIELDS) | {"missing": {"all": self.why}}
        questions = {
            "sm_clock_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM),
            "sm_clock_max_mhz": lambda n, h: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda n, h: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM),
            "power_w": lambda n, h: n.nvmlDeviceGetPowerUsage(h) / 1e3,
            "power_limit_w": lambda n, h: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1e3,
            "temperature_c": lambda n, h: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU),
            "throttle": lambda n, h: throttle_names(n, n.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
        }
        missing: dict[str, str] = {}
        found = {field: self._ask(missing, field, questions[field]) for field in FIELDS}
        return found | {"missing": missing}

    def under_load(self, call: Callable[[], object], ms: float) -> dict[str, Any]:
        """`read` while calls of `ms` milliseconds each are queued, for as long as `LOAD_MS`: the clocks of an idle GPU
        say nothing of its busy ones. Empty where there are no readings at all."""
        if self.why:
            return {}
        for _ in range(min(math.ceil(LOAD_MS / max(ms, 1e-6)), MOST_CALLS)):
            call()
        found = self.read()
        torch.cuda.synchronize(self.device)
        return found

    def energy_j(self) -> tuple[float | None, str | None]:
        """Joules since the driver was loaded; or None and why."""
        missing: dict[str, str] = {}
        joules = self._ask(missing, "energy", lambda n, h: n.nvmlDeviceGetTotalEnergyConsumption(h) / 1e3)
        return joules, missing.get("energy")

    def joules_per_image(
        self, step: Callable[[], object], images: int, seconds: float = 2.0
    ) -> tuple[float | None, str | None]:
        """Energy of one image while `step`, of `images` images, runs alone for `seconds`; or None and why.

        The whole board's, idle power included; NVML updates its counter every tenth of a second or so, so `seconds`
        must span many updates.
        """
        before, why = self.energy_j()
        if before is None:
            return None, why
        torch.cuda.synchronize(self.device)
        before, _ = self.energy_j()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            for _ in range(10):
                step()
            torch.cuda.synchronize(self.device)
            done += 10 * images
        after, why = self.energy_j()
        return (None, why) if after is None else ((after - before) / done, None)

    def close(self) -> None:
        if self.nvml is not None:
            with suppress(self.nvml.NVMLError):
                self.nvml.nvmlShutdown()
            self.nvml, self.why = None, "closed"


def throttle_names(nvml: Any, bits: int) -> list[str]:
    """What NVML's bit mask of throttle reasons means; an empty list where nothing holds the clocks back."""
    return [name for flag, name in THROTTLE.items() if bits & getattr(nvml, f"nvml{flag}")]
