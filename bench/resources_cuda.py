"""What the extension's kernels need of a GPU: `python -m bench.resources --cuda [--arch sm_90]`. No GPU is needed.

nvcc compiles every csrc/*.cu for the architecture, ptxas tells registers, spills and static shared memory of each
kernel (dynamic shared memory is in the sources' static_asserts), and cuobjdump, which comes with Triton, shows the
machine code. Fails on

- a spill to local memory;
- more static shared memory than one block may have there;
- from sm_90 on, memory that is read or written before the wait for the launch before (`kernels.dependent`);
- a 16-bit product that is not on the tensor cores, and on sm_90 a `_sm90` kernel without wgmma or without TMA, or whose
  wgmma the assembler put one after another.

Exit codes: 0; 1 on a fault; 2 if there is no nvcc.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v")
STATIC_LIMIT_BYTES = 48 << 10
"""Static shared memory of a block, on every architecture. Source: CUDA programming guide, technical specifications."""
MEMORY = r"\b(?:LDG?|STG?|ATOMG?|REDG?|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLK\w+)\b"
"""What reads or writes the GPU's memory; not `UTMACCTL`, which fetches a tensor map, a parameter, ahead."""
WAIT = r"\bACQBULK\b"
MATRIX, WGMMA, TMA = r"\bHG?MMA\b|\bHMMA\.|\bHGMMA\.|\bUTC\w*MMA\b", r"\bHGMMA\.", r"\bUTMALDG\."


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    source: its file's name. name: as in the source, with its template arguments. registers: of a thread.
    spills: bytes of local memory a thread. shared_bytes: static, of a block.
    matrix, wgmma, tma: instructions of its machine code; None if that could not be read.
    early: what its machine code does to memory before it has waited for the launch before; None as for the others.
    serialized: whether the assembler says that it makes each wgmma wait for the one before.
    """

    source: str
    name: str
    registers: int
    spills: int
    shared_bytes: int
    matrix: int | None = None
    wgmma: int | None = None
    tma: int | None = None
    early: int | None = None
    serialized: bool = False


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of where CUDA installs itself."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [shutil.which("nvcc", path=str(Path(home) / "bin")) for home in homes if home]
    return next(filter(None, [*found, shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]), None)


def target(arch: str) -> str:
    """nvcc's flag for one architecture: sm_90 with the instructions that only it has."""
    number = arch.removeprefix("sm_")
    number = "90a" if number == "90" else number
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def readable(names: list[str]) -> dict[str, str]:
    """Mangled names as the source has them, short; as they are where c++filt is missing."""
    if not names or not shutil.which("c++filt"):
        return {name: name for name in names}
    said = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return {name: short(full) for name, full in zip(names, said.splitlines(), strict=True)}


