"""A tuned table's shapes on a device: their candidates compiled ahead, checked, and timed; see `bench.tune`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch

from bench.group import one_line
from bench.subjects import elementwise, gemms
from bench.subjects.accuracy import Noise, Subject, arithmetic, runnable, verify
from bench.subjects.elementwise import Element
from bench.subjects.problems import Problem, Use, distinct, step_problems
from bench.timing import cold_ms, interleave
from bench.tuning import precompile
from bench.tuning.precompile import Compiler
from bench.tuning.search import EXTENSION, Journal
from dcgan.arch import Arch
from kernels.geometry import CUDA_COLUMNS, CudaConfig


@dataclass(frozen=True)
class Shape:
    """One entry of the table: a kernel's problem, with every epilogue that a step gives it."""

    problem: Problem
    uses: tuple[Use, ...]

    @property
    def name(self) -> str:
        p = self.problem
        return f"{p.kernel}/{p.key}/{p.precision}/b{p.images}"

    def problems(self) -> list[Problem]:
        return [replace(self.problem, use=use) for use in self.uses]


def shapes(arch: Arch, batches: Sequence[int], precision: str) -> list[Shape]:
    """Every kernel × shape × images of the steps of these batches; of each batch those with most work first."""
    found: dict[str, Shape] = {}
    for batch in batches:
        mine: dict[str, Shape] = {}
        for problem in distinct(step_problems(arch, batch, precision)):
            merge(mine, Shape(problem, (problem.use,)))
        for shape in sorted(mine.values(), key=lambda shape: -shape.problem.flops * len(shape.uses)):
            merge(found, shape)
    return list(found.values())


def merge(found: dict[str, Shape], shape: Shape) -> None:
    """Add a shape, or its uses to those of the one that is there."""
    known = found.get(shape.name, shape)
    found[shape.name] = Shape(known.problem, tuple(dict.fromkeys((*known.uses, *shape.uses))))


def extension(shape: Shape, device: torch.device) -> dict[str, CudaConfig | None]:
    """The extension's tiles of a shape, by name, None for one that it has no choice of; nothing where some use of the
    shape has no kernel of it on this device, and would be Triton's."""
    from kernels._cuda import conv

    if "cuda" not in runnable(("cuda",), device, shape.problem.precision, shape.problem.kernel):
        return {}
    for problem in shape.problems():
        if problem.use.before is not None:  # it has no prologues
            return {}
        o = gemms.operands(problem, torch.device("meta"))
        if conv.missing(problem.kernel, o.first, o.second, o.epilogue):
            return {}
    p = shape.problem
    if p.into in conv.image.IMAGE_CHANNELS or p.out in conv.image.IMAGE_CHANNELS:
        return {EXTENSION: None}
    clusters = (1, 2, 4) if conv.source(torch.empty(0, device=device)) == "sm90" else (1,)
    width = p.into if p.kernel == "wgrad" else p.out
    configs = [CudaConfig(columns, cluster) for columns in CUDA_COLUMNS if columns <= width for cluster in clusters]
    return {f"{EXTENSION} {c.columns}x{c.cluster}": c for c in configs}


def launches_of(work: Problem | Element, config: Any, arch: int) -> tuple:
    """The launches of a product on a tile (its default where None), or of an elementwise kernel, on meta tensors."""
    meta = torch.device("meta")
    if isinstance(work, Problem):
        return gemms.job(work, gemms.operands(work, meta), config, arch).launches
    from kernels._triton import batch_norm, batch_norm_grad, head

    found: list[Any] = []

    def recorded(name: str) -> Callable[..., Any]:
        module = next(m for m in (batch_norm, batch_norm_grad, head) if hasattr(m, f"prepare_{name}"))

        def launch(*arguments: Any) -> Any:
            job = getattr(module, f"prepare_{name}")(*arguments)
            found.extend(job.launches)
            return job.result

        return launch

    inputs = elementwise.make_inputs(work, Noise(meta, work.precision))
    elementwise.CALLS[work.kernel](SimpleNamespace(**{work.kernel: recorded(work.kernel)}), inputs)
    return tuple(found)


class Warmer:
    """Compiles what is about to be launched on all cores; a context manager. Without a GPU it does nothing."""

    def __init__(self, device: torch.device):
        self.compiler = None
        if device.type == "cuda" and not precompile.available():
            self.arch = arch_of_device(device)
            self.compiler = Compiler(self.arch)

    def __enter__(self) -> "Warmer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.compiler:
            self.compiler.__exit__()

    def compile(self, jobs: Sequence[tuple[Any, Any]]) -> None:
        """Compile (work, tile) pairs; what fails here will fail, and say why, where it is launched."""
        distinct_jobs = list(dict.fromkeys(jobs))
        if self.compiler and len(distinct_jobs) > 1:
            self.compiler.compile(launches_of, [(*job, self.arch) for job in distinct_jobs])


def arch_of_device(device: torch.device) -> int:
    """Its capability, as `kernels._triton.config` has them."""
    from kernels._triton.launch import arch_of

    return arch_of(torch.empty(0, device=device))


def compile_fault(found: list[dict[str, int]] | str, arch: int) -> str | None:
    """Why a compiled candidate may not ship; None if it may."""
    from kernels._triton.config import SHARED_LIMIT_BYTES

    if isinstance(found, str):
        return found
    for resources in found:
        if resources["spills"]:
            return f"spills {resources['spills']} bytes per thread"
        if resources["shared_bytes"] > SHARED_LIMIT_BYTES[arch]:
            return f"takes {resources['shared_bytes']} bytes of shared memory"
    return None


def run_fault(
    name: str, subjects: Sequence[Subject], recipe: str, device: torch.device, journal: Journal
) -> str | None:
    """Run a recipe of some subjects once: why it is wrong, None if it is right. `name` is what the journal is told,
    so that what ends the process is not run again."""
    if name in journal.blamed:
        return "it ended the process the last time"
    journal.begin(name)
    why = None
    for subject in subjects:
        try:
            _, why = verify(subject, recipe)
        except Exception as error:  # whatever a compiler or a launch raises: the other candidates go on
            why = one_line(error)
        if why:
            break
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a poisoned device raises here, with the journal still open
    journal.end(name)
    return why


class DeviceLab:
    """One shape's candidates on a device."""

    def __init__(self, shape: Shape, tiles: dict[str, Any], device: torch.device, journal: Journal):
        self.shape, self.device, self.journal = shape, device, journal
        self.subjects: list[Subject] = [gemms.build(problem, device, tiles) for problem in shape.problems()]

    def check(self, recipe: str) -> str | None:
        return run_fault(f"{self.shape.name} {recipe}", self.subjects, recipe, self.device, self.journal)

    def time_us(self, recipes: Sequence[str], rounds: int) -> dict[str, float]:
        def calls(recipe: str) -> Callable[[], None]:
            each = [subject.call(recipe) for subject in self.subjects]

            def run() -> None:
                for call in each:
                    call()

            return run

        with arithmetic(self.shape.problem.precision):
            timed = interleave({r: calls(r) for r in recipes}, rounds, 1, self.device, None, cold_ms)
        return {recipe: timed.p50_ms(recipe) * 1e3 / len(self.subjects) for recipe in recipes}
