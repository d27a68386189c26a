"""The products of a training step: kernel, shape, precision, and what the step has each do before and after it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from bench.roofline import SINGLE, Kernel
from bench.subjects.accuracy import DTYPES, runnable
from dcgan.arch import Arch
from kernels import dispatch, tuning
from kernels.geometry import Layer

MODES = ("activation", "batch_norm", "statistics", "activation_grad", "batch_norm_grad")


@dataclass(frozen=True)
class Before:
    """What a product does to its input as it loads it: apply a batch norm and its activation. `side`: which map of a
    `wgrad` is the input, `low` or `high`."""

    activation: str
    side: str = ""

    def __str__(self) -> str:
        return f"deferred {self.activation} {self.side}".strip()


@dataclass(frozen=True)
class Use:
    """What surrounds a product: an epilogue's mode (of `MODES`; `wgrad` has none) and activation, over so many
    batch-norm groups; `merge` settles the batch norm in the same launch, as a step does; `before`, where the input's
    batch norm is deferred to the load."""

    mode: str = "activation"
    activation: str = "none"
    groups: int = 1
    merge: bool = False
    before: Before | None = None

    def __str__(self) -> str:
        activation = f" {self.activation}" if self.activation != "none" else ""
        merged = " merged" if self.merge else ""
        before = f", {self.before}" if self.before else ""
        return f"{self.mode}{activation} g{self.groups}{merged}{before}".strip()


@dataclass(frozen=True)
class Problem:
    """One product.

    Args:
        kernel: `conv`, `conv_transpose` or `wgrad`.
        into, out: channels of its input and output; of `wgrad` those of the low- and the high-resolution map.
        low: height and width of the low-resolution map, in pixels.
        images: N. precision: of `bench.subjects.accuracy.DTYPES`.
        layer, direction: what it serves in a step, for the rows' names.
        use: what surrounds it; no epilogue for `wgrad`.
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
        """Those that can run on a device; the library on a CPU takes none of our kernels, and the extension's products
        apply nothing in the load."""
        ours = ("triton",) if self.use.before else ("triton", "cuda")
        if device.type == "cpu":
            return ["library", *runnable(ours, device, self.precision, self.kernel)]
        return runnable(("eager", "library", *ours), device, self.precision, self.kernel)

    def name(self, recipe: str) -> str:
        direction = f"{self.direction} deferred" if self.use.before else self.direction
        return f"{self.kernel}/{self.layer}/{direction}/{recipe}/{self.precision}/b{self.images}"


@dataclass(frozen=True)
class Read:
    """A map on its way into a layer of a step, whose batch norm may be applied by a launch of its own or in the loads.

    Args:
        layer: that reads the map. before: the layer that made it.
        images: N. groups: of batch norm. precision: of the maps.
        weights: whether the layer's weight gradient reads the map too; not where D is frozen, in G's step.
    """

    layer: Layer
    before: Layer
    images: int
    groups: int
    precision: str
    weights: bool

    @property
    def kind(self) -> str:
        """Its place in the tuned table's `inputs`, and `key` within it."""
        return self.layer.kind if self.weights else f"{self.layer.kind}_forward"

    @property
    def key(self) -> str:
        return dispatch.layer_key(self.layer)

    @property
    def name(self) -> str:
        return f"inputs/{self.kind}/{self.key}/{self.precision}/b{self.images}"

    def deferred(self, device_name: str | None = None) -> bool:
        """What a step does on the device of that name; without one, the default."""
        return tuning.deferred(device_name, self.layer, self.precision, self.images, self.weights)[0]

    def problems(self, deferred: bool) -> list[Problem]:
        """The products that read the map: the forward pass, and the weight gradient."""
        found = [forward(self.layer, self.images, self.groups, self.precision, self.before if deferred else None)]
        if self.weights:
            found.append(wgrad(self.layer, self.images, self.groups, self.precision, self.before if deferred else None))
        return found


