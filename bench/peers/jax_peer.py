"""The JAX peer: `bench.peers.jax_step` in a process of its own, verified against the reference step like any rung.

    python -m bench.peers.jax_peer [--preset dcgan64] [--images 128] [--precision bf16] [--seconds 20]

prints one JSON line: `ok` (true: verified and timed; false: failed or wrong; null: nothing was measured), `why` where
it is not true, and the figures. Weights, batches and results travel in .npz files that hold no objects. JAX is no
dependency of this project; if it is missing, that is the reason.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers.ladder import Rung
from bench.record import ROOT
from bench.verify import Oracle, differences, oracle, tolerance_class, verdict
from dcgan.arch import PRESETS, Arch
from dcgan.config import choose_device
from dcgan.errors import InputError, run_command
from dcgan.flags import Parser, positive
from dcgan.model import Discriminator, Generator
from dcgan.step import METRICS, adam

PRECISIONS = ("fp32", "bf16")
ROUNDS = 15
START_SECONDS = 30.0
"""What starting the process, compiling and verifying may take beyond the seconds given."""


def run(arch: Arch, images: int, seconds: float, device: torch.device | str, precision: str = "bf16") -> dict[str, Any]:
    """Verify and time the JAX step.

    Args:
        arch: whose step.
        images: a batch.
        seconds: about how long it may take; the process is ended a little after.
        device: cpu, or the GPU that JAX is to use.
        precision: `fp32` (on a GPU JAX computes such products in TF32, as it does by default) or `bf16`.

    Returns:
        `ok`, `why` where it is not true, `name`, `precision`, `batch`, and where it ran `p20_ms`, `p50_ms`, `p80_ms`,
        `rounds`, `images_per_s`, `compile_s`, `peak_memory_bytes`, `jax`, and the `difference_*` of `bench.verify`.

    Raises:
        ValueError: a precision that is not served.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: accepted are {', '.join(PRECISIONS)}")
    device = torch.device(device)
    began, expected = time.perf_counter(), oracle(arch, images, device)
    facts = {"name": "jax" + ("+bf16" if precision == "bf16" else ""), "precision": precision, "batch": images}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        left = max(seconds - (time.perf_counter() - began), 1.0)
        np.savez(source, **question(expected, arch, precision, left))
        figures = child(source, target, device, left + START_SECONDS)
        if "missing" in figures:
            return {"ok": None, "why": figures["missing"]} | facts
        if "why" in figures:
            return {"ok": False} | figures | facts
        try:
            with np.load(target, allow_pickle=False) as file:
                replayed = Replayed(arch, expected, dict(file))
            found = differences(replayed, expected)
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            why = f"its results cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"[:200]
            return {"ok": False, "why": why} | facts
    facts |= figures | {f"difference_{kind}": value for kind, value in found.items()}
    # JAX's fp32 products are TF32 on a GPU whatever PyTorch's flags say.
    allowed = "tf32" if precision == "fp32" and device.type == "cuda" else tolerance_class(precision, device)
    why = verdict(found, allowed)
    return {"ok": why is None} | ({"why": why} if why else {}) | facts


def question(expected: Oracle, arch: Arch, precision: str, seconds: float) -> dict[str, np.ndarray]:
    """IN.npz: the oracle's start and batches, and the settings."""
    layers = {"g": [asdict(layer) for layer in arch.generator], "d": [asdict(layer) for layer in arch.discriminator]}
    settings = {"layers": layers, "precision": precision, "rounds": ROUNDS, "seconds": seconds}
    arrays = {"settings": np.array(json.dumps(settings))}
    for key, state in zip(("g", "d"), expected.start, strict=True):
        arrays |= {f"start/{key}/{name}": value.cpu().numpy() for name, value in state.items()}
    for i, (real, z) in enumerate(expected.data):
        arrays |= {f"real/{i}": real.cpu().numpy(), f"z/{i}": z.cpu().numpy()}
    return arrays


def child(source: Path, target: Path, device: torch.device, timeout_s: float) -> dict[str, Any]:
    """Run the step in its own process: its JSON, or `why` there is none."""
    # On a GPU JAX would take three quarters of the memory at once, beside the parent's.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_PLATFORMS": device.type}
    if device.index:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index] if visible else str(device.index)
    command = [sys.executable, "-m", "bench.peers.jax_step", str(source), str(target)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"why": f"not finished within {timeout_s:.0f} s"}
    try:
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return figures if isinstance(figures, dict) else {"why": f"it printed {figures!r}"[:200]}
    except (IndexError, ValueError):
        said = done.stderr.strip().splitlines() or ["nothing"]
        return {"why": f"exit code {done.returncode}, it said: {said[-1]}"[:200]}


class Replayed:
    """The JAX run as `bench.verify.differences` reads a rung: each call is the next step's metrics, and after the last
    the networks hold the weights that JAX ended with.

    Args:
        arch: of the networks.
        expected: what was asked.
        arrays: OUT.npz.

    Raises:
        KeyError, ValueError, RuntimeError: the arrays are not those of this architecture and these batches.
    """

    rung = Rung()  # whose images are as they are

    def __init__(self, arch: Arch, expected: Oracle, arrays: dict[str, np.ndarray]):
        self.networks = Generator(arch), Discriminator(arch)
        self.optimizers = tuple(adam(network) for network in self.networks)
        self.metrics, steps = torch.from_numpy(arrays["metrics"]), len(expected.data)
        if self.metrics.shape != (steps, len(METRICS)):
            raise ValueError(f"metrics has shape {tuple(self.metrics.shape)}, expected {(steps, len(METRICS))}")
        for key, network, optimizer in zip(("g", "d"), self.networks, self.optimizers, strict=True):
            end = {name: torch.from_numpy(arrays[f"end/{key}/{name}"]) for name in network.state_dict()}
            network.load_state_dict(end)
            for name, parameter in network.named_parameters():
                moment = torch.from_numpy(arrays[f"moments/{key}/{name}"])
                if moment.shape != parameter.shape:
                    raise ValueError(f"moments/{key}/{name} has shape {tuple(moment.shape)}")
                optimizer.state[parameter] = {"exp_avg": moment}
        self.steps = iter(self.metrics)

    def __call__(self, real: Tensor, z: Tensor) -> Tensor:
        return next(self.steps)


def command() -> int:
    parser = Parser(prog="python -m bench.peers.jax_peer", description="Verify and time the training step in JAX.")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--images", type=positive, default=128, help="a batch (128)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long it may take (20)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    args = parser.parse_args()
    if not args.seconds > 0:
        raise InputError(f"--seconds {args.seconds:g}: it must be positive")
    arch, device = PRESETS[args.preset].arch, choose_device(args.device)
    print(json.dumps(run(arch, args.images, args.seconds, device, args.precision)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(command))
