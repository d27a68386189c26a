"""`python -m dcgan.doctor`: what this machine has, and which backend would run each layer, and why."""

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings

import torch

from dcgan.arch import PRESETS
from dcgan.config import choose_device, fast_bf16
from dcgan.errors import run_command
from dcgan.flags import Parser
from kernels.dispatch import op_of, select


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: torch.device) -> list[tuple[str, str]]:
    """What the choice of a backend depends on."""
    lines = [("python", platform.python_version()), ("torch", torch.__version__)]
    lines += [(package, version(package)) for package in ("triton", "numpy", "pillow", "safetensors")]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        gib = properties.total_memory / 2**30
        lines.append(("device", f"{properties.name}, compute capability {capability}, {gib:.0f} GiB"))
    else:
        lines.append(("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"))
    lines.append(("fast bf16", "yes: --precision auto is bf16" if fast_bf16(device) else "no: auto is fp32"))
    lines.append(("extension", "kernels._C is not built: csrc/ has no sources"))
    return lines


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments, those of the process where None."""
    parser = Parser(
        prog="python -m dcgan.doctor", description=__doc__.split(": ")[1], formatter_class=argparse.HelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64", help="whose layers (default: dcgan64)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    for name, value in machine(device):
        print(f"{name:<12}{value}")
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    print(f"\nThe ops of `kernels` on {args.preset}, {str(dtype).removeprefix('torch.')}, under auto:")
    arch = PRESETS[args.preset].arch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # each fallback is a line of the table
        for layer in arch.generator + arch.discriminator:
            choice = select(op_of(layer), layer, device, dtype)
            print(f"{layer.name:<4}{op_of(layer):<24}{choice.backend:<8}{choice.why}")


if __name__ == "__main__":
    sys.exit(run_command(main))
