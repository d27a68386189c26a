"""The build of the extension, what happens without it, and the extension in a torch that has no CUDA."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution
from setuptools.errors import CompileError

from kernels import _cuda

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, in the project's folder."""
    monkeypatch.chdir(ROOT)
    for name in ("DCGAN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_ext(build, folder, editable=None):
    """Run the command as pip does, for an editable install into the folder `editable`; returns that of the build."""
    places = {"packages": ["kernels"], "package_dir": {"kernels": str(editable)}} if editable else {}
    command = build.BuildCuda(Distribution({"name": "dcgan", "ext_modules": build.extensions(), **places}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.inplace = editable is not None
    command.ensure_finalized()
    command.run()
    return folder / "lib" / "kernels"


def fake_nvcc(monkeypatch, folder, *lines):
    """An nvcc of shell lines, which also writes down how it was called."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("\n".join(["#!/bin/sh", f'echo "$@" >> {folder}/calls', *lines]))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))
    return folder / "calls"


FAILS = ["echo 'a long story' >&2", "echo 'error: out of patience' >&2", "exit 3"]
WORKS = ['while [ $# -gt 1 ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done']


def test_auto_goes_on_without_nvcc(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    folder = build_ext(build, tmp_path)
    assert os.listdir(folder) == ["_C.txt"]
    assert "nvcc was not found" in (folder / "_C.txt").read_text()
    assert "the CUDA extension is not built: nvcc was not found" in capsys.readouterr().err


def test_auto_goes_on_without_cuda_in_torch(build, tmp_path, monkeypatch):
    calls = fake_nvcc(monkeypatch, tmp_path, *WORKS)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA" in (build_ext(build, tmp_path) / "_C.txt").read_text()
    assert not calls.exists()


def test_auto_goes_on_after_a_failure_and_leaves_no_older_extension(build, tmp_path, monkeypatch):
    fake_nvcc(monkeypatch, tmp_path, *FAILS)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    folder = tmp_path / "lib" / "kernels"
    folder.mkdir(parents=True)
    (folder / "_C.abi3.so").touch()
    build_ext(build, tmp_path)
    assert os.listdir(folder) == ["_C.txt"]
    assert (folder / "_C.txt").read_text().startswith("error: out of patience")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("not executable", "cuda/bin/nvcc does not start: .*Permission denied"),
        ("speaks no UTF-8", "error: \N{REPLACEMENT CHARACTER}"),
        ("MAX_JOBS", "MAX_JOBS is '0': expected a positive number"),
        ("isolation", "torch is not visible to the build: install with pip's --no-build-isolation"),
        ("torch", "torch does not load: libcudart.so.13 is missing"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_no_fault_of_a_build_breaks_an_install_by_auto(build, tmp_path, monkeypatch, mode, fault, message):
    lines = ["printf 'error: \\351\\n'", "exit 1"] if fault == "speaks no UTF-8" else WORKS
    calls = fake_nvcc(monkeypatch, tmp_path, *lines)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("DCGAN_BUILD_CUDA", mode)
    if fault == "MAX_JOBS":
        monkeypatch.setenv("MAX_JOBS", "0")
    elif fault == "not executable":
        (tmp_path / "cuda/bin/nvcc").chmod(0o644)
        monkeypatch.setattr(build.shutil, "which", lambda name: None)  # nor ninja, which would say it by itself
    elif fault == "isolation":
        monkeypatch.setitem(sys.modules, "torch", None)
    elif fault == "torch":
        (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13 is missing')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch")
    if mode == "1":
        with pytest.raises(CompileError, match=message):
            build_ext(build, tmp_path)
        return
    (note,) = build_ext(build, tmp_path).iterdir()
    assert note.name == "_C.txt" and re.search(message, note.read_text(encoding="utf-8").splitlines()[0])
    assert calls.exists() == (lines is not WORKS)


def test_an_editable_install_has_the_extension_or_the_reason(build, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fake_nvcc(monkeypatch, tmp_path / "works", *WORKS)
    package = tmp_path / "package"
    package.mkdir()
    build_ext(build, tmp_path, package)
    assert os.listdir(package) == ["_C.abi3.so"]
    fake_nvcc(monkeypatch, tmp_path / "fails", *FAILS)
    build_ext(build, tmp_path, package)
    assert os.listdir(package) == ["_C.txt"]
    build_ext(build, tmp_path, package)


def test_0_builds_nothing_and_leaves_no_older_extension(build, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_BUILD_CUDA", "0")
    calls = fake_nvcc(monkeypatch, tmp_path, *WORKS)
    package = tmp_path / "package"
    package.mkdir()
    (package / "_C.abi3.so").touch()
    build_ext(build, tmp_path, package)
    assert os.listdir(package) == ["_C.txt"] and not calls.exists()
    assert _cuda.load(package / "_C.abi3.so").endswith("kernels._C is not built: DCGAN_BUILD_CUDA was 0")


def test_1_fails_with_the_reason(build, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_BUILD_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    fake_nvcc(monkeypatch, tmp_path, *FAILS)
    with pytest.raises(CompileError, match="out of patience"):
        build_ext(build, tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    with pytest.raises(CompileError, match="nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda"):
        build_ext(build, tmp_path)


def test_1_needs_nvcc_alone(build, tmp_path, monkeypatch):
    monkeypatch.setenv("DCGAN_BUILD_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", None)
    calls = fake_nvcc(monkeypatch, tmp_path, *WORKS)
    assert os.listdir(build_ext(build, tmp_path)) == ["_C.abi3.so"]
    compiled = [line.split()[line.split().index("-c") + 1] for line in calls.read_text().splitlines() if " -c " in line]
    assert sorted(compiled) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.c*"))


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "threads"])
def test_what_has_changed_is_compiled_again(build, tmp_path, monkeypatch, ninja):
    """By ninja that alone; without it, everything: either way nothing old is left in the library."""
    if ninja and not shutil.which("ninja"):
        pytest.skip("ninja is not installed")
    calls = fake_nvcc(monkeypatch, tmp_path, *WORKS)
    if not ninja:
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    source = tmp_path / "csrc"
    source.mkdir()
    for name in ("a.cu", "b.cpp", "c.h"):
        (source / name).touch()
    monkeypatch.setattr(build, "CSRC", source)
    counts = []
    for changed in (None, "b.cpp", "c.h"):
        if changed:
            later = (source / changed).stat().st_mtime + 10
            os.utime(source / changed, (later, later))
            calls.unlink()
        objects, out = tmp_path / "a folder: $1", tmp_path / "an out.so"  # what shells and ninja would take apart
        build.build(str(build.find_nvcc()), Path(torch.__file__).parent, objects, out)
        counts.append(calls.read_text().count(" -c "))
        assert out.exists() and (objects / "a.cu.o").exists()
    assert counts == ([2, 1, 2] if ninja else [2, 2, 2])


def test_a_typo_is_refused(build, monkeypatch):
    monkeypatch.setenv("DCGAN_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="DCGAN_BUILD_CUDA is 'yes': accepted are auto, 0 and 1"):
        build.extensions()


def test_arch_lists(build):
    gencode = "-gencode=arch=compute_"
    assert build.arch_flags("8.0;9.0a") == [f"{gencode}80,code=sm_80", f"{gencode}90a,code=sm_90a"]
    assert build.arch_flags("10.0+PTX") == [f"{gencode}100,code=sm_100", f"{gencode}100,code=compute_100"]
    codes = [flag.split("=")[-1] for flag in build.arch_flags(build.ARCHES)]
    assert codes == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "compute_100"]


def test_the_sources_name_no_macro_of_torch_newer_than_2_11():
    """TORCH_TARGET_VERSION hides newer functions in the headers here, but no macros, such as 2.13's
    STABLE_TORCH_ERROR_CODE_CHECK."""
    text = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.[ch]*"))
    named = set(re.findall(r"\b(?:STD|STABLE|TORCH|AOTI)_[A-Z0-9_]+", text))
    assert named == {"STD_TORCH_CHECK", "STABLE_TORCH_LIBRARY", "STABLE_TORCH_LIBRARY_IMPL", "AOTI_TORCH_SUCCESS"}


def package(folder):
    """A copy of `kernels` without an extension, in a folder to import it from."""
    shutil.copytree(
        ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("_C.*", "__pycache__"), dirs_exist_ok=True
    )
    return folder


def python(folder, code):
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


WITHOUT = """
import torch, kernels
from kernels import _cuda, dispatch
from kernels.dispatch import BackendError, use_backend
reason = _cuda.available()
print(reason)
gpu = torch.device("cuda"), torch.float32
assert reason == _cuda.why_not(*gpu) == dispatch.why_not("cuda", *gpu)
x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 4, 4)
assert kernels.conv_act(x, weight, stride=2, padding=1).shape == (2, 4, 4, 4)
try:
    with use_backend("cuda"):
        kernels.conv_act(x, weight, stride=2, padding=1)
except BackendError as error:
    assert reason in str(error)
else:
    raise AssertionError("ran by cuda")
"""


def test_a_broken_extension_warns_once_and_the_package_works(tmp_path):
    """Here a library whose copy was cut short, which would kill the process were it loaded."""
    library = package(tmp_path) / "kernels" / "_C.abi3.so"
    library.write_bytes(Path(torch._C.__file__).read_bytes()[:-4096])
    done = python(tmp_path, WITHOUT)
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"the extension kernels._C does not load: {library}" in done.stderr
    assert "cut short" in done.stdout
    library.write_bytes(b"no library")
    assert _cuda.load(library).startswith(f"the extension kernels._C does not load: {library}: ")


def test_without_an_extension_the_cause_is_told(tmp_path):
    path = tmp_path / "_C.abi3.so"
    assert "kernels._C is not built: `DCGAN_BUILD_CUDA=1 pip install" in _cuda.load(path)
    (tmp_path / "_C.txt").write_bytes(b"")  # of a disk that was full
    assert "kernels._C is not built: `DCGAN_BUILD_CUDA=1 pip install" in _cuda.load(path)
    (tmp_path / "_C.txt").write_bytes(b"nvcc said \xe9")
    assert _cuda.load(path).endswith("nvcc said \N{REPLACEMENT CHARACTER}")
    (tmp_path / "_C.txt").write_text("nvcc lost patience\nand a log of what it said\n")
    assert _cuda.load(path) == "the extension kernels._C is not built: nvcc lost patience"


WITH = """
import torch
from kernels import _cuda
from kernels._cuda import batch_norm
assert _cuda.available() is None
assert "need a CUDA device; the tensor is on cpu" in _cuda.why_not(torch.device("cpu"), torch.float32)
assert "the tensor is float64" in _cuda.why_not(torch.device("cuda"), torch.float64)
ops = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("dcgan_cuda::")]
for schema in ops:
    print(schema)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "Meta"), schema.name

