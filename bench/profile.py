"""Where a training step's time goes: by layer beside its floor, and by operation.

    python -m bench.profile [--preset dcgan64] [--batch-size N] [--step fused|reference|example] [--precision P]
                            [--steps 3] [--tflops T --tbps B] [--out trace.json] [--counters]

The fused step's layers are marked from outside, by ranges around each stage's calls, so nothing in the step knows of
it; the other steps have only the table by operation. On a CPU a range's time is the wall clock's, on a GPU that of the
kernels launched in it; that part has not run on a GPU yet. The floors are those of `bench.roofline` at
this machine's ceilings, measured first unless given. `--out` writes a trace for chrome://tracing or ui.perfetto.dev.
On a GPU a trace of the captured step gives its nodes, gaps and waits, and `--counters` asks Nsight Compute (`ncu`) what
bounds each kernel.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from bench import ceilings
from bench.peers import ladder
from bench.peers.ladder import Rung, Runner
from bench.roofline import Ceilings, step_kernels
from bench.trace import Timeline, measure_counters, read
from bench.verify import tolerance_class
from dcgan import cpu_stacks
from dcgan.arch import PRESETS, Arch
from dcgan.config import fast_bf16
from dcgan.errors import InputError, RunError, run_command
from dcgan.flags import Parser
from dcgan.fused import FusedStep

MARK = "dcgan: "
"""What the names of our ranges begin with."""

RUNGS = {"fused": "fused", "reference": "reference", "example": ""}


@dataclass(frozen=True)
class Profile:
    """Figures of one step, averaged.

    step_ms: from the profiler's own clock, its overhead included: a timing is `bench.suite`'s matter.
    layers: rows `name`, `ms`, `floor_ms` (None if the roofline has no such kernel), the slowest first.
    operations: rows `name`, `calls` a step, `ms` of its own, the slowest first.
    """

    step_ms: float
    layers: list[dict[str, Any]]
    operations: list[dict[str, Any]]

    @property
    def marked_ms(self) -> float:
        return sum(row["ms"] for row in self.layers)


def mark(step: FusedStep) -> None:
    """Put a range named `section layer`, in the roofline's words, around each call that a stage of `step` makes; where
    the step runs over launchers, `section kernel` around each launch."""
    section = {"now": "pack"}

    def within(owner: object, method: str, name: Callable[..., str]) -> None:
        inner = getattr(owner, method)

        def outer(*args, **kwargs):
            with record_function(MARK + name()):
                return inner(*args, **kwargs)

        setattr(owner, method, outer)

    def entering(stack: object, method: str, name: Callable[..., str]) -> None:
        inner = getattr(stack, method)

        def outer(*args, **kwargs):
            section["now"] = name(**kwargs)
            try:
                return inner(*args, **kwargs)
            finally:
                section["now"] = "pack"

        setattr(stack, method, outer)

    g, d = step.generator, step.discriminator
    entering(g, "forward", lambda **_: "G fwd")
    entering(g, "backward", lambda **_: "G dgrad")
    entering(d, "forward", lambda real, **_: "D fwd" if len(real) == 2 else "G step: D fwd")
    entering(d, "backward", lambda weights, **_: "D dgrad" if weights else "G step: D dgrad")
    within(g, "update", lambda: "Adam G")
    within(d, "update", lambda: "Adam D")
    if not isinstance(g, cpu_stacks.Generator):  # a layer's stage has no calls of its own: the launchers have
        for stack in (g, d):
            stack.launch = SimpleNamespace(**vars(stack.launch))
            for kernel in vars(stack.launch):
                within(stack.launch, kernel, lambda kernel=kernel: f"{section['now']} {kernel}")
        return
    for stage in (*g.stages, *d.stages):

        def name(layer=stage.layer.name) -> str:
            return f"{section['now']} {layer}"

        for owner, methods in ((stage, ("activate", "activate_backward")), (stage.product, PRODUCT_METHODS)):
            for method in methods:
                within(owner, method, name)
        within(stage, "weight_backward", lambda layer=stage.layer.name: f"{layer[0]} wgrad {layer}")


PRODUCT_METHODS = ("pack", "high", "low", "to_low", "to_high")


def floors_ms(arch: Arch, images: int, machine: Ceilings) -> dict[str, float]:
    """The floor of each `section layer`, as `mark` names it. D's head has one backward, here with its data gradient."""
    head = arch.discriminator[-1].name
    renamed = {f"D head {head} fwd": f"D fwd {head}", f"D head {head} bwd": f"D dgrad {head}"}
    named = ((f"{kernel.section} {kernel.layer}", kernel) for kernel in step_kernels(arch, images))
    return {renamed.get(name, name): kernel.floor_us(machine) / 1e3 for name, kernel in named}


