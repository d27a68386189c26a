"""csrc/host.h, which the CUDA kernels' tests stand on: it computes what a GPU would, and notices faults."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_host import CSRC, compile_host, finish, in_both_orders, load, on_host

from kernels._cuda import batch_norm

PROGRAM = """
#include "common.h"

__global__ void shuffles(const int* in, int* out) {
  const int t = threadIdx.x, lane = t % WARP;
  const int x = in[t];
  out[4 * t] = __shfl_xor_sync(0xffffffffu, x, 5);
  out[4 * t + 1] = __shfl_down_sync(0xffffffffu, x, 3);
  out[4 * t + 2] = __shfl_sync(0xffffffffu, x, 7);
  if (lane < 4) out[4 * t + 3] = __shfl_xor_sync(0xfu, x, 1);
  __syncwarp();
}

__global__ void reverse(const int* in, int* out, bool barrier) {
  __shared__ int held[64];
  held[threadIdx.x] = in[blockIdx.x * 64 + threadIdx.x];
  if (barrier) __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = held[63 - threadIdx.x];
}

__global__ void skipped() {
  if (threadIdx.x) __syncwarp();
}

__global__ void apart(int* out) {
  if (threadIdx.x % 2) *out = __shfl_sync(0xffffffffu, 1, 0);
  else *out = __shfl_sync(0xffffffffu, 2, 0);
}

// x += 1; `wait`: 0 never, 1 between reading and writing, 2 after writing, 3 before both
__global__ void add_one(int* x, int wait) {
  int* const at = x + blockIdx.x * 64 + threadIdx.x;
  if (wait == 3) after_previous();
  const int old = *at;
  if (wait == 1) after_previous();
  *at = old + 1;
  if (wait == 2) after_previous();
}

const Stream ON_CALLERS{CALLERS_STREAM, false}, EARLY{CALLERS_STREAM, true};

extern "C" {
void to_floats(const uint16_t* bits, float* halves, float* bfloats, int n) {
  for (int i = 0; i < n; ++i) halves[i] = to_float(__half{bits[i]}), bfloats[i] = to_float(__nv_bfloat16{bits[i]});
}
void from_floats(const float* x, uint16_t* halves, uint16_t* bfloats, int n) {
  for (int i = 0; i < n; ++i)
    halves[i] = from_float<__half>(x[i]).bits, bfloats[i] = from_float<__nv_bfloat16>(x[i]).bits;
}
int run_shuffles(const int* in, int* out) { return launch(shuffles, 1, 64, 0, ON_CALLERS, in, out); }
int run_reverse(const int* in, int* out, int barrier) {
  return launch(reverse, 3, 64, 0, ON_CALLERS, in, out, barrier != 0);
}
int run_skipped() { return launch(skipped, 1, 64, 0, ON_CALLERS); }
int run_apart() {
  int out;
  return launch(apart, 1, 32, 0, ON_CALLERS, &out);
}
int run_elsewhere() { return launch(skipped, 1, 1, 0, Stream{nullptr, false}); }
int run_add_one(int* x, int wait) {
  host_pending(x, 3 * 64 * sizeof(int));
  return launch(add_one, 3, 64, 0, EARLY, x, wait);
}
int run_early() { static int x[3 * 64]; return run_add_one(x, 0); }
int run_overwriting() { static int x[3 * 64]; return run_add_one(x, 2); }
int run_nothing() { return launch(skipped, dim3(0), 64, 0, ON_CALLERS); }
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "program.cu").write_text(PROGRAM)
    finish(compile_host(folder / "program.cu", folder / "program.so"))
    return folder / "program.so"


@pytest.fixture
def program(made):
    return load(made)


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_every_16_bit_number(program):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves, bfloats = torch.empty(2**16), torch.empty(2**16)
    program.to_floats(pointer(bits), pointer(halves), pointer(bfloats), 2**16)
    torch.testing.assert_close(halves, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloats, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)


