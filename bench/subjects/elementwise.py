"""The kernels of a step that are neither product nor public op as subjects: batch norm's six, and D's head.

Every backend has launchers of the same names (`kernels.launchers`), so one function per kernel serves them all,
the twin (`kernels.reference`) and, on tensors in float64, the oracle.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.roofline import SINGLE, Kernel
from bench.subjects.accuracy import DTYPES, Answers, Noise, Outputs, Subject, runnable, sums_slack, walk
from bench.subjects.gemms import merged, off_the_kink, random_state
from dcgan.arch import Arch
from kernels import reference
from kernels.geometry import Layer, Partials
from kernels.launchers import launchers

BATCH_NORM = ("statistics", "merge_statistics", "apply", "activation_grad", "merge_sums", "apply_grad")
HEAD = ("head", "head_grad")
PASSES = {"statistics": 1, "apply": 2, "activation_grad": 3, "apply_grad": 3, "head": 1, "head_grad": 2}
"""How often each reads or writes a whole map."""

TILES = 97
"""Tiles of the partials that the merging kernels are given: more than one block of theirs, and no multiple of it."""


@dataclass(frozen=True)
class Element:
    """One elementwise kernel of a step.

    Args:
        kernel: its name among the launchers.
        layer: whose output it is, or, of the head, whose input.
        images: N. groups: of batch norm. precision: of the maps.
    """

    kernel: str
    layer: Layer
    images: int
    groups: int = 1
    precision: str = "bf16"

    def name(self, recipe: str) -> str:
        return f"{self.kernel}/{self.layer.name}/{self.direction}/{recipe}/{self.precision}/b{self.images}"

    @property
    def direction(self) -> str:
        return "dgrad" if "grad" in self.kernel or self.kernel == "merge_sums" else "forward"

    @property
    def map_elements(self) -> int:
        head = self.kernel in HEAD
        return self.layer.in_elements(self.images) if head else self.layer.out_elements(self.images)

    def work(self) -> Kernel:
        size = DTYPES[self.precision].itemsize
        if self.kernel in PASSES:
            moved = PASSES[self.kernel] * self.map_elements * size
        else:
            moved = SINGLE * 2 * self.groups * TILES * self.layer.out_channels
        return Kernel(self.direction, self.layer.name, "", 0, moved)

    def recipes(self, device: torch.device) -> list[str]:
        return runnable(("eager", "triton", "cuda"), device, self.precision, self.kernel)

    def build(self, device: torch.device) -> Subject:
        inputs = make_inputs(self, Noise(device, self.precision))
        call = CALLS[self.kernel]

        def runner(recipe: str) -> Callable[[], Outputs]:
            return lambda: call(launchers(recipe), copied(inputs))

        runs = {recipe: runner(recipe) for recipe in ("triton", "cuda", "eager")}
        timed = {recipe: timed_call(self, recipe, inputs) for recipe in runs}
        return Subject(runs, lambda: answers(self, inputs), self.precision, timed)


def step_elements(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Element]:
    """Those of a training step at `batch` images: G's at `batch`, D's at [real | fake] and at `batch`."""
    g, d = arch.generator, arch.discriminator
    for layers, images, groups in ((g, batch, 1), (d, 2 * batch, 2), (d, batch, 1)):
        for layer in layers:
            if layer.batch_norm:
                yield from (Element(kernel, layer, images, groups, precision) for kernel in BATCH_NORM)
    for images, groups in ((2 * batch, 2), (batch, 1)):
        yield from (Element(kernel, d[-1], images, groups, precision) for kernel in HEAD)


Inputs = dict[str, Any]


def make_inputs(e: Element, noise: Noise) -> Inputs:
    """A kernel's tensors; maps NHWC, of the precision's type; nothing near an activation's kink."""
    groups, layer = e.groups, e.layer
    if e.kernel in ("merge_statistics", "merge_sums"):
        values = noise.single(2, groups, TILES, layer.out_channels)
        counts = torch.full((groups, TILES), 64.0, device=noise.device)
        counts[:, -1] = 5.0  # a tile that hangs over
        if e.kernel == "merge_sums":
            return {"partials": Partials(values, None), "rows": e.images // groups * layer.out_size**2}
        values[1] = values[1].abs() * 64
        vectors = {name: noise.single(layer.out_channels) for name in ("weight", "bias", "running_mean")}
        vectors["running_var"] = noise.single(layer.out_channels).abs() + 0.5
        tracked = torch.zeros((), dtype=torch.int64, device=noise.device)
        return {"partials": Partials(values, counts), **vectors, "tracked": tracked}
    head = e.kernel in HEAD
    size, channels = (layer.in_size, layer.in_channels) if head else (layer.out_size, layer.out_channels)
    activation = "leaky_relu" if head else layer.activation
    state = random_state(noise, groups, channels)
    y = noise(e.images, size, size, channels)
    _, _, scale, shift = state[:, :, None]
    y = off_the_kink(y, (reference.grouped(y, groups) * scale + shift).view(y.shape), e.precision)
    inputs = {"y": y, "state": state, "activation": activation, "groups": groups}
    if head:
        inputs["weight"] = noise(1, size, size, channels, scale=1 / (size * size * channels) ** 0.5)
        inputs["real"] = (True, False)[:groups]
        inputs["dlogits"] = noise.single(e.images)
    elif e.kernel in ("activation_grad", "apply_grad"):
        inputs["g"] = noise(*y.shape)
        inputs["means"] = noise.single(2, groups, channels, scale=0.1)
    return inputs


MOVED = ("running_mean", "running_var", "tracked")
"""Inputs that a kernel moves in place."""


def copied(inputs: Inputs) -> Inputs:
    """With clones of what is moved; maps, which none writes, as they are."""
    return {name: part.clone() if name in MOVED else part for name, part in inputs.items()}


def doubled(value: Any) -> Any:
    """Floating-point tensors in float64, whatever holds them."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, Partials):
        return Partials(*(doubled(part) for part in value))
    return {name: doubled(part) for name, part in value.items()} if isinstance(value, Mapping) else value


def _sums(g: Tensor, partials: Partials) -> Outputs:
    return {"g": g, **merged(partials, "")}


def _apply(launch: Any, i: Inputs) -> Outputs:
    return {"a": launch.apply(i["y"], i["state"], i["activation"])}


def _merge_statistics(launch: Any, i: Inputs) -> Outputs:
    names = ("weight", "bias", "running_mean", "running_var", "tracked")
    state = launch.merge_statistics(i["partials"], *(i[name] for name in names))
    return {"state": state, **{name: i[name] for name in names[2:4]}, "tracked": i["tracked"].double()}


def _merge_sums(launch: Any, i: Inputs) -> Outputs:
    return dict(zip(("dweight", "dbias", "means"), launch.merge_sums(i["partials"], i["rows"]), strict=True))


def _head(launch: Any, i: Inputs) -> Outputs:
    found = launch.head(i["y"], i["weight"], i["state"], i["real"], i["activation"])
    return dict(zip(("logits", "dlogits", "means"), found, strict=True))


def _head_grad(launch: Any, i: Inputs) -> Outputs:
    g, partials, dw = launch.head_grad(i["y"], i["weight"], i["state"], i["dlogits"], i["activation"])
    return _sums(g, partials) | {"dw": dw}


CALLS: dict[str, Callable[[Any, Inputs], Outputs]] = {
    "statistics": lambda launch, i: merged(launch.statistics(i["y"], i["groups"]), ""),
    "merge_statistics": _merge_statistics,
    "apply": _apply,
    "activation_grad": lambda launch, i: _sums(*launch.activation_grad(i["g"], i["y"], i["state"], i["activation"])),
    "merge_sums": _merge_sums,
    "apply_grad": lambda launch, i: {"dy": launch.apply_grad(i["g"], i["y"], i["state"], i["means"])},
    "head": _head,
    "head_grad": _head_grad,
}


RAW: dict[str, Callable[[Any, Inputs], object]] = {
    "statistics": lambda launch, i: launch.statistics(i["y"], i["groups"]),
    "activation_grad": lambda launch, i: launch.activation_grad(i["g"], i["y"], i["state"], i["activation"]),
    "head_grad": lambda launch, i: launch.head_grad(i["y"], i["weight"], i["state"], i["dlogits"], i["activation"]),
}
"""The kernels alone, where `CALLS` merges what their tiles left."""


def timed_call(e: Element, recipe: str, inputs: Inputs) -> Callable[[], object]:
    """The kernel alone, on the inputs themselves."""
    call = RAW.get(e.kernel, CALLS[e.kernel])
    return lambda: call(launchers(recipe), inputs)


def answers(e: Element, inputs: Inputs) -> Answers:
    exact = doubled(inputs)
    oracle, twin = CALLS[e.kernel](reference, exact), CALLS[e.kernel](reference, copied(inputs))
    rounded = ("a", "g", "dy")  # in the maps' type, and no sums
    slack = {
        name: walk(_terms(e), torch.float32, max(value.abs().max().item(), 1.0 if name in UNIT else 0.0))
        for name, value in oracle.items()
        if name not in rounded
    }
    largest = max(oracle["g"].abs().max().item() if "g" in oracle else 0.0, 4.0 if "mean" in oracle else 0.0)
    pixels = e.images // e.groups * (e.layer.in_size if e.kernel in HEAD else e.layer.out_size) ** 2
    return Answers(oracle, twin, slack | sums_slack(oracle, pixels, largest))


UNIT = ("means", "state", "dweight", "dbias", "logits")
"""Sums whose terms, of the order of 1, cancel: they are as wrong as their terms are large, not as the sum is."""


def _terms(e: Element) -> int:
    """Of the other sums that a kernel takes."""
    if e.kernel in HEAD:
        return max(e.images, e.layer.in_size**2 * e.layer.in_channels)
    return TILES if e.kernel.startswith("merge") else 1
