"""The extension's products under AddressSanitizer and UndefinedBehaviorSanitizer, on a CPU: every access in bounds."""

import os
import sys

import pytest

if os.environ.get("DCGAN_TEST_HOST"):
    pytest.skip("this is the sanitizers' process", allow_module_level=True)

from cuda_host import CSRC, SANITIZE, compile_host, finish
from test_cuda_sanitizers import HERE, sanitized

SOURCES = (
    "image_conv",
    "image_conv_transpose",
    "image_wgrad",
    "conv_sm80",
    "conv_sm90",
    "wgrad_sm90",
    "shares",
    "batch_norm",
)


@pytest.mark.long
def test_every_test_of_the_products(tmp_path):
    compiling = [compile_host(CSRC / f"{name}.cu", tmp_path / f"{name}.so", *SANITIZE) for name in SOURCES]
    for process in compiling:
        finish(process)
    files = [str(HERE / f"test_cuda_{name}.py") for name in ("image", "conv")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long", *files]
    done = sanitized(command, DCGAN_TEST_HOST=str(tmp_path))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout, done.stdout[-2000:]
