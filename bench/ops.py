"""Single ops and kernels, verified and then timed beside the library's: the stage `ops`, and the rows of bench_ops.py.

A row is op × layer × direction × recipe × precision × images, `conv_bn_act/D3/forward/triton/bf16/b256`; the product of
an input whose batch norm it applies as it loads it is `conv_transpose/G5/forward deferred/…`. Recipes of one piece of
work are timed in turn, each finding its operands in memory and not in a cache (`bench.timing.cold_ms`). A row whose
output is wrong has `ok` false and no times. The floor counts every operand once at the ceilings of the same run,
everything elementwise fused into the products, so a whole op does not reach 1 by itself.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench import ceilings
from bench.group import Bench, one_line
from bench.roofline import Ceilings, Kernel, floor
from bench.subjects import elementwise, gemms, layers, whole
from bench.subjects.accuracy import Subject, arithmetic, verify
from bench.subjects.problems import Problem, Use, distinct, step_problems
from bench.timing import cold_ms, interleave
from bench.tuning.lab import Warmer
from dcgan.arch import Arch
from dcgan.config import fast_bf16
from kernels import dispatch, tuning

Work = Problem | elementwise.Element | layers.Op | whole.Whole
OURS = ("triton", "cuda")
ROUNDS = {"cuda": 15, "cpu": 5}
CHUNK = 64
"""Works whose kernels are compiled together, on all cores, before the first of them runs."""

SECONDS = 1.0
"""The most that timing one piece of work should take, all of its recipes together."""


@dataclass
class Row:
    """One recipe of one piece of work, as `Bench.emit` takes it."""

    name: str
    ok: bool
    why: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)


def step_works(arch: Arch, batch: int, precision: str, device_name: str | None = None) -> Iterator[Work]:
    """All single works of a training step at `batch` images: products, as the device of that name (by default, without
    one) takes their inputs; public ops; what is elementwise."""
    yield from distinct(step_problems(arch, batch, precision, device_name))
    yield from layers.step_ops(arch, batch, precision)
    yield from whole.step_wholes(arch, batch, precision)
    yield from elementwise.step_elements(arch, batch, precision)


def plan(arch: Arch, device: torch.device, batches: tuple[int, ...]) -> Iterator[Work]:
    """The works of the stage, what matters most first: on a GPU bf16 at each batch and then the other precisions at
    the first one; on a CPU its faster precision at the smallest batch, then the other, without what no CPU runs so."""
    if device.type == "cuda":
        order = [(batch, "bf16") for batch in batches] + [(batches[0], name) for name in ("tf32", "fp16", "fp32")]
    else:
        names = ("bf16", "fp32") if fast_bf16(device) else ("fp32", "bf16")
        order = [(min(batches), name) for name in names]
    for batch, precision in order:
        for work in step_works(arch, batch, precision, tuning.device_name(device)):
            if device.type == "cuda" or not isinstance(work, elementwise.Element):
                yield work


def kernels_of(work: Work) -> list[Kernel]:
    found = work.work()
    return found if isinstance(found, list) else [found]


def machine_of(measured: ceilings.Measured | None, precision: str) -> Ceilings | None:
    """The ceilings that a precision's floor is counted against; fp16 products run at bf16's rate."""
    return None if measured is None else measured.of("bf16" if precision == "fp16" else precision)


def build(work: Work, device: torch.device) -> Subject:
    return gemms.build(work, device) if isinstance(work, Problem) else work.build(device)


def compiled_parts(work: Work) -> list[Problem | elementwise.Element]:
    """The products and elementwise kernels that a work launches."""
    if not isinstance(work, layers.Op):
        return [] if isinstance(work, whole.Whole) else [work]
    op, layer = work, work.layer
    if layer.stride != 2:
        return []
    low, ends = min(layer.in_size, layer.out_size), (layer.in_channels, layer.out_channels)
    shared = {"low": low, "images": op.images, "precision": op.precision}
    if op.direction == "forward":
        after = Use("statistics", groups=op.groups) if layer.batch_norm else Use("activation", layer.activation)
        return [Problem(layer.kind, *ends, **shared, use=after)]
    other = "conv_transpose" if layer.kind == "conv" else "conv"
    low_high = ends[::-1] if layer.kind == "conv" else ends
    return [Problem(other, *ends[::-1], **shared), Problem("wgrad", *low_high, **shared)]


def measure(
    work: Work, device: torch.device, measured: ceilings.Measured | None, recipes: tuple[str, ...] | None = None,
    rounds: int | None = None, seconds: float = SECONDS,
) -> list[Row]:  # fmt: skip
    """Verify each recipe of `work` that can run here, and time those that are right beside each other.

    Args:
        measured: the ceilings, for the floor; None: no floor.
        recipes: only these; None: all that can run here.
        rounds, seconds: of the timing, as `bench.timing.interleave`.
    """
    subject = build(work, device)
    names = work.recipes(device)
    rows = {name: verified(work, subject, name) for name in names if recipes is None or name in recipes}
    calls = {name: subject.call(name) for name, row in rows.items() if row.ok}
    if calls:
        with arithmetic(work.precision):
            for name in calls:
                rows[name].figures["peak_memory_bytes"] = peak_bytes(calls[name], device)
            timed = interleave(calls, rounds or ROUNDS[device.type], 1, device, seconds, cold_ms)
        for name in calls:
            rows[name].figures |= timed.figures(name) | rates(work, timed.p50_ms(name), measured)
            if "library" in calls and name != "library":
                rows[name].figures["over_library"] = timed.ratio("library", name).median
    return list(rows.values())


def verified(work: Work, subject: Subject, recipe: str) -> Row:
    row = Row(work.name(recipe), True)
    row.figures = {"recipe": recipe, "precision": work.precision, "batch": work.images}
    row.figures["ours"] = recipe if recipe in OURS else ""
    try:
        error, row.why = verify(subject, recipe)
    except Exception as failure:  # whatever a compiler or a launch can raise: the other recipes go on
        row.ok, row.why = False, one_line(failure)
        return row
    row.ok, row.figures["error_over_allowed"] = row.why is None, error
    return row


def rates(work: Work, ms: float, measured: ceilings.Measured | None) -> dict[str, float | None]:
    """TFLOP/s, GB/s, and the floor with what part of the time it is."""
    kernels = kernels_of(work)
    flops, moved = sum(kernel.flops for kernel in kernels), sum(kernel.bytes for kernel in kernels)
    figures: dict[str, float | None] = {"tflops": flops / ms / 1e9 if flops else None, "gbps": moved / ms / 1e6}
    machine = machine_of(measured, work.precision)
    floor_ms = floor(kernels, machine).floor_us / 1e3 if machine else None
    return figures | {"floor_ms": floor_ms, "roofline": floor_ms / ms if floor_ms else None}


def peak_bytes(call: Any, device: torch.device) -> int | None:
    """The most device memory that a call takes beyond what is there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def ops(bench: Bench, seconds: float) -> None:
    """The stage: rows in the plan's order, until the time is up."""
    began, device = time.perf_counter(), bench.plan.device
    for recipe in OURS:
        if why := dispatch.why_not(recipe, device, torch.bfloat16):
            bench.emit("ops", recipe, None, why)
    batches = bench.plan.peer_batches if device.type == "cuda" else bench.plan.step_batches
    works = list(plan(bench.plan.arch, device, batches))
    with Warmer(device) as warmer:
        for done, work in enumerate(works):
            left = seconds - (time.perf_counter() - began)
            if left <= 0:
                bench.emit("ops", f"{len(works) - done} more", None, f"not in the {seconds:.0f} s of this stage")
                return
            if done % CHUNK == 0:
                warmer.compile([(part, None) for w in works[done : done + CHUNK] for part in compiled_parts(w)])
            one(bench, work, min(left, SECONDS))


def one(bench: Bench, work: Work, seconds: float) -> None:
    """The rows of one piece of work."""
    try:
        rows = measure(work, bench.plan.device, bench.measured, seconds=seconds)
    except Exception as error:  # such as too little memory for the oracle: the next work may be smaller
        bench.emit("ops", work.name("-"), False, one_line(error), batch=work.images)
        return
    reading = {} if bench.telemetry.why else bench.telemetry.read()
    for row in rows:
        bench.emit("ops", row.name, row.ok, row.why, **row.figures, **reading)
