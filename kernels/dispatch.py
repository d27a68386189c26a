"""Which backend runs an op, and why.

`eager` is PyTorch's own operations, everywhere. `triton` is the kernels of `kernels._triton`, on a CUDA device (or on
the CPU where Triton interprets). `cuda` is the extension, with Triton's kernels where it has none. `library` is the
library's convolutions with Triton's kernels around them. `auto` takes what the tuned table of the device measured as
fastest; where there is no table it takes `eager`, since a kernel that nobody timed there is not known to be faster. A
backend asked for by name raises where it cannot run; a fallback under `auto` warns once and says why, and raises
where `strict` is asked for.
"""

import contextlib
import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from operator import index
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import tuning
from kernels.geometry import Layer
from kernels.library import switches

BACKENDS = ("auto", "eager", "library", "triton", "cuda")

PACKAGE = f"{Path(__file__).parent}{os.sep}"
TORCH = f"{Path(torch.__file__).parent}{os.sep}"

_settings = {"backend": "auto", "strict": False}  # of `use_backend`; torch.compile guards on it
_warned: set[tuple[str, str]] = set()  # op and kind of reason of each fallback that was said


class BackendError(RuntimeError):
    """A backend that was asked for by name, or under `strict`, and cannot run; the message says why."""


class Choice(NamedTuple):
    """The backend that runs an op, and why that one."""

    backend: str
    why: str


@contextlib.contextmanager
def use_backend(name: str, strict: bool = False) -> Iterator[None]:
    """Run the ops within by backend `name`, one of `BACKENDS`; with `strict` a fallback raises BackendError.

    It holds for the process, all threads of it.
    """
    check_backend(name)
    before = dict(_settings)
    _settings.update(backend=name, strict=strict)
    try:
        yield
    finally:
        _settings.update(before)


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}: accepted are {', '.join(BACKENDS)}")


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on tensors of this device and type; None where it can."""
    if backend == "eager":
        return None
    if backend == "cuda":
        from kernels import _cuda

        if reason := _cuda.why_not(device, dtype):
            return reason
    if missing := _triton_missing():
        return missing
    if device.type != "cuda" and not interpreted():
        return f"Triton's kernels need a CUDA device, the tensor is on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"Triton's kernels take bfloat16, float16 and float32, the tensor is {str(dtype).removeprefix('torch.')}"
    return None


def op_of(layer: Layer) -> str:
    """The public op that computes a layer."""
    return f"{layer.kind}_bn_act" if layer.batch_norm else f"{layer.kind}_act"


def layer_key(layer: Layer | None) -> str:
    """A layer in a tuned table: `256x128@16`, input by output channels at the input's size; `any` for none."""
    return f"{layer.in_channels}x{layer.out_channels}@{layer.in_size}" if layer else "any"


def select(
    op: str, layer: Layer | None, device: torch.device, dtype: torch.dtype, backend: str | None = None,
    images: int | None = None,
) -> Choice:  # fmt: skip
    """The backend for one op on one layer.

    Args:
        op: its public name.
        layer: geometry; None for an op that belongs to no layer.
        device, dtype: of the input, after autocast.
        backend: overrides `use_backend`.
        images: of the batch (`adam_step`: parameters); None: as tuned for any.

    Raises:
        ValueError: an unknown backend.
        BackendError: one asked for by name cannot run, or `strict` forbids the fallback.
    """
    name = _settings["backend"] if backend is None else backend
    check_backend(name)
    shape = (layer.in_channels, layer.out_channels, layer.in_size) if layer else ()
    return Choice(*_choose(op, shape, device, dtype, images, name, _settings["strict"], switches.tf32))


def backend_of(
    op: str, layer: Layer | None, device: torch.device, dtype: torch.dtype, backend: str | None, images: int,
    unless: str | None = None,
) -> str:  # fmt: skip
    """What `select` selects, for use within an op: under torch.compile it is decided while tracing, for each shape.

    `unless` is a reason why nothing but `eager` can run, where there is one.
    """
    name = _settings["backend"] if backend is None else backend
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return "eager"
    check_backend(name)
    sizes = (layer.in_channels, layer.out_channels, layer.in_size) if layer else ()
    shape = tuple(index(size) for size in sizes)  # a number, where torch.compile has a symbol
    return _constant(op, shape, device, dtype, index(images), name, _settings["strict"], switches.tf32, unless)


@torch.compiler.assume_constant_result
def _constant(*arguments) -> str:
    return _choose(*arguments)[0]


def _choose(
    op: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, images: int | None, name: str,
    strict: bool, tf32: bool, unless: str | None = None,
) -> tuple[str, str]:  # fmt: skip
    if name != "auto":
        if name != "eager" and (reason := unless or why_not(name, device, dtype)):
            raise BackendError(f"{op} by {name}: {reason}")
        return name, "asked for by name"
    gpu = tuning.device_name(device)
    if gpu is None:
        return "eager", f"the tensor is on {device.type}"
    if reason := unless or why_not("library", device, dtype):  # whatever a table says, but for `eager`
        return _fall_back(op, reason, strict)
    found = tuning.recipe(gpu, op, shape, tuning.precision_of(dtype, tf32), images)
    if found.entry is None:
        return _fall_back(op, found.why, strict, found.kind)
    if reason := why_not(found.entry.recipe, device, dtype):
        return _fall_back(op, reason, strict)
    return found.entry.recipe, found.why


def _fall_back(op: str, reason: str, strict: bool, kind: str = "") -> tuple[str, str]:
    """`eager` and the reason, which is warned of once for each op and kind; the kind is the reason itself where none
    is given."""
    if strict:
        raise BackendError(f"{op}: {reason}")
    if (op, kind or reason) not in _warned:
        _warned.add((op, kind or reason))
        warnings.warn(f"{op} falls back to eager PyTorch: {reason}", RuntimeWarning, stacklevel=_callers_level())
    return "eager", reason


def _callers_level() -> int:
    """The `stacklevel`, in the function that asks, of the first frame outside this package, and outside torch, which
    calls a fused module: who called the op."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, TORCH)):
        frame, level = frame.f_back, level + 1
    return level
