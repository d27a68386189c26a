"""The public convolution ops on the layers of a DCGAN as subjects: forward, and backward by all their inputs.

Recipes are the backends of `kernels.dispatch`, asked for by name. The twin is the same in PyTorch's own functions, in
the precision asked for; the oracle that in float64, with autograd's gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from bench.roofline import SINGLE, Kernel, moved_bytes
from bench.subjects.accuracy import DTYPES, KINK, Answers, Noise, Outputs, Subject, runnable, walk
from dcgan.arch import Arch
from kernels import dispatch, reference
from kernels.geometry import Layer

RECIPES = tuple(name for name in dispatch.BACKENDS if name != "auto")
SLOPE = 0.2


@dataclass(frozen=True)
class Op:
    """A public op on one layer.

    Args:
        layer: its geometry. direction: `forward` or `backward`, all gradients at once.
        images: N. groups: of batch norm. precision: of `bench.subjects.accuracy.DTYPES`.
    """

    layer: Layer
    direction: str
    images: int
    groups: int = 1
    precision: str = "bf16"

    @property
    def op(self) -> str:
        return dispatch.op_of(self.layer)

    def name(self, recipe: str) -> str:
        return f"{self.op}/{self.layer.name}/{self.direction}/{recipe}/{self.precision}/b{self.images}"

    def work(self) -> list[Kernel]:
        """The passes that a floor counts; maps are the precision's size, a weight's gradient float32."""
        directions = ("forward",) if self.direction == "forward" else ("dgrad", "wgrad")
        return [pass_of(self.layer, direction, self.images, self.precision) for direction in directions]

    def recipes(self, device: torch.device) -> list[str]:
        return runnable(RECIPES, device, self.precision)

    def build(self, device: torch.device) -> Subject:
        inputs = Inputs.make(self, device)
        runs: dict[str, Callable[[], Outputs]] = {}
        timed: dict[str, Callable[[], object]] = {}
        for recipe in RECIPES:
            runs[recipe], timed[recipe] = backend_calls(self, inputs, recipe)
        return Subject(runs, lambda: answers(self, inputs), self.precision, timed)


def pass_of(layer: Layer, direction: Any, images: int, precision: str) -> Kernel:
    """One pass of a layer, whose bytes `bench.roofline` counts for 2-byte maps, in this precision."""
    single = SINGLE * layer.weights if direction == "wgrad" else 0
    moved = (moved_bytes(layer, direction, images) - single) * DTYPES[precision].itemsize // 2 + single
    return Kernel(direction, layer.name, "", layer.gemm(direction, images).flops, moved)


def step_ops(arch: Arch, batch: int, precision: str = "bf16") -> Iterator[Op]:
    """Those of a training step at `batch` images: G's at `batch`, D's at [real | fake]; each forward and backward."""
    yield from network_ops(arch.generator, batch, 1, precision)
    yield from network_ops(arch.discriminator, 2 * batch, 2, precision)


def network_ops(layers: tuple[Layer, ...], images: int, groups: int, precision: str) -> Iterator[Op]:
    """Each layer's op, forward and backward."""
    for layer in layers:
        for direction in ("forward", "backward"):
            yield Op(layer, direction, images, groups if layer.batch_norm else 1, precision)


@dataclass(frozen=True)
class Inputs:
    """x (N, C, H, W) of the maps' type; weight (channels_last), batch norm's weight and bias, running statistics in
    float32; the gradient of the output, 0 where the activation's input lies near its kink."""

    x: Tensor
    weight: Tensor
    norm: tuple[Tensor, ...]
    running: tuple[Tensor, ...]
    grad: Tensor

    @classmethod
    def make(cls, op: Op, device: torch.device) -> "Inputs":
        layer, noise, last = op.layer, Noise(device, op.precision), torch.channels_last
        x = noise(op.images, layer.in_channels, layer.in_size, layer.in_size).contiguous(memory_format=last)
        fan_in = layer.gemm("forward", 1).k
        weight = noise.single(*layer.weight_shape, scale=fan_in**-0.5).contiguous(memory_format=last)
        weight = weight.to(DTYPES[op.precision]).float()  # so that packing rounds nothing
        norm, running = (), ()
        if layer.batch_norm:
            c = layer.out_channels
            norm = 1 + noise.single(c, scale=0.1), noise.single(c, scale=0.1)
            running = noise.single(c), noise.single(c).abs() + 0.5, torch.zeros((), dtype=torch.int64, device=device)
        with torch.no_grad():
            exact = [t.double() for t in running[:2]]
            z = normalised(op, x.double(), weight.double(), tuple(t.double() for t in norm), exact)
            grad = noise(*z.shape)
            if layer.activation in ("relu", "leaky_relu"):
                grad *= (z.abs() >= KINK[op.precision] * (1 if layer.batch_norm else z.std().item())).to(grad.dtype)
        return cls(x, weight, norm, running, grad.contiguous(memory_format=last))


