"""The PyTorch tutorial's whole run by `python -m dcgan.train --fused`: 202,599 pictures, 5 epochs, data included.

The pictures are random bytes of the right number and size: the step's time does not depend on what is in them, what the
networks learn does, so nothing but time is read from it. A short run goes before, so that the kernels lie compiled in
Triton's cache. Not yet run on a GPU.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.group import Bench
from bench.quality import launch
from dcgan import progress
from dcgan.arch import Arch

PICTURES, EPOCHS, BATCH = 202_599, 5, 128
"""CelebA's pictures, and the tutorial's settings: 7,915 steps."""

SECONDS = 60.0
"""What both runs, making the pictures and starting need at least, a guess."""


def arguments(arch: Arch, data: Path, out: Path, batch: int, epochs: int) -> list[str]:
    """Of `dcgan.train`."""
    flags = {
        "data": data, "out": out, "preset": "dense32" if arch.dense else "dcgan64", "image-size": arch.image_size,
        "channels": arch.channels, "nz": arch.nz, "ngf": arch.ngf, "ndf": arch.ndf,
        "batch-size": batch, "epochs": epochs,
    }  # fmt: skip
    return ["--fused", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def pictures(path: Path, arch: Arch, count: int) -> Path:
    """Random ones, (count, H, W, C) uint8, as an .npy file."""
    shape = (count, arch.image_size, arch.image_size, arch.channels)
    np.save(path, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return path


def tutorial(bench: Bench, seconds: float, count: int, batch: int = BATCH, epochs: int = EPOCHS) -> None:
    """One row: `train_seconds`, as the run's metrics have them (samples and checkpoints left out), `process_seconds`,
    the steps, and images per second: of the whole training, and the median of its intervals."""
    name, until = f"tutorial/{count}x{epochs}", time.monotonic() + seconds
    about: dict[str, Any] = {"batch": batch, "group": "tutorial", "ours": "fused", "pictures": "random bytes"}
    if bench.plan.device.type == "cuda" and seconds < SECONDS:
        why = f"about {SECONDS:.0f} s are needed, {seconds:.0f} are there"
        bench.emit("step", name, None, why, **about)
        return
    with tempfile.TemporaryDirectory() as folder:
        base, arch = Path(folder), bench.plan.arch
        few, all_of_them = pictures(base / "few.npy", arch, 4 * batch), pictures(base / "all.npy", arch, count)
        for data, passes in ((few, 1), (all_of_them, epochs)):
            run, began = base / f"run_{data.stem}", time.monotonic()
            before, _ = bench.telemetry.energy_j()
            code, said = launch(arguments(arch, data, run, batch, passes), max(until - began, 1.0))
            if code:
                bench.emit("step", name, False, f"{data.stem}: exit code {code}: {said}"[:200], **about)
                return
        took, (after, _) = time.monotonic() - began, bench.telemetry.energy_j()
        lines = progress.read(run / "metrics.jsonl")
    figures = {"train_seconds": lines[-1]["seconds"], "process_seconds": took, "steps": lines[-1]["step"]}
    figures["images_per_s_overall"] = epochs * count / figures["train_seconds"]
    figures["images_per_s_median"] = median(line["images_per_s"] for line in lines)
    if before is not None and after is not None:
        figures["joules_per_image"] = (after - before) / (epochs * count)
    bench.emit("step", name, True, None, **about, **figures)
