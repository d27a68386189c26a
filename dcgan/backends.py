"""What runs each layer of a step, and why: what the doctor prints and a run's config.json keeps."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dcgan.arch import Arch
from kernels import tuning
from kernels.cpu.products import choose
from kernels.geometry import Layer
from kernels.pool import Pool


class Row(NamedTuple):
    layer: str
    op: str
    backend: str
    why: str


def fused_step(arch: Arch, batch: int, device: torch.device, dtype: torch.dtype, precision: str) -> Iterator[Row]:
    """What `--fused` runs for each layer: on a CPU one way for all its products; on a GPU a tile for each of them,
    whether they apply the batch norm of their input in the load (`deferred`) or find it applied, and how all launches
    follow each other.

    Args:
        batch: images of a step.
        dtype: of the maps.
        precision: as the tuned table calls it, `tf32` where fp32 products may be.
    """
    if device.type == "cuda":
        ask, why = tuning.dependent(tuning.device_name(device), precision, batch)
        yield Row("all", "launches", tuning.LAUNCHES[ask], why)
    for layers, images in ((arch.generator, batch), (arch.discriminator, 2 * batch)):
        for before, layer in zip((None, *layers), layers, strict=False):
            if device.type != "cuda":
                yield Row(layer.name, "all", "eager", choose(layer, dtype, Pool(device)).WHY)
            elif layer.stride == 2:
                name = tuning.device_name(device)
                for kernel, shape in products(layer):
                    yield Row(layer.name, kernel, *tuning.explain(name, kernel, shape, precision, images))
                if before is not None and before.batch_norm:
                    yield Row(layer.name, "input's batch norm", *applied(name, layer, precision, images))
                    if layers is arch.discriminator:  # frozen, in G's step
                        frozen = applied(name, layer, precision, batch, weights=False)
                        yield Row(layer.name, "  where D is frozen", *frozen)
            elif layer.kind == "conv":
                yield Row(layer.name, "head", "triton", "with the loss, and batch norm before it")
            else:
                yield Row(layer.name, "matmul", "library", "a plain matrix product")


def applied(name: str | None, layer: Layer, precision: str, images: int, weights: bool = True) -> tuple[str, str]:
    """Who applies the batch norm of a layer's input, in the words of a tuned table, and why."""
    deferred, why = tuning.deferred(name, layer, precision, images, weights)
    return tuning.INPUTS[deferred], why


def products(layer: Layer) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """A layer's products, forward, by its input and by its weight, as the tuned table calls them."""
    forward = (layer.in_channels, layer.out_channels, layer.in_size)
    backward = (layer.out_channels, layer.in_channels, layer.out_size)
    yield layer.kind, forward
    yield "conv_transpose" if layer.kind == "conv" else "conv", backward
    yield "wgrad", backward if layer.kind == "conv" else forward
