"""Runs the interpreted tests of the Triton kernels, a process a file, as many at a time as there are cores."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_triton_*.py") if path.name != Path(__file__).name)
SECONDS = {"not long": 900, "long": 6 * 3600}

if INTERPRETED:
    pytest.skip("this is the interpreter's process", allow_module_level=True)


def run_file(name, marks):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=SECONDS[marks]
    )


@pytest.fixture(scope="module")
def results(request):
    """Of the files that were asked for, by file and marks; begun together."""
    wanted = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {(p["name"], p["marks"]): pool.submit(run_file, p["name"], p["marks"]) for p in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("marks", ["not long", pytest.param("long", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", FILES)
def test_file(results, name, marks):
    done = results[name, marks].result()
    if marks == "long" and done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("no long counts")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
