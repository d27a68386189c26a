"""What this machine can do at most, measured: large matrix products in each precision, and a copy.

The floors of `bench.roofline` are counted against these. A product counts 2·M·N·K operations, a copy what it reads and
what it writes; both run on random data (zeros draw less power and run faster).
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from bench.roofline import Ceilings
from bench.timing import interleave

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Past every cache: an H200's L2 holds 60 MB, a server CPU's L3 a few hundred at most, shared."""


L2_BYTES = 8 << 20
"""Of a copy that stays in L2: source and target together a quarter of an H200's."""
REPEATED = 64


@dataclass(frozen=True)
class Measured:
    """matrix_tflops: 10^12 operations a second by precision (`bf16`, `fp32`, on a GPU `tf32`). copy_tbps: terabytes a
    second, read and written. spread: median over shortest time of each; far above 1 the machine was busy, and the rate
    may be low. On a GPU also l2_tbps, a copy within L2, and the time from one small kernel to the next: node_us in a
    CUDA graph, launch_us as launches; the three have not run on a GPU yet."""

    matrix_tflops: dict[str, float]
    copy_tbps: float
    spread: dict[str, float] = field(default_factory=dict)
    l2_tbps: float | None = None
    node_us: float | None = None
    launch_us: float | None = None

    def of(self, precision: str) -> Ceilings:
        """As `bench.roofline` takes them."""
        return Ceilings(self.matrix_tflops[precision], self.copy_tbps)


@contextmanager
def tf32(allowed: bool):
    """Whether fp32 matrix products may use TF32, for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


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
        side: of the square matrices; copy_bytes: of the copy's source. The device's own where None.
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

    def product(operands: tuple[torch.Tensor, ...], allow_tf32: bool) -> Callable[[], None]:
        def call() -> None:
            with tf32(allow_tf32):
                torch.mm(*operands[:2], out=operands[2])

        return call

    calls = {"bf16": product(half, False), "fp32": product(single, False), "copy": lambda: target.copy_(source)}
    if device.type == "cuda":
        calls["tf32"] = product(single, True)
        small, inside = source[:1024], source[:L2_BYTES]
        calls["l2"] = graphed(lambda: target[: inside.numel()].copy_(inside))
        calls["nodes"] = graphed(lambda: small.bitwise_not_())
        calls["launches"] = lambda: [small.bitwise_not_() for _ in range(REPEATED)]
    timed = interleave(calls, rounds, device=device, seconds=seconds)
    best_s = {name: min(timed.samples_ms[name]) / 1e3 for name in calls}
    tera = 1e-12
    rates = {name: 2 * side**3 / best_s[name] * tera for name in calls if name in ("bf16", "fp32", "tf32")}
    spread = {name: timed.p50_ms(name) / 1e3 / best_s[name] for name in calls}
    between = {}
    if "l2" in calls:
        between = {
            "l2_tbps": 2 * inside.numel() * REPEATED / best_s["l2"] * tera,
            "node_us": best_s["nodes"] / REPEATED * 1e6,
            "launch_us": best_s["launches"] / REPEATED * 1e6,
        }
    return Measured(rates, 2 * copy_bytes / best_s["copy"] * tera, spread, **between)


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """`REPEATED` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(REPEATED):
            call()
    return graph.replay
