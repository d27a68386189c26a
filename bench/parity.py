"""Every kernel and op right on the device: forward and gradients against float64, bits, registration, graphs.

    python -m bench.parity [--preset dcgan64] [--batch N …] [--precision P …] [--minutes N] [--only REGEX] [--rows FILE]

Rows like `conv_bn_act/D3/backward/triton/bf16/b128`, what matters most first:

1. every kernel and public op of the preset's step × backend × precision × batch (`bench.subjects.accuracy`'s bar);
2. registration (opcheck), `torch.compile(fullgraph=True)`, CUDA-graph capture and replay of every public op;
3. the Triton GEMMs one by one: every epilogue, batch norm in the load, one and two groups, TMA and pointer loads;
4. every entry of the device's tuned table; 5. the same bits, a thousand times; 6. the family's other geometries.

On a CPU: eager on tiny shapes; with TRITON_INTERPRET=1 Triton's kernels in its interpreter (not bf16, whose `tl.dot` is
wrong there). A row is written as it comes; a run on the same FILE goes on where the last one stopped, and what stopped
it is a row that failed. Exit codes: 0; 3 if a row is wrong; 2 for wrong input. Not yet run on a GPU.
"""

import json
import math
import re
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench.group import one_line
from bench.subjects.accuracy import DTYPES
from bench.subjects.claims import Check, Scope, checks, scope_of
from bench.tuning.search import Journal
from dcgan.arch import PRESETS
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser


class Rows:
    """Rows of a file, one per line, that a later run on the same file adds to."""

    def __init__(self, path: Path | None):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        rows = [row for line in lines if (row := whole_row(line)) is not None]
        self.all: list[dict[str, Any]] = [row for row in rows if row["ok"] is not None]
        self.names = {row["name"] for row in self.all}
        if len(self.all) < len(lines):  # what an earlier run did not reach, or not write whole, is this one's to say
            path.write_text("".join(json.dumps(row) + "\n" for row in self.all), encoding="utf-8")

    def add(self, name: str, ok: bool | None, why: str | None, **figures: Any) -> None:
        row = {"name": name, "ok": ok, **({} if why is None else {"why": why}), **figures}
        self.all.append(row)
        self.names.add(name)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
        if ok is not True:
            print(f"{'WRONG' if ok is False else 'not run'}: {name}: {why}", flush=True)


def whole_row(line: str) -> dict[str, Any] | None:
    """A row; None of a line that was cut off as it was written."""
    try:
        return json.loads(line)
    except ValueError:
        return None


CHUNK = 200
"""Checks whose kernels are compiled together, on all cores, before the first of them runs."""


def run(scope: Scope, rows: Rows, journal: Journal, pattern: re.Pattern[str], seconds: float) -> int:
    """Run what is not in `rows` yet, until the time is up; returns how many checks were not reached."""
    from bench.tuning.lab import Warmer

    began = time.monotonic()
    remaining = (check for check in checks(scope) if pattern.search(check.name) and check.name not in rows.names)
    with Warmer(scope.device) as warmer:
        while chunk := list(islice(remaining, CHUNK)):
            warmer.compile([job for check in chunk for job in check.jobs])
            for done, check in enumerate(chunk):
                if time.monotonic() - began > seconds:
                    return len(chunk) - done + sum(1 for _ in remaining)
                one(check, scope, rows, journal)
    return 0


def one(check: Check, scope: Scope, rows: Rows, journal: Journal) -> None:
    """One check, with what it raises for its reason; a poisoned device is raised on, the journal knowing by whom."""
    if check.name in journal.blamed:
        rows.add(check.name, False, "it ended the process", section=check.section)
        return
    journal.begin(check.name)
    began, figures = time.monotonic(), {}
    try:
        why, figures = check.run()
    except Exception as error:  # whatever a compiler or a launch raises is this row's reason
        why = one_line(error)
    if scope.device.type == "cuda":
        torch.cuda.synchronize(scope.device)
    if "error_over_allowed" in figures:
        error = figures["error_over_allowed"]
        figures["error_over_allowed"] = float(f"{error:.3g}") if math.isfinite(error) else None  # JSON has no infinity
    if (took := time.monotonic() - began) >= 1:  # thousands of rows stay within a megabyte
        figures["seconds"] = round(took, 1)
    rows.add(check.name, why is None, why, section=check.section, **figures)
    journal.end(check.name)


def command() -> int:
    parser = Parser(prog="python -m bench.parity", description="Hold every kernel and op to float64 on this device.")
    parser.add_argument("--preset", choices=PRESETS, help="whose step (dcgan64; a tiny network on a CPU)")
    parser.add_argument(
        "--batch", type=int, action="append", help="images per step; may be repeated (the device's own)"
    )
    parser.add_argument("--precision", choices=DTYPES, action="append", help="may be repeated (the device's own)")
    parser.add_argument("--minutes", type=float, default=20.0, help="time to stay within (20)")
    parser.add_argument("--only", default="", help="a regular expression that a row's name must match")
    parser.add_argument("--rows", type=Path, help="a file to write rows to, or to go on with")
    args = parser.parse_args()
    if not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes:g}: it must be positive")
    if args.batch and min(args.batch) < 1:
        raise InputError(f"--batch {min(args.batch)}: it must be at least 1")
    try:
        pattern = re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: not a regular expression ({error})") from error
    scope = scope_of(
        torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.preset, args.batch, args.precision
    )
    torch.backends.cudnn.benchmark = True
    rows = Rows(args.rows)
    journal = Journal(args.rows.with_suffix(".journal") if args.rows else None)
    missed = run(scope, rows, journal, pattern, args.minutes * 60)
    journal.close()
    if not missed and not any(map(pattern.search, rows.names)):
        raise InputError(f"--only {args.only}: no row has such a name")
    if missed:
        rows.add(f"{missed} more", None, f"not reached within {args.minutes:g} minutes", section="numbers")
    wrong = [row["name"] for row in rows.all if row["ok"] is False]
    right = sum(row["ok"] is True for row in rows.all)
    print(f"{right} right, {len(wrong)} wrong" + (f", {missed} not reached" if missed else ""))
    if wrong:
        raise RunError(f"wrong: {', '.join(wrong[:5])}{' …' if len(wrong) > 5 else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
