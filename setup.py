"""The build of the CUDA extension; metadata lives in pyproject.toml.

DCGAN_BUILD_CUDA: `auto` (the default) builds kernels._C where nvcc and a CUDA build of torch are, and otherwise, or
where the build fails, goes on without; `1` needs nvcc alone, and fails where it cannot build; `0` never builds, and
leaves no extension of an earlier build.
TORCH_CUDA_ARCH_LIST: GPUs to build for, as for any extension of torch. MAX_JOBS: compilers at a time.

torch's headers are needed, so pip must let the build see the installed torch: `pip install --no-build-isolation -e .`.
The extension uses LibTorch's stable ABI and no Python.h: one file serves every torch from 2.11 and every Python.
torch.utils.cpp_extension is not used, because it refuses to compile CUDA where torch itself has none.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path("csrc")
ARCHES = "8.0 8.6 8.9 9.0a 10.0+PTX"
FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11
]  # fmt: skip


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of where CUDA installs itself."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(home) / "bin" / "nvcc" for home in homes[:2] if home]
    found += [Path(path) for path in [shutil.which("nvcc")] if path]
    found.append(Path(homes[2]) / "bin" / "nvcc")
    return next((str(path) for path in found if path.exists()), None)


def arch_flags(arches: str) -> list[str]:
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST such as `8.0;9.0a+PTX`: machine code each, and PTX where asked for."""
    flags = []
    for arch in arches.replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        real = "90a" if number == "90" else number  # wgmma is 9.0a's; its machine code runs on all of 9.0
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def commands(nvcc: str, torch: Path, objects: Path, target: Path) -> list[tuple[Path, list[str], list[Path]]]:
    """Each output with the command that makes it and what it is made from; the last is the library."""
    arch = arch_flags(os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHES)
    headers = sorted(CSRC.glob("*.h"))
    steps = []
    for source in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")]):
        out = objects / f"{source.name}.o"
        compile_ = [nvcc, *FLAGS, *(arch if source.suffix == ".cu" else []), f"-isystem={torch}/include"]
        steps.append((out, [*compile_, "-c", str(source), "-o", str(out)], [source, *headers, Path("setup.py")]))
    made = [out for out, _, _ in steps]
    # cudart is linked in, and torch_cuda left to libtorch.so, which brings it where there is one: so the library loads
    # with any torch; no rpath, since torch is there before it
    libraries = ["-Xlinker=--no-as-needed", f"-L{torch}/lib", "-ltorch", "-ltorch_cpu"]
    link = [nvcc, "-shared", "-cudart=static", *map(str, made), *libraries, "-o", str(target)]
    return [*steps, (target, link, made)]


def build(nvcc: str, torch: Path, objects: Path, target: Path) -> None:
    """Compile and link, `MAX_JOBS` compilers at a time: by ninja what has changed, without it everything."""
    steps = commands(nvcc, torch, objects, target)
    wanted = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not wanted.isdecimal() or not int(wanted):
        raise CompileError(f"MAX_JOBS is {wanted!r}: expected a positive number of compilers")
    jobs = int(wanted)
    for directory in (objects, target.parent):
        directory.mkdir(parents=True, exist_ok=True)
    if ninja := shutil.which("ninja"):
        lines = [f"builddir = {ninja_path(objects)}", "rule run", "  command = $line"]
        for out, line, sources in steps:
            lines.append(f"build {ninja_path(out)}: run {' '.join(map(ninja_path, sources))}")
            lines.append(f"  line = {shlex.join(line).replace('$', '$$')}")
        file = objects / "build.ninja"
        file.write_text("\n".join(lines) + "\n")
        run([ninja, "-f", str(file), "-j", str(jobs)])
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [line for _, line, _ in steps[:-1]]))
    run(steps[-1][1])


def ninja_path(path: Path) -> str:
    """A path as ninja reads it, whatever is in it."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def run(line: list[str]) -> None:
    """Run a compiler; CompileError, the complaint in its first line and all that was said behind it."""
    try:
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:  # no program, or no permission to run it
        raise CompileError(f"{line[0]} does not start: {error}") from None
    if done.returncode:
        said = done.stdout.strip().splitlines() or [f"{line[0]} returned {done.returncode}"]
        complaint = next((text for text in said if "error" in text.lower()), said[-1])
        raise CompileError("\n".join([complaint, " ".join(line), *said]))


class BuildCuda(build_ext):
    """Builds kernels._C by nvcc, or leaves the reason why not in kernels/_C.txt, for `dcgan.doctor`."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(target)
        try:
            self.build_cuda(target)
        except CompileError as error:
            print(f"the CUDA extension is not built: {error}", file=sys.stderr)
            reason_beside(target).write_text(f"{error}\n", encoding="utf-8")
            raise  # setuptools goes on without an optional extension

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the extension, or the reason, and neither of an earlier build."""
        for ext in self.extensions:
            here, built = map(Path, self._get_inplace_equivalent(self.get_finalized_command("build_py"), ext))
            remove(here)
            for source, target in ((built, here), (reason_beside(built), reason_beside(here))):
                if source.exists():
                    shutil.copy(source, target)

    def build_cuda(self, target: Path) -> None:
        if mode() == "0":
            raise CompileError("DCGAN_BUILD_CUDA was 0")
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda")
        try:
            import torch
        except ImportError:
            raise CompileError("torch is not visible to the build: install with pip's --no-build-isolation") from None
        except OSError as error:  # a library that torch needs is missing
            raise CompileError(f"torch does not load: {error}") from None
        if mode() == "auto" and torch.version.cuda is None:
            raise CompileError(f"torch {torch.__version__} has no CUDA (DCGAN_BUILD_CUDA=1 builds all the same)")
        build(nvcc, Path(torch.__file__).parent, Path(self.build_temp) / "kernels_C", target)


def reason_beside(target: Path) -> Path:
    return target.with_name("_C.txt")


def remove(target: Path) -> None:
    """What an earlier build left."""
    target.unlink(missing_ok=True)
    reason_beside(target).unlink(missing_ok=True)


def mode() -> str:
    wanted = os.environ.get("DCGAN_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DCGAN_BUILD_CUDA is {wanted!r}: accepted are auto, 0 and 1")
    return wanted


def extensions() -> list[Extension]:
    sources, headers = (sorted(map(str, CSRC.glob(pattern))) for pattern in ("*.c*", "*.h"))
    return [Extension("kernels._C", sources, depends=headers, optional=mode() != "1", py_limited_api=True)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildCuda})
