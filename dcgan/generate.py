"""`python -m dcgan.generate`: pictures from a trained generator."""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from dcgan.config import choose_device
from dcgan.errors import InputError, run_command
from dcgan.grid import save_grid, save_png, to_uint8
from dcgan.loading import load
from dcgan.model import Generator
from dcgan.train import Parser, positive

BATCH = 64
LARGEST_GRID = 10_000


@torch.no_grad()
def sample(generator: Generator, n: int, seed: int) -> Tensor:
    """n images (n, C, H, W) in [-1, 1], on the CPU; z comes from `seed` alone, whatever the device.

    In evaluation mode image i is a function of (seed, i). In training mode (`generator.train()`) batch norm takes the
    statistics of the whole batch, so all n go through at once.
    """
    device = next(generator.parameters()).device
    z = torch.randn(n, generator.arch.nz, generator=torch.Generator().manual_seed(seed))
    pieces = [z] if generator.training else z.split(BATCH)
    return torch.cat([generator(piece.to(device)).cpu() for piece in pieces])


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m dcgan.generate", description="Pictures from a trained generator.")
    p.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a generator's state dict "
                   "(.safetensors, or .pth as the PyTorch example writes it)")  # fmt: skip
    p.add_argument("--n", type=positive, default=64, help="how many (default: 64)")
    p.add_argument("--out", default="grid.png", help="a name ending in .png: one grid; any other: a folder of n "
                   "pictures (default: grid.png)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of z (default: 0)")
    p.add_argument("--no-ema", action="store_true", help="the last weights, not their average")
    p.add_argument("--batch-stats", action="store_true", help="batch norm from the statistics of these n pictures, "
                   "as in training; without it from the run's, so that no picture depends on another")  # fmt: skip
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    return p


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, those of the process where None."""
    args = parser().parse_args(argv)
    device = choose_device(args.device)
    out = Path(args.out)
    one_grid = out.suffix.lower() == ".png"
    if one_grid and args.n > LARGEST_GRID:
        raise InputError(f"--n {args.n}: a grid holds up to {LARGEST_GRID}; name a folder in --out for more")
    generator = load(args.run, ema=not args.no_ema, device=device)
    generator.train(args.batch_stats)
    images = sample(generator, args.n, args.seed)
    try:
        (out.parent if one_grid else out).mkdir(parents=True, exist_ok=True)
        if one_grid:
            save_grid(out, images)
        else:
            for i, image in enumerate(to_uint8(images)):
                save_png(out / f"{i:06d}.png", image)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"{args.n} pictures of {generator.arch.image_size}×{generator.arch.image_size} in {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
