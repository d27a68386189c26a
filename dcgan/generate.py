"""`python -m dcgan.generate`: pictures from a trained generator."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dcgan.batches import derived_seed
from dcgan.config import choose_device
from dcgan.errors import InputError, run_command, say
from dcgan.flags import Parser, positive
from dcgan.grid import save_grid, save_png, to_uint8
from dcgan.loading import load
from dcgan.model import Generator

BATCH = 64
LARGEST_GRID = 10_000


@torch.no_grad()
def sample(generator: Generator, n: int, seed: int) -> Iterator[Tensor]:
    """n images in [-1, 1] as pieces (≤ 64, C, H, W) on the CPU; z comes from `seed` alone, whatever the device.

    In evaluation mode image i is a function of (seed, i). In training mode (`generator.train()`) batch norm takes the
    statistics of the whole batch, so all n go through at once.
    """
    device = next(generator.parameters()).device
    source = torch.Generator().manual_seed(derived_seed(seed, "generate"))
    size = n if generator.training else BATCH
    for start in range(0, n, size):
        z = torch.randn(min(size, n - start), generator.arch.nz, generator=source)
        yield generator(z.to(device)).cpu()


def check_name(out: str, n: int) -> bool:
    """Whether `--out` names one grid, rather than a folder of pictures. Raises InputError for what is neither."""
    path = Path(out)
    if not path.name:
        raise InputError(f"--out {out!r}: accepted is a name ending in .png, or the name of a folder")
    if path.suffix.lower() in (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff"):
        raise InputError(f"--out {out}: pictures are written as .png; or name a folder")
    one_grid = path.suffix.lower() == ".png"
    if one_grid and n > LARGEST_GRID:
        raise InputError(f"--n {n}: a grid holds up to {LARGEST_GRID}; name a folder in --out for more")
    return one_grid


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
    one_grid = check_name(args.out, args.n)
    generator = load(args.run, ema=not args.no_ema, device=device)
    generator.train(args.batch_stats)
    try:
        (out.parent if one_grid else out).mkdir(parents=True, exist_ok=True)
        pieces = sample(generator, args.n, args.seed)
        if one_grid:
            save_grid(out, torch.cat(list(pieces)))
        else:
            for i, image in enumerate(image for piece in pieces for image in to_uint8(piece)):
                save_png(out / f"{i:06d}.png", image)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror or error}") from None
    size = generator.arch.image_size
    say(f"{args.n} pictures of {size}×{size} in {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
