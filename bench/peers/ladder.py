"""The peers, rung by rung: the PyTorch example's step with what its users add to it, up to PyTorch's best.

Every rung computes the example's iteration from the same weights and batch; `bench.verify` holds each against the
reference step before it is timed. What a rung adds, and where it departs from `bench.peers.example`:

    bf16            forward passes under autocast; the sigmoid and the loss in float32, which autocast asks for
    channels_last   networks and images in that memory format
    compile         `torch.compile` of both networks, default mode or max-autotune
    frozen          D's parameters take no gradient in G's step; from here on nothing is read back to the host
    graph           the whole step, both updates, in one CUDA graph over static inputs; Adam fused and capturable

    dependent       of ours: kernels that may begin before the one before them has ended (`kernels.dependent`)

and ours: `reference`, `dcgan.step.ReferenceStep`, and `fused`, `dcgan.fused.FusedStep`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import example, without
from dcgan.arch import Arch
from dcgan.fused import FusedStep
from dcgan.model import Discriminator, Generator
from dcgan.step import ReferenceStep, adam
from kernels import dependent

GRAPH_WARMUP = 3
COMPILE_SECONDS = {"default": 30.0, "max-autotune": 90.0}
"""About how long a rung's compilation takes, only for planning: guesses."""


@dataclass(frozen=True)
class Rung:
    """One way to run the step. See the module's table; `ours` is empty, `reference` or `fused`; `off` is a part of the
    fused step that is turned off, of `bench.peers.without`."""

    precision: str = "fp32"
    channels_last: bool = False
    compile: str = ""
    frozen: bool = False
    graph: bool = False
    ours: str = ""
    off: str = ""
    dependent: bool = False

    @property
    def name(self) -> str:
        """Such as `example+bf16+channels_last`, `fused+bf16`, or `fused+bf16+graph-merge` for a part turned off."""
        parts = [self.ours or "example", "bf16" if self.precision == "bf16" else ""]
        parts += ["channels_last" if self.channels_last else "", {"default": "compile"}.get(self.compile, self.compile)]
        parts += ["frozen" if self.frozen else "", "graph" if self.graph else ""]
        parts += ["dependent" if self.dependent else ""]
        return "+".join(part for part in parts if part) + (f"-{self.off}" if self.off else "")

    def images(self, real: Tensor) -> Tensor:
        """`real` as this rung's data loader would deliver it."""
        return real.contiguous(memory_format=torch.channels_last) if self.channels_last else real


BEST = {"precision": "bf16", "channels_last": True}
RUNGS = (
    Rung(),
    Rung("bf16"),
    Rung(channels_last=True),
    Rung(**BEST),
    Rung(channels_last=True, frozen=True),
    Rung(**BEST, frozen=True),
    Rung(graph=True),
    Rung(**BEST, graph=True),
    Rung(**BEST, frozen=True, graph=True),
    Rung(ours="reference"),
    Rung("bf16", ours="reference"),
    Rung(ours="fused"),
    Rung("bf16", ours="fused"),
    Rung("bf16", ours="fused", graph=True),
    Rung("bf16", ours="fused", graph=True, dependent=True),
    Rung(**BEST, compile="default", frozen=True, graph=True),
    Rung(**BEST, compile="max-autotune", frozen=True, graph=True),
    Rung(**BEST, compile="default", frozen=True),
    Rung(**BEST, compile="max-autotune", frozen=True),
    Rung(**BEST, compile="default"),
    Rung(**BEST, compile="max-autotune"),
    Rung(compile="default"),
)
"""Those that compile come last: they take minutes, and the others are written by then."""

EXAMPLE = RUNGS[0].name


def unavailable(rung: Rung, arch: Arch, device: torch.device) -> str | None:
    """Why `rung` cannot run here; None if it can be tried."""
    if rung.graph and device.type != "cuda":
        return f"a CUDA graph needs a GPU; the device is {device.type}"
    if (rung.dependent or rung.off == "dependent") and not dependent.able(device):
        return "dependent launch needs compute capability 9.0"
    if rung.off and device.type != "cuda":
        return f"only the step over the GPU's launchers has such parts; the device is {device.type}"
    if rung.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        return f"{torch.cuda.get_device_name(device)} has no bf16"
    if not rung.ours and arch.start != 4:
        return f"the example starts from 4×4 maps; this architecture from {arch.start}×{arch.start}"
    return None


