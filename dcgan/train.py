"""`python -m dcgan.train`: train a DCGAN on pictures, or go on with a run."""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import IO

import torch

from dcgan import config as settings
from dcgan.arch import PRESETS
from dcgan.backends import fused_step
from dcgan.checkpoint import lock, step_of, steps
from dcgan.config import Config
from dcgan.data import ImageSet, open_images
from dcgan.errors import InputError, run_command, say
from dcgan.flags import parser
from dcgan.report import write_report
from dcgan.step import AUTOCAST_DTYPE
from dcgan.trainer import Trainer
from kernels import BackendError, use_backend
from kernels.dispatch import op_of, select, why_not


def check_free(flags: dict) -> None:
    """Raise InputError if `--out` names a directory in use, before any picture is decoded."""
    if "out" in flags and (flags["out"] == "" or in_use(Path(flags["out"]))):
        out = flags["out"] or "''"
        raise InputError(f"--out {out} is already in use: choose another, or --resume {out}")


def in_use(run: Path) -> bool:
    """Whether there is more in a directory than what a run killed before its first checkpoint leaves."""
    try:
        names = [path.name for path in run.iterdir()] if run.is_dir() else ["file"] if run.exists() else []
    except OSError as error:
        raise InputError(f"--out {run}: {error.strerror}") from None
    return any(name != ".lock" and not name.endswith(".partial") for name in names)


def claim_new(flags: dict, name: str) -> tuple[Path, IO[str]]:
    """The directory of a new run, created, and its claim. Raises InputError if it is in use or cannot be made."""
    run = Path(flags.get("out", ""))
    try:
        if "out" in flags:
            run.mkdir(parents=True, exist_ok=True)
        else:
            for n in range(1, 10**6):
                with contextlib.suppress(FileExistsError):
                    (run := Path("runs") / f"{name}-{n}").mkdir(parents=True)
                    break
        claim = lock(run)
    except BlockingIOError:
        raise InputError(f"--out {run}: in use by another process") from None
    except OSError as error:
        raise InputError(f"--out {run} cannot be made: {error.strerror}") from None
    if in_use(run):  # by a process that was faster
        raise InputError(f"--out {run} is already in use: choose another, or --resume {run}")
    return run, claim