def normalised(op: Op, x: Tensor, weight: Tensor, norm: tuple[Tensor, ...], running: list[Tensor]) -> Tensor:
    """The activation's input by PyTorch's functions; moves the running statistics."""
    layer = op.layer
    convolution = F.conv2d if layer.kind == "conv" else F.conv_transpose2d
    y = convolution(x, weight.to(x.dtype), stride=layer.stride, padding=layer.padding)
    if not layer.batch_norm:
        return y
    return torch.cat([F.batch_norm(part, *running[:2], *norm, True, 0.1, 1e-5) for part in y.chunk(op.groups)])


def plain(op: Op, x: Tensor, weight: Tensor, norm: tuple[Tensor, ...], running: list[Tensor]) -> Tensor:
    return reference.activate(normalised(op, x, weight, norm, running), op.layer.activation, SLOPE)


def fused(op: Op, recipe: str | None, x: Tensor, weight: Tensor, norm: tuple, running: list[Tensor]) -> Tensor:
    """The public op."""
    layer = op.layer
    settings = {"stride": layer.stride, "padding": layer.padding, "activation": layer.activation, "backend": recipe}
    function = getattr(kernels, op.op)
    if layer.batch_norm:
        return function(x, weight, *norm, *running, groups=op.groups, negative_slope=SLOPE, **settings)
    return function(x, weight, negative_slope=SLOPE, **settings)


def outputs(op: Op, run: Callable[..., Tensor], i: Inputs) -> Outputs:
    """The forward's results and moved statistics, or all gradients."""
    running = [t.clone() for t in i.running]
    if op.direction == "forward":
        with torch.no_grad():
            y = run(i.x, i.weight, i.norm, running)
        return {"y": y, **dict(zip(("running_mean", "running_var"), running, strict=False))}
    leaves = [t.detach().clone().requires_grad_() for t in (i.x, i.weight, *i.norm)]
    with torch.enable_grad():
        y = run(*leaves[:2], tuple(leaves[2:]), running)
        gradients = torch.autograd.grad(y, leaves, i.grad.to(y.dtype))
    return dict(zip(("dx", "dweight", "dgamma", "dbeta"), gradients, strict=False))


def backend_calls(op: Op, i: Inputs, recipe: str) -> tuple[Callable[[], Outputs], Callable[[], object]]:
    """By a backend: its outputs; and the pass alone, to time: a backward of a graph that is made once and kept."""

    def run(*arguments: Any) -> Tensor:
        return fused(op, recipe, *arguments)

    kept: list[tuple[Tensor, list[Tensor]]] = []

    def backward() -> object:
        if not kept:
            leaves = [t.detach().clone().requires_grad_() for t in (i.x, i.weight, *i.norm)]
            kept.append((run(*leaves[:2], tuple(leaves[2:]), [t.clone() for t in i.running]), leaves))
        y, leaves = kept[0]
        return torch.autograd.grad(y, leaves, i.grad, retain_graph=True)

    running = [t.clone() for t in i.running]

    def forward() -> object:
        with torch.no_grad():
            return run(i.x, i.weight, i.norm, running)

    return lambda: outputs(op, run, i), forward if op.direction == "forward" else backward


def answers(op: Op, i: Inputs) -> Answers:
    def run(*arguments: Any) -> Tensor:
        return plain(op, *arguments)

    exact = replace(
        i,
        x=i.x.double(),
        weight=i.weight.double(),
        norm=tuple(t.double() for t in i.norm),
        running=tuple(t.double() if t.is_floating_point() else t for t in i.running),
        grad=i.grad.double(),
    )
    oracle, twin = outputs(op, run, exact), outputs(op, run, i)
    layer, slack = op.layer, {}
    pixels = op.images * layer.out_size**2
    half = DTYPES[op.precision]
    for name, value in oracle.items():
        largest = value.abs().max().item()
        if name in ("dgamma", "dbeta"):  # sums that cancel, of terms of the order of 1, each rounded with its map
            slack[name] = 2 * torch.finfo(half).eps * pixels**0.5 / 8 * i.grad.abs().max().item()
        elif name == "dweight":
            terms = pixels if layer.kind == "conv" else op.images * layer.in_size**2
            slack[name] = walk(terms, half, largest)
        else:
            terms = layer.gemm("forward" if name == "y" else "dgrad", 1).k
            slack[name] = walk(terms, half if name in ("y", "dx") else torch.float32, max(largest, 1.0))
    return Answers(oracle, twin, slack)
