"""Whether `--fused` in bf16 trains as good a generator as eager PyTorch in fp32: the same runs, over several seeds.

    python -m bench.quality --data SPEC --out DIR [--steps N] [--seeds 3] [--minutes M] [--preset P] [--image-size S]
                            [--batch-size B] [--device D]

Trains both from the command line, `DIR/fused-bf16-seed0`, `DIR/eager-fp32-seed0`, …, and compares what each generator
makes of the same noise with real pictures by a quarter, a half and all of the steps: the mean over a run's last five
checkpoints there, a hundredth of the steps apart. A finished run is not repeated; an interrupted one continues.
`DIR/rows.jsonl`, `env.json` and `README.md` are a record; docs/quality.md says how to read it. Exit codes: 0; 2 for
wrong input; 3 if fused is worse than the seeds' spread allows, or a run failed.
"""

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

from bench import record
from bench.group import Bench
from bench.pages import overlay
from bench.samples.judge import MEASURES, SEED, T_975, Judge, compare, table
from bench.samples.study import CHECKPOINTS, VARIANTS, Study
from dcgan import progress
from dcgan.arch import PRESETS
from dcgan.config import choose_device
from dcgan.data import open_images
from dcgan.errors import InputError, RunError, run_command, say
from dcgan.flags import Parser, positive
from dcgan.generate import sample
from dcgan.loading import load

STAGE = {"cuda": (2000, 260.0), "cpu": (400, 4800.0)}
"""For the suite: steps, and the seconds that six such runs and the comparison may need, a guess."""

Emit = Callable[..., None]