def resolve(flags: dict) -> tuple[Config, ImageSet]:
    """A new run's settings and pictures. Raises InputError for whatever is wrong with the flags."""
    check_free(flags)
    if flags.get("fused") != "modules" and "backend" in flags:
        raise InputError("--backend only applies with --fused modules")
    if "strict" in flags and "fused" not in flags:
        raise InputError("--strict only applies with --fused")
    device = settings.choose_device(flags.get("device"))
    preset = flags.get("preset", "dcgan64" if device.type == "cuda" else "small32")
    defaults = PRESETS[preset]
    size = settings.image_size(flags, preset)
    precision = settings.resolve_precision(flags.get("precision", "auto"), device)
    images = open_images(flags.get("data", "digits"), size, flags.get("channels"))
    count, channels = len(images.images), images.images.shape[3]
    arch = settings.resolve_arch(flags, preset, channels)
    batch_size = flags.get("batch_size", min(defaults.batch_size, count))
    if batch_size > count:
        raise InputError(f"--batch-size {batch_size} is larger than the data: {images.source} has {count} pictures")
    epochs = None if "steps" in flags else flags.get("epochs", defaults.epochs)
    steps = flags.get("steps") or epochs * -(-count // batch_size)
    chosen = {
        "data": images.source, "preset": preset, "image_size": size, "channels": channels, "dense": arch.dense,
        "nz": arch.nz, "ngf": arch.ngf, "ndf": arch.ndf, "batch_size": batch_size, "steps": steps, "epochs": epochs,
        "update": "alternating", "fused": None, "backend": "auto", "strict": False, "precision": precision,
        "device": str(device), "seed": 0, "deterministic": False, "flip": False, "ema": 0.0, "lr": 2e-4, "beta1": 0.5,
        "keep": 3, "tensorboard": False, **settings.default_intervals(steps),
        **settings.resolve_rungs(flags, device, precision, flags.get("fused")),
    }  # fmt: skip
    own = (
        "channels_last",
        "compile",
        "cuda_graph",
        "data",
        "preset",
        "image_size",
        "channels",
        "nz",
        "ngf",
        "ndf",
        "steps",
        "epochs",
        "precision",
        "device",
    )
    chosen |= {name: value for name, value in flags.items() if name in chosen and name not in own}
    config = Config(**chosen)
    fall_back(config)
    check_backends(config)
    return config, images


def fall_back(config: Config) -> None:
    """Where the kernels cannot run on the device: change `--fused` to `--fused modules`, and say so.

    Raises:
        InputError: with `--strict`.
    """
    dtype, device = AUTOCAST_DTYPE.get(config.precision, torch.float32), torch.device(config.device)
    if config.fused == "stacks" and device.type == "cuda" and (reason := why_not("triton", device, dtype)):
        if config.strict:
            raise InputError(f"--fused --strict: {reason}")
        say(f"warning: {reason}: training with --fused modules instead")
        config.fused, config.cuda_graph = "modules", config.cuda_graph and config.precision != "fp16"


def check_backends(config: Config) -> None:
    """Raise InputError if a fused module could not run by the backend asked for, or not without a fallback."""
    if config.fused != "modules":
        return
    dtype, device = AUTOCAST_DTYPE.get(config.precision, torch.float32), torch.device(config.device)
    try:
        with use_backend(config.backend, config.strict):
            for layer in config.arch.generator + config.arch.discriminator:
                select(op_of(layer), layer, device, dtype)
    except BackendError as error:
        raise InputError(f"--backend {config.backend}{' --strict' if config.strict else ''}: {error}") from None


def resolve_resumed(flags: dict, run: Path) -> tuple[Config, ImageSet]:
    """The settings of a run to go on with, and its pictures. Raises InputError for a flag that may not change."""
    config = Config.read(run)
    for name in flags:
        if name not in settings.MAY_CHANGE:
            flag = "--" + ("no-" if flags[name] is False else "") + name.replace("_", "-")
            may = ", ".join("--" + name.replace("_", "-") for name in settings.MAY_CHANGE)
            raise InputError(f"{flag} cannot be given with --resume: a run keeps its settings, except {may}")
    try:
        before, device = config.device, settings.choose_device(flags.get("device", config.device))
        config.device = str(device)
        config.precision = settings.resolve_precision(config.precision, device)
        kept = config.cuda_graph if torch.device(before).type == device.type else None
        asked = {"cuda_graph": flags.get("cuda_graph", kept)}
        config.cuda_graph = settings.resolve_rungs(asked, device, config.precision, config.fused)["cuda_graph"]
    except InputError as error:
        if "device" in flags:
            raise
        raise InputError(f"--resume {run} was trained on {config.device}: {error}") from None
    total = flags.get("steps") or flags.get("epochs", 0) * config.resolved["steps_per_epoch"]
    if total:
        reached = max(map(step_of, steps(run / "checkpoints")), default=0)
        if total < reached:
            raise InputError(f"--steps {total}: {run} is already at step {reached}")
        if all(getattr(config, k) == v for k, v in settings.default_intervals(config.steps).items()):
            flags = {**settings.default_intervals(total), **flags}
        config.steps, config.epochs = total, flags.get("epochs")
    images = open_images(flags.get("data", config.data), config.image_size, config.channels)
    config.data = images.source
    if images.fingerprint != config.resolved.get("fingerprint"):
        raise InputError(
            f"--resume {run}: {config.data} differs from the data the run began with; --data gives its new place"
        )
    for name in (*settings.INTERVALS, "tensorboard"):
        setattr(config, name, flags.get(name, getattr(config, name)))
    fall_back(config)
    check_backends(config)
    return config, images


def apply_globally(config: Config) -> None:
    """Switches of torch that hold for the whole process."""
    device = torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    torch.backends.cudnn.benchmark = not config.deterministic
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # our kernels write all that they return


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
        "backends": backends(config),
    }


