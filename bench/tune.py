"""The search for a device's tuned table: candidates, checked before they are timed, timed beside the library.

    python -m bench.tune [--preset dcgan64] [--batch 128 --batch 1024] [--precision bf16] [--minutes 20]
                         [--out kernels/tuned/<device>.json] [--only REGEX] [--again] [--dry-run]

For each kernel × shape of a training step: the tiles of `bench.tuning.candidates` are compiled on all cores; what
spills or does not fit is left out; each of the others runs once with every epilogue that the step gives this shape, and
is held against float64 on the device; what is right is timed, the best few once more beside the library's product with
our kernels around it, and the fastest is written. On those tiles then, for each layer whose input has a batch norm,
whether its forward pass and weight gradient should apply it as they load the map (`inputs/…`); whether the captured
step is faster with kernels that may begin before the one before them has ended (`launch/…`); and each public op,
forward and backward, by each recipe as a whole.

The table is written after every entry, in one move, into what the file held before; a tile, or an input, measured from
the same kernels and tiles is not measured again (`--again` does), so a search that was cut off goes on where it was. A
candidate that poisons the device ends the process, which starts itself anew without it. `--dry-run` names the
candidates, compiles nothing and needs no GPU. The search has not yet run on a GPU.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.group import one_line
from bench.stages import ahead
from bench.subjects.accuracy import Subject, arithmetic
from bench.subjects.problems import Read, Use
from bench.timing import cold_ms, interleave
from bench.tuning import inputs
from bench.tuning.choices import Entry, best, entries, in_use, reads
from bench.tuning.lab import (
    DeviceLab,
    Shape,
    arch_of_device,
    compile_fault,
    extension,
    launches_of,
    run_fault,
    shapes,
)
from bench.tuning.precompile import Compiler
from bench.tuning.search import EXTENSION, LIBRARY, Choice, Journal, Table, search
from bench.tuning.steps import Steps, compile_ahead, steps, times_us
from dcgan.arch import PRESETS, Arch
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser
from kernels import tuning

DRY_ARCH = 90
"""Whose candidates a dry run names where there is no GPU."""

CHUNK = 6
"""Shapes whose candidates are compiled together; nothing is timed meanwhile."""


@dataclass
class Tuner:
    """The search over all shapes, inputs and ops, until `deadline` (of `time.monotonic`)."""

    arch: Arch
    device: torch.device
    capability: int
    table: Table
    journal: Journal
    compiler: Compiler
    deadline: float
    say: Callable[[str], None] = print
    again: bool = False

    def left(self) -> bool:
        return time.monotonic() < self.deadline

    def tiles(self, wanted: list[Shape]) -> int:
        """Tune shapes; returns how many were not reached."""
        from bench.tuning.candidates import candidates

        remaining = [shape for shape in wanted if self.again or not self.known(shape)]
        for first in range(0, len(remaining), CHUNK):
            if not self.left():
                return len(remaining) - first
            chunk = remaining[first : first + CHUNK]
            named = [{f"tile{k}": c for k, c in enumerate(candidates(s.problem, self.capability))} for s in chunk]
            jobs = [(problem, config, self.capability) for shape, tiles in zip(chunk, named, strict=True)
                    for config in tiles.values() for problem in shape.problems()]  # fmt: skip
            compiled = iter(self.compiler.compile(launches_of, jobs))
            for done, (shape, tiles) in enumerate(zip(chunk, named, strict=True)):
                faults = {}
                for name in tiles:
                    found = [compile_fault(next(compiled), self.capability) for _ in shape.uses]
                    if any(found):
                        faults[name] = next(why for why in found if why)
                if not self.left():
                    return len(remaining) - first - done
                self.one(shape, tiles, faults)
        return 0

    def known(self, shape: Shape) -> bool:
        p = shape.problem
        return self.table.has(p.kernel, p.key, p.precision, p.images)

    def one(self, shape: Shape, tiles: dict[str, Any], faults: dict[str, str]) -> Choice:
        p = shape.problem
        theirs = extension(shape, self.device)
        every = tiles | {name: tile for name, tile in theirs.items() if tile is not None}
        lab = DeviceLab(shape, every, self.device, self.journal)
        choice = search(list(tiles), lab, faults, (LIBRARY, *theirs))
        if choice.recipe is None:
            self.say(f"{shape.name}: nothing is right, of {len(every)}: {next(iter(choice.rejected.values()))}")
            return choice
        self.table.put_tile(p.kernel, p.key, p.precision, p.images, choice, every.get(choice.recipe))
        beside = {LIBRARY: choice.library_us, EXTENSION: choice.cuda_us}
        library = "".join(f", {name} {us:.1f} µs" for name, us in beside.items() if us)
        tile = f" {every.get(choice.recipe, choice.recipe)}"
        self.say(f"{shape.name}: {choice.us:.1f} µs{library}; {choice.timed} timed, {len(choice.rejected)} not;{tile}")
        return choice

    def inputs(self, wanted: list[Read]) -> int:
        """Decide who applies the batch norm of inputs, on the tiles found; returns how many were not reached."""
        device_name = self.table.header["device"]
        with in_use(self.table):
            stamps = {read.name: inputs.stamp(read, device_name, self.table.sources) for read in wanted}
            known = self.table.has_measured
            remaining = [read for read in wanted if self.again or not known(read.name, stamps[read.name])]
            for done, read in enumerate(remaining):
                if not self.left():
                    return len(remaining) - done
                faults = inputs.compiled(read, device_name, self.capability, self.compiler)
                times = self.input_us(read, faults)
                way = best(times, "applied")
                if way:
                    self.table.put_input(read, way, times, stamps[read.name])
                self.say(f"{read.name}: {fastest_first(times)}{f'; {way}' if way else ''}")
        return 0

    def input_us(self, read: Read, faults: dict[str, str]) -> dict[str, float]:
        """Of each way that is right and may ship."""
        parts = inputs.parts(read, self.device)
        right = self.right(read.name, [part.subject() for part in parts], list(tuning.INPUTS), faults)
        return inputs.time_us(parts, right, self.device) if right else {}

    def right(
        self, name: str, subjects: list[Subject], recipes: list[str], faults: dict[str, str] | None = None
    ) -> list[str]:  # fmt: skip
        """Those of `recipes` that are right for all subjects; of the others it says why they are not."""
        found = []
        for recipe in recipes:
            why = (faults or {}).get(recipe) or run_fault(
                f"{name} {recipe}", subjects, recipe, self.device, self.journal
            )
            if why:
                self.say(f"{name}, {recipe}: {why}")
            else:
                found.append(recipe)
        return found

    def launches(self, wanted: list[Steps]) -> int:
        """Decide how the kernels of captured steps are launched; returns how many were not reached."""
        with in_use(self.table):
            remaining = [
                steps for steps in wanted if self.again or not self.table.has_measured(steps.name, self.table.sources)
            ]
            for done, steps in enumerate(remaining):
                if not self.left():
                    return len(remaining) - done
                if self.capability == ahead.TILES_OF:
                    compile_ahead(steps, self.table.header["device"], self.compiler)
                times = times_us(steps, self.device, self.journal, self.say)
                way = best(times, "plain", 0.0)
                if way:
                    self.table.put_launch(steps.name, steps.precision, steps.images, way, times)
                self.say(f"{steps.name}: {fastest_first(times)}{f'; {way}' if way else ''}")
        return 0

    def ops(self, wanted: list[Entry]) -> int:
        """Decide the recipe of public ops as a whole, on the tiles found; returns how many were not reached."""
        with in_use(self.table):
            for done, entry in enumerate(wanted):
                if not self.left():
                    return len(wanted) - done
                times = self.op_us(entry)
                recipe = best(times)
                for precision in entry.precisions if recipe else ():
                    self.table.put_op(entry.op, entry.key, precision, entry.images, recipe)
                self.say(f"{entry.name}: {fastest_first(times)}")
        return 0

    def op_us(self, entry: Entry) -> dict[str, float]:
        """All works of an entry together, by each recipe that is right in all of them."""
        subjects = [work.build(self.device) for work in entry.works]
        right = self.right(entry.name, subjects, entry.works[0].recipes(self.device))
        total = dict.fromkeys(right, 0.0)
        for subject in subjects if right else ():
            with arithmetic(subject.precision):
                calls = {recipe: subject.call(recipe) for recipe in right}
                timed = interleave(calls, 15, 1, self.device, None, cold_ms)
            total = {recipe: us + timed.p50_ms(recipe) * 1e3 for recipe, us in total.items()}
        return total


def fastest_first(times: dict[str, float]) -> str:
    named = sorted(times.items(), key=lambda item: item[1])
    return ", ".join(f"{name} {us:.1f} µs" for name, us in named) or "none right"


def dry_run(
    wanted: list[Shape], maps: list[Read], ops: list[Entry], whole: list[Steps], capability: int, each: bool
) -> list[str]:  # fmt: skip
    """What a search would try, a line per shape, input, op and step; with `each`, also one per tile."""
    from bench.tuning.candidates import candidates

    lines, total = [], 0
    for shape in wanted:
        tiles = candidates(shape.problem, capability)
        total += len(tiles)
        uses = "; ".join(str(use) for use in shape.uses if use != Use())
        lines.append(f"{shape.name}: {len(tiles)} tiles{uses and f', for {uses}'}")
        lines += [f"  {tile}" for tile in tiles] if each else []
    for read in maps:
        what = "forward and weight gradient" if read.weights else "forward only"
        lines.append(f"{read.name}: {' or '.join(tuning.INPUTS)}, {what}")
    lines += [f"{entry.name}: as a whole" for entry in ops]
    lines += [f"{steps.name}: {' or '.join(tuning.LAUNCHES)}" for steps in whole]
    counts = f"{len(wanted)} shapes, {total} tiles; {len(maps)} inputs; {len(ops)} ops as a whole; {len(whole)} steps"
    return [*lines, f"{counts}; capability {capability}"]


def command() -> int:
    parser = Parser(prog="python -m bench.tune", description="Search this GPU's tuned table.")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--batch", type=int, action="append", help="images per step; may be repeated (128 and 1024)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "tf32", "fp32"), default="bf16")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to stay within (20)")
    parser.add_argument("--out", type=Path, help="the table (kernels/tuned/<device>.json)")
    parser.add_argument("--record", help="the record that its figures belong to, for the table's header")
    parser.add_argument(
        "--only", default="", help="a regular expression that a shape's, input's, op's or step's name must match"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure again what these kernel sources were measured for"
    )
    parser.add_argument("--dry-run", action="store_true", help="name the candidates; --only names their tiles too")
    args = parser.parse_args()
    batches = args.batch or [128, 1024]
    if min(batches) < 1 or not args.minutes > 0:
        raise InputError(f"--batch {min(batches)} --minutes {args.minutes:g}: both must be positive")
    try:
        pattern = re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: not a regular expression ({error})") from error
    arch = PRESETS[args.preset].arch
    plan = [
        [work for work in all_of(arch, batches, args.precision) if pattern.search(work.name)]
        for all_of in (shapes, reads, entries, steps)
    ]
    if not any(plan):
        raise InputError(f"--only {args.only}: no shape, input, op or step has such a name; --dry-run lists them")
    if args.dry_run:
        print("\n".join(dry_run(*plan, capability_of(), bool(args.only))))
        return 0
    if not torch.cuda.is_available():
        raise InputError("PyTorch sees no GPU here, and a table is measured on one; --dry-run names the candidates")
    return tune(args, arch, *plan)


def capability_of() -> int:
    return arch_of_device(torch.device("cuda")) if torch.cuda.is_available() else DRY_ARCH


def tune(
    args: Any, arch: Arch, wanted: list[Shape], maps: list[Read], ops: list[Entry], whole: list[Steps]
) -> int:  # fmt: skip
    began, device = time.monotonic(), torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    path = args.out or tuning.FOLDER / f"{tuning.slug(name)}.json"
    environment = record.environment()
    header = {"device": name, **{key: environment[key] for key in ("torch", "triton", "kernels_hash")}}
    try:
        sources = record.kernels_hash(sources=record.TRITON_SOURCES)[:16]
        table = Table(path, header | {"record": args.record}, sources)
    except ValueError as error:
        raise InputError(f"--out {path}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path.with_suffix(".journal"))
    torch.backends.cudnn.benchmark = True
    try:
        with Compiler(capability_of()) as compiler:
            tuner = Tuner(arch, device, capability_of(), table, journal, compiler, began + args.minutes * 60)
            tuner.say = lambda line: print(line, flush=True)
            tuner.again = args.again
            missed = tuner.tiles(wanted) + tuner.inputs(maps) + tuner.launches(whole) + tuner.ops(ops)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        start_anew(error, args.minutes - (time.monotonic() - began) / 60)
        raise RunError(f"{one_line(error)}; the table at {path} has what was measured before") from error
    journal.close()
    print(f"{path}; {missed} entries were not reached within {args.minutes:g} minutes" if missed else path)
    return 0


def start_anew(error: RuntimeError, minutes: float) -> None:
    """Where the device is poisoned and time is left, this process again: the journal tells it what to leave out."""
    if "CUDA error" not in str(error) or minutes <= 0.5:
        return
    arguments = [a for k, a in enumerate(sys.argv[1:]) if a != "--minutes" and sys.argv[k] != "--minutes"]
    print(f"{one_line(error)}; starting anew without that candidate", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "bench.tune", *arguments, "--minutes", f"{minutes:.2f}"])


if __name__ == "__main__":
    sys.exit(run_command(command))
