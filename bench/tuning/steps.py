"""Whether a captured step is faster with dependent launches (`kernels.dependent`) or without. Not yet run on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench import verify
from bench.group import one_line
from bench.peers import ladder
from bench.peers.ladder import Rung
from bench.stages import ahead
from bench.timing import interleave
from bench.tuning.precompile import Compiler
from bench.tuning.search import Journal
from dcgan.arch import Arch
from kernels import tuning

ROUNDS = 31
"""Of the timing: the ways differ by a few per cent."""


@dataclass(frozen=True)
class Steps:
    """A captured step, whose kernels are launched one way or the other."""

    arch: Arch
    images: int
    precision: str

    @property
    def name(self) -> str:
        return f"launch/step/{self.precision}/b{self.images}"

    def rungs(self) -> dict[str, Rung]:
        """By the way its kernels are launched."""
        rung = Rung(self.precision, ours="fused", graph=True)
        return {way: replace(rung, dependent=way == "dependent") for way in tuning.LAUNCHES}


def steps(arch: Arch, batches: list[int], precision: str) -> list[Steps]:
    """The steps of these batches, in a precision that the ladder has."""
    return [Steps(arch, images, precision) for images in dict.fromkeys(batches) if precision in ("bf16", "fp32")]


def compile_ahead(steps: Steps, device_name: str, compiler: Compiler) -> None:
    """A step's kernels on all cores, both ways; what fails will fail, and say why, at its launch."""
    jobs = tuple((steps.arch, steps.images, replace(rung, graph=False)) for rung in steps.rungs().values())
    each = [(str(tuning.FOLDER), jobs, device_name, worker, compiler.workers) for worker in range(compiler.workers)]
    compiler.compile(ahead.share_of_table, each)


def times_us(
    steps: Steps, device: torch.device, journal: Journal, say: Callable[[str], None]
) -> dict[str, float]:  # fmt: skip
    """Microseconds of each way in which the step trains as the reference does; it says why another does not."""
    expected = verify.oracle(steps.arch, steps.images, device)
    calls = {}
    for way, rung in steps.rungs().items():
        name, why = f"{steps.name} {way}", ladder.unavailable(rung, steps.arch, device)
        if name in journal.blamed:
            why = "it ended the process"
        if not why:
            journal.begin(name)
            try:
                runner = ladder.build(rung, steps.arch, expected.start, device, steps.images)
                found = verify.differences(runner, expected)
                why = verify.verdict(found, verify.tolerance_class(rung.precision, device))
                calls[way] = partial(runner, *expected.data[0])
            except Exception as error:  # whatever a launch or a capture raises is the way's reason
                why = one_line(error)
            torch.cuda.synchronize(device)
            journal.end(name)
        if why:
            calls.pop(way, None)
            say(f"{name}: {why}")
    timed = interleave(calls, ROUNDS, 1, device, None) if calls else None
    return {way: timed.p50_ms(way) * 1e3 for way in calls}
