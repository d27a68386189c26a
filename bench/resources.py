"""What each Triton kernel needs of a GPU: registers, spills, shared memory, instructions. No GPU is needed to ask.

Every kernel of a training step is compiled for the architecture, in the configuration that ships, for each layer of the
preset at each batch; and what a tuned table may have it launch instead, batch norm `deferred` to the load or `applied`
before it. ptxas and cuobjdump, which come with Triton, then say what came of it. Fails on

- a spill to local memory;
- a 16-bit GEMM of a middle layer without the tensor-core instruction of its architecture (wgmma fed by TMA on sm_90,
  tcgen05 fed by TMA on sm_100, mma on sm_80);
- more shared memory than one program may have there;
- with `--dependent`, for dependent launch (`kernels.dependent`; sm_90 on), memory that is read or written before the
  wait for the launch before.

    python -m bench.resources --arch sm_90 [--preset dcgan64] [--batch 128 --batch 1024] [--precision bf16]
                              [--dependent] [--json]
    python -m bench.resources --cuda [--arch sm_90] [--json]     the extension's instead: bench/resources_cuda.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import resources_cuda
from bench.resources_step import PRECISIONS, Case, step_cases
from dcgan.arch import PRESETS
from dcgan.errors import InputError, run_command
from dcgan.flags import Parser
from kernels._triton.config import SHARED_LIMIT_BYTES
from kernels._triton.launch import Launch

ARCHES = {f"sm_{arch}": arch for arch in sorted(SHARED_LIMIT_BYTES)}
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
TENSOR_CORE = {
    80: r"\bmma\.sync",
    86: r"\bmma\.sync",
    89: r"\bmma\.sync",
    90: r"\bwgmma\.mma_async",
    100: r"\btcgen05\.mma",
}
TMA = r"\bcp\.async\.bulk\.tensor\.\dd\.shared"
WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
MEMORY = r"\b(?:(?:ld|st|atom|red)\.(?:\w+\.)*global|cp\.async)\b"
"""What reads or writes the GPU's memory."""


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    registers: of a thread. spills: bytes of local memory a thread. shared_bytes: of a program.
    matrix, tma: how often its PTX names the architecture's tensor-core instruction and a TMA load.
    early: what its PTX does to memory before it has waited for the launch before; None if it need not wait.
    """

    registers: int
    spills: int
    shared_bytes: int
    matrix: int
    tma: int
    early: int | None = None


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Types, constants and alignments as Triton's launcher would derive them from these arguments."""
    types, constants, aligned = {}, {}, {}
    for index, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None or (type(value) is int and value == 1):
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[param.name] = "*" + NAMES[value.dtype]
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            types[param.name] = "i32"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
    return types, constants, aligned


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile for compute capability `arch` and read what the assembler reports."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, constants, aligned = signature(launch)
    source = ASTSource(launch.kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    usage = _resource_usage(built.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    ptx = built.asm["ptx"]
    matrix, tma = (len(re.findall(pattern, ptx)) for pattern in (TENSOR_CORE[arch], TMA))
    early = early_accesses(ptx) if launch.dependent else None
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, matrix, tma, early)


def early_accesses(ptx: str) -> int:
    """Accesses to memory that stand before the wait for the launch before, and before the next one may begin; all of
    them where either is missing."""
    before, wait, after = ptx.partition(WAIT)
    between, begins, _ = after.partition(NEXT)
    return len(re.findall(MEMORY, before + between if wait and begins else ptx))


def _resource_usage(cubin: bytes, cuobjdump: Path) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}


def faults(case: Case, found: Resources, arch: int) -> list[str]:
    """What is wrong with a compiled kernel; nothing where it may ship."""
    wrong = []
    if found.spills:
        wrong.append(f"spills {found.spills} bytes per thread to local memory")
    if found.shared_bytes > SHARED_LIMIT_BYTES[arch]:
        wrong.append(f"takes {found.shared_bytes} bytes of shared memory, of {SHARED_LIMIT_BYTES[arch]} there are")
    if found.early:
        wrong.append(f"touches memory {found.early} times before it has waited for the launch before")
    if case.matrix and not found.matrix:
        wrong.append("does not use the tensor cores")
    if case.matrix and arch >= 90 and not found.tma:
        wrong.append("does not load by TMA")
    return wrong


def distinct(cases: Iterator[Case]) -> Iterator[Case]:
    """Leave out a launch whose compiled code is another's."""
    seen = set()
    for case in cases:
        launch = case.launch
        key = (id(launch.kernel), repr(signature(launch)), repr(launch.options))
        if key not in seen:
            seen.add(key)
            yield case


def main() -> int:
    parser = Parser(
        prog="python -m bench.resources",
        description="Compile every Triton kernel of a training step; no GPU is needed.",
    )
    parser.add_argument("--arch", choices=ARCHES, default="sm_90")
    parser.add_argument("--preset", choices=PRESETS, default="dcgan64")
    parser.add_argument("--batch", type=int, action="append", help="images per step; may be repeated (128 and 1024)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--only", default="", help="a regular expression that the row's name must match")
    parser.add_argument("--dependent", action="store_true", help="compiled for dependent launch")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--cuda", action="store_true", help="the kernels of csrc/ instead, which nvcc compiles")
    args = parser.parse_args()
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: not a regular expression ({error})") from error
    if args.batch and min(args.batch) < 1:
        raise InputError(f"--batch {min(args.batch)}: it must be at least 1")
    if args.cuda:
        return resources_cuda.report(args.arch, args.only, args.json)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted and not compiled: unset it")
    sm, layers = ARCHES[args.arch], PRESETS[args.preset].arch
    if args.dependent and sm < 90:
        raise InputError(f"--dependent --arch {args.arch}: dependent launch begins with sm_90")
    cases = (case for batch in args.batch or (128, 1024) for case in step_cases(layers, batch, sm, args.precision))
    rows, failed = [], 0
    for case in distinct(cases):
        if not re.search(args.only, case.name):
            continue
        if args.dependent:
            case = replace(case, launch=replace(case.launch, dependent=True))
        found = compile_launch(case.launch, sm)
        wrong = faults(case, found, sm)
        failed += bool(wrong)
        kernel = case.launch.kernel.fn.__name__
        rows.append({"name": case.name, "kernel": kernel, **asdict(found), "faults": wrong})
        if not args.json:
            numbers = f"{found.registers:4d} {found.spills:6d} {found.shared_bytes:7d} {found.matrix:4d} {found.tma:4d}"
            print(f"{case.name:31s} {kernel:27s} {numbers}  {'; '.join(wrong)}".rstrip(), flush=True)
    if not rows:
        raise InputError(f"--only {args.only}: no kernel has such a name")
    if args.json:
        print(json.dumps({"arch": args.arch, "precision": args.precision, "rows": rows, "failed": failed}, indent=1))
    else:
        print(f"{args.arch}: {len(rows)} kernels, {failed} with faults (registers, spills, shared bytes, matrix, TMA)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
