"""What each Triton kernel needs of a GPU: registers, spills, shared memory, instructions. No GPU is needed to ask.

Every kernel of a training step is compiled for the architecture, in the configuration that ships, for each layer of the
preset at each batch; ptxas and cuobjdump, which come with Triton, then say what came of it. Fails on

- a spill to local memory;
- a 16-bit GEMM of a middle layer without the tensor-core instruction of its architecture (wgmma fed by TMA on sm_90,
  tcgen05 fed by TMA on sm_100, mma on sm_80);
- more shared memory than one program may have there.

    python -m bench.resources --arch sm_90 [--preset dcgan64] [--batch 128 --batch 1024] [--precision bf16] [--json]
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
from dcgan.arch import PRESETS, Arch
from dcgan.errors import InputError, run_command
from dcgan.flags import Parser
from kernels._triton import batch_norm, batch_norm_grad
from kernels._triton.adam import adam_table, prepare_adam
from kernels._triton.config import SHARED_LIMIT_BYTES
from kernels._triton.conv import prepare_conv
from kernels._triton.conv_transpose import prepare_conv_transpose
from kernels._triton.gather import prepare_gather
from kernels._triton.head import prepare_gan_loss, prepare_head, prepare_head_grad
from kernels._triton.launch import Job, Launch
from kernels._triton.wgrad import prepare_wgrad
from kernels.geometry import Epilogue, Layer, Merge

ARCHES = {f"sm_{arch}": arch for arch in sorted(SHARED_LIMIT_BYTES)}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
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


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    registers: of a thread. spills: bytes of local memory a thread. shared_bytes: of a program.
    matrix, tma: how often its PTX names the architecture's tensor-core instruction and a TMA load.
    """

    registers: int
    spills: int
    shared_bytes: int
    matrix: int
    tma: int


