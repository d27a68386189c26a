"""Everything that can be measured of the step on this machine, in one command that plans itself for the time given.

    python -m bench.suite --out DIR [--quick] [--only parity,ceilings,peers,…] [--minutes N] [--commit SHA]
                          [--preset dcgan64] [--batch N --batch M] [--compile]

Rows are appended to `DIR/rows.jsonl` one by one, so what was measured survives whatever cuts the run off. A row has
`suite`, `name`, `ok` (true, false, or null where nothing was measured), `why`, and figures with their units in their
names; fractions are 0 to 1. Beside it: `env.json`, `summary.json`, `README.md`; of the stage `parity` `parity.jsonl`,
of `profile` `profile.txt` and `trace.json`, of `tune`, which runs where `--only` names it, `tuned.json`. Exit codes: 0;
2 for wrong input; 3 if something of ours was wrong; 128 + n by a signal.
"""

import argparse
import hashlib
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench import ops, quality, record, stages
from bench.group import Bench, Plan, one_line
from bench.overview import table
from bench.stages import layers, steps, tutorial
from bench.telemetry import Telemetry
from dcgan.arch import PRESETS
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser
from kernels.library import switches

STAGES: dict[str, tuple[Callable[[Bench, float], None], float]] = {
    "parity": (stages.parity, 3.0),
    "sanitize": (stages.sanitize, 2.0),
    "ceilings": (stages.measure_ceilings, 0.5),
    "peers": (stages.peers, 8.0),
    "ops": (ops.ops, 2.0),
    "step": (steps.step, 3.0),
    "profile": (layers.profile_step, 1.0),
    "tune": (stages.tune, 8.0),
    "quality": (quality.quality, 2.0),
}
"""In the order they run, with the share of the time that each is worth."""

BY_NAME = ("tune",)
"""Stages that run where `--only` names them: they change what the next run measures."""

MINUTES = {True: 3.5, False: 10.0}
"""What `--quick` and its absence are given where `--minutes` does not say."""


DATE = "%Y-%m-%dT%H:%M:%SZ"


def file_hashes(root: Path = record.ROOT) -> dict[str, str]:
    """sha256 of each source that a speed depends on, by its path."""
    paths = {path for pattern in record.KERNEL_SOURCES for path in root.glob(pattern)}
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def newest(results: Path) -> tuple[Path, dict] | None:
    """The newest record of a step on this machine under `results`, and its environment; None if there is none."""
    found = []
    for path in sorted((results / record.machine()).glob("*/env.json")):
        if not (path.parent / "summary.json").exists():
            continue  # of something else than speed
        try:
            environment = json.loads(path.read_text())
            datetime.strptime(environment["date"], DATE)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no record: `bench.report` names it
        found.append((environment["date"], path.parent, environment))
    return max(found, key=lambda entry: entry[:2])[1:] if found else None


def staleness(results: Path, now: datetime | None = None) -> str:
    """One line: how old this machine's newest record is, and which kernel sources changed since."""
    entry = newest(results)
    if entry is None:
        return f"no record of {record.machine()} yet"
    folder, environment = entry
    then = datetime.strptime(environment["date"], DATE).replace(tzinfo=UTC)
    age = f"{record.machine()}: newest record {folder.name} is {((now or datetime.now(UTC)) - then).days} days old"
    before, after = environment.get("kernel_files"), file_hashes()
    if before is None:
        same = environment.get("kernels_hash") == record.kernels_hash()
        return f"{age}; kernel sources {'unchanged' if same else 'changed, which ones that record does not say'}"
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return f"{age}; kernel sources changed since: {', '.join(changed) or 'none'}"


