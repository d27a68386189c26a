"""The stages of `bench.suite`. Each takes the bench and the seconds it has, and emits rows."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench import ceilings, record
from bench.group import Bench, Group
from bench.peers import jax_peer, ladder
from bench.peers.ladder import EXAMPLE, Rung
from bench.stages import ahead
from dcgan.arch import PRESETS, Arch
from dcgan.config import fast_bf16
from kernels import dependent, tuning

TESTS = {"cpu": ("tests/test_fused_step.py",), "cuda": ("tests/test_captured_step.py", "tests/test_sampling.py")}
"""What else parity runs, by device: tests of whole steps, and of sampling. The ladder's rungs are verified as they are
timed."""
CAPTURED = Arch(image_size=32, nz=16, ngf=32, ndf=32), (8, 6), Arch(), 64
"""What tests/test_captured_step.py trains: a small network, its two batches, and one step of a large one."""

STARTS = 5
"""How often a run of parity that ends its own process is started anew."""


def parity(bench: Bench, seconds: float) -> None:
    """Every kernel and op against float64, in processes of its own, which may die of what they find, and the tests of
    whole steps; on a GPU these come first, being what a run depends on. All rows go to `parity.jsonl`; here a count a
    section, recipe and precision, and what is wrong."""
    began, file = time.monotonic(), bench.out / "parity.jsonl"
    share, environments = 1.0, [{}]
    if bench.plan.device.type == "cuda":
        ahead.compile_steps(bench, "parity", captured_jobs(bench))
        whole_steps(bench, seconds * 0.4)
    else:  # Triton's kernels in the interpreter, and PyTorch's own
        share, environments = 0.5, [{"TRITON_INTERPRET": "1"}, {"TRITON_INTERPRET": "0"}]
    rows: list[dict[str, Any]] = []
    for done, environment in enumerate(environments):
        left = seconds * share - (time.monotonic() - began)
        _parity_process(file, max(left / (len(environments) - done), 1.0), environment)
        found = whole_rows(file.read_text()) if file.exists() else []
        rows = [row for row in rows if row["ok"] is None] + found
    for row in counted(rows):
        bench.emit("parity", **row)
    if bench.plan.device.type != "cuda":
        whole_steps(bench, seconds - (time.monotonic() - began))


def whole_steps(bench: Bench, seconds: float) -> None:
    """The tests of `TESTS`, each in a process of its own."""
    began = time.monotonic()
    for tests in TESTS[bench.plan.device.type]:
        if (record.ROOT / tests).exists():
            run_tests(bench, tests, seconds - (time.monotonic() - began))


def captured_jobs(bench: Bench) -> list[ahead.Job]:
    """The steps whose kernels tests/test_captured_step.py would compile one after the other."""
    small, batches, large, images = CAPTURED
    ways = (False, True) if dependent.able(bench.plan.device) else (False,)
    rungs = [Rung(name, ours="fused", dependent=way) for name in ("bf16", "fp32", "tf32", "fp16") for way in ways]
    return [(small, n, rung) for rung in rungs for n in batches] + [(large, images, rungs[0])]


def whole_rows(text: str) -> list[dict[str, Any]]:
    """The rows of a file whose writer may have been ended in the middle of a line."""
    rows = []
    for line in text.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _parity_process(file: Path, seconds: float, environment: dict[str, str]) -> None:
    """`bench.parity` until it ends by itself or its time is up: a row is in `file` as soon as it is known."""
    until = time.monotonic() + seconds
    for _ in range(STARTS):
        minutes = max(until - time.monotonic(), 1.0) / 60
        command = [sys.executable, "-m", "bench.parity", "--rows", str(file), "--minutes", f"{minutes:.3f}"]
        try:
            done = subprocess.run(
                command, cwd=record.ROOT, env=os.environ | environment, capture_output=True, text=True,
                timeout=60 * minutes + 30,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            continue  # it hangs: the next one knows from the journal in which check
        if done.returncode in (0, 3) and not file.with_suffix(".journal").exists():
            return
        if time.monotonic() > until:
            return


def counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each section, recipe and precision, with how many were right; and each row that was wrong."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        parts = row["name"].split("/")
        name = "/".join([row["section"], *parts[-3:-1]]) if len(parts) > 3 else row["name"]
        groups.setdefault(name, []).append(row)
    found = []
    for name, members in groups.items():
        wrong = [row for row in members if row["ok"] is False]
        errors = [row["error_over_allowed"] for row in members if row.get("error_over_allowed") is not None]
        why = f"{len(wrong)} of {len(members)} are wrong" if wrong else members[0].get("why")
        ours = "" if {"eager", "library"} & set(name.split("/")) else "ours"
        found.append({
            "name": name, "ok": False if wrong else members[0]["ok"], "why": why, "checked": len(members),
            "worst_error_over_allowed": max(errors, default=None), "ours": ours,
        })  # fmt: skip
        found += [{"name": row["name"], "ok": False, "why": row["why"], "ours": ours} for row in wrong]
    return found


def run_tests(bench: Bench, tests: str, seconds: float) -> None:
    """A file of tests in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    began = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        bench.emit("parity", tests, None, f"not finished within the {max(seconds, 1.0):.0f} s left of this stage")
        return
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    ok = done.returncode == 0 and counts.get("passed", 0) > 0
    why = None if ok else (done.stdout.strip().splitlines() or ["pytest said nothing"])[-1][:200]
    bench.emit("parity", tests, ok, why, **counts, seconds=time.perf_counter() - began)


def sanitize(bench: Bench, seconds: float) -> None:
    """compute-sanitizer over small shapes of every kernel."""
    from bench.sanitize import sanitize as run

    run(seconds, bench.emit)


