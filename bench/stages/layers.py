"""The suite's stage `profile`: where a step's time goes, ours by layer and by kernel, the best peer's by kernel."""

from dataclasses import asdict

from bench import profile
from bench.group import Bench
from bench.peers import ladder
from bench.peers.ladder import Rung
from bench.timing import one_line
from bench.trace import measure_counters, words
from bench.verify import tolerance_class
from dcgan.config import fast_bf16


def profile_step(bench: Bench, seconds: float) -> None:
    """The fused step's layers beside their floors, and its operations."""
    if bench.measured is None:
        bench.emit("profile", "floors", None, "no ceilings were measured: add the stage ceilings")
        return
    plan = bench.plan
    rung, images = Rung("bf16" if fast_bf16(plan.device) else "fp32", ours="fused"), plan.peer_batches[0]
    runner = ladder.build(rung, plan.arch, ladder.weights(plan.arch), plan.device, images)
    machine = bench.measured.of(tolerance_class(rung.precision, plan.device))
    found = profile.profile(runner, plan.arch, images, plan.device, machine, 2, bench.out / "trace.json")
    (bench.out / "profile.txt").write_text(f"{rung.name}, batch {images}\n{profile.text(found)}")
    for row in found.layers:
        bench.emit("profile", row["name"], True, batch=images, rung=rung.name, ms=row["ms"], floor_ms=row["floor_ms"])
    if plan.device.type != "cuda":
        return
    profile_peers(bench, images)
    seen = profile.captured(rung, plan.arch, images, plan.device, bench.out / "trace.json")  # the one to keep
    if seen is None:
        bench.emit("profile", "captured step", None, "the profiler saw no kernels of the device")
    else:
        facts = {name: value for name, value in asdict(seen).items() if not isinstance(value, dict)}
        waits, allocations = sum(seen.waits.values()), sum(seen.allocations.values())
        bench.emit("profile", "captured step", True, batch=images, waits=waits, allocations=allocations, **facts)
        with (bench.out / "profile.txt").open("a") as file:
            file.write(f"\nthe captured step: {words(seen)}\n")
    try:
        size = ["--batch-size", str(images), "--precision", rung.precision]  # of the preset dcgan64
        rows = measure_counters([*size, "--once"], max(seconds, 60.0))
    except ValueError as error:
        bench.emit("profile", "counters", None, str(error))
        return
    with (bench.out / "profile.txt").open("a") as file:
        file.write("\n" + profile.counted_text(rows))
    for row in rows:
        bench.emit("profile", f"counters/{row.pop('name')[:80]}", True, batch=images, **row)


def profile_peers(bench: Bench, images: int) -> None:
    """Where the example's and the best peer's time goes, by kernel, and how many kernels a step has."""
    best = bench.summary.get(f"b{images}", {}).get("best_peer") or Rung(**ladder.BEST, frozen=True, graph=True).name
    for rung in (rung for rung in ladder.RUNGS if rung.name in (ladder.EXAMPLE, best)):
        plan = bench.plan
        try:
            runner = ladder.build(rung, plan.arch, ladder.weights(plan.arch), plan.device, images)
            found = profile.profile(runner, plan.arch, images, plan.device, bench.measured.of("bf16"), 2)
        except Exception as error:  # as in the ladder, a peer's failure is its own affair
            bench.emit("profile", f"kernels/{rung.name}", None, one_line(error), batch=images)
            continue
        figures = {"kernels": sum(row["calls"] for row in found.operations)}
        figures["kernels_ms"] = sum(row["ms"] for row in found.operations)
        bench.emit("profile", f"kernels/{rung.name}", True, batch=images, **figures)
        with (bench.out / "profile.txt").open("a") as file:
            file.write(f"\n{rung.name}, batch {images}, {figures['kernels']:.0f} kernels\n{profile.text(found)}")