y = torch.zeros(2, 4, 4, 16)
try:
    batch_norm.statistics(y)
except RuntimeError as error:
    assert "bn_statistics got a tensor that is not on a CUDA device" in str(error), error
else:
    raise AssertionError("ran on the CPU")
try:
    batch_norm.statistics(y, 3)
except ValueError as error:
    assert "groups is 3: it must divide the batch of 2" in str(error)
else:
    raise AssertionError("took 3 groups")

from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    y, state = torch.empty(2, 4, 4, 16, device="cuda"), torch.empty(4, 2, 16, device="cuda")
    assert torch.ops.dcgan_cuda.bn_apply(y, state, torch.empty_like(y), 0, 16, 2, 16, 64, 0.2) is None
"""


@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="no nvcc")
def test_built_by_nvcc_it_loads_into_this_torch(tmp_path):
    """Schemas, fakes and argument checks; the machine code is not optimised, since no GPU will see it."""
    variables = {"DCGAN_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    environment = os.environ | variables | {"NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0"}
    places = ["--build-lib", tmp_path, "--build-temp", tmp_path / "temp"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = python(package(tmp_path), WITH).stdout
    assert "dcgan_cuda::bn_apply(Tensor y, Tensor state, Tensor(c!) out, int dtype, int rows, int groups, " in printed
    assert "Tensor(e!)? running_mean" in printed and "float momentum, bool dependent=False) -> ()" in printed


def test_the_names_of_an_ops_arguments_are_those_of_its_launch_function():
    """The schema's types are read off the signature; its names are a string of their own."""
    text = (ROOT / "csrc" / "bindings.cpp").read_text()
    ops = {}
    for op, parts in re.findall(r'OP\((\w+), ((?:"[^"]*"\s*\\?\s*)+)\)', text):
        ops[op] = "".join(re.findall(r'"([^"]*)"', parts)).split()
    declared = {}
    for header in (ROOT / "csrc").glob("*.h"):
        for function, arguments in re.findall(r"cudaError_t (\w+)\(\s*Stream \w+,([^;{]*?)\);", header.read_text()):
            declared[function] = [argument.split()[-1].lstrip("*&") for argument in arguments.split(",")]
    assert len(ops) == text.count("  OP(") and ops == {op: declared[op] for op in ops}
