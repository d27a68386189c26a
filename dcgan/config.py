"""From command-line flags to a run's resolved configuration, the `config.json` of its directory."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from dcgan.arch import PRESETS, SIZES, Arch
from dcgan.errors import InputError
from kernels import BACKENDS

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "fp16")
INTERVALS = ("log_every", "sample_every", "checkpoint_every", "keep")
MAY_CHANGE = ("steps", "epochs", *INTERVALS, "device", "cuda_graph", "tensorboard", "data")
"""What `--resume` may change. Of these only the device affects the numbers; `data` must be the same pictures,
wherever they are now."""


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
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    resolved: dict = field(default_factory=dict)

    @property
    def arch(self) -> Arch:
        return Arch(self.image_size, self.channels, self.nz, self.ngf, self.ndf, self.dense)

    def write(self, run: Path) -> None:
        """Write config.json, aside and synced first: without it the checkpoints beside it could not be resumed."""
        aside = run / ".config.json.partial"
        with aside.open("w") as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(run / "config.json")

    def check(self) -> None:
        """Raise ValueError for a value that no flag would have let through: config.json may have been edited."""
        for name, (kind, accepted, fits) in FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not fits(value):
                raise ValueError(f"{name} is {value!r}: accepted is {accepted}")
        _ = self.arch

    @classmethod
    def read(cls, run: Path) -> "Config":
        """Raises InputError if `run` is not a run directory."""
        if not run.is_dir():
            raise InputError(f"{run}: no such run directory")
        try:
            config = cls(**json.loads((run / "config.json").read_text()))
            config.check()
        except FileNotFoundError:
            raise InputError(f"{run}: not a run directory, it has no config.json") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{run}/config.json: {error}") from None
        return config


def _one_of(*values: object) -> tuple:
    return (object, ", ".join(map(str, values)), lambda value: value in values)


COUNT = (int, "a positive whole number", lambda n: 0 < n < 2**31)
TEXT = (str, "a text", bool)
FLAG = (bool, "true or false", lambda _: True)
FRACTION = ((int, float), "a number in [0, 1)", lambda x: 0 <= x < 1)

FIELDS = {
    **dict.fromkeys(("data", "device"), TEXT),
    **dict.fromkeys(("nz", "ngf", "ndf", "batch_size", "steps", "keep"), COUNT),
    **dict.fromkeys(("log_every", "sample_every", "checkpoint_every"), COUNT),
    **dict.fromkeys(("dense", "strict", "deterministic", "flip", "tensorboard"), FLAG),
    **dict.fromkeys(("channels_last", "compile", "cuda_graph"), FLAG),
    **dict.fromkeys(("ema", "beta1"), FRACTION),
    "lr": ((int, float), "a number in (0, 1]", lambda x: 0 < x <= 1),
    "seed": (int, "a whole number", lambda _: True),
    "preset": _one_of(*PRESETS),
    "image_size": (int, f"one of {SIZES}", lambda n: n in SIZES),
    "channels": (int, "1, 3 or 4", lambda n: n in (1, 3, 4)),
    "update": _one_of("alternating", "simultaneous"),
    "fused": _one_of(None, "modules", "stacks"),
    "backend": _one_of(*BACKENDS),
    "precision": _one_of(*PRECISIONS[1:]),
    "epochs": ((int, type(None)), "a positive whole number or null", lambda n: n is None or n > 0),
    "resolved": (dict, "an object with fingerprint, steps_per_epoch and threads", lambda d: d.keys() >= RESUMED_BY),
}
RESUMED_BY = {"fingerprint", "steps_per_epoch", "threads"}


def choose_device(name: str | None) -> torch.device:
    """The device named, or a GPU if there is one. Raises InputError for one that is not there or does not start."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: accepted are cpu, cuda and cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
        try:
            torch.cuda.init()
        except RuntimeError as error:  # a driver too old for this torch: NVML counts the GPU all the same
            raise InputError(f"--device {name}: {error}") from None
    return device


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than fp32: tensor cores of sm_80 on, AVX512-BF16 or AMX on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 if that is fast, else fp32. Raises InputError for what the device cannot do."""
    if name == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if name in ("tf32", "fp16") and device.type != "cuda":
        raise InputError(f"--precision {name} needs a CUDA device; on a CPU choose auto, fp32 or bf16")
    return name


def resolve_rungs(flags: dict, device: torch.device, precision: str, fused: str | None) -> dict[str, bool]:
    """channels_last, compile and cuda_graph: what `--fused` brings with it, and what else was asked for.

    Raises:
        InputError: a rung that the device, or the rung above it, does not have.
    """
    given = {name: flags.get(name) for name in ("channels_last", "compile", "cuda_graph")}
    if fused and given["channels_last"] is False:
        raise InputError("--no-channels-last cannot be combined with --fused, which requires channels_last")
    if fused == "stacks" and given["compile"]:
        raise InputError("--compile cannot be combined with --fused (use it without, or with --fused modules)")
    if given["cuda_graph"] and device.type != "cuda":
        raise InputError(f"--cuda-graph needs a CUDA device; this is {device.type}")
    scaled = precision == "fp16" and fused != "stacks"
    if given["cuda_graph"] and scaled:
        raise InputError(
            "--cuda-graph with --precision fp16 requires --fused: the other paths read the loss scale on the host"
        )
    graph = device.type == "cuda" and fused is not None and not scaled
    return {
        "channels_last": fused is not None if given["channels_last"] is None else given["channels_last"],
        "compile": bool(given["compile"]),
        "cuda_graph": graph if given["cuda_graph"] is None else given["cuda_graph"],
    }


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
        raise InputError(f"--image-size {size} is not supported: choose one of {', '.join(map(str, SIZES))}")
    return size


def default_intervals(steps: int) -> dict[str, int]:
    """About a hundred log lines, twenty sample grids and five checkpoints per run, and never too far apart."""
    return {
        "log_every": min(100, max(1, steps // 100)),
        "sample_every": min(1000, max(1, steps // 20)),
        "checkpoint_every": min(1000, max(1, steps // 5)),
    }
