"""What parity checks: the rows to be, in the order of their importance. `bench.parity` runs them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from bench import ops
from bench.subjects import contracts, gemms, layers, whole
from bench.subjects.accuracy import DTYPES, Subject, runnable, verify
from bench.subjects.problems import Problem, Use, distinct, other_problems
from bench.subjects.variants import USES, deferred_uses, served, tiles
from dcgan.arch import PRESETS, Arch
from dcgan.errors import InputError
from kernels import dispatch, tuning
from kernels.geometry import CUDA_CLUSTERS, CUDA_COLUMNS, CudaConfig, Layer

TINY = Arch(image_size=16, nz=8, ngf=16, ndf=16)
FAMILY = {
    "mnist28": PRESETS["mnist28"].arch,
    "dense32": PRESETS["dense32"].arch,
    "128px": Arch(image_size=128),
    "256px": Arch(image_size=256),
    "gray": Arch(image_size=32, channels=1, ngf=32, ndf=32),
    "rgba": Arch(image_size=16, channels=4, nz=7, ngf=20, ndf=20),
}


@dataclass(frozen=True)
class Check:
    """One row to be.

    run: returns why it is wrong, None if it is right, and figures. jobs: what it needs compiled, as arguments of
    `bench.tuning.lab.launches_of`.
    """

    name: str
    section: str
    run: Callable[[], tuple[str | None, dict[str, Any]]]
    jobs: tuple[tuple[Any, Any], ...] = ()


@dataclass(frozen=True)
class Scope:
    """How much: the preset's architecture, batches and precisions in order, repeats, and where."""

    arch: Arch
    device: torch.device
    batches: tuple[int, ...]
    precisions: tuple[str, ...]
    repeats: int
    family: dict[str, Arch]

    @property
    def interpreted(self) -> bool:
        return self.device.type == "cpu" and dispatch.interpreted()


def scope_of(
    device: torch.device, preset: str | None = None, batches: list[int] | None = None,
    precisions: list[str] | None = None,
) -> Scope:  # fmt: skip
    """The device's own where nothing is said."""
    if device.type == "cuda":
        own: tuple[Any, ...] = ((128, 7, 1024, 1, 256), ("bf16", "fp32", "tf32", "fp16"))
        scope = Scope(PRESETS["dcgan64"].arch, device, *own, 1000, FAMILY)
    else:
        own = ((3,), ("fp32", "fp16")) if dispatch.interpreted() else ((3, 1), ("fp32", "bf16", "fp16"))
        small = {name: replace(arch, ngf=8, ndf=8, nz=5) for name, arch in FAMILY.items() if arch.image_size <= 32}
        scope = Scope(TINY, device, *own, 3, {} if dispatch.interpreted() else small)
    if preset:
        scope = replace(scope, arch=PRESETS[preset].arch)
    scope = replace(scope, batches=tuple(batches or scope.batches), precisions=tuple(precisions or scope.precisions))
    if scope.interpreted and "bf16" in scope.precisions:
        raise InputError("--precision bf16: the interpreter's bf16 products are wrong; accepted are fp32, tf32, fp16")
    return scope


class Kept:
    """The subject that was built last: its recipes come one after another."""

    def __init__(self) -> None:
        self.work: Any = None
        self.subject: Subject | None = None

    def of(self, work: Any, build: Callable[[], Subject]) -> Subject:
        if self.work is not work:
            self.work, self.subject = None, None  # before the next one is made, so that both need not fit
            self.subject, self.work = build(), work
        return self.subject


def checks(scope: Scope) -> Iterator[Check]:
    """All of them, in the order of importance; what two batches have in common comes once."""
    seen = set()
    for check in planned(scope):
        if check.name not in seen:
            seen.add(check.name)
            yield check


def planned(scope: Scope) -> Iterator[Check]:
    first, kept = scope.precisions[0], Kept()
    yield from numbers(scope, scope.arch, scope.batches[:1], (first,), kept)
    yield from promises(scope)
    if scope.device.type != "cpu" or scope.interpreted:
        yield from epilogues(scope, kept)
        yield from extension_tiles(scope, kept)
        yield from prologues(scope, kept)
        yield from tuned(scope, kept)
    yield from numbers(scope, scope.arch, scope.batches[:1], scope.precisions[1:], kept)
    yield from same_bits(scope, kept)
    yield from numbers(scope, scope.arch, scope.batches[1:], scope.precisions, kept)
    for name, arch in scope.family.items():
        yield from numbers(scope, arch, (3 if scope.device.type == "cpu" else 7,), scope.precisions[:2], kept, name)


def recipes(scope: Scope, work: Any) -> list[str]:
    """Those that can run here; in the interpreter's process only what is interpreted."""
    found = work.recipes(scope.device)
    return [name for name in found if name in ops.OURS] if scope.interpreted else found


