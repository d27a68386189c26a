"""`python -m dcgan.generate`: pictures from a trained generator."""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcgan.batches import derived_seed
from dcgan.config import PRECISIONS, choose_device, resolve_precision
from dcgan.errors import InputError, run_command, say
from dcgan.flags import Parser, positive
from dcgan.grid import save_grid, save_png, to_uint8
from dcgan.loading import load
from dcgan.model import Generator
from dcgan.sampling import AT_ONCE, Sampler

DRAWN = 64
"""Noise is drawn for so many images at a time, whoever asks for however many."""
LARGEST_GRID = 10_000


@torch.no_grad()
def sample(generator: Generator, n: int, seed: int, precision: str = "fp32") -> Iterator[Tensor]:
    """n images in [-1, 1] as pieces (≤ 1024, C, H, W) on the CPU; z depends only on `seed`, whatever the device.

    In evaluation mode image i is a function of (seed, i), computed in `precision` by `dcgan.sampling.Sampler`. In
    training mode (`generator.train()`) batch norm takes the statistics of the whole batch, so all n go through the
    generator at once, as it is.
    """
    device = next(generator.parameters()).device
    source = torch.Generator().manual_seed(derived_seed(seed, "generate"))
    if generator.training:
        yield generator(torch.randn(n, generator.arch.nz, generator=source).to(device)).cpu()
        return
    sampler = Sampler(generator, precision)
    size = min(AT_ONCE[device.type], -(-n // DRAWN) * DRAWN)  # always as many, for one CUDA graph to do
    for start in range(0, n, size):
        z = torch.zeros(size if device.type == "cuda" else min(size, n - start), generator.arch.nz)
        for part in z[: n - start].split(DRAWN):
            part.copy_(torch.randn(DRAWN, generator.arch.nz, generator=source)[: len(part)])
        yield sampler(z.to(device))[: n - start].cpu()


def check_name(out: str, n: int) -> str:
    """What `--out` names: `.png` one grid, `.npy` an array, nothing of these a folder. Raises InputError for others."""
    path = Path(out)
    if not path.name:
        raise InputError(f"--out {out!r}: accepted is a name ending in .png or .npy, or the name of a folder")
    kind = path.suffix.lower()
    if kind in (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".npz"):
        raise InputError(f"--out {out}: pictures are written as .png or .npy; or name a folder")
    if kind == ".png" and n > LARGEST_GRID:
        raise InputError(f"--n {n}: a grid holds up to {LARGEST_GRID}; name a folder or an .npy in --out for more")
    return kind if kind in (".png", ".npy") else ""


def save_array(path: Path, pieces: Iterator[Tensor], shape: tuple[int, ...]) -> None:
    """Images as uint8 of `shape` (N, H, W, C). Written beside it and renamed, as pictures are."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:  # and no map of it, which a full disk would end by SIGBUS
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for piece in pieces:
                file.write(to_uint8(piece))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m dcgan.generate", description="Pictures from a trained generator.")
    p.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a generator's state dict "
                   "(.safetensors, or .pth as the PyTorch example writes it)")  # fmt: skip
    p.add_argument("--n", type=positive, default=64, help="how many (default: 64)")
    p.add_argument("--out", default="grid.png", help="a name ending in .png: one grid; in .npy: an array, uint8 "
                   "(n, height, width, channels); any other: a folder of n pictures (default: grid.png)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of z (default: 0)")
    p.add_argument("--no-ema", action="store_true", help="use the last weights, not their average")
    p.add_argument("--batch-stats", action="store_true", help="batch norm from the statistics of these n pictures, "
                   "as in training; without it, from the run's, so no picture depends on another")  # fmt: skip
    p.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of maps and products (default: fp32); auto "
                   "is bf16 if that is fast, and moves pixels by a level or two of 255")  # fmt: skip
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments (None: the process's)."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    out = Path(args.out)
    kind = check_name(args.out, args.n)
    precision = resolve_precision(args.precision, device)
    if args.batch_stats and args.precision != "fp32":
        raise InputError(f"--batch-stats --precision {args.precision}: batch statistics need fp32")
    generator = load(args.run, ema=not args.no_ema, device=device)
    generator.train(args.batch_stats)
    try:
        (out.parent if kind else out).mkdir(parents=True, exist_ok=True)
        pieces, arch = sample(generator, args.n, args.seed, precision), generator.arch
        if kind == ".png":
            save_grid(out, np.concatenate([to_uint8(piece) for piece in pieces]))
        elif kind == ".npy":
            save_array(out, pieces, (args.n, arch.image_size, arch.image_size, arch.channels))
        else:
            for i, image in enumerate(image for piece in pieces for image in to_uint8(piece)):
                save_png(out / f"{i:06d}.png", image)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    say(f"{args.n} pictures of {arch.image_size}×{arch.image_size} in {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
