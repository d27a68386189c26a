"""Whether a kernel or an op computes the right thing, on any device: the bar of every benchmark, parity and tuned row.

A `Subject` is one piece of work on tensors it has made: how each recipe runs it, and what is right. `verify` runs a
recipe once and holds each of its outputs to the project's error bar, against an oracle in float64 on the same device.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import dispatch
from kernels.launchers import launchers
from kernels.library import tf32

Outputs = dict[str, Tensor]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
"""The type of the maps in each precision; fp32 and tf32 differ by what their products may do."""

KINK = {"fp32": 1e-4, "tf32": 0.02, "fp16": 0.02, "bf16": 0.06}
"""How near 0 an activation's input may lie before its rounding can change the derivative: left out of comparisons of
gradients, where one right answer may differ from another by the whole gradient."""


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """TF32 in convolutions and matrix products where `precision` is tf32, and nowhere else."""
    allowed = precision == "tf32"
    with tf32(allowed), tf32(allowed, torch.backends.cuda.matmul):
        yield


class Answers(NamedTuple):
    """What is right: the oracle's outputs in float64, the twin's (PyTorch in the precision asked for), and where one
    unit in the last place of the largest element is too strict, the error allowed beside twice the twin's."""

    oracle: Outputs
    twin: Outputs
    slack: Mapping[str, float] = {}


@dataclass
class Subject:
    """One piece of work.

    Args:
        runs: by recipe: runs it and returns its outputs by name. Each call starts from the same inputs.
        answers: what is right; called once, with the precision's arithmetic set.
        timed: by recipe: what to time instead, where `runs` does more than the work (putting back what it moved).
        precision: of its arithmetic.
    """

    runs: dict[str, Callable[[], Outputs]]
    answers: Callable[[], Answers]
    precision: str
    timed: dict[str, Callable[[], object]] = field(default_factory=dict)
    known: Answers | None = None

    def right(self) -> Answers:
        if self.known is None:
            with arithmetic(self.precision), torch.no_grad():
                self.known = self.answers()
        return self.known

    def call(self, recipe: str) -> Callable[[], object]:
        """What to time."""
        return self.timed.get(recipe, self.runs[recipe])


def excess(ours: Tensor, twin: Tensor, oracle: Tensor, slack: float | None = None) -> float:
    """The error over what is allowed, 2·|twin − oracle| + slack: right up to 1; infinite for NaN or a wrong shape.

    The slack is two units in the last place of the oracle's largest element, in ours' type (for None).
    """
    if ours.shape != oracle.shape:
        return math.inf
    oracle = oracle.double()
    if slack is None:
        slack = 2 * torch.finfo(ours.dtype).eps * oracle.abs().max().item()
    error = (ours.double() - oracle).abs().max().item()
    allowed = 2 * (twin.double() - oracle).abs().max().item() + slack
    if error == 0:
        return 0.0
    return error / allowed if error == error and 0 < allowed < math.inf else math.inf


def walk(terms: int, dtype: torch.dtype, largest: float) -> float:
    """The slack of a sum of `terms` in one fp32 accumulator, whose rounding errors walk √terms where a library sums in
    blocks: 2 ulp of the largest element, more from 64 terms on."""
    return 2 * torch.finfo(dtype).eps * largest * max(1.0, terms**0.5 / 8)


def sums_slack(oracle: Outputs, pixels: int, largest: float) -> dict[str, float]:
    """The slack of what a tile leaves of a map whose largest element is `largest`: mean and M2, or Σg and Σg·x̂.

    The twin's error is a library's, which sums in blocks. A term of Σg·x̂ is below 8·largest, as |x̂| is below 8 here.
    """
    eps = torch.finfo(torch.float32).eps
    scale = {"mean": largest, "sum of g": pixels**0.5 * largest, "sum of g·x̂": 8 * pixels**0.5 * largest}
    if "M2" in oracle:
        scale["M2"] = oracle["M2"].abs().max().item()
    return {name: 8 * eps * scale[name] for name in oracle.keys() & scale.keys()}


def verify(subject: Subject, recipe: str) -> tuple[float, str | None]:
    """Run `recipe` once: the largest `excess` of its outputs, and why it is wrong, None if it is right.

    What it raises is its caller's to report.
    """
    answers = subject.right()
    with arithmetic(subject.precision):
        outputs = subject.runs[recipe]()
    missing = answers.oracle.keys() - outputs.keys()
    if missing:
        return math.inf, f"no {', '.join(sorted(missing))}"
    found = {
        name: excess(outputs[name], answers.twin[name], oracle, answers.slack.get(name))
        for name, oracle in answers.oracle.items()
    }
    worst = max(found, key=found.get)
    wrong = [f"{name} {value:.3g}" for name, value in found.items() if not value <= 1]
    why = f"error over what is allowed: {', '.join(wrong)}" if wrong else None
    return found[worst], why


def runnable(recipes: tuple[str, ...], device: torch.device, precision: str, kernel: str | None = None) -> list[str]:
    """Those of `recipes` that can run on a device; of a single kernel not `cuda` where the extension has none, since
    Triton's would run in its name."""
    found = [recipe for recipe in recipes if not dispatch.why_not(recipe, device, DTYPES[precision])]
    if kernel and "cuda" in found and getattr(launchers("cuda"), kernel) is getattr(launchers("triton"), kernel):
        found.remove("cuda")
    return found


class Noise:
    """Reproducible random tensors on a device, in the type of a precision; on `meta`, only shapes."""

    def __init__(self, device: torch.device, precision: str, seed: int = 0):
        self.device, self.dtype = torch.device(device), DTYPES[precision]
        self.generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.single(*shape, scale=scale).to(self.dtype)

    def single(self, *shape: int, scale: float = 1.0) -> Tensor:
        """The same in float32."""
        return torch.randn(shape, generator=self.generator, device=self.device) * scale