def numbers(
    scope: Scope, arch: Arch, batches: tuple[int, ...], precisions: tuple[str, ...], kept: Kept, prefix: str = ""
) -> Iterator[Check]:  # fmt: skip
    """Section 1 and 6: verified as the benchmarks verify them."""
    for batch, precision in product(batches, precisions):
        alone = layers.network_ops(arch.discriminator, batch, 1, precision)  # as G's step has them
        others = distinct(other_problems(arch, batch, precision))
        for work in (*ops.step_works(arch, batch, precision), *others, *alone):
            build = partial(ops.build, work, scope.device)
            for recipe in recipes(scope, work):
                name = (f"{prefix}:" if prefix else "") + work.name(recipe) + grouped(work)
                jobs = tuple((part, None) for part in ops.compiled_parts(work)) if recipe == "triton" else ()
                yield Check(name, "numbers", partial(verified, kept, work, build, recipe), jobs)


def grouped(work: Any) -> str:
    """What tells [real | fake] from as many images of one kind, after a row's name."""
    groups = work.use.groups if isinstance(work, Problem) else work.groups
    return "" if groups == 1 else f" g{groups}"


def verified(kept: Kept, work: Any, build: Callable[[], Subject], recipe: str) -> tuple[str | None, dict[str, Any]]:
    error, why = verify(kept.of(work, build), recipe)
    return why, {"error_over_allowed": error}


def promises(scope: Scope) -> Iterator[Check]:
    """Section 2: one layer of each public op, and each backend."""
    batch = 2 if scope.device.type == "cpu" else 8
    precision = scope.precisions[0]
    works: dict[str, Any] = {}
    for op in layers.step_ops(scope.arch, batch, precision):
        if op.direction == "forward" and (op.layer.stride == 2 or op.op not in works):
            works[op.op] = op
    functions = {"opcheck": contracts.registration, "compile": contracts.compiled}
    if scope.device.type == "cuda":
        functions["graph"] = contracts.captured
    for what, function in functions.items():
        for op in works.values():
            for recipe in recipes(scope, op):
                yield Check(f"{what}/{op.name(recipe)}", what, promise(function, op, recipe, scope.device))
    seen = set()
    for work in whole.step_wholes(scope.arch, batch, precision):
        for recipe in recipes(scope, work):
            if (work.op, recipe) not in seen:
                seen.add((work.op, recipe))
                run = promise(contracts.registration_of_whole, work, recipe, scope.device)
                yield Check(f"opcheck/{work.name(recipe)}", "opcheck", run)
                if scope.device.type == "cuda":
                    run = promise(contracts.captured_whole, work, recipe, scope.device)
                    yield Check(f"graph/{work.name(recipe)}", "graph", run)


def promise(function: Callable[..., str | None], *arguments: Any) -> Callable[[], tuple[str | None, dict[str, Any]]]:
    return lambda: (function(*arguments), {})


def tiled(scope: Scope) -> Iterator[tuple[bool, Problem, str, Any]]:
    """Each GEMM, geometry and precision on one tile by TMA and one by pointers; and whether it is the one of them all
    whose every use is of interest."""
    sizes: dict[tuple[Any, ...], Layer] = {}
    for layer in (*scope.arch.generator, *scope.arch.discriminator):
        if layer.stride == 2:
            low = min(layer.in_size, layer.out_size)
            sizes.setdefault((low, *sorted((layer.in_channels, layer.out_channels))), layer)
    for number, (precision, ((low, small, large), layer)) in enumerate(product(scope.precisions, sizes.items())):
        for kernel, into, out in (("conv", small, large), ("conv_transpose", large, small), ("wgrad", large, small)):
            p = Problem(kernel, into, out, low, 1, precision, layer.name)
            for path, config in tiles(kernel, into, out, low, precision, scope.device):
                yield number == min(1, len(sizes) - 1), p, path, config


def epilogues(scope: Scope, kept: Kept) -> Iterator[Check]:
    """Section 3: one tile by TMA and one by pointers for each GEMM, geometry and epilogue."""
    device, images = scope.device, 2 if scope.device.type == "cpu" else 6
    few = [Use("statistics", "none", 2, True), Use("activation", "tanh"), Use("activation_grad", "leaky_relu", 2),
           Use("batch_norm_grad", "relu", 2, True)]  # fmt: skip
    for middle, one, path, config in tiled(scope):  # all on one middle layer, in the first precision
        for use in [Use()] if one.kernel == "wgrad" else USES if middle else few:
            p = replace(one, images=images, use=use)
            if not served(p, config):
                continue
            label = f"{p.kernel}[{path}]" if p.kernel == "wgrad" else f"{p.kernel}[{use} {path}]"
            name, build = (
                f"{label}/{p.key}/triton/{p.precision}/b{images}",
                partial(gemms.build, p, device, {path: config}),
            )
            yield Check(name, "epilogues", partial(verified, kept, p, build, path), ((p, config),))