def forward(layer: Layer, images: int, groups: int, precision: str, before: Layer | None = None) -> Problem:
    """A layer's forward product; `before`: the layer whose batch norm and activation its load applies."""
    after = Use("statistics", groups=groups, merge=True) if layer.batch_norm else Use("activation", layer.activation)
    if before is not None:
        after = replace(after, groups=groups, before=Before(before.activation))
    ends = (layer.in_channels, layer.out_channels)
    return Problem(layer.kind, *ends, _low(layer), images, precision, layer.name, "forward", after)


def wgrad(layer: Layer, images: int, groups: int, precision: str, before: Layer | None = None) -> Problem:
    """A layer's weight gradient; `before` as for `forward`."""
    ends, side = (layer.in_channels, layer.out_channels), "low"
    if layer.kind == "conv":
        ends, side = ends[::-1], "high"
    use = Use() if before is None else Use("", groups=groups, before=Before(before.activation, side))
    return Problem("wgrad", *ends, _low(layer), images, precision, layer.name, "wgrad", use)


def _low(layer: Layer) -> int:
    return min(layer.in_size, layer.out_size)


def step_networks(arch: Arch, batch: int) -> Iterator[tuple[tuple[Layer, ...], int, int, bool]]:
    """The passes of a training step at `batch` images: layers, images, groups, and whether weights learn. G's at
    `batch`, D's at [real | fake] and, frozen, at `batch`."""
    yield arch.generator, batch, 1, True
    yield arch.discriminator, 2 * batch, 2, True
    yield arch.discriminator, batch, 1, False


def step_reads(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Read]:
    """The maps of a step that have a choice: D's last is applied by its head, always."""
    for layers, images, groups, weights in step_networks(arch, batch):
        for before, layer in pairwise(layers):
            if layer.stride == 2 and before.batch_norm:
                yield Read(layer, before, images, groups, precision, weights)


def step_problems(
    arch: Arch, batch: int, precision: str = "bf16", device_name: str | None = None
) -> Iterator[Problem]:  # fmt: skip
    """The products of a training step at `batch` images, as the device of that name does them; without one, by default.

    The gradient of a layer's input goes through the activation of the layer before it, and its batch norm.
    """
    reads = {(r.layer, r.images, r.weights): r for r in step_reads(arch, batch, precision)}
    for layers, images, groups, weights in step_networks(arch, batch):
        for before, layer in zip((None, *layers), layers, strict=False):
            if layer.stride != 2:
                continue
            read = reads.get((layer, images, weights))
            applied = before if read and read.deferred(device_name) else None
            yield forward(layer, images, groups, precision, applied)
            if into := _gradient_use(before, groups, weights):
                other = "conv_transpose" if layer.kind == "conv" else "conv"
                ends = (layer.out_channels, layer.in_channels)
                yield Problem(other, *ends, _low(layer), images, precision, layer.name, "dgrad", into)
            if weights:
                yield wgrad(layer, images, groups, precision, applied)


def other_problems(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Problem]:
    """What a table may have a step do instead of the default: a batch norm in the load, or not."""
    for read in step_reads(arch, batch, precision):
        yield from read.problems(not read.deferred())


def _gradient_use(before: Layer | None, groups: int, weights: bool) -> Use | None:
    """The epilogue of a gradient by a layer's input; None if nobody wants that one. D's own input is an image, whose
    gradient a frozen D hands on to G, through the tanh that made it."""
    if before is None:
        return None if weights else Use("activation_grad", "tanh")
    if before.batch_norm:
        return Use("batch_norm_grad", before.activation, groups, True)
    return Use("activation_grad", before.activation)


def distinct(problems: Iterator[Problem]) -> list[Problem]:
    """Without those whose kernel, shape and use another has, whatever layer they serve."""
    seen = {}
    for problem in problems:
        seen.setdefault(replace(problem, layer="-", direction="forward"), problem)
    return list(seen.values())
