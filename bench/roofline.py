"""The floor of a training step: how fast these layers could go on a given machine, kernel by kernel.

Each kernel takes at least the time of its arithmetic at the machine's matrix rate, and at least the time of its bytes
at the machine's bandwidth; its floor is the greater of the two, and the step's floor is their sum.

The byte model: every operand moves once, and everything elementwise is fused into a convolution. So a pass reads
and writes, in 2-byte elements unless said otherwise:

    forward   input, weight, output. The output is kept raw where batch norm follows; its apply rides in the next load.
    dgrad     incoming gradient; the layer's own raw output where it has batch norm (its backward needs x̂); weight;
              the gradient written; what the previous layer kept (its activation's derivative and its two sums)
    wgrad     gradient; own raw output where it has batch norm; input; the weight's gradient in 4-byte floats
    head      forward reads D's last features; backward reads them again for the weight and writes their gradient
    Adam      p, m, v read and written and the gradient read in 4-byte floats, a 2-byte copy written: 30 per parameter

Real and fake go through D in one pass of twice the batch, and D is frozen in G's step: no weight gradients there.

    python -m bench.roofline [--preset dcgan64] [--batch 128] [--tflops 790] [--tbps 4.3] [--json]
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby

from dcgan.arch import PRESETS, Arch
from kernels.geometry import Direction, Layer

H200_TFLOPS = 790.0
"""bf16 matrix products on one H200, 10^12 operations per second: as measured there with large GEMMs (design notes)."""

H200_TBPS = 4.3
"""Device-to-device copy on one H200, 10^12 bytes per second, read and written counted both (design notes)."""

HALF, SINGLE = 2, 4
ADAM_BYTES = 7 * SINGLE + HALF


@dataclass(frozen=True)
class Ceilings:
    """What a machine can do at most: `tflops` of matrix products, `tbps` terabytes a second from device memory."""

    tflops: float = H200_TFLOPS
    tbps: float = H200_TBPS


@dataclass(frozen=True)
class Kernel:
    """One kernel's work.

    Args:
        section: the part of the step it belongs to, such as `G fwd`.
        layer: the layer it serves, or the network whose parameters Adam updates.
        view: its matrix product as `M×N×K`, empty for none.
        flops: floating-point operations.
        bytes: what it moves to and from device memory.
    """

    section: str
    layer: str
    view: str
    flops: int
    bytes: int

    def compute_us(self, ceilings: Ceilings) -> float:
        return self.flops / ceilings.tflops * 1e-6

    def memory_us(self, ceilings: Ceilings) -> float:
        return self.bytes / ceilings.tbps * 1e-6

    def floor_us(self, ceilings: Ceilings) -> float:
        return max(self.compute_us(ceilings), self.memory_us(ceilings))


def moved_bytes(layer: Layer, direction: Direction, images: int) -> int:
    """Bytes of one pass of a layer over `images` images, by the model above."""
    into, out = layer.in_elements(images), layer.out_elements(images)
    if direction == "forward":
        return HALF * (into + layer.weights + out)
    gradient = out + (out if layer.batch_norm else 0)
    if direction == "dgrad":
        return HALF * (gradient + layer.weights + 2 * into)
    return HALF * (gradient + into) + SINGLE * layer.weights


def _pass(section: str, layer: Layer, direction: Direction, images: int) -> Kernel:
    gemm = layer.gemm(direction, images)
    view = f"{gemm.m}×{gemm.n}×{gemm.k}"
    return Kernel(section, layer.name, view, gemm.flops, moved_bytes(layer, direction, images))


def step_kernels(arch: Arch, batch: int) -> Iterator[Kernel]:
    """The kernels of one training step at `batch` images, in the order they run.

    Raises:
        ValueError: the batch is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: it must be at least 1")
    generator, discriminator = arch.generator, arch.discriminator
    *body, head = discriminator
    both = 2 * batch
    features = HALF * head.in_elements(both)
    head_gemm = head.gemm("forward", both)
    view = f"{head_gemm.m}×{head_gemm.n}×{head_gemm.k}"

    for layer in generator:
        yield _pass("G fwd", layer, "forward", batch)
    for layer in body:
        yield _pass("D fwd", layer, "forward", both)
    yield Kernel("D head", head.name + " fwd", view, head_gemm.flops, features)
    yield Kernel("D head", head.name + " bwd", view, 2 * head_gemm.flops, 2 * features)
    for layer in body[:0:-1]:  # nothing asks for the gradient of the images
        yield _pass("D dgrad", layer, "dgrad", both)
    for layer in reversed(body):
        yield _pass("D wgrad", layer, "wgrad", both)
    yield Kernel("Adam", "D", "", 0, ADAM_BYTES * sum(layer.parameters for layer in discriminator))
    for layer in discriminator:
        yield _pass("G step: D fwd", layer, "forward", batch)
    for layer in reversed(discriminator):
        yield _pass("G step: D dgrad", layer, "dgrad", batch)
    for layer in generator[:0:-1]:
        yield _pass("G dgrad", layer, "dgrad", batch)
    for layer in reversed(generator):
        yield _pass("G wgrad", layer, "wgrad", batch)
    yield Kernel("Adam", "G", "", 0, ADAM_BYTES * sum(layer.parameters for layer in generator))


