"""Runs the interpreted tests of the Triton kernels, a process a file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import INTERPRETED

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_triton_*.py") if path.name != Path(__file__).name)

if INTERPRETED:
    pytest.skip("this is the interpreter's process", allow_module_level=True)


def run_file(name, marks, seconds):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, str(HERE / name)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_file(name):
    run_file(name, "not long", 600)


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_long_counts_of_file(name):
    run_file(name, "long", 4 * 3600)
