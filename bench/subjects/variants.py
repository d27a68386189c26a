"""What parity has a GEMM do beside what a step has it do: every epilogue, batch norm in the load, small tiles."""

from typing import Any

import torch

from bench.subjects.accuracy import DTYPES
from bench.subjects.problems import MODES, Before, Problem, Use
from kernels import tuning

USES = [
    Use(mode, activation, groups, merge)
    for mode in MODES
    for activation in ("none", "relu", "leaky_relu", "tanh")
    for groups in (1, 2)
    for merge in ((False, True) if mode in ("statistics", "batch_norm_grad") else (False,))
    if not (mode == "statistics" and activation != "none")
    and not (mode.startswith("batch_norm") and activation == "tanh")
]


def onto_image(kernel: str, out: int) -> bool:
    return kernel == "conv_transpose" and out <= tuning.IMAGE_CHANNELS


def served(p: Problem, config: Any) -> bool:
    """Whether a launcher takes a tile: an image with a batch norm is the general kernel's, whose TMA boxes want more
    channels."""
    return not (config.tma and onto_image(p.kernel, p.out) and p.use.mode not in ("activation", "activation_grad"))


def deferred_uses(p: Problem, groups: int) -> list[Use]:
    """What surrounds a product whose input's batch norm is deferred."""
    if p.kernel == "wgrad":
        return [Use("", groups=groups, before=Before(*ends)) for ends in (("relu", "low"), ("leaky_relu", "high"))]
    if onto_image(p.kernel, p.out):
        return [Use("activation", "tanh", groups, before=Before("relu"))]
    return [Use("statistics", "none", groups, True, Before("leaky_relu" if p.kernel == "conv" else "relu"))]


def tiles(kernel: str, into: int, out: int, low: int, precision: str, device: torch.device) -> list[tuple[str, Any]]:
    """A small tile by TMA, where TMA can load it, and one by pointers."""
    from kernels._triton.config import ConvConfig, WgradConfig, image_box, pixel_box, tma_fits

    widest = 16 if device.type == "cpu" else 64
    depth = min(widest, 32) if precision in ("tf32", "fp32") else widest
    depth = min(depth, 16 if into < 32 else depth)
    image = onto_image(kernel, out)
    fits = tma_fits((into,) if image else (into, out), DTYPES[precision].itemsize)
    fits &= kernel != "conv" or into % depth == 0
    found = []
    for tma, path in ((True, "tma"), (False, "pointers")):
        if tma and (not fits or (precision == "fp32" and device.type == "cuda")):  # scalar products: never by TMA
            continue
        if kernel == "wgrad":
            found.append((path, WgradConfig(*pixel_box(32, low, low), widest, widest, 3, 4, 3, tma)))
        else:
            box = (image_box if image else pixel_box)(64, low, low)
            found.append((path, ConvConfig(*box, max(16, widest // 2), depth, 4, 3, tma)))
    return found
