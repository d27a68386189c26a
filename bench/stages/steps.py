"""The suite's stage `step`: ours beside the example and the best peer over batches, image sizes and widths; each part
of the fused step turned off by itself; sampling; and the whole run of PyTorch's tutorial."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

from bench.group import Bench, Group
from bench.peers import ladder, without
from bench.peers.ladder import BEST, EXAMPLE, Rung
from bench.stages import ahead, sampling, tutorial
from dcgan.arch import Arch

Part = tuple[str, int, Callable[[float], object]]
"""A row's name where there is no time for it, its batch, and what measures it in so many seconds."""


def whole(bench: Bench, images: int) -> Rung:
    """Ours with all its parts, on a GPU: with dependent launches where those were the faster ones at so many images."""
    ours = bench.summary.get(f"b{images}", {}).get("ours") or ""
    return Rung("bf16", ours="fused", graph=True, dependent="dependent" in ours)


def rungs(bench: Bench, images: int) -> list[Rung]:
    """The example and ours; on a GPU our fastest alone, and what is likely the best peer that compiles nothing."""
    if bench.plan.device.type == "cuda":
        return [ladder.RUNGS[0], Rung(**BEST, frozen=True, graph=True), whole(bench, images)]
    return [rung for rung in ladder.RUNGS if rung.ours == "fused" or rung.name == EXAMPLE]


def others(arch: Arch, sizes: tuple[int, ...], widths: tuple[int, ...]) -> list[Arch]:
    """`arch` at other image sizes, and at other widths; those that its family does not have are left out."""
    found = []
    changes = [{"image_size": size} for size in sizes] + [{"ngf": width, "ndf": width} for width in widths]
    for change in changes:
        with suppress(ValueError):
            found.append(replace(arch, **change))
    return [other for other in found if other != arch]


def ablation(bench: Bench, images: int, seconds: float) -> None:
    """The fused step beside itself with one part off; `gain` is what the part saves, as a ratio."""
    Group(bench, "step", images, "ablation").run(ablated(bench, images), seconds)


def ablated(bench: Bench, images: int) -> list[Rung]:
    all_of_it = whole(bench, images)
    parts = [part for part in without.PARTS if part != "dependent" or all_of_it.dependent]
    return [all_of_it, *(replace(all_of_it, off=part) for part in parts)]


def parts(bench: Bench) -> Iterator[Part]:
    """What the stage measures, in its order."""
    plan = bench.plan

    def group(images: int, arch: Arch | None = None) -> Callable[[float], object]:
        name = "scaling" if arch else "step"
        return lambda seconds: Group(bench, "step", images, name, arch).run(rungs(bench, images), seconds)

    first = [images for images in plan.step_batches if images in plan.peer_batches]
    for images in first:
        yield f"b{images}", images, group(images)
    for images in plan.ablated:
        yield f"ablation/b{images}", images, lambda seconds, images=images: ablation(bench, images, seconds)
    yield "sampling", max(plan.step_batches), lambda seconds: sampling.sampling(bench, seconds)
    for images in plan.step_batches:
        if images not in first:
            yield f"b{images}", images, group(images)
    images = plan.peer_batches[0]
    for arch in others(plan.arch, plan.sizes, plan.widths):
        yield f"{arch.image_size}px/f{arch.ngf}/b{images}", images, group(images, arch)
    if plan.pictures:  # last, where it has all the time that is left
        yield "tutorial", tutorial.BATCH, lambda seconds: tutorial.tutorial(bench, seconds, plan.pictures)


def step(bench: Bench, seconds: float) -> None:
    """All of them while there is time, each an equal share of what is left."""
    began, plan = time.perf_counter(), bench.plan
    planned = []
    for name, images, run in parts(bench):
        if name in bench.summary:
            bench.emit("step", name, None, "measured in the stage peers", batch=images)
        else:
            planned.append((name, images, run))
    batches = [(plan.arch, images) for name, images, _ in planned if name == f"b{images}"]
    scaled = [(arch, plan.peer_batches[0]) for arch in others(plan.arch, plan.sizes, plan.widths)]
    jobs = [(arch, images, whole(bench, images)) for arch, images in batches + scaled]
    jobs += [(plan.arch, images, rung) for images in plan.ablated for rung in ablated(bench, images)]
    jobs = [job for job in jobs if job[2].off not in (without.GRAPH, "products")]
    ahead.compile_steps(bench, "step", jobs)
    for done, (name, images, run) in enumerate(planned):
        left = seconds - (time.perf_counter() - began)
        if left <= 0 and done:
            bench.emit("step", name, None, f"no time left of this stage's {seconds:.0f} s", batch=images)
        else:
            run(left / (len(planned) - done))
