"""Every kernel under compute-sanitizer, on a GPU: stray accesses, memory nobody wrote, races, misused barriers.

    python -m bench.sanitize [--tool memcheck --tool racecheck …] [--only REGEX] [--minutes N]
    python -m bench.sanitize --run triton/gemms          one case in this process, without a tool

Each case of `bench.sanitizer.cases` runs in a process of its own under each of the four tools, every tensor in an
allocation of its own. First a planted bug shows that a tool finds what it is for (synccheck has none: a barrier that
some threads skip may never return). Cases for which there is no time are named, and count as not run. Not yet run on a
GPU.

Exit codes: 0; 2 for wrong input, or without a GPU or compute-sanitizer; 3 if something was found.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.sanitizer import cases as catalogue
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser
from kernels import _cuda

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
PLANTED = {
    "memcheck": r"Invalid __global__ write",
    "initcheck": r"Uninitialized __global__ memory read",
    "racecheck": r"\b(Race|hazard)",
}
"""What a tool says of the bug planted for it."""
BUG = r"(?:Invalid|Uninitialized|Race|Potential|Barrier|Divergent|Misaligned|Program hit)\b"
"""How the line that names a bug begins."""
FOUND_CODE = 86
"""The exit code that a tool is asked for where it found something; no other program's here."""
CASE_SECONDS = 240
"""The longest that one case may take; a hang under a tool ends with it."""

Emit = Callable[..., None]


@dataclass(frozen=True)
class Job:
    """A case under a tool: `case` is backend/name, or `planted`."""

    tool: str
    case: str

    @property
    def name(self) -> str:
        return f"{self.case} under {self.tool}"


@dataclass(frozen=True)
class Verdict:
    """ok: True, False, or None if the tool itself did not run; why: the first things it said; None if clean."""

    ok: bool | None
    why: str | None


def find_tool() -> str | None:
    """compute-sanitizer of PATH, of CUDA_HOME, or of where CUDA installs itself."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return next(filter(None, [shutil.which("compute-sanitizer", path=path) for path in (None, *folders)]), None)


def missing() -> str | None:
    """Why nothing can be run here; None if it can."""
    if not torch.cuda.is_available():
        return "compute-sanitizer needs a GPU, and torch sees none"
    if find_tool() is None:
        return "compute-sanitizer was not found in PATH, CUDA_HOME or /usr/local/cuda: it comes with the CUDA toolkit"
    return None


def jobs(tools: tuple[str, ...] = TOOLS, only: str = "", extension: bool = True) -> list[Job]:
    """What to run, in order: each tool's planted bug, then its cases; the tools that find most come first."""
    backends = ("triton", "cuda") if extension else ("triton",)
    cases = [
        f"{backend}/{name}"
        for name in catalogue.CASES
        for backend in backends
        if backend == "triton" or name not in catalogue.TRITON_ALONE
    ]
    found = []
    for tool in tools:
        found += [Job(tool, "planted")] if tool in PLANTED else []
        found += [Job(tool, case) for case in cases if re.search(only, case)]
    return found


def names() -> list[str]:
    """What there is to run: `planted`, and each case."""
    return list(dict.fromkeys(job.case for job in jobs()))


def command(tool_path: str, job: Job) -> list[str]:
    """The line that runs a job. A race's warnings count too; a failed call of the API does not: torch tries some."""
    options = ["--tool", job.tool, "--error-exitcode", str(FOUND_CODE), "--print-limit", "5"]
    options += ["--report-api-errors", "no"]
    options += ["--racecheck-report", "all"] if job.tool == "racecheck" else []
    case = f"{job.case}/{job.tool}" if job.case == "planted" else job.case
    return [tool_path, *options, sys.executable, "-m", "bench.sanitize", "--run", case]


def findings(text: str) -> list[str]:
    """The lines in which a tool names a bug, without the places that follow."""
    return [line.strip() for line in re.findall(rf"^=+ +(?:Error: |Warning: )?({BUG}.*)$", text, re.M)]


def summary(text: str) -> int | None:
    """How many errors and hazards the tool counted in all; None if it wrote no summary, so never got there."""
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    return sum(int(errors or hazards) for errors, hazards in counts) if counts else None


