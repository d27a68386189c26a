"""Waits taken out of the asynchronous products, one by one: the model of a GPU's timing must show each of them.

`csrc/host.h` does what TMA, cp.async and wgmma do at the last moment that the waits allow, or at once, and runs threads
in one order and another. Without a wait, some combination of them gives other results, or ends with a message.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_host import CSRC, compile_host, finish

ROOT = Path(__file__).parent.parent

RUN = """
import sys
sys.path[:0] = {paths!r}
import torch
from cuda_host import in_every_order, load, on_host
from kernels import reference
from kernels._cuda import conv
from kernels.geometry import CudaConfig, Epilogue

kernel, source = sys.argv[1:3]
conv.source = lambda tensor: source.split("_")[-1]
def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
conv.CLUSTERED_SMS = 4  # no shares, and so more steps than stages
low, high, weight = noise(48, 4, 4, 64), noise(48, 8, 8, 64), noise(64, 4, 4, 64) / 32
first, second = dict(conv=(high, weight), conv_transpose=(low, weight), wgrad=(low, high))[kernel]
def run():
    made = getattr(conv, kernel)(first, second, config=CudaConfig(64, 2))
    return made if kernel == "wgrad" else made[0]
made = getattr(reference, kernel)(first, second)
true = (made if kernel == "wgrad" else made[0]).float()
with on_host(load(sys.argv[3])):
    for ours in in_every_order(run):
        assert (ours.float() - true).abs().max() <= 0.02 * true.abs().max(), "wrong"
"""

LONG = pytest.mark.long
CONV, WGRAD, SM80 = ("conv", "conv_sm90"), ("wgrad", "wgrad_sm90"), ("conv", "conv_sm80")
WAITS = [
    pytest.param(*CONV, "", "", id="nothing"),
    pytest.param(*CONV, "wgmma_wait<1>();", "wgmma_wait<2>();", id="conv: registers still being read"),
    pytest.param(*CONV, "barrier_wait(full + stage, parity);", "", id="conv: weights not there", marks=LONG),
    pytest.param(*CONV, "barrier_wait(plane_full + i % PLANES, i / PLANES & 1);", "", id="conv: pixels not there",
                 marks=LONG),
    pytest.param(*CONV, "barrier_wait(empty + last_but_one, refill_parity);", "", id="conv: weights still being read",
                 marks=LONG),
    pytest.param(*CONV, "barrier_wait(plane_empty + (i - 1) % PLANES, (i - 1) / PLANES & 1);", "",
                 id="conv: pixels still being read"),
    pytest.param(*CONV, "barrier_arrive_at(empty + last, lane);", "barrier_arrive_at(empty + last, rank);",
                 id="conv: others of the cluster not told"),
    pytest.param(*WGRAD, "", "", id="nothing, wgrad", marks=LONG),
    pytest.param(*WGRAD, "wgmma_wait<1>();", "wgmma_wait<2>();", id="wgrad: registers still being read", marks=LONG),
    pytest.param(*WGRAD, "barrier_wait(full + stage, parity);", "", id="wgrad: pixels not there", marks=LONG),
    pytest.param(*WGRAD, "barrier_wait(empty + stage, parity ^ 1);", "", id="wgrad: pixels still being read"),
    pytest.param(*SM80, "copy_wait<P::STAGES - 2>();", "copy_wait<P::STAGES - 1>();", id="sm80: a step too early"),
]  # fmt: skip


@pytest.mark.parametrize("kernel, source, wait, instead", WAITS)
def test_a_wait_that_is_missing_shows(kernel, source, wait, instead, tmp_path):
    for path in CSRC.glob("*.h"):
        shutil.copy(path, tmp_path)
    text = (CSRC / f"{source}.cu").read_text()
    assert not wait or text.count(wait) == 1
    changed = tmp_path / f"{source}.cu"
    changed.write_text(text.replace(wait, instead) if wait else text)
    finish(compile_host(changed, tmp_path / "changed.so"))
    script = RUN.format(paths=[str(ROOT / "tests"), str(ROOT)])
    command = [sys.executable, "-c", script, kernel, source, str(tmp_path / "changed.so")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == bool(wait), done.stderr[-2000:]
    assert not wait or "wrong" in done.stderr or "host.h:" in done.stderr, done.stderr[-2000:]
