"""`python -m dcgan.doctor`: what this machine has, and which backend would run each op and layer, and why."""

import argparse
import importlib.metadata
import os
import platform
import sys
import warnings
from collections.abc import Iterator

import torch

from dcgan.arch import PRESETS, Preset
from dcgan.backends import Row, fused_step
from dcgan.config import choose_device, fast_bf16
from dcgan.errors import run_command
from dcgan.flags import Parser
from kernels import _cuda, tuning
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
        table, why = tuning.load(properties.name)
        sections = (table.ops, table.tiles, table.inputs, table.launch) if table else ()
        measured = sum(len(entries) for section in sections for entries in section.values())
        lines.append(("tuned table", f"{measured} entries" if table else why))
    else:
        lines.append(("device", f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"))
    lines.append(("fast bf16", "yes: --precision auto is bf16" if fast_bf16(device) else "no: auto is fp32"))
    lines.append(("extension", _cuda.available() or "kernels._C is built"))
    return lines


def ops(preset: Preset, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """The public ops on each layer of a preset, and those that belong to none."""
    arch, batch = preset.arch, preset.batch_size
    for layer in arch.generator + arch.discriminator:
        yield Row(layer.name, op_of(layer), *select(op_of(layer), layer, device, dtype, images=batch))
    yield Row("D", "gan_loss", *select("gan_loss", None, device, dtype, images=2 * batch))
    for name, layers in (("G", arch.generator), ("D", arch.discriminator)):
        parameters = sum(layer.parameters for layer in layers)
        yield Row(name, "adam_step", *select("adam_step", None, device, torch.float32, images=parameters))
    yield Row("", "gather_images", *select("gather_images", None, device, dtype, images=batch))


def main(argv: list[str] | None = None) -> None:
    """The command; `argv` are its arguments (None: the process's)."""
    parser = Parser(
        prog="python -m dcgan.doctor", description=__doc__.split(": ")[1], formatter_class=argparse.HelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="dcgan64", help="the preset whose layers are listed (default: dcgan64)"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    device, preset = choose_device(args.device), PRESETS[args.preset]
    dtype = torch.bfloat16 if fast_bf16(device) else torch.float32
    step = fused_step(preset.arch, preset.batch_size, device, dtype, tuning.precision_of(dtype, tf32=False))
    setting = f"{args.preset} at batch {preset.batch_size}, {str(dtype).removeprefix('torch.')}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # each fallback is a line of the table
        for name, value in machine(device):
            print(f"{name:<12}{value}")
        for title, rows in (
            (f"The ops of `kernels` on {setting}, under auto:", ops(preset, device, dtype)),
            (f"The step of --fused on {setting}:", step),
        ):
            print(f"\n{title}")
            for layer, op, backend, why in rows:
                print(f"{layer:<4}{op:<24}{backend:<10}{why}")


if __name__ == "__main__":
    sys.exit(run_command(main))
