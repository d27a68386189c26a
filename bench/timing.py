"""Timing of several callables beside each other, so that whatever else the machine does falls on all of them alike.

A round calls each once (fast ones several times, between two clock readings), in an order that rotates from round to
round. What is compared is the ratio within a round; its median over the rounds is the figure, its spread stands beside
it. Where two halves of the rounds disagree, or the spread is so wide that another run might, the machine was too noisy.

On a GPU the clock is a pair of CUDA events around the calls and one wait per measurement, so launches run ahead as they
do in training; on a CPU it is `time.perf_counter`.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from statistics import median

import torch

NOISE = 0.03
"""By which fraction two halves of the rounds, or two runs, may differ: beyond it the machine was too noisy."""

TWO_RUNS = 2 * math.sqrt(2) * 1.2533 / 1.6832
"""Twice the standard deviation between two runs' medians of n rounds is this times (p80 − p20) / √n, of ratios that are
normally distributed: their 20th and 80th percentiles are 1.6832 deviations apart, a median strays by 1.2533 / √n."""

FEWEST_ROUNDS = 3
SHORTEST_MS = 5.0
"""A measurement spans at least this long: shorter ones are dominated by the launch and by the clock's own grain."""

MOST_CALLS = 200


def one_line(error: BaseException) -> str:
    """The error as a row's reason: its first line that says something, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def quantile(values: list[float], q: float) -> float:
    """The `q` quantile (0 to 1) of `values`, interpolated between neighbours.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values is empty: a quantile needs at least one")
    ordered, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one callable is as another: the median of the rounds' ratios, and its spread.

    disagreement: |first half / second half − 1| of the halves' medians; None below four rounds.
    repeats_within: the fraction that another run's median is within, 19 times in 20; from the spread.
    """

    median: float
    p20: float
    p80: float
    disagreement: float | None
    repeats_within: float

    @property
    def noisy(self) -> bool | None:
        """Whether the machine was too noisy to believe the median; None if there were too few rounds to tell."""
        return None if self.disagreement is None else max(self.disagreement, self.repeats_within) > NOISE


@dataclass(frozen=True)
class Timed:
    """What `interleave` measured.

    samples_ms: milliseconds of one call, a value per round, by name.
    calls: how many calls a measurement averaged, by name.
    """

    samples_ms: dict[str, list[float]]
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.samples_ms.values()), []))

    def p50_ms(self, name: str) -> float:
        return quantile(self.samples_ms[name], 0.5)

    def figures(self, name: str) -> dict[str, float]:
        """`p20_ms`, `p50_ms`, `p80_ms` and `rounds` of one callable."""
        values = self.samples_ms[name]
        return {f"p{q}_ms": quantile(values, q / 100) for q in (20, 50, 80)} | {"rounds": len(values)}

    def ratio(self, slow: str, fast: str) -> Ratio:
        """How many times as fast `fast` is as `slow`: above 1 where it takes less time."""
        values = [a / b for a, b in zip(self.samples_ms[slow], self.samples_ms[fast], strict=True)]
        half = len(values) // 2
        disagreement = abs(median(values[:half]) / median(values[half:]) - 1) if half >= 2 else None
        middle, low, high = (quantile(values, q) for q in (0.5, 0.2, 0.8))
        within = TWO_RUNS * (high - low) / (middle * math.sqrt(len(values)))
        return Ratio(middle, low, high, disagreement, within)


def measure_ms(call: Callable[[], object], calls: int, device: torch.device | str) -> float:
    """Milliseconds of one call, averaged over `calls` in a row with one wait at the end."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) * 1e3 / calls


COLD_CALLS = 10
CLOCK_HZ = 2e9
"""About a GPU's clock: `torch.cuda._sleep` counts cycles."""


@cache
def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Twice the second-level cache: writing it leaves nothing else there."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


def cold_ms(call: Callable[[], object], calls: int, device: torch.device | str) -> float:
    """Milliseconds of one call that finds its operands in memory and its launches queued; for a single kernel or op.

    On a GPU: the median of up to `COLD_CALLS` calls, each between two events. Before it the second-level cache is
    written over, and the device waits for as long as the host takes to launch the call, so that neither a cache nor
    the host shows in the time. Not yet run on a GPU. On a CPU: `measure_ms`.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return measure_ms(call, calls, device)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    launch_s = time.perf_counter() - began
    cycles, buffer = int(min(2 * launch_s, 5e-3) * CLOCK_HZ), _flush_buffer(device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(min(calls, COLD_CALLS))]
    for start, end in pairs:
        buffer.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in pairs)


def interleave(
    callables: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
    measure: Callable[[Callable[[], object], int, torch.device | str], float] = measure_ms,
) -> Timed:
    """Time `callables` beside each other.

    Args:
        callables: by name; what they return is ignored.
        rounds: how many rounds at most, at least `FEWEST_ROUNDS`.
        warmup: calls of each before anything counts, at least 1; the last says how many calls a measurement needs.
        device: whose clock to read.
        seconds: fewer rounds where they would take longer, but never fewer than `FEWEST_ROUNDS`.
        measure: `measure_ms`, or `cold_ms` for single kernels.

    Raises:
        ValueError: nothing to time, or too few rounds or warm-up calls.
    """
    if not callables:
        raise ValueError("callables is empty: there is nothing to time")
    if rounds < FEWEST_ROUNDS or warmup < 1:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: accepted are at least {FEWEST_ROUNDS} and at least 1")
    began = time.perf_counter()
    calls, round_s = {}, 0.0
    for name, call in callables.items():
        for _ in range(warmup):
            once_ms = measure(call, 1, device)
        calls[name] = min(max(1, math.ceil(SHORTEST_MS / max(once_ms, 1e-6))), MOST_CALLS)
        round_s += calls[name] * once_ms / 1e3
    if seconds is not None:
        left = seconds - (time.perf_counter() - began)
        rounds = max(FEWEST_ROUNDS, min(rounds, int(left / max(round_s, 1e-9))))
    names = list(callables)
    samples = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(measure(callables[name], calls[name], device))
        if seconds is not None and number + 1 >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
    return Timed(samples, calls)
