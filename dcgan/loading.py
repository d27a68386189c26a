"""A trained generator from a run, a checkpoint, or a state dict of the PyTorch example."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dcgan import checkpoint as checkpoints
from dcgan.arch import Arch
from dcgan.checkpoint import CheckpointError
from dcgan.errors import InputError, say
from dcgan.model import Generator


def strip_module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `module.` that DataParallel puts before them."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def arch_of_generator(state: dict[str, Tensor]) -> Arch:
    """The member of the family that a generator's state dict belongs to (its `ndf` is not in there: taken as ngf).

    Args:
        state: names and shapes as the PyTorch example's, `main.0.weight` first.

    Raises:
        ValueError: it is no generator of the family; the message says where it departs from one.
    """
    weights = [value for name, value in state.items() if name.startswith("main.") and value.ndim == 4]
    if len(weights) < 3:
        raise ValueError(f"{len(weights)} convolution weights named main.*, a generator has at least 3")
    nz, start = weights[0].shape[0], weights[0].shape[-1]
    ngf, channels = weights[-1].shape[:2]
    arch = Arch(start << (len(weights) - 1), channels, nz, ngf, ngf, dense=start == 8)
    for layer, weight in zip(arch.generator, weights, strict=True):
        if layer.weight_shape != tuple(weight.shape):
            raise ValueError(f"{layer.name} has shape {tuple(weight.shape)}, the family's is {layer.weight_shape}")
    return arch


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from .safetensors or a torch file; nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        kind = type(error).__name__
        raise InputError(f"{path}: no state dict in it that loads without executing anything ({kind})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path} is not a state dict: expected tensors by name")
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise InputError(f"{path}: {name} is {value.dtype}, {value.layout}: expected dense real numbers")
    return strip_module(state)


def _checkpoint(folder: Path) -> checkpoints.Checkpoint:
    try:
        if (folder / "manifest.json").exists():
            return checkpoints.load(folder)
        saved, rejected = checkpoints.newest(folder / "checkpoints")
        for reason in rejected:
            say(f"warning: passed over {reason}")
        return saved
    except CheckpointError as error:
        raise InputError(str(error)) from None


def load(source: str | Path, *, ema: bool = True, device: str | torch.device = "cpu") -> Generator:
    """The generator of a run.

    Args:
        source: a run's directory (its newest whole checkpoint is taken), a checkpoint's directory, or a state dict in
            .safetensors or in a torch file such as the PyTorch example writes (a `module.` prefix is stripped).
        ema: take the average of the weights where the run kept one.
        device: where it goes.

    Returns:
        The generator in evaluation mode, so that a sample does not depend on its batch mates: z (N, nz) → images
        (N, C, H, W), float32 in [-1, 1]. `.arch` tells nz and the image size.

    Raises:
        InputError: nothing there that can be loaded; one line that says why.
    """
    path = Path(source)
    try:
        found = bool(str(source)) and path.exists()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not found:
        raise InputError(f"{str(source)!r}: no such run, checkpoint or state dict")
    if path.is_dir():
        saved = _checkpoint(path)
        arch, state = saved.arch, saved.models["generator"]
        if ema:
            state = saved.models.get("generator_ema", state)
    else:
        state = _state_dict(path)
        try:
            arch = arch_of_generator(state)
        except ValueError as error:
            raise InputError(f"{path} is not a generator of this family: {error}") from None
    generator = Generator(arch)
    try:
        generator.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    return generator.to(device).eval()