def backends(config: Config) -> list[dict[str, str]]:
    """What runs each layer, and why."""
    layers = config.arch.generator + config.arch.discriminator
    device, dtype = torch.device(config.device), AUTOCAST_DTYPE.get(config.precision, torch.float32)
    if config.fused == "stacks":
        rows = fused_step(config.arch, config.batch_size, device, dtype, config.precision)
        return [row._asdict() for row in rows]
    if config.fused is None:
        return [{"layer": layer.name, "backend": "eager", "why": "--fused was not given"} for layer in layers]
    choices = [select(op_of(layer), layer, device, dtype, config.backend) for layer in layers]
    return [{"layer": layer.name, **choice._asdict()} for layer, choice in zip(layers, choices, strict=True)]


def begin(flags: dict) -> tuple[Trainer, Config, Path]:
    config, images = resolve(flags)
    run, claim = claim_new(flags, f"{images.name}-{config.preset}")
    apply_globally(config)
    try:
        trainer = Trainer(config, run, images, say, claim)
        config.resolved = describe(config, images, trainer)
        config.write(run)
        trainer.start()
    except BaseException as error:  # Ctrl-C too; the directory is ours, and there is nothing in it to go on from
        shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"--out {run} cannot be written: {error.strerror}") from None
        raise
    return trainer, config, run


def resume(flags: dict) -> tuple[Trainer, Config, Path]:
    run = Path(flags.pop("resume"))
    if "out" in flags:
        raise InputError("--out cannot be given with --resume: a run stays in its directory")
    config, images = resolve_resumed(flags, run)
    apply_globally(config)
    try:
        trainer = Trainer(config, run, images, say, lock(run))
        trainer.resume()
        if trainer.step < config.steps:
            threads = config.resolved["threads"]
            if threads != torch.get_num_threads():
                say(f"note: {torch.get_num_threads()} threads, {threads} before: sums may round differently from here")
            config.resolved |= describe(config, images, trainer)
            config.write(run)
    except BlockingIOError:
        raise InputError(f"--resume {run}: in use by another process") from None
    except OSError as error:
        raise InputError(f"--resume {run} cannot be written: {error.strerror}") from None
    return trainer, config, run


def main(argv: list[str] | None = None) -> int:
    """The command; `argv` are its arguments (None: the process's)."""
    flags = vars(parser().parse_args(argv))
    trainer, config, run = resume(flags) if "resume" in flags else begin(flags)
    with use_backend(config.backend, config.strict):
        return train(trainer, config, run)


def train(trainer: Trainer, config: Config, run: Path) -> int:
    if trainer.step >= config.steps:
        say(f"{run} already has its {config.steps} steps; --resume {run} --steps N continues to N")
        return 0
    size, found = config.image_size, config.resolved
    rungs = [f"fused {config.fused}"] if config.fused else ["channels_last"] * config.channels_last
    rungs += ["compiled, so the first step is slow"] * config.compile + ["CUDA graph"] * config.cuda_graph
    say(
        f"{found['dataset']}: {found['images']:,} pictures, {size}×{size}×{config.channels} · {config.preset} on "
        f"{found['device_name']}, {', '.join([config.precision, *rungs])} · "
        f"steps {trainer.step} to {config.steps} · {run}"
    )
    number = trainer.train()
    try:
        report = write_report(run)
    except OSError as error:
        report = f"report.html not written ({error.strerror})"
    if number is not None:
        say(f"stopped by signal {number} after step {trainer.step}; continue with --resume {run}")
        return 128 + number
    ring = trainer.batches.ring
    if ring is not None and ring.waited_s > 0.01 * trainer.clock.seconds:
        say(f"note: the steps waited {ring.waited_s:.1f} s for pictures to be read")
    say(f"done: {trainer.step} steps in {trainer.clock.seconds:.1f} s · samples in {run / 'samples'} · {report}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