def short(name: str) -> str:
    """`image_conv_kernel<bf16, 3, 0>` of a demangled signature."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\((?:\w+)\)(\d+)", r"\1", name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16"))
    depth, end = 0, len(name)
    for at, letter in enumerate(name):  # the arguments start at the first parenthesis outside of a template's
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and not depth:
            end = at
            break
    return name[:end].strip()


def parse_ptxas(text: str) -> dict[str, tuple[int, int, int]]:
    """{mangled kernel: (registers, spilled bytes, static shared bytes)} of what `ptxas -v` says."""
    found, name, spills = {}, None, 0
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name, spills = entry[1], 0
        elif name and (spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line)):
            spills = max(map(int, spill.groups()))
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name], name = (int(used[1]), spills, int(shared[1]) if shared else 0), None
    return found


def parse_serialized(text: str) -> set[str]:
    """The mangled kernels of which ptxas says that their wgmma are serialized."""
    return set(re.findall(r"wgmma\S* instructions are serialized.*? function '([^']+)'", text))


def parse_sass(text: str) -> dict[str, Counter]:
    """{mangled kernel: how often its machine code has matrix, wgmma and TMA instructions, and memory `early`}."""
    counts, counter, waited = {}, Counter(), False
    for line in text.splitlines():
        if function := re.match(r"\s*Function : (\S+)", line):
            counter, waited = Counter(), False
            counts[function[1]] = counter
        waited |= bool(re.search(WAIT, line))
        counter["early"] += not waited and bool(re.search(MEMORY, line))
        for kind, pattern in (("matrix", MATRIX), ("wgmma", WGMMA), ("tma", TMA)):
            counter[kind] += bool(re.search(pattern, line))
    return counts


def find_cuobjdump() -> str | None:
    spec = find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec and spec.origin else None
    return str(bundled) if bundled and bundled.exists() else shutil.which("cuobjdump")


def compile_source(nvcc: str, source: Path, arch: str, cuobjdump: str | None = None) -> list[Kernel]:
    """The kernels of one file, compiled for `arch`.

    Raises:
        RuntimeError: it does not compile; nvcc's words.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        command = [nvcc, *FLAGS, target(arch), "-cubin", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stderr or done.stdout}")
        used, serialized = parse_ptxas(done.stderr + done.stdout), parse_serialized(done.stderr + done.stdout)
        code = {}
        if cuobjdump:
            sass = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
            code = parse_sass(sass)
    names = readable(list(used))
    kernels = []
    for mangled, numbers in used.items():
        counts = {kind: code[mangled][kind] for kind in ("matrix", "wgmma", "tma", "early")} if mangled in code else {}
        kernels.append(Kernel(source.name, names[mangled], *numbers, **counts, serialized=mangled in serialized))
    return sorted(kernels, key=lambda kernel: kernel.name)


def faults(kernel: Kernel, arch: str) -> list[str]:
    """What is wrong with a compiled kernel; nothing where it may ship."""
    wrong = []
    if kernel.spills:
        wrong.append(f"spills {kernel.spills} bytes per thread to local memory")
    if kernel.shared_bytes > STATIC_LIMIT_BYTES:
        wrong.append(f"takes {kernel.shared_bytes} bytes of static shared memory, of {STATIC_LIMIT_BYTES} there are")
    product = re.match(r"(image|conv)_", kernel.name) and re.search(r"<(bf16|fp16)\b", kernel.name)
    hopper = "_sm90_" in kernel.name
    if product and kernel.matrix == 0 and (arch == "sm_90" or not hopper):
        wrong.append("does not use the tensor cores")
    if hopper and arch == "sm_90" and kernel.wgmma == 0:
        wrong.append("does not use wgmma")
    if hopper and arch == "sm_90" and kernel.tma == 0:
        wrong.append("does not load by TMA")
    if kernel.early and int(arch.removeprefix("sm_")) >= 90:
        wrong.append(f"touches memory {kernel.early} times before it has waited for the launch before")
    if kernel.serialized:
        wrong.append("has its wgmma serialized")
    return wrong


def report(arch: str, only: str = "", as_json: bool = False) -> int:
    """Compile everything for `arch` and print a line per kernel; the exit code."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda: install the CUDA toolkit", file=sys.stderr)
        return 2
    cuobjdump = find_cuobjdump()
    sources = sorted(CSRC.glob("*.cu"))
    try:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
            found = list(pool.map(lambda source: compile_source(nvcc, source, arch, cuobjdump), sources))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    rows, failed = [], 0
    for kernel in sum(found, []):
        if not re.search(only, kernel.name):
            continue
        wrong = faults(kernel, arch)
        failed += bool(wrong)
        rows.append({**asdict(kernel), "faults": wrong})
        if not as_json:
            code = " ".join("   ?" if n is None else f"{n:4d}" for n in (kernel.matrix, kernel.tma))
            numbers = f"{kernel.registers:4d} {kernel.spills:6d} {kernel.shared_bytes:7d} {code}"
            print(f"{kernel.source:26s} {kernel.name:44s} {numbers}  {'; '.join(wrong)}".rstrip())
    if as_json:
        print(json.dumps({"arch": arch, "rows": rows, "failed": failed}, indent=1))
    else:
        heading = "registers, spills, static shared bytes, matrix, TMA"
        print(f"{arch}: {len(rows)} kernels, {failed} with faults ({heading})")
    return 1 if failed or not rows else 0
