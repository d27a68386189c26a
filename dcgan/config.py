"""From command-line flags to a run's resolved configuration, the `config.json` of its directory."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from dcgan.arch import PRESETS, SIZES, Arch
from dcgan.errors import InputError

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
MAY_CHANGE = ("steps", "epochs", "log_every", "sample_every", "checkpoint_every", "keep", "device", "tensorboard")
"""What `--resume` may set anew: neither the numbers nor the pictures depend on it."""


@dataclass
class Config:
    """A run's settings, each by the name of its flag, with every default resolved.

    `steps` is the total; `epochs` is what it was computed from, or None. `resolved` holds what was found rather than
    set: the data set, the versions, the parameter counts, the backend of each layer.
    """

    data: str
    preset: str
    image_size: int
    channels: int
    dense: bool
    nz: int
    ngf: int
    ndf: int
    batch_size: int
    steps: int
    epochs: int | None
    update: str
    fused: str | None
    backend: str
    strict: bool
    precision: str
    device: str
    seed: int
    deterministic: bool
    flip: bool
    ema: float
    lr: float
    beta1: float
    log_every: int
    sample_every: int
    checkpoint_every: int
    keep: int
    tensorboard: bool
    resolved: dict = field(default_factory=dict)

    @property
    def arch(self) -> Arch:
        return Arch(self.image_size, self.channels, self.nz, self.ngf, self.ndf, self.dense)

    def write(self, run: Path) -> None:
        aside = run / ".config.json.partial"
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n")
        aside.replace(run / "config.json")

    @classmethod
    def read(cls, run: Path) -> "Config":
        """Raises InputError where `run` is not a run directory."""
        if not run.is_dir():
            raise InputError(f"{run}: no such run directory")
        try:
            return cls(**json.loads((run / "config.json").read_text()))
        except FileNotFoundError:
            raise InputError(f"{run}: not a run directory, it has no config.json") from None
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{run}/config.json cannot be read: {error}") from None


def choose_device(name: str | None) -> torch.device:
    """The device named, or a GPU where there is one. Raises InputError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: accepted are cpu, cuda and cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than fp32: tensor cores of sm_80 on, AVX512-BF16 or AMX on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(name: str, device: torch.device, fused: str | None) -> str:
    """`auto` is bf16 where that is fast, else fp32. Raises InputError for what the device or the step cannot do."""
    if name == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if name in ("tf32", "fp16") and device.type != "cuda":
        raise InputError(f"--precision {name} needs a CUDA device; on a CPU choose auto, fp32 or bf16")
    if name == "fp16" and fused == "stacks":
        raise InputError(
            "--precision fp16 is not served by --fused: choose auto, bf16, tf32 or fp32, or --fused modules"
        )
    return name


def resolve_arch(flags: dict, preset: str, channels: int) -> Arch:
    """The preset's architecture with the flags over it. Raises InputError with the sizes or values accepted."""
    given = {name: flags[name] for name in ("image_size", "nz", "ngf", "ndf") if name in flags}
    try:
        return replace(PRESETS[preset].arch, channels=channels, **given)
    except ValueError as error:
        raise InputError(str(error)) from None


def image_size(flags: dict, preset: str) -> int:
    """The size that pictures are decoded to; checked before any is read."""
    size = flags.get("image_size", PRESETS[preset].arch.image_size)
    if size not in SIZES:
        raise InputError(f"--image-size {size} is outside the family: choose one of {', '.join(map(str, SIZES))}")
    return size


def default_intervals(steps: int) -> dict[str, int]:
    """About a hundred log lines, twenty sample grids and five checkpoints a run, and never too far apart."""
    return {
        "log_every": min(100, max(1, steps // 100)),
        "sample_every": min(1000, max(1, steps // 20)),
        "checkpoint_every": min(1000, max(1, steps // 5)),
    }
