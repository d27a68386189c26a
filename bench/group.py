"""Rungs that are verified one by one and then timed beside each other; and the plan and the bench they belong to."""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench import ceilings
from bench.peers import ladder
from bench.peers.ladder import EXAMPLE, Rung, Runner
from bench.roofline import floor, step_kernels
from bench.telemetry import Telemetry
from bench.timing import FEWEST_ROUNDS, Ratio, Timed, interleave, measure_ms, one_line
from bench.verify import Oracle, differences, oracle, tolerance_class, verdict
from dcgan.arch import Arch

Ok = bool | None
"""Of a row: verified and measured; tried, and failed or wrong; or (None) nothing was measured."""

BATCHES_IN_TURN = 4
STEPS_TO_TIME = 1 + FEWEST_ROUNDS
"""The fewest steps that timing a rung takes, its warm-up included."""

LATE = "verifying and timing it takes about {:.0f} s, of which {:.0f} are left"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        arch: whose step.
        device: where.
        peer_batches, step_batches: images per step in the stages `peers` and `step`.
        rounds: of the timing, at most.
        compile: whether to try the rungs that compile.
        energy: whether to measure joules per image, a second each: of the example, of ours and of the fastest peer, and
            in the stage `peers` of the others too while there is time.
        ceiling_sizes: side of the matrices and bytes of the copy, where not the device's own.
        sizes, widths: image sizes and filters at which `step` measures too, beside those of `arch`.
        ablated: images per step at which `step` turns the fused step's parts off, one at a time.
        pictures: of the tutorial's run at the end of `step`; 0 for no such run.
    """

    arch: Arch
    device: torch.device
    peer_batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    rounds: int = 15
    compile: bool = True
    energy: bool = False
    ceiling_sizes: tuple[int, int] | tuple[()] = ()
    sizes: tuple[int, ...] = ()
    widths: tuple[int, ...] = ()
    ablated: tuple[int, ...] = ()
    pictures: int = 0


@dataclass
class Bench:
    """A plan on its way: where rows go, what the stages tell each other, and the summary that grows with them.

    `save` writes that summary out, so that nothing of it is lost when the process is killed.
    """

    plan: Plan
    out: Path
    emit: Callable[..., None]
    telemetry: Telemetry
    measured: ceilings.Measured | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None


@dataclass
class Group:
    """Rungs that are verified one by one and then timed beside each other; of the plan's architecture where no other is
    given, which alone goes to the summary."""

    bench: Bench
    stage: str
    images: int
    name: str
    other: Arch | None = None

    @property
    def arch(self) -> Arch:
        return self.other or self.bench.plan.arch

    def run(self, rungs: Iterable[Rung], seconds: float) -> list[str]:
        """Emit a row per rung; returns the names of ours and of the fastest peer, for a later group to stand beside."""
        try:
            return self.measure(rungs, seconds)
        except Exception as error:  # such as a batch that does not fit: the next one may
            why = one_line(error)
            self.bench.emit(self.stage, f"b{self.images}", False, why, group=self.name, **self.settings())
            return []
        finally:
            self.bench.save()

    def settings(self) -> dict[str, Any]:
        return {"batch": self.images, "image_size": self.arch.image_size, "ngf": self.arch.ngf}

    def measure(self, rungs: Iterable[Rung], seconds: float) -> list[str]:
        began, plan = time.perf_counter(), self.bench.plan
        expected = oracle(self.arch, self.images, plan.device)
        runners, facts, reserved_s = {}, {}, 0.0
        for rung in sorted(rungs, key=urgency):
            left = seconds - (time.perf_counter() - began) - reserved_s
            need = ladder.COMPILE_SECONDS.get(rung.compile, 0.0) + expected.step_s * (
                len(expected.data) + STEPS_TO_TIME
            )
            late = urgency(rung) > 0 and need > left
            runner, fact, why, ok = self.prepare(rung, expected, LATE.format(need, max(left, 0)) if late else None)
            if runner is None:
                self.row(rung, ok, why, fact)
            else:
                runners[rung.name], facts[rung.name] = runner, fact
                reserved_s += fact.pop("step_s") * STEPS_TO_TIME
        if not runners:
            return []
        data = ladder.batches(self.arch, self.images, plan.device, BATCHES_IN_TURN)
        calls = {name: in_turn(runner, data) for name, runner in runners.items()}
        left = max(seconds - (time.perf_counter() - began), 0.0)
        timed = interleave(calls, plan.rounds, 1, plan.device, left)
        peers = [name for name, runner in runners.items() if not runner.rung.ours]
        always = {EXAMPLE, min(peers, key=timed.p50_ms, default=None)}
        for name, runner in runners.items():
            reading = self.bench.telemetry.under_load(calls[name], timed.p50_ms(name))
            values = torch.as_tensor(runner(*prepared(runner, data[0])))
            ok = bool(torch.isfinite(values).all())
            figures = facts[name] | self.figures(runner.rung, timed)
            time_left = self.stage == "peers" and time.perf_counter() - began + 1.0 < seconds
            if plan.energy and not runner.rung.off and (runner.rung.ours == "fused" or name in always or time_left):
                joules, _ = self.bench.telemetry.joules_per_image(calls[name], self.images, seconds=1.0)
                figures["joules_per_image"] = joules
            self.row(runner.rung, ok, None if ok else f"metrics after timing: {values.tolist()}", figures | reading)
        return self.summarise(runners, facts, timed)

    def prepare(self, rung: Rung, expected: Oracle, late: str | None) -> tuple[Runner | None, dict, str | None, Ok]:
        """Build and verify, unless it is too `late`: the runner, or None with the reason and the row's `ok`; and the
        facts found so far, `step_s` among them: the seconds of one step, roughly."""
        plan = self.bench.plan
        why = ladder.unavailable(rung, self.arch, plan.device) or late
        if why:
            return None, {}, why, None
        try:
            with peak_memory(plan.device) as memory:
                runner = ladder.build(rung, self.arch, expected.start, plan.device, self.images)
                found = differences(runner, expected)
                batch = prepared(runner, expected.data[0])
                step_s = measure_ms(lambda: runner(*batch), 1, plan.device) / 1e3
                memory.steady(runner, *batch)
        except Exception as error:  # a rung may fail in any way that PyTorch can; the others go on
            return None, {}, one_line(error), False
        precision = tolerance_class(rung.precision, plan.device)
        facts = {f"difference_{kind}": value for kind, value in found.items()}
        facts["peak_memory_bytes"] = memory.peak_bytes
        if why := verdict(found, precision):
            return None, facts, why, False
        return runner, facts | {"step_s": step_s}, None, True

    def figures(self, rung: Rung, timed: Timed) -> dict[str, Any]:
        """Times, rates, the fraction of the floor, and the ratio to the example; of a rung with a part turned off also
        what that part gains."""
        figures: dict[str, Any] = timed.figures(rung.name)
        figures["images_per_s"] = self.images * 1e3 / figures["p50_ms"]
        figures["tflops"] = floor(list(step_kernels(self.arch, self.images))).gflop / figures["p50_ms"]
        figures["roofline"] = self.roofline(rung, figures["p50_ms"])
        if EXAMPLE in timed.samples_ms and rung.name != EXAMPLE:
            ratio = timed.ratio(EXAMPLE, rung.name)
            figures |= {"over_example": ratio.median, "over_example_p20": ratio.p20, "over_example_p80": ratio.p80}
            figures |= noise(ratio)
        whole = replace(rung, off="").name
        if rung.off and whole in timed.samples_ms:
            ratio = timed.ratio(rung.name, whole)
            figures |= {"gain": ratio.median, "gain_p20": ratio.p20, "gain_p80": ratio.p80}
            figures |= noise(ratio)
        return figures

    def roofline(self, rung: Rung, step_ms: float) -> float | None:
        """The step's floor at this machine's ceilings, as a fraction of its time."""
        if self.bench.measured is None:
            return None
        precision = tolerance_class(rung.precision, self.bench.plan.device)
        kernels = list(step_kernels(self.arch, self.images))
        return floor(kernels, self.bench.measured.of(precision)).floor_us / 1e3 / step_ms

    def row(self, rung: Rung, ok: Ok, why: str | None, figures: dict[str, Any]) -> None:
        settings = {"group": self.name, **self.settings(), **asdict(rung)}
        self.bench.emit(self.stage, rung.name, ok, why, **settings, **figures)

    def summarise(self, runners: dict[str, Runner], facts: dict[str, dict], timed: Timed) -> list[str]:
        """Put this batch into the summary; what is there stays unless a rung that compiles turned out the best peer."""
        fused = [name for name, runner in runners.items() if runner.rung.ours == "fused" and not runner.rung.off]
        others = [name for name, runner in runners.items() if not runner.rung.ours]
        ours, best = min(fused, key=timed.p50_ms, default=None), min(others, key=timed.p50_ms, default=None)
        names = [name for name in (ours, best) if name]
        if ours is None or self.other:
            return names
        ratio = timed.ratio(best, ours) if best and self.stage == "peers" else None
        key = f"b{self.images}"
        known = self.bench.summary.get(key)
        retimed = ratio is None or not runners[best].rung.compile
        if known and (retimed or (known["over_best_peer"] or float("inf")) <= ratio.median):
            return names
        example = timed.ratio(EXAMPLE, ours) if EXAMPLE in timed.samples_ms else None
        memory = [facts[name]["peak_memory_bytes"] if name in facts else None for name in (ours, EXAMPLE)]
        self.bench.summary[key] = {
            "step_ms": timed.p50_ms(ours),
            "images_per_s": self.images * 1e3 / timed.p50_ms(ours),
            "roofline": self.roofline(runners[ours].rung, timed.p50_ms(ours)),
            "over_example": example and example.median,
            "over_best_peer": ratio and ratio.median,
            "best_peer": best if ratio else None,
            "peak_memory_over_example": memory[0] / memory[1] if all(memory) else None,
            "ours": ours,
            "example_ms": timed.p50_ms(EXAMPLE) if example else None,
            "noisy": None if example is None else example.noisy,
            "best_peer_noisy": None if ratio is None else ratio.noisy,
        }
        return names


def noise(ratio: Ratio) -> dict[str, Any]:
    """What says how far a ratio is to be believed."""
    return {
        "halves_disagreement": ratio.disagreement, "repeats_within": ratio.repeats_within, "noisy": ratio.noisy,
    }  # fmt: skip


def urgency(rung: Rung) -> int:
    """What to verify first, as time may run out: the example and ours (0: always), likely best peers (1), others."""
    if rung.name == EXAMPLE or rung.ours == "fused":
        return 0
    return 1 if rung.frozen and rung.precision == "bf16" else 2


def prepared(runner: Runner, batch: tuple) -> tuple:
    return runner.rung.images(batch[0]), batch[1]


def in_turn(runner: Runner, data: list[tuple]) -> Callable[[], Any]:
    """A call that takes the next of the batches, each in the memory format the rung wants, made beforehand."""
    turn = itertools.cycle([prepared(runner, batch) for batch in data])
    return lambda: runner(*next(turn))


class peak_memory:
    """The most device memory that a rung needs beyond what was there before it: networks, optimisers, graph and step.

    `peak_bytes` is None on a CPU, where one process cannot tell the rungs apart.
    """

    def __init__(self, device: torch.device):
        self.device, self.peak_bytes = device, None

    def __enter__(self) -> "peak_memory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def steady(self, runner: Runner, *batch) -> None:
        """Take one step once warm-up, autotuning and plans are behind, and note its peak (a graph's: its capture's)."""
        if self.device.type != "cuda":
            return
        peak = getattr(runner.step, "peak_bytes", None)
        if peak is None:
            torch.cuda.reset_peak_memory_stats(self.device)
            runner(*batch)
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        self.peak_bytes = peak - self.before