def extension_tiles(scope: Scope, kept: Kept) -> Iterator[Check]:
    """Section 3 as well: every tile of the extension's tensor-core products, on the smallest and the largest low side,
    in boxes that hang over the last images."""
    lows = sorted({min(layer.in_size, layer.out_size) for layer in scope.arch.discriminator if layer.stride == 2})
    precisions = [precision for precision in scope.precisions if DTYPES[precision].itemsize == 2]
    configs = [CudaConfig(columns, cluster) for columns in CUDA_COLUMNS for cluster in CUDA_CLUSTERS]
    uses = [Use("statistics"), Use("statistics", "none", 2, True), Use("activation", "leaky_relu"),
            Use("activation_grad", "relu", 2), Use("batch_norm_grad", "leaky_relu", 2, True)]  # fmt: skip
    kernels = ("conv", "conv_transpose", "wgrad")
    for kernel, precision, low, config in product(kernels, precisions, (lows[0], lows[-1]), configs):
        if "cuda" not in runnable(("cuda",), scope.device, precision, kernel):
            continue
        for use in [Use()] if kernel == "wgrad" else uses:
            p = Problem(kernel, 128, 192, low, 22, precision, "-", use=use)
            name = f"{kernel}[{use} {config.columns}x{config.cluster}]/{p.key}/cuda/{precision}/b{p.images}"
            build = partial(gemms.build, p, scope.device, {"tile": config})
            yield Check(name, "epilogues", partial(verified, kept, p, build, "tile"))


def prologues(scope: Scope, kept: Kept) -> Iterator[Check]:
    """Section 3 too: batch norm in the load, of one group and of two with an odd number of images; in 16 bits also
    whether the bits are those of an `apply` before."""
    device, batches = scope.device, ((2, 2), (1, 3)) if scope.device.type == "cpu" else ((2, 6), (1, 7))
    for (_, one, path, config), (groups, images) in product(tiled(scope), batches):
        for use in deferred_uses(one, groups):
            p = replace(one, images=images, use=use)
            name = f"{p.kernel}[{use} {path}]/{p.key}/triton/{p.precision}/b{images}"
            run = partial(verified, kept, p, partial(gemms.build, p, device, {path: config}), path)
            yield Check(name, "prologues", run, ((p, config),))
            if DTYPES[p.precision].itemsize == 2 and (p.kernel != "wgrad" or groups == 1):  # groups split its boxes
                run, apart = promise(gemms.other_bits, p, device, config), replace(p, use=replace(use, before=None))
                yield Check(f"bits of an apply: {name}", "prologues", run, ((p, config), (apart, config)))


def tuned(scope: Scope, kept: Kept) -> Iterator[Check]:
    """Section 4: each tile of the table with every epilogue, and with its input's batch norm deferred, at its own shape
    and at a smaller, odd batch."""
    if scope.device.type != "cuda":
        return
    table, _ = tuning.load(torch.cuda.get_device_name(scope.device))
    for (kernel, precision), entries in (table.tiles if table else {}).items():
        for entry in entries:
            if entry.tile is None:
                continue
            into, out, size = entry.shape
            one = Problem(kernel, into, out, size // 2 if kernel == "conv" else size, 1, precision, "tuned")
            triton = entry.recipe == "triton"  # the extension has no prologues, and nothing to compile ahead
            deferred = [use for groups in (1, 2) for use in deferred_uses(one, groups)] if triton else []
            for images, uses in ((entry.images, USES[:4]), (6, USES)):
                for use in [*([Use()] if kernel == "wgrad" else uses), *deferred]:
                    p = replace(one, images=images, use=use)
                    if images % use.groups or (not served(p, entry.tile) if triton else use.activation == "tanh"):
                        continue
                    build = partial(gemms.build, p, scope.device, {"tuned": entry.tile})
                    name = f"{kernel}[{use} tuned for {entry.images}]/{p.key}/{entry.recipe}/{precision}/b{images}"
                    run = partial(verified, kept, p, build, "tuned")
                    yield Check(name, "tuned", run, ((p, entry.tile),) if triton else ())


def same_bits(scope: Scope, kept: Kept) -> Iterator[Check]:
    """Section 5, of the backends that promise it."""
    for work in ops.step_works(scope.arch, scope.batches[0], scope.precisions[0]):
        build = partial(ops.build, work, scope.device)
        for recipe in [name for name in recipes(scope, work) if name in ops.OURS]:

            def run(work: Any = work, build: Any = build, recipe: str = recipe) -> tuple[str | None, dict[str, Any]]:
                return contracts.repeats(kept.of(work, build), recipe, scope.repeats), {"repeats": scope.repeats}

            yield Check(f"{scope.repeats} times {work.name(recipe)}{grouped(work)}", "bits", run)