def launch(arguments: list[str], seconds: float) -> tuple[int, str]:
    """`dcgan.train` in its own process: its exit code and last words; stopped, with a checkpoint, after `seconds`."""
    command = [sys.executable, "-m", "dcgan.train", *arguments]
    process = subprocess.Popen(command, cwd=record.ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        said = process.communicate(timeout=seconds if math.isfinite(seconds) else None)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        said = process.communicate()[1]
    finally:
        if process.poll() is None:  # we are interrupted: let it save first
            process.terminate()
            process.communicate()
    return process.returncode, (said.strip().splitlines() or [""])[-1]


def train(study: Study, emit: Emit, seconds: float) -> None:
    """Train whatever is missing, both variants of a seed in turn. Emits a row a run that failed or found no time."""
    until = time.monotonic() + seconds
    for seed in range(study.seeds):
        for variant in VARIANTS:
            if unfinished := advance(study, variant, seed, until):
                emit("quality", study.run(variant, seed).name, *unfinished)


def advance(study: Study, variant: str, seed: int, until: float) -> tuple[bool | None, str] | None:
    """Train a run from milestone to milestone: `ok` and `why` of a row where it does not get to the end."""
    study.keep(variant, seed)
    for milestone in study.milestones:
        if not study.missing(variant, seed, milestone):
            continue
        if (left := until - time.monotonic()) <= 0:
            return None, "no time left"
        say(f"training {study.run(variant, seed)} to step {milestone}")
        code, said = launch(study.arguments(variant, seed, milestone), left)
        study.keep(variant, seed)
        if code in (128 + signal.SIGTERM, -signal.SIGTERM):  # the latter before it could save
            return None, "not finished within the time"
        if code:
            return False, f"exit code {code}: {said}"[:200]
        if missing := study.missing(variant, seed, milestone):
            steps = ", ".join(map(str, missing))
            return False, f"no whole checkpoint after step {steps}: remove the run's folder to repeat it"
    return None


def course(run: Path, step: int) -> dict[str, float]:
    """How training went: the mean losses and D(x) over the tenth before `step`, and the training seconds until then."""
    lines = [line for line in progress.read(run / "metrics.jsonl") if 0.9 * step < line["step"] <= step]
    if not lines:
        return {}
    means = {name: mean(line[name] for line in lines) for name in ("loss_d", "loss_g", "d_real", "d_fake_before")}
    return means | {"seconds": lines[-1]["seconds"]}


def judged(study: Study, emit: Emit, judge: Judge, variant: str, seed: int, milestone: int) -> dict[str, float]:
    """A run's figures at a milestone, the means over its checkpoints there. Emits a row each, and one of the means."""
    run, each = study.run(variant, seed), []
    for step in study.window(milestone):
        generator = load(study.kept(variant, seed, step), device=study.device)
        each.append(judge(torch.cat(list(sample(generator, len(judge.real), SEED))).to(study.device)))
        emit("quality", f"{run.name}/checkpoint{step}", True, step=step, **each[-1])
    means = {name: mean(figures[name] for figures in each) for name in MEASURES}
    about = {"step": milestone, "checkpoints": len(each), **course(run, milestone)}
    emit("quality", f"{run.name}/step{milestone}", True, **about, **means)
    return means


def measure(study: Study, emit: Emit, judge: Judge) -> None:
    """Compare the generators of each milestone that all runs have reached: a row each, and one a measure."""
    about = {"accuracy": judge.accuracy, "labels": "given" if judge.labelled else "which way up"}
    emit("quality", "real", True, samples=len(judge.real), **about, **judge.halves())
    for milestone in study.milestones:
        runs = {v: [s for s in range(study.seeds) if not study.missing(v, s, milestone)] for v in VARIANTS}
        there = [len(runs[variant]) for variant in ("fused-bf16", "eager-fp32")]
        found = {}
        if min(there) == study.seeds:
            found = {v: [judged(study, emit, judge, v, seed, milestone) for seed in runs[v]] for v in VARIANTS}
        for name in MEASURES:
            settings = {"step": milestone, "seeds": study.seeds, "measure": name}
            if not found:
                why = f"{there[0]} + {there[1]} runs got there"
                emit("quality", f"{name}/step{milestone}", None, why, **settings)
                continue
            fused, eager = ([figures[name] for figures in found[v]] for v in ("fused-bf16", "eager-fp32"))
            result = compare(fused, eager)
            ok = {"worse": False, None: None}.get(result["verdict"], True)
            why = {False: "fused is worse than the seeds' spread allows", None: "one seed has no spread"}.get(ok)
            emit("quality", f"{name}/step{milestone}", ok, why, **settings, **result)


def quality(bench: Bench, seconds: float) -> None:
    """The suite's stage: a short study on the digits, three seeds, in the architecture of the plan."""
    steps, needs_s = STAGE[bench.plan.device.type]
    if seconds < needs_s:
        why = f"about {needs_s:.0f} s are needed, {seconds:.0f} are there: python -m bench.quality"
        bench.emit("quality", "quality", None, why)
        return
    began, images = time.monotonic(), open_images("digits", bench.plan.arch.image_size, progress=False)
    arch = replace(bench.plan.arch, channels=images.images.shape[-1])
    with tempfile.TemporaryDirectory() as folder:
        study = Study(images, arch, Path(folder), steps, 3, 64, bench.plan.device)
        judge = Judge(images, study.device)
        train(study, bench.emit, 0.75 * seconds - (time.monotonic() - began))
        measure(study, bench.emit, judge)


def study_of(args) -> Study:
    """What the command line asks for. Raises InputError for what cannot be."""
    if not 1 <= args.seeds <= max(T_975):
        raise InputError(f"--seeds {args.seeds}: accepted are 1 to {max(T_975)}")
    if args.steps < 4:
        raise InputError(f"--steps {args.steps}: at least 4: runs are also compared at a quarter")
    if args.minutes is not None and not args.minutes > 0:
        raise InputError(f"--minutes {args.minutes:g}: it must be positive")
    device = choose_device(args.device)
    preset = PRESETS[args.preset or ("dcgan64" if device.type == "cuda" else "small32")]
    try:
        arch = replace(preset.arch, image_size=args.image_size or preset.arch.image_size)
    except ValueError as error:
        raise InputError(f"--image-size {args.image_size}: {error}") from None
    images = open_images(args.data, arch.image_size)
    arch = replace(arch, channels=images.images.shape[-1])
    batch_size = min(args.batch_size or preset.batch_size, len(images.images))
    study = Study(images, arch, args.out.absolute(), args.steps, args.seeds, batch_size, device)
    for seed in range(study.seeds):
        for variant in VARIANTS:
            study.check(variant, seed)
    return study


def infinite(value: object) -> bool:
    """Whether JSON has no way to write it."""
    return isinstance(value, float) and not math.isfinite(value)


def readme(title: str, environment: dict, rows: list[dict]) -> str:
    """The record in words: what was compared, where, and the table."""
    where = environment["gpu"] or f"{environment['cpu']}, {environment['threads']} of {environment['cores']} threads"
    commit = (environment["commit"] or "an unknown commit")[:12] + (" with changes" if environment["dirty"] else "")
    return (
        f"# {title}\n\n`python -m bench.quality` at {commit} on {where}, torch {environment['torch']}; load average "
        f"{environment['load_average']:.2f} at the end: on a busy machine the rows' `seconds` of training say little.\n"
        f"A run's figure is the mean over its last {environment['checkpoints']} checkpoints up to the step, "
        f"{environment['checkpoint_every']} steps apart.\n"
        f"docs/quality.md says how to read the table.\n\n{table(rows)}\n"
    )


def write(study: Study, rows: list[dict], commit: str | None) -> None:
    """The record and the curves into the study's folder, over those of an earlier call."""
    environment = record.environment(commit) | {"device": study.device.type, "data": study.images.name}
    environment |= {"arch": str(study.arch), "batch_size": study.batch_size}
    environment |= {"checkpoints": CHECKPOINTS, "checkpoint_every": study.every}
    (study.out / "env.json").write_text(json.dumps(environment, indent=1) + "\n")
    lines = [{key: None if infinite(value) else value for key, value in row.items()} for row in rows]
    (study.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    title = f"{study.images.name}, {study.steps:,} steps of {study.batch_size}, {study.seeds} seeds"
    (study.out / "README.md").write_text(readme(title, environment, rows))
    runs = {v: [study.run(v, seed) / "metrics.jsonl" for seed in range(study.seeds)] for v in VARIANTS}
    metrics = {variant: [progress.read(path) for path in paths if path.exists()] for variant, paths in runs.items()}
    (study.out / "curves.html").write_text(overlay.render(title, metrics))


def command() -> int:
    parser = Parser(
        prog="python -m bench.quality", description="Compare samples of fused bf16 and eager fp32 training."
    )
    parser.add_argument("--data", default="digits", metavar="SPEC", help="as in dcgan.train (digits)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; those that are there are kept")
    parser.add_argument("--steps", type=positive, default=20_000, help="steps per run (20000)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per method, 1 to 10 (3)")
    parser.add_argument("--minutes", type=float, help="stop training after this many; the same command continues")
    parser.add_argument("--preset", choices=PRESETS, help="default: dcgan64 on a GPU, small32 on a CPU")
    parser.add_argument("--image-size", type=positive, metavar="S", help="16, 28, 32, 64, 128 or 256")
    parser.add_argument("--batch-size", type=positive, metavar="B")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--commit", help="commit of a tree without git data")
    args = parser.parse_args()
    study, rows = study_of(args), []
    study.out.mkdir(parents=True, exist_ok=True)

    def emit(suite: str, name: str, ok: bool | None, why: str | None = None, **figures) -> None:
        rows.append({"suite": suite, "name": name, "ok": ok, **({} if why is None else {"why": why}), **figures})
        say(f"{name}: {why or ', '.join(f'{k} {v:.4g}' for k, v in figures.items() if isinstance(v, float))}")

    train(study, emit, math.inf if args.minutes is None else 60 * args.minutes)
    measure(study, emit, Judge(study.images, study.device))
    write(study, rows, args.commit)
    print(table(rows))
    if wrong := [row["name"] for row in rows if row["ok"] is False]:
        raise RunError(f"worse or failed: {', '.join(wrong)}; {study.out / 'rows.jsonl'} has the figures")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
