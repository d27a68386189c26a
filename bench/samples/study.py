"""What a comparison of samples trains, where it lies, and which checkpoints of a run are judged."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dcgan import checkpoint
from dcgan.arch import Arch
from dcgan.checkpoint import CheckpointError
from dcgan.config import Config, default_intervals
from dcgan.data import ImageSet
from dcgan.errors import InputError

VARIANTS = {
    "eager-fp32": ("--precision", "fp32"),
    "fused-bf16": ("--fused", "--precision", "bf16"),
}
CHECKPOINTS = 5
"""A run's figure at a milestone is the mean over so many: a single one may be a good or a bad moment of its run."""


@dataclass(frozen=True)
class Study:
    """What to train and compare.

    Args:
        images: real pictures, at the size of `arch`.
        arch: of all runs.
        out: folder of the runs.
        steps: of each, at least 4.
        seeds: 1 to 10 runs of each variant.
        batch_size: images per step.
        device: where they train and are compared.
    """

    images: ImageSet
    arch: Arch
    out: Path
    steps: int
    seeds: int
    batch_size: int
    device: torch.device

    @property
    def milestones(self) -> tuple[int, int, int]:
        """Steps by which generators are compared."""
        return self.steps // 4, 2 * (self.steps // 4), self.steps

    @property
    def every(self) -> int:
        """Steps between checkpoints: a hundredth of all."""
        return max(1, self.steps // 100)

    def window(self, milestone: int) -> list[int]:
        """Steps whose generators stand for a milestone: the last `CHECKPOINTS` that a run trained so far leaves there.
        Fewer where a study of under 20 steps has no more since the milestone before."""
        before = max((other for other in self.milestones if other < milestone), default=0)
        multiples = range((before // self.every + 1) * self.every, milestone, self.every)
        return [*multiples, milestone][-CHECKPOINTS:]

    def run(self, variant: str, seed: int) -> Path:
        return self.out / f"{variant}-seed{seed}"

    def kept(self, variant: str, seed: int, step: int) -> Path:
        """Where a run's generator after `step` steps is kept, a state dict."""
        return self.run(variant, seed) / "judged" / f"{checkpoint.PREFIX}{step:08d}.safetensors"

    def missing(self, variant: str, seed: int, milestone: int) -> list[int]:
        """The steps of a window whose generators are not kept (yet)."""
        return [step for step in self.window(milestone) if not self.kept(variant, seed, step).exists()]

    def keep(self, variant: str, seed: int) -> None:
        """Keep the generators of the checkpoints that are in a window, before newer ones push these out.

        To be called before and after each launch: between, training leaves `CHECKPOINTS` and needs no more. What is
        kept is whole: verified, written aside, synced, renamed. A damaged checkpoint is passed over.
        """
        wanted = {step for milestone in self.milestones for step in self.window(milestone)}
        for saved in checkpoint.steps(self.run(variant, seed) / "checkpoints"):
            path = self.kept(variant, seed, step := checkpoint.step_of(saved))
            if step not in wanted or path.exists():
                continue
            with contextlib.suppress(CheckpointError):
                checkpoint.verify(saved)
                path.parent.mkdir(exist_ok=True)
                aside = path.with_suffix(".partial")
                with aside.open("wb") as file:
                    file.write((saved / "generator.safetensors").read_bytes())
                    file.flush()
                    os.fsync(file.fileno())
                aside.replace(path)

    def arguments(self, variant: str, seed: int, milestone: int) -> list[str]:
        """Of `dcgan.train`, up to a milestone: a new run, or one that goes on."""
        run, arch = self.run(variant, seed), self.arch
        intervals = {
            "steps": milestone, "checkpoint-every": self.every, "keep": CHECKPOINTS,
            "log-every": max(1, self.steps // 200), "sample-every": default_intervals(self.steps)["sample_every"],
        }  # fmt: skip
        if resumed := (run / "config.json").exists():
            flags = {"resume": run, **intervals}
        else:
            flags = {
                "data": self.images.source, "out": run, "preset": "dense32" if arch.dense else "dcgan64",
                "image-size": arch.image_size, "channels": arch.channels, "nz": arch.nz, "ngf": arch.ngf,
                "ndf": arch.ndf, "batch-size": self.batch_size, "seed": seed, "device": self.device, **intervals,
            }  # fmt: skip
        named = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        return named if resumed else [*named, *VARIANTS[variant]]

    def check(self, variant: str, seed: int) -> None:
        """Raise InputError if the folder holds a run of something else, or with other checkpoints."""
        run = self.run(variant, seed)
        if not (run / "config.json").exists():
            return
        config = Config.read(run)
        precision = VARIANTS[variant][-1]
        wanted = {"arch": self.arch, "batch_size": self.batch_size, "seed": seed, "checkpoint_every": self.every}
        wanted |= {"precision": precision, "fused": "stacks" if "--fused" in VARIANTS[variant] else None}
        wrong = [f"{name} {getattr(config, name)}" for name, value in wanted.items() if getattr(config, name) != value]
        if config.steps not in self.milestones:
            wrong.insert(0, f"steps {config.steps}")
        if config.resolved["fingerprint"] != self.images.fingerprint:
            wrong.append("other pictures")
        if wrong:
            raise InputError(f"--out {self.out}: {run.name} was trained with {', '.join(wrong)}; give another folder")
