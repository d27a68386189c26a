"""A step with all that belongs to it: pictures, noise, both updates, the average, the metrics; as launches one by one,
or, on a GPU, as one CUDA graph that is replayed.

Nothing in it waits for the device. A graph is captured at the second batch of each size: the first one runs as it is,
which compiles the kernels and warms the libraries up, and is a training step like any other; capturing itself runs
nothing. So there is no warm-up whose effects would have to be undone, and the numbers are the same with and without.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kernels
from dcgan.average import Average
from dcgan.batches import Batches, Noise
from dcgan.config import Config
from dcgan.errors import RunError, out_of_memory
from dcgan.fused import FusedStep
from dcgan.step import ReferenceStep, adam


def make_step(
    config: Config, generator: nn.Module, discriminator: nn.Module
) -> tuple[FusedStep | ReferenceStep, torch.optim.Adam, torch.optim.Adam]:
    """The step that a run's settings ask for, and its optimisers, G's first."""
    for model in (generator, discriminator):
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if config.fused == "modules":
            kernels.fuse(model)
    options = {"fused": config.fused is not None, "lr": config.lr, "beta1": config.beta1}
    optimizers = [adam(model, capturable=config.cuda_graph, **options) for model in (generator, discriminator)]
    for optimizer in optimizers:
        optimizer._warned_capturable_if_run_uncaptured = True  # the first step of a captured run is not captured
    parts = (generator, discriminator, *optimizers, config.update, config.precision)
    if config.fused == "stacks":
        return FusedStep(*parts), *optimizers
    return ReferenceStep(*parts, freeze=config.fused == "modules", compile=config.compile), *optimizers


class Loop:
    """Call it with a step's number, and the step is done, or queued on the device.

    Args:
        update: the step.
        batches, noise: where its images and noise come from.
        average: of the generator's weights, or None.
        sums: (5,) float64 on the device, to which the step's metrics are added.
        graph: replay CUDA graphs.
        strict: a step that cannot be captured is an error; otherwise it is said, and training goes on without.
        say: where that is said.
    """

    def __init__(
        self,
        update: FusedStep | ReferenceStep,
        batches: Batches,
        noise: Noise,
        average: Average | None,
        sums: Tensor,
        graph: bool,
        strict: bool,
        say: Callable[[str], None],
    ):
        self.update, self.batches, self.noise, self.average, self.sums = update, batches, noise, average, sums
        self.graph, self.strict, self.say = graph, strict, say
        self.device = sums.device
        self.z: dict[int, Tensor] = {}
        """Where a graph reads its noise from, by batch size."""
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        """By batch size; None after a first run without."""
        if graph:
            self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()

    def __call__(self, step: int, course: int) -> int:
        """Do training step `step`, counted from 0, with the order of data `course`; returns its images."""
        if not self.graph:
            n = self.batches.seek(step, course)
            self.update.refresh()
            self._run(n, self.noise(n))
            return n
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            n = self.batches.seek(step, course)
            self._replay(n)
        outside.wait_stream(self.stream)
        return n

    def _run(self, n: int, z: Tensor) -> None:
        """The device's part of a step of n images, from noise z."""
        real = self.batches.take(n, self.update.room(n))
        self.sums += self.update.run(real, z)
        if self.average is not None:
            self.average.update()

    def _replay(self, n: int) -> None:
        if self.update.refresh():
            self.graphs.clear()  # tensors are elsewhere now
            self.pool = torch.cuda.graph_pool_handle()  # that of graphs which are gone takes no other
        if n not in self.z:
            self.z[n] = torch.empty((n, self.noise.nz), dtype=self.update.dtype, device=self.device)
        # Outside the graph: inside, its generator would have to be registered, which costs more launches than it saves,
        # and before torch 2.13 one whose capture failed draws no more.
        z = self.z[n].copy_(self.noise(n))
        begins = self.average is not None and not self.average.count  # the average's first update is a copy
        if n not in self.graphs or begins:
            self.graphs.setdefault(n, None)
            self._run(n, z)
            return
        if self.graphs[n] is None:
            try:
                self.graphs[n] = self._capture(n, z)
            except RuntimeError as error:
                first: BaseException = error
                while first.__context__ is not None:  # a broken capture's end complains of what broke it
                    first = first.__context__
                if out_of_memory(first):
                    raise first from None
                why = f"a step of {n} images cannot be captured as a CUDA graph ({str(first).splitlines()[0]})"
                if self.strict:
                    raise RunError(why) from error
                self.say(f"warning: {why}; training continues without one")
                self.graph = False
                self._run(n, z)
                return
        self.graphs[n].replay()
        if self.average is not None:
            self.average.count += 1

    def _capture(self, n: int, z: Tensor) -> torch.cuda.CUDAGraph:
        graph, count = torch.cuda.CUDAGraph(), self.average and self.average.count
        # thread_local: the thread that reads pictures may allocate pinned memory meanwhile
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self._run(n, z)
        finally:
            if self.average is not None:
                self.average.count = count  # nothing has run
        return graph
