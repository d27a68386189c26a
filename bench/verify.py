"""Whether a rung trains as the reference does: verified before it is timed.

From the same weights and a fresh Adam, both take the same few batches freely. Compared are

    first        the first step's metrics, G's loss being taken after D's update
    gradient     Adam's first moment after the first step, which is the gradient times a constant
    metrics      those of all steps
    update       how far each network's weights moved, and where to
    statistics   batch norm's running statistics, and `counts`: how many batches they saw

The first two are tight. The rest is loose, since Adam's first updates are nearly the gradient's sign, and where a
gradient is all rounding its sign is chance: two right steps in fp32 differ by a sixth of the way. They still see what
the first step cannot: Adam's moments, and state that a graph or a buffer does not carry from one step to the next.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.peers.ladder import Runner, batches, weights
from bench.subjects.accuracy import arithmetic
from dcgan.arch import Arch
from dcgan.model import Discriminator, Generator
from dcgan.step import ReferenceStep, adam
from kernels.library import switches

STEPS = 3


@dataclass(frozen=True)
class Oracle:
    """What the reference step makes of `data` in fp32 without TF32, from the weights `start`.

    metrics: (steps, 5). moments: Adam's first moments of both networks after the first step. ends: both state dicts
    after the last. step_s: seconds that the quickest step took, only for planning.
    """

    start: tuple[dict[str, Tensor], dict[str, Tensor]]
    data: list[tuple[Tensor, Tensor]]
    metrics: Tensor
    moments: tuple[Tensor, Tensor]
    ends: tuple[dict[str, Tensor], dict[str, Tensor]]
    step_s: float


def oracle(arch: Arch, images: int, device: torch.device, steps: int = STEPS) -> Oracle:
    """The reference's answer for `steps` batches of `images`."""
    start, data = weights(arch), batches(arch, images, device, steps)
    networks = (Generator(arch), Discriminator(arch))
    for network, state in zip(networks, start, strict=True):
        network.load_state_dict(state)
        network.to(device)
    optimizers = tuple(adam(network) for network in networks)
    step, took_s = ReferenceStep(*networks, *optimizers), []

    def timed(real: Tensor, z: Tensor) -> Tensor:
        began = time.perf_counter()
        metrics = step(real, z).cpu()
        took_s.append(time.perf_counter() - began)
        return metrics

    with arithmetic("ieee"):
        metrics, moments = trained(timed, networks, optimizers, data)
    return Oracle(start, data, metrics, moments, tuple(copied(network) for network in networks), min(took_s))


def trained(step, networks, optimizers, data) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Train on `data`: every step's metrics (steps, 5) and the first moments after the first step, on the CPU."""
    rows, moments = [], ()
    for real, z in data:
        rows.append(torch.as_tensor(step(real, z)).detach().to("cpu", torch.float32, copy=True))
        moments = moments or tuple(map(first_moment, networks, optimizers))
    return torch.stack(rows), moments


def first_moment(network: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Adam's first moments of all parameters, in order, as one vector."""
    return torch.cat([optimizer.state[p]["exp_avg"].detach().cpu().flatten() for p in network.parameters()])


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in network.state_dict().items()}


TOLERANCE = {
    "fp32": {"first": 2e-3, "gradient": 5e-2, "metrics": 5e-2, "update": 0.5, "statistics": 1e-2},
    "tf32": {"first": 2e-2, "gradient": 0.2, "metrics": 0.1, "update": 0.8, "statistics": 3e-2},
    "bf16": {"first": 2e-2, "gradient": 0.4, "metrics": 0.1, "update": 0.8, "statistics": 3e-2},
}
"""By how much each may differ: metrics over max(1, |value|), the others in norm, relative. Two to five times what right
steps showed on a CPU (dcgan64, batch 16: fp32 gradient 0.022 and update 0.17; bf16 autocast 0.16 and 0.39)."""


def differences(runner: Runner, expected: Oracle) -> dict[str, float]:
    """Train `runner` on the oracle's batches and compare; the keys are those of the module's table."""
    data = [(runner.rung.images(real), z) for real, z in expected.data]
    metrics, moments = trained(runner, runner.networks, runner.optimizers, data)
    apart = (metrics - expected.metrics).abs() / expected.metrics.abs().clamp(min=1)
    found = {"first": apart[0].max().item(), "metrics": apart.max().item()}
    pairs: dict[str, list[float]] = {"update": [], "statistics": [], "counts": []}
    for network, start, end in zip(runner.networks, expected.start, expected.ends, strict=True):
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {kind: [] for kind in pairs}
        for name, value in copied(network).items():
            if name.endswith("num_batches_tracked"):
                parts["counts"].append((value - end[name], torch.ones(())))
            elif "running_" in name:
                parts["statistics"].append((value - end[name], end[name]))
            else:
                parts["update"].append((value - end[name], end[name] - start[name]))
        for kind, values in parts.items():
            if values:
                pairs[kind].append(relative(*(torch.cat([pair[i].flatten() for pair in values]) for i in (0, 1))))
    found["gradient"] = max(relative(got - want, want) for got, want in zip(moments, expected.moments, strict=True))
    return found | {kind: max(values, default=0.0) for kind, values in pairs.items()}


def relative(wrong: Tensor, size: Tensor) -> float:
    """‖wrong‖ / ‖size‖; NaN stays NaN."""
    return (wrong.double().norm() / size.double().norm().clamp(min=1e-30)).item()


def verdict(found: dict[str, float], precision: str) -> str | None:
    """Why the differences are too large for `precision`; None if they are not. NaN is too large."""
    allowed = TOLERANCE[precision] | {"counts": 0.0}
    wrong = [f"{kind} {found[kind]:.3g} > {most:g}" for kind, most in allowed.items() if not found[kind] <= most]
    return f"wrong against the reference step: {', '.join(wrong)}" if wrong else None


def tolerance_class(precision: str, device: torch.device) -> str:
    """The tolerances that `precision` falls under: PyTorch's convolutions are TF32 on a GPU unless told otherwise."""
    return "tf32" if precision == "fp32" and device.type == "cuda" and switches.tf32 else precision