def profile(
    runner: Runner,
    arch: Arch,
    images: int,
    device: torch.device,
    machine: Ceilings,
    steps: int = 3,
    trace: Path | None = None,
) -> Profile:
    """Profile `steps` steps of `runner`, after as many unprofiled; the trace goes to `trace`."""
    if isinstance(runner.step, FusedStep):
        mark(runner.step)
    real, z = ladder.batches(arch, images, device, 1)[0]
    real = runner.rung.images(real)
    for _ in range(steps):
        runner(real, z)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(MARK + "step"):
                runner(real, z)
        if cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    floors, layers, operations, step_ms = floors_ms(arch, images, machine), [], [], 0.0
    for event in profiler.key_averages():
        on_host, marked = event.device_type == DeviceType.CPU, event.key.startswith(MARK)
        if (not on_host and event.is_user_annotation) or (cuda and on_host and not marked):
            continue  # on a GPU: ranges are taken from the host's side, operations are the kernels themselves
        total = event.device_time_total if cuda else event.cpu_time_total
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key == MARK + "step":
            step_ms = total / 1e3 / steps
        elif marked:
            name = event.key.removeprefix(MARK)
            layers.append({"name": name, "ms": total / 1e3 / steps, "floor_ms": floors.get(name)})
        elif own > 0:
            operations.append({"name": event.key, "calls": event.count / steps, "ms": own / 1e3 / steps})
    return Profile(step_ms, by_ms(layers), by_ms(operations))


def captured(
    rung: Rung, arch: Arch, images: int, device: torch.device, trace: Path, steps: int = 10
) -> Timeline | None:
    """The timeline of `rung` replayed as one CUDA graph; its trace is written to `trace`."""
    runner = ladder.build(replace(rung, graph=True), arch, ladder.weights(arch), device, images)
    batch = ladder.batches(arch, images, device, 1)[0]
    runner(*batch)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            runner(*batch)
        torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    return read(trace, steps)


def once(runner: Runner, arch: Arch, images: int, device: torch.device) -> None:
    """One step in an NVTX range called `counted`, for ncu, after one outside that compiles."""
    real, z = ladder.batches(arch, images, device, 1)[0]
    runner(real, z)
    torch.cuda.synchronize(device)
    torch.cuda.nvtx.range_push("counted")
    runner(real, z)
    torch.cuda.synchronize(device)
    torch.cuda.nvtx.range_pop()


def counted_text(rows: list[dict]) -> str:
    """The counters' table: fractions of the chip's peak."""
    lines = [f"{'kernel':48s} {'calls':>6s} {'µs':>9s} {'compute':>8s} {'L2':>6s} {'memory':>7s}"]
    for row in rows:
        shares = (row.get(name, float("nan")) for name in ("compute", "l2", "memory"))
        lines.append(
            "{:48s} {:6d} {:9.1f} {:8.2f} {:6.2f} {:7.2f}".format(row["name"][:48], row["calls"], row["us"], *shares)
        )
    return "\n".join(lines) + "\n"


def by_ms(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: -row["ms"])