def test_rounding_to_16_bits(program):
    """Random bits of a float, and every half and bfloat16's midpoint to the next one, with its neighbours."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    near = [(numbers.view(dtype).float().view(torch.int32) + half) for dtype, half in
            ((torch.bfloat16, 2**15), (torch.float16, 2**12), (torch.float16, 0))]  # fmt: skip
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    bits = torch.cat([random, *(n + off for n in near for off in (-1, 0, 1))])
    x = bits.view(torch.float32)
    for dtype, place in ((torch.float16, 0), (torch.bfloat16, 1)):
        rounded = [torch.empty(len(x), dtype=torch.int16) for _ in range(2)]
        program.from_floats(pointer(x), *map(pointer, rounded), len(x))
        torch.testing.assert_close(rounded[place].view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_shuffles(program):
    x = torch.arange(64, dtype=torch.int32) * 10
    out = torch.full((64, 4), -1, dtype=torch.int32)
    assert program.run_shuffles(pointer(x), pointer(out)) == 0
    lanes = torch.arange(64) % 32
    first = torch.arange(64) - lanes
    down = torch.where(lanes + 3 < 32, lanes + 3, lanes)
    assert torch.equal(out[:, 0], x[first + (lanes ^ 5)])
    assert torch.equal(out[:, 1], x[first + down])
    assert torch.equal(out[:, 2], x[first + 7])
    assert torch.equal(out[:, 3], torch.where(lanes < 4, x[first + (lanes ^ 1)], -1))


def test_a_missing_barrier_shows_in_one_order_or_the_other(program):
    x = torch.randperm(192, generator=torch.Generator().manual_seed(0)).int()

    def run(barrier):
        out = torch.empty_like(x)
        assert program.run_reverse(pointer(x), pointer(out), barrier) == 0
        return out

    right = x.view(3, 64).flip(1).flatten()
    assert all(torch.equal(out, right) for out in in_both_orders(lambda: run(1)))
    assert not all(torch.equal(out, right) for out in in_both_orders(lambda: run(0)))


def test_an_empty_grid_and_a_launch_on_another_stream_than_the_callers_are_refused(program):
    assert program.run_nothing() != 0 and program.run_elsewhere() != 0


@pytest.mark.parametrize(
    "function, message",
    [
        ("run_skipped", "deadlock: a barrier or a collective"),
        ("run_apart", "different collectives"),
        ("run_early", "ends before it has waited for the launch before it"),
        ("run_overwriting", "writes before it has waited for the launch before it"),
    ],
)
def test_what_can_never_go_on_ends_the_process(made, function, message):
    code = f"import ctypes; ctypes.CDLL({str(made)!r}).{function}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode < 0 and message in done.stderr


def test_what_is_read_before_the_launch_before_has_ended_is_not_there(program):
    right, wrong = torch.arange(192, dtype=torch.int32), torch.arange(192, dtype=torch.int32)
    assert program.run_add_one(pointer(right), 3) == program.run_add_one(pointer(wrong), 1) == 0
    assert torch.equal(right, torch.arange(1, 193)) and not wrong.any()  # −1, all bits set, plus one
    program.host_forget()


def test_a_race_planted_in_our_kernels_is_caught(tmp_path):
    """reduce_lines without the barrier between a line's writing and another's reading."""
    for path in CSRC.glob("*.h"):
        shutil.copy(path, tmp_path)
    block, barrier = (CSRC / "block.h").read_text(), "mine[i];\n    __syncthreads();\n"
    assert block.count(barrier) == 1
    (tmp_path / "block.h").write_text(block.replace(barrier, "mine[i];\n"))
    shutil.copy(CSRC / "batch_norm.cu", tmp_path)
    finish(compile_host(tmp_path / "batch_norm.cu", tmp_path / "racy.so"))
    y = torch.randn(2, 9, 9, 16, generator=torch.Generator().manual_seed(0))
    with on_host(load(tmp_path / "racy.so")):
        forwards, backwards = in_both_orders(lambda: batch_norm.statistics(y).values)
    assert not torch.equal(forwards, backwards)
