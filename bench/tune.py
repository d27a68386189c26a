"""The search for a device's tuned table: candidates, checked before they are timed, timed beside the library.

    python -m bench.tune [--preset dcgan64] [--batch 128 --batch 1024] [--precision bf16] [--minutes 20]
                         [--out kernels/tuned/<device>.json] [--only REGEX] [--again] [--dry-run]

For each kernel × shape of a training step: the tiles of `bench.tuning.candidates` are compiled on all cores; what
spills or does not fit is left out; each of the others runs once with every epilogue that the step gives this shape, and
is held against float64 on the device; what is right is timed, the best few once more beside the library's product with
our kernels around it, and the fastest is written. Then each public op, forward and backward, by each recipe as a whole.

The table is written after every entry, in one move, into what the file held before; an entry measured from the same
kernel sources is not measured again (`--again` does), so a search that was cut off goes on where it was. A candidate
that poisons the device ends the process, which starts itself anew without it. `--dry-run` names the candidates,
compiles nothing and needs no GPU. The search has not yet run on a GPU.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import record
from bench.group import one_line
from bench.subjects import layers, whole
from bench.subjects.accuracy import arithmetic, verify
from bench.timing import cold_ms, interleave
from bench.tuning.lab import DeviceLab, Shape, arch_of_device, compile_fault, launches_of, shapes
from bench.tuning.precompile import Compiler
from bench.tuning.search import LIBRARY, Choice, Journal, Table, search
from dcgan.arch import PRESETS, Arch
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser
from kernels import dispatch, tuning

DRY_ARCH = 90
"""Whose candidates a dry run names where there is no GPU."""

CHUNK = 6
"""Shapes whose candidates are compiled together; nothing is timed meanwhile."""

MARGIN = 0.02
"""A recipe of ours must beat eager by this fraction to be chosen for an op: no layer may be slower fused."""


@dataclass(frozen=True)
class Entry:
    """One choice of the table's `ops`: a public op on a layer (`any` for one without), and what it is decided by.

    precisions: the keys it goes to: what computes in float32 whatever the maps are has two, with TF32 and without.
    """

    op: str
    key: str
    precisions: tuple[str, ...]
    images: int
    works: tuple[layers.Op | whole.Whole, ...]

    @property
    def name(self) -> str:
        return f"{self.op}/{self.key}/{self.precisions[0]}/b{self.images}"


def entries(arch: Arch, batches: list[int], precision: str) -> list[Entry]:
    """Every public op of the steps of these batches: forward and backward decide together."""
    found = []
    for batch in batches:
        works = list(layers.step_ops(arch, batch, precision))
        for pair in zip(works[::2], works[1::2], strict=True):
            key = dispatch.layer_key(pair[0].layer)
            found.append(Entry(pair[0].op, key, (precision,), pair[0].images, pair))
        for work in whole.step_wholes(arch, batch, precision):
            precisions = (precision,) if work.op == "gather_images" else ("fp32", "tf32")
            found.append(Entry(work.op, "any", precisions, work.count, (work,)))
    return list({entry.name: entry for entry in found}.values())


@dataclass
class Tuner:
    """The search over all shapes and ops, until `deadline` (of `time.monotonic`)."""

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
        choice = search(list(tiles), DeviceLab(shape, tiles, self.device, self.journal), faults)
        if choice.recipe is None:
            self.say(f"{shape.name}: nothing is right, of {len(tiles)}: {next(iter(choice.rejected.values()))}")
            return choice
        self.table.put_tile(p.kernel, p.key, p.precision, p.images, choice, tiles.get(choice.recipe))
        library = f", library {choice.library_us:.1f} µs" if choice.library_us else ""
        tile = f" {tiles[choice.recipe]}" if choice.recipe != LIBRARY else ""
        self.say(f"{shape.name}: {choice.us:.1f} µs{library}; {choice.timed} timed, {len(choice.rejected)} not;{tile}")
        return choice

    def ops(self, wanted: list[Entry]) -> int:
        """Decide the recipe of public ops as a whole, on the tiles found; returns how many were not reached."""
        with in_use(self.table):
            return self.each_op(wanted)

    def each_op(self, wanted: list[Entry]) -> int:
        for done, entry in enumerate(wanted):
            if not self.left():
                return len(wanted) - done
            times = self.op_us(entry)
            recipe = best_recipe(times)
            for precision in entry.precisions if recipe else ():
                self.table.put_op(entry.op, entry.key, precision, entry.images, recipe)
            text = ", ".join(f"{name} {us:.1f} µs" for name, us in sorted(times.items(), key=lambda item: item[1]))
            self.say(f"{entry.name}: {text or 'none right'}")
        return 0

    def op_us(self, entry: Entry) -> dict[str, float]:
        """All works of an entry together, by each recipe that is right in all of them."""
        subjects = [work.build(self.device) for work in entry.works]
        right = []
        for recipe in entry.works[0].recipes(self.device):
            try:
                if not any(verify(subject, recipe)[1] for subject in subjects):
                    right.append(recipe)
            except Exception as error:  # whatever a launch raises: the other recipes go on
                self.say(f"{entry.name} by {recipe}: {one_line(error)}")
        if not right:
            return {}
        total = dict.fromkeys(right, 0.0)
        for subject in subjects:
            with arithmetic(subject.precision):
                calls = {recipe: subject.call(recipe) for recipe in right}
                timed = interleave(calls, 15, 1, self.device, None, cold_ms)
            total = {recipe: us + timed.p50_ms(recipe) * 1e3 for recipe, us in total.items()}
        return total


@contextmanager
def in_use(table: Table) -> Iterator[None]:
    """Let the launchers look tiles up in `table`, wherever its file is."""
    before = tuning.FOLDER
    with TemporaryDirectory() as folder:
        if table.path.exists():
            Path(folder, f"{tuning.slug(table.header['device'])}.json").write_bytes(table.path.read_bytes())
        tuning.FOLDER = Path(folder)
        tuning.forget()
        try:
            yield
        finally:
            tuning.FOLDER = before
            tuning.forget()


def best_recipe(times: dict[str, float]) -> str | None:
    """The fastest; eager where ours win by less than the margin. None of none."""
    if not times:
        return None
    best = min(times, key=lambda recipe: times[recipe])
    return "eager" if times.get("eager", float("inf")) <= times[best] * (1 + MARGIN) else best


def dry_run(wanted: list[Shape], ops: list[Entry], capability: int, each: bool) -> list[str]:
    """What a search would try, a line a shape; with `each`, a line a tile too."""
    from bench.tuning.candidates import candidates

    lines, total = [], 0
    for shape in wanted:
        tiles = candidates(shape.problem, capability)
        total += len(tiles)
        uses = f", for {', '.join(map(str, shape.uses))}" if shape.problem.kernel != "wgrad" else ""
        lines.append(f"{shape.name}: {len(tiles)} tiles{uses}")
        lines += [f"  {tile}" for tile in tiles] if each else []
    lines.append(f"{len(wanted)} shapes, {total} tiles; {len(ops)} ops as a whole; capability {capability}")
    return lines


def command() -> int:
    parser = Parser(prog="python -m bench.tune", description="Search this GPU's tuned table.")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--batch", type=int, action="append", help="images a step; may be repeated (128 and 1024)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "tf32", "fp32"), default="bf16")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to stay within (20)")
    parser.add_argument("--out", type=Path, help="the table (kernels/tuned/<device>.json)")
    parser.add_argument("--record", help="the record that its figures belong to, for the table's header")
    parser.add_argument("--only", default="", help="a regular expression that a shape's or an op's name must match")
    parser.add_argument("--again", action="store_true", help="also what these kernel sources were measured for")
    parser.add_argument("--dry-run", action="store_true", help="name the candidates; --only names their tiles too")
    args = parser.parse_args()
    batches = args.batch or [128, 1024]
    if min(batches) < 1 or not args.minutes > 0:
        raise InputError(f"--batch {min(batches)} --minutes {args.minutes:g}: both must be positive")
    try:
        pattern = re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: no regular expression ({error})") from error
    arch = PRESETS[args.preset].arch
    wanted = [shape for shape in shapes(arch, batches, args.precision) if pattern.search(shape.name)]
    ops = [entry for entry in entries(arch, batches, args.precision) if pattern.search(entry.name)]
    if not wanted and not ops:
        raise InputError(f"--only {args.only}: no shape and no op has such a name; --dry-run lists them")
    if args.dry_run:
        print("\n".join(dry_run(wanted, ops, capability_of(), bool(args.only))))
        return 0
    if not torch.cuda.is_available():
        raise InputError("PyTorch sees no GPU here, and a table is measured on one; --dry-run names the candidates")
    return tune(args, arch, wanted, ops)


def capability_of() -> int:
    return arch_of_device(torch.device("cuda")) if torch.cuda.is_available() else DRY_ARCH


def tune(args: Any, arch: Arch, wanted: list[Shape], ops: list[Entry]) -> int:
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
            missed = tuner.tiles(wanted) + tuner.ops(ops)
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
