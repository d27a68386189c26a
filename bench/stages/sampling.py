"""Sampling: how many images per second a trained generator makes.

Ours is `dcgan.sampling.Sampler`, beside the generator as PyTorch runs it: as it is loaded, float32 (`generator`), and
at its best, in the device's faster precision, channels_last, and on a GPU as one CUDA graph. Noise is drawn beforehand,
images stay on the device. What is wrong against float32 is not timed.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.ceilings import graphed
from bench.group import Bench, one_line
from bench.subjects.accuracy import arithmetic
from bench.timing import interleave
from dcgan.arch import Arch
from dcgan.config import fast_bf16
from dcgan.model import Generator
from dcgan.sampling import Sampler

BATCHES = {"cuda": (1024, 4096), "cpu": (64,)}
ALLOWED = {"bf16": 2e-2, "fp32": 1e-2}
"""Root-mean-square error over that of the images; fp32's is TF32's on a GPU."""


def trained(arch: Arch, device: torch.device) -> Generator:
    """A generator whose running statistics are those of its own maps, as after training; channels_last."""
    g = Generator(arch, torch.Generator().manual_seed(0)).to(device, memory_format=torch.channels_last)
    norms = [module for module in g.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        g(torch.randn(64, arch.nz, generator=torch.Generator().manual_seed(1)).to(device))
    for norm in norms:
        norm.momentum = 0.1
    return g.eval()


def network(g: Generator, z: Tensor, precision: str) -> Callable[[], Tensor]:
    """A call that makes the images of z and returns them, by PyTorch."""
    images: list[Tensor] = []

    def call() -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            images[:] = [g(z)]
        return images[0]

    if z.device.type != "cuda":
        return call
    replay = graphed(call, 1)

    def replayed() -> Tensor:
        replay()
        return images[0]

    return replayed


@torch.no_grad()
def as_loaded(g: Generator, z: Tensor) -> Tensor:
    return g(z)


def sampling(bench: Bench, seconds: float) -> None:
    """Rows `sampling/NAME/bN`, and the best of ours as the summary's `sampling_images_per_s`."""
    began, device = time.perf_counter(), bench.plan.device
    precision = "bf16" if fast_bf16(device) else "fp32"
    batches = BATCHES[device.type]
    for done, images in enumerate(batches):
        left = (seconds - (time.perf_counter() - began)) / (len(batches) - done)
        try:
            rows = measure(bench, images, precision, max(left, 0.0))
        except Exception as error:  # such as a batch that does not fit
            bench.emit("step", f"sampling/b{images}", False, one_line(error), batch=images, group="sampling")
            continue
        for name, ok, why, figures in rows:
            about = {"batch": images, "group": "sampling", "ours": "fused" if name.startswith("fused") else ""}
            about["precision"] = "bf16" if "bf16" in name else "fp32"
            bench.emit("step", f"sampling/{name}/b{images}", ok, why, **about, **figures)
            if ok and about["ours"]:
                best = bench.summary.get("sampling_images_per_s") or 0.0
                bench.summary["sampling_images_per_s"] = max(best, figures["images_per_s"])
    bench.save()


def measure(bench: Bench, images: int, precision: str, seconds: float) -> list[tuple[str, bool, str | None, dict]]:
    """Name, `ok`, why not, and figures, of PyTorch's network in two ways, and ours."""
    arch, device = bench.plan.arch, bench.plan.device
    z = torch.randn(images, arch.nz, generator=torch.Generator().manual_seed(2)).to(device)
    with torch.no_grad(), arithmetic("ieee"):
        expected = trained(arch, device)(z)
    suffix = "+bf16" if precision == "bf16" else ""
    best = f"generator{suffix}+channels_last" + ("+graph" if device.type == "cuda" else "")
    calls: dict[str, Callable[[], Any]] = {}
    wrong: list[tuple[str, bool, str | None, dict]] = []
    for name in ("generator", best, "fused" + suffix):
        try:
            g = trained(arch, device)
            if name == "generator":
                call = partial(as_loaded, g.to(memory_format=torch.contiguous_format), z)
            elif name == best:
                call = network(g, z, precision)
            else:
                call = partial(Sampler(g, precision), z)
            error = ((call().float() - expected).norm() / expected.norm()).item()
        except Exception as failure:  # whatever a compiler, a launch or a capture raises: the other goes on
            wrong.append((name, False, one_line(failure), {}))
            continue
        if error <= ALLOWED[precision]:
            calls[name] = call
        else:
            wrong.append((name, False, f"its images differ by {error:.3g} > {ALLOWED[precision]:g}", {}))
    if not calls:
        return wrong
    timed = interleave(calls, bench.plan.rounds, 1, device, seconds)
    rows = []
    for name, call in calls.items():
        figures = timed.figures(name) | {"images_per_s": images * 1e3 / timed.p50_ms(name)}
        for other, what in (("generator", "over_example"), (best, "over_library")):
            if name.startswith("fused") and other in calls:
                ratio = timed.ratio(other, name)
                figures |= {what: ratio.median, "noisy": figures.get("noisy") or ratio.noisy}
        rows.append((name, True, None, figures | bench.telemetry.under_load(call, timed.p50_ms(name))))
    return rows + wrong
