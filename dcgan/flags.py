"""The flags of `python -m dcgan.train`, and the parser that every command uses."""

import argparse
from typing import NoReturn

from dcgan import config as settings
from dcgan.arch import PRESETS
from dcgan.errors import InputError
from kernels import BACKENDS


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def positive(text: str) -> int:
    value = int(text)
    if not 0 < value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number below 2^31")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def learning_rate(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not in (0, 1]")
    return value


def parser() -> argparse.ArgumentParser:
    """Every flag; those not given are absent from the result, so that a resumed run knows what was asked of it."""
    p = Parser(
        prog="python -m dcgan.train",
        description="Train a DCGAN on pictures.",
        argument_default=argparse.SUPPRESS,
        epilog="Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 save a checkpoint first; --resume goes on from there.",
    )
    group = p.add_argument_group("what to train on, and where the run goes")
    group.add_argument("--data", metavar="SPEC", help="digits (default); a folder or zip of pictures; a folder of "
                       "MNIST or CIFAR-10 files; .npy or .npz; or a name: mnist, fashion-mnist, cifar10")  # fmt: skip
    group.add_argument("--out", metavar="RUN", help="the run's directory (default: a new one under runs/)")
    group.add_argument("--resume", metavar="RUN", help="continue a run; only --steps, --epochs, the intervals, "
                       "--keep, --device, --cuda-graph, --tensorboard and --data (the same) may be given")  # fmt: skip
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="training steps in all")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the data (default: 25; small32: 40)")

    group = p.add_argument_group("the model")
    presets = "; ".join(f"{name}: {preset.summary}" for name, preset in PRESETS.items())
    group.add_argument("--preset", choices=PRESETS, help=f"{presets} (default: dcgan64 on a GPU, small32 on a CPU)")
    group.add_argument("--image-size", type=int, metavar="S", help="16, 28, 32, 64, 128 or 256")
    group.add_argument("--channels", type=int, choices=(1, 3, 4), help="image channels (default: those of the data)")
    group.add_argument("--nz", type=positive, metavar="N", help="length of z")
    group.add_argument("--ngf", type=positive, metavar="N", help="G's channels next to the image; doubled inwards")
    group.add_argument("--ndf", type=positive, metavar="N", help="D's channels next to the image; doubled inwards")

    group = p.add_argument_group("the training")
    group.add_argument("--batch-size", type=positive, metavar="N")
    group.add_argument("--update", choices=("alternating", "simultaneous"), help="D then G (default), or both at once")
    group.add_argument("--lr", type=learning_rate, metavar="X", help="Adam's learning rate (default: 2e-4)")
    group.add_argument("--beta1", type=fraction, metavar="X", help="Adam's first beta (default: 0.5)")
    group.add_argument("--flip", action="store_true", help="mirror half of the pictures, drawn anew each epoch")
    group.add_argument("--ema", type=fraction, metavar="DECAY", help="keep an average of G's weights (try 0.999)")
    group.add_argument("--seed", type=int, metavar="N", help="seeds weights, noise and order (default: 0)")

    group = p.add_argument_group("how it runs")
    group.add_argument(
        "--fused",
        nargs="?",
        const="stacks",
        choices=("stacks", "modules"),
        metavar="modules",
        help="the device's fast path, with the same numbers (in full: `stacks`); `--fused modules` only fuses each "
        "layer into one op",
    )
    for flag, what in (
        ("--channels-last", "channels_last memory (default: with --fused)"),
        ("--compile", "torch.compile both networks; not with --fused, but with --fused modules"),
        ("--cuda-graph", "on a GPU, replay the whole step as one CUDA graph (default: with --fused)"),
    ):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=what)
    group.add_argument("--backend", choices=BACKENDS, help="what runs the ops of --fused modules (default: auto)")
    strict = "make it an error if an op falls back to eager on a GPU, or a step cannot be captured"
    group.add_argument("--strict", action="store_true", help=strict)
    group.add_argument(
        "--precision", choices=settings.PRECISIONS, help="auto (default): bf16 if the device is fast at it, else fp32"
    )
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument("--deterministic", action="store_true", help="bit-identical runs, on a GPU too")

    group = p.add_argument_group("what it writes")
    for name, what in (("log", "lines of metrics"), ("sample", "grids of samples"), ("checkpoint", "checkpoints")):
        group.add_argument(f"--{name}-every", type=positive, metavar="N", help=f"steps between {what}")
    group.add_argument("--keep", type=positive, metavar="N", help="checkpoints kept, newest first (default: 3)")
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, help="mirror the metrics for TensorBoard"
    )
    return p
