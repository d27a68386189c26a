"""Checkpoints: atomic, hashed, and nothing in them executes.

A checkpoint is a folder `step_00000100` of `generator.safetensors`, `discriminator.safetensors`,
`generator_ema.safetensors` when an average is kept, `state.pt` (optimisers, random generators, accumulators; loaded
with `weights_only=True`) and `manifest.json` (step, architecture, a sha256 for each file and for itself). It is written
aside, synced, and renamed, so that a crash leaves either the old set of checkpoints or the new one; it is hashed
before it is read, so that a flipped bit is found and the one before it is used.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcgan.arch import Arch

FORMAT = 1
PREFIX = "step_"
MODELS = ("generator", "generator_ema", "discriminator")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it and says why."""


@dataclass
class Checkpoint:
    """Everything a run needs to go on.

    Args:
        step: training steps done.
        arch: architecture of both networks.
        models: state dicts by name: `generator`, `discriminator`, and `generator_ema` where one is kept.
        state: tensors, numbers, strings, lists and dicts of them: optimisers, random generators, accumulators.
    """

    step: int
    arch: Arch
    models: dict[str, dict[str, Tensor]]
    state: dict


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _seal(manifest: dict) -> str:
    """The manifest's text, with a digest of itself: the one spelling that `_unseal` accepts."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _unseal(path: Path) -> dict:
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        del manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.parent}: its manifest.json cannot be read ({error})") from None
    if _seal(manifest).encode() != data:
        raise CheckpointError(f"{path.parent}: its manifest.json does not match its own sha256")
    return manifest


def save(folder: Path, checkpoint: Checkpoint, keep: int = 0) -> Path:
    """Write `folder`/step_XXXXXXXX and prune.

    Args:
        folder: the run's `checkpoints`.
        checkpoint: what to write; tensors of any device.
        keep: how many of the newest to keep; 0 keeps all.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written (a full disk, say); nothing is left over, the earlier ones are untouched.
    """
    final = folder / f"{PREFIX}{checkpoint.step:08d}"
    aside = folder / f".{final.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        for name, tensors in checkpoint.models.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, aside / f"{name}.safetensors")
        torch.save(checkpoint.state, aside / "state.pt")
        files = sorted(aside.iterdir())
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "arch": asdict(checkpoint.arch),
            "files": {file.name: _sha256(file) for file in files},
        }
        (aside / "manifest.json").write_text(_seal(manifest))
        for path in (*files, aside / "manifest.json", aside):
            _sync(path)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # torch and safetensors report a failed write in their own exceptions
        raise OSError(errno.EIO, f"cannot write {final}: {error}") from error
    if final.exists():  # of an abandoned course: a damaged one, or one that a rollback left behind
        shutil.rmtree(final)
    os.rename(aside, final)
    with contextlib.suppress(OSError):  # it is there; only a power cut could still lose it
        _sync(folder)
    if keep:
        prune(folder, keep, checkpoint.step)
    return final


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def prune(folder: Path, keep: int, step: int) -> None:
    """Remove all but the `keep` newest checkpoints up to `step`; what is newer than `step` is no reason to lose one."""
    for old in [path for path in steps(folder) if step_of(path) <= step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def abandon_after(folder: Path, step: int) -> None:
    """Remove the checkpoints newer than `step`: the run goes on from there, and they are of a course it left."""
    for path in steps(folder):
        if step_of(path) > step:
            shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, by the step in their names; whether they are whole is not checked."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> dict:
    """The manifest of a checkpoint all of whose files match their hashes.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format; the message names it.
    """
    manifest = _unseal(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}")
    for name, digest in manifest["files"].items():
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"{path}: {name} cannot be read ({error.strerror})") from None
        if actual != digest:
            raise CheckpointError(f"{path}: {name} does not match its sha256")
    return manifest


def load(path: Path) -> Checkpoint:
    """Read a checkpoint, after verifying it.

    Raises:
        CheckpointError: see `verify`; nothing is read from a checkpoint that fails.
    """
    manifest = verify(path)
    try:
        models = {n: load_file(path / f"{n}.safetensors") for n in MODELS if f"{n}.safetensors" in manifest["files"]}
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return Checkpoint(manifest["step"], Arch(**manifest["arch"]), models, state)
    except Exception as error:  # whole by its hashes and yet not ours: written by another program
        raise CheckpointError(f"{path}: {type(error).__name__}: {str(error).splitlines()[0]}") from None


def newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and why each newer one was passed over.

    Raises:
        CheckpointError: none is whole; the message says what is wrong with each.
    """
    rejected: list[str] = []
    for path in reversed(steps(folder)):
        try:
            return load(path), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    raise CheckpointError("; ".join(rejected) or f"{folder}: no checkpoint in it")


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Adam's moments and step by parameter name, on the CPU: the same whichever implementation of Adam ran."""
    return {
        name: {key: value.detach().cpu().contiguous() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The inverse of `optimizer_state`; moments take the parameter's device and memory format."""
    optimizer.state.clear()
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        if name not in state:
            continue
        entry = {"step": state[name]["step"].to(parameter.device if on_device else "cpu", copy=True)}
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(state[name][key])
        optimizer.state[parameter] = entry


def lock(run: Path) -> IO[str]:
    """Claim a run directory for this process, until the file returned is closed or the process ends.

    Raises:
        BlockingIOError: another process has claimed it.
    """
    file = open(run / ".lock", "w")  # noqa: SIM115  open for as long as the claim is held
    with contextlib.suppress(ImportError):  # a system without advisory locks goes on without one
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file
