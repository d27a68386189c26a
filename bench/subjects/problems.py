"""The products of a training step: kernel, shape, precision, and the epilogue that the step gives each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.roofline import SINGLE, Kernel
from bench.subjects.accuracy import DTYPES, runnable
from dcgan.arch import Arch
from kernels.geometry import Layer

MODES = ("activation", "statistics", "activation_grad", "batch_norm_grad")


@dataclass(frozen=True)
class Use:
    """What follows a product: an epilogue's mode and activation, over so many batch-norm groups; `merge` settles the
    batch norm in the same launch, as a step does."""

    mode: str = "activation"
    activation: str = "none"
    groups: int = 1
    merge: bool = False

    def __str__(self) -> str:
        activation = f" {self.activation}" if self.activation != "none" else ""
        return f"{self.mode}{activation} g{self.groups}{' merged' if self.merge else ''}"


@dataclass(frozen=True)
class Problem:
    """One product.

    Args:
        kernel: `conv`, `conv_transpose` or `wgrad`.
        into, out: channels of its input and output; of `wgrad` those of the low- and the high-resolution map.
        low: height and width of the low-resolution map, in pixels.
        images: N. precision: of `bench.subjects.accuracy.DTYPES`.
        layer, direction: what it serves in a step, for the rows' names.
        use: its epilogue; none for `wgrad`.
    """

    kernel: str
    into: int
    out: int
    low: int
    images: int
    precision: str = "bf16"
    layer: str = "-"
    direction: str = "forward"
    use: Use = Use()

    @property
    def key(self) -> str:
        """Its place in the tuned table: channels, and the size of the map it reads (the low one for `wgrad`)."""
        return f"{self.into}x{self.out}@{2 * self.low if self.kernel == 'conv' else self.low}"

    @property
    def flops(self) -> int:
        return 2 * self.images * self.low**2 * 16 * self.into * self.out

    @property
    def bytes(self) -> int:
        """Every operand once: input, weight and output, and what a gradient's epilogue reads."""
        high, low = 4 * self.low**2, self.low**2
        read, written = (high, low) if self.kernel == "conv" else (low, high)
        size, weights = DTYPES[self.precision].itemsize, 16 * self.into * self.out
        if self.kernel == "wgrad":
            return size * self.images * (low * self.into + high * self.out) + SINGLE * weights
        saved = 1 + self.use.mode.endswith("_grad")
        return size * (self.images * (read * self.into + saved * written * self.out) + weights)

    def work(self) -> Kernel:
        return Kernel(self.direction, self.layer, self.kernel, self.flops, self.bytes)

    def recipes(self, device: torch.device) -> list[str]:
        """Those that can run on a device; the library on a CPU takes none of our kernels."""
        if device.type == "cpu":
            return ["library", *runnable(("triton", "cuda"), device, self.precision, self.kernel)]
        return runnable(("eager", "library", "triton", "cuda"), device, self.precision, self.kernel)

    def name(self, recipe: str) -> str:
        return f"{self.kernel}/{self.layer}/{self.direction}/{recipe}/{self.precision}/b{self.images}"


def step_problems(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Problem]:
    """The products of a training step at `batch` images: G's at `batch`, D's at [real | fake] and, frozen, at `batch`.

    The gradient of a layer's input goes through the activation of the layer before it, and its batch norm.
    """
    yield from _network(arch.generator, batch, 1, precision, first="")
    yield from _network(arch.discriminator, 2 * batch, 2, precision, first="")
    for problem in _network(arch.discriminator, batch, 1, precision, first="tanh"):
        if problem.kernel != "wgrad":
            yield problem


def _network(layers: tuple[Layer, ...], images: int, groups: int, precision: str, first: str) -> Iterator[Problem]:
    """`first`: the activation that made the network's own input, where a gradient of it is wanted."""
    for before, layer in zip((None, *layers), layers, strict=False):
        if layer.stride != 2:
            continue
        low = min(layer.in_size, layer.out_size)
        ends = (layer.in_channels, layer.out_channels)
        shared = {"low": low, "images": images, "precision": precision, "layer": layer.name}
        other = "conv_transpose" if layer.kind == "conv" else "conv"
        after = Use("activation", layer.activation)
        if layer.batch_norm:
            after = Use("statistics", groups=groups, merge=True)
        yield Problem(layer.kind, *ends, **shared, direction="forward", use=after)
        into = None
        if before is not None:
            mode = "batch_norm_grad" if before.batch_norm else "activation_grad"
            into = Use(mode, before.activation, groups if before.batch_norm else 1, before.batch_norm)
        elif first:
            into = Use("activation_grad", first)
        if into:
            yield Problem(other, *ends[::-1], **shared, direction="dgrad", use=into)
        yield Problem("wgrad", *(ends[::-1] if layer.kind == "conv" else ends), **shared, direction="wgrad")


def distinct(problems: Iterator[Problem]) -> list[Problem]:
    """Without those whose kernel, shape and use another has, whatever layer they serve."""
    seen = {}
    for problem in problems:
        seen.setdefault(replace(problem, layer="-", direction="forward"), problem)
    return list(seen.values())