@dataclass(frozen=True)
class Case:
    """A launch to compile, what to call it, and whether it must run on the tensor cores."""

    name: str
    launch: Launch
    matrix: bool


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
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _resource_usage(built.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    ptx = built.asm["ptx"]
    matrix, tma = (len(re.findall(pattern, ptx)) for pattern in (TENSOR_CORE[arch], TMA))
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], built.metadata.shared, matrix, tma)


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
        wrong.append(f"spills {found.spills} bytes a thread to local memory")
    if found.shared_bytes > SHARED_LIMIT_BYTES[arch]:
        wrong.append(f"takes {found.shared_bytes} bytes of shared memory, of {SHARED_LIMIT_BYTES[arch]} there are")
    if case.matrix and not found.matrix:
        wrong.append("does not use the tensor cores")
    if case.matrix and arch >= 90 and not found.tma:
        wrong.append("does not load by TMA")
    return wrong


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _maps(layer: Layer, images: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer's input, output and packed weight (low, 4, 4, high), as shapes alone."""
    x = _meta(images, layer.in_size, layer.in_size, layer.in_channels, dtype=dtype)
    y = _meta(images, layer.out_size, layer.out_size, layer.out_channels, dtype=dtype)
    out, into, r, s = layer.weight_shape
    return x, y, _meta(out, r, s, into, dtype=dtype)


def _network(
    layers: tuple[Layer, ...], images: int, groups: int, weights: bool, sm: int, precision: str
) -> Iterator[Case]:
    """The launches of one network's k4 s2 layers and batch norms, forward and backward, at `images` a group."""
    dtype = PRECISIONS[precision]
    options = {"arch": sm, "precision": "tf32" if precision == "tf32" else "ieee"}
    for before, layer in zip((None, *layers), layers, strict=False):
        x, y, weight = _maps(layer, images * groups, dtype)
        label = f"{layer.name} {groups}×{images}"
        matrix = dtype != torch.float32 and min(layer.in_channels, layer.out_channels) > 4

        def cases(name: str, job: Job, matrix: bool, label: str = label) -> Iterator[Case]:
            for position, launch in enumerate(job.launches):
                yield Case(f"{label} {name}", launch, matrix and not position)

        if layer.stride == 2:
            forward, backward = prepare_conv, prepare_conv_transpose
            if layer.kind == "conv_transpose":
                forward, backward = backward, forward
            after = Epilogue(layer.activation)
            if layer.batch_norm:
                vector = _meta(layer.out_channels, dtype=torch.float32)
                merge = Merge(vector, vector, vector, vector, _meta(dtype=torch.int64))
                after = Epilogue(groups=groups, statistics=True, merge=merge)
            yield from cases("forward", forward(x, weight, after, **options), matrix)
            if before is not None:
                into = Epilogue(before.activation, groups=groups, saved=x)
                if before.batch_norm:
                    state = _meta(4, groups, layer.in_channels, dtype=torch.float32)
                    merge = Merge(state[0, 0], state[0, 0]) if weights else Merge(None, None)
                    into = replace(into, state=state, merge=merge)
                yield from cases("dgrad", backward(y, weight, into, **options), matrix)
            elif not weights:  # D frozen in G's step: the images' gradient is wanted, through the tanh that made them
                yield from cases("dgrad", backward(y, weight, Epilogue("tanh", saved=x), **options), matrix)
            if weights:
                low, high = (y, x) if layer.kind == "conv" else (x, y)
                yield from cases("wgrad", prepare_wgrad(low, high, **options), matrix)
        if layer.batch_norm:
            state = _meta(4, groups, layer.out_channels, dtype=torch.float32)
            means, vector = _meta(2, groups, layer.out_channels, dtype=torch.float32), state[0, 0]
            rows = images * layer.out_size**2
            measured, (_, sums) = (
                batch_norm.prepare_statistics(y, groups),
                batch_norm_grad.prepare_activation_grad(y, y, state, layer.activation).result,
            )
            tracked = _meta(dtype=torch.int64)
            merge = batch_norm.prepare_merge_statistics(measured.result, vector, vector, vector, vector, tracked)
            yield from cases("statistics", measured, False)
            yield from cases("merge_statistics", merge, False)
            yield from cases("apply", batch_norm.prepare_apply(y, state, layer.activation), False)
            grad = batch_norm_grad.prepare_activation_grad(y, y, state, layer.activation)
            yield from cases("activation_grad", grad, False)
            yield from cases("merge_sums", batch_norm_grad.prepare_merge_sums(sums, rows), False)
            yield from cases("apply_grad", batch_norm_grad.prepare_apply_grad(y, y, state, means), False)


def _others(arch: Arch, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """The launches that belong to no convolution: the gather, D's head in its forms, the loss, Adam."""
    counter = _meta(dtype=torch.int64)
    rows = _meta(60000, arch.image_size, arch.image_size, arch.channels, dtype=torch.uint8)
    permutation, flip = _meta(60000, dtype=torch.int64), _meta(60000, dtype=torch.uint8)
    jobs = {
        "gather": prepare_gather(rows, permutation, counter, batch, None, dtype),
        "gather, mirrored": prepare_gather(rows, permutation, counter, batch, flip, dtype),
    }
    last = arch.discriminator[-1]
    weight = _maps(last, 1, dtype)[2]
    for real in ((True, False), (True,)):
        groups = len(real)
        y = _meta(batch * groups, last.in_size, last.in_size, last.in_channels, dtype=dtype)
        state = _meta(4, groups, last.in_channels, dtype=torch.float32)
        job = prepare_head(y, weight, state, real)
        jobs[f"D head {groups}×{batch}"] = job
        grad = prepare_head_grad(y, weight, state, job.result[1], weight_grad=groups == 2)
        jobs[f"D head {groups}×{batch} backward"] = grad
    shapes = [layer.weight_shape for layer in arch.discriminator]
    tensors = [_meta(*shape, dtype=torch.float32) for shape in shapes]
    copies = [_meta(*shape, dtype=dtype if dtype.itemsize == 2 else torch.bfloat16) for shape in shapes]
    table, scale = adam_table(tensors, tensors, tensors, tensors, copies), _meta(3, dtype=torch.float32)
    jobs["Adam"] = prepare_adam(table, counter, 2e-4)
    jobs["Adam, scaled"] = prepare_adam(table, counter, 2e-4, loss_scale=scale)
    jobs["gan_loss"] = prepare_gan_loss(_meta(2 * batch, dtype=torch.float32), (True, False))
    for name, job in jobs.items():
        for launch in job.launches:
            yield Case(name, launch, False)


def step_cases(arch: Arch, batch: int, sm: int, precision: str = "bf16") -> Iterator[Case]:
    """Every launch of a training step at `batch` images, in the configuration that ships for capability `sm`."""
    yield from _network(arch.generator, batch, 1, True, sm, precision)
    yield from _network(arch.discriminator, batch, 2, True, sm, precision)
    yield from _network(arch.discriminator, batch, 1, False, sm, precision)
    yield from _others(arch, batch, PRECISIONS[precision])


def distinct(cases: Iterator[Case]) -> Iterator[Case]:
    """Leave out a launch whose compiled code is another's."""
    seen = set()
    for case in cases:
        launch = case.launch
        key = (id(launch.kernel), repr(signature(launch)), launch.warps, launch.stages)
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
    parser.add_argument("--batch", type=int, action="append", help="images a step; may be repeated (128 and 1024)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--only", default="", help="a regular expression that the row's name must match")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--cuda", action="store_true", help="the kernels of csrc/ instead, which nvcc compiles")
    args = parser.parse_args()
    try:
        re.compile(args.only)
    except re.error as error:
        raise InputError(f"--only {args.only}: no regular expression ({error})") from error
    if args.cuda:
        return resources_cuda.report(args.arch, args.only, args.json)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, so kernels are interpreted and not compiled: unset it")
    sm, layers = ARCHES[args.arch], PRESETS[args.preset].arch
    cases = (case for batch in args.batch or (128, 1024) for case in step_cases(layers, batch, sm, args.precision))
    rows, failed = [], 0
    for case in distinct(cases):
        if not re.search(args.only, case.name):
            continue
        found = compile_launch(case.launch, sm)
        wrong = faults(case, found, sm)
        failed += bool(wrong)
        kernel = case.launch.kernel.fn.__name__
        rows.append({"name": case.name, "kernel": kernel, **asdict(found), "faults": wrong})
        if not args.json:
            numbers = f"{found.registers:4d} {found.spills:6d} {found.shared_bytes:7d} {found.matrix:4d} {found.tma:4d}"
            print(f"{case.name:30s} {kernel:24s} {numbers}  {'; '.join(wrong)}".rstrip(), flush=True)
    if args.json:
        print(json.dumps({"arch": args.arch, "precision": args.precision, "rows": rows, "failed": failed}, indent=1))
    else:
        print(f"{args.arch}: {len(rows)} kernels, {failed} with faults (registers, spills, shared bytes, matrix, TMA)")
    if not rows:
        raise InputError(f"--only {args.only}: no kernel has such a name")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