class Network(nn.Module):
    """A network as a rung runs it: `body`, under autocast or not, then `head` in float32."""

    def __init__(self, body: nn.Module, head: nn.Module, precision: str, device: torch.device):
        super().__init__()
        self.body, self.head, self.device_type, self.bf16 = body, head, device.type, precision == "bf16"

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16):
            x = self.body(x)
        return self.head(x.float())


class DeviceStep(example.ExampleStep):
    """The example's iteration without its reads: the same five values, left on the device; with D frozen on request."""

    def __init__(self, g: nn.Module, d: nn.Module, frozen: bool, capturable: bool):
        super().__init__(g, d)
        self.frozen = frozen
        if capturable:
            self.adam_d, self.adam_g = capturable_adam(d), capturable_adam(g)

    def loss(self, images: Tensor, target: float) -> tuple[Tensor, Tensor]:
        """D's loss on `images` against `target` and its mean output; the loss's backward is done."""
        output = self.d(images).view(-1)
        loss = self.criterion(output, torch.full_like(output, target))
        loss.backward()
        return loss.detach(), output.detach().mean()

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        self.d.zero_grad()
        loss_real, d_real = self.loss(real, 1.0)
        fake = self.g(z[:, :, None, None])
        loss_fake, d_fake_before = self.loss(fake.detach(), 0.0)
        self.adam_d.step()
        self.g.zero_grad()
        self.d.requires_grad_(not self.frozen)
        loss_g, d_fake_after = self.loss(fake, 1.0)
        self.d.requires_grad_(True)
        self.adam_g.step()
        return torch.stack([loss_real + loss_fake, loss_g, d_real, d_fake_before, d_fake_after])


class Graphed:
    """A step that reads nothing back, as one CUDA graph. Networks and optimisers leave its making as they went in.

    Args:
        step: takes and returns tensors on the device; its optimisers are fresh and capturable.
        networks: what it updates.
        optimizers: theirs.
        real, z: of the shapes and memory format to come.

    `peak_bytes`: the most that was allocated on the device while the step was captured; a replay allocates nothing.
    """

    def __init__(self, step: Callable, networks: tuple, optimizers: tuple, real: Tensor, z: Tensor):
        room = step.room(len(real)) if isinstance(step, FusedStep) else None
        self.real, self.z = real.clone() if room is None else room.copy_(real), z.clone()
        self.graph = torch.cuda.CUDAGraph()
        before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARMUP):
                step(self.real, self.z)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.metrics = step(self.real, self.z)
        self.peak_bytes = torch.cuda.max_memory_allocated()
        for network, state in zip(networks, before, strict=True):
            network.load_state_dict(state)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
        if isinstance(step, FusedStep):
            step.refresh()  # its 16-bit copies are of the weights as the warm-up left them

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        self.real.copy_(real)
        self.z.copy_(z)
        self.graph.replay()
        return self.metrics


def capturable_adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=2e-4, betas=(0.5, 0.999), fused=True, capturable=True)