def judge(job: Job, code: int, text: str) -> Verdict:
    """What a job's exit code and output amount to."""
    count, bugs = summary(text), findings(text)
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip("= ")), "it said nothing")
    if count is None:
        return Verdict(None, f"the tool did not finish (exit code {code}): {last[:200]}")
    if job.case == "planted":
        if any(re.search(PLANTED[job.tool], bug) for bug in bugs):
            return Verdict(True, None)
        return Verdict(False, f"{job.tool} did not find the bug planted for it, so its other rows prove nothing")
    if count or code == FOUND_CODE:
        return Verdict(False, f"{count} found: {'; '.join(dict.fromkeys(bugs)) or last}"[:400])
    if code:
        return Verdict(False, f"the case failed (exit code {code}): {last[:200]}")
    return Verdict(True, None)


def run_job(tool_path: str, job: Job, seconds: float) -> Verdict:
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command(tool_path, job), cwd=ROOT, env=environment, timeout=seconds, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Verdict(None, f"not finished after {seconds:.0f} s")
    return judge(job, done.returncode, done.stdout)


def sanitize(seconds: float, emit: Emit, tools: tuple[str, ...] = TOOLS, only: str = "") -> None:
    """Run what fits into `seconds`, a row each: `emit("sanitize", name, ok, why, tool=…, seconds=…)`.

    ok is None where nothing was shown: no GPU, no tool, no time.
    """
    if reason := missing():
        emit("sanitize", "sanitize", None, reason)
        return
    if reason := _cuda.available():
        emit("sanitize", "cuda", None, reason)
    began, tool_path = time.monotonic(), find_tool()
    for job in jobs(tools, only, extension=reason is None):
        left = seconds - (time.monotonic() - began)
        if left <= 0:
            emit("sanitize", job.name, None, f"no time left of {seconds:.0f} s", tool=job.tool)
            continue
        started = time.monotonic()
        verdict = run_job(tool_path, job, min(CASE_SECONDS, max(left, 30)))
        emit("sanitize", job.name, verdict.ok, verdict.why, tool=job.tool, seconds=time.monotonic() - started)


def run_case(case: str) -> None:
    """A case in this process.

    Raises:
        InputError: there is no such case.
    """
    backend, _, name = case.partition("/")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if backend == "planted" and name in PLANTED:
        catalogue.planted(name, device)
        torch.cuda.synchronize()
    elif case in names() and case != "planted":
        catalogue.run(backend, name, device)
    else:
        raise InputError(
            f"--run {case}: accepted are {', '.join([f'planted/{tool}' for tool in PLANTED] + names()[1:])}"
        )


def main() -> int:
    parser = Parser(prog="python -m bench.sanitize", description="compute-sanitizer over small shapes of every kernel.")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="may be repeated (all four)")
    parser.add_argument("--only", default="", help="a regular expression that the case's name must match")
    parser.add_argument("--minutes", type=float, default=30.0, help="time to plan into (%(default)s)")
    parser.add_argument("--run", metavar="CASE", help="one case in this process, without a tool")
    args = parser.parse_args()
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: not a regular expression ({error})") from None
    if not any(re.search(args.only, name) for name in names()):
        raise InputError(f"--only {args.only}: no case has such a name; there are {', '.join(names())}")
    if not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes:g}: it must be positive")
    if args.run:
        run_case(args.run)
        return 0
    if reason := missing():
        raise InputError(reason)
    rows: list[tuple[str, bool | None]] = []

    def emit(suite: str, name: str, ok: bool | None, why: str | None = None, **figures) -> None:
        rows.append((name, ok))
        took = f" {figures['seconds']:6.1f} s" if "seconds" in figures else ""
        print(
            f"{ {True: 'clean', False: 'WRONG', None: 'not run'}[ok]:8s}{name:40s}{took}  {why or ''}".rstrip(),
            flush=True,
        )

    sanitize(args.minutes * 60, emit, tuple(args.tool or TOOLS), args.only)
    if wrong := [name for name, ok in rows if ok is False]:
        raise RunError(f"{len(wrong)} of {len(rows)}: {', '.join(wrong)}")
    cases = [ok for name, ok in rows if not name.startswith("planted")]
    if not any(cases or [ok for _, ok in rows]):
        raise InputError("nothing ran: see above, or give --only less and --minutes more")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
