"""The extension's scalar kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on a CPU; and bugs they catch.

The sanitizers' runtimes must be in a process from its start, so each test has one of its own, with the tensors' memory
under watch as well, since it comes from malloc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import CSRC, SANITIZE, compile_host, finish

HERE = Path(__file__).parent
SMALL = " and ".join(
    f"not {name}" for name in ("generated", "torch.float16", "several", "larger", "more_images", "order")
)
FAMILIES = ("batch_norm", "adam", "head")

if os.environ.get("DCGAN_TEST_HOST"):
    pytest.skip("this is the sanitizers' process", allow_module_level=True)

PLANTED = {
    "row_too_many": ("if (row < p.rows) {", "if (row <= p.rows) {", 16, "heap-buffer-overflow"),
    "unaligned_vectors": ("channels % WIDE<T> == 0", "true", 7, "misaligned address"),
}
"""By name: a line of batch_norm.cu, what takes its place, channels that bring the bug out, and what the report says."""

USE = """
import ctypes, sys
class Stream(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("dependent", ctypes.c_bool))
lib, channels = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
y, values, counts = (ctypes.create_string_buffer(4 * n) for n in (64 * channels, 2 * channels, 1))
stream, i64 = Stream(1, False), ctypes.c_int64
print("error", lib.bn_statistics(stream, y, values, counts, i64(0), i64(64), i64(1), i64(channels), i64(256)))
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder of the families' libraries, sanitized, and of one with the bugs planted."""
    folder = tmp_path_factory.mktemp("sanitized")
    for path in CSRC.glob("*.h"):
        shutil.copy(path, folder)
    source = (CSRC / "batch_norm.cu").read_text()
    for right, wrong, *_ in PLANTED.values():
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    (folder / "planted.cu").write_text(source)
    sources = [*(CSRC / f"{name}.cu" for name in FAMILIES), folder / "planted.cu"]
    for process in [compile_host(path, folder / f"{path.stem}.so", *SANITIZE) for path in sources]:
        finish(process)
    return folder


def sanitized(command, **environment):
    """Run a command with the sanitizers' runtimes in it; skips where they are not installed."""
    names = (
        "libasan.so",
        "libubsan.so",
        "libstdc++.so",
    )  # the last, so that exceptions of torch's are seen as they are
    runtimes = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
    paths = [done.stdout.strip() for done in runtimes]
    if not all(Path(path).is_absolute() for path in paths):
        pytest.skip("g++ has no sanitizers here")
    options = {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    environment = os.environ | options | environment
    return subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=600)


def test_the_scalar_kernels_are_clean(libraries):
    """Every test but those whose shapes are large, and add nothing at the edges."""
    files = [str(HERE / f"test_cuda_{name}.py") for name in FAMILIES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long", *files]
    done = sanitized([*command, "-k", SMALL], DCGAN_TEST_HOST=str(libraries))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(libraries, name):
    *_, channels, message = PLANTED[name]
    planted, ours = (
        sanitized([sys.executable, "-c", USE, str(libraries / f"{library}.so"), str(channels)])
        for library in ("planted", "batch_norm")
    )
    assert ours.returncode == 0 and "error 0" in ours.stdout, ours.stderr[-3000:]
    assert planted.returncode != 0 and message in planted.stderr, planted.stderr[-3000:]