@dataclass(frozen=True)
class Runner:
    """A rung that stands ready: its networks, generator first, their optimisers, and the step that updates them."""

    rung: Rung
    networks: tuple[nn.Module, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    step: Callable[[Tensor, Tensor], Any]

    def __call__(self, real: Tensor, z: Tensor) -> Any:
        return self.step(real, z)


def weights(arch: Arch, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dicts of a fresh generator and discriminator, on the CPU."""
    random = torch.Generator().manual_seed(seed)
    return Generator(arch, random).state_dict(), Discriminator(arch, random).state_dict()


def batches(arch: Arch, images: int, device: torch.device, count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """`count` random batches: images (N, C, H, W) uniform in [-1, 1], noise (N, nz)."""
    random, shape = torch.Generator().manual_seed(seed), (images, arch.channels, arch.image_size, arch.image_size)
    return [
        (
            (torch.rand(shape, generator=random) * 2 - 1).to(device),
            torch.randn(images, arch.nz, generator=random).to(device),
        )
        for _ in range(count)
    ]


def build(rung: Rung, arch: Arch, state: tuple[dict, dict], device: torch.device, images: int) -> Runner:
    """`rung`'s step for batches of `images`, from the weights `state` and a fresh Adam.

    Raises:
        Exception: whatever PyTorch raises where the rung does not work: it is the row's reason.
    """
    return (_ours if rung.ours else _peer)(rung, arch, state, device, images)


def _peer(rung: Rung, arch: Arch, state: tuple[dict, dict], device: torch.device, images: int) -> Runner:
    widths_g = tuple(layer.out_channels // arch.ngf for layer in arch.generator[:-1])
    widths_d = tuple(layer.out_channels // arch.ndf for layer in arch.discriminator[:-1])
    g = example.generator(arch.nz, arch.ngf, arch.channels, widths_g)
    d = example.discriminator(arch.ndf, arch.channels, widths_d)
    for network, values in zip((g, d), state, strict=True):
        network.load_state_dict(values)
        network.to(device, memory_format=torch.channels_last if rung.channels_last else torch.preserve_format)
    if rung == RUNGS[0]:
        step = example.ExampleStep(g, d)
        return Runner(rung, (g, d), (step.adam_g, step.adam_d), step)
    bodies = [g.main, d.main[:-1]]
    if rung.compile:
        bodies = [compiled(body, rung) for body in bodies]
    heads = (nn.Identity(), d.main[-1])
    run_g, run_d = (Network(*parts, rung.precision, device) for parts in zip(bodies, heads, strict=True))
    if rung.frozen or rung.graph:
        step = DeviceStep(run_g, run_d, rung.frozen, capturable=rung.graph)
    else:
        step = example.ExampleStep(run_g, run_d)
    optimizers = (step.adam_g, step.adam_d)
    if rung.graph:
        real, z = batches(arch, images, device, 1)[0]
        step = Graphed(step, (g, d), optimizers, rung.images(real), z)
    return Runner(rung, (g, d), optimizers, _marked(step, rung))


def _ours(rung: Rung, arch: Arch, state: tuple[dict, dict], device: torch.device, images: int) -> Runner:
    g, d = Generator(arch).to(device), Discriminator(arch).to(device)
    for network, values in zip((g, d), state, strict=True):
        network.load_state_dict(values)
    fused = rung.ours == "fused"
    if fused:
        g, d = g.to(memory_format=torch.channels_last), d.to(memory_format=torch.channels_last)
    optimizers = tuple(capturable_adam(m) if rung.graph else adam(m, fused=fused) for m in (g, d))
    step = (FusedStep if fused else ReferenceStep)(g, d, *optimizers, precision=rung.precision)
    if fused:
        step.dependent = rung.dependent
    if rung.off in without.OFF:
        without.OFF[rung.off](step)
    if rung.graph and rung.off != without.GRAPH:
        step = Graphed(step, (g, d), optimizers, *batches(arch, images, device, 1)[0])
    return Runner(rung, (g, d), optimizers, step)


def compiled(body: nn.Module, rung: Rung) -> nn.Module:
    """`body` compiled without a graph break. Inside a whole-step graph, max-autotune leaves out graphs of its own.

    Shapes are static: else the second batch size of a run would get slower code for any batch, since all rungs share
    the compiler's memory of one forward.
    """
    import torch._dynamo

    # All rungs compile the forward of one class; past the limit a network would silently run as it is.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    mode = "max-autotune-no-cudagraphs" if rung.compile == "max-autotune" and rung.graph else rung.compile
    return torch.compile(body, mode=mode, fullgraph=True, dynamic=False)


def _marked(step: Callable, rung: Rung) -> Callable:
    """Tell max-autotune's graphs where an iteration begins, so that they do not reuse memory within one."""
    if rung.compile != "max-autotune" or rung.graph:
        return step

    def marked(real: Tensor, z: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step(real, z)

    return marked
