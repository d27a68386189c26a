"""Which backend runs an op, and why.

`eager` is PyTorch's own operations, everywhere. `triton` is the kernels of `kernels._triton`, on a CUDA device (or on
the CPU where Triton interprets). `cuda` is the extension. `auto` takes what the tuned table of the device measured as
fastest; where there is no table it takes `eager`, since a kernel that nobody timed there is not known to be faster. A
backend asked for by name raises where it cannot run; a fallback under `auto` warns once and says why, and raises
where `strict` is asked for.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.geometry import Layer

BACKENDS = ("auto", "eager", "triton", "cuda")
TUNED = Path(__file__).parent / "tuned"

_settings = {"backend": "auto", "strict": False}  # of `use_backend`; torch.compile guards on it


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
        return "the extension kernels._C is not built: csrc/ has no sources"
    if missing := _triton_missing():
        return missing
    if device.type != "cuda" and not interpreted():
        return f"Triton's kernels need a CUDA device, the tensor is on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need compute capability 8.0"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"Triton's kernels take bfloat16, float16 and float32, the tensor is {str(dtype).removeprefix('torch.')}"
    return None


@functools.cache
def tuned_table(device_name: str) -> dict | None:
    """The measured choices for a device, `kernels/tuned/<device>.json`: {op: {layer key: recipe}}; None without one."""
    path = TUNED / (re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".json")
    return json.loads(path.read_text()) if path.exists() else None


def op_of(layer: Layer) -> str:
    """The public op that computes a layer."""
    return f"{layer.kind}_bn_act" if layer.batch_norm else f"{layer.kind}_act"


def layer_key(layer: Layer) -> str:
    """A layer in a tuned table: `256x128@16`, input by output channels at the input's size."""
    return f"{layer.in_channels}x{layer.out_channels}@{layer.in_size}"


def select(op: str, layer: Layer, device: torch.device, dtype: torch.dtype, backend: str | None = None) -> Choice:
    """The backend for one op on one layer.

    Args:
        op: its public name.
        layer: geometry.
        device, dtype: of the input, after autocast.
        backend: overrides `use_backend`.

    Raises:
        ValueError: an unknown backend.
        BackendError: one asked for by name cannot run, or `strict` forbids the fallback.
    """
    name = _settings["backend"] if backend is None else backend
    check_backend(name)
    if name != "auto":
        if reason := why_not(name, device, dtype):
            raise BackendError(f"{op} by {name}: {reason}")
        return Choice(name, "asked for by name")
    if device.type != "cuda":
        return Choice("eager", f"the tensor is on {device.type}")
    table = tuned_table(torch.cuda.get_device_name(device))
    if table is None:
        return _fall_back(op, f"no tuned table for {torch.cuda.get_device_name(device)}")
    recipe = table.get(op, {}).get(layer_key(layer))
    if recipe is None:
        return _fall_back(op, f"{layer_key(layer)} is not in the tuned table")
    if reason := why_not(recipe, device, dtype):
        return _fall_back(op, reason)
    return Choice(recipe, "fastest in the tuned table")


def _fall_back(op: str, reason: str) -> Choice:
    if _settings["strict"]:
        raise BackendError(f"{op}: {reason}")
    _warn_once(f"{op} falls back to eager PyTorch: {reason}")
    return Choice("eager", reason)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
