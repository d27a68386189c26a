"""The training step on this CPU: the PyTorch example and ours, interleaved in one process on the same data.

    python -m bench.cpu_step [--preset dcgan64] [--batch 64] [--precision bf16 fp32] [--rounds 15] [--threads N]

Each step is verified before it is timed: from the same weights and batch, its losses must be the example's to within
`LOSS_TOLERANCE`. A round runs every step once, so that whatever else the machine does falls on all of them alike;
the ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.peers import example
from dcgan.arch import PRESETS, Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import adam

LOSS_TOLERANCE = {"fp32": (1e-4, 1e-2), "bf16": (5e-2, 2e-1)}
"""Largest difference of D's loss and G's from the example's after one step. G's comes after D's first update by Adam,
which moves each weight by the learning rate in the direction of its gradient's sign, however small: rounding alone, as
between the example in NCHW and in channels_last, changes it by 1e-4. tests/test_fused_step.py is the strict proof."""

MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_CONF", "LD_PRELOAD")

Step = Callable[[Tensor, Tensor], object]


def cpu_facts() -> dict[str, object]:
    """The processor, its bf16 instructions, threads and allocator, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    flags = set(found.get("flags", found.get("Features", "")).split())
    preset = {name: os.environ[name] for name in MALLOC_VARIABLES if name in os.environ}
    return {
        "cpu": found.get("model name", platform.processor() or platform.machine()),
        "bf16": sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "malloc": f"{platform.libc_ver()[0] or platform.system()} {preset or 'as it comes'}",
    }


def example_step(arch: Arch) -> tuple[example.ExampleStep, list[dict[str, Tensor]]]:
    """The example at `arch`'s widths, and copies of its initial weights, generator's first.

    Raises:
        ValueError: the example has no such network: its maps start at 4×4.
    """
    if arch.start != 4:
        raise ValueError(f"image size {arch.image_size} with dense={arch.dense}: the example's maps start at 4×4")
    torch.manual_seed(0)
    g_widths = tuple(layer.out_channels // arch.ngf for layer in arch.generator[:-1])
    d_widths = tuple(layer.out_channels // arch.ndf for layer in arch.discriminator[:-1])
    g = example.generator(arch.nz, arch.ngf, arch.channels, g_widths)
    d = example.discriminator(arch.ndf, arch.channels, d_widths)
    weights = [{name: value.clone() for name, value in model.state_dict().items()} for model in (g, d)]
    return example.ExampleStep(g, d), weights


def fused_step(arch: Arch, weights: list[dict[str, Tensor]], precision: str) -> FusedStep:
    models = Generator(arch), Discriminator(arch)
    for model, state in zip(models, weights, strict=True):
        model.load_state_dict(state)
    return FusedStep(*models, *(adam(model, fused=True) for model in models), "alternating", precision)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


def measure(arch: Arch, batch: int, precisions: list[str], rounds: int) -> list[dict[str, object]]:
    """Verify each step against the example's first, then time `rounds` rounds.

    Returns:
        A row for the example and each precision: milliseconds (p20, p50, p80), and `ratio`, how many times as fast as
        the example.

    Raises:
        RuntimeError: a step's losses are not the example's.
    """
    peer, weights = example_step(arch)
    steps: dict[str, Step] = {"example": peer} | {name: fused_step(arch, weights, name) for name in precisions}
    data = torch.Generator().manual_seed(1)
    real = torch.rand(batch, arch.channels, *[arch.image_size] * 2, generator=data) * 2 - 1
    z = torch.randn(batch, arch.nz, generator=data)
    losses = {name: torch.as_tensor(step(real, z))[:2] for name, step in steps.items()}
    for name in precisions:
        error = (losses[name] - losses["example"]).abs()
        if not (error <= torch.tensor(LOSS_TOLERANCE[name])).all():
            raise RuntimeError(f"{name}: losses {losses[name].tolist()} are off the example's by {error.tolist()}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(real, z)
            times[name].append((time.perf_counter() - start) * 1e3)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = quantiles(values[1:])  # the first round warms up
        ratio = quantiles([slow / fast for slow, fast in zip(times["example"][1:], values[1:], strict=True)])[1]
        rows.append({"name": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "ratio": ratio})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    presets = [name for name, preset in PRESETS.items() if preset.arch.start == 4]
    parser.add_argument("--preset", default="dcgan64", choices=presets)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp32"], choices=list(LOSS_TOLERANCE))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = measure(PRESETS[args.preset].arch, args.batch, args.precision, args.rounds)
    facts = cpu_facts() | {"preset": args.preset, "batch": args.batch, "rounds": args.rounds}
    if args.json:
        print(json.dumps({"environment": facts, "rows": rows}))
        return 0
    print("  ".join(f"{name}: {value}" for name, value in facts.items()))
    print(f"{'step':10} {'p20 ms':>9} {'p50 ms':>9} {'p80 ms':>9} {'× example':>10}")
    for row in rows:
        print(f"{row['name']:10} {row['p20_ms']:9.1f} {row['p50_ms']:9.1f} {row['p80_ms']:9.1f} {row['ratio']:10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
