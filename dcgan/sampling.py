"""Images from a trained generator, as fast as the device makes them."""

import torch
from torch import Tensor, nn

from dcgan.config import resolve_precision
from dcgan.model import Generator
from dcgan.step import AUTOCAST_DTYPE
from kernels.conv_bn_act import running_state
from kernels.cpu.products import choose
from kernels.dispatch import why_not
from kernels.geometry import Epilogue, Layer
from kernels.launchers import launchers
from kernels.library import tf32
from kernels.pool import Pool

AT_ONCE = {"cpu": 64, "cuda": 1024}
"""Images in a pass, by device: more are no faster (docs/cpu.md has a CPU's figures; a GPU's are not measured)."""

MOST_GRAPHS = 4
"""CUDA graphs that are kept, one for each number of images."""


class Sampler:
    """Images from noise by a generator in evaluation mode: batch norm by its running statistics.

    On a CPU the products are those of the fused step, wide layers with 9/16 of the multiplications; batch norm is
    folded into the weights, and `AT_ONCE` images go through all layers at a time. On a GPU a layer is one kernel, its
    batch norm and activation in the product's epilogue (the first is the library's product and a pass), and all of them
    are one CUDA graph for each number of images. Where the kernels cannot run, the generator runs as it is. Not for two
    threads at a time.

    Args:
        generator: weights and statistics are taken over as they are now; it is not changed, nor its mode regarded.
        precision: `fp32`, `bf16`; on a GPU also `tf32` and `fp16`; `auto` is bf16 where the device is fast at it.

    Attributes:
        why: why the generator runs as it is; None where it is by the kernels.

    Raises:
        InputError: a precision that the device does not have.
    """

    def __init__(self, generator: Generator, precision: str = "auto"):
        self.arch, self.device = generator.arch, next(generator.parameters()).device
        self.precision = resolve_precision(precision, self.device)
        self.dtype = AUTOCAST_DTYPE.get(self.precision, torch.float32)
        gpu = self.device.type == "cuda"
        self.why = why_not("triton", self.device, self.dtype) if gpu else None
        kind = _AsItIs if self.why else _OnGpu if gpu else _OnCpu
        with torch.no_grad():
            self.forward = kind(generator, self.dtype, self.precision)

    def __call__(self, z: Tensor) -> Tensor:
        """Images in [-1, 1], the same under autocast and in inference mode.

        Args:
            z: noise (N, nz) on the generator's device, any floating-point dtype.

        Returns:
            (N, C, H, W) of the precision's dtype, channels_last.

        Raises:
            ValueError: z is of another shape, or on another device.
        """
        if z.ndim != 2 or z.shape[1] != self.arch.nz or not len(z) or z.device != self.device:
            got = f"{tuple(z.shape)} on {z.device}"
            raise ValueError(f"z is {got}: expected (N, {self.arch.nz}) on {self.device}, N at least 1")
        # buffers are kept from call to call, and one made in inference mode could not be written outside of it
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.forward(z)


def layers_of(generator: Generator) -> list[tuple[Layer, Tensor, Tensor | None]]:
    """Each layer with its weight, a copy, and the batch-norm state (4, 1, C) float32 of its running statistics."""
    convolutions = [m for m in generator.main if isinstance(m, nn.ConvTranspose2d)]
    norms = iter([m for m in generator.main if isinstance(m, nn.BatchNorm2d)])
    found = []
    for layer, convolution in zip(generator.arch.generator, convolutions, strict=True):
        norm = next(norms) if layer.batch_norm else None
        state = norm and running_state(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
        found.append((layer, convolution.weight.detach().clone(), state))
    return found


class _OnCpu:
    """The products of `kernels.cpu.products`, the batch norm's scale in their weights, its shift added after them."""

    def __init__(self, generator: Generator, dtype: torch.dtype, precision: str):
        self.arch, self.dtype, self.pool, self.stages = generator.arch, dtype, Pool("cpu"), []
        for layer, weight, state in layers_of(generator):
            shift = None
            if state is not None:
                _, _, scale, shift = (row.view(1, -1, 1, 1) for row in state)
                weight, shift = weight * scale, shift.to(dtype)
            product = choose(layer, dtype, self.pool)
            self.stages.append(
                (layer, product, product.pack(weight.contiguous(memory_format=torch.channels_last)), shift)
            )

    def __call__(self, z: Tensor) -> Tensor:
        shape = (len(z), self.arch.channels, self.arch.image_size, self.arch.image_size)
        images = torch.empty(shape, dtype=self.dtype, memory_format=torch.channels_last)
        for part, out in zip(z.to(self.dtype).split(AT_ONCE["cpu"]), images.split(AT_ONCE["cpu"]), strict=True):
            x = part[:, :, None, None]
            for layer, product, weight, shift in self.stages:
                x = product.to_high(product.low(x), weight)
                if shift is not None:
                    room = self.pool.images(f"{layer.name}.y", tuple(x.shape), self.dtype)
                    x = torch.add(x, shift, out=room).relu_()
            torch.tanh(x, out=out)
        return images


class _OnGpu:
    """The launchers of `kernels`, replayed as one CUDA graph."""

    def __init__(self, generator: Generator, dtype: torch.dtype, precision: str):
        self.arch, self.dtype, self.launch = generator.arch, dtype, launchers("auto")
        self.options = {"precision": "tf32" if precision == "tf32" else "ieee"}
        self.stages = [
            (layer, weight.to(dtype, memory_format=torch.channels_last).permute(0, 2, 3, 1).contiguous(), state)
            for layer, weight, state in layers_of(generator)
        ]
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, z: Tensor) -> Tensor:
        n, most = len(z), AT_ONCE["cuda"]
        if n > most:
            shape = (n, self.arch.channels, self.arch.image_size, self.arch.image_size)
            images = torch.empty(shape, dtype=self.dtype, device=z.device, memory_format=torch.channels_last)
            for part, out in zip(z.split(most), images.split(most), strict=True):
                out.copy_(self(part))
            return images
        if n not in self.graphs:
            if len(self.graphs) == MOST_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[n] = self.capture(z.to(self.dtype, copy=True))
        graph, room, images = self.graphs[n]
        room.copy_(z)
        graph.replay()
        return images.clone()  # the graph's own are written over by its next replay

    def capture(self, room: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """The graph that reads noise from `room`, and the images that it writes."""
        outside, stream = torch.cuda.current_stream(room.device), torch.cuda.Stream(room.device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            self.run(room)  # compiles the kernels, and warms the library up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            images = self.run(room)
        outside.wait_stream(stream)
        return graph, room, images

    def run(self, z: Tensor) -> Tensor:
        (_, weight, state), *others = self.stages
        y = (z @ weight.flatten(1)).view(len(z), *weight.shape[1:])
        x = self.launch.apply(y, state, "relu")
        for layer, weight, state in others:
            x, _ = self.launch.conv_transpose(x, weight, Epilogue(layer.activation, state=state), **self.options)
        return x.permute(0, 3, 1, 2)


class _AsItIs:
    """A copy of the generator, channels_last, under autocast."""

    def __init__(self, generator: Generator, dtype: torch.dtype, precision: str):
        self.generator = Generator(generator.arch)
        self.generator.load_state_dict(generator.state_dict())
        self.generator.to(next(generator.parameters()).device, memory_format=torch.channels_last).eval()
        self.dtype, self.tf32 = dtype, precision == "tf32"

    def __call__(self, z: Tensor) -> Tensor:
        with tf32(self.tf32), torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.generator(z.float()).to(self.dtype)