def json_number(value: object) -> object:
    """None for a NaN or an infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Writer:
    """Rows to the file as they come, and to memory for the table."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def emit(self, suite: str, name: str, ok: bool | None, why: str | None = None, **figures) -> None:
        figures = {key: json_number(value) for key, value in figures.items()}
        row = {"suite": suite, "name": name, "ok": ok, **({} if why is None else {"why": why}), **figures}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(out: Path, plan: Plan, only: list[str], minutes: float, commit: str | None = None) -> list[dict]:
    """Run the stages `only`, in order, and write the record into `out`; returns its rows.

    A stage gets what is left of the time in proportion to its share of what is still to come; one that raises becomes
    a row, and the rest goes on.
    """
    out.mkdir(parents=True, exist_ok=True)
    began, writer = time.monotonic(), Writer(out / "rows.jsonl")
    bench = Bench(plan, out, writer.emit, Telemetry(plan.device))
    environment = record.environment(commit) | {
        "device": plan.device.type,
        "preset": next((name for name, preset in PRESETS.items() if preset.arch == plan.arch), str(plan.arch)),
        "kernel_files": file_hashes(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "tf32": {"convolutions": switches.tf32, "products": torch.backends.cuda.matmul.fp32_precision == "tf32"},
        "telemetry": bench.telemetry.read(),
    }
    write_json(out / "env.json", environment)
    bench.save = lambda: finish(out, environment, bench.summary, writer.rows)
    try:
        for place, stage in enumerate(only):
            left = minutes * 60 - (time.monotonic() - began)
            to_come = sum(STAGES[name][1] for name in only[place:])
            seconds = left * STAGES[stage][1] / max(to_come, 1e-9)
            if left <= 0 and STAGES[stage][1]:
                writer.emit(stage, stage, None, f"no time left of {minutes:g} minutes")
                continue
            try:
                STAGES[stage][0](bench, seconds)
            except Exception as error:  # what was measured before and what comes after must not be lost
                writer.emit(stage, stage, False, one_line(error))
            bench.save()
    finally:
        bench.save()
        bench.telemetry.close()
    return writer.rows


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def finish(out: Path, environment: dict, summary: dict, rows: list[dict]) -> None:
    """Write the summary and the README over the previous ones."""
    on_gpu = environment["device"] == "cuda"
    head = {"gpu": environment["gpu"]} if on_gpu else {"cpu": environment["cpu"]}
    head |= {
        "commit": environment["commit"],
        "kernels_hash": environment["kernels_hash"],
        "preset": environment["preset"],
    }
    write_json(out / "summary.json", head | summary)
    where = environment["gpu"] if on_gpu else f"{environment['cpu']}, {environment['threads']} threads"
    commit = (environment["commit"] or "an unknown commit")[:12] + (" with changes" if environment["dirty"] else "")
    lines = [
        f"# {where}, {environment['date']}",
        "",
        f"`python -m bench.suite` at {commit}, torch {environment['torch']}, Triton {environment['triton']}; "
        f"load average {environment['load_average']:.2f} at its start.",
        "",
        "```",
        *table(rows),
        "```",
    ]
    (out / "README.md").write_text("\n".join(lines) + "\n")


def plan_of(args: argparse.Namespace) -> Plan:
    """What the command line asks for, or the device's own."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    over = (32, 64, 128, 256, 512, 1024, 2048, 4096) if gpu else (16, 64)
    peers = (128, 1024) if gpu else (64,)
    if args.quick and gpu:
        over, peers = (128, 1024), (128,)
    batches = tuple(args.batch) if args.batch else None
    whole = gpu and not args.quick
    return Plan(
        PRESETS[args.preset].arch,
        device,
        batches or peers,
        batches or over,
        rounds=5 if args.quick else 15,
        compile=args.compile or gpu,
        energy=whole,
        sizes=(32, 64, 128, 256) if whole else (),
        widths=(64, 128, 256) if whole else (),
        ablated=(batches or peers) if whole else (),
        pictures=tutorial.PICTURES if whole else 0,
    )


def command() -> int:
    parser = Parser(prog="python -m bench.suite", description="Measure the training step on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="a folder without a record; made if missing")
    parser.add_argument("--quick", action="store_true", help=f"fewer rounds and batches, {MINUTES[True]} minutes")
    parser.add_argument("--only", help=f"some of {','.join(STAGES)} (all but {','.join(BY_NAME)})")
    parser.add_argument("--minutes", type=float, help=f"time to plan for ({MINUTES[False]:g})")
    parser.add_argument("--commit", help="commit of a tree without git data")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument(
        "--batch", type=int, action="append", help="images per step; may be repeated (the device's own)"
    )
    parser.add_argument("--compile", action="store_true", help="include the rungs that compile, on a CPU too")
    args = parser.parse_args()
    only = args.only.split(",") if args.only is not None else [name for name in STAGES if name not in BY_NAME]
    for name in only:
        if name not in STAGES:
            raise InputError(f"--only {args.only}: {name!r} is not a stage; accepted are {', '.join(STAGES)}")
    minutes = MINUTES[args.quick] if args.minutes is None else args.minutes
    if not 0 < minutes < math.inf:
        raise InputError(f"--minutes {minutes:g}: it must be positive, and finite")
    if args.batch and min(args.batch) < 1:
        raise InputError(f"--batch {min(args.batch)}: it must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: it is a file; give a folder")
    if (args.out / "rows.jsonl").exists():
        raise InputError(f"--out {args.out}: it already holds a record; records are append-only, give another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written: {error.strerror or error}") from None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    torch.backends.cudnn.benchmark = True  # as the example sets it
    print(staleness(record.RESULTS), flush=True)
    rows = run(args.out, plan_of(args), [name for name in STAGES if name in only], minutes, args.commit)
    print("\n".join(table(rows)))
    wrong = [row["name"] for row in rows if row["ok"] is False and row.get("ours", "a stage")]  # a peer has ours=""
    if wrong:
        raise RunError(f"wrong or failed: {', '.join(wrong)}; the record in {args.out} says why")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
