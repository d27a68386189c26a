"""Runs the interpreted tests of the Triton kernels, a process a file.

They are begun with the session (conftest.py) and run beside the other tests, on cores that these leave idle: most tests
have one thread. The longest come first. Alone they have all cores.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton")
HERE = Path(__file__).parent
LONGEST = [f"test_triton_{name}.py" for name in ("wgrad", "gemm", "merge", "fused_step")]
FILES = sorted(
    (path.name for path in HERE.glob("test_triton_*.py") if path.name != Path(__file__).name),
    key=lambda name: (name not in LONGEST, LONGEST.index(name) if name in LONGEST else name),
)
SECONDS = {"not long": 900, "long": 6 * 3600}

if INTERPRETED:
    pytest.skip("this is the interpreter's process", allow_module_level=True)


def run_file(name, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, str(HERE / name)]
    if shutil.which("nice"):
        command = ["nice", "-n", "5", *command]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        RUNNING.add(process)
        try:
            output = process.communicate(timeout=SECONDS[marks])
        finally:
            process.kill()
            RUNNING.remove(process)
    return subprocess.CompletedProcess(command, process.returncode, *output)


BEGUN, RUNNING = {}, set()
"""Results to be, by file and marks; processes."""


def begin(session):
    """Begin with those of the files that a session asks for."""
    ours = [item for item in session.items if item.path == Path(__file__)]
    alone = len(ours) == len(session.items)
    pool = ThreadPoolExecutor(max(1, os.cpu_count() - (not alone)))
    for parameters in (item.callspec.params for item in ours):
        BEGUN[parameters["name"], parameters["marks"]] = pool.submit(run_file, parameters["name"], parameters["marks"])
    return pool


def end(pool):
    """Let go of what nobody waits for, where a session ends before it came to these tests."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in tuple(RUNNING):
        process.terminate()
    pool.shutdown()


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FILES)
def test_file(name, marks):
    done = BEGUN[name, marks].result()
    if marks == "long" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("no long counts")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
