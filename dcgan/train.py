"""`python -m dcgan.train`: train a DCGAN on pictures, or go on with a run."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import torch

from dcgan import config as settings
from dcgan.arch import PRESETS
from dcgan.checkpoint import lock
from dcgan.config import Config
from dcgan.data import ImageSet, open_images
from dcgan.errors import InputError, run_command
from dcgan.report import write_report
from dcgan.step import AUTOCAST_DTYPE
from dcgan.trainer import Trainer
from kernels import BACKENDS, BackendError, use_backend
from kernels.dispatch import op_of, select


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive whole number")
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
        epilog="A run stopped by Ctrl-C (or SIGTERM, SIGUSR1) saves a checkpoint first; --resume goes on from there.",
    )
    group = p.add_argument_group("what to train on, and where the run goes")
    group.add_argument("--data", metavar="SPEC", help="digits (default); a folder or zip of pictures; a folder of "
                       "MNIST or CIFAR-10 files; .npy or .npz; or a name: mnist, fashion-mnist, cifar10")  # fmt: skip
    group.add_argument("--out", metavar="RUN", help="the run's directory (default: a new one under runs/)")
    group.add_argument("--resume", metavar="RUN", help="go on with a run; only --steps, --epochs, --log-every, "
                       "--sample-every, --checkpoint-every, --keep, --device, --tensorboard may be given")  # fmt: skip
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="training steps in all")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the data in all (default: 25)")

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
    group.add_argument("--seed", type=int, metavar="N", help="of weights, noise and order (default: 0)")

    group = p.add_argument_group("how it runs")
    group.add_argument(
        "--fused",
        nargs="?",
        const="stacks",
        choices=("stacks", "modules"),
        metavar="modules",
        help="the fast path of the device, same numbers; `--fused modules` stops at one fused op a layer",
    )
    group.add_argument("--backend", choices=BACKENDS, help="of the fused modules' ops (default: auto)")
    group.add_argument("--strict", action="store_true", help="a fused module that falls back to eager is an error")
    group.add_argument("--precision", choices=settings.PRECISIONS, help="auto (default): bf16 where fast, else fp32")
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.add_argument("--deterministic", action="store_true", help="the same bits every time, on a GPU too")

    group = p.add_argument_group("what it writes")
    for name, what in (("log", "a line of metrics"), ("sample", "a grid of samples"), ("checkpoint", "a checkpoint")):
        group.add_argument(f"--{name}-every", type=positive, metavar="N", help=f"steps between {what}s"
                           if name != "log" else "steps between lines of metrics")  # fmt: skip
    group.add_argument("--keep", type=positive, metavar="N", help="checkpoints kept, newest first (default: 3)")
    group.add_argument("--tensorboard", action="store_true", help="mirror the metrics for TensorBoard")
    return p


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def new_run_directory(flags: dict, name: str) -> Path:
    """The directory of a new run, created. Raises InputError where it is in use or cannot be made."""
    if "out" in flags:
        run = Path(flags["out"])
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(f"--out {run} is already in use: choose another, or --resume {run}")
    else:
        stem = Path("runs") / f"{name}"
        run = next(p for n in range(1, 10**6) if not (p := Path(f"{stem}-{n}")).exists())
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {run} cannot be made: {error.strerror}") from None
    return run


def resolve(flags: dict) -> tuple[Config, ImageSet]:
    """A new run's settings and pictures. Raises InputError for whatever is wrong with the flags."""
    device = settings.choose_device(flags.get("device"))
    preset = flags.get("preset", "dcgan64" if device.type == "cuda" else "small32")
    defaults = PRESETS[preset]
    size = settings.image_size(flags, preset)
    precision = settings.resolve_precision(flags.get("precision", "auto"), device, flags.get("fused"))
    images = open_images(flags.get("data", "digits"), size, flags.get("channels"))
    count, channels = len(images.images), images.images.shape[3]
    arch = settings.resolve_arch(flags, preset, channels)
    batch_size = flags.get("batch_size", min(defaults.batch_size, count))
    if batch_size > count:
        raise InputError(f"--batch-size {batch_size} is larger than the data: {images.source} has {count} pictures")
    if flags.get("fused") != "modules" and ("backend" in flags or "strict" in flags):
        raise InputError("--backend and --strict are of --fused modules, which was not given")
    epochs = None if "steps" in flags else flags.get("epochs", defaults.epochs)
    steps = flags.get("steps") or epochs * -(-count // batch_size)
    chosen = {
        "data": images.source, "preset": preset, "image_size": size, "channels": channels, "dense": arch.dense,
        "nz": arch.nz, "ngf": arch.ngf, "ndf": arch.ndf, "batch_size": batch_size, "steps": steps, "epochs": epochs,
        "update": "alternating", "fused": None, "backend": "auto", "strict": False, "precision": precision,
        "device": str(device), "seed": 0, "deterministic": False, "flip": False, "ema": 0.0, "lr": 2e-4, "beta1": 0.5,
        "keep": 3, "tensorboard": False, **settings.default_intervals(steps),
    }  # fmt: skip
    own = ("data", "preset", "image_size", "channels", "nz", "ngf", "ndf", "steps", "epochs", "precision", "device")
    chosen |= {name: value for name, value in flags.items() if name in chosen and name not in own}
    config = Config(**chosen)
    check_backends(config)
    return config, images


def check_backends(config: Config) -> None:
    """Raise InputError where a fused module could not run by the backend asked for, or not without a fallback."""
    if config.fused != "modules":
        return
    dtype = AUTOCAST_DTYPE.get(config.precision, torch.float32)
    try:
        with use_backend(config.backend, config.strict):
            for layer in config.arch.generator + config.arch.discriminator:
                select(op_of(layer), layer, torch.device(config.device), dtype)
    except BackendError as error:
        raise InputError(f"--backend {config.backend}{' --strict' if config.strict else ''}: {error}") from None


def resolve_resumed(flags: dict, run: Path) -> tuple[Config, ImageSet]:
    """The settings of a run to go on with, and its pictures. Raises InputError for a flag that may not change."""
    config = Config.read(run)
    for name in flags:
        if name not in settings.MAY_CHANGE:
            flag = "--" + name.replace("_", "-")
            may = ", ".join("--" + name.replace("_", "-") for name in settings.MAY_CHANGE)
            raise InputError(f"{flag} cannot be given with --resume: a run keeps its settings, except {may}")
    flags = {"device": config.device, **flags}
    config.device = str(settings.choose_device(flags["device"]))
    config.precision = settings.resolve_precision(config.precision, torch.device(config.device), config.fused)
    images = open_images(config.data, config.image_size, config.channels)
    if images.fingerprint != config.resolved.get("fingerprint"):
        raise InputError(f"--resume {run}: {config.data} has changed since the run began; put the same pictures back")
    if "epochs" in flags:
        config.epochs, config.steps = flags["epochs"], flags["epochs"] * config.resolved["steps_per_epoch"]
    elif "steps" in flags:
        config.epochs, config.steps = None, flags["steps"]
    for name in ("log_every", "sample_every", "checkpoint_every", "keep", "tensorboard"):
        setattr(config, name, flags.get(name, getattr(config, name)))
    check_backends(config)
    return config, images


def apply_globally(config: Config) -> None:
    """Switches of torch that hold for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def describe(config: Config, images: ImageSet, trainer: Trainer) -> dict:
    """What the report and a reader of config.json want to know and no flag says."""
    device = torch.device(config.device)
    return {
        "dataset": images.name,
        "images": len(images.images),
        "skipped": list(images.skipped),
        "fingerprint": images.fingerprint,
        "steps_per_epoch": trainer.batches.per_epoch,
        "data_resident": trainer.batches.resident,
        "parameters_g": sum(layer.parameters for layer in config.arch.generator),
        "parameters_d": sum(layer.parameters for layer in config.arch.discriminator),
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "backends": trainer.backends(),
    }


def begin(flags: dict) -> tuple[Trainer, Config, Path]:
    config, images = resolve(flags)
    run = new_run_directory(flags, f"{images.name}-{config.preset}")
    apply_globally(config)
    try:
        trainer = Trainer(config, run, images, say, lock(run))
        config.resolved = describe(config, images, trainer)
        config.write(run)
        trainer.start()
    except BaseException as error:  # Ctrl-C too: a directory without a checkpoint could not be resumed
        shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"--out {run} cannot be written: {error}") from None
        raise
    return trainer, config, run


def resume(flags: dict) -> tuple[Trainer, Config, Path]:
    run = Path(flags.pop("resume"))
    if "out" in flags:
        raise InputError("--out cannot be given with --resume: a run stays in its directory")
    config, images = resolve_resumed(flags, run)
    apply_globally(config)
    try:
        claim = lock(run)
    except BlockingIOError:
        raise InputError(f"--resume {run}: in use by another process") from None
    except OSError as error:
        raise InputError(f"--resume {run} cannot be written: {error.strerror}") from None
    trainer = Trainer(config, run, images, say, claim)
    try:
        trainer.resume()
        config.resolved |= describe(config, images, trainer)
        config.write(run)
    except OSError as error:
        raise InputError(f"--resume {run} cannot be written: {error}") from None
    return trainer, config, run


def main(argv: list[str] | None = None) -> int:
    """The command; `argv` are its arguments, those of the process where None."""
    flags = vars(parser().parse_args(argv))
    trainer, config, run = resume(flags) if "resume" in flags else begin(flags)
    with use_backend(config.backend, config.strict):
        return train(trainer, config, run)


def train(trainer: Trainer, config: Config, run: Path) -> int:
    if trainer.step >= config.steps:
        say(f"{run} has its {config.steps} steps already; --resume {run} --steps N goes on to N")
        return 0
    size, found = config.image_size, config.resolved
    say(
        f"{found['dataset']}: {found['images']:,} pictures, {size}×{size}×{config.channels} · {config.preset} on "
        f"{found['device_name']}, {config.precision}{f', fused {config.fused}' if config.fused else ''} · "
        f"steps {trainer.step} to {config.steps} · {run}"
    )
    number = trainer.train()
    try:
        report = write_report(run)
    except OSError as error:
        report = f"report.html not written ({error})"
    if number is not None:
        say(f"stopped by signal {number} after step {trainer.step}; go on with --resume {run}")
        return 128 + number
    say(f"done: {trainer.step} steps in {trainer.clock.seconds:.1f} s · samples in {run / 'samples'} · {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
