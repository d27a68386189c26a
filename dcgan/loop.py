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
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        """By batch size; None after a first run without."""
        if graph:
            self.stream, self.pool = torch.cuda.Stream(sums.device), torch.cuda.graph_pool_handle()

    def __call__(self, step: int, course: int) -> int:
        """Do training step `step`, counted from 0, with the order of data `course`; returns its images."""
        if not self.graph:
            n = self.batches.seek(step, course)
            self.update.refresh()
            self._run(n)
            return n
        outside = torch.cuda.current_stream()
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            n = self.batches.seek(step, course)
            self._replay(n)
        outside.wait_stream(self.stream)
        return n

    def _run(self, n: int) -> None:
        """The device's part of a step of n images."""
        real = self.batches.take(n, self.update.room(n))
        self.sums += self.update.run(real, self.noise(n))
        if self.average is not None:
            self.average.update()

    def _replay(self, n: int) -> None:
        if self.update.refresh():
            self.graphs.clear()  # tensors are elsewhere now
        if n not in self.graphs:
            self.graphs[n] = None
            self._run(n)
            return
        if self.graphs[n] is None:
            try:
                self.graphs[n] = self._capture(n)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                why = f"a step of {n} images cannot be captured as a CUDA graph ({str(error).splitlines()[0]})"
                if self.strict:
                    raise RunError(why) from error
                self.say(f"warning: {why}; training goes on without")
                self.graph = False
                self._run(n)
                return
        self.graphs[n].replay()
        if self.average is not None:
            self.average.count += 1

    def _capture(self, n: int) -> torch.cuda.CUDAGraph:
        graph, count = torch.cuda.CUDAGraph(), self.average and self.average.count
        graph.register_generator_state(self.noise.generator)
        # thread_local: the thread that reads pictures may allocate pinned memory meanwhile
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self._run(n)
        finally:
            if self.average is not None:
                self.average.count = count  # nothing has run
        return graph
