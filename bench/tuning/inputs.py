"""Whether a layer should apply the batch norm of its input as it loads it, or find it applied by a launch before.

Both ways run the products as a step does, on the tiles that are in use: the forward pass of a map that was just
written, and the weight gradient, when the map has long left the cache, by itself. Not yet run on a GPU.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from bench.subjects import gemms
from bench.subjects.accuracy import Subject, arithmetic
from bench.subjects.gemms import Operands, Product
from bench.subjects.problems import Problem, Read
from bench.timing import cold_ms, interleave
from bench.tuning.lab import compile_fault, launches_of
from bench.tuning.precompile import Compiler
from kernels import tuning
from kernels.geometry import raw

ROUNDS = 15
WRITTEN = "written"
"""What is timed beside the two ways and taken off them: the map's own writing."""


@dataclass(frozen=True)
class Part:
    """One product that reads the map: its operands, the map being deferred, and how each way makes it of them."""

    problem: Problem
    operands: Operands
    products: dict[str, Product]

    def subject(self) -> Subject:
        runs = {way: partial(gemms.outputs, self.problem, self.operands, call) for way, call in self.products.items()}
        return Subject(runs, lambda: gemms.answers(self.problem, self.operands), self.problem.precision)

    def calls(self) -> dict[str, Callable[[], object]]:
        """What to time, by way; the forward pass with the writing of its map, and that alone."""
        p, o = self.problem, self.operands
        if p.kernel == "wgrad":
            found = {"applied": o.settled(), "deferred": o}
            return {way: partial(gemms.settled, p, each, self.products["deferred"]) for way, each in found.items()}
        y, source = raw(o.first), raw(o.first).clone()

        def freshly(call: Product) -> Callable[[], object]:
            def run() -> object:
                y.copy_(source)
                return gemms.settled(p, o, call)

            return run

        return {way: freshly(call) for way, call in self.products.items()} | {WRITTEN: lambda: y.copy_(source)}


def parts(read: Read, device: torch.device) -> list[Part]:
    """The products of an input on a device, by the launchers of a step; on a CPU by PyTorch."""
    call = gemms.plain if device.type == "cpu" else partial(gemms.launched, recipe="auto")
    products = {"applied": gemms.applied_first(call), "deferred": call}
    return [Part(p, gemms.operands(p, device), products) for p in read.problems(True)]


def time_us(found: list[Part], ways: list[str], device: torch.device) -> dict[str, float]:
    """Microseconds of each way, its products together."""
    total = dict.fromkeys(ways, 0.0)
    for part in found:
        calls = {name: call for name, call in part.calls().items() if name in (*ways, WRITTEN)}
        with arithmetic(part.problem.precision):
            timed = interleave(calls, ROUNDS, 1, device, None, cold_ms)
        written = timed.p50_ms(WRITTEN) if WRITTEN in calls else 0.0
        total = {way: us + (timed.p50_ms(way) - written) * 1e3 for way, us in total.items()}
    return total


def tile_of(device_name: str, p: Problem) -> tuning.Entry | None:
    """What a launch of a problem finds in the table that is in use."""
    shape = (p.into, p.out, 2 * p.low if p.kernel == "conv" else p.low)
    return tuning.tile(device_name, p.kernel, shape, p.precision, p.images)


def stamp(read: Read, device_name: str, sources: str) -> str:
    """A hash of what an input's times are of: kernels and tiles."""
    tiles = [tile_of(device_name, p) for p in read.problems(True)]
    return hashlib.sha256(repr((sources, tiles)).encode()).hexdigest()[:16]


def compiled(read: Read, device_name: str, arch: int, compiler: Compiler) -> dict[str, str]:
    """Compile both ways ahead; why one may not ship, by its name, as a spill would say."""
    faults: dict[str, str] = {}
    for way in tuning.INPUTS:
        jobs = []
        for p in read.problems(way == "deferred"):
            entry = tile_of(device_name, p)
            if entry is None or entry.recipe == "triton":
                jobs.append((p, entry and entry.tile, arch))
        why = [fault for found in compiler.compile(launches_of, jobs) if (fault := compile_fault(found, arch))]
        if why:
            faults[way] = why[0]
    return faults