def tune(bench: Bench, seconds: float) -> None:
    """The search for the tuned table, in a process of its own: `tuned.json` in the record, from what is in the tree."""
    preset = next((name for name, preset in PRESETS.items() if preset.arch == bench.plan.arch), None)
    if bench.plan.device.type != "cuda" or preset is None:
        what = "needs a GPU and a preset's architecture; python -m bench.tune --dry-run names what it would try"
        bench.emit("tune", "tune", None, what)
        return
    table = bench.out / "tuned.json"
    known = tuning.FOLDER / f"{tuning.slug(torch.cuda.get_device_name(bench.plan.device))}.json"
    if known.exists():
        table.write_bytes(known.read_bytes())
    batches = [part for batch in bench.plan.peer_batches for part in ("--batch", str(batch))]
    command = [sys.executable, "-m", "bench.tune", "--preset", preset, *batches, "--out", str(table)]
    command += ["--minutes", f"{seconds / 60:.2f}", "--record", f"bench/results/{record.machine()}/{bench.out.name}"]
    try:
        done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=seconds + 120)
        text = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1][:200]
        ok = done.returncode == 0
    except subprocess.TimeoutExpired:
        ok, text = False, f"not finished {120} s after its {seconds:.0f} s; the table has what was measured"
    data = json.loads(table.read_text()) if table.exists() else {"tiles": {}, "ops": {}}
    for kernel, key, precision, images, entry in leaves(data["tiles"]):
        figures = {key: entry.get(key) for key in ("us", "library_us")}
        bench.emit("tune", f"{kernel}/{key}/{entry['recipe']}/{precision}/b{images}", True, **figures)
    for op, key, precision, images, recipe in leaves(data["ops"]):
        bench.emit("tune", f"{op}/{key}/{recipe}/{precision}/b{images}", True)
    bench.emit("tune", "tune", ok, text)


def leaves(section: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """(kernel or op, shape, precision, images, entry) of a table's section."""
    for name, keys in section.items():
        for key, precisions in keys.items():
            for precision, counts in precisions.items():
                for images, entry in counts.items():
                    yield name, key, precision, images, entry


def measure_ceilings(bench: Bench, seconds: float) -> None:
    """The rates that floors are counted against; they stay within about this stage's seconds."""
    found = ceilings.measure(bench.plan.device, 200, *(bench.plan.ceiling_sizes or (None, None)), seconds=seconds)
    for precision, rate in found.matrix_tflops.items():
        name = f"matrix product {precision}"
        bench.emit("ceilings", name, True, matrix_tflops=rate, median_over_shortest=found.spread[precision])
    bench.emit("ceilings", "copy", True, copy_tbps=found.copy_tbps, median_over_shortest=found.spread["copy"])
    if found.l2_tbps is not None:
        bench.emit("ceilings", "copy within L2", True, l2_tbps=found.l2_tbps, median_over_shortest=found.spread["l2"])
    gaps = {key: value for key, value in asdict(found).items() if key.endswith("_us") and value is not None}
    if gaps:
        bench.emit("ceilings", "between kernels", True, **gaps)
    for what, why in found.missing.items():
        bench.emit("ceilings", what, None, why)
    bench.measured = found


def peers(bench: Bench, seconds: float) -> None:
    """Every rung, ours among them, at each of the plan's batches."""
    began, batches = time.perf_counter(), bench.plan.peer_batches
    ours = [rung for rung in ladder.RUNGS if rung.ours == "fused"]
    ours = [rung for rung in ours if not ladder.unavailable(rung, bench.plan.arch, bench.plan.device)]
    jobs = [(bench.plan.arch, images, replace(rung, graph=False)) for images in batches for rung in ours]
    ahead.compile_steps(bench, "peers", jobs)
    for done, images in enumerate(batches):
        share = (seconds - (time.perf_counter() - began)) / (len(batches) - done)
        compiled = [rung for rung in ladder.RUNGS if rung.compile]
        quick = [rung for rung in ladder.RUNGS if not rung.compile]
        left = time.perf_counter() + share
        fastest = Group(bench, "peers", images, "eager").run(quick, share * (0.5 if bench.plan.compile else 1.0))
        jax(bench, images, 0.2 * share)
        if not bench.plan.compile:
            for rung in compiled:
                why = ladder.unavailable(rung, bench.plan.arch, bench.plan.device)
                bench.emit("peers", rung.name, None, why or "compiling takes minutes: not in this plan", batch=images)
            continue
        seconds_left = left - time.perf_counter()
        here = [rung for rung in compiled if not ladder.unavailable(rung, bench.plan.arch, bench.plan.device)]
        fits = any(ladder.COMPILE_SECONDS[rung.compile] <= seconds_left for rung in here)
        beside = [rung for rung in quick if fits and rung.name in {EXAMPLE, *fastest}]
        Group(bench, "peers", images, "compiled").run(beside + compiled, seconds_left)


def jax(bench: Bench, images: int, seconds: float) -> None:
    """The step in JAX, timed in a process of its own: not beside the others, so no ratio is taken."""
    rung = Rung("bf16" if fast_bf16(bench.plan.device) else "fp32")
    name = "jax+bf16" if rung.precision == "bf16" else "jax"
    if importlib.util.find_spec("jax") is None:
        bench.emit("peers", name, None, "JAX is not installed", batch=images)
        return
    figures = jax_peer.run(bench.plan.arch, images, seconds, bench.plan.device, rung.precision)
    if "p50_ms" in figures:
        figures["roofline"] = Group(bench, "peers", images, "jax").roofline(rung, figures["p50_ms"])
    bench.emit(
        "peers", figures.pop("name"), figures.pop("ok"), figures.pop("why", None), group="jax", ours="", **figures
    )