def text(found: Profile, operations: int = 25) -> str:
    """Both tables; times in milliseconds a step."""
    lines = [f"step {found.step_ms:.2f} ms under the profiler"]
    if found.layers:
        lines += ["", f"{'section and layer':24s} {'ms':>9s} {'floor ms':>9s} {'of floor':>9s}"]
        for row in found.layers:
            floor_ms = row["floor_ms"]
            known = "" if floor_ms is None else f"{floor_ms:9.3f} {floor_ms / max(row['ms'], 1e-9):9.2f}"
            lines.append(f"{row['name']:24s} {row['ms']:9.3f} {known}".rstrip())
        rest = found.step_ms - found.marked_ms
        lines.append(f"{'losses and the rest':24s} {rest:9.3f}")
    lines += ["", f"{'operation':48s} {'calls':>7s} {'ms':>9s}"]
    for row in found.operations[:operations]:
        lines.append(f"{row['name'][:48]:48s} {row['calls']:7.1f} {row['ms']:9.3f}")
    return "\n".join(lines) + "\n"


def command() -> int:
    parser = Parser(prog="python -m bench.profile", description="Where a training step's time goes.")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--batch-size", type=int, help="images per step (the preset's)")
    parser.add_argument("--step", choices=RUNGS, default="fused", help="the step to profile (fused)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="bf16 where fast (auto)")
    parser.add_argument("--steps", type=int, default=3, help="steps to average over (3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tflops", type=float, help="matrix rate for the floors, TFLOP/s (measured)")
    parser.add_argument("--tbps", type=float, help="memory bandwidth for the floors, TB/s (measured)")
    parser.add_argument("--out", type=Path, help="where to write the trace")
    parser.add_argument(
        "--counters", action="store_true", help="also Nsight Compute's counters of each kernel (needs ncu)"
    )
    parser.add_argument("--once", action="store_true", help="one step in an NVTX range and nothing else, for ncu")
    args = parser.parse_args()
    preset, device = PRESETS[args.preset], torch.device(args.device)
    images = preset.batch_size if args.batch_size is None else args.batch_size
    if min(images, args.steps) < 1:
        raise InputError(f"--batch-size {images} --steps {args.steps}: each must be at least 1")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here; accepted is cpu")
    if args.out and not args.out.resolve().parent.is_dir():
        raise InputError(f"--out {args.out}: its folder does not exist")
    if any(value is not None and value <= 0 for value in (args.tflops, args.tbps)):
        raise InputError(f"--tflops {args.tflops} --tbps {args.tbps}: each must be positive")
    precision = ("bf16" if fast_bf16(device) else "fp32") if args.precision == "auto" else args.precision
    rung = Rung(precision, ours=RUNGS[args.step])
    if why := ladder.unavailable(rung, preset.arch, device):
        raise InputError(f"--step {args.step} --preset {args.preset}: {why}")
    if (args.counters or args.once) and device.type != "cuda":
        raise InputError("--counters and --once need a GPU; the device is cpu")
    if args.once:
        once(ladder.build(rung, preset.arch, ladder.weights(preset.arch), device, images), preset.arch, images, device)
        return 0
    if args.tflops and args.tbps:
        machine = Ceilings(args.tflops, args.tbps)
    else:
        measured = ceilings.measure(device).of(tolerance_class(precision, device))
        machine = Ceilings(args.tflops or measured.tflops, args.tbps or measured.tbps)
    runner = ladder.build(rung, preset.arch, ladder.weights(preset.arch), device, images)
    found = profile(runner, preset.arch, images, device, machine, args.steps, args.out)
    print(f"{rung.name}, {args.preset}, batch {images}, on {device.type}; ", end="")
    print(f"floors at {machine.tflops:.3g} TFLOP/s and {machine.tbps:.3g} TB/s")
    print(text(found), end="")
    if args.counters:
        same = ["--preset", args.preset, "--batch-size", str(images), "--step", args.step, "--precision", precision]
        try:
            print(counted_text(measure_counters([*same, "--once"], 600)), end="")
        except ValueError as error:
            raise RunError(f"--counters: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
