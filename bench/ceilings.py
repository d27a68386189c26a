"""What this machine can do at most, measured: large matrix products in each precision, and a copy.

The floors of `bench.roofline` are counted against these. A product is by the fastest library at hand and counts 2·M·N·K
operations, a copy what it reads and what it writes; both run on random data (zeros draw less power and run faster).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.roofline import Ceilings
from bench.timing import interleave, one_line
from kernels.cpu.matmul import matmul
from kernels.library import tf32

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Past every cache: an H200's L2 holds 60 MB, a server CPU's L3 a few hundred at most, shared."""


L2_BYTES = 8 << 20
"""Of a copy that stays in L2: source and target together a quarter of an H200's."""
REPEATED = 64


@dataclass(frozen=True)
class Measured:
    """matrix_tflops: 10^12 operations per second by precision (`bf16`, `fp32`, on a GPU `tf32`, and `fp8` where it has
    it). copy_tbps: terabytes a second, read and written. spread: median over shortest time of each; far above 1 the
    machine was busy, and the rate may be low. On a GPU also l2_tbps, a copy within L2; and the time from one small
    kernel to the next, in a CUDA graph (node_us) and as launches (launch_us), and the same where each may begin before
    the last has ended (programmatic dependent launch, `dependent_…`). missing: what a GPU would not do, and why. All of
    a GPU has not run on one yet."""

    matrix_tflops: dict[str, float]
    copy_tbps: float
    spread: dict[str, float] = field(default_factory=dict)
    l2_tbps: float | None = None
    node_us: float | None = None
    launch_us: float | None = None
    dependent_node_us: float | None = None
    dependent_launch_us: float | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def of(self, precision: str) -> Ceilings:
        """As `bench.roofline` takes them."""
        return Ceilings(self.matrix_tflops[precision], self.copy_tbps)


def measure(
    device: torch.device,
    rounds: int = 200,
    side: int | None = None,
    copy_bytes: int | None = None,
    seconds: float | None = 5.0,
) -> Measured:
    """Measure them: the time of each is the shortest of the rounds, as a ceiling is what the machine can do.

    Args:
        device: to measure.
        rounds: at most. Many short ones, so that some fall where a busy machine leaves the cores alone.
        side: of the square matrices; copy_bytes: of the copy's source. None: the device's own.
        seconds: about how long all may take.

    Raises:
        ValueError: as `bench.timing.interleave`.
    """
    side, copy_bytes = side or MATRIX_SIDE[device.type], copy_bytes or COPY_BYTES[device.type]
    random = torch.Generator(device).manual_seed(0)

    def operand() -> torch.Tensor:
        return torch.randn(side, side, generator=random, device=device)

    single = operand(), operand(), torch.empty(side, side, device=device)
    half = tuple(matrix.bfloat16() for matrix in single)
    source = torch.randint(256, (copy_bytes,), generator=random, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        if is_gpu(device):
            torch.mm(a, b, out=out)
        else:
            matmul(a, b, lambda rows, columns: out)

    def product(operands: tuple[torch.Tensor, ...], allow_tf32: bool) -> Callable[[], None]:
        def call() -> None:
            with tf32(allow_tf32, torch.backends.cuda.matmul):
                multiply(*operands)

        return call

    calls: dict[str, Callable[[], object]] = {
        "bf16": product(half, False), "fp32": product(single, False), "copy": lambda: target.copy_(source)
    }  # fmt: skip
    missing: dict[str, str] = {}
    if is_gpu(device):
        calls["tf32"] = product(single, True)
        for what, make in of_a_gpu(half, source, target).items():
            try:
                made = make()
                for call in made.values():
                    call()  # what fails would take the others with it
                torch.cuda.synchronize()
                calls |= made
            except Exception as error:  # a GPU, a library or a compiler without it
                missing[what] = one_line(error)
    timed = interleave(calls, rounds, device=device, seconds=seconds)
    best_s = {name: min(timed.samples_ms[name]) / 1e3 for name in calls}
    tera = 1e-12
    rates = {name: 2 * side**3 / best_s[name] * tera for name in calls if name in ("bf16", "fp32", "tf32", "fp8")}
    spread = {name: timed.p50_ms(name) / 1e3 / best_s[name] for name in calls}
    between = {key: best_s[name] / REPEATED * 1e6 for name, key in BETWEEN.items() if name in calls}
    if "l2" in calls:
        between["l2_tbps"] = 2 * L2_BYTES * REPEATED / best_s["l2"] * tera
    return Measured(rates, 2 * copy_bytes / best_s["copy"] * tera, spread, missing=missing, **between)


def is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


BETWEEN = {
    "nodes": "node_us", "launches": "launch_us",
    "dependent nodes": "dependent_node_us", "dependent launches": "dependent_launch_us",
}  # fmt: skip


def of_a_gpu(
    half: tuple[torch.Tensor, ...], source: torch.Tensor, target: torch.Tensor
) -> dict[str, Callable[[], dict[str, Callable[[], object]]]]:
    """What makes the calls that only a GPU is timed on, each by itself, since not every GPU can do all of them."""
    inside, outside = source[:L2_BYTES], target[:L2_BYTES]

    def fp8() -> dict[str, Callable[[], object]]:
        return {"fp8": fp8_product(half[0], half[1])}

    def within_l2() -> dict[str, Callable[[], object]]:
        return {"l2": graphed(lambda: outside.copy_(inside))}

    def gaps(prefix: str, dependent: bool) -> dict[str, Callable[[], object]]:
        from bench.gaps import touch  # late: Triton is not everywhere

        small = torch.zeros(1024, device=source.device)

        def launches() -> None:
            for _ in range(REPEATED):
                touch(small, dependent)

        return {f"{prefix}nodes": graphed(lambda: touch(small, dependent)), f"{prefix}launches": launches}

    return {
        "matrix product fp8": fp8,
        "copy within L2": within_l2,
        "between kernels": lambda: gaps("", False),
        "dependent launch": lambda: gaps("dependent ", True),
    }


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The product of two square matrices as float8_e4m3fn, its sums bfloat16 at the end."""
    left = a.to(torch.float8_e4m3fn)
    right = b.t().contiguous().to(torch.float8_e4m3fn).t()  # the library wants the second by columns
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def graphed(call: Callable[[], object], repeated: int = REPEATED) -> Callable[[], None]:
    """`repeated` calls as one CUDA graph; what the last of them allocated stays where it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeated):
            call()
    return graph.replay