@dataclass(frozen=True)
class Floor:
    """Sums over some kernels: how many, GF (10^9 operations), MB (10^6 bytes), µs at the floor, µs of compute alone."""

    kernels: int
    gflop: float
    mbytes: float
    floor_us: float
    compute_us: float


def floor(kernels: list[Kernel], ceilings: Ceilings | None = None) -> Floor:
    """Sum the kernels at `ceilings` (None: one H200's)."""
    ceilings = ceilings or Ceilings()
    return Floor(
        len(kernels),
        sum(k.flops for k in kernels) / 1e9,
        sum(k.bytes for k in kernels) / 1e6,
        sum(k.floor_us(ceilings) for k in kernels),
        sum(k.compute_us(ceilings) for k in kernels),
    )


def table(kernels: list[Kernel], ceilings: Ceilings) -> str:
    """The table as text: a line per kernel, a sum per section, the step at the end."""
    lines = [f"{'kernel':24s} {'M×N×K':>20s} {'GF':>9s} {'MB':>8s} {'µs':>8s}  bound"]

    def line(name: str, view: str, part: list[Kernel], bound: str) -> None:
        sums = floor(part, ceilings)
        lines.append(
            f"{name:24s} {view:>20s} {sums.gflop:9.2f} {sums.mbytes:8.1f} {sums.floor_us:8.1f}  {bound}".rstrip()
        )

    for section, group in groupby(kernels, key=lambda k: k.section):
        part = list(group)
        for kernel in part:
            compute = kernel.compute_us(ceilings) > kernel.memory_us(ceilings)
            line(f"{section} {kernel.layer}", kernel.view, [kernel], "matrix rate" if compute else "bandwidth")
        if len(part) > 1:
            line(f"  {section}, {len(part)} kernels", "", part, "")
    step = floor(kernels, ceilings)
    line(f"step, {step.kernels} kernels", "", kernels, f"compute alone {step.compute_us:.0f} µs")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The floor of a training step, kernel by kernel.")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--batch", type=int, default=128, help="images of one class per step (128)")
    parser.add_argument("--tflops", type=float, default=H200_TFLOPS, help="matrix rate, TFLOP/s (one H200's: 790)")
    parser.add_argument("--tbps", type=float, default=H200_TBPS, help="memory bandwidth, TB/s (one H200's: 4.3)")
    parser.add_argument("--json", action="store_true", help="print the kernels and their sum as JSON")
    args = parser.parse_args()
    if min(args.batch, args.tflops, args.tbps) <= 0:
        parser.error(f"--batch {args.batch} --tflops {args.tflops} --tbps {args.tbps}: each must be positive")
    ceilings = Ceilings(args.tflops, args.tbps)
    kernels = list(step_kernels(PRESETS[args.preset].arch, args.batch))
    if args.json:
        rows = [asdict(k) | {"floor_us": k.floor_us(ceilings)} for k in kernels]
        print(
            json.dumps(
                {"ceilings": asdict(ceilings), "kernels": rows, "step": asdict(floor(kernels, ceilings))}, indent=1
            )
        )
    else:
        print(table(kernels, ceilings))


if __name__ == "__main__":
    main()
